"""Where chunks come from: one URL, one `Source`.

A source iterates `Chunk`s with absolute sample indices that start at 0 with the first sample received, and knows its `StreamInfo`
before the first of them. What it finds wrong with a live stream (missing, repeated samples) travels as `Chunk.gaps`; only what the
user got wrong, or a stream that stopped being the same stream, is a `StreamsortError`. Modules that need a transport library are
imported when asked for.
"""

from collections.abc import Iterator
from types import TracebackType
from typing import Protocol, Self

from streamsort.errors import StreamsortError
from streamsort.probe import Probe
from streamsort.records import Chunk, StreamInfo


class Source(Protocol):
    """Anything that yields chunks; `close` may be called from another thread and ends the iteration within 0.2 s."""

    @property
    def info(self) -> StreamInfo:
        """What is known before the first chunk."""
        ...

    @property
    def counters(self) -> dict[str, int]:
        """What went wrong so far, by name; empty for a file."""
        ...

    def __iter__(self) -> Iterator[Chunk]: ...

    def close(self) -> None:
        """Stop and let go of files and sockets; calling it again does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def open_source(
    url: str,
    *,
    probe: Probe | None = None,
    speed: float | None = None,
    chunk_ms: float = 1.0,
    chunk_samples: int | None = None,
    timeout_s: float | None = None,
) -> Source:
    """Open what a URL names.

    Parameters
    ----------
    url : str
        A path (SpikeInterface binary folder, folder with traces.raw and meta.json, or raw file with a .json or .toml beside it),
        `sim:key=value,...`, `lsl:NAME` or `lsl:name=...,type=...,source_id=...`, or `tcp://host:port` (ZeroMQ, wire format 1).
    probe : Probe, optional
        Geometry to use instead of what the source knows; its contacts must match the stream's channels.
    speed : float, optional
        For files and simulations: 1 replays in real time, 2 twice as fast, None as fast as chunks are taken.
    chunk_ms : float
        Length of a chunk of a file or simulation; a live stream is delivered as it arrives.
    chunk_samples : int, optional
        The same in samples; wins over `chunk_ms`.
    timeout_s : float, optional
        For live streams: silence after which the source gives up with an error; None waits for ever.

    Raises
    ------
    StreamsortError
        If the URL names nothing that can be opened, or an option does not fit the kind of source.
    """
    kind, _, rest = url.partition(":")
    if kind == "lsl" or rest.startswith("//"):
        if speed is not None:
            raise StreamsortError(f"speed {speed:g} for {url}, expected none: a live stream sets its own pace")
        return _open_live(url, kind, probe, timeout_s)
    if kind == "sim":
        from streamsort.sources.sim import Simulation

        return Simulation(rest, probe=probe, speed=speed, chunk_ms=chunk_ms, chunk_samples=chunk_samples)
    from streamsort.sources.recording import Recording

    return Recording(url, probe=probe, speed=speed, chunk_ms=chunk_ms, chunk_samples=chunk_samples)


def _open_live(url: str, kind: str, probe: Probe | None, timeout_s: float | None) -> Source:
    if kind == "lsl":
        from streamsort.sources.lsl import LslSource

        return LslSource(url, probe=probe, timeout_s=timeout_s)
    if kind in ("tcp", "ipc"):
        from streamsort.sources.zmq import ZmqSource

        return ZmqSource(url, probe=probe, timeout_s=timeout_s)
    raise StreamsortError(f"source {url}: unknown kind {kind!r}, expected a path, sim:..., lsl:NAME or tcp://host:port")


def check_probe(probe: Probe | None, n_channels: int, stream: str) -> Probe | None:
    """Return `probe`, or refuse it when its contacts are not the stream's channels."""
    if probe is not None and probe.n_channels != n_channels:
        raise StreamsortError(f"probe has {probe.n_channels} contacts, expected {n_channels}, one per channel of {stream}")
    return probe
