"""When simulated units fire: refractory trains with bursts, silences and coincidences.

A `SimulationConfig` and the units' places come in, `Spikes` go out: the truth, and what it does not tell of each spike, its
sub-sample position and its amplitude. Coincidences and pauses are drawn from seeds of their own, so they change no other spike.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamsort.neurons import MS_AFTER, MS_BEFORE, log_uniform
from streamsort.simconfig import SimulationConfig

N_SHIFTS = 8  # sub-sample positions of a trough
REFRACTORY_S = 0.003
BURST_CHANCE, BURST_DECAY = 0.4, 0.85  # of a short interval after a spike of a bursting unit; amplitude lost at each
COINCIDENCE_S = 0.0005
PAIR_REACH_UM = 50.0  # units further apart share no channel worth the name

Floats = NDArray[np.float64]


class Truth(NamedTuple):
    """Which unit fired when: two arrays of (n_spikes,), in order of `sample_index`."""

    sample_index: NDArray[np.int64]
    unit_index: NDArray[np.int32]


@dataclass(frozen=True)
class Spikes:
    """All spikes of a recording in order of time, with what the truth does not tell."""

    truth: Truth
    shift: NDArray[np.int8]  # eighths of a sample after sample_index
    amplitude: NDArray[np.float32]  # relative to the template


def draw_spikes(config: SimulationConfig, places_um: Floats) -> Spikes:
    """Draw the spikes of units at these places, (n_units, 2) um."""
    rng = np.random.default_rng([config.seed, 1])
    rates_hz = log_uniform(rng, *config.rates_hz, config.n_units)
    bursts = rng.permutation(np.arange(config.n_units) < round(config.bursting * config.n_units))
    trains = []
    for unit in range(config.n_units):
        train_s, relative = _draw_train(rng, rates_hz[unit], config.seconds, BURST_CHANCE if bursts[unit] else 0.0)
        keep = _may_fire(config, unit, train_s)
        trains.append((train_s[keep], (relative * rng.normal(1.0, config.amplitude_jitter, len(relative)))[keep]))
    rng = np.random.default_rng([config.seed, 6])
    for pair in unit_pairs(config, places_um):
        rarer, other = sorted(pair, key=lambda unit: len(trains[unit][0]))
        trains[rarer] = _coincident(rng, config, rarer, trains[rarer], trains[other][0])
    return _merged(config.sampling_frequency, trains)


def draw_far_spikes(config: SimulationConfig) -> Spikes:
    """Draw the spikes of the distant neurons, which neither burst nor rest."""
    rng = np.random.default_rng([config.seed, 9])
    rates_hz = log_uniform(rng, *config.rates_hz, config.far_units)
    trains = [_draw_train(rng, rate_hz, config.seconds, 0.0) for rate_hz in rates_hz]
    in_time = [times_s < config.seconds for times_s, _ in trains]
    return _merged(
        config.sampling_frequency, [(times_s[k], relative[k]) for (times_s, relative), k in zip(trains, in_time, strict=True)]
    )


def _merged(sampling_frequency: float, trains: list[tuple[Floats, Floats]]) -> Spikes:
    none = (np.zeros(0), np.zeros(0))
    time_s, amplitudes = (np.concatenate(part) for part in zip(none, *trains, strict=True))
    label = np.repeat(np.arange(len(trains), dtype=np.int32), [len(train_s) for train_s, _ in trains])
    order = np.lexsort((label, time_s))
    eighths = np.rint(time_s[order] * sampling_frequency * N_SHIFTS).astype(np.int64)
    sample_index = (eighths + N_SHIFTS // 2) // N_SHIFTS  # the nearest sample
    amplitude = amplitudes[order].clip(0.1).astype(np.float32)
    return Spikes(Truth(sample_index, label[order]), (eighths - sample_index * N_SHIFTS).astype(np.int8), amplitude)


def _draw_train(rng: np.random.Generator, rate_hz: float, seconds: float, burst_chance: float) -> tuple[Floats, Floats]:
    """Draw a refractory Poisson train; after each spike, with `burst_chance`, another follows within 3 to 8 ms, smaller."""
    short_s = 0.005
    pause_s = (1 / rate_hz - burst_chance * (REFRACTORY_S + short_s / 2)) / (1 - burst_chance) - REFRACTORY_S
    n = int(seconds * rate_hz + 15 * np.sqrt(seconds * rate_hz)) + 20  # more than can be needed
    in_burst = rng.random(n) < burst_chance
    intervals_s = REFRACTORY_S + np.where(in_burst, rng.uniform(0, short_s, n), rng.exponential(max(pause_s, 1e-4), n))
    index = np.arange(n)
    last_pause = np.maximum.accumulate(np.where(in_burst, 0, index))
    return np.cumsum(intervals_s), np.power(BURST_DECAY, index - last_pause)


def silences_of(config: SimulationConfig) -> tuple[tuple[int, float, float], ...]:
    """List who is silent from when to when: `config.silences`, and the pauses of the units drawn for them."""
    share, from_s, to_s = config.pauses or (0.0, 0.0, 0.0)
    order = np.random.default_rng([config.seed, 5]).permutation(config.n_units)
    return (*config.silences, *((int(unit), from_s, to_s) for unit in order[: round(share * config.n_units)]))


def _may_fire(config: SimulationConfig, unit: int, times_s: Floats) -> NDArray[np.bool_]:
    """Mask times at which a unit is not silent and its whole template lies in the recording."""
    may: NDArray[np.bool_] = (times_s >= MS_BEFORE / 1e3) & (times_s < config.seconds - MS_AFTER / 1e3)
    for silent, from_s, to_s in silences_of(config):
        may &= (silent != unit) | (times_s < from_s) | (times_s >= to_s)
    return may


def unit_pairs(config: SimulationConfig, places_um: Floats) -> list[tuple[int, int]]:
    """Pair the units that are nearest to each other, each at most once and up to `PAIR_REACH_UM` apart; none without `pairs`."""
    if not config.pairs:
        return []
    first, second = np.triu_indices(len(places_um), 1)
    gap_um = np.hypot(*(places_um[first] - places_um[second]).T)
    pairs: list[tuple[int, int]] = []
    for k in np.argsort(gap_um, kind="stable"):
        a, b = int(first[k]), int(second[k])
        if gap_um[k] <= PAIR_REACH_UM and not any({a, b} & set(pair) for pair in pairs):
            pairs.append((a, b))
    return pairs


def _coincident(
    rng: np.random.Generator, config: SimulationConfig, unit: int, train: tuple[Floats, Floats], other_s: Floats
) -> tuple[Floats, Floats]:
    """Move a share of a unit's spikes next to spikes of another; those left in the refractory time of a moved one are dropped."""
    times_s, amplitude = train
    moved_s = other_s + rng.uniform(-COINCIDENCE_S, COINCIDENCE_S, len(other_s))
    moved_s = rng.permutation(moved_s[_may_fire(config, unit, moved_s)])[: round(config.pairs * len(times_s))]
    moved_s = _refractory(np.sort(moved_s))
    order = rng.permutation(len(times_s))
    moved, rest = order[: len(moved_s)], np.sort(order[len(moved_s) :])
    fences = np.concatenate([[-np.inf], moved_s, [np.inf]])
    after = np.searchsorted(fences, times_s[rest])
    clear = np.minimum(fences[after] - times_s[rest], times_s[rest] - fences[after - 1]) >= REFRACTORY_S
    joined_s = np.concatenate([moved_s, times_s[rest[clear]]])
    in_time = np.argsort(joined_s)
    return joined_s[in_time], np.concatenate([amplitude[moved], amplitude[rest[clear]]])[in_time]


def _refractory(times_s: Floats) -> Floats:
    """Drop what follows the last time kept too closely."""
    kept: list[float] = []
    for time_s in times_s:
        if not kept or time_s - kept[-1] >= REFRACTORY_S:
            kept.append(float(time_s))
    return np.array(kept)
