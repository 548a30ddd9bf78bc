"""The bank of units and the spikes drawn from it."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from streamsort.train.augment import SLACK, Draw  # noqa: E402
from streamsort.train.data import MARGIN, N_BEFORE, N_NEAR, N_NEIGHBORS, N_PHASES, N_SAMPLES, SEEN, TROUGH, Bank, make_bank  # noqa: E402


@pytest.fixture(scope="module")
def bank() -> Bank:
    return make_bank((5,), 12, n_units=4)


def drawn(bank: Bank, n: int, collision: float = 0.0, seed: int = 0, place: int = 0):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    sites = torch.arange(12).repeat_interleave(n)
    draw = Draw.of(bank, collision)
    return draw.spikes(generator, sites, torch.zeros_like(sites), torch.full_like(sites, place))


def test_bank_has_the_shapes_it_states_and_is_finite(bank: Bank) -> None:
    assert bank.templates.shape == (12, 4, 2, N_PHASES, N_SAMPLES + 2 * MARGIN, N_NEAR)
    assert bank.neighbors.shape == (12, N_NEAR, N_NEIGHBORS)
    assert all(np.isfinite(array).all() for array in vars(bank).values())


def test_equal_seeds_give_equal_banks_and_others_do_not(bank: Bank) -> None:
    again, other = make_bank((5,), 12, n_units=4), make_bank((6,), 12, n_units=4)
    assert all((getattr(again, name) == array).all() for name, array in vars(bank).items())
    assert not np.array_equal(other.templates, bank.templates)


def test_trough_is_where_it_is_said_and_of_the_size_asked_for(bank: Bank) -> None:
    first = bank.templates[:, :, 0, 0]
    depth = -first.min(axis=(2, 3))
    assert (first.min(axis=3).argmin(axis=2) == TROUGH).all()
    assert (depth > SEEN[0] - 0.1).all() and (depth < 25.1).all()
    moved = -bank.templates[:, :, 1, 0, TROUGH].min(axis=-1)
    assert (moved > SEEN[0] - 0.1).all() and (moved < SEEN[1] + 0.1).all()


def test_a_place_is_a_displacement_of_the_whole_patch(bank: Bank) -> None:
    still = make_bank((5,), 12, n_units=4, drift_um=0.0)
    np.testing.assert_allclose(still.templates[:, :, 1], still.templates[:, :, 0], atol=1e-5)
    np.testing.assert_allclose(still.templates[:, :, 0], bank.templates[:, :, 0], atol=1e-5)
    assert np.abs(bank.templates[:, :, 1] - bank.templates[:, :, 0]).max() > 1.0


def test_neighbors_start_with_the_contact_itself_and_stay_in_the_patch(bank: Bank) -> None:
    exists = bank.neighbors[:, :, 0] >= 0
    own = np.broadcast_to(np.arange(N_NEAR), exists.shape)
    assert (bank.neighbors[:, :, 0][exists] == own[exists]).all()
    assert bank.neighbors.max() < N_NEAR and bank.neighbors.min() == -1
    silent = (bank.templates == 0).all(axis=(1, 2, 3, 4))
    assert not (silent & exists).any()


def test_noise_has_unit_variance_where_there_is_a_contact(bank: Bank) -> None:
    spikes = drawn(bank, 400)
    around = (spikes.snippets - spikes.clean)[:, :8].reshape(12, 400 * 8, N_NEIGHBORS)
    present = (spikes.snippets != 0).any(dim=1).reshape(12, 400, N_NEIGHBORS).all(dim=1)
    deviation = around.std(dim=1)[present]
    assert present.any() and abs(float(deviation.median()) - 1) < 0.1
    assert (around.std(dim=1)[~(spikes.snippets != 0).any(dim=1).reshape(12, 400, N_NEIGHBORS).any(dim=1)] == 0).all()


def test_every_snippet_has_its_deepest_sample_at_the_trough(bank: Bank) -> None:
    snippets = drawn(bank, 50).snippets
    near = snippets[:, N_BEFORE - SLACK // 2 : N_BEFORE + SLACK // 2 + 1, 0]
    assert float((near.argmin(dim=1) == SLACK // 2).float().mean()) > 0.95


def test_noise_moves_the_peak_to_another_channel_as_in_life() -> None:
    bank = make_bank((7,), 24, n_units=2, snr=(4.0, 4.5))
    generator = torch.Generator().manual_seed(0)
    site = int(np.argmax((bank.templates[:, 0, 0, 0, TROUGH] < -3.0).sum(axis=-1)))  # heard on several contacts
    sites = torch.full((200,), site)
    clean = Draw.of(bank, 0.0).spikes(generator, sites, torch.zeros_like(sites), torch.zeros_like(sites)).clean
    assert len(torch.unique(clean[:, N_BEFORE, 0])) > 1


def test_collisions_add_a_spike_and_only_to_the_share_asked_for(bank: Bank) -> None:
    def spread(collision: float) -> float:
        spikes = drawn(bank, 200, collision)
        return float((spikes.snippets - spikes.clean).square().mean())

    assert spread(0.0) < spread(0.5) < spread(1.0)


def test_equal_generators_draw_equal_pairs_of_different_spikes(bank: Bank) -> None:
    draw = Draw.of(bank, 0.3)
    one, two = draw.pairs(torch.Generator().manual_seed(3), 6)
    again, _ = draw.pairs(torch.Generator().manual_seed(3), 6)
    assert one.snippets.shape == (24, N_SAMPLES, N_NEIGHBORS)
    assert torch.equal(one.snippets, again.snippets)
    assert not torch.equal(one.snippets, two.snippets)


@pytest.mark.parametrize("n_samples", [39, 63, 96])
def test_other_windows_are_cut_from_the_same_spikes(bank: Bank, n_samples: int) -> None:
    other = make_bank((5,), 12, n_units=4, n_samples=n_samples)
    rows = min(n_samples, N_SAMPLES) + MARGIN
    np.testing.assert_allclose(other.templates[..., :rows, :], bank.templates[..., :rows, :], atol=1e-3)
