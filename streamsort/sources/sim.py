"""A simulated recording as a source: `sim:seconds=60,units=12,probe=grid32,drift_um=10,seed=1`.

The keys are the fields of `SimulationConfig` (`units` and `probe` are short for `n_units` and `probe_name`, and `channels=128`
names the probe that has so many); several numbers are written `snr=4:15` or `pauses=0.3:60:660`. Samples come as int16 with the
headstages' usual gain, in chunks of the wished length, at once or paced. A thread makes the next second while this one is
delivered: that takes many times as long as a chunk lasts.
"""

import difflib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from streamsort.errors import StreamsortError
from streamsort.probe import Probe
from streamsort.records import StreamInfo
from streamsort.simconfig import PROBE_OF
from streamsort.simulate import GAIN_UV, SimulationConfig, simulated_blocks
from streamsort.sources import check_probe
from streamsort.sources.pace import PacedSource

_SHORT = {"units": "n_units", "probe": "probe_name", "channels": "probe_name"}


class Simulation(PacedSource):
    """Stream a simulated recording.

    Parameters
    ----------
    options : str
        `key=value,...` after `sim:`; empty for the defaults.
    probe : Probe, optional
        Used instead of the simulated one.
    speed, chunk_ms, chunk_samples
        As in `Recording`.

    Attributes
    ----------
    info : StreamInfo
    config : SimulationConfig
        From which the truth can be had.
    n_samples : int

    Raises
    ------
    StreamsortError
        If a key is unknown or a value is not of its kind.
    """

    def __init__(
        self,
        options: str,
        *,
        probe: Probe | None = None,
        speed: float | None = None,
        chunk_ms: float = 1.0,
        chunk_samples: int | None = None,
    ) -> None:
        self.config = parse_options(options)
        n_channels = self.config.probe.n_channels
        info = StreamInfo(
            name="simulation",
            sampling_frequency=self.config.sampling_frequency,
            n_channels=n_channels,
            dtype=np.dtype(np.int16),
            gain_uv=np.full(n_channels, GAIN_UV, np.float32),
            probe=check_probe(probe, n_channels, "the simulation") or self.config.probe,
            live=speed is not None,
        )
        super().__init__(info, speed, chunk_ms, chunk_samples)
        self.n_samples = self.config.n_samples

    def _blocks(self) -> Iterator[NDArray[Any]]:
        return rechunked(self._made_ahead(), self._chunk_samples)

    def _made_ahead(self) -> Iterator[NDArray[np.int16]]:
        blocks = simulated_blocks(self.config)
        with ThreadPoolExecutor(1, "simulate") as maker:
            made = maker.submit(next, blocks, None)
            while (block := made.result()) is not None:
                made = maker.submit(next, blocks, None)
                yield block


def parse_options(options: str) -> SimulationConfig:
    """Read `key=value,...` into a `SimulationConfig`.

    Raises
    ------
    StreamsortError
        If a key is unknown (the nearest one is named) or a value does not fit.
    """
    hints = get_type_hints(SimulationConfig)
    del hints["silences"]  # a table of numbers, not for one line
    known = [*_SHORT, *hints]
    values: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, equals, text = option.partition("=")
        name = _SHORT.get(key, key)
        if name not in hints:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise StreamsortError(f"sim: unknown key {key!r}; {hint}")
        if not equals or name in values:
            raise StreamsortError(f"sim: {option!r}, expected {key}=value once")
        values[name] = _probe_of(text) if key == "channels" else _convert(hints[name], text, key)
    return SimulationConfig(**values)


def _probe_of(n_channels: str) -> str:
    """Name the probe with so many channels."""
    names = {str(n): name for n, name in PROBE_OF.items()}
    if n_channels not in names:
        raise StreamsortError(f"sim: channels = {n_channels!r}, expected {', '.join(names)}, or probe=NAME")
    return names[n_channels]


def _convert(kind: Any, text: str, key: str) -> Any:
    """Turn the text of an option into what the field takes; several numbers are written with colons between them."""
    several = next((get_args(part) for part in (kind, *get_args(kind)) if get_origin(part) is tuple), ())
    try:
        if kind is int:
            return int(text)
        if kind is float:
            return _finite(text)
        if several:
            return tuple(_finite(part) for _, part in zip(several, text.split(":"), strict=True))
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}.get(kind, "low:high" if len(several) == 2 else "share:from_s:to_s")
        raise StreamsortError(f"sim: {key} = {text!r}, expected {wanted}") from None
    return text


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def rechunked(blocks: Iterator[NDArray[Any]], n_samples: int) -> Iterator[NDArray[Any]]:
    """Cut contiguous blocks into chunks of `n_samples`, whatever the blocks' lengths; the last one may be shorter."""
    rest: NDArray[Any] | None = None
    for block in blocks:
        joined = block if rest is None else np.concatenate([rest, block])
        whole = len(joined) - len(joined) % n_samples
        for start in range(0, whole, n_samples):
            yield joined[start : start + n_samples].copy()
        rest = joined[whole:]
    if rest is not None and len(rest):
        yield rest.copy()
