"""`streamsort listen`: what a decoder would receive from a running sorter, per unit and second."""

import argparse
import json
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.client import Subscription, subscribe
from streamsort.commands.summary import print_rows, spread_words
from streamsort.commands.terminal import Interrupts, Terminal
from streamsort.latency import LatencyHistogram
from streamsort.records import UNSORTED

_POLL_S = 0.1
_STATUS_S = 1.0
_SHOWN_UNITS = 12


class Tally:
    """Count what a subscription yields, in a thread of its own.

    Attributes
    ----------
    counts : Counter of int
        Spikes per unit id.
    latency : LatencyHistogram
        From each spike's trough to its arrival here; meaningful on the sorter's machine.
    """

    def __init__(self, subscription: Subscription) -> None:
        self.counts: Counter[int] = Counter()
        self.latency = LatencyHistogram()
        self._subscription = subscription
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="listen", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for spikes in self._subscription:
                self._take(spikes, time.monotonic())
        except Exception as error:
            self._failure = error

    def _take(self, spikes: NDArray[Any], now: float) -> None:
        self.latency.add_all(now - spikes["time"])
        units, n = np.unique(spikes["unit_id"], return_counts=True)
        self.counts = self.counts + Counter(dict(zip(units.tolist(), n.tolist(), strict=True)))

    def goes_on(self) -> bool:
        """Wait for a moment; False when nothing more will come."""
        self._thread.join(_POLL_S)
        return self._thread.is_alive()

    def end(self) -> None:
        """Disconnect, and raise what went wrong."""
        self._subscription.close()
        self._thread.join()
        if self._failure is not None:
            raise self._failure


def main(args: argparse.Namespace) -> int:
    """Print what arrives until Ctrl-C, `--seconds`, or a silence of `--timeout`."""
    with Terminal() as terminal, subscribe(args.url, timeout_s=args.timeout) as subscription:
        began = time.monotonic()
        tally = Tally(subscription)
        with Interrupts() as interrupts:
            terminal.release_warnings()
            _follow(tally, terminal, interrupts, np.inf if args.seconds is None else args.seconds)
            tally.end()
        _summarise(args, tally, subscription.lost.get("spikes", 0), time.monotonic() - began)
    return 0


def _follow(tally: Tally, terminal: Terminal, interrupts: Interrupts, seconds: float) -> None:
    began = shown = time.monotonic()
    before: Counter[int] = Counter()
    with terminal.status_line() as show:
        while tally.goes_on() and not interrupts.requested and time.monotonic() - began < seconds:
            now = time.monotonic()
            if now - shown >= _STATUS_S:
                counts = tally.counts
                tally.latency.end_interval()
                show(_line(counts - before, now - shown, tally.latency.interval()))
                before, shown = counts, now


def _line(counts: Counter[int], elapsed_s: float, latency: dict[str, float]) -> str:
    """Write one second: the total, then unit:rate of the busiest units in order of unit id."""
    words = [f"{sum(counts.values()) / elapsed_s:7.1f} spikes/s"]
    if latency["n"]:
        words.append(f"latency {spread_words(latency, ('p50', 'p99'))}")
    units = [unit for unit, _ in counts.most_common() if unit != UNSORTED]
    words.append("  ".join(f"{unit}:{counts[unit] / elapsed_s:.0f}" for unit in sorted(units[:_SHOWN_UNITS])))
    if len(units) > _SHOWN_UNITS:
        words.append(f"and {len(units) - _SHOWN_UNITS} more units")
    words.append(f"unsorted:{counts[UNSORTED] / elapsed_s:.0f}")
    return "   ".join(filter(None, words))


def _summarise(args: argparse.Namespace, tally: Tally, n_lost: int, seconds: float) -> None:
    counts, latency = tally.counts, tally.latency.summary()
    sorted_units = {unit: n for unit, n in sorted(counts.items()) if unit != UNSORTED}
    if args.json:
        figures = {
            "url": args.url,
            "seconds": seconds,
            "spikes": sum(counts.values()),
            "unsorted": counts[UNSORTED],
            "n_units": len(sorted_units),
            "units": sorted_units,
            "messages_lost": n_lost,
            "latency_ms": latency,
        }
        print(json.dumps(figures, indent=1))
        return
    rows = [
        ("received", f"{sum(counts.values())} spikes in {seconds:.1f} s, {counts[UNSORTED]} of them unsorted"),
        ("units", str(len(sorted_units))),
        ("lost", f"{n_lost} messages"),
    ]
    print_rows(rows + ([("latency", f"{spread_words(latency)}, trough to here")] if latency["n"] else []))
