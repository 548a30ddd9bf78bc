"""What a decoder imports: spikes from a running sorter.

Connects to the address where streamsort publishes (wire format 1) and yields what arrives; needs numpy and pyzmq only. Messages
that were lost on the way, because this client was too slow, are counted per topic from their `seq`, and never repeated.
"""

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from streamsort.sockets import Subscriber
from streamsort.wire import LossCounter, Message, decode

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
        self._losses = LossCounter()
        self._subscriber = Subscriber(url, "subscribe", "spikes", high_water=_RECEIVE_HIGH_WATER, timeout_s=timeout_s)

    @property
    def n_malformed(self) -> int:
        return self._subscriber.n_malformed

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
            self._subscriber.subscribe(topic)
        return self._receive(topics)

    def close(self) -> None:
        """Disconnect; an iteration in another thread ends within 0.2 s."""
        self._subscriber.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _receive(self, topics: tuple[str, ...]) -> Iterator[Message]:
        for message in self._subscriber.receive(decode):
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
