"""The displacement of the tissue is found without units, at once, and at every depth."""

import numpy as np
import pytest
from numpy.typing import NDArray

from streamsort.config import SnippetConfig
from streamsort.motion import Motion, locate
from streamsort.neurons import draw_units, templates_at
from streamsort.probe import Probe
from streamsort.simulate import named_probe
from streamsort.snippets import Snippets

Floats = NDArray[np.float32]
RATE = 30_000.0
RANGE_UM = 26
PERIOD_S = 0.25


class Tissue:
    """Spikes of sharp units at any displacement, in white noise."""

    def __init__(self, probe_name: str, n_units: int, seed: int = 0, spikes_per_period: int = 25) -> None:
        self.probe = named_probe(probe_name)
        self.cutter = Snippets(SnippetConfig(), self.probe, RATE)
        self.neighbors = self.cutter.neighbors
        units = draw_units(n_units, self.probe, RATE, seed, (6.0, 15.0), 1.0, (15.0, 25.0))
        rows = slice(units.n_before - self.cutter.n_before, units.n_before + self.cutter.n_after)
        self.bank = np.stack([templates_at(units, self.probe, d)[:, rows] for d in range(-RANGE_UM, RANGE_UM + 1)])
        self.y_um = units.sources_um[:, 0, 1]
        self._rng, self._n = np.random.default_rng(seed), spikes_per_period

    def motion(self) -> Motion:
        return Motion(self.probe, self.cutter, RATE, PERIOD_S)

    def spikes(self, displacement_um: NDArray[np.float64], of: NDArray[np.intp] | None = None) -> tuple[Floats, NDArray[np.int64]]:
        """Draw spikes of random units (or of those named), each displaced by its own entry."""
        unit = self._rng.integers(len(self.y_um), size=self._n) if of is None else self._rng.choice(of, self._n)
        waves = self.bank[np.round(displacement_um[unit]).astype(int) + RANGE_UM, unit]
        channel = waves.min(axis=1).argmin(axis=1)
        near = self.neighbors[channel]
        cut = np.take_along_axis(waves, np.maximum(near, 0)[:, None], axis=2)
        noisy = cut + self._rng.normal(size=cut.shape)
        snippets: Floats = np.where(near[:, None] >= 0, noisy, 0).astype(np.float32)
        return snippets, channel

    def follow(self, motion: Motion, displacement_um: NDArray[np.float64]) -> NDArray[np.float64]:
        """Play a rigid displacement, one entry per period; return what was found after each."""
        found = []
        for d in displacement_um:
            motion.update(*self.spikes(np.full(len(self.y_um), d)))
            found.append(motion.displacement_um[0])
        return np.array(found)


@pytest.fixture(scope="module")
def tissue() -> Tissue:
    return Tissue("neuropixels64", 16)


def gaussian_spike(source: tuple[float, float], contacts: NDArray[np.float64], width_um: float) -> Floats:
    wave = -10 * np.exp(-0.5 * ((np.arange(24) - 10) / 3) ** 2)
    reach = np.exp(-0.5 * np.square(contacts - source).sum(axis=1) / width_um**2)
    spike: Floats = (wave[:, None] * reach).astype(np.float32)
    return spike


@pytest.mark.parametrize("source", [(20.0, 300.0), (8.0, 313.0), (40.0, 305.0)])
def test_a_spike_is_located_between_the_contacts(source: tuple[float, float]) -> None:
    probe = named_probe("neuropixels64")
    nearest = int(np.square(probe.channel_locations - source).sum(axis=1).argmin())
    channels = probe.neighbors(100.0, 11)[[nearest]]
    snippet = gaussian_spike(source, probe.channel_locations[channels[0]], 25.0)
    assert np.abs(locate(snippet[None], channels, probe.channel_locations)[0] - source).max() < 1.5


def test_a_source_below_the_lowest_contact_is_located_there() -> None:
    """A centre of mass could not leave the probe."""
    locations = np.column_stack([np.zeros(8), np.arange(8) * 20.0])
    channels = np.arange(8, dtype=np.int32)[None]
    located = locate(gaussian_spike((0.0, -12.0), locations, 25.0)[None], channels, locations)
    assert -15 < located[0, 1] < -9


def test_missing_channels_have_no_say() -> None:
    probe = named_probe("neuropixels64")
    channels = probe.neighbors(100.0, 11)[[30]]
    snippet = gaussian_spike((20.0, 300.0), probe.channel_locations[channels[0]], 25.0)[None]
    lacking = channels.copy()
    lacking[0, 7:] = -1
    silent = snippet.copy()
    silent[:, :, 7:] = 99.0
    expected = locate(snippet[:, :, :7], channels[:, :7], probe.channel_locations)
    np.testing.assert_allclose(locate(silent, lacking, probe.channel_locations), expected, atol=1e-9)


def test_no_spikes_are_located_nowhere() -> None:
    assert locate(np.zeros((0, 24, 3), np.float32), np.zeros((0, 3), np.int32), np.zeros((4, 2))).shape == (0, 2)


def test_still_tissue_stays(tissue: Tissue) -> None:
    motion = tissue.motion()
    found = tissue.follow(motion, np.zeros(160))
    assert np.abs(found).max() < 1.5
    assert not motion.stepped


def test_slow_drift_is_followed(tissue: Tissue) -> None:
    times_s = np.arange(240) * PERIOD_S
    truth = 20 * np.sin(2 * np.pi * times_s / 60)
    error = (tissue.follow(tissue.motion(), truth) - truth)[20:]
    assert np.sqrt(np.mean(error**2)) < 2.0


@pytest.mark.parametrize("step_um", [-20, 10, 25])
def test_a_step_is_seen_within_half_a_second(tissue: Tissue, step_um: int) -> None:
    motion = tissue.motion()
    tissue.follow(motion, np.zeros(40))
    steps = []
    for _ in range(2):
        tissue.follow(motion, np.full(1, step_um))
        steps.append(motion.stepped)
    assert any(steps)
    assert abs(motion.displacement_um[0] - step_um) < 2.5
    tissue.follow(motion, np.full(20, step_um))
    assert not motion.stepped
    assert abs(motion.displacement_um[0] - step_um) < 2.0


def test_a_long_probe_may_bend() -> None:
    """The upper end moves, the lower end does not."""
    tissue = Tissue("neuropixels128", 40, spikes_per_period=60)
    motion = tissue.motion()
    low, extent = tissue.y_um.min(), np.ptp(tissue.y_um)
    for d in np.linspace(0, 20, 100):
        motion.update(*tissue.spikes(d * (tissue.y_um - low) / extent))
    assert len(motion.depth_um) == 3
    np.testing.assert_allclose(motion.displacement_um, 20 * (motion.depth_um - low) / extent, atol=3)
    np.testing.assert_array_equal(motion.at(motion.depth_um), motion.displacement_um)


def test_a_silent_depth_moves_with_the_others() -> None:
    tissue = Tissue("neuropixels128", 40, spikes_per_period=60)
    motion = tissue.motion()
    everywhere = np.zeros(40)
    for _ in range(20):
        motion.update(*tissue.spikes(everywhere))
    below = np.flatnonzero(tissue.y_um < motion.depth_um[1])
    for d in np.linspace(0, 15, 60):
        motion.update(*tissue.spikes(everywhere + d, of=below))
    assert abs(motion.displacement_um[-1] - 15) < 4


def test_silence_changes_nothing(tissue: Tissue) -> None:
    motion = tissue.motion()
    tissue.follow(motion, np.full(40, 8.0))
    before = motion.displacement_um.copy()
    for _ in range(20):
        motion.update(np.zeros((0, 48, 11), np.float32), np.zeros(0, np.int64))
    np.testing.assert_allclose(motion.displacement_um, before, atol=0.5)
    tissue.follow(motion, np.full(20, 8.0))
    np.testing.assert_allclose(motion.displacement_um, before, atol=1.5)


def test_displacements_may_grow_beyond_the_candidates() -> None:
    """The candidates are counted from the last estimate, not from the start."""
    tissue = Tissue("neuropixels64", 16)
    probe = Probe(tissue.probe.channel_locations.copy(), tissue.probe.shanks)
    motion = Motion(probe, tissue.cutter, RATE, PERIOD_S)
    still = np.zeros(16)
    for by_um in np.linspace(0, 120, 240):
        probe.channel_locations[:] = tissue.probe.channel_locations + np.array(
            [0.0, by_um]
        )  # the same spikes, further and further up
        motion.update(*tissue.spikes(still))
    assert abs(motion.displacement_um[0] - 120) < 3


def test_the_same_peaks_give_the_same_displacement() -> None:
    a, b = Tissue("neuropixels64", 8, seed=3), Tissue("neuropixels64", 8, seed=3)
    path = np.linspace(0, 10, 40)
    np.testing.assert_array_equal(a.follow(a.motion(), path), b.follow(b.motion(), path))


def test_what_comes_in_is_not_written_to(tissue: Tissue) -> None:
    motion = tissue.motion()
    snippets, channel = tissue.spikes(np.zeros(16))
    before = snippets.copy()
    snippets.flags.writeable = channel.flags.writeable = False
    motion.update(snippets, channel)
    motion.update(snippets, channel)
    np.testing.assert_array_equal(snippets, before)


def test_short_snippets_will_do(tissue: Tissue) -> None:
    cutter = Snippets(SnippetConfig(ms_before=0.2, ms_after=0.3), tissue.probe, RATE)
    motion = Motion(tissue.probe, cutter, RATE, PERIOD_S)
    rows = slice(tissue.cutter.n_before - cutter.n_before, tissue.cutter.n_before + cutter.n_after)
    for d in np.linspace(0, 10, 80):
        snippets, channel = tissue.spikes(np.full(16, d))
        motion.update(snippets[:, rows], channel)
    assert abs(motion.displacement_um[0] - 10) < 2.5


def test_a_single_contact_never_moves() -> None:
    probe = named_probe("single")
    motion = Motion(probe, Snippets(SnippetConfig(n_neighbors=1), probe, RATE), RATE, PERIOD_S)
    snippets = np.zeros((10, 48, 1), np.float32)
    snippets[:, 16:22] = -9
    for _ in range(5):
        motion.update(snippets, np.zeros(10, np.int64))
    np.testing.assert_allclose(motion.displacement_um, 0, atol=1e-6)
