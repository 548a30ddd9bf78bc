"""The picture of an accuracy run: a line of three panels for every recording.

With truth: accuracy by SNR beside rivals, reliability of the confidence, accuracy over time. Without: mean snippets of the units
that were published, their intervals, their amplitudes over time. Needs the extra `streamsort[report]`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_data import mean_snippets
from accuracy_sort import REFRACTORY_MS, SNR_BINS, Sorted
from numpy.typing import NDArray

from streamsort.records import UNSORTED

try:
    from matplotlib.figure import Figure
except ImportError:
    sys.exit("benchmarks/accuracy.py: matplotlib is not installed, expected it: pip install 'streamsort[report]'")

_OURS = ("#b3263a", "#2b5ea7", "#2a8c5a")
_RIVAL_MARKS = "osv^D<>pP*X"
_LONGEST_MS = 50.0  # of the intervals shown
_WINDOW_S = 10.0


@dataclass(frozen=True)
class Picture:
    """What is drawn of a recording without truth; `snippets` is (n_units, n_samples, n_channels) in uV."""

    title: str
    unit_ids: NDArray[np.int64]
    times_s: list[NDArray[np.float64]]
    amplitudes_uv: list[NDArray[np.float64]]
    snippets: NDArray[np.float64]

    @classmethod
    def of(cls, result: Sorted) -> "Picture":
        """Collect it while the recording is still there."""
        spikes = np.sort(result.spikes[result.spikes["unit_id"] != UNSORTED], order="sample_index")
        unit_ids, label = np.unique(spikes["unit_id"], return_inverse=True)
        own = [spikes[label == k] for k in range(len(unit_ids))]
        return cls(
            f"{result.case.name}, {result.encoder}",
            unit_ids,
            [one["sample_index"] / result.sampling_frequency for one in own],
            [one["amplitude_uv"].astype(np.float64) for one in own],
            mean_snippets(result.case.path, spikes["sample_index"], label),
        )


def plot(rows: Sequence[dict[str, Any]], pictures: Sequence[Picture], path: Path) -> None:
    """Draw all recordings."""
    known = [row for row in rows if "accuracy_mean" in row]
    names = list(dict.fromkeys(row["recording"] for row in known))
    n_lines = len(names) + len(pictures)
    figure = Figure(figsize=(13, 3.1 * n_lines), layout="constrained")
    lines = iter(figure.subplots(n_lines, 3, squeeze=False))
    for name, panels in zip(names, lines, strict=False):
        mine = [row for row in known if row["recording"] == name]
        _draw_snr(panels[0], name, mine)
        _draw_reliability(panels[1], [row for row in mine if "calibration" in row])
        _draw_windows(panels[2], [row for row in mine if "windows" in row])
    for picture, panels in zip(pictures, list(lines), strict=True):
        _draw_units(panels, picture)
    figure.savefig(path, dpi=80)


def _draw_snr(panel: Any, name: str, rows: Sequence[dict[str, Any]]) -> None:
    keys = [f"snr_{name}" for name in SNR_BINS]
    ours = [row for row in rows if "windows" in row]
    rivals = [row for row in rows if "windows" not in row]
    for k, row in enumerate(ours + rivals):
        style: dict[str, Any] = {"color": "0.55", "linestyle": ":", "marker": _RIVAL_MARKS[(k - len(ours)) % len(_RIVAL_MARKS)]}
        if row in ours:
            style = {"color": _OURS[k % len(_OURS)], "linewidth": 2.5, "marker": "o"}
        other_data = "" if row in ours or row["same_data"] == "yes" else "*"
        values = [np.nan if row.get(key) is None else row[key] for key in keys]
        panel.plot(range(len(keys)), values, label=row["sorter"] + other_data, markersize=5, **style)
    panel.set_xticks(range(len(keys)), SNR_BINS)
    elsewhere = any(row["same_data"] != "yes" for row in rivals)
    panel.set(title=name, xlabel="SNR (* not on these samples and seconds)" if elsewhere else "SNR", ylabel="accuracy")
    panel.set(xlim=(-0.15, len(keys) - 0.85), ylim=(-0.03, 1.03))
    panel.legend(fontsize=6.5, loc="lower right")


def _draw_reliability(panel: Any, rows: Sequence[dict[str, Any]]) -> None:
    panel.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for color, row in zip(_OURS, rows, strict=False):
        bins = row["calibration"]
        error = "-" if row["calibration_error"] is None else f"{row['calibration_error']:.3f}"
        x, y = [one["confidence"] for one in bins], [one["right"] for one in bins]
        panel.plot(x, y, color=color, linewidth=1, label=f"{row['sorter']}: ECE {error}")
        largest = max((one["n_spikes"] for one in bins), default=1)
        panel.scatter(x, y, [6 + 80 * one["n_spikes"] / largest for one in bins], color=color)
    panel.set(title="confidence (size: spikes)", xlabel="confidence", ylabel="share that is right", ylim=(-0.03, 1.03))
    panel.set_xlim(-0.03, 1.03)
    panel.legend(fontsize=6.5, loc="upper left")


def _draw_windows(panel: Any, rows: Sequence[dict[str, Any]]) -> None:
    for color, row in zip(_OURS, rows, strict=False):
        values = [np.nan if value is None else value for value in row["windows"]]
        edges = row["warmup_s"] + _WINDOW_S * np.arange(len(values) + 1)
        panel.stairs(values, edges, baseline=None, color=color, linewidth=2, label=row["sorter"])
    panel.set(title="in 10-s windows", xlabel="time (s)", ylabel="accuracy", ylim=(-0.03, 1.03))
    panel.legend(fontsize=6.5, loc="lower right")


def _draw_units(panels: Any, picture: Picture) -> None:
    colors = [f"C{k % 10}" for k in range(len(picture.unit_ids))]
    n_samples, n_channels = picture.snippets.shape[1:]
    bins_ms = np.geomspace(0.3, _LONGEST_MS * 20, 60)
    for k, (unit_id, color) in enumerate(zip(picture.unit_ids.tolist(), colors, strict=True)):
        times_s = picture.times_s[k]
        for channel in range(n_channels):
            x = channel * 1.15 * n_samples + np.arange(n_samples)
            panels[0].plot(
                x, picture.snippets[k, :, channel], color=color, linewidth=1, label=f"{unit_id}" if channel == 0 else None
            )
        panels[1].stairs(np.histogram(np.diff(times_s) * 1e3, bins_ms)[0], bins_ms, color=color)
        panels[2].plot(times_s, picture.amplitudes_uv[k], ".", color=color, markersize=2)
    panels[1].axvspan(bins_ms[0], REFRACTORY_MS, color="0.9")
    panels[1].set_xscale("log")
    panels[0].set(title=picture.title, xlabel="channels, 2 ms each", ylabel="mean snippet, unfiltered (uV)", xticks=[])
    panels[0].legend(fontsize=6.5, title="unit", title_fontsize=6.5, loc="lower right")
    panels[1].set(title="intervals (grey: refractory)", xlabel="ms", ylabel="spikes")
    panels[2].set(title="amplitudes", xlabel="time (s)", ylabel="amplitude (uV)")
