"""Several processes that train one model: started by torchrun, on one machine or many; alone otherwise.

Every process holds the whole model and draws its own sites. What they exchange: the keys of the contrastive loss, so that a spike
is told from those of every process; the gradients, averaged; the running statistics of batch norm, averaged too (a batch is large
enough to be normalised on its own). The models are a few MB, so gradients and statistics go in one flat message after the backward
pass: there is nothing worth overlapping, and without a wrapper like DistributedDataParallel the loss may leave parts of the model
out, and a checkpoint is the same from one process or many.
"""

import contextlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """Which of how many processes this one is, and where it computes."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """Whether this process saves, validates and prints."""
        return self.rank == 0

    def machine(self) -> dict[str, Any]:
        """Name the device, and count the processes."""
        device = torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else _processor()
        return {"device": device, "processes": self.size}


def _processor() -> str:
    with contextlib.suppress(OSError):  # only Linux has it
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def join(on_cuda: bool) -> Iterator[World]:
    """Join the processes that torchrun started, and leave them at the end."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield World(device="cuda" if on_cuda else "cpu")
        return
    device = f"cuda:{os.environ['LOCAL_RANK']}" if on_cuda else "cpu"  # torchrun's own way of telling
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def gather(keys: Tensor) -> tuple[Tensor, int]:
    """Return the rows of every process one after the other, and where those of this one begin; without gradient."""
    if not _joined():
        return keys, 0
    parts = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, keys.contiguous())
    return torch.cat(parts), dist.get_rank() * len(keys)


def from_first(value: float, device: str) -> float:
    """Return the first process's value to all, as where their clocks would disagree."""
    if not _joined():
        return value
    told = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(told, 0)
    return float(told)


@torch.no_grad()
def average(model: nn.Module) -> None:
    """Average gradients and running statistics over the processes, in place."""
    if not _joined():
        return
    parts = [p.grad for p in model.parameters() if p.grad is not None]
    parts += [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    start = 0
    for part in parts:
        part.copy_(flat[start : start + part.numel()].view_as(part))
        start += part.numel()
