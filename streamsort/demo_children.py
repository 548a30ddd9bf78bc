"""The two other processes of the demo: the player of the recording, and the decoder.

Each is started with `python -m streamsort.demo_children ROLE ...`, says `ready` on stdout, and ends when its stdin is closed, so
neither can outlive the demo, however that ends. What it has counted it prints as one line of JSON.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any

from streamsort.client import Subscription, subscribe
from streamsort.player import replay
from streamsort.sources import open_source

_CONNECT_S = 60.0
_QUIET_S = 0.3  # after the end, what is on its way still arrives


def play(recording: str, name: str) -> dict[str, int]:
    """Send a recording in real time as the LSL stream `name`, once somebody is connected."""
    stop = threading.Event()

    def stop_with_the_demo() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=stop_with_the_demo, daemon=True).start()
    source = open_source(recording, speed=1.0)
    print("ready", flush=True)
    return {"samples_sent": replay(source, f"lsl:{name}", wait_s=_CONNECT_S, stop=stop)}


def decode(url: str, out: str) -> dict[str, int]:
    """Receive spikes until stdin is closed; write when each was and how long after its trough it was here.

    Parameters
    ----------
    url : str
        Where the sorter publishes.
    out : str
        A JSON file to write: `sample_index`, `unit_id` and `latency_ms`, a number per spike, and `messages_lost`.
    """
    received: dict[str, list[Any]] = {"sample_index": [], "unit_id": [], "latency_ms": []}
    with subscribe(url) as subscription:
        reader = threading.Thread(target=_receive, args=(subscription, received), daemon=True)
        reader.start()
        print("ready", flush=True)
        sys.stdin.read()
        _wait_for_quiet(received["unit_id"])
        subscription.close()
        reader.join()
        lost = subscription.lost.get("spikes", 0)
    with open(out, "w") as file:
        json.dump({**received, "messages_lost": lost}, file)
    return {"spikes_received": len(received["unit_id"])}


def _receive(subscription: Subscription, received: dict[str, list[Any]]) -> None:
    for spikes in subscription:
        now = time.monotonic()
        received["latency_ms"] += (1e3 * (now - spikes["time"])).round(4).tolist()
        received["sample_index"] += spikes["sample_index"].tolist()
        received["unit_id"] += spikes["unit_id"].tolist()


def _wait_for_quiet(arriving: list[Any]) -> None:
    n_before = -1
    while len(arriving) > n_before:
        n_before = len(arriving)
        time.sleep(_QUIET_S)


def main() -> None:
    """Play one of the roles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the demo's to handle
    role, *arguments = sys.argv[1:]
    counted = {"play": play, "decode": decode}[role](*arguments)
    with contextlib.suppress(BrokenPipeError):  # the demo may have been killed
        os.write(1, json.dumps(counted).encode())


if __name__ == "__main__":
    main()
