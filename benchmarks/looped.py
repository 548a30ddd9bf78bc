"""A simulated recording of some seconds, played over and over: one source of any length that costs next to nothing to deliver.

Making samples takes longer than sorting them, and a long recording of 384 channels does not fit into memory, so the same spikes
come again in every round while sample_index grows on and on. Where the end meets the beginning a spike may be cut, and nothing
jumps, because the noise is white in time.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.records import StreamInfo
from streamsort.simconfig import PROBE_OF
from streamsort.simulate import GAIN_UV, SimulationConfig, simulate_recording
from streamsort.sources.pace import PacedSource

CHANNELS_PER_UNIT = 2


def simulation(n_channels: int, seconds: float, n_units: int | None = None) -> SimulationConfig:
    """Choose a recording for so many channels: a unit for every two of them, 1 to 12 spikes a second each, with noise between."""
    n_units = n_channels // CHANNELS_PER_UNIT if n_units is None else n_units
    return SimulationConfig(seconds=seconds, probe_name=PROBE_OF[n_channels], n_units=n_units)


class Looped(PacedSource):
    """A source that repeats a recording.

    Parameters
    ----------
    config : SimulationConfig
        What is repeated.
    seconds : float
        Length of the stream.
    speed : float, optional
        Multiple of real time; None delivers as fast as chunks are taken.
    chunk_ms : float
    """

    def __init__(self, config: SimulationConfig, seconds: float, speed: float | None = None, chunk_ms: float = 1.0) -> None:
        recording = simulate_recording(config)
        n_channels, dtype = recording.probe.n_channels, recording.traces.dtype
        gain_uv, rate = np.full(n_channels, GAIN_UV, np.float32), config.sampling_frequency
        info = StreamInfo(config.probe_name, rate, n_channels, dtype, gain_uv, recording.probe, live=speed is not None)
        super().__init__(info, speed, chunk_ms)
        self._n_chunks = max(round(seconds * rate) // self._chunk_samples, 1)
        whole = len(recording.traces) // self._chunk_samples * self._chunk_samples
        self._rounds = recording.traces[:whole].reshape(-1, self._chunk_samples, n_channels)

    def _blocks(self) -> Iterator[NDArray[Any]]:
        return itertools.islice(itertools.cycle(self._rounds), self._n_chunks)
