"""Templates follow their units, and nothing else: no neighbour, no selection, no creeping in time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scenes import CONFIG, N_BEFORE, N_SAMPLES, N_WHOLE, RATE, Cell, Event, add_spikes, maker, mean_snippets

from streamsort.bank import Bank
from streamsort.kernels.match import amplitude_of, gain_of
from streamsort.match import MATCH_DTYPE, Match, join_settled
from streamsort.probe import Probe

Floats = NDArray[np.float32]

PROBE = Probe.linear(8, 20.0)
CELLS = [Cell(12.0, 32.0, 15.0), Cell(11.0, 82.0, 18.0, width=4.0), Cell(10.0, 58.0, 12.0, width=1.4)]
PERIOD_S = 0.25


def bank_of(cells: Sequence[Cell], n_spikes: int = 200, rate_hz: float = 5.0, probe: Probe = PROBE) -> Bank:
    n = len(cells)
    return Bank(maker(probe), mean_snippets(cells, probe), np.full(n, n_spikes), np.full(n, rate_hz), RATE)


def matched(bank: Bank, rows: Sequence[int], snippets: Floats, apart: int = 1000) -> NDArray[Any]:
    """Return what matching would say of spikes that lie exactly where their templates do, so many samples apart."""
    matches = np.zeros(len(rows), MATCH_DTYPE)
    matches["row"], matches["sample_index"] = rows, apart * np.arange(len(rows))
    t = bank.templates
    for match, row, snippet in zip(matches, rows, snippets, strict=True):
        channels = t.channels[row][t.channels[row] >= 0]
        score = np.float32((snippet[:N_SAMPLES, channels] * t.filters[row][:, : len(channels)]).sum())
        match["amplitude"] = amplitude_of(score, t.energy[row], t.tightness[row])
        match["gain"] = gain_of(score, t.energy[row], t.tightness[row])
    return matches


def noisy(mean: Floats, n: int, rng: np.random.Generator, spread: float = 0.05) -> Floats:
    """Draw spikes: the mean, a little larger or smaller, in noise of variance 1."""
    amplitude = rng.normal(1, spread, (n, 1, 1))
    spikes: Floats = (amplitude * mean + rng.normal(size=(n, *mean.shape))).astype(np.float32)
    return spikes


def learned(bank: Bank, matches: NDArray[Any], snippets: Floats) -> bool:
    """Let a bank learn from spikes cut where their units are known, which is everywhere."""
    return bank.learn(matches, snippets.transpose(0, 2, 1).copy(), bank.templates.around[matches["row"]], PERIOD_S)


def taught(bank: Bank, row: int, snippets: Floats, per_period: int = 2) -> None:
    """Let a row learn, a few spikes a period."""
    for k in range(0, len(snippets), per_period):
        part = snippets[k : k + per_period].copy()
        learned(bank, matched(bank, [row] * len(part), part), part)


def off(found: Floats, true: Floats) -> float:
    """Return by how much two waveforms differ where they are matched, as a part of the power of the second."""
    return float(((found - true)[:N_SAMPLES] ** 2).sum() / (true[:N_SAMPLES] ** 2).sum())


def rows_of(bank: Bank, rows: Sequence[int]) -> list[bytes]:
    t = bank.templates
    return [t.channels[rows].tobytes(), t.filters[rows].tobytes(), t.energy[rows].tobytes(), bank.means[rows].tobytes()]


def test_a_moving_unit_is_followed(rng: np.random.Generator) -> None:
    """It moves by a channel within 600 spikes; the template stays with it all the way, and arrives on the other channel."""
    bank = bank_of(CELLS)
    start, arrived = CELLS[0].at(PROBE), Cell(12.0, 52.0, 15.0).at(PROBE)
    for y_um in np.linspace(32, 52, 300):
        here = Cell(12.0, float(y_um), 15.0).at(PROBE)
        taught(bank, 0, noisy(here, 2, rng))
        assert off(bank.mean(0), here) < 0.25
    taught(bank, 0, noisy(arrived, 40, rng))
    assert off(bank.mean(0), arrived) < 0.1 < off(bank.mean(0), start)
    assert bank.templates.channels[0, 0] == np.ptp(arrived, axis=0).argmax() != np.ptp(start, axis=0).argmax()


def test_a_unit_that_shrinks_is_followed(rng: np.random.Generator) -> None:
    bank, mean = bank_of(CELLS), CELLS[1].at(PROBE)
    for size in np.linspace(1, 0.6, 400):
        taught(bank, 1, noisy(np.float32(size) * mean, 2, rng))
    assert off(bank.mean(1), np.float32(0.6) * mean) < 0.1 < off(bank.mean(1), mean)


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_how_much_sizes_vary_is_learned_and_taken_as_usual_after_a_jump(spread: float, rng: np.random.Generator) -> None:
    bank, near = bank_of(CELLS), PROBE.neighbors(1000.0)
    usual = bank.templates.tightness[0]
    assert usual == pytest.approx(CONFIG.amplitude_spread**-2)
    taught(bank, 0, noisy(CELLS[0].at(PROBE), 900, rng, spread), per_period=7)
    assert bank.templates.tightness[0] ** -0.5 == pytest.approx(max(spread, 0.06), rel=0.15)
    assert bank.templates.tightness[1] == usual
    bank.jump(np.full(3, 5.0), near, PROBE.channel_locations)
    assert (bank.templates.tightness == usual).all()


def test_a_tail_is_learned_though_it_is_not_matched(rng: np.random.Generator) -> None:
    bank, tailed = bank_of(CELLS), replace(CELLS[0], tail=0.3).at(PROBE)
    taught(bank, 0, noisy(tailed, 600, rng))
    learned, true = bank.templates.centred[0][N_SAMPLES:], tailed[N_SAMPLES:, bank.templates.channels[0]]
    assert float((learned * true).sum() / (true * true).sum()) == pytest.approx(1.0, abs=0.15)


def test_a_neighbours_spikes_teach_nothing(rng: np.random.Generator) -> None:
    bank = bank_of(CELLS)
    before = bank.means.copy()
    foreign = noisy(CELLS[2].at(PROBE), 200, rng)
    assert (matched(bank, [0] * 200, foreign)["gain"] < 0.5 * bank.templates.energy[0]).all()
    taught(bank, 0, foreign)
    np.testing.assert_array_equal(bank.means, before)


@pytest.mark.parametrize("larger_first", [False, True])
def test_a_spike_beside_a_larger_one_teaches_nothing(larger_first: bool, rng: np.random.Generator) -> None:
    """What is left of the larger one would be learned; the larger one learns all the same."""
    bank = bank_of(CELLS)
    small, large = np.argsort(bank.templates.energy)[[0, -1]].tolist()
    rows = [large, small] if larger_first else [small, large]
    spikes = np.concatenate([noisy(CELLS[row].at(PROBE), 1, rng) for row in rows])
    before = bank.means.copy()
    learned(bank, matched(bank, rows, spikes, apart=30), spikes)
    assert [(bank.means[row] != before[row]).any() for row in (small, large)] == [False, True]
    learned(bank, matched(bank, rows, spikes, apart=200), spikes)
    assert (bank.means[small] != before[small]).any()


def test_what_is_hardly_more_its_own_than_its_neighbours_teaches_nothing(rng: np.random.Generator) -> None:
    bank, spikes = bank_of(CELLS), noisy(CELLS[0].at(PROBE), 2, rng)
    before = bank.means.copy()
    for short_of_runner_up, learns in [(15.0, False), (17.0, True)]:
        matches = matched(bank, [0, 0], spikes, apart=200)
        matches["runner_up"] = matches["gain"] - short_of_runner_up
        learned(bank, matches, spikes)
        assert (bank.means != before).any() == learns


@pytest.mark.parametrize(("size", "rival", "teaches"), [(1.0, 0.9, True), (1.5, 0.9, False), (1.5, 0.1, True)])
def test_a_spike_too_large_that_fits_another_teaches_nothing(size: float, rival: float, teaches: bool) -> None:
    """After a step a large unit may fit a small neighbour better than its own template, which must not follow it."""
    bank = bank_of(CELLS)
    before, spike = bank.means.copy(), np.float32(size) * CELLS[0].at(PROBE)[None]
    match = matched(bank, [0], spike)
    match["runner_up"] = rival * match["gain"]
    learned(bank, match, spike + np.float32(0.1))
    assert (bank.means != before).any() == teaches


def test_spikes_at_once_on_other_channels_teach(rng: np.random.Generator) -> None:
    probe = Probe.linear(64, 20.0)
    cells = [Cell(12.0, 100.0, 15.0), Cell(14.0, 1100.0, 15.0)]
    bank = bank_of(cells, probe=probe)
    before = bank.means.copy()
    spikes = np.concatenate([noisy(cell.at(probe), 1, rng) for cell in cells])
    learned(bank, matched(bank, [0, 1], spikes, apart=5), spikes)
    assert (bank.means != before).any(axis=(1, 2)).all()


def test_each_unit_learns_at_its_own_speed(rng: np.random.Generator) -> None:
    """One moves 20 um within 100 spikes and is kept up with; the other stays and is averaged over more spikes than that."""
    bank, still = bank_of(CELLS, n_spikes=20), CELLS[1].at(PROBE)
    for y_um in np.linspace(32, 52, 50):
        here = Cell(12.0, float(y_um), 15.0).at(PROBE)
        taught(bank, 0, noisy(here, 2, rng))
        taught(bank, 1, noisy(still, 2, rng))
        assert off(bank.mean(0), here) < 0.25
    spikes = noisy(still, 100, rng)
    one = float(np.mean([off(spike, still) for spike in spikes]))
    taught(bank, 1, spikes)
    assert off(bank.mean(1), still) < one / 50


@pytest.mark.parametrize(("energy", "rate_hz"), [(22.0, 5.0), (30.0, 1.0), (45.0, 5.0)])
def test_a_weak_unit_does_not_grow_by_selection(energy: float, rate_hz: float, rng: np.random.Generator) -> None:
    """Only its larger spikes are found; were they taken as they are, the template would grow until it finds none."""
    mean = Cell(1.0, 70.0, 40.0, width=2.5).at(PROBE)
    mean *= np.float32(np.sqrt(energy / maker(PROBE)(mean[None]).energy[0]))
    bank = Bank(maker(PROBE), mean[None], np.full(1, 200), np.full(1, rate_hz), RATE)
    naive = mean.copy()
    n_passed, energies = 0, []
    for _ in range(250):
        snippets = noisy(mean, 20, rng)
        matches = matched(bank, [0] * 20, snippets)
        passed = matches["gain"] > bank.threshold[0]
        n_passed += int(passed.sum())
        naive += (snippets[passed] - naive).sum(axis=0) / np.float32(200)
        bank.rates_hz[:] = rate_hz
        learned(bank, matches[passed], snippets[passed])
        energies.append(float(bank.templates.energy[0]))
    assert n_passed > 500
    assert np.mean(energies[100:]) == pytest.approx(energy, rel=0.10)
    assert energies[-1] == pytest.approx(energy, rel=0.15)
    if energy < 25:  # the test can fail
        assert maker(PROBE)(naive[None]).energy[0] > 1.15 * energy


def test_templates_do_not_creep_in_time() -> None:
    """Spikes are aligned to their template and it to them: thousands of spikes must not carry both away."""
    probe = Probe.linear(4, 20.0)
    cells = [Cell(9.0, 20.0, 18.0, width=2.6)]
    rng = np.random.default_rng(5)
    bank, match = bank_of(cells, probe=probe, rate_hz=20.0), Match(CONFIG, 4, RATE)
    n_period = round(PERIOD_S * RATE)
    errors = []
    for k in range(240):
        traces = rng.normal(size=(n_period, 4)).astype(np.float32)
        at = np.arange(1, 16) * 460 + rng.integers(0, 100, 15)
        add_spikes(traces, cells, probe, [Event(0, int(s), float(rng.uniform(-0.5, 0.5)), rng.normal(1, 0.1)) for s in at])
        match.use(bank.templates, bank.threshold)
        found = match(traces)["sample_index"] - k * n_period
        nearest = np.abs(found[:, None] - at).argmin(axis=1)
        errors.append((found - at[nearest])[np.abs(found - at[nearest]) < 15])
        bank.learn(*match.settled(), PERIOD_S)
    assert sum(len(part) for part in errors) > 0.97 * 240 * 15
    early, late = np.concatenate(errors[:20]), np.concatenate(errors[-20:])
    assert abs(late.mean() - early.mean()) < 0.5
    assert np.abs(late).max() <= 2


def test_a_template_out_of_place_is_brought_back(rng: np.random.Generator) -> None:
    """Six samples late, it returns sample by sample, and the other channels with it."""
    bank = bank_of(CELLS)
    late = np.roll(CELLS[0].at(PROBE), 6, axis=0)
    bank.reset(0, late, 200)
    for _ in range(40):
        taught(bank, 0, bank.mean(0) + rng.normal(size=(8, *late.shape)).astype(np.float32))
    waveform = bank.mean(0)[:, 2]
    assert abs(int(waveform.argmin()) - N_BEFORE) <= 3


def test_firing_rates_follow_and_set_the_threshold() -> None:
    bank = bank_of(CELLS, rate_hz=5.0)
    before = bank.threshold.copy()
    for _ in range(400):
        bank.learn(*join_settled([]), PERIOD_S)
    assert (bank.rates_hz < 1.5).all() and (bank.threshold > before).all()
    np.testing.assert_allclose(bank_of(CELLS, rate_hz=3.0).threshold, 2 * np.log(RATE / 3.0), rtol=1e-5)
    assert (bank_of(CELLS, rate_hz=1e-9).threshold < 30).all() and (bank_of(CELLS, rate_hz=1e9).threshold > 10).all()


def test_a_boundary_without_news_changes_nothing() -> None:
    bank = bank_of(CELLS)
    templates = bank.templates
    assert not bank.learn(*join_settled([]), PERIOD_S)
    assert bank.templates is templates and bank.remade == []


def test_templates_with_most_news_come_first_and_the_others_later(rng: np.random.Generator) -> None:
    probe = Probe.linear(64, 20.0)
    cells = [Cell(12.0, 50.0 + 100 * k, 15.0) for k in range(12)]
    bank = bank_of(cells, probe=probe, n_spikes=10)
    snippets = np.concatenate([noisy(cell.at(probe), 1 + (k == 7), rng) for k, cell in enumerate(cells)])
    rows = np.repeat(np.arange(12), [1 + (k == 7) for k in range(12)]).tolist()
    assert learned(bank, matched(bank, rows, snippets), snippets)
    first = list(bank.remade)
    assert first[0] == 7 and 0 < len(first) < 12
    assert bank.remake(100)
    assert sorted([*first, *bank.remade]) == list(range(12))
    for row in range(12):
        assert off(bank.templates.centred[row][:, 0], bank.mean(row)[:, bank.templates.channels[row, 0]]) < 0.1


def test_a_unit_more_leaves_the_others_as_they_are() -> None:
    bank = bank_of(CELLS[:2])
    before = rows_of(bank, [0, 1])
    bank.add(CELLS[2].at(PROBE), 20, 2.0)
    assert len(bank) == 3 and rows_of(bank, [0, 1]) == before
    assert rows_of(bank, [2]) == rows_of(bank_of(CELLS), [2])
    assert bank.n_spikes.tolist() == [200, 200, 20] and bank.rates_hz.tolist() == [5.0, 5.0, 2.0]
    assert 2 in bank.templates.rivals[0]


def test_the_first_unit_may_come_to_an_empty_bank() -> None:
    bank = bank_of([])
    assert len(bank) == 0 and len(bank.threshold) == 0
    bank.add(CELLS[0].at(PROBE), 20, 2.0)
    assert rows_of(bank, [0]) == rows_of(bank_of(CELLS[:1]), [0])


def test_a_unit_given_another_mean_keeps_its_row_and_the_others_theirs() -> None:
    bank = bank_of(CELLS)
    before, other = rows_of(bank, [0, 2]), Cell(9.0, 140.0)
    bank.reset(1, other.at(PROBE), 8)
    assert rows_of(bank, [0, 2]) == before
    assert bank.templates.channels[1, 0] == 7 and bank.n_spikes.tolist() == [200, 8, 200]


def test_kept_rows_are_as_they_were_in_the_order_asked_for() -> None:
    bank = bank_of(CELLS)
    bank.rates_hz[:] = 1.0, 2.0, 3.0
    one, other = rows_of(bank, [2]), rows_of(bank, [0])
    bank.keep([2, 0])
    assert [rows_of(bank, [0]), rows_of(bank, [1])] == [one, other]
    assert bank.rates_hz.tolist() == [3.0, 1.0]


NEAR = PROBE.neighbors(CONFIG.radius_um)


def test_a_jump_by_the_pitch_moves_all_units_by_a_channel_at_once() -> None:
    bank = bank_of(CELLS)
    home = bank.templates.channels[:, 0].copy()
    bank.jump(np.array([20.0, -20.0, 0.0]), NEAR, PROBE.channel_locations)
    np.testing.assert_array_equal(bank.templates.channels[:, 0] - home, [1, -1, 0])
    assert off(bank.mean(0), Cell(12.0, 52.0, 15.0).at(PROBE)) < 0.1
    assert off(bank.mean(1), Cell(11.0, 62.0, 18.0, width=4.0).at(PROBE)) < 0.1
    np.testing.assert_array_equal(bank.mean(2), mean_snippets(CELLS, PROBE)[2])
    assert sorted(bank.remade) == [0, 1]


def test_units_without_spikes_move_with_the_tissue() -> None:
    bank = bank_of(CELLS)
    for _ in range(40):
        bank.move(np.full(3, 0.5), NEAR, PROBE.channel_locations)
        bank.learn(*join_settled([]), PERIOD_S)
    moved = Cell(12.0, 52.0, 15.0).at(PROBE)
    assert off(bank.mean(0), moved) < 0.15 < off(CELLS[0].at(PROBE), moved)
    assert off(bank.templates.centred[0], moved[:, bank.templates.channels[0]]) < 0.15


def test_a_displacement_that_trembles_moves_nothing() -> None:
    bank, before = bank_of(CELLS), mean_snippets(CELLS, PROBE)
    for by in (0.8, -0.7, 0.6, -0.9):
        bank.move(np.full(3, by), NEAR, PROBE.channel_locations)
    np.testing.assert_array_equal([bank.mean(row) for row in range(3)], before)


def test_a_silent_unit_that_returns_to_its_place_is_what_it_was(rng: np.random.Generator) -> None:
    """However often it was moved meanwhile."""
    bank, before = bank_of(CELLS), mean_snippets(CELLS, PROBE)
    place_um = np.concatenate([np.cumsum(rng.normal(0.0, 2.0, 500)), [0.0]])
    for by in np.diff(place_um, prepend=0.0):
        bank.move(np.full(3, by), NEAR, PROBE.channel_locations)
    assert max(off(bank.mean(row), was) for row, was in enumerate(before)) < 0.005


def test_after_a_jump_a_spike_counts_for_more() -> None:
    """The interpolated template counts for little against what is seen there."""
    moved, calm = bank_of(CELLS), bank_of(CELLS)
    moved.jump(np.zeros(3), NEAR, PROBE.channel_locations)
    seen = np.float32(0.85) * CELLS[0].at(PROBE)
    for bank in (moved, calm):
        taught(bank, 0, seen[None])
    assert 1.1 * off(moved.mean(0), seen) < off(calm.mean(0), seen)


def test_what_is_taught_is_not_changed(rng: np.random.Generator) -> None:
    bank, spikes = bank_of(CELLS), noisy(CELLS[0].at(PROBE), 2, rng)
    before = spikes.copy()
    learned(bank, matched(bank, [0, 0], spikes), spikes)
    np.testing.assert_array_equal(spikes, before)


# Two units, and what they are after a jump by a channel: the first unlike what it was moved to, the second just that.
TWINS = [Cell(15.0, 50.0, 15.0), Cell(12.0, 62.0, 15.0)]
UNLIKE, AS_MOVED = Cell(12.0, 76.0, 30.0).at(PROBE), Cell(12.0, 82.0, 15.0).at(PROBE)


@pytest.mark.parametrize(
    ("learned", "after_s", "exchanged"),
    [((AS_MOVED, UNLIKE), 1.0, True), ((UNLIKE, AS_MOVED), 1.0, False), ((AS_MOVED, UNLIKE), 60.0, False)],
    ids=["others' places", "own places", "long after"],
)
def test_units_that_took_each_others_places_after_a_jump_get_their_own(
    learned: tuple[Floats, Floats], after_s: float, exchanged: bool
) -> None:
    bank = bank_of(TWINS)
    bank.jump(np.full(2, 20.0), NEAR, PROBE.channel_locations)
    bank.learn(*join_settled([]), after_s)
    for row, mean in enumerate(learned):
        bank.reset(row, mean, 50)
    for _ in range(3):  # once, not to and fro
        bank.learn(*join_settled([]), PERIOD_S)
        np.testing.assert_array_equal([bank.mean(row) for row in range(2)], learned[::-1] if exchanged else learned)
    for row in range(2):
        np.testing.assert_allclose(bank.templates.centred[row], bank.mean(row)[:, bank.templates.channels[row]], atol=1e-3)


# A large probe, on which units are known near them alone.
LONG = Probe.linear(160, 20.0)
N_KNOWN = 64


def test_on_a_large_probe_a_unit_is_known_around_it(rng: np.random.Generator) -> None:
    """However large the probe is; what it learns there is as on a small one."""
    bank, small = bank_of([Cell(12.0, 1600.0, 15.0)], probe=LONG), bank_of([Cell(12.0, 80.0, 15.0)])
    assert bank.means.shape == (1, N_KNOWN, N_WHOLE)
    np.testing.assert_array_equal(bank.mean(0)[:, 76:84], small.mean(0))
    seen = 0.9 * bank.mean(0) + rng.normal(size=(4, N_WHOLE, LONG.n_channels)).astype(np.float32)
    taught(small, 0, seen[:, :, 76:84])
    cut = seen[:, :, bank.templates.around[0]].transpose(0, 2, 1).copy()
    matches = matched(small, [0] * 4, seen[:, :, 76:84])
    for k in (0, 2):
        bank.learn(matches[k : k + 2], cut[k : k + 2], np.repeat(bank.templates.around, 2, axis=0), PERIOD_S)
    np.testing.assert_allclose(bank.mean(0)[:, 76:84], small.mean(0), atol=0.05)
    assert off(bank.mean(0), Cell(12.0, 1600.0, 15.0).at(LONG)) > 0.005


def test_where_a_unit_is_known_follows_it() -> None:
    """It stays where it is while all that is near the unit is known; spikes that were cut elsewhere teach nothing."""
    bank = bank_of([Cell(12.0, 1600.0, 15.0)], probe=LONG)
    near, start = LONG.neighbors(CONFIG.radius_um), bank.templates.around[0].copy()
    match = np.zeros(1, MATCH_DTYPE)
    match["gain"], match["amplitude"] = 1e4, 1
    for y_um in np.arange(1620, 2420, 20):
        bank.jump(np.full(1, 20.0), near, LONG.channel_locations)
        here, around = Cell(12.0, float(y_um), 15.0).at(LONG), bank.templates.around
        assert off(bank.mean(0), here) < 0.1
        assert (y_um <= 1600 + 20 * (N_KNOWN // 2 - 7)) == (around[0] == start).all()
        bank.learn(match, here.T[around], around, PERIOD_S)
    before = bank.means.copy()
    bank.learn(match, before + np.float32(1), start[None], PERIOD_S)
    np.testing.assert_array_equal(bank.means, before)
    bank.learn(match, before + np.float32(1), bank.templates.around, PERIOD_S)
    assert (bank.means != before).any()
