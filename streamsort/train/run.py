"""All that changes while a model is trained, and the checkpoint that holds it whole.

A checkpoint is one file, replaced whole; `history.jsonl` beside it repeats its history for people. Everything that is drawn derives
from the seed and the step, so a run that was stopped, however rudely, goes on from its checkpoint as if it had not been.
"""

import dataclasses
import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from streamsort.errors import StreamsortError
from streamsort.train.config import TrainConfig
from streamsort.train.networks import to_table
from streamsort.train.networks.moco import MoCo
from streamsort.train.parallel import World

CHECKPOINT = "checkpoint.pt"
HISTORY = "history.jsonl"
LOSSES = ("contrastive", "reconstruction", "distance")


@dataclass
class Run:
    """A model in training.

    Attributes
    ----------
    model : MoCo
    optimizer : torch.optim.Optimizer
    step : int
        Steps done.
    seconds : float
        Spent on them; validation not counted.
    history : list of dict
        A record each `record_steps`: `step`, `seconds`, `losses` (means since the record before), `figures` (where it was scored).
    sums, n_summed : list of float, int
        Of the losses since the last record, and over how many steps.
    figures : dict
        The last scores.
    scored_s : float
        `seconds` when they were taken.
    machine : dict
        `device`, `processes` and `threads` of the last of them that worked on it.
    """

    model: MoCo
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    sums: list[float] = field(default_factory=lambda: [0.0] * len(LOSSES))
    n_summed: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    scored_s: float = 0.0
    machine: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, config: TrainConfig, out: Path, world: World | None = None) -> "Run":
        """Begin, or continue from the checkpoint in `out`.

        Raises
        ------
        StreamsortError
            If the checkpoint is broken or of another network.
        """
        world = world or World()
        torch.manual_seed(config.seed)
        model = MoCo(config.network, config.head).to(world.device)
        learned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98))
        run = cls(model, optimizer, machine={**world.machine(), "threads": config.threads})
        if (out / CHECKPOINT).exists():
            run._load(out / CHECKPOINT, config)
        return run

    def _load(self, path: Path, config: TrainConfig) -> None:
        state = read_checkpoint(path)
        wanted = {"network": to_table(config.network), "head": dataclasses.asdict(config.head)}
        if any(state["config"].get(key, value) != value for key, value in wanted.items()):
            raise StreamsortError(f"checkpoint {path}: was made with another network, expected {wanted['network']}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("step", "seconds", "history", "sums", "n_summed", "figures", "scored_s"):
            setattr(self, name, state.get(name, getattr(self, name)))

    def progress(self, config: TrainConfig) -> float:
        """Return how much of the run is done, 0 to 1."""
        return self.step / config.steps if config.steps else self.seconds / (60 * config.minutes)

    def count(self, losses: Sequence[float], seconds: float) -> None:
        """Add a step that was done."""
        self.step += 1
        self.seconds += seconds
        self.sums = [total + loss for total, loss in zip(self.sums, losses, strict=True)]
        self.n_summed += 1

    def record(self, figures: dict[str, float]) -> dict[str, Any]:
        """Close a stretch of the history; `figures` is empty where the model was not scored."""
        losses = {name: total / self.n_summed for name, total in zip(LOSSES, self.sums, strict=True)}
        self.history.append({"step": self.step, "seconds": round(self.seconds, 1), "losses": losses, "figures": figures})
        self.sums, self.n_summed = [0.0] * len(LOSSES), 0
        if figures:
            self.figures, self.scored_s = figures, self.seconds
        return self.history[-1]

    def save(self, config: TrainConfig, out: Path) -> None:
        """Write checkpoint and history; a reader sees the old file or the new one, never half."""
        kept = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name not in ("model", "optimizer")}
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        temporary = out / (CHECKPOINT + ".tmp")
        torch.save({**states, **kept, "config": config.to_dict()}, temporary)
        os.replace(temporary, out / CHECKPOINT)
        temporary = out / (HISTORY + ".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in self.history))
        os.replace(temporary, out / HISTORY)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises
    ------
    StreamsortError
        If there is none, or it is something else.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise StreamsortError(f"checkpoint {path}: no such file, expected the output of a training run") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise StreamsortError(f"checkpoint {path}: cannot be read ({type(error).__name__})") from None
    if not isinstance(state, dict) or not {"model", "optimizer", "step", "seconds", "config"} <= set(state):
        raise StreamsortError(f"checkpoint {path}: not one of a training run, expected model, optimizer, step, seconds and config")
    return state
