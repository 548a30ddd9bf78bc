"""Labelled snippets to judge encoders on: what the live detector would hand them, with the unit each belongs to.

Two kinds of material come in. Footprints (simulated neurons, or measured ones on a 16 x 20 um grid) become a `World`: filtered
templates over a probe at every um of displacement, beside filtered noise, from which spikes of any SNR and drift are drawn.
Finished data sets (recordings with truth, spikes cut by others) are only cut and scaled. Out comes `Spikes`, always in noise units
and with 2.6 ms after the trough where the data reach that far, so that shorter windows are cut from the same spikes.

Filtering is linear, so templates and noise are filtered apart, by the causal filter of the live path, and added afterwards. A
spike's peak channel and trough are then looked for in the sum of both, as `streamsort.detect` does: the deepest value within
`exclude_sweep_ms` of the true time on the channels within `radius_um` of the channel where the unit is really largest.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.io import loadmat
from scipy.signal import butter, sosfilt

from streamsort.config import DetectConfig, PreprocessConfig, SnippetConfig
from streamsort.neurons import draw_units, templates_at
from streamsort.noise import mad
from streamsort.probe import Probe
from streamsort.simulate import named_probe

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

RATE_HZ = 30000.0
LEAD_ROWS, TROUGH_ROWS = 32, 128  # of a template: rows up to its trough, rows in all
STEPS_UM = np.arange(-20.0, 20.5, 1.0)  # displacements at which templates are evaluated
NOISE_S, NOISE_REACH_UM = 9.0, 25.0  # enough for 2000 spikes without any piece of noise twice
AMPLITUDE_JITTER = 0.05  # from spike to spike, relative
SNR_BINS = {"3-4": (3.0, 4.0), "4-6": (4.0, 6.0), "6-10": (6.0, 10.0), ">10": (10.0, 20.0)}
DRIFTS_UM = (0.0, 10.0, 20.0, 40.0)
TYPICAL_SNR = "4-6"  # of the variants and the look-ahead
LOOK_AHEAD_MS, LOOK_AHEAD_DRIFTS_UM = (0.7, 1.0, 1.5, 2.6), (0.0, 20.0)
SIMULATED_PROBE = "grid32"
FOOTPRINTS = "real-footprints/121817_SU_waves_allNeg_gridEst.mat"
MEAREC = [f"mearec-tetrode/tetrode_{kind}_n7.npz" for kind in ("static", "drift")]
QUIROGA = [f"quiroga-difficult2/spikes_C_Difficult2_noise{noise}.mat" for noise in ("005", "01", "015", "02")]
HELD_OUT = 2**31  # seeds from here on belong to tests and benchmarks; training draws from smaller ones
_DETECT, _SNIPPET = DetectConfig(), SnippetConfig()


@dataclass(frozen=True)
class Band:
    """The band-pass an encoder expects before it; of the live path's kind and order."""

    freq_min_hz: float
    freq_max_hz: float

    def __call__(self, traces: NDArray[Any], rate_hz: float) -> Floats:
        """Filter along the first axis, causally."""
        edges = [self.freq_min_hz, self.freq_max_hz]
        sections = butter(PreprocessConfig().filter_order, edges, "bandpass", output="sos", fs=rate_hz)
        filtered: Floats = sosfilt(sections, traces, axis=0).astype(np.float32)
        return filtered


@dataclass(frozen=True)
class Spikes:
    """Snippets whose unit is known.

    Attributes
    ----------
    snippets : ndarray, shape (n, n_rows, n_neighbors), float32
        In noise units, trough of channel 0 at row `n_before`; zeros where there is no channel.
    noise_level : ndarray, shape (n, n_neighbors), float32
        1 where there is a channel, 0 where not: what the encoder divides by.
    unit : ndarray, shape (n,), int64
    rate_hz : float
    n_before : int
    detected : float
        Share of the spikes whose trough is beyond the live threshold.
    """

    snippets: Floats
    noise_level: Floats
    unit: Ints
    rate_hz: float
    n_before: int
    detected: float

    def window(self, ms_after: float) -> Floats:
        """Return the snippets up to so long after the trough."""
        return self.snippets[:, : self.n_before + round(ms_after * self.rate_hz / 1e3)]


@dataclass(frozen=True)
class World:
    """Units on a probe, and its noise.

    Attributes
    ----------
    templates : ndarray, shape (n_units, n_steps, TROUGH_ROWS, n_channels), float32
        Filtered; at displacement 0 the trough on the best channel is -1 and at row LEAD_ROWS.
    noise : ndarray, shape (n, n_channels), float32
        Filtered, of noise level 1.
    """

    name: str
    placement: str
    probe: Probe
    templates: Floats
    noise: Floats

    @property
    def n_units(self) -> int:
        return len(self.templates)


def simulated_world(placement: str, n_units: int, band: Band) -> World:
    """Draw neurons nobody trained on.

    Parameters
    ----------
    placement : {"anywhere", "together"}
        Anywhere on the probe, or all with the same peak channel, the one nearest to the middle of the probe.
    """
    probe = named_probe(SIMULATED_PROBE)
    if placement == "anywhere":
        units = draw_units(n_units, probe, RATE_HZ, HELD_OUT)
    else:
        many = draw_units(3 * n_units * probe.n_channels, probe, RATE_HZ, HELD_OUT + 1)
        middle = np.hypot(*(probe.channel_locations - np.median(probe.channel_locations, axis=0)).T).argmin()
        peak_channel = templates_at(many, probe).min(axis=1).argmin(axis=1)
        chosen = np.flatnonzero(peak_channel == middle)[:n_units]
        arrays: dict[str, Any] = {key: value[chosen] for key, value in vars(many).items() if isinstance(value, np.ndarray)}
        units = replace(many, **arrays)
    raw = np.stack([templates_at(units, probe, step) for step in STEPS_UM], axis=1)
    return World("simulation", placement, probe, _aligned(raw, band), draw_noise(probe, band))


def measured_world(placement: str, file: Path, band: Band) -> World:
    """Place the measured footprints on a Neuropixels 1.0 probe, whose columns are those they were measured on.

    Between the rows of the grid, 20 um apart, a cubic spline is laid: linear interpolation makes spikes shrink half way. Every
    footprint is used once, mirrored or not.

    Parameters
    ----------
    placement : {"anywhere", "together"}
        Anywhere along the probe, or all within 10 um of its middle.
    """
    sites = named_probe("neuropixels128").channel_locations[:48]
    probe = Probe(sites, np.zeros(len(sites), np.int32))
    rng = np.random.default_rng([HELD_OUT, 1])
    middle_um, reach_um = float(sites[:, 1].mean()), {"anywhere": 80.0, "together": 10.0}[placement]
    raw = []
    for unit in np.atleast_1d(loadmat(file, squeeze_me=True, struct_as_record=False)["uColl"]):
        columns, waves = _grid(unit)
        y_um, mirror = middle_um + rng.uniform(-reach_um, reach_um), rng.choice([-1.0, 1.0])
        column = np.searchsorted(columns, mirror * (sites[:, 0] - sites[:, 0].mean()))
        raw.append(np.stack([waves(sites[:, 1] - y_um - step)[np.arange(len(sites)), column].T for step in STEPS_UM]))
    footprints = np.nan_to_num(np.array(raw, np.float32))
    return World("real-footprints", placement, probe, _aligned(footprints, band), draw_noise(probe, band))


def _grid(unit: Any) -> tuple[NDArray[np.float64], CubicSpline]:
    """Return the columns' x in um, and a spline over y to (n_columns, n_samples), both around the unit."""
    waves = np.asarray(unit.waves, np.float64)
    waves = waves - np.median(waves[:, :8], axis=1, keepdims=True)
    ramp = np.minimum((np.arange(waves.shape[1]) + 0.5) / 10, 1.0)
    waves *= ramp * ramp[::-1]  # they do not end at 0
    columns, column = np.unique(np.round(unit.xC, 3), return_inverse=True)
    rows, row = np.unique(np.round(unit.yC, 3), return_inverse=True)
    grid = np.zeros((len(rows), len(columns), waves.shape[1]))
    grid[row, column] = waves
    return columns, CubicSpline(rows, grid, extrapolate=False)  # NaN outside


def _aligned(raw: Floats, band: Band) -> Floats:
    """Filter templates (n_units, n_steps, n_samples, n_channels), scale and shift them as `World` wants them."""
    padded = np.pad(raw, ((0, 0), (0, 0), (LEAD_ROWS, TROUGH_ROWS), (0, 0)))
    filtered = np.moveaxis(band(np.moveaxis(padded, 2, 0), RATE_HZ), 0, 2)
    templates = np.empty((*raw.shape[:2], TROUGH_ROWS, raw.shape[3]), np.float32)
    for own, unit in zip(templates, filtered, strict=True):
        still = unit[len(STEPS_UM) // 2]
        row, channel = np.unravel_index(still.argmin(), still.shape)
        own[:] = unit[:, row - LEAD_ROWS : row - LEAD_ROWS + TROUGH_ROWS] / -still[row, channel]
    return templates


def draw_noise(probe: Probe, band: Band) -> Floats:
    """Make noise as in `streamsort.simulate`, white before the filter and correlated over distance, of noise level 1."""
    rng = np.random.default_rng([HELD_OUT, 2])
    correlation = np.exp(-probe.distances_um() / NOISE_REACH_UM) + 1e-9 * np.eye(probe.n_channels)
    white = rng.standard_normal((round(NOISE_S * RATE_HZ), probe.n_channels), np.float32)
    noise = band(white @ np.linalg.cholesky(correlation).T.astype(np.float32), RATE_HZ)
    return noise / mad(noise)


def draw_spikes(world: World, seed: int, snr: tuple[float, float], drift_um: float, n_spikes: int, follow: bool) -> Spikes:
    """Draw spikes of every unit.

    Parameters
    ----------
    world : World
    seed : int
    snr : tuple of float
        Each unit's trough on its best channel over the noise level, mean over its displacements, is drawn from this range.
    drift_um : float
        Each spike is displaced by its own amount, uniform within half of this either way.
    n_spikes : int
        Of each unit.
    follow : bool
        Look for each spike's peak channel, as the live detector does, or take the unit's best one at displacement 0.
    """
    rng = np.random.default_rng([HELD_OUT, 3, seed])
    unit = np.repeat(np.arange(world.n_units), n_spikes)
    reached = np.abs(STEPS_UM) <= drift_um / 2
    depth = -world.templates[:, reached].min(axis=(2, 3)).mean(axis=1)
    size = (rng.uniform(*snr, world.n_units) / depth)[unit] * rng.normal(1.0, AMPLITUDE_JITTER, len(unit))
    step = np.rint(rng.uniform(-drift_um / 2, drift_um / 2, len(unit)) - STEPS_UM[0]).astype(np.int64)
    late = rng.uniform(0.0, 1.0, len(unit))
    start = rng.permuted(np.arange(len(unit)) % (len(world.noise) // TROUGH_ROWS)) * TROUGH_ROWS
    best = world.templates.min(axis=2).argmin(axis=2)
    home = best[unit, step] if follow else best[unit, len(STEPS_UM) // 2]
    near = world.probe.neighbors(_DETECT.radius_um) if follow else np.arange(world.probe.n_channels, dtype=np.int32)[:, None]
    parts = []
    for part in np.array_split(np.arange(len(unit)), -(-len(unit) // 256)):
        traces = _delayed(world.templates[unit[part], step[part]], late[part]) * size[part, None, None].astype(np.float32)
        traces += world.noise[start[part, None] + np.arange(TROUGH_ROWS)]
        parts.append(_cut(traces, near[home[part]], world.probe, RATE_HZ, LEAD_ROWS))
    snippets, noise_level = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return _spikes(snippets, noise_level, unit, RATE_HZ)


def _delayed(waves: Floats, late: NDArray[np.float64]) -> Floats:
    """Shift each (n, n_rows, n_channels) later by 0 to 1 samples, along cubics through four samples."""
    s = (1 - late)[:, None, None].astype(np.float32)
    weights = (-s * (s - 1) * (s - 2) / 6, (s + 1) * (s - 1) * (s - 2) / 2, -(s + 1) * s * (s - 2) / 2, (s + 1) * s * (s - 1) / 6)
    padded = np.pad(waves, ((0, 0), (2, 1), (0, 0)))
    shifted = np.zeros_like(waves)
    for k, weight in enumerate(weights):
        shifted += weight * padded[:, k : k + waves.shape[1]]
    return shifted


def _cut(
    traces: Floats, candidates: NDArray[np.int32], probe: Probe, rate_hz: float, trough_row: int
) -> tuple[Floats, NDArray[np.float32]]:
    """Cut each of (n, n_rows, n_channels) around its deepest value near `trough_row` on its candidate channels, -1 for none."""
    sweep = round(_DETECT.exclude_sweep_ms * rate_hz / 1e3)
    index = np.arange(len(traces))
    near = traces[index[:, None, None], np.arange(trough_row - sweep, trough_row + sweep + 1)[:, None], candidates[:, None]]
    near = np.where(candidates[:, None] >= 0, near, np.inf)
    row, column = np.unravel_index(near.reshape(len(near), -1).argmin(axis=1), near.shape[1:])
    channels = probe.neighbors(_SNIPPET.radius_um, _SNIPPET.n_neighbors)[candidates[index, column]]
    n_before, n_after = (round(ms * rate_hz / 1e3) for ms in (_SNIPPET.ms_before, max(LOOK_AHEAD_MS)))
    rows = (trough_row - sweep + row)[:, None] + np.arange(-n_before, n_after)
    noise_level = (channels >= 0).astype(np.float32)
    snippets: Floats = traces[index[:, None, None], rows[..., None], channels[:, None]] * noise_level[:, None]
    return snippets, noise_level


def _spikes(snippets: Floats, noise_level: Floats, unit: Ints, rate_hz: float) -> Spikes:
    n_before = round(_SNIPPET.ms_before * rate_hz / 1e3)
    detected = float((-snippets[:, n_before, 0] >= _DETECT.detect_threshold).mean())
    return Spikes(snippets, noise_level, unit, rate_hz, n_before, detected)


def mearec_spikes(file: Path, band: Band) -> Spikes:
    """Cut the true spikes of one of the MEArec tetrode recordings."""
    with np.load(file) as data:
        rate_hz, sample, unit = float(data["sampling_frequency"]), data["sample"], data["unit"]
        probe = Probe(data["positions"][:, :2], np.zeros(len(data["positions"]), np.int32))
        traces = band(data["traces"] * np.float32(data["gain_uV"]), rate_hz)
    traces /= mad(traces)
    reach = round(4e-3 * rate_hz)
    inside = (sample >= reach) & (sample < len(traces) - reach)
    rows = sample[inside, None] + np.arange(-reach, reach)
    candidates = np.tile(np.arange(probe.n_channels, dtype=np.int32), (len(rows), 1))
    delay = _delay_rows(band, rate_hz)
    return _spikes(*_cut(traces[rows], candidates, probe, rate_hz, reach + delay), unit[inside].astype(np.int64), rate_hz)


def _delay_rows(band: Band, rate_hz: float) -> int:
    """Measure by how much the filter shifts the trough of a short spike."""
    t_ms = np.arange(-5.0, 5.0, 1e3 / rate_hz)
    spike = 0.3 * np.exp(-(((t_ms - 0.4) / 0.3) ** 2)) - np.exp(-((t_ms / 0.15) ** 2))
    return int(band(spike, rate_hz).argmin() - spike.argmin())


def quiroga_spikes(file: Path) -> Spikes:
    """Take the cut single-channel spikes of known class, turned over and in noise units; zeros from 1.8 ms after the trough."""
    data, rate_hz, peak_row = loadmat(file), 24000.0, 19
    unit = data["spikes_labels"].ravel().astype(np.int64)
    spikes, unit = -data["spikes"][unit > 0].astype(np.float32), unit[unit > 0] - 1
    rest = spikes - np.stack([spikes[unit == k].mean(axis=0) for k in range(unit.max() + 1)])[unit]
    n_before = round(_SNIPPET.ms_before * rate_hz / 1e3)
    n_after = round(max(LOOK_AHEAD_MS) * rate_hz / 1e3)
    snippets = np.zeros((len(spikes), n_before + n_after, _SNIPPET.n_neighbors), np.float32)
    own = spikes[:, peak_row - n_before :] / mad(rest.reshape(-1, 1))
    snippets[:, : own.shape[1], 0] = own
    noise_level = np.zeros((len(spikes), _SNIPPET.n_neighbors), np.float32)
    noise_level[:, 0] = 1.0
    return _spikes(snippets, noise_level, unit, rate_hz)


@dataclass(frozen=True)
class Case:
    """Spikes still to be made, and what to call them in a table."""

    about: dict[str, Any]
    make: Callable[[], Spikes]


def worlds(data: Path | None, n_units: int, band: Band) -> Iterator[World]:
    """Make the simulated worlds, and the measured ones where the data are."""
    files = _there(data, FOOTPRINTS)
    for placement in ("anywhere", "together"):
        yield simulated_world(placement, n_units, band)
        for file in files:
            yield measured_world(placement, file, band)


def _there(data: Path | None, *names: str) -> list[Path]:
    """Return the files that exist; say which do not."""
    files = [data / name for name in names] if data else []
    for file in files:
        if not file.exists():
            print(f"{file}: not there, skipped", file=sys.stderr)
    return [file for file in files if file.exists()]


def footprint_case(world: World, n_spikes: int, snr: str, drift_um: float, peak: str = "live") -> Case:
    """Describe the spikes of one SNR bin and drift."""
    about = {"dataset": world.name, "placement": world.placement, "peak": peak, "snr": snr, "drift_um": drift_um}
    seed = list(SNR_BINS).index(snr)  # bins of one SNR differ in drift alone
    return Case(about, lambda: draw_spikes(world, seed, SNR_BINS[snr], drift_um, n_spikes, peak == "live"))


def footprint_cases(world: World, n_spikes: int, snrs: Sequence[str], drifts_um: Sequence[float]) -> Iterator[Case]:
    """List the bins of a world: with units anywhere all of them, else those of one SNR."""
    if world.placement == "anywhere":
        for peak, snr, drift_um in itertools.product(("live", "fixed"), snrs, drifts_um):
            yield footprint_case(world, n_spikes, snr, drift_um, peak)
    else:
        for drift_um in drifts_um:
            yield footprint_case(world, n_spikes, TYPICAL_SNR, drift_um)


def file_cases(data: Path | None, band: Band) -> Iterator[Case]:
    """List the data sets that come as they are."""
    for file in _there(data, *MEAREC):
        yield Case({"dataset": f"{file.parent.name} {file.stem.split('_')[1]}", "peak": "live"}, partial(mearec_spikes, file, band))
    for file in _there(data, *QUIROGA):
        yield Case({"dataset": f"{file.parent.name} {file.stem.split('_')[-1]}"}, partial(quiroga_spikes, file))
