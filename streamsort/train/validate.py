"""How well an embedding separates held-out units that share a peak channel, against the principal components of the same snippets.

Three figures, each the share of spikes given to the right unit, mean over sites: by the 10 nearest other spikes (`knn`), by the
nearest unit mean (`centroid`), and by the nearest unit mean after one linear map has made the spread within units white
(`lda`); means and map come from every other spike. The principal components are fitted per site, as a sorter would, which
flatters them.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from streamsort.train.augment import draw_spikes
from streamsort.train.data import Floats, make_bank

N_UNITS, N_SPIKES = 8, 50
SEED = (2**31, 0)  # never the seed of a training bank


def knn_accuracy(features: NDArray[np.float64], units: NDArray[np.int64], k: int = 10) -> float:
    """Return the share of spikes whose `k` nearest others are mostly of their own unit."""
    squares = np.square(features).sum(1)
    distances = squares[:, None] + squares - 2 * features @ features.T
    np.fill_diagonal(distances, np.inf)
    nearest = units[np.argpartition(distances, k, axis=1)[:, :k]]
    votes = (nearest[:, :, None] == np.arange(units.max() + 1)).sum(axis=1)
    return float((votes.argmax(axis=1) == units).mean())


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
    projected: NDArray[np.float64] = flat @ np.linalg.svd(flat, full_matrices=False)[2][:n].T
    return projected


class Validation:
    """A fixed set of held-out sites; calling it with an encoder gives its figures.

    Parameters
    ----------
    n_sites : int
        Peak channels, each with 8 units of SNR 4 to 15 and 50 spikes per unit, once without and once with 30 % collisions.
    """

    def __init__(self, n_sites: int = 24) -> None:
        bank = make_bank(SEED, n_sites, N_UNITS, (4.0, 15.0))
        rng = np.random.default_rng(SEED)
        self.units = np.repeat(np.arange(N_UNITS), N_SPIKES)
        self.sets: dict[str, list[Floats]] = {"clean": [], "collisions": []}
        for site in range(n_sites):
            for name, collision in (("clean", 0.0), ("collisions", 0.3)):
                sites = np.full(len(self.units), site)
                self.sets[name].append(draw_spikes(bank, rng, sites, self.units, collision).snippets)

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """Score an encoder (snippets to embeddings)."""
        encoder.eval()
        device = next(encoder.parameters()).device

        def embed(snippets: Floats) -> NDArray[np.float64]:
            with torch.no_grad():
                embeddings: NDArray[np.float64] = encoder(torch.from_numpy(snippets).to(device)).double().cpu().numpy()
            return embeddings

        return self.score(embed)

    def baseline(self, n_components: int) -> dict[str, float]:
        """Score the principal components of each site."""
        return self.score(lambda snippets: components(snippets, n_components))

    def score(self, embed: Callable[[Floats], NDArray[np.float64]]) -> dict[str, float]:
        """Score any map from the snippets of a site to features."""
        figures = {}
        for name, sites in self.sets.items():
            features = [embed(snippets) for snippets in sites]
            figures[f"knn_{name}"] = float(np.mean([knn_accuracy(f, self.units) for f in features]))
            figures[f"centroid_{name}"] = float(np.mean([centroid_accuracy(f, self.units, whiten=False) for f in features]))
            figures[f"lda_{name}"] = float(np.mean([centroid_accuracy(f, self.units, whiten=True) for f in features]))
        return {key: round(value, 4) for key, value in figures.items()}

    @staticmethod
    def say(figures: dict[str, float]) -> str:
        """Write the figures on one line."""
        return ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
