"""What is beside the neurons: noise and field potential have the level and reach asked for, artifacts are where they are said."""

import numpy as np
import pytest
from scipy.signal import welch

from streamsort.background import ARTIFACT_UV, artifact, artifact_samples
from streamsort.simulate import GAIN_UV, SimulationConfig, simulate_recording, simulated_blocks

pytestmark = pytest.mark.timeout(20)


def test_noise_has_the_level_and_the_reach_asked_for() -> None:
    traces = simulate_recording(SimulationConfig(seconds=3, probe_name="linear32", n_units=0, noise_uv=7.0)).traces * GAIN_UV
    np.testing.assert_allclose(traces.std(axis=0), 7.0, rtol=0.03)
    correlation = np.corrcoef(traces.T)
    assert np.mean(np.diag(correlation, 1)) == pytest.approx(np.exp(-20 / 25), abs=0.02)
    assert np.mean(np.diag(correlation, 3)) == pytest.approx(np.exp(-60 / 25), abs=0.02)
    assert abs(np.mean(traces[1:] * traces[:-1])) < 1.0


def test_field_potential_is_slow_and_continuous() -> None:
    config = SimulationConfig(seconds=8, probe_name="tetrode", n_units=0, noise_uv=0.0, lfp_uv=100.0)
    traces = np.concatenate(list(simulated_blocks(config))) * GAIN_UV
    assert 50 < traces.std() < 200
    frequency, power = welch(traces[:, 0], 30000.0, nperseg=60000)
    at = {hz: power[np.argmin(np.abs(frequency - hz))] for hz in (3, 30, 1000)}
    assert 3 < at[3] / at[30] < 40 and at[30] / at[1000] > 1e4
    steps = np.abs(np.diff(traces, axis=0))
    assert steps[29999::30000].max() <= steps.max() and steps.max() < 10


def test_artifacts_are_large_where_they_are_said_and_nowhere_else() -> None:
    config = SimulationConfig(seconds=6, n_units=2, artifacts_hz=5.0, seed=3)
    without = SimulationConfig(seconds=6, n_units=2, seed=3)
    starts = artifact_samples(config)
    assert 15 < len(starts) < 50 and np.all(np.diff(starts) >= 0)
    added = (simulate_recording(config).traces - simulate_recording(without).traces) * GAIN_UV
    within = np.zeros(len(added), bool)
    for start in starts:
        within[start : start + 600] = True
        assert np.abs(added[start : start + 600]).max() > 0.5 * ARTIFACT_UV[0]
    assert np.all(added[~within] == 0)


def test_artifacts_are_common_or_on_one_contact() -> None:
    config = SimulationConfig(artifacts_hz=1.0)
    sizes = []
    for k in range(40):
        channels, wave = artifact(config, k)
        assert wave.shape == (600, len(channels)) and np.abs(wave[-1]).max() < 0.01 * np.abs(wave).max()
        sizes.append(len(channels))
        if len(channels) > 1:
            assert np.corrcoef(wave.T).min() > 0.999
    assert set(sizes) == {1, 32} and 10 <= sizes.count(1) <= 30
