"""Spike trains from a seed, in plain numpy: `tools/make_quality_golden.py` measures them with SpikeInterface, the tests live.

Whoever changes what is drawn here runs the tool again.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RATE = 30000.0
DURATION_S = 630.0  # ten minutes and a half: a last interval that does not count
NOISE_UV = 9.0
SEED = 20


@dataclass(frozen=True)
class Train:
    """One unit's spikes: samples, amplitudes (uV) and positions (um) row by row, (n_spikes,)."""

    name: str
    sample_index: NDArray[np.int64]
    amplitude_uv: NDArray[np.float32]
    y_um: NDArray[np.float64]


def trains() -> list[Train]:
    """Draw the units: one calm, one that fades and drifts, one contaminated, one rare, one that pauses, one fast."""
    rng = np.random.default_rng(SEED)
    return [
        _train(rng, "calm", rate_hz=5.0, height_uv=80.0),
        _train(rng, "fading", rate_hz=8.0, height_uv=140.0, fade=0.5, drift_um=35.0),
        _train(rng, "contaminated", rate_hz=12.0, height_uv=60.0, refractory_ms=0.3),
        _train(rng, "rare", rate_hz=0.6, height_uv=100.0),
        _train(rng, "pausing", rate_hz=6.0, height_uv=70.0, pause_s=(200.0, 430.0)),
        _train(rng, "fast", rate_hz=60.0, height_uv=120.0, fade=0.3, drift_um=12.0, refractory_ms=1.2),
    ]


def _train(
    rng: np.random.Generator,
    name: str,
    *,
    rate_hz: float,
    height_uv: float,
    fade: float = 0.0,
    drift_um: float = 0.0,
    refractory_ms: float = 2.5,
    pause_s: tuple[float, float] = (0.0, 0.0),
) -> Train:
    n = int(1.5 * rate_hz * DURATION_S) + 50
    times = np.cumsum(refractory_ms / 1e3 + rng.exponential(1 / rate_hz - refractory_ms / 1e3, n))
    times = times[(times < DURATION_S - 0.01) & ((times < pause_s[0]) | (times >= pause_s[1]))]
    samples = np.unique((times * RATE).astype(np.int64))
    samples = samples[samples > RATE / 100]
    progress = samples / (DURATION_S * RATE)
    heights = height_uv * (1 - fade * progress) * rng.lognormal(0.0, 0.12, len(samples))
    y_um = 200.0 + drift_um * np.sin(2 * np.pi * progress) + rng.normal(0.0, 6.0, len(samples))
    return Train(name, samples, -heights.astype(np.float32), y_um)
