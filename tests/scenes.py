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
from streamsort.match import Match, sizes
from streamsort.probe import Probe
from streamsort.templates import TemplateMaker, Templates

Floats = NDArray[np.float32]

RATE = 30_000.0
CONFIG = MatchConfig()
N_BEFORE, N_AFTER, SPANS = sizes(CONFIG, RATE)
N_SAMPLES, N_WHOLE = N_BEFORE + N_AFTER, SPANS.n_whole
THRESHOLD = 18.0  # least gain of a spike
_TAIL_AT = 60  # samples after the trough: when nothing is matched any more


@dataclass(frozen=True)
class Event:
    """One spike: of which unit, when, how late by a part of a sample, how large."""

    unit: int
    sample_index: int
    delay: float = 0.0
    amplitude: float = 1.0


def waveform(delay: float = 0.0, width: float = 2.2, tail: float = 0.0, tail_width: float = 18.0) -> NDArray[np.float64]:
    """Evaluate a spike of height 1, `delay` samples late: a trough at N_BEFORE, a slower rebound and perhaps a tail; (N_WHOLE,)."""
    t = np.arange(N_WHOLE) - N_BEFORE - delay
    spike = -np.exp(-0.5 * (t / width) ** 2) + 0.35 * np.exp(-0.5 * ((t - 8) / 4) ** 2)
    whole: NDArray[np.float64] = spike + tail * np.exp(-0.5 * ((t - _TAIL_AT) / tail_width) ** 2)
    return whole


@dataclass(frozen=True)
class Cell:
    """A unit: its height in noise units, where it is along a linear probe, how far it reaches and how its spikes look."""

    height: float
    y_um: float
    reach_um: float = 18.0
    width: float = 2.2
    tail: float = 0.0
    tail_width: float = 18.0

    def at(self, probe: Probe, delay: float = 0.0) -> Floats:
        """Return its spike on all channels, (N_WHOLE, n_channels)."""
        footprint = self.height * np.exp(-np.abs(probe.channel_locations[:, 1] - self.y_um) / self.reach_um)
        return np.outer(waveform(delay, self.width, self.tail, self.tail_width), footprint).astype(np.float32)


# Three units whose spikes overlap, as alike as neighbours are.
PROBE = Probe.linear(5, 20.0)
CELLS = [Cell(12.0, 12.0, 15.0, tail=0.3), Cell(11.0, 62.0, 18.0, width=4.0, tail=0.25), Cell(10.0, 38.0, 12.0, width=1.4)]
# A small unit, a larger one it may be taken for a part of, and spikes that are no known unit's.
SMALL, LARGE, NOBODYS = Cell(8.0, 40.0, 20.0), Cell(30.0, 45.0, 20.0, width=3.0), Cell(35.0, 35.0, 25.0, width=5.0)
LIMITS = Limits(
    least=float(kernels._LEAST),
    most=float(kernels._MOST),
    too_small=float(kernels._TOO_SMALL),
    too_large=float(kernels._TOO_LARGE),
    core=kernels._CORE,
    larger_by=float(kernels._LARGER_BY),
    herald=float(kernels._HERALD),
    sum=float(kernels._SUM),
)


def noise(n_samples: int, seed: int = 0) -> Floats:
    """Draw white noise of variance 1 on `PROBE`, (n_samples, 5)."""
    return np.random.default_rng(seed).normal(size=(n_samples, PROBE.n_channels)).astype(np.float32)


def mean_snippets(cells: Sequence[Cell], probe: Probe) -> Floats:
    return np.array([cell.at(probe) for cell in cells], np.float32).reshape(-1, N_WHOLE, probe.n_channels)


def add_spikes(traces: Floats, cells: Sequence[Cell], probe: Probe, events: Sequence[Event]) -> None:
    """Add spikes to traces (n_samples, n_channels), in place; what lies beyond their end is cut off."""
    for event in events:
        here = traces[event.sample_index - N_BEFORE :][:N_WHOLE]
        here += np.float32(event.amplitude) * cells[event.unit].at(probe, event.delay)[: len(here)]


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


def templates(cells: Sequence[Cell] = CELLS, probe: Probe = PROBE) -> Templates:
    return maker(probe)(mean_snippets(cells, probe))


def matcher(cells: Sequence[Cell] = CELLS, probe: Probe = PROBE) -> Match:
    match = Match(CONFIG, probe.n_channels, RATE)
    match.use(templates(cells, probe), np.full(len(cells), THRESHOLD, np.float32))
    return match


def silence(n_samples: int) -> Floats:
    return np.zeros((n_samples, PROBE.n_channels), np.float32)


def recorded(traces: Floats, *events: Event, cells: Sequence[Cell] = CELLS) -> Floats:
    """Add spikes to traces on `PROBE`, in place, and return them."""
    add_spikes(traces, cells, PROBE, events)
    return traces


def arrival(match: Match, traces: Floats) -> list[tuple[int, int, int, int]]:
    """Feed sample by sample: row and place of each spike, the sample with which it came, and `through_sample` before that."""
    came = []
    for k in range(len(traces)):
        through = match.through_sample
        came += [(int(one["row"]), int(one["sample_index"]), k, through) for one in match(traces[k : k + 1])]
        assert match.through_sample >= through
    return came
