"""LSL both ways over real outlets and inlets on this machine, and the arithmetic behind it without any."""

import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import take
from test_recording import SAMPLES, write_raw, write_spikeinterface

from streamsort.errors import StreamsortError
from streamsort.liblsl import load_pylsl, read_description
from streamsort.probe import Probe
from streamsort.records import SPIKE_DTYPE, Chunk, Gap, Output, StreamInfo
from streamsort.sinks import open_sink
from streamsort.sources import open_source
from streamsort.sources.gaps import GapFinder
from streamsort.sources.lsl import LslSource, predicate

pytestmark = [pytest.mark.lsl, pytest.mark.timeout(30), pytest.mark.usefixtures("lsl_config")]

FS = 30000.0
PLAYER = (
    "import sys; from streamsort.player import replay; from streamsort.sources import open_source;"
    "print(replay(open_source(sys.argv[1], speed=1.0, chunk_ms=float(sys.argv[3])), sys.argv[2], wait_s=20.0))"
)


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4().hex[:8]}"


def outlet(name: str, n_channels: int = 4, rate_hz: float = FS, kind: str = "int16", desc: Any = None) -> Any:
    import pylsl

    info = pylsl.StreamInfo(name, "ephys", n_channels, rate_hz, kind, f"id-{name}")
    if desc is not None:
        desc(info)
    return pylsl.StreamOutlet(info, 0, 10)


# ---- counting and stamps, without LSL


class Sender:
    """A device at FS whose software pushes, with stamps of the moment it does so, to a finder; time is simulated."""

    def __init__(self, push_samples: int = 300, jitter_s: float = 0.0003, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.finder = GapFinder(FS, 1, np.dtype(np.int32))
        self.push_samples = push_samples
        self.jitter_s = jitter_s
        self.taken = 0  # by the device
        self.blocked_until_s = 0.0
        self.placed: list[tuple[int, np.ndarray, tuple[Gap, ...]]] = []

    def run(self, n_pushes: int) -> None:
        for _ in range(n_pushes):
            self.taken += self.push_samples
            due_s = 1000.0 + self.taken / FS + self.rng.exponential(self.jitter_s)
            at_s = max(due_s, self.blocked_until_s)
            if at_s > due_s:
                self.blocked_until_s += 1e-4  # the time of one push while it catches up
            values = np.arange(self.taken - self.push_samples, self.taken, dtype=np.int32)[:, None]
            stamps = at_s - np.arange(self.push_samples - 1, -1, -1) / FS
            split = int(self.rng.integers(0, self.push_samples))
            for part in (slice(0, split), slice(split, None)):
                self.placed += self.finder.place(values[part], stamps[part], at_s)

    @property
    def gaps(self) -> list[Gap]:
        return [gap for _, _, gaps in self.placed for gap in gaps]


def test_jitter_is_not_a_gap() -> None:
    for push_samples in (30, 300, 600):
        sender = Sender(push_samples)
        sender.run(60_000 // push_samples)
        assert sender.gaps == []
        np.testing.assert_array_equal(np.concatenate([traces for _, traces, _ in sender.placed])[:, 0], np.arange(sender.taken))
        starts = [start for start, _, _ in sender.placed]
        assert starts == [int(traces[0, 0]) for _, traces, _ in sender.placed]


@pytest.mark.parametrize("n_missing", [600, 3000, 53_100])
def test_missing_samples_become_one_gap_and_indices_stay_on_the_device_clock(n_missing: int) -> None:
    sender = Sender()
    sender.run(200)
    sender.taken += n_missing
    sender.run(200)
    (gap,) = sender.gaps
    assert gap.start_sample == 60_000 and gap.kind == "gap"
    assert abs(gap.n_samples - n_missing) < 0.002 * FS
    slip = [start - int(traces[0, 0]) for start, traces, _ in sender.placed if start > 60_000]
    assert len(set(slip)) == 1 and abs(slip[0]) < 0.002 * FS


@pytest.mark.parametrize("held_up_s", [0.015, 0.1, 1.0])
def test_a_sender_that_is_held_up_and_catches_up_lost_nothing(held_up_s: float) -> None:
    sender = Sender()
    sender.run(200)
    sender.blocked_until_s = 1000.0 + sender.taken / FS + held_up_s
    sender.run(400)
    assert sender.gaps == []
    assert sender.finder.next_sample == sender.taken


def test_held_samples_are_let_go_when_nothing_follows() -> None:
    finder = GapFinder(FS, 1, np.dtype(np.int16))
    rows, nothing = np.zeros((300, 1), np.int16), np.zeros((0, 1), np.int16)
    stamps = np.arange(300) / FS
    assert len(finder.place(rows, stamps, now=0.0)) == 1
    assert finder.place(rows, stamps + 1.01, now=1.02) == []
    assert finder.holding
    assert finder.place(nothing, np.zeros(0), now=1.03) == []
    (placed,) = finder.place(nothing, np.zeros(0), now=1.05)
    assert (placed.start_sample, len(placed.traces), placed.gaps) == (30_300, 300, (Gap(300, 30_000, "gap"),))
    assert not finder.holding
    assert finder.place(nothing, np.zeros(0), now=1.06) == []


@pytest.mark.parametrize("jump_s", [-500.0, 1e6])
def test_another_clock_starts_a_new_line_and_the_time_that_passed_is_the_gap(jump_s: float) -> None:
    finder = GapFinder(FS, 1, np.dtype(np.int16))
    rows = np.zeros((300, 1), np.int16)
    stamps = np.arange(300) / FS
    finder.place(rows, stamps, now=0.0)
    (placed,) = finder.place(rows, stamps + jump_s, now=2.0)
    assert placed.gaps == (Gap(300, 60_000 - 300, "gap"),)
    (placed,) = finder.place(rows, stamps + jump_s + 0.01, now=2.01)
    assert placed.gaps == () and placed.start_sample == 60_300
    assert finder.fit.t_origin(60_600) == pytest.approx(jump_s + 0.01 - 60_300 / FS, abs=1e-6)


def test_description() -> None:
    def xml(*channels: str) -> str:
        return f"<info><desc><channels>{''.join(f'<channel>{c}</channel>' for c in channels)}</channels></desc></info>"

    said = read_description(
        xml("<unit>microvolts</unit>", "<unit>V</unit>", "<unit>mV</unit>", "<unit>µV</unit>", "<unit>?</unit>", ""), 6
    )
    np.testing.assert_allclose(said.gain_uv, [1, 1e6, 1e3, 1, 1, 1])
    assert said.probe is None
    place = "<scaling_factor>0.5</scaling_factor><location><X>{}</X><Y>7</Y><Z>{}</Z><unit>{}</unit></location>"
    said = read_description(xml(place.format(1, 10, "mm"), place.format(2, 30, "mm")), 2)
    assert said.probe is not None
    np.testing.assert_allclose(said.probe.channel_locations, [[1000, 10_000], [2000, 30_000]])
    np.testing.assert_allclose(said.gain_uv, 0.5)
    for odd in ("<not xml", "", xml("", ""), "<info/>"):
        assert read_description(odd, 3).probe is None
        assert (read_description(odd, 3).gain_uv == 1).all()
    assert read_description(xml(place.format("x", 1, "um"), place.format(2, 3, "um")), 2).probe is None


def test_urls() -> None:
    assert predicate("lsl:my stream") == "name='my stream'"
    assert predicate("lsl:type=EEG,source_id=a1") == "type='EEG' and source_id='a1'"
    for bad in ("lsl:", "lsl:nam=x", "lsl:name=", "lsl:name=a,,type=b", "lsl:it's"):
        with pytest.raises(StreamsortError, match="expected lsl:NAME"):
            predicate(bad)
    with pytest.raises(StreamsortError, match="expected lsl:NAME"):
        open_sink("lsl:", info=StreamInfo("t", FS, 4, np.dtype(np.int16), np.ones(4, np.float32), None, live=True))


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pylsl", None)
    with pytest.raises(StreamsortError, match="liblsl was not found") as caught:
        open_source("lsl:anything")
    assert "\n" not in str(caught.value)


# ---- over a real connection


def test_replay_in_another_process_arrives_bit_identical(tmp_path: Path, name: str) -> None:
    samples = np.tile(SAMPLES, (30, 1))
    folder = write_spikeinterface(tmp_path, samples)
    with subprocess.Popen(
        [sys.executable, "-c", PLAYER, str(folder), f"lsl:{name}", "2"], stdout=subprocess.PIPE, text=True
    ) as player:
        try:
            with open_source(f"lsl:{name}", timeout_s=15.0) as source:
                chunks = take(source, len(samples))
            assert int(player.communicate(timeout=10)[0]) == len(samples)
        finally:
            player.kill()
    np.testing.assert_array_equal(np.concatenate([chunk.traces for chunk in chunks]), samples)
    assert [chunk.start_sample for chunk in chunks] == np.cumsum([0] + [chunk.n_samples for chunk in chunks[:-1]]).tolist()
    assert not any(chunk.gaps for chunk in chunks)
    assert {key: source.counters[key] for key in ("stalls", "reconnects", "missing_samples")} == dict.fromkeys(
        ("stalls", "reconnects", "missing_samples"), 0
    )
    info = source.info
    assert (info.name, info.sampling_frequency, info.n_channels, info.dtype, info.live) == (name, FS, 4, np.dtype(np.int16), True)
    np.testing.assert_allclose(info.gain_uv, 0.195)
    assert info.probe is not None
    np.testing.assert_allclose(info.probe.channel_locations[:, 1], [0, 25, 50, 75])
    late = np.array([chunk.t_acquired - (chunk.t_origin + (chunk.end_sample - 1) / FS) for chunk in chunks])
    assert late.min() > 0 and float(np.median(late)) < 0.05
    assert np.ptp([chunk.t_origin for chunk in chunks]) < 1e-3


@pytest.mark.parametrize("kind,dtype", [("float32", np.float32), ("double64", np.float64), ("int32", np.int32)])
def test_other_sample_types_arrive_as_float32(name: str, kind: str, dtype: Any) -> None:
    def volts(info: Any) -> None:
        info.set_channel_units("volts")

    out = outlet(name, kind=kind, desc=volts)
    probe = Probe.linear(4)
    with open_source(f"lsl:name={name},type=ephys", probe=probe) as source:
        assert out.wait_for_consumers(5)
        out.push_chunk(SAMPLES.astype(dtype))
        chunks = take(source, len(SAMPLES))
    assert source.info.dtype == np.float32 and source.info.probe is probe
    np.testing.assert_allclose(source.info.gain_uv, 1e6)
    got = np.concatenate([chunk.traces for chunk in chunks])
    assert got.dtype == np.float32 and all(chunk.traces.flags.writeable for chunk in chunks)
    np.testing.assert_array_equal(got, SAMPLES)


def test_what_is_not_there_or_does_not_fit_is_one_line(name: str) -> None:
    there = [outlet(name), outlet(f"{name}-irregular", rate_hz=0.0), outlet(f"{name}-text", kind="string")]
    with pytest.raises(StreamsortError) as caught:
        open_source(f"lsl:{name}-absent", timeout_s=0.3)
    assert f"{name} (ephys, 4 channels, 30000 Hz)" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(StreamsortError, match="no regular rate"):
        open_source(f"lsl:{name}-irregular")
    with pytest.raises(StreamsortError, match="a stream of text"):
        open_source(f"lsl:{name}-text")
    with pytest.raises(StreamsortError, match="probe has 3 contacts, expected 4"):
        open_source(f"lsl:{name}", probe=Probe.linear(3))
    assert len(there) == 3


def test_a_jump_of_the_stamps_is_a_gap(name: str) -> None:
    out = outlet(name)
    pylsl = load_pylsl()
    with open_source(f"lsl:{name}") as source:
        assert out.wait_for_consumers(5)
        now = pylsl.local_clock()
        out.push_chunk(SAMPLES, now)
        out.push_chunk(SAMPLES, now + 1000 / FS)
        out.push_chunk(SAMPLES, now + 1000 / FS + 4000 / FS)
        chunks = take(source, 6000)
    assert [gap for chunk in chunks for gap in chunk.gaps] == [Gap(2000, 3000, "gap")]
    assert source.counters["missing_samples"] == 3000
    np.testing.assert_array_equal(np.concatenate([chunk.traces for chunk in chunks]), np.tile(SAMPLES, (3, 1)))


def test_what_overflows_while_nobody_reads_is_a_gap(name: str) -> None:
    out = outlet(name, n_channels=1, kind="int32")
    pylsl = load_pylsl()
    n_samples = 150_000  # 5 s into a buffer of 2 s
    control = pylsl.StreamInlet(pylsl.resolve_byprop("name", name, 1, 5)[0], max_buflen=10)
    control.open_stream(5)
    with open_source(f"lsl:{name}") as source:
        assert isinstance(source, LslSource)
        assert out.wait_for_consumers(5)
        start_s = pylsl.local_clock() - n_samples / FS
        chunks = iter(source)
        for first in range(0, n_samples, 1000):
            out.push_chunk(np.arange(first, first + 1000, dtype=np.int32), start_s + (first + 999) / FS)
            if first == 0:
                begun = next(chunks)
        deadline = time.monotonic() + 10
        while control.samples_available() < n_samples or source._inlet.samples_available() < 2 * FS:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        rest = take(source, n_samples)
    assert begun.start_sample == 0
    assert all(chunk.start_sample == chunk.traces[0, 0] for chunk in rest)
    missing = sum(gap.n_samples for chunk in rest for gap in chunk.gaps)
    assert missing == source.counters["missing_samples"] > 2 * FS
    assert begun.n_samples + sum(chunk.n_samples for chunk in rest) + missing == n_samples


def test_an_outlet_that_dies_and_returns_goes_on_with_a_gap(tmp_path: Path, name: str) -> None:
    path = write_raw(tmp_path, np.tile(SAMPLES, (300, 1)))

    def play() -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-c", PLAYER, str(path), f"lsl:{name}", "2"])

    with play() as first:
        try:
            source = open_source(f"lsl:{name}", timeout_s=20.0)
            before = take(source, 3000)
        finally:
            first.kill()
    killed = time.monotonic()
    received: list[Chunk] = []

    def receive() -> None:
        for chunk in source:
            received.append(chunk)
            if chunk.gaps:
                return

    thread = threading.Thread(target=receive)
    thread.start()
    with play() as second:
        try:
            thread.join(20)
        finally:
            second.kill()
    (gap,) = received[-1].gaps
    assert source.counters["reconnects"] == 1 and source.counters["missing_samples"] == gap.n_samples
    last = before[-1] if len(received) < 2 else received[-2]
    assert gap.start_sample == last.end_sample
    assert received[-1].start_sample == gap.start_sample + gap.n_samples
    resumed_s = received[-1].t_origin + received[-1].start_sample / FS
    assert killed - 0.5 < resumed_s <= received[-1].t_acquired
    assert abs(received[-1].t_origin - before[-1].t_origin) < 0.05
    source.close()


def test_an_outlet_that_returns_as_something_else_ends_the_stream(name: str) -> None:
    out = outlet(name)
    with open_source(f"lsl:{name}", timeout_s=20.0) as source:
        assert out.wait_for_consumers(5)
        out.push_chunk(SAMPLES)
        take(source, 1000)
        del out
        changed = outlet(name, n_channels=5)
        with pytest.raises(StreamsortError, match="came back with 5 channels of int16 at 30000 Hz, expected 4"):
            take(source, 2000)
        del changed


def test_stalls_are_counted_and_close_ends_the_wait(name: str) -> None:
    out = outlet(name)
    source = open_source(f"lsl:{name}")
    assert out.wait_for_consumers(5)
    chunks: Iterator[Chunk] = iter(source)
    out.push_chunk(SAMPLES)
    next(chunks)

    def close_after_a_stall() -> None:
        deadline = time.monotonic() + 10
        while not source.counters["stalls"] and time.monotonic() < deadline:
            time.sleep(0.01)
        closing.append(time.monotonic())
        source.close()

    closing: list[float] = []
    thread = threading.Thread(target=close_after_a_stall)
    thread.start()
    assert sum(chunk.n_samples for chunk in chunks) < 1000
    assert time.monotonic() - closing[0] < 1.0
    assert source.counters["stalls"] == 1
    thread.join()
    source.close()


def test_silence_raises_only_when_asked_to(name: str) -> None:
    out = outlet(name)
    with open_source(f"lsl:{name}", timeout_s=0.5) as source, pytest.raises(StreamsortError, match="nothing arrived for"):
        next(iter(source))
    del out


def test_a_remote_clock_is_corrected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamsort.sources.lsl.socket.gethostname", lambda: "another-machine")
    out = outlet(name)
    with open_source(f"lsl:{name}") as source:
        assert isinstance(source, LslSource) and source._correction is not None
        assert abs(source._correction.seconds) < 0.01
        source._correction.seconds = 100.0
        assert out.wait_for_consumers(5)
        out.push_chunk(SAMPLES)
        chunks = take(source, 1000)
    assert chunks[-1].t_origin == pytest.approx(chunks[-1].t_acquired + 100.0 - 1000 / FS, abs=0.5)


def test_spikes_go_out_with_the_time_of_their_trough(name: str) -> None:
    pylsl = load_pylsl()
    info = StreamInfo("t", FS, 4, np.dtype(np.int16), np.ones(4, np.float32), None, live=True)
    sink = open_sink(f"lsl:{name}", info=info)
    (found,) = pylsl.resolve_byprop("name", name, 1, 5)
    assert (found.type(), found.nominal_srate(), found.channel_count()) == ("Spikes", 0.0, 6)
    inlet = pylsl.StreamInlet(found)
    labels = inlet.info(5).get_channel_labels()
    assert labels == ["unit_id", "channel", "sample_index", "amplitude_uv", "confidence", "flags"]
    inlet.open_stream(5)
    spikes = np.zeros(2, SPIKE_DTYPE)
    spikes["sample_index"] = [2**40 + 1, 2**40 + 90]
    spikes["time"] = time.monotonic() - np.array([0.010, 0.007])
    spikes["unit_id"], spikes["channel"], spikes["flags"] = [12, -1], [3, 0], [16, 1]
    spikes["amplitude_uv"], spikes["confidence"] = [-80.5, -31.25], [0.75, 0.0]
    sink.publish(Output(0, spikes[:0]))
    sink.publish(Output(2**40, spikes))
    sink.publish(Output(2**40, spikes[:1]))
    rows: list[list[float]] = []
    stamps: list[float] = []
    while len(rows) < 3:
        row, stamp = inlet.pull_sample(timeout=5)
        assert stamp is not None
        rows.append(row)
        stamps.append(stamp)
    assert rows[0] == rows[2] == [12.0, 3.0, 2.0**40 + 1, -80.5, 0.75, 16.0]
    assert rows[1] == [-1.0, 0.0, 2.0**40 + 90, -31.25, 0.0, 1.0]
    np.testing.assert_allclose(stamps[:2], spikes["time"], atol=1e-3)
    sink.close()
    sink.close()
    sink.publish(Output(0, spikes))
