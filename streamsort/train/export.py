"""Turn a trained checkpoint into what the live sorter loads: one ONNX file and its contract beside it.

The batch dimension is left open: the live encoder closes it when it makes its session. The last linear layer is multiplied with
a map that evens out the spread within simulated units, so that a distance between embeddings means much the same in every
direction and is on average the root of `n_dims` between a spike and its unit. Files are written under temporary names, checked
against torch, and put in place by a rename, the contract last.
"""

import copy
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from streamsort.errors import StreamsortError
from streamsort.train.augment import draw_spikes
from streamsort.train.data import FREQ_MAX_HZ, FREQ_MIN_HZ, N_BEFORE, SAMPLING_FREQUENCY, make_bank
from streamsort.train.loop import CHECKPOINT
from streamsort.train.networks.huidurep import Encoder, HuiduRep, HuiduRepConfig
from streamsort.train.validate import Validation

OPSET = 18
PARITY = 1e-4  # largest difference between onnxruntime and torch that is accepted
SEED = (2**31, 1)  # of the units that spread and parity are measured on; no training bank's


def load_encoder(checkpoint: Path) -> tuple[Encoder, dict[str, Any]]:
    """Return the slow encoder of a checkpoint, its output evened out, and the run that made it.

    The slow encoder is an average over the last hundred steps and scores no worse than the fast one.

    Raises
    ------
    StreamsortError
        If there is no checkpoint.
    """
    if not checkpoint.exists():
        raise StreamsortError(f"checkpoint {checkpoint}: no such file, expected the output of a training run")
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    model = HuiduRep(HuiduRepConfig(**state["config"]["network"]))
    model.load_state_dict(state["model"])
    encoder = copy.deepcopy(model.slow_encoder).eval()
    even_out(encoder)
    run = {**state["config"], "steps_done": state["step"], "seconds": round(state["seconds"])}
    run.pop("out")
    return encoder, run


def _drawn(n_sites: int, n_units: int, n_spikes: int) -> NDArray[np.float32]:
    """Draw spikes of held-out units: (n_sites * n_units, n_spikes, n_samples, n_neighbors)."""
    bank = make_bank(SEED, n_sites, n_units)
    sites = np.repeat(np.arange(n_sites), n_units * n_spikes)
    units = np.tile(np.repeat(np.arange(n_units), n_spikes), n_sites)
    snippets = draw_spikes(bank, np.random.default_rng(SEED), sites, units, 0.0).snippets
    return snippets.reshape(n_sites * n_units, n_spikes, *snippets.shape[1:])


@torch.no_grad()
def even_out(encoder: Encoder, n_sites: int = 64, n_spikes: int = 20) -> None:
    """Fold into the last layer a map that evens out the spread of spikes around their unit; its mean variance becomes 1.

    Not whitening whole: the mean variance is added to every direction, else those in which nothing ever happens are blown up to
    the size of the others, and spikes with another spike on top land far away.
    """
    snippets = torch.from_numpy(_drawn(n_sites, 8, n_spikes))
    embeddings = torch.stack([encoder(unit) for unit in snippets]).double()
    residuals = (embeddings - embeddings.mean(dim=1, keepdim=True)).flatten(0, 1)
    spread = residuals.T @ residuals / (len(residuals) - len(embeddings))
    values, vectors = torch.linalg.eigh(spread)
    scales = (values + values.mean()).rsqrt()
    scales /= (scales.square() * values).mean().sqrt()
    even = vectors @ torch.diag(scales) @ vectors.T
    center = embeddings.mean(dim=(0, 1))
    layer = encoder.reduce
    layer.bias.copy_(even @ (layer.bias.double() - center))
    layer.weight.copy_(even @ layer.weight.double())


def to_onnx(encoder: Encoder, config: HuiduRepConfig) -> bytes:
    """Export to one ONNX file in memory; input `snippets` (batch, n_samples, n_neighbors), output `embeddings` (batch, n_dims)."""
    example = torch.zeros(2, config.n_samples, config.n_neighbors)
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        path = Path(directory) / "model.onnx"
        warnings.simplefilter("ignore", DeprecationWarning)  # the older exporter is deprecated; it needs a second, not five
        torch.onnx.export(
            encoder,
            (example,),
            path,
            input_names=["snippets"],
            output_names=["embeddings"],
            dynamic_axes={"snippets": {0: "batch"}, "embeddings": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )
        return path.read_bytes()


@torch.no_grad()
def parity(encoder: Encoder, model: bytes) -> float:
    """Return the largest difference between what onnxruntime and torch make of simulated spikes."""
    snippets = np.concatenate(list(_drawn(4, 4, 4)))
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"snippets": snippets})
    return float(np.abs(found - encoder(torch.from_numpy(snippets)).numpy()).max())


def export(checkpoint: Path, model: Path, version: str = "1") -> dict[str, Any]:
    """Write `model` (.onnx) and its contract (.json) from a checkpoint or the directory of a training run.

    Parameters
    ----------
    checkpoint : Path
        A checkpoint, or the directory that holds one.
    model : Path
        Where to write; the file's stem is the model's name.
    version : str
        Goes into the contract.

    Returns
    -------
    contract : dict
        What was written beside the model.

    Raises
    ------
    StreamsortError
        If there is no checkpoint, or the exported graph does not compute what torch does.
    """
    encoder, run = load_encoder(checkpoint / CHECKPOINT if checkpoint.is_dir() else checkpoint)
    config = HuiduRepConfig(**run["network"])
    exported = to_onnx(encoder, config)
    difference = parity(encoder, exported)
    if not difference <= PARITY:
        raise StreamsortError(f"export {model}: onnxruntime and torch differ by {difference:.2g}, expected at most {PARITY}")
    validation = Validation()
    contract = {
        "name": model.stem,
        "version": version,
        "sha256": hashlib.sha256(exported).hexdigest(),
        "input_name": "snippets",
        "output_name": "embeddings",
        "dtype": "float32",
        "n_samples": config.n_samples,
        "n_before": N_BEFORE,
        "ms_before": round(N_BEFORE / SAMPLING_FREQUENCY * 1e3, 6),
        "ms_after": round((config.n_samples - N_BEFORE) / SAMPLING_FREQUENCY * 1e3, 6),
        "n_neighbors": config.n_neighbors,
        "n_dims": config.n_dims,
        "sampling_frequency": SAMPLING_FREQUENCY,
        "freq_min_hz": FREQ_MIN_HZ,
        "freq_max_hz": FREQ_MAX_HZ,
        "normalisation": "noise units",
        "opset": OPSET,
        "parity": difference,
        "training": run,
        "validation": {"encoder": validation(encoder), "pca_5": validation.baseline(5), "pca_32": validation.baseline(32)},
    }
    model.parent.mkdir(parents=True, exist_ok=True)
    _replace(model, exported)
    _replace(model.with_suffix(".json"), (json.dumps(contract, indent=2) + "\n").encode())
    return contract


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
