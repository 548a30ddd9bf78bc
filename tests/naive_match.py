"""Slow twins of the matching kernels, written from their definitions in float64; they share no code with them.

Nothing is kept from one look to the next: every score is the inner product of a filter with the residual as it is at that moment.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]


class Limits(NamedTuple):
    """Amplitudes a spike may have, and those beyond which it is another unit's."""

    least: float
    most: float
    too_small: float
    too_large: float
    ringing: float


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


class Peeler:
    """Greedy matching on a tiny recording, as the docstrings of `peel` and of those it calls define it."""

    def __init__(self, residual: Reals, t: Any, threshold: NDArray[Any], spans: Any, limits: Limits) -> None:
        self.residual, self.t, self.threshold, self.spans, self.limits = residual.copy(), t, threshold, spans, limits
        n_channels, self.n_samples = len(residual), t.temporal.shape[2]
        self.filters = [filter_on_all(t, u, n_channels) for u in range(len(t.energy))]
        self.last = [-(10**9)] * len(self.filters)
        self.subtracted: list[tuple[int, int, Reals, float]] = []  # unit, column, what was subtracted on all channels, amplitude
        self.found: list[tuple[int, int, int, int]] = []
        self.measured: list[tuple[float, float, float]] = []

    def score(self, unit: int, column: int) -> float:
        return score_at(self.residual, self.filters[unit], column, int(self.spans.n_before))

    def gain(self, unit: int, score: float) -> float:
        return best_amplitude(score, float(self.t.energy[unit]), float(self.spans.tightness), self.limits)[1]

    def possible(self, unit: int, column: int) -> bool:
        energy = float(self.t.energy[unit])
        usual = self.limits.too_small * energy < self.score(unit, column) <= self.limits.too_large * energy
        return usual and abs(column - self.last[unit]) >= int(self.spans.refractory)

    def rivals(self, unit: int) -> list[int]:
        """Units with a channel in common."""
        mine = {c for c in self.t.channels[unit] if c >= 0}
        return [v for v in range(len(self.filters)) if mine & {c for c in self.t.channels[v] if c >= 0}]

    def leftovers(self, unit: int, column: int) -> float:
        """Sum what each spike subtracted nearby had added to this score."""
        total = 0.0
        for other, other_column, wave, amplitude in self.subtracted:
            lag = column - other_column
            if -self.n_samples < lag < 2 * self.n_samples and np.any(wave[:, self.t.channels[unit, 0]]):
                total += self.limits.ringing * float(self.t.energy[other]) * amplitude**2
            if abs(lag) < self.n_samples:
                shifted = np.zeros_like(wave)
                for j in range(self.n_samples):
                    if 0 <= j + lag < self.n_samples:
                        shifted[j] = wave[j + lag]
                total += abs(float((shifted * self.filters[unit]).sum())) * amplitude
        return total

    def candidate(self, first: int, last: int) -> tuple[int, int, float] | None:
        best: tuple[int, int, float] | None = None
        for unit in range(len(self.filters)):
            for column in range(first, last + 1):
                before, here, after = (self.score(unit, c) for c in (column - 1, column, column + 1))
                if not self.possible(unit, column) or before > here or after > here:
                    continue
                gain = self.gain(unit, peak_height(before, here, after))
                certain = gain - self.spans.tolerance * self.leftovers(unit, column)
                if certain <= self.threshold[unit] or (best is not None and certain <= best[2]):
                    continue
                sweep = range(column - self.spans.sweep, column + self.spans.sweep + 1)
                rivals = [(v, c) for v in self.rivals(unit) for c in sweep if (v, c) != (unit, column) and self.possible(v, c)]
                if all(self.gain(v, self.score(v, c)) <= gain for v, c in rivals):
                    best = unit, column, certain
        return best

    def second_best(self, unit: int, column: int) -> float:
        half = self.spans.sweep // 2
        best = 0.0
        for other in self.rivals(unit):
            for c in range(column - half, column + half + 1):
                score = self.score(other, c)
                energy = float(self.t.energy[other])
                if other != unit and self.limits.too_small * energy < score <= self.limits.too_large * energy:
                    best = max(best, self.gain(other, score))
        return best

    def take(self, unit: int, column: int, gain: float) -> None:
        t, spans = self.t, self.spans
        here = self.score(unit, column)
        misses = []
        for response in t.response[unit].astype(float):
            scale = here / response[1]
            misses.append(sum((self.score(unit, column + d) - scale * response[1 + d]) ** 2 for d in (-1, 1)))
        shift = int(np.argmin(misses))
        whole = here * float(t.energy[unit]) / float(t.response[unit, shift, 1])
        amplitude, _ = best_amplitude(whole, float(t.energy[unit]), float(spans.tightness), self.limits)
        wave = np.zeros((self.n_samples, len(self.residual)))
        for k, channel in enumerate(t.channels[unit]):
            if channel >= 0:
                wave[:, channel] = t.shifted[unit, shift, :, k]
        near = [v for v, c, _, _ in self.subtracted if abs(c - column) < spans.overlap]
        collision = int(any(v in self.rivals(unit) for v in near))
        self.measured.append((amplitude, gain, self.second_best(unit, column)))
        self.found.append((unit, column, shift, collision))
        self.residual[:, column - spans.n_before :][:, : self.n_samples] -= amplitude * wave.T
        self.subtracted.append((unit, column, wave, amplitude))
        self.last[unit] = column

    def __call__(self, first: int, stop: int) -> None:
        for column in range(first, stop):
            look_from = column
            for _ in range(self.spans.rounds):
                found = self.candidate(look_from, column)
                if found is None:
                    break
                self.take(*found)
                look_from = column - self.spans.look_back
