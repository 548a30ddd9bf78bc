"""One sink behind a queue of its own, so that one that is slow or broken delays neither the sorter nor another sink.

Outputs come in on the sort thread and go to the sink on the publisher's. Kept are counts of what was lost, and how long it took.
"""

import contextlib
import logging
import time
from typing import Any

from streamsort.latency import LatencyHistogram
from streamsort.queues import ITEM_BYTES, BoundedQueue
from streamsort.records import Output
from streamsort.sinks import Sink

_log = logging.getLogger("streamsort.publish")


class Publisher:
    """Publish to one sink; what it raises is counted and logged, because a full disk must not stop sorting.

    Parameters
    ----------
    sink : Sink
    limit_bytes : int
        Of the queue.
    live : bool
        A full queue loses its oldest outputs; otherwise `hand_over` waits.
    rest_s : float
        When nothing waits, for a sink that is in no hurry: to be woken a thousand times a second delays the others.
    """

    def __init__(self, sink: Sink, limit_bytes: int, live: bool, rest_s: float = 0.0) -> None:
        self.name = type(sink).__name__
        self.queue: BoundedQueue[tuple[Output, float]] = BoundedQueue(limit_bytes)
        self.n_dropped = 0
        self.n_errors = 0
        self.publish_latency = LatencyHistogram()
        self.total_latency = LatencyHistogram()
        self.sink = sink
        self._live, self._rest_s = live, rest_s
        self._last_error = ""

    def hand_over(self, output: Output, t_assigned: float) -> None:
        """Queue an output (on the sort thread)."""
        weight = output.spikes.nbytes + ITEM_BYTES
        if self._live:
            self.n_dropped += self.queue.push((output, t_assigned), weight)
        else:
            self.queue.put((output, t_assigned), weight)

    def run(self) -> None:
        """Publish until no more comes, then close the sink."""
        with contextlib.closing(self.sink):
            for output, t_assigned in self.queue:
                self._publish(output, t_assigned)
                if self._rest_s and not len(self.queue):
                    time.sleep(self._rest_s)

    def status(self) -> dict[str, Any]:
        """Return how the sink is doing, ready for JSON."""
        return {
            "name": self.name,
            "waiting": len(self.queue),
            "dropped": self.n_dropped,
            "errors": self.n_errors,
            "publish_ms": self.publish_latency.summary(),
        }

    def _publish(self, output: Output, t_assigned: float) -> None:
        try:
            self.sink.publish(output)
        except Exception as error:
            self.n_errors += 1
            if repr(error) != self._last_error:  # not a thousand times a second
                self._last_error = repr(error)
                _log.exception("sink %s failed; sorting goes on", self.name)
            return
        now = time.monotonic()
        self.publish_latency.add(now - t_assigned)
        if self._live:
            self.total_latency.add_all(now - output.spikes["time"])
