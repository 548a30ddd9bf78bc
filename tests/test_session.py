"""The session directory: what goes in comes out, at any moment, after a kill and on a failing disk."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from streamsort import session as session_module
from streamsort.errors import StreamsortError
from streamsort.probe import Probe
from streamsort.records import SPIKE_DTYPE, Gap, Output
from streamsort.session import HEADER_BYTES, Session, SessionWriter

pytestmark = pytest.mark.timeout(20)
RATE = 30000.0


def spikes_from(start: int, n: int) -> NDArray[Any]:
    spikes = np.zeros(n, SPIKE_DTYPE)
    spikes["sample_index"] = np.arange(start, start + n)
    spikes["unit_id"] = spikes["sample_index"] % 7
    spikes["amplitude_uv"] = -50.5
    return spikes


def output(start: int, n: int, through_s: float, **more: Any) -> Output:
    return Output(through_sample=int(through_s * RATE), spikes=spikes_from(start, n), **more)


def make_writer(path: Path, **more: Any) -> SessionWriter:
    return SessionWriter(path, {"model": {"name": "cnn"}}, Probe.linear(4), RATE, **more)


def test_everything_published_is_read_back(tmp_path: Path) -> None:
    writer = make_writer(tmp_path / "s")
    event = {"event": "born", "sample_index": np.int64(5), "unit_id": np.int32(1), "into": None, "reason": "new"}
    writer.publish(output(0, 3, 0.5, ledger=[event], gaps=[Gap(10, 20, "gap")], units=[{"unit_id": 1, "snr": np.float32(5)}]))
    writer.publish(output(3, 4, 0.9, units=[{"unit_id": 1}, {"unit_id": 2}]))
    writer.save_templates({"unit_ids": np.array([1, 2]), "templates": np.ones((2, 3, 4), np.float32)})
    writer.close()
    session = Session(tmp_path / "s")
    np.testing.assert_array_equal(session.spikes, spikes_from(0, 7))
    assert session.ledger == [{"event": "born", "sample_index": 5, "unit_id": 1, "into": None, "reason": "new"}]
    assert session.gaps == [Gap(10, 20, "gap")]
    assert session.units == [{"unit_id": 1}, {"unit_id": 2}]
    assert session.sampling_frequency == RATE
    np.testing.assert_array_equal(session.probe.channel_locations, Probe.linear(4).channel_locations)
    assert session.templates["templates"].shape == (2, 3, 4)


def test_manifest_tells_what_ran_and_how_it_ended(tmp_path: Path) -> None:
    writer = make_writer(tmp_path / "s")
    running = Session(tmp_path / "s").manifest
    assert running["model"] == {"name": "cnn"} and running["session"] == writer.session
    assert running["clean"] is False and running["ended_at"] is None
    assert running["versions"]["numpy"] == np.__version__
    writer.publish(output(0, 5, 2.0))
    writer.close()
    ended = Session(tmp_path / "s").manifest
    assert ended["clean"] is True and ended["ended_at"] >= ended["started_at"]
    assert ended["counters"]["n_spikes"] == 5 and ended["counters"]["through_sample"] == 60000


def test_session_uuid_of_the_caller_is_kept(tmp_path: Path) -> None:
    writer = SessionWriter(tmp_path / "s", {"session": "abc"}, Probe.linear(1), RATE)
    assert writer.session == "abc"
    writer.clean = False
    writer.close()
    assert Session(tmp_path / "s").manifest["clean"] is False


def test_close_twice_and_publish_after_close_do_nothing(tmp_path: Path) -> None:
    writer = make_writer(tmp_path / "s")
    writer.close()
    manifest = Session(tmp_path / "s").manifest
    writer.publish(output(0, 5, 2.0))
    writer.close()
    assert len(Session(tmp_path / "s").spikes) == 0 and Session(tmp_path / "s").manifest == manifest


def test_existing_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(StreamsortError, match="exists already"):
        make_writer(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StreamsortError, match="cannot be written") as caught:
        make_writer(tmp_path / "file" / "s")
    assert "\n" not in str(caught.value)


def test_written_once_a_second_of_the_stream(tmp_path: Path) -> None:
    writer = make_writer(tmp_path / "s")
    writer.publish(output(0, 3, 0.5))
    assert len(np.load(tmp_path / "s" / "spikes.npy")) == 0
    writer.publish(output(3, 3, 1.0))
    assert len(np.load(tmp_path / "s" / "spikes.npy")) == 6
    writer.publish(output(6, 3, 1.9))
    assert len(np.load(tmp_path / "s" / "spikes.npy")) == 6
    writer.publish(output(9, 3, 2.0))
    assert len(np.load(tmp_path / "s" / "spikes.npy")) == 12
    writer.close()


@pytest.mark.parametrize("cut", [1, 31, 32, 33, 32 * 5])
def test_torn_tail_and_stale_header_are_read_by_file_size(tmp_path: Path, cut: int) -> None:
    writer = make_writer(tmp_path / "s")
    writer.publish(output(0, 20, 1.0))
    writer.close()
    path = tmp_path / "s" / "spikes.npy"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - cut])
    n_whole = (20 * 32 - cut) // 32
    np.testing.assert_array_equal(Session(tmp_path / "s").spikes, spikes_from(0, n_whole))
    path.write_bytes(session_module._npy_header(3) + data[HEADER_BYTES:])
    assert len(np.load(path)) == 3 and len(Session(tmp_path / "s").spikes) == 20


def test_torn_last_line_is_left_out_and_a_broken_one_is_an_error(tmp_path: Path) -> None:
    make_writer(tmp_path / "s").close()
    (tmp_path / "s" / "ledger.jsonl").write_text('{"event": "born"}\n{"event": "mer')
    assert Session(tmp_path / "s").ledger == [{"event": "born"}]
    (tmp_path / "s" / "ledger.jsonl").write_text('{"event": "born"}\n{"event": \n')
    with pytest.raises(StreamsortError, match="line 2 is not JSON"):
        _ = Session(tmp_path / "s").ledger


def break_missing(path: Path) -> None:
    (path / "manifest.json").unlink()


def break_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("{")


def break_manifest_keys(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


def break_spikes(path: Path) -> None:
    (path / "spikes.npy").write_bytes(b"no npy")


def break_spikes_dtype(path: Path) -> None:
    np.save(path / "spikes.npy", np.zeros(3))


def break_ledger(path: Path) -> None:
    (path / "ledger.jsonl").unlink()


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (break_missing, "expected a session directory"),
        (break_manifest, "manifest.json is not JSON"),
        (break_manifest_keys, "no sampling_frequency"),
        (break_spikes, "spikes.npy cannot be read"),
        (break_spikes_dtype, "records float64"),
        (break_ledger, "ledger.jsonl cannot be read"),
    ],
)
def test_broken_session_is_a_one_line_error(tmp_path: Path, break_it: Callable[[Path], None], says: str) -> None:
    make_writer(tmp_path / "s").close()
    break_it(tmp_path / "s")
    with pytest.raises(StreamsortError, match=says) as caught:
        session = Session(tmp_path / "s")
        _ = session.spikes, session.ledger
    assert "\n" not in str(caught.value)


CHILD = """
import sys
from pathlib import Path
from tests.test_session import make_writer, output
writer = make_writer(Path(sys.argv[1]), flush_s=0.001)
k = 0
while True:
    writer.publish(output(37 * k, 37, (k + 1) / 1000, ledger=[{"event": "born", "unit_id": k}]))
    k += 1
"""


def start_child(code: str, *args: str) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[1]
    return subprocess.Popen([sys.executable, "-c", code, *args], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})


@pytest.mark.parametrize("n_bytes", [20_000, 300_000])
def test_killed_while_writing_loses_nothing_that_was_flushed(tmp_path: Path, n_bytes: int) -> None:
    path = tmp_path / "s"
    child = start_child(CHILD, str(path))
    try:
        deadline = time.monotonic() + 15
        while not (path / "spikes.npy").exists() or (path / "spikes.npy").stat().st_size < n_bytes:
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.001)
    finally:
        child.kill()  # SIGKILL, by the name it also has on Windows
        child.wait()
    session = Session(path)
    n_loaded = len(np.load(path / "spikes.npy"))
    assert session.manifest["clean"] is False
    assert len(session.spikes) >= max(n_loaded, (n_bytes - HEADER_BYTES) // 32)
    np.testing.assert_array_equal(session.spikes, spikes_from(0, len(session.spikes)))
    assert [event["unit_id"] for event in session.ledger] == list(range(len(session.ledger)))


FULL_DISK = """
import resource, sys
from pathlib import Path
from tests.test_session import make_writer, output
writer = make_writer(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
for k in range(10):
    writer.publish(output(30 * k, 30, k + 1.0))
assert writer.write_errors > 0 and writer.last_error and writer.n_lost == 0
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.publish(output(300, 30, 11.0))
writer.close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a Unix thing")
def test_disk_that_is_full_for_a_while_loses_nothing(tmp_path: Path) -> None:
    assert start_child(FULL_DISK, str(tmp_path / "s")).wait(timeout=15) == 0
    session = Session(tmp_path / "s")
    np.testing.assert_array_equal(session.spikes, spikes_from(0, 330))
    assert session.manifest["counters"]["write_errors"] > 0 and session.manifest["clean"] is True


def test_disk_that_stays_full_is_counted_up_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = make_writer(tmp_path / "s")
    writer.publish(output(0, 10, 1.0))
    monkeypatch.setattr(session_module, "MAX_WAITING_BYTES", 32 * 25)

    def refuse(self: object, position: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session_module._AppendedFile, "_write", refuse)
    for k in range(1, 5):
        writer.publish(output(10 * k, 10, 1.0 + k))
    assert writer.n_lost == 20  # two of the four outputs fit into memory
    writer.close()
    counters = json.loads((tmp_path / "s" / "manifest.json").read_bytes())
    assert counters["clean"] is False and counters["counters"]["n_lost"] == 40
    np.testing.assert_array_equal(Session(tmp_path / "s").spikes, spikes_from(0, 10))
