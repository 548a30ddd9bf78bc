"""The player's source: a recording without end, at the speed and with the faults of the phase that it is told to play.

The recording starts anew when it ends; `sample_index` goes on. A phase is taken up at the next chunk, and told of when it is over;
without one the recording goes on clean, in real time.
"""

import math
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.bench.faults import Disturbance, Faults
from streamsort.records import Chunk
from streamsort.sources import open_source
from streamsort.sources.pace import PacedSource


@dataclass(frozen=True)
class Phase:
    """A stretch of the stream.

    Attributes
    ----------
    seconds : float
        Its length, in time of the recording.
    speed : float
        Multiple of real time.
    faults : Faults
    seed : int
        Of the faults.
    burst : str, optional
        An .npy file, (n_samples, n_channels): what is added to the samples from the start on.
    """

    seconds: float
    speed: float = 1.0
    faults: Faults = field(default_factory=Faults)
    seed: int = 0
    burst: str | None = None


class Played(PacedSource):
    """Play a recording.

    Parameters
    ----------
    recording : str
    chunk_ms : float
    tell : callable
        Called with what was played and injected when a phase is over.
    """

    def __init__(self, recording: str, chunk_ms: float, tell: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(open_source(recording, speed=1.0).info, 1.0, chunk_ms)
        self._recording, self._tell = recording, tell
        self.phases: queue.SimpleQueue[Phase] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[Chunk]:
        rate = self.info.sampling_frequency
        sample_index, due, under_way = 0, 0.0, None
        for traces in self._blocks():
            due = due or time.monotonic()  # not before: reading the first chunk may take long
            if under_way is None and not self.phases.empty():
                under_way = _UnderWay(self.phases.get(), sample_index, due, rate)
            end_sample = sample_index + len(traces)
            due += len(traces) / (rate * (under_way.phase.speed if under_way else 1.0))
            chunk = Chunk(sample_index, traces, due - end_sample / rate, due)
            self._closed.wait(max(due + (under_way.delay_s(chunk) if under_way else 0.0) - time.monotonic(), 0.0))
            if self._closed.is_set():
                return
            if (sent := under_way.disturbed(chunk) if under_way else chunk) is not None:
                yield sent
            sample_index = end_sample
            if under_way and end_sample >= under_way.end_sample:
                self._tell(under_way.told(end_sample))
                if under_way.phase.speed > 1:  # which may have been too high to send at
                    due = max(due, time.monotonic())
                under_way = None

    def _blocks(self) -> Iterator[NDArray[Any]]:
        """Yield equal chunks for ever; what is left of a round when no whole chunk is left is not played."""
        while True:
            for chunk in open_source(self._recording, chunk_samples=self._chunk_samples):
                if chunk.n_samples == self._chunk_samples:
                    yield chunk.traces


class _UnderWay:
    """A phase from the sample on at which it was taken up."""

    def __init__(self, phase: Phase, from_sample: int, began: float, rate: float) -> None:
        self.phase = phase
        self.end_sample = from_sample + math.ceil(phase.seconds * rate)
        self._from_sample, self._began, self._rate = from_sample, began, rate
        burst = None if phase.burst is None else np.load(phase.burst, mmap_mode="r")
        self._disturbance = Disturbance(phase.faults, phase.seconds, phase.seed, burst)

    def delay_s(self, chunk: Chunk) -> float:
        return self._disturbance.delay_s(self._at_s(chunk))

    def disturbed(self, chunk: Chunk) -> Chunk | None:
        """Return what is sent of a chunk."""
        if self._disturbance.drops(chunk.n_samples, self._at_s(chunk)):
            return None
        traces = self._disturbance.change(chunk.traces, chunk.start_sample - self._from_sample)
        return Chunk(chunk.start_sample, traces, chunk.t_origin, chunk.t_acquired)

    def told(self, end_sample: int) -> dict[str, Any]:
        """Say what was played: samples, times on the host's clock, and what was injected."""
        return {
            "from_sample": self._from_sample,
            "to_sample": end_sample,
            "began": self._began,
            "ended": time.monotonic(),
            "speed": self.phase.speed,
            "injected": self._disturbance.injected,
            "fault_ends": [self._from_sample + round(end_s * self._rate) for end_s in self._disturbance.ends_s],
        }

    def _at_s(self, chunk: Chunk) -> float:
        return (chunk.end_sample - self._from_sample) / self._rate
