"""How long after its trough a spike is with a subscriber, live, between separate processes.

    python benchmarks/latency.py --channels 32 --chunk-ms 1 --seconds 300 --warmup-s 30 --json latency.json

Four processes on this machine, for each case: a player that sends a simulated recording in real time through a real LSL outlet or
ZeroMQ publisher; `streamsort run`, the very command, which sorts and publishes over ZeroMQ; a subscriber that notes
`time.monotonic()` when a message is in its hands; and a loop that only sleeps until the next ms and notes how late it wakes up,
which is what the machine itself adds. Latency is receipt minus the `time` of each spike (its trough). While units are made of
the warm-up the stream is queued, and caught up with afterwards: latency counts for `--seconds` from the first spike after the
warm-up that the sorter did not flag as late, and `catch up s` is how long after the warm-up that is. Where more peaks come than can
be sorted there is none: then latency counts from `--catch-up-s` on, and grows without bound.

The percentiles are of sorted spikes. A peak that no unit explains comes out later, as unsorted, when all that could explain it is
decided; these have columns of their own. Printed as the floor is what the first spike of a chunk waits in any implementation:
look-ahead, and the chunk that has to fill; later ones wait less, so with long chunks the median lies below it. Memory is the
resident memory of the sorting process, twice a second; CPU is a share of one core. Percentiles of the stages are medians, over the
seconds, of those in the `status` messages.
"""

import argparse
import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from looped import PROBES, Looped, simulation
from numpy.typing import NDArray
from report import publish, spread

import streamsort
from streamsort.client import subscribe
from streamsort.config import StreamConfig
from streamsort.errors import StreamsortError
from streamsort.loopback import keep_lsl_private
from streamsort.player import replay
from streamsort.records import UNSORTED, Flag
from streamsort.simulate import SimulationConfig

COLUMNS = {
    "channels": "channels",
    "chunk_ms": "chunk ms",
    "transport": "through",
    "units": "units",
    "catch_up_s": "catch up s",
    "peaks_per_s": "peaks/s",
    "floor_ms": "floor ms",
    "p50": "p50 ms",
    "p95": "p95",
    "p99": "p99",
    "p99.9": "p99.9",
    "max": "max",
    "unsorted_p50": "unsorted p50",
    "unsorted_p99": "p99",
    "empty_p99": "empty loop p99",
    "empty_max": "max",
    "samples_lost": "samples lost",
    "spikes_lost": "spikes lost",
    "late": "late",
    "rss_first_mb": "RSS first min MB",
    "rss_last_mb": "last min",
    "rss_slope_mb_per_min": "MB/min",
    "cpu_sorter": "sorter CPU",
    "cpu_player": "player CPU",
}
STAGES = ("acquire", "detect", "assign", "publish", "total")
_READY_S = 120.0
_SILENCE_S = 30.0
_END_S = 600.0  # a sorter first sorts what it has queued
_LOOK_S = 0.5
_QUIET_S = 1.0  # after the last sample, what is on its way still arrives
_TICK_S = 1e-3
_ENOUGH = "enough\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure each case, print and write; or be one of the other processes."""
    args = _parse(arguments)
    if args.role:
        print(json.dumps(ROLES[args.role](args)), flush=True)
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that children end with us
    with tempfile.TemporaryDirectory(prefix="streamsort-latency-") as folder:
        keep_lsl_private(folder)
        cases = itertools.product(args.channels, args.chunk_ms, args.transport)
        results = [measure(n_channels, chunk_ms, transport, args, Path(folder)) for n_channels, chunk_ms, transport in cases]
    publish("latency, trough to subscriber", COLUMNS, results, args)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how long after its trough a spike is with a subscriber.")
    parser.add_argument("--channels", type=int, nargs="+", choices=tuple(PROBES), default=[32, 128, 384])
    parser.add_argument("--chunk-ms", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--transport", nargs="+", choices=("lsl", "zmq"), default=["lsl"], help="to the sorter (lsl)")
    parser.add_argument("--seconds", type=float, default=30.0, help="measured, once calibration is caught up with (30)")
    parser.add_argument("--warmup-s", type=float, default=15.0, help="of calibration (15)")
    longest = StreamConfig.calibration_queue_s
    parser.add_argument("--catch-up-s", type=float, default=longest, help=f"at most, from the warm-up to then ({longest:g})")
    parser.add_argument("--loop-s", type=float, default=10.0, help="of signal that are simulated and repeated (10)")
    parser.add_argument("--session", action="store_true", help="also record a session, as an experiment would")
    parser.add_argument("--encoder", default="auto", metavar="WHICH", help="auto, full, light or an .onnx (auto)")
    parser.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="auto", help="of the encoder (auto)")
    parser.add_argument("--json", metavar="FILE", help="where to write the results")
    for name in ("--role", "--url", "--out"):  # of the other processes
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


# --- the other processes ---------------------------------------------------------------------------------------------------------


def play(args: argparse.Namespace) -> dict[str, Any]:
    """Send the recording in real time once somebody listens, until stdin is closed."""
    total_s = args.warmup_s + args.catch_up_s + args.seconds
    source = Looped(simulation(args.channels[0], args.loop_s), total_s, speed=1.0, chunk_ms=args.chunk_ms[0])
    enough = threading.Event()
    threading.Thread(target=_when_stdin_ends, args=(enough.set,), daemon=True).start()
    print("ready", flush=True)
    return {"samples_sent": replay(source, args.url, wait_s=_READY_S, stop=enough)}


def receive(args: argparse.Namespace) -> dict[str, Any]:
    """Note when each spike arrived, until stdin is closed, and say when it is enough; keep the status messages."""
    parts: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
    statuses: list[dict[str, Any]] = []
    rate, enough = SimulationConfig.sampling_frequency, False
    from_sample = round((args.warmup_s + args.catch_up_s) * rate)
    with subscribe(args.url) as subscription:
        messages = subscription.messages("spikes", "status")
        threading.Thread(target=_when_stdin_ends, args=(subscription.close,), daemon=True).start()
        print("ready", flush=True)
        for message in messages:
            now = time.monotonic()
            if message.topic == "spikes":
                spikes = message.payload
                parts.append((spikes["sample_index"].copy(), now - spikes["time"], spikes["unit_id"] != UNSORTED))
                from_sample = min(from_sample, first_in_time(message.payload, args.warmup_s * rate, from_sample))
                if not enough and parts[-1][0].max(initial=0) >= from_sample + args.seconds * rate:
                    enough = True
                    print(end=_ENOUGH, flush=True)
            else:
                statuses.append(message.payload)
        lost = dict(subscription.lost)
    none = np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool)
    sample_index, latency_s, is_sorted = (np.concatenate(column) for column in zip(none, *parts, strict=True))
    np.savez(args.out, sample_index=sample_index, latency_s=latency_s, is_sorted=is_sorted)
    return {"messages_lost": lost, "statuses": statuses, "from_sample": from_sample}


def first_in_time(spikes: NDArray[Any], warmup_samples: float, otherwise: int) -> int:
    """Return the sample index of the first spike after the warm-up that is not flagged late."""
    in_time = (spikes["sample_index"] >= warmup_samples) & (spikes["flags"] & int(Flag.LATE) == 0)
    return int(spikes["sample_index"][in_time].min(initial=otherwise))


def _when_stdin_ends(act: Callable[[], None]) -> None:
    sys.stdin.read()
    act()


def idle(args: argparse.Namespace) -> dict[str, Any]:
    """Wake up every ms, and note how late, until stdin is closed."""
    lateness_s = []
    ended = threading.Event()
    threading.Thread(target=_when_stdin_ends, args=(ended.set,), daemon=True).start()
    print("ready", flush=True)
    due = time.monotonic()
    while not ended.is_set():
        due = max(due + _TICK_S, time.monotonic())
        time.sleep(max(due - time.monotonic(), 0.0))
        lateness_s.append((time.monotonic(), time.monotonic() - due))
    np.save(args.out, np.array(lateness_s))
    return {}


ROLES = {"play": play, "receive": receive, "idle": idle}


class Child:
    """One process beside this one, killed by its id if it is still there at the end.

    Parameters
    ----------
    *command : str
    """

    def __init__(self, *command: str) -> None:
        self._command = " ".join(command)
        package = str(Path(streamsort.__file__).parent.parent)  # children import the same streamsort
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if "streamsort" in command else None,  # its line of status every second
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # a Ctrl-C in the terminal is for this process alone
        )
        self.usage: list[tuple[float, float, float]] = []  # time, resident MB, CPU seconds

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            raise StreamsortError(f"benchmark: {self._command} ended with code {self.process.wait()}")

    def look(self) -> None:
        """Note memory and CPU time, where the system has /proc."""
        with contextlib.suppress(OSError):
            folder = Path(f"/proc/{self.process.pid}")
            pages = int((folder / "statm").read_text().split()[1])
            ticks = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
            memory_mb = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            self.usage.append((time.monotonic(), memory_mb, sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")))

    def finish(self, interrupt: bool = False) -> dict[str, Any]:
        """Let it end, and return what it said."""
        if interrupt:
            self.process.send_signal(signal.SIGINT)
        said, _ = self.process.communicate(timeout=_END_S)
        if self.process.returncode:
            raise StreamsortError(f"benchmark: {self._command} ended with code {self.process.returncode}")
        return dict(json.loads(said.removeprefix(_ENOUGH)))

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


# --- one case --------------------------------------------------------------------------------------------------------------------


def measure(n_channels: int, chunk_ms: float, transport: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the four processes to the end of the recording, and put together what they noted."""
    published = f"tcp://127.0.0.1:{free_port()}"
    stream = f"lsl:streamsort-latency-{os.getpid()}" if transport == "lsl" else f"tcp://127.0.0.1:{free_port()}"
    spikes, lateness = folder / "spikes.npz", folder / "lateness.npy"
    case = ["--channels", str(n_channels), "--chunk-ms", str(chunk_ms), "--warmup-s", str(args.warmup_s)]
    case += ["--seconds", str(args.seconds), "--catch-up-s", str(args.catch_up_s), "--loop-s", str(args.loop_s)]
    run = ["-m", "streamsort", "run", stream, "--publish", published, "--warmup-s", str(args.warmup_s)]
    run += ["--encoder", args.encoder, "--provider", args.provider, "--timeout", str(_SILENCE_S), "--json"]
    if args.session:
        run += ["--session", str(folder / f"session-{n_channels}-{chunk_ms:g}-{transport}")]
    with contextlib.ExitStack() as stack:

        def start(*command: str) -> Child:
            child = Child(*command)
            stack.callback(child.kill)
            return child

        player = start(__file__, "--role", "play", "--url", stream, *case)
        player.wait_ready()
        receiver = start(__file__, "--role", "receive", "--url", published, "--out", str(spikes), *case)
        receiver.wait_ready()
        sleeper = start(__file__, "--role", "idle", "--out", str(lateness))
        sleeper.wait_ready()
        sorter = start(*run)
        for _ in looks_until_enough(receiver, player, sorter):
            sorter.look()
            player.look()
        sent = player.finish()["samples_sent"]
        time.sleep(_QUIET_S)
        counted = sorter.finish(interrupt=True)
        sleeper.finish()
        heard = receiver.finish()
    result = _figures(args, n_channels, chunk_ms, transport, sent, counted, heard, np.load(spikes), np.load(lateness))
    return result | _usage(sorter, "sorter", result["measured_from"]) | _usage(player, "player", result["measured_from"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def looks_until_enough(receiver: Child, *others: Child) -> Iterator[None]:
    """Step twice a second until the receiver says that it is enough, or one of the processes ends."""
    while all(child.process.poll() is None for child in (receiver, *others)):
        yield
        if select.select([receiver.process.stdout], [], [], _LOOK_S)[0]:
            return


def _figures(
    args: argparse.Namespace,
    n_channels: int,
    chunk_ms: float,
    transport: str,
    sent: int,
    counted: dict[str, Any],
    heard: dict[str, Any],
    spikes: Any,
    lateness: NDArray[np.float64],
) -> dict[str, Any]:
    rate = SimulationConfig.sampling_frequency
    at_s, from_s = spikes["sample_index"] / rate, heard["from_sample"] / rate
    counts = (at_s >= from_s) & (at_s < from_s + args.seconds)
    pause = (at_s >= args.warmup_s) & (at_s < from_s)
    # Host time of sample 0, to a ms or two: a status can only be late.
    began = min(status["time"] - status["samples_acquired"] / rate for status in heard["statuses"])
    from_time = began + from_s
    empty = lateness[lateness[:, 0] >= from_time, 1]
    latency_ms, is_sorted = 1e3 * spikes["latency_s"][counts], spikes["is_sorted"][counts]
    unsorted = spread(latency_ms[~is_sorted], (50, 95, 99, 99.9))
    return {
        "channels": n_channels,
        "chunk_ms": chunk_ms,
        "transport": transport,
        "seconds": args.seconds,
        "units": counted["n_units"],
        "calibrated": counted["calibrated"],
        "catch_up_s": from_s - args.warmup_s,
        "encoder": counted["encoder"],
        "provider": counted["provider"],
        "peaks_per_s": float(counts.sum() / args.seconds),
        "look_ahead_ms": counted["floor_ms"],
        "floor_ms": counted["floor_ms"] + chunk_ms,
        **spread(latency_ms[is_sorted], (50, 95, 99, 99.9)),
        **{f"unsorted_{name}": value for name, value in unsorted.items()},
        "n": int(is_sorted.sum()),
        "n_unsorted": int((~is_sorted).sum()),
        "calibration_pause_ms": float(1e3 * spikes["latency_s"][pause].max(initial=0.0)),
        **{f"empty_{name}": value for name, value in spread(1e3 * empty, (50, 99)).items()},
        "stages_ms": {stage: _typical(heard["statuses"], stage, from_time) for stage in STAGES},
        "stage_maxima_ms": _maxima(heard["statuses"], from_time),
        "samples_sent": sent,
        "samples_acquired": counted["samples_acquired"],
        "chunks_received": heard["statuses"][-1]["chunks"],
        "samples_lost": sent - counted["samples_acquired"],
        "spikes_published": counted["spikes"],
        "spikes_received": len(spikes["sample_index"]),
        "spikes_lost": counted["spikes"] - len(spikes["sample_index"]),
        "messages_lost": heard["messages_lost"],
        "late": int((spikes["latency_s"][counts] > StreamConfig.deadline_ms / 1e3).sum()),
        "late_flags": counted["late"],
        "outputs_dropped": counted["outputs_dropped"],
        "measured_from": from_time,
    }


def _typical(statuses: list[dict[str, Any]], stage: str, from_time: float) -> dict[str, float]:
    """Take medians over the seconds of a stage's percentiles, and the maximum of its maxima."""
    rows = [status["latency_interval_ms"].get(stage, {}) for status in statuses if status["time"] > from_time + 1]
    rows = [row for row in rows if "p50" in row]
    if not rows:
        return {}
    medians = {name: float(np.median([row[name] for row in rows])) for name in ("p50", "p95", "p99")}
    return medians | {"max": float(max(row["max"] for row in rows))}


def _maxima(statuses: list[dict[str, Any]], from_time: float) -> dict[str, list[float | None]]:
    """List each stage's maximum in every second: which stage it was that stalled, and when."""
    rows = [status for status in statuses if status["time"] > from_time + 1]
    maxima = {stage: [row["latency_interval_ms"].get(stage, {}).get("max") for row in rows] for stage in STAGES}
    return maxima | {"at_s": [round(row["time"] - from_time, 2) for row in rows]}


def _usage(child: Child, name: str, from_time: float) -> dict[str, Any]:
    """Sum up memory and CPU from `from_time` on."""
    usage = np.array([row for row in child.usage if row[0] >= from_time]).reshape(-1, 3)
    if len(usage) < 2:
        return {}
    at_s, memory_mb, cpu_s = usage.T
    figures = {f"cpu_{name}": float((cpu_s[-1] - cpu_s[0]) / (at_s[-1] - at_s[0]))}
    if name == "sorter":
        figures |= {
            "rss_first_mb": float(np.median(memory_mb[at_s < at_s[0] + 60])),
            "rss_last_mb": float(np.median(memory_mb[at_s > at_s[-1] - 60])),
            "rss_max_mb": float(max(row[1] for row in child.usage)),
            "rss_slope_mb_per_min": float(60 * np.polyfit(at_s, memory_mb, 1)[0]),
        }
    return figures | {f"usage_{name}": [(round(t - from_time, 2), round(mb, 1), round(cpu, 2)) for t, mb, cpu in child.usage]}


if __name__ == "__main__":
    main()
