"""Make the units that training snippets are drawn from: a bank of clean, filtered templates and of filtered noise.

Everything is made in noise units, after the filter of the live pipeline, so that a training snippet is what the detector would
cut. A *site* is a patch of a random probe with several units around its middle: the units a sorter has to tell apart. Half of them
are near-copies of its first, because easy negatives teach nothing. Each site is seen at a few *places*: the first where its units
were drawn, the others with the sources moved along the probe, all of the site by the same distance. Nothing is read from
recordings and no unit is used twice: a bank costs seconds, and a new one is drawn every few hundred steps. All arrays derive from
one seed, so training resumes exactly.
"""

import functools
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, sosfilt

from streamsort.config import PreprocessConfig
from streamsort.neurons import Units, draw_shapes, potentials, take
from streamsort.probe import Probe

SAMPLING_FREQUENCY = 30000.0
_PIPELINE = PreprocessConfig()  # snippets are filtered as the live pipeline does by default
FREQ_MIN_HZ, FREQ_MAX_HZ = _PIPELINE.freq_min_hz, _PIPELINE.freq_max_hz
N_SAMPLES, N_BEFORE, N_NEIGHBORS, RADIUS_UM = 48, 18, 11, 100.0
N_PHASES = 4  # sub-sample shifts kept per template
MARGIN = 24  # template samples kept on either side of the snippet window, so that colliding spikes can be shifted
TROUGH = N_BEFORE + MARGIN
N_NEAR = 24  # contacts of a patch
DRIFT_UM = 20.0  # places lie up to this far from the first, so two of them up to twice as far apart
SEEN = (3.5, 60.0)  # noise units; a unit whose trough at a place is outside is not seen there
_RATES_HZ = (30000.0, 20000.0, 24000.0, 25000.0, 32000.0)
_RATE_SHARES = (0.6, 0.1, 0.1, 0.1, 0.1)
_RAW_BEFORE, _RAW_AFTER = 80, 60  # samples evaluated before the trough and beyond the template's end

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Bank:
    """Sites with their units and noise.

    Attributes
    ----------
    templates : ndarray, shape (n_sites, n_units, n_places, N_PHASES, n_samples + 2 * MARGIN, N_NEAR), float32
        Clean filtered spikes on the patch, in noise units; the trough on the loudest contact is at row TROUGH for phase 0 and up to
        3/4 sample later for the others; zero where there is no contact.
    neighbors : ndarray, shape (n_sites, N_NEAR, N_NEIGHBORS), int64
        The columns of a snippet that peaks on each contact of the patch, -1 where there is none.
    mixing : ndarray, shape (n_sites, N_NEAR, N_NEAR), float32
        Noise of a patch is `mixing @ independent unit noise`.
    color : ndarray, shape (n_sites,), int64
        Which trace of `noise` a site draws from.
    noise : ndarray, shape (n_colors, n), float32
        Filtered noise of unit variance, one long trace per color.
    """

    templates: Floats
    neighbors: Ints
    mixing: Floats
    color: Ints
    noise: Floats


@dataclass(frozen=True)
class Site:
    """A patch of a probe: the contacts nearest to one of them.

    Attributes
    ----------
    contacts : ndarray, shape (N_NEAR, 2)
        In um, the middle one first; far away where there are fewer.
    neighbors : ndarray, shape (N_NEAR, N_NEIGHBORS), int64
        As in `Bank`.
    impedance : ndarray, shape (N_NEAR,), float32
        Relative sensitivity, 0 where there is no contact.
    """

    contacts: NDArray[np.float64]
    neighbors: Ints
    impedance: Floats


def make_bank(
    seed: tuple[int, ...],
    n_sites: int,
    n_units: int = 8,
    snr: tuple[float, float] = (3.5, 25.0),
    twin_share: float = 0.5,
    n_places: int = 2,
    drift_um: float = DRIFT_UM,
    n_samples: int = N_SAMPLES,
) -> Bank:
    """Draw sites, their units and their noise.

    Parameters
    ----------
    seed : tuple of int
        Seeds `numpy.random.default_rng`.
    n_sites, n_units : int
        Patches, and units on each.
    snr : tuple of float
        Range of the units' troughs in noise units on their loudest contact at the first place; drawn log-uniform.
    twin_share : float
        Share of units that are a slight change of the first unit of their site.
    n_places : int
        Places of each site; with 1 nothing moves.
    drift_um : float
        Places other than the first are displaced by up to this.
    n_samples : int
        Length of the snippets that will be drawn.
    """
    rng = np.random.default_rng(seed)
    sites = draw_sites(rng, n_sites)
    twin = rng.random((n_sites, n_units)) < twin_share
    twin[:, 0] = False
    units = _draw_units(rng, sites, twin, snr)
    moved = rng.uniform(-drift_um, drift_um, (n_sites, n_places))
    moved[:, 0] = 0.0
    rate = rng.choice(len(_RATES_HZ), n_sites, p=_RATE_SHARES)
    templates = np.empty((n_sites, n_units, n_places, N_PHASES, n_samples + 2 * MARGIN, N_NEAR), np.float32)
    for k, site in enumerate(sites):
        mine = take(units, np.arange(k * n_units, (k + 1) * n_units))
        templates[k] = _templates_of(site, mine, moved[k], _RATES_HZ[rate[k]], n_samples)
    noise = draw_noise(rng)
    color = rng.integers(len(noise), size=n_sites)
    neighbors = np.stack([site.neighbors for site in sites])
    return Bank(templates, neighbors, _draw_mixing(rng, sites), color, noise)


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
        "np1": (2, 32.0, 20.0, 0.0),  # rows of two, every other row shifted by half the pitch
        "np2": (2, 32.0, 15.0, 0.0),
        "three": (3, 30.0, 30.0, 0.5),
    }[str(kind)]
    column, row = np.meshgrid(np.arange(n_columns), np.arange(14), indexing="xy")
    shift = 0.5 * (row % 2) if kind == "np1" else 0.0
    places = np.stack([(column + shift) * dx, (row + stagger * (column % 2)) * dy], axis=-1).reshape(-1, 2)
    return Probe(places, np.zeros(len(places), np.int32))


def draw_sites(rng: np.random.Generator, n_sites: int) -> list[Site]:
    """Draw patches of up to 64 probes; now and then a contact is dead, or only a few are wired up, as on real probes."""
    probes = []
    for _ in range(min(n_sites, 64)):
        probe = _draw_probe(rng)
        table = probe.neighbors(RADIUS_UM, N_NEIGHBORS)
        if rng.random() < 0.1:
            table[:, int(rng.integers(1, N_NEIGHBORS)) :] = -1
        dead = np.flatnonzero(rng.random(probe.n_channels) < 0.01)
        table = np.where(np.isin(table, dead) & (table != np.arange(len(table))[:, None]), -1, table)
        impedance = np.exp(rng.normal(0.0, 0.12, probe.n_channels)).astype(np.float32)
        order = np.argsort(probe.distances_um(), axis=1, kind="stable")[:, :N_NEAR]
        probes.append((probe, order, table, impedance))
    sites = []
    for _ in range(n_sites):
        probe, order, table, impedance = probes[int(rng.integers(len(probes)))]
        near = order[int(rng.integers(probe.n_channels))]
        place = np.full(probe.n_channels + 1, -1)  # of each channel in the patch; the last stands for none
        place[near] = np.arange(len(near))
        short = N_NEAR - len(near)
        contacts = np.pad(probe.channel_locations[near], ((0, short), (0, 0)), constant_values=1e6)
        neighbors = np.pad(place[table[near]], ((0, short), (0, 0)), constant_values=-1)
        sites.append(Site(contacts, neighbors, np.pad(impedance[near], (0, short))))
    return sites


def _draw_units(rng: np.random.Generator, sites: list[Site], twin: NDArray[np.bool_], snr: tuple[float, float]) -> Units:
    """Draw the units of all sites, one site after the other, in um around contacts of their probe; sizes are set later."""
    n_sites, n_units = twin.shape
    shapes = draw_shapes(rng, twin.size, SAMPLING_FREQUENCY)
    low, high = np.log(snr)
    sizes = np.exp(rng.uniform(low, high, twin.size))
    depth = rng.uniform(5.0, 45.0, twin.size)
    mixed = {}
    for item in fields(Units)[1:]:
        value = {"snr": sizes, "sources_um": shapes.sources_um + depth[:, None, None] * np.array([0.0, 0.0, 1.0])}.get(
            item.name, getattr(shapes, item.name)
        )
        mixed[item.name] = _blend(rng, value.reshape(n_sites, n_units, *value.shape[1:]), twin)
    units = Units(SAMPLING_FREQUENCY, **{name: value.reshape(-1, *value.shape[2:]) for name, value in mixed.items()})
    return replace(units, sources_um=units.sources_um + _draw_somata(rng, sites, twin)[:, None])


def _blend(rng: np.random.Generator, fresh: NDArray[np.float64], twin: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Move one parameter of each twin towards that of its site's unit 0; mostly by a great deal."""
    weight = (0.5 * np.square(rng.random(twin.shape))).reshape(*twin.shape, *[1] * (fresh.ndim - 2))
    where = twin.reshape(weight.shape)
    result: NDArray[np.float64] = np.where(where, (1 - weight) * fresh[:, :1] + weight * fresh, fresh)
    return result


def _draw_somata(rng: np.random.Generator, sites: list[Site], twin: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Draw where the units are, in the plane of the probe around the middle of their patch; twins 1-8 um from its unit 0."""
    shape = (*twin.shape, 1)
    somata = rng.normal(size=(*twin.shape, 2)) * rng.uniform(2.0, 18.0, shape)
    near = somata[:, :1] + rng.normal(size=somata.shape) * rng.uniform(1.0, 8.0, shape)
    middle = np.array([site.contacts[0] for site in sites])[:, None]
    flat = (middle + np.where(twin[..., None], near, somata)).reshape(-1, 2)
    return np.column_stack([flat, np.zeros(len(flat))])


def _templates_of(site: Site, units: Units, moved: NDArray[np.float64], rate: float, n_samples: int) -> Floats:
    """Evaluate the units of one site at its places, (n_units, n_places, N_PHASES, n_samples + 2 * MARGIN, N_NEAR)."""
    n_units, n_places = units.n_units, len(moved)
    every = take(units, np.repeat(np.arange(n_units), n_places))
    n_template = n_samples + 2 * MARGIN
    raw = _filtered(every, site.contacts, np.tile(moved, n_units), rate, n_template + _RAW_BEFORE - TROUGH + _RAW_AFTER)
    templates = _cropped(raw * site.impedance, n_template).reshape(n_units, n_places, N_PHASES, n_template, N_NEAR)
    trough = np.maximum(-templates[:, :, 0, TROUGH].min(axis=-1), 1e-6)
    size = trough * (units.snr / trough[:, 0])[:, None]
    templates *= (units.snr / trough[:, 0]).astype(np.float32)[:, None, None, None, None]
    for u, p in np.argwhere((size < SEEN[0]) | (size > SEEN[1])):
        templates[u, p] = templates[u, 0]
    return templates


def _filtered(units: Units, contacts: NDArray[np.float64], displacement: NDArray[np.float64], rate: float, length: int) -> Floats:
    """Evaluate units as a stream of `rate` would record and `Encoder` resample them: (n, phases, length, n_contacts)."""
    front_end = _front_end(rate, length)
    around = np.broadcast_to(contacts, (units.n_units, *contacts.shape))
    before_ms = _RAW_BEFORE / SAMPLING_FREQUENCY * 1e3
    phases = []
    for phase in range(N_PHASES):
        times_ms = ((np.arange(front_end.shape[1]) - phase / N_PHASES) * 1e3 / rate - before_ms).astype(np.float32)
        phases.append(front_end @ potentials(units, around, displacement, times_ms))
    waves: Floats = np.stack(phases, axis=1)
    return waves


@functools.cache
def _front_end(rate: float, length: int) -> Floats:
    """Make the matrix that filters a column of samples of `rate` and resamples them linearly, (length, n_raw)."""
    n_raw = int(length * rate / SAMPLING_FREQUENCY) + 2
    response = sosfilt(_band(rate), np.eye(n_raw), axis=0)
    place = np.arange(length) * rate / SAMPLING_FREQUENCY
    low = np.floor(place).astype(np.int64)
    part = (place - low)[:, None]
    matrix: Floats = ((1 - part) * response[low] + part * response[low + 1]).astype(np.float32)
    return matrix


def _band(rate: float) -> NDArray[np.float64]:
    sos: NDArray[np.float64] = butter(_PIPELINE.filter_order, [FREQ_MIN_HZ, FREQ_MAX_HZ], btype="bandpass", fs=rate, output="sos")
    return sos


def _cropped(waves: Floats, n_template: int) -> Floats:
    """Cut around the deepest trough of phase 0."""
    first = _RAW_BEFORE - 12
    trough = waves[:, 0, first : _RAW_BEFORE + 30].min(axis=-1).argmin(axis=1) + first
    rows = trough[:, None] - TROUGH + np.arange(n_template)
    cropped: Floats = np.take_along_axis(waves, rows[:, None, :, None], axis=2)
    return cropped


def _draw_mixing(rng: np.random.Generator, sites: list[Site]) -> Floats:
    """Draw each site's noise correlation, falling exponentially with distance over 10-60 um, beside an independent part."""
    contacts = np.array([site.contacts for site in sites])
    gaps = np.hypot(*np.moveaxis(contacts[:, :, None] - contacts[:, None], -1, 0))
    shape = (len(sites), 1, 1)
    shared = rng.uniform(0.2, 0.9, shape) * np.exp(-gaps / rng.uniform(10.0, 60.0, shape))
    absent = np.array([site.impedance == 0 for site in sites])
    shared[absent] = 0.0
    np.swapaxes(shared, 1, 2)[absent] = 0.0
    mixing: Floats = np.linalg.cholesky(np.where(np.eye(N_NEAR, dtype=np.bool_), 1.0, shared)).astype(np.float32)
    return mixing


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
    filtered = sosfilt(_band(SAMPLING_FREQUENCY), np.array(broad), axis=-1)[:, 1024:]
    noise: Floats = (filtered / filtered.std(axis=-1, keepdims=True)).astype(np.float32)
    return noise
