"""How well features tell units apart: by neighbours, and by a mixture that is told no labels.

Shared by the validation of a training and by the benchmark of encoders, so that their figures mean the same. Needs scikit-learn,
not torch.
"""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture


def knn_accuracy(features: NDArray[np.floating[Any]], units: NDArray[np.int64], k: int = 10) -> float:
    """Return the share of spikes whose `k` nearest others are mostly of their own unit."""
    squares = np.square(features).sum(axis=1)
    distances = squares[:, None] + squares - 2 * features @ features.T
    np.fill_diagonal(distances, np.inf)
    nearest = units[np.argpartition(distances, k, axis=1)[:, :k]]
    known = np.unique(units)
    votes = (nearest[:, :, None] == known).sum(axis=1)
    return float((known[votes.argmax(axis=1)] == units).mean())


def mixture_ari(features: NDArray[np.floating[Any]], units: NDArray[np.int64], seed: int = 0) -> float:
    """Fit a mixture with the true number of units and the settings of the paper's code; return its adjusted Rand index."""
    n_units = len(np.unique(units))
    mixture = GaussianMixture(n_units, covariance_type="full", max_iter=100, tol=1e-4, n_init=1, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return float(adjusted_rand_score(units, mixture.fit_predict(features.astype(np.float64))))
