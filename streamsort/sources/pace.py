"""Sources whose samples are there already, a file's or a simulation's, on an absolute schedule.

In comes an iterable of sample blocks, out come `Chunk`s: at once, or each when its last sample is due at `speed` times real time.
Due times are computed from the first one, so neither a late wake-up nor a slow consumer makes the schedule drift.
"""

import math
import time
from collections.abc import Iterable, Iterator
from threading import Event
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from streamsort.errors import StreamsortError
from streamsort.records import Chunk, StreamInfo


class PacedSource:
    """What such sources share; a child makes its samples in `_blocks`, in blocks of `_chunk_samples`.

    Parameters
    ----------
    info : StreamInfo
    speed : float or None
        Multiple of real time; None delivers as fast as chunks are taken, with `t_origin` 0.
    chunk_ms : float
    chunk_samples : int, optional
        The same in samples; wins over `chunk_ms`.

    Raises
    ------
    StreamsortError
        If speed or length are not positive numbers.
    """

    def __init__(self, info: StreamInfo, speed: float | None, chunk_ms: float, chunk_samples: int | None = None) -> None:
        self.info = info
        self.counters: dict[str, int] = {}
        self._speed = check_speed(speed)
        self._chunk_samples = chunk_length(info.sampling_frequency, chunk_ms, chunk_samples)
        self._closed = Event()

    def __iter__(self) -> Iterator[Chunk]:
        return paced_chunks(self._blocks(), self.info.sampling_frequency, self._speed, self._closed)

    def close(self) -> None:
        """End every iteration, also one that waits for its next chunk."""
        self._closed.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _blocks(self) -> Iterator[NDArray[Any]]:
        raise NotImplementedError


def check_speed(speed: float | None) -> float | None:
    """Return `speed`, or refuse what is not a positive multiple of real time."""
    if speed is not None and not (math.isfinite(speed) and speed > 0):
        raise StreamsortError(f"speed {speed:g}, expected a positive multiple of real time")
    return speed


def chunk_length(sampling_frequency: float, chunk_ms: float, chunk_samples: int | None = None) -> int:
    """Convert the wished chunk to samples, at least one.

    Raises
    ------
    StreamsortError
        If the length is not a positive number.
    """
    if chunk_samples is not None:
        if chunk_samples < 1:
            raise StreamsortError(f"chunk_samples {chunk_samples}, expected 1 or more")
        return int(chunk_samples)
    if not (math.isfinite(chunk_ms) and chunk_ms > 0):
        raise StreamsortError(f"chunk_ms {chunk_ms:g}, expected a positive number of ms")
    return max(round(chunk_ms * sampling_frequency / 1000), 1)


def paced_chunks(blocks: Iterable[NDArray[Any]], sampling_frequency: float, speed: float | None, closed: Event) -> Iterator[Chunk]:
    """Turn blocks of samples into chunks, each when its last sample is due.

    Parameters
    ----------
    blocks : iterable of ndarray, shape (n_samples, n_channels)
        Contiguous in time; one chunk is made of each.
    speed : float or None
        None yields at once with `t_origin` 0. Otherwise `t_origin` is such that the chunk's end falls on its due time, which at
        speed 1 dates every sample.
    closed : threading.Event
        Ends the iteration, also in the middle of a wait.
    """
    start_sample = 0
    t_origin = t_start = 0.0
    for traces in blocks:
        if start_sample == 0:
            t_start = time.monotonic()  # not before: making the first block may take long
        end_sample = start_sample + len(traces)
        if speed is not None:
            t_due = t_start + end_sample / (sampling_frequency * speed)
            t_origin = t_due - end_sample / sampling_frequency
            closed.wait(max(t_due - time.monotonic(), 0.0))
        if closed.is_set():
            return
        yield Chunk(start_sample, traces, t_origin, time.monotonic())
        start_sample = end_sample
