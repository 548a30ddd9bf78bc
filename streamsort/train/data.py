"""Make the units that training snippets are drawn from: a bank of clean, filtered templates and of filtered noise.

Everything is made in noise units, after the filter of the live pipeline, so that a training snippet is what the detector would
cut. A *site* is a peak channel with its neighbours on a random probe, with its own noise and several units that all peak there:
the units a sorter has to tell apart. Half of them are near-copies of its first, because easy negatives teach nothing. Nothing
is read from recordings and no unit is used twice: a bank costs seconds, and a new one is drawn every few hundred steps. All
arrays derive from one seed, so training resumes exactly.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, sosfilt

from streamsort.config import PreprocessConfig
from streamsort.probe import Probe

SAMPLING_FREQUENCY = 30000.0
_PIPELINE = PreprocessConfig()  # snippets are filtered as the live pipeline does by default
FREQ_MIN_HZ, FREQ_MAX_HZ = _PIPELINE.freq_min_hz, _PIPELINE.freq_max_hz
N_SAMPLES, N_BEFORE, N_NEIGHBORS, RADIUS_UM = 48, 18, 11, 100.0
N_PHASES = 4  # sub-sample shifts kept per template
MARGIN = 24  # template samples kept on either side of the snippet window, so that colliding spikes can be shifted
N_TEMPLATE = N_SAMPLES + 2 * MARGIN
TROUGH = N_BEFORE + MARGIN

Floats = NDArray[np.float32]
_SOS = butter(_PIPELINE.filter_order, [FREQ_MIN_HZ, FREQ_MAX_HZ], btype="bandpass", fs=SAMPLING_FREQUENCY, output="sos")


@dataclass(frozen=True)
class Bank:
    """Sites with their units and noise.

    Attributes
    ----------
    templates : ndarray, shape (n_sites, n_units, N_PHASES, N_TEMPLATE, N_NEIGHBORS), float32
        Clean filtered spikes, trough of channel 0 equal to -1 at row TROUGH (phase 0) and up to 3/4 sample later (other phases).
    snr : ndarray, shape (n_sites, n_units), float32
        Trough of each unit on channel 0 in noise units.
    mixing : ndarray, shape (n_sites, N_NEIGHBORS, N_NEIGHBORS), float32
        Noise of a site is `mixing @ independent unit noise`; rows of missing channels are zero.
    color : ndarray, shape (n_sites,), int64
        Which trace of `noise` a site draws from.
    noise : ndarray, shape (n_colors, n), float32
        Filtered noise of unit variance, one long trace per color.
    """

    templates: Floats
    snr: Floats
    mixing: Floats
    color: NDArray[np.int64]
    noise: Floats


def make_bank(
    seed: tuple[int, ...], n_sites: int, n_units: int = 8, snr: tuple[float, float] = (3.5, 25.0), twin_share: float = 0.5
) -> Bank:
    """Draw sites, their units and their noise.

    Parameters
    ----------
    seed : tuple of int
        Seeds `numpy.random.default_rng`.
    n_sites, n_units : int
        Peak channels, and units on each.
    snr : tuple of float
        Range of the units' troughs in noise units; drawn log-uniform.
    twin_share : float
        Share of units that are a slight change of the first unit of their site.
    """
    rng = np.random.default_rng(seed)
    offsets, present = draw_sites(rng, n_sites)
    twin = rng.random((n_sites, n_units)) < twin_share
    twin[:, 0] = False
    low, high = np.log(snr)
    sizes = _blend(rng, rng.uniform(low, high, (n_sites, n_units, 1)).astype(np.float32), twin)[..., 0]
    templates = np.empty((n_sites, n_units, N_PHASES, N_TEMPLATE, N_NEIGHBORS), np.float32)
    for start in range(0, n_sites, 128):  # by parts: the intermediate arrays are an order larger than the result
        part = slice(start, start + 128)
        templates[part] = _draw_templates(rng, offsets[part], present[part], twin[part])
    noise = draw_noise(rng)
    color = rng.integers(len(noise), size=n_sites)
    return Bank(templates, np.exp(sizes), _draw_mixing(rng, offsets, present), color, noise)


def _draw_probe(rng: np.random.Generator) -> Probe:
    """Draw one probe of the kinds in use: single contact, tetrode, linear, staggered grid, Neuropixels 1 and 2, three columns."""
    kind = rng.choice(["single", "tetrode", "linear", "grid", "np1", "np2", "three"], p=[0.07, 0.22, 0.13, 0.2, 0.14, 0.14, 0.1])
    if kind == "single":
        return Probe.linear(1)
    if kind == "tetrode":
        square = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * rng.uniform(15.0, 50.0) + rng.normal(0.0, 1.0, (4, 2))
        return Probe(square, np.zeros(4, np.int32))
    if kind == "linear":
        return Probe.linear(int(rng.choice([8, 16, 32])), float(rng.choice([20.0, 25.0, rng.uniform(15.0, 50.0)])))
    n_columns, dx, dy, stagger = {
        "grid": (int(rng.integers(2, 5)), rng.uniform(16.0, 32.0), rng.uniform(16.0, 32.0), rng.choice([0.0, 0.5])),
        "np1": (4, 16.0, 40.0, 0.5),  # four staggered columns, 20 um between rows
        "np2": (2, 32.0, 15.0, 0.0),
        "three": (3, 30.0, 30.0, 0.0),
    }[str(kind)]
    column, row = np.meshgrid(np.arange(n_columns), np.arange(12), indexing="xy")
    places = np.stack([column * dx, (row + stagger * (column % 2)) * dy], axis=-1).reshape(-1, 2)
    return Probe(places, np.zeros(len(places), np.int32))


def draw_sites(rng: np.random.Generator, n_sites: int) -> tuple[Floats, NDArray[np.bool_]]:
    """Draw peak channels with their neighbours, nearest first.

    Returns
    -------
    offsets : ndarray, shape (n_sites, N_NEIGHBORS, 2), float32
        Place of each channel relative to the peak channel in um; 0 where there is none.
    present : ndarray, shape (n_sites, N_NEIGHBORS), bool
        Which channels exist; now and then a neighbour is dead, as on real probes.
    """
    probes = [_draw_probe(rng) for _ in range(min(n_sites, 64))]
    tables = [probe.neighbors(RADIUS_UM, N_NEIGHBORS) for probe in probes]
    offsets = np.zeros((n_sites, N_NEIGHBORS, 2), np.float32)
    present = np.zeros((n_sites, N_NEIGHBORS), np.bool_)
    for site in range(n_sites):
        k = int(rng.integers(len(probes)))
        places, row = probes[k].channel_locations, tables[k][rng.integers(len(tables[k]))]
        present[site] = row >= 0
        offsets[site, : present[site].sum()] = places[row[row >= 0]] - places[row[0]]
    dead = rng.random((n_sites, N_NEIGHBORS)) < 0.01
    dead[:, 0] = False
    return offsets, present & ~dead


def _blend(rng: np.random.Generator, fresh: Floats, twin: NDArray[np.bool_]) -> Floats:
    """Move the parameters of each twin towards those of its site's unit 0; mostly by a great deal."""
    weight = (0.5 * np.square(rng.random(twin.shape))).astype(np.float32)[..., None]
    result: Floats = np.where(twin[..., None], (1 - weight) * fresh[:, :1] + weight * fresh, fresh)
    return result


def _draw_places(rng: np.random.Generator, offsets: Floats, present: NDArray[np.bool_], twin: NDArray[np.bool_]) -> Floats:
    """Draw somata whose nearest contact is the peak channel: (n_sites, n_units, 3) um, the third away from the probe.

    Twins lie 1-8 um from the first place that was tried for their site's unit 0.
    """
    (n_sites, n_units), n_tries = twin.shape, 8
    spread = rng.uniform(2.0, 25.0, (n_sites, n_units, n_tries, 1))
    tries = rng.normal(size=(n_sites, n_units, n_tries, 2)) * spread
    tries[:, :, -1] = rng.uniform(-3.0, 3.0, (n_sites, n_units, 2))  # close enough to the contact to be always allowed
    near = tries[:, :1, :1] + rng.normal(size=tries.shape) * rng.uniform(1.0, 8.0, (n_sites, n_units, 1, 1))
    tries = np.where(twin[..., None, None], near, tries)
    steps = tries[:, :, :, None] - offsets[:, None, None]
    gaps = np.where(present[:, None, None], np.hypot(steps[..., 0], steps[..., 1]), np.inf)
    allowed = gaps.argmin(axis=-1) == 0
    first = np.where(allowed.any(axis=2), allowed.argmax(axis=2), n_tries - 1)
    place = np.take_along_axis(tries, first[:, :, None, None], axis=2)[:, :, 0]
    depth = _blend(rng, rng.uniform(5.0, 45.0, (n_sites, n_units, 1)).astype(np.float32), twin)
    return np.concatenate([place, depth], axis=-1).astype(np.float32)


def _bump(t: Floats, left: Floats, right: Floats) -> Floats:
    """Evaluate a Gaussian with two widths (ms)."""
    width = np.where(t < 0, left, right)
    result: Floats = np.exp(-0.5 * np.square(t / width))
    return result


def _draw_templates(rng: np.random.Generator, offsets: Floats, present: NDArray[np.bool_], twin: NDArray[np.bool_]) -> Floats:
    """Draw units and evaluate them on every channel and phase, filtered; see `Bank.templates`.

    A spike is three bumps: a small early peak, the trough (width at half height 0.15-0.6 ms) and the repolarisation. Away from the
    soma it decays exponentially (15-60 um), widens, comes up to 0.2 ms later or earlier, and changes shape along one direction.
    """

    def draw(low: float, high: float) -> Floats:
        """Draw one parameter of every unit, broadcast over channels."""
        return _blend(rng, rng.uniform(low, high, (*twin.shape, 1)).astype(np.float32), twin)

    place = _draw_places(rng, offsets, present, twin)
    angle = draw(0.0, 2 * np.pi)
    axis = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)[:, :, None]
    steps = offsets[:, None] - place[:, :, None, :2]
    along = (steps * axis).sum(-1)  # (n_sites, n_units, n_neighbors) um along the unit's own axis
    across = np.square(steps).sum(-1) - np.square(along)
    distance = np.sqrt(np.square(along / draw(1.0, 1.6)) + np.maximum(across, 0) + np.square(place[..., 2:]))
    footprint = np.exp(-(distance - distance[..., :1]) / draw(15.0, 60.0))
    footprint *= np.exp(rng.normal(0.0, 0.08, footprint.shape))  # contacts differ in impedance
    tilt = (along - along[..., :1]) / 60.0
    delay = np.clip((along - along[..., :1]) * draw(-1.0, 1.0) / 300.0, -0.2, 0.2)  # ms; 300 um/ms and faster
    widen = 1 + draw(0.0, 0.5) * (1 - np.minimum(footprint, 1.0))
    half = np.exp(draw(np.log(0.15), np.log(0.6))) / 2.355 * widen
    peak = np.maximum(draw(0.0, 0.8) * (1 + draw(-0.8, 0.8) * tilt), 0.0)
    early = np.maximum((np.square(draw(0.0, 0.8))) * (1 + draw(-0.8, 0.8) * tilt), 0.0)
    lag, peak_width = draw(1.4, 3.0) * half + draw(0.05, 0.3), draw(0.1, 0.4) * widen
    skew = draw(0.7, 1.3)
    parts = (half, half * skew, peak_width * draw(0.4, 0.8), peak_width, half * draw(0.6, 1.2), delay, lag, peak, early)
    return _filtered(parts, np.where(present[:, None], np.maximum(footprint, 0.0), 0.0).astype(np.float32))


def _filtered(parts: tuple[Floats, ...], footprint: Floats) -> Floats:
    """Evaluate the bumps at every phase, filter, scale the trough of channel 0 to -1 and crop around it."""
    left, right, rise, fall, early_width, delay, lag, peak, early = (part[..., None].astype(np.float32) for part in parts)
    before, length = 90, 180
    phases = []
    for phase in range(N_PHASES):
        t = ((np.arange(length) - before - phase / N_PHASES) / SAMPLING_FREQUENCY * 1e3).astype(np.float32) - delay
        wave = peak * _bump(t - lag, rise, fall) + early * _bump(t + lag * 0.8, early_width, early_width) - _bump(t, left, right)
        phases.append(sosfilt(_SOS, wave * footprint[..., None], axis=-1).astype(np.float32))
    waves = np.stack(phases, axis=2)  # (n_sites, n_units, n_phases, n_neighbors, length)
    trough = waves[:, :, 0, 0, before - 5 : before + 25].argmin(axis=-1) + before - 5
    rows = trough[..., None] - TROUGH + np.arange(N_TEMPLATE)
    cropped = np.take_along_axis(waves, rows[:, :, None, None], axis=-1)
    depths = np.maximum(-cropped[:, :, 0, :, TROUGH - 8 : TROUGH + 9].min(axis=-1), 1e-6)  # (n_sites, n_units, n_neighbors)
    depths[..., 1:] = np.maximum(depths[..., 1:], depths[..., :1])  # no channel is larger than the peak channel
    return np.ascontiguousarray(np.swapaxes(cropped / depths[:, :, None, :, None], -1, -2))


def _draw_mixing(rng: np.random.Generator, offsets: Floats, present: NDArray[np.bool_]) -> Floats:
    """Draw each site's noise correlation, falling exponentially with distance over 10-60 um, beside an independent part."""
    n_sites = len(offsets)
    gaps = np.hypot(*np.moveaxis(offsets[:, :, None] - offsets[:, None], -1, 0))
    shared = rng.uniform(0.2, 0.9, (n_sites, 1, 1)) * np.exp(-gaps / rng.uniform(10.0, 60.0, (n_sites, 1, 1)))
    eye = np.eye(offsets.shape[1], dtype=np.bool_)
    mixing = np.linalg.cholesky(np.where(eye, 1.0, shared))
    return np.where(present[:, :, None], mixing, 0.0).astype(np.float32)


def draw_noise(rng: np.random.Generator, n: int = 1 << 18) -> Floats:
    """Make filtered noise of unit variance: white, three kinds of 1/f, and two of the hash that distant spikes make."""
    frequency = np.maximum(np.fft.rfftfreq(n, 1 / SAMPLING_FREQUENCY), 1.0)
    broad = []
    for slope in (0.0, 0.4, 0.8, 1.2):
        spectrum = np.fft.rfft(rng.normal(size=n)) * frequency ** (-slope / 2)
        broad.append(np.fft.irfft(spectrum, n))
    t = (np.arange(90) - 30) / SAMPLING_FREQUENCY * 1e3
    for width in (0.1, 0.2):
        spike = -np.exp(-0.5 * (t / width) ** 2) + 0.4 * np.exp(-0.5 * ((t - 3 * width) / (2 * width)) ** 2)
        train = (rng.random(n) < 0.05) * rng.exponential(1.0, n)
        hashed = np.convolve(train, spike, mode="same")
        broad.append(hashed / hashed.std() + rng.normal(size=n))
    filtered = sosfilt(_SOS, np.array(broad), axis=-1)[:, 1024:]
    noise: Floats = (filtered / filtered.std(axis=-1, keepdims=True)).astype(np.float32)
    return noise
