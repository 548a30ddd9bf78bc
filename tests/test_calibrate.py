"""Calibration on hand-made spikes whose units are known."""

from typing import Any

import naive
import numpy as np
import pytest
from numpy.typing import NDArray

from streamsort.calibrate import Calibration, calibrate, template_mismatch, valley_ratio
from streamsort.config import ClusterConfig
from streamsort.kernels.cluster import compare_templates
from streamsort.records import PEAK_DTYPE

NEIGHBORS = np.array([[0, 1, -1], [1, 0, 2], [2, 1, -1]], np.int32)
N_ROWS, N_DIMS = 20, 4
Spikes = tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]


def spikes(
    rng: np.random.Generator, n: int, channel: int, center: list[float], height: float, times: NDArray[Any] | None = None
) -> Spikes:
    """Make n spikes of one unit on one channel: a trough of `height` on it, half of it on its neighbours."""
    peaks = np.zeros(n, PEAK_DTYPE)
    peaks["sample_index"] = np.sort(rng.choice(1_000_000, n, replace=False)) if times is None else times
    peaks["channel"] = channel
    embeddings = (rng.normal(size=(n, N_DIMS)) + center).astype(np.float32)
    template = np.zeros((N_ROWS, 3), np.float32)
    shape = -np.exp(-0.5 * ((np.arange(N_ROWS) - 8) / 2.0) ** 2)
    template[:, 0], template[:, 1] = height * shape, height / 2 * shape
    snippets = template + rng.normal(size=(n, N_ROWS, 3)).astype(np.float32)
    snippets[:, :, NEIGHBORS[channel] < 0] = 0
    return peaks, embeddings, snippets.astype(np.float32)


def run(*groups: Spikes, **changes: Any) -> tuple[Calibration, NDArray[Any]]:
    """Calibrate on the groups together; return it and the group of each peak in the order calibration saw them."""
    peaks, embeddings, snippets = (np.concatenate(part) for part in zip(*groups, strict=True))
    order = np.argsort(peaks["sample_index"], kind="stable")
    group = np.repeat(np.arange(len(groups)), [len(g[0]) for g in groups])[order]
    found = calibrate(
        peaks[order],
        embeddings[order],
        snippets[order],
        neighbors=NEIGHBORS,
        amplitudes=np.abs(snippets[order][:, 8, 0]),
        detect_threshold=4.0,
        sampling_frequency=30000.0,
        config=ClusterConfig(**changes),
        seed=0,
    )
    return found, group


def test_two_units_on_one_channel_are_told_apart(rng: np.random.Generator) -> None:
    found, _ = run(spikes(rng, 200, 1, [0, 0, 0, 0], 8), spikes(rng, 120, 1, [9, 0, 0, 0], 14))
    assert set(found.unit.tolist()) == {0, 1}
    assert (found.channel == 1).all()
    assert found.n_spikes[found.unit == 0].sum() > found.n_spikes[found.unit == 1].sum() > 100


def test_one_unit_is_not_split(rng: np.random.Generator) -> None:
    found, _ = run(spikes(rng, 600, 1, [0, 0, 0, 0], 9))
    assert set(found.unit.tolist()) == {0}


def test_a_unit_that_peaks_on_two_channels_is_one(rng: np.random.Generator) -> None:
    """The same source seen from channel 0 and from channel 1: the templates agree on the channels they share."""
    peaks, embeddings, snippets = spikes(rng, 150, 1, [5, 5, 0, 0], 8)
    snippets[:, :, 1] *= 2  # as loud on channel 0 as on 1
    peaks["channel"][:70] = 0
    embeddings[:70] += np.float32(20)
    snippets[:70] = snippets[:70][:, :, [1, 0, 2]]
    snippets[:70, :, 2] = 0
    found, _ = run((peaks, embeddings, snippets))
    assert sorted(set(found.channel.tolist())) == [0, 1]
    assert set(found.unit.tolist()) == {0}


def test_what_hugs_the_threshold_is_rejected(rng: np.random.Generator) -> None:
    noise = spikes(rng, 100, 2, [0, 0, 0, 9], 4)
    noise[2][:, 8, 0] = -4 - rng.exponential(0.25, 100)
    found, _ = run(spikes(rng, 100, 1, [0, 0, 0, 0], 10), noise)
    assert set(found.unit[found.channel == 1].tolist()) == {0}
    assert set(found.unit[found.channel == 2].tolist()) == {-1}


def test_an_echo_is_rejected(rng: np.random.Generator) -> None:
    unit = spikes(rng, 150, 1, [0, 0, 0, 0], 15)
    echo = spikes(rng, 150, 1, [9, 0, 0, 0], 7, times=unit[0]["sample_index"] + 20)
    apart = spikes(rng, 150, 1, [0, 9, 0, 0], 7)
    found, _ = run(unit, echo, apart)
    assert len(set(found.unit[found.unit >= 0].tolist())) == 2
    assert (found.unit == -1).any()


def test_too_few_spikes_make_no_unit(rng: np.random.Generator) -> None:
    found, _ = run(spikes(rng, 15, 1, [0, 0, 0, 0], 10), spikes(rng, 60, 0, [0, 0, 0, 0], 10))
    assert set(found.channel.tolist()) == {0}
    assert set(found.unit.tolist()) == {0}


def test_a_unit_that_moves_meanwhile_is_one(rng: np.random.Generator) -> None:
    """It peaks on channel 1 at first and on channel 0 at last; only in the middle are the two alike."""
    peaks, embeddings, snippets = spikes(rng, 240, 1, [0, 0, 0, 0], 1)
    shape = -np.exp(-0.5 * ((np.arange(N_ROWS) - 8) / 2.0) ** 2)
    for i, place in enumerate(np.linspace(1, 0, 240)):
        here = int(place < 0.5)  # column 0 is the louder of the two
        peaks["channel"][i] = 1 - here
        loud, soft = (14 * place, 14 * (1 - place))[:: 1 - 2 * here]
        snippets[i, :, 0] += (loud + 6) * shape
        snippets[i, :, 1] += (soft + 6) * shape
        embeddings[i] += np.float32(20 * here)
    snippets[peaks["channel"] == 0, :, 2] = 0
    found, _ = run((peaks, embeddings, snippets))
    assert sorted(set(found.channel.tolist())) == [0, 1]
    assert set(found.unit.tolist()) == {0}


def test_nothing_at_all(rng: np.random.Generator) -> None:
    found, _ = run(spikes(rng, 0, 1, [0, 0, 0, 0], 10))
    assert len(found.unit) == 0 and found.template.shape == (0, N_ROWS, 3)


def test_the_same_seed_gives_the_same_units(rng: np.random.Generator) -> None:
    groups = [spikes(rng, 200, 1, [0, 0, 0, 0], 8), spikes(rng, 120, 1, [9, 0, 0, 0], 14)]
    first, second = run(*groups)[0], run(*groups)[0]
    for name in vars(first):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes()


@pytest.mark.parametrize(("distance", "low", "high"), [(0.0, 0.75, 1.01), (1.5, 0.6, 1.01), (5.0, 0.0, 0.5), (9.0, 0.0, 0.05)])
def test_valley_deepens_with_distance(rng: np.random.Generator, distance: float, low: float, high: float) -> None:
    a, b = rng.normal(size=(300, 6)).astype(np.float32), rng.normal(size=(300, 6)).astype(np.float32)
    b[:, 2] += distance
    assert low <= valley_ratio(a, b) <= high
    assert valley_ratio(a, b) == pytest.approx(valley_ratio(b, a), abs=0.02)


def test_valley_of_a_single_spike(rng: np.random.Generator) -> None:
    assert valley_ratio(rng.normal(size=(50, 3)).astype(np.float32), np.full((1, 3), 30, np.float32)) < 0.1


def test_template_mismatch_knows_lags_channels_and_noise(rng: np.random.Generator) -> None:
    shape = -10 * np.exp(-0.5 * ((np.arange(N_ROWS) - 8) / 2.0) ** 2)
    a, b = np.zeros((N_ROWS, 3), np.float32), np.zeros((N_ROWS, 3), np.float32)
    a[:, 0], a[:, 1] = shape, shape / 2  # seen from channel 1: itself, then channel 0
    b[:, 0], b[:, 1] = np.roll(shape, 2) / 2, np.roll(shape, 2)  # the same from channel 0, two samples later
    assert template_mismatch(a, a, NEIGHBORS[1], NEIGHBORS[1], 0.0) == 0
    assert template_mismatch(a, b, NEIGHBORS[1], NEIGHBORS[0], 0.0) < 0.1
    assert template_mismatch(a, 2 * a, NEIGHBORS[1], NEIGHBORS[1], 0.0) > 1
    assert template_mismatch(a, a, NEIGHBORS[2], NEIGHBORS[0], 0.0) == float("inf")
    noisy = a + rng.normal(0, 1.2, a.shape).astype(np.float32)
    assert template_mismatch(a, noisy, NEIGHBORS[1], NEIGHBORS[1], 1.44) < template_mismatch(
        a, noisy, NEIGHBORS[1], NEIGHBORS[1], 0.0
    )


def test_comparing_kernel_agrees_with_its_definition(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(2, 9, 4)).astype(np.float32)
    columns = np.array([2, -1, 0, 3], np.int32)
    differences, energies = np.empty(7, np.float32), np.empty(7, np.float32)
    assert compare_templates(a, b, columns, 3, differences, energies) == 3
    expected = naive.compare_templates(a, b, columns, 3)
    np.testing.assert_allclose(differences, expected[0], rtol=1e-5)
    np.testing.assert_allclose(energies, expected[1], rtol=1e-5)
