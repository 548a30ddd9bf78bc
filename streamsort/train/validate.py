"""How well an embedding separates held-out units that share a peak channel, against the principal components of the same snippets.

Three figures are the share of spikes given to the right unit, mean over sites: by the 10 nearest other spikes (`knn`), by the
nearest unit mean (`centroid`), and by the nearest unit mean after one linear map has made the spread within units white (`lda`);
means and map come from every other spike. The fourth is told no labels: the adjusted Rand index of a Gaussian mixture with full
covariances and the true number of units, as HuiduRep is evaluated (`ari`). The principal components are fitted per site, as a
sorter would, which flatters them.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from threadpoolctl import threadpool_limits
from torch import nn

from streamsort.train.augment import Draw
from streamsort.train.data import N_SAMPLES, Floats, make_bank
from streamsort.train.scores import knn_accuracy, mixture_ari

N_UNITS, N_SPIKES = 8, 80
SEED = (2**31, 0)  # never the seed of a training bank
DRIFT_UM = 20.0
N_PLACES = 4  # that the spikes of the set `drift` come from
SETS = {"clean": (0.0, 1), "collisions": (0.3, 1), "drift": (0.0, N_PLACES)}  # share of collisions, and places of a unit


def centroid_accuracy(features: NDArray[np.float64], units: NDArray[np.int64], whiten: bool) -> float:
    """Return the share of odd-numbered spikes nearest to the mean of their unit's even-numbered ones."""
    learn = np.arange(len(units)) % 2 == 0
    means = np.stack([features[learn & (units == unit)].mean(axis=0) for unit in range(units.max() + 1)])
    test = features[~learn]
    if whiten:
        spread = np.cov((features[learn] - means[units[learn]]).T)
        ridge = 1e-3 * np.trace(spread) / len(spread) * np.eye(len(spread))
        root = np.linalg.cholesky(np.linalg.inv(spread + ridge))
        test, means = test @ root, means @ root
    distances = np.square(test[:, None] - means).sum(axis=-1)
    return float((distances.argmin(axis=1) == units[~learn]).mean())


def components(snippets: Floats, n: int) -> NDArray[np.float64]:
    """Project the snippets of one site on their own first `n` principal components."""
    flat = snippets.reshape(len(snippets), -1).astype(np.float64)
    flat -= flat.mean(axis=0)
    size = flat.shape[1]
    directions = eigh(flat.T @ flat, subset_by_index=(size - n, size - 1))[1]  # thrice as fast as an SVD
    projected: NDArray[np.float64] = flat @ directions[:, ::-1]
    return projected


_FIGURES: dict[str, Callable[[NDArray[np.float64], NDArray[np.int64]], float]] = {
    "knn": knn_accuracy,
    "centroid": functools.partial(centroid_accuracy, whiten=False),
    "lda": functools.partial(centroid_accuracy, whiten=True),
    "ari": mixture_ari,
}


class Validation:
    """A fixed set of held-out sites; calling it with an encoder gives its figures.

    Parameters
    ----------
    n_sites : int
        Peak channels, each with 8 units of SNR 4 to 15 and 80 spikes per unit: once clean, once with 30 % collisions, once from
        places up to 20 um away from the first, so up to 40 um from each other.
    n_samples : int
        Length of a snippet.
    """

    def __init__(self, n_sites: int = 24, n_samples: int = N_SAMPLES) -> None:
        bank = make_bank(SEED, n_sites, N_UNITS, (4.0, 15.0), n_places=N_PLACES, drift_um=DRIFT_UM, n_samples=n_samples)
        generator = torch.Generator().manual_seed(0)
        self.units = np.repeat(np.arange(N_UNITS), N_SPIKES)
        self.sets: dict[str, list[Floats]] = {}
        for name, (collision, n_places) in SETS.items():
            draw = Draw.of(bank, collision)
            places = torch.arange(len(self.units)) // 2 % n_places  # even- and odd-numbered spikes are from all of them
            units = torch.from_numpy(self.units)
            sites = (torch.full_like(units, site) for site in range(n_sites))
            self.sets[name] = [draw.spikes(generator, site, units, places).snippets.numpy() for site in sites]

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """Score an encoder (snippets to embeddings)."""
        was_training = encoder.training
        encoder.eval()
        device = next(encoder.parameters()).device

        def embed(snippets: Floats) -> NDArray[np.float64]:
            with torch.no_grad():
                embeddings: NDArray[np.float64] = encoder(torch.from_numpy(snippets).to(device)).double().cpu().numpy()
            return embeddings

        figures = self.score(embed)
        encoder.train(was_training)
        return figures

    def baseline(self, n_components: int) -> dict[str, float]:
        """Score the principal components of each site."""
        with threadpool_limits(1):
            return self.score(lambda snippets: components(snippets, n_components))

    def score(self, embed: Callable[[Floats], NDArray[np.float64]]) -> dict[str, float]:
        """Score any map from the snippets of a site to features."""
        figures = {}
        for name, sites in self.sets.items():
            features = [embed(snippets) for snippets in sites]
            with threadpool_limits(1):  # at this size two threads take up to twenty times as long as one
                for figure, measure in _FIGURES.items():
                    figures[f"{figure}_{name}"] = round(float(np.mean([measure(f, self.units) for f in features])), 4)
        return figures

    @staticmethod
    def say(figures: dict[str, float]) -> str:
        """Write the figures on one line."""
        return ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
