"""What a sorter knows of the units, and changes at learning boundaries alone.

In come the batches of the warm-up, later what assignment noted in each learning period; out comes what is `Known` of the units.
Kept are the templates, the prototypes of the embeddings, the displacement of the tissue, the registry of units with its ledger, and
the memory of the recent past. When the warm-up is over all that was gathered becomes units; at each boundary after it the units
follow their spikes, all of them move when the tissue does at once, and peaks that fitted none may open a new one. Spikes are named
without embeddings, so the encoder too is called here, beside the hot path. Another encoder may take the place of the one in force:
the prototypes then move to its space.
"""

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.assign import Assign, Explained, Known, Notes
from streamsort.bank import MOST_REMADE, Bank
from streamsort.calibrate import Calibration, calibrate, template_mismatch
from streamsort.cluster import Assignment, Newcomer, Prototypes, Space
from streamsort.config import SorterConfig
from streamsort.covariance import NoiseModel
from streamsort.encode import Encoder
from streamsort.match import MATCH_DTYPE, Match, join_settled, sizes
from streamsort.motion import Motion
from streamsort.noise import divisor
from streamsort.probe import Probe
from streamsort.records import PEAK_DTYPE, UNSORTED, PeakBatch, join_records
from streamsort.refine import find_units, framed, near
from streamsort.reservoir import Member, Memory, Period, Reservoir
from streamsort.snippets import Snippets
from streamsort.templates import TemplateMaker, Templates, likeness
from streamsort.units import Registry
from streamsort.warmup import Warmup

Floats = NDArray[np.float32]
Lesson = Generator[None, None, Known | None]

# Newcomers so like a unit are that unit. Less will do where embeddings say the same, and where the tissue has moved since it was
# last seen; its template is replaced if it missed so many spikes and nearly all newcomers came since.
_BIRTH_ENERGY = 60.0  # weaker groups of strangers are mostly what larger spikes leave
_LIKENESS, _LIKENESS_LEAST, _UNLIKE_UM = 0.85, 0.6, 20.0
_MISSED_SPIKES, _LEAST_HZ, _BY_TURNS = 6.0, 0.5, 0.8
_ECHO_MS, _ECHOES = 2.0, 0.5  # so near a larger spike, one may be what that leaves; a group of which so many are so near is


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
    assign : Assign or None
        Both None until calibration.
    motion : Motion
    registry : Registry
    memory : Memory
    taught : list of Explained
        Peaks since the last boundary, with what explains them.
    """

    def __init__(self, config: SorterConfig, probe: Probe, sampling_frequency: float, snippets: Snippets, n_dims: int) -> None:
        self._config, self._probe, self._rate, self._snippets = config, probe, sampling_frequency, snippets
        self.prototypes: Prototypes | None = None
        self.bank: Bank | None = None
        self.unit_ids: list[int] = []
        self.registry = Registry(sampling_frequency)
        self.memory = Memory(config.refresh, sampling_frequency)
        self.motion = Motion(probe, snippets, sampling_frequency, config.cluster.period_s, config.seed)
        self.table: list[dict[str, Any]] = []
        self._warmup = Warmup()
        snippet_shape = snippets.n_before + snippets.n_after, config.snippets.n_neighbors
        self._reservoir = Reservoir(probe.n_channels, n_dims, snippet_shape, config.seed)
        self._near = probe.neighbors(config.match.radius_um)
        self._n_before, _, spans = sizes(config.match, sampling_frequency)
        self._n_whole = spans.n_whole
        self._echo_samples = round(_ECHO_MS * sampling_frequency / 1000)
        n_periods = round(config.cluster.birth_s / config.cluster.period_s)
        self._fired: deque[tuple[NDArray[np.int64], NDArray[np.int32]]] = deque(maxlen=max(n_periods, 1))
        self._seen_um: dict[int, float] = {}
        self._stepped = False
        self._copied: Templates | None = None  # of these templates the last of the copies is
        self._copies: deque[Templates] = deque(maxlen=2)

    def warmup(self, n_dims: int) -> None:
        """Call each kernel once, on scratch data."""
        rng = np.random.default_rng(0)
        n = 64
        peaks = np.zeros(n, PEAK_DTYPE)
        peaks["sample_index"] = np.arange(n)
        shape = n, self._snippets.n_before + self._snippets.n_after, self._config.snippets.n_neighbors
        snippets = rng.normal(size=shape).astype(np.float32)
        embeddings = rng.normal(size=(n, n_dims)).astype(np.float32)
        clusters = self._clusters(peaks, embeddings, snippets, np.full(n, 10.0, np.float32))
        prototypes = Prototypes(clusters, list(range(n)), self._snippets.neighbors, 4.0, self._config.cluster)
        prototypes.learn(prototypes.predict(embeddings, peaks["channel"]), peaks, snippets)
        template_mismatch(snippets[0], snippets[1], self._snippets.neighbors[0], self._snippets.neighbors[0], 0.0)
        motion = Motion(self._probe, self._snippets, self._rate)
        for _ in range(2):
            motion.update(snippets - 10, peaks["channel"])
        match = Match(self._config.match, self._probe.n_channels, self._rate)
        match.warmup(self._config.match)
        quiet = NoiseModel(np.eye(self._probe.n_channels), np.eye(match.n_before + match.n_after))
        maker = TemplateMaker(self._config.match, self._probe, quiet, match.n_before)
        mean = np.zeros((1, match.n_whole, self._probe.n_channels), np.float32)
        mean[0, match.n_before, 0] = 10
        bank = Bank(maker, mean, np.ones(1, np.int64), np.ones(1), self._rate)
        bank.learn(np.zeros(1, MATCH_DTYPE), bank.means, bank.templates.around, 1.0)
        likeness(bank.templates, bank.templates)
        bank.likeness_to(mean[0])
        known = Known(bank.templates, bank.threshold, np.zeros(1, np.int64), np.zeros(1, np.uint16))
        Assign(self._config, self._probe, self._rate, np.ones(self._probe.n_channels, np.float32), known, 0).warmup()

    def gather(self, encoder: Encoder, batches: Sequence[PeakBatch]) -> Lesson:
        """Keep the traces and peaks of a period for calibration, and take the displacement from them."""
        for batch in batches:
            self._warmup.add(batch)
        self._warmup.close()
        yield
        peaks, snippets, embeddings = self._embedded(encoder, batches)
        yield
        self._reservoir.add(peaks, embeddings, snippets)
        yield
        self.motion.update(snippets, peaks["channel"])
        return None

    def calibrate(self, sample_index: int, published_through: int) -> Assign:
        """Make units of what was gathered before `sample_index`; the peaks before `published_through` are out already."""
        config = self._config
        peaks, embeddings, snippets = self._reservoir.take()
        heights = np.abs(snippets[:, self._snippets.n_before, 0])
        clusters = self._clusters(peaks, embeddings, snippets, heights)
        noise = self._warmup.channel_noise
        if noise is None:
            noise = np.zeros(self._probe.n_channels, np.float32)
        self.bank, matches = find_units(config, self._probe, self._rate, self._warmup, peaks, clusters)
        order = np.argsort(-np.bincount(matches["row"], minlength=len(self.bank)), kind="stable")
        names = np.zeros(len(self.bank), np.int64)
        for row in order.tolist():
            names[row] = self.registry.born(sample_index, "calibration")
        self.unit_ids = names.tolist()
        assign = Assign(config, self._probe, self._rate, noise, self._known(), published_through)
        row = np.append(matches["row"], -1)[assign.explain(peaks, matches)]
        clusters = clusters.regrouped(row, peaks["channel"], embeddings, snippets, config.cluster.min_members)
        self.prototypes = Prototypes(
            clusters, self.unit_ids, self._snippets.neighbors, config.detect.detect_threshold, config.cluster, config.seed
        )
        if len(self._warmup):  # run in, so that nothing is lost between the last peaks and the first matches
            start, traces = self._warmup[-1]
            assign.run_in(start, traces)
        self._warmup = Warmup()
        for unit in range(len(self.bank)):
            self._place(self.bank, unit)
        found = self.prototypes.predict(embeddings, peaks["channel"])
        self.memory.add_members(self.prototypes.surely(found), peaks, found.white, snippets, config.refresh.snippets)
        self.table = self.registry.table(sample_index)
        return assign

    def learn(self, encoder: Encoder, notes: Notes, boundary: int) -> Lesson:
        """Take in what was noted before a boundary; return the units as they are to be named by. It yields where it may rest."""
        bank, prototypes = self.bank, self.prototypes
        assert bank is not None and prototypes is not None
        if notes.n_skipped:
            prototypes.skip_gap()
            self.registry.skip_gap(notes.n_skipped)
        peaks, snippets, embeddings = self._embedded(encoder, notes.explained)
        yield
        self.motion.update(snippets, peaks["channel"])
        yield
        self._follow(bank, notes, boundary)
        for _ in range(MOST_REMADE - 1):
            yield
            bank.remake(1)
            self._place_remade(bank)
        yield
        if len(peaks):
            self._teach(prototypes, notes.explained, peaks, snippets, prototypes.predict(embeddings, peaks["channel"]))
        yield
        self._note_spikes(notes, boundary)
        yield
        oldest = boundary - round(self._config.cluster.birth_s * self._rate)
        for newcomer in prototypes.discover(oldest):
            self._welcome(bank, prototypes, newcomer, boundary)
        yield
        self.table = self.registry.table(boundary)
        return self._known()

    def _known(self) -> Known:
        """Return what assignment needs of the units; the templates are copied, since they change row by row.

        There are two copies: while a lesson is learned assignment goes by the one, and nobody any more by the other.
        """
        bank = self.bank
        assert bank is not None
        if self._copied is not bank.templates:
            self._copied = bank.templates
            self._copies.append(bank.templates.copied(self._copies[0] if len(self._copies) > 1 else None))
        unit_id = np.array(self.unit_ids, np.int64)
        return Known(self._copies[-1], bank.threshold, unit_id, self.registry.flags(unit_id))

    def _embedded(self, encoder: Encoder, parts: Sequence[PeakBatch | Explained]) -> tuple[NDArray[Any], Floats, Floats]:
        """Return a period's peaks, their snippets in noise units and their embeddings."""
        peaks = join_records([np.zeros(0, PEAK_DTYPE), *(part.peaks for part in parts)])
        shape = self._snippets.n_before + self._snippets.n_after, self._config.snippets.n_neighbors
        snippets = np.concatenate([np.zeros((0, *shape), np.float32), *(part.snippets for part in parts)])
        level = np.concatenate([np.zeros((0, shape[1]), np.float32), *(part.noise_level for part in parts)])
        return peaks, noise_units(snippets, level), encoder(snippets, level)

    def _follow(self, bank: Bank, notes: Notes, boundary: int) -> None:
        """Let templates follow the tissue and their spikes."""
        matches, snippets, channels = join_settled(notes.settled)
        self._fired.append((matches["sample_index"], matches["row"]))
        self._move(bank, boundary)
        # After a step the spikes, and those of the next period too, were found by templates that are no more.
        if not (self.motion.stepped or self._stepped):
            bank.learn(matches, snippets, channels, self._config.cluster.period_s, n_most=1)
        self._stepped = self.motion.stepped
        self._place_remade(bank)

    def _place_remade(self, bank: Bank) -> None:
        for row in bank.remade:
            self._place(bank, row)

    def _note_spikes(self, notes: Notes, boundary: int) -> None:
        """Tell the registry what was published, and what is silent."""
        if notes.spikes:
            spikes, matches = join_records(notes.spikes), join_records(notes.matches)
            t = notes.known.templates
            energy = t.energy[matches["row"]]
            distance = (energy - matches["gain"]) / np.sqrt(energy + 1)
            order = np.argsort(spikes["sample_index"], kind="stable")
            y_um = np.array([self.registry.units[name].y_um for name in spikes["unit_id"].tolist()], np.float32)
            heights = matches["amplitude"] * t.height[matches["row"]]
            self.registry.see(spikes[order], heights[order], distance[order], boundary, y_um=y_um[order])
            names = np.unique(spikes["unit_id"])
            moved_um = self.motion.at(np.array([self.registry.units[name].y_um for name in names.tolist()]))
            self._seen_um.update(zip(names.tolist(), moved_um.tolist(), strict=True))
        self.registry.note_silence(boundary)

    def _teach(
        self, prototypes: Prototypes, explained: list[Explained], peaks: NDArray[Any], snippets: Floats, assignment: Assignment
    ) -> None:
        """Let prototypes follow the peaks that spikes explain, and remember those that nothing does."""
        unit, strange = (np.concatenate([getattr(one, name) for one in explained]) for name in ("unit", "strange"))
        self.memory.add_period(Period(peaks, assignment.unit, unit, assignment.white, snippets))
        agreed = (unit >= 0) & (assignment.unit == unit)
        self.memory.add_members(np.where(agreed, prototypes.surely(assignment), -1), peaks, assignment.white, snippets)
        # What no template explains is strange, however near a unit its embedding lies; not so what lies near rejected noise.
        assignment.distance[strange & (assignment.unit >= 0)] = np.inf
        use = agreed | strange
        prototypes.learn(assignment.take(use), peaks[use], snippets[use])

    def _move(self, bank: Bank, boundary: int) -> None:
        """Move all templates with the tissue; after a step at once, and they then learn fast."""
        motion, units = self.motion, self.registry.units
        depths = np.array([units[name].y_um if name in units else 0.0 for name in self.unit_ids])
        change = np.interp(depths, motion.depth_um, motion.change_um)
        if not motion.stepped:
            bank.move(change, self._near, self._probe.channel_locations)
            return
        bank.jump(change, self._near, self._probe.channel_locations)
        farthest = float(motion.change_um[np.abs(motion.change_um).argmax()])
        self.registry.record("drift_step", boundary, None, f"tissue moved by {farthest:.0f} um")

    def _owner(self, bank: Bank, newcomer: Newcomer, cosines: NDArray[np.float64]) -> tuple[int, bool]:
        """Return the unit that newcomers are, -1 for none, and whether it lost them: they fire in its place."""
        best, owner, lost = _LIKENESS, UNSORTED, False
        for row, cosine in enumerate(cosines.tolist()):
            unit = self.registry.units.get(self.unit_ids[row])
            if unit is None:
                continue
            silence_s = (newcomer.sample_index[-1] - unit.last_sample) / self._rate
            silent = silence_s * max(float(bank.rates_hz[row]), _LEAST_HZ) > _MISSED_SPIKES
            in_its_place = silent and (newcomer.sample_index > unit.last_sample).mean() > _BY_TURNS
            moved_um = abs(float(self.motion.at(np.array([unit.y_um]))[0]) - self._seen_um.get(unit.unit_id, 0.0))
            forgiven = min(moved_um / _UNLIKE_UM, 1.0) if in_its_place else float(unit.unit_id == newcomer.unit)
            likely = cosine + (_LIKENESS - _LIKENESS_LEAST) * forgiven
            if likely > best:
                best, owner, lost = likely, unit.unit_id, in_its_place
        return owner, lost

    def _is_leftover(self, bank: Bank, newcomer: Newcomer, energy: float) -> bool:
        """Tell whether newcomers are too weak to be told from leftovers, or most come, beyond chance, with larger units' spikes."""
        if energy < _BIRTH_ENERGY:
            return True
        templates, channels = bank.templates, self._snippets.neighbors[newcomer.channel]
        larger = (templates.energy > energy) & (templates.place[:, channels[channels >= 0]] >= 0).any(axis=1)
        times = np.sort(np.concatenate([sample_index[larger[row]] for sample_index, row in self._fired]))
        span = len(self._fired) * self._config.cluster.period_s * self._rate
        return share_near(newcomer.sample_index, times, self._echo_samples, span) > _ECHOES

    def move(self, prototypes: Prototypes, space: Space, members: Mapping[int, tuple[Member, ...]]) -> None:
        """Take all units to another encoder's space; `members` are what the memory held, as it embeds them."""
        self.prototypes = prototypes.in_space(space)
        self.memory = Memory(self._config.refresh, self._rate, members)

    def _clusters(self, peaks: NDArray[Any], embeddings: Floats, snippets: Floats, heights: Floats) -> Calibration:
        config = self._config
        return calibrate(
            peaks,
            embeddings,
            snippets,
            neighbors=self._snippets.neighbors,
            amplitudes=heights,
            detect_threshold=config.detect.detect_threshold,
            sampling_frequency=self._rate,
            config=config.cluster,
            seed=config.seed,
        )

    def _place(self, bank: Bank, row: int) -> None:
        """Note where a unit is: its main channel, and the centre of mass of its template's peak-to-peak."""
        unit = self.registry.units.get(self.unit_ids[row])
        if unit is None:
            return
        channels = bank.templates.channels[row]
        channels = channels[channels >= 0]
        size = np.ptp(bank.templates.centred[row][:, : len(channels)], axis=0).astype(np.float64) ** 2
        x, y = size @ self._probe.channel_locations[channels] / max(float(size.sum()), 1e-9)
        unit.channel_index, unit.x_um, unit.y_um = int(channels[0]), float(x), float(y)

    def _welcome(self, bank: Bank, prototypes: Prototypes, newcomer: Newcomer, boundary: int) -> None:
        """Take in a group of peaks that nothing explained: noise, a unit that changed, or a new one."""
        mean = np.zeros((self._n_whole, self._probe.n_channels), np.float32)
        channels = self._snippets.neighbors[newcomer.channel]
        template = framed(newcomer.template[None], self._n_before - self._snippets.n_before, self._n_whole)[0]
        mean[:, channels[channels >= 0]] = template[:, channels >= 0]
        cosines, energy = bank.likeness_to(mean)
        unit_id, lost = self._owner(bank, newcomer, cosines)
        if lost:
            bank.reset(self.unit_ids.index(unit_id), mean, newcomer.n_spikes)
        elif unit_id == UNSORTED and not (prototypes.is_noise(newcomer) or self._is_leftover(bank, newcomer, energy)):
            unit_id = self.registry.born(boundary, "new cluster", n_spikes=newcomer.n_spikes)
            bank.add(mean, newcomer.n_spikes, newcomer.n_spikes / self._config.cluster.birth_s)
            self.unit_ids.append(unit_id)
            self._place(bank, len(bank) - 1)
        prototypes.add(newcomer, unit_id)
        self.memory.keep_only(prototypes.serial.tolist())


def share_near(times: NDArray[np.int64], others: NDArray[np.int64], reach: int, span: float) -> float:
    """Return which part of the times lies within `reach` of others, beyond what chance makes of so many others in `span` samples.

    Both in order; the result is negative where they avoid each other.
    """
    return float(near(times, others, reach).mean() + np.expm1(-len(others) * (2 * reach + 1) / span))


def noise_units(snippets: Floats, noise_level: Floats) -> Floats:
    """Return the snippets over the noise level of each channel; silent where there is none."""
    scaled: Floats = snippets / divisor(noise_level)[:, None, :]
    return scaled
