"""The light encoder: dense layers on the whole snippet, for what a laptop core has time for.

The full encoder spends its multiply-adds on mixing 48 tokens 16 times. A spike is aligned to its trough and its channels come in a
fixed order, so position need not be found out: a dense first layer can weigh each sample of each channel directly. Three
hidden layers are under a million multiply-adds, all of them matrix products that a core runs near its peak, and see fifty times
as many spikes per hour of training.
"""

import itertools
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class LightConfig:
    """Shape of a light encoder."""

    n_samples: int = 48
    n_neighbors: int = 11
    n_dims: int = 32
    hidden: tuple[int, ...] = (640, 640, 256)


class LightEncoder(nn.Module):
    """Snippets (n, n_samples, n_neighbors) to embeddings (n, n_dims): what is exported."""

    cpu_batch = 4  # spikes a run takes on a CPU: four take hardly longer than one, and a chunk of 1 ms rarely holds more

    def __init__(self, config: LightConfig) -> None:
        super().__init__()
        self.config = config
        sizes = (config.n_samples * config.n_neighbors, *config.hidden)
        blocks: list[nn.Module] = [nn.Flatten()]
        for n_in, n_out in itertools.pairwise(sizes):
            blocks += [nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.ReLU()]
        self.body = nn.Sequential(*blocks)
        self.reduce = nn.Linear(sizes[-1], config.n_dims)

    def tokens(self, snippets: Tensor) -> Tensor:
        """Return what the decoder sees: (n, hidden[-1])."""
        hidden: Tensor = self.body(snippets)
        return hidden

    def pool(self, tokens: Tensor) -> Tensor:
        embedding: Tensor = self.reduce(tokens)
        return embedding

    def forward(self, snippets: Tensor) -> Tensor:
        return self.pool(self.tokens(snippets))

    def make_decoder(self) -> nn.Module:
        """Make the network that the denoising loss trains: tokens to the clean snippet."""
        shape = (self.config.n_samples, self.config.n_neighbors)
        return nn.Sequential(nn.Linear(self.config.hidden[-1], shape[0] * shape[1]), nn.Unflatten(1, shape))
