"""What the known units leave unexplained: spikes too small for the threshold of a single channel, and groups of them.

In come stretches of the residual, out go candidates: samples at which a matched filter for a spike of the usual shape, weighted
over the channels nearby and against the noise, stands out; weak spikes do so there that reach no threshold on any one channel.
Candidates of one channel that look alike make a group, a unit's first template. Used while calibrating; kept are the candidates'
snippets.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter1d
from scipy.signal import fftconvolve

from streamsort.calibrate import split_by_valleys
from streamsort.config import ClusterConfig
from streamsort.covariance import NoiseModel
from streamsort.probe import Probe

Floats = NDArray[np.float32]

_THRESHOLD = 4.5  # standard deviations: noise passes about once a second on 32 channels
_REACHES_UM = 12.0, 35.0  # over which the filter's footprint falls off
_LOCAL_UM = 70.0
_SWEEP = 9  # samples within which one candidate per neighbourhood counts
_N_SHAPES = 3  # temporal components in which candidates are compared


class Group(NamedTuple):
    """Candidates that look alike."""

    mean: Floats  # (n_whole, n_channels), noise units
    n_spikes: int


class Discover:
    """Collect candidates and group them.

    Parameters
    ----------
    probe : Probe
    noise : NoiseModel
    shapes : ndarray, shape (n_shapes, n_samples), float32
        Waveforms of usual spikes on their largest channel, trough at `n_before`.
    n_before, n_whole : int
        Of a candidate's snippet.
    """

    def __init__(self, probe: Probe, noise: NoiseModel, shapes: Floats, n_before: int, n_whole: int) -> None:
        self._noise, self._n_before, self._n_whole = noise, n_before, n_whole
        self._near = probe.neighbors(_LOCAL_UM)
        weights = noise.time_root @ noise.time_root.T
        shape = np.mean(shapes / np.linalg.norm(shapes, axis=1, keepdims=True), axis=0)
        taps = weights @ shape
        self._taps = (taps / np.sqrt(shape @ taps)).astype(np.float32)
        self._mixing = [_footprints(probe, noise, self._near, reach) for reach in _REACHES_UM]
        basis = np.linalg.svd(shapes @ noise.time_root, full_matrices=False)[2][:_N_SHAPES]
        self._basis = noise.time_root @ basis.T
        self._channel: list[NDArray[np.int64]] = []
        self._snippets: list[Floats] = []

    def look(self, residual: Floats, first: int, stop: int, busy: NDArray[np.bool_]) -> None:
        """Collect the candidates within columns [first, stop).

        Parameters
        ----------
        residual : ndarray, shape (n_channels, n_columns), float32
            With at least a snippet's length on either side of what is looked at.
        first, stop : int
        busy : ndarray, shape (n_channels, n_columns), bool
            Where a spike was just subtracted: what it leaves is no candidate.
        """
        n_samples = len(self._taps)
        scores = fftconvolve(residual, self._taps[None, ::-1], mode="full", axes=1)
        scores = scores[:, n_samples - 1 - self._n_before :][:, : residual.shape[1]].astype(np.float32)
        best = np.maximum(*(mixing @ scores for mixing in self._mixing))
        highest = maximum_filter1d(best, 2 * _SWEEP + 1, axis=1)
        rows, columns = np.nonzero((best[:, first:stop] >= np.maximum(highest[:, first:stop], _THRESHOLD)) & ~busy[:, first:stop])
        for channel, column in zip(rows.tolist(), (columns + first).tolist(), strict=True):
            near = self._near[channel][self._near[channel] >= 0]
            if best[channel, column] >= highest[near, column].max():
                self._channel.append(np.array([channel]))
                self._snippets.append(residual[:, column - self._n_before :][:, : self._n_whole].T.copy())

    def groups(self, n_least: int, config: ClusterConfig, seed: int) -> list[Group]:
        """Group the candidates collected since the last call, at least `n_least` to a group."""
        if not self._channel:
            return []
        channel, snippets = np.concatenate(self._channel), np.stack(self._snippets)
        self._channel.clear()
        self._snippets.clear()
        rng = np.random.default_rng(seed)
        found = []
        for c in np.unique(channel):
            mine = np.flatnonzero(channel == c)
            if len(mine) < n_least:
                continue
            near = self._near[c][self._near[c] >= 0]
            usual = snippets[mine][:, : len(self._basis), near]
            white = np.einsum("ntk,tb,kj->nbj", usual, self._basis, self._noise.space_root(near), optimize=True)
            label = split_by_valleys(white.reshape(len(mine), -1).astype(np.float32), config, rng)
            for k in range(int(label.max()) + 1):
                members = mine[label == k]
                if len(members) >= n_least:
                    found.append(Group(snippets[members].mean(axis=0), len(members)))
        return found


def _footprints(probe: Probe, noise: NoiseModel, near: NDArray[np.int32], reach_um: float) -> Floats:
    """Return, per channel, weights that make an exponential footprint around it stand out of noise of variance 1."""
    distances = probe.distances_um()
    mixing = np.zeros(distances.shape)
    for c in range(len(distances)):
        channels = near[c][near[c] >= 0]
        footprint = np.exp(-distances[c, channels] / reach_um)
        root = noise.space_root(channels)
        weights = root @ (root.T @ footprint)
        mixing[c, channels] = weights / np.sqrt(footprint @ weights)
    return mixing.astype(np.float32)
