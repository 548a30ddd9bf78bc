"""What a training run is made of: a TOML preset in, one frozen `TrainConfig` out.

A preset is shipped with the package (`full`, `light`, `small`) or is a file of the user's; its tables are those of `TrainConfig`,
and `[network]` starts from one of the known shapes (`preset = "full"`) and changes what else it names. Unknown keys are refused
with the nearest known one, before anything is drawn or trained.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from streamsort.config import build, read_toml
from streamsort.errors import StreamsortError
from streamsort.train.networks import PRESETS, NetworkConfig, to_table
from streamsort.train.networks.moco import HeadConfig

PRESET_FOLDER = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class TrainConfig:
    """A training run: `loss = contrastive * InfoNCE + alpha * denoising error + distil * distance from the teacher`.

    The length is `steps` if that is set, else `minutes` of training; learning rate and progress follow the one that is in force.
    Several processes (torchrun) draw `n_sites` each.

    Examples
    --------
    >>> TrainConfig.from_table({"network": {"preset": "light"}, "alpha": 0.1}).network.n_dims
    32
    """

    minutes: float = 40.0
    steps: int = 0  # 0: the length is `minutes`
    seed: int = 0
    # Data
    n_sites: int = 32  # per batch; with n_units = 8 a batch is 256 pairs
    n_units: int = 8
    bank_sites: int = 1024
    bank_steps: int = 256  # a fresh bank this often: about 2 % of the time
    collision: float = 0.25
    # Losses
    contrastive: float = 1.0
    alpha: float = 0.2  # of the mean squared error of the decoded spike, as published
    teacher: str = ""  # .onnx with its contract, checkpoint, or directory of a run; empty: none
    distil: float = 1.0  # of the mean squared distance from the teacher's embedding, if there is one
    # Optimiser
    learning_rate: float = 1.5e-3
    weight_decay: float = 1e-4
    warmup_steps: int = 100
    clip_norm: float = 5.0
    # Where
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU that torch finds, else the CPU
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU that has it; weights are always fp32
    threads: int = 1  # of torch, per process
    # Records
    record_steps: int = 100  # a line of the history: the losses' means over so many steps
    validate_s: float = 240.0  # the first record after this much training is scored too
    validate_sites: int = 8  # held-out sites that it is scored on; a model that is exported is scored on three times as many
    save_s: float = 60.0
    network: NetworkConfig = PRESETS["small"]
    head: HeadConfig = field(default_factory=HeadConfig)

    def __post_init__(self) -> None:
        counts = ("n_sites", "n_units", "bank_steps", "threads", "record_steps", "validate_sites")
        for name in (*counts, "minutes", "learning_rate", "clip_norm"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        for name in ("steps", "seed", "contrastive", "alpha", "distil", "weight_decay", "warmup_steps", "validate_s", "save_s"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.n_sites <= self.bank_sites, "n_sites", self.n_sites, f"at most bank_sites = {self.bank_sites}")
        _require(0 <= self.collision <= 1, "collision", self.collision, "0 to 1")
        _require(not self.teacher or self.distil > 0, "distil", self.distil, "more than 0 with a teacher")
        _require(self.contrastive > 0 or bool(self.teacher), "contrastive", self.contrastive, "more than 0 without a teacher")
        _require(self.device in ("auto", "cpu", "cuda"), "device", self.device, "auto, cpu or cuda")
        cuda = torch.cuda.is_available()
        _require(self.device != "cuda" or cuda, "device", self.device, "cpu, or cuda where torch finds a GPU")
        _require(self.precision in ("auto", "fp32", "bf16"), "precision", self.precision, "auto, fp32 or bf16")
        _require(self.precision != "bf16" or self.on_cuda, "precision", self.precision, "fp32 on a CPU")

    @property
    def on_cuda(self) -> bool:
        """Whether training runs on a GPU."""
        return self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())

    @property
    def bf16(self) -> bool:
        """Whether the losses are computed in bf16."""
        return self.on_cuda and (self.precision == "bf16" or (self.precision == "auto" and torch.cuda.is_bf16_supported()))

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> "TrainConfig":
        """Build from the tables of a preset.

        Raises
        ------
        StreamsortError
            If a key is unknown (the nearest known one is named), or a value has the wrong type or is out of range.
        """
        config: TrainConfig = build(cls, {key: value for key, value in table.items() if key != "network"})
        return dataclasses.replace(config, network=_network(table.get("network", {})))

    @classmethod
    def from_preset(cls, preset: str | Path, **changes: Any) -> "TrainConfig":
        """Read a shipped preset by its name, or a TOML file; `changes` replace what it says.

        Raises
        ------
        StreamsortError
            As `from_table`, and if there is no such preset.
        """
        return cls.from_table({**read_toml(preset_path(preset)), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return what a checkpoint and a model's contract keep of the run, as plain values."""
        return {**dataclasses.asdict(self), "network": to_table(self.network)}


def preset_path(preset: str | Path) -> Path:
    """Find a shipped preset by its name, or else a file."""
    shipped = sorted(path.stem for path in PRESET_FOLDER.glob("*.toml"))
    if str(preset) in shipped:
        return PRESET_FOLDER / f"{preset}.toml"
    path = Path(preset)
    if not path.is_file():
        near = difflib.get_close_matches(str(preset), shipped, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected a .toml or one of {', '.join(shipped)}"
        raise StreamsortError(f"train {preset}: no such preset or file; {hint}")
    return path


def _network(table: Any) -> NetworkConfig:
    """Start from a known shape and change what else the table names."""
    if not isinstance(table, dict):
        raise StreamsortError(f"config: network = {table!r}, expected a table")
    preset = table.get("preset", "small")
    if preset not in PRESETS:
        raise StreamsortError(f"config: network.preset = {preset!r}, expected one of {', '.join(PRESETS)}")
    known = PRESETS[preset]
    changes = {key: value for key, value in table.items() if key != "preset"}
    network: NetworkConfig = build(type(known), {**dataclasses.asdict(known), **changes}, "network.")
    return network


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise StreamsortError(f"train: {name} = {value!r}, expected {expected}")
