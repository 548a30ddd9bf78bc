"""Spike trains: rates, refractory times, bursts and silences are as asked for, and coincidences are between neighbours alone."""

import itertools

import numpy as np
import pytest

from streamsort.simulate import SimulationConfig, truth, units_of
from streamsort.trains import PAIR_REACH_UM, draw_spikes, silences_of, unit_pairs

pytestmark = pytest.mark.timeout(20)


def from_nearest(times: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance in samples from each time to the nearest of others, both in order."""
    fences = np.concatenate([[-(10**9)], others, [10**9]])
    after = np.searchsorted(fences, times)
    return np.minimum(fences[after] - times, times - fences[after - 1])


def test_spike_trains_are_refractory_and_have_the_rates_asked_for() -> None:
    config = SimulationConfig(seconds=400, n_units=8, rates_hz=(2, 10), bursting=0.5, seed=5)
    sample_index, unit_index = truth(config)
    assert np.all(np.diff(sample_index) >= 0) and sample_index.dtype == np.int64 and unit_index.dtype == np.int32
    short = []
    for unit in range(8):
        intervals = np.diff(sample_index[unit_index == unit])
        assert intervals.min() >= 89  # 3 ms, less one for rounding
        assert 1.7 < len(intervals) / 400 < 11.5
        short.append(np.mean(intervals < 0.0081 * 30000))
    assert sorted(np.array(short) > 0.3) == [False] * 4 + [True] * 4


def test_silences_hold() -> None:
    config = SimulationConfig(seconds=30, n_units=3, silences=((1, 10.0, 20.0),))
    sample_index, unit_index = truth(config)
    inside = (sample_index >= 300_000) & (sample_index < 600_000)
    assert set(unit_index[inside]) == {0, 2} and set(unit_index[~inside]) == {0, 1, 2}


def test_amplitude_falls_within_a_burst_and_recovers_after_it() -> None:
    config = SimulationConfig(seconds=100, n_units=1, rates_hz=(10, 10), bursting=1.0, amplitude_jitter=0.0)
    spikes = draw_spikes(config, np.zeros((1, 2)))
    short = np.diff(spikes.truth.sample_index) <= 240  # 8 ms
    assert 200 < short.sum() < 600
    ratio = spikes.amplitude[1:] / spikes.amplitude[:-1]
    np.testing.assert_allclose(ratio[short & (ratio < 1)], 0.85, rtol=1e-5)
    assert np.mean(ratio[short] < 1) > 0.9  # a long interval may by chance be short too
    assert np.all(spikes.amplitude[1:][~short] == 1.0)


def test_pauses_silence_the_share_of_units_asked_for_and_they_return() -> None:
    config = SimulationConfig(
        seconds=60, n_units=10, rates_hz=(3, 10), pauses=(0.3, 20.0, 40.0), silences=((0, 0.0, 10.0),), seed=2
    )
    sample_index, unit_index = truth(config)
    inside = (sample_index >= 600_000) & (sample_index < 1_200_000)
    paused = set(range(10)) - set(unit_index[inside])
    assert len(paused) == 3 and set(unit_index[sample_index >= 1_200_000]) == set(range(10))
    assert set(silences_of(config)) == {(0, 0.0, 10.0), *((unit, 20.0, 40.0) for unit in paused)}


def test_pairs_are_neighbours_each_in_one_pair() -> None:
    config = SimulationConfig(probe_name="neuropixels128", n_units=40, pairs=0.2)
    places_um = units_of(config).sources_um[:, 0, :2]
    pairs = unit_pairs(config, places_um)
    paired = list(itertools.chain.from_iterable(pairs))
    assert len(pairs) >= 10 and len(set(paired)) == len(paired)
    assert all(np.hypot(*(places_um[a] - places_um[b])) <= PAIR_REACH_UM for a, b in pairs)
    assert unit_pairs(SimulationConfig(n_units=40), places_um) == []


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_pairs_coincide_as_often_as_asked_and_units_stay_refractory(share: float) -> None:
    config = SimulationConfig(seconds=300, n_units=12, rates_hz=(2, 12), pairs=share, bursting=0.3, pauses=(0.3, 100, 150), seed=1)
    without = SimulationConfig(seconds=300, n_units=12, rates_hz=(2, 12), bursting=0.3, pauses=(0.3, 100, 150), seed=1)
    (times, label), (times_before, label_before) = truth(config), truth(without)
    pairs = unit_pairs(config, units_of(config).sources_um[:, 0, :2])
    moved = 0
    for pair in pairs:
        rarer, other = sorted((times[label == unit] for unit in pair), key=len)
        near = from_nearest(rarer, other)
        assert np.mean(near <= 15) == pytest.approx(share, abs=0.03)
        assert near[near <= 15].mean() == pytest.approx(7.5, abs=1.0)  # uniform within 0.5 ms
        same = [np.array_equal(times[label == unit], times_before[label_before == unit]) for unit in pair]
        moved += same.count(False)
        assert sum(same) == 1  # only the rarer one's were moved
    assert moved == len(pairs) > 2
    assert min(np.diff(times[label == unit]).min() for unit in range(12)) >= 89
    assert len(times) == pytest.approx(len(times_before), rel=0.02)
    for unit, from_s, to_s in silences_of(config):
        own = times[label == unit] / 30_000
        assert not np.any((own >= from_s) & (own < to_s - 1e-3))
