"""The units' mean waveforms as matched filters.

In come a mean snippet per unit on all channels and the noise between the spikes; out go, for the channels on which the unit is
large, low-rank filters (template times inverse noise covariance), the template at sub-sample shifts to be subtracted, and its
energy: the squared distance between unit and noise, in units in which noise has variance 1 whatever the filter. Three ranks hold a
spike that travels along a dendrite; more of them would hold noise, and each costs time at every sample.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamsort.config import MatchConfig
from streamsort.covariance import NoiseModel
from streamsort.probe import Probe

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

# A large unit is subtracted wherever it shows, or what is left makes units of its own; a weak one's far channels are all noise.
_ALWAYS, _VISIBLE = 12, 2.0  # channels, noise units peak to peak
N_SHIFTS = 17
# In samples. More than half a sample to either side: a cut-off template's score is not quite largest where the template lies.
SHIFTS = np.linspace(-1.0, 1.0, N_SHIFTS)


class Templates(NamedTuple):
    """What matching reads, one row per unit.

    Attributes
    ----------
    channels : ndarray, shape (n_units, n_neighbors), int32
        Where the unit is large, largest first; -1 where there is none.
    place : ndarray, shape (n_units, n_channels), int32
        Column of a channel in `channels`, -1 for none.
    spatial, temporal : ndarray, shape (n_units, n_ranks, n_neighbors) and (n_units, n_ranks, n_samples), float32
        Factors of the filter.
    filters : ndarray, shape (n_units, n_samples, n_neighbors), float32
        The filter itself.
    shifted : ndarray, shape (n_units, N_SHIFTS, n_samples, n_neighbors), float32
        The template in noise units, delayed by `SHIFTS`.
    energy : ndarray, shape (n_units,), float32
        Of the whitened template.
    response : ndarray, shape (n_units, N_SHIFTS, 3), float32
        Scores one sample before, at, and after each shifted template: what tells by how much a spike is shifted.
    rivals : ndarray, shape (n_units, n_rivals), int32
        Units with a channel in common, the unit itself among them; -1 where there is none.
    """

    channels: Ints
    place: Ints
    spatial: Floats
    temporal: Floats
    filters: Floats
    shifted: Floats
    energy: Floats
    response: Floats
    rivals: Ints

    @property
    def n_units(self) -> int:
        return len(self.energy)

    @property
    def centred(self) -> Floats:
        """The templates without shift, (n_units, n_samples, n_neighbors)."""
        return self.shifted[:, N_SHIFTS // 2]


class TemplateMaker:
    """Turn mean snippets into templates.

    Parameters
    ----------
    config : MatchConfig
    probe : Probe
    noise : NoiseModel
    n_before : int
        Samples of a template before the trough.
    """

    def __init__(self, config: MatchConfig, probe: Probe, noise: NoiseModel, n_before: int) -> None:
        self._config, self._noise = config, noise
        self.tightness = config.amplitude_spread**-2
        self.n_before = n_before
        self._near = probe.neighbors(config.radius_um)
        self._time_unroot = np.linalg.inv(noise.time_root.T)
        n_samples = len(noise.time_root)
        self._taper = taper(n_samples)[:, None]
        self._shifts = np.array([delay(n_samples, delta) for delta in SHIFTS])

    def __call__(self, means: Floats) -> Templates:
        """Make templates of mean snippets (n_units, n_samples, n_channels) in noise units."""
        n_units, n_samples, n_channels = means.shape
        n_neighbors = min(self._config.n_channels, n_channels)
        templates = Templates(
            channels=np.full((n_units, n_neighbors), -1, np.int32),
            place=np.full((n_units, n_channels), -1, np.int32),
            spatial=np.zeros((n_units, self._config.n_ranks, n_neighbors), np.float32),
            temporal=np.zeros((n_units, self._config.n_ranks, n_samples), np.float32),
            filters=np.zeros((n_units, n_samples, n_neighbors), np.float32),
            shifted=np.zeros((n_units, N_SHIFTS, n_samples, n_neighbors), np.float32),
            energy=np.zeros(n_units, np.float32),
            response=np.zeros((n_units, N_SHIFTS, 3), np.float32),
            rivals=np.zeros((n_units, 0), np.int32),
        )
        for unit in range(n_units):
            self.put(templates, unit, means[unit])
        return self.related(templates)

    def put(self, templates: Templates, unit: int, mean: Floats) -> None:
        """Write one unit's row in place."""
        channels = self._choose(mean)
        n = len(channels)
        templates.channels[unit] = -1
        templates.channels[unit, :n] = channels
        templates.place[unit] = -1
        templates.place[unit, channels] = np.arange(n)
        time_root, root = self._noise.time_root, self._noise.space_root(channels)
        left, size, right = np.linalg.svd(time_root.T @ (self._taper * mean[:, channels]) @ root, full_matrices=False)
        r = min(self._config.n_ranks, len(size))
        left, size, right = left[:, :r] * size[:r], size[:r], right[:r]
        temporal, spatial = time_root @ left, right @ root.T
        for array in (templates.spatial, templates.temporal, templates.filters, templates.shifted):
            array[unit] = 0
        templates.temporal[unit, :r] = temporal.T
        templates.spatial[unit, :r, :n] = spatial
        templates.filters[unit, :, :n] = temporal @ spatial
        template = self._time_unroot @ left @ np.linalg.solve(root.T, right.T).T
        templates.shifted[unit, :, :, :n] = self._shifts @ template
        templates.energy[unit] = (size**2).sum()
        filters, shifted = templates.filters[unit], templates.shifted[unit]
        templates.response[unit, :, 0] = np.tensordot(shifted[:, :-1], filters[1:], 2)
        templates.response[unit, :, 1] = np.tensordot(shifted, filters, 2)
        templates.response[unit, :, 2] = np.tensordot(shifted[:, 1:], filters[:-1], 2)

    def related(self, templates: Templates) -> Templates:
        """Return the templates with `rivals` as their channels say now."""
        shared = (templates.place >= 0).astype(np.float32)
        shared = shared @ shared.T
        n_rivals = int((shared > 0).sum(axis=1).max(initial=0))
        rivals = np.full((templates.n_units, n_rivals), -1, np.int32)
        for unit, row in enumerate(shared):
            others = np.flatnonzero(row)
            rivals[unit, : len(others)] = others
        return templates._replace(rivals=rivals)

    def _choose(self, mean: Floats) -> Ints:
        """Return the channels near the largest on which the unit is largest."""
        size = np.ptp(mean, axis=0)
        near = self._near[int(size.argmax())]
        near = near[near >= 0]
        near = near[np.argsort(-size[near], kind="stable")]
        visible = (np.arange(len(near)) < _ALWAYS) | (size[near] > _VISIBLE)
        chosen: Ints = near[visible][: self._config.n_channels].astype(np.int32)
        return chosen


def taper(n_samples: int) -> NDArray[np.float64]:
    """Return weights that fall to 0 at both ends: whitening in time would make most of where a template is cut off."""
    n = n_samples // 8
    slope = np.sin(np.pi / 2 * (np.arange(n) + 0.5) / n) ** 2
    return np.concatenate([slope, np.ones(n_samples - 2 * n), slope[::-1]])


def delay(n_samples: int, delta: float) -> NDArray[np.float64]:
    """Return the matrix that delays a waveform by `delta` samples, band-limited, with silence on either side."""
    n = 2 * n_samples
    ramp = np.exp(-2j * np.pi * np.fft.rfftfreq(n) * delta)
    return np.asarray(np.fft.irfft(np.fft.rfft(np.eye(n_samples, n), axis=1) * ramp, n, axis=1)[:, :n_samples].T)


def overlap(templates: Templates, a: int, b: int, max_lag: int = 8) -> tuple[float, int]:
    """Return the largest whitened inner product of two templates over lags of `b`, and that lag in samples."""
    columns = templates.channels[a]
    columns = np.flatnonzero((columns >= 0) & (templates.place[b][columns] >= 0))
    if not len(columns):
        return 0.0, 0
    mine = templates.filters[a][:, columns]
    theirs = templates.centred[b][:, templates.place[b][templates.channels[a][columns]]]
    n = len(mine)
    lags = range(-max_lag, max_lag + 1)
    products = [float((mine[max(-lag, 0) : n - max(lag, 0)] * theirs[max(lag, 0) : n - max(-lag, 0)]).sum()) for lag in lags]
    best = int(np.argmax(products))
    return products[best], lags[best]


def likeness(templates: Templates) -> NDArray[np.float64]:
    """Return the cosine between every two templates, whitened, without lag, (n_units, n_units)."""
    n_units, n_samples, _ = templates.filters.shape
    shape = n_units, templates.place.shape[1], n_samples
    filters, means = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    unit, column = np.nonzero(templates.channels >= 0)
    channel = templates.channels[unit, column]
    filters[unit, channel] = templates.filters[unit, :, column]
    means[unit, channel] = templates.centred[unit, :, column]
    products = np.tensordot(filters, means, ((1, 2), (1, 2))).astype(np.float64)
    root = np.sqrt(np.maximum(templates.energy.astype(np.float64), 1e-9))
    cosine: NDArray[np.float64] = np.maximum(products, products.T) / root / root[:, None]
    return cosine
