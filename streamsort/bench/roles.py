"""The other processes of a benchmark, from within: the player, the subscriber, and a loop that only sleeps.

Each is started with `python -m streamsort.bench.roles ROLE ...`, says `ready` on stdout, and ends when its stdin is closed, so none
outlives the benchmark. What it has counted it prints as one line of JSON at its end.
"""

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.bench.faults import Faults
from streamsort.bench.played import Phase, Played
from streamsort.client import subscribe
from streamsort.player import replay
from streamsort.records import SPIKE_DTYPE, Flag
from streamsort.wire import Message

ENOUGH = "enough"
ARRIVAL_DTYPE = np.dtype(
    [
        *((name, SPIKE_DTYPE[name]) for name in ("sample_index", "time", "unit_id", "flags")),
        *((name, "<f8") for name in ("t_acquired", "t_detected", "t_assigned", "t_published", "t_received", "compute_s")),
    ]
)
_STAMPS = ("t_acquired", "t_detected", "t_assigned", "t_published", "compute_s")
_WAIT_S = 180.0
_TICK_S = 1e-3


def play(args: argparse.Namespace) -> dict[str, Any]:
    """Send the recording once somebody listens; each line on stdin is a phase, and each phase is answered with a line."""
    source = Played(args.recording, args.chunk_ms, lambda told: print(json.dumps(told), flush=True))
    ended = threading.Event()

    def obey() -> None:
        for line in sys.stdin:
            asked = json.loads(line)
            source.phases.put(Phase(**asked | {"faults": Faults(**asked["faults"])}))
        ended.set()
        source.close()

    threading.Thread(target=obey, daemon=True).start()
    print("ready", flush=True)
    return {"samples_sent": replay(source, args.url, wait_s=_WAIT_S, stop=ended)}


def receive(args: argparse.Namespace) -> dict[str, Any]:
    """Note when each spike arrived and what its message says of its way, and say when it is enough; keep status and gaps."""
    arrivals = [np.zeros(0, ARRIVAL_DTYPE)]
    heard: dict[str, list[Any]] = {"status": [], "gaps": []}
    enough, from_sample = False, round((args.warmup_s + args.catch_up_s) * args.rate)
    with subscribe(args.url) as subscription:
        messages = subscription.messages("spikes", "status", "gaps")
        _when_stdin_ends(subscription.close)
        print("ready", flush=True)
        for message in messages:
            now = time.monotonic()
            if message.topic != "spikes":
                heard[message.topic].append(message.payload)
                continue
            arrivals.append(_arrivals(message, now))
            from_sample = min(from_sample, first_in_time(message.payload, args.warmup_s * args.rate, from_sample))
            if not enough and message.payload["sample_index"].max(initial=0) >= from_sample + args.seconds * args.rate:
                enough = True
                print(ENOUGH, flush=True)
        lost = dict(subscription.lost)
    np.save(args.out, np.concatenate(arrivals))
    return {"messages_lost": lost, "statuses": heard["status"], "gaps": heard["gaps"], "from_sample": from_sample}


def _arrivals(message: Message, now: float) -> NDArray[Any]:
    arrived = np.zeros(len(message.payload), ARRIVAL_DTYPE)
    for name in ("sample_index", "time", "unit_id", "flags"):
        arrived[name] = message.payload[name]
    for name in _STAMPS:
        arrived[name] = message.header[name]
    arrived["t_received"] = now
    return arrived


def first_in_time(spikes: NDArray[Any], warmup_samples: float, otherwise: int) -> int:
    """Return the sample index of the first spike after the warm-up that is not flagged late."""
    in_time = (spikes["sample_index"] >= warmup_samples) & (spikes["flags"] & int(Flag.LATE) == 0)
    return int(spikes["sample_index"][in_time].min(initial=otherwise))


def idle(args: argparse.Namespace) -> dict[str, Any]:
    """Wake up every ms, and note how late, until stdin is closed."""
    lateness_s = []
    ended = threading.Event()
    _when_stdin_ends(ended.set)
    print("ready", flush=True)
    due = time.monotonic()
    while not ended.is_set():
        due = max(due + _TICK_S, time.monotonic())
        time.sleep(max(due - time.monotonic(), 0.0))
        lateness_s.append((time.monotonic(), time.monotonic() - due))
    np.save(args.out, np.array(lateness_s).reshape(-1, 2))
    return {}


def _when_stdin_ends(act: Callable[[], None]) -> None:
    def wait() -> None:
        sys.stdin.read()
        act()

    threading.Thread(target=wait, daemon=True).start()


ROLES = {"play": play, "receive": receive, "idle": idle}


def main(arguments: list[str] | None = None) -> None:
    """Play one of the roles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=tuple(ROLES))
    for name in ("--url", "--out", "--recording"):
        parser.add_argument(name)
    for name in ("--chunk-ms", "--rate", "--warmup-s", "--catch-up-s", "--seconds"):
        parser.add_argument(name, type=float)
    args = parser.parse_args(arguments)
    print(json.dumps(ROLES[args.role](args)), flush=True)


if __name__ == "__main__":
    main()
