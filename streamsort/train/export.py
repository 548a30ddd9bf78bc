"""Turn a trained encoder into what the live sorter loads, one ONNX file and its contract beside it, and read one back to train on.

The batch dimension is left open: the live encoder closes it when it makes its session. Nothing is folded into the weights, so the
file's initialisers are the network's parameters by name, and a model can be tuned, or teach, from its `.onnx` alone; onnxruntime
folds when it loads, and runs as fast. Files are written under temporary names, checked against torch, and put in place by a
rename, the contract last.
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
import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from streamsort.encode import NOISE_UNITS, Contract
from streamsort.errors import StreamsortError
from streamsort.train.card import card_text
from streamsort.train.data import FREQ_MAX_HZ, FREQ_MIN_HZ, N_BEFORE, SAMPLING_FREQUENCY
from streamsort.train.networks import AnyEncoder, from_table, make_encoder
from streamsort.train.run import CHECKPOINT, read_checkpoint
from streamsort.train.space import drawn, even_out, spread
from streamsort.train.validate import Validation

OPSET = 18
PARITY = 1e-4  # largest difference between onnxruntime and torch that is accepted
PARITY_FP16 = 0.05  # of a half-precision copy on a GPU; a spike is about 5.7 away from its unit


def load_encoder(source: Path) -> tuple[AnyEncoder, dict[str, Any]]:
    """Return an encoder as it is, or would be, exported, and the run that made it.

    Parameters
    ----------
    source : Path
        An exported `.onnx` with its contract, a checkpoint, or the directory of a training run. Of a checkpoint the slow encoder
        is taken: an average over the last hundred steps, which scores no worse than the fast one.

    Raises
    ------
    StreamsortError
        If there is no such file, or it is not what its kind should be.
    """
    if source.suffix == ".onnx":
        return _load_exported(source)
    path = source / CHECKPOINT if source.is_dir() else source
    state = read_checkpoint(path)
    config, slow = state["config"], "slow_encoder."
    encoder = make_encoder(from_table(config["network"])).eval()
    encoder.load_state_dict({name.removeprefix(slow): value for name, value in state["model"].items() if name.startswith(slow)})
    if not config.get("teacher"):
        even_out(encoder)
    run = {"steps_done": state["step"], "seconds": round(state["seconds"]), "machine": state.get("machine", {})}
    return encoder, {**config, **run}


def _load_exported(path: Path) -> tuple[AnyEncoder, dict[str, Any]]:
    contract = Contract.read(path.with_suffix(".json"))
    training = json.loads(path.with_suffix(".json").read_text()).get("training", {})
    if "network" not in training:
        raise StreamsortError(
            f"encoder contract {path.with_suffix('.json')}: training.network is missing, expected it to rebuild it"
        )
    weights = load_onnx_weights(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != contract.sha256:
        raise StreamsortError(f"encoder {path}: is not the file of its contract, expected sha256 {contract.sha256[:12]}...")
    encoder = make_encoder(from_table(training["network"]))
    missing = sorted(set(encoder.state_dict()) - set(weights))
    if missing:
        raise StreamsortError(f"encoder {path}: has no weights called {missing[0]}, expected those of the network by name")
    try:
        encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    except RuntimeError as error:
        raise StreamsortError(
            f"encoder {path}: is not of the network in its contract ({str(error).splitlines()[-1].strip()})"
        ) from None
    return encoder.eval(), training


def load_onnx_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights of an exported model by their names in torch.

    Raises
    ------
    StreamsortError
        If the file is missing or is not ONNX.
    """
    try:
        graph = onnx.load_from_string(path.read_bytes()).graph
    except (FileNotFoundError, IsADirectoryError):
        raise StreamsortError(f"encoder {path}: no such file, expected an .onnx") from None
    except Exception as error:  # protobuf's exceptions are of whichever of its implementations is installed
        raise StreamsortError(f"encoder {path}: not ONNX ({error})") from None
    weights = {item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in graph.initializer}
    for node in graph.node:  # of parameters with equal values one is stored, the others refer to it
        if node.op_type == "Identity" and node.input[0] in weights:
            weights[node.output[0]] = weights[node.input[0]]
    return weights


def to_onnx(encoder: AnyEncoder) -> bytes:
    """Export to one ONNX file in memory; input `snippets` (batch, n_samples, n_neighbors), output `embeddings` (batch, n_dims)."""
    example = torch.zeros(2, encoder.config.n_samples, encoder.config.n_neighbors)
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
            do_constant_folding=False,
            dynamo=False,
        )
        return path.read_bytes()


@torch.no_grad()
def parity(encoder: AnyEncoder, model: bytes) -> float:
    """Return the largest difference between what onnxruntime and torch make of simulated spikes."""
    snippets = drawn(2, 4, encoder.config.n_samples).flatten(0, 1)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"snippets": snippets.numpy()})
    return float(np.abs(found - encoder(snippets).numpy()).max())


@torch.no_grad()
def half_parity(encoder: AnyEncoder, device: str = "cuda") -> float:
    """Return the largest difference between a half-precision copy on `device` and the encoder itself."""
    snippets = drawn(2, 4, encoder.config.n_samples).flatten(0, 1)
    half = copy.deepcopy(encoder).half().to(device)
    return float((half(snippets.half().to(device)).float().cpu() - encoder(snippets)).abs().max())


def export(checkpoint: Path, model: Path, version: str = "1") -> dict[str, Any]:
    """Write `model` (.onnx), its contract (.json) and its card (.md) from a training run.

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
    encoder, training = load_encoder(checkpoint)
    validation = Validation(3 * training.get("validate_sites", 8), encoder.config.n_samples)
    scores = {"encoder": validation(encoder), "pca_5": validation.baseline(5), "pca_32": validation.baseline(32)}
    if training.get("teacher"):
        scores["teacher"] = validation(load_encoder(Path(training["teacher"]))[0])
        training = {**training, "teacher": Path(training["teacher"]).name}  # where it lay means nothing elsewhere
    score = round(float(np.mean([value for name, value in scores["encoder"].items() if name.startswith("knn")])), 4)
    contract = write_model(encoder, model, training, version=version, score=score, validation=scores)
    history = read_checkpoint(checkpoint / CHECKPOINT if checkpoint.is_dir() else checkpoint).get("history", [])
    _replace(model.with_suffix(".md"), card_text(contract, encoder, history).encode())
    return contract


def write_model(encoder: AnyEncoder, model: Path, training: dict[str, Any], *, version: str = "1", **more: Any) -> dict[str, Any]:
    """Write an encoder and its contract, the contract last.

    Parameters
    ----------
    encoder : AnyEncoder
        In evaluation mode, on the CPU.
    model : Path
        Where to write the `.onnx`; its stem is the model's name.
    training : dict
        How it came about; its `network` is what the weights are read back into.
    version : str
        Goes into the contract.
    **more
        Further keys of the contract, such as `validation` or `parent_sha256`.

    Returns
    -------
    contract : dict
        What was written beside the model.

    Raises
    ------
    StreamsortError
        If the exported graph does not compute what torch does.
    """
    exported = to_onnx(encoder)
    difference = parity(encoder, exported)
    if not difference <= PARITY:
        raise StreamsortError(f"export {model}: onnxruntime and torch differ by {difference:.2g}, expected at most {PARITY}")
    config = encoder.config
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
        "normalisation": NOISE_UNITS,
        "opset": OPSET,
        "cpu_batch": encoder.cpu_batch,
        "parity": difference,
        "spread": round(spread(encoder), 4),
        "training": training,
        **more,
    }
    if torch.cuda.is_available():
        contract["parity_fp16"] = half_parity(encoder)
    model.parent.mkdir(parents=True, exist_ok=True)
    _replace(model, exported)
    _replace(model.with_suffix(".json"), (json.dumps(contract, indent=2) + "\n").encode())
    return contract


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
