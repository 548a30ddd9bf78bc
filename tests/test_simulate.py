"""Simulated recordings: the truth is in the traces, shapes and noise are as asked for, and everything follows from the seed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.signal import welch

from streamsort.errors import StreamsortError
from streamsort.probe import Probe
from streamsort.score import load_truth
from streamsort.simulate import (
    GAIN_UV,
    SimulationConfig,
    _draw_spikes,
    _spike_adder,
    displacement_um,
    draw_units,
    named_probe,
    simulate_recording,
    simulated_blocks,
    templates_at,
    truth,
    units_of,
    write_recording,
)

pytestmark = pytest.mark.timeout(20)


@pytest.mark.parametrize(
    ("name", "n_channels"),
    [("linear32", 32), ("grid32", 32), ("tetrode", 4), ("single", 1), ("neuropixels128", 128), ("neuropixels384", 384)],
)
def test_probes_have_distinct_contacts(name: str, n_channels: int) -> None:
    probe = named_probe(name)
    assert probe.n_channels == n_channels == len(np.unique(probe.channel_locations, axis=0))
    if n_channels > 1:
        np.fill_diagonal(distances := probe.distances_um(), np.inf)
        assert 15 < distances.min(axis=1).max() <= 34


def test_grid_has_three_columns() -> None:
    x, y = named_probe("grid32").channel_locations.T
    assert [np.count_nonzero(x == column) for column in (0, 30, 60)] == [10, 12, 10]
    assert np.all(np.diff(y[x == 30]) == 30) and y[x == 0][0] - y[x == 30][0] == 15


@pytest.mark.parametrize("name", ["grid32", "tetrode", "single"])
@pytest.mark.parametrize("rate", [20000.0, 30000.0])
def test_templates_have_the_snr_asked_for_and_the_trough_in_place(name: str, rate: float) -> None:
    probe = named_probe(name)
    units = draw_units(12, probe, rate, seed=2, snr=(4, 15), noise_uv=8.0)
    templates = templates_at(units, probe, 0.0)
    assert templates.shape == (12, units.n_before + units.n_after, probe.n_channels) and templates.dtype == np.float32
    depth = templates.min(axis=(1, 2))
    np.testing.assert_allclose(-depth / 8.0, units.snr, rtol=1e-3)
    assert sorted(units.snr) == pytest.approx(np.linspace(4, 15, 12))
    assert {int(np.argmin(t.min(axis=1))) for t in templates} == {units.n_before}
    assert np.abs(templates[:, [0, -1]]).max() < 0.01 * np.abs(depth).max()


def test_shapes_are_diverse() -> None:
    probe = named_probe("neuropixels128")
    units = draw_units(60, probe, 30000.0, seed=0)
    templates = templates_at(units, probe)
    best = templates.min(axis=1).argmin(axis=1)
    wave = templates[np.arange(60), :, best] / templates.min(axis=(1, 2))[:, None]
    width_ms = (wave > 0.1).sum(axis=1) / 30
    repolarisation, first_peak = -wave[:, units.n_before :].min(axis=1), -wave[:, : units.n_before].min(axis=1)
    assert width_ms.min() < 0.2 and 0.7 < width_ms.max() < 1.2
    assert repolarisation.min() < 0.15 and repolarisation.max() > 0.4
    assert 0.2 < np.mean(first_peak > 0.15) < 0.6 and first_peak.max() > 0.6
    n_heard = (templates.min(axis=1) < -10).sum(axis=1)
    assert n_heard.min() <= 6 and n_heard.max() >= 25


def test_delays_are_small_and_present() -> None:
    probe = named_probe("grid32")
    units = draw_units(30, probe, 30000.0, seed=1, snr=(15, 15))
    templates = templates_at(units, probe)
    depth, row = templates.min(axis=1), templates.argmin(axis=1)
    late_ms = np.abs(row - units.n_before)[depth < -20] / 30
    assert 0.05 < np.quantile(late_ms, 0.9) <= 0.25 and late_ms.max() <= 0.9  # a branch may be deepest late


def test_drift_moves_the_footprint_along_the_probe() -> None:
    probe = Probe.linear(32, pitch_um=20.0)
    units = draw_units(5, probe, 30000.0, seed=4)
    np.testing.assert_allclose(templates_at(units, probe, 40.0)[:, :, 2:], templates_at(units, probe)[:, :, :-2], atol=0.25)


def test_spike_trains_are_refractory_and_have_the_rates_asked_for() -> None:
    config = SimulationConfig(seconds=400, n_units=8, rates_hz=(2, 10), bursting=0.5, seed=5)
    sample_index, unit_index = truth(config)
    assert np.all(np.diff(sample_index) >= 0) and sample_index.dtype == np.int64 and unit_index.dtype == np.int32
    short = []
    for unit in range(8):
        intervals = np.diff(sample_index[unit_index == unit])
        assert intervals.min() >= 89  # 3 ms, less one for rounding
        assert 1.7 < len(intervals) / 400 < 11.5
        short.append(np.mean(intervals < 0.0081 * 30000))
    assert sorted(np.array(short) > 0.3) == [False] * 4 + [True] * 4


def test_silences_hold() -> None:
    config = SimulationConfig(seconds=30, n_units=3, silences=((1, 10.0, 20.0),))
    sample_index, unit_index = truth(config)
    inside = (sample_index >= 300_000) & (sample_index < 600_000)
    assert set(unit_index[inside]) == {0, 2} and set(unit_index[~inside]) == {0, 1, 2}


def test_truth_marks_the_troughs_in_the_traces() -> None:
    config = SimulationConfig(seconds=20, probe_name="tetrode", n_units=3, snr=(10, 15), noise_uv=4.0, rates_hz=(5, 8), seed=6)
    recording = simulate_recording(config)
    templates = templates_at(recording.units, recording.probe)
    before, after = 20, 40
    rows = slice(recording.units.n_before - before, recording.units.n_before + after)
    for unit in range(3):
        at = recording.truth.sample_index[recording.truth.unit_index == unit]
        mean = np.mean([recording.traces[k - before : k + after] * GAIN_UV for k in at[1:-1]], axis=0)
        expected = templates[unit, rows]
        assert np.argmin(mean.min(axis=1)) in (before - 1, before, before + 1)
        assert np.corrcoef(mean.ravel(), expected.ravel())[0, 1] > 0.97
        assert mean.min() == pytest.approx(expected.min(), rel=0.15)


def test_blocks_of_any_size_get_the_same_spikes() -> None:
    config = SimulationConfig(
        seconds=3, probe_name="tetrode", n_units=5, noise_uv=0.0, rates_hz=(60, 90), snr=(60, 99), drift_um=9.0
    )
    add_spikes = _spike_adder(config)
    whole = np.zeros((90_000, 4), np.float32)
    add_spikes(whole, 0)
    assert whole.min() < -60
    for size in (50, 977):
        pieces = [np.zeros((min(size, 90_000 - start), 4), np.float32) for start in range(0, 90_000, size)]
        for k, piece in enumerate(pieces):
            add_spikes(piece, k * size)
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    blocks = np.concatenate(list(simulated_blocks(config)))
    np.testing.assert_array_equal(blocks, np.rint(whole / GAIN_UV))


def test_amplitude_falls_within_a_burst_and_recovers_after_it() -> None:
    config = SimulationConfig(seconds=100, n_units=1, rates_hz=(10, 10), bursting=1.0, amplitude_jitter=0.0)
    spikes = _draw_spikes(config)
    short = np.diff(spikes.truth.sample_index) <= 240  # 8 ms
    assert 200 < short.sum() < 600
    ratio = spikes.amplitude[1:] / spikes.amplitude[:-1]
    np.testing.assert_allclose(ratio[short & (ratio < 1)], 0.85, rtol=1e-5)
    assert np.mean(ratio[short] < 1) > 0.9  # a long interval may by chance be short too
    assert np.all(spikes.amplitude[1:][~short] == 1.0)


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


@pytest.mark.parametrize("drift", [{}, {"drift_um": 15.0, "lfp_uv": 20.0, "bursting": 0.5}])
def test_same_config_same_samples_and_another_seed_others(drift: dict[str, Any]) -> None:
    first, again, other = (
        np.concatenate(list(simulated_blocks(SimulationConfig(seconds=2.5, probe_name="tetrode", n_units=3, seed=seed, **drift))))
        for seed in (1, 1, 2)
    )
    assert first.shape == (75000, 4) and first.dtype == np.int16
    np.testing.assert_array_equal(first, again)
    assert np.mean(first != other) > 0.5


def test_displacement_follows_its_kind() -> None:
    times_s = np.arange(0, 100, 0.5)
    for kind in ("sine", "zigzag"):
        moved = displacement_um(SimulationConfig(drift_um=20.0, drift_kind=kind, drift_period_s=100.0), times_s)
        assert moved[0] == 0 and moved[50] == 20 and moved[150] == -20 and np.abs(np.diff(moved)).max() < 0.7
    step = displacement_um(SimulationConfig(drift_um=20.0, drift_kind="step", drift_period_s=100.0), times_s)
    assert set(step[:100]) == {0.0} and set(step[100:]) == {20.0}


def test_drift_is_in_the_traces() -> None:
    config = SimulationConfig(
        seconds=8,
        probe_name="linear32",
        n_units=1,
        rates_hz=(40, 40),
        snr=(15, 15),
        drift_um=40.0,
        drift_kind="step",
        drift_period_s=8.0,
    )
    recording = simulate_recording(config)
    sample_index = recording.truth.sample_index
    early, late = (
        int(np.argmin(np.mean(recording.traces[sample_index[part]], axis=0)))
        for part in (sample_index < 120_000, sample_index >= 120_000)
    )
    assert late == early + 2


def test_written_recording_is_the_simulated_one(tmp_path: Path) -> None:
    config = SimulationConfig(seconds=2.2, probe_name="tetrode", n_units=3, drift_um=5.0)
    done: list[float] = []
    write_recording(config, tmp_path / "out", progress=done.append)
    folder = tmp_path / "out" / "recording"
    layout = json.loads((folder / "binary.json").read_text())["kwargs"]
    traces = np.fromfile(folder / layout["file_paths"][0], layout["dtype"]).reshape(-1, layout["num_channels"])
    recording = simulate_recording(config)
    np.testing.assert_array_equal(traces, recording.traces)
    assert layout["sampling_frequency"] == 30000.0 and layout["gain_to_uV"] == [GAIN_UV] * 4
    probe = Probe.from_probeinterface(folder / "probegroup.json")
    np.testing.assert_array_equal(probe.channel_locations, recording.probe.channel_locations)
    np.testing.assert_array_equal(load_truth(tmp_path / "out").sample_index, recording.truth.sample_index)
    np.testing.assert_array_equal(load_truth(tmp_path / "out").unit_index, recording.truth.unit_index)
    assert len(done) == 3 and done[-1] == 1.0
    assert np.load(tmp_path / "out" / "motion.npy").shape[1] == 2
    assert json.loads((tmp_path / "out" / "simulation.json").read_text())["unit_snr"] == units_of(config).snr.tolist()


def test_writing_over_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(StreamsortError, match="expected a new or empty folder"):
        write_recording(SimulationConfig(seconds=1), tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seconds", 0),
        ("seconds", float("inf")),
        ("probe_name", "utah"),
        ("n_units", -1),
        ("snr", (5, 4)),
        ("rates_hz", (0, 4)),
        ("rates_hz", (1, 1000)),
        ("drift_kind", "jump"),
        ("drift_um", -1),
        ("noise_uv", float("nan")),
        ("bursting", 1.5),
        ("silences", ((99, 0.0, 1.0),)),
        ("sampling_frequency", 100),
    ],
)
def test_bad_config_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(StreamsortError, match=f"simulation: {field} = ") as caught:
        SimulationConfig(**{field: value})
    assert "\n" not in str(caught.value)
