"""Slow twins of the matching kernels, written from their definitions in float64; they share no code with them.

Nothing is kept from one look to the next: every score is the inner product of a filter with the residual as it is at that moment.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]


class Limits(NamedTuple):
    """Amplitudes a spike may have, and those beyond which it is another unit's or two; what is larger than a spike, and where."""

    least: float
    most: float
    too_small: float
    too_large: float
    core: int
    larger_by: float
    herald: float
    sum: float


def filter_on_all(t: Any, unit: int, n_channels: int) -> Reals:
    """Sum the products of a unit's spatial and temporal factors, on all channels, (n_samples, n_channels)."""
    full = np.zeros((t.temporal.shape[2], n_channels))
    for spatial, temporal in zip(t.spatial[unit], t.temporal[unit], strict=True):
        for k, channel in enumerate(t.channels[unit]):
            if channel >= 0:
                full[:, channel] += float(spatial[k]) * temporal.astype(float)
    return full


def score_at(residual: Reals, weights: Reals, column: int, n_before: int) -> float:
    """Weigh the residual (n_channels, n_columns) around one column."""
    first = column - n_before
    return float((residual[:, first : first + len(weights)].T * weights).sum())


def best_amplitude(score: float, energy: float, tightness: float, limits: Limits) -> tuple[float, float]:
    """Try all amplitudes: the one that lowers the squared residual most, its distance from 1 being charged, and by how much."""
    amplitudes = np.linspace(limits.least, limits.most, 20_001)
    gains = 2 * amplitudes * score - amplitudes**2 * energy - tightness * (amplitudes - 1) ** 2
    return float(amplitudes[gains.argmax()]), float(gains.max())


def peak_height(before: float, here: float, after: float) -> float:
    """Fit a parabola through three values; where it does not peak in the middle, the middle one."""
    square, slope, _ = np.polyfit([-1.0, 0.0, 1.0], [before, here, after], 2)
    if before > here or after > here or square >= 0:
        return here
    return float(here - slope * slope / (4 * square))


def in_steps(values: NDArray[Any]) -> Reals:
    """Round to what a residual can be: the nearest of the numbers k / 1024."""
    rounded: Reals = np.rint(values * 1024) / 1024
    return rounded


class Peeler:
    """Greedy matching on a tiny recording, as the docstrings of `peel` and of those it calls define it."""

    def __init__(self, residual: Reals, t: Any, threshold: NDArray[Any], spans: Any, limits: Limits) -> None:
        self.residual, self.t, self.threshold, self.spans, self.limits = residual.copy(), t, threshold, spans, limits
        n_channels, self.n_samples = len(residual), t.temporal.shape[2]
        self.filters = [filter_on_all(t, u, n_channels) for u in range(len(t.energy))]
        self.subtracted: list[tuple[int, int, Reals, float]] = []  # unit, column, what was subtracted on all channels, amplitude
        self.found: list[tuple[int, int, int, int]] = []
        self.measured: list[tuple[float, float, float]] = []
        self.waiting: set[int] = set()
        self.waited: set[int] = set()
        self.through = 0  # no spike is found before any more
        self.n_apart = 0  # spikes that were one of two

    def score(self, unit: int, column: int) -> float:
        return score_at(self.residual, self.filters[unit], column, int(self.spans.n_before))

    def gain(self, unit: int, score: float) -> float:
        return best_amplitude(score, float(self.t.energy[unit]), float(self.t.tightness[unit]), self.limits)[1]

    def times(self, unit: int) -> list[int]:
        """When a unit fired, as far as is known."""
        return [column for other, column, _, _ in self.subtracted if other == unit]

    def usual(self, unit: int, column: int) -> bool:
        energy = float(self.t.energy[unit])
        return self.limits.too_small * energy < self.score(unit, column) <= self.limits.too_large * energy

    def rests(self, column: int, times: list[int]) -> bool:
        return any(abs(column - at) < self.spans.refractory for at in times)

    def beats(self, unit: int, column: int, gain: float) -> bool:
        """Tell whether a unit gains more here than `gain`; not while it is refractory after its last spike."""
        if not self.usual(unit, column) or self.rests(column, sorted(self.times(unit))[-1:]):
            return False
        return self.gain(unit, self.score(unit, column)) > gain

    def rivals(self, unit: int) -> list[int]:
        """Units with a channel in common."""
        mine = {c for c in self.t.channels[unit] if c >= 0}
        return [v for v in range(len(self.filters)) if mine & {c for c in self.t.channels[v] if c >= 0}]

    def leftovers(self, unit: int, column: int) -> float:
        """Sum what each spike subtracted nearby had added to this score."""
        total = 0.0
        for _, other_column, wave, amplitude in self.subtracted:
            lag = column - other_column
            if not -self.n_samples < lag < len(wave):
                continue
            silence = np.zeros((self.n_samples, wave.shape[1]))
            seen = np.concatenate([silence, wave, silence])[self.n_samples + lag :][: self.n_samples]
            total += abs(float((seen * self.filters[unit]).sum())) * amplitude
        return total

    def fit(self, unit: int, column: int, without: Sequence[float] = (0, 0, 0)) -> tuple[int, float, Reals]:
        """Return the shift and amplitude of a spike there, and its waveform at amplitude 1, (n_whole, n_channels).

        Another spike at once adds `without` to the scores one column before, there, and one after.
        """
        before, here, after = (self.score(unit, column - 1 + k) - without[k] for k in range(3))
        responses = self.t.response[unit].astype(float)
        misses = []
        for response in responses:
            scale = here / response[1]
            misses.append((before - scale * response[0]) ** 2 + (after - scale * response[2]) ** 2)
        shift, energy = int(np.argmin(misses)), float(self.t.energy[unit])
        amplitude, _ = best_amplitude(here * energy / responses[shift, 1], energy, float(self.t.tightness[unit]), self.limits)
        wave = np.zeros((self.t.shifted.shape[2], len(self.residual)))
        for k, channel in enumerate(self.t.channels[unit]):
            if channel >= 0:
                wave[:, channel] = self.t.shifted[unit, shift, :, k]
        return shift, amplitude, wave

    def left(self, unit: int, column: int, now: int) -> Reals:
        """Return the largest of what a spike would leave on each channel, from its first sample to the last known at `now`."""
        _, amplitude, wave = self.fit(unit, column)
        n_after = self.n_samples - self.spans.n_before
        known = self.residual[:, column - self.spans.n_before : now + n_after + self.spans.sweep].T.copy()
        n = min(len(known), len(wave))
        known[:n] -= amplitude * wave[:n]
        most: Reals = np.abs(known).max(axis=0)
        return most

    def is_part(self, unit: int, column: int, now: int) -> bool:
        """Tell whether a spike would leave something larger than itself on its largest channels."""
        channels = [c for c in self.t.channels[unit] if c >= 0][: self.limits.core]
        height = self.fit(unit, column)[1] * self.height(unit)
        return bool(self.left(unit, column, now)[channels].max() > height + self.limits.larger_by)

    def height(self, unit: int) -> float:
        """Return how far a unit's spike goes on its largest channel, while it is matched."""
        return float(np.abs(self.t.shifted[unit, len(self.t.shifted[unit]) // 2, : self.n_samples, 0]).max())

    def larger_to_come(self, unit: int, column: int, now: int) -> bool:
        """Tell whether a spike would leave much of a rival of more energy on that one's largest channel."""
        left = self.left(unit, column, now)
        larger = [v for v in self.rivals(unit) if self.t.energy[v] > self.t.energy[unit]]
        return any(left[self.t.channels[v, 0]] > self.limits.herald * self.height(v) for v in larger)

    def seen(self, unit: int, other: int, lag: int) -> float:
        """Score a spike of another unit with a unit's filter, `lag` columns after that spike."""
        wave = np.zeros((self.t.shifted.shape[2] + 2 * self.n_samples, len(self.residual)))
        for k, channel in enumerate(self.t.channels[other]):
            if channel >= 0:
                wave[self.n_samples : -self.n_samples, channel] = self.t.shifted[other, len(self.t.shifted[other]) // 2, :, k]
        return float((wave[self.n_samples + lag :][: self.n_samples] * self.filters[unit]).sum())

    def two_at_once(self, unit: int, column: int, now: int) -> tuple[int, int, list[float], float] | None:
        """Find two spikes that together explain more than this one: the larger, what the other adds around it, by how much."""
        alone = self.score(unit, column)
        amplitude, one = best_amplitude(alone, float(self.t.energy[unit]), float(self.t.tightness[unit]), self.limits)
        if amplitude < self.limits.sum:
            return None
        best, lead = None, 0.0
        columns = range(max(column - self.spans.apart, self.through), min(column + self.spans.apart, now + self.spans.sweep) + 1)
        for large, small in itertools.permutations(self.rivals(unit), 2):
            energy = np.array([self.t.energy[large], self.t.energy[small]], float)
            places = itertools.product(columns, columns) if energy[0] >= energy[1] else []
            for at in places:
                y = np.array([self.score(large, at[0]), self.score(small, at[1])])
                tired = self.rests(at[0], self.times(large)) or self.rests(at[1], self.times(small))
                if (y < self.limits.least * energy).any() or tired:
                    continue
                shared = self.seen(large, small, at[0] - at[1])
                square = np.array([[energy[0], shared], [shared, energy[1]]])
                tightness = self.t.tightness[[large, small]].astype(float)
                both = np.linalg.solve(square + np.diag(tightness), y + tightness)
                gain = float(2 * both @ y - both @ square @ both - tightness @ (both - 1) ** 2)
                usual = both.min() >= self.limits.least and both.max() <= self.limits.most
                if usual and gain - self.threshold[small] - one > lead:
                    lead = gain - float(self.threshold[small]) - one
                    adds = [both[1] * self.seen(large, small, at[0] + d - at[1]) for d in (-1, 0, 1)]
                    best = large, at[0], adds, lead
        return best

    def candidate(self, first: int, reach: int, now: int) -> tuple[int, int, float] | None:
        best: tuple[int, int, float] | None = None
        for unit in range(len(self.filters)):
            for column in range(first, now + 1):
                if column < reach and column not in self.waiting:
                    continue
                before, here, after = (self.score(unit, c) for c in (column - 1, column, column + 1))
                if not self.usual(unit, column) or before > here or after > here or self.rests(column, self.times(unit)):
                    continue
                gain = self.gain(unit, peak_height(before, here, after))
                certain = gain - self.spans.tolerance * self.leftovers(unit, column)
                if certain <= self.threshold[unit] or (best is not None and certain <= best[2]):
                    continue
                sweep = range(column - self.spans.sweep, column + self.spans.sweep + 1)
                if any(self.beats(v, c, gain) for v in self.rivals(unit) for c in sweep if (v, c) != (unit, column)):
                    continue
                may_wait = now < column + self.spans.patience
                if self.is_part(unit, column, now) or (may_wait and self.larger_to_come(unit, column, now)):
                    self.waiting |= {column} if may_wait else set()
                else:
                    best = unit, column, certain
        return best

    def second_best(self, unit: int, column: int) -> float:
        half = self.spans.sweep // 2
        near = range(column - half, column + half + 1)
        others = [(v, c) for v in self.rivals(unit) if v != unit for c in near if self.usual(v, c)]
        return max((self.gain(v, self.score(v, c)) for v, c in others), default=0.0)

    def take(self, unit: int, column: int, gain: float, now: int) -> None:
        other, adds = self.second_best(unit, column), [0.0, 0.0, 0.0]
        two = self.two_at_once(unit, column, now)
        if two is not None:
            unit, column, adds, lead = two
            gain = self.gain(unit, self.score(unit, column) - adds[1])
            other = gain - lead
            self.n_apart += 1
        shift, amplitude, wave = self.fit(unit, column, adds)
        near = [v for v, c, _, _ in self.subtracted if abs(c - column) < self.spans.overlap]
        collision = int(any(v in self.rivals(unit) for v in near))
        self.measured.append((amplitude, gain, other))
        self.found.append((unit, column, shift, collision))
        self.residual[:, column - self.spans.n_before :][:, : len(wave)] -= in_steps(amplitude * wave.T)
        self.subtracted.append((unit, column, wave, amplitude))

    def __call__(self, first: int, stop: int) -> None:
        self.through = first - self.spans.look_back
        for now in range(first, stop):
            longest, reach = now - self.spans.patience, now - self.spans.look_back
            look_from = longest if longest in self.waiting else now
            for _ in range(self.spans.rounds):
                found = self.candidate(look_from, reach, now)
                if found is None:
                    break
                self.take(*found, now)
                reach = max(min(reach, self.found[-1][1] - self.spans.look_back), self.through)
                look_from = min(longest, reach)
            self.waited |= self.waiting
            self.waiting.discard(longest)
            while self.through + self.spans.look_back <= now and not self.waiting & {
                self.through,
                self.through + self.spans.look_back,
            }:
                self.through += 1
