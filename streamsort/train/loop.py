"""Train an encoder on simulated spikes and leave a checkpoint, from which training goes on exactly and the model is exported.

Each step draws 32 sites of a bank and two spikes of each of their units, so that a batch's negatives are units of the same peak
channel as well as strangers. Everything random derives from (seed, step), and the checkpoint holds model, optimiser, step and
seconds spent, so a run that was stopped continues as if it had not been.
"""

import dataclasses
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from streamsort.errors import StreamsortError
from streamsort.train.augment import Spikes, draw_spikes
from streamsort.train.data import Bank, make_bank
from streamsort.train.networks.huidurep import PRESETS, HuiduRep, HuiduRepConfig
from streamsort.train.validate import Validation

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    The length is `steps` if that is set, else `minutes` of training; learning rate and progress follow the one that is in force.
    """

    out: Path
    preset: str = "small"
    minutes: float = 40.0
    steps: int | None = None
    seed: int = 0
    n_sites: int = 32  # per batch; with n_units = 8 a batch is 256 pairs
    n_units: int = 8
    bank_sites: int = 1024
    bank_steps: int = 256  # a fresh bank this often: about 2 % of the time
    collision: float = 0.25
    learning_rate: float = 1.5e-3
    weight_decay: float = 1e-4
    warmup_steps: int = 100
    clip_norm: float = 5.0
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"  # the paper preset wants a GPU: 20 snippets/s on a core
    save_s: float = 60.0
    validate_s: float = 240.0
    network: HuiduRepConfig | None = None  # instead of the preset's

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise StreamsortError(f"train: preset {self.preset!r}, expected one of {', '.join(PRESETS)}")
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise StreamsortError(f"train: device {self.device!r}, expected cpu, or cuda where torch finds a GPU")
        if (self.minutes if self.steps is None else self.steps) <= 0:
            raise StreamsortError(f"train: minutes = {self.minutes}, steps = {self.steps}, expected a positive length")
        if self.n_sites > self.bank_sites:
            raise StreamsortError(f"train: n_sites = {self.n_sites}, expected at most bank_sites = {self.bank_sites}")

    @property
    def shape(self) -> HuiduRepConfig:
        """The network that is trained."""
        return self.network if self.network is not None else PRESETS[self.preset]

    def to_dict(self) -> dict[str, Any]:
        """Return what a checkpoint and a model's contract keep of the run."""
        table = dataclasses.asdict(dataclasses.replace(self, network=self.shape))
        return {**table, "out": str(self.out)}


@dataclass
class Run:
    """All that changes while training; saved whole."""

    model: HuiduRep
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, config: TrainConfig) -> "Run":
        """Begin, or continue from the checkpoint in `config.out`."""
        torch.manual_seed(config.seed)
        model = HuiduRep(config.shape).to(config.device)
        learned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98))
        run = cls(model, optimizer)
        path = config.out / CHECKPOINT
        if path.exists():
            run._load(path, config)
        return run

    def _load(self, path: Path, config: TrainConfig) -> None:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["config"]["network"] != config.to_dict()["network"]:
            raise StreamsortError(f"checkpoint {path}: was made with another network, expected the preset {config.preset!r}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.step, self.seconds, self.figures = state["step"], state["seconds"], state["figures"]

    def save(self, config: TrainConfig) -> None:
        """Write the checkpoint; a reader sees the old one or the new one, never half."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),  # dropout's
            "step": self.step,
            "seconds": self.seconds,
            "figures": self.figures,
            "config": config.to_dict(),
        }
        temporary = config.out / (CHECKPOINT + ".tmp")
        torch.save(state, temporary)
        os.replace(temporary, config.out / CHECKPOINT)


def progress_of(run: Run, config: TrainConfig) -> float:
    """Return how much of the run is done, 0 to 1."""
    return run.step / config.steps if config.steps is not None else run.seconds / (60 * config.minutes)


def draw_pairs(bank: Bank, config: TrainConfig, step: int) -> tuple[Spikes, Spikes]:
    """Draw the batch of a step: two spikes of every unit of `n_sites` sites."""
    rng = np.random.default_rng((config.seed, 1, step))
    chosen = rng.choice(config.bank_sites, config.n_sites, replace=False)
    sites: NDArray[np.int64] = np.repeat(chosen, config.n_units)
    units: NDArray[np.int64] = np.tile(np.arange(config.n_units), config.n_sites)
    return draw_spikes(bank, rng, sites, units, config.collision), draw_spikes(bank, rng, sites, units, config.collision)


def train_step(run: Run, config: TrainConfig, bank: Bank) -> tuple[float, float]:
    """Do one step; return the contrastive loss and the reconstruction error (squared noise units)."""
    warmup = min(1.0, (run.step + 1) / config.warmup_steps)
    rate = config.learning_rate * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress_of(run, config)))))
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    one, two = draw_pairs(bank, config, run.step)
    run.model.train()
    views = (torch.from_numpy(array).to(config.device) for array in (one.snippets, two.snippets, one.clean))
    contrastive, error = run.model(*views)
    run.optimizer.zero_grad()
    (contrastive + run.model.config.alpha * error).backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_norm)
    run.optimizer.step()
    run.model.update_slow()
    run.step += 1
    return contrastive.item(), error.item()


def train(config: TrainConfig) -> None:
    """Train until the run's length is reached; checkpoints and validation figures go to `config.out`.

    Parameters
    ----------
    config : TrainConfig
        If `config.out` holds a checkpoint, training continues from it.

    Raises
    ------
    StreamsortError
        If the checkpoint is of another network.
    """
    torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    run, validation = Run.start(config), Validation()
    console = Console()
    columns = (
        TextColumn("step {task.fields[step]}  loss {task.fields[loss]}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bank: Bank | None = None
    saved = validated = time.monotonic()
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        task = progress.add_task("train", total=1.0, step=run.step, loss="")
        while progress_of(run, config) < 1.0:
            started = time.monotonic()
            if bank is None or run.step % config.bank_steps == 0:
                bank = make_bank((config.seed, 0, run.step // config.bank_steps), config.bank_sites, config.n_units)
            contrastive, error = train_step(run, config, bank)
            now = time.monotonic()
            run.seconds += now - started
            progress.update(task, completed=progress_of(run, config), step=run.step, loss=f"{contrastive:.3f} + {error:.2f}")
            if now - saved > config.save_s:
                run.save(config)
                saved = now
            if now - validated > config.validate_s:
                run.figures = validation(run.model.slow_encoder)
                console.print(f"step {run.step}: loss {contrastive:.3f} + {error:.2f}; {Validation.say(run.figures)}")
                validated = time.monotonic()
    run.figures = validation(run.model.slow_encoder)
    console.print(f"step {run.step}: {Validation.say(run.figures)}")
    run.save(config)
