"""How noisy each channel is, which are bad, and how to whiten: all that is estimated from filtered samples.

In come filtered traces in uV, out go a noise level per channel, a mask of good channels and whitening weights. State: the level and
the samples collected since its last update; whitening weights are fixed once made. The median absolute value is used because spikes
hardly move it.
"""

import numpy as np
from numpy.typing import NDArray

from streamsort.kernels.preprocess import whiten_rows
from streamsort.probe import Probe

_MAD_TO_SIGMA = np.float32(1 / 0.6745)
_FLAT, _NOISY = 0.1, 5.0  # a channel outside these multiples of the median noise level is bad
_WHITEN_RADIUS_UM, _WHITEN_CHANNELS = 100.0, 16
_WHITEN_FLOOR = 0.05  # eigenvalues of a local correlation matrix are raised to this, or nearly equal channels would blow up
MIN_ROWS = 64  # fewer samples are no estimate


def mad(traces: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the median absolute value of each column / 0.6745: the standard deviation of normal noise around zero."""
    level: NDArray[np.float32] = (np.median(np.abs(traces), axis=0) * _MAD_TO_SIGMA).astype(np.float32)
    return level


def divisor(level: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return noise levels as what to divide by: infinite where there is none, so that such a channel is silent."""
    return np.where(level > 0, level, np.float32(np.inf)).astype(np.float32)


class RowCollector:
    """Keep every `stride`-th sample of a stream, by absolute index, until they are taken.

    Parameters
    ----------
    stride : int
        Best odd, so that line noise and its harmonics are not met at one phase.
    """

    def __init__(self, stride: int) -> None:
        self._stride = stride
        self._rows: list[NDArray[np.float32]] = []

    def add(self, traces: NDArray[np.float32], start_sample: int) -> None:
        """Collect from traces (n_samples, n_channels) whose first row is `start_sample`."""
        first = -start_sample % self._stride
        if first < len(traces):
            self._rows.append(traces[first :: self._stride].copy())

    def take(self) -> NDArray[np.float32] | None:
        """Return what was collected and start anew; None, and go on collecting, while it is too little."""
        if sum(map(len, self._rows)) < MIN_ROWS:
            return None
        rows = np.concatenate(self._rows)
        self._rows.clear()
        return rows


class NoiseLevel:
    """Track the noise level of every channel with exponential forgetting.

    Parameters
    ----------
    stride : int
        One sample in so many is used.
    forget : float
        Weight of the old level against a new estimate.

    Attributes
    ----------
    level : ndarray, shape (n_channels,), float32, or None
        In uV; None before `start`. A new array at every update, never changed in place.
    """

    def __init__(self, stride: int, forget: float) -> None:
        self.level: NDArray[np.float32] | None = None
        self._forget = np.float32(forget)
        self._collector = RowCollector(stride)

    def start(self, level: NDArray[np.float32], good: NDArray[np.bool_]) -> None:
        """Set the first estimate; bad channels get the median level of the good ones, which nothing divides by zero."""
        self.level = np.where(good, level, np.median(level[good])).astype(np.float32)

    def add(self, traces: NDArray[np.float32], start_sample: int) -> None:
        """Collect from referenced traces (n_samples, n_channels) in uV whose first row is `start_sample`."""
        self._collector.add(traces, start_sample)

    def update(self, good: NDArray[np.bool_]) -> None:
        """Take what was collected into the level, unless it is too little."""
        rows = self._collector.take()  # in any case, or they would pile up
        if self.level is None or rows is None or not good.any():
            return
        new = mad(rows)
        level = self._forget * self.level + (1 - self._forget) * new
        self.start(np.where(new > 0, level, self.level), good)  # a channel that has gone flat keeps its last level


def subtract_reference(traces: NDArray[np.float32], good: NDArray[np.bool_], reference: str) -> NDArray[np.float32]:
    """Return traces minus their "median" or "mean" over the good channels ("none": as they are), with bad channels zeroed."""
    middle = np.zeros((len(traces), 1), np.float32)
    if reference != "none":
        middle = (np.median if reference == "median" else np.mean)(traces[:, good], axis=1, keepdims=True)
    return np.where(good, traces - middle, 0).astype(np.float32)


def find_good_channels(traces: NDArray[np.float32], usable: NDArray[np.bool_], reference: str) -> NDArray[np.bool_]:
    """Decide which channels take part.

    A channel is good when it was usable, its noise level before the reference is not flat (0, or below 0.1 times the median of the
    channels), and its level after it is neither flat nor above 5 times the median.

    Parameters
    ----------
    traces : ndarray, shape (n_samples, n_channels), float32
        Filtered, not referenced.
    usable : ndarray, shape (n_channels,), bool
    reference : str
        "median", "mean" or "none".

    Returns
    -------
    good : ndarray, shape (n_channels,), bool
    """
    good = usable & _within(mad(traces), usable, np.inf)
    if good.any():
        good &= _within(mad(subtract_reference(traces, good, reference)), good, _NOISY)
    return good


def _within(level: NDArray[np.float32], good: NDArray[np.bool_], most: float) -> NDArray[np.bool_]:
    typical = np.median(level[good & (level > 0)]) if (good & (level > 0)).any() else 0.0
    within: NDArray[np.bool_] = (level > 0) & (level >= _FLAT * typical) & (level <= most * typical if typical else False)
    return within


class Whitening:
    """Decorrelate each channel from its neighbourhood, keeping its noise level in uV.

    Each channel's weights are the centre row of the inverse square root (ZCA) of the correlation matrix of at most 16 channels
    within 100 um. Fixed once made.

    Parameters
    ----------
    traces : ndarray, shape (n_samples, n_channels), float32
        Filtered and referenced, in uV.
    good : ndarray, shape (n_channels,), bool
        Bad channels get no weight.
    probe : Probe
    """

    def __init__(self, traces: NDArray[np.float32], good: NDArray[np.bool_], probe: Probe) -> None:
        neighbors = probe.neighbors(_WHITEN_RADIUS_UM, _WHITEN_CHANNELS)
        level = mad(traces)
        weights = np.zeros(neighbors.shape)
        for c in np.flatnonzero(good):
            columns = np.flatnonzero((neighbors[c] >= 0) & good[neighbors[c]])
            channels = neighbors[c, columns]
            scaled = traces[:, channels].astype(np.float64) / level[channels]
            values, vectors = np.linalg.eigh(scaled.T @ scaled / len(scaled))
            row = (vectors[0] / np.sqrt(np.maximum(values, _WHITEN_FLOOR))) @ vectors.T
            weights[c, columns] = row * level[c] / level[channels] / np.std(scaled @ row)
        self._table = np.ascontiguousarray(np.maximum(neighbors, 0).T)
        self._weights = np.ascontiguousarray(weights.T, dtype=np.float32)
        self._scratch = np.zeros(len(good), np.float32)

    def __call__(self, traces: NDArray[np.float32]) -> None:
        """Whiten traces (n_samples, n_channels) in place."""
        whiten_rows(traces, self._table, self._weights, self._scratch)
