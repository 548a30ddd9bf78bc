"""Recordings whose truth is known: neurons, spike trains, drift and noise from one seed.

In goes a `SimulationConfig`; out come int16 blocks of a second, always the same however they are consumed, and the spikes in them.
Each spike is evaluated where and when it falls, to an eighth of a sample and half a um, so memory does not grow with the recording.
Neurons, trains and background have seeds of their own: what is added to a config leaves the rest of its recording as it was.
Amplitudes and signal-to-noise ratios are broad-band, trough over noise, unless they are called `band`: those are in 300-6000 Hz.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, sosfiltfilt

from streamsort.background import artifact, artifact_samples, noise_blocks
from streamsort.errors import StreamsortError
from streamsort.neurons import Units, draw_far_units, draw_units, sparse_template, templates_at
from streamsort.probe import Probe
from streamsort.sifolder import TRACES, describe_recording, write_truth
from streamsort.simconfig import PROBES, SimulationConfig, displacement_um, drift_share, named_probe
from streamsort.trains import N_SHIFTS, Spikes, Truth, draw_far_spikes, draw_spikes, silences_of, unit_pairs

__all__ = [
    "GAIN_UV",
    "PROBES",
    "Recording",
    "SimulationConfig",
    "Truth",
    "Units",
    "band_snr",
    "displacement_um",
    "draw_units",
    "drift_share",
    "named_probe",
    "simulate_recording",
    "simulated_blocks",
    "templates_at",
    "truth",
    "units_of",
    "write_recording",
]

GAIN_UV = 0.195  # uV per bit of the common headstages
DRIFT_STEP_UM, FAR_DRIFT_STEP_UM = 0.5, 5.0  # distant neurons hardly change over the latter
BAND_HZ, BAND_NOISE_S = (300.0, 6000.0), 2.0  # a channel's level comes out within 1 %
MOTION_STEP_S = 0.1

Event = tuple[NDArray[np.intp], NDArray[np.float32]]  # channels (k,) and uV (n_samples, k)
Adder = Callable[[NDArray[np.float32], int], None]  # adds, in place, what reaches into the block that starts at a sample


@dataclass(frozen=True)
class Recording:
    """A simulated recording in memory; `traces` is (n_samples, n_channels) int16, times `GAIN_UV` for microvolts."""

    traces: NDArray[np.int16]
    config: SimulationConfig
    probe: Probe
    truth: Truth
    units: Units


def units_of(config: SimulationConfig) -> Units:
    """Draw the units of the recording of this config."""
    rate, level_uv = config.sampling_frequency, config.noise_uv or 1.0
    return draw_units(config.n_units, config.probe, rate, config.seed, config.snr, level_uv, config.half_um)


def truth(config: SimulationConfig) -> Truth:
    """Tell which unit fires when in the recording of this config, without making it.

    Examples
    --------
    >>> truth(SimulationConfig(seconds=2, probe_name="tetrode", n_units=3, seed=1)).sample_index[:3]
    array([ 3602,  6591, 13568])
    """
    return _spikes_of(config, units_of(config)).truth


def _spikes_of(config: SimulationConfig, units: Units) -> Spikes:
    return draw_spikes(config, units.sources_um[:, 0, :2])


def simulated_blocks(config: SimulationConfig) -> Iterator[NDArray[np.int16]]:
    """Make the recording one second after the other.

    Yields
    ------
    traces : ndarray, shape (n_samples, n_channels), int16
        A second of samples (the last block may be shorter); times `GAIN_UV` for microvolts. The caller may keep or change it.
    """
    n_block = round(config.sampling_frequency)
    adders = [_spike_adder(config)]
    if config.far_units:
        adders.append(_far_adder(config))
    if config.artifacts_hz:
        adders.append(_adder(artifact_samples(config), functools.partial(artifact, config)))
    for number, traces_uv in enumerate(noise_blocks(config, n_block)):
        for add in adders:
            add(traces_uv, number * n_block)
        yield np.rint(traces_uv / GAIN_UV).clip(-32768, 32767).astype(np.int16)


def _spike_adder(config: SimulationConfig) -> Adder:
    units = units_of(config)
    spikes = _spikes_of(config, units)
    return _neuron_adder(config, units, spikes, DRIFT_STEP_UM)


def _far_adder(config: SimulationConfig) -> Adder:
    units = draw_far_units(config.far_units, config.probe, config.sampling_frequency, config.seed, config.noise_uv or 1.0)
    spikes = draw_far_spikes(config)
    return _neuron_adder(config, units, replace(spikes, shift=np.zeros_like(spikes.shift)), FAR_DRIFT_STEP_UM)


def _neuron_adder(config: SimulationConfig, units: Units, spikes: Spikes, step_um: float) -> Adder:
    """Make the function that adds spikes, their places rounded to `step_um`."""
    sample_index, unit_index = spikes.truth
    moved = displacement_um(config, sample_index / config.sampling_frequency)
    moved *= drift_share(config, units.sources_um[:, 0, 1])[unit_index]
    steps = np.rint(moved / step_um).astype(np.int64)

    @functools.lru_cache(maxsize=4096)
    def template(unit: int, step: int, shift: int) -> Event:
        return sparse_template(units, unit, config.probe.channel_locations, step * step_um, shift / N_SHIFTS)

    def spike(k: int) -> Event:
        channels, wave = template(int(unit_index[k]), int(steps[k]), int(spikes.shift[k]))
        return channels, spikes.amplitude[k] * wave

    return _adder(sample_index - units.n_before, spike)


def _adder(first_sample: NDArray[np.int64], event: Callable[[int], Event]) -> Adder:
    """Make the function that adds events of equal length, from their first samples on, which are in order."""
    length = len(event(0)[1]) if len(first_sample) else 1

    def add(traces_uv: NDArray[np.float32], start: int) -> None:
        n = len(traces_uv)
        for k in range(*np.searchsorted(first_sample, [start - length + 1, start + n])):
            channels, wave = event(k)
            top = int(first_sample[k]) - start
            low, high = max(top, 0), min(top + length, n)
            traces_uv[low:high, channels] += wave[low - top : high - top]

    return add


def simulate_recording(config: SimulationConfig) -> Recording:
    """Make a whole recording in memory; for long ones see `simulated_blocks` and `write_recording`.

    Examples
    --------
    >>> simulate_recording(SimulationConfig(seconds=0.5, probe_name="single", n_units=1)).traces.shape
    (15000, 1)
    """
    traces = np.concatenate(list(simulated_blocks(config)))
    return Recording(traces, config, config.probe, truth(config), units_of(config))


def band_snr(config: SimulationConfig, moved_um: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """Measure each unit's largest trough in 300-6000 Hz, over the noise of that band on that channel.

    Noise is all that is neither a unit nor an artifact, field potential and distant neurons included; a few seconds of it are made
    and measured. The filter is a third-order Butterworth, forwards and backwards. Without noise the result is in uV.

    Parameters
    ----------
    config : SimulationConfig
    moved_um : ndarray, shape (n_displacements,), optional
        As from `displacement_um`; by default nothing has moved.

    Returns
    -------
    snr : ndarray, shape (n_displacements, n_units)
    """
    moved_um = np.zeros(1) if moved_um is None else moved_um
    band = functools.partial(sosfiltfilt, butter(3, BAND_HZ, "bandpass", fs=config.sampling_frequency, output="sos"), axis=0)
    noise = replace(config, seconds=BAND_NOISE_S, n_units=0, artifacts_hz=0.0, silences=())
    level_uv = band(np.concatenate(list(simulated_blocks(noise))) * GAIN_UV).std(axis=0)
    level_uv[level_uv == 0] = 1.0
    units, contacts = units_of(config), config.probe.channel_locations
    share = drift_share(config, units.sources_um[:, 0, 1])
    n_quiet = round(0.01 * config.sampling_frequency)
    snr = np.zeros((len(moved_um), units.n_units))
    for k, unit in np.ndindex(snr.shape):
        channels, wave = sparse_template(units, unit, contacts, float(moved_um[k] * share[unit]), 0.0)
        snr[k, unit] = -(band(np.pad(wave, ((n_quiet, n_quiet), (0, 0)))) / level_uv[channels]).min(initial=0.0)
    return snr


def write_recording(config: SimulationConfig, out_dir: str | Path, progress: Callable[[float], None] | None = None) -> None:
    """Write a recording and its truth as folders that SpikeInterface loads.

    `out_dir/recording` holds traces_cached_seg0.raw (int16, sample after sample), binary.json and probegroup.json;
    `out_dir/truth` holds spikes.npy and numpysorting_info.json; `out_dir/simulation.json` what is known beside them: the config,
    the units' places and SNRs (broad-band, in band, and the range of the latter over the drift), who was silent, which units were
    paired, and the samples at which artifacts begin. With drift, `out_dir/motion.npy` is (n, 2) seconds and um, as
    `displacement_um` tells it, and `out_dir/unit_motion.npy` (n, n_units) each unit's own displacement at these times.

    Parameters
    ----------
    config : SimulationConfig
    out_dir : path
        New, or an empty folder.
    progress : callable, optional
        Called after each second written with the fraction that is done.

    Raises
    ------
    StreamsortError
        If `out_dir` exists and is not empty.
    """
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StreamsortError(f"simulation: out_dir = {str(out)!r} exists, expected a new or empty folder")
    describe_recording(out / "recording", config.probe, config.sampling_frequency, GAIN_UV)
    done = 0
    with open(out / "recording" / TRACES, "wb") as file:
        for block in simulated_blocks(config):
            file.write(block.astype("<i2", copy=False).tobytes())
            done += len(block)
            if progress is not None:
                progress(done / config.n_samples)
    write_truth(out / "truth", truth(config), config.n_units, config.sampling_frequency)
    times_s = np.arange(0.0, config.seconds + MOTION_STEP_S, MOTION_STEP_S)
    motion_um = displacement_um(config, times_s)
    (out / "simulation.json").write_text(json.dumps(_about(config, motion_um), indent=1))
    if config.drift_um:
        np.save(out / "motion.npy", np.column_stack([times_s, motion_um]))
        np.save(out / "unit_motion.npy", np.outer(motion_um, drift_share(config, units_of(config).sources_um[:, 0, 1])))


def _about(config: SimulationConfig, motion_um: NDArray[np.float64]) -> dict[str, Any]:
    """Gather what is known of a recording's units."""
    units = units_of(config)
    snrs = band_snr(config, np.concatenate([[0.0], np.linspace(motion_um.min(), motion_um.max(), 9 if config.drift_um else 1)]))
    return {
        "config": asdict(config),
        "unit_positions_um": units.sources_um[:, 0].tolist(),
        "unit_snr": units.snr.tolist(),
        "unit_snr_band": snrs[0].tolist(),
        "unit_snr_band_range": np.column_stack([snrs.min(axis=0), snrs.max(axis=0)]).tolist(),
        "unit_silences": silences_of(config),
        "unit_pairs": unit_pairs(config, units.sources_um[:, 0, :2]),
        "artifact_samples": artifact_samples(config).tolist(),
    }
