"""The demo from end to end, in real processes over real sockets, and the page it draws."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from streamsort import report
from streamsort.config import SorterConfig
from streamsort.demo import Run, alignment_samples, measured, settled_s
from streamsort.embedmap import neighbor_map
from streamsort.probe import Probe
from streamsort.records import SPIKE_DTYPE
from streamsort.simulate import Truth

ROOT = Path(__file__).parent.parent
PATIENCE_S = 100.0
PNG = b"\x89PNG\r\n\x1a\n"


def start(tmp_path: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "streamsort", "demo", "--report", str(tmp_path / "report"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children_of(tmp_path: Path) -> list[str]:
    """Find processes that were started on files of this test."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "demo_children" in command and str(tmp_path) in command:
            found.append(command)
    return found


@pytest.mark.slow
@pytest.mark.lsl
def test_the_demo_streams_sorts_decodes_and_reports(tmp_path: Path, lsl_config: Path) -> None:
    pytest.importorskip("matplotlib")
    process = start(tmp_path, "--seconds", "12", "--json")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    assert figures == json.loads(out)
    assert figures["samples_lost"] == 0
    assert figures["samples_received"] == figures["samples_sent"] == 12 * 30000
    assert figures["spikes_received"] == figures["spikes_published"] > 500
    assert abs(figures["alignment_samples"]) <= 3
    assert figures["n_units_true"] == 20
    assert figures["n_units_found"] > 3
    assert figures["n_units_matched"] >= 1
    latency = figures["latency_ms"]
    if latency["n"]:  # a machine too slow for 12 s does not come to it
        assert 0 < latency["floor"] < latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["max"]
    assert figures["encoder"] and figures["provider"] in ("cpu", "cuda")
    page = (tmp_path / "report" / "report.png").read_bytes()
    assert page.startswith(PNG) and len(page) > 50_000
    assert children_of(tmp_path) == []


def test_latency_counts_from_the_first_spike_in_time_after_the_warmup() -> None:
    received = {"sample_index": np.array([1, 2, 3, 4, 5, 6]) * 1000, "latency_ms": np.array([3.0, 900.0, 700.0, 9.0, 2.0, 400.0])}
    run = Run(cast(Any, SimpleNamespace(config=SorterConfig())), {}, np.zeros(0), 0, received, True)
    assert settled_s(run, 1000.0, 2.0) == 4.0
    assert measured(run, 1000.0, 2.0).tolist() == [9.0, 2.0, 400.0]
    received["latency_ms"][3:] = 800.0
    assert settled_s(run, 1000.0, 2.0) is None and not len(measured(run, 1000.0, 2.0))


@pytest.mark.slow
@pytest.mark.lsl
def test_ctrl_c_ends_the_demo_with_a_report_and_no_child(tmp_path: Path, lsl_config: Path) -> None:
    process = start(tmp_path, "--seconds", "60")
    assert process.stderr is not None
    seen = ""
    while "calibrating" not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    if sys.platform == "linux":
        assert len(children_of(tmp_path)) == 2
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert "lost      0 of" in out
    assert "Traceback" not in err
    assert (tmp_path / "report" / "report.json").exists()
    deadline = time.monotonic() + 5
    while children_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children_of(tmp_path) == []


@pytest.mark.parametrize("shift", [0, -4, 700])
def test_the_shift_of_the_time_axis_is_found(shift: int, rng: np.random.Generator) -> None:
    true = np.sort(rng.choice(300_000, 500, replace=False)).astype(np.int64)
    spikes = np.zeros(600, SPIKE_DTYPE)
    spikes["sample_index"][:400] = true[:400] + shift
    spikes["sample_index"][400:] = rng.integers(0, 300_000, 200)
    assert alignment_samples(spikes, Truth(true, np.zeros(500, np.int32)), 30000.0) == shift


def test_without_spikes_there_is_no_shift() -> None:
    nothing = Truth(np.zeros(0, np.int64), np.zeros(0, np.int32))
    assert alignment_samples(np.zeros(5, SPIKE_DTYPE), nothing, 30000.0) is None


def test_the_map_keeps_groups_together(rng: np.random.Generator) -> None:
    group = np.repeat(np.arange(4), 40)
    features = rng.normal(size=(160, 8)) + 12 * np.eye(4, 8)[group]
    points = neighbor_map(features)
    np.testing.assert_array_equal(points, neighbor_map(features))
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.where(np.eye(160), np.inf, 0)
    assert (group[distances.argmin(axis=1)] == group).mean() > 0.98


def empty_page() -> report.Page:
    figures: dict[str, Any] = {
        "n_channels": 4,
        "seconds": 3.0,
        "warmup_s": 24.0,
        "encoder": "e",
        "provider": "cpu",
        "n_units_matched": 0,
        "n_units_true": 0,
        "n_units_found": 0,
        "accuracy_mean": 0.0,
        "samples_lost": 0,
        "units": [],
        "latency_ms": {"floor": 1.0, "p50": None, "p95": None, "p99": None, "max": None, "n": 0},
    }
    nothing = np.zeros(0, np.int32)
    return report.Page(
        figures,
        np.zeros(0, SPIKE_DTYPE),
        30000.0,
        Probe.linear(4),
        {},
        [],
        np.zeros((0, 32), np.float32),
        nothing,
        nothing,
        np.zeros(0),
    )


def test_a_page_of_nothing_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.draw(empty_page(), tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(PNG)


def test_without_matplotlib_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not report.can_draw(said.append)
    assert said == ["report.png needs matplotlib: pip install 'streamsort[report]'"]
