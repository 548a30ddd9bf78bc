"""`streamsort bench`: what it injects is what is counted, and what it says of latency adds up."""

import importlib.util
import itertools
import json
import os
import queue
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamsort.bench import figures
from streamsort.bench.burst import make_burst
from streamsort.bench.faults import Disturbance, Faults, parse_faults
from streamsort.bench.figures import Clock
from streamsort.bench.played import Phase, Played
from streamsort.bench.result import repeated
from streamsort.bench.roles import ARRIVAL_DTYPE, first_in_time
from streamsort.bench.show import comparison, table
from streamsort.cli import main
from streamsort.records import SPIKE_DTYPE, UNSORTED, Flag
from streamsort.simulate import SimulationConfig, Truth, truth, write_recording

ROOT = Path(__file__).parent.parent
RATE = 30000.0


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SimulationConfig]:
    """Return a folder with a recording and its truth, and what it is: 6 s of a tetrode."""
    config = SimulationConfig(seconds=6, probe_name="tetrode", n_units=3, rates_hz=(12, 20), snr=(8, 15), seed=4)
    folder = tmp_path_factory.mktemp("bench") / "sim"
    write_recording(config, folder)
    return folder, config


# ---- faults ----


def test_faults_are_read_with_their_units() -> None:
    read = parse_faults("stall=0.2s,loss=1e-4,jitter=5ms,burst=10x,slow-encoder=20ms,slow-subscriber")
    assert read == Faults(200.0, 1e-4, 5.0, 10.0, 20.0, True)
    assert read.phase_s(30.0) == 5.0 and Faults(stall_ms=900.0).phase_s(1.0) == 3.6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stal=200ms", "fault: unknown 'stal'; did you mean stall?"),
        ("", "fault: unknown ''; known: stall, loss"),
        ("stall=200", "'stall=200', expected stall=200ms"),
        ("stall", "'stall', expected stall=200ms"),
        ("stall=-1ms", "expected stall=200ms"),
        ("loss=1", "expected loss=1e-4"),
        ("loss=nan", "expected loss=1e-4"),
        ("burst=1x", "expected burst=10x"),
        ("jitter=5ms,jitter=5ms", "or the like, once"),
        ("slow-subscriber=1", "expected slow-subscriber without a value"),
    ],
)
def test_a_fault_that_is_none_is_told_in_one_line(text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sim:", "--fault", text]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "bench: no source, expected a recording, sim:... or --compare A B"),
        (["lsl:ephys"], "bench: lsl:ephys: a live stream, expected a recording"),
        (["sim:", "--transport", "lsl", "--fault", "loss=1e-3"], "expected --transport zmq"),
        (["sim:channels=33"], "sim: channels = '33', expected 1, 4, 32"),
        (["sim:", "--compare", "a", "b"], "source sim: with --compare, expected none"),
        (["--compare", __file__, __file__], "test_bench.py: not JSON"),
        (["no-such-folder"], "recording no-such-folder: no such file or folder"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_stall_holds_back_what_is_due_in_it_and_nothing_else() -> None:
    disturbance = Disturbance(Faults(stall_ms=200.0), seconds=4.0, seed=0)
    at_s = np.arange(1, 4001) / 1000
    sent_s = at_s + [disturbance.delay_s(float(at)) for at in at_s]
    stalled = ((at_s >= 1.0) & (at_s < 1.2)) | ((at_s >= 3.0) & (at_s < 3.2))
    np.testing.assert_allclose(sent_s, np.where(stalled, np.ceil((at_s - 0.9999) / 2) * 2 - 0.8, at_s), atol=1e-9)
    assert disturbance.injected == {"stalls": 2} and disturbance.ends_s == pytest.approx([1.2, 3.2])


def test_jitter_is_bounded_and_loss_is_counted() -> None:
    disturbance = Disturbance(Faults(loss=0.25, jitter_ms=5.0), seconds=1.0, seed=1)
    delays = [disturbance.delay_s(at / 1000) for at in range(1000)]
    dropped = sum(disturbance.drops(30, at / 1000) for at in range(1000))
    assert 0 <= min(delays) < 1e-3 and 4e-3 < max(delays) < 5e-3
    assert 200 < dropped < 300 and len(disturbance.ends_s) == dropped
    assert disturbance.injected == {"chunks_dropped": dropped, "samples_dropped": 30 * dropped, "chunks_delayed": 1000}


def test_a_burst_is_added_where_the_phase_begins_and_never_wraps() -> None:
    added = np.full((4, 2), 100.0, np.float32)
    disturbance = Disturbance(Faults(burst=2.0), 5.0, 0, added)
    traces = np.array([[1, 32700]] * 3, np.int16)
    assert disturbance.change(traces, 2).tolist() == [[101, 32767], [101, 32767], [1, 32700]]
    assert disturbance.change(traces, 4) is traces and traces[0, 0] == 1


def test_a_burst_multiplies_the_spikes_that_are_there(simulated: tuple[Path, SimulationConfig]) -> None:
    folder, config = simulated
    known = truth(config)
    burst = make_burst(str(folder / "recording"), known, None, factor=10.0, seed=0)
    expected = 9 * len(known.sample_index) / config.seconds * 5
    assert 0.85 * expected < len(burst.truth.sample_index) < 1.15 * expected
    assert set(burst.truth.unit_index.tolist()) == set(known.unit_index.tolist())
    assert (np.diff(burst.truth.sample_index) >= 0).all() and len(burst.traces) == 5 * RATE
    sparse = make_burst(str(folder / "recording"), known, None, factor=2.0, seed=0)
    at = sparse.truth.sample_index
    lone = at[1:-1][(np.diff(at)[:-1] > 200) & (np.diff(at)[1:] > 200)]
    troughs = [int(sparse.traces[sample - 30 : sample + 60].min(axis=1).argmin()) - 30 for sample in lone.tolist()]
    assert len(troughs) > 10 and np.abs(troughs).max() <= 2
    without = make_burst(str(folder / "recording"), None, None, factor=10.0, seed=0)
    assert len(without.truth.sample_index) > 0.85 * expected  # of all that is detected, not spikes alone
    assert (without.truth.unit_index == UNSORTED).all() and np.abs(without.traces).max() > 0.3 * np.abs(burst.traces).max()


# ---- the player ----


def test_what_the_player_drops_is_what_it_tells(simulated: tuple[Path, SimulationConfig]) -> None:
    told: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    with Played(str(simulated[0] / "recording"), 7.0, told.put) as source:
        source.phases.put(Phase(7.0, speed=1000.0, faults=Faults(loss=0.1), seed=2))
        source.phases.put(Phase(1.0, speed=1000.0))
        chunks = list(itertools.takewhile(lambda _: told.qsize() < 2, source))
    lossy, clean = told.get(), told.get()
    missing = [b.start_sample - a.end_sample for a, b in itertools.pairwise(chunks)]
    assert lossy["from_sample"] == 0 and lossy["to_sample"] == clean["from_sample"] >= 7 * RATE  # the recording has begun again
    assert sum(missing) + chunks[0].start_sample == lossy["injected"]["samples_dropped"] > 0
    assert all(chunk.n_samples == 210 and chunk.start_sample % 210 == 0 for chunk in chunks)
    again = {chunk.start_sample: chunk.traces for chunk in chunks}
    in_round = 180000 // 210 * 210
    twice = [start for start in again if start + in_round in again]
    assert twice and all((again[start] == again[start + in_round]).all() for start in twice)


def test_the_truth_is_played_again_with_its_recording() -> None:
    known = Truth(np.array([10, 50, 95]), np.array([0, 1, 0]))
    around = repeated(known, round_samples=90, from_sample=200, to_sample=300)
    inside = (around.sample_index >= 200) & (around.sample_index < 300)
    assert around.sample_index[inside].tolist() == [230, 280] and around.unit_index[inside].tolist() == [1, 0]


# ---- figures ----


def arrivals(rng: np.random.Generator, n: int = 200) -> np.ndarray[Any, np.dtype[Any]]:
    """Make spikes whose way is known: acquired 1 ms after their chunk, then 2, 3, 4 and 5 ms for the stages after it."""
    made = np.zeros(n, ARRIVAL_DTYPE)
    made["sample_index"] = np.sort(rng.integers(0, 30000, n))
    made["time"] = 100.0 + made["sample_index"] / RATE
    chunk_ends = (made["sample_index"] + 45 + 30) // 30 * 30
    for name, after_s in (("acquired", 1e-3), ("detected", 3e-3), ("assigned", 6e-3), ("published", 10e-3), ("received", 15e-3)):
        made[f"t_{name}"] = 100.0 + chunk_ends / RATE + after_s
    made["compute_s"] = 4e-4
    return made


def test_latency_is_floor_compute_and_waiting_and_the_stages_are_the_latter_two(rng: np.random.Generator) -> None:
    made, clock = arrivals(rng), Clock(RATE, margin=45, chunk=30)
    parts, stages = figures.split_s(made, clock), figures.stages_s(made, clock)
    np.testing.assert_allclose(sum(parts.values()), figures.latency_s(made), atol=1e-9)
    np.testing.assert_allclose(sum(stages.values()), parts["compute"] + parts["waiting"], atol=1e-9)
    for stage, milliseconds in zip(figures.STAGES, (1, 2, 3, 4, 5), strict=True):
        np.testing.assert_allclose(stages[stage], milliseconds * 1e-3, atol=1e-9)
    assert parts["floor"].min() >= 46 / RATE and parts["floor"].max() <= 75 / RATE and (parts["compute"] == 4e-4).all()
    older = made.copy()
    older["t_acquired"] -= 5e-3  # a chunk that waited, joined with the one that decides
    np.testing.assert_allclose(figures.stages_s(older, clock)["acquire"], 0.0, atol=1e-9)
    np.testing.assert_allclose(sum(figures.stages_s(older, clock).values()), sum(stages.values()), atol=1e-9)


def test_spikes_that_had_to_wait_for_others_are_not_split(rng: np.random.Generator) -> None:
    made = arrivals(rng, 3)
    made["unit_id"], made["flags"] = [1, UNSORTED, 2], [Flag.LATE, 0, Flag.COLLISION]
    assert figures.decided_at_once(made).tolist() == [True, False, False]
    assert figures.is_sorted(made).tolist() == [True, False, True]


def test_recovery_is_when_a_tenth_of_a_second_is_normal_again() -> None:
    at_s = np.arange(0, 2, 0.01)
    latency = np.where((at_s >= 0.5) & (at_s < 0.8), 0.03, 0.004)
    assert figures.recovery_s(at_s, latency, 0.5, 2.0, 0.004) == pytest.approx(0.25, abs=0.011)
    assert figures.recovery_s(at_s, latency, 1.0, 2.0, 0.004) == 0.0
    assert figures.recovery_s(at_s, latency + 0.01, 0.5, 2.0, 0.004) is None
    assert figures.recovery_s(at_s[:0], latency[:0], 0.5, 2.0, 0.004) is None


def test_headroom_ends_with_the_first_speed_that_is_too_high() -> None:
    steps, made, began = [], [], 50.0
    for number, (speed, sorted_x) in enumerate([(1.5, 1.5), (2.0, 2.0), (3.0, 2.5), (4.0, 4.0)]):
        one = np.zeros(100, ARRIVAL_DTYPE)
        one["sample_index"] = 300000 * number + np.linspace(0, 299999, 100).astype(int)
        one["t_received"] = began + 0.01 + (one["sample_index"] - 300000 * number) / RATE / sorted_x
        span = {"from_sample": 300000 * number, "to_sample": 300000 * (number + 1), "began": began, "ended": began + 10 / speed}
        steps.append({"speed": speed, **span})
        made.append(one)
        began += 10 / speed
    found = figures.headroom(np.concatenate(made), steps, RATE)
    assert found["kept_up_x"] == 2.0 and found["sorted_x"] == pytest.approx(2.5, rel=1e-3)
    assert [step["kept_up"] for step in found["steps"]] == [True, True, False]
    assert found["steps"][2]["behind_s"] == pytest.approx(10 * (1 / 2.5 - 1 / 3) * 0.875, rel=0.1)
    silent = figures.headroom(made[0][:0], steps[:1], RATE)
    assert silent["kept_up_x"] == 1.0 and silent["steps"][0]["behind_s"] is None


def test_usage_is_that_between_two_times() -> None:
    looks = [(float(t), 100.0 + t, 0.5 * t, {(7, "python"): 0.25 * t}) for t in range(10)]
    used = figures.usage(looks, 2.0, 6.0)
    assert used["cpu"] == pytest.approx(0.5) and used["threads"] == {(7, "python"): pytest.approx(0.25)}
    assert used["rss_slope_mb_per_min"] == pytest.approx(60) and used["rss_max_mb"] == 109
    assert figures.usage(looks, 20.0, 30.0) == {}


def test_latency_counts_from_the_first_spike_after_the_warm_up_that_is_in_time() -> None:
    spikes = np.zeros(5, SPIKE_DTYPE)
    spikes["sample_index"] = [90, 100, 110, 120, 130]
    spikes["flags"] = [0, Flag.LATE, Flag.LATE | Flag.NEAR_GAP, Flag.NEAR_GAP, 0]
    assert first_in_time(spikes, 100.0, 999) == 120
    assert first_in_time(spikes[:3], 100.0, 999) == 999


# ---- the whole ----


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the result of a real run with every fault, over the loopback."""
    command = [sys.executable, "-m", "streamsort", "bench", "sim:channels=4,units=3,rates_hz=12:20,snr=8:15,seconds=8,seed=4"]
    command += ["--seconds", "2", "--warmup-s", "8", "--encoder", "light", "--json", "--fault", "stall=300ms,loss=2e-2,jitter=2ms"]
    command += ["--fault", "burst=3x,slow-encoder=5ms,slow-subscriber"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    picture = tmp_path_factory.mktemp("bench") / "out.png"
    draws = importlib.util.find_spec("matplotlib") is not None
    command += ["--picture", str(picture)] if draws else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=env)
    assert done.returncode == 0, done.stderr
    assert not draws or picture.read_bytes().startswith(b"\x89PNG")
    return dict(json.loads(done.stdout))


def test_a_clean_stretch_is_measured(report: dict[str, Any]) -> None:
    clean, latency = report["clean"], report["clean"]["latency_ms"]
    assert report["n_units"] >= 3 and 0 < report["catch_up_s"] < 60 and report["spikes_lost"] == report["samples_unaccounted"] == 0
    assert clean["samples_lost"] == {} and clean["seconds"] == pytest.approx(2, abs=0.01) and clean["spikes_per_s"] > 20
    assert report["look_ahead_ms"] < latency["floor"]["p50"] < report["look_ahead_ms"] + 1.1
    assert latency["floor"]["p50"] < latency["total"]["p50"] <= latency["total"]["p99"] <= latency["total"]["max"]
    assert latency["compute"]["p50"] > 0 and clean["accuracy"]["mean"] > 0.5 and clean["empty_loop_ms"]["n"] > 500
    if sys.platform == "linux":
        assert {"sort", "acquire"} <= clean["cpu_threads"].keys() and clean["cpu"] > 0 and clean["rss_max_mb"] > 50


def test_what_was_injected_is_what_the_sorter_counted(report: dict[str, Any]) -> None:
    lossy, burst = report["faults"]
    assert lossy["injected"]["stalls"] == 1 and lossy["injected"]["chunks_delayed"] >= 2000
    assert lossy["samples_lost"] == {"gap": lossy["injected"]["samples_dropped"]} and lossy["losses_counted"]
    assert report["samples_counted_lost"] == lossy["injected"]["samples_dropped"] > 0
    assert lossy["latency_ms"]["total"]["max"] > 100 and lossy["deadline_misses"] > 0
    assert burst["injected"]["encoder_calls_slowed"] > 0 and burst["injected"]["subscribers_not_reading"] == 1
    assert burst["injected"]["spikes_added"] > 0 and burst["seconds"] == pytest.approx(5, abs=0.01)
    assert burst["spikes_per_s"] > 1.5 * report["clean"]["spikes_per_s"] and burst["samples_lost"] == {}
    assert all(0 <= phase["accuracy"]["mean"] <= 1 for phase in report["faults"])


def test_the_table_names_what_was_measured(report: dict[str, Any]) -> None:
    text = "\n".join(table(report))
    for words in ("trough to subscriber", "compute", "empty loop", "accuracy", "stall=300ms,loss=2e-2", "encoder calls slowed"):
        assert words in text
    assert "UNCOUNTED" not in text and "NOT THE SAME" not in text


def test_two_results_are_compared(report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slower = json.loads(json.dumps(report))
    slower["clean"]["latency_ms"]["total"]["p99.9"] = 2 * report["clean"]["latency_ms"]["total"]["p99.9"]
    for name, one in (("a.json", report), ("b.json", slower)):
        (tmp_path / name).write_text(json.dumps(one))
    assert main(["bench", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    ratios = {line[:36].strip(): line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert ratios["trough to subscriber p99.9 ms"] == "2.00" and ratios["trough to subscriber p50 ms"] == "1.00"
    assert any(line.startswith("burst=3x,slow-encoder=5ms,slow-subscriber p99") for line in comparison(report, slower))
