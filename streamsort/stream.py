"""The threads of a running sorter; the only file that starts any to sort, and that holds queues between them.

Chunks of a `Source` go in, each `Output` goes to every sink, and between them are the threads acquire, sort and one publisher per
sink, each behind a bounded queue. They only move what the `Sorter` computes, so the spikes are those of `Sorter.process` called in
a loop. Detection and assignment share a thread: each takes a fraction of a millisecond, and handing over between threads of one
interpreter costs as much. Beside them one thread learns, and one looks after offers of a new encoder, if there is a session
directory.

When a queue is full, a file waits: each thread blocks the one before it and nothing is ever lost. A live source cannot wait. When
its chunks do, the sorter leaves out what matters least (`streamsort.shed`); once `queue_s` seconds of them are waiting
(`calibration_queue_s` until calibration is caught up with), new ones are dropped, and the next one taken carries a `Gap` of kind
`overrun`. A sink that does not keep up loses its oldest outputs, for itself alone.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import numpy as np

from streamsort.config import StreamConfig
from streamsort.latency import LatencyHistogram, low_latency
from streamsort.offers import Refresher
from streamsort.publish import Publisher
from streamsort.queues import BoundedQueue
from streamsort.records import SPIKE_DTYPE, UNSORTED, Chunk, Flag, Gap, Output, PeakBatch
from streamsort.session import SessionWriter
from streamsort.shed import Shedder
from streamsort.sinks import Archive, Sink
from streamsort.sorter import Sorter
from streamsort.sources import Source

_JOINED_S = 0.01  # at 1 ms a chunk costs twice as much per sample
_SINK_BYTES = 16 << 20  # some 10 s of a busy probe
_ABORT_S, _JOIN_STEP_S = 2.0, 0.2
_ARCHIVE_BYTES = 256 << 20  # some minutes: what an archive loses is lost for good
_ARCHIVE_REST_S = 0.01

_Outbox = BoundedQueue[Any] | Refresher


@dataclass
class _Counts:
    """What a stream counts; each field is written by one thread."""

    chunks: int = 0
    samples_acquired: int = 0
    overruns: int = 0  # chunks dropped
    samples_overrun: int = 0
    spikes: int = 0  # all that were published, of which
    unsorted: int = 0
    late: int = 0
    samples_lost: dict[str, int] = field(default_factory=dict)  # by kind of gap
    samples_shed: dict[str, int] = field(default_factory=dict)  # by what was left out, see `streamsort.shed`


class Stream:
    """Sort a source in threads until it ends or is stopped.

    Parameters
    ----------
    source : Source
        Closed by the stream.
    sorter : Sorter
    sinks : sequence of Sink
        Each gets every output, on a thread of its own, and is closed by the stream. The latency in the status is the first one's.
    archive : Archive, optional
        A sink with a much longer queue; it is told when the stream does not end as it should. With a `SessionWriter` the encoder
        may be refreshed: offers are looked for in its directory.
    config : StreamConfig, optional
        By default the sorter's.
    on_status : callable, optional
        Called with `status()` about every `status_s` by the thread that is in `wait`, also while the source is silent.

    Examples
    --------
    ::

        with Stream(source, sorter, [open_sink("tcp://127.0.0.1:5560", info=source.info)]) as stream:
            stream.wait()
    """

    def __init__(
        self,
        source: Source,
        sorter: Sorter,
        sinks: Sequence[Sink] = (),
        *,
        archive: Archive | None = None,
        config: StreamConfig | None = None,
        on_status: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._source, self._sorter, self._on_status = source, sorter, on_status
        self._config = sorter.config.stream if config is None else config
        self._live = source.info.live
        self._chunks: BoundedQueue[Chunk] = BoundedQueue(self._config.queue_s * source.info.sampling_frequency)
        self._publishers = [Publisher(sink, _SINK_BYTES, self._live) for sink in sinks]
        self._archive = archive
        if archive is not None:
            self._publishers.append(Publisher(archive, _ARCHIVE_BYTES, self._live, _ARCHIVE_REST_S))
        # A session keeps what a trainer needs, and has a place to put what it makes of it.
        self._refresher = Refresher(sorter, archive) if isinstance(archive, SessionWriter) else None
        self._latency = {stage: LatencyHistogram() for stage in ("acquire", "detect", "assign")}
        if self._publishers:
            self._latency |= {"publish": self._publishers[0].publish_latency, "total": self._publishers[0].total_latency}
        self._counts = _Counts()
        self._sorter_status: dict[str, Any] = {}
        self._dropped: list[Gap] = []
        self._shedder = Shedder(self._config)
        self._caught_up = self._abreast = False
        self._status_due = 0.0
        self._through_sample = 0
        self._taken_cpu_s = 0.0
        self._threads: list[threading.Thread] = []
        self._n_running = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._pool = ThreadPoolExecutor(1, "streamsort-learn")
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop; abort when the block was left by an exception other than Ctrl-C."""
        if error is None or isinstance(error, KeyboardInterrupt):
            self.stop()
        else:
            self.abort()

    def start(self) -> None:
        """Warm the sorter up and start the threads; a stream runs once, and starting it again does nothing."""
        if self._threads or self._ended.is_set():
            return
        try:
            self._sorter.warmup()
        except BaseException:
            self.abort()
            raise
        self._restore.enter_context(low_latency())
        self._add_thread("acquire", self._acquire, None, [self._chunks])
        outboxes: list[_Outbox] = [publisher.queue for publisher in self._publishers]
        if self._refresher is not None:
            outboxes.append(self._refresher)
            self._add_thread("refresh", self._refresher.run, None, [])
        self._add_thread("sort", self._sort, self._chunks, outboxes)
        for k, publisher in enumerate(self._publishers):
            self._add_thread(f"publish-{k}-{publisher.name}", publisher.run, publisher.queue, [])
        self._n_running = len(self._threads)
        for thread in self._threads:
            thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the source has ended and all of it is published; False if that takes longer than `timeout` seconds.

        Raises
        ------
        BaseException
            The first one that ended a thread of the stream.
        """
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while not self._ended.wait(max(min(self._config.status_s, deadline - time.monotonic()), 0.0)):
            if self._on_status is not None:
                self._on_status(self.status())
            if time.monotonic() >= deadline:
                return False
        self._finish()
        return True

    def stop(self) -> None:
        """Stop acquiring, sort and publish all that was acquired, and close the sinks; not to be called by a sink.

        Raises
        ------
        BaseException
            The first one that ended a thread of the stream.
        """
        self._stop_acquiring()
        self._finish()

    def abort(self) -> None:
        """Stop, discard all that is not yet published, and close the sinks; what ended a thread is not raised.

        A sink that hangs is left to itself after two seconds.
        """
        self._spoil_archive()
        queues: list[BoundedQueue[Any]] = [self._chunks, *(publisher.queue for publisher in self._publishers)]
        for queue in queues:
            queue.abort()
        self._stop_acquiring()
        self._join(_ABORT_S)

    def status(self) -> dict[str, Any]:
        """Return counters, queue depths and latencies in ms; from any thread, and ready for JSON.

        The stages follow each other: `acquire` is from the newest sample of a chunk to the chunk, `detect` from there to its peaks,
        with the time in the queue, `assign` from there to units, `publish` from there until the sink has returned, with the time in
        its queue. `total` is from the trough of each spike to the sink's return, so it holds `floor_ms` of look-ahead and the
        filling of the chunk too.
        `acquire` and `total` exist for a live source only, whose samples have a time on the host's clock.
        """
        counts = self._counts
        milliseconds = 1e3 / self._source.info.sampling_frequency
        return {
            **self._sorter_status,
            "time": time.monotonic(),
            "live": self._live,
            "floor_ms": self._sorter.margin_samples * milliseconds,
            **{name: value for name, value in vars(counts).items() if not isinstance(value, dict)},
            "samples_lost": dict(counts.samples_lost),
            "samples_shed": dict(counts.samples_shed),
            "shedding": self._sorter.level.name.lower(),
            "source": dict(self._source.counters),
            "refresh": {} if self._refresher is None else self._refresher.status(),
            "outputs_dropped": sum(publisher.n_dropped for publisher in self._publishers),
            "sink_errors": sum(publisher.n_errors for publisher in self._publishers),
            "queues": {"chunks_ms": self._chunks.weight * milliseconds},
            "threads": {thread.name: thread.native_id for thread in threading.enumerate()},  # as the system counts their time
            "sinks": [publisher.status() for publisher in self._publishers],
            "latency_ms": {stage: histogram.summary() for stage, histogram in self._latency.items()},
            "latency_interval_ms": {stage: histogram.interval() for stage, histogram in self._latency.items()},
        }

    def _acquire(self) -> None:
        with contextlib.closing(self._source):
            for chunk in self._source:
                self._accept(chunk)
                if self._stopping.is_set():
                    break

    def _accept(self, chunk: Chunk) -> None:
        """Queue a chunk, with what was dropped before it; or drop it."""
        counts = self._counts
        offered = replace(chunk, gaps=(*self._dropped, *chunk.gaps)) if self._dropped else chunk
        if self._take_in(offered):
            self._dropped = []
            counts.chunks += 1
            counts.samples_acquired += chunk.n_samples
        else:
            self._drop(chunk)
            counts.overruns += 1
            counts.samples_overrun += chunk.n_samples
        if self._live:
            t_newest = chunk.t_origin + chunk.end_sample / self._source.info.sampling_frequency
            self._latency["acquire"].add(chunk.t_acquired - t_newest)

    def _take_in(self, chunk: Chunk) -> bool:
        """Queue a chunk; a live source's only if there is room, of which there is more until calibration is caught up with."""
        if not self._live:
            return self._chunks.put(chunk, chunk.n_samples)
        rate = self._source.info.sampling_frequency
        self._caught_up |= self._sorter.calibrated and self._chunks.weight < self._config.queue_s * rate / 2
        waiting_s = self._config.queue_s if self._caught_up else max(self._config.queue_s, self._config.calibration_queue_s)
        return self._chunks.offer(chunk, chunk.n_samples, waiting_s * rate)

    def _drop(self, chunk: Chunk) -> None:
        """Remember what is missing, as one gap while chunk follows chunk."""
        last = self._dropped[-1] if self._dropped and not chunk.gaps else None
        if last is not None and last.kind == "overrun" and last.start_sample + last.n_samples == chunk.start_sample:
            self._dropped[-1] = replace(last, n_samples=last.n_samples + chunk.n_samples)
        else:
            self._dropped += [*chunk.gaps, Gap(chunk.start_sample, chunk.n_samples, "overrun")]

    def _sort(self) -> None:
        """Sort what is waiting, a little of it at a time: one long chunk costs less than many short ones."""
        most = _JOINED_S * self._source.info.sampling_frequency
        while (taken := self._chunks.take(most, self._config.status_s)) or not self._chunks.ended:
            if not taken:  # the source is silent, which is when its status is wanted most
                self._say_status()
                self._serve_refresher()
            self._shed(taken)
            for chunk in Chunk.joined(taken):
                self._taken_cpu_s = time.thread_time()
                for batch in self._sorter.detect(chunk):
                    self._assign(batch)
        self._conclude()

    def _shed(self, taken: list[Chunk]) -> None:
        """Leave out what there is no time for, once a live source was caught up with."""
        if not (self._live and taken and self._sorter.calibrated):
            return
        waited_s = time.monotonic() - taken[0].t_acquired
        self._abreast |= waited_s < self._config.shed_ms / 1e3
        if not self._abreast:
            return
        level = self._shedder.see(waited_s, taken[0].start_sample / self._source.info.sampling_frequency)
        self._sorter.shed(level)
        if level:
            shed, name = self._counts.samples_shed, level.name.lower()
            n_samples = sum(chunk.n_samples for chunk in taken)
            self._counts.samples_shed = {**shed, name: shed.get(name, 0) + n_samples}

    def _assign(self, batch: PeakBatch) -> None:
        t_detected = time.monotonic()
        self._latency["detect"].add(t_detected - batch.t_acquired)
        output = self._sorter.assign(batch)
        now = time.monotonic()
        self._latency["assign"].add(now - t_detected)
        output.t_detected, output.t_assigned, output.compute_s = t_detected, now, time.thread_time() - self._taken_cpu_s
        self._count(output, now)
        if now >= self._status_due:
            self._attach_status(output, now)
        self._hand_over(output, now)
        self._sorter.learn(self._pool)
        self._serve_refresher()

    def _serve_refresher(self) -> None:
        if self._refresher is not None:
            self._refresher.serve()

    def _conclude(self) -> None:
        """Hand over one more output: what was dropped last, which no chunk could tell of, the last events and the final status."""
        self._sorter.settle()
        if self._archive is not None and self._publishers[-1].n_dropped:
            self._spoil_archive()
        self._say_status(list(self._dropped))

    def _say_status(self, gaps: Sequence[Gap] = ()) -> None:
        """Hand over an output without spikes."""
        now = time.monotonic()
        output = Output(self._through_sample, np.empty(0, SPIKE_DTYPE), self._sorter.take_events(), list(gaps))
        self._count(output, now)
        self._attach_status(output, now)
        self._hand_over(output, now)

    def _count(self, output: Output, now: float) -> None:
        """Count an output, and flag the spikes that are late before they are even handed over."""
        counts, spikes = self._counts, output.spikes
        if self._live:
            late = now - spikes["time"] > self._config.deadline_ms / 1e3
            spikes["flags"][late] |= int(Flag.LATE)
            counts.late += int(late.sum())
        counts.spikes += len(spikes)
        counts.unsorted += int((spikes["unit_id"] == UNSORTED).sum())
        for gap in output.gaps:  # into a new dict, since another thread may be reading the old one
            n_lost = counts.samples_lost.get(gap.kind, 0) + gap.n_samples
            counts.samples_lost = {**counts.samples_lost, gap.kind: n_lost}
        self._through_sample = output.through_sample

    def _attach_status(self, output: Output, now: float) -> None:
        sorter = self._sorter
        output.units = sorter.units_table()
        self._sorter_status = {
            "calibrated": sorter.calibrated,
            "progress": sorter.progress,
            "n_units": len(output.units),
            **sorter.counters(),
        }
        for histogram in self._latency.values():
            histogram.end_interval()
        output.status = self.status()
        self._status_due = now + self._config.status_s

    def _hand_over(self, output: Output, now: float) -> None:
        for publisher in self._publishers:
            publisher.hand_over(output, now)

    def _add_thread(
        self, name: str, stage: Callable[[], None], inbox: BoundedQueue[Any] | None, outboxes: Sequence[_Outbox]
    ) -> None:
        # Daemons, so that a sink that hangs cannot keep a process alive that was told twice to end.
        run = threading.Thread(target=self._run, args=(stage, inbox, outboxes), name=f"streamsort-{name}", daemon=True)
        self._threads.append(run)

    def _run(self, stage: Callable[[], None], inbox: BoundedQueue[Any] | None, outboxes: Sequence[_Outbox]) -> None:
        """Run a stage to its end; then the stage before it need not wait, and those after it finish what they have."""
        try:
            stage()
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self._spoil_archive()
            self._stop_acquiring()
        finally:
            if inbox is not None:
                inbox.abort()
            for outbox in outboxes:
                outbox.close()
            with self._lock:
                self._n_running -= 1
                if self._n_running == 0:
                    self._ended.set()

    def _stop_acquiring(self) -> None:
        self._stopping.set()
        self._source.close()

    def _finish(self) -> None:
        self._join()
        if self._failure is not None:
            raise self._failure

    def _spoil_archive(self) -> None:
        if self._archive is not None:
            self._archive.clean = False

    def _join(self, timeout_s: float = float("inf")) -> None:
        if not self._threads and not self._ended.is_set():  # never started
            for publisher in self._publishers:
                publisher.sink.close()
            self._ended.set()
        deadline = time.monotonic() + timeout_s
        while not self._ended.wait(_JOIN_STEP_S):  # in steps: a wait without end cannot be interrupted everywhere
            if time.monotonic() >= deadline:
                break
        else:
            for thread in self._threads:
                thread.join()
        self._pool.shutdown(wait=self._ended.is_set())
        self._restore.close()
