"""What is said at the end of a run: the same figures as a table for people, or as JSON."""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from streamsort.sorter import Sorter

_PERCENTILES = ("p50", "p95", "p99", "max")


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Print labels and values, aligned, on stdout."""
    width = max(len(label) for label, _ in rows) + 2
    for label, value in rows:
        print(f"{label:<{width}}{value}")


def spread_words(latency: Mapping[str, float], names: Sequence[str] = _PERCENTILES) -> str:
    """Write percentiles in ms, those that are there."""
    return "  ".join(f"{name} {latency[name]:.1f}" for name in names if name in latency) + " ms"


def lost_samples(status: Mapping[str, Any]) -> int:
    """Count samples that never reached the sorter; those that came but were not usable are not among them."""
    return sum(status["samples_lost"].get(kind, 0) for kind in ("gap", "overrun"))


def figures_of(status: Mapping[str, Any], sorter: Sorter, args: argparse.Namespace, wall_s: float) -> dict[str, Any]:
    return {
        "source": args.source,
        "seconds": status["samples_acquired"] / sorter.info.sampling_frequency,
        "wall_s": wall_s,
        "calibrated": sorter.calibrated,
        "n_units": len(sorter.units_table()),
        "spikes": status["spikes"],
        "unsorted": status["unsorted"],
        "late": status["late"],
        "samples_acquired": status["samples_acquired"],
        "samples_lost": lost_samples(status),
        "samples_unusable": {kind: n for kind, n in status["samples_lost"].items() if kind not in ("gap", "overrun")},
        "samples_shed": status["samples_shed"],
        "source_trouble": status["source"],
        "outputs_dropped": status["outputs_dropped"],
        "sink_errors": status["sink_errors"],
        "floor_ms": status["floor_ms"],
        "latency_ms": status["latency_ms"].get("total", {"n": 0}),
        "stages_ms": status["latency_ms"],
        "encoder": sorter.encoder.name,
        "encoder_choice": sorter.encoder_choice.reason,
        "provider": sorter.encoder.provider,
        "session": args.session,
    }


def print_summary(status: Mapping[str, Any], sorter: Sorter, args: argparse.Namespace, wall_s: float) -> None:
    """Print what a run came to, on stdout."""
    figures = figures_of(status, sorter, args, wall_s)
    if args.json:
        print(json.dumps(figures, indent=1))
        return
    pace = "" if status["live"] else f" in {wall_s:.1f} s, {figures['seconds'] / max(wall_s, 1e-3):.1f} x real time"
    rows = [
        ("sorted", f"{figures['seconds']:.1f} s of {sorter.info.n_channels} channels{pace}"),
        (
            "units",
            str(figures["n_units"]) if sorter.calibrated else f"none: stopped at {100 * sorter.progress:.0f} % of calibration",
        ),
        ("spikes", f"{figures['spikes']}, {figures['unsorted']} of them unsorted"),
        ("lost", f"{figures['samples_lost']} samples"),
    ]
    for kind, n in figures["samples_unusable"].items():
        rows.append((kind, f"{n} samples"))
    if shed := figures["samples_shed"]:
        parts = (f"{n / sorter.info.sampling_frequency:.1f} s {name.replace('_', ' ')}" for name, n in shed.items())
        rows.append(("in haste", ", ".join(parts)))
    if trouble := {name: n for name, n in status["source"].items() if n}:
        rows.append(("source", ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in trouble.items())))
    if figures["latency_ms"]["n"]:
        rows.append(("latency", f"{spread_words(figures['latency_ms'])}, trough to published"))
        rows.append(("floor", f"{figures['floor_ms']:.1f} ms, the look-ahead"))
    if figures["outputs_dropped"] or figures["sink_errors"]:
        rows.append(("sinks", f"{figures['outputs_dropped']} outputs dropped, {figures['sink_errors']} errors"))
    rows.append(("encoder", f"{figures['encoder']} on {figures['provider']}"))
    rows.append(("", figures["encoder_choice"]))
    if args.session is not None:
        rows.append(("session", str(args.session)))
    print_rows(rows)
