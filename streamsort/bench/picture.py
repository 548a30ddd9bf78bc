"""A picture of a benchmark: latency over time with its phases, what it is made of, and who used the processor."""

from typing import Any

from streamsort.bench import figures
from streamsort.bench.conduct import Notes
from streamsort.bench.figures import STAGES
from streamsort.report import FAINT, INK, PALE, STYLE, figure_class

_PARTS = {"floor": "#c9ced8", "compute": "#4b6bb5", "waiting": "#d9824b"}
_SHOWN_THREADS, _LEAST_ROWS = 8, 3


def check() -> None:
    """Raise what says what to install, if there is no matplotlib."""
    figure_class("--picture")


def draw(report: dict[str, Any], notes: Notes, path: str) -> None:
    """Write the picture as a PNG."""
    make = figure_class("--picture")
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = make(figsize=(14, 8), facecolor="white")
        grid = figure.add_gridspec(2, 3, left=0.06, right=0.98, top=0.86, bottom=0.08, hspace=0.38, wspace=0.32)
        figure.text(0.06, 0.95, f"streamsort bench {report['source']}", fontsize=14, weight="bold")
        _draw_time(figure.add_subplot(grid[0, :]), report, notes)
        _draw_parts(figure.add_subplot(grid[1, 0]), report)
        _draw_stages(figure.add_subplot(grid[1, 1]), report)
        _draw_threads(figure.add_subplot(grid[1, 2]), report)
        figure.savefig(path, dpi=110)


def _draw_time(axes: Any, report: dict[str, Any], notes: Notes) -> None:
    """Draw each sorted spike, and shade the phases with faults."""
    from matplotlib.ticker import LogLocator

    rate, first = report["rate_hz"], notes.clean["from_sample"]
    arrived = notes.arrivals[figures.is_sorted(notes.arrivals) & (notes.arrivals["sample_index"] >= first)]
    last = notes.faulted[-1]["until_sample"] if notes.faulted else notes.clean["to_sample"]
    arrived = arrived[arrived["sample_index"] < last]
    axes.plot(
        (arrived["sample_index"] - first) / rate, 1e3 * figures.latency_s(arrived), ".", ms=2, color=_PARTS["compute"], alpha=0.5
    )
    for phase in notes.faulted:
        start_s, end_s = ((phase[name] - first) / rate for name in ("from_sample", "to_sample"))
        axes.axvspan(start_s, end_s, color=PALE, zorder=0)
        name = phase["name"].replace(",", "\n")
        axes.text(start_s, 0.98, name, transform=axes.get_xaxis_transform(), va="top", fontsize=7, color=INK)
    axes.axhline(report["deadline_ms"], color=FAINT, lw=0.9, ls=(0, (3, 2)))
    axes.set(xlabel="s", ylabel="ms", yscale="log", xlim=(0, (last - first) / rate))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_title("Trough to subscriber, each sorted spike")


def _draw_parts(axes: Any, report: dict[str, Any]) -> None:
    axes.set_title("What it is made of (medians), ms")
    phases = [report["clean"] | {"name": "clean"}, *report["faults"]][::-1]
    rows, left = range(len(phases)), [0.0] * len(phases)
    for part, color in _PARTS.items():
        widths = [max(phase["latency_ms"][part]["p50"] or 0.0, 0.0) for phase in phases]
        axes.barh(rows, widths, left=left, color=color, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, phase in enumerate(phases):
        axes.text(0.05, row, phase["name"], va="center", fontsize=8, color=INK)
    axes.set_yticks([])
    axes.set_ylim(-0.6, max(len(phases), _LEAST_ROWS) - 0.4)
    _legend(axes, len(_PARTS))


def _draw_stages(axes: Any, report: dict[str, Any]) -> None:
    axes.set_title("Stages after the floor, ms")
    latency = report["clean"]["latency_ms"]
    for quantile, color in (("p99", PALE), ("p50", _PARTS["compute"])):
        axes.barh(STAGES[::-1], [latency[stage][quantile] or 0.0 for stage in STAGES[::-1]], color=color, label=quantile)
    _legend(axes, 2)


def _legend(axes: Any, n_columns: int) -> None:
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=n_columns)


def _draw_threads(axes: Any, report: dict[str, Any]) -> None:
    axes.set_title("The sorter's threads, share of a core")
    threads = list(report["clean"]["cpu_threads"].items())[:_SHOWN_THREADS][::-1]
    axes.barh([name for name, _ in threads], [share for _, share in threads], color=_PARTS["compute"])
