"""One page that shows what a run was like: raster, templates on the probe, embedding map, latency, accuracy.

In goes a `Page`; out comes a PNG. A unit has the same colour everywhere. Needs the extra `streamsort[report]` (matplotlib), which
is imported when it is needed and by nothing that sorts.
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.embedmap import neighbor_map
from streamsort.errors import StreamsortError
from streamsort.probe import Probe
from streamsort.records import UNSORTED

INK, FAINT, PALE = "#1f2430", "#8a919e", "#e9ebef"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}
_GREY_TICKS = 6000  # of unsorted crossings; more are a grey bar
_SHOWN_PART = 0.5  # of a unit's largest peak-to-peak: channels with less are not drawn
_TEMPLATE_PITCHES = 3.0  # height of the largest template, in distances of contacts
_LABELLED_ROWS = 28
_MAP_POINTS, _LEAST_POINTS, _LABELLED_POINTS = 800, 60, 5
_PLACE_WEIGHT = 4.0  # spreads of a unit per contact: the sorter compares spikes of one channel, and a map must keep channels apart
_LATENCY_LINES = (("look-ahead", "floor"), ("p50", "p50"), ("p95", "p95"), ("p99", "p99"), ("max", "max"))


@dataclass(frozen=True)
class Page:
    """What is drawn.

    Attributes
    ----------
    figures : dict
        As in report.json.
    spikes : ndarray, shape (n_spikes,), SPIKE_DTYPE
    sampling_frequency : float
    probe : Probe
    templates : dict of ndarray
        As from `Sorter.templates()`.
    units : list of dict
        As from `Sorter.units_table()`.
    embeddings : ndarray, shape (n, n_dims), float32
        Of some spikes, whose units and peak channels are `embedded_units` and `embedded_channels`, (n,).
    latency_ms : ndarray, shape (n,), float64
    """

    figures: dict[str, Any]
    spikes: NDArray[Any]
    sampling_frequency: float
    probe: Probe
    templates: dict[str, NDArray[Any]]
    units: list[dict[str, Any]]
    embeddings: NDArray[np.float32]
    embedded_units: NDArray[np.int32]
    embedded_channels: NDArray[np.int32]
    latency_ms: NDArray[np.float64]


def can_draw(say: Callable[[str], None]) -> bool:
    """Tell whether there is matplotlib; if not, say what to install."""
    try:
        figure_class("report.png")
    except StreamsortError as error:
        say(str(error))
        return False
    return True


def draw(page: Page, path: str | Path) -> None:
    """Write the page as a PNG.

    Raises
    ------
    StreamsortError
        If matplotlib is not installed.
    """
    make = figure_class("report.png")
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = make(figsize=(16, 10.5), facecolor="white")
        places = _places(figure)
        colors = _colors(page)
        _draw_title(figure, page)
        _draw_raster(places["raster"], page, colors)
        _draw_templates(places["templates"], page, colors)
        _draw_map(places["map"], page, colors)
        _draw_latency(places["latency"], page)
        _draw_accuracy(places["accuracy"], page, colors)
        figure.savefig(path, dpi=110)


def figure_class(what: str) -> Any:
    """Import what draws `what` without a display.

    Raises
    ------
    StreamsortError
        If it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise StreamsortError(f"{what} needs matplotlib: pip install 'streamsort[report]'") from None
    return Figure


def _places(figure: Any) -> dict[str, Any]:
    grid = figure.add_gridspec(
        3, 3, height_ratios=(1.25, 1, 1), width_ratios=(1.05, 1.1, 1), left=0.045, right=0.98, top=0.885, bottom=0.06
    )
    grid.update(hspace=0.36, wspace=0.16)
    return {
        "raster": figure.add_subplot(grid[0, :]),
        "templates": figure.add_subplot(grid[1:, 0]),
        "map": figure.add_subplot(grid[1:, 1]),
        "latency": figure.add_subplot(grid[1, 2]),
        "accuracy": figure.add_subplot(grid[2, 2]),
    }


def _by_depth(page: Page) -> list[int]:
    """Order the unit ids from the bottom of the probe to its top."""
    return [unit["unit_id"] for unit in sorted(page.units, key=lambda unit: (unit["y_um"], unit["x_um"]))]


def _colors(page: Page) -> dict[int, tuple[float, float, float]]:
    """Give each unit a colour; those next to each other on the probe get hues far apart."""
    colors = {}
    for k, unit in enumerate(_by_depth(page)):
        lightness, saturation = ((0.45, 0.75), (0.58, 0.62), (0.34, 0.60))[k % 3]
        colors[unit] = colorsys.hls_to_rgb((k * 0.381966) % 1.0, lightness, saturation)
    return colors


def _draw_title(figure: Any, page: Page) -> None:
    f = page.figures
    figure.text(0.045, 0.957, "streamsort", fontsize=21, fontweight="bold", color=INK)
    about = (
        f"{f['n_channels']} channels simulated, {f['seconds']:.0f} s live over LSL, sorted by {f['encoder']} on {f['provider']}, "
        "decoded over ZeroMQ"
    )
    figure.text(0.045, 0.932, about, fontsize=10.5, color=FAINT)
    median = f["latency_ms"]["p50"]
    facts = [
        (f"{f['n_units_matched']} / {f['n_units_true']}", "true units found"),
        (f"{f['accuracy_mean']:.2f}", "mean accuracy"),
        ("-" if median is None else f"{median:.1f} ms", "median latency"),
        ("-" if median is None else f"{f['latency_ms']['p99']:.1f} ms", "99 % within"),
        (f"{f['samples_lost']}", "samples lost"),
    ]
    for k, (value, label) in enumerate(facts):
        x = 0.98 - 0.088 * (len(facts) - 1 - k)
        figure.text(x, 0.954, value, fontsize=17, fontweight="bold", ha="right")
        figure.text(x, 0.932, label, fontsize=9.5, color=FAINT, ha="right")


def _draw_raster(axes: Any, page: Page, colors: dict[int, Any]) -> None:
    order, warmup_s = _by_depth(page), page.figures["warmup_s"]
    times = page.spikes["sample_index"] / page.sampling_frequency
    rows = {unit: k for k, unit in enumerate(order)}
    unsorted = page.spikes["unit_id"] == UNSORTED
    height = max(len(order), 1)
    axes.axvspan(0, warmup_s, color=PALE, lw=0)
    shown = np.flatnonzero(unsorted)[:: max(int(unsorted.sum()) // _GREY_TICKS, 1)]
    depth = page.probe.channel_locations[page.spikes["channel"][shown], 1]
    low, high = page.probe.channel_locations[:, 1].min(), page.probe.channel_locations[:, 1].max()
    before = times[shown] < warmup_s
    axes.plot(
        times[shown][before], (height - 1) * (depth[before] - low) / max(high - low, 1.0), "|", ms=4, mew=0.6, color="#aeb4bf"
    )
    for unit in order:
        mine = times[page.spikes["unit_id"] == unit]
        axes.vlines(mine, rows[unit] - 0.42, rows[unit] + 0.42, color=colors[unit], lw=0.8)
    note = "grey: calibration, threshold crossings by depth"
    axes.text(1.0, 1.03, note, transform=axes.transAxes, ha="right", va="bottom", color=FAINT)
    axes.set(xlim=(0, page.figures["seconds"]), ylim=(-1, height), xlabel="time (s)", ylabel="unit, by depth")
    labelled = range(0, len(order), 1 + height // _LABELLED_ROWS)
    axes.set_yticks(labelled, [str(order[k]) for k in labelled], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_title("Spikes as they were published")


def _draw_templates(axes: Any, page: Page, colors: dict[int, Any]) -> None:
    """Draw each unit's template where the contacts are, on the channels where it is large."""
    places = page.probe.channel_locations
    pitch_x, pitch_y = _pitch(places[:, 0], 30.0), _pitch(places[:, 1], 20.0)
    axes.plot(*places.T, "s", ms=4, color="#cfd4dc", zorder=0)
    rows = _main_rows(page.templates)
    often = max((int(page.templates["n_spikes"][row]) for row in rows.values()), default=1)
    largest = max((float(np.ptp(page.templates["template"][row], axis=0).max()) for row in rows.values()), default=1.0)
    for unit, row in rows.items():
        template, neighbors = page.templates["template"][row], page.templates["neighbors"][page.templates["channel"][row]]
        size = np.where(neighbors >= 0, np.ptp(template, axis=0), 0.0)
        x = np.linspace(-0.42, 0.42, len(template)) * pitch_x
        alpha = 0.35 + 0.6 * min(1.0, 4 * float(page.templates["n_spikes"][row]) / often)  # rare units recede
        for column in np.flatnonzero(size > _SHOWN_PART * size.max()):
            x_um, y_um = places[neighbors[column]]
            wave = template[:, column] / largest * _TEMPLATE_PITCHES * pitch_y
            axes.plot(x_um + x, y_um + wave, color=colors.get(unit, INK), lw=1.3, alpha=alpha)
    axes.set(xlabel="x (µm)", ylabel="y (µm)")
    axes.set_title("Templates on the probe")


def _main_rows(templates: dict[str, NDArray[Any]]) -> dict[int, int]:
    """Find each unit's largest prototype."""
    rows: dict[int, int] = {}
    for row in np.argsort(templates.get("n_spikes", np.zeros(0)), kind="stable"):
        rows[int(templates["unit"][row])] = int(row)
    rows.pop(UNSORTED, None)
    return rows


def _pitch(values: NDArray[np.float64], otherwise: float) -> float:
    steps = np.diff(np.unique(np.round(values, 3)))
    return float(steps.min()) if len(steps) else otherwise


def _draw_map(axes: Any, page: Page, colors: dict[int, Any]) -> None:
    every = max(-(-len(page.embeddings) // _MAP_POINTS), 1)
    units, channels = page.embedded_units[::every], page.embedded_channels[::every]
    axes.set_title("Embeddings of sorted spikes, by unit")
    axes.set(xticks=[], yticks=[], xlabel=f"t-SNE of {len(units)} spikes, by embedding and peak channel")
    if len(units) < _LEAST_POINTS:
        return
    features = np.column_stack([_in_spreads(page.embeddings[::every], units), _PLACE_WEIGHT * _steps(page.probe)[channels]])
    points = neighbor_map(features)
    axes.scatter(*points.T, c=[colors.get(int(unit), FAINT) for unit in units], s=9, alpha=0.75, lw=0)
    labels, counts = np.unique(units, return_counts=True)
    for unit in labels[counts >= _LABELLED_POINTS]:
        mine = points[units == unit]
        middle = mine[np.argmin(((mine - np.median(mine, axis=0)) ** 2).sum(axis=1))]
        axes.annotate(str(unit), middle, ha="center", va="center", fontsize=8, fontweight="bold", path_effects=_outline())


def _outline() -> list[Any]:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2, foreground="white")]


def _in_spreads(embeddings: NDArray[np.float32], units: NDArray[np.int32]) -> NDArray[np.float64]:
    """Whiten with the covariance within units, so that a unit is a ball of radius 1."""
    x, labels = embeddings.astype(np.float64), np.unique(units)
    means = np.array([x[units == label].mean(axis=0) for label in labels])
    residuals = x - means[np.searchsorted(labels, units)]
    within = residuals.T @ residuals / len(x)
    values, vectors = np.linalg.eigh(within + 1e-3 * np.trace(within) / len(within) * np.eye(len(within)))
    whitened: NDArray[np.float64] = x @ vectors / np.sqrt(values)
    return whitened


def _steps(probe: Probe) -> NDArray[np.float64]:
    """Give contact places in multiples of the distance to the nearest other contact."""
    distances = probe.distances_um() + np.where(np.eye(probe.n_channels, dtype=np.bool_), np.inf, 0.0)
    nearest = float(distances.min(initial=np.inf))
    return probe.channel_locations / (nearest if np.isfinite(nearest) else 1.0)


def _draw_latency(axes: Any, page: Page) -> None:
    f, values = page.figures["latency_ms"], page.latency_ms
    axes.set_title("Latency, trough to decoder")
    axes.set(xlabel="ms", ylabel="spikes")
    if not len(values):
        return
    end = max(float(np.percentile(values, 99.5)) * 1.15, 2 * f["floor"])
    axes.hist(np.minimum(values, end), bins=np.linspace(0, end, 90), color="#4b6bb5", lw=0)
    for name in ("floor", "p50", "p95", "p99"):
        axes.axvline(f[name], color=FAINT if name == "floor" else INK, lw=0.9, ls=(0, (3, 2)))
    text = "\n".join(f"{name:<10}{f[key]:7.1f} ms" for name, key in _LATENCY_LINES)
    box = {"fc": "white", "ec": "none", "pad": 2}
    axes.text(0.99, 0.95, text, transform=axes.transAxes, ha="right", va="top", family="DejaVu Sans Mono", fontsize=9, bbox=box)
    axes.set_xlim(0, end)


def _draw_accuracy(axes: Any, page: Page, colors: dict[int, Any]) -> None:
    units = sorted(page.figures["units"], key=lambda unit: -unit["accuracy"])
    axes.bar(
        range(len(units)),
        [unit["accuracy"] for unit in units],
        color=[colors.get(unit["unit_id"], PALE) for unit in units],
        width=0.8,
    )
    axes.axhline(page.figures["accuracy_mean"], color=INK, lw=0.9, ls=(0, (3, 2)))
    labels = [str(unit["unit_id"]) if unit["unit_id"] != UNSORTED else "-" for unit in units]
    axes.set_xticks(range(len(units)), labels, fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.set(ylim=(0, 1.02), xlabel="true units, by the unit found for each", ylabel="accuracy")
    axes.set_title(f"Agreement with the truth ({page.figures['n_units_found']} units published)")
