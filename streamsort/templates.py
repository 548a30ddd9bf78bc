"""The units' mean waveforms as matched filters.

In come a mean snippet per unit on all channels and the noise between the spikes; out go, for the channels on which the unit is
large, low-rank filters (template times inverse noise covariance), the template at sub-sample shifts to be subtracted, and its
energy: the squared distance between unit and noise, in units in which noise has variance 1 whatever the filter. Three ranks hold a
spike that travels along a dendrite; more of them would hold noise, and each costs time at every sample.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft

from streamsort.config import MatchConfig
from streamsort.covariance import NoiseModel
from streamsort.kernels.learn import multiply, slide
from streamsort.probe import Probe

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

# A large unit is subtracted wherever it shows, or what is left makes units of its own; a weak one's far channels are all noise.
_ALWAYS, _VISIBLE = 12, 2.0  # channels, noise units peak to peak
# Through the common reference also far away; but the mean of n snippets holds the n-th part of any other spike in them.
_VISIBLE_FAR, _OTHERS, _MANY = 4.0, 200.0, 10_000  # noise units peak to peak, and over n
# Channels on which a unit is known: these about its largest, or more where they are so dense that more than half lie near. Spikes
# teach it on those, so that a spike costs no more on a large probe.
_KNOWN = 64
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
    shifted : ndarray, shape (n_units, N_SHIFTS, n_whole, n_neighbors), float32
        The mean snippet, delayed by `SHIFTS`: what is subtracted. The filter lies on the first n_samples.
    energy : ndarray, shape (n_units,), float32
        Mean of a spike's score, and variance of noise's.
    height : ndarray, shape (n_units,), float32
        Largest deflection, noise units.
    tightness : ndarray, shape (n_units,), float32
        One over the variance of a spike's size over the template's.
    response : ndarray, shape (n_units, N_SHIFTS, 3), float32
        Scores one sample before, at, and after each shifted template: what tells by how much a spike is shifted.
    around : ndarray, shape (n_units, n_known), int32
        Channels on which the unit is known, rising; those of `channels` are among them.
    version : ndarray, shape (n_units,), int32
        A number that tells this template from all others of its maker.
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
    height: Floats
    tightness: Floats
    response: Floats
    around: Ints
    version: Ints
    rivals: Ints

    @property
    def n_units(self) -> int:
        return len(self.energy)

    @property
    def centred(self) -> Floats:
        """The mean snippets without shift, (n_units, n_whole, n_neighbors)."""
        return self.shifted[:, N_SHIFTS // 2]

    def copied(self, into: "Templates | None" = None) -> "Templates":
        """Return these units as they are now: `TemplateMaker.put` writes in place. What `into` holds already is not copied."""
        if into is None or into.n_units != self.n_units:
            return Templates._make(column.copy() for column in self)
        rows = np.flatnonzero(into.version != self.version)
        for column, mine in zip(into[:-1], self[:-1], strict=True):
            column[rows] = mine[rows]
        return into._replace(rivals=self.rivals)

    def taken(self, rows: NDArray[np.intp]) -> "Templates":
        """Return some of the units; who are rivals is no longer told."""
        return Templates._make([*(column[rows] for column in self[:-1]), np.zeros((len(rows), 0), np.int32)])

    def joined(self, others: "Templates") -> "Templates":
        """Return these units and others; whose rivals the others are is still to be told, see `TemplateMaker.related`."""
        columns = (np.concatenate(pair) for pair in zip(self[:-1], others[:-1], strict=True))
        return Templates._make([*columns, np.pad(self.rivals, ((0, others.n_units), (0, 0)), constant_values=-1)])


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
        n_known = min(max(_KNOWN, 2 * self._near.shape[1]), probe.n_channels)
        self._around = np.sort(probe.neighbors(np.inf, n_known), axis=1)
        self._n_samples = len(noise.time_root)
        self._taper = taper(self._n_samples)[:, None]
        self.n_known, self._n_made = n_known, 0

    def around(self, mean: Floats, known: Ints | None = None) -> Ints:
        """Return the channels on which a unit is to be known, (n_known,), rising.

        Parameters
        ----------
        mean : ndarray, shape (n_whole, n_channels), float32
            On the channels `known`, or on all.
        known : ndarray, shape (n_known,), int32, optional
            Where it is known so far: it stays so until some of the channels near its largest are not among them.
        """
        if known is not None and len(known) == len(self._near):
            return known
        largest = int(np.ptp(mean, axis=0).argmax())
        home = largest if known is None else int(known[largest])
        near = self._near[home]
        if known is not None and np.isin(near[near >= 0], known).all():
            return known
        around: Ints = self._around[home]
        return around

    def __call__(self, means: Floats, n_spikes: NDArray[np.int64] | None = None, around: Ints | None = None) -> Templates:
        """Make templates of mean snippets in noise units.

        Parameters
        ----------
        means : ndarray, shape (n_units, n_whole, n_known), float32
        n_spikes : ndarray, shape (n_units,), int64, optional
            Of so many spikes each; by default of many.
        around : ndarray, shape (n_units, n_known), int32, optional
            The channels of each, rising; by default all.
        """
        n_units, n_whole, n_known = means.shape
        around = np.tile(np.arange(n_known, dtype=np.int32), (n_units, 1)) if around is None else around
        n_channels = len(self._near)
        n_samples = self._n_samples
        n_neighbors = min(self._config.n_channels, n_channels)
        templates = Templates(
            channels=np.full((n_units, n_neighbors), -1, np.int32),
            place=np.full((n_units, n_channels), -1, np.int32),
            spatial=np.zeros((n_units, self._config.n_ranks, n_neighbors), np.float32),
            temporal=np.zeros((n_units, self._config.n_ranks, n_samples), np.float32),
            filters=np.zeros((n_units, n_samples, n_neighbors), np.float32),
            shifted=np.zeros((n_units, N_SHIFTS, n_whole, n_neighbors), np.float32),
            energy=np.zeros(n_units, np.float32),
            height=np.zeros(n_units, np.float32),
            tightness=np.full(n_units, self.tightness, np.float32),
            response=np.zeros((n_units, N_SHIFTS, 3), np.float32),
            around=np.zeros((n_units, n_known), np.int32),
            version=np.zeros(n_units, np.int32),
            rivals=np.zeros((n_units, 0), np.int32),
        )
        for unit in range(n_units):
            self.put(templates, unit, means[unit], int(n_spikes[unit]) if n_spikes is not None else _MANY, around[unit])
        return self.related(templates, range(n_units))

    def put(self, templates: Templates, unit: int, mean: Floats, n_spikes: int, around: Ints) -> None:
        """Write one unit's row in place: of its mean snippet, (n_whole, n_known), on the channels `around`."""
        columns = self._choose(mean, n_spikes, around)
        n, channels = len(columns), around[columns]
        self._n_made += 1
        templates.version[unit] = self._n_made
        templates.around[unit] = around
        templates.channels[unit] = -1
        templates.channels[unit, :n] = channels
        templates.place[unit] = -1
        templates.place[unit, channels] = np.arange(n)
        time_root, root = self._noise.time_root, self._noise.space_root(channels)
        whole, n_samples = mean[:, columns], self._n_samples
        left, size, right = np.linalg.svd(time_root.T @ (self._taper * whole[:n_samples]) @ root, full_matrices=False)
        r = min(self._config.n_ranks, len(size))
        temporal, spatial = time_root @ (left[:, :r] * size[:r]), right[:r] @ root.T
        # Scaled so that its response to a spike and the variance of its response to noise are the same.
        variance = max(float((size[:r] ** 2).sum()), 1e-9)
        temporal *= (temporal @ spatial * whole[:n_samples]).sum() / variance
        weights = temporal @ spatial
        for array in (templates.spatial, templates.temporal, templates.filters, templates.shifted):
            array[unit] = 0
        templates.temporal[unit, :r] = temporal.T
        templates.spatial[unit, :r, :n] = spatial
        templates.filters[unit, :, :n] = weights
        templates.shifted[unit, :, :, :n] = delayed(whole, SHIFTS)
        filters, shifted = templates.filters[unit], templates.shifted[unit]
        templates.energy[unit] = (weights * whole[:n_samples]).sum()
        templates.height[unit] = np.abs(whole[:n_samples]).max()
        templates.response[unit, :, 0] = np.tensordot(shifted[:, : n_samples - 1], filters[1:], 2)
        templates.response[unit, :, 1] = np.tensordot(shifted[:, :n_samples], filters, 2)
        templates.response[unit, :, 2] = np.tensordot(shifted[:, 1 : n_samples + 1], filters, 2)

    def related(self, templates: Templates, changed: Iterable[int]) -> Templates:
        """Return the templates with `rivals` as the channels of the changed rows say now."""
        n_units = templates.n_units
        shared = np.zeros((n_units, n_units), bool)
        unit, column = np.nonzero(templates.rivals >= 0)
        shared[unit, templates.rivals[unit, column]] = True
        for row in changed:
            channels = templates.channels[row]
            shared[row] = shared[:, row] = (templates.place[:, channels[channels >= 0]] >= 0).any(axis=1)
        unit, rival = np.nonzero(shared)
        n_rivals = shared.sum(axis=1)
        rivals = np.full((n_units, int(n_rivals.max(initial=0))), -1, np.int32)
        rivals[unit, np.arange(len(unit)) - np.repeat(np.cumsum(n_rivals) - n_rivals, n_rivals)] = rival
        return templates._replace(rivals=rivals)

    def _choose(self, mean: Floats, n_spikes: int, around: Ints) -> NDArray[np.intp]:
        """Return the columns in which the unit is largest."""
        size = np.ptp(mean, axis=0)
        near = self._near[around[size.argmax()]]
        near = np.searchsorted(around, near[np.isin(near, around)])
        near = near[np.argsort(-size[near], kind="stable")]
        visible = size > _VISIBLE_FAR + _OTHERS / n_spikes
        visible[near] = (np.arange(len(near)) < _ALWAYS) | (size[near] > _VISIBLE)
        columns = np.flatnonzero(visible)
        return columns[np.argsort(-size[columns], kind="stable")][: self._config.n_channels]


def taper(n_samples: int) -> NDArray[np.float64]:
    """Return weights that fall to 0 at both ends: whitening in time would make most of where a template is cut off."""
    n = n_samples // 8
    slope = np.sin(np.pi / 2 * (np.arange(n) + 0.5) / n) ** 2
    return np.concatenate([slope, np.ones(n_samples - 2 * n), slope[::-1]])


def delayed(waveforms: Floats, by: NDArray[np.float64]) -> Floats:
    """Delay waveforms (n_samples, n_channels), band-limited, by each of `by` samples; (n, n_samples, n_channels)."""
    n_samples = len(waveforms)
    n = next_fast_len(n_samples + 32, real=True)
    ramps = np.exp(-2j * np.pi * np.fft.rfftfreq(n) * by[:, None]).astype(np.complex64)
    late: Floats = irfft(rfft(waveforms, n, axis=0) * ramps[:, :, None], n, axis=1)[:, :n_samples]
    return late


def overlap(templates: Templates, a: int, b: int, max_lag: int = 8) -> tuple[float, int]:
    """Return the largest whitened inner product of two templates over lags of `b`, parts of a sample too, and the nearest lag."""
    products = np.zeros(2 * max_lag + 1)
    slide(templates, a, b, products)
    if not products.any():
        return 0.0, 0
    best = int(products.argmax())
    before, here, after = products[[max(best - 1, 0), best, min(best + 1, len(products) - 1)]].tolist()
    bend = before - 2 * here + after
    return here - (before - after) ** 2 / 8 / bend if bend < 0 else here, best - max_lag


def likeness(templates: Templates, others: Templates) -> NDArray[np.float64]:
    """Return the cosine between each template and each of the others, whitened, without lag, (n_units, n_others)."""
    mine, theirs = np.zeros((templates.n_units, others.n_units)), np.zeros((others.n_units, templates.n_units))
    multiply(templates, others, mine)
    multiply(others, templates, theirs)
    roots = (np.sqrt(np.maximum(one.energy.astype(np.float64), 1e-9)) for one in (templates, others))
    cosine: NDArray[np.float64] = np.maximum(mine, theirs.T) / np.multiply.outer(*roots)
    return cosine
