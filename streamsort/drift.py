"""Per-unit alarms: what a unit looks like changed at once, and not as slowly as its template follows.

ADWIN (Bifet & Gavalda 2007, from river) watches two numbers of every spike: its distance to the unit's own prototype and its
height. It keeps a window that shrinks when its two halves differ, costs half a microsecond a spike and runs at learning boundaries
only.
"""

from collections.abc import Iterable
from typing import NamedTuple

from river.drift import ADWIN

_DELTA = 1e-4  # chance of a false alarm per look; a hundred units for an hour should raise none
# Of thousands of spikes ADWIN notes changes that concern nobody: below a standard deviation of distance, or so much of a height.
_LEAST_DISTANCE, _LEAST_HEIGHT = 1.0, 0.05


class Alarm(NamedTuple):
    """What changed, from which mean to which: `amplitude` in noise units, or `distance` to the prototype."""

    what: str
    before: float
    after: float

    @property
    def reason(self) -> str:
        """Say it in words, as the ledger does."""
        if self.what == "distance":
            return "distance to its prototype changed"
        return "amplitude fell" if self.after < self.before else "amplitude rose"


class DriftWatch:
    """Watch one unit.

    Examples
    --------
    >>> watch = DriftWatch()
    >>> watch.update([32.0] * 500, [8.0] * 500)
    >>> watch.update([32.0] * 200, [5.0] * 200).reason
    'amplitude fell'
    """

    def __init__(self) -> None:
        self._distance, self._amplitude = ADWIN(delta=_DELTA), ADWIN(delta=_DELTA)

    def update(self, distances: Iterable[float], amplitudes: Iterable[float]) -> Alarm | None:
        """Take some spikes' distances and heights (noise units) in; say what changed, if anything did. Distances weigh more."""
        far, high = _watch("distance", self._distance, distances), _watch("amplitude", self._amplitude, amplitudes)
        if far is not None and abs(far.after - far.before) >= _LEAST_DISTANCE:
            return far
        return high if high is not None and abs(high.after - high.before) >= _LEAST_HEIGHT * abs(high.before) else None


def _watch(what: str, window: ADWIN, values: Iterable[float]) -> Alarm | None:
    before, alarmed = window.estimation, False
    for value in values:
        window.update(value)
        alarmed = alarmed or window.drift_detected
    return Alarm(what, before, window.estimation) if alarmed else None
