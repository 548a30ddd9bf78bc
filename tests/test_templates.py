"""Templates as matched filters: spikes and noise score as the energy says, whole spikes are subtracted, rows know each other."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scenes import N_BEFORE, N_SAMPLES, N_WHOLE, Cell, coloured, maker, mean_snippets, waveform, white

from streamsort.config import MatchConfig
from streamsort.probe import Probe
from streamsort.templates import N_SHIFTS, SHIFTS, TemplateMaker, Templates, delayed, likeness, overlap, taper

Floats = NDArray[np.float32]
PROBE = Probe.linear(6, 20.0)
CELLS = [Cell(12.0, 12.0, 15.0, tail=0.3), Cell(11.0, 62.0, 18.0, width=4.0), Cell(10.0, 38.0, 12.0, width=1.4)]


def covariance(channels: NDArray[np.int32]) -> NDArray[Any]:
    """Return that of the coloured noise on some channels, samples in the outer place."""
    model, time = coloured(6)
    return np.kron(time, model.space[np.ix_(channels, channels)])


@pytest.fixture
def templates() -> Templates:
    return maker(PROBE, coloured(6)[0])(mean_snippets(CELLS, PROBE))


def tapered(mean: Floats) -> Floats:
    """What a filter is made of, (N_SAMPLES, n_channels)."""
    cut: Floats = (taper(N_SAMPLES)[:, None] * mean[:N_SAMPLES]).astype(np.float32)
    return cut


def test_a_filter_is_the_tapered_mean_weighed_by_the_inverse_covariance(templates: Templates) -> None:
    for unit, mean in enumerate(mean_snippets(CELLS, PROBE)):
        whole = mean[:, templates.channels[unit]]
        flat = tapered(whole).astype(float).reshape(-1)
        expected = np.linalg.solve(covariance(templates.channels[unit]), flat)
        expected *= (expected @ whole[:N_SAMPLES].reshape(-1)) / (expected @ flat)  # makes up for what the taper takes off
        np.testing.assert_allclose(templates.filters[unit].reshape(-1), expected, atol=1e-3 * np.abs(expected).max())


def test_energy_is_nearly_all_that_any_filter_could_gain(templates: Templates) -> None:
    for unit in range(3):
        flat = templates.centred[unit, :N_SAMPLES].astype(float).reshape(-1)
        most = flat @ np.linalg.solve(covariance(templates.channels[unit]), flat)
        assert 0.97 * most < templates.energy[unit] < 1.0001 * most


@pytest.mark.parametrize("n_ranks", [1, 3])
def test_a_spikes_mean_score_is_the_variance_of_noises(n_ranks: int, rng: np.random.Generator) -> None:
    """Also where the filter holds only a part of the spike, which is of full rank."""
    model, time = coloured(6)
    bent = CELLS[0].at(PROBE) + np.roll(CELLS[1].at(PROBE), -6, axis=0)  # as if it travelled along the probe
    made = TemplateMaker(MatchConfig(n_ranks=n_ranks), PROBE, model, N_BEFORE)(np.stack([bent, *mean_snippets(CELLS, PROBE)]))
    draws = rng.normal(size=(20_000, N_SAMPLES, 6)).astype(np.float32) @ np.linalg.cholesky(model.space).T.astype(np.float32)
    draws = np.einsum("st,ntc->nsc", np.linalg.cholesky(time).astype(np.float32), draws, optimize=True)
    for unit in range(4):
        noise = np.tensordot(draws[:, :, made.channels[unit]], made.filters[unit], 2)
        spike = float((made.centred[unit, :N_SAMPLES] * made.filters[unit]).sum())
        assert noise.var() == pytest.approx(made.energy[unit], rel=0.05)
        assert (spike + noise).mean() == pytest.approx(made.energy[unit], rel=0.02)


def test_spatial_and_temporal_factors_make_up_the_filter(templates: Templates) -> None:
    product = np.einsum("urk,urs->usk", templates.spatial, templates.temporal)
    np.testing.assert_allclose(product, templates.filters, atol=1e-4 * np.abs(product).max())


def test_what_is_subtracted_is_the_whole_mean() -> None:
    """Neither cut off after the filter nor tapered nor of low rank."""
    means = mean_snippets(CELLS, PROBE) + 0.3 * np.random.default_rng(2).normal(size=(3, N_WHOLE, 6)).astype(np.float32)
    made = maker(PROBE)(means)
    assert made.shifted.shape == (3, N_SHIFTS, N_WHOLE, 6) and made.filters.shape == (3, N_SAMPLES, 6)
    for unit in range(3):
        np.testing.assert_allclose(made.centred[unit], means[unit][:, made.channels[unit]], atol=1e-4)


def test_few_ranks_leave_most_of_the_noise_out_of_the_filter(rng: np.random.Generator) -> None:
    mean = CELLS[0].at(PROBE)
    noisy = (mean + 0.5 * rng.normal(size=mean.shape)).astype(np.float32)
    error = [1 - likeness_of_filters(noisy, mean, r) for r in (1, 3, 6)]
    assert error[0] < error[1] < error[2]
    assert error[1] < 0.8 * error[2]


def likeness_of_filters(one: Floats, other: Floats, n_ranks: int) -> float:
    """Return the cosine between the filters of two means, channels in the probe's order."""
    made = TemplateMaker(MatchConfig(n_ranks=n_ranks), PROBE, white(6), N_BEFORE)(np.stack([one, other]))
    a, b = (made.filters[unit][:, np.argsort(made.channels[unit])].reshape(-1).astype(float) for unit in range(2))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_shifted_templates_are_late_by_their_shift() -> None:
    made = maker(PROBE)(mean_snippets(CELLS[:1], PROBE))
    for k in range(0, N_SHIFTS, 4):
        late = CELLS[0].at(PROBE, delay=float(SHIFTS[k]))[:, made.channels[0]]
        np.testing.assert_allclose(made.shifted[0, k], late, atol=0.05)


def test_the_response_is_what_a_shifted_spike_scores(templates: Templates) -> None:
    for unit in range(3):
        for k in (0, 5, 8, 16):
            padded = np.pad(templates.shifted[unit, k], ((1, 0), (0, 0))).astype(float)
            scores = [float((padded[j : j + N_SAMPLES] * templates.filters[unit]).sum()) for j in range(3)]
            np.testing.assert_allclose(templates.response[unit, k], scores, rtol=1e-3, atol=0.05)
    np.testing.assert_allclose(templates.response[:, N_SHIFTS // 2, 1], templates.energy, rtol=1e-3)


def test_channels_are_the_largest_nearby_largest_first() -> None:
    probe = Probe.linear(24, 20.0)
    mean = Cell(10.0, 200.0, 60.0).at(probe)
    mean[:, 23] = mean[:, 9] / 4  # larger than others that are nearer, but far away
    config = MatchConfig(n_channels=6, radius_um=120.0)
    made = TemplateMaker(config, probe, white(24), N_BEFORE)(mean[None])
    assert made.channels[0, 0] == 10 and made.channels.shape == (1, 6)
    assert 23 not in made.channels[0]
    size = np.ptp(mean[:, made.channels[0]], axis=0)
    assert (np.diff(size) <= 0).all()
    assert (np.abs(made.channels[0] - 10) * 20.0 <= 120.0).all()


def test_a_large_unit_reaches_far_away_once_many_spikes_say_so() -> None:
    """A few spikes' mean shows there what happened to be in them."""
    probe = Probe.linear(24, 20.0)
    mean = Cell(40.0, 200.0, 15.0).at(probe)
    mean[:, 23] = mean[:, 10] / 6
    for n_spikes, far in ((20, False), (2000, True)):
        made = maker(probe)(mean[None], np.array([n_spikes]))
        assert (23 in made.channels[0]) == far
        assert (made.place[0, 23] >= 0) == far and made.channels[0, 0] == 10
        size = np.ptp(mean[:, made.channels[0][made.channels[0] >= 0]], axis=0)
        assert (np.diff(size) <= 0).all()


def test_height_is_that_of_the_largest_deflection(templates: Templates) -> None:
    np.testing.assert_allclose(templates.height, [np.abs(mean).max() for mean in mean_snippets(CELLS, PROBE)])


def test_place_is_the_inverse_of_channels() -> None:
    probe = Probe(np.array([[0, 0], [0, 20], [0, 40], [0, 500], [0, 520]], float), np.zeros(5, np.int32))
    made = maker(probe)(np.stack([Cell(10.0, 20.0).at(probe), Cell(10.0, 515.0).at(probe)]))
    for unit, count in ((0, 3), (1, 2)):
        used = made.channels[unit][made.channels[unit] >= 0]
        assert len(used) == count and (made.channels[unit, count:] == -1).all()
        np.testing.assert_array_equal(made.place[unit, used], np.arange(count))
        assert (np.delete(made.place[unit], used) == -1).all()
        assert not made.filters[unit, :, count:].any() and not made.shifted[unit, :, :, count:].any()


def test_rivals_share_a_channel() -> None:
    probe = Probe.linear(40, 20.0)
    made = maker(probe)(mean_snippets([Cell(10.0, 0.0), Cell(10.0, 700.0), Cell(10.0, 130.0), Cell(10.0, 260.0)], probe))
    rivals = [set(row[row >= 0].tolist()) for row in made.rivals]
    assert rivals == [{0, 2}, {1}, {0, 2, 3}, {2, 3}]


def test_one_row_may_be_written_again_without_the_others(templates: Templates) -> None:
    one = maker(PROBE, coloured(6)[0])
    before = templates.copied()
    one.put(templates, 1, CELLS[0].at(PROBE), 10_000, templates.around[1])
    fresh = one(mean_snippets([CELLS[0], CELLS[0], CELLS[2]], PROBE))
    for name in set(templates._fields) - {"rivals", "version"}:
        now = getattr(templates, name)
        np.testing.assert_array_equal(now, getattr(fresh, name))
        np.testing.assert_array_equal(now[[0, 2]], getattr(before, name)[[0, 2]])


def test_what_a_copy_holds_already_is_not_copied(templates: Templates) -> None:
    """The row that changed alone is brought to the copy, in its own arrays."""
    made = maker(PROBE, coloured(6)[0])
    copy = templates.copied()
    copy.energy[2] = 7.0
    made.put(templates, 1, CELLS[0].at(PROBE), 10_000, templates.around[1])
    now = templates.copied(copy)
    assert now is not copy and now.shifted is copy.shifted
    np.testing.assert_array_equal(now.shifted, templates.shifted)
    np.testing.assert_array_equal(now.energy, [*templates.energy[:2], 7.0])
    more = templates.joined(made(CELLS[0].at(PROBE)[None])).copied(copy)
    assert more.n_units == 4 and more.shifted is not copy.shifted


def test_rivals_are_found_anew_for_the_rows_that_changed() -> None:
    """As if all templates were new."""
    probe = Probe.linear(40, 20.0)
    cells = [Cell(10.0, 0.0), Cell(10.0, 700.0), Cell(10.0, 130.0), Cell(10.0, 260.0)]
    one, moved = maker(probe), Cell(10.0, 620.0)
    made = one(mean_snippets(cells, probe))
    one.put(made, 2, moved.at(probe), 10_000, made.around[2])
    fresh = one(mean_snippets([*cells[:2], moved, *cells[3:]], probe)).rivals
    assert not np.array_equal(made.rivals, fresh)
    np.testing.assert_array_equal(one.related(made, [2]).rivals, fresh)


def test_no_units_make_no_templates() -> None:
    made = maker(PROBE)(np.zeros((0, N_WHOLE, 6), np.float32))
    assert made.n_units == 0 and made.rivals.shape[0] == 0


def test_taper_falls_off_at_both_ends_alone() -> None:
    weights = taper(N_SAMPLES)
    np.testing.assert_allclose(weights, weights[::-1])
    assert weights.max() == 1 and 0 <= weights[0] < 0.1
    assert (weights == 1).mean() > 0.5 and weights[N_BEFORE] == 1
    assert (np.diff(weights[:N_BEFORE]) >= 0).all()


@pytest.mark.parametrize("delta", [-1.0, -0.375, 0.0, 0.25, 0.5, 1.0, 3.0])
def test_a_delay_moves_every_channel_by_parts_of_a_sample(delta: float) -> None:
    waveforms = np.outer(waveform(), [1.0, -0.5, 0.0]).astype(np.float32)
    late = delayed(waveforms, np.array([delta]))
    assert late.dtype == np.float32
    np.testing.assert_allclose(late[0], np.outer(waveform(delta), [1.0, -0.5, 0.0]), atol=0.01)


def test_several_delays_are_what_each_of_them_is_alone() -> None:
    waveforms, by = CELLS[0].at(PROBE), np.array([-0.5, 0.0, 0.8])
    together = delayed(waveforms, by)
    np.testing.assert_allclose(together, np.concatenate([delayed(waveforms, by[k : k + 1]) for k in range(3)]), atol=1e-6)
    assert not np.allclose(together[0], together[2], atol=0.1)


def test_a_delay_by_whole_samples_shifts_in_silence() -> None:
    moved = delayed(np.arange(1.0, 9.0, dtype=np.float32)[:, None], np.array([2.0]))
    np.testing.assert_allclose(moved[0, :, 0], [0, 0, 1, 2, 3, 4, 5, 6], atol=1e-5)


def test_likeness_to_others_is_what_it_would_be_among_them(templates: Templates) -> None:
    few = templates.taken(np.array([2, 0]))
    np.testing.assert_array_equal(likeness(few, templates), likeness(templates, templates)[[2, 0]])


def test_overlap_of_a_unit_with_itself_is_its_energy(templates: Templates) -> None:
    product, lag = overlap(templates, 1, 1)
    assert lag == 0 and product == pytest.approx(templates.energy[1], rel=1e-4)


@pytest.mark.parametrize("late", [-5, 0, 4])
def test_overlap_tells_by_how_much_the_other_is_late(late: int) -> None:
    early = CELLS[0].at(PROBE)
    made = maker(PROBE)(np.stack([early, np.roll(early, late, axis=0)]))
    product, lag = overlap(made, 0, 1)
    assert lag == late and product == pytest.approx(made.energy[0], rel=0.02)


def test_overlap_on_other_channels_is_nothing() -> None:
    probe = Probe.linear(40, 20.0)
    assert overlap(maker(probe)(mean_snippets([Cell(10.0, 0.0), Cell(10.0, 700.0)], probe)), 0, 1) == (0.0, 0)


def test_likeness_is_a_cosine() -> None:
    cells = [*CELLS, replace(CELLS[0], height=30.0)]
    made = maker(PROBE)(mean_snippets(cells, PROBE))
    found = likeness(made, made)
    np.testing.assert_allclose(np.diag(found), 1.0, atol=1e-4)
    np.testing.assert_allclose(found, found.T)
    assert found[0, 3] == pytest.approx(1.0, abs=1e-3)  # of another size only
    flat = [tapered(mean).astype(float).reshape(-1) for mean in mean_snippets(cells, PROBE)]
    expected = flat[0] @ flat[2] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[2])
    assert found[0, 2] == pytest.approx(expected, abs=0.02) and found[0, 2] < 0.6
    turned = maker(PROBE)(np.stack([CELLS[0].at(PROBE), -CELLS[0].at(PROBE)]))
    assert likeness(turned, turned)[0, 1] == pytest.approx(-1.0, abs=1e-3)


def test_likeness_of_units_on_other_channels_is_none() -> None:
    probe = Probe.linear(40, 20.0)
    made = maker(probe)(mean_snippets([Cell(10.0, 0.0), Cell(10.0, 700.0)], probe))
    found = likeness(made, made)
    np.testing.assert_allclose(found, np.eye(2), atol=1e-4)
