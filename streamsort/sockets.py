"""ZeroMQ sockets as streamsort uses them: explicit limits, one-line errors, and a `close` that may come from another thread.

Nothing is kept here but how long a socket has been silent. ZeroMQ's defaults (1000 messages, linger for ever) lose data in a stall
of half a second and hang at exit, so both are always set.
"""

import logging
import time
from threading import Event, Lock

import zmq

from streamsort.errors import StreamsortError

_log = logging.getLogger("streamsort.sockets")

_POLL_MS = 100
_QUIET_S = 5.0  # silence after which the log says so, once
_SEND_HIGH_WATER = 10_000  # messages per subscriber: about 10 s at a spike message per ms


class Silence:
    """Notice that nothing arrives: say so once in the log, and give up after `timeout_s`."""

    def __init__(self, url: str, timeout_s: float | None) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._heard_at = time.monotonic()
        self._said = False

    def note(self, *, heard: bool) -> None:
        """Tell whether something arrived since the last call.

        Raises
        ------
        StreamsortError
            If nothing has arrived for `timeout_s`.
        """
        now = time.monotonic()
        if heard:
            self._heard_at, self._said = now, False
            return
        quiet_s = now - self._heard_at
        if self._timeout_s is not None and quiet_s >= self._timeout_s:
            raise StreamsortError(f"{self._url}: nothing arrived for {quiet_s:.1f} s, expected a publisher there")
        if quiet_s >= _QUIET_S and not self._said:
            self._said = True
            _log.warning("%s: nothing arrived for %.0f s, still waiting", self._url, quiet_s)


def connected_socket(context: "zmq.Context[zmq.Socket[bytes]]", url: str, role: str, high_water: int) -> "zmq.Socket[bytes]":
    """Connect a SUB socket; `high_water` 0 never drops.

    Raises
    ------
    StreamsortError
        If the address is none; `context` is terminated then.
    """
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.RCVHWM, high_water)
    try:
        socket.connect(url)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        context.term()
        raise StreamsortError(f"{role} {url}: {str(error).lower()}, expected an address such as tcp://127.0.0.1:5560") from None
    return socket


def poll_frames(socket: "zmq.Socket[bytes]", lock: Lock, closed: Event) -> list[bytes] | None:
    """Wait up to 0.1 s for a message; the lock keeps `close` of another thread away from the socket meanwhile."""
    with lock:
        if closed.is_set() or not socket.poll(_POLL_MS):
            return None
        return socket.recv_multipart()


def bound_socket(context: "zmq.Context[zmq.Socket[bytes]]", kind: int, url: str, role: str) -> "zmq.Socket[bytes]":
    """Bind a publishing socket with an explicit high-water mark.

    Raises
    ------
    StreamsortError
        If the port is taken or the address is none; `context` is terminated then.
    """
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, _SEND_HIGH_WATER)
    socket.setsockopt(zmq.LINGER, 0)
    try:
        socket.bind(url)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        context.term()
        reason = "the port is taken" if error.errno == zmq.EADDRINUSE else f"{error}".lower()
        raise StreamsortError(f"{role} {url}: {reason}, expected a free address such as tcp://127.0.0.1:5560") from None
    return socket
