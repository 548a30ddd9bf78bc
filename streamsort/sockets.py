"""ZeroMQ sockets as streamsort uses them: explicit limits, one-line errors, and a `close` that may come from another thread.

Nothing is kept here but how long a socket has been silent. ZeroMQ's defaults (1000 messages, linger for ever) lose data in a stall
of half a second and hang at exit, so both are always set.
"""

import logging
import time
from collections.abc import Callable, Iterator
from threading import Event, Lock
from typing import TypeVar

import zmq

from streamsort.errors import StreamsortError
from streamsort.wire import MalformedMessage

T = TypeVar("T")

_log = logging.getLogger("streamsort.sockets")

_RECEIVE_MS = 100
_QUIET_S = 5.0  # silence after which the log says so, once
_MAX_MESSAGE_BYTES = 1 << 28  # a peer that sends more is disconnected
_MAX_PORT = 65535  # the library takes a larger one modulo 65536
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


class Subscriber:
    """A SUB socket that decodes what arrives, counts what it cannot decode, and may be closed from another thread.

    Parameters
    ----------
    url : str
        Address to connect to; nobody need be there yet.
    role : str
        Named in errors.
    topic : str
        First topic to subscribe to.
    high_water : int
        Messages that may wait; 0 never drops.
    timeout_s : float, optional
        Silence after which `receive` raises; None waits for ever.

    Attributes
    ----------
    n_malformed : int
        Messages that were skipped.

    Raises
    ------
    StreamsortError
        If the address is none.
    """

    def __init__(self, url: str, role: str, topic: str, *, high_water: int, timeout_s: float | None) -> None:
        self.url = url
        self.n_malformed = 0
        self._timeout_s = timeout_s
        self._closed = Event()
        self._lock = Lock()  # keeps `close` of another thread away from the socket while it receives
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, high_water)
        self._socket.setsockopt(zmq.RCVTIMEO, _RECEIVE_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        try:
            check_port(url, role)
            self._socket.connect(url)
        except StreamsortError:
            self.close()
            raise
        except zmq.ZMQError as error:
            self.close()
            raise StreamsortError(f"{role} {url}: {str(error).lower()}, expected an address such as tcp://127.0.0.1:5560") from None
        self.subscribe(topic)

    def subscribe(self, topic: str) -> None:
        self._socket.setsockopt_string(zmq.SUBSCRIBE, topic)

    def receive(self, decode: Callable[[list[bytes]], T]) -> Iterator[T]:
        """Yield what `decode` makes of each message, until closed.

        Raises
        ------
        StreamsortError
            After `timeout_s` without a message that can be decoded.
        """
        silence = Silence(self.url, self._timeout_s)
        while not self._closed.is_set():
            decoded = self._decoded(decode)
            silence.note(heard=decoded is not None)
            if decoded is not None:
                yield decoded

    def close(self) -> None:
        """Disconnect; `receive` in another thread ends within 0.2 s."""
        self._closed.set()
        with self._lock:
            if not self._socket.closed:
                self._socket.close(linger=0)
                self._context.term()

    def _decoded(self, decode: Callable[[list[bytes]], T]) -> T | None:
        with self._lock:
            if self._closed.is_set():
                return None
            try:
                frames = self._socket.recv_multipart()
            except zmq.Again:
                return None
        try:
            return decode(frames)
        except MalformedMessage as error:
            _log.log(logging.DEBUG if self.n_malformed else logging.WARNING, "%s: message skipped: %s", self.url, error)
            self.n_malformed += 1
            return None


def check_port(url: str, role: str) -> None:
    """Refuse a port that is none."""
    port = url.rpartition(":")[2]
    if port.isdecimal() and int(port) > _MAX_PORT:
        raise StreamsortError(f"{role} {url}: port {port}, expected 0 to {_MAX_PORT}")


def bound_socket(context: "zmq.Context[zmq.Socket[bytes]]", kind: int, url: str, role: str) -> "zmq.Socket[bytes]":
    """Bind a publishing socket with an explicit high-water mark.

    Raises
    ------
    StreamsortError
        If the port is taken or the address is none; `context` is terminated then.
    """
    try:
        check_port(url, role)
    except StreamsortError:
        context.term()
        raise
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
