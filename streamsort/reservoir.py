"""What calibration keeps of the peaks it sees: a bounded, fair sample per channel.

Reservoir sampling (Vitter's algorithm R, 1985) with a seeded generator, so the same peaks give the same sample. Memory is bounded
by the number of channels, not by how long or how busy the calibration is.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.records import PEAK_DTYPE

Floats = NDArray[np.float32]
Row = tuple[Any, Floats, Floats]


class Reservoir:
    """Keep up to `capacity` peaks of each channel with embedding and snippet.

    Parameters
    ----------
    n_channels, n_dims : int
    snippet_shape : tuple of int
        (n_snippet_samples, n_neighbors).
    seed : int
    capacity : int, optional
        Peaks per channel; by default 1500, less on large probes so that at most 60,000 snippets (130 MB) are kept.
    """

    def __init__(
        self, n_channels: int, n_dims: int, snippet_shape: tuple[int, int], seed: int, capacity: int | None = None
    ) -> None:
        self._n_dims, self._snippet_shape = n_dims, snippet_shape
        self._capacity = capacity or int(np.clip(60_000 // n_channels, 150, 1500))
        self._rng = np.random.default_rng(seed)
        self._rows: list[list[Row]] = [[] for _ in range(n_channels)]
        self._n_seen = [0] * n_channels

    def add(self, peaks: NDArray[Any], embeddings: Floats, snippets: Floats) -> None:
        """Take peaks in; `embeddings` and `snippets` (noise units) are row by row theirs."""
        for peak, embedding, snippet in zip(peaks, embeddings, snippets, strict=True):
            channel = int(peak["channel"])
            rows = self._rows[channel]
            self._n_seen[channel] += 1
            if len(rows) < self._capacity:
                rows.append((peak.copy(), embedding.copy(), snippet.copy()))
                continue
            place = int(self._rng.integers(self._n_seen[channel]))
            if place < self._capacity:
                rows[place] = (peak.copy(), embedding.copy(), snippet.copy())

    def take(self) -> tuple[NDArray[Any], Floats, Floats]:
        """Return peaks, embeddings and snippets in order of (sample_index, channel), and forget them."""
        rows = [row for channel in self._rows for row in channel]
        self._rows = [[] for _ in self._rows]
        peaks = np.array([row[0] for row in rows], PEAK_DTYPE)
        embeddings = np.array([row[1] for row in rows], np.float32).reshape(len(rows), self._n_dims)
        snippets = np.array([row[2] for row in rows], np.float32).reshape(len(rows), *self._snippet_shape)
        order = np.lexsort((peaks["channel"], peaks["sample_index"]))
        return peaks[order], embeddings[order], snippets[order]
