"""Simulated recordings: the truth is in the traces, shapes and noise are as asked for, and everything follows from the seed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.signal import butter, sosfiltfilt

from streamsort import cli
from streamsort.background import artifact_samples
from streamsort.errors import StreamsortError
from streamsort.neurons import draw_far_units, potentials, take
from streamsort.probe import Probe
from streamsort.score import load_truth
from streamsort.simulate import (
    GAIN_UV,
    PROBES,
    SimulationConfig,
    Units,
    _spike_adder,
    band_snr,
    displacement_um,
    draw_units,
    drift_share,
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
    [("linear32", 32), ("grid32", 32), ("tetrode", 4), ("single", 1), *((f"neuropixels{n}", n) for n in (64, 128, 384))],
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


def halving_um(units: Units, unit: int, pitch_um: float = 2.5) -> float:
    """Radius of the circle as large as the part of a dense probe on which a unit's trough is above half its deepest."""
    steps = np.arange(-60.0, 60.0, pitch_um)
    places = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2) + units.sources_um[unit, 0, :2]
    wave = potentials(take(units, slice(unit, unit + 1)), places[None], np.zeros(1), np.arange(-0.6, 0.9, 0.05, np.float32))[0]
    depth = -wave.min(axis=0)
    return float(np.sqrt(np.count_nonzero(depth > depth.max() / 2) * pitch_um**2 / np.pi))


@pytest.mark.parametrize("name", ["neuropixels64", "tetrode"])
def test_sharp_footprints_halve_where_asked(name: str) -> None:
    units = draw_units(24, named_probe(name), 30000.0, seed=3, half_um=(15.0, 25.0))
    halves = np.array([halving_um(units, unit) for unit in range(24)])
    assert 13.5 < halves.min() < 17.5 and 22.5 < halves.max() < 28 and np.mean((halves > 15) & (halves < 25)) > 0.8
    usual = draw_units(24, named_probe(name), 30000.0, seed=3)
    assert np.median([halving_um(usual, unit) for unit in range(24)]) > 30
    np.testing.assert_array_equal(units.snr, usual.snr)


@pytest.mark.parametrize("name", ["neuropixels64", "tetrode"])
@pytest.mark.parametrize("kind", ["sine", "zigzag", "step"])
def test_sharp_units_stay_in_sight_and_change_as_they_drift(name: str, kind: Any) -> None:
    config = SimulationConfig(probe_name=name, n_units=12, half_um=(15.0, 25.0), drift_um=20.0, drift_kind=kind, seed=5)
    probe, units = named_probe(name), units_of(config)
    moved_um = np.unique(displacement_um(config, np.linspace(0, 120, 9)).round())
    depths = -np.array([templates_at(units, probe, um).min(axis=(1, 2)) for um in moved_um])
    assert {moved_um.min(), moved_um.max()} == ({0.0, 20.0} if kind == "step" else {-20.0, 20.0})
    np.testing.assert_allclose(-templates_at(units, probe).min(axis=(1, 2)) / 8.0, units.snr, rtol=1e-3)
    ratio = depths / depths[moved_um == 0]
    assert 0.4 < ratio.min() < 0.85 and 1.1 < ratio.max() < 2.5


def test_drift_moves_the_footprint_along_the_probe() -> None:
    probe = Probe.linear(32, pitch_um=20.0)
    units = draw_units(5, probe, 30000.0, seed=4)
    np.testing.assert_allclose(templates_at(units, probe, 40.0)[:, :, 2:], templates_at(units, probe)[:, :, :-2], atol=0.25)


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


def test_a_gradient_makes_drift_less_at_the_foot_and_the_traces_show_it() -> None:
    base = SimulationConfig(seconds=10, probe_name="linear32", drift_um=40.0, drift_kind="step", drift_period_s=10.0, seed=2)
    config = replace(base, n_units=2, rates_hz=(30, 30), snr=(15, 15), drift_gradient=1.0)
    np.testing.assert_allclose(drift_share(config, np.array([0.0, 310.0, 620.0])), [0.0, 0.5, 1.0])
    np.testing.assert_array_equal(drift_share(replace(config, drift_gradient=0.0), np.array([0.0, 900.0])), 1.0)
    np.testing.assert_array_equal(drift_share(replace(config, probe_name="single"), np.array([5.0])), 1.0)
    recording = simulate_recording(config)
    share = drift_share(config, recording.units.sources_um[:, 0, 1])
    before, after = templates_at(recording.units, recording.probe), templates_at(recording.units, recording.probe, 40.0 * share)
    assert np.abs(before - after).max() > 20
    row = recording.units.n_before
    for unit in range(2):
        at = recording.truth.sample_index[recording.truth.unit_index == unit]
        for part, expected in ((at < 150_000, before), (at >= 150_000, after)):
            mean = recording.traces[at[part]].mean(axis=0) * GAIN_UV
            assert np.abs(mean - expected[unit, row]).max() < 0.12 * 15 * 8


def test_distant_neurons_add_hash_that_is_not_in_the_truth() -> None:
    quiet = SimulationConfig(seconds=2, probe_name="tetrode", n_units=2, seed=4)
    config = replace(quiet, far_units=300)
    hash_uv = (simulate_recording(config).traces - simulate_recording(quiet).traces) * GAIN_UV
    np.testing.assert_array_equal(truth(config).sample_index, truth(quiet).sample_index)
    assert 2.0 < hash_uv.std() < 16.0 and np.abs(hash_uv).max() < 80.0
    assert np.corrcoef(hash_uv.T).min() > 0.5  # from afar contacts hear the same
    far = draw_far_units(50, config.probe, 30000.0, 4, 8.0)
    assert far.snr.max() < 2 and -templates_at(far, config.probe).min() < 2 * 8.0


def test_what_is_added_leaves_the_neurons_as_they_were() -> None:
    plain = SimulationConfig(seconds=2, probe_name="tetrode", n_units=4, noise_uv=0.0, seed=4)
    added = replace(plain, artifacts_hz=2.0, far_units=20, lfp_uv=30.0, noise_uv=8.0)
    for name in ("sources_um", "width_ms", "snr"):
        np.testing.assert_array_equal(getattr(units_of(plain), name), getattr(units_of(added), name))
    np.testing.assert_array_equal(truth(plain).sample_index, truth(added).sample_index)


def test_band_snr_is_what_the_traces_show() -> None:
    config = SimulationConfig(
        seconds=40, probe_name="tetrode", n_units=3, rates_hz=(4, 8), far_units=100, lfp_uv=30.0, amplitude_jitter=0.0, seed=6
    )
    recording = simulate_recording(config)
    band = butter(3, [300.0, 6000.0], "bandpass", fs=30000.0, output="sos")
    traces = sosfiltfilt(band, recording.traces * GAIN_UV, axis=0)
    alone = sosfiltfilt(band, simulate_recording(replace(config, n_units=0)).traces * GAIN_UV, axis=0)
    for unit, snr in enumerate(band_snr(config)[0]):
        at = recording.truth.sample_index[recording.truth.unit_index == unit]
        mean = np.mean([traces[k - 15 : k + 15] for k in at], axis=0)
        assert -(mean / alone.std(axis=0)).min() == pytest.approx(snr, rel=0.1)
    moved = band_snr(config, np.array([0.0, 100.0]))
    assert moved.shape == (2, 3) and np.all(moved[1] < moved[0])


def test_written_recording_is_the_simulated_one(tmp_path: Path) -> None:
    config = SimulationConfig(
        seconds=2.2,
        probe_name="tetrode",
        n_units=3,
        drift_um=5.0,
        drift_gradient=1.0,
        pairs=0.2,
        pauses=(0.5, 1.0, 2.0),
        artifacts_hz=2,
    )
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
    about = json.loads((tmp_path / "out" / "simulation.json").read_text())
    assert about["unit_snr"] == units_of(config).snr.tolist()
    np.testing.assert_allclose(about["unit_snr_band"], band_snr(config)[0])
    low, high = np.transpose(about["unit_snr_band_range"])
    assert np.all(low <= about["unit_snr_band"]) and np.all(about["unit_snr_band"] <= high) and np.any(low < high)
    assert [silence[1:] for silence in about["unit_silences"]] == [[1.0, 2.0]] * 2
    assert len(about["unit_pairs"]) == 1 and about["artifact_samples"] == artifact_samples(config).tolist()
    motion, unit_motion = np.load(tmp_path / "out" / "motion.npy"), np.load(tmp_path / "out" / "unit_motion.npy")
    np.testing.assert_array_equal(motion[:, 1], displacement_um(config, motion[:, 0]))
    heights = np.array(about["unit_positions_um"])[:, 1]
    np.testing.assert_allclose(unit_motion, motion[:, 1:] * heights / 25.0, atol=1e-9)


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
        ("half_um", (25, 15)),
        ("half_um", (0, 15)),
        ("far_units", -1),
        ("artifacts_hz", 1000),
        ("drift_gradient", 3),
        ("pairs", -0.1),
        ("pauses", (1.1, 0, 1)),
        ("pauses", (0.5, 2, 1)),
        ("silences", ((99, 0.0, 1.0),)),
        ("sampling_frequency", 100),
    ],
)
def test_bad_config_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(StreamsortError, match=f"simulation: {field} = ") as caught:
        SimulationConfig(**{field: value})
    assert "\n" not in str(caught.value)


def test_the_command_line_takes_every_field_a_user_may_want(tmp_path: Path) -> None:
    options = "--half-um 15 25 --far-units 7 --artifacts-hz 0.5 --drift-um 3 --drift-gradient 0.5 --pairs 0.25 --pauses 0.5 0.1 0.4"
    assert cli.main(["simulate", str(tmp_path / "s"), "--seconds", "0.5", "--units", "2", *options.split()]) == 0
    given = json.loads((tmp_path / "s" / "simulation.json").read_text())["config"]
    assert (given["half_um"], given["far_units"], given["artifacts_hz"], given["pairs"]) == ([15.0, 25.0], 7, 0.5, 0.25)
    assert (given["drift_gradient"], given["pauses"]) == (0.5, [0.5, 0.1, 0.4])


@pytest.mark.parametrize("probe", PROBES)
def test_the_command_line_takes_every_probe(probe: str) -> None:
    assert cli._parser().parse_args(["simulate", "out", "--probe", probe]).probe_name == probe
