"""How well an encoder tells the held-out spikes of a session apart, by the rule of the live sorter.

A spike is given to the nearest unit mean among the units on its channel, after whitening with the spread within groups; means and
whitening come from the spikes that are not held out. Two figures: the share given to their own unit as they are (`own_unit`), and
made worse by noise and collisions (`own_unit_worn`). The session's units were named through the encoder in force, by spikes that it
was sure of: the first figure starts near 1 and flatters that encoder, the second leaves more to be won.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from streamsort.train.session_snippets import Floats, Ints, SessionSnippets, Views, Wear

WORN = Wear(noise=1.0, collision=0.5)
MOST_WORN = 4096
_RIDGE = 1e-3  # of the mean variance: directions in which nothing happens are not blown up
_EMBEDDED_AT_ONCE = 256


@dataclass(frozen=True)
class Figures:
    """Shares of spikes that have another unit on their channel; 1 where there are none such.

    `nearest` is the unit that each held-out spike, as it is, lies nearest to.
    """

    own_unit: float
    own_unit_worn: float
    nearest: Ints

    @property
    def score(self) -> float:
        """What decides: the mean of both shares."""
        return (self.own_unit + self.own_unit_worn) / 2

    def shares(self) -> dict[str, float]:
        return {"own_unit": round(self.own_unit, 4), "own_unit_worn": round(self.own_unit_worn, 4)}


class HeldOut:
    """The held-out spikes of a session, and worn copies of them; calling it with an encoder gives its figures.

    Parameters
    ----------
    data : SessionSnippets
    seed : int
        Of the wear.
    """

    def __init__(self, data: SessionSnippets, seed: int) -> None:
        self._data = data
        self._rows = np.flatnonzero(data.held_out)
        copied = np.tile(self._rows, int(np.clip(MOST_WORN // len(self._rows), 1, 8)))
        self._worn = Views(data, WORN).worn(np.random.default_rng((seed, 1)), copied)

    def __call__(self, encoder: nn.Module) -> Figures:
        """Score an encoder of snippets in noise units."""
        data = self._data
        learned = embed(encoder, data.snippets[~data.held_out])
        group = data.group[~data.held_out]
        white = whitening(learned, group)
        means = group_means(learned @ white, group)

        def named(snippets: Floats) -> Ints:
            return self._nearest(embed(encoder, snippets) @ white, means)

        nearest, worn = named(data.snippets[self._rows]), named(self._worn)
        return Figures(self._share(nearest), self._share(worn), nearest)

    def _nearest(self, embeddings: NDArray[np.float64], means: NDArray[np.float64]) -> Ints:
        """Name the unit of the nearest mean on each spike's channel; the rows are those held out, over and over."""
        data = self._data
        channel = np.tile(data.channel[data.group[self._rows]], len(embeddings) // len(self._rows))
        squares = np.square(embeddings).sum(axis=1)[:, None] + np.square(means).sum(axis=1) - 2 * embeddings @ means.T
        squares[channel[:, None] != data.channel] = np.inf
        nearest: Ints = data.unit[squares.argmin(axis=1)]
        return nearest

    def _share(self, nearest: Ints) -> float:
        data, n = self._data, len(nearest) // len(self._rows)
        own = np.tile(data.group[self._rows], n)
        contested = ((data.channel[:, None] == data.channel) & ~data.same_unit()).any(axis=1)[own]
        return float((nearest == data.unit[own])[contested].mean()) if contested.any() else 1.0


@torch.no_grad()
def embed(encoder: nn.Module, snippets: Floats) -> NDArray[np.float64]:
    """Embed snippets that are in noise units."""
    encoder.eval()
    starts = range(0, len(snippets), _EMBEDDED_AT_ONCE)
    parts = [encoder(torch.from_numpy(snippets[start : start + _EMBEDDED_AT_ONCE])) for start in starts]
    embeddings: NDArray[np.float64] = torch.cat(parts).double().numpy()
    return embeddings


def whitening(embeddings: NDArray[np.float64], group: Ints) -> NDArray[np.float64]:
    """Return the map that makes the pooled spread within groups white."""
    residuals = embeddings - group_means(embeddings, group)[group]
    covariance = residuals.T @ residuals / max(len(residuals) - int(group.max()) - 1, 1)
    values, vectors = np.linalg.eigh(covariance)
    white: NDArray[np.float64] = vectors / np.sqrt(np.maximum(values + _RIDGE * values.mean(), 1e-12)) @ vectors.T
    return white


def group_means(values: NDArray[np.float64], group: Ints) -> NDArray[np.float64]:
    """Average the rows of each group, 0 to the last one."""
    return np.stack([values[group == k].mean(axis=0) for k in range(int(group.max()) + 1)])
