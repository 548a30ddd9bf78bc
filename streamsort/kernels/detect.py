"""The compiled loops of detection: which samples are peaks, and what lies around them.

In come rows of a rolling window of traces, out go peaks with absolute sample_index and their snippets, in arrays the caller
allocated. A row is first counted over, vectorised; only where something is beyond a threshold does a scalar search follow.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.kernels import Floats, Ints, kernel, reduction
from streamsort.records import Flag

_NEAR_GAP = int(Flag.NEAR_GAP)
_ZERO, _ONE = np.float32(0), np.float32(1)


@kernel
def find_peaks(
    traces: Floats,
    unusable: NDArray[np.uint8],
    first_row: int,
    last_row: int,
    thresholds: Floats,
    adjacency: Ints,
    polarity: Floats,
    spans: NDArray[np.int64],
    peaks: NDArray[Any],
) -> int:
    """Find the rows and channels that hold the extreme of their neighbourhood beyond the threshold.

    With v = max(polarity[0] * x, polarity[1] * x), sample s of channel c is a peak when v >= thresholds[c] and v is the largest
    among all samples s' with abs(s' - s) <= sweep and all channels c' in row c of `adjacency`, whether or not those are beyond a
    threshold or are themselves beaten by others. Of equal values the earlier sample wins, and at the same sample the lower channel.

    Parameters
    ----------
    traces : ndarray, shape (n_rows, n_channels)
        Rolling window; rows from `first_row - max(sweep, n_before)` to `last_row + max(sweep, n_after - 1) - 1` are read.
    unusable : ndarray, shape (n_rows,)
        Not 0 where a channel had no usable value.
    first_row, last_row : int
        Half-open range of rows in which peaks are looked for.
    thresholds : ndarray, shape (n_channels,)
        In uV, positive.
    adjacency : ndarray, shape (n_channels, n_adjacent)
        Channels among which one peak wins, padded with -1.
    polarity : ndarray, shape (2,)
        (-1, -1) for negative peaks, (1, 1) for positive ones, (-1, 1) for both.
    spans : ndarray, shape (5,)
        sweep, n_before, n_after, sample_index of row 0, sample_index from which on peaks are not near a gap.
    peaks : ndarray, shape (capacity,), PEAK_DTYPE
        Written in order of (sample_index, channel).

    Returns
    -------
    n_peaks : int
    """
    sweep, n_before, n_after, origin, settled = spans[0], spans[1], spans[2], spans[3], spans[4]
    n_peaks = 0
    for s in range(first_row, last_row):
        row = traces[s]
        if _count_beyond(row, thresholds, polarity[0], polarity[1]) == _ZERO:
            continue
        first, last = _candidate_span(traces[s - 1], row, traces[s + 1], thresholds, polarity[0], polarity[1])
        for c in range(first, last + 1):
            value = max(polarity[0] * row[c], polarity[1] * row[c])
            if value >= thresholds[c] and _wins(traces, s, c, value, adjacency, sweep, polarity):
                near_gap = s + origin < settled
                for r in range(s - n_before, s + n_after):
                    near_gap |= unusable[r] != 0
                peaks[n_peaks].sample_index = s + origin
                peaks[n_peaks].channel = c
                peaks[n_peaks].flags = _NEAR_GAP if near_gap else 0
                peaks[n_peaks].amplitude_uv = row[c]
                n_peaks += 1
    return n_peaks


@reduction
def _count_beyond(row: Floats, thresholds: Floats, a: np.float32, b: np.float32) -> np.float32:
    n = _ZERO
    for c in range(row.size):
        n += _ONE if max(a * row[c], b * row[c]) >= thresholds[c] else _ZERO
    return n


@kernel
def _candidate_span(
    before: Floats, row: Floats, after: Floats, thresholds: Floats, a: np.float32, b: np.float32
) -> tuple[np.int32, np.int32]:
    """Return the first and the last channel that is beyond its threshold at a turn in time; both conditions are necessary."""
    first, last = np.int32(row.size), np.int32(-1)
    for c in range(np.int32(row.size)):
        value, earlier, later = max(a * row[c], b * row[c]), max(a * before[c], b * before[c]), max(a * after[c], b * after[c])
        candidate = (value >= thresholds[c]) & (value > earlier) & (value >= later)
        first = min(first, np.int32(c) if candidate else np.int32(row.size))
        last = max(last, np.int32(c) if candidate else np.int32(-1))
    return first, last


@kernel
def _wins(traces: Floats, s: int, c: int, value: np.float32, adjacency: Ints, sweep: int, polarity: Floats) -> bool:
    a, b = polarity[0], polarity[1]
    for k in range(adjacency.shape[1]):
        other = adjacency[c, k]
        if other < 0:
            break
        for r in range(s - sweep, s + sweep + 1):
            rival = max(a * traces[r, other], b * traces[r, other])
            if rival > value or (rival == value and (r < s or (r == s and other < c))):
                return False
    return True


@kernel
def cut_snippets(traces: Floats, origin: int, peaks: NDArray[Any], neighbors: Ints, n_before: int, snippets: Floats) -> None:
    """Copy the samples around each peak on its neighbour channels.

    Parameters
    ----------
    traces : ndarray, shape (n_rows, n_channels)
        Rolling window.
    origin : int
        sample_index of its row 0.
    peaks : ndarray, shape (n_peaks,), PEAK_DTYPE
        Every snippet must lie within the window.
    neighbors : ndarray, shape (n_channels, n_neighbors)
        Padded with -1, which gives zeros.
    n_before : int
        Samples before the peak.
    snippets : ndarray, shape (n_peaks, n_snippet_samples, n_neighbors)
        Written.
    """
    for p in range(peaks.size):
        start = peaks[p].sample_index - origin - n_before
        channel = peaks[p].channel
        for i in range(snippets.shape[1]):
            for k in range(neighbors.shape[1]):
                other = neighbors[channel, k]
                snippets[p, i, k] = traces[start + i, other] if other >= 0 else _ZERO
