"""Send a source out again: as a real LSL outlet, or as a ZeroMQ publisher of wire format 1.

What a headstage's software does, from a file or a simulation, so that a sorter can be tried in another process over the real
transport. It waits for somebody who listens, then sends each chunk when the source delivers it. Stamps are the source's own
schedule, not the moment of sending, so a late wake-up of the player is seen as latency and not as a jump in time.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import zmq

from streamsort.errors import StreamsortError
from streamsort.liblsl import clock_offset_s, describe_channels, load_pylsl, stream_name
from streamsort.records import Chunk, StreamInfo
from streamsort.sockets import bound_socket
from streamsort.sources import Source
from streamsort.wire import encode_traces

_log = logging.getLogger("streamsort.player")

_LINGER_S = 2.0  # the last samples are still on their way when the source ends
_POLL_S = 0.02


class _Outgoing(Protocol):
    def listened_to(self) -> bool: ...

    def send(self, chunk: Chunk) -> None: ...

    def close(self) -> None: ...


class _LslOutgoing:
    """An outlet; samples are dated on the stream's own time, from the first chunk on, whatever the speed."""

    def __init__(self, url: str, info: StreamInfo) -> None:
        pylsl: ModuleType = load_pylsl()
        name = stream_name(url)
        sample_type = pylsl.cf_int16 if info.dtype == np.int16 else pylsl.cf_float32
        lsl_info = pylsl.StreamInfo(
            name, "Electrophysiology", info.n_channels, info.sampling_frequency, sample_type, f"streamsort-{name}"
        )
        describe_channels(lsl_info, info)
        self._outlet: Any = pylsl.StreamOutlet(lsl_info, 0, 10)
        self._rate_hz = info.sampling_frequency
        self._to_lsl_s = -clock_offset_s(pylsl)
        self._t_origin: float | None = None

    def listened_to(self) -> bool:
        return bool(self._outlet.have_consumers())

    def send(self, chunk: Chunk) -> None:
        if self._t_origin is None:
            self._t_origin = chunk.t_origin or time.monotonic()
        self._outlet.push_chunk(chunk.traces, self._t_origin + (chunk.end_sample - 1) / self._rate_hz + self._to_lsl_s)

    def close(self) -> None:
        """Keep the outlet until its buffer is empty: the library does not tell, so until the listeners leave, or for a while."""
        deadline = time.monotonic() + _LINGER_S
        while self._t_origin is not None and self.listened_to() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self._outlet = None


class _ZmqOutgoing:
    """A publisher; a subscriber that is slow makes it wait, since a replay can."""

    def __init__(self, url: str, info: StreamInfo) -> None:
        self._context = zmq.Context()
        self._socket = bound_socket(self._context, zmq.XPUB, url, "replay")
        self._socket.setsockopt(zmq.XPUB_NODROP, 1)
        self._info = info
        self._seq = 0
        self._heard = False

    def listened_to(self) -> bool:
        while self._socket.poll(0):
            self._heard = self._socket.recv().startswith(b"\x01") or self._heard
        return self._heard

    def send(self, chunk: Chunk) -> None:
        rate_hz = self._info.sampling_frequency
        stamp = chunk.t_origin + (chunk.end_sample - 1) / rate_hz if chunk.t_origin else time.monotonic()
        message = encode_traces(
            chunk.traces,
            seq=self._seq,
            start_sample=chunk.start_sample,
            sampling_frequency=rate_hz,
            gain_uv=self._info.gain_uv,
            t_acquired=stamp,
        )
        self._socket.send_multipart(message)
        self._seq += 1

    def close(self) -> None:
        self._socket.close(linger=round(_LINGER_S * 1000) if self._heard else 0)
        self._context.term()


_OUTGOING: dict[str, Callable[[str, StreamInfo], _Outgoing]] = {"lsl": _LslOutgoing, "tcp": _ZmqOutgoing, "ipc": _ZmqOutgoing}


def replay(source: Source, url: str, *, wait_s: float | None = None, stop: threading.Event | None = None) -> int:
    """Send all of a source to whoever listens.

    Parameters
    ----------
    source : Source
        Opened with a `speed`; without one it is sent as fast as it can be. It is closed at the end.
    url : str
        `lsl:NAME`, or `tcp://127.0.0.1:PORT` to bind.
    wait_s : float, optional
        How long to wait for somebody to listen; None waits until `stop`.
    stop : threading.Event, optional
        Ends the replay.

    Returns
    -------
    n_samples : int
        Samples sent.

    Raises
    ------
    StreamsortError
        If the URL is none of these, the port is taken, liblsl is missing, or nobody listened within `wait_s`.
    """
    make = _OUTGOING.get(url.partition(":")[0])
    if make is None:
        raise StreamsortError(f"replay to {url}: expected lsl:NAME or tcp://host:port")
    stop = stop or threading.Event()
    out = make(url, source.info)
    try:
        with source:
            return _send_all(source, out, url, math.inf if wait_s is None else wait_s, stop)
    finally:
        out.close()


def _send_all(source: Source, out: _Outgoing, url: str, wait_s: float, stop: threading.Event) -> int:
    deadline = time.monotonic() + wait_s
    _log.info("replaying %s to %s once somebody listens", source.info.name, url)
    while not out.listened_to():
        if time.monotonic() >= deadline:
            raise StreamsortError(f"replay to {url}: nobody listened for {wait_s:g} s")
        if stop.wait(_POLL_S):
            return 0
    n_samples = 0
    for chunk in source:
        if stop.is_set():
            break
        out.send(chunk)
        n_samples = chunk.end_sample
    return n_samples
