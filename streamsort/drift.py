"""Per-unit alarms: what a unit looks like changed faster than its prototype could follow.

ADWIN (Bifet & Gavalda 2007, from river) watches two numbers of every spike: its distance to the unit's own prototype and its
height. It keeps a window that shrinks when its two halves differ, costs half a microsecond a spike and runs at learning boundaries
only.
"""

from river.drift import ADWIN

_DELTA = 1e-4  # chance of a false alarm per look; a hundred units for an hour should raise none


class DriftWatch:
    """Watch one unit.

    Examples
    --------
    >>> watch = DriftWatch()
    >>> alarms = [watch.update(32.0, 8.0 if k < 500 else 5.0) for k in range(1000)]
    >>> [alarm for alarm in alarms if alarm][0]
    'amplitude fell'
    """

    def __init__(self) -> None:
        self._distance, self._amplitude = ADWIN(delta=_DELTA), ADWIN(delta=_DELTA)

    def forget_distances(self) -> None:
        """Start the distances anew: they are measured with another rule from now on."""
        self._distance = ADWIN(delta=_DELTA)

    def update(self, distance: float, amplitude: float) -> str | None:
        """Take one spike's distance and height (noise units) in; say what changed, if anything did."""
        before = self._amplitude.estimation
        self._distance.update(distance)
        self._amplitude.update(amplitude)
        if self._amplitude.drift_detected:
            return "amplitude fell" if self._amplitude.estimation < before else "amplitude rose"
        return "distance to its prototype changed" if self._distance.drift_detected else None
