"""How far the tissue has moved along the probe, from the peaks of the last moments and without knowing whose they are.

In come the peaks between two learning boundaries with their snippets, out comes a displacement at every depth. Kept are a few
hundred spikes of the past, each with its waveform and the place it would have without displacement, and per window of depth a
probability for every displacement. A new spike is compared with the kept ones of like waveform: that histogram of differences in
place has its hill where the tissue is now, and all new spikes together make it a sharp one. A small probability of a jump lets an
abrupt step win as soon as the spikes of one or two boundaries agree on it. No units are needed, so it works during calibration, and
after a step that made every unit unrecognisable; comparing the same spikes with the moved templates of all units took ten times as
long and was less sure where spikes are few.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.kernels.learn import compare_spikes
from streamsort.probe import Probe
from streamsort.snippets import Snippets

Floats = NDArray[np.float32]

# Of `locate`.
_UNIT_UM = 20.0  # lengths are of order 1 in the fit
_WIDTH_UM = 25.0  # standard deviation of a footprint as a Gaussian, where the contacts do not tell
_WIDTH_TRUST = 0.1  # against the evidence of the contacts
_AUDIBLE = 1.5  # noise units; projections below say nothing about the place
_FARTHEST_UM = 60.0  # from the peak channel

# Of `Motion`. Waveforms are compared on the peak channel from -0.4 to 0.7 ms, places between `locate` of about the trough.
_PLACE_MS = (0.33, 0.47)
_SHAPE_MS = (0.4, 0.73)
_LOUD = 5.0  # noise units; weaker peaks are located too badly
_VARIABLE = 0.3  # part of its amplitude by which a waveform may differ from another of its unit; amplitudes change with the place
_ACROSS_UM = 10.0  # standard deviation of the difference in x of two spikes of a unit
_ALONG_UM = 4.0  # the same in y
_BACKGROUND = 0.3  # so many kept spikes alike is what chance gives at any displacement
_REACH_UM = 50  # displacements up to this far from the last one are candidates
_WANDER_UM = 1.6  # per square root of a second
_JUMP = 1e-4  # probability of a jump per boundary
_STEP_UM = 5.0  # a change between two boundaries that is no wandering
_MOST_PER_CHANNEL = 0.7  # spikes looked at per boundary
_KEPT_PER_CHANNEL, _KEPT = 7, 600  # spikes of the past, at least _KEPT
_FIRST = 300  # so many are kept at once, then _RENEWED parts of all per boundary, which makes a memory of 25 s
_RENEWED = 0.01
_WINDOW_UM = 500.0  # between the centres of windows on a long probe
_COUPLING = 5.0  # a window moves with its neighbours when it has fewer spikes than this


def locate(snippets: Floats, channels: NDArray[np.int32], channel_locations: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tell where spikes or templates come from, by a Gaussian fitted to the logarithm of their amplitudes.

    Amplitudes are projections on the waveform of the peak channel, so they are least squares and hardly biased by noise; the fit is
    linear in closed form. Unlike a centre of mass it is not drawn to the middle of the probe. On two rows of contacts, as of a
    tetrode, the scale of y rests on a usual width of footprints and is off by up to a factor of 1.5.

    Parameters
    ----------
    snippets : ndarray, shape (n, n_samples, n_neighbors), float32
        In noise units, about the trough, with the peak channel in column 0.
    channels : ndarray, shape (n, n_neighbors), int32
        Channel of each column, -1 for none.
    channel_locations : ndarray, shape (n_channels, 2), float64
        In um.

    Returns
    -------
    locations : ndarray, shape (n, 2), float64
        In um.
    """
    here = channels >= 0
    peak = snippets[:, :, 0]
    size = np.sqrt(np.square(peak).sum(axis=1, keepdims=True))
    amplitude = np.einsum("ntk,nt->nk", snippets, peak) / np.maximum(size, 1e-6)
    weight = np.where(here, np.maximum(amplitude - _AUDIBLE, 0) ** 2 + 1e-6, 0).astype(np.float64)
    centre = channel_locations[channels[:, 0]]
    steps = np.where(here[:, :, None], channel_locations[channels] - centre[:, None], 0) / _UNIT_UM
    design = np.concatenate([np.ones((*here.shape, 1)), steps, -np.square(steps).sum(axis=2, keepdims=True)], axis=2)
    weighted = design * weight[:, :, None]
    normal = weighted.transpose(0, 2, 1) @ design + 1e-3 * np.eye(4)
    moment = (weighted * np.log(np.maximum(amplitude, _AUDIBLE))[:, :, None]).sum(axis=1)
    trust = _WIDTH_TRUST * weight.sum(axis=1)
    normal[:, 3, 3] += trust
    moment[:, 3] += trust * 0.5 * (_UNIT_UM / _WIDTH_UM) ** 2
    fit = np.linalg.solve(normal, moment[:, :, None])[:, :, 0]
    offset = _UNIT_UM * fit[:, 1:3] / (2 * np.maximum(fit[:, 3:], 0.1))
    located: NDArray[np.float64] = centre + np.clip(offset, -_FARTHEST_UM, _FARTHEST_UM)
    return located


class Motion:
    """Follow the displacement of the tissue.

    Parameters
    ----------
    probe : Probe
    snippets : Snippets
        What the snippets are cut by.
    sampling_frequency : float
    period_s : float
        Time between two calls of `update`.
    seed : int
        Of the choice which spikes are kept.

    Attributes
    ----------
    depth_um : ndarray, shape (n_windows,), float64
        Centres of the windows along y; one on probes shorter than 750 um.
    displacement_um : ndarray, shape (n_windows,), float64
        How far the tissue has moved along y since the start, in each window.
    change_um : ndarray, shape (n_windows,), float64
        By the last update.
    """

    def __init__(self, probe: Probe, snippets: Snippets, sampling_frequency: float, period_s: float = 0.25, seed: int = 0) -> None:
        self._neighbors, self._locations = snippets.neighbors, probe.channel_locations
        self._trough = snippets.n_before
        self._place, self._shape = (_rows(snippets, around_ms, sampling_frequency) for around_ms in (_PLACE_MS, _SHAPE_MS))
        self._rng = np.random.default_rng(seed)
        n_channels = probe.n_channels
        self._n_most = max(round(_MOST_PER_CHANNEL * n_channels), 80)
        self._n_kept = max(_KEPT_PER_CHANNEL * n_channels, _KEPT)
        low, high = self._locations[:, 1].min(), self._locations[:, 1].max()
        n_windows = max(round((high - low) / _WINDOW_UM), 1)
        self.depth_um = low + (np.arange(n_windows) + 0.5) * (high - low) / n_windows
        self.displacement_um, self.change_um = np.zeros(n_windows), np.zeros(n_windows)
        self._spacing_um = max((high - low) / n_windows, 1.0)
        chain = np.diff(np.eye(n_windows), axis=0)
        self._bending = chain.T @ chain
        self._centre = np.zeros(n_windows)  # of the candidates
        self._candidates = np.arange(-_REACH_UM, _REACH_UM + 1.0)
        self._posterior = np.tile(_bell(self._candidates, 1.0), (n_windows, 1))
        apart = self._candidates[:, None] - self._candidates
        self._smooth = _bell(apart, _ALONG_UM)
        wander = _bell(apart, _WANDER_UM * np.sqrt(period_s))
        self._transition = (1 - _JUMP) * wander / wander.sum(axis=0) + _JUMP / len(wander)
        self._kept_place, self._kept_shape = np.zeros((0, 2)), np.zeros((0, self._shape.stop - self._shape.start), np.float32)

    @property
    def stepped(self) -> bool:
        """Whether the last update changed the displacement somewhere by more than wandering does."""
        return bool(np.abs(self.change_um).max() > _STEP_UM)

    def at(self, y_um: NDArray[Any]) -> NDArray[np.float64]:
        """Return the displacement, in um, at places along the probe."""
        displacement: NDArray[np.float64] = np.interp(y_um, self.depth_um, self.displacement_um)
        return displacement

    def update(self, snippets: Floats, channel: NDArray[Any]) -> None:
        """Take the peaks since the last boundary in, sorted or not.

        Parameters
        ----------
        snippets : ndarray, shape (n_peaks, n_snippet_samples, n_neighbors), float32
            In noise units.
        channel : ndarray, shape (n_peaks,), integer
            Peak channel of each.
        """
        loud = np.flatnonzero(-snippets[:, self._trough, 0] > _LOUD)
        loud = loud[:: max(-(-len(loud) // self._n_most), 1)]
        place = locate(snippets[loud][:, self._place], self._neighbors[channel[loud]], self._locations)
        shape = snippets[loud][:, self._shape, 0]
        self._posterior = self._posterior @ self._transition
        near = self._near(place[:, 1])
        if len(loud) and len(self._kept_place):
            self._weigh(near @ self._evidence(place, shape))
        self._move(near.sum(axis=1))
        self._recentre()
        self._keep(place - np.column_stack([np.zeros(len(place)), self.at(place[:, 1])]), shape)

    def _evidence(self, place: NDArray[np.float64], shape: Floats) -> NDArray[np.float64]:
        """Return the log-likelihood of each candidate by each spike, (n_spikes, n_candidates)."""
        home_um = place[:, 1] - np.interp(place[:, 1], self.depth_um, self._centre)
        usual = 1.2 * shape.shape[1]  # less than 2 per row, the noise is correlated in time
        spread = usual + 0.5 * np.square(_VARIABLE * shape.min(axis=1))
        order = np.argsort(self._kept_place[:, 1], kind="stable")
        alike = np.zeros((len(place), len(self._candidates)))
        limits = _REACH_UM, usual, _ACROSS_UM
        compare_spikes(place, home_um, shape, spread, self._kept_place[order], self._kept_shape[order], limits, alike)
        evidence: NDArray[np.float64] = np.log(alike @ self._smooth + _BACKGROUND)
        return evidence

    def _near(self, y_um: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what each spike counts in each window, (n_windows, n_spikes): 1 at the centre, 0 at the next one."""
        inside = np.clip(y_um, self.depth_um[0], self.depth_um[-1])
        near: NDArray[np.float64] = np.maximum(1 - np.abs(self.depth_um[:, None] - inside) / self._spacing_um, 0)
        return near

    def _weigh(self, evidence: NDArray[np.float64]) -> None:
        """Update the posteriors with the log-likelihoods (n_windows, n_candidates)."""
        total = np.log(self._posterior) + evidence
        self._posterior = np.exp(total - total.max(axis=1, keepdims=True)) + 1e-12
        self._posterior /= self._posterior.sum(axis=1, keepdims=True)

    def _move(self, n_spikes: NDArray[np.float64]) -> None:
        """Read the displacements from the posteriors; where few spikes tell, the change is that of the windows beside."""
        own = self._centre + self._estimates() - self.displacement_um
        told = n_spikes + 1e-6
        self.change_um = np.linalg.solve(np.diag(told) + _COUPLING * self._bending, told * own)
        self._centre += self.change_um - own
        self.displacement_um = self.displacement_um + self.change_um

    def _estimates(self) -> NDArray[np.float64]:
        """Return the mean of each posterior about its highest hill, relative to the centre."""
        top = self._candidates[self._posterior.argmax(axis=1)]
        hill = self._posterior * (np.abs(self._candidates - top[:, None]) < 2 * _ALONG_UM)
        mean: NDArray[np.float64] = hill @ self._candidates / hill.sum(axis=1)
        return mean

    def _recentre(self) -> None:
        """Let the candidates lie about the displacements found."""
        for window, by in enumerate(np.round(self.displacement_um - self._centre).astype(int)):
            source = self._candidates.astype(int) + by + _REACH_UM
            inside = (source >= 0) & (source < len(source))
            self._posterior[window] = np.where(inside, self._posterior[window][np.clip(source, 0, len(source) - 1)], 1e-12)
            self._centre[window] += by

    def _keep(self, place: NDArray[np.float64], shape: Floats) -> None:
        """Keep some of the spikes, at random, in the place of others."""
        n_new = max(_FIRST - len(self._kept_place), round(_RENEWED * self._n_kept))
        chosen = np.sort(self._rng.permutation(len(place))[:n_new])
        stay = np.sort(self._rng.permutation(len(self._kept_place))[: self._n_kept - len(chosen)])
        self._kept_place = np.concatenate([self._kept_place[stay], place[chosen]])
        self._kept_shape = np.concatenate([self._kept_shape[stay], shape[chosen]])


def _rows(snippets: Snippets, around_ms: tuple[float, float], sampling_frequency: float) -> slice:
    before, after = (round(ms * sampling_frequency / 1e3) for ms in around_ms)
    return slice(snippets.n_before - min(before, snippets.n_before), snippets.n_before + min(after, snippets.n_after))


def _bell(x: NDArray[np.float64], width: float) -> NDArray[np.float64]:
    bell: NDArray[np.float64] = np.exp(-0.5 * np.square(x / width))
    return bell
