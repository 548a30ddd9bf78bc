"""Live quality metrics of one unit, under SpikeInterface's names.

Spikes come in at learning boundaries; out come the numbers that SpikeInterface (0.105, default parameters) computes of the same
spikes in a recording that begins where the unit was born. They agree within 1 %, though memory is bounded, some 200 kB a unit:
counts, `snr`, `isi_violations_*` and `presence_ratio` are exact; `amplitude_median` is read from a histogram with bins 0.5 % wide;
`amplitude_cv_median` is exact up to 4096 spikes, with more of them they are known in groups only; the drift metrics know the last
day and, of each minute, its first 8192 spikes.

Where SpikeInterface has NaN, so have we, but for one: a bin of time without a spike makes its `amplitude_cv_median` NaN, and is
passed over here, since units do fall silent.
"""

from collections import deque

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

NAMES = (
    "num_spikes",
    "firing_rate",
    "presence_ratio",
    "snr",
    "isi_violations_ratio",
    "isi_violations_count",
    "amplitude_median",
    "amplitude_cv_median",
    "drift_ptp",
    "drift_std",
    "drift_mad",
)
ISI_THRESHOLD_S = 0.0015
INTERVAL_S = 60.0  # of presence and of drift
_MIN_POSITIONS = 100  # fewer spikes in an interval make no position
_SPIKES_PER_BIN, _MIN_BINS = 50, 10  # bins of time for the variation of amplitudes
_KEPT_GROUPS = 4096  # for the variation of amplitudes
_KEPT_POSITIONS = 8192
_KEPT_INTERVALS = 1440
_TAKEN_TOGETHER = 256  # spikes: a few at a time cost 0.2 ms, and so do these


class Quality:
    """Measure one unit.

    Parameters
    ----------
    start_sample : int
        Where its life begins; earlier spikes do not count.
    sampling_frequency : float
        In Hz.

    Examples
    --------
    >>> quality = Quality(0, 1000.0)
    >>> quality.add(np.array([10, 11, 500]), np.array([-80.0, -70.0, -90.0]), np.array([8.0, 7.0, 9.0]))
    >>> found = quality.metrics(60_000)
    >>> [found[name] for name in ("num_spikes", "firing_rate", "isi_violations_count", "presence_ratio", "snr")]
    [3, 0.05, 1, 1.0, 8.0]
    """

    def __init__(self, start_sample: int, sampling_frequency: float) -> None:
        self._start, self._rate = start_sample, sampling_frequency
        self._waiting: list[tuple[Ints, Floats, Floats, Floats | None]] = []
        self._n_waiting = 0
        self._n_spikes, self._n_violations, self._height = 0, 0, 0.0
        self._last: int | None = None
        self._amplitudes = Histogram()
        self._variation = _Variation()
        self._intervals = _Intervals(int(INTERVAL_S * sampling_frequency))

    def add(self, sample_index: Ints, amplitude_uv: Floats, noise_units: Floats, y_um: Floats | None = None) -> None:
        """Take spikes into account; the arrays must not change afterwards.

        Parameters
        ----------
        sample_index : ndarray, shape (n_spikes,), int64
            Rising, and not before those of earlier calls.
        amplitude_uv : ndarray, shape (n_spikes,), floating
            Signed, at the trough.
        noise_units : ndarray, shape (n_spikes,), floating
            Height of the trough over the noise level.
        y_um : ndarray, shape (n_spikes,), floating, optional
            Position along the probe; without any there are no drift metrics.
        """
        self._waiting.append((sample_index - self._start, amplitude_uv, noise_units, y_um))
        self._n_waiting += len(sample_index)
        if self._n_waiting >= _TAKEN_TOGETHER:
            self._take()

    def skip_gap(self, n_samples: int) -> None:
        """Leave samples that never came out of the unit's time; called between the spikes before and after them."""
        self._start += n_samples

    def metrics(self, end_sample: int) -> dict[str, float]:
        """Return the metrics by name, of the time from birth to `end_sample`; NaN where there is too little to tell from.

        The minutes that are over by then are closed: a spike of theirs that comes later counts in the next.
        """
        self._take()
        n, n_samples = self._n_spikes, max(end_sample - self._start, 1)
        self._intervals.close(n_samples)
        if not n:
            return dict.fromkeys(NAMES, np.nan) | {"num_spikes": 0, "isi_violations_count": -1}
        rate_hz = n * self._rate / n_samples
        return {
            "num_spikes": n,
            "firing_rate": rate_hz,
            "presence_ratio": self._intervals.presence_ratio,
            "snr": self._height / n,
            "isi_violations_ratio": self._n_violations / (2 * n * ISI_THRESHOLD_S * rate_hz),
            "isi_violations_count": self._n_violations,
            "amplitude_median": self._amplitudes.median(),
            "amplitude_cv_median": self._variation.median(n_samples),
            **self._intervals.drift(),
        }

    def _take(self) -> None:
        waiting, self._waiting, self._n_waiting = self._waiting, [], 0
        samples = np.concatenate([part[0] for part in waiting]) if waiting else np.zeros(0, np.int64)
        mine = samples >= 0
        samples = samples[mine]
        if not len(samples):
            return
        amplitudes, heights = (np.concatenate([part[k] for part in waiting])[mine].astype(np.float64) for k in (1, 2))
        # In seconds, as SpikeInterface compares them: an interval of exactly 1.5 ms is then rounded alike.
        times = np.concatenate([[] if self._last is None else [self._last], samples]) / self._rate
        self._n_violations += int((np.diff(times) < ISI_THRESHOLD_S).sum())
        self._last = int(samples[-1])
        self._n_spikes += len(samples)
        self._height += float(heights.sum())
        self._amplitudes.add(amplitudes)
        self._variation.add(samples, amplitudes)
        nowhere = np.full(len(mine), np.nan)
        y_um = np.concatenate([nowhere[: len(part[0])] if part[3] is None else part[3] for part in waiting])[mine]
        self._intervals.add(samples, y_um)


class Histogram:
    """Keep the distribution of any number of values, in bins of 0.5 % of the value (5e-5 around 0).

    Examples
    --------
    >>> histogram = Histogram()
    >>> histogram.add(np.array([-80.0, -60.0, -100.0]))
    >>> round(histogram.median())
    -80
    """

    _FLOOR, _WIDTH, _REACH = 0.01, 0.005, 2800  # the last bin is at 6 mV

    def __init__(self) -> None:
        self._counts = np.zeros(2 * self._REACH + 1, np.int32)

    def add(self, values: Floats) -> None:
        """Count values in."""
        np.add.at(self._counts, self._bins(values), 1)

    def median(self) -> float:
        """Return the median of what was counted; NaN of nothing."""
        below = np.cumsum(self._counts)
        if not below[-1]:
            return float("nan")
        middle = np.searchsorted(below, [(below[-1] + 1) // 2, below[-1] // 2 + 1])
        return float(np.sinh((middle - self._REACH) * self._WIDTH).mean() * self._FLOOR)

    def _bins(self, values: Floats) -> Ints:
        place = np.rint(np.arcsinh(values / self._FLOOR) / self._WIDTH)
        bins: Ints = np.clip(place, -self._REACH, self._REACH).astype(np.int64) + self._REACH
        return bins


class _Variation:
    """Standard deviation of amplitudes in bins of time that hold 50 spikes on average, over the mean amplitude: the median of it.

    How long a bin is depends on all spikes. So spikes are kept, each alone as long as there is room, then as groups of 2, 4, 8 ...
    in a row, of which only the sums are known; a group lies in the bin of its mean sample.
    """

    def __init__(self) -> None:
        self._sums = np.zeros((4, _KEPT_GROUPS))  # of 1, sample, amplitude, squared amplitude
        self._n, self._per_group = 0, 1

    def add(self, samples: Ints, amplitudes: Floats) -> None:
        while self._n + len(samples) > _KEPT_GROUPS * self._per_group:
            self._sums[:, : _KEPT_GROUPS // 2] = self._sums[:, ::2] + self._sums[:, 1::2]
            self._sums[:, _KEPT_GROUPS // 2 :] = 0
            self._per_group *= 2
        group = (self._n + np.arange(len(samples))) // self._per_group
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        values = np.stack([np.ones(len(samples)), samples, amplitudes, amplitudes**2])
        self._sums[:, group[starts]] += np.add.reduceat(values, starts, axis=1)
        self._n += len(samples)

    def median(self, n_samples: int) -> float:
        sums = self._sums[:, : -(-self._n // self._per_group)]
        edges = np.arange(0, n_samples + 1, max(int(_SPIKES_PER_BIN * n_samples / self._n), 1))
        bounds = np.searchsorted(sums[1] / sums[0], edges)
        bins = np.diff(np.concatenate([np.zeros((4, 1)), np.cumsum(sums, axis=1)], axis=1)[:, bounds], axis=1)
        bins = bins[:, bins[0] > 0]
        if bins.shape[1] < _MIN_BINS:
            return float("nan")
        variance = bins[3] / bins[0] - (bins[2] / bins[0]) ** 2
        return float(np.median(np.sqrt(np.maximum(variance, 0)))) / max(abs(float(sums[2].sum())) / self._n, 1e-9)


class _Intervals:
    """Presence and median position, minute by minute."""

    def __init__(self, n_samples: int) -> None:
        self._size = n_samples
        self._n_closed, self._n_present = 0, 0
        self._n_spikes, self._n_positions = 0, 0  # of the open one
        self._positions: list[Floats] = []
        self._medians: deque[float] = deque(maxlen=_KEPT_INTERVALS)

    @property
    def presence_ratio(self) -> float:
        return self._n_present / self._n_closed if self._n_closed else float("nan")

    def add(self, samples: Ints, y_um: Floats) -> None:
        place = np.maximum(samples // self._size, self._n_closed)
        for k in np.unique(place).tolist():
            self.close(k * self._size)
            mine = place == k
            self._n_spikes += int(mine.sum())
            known = y_um[mine & ~np.isnan(y_um)]
            if self._n_positions < _KEPT_POSITIONS and len(known):
                self._positions.append(known)
                self._n_positions += len(known)

    def close(self, n_samples: int) -> None:
        """Close the intervals that end by then."""
        while (self._n_closed + 1) * self._size <= n_samples:
            enough = self._n_positions >= _MIN_POSITIONS
            self._medians.append(float(np.median(np.concatenate(self._positions))) if enough else np.nan)
            self._n_present += self._n_spikes > 0
            self._n_closed += 1
            self._n_spikes, self._n_positions, self._positions = 0, 0, []

    def drift(self) -> dict[str, float]:
        known = [y for y in self._medians if y == y]
        if len(self._medians) < 2 or 2 * len(known) < len(self._medians):
            return dict.fromkeys(("drift_ptp", "drift_std", "drift_mad"), np.nan)
        y = np.array(known)
        return {"drift_ptp": float(np.ptp(y)), "drift_std": float(y.std()), "drift_mad": float(np.median(np.abs(y - np.median(y))))}
