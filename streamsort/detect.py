"""Locally exclusive peaks.

In come referenced, filtered traces in uV, out go peaks with absolute sample_index: the only place where local becomes absolute.
State is a rolling window of traces, from which the snippets are cut too, so that a chunk is copied once and nothing but the margin
is kept. A peak is decided in the call that brings the last sample of its look-ahead, with the noise level passed to that call.
Callers change the noise level only at fixed sample indices and cut chunks there, hence every chunking gives the same peaks.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.config import DetectConfig
from streamsort.kernels.detect import find_peaks
from streamsort.probe import Probe
from streamsort.records import PEAK_DTYPE

_POLARITY = {"neg": (-1.0, -1.0), "pos": (1.0, 1.0), "both": (-1.0, 1.0)}
_NEAR_GAP_S = 0.05  # a band-pass from 150 Hz has forgotten a step to 1e-4 after 15 ms; sources may need longer to settle
_WINDOW_ROWS = 512  # rows appended between two moves of the carry; with 384 channels the window then fits a 1 MB cache


class Window:
    """Hold the latest traces in one contiguous array that is only moved when it is full.

    Attributes
    ----------
    traces : ndarray, shape (capacity, n_channels), float32
    unusable : ndarray, shape (capacity,), uint8
        Not 0 where the input was not usable.
    start, stop : int
        Rows in use.
    origin : int
        sample_index of row 0.
    """

    def __init__(self, n_channels: int, n_rows: int) -> None:
        self.traces = np.zeros((n_rows, n_channels), np.float32)
        self.unusable = np.zeros(n_rows, np.uint8)
        self.start = self.stop = self.origin = 0

    def clear(self, start_sample: int) -> None:
        """Forget all rows; the next one appended is `start_sample`."""
        self.start = self.stop = 0
        self.origin = start_sample

    def append(self, traces: NDArray[np.float32], unusable: NDArray[np.uint8], n_keep: int) -> None:
        """Add rows, giving up all old ones but the last `n_keep`."""
        self.start = max(self.stop - n_keep, self.start)
        if self.stop + len(traces) > len(self.traces):
            self._move(len(traces))
        end = self.stop + len(traces)
        self.traces[self.stop : end] = traces
        self.unusable[self.stop : end] = unusable
        self.stop = end

    def _move(self, n_more: int) -> None:
        """Bring the rows in use to the front, of a larger array if the present one cannot take so many more."""
        kept = slice(self.start, self.stop)
        n_kept = self.stop - self.start
        traces, unusable = self.traces[kept], self.unusable[kept]
        if n_kept + n_more > len(self.traces):
            self.traces = np.zeros((n_kept + n_more + _WINDOW_ROWS, self.traces.shape[1]), np.float32)
            self.unusable = np.zeros(len(self.traces), np.uint8)
        self.traces[:n_kept] = traces
        self.unusable[:n_kept] = unusable
        self.origin += self.start
        self.start, self.stop = 0, n_kept


class Detect:
    """Find peaks that are the extreme of their neighbourhood in space and time.

    Sample s of channel c is a peak when its value, taken with the sign of `peak_sign` (its magnitude for "both"), is at least
    `detect_threshold` noise levels and the largest among all samples within `exclude_sweep_ms` on all channels within `radius_um`.
    Of equal values the earlier sample wins, then the lower channel. Suppression is one hop: a value that is itself beaten by a
    third still beats its own neighbours.

    Peaks are not looked for before the noise level is known, nor where a snippet would reach back to before the stream's start, a
    gap, or the sample at which the noise level became known. A peak carries NEAR_GAP when it lies within 50 ms after the start or a
    gap, or when its snippet touches a sample that was not usable. Peaks whose look-ahead is cut off by a gap are lost.

    Parameters
    ----------
    config : DetectConfig
    probe : Probe
    sampling_frequency : float
        In Hz.
    n_before, n_after : int
        Snippet around a peak: samples [peak - n_before, peak + n_after).

    Attributes
    ----------
    margin : int
        Samples of look-ahead: a peak comes out once `margin` samples after it are there.
    through_sample : int
        All peaks with a smaller sample_index have come out.
    window : Window
        Traces of the peaks of the latest call.
    """

    def __init__(self, config: DetectConfig, probe: Probe, sampling_frequency: float, n_before: int, n_after: int) -> None:
        self._sweep = sweep = max(round(config.exclude_sweep_ms * sampling_frequency / 1000), 1)
        self.margin = max(sweep, n_after - 1)
        self.through_sample = 0
        self._history = max(sweep, n_before)
        self._settle_samples = round(_NEAR_GAP_S * sampling_frequency)
        self.window = Window(probe.n_channels, self.margin + self._history + _WINDOW_ROWS)
        self._adjacency = probe.neighbors(config.radius_um)
        self._polarity = np.array(_POLARITY[config.peak_sign], np.float32)
        self._detect_threshold = np.float32(config.detect_threshold)
        self._spans = np.array([sweep, n_before, n_after, 0, 0], np.int64)
        self._noise_level: NDArray[np.float32] | None = None
        self._thresholds = np.zeros(probe.n_channels, np.float32)
        self._peaks = np.zeros(1024, PEAK_DTYPE)
        self._next_sample = -1
        self._find(0, 0)  # compiles

    @property
    def settled_from(self) -> int:
        """Samples before it lie near the start or a gap."""
        return int(self._spans[4])

    def reset(self) -> None:
        """Forget the traces, as after a gap."""
        self._next_sample = -1

    def __call__(
        self, traces: NDArray[np.float32], start_sample: int, noise_level: NDArray[np.float32] | None, unusable: NDArray[np.uint8]
    ) -> NDArray[Any]:
        """Take the next samples and return the peaks they complete.

        Parameters
        ----------
        traces : ndarray, shape (n_samples, n_channels), float32
            Referenced and filtered, in uV; read-only, copied into the window.
        start_sample : int
            sample_index of the first row; when it does not follow the last call's samples, this is a gap and works like `reset`.
        noise_level : ndarray, shape (n_channels,), float32, or None
            In uV, as of `Preprocess.noise_level`; a new array whenever it changes. None: not known yet, nothing is detected.
        unusable : ndarray, shape (n_samples,), uint8
            `Preprocess.unusable`.

        Returns
        -------
        peaks : ndarray, shape (n_peaks,), PEAK_DTYPE
            In order of (sample_index, channel); a new array.
        """
        if start_sample != self._next_sample:
            self._spans[4] = start_sample + self._settle_samples
            self._noise_level = None
        self._next_sample = start_sample + len(traces)
        if noise_level is None:
            self._noise_level = None
            self.through_sample = self._next_sample
            return np.empty(0, PEAK_DTYPE)
        if self._noise_level is None:
            self.window.clear(start_sample)
            self.through_sample = start_sample + self._history
        if noise_level is not self._noise_level:
            self._noise_level = noise_level
            self._thresholds = noise_level * self._detect_threshold
        self.window.append(traces, unusable, self.margin + self._history)
        return self._find(self.through_sample, max(self._next_sample - self.margin, self.through_sample))

    def _find(self, first_sample: int, last_sample: int) -> NDArray[Any]:
        """Decide the samples [first_sample, last_sample)."""
        window = self.window
        # Two peaks of one channel are more than a sweep apart.
        capacity = len(self._thresholds) * (1 + (last_sample - first_sample) // self._sweep)
        if capacity > len(self._peaks):
            self._peaks = np.zeros(capacity, PEAK_DTYPE)
        self._spans[3] = window.origin
        rows = first_sample - window.origin, last_sample - window.origin
        n_peaks = find_peaks(
            window.traces, window.unusable, *rows, self._thresholds, self._adjacency, self._polarity, self._spans, self._peaks
        )
        self.through_sample = last_sample
        return self._peaks[:n_peaks].copy() if n_peaks else np.empty(0, PEAK_DTYPE)  # an empty copy takes five times as long
