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
_MIN_KEY, _MAX_KEY = np.int32(-(2**31)), np.int32(2**31 - 1)


@kernel
def preprocess_rows(
    raw: NDArray[Any],
    limits: NDArray[Any],
    fault: int,
    channels: Floats,
    sections: Floats,
    state: Floats,
    reference: int,
    spread: float,
    scratch: Floats,
    hits: NDArray[np.int64],
    out: Floats,
    unusable: NDArray[np.uint8],
) -> int:
    """Scale, fill, band-pass and reference raw samples, all steps on one row before the next.

    Parameters
    ----------
    raw : ndarray, shape (n_samples, n_channels), int16 or float32
        Read-only.
    limits : ndarray, shape (2,), dtype of raw
        Lowest and highest usable value.
    fault : int
        What a value beyond them is: NONFINITE (the last good one takes its place) or SATURATED (it is used as it is).
    channels : ndarray, shape (5, n_channels)
        Rows GAIN (uV per unit), BASE (first good value since a reset), LAST (last good value), PRIMED (1 once there is a BASE) and
        GOOD (1 or 0); BASE, LAST and PRIMED are changed in place.
    sections : ndarray, shape (n_sections, 6)
        Two or more second-order sections as of `scipy.signal.butter`.
    state : ndarray, shape (2 * n_sections, n_channels)
        Two values per section, changed in place.
    reference : int
        REFERENCE_NONE, _MEAN or _MEDIAN over the channels marked GOOD; the others come out as zero.
    spread : float
        Typical magnitude of the traces in uV: sets the first step of the search for the median, not its result.
    scratch : ndarray, shape (2, n_channels)
        Overwritten. It is faster when this, `channels` and `state` start at 64-byte boundaries.
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
    base, gain, last, good = channels[BASE], channels[GAIN], channels[LAST], channels[GOOD]
    row, keys = scratch[0], scratch[1].view(np.int32)
    # Made once: a slice per row would cost as much as a dozen channels.
    first, second, z0, z1, z2, z3 = sections[0], sections[1], state[0], state[1], state[2], state[3]
    n_good = 0
    for c in range(good.size):
        n_good += good[c] > _ZERO
    n_unusable, n_unprimed, clean, middle = 0, 1, False, _ZERO
    for i in range(raw.shape[0]):
        if n_unprimed > 0:
            n_unprimed = _prime(raw[i], limits, fault, base, channels[PRIMED])
        was_clean, clean = clean, _all_usable(raw[i], limits[0], limits[1])
        unusable[i] = 0
        if clean:
            _load_and_filter(raw[i], base, gain, first, second, z0, z1, z2, z3, row)
        else:
            if was_clean:  # until then nobody needs LAST
                _copy(raw[i - 1], last)
            unusable[i] = _hold(raw[i], limits, fault, good, last, hits)
            n_unusable += unusable[i] > 0
            _load_and_filter(last, base, gain, first, second, z0, z1, z2, z3, row)
        for s in range(2, sections.shape[0]):
            _biquad(row, state[2 * s], state[2 * s + 1], sections[s])
        if reference == REFERENCE_MEDIAN:
            if n_good < good.size:
                _hide(row, good)
            middle = _median(row, n_good, middle, np.float32(spread), keys)
        elif reference == REFERENCE_MEAN:
            middle = _sum(row, good) / np.float32(n_good)
        _subtract(row, middle, good, out[i])
    if clean:
        _copy(raw[raw.shape[0] - 1], last)
    return n_unusable


@kernel
def _prime(raw: NDArray[Any], limits: NDArray[Any], fault: int, base: Floats, primed: Floats) -> int:
    """Take each channel's first good value as its base, so that an offset does not ring; return how many still wait for one."""
    n_unprimed = 0
    for c in range(base.size):
        if primed[c] == _ZERO:
            if fault == SATURATED or limits[0] <= raw[c] <= limits[1]:
                base[c], primed[c] = raw[c], _ONE
            else:
                n_unprimed += 1
    return n_unprimed


@kernel
def _all_usable(raw: NDArray[Any], low: Any, high: Any) -> bool:
    n_bad = np.int16(0)  # as narrow as the samples may be, or they would be compared at a quarter of the speed
    for c in range(raw.size):
        n_bad = np.int16(n_bad | (not (low <= raw[c] <= high)))
    return bool(n_bad == 0)


@kernel
def _hold(raw: NDArray[Any], limits: NDArray[Any], fault: int, good: Floats, last: Floats, hits: NDArray[np.int64]) -> int:
    """Take a sample that is not usable on some channel into `last`, good values only, and count it; return its bits."""
    bits = 0
    for c in range(raw.size):
        usable = limits[0] <= raw[c] <= limits[1]
        if usable or fault == SATURATED:
            last[c] = raw[c]
        if not usable and good[c] > _ZERO:
            bits = fault
            hits[c] += 1
    return bits


@kernel
def _copy(values: NDArray[Any], to: Floats) -> None:
    for c in range(to.size):
        to[c] = values[c]


@kernel
def _load_and_filter(
    raw: NDArray[Any],
    base: Floats,
    gain: Floats,
    first: Floats,
    second: Floats,
    z0: Floats,
    z1: Floats,
    z2: Floats,
    z3: Floats,
    row: Floats,
) -> None:
    """Scale a sample and advance the first two sections, one operation after the other as `_biquad` does, in one pass over them."""
    b0, b1, b2, a1, a2 = first[0], first[1], first[2], first[4], first[5]
    d0, d1, d2, c1, c2 = second[0], second[1], second[2], second[4], second[5]
    for c in range(row.size):
        x = (np.float32(raw[c]) - base[c]) * gain[c]
        y = b0 * x + z0[c]
        z0[c] = b1 * x - a1 * y + z1[c]
        z1[c] = b2 * x - a2 * y
        w = d0 * y + z2[c]
        z2[c] = d1 * y - c1 * w + z3[c]
        z3[c] = d2 * y - c2 * w
        row[c] = w


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
def _subtract(row: Floats, middle: np.float32, good: Floats, out: Floats) -> None:
    for c in range(row.size):
        out[c] = row[c] - middle if good[c] > _ZERO else _ZERO


@kernel
def _hide(row: Floats, good: Floats) -> None:
    """Put the channels that are not good above all others."""
    for c in range(row.size):
        row[c] = row[c] if good[c] > _ZERO else _INF


@reduction
def _sum(row: Floats, good: Floats) -> np.float32:
    total = _ZERO
    for c in range(row.size):
        total += row[c] * good[c]
    return total


@kernel
def _median(row: Floats, n_good: int, guess: np.float32, spread: np.float32, keys: Ints) -> np.float32:
    """Return the exact median of the lowest `n_good` values (the mean of the middle two if they are even in number).

    One vectorised pass says how many values lie below a bound and which are next to it on either side, so the median is bracketed
    by counts, starting from `guess`, until a bound falls between the right two. The result does not depend on `guess` or `spread`,
    only the number of passes does.
    """
    half = (n_good + 1) // 2  # so many values are at most the median, or the lower of the middle two
    step = spread * np.float32(2.5) / np.float32(n_good)  # uV per rank at the centre of a normal distribution
    least, most, n_below, n_through = _MIN_KEY, _MAX_KEY, 0, n_good  # keys at least and at most as large as that value
    attempt, n = 0, _to_keys(row.view(np.int32), keys, _key(guess))
    bound = _key(guess + (np.float32(half - n) - _HALF) * step)
    while least < most:
        attempt += 1
        n, below, above = _around(keys, bound)
        if n == half:
            return np.float32(_value(below) if n_good % 2 else _HALF * (_value(below) + _value(above)))
        if n < half:
            least, n_below = above, n
        else:
            most, n_through = below, n
        if n == half - 1:
            bound = np.int32(above + 1)
        elif n == half + 1:
            bound = below
        elif attempt % 4 == 0:
            bound = np.int32((np.int64(least) + np.int64(most) + 1) >> 1)
        elif least == _MIN_KEY or most == _MAX_KEY:
            bound = _key(_value(below if n > half else above) + (np.float32(half - n) - _HALF) * step * np.float32(attempt))
        else:
            part = (np.float32(half - n_below) - _HALF) / np.float32(n_through - 1 - n_below)
            bound = _key(_value(least) + (_value(most) - _value(least)) * part)
        bound = max(np.int32(least + 1), min(bound, most))  # every attempt narrows the bracket
    return np.float32(_value(least))


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
def _to_keys(bits: Ints, keys: Ints, bound: np.int32) -> np.int32:
    """Write the key of every value; return how many lie below a bound."""
    n = np.int32(0)  # a numba int would be 64 bits wide and halve the speed
    for c in range(bits.size):
        key = bits[c] if bits[c] >= 0 else np.int32(bits[c] ^ _MAX_KEY)
        keys[c] = key
        n = np.int32(n + (key < bound))
    return n


@kernel
def _around(keys: Ints, bound: np.int32) -> tuple[np.int32, np.int32, np.int32]:
    """Return how many keys lie below a bound, the largest of these, and the smallest of the others."""
    n, below, above = np.int32(0), _MIN_KEY, _MAX_KEY
    for c in range(keys.size):
        is_below = keys[c] < bound
        n = np.int32(n + is_below)
        below = max(below, keys[c] if is_below else _MIN_KEY)
        above = min(above, _MAX_KEY if is_below else keys[c])
    return n, below, above


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
