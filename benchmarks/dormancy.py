"""Whether a unit that was silent for minutes returns under its id.

    python benchmarks/dormancy.py                                            50 simulated tetrodes, 600 s of silence each
    python benchmarks/dormancy.py --seeds 0:5 --drift-um 5 --probe grid32 --units 20

One simulated recording per seed goes through `Sorter` as it would arrive live, with nothing left out: calibration, a while with all
units, minutes in which some of them are silent while the others, noise and drift go on, and a while with all units again. A silent
unit has the id that most of its spikes carry between calibration and silence (`streamsort.identity` says which spikes carry one);
it is kept when nine tenths of those that carry one after the silence carry that id, and at least half as many are found as before.
Units that had no id before the silence, being found for less than half of their spikes, are counted apart: they cannot return.

`in silence` is the rate (Hz) at which others' spikes or noise are published under the ids of silent units; `born` counts the units
opened after calibration. A seed takes a core 20 to 25 s.
"""

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from report import publish
from rich.console import Console
from rich.progress import track

from streamsort.compare import Comparison, compare
from streamsort.config import EncodeConfig, SorterConfig
from streamsort.identity import carried
from streamsort.records import Output
from streamsort.simulate import PROBES, Truth, truth
from streamsort.sorter import Sorter
from streamsort.sources.sim import Simulation
from streamsort.trains import silences_of

COLUMNS = {
    "seed": "seed",
    "n_silent": "silent units",
    "n_known": "with an id",
    "n_kept": "kept it",
    "same_id": "same id after",
    "recall_before": "recall before",
    "recall_after": "recall after",
    "in_silence_hz": "in silence Hz",
    "n_revived": "told revived",
    "n_units": "units",
    "n_born": "born",
    "outcome": "outcome",
}
KNOWN, KEPT, RECALL = 0.5, 0.9, 0.5  # of its spikes, of those that carry an id, of the recall before


class Fate(NamedTuple):
    """What became of one silent unit; `unit_id` is -1 and the rest None or 0 when it had no id before."""

    unit_true: int
    unit_id: int
    same_id: float | None
    recall_before: float
    recall_after: float
    in_silence_hz: float

    @property
    def outcome(self) -> str:
        if self.unit_id < 0:
            return "not found"
        if self.recall_after < RECALL * self.recall_before:
            return "lost"
        return "kept" if (self.same_id or 0) >= KEPT else "other id"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    args = _parse(arguments)
    n_seeds = args.seeds[1] - args.seeds[0]
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        done = pool.map(measure, range(*args.seeds), [args] * n_seeds)
        seeds = list(track(done, "seeds", total=n_seeds, console=Console(stderr=True)))
    publish("units that return after silence", COLUMNS, [*seeds, total(seeds)], args)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure whether units return under their ids after minutes of silence.")
    parser.add_argument("--seeds", type=_span, default=(0, 50), metavar="FROM:TO", help="half-open (0:50)")
    parser.add_argument("--probe", choices=PROBES, default="tetrode")
    parser.add_argument("--units", type=int, default=5, help="(5)")
    parser.add_argument("--silent", type=float, default=0.4, help="share of units that fall silent (0.4)")
    parser.add_argument("--snr", type=float, nargs=2, default=(4.0, 9.0), help="(4 9)")
    parser.add_argument("--rates-hz", type=float, nargs=2, default=(1.0, 8.0), help="(1 8)")
    parser.add_argument("--drift-um", type=float, default=0.0, help="of a sine of 10 minutes (0)")
    parser.add_argument("--warmup-s", type=float, default=40.0, help="(40)")
    parser.add_argument("--silence-s", type=float, default=600.0, help="(600)")
    parser.add_argument("--around-s", type=float, default=30.0, help="before and after the silence (30)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (one for each core)")
    parser.add_argument("--json", metavar="FILE", help="where to write the results")
    return parser.parse_args(arguments)


def _span(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and int(low) < int(high)):
        raise argparse.ArgumentTypeError(f"{text!r}, expected FROM:TO")
    return int(low), int(high)


def measure(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Sort the recording of one seed and look at the units that were silent in it."""
    quiet_s = args.warmup_s + args.around_s, args.warmup_s + args.around_s + args.silence_s
    source = Simulation(
        f"seconds={quiet_s[1] + args.around_s},probe={args.probe},units={args.units},snr={args.snr[0]}:{args.snr[1]},"
        f"rates_hz={args.rates_hz[0]}:{args.rates_hz[1]},drift_um={args.drift_um},drift_period_s=600,"
        f"pauses={args.silent}:{quiet_s[0]}:{quiet_s[1]},seed={seed}",
        chunk_ms=250,
    )
    sorter = Sorter(SorterConfig(warmup_s=args.warmup_s, encode=EncodeConfig("light", "cpu")), source.info)
    outputs = list(chain.from_iterable(map(sorter.process, source)))
    events = [event for output in outputs for event in output.ledger]
    silent = [unit for unit, _, _ in silences_of(source.config)]
    fates = list(fates_of(silent, outputs, truth(source.config), source.info.sampling_frequency, (args.warmup_s, *quiet_s)))
    return {
        "seed": seed,
        **summary(fates),
        "n_revived": sum(event["event"] == "revived" for event in events),
        "n_units": len(sorter.units_table()),
        "n_born": sum(event["event"] == "born" and event["reason"] != "calibration" for event in events),
        "outcome": ", ".join(fate.outcome for fate in fates),
        "fates": [fate._asdict() for fate in fates],
        "events": events,
    }


def fates_of(
    silent: list[int], outputs: list[Output], true: Truth, sampling_frequency: float, borders_s: tuple[float, float, float]
) -> Iterator[Fate]:
    """Tell what became of the units that were silent; the borders are the ends of calibration, of all firing, and of silence."""
    spikes = np.concatenate([output.spikes for output in outputs])
    end_s = 1 + max(int(true.sample_index[-1]), int(spikes["sample_index"].max())) / sampling_frequency
    calibrated_s, from_s, to_s = borders_s
    before, after = (compare(spikes, true, sampling_frequency, *span) for span in ((calibrated_s, from_s), (to_s, end_s)))
    inside = (spikes["sample_index"] >= from_s * sampling_frequency) & (spikes["sample_index"] < to_s * sampling_frequency)
    for unit in silent:
        ids = _carried(before, unit)
        name = int(np.bincount(ids).argmax()) if len(ids) else -1
        recall = _recall(before, unit, name)
        if recall < KNOWN:
            yield Fate(unit, -1, None, recall, 0.0, 0.0)
            continue
        ids = _carried(after, unit)
        rate_hz = np.count_nonzero(inside & (spikes["unit_id"] == name)) / (to_s - from_s)
        yield Fate(unit, name, float((ids == name).mean()) if len(ids) else None, recall, _recall(after, unit, name), rate_hz)


def _carried(comparison: Comparison, unit: int) -> NDArray[np.int64]:
    """Return the ids that a true unit's spikes carry."""
    spike, found = carried(comparison)
    return comparison.found.labels[found[comparison.true.labels[comparison.true.unit[spike]] == unit]]


def _recall(comparison: Comparison, unit: int, unit_id: int) -> float:
    row, column = comparison.true.labels == unit, comparison.found.labels == unit_id
    return float(comparison.tp[np.ix_(row, column)].sum() / max(comparison.true.counts()[row].sum(), 1))


def summary(fates: list[Fate]) -> dict[str, Any]:
    """Count what became of units, and average over those that had an id."""
    known = [fate for fate in fates if fate.unit_id >= 0]
    means = {
        name: float(np.mean([getattr(fate, name) or 0.0 for fate in known])) if known else None
        for name in ("same_id", "recall_before", "recall_after", "in_silence_hz")
    }
    return {"n_silent": len(fates), "n_known": len(known), "n_kept": sum(fate.outcome == "kept" for fate in known), **means}


def total(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the seeds together in one row; a seed is good when all units that had an id kept it, and one had."""
    fates = [Fate(**fate) for row in seeds for fate in row["fates"]]
    good = sum(0 < row["n_known"] == row["n_kept"] for row in seeds)
    counts = {name: sum(row[name] for row in seeds) for name in ("n_revived", "n_units", "n_born")}
    return {"seed": "all", **summary(fates), **counts, "outcome": f"{good} of {len(seeds)} seeds"}


if __name__ == "__main__":
    main()
