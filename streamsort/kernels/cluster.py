"""The compiled loops of assignment: nearest prototype and its running update.

In come whitened embeddings and the prototype store's arrays, out go indices, distances and posteriors in arrays the caller
allocated. A spike is compared only with the prototypes on its own peak channel, so its cost does not grow with the probe.
"""

import numpy as np
from numpy.typing import NDArray

from streamsort.kernels import Floats, kernel

Ints = NDArray[np.int64]


@kernel
def rotate_rows(embeddings: Floats, whitening: Floats, white: Floats) -> None:
    """Multiply each row by `whitening`. Unlike with BLAS, a row's bits do not depend on how many rows there are."""
    for i in range(len(embeddings)):
        white[i] = 0
        for j in range(whitening.shape[0]):
            for k in range(whitening.shape[1]):
                white[i, k] += embeddings[i, j] * whitening[j, k]


@kernel
def assign_nearest(
    white: Floats,
    channel: Ints,
    table: NDArray[np.int32],
    mean: Floats,
    spread: Floats,
    log_weight: Floats,
    unit: Ints,
    scores: Floats,
    prototype: Ints,
    distance: Floats,
    confidence: Floats,
) -> None:
    """Find each embedding's most probable prototype among those on its channel.

    Prototypes are Gaussians of covariance `spread` times identity in whitened space, weighted by how many spikes they had.
    `prototype` is -1 where the channel has none; `distance` is the squared distance over spread, so about n_dims for a member;
    `confidence` the posterior of the prototype's unit. Of equal scores the first in `table` wins. `scores` is scratch as wide as
    `table`.
    """
    n_dims = white.shape[1]
    for i in range(len(white)):
        candidates = table[channel[i]]
        best, best_score = -1, -np.inf
        n_candidates = 0
        for p in candidates:
            if p < 0:
                break
            squared = np.float32(0)
            for j in range(n_dims):
                step = white[i, j] - mean[p, j]
                squared += step * step
            z = squared / spread[p]
            score = np.float32(-0.5) * (z + n_dims * np.log(spread[p])) + log_weight[p]
            scores[n_candidates] = score
            n_candidates += 1
            if score > best_score:
                best, best_score, distance[i] = p, score, z
        prototype[i] = best
        if best < 0:
            distance[i], confidence[i] = np.inf, 0
            continue
        total, ours = 0.0, 0.0
        for k in range(n_candidates):
            weight = np.exp(scores[k] - best_score)
            total += weight
            if unit[candidates[k]] == unit[best]:
                ours += weight
        confidence[i] = ours / total


@kernel
def follow(
    white: Floats,
    snippets: Floats,
    prototype: Ints,
    slowest: float,
    n_spikes: Ints,
    mean: Floats,
    spread: Floats,
    template: Floats,
) -> None:
    """Move each prototype towards the spikes it was given, in order, by 1/n until n reaches 1/slowest, then by `slowest`.

    Rows with `prototype` -1 teach nothing.
    """
    n_dims = white.shape[1]
    for i in range(len(white)):
        p = prototype[i]
        if p < 0:
            continue
        n_spikes[p] += 1
        rate = np.float32(max(1.0 / n_spikes[p], slowest))
        squared = np.float32(0)
        for j in range(n_dims):
            step = white[i, j] - mean[p, j]
            squared += step * step
            mean[p, j] += rate * step
        spread[p] += rate * (squared / n_dims - spread[p])
        for t in range(snippets.shape[1]):
            for k in range(snippets.shape[2]):
                template[p, t, k] += rate * (snippets[i, t, k] - template[p, t, k])


@kernel
def compare_templates(a: Floats, b: Floats, columns: NDArray[np.int32], max_lag: int, differences: Floats, energies: Floats) -> int:
    """Compare two templates at each lag from -max_lag to max_lag on the channels they share.

    `columns` says for each column of `a` which column of `b` is the same channel, -1 for none. `differences` gets the energy of the
    difference, `energies` the mean of both energies over the rows that overlap. Returns the number of shared columns.
    """
    n_rows, n_shared = len(a), 0
    for k in range(len(columns)):
        n_shared += columns[k] >= 0
    for i in range(2 * max_lag + 1):
        lag = i - max_lag
        difference, energy = np.float32(0), np.float32(0)
        for t in range(max(lag, 0), n_rows + min(lag, 0)):
            for k in range(len(columns)):
                if columns[k] >= 0:
                    u, v = a[t, k], b[t - lag, columns[k]]
                    difference += (u - v) * (u - v)
                    energy += u * u + v * v
        differences[i], energies[i] = difference, np.float32(0.5) * energy
    return n_shared
