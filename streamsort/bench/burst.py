"""Further spikes for a burst: copies of those that the recording has.

Where there is truth, each unit fires so many times as often, with the mean of its spikes, and the truth grows with it. Where there
is none, whatever the detector of the sorter finds is multiplied: single peaks are copied as they are, with the noise around them.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamsort.bench.faults import BURST_S
from streamsort.config import EncodeConfig, SorterConfig
from streamsort.probe import Probe
from streamsort.records import UNSORTED, Chunk
from streamsort.simulate import Truth
from streamsort.sorter import Sorter
from streamsort.sources import open_source

_LOOK_S = 20  # of the recording that spikes are taken from
_BEFORE_S, _AFTER_S, _RAMP_S = 1e-3, 2e-3, 3e-4
_REFRACTORY_S = 2e-3
_MOST_AVERAGED, _MOST_COPIES = 100, 200
_RADIUS_UM = 100.0


class Burst(NamedTuple):
    """What is added: `traces` (n_samples, n_channels) float32 in the recording's own steps, and when which unit fires in it.

    Spikes of a recording without truth are of unit -1.
    """

    traces: NDArray[np.float32]
    truth: Truth


class _Neuron(NamedTuple):
    unit: int
    snippet: NDArray[np.float32]  # (n_samples, n_channels)
    rate_hz: float


def make_burst(recording: str, truth: Truth | None, probe: Probe | None, factor: float, seed: int) -> Burst:
    """Make `BURST_S` of further spikes, so many that there are `factor` times as many as before.

    Parameters
    ----------
    recording : str
    truth : Truth or None
        Of the recording.
    probe : Probe or None
    factor : float
    seed : int
    """
    source = open_source(recording, probe=probe, chunk_ms=1000.0)
    rate, rng = source.info.sampling_frequency, np.random.default_rng(seed)
    with source:
        chunks = list(itertools.islice(source, _LOOK_S))
    head = np.concatenate([chunk.traces for chunk in chunks])
    neurons = (
        _known(head, truth, rate) if truth is not None else _detected(head, chunks, Sorter(_config(), source.info, probe), rng)
    )
    probe = probe or source.info.probe or Probe.linear(head.shape[1])
    near = probe.distances_um() <= _RADIUS_UM
    traces = np.zeros((round(BURST_S * rate), head.shape[1]), np.float32)
    fired: list[tuple[int, int]] = []
    for unit, snippet, rate_hz in neurons:
        channels = near[np.abs(snippet).max(axis=0).argmax()]
        for first in _train(rng, (factor - 1) * rate_hz, (len(traces) - len(snippet)) / rate, rate):
            traces[first : first + len(snippet), channels] += snippet[:, channels]
            fired.append((first + round(_BEFORE_S * rate), unit))
    table = np.array(sorted(fired), np.int64).reshape(-1, 2)
    return Burst(traces, Truth(table[:, 0], table[:, 1].astype(np.int32)))


def _known(head: NDArray[np.float32], truth: Truth, rate: float) -> list[_Neuron]:
    """Average the first spikes of each true unit."""
    neurons = []
    for unit in np.unique(truth.unit_index).tolist():
        at = truth.sample_index[(truth.unit_index == unit) & (truth.sample_index < len(head))]
        snippets = list(itertools.islice(_cut(head, at, rate), _MOST_AVERAGED))
        if snippets:
            neurons.append(_Neuron(unit, np.mean(snippets, axis=0), len(at) * rate / len(head)))
    return neurons


def _detected(head: NDArray[np.float32], chunks: list[Chunk], sorter: Sorter, rng: np.random.Generator) -> list[_Neuron]:
    """Take single peaks, each with its share of the rate."""
    rate = sorter.info.sampling_frequency
    at = np.concatenate([output.spikes["sample_index"] for chunk in chunks for output in sorter.process(chunk)])
    snippets = list(_cut(head, rng.permutation(at)[:_MOST_COPIES], rate))
    seen_s = max(len(head) / rate - sorter.config.preprocess.noise_s, 1.0)  # before, there is no noise level to detect with
    share_hz = len(at) / seen_s / max(len(snippets), 1)
    return [_Neuron(UNSORTED, snippet, share_hz) for snippet in snippets]


def _config() -> SorterConfig:
    """Make a sorter that only detects, since its calibration never ends."""
    return SorterConfig(warmup_s=2.0 * _LOOK_S, encode=EncodeConfig(encoder="light"))


def _cut(head: NDArray[np.float32], at: NDArray[np.int64], rate: float) -> Iterator[NDArray[np.float32]]:
    """Cut spikes out, on a straight line between their ends and faded in and out, so that adding one makes no step."""
    before, after, n_ramp = (round(seconds * rate) for seconds in (_BEFORE_S, _AFTER_S, _RAMP_S))
    along = np.linspace(0.0, 1.0, before + after, dtype=np.float32)[:, None]
    fade = np.minimum(np.minimum(np.arange(before + after), np.arange(before + after)[::-1]) / n_ramp, 1.0)[:, None]
    for sample in at.tolist():
        if before <= sample <= len(head) - after:
            snippet = head[sample - before : sample + after].astype(np.float32)
            snippet -= snippet[0] * (1 - along) + snippet[-1] * along
            yield snippet * fade.astype(np.float32)


def _train(rng: np.random.Generator, rate_hz: float, seconds: float, rate: float) -> list[int]:
    """Draw a refractory train; return its samples."""
    if rate_hz <= 0:
        return []
    n_most = int(2 * rate_hz * seconds) + 20
    pause_s = max(1 / rate_hz - _REFRACTORY_S, 0.0)
    at_s = np.cumsum(_REFRACTORY_S + rng.exponential(pause_s, n_most))
    train: list[int] = np.rint(at_s[at_s < seconds] * rate).astype(np.int64).tolist()
    return train
