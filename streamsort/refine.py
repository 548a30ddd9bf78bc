"""Calibration's second half: from the first idea of the units to templates that explain the warm-up.

In come the traces of the warm-up and its peaks with a first idea of their units; out go the units' templates as they are at its
end. The warm-up is matched several times over, just as it would be live, templates following their units; between the passes each
unit has to hold its own: what echoes a larger one, hugs the threshold or is too rare goes, what cannot be told apart becomes one,
what falls in two is split, and groups of spikes that nothing explained are added. Weak units appear that no threshold on one
channel would show, and overlapping spikes count for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.bank import Bank
from streamsort.calibrate import Calibration, valley_ratio
from streamsort.config import SorterConfig
from streamsort.covariance import NoiseModel, estimate_noise
from streamsort.discover import Discover, Group
from streamsort.match import MATCH_DTYPE, Match, join_settled, sizes
from streamsort.probe import Probe
from streamsort.templates import TemplateMaker, Templates, likeness, overlap
from streamsort.warmup import Stretch

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_ROUNDS, _ROUNDS_DISCOVERING, _ROUNDS_SPLITTING = 7, 4, 5
_LEAST_ENERGY = 14.0  # nearer to the noise a unit's spikes are mostly noise
# A unit with more of its spikes this near those of larger units, beyond chance, is their leftovers; a strong one if nearly all are.
# Units far away leave something too: the common reference carries it to all channels.
_ECHO_MS, _FAR_ECHO_MS, _MOST_ECHOES, _ALL_ECHOES, _STRONG = 2.5, 1.0, 0.35, 0.75, 100.0
_APART_MS = 0.33  # at most, of a spike that is taken for two
_BEYOND_CHANCE = 4.0  # standard deviations
_LEAST_EXCESS = 3.5  # of the mean gain over the threshold; noise has 2.3
_SAME = 16.0, 0.98  # squared distance beyond that of noise, or cosine, at which two templates are one unit
_DOUBTFUL, _ONE_HILL = 40.0, 0.6  # up to so much further apart two are one if there is no deeper a valley between them
_MOST_LARGER = 2.5  # times: neither a burst nor the way it went makes one neuron's spikes differ so much
# Rows whose templates were once so alike, and that fire by turns, are one unit that moved.
_HANDOVER_LIKENESS, _HANDOVER_SHARED, _BIN_S = 0.85, 0.5, 2.0
_SPLIT_RATIO, _SPLIT_DISTANCE, _SPLIT_COSINE = 0.4, 4.0, 0.97
_BURST_MS = 20.0  # two parts more alike than that are one neuron if the smaller spikes come this near the larger ones
_NOISE_STRETCHES, _QUIET_MS = 40, 1.0
_MOST_SNIPPETS = 400
_GROUP_SPIKES = 12  # so many unexplained candidates make a first template; the unit itself must have more
_SEED_S, _SEED_SPIKES = 5.0, 8  # a unit enters with the mean of so many spikes within so long
_EARLY_SPIKES, _EARLY_ENERGY = 30, 4000.0  # the next pass starts with the mean of a unit's first spikes: it may move


@dataclass
class _Pass:
    """What one pass over the warm-up found; snippets are of each unit's first spikes, on the channels near it."""

    bank: Bank
    matches: NDArray[np.void]
    channels: list[NDArray[np.int32]]
    snippets: list[list[Floats]]
    sample_index: list[list[int]]
    likeness: NDArray[np.float64]  # (n_units, n_units) largest cosine two templates ever had

    def see_likeness(self) -> None:
        """Take note of how alike the templates are now."""
        now = likeness(self.bank.templates, self.bank.templates)
        now[: len(self.likeness), : len(self.likeness)] = np.maximum(now[: len(self.likeness), : len(self.likeness)], self.likeness)
        self.likeness = now

    def mean(self, row: int, members: NDArray[np.bool_] | slice) -> Floats:
        """Return the mean of some of a unit's snippets near it, and of all its spikes far away, (n_whole, n_channels)."""
        mean = self.bank.mean(row)
        mean[:, self.channels[row]] = np.array(self.snippets[row])[members].mean(axis=0)
        return mean


class Seeds:
    """Peaks with a first idea of their units, and those of them that nothing explains yet.

    A unit enters where it first shows: with the mean of a few seconds, in which it cannot have moved far. So a unit that moves
    through the warm-up is one, though it makes several clusters; the first is followed, and explains the rest.

    Parameters
    ----------
    sample_index, channel, label : ndarray, shape (n_peaks,), integer
        In order of sample_index; label -1 for peaks of no cluster.
    """

    def __init__(self, sample_index: Ints, channel: Ints, label: Ints) -> None:
        known = label >= 0
        self._sample_index, self._channel, self._label = sample_index[known], channel[known], label[known]
        self._next = 0
        self._waiting: dict[int, list[Floats]] = {}
        self._seen: dict[int, int] = {}

    def take(self, residual: Floats, first_sample: int, stop_sample: int, n_before: int, n_samples: int, explained: Floats) -> None:
        """Take note of the peaks before `stop_sample`.

        `residual` (n_channels, n_columns) begins at `first_sample`; `explained` (n_channels, n_columns) is not 0 where a spike is.
        """
        while self._next < len(self._label) and self._sample_index[self._next] < stop_sample:
            k, self._next = self._next, self._next + 1
            at, label = int(self._sample_index[k]) - first_sample, int(self._label[k])
            if at < n_before:
                continue
            self._seen[label] = self._seen.get(label, 0) + 1
            if not explained[self._channel[k], at]:
                self._waiting.setdefault(label, []).append(residual[:, at - n_before : at - n_before + n_samples].T.copy())

    def births(self, n_least: int) -> list[Floats]:
        """Return the means of clusters that are mostly unexplained, and forget what was seen."""
        born = [
            np.mean(snippets, axis=0)
            for label, snippets in sorted(self._waiting.items())
            if len(snippets) >= max(n_least, self._seen[label] / 2)
        ]
        self._waiting.clear()
        self._seen.clear()
        return born


class Refine:
    """Find the units of a warm-up.

    Parameters
    ----------
    config : SorterConfig
    probe : Probe
    noise : NoiseModel
    shapes : ndarray, shape (n_shapes, n_samples), float32
        Usual waveforms, see `Discover`.
    stretches : sequence of (int, ndarray of shape (n_samples, n_channels), float32)
        First sample_index and traces in noise units, in order, each no longer than a learning period.
    sampling_frequency : float
    """

    def __init__(
        self,
        config: SorterConfig,
        probe: Probe,
        noise: NoiseModel,
        shapes: Floats,
        stretches: Sequence[Stretch],
        sampling_frequency: float,
    ) -> None:
        self._config, self._probe, self._noise, self._stretches, self._rate = config, probe, noise, stretches, sampling_frequency
        match = Match(config.match, probe.n_channels, sampling_frequency)
        self._n_before, self._n_samples, self._n_whole = match.n_before, match.n_before + match.n_after, match.n_whole
        self._maker = TemplateMaker(config.match, probe, noise, match.n_before)
        self._discover = Discover(probe, noise, shapes, match.n_before, match.n_whole)
        self._seconds = sum(len(traces) for _, traces in stretches) / sampling_frequency
        self._near = probe.neighbors(config.match.radius_um)
        self._latest = np.zeros(0, MATCH_DTYPE)
        self._echo_samples, self._far_echo_samples, self._apart_samples, self._burst_samples = (
            round(ms * sampling_frequency / 1000) for ms in (_ECHO_MS, _FAR_ECHO_MS, _APART_MS, _BURST_MS)
        )

    def __call__(self, seeds: Seeds) -> tuple[Bank, NDArray[np.void]]:
        """Return the units' bank as it is at the end, and all their spikes."""
        means = np.zeros((0, self._n_whole, self._probe.n_channels), np.float32)
        rates, n_spikes = np.zeros(0), np.zeros(0, np.int64)
        for k in range(_ROUNDS):
            done = self._pass(means, rates, n_spikes, discovering=k < _ROUNDS_DISCOVERING, seeds=seeds if k == 0 else None)
            kept, trains = self._judge(done)
            halves = self._halves(done, kept, trains)
            parts = {row: self._parts(done, row) for row in kept} if k < _ROUNDS_SPLITTING else {}
            groups = self._discover.groups(_GROUP_SPIKES, self._config.cluster, self._config.seed)
            whole = not halves and all(len(part) < 2 for part in parts.values())
            if whole and not groups and len(kept) == len(trains) and k > 0:
                break
            if k < _ROUNDS - 1:
                means, rates, n_spikes = self._next(done, kept, trains, parts, halves, groups)
        done.bank.keep(kept)
        matches = done.matches[np.isin(done.matches["row"], kept)]
        matches["row"] = np.searchsorted(kept, matches["row"])
        return done.bank, matches

    def _next(
        self,
        done: _Pass,
        kept: list[int],
        trains: list[Ints],
        parts: dict[int, list[NDArray[np.bool_]]],
        halves: dict[int, Floats],
        groups: list[Group],
    ) -> tuple[Floats, NDArray[np.float64], Ints]:
        """Gather what the next pass starts with."""
        means, rates, n_spikes = [], [], []
        for row in kept:
            for members in parts.get(row) or [np.ones(len(done.snippets[row]), bool)]:
                n_early = np.clip(_EARLY_ENERGY / done.bank.templates.energy[row], _EARLY_SPIKES, _MOST_SNIPPETS)
                early = members & (np.cumsum(members) <= n_early)
                means.append(done.mean(row, early) + halves.get(row, np.float32(0)))
                n_spikes.append(int(early.sum()))
                rates.append(len(trains[row]) / self._seconds * members.mean())
        means += [group.mean for group in groups]
        n_spikes += [group.n_spikes for group in groups]
        rates += [group.n_spikes / self._seconds for group in groups]
        shape = self._n_whole, self._probe.n_channels
        return np.array(means, np.float32).reshape(-1, *shape), np.array(rates), np.array(n_spikes, np.int64)

    def _pass(self, means: Floats, rates: NDArray[np.float64], n_spikes: Ints, discovering: bool, seeds: Seeds | None) -> _Pass:
        """Match the warm-up once, templates following their units, and units born of seeds."""
        bank = Bank(self._maker, means, n_spikes, rates, self._rate)
        done = _Pass(bank, np.zeros(0, MATCH_DTYPE), [], [], [], np.zeros((0, 0)))
        match = Match(self._config.match, self._probe.n_channels, self._rate)
        self._latest = np.zeros(0, MATCH_DTYPE)
        found, looked, seeded = [], 0, self._stretches[0][0]
        seed_s = min(_SEED_S, self._seconds / 4)
        for start_sample, traces in self._stretches:
            if start_sample != match.next_sample:
                match.restart(start_sample)
                looked = start_sample + 2 * self._n_whole
            match.use(bank.templates, bank.threshold)
            found.append(match(traces))
            matches, snippets, channels = match.settled()
            self._keep(done, matches, snippets, channels)
            looked = self._look(match, matches, bank.templates, looked, discovering, seeds)
            bank.learn(matches, snippets, channels, len(traces) / self._rate)
            if start_sample - seeded > seed_s * self._rate:
                seeded = start_sample
                done.see_likeness()
                for mean in seeds.births(_SEED_SPIKES) if seeds is not None else ():
                    bank.add(mean, _SEED_SPIKES, _SEED_SPIKES / seed_s)
        self._keep(done, *join_settled([]))
        done.see_likeness()
        done.matches = np.concatenate(found)
        return done

    def _keep(self, done: _Pass, matches: NDArray[np.void], snippets: Floats, channels: NDArray[np.int32]) -> None:
        """Keep some of each unit's snippets, those that were cut on all channels near it."""
        for row in range(len(done.channels), len(done.bank)):
            near = self._near[done.bank.templates.channels[row, 0]]
            done.channels.append(near[near >= 0])
            done.snippets.append([])
            done.sample_index.append([])
        for one, snippet, cut in zip(matches, snippets, channels, strict=True):
            row = int(one["row"])
            if len(done.snippets[row]) == _MOST_SNIPPETS:
                continue
            columns = np.searchsorted(cut, done.channels[row])
            if (cut.take(columns, mode="clip") == done.channels[row]).all():
                done.snippets[row].append(snippet[columns].T)
                done.sample_index[row].append(int(one["sample_index"]))

    def _look(
        self, match: Match, matches: NDArray[np.void], templates: Templates, looked: int, discovering: bool, seeds: Seeds | None
    ) -> int:
        """Look at what has settled of the residual since sample `looked`; return up to where."""
        n_samples = self._n_whole
        stop = match.through_sample - 2 * n_samples
        if stop <= looked:
            return looked
        first = looked - n_samples
        residual = match.residual(first, stop + n_samples)
        busy = np.zeros(residual.shape, bool)
        self._latest = np.concatenate([self._latest[self._latest["sample_index"] > first - n_samples], matches])
        for one in self._latest:
            at = int(one["sample_index"]) - first
            channels = templates.channels[one["row"]]
            busy[channels[channels >= 0], max(at - self._n_before, 0) : max(at + self._echo_samples, 0)] = True
        if seeds is not None:
            seeds.take(residual, first, stop, self._n_before, n_samples, busy)
        elif discovering:
            self._discover.look(residual, n_samples, n_samples + stop - looked, busy)
        return stop

    def _judge(self, done: _Pass) -> tuple[list[int], list[Ints]]:
        """Return the rows of the units that hold their own, and when each row fired."""
        templates, threshold = done.bank.templates, done.bank.threshold
        n_units = templates.n_units
        counts = np.bincount(done.matches["row"], minlength=n_units)
        order = np.argsort(done.matches["row"], kind="stable")
        trains = [np.sort(train) for train in np.split(done.matches["sample_index"][order], np.cumsum(counts)[:-1])]
        excess = np.bincount(done.matches["row"], done.matches["gain"], n_units) / np.maximum(counts, 1) - threshold
        good = (counts >= self._config.cluster.min_spikes) & (templates.energy >= _LEAST_ENERGY) & (excess >= _LEAST_EXCESS)
        kept: list[int] = []
        for row in np.argsort(-templates.energy, kind="stable").tolist():
            larger = [(trains[o], self._echo_samples if o in templates.rivals[row] else self._far_echo_samples) for o in kept]
            most = _MOST_ECHOES if templates.energy[row] < _STRONG else _ALL_ECHOES
            if good[row] and len(done.snippets[row]) > 1 and self._echoes(trains[row], larger) <= most:
                kept.append(row)
        return self._distinct(done, kept, trains), trains

    def _halves(self, done: _Pass, kept: list[int], trains: list[Ints]) -> dict[int, Floats]:
        """Return what is missing of the rows that never fire alone, (n_whole, n_channels).

        Of a spike that is taken for two at once the larger row learns what the smaller one leaves, and would be so for ever after.
        """
        templates, missing = done.bank.templates, {}
        for row in kept:
            for other in kept:
                if templates.energy[other] >= templates.energy[row] or other not in templates.rivals[row]:
                    continue
                if self._echoes(trains[row], [(trains[other], self._apart_samples)]) > _ALL_ECHOES:
                    nearest = np.abs(trains[row][:, None] - trains[other]).argmin(axis=1)
                    late = int(np.median(trains[other][nearest] - trains[row]))
                    missing[row] = np.roll(done.bank.mean(other), late, axis=0)
        return missing

    def _distinct(self, done: _Pass, kept: list[int], trains: list[Ints]) -> list[int]:
        """Leave one of each set of rows that are the same unit: the one that fires first, which will be followed through."""
        first = {row: float(np.median(done.sample_index[row][:_EARLY_SPIKES])) for row in kept}
        distinct: list[int] = []
        for row in sorted(kept, key=lambda row: first[row]):
            if not any(self._same(done, row, other, trains) for other in distinct):
                distinct.append(row)
        return sorted(distinct)

    def _same(self, done: _Pass, a: int, b: int, trains: list[Ints]) -> bool:
        """Tell whether two rows cannot be told apart, differ in size alone, or took over from one another while they were alike."""
        templates = done.bank.templates
        energies = float(templates.energy[a]), float(templates.energy[b])
        comparable = max(energies) < _MOST_LARGER**2 * min(energies)
        were_alike = comparable and done.likeness[a, b] > _HANDOVER_LIKENESS
        if were_alike and self._shared_time(trains[a], trains[b]) < _HANDOVER_SHARED:
            return True
        if b not in templates.rivals[a]:
            return False
        product = max(overlap(templates, a, b)[0], overlap(templates, b, a)[0])
        # What noise adds to the energy of a mean of n snippets: 1/n for each number that a template is made of.
        n_numbers = self._config.match.n_ranks * (self._n_samples + int((templates.channels[a] >= 0).sum()))
        noise = n_numbers * float((1 / done.bank.worth[[a, b]]).sum())
        if comparable and product > _SAME[1] * float(np.sqrt(energies[0] * energies[1])):
            return True
        apart = sum(energies) - 2 * product - noise
        return apart < _SAME[0] or (apart < _DOUBTFUL and self._one_hill(done, a, b))

    def _one_hill(self, done: _Pass, a: int, b: int) -> bool:
        """Tell whether two rows' spikes are one hill along the axis between them: each has learned those that are most like it."""
        channels = np.intersect1d(done.channels[a], done.channels[b])
        channels = channels[(done.bank.templates.place[[a, b]][:, channels] >= 0).all(axis=0)]
        parts = [self._whitened(done, row, channels) for row in (a, b)]
        second = np.repeat([False, True], [len(part) for part in parts])
        return _held_out_ratio(np.concatenate(parts), second) > _ONE_HILL

    def _whitened(self, done: _Pass, row: int, channels: NDArray[np.int32]) -> Floats:
        """Return a row's snippets on some of the channels near it, whitened, (n_snippets, n_numbers)."""
        columns = np.nonzero(channels[:, None] == done.channels[row])[1]
        snippets = np.array(done.snippets[row])[:, : self._n_samples, columns]
        white = np.einsum("ntk,tj,kl->njl", snippets, self._noise.time_root, self._noise.space_root(channels), optimize=True)
        whitened: Floats = white.reshape(len(white), -1)
        return whitened

    def _shared_time(self, a: Ints, b: Ints) -> float:
        """Return how much of the rarer unit's firing falls where the other fires as usual; near 1 for two neurons."""
        edges = np.arange(self._stretches[0][0], self._stretches[-1][0] + _BIN_S * self._rate, _BIN_S * self._rate)
        x, y = np.histogram(a, edges)[0], np.histogram(b, edges)[0]
        return float(np.minimum(x / max(x.mean(), 1e-9), y / max(y.mean(), 1e-9)).mean())

    def _echoes(self, train: Ints, larger: list[tuple[Ints, int]]) -> float:
        """Return which part of a train comes with larger units' spikes, each within so many samples, beyond chance."""
        echo, no_chance = np.zeros(len(train), bool), 1.0
        for other, reach in larger:
            close = near(train, other, reach)
            chance = min(len(other) * 2 * reach / (self._seconds * self._rate), 1.0)
            if close.mean() > chance + _BEYOND_CHANCE * np.sqrt(chance * (1 - chance) / len(train)):
                echo, no_chance = echo | close, no_chance * (1 - chance)
        return float(echo.mean() - (1 - no_chance))

    def _parts(self, done: _Pass, row: int) -> list[NDArray[np.bool_]]:
        """Return masks of the two units that one row's spikes are of, or of one."""
        white = self._whitened(done, row, np.intersect1d(done.channels[row], done.bank.templates.channels[row]))
        everything = [np.ones(len(white), bool)]
        centred = white - white.mean(axis=0)
        values, vectors = np.linalg.eigh(centred @ centred.T)
        scores = vectors[:, ::-1][:, :4] * np.sqrt(np.maximum(values[::-1][:4], 0))
        for axis in range(min(3, scores.shape[1])):
            second = _two_means(scores, scores[:, axis] > np.median(scores[:, axis]))
            if min(second.sum(), (~second).sum()) < self._config.cluster.min_spikes:
                continue
            a, b = white[~second].mean(axis=0), white[second].mean(axis=0)
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            apart = np.linalg.norm(scores[second].mean(axis=0) - scores[~second].mean(axis=0))
            ratio = valley_ratio(scores[~second].astype(np.float32), scores[second].astype(np.float32))
            clear = max(ratio, _held_out_ratio(white, second)) < _SPLIT_RATIO and apart > _SPLIT_DISTANCE and _interleaved(second)
            if clear and (cosine < _SPLIT_COSINE or (cosine < _SAME[1] and not self._bursts(done, row, second == (b @ b < a @ a)))):
                return [~second, second]
        return everything

    def _bursts(self, done: _Pass, row: int, smaller: NDArray[np.bool_]) -> bool:
        """Tell whether the smaller of a row's spikes come with the larger ones, as those of one neuron in a burst do."""
        times = np.array(done.sample_index[row])
        larger = np.sort(times[~smaller])
        return self._echoes(np.sort(times[smaller]), [(larger, self._burst_samples)]) > _MOST_ECHOES


def _two_means(x: NDArray[np.float64], second: NDArray[np.bool_], n_iterations: int = 20) -> NDArray[np.bool_]:
    for _ in range(n_iterations):
        if not second.any() or second.all():
            break
        a, b = x[~second].mean(axis=0), x[second].mean(axis=0)
        nearer = ((x - b) ** 2).sum(axis=1) < ((x - a) ** 2).sum(axis=1)
        if (nearer == second).all():
            break
        second = nearer
    return second


def _held_out_ratio(white: Floats, second: NDArray[np.bool_]) -> float:
    """Tell how deep the valley between two parts is where each half of the snippets lies on the axis that the other half draws.

    Among so many numbers there is always an axis along which the snippets that drew it seem to fall in two.
    """
    along = np.empty(len(white), np.float32)
    even = np.where(second, np.cumsum(second), np.cumsum(~second)) % 2 == 0  # of each part every other
    for half in (even, ~even):
        a, b = (white[part & ~half].mean(axis=0) for part in (~second, second))
        along[half] = (white[half] - (a + b) / 2) @ (b - a)
    above = along > 0
    if above.all() or not above.any():
        return 1.0
    return valley_ratio(along[~above, None], along[above, None])


def _interleaved(second: NDArray[np.bool_]) -> bool:
    """Tell whether two parts, spikes in order of time, fire side by side; a unit that moved has one after the other."""
    rank = np.arange(len(second))
    later = (rank[second][:, None] > rank[~second][None]).mean()
    return bool(0.15 < later < 0.85)


def find_units(
    config: SorterConfig,
    probe: Probe,
    sampling_frequency: float,
    warmup: Sequence[Stretch],
    peaks: NDArray[Any],
    clusters: Calibration,
) -> tuple[Bank, NDArray[np.void]]:
    """Make units of a warm-up's traces and of the clusters its peaks form.

    Parameters
    ----------
    config : SorterConfig
    probe : Probe
    sampling_frequency : float
        In Hz.
    warmup : sequence of (int, ndarray of shape (n_samples, n_channels), float32)
        First sample_index and traces in noise units, each a learning period at the most.
    peaks : ndarray, shape (n_peaks,), PEAK_DTYPE
    clusters : Calibration
        Of these peaks.

    Returns
    -------
    bank : Bank
        Of the units at the end of the warm-up; without clusters, of none.
    matches : ndarray, shape (n_spikes,), MATCH_DTYPE
        All spikes of the units.
    """
    n_before, n_after, spans = sizes(config.match, sampling_frequency)
    step = max(len(warmup) // _NOISE_STRETCHES, 1)
    blocks = [np.ascontiguousarray(warmup[i][1].T) for i in range(0, len(warmup), step)]
    if not blocks or not len(clusters.unit):
        quiet = NoiseModel(np.eye(probe.n_channels), np.eye(n_before + n_after))
        maker = TemplateMaker(config.match, probe, quiet, n_before)
        none = np.zeros((0, spans.n_whole, probe.n_channels), np.float32)
        return Bank(maker, none, np.zeros(0, np.int64), np.zeros(0), sampling_frequency), np.zeros(0, MATCH_DTYPE)
    noise = estimate_noise(blocks, n_before + n_after, round(_QUIET_MS * sampling_frequency / 1000))
    named = clusters.unit >= 0
    usual = clusters.template[named if named.any() else ~named][:, :, 0]
    waveforms = framed(usual, n_before - round(config.snippets.ms_before * sampling_frequency / 1000), n_before + n_after)
    refine = Refine(config, probe, noise, waveforms, warmup, sampling_frequency)
    return refine(Seeds(peaks["sample_index"], peaks["channel"].astype(np.int64), clusters.label))


def near(times: Ints, others: Ints, reach: int) -> NDArray[np.bool_]:
    """Tell which of the times lie within `reach` samples of others; the others in order."""
    low, high = np.searchsorted(others, times - reach), np.searchsorted(others, times + reach, side="right")
    found: NDArray[np.bool_] = high > low
    return found


def framed(waveforms: Floats, shift: int, n_samples: int) -> Floats:
    """Return waveforms (n, n_snippet_samples, ...) in a window of `n_samples`, `shift` later; 0 where they are unknown."""
    out = np.zeros((len(waveforms), n_samples, *waveforms.shape[2:]), np.float32)
    first, stop = max(shift, 0), min(shift + waveforms.shape[1], n_samples)
    out[:, first:stop] = waveforms[:, first - shift : stop - shift]
    return out
