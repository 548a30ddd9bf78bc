"""How well spikes and units agree with a known truth, whether ids last, and what it costs.

    python benchmarks/accuracy.py                                        two recordings of its own: tetrode and grid32
    python benchmarks/accuracy.py RECORDING ... --peers results.json     any that `open_source` takes, with their truth beside
    python benchmarks/accuracy.py --peerdata DIR --generate hard32 sharp64-sine --features light pca --plot accuracy.png

Each recording goes once, forwards, through `Sorter` as it would arrive live: the first third is calibration, and each spike of the
rest counts with the unit id it was emitted with. Scored is the rest, by `streamsort.score` (0.4 ms, one match of units over the
whole span), which agrees with SpikeInterface's comparison, false and redundant units included. The truth is the folder `truth/`
(SpikeInterface) or `truth.npz`, in the recording or beside it; where SNRs are known (in 300-6000 Hz as `snr_band` in the npz or
`unit_snr_band` in `simulation.json`; broad-band as `unit_snr` in `meta.json`) figures are split by them. Of a recording without
truth, found by `--peerdata`, the refractory violations are shown.

The second table says whether ids last (`streamsort.identity`): `same id`, and for units of SNR 6 or more `purity` (mean and worst
unit) and `switches` (sum). `ECE` is the expected calibration error of the confidence, `stable AUC` how well the published state
marks the units with accuracy of 0.8 or more (`streamsort.trust`), which below the table is also told of the units of all recordings
together; `pairs` is the share of pairs of true spikes, of different units of SNR 6 or more with main channels within 100 um, of
which both were found; `CPU s/s` is processor time per second of recording.

Rivals' rows are copied from a file of results, not run here. `same data` says whether they were made from these very samples, and
scored on the same seconds; `unknown` when the file does not tell.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accuracy_data import KINDS, Case, digest, plan
from accuracy_sort import GOOD_ACCURACY, OVERLAPS_MS, SNR_BINS, scores, sort_case, stable_auc, violations
from report import publish

from streamsort.errors import StreamsortError

THIRD = 1 / 3  # the share of a recording that rivals' scores leave out
PACKAGES = {"ms5_initial": "mountainsort5"}  # of rivals that are not called like one
ABOUT = {"recording": "recording", "sorter": "sorter"}
ACCURACY = {
    **ABOUT,
    "same_data": "same data",
    "n_units_true": "true",
    "n_units_found": "found",
    "n_units_false": "false",
    "n_units_redundant": "redund.",
    "accuracy_mean": "accuracy",
    "accuracy_median": "median",
    "precision_mean": "precis.",
    "recall_mean": "recall",
    **{f"snr_{name}": f"SNR {name}" for name in SNR_BINS},
}
TRUST = {
    **ABOUT,
    "id_stability_mean": "same id",
    "id_purity_clear": "purity",
    "id_purity_clear_min": "worst",
    "id_switches_clear": "switches",
    "calibration_error": "ECE",
    "stable_auc": "stable AUC",
    **{f"pairs_{ms:g}ms_clear": f"pairs {ms:g} ms" for ms in OVERLAPS_MS},
    "cpu_s_per_s": "CPU s/s",
    "x_real_time": "x real time",
}
UNKNOWN_TRUTH = {
    **ABOUT,
    "seconds": "seconds",
    "n_units_published": "units",
    "n_spikes_published": "spikes",
    "sorted_share": "sorted",
    "isi_violations_mean": "ISI < 1.5 ms, mean",
    "isi_violations_max": "worst unit",
    "cpu_s_per_s": "CPU s/s",
    "x_real_time": "x real time",
}


def main(arguments: list[str] | None = None) -> None:
    """Sort, score, print, write and plot."""
    args = _parse(arguments)
    peers = json.loads(Path(args.peers).read_text()) if args.peers else {"runs": {}}
    rows: list[dict[str, Any]] = []
    pictures = []
    try:
        for make in plan(args.recordings, args.peerdata, args.generate, args.seconds, args.seed):
            with tempfile.TemporaryDirectory(prefix="streamsort-accuracy-") as scratch:
                case = make(Path(scratch))
                for feature in args.features or [None]:
                    row, picture = measure(case, feature, args)
                    rows.append(row)
                    pictures += [picture] if picture is not None else []
                rows += peer_rows(case, peers, args.warmup)
    except StreamsortError as error:
        sys.exit(f"benchmarks/accuracy.py: {error}")
    publish_all(rows, peers.get("versions", {}), args)
    if args.plot:
        from accuracy_plot import plot

        plot(rows, pictures, Path(args.plot))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure how well spikes and units agree with a known truth, and whether ids last."
    )
    parser.add_argument("recordings", nargs="*", type=Path, metavar="RECORDING", help="with truth beside, or a MEArec .npz")
    parser.add_argument("--peerdata", nargs="+", type=Path, default=[], metavar="DIR", help="take all recordings below")
    parser.add_argument("--generate", nargs="+", choices=KINDS, default=[], metavar="KIND", help=f"simulate: {', '.join(KINDS)}")
    parser.add_argument("--seconds", type=float, default=120.0, help="of the simulated recordings (120)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated recordings (0)")
    parser.add_argument("--warmup", type=float, default=THIRD, metavar="SHARE", help="of the recording for calibration (a third)")
    parser.add_argument("--config", metavar="FILE", help="TOML of the sorter; its warmup_s is not used")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--encoder", metavar="WHICH", help="auto, full, light or an .onnx (as in the config)")
    which.add_argument("--features", nargs="+", choices=("light", "full", "pca"), help="what spikes are described by, one run each")
    parser.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="auto", help="of the encoder (auto)")
    parser.add_argument("--chunk-ms", type=float, default=10.0, help="makes no difference to the result (10)")
    parser.add_argument("--windows", action="store_true", help="also print accuracy in consecutive 10-s windows of what is scored")
    parser.add_argument("--peers", metavar="FILE", help="results of other sorters, to print beside")
    parser.add_argument("--json", metavar="FILE", help="where to write the results")
    parser.add_argument("--plot", metavar="FILE", help="where to draw them (PNG)")
    args = parser.parse_args(arguments)
    if not (args.recordings or args.peerdata or args.generate):
        args.generate = ["tetrode", "grid32"]
    return args


def measure(case: Case, feature: str | None, args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Sort one recording and judge the outcome; where there is no truth, also return what there is to draw."""
    result = sort_case(case, feature, args)
    row = {
        "recording": case.name,
        "sorter": f"streamsort {feature or ''}".strip(),
        **violations(result),
        "seconds": result.seconds,
        "warmup_s": result.warmup_s,
        "encoder": result.encoder,
        "provider": result.provider,
        "cpu_s_per_s": result.cpu_s / result.seconds,
        "x_real_time": result.seconds / result.wall_s,
    }
    if case.true is not None:
        return row | scores(result), None
    if not args.plot:
        return row, None
    from accuracy_plot import Picture

    return row, Picture.of(result)


def peer_rows(case: Case, peers: dict[str, Any], warmup: float) -> list[dict[str, Any]]:
    """Take other sorters' figures for the recording of this name, best first; those of the scored span, the last two thirds."""
    runs = [run for run in peers["runs"].values() if run["recording"] == case.name and "late" in run and run["sorter"] != "truth"]
    found = digest(case.path) if runs else ""
    rows = []
    for run in runs:
        late = run["late"]
        row = {
            "recording": run["recording"],
            "sorter": run["sorter"],
            "version": _version(run["sorter"], peers.get("versions", {})),
            "same_data": _same_data(found, run.get("data_sha256", ""), warmup),
            "n_units_true": late["units_gt"],
            "n_units_found": late["units_found"],
            "n_units_false": late.get("false_positive"),
            "n_units_redundant": late.get("redundant"),
            "accuracy_mean": late["accuracy_mean"],
            "accuracy_median": late["accuracy_median"],
            "precision_mean": late["precision_mean_matched"],
            "recall_mean": late["recall_mean"],
            **{f"snr_{name.replace('8-15', '8+')}": value for name, value in late["accuracy_by_snr"].items()},
        }
        for one in run.get("runs", [])[-1:]:
            row |= {"cpu_s_per_s": one["cpu_s"] / run["duration_s"], "x_real_time": run["duration_s"] / one["wall_s"]}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["accuracy_mean"])


def _same_data(found: str, theirs: str, warmup: float) -> str:
    """Compare digests, of which theirs may be shortened."""
    if not found or not theirs:
        return "unknown"
    if not found.startswith(theirs):
        return "no"
    return "yes" if abs(warmup - THIRD) < 0.01 else "other seconds"


def _version(sorter: str, versions: Mapping[str, Any]) -> str | None:
    """Name the package a rival comes from: one with its name, or SpikeInterface, of which several are part."""
    package = next((name for name in versions if sorter.startswith(name)), PACKAGES.get(sorter, "spikeinterface"))
    return f"{package} {versions[package]}" if versions.get(package) else None


def publish_all(rows: list[dict[str, Any]], versions: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Print up to three tables, and write one file."""
    known = [row for row in rows if "accuracy_mean" in row]
    blind = [row for row in rows if "accuracy_mean" not in row]
    title, plain = "accuracy after calibration", argparse.Namespace(json=None)
    publish(title, ACCURACY, known, args, without_truth=blind, versions_of_peers=versions)
    if known:
        publish("whether ids last, trust and cost", TRUST, known, plain)
        units = [unit for row in known for unit in row.get("units_judged", ())]
        n_bad = sum(unit["accuracy"] < GOOD_ACCURACY for unit in units)
        auc = stable_auc(units) if units else None
        print(f"stable AUC of all {len(units)} units, {n_bad} of them bad: {'-' if auc is None else f'{auc:.2f}'}")
    if peers := dict.fromkeys(row["version"] for row in known if row.get("version")):
        print("rivals:", ", ".join(peers))
    if blind:
        publish("without truth", UNKNOWN_TRUTH, blind, plain)
    for row in known if args.windows else []:
        if "windows" in row:
            values = ("-" if value is None else f"{value:.2f}" for value in row["windows"])
            print(f"{row['recording']}, {row['sorter']}: accuracy by 10 s", *values)


if __name__ == "__main__":
    main()
