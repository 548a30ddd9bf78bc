"""The benchmarks run, for about a second each, and write what they say they do; how fast is not tested here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamsort.simulate import GAIN_UV, SimulationConfig, simulate_recording

FOLDER = Path(__file__).parent.parent / "benchmarks"


def run(script: str, out: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run a benchmark as a user does, and return its rows."""
    command = [sys.executable, str(FOLDER / script), *arguments, "--json", str(out)]
    path = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["machine"]["cores"] >= 1 and "numpy" in report["versions"]
    assert done.stdout.startswith(report["benchmark"])
    return report["results"]


def test_throughput_measures_every_case(tmp_path: Path) -> None:
    case = (
        "--channels",
        "4",
        "32",
        "--chunk-ms",
        "1",
        "10",
        "--seconds",
        "0.5",
        "--repeats",
        "1",
        "--warmup-s",
        "2.5",
        "--loop-s",
        "1",
    )
    rows = run("throughput.py", tmp_path / "out.json", *case)
    assert [(row["channels"], row["chunk_ms"]) for row in rows] == [(4, 1), (4, 10), (32, 1), (32, 10)]
    for row in rows:
        assert row["signal_x"] > 0 and row["whole_x"] > 0
        assert 0 < row["whole_p50_ms"] <= row["whole_p99_ms"] <= row["whole_max_ms"]
        assert row["peaks_per_s"] > 0 and row["encoder_spikes_per_s"] > 0


def test_kernels_are_measured_against_others_and_against_the_core(tmp_path: Path) -> None:
    case = ("--channels", "4", "400", "--chunk-ms", "1", "7", "--seconds", "0.2", "--repeats", "1")
    rows = run("kernels.py", tmp_path / "out.json", *case)
    assert [(row["channels"], row["chunk_ms"]) for row in rows] == [(4, 1), (4, 7), (400, 1), (400, 7)]
    for row in rows:
        assert row["n_peaks"] > 0 and row["over_roof"] > 0 and row["filter_over_roof"] > 0
        assert all(row[f"{name}_x"] > 0 for name in ("filter", "reference", "detect", "kernels", "stages", "sosfilt", "median"))


def test_refresh_compares_a_stream_with_and_without_one(tmp_path: Path) -> None:
    case = ("--seconds", "3", "--warmup-s", "5", "--catch-up-s", "10", "--probe", "tetrode", "--units", "3")
    without, refreshed = run("refresh.py", tmp_path / "out.json", *case)
    assert (without["refresh"], refreshed["refresh"]) == ("no", "yes")
    for row in (without, refreshed):
        assert 0 < row["p50"] <= row["p99"] <= row["max"] and row["samples_lost"] == 0 and 0 < row["catch_up_s"] <= 10
        assert 0 <= row["changed"] <= row["found"] <= row["true_units"] == len(row["ids"])
    assert not without["events"] and not without["offers"]


def test_accuracy_scores_its_own_recordings_and_lists_rivals(tmp_path: Path) -> None:
    late = {"units_gt": 6, "units_found": 5, "accuracy_mean": 0.5, "accuracy_median": 0.5, "precision_mean_matched": 0.9}
    late |= {"recall_mean": 0.5, "accuracy_by_snr": {"3-5": 0.1}}
    rival = {"recording": "tetrode", "sorter": "rival4", "data_sha256": "0" * 16, "duration_s": 24.0, "late": late}
    rival["runs"] = [{"cpu_s": 12.0, "wall_s": 48.0}]
    (tmp_path / "peers.json").write_text(json.dumps({"versions": {"rival": "4.1"}, "runs": {"tetrode/rival4": rival}}))
    rows = run("accuracy.py", tmp_path / "out.json", "--seconds", "24", "--windows", "--peers", str(tmp_path / "peers.json"))
    ours = [row for row in rows if row["sorter"] == "streamsort"]
    assert [(row["recording"], row["sorter"]) for row in rows] == [
        ("tetrode", "streamsort"),
        ("tetrode", "rival4"),
        ("grid32", "streamsort"),
    ]
    assert (rows[1]["version"], rows[1]["same_data"]) == ("rival 4.1", "no")
    assert (rows[1]["cpu_s_per_s"], rows[1]["x_real_time"]) == (0.5, 0.5)
    for row in ours:
        assert row["accuracy_mean"] > 0.5 and row["snr_8+"] > 0.5 and row["snr_3-5"] > 0.1
        assert len(row["windows"]) == 2
        assert 0 <= row["calibration_error"] <= 1 and sum(one["n_spikes"] for one in row["calibration"]) > 50
        assert row["n_pairs_1ms_clear"] >= row["n_pairs_0.5ms_clear"] and row["cpu_s_per_s"] > 0


def test_accuracy_takes_principal_components_and_recordings_of_others(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    config = SimulationConfig(seconds=18, probe_name="tetrode", n_units=3, snr=(10.0, 15.0), rates_hz=(8.0, 12.0), seed=1)
    made = simulate_recording(config)
    folder, plot = tmp_path / "data", tmp_path / "out.png"
    folder.mkdir()
    (made.traces + np.int16(2050)).astype("<i2").tofile(folder / "locust_trial_01.raw")  # read at another rate, without truth
    about = {"traces": made.traces, "gain_uV": GAIN_UV, "sampling_frequency": 30000, "positions": np.zeros((4, 3))}
    about["positions"][:, :2] = made.probe.channel_locations
    np.savez(folder / "cells.npz", sample=made.truth.sample_index, unit=made.truth.unit_index, peak_uV=80 * np.ones(3), **about)
    rows = run("accuracy.py", tmp_path / "out.json", "--peerdata", str(folder), "--features", "light", "pca", "--plot", str(plot))
    assert [(row["recording"], row["encoder"]) for row in rows] == [("cells", "huidurep-light"), ("cells", "pca-32")]
    assert all(row["accuracy_mean"] > 0.5 and 0.8 < row["id_purity_clear"] <= 1 for row in rows)
    report = json.loads((tmp_path / "out.json").read_text())
    light, pca = report["without_truth"]
    assert light["recording"] == "locust-tetrode" and light["seconds"] == pca["seconds"] == 36
    assert all(len(row["published"]) == row["n_units_published"] > 0 for row in (light, pca))
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_accuracy_says_in_one_line_what_it_cannot_read(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "accuracy.py"), "--peerdata", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 1 and done.stderr.strip().count("\n") == 0
    assert f"folder {tmp_path}: no recording below" in done.stderr


def test_dormancy_follows_units_through_their_silence(tmp_path: Path) -> None:
    case = ["--seeds", "3:5", "--units", "2", "--silent", "0.5", "--snr", "8", "14", "--rates-hz", "6", "12", "--jobs", "1"]
    rows = run("dormancy.py", tmp_path / "out.json", *case, "--warmup-s", "8", "--around-s", "6", "--silence-s", "2")
    assert [row["seed"] for row in rows] == [3, 4, "all"]
    for row in rows[:2]:
        assert row["n_silent"] == row["n_known"] == row["n_kept"] == 1 and row["outcome"] == "kept"
        assert row["same_id"] > 0.9 and row["recall_before"] > 0.9 and row["fates"][0]["unit_id"] > 0
        assert row["n_revived"] == 0  # two seconds are no silence to speak of
    assert rows[2]["n_kept"] == 2 and rows[2]["outcome"] == "2 of 2 seeds"


def test_encoder_is_compared_with_principal_components(tmp_path: Path) -> None:
    for needed in ("sklearn", "matplotlib"):
        pytest.importorskip(needed)
    plot, model = tmp_path / "out.png", sorted((FOLDER.parent / "models").glob("*.onnx"))[-1]  # the light one
    case = ["--units", "10", "--spikes", "30", "--draws", "1", "--speed-s", "0.02", "--jobs", "1", "--drift-um", "0"]
    case += ["--snr", "3-4", ">10"]
    rows = run("encoder.py", tmp_path / "out.json", *case, "--plot", str(plot), "--model", str(model))
    grid = {(row["peak"], row["snr"], row["drift_um"]): row for row in rows if row["placement"] == "anywhere"}
    assert len(grid) == 4 and len(rows) == 5
    for name in ("pca-5", "pca-32", model.stem):
        faint, clear = (grid["fixed", snr, 0.0] for snr in ("3-4", ">10"))
        assert faint[f"{name} knn"] < clear[f"{name} knn"] <= 1 and clear[f"{name} ari"] > 0.3
    assert grid["live", "3-4", 0.0]["detected"] < grid["live", ">10", 0.0]["detected"] == 1
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(row["model"], row["batch"]) for row in report["speed"][:4]] == [(model.stem, batch) for batch in (1, 8, 32, 128)]
    assert {row["feature"] for row in report["look_ahead"]} >= {"pca-32"}
    assert plot.read_bytes().startswith(b"\x89PNG")
