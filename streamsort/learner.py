"""What a sorter knows of the units, and changes at learning boundaries alone.

Peaks come in with what they were taken for; kept are the prototypes, the registry of units with its ledger, and the memory of the
recent past. At the first boundary the peaks gathered so far become units; at later ones the units follow their spikes, and spikes
that fitted none may open a new one. Another encoder may take the place of the one in force: the prototypes then move to its space.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.calibrate import calibrate, template_mismatch
from streamsort.cluster import Assignment, Newcomer, Prototypes, Space
from streamsort.config import SorterConfig
from streamsort.probe import Probe
from streamsort.records import PEAK_DTYPE, UNSORTED, PeakBatch
from streamsort.reservoir import Member, Memory, Period, Reservoir
from streamsort.snippets import Snippets
from streamsort.units import Registry

Floats = NDArray[np.float32]


class Learner:
    """Learn the units of one stream.

    Parameters
    ----------
    config : SorterConfig
    probe : Probe
    sampling_frequency : float
        In Hz.
    snippets : Snippets
        Which cut what will be learned from.
    n_dims : int
        Of the embeddings until calibration.

    Attributes
    ----------
    prototypes : Prototypes or None
        None until calibration.
    registry : Registry
    memory : Memory
    """

    def __init__(self, config: SorterConfig, probe: Probe, sampling_frequency: float, snippets: Snippets, n_dims: int) -> None:
        self._config, self._probe, self._rate, self._snippets = config, probe, sampling_frequency, snippets
        self.prototypes: Prototypes | None = None
        self.registry = Registry(sampling_frequency)
        self.memory = Memory(config.refresh, sampling_frequency)
        snippet_shape = snippets.n_before + snippets.n_after, config.snippets.n_neighbors
        self._reservoir = Reservoir(probe.n_channels, n_dims, snippet_shape, config.seed)
        self._taught: list[tuple[PeakBatch, Assignment, NDArray[Any]]] = []

    def warmup(self, n_dims: int) -> None:
        """Call each kernel once, on a scratch copy."""
        rng = np.random.default_rng(0)
        n = 64
        peaks = np.zeros(n, PEAK_DTYPE)
        peaks["sample_index"] = np.arange(n)
        shape = n, self._snippets.n_before + self._snippets.n_after, self._config.snippets.n_neighbors
        snippets = rng.normal(size=shape).astype(np.float32)
        embeddings = rng.normal(size=(n, n_dims)).astype(np.float32)
        prototypes = self._cluster(peaks, embeddings, snippets, np.full(n, 10.0, np.float32), Registry(self._rate), 0)
        prototypes.learn(prototypes.predict(embeddings, peaks["channel"]), peaks, snippets)
        template_mismatch(snippets[0], snippets[1], self._snippets.neighbors[0], self._snippets.neighbors[0], 0.0)

    def gather(self, batch: PeakBatch, embeddings: Floats) -> None:
        """Keep peaks for calibration."""
        self._reservoir.add(batch.peaks, embeddings, _noise_units(batch.snippets, batch.noise_level))

    def calibrate(self, sample_index: int) -> None:
        """Make units of what was gathered."""
        peaks, embeddings, snippets = self._reservoir.take()
        heights = np.abs(snippets[:, self._snippets.n_before, 0])
        self.prototypes = self._cluster(peaks, embeddings, snippets, heights, self.registry, sample_index)
        found = self.prototypes.predict(embeddings, peaks["channel"])
        most = self._config.refresh.snippets
        self.memory.add_members(self.prototypes.surely(found), peaks, found.white, snippets, most)

    def teach(self, batch: PeakBatch, assignment: Assignment, spikes: NDArray[Any]) -> None:
        """Keep what peaks were taken for, until the next boundary; `spikes` are what was published of them."""
        self._taught.append((batch, assignment, spikes))

    def learn(self, prototypes: Prototypes, boundary: int) -> None:
        """End a learning period: units follow, fall silent, appear."""
        if self._taught:
            batches, assignments, spikes = zip(*self._taught, strict=True)
            self._taught = []
            assignment = Assignment.join(assignments)
            snippets = np.concatenate([batch.snippets for batch in batches])
            snippets = _noise_units(snippets, np.concatenate([batch.noise_level for batch in batches]))
            peaks = _joined([batch.peaks for batch in batches])
            self.memory.add_period(Period(peaks, assignment.unit, assignment.white, snippets))
            self.memory.add_members(prototypes.surely(assignment), peaks, assignment.white, snippets)
            prototypes.learn(assignment, peaks, snippets)
            heights = np.abs(snippets[:, self._snippets.n_before, 0])
            self.registry.see(_joined(spikes), heights, assignment.distance, boundary)
        self.registry.note_silence(boundary)
        oldest = boundary - round(self._config.cluster.birth_s * self._rate)
        for newcomer in prototypes.discover(oldest):
            self._welcome(prototypes, newcomer, boundary)

    def move(self, prototypes: Prototypes, space: Space, members: Mapping[int, tuple[Member, ...]]) -> None:
        """Take all units to another encoder's space; `members` are what the memory held, as it embeds them."""
        self.prototypes = prototypes.in_space(space)
        self.memory = Memory(self._config.refresh, self._rate, members)
        self.registry.forget_distances()

    def _cluster(
        self, peaks: NDArray[Any], embeddings: Floats, snippets: Floats, heights: Floats, registry: Registry, sample_index: int
    ) -> Prototypes:
        config, neighbors = self._config, self._snippets.neighbors
        found = calibrate(
            peaks,
            embeddings,
            snippets,
            neighbors=neighbors,
            amplitudes=heights,
            detect_threshold=config.detect.detect_threshold,
            sampling_frequency=self._rate,
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
        x, y = size @ self._probe.channel_locations[neighbors] / max(float(size.sum()), 1e-9)
        unit.channel_index, unit.x_um, unit.y_um = channel, float(x), float(y)

    def _welcome(self, prototypes: Prototypes, newcomer: Newcomer, boundary: int) -> None:
        unit_id = newcomer.unit
        if unit_id == UNSORTED and not prototypes.is_noise(newcomer):
            unit_id = self.registry.born(boundary, "new cluster")
        prototypes.add(newcomer, unit_id)
        self.memory.keep_only(prototypes.serial.tolist())
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
