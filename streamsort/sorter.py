"""The recipe: from a chunk of voltage to spikes with unit ids.

    chunk -> preprocess -> traces (n_samples, n_channels) uV
          -> detect     -> peaks (n_peaks,)
          -> snippets   -> (n_peaks, n_snippet_samples, n_neighbors) uV
          -> encode     -> embeddings (n_peaks, n_dims)
          -> assign     -> spikes (n_peaks,)
          -> learn         prototypes follow, units are born, at fixed multiples of sample_index

Synchronous and deterministic: no thread, no clock. `process` runs the steps in a row; the threads of `stream.py` call the same
methods, `detect` in one thread and `encode`, `assign`, `learn` in another, so both give the same spikes. Whatever adapts does so
only where `_cut` splits the stream, at fixed sample indices; that is why the size of the chunks makes no difference, down to the
last bit.
"""

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.choose import choose_encoder
from streamsort.config import SorterConfig
from streamsort.detect import Detect
from streamsort.encode import Encoder
from streamsort.errors import StreamsortError
from streamsort.learner import TURNS, Learner, as_spikes
from streamsort.match import sizes
from streamsort.preprocess import Preprocess
from streamsort.probe import Probe
from streamsort.records import Chunk, Gap, Output, PeakBatch, StreamInfo
from streamsort.refresh import Snapshot, Verdict
from streamsort.snippets import Snippets

Floats = NDArray[np.float32]

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
        had hidden, up to two milliseconds later.
    calibrated : bool
        Whether units exist; until then every spike is unsorted.
    progress : float
        Of calibration, 0 to 1.

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
        self._offers: deque[tuple[Verdict, Encoder | None]] = deque()
        self._turn_samples = max(round(config.cluster.period_s * rate / TURNS), 1)
        self._warmup_samples = round(config.warmup_s * rate)
        self._next_sample: int | None = None
        self._through_sample = self._published_through = 0
        self._learned_through = 0

    @property
    def margin_samples(self) -> int:
        return max(self._detect.margin, self._match_margin) + self._preprocess.delay_samples

    @property
    def calibrated(self) -> bool:
        return self._learner.assign is not None

    @property
    def progress(self) -> float:
        return 1.0 if self.calibrated else min(self._through_sample / self._warmup_samples, 1.0)

    def warmup(self) -> None:
        """Compile every kernel and run the encoder once, on a scratch copy: the first real chunk pays for nothing."""
        self.encoder.warmup()
        self._learner.warmup(self.encoder.n_dims)

    def process(self, chunk: Chunk) -> list[Output]:
        """Take the next chunk through all steps; one output per stretch between learning boundaries."""
        outputs = []
        for batch in self.detect(chunk):
            outputs.append(self.assign(batch, self.encode([batch])[0]))
            self.learn()
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

    def encode(self, batches: Sequence[PeakBatch]) -> list[Floats]:
        """Embed the snippets of several batches in one go; a row's bits do not depend on the others."""
        if not any(len(batch.peaks) for batch in batches):  # at 1 ms most are empty
            return [np.empty((0, self.encoder.n_dims), np.float32)] * len(batches)
        snippets = np.concatenate([batch.snippets for batch in batches])
        embeddings = self.encoder(snippets, np.concatenate([batch.noise_level for batch in batches]))
        return np.split(embeddings, np.cumsum([len(batch.peaks) for batch in batches])[:-1])

    def assign(self, batch: PeakBatch, embeddings: Floats) -> Output:
        """Name the spikes that this batch decides; nothing is learned."""
        learner = self._learner
        if batch.start_sample > self._through_sample and learner.prototypes is not None:
            learner.prototypes.skip_gap()
            learner.registry.skip_gap(batch.start_sample - self._through_sample)
        self._through_sample = batch.through_sample
        if learner.assign is None or learner.prototypes is None:
            learner.gather(batch, embeddings)
            spikes, through = as_spikes(batch.peaks), batch.through_sample - self._detect.margin
        else:
            spikes = learner.name(learner.assign, learner.prototypes, batch, embeddings)
            through = learner.assign.through_sample
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

    def learn(self) -> None:
        """At a learning boundary: calibrate once, later let units follow and appear. Elsewhere do nothing."""
        boundary = self._through_sample // self._turn_samples * self._turn_samples
        learner, turn = self._learner, boundary // self._turn_samples % TURNS
        if learner.assign is None or learner.prototypes is None:
            if boundary > self._learned_through and turn == 0:
                learner.follow_tissue()
                self._learned_through = boundary
            if self._through_sample >= self._warmup_samples:
                learner.follow_tissue()
                learner.calibrate(self._through_sample, self._through_sample - self._detect.margin)
                self._learned_through = boundary
        elif boundary > self._learned_through:
            learner.learn(learner.assign, learner.prototypes, boundary, turn)
            self._learned_through = boundary
            while turn == 1 and self._offers:  # when no peak waits in the former space
                self._decide(*self._offers.popleft(), self._published_through)

    def offer(self, verdict: Verdict, encoder: Encoder | None = None) -> None:
        """Let another encoder take over at the next learning boundary, or a refusal be told then; from any thread.

        The ledger says so in an event `model`. No spike of the output that carries the event, or of one after it, lies before its
        `sample_index`; of the outputs before, all but those of the last two milliseconds do.

        Parameters
        ----------
        verdict : Verdict
            From a snapshot of this sorter.
        encoder : Encoder, optional
            That was accepted; the sorter's own from now on.
        """
        self._offers.append((verdict, encoder))

    def snapshot(self) -> Snapshot | None:
        """Return units and memory as they were at the last learning boundary; None before there are units."""
        learner = self._learner
        if learner.prototypes is None:
            return None
        copied = learner.prototypes.copy()
        return Snapshot(self._learned_through, self.encoder, copied, learner.memory.members(), learner.memory.periods())

    def take_events(self) -> list[dict[str, Any]]:
        """Hand over the ledger lines that no output has carried yet: those of the last `learn`."""
        return self._learner.registry.take_events()

    def units_table(self) -> list[dict[str, Any]]:
        """List the units as the `units` topic publishes them."""
        return self._learner.registry.table(self._through_sample)

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
            steps = self._turn_samples, self._preprocess.period_samples, _MOST_SAMPLES
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
        if level is None:
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
