"""The scale of an embedding space, measured on simulated units that no training bank holds.

A distance between embeddings shall mean much the same in every direction and be, on average, the root of `n_dims` between a spike
and its unit: that is what the live sorter's thresholds are multiples of. An encoder that was trained towards a teacher is in the
teacher's space already and is left there: evened out again, the two would no longer be interchangeable.
"""

import torch
from torch import Tensor

from streamsort.train.augment import Draw
from streamsort.train.data import make_bank
from streamsort.train.networks import AnyEncoder

SEED = (2**31, 1)  # of the units that spread and parity are measured on
N_UNITS = 8


def drawn(n_sites: int, n_spikes: int, n_samples: int) -> Tensor:
    """Draw clean spikes of held-out units that do not move: (n_sites * N_UNITS, n_spikes, n_samples, n_neighbors)."""
    draw = Draw.of(make_bank(SEED, n_sites, N_UNITS, n_places=1, n_samples=n_samples), collision=0.0)
    sites = torch.arange(n_sites).repeat_interleave(N_UNITS * n_spikes)
    units = torch.arange(N_UNITS).repeat_interleave(n_spikes).repeat(n_sites)
    snippets = draw.spikes(torch.Generator().manual_seed(1), sites, units, torch.zeros_like(sites)).snippets
    return snippets.reshape(n_sites * N_UNITS, n_spikes, *snippets.shape[1:])


@torch.no_grad()
def _embedded(encoder: AnyEncoder, n_sites: int, n_spikes: int) -> tuple[Tensor, Tensor]:
    """Return the mean embedding of each held-out unit, and the covariance of spikes around it."""
    units = drawn(n_sites, n_spikes, encoder.config.n_samples)
    embeddings = torch.stack([encoder(unit) for unit in units]).double()
    means = embeddings.mean(dim=1, keepdim=True)
    residuals = (embeddings - means).flatten(0, 1)
    return means[:, 0], residuals.T @ residuals / (len(residuals) - len(embeddings))


def spread(encoder: AnyEncoder, n_sites: int = 16, n_spikes: int = 20) -> float:
    """Return the variance of spikes around their unit, mean over dimensions: 1 in a space that was evened out."""
    return float(_embedded(encoder, n_sites, n_spikes)[1].diagonal().mean())


@torch.no_grad()
def even_out(encoder: AnyEncoder, n_sites: int = 64, n_spikes: int = 20) -> None:
    """Fold into the last layer a map that evens out the spread of spikes around their unit; its mean variance becomes 1.

    Not whitening whole: the mean variance is added to every direction, else those in which nothing ever happens are blown up to
    the size of the others, and spikes with another spike on top land far away.
    """
    means, covariance = _embedded(encoder, n_sites, n_spikes)
    values, vectors = torch.linalg.eigh(covariance)
    scales = (values + values.mean()).rsqrt()
    scales /= (scales.square() * values).mean().sqrt()
    even = vectors @ torch.diag(scales) @ vectors.T
    layer = encoder.reduce
    layer.bias.copy_(even @ (layer.bias.double() - means.mean(dim=0)))
    layer.weight.copy_(even @ layer.weight.double())
