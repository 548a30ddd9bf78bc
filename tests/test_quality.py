"""Live metrics of a unit: SpikeInterface's numbers, from bounded memory, however the spikes are cut."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from seeded_spikes import DURATION_S, NOISE_UV, RATE, Train, trains

from streamsort.quality import NAMES, Histogram, Quality

GOLDEN = json.loads((Path(__file__).parent / "golden" / "quality.json").read_text())["metrics"]
TRAINS = {train.name: train for train in trains()}
END = int(DURATION_S * RATE)


def measured(train: Train, period_s: float = 0.25, start: int = 0) -> Quality:
    """Feed a train period by period, its samples counted from `start`."""
    quality = Quality(start, RATE)
    samples, heights = train.sample_index + start, np.abs(train.amplitude_uv) / NOISE_UV
    bounds = np.searchsorted(train.sample_index, np.arange(0, END + 1, period_s * RATE)).tolist()
    for a, b in zip(bounds, [*bounds[1:], len(samples)], strict=True):
        if b > a:
            quality.add(samples[a:b], train.amplitude_uv[a:b], heights[a:b], train.y_um[a:b])
    return quality


@pytest.mark.parametrize("name", GOLDEN)
def test_the_numbers_are_spikeinterfaces(name: str) -> None:
    found = measured(TRAINS[name]).metrics(END)
    assert set(found) == set(NAMES) == set(GOLDEN[name])
    for metric, expected in GOLDEN[name].items():
        if expected is not None:
            assert found[metric] == pytest.approx(expected, rel=0.01), metric
        elif (name, metric) != ("pausing", "amplitude_cv_median"):  # theirs is lost to the bins of the pause
            assert np.isnan(found[metric]), metric


@pytest.mark.parametrize("metric", ["num_spikes", "isi_violations_count", "presence_ratio"])
def test_counts_are_exact(metric: str) -> None:
    assert {name: measured(train).metrics(END)[metric] for name, train in TRAINS.items()} == {
        name: row[metric] for name, row in GOLDEN.items()
    }


def test_a_pause_does_not_hide_the_variation() -> None:
    assert measured(TRAINS["pausing"]).metrics(END)["amplitude_cv_median"] == pytest.approx(0.12, rel=0.05)


@pytest.mark.parametrize("period_s", [0.013, 10.0, DURATION_S])
def test_periods_and_birth_make_no_difference(period_s: float) -> None:
    train = TRAINS["contaminated"]
    expected = measured(train).metrics(END)
    assert measured(train, period_s).metrics(END) == expected
    assert measured(train, period_s, start=12_345_678).metrics(END + 12_345_678) == pytest.approx(expected)


def test_asking_changes_nothing() -> None:
    train = TRAINS["fading"]
    often, once = Quality(0, RATE), measured(train)
    for a in range(0, len(train.sample_index), 10):
        part = slice(a, a + 10)
        often.add(train.sample_index[part], train.amplitude_uv[part], -train.amplitude_uv[part] / NOISE_UV, train.y_um[part])
        often.metrics(int(train.sample_index[part][-1]) + 1)
    assert often.metrics(END) == pytest.approx(once.metrics(END))


def test_nothing_is_said_of_nothing() -> None:
    found = Quality(0, RATE).metrics(END)
    assert (found["num_spikes"], found["isi_violations_count"]) == (0, -1)
    assert all(np.isnan(found[name]) for name in NAMES if name not in ("num_spikes", "isi_violations_count"))


def test_without_positions_only_the_drift_is_unknown() -> None:
    train = TRAINS["calm"]
    quality = Quality(0, RATE)
    quality.add(train.sample_index, train.amplitude_uv, -train.amplitude_uv / NOISE_UV)
    assert {name for name, value in quality.metrics(END).items() if np.isnan(value)} == {"drift_ptp", "drift_std", "drift_mad"}


def test_a_gap_is_no_time() -> None:
    train = TRAINS["calm"]
    gap, half = 7_000_000, len(train.sample_index) // 2
    quality = Quality(0, RATE)
    for part, late in ((slice(None, half), 0), (slice(half, None), gap)):
        quality.skip_gap(late)
        quality.add(
            train.sample_index[part] + late, train.amplitude_uv[part], -train.amplitude_uv[part] / NOISE_UV, train.y_um[part]
        )
    assert quality.metrics(END + gap) == pytest.approx(measured(train).metrics(END))


def test_a_spike_of_a_minute_that_is_closed_counts_in_the_next() -> None:
    quality, minute = Quality(0, RATE), int(60 * RATE)
    one = np.ones(1)
    quality.metrics(minute)
    quality.add(np.array([minute - 5]), -80 * one, 8 * one)
    assert quality.metrics(minute)["presence_ratio"] == 0
    assert quality.metrics(2 * minute)["presence_ratio"] == 0.5


def test_a_rate_that_changes_is_still_within_a_percent(rng: np.random.Generator) -> None:
    """After 100 000 spikes, most of whose bins were made when the rate was another, against the definition."""
    rates = np.repeat([5.0, 40.0, 12.0], [20_000, 60_000, 20_000])
    samples = np.cumsum(rng.exponential(RATE / rates)).astype(np.int64)
    amplitudes = -100 * rng.lognormal(0, 0.15, len(samples)) * np.linspace(1, 0.7, len(samples))
    quality, end = Quality(0, RATE), int(samples[-1]) + 1
    for a in range(0, len(samples), 1000):
        quality.add(samples[a : a + 1000], amplitudes[a : a + 1000], -amplitudes[a : a + 1000] / NOISE_UV)
    bounds = np.searchsorted(samples, np.arange(0, end + 1, int(50 * end / len(samples))))
    spread = [amplitudes[a:b].std() for a, b in pairwise(bounds) if b > a]
    found = quality.metrics(end)
    assert found["amplitude_cv_median"] == pytest.approx(np.median(spread) / abs(amplitudes.mean()), rel=0.01)
    assert found["amplitude_median"] == pytest.approx(np.median(amplitudes), rel=0.003)


def test_memory_is_bounded() -> None:
    quality = Quality(0, RATE)
    sizes = []
    for hour in range(1, 31):
        samples = np.linspace((hour - 1) * 3600 * RATE, hour * 3600 * RATE - 1, 40_000).astype(np.int64)
        quality.add(samples, np.full(40_000, -80.0), np.full(40_000, 8.0), np.full(40_000, 100.0))
        quality.metrics(int(hour * 3600 * RATE))
        sizes.append(_size(quality))
    assert max(sizes) < 250_000 and sizes[-1] == sizes[-3]


def _size(thing: object) -> int:
    """Count the bytes of arrays and numbers that hang on an object."""
    if isinstance(thing, np.ndarray):
        return thing.nbytes
    if isinstance(thing, list | tuple) or type(thing).__name__ == "deque":
        return sum(_size(item) for item in thing)  # type: ignore[attr-defined]
    return sum(_size(item) for item in vars(thing).values()) if hasattr(thing, "__dict__") else sys.getsizeof(thing)


@pytest.mark.parametrize(
    "values", [[3.0], [1.0, 2.0], [-5000.0, 0.0, 4000.0], [-80.0, -60.0, -90.0, -70.0], [0.02, 0.5, 30.0, 31.0, 32.0]]
)
def test_the_histograms_median_is_within_half_a_bin(values: list[float]) -> None:
    histogram = Histogram()
    histogram.add(np.array(values))
    median = float(np.median(values))
    assert histogram.median() == pytest.approx(median, rel=0.0026, abs=3e-5)
