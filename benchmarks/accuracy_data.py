"""Recordings to be accurate on: found below a folder, converted from other formats, or simulated.

A path or the name of a kind comes in, a `Case` goes out: a recording that `open_source` takes, its true spikes where they are
known, and the signal-to-noise ratio of each unit. What has to be written for that goes to a folder of the caller's.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.errors import StreamsortError
from streamsort.noise import mad
from streamsort.probe import Probe
from streamsort.score import load_truth
from streamsort.simulate import SimulationConfig, Truth, write_recording
from streamsort.sources import open_source

_TETRODE = SimulationConfig(probe_name="tetrode", n_units=6, snr=(3.0, 15.0), rates_hz=(2.0, 12.0))
_GRID = replace(_TETRODE, probe_name="grid32", n_units=15)
# Sharp: an amplitude is halved within 15 to 25 um, as measured with dense probes.
_SHARP = {
    "sharp64": replace(_TETRODE, probe_name="neuropixels64", n_units=24, half_um=(15.0, 25.0), drift_um=20.0),
    "sharp4": replace(_TETRODE, n_units=8, half_um=(15.0, 25.0), drift_um=15.0),
}
_HARD: dict[str, Any] = {"lfp_uv": 40.0, "far_units": 60, "bursting": 0.4, "artifacts_hz": 0.2}
KINDS = {
    "tetrode": _TETRODE,
    "grid32": _GRID,
    "hard4": replace(_TETRODE, **_HARD),
    "hard32": replace(_GRID, **_HARD),
    "pairs32": replace(_GRID, n_units=16, snr=(4.0, 15.0), pairs=0.3),
    "pauses32": replace(_GRID, pauses=(0.3, 0.45, 0.8)),  # of the recording's length, see `simulated`
    **{f"{name}-none": replace(config, drift_um=0.0) for name, config in _SHARP.items()},
    **{f"{name}-sine": config for name, config in _SHARP.items()},
    **{f"{name}-zigzag": replace(config, drift_kind="zigzag") for name, config in _SHARP.items()},
    **{f"{name}-step": replace(config, drift_kind="step") for name, config in _SHARP.items()},
}
_LOCUST_RATE_HZ, _LOCUST_CHANNELS = 15000.0, 4


@dataclass(frozen=True)
class Case:
    """A recording, its truth if there is one, and the SNR of each true unit by its label, NaN where nothing tells it."""

    name: str
    path: Path
    true: Truth | None
    snr: NDArray[np.float64]


def plan(
    recordings: Sequence[Path], below: Sequence[Path], kinds: Sequence[str], seconds: float, seed: int
) -> list[Callable[[Path], Case]]:
    """List what is to be sorted, each to be made in a folder of its own when its turn comes.

    Parameters
    ----------
    recordings : sequence of Path
        That `open_source` takes, with their truth in or beside them, or MEArec recordings in one .npz.
    below : sequence of Path
        Folders: all recordings in them and below, also those without truth.
    kinds : sequence of str
        Of `KINDS`, to be simulated, so many `seconds` of each.

    Raises
    ------
    StreamsortError
        If a recording of `recordings` has no truth, or in a folder of `below` there is none.
    """
    makers: list[Callable[[Path], Case]] = []
    for path in recordings:
        if path.suffix != ".npz" and _truth_of(path) is None:
            raise StreamsortError(f"recording {path}: no truth, expected truth/ or truth.npz in it or beside it")
        makers.append(partial(opened, path))
    for folder in below:
        found = [path for path in (folder, *sorted(folder.rglob("*"))) if _is_recording(path)]
        trials = sorted(folder.rglob("locust_trial_*.raw"))
        if not found and not trials:
            raise StreamsortError(f"folder {folder}: no recording below")
        makers += [partial(opened, path) for path in found]
        makers += [partial(locust, trials)] if trials else []
    return makers + [partial(simulated, kind, seconds, seed) for kind in kinds]


def _is_recording(path: Path) -> bool:
    if path.suffix == ".npz":
        with np.load(path) as file:
            return "traces" in file
    return all((path / name).exists() for name in ("meta.json", "traces.raw")) or (path / "binary.json").exists()


def opened(path: Path, scratch: Path) -> Case:
    """Take a recording from disk."""
    if path.suffix == ".npz":
        path = mearec(path, scratch / path.stem)
    name = path.parent.name if path.name == "recording" else path.name
    place = _truth_of(path)
    if place is None:
        return Case(name, path, None, np.zeros(0))
    true = load_truth(place)
    return Case(name, path, true, _snr_beside(place, int(true.unit_index.max(initial=-1)) + 1))


def _truth_of(recording: Path) -> Path | None:
    places = (folder / name for folder in (recording, recording.parent) for name in ("truth", "truth.npz"))
    return next((place for place in places if place.exists()), None)


def _snr_beside(truth: Path, n_units: int) -> NDArray[np.float64]:
    """Read the SNRs: in 300-6000 Hz from `snr_band` of an npz, else broad-band from what describes the recording."""
    if truth.suffix == ".npz":
        with np.load(truth) as file:
            if "snr_band" in file:
                return np.asarray(file["snr_band"], np.float64)
    for about in (truth.parent / name for name in ("simulation.json", "meta.json")):
        table = json.loads(about.read_text()) if about.exists() else {}
        for key in ("unit_snr_band", "unit_snr"):
            if key in table:
                return np.array(table[key], np.float64)
    return np.full(n_units, np.nan)


def simulated(kind: str, seconds: float, seed: int, scratch: Path) -> Case:
    """Write a recording of our own, with two periods of drift in it, or a step in its middle."""
    config = KINDS[kind]
    if config.pauses is not None:
        share, begin, end = config.pauses
        config = replace(config, pauses=(share, begin * seconds, end * seconds))
    period_s = seconds if config.drift_kind == "step" else seconds / 2
    write_recording(replace(config, seconds=seconds, seed=seed, drift_period_s=period_s), scratch / kind)
    return opened(scratch / kind / "recording", scratch)


def mearec(file: Path, folder: Path) -> Path:
    """Write a MEArec recording (traces, sample, unit, peak_uV, positions) as a folder with its truth; return the folder."""
    with np.load(file) as data:
        traces, gain_uv = data["traces"], float(data["gain_uV"])
        probe = Probe(data["positions"][:, :2], np.zeros(len(data["positions"]), np.int32))
        _write(folder, traces, probe, {"fs": float(data["sampling_frequency"]), "gain_uv": gain_uv})
        snr = data["peak_uV"] / np.median(mad(traces * np.float32(gain_uv)))
        np.savez(folder / "truth.npz", samples=data["sample"], labels=data["unit"], snr_band=snr)
    return folder


def locust(trials: Sequence[Path], scratch: Path) -> Case:
    """Join the trials of the locust tetrode (int16 counts without a gain, no truth) to one recording."""
    folder = scratch / "locust-tetrode"
    traces = np.concatenate([np.fromfile(trial, "<i2") for trial in trials]).reshape(-1, _LOCUST_CHANNELS)
    square = Probe(np.array([(0.0, 0.0), (50.0, 0.0), (0.0, 50.0), (50.0, 50.0)]), np.zeros(_LOCUST_CHANNELS, np.int32))
    offset_uv = (-traces.mean(axis=0)).tolist()
    _write(folder, traces, square, {"fs": _LOCUST_RATE_HZ, "gain_uv": 1.0, "offset_uv": offset_uv})
    return Case(folder.name, folder, None, np.zeros(0))


def _write(folder: Path, traces: NDArray[np.int16], probe: Probe, about: dict[str, Any]) -> None:
    folder.mkdir()
    traces.astype("<i2").tofile(folder / "traces.raw")
    probe.to_probeinterface(folder / "probe.json")
    (folder / "meta.json").write_text(json.dumps({"n_channels": traces.shape[1], "dtype": "int16", **about}))


def digest(path: Path) -> str:
    """Return the SHA-256 of a recording's samples, empty when they are not in one file."""
    files = sorted(path.glob("*.raw")) if path.is_dir() else [path]
    if len(files) != 1:
        return ""
    with files[0].open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mean_snippets(path: Path, sample_index: NDArray[Any], label: NDArray[Any], reach_ms: float = 1.0) -> NDArray[np.float64]:
    """Average a recording around spikes, unfiltered.

    Parameters
    ----------
    path : Path
    sample_index, label : ndarray, shape (n_spikes,)
        In order of time; labels are 0 or more.
    reach_ms : float
        How much before and after a spike.

    Returns
    -------
    snippets : ndarray, shape (n_labels, n_samples, n_channels)
        In uV, each channel's mean taken off; 0 for a label without spikes.
    """
    with open_source(str(path), chunk_ms=1000.0) as source:
        reach = round(reach_ms * source.info.sampling_frequency / 1e3)
        total = np.zeros((int(label.max(initial=-1)) + 1, 2 * reach, source.info.n_channels))
        for chunk in source:
            first, last = np.searchsorted(sample_index, [chunk.start_sample + reach, chunk.end_sample - reach])
            rows = sample_index[first:last, None] - chunk.start_sample + np.arange(-reach, reach)
            for one in np.unique(label[first:last]):
                total[one] += chunk.traces[rows[label[first:last] == one]].sum(axis=0, dtype=np.float64)
        total *= source.info.gain_uv
    mean: NDArray[np.float64] = total / np.maximum(np.bincount(label, minlength=len(total)), 1)[:, None, None]
    mean -= mean.mean(axis=1, keepdims=True)
    return mean
