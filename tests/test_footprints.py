"""Templates move with the tissue: interpolated between the contacts."""

import numpy as np
import pytest
from numpy.typing import NDArray

from streamsort.footprints import move_templates
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


def test_missing_channels_have_no_say(tissue: Tissue) -> None:
    channels, mean = tissue.channels.copy(), tissue.at(0)
    channels[:, 12:], loud = -1, mean.copy()
    loud[:, :, 12:] = 99.0
    by_um = np.full(N_UNITS, 5.0)
    lacking = move_templates(loud, channels, tissue.probe.channel_locations, by_um)
    cut = move_templates(mean[:, :, :12], channels[:, :12], tissue.probe.channel_locations, by_um)
    np.testing.assert_allclose(lacking[:, :, :12], cut, atol=1e-5)
    assert not lacking[:, :, 12:].any()
