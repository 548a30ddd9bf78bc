"""Snippets to embeddings, through an ONNX session.

Snippets in uV and the noise level of their channels come in; one 32-d embedding per spike goes out. A model is two files,
`NAME.onnx` and its contract `NAME.json`; whatever the contract says (checksum, shapes, types, sampling rate, units) is verified
before the first spike, and a model that breaks it is refused. Every call runs batches of one fixed shape, padded with zeros:
only then is a spike's embedding the same to the last bit whatever else is in its batch, and the sorter's result independent of
how the stream was chunked. Needs numpy and onnxruntime alone; training lives in `streamsort.train`.
"""

import contextlib
import ctypes
import hashlib
import io
import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from streamsort.errors import StreamsortError

Provider = Literal["auto", "cpu", "cuda"]

SHIPPED = {"full": "huidurep-full.onnx", "light": "huidurep-light.onnx"}
NOISE_UNITS = "noise units"
# Spikes per run on a CPU, when the contract does not say. Measured on one core, ms for a single spike and spikes/s of many: the
# full encoder 1: 1.56, 640; 2: 2.9, 690; 8: 11, 710; the light one 1: 0.07, 13500; 4: 0.10, 40000; 8: 0.18, 45000. So the contract
# of the full one asks for 1, that of the light one for 4: a chunk of 1 ms rarely holds more spikes.
CPU_BATCH = 2
CUDA_BATCH = 32  # on a GPU a run costs its launches, not its rows
# How protobuf writes the key of a tensor whose values are in another file.
_EXTERNAL_DATA = b"\x0a\x08location\x12"
_SESSION_NAME = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# TF32 would round the inputs of every product to 10 bits; the exhaustive search stalls the first runs for seconds.
_CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}


@dataclass(frozen=True)
class Contract:
    """What a model promises about its graph and expects of its input; the `.json` beside the `.onnx`.

    The graph maps `input_name`, (batch, n_samples, n_neighbors) float32 in noise units, to `output_name`, (batch, n_dims) float32.
    The trough is at row `n_before`; channel 0 is the peak channel, the others follow nearest first. Two keys may be absent:
    `cpu_batch` is how many spikes a run on a CPU takes, part of the model since the last bits of an embedding depend on it; and
    `score` is how well it told held-out units apart, from 0 to 1.
    """

    name: str
    version: str
    sha256: str
    input_name: str
    output_name: str
    dtype: str
    n_samples: int
    n_before: int
    ms_before: float
    ms_after: float
    n_neighbors: int
    n_dims: int
    sampling_frequency: float
    freq_min_hz: float
    freq_max_hz: float
    normalisation: str
    opset: int
    cpu_batch: int = CPU_BATCH
    score: float = 0.0

    @classmethod
    def read(cls, path: Path) -> "Contract":
        """Read and check a contract; keys beyond the known ones (training, validation) are for people.

        Raises
        ------
        StreamsortError
            If the file is missing, is not a JSON object, lacks a key, or a value has the wrong type or does not fit the others.
        """
        try:
            table = json.loads(path.read_text())
        except FileNotFoundError:
            raise StreamsortError(f"encoder contract {path}: no such file, expected it beside the .onnx") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise StreamsortError(f"encoder contract {path}: not JSON ({error})") from None
        if not isinstance(table, dict):
            raise StreamsortError(f"encoder contract {path}: {type(table).__name__}, expected an object")
        told = [item for item in fields(cls) if item.name in table or item.default is MISSING]
        contract = cls(**{item.name: _typed(path, table, item.name, item.type) for item in told})
        contract._check(path)
        return contract

    def _check(self, path: Path) -> None:
        window = round((self.ms_before + self.ms_after) * 1e-3 * self.sampling_frequency)
        expected = {
            "dtype": (self.dtype == "float32", "float32"),
            "normalisation": (self.normalisation == NOISE_UNITS, NOISE_UNITS),
            "sampling_frequency": (self.sampling_frequency > 0, "a positive number of Hz"),
            "n_neighbors": (self.n_neighbors > 0, "1 or more"),
            "n_dims": (self.n_dims > 0, "1 or more"),
            "n_samples": (self.n_samples == window, f"{window}, from ms_before and ms_after"),
            "cpu_batch": (self.cpu_batch > 0, "1 or more"),
            "score": (0 <= self.score <= 1, "0 to 1"),
            "n_before": (0 < self.n_before < self.n_samples, f"1 to {self.n_samples - 1}"),
        }
        for key, (holds, words) in expected.items():
            if not holds:
                raise StreamsortError(f"encoder contract {path}: {key} = {getattr(self, key)!r}, expected {words}")


def _typed(path: Path, table: dict[str, Any], key: str, kind: Any) -> Any:
    if key not in table:
        raise StreamsortError(f"encoder contract {path}: key {key} is missing")
    value = table[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise StreamsortError(f"encoder contract {path}: {key} = {value!r}, expected {kind.__name__}")
    return value


def shipped_model(which: str = "light") -> Path:
    """Find a model that comes with the package, `full` or `light`: inside an installed wheel, or at the root of a checkout.

    Raises
    ------
    StreamsortError
        If it is in neither.
    """
    package, name = Path(__file__).parent, SHIPPED[which]
    places = [package / "models" / name, package.parent / "models" / name]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise StreamsortError(f"encoder {name}: not in {places[0].parent} nor {places[1].parent}, expected it with the package")
    return found


class Encoder:
    """The live encoder: one session, one fixed batch shape; not to be shared between threads.

    Parameters
    ----------
    path : Path or str, optional
        The `.onnx`; its contract is the `.json` of the same name. By default the light one of those that are shipped.
    provider : {"auto", "cpu", "cuda"}
        `auto` takes CUDA where it really runs, else the CPU; `cuda` refuses to fall back.
    sampling_frequency : float, optional
        Rate of the stream in Hz, if it is not the model's: snippets are then resampled linearly around the trough.
    batch_size : int, optional
        Spikes per run of the session, by default the contract's `cpu_batch` on a CPU and 32 on CUDA; results of different batch
        sizes differ in the last bits.

    Attributes
    ----------
    contract : Contract
        What the model promises.
    provider : str
        What is really used, "cpu" or "cuda".
    n_before, n_after : int
        Samples before and from the trough that a snippet has at the stream's rate.

    Raises
    ------
    StreamsortError
        If the model or its contract is missing or broken, or CUDA is asked for and does not run.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        provider: Provider = "auto",
        *,
        sampling_frequency: float | None = None,
        batch_size: int | None = None,
    ) -> None:
        if provider not in ("auto", "cpu", "cuda"):
            raise StreamsortError(f"encoder provider {provider!r}, expected auto, cpu or cuda")
        if batch_size is not None and batch_size < 1:
            raise StreamsortError(f"encoder batch_size {batch_size}, expected 1 or more")
        self.path = Path(path) if path is not None else shipped_model()
        model = _model_bytes(self.path)
        self.contract = Contract.read(self.path.with_suffix(".json"))
        digest = hashlib.sha256(model).hexdigest()
        if digest != self.contract.sha256:
            raise StreamsortError(
                f"encoder {self.path}: sha256 {digest[:12]}..., expected {self.contract.sha256[:12]}... of its contract"
            )
        batch_sizes = {"cpu": batch_size or self.contract.cpu_batch, "cuda": batch_size or CUDA_BATCH}
        self.provider, self._session = _open(self.path, model, provider, batch_sizes)
        self.batch_size = batch_sizes[self.provider]
        _check_graph(self.path, self._session, self.contract, self.batch_size)
        self._resample(sampling_frequency or self.contract.sampling_frequency)
        self._input = np.zeros((self.batch_size, self.contract.n_samples, self.contract.n_neighbors), np.float32)

    @property
    def name(self) -> str:
        return self.contract.name

    @property
    def sha256(self) -> str:
        return self.contract.sha256

    @property
    def n_dims(self) -> int:
        return self.contract.n_dims

    def _resample(self, sampling_frequency: float) -> None:
        """Prepare, for each of the model's samples, the two samples of the stream around it and their weights."""
        contract = self.contract
        if not 0 < sampling_frequency < np.inf:
            raise StreamsortError(f"encoder sampling_frequency {sampling_frequency}, expected a positive number of Hz")
        self.sampling_frequency = sampling_frequency
        self.n_before = round(contract.ms_before * 1e-3 * sampling_frequency)
        self.n_after = round(contract.ms_after * 1e-3 * sampling_frequency)
        ratio = sampling_frequency / contract.sampling_frequency
        place = self.n_before + (np.arange(contract.n_samples) - contract.n_before) * ratio
        place = np.clip(place, 0, self.n_before + self.n_after - 1)  # rounding of the window may leave its ends a half sample short
        self._low = np.floor(place).astype(np.intp)
        self._high = np.minimum(self._low + 1, self.n_before + self.n_after - 1)
        self._weight = (place - self._low).astype(np.float32)[:, None]
        self._as_is = bool((self._weight == 0).all())

    def warmup(self) -> None:
        """Run one batch, so that the first spike does not pay for what a session does once."""
        shape = (1, self.n_before + self.n_after, self.contract.n_neighbors)
        self(np.zeros(shape, np.float32), np.ones((1, self.contract.n_neighbors), np.float32))

    def __call__(self, snippets: NDArray[np.float32], noise_level: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embed spikes.

        Parameters
        ----------
        snippets : ndarray, shape (n, n_before + n_after, n_neighbors), float32
            In uV at the stream's rate, trough at row `n_before`, channel 0 the peak channel. Not written.
        noise_level : ndarray, shape (n, n_neighbors), float32
            Of each snippet's channels in uV; a channel whose noise level is 0, as where a neighbour is missing, counts as silent.

        Returns
        -------
        embeddings : ndarray, shape (n, n_dims), float32
            A row depends on that row of the input alone, to the last bit.

        Raises
        ------
        StreamsortError
            If the shapes are not those above.
        """
        n = len(snippets)
        expected = (n, self.n_before + self.n_after, self.contract.n_neighbors)
        if snippets.shape != expected or noise_level.shape != (n, expected[2]):
            found = f"snippets {snippets.shape} and noise_level {noise_level.shape}"
            raise StreamsortError(f"encoder: {found}, expected {expected} and {(n, expected[2])}")
        embeddings = np.empty((n, self.contract.n_dims), np.float32)
        scale = np.zeros((n, 1, expected[2]), np.float32)
        np.divide(1.0, noise_level[:, None], out=scale, where=noise_level[:, None] > 0)
        for start in range(0, n, self.batch_size):
            rows = min(self.batch_size, n - start)
            part = slice(start, start + rows)
            np.multiply(self.at_models_rate(snippets[part]), scale[part], out=self._input[:rows])
            self._input[rows:] = 0.0
            (output,) = self._session.run([self.contract.output_name], {self.contract.input_name: self._input})
            embeddings[part] = output[:rows]
        return embeddings

    def at_models_rate(self, snippets: NDArray[np.float32]) -> NDArray[np.float32]:
        """Resample snippets of the stream to (n, contract.n_samples, n_neighbors); at its rate they stay as they are."""
        if self._as_is:
            return snippets
        low = snippets[:, self._low]
        resampled: NDArray[np.float32] = low + (snippets[:, self._high] - low) * self._weight
        return resampled


def _model_bytes(path: Path) -> bytes:
    """Read a model whole; the session is made of these very bytes, so what was verified is what runs."""
    try:
        model = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise StreamsortError(f"encoder {path}: no such file, expected an .onnx") from None
    if _EXTERNAL_DATA in model:
        raise StreamsortError(f"encoder {path}: keeps weights in another file, expected one file with all of them")
    return model


def _cuda_driver() -> bool:
    """Ask the driver itself: onnxruntime lists what it was compiled for, with or without a GPU."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError):
            return int(ctypes.CDLL(library).cuInit(0)) == 0
    return False


def _open(path: Path, model: bytes, provider: Provider, batch_sizes: dict[str, int]) -> tuple[str, Any]:
    """Make a session on what was asked for and really runs."""
    if provider != "cpu" and _SESSION_NAME["cuda"] in ort.get_available_providers() and _cuda_driver():
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()
        session = _session(path, model, "cuda", batch_sizes["cuda"])
        if session.get_providers()[0] == _SESSION_NAME["cuda"]:
            return "cuda", session
    if provider == "cuda":
        raise StreamsortError(
            "encoder provider 'cuda': no session runs on CUDA here, expected a driver and CUDA libraries; or 'cpu'"
        )
    return "cpu", _session(path, model, "cpu", batch_sizes["cpu"])


def _session(path: Path, model: bytes, provider: str, batch_size: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # two threads are slower than one at this size
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    options.add_free_dimension_override_by_name("batch", batch_size)
    chosen: list[Any] = [(_SESSION_NAME["cuda"], _CUDA_OPTIONS)] if provider == "cuda" else []
    try:
        return ort.InferenceSession(model, options, providers=[*chosen, _SESSION_NAME["cpu"]])
    except Exception as error:  # onnxruntime's exceptions share no base class but this
        reason = str(error).splitlines()[0]
        raise StreamsortError(f"encoder {path}: onnxruntime does not load it ({reason})") from None


def _check_graph(path: Path, session: Any, contract: Contract, batch_size: int) -> None:
    """Compare the session's one input and one output with the contract."""
    shapes = {"input": [contract.n_samples, contract.n_neighbors], "output": [contract.n_dims]}
    for role, nodes in (("input", session.get_inputs()), ("output", session.get_outputs())):
        name = getattr(contract, f"{role}_name")
        found = [(node.name, node.type, list(node.shape)) for node in nodes]
        if found != [(name, "tensor(float)", [batch_size, *shapes[role]])]:
            raise StreamsortError(f"encoder {path}: {role}s {found}, expected one {name} float32 {['batch', *shapes[role]]}")
