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
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.calibrate import calibrate, template_mismatch
from streamsort.cluster import Assignment, Newcomer, Prototypes
from streamsort.config import SorterConfig
from streamsort.detect import Detect
from streamsort.encode import Encoder
from streamsort.errors import StreamsortError
from streamsort.preprocess import Preprocess
from streamsort.probe import Probe
from streamsort.records import PEAK_DTYPE, SPIKE_DTYPE, UNSORTED, Chunk, Gap, Output, PeakBatch, StreamInfo
from streamsort.reservoir import Reservoir
from streamsort.snippets import Snippets
from streamsort.units import Registry

Floats = NDArray[np.float32]

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
        Look-ahead: a spike is emitted once so many samples after its trough are there.
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
        self.encoder = Encoder(config.encode.model or None, config.encode.provider, sampling_frequency=rate)
        self._preprocess = Preprocess(config.preprocess, info, self.probe)
        self._snippets = Snippets(config.snippets, self.probe, rate)
        self._check_snippets()
        self._warn_of_band()
        self._detect = Detect(config.detect, self.probe, rate, self._snippets.n_before, self._snippets.n_after)
        self.registry = Registry(rate)
        self.prototypes: Prototypes | None = None
        snippet_shape = self._snippets.n_before + self._snippets.n_after, config.snippets.n_neighbors
        self._reservoir = Reservoir(info.n_channels, self.encoder.n_dims, snippet_shape, config.seed)
        self._period_samples = max(round(config.cluster.period_s * rate), 1)
        self._warmup_samples = round(config.warmup_s * rate)
        self._next_sample: int | None = None
        self._through_sample = 0
        self._learned_through = 0
        self._taught: list[tuple[PeakBatch, Assignment, NDArray[Any]]] = []

    @property
    def margin_samples(self) -> int:
        return self._detect.margin + self._preprocess.delay_samples

    @property
    def calibrated(self) -> bool:
        return self.prototypes is not None

    @property
    def progress(self) -> float:
        return 1.0 if self.calibrated else min(self._through_sample / self._warmup_samples, 1.0)

    def warmup(self) -> None:
        """Compile every kernel and run the encoder once, on a scratch copy: the first real chunk pays for nothing."""
        rng = np.random.default_rng(0)
        self.encoder.warmup()
        n, n_dims = 64, self.encoder.n_dims
        peaks = np.zeros(n, PEAK_DTYPE)
        peaks["sample_index"] = np.arange(n)
        snippets = rng.normal(size=(n, self._snippets.n_before + self._snippets.n_after, self.config.snippets.n_neighbors)).astype(
            np.float32
        )
        embeddings = rng.normal(size=(n, n_dims)).astype(np.float32)
        prototypes = self._cluster(
            peaks, embeddings, snippets, np.full(n, 10.0, np.float32), Registry(self.info.sampling_frequency), 0
        )
        prototypes.learn(prototypes.predict(embeddings, peaks["channel"]), peaks, snippets)
        template_mismatch(snippets[0], snippets[1], self._snippets.neighbors[0], self._snippets.neighbors[0], 0.0)

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
        """Name the unit of each peak; nothing is learned."""
        if batch.start_sample > self._through_sample and self.prototypes is not None:
            self.prototypes.skip_gap()
            self.registry.skip_gap(batch.start_sample - self._through_sample)
        self._through_sample = batch.through_sample
        through = max(batch.through_sample - self.margin_samples, 0)
        spikes = self._name(batch, embeddings) if len(batch.peaks) else np.zeros(0, SPIKE_DTYPE)
        return Output(through, spikes, self.take_events(), list(batch.gaps), t_acquired=batch.t_acquired)

    def _name(self, batch: PeakBatch, embeddings: Floats) -> NDArray[Any]:
        peaks = batch.peaks
        spikes = np.zeros(len(peaks), SPIKE_DTYPE)
        spikes["sample_index"] = peaks["sample_index"] - self._preprocess.delay_samples
        spikes["time"] = batch.t_origin + spikes["sample_index"] / self.info.sampling_frequency
        for name in ("channel", "amplitude_uv", "flags"):
            spikes[name] = peaks[name]
        spikes["unit_id"] = UNSORTED
        if self.prototypes is None:
            self._reservoir.add(peaks, embeddings, _noise_units(batch.snippets, batch.noise_level))
        else:
            assignment = self.prototypes.predict(embeddings, peaks["channel"])
            spikes["unit_id"] = assignment.unit
            spikes["confidence"] = assignment.confidence
            spikes["flags"] |= self.registry.flags(assignment.unit)
            self._taught.append((batch, assignment, spikes))
        return spikes

    def learn(self) -> None:
        """At a learning boundary: calibrate once, later let units follow and appear. Elsewhere do nothing."""
        boundary = self._through_sample // self._period_samples * self._period_samples
        if self.prototypes is None:
            if self._through_sample >= self._warmup_samples:
                peaks, embeddings, snippets = self._reservoir.take()
                heights = np.abs(snippets[:, self._snippets.n_before, 0])
                self.prototypes = self._cluster(peaks, embeddings, snippets, heights, self.registry, self._through_sample)
                self._learned_through = boundary
        elif boundary > self._learned_through:
            self._learn_period(self.prototypes, boundary)
            self._learned_through = boundary

    def take_events(self) -> list[dict[str, Any]]:
        """Hand over the ledger lines that no output has carried yet: those of the last `learn`."""
        return self.registry.take_events()

    def units_table(self) -> list[dict[str, Any]]:
        """List the units as the `units` topic publishes them."""
        return self.registry.table(self._through_sample)

    def counters(self) -> dict[str, Any]:
        """Say what is in use, for the status."""
        return {
            "encoder": self.encoder.name,
            "provider": self.encoder.provider,
            "bad_channels": np.flatnonzero(self._preprocess.bad_channels).tolist(),
            "n_prototypes": 0 if self.prototypes is None else len(self.prototypes),
        }

    def templates(self) -> dict[str, NDArray[Any]]:
        """Return what a report draws: per prototype its unit, channel, size and template (noise units), and the neighbour table."""
        if self.prototypes is None:
            return {}
        p = self.prototypes
        return {"unit": p.unit, "channel": p.channel, "n_spikes": p.n_spikes, "template": p.template, "neighbors": p.neighbors}

    def _check_snippets(self) -> None:
        ours = (self._snippets.n_before, self._snippets.n_after, self.config.snippets.n_neighbors)
        models = (self.encoder.n_before, self.encoder.n_after, self.encoder.contract.n_neighbors)
        if ours != models:
            raise StreamsortError(
                f"encoder {self.encoder.name}: takes {models} (samples before, samples after, channels), snippets have {ours}; "
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
            steps = self._period_samples, self._preprocess.period_samples
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

    def _cluster(
        self, peaks: NDArray[Any], embeddings: Floats, snippets: Floats, heights: Floats, registry: Registry, sample_index: int
    ) -> Prototypes:
        config, neighbors = self.config, self._snippets.neighbors
        found = calibrate(
            peaks,
            embeddings,
            snippets,
            neighbors=neighbors,
            amplitudes=heights,
            detect_threshold=config.detect.detect_threshold,
            sampling_frequency=self.info.sampling_frequency,
            config=config.cluster,
            seed=config.seed,
        )
        names = [registry.born(sample_index, "calibration") for _ in range(int(found.unit.max(initial=-1)) + 1)]
        prototypes = Prototypes(found, names, neighbors, config.detect.detect_threshold, config.cluster, config.seed)
        for name in names:
            self._place(registry, prototypes, name)
        return prototypes

    def _place(self, registry: Registry, prototypes: Prototypes, unit_id: int) -> None:
        """Note where a unit is: its main channel, and the centre of mass of its template's peak-to-peak."""
        row = prototypes.home(unit_id)
        unit, channel = registry.units[unit_id], int(prototypes.channel[row])
        neighbors = prototypes.neighbors[channel]
        size = np.where(neighbors >= 0, np.ptp(prototypes.template[row], axis=0) ** 2, 0).astype(np.float64)
        x, y = size @ self.probe.channel_locations[neighbors] / max(float(size.sum()), 1e-9)
        unit.channel_index, unit.x_um, unit.y_um = channel, float(x), float(y)

    def _learn_period(self, prototypes: Prototypes, boundary: int) -> None:
        if self._taught:
            batches, assignments, spikes = zip(*self._taught, strict=True)
            self._taught = []
            assignment = Assignment.join(assignments)
            snippets = np.concatenate([batch.snippets for batch in batches])
            snippets = _noise_units(snippets, np.concatenate([batch.noise_level for batch in batches]))
            prototypes.learn(assignment, _joined([batch.peaks for batch in batches]), snippets)
            heights = np.abs(snippets[:, self._snippets.n_before, 0])
            self.registry.see(_joined(spikes), heights, assignment.distance, boundary)
        self.registry.note_silence(boundary)
        oldest = boundary - round(self.config.cluster.birth_s * self.info.sampling_frequency)
        for newcomer in prototypes.discover(oldest):
            self._welcome(prototypes, newcomer, boundary)

    def _welcome(self, prototypes: Prototypes, newcomer: Newcomer, boundary: int) -> None:
        unit_id = newcomer.unit
        if unit_id == UNSORTED and not prototypes.is_noise(newcomer):
            unit_id = self.registry.born(boundary, "new cluster")
        prototypes.add(newcomer, unit_id)
        if unit_id != UNSORTED:
            self._place(self.registry, prototypes, unit_id)


def _noise_units(snippets: Floats, noise_level: Floats) -> Floats:
    """Return the snippets over the noise level of each channel; silent where there is none."""
    level = np.where(noise_level > 0, noise_level, np.float32(np.inf)).astype(np.float32)
    scaled: Floats = snippets / level[:, None, :]
    return scaled


def _joined(records: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Put record arrays one after the other, read-only; np.concatenate takes 6 us for each, this hardly any time."""
    return np.frombuffer(b"".join(part.data for part in records), records[0].dtype)
