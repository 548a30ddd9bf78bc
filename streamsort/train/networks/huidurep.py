"""HuiduRep: self-supervised spike embeddings (Cao, Feng, Shi & Zhang, AAAI 2026, arXiv 2507.17224), re-implemented from the paper.

Snippets (n, n_samples, n_neighbors) in noise units go in; 32 numbers per spike come out. In between: two convolutions along
time make one token per sample, fixed sinusoids are added, post-norm transformer layers mix the tokens, their mean is reduced to
32. For training only, a projector, a predictor and a slow copy of the encoder give the MoCo v3 contrastive loss, and a decoder
of the query tokens gives the denoising loss: `loss = contrastive + alpha * mse`.

Where the published code slips, this file decides:
- there, the convolutions are shared between encoder and momentum encoder; here the momentum copy is whole, as in MoCo v3;
- there, inference may pass snippets through a denoiser that no loss trains; here there is none, the DAE only shapes the
  encoder;
- there, gradients are clipped before they exist; here after `backward` (in `loop.py`);
- there, time jitter is always two samples; here spikes are aligned to their noisy trough (in `augment.py`).

Where the small preset departs from the paper, and why:
- one token per two samples and 3 layers instead of 16: 3 million multiply-adds per spike, what one CPU core has time for;
- the contrastive space has 32 dimensions instead of 5, and the temperature is 0.1 instead of 0.2: negatives are units of the
  same peak channel, and in a small or soft space the many easy negatives outweigh the few hard ones;
- no dropout: spikes are never repeated, so nothing can be overfitted.
"""

import copy
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class HuiduRepConfig:
    """Shape and loss of a HuiduRep; the defaults are the small preset."""

    n_samples: int = 48
    n_neighbors: int = 11
    n_dims: int = 32
    d_model: int = 64
    n_heads: int = 4
    d_ff: int = 128
    n_layers: int = 3
    stride: int = 2  # of the second convolution
    dropout: float = 0.0
    projection_hidden: int = 256
    projection_dims: int = 32
    decoder_layers: int = 1
    temperature: float = 0.1
    momentum: float = 0.99
    alpha: float = 0.2


PRESETS = {
    "small": HuiduRepConfig(),
    "paper": HuiduRepConfig(n_layers=16, stride=1, dropout=0.1, projection_dims=5, decoder_layers=4, temperature=0.2),
}


class Layer(nn.Module):
    """One post-norm transformer layer: attention, add, norm; ReLU feed-forward, add, norm."""

    def __init__(self, config: HuiduRepConfig) -> None:
        super().__init__()
        d = config.d_model
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.feed_forward = nn.Sequential(
            nn.Linear(d, config.d_ff), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(config.d_ff, d)
        )
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        n, n_tokens, d = x.shape
        q, k, v = self.qkv(x).view(n, n_tokens, 3, self.n_heads, d // self.n_heads).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = self.norm1(x + self.dropout(self.out(attended.transpose(1, 2).reshape(n, n_tokens, d))))
        normed: Tensor = self.norm2(x + self.dropout(self.feed_forward(x)))
        return normed


def sinusoids(n_tokens: int, d_model: int) -> Tensor:
    """Make the fixed positional encoding, (n_tokens, d_model)."""
    angles = torch.arange(n_tokens)[:, None] * torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(n_tokens, d_model)


class Encoder(nn.Module):
    """Snippets (n, n_samples, n_neighbors) to embeddings (n, n_dims): what is exported."""

    positions: Tensor

    def __init__(self, config: HuiduRepConfig) -> None:
        super().__init__()
        d = config.d_model
        self.tokenise = nn.Sequential(
            nn.Conv1d(config.n_neighbors, d, 5, padding=2),
            nn.ReLU(),
            nn.Conv1d(d, d, 3, padding=1, stride=config.stride),
            nn.ReLU(),
        )
        n_tokens = (config.n_samples - 1) // config.stride + 1
        self.register_buffer("positions", sinusoids(n_tokens, d), persistent=False)
        self.layers = nn.Sequential(*[Layer(config) for _ in range(config.n_layers)])
        self.reduce = nn.Linear(d, config.n_dims)

    def tokens(self, snippets: Tensor) -> Tensor:
        """Return what the decoder sees: (n, n_tokens, d_model)."""
        tokens: Tensor = self.layers(self.tokenise(snippets.transpose(1, 2)).transpose(1, 2) + self.positions)
        return tokens

    def pool(self, tokens: Tensor) -> Tensor:
        embedding: Tensor = self.reduce(tokens.mean(dim=1))
        return embedding

    def forward(self, snippets: Tensor) -> Tensor:
        return self.pool(self.tokens(snippets))


def _mlp(*sizes: int) -> nn.Sequential:
    """Stack linear layers with batch norm and ReLU between them and nothing after the last."""
    blocks: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes[:-1]):
        blocks += [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU()]
    return nn.Sequential(*blocks, nn.Linear(sizes[-2], sizes[-1]))


class HuiduRep(nn.Module):
    """The encoder with all that is needed to train it; `forward` returns the losses."""

    def __init__(self, config: HuiduRepConfig) -> None:
        super().__init__()
        self.config = config
        hidden, out = config.projection_hidden, config.projection_dims
        self.encoder = Encoder(config)
        self.projector = _mlp(config.n_dims, hidden, hidden, out)
        self.predictor = _mlp(out, hidden, out)
        self.decoder = nn.Sequential(
            *[Layer(config) for _ in range(config.decoder_layers)], nn.Linear(config.d_model, config.stride * config.n_neighbors)
        )
        self.slow_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.slow_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, view1: Tensor, view2: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Compute both losses of a batch of positive pairs.

        Parameters
        ----------
        view1, view2 : Tensor, shape (n, n_samples, n_neighbors)
            Two spikes of the same unit, row by row; every other row is another unit.
        clean : Tensor, shape (n, n_samples, n_neighbors)
            The noiseless spike of each row's unit.

        Returns
        -------
        contrastive, reconstruction : Tensor, scalar
            Symmetric InfoNCE, and the mean squared error of `clean` decoded from view 1; `alpha` is not applied.
        """
        n = len(view1)
        tokens = self.encoder.tokens(torch.cat([view1, view2]))
        queries = F.normalize(self.predictor(self.projector(self.encoder.pool(tokens))), dim=1)
        with torch.no_grad():
            keys = F.normalize(self.slow_projector(self.slow_encoder(torch.cat([view1, view2]))), dim=1)
        target = torch.arange(n, device=view1.device)
        temperature = self.config.temperature
        one = F.cross_entropy(queries[:n] @ keys[n:].T / temperature, target)
        two = F.cross_entropy(queries[n:] @ keys[:n].T / temperature, target)
        decoded = self.decoder(tokens[:n]).reshape(n, -1, self.config.n_neighbors)[:, : self.config.n_samples]
        return 2 * temperature * (one + two), F.mse_loss(decoded, clean)

    @torch.no_grad()
    def update_slow(self) -> None:
        """Let the slow copies follow: slow = momentum * slow + (1 - momentum) * fast."""
        pairs = ((self.encoder, self.slow_encoder), (self.projector, self.slow_projector))
        for fast, slow in pairs:
            torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), 1 - self.config.momentum)
