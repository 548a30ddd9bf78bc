"""What trains an encoder of any family: MoCo v3 (Chen, Xie & He, ICCV 2021) and a denoising decoder, as HuiduRep joins them.

Two spikes of the same unit, seen under different noise, collisions and displacement, shall have embeddings nearer to each other
than to those of any other unit in the batch; the other side of each comparison comes from a slow copy of the encoder. A decoder
rebuilds the clean spike from the encoder's tokens: `loss = contrastive + alpha * mse`.

What departs from the paper, and why. There, a projector takes the embedding to 5 dimensions, where unit vectors are compared, so
the space that is clustered is not the one that is trained. Here, by default, the embeddings themselves are compared, by half
the squared distance between them: the loss is then how surely a spike finds its unit among clusters of unit variance, which
is what the live sorter and a Gaussian mixture do with them. `compare = "projection"` is the paper's way, with a projector and a
predictor, at a lower temperature and in 32 dimensions, because our negatives are units of the same patch of a probe and
in a small or soft space the many easy ones outweigh the few hard ones.
"""

import copy
import itertools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamsort.train.networks import NetworkConfig, make_encoder
from streamsort.train.parallel import gather


@dataclass(frozen=True)
class HeadConfig:
    """Shape and loss of what is needed for training only."""

    compare: Literal["embedding", "projection"] = "embedding"
    projection_hidden: int = 256
    projection_dims: int = 32
    temperature: float = 0.1
    momentum: float = 0.99


def _mlp(*sizes: int) -> nn.Sequential:
    """Stack linear layers with batch norm and ReLU between them and nothing after the last."""
    blocks: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes[:-1]):
        blocks += [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU()]
    return nn.Sequential(*blocks, nn.Linear(sizes[-2], sizes[-1]))


class MoCo(nn.Module):
    """An encoder with all that is needed to train it; `forward` returns the losses."""

    def __init__(self, network: NetworkConfig, head: HeadConfig | None = None) -> None:
        super().__init__()
        self.head = head or HeadConfig()
        hidden, out = self.head.projection_hidden, self.head.projection_dims
        projects = self.head.compare == "projection"
        self.encoder = make_encoder(network)
        self.projector = _mlp(network.n_dims, hidden, hidden, out) if projects else nn.Identity()
        self.predictor = _mlp(out, hidden, out) if projects else nn.Identity()
        self.decoder = self.encoder.make_decoder()
        self.slow_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.slow_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, view1: Tensor, view2: Tensor, clean: Tensor, contrast: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Compute both losses of a batch of positive pairs.

        Parameters
        ----------
        view1, view2 : Tensor, shape (n, n_samples, n_neighbors)
            Two spikes of the same unit, row by row; every other row is another unit.
        clean : Tensor, shape (n, n_samples, n_neighbors)
            The noiseless spike of each row of view 1.
        contrast : bool
            Whether the contrastive loss is wanted; a third of the time goes into it.

        Returns
        -------
        contrastive, reconstruction : Tensor, scalar
            Symmetric InfoNCE, and the mean squared error of `clean` decoded from view 1.
        embeddings : Tensor, shape (2 * n, n_dims)
            Of both views, for a teacher to compare its own with.
        """
        n = len(view1)
        views = torch.cat([view1, view2])
        tokens = self.encoder.tokens(views)
        embeddings = self.encoder.pool(tokens)
        contrastive = self._contrastive(views, embeddings) if contrast else embeddings.new_zeros(())
        return contrastive, F.mse_loss(self.decoder(tokens[:n]), clean), embeddings

    def _contrastive(self, views: Tensor, embeddings: Tensor) -> Tensor:
        n = len(views) // 2
        queries = self.predictor(self.projector(embeddings))
        with torch.no_grad():
            keys = self.slow_projector(self.slow_encoder(views))
        ones, start = gather(keys[:n])
        twos, _ = gather(keys[n:])
        target = start + torch.arange(n, device=views.device)
        one = F.cross_entropy(self._similarity(queries[:n], twos), target)
        two = F.cross_entropy(self._similarity(queries[n:], ones), target)
        return 2 * self.head.temperature * (one + two)

    def _similarity(self, queries: Tensor, keys: Tensor) -> Tensor:
        if self.head.compare == "embedding":
            return -0.5 * torch.cdist(queries.float(), keys.float()).square()
        return F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / self.head.temperature

    @torch.no_grad()
    def update_slow(self) -> None:
        """Let the slow copies follow: slow = momentum * slow + (1 - momentum) * fast."""
        slow: list[Tensor] = [*self.slow_encoder.parameters(), *self.slow_projector.parameters()]
        fast: list[Tensor] = [*self.encoder.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(slow, fast, 1 - self.head.momentum)
