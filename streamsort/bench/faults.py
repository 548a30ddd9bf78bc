"""What can go wrong on request: `stall=200ms,loss=1e-4,jitter=5ms,burst=10x,slow-encoder=20ms,slow-subscriber`.

The text becomes `Faults`. Those that concern the player become a `Disturbance` of its chunks, which counts what it does; the other
two are for the sorter's process and for a subscriber.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.errors import StreamsortError

BURST_S = 5.0
_STALL_PERIOD_S = 2.0


@dataclass(frozen=True)
class Faults:
    """Faults at the same time; 0 is none of a kind.

    Attributes
    ----------
    stall_ms : float
        The player stops sending for so long, every two seconds or four stalls, and then sends what was due.
    loss : float
        Probability of each chunk not to be sent.
    jitter_ms : float
        Each chunk is late by up to this, evenly distributed; none overtakes another.
    burst : float
        Multiple of the rate of spikes, for `BURST_S`.
    slow_encoder_ms : float
        Each call of the encoder takes so much longer.
    slow_subscriber : bool
        A second subscriber connects and never reads.
    """

    stall_ms: float = 0.0
    loss: float = 0.0
    jitter_ms: float = 0.0
    burst: float = 0.0
    slow_encoder_ms: float = 0.0
    slow_subscriber: bool = False

    @property
    def stall_period_s(self) -> float:
        return max(_STALL_PERIOD_S, 4e-3 * self.stall_ms)

    def phase_s(self, seconds: float) -> float:
        """Tell how long a phase with these faults lasts where a clean one takes `seconds`."""
        return BURST_S if self.burst else max(seconds, self.stall_period_s if self.stall_ms else 0.0)


def parse_faults(text: str) -> Faults:
    """Read `name=value,...`.

    Raises
    ------
    StreamsortError
        If a name is unknown (the nearest is named) or given twice, or a value is not of its kind.

    Examples
    --------
    >>> parse_faults("stall=0.2s,loss=1e-4").stall_ms
    200.0
    """
    values: dict[str, Any] = {}
    for item in text.split(","):
        name, equals, value = item.partition("=")
        if name not in _KINDS:
            near = difflib.get_close_matches(name, _KINDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_KINDS)}"
            raise StreamsortError(f"fault: unknown {name!r}; {hint}")
        field, read, example = _KINDS[name]
        try:
            if field in values or bool(equals) != bool(example):
                raise ValueError
            values[field] = read(value)
        except ValueError:
            expected = f"{name}={example} or the like, once" if example else f"{name} without a value, once"
            raise StreamsortError(f"fault: {item!r}, expected {expected}") from None
    return Faults(**values)


def _milliseconds(text: str) -> float:
    for unit, milliseconds in (("ms", 1.0), ("s", 1000.0)):
        if text.endswith(unit):
            return _within(milliseconds * float(text.removesuffix(unit)), 0.0, math.inf)
    raise ValueError


def _within(number: float, low: float, high: float) -> float:
    if not low < number < high:
        raise ValueError
    return number


_KINDS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "stall": ("stall_ms", _milliseconds, "200ms"),
    "loss": ("loss", lambda text: _within(float(text), 0.0, 1.0), "1e-4"),
    "jitter": ("jitter_ms", _milliseconds, "5ms"),
    "burst": ("burst", lambda text: _within(float(text.removesuffix("x")), 1.0, math.inf), "10x"),
    "slow-encoder": ("slow_encoder_ms", _milliseconds, "20ms"),
    "slow-subscriber": ("slow_subscriber", lambda _: True, ""),
}


class Disturbance:
    """Do to the chunks of one phase what its faults say, and count it.

    Parameters
    ----------
    faults : Faults
    seconds : float
        Length of the phase.
    seed : int
    burst : ndarray, shape (n_samples, n_channels), optional
        What a burst adds to the samples, from the start of the phase on.

    Attributes
    ----------
    injected : dict
        Counts so far, of the faults that are there.
    ends_s : list of float
        When, from the start of the phase, each stall is over and each chunk that was dropped would have been.
    """

    def __init__(self, faults: Faults, seconds: float, seed: int, burst: NDArray[Any] | None = None) -> None:
        self._faults, self._seconds, self._burst = faults, seconds, burst
        self._rng = np.random.default_rng(seed)
        kinds = {"stalls": faults.stall_ms, "chunks_dropped": faults.loss, "samples_dropped": faults.loss}
        self.injected = {name: 0 for name, wanted in (kinds | {"chunks_delayed": faults.jitter_ms}).items() if wanted}
        self.ends_s: list[float] = []
        self._next_stall_s = faults.stall_period_s / 2
        self._stall_ends_s = 0.0

    def delay_s(self, at_s: float) -> float:
        """Return how long to hold back the chunk that is due `at_s` into the phase."""
        end_s = self._next_stall_s + 1e-3 * self._faults.stall_ms
        if self._faults.stall_ms and self._next_stall_s <= at_s < end_s <= self._seconds:
            self.injected["stalls"] += 1
            self.ends_s.append(end_s)
            self._stall_ends_s = end_s
            self._next_stall_s += self._faults.stall_period_s
        delay_s = max(self._stall_ends_s - at_s, 0.0)
        if self._faults.jitter_ms:
            self.injected["chunks_delayed"] += 1
            delay_s += 1e-3 * self._faults.jitter_ms * self._rng.random()
        return delay_s

    def drops(self, n_samples: int, at_s: float) -> bool:
        """Decide whether the chunk that is due `at_s` into the phase is lost."""
        dropped = bool(self._faults.loss) and self._rng.random() < self._faults.loss
        if dropped:
            self.injected["chunks_dropped"] += 1
            self.injected["samples_dropped"] += n_samples
            self.ends_s.append(at_s)
        return dropped

    def change(self, traces: NDArray[Any], first: int) -> NDArray[Any]:
        """Return the samples of a chunk, `first` samples into the phase, with what the burst adds."""
        if self._burst is None or first >= len(self._burst):
            return traces
        added = self._burst[first : first + len(traces)]
        changed = traces.astype(np.float32)
        changed[: len(added)] += added
        if traces.dtype.kind == "i":
            limits = np.iinfo(traces.dtype)
            changed = np.rint(changed).clip(limits.min, limits.max)
        return changed.astype(traces.dtype)
