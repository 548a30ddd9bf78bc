"""The recipe: from a chunk of voltage to spikes with unit ids.

    chunk -> preprocess -> traces (n_samples, n_channels) uV
          -> detect     -> peaks (n_peaks,)
          -> snippets   -> (n_peaks, n_snippet_samples, n_neighbors) uV
          -> assign     -> spikes (n_peaks,)

    at fixed multiples of sample_index, beside that path:
    snippets -> encode  -> embeddings (n_peaks, n_dims)
             -> learn   -> templates and prototypes follow, units are born

Deterministic: no clock, and the same spikes in one thread or two. What a period teaches may be learned in a thread of a pool; it
takes force at the end of the next period, never sooner and never later. Whatever adapts does so only where `_cut` splits the
stream, at fixed sample indices; that is why the size of the chunks makes no difference, down to the last bit.
"""

import logging
import time
from collections import deque
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.assign import Assign, Known, as_spikes
from streamsort.choose import choose_encoder
from streamsort.config import SorterConfig
from streamsort.detect import Detect
from streamsort.encode import Encoder
from streamsort.errors import StreamsortError
from streamsort.learner import Learner, Lesson
from streamsort.match import sizes
from streamsort.preprocess import Preprocess
from streamsort.probe import Probe
from streamsort.records import Chunk, Gap, Output, PeakBatch, StreamInfo
from streamsort.refresh import Snapshot, Verdict
from streamsort.shed import Level
from streamsort.snippets import Snippets

Floats = NDArray[np.float32]

# Ten times in a lesson: while one is learned, whoever names spikes waits for the interpreter at every turn, and ten delays of one
# chunk are less than one of ten.
_REST_S = 2e-3
_MOST_SAMPLES = 4096  # to a batch: matching still has the surroundings of all its peaks then

_log = logging.getLogger("streamsort.sorter")


class Sorter:
    """Sort one stream.

    Parameters
    ----------
    config : SorterConfig
    info : StreamInfo
        Of the source whose chunks will be processed.
    probe : Probe, optional
        By default the one the source brings; without either, a column of contacts 20 um apart is assumed.

    Attributes
    ----------
    margin_samples : int
        Look-ahead: a spike is emitted once so many samples after its trough are there; one that no unit explains, or that another
        had hidden, up to four milliseconds later.
    calibrated : bool
        Whether units exist; until then every spike is unsorted.
    progress : float
        Of calibration, 0 to 1.
    level : Level
        What is left out now for want of time.

    Raises
    ------
    StreamsortError
        If probe, stream, model and config do not fit together.
    """

    def __init__(self, config: SorterConfig, info: StreamInfo, probe: Probe | None = None) -> None:
        self.config, self.info = config, info
        self.probe = probe or info.probe or Probe.linear(info.n_channels)
        rate = info.sampling_frequency
        self.encoder, self.encoder_choice = choose_encoder(
            config.encode, n_channels=info.n_channels, sampling_frequency=rate, deadline_ms=config.stream.deadline_ms
        )
        self._preprocess = Preprocess(config.preprocess, info, self.probe)
        self._snippets = Snippets(config.snippets, self.probe, rate)
        self.check(self.encoder)
        self._warn_of_band()
        self._detect = Detect(config.detect, self.probe, rate, self._snippets.n_before, self._snippets.n_after)
        _, n_after, spans = sizes(config.match, rate)
        self._match_margin = n_after + spans.sweep
        self._learner = Learner(config, self.probe, rate, self._snippets, self.encoder.n_dims)
        self._assign: Assign | None = None
        self._gathered: list[PeakBatch] = []
        self._lesson: Future[Known | None] | None = None
        self._events: list[dict[str, Any]] = []
        self.level = Level.SORTED
        self._offers: deque[tuple[Verdict, Encoder | None]] = deque()
        self._period_samples = max(round(config.cluster.period_s * rate), 1)
        self._warmup_samples = round(config.warmup_s * rate)
        self._next_sample: int | None = None
        self._through_sample = self._published_through = 0
        self._learned_through = 0

    @property
    def margin_samples(self) -> int:
        return max(self._detect.margin, self._match_margin) + self._preprocess.delay_samples

    @property
    def calibrated(self) -> bool:
        return self._assign is not None

    @property
    def progress(self) -> float:
        return 1.0 if self.calibrated else min(self._through_sample / self._warmup_samples, 1.0)

    def warmup(self) -> None:
        """Compile every kernel and run the encoder once, on a scratch copy: the first real chunk pays for nothing."""
        self.encoder.warmup()
        self._learner.warmup(self.encoder.n_dims)

    def process(self, chunk: Chunk, pool: Executor | None = None) -> list[Output]:
        """Take the next chunk through all steps; one output per stretch between learning boundaries.

        Parameters
        ----------
        chunk : Chunk
        pool : Executor, optional
            Of threads, where lessons are learned.
        """
        outputs = []
        for batch in self.detect(chunk):
            outputs.append(self.assign(batch))
            self.learn(pool)
        return outputs

    def detect(self, chunk: Chunk) -> list[PeakBatch]:
        """Find the peaks whose look-ahead ends in this chunk and cut their snippets.

        Raises
        ------
        StreamsortError
            If the chunk has another number of channels than the stream.
        """
        if chunk.traces.ndim != 2 or chunk.traces.shape[1] != self.info.n_channels:
            raise StreamsortError(
                f"chunk at sample {chunk.start_sample}: shape {chunk.traces.shape}, expected (n, {self.info.n_channels})"
            )
        start, traces, gaps = chunk.start_sample, chunk.traces, chunk.gaps
        batches = []
        if self._next_sample is not None and start < self._next_sample:  # seen before: the time axis never goes back
            known = min(self._next_sample - start, len(traces))
            gaps = gaps or ((Gap(start, known, "duplicate"),) if known else ())
            start, traces = self._next_sample, traces[known:]
        elif self._next_sample is not None and start > self._next_sample:
            # What was due within the gap happens before the first sample after it, whatever the size of the chunk.
            batches, gaps = [self._detect_stretch(start, traces[:0], chunk, gaps)], ()
        for a, b in self._cut(start, start + len(traces)) or [(start, start)]:
            batches.append(self._detect_stretch(a, traces[a - start : b - start], chunk, gaps))
            gaps = ()
        self._next_sample = start + len(traces)
        return batches

    def assign(self, batch: PeakBatch) -> Output:
        """Name the spikes that this batch decides; nothing is learned."""
        if self._assign is None:
            self._gathered.append(batch)
            spikes, through = as_spikes(batch.peaks), batch.through_sample - self._detect.margin
        else:
            if batch.start_sample > self._through_sample:
                self._assign.skip_gap(batch.start_sample - self._through_sample)
            if self.level >= Level.NEAREST:
                spikes = self._assign.hasten(batch, batch.through_sample - self._detect.margin, self.level == Level.NEAREST)
            else:
                spikes = self._assign(batch)
            through = self._assign.through_sample
        self._through_sample = batch.through_sample
        if len(spikes):
            spikes["sample_index"] -= self._preprocess.delay_samples
            if len(spikes) > 1:
                spikes = spikes[np.lexsort((spikes["unit_id"], spikes["sample_index"]))]
            spikes["time"] = batch.t_origin + spikes["sample_index"] / self.info.sampling_frequency
        self._published_through = max(through - self._preprocess.delay_samples, 0)
        return Output(
            self._published_through,
            spikes,
            self.take_events(),
            list(batch.gaps),
            t_acquired=batch.t_acquired,
            model=self.encoder.name,
        )

    def learn(self, pool: Executor | None = None) -> None:
        """At a learning boundary: go by what the last period but one has taught, and let the last one teach. Elsewhere do nothing.

        Parameters
        ----------
        pool : Executor, optional
            Of threads; without it the lesson is learned before this returns. The spikes are the same.
        """
        boundary = self._through_sample // self._period_samples * self._period_samples
        warm = self._assign is None and self._through_sample >= self._warmup_samples
        if boundary <= self._learned_through and not warm:
            return
        if self.level > Level.SORTED and self._assign is not None:
            self._skip_lesson(self._assign, boundary)
            return
        self.settle()
        if self._assign is None:
            batches, self._gathered = self._gathered, []
            lesson = self._learner.gather(self.encoder, batches)
        else:
            lesson = self._learner.learn(self.encoder, self._assign.take_notes(), boundary)
        if pool is not None:
            self._lesson = pool.submit(_learn, lesson, _REST_S)
        else:
            self._lesson = Future()
            self._lesson.set_result(_learn(lesson))
        self._learned_through = boundary
        if warm:
            self.settle()
            self._assign = self._learner.calibrate(self._through_sample, self._through_sample - self._detect.margin)
            self._events += self._learner.registry.take_events()

    def _skip_lesson(self, assign: Assign, boundary: int) -> None:
        """Forget what the last period could teach; the lesson under way takes force when it is done, and is not waited for."""
        assign.take_notes()
        self._learned_through = boundary
        if not self.learning:
            self.settle()

    def shed(self, level: Level) -> None:
        """Leave so much out from now on; the ledger says so. Never done for a file, whose spikes depend on its samples alone."""
        if level == self.level:
            return
        reason = f"{self.level.name.lower()} before"
        self.level = level
        event = {"event": "shedding", "sample_index": self._published_through, "unit_id": None, "into": None, "reason": reason}
        self._events.append(event | {"level": level.name.lower()})

    def settle(self) -> None:
        """Wait for the lesson under way, if there is one, and go by it from now on; raise what it raised."""
        if self._lesson is None:
            return
        lesson, self._lesson = self._lesson, None
        known = lesson.result()
        if known is None or self._assign is None:
            return
        self._assign.use(known)
        while self._offers:
            self._decide(*self._offers.popleft(), self._published_through)
        self._events += self._learner.registry.take_events()

    @property
    def learning(self) -> bool:
        """Whether a lesson is under way."""
        return self._lesson is not None and not self._lesson.done()

    def offer(self, verdict: Verdict, encoder: Encoder | None = None) -> None:
        """Let another encoder take over at the next learning boundary, or a refusal be told then; from any thread.

        The ledger says so in an event `model`. No spike of the output that carries the event, or of one after it, lies before its
        `sample_index`; of the outputs before, all but those of the last four milliseconds do.

        Parameters
        ----------
        verdict : Verdict
            From a snapshot of this sorter.
        encoder : Encoder, optional
            That was accepted; the sorter's own from now on.
        """
        self._offers.append((verdict, encoder))

    def snapshot(self) -> Snapshot | None:
        """Return units and memory as they were at the last learning boundary; None before there are units.

        Not while `learning`.
        """
        learner = self._learner
        if learner.prototypes is None:
            return None
        copied = learner.prototypes.copy()
        return Snapshot(self._learned_through, self.encoder, copied, learner.memory.members(), learner.memory.periods())

    def take_events(self) -> list[dict[str, Any]]:
        """Hand over the ledger lines that no output has carried yet."""
        events, self._events = self._events, []
        return events

    def units_table(self) -> list[dict[str, Any]]:
        """List the units as the `units` topic publishes them, as they were at the last learning boundary."""
        return self._learner.table

    def counters(self) -> dict[str, Any]:
        """Say what is in use, for the status."""
        return {
            "encoder": self.encoder.name,
            "encoder_choice": self.encoder_choice.reason,
            "provider": self.encoder.provider,
            "bad_channels": np.flatnonzero(self._preprocess.bad_channels).tolist(),
            "n_prototypes": 0 if self._learner.prototypes is None else len(self._learner.prototypes),
        }

    def templates(self) -> dict[str, NDArray[Any]]:
        """Return what a report draws: per prototype its unit, channel, size and template (noise units), and the neighbour table."""
        p = self._learner.prototypes
        if p is None:
            return {}
        return {"unit": p.unit, "channel": p.channel, "n_spikes": p.n_spikes, "template": p.template, "neighbors": p.neighbors}

    def check(self, encoder: Encoder) -> None:
        """Check that an encoder takes the snippets of this stream.

        Raises
        ------
        StreamsortError
            If it does not.
        """
        ours = (self._snippets.n_before, self._snippets.n_after, self.config.snippets.n_neighbors)
        models = (encoder.n_before, encoder.n_after, encoder.contract.n_neighbors)
        if ours != models:
            raise StreamsortError(
                f"encoder {encoder.name}: takes {models} (samples before, samples after, channels), snippets have {ours}; "
                "set snippets.ms_before, ms_after and n_neighbors to the model's"
            )

    def _warn_of_band(self) -> None:
        config, contract = self.config.preprocess, self.encoder.contract
        if (config.freq_min_hz, config.freq_max_hz) != (contract.freq_min_hz, contract.freq_max_hz):
            _log.warning(
                "the stream is filtered to %g-%g Hz, encoder %s was trained on %g-%g Hz",
                config.freq_min_hz,
                config.freq_max_hz,
                contract.name,
                contract.freq_min_hz,
                contract.freq_max_hz,
            )

    def _cut(self, start: int, end: int) -> list[tuple[int, int]]:
        """Split [start, end) at every sample index at which something may change."""
        stretches = []
        while start < end:
            steps = self._period_samples, self._preprocess.period_samples, _MOST_SAMPLES
            stop = min(end, *((start // step + 1) * step for step in steps))
            if start < self._warmup_samples < stop:
                stop = self._warmup_samples
            stretches.append((start, stop))
            start = stop
        return stretches

    def _detect_stretch(self, start: int, traces: NDArray[Any], chunk: Chunk, gaps: tuple[Gap, ...]) -> PeakBatch:
        filtered = self._preprocess(traces, start)
        peaks = self._detect(filtered, start, self._preprocess.noise_level, self._preprocess.unusable)
        snippets = self._snippets(self._detect.window, peaks)
        return PeakBatch(
            start_sample=start,
            through_sample=start + len(traces),
            peaks=peaks,
            snippets=snippets,
            noise_level=self._noise_of(peaks),
            traces=filtered,
            near_gap=(self._preprocess.unusable != 0) | (np.arange(start, start + len(traces)) < self._detect.settled_from),
            channel_noise=self._preprocess.noise_level,
            t_origin=chunk.t_origin,
            t_acquired=chunk.t_acquired,
            gaps=(*gaps, *self._preprocess.gaps),
        )

    def _noise_of(self, peaks: NDArray[Any]) -> Floats:
        level = self._preprocess.noise_level
        if level is None or not len(peaks):
            return np.zeros((len(peaks), self.config.snippets.n_neighbors), np.float32)
        channels = self._snippets.neighbors[peaks["channel"]]
        return np.where(channels >= 0, level[channels], np.float32(0))

    def _decide(self, verdict: Verdict, encoder: Encoder | None, sample_index: int) -> None:
        """Let the encoder take over if the verdict says so, and tell it in either case."""
        if self._learner.prototypes is not None and verdict.space is not None and encoder is not None:
            self.encoder = encoder
            self._learner.move(self._learner.prototypes, verdict.space, verdict.members)
        self._learner.registry.record(
            "model", sample_index, None, verdict.reason, model=self.encoder.name, sha256=self.encoder.sha256, **verdict.figures()
        )


def _learn(lesson: Lesson, rest_s: float = 0.0) -> Known | None:
    """Learn a lesson to its end, resting wherever it may."""
    while True:
        try:
            next(lesson)
        except StopIteration as end:
            known: Known | None = end.value
            return known
        if rest_s:
            time.sleep(rest_s)
