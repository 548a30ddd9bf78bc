"""What is kept of the peaks that were seen; all of it bounded, however long or busy the stream is.

`Reservoir` is for calibration: a fair sample per channel, by reservoir sampling (Vitter's algorithm R, 1985) with a seeded
generator, so the same peaks give the same sample. `Memory` is for a refresh of the encoder: per prototype the latest snippets that
were surely its own, from which it is found again in another encoder's space; and all peaks of the last seconds, on which two
encoders are compared.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamsort.config import RefreshConfig
from streamsort.records import PEAK_DTYPE

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
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


class Member(NamedTuple):
    """A spike that was surely of its prototype: its whitened embedding, and its snippet in noise units; never written to."""

    sample_index: int
    white: Floats
    snippet: Floats


class Period(NamedTuple):
    """All peaks of one learning period, row by row, snippets in noise units; `unit` is what the embedding says it is."""

    peaks: NDArray[Any]
    unit: Ints
    published: Ints
    white: Floats
    snippets: Floats


class Memory:
    """Remember the recent past of a stream in one encoder's space; changed at learning boundaries only.

    Parameters
    ----------
    config : RefreshConfig
    sampling_frequency : float
        In Hz.
    members : mapping, optional
        To start from, as `members` gives them.
    """

    def __init__(
        self, config: RefreshConfig, sampling_frequency: float, members: Mapping[int, tuple[Member, ...]] | None = None
    ) -> None:
        self._capacity, self._most_peaks = config.snippets, config.replay_spikes
        self._replay_samples = round(config.replay_s * sampling_frequency)
        self._members = {serial: deque(kept, self._capacity) for serial, kept in (members or {}).items()}
        self._periods: deque[Period] = deque()
        self._n_peaks = 0

    def add_period(self, period: Period) -> None:
        """Take a period's peaks in and drop the oldest; the arrays are kept, not copied."""
        self._periods.append(period)
        self._n_peaks += len(period.peaks)
        oldest = int(period.peaks["sample_index"][-1]) - self._replay_samples
        while len(self._periods) > 1 and (self._n_peaks > self._most_peaks or self._periods[0].peaks["sample_index"][-1] < oldest):
            self._n_peaks -= len(self._periods.popleft().peaks)

    def add_members(self, serial: Ints, peaks: NDArray[Any], white: Floats, snippets: Floats, most: int = 1) -> None:
        """Keep up to `most` peaks of each prototype, evenly over the rows, and forget its oldest.

        One of each learning period is enough and makes a full store reach back over more than a burst. `serial` says for each row
        which prototype it surely belongs to, -1 for none.
        """
        order = np.flatnonzero(serial >= 0)
        order = order[np.argsort(serial[order], kind="stable")]
        names, starts, counts = np.unique(serial[order], return_index=True, return_counts=True)
        n = np.minimum(counts, min(most, self._capacity))
        nth = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        counts, starts, names, n = (np.repeat(column, n) for column in (counts, starts, names, n))
        rows = order[starts + (nth * counts + counts // 2) // n]
        for name, i, sample_index in zip(names.tolist(), rows.tolist(), peaks["sample_index"][rows].tolist(), strict=True):
            kept = self._members.setdefault(name, deque(maxlen=self._capacity))
            kept.append(Member(sample_index, white[i].copy(), snippets[i].copy()))

    def keep_only(self, serials: Iterable[int]) -> None:
        """Forget the members of prototypes that are no more."""
        self._members = {serial: self._members[serial] for serial in serials if serial in self._members}

    def members(self) -> dict[int, tuple[Member, ...]]:
        """Return the members of each prototype, oldest first, by its serial number."""
        return {serial: tuple(kept) for serial, kept in self._members.items()}

    def periods(self) -> tuple[Period, ...]:
        """Return the last periods, oldest first."""
        return tuple(self._periods)
