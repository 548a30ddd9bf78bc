"""The kernels of learning against their definitions."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scenes import N_SAMPLES, N_WHOLE, Cell, maker, mean_snippets

from streamsort.kernels.learn import compare_spikes, find_alone, multiply, slide, teach
from streamsort.probe import Probe
from streamsort.templates import Templates

PROBE = Probe.linear(10, 20.0)
CELLS = [Cell(12.0, 32.0, 15.0), Cell(11.0, 52.0, 18.0, width=4.0), Cell(10.0, 170.0, 12.0, width=1.4), Cell(10.0, 170.0, 12.0)]
SLOWEST, FASTEST, EAGERNESS = 0.01, 0.2, 0.8
N_COMPARED = 4


def naive_alone(sample_index: NDArray[Any], row: NDArray[Any], t: Templates) -> list[bool]:
    """Look at every pair."""
    return [
        not any(
            i != k and abs(int(sample_index[i] - sample_index[k])) <= N_SAMPLES
            and row[i] in t.rivals[row[k]] and t.energy[row[i]] >= t.energy[row[k]]
            for i in range(len(row))
        )
        for k in range(len(row))
    ]  # fmt: skip


def test_alone_is_what_overlaps_none_as_large(rng: np.random.Generator) -> None:
    t = maker(PROBE)(mean_snippets(CELLS, PROBE))
    assert t.energy[2] != t.energy[3]
    sample_index = np.sort(rng.integers(0, 6000, 200))
    row = rng.integers(0, 4, 200).astype(np.int32)
    alone = np.zeros(200, np.bool_)
    find_alone(sample_index, row, t, alone)
    assert alone.tolist() == naive_alone(sample_index, row, t)
    assert 20 < alone.sum() < 180


def test_a_unit_is_taught_by_its_spikes_in_turn(rng: np.random.Generator) -> None:
    """Each error, without what is too large in it, moves the mean; how alike two in a row are says how much the next one does."""
    cut = np.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], [4, 5, 6, 7, 8, 9], [4, 5, 6, 7, 8, 9]], np.int32)
    whole = np.array([mean[:, channels] for mean, channels in zip(mean_snippets(CELLS, PROBE), cut, strict=True)])
    t = maker(PROBE)(whole, None, cut)
    row = rng.integers(0, 4, 60)
    chosen = np.sort(rng.permutation(80)[:60])
    too_large = rng.uniform(0, 0.3, 60).astype(np.float32)
    snippets = rng.normal(size=(80, 6, N_WHOLE)).astype(np.float32)
    snippets[chosen] += 1.1 * whole[row].transpose(0, 2, 1)
    means, errors = whole.transpose(0, 2, 1).copy(), np.zeros((4, N_COMPARED, N_SAMPLES), np.float32)
    n_spikes, speed, news = np.array([3, 50, 0, 500]), np.full(4, 0.05), np.zeros(4)
    expected, n, rates, last = means.astype(float), n_spikes.copy(), speed.copy(), [np.zeros((6, N_WHOLE))] * 4
    heard = np.zeros(4)
    for i, u in enumerate(row.tolist()):
        template = np.zeros((6, N_WHOLE))
        used = t.channels[u][t.channels[u] >= 0]
        template[np.searchsorted(cut[u], used)] = t.centred[u][:, : len(used)].T
        error = snippets[chosen[i]] - too_large[i] * template - expected[u]
        now, before = (one[np.searchsorted(cut[u], used[:N_COMPARED]), :N_SAMPLES] for one in (error, last[u]))
        n[u] += 1
        agreement = (now * before).sum() / np.sqrt((now**2).sum() * (before**2).sum() + 1e-12)
        rates[u] = np.clip(rates[u] * np.exp(EAGERNESS * agreement), SLOWEST, FASTEST)
        expected[u] += max(rates[u], 1 / n[u]) * error
        heard[u] += max(rates[u], 1 / n[u])
        last[u] = error
    teach(snippets, chosen, row, too_large, t, (SLOWEST, FASTEST, EAGERNESS), n_spikes, speed, news, means, errors)
    np.testing.assert_allclose(means, expected, atol=1e-4)
    np.testing.assert_allclose(speed, rates, rtol=1e-4)
    np.testing.assert_allclose(news, heard, rtol=1e-4)
    np.testing.assert_array_equal(n_spikes, n)
    assert np.abs(means - whole.transpose(0, 2, 1)).max() > 0.5


def test_filters_are_scored_where_other_means_lie() -> None:
    t = maker(PROBE)(mean_snippets(CELLS, PROBE))
    filters, means = np.zeros((2, len(CELLS), N_SAMPLES, PROBE.n_channels))
    for u in range(len(CELLS)):
        used = t.channels[u][t.channels[u] >= 0]
        filters[u][:, used] = t.filters[u][:, : len(used)]
        means[u][:, used] = t.centred[u][:N_SAMPLES, : len(used)]
    expected = np.einsum("ujc,vjc->uv", filters, means)
    found = np.full((len(CELLS), len(CELLS)), np.nan)
    multiply(t, t, found)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    products = np.zeros(5)
    slide(t, 0, 1, products)
    late = [np.pad(means[1], ((2, 2), (0, 0)))[lag : lag + N_SAMPLES] for lag in range(5)]
    np.testing.assert_allclose(products, [(filters[0] * mean).sum() for mean in late], rtol=1e-4, atol=1e-3)


def test_spikes_are_compared_with_those_kept_nearby(rng: np.random.Generator) -> None:
    """Against every pair; what lies exactly at the farthest displacement counts."""
    reach, usual, across_um = 50, 24.0, 10.0
    place, kept_place = (np.round(rng.uniform(0, (30, 400), (n, 2)), 1) for n in (40, 300))
    kept_place = kept_place[np.argsort(kept_place[:, 1])]
    place[0] = kept_place[5] + [0, reach]
    place[1] = kept_place[290] - [0, reach]
    shape, kept_shape = (rng.normal(size=(n, 20)).astype(np.float32) for n in (40, 300))
    spread = rng.uniform(20, 30, 40).astype(np.float32)
    alike = np.zeros((40, 2 * reach + 1))
    compare_spikes(place, place[:, 1].copy(), shape, spread, kept_place, kept_shape, (reach, usual, across_um), alike)
    expected = np.zeros_like(alike)
    for i in range(40):
        for k in range(300):
            apart = place[i, 1] - kept_place[k, 1]
            if abs(apart) <= reach:
                excess = max(float(((shape[i] - kept_shape[k]).astype(float) ** 2).sum()) - usual, 0)
                across = (place[i, 0] - kept_place[k, 0]) / across_um
                expected[i, round(apart) + reach] += np.exp(-0.5 * excess / spread[i] - 0.5 * across**2)
    np.testing.assert_allclose(alike, expected, rtol=1e-4, atol=1e-9)
    assert alike[0, -1] > 0 and alike[1, 0] > 0
