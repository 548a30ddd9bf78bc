"""ZeroMQ both ways over real sockets: what a lab's publisher may do to us, and what a subscriber gets from us."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import zmq
from checks import take
from test_recording import SAMPLES, write_raw

from streamsort.client import subscribe
from streamsort.errors import StreamsortError
from streamsort.player import replay
from streamsort.probe import Probe
from streamsort.records import SPIKE_DTYPE, Gap, Output, StreamInfo
from streamsort.sinks import open_sink
from streamsort.sinks.zmq import BinCounter, ZmqSink
from streamsort.sources import open_source
from streamsort.sources.clock import ClockFit
from streamsort.sources.recording import Recording
from streamsort.sources.zmq import Continuity, ZmqSource
from streamsort.wire import LossCounter, MalformedMessage, Traces, TracesDecoder, decode, decode_traces, encode_traces, to_json

pytestmark = pytest.mark.timeout(20)

FS = 30000.0
GAIN = np.full(4, 0.195, np.float32)
INFO = StreamInfo("test", FS, 4, np.dtype(np.int16), GAIN, None, live=True)


def frames(start: int, n: int = 100, **changes: Any) -> list[bytes]:
    """Make one message; a change to None leaves the key out."""
    samples = np.arange(start * 4, (start + n) * 4).astype(np.int16).reshape(n, 4)
    topic, header, payload = encode_traces(samples, seq=start // 100, start_sample=start, sampling_frequency=FS, gain_uv=GAIN)
    changed = {key: value for key, value in (json.loads(header) | changes).items() if value is not None}
    return [topic, json.dumps(changed).encode(), payload]


class Publisher:
    """A lab's own PUB socket, ready when the subscriber is there."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.XPUB)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.url = f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"

    def wait_for(self, subscription: bytes) -> None:
        """Read what subscribers say until this comes."""
        deadline = time.monotonic() + 5
        while self.socket.poll(5000) and self.socket.recv() != subscription:
            assert time.monotonic() < deadline

    def open(self, first: list[bytes], **options: Any) -> ZmqSource:
        """Open the source while a thread waits for its subscription and sends the first message."""
        opened: list[ZmqSource] = []
        thread = threading.Thread(target=lambda: opened.append(ZmqSource(self.url, **options)))
        thread.start()
        self.wait_for(b"\x01traces")
        self.socket.send_multipart(first)
        thread.join(10)
        return opened[0]


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    it = Publisher()
    yield it
    it.context.destroy(linger=0)


# ---- in


def test_samples_and_indices_arrive_as_sent(publisher: Publisher) -> None:
    with publisher.open(frames(5000), probe=Probe.linear(4)) as source:
        for start in (5100, 5200):
            publisher.socket.send_multipart(frames(start))
        chunks = take(source, 300)
    assert [(chunk.start_sample, chunk.n_samples, chunk.gaps) for chunk in chunks] == [(0, 100, ()), (100, 100, ()), (200, 100, ())]
    sent = np.arange(5000 * 4, 5300 * 4).astype(np.int16).reshape(300, 4)
    np.testing.assert_array_equal(np.concatenate([chunk.traces for chunk in chunks]), sent)
    assert all(chunk.traces.flags.writeable for chunk in chunks)
    assert (source.info.sampling_frequency, source.info.n_channels, source.info.live) == (FS, 4, True)
    np.testing.assert_array_equal(source.info.gain_uv, GAIN)
    assert set(source.counters.values()) == {0}


MALFORMED: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "two_frames": lambda m: m[:2],
    "four_frames": lambda m: [*m, b""],
    "not_json": lambda m: [m[0], b"{", m[2]],
    "not_utf8": lambda m: [m[0], b"\xff\xfe", m[2]],
    "deep_json": lambda m: [m[0], b"[" * 60000, m[2]],
    "huge_header": lambda m: [m[0], b" " * 70000 + m[1], m[2]],
    "list_header": lambda m: [m[0], b"[1,2]", m[2]],
    "null_header": lambda m: [m[0], b"null", m[2]],
    "nan_rate": lambda m: [m[0], m[1].replace(b"30000.0", b"NaN"), m[2]],
    "endless_integer": lambda m: [m[0], m[1].replace(b'"seq": ', b'"seq": 1' + b"0" * 5000), m[2]],
    "short_payload": lambda m: [m[0], m[1], m[2][:-1]],
    "long_payload": lambda m: [m[0], m[1], m[2] + b"\0"],
    "empty_payload": lambda m: [m[0], m[1], b""],
    "longer_topic": lambda m: [b"traces2", m[1], m[2]],
}
BAD_HEADERS: dict[str, dict[str, Any]] = {
    **{
        f"no_{key}": {key: None}
        for key in ("seq", "start_sample", "n_samples", "n_channels", "sampling_frequency", "dtype", "gain_uv")
    },
    "schema": {"schema": "streamsort/2"},
    "negative_start": {"start_sample": -100},
    "absurd_start": {"start_sample": 1 << 70},
    "fraction_start": {"start_sample": 1.5},
    "true_start": {"start_sample": True},
    "text_start": {"start_sample": "100"},
    "zero_samples": {"n_samples": 0},
    "negative_samples": {"n_samples": -100},
    "absurd_samples": {"n_samples": 1 << 40},
    "negative_channels": {"n_channels": -4},
    "absurd_channels": {"n_channels": 10**9},
    "zero_rate": {"sampling_frequency": 0},
    "negative_rate": {"sampling_frequency": -30000},
    "absurd_rate": {"sampling_frequency": 1e12},
    "text_rate": {"sampling_frequency": "fast"},
    "unknown_dtype": {"dtype": "<i4"},
    "list_dtype": {"dtype": ["<i2"]},
    "other_size_dtype": {"dtype": "<f4"},
    "zero_gain": {"gain_uv": 0},
    "absurd_gain": {"gain_uv": 1e300},
    "three_gains": {"gain_uv": [1, 2, 3]},
    "text_stamp": {"t_acquired": "now"},
    "negative_seq": {"seq": -1},
}


@pytest.mark.parametrize("spoil", MALFORMED.values(), ids=MALFORMED)
def test_malformed_frames_are_refused_by_the_decoder(spoil: Any) -> None:
    with pytest.raises(MalformedMessage):
        decode_traces(spoil(frames(0)))


@pytest.mark.parametrize("changes", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_bad_headers_are_refused_by_the_decoder(changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage):
        decode_traces(frames(0, **changes))


UNUSUAL: dict[str, Callable[[bytes], bytes]] = {
    "as_usual": lambda header: header,
    "compact": lambda header: header.replace(b" ", b""),
    "a_line_each": lambda header: header.replace(b", ", b",\n").replace(b"}", b"\n}"),
    "spaces_before_colons": lambda header: header.replace(b'":', b'" :'),
    "escaped_name": lambda header: header.replace(b'"seq"', b'"s\\u0065q"'),
    "name_as_a_text": lambda header: header.replace(b"{", b'{"note": "seq", ', 1),
    "stamp_deeper": lambda header: header.replace(b"{", b'{"other": {"t_acquired": 1.5}, ', 1),
    "twice_the_same_name_once_escaped": lambda header: header.replace(b"}", b', "s\\u0065q": 9}'),
    "twice_the_same_name": lambda header: header.replace(b"{", b'{"seq": 7, "t_acquired": 1.5, ', 1),
    "stamp": lambda header: header.replace(b"}", b', "t_acquired": 0.25}'),
    "null_stamp_after_another": lambda header: header.replace(b"}", b', "t_acquired": 1.5, "t_acquired": null}'),
    "stamp_with_exponent": lambda header: header.replace(b"}", b', "t_acquired": 1.5e1}'),
    "another_exponent": lambda header: header.replace(b"}", b', "t_acquired": 2.5e1}'),
    "whole_stamp": lambda header: header.replace(b"}", b', "t_acquired": 15}'),
    "negative_zero": lambda header: header.replace(b'"seq": ', b'"seq": -0, "number": '),
    "gain_per_channel": lambda header: header.replace(b'"gain_uv": 0.19499999284744263', b'"gain_uv": [0.5, 1, 1.5, 2]'),
}


@pytest.mark.parametrize("first", UNUSUAL.values(), ids=UNUSUAL)
def test_a_decoder_that_knows_the_first_header_reads_every_other_one_as_one_that_does_not(first: Callable[[bytes], bytes]) -> None:
    """Whatever the first header looks like, no later one is read differently because of it."""

    def told(decode: Callable[[list[bytes]], Traces], message: list[bytes]) -> Any:
        try:
            traces = decode(message)
        except MalformedMessage as error:
            return str(error)
        return *traces[:3], traces.samples.tolist(), traces.samples.dtype, traces.gain_uv.tolist(), traces.t_acquired

    later = [spoil(frames(0)) for spoil in MALFORMED.values()] + [frames(0, **changes) for changes in BAD_HEADERS.values()]
    later += [frames(100), frames(10**9, 7), frames(0, 0), frames(0, seq=1 << 61), frames(0, start_sample=10**18)]
    later += [frames(0, note=1)] + [frames(0, t_acquired=stamp) for stamp in (3.25, 3, -3.25, 1e29, 1e31)]
    decoder = TracesDecoder()
    decoder.decode([b"traces", first(frames(0)[1]), frames(0)[2]])
    for topic, header, *payload in [message for message in later if len(message) > 1]:
        for changed in (header, first(header), *(rewrite(header) for rewrite in UNUSUAL.values())):
            message = [topic, changed, *payload]
            assert told(decoder.decode, message) == told(decode_traces, message)


def test_every_malformed_message_is_counted_and_skipped(publisher: Publisher) -> None:
    bad = [spoil(frames(100)) for spoil in MALFORMED.values()] + [frames(100, **changes) for changes in BAD_HEADERS.values()]
    with publisher.open(frames(0)) as source:
        for message in [*bad, frames(100), *bad, frames(200)]:
            publisher.socket.send_multipart(message)
        chunks = take(source, 300)
    assert [chunk.start_sample for chunk in chunks] == [0, 100, 200]
    assert source.counters["malformed"] == 2 * len(bad)
    assert not any(chunk.gaps for chunk in chunks)


def test_gap_duplicate_reorder_overlap_and_lost_messages(publisher: Publisher) -> None:
    with publisher.open(frames(0)) as source:
        for start, n in ((200, 100), (100, 100), (200, 100), (250, 150), (500, 100)):
            publisher.socket.send_multipart(frames(start, n))
        chunks = take(source, 600)
    assert [(chunk.start_sample, chunk.n_samples) for chunk in chunks] == [(0, 100), (200, 100), (300, 100), (500, 100)]
    assert chunks[1].gaps == (Gap(100, 100, "gap"),)
    assert chunks[2].gaps == (Gap(100, 100, "reorder"), Gap(200, 100, "duplicate"), Gap(250, 50, "duplicate"))
    assert chunks[3].gaps == (Gap(400, 100, "gap"),)
    np.testing.assert_array_equal(chunks[2].traces[0], np.arange(1200, 1204))
    assert source.counters["lost_messages"] == 1 + 2
    assert (source.counters["missing_samples"], source.counters["dropped_samples"]) == (200, 250)


@pytest.mark.parametrize(
    "changed",
    [
        encode_traces(np.zeros((100, 5), np.int16), seq=1, start_sample=100, sampling_frequency=FS, gain_uv=np.ones(5, np.float32)),
        encode_traces(np.zeros((100, 4), np.int16), seq=1, start_sample=100, sampling_frequency=25000.0, gain_uv=GAIN),
        encode_traces(np.zeros((100, 4), np.float32), seq=1, start_sample=100, sampling_frequency=FS, gain_uv=GAIN),
        encode_traces(np.zeros((100, 4), np.int16), seq=1, start_sample=100, sampling_frequency=FS, gain_uv=GAIN * 2),
    ],
    ids=["channels", "rate", "dtype", "gain"],
)
def test_a_changed_stream_ends_with_one_line(publisher: Publisher, changed: list[bytes]) -> None:
    with publisher.open(frames(0)) as source:
        publisher.socket.send_multipart(changed)
        with pytest.raises(StreamsortError, match=r"the stream became .* expected it to stay 4 channels of int16 at 30000 Hz"):
            take(source, 200)


def test_stamps_of_the_same_clock_date_the_samples(publisher: Publisher) -> None:
    stamp = time.monotonic()
    with publisher.open(frames(0, t_acquired=stamp)) as source:
        publisher.socket.send_multipart(frames(100, t_acquired=stamp + 1e9))
        chunks = take(source, 200)
    assert chunks[0].t_origin == pytest.approx(stamp - 99 / FS, abs=1e-9)
    assert chunks[1].t_origin == pytest.approx(time.monotonic() - 200 / FS, abs=1.0)
    assert chunks[1].t_acquired >= chunks[0].t_acquired >= stamp


def test_silence_raises_only_when_asked_to(publisher: Publisher) -> None:
    with publisher.open(frames(0), timeout_s=0.3) as source, pytest.raises(StreamsortError, match="nothing arrived for"):
        take(source, 200)
    with pytest.raises(StreamsortError, match="nothing arrived for"):
        ZmqSource(publisher.url, timeout_s=0.2)


def test_close_from_another_thread_ends_the_wait(publisher: Publisher) -> None:
    source = publisher.open(frames(0))
    chunks = iter(source)
    next(chunks)
    timer = threading.Timer(0.1, source.close)
    timer.start()
    started = time.monotonic()
    assert list(chunks) == []
    assert time.monotonic() - started < 1.0
    source.close()


def test_wrong_probe_and_wrong_address(publisher: Publisher) -> None:
    with pytest.raises(StreamsortError, match="expected an address such as"):
        open_source("tcp://127.0.0.1:http")
    caught: list[BaseException] = []

    def opening() -> None:
        try:
            open_source(publisher.url, probe=Probe.linear(3))
        except StreamsortError as error:
            caught.append(error)

    thread = threading.Thread(target=opening)
    thread.start()
    publisher.wait_for(b"\x01traces")
    publisher.socket.send_multipart(frames(0))
    thread.join(10)
    assert "probe has 3 contacts, expected 4" in str(caught[0])


def test_a_publisher_that_starts_anew_is_taken_up_after_a_tenth_of_a_second() -> None:
    continuity = Continuity(1000.0, first_sample=50000)
    for k in range(10):
        assert continuity.place(50000 + 100 * k, 100, now=0.1 * k) == (0, [])
    assert continuity.place(0, 60, now=2.9) == (60, [])  # a sample before the stream is nothing to report a gap at
    n_drop, gaps = continuity.place(60, 60, now=2.96)
    assert (n_drop, gaps) == (0, [Gap(1000, 2000, "gap")])
    assert continuity.next_sample == 3060
    assert continuity.place(120, 60, now=3.0) == (0, [])


def test_one_absurd_index_does_not_move_the_axis() -> None:
    continuity = Continuity(1000.0, first_sample=0)
    assert continuity.place(0, 50, now=0.0) == (0, [])
    assert continuity.place(10**15, 50, now=0.05) == (50, [])
    assert continuity.place(50, 50, now=0.1) == (0, [])
    assert continuity.place(50 + 400_000, 50, now=400.0) == (0, [Gap(100, 399_950, "gap")])


def test_loss_counter() -> None:
    counter = LossCounter()
    noted = [counter.note("t", seq) for seq in (7, 8, 10, 9, 11, 11, 500, 0, 1)]
    assert noted == [0, 0, 1, 0, 0, 0, 488, 0, 0]
    assert counter.lost == {"t": 489}


@pytest.mark.parametrize("rate_error", [0.0, 5e-5, -5e-5])
def test_clock_fit_follows_the_device_and_is_not_late(rate_error: float) -> None:
    rng = np.random.default_rng(3)
    fit = ClockFit(FS)
    errors = []
    for k in range(1, 6001):
        index = 300 * k
        true_time = 1000.0 + index / FS * (1 + rate_error)
        fit.update(index, true_time + rng.exponential(0.3e-3))
        errors.append(fit.t_origin(index) + index / FS - true_time)
    settled = np.array(errors[500:])
    assert np.abs(settled).max() < 0.25e-3
    assert settled.mean() < 0.1e-3  # the mean stamp is 0.3 ms late
    assert np.abs(np.diff(settled)).max() < 0.02e-3
    assert 0.2e-3 < fit.deviation_s < 0.6e-3


# ---- the player


def test_replay_in_another_process_arrives_bit_identical(tmp_path: Any) -> None:
    samples = np.tile(SAMPLES, (12, 1))
    path = write_raw(tmp_path, samples)
    with zmq.Context() as context, context.socket(zmq.PUB) as probe_socket:
        url = f"tcp://127.0.0.1:{probe_socket.bind_to_random_port('tcp://127.0.0.1')}"
    script = (
        "import sys; from streamsort.player import replay; from streamsort.sources import Source, open_source;"
        "print(replay(open_source(sys.argv[1], speed=1.0, chunk_ms=3.0), sys.argv[2]))"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path), url], stdout=subprocess.PIPE, text=True) as player:
        try:
            with open_source(url, timeout_s=10.0) as source:
                chunks = take(source, len(samples))
            assert int(player.communicate(timeout=10)[0]) == len(samples)
        finally:
            player.kill()
    np.testing.assert_array_equal(np.concatenate([chunk.traces for chunk in chunks]), samples)
    assert [chunk.start_sample for chunk in chunks] == list(range(0, len(samples), 90))
    assert not any(chunk.gaps for chunk in chunks) and set(source.counters.values()) == {0}
    late = [chunk.t_acquired - (chunk.t_origin + chunk.end_sample / FS) for chunk in chunks]
    assert min(late) > 0 and float(np.median(late)) < 0.05
    origins = [chunk.t_origin for chunk in chunks]
    np.testing.assert_allclose(origins, origins[0], atol=1e-6)


def test_replay_ends_when_nobody_listens_and_it_is_told_to_stop(tmp_path: Any) -> None:
    stop = threading.Event()
    timer = threading.Timer(0.2, stop.set)
    timer.start()
    assert replay(Recording(write_raw(tmp_path)), "tcp://127.0.0.1:*", stop=stop) == 0
    with pytest.raises(StreamsortError, match=r"nobody listened for 0.2 s"):
        replay(Recording(tmp_path / "rec.raw"), "tcp://127.0.0.1:*", wait_s=0.2)
    with pytest.raises(StreamsortError, match=r"expected lsl:NAME or tcp://host:port"):
        replay(Recording(tmp_path / "rec.raw"), "file:x")


# ---- out


def spikes_at(*pairs: tuple[int, int]) -> np.ndarray:
    spikes = np.zeros(len(pairs), SPIKE_DTYPE)
    if pairs:
        spikes["sample_index"], spikes["unit_id"] = zip(*pairs, strict=True)
    spikes["time"] = spikes["sample_index"] / FS
    spikes["confidence"] = 0.5
    return spikes


def test_bins_close_when_their_end_has_passed() -> None:
    bins = BinCounter(100)
    bins.learn_slots([{"unit_id": 5, "slot": 1}, {"unit_id": 3, "slot": 0}])
    assert bins.slots_version == 2
    assert list(bins.closed_bins(spikes_at((10, 5), (99, 5), (100, 3), (20, -1)), through_sample=99)) == []
    first = list(bins.closed_bins(spikes_at(), through_sample=100))
    assert [(start, counts.tolist()) for start, counts in first] == [(0, [0, 2])]
    rest = list(bins.closed_bins(spikes_at((250, 9)), through_sample=420))
    assert [(start, counts.tolist()) for start, counts in rest] == [(100, [1, 0, 0]), (200, [0, 0, 1]), (300, [0, 0, 0])]
    assert all(counts.dtype == np.int16 for _, counts in rest)
    assert bins.slots_version == 3
    bins.learn_slots([{"unit_id": 9, "slot": 2}, {"unit_id": 5, "slot": 1}, {"event": "born", "unit_id": 4}])
    assert bins.slots_version == 3


def test_counting_does_not_depend_on_how_outputs_are_cut() -> None:
    rng = np.random.default_rng(1)
    spikes = spikes_at(
        *[(int(i), int(u)) for i, u in zip(np.sort(rng.integers(0, 5000, 400)), rng.integers(-1, 6, 400), strict=True)]
    )
    whole = BinCounter(60)
    expected = [(s, c.tolist()) for s, c in whole.closed_bins(spikes, 5000)]
    pieces = BinCounter(60)
    pieces.learn_slots([{"unit_id": u, "slot": u} for u in range(6)])
    got, through = [], 0
    while through < 5000:
        step = min(through + int(rng.integers(1, 150)), 5000)
        mine = spikes[(spikes["sample_index"] >= through) & (spikes["sample_index"] < step)]
        got += [(s, c.tolist()) for s, c in pieces.closed_bins(mine, step)]
        through = step
    assert got == expected
    assert sum(sum(c) for _, c in got) == int(((spikes["unit_id"] >= 0) & (spikes["sample_index"] < 4980)).sum())


def test_port_taken_and_bad_addresses_are_one_line() -> None:
    sink = open_sink("tcp://127.0.0.1:*", info=INFO)
    assert isinstance(sink, ZmqSink)
    for url, message in (
        (sink.endpoint, "the port is taken"),
        ("tcp://127.0.0.1", "expected a free address"),
        ("tcp://nowhere.invalid:5560", "expected a free address"),
        ("udp://127.0.0.1:5", "unknown kind 'udp'"),
    ):
        with pytest.raises(StreamsortError, match=message) as caught:
            open_sink(url, info=INFO)
        assert "\n" not in str(caught.value)
    sink.close()
    sink.close()
    sink.publish(Output(100, spikes_at((1, 1))))
    with pytest.raises(StreamsortError, match="expected at least one sample"):
        open_sink("tcp://127.0.0.1:*", info=INFO, bin_ms=0.01)


def test_json_has_no_nan_and_no_numpy() -> None:
    value = {
        "a": np.float32(1.5),
        "b": float("nan"),
        "c": [np.int64(3), np.inf],
        "d": np.array([1.0, np.nan]),
        "e": None,
        "f": True,
    }
    assert json.loads(to_json(value)) == {"a": 1.5, "b": None, "c": [3, None], "d": [1.0, None], "e": None, "f": True}


def test_a_subscriber_that_looks_away_counts_what_it_lost() -> None:
    sink = ZmqSink("tcp://127.0.0.1:*", info=INFO)
    subscription = subscribe(sink.endpoint, timeout_s=10.0)
    messages = subscription.messages("status")
    publish_until_heard(sink, messages)
    for _ in range(5):
        sink._envelope.message("status", b"", 0)  # made and never sent, as when the high-water mark drops it
    sink.publish(Output(0, spikes_at(), status={"last": True}))
    for message in messages:
        if message.payload == {"last": True}:
            break
    assert subscription.lost["status"] == 5
    sink.close()
    subscription.close()


def test_spikes_name_the_encoder_that_named_them() -> None:
    sink = ZmqSink("tcp://127.0.0.1:*", info=INFO, model="first")
    subscription = subscribe(sink.endpoint, timeout_s=10.0)
    messages = subscription.messages("spikes", "status")
    publish_until_heard(sink, messages)
    sink.publish(Output(10, spikes_at((1, 2)), model="first"))
    event = {"event": "model", "sample_index": 10, "unit_id": None, "into": None, "reason": "accepted", "model": "second"}
    sink.publish(Output(20, spikes_at((11, 2)), ledger=[event], model="second"))
    refused = {**event, "reason": "refused", "offered": "third"}
    sink.publish(Output(30, spikes_at((21, 2)), ledger=[refused], model="second"))
    sink.publish(Output(40, spikes_at((31, 2))))  # of a sorter that does not say
    named = (message.header["model"] for message in messages if message.topic == "spikes")
    assert [next(named) for _ in range(4)] == ["first", "second", "second", "first"]
    sink.close()
    subscription.close()


def publish_until_heard(sink: ZmqSink, messages: Iterator[Any]) -> None:
    """Send status messages until the first one comes through: a subscription takes a moment to reach the publisher."""
    heard = threading.Event()

    def wait() -> None:
        next(messages)
        heard.set()

    thread = threading.Thread(target=wait)
    thread.start()
    deadline = time.monotonic() + 10
    while not heard.wait(0.02):
        assert time.monotonic() < deadline
        sink.publish(Output(0, spikes_at(), status={}))
    thread.join()


def test_subscription_skips_garbage_times_out_and_closes(publisher: Publisher) -> None:
    with subscribe(publisher.url, timeout_s=0.5) as subscription:
        received = iter(subscription)
        publisher.wait_for(b"\x01spikes")
        header = {"seq": 0, "n": 2}
        for bad in ([b"spikes", b"{}"], [b"spikes", b"{}", b""], [b"spikes", json.dumps(header).encode(), b"short"]):
            publisher.socket.send_multipart(bad)
        publisher.socket.send_multipart([b"spikes", json.dumps(header).encode(), spikes_at((1, 2), (3, 4)).tobytes()])
        assert next(received)["unit_id"].tolist() == [2, 4]
        assert (subscription.n_malformed, subscription.header) == (3, header)
        with pytest.raises(StreamsortError, match="nothing arrived for"):
            next(received)
    with pytest.raises(StreamsortError, match="expected an address"):
        subscribe("nonsense")


def test_closing_a_subscription_ends_its_iteration(publisher: Publisher) -> None:
    subscription = subscribe(publisher.url)
    timer = threading.Timer(0.1, subscription.close)
    timer.start()
    assert list(subscription) == []
    subscription.close()


def test_decode_refuses_json_that_is_none() -> None:
    with pytest.raises(MalformedMessage):
        decode([b"units", b'{"seq":0,"n":1}', b"\xff"])


def test_a_backlog_taken_late_does_not_date_samples_into_the_future(free_port: int) -> None:
    """Without stamps, times come from arrivals; the first messages may have waited while the sorter was being built."""
    url, rate, n = f"tcp://127.0.0.1:{free_port}", 10_000.0, 100
    context = zmq.Context()
    publisher = context.socket(zmq.PUB)
    publisher.bind(url)
    stop = threading.Event()

    def publish() -> None:
        began, k = time.monotonic(), 0
        while not stop.wait(max(began + (k + 1) * n / rate - time.monotonic(), 0.0)):
            header = {
                "schema": "streamsort/1", "seq": k, "start_sample": k * n, "n_samples": n, "n_channels": 2,
                "sampling_frequency": rate, "dtype": "<i2", "gain_uv": 0.2,
            }  # fmt: skip
            publisher.send_multipart([b"traces", json.dumps(header).encode(), bytes(n * 4)])
            k += 1

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        with ZmqSource(url, timeout_s=10.0) as source:
            stop_waiting = threading.Event()
            stop_waiting.wait(0.4)  # a backlog of 40 messages
            late = []
            for chunk in source:
                late.append(chunk.t_acquired - (chunk.t_origin + chunk.end_sample / rate))
                if len(late) == 120:
                    break
        assert min(late[60:]) > -0.005
        assert float(np.median(late[60:])) < 0.02
    finally:
        stop.set()
        thread.join()
        publisher.close(linger=0)
        context.term()
