"""Templates move with the tissue: interpolated where a unit was never seen, remembered where it was."""

import numpy as np
import pytest
from numpy.typing import NDArray

from streamsort.footprints import Footprints, move_templates
from streamsort.neurons import draw_units, templates_at
from streamsort.probe import Probe
from streamsort.simulate import named_probe

Floats = NDArray[np.float32]
RATE, N_UNITS, N_NEIGHBORS = 30_000.0, 12, 16


class Tissue:
    def __init__(self, probe_name: str = "neuropixels64", n_units: int = N_UNITS) -> None:
        self.probe = named_probe(probe_name)
        self.units = draw_units(n_units, self.probe, RATE, 1, (6.0, 15.0), 1.0, (15.0, 25.0))
        home = np.ptp(templates_at(self.units, self.probe), axis=1).argmax(axis=1)
        self.channels = self.probe.neighbors(150.0, min(N_NEIGHBORS, self.probe.n_channels))[home]

    def at(self, displacement_um: float) -> Floats:
        wave = templates_at(self.units, self.probe, displacement_um)
        near: Floats = np.take_along_axis(wave, np.maximum(self.channels, 0)[:, None], axis=2) * (self.channels >= 0)[:, None]
        return near


@pytest.fixture(scope="module")
def tissue() -> Tissue:
    return Tissue()


def residual(found: Floats, true: Floats) -> float:
    return float((np.square(found - true).sum(axis=(1, 2)) / np.square(true).sum(axis=(1, 2))).mean())


def moved_by(tissue: Tissue, mean: Floats, by_um: float) -> Floats:
    return move_templates(mean, tissue.channels, tissue.probe.channel_locations, np.full(len(mean), by_um))


def test_not_moving_changes_little(tissue: Tissue) -> None:
    assert residual(moved_by(tissue, tissue.at(0), 0.0), tissue.at(0)) < 0.005


@pytest.mark.parametrize("by_um", [-20.0, -10.0, 10.0, 20.0])
def test_a_moved_template_is_what_the_moved_unit_looks_like(tissue: Tissue, by_um: float) -> None:
    still, true = tissue.at(0), tissue.at(by_um)
    assert residual(moved_by(tissue, still, by_um), true) < 0.4 * residual(still, true)


def test_moving_by_the_pitch_moves_by_a_channel() -> None:
    locations = Probe.linear(8, 20.0).channel_locations
    channels = np.arange(8, dtype=np.int32)[None]
    mean = np.zeros((1, 3, 8), np.float32)
    mean[0, :, 3] = [1, -8, 2]
    moved = move_templates(mean, channels, locations, np.array([20.0]))
    np.testing.assert_allclose(moved[0, :, 4], mean[0, :, 3], rtol=0.05)
    assert np.abs(np.delete(moved[0], 4, axis=1)).max() < 0.3


def test_each_template_moves_by_its_own(tissue: Tissue) -> None:
    by_um = np.linspace(-20, 20, N_UNITS)
    together = move_templates(tissue.at(0), tissue.channels, tissue.probe.channel_locations, by_um)
    one = slice(3, 4)
    alone = move_templates(tissue.at(0)[one], tissue.channels[one], tissue.probe.channel_locations, by_um[one])
    np.testing.assert_allclose(together[one], alone, atol=1e-5)


def test_what_left_the_probe_is_gone(tissue: Tissue) -> None:
    assert np.abs(moved_by(tissue, tissue.at(0), 1000.0)).max() < 1e-3


def test_other_channels_may_be_asked_for(tissue: Tissue) -> None:
    target = tissue.channels[:, ::-1].copy()
    target[:, 0] = -1
    whole = moved_by(tissue, tissue.at(0), 7.0)
    asked = move_templates(tissue.at(0), tissue.channels, tissue.probe.channel_locations, np.full(N_UNITS, 7.0), target)
    np.testing.assert_allclose(asked[:, :, 1:], whole[:, :, ::-1][:, :, 1:], atol=1e-5)
    assert not asked[:, :, 0].any()


def test_missing_channels_have_no_say(tissue: Tissue) -> None:
    channels, mean = tissue.channels.copy(), tissue.at(0)
    channels[:, 12:], loud = -1, mean.copy()
    loud[:, :, 12:] = 99.0
    by_um = np.full(N_UNITS, 5.0)
    lacking = move_templates(loud, channels, tissue.probe.channel_locations, by_um)
    cut = move_templates(mean[:, :, :12], channels[:, :12], tissue.probe.channel_locations, by_um)
    np.testing.assert_allclose(lacking[:, :, :12], cut, atol=1e-5)
    assert not lacking[:, :, 12:].any()


def taught(tissue: Tissue, displacements_um: list[float], n_spikes: int = 40, noise: float = 1.0) -> Footprints:
    """Show every unit at these displacements, the first one as its calibration."""
    rng = np.random.default_rng(0)
    first = tissue.at(displacements_um[0])
    footprints = Footprints(tissue.probe.channel_locations, *first.shape[1:])
    for mean, channels in zip(first, tissue.channels, strict=True):
        footprints.add(channels, mean, n_spikes, displacements_um[0])
    for at_um in displacements_um[1:]:
        unit = np.repeat(np.arange(len(first)), n_spikes)
        snippets = tissue.at(at_um)[unit]
        noisy = (snippets + noise * rng.normal(size=snippets.shape)).astype(np.float32)
        footprints.learn(unit, noisy, np.full(len(unit), at_um))
    return footprints


def test_a_new_unit_is_known_where_it_was_seen_and_moved_elsewhere(tissue: Tissue) -> None:
    footprints, every = taught(tissue, [0.0]), np.arange(N_UNITS)
    np.testing.assert_allclose(footprints.templates(every, np.full(N_UNITS, 12.0)), moved_by(tissue, tissue.at(0), 12.0), atol=1e-5)
    assert residual(footprints.templates(every, np.zeros(N_UNITS)), tissue.at(0)) < 0.005


def test_a_unit_that_returns_is_known_there(tissue: Tissue) -> None:
    footprints, every = taught(tissue, [0.0, 18.0, -18.0]), np.arange(N_UNITS)
    moved, found = moved_by(tissue, tissue.at(0), 18.0), footprints.templates(every, np.full(N_UNITS, 18.0))
    assert residual(found, tissue.at(18.0)) < 0.5 * residual(moved, tissue.at(18.0))


def test_places_seen_on_either_side_tell_of_those_between(tissue: Tissue) -> None:
    footprints, every = taught(tissue, [0.0, 6.0, 14.0]), np.arange(N_UNITS)
    moved, found = moved_by(tissue, tissue.at(0), 10.0), footprints.templates(every, np.full(N_UNITS, 10.0))
    assert residual(found, tissue.at(10.0)) < 0.7 * residual(moved, tissue.at(10.0))


def test_a_few_noisy_spikes_do_not_outweigh_many_from_nearby(tissue: Tissue) -> None:
    footprints, every = taught(tissue, [0.0], n_spikes=100), np.arange(N_UNITS)
    one = np.random.default_rng(0).normal(size=tissue.at(4.0).shape).astype(np.float32)
    footprints.learn(every, tissue.at(4.0) + one, np.full(N_UNITS, 4.0))
    assert residual(footprints.templates(every, np.full(N_UNITS, 4.0)), tissue.at(4.0)) < 0.05


def test_only_the_units_asked_for_are_returned(tissue: Tissue) -> None:
    footprints = taught(tissue, [0.0, 5.0])
    all_of_them = footprints.templates(np.arange(N_UNITS), np.full(N_UNITS, 5.0))
    np.testing.assert_allclose(footprints.templates(np.array([7, 2]), np.full(2, 5.0)), all_of_them[[7, 2]], atol=1e-5)


def test_a_unit_that_changes_is_followed(tissue: Tissue) -> None:
    """A running mean forgets: twice as large spikes take it over, however many there were before."""
    footprints, every = taught(tissue, [0.0, *[0.0] * 10]), np.arange(N_UNITS)
    for _ in range(300):
        footprints.learn(every, 2 * tissue.at(0), np.zeros(N_UNITS))
    assert residual(footprints.templates(every, np.zeros(N_UNITS)), 2 * tissue.at(0)) < 0.01


def test_a_displacement_a_whole_round_away_takes_the_place_of_the_old_one() -> None:
    locations, channels = Probe.linear(4, 20.0).channel_locations, np.arange(4, dtype=np.int32)
    footprints = Footprints(locations, 2, 4)
    footprints.add(channels, np.ones((2, 4), np.float32), 50, 0.0)
    footprints.learn(np.array([0]), np.full((1, 2, 4), 9.0, np.float32), np.array([128.0]))
    np.testing.assert_allclose(footprints.templates(np.array([0]), np.array([128.0])), 9.0, rtol=0.05)


def test_tetrode_units_are_remembered_too() -> None:
    tissue = Tissue("tetrode", 6)
    footprints, every = taught(tissue, [0.0, 8.0, 15.0]), np.arange(6)
    found, still = footprints.templates(every, np.full(6, 15.0)), tissue.at(0)
    assert residual(found, tissue.at(15.0)) < 0.2 * residual(still, tissue.at(15.0))
