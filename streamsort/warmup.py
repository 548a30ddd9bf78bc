"""The traces of the warm-up, kept until units are made of them.

In come batches, kept are their traces in noise units, as half-precision floats in stretches of a learning period: 60 s of 128
channels take 460 MB. Noise is 1 there and a spike a few hundred at most, so half precision costs a thousandth of a sample.
"""

from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from streamsort.noise import divisor
from streamsort.records import PeakBatch

Floats = NDArray[np.float32]
Stretch = tuple[int, Floats]

_MOST_SAMPLES = 7500  # of a stretch: what the matcher's window holds at once
_LARGEST = 60_000.0  # what half precision holds; only artifacts are larger


class Warmup(Sequence[Stretch]):
    """A sequence of stretches: first sample_index and traces (n_samples, n_channels) float32, in noise units, in order."""

    def __init__(self) -> None:
        self._stretches: list[tuple[int, NDArray[np.float16]]] = []
        self._open: list[NDArray[np.float16]] = []
        self._start = self._stop = 0
        self.channel_noise: Floats | None = None

    def add(self, batch: PeakBatch) -> None:
        """Keep a batch's traces, once the noise level is known; its first value is the unit of all."""
        if batch.channel_noise is None or not len(batch.traces):
            return
        if self.channel_noise is None:
            self.channel_noise = divisor(batch.channel_noise)
        if batch.start_sample != self._stop:
            self.close()
            self._start = batch.start_sample
        self._open.append(np.clip(batch.traces / self.channel_noise, -_LARGEST, _LARGEST).astype(np.float16))
        self._stop = batch.start_sample + len(batch.traces)

    def close(self) -> None:
        """End a stretch, as at a learning boundary."""
        if self._open:
            traces = np.concatenate(self._open)
            for first in range(0, len(traces), _MOST_SAMPLES):
                self._stretches.append((self._start + first, traces[first : first + _MOST_SAMPLES]))
            self._open = []
        self._start = self._stop

    def __len__(self) -> int:
        return len(self._stretches)

    @overload
    def __getitem__(self, index: int) -> Stretch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Stretch]: ...
    def __getitem__(self, index: int | slice) -> Stretch | Sequence[Stretch]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        start, traces = self._stretches[index]
        return start, traces.astype(np.float32)
