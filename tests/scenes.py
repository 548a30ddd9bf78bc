"""Small units on a probe and traces of them, in noise units, whose spikes are known to a part of a sample."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from naive_match import Limits
from numpy.typing import NDArray
from scipy.linalg import toeplitz

from streamsort.config import MatchConfig
from streamsort.covariance import NoiseModel
from streamsort.kernels import match as kernels
from streamsort.match import sizes
from streamsort.probe import Probe
from streamsort.templates import TemplateMaker

Floats = NDArray[np.float32]

RATE = 30_000.0
CONFIG = MatchConfig()
N_BEFORE, N_AFTER, SPANS = sizes(CONFIG, RATE)
N_SAMPLES = N_BEFORE + N_AFTER


@dataclass(frozen=True)
class Event:
    """One spike: of which unit, when, how late by a part of a sample, how large."""

    unit: int
    sample_index: int
    delay: float = 0.0
    amplitude: float = 1.0


def waveform(delay: float = 0.0, width: float = 2.2, rebound: float = 0.35) -> NDArray[np.float64]:
    """Evaluate a spike of height 1, `delay` samples late: a trough at N_BEFORE and a slower rebound after it."""
    t = np.arange(N_SAMPLES) - N_BEFORE - delay
    shape: NDArray[np.float64] = -np.exp(-0.5 * (t / width) ** 2) + rebound * np.exp(-0.5 * ((t - 8) / 4) ** 2)
    return shape


@dataclass(frozen=True)
class Cell:
    """A unit: its height in noise units, where it is along a linear probe, how far it reaches and how wide its spikes are."""

    height: float
    y_um: float
    reach_um: float = 18.0
    width: float = 2.2

    def at(self, probe: Probe, delay: float = 0.0) -> Floats:
        """Return its spike on all channels, (N_SAMPLES, n_channels)."""
        footprint = self.height * np.exp(-np.abs(probe.channel_locations[:, 1] - self.y_um) / self.reach_um)
        return np.outer(waveform(delay, self.width), footprint).astype(np.float32)


# Three units whose spikes overlap, as alike as neighbours are.
PROBE = Probe.linear(5, 20.0)
CELLS = [Cell(12.0, 12.0, 15.0), Cell(11.0, 62.0, 18.0, width=4.0), Cell(10.0, 38.0, 12.0, width=1.4)]
LIMITS = Limits(*map(float, (kernels._LEAST, kernels._MOST, kernels._TOO_SMALL, kernels._TOO_LARGE, kernels._RINGING)))


def noise(n_samples: int, seed: int = 0) -> Floats:
    """Draw white noise of variance 1 on `PROBE`, (n_samples, 5)."""
    return np.random.default_rng(seed).normal(size=(n_samples, PROBE.n_channels)).astype(np.float32)


def mean_snippets(cells: Sequence[Cell], probe: Probe) -> Floats:
    return np.array([cell.at(probe) for cell in cells], np.float32).reshape(-1, N_SAMPLES, probe.n_channels)


def add_spikes(traces: Floats, cells: Sequence[Cell], probe: Probe, events: Sequence[Event]) -> None:
    """Add spikes to traces (n_samples, n_channels), in place."""
    for event in events:
        first = event.sample_index - N_BEFORE
        traces[first : first + N_SAMPLES] += np.float32(event.amplitude) * cells[event.unit].at(probe, event.delay)


def white(n_channels: int) -> NoiseModel:
    """Noise of variance 1 that is correlated neither in space nor in time."""
    return NoiseModel(np.eye(n_channels), np.eye(N_SAMPLES))


@functools.cache
def coloured(n_channels: int, in_space: float = 0.4, in_time: float = 0.6) -> tuple[NoiseModel, NDArray[np.float64]]:
    """Return noise that is correlated both ways, and its autocorrelation, (N_SAMPLES, N_SAMPLES)."""
    space = toeplitz(in_space ** np.arange(n_channels))
    time = toeplitz(in_time ** np.arange(N_SAMPLES))
    return NoiseModel(space, np.linalg.cholesky(np.linalg.inv(time))), time


def maker(probe: Probe, noise: NoiseModel | None = None) -> TemplateMaker:
    return TemplateMaker(CONFIG, probe, noise or white(probe.n_channels), N_BEFORE)
