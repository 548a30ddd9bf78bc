"""A plane in which near neighbours stay near, to look at embeddings: exact t-SNE (van der Maaten & Hinton 2008).

For the report only, and small: a thousand points take some seconds and (n, n) arrays.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_PERPLEXITY = 25.0
_N_STEPS, _N_EXAGGERATED, _EXAGGERATION = 300, 100, 12.0
_N_BISECTIONS = 24


def neighbor_map(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lay points out in a plane.

    Parameters
    ----------
    features : ndarray, shape (n, n_dims)
        Compared by Euclidean distance; n of at least 4 times the perplexity (25) gives a sensible map.

    Returns
    -------
    points : ndarray, shape (n, 2)
        The same for the same features: it starts from their principal components.
    """
    x = (features - features.mean(axis=0)).astype(np.float32)
    affinity = _affinities(_squared_distances(x))
    y = x @ np.linalg.svd(x, full_matrices=False)[2][:2].T
    y *= 1e-2 / max(float(y[:, 0].std()), 1e-9)
    step, gain, rate = np.zeros_like(y), np.ones_like(y), np.float32(max(len(x) / _EXAGGERATION / 4, 50.0))
    affinity *= np.float32(_EXAGGERATION)
    for k in range(_N_STEPS):
        if k == _N_EXAGGERATED:
            affinity /= np.float32(_EXAGGERATION)
        gradient = _gradient(affinity, y)
        gain = np.maximum(np.where(gradient * step > 0, gain * np.float32(0.8), gain + np.float32(0.2)), np.float32(0.01))
        step = np.float32(0.5 if k < _N_EXAGGERATED else 0.8) * step - rate * gain * gradient
        y = y + step
        y -= y.mean(axis=0)
    points: NDArray[np.float64] = y.astype(np.float64)
    return points


def _squared_distances(x: Floats) -> Floats:
    squares = (x**2).sum(axis=1)
    distances: Floats = (-2 * x) @ x.T
    distances += squares
    distances += squares[:, None]
    return np.maximum(distances, 0, out=distances)


def _affinities(distances: Floats) -> Floats:
    """Find each point's kernel width by bisection of its entropy; return the symmetric joint probabilities."""
    n = len(distances)
    np.fill_diagonal(distances, np.inf)
    shifted = distances - distances.min(axis=1, keepdims=True)
    low, high = np.full((n, 1), 1e-6, np.float32), np.full((n, 1), 1e3, np.float32)
    for _ in range(_N_BISECTIONS):
        precision = np.sqrt(low * high)
        weight = np.exp(-shifted * precision)
        total = weight.sum(axis=1, keepdims=True)
        np.fill_diagonal(shifted, 0.0)
        entropy = np.log(total) + precision * (shifted * weight).sum(axis=1, keepdims=True) / total
        np.fill_diagonal(shifted, np.inf)
        too_wide = entropy > np.log(min(_PERPLEXITY, n / 4))
        low, high = np.where(too_wide, precision, low), np.where(too_wide, high, precision)
    conditional = weight / total
    joint: Floats = np.maximum((conditional + conditional.T) / (2 * n), 1e-12)
    return joint


def _gradient(affinity: Floats, y: Floats) -> Floats:
    across, along = y[:, 0, None] - y[:, 0], y[:, 1, None] - y[:, 1]
    across *= across
    along *= along
    kernel = across
    kernel += along
    kernel += 1
    np.reciprocal(kernel, out=kernel)
    np.fill_diagonal(kernel, 0.0)
    pull = kernel * np.float32(-1 / kernel.sum())
    pull += affinity
    pull *= kernel
    gradient: Floats = 4 * (pull.sum(axis=1)[:, None] * y - pull @ y)
    return gradient
