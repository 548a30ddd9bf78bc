"""The session directory: everything a run published, readable at any moment and after any crash.

`SessionWriter` is a sink: outputs come in, files go out, about once a second of the stream. `Session` reads them back.

    manifest.json   what ran: versions, config, model, stream; at the end counters and `clean`
    spikes.npy      SPIKE_DTYPE records, only ever appended; its header is brought up to date at each flush
    ledger.jsonl    one unit event a line           gaps.jsonl   one breach of continuity a line
    units.json      the latest registry             probe.json   probeinterface
    templates.npz   if the sorter handed any over
    reservoir.npz   recent snippets of each unit, for a trainer; what it makes of them is looked for in models/

A disk that fails must not stop an experiment: records wait in memory for the next flush, up to a limit, and losses are counted.
"""

import importlib.metadata
import json
import os
import platform
import uuid
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.errors import StreamsortError
from streamsort.probe import Probe
from streamsort.records import SPIKE_DTYPE, Gap, Output

HEADER_BYTES = 256  # room for any count, so the header never moves the records
MAX_WAITING_BYTES = 64 * 2**20  # of one file, while the disk does not take them: an hour of 500 spikes a second


class SessionWriter:
    """Write what a stream publishes into a new directory.

    Parameters
    ----------
    path : path
        The directory to make.
    manifest : dict
        What the run is made of (config, model, stream ...), as JSON takes it. Versions and times are added, and a uuid `session` if
        there is none yet.
    probe : Probe
    sampling_frequency : float
        In Hz.
    flush_s : float
        Outputs are written when this much of the stream has passed, so this much is lost by a crash.

    Attributes
    ----------
    clean : bool
        Whether the stream ends as it should; whoever knows better sets it before `close`, and it is kept in the manifest.
    write_errors : int
        How often the disk refused; `last_error` says why it last did. `n_lost` records were given up for it.

    Raises
    ------
    StreamsortError
        If the directory exists or cannot be made. Later the disk's errors are only counted.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "session"
    >>> writer = SessionWriter(path, {"model": "none"}, Probe.linear(4), sampling_frequency=30000.0)
    >>> writer.publish(Output(through_sample=30000, spikes=np.zeros(3, SPIKE_DTYPE)))
    >>> writer.close()
    >>> len(Session(path).spikes), Session(path).manifest["clean"]
    (3, True)
    """

    def __init__(
        self, path: str | Path, manifest: dict[str, Any], probe: Probe, sampling_frequency: float, flush_s: float = 1.0
    ) -> None:
        self.path = Path(path)
        self.clean = True
        self.write_errors = 0
        self.last_error = ""
        self._flush_samples = flush_s * sampling_frequency
        self._next_flush = self._flush_samples
        self._through_sample = 0
        self._model = ""
        self._units: list[dict[str, Any]] | None = None
        self._closed = False
        self._manifest = {
            "session": str(uuid.uuid4()),
            **manifest,
            "versions": _versions(),
            "sampling_frequency": float(sampling_frequency),
            "started_at": _now(),
            "ended_at": None,
            "clean": False,
        }
        try:
            self.path.mkdir(parents=True)
            self._spikes = _AppendedFile(self.path / "spikes.npy", HEADER_BYTES)
            self._ledger = _AppendedFile(self.path / "ledger.jsonl")
            self._gaps = _AppendedFile(self.path / "gaps.jsonl")
            self._spikes.write_at_start(_npy_header(0))
            probe.to_probeinterface(self.path / "probe.json")
            _replace(self.path / "manifest.json", _json(self._manifest, indent=1))
        except FileExistsError:
            raise StreamsortError(f"session {self.path}: exists already, expected a new directory") from None
        except OSError as error:
            raise StreamsortError(f"session {self.path}: cannot be written ({error.strerror})") from None

    @property
    def session(self) -> str:
        """The uuid of this run."""
        return str(self._manifest["session"])

    @property
    def n_lost(self) -> int:
        return self._spikes.n_lost + self._ledger.n_lost + self._gaps.n_lost

    def publish(self, output: Output) -> None:
        """Take an output; write when a flush is due. Never raises for the disk."""
        if self._closed:
            return
        self._spikes.append(np.ascontiguousarray(output.spikes, SPIKE_DTYPE).tobytes(), len(output.spikes))
        for event in output.ledger:
            self._ledger.append(_json(event) + b"\n", 1)
        for gap in output.gaps:
            self._gaps.append(_json(asdict(gap)) + b"\n", 1)
        self._units = output.units if output.units is not None else self._units
        self._through_sample = max(self._through_sample, output.through_sample)
        self._model = output.model or self._model
        if output.through_sample >= self._next_flush:
            self._next_flush = output.through_sample + self._flush_samples
            self.flush()

    def flush(self) -> None:
        """Write what waits. Never raises for the disk."""
        for log in (self._spikes, self._ledger, self._gaps):
            self._attempt(log.flush)
        self._attempt(lambda: self._spikes.write_at_start(_npy_header(self._spikes.n_bytes // SPIKE_DTYPE.itemsize)))
        self._attempt(self._save_units)

    def _save_units(self) -> None:
        if self._units is not None:
            _replace(self.path / "units.json", _json(self._units))
            self._units = None

    def save_templates(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write templates.npz with these arrays, replacing an earlier one. Never raises for the disk."""

        def save() -> None:
            partial = self.path / "templates.partial.npz"
            named: dict[str, Any] = dict(arrays)
            np.savez(partial, **named)
            os.replace(partial, self.path / "templates.npz")

        self._attempt(save)

    def save_reservoir(self, columns: Mapping[str, Sequence[NDArray[Any]]]) -> None:
        """Write reservoir.npz, replacing an earlier one, from parts of each array. Never raises for the disk."""
        self._attempt(lambda: _save_parts(self.path / "reservoir.npz", columns))

    def close(self) -> None:
        """Write everything and the end into the manifest; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.flush()
        counters = {
            "through_sample": self._through_sample,
            "model": self._model,
            "n_spikes": self._spikes.n_bytes // SPIKE_DTYPE.itemsize,
            "write_errors": self.write_errors,
            "n_lost": self.n_lost + sum(log.n_waiting for log in (self._spikes, self._ledger, self._gaps)),
            "last_error": self.last_error,
        }
        end = {"ended_at": _now(), "clean": self.clean and counters["n_lost"] == 0, "counters": counters}
        self._attempt(lambda: _replace(self.path / "manifest.json", _json({**self._manifest, **end}, indent=1)))
        for log in (self._spikes, self._ledger, self._gaps):
            self._attempt(log.close)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            self.write_errors += 1
            self.last_error = str(error)


class _AppendedFile:
    """A file that grows by whole records; after a failed write it goes on where the last good record ended."""

    def __init__(self, path: Path, header_bytes: int = 0) -> None:
        self._file = path.open("xb", buffering=0)
        self._header_bytes = header_bytes
        self._waiting = bytearray()
        self.n_waiting = 0  # records
        self.n_bytes = 0  # of records on disk
        self.n_lost = 0  # records

    def append(self, data: bytes, n_records: int) -> None:
        if len(self._waiting) + len(data) > MAX_WAITING_BYTES:
            self.n_lost += n_records
            return
        self._waiting += data
        self.n_waiting += n_records

    def flush(self) -> None:
        if self._waiting:
            self._write(self._header_bytes + self.n_bytes, bytes(self._waiting))
            self.n_bytes += len(self._waiting)
            self._waiting.clear()
            self.n_waiting = 0

    def write_at_start(self, header: bytes) -> None:
        self._write(0, header)

    def _write(self, position: int, data: bytes) -> None:
        self._file.seek(position)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def close(self) -> None:
        try:
            os.fsync(self._file.fileno())
        finally:
            self._file.close()


class Session:
    """Read a session directory, whether its run has ended, goes on or was killed; each file once, when it is first asked for.

    Parameters
    ----------
    path : path

    Attributes
    ----------
    spikes : ndarray, shape (n_spikes,), SPIKE_DTYPE
        In order of publication; a read-only map of the file. A record that a crash tore is left out.
    ledger : list of dict
    gaps : list of Gap
    units : list of dict
        The registry as it last was.
    manifest : dict
        `clean` is False while the run goes on and after a crash.
    templates : dict of ndarray
        Empty if none were saved.

    Raises
    ------
    StreamsortError
        If the path is not a session directory, or a file in it is broken.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "manifest.json").is_file():
            raise StreamsortError(f"session {self.path}: no manifest.json in it, expected a session directory")
        self.manifest: dict[str, Any] = self._parse("manifest.json", (self.path / "manifest.json").read_bytes())
        if not isinstance(self.manifest, dict) or "sampling_frequency" not in self.manifest:
            raise StreamsortError(f"session {self.path}: manifest.json has no sampling_frequency, expected a session's manifest")

    @property
    def sampling_frequency(self) -> float:
        return float(self.manifest["sampling_frequency"])

    @cached_property
    def probe(self) -> Probe:
        return Probe.from_probeinterface(self.path / "probe.json")

    @cached_property
    def spikes(self) -> NDArray[Any]:
        path = self.path / "spikes.npy"
        try:
            with open(path, "rb") as file:
                np.lib.format.read_magic(file)
                _, _, dtype = np.lib.format.read_array_header_1_0(file)
                start = file.tell()
            n_spikes = (path.stat().st_size - start) // SPIKE_DTYPE.itemsize  # the header's count may be a flush behind
        except (OSError, ValueError) as error:
            raise StreamsortError(f"session {self.path}: spikes.npy cannot be read ({error})") from None
        if dtype != SPIKE_DTYPE:
            raise StreamsortError(f"session {self.path}: spikes.npy has records {dtype}, expected {SPIKE_DTYPE}")
        if n_spikes == 0:
            return np.zeros(0, SPIKE_DTYPE)
        return np.memmap(path, SPIKE_DTYPE, mode="r", offset=start, shape=(n_spikes,))

    @cached_property
    def ledger(self) -> list[dict[str, Any]]:
        return self._lines("ledger.jsonl")

    @cached_property
    def gaps(self) -> list[Gap]:
        return [Gap(**line) for line in self._lines("gaps.jsonl")]

    @cached_property
    def units(self) -> list[dict[str, Any]]:
        path = self.path / "units.json"
        units: list[dict[str, Any]] = self._parse("units.json", path.read_bytes()) if path.is_file() else []
        return units

    @cached_property
    def templates(self) -> dict[str, NDArray[Any]]:
        path = self.path / "templates.npz"
        if not path.is_file():
            return {}
        with np.load(path) as file:
            return dict(file)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        try:
            text = (self.path / name).read_bytes()
        except OSError as error:
            raise StreamsortError(f"session {self.path}: {name} cannot be read ({error.strerror})") from None
        whole = text.split(b"\n")[:-1]  # what follows the last newline was torn
        return [self._parse(f"{name} line {number}", line) for number, line in enumerate(whole, 1)]

    def _parse(self, name: str, text: bytes) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise StreamsortError(f"session {self.path}: {name} is not JSON ({error})") from None


def _npy_header(n_records: int) -> bytes:
    """Make a .npy header of `HEADER_BYTES` for this many spikes."""
    text = repr({"descr": np.lib.format.dtype_to_descr(SPIKE_DTYPE), "fortran_order": False, "shape": (n_records,)})
    start = np.lib.format.magic(1, 0) + (HEADER_BYTES - 10).to_bytes(2, "little")
    return start + text.encode("latin1").ljust(HEADER_BYTES - 11) + b"\n"


def _save_parts(path: Path, columns: Mapping[str, Sequence[NDArray[Any]]]) -> None:
    """Do as np.savez does, part by part: it makes the hot path wait while it copies a large array."""
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w") as archive:
        for name, parts in columns.items():
            header = {"descr": np.lib.format.dtype_to_descr(parts[0].dtype), "fortran_order": False}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {**header, "shape": (sum(map(len, parts)), *parts[0].shape[1:])})
                for part in parts:
                    file.write(np.ascontiguousarray(part).data)
    os.replace(partial, path)


def _json(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, default=_plain, indent=indent).encode()


def _plain(value: Any) -> Any:
    """Turn what the sorter hands over (numpy scalars, arrays, paths, dtypes) into what JSON has."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return str(value)


def _replace(path: Path, text: bytes) -> None:
    """Write a file so that a reader, or a crash, finds the old one or the new one."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(text)
    os.replace(partial, path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("streamsort", "numpy", "numba", "onnxruntime", "onnxruntime-gpu"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
