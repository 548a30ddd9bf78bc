"""The commands as a user types them: what they print, what they leave behind, and how they end."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamsort.cli import main
from streamsort.encode import shipped_model
from streamsort.probe import Probe
from streamsort.records import SPIKE_DTYPE
from streamsort.session import Session
from streamsort.simulate import SimulationConfig, write_recording

COMMANDS = ("demo", "run", "sort", "score", "replay", "listen", "simulate", "doctor", "train", "refresh", "bench")
ROOT = Path(__file__).parent.parent
PATIENCE_S = 60.0


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def streamsort(*arguments: str | Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "streamsort", *map(str, arguments)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recording and its truth: 20 s of a tetrode."""
    folder = tmp_path_factory.mktemp("simulated") / "sim"
    write_recording(SimulationConfig(seconds=20, probe_name="tetrode", n_units=3, rates_hz=(12, 20), snr=(8, 15), seed=4), folder)
    return folder


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


# ---- help ----


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"\n  streamsort {command}" in capsys.readouterr().out.partition("example")[2]


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.findall(r"^    (\w+)", capsys.readouterr().out, re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize("arguments", [["sort", "x"], ["run", "sim:", "--nonsense"], ["frobnicate"], []])
def test_arguments_that_do_not_exist_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: streamsort" in capsys.readouterr().err


# ---- what the user got wrong ----


def raw(folder: Path, sidecar: dict[str, Any], n_bytes: int = 8000) -> Path:
    (folder / "rec.raw").write_bytes(bytes(n_bytes))
    whole = {"sampling_frequency": 30000.0, "n_channels": 4, "dtype": "int16", "gain_uv": 0.195}
    (folder / "rec.json").write_text(json.dumps({**whole, **sidecar}))
    return folder / "rec.raw"


def sort_raw(sidecar: dict[str, Any], n_bytes: int = 8000) -> Callable[[Path], list[str | Path]]:
    return lambda folder: ["sort", raw(folder, sidecar, n_bytes), "--session", folder / "out"]


def with_probe(folder: Path) -> list[str | Path]:
    Probe.linear(5).to_probeinterface(folder / "probe.json")
    return ["sort", raw(folder, {}), "--session", folder / "out", "--probe", folder / "probe.json"]


def with_arguments(*arguments: str) -> Callable[[Path], list[str | Path]]:
    return lambda folder: ["sort", raw(folder, {}), "--session", folder / "out", *arguments]


def with_config(text: str) -> Callable[[Path], list[str | Path]]:
    def arguments(folder: Path) -> list[str | Path]:
        (folder / "config.toml").write_text(text)
        return ["sort", raw(folder, {}), "--session", folder / "out", "--config", folder / "config.toml"]

    return arguments


def with_model(changes: dict[str, Any] | None, content: bytes | None = None) -> Callable[[Path], list[str | Path]]:
    def arguments(folder: Path) -> list[str | Path]:
        contract = json.loads(shipped_model().with_suffix(".json").read_text())
        shutil.copy(shipped_model(), folder / "model.onnx")
        if content is not None:
            (folder / "model.onnx").write_bytes(content)
        if changes is not None:
            (folder / "model.json").write_text(json.dumps({**contract, **changes}))
        return ["sort", raw(folder, {}), "--session", folder / "out", "--encoder", folder / "model.onnx"]

    return arguments


def existing_session(folder: Path) -> list[str | Path]:
    (folder / "out").mkdir()
    return ["sort", raw(folder, {}), "--session", folder / "out"]


def occupied(folder: Path) -> list[str | Path]:
    (folder / "file").write_text("")
    return ["simulate", folder]


MISTAKES: dict[str, tuple[Callable[[Path], list[str | Path]], str]] = {
    "missing recording": (lambda folder: ["sort", folder / "none", "--session", folder / "out"], "no such file"),
    "truncated recording": (sort_raw({"n_samples": 1001}), "1000 samples, expected 1001"),
    "torn recording": (sort_raw({}, 7999), "expected a multiple of 8"),
    "empty recording": (sort_raw({}, 0), "expected at least one row"),
    "wrong channel count": (sort_raw({"n_channels": 3}), "expected a multiple of 6"),
    "rate 0": (sort_raw({"sampling_frequency": 0}), "sampling_frequency 0, expected a positive number"),
    "unknown dtype": (sort_raw({"dtype": "int12"}), "dtype 'int12', expected one of"),
    "no gain and cut short": (sort_raw({"gain_uv": None, "n_samples": 5}), "expected 5"),
    "probe of another size": (with_probe, "5 contacts, expected 4"),
    "missing probe": (lambda folder: ["run", "sim:", "--probe", folder / "none.json"], "no such file"),
    "unknown config key": (with_config("[detect]\ndetect_treshold = 5"), "did you mean detect.detect_threshold?"),
    "config out of range": (with_config("warmup_s = -1"), "warmup_s = -1.0, expected"),
    "config no TOML": (with_config("detect = ["), "not TOML"),
    "missing config": (lambda folder: ["run", "sim:", "--config", folder / "none.toml"], "no such file"),
    "model without contract": (with_model(None), "expected it beside the .onnx"),
    "model with another hash": (with_model({"sha256": "0" * 64}), "sha256"),
    "model of another shape": (with_model({"n_dims": 7}), "expected one"),
    "model of another window": (with_model({"ms_after": 2.0}), "n_samples = 48, expected"),
    "no model": (with_model({}, b"not a model"), "sha256"),
    "encoder of no name": (with_arguments("--encoder", "fast"), "encode.encoder = 'fast', expected auto, full, light or the path"),
    "missing encoder": (with_arguments("--encoder", "none.onnx"), "none.onnx: no such file"),
    "units of the stream's engine": (with_arguments("--units", "3"), "finds the number itself"),
    "no units": (with_arguments("--engine", "huidurep-gmm", "--units", "0"), "units 0, expected 1 or more"),
    "session exists": (existing_session, "exists already"),
    "live stream to sort": (lambda folder: ["sort", "lsl:x", "--session", folder / "out"], "expected a recording"),
    "unknown source": (lambda folder: ["run", "http://localhost"], "unknown kind 'http'"),
    "unknown simulation key": (lambda folder: ["run", "sim:second=3"], "did you mean seconds?"),
    "speed of a live stream": (lambda folder: ["run", "tcp://127.0.0.1:1", "--speed", "2"], "sets its own pace"),
    "speed 0": (lambda folder: ["run", "sim:", "--speed", "0"], "expected a positive multiple"),
    "unknown sink": (lambda folder: ["run", "sim:probe=tetrode", "--publish", "udp://x"], "unknown kind 'udp'"),
    "no session": (lambda folder: ["score", folder, folder], "expected a session directory"),
    "folder in use": (occupied, "expected a new or empty folder"),
    "simulated length": (
        lambda folder: ["simulate", folder / "s", "--seconds", "-3"],
        "seconds = -3.0, expected a positive number",
    ),
    "replay to nowhere": (lambda folder: ["replay", "sim:", "--to", "file:x"], "expected lsl:NAME or tcp://host:port"),
    "no listener": (
        lambda folder: ["replay", "sim:", "--to", "tcp://127.0.0.1:*", "--timeout", "0.1"],
        "nobody listened for 0.1 s",
    ),
    "no address": (lambda folder: ["listen", "here"], "expected an address"),
    "short demo": (lambda folder: ["demo", "--seconds", "1"], "seconds = 1, expected 10 or more"),
}


def one_line(captured: str) -> str:
    lines = captured.splitlines()
    assert len(lines) == 1 and lines[0].startswith("streamsort: "), captured
    return lines[0]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = MISTAKES[name]
    assert main([str(part) for part in arguments(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert words in one_line(err)
    assert out == ""


def test_a_mistake_in_a_real_process_has_no_traceback(tmp_path: Path) -> None:
    process = streamsort("score", tmp_path, tmp_path)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert "Traceback" not in one_line(err)


def test_a_path_that_may_not_be_read_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    assert main(["run", "sim:", "--config", str(tmp_path / "c.toml")]) == 2
    assert one_line(capsys.readouterr().err).endswith("c.toml: Permission denied")


def test_a_silent_publisher_is_given_up(free_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"tcp://127.0.0.1:{free_port}"
    assert main(["run", url, "--timeout", "0.3"]) == 2
    assert "nothing arrived" in one_line(capsys.readouterr().err)
    assert main(["listen", url, "--timeout", "0.3"]) == 2
    assert "nothing arrived" in one_line(capsys.readouterr().err)


def test_a_port_that_is_taken_leaves_no_session(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        url = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        arguments = ["run", "sim:probe=tetrode", "--publish", url, "--session", str(tmp_path / "out")]
        assert main(arguments) == 2
    assert "the port is taken" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.lsl
def test_a_missing_lsl_stream_names_those_that_are_there(lsl_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pylsl

    outlet = pylsl.StreamOutlet(pylsl.StreamInfo("somebody", "Electrophysiology", 4, 1000.0, pylsl.cf_int16, "s"))
    assert main(["run", "lsl:nobody", "--timeout", "1"]) == 2
    assert "there are: somebody (Electrophysiology, 4 channels, 1000 Hz)" in one_line(capsys.readouterr().err)
    del outlet


WITHOUT_TORCH = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else find(name, package)
from streamsort.cli import main
sys.exit(main(["train", "small", "--out", "x"]))
"""


def test_train_without_torch_names_the_extra() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], env=environment(), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 2
    assert "torch is not installed, expected pip install 'streamsort[train]'" in one_line(done.stderr)


# ---- sort and score ----


def test_a_recording_is_sorted_and_scored(recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sessions = [tmp_path / "one", tmp_path / "two"]
    for session, chunk_ms in zip(sessions, ("7", "100"), strict=True):
        arguments = [
            "sort",
            recording / "recording",
            "--session",
            session,
            "--warmup-s",
            "10",
            "--seed",
            "4",
            "--chunk-ms",
            chunk_ms,
        ]
        assert main([str(part) for part in arguments]) == 0
    assert f"session  {sessions[1]}" in capsys.readouterr().out
    spikes = np.load(sessions[0] / "spikes.npy")
    assert spikes.dtype == SPIKE_DTYPE
    assert len(spikes) > 200
    np.testing.assert_array_equal(
        *(np.sort(each, order=["sample_index", "unit_id"]) for each in (spikes, Session(sessions[1]).spikes))
    )

    manifest = Session(sessions[0]).manifest
    assert manifest["clean"] is True
    assert manifest["config"]["warmup_s"] == 10.0 and manifest["config"]["seed"] == 4
    model = manifest["model"]
    assert model["choice"]["asked"] == "auto" and model["choice"]["used"] in ("full", "light")
    contract = shipped_model(model["choice"]["used"]).with_suffix(".json")
    assert model["sha256"] == json.loads(contract.read_text())["sha256"]
    assert manifest["engine"] == "streamsort"
    assert manifest["model"]["provider"] in ("cpu", "cuda")
    assert manifest["stream"]["n_channels"] == 4 and manifest["stream"]["url"] == str(recording / "recording")
    assert manifest["command"][0] == "streamsort"
    assert (sessions[0] / "templates.npz").exists()

    assert main(["score", str(sessions[0]), str(recording / "truth"), "--from-s", "10", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["n_units_true"] == 3
    assert result["accuracy_mean"] > 0.7
    assert {"accuracy_median", "precision_mean", "recall_mean", "n_units_found"} < set(result)
    assert sum(unit["n_true"] for unit in result["units"]) == true_spikes(recording, 10.0, 20.0)

    assert main(["score", str(sessions[0]), str(recording / "truth"), "--from-s", "11", "--to-s", "14"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["true", "unit", "found", "as", "spikes", "accuracy", "precision", "recall"]
    assert sum(int(line[21:27]) for line in table[1:4]) == true_spikes(recording, 11.0, 14.0)


def true_spikes(recording: Path, from_s: float, to_s: float) -> int:
    times = np.load(recording / "truth" / "spikes.npy")["sample_index"] / 30000.0
    return int(((times >= from_s) & (times < to_s)).sum())


def test_samples_that_are_no_numbers_end_up_in_the_gap_log(tmp_path: Path, rng: np.random.Generator) -> None:
    traces = rng.normal(0, 8, (4 * 30000, 4)).astype(np.float32)
    traces[70000:70100, 2] = np.nan
    traces[80000, :] = np.inf
    sidecar = {"sampling_frequency": 30000, "n_channels": 4, "dtype": "float32", "gain_uv": 1.0}
    (tmp_path / "rec.raw").write_bytes(traces.tobytes())
    (tmp_path / "rec.json").write_text(json.dumps(sidecar))
    assert main(["sort", str(tmp_path / "rec.raw"), "--session", str(tmp_path / "out"), "--warmup-s", "3"]) == 0
    gaps = [(gap.start_sample, gap.kind) for gap in Session(tmp_path / "out").gaps]
    assert (70000, "nan") in gaps and (80000, "nan") in gaps


def test_simulate_writes_what_can_be_sorted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "simulate",
        tmp_path / "s",
        "--seconds",
        "2",
        "--probe",
        "tetrode",
        "--units",
        "2",
        "--drift-um",
        "5",
        "--snr",
        "6",
        "9",
    ]
    assert main([str(part) for part in arguments]) == 0
    assert "spikes of 2 units" in capsys.readouterr().out
    about = json.loads((tmp_path / "s" / "simulation.json").read_text())["config"]
    assert (about["n_units"], about["drift_um"], about["snr"]) == (2, 5.0, [6.0, 9.0])


# ---- live ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_mid_run_drains_saves_and_sums_up(number: signal.Signals, tmp_path: Path, free_port: int) -> None:
    url, source = f"tcp://127.0.0.1:{free_port}", "sim:seconds=600,probe=tetrode,units=3,rates_hz=8:12,snr=8:15"
    session = tmp_path / "out"
    run = streamsort("run", source, "--publish", url, "--session", session, "--warmup-s", "3")
    listen = streamsort("listen", url, "--json")
    try:
        assert run.stderr is not None
        lines: list[str] = []
        while not lines or "spikes/s" not in lines[-1]:
            lines.append(run.stderr.readline())
            assert lines[-1], "".join(lines)
        assert re.search(r"0:00:0\d +\d+ units +[\d.]+ spikes/s +latency p50 +[\d.]+ +p99 +[\d.]+ ms +lost 0 samples", lines[-1])
        listen.send_signal(number)
        heard, _ = listen.communicate(timeout=PATIENCE_S)
        run.send_signal(number)
        out, err = run.communicate(timeout=PATIENCE_S)
    finally:
        run.kill()
        listen.kill()
    assert (run.returncode, listen.returncode) == (0, 0), err
    assert "Traceback" not in err
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    saved = Session(session)
    assert saved.manifest["clean"] is True
    assert rows["spikes"].startswith(f"{len(saved.spikes)}, ")
    assert rows["session"] == str(session)
    assert int(json.loads(heard)["spikes"]) > 0
    assert saved.manifest["counters"]["n_spikes"] == len(saved.spikes) > 0
    assert (np.diff(saved.spikes["sample_index"]) >= -120).all()  # a hidden one comes out up to 4 ms late


def test_a_replay_is_sorted_without_loss(free_port: int) -> None:
    url, source = f"tcp://127.0.0.1:{free_port}", "sim:seconds=6,probe=tetrode,units=2"
    replay = streamsort("replay", source, "--to", url, "--json")
    run = streamsort("run", url, "--seconds", "5", "--warmup-s", "2.5", "--timeout", "30", "--json")
    try:
        out, err = run.communicate(timeout=PATIENCE_S)
        sent, _ = replay.communicate(timeout=PATIENCE_S)
    finally:
        run.kill()
        replay.kill()
    assert (run.returncode, replay.returncode) == (0, 0), err
    figures = json.loads(out)
    assert figures["samples_lost"] == 0
    assert 150_000 <= figures["samples_acquired"] <= json.loads(sent)["samples_sent"] == 180_000
    assert figures["calibrated"] is True


def test_a_second_ctrl_c_aborts() -> None:
    from streamsort.commands.terminal import Aborted, Interrupts

    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.requested
        with pytest.raises(Aborted):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(PATIENCE_S)  # never: the signal comes first
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


LIVE_PATH = """
import sys
import numpy as np
import streamsort.commands.run, streamsort.sources.lsl, streamsort.sources.zmq, streamsort.sinks.lsl, streamsort.sinks.zmq
import streamsort.client, streamsort.session
from streamsort.cli import main
main(["run", "sim:seconds=3,probe=tetrode,units=1", "--speed", "20", "--warmup-s", "2.5", "--publish", "tcp://127.0.0.1:*"])
# river loads the top of scikit-learn where it is installed
print(sorted({"torch", "onnx", "onnxscript", "pandas", "matplotlib", "sklearn.mixture", "spikeinterface"} & set(sys.modules)))
"""


def test_a_live_run_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIVE_PATH], env=environment(), capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


@pytest.mark.lsl
def test_the_doctor_finds_this_machine_well(lsl_config: Path) -> None:
    process = streamsort("doctor", "--json")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, out + err
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert checks["LSL loopback"]["ok"] and checks["ZeroMQ loopback"]["ok"] and checks["encoder light"]["ok"]
    assert re.search(r"[\d.]+ ms for a spike, \d+ spikes/s", checks["encoder full"]["text"])
    assert re.fullmatch(r"would take ((full|light) for 4, .* channels|light: scores .*)", checks["encoder auto"]["text"])
    assert re.search(r"[\d.]+ ms \(\d+ samples", checks["look-ahead"]["text"])
