"""Tune an encoder to the units of a session, without leaving its space.

Two spikes of one unit on one channel shall be near each other and far from other units of that channel and its neighbours,
whatever noise, size, sub-sample phase and colliding spikes do to them. An anchor holds the embeddings of spikes as they are, and of
blends of two units' spikes, which stand for units not seen yet, where the encoder had them: what a place in the space means, and
with it each unit's id, is kept. Distances are taken where the spread within units is white under the encoder that is tuned, as the
live sorter takes them.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from streamsort.errors import StreamsortError
from streamsort.train.held_out import embed, whitening
from streamsort.train.networks import AnyEncoder
from streamsort.train.session_snippets import Floats, Ints, SessionSnippets, Views, Wear

_WARMUP = 0.1  # share of the run in which the learning rate rises
_LAST_RATE = 0.02  # of the highest, at the end
_VARIANCES = 4.0  # a squared distance d between two spikes of a unit has the likelihood exp(-d / 4) where its spread is white


@dataclass(frozen=True)
class TuneConfig:
    """How an encoder is tuned; the length is `steps` if that is set, else `seconds`."""

    seconds: float = 60.0
    steps: int | None = None
    seed: int = 0
    n_pairs: int = 32  # of a step
    learning_rate: float = 3e-4
    anchor: float = 30.0  # weight of the mean squared move, in variances within units, beside the contrastive loss
    clip_norm: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise StreamsortError(f"refresh: seconds = {self.seconds}, expected a positive number")
        if self.steps is not None and self.steps < 1:
            raise StreamsortError(f"refresh: steps = {self.steps}, expected 1 or more")


def tune(
    encoder: AnyEncoder, data: SessionSnippets, config: TuneConfig, progress: Callable[[float], None] = lambda fraction: None
) -> tuple[AnyEncoder, int]:
    """Tune a copy of an encoder.

    Parameters
    ----------
    encoder : AnyEncoder
        Left as it is.
    data : SessionSnippets
        What is held out is not looked at.
    config : TuneConfig
    progress : callable, optional
        Called after each step with the fraction that is done.

    Returns
    -------
    tuned : AnyEncoder
        In evaluation mode.
    steps : int
        How many were done in the time.
    """
    lessons = _Lessons(encoder, data, config)
    tuned = copy.deepcopy(encoder).train()
    optimizer = torch.optim.Adam(tuned.parameters(), lr=config.learning_rate, betas=(0.9, 0.98))
    began, step, done = time.monotonic(), 0, 0.0
    while done < 1.0:
        rate = min(1.0, (done + 1e-2) / _WARMUP) * (_LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        optimizer.zero_grad()
        torch.autograd.backward(lessons.loss(tuned, step))
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), config.clip_norm)
        optimizer.step()
        step += 1
        done = step / config.steps if config.steps is not None else (time.monotonic() - began) / config.seconds
        progress(min(done, 1.0))
    return tuned.eval(), step


class _Lessons:
    """What each step is taught; a step's draw depends on the seed and its number alone."""

    def __init__(self, encoder: AnyEncoder, data: SessionSnippets, config: TuneConfig) -> None:
        self._encoder, self._data, self._config = copy.deepcopy(encoder).eval().requires_grad_(False), data, config
        self._views = Views(data, Wear())
        self._rivals = data.rivals()
        self._negative = self._rivals & ~data.same_unit()
        learned = ~data.held_out
        white = whitening(embed(encoder, data.snippets[learned]), data.group[learned])
        self._whitening = torch.from_numpy(white.astype(np.float32))

    def loss(self, tuned: AnyEncoder, step: int) -> Tensor:
        """Draw the batch of a step and return its loss."""
        rng = np.random.default_rng((self._config.seed, 2, step))
        groups = self._draw_groups(rng)
        n = len(groups)
        kept = torch.from_numpy(self._draw_kept(rng, groups))
        views = torch.from_numpy(np.concatenate(self._views.draw_pairs(rng, groups)))
        white = tuned(torch.cat([views, kept])) @ self._whitening
        moved = white[2 * n :] - self._encoder(kept) @ self._whitening
        contrast = self._contrast(white[:n], white[n : 2 * n], groups)
        loss: Tensor = contrast + self._config.anchor * moved.square().mean()
        return loss

    def _draw_groups(self, rng: np.random.Generator) -> Ints:
        """Draw groups together with their rivals, else a large probe would have none in a batch."""
        drawn: list[int] = []
        while len(drawn) < self._config.n_pairs:
            drawn += rng.permutation(np.flatnonzero(self._rivals[rng.integers(len(self._rivals))])).tolist()
        return np.array(drawn[: self._config.n_pairs], np.int64)

    def _draw_kept(self, rng: np.random.Generator, groups: Ints) -> Floats:
        """Draw what shall not move: spikes as they are, and blends of them."""
        snippets = self._data.snippets[self._views.draw_rows(rng, groups)]
        share = rng.random((len(snippets), 1, 1)).astype(np.float32)
        blends = share * snippets + (1 - share) * snippets[rng.permutation(len(snippets))]
        return np.concatenate([snippets, blends])[::2]

    def _contrast(self, one: Tensor, two: Tensor, groups: Ints) -> Tensor:
        """Return the symmetric cross entropy of finding each spike's partner among those of its rivals."""
        allowed: NDArray[np.bool_] = self._negative[groups][:, groups] | np.eye(len(groups), dtype=bool)
        logits = (-torch.cdist(one, two).square() / _VARIANCES).masked_fill(~torch.from_numpy(allowed), -torch.inf)
        target = torch.arange(len(groups))
        loss: Tensor = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss
