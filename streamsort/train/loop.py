"""Train an encoder on simulated spikes and leave a checkpoint, from which training goes on exactly and the model is exported.

Each step draws some sites of a bank and two spikes of each of their units, so that a batch's negatives are units of the same peak
channel as well as strangers. Everything drawn derives from (seed, step, rank): a run that was stopped continues as if it had not
been, and each of several processes has sites of its own. The first process saves, scores and prints.
"""

import contextlib
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from streamsort.train import parallel
from streamsort.train.augment import Draw, Spikes
from streamsort.train.config import TrainConfig
from streamsort.train.data import make_bank
from streamsort.train.export import load_encoder
from streamsort.train.keep import Keeper
from streamsort.train.networks import AnyEncoder
from streamsort.train.parallel import World
from streamsort.train.run import Run


def train(config: TrainConfig, out: Path) -> bool:
    """Train until the run's length is reached; checkpoint and history go to `out`.

    Parameters
    ----------
    config : TrainConfig
    out : Path
        Directory; if it holds a checkpoint, training continues from it.

    Returns
    -------
    leads : bool
        Whether this process is the first, or the only one, which is the one to export.

    Raises
    ------
    StreamsortError
        If the checkpoint is broken or of another network, or the teacher cannot be loaded.
    """
    torch.set_num_threads(config.threads)
    out.mkdir(parents=True, exist_ok=True)
    with parallel.join(config.on_cuda) as world:
        run = Run.start(config, out, world)
        if run.progress(config) >= 1.0:
            return world.leads
        teacher = load_encoder(Path(config.teacher))[0].to(world.device) if config.teacher else None
        draw = draw_of(config, run.step, world)
        with Keeper(config, out, run, world.leads) as keeper:
            while run.progress(config) < 1.0:
                started = time.monotonic()
                if run.step % config.bank_steps == 0:
                    draw = draw_of(config, run.step, world)
                losses = train_step(run, config, draw, world, teacher)
                run.count(losses, parallel.from_first(time.monotonic() - started, world.device))
                keeper.keep(losses)
    return world.leads


def _generator(config: TrainConfig, step: int, world: World) -> torch.Generator:
    seed = np.random.SeedSequence((config.seed, 1, step, world.rank)).generate_state(1)[0]
    return torch.Generator(world.device).manual_seed(int(seed))


def draw_of(config: TrainConfig, step: int, world: World) -> Draw:
    """Make the bank that a step's batch is drawn from; no two processes have the same."""
    seed = (config.seed, 0, step // config.bank_steps, world.rank)
    bank = make_bank(seed, config.bank_sites, config.n_units, n_samples=config.network.n_samples)
    return Draw.of(bank, config.collision, world.device)


def draw_pairs(draw: Draw, config: TrainConfig, step: int, world: World) -> tuple[Spikes, Spikes]:
    """Draw the batch of a step: two spikes of every unit of `n_sites` sites."""
    return draw.pairs(_generator(config, step, world), config.n_sites)


def train_step(run: Run, config: TrainConfig, draw: Draw, world: World, teacher: AnyEncoder | None = None) -> list[float]:
    """Do one step; return the losses without their weights, as `run.LOSSES` names them."""
    warmup = min(1.0, (run.step + 1) / max(1, config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, run.progress(config))))
    for group in run.optimizer.param_groups:
        group["lr"] = config.learning_rate * warmup * (0.02 + 0.98 * cosine)
    one, two = draw_pairs(draw, config, run.step, world)
    run.model.train()
    with torch.autocast("cuda", torch.bfloat16) if config.bf16 else contextlib.nullcontext():
        contrastive, error, embeddings = run.model(one.snippets, two.snippets, one.clean, contrast=config.contrastive > 0)
    distance = _distance(embeddings, teacher, torch.cat([one.snippets, two.snippets]))
    run.optimizer.zero_grad()
    (config.contrastive * contrastive + config.alpha * error + config.distil * distance).backward()
    parallel.average(run.model)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_norm)
    run.optimizer.step()
    run.model.update_slow()
    return [contrastive.item(), error.item(), distance.item()]


def _distance(embeddings: Tensor, teacher: AnyEncoder | None, snippets: Tensor) -> Tensor:
    """Return the mean squared difference from the teacher's embeddings, per dimension: 1 is as far as a spike from its unit."""
    if teacher is None:
        return embeddings.new_zeros(())
    with torch.no_grad():
        taught = teacher(snippets)
    return F.mse_loss(embeddings.float(), taught.float())
