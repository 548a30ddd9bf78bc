"""What a simulated recording holds beside its neurons: noise, a slow field potential, and artifacts.

A `SimulationConfig` comes in; blocks of noise in uV and the artifacts go out. The noise of a block follows from the seed and the
block's number; the field potential's filter is the only state carried from block to block.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.signal import bilinear_zpk, sosfilt, zpk2sos

from streamsort.neurons import log_uniform
from streamsort.probe import Probe
from streamsort.simconfig import SimulationConfig

LFP_RUN_IN_S = 2.0
ARTIFACT_MS = 20.0
ARTIFACT_UV, ARTIFACT_HZ, ARTIFACT_DECAY_MS = (200.0, 2000.0), (200.0, 3000.0), (0.3, 3.0)  # all drawn log-uniformly
COMMON_SHARE = 0.5  # of the artifacts; the others are on one contact


def noise_blocks(config: SimulationConfig, n_block: int) -> Iterator[NDArray[np.float32]]:
    """Yield the noise and the field potential of block after block, (n_block, n_channels) uV; the last may be shorter."""
    mixing = _mixing(config.probe, config.noise_uv, reach_um=25.0)
    lfp = _field_potential(config, n_block)
    for start in range(0, config.n_samples, n_block):
        n = min(n_block, config.n_samples - start)
        rng = np.random.default_rng([config.seed, 2, start // n_block])
        traces_uv = rng.standard_normal((n, config.probe.n_channels), np.float32) @ mixing
        if config.lfp_uv:
            traces_uv += next(lfp)[:n]
        yield traces_uv


def _mixing(probe: Probe, level_uv: float, reach_um: float) -> NDArray[np.float32]:
    """Make the matrix that turns independent columns into columns correlated over distance, each of rms `level_uv`."""
    correlation = np.exp(-probe.distances_um() / reach_um) + 1e-9 * np.eye(probe.n_channels)
    return (level_uv * np.linalg.cholesky(correlation).T).astype(np.float32)


def _field_potential(config: SimulationConfig, n_block: int) -> Iterator[NDArray[np.float32]]:
    """Yield blocks of a potential whose power falls as 1/f from 1 Hz to 100 Hz and steeply beyond."""
    poles, zeros = -2 * np.pi * np.array([1.0, 10.0, 100.0, 100.0]), -2 * np.pi * np.array([3.16, 31.6])
    rate = config.sampling_frequency
    sections = zpk2sos(*bilinear_zpk(zeros, poles, 1.0, rate))
    impulse = np.zeros(int(LFP_RUN_IN_S * rate))
    impulse[0] = 1.0
    sections[0, :3] /= np.sqrt(np.sum(sosfilt(sections, impulse) ** 2))
    mixing = _mixing(config.probe, config.lfp_uv, reach_um=300.0)
    rng = np.random.default_rng([config.seed, 3])
    state = np.zeros((len(sections), 2, config.probe.n_channels))
    _, state = sosfilt(sections, rng.standard_normal((len(impulse), config.probe.n_channels)), axis=0, zi=state)
    while True:
        slow, state = sosfilt(sections, rng.standard_normal((n_block, config.probe.n_channels)), axis=0, zi=state)
        yield slow.astype(np.float32) @ mixing


def artifact_samples(config: SimulationConfig) -> NDArray[np.int64]:
    """Draw the samples at which artifacts begin, in order."""
    rng = np.random.default_rng([config.seed, 7])
    return np.sort(rng.integers(config.n_samples, size=rng.poisson(config.artifacts_hz * config.seconds)))


def artifact(config: SimulationConfig, index: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Make one artifact, a ringing that dies away: channels (k,), uV (n_samples, k) from its first sample on."""
    rng = np.random.default_rng([config.seed, 8, index])
    size_uv, ringing_hz, decay_ms = (log_uniform(rng, *limits, 1) for limits in (ARTIFACT_UV, ARTIFACT_HZ, ARTIFACT_DECAY_MS))
    time_s = np.arange(round(ARTIFACT_MS * config.sampling_frequency / 1e3)) / config.sampling_frequency
    wave = rng.choice([-1, 1]) * np.sin(2 * np.pi * ringing_hz * time_s) * np.exp(-time_s * 1e3 / decay_ms)
    wave *= size_uv / np.abs(wave).max()
    n_channels = config.probe.n_channels
    common = rng.random() < COMMON_SHARE
    channels = np.arange(n_channels) if common else rng.integers(n_channels, size=1)
    gains = rng.normal(1.0, 0.1, len(channels)) if common else np.ones(1)
    return channels, np.outer(wave, gains).astype(np.float32)
