"""Write a model's card: what it takes and gives, what it is made of, what it was trained on and for how long, and how it scored.

Every figure comes from the contract, the history and the network itself, so a card says the same as the files it lies beside, and
where the curve of a training that was cut short stood.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from streamsort.train.networks import AnyEncoder

_LIMITS = """It compares spikes of the same peak channel: the order of the neighbours, so the meaning of an embedding, changes
with it. Units below SNR 3.5 or above 25, another band than this one, and drift beyond 40 um were not trained for. Other sampling
rates are resampled linearly, which keeps the trough and, from lower rates, smooths what is sharp beside it. No recording was used
in training, and the validation above is simulated too: `benchmarks/encoder.py` says how it does on recordings."""


def multiply_adds(encoder: AnyEncoder) -> int:
    """Count the multiply-adds of one spike, attention included."""
    snippet = torch.zeros(1, encoder.config.n_samples, encoder.config.n_neighbors)
    # Fused attention is not counted on every device; written out in matrix products it is.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        encoder(snippet)
    return int(counter.get_total_flops()) // 2


def trend(history: Sequence[dict[str, Any]], kind: str, name: str) -> tuple[float, float] | None:
    """Fit a line to the last third of a curve; return its values at both ends.

    Parameters
    ----------
    history : sequence of dict
        Records of a run.
    kind : {"losses", "figures"}
    name : str
        Which loss or figure.

    Returns
    -------
    tuple of float or None
        None where fewer than two records of that third have it.
    """
    last = history[-1]["step"] if history else 0
    points = [(r["step"], r[kind][name]) for r in history if name in r[kind] and r["step"] >= 2 / 3 * last]
    if len(points) < 2:
        return None
    steps, values = np.array(points, np.float64).T
    slope, start = np.polyfit(steps - steps[0], values, 1)
    return float(start), float(start + slope * (steps[-1] - steps[0]))


def card_text(contract: dict[str, Any], encoder: AnyEncoder, history: Sequence[dict[str, Any]]) -> str:
    """Write the card of a model as Markdown.

    Parameters
    ----------
    contract : dict
        As written beside the model, with `training` and `validation`.
    encoder : AnyEncoder
        The model itself, on the CPU.
    history : sequence of dict
        Records of the run.
    """
    parts = (f"# {contract['name']}", _facts(contract, encoder), _training(contract["training"]), _curve(history))
    return "\n\n".join((*parts, _scores(contract["validation"]), f"**Limits.** {_LIMITS}")) + "\n"


def _facts(contract: dict[str, Any], encoder: AnyEncoder) -> str:
    n_parameters = sum(p.numel() for p in encoder.parameters())
    shape = {**contract["training"]["network"]}
    family = shape.pop("family")
    for key in ("n_samples", "n_neighbors", "n_dims"):
        shape.pop(key)
    half = "" if "parity_fp16" not in contract else f"; a half-precision copy on a GPU by {contract['parity_fp16']:.1g}"
    rows = {
        "input": f"`{contract['input_name']}` (batch, {contract['n_samples']}, {contract['n_neighbors']}) {contract['dtype']}: "
        f"{contract['ms_before']:g} ms before the trough to {contract['ms_after']:g} ms after it at "
        f"{contract['sampling_frequency'] / 1e3:g} kHz, the peak channel and its neighbours, nearest first, zeros where there are "
        "fewer; each channel divided by its noise level",
        "filtered": f"causal Butterworth band-pass, {contract['freq_min_hz']:g}-{contract['freq_max_hz']:g} Hz",
        "output": f"`{contract['output_name']}` (batch, {contract['n_dims']}) {contract['dtype']}; around the mean of a unit the "
        f"variance is {contract['spread']:.2f} per dimension on average",
        "network": f"{family} ({', '.join(f'{key} {value}' for key, value in shape.items())})",
        "size": f"{n_parameters:,} parameters, {multiply_adds(encoder) / 1e6:.2f} million multiply-adds per spike",
        "file": f"opset {contract['opset']}, sha256 {contract['sha256'][:12]}; off from torch by {contract['parity']:.1g}{half}",
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _training(training: dict[str, Any]) -> str:
    machine = training.get("machine", {})
    pairs = training["n_sites"] * training["n_units"] * machine.get("processes", 1)
    where = f" on {machine['device']} ({machine['processes']} processes, {machine['threads']} threads each)" if machine else ""
    length = f"{training['steps_done']:,} steps of {pairs} pairs in {training['seconds'] / 60:,.0f} minutes{where}"
    compare = training["head"]["compare"]
    losses = f"{training['contrastive']:g} x contrastive (of the {compare}) + {training['alpha']:g} x denoising error"
    taught = ""
    if training.get("teacher"):
        losses += f" + {training['distil']:g} x squared distance from the teacher"
        taught = f" The teacher is {Path(training['teacher']).stem}, and the embedding space is the teacher's, as it was exported."
    return (
        f"**Training.** {length}, seed {training['seed']}, of simulated units alone, drawn anew every "
        f"{training['bank_steps']} steps. The loss is {losses}.{taught} All settings are under `training` in the contract."
    )


def _curve(history: Sequence[dict[str, Any]]) -> str:
    if not history:
        return "**Curve.** None was kept."
    rows = []
    scored: dict[str, float] = next((record["figures"] for record in reversed(history) if record["figures"]), {})
    losses = {name: value for name, value in history[-1]["losses"].items() if value}  # without a teacher there is no distance
    for kind, last in (("losses", losses), ("figures", scored)):
        for name, value in last.items():
            ends = trend(history, kind, name)
            moved = "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
            rows.append(f"| {name} | {value:.3f} | {moved} |")
    head = "**Curve.** Where it stood at the end, and a line through its last third, from and to; scored on fewer sites than below."
    return head + "\n\n| | at the end | last third |\n|---|---|---|\n" + "\n".join(rows)


def _scores(validation: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(validation.values())))
    head = (
        "**Validation.** Held-out simulated peak channels, 8 units each at SNR 4-15, half of them near-copies, 80 spikes per unit: "
        "clean, with 30 % collisions, and moved by up to 20 um. `knn`, `centroid` and `lda` are the share of spikes given to the "
        "right unit, `ari` the adjusted Rand index of a Gaussian mixture with the true number of units; principal components are "
        "fitted per channel. How it is counted: `streamsort/train/validate.py`."
    )
    table = "| | " + " | ".join(validation) + " |\n|---|" + "---|" * len(validation) + "\n"
    rows = (f"| {name} | " + " | ".join(f"{figures[name]:.3f}" for figures in validation.values()) + " |" for name in names)
    return head + "\n\n" + table + "\n".join(rows)
