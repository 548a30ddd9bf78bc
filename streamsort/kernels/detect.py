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
    a, b, n_peaks = polarity[0], polarity[1], 0
    for s in range(first_row, last_row):
        if _count_beyond(traces, s, thresholds, a, b) == _ZERO:
            continue
        first, last = _candidate_span(traces, s, thresholds, a, b)
        for c in range(first, last + 1):
            value = max(a * traces[s, c], b * traces[s, c])
            if value >= thresholds[c] and _wins(traces, s, c, value, adjacency, sweep, a, b):
                near_gap = s + origin < settled
                for r in range(s - n_before, s + n_after):
                    near_gap |= unusable[r] != 0
                peaks[n_peaks].sample_index = s + origin
                peaks[n_peaks].channel = c
                peaks[n_peaks].flags = _NEAR_GAP if near_gap else 0
                peaks[n_peaks].amplitude_uv = traces[s, c]
                n_peaks += 1
    return n_peaks


@reduction
def _count_beyond(traces: Floats, s: int, thresholds: Floats, a: np.float32, b: np.float32) -> np.float32:
    n = _ZERO
    for c in range(thresholds.size):
        n += _ONE if max(a * traces[s, c], b * traces[s, c]) >= thresholds[c] else _ZERO
    return n


@kernel
def _candidate_span(traces: Floats, s: int, thresholds: Floats, a: np.float32, b: np.float32) -> tuple[np.int32, np.int32]:
    """Return the first and the last channel that is beyond its threshold at a turn in time; both conditions are necessary."""
    n_channels = np.int32(thresholds.size)
    first, last = n_channels, np.int32(-1)
    for c in range(n_channels):
        value = max(a * traces[s, c], b * traces[s, c])
        earlier, later = max(a * traces[s - 1, c], b * traces[s - 1, c]), max(a * traces[s + 1, c], b * traces[s + 1, c])
        candidate = (value >= thresholds[c]) & (value > earlier) & (value >= later)
        first = min(first, np.int32(c) if candidate else n_channels)
        last = max(last, np.int32(c) if candidate else np.int32(-1))
    return first, last


@kernel
def _wins(traces: Floats, s: int, c: int, value: np.float32, adjacency: Ints, sweep: int, a: np.float32, b: np.float32) -> bool:
    """Look for a rival from the peak's row outwards, as most are close; earlier ones win ties, later ones lose them."""
    if _is_beaten(traces, s, c, value, adjacency, c, a, b):
        return False
    for d in range(1, sweep + 1):
        if _is_beaten(traces, s - d, c, value, adjacency, traces.shape[1], a, b):
            return False
        if _is_beaten(traces, s + d, c, value, adjacency, 0, a, b):
            return False
    return True


@kernel
def _is_beaten(
    traces: Floats, r: int, c: int, value: np.float32, adjacency: Ints, n_tied: int, a: np.float32, b: np.float32
) -> bool:
    """Say whether a channel near c has a larger value in row r, or the same one and an index below `n_tied`."""
    for k in range(adjacency.shape[1]):
        other = adjacency[c, k]
        if other < 0:
            break
        rival = max(a * traces[r, other], b * traces[r, other])
        if rival > value or (rival == value and other < n_tied):
            return True
    return False


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
