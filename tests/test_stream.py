"""Real threads around a small deterministic sorter: what the stream moves, drops, counts and lets go of."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamsort.config import SorterConfig, StreamConfig
from streamsort.errors import StreamsortError
from streamsort.latency import LatencyHistogram
from streamsort.publish import Publisher
from streamsort.queues import BoundedQueue
from streamsort.records import PEAK_DTYPE, SPIKE_DTYPE, Chunk, Flag, Gap, Output, PeakBatch, StreamInfo
from streamsort.shed import Level
from streamsort.stream import Stream

FS = 1000.0
PERIOD = 50  # samples between learning boundaries
MARGIN = 5
PATIENCE_S = 10.0


def never() -> None:
    pass


class CountingSorter:
    """The interface of `Sorter`: a peak wherever channel 0 is above zero; what a period teaches changes ids after the next."""

    config = SorterConfig()
    encoder = None  # never swapped
    margin_samples = MARGIN
    calibrated = True
    progress = 1.0
    level = Level.SORTED

    def __init__(
        self, on_detect: Callable[[], None] = never, on_assign: Callable[[], None] = never, on_learn: Callable[[], None] = never
    ) -> None:
        self.on_detect, self.on_assign, self.on_learn = on_detect, on_assign, on_learn
        self.warm = False
        self.levels: list[Level] = []
        self._lesson: Future[int] | None = None
        self._pending: list[tuple[int, float]] = []
        self._through = 0
        self._sum = 0.0
        self._learnt = 0
        self._assigned_through = 0

    def warmup(self) -> None:
        self.warm = True

    def detect(self, chunk: Chunk) -> list[PeakBatch]:
        assert self.warm
        self.on_detect()
        self._pending += [(chunk.start_sample + int(k), float(chunk.traces[k, 0])) for k in np.flatnonzero(chunk.traces[:, 0] > 0)]
        batches = []
        gaps, end = chunk.gaps, max(chunk.end_sample - MARGIN, self._through)
        while True:
            until = min(end, (self._through // PERIOD + 1) * PERIOD)
            due = [peak for peak in self._pending if peak[0] < until]
            self._pending = self._pending[len(due) :]
            peaks = np.array([(index, 0, 0, value) for index, value in due], PEAK_DTYPE)
            snippets = np.repeat(peaks["amplitude_uv"], 6).reshape(-1, 3, 2)
            noise_level = np.ones((len(peaks), 2), np.float32)
            traces, near_gap = np.zeros((until - self._through, 1), np.float32), np.zeros(until - self._through, bool)
            found = peaks, snippets, noise_level, traces, near_gap, None
            batches.append(PeakBatch(self._through, until, *found, chunk.t_origin, chunk.t_acquired, gaps))
            self._through, gaps = until, ()
            if until == end:
                return batches

    def assign(self, batch: PeakBatch) -> Output:
        self.on_assign()
        spikes = np.zeros(len(batch.peaks), SPIKE_DTYPE)
        for name in ("sample_index", "channel", "flags", "amplitude_uv"):
            spikes[name] = batch.peaks[name]
        spikes["time"] = batch.t_origin + spikes["sample_index"] / FS
        spikes["unit_id"] = batch.snippets.mean(axis=(1, 2)) + self._learnt
        spikes["unit_id"][spikes["amplitude_uv"] == 1] = -1
        self._sum += float(batch.snippets.sum())
        self._assigned_through = batch.through_sample
        return Output(batch.through_sample, spikes, gaps=list(batch.gaps), t_acquired=batch.t_acquired)

    def learn(self, pool: Executor) -> None:
        if self._assigned_through % PERIOD == 0:
            self.settle()
            self._lesson = pool.submit(self._learn, self._sum)

    def shed(self, level: Level) -> None:
        self.level = level
        self.levels.append(level)

    def settle(self) -> None:
        if self._lesson is not None:
            self._learnt = self._lesson.result()

    def _learn(self, total: float) -> int:
        self.on_learn()
        return int(total) % 7

    def process(self, chunk: Chunk, pool: Executor) -> list[Output]:
        outputs = []
        for batch in self.detect(chunk):
            outputs.append(self.assign(batch))
            self.learn(pool)
        return outputs

    def take_events(self) -> list[dict[str, Any]]:
        return []

    def units_table(self) -> list[dict[str, Any]]:
        return [{"unit_id": 1}]

    def counters(self) -> dict[str, int | float | str]:
        return {"provider": "CPUExecutionProvider"}


class ListSource:
    """Chunks of a list; `pause_after` chunks it waits until it is closed or resumed, as a silent live source does."""

    def __init__(
        self, chunks: Sequence[Chunk], *, live: bool = False, pause_after: int | None = None, error: Exception | None = None
    ) -> None:
        self.info = StreamInfo("list", FS, 2, np.dtype(np.float32), np.ones(2, np.float32), None, live)
        self.counters = {"stalls": 3}
        self.n_closed = 0
        self.delivered = threading.Event()  # every chunk (or those before the pause) was taken from us
        self._chunks, self._pause_after, self._error = chunks, pause_after, error
        self._resumed = threading.Event()

    def __iter__(self) -> Iterator[Chunk]:
        for k, chunk in enumerate(self._chunks):
            if k == self._pause_after:
                self.delivered.set()
                assert self._resumed.wait(PATIENCE_S)
                return
            yield chunk
        self.delivered.set()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self.n_closed += 1
        self._resumed.set()


class ListSink:
    """Keep what comes; publishing can be held up, or made to fail."""

    def __init__(self, on_publish: Callable[[], None] = never) -> None:
        self.outputs: list[Output] = []
        self.n_closed = 0
        self.changed = threading.Condition()
        self._on_publish = on_publish

    def publish(self, output: Output) -> None:
        self._on_publish()
        with self.changed:
            self.outputs.append(output)
            self.changed.notify_all()

    def close(self) -> None:
        self.n_closed += 1

    def spikes(self) -> NDArray[Any]:
        return joined(self.outputs)

    def wait_through(self, sample: int) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.outputs and self.outputs[-1].through_sample >= sample, PATIENCE_S)


class Gate:
    """Call it to wait until it is opened; it tells when somebody has come."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.opened.wait(PATIENCE_S)


def joined(outputs: Sequence[Output]) -> NDArray[Any]:
    return np.concatenate([np.empty(0, SPIKE_DTYPE), *(output.spikes for output in outputs)])


def recording(n_samples: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    traces = np.zeros((n_samples, 2), np.float32)
    traces[:, 0] = rng.integers(1, 9, n_samples) * (rng.random(n_samples) < 0.2)
    return traces


def cut(traces: NDArray[np.float32], edges: Sequence[int], t_origin: float = 0.0) -> list[Chunk]:
    bounds = [0, *edges, len(traces)]
    return [Chunk(a, traces[a:b], t_origin, time.monotonic()) for a, b in pairwise(bounds)]


def even(n_samples: int, length: int, **kwargs: Any) -> list[Chunk]:
    return cut(recording(n_samples), range(length, n_samples, length), **kwargs)


def looped(chunks: Sequence[Chunk]) -> NDArray[Any]:
    sorter = warm()
    with ThreadPoolExecutor(1) as pool:
        return joined([output for chunk in chunks for output in sorter.process(chunk, pool)])


def warm() -> CountingSorter:
    sorter = CountingSorter()
    sorter.warmup()
    return sorter


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("streamsort")]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    interval, frozen = sys.getswitchinterval(), gc.get_freeze_count()
    yield
    assert own_threads() == []
    assert (sys.getswitchinterval(), gc.get_freeze_count()) == (interval, frozen)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 600), max_size=30).map(sorted), st.integers(0, 3))
def test_the_threads_give_what_the_loop_gives(edges: list[int], seed: int) -> None:
    chunks = cut(recording(600, seed), edges)
    sink = ListSink()
    with Stream(ListSource(chunks), CountingSorter(), [sink]) as stream:
        assert stream.wait(PATIENCE_S)
    np.testing.assert_array_equal(sink.spikes(), looped(chunks))
    np.testing.assert_array_equal(sink.spikes(), looped(cut(recording(600, seed), [])))
    through = [output.through_sample for output in sink.outputs]
    assert through == sorted(through) and through[-1] == 600 - MARGIN


def test_overruns_are_counted_exactly_and_told_as_gaps() -> None:
    gate = Gate()
    chunks = even(1000, 10, t_origin=time.monotonic())
    source, sink = ListSource(chunks, live=True), ListSink()
    with Stream(source, CountingSorter(on_detect=gate), [sink], config=StreamConfig(queue_s=0.1)) as stream:
        assert source.delivered.wait(PATIENCE_S) and gate.reached.wait(PATIENCE_S)
        gate.opened.set()
        assert stream.wait(PATIENCE_S)
    status = stream.status()
    assert status["samples_acquired"] in (100, 110)  # the queue, and the one chunk that detection held if it was quick
    assert status["samples_acquired"] + status["samples_overrun"] == 1000
    assert status["chunks"] + status["overruns"] == len(chunks)
    gaps = [gap for output in sink.outputs for gap in output.gaps]
    missing = np.concatenate([np.arange(gap.start_sample, gap.start_sample + gap.n_samples) for gap in gaps])
    assert len(np.unique(missing)) == len(missing) == status["samples_overrun"]
    accepted = np.setdiff1d(np.arange(sink.outputs[-1].through_sample), missing)
    np.testing.assert_array_equal(sink.spikes()["sample_index"], accepted[recording(1000)[accepted, 0] > 0])
    assert status["samples_lost"] == {"overrun": status["samples_overrun"]}


def test_gaps_of_dropped_chunks_are_not_lost() -> None:
    first, *others = even(40, 10)
    missing = Gap(15, 5, "gap")
    dropped = [others[0], Chunk(20, others[1].traces, gaps=(missing,)), others[2]]
    stream = Stream(ListSource([], live=True), CountingSorter(), config=StreamConfig(queue_s=0.01))
    for chunk in (first, *dropped):
        stream._accept(chunk)
    assert stream._dropped == [Gap(10, 10, "overrun"), missing, Gap(20, 20, "overrun")]
    stream._chunks.take()
    stream._accept(Chunk(40, first.traces, gaps=(Gap(39, 1, "nan"),)))
    (accepted,) = stream._chunks.take()
    assert accepted.gaps == (Gap(10, 10, "overrun"), missing, Gap(20, 20, "overrun"), Gap(39, 1, "nan"))
    stream.stop()


def test_what_is_dropped_at_the_end_is_told_too() -> None:
    gate = Gate()
    source, sink = ListSource(even(300, 10, t_origin=time.monotonic()), live=True), ListSink()
    with Stream(source, CountingSorter(on_detect=gate), [sink], config=StreamConfig(queue_s=0.1)) as stream:
        assert source.delivered.wait(PATIENCE_S) and gate.reached.wait(PATIENCE_S)
        gate.opened.set()
        assert stream.wait(PATIENCE_S)
    last = sink.outputs[-1]
    assert [gap.start_sample + gap.n_samples for gap in last.gaps] == [300]
    assert last.status is not None and last.status["samples_lost"]["overrun"] == 300 - last.status["samples_acquired"]


def test_a_file_waits_and_loses_nothing() -> None:
    gate = Gate()
    source, sink = ListSource(even(1000, 10)), ListSink(on_publish=gate)
    with Stream(source, CountingSorter(), [sink], config=StreamConfig(queue_s=0.02)) as stream:
        assert gate.reached.wait(PATIENCE_S)
        assert not stream.wait(0.0)
        gate.opened.set()
        assert stream.wait(PATIENCE_S)
    status = stream.status()
    assert (status["samples_acquired"], status["overruns"], status["outputs_dropped"]) == (1000, 0, 0)
    np.testing.assert_array_equal(sink.spikes(), looped(even(1000, 10)))


def test_the_queue_before_detection_is_bounded_for_a_file() -> None:
    gate, source = Gate(), ListSource(even(1000, 10))
    with Stream(source, CountingSorter(on_detect=gate), config=StreamConfig(queue_s=0.02)) as stream:
        assert gate.reached.wait(PATIENCE_S)
        assert not stream.wait(0.05)  # as far as it gets
        assert stream.status()["queues"]["chunks_ms"] == pytest.approx(20)
        assert stream.status()["samples_acquired"] <= 30
        assert not source.delivered.is_set()
        gate.opened.set()
        assert stream.wait(PATIENCE_S)


def test_a_slow_sink_delays_no_other() -> None:
    gate = Gate()
    slow, quick, archive = ListSink(on_publish=gate), ListSink(), ListSink()
    source = ListSource(even(1000, 10, t_origin=time.monotonic()), live=True)
    with Stream(source, CountingSorter(), [slow, quick], archive=archive) as stream:
        assert quick.wait_through(1000 - MARGIN) and archive.wait_through(1000 - MARGIN)
        assert slow.outputs == []
        gate.opened.set()
        assert stream.wait(PATIENCE_S)
    assert len(slow.outputs) == len(quick.outputs) == len(archive.outputs)


def test_a_slow_sink_of_a_live_stream_loses_its_oldest_outputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamsort.stream._SINK_BYTES", 20_000)
    gate = Gate()
    slow, archive = ListSink(on_publish=gate), ListSink()
    source = ListSource(even(1000, 10, t_origin=time.monotonic()), live=True)
    with Stream(source, CountingSorter(), [slow], archive=archive) as stream:
        assert archive.wait_through(1000 - MARGIN) and gate.reached.wait(PATIENCE_S)
        gate.opened.set()
        assert stream.wait(PATIENCE_S)
    dropped = stream.status()["outputs_dropped"]
    assert dropped > 50
    assert len(slow.outputs) == len(archive.outputs) - dropped
    assert all(a is b for a, b in zip(slow.outputs[1:], archive.outputs[dropped + 1 :], strict=True))


def test_a_sink_that_raises_is_counted_and_sorting_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    broken, whole = ListSink(on_publish=full), ListSink()
    with Stream(ListSource(even(500, 10)), CountingSorter(), [whole], archive=broken) as stream:
        assert stream.wait(PATIENCE_S)
    np.testing.assert_array_equal(whole.spikes(), looped(even(500, 10)))
    assert stream.status()["sink_errors"] == len(whole.outputs)
    assert [record.getMessage() for record in caplog.records] == ["sink ListSink failed; sorting goes on"]
    assert broken.n_closed == 1


def fail() -> None:
    raise RuntimeError("a broken stage")


@pytest.mark.parametrize("stage", ["on_detect", "on_assign", "on_learn"])
def test_what_ends_a_thread_is_raised_where_it_is_waited_for(stage: str) -> None:
    sink, source = ListSink(), ListSource(even(1000, 10), pause_after=50)
    stream = Stream(source, CountingSorter(**{stage: fail}), [sink])
    with pytest.raises(RuntimeError, match="a broken stage") as caught, stream:
        stream.wait()
    assert "fail" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    with pytest.raises(RuntimeError, match="a broken stage"):
        stream.stop()
    stream.abort()
    assert sink.n_closed == 1 and source.n_closed >= 1


def test_an_error_of_the_source_comes_after_all_it_delivered() -> None:
    sink, source = ListSink(), ListSource(even(300, 10), error=StreamsortError("stream changed, expected 2 channels"))
    with pytest.raises(StreamsortError, match="expected 2 channels"), Stream(source, CountingSorter(), [sink]) as stream:
        stream.wait()
    np.testing.assert_array_equal(sink.spikes(), looped(even(300, 10)))


def test_a_sink_that_cannot_be_closed_is_an_error() -> None:
    class Unclosable(ListSink):
        def close(self) -> None:
            raise OSError("not written")

    with pytest.raises(OSError, match="not written"), Stream(ListSource(even(50, 10)), CountingSorter(), [Unclosable()]) as stream:
        stream.wait()


def test_stop_drains_and_is_idempotent() -> None:
    gate = Gate()
    sink, source = ListSink(), ListSource(even(1000, 10, t_origin=time.monotonic()), live=True, pause_after=60)
    stream = Stream(source, CountingSorter(on_detect=gate), [sink])
    stream.start()
    stream.start()
    assert source.delivered.wait(PATIENCE_S) and gate.reached.wait(PATIENCE_S)
    gate.opened.set()
    stream.stop()
    stream.stop()
    assert sink.outputs[-1].through_sample == 600 - MARGIN
    assert sink.n_closed == 1
    assert stream.wait(0.0)


def test_abort_discards_and_is_idempotent() -> None:
    gate = Gate()
    sink, source = ListSink(), ListSource(even(1000, 10), pause_after=60)
    stream = Stream(source, CountingSorter(on_assign=gate), [sink])
    stream.start()
    assert source.delivered.wait(PATIENCE_S) and gate.reached.wait(PATIENCE_S)
    opener = threading.Thread(target=lambda: (source._resumed.wait(PATIENCE_S), gate.opened.set()))
    opener.start()
    stream.abort()
    stream.abort()
    opener.join()
    assert sink.outputs == []
    assert sink.n_closed == 1


def test_a_block_that_raises_aborts_but_ctrl_c_drains() -> None:
    for error, n_outputs in ((KeyError("mine"), 0), (KeyboardInterrupt(), 61)):
        gate = Gate()
        sink, source = ListSink(on_publish=gate), ListSource(even(300, 5), pause_after=59)
        opener = threading.Thread(target=lambda: (source._resumed.wait(PATIENCE_S), gate.opened.set()))  # noqa: B023
        with pytest.raises(type(error)), Stream(source, CountingSorter(), [sink]) as stream:
            assert source.delivered.wait(PATIENCE_S) and gate.reached.wait(PATIENCE_S)
            opener.start()
            raise error
        opener.join()
        assert stream.wait(0.0) and sink.n_closed == 1
        assert len(sink.outputs) <= 1 if n_outputs == 0 else sink.outputs[-1].through_sample == 295 - MARGIN


def test_stopping_what_was_never_started_closes_it() -> None:
    for leave in (Stream.stop, Stream.abort):
        sink, source = ListSink(), ListSource(even(50, 10))
        stream = Stream(source, CountingSorter(), [sink])
        leave(stream)
        stream.start()
        assert (sink.n_closed, sink.outputs) == (1, []) and source.n_closed >= 1


def test_a_warmup_that_fails_leaves_nothing_open() -> None:
    class Cold(CountingSorter):
        def warmup(self) -> None:
            raise StreamsortError("model contract")

    sink, source = ListSink(), ListSource(even(50, 10))
    with pytest.raises(StreamsortError, match="model contract"), Stream(source, Cold(), [sink]):
        pass
    assert sink.n_closed == 1 and source.n_closed == 1


@pytest.mark.parametrize(("live", "deadline_ms"), [(True, 10.0), (True, 1e6), (False, 10.0)])
def test_late_spikes_of_a_live_stream_are_flagged(live: bool, deadline_ms: float) -> None:
    chunks, sink = even(200, 10, t_origin=time.monotonic() - 100.0), ListSink()
    with Stream(ListSource(chunks, live=live), CountingSorter(), [sink], config=StreamConfig(deadline_ms=deadline_ms)) as stream:
        assert stream.wait(PATIENCE_S)
    spikes, status = sink.spikes(), stream.status()
    late = (spikes["flags"] & Flag.LATE) != 0
    assert late.all() if live and deadline_ms < 1e5 else not late.any()
    assert status["late"] == late.sum()
    assert status["unsorted"] == (spikes["unit_id"] == -1).sum() > 0
    assert status["spikes"] == len(spikes)
    assert status["latency_ms"]["total"]["n"] == (len(spikes) if live else 0)
    if live:
        assert 96e3 < status["latency_ms"]["total"]["p50"] < 104e3


def test_status_travels_with_outputs_and_never_changes_spikes() -> None:
    seen: list[dict[str, Any]] = []
    sink, source = ListSink(), ListSource(even(500, 10), pause_after=40)
    with Stream(source, CountingSorter(), [sink], config=StreamConfig(status_s=0.01), on_status=seen.append) as stream:
        assert not stream.wait(0.03)  # silent, and status comes all the same
        assert len(seen) >= 2
        assert {"streamsort-acquire", "streamsort-sort", "streamsort-learn_0", "streamsort-publish-0-ListSink"} == set(
            own_threads()
        )
        stream.stop()
    np.testing.assert_array_equal(sink.spikes(), looped(even(500, 10)[:40]))
    told = [output for output in sink.outputs if output.status is not None]
    assert told[0] is sink.outputs[0] and told[-1] is sink.outputs[-1]
    assert all(output.units == [{"unit_id": 1}] for output in told)
    status = told[-1].status
    assert status is not None and json.loads(json.dumps(status)) == status
    assert status["samples_acquired"] == 400
    assert (status["provider"], status["calibrated"], status["n_units"], status["floor_ms"]) == (
        "CPUExecutionProvider",
        True,
        1,
        5.0,
    )
    assert status["latency_ms"]["detect"]["n"] == sum(output.t_acquired > 0 for output in sink.outputs)  # others are status alone


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for a child there")
def test_ctrl_c_in_a_child_process_publishes_what_was_acquired(tmp_path: Path) -> None:
    program = tmp_path / "child.py"
    program.write_text(
        "import test_stream as t\n"
        "source = t.ListSource(t.even(500, 10), pause_after=40)\n"
        "sink = t.ListSink()\n"
        "try:\n"
        "    with t.Stream(source, t.CountingSorter(), [sink]) as stream:\n"
        "        source.delivered.wait()\n"
        "        print('ready', flush=True)\n"
        "        stream.wait()\n"
        "except KeyboardInterrupt:\n"
        "    print(sink.outputs[-1].through_sample, sink.n_closed)\n"
    )
    root = Path(__file__).parent
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:0] = [{str(root)!r}, {str(root.parent)!r}]; exec(open({str(program)!r}).read())",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=PATIENCE_S)[0] == f"{400 - MARGIN} 1\n"


def test_queue_keeps_order_and_weight() -> None:
    queue: BoundedQueue[str] = BoundedQueue(10)
    assert queue.offer("heavier than the limit", 50) and not queue.offer("b", 1)
    assert queue.take() == ["heavier than the limit"]
    assert all(queue.offer(name, 5) for name in "ab") and not queue.offer("c", 1)
    assert (len(queue), queue.weight) == (2, 10)
    assert queue.push("c", 6) == 2
    assert queue.push("d", 4) == 0
    assert queue.take(5) == ["c"] and queue.take(5) == ["d"]
    queue.put("e", 1)
    queue.close()
    assert not queue.put("f", 1)
    assert list(queue) == ["e"] and queue.take() == [] and queue.weight == 0


def test_an_aborted_queue_lets_its_writer_go() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1)
    queue.put("a", 1)
    answers: list[bool] = []
    writer = threading.Thread(target=lambda: answers.append(queue.put("b", 1)))
    writer.start()
    queue.abort()
    writer.join(PATIENCE_S)
    assert answers == [False] and queue.take() == []


@given(st.lists(st.floats(2e-6, 1e3), min_size=1, max_size=200))
def test_percentiles_are_within_three_percent(delays: list[float]) -> None:
    one_by_one, at_once = LatencyHistogram(), LatencyHistogram()
    for delay in delays:
        one_by_one.add(delay)
    at_once.add_all(np.array(delays))
    summary = one_by_one.summary()
    assert summary == at_once.summary()
    assert summary["n"] == len(delays) and summary["max"] == pytest.approx(1e3 * max(delays))
    for q in (50, 95, 99):
        exact = sorted(delays)[int(np.ceil(q / 100 * len(delays))) - 1]
        assert summary[f"p{q}"] == pytest.approx(1e3 * exact, rel=0.03)


def test_an_interval_tells_of_itself_alone() -> None:
    histogram = LatencyHistogram()
    assert histogram.summary() == histogram.interval() == {"n": 0}
    histogram.add(5.0)
    histogram.end_interval()
    histogram.add(1e-3)
    histogram.add(-1e-3)  # clocks differ
    assert histogram.interval()["max"] == 5e3
    histogram.end_interval()
    assert histogram.interval()["n"] == 2 and histogram.interval()["max"] == pytest.approx(1.0)
    assert histogram.summary()["n"] == 3 and histogram.summary()["max"] == 5e3


def test_a_publisher_of_a_file_waits_for_its_sink() -> None:
    publisher = Publisher(ListSink(), limit_bytes=1, live=False)
    publisher.hand_over(Output(1, np.empty(0, SPIKE_DTYPE)), 0.0)
    waiting = threading.Thread(target=publisher.hand_over, args=(Output(2, np.empty(0, SPIKE_DTYPE)), 0.0))
    waiting.start()
    waiting.join(0.02)
    assert waiting.is_alive() and len(publisher.queue) == 1
    publisher.queue.close()
    waiting.join(PATIENCE_S)
    assert publisher.n_dropped == 0


def test_status_goes_on_while_the_source_is_silent() -> None:
    """A decoder must be able to tell a silent amplifier from a dead sorter."""
    source, sink = ListSource(even(3000, 300), live=True, pause_after=5), ListSink()
    with Stream(source, CountingSorter(), [sink], config=StreamConfig(status_s=0.05)) as stream:
        assert source.delivered.wait(PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        while sum(output.status is not None for output in list(sink.outputs)) < 5 and time.monotonic() < deadline:
            stream.wait(0.02)
        silent = [output for output in list(sink.outputs) if output.status is not None and not len(output.spikes)]
    assert len(silent) >= 3
    assert silent[-1].units is not None and silent[-1].status is not None
    assert silent[-1].status["source"] == {"stalls": 3}


def test_a_live_source_that_waits_is_sorted_by_less_and_a_file_is_not() -> None:
    waited_s = [1e6, 0, 150, 400, 1000, 0, 0, 0, 0]  # calibration is caught up with at the second chunk
    length, now = round(1.1 * FS), time.monotonic()
    chunks = [replace(chunk, t_acquired=now - wait) for chunk, wait in zip(even(9 * length, length), waited_s, strict=True)]
    config = StreamConfig(shed_ms=1e5, queue_s=1e3)
    levels = {}
    for live in (True, False):
        sorter = CountingSorter()
        with Stream(ListSource(chunks, live=live), sorter, config=config) as stream:
            assert stream.wait(PATIENCE_S)
        levels[live], status = sorter.levels, stream.status()
        n_shed = {"not_taught": length, "nearest": length, "crossings": 2 * length}
        assert status["samples_shed"] == ({**n_shed, "nearest": 2 * length, "not_taught": 2 * length} if live else {})
        assert status["shedding"] == "sorted"
    assert [level.value for level in levels[True]] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert not levels[False]
