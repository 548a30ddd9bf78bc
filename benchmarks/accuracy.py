"""How well spikes and units agree with a known truth.

    python benchmarks/accuracy.py                                        two recordings of its own: tetrode and grid32
    python benchmarks/accuracy.py RECORDING ... --peers results.json     any that `open_source` takes, with their truth beside

Each recording goes once, forwards, through `Sorter` as it would arrive live: the first third is calibration, and each spike of the
rest counts with the unit id it was emitted with. Scored is the rest, by `streamsort.score` (0.4 ms, one match of units over the
whole span), which agrees with SpikeInterface's comparison. The truth is the folder `truth/` (SpikeInterface) or `truth.npz`, in the
recording or beside it; with SNRs known (`snr_band` in the npz, in 300-6000 Hz; or `simulation.json`, broad-band) accuracy is split
by them. Rivals' rows are copied from a file of results, not run here; `same data` says whether the file was made from these very
samples.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import publish

from streamsort.config import SorterConfig
from streamsort.errors import StreamsortError
from streamsort.records import SPIKE_DTYPE
from streamsort.score import load_truth, score
from streamsort.simulate import SimulationConfig, Truth, write_recording
from streamsort.sorter import Sorter
from streamsort.sources import open_source

SNR_BINS = ((3.0, 5.0), (5.0, 8.0), (8.0, 15.0))
COLUMNS = {
    "recording": "recording",
    "sorter": "sorter",
    "same_data": "same data",
    "n_units_true": "true units",
    "n_units_found": "found",
    "accuracy_mean": "accuracy mean",
    "accuracy_median": "median",
    "precision_mean": "precision",
    "recall_mean": "recall",
    "id_stability_mean": "same id",
    **{f"snr_{low:g}-{high:g}": f"SNR {low:g}-{high:g}" for low, high in SNR_BINS},
    "x_real_time": "x real time",
}
OWN = ("tetrode", "grid32")


def main(arguments: list[str] | None = None) -> None:
    """Sort, score, print and write."""
    args = _parse(arguments)
    with tempfile.TemporaryDirectory(prefix="streamsort-accuracy-") as folder:
        recordings = args.recordings or [simulated(Path(folder), probe, args) for probe in OWN]
        peers = json.loads(Path(args.peers).read_text())["runs"] if args.peers else {}
        results = []
        for recording in map(Path, recordings):
            results.append(measure(recording, args))
            results += peer_rows(recording, peers)
    publish("accuracy after calibration", COLUMNS, results, args)
    if args.windows:
        for row in results:
            if "windows" in row:
                print(f"{row['recording']}: accuracy by 10 s", *(f"{value:.2f}" for value in row["windows"]))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how well spikes and units agree with a known truth.")
    parser.add_argument("recordings", nargs="*", metavar="RECORDING", help="with truth beside; by default two are simulated")
    parser.add_argument("--warmup", type=float, default=1 / 3, metavar="SHARE", help="of the recording for calibration (a third)")
    parser.add_argument("--config", metavar="FILE", help="TOML of the sorter; its warmup_s is not used")
    parser.add_argument("--encoder", metavar="WHICH", help="auto, full, light or an .onnx (as in the config)")
    parser.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="auto", help="of the encoder (auto)")
    parser.add_argument("--chunk-ms", type=float, default=10.0, help="makes no difference to the result (10)")
    parser.add_argument("--seconds", type=float, default=90.0, help="of the simulated recordings (90)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated recordings (0)")
    parser.add_argument("--windows", action="store_true", help="also accuracy in consecutive 10-s windows of what is scored")
    parser.add_argument("--peers", metavar="FILE", help="results of other sorters, to print beside")
    parser.add_argument("--json", metavar="FILE", help="where to write the results")
    return parser.parse_args(arguments)


def simulated(folder: Path, probe_name: str, args: argparse.Namespace) -> Path:
    """Write a recording of our own; 6 units on a tetrode, 15 on 32 contacts, SNR 3 to 15."""
    n_units = 6 if probe_name == "tetrode" else 15
    config = SimulationConfig(
        seconds=args.seconds, probe_name=probe_name, n_units=n_units, snr=(3.0, 15.0), rates_hz=(2.0, 12.0), seed=args.seed
    )
    write_recording(config, folder / probe_name)
    return folder / probe_name / "recording"


def measure(recording: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Sort one recording and compare it with its truth."""
    true, snr = truth_of(recording)
    config = SorterConfig.from_toml(args.config) if args.config else SorterConfig()
    encode = dataclasses.replace(config.encode, encoder=args.encoder or config.encode.encoder, provider=args.provider)
    config = dataclasses.replace(config, encode=encode)
    with open_source(str(recording), chunk_ms=args.chunk_ms) as source:
        rate = source.info.sampling_frequency
        seconds = source.n_samples / rate  # type: ignore[attr-defined]
        warmup_s = args.warmup * seconds
        sorter = Sorter(dataclasses.replace(config, warmup_s=warmup_s), source.info)
        sorter.warmup()
        began = time.perf_counter()
        outputs = itertools.chain.from_iterable(map(sorter.process, source))
        spikes = np.concatenate([np.zeros(0, SPIKE_DTYPE), *(output.spikes for output in outputs)])
        pace = seconds / (time.perf_counter() - began)
    result = score(spikes, true, rate, warmup_s, seconds)
    row = {
        "recording": name_of(recording),
        "sorter": "streamsort",
        **result.to_dict(),
        **by_snr(np.array([unit.accuracy for unit in result.units]), snr[[unit.unit_true for unit in result.units]]),
        "seconds": seconds,
        "warmup_s": warmup_s,
        "encoder": sorter.encoder.name,
        "provider": sorter.encoder.provider,
        "x_real_time": pace,
    }
    if args.windows:
        edges = np.arange(warmup_s, seconds - 5.0, 10.0)
        row["windows"] = [windowed(spikes, true, result.units, rate, start, start + 10.0) for start in edges]
    return row


def windowed(spikes: NDArray[Any], true: Truth, units: Any, rate: float, from_s: float, to_s: float) -> float:
    """Mean accuracy of a window, units matched as they were over the whole span: an id that changed does not count."""
    partner = {unit.unit_true: unit.unit_id for unit in units if unit.tp}
    accuracies = []
    for unit in units:
        own = Truth(true.sample_index[true.unit_index == unit.unit_true], true.unit_index[true.unit_index == unit.unit_true])
        found = spikes[spikes["unit_id"] == partner.get(unit.unit_true, -2)]
        result = score(found, own, rate, from_s, to_s)
        accuracies += [result.units[0].accuracy] if result.units else []  # it may not fire in a window
    return float(np.mean(accuracies)) if accuracies else 0.0


def by_snr(accuracy: NDArray[np.float64], snr: NDArray[np.float64]) -> dict[str, float]:
    """Split the mean accuracy by SNR; empty bins are left out."""
    bins = {}
    for low, high in SNR_BINS:
        within = (snr >= low) & ((snr < high) | (snr == SNR_BINS[-1][1]) & (high == SNR_BINS[-1][1]))
        if within.any():
            bins[f"snr_{low:g}-{high:g}"] = float(accuracy[within].mean())
    return bins


def truth_of(recording: Path) -> tuple[Truth, NDArray[np.float64]]:
    """Find the truth in or beside a recording; SNRs are NaN where nothing tells them."""
    places = [folder / name for folder in (recording, recording.parent) for name in ("truth", "truth.npz")]
    place = next((place for place in places if place.exists()), None)
    if place is None:
        raise StreamsortError(f"recording {recording}: no truth, expected truth/ or truth.npz in it or beside it")
    true = load_truth(place)
    about = place.parent / "simulation.json"
    snr = np.full(int(true.unit_index.max(initial=-1)) + 1, np.nan)
    if place.suffix == ".npz":
        with np.load(place) as file:
            snr = file.get("snr_band", snr)
    elif about.exists():
        snr = np.array(json.loads(about.read_text())["unit_snr"])
    return true, snr


def name_of(recording: Path) -> str:
    return recording.parent.name if recording.name == "recording" else recording.name


def peer_rows(recording: Path, peers: dict[str, Any]) -> list[dict[str, Any]]:
    """Take other sorters' figures for the recording of this name, best first; those of the scored span, the last two thirds."""
    digest = ""
    if peers and (recording / "traces.raw").exists():
        with (recording / "traces.raw").open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    rows = []
    for run in peers.values():
        if run["recording"] == name_of(recording) and "late" in run and run["sorter"] != "truth":
            late = run["late"]
            rows.append(
                {
                    "recording": run["recording"],
                    "sorter": run["sorter"],
                    "same_data": "yes" if digest.startswith(run.get("data_sha256", "?")) else "another seed",
                    "n_units_true": late["units_gt"],
                    "n_units_found": late["units_found"],
                    "accuracy_mean": late["accuracy_mean"],
                    "accuracy_median": late["accuracy_median"],
                    "precision_mean": late["precision_mean_matched"],
                    "recall_mean": late["recall_mean"],
                    **{f"snr_{name}": value for name, value in late["accuracy_by_snr"].items()},
                }
            )
    return sorted(rows, key=lambda row: -row["accuracy_mean"])


if __name__ == "__main__":
    main()
