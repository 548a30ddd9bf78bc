"""Outputs on a ZeroMQ PUB socket, wire format 1.

Every output becomes messages of the topics `spikes`, `bins`, `units`, `ledger`, `gaps` and `status`. Kept between outputs: the
`seq` of each topic, and the counts of bins that are still open. A subscriber that does not keep up loses messages once
10 000 are waiting for it, and sees that in `seq`; nobody ever waits for it.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from streamsort.errors import StreamsortError
from streamsort.records import Output, StreamInfo, join_records
from streamsort.sockets import bound_socket
from streamsort.wire import Envelope, to_json

_log = logging.getLogger("streamsort.sinks.zmq")

_MAX_COUNT = np.iinfo(np.int16).max
_LINGER_MS = 500
_MOST_EMPTY_BINS = 100  # at once: the bins of a long gap would push the spikes out of a subscriber's queue


class BinCounter:
    """Count spikes per unit slot in bins on a fixed grid of sample indices.

    A slot is a unit's place in the vector and never changes. It is what the units table says; a unit whose first spikes come before
    its row gets the next free place. Unsorted spikes are not counted.

    Parameters
    ----------
    bin_samples : int
        Width of a bin; bin k covers [k * bin_samples, (k + 1) * bin_samples).

    Attributes
    ----------
    slots_version : int
        Grows by one whenever the table of slots does.
    """

    def __init__(self, bin_samples: int) -> None:
        self.bin_samples = bin_samples
        self.slots_version = 0
        self._slots: dict[int, int] = {}
        self._waiting: list[NDArray[Any]] = []  # spikes of open bins
        self._next_bin = 0

    def learn_slots(self, entries: list[dict[str, Any]]) -> None:
        """Take over the slots of units (or of ledger events) that name a `unit_id` and a `slot`."""
        for entry in entries:
            unit_id, slot = entry.get("unit_id"), entry.get("slot")
            if unit_id is not None and slot is not None and self._slots.get(unit_id) != slot:
                self._slots[unit_id] = slot
                self.slots_version += 1

    def closed_bins(self, spikes: NDArray[Any], through_sample: int) -> Iterator[tuple[int, NDArray[np.int16]]]:
        """Add spikes and yield (start_sample, counts) of each bin that ends by `through_sample`.

        Empty ones are included, but of a gap of many bins only the last.
        """
        if len(spikes):
            self._waiting.append(spikes)
        first, until = self._next_bin, through_sample // self.bin_samples
        if until <= first:
            return
        self._next_bin = until
        waiting = join_records(self._waiting or [spikes])
        due = waiting["sample_index"] < until * self.bin_samples
        self._waiting = [waiting[~due]]
        counted = waiting[due & (waiting["unit_id"] >= 0)]
        unit_ids = counted["unit_id"].tolist()
        self._place_unknown(unit_ids)
        empty = [0] * (max(self._slots.values(), default=-1) + 1)
        bins: dict[int, list[int]] = defaultdict(empty.copy)
        for k, unit_id in zip((counted["sample_index"] // self.bin_samples).tolist(), unit_ids, strict=True):
            bins[max(k, first)][self._slots[unit_id]] += 1
        for k in range(first, until):
            if k in bins or k >= until - _MOST_EMPTY_BINS:
                yield k * self.bin_samples, np.minimum(bins[k], _MAX_COUNT).astype(np.int16)

    def _place_unknown(self, unit_ids: list[int]) -> None:
        for unit_id in sorted(set(unit_ids) - self._slots.keys()):
            self._slots[unit_id] = max(self._slots.values(), default=-1) + 1
            self.slots_version += 1


class ZmqSink:
    """Publish outputs to any number of subscribers.

    Parameters
    ----------
    url : str
        Address to bind, `tcp://127.0.0.1:5560`; port `*` picks a free one. Only `tcp://*:...` or a named interface leaves the
        machine.
    info, session, model, bin_ms
        As in `open_sink`.

    Attributes
    ----------
    endpoint : str
        The address that was bound.

    Raises
    ------
    StreamsortError
        If the address cannot be bound, or a bin is shorter than a sample.
    """

    def __init__(self, url: str, *, info: StreamInfo, session: str | None = None, model: str = "", bin_ms: float = 20.0) -> None:
        if not (math.isfinite(bin_ms) and bin_ms * info.sampling_frequency >= 1000):
            raise StreamsortError(f"bin_ms {bin_ms:g}, expected at least one sample of {info.name}")
        self._envelope = Envelope(info.sampling_frequency, session)
        self._bins = BinCounter(round(bin_ms * info.sampling_frequency / 1000))
        self._model = model
        self._context = zmq.Context()
        self._socket = bound_socket(self._context, zmq.PUB, url, "sink")
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        _log.info("publishing session %s on %s", self._envelope.session, self.endpoint)

    def publish(self, output: Output) -> None:
        """Send the messages of one output; spikes first, they are waited for."""
        if self._socket.closed:
            return
        if len(output.spikes):
            times = {name: getattr(output, name) for name in ("t_acquired", "t_detected", "t_assigned", "compute_s")}
            self._send("spikes", output.spikes.tobytes(), len(output.spikes), model=output.model or self._model, **times)
        self._bins.learn_slots(output.ledger)
        self._bins.learn_slots(output.units or [])
        for start_sample, counts in self._bins.closed_bins(output.spikes, output.through_sample):
            extra = {"start_sample": start_sample, "n_samples": self._bins.bin_samples, "slots": self._bins.slots_version}
            self._send("bins", counts.tobytes(), len(counts), **extra)
        for event in output.ledger:
            self._send("ledger", to_json(event), 1)
        for gap in output.gaps:
            self._send("gaps", to_json({"start_sample": gap.start_sample, "n_samples": gap.n_samples, "kind": gap.kind}), 1)
        if output.units is not None:
            self._send("units", to_json(output.units), len(output.units))
        if output.status is not None:
            self._send("status", to_json(output.status), 1)

    def close(self) -> None:
        """Close the socket; what a slow subscriber has not taken within half a second is dropped."""
        if not self._socket.closed:
            self._socket.close(linger=_LINGER_MS)
            self._context.term()

    def _send(self, topic: str, payload: bytes, n: int, **extra: Any) -> None:
        self._socket.send_multipart(self._envelope.message(topic, payload, n, **extra))
