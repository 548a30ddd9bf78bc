"""Recordings whose truth is known: neurons, spike trains, drift and noise from one seed.

In goes a `SimulationConfig`; out come int16 blocks of a second, always the same however they are consumed, and the spikes in them.
Each spike is evaluated where and when it falls, to an eighth of a sample and half a um, so memory does not grow with the recording.
The only state carried from block to block is that of the slow field potential's filter. Amplitudes and signal-to-noise ratios are
broad-band: trough over noise, unfiltered.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.signal import bilinear_zpk, sosfilt, zpk2sos

from streamsort.errors import StreamsortError
from streamsort.neurons import MS_AFTER, MS_BEFORE, Units, draw_units, log_uniform, sparse_template, templates_at
from streamsort.probe import Probe

__all__ = [
    "GAIN_UV",
    "Recording",
    "SimulationConfig",
    "Truth",
    "Units",
    "displacement_um",
    "draw_units",
    "named_probe",
    "simulate_recording",
    "simulated_blocks",
    "templates_at",
    "truth",
    "units_of",
    "write_recording",
]

GAIN_UV = 0.195  # uV per bit of the common headstages
N_SHIFTS = 8  # sub-sample positions of a trough
REFRACTORY_S = 0.003
BURST_CHANCE, BURST_DECAY = 0.4, 0.85  # of a short interval after a spike of a bursting unit; amplitude lost at each
DRIFT_STEP_UM = 0.5
LFP_RUN_IN_S = 2.0


class Truth(NamedTuple):
    """Which unit fired when: two arrays of (n_spikes,), in order of `sample_index`."""

    sample_index: NDArray[np.int64]
    unit_index: NDArray[np.int32]


@dataclass(frozen=True)
class SimulationConfig:
    """What to simulate.

    Examples
    --------
    >>> config = SimulationConfig(seconds=2, probe_name="tetrode", n_units=3, seed=1)
    >>> [block.shape for block in simulated_blocks(config)]
    [(30000, 4), (30000, 4)]
    >>> truth(config).sample_index[:3]
    array([ 3602,  6591, 13568])
    """

    seconds: float = 60.0
    probe_name: str = "grid32"  # see `named_probe`
    n_units: int = 20
    sampling_frequency: float = 30000.0
    snr: tuple[float, float] = (4.0, 15.0)  # trough on the best contact over noise_uv; units are spread evenly over this range
    rates_hz: tuple[float, float] = (1.0, 12.0)  # drawn log-uniformly
    noise_uv: float = 8.0  # white in time, correlated over contacts as exp(-distance / 25 um); without it snr is in uV
    lfp_uv: float = 0.0  # rms of a slow 1/f potential shared by neighbouring contacts
    drift_um: float = 0.0  # amplitude; the sources move by up to this along the probe, both ways
    drift_kind: Literal["sine", "zigzag", "step"] = "sine"
    drift_period_s: float = 120.0  # a step comes after half of it
    bursting: float = 0.0  # share of units that fire in bursts of falling amplitude
    amplitude_jitter: float = 0.05  # relative, from spike to spike
    silences: tuple[tuple[int, float, float], ...] = ()  # (unit_index, from_s, to_s): times without its spikes
    seed: int = 0

    def __post_init__(self) -> None:
        _require(0 < self.seconds < np.inf, "seconds", self.seconds, "a positive number")
        _require(self.n_units >= 0, "n_units", self.n_units, "0 or more")
        _require(self.sampling_frequency >= 5000, "sampling_frequency", self.sampling_frequency, "5000 Hz or more")
        for name in ("snr", "rates_hz"):
            low, high = getattr(self, name)
            _require(0 < low <= high, name, (low, high), "two positive numbers, the smaller first")
        _require(self.rates_hz[1] <= 100, "rates_hz", self.rates_hz, "at most 100 Hz")
        for name in ("noise_uv", "lfp_uv", "drift_um", "amplitude_jitter", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.drift_kind in ("sine", "zigzag", "step"), "drift_kind", self.drift_kind, "sine, zigzag or step")
        _require(self.drift_period_s > 0, "drift_period_s", self.drift_period_s, "a positive number of seconds")
        _require(0 <= self.bursting <= 1, "bursting", self.bursting, "0 to 1")
        for unit, from_s, to_s in self.silences:
            _require(
                0 <= unit < self.n_units and from_s < to_s, "silences", (unit, from_s, to_s), "(a unit_index, from_s, a later to_s)"
            )
        named_probe(self.probe_name)

    @property
    def probe(self) -> Probe:
        return named_probe(self.probe_name)

    @property
    def n_samples(self) -> int:
        return round(self.seconds * self.sampling_frequency)


@dataclass(frozen=True)
class Recording:
    """A simulated recording in memory; `traces` is (n_samples, n_channels) int16, times `GAIN_UV` for microvolts."""

    traces: NDArray[np.int16]
    config: SimulationConfig
    probe: Probe
    truth: Truth
    units: Units


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise StreamsortError(f"simulation: {name} = {value!r}, expected {expected}")


@functools.cache
def named_probe(name: str) -> Probe:
    """Make one of the probes linear32, grid32, tetrode, single, neuropixels128, neuropixels384.

    Raises
    ------
    StreamsortError
        If the name is another one.
    """
    if name == "linear32":
        return Probe.linear(32, pitch_um=20.0)
    if name == "grid32":  # three columns of 10, 12 and 10 contacts, the outer ones shifted by half a pitch
        sites = [(30.0 * x, 30.0 * k + (0 if x == 1 else 15)) for x in range(3) for k in range(12 if x == 1 else 10)]
        sites.sort(key=lambda site: (site[1], site[0]))
    elif name == "tetrode":
        sites = [(0.0, 0.0), (25.0, 0.0), (0.0, 25.0), (25.0, 25.0)]
    elif name == "single":
        sites = [(0.0, 0.0)]
    elif name in ("neuropixels128", "neuropixels384"):  # two sites a row, every other row shifted by half the pitch
        sites = [(32.0 * (k % 2) + 16 * (k // 2 % 2 == 0), 20.0 * (k // 2)) for k in range(int(name.removeprefix("neuropixels")))]
    else:
        expected = "linear32, grid32, tetrode, single, neuropixels128 or neuropixels384"
        raise StreamsortError(f"simulation: probe_name = {name!r}, expected {expected}")
    return Probe(np.array(sites), np.zeros(len(sites), np.int32))


def displacement_um(config: SimulationConfig, times_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tell how far (um, along y) the sources are from where they were drawn; the probe stands still."""
    phase = times_s / config.drift_period_s
    if config.drift_kind == "sine":
        return config.drift_um * np.sin(2 * np.pi * phase)
    if config.drift_kind == "zigzag":
        return config.drift_um * (1 - 4 * np.abs((phase + 0.25) % 1 - 0.5))
    return np.where(phase < 0.5, 0.0, config.drift_um)


@dataclass(frozen=True)
class _Spikes:
    """All spikes of a recording in order of time, with what the truth does not tell."""

    truth: Truth
    shift: NDArray[np.int8]  # eighths of a sample after sample_index
    amplitude: NDArray[np.float32]  # relative to the template


def _draw_spikes(config: SimulationConfig) -> _Spikes:
    rng = np.random.default_rng([config.seed, 1])
    rates_hz = log_uniform(rng, *config.rates_hz, config.n_units)
    bursts = rng.permutation(np.arange(config.n_units) < round(config.bursting * config.n_units))
    margin_s = np.array([MS_BEFORE, MS_AFTER]) / 1e3
    times, labels, amplitudes = [np.zeros(0)], [np.zeros(0, np.int32)], [np.zeros(0)]
    for unit in range(config.n_units):
        train_s, relative = _draw_train(rng, rates_hz[unit], config.seconds, BURST_CHANCE if bursts[unit] else 0.0)
        keep = (train_s >= margin_s[0]) & (train_s < config.seconds - margin_s[1])
        for silent, from_s, to_s in config.silences:
            keep &= (silent != unit) | (train_s < from_s) | (train_s >= to_s)
        times.append(train_s[keep])
        labels.append(np.full(keep.sum(), unit, np.int32))
        amplitudes.append((relative * rng.normal(1.0, config.amplitude_jitter, len(relative)))[keep])
    time_s, label = np.concatenate(times), np.concatenate(labels)
    order = np.lexsort((label, time_s))
    eighths = np.rint(time_s[order] * config.sampling_frequency * N_SHIFTS).astype(np.int64)
    sample_index = (eighths + N_SHIFTS // 2) // N_SHIFTS  # the nearest sample
    amplitude = np.concatenate(amplitudes)[order].clip(0.1).astype(np.float32)
    return _Spikes(Truth(sample_index, label[order]), (eighths - sample_index * N_SHIFTS).astype(np.int8), amplitude)


def _draw_train(
    rng: np.random.Generator, rate_hz: float, seconds: float, burst_chance: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw a refractory Poisson train; after each spike, with `burst_chance`, another follows within 3 to 8 ms, smaller."""
    short_s = 0.005
    pause_s = (1 / rate_hz - burst_chance * (REFRACTORY_S + short_s / 2)) / (1 - burst_chance) - REFRACTORY_S
    n = int(seconds * rate_hz + 15 * np.sqrt(seconds * rate_hz)) + 20  # more than can be needed
    in_burst = rng.random(n) < burst_chance
    intervals_s = REFRACTORY_S + np.where(in_burst, rng.uniform(0, short_s, n), rng.exponential(max(pause_s, 1e-4), n))
    index = np.arange(n)
    last_pause = np.maximum.accumulate(np.where(in_burst, 0, index))
    return np.cumsum(intervals_s), np.power(BURST_DECAY, index - last_pause)


def truth(config: SimulationConfig) -> Truth:
    """Tell which unit fires when in the recording of this config, without making it."""
    return _draw_spikes(config).truth


def units_of(config: SimulationConfig) -> Units:
    """Draw the units of the recording of this config."""
    return draw_units(config.n_units, config.probe, config.sampling_frequency, config.seed, config.snr, config.noise_uv or 1.0)


def simulated_blocks(config: SimulationConfig) -> Iterator[NDArray[np.int16]]:
    """Make the recording one second after the other.

    Yields
    ------
    traces : ndarray, shape (n_samples, n_channels), int16
        A second of samples (the last block may be shorter); times `GAIN_UV` for microvolts. The caller may keep or change it.
    """
    n_block = round(config.sampling_frequency)
    mixing = _noise_mixing(config.probe, config.noise_uv, reach_um=25.0)
    lfp = _field_potential(config, n_block)
    add_spikes = _spike_adder(config)
    for start in range(0, config.n_samples, n_block):
        n = min(n_block, config.n_samples - start)
        rng = np.random.default_rng([config.seed, 2, start // n_block])
        traces_uv = rng.standard_normal((n, config.probe.n_channels), np.float32) @ mixing
        if config.lfp_uv:
            traces_uv += next(lfp)[:n]
        add_spikes(traces_uv, start)
        yield np.rint(traces_uv / GAIN_UV).clip(-32768, 32767).astype(np.int16)


def _noise_mixing(probe: Probe, level_uv: float, reach_um: float) -> NDArray[np.float32]:
    """Make the matrix that turns independent columns into columns correlated over distance, each of rms `level_uv`."""
    correlation = np.exp(-probe.distances_um() / reach_um) + 1e-9 * np.eye(probe.n_channels)
    return (level_uv * np.linalg.cholesky(correlation).T).astype(np.float32)


def _field_potential(config: SimulationConfig, n_block: int) -> Iterator[NDArray[np.float32]]:
    """Yield blocks of a potential whose power falls as 1/f from 1 Hz to 100 Hz and steeply beyond."""
    poles, zeros = -2 * np.pi * np.array([1.0, 10.0, 100.0, 100.0]), -2 * np.pi * np.array([3.16, 31.6])
    rate = config.sampling_frequency
    sections = zpk2sos(*bilinear_zpk(zeros, poles, 1.0, rate))
    impulse = np.zeros(int(LFP_RUN_IN_S * rate))
    impulse[0] = 1.0
    sections[0, :3] /= np.sqrt(np.sum(sosfilt(sections, impulse) ** 2))
    mixing = _noise_mixing(config.probe, config.lfp_uv, reach_um=300.0)
    rng = np.random.default_rng([config.seed, 3])
    state = np.zeros((len(sections), 2, config.probe.n_channels))
    _, state = sosfilt(sections, rng.standard_normal((len(impulse), config.probe.n_channels)), axis=0, zi=state)
    while True:
        slow, state = sosfilt(sections, rng.standard_normal((n_block, config.probe.n_channels)), axis=0, zi=state)
        yield slow.astype(np.float32) @ mixing


def _spike_adder(config: SimulationConfig) -> Callable[[NDArray[np.float32], int], None]:
    """Make the function that adds, in place, all spikes that reach into a block starting at sample `start`."""
    units, spikes, contacts = units_of(config), _draw_spikes(config), config.probe.channel_locations
    sample_index, unit_index = spikes.truth
    moved = displacement_um(config, sample_index / config.sampling_frequency)
    steps = np.rint(moved / DRIFT_STEP_UM).astype(np.int64)

    @functools.lru_cache(maxsize=4096)
    def template(unit: int, step: int, shift: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        return sparse_template(units, unit, contacts, step * DRIFT_STEP_UM, shift / N_SHIFTS)

    def add_spikes(traces_uv: NDArray[np.float32], start: int) -> None:
        n = len(traces_uv)
        first, last = np.searchsorted(sample_index, [start - units.n_after + 1, start + n + units.n_before])
        for k in range(first, last):
            channels, wave = template(int(unit_index[k]), int(steps[k]), int(spikes.shift[k]))
            top = int(sample_index[k]) - units.n_before - start
            low, high = max(top, 0), min(top + len(wave), n)
            traces_uv[low:high, channels] += spikes.amplitude[k] * wave[low - top : high - top]

    return add_spikes


def simulate_recording(config: SimulationConfig) -> Recording:
    """Make a whole recording in memory; for long ones see `simulated_blocks` and `write_recording`.

    Examples
    --------
    >>> simulate_recording(SimulationConfig(seconds=0.5, probe_name="single", n_units=1)).traces.shape
    (15000, 1)
    """
    traces = np.concatenate(list(simulated_blocks(config)))
    return Recording(traces, config, config.probe, truth(config), units_of(config))


def write_recording(config: SimulationConfig, out_dir: str | Path, progress: Callable[[float], None] | None = None) -> None:
    """Write a recording and its truth as folders that SpikeInterface loads.

    `out_dir/recording` holds traces_cached_seg0.raw (int16, sample after sample), binary.json and probegroup.json;
    `out_dir/truth` holds spikes.npy and numpysorting_info.json; `out_dir/simulation.json` the config and the units' places;
    `out_dir/motion.npy`, only with drift, (n, 2) seconds and um.

    Parameters
    ----------
    config : SimulationConfig
    out_dir : path
        New, or an empty folder.
    progress : callable, optional
        Called after each second written with the fraction that is done.

    Raises
    ------
    StreamsortError
        If `out_dir` exists and is not empty.
    """
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StreamsortError(f"simulation: out_dir = {str(out)!r} exists, expected a new or empty folder")
    (out / "recording" / "properties").mkdir(parents=True)
    done = 0
    with open(out / "recording" / "traces_cached_seg0.raw", "wb") as file:
        for block in simulated_blocks(config):
            file.write(block.astype("<i2", copy=False).tobytes())
            done += len(block)
            if progress is not None:
                progress(done / config.n_samples)
    _describe_recording(config, out / "recording")
    _write_truth(config, out / "truth")
    places = units_of(config)
    about = {"config": asdict(config), "unit_positions_um": places.sources_um[:, 0].tolist(), "unit_snr": places.snr.tolist()}
    (out / "simulation.json").write_text(json.dumps(about, indent=1))
    if config.drift_um:
        times_s = np.arange(0.0, config.seconds + 0.1, 0.1)
        np.save(out / "motion.npy", np.column_stack([times_s, displacement_um(config, times_s)]))


def _describe_recording(config: SimulationConfig, folder: Path) -> None:
    n_channels = config.probe.n_channels
    layout = {
        "file_paths": ["traces_cached_seg0.raw"],
        "sampling_frequency": config.sampling_frequency,
        "t_starts": None,
        "num_channels": n_channels,
        "dtype": "<i2",
        "channel_ids": list(range(n_channels)),
        "time_axis": 0,
        "file_offset": 0,
        "gain_to_uV": [GAIN_UV] * n_channels,
        "offset_to_uV": [0.0] * n_channels,
        "is_filtered": False,
    }
    _dump(folder / "binary.json", "spikeinterface.core.binaryrecordingextractor.BinaryRecordingExtractor", layout)
    _dump(folder / "si_folder.json", "spikeinterface.core.binaryfolder.BinaryFolderRecording", {"folder_path": "."})
    np.save(folder / "properties" / "gain_to_uV.npy", np.full(n_channels, GAIN_UV))
    np.save(folder / "properties" / "offset_to_uV.npy", np.zeros(n_channels))
    np.save(folder / "properties" / "group.npy", config.probe.shanks.astype(np.int64))
    config.probe.to_probeinterface(folder / "probegroup.json")


def _write_truth(config: SimulationConfig, folder: Path) -> None:
    folder.mkdir()
    spikes = np.zeros(len(truth(config).sample_index), [("sample_index", "<i8"), ("unit_index", "<i8"), ("segment_index", "<i8")])
    spikes["sample_index"], spikes["unit_index"] = truth(config)
    np.save(folder / "spikes.npy", spikes)
    info = {"sampling_frequency": config.sampling_frequency, "unit_ids": list(range(config.n_units)), "num_segments": 1}
    (folder / "numpysorting_info.json").write_text(json.dumps(info))
    _dump(
        folder / "si_folder.json", "spikeinterface.core.sortingfolder.NumpyFolderSorting", {"folder_path": ".", "mmap_mode": None}
    )


def _dump(path: Path, extractor: str, kwargs: dict[str, Any]) -> None:
    """Write the description from which SpikeInterface (0.101 to 0.105) loads a folder."""
    about = {
        "class": extractor,
        "module": "spikeinterface",
        "version": "0.105.0",
        "kwargs": kwargs,
        "annotations": {},
        "properties": {},
    }
    path.write_text(json.dumps({**about, "relative_paths": True}, indent=1))
