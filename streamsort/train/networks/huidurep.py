"""HuiduRep: self-supervised spike embeddings (Cao, Feng, Shi & Zhang, AAAI 2026, arXiv 2507.17224), re-implemented from the paper.

Snippets (n, n_samples, n_neighbors) in noise units go in; 32 numbers per spike come out. In between: two convolutions along
time make one token per sample, fixed sinusoids are added, 16 post-norm transformer layers mix the tokens, their mean is reduced to
32. The losses are in `moco.py`; the decoder of the denoising loss is made here, since it is of the same layers.

Where the published code slips, this package decides:
- there, the convolutions are shared between encoder and momentum encoder; here the momentum copy is whole, as in MoCo v3;
- there, inference may pass snippets through a denoiser that no loss trains; here there is none, the DAE only shapes the encoder;
- there, gradients are clipped before they exist; here after `backward`;
- there, time jitter is always two samples; here spikes fall between samples and are aligned to their noisy trough;
- there, z-scores are taken over a whole recording (or, in the released code, not at all); here a sample is divided by the running
  noise level of its channel, which a live stream has too.

Where we depart from the paper, and why:
- 48 samples instead of 121: the time after the trough is latency; the model's card shows what more of it would bring;
- no dropout: spikes are drawn anew for every step, so there is nothing to overfit, and the paths of a step cost a third less;
- a stride of 2 makes a token of two samples, for the small preset.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class HuiduRepConfig:
    """Shape of a HuiduRep encoder; the defaults are the paper's, but for the length of the snippet."""

    n_samples: int = 48
    n_neighbors: int = 11
    n_dims: int = 32
    d_model: int = 64
    n_heads: int = 4
    d_ff: int = 128
    n_layers: int = 16
    stride: int = 1  # of the second convolution
    decoder_layers: int = 4


class Layer(nn.Module):
    """One post-norm transformer layer: attention, add, norm; ReLU feed-forward, add, norm."""

    def __init__(self, config: HuiduRepConfig) -> None:
        super().__init__()
        d = config.d_model
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.feed_forward = nn.Sequential(nn.Linear(d, config.d_ff), nn.ReLU(), nn.Linear(config.d_ff, d))
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        for parameter in (*self.out.parameters(), *self.feed_forward[-1].parameters()):
            nn.init.zeros_(parameter)  # at first a layer does nothing: sixteen of them start better so

    def forward(self, x: Tensor) -> Tensor:
        n, n_tokens, d = x.shape
        q, k, v = self.qkv(x).view(n, n_tokens, 3, self.n_heads, d // self.n_heads).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = self.norm1(x + self.out(attended.transpose(1, 2).reshape(n, n_tokens, d)))
        normed: Tensor = self.norm2(x + self.feed_forward(x))
        return normed


def sinusoids(n_tokens: int, d_model: int) -> Tensor:
    """Make the fixed positional encoding, (n_tokens, d_model)."""
    angles = torch.arange(n_tokens)[:, None] * torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(n_tokens, d_model)


class Encoder(nn.Module):
    """Snippets (n, n_samples, n_neighbors) to embeddings (n, n_dims): what is exported."""

    cpu_batch = 1  # spikes a run takes on a CPU: two take nearly twice as long as one
    positions: Tensor

    def __init__(self, config: HuiduRepConfig) -> None:
        super().__init__()
        self.config = config
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

    def make_decoder(self) -> nn.Module:
        """Make the network that the denoising loss trains: tokens to the clean snippet."""
        return Decoder(self.config)


class Decoder(nn.Module):
    """Tokens (n, n_tokens, d_model) to snippets (n, n_samples, n_neighbors)."""

    def __init__(self, config: HuiduRepConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.Sequential(*[Layer(config) for _ in range(config.decoder_layers)])
        self.expand = nn.Linear(config.d_model, config.stride * config.n_neighbors)

    def forward(self, tokens: Tensor) -> Tensor:
        snippets: Tensor = self.expand(self.layers(tokens)).reshape(len(tokens), -1, self.config.n_neighbors)
        return snippets[:, : self.config.n_samples]
