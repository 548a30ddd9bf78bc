"""Templates as matched filters: energy is a distance, noise scores with a known variance, rows know each other."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scenes import N_BEFORE, N_SAMPLES, Cell, coloured, maker, mean_snippets, waveform, white

from streamsort.config import MatchConfig
from streamsort.probe import Probe
from streamsort.templates import N_SHIFTS, SHIFTS, TemplateMaker, Templates, delay, likeness, overlap, taper

Floats = NDArray[np.float32]
PROBE = Probe.linear(6, 20.0)
CELLS = [Cell(12.0, 12.0, 15.0), Cell(11.0, 62.0, 18.0, width=4.0), Cell(10.0, 38.0, 12.0, width=1.4)]


def covariance(channels: NDArray[np.int32]) -> NDArray[Any]:
    """Return that of the coloured noise on some channels, samples in the outer place."""
    model, time = coloured(6)
    return np.kron(time, model.space[np.ix_(channels, channels)])


@pytest.fixture
def templates() -> Templates:
    return maker(PROBE, coloured(6)[0])(mean_snippets(CELLS, PROBE))


def test_energy_is_that_of_the_whitened_template(templates: Templates) -> None:
    for unit in range(3):
        flat = templates.centred[unit].astype(float).reshape(-1)
        expected = flat @ np.linalg.solve(covariance(templates.channels[unit]), flat)
        assert templates.energy[unit] == pytest.approx(expected, rel=1e-4)


def test_a_filter_is_the_template_weighed_by_the_inverse_covariance(templates: Templates) -> None:
    for unit in range(3):
        flat = templates.centred[unit].astype(float).reshape(-1)
        expected = np.linalg.solve(covariance(templates.channels[unit]), flat).reshape(N_SAMPLES, -1)
        np.testing.assert_allclose(templates.filters[unit], expected, atol=1e-3 * np.abs(expected).max())


def test_noise_through_a_filter_has_the_energy_as_its_variance(templates: Templates, rng: np.random.Generator) -> None:
    model, time = coloured(6)
    draws = rng.normal(size=(20_000, N_SAMPLES, 6)) @ np.linalg.cholesky(model.space).T
    draws = np.einsum("st,ntc->nsc", np.linalg.cholesky(time), draws)
    for unit in range(3):
        scores = np.tensordot(draws[:, :, templates.channels[unit]], templates.filters[unit], 2)
        assert scores.var() == pytest.approx(templates.energy[unit], rel=0.05)


def test_spatial_and_temporal_factors_make_up_the_filter(templates: Templates) -> None:
    product = np.einsum("urk,urs->usk", templates.spatial, templates.temporal)
    np.testing.assert_allclose(product, templates.filters, atol=1e-4 * np.abs(product).max())


def test_a_template_is_the_tapered_mean() -> None:
    means = mean_snippets(CELLS, PROBE)
    made = maker(PROBE)(means)
    for unit in range(3):
        expected = taper(N_SAMPLES)[:, None] * means[unit][:, made.channels[unit]]
        np.testing.assert_allclose(made.centred[unit], expected, atol=1e-3)


def test_few_ranks_leave_most_of_the_noise_out(rng: np.random.Generator) -> None:
    mean = CELLS[0].at(PROBE)
    noisy = (mean + 0.5 * rng.normal(size=mean.shape)).astype(np.float32)
    error = [((templates_of(noisy, r).centred[0] - templates_of(mean, r).centred[0]) ** 2).sum() for r in (1, 3, 6)]
    assert error[0] < error[1] < error[2]
    assert error[1] < 0.8 * error[2]


def templates_of(mean: Floats, n_ranks: int, n_channels: int = 6) -> Templates:
    config = MatchConfig(n_ranks=n_ranks, n_channels=n_channels)
    one = TemplateMaker(config, PROBE, white(6), N_BEFORE)(mean[None])
    return one._replace(shifted=one.shifted[..., np.argsort(one.channels[0])])


def test_shifted_templates_are_late_by_their_shift() -> None:
    made = maker(PROBE)(mean_snippets(CELLS[:1], PROBE))
    for k in range(0, N_SHIFTS, 4):
        late = CELLS[0].at(PROBE, delay=float(SHIFTS[k]))[:, made.channels[0]]
        middle = slice(N_SAMPLES // 4, -N_SAMPLES // 4)
        np.testing.assert_allclose(made.shifted[0, k][middle], late[middle], atol=0.1)


def test_the_response_is_what_a_shifted_spike_scores(templates: Templates) -> None:
    for unit in range(3):
        for k in (0, 5, 8, 16):
            padded = np.pad(templates.shifted[unit, k], ((1, 1), (0, 0))).astype(float)
            scores = [float((padded[j : j + N_SAMPLES] * templates.filters[unit]).sum()) for j in range(3)]
            np.testing.assert_allclose(templates.response[unit, k], scores, rtol=1e-3, atol=0.05)
    np.testing.assert_allclose(templates.response[:, N_SHIFTS // 2, 1], templates.energy, rtol=1e-3)


def test_channels_are_the_largest_nearby_largest_first() -> None:
    probe = Probe.linear(24, 20.0)
    mean = Cell(10.0, 200.0, 60.0).at(probe)
    mean[:, 23] = mean[:, 9]  # large, but far away
    config = MatchConfig(n_channels=6, radius_um=120.0)
    made = TemplateMaker(config, probe, white(24), N_BEFORE)(mean[None])
    assert made.channels[0, 0] == 10 and made.channels.shape == (1, 6)
    assert 23 not in made.channels[0]
    size = np.ptp(mean[:, made.channels[0]], axis=0)
    assert (np.diff(size) <= 0).all()
    assert (np.abs(made.channels[0] - 10) * 20.0 <= 120.0).all()


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
    before = [array.copy() for array in templates[:-1]]
    one.put(templates, 1, CELLS[0].at(PROBE))
    fresh = one(mean_snippets([CELLS[0], CELLS[0], CELLS[2]], PROBE))
    for old, now, expected in zip(before, templates[:-1], fresh[:-1], strict=True):
        np.testing.assert_array_equal(now, expected)
        np.testing.assert_array_equal(now[[0, 2]], old[[0, 2]])


def test_no_units_make_no_templates() -> None:
    made = maker(PROBE)(np.zeros((0, N_SAMPLES, 6), np.float32))
    assert made.n_units == 0 and made.rivals.shape[0] == 0


def test_taper_falls_off_at_both_ends_alone() -> None:
    weights = taper(N_SAMPLES)
    np.testing.assert_allclose(weights, weights[::-1])
    assert weights.max() == 1 and 0 <= weights[0] < 0.1
    assert (weights == 1).mean() > 0.5 and weights[N_BEFORE] == 1
    assert (np.diff(weights[:N_BEFORE]) >= 0).all()


@pytest.mark.parametrize("delta", [-1.0, -0.375, 0.0, 0.25, 0.5, 1.0, 3.0])
def test_delay_moves_a_waveform_by_parts_of_a_sample(delta: float) -> None:
    np.testing.assert_allclose(delay(N_SAMPLES, delta) @ waveform(), waveform(delta), atol=0.01)


def test_delay_by_whole_samples_shifts_in_silence() -> None:
    moved = delay(8, 2.0) @ np.arange(1.0, 9.0)
    np.testing.assert_allclose(moved, [0, 0, 1, 2, 3, 4, 5, 6], atol=1e-9)


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
    cells = [*CELLS, Cell(30.0, 12.0, 15.0)]
    made = maker(PROBE)(mean_snippets(cells, PROBE))
    found = likeness(made)
    np.testing.assert_allclose(np.diag(found), 1.0, atol=1e-4)
    np.testing.assert_allclose(found, found.T)
    assert found[0, 3] == pytest.approx(1.0, abs=1e-3)  # of another size only
    flat = [
        template.astype(float)[:, np.argsort(row)].reshape(-1) for template, row in zip(made.centred, made.channels, strict=True)
    ]
    expected = flat[0] @ flat[2] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[2])
    assert found[0, 2] == pytest.approx(expected, abs=1e-3) and found[0, 2] < 0.6
    turned = maker(PROBE)(np.stack([CELLS[0].at(PROBE), -CELLS[0].at(PROBE)]))
    assert likeness(turned)[0, 1] == pytest.approx(-1.0, abs=1e-3)


def test_likeness_of_units_on_other_channels_is_none() -> None:
    probe = Probe.linear(40, 20.0)
    found = likeness(maker(probe)(mean_snippets([Cell(10.0, 0.0), Cell(10.0, 700.0)], probe)))
    np.testing.assert_allclose(found, np.eye(2), atol=1e-4)
