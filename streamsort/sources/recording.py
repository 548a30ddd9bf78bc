"""Recordings on disk: a memory map, a few numbers that say what it holds, and a pace.

Three layouts are read with json, tomllib and numpy alone: a SpikeInterface binary folder (`binary.json`), a folder with
`traces.raw` and `meta.json`, and a raw file with `NAME.json` or `NAME.toml` beside it. Samples stay int16 or float32; any other
type, and data with an offset, become float32 (with an offset: in microvolts). All that can be wrong is said before the first chunk.
"""

import difflib
import json
import logging
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.errors import StreamsortError
from streamsort.probe import Probe
from streamsort.records import StreamInfo
from streamsort.sources import check_probe
from streamsort.sources.pace import PacedSource

_log = logging.getLogger("streamsort.sources.recording")

_DTYPES = ("int16", "float32", "uint16", "int32", "float64")
_MAX_RATE_HZ = 10_000_000
_SUFFIXES = (".json", ".toml")

# Every spelling that is understood, by the field it fills.
_SPELLINGS = {
    "sampling_frequency": ("sampling_frequency", "sampling_rate", "fs"),
    "n_channels": ("n_channels", "num_channels", "num_chan"),
    "dtype": ("dtype",),
    "gain_uv": ("gain_uv", "gain_uV", "gain_to_uv", "gain_to_uV"),
    "offset_uv": ("offset_uv", "offset_uV", "offset_to_uv", "offset_to_uV", "offset"),
    "n_samples": ("n_samples", "num_samples"),
    "file_offset": ("file_offset",),
    "time_axis": ("time_axis",),
    "probe": ("probe",),
}


@dataclass(frozen=True)
class _Layout:
    """What a description says about a raw file, checked; `gain_uv` and `offset_uv` are (n_channels,) float32."""

    sampling_frequency: float
    n_channels: int
    dtype: np.dtype[Any]
    gain_uv: NDArray[np.float32]
    offset_uv: NDArray[np.float32]
    n_samples: int | None
    file_offset: int
    time_axis: int


class Recording(PacedSource):
    """Replay a recording from disk.

    Parameters
    ----------
    path : str or Path
        Folder or raw file in one of the three layouts.
    probe : Probe, optional
        Used instead of the probe stored with the recording.
    speed : float, optional
        Multiple of real time; None delivers as fast as chunks are taken, with `t_origin` 0.
    chunk_ms, chunk_samples
        Length of a chunk; samples win over ms. The last chunk may be shorter.

    Attributes
    ----------
    info : StreamInfo
    n_samples : int
        Length of the whole recording.

    Raises
    ------
    StreamsortError
        If a file is missing, cut short, described wrongly, or the probe does not fit.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        probe: Probe | None = None,
        speed: float | None = None,
        chunk_ms: float = 1.0,
        chunk_samples: int | None = None,
    ) -> None:
        traces_path, described_in, table, probe_path = _locate(Path(path))
        layout = _parse(table, described_in)
        self._traces = _map(traces_path, layout)
        self._scale = (layout.gain_uv, layout.offset_uv) if layout.offset_uv.any() else None
        if probe is None and probe_path is not None:
            probe = Probe.from_probeinterface(probe_path)
        keeps_int16 = layout.dtype == np.int16 and self._scale is None
        info = StreamInfo(
            name=Path(path).stem or str(path),
            sampling_frequency=layout.sampling_frequency,
            n_channels=layout.n_channels,
            dtype=np.dtype(np.int16 if keeps_int16 else np.float32),
            gain_uv=layout.gain_uv if self._scale is None else np.ones(layout.n_channels, np.float32),
            probe=check_probe(probe, layout.n_channels, str(path)),
            live=speed is not None,
        )
        super().__init__(info, speed, chunk_ms, chunk_samples)
        self.n_samples = len(self._traces)

    def _blocks(self) -> Iterator[NDArray[Any]]:
        for start in range(0, self.n_samples, self._chunk_samples):
            # a copy: nobody downstream shall wait for the disk, or see a read-only array
            block = np.array(self._traces[start : start + self._chunk_samples], dtype=self.info.dtype, order="C")
            if self._scale is not None:
                block *= self._scale[0]
                block += self._scale[1]
            yield block


def _locate(path: Path) -> tuple[Path, Path, dict[str, Any], Path | None]:
    """Find the traces, the file that describes them, its table, and the probe file if there is one."""
    if not path.exists():
        raise StreamsortError(f"recording {path}: no such file or folder")
    if not path.is_dir():
        return _locate_raw(path)
    probes = [path / name for name in ("probe.json", "probegroup.json") if (path / name).exists()]
    probe_path = probes[0] if probes else None
    if (path / "binary.json").exists():
        described_in = path / "binary.json"
        table = _read_table(described_in).get("kwargs")
        files = table.get("file_paths") if isinstance(table, dict) else None
        if not isinstance(table, dict) or not isinstance(files, list) or len(files) != 1:
            raise StreamsortError(f"recording {described_in}: file_paths {files!r}, expected kwargs with one file (one segment)")
        return path / str(files[0]), described_in, table, probe_path
    if (path / "meta.json").exists() and (path / "traces.raw").exists():
        return path / "traces.raw", path / "meta.json", _read_table(path / "meta.json"), probe_path
    raise StreamsortError(f"recording {path}: not a recording folder, expected binary.json, or traces.raw and meta.json")


def _locate_raw(path: Path) -> tuple[Path, Path, dict[str, Any], Path | None]:
    sidecars = [
        p for end in _SUFFIXES for p in (path.with_suffix(end), path.with_name(path.name + end)) if p.is_file() and p != path
    ]
    if not sidecars:
        raise StreamsortError(f"recording {path}: nothing describes it, expected {path.stem}.json or {path.stem}.toml beside it")
    table = _read_table(sidecars[0])
    known = [name for names in _SPELLINGS.values() for name in names]
    for key in table:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if near and key not in known:
            raise StreamsortError(f"recording {sidecars[0]}: unknown key {key}; did you mean {near[0]}?")
    stored = table.get("probe")
    return path, sidecars[0], table, None if stored is None else sidecars[0].parent / str(stored)


def _read_table(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StreamsortError(f"recording {path}: not {path.suffix[1:].upper()} ({error})") from None
    if not isinstance(table, dict):
        raise StreamsortError(f"recording {path}: a {type(table).__name__}, expected a table of keys")
    return table


def _parse(table: dict[str, Any], path: Path) -> _Layout:
    """Check a description and fill in what may be left out."""
    found = {
        field: next((table[name] for name in names if table.get(name) is not None), None) for field, names in _SPELLINGS.items()
    }
    fs = found["sampling_frequency"]
    if isinstance(fs, bool) or not isinstance(fs, int | float) or not 0 < fs <= _MAX_RATE_HZ:
        raise StreamsortError(f"recording {path}: sampling_frequency {fs!r}, expected a positive number of Hz")
    n_channels = _whole(found["n_channels"], "n_channels", path, least=1)
    dtype = _sample_type(found["dtype"], path)
    if found["gain_uv"] is None:
        _log.warning("%s says no gain: samples are taken as microvolts", path)
    gain_uv = _per_channel(found["gain_uv"], 1.0, n_channels, "gain_uv", path)
    if not gain_uv.all():
        raise StreamsortError(f"recording {path}: gain_uv 0, expected microvolts per step")
    n_samples = None if found["n_samples"] is None else _whole(found["n_samples"], "n_samples", path, least=1)
    time_axis = _whole(found["time_axis"] or 0, "time_axis", path, least=0)
    if time_axis > 1:
        raise StreamsortError(f"recording {path}: time_axis {time_axis}, expected 0 or 1")
    file_offset = _whole(found["file_offset"] or 0, "file_offset", path, least=0)
    offset_uv = _per_channel(found["offset_uv"], 0.0, n_channels, "offset_uv", path)
    return _Layout(float(fs), n_channels, dtype, gain_uv, offset_uv, n_samples, file_offset, time_axis)


def _sample_type(value: Any, path: Path) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(value)
    except TypeError:
        dtype = np.dtype(object)
    if value is None or dtype.newbyteorder("=").name not in _DTYPES:
        raise StreamsortError(f"recording {path}: dtype {value!r}, expected one of {', '.join(_DTYPES)}")
    return dtype


def _whole(value: Any, name: str, path: Path, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise StreamsortError(f"recording {path}: {name} {value!r}, expected a whole number, {least} or more")
    return value


def _per_channel(value: Any, default: float, n_channels: int, name: str, path: Path) -> NDArray[np.float32]:
    """Spread one number over the channels, or take a list with one number per channel."""
    try:
        values = np.asarray(default if value is None else value, dtype=np.float32)
    except (TypeError, ValueError):
        values = np.array(np.nan, np.float32)
    if values.shape not in ((), (n_channels,)) or not np.isfinite(values).all():
        shown = f"{len(value)} values" if isinstance(value, list) else repr(value)
        raise StreamsortError(f"recording {path}: {name} {shown}, expected a number or {n_channels} numbers, one per channel")
    return np.broadcast_to(values, (n_channels,)).copy()


def _map(path: Path, layout: _Layout) -> NDArray[Any]:
    """Map the samples read-only as (n_samples, n_channels) after checking that the file is whole."""
    if not path.is_file():
        raise StreamsortError(f"recording {path}: no such file")
    n_bytes = path.stat().st_size - layout.file_offset
    n_samples, rest = divmod(n_bytes, layout.dtype.itemsize * layout.n_channels)
    if n_samples < 1:
        raise StreamsortError(f"recording {path}: {max(n_bytes, 0)} bytes of samples, expected at least one row")
    if rest:
        row = layout.dtype.itemsize * layout.n_channels
        raise StreamsortError(
            f"recording {path}: {n_bytes} bytes, expected a multiple of {row} ({layout.n_channels} x {layout.dtype})"
        )
    if layout.n_samples is not None and layout.n_samples != n_samples:
        raise StreamsortError(f"recording {path}: {n_samples} samples, expected {layout.n_samples} as described")
    shape = (n_samples, layout.n_channels) if layout.time_axis == 0 else (layout.n_channels, n_samples)
    traces = np.memmap(path, dtype=layout.dtype, mode="r", offset=layout.file_offset, shape=shape)
    return traces if layout.time_axis == 0 else traces.T
