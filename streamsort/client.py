"""What a decoder imports: spikes from a running sorter.

Connects to the address where streamsort publishes (wire format 1) and yields what arrives; needs numpy and pyzmq only. Messages
that were lost on the way, because this client was too slow, are counted per topic from their `seq`, and never repeated.
"""

import logging
from collections.abc import Iterator
from threading import Event, Lock
from types import TracebackType
from typing import Any, Self

import zmq
from numpy.typing import NDArray

from streamsort.sockets import Silence, connected_socket, poll_frames
from streamsort.wire import LossCounter, MalformedMessage, Message, decode

_log = logging.getLogger("streamsort.client")

_RECEIVE_HIGH_WATER = 100_000  # messages: a client may look away for a minute and a half


class Subscription:
    """Receive from one sorter; iterating it yields spike arrays.

    Parameters
    ----------
    url : str
        Where the sorter publishes, e.g. `tcp://127.0.0.1:5560`. It need not be there yet.
    timeout_s : float, optional
        Silence after which iterating raises; None waits for ever.

    Attributes
    ----------
    header : dict
        Of the message that came last.
    lost : dict of str to int
        Messages lost per topic.
    n_malformed : int
        Messages that were skipped because they break the format.

    Raises
    ------
    StreamsortError
        If the address is none, or (while iterating) after `timeout_s` of silence.
    """

    def __init__(self, url: str, *, timeout_s: float | None = None) -> None:
        self.header: dict[str, Any] = {}
        self.n_malformed = 0
        self._url = url
        self._timeout_s = timeout_s
        self._losses = LossCounter()
        self._closed = Event()
        self._lock = Lock()
        self._context = zmq.Context()
        self._socket = connected_socket(self._context, url, "subscribe", _RECEIVE_HIGH_WATER)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"spikes")

    @property
    def lost(self) -> dict[str, int]:
        return self._losses.lost

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """Yield (n_spikes,) SPIKE_DTYPE arrays, one per message."""
        for message in self.messages("spikes"):
            yield message.payload

    def messages(self, *topics: str) -> Iterator[Message]:
        """Yield whole messages of these topics; of all topics when none is named.

        Subscribes at once, not at the first step, so nothing sent from here on is missed.
        """
        for topic in topics or ("",):
            if topic != "spikes":
                self._socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        return self._receive(topics)

    def close(self) -> None:
        """Disconnect; an iteration in another thread ends within 0.2 s."""
        self._closed.set()
        with self._lock:
            if not self._socket.closed:
                self._socket.close(linger=0)
                self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _receive(self, topics: tuple[str, ...]) -> Iterator[Message]:
        silence = Silence(self._url, self._timeout_s)
        while not self._closed.is_set():
            frames = poll_frames(self._socket, self._lock, self._closed)
            if frames is None:
                silence.note(heard=False)
                continue
            try:
                message = decode(frames)
            except MalformedMessage as error:
                self.n_malformed += 1
                silence.note(heard=False)
                _log.debug("%s: message skipped: %s", self._url, error)
                continue
            silence.note(heard=True)
            self._losses.note(message.topic, message.header["seq"])
            if not topics or message.topic in topics:
                self.header = message.header
                yield message


def subscribe(url: str, *, timeout_s: float | None = None) -> Subscription:
    """Subscribe to the spikes of a running sorter: `for spikes in subscribe("tcp://127.0.0.1:5560"): ...`.

    Parameters
    ----------
    url : str
        Where the sorter publishes.
    timeout_s : float, optional
        Silence after which the iteration raises `StreamsortError`; None waits for ever.

    Returns
    -------
    subscription : Subscription
        Yields (n_spikes,) SPIKE_DTYPE arrays; `.messages(topic, ...)` yields other topics, `.header` and `.lost` tell about the
        last message and about losses.
    """
    return Subscription(url, timeout_s=timeout_s)
