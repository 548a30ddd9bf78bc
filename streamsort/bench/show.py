"""What is read of a report: its table, and two reports side by side.

Both are rows of text; where nothing was measured stands a dash.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streamsort.bench.figures import STAGES

_HEADS = ("p50", "p95", "p99", "p99.9", "max")
_ROWS = {
    "total": "trough to subscriber",
    "floor": "  floor",
    "compute": "  compute",
    "waiting": "  waiting",
    **{stage: f"    {stage}" for stage in STAGES},
    "unsorted": "unsorted spikes",
}
_LABEL, _CELL = 24, 9
_SLOPE_S = 60.0  # of memory, over less than this, is that of some buffers that fill


def table(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a report."""
    clean = report["clean"]
    yield _line("latency, ms", _HEADS)
    for name, label in _ROWS.items():
        yield _line(label, [_number(clean["latency_ms"][name][head]) for head in _HEADS])
    yield _line("empty loop of 1 ms", [_number(clean["empty_loop_ms"][head]) for head in _HEADS])
    yield ""
    yield from _facts(report)
    if report["faults"]:
        yield ""
        yield from _faults(report)


def _facts(report: Mapping[str, Any]) -> Iterator[str]:
    clean = report["clean"]
    after_s = report["catch_up_s"]
    caught_up = "NOT CAUGHT UP WITH, so latency grows," if after_s is None else f"caught up with {after_s:.1f} s"
    yield _fact("calibration", f"{report['n_units']} units, {caught_up} after a warm-up of {report['warmup_s']:g} s")
    yield _fact("measured", f"{clean['seconds']:.1f} s over {report['transport']}, {clean['spikes_per_s']:.0f} spikes/s")
    yield _fact("late", f"{clean['deadline_misses']} sorted spikes later than {report['deadline_ms']:g} ms")
    lost = f"{sum(clean['samples_lost'].values())} samples while measured, {report['spikes_lost']} spikes on their way"
    yield _fact(
        "lost", lost + (f"; {report['samples_unaccounted']} samples MISSING UNCOUNTED" if report["samples_unaccounted"] else "")
    )
    if clean["accuracy"] is not None:
        yield _fact("accuracy", _accuracy_words(clean["accuracy"]))
    if "cpu" in clean:
        busiest = ", ".join(f"{name} {share:.2f}" for name, share in list(clean["cpu_threads"].items())[:5] if share >= 5e-3)
        yield _fact("CPU", f"{clean['cpu']:.2f} cores ({busiest}); the player {_number(clean['cpu_player'])}")
        slope = f", {clean['rss_slope_mb_per_min']:+.1f} MB/min while measured" if clean["seconds"] >= _SLOPE_S else ""
        yield _fact("memory", f"{clean['rss_max_mb']:.0f} MB at most{slope}")
    yield _fact("encoder", f"{report['encoder']} on {report['provider']}")
    if report["headroom"] is not None:
        yield _fact("headroom", _headroom_words(report["headroom"]))


def _accuracy_words(accuracy: Mapping[str, Any]) -> str:
    return f"{accuracy['mean']:.3f} mean, {accuracy['units_found']} of {accuracy['units_true']} true units found"


def _headroom_words(headroom: Mapping[str, Any]) -> str:
    words = f"kept up at {headroom['kept_up_x']:g}x real time"
    behind = next((step for step in headroom["steps"] if not step["kept_up"]), None)
    if behind is None:
        return f"{words}, the fastest that was tried"
    if behind["sent_x"] < 0.9 * behind["speed"]:
        return f"{words}; at {behind['speed']:g}x the player sent no more than {behind['sent_x']:.1f}x"
    return f"{words}, fell behind at {behind['speed']:g}x; it sorted {headroom['sorted_x']:.1f}x at best"


_FAULT_HEADS = ("p50", "p99", "max", "late", "accuracy", "recovered s")


def _faults(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for the clean phase and two for each fault: figures, and what was injected and counted."""
    phases = (report["clean"] | {"name": "clean"}, *report["faults"])
    yield _line("under faults, ms", _FAULT_HEADS)
    for phase in phases:
        total, accuracy = phase["latency_ms"]["total"], phase["accuracy"]
        cells = [_number(total[head]) for head in ("p50", "p99", "max")] + [str(phase["deadline_misses"])]
        cells += ["-" if accuracy is None else f"{accuracy['mean']:.3f}"]
        recovered = phase.get("recovery_s")
        cells += [_number(recovered) if recovered is not None else "never" if "injected" in phase else "-"]
        fits = len(phase["name"]) < _LABEL
        if not fits:
            yield phase["name"]
        yield _line(phase["name"] if fits else "", cells)
        if "injected" in phase:
            yield f"  {_injected_words(phase)}"


def _injected_words(phase: Mapping[str, Any]) -> str:
    injected = [f"{n} {name.replace('_', ' ')}" for name, n in phase["injected"].items()]
    counted = [f"{n} samples of {kind}" for kind, n in phase["samples_lost"].items()] or ["nothing lost"]
    counted += [f"{n} in haste ({name.replace('_', ' ')})" for name, n in phase["samples_shed"].items()]
    agree = "" if phase["losses_counted"] else ", WHICH IS NOT THE SAME"
    return f"injected {', '.join(injected)}; the sorter counted {', '.join(counted)}{agree}"


_COMPARED = {
    **{f"{label.strip()} {head} ms": f"clean.latency_ms.{name}.{head}" for name, label in _ROWS.items() for head in ("p50", "p99")},
    "trough to subscriber p99.9 ms": "clean.latency_ms.total.p99.9",
    "trough to subscriber max ms": "clean.latency_ms.total.max",
    "empty loop p99 ms": "clean.empty_loop_ms.p99",
    "late": "clean.deadline_misses",
    "samples uncounted": "samples_unaccounted",
    "accuracy": "clean.accuracy.mean",
    "units": "n_units",
    "caught up after s": "catch_up_s",
    "spikes/s": "clean.spikes_per_s",
    "CPU cores": "clean.cpu",
    "memory MB": "clean.rss_max_mb",
    "kept up at x": "headroom.kept_up_x",
    "sorted x": "headroom.sorted_x",
}


def comparison(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that show two reports side by side, and the second over the first."""
    yield _line("", ("A", "B", "B / A"), 36)
    rows = [(label, _find(first, path), _find(second, path)) for label, path in _COMPARED.items()]
    named = {phase["name"]: phase for phase in second["faults"]}
    for phase in first["faults"]:
        if other := named.get(phase["name"]):
            for label, path in (("p99 ms", "latency_ms.total.p99"), ("accuracy", "accuracy.mean"), ("recovered s", "recovery_s")):
                rows.append((f"{phase['name']} {label}", _find(phase, path), _find(other, path)))
    for label, a, b in rows:
        if a is not None or b is not None:
            ratio = f"{b / a:.2f}" if a and b is not None else "-"
            yield _line(label, (_number(a), _number(b), ratio), 36)


def _find(report: Mapping[str, Any], path: str) -> float | None:
    """Follow names with dots between them, the longest that fits first (`p99.9` is one)."""
    found: Any = report
    names = path.split(".")
    while names and isinstance(found, Mapping):
        key = ".".join(names) if ".".join(names) in found else names[0]
        found, names = found.get(key), names[key.count(".") + 1 :]
    return None if names else found


def _line(label: str, cells: Sequence[str], label_width: int = _LABEL) -> str:
    return f"{label:<{label_width}}" + "".join(f"{cell:>{max(_CELL, len(cell) + 2)}}" for cell in cells)


def _fact(label: str, value: str) -> str:
    return f"{label:<{_LABEL}}{value}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
