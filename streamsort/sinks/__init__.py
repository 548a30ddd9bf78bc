"""Where outputs go: one URL, one `Sink`.

A sink takes every `Output` of a sorter in order and makes it available outside the process. It never waits for a receiver: one that
is slow or absent loses messages and can count them, and nobody else notices.
"""

from typing import Protocol

from streamsort.errors import StreamsortError
from streamsort.records import Output, StreamInfo


class Sink(Protocol):
    """Anything that publishes outputs; after `close`, `publish` does nothing."""

    def publish(self, output: Output) -> None:
        """Send what is in `output`."""
        ...

    def close(self) -> None:
        """Let go of the socket or outlet; calling it again does nothing."""
        ...


class Archive(Sink, Protocol):
    """A sink that keeps everything, and is told by `clean = False` when the stream does not end as it should."""

    clean: bool


def open_sink(url: str, *, info: StreamInfo, session: str | None = None, model: str = "", bin_ms: float = 20.0) -> Sink:
    """Open what a URL names.

    Parameters
    ----------
    url : str
        `tcp://127.0.0.1:5560` (ZeroMQ PUB, wire format 1; port `*` picks a free one) or `lsl:NAME`.
    info : StreamInfo
        Of the stream that is sorted.
    session : str, optional
        Name of the session, sent in every header; a fresh uuid by default.
    model : str
        Name of the encoder, for outputs that do not say by which their spikes were named.
    bin_ms : float
        Width of the bins in which spikes are counted.

    Raises
    ------
    StreamsortError
        If the URL is none of these, the port is taken, or the transport's library is missing.
    """
    kind = url.partition(":")[0]
    if kind == "lsl":
        from streamsort.sinks.lsl import LslSink

        return LslSink(url, info=info)
    if kind in ("tcp", "ipc"):
        from streamsort.sinks.zmq import ZmqSink

        return ZmqSink(url, info=info, session=session, model=model, bin_ms=bin_ms)
    raise StreamsortError(f"sink {url}: unknown kind {kind!r}, expected tcp://host:port or lsl:NAME")
