"""The compiled loops of preprocessing: fill, filter, reference, whitening.

In come contiguous arrays and constants, out go arrays that the caller allocated; all state is passed in and changed in place. Rows
are samples: the inner loops run over channels and are vectorised, while the recursion along time keeps one fixed order, so that any
chunking gives the same bits. A kernel and its callees share a file, because Numba's cache does not notice an edit in another one.
Fast math is allowed only in the reductions over one row, whose order does not depend on the chunk.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.kernels import Floats, Ints, kernel, reduction

# Rows of the `channels` table of `preprocess_rows`.
GAIN, BASE, LAST, PRIMED, GOOD = 0, 1, 2, 3, 4
N_CHANNEL_ROWS = 5

# Values of `reference`.
REFERENCE_NONE, REFERENCE_MEAN, REFERENCE_MEDIAN = 0, 1, 2

# Bits of `unusable`: what is wrong with a sample on at least one good channel.
NONFINITE, SATURATED = 1, 2

_ZERO, _HALF, _ONE, _INF = np.float32(0), np.float32(0.5), np.float32(1), np.float32(np.inf)
_MAX_KEY = np.int32(2**31 - 1)
_FEW = np.float32(4)  # so few values left between two bounds are cheaper walked than counted again
_MOST_COUNTS = 24


@kernel
def preprocess_rows(
    raw: NDArray[Any],
    limits: Floats,
    channels: Floats,
    sections: Floats,
    state: Floats,
    reference: int,
    spread: Floats,
    keys: Ints,
    hits: NDArray[np.int64],
    out: Floats,
    unusable: NDArray[np.uint8],
) -> int:
    """Scale, fill, band-pass and reference raw samples, all steps on one row before the next.

    Parameters
    ----------
    raw : ndarray, shape (n_samples, n_channels), int16 or float32
        Read-only.
    limits : ndarray, shape (3,)
        Lowest and highest value the converter can give, and the largest magnitude that counts as a number.
    channels : ndarray, shape (5, n_channels)
        Rows GAIN (uV per unit), BASE (first good value since a reset), LAST (last good value), PRIMED (1 once there is a BASE) and
        GOOD (1 or 0); BASE, LAST and PRIMED are changed in place.
    sections : ndarray, shape (n_sections, 6)
        Second-order sections as of `scipy.signal.butter`.
    state : ndarray, shape (2 * n_sections, n_channels)
        Two values per section, changed in place.
    reference : int
        REFERENCE_NONE, _MEAN or _MEDIAN over the channels marked GOOD; the others come out as zero.
    spread : ndarray, shape (1,)
        Typical magnitude of the traces in uV: sets the first step of the search for the median, not its result.
    keys : ndarray, shape (n_channels,)
        Scratch.
    hits : ndarray, shape (n_channels,)
        Incremented for every sample of a good channel that was not usable.
    out : ndarray, shape (n_samples, n_channels)
        Written: traces in uV.
    unusable : ndarray, shape (n_samples,)
        Written: bits NONFINITE and SATURATED.

    Returns
    -------
    n_unusable : int
        Samples with a bit set.
    """
    good = channels[GOOD]
    n_good = 0
    for c in range(good.size):
        n_good += good[c] > _ZERO
    n_unusable, n_unprimed, middle = 0, 1, _ZERO
    for i in range(raw.shape[0]):
        row = out[i]
        if n_unprimed > 0:
            n_unprimed = _prime(raw[i], limits[2], channels[BASE], channels[PRIMED])
        bad = _load_row(raw[i], limits[0], limits[1], limits[2], channels[GAIN], channels[BASE], channels[LAST], good, row)
        unusable[i] = _mark(raw[i], limits, good, hits) if bad else 0
        n_unusable += bad
        for s in range(sections.shape[0]):
            _biquad(row, state[2 * s], state[2 * s + 1], sections[s])
        if reference == REFERENCE_MEDIAN:
            middle = _median(row, good, n_good, middle, spread[0], keys)
        elif reference == REFERENCE_MEAN:
            middle = _sum(row, good) / np.float32(n_good)
        if n_good < good.size or reference != REFERENCE_NONE:
            _subtract(row, middle, good)
    return n_unusable


@kernel
def _prime(raw: NDArray[Any], limit: np.float32, base: Floats, primed: Floats) -> int:
    """Take each channel's first good value as its base, so that an offset does not ring; return how many still wait for one."""
    n_unprimed = 0
    for c in range(base.size):
        if primed[c] == _ZERO:
            value = np.float32(raw[c])
            if np.abs(value) <= limit:
                base[c], primed[c] = value, _ONE
            else:
                n_unprimed += 1
    return n_unprimed


@kernel
def _load_row(
    raw: NDArray[Any],
    low: np.float32,
    high: np.float32,
    limit: np.float32,
    gain: Floats,
    base: Floats,
    last: Floats,
    good: Floats,
    row: Floats,
) -> bool:
    """Write (raw - base) * gain, with the last good value where raw is not a number; say whether any good channel was unusable."""
    n_bad = 0
    for c in range(row.size):
        value = np.float32(raw[c])
        is_number = np.abs(value) <= limit
        n_bad += ((not is_number) | (value <= low) | (value >= high)) & (good[c] > _ZERO)
        held = value if is_number else last[c]
        last[c] = held
        row[c] = (held - base[c]) * gain[c]
    return n_bad > 0


@kernel
def _mark(raw: NDArray[Any], limits: Floats, good: Floats, hits: NDArray[np.int64]) -> int:
    """Return the bits of a sample that is not usable, and count it on the good channels concerned."""
    bits = 0
    for c in range(raw.size):
        if good[c] > _ZERO:
            value = np.float32(raw[c])
            if not np.abs(value) <= limits[2]:
                bits |= NONFINITE
                hits[c] += 1
            elif value <= limits[0] or value >= limits[1]:
                bits |= SATURATED
                hits[c] += 1
    return bits


@kernel
def _biquad(row: Floats, z0: Floats, z1: Floats, section: Floats) -> None:
    """Advance one second-order section by one sample on all channels, in place (transposed direct form II)."""
    b0, b1, b2, a1, a2 = section[0], section[1], section[2], section[4], section[5]
    for c in range(row.size):
        x = row[c]
        y = b0 * x + z0[c]
        z0[c] = b1 * x - a1 * y + z1[c]
        z1[c] = b2 * x - a2 * y
        row[c] = y


@kernel
def _subtract(row: Floats, middle: np.float32, good: Floats) -> None:
    for c in range(row.size):
        row[c] = row[c] - middle if good[c] > _ZERO else _ZERO


@reduction
def _sum(row: Floats, good: Floats) -> np.float32:
    total = _ZERO
    for c in range(row.size):
        total += row[c] * good[c]
    return total


@kernel
def _median(row: Floats, good: Floats, n_good: int, guess: np.float32, spread: np.float32, keys: Ints) -> np.float32:
    """Return the exact median of the good channels (the mean of the middle two if they are even in number).

    Counting how many values lie below a bound is one vectorised pass, so the median is bracketed by counts, starting from `guess`,
    and the last few values are walked. The result does not depend on `guess` or `spread`, only the number of passes does.
    """
    _to_keys(row.view(np.int32), good, keys)
    rank = np.float32((n_good - 1) // 2)
    low, high, n_low, n_high, bound = -_INF, _INF, _ZERO, np.float32(n_good), guess
    step = spread * np.float32(2.5) / np.float32(n_good)  # uV per rank at the centre of a normal distribution
    for attempt in range(_MOST_COUNTS):
        if n_high - n_low <= _FEW:
            break
        n = _count_below(keys, _key(bound))
        if n <= rank:
            low, n_low = bound, n
        else:
            high, n_high = bound, n
        if low == -_INF or high == _INF:
            bound += (rank + _HALF - n) * step * np.float32(1 + attempt)
        elif attempt % 4 == 3:
            bound = _HALF * (low + high)
        else:
            bound = low + (high - low) * ((rank + _HALF - n_low) / (n_high - n_low))
    key = _least(keys, _key(low))
    n, next_key = _count_through(keys, key), _least(keys, np.int32(key + 1))
    while n <= rank:
        key = next_key
        n, next_key = _count_through(keys, key), _least(keys, np.int32(key + 1))
    if n_good % 2 == 0 and n <= rank + _ONE:
        return np.float32(_HALF * (_value(key) + _value(next_key)))
    return np.float32(_value(key))


@kernel
def _key(value: np.float32) -> np.int32:
    """Map a float to an integer of the same order: minima of integers vectorise, those of floats do not (NaN)."""
    bits = np.float32(value).view(np.int32)
    return np.int32(bits if bits >= 0 else bits ^ _MAX_KEY)


@kernel
def _value(key: np.int32) -> np.float32:
    """Invert `_key`."""
    return np.int32(key if key >= 0 else key ^ _MAX_KEY).view(np.float32)


@kernel
def _to_keys(bits: Ints, good: Floats, keys: Ints) -> None:
    for c in range(bits.size):
        key = bits[c] if bits[c] >= 0 else np.int32(bits[c] ^ _MAX_KEY)
        keys[c] = key if good[c] > _ZERO else _MAX_KEY


@reduction
def _count_below(keys: Ints, bound: np.int32) -> np.float32:
    n = _ZERO  # counts in float32: a numba int would be 64 bits wide and halve the speed
    for c in range(keys.size):
        n += _ONE if keys[c] < bound else _ZERO
    return n


@reduction
def _count_through(keys: Ints, bound: np.int32) -> np.float32:
    n = _ZERO
    for c in range(keys.size):
        n += _ONE if keys[c] <= bound else _ZERO
    return n


@kernel
def _least(keys: Ints, bound: np.int32) -> np.int32:
    """Return the smallest key that is not below the bound."""
    least = _MAX_KEY
    for c in range(keys.size):
        least = min(least, keys[c] if keys[c] >= bound else _MAX_KEY)
    return least


@kernel
def whiten_rows(traces: Floats, table: Ints, weights: Floats, scratch: Floats) -> None:
    """Replace every channel by a weighted sum over its neighbourhood, in place.

    Parameters
    ----------
    traces : ndarray, shape (n_samples, n_channels)
        Changed in place.
    table : ndarray, shape (n_neighbors, n_channels)
        Channels of each neighbourhood, in the order in which they are added up; none is negative.
    weights : ndarray, shape (n_neighbors, n_channels)
        Their weights, 0 where there is no such neighbour.
    scratch : ndarray, shape (n_channels,)
        Overwritten.
    """
    for i in range(traces.shape[0]):
        row = traces[i]
        for c in range(row.size):
            scratch[c] = row[c]
            row[c] = _ZERO
        for k in range(table.shape[0]):
            _add_weighted(row, scratch, table[k], weights[k])


@kernel
def _add_weighted(row: Floats, values: Floats, channels: Ints, weights: Floats) -> None:
    for c in range(row.size):
        row[c] += values[channels[c]] * weights[c]
