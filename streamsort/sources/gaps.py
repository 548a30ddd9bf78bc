"""Where samples without a counter belong, when all that is known is a jittery stamp of each.

A transport that stamps each push with the moment the sender woke up delivers every sample in order, or loses some and says nothing.
Samples are counted, and the count is the clock; stamps are followed by a slow regression, and are taken for more than an annotation
only when they are late by more than a sender's hiccup explains. State: the count, the regression, and the samples held while a
hiccup and a gap look the same.
"""

import logging
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamsort.records import Gap
from streamsort.sources.clock import ClockFit

_log = logging.getLogger("streamsort.sources.gaps")

_HICCUP_S = 3e-3
_CONFIRM_S = 0.02  # a sender that was held up has caught up within this
_PUSH_MEMORY = 0.05  # of the usual size of a push: 20 pulls
_MAX_LATE_S = 5.0  # later than the time that passed plus this is not a gap but another clock
_MAX_EARLY_S = 1.0


class Placed(NamedTuple):
    """Samples whose index is settled, and what was found wrong just before them."""

    start_sample: int
    traces: NDArray[Any]
    gaps: tuple[Gap, ...]


class GapFinder:
    """Tell missing samples from late stamps.

    Samples whose stamps are late by more than 3 ms and half a push, and more than 5 standard deviations, are held. When the stamps
    come back within 20 ms (and two pushes) the sender had only been held up; when they stay late, the smallest lateness is the
    length of a gap. Gaps shorter than that threshold cannot be seen.

    Parameters
    ----------
    sampling_frequency : float
    n_channels : int
    dtype : numpy.dtype
        Of the samples.

    Attributes
    ----------
    next_sample : int
        Index of the sample that is due next.
    fit : ClockFit
        On LSL's clock.
    """

    def __init__(self, sampling_frequency: float, n_channels: int, dtype: np.dtype[Any]) -> None:
        self.next_sample = 0
        self.fit = ClockFit(sampling_frequency)
        self._sampling_frequency = sampling_frequency
        self._held: NDArray[Any] = np.zeros((0, n_channels), dtype)
        self._held_stamps = np.zeros(0)
        self._held_since: float | None = None
        self._heard_at: float | None = None
        self._push_samples = 1.0

    @property
    def holding(self) -> bool:
        return self._held_since is not None

    def place(self, traces: NDArray[Any], stamps: NDArray[np.float64], now: float) -> list[Placed]:
        """Add what was pulled and return what is settled, in order.

        Parameters
        ----------
        traces : ndarray, shape (n_samples, n_channels)
            Not copied; may be empty.
        stamps : ndarray, shape (n_samples,)
            LSL's time (s) of each.
        now : float
            Host-clock time (s) of the pull.
        """
        if len(traces):
            self._push_samples += _PUSH_MEMORY * (len(traces) - self._push_samples)
        if len(self._held):
            traces, stamps = np.concatenate([self._held, traces]), np.concatenate([self._held_stamps, stamps])
        if not len(traces):
            return []
        if not self.fit.started:
            self.fit.update(self.next_sample, float(stamps[0]))
        last = self.next_sample + len(stamps) - 1
        late_s = float(stamps[-1]) - (self.fit.t_origin(last) + last / self._sampling_frequency)
        elapsed_s = 0.0 if self._heard_at is None else now - self._heard_at
        if -_MAX_EARLY_S < late_s <= self._threshold_s():
            self._held, self._held_since, self._heard_at = traces[:0], None, now
            return [self._emit(traces, stamps)]
        if late_s <= -_MAX_EARLY_S or late_s > elapsed_s + _MAX_LATE_S:
            return [self._change_clock(traces, stamps, elapsed_s, now)]
        late = self._lateness(stamps) > self._threshold_s()
        return self._suspect(traces, stamps, len(late) - int(np.argmin(late[::-1])) if not late.all() else 0, now)

    def _suspect(self, traces: NDArray[Any], stamps: NDArray[np.float64], first: int, now: float) -> list[Placed]:
        """Hold the rows from `first` on, which are late, and call it a gap when they have been for long enough."""
        settled = [self._emit(traces[:first], stamps[:first])] if first else []
        traces, stamps = traces[first:], stamps[first:]
        if self._held_since is None:
            self._held_since = now
        if now - self._held_since < max(_CONFIRM_S, 2 * self._push_samples / self._sampling_frequency):
            self._held, self._held_stamps = traces, stamps
            return settled
        n_missing = round(float(self._lateness(stamps).min()) * self._sampling_frequency)
        self._held, self._held_since, self._heard_at = traces[:0], None, now
        return [*settled, self._emit(traces, stamps, n_missing)]

    def _change_clock(self, traces: NDArray[Any], stamps: NDArray[np.float64], elapsed_s: float, now: float) -> Placed:
        """Start the regression anew for stamps that no gap explains; our own clock says how much is missing."""
        n_missing = max(round(elapsed_s * self._sampling_frequency) - len(traces), 0)
        self.fit.restart()
        self._held, self._held_since, self._heard_at = traces[:0], None, now
        _log.warning("the stream's clock jumped to %.3f s", stamps[-1])
        return self._emit(traces, stamps, n_missing)

    def _emit(self, traces: NDArray[Any], stamps: NDArray[np.float64], n_missing: int = 0) -> Placed:
        gaps = (Gap(self.next_sample, n_missing, "gap"),) if n_missing else ()
        start = self.next_sample + n_missing
        self.next_sample = start + len(traces)
        self.fit.update(self.next_sample - 1, float(stamps[-1]))
        return Placed(start, traces, gaps)

    def _lateness(self, stamps: NDArray[np.float64]) -> NDArray[np.float64]:
        last = self.next_sample + len(stamps) - 1
        predicted = self.fit.t_origin(last) + (self.next_sample + np.arange(len(stamps))) / self._sampling_frequency
        return np.asarray(stamps - predicted, np.float64)

    def _threshold_s(self) -> float:
        return max(_HICCUP_S + 0.5 * self._push_samples / self._sampling_frequency, 5 * self.fit.deviation_s)
