"""The compiled loops of learning: which spikes overlap none larger, what each teaches its unit, how alike units and spikes are.

A period's spikes come in with their clean snippets, each on the channels on which its unit is known, and are compared with what is
near them, so that none costs more on a larger probe. Templates come as a named tuple of arrays (`templates.Templates`).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.kernels import Floats, kernel, reduction

Reals = NDArray[np.float64]
Tuple = Any  # a named tuple of arrays; numba reads its fields


@kernel
def find_alone(sample_index: Any, row: Any, t: Tuple, alone: Any) -> None:
    """Tell which spikes, in order of time, overlap none of as much energy or more on shared channels."""
    n_samples = t.filters.shape[1]
    first = 0
    for k in range(len(row)):
        alone[k] = True
        while sample_index[first] < sample_index[k] - n_samples:
            first += 1
        for i in range(first, k):
            for rival in t.rivals[row[k]]:
                if rival == row[i]:
                    alone[i] &= t.energy[row[k]] < t.energy[row[i]]
                    alone[k] &= t.energy[row[i]] < t.energy[row[k]]


@kernel
def teach(
    snippets: Floats,
    chosen: Any,
    row: Any,
    too_large: Floats,
    t: Tuple,
    limits: tuple[float, float, float],
    n_spikes: Any,
    speed: Any,
    news: Any,
    means: Floats,
    errors: Floats,
) -> None:
    """Let each of the chosen snippets in turn teach its unit, `row`, at the unit's own speed.

    `too_large` of its template in each is not its own. The speed, within the first two of `limits`, changes by e to the third when
    two errors in a row are the same. `errors` holds each unit's last one, on as many of its largest channels as count.
    """
    slowest, fastest, eagerness = limits
    middle = t.shifted.shape[1] // 2
    for i in range(len(row)):
        u = row[i]
        snippet, mean, excess = snippets[chosen[i]], means[u], too_large[i]
        both, mine, its = 0.0, 0.0, 0.0
        for m in range(errors.shape[1]):
            if t.channels[u, m] < 0:
                break
            k = np.searchsorted(t.around[u], t.channels[u, m])
            for j in range(errors.shape[2]):
                error, last = snippet[k, j] - excess * t.shifted[u, middle, j, m] - mean[k, j], errors[u, m, j]
                both += error * last
                mine += error * error
                its += last * last
                errors[u, m, j] = error
        n_spikes[u] += 1
        speed[u] = min(max(speed[u] * np.exp(eagerness * both / np.sqrt(mine * its + 1e-12)), slowest), fastest)
        rate = np.float32(max(speed[u], 1 / n_spikes[u]))
        news[u] += rate
        for k in range(len(mean)):
            for j in range(mean.shape[1]):
                mean[k, j] += rate * (snippet[k, j] - mean[k, j])
        for m in range(t.channels.shape[1]):
            if t.channels[u, m] < 0:
                break
            line = mean[np.searchsorted(t.around[u], t.channels[u, m])]
            for j in range(len(line)):
                line[j] -= rate * excess * t.shifted[u, middle, j, m]


@kernel
def multiply(t: Tuple, others: Tuple, products: Reals) -> None:
    """Score each unit's filter where each of the others' means lies, (n_units, n_others); 0 if they share no channel."""
    middle = others.shifted.shape[1] // 2
    for u in range(len(t.energy)):
        for v in range(len(others.energy)):
            product = 0.0
            for k in range(t.channels.shape[1]):
                c = t.channels[u, k]
                if c < 0:
                    break
                m = others.place[v, c]
                if m >= 0:
                    for j in range(t.filters.shape[1]):
                        product += t.filters[u, j, k] * others.shifted[v, middle, j, m]
            products[u, v] = product


@kernel
def slide(t: Tuple, a: int, b: int, products: Reals) -> None:
    """Score the filter of unit `a` where the mean of unit `b` is late by each of as many lags as `products` has, about 0."""
    n_samples, middle, max_lag = t.filters.shape[1], t.shifted.shape[1] // 2, len(products) // 2
    for k in range(t.channels.shape[1]):
        c = t.channels[a, k]
        if c < 0:
            break
        m = t.place[b, c]
        if m < 0:
            continue
        for i in range(len(products)):
            lag = i - max_lag
            for j in range(max(-lag, 0), n_samples - max(lag, 0)):
                products[i] += t.filters[a, j, k] * t.shifted[b, middle, j + lag, m]


@kernel
def compare_spikes(
    place: Reals,
    home_um: Reals,
    shape: Floats,
    spread: Floats,
    kept_place: Reals,
    kept_shape: Floats,
    limits: tuple[int, float, float],
    alike: Reals,
) -> None:
    """Add up, for each spike and each displacement to the whole um, how like the kept spikes are that would explain it.

    `home_um` is where along y each would be without further displacement; kept spikes are in order of y. Of `limits` the first is
    the farthest displacement, the second the squared distance of waveforms that noise alone makes, to be exceeded by `spread`, the
    third the standard deviation across the probe. `alike` (n_spikes, n_displacements) is added to.
    """
    reach, usual, across_um = limits
    for i in range(len(place)):
        for k in range(np.searchsorted(kept_place[:, 1], home_um[i] - reach - 1), len(kept_place)):
            apart = home_um[i] - kept_place[k, 1]
            if apart > reach:
                continue
            if apart < -reach:
                break
            excess = max(squared_distance(shape[i], kept_shape[k]) - usual, 0.0)
            across = (place[i, 0] - kept_place[k, 0]) / across_um
            alike[i, round(apart) + reach] += np.exp(-0.5 * excess / spread[i] - 0.5 * across * across)


@reduction
def squared_distance(a: Floats, b: Floats) -> np.float32:
    """Return the squared distance of two rows."""
    total = np.float32(0)
    for j in range(len(a)):
        total += (a[j] - b[j]) * (a[j] - b[j])
    return total
