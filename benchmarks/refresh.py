"""Whether a refresh of the encoder in the middle of a live session costs latency, or any unit its id.

    python benchmarks/refresh.py --seconds 300 --json refresh.json

One simulated recording whose sources drift is streamed twice in real time, first without a refresh, then with one. Each time these
processes run on this machine: a player over ZeroMQ; `streamsort run` with a session, the very command; a subscriber that notes when
a spike is in its hands; a loop that only sleeps until the next ms and notes how late it wakes up, which is what the machine itself
adds; and, the second time, the `streamsort refresh` that `--refresh-every` starts, whose offer the run takes over or refuses.

Latency is receipt minus the trough of each spike, for `--seconds` from when calibration is caught up with (`catch up s` after the
warm-up); `refreshing` is the part from the start of the refresh until the former encoder is let go, and the same
part of the stream without one. The ids of a true unit are those that `streamsort.score` matches it to in a third of those seconds
before the swap, and in one after it; in the run without a refresh around the same sample.
"""

import argparse
import math
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import publish, spread

from streamsort.bench.children import LOOK_S, Child, family, free_port
from streamsort.bench.figures import latency_s
from streamsort.config import RefreshConfig, StreamConfig
from streamsort.score import score
from streamsort.session import Session
from streamsort.simulate import SimulationConfig, truth, units_of, write_recording

COLUMNS = {
    "refresh": "refresh",
    "units": "units",
    "catch_up_s": "catch up s",
    "spikes_per_s": "spikes/s",
    "p50": "p50 ms",
    "p99": "p99",
    "p99.9": "p99.9",
    "max": "max",
    "refreshing_p50": "refreshing p50",
    "refreshing_p99": "p99",
    "p99_ratio": "p99 with / without",
    "empty_p99": "empty loop p99",
    "empty_max": "max",
    "late": "late",
    "samples_lost": "samples lost",
    "true_units": "true units",
    "found": "found",
    "changed": "changed id",
    "swap_s": "swap at s",
    "agreement": "agreement",
}
MIN_SNR = 5.0
_STARTED = 0.4  # of the time that counts: the refresh begins so long after calibration, and leaves a third behind the swap
_QUIET_S = 1.0
_SILENCE_S = 30.0
_ROLES = ("-m", "streamsort.bench.roles")


def main(arguments: list[str] | None = None) -> None:
    """Stream twice, print and write."""
    args = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that children end with us
    total_s = args.warmup_s + args.catch_up_s + args.seconds
    config = SimulationConfig(
        seconds=total_s, probe_name=args.probe, n_units=args.units, snr=(4.0, 15.0), drift_um=args.drift_um, seed=args.seed
    )
    with tempfile.TemporaryDirectory(prefix="streamsort-refresh-") as folder:
        write_recording(config, Path(folder) / "simulation")
        runs = [stream(Path(folder), args, refreshed) for refreshed in (False, True)]
        swap = next((run.swap for run in runs if run.swap is not None), None)
        results = [figures(run, config, args, swap) for run in runs]
    for result in results:
        result["p99_ratio"] = _over(result["p99"], results[0]["p99"])
    publish("a refresh of the encoder in a live session", COLUMNS, results, args)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what a refresh of the encoder costs a live session.")
    parser.add_argument("--seconds", type=float, default=300.0, help="measured, twice, once calibration is caught up with (300)")
    parser.add_argument("--warmup-s", type=float, default=30.0, help="of calibration (30)")
    parser.add_argument("--catch-up-s", type=float, default=60.0, help="at most, from the warm-up to then (60)")
    parser.add_argument("--probe", default="grid32", help="as in a simulation (grid32)")
    parser.add_argument("--units", type=int, default=16, help="of the simulation (16)")
    parser.add_argument("--drift-um", type=float, default=10.0, help="amplitude of a sine of two minutes (10)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation (0)")
    parser.add_argument("--encoder", default="auto", help="auto, full, light or an .onnx (auto)")
    parser.add_argument("--json", metavar="FILE", help="where to write the results")
    return parser.parse_args(arguments)


def _over(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference


@dataclass(frozen=True)
class Run:
    """What one streaming left behind.

    Attributes
    ----------
    session : Session
    sent : int
        Samples that the player sent.
    counted : dict
        The summary of `streamsort run`.
    arrivals : ndarray, shape (n_spikes,), ARRIVAL_DTYPE
        The spikes that the subscriber received.
    lateness : ndarray, shape (n, 2), float64
        When the empty loop woke up, and how late, in s.
    heard : dict
        What the subscriber said at its end: the `statuses`, and `from_sample`, from where on latency counts.
    refreshed : bool
    """

    session: Session
    sent: int
    counted: dict[str, Any]
    arrivals: NDArray[Any]
    lateness: NDArray[np.float64]
    heard: dict[str, Any]
    refreshed: bool

    @property
    def events(self) -> list[dict[str, Any]]:
        """What became of offers, from the ledger."""
        return [event for event in self.session.ledger if event.get("event") == "model"]

    @property
    def swap(self) -> int | None:
        """The sample index at which an offered encoder took over first."""
        return next((event["sample_index"] for event in self.events if event["model"] == event["offered"]), None)


def stream(folder: Path, args: argparse.Namespace, refreshed: bool) -> Run:
    """Run the processes until enough of the recording is counted, and collect what they noted."""
    source, published = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    kind = "with" if refreshed else "without"
    session, spikes, lateness = folder / f"session-{kind}", folder / f"spikes-{kind}.npy", folder / f"lateness-{kind}.npy"
    run = ["-m", "streamsort", "run", source, "--publish", published, "--session", str(session), "--json"]
    run += ["--warmup-s", str(args.warmup_s), "--encoder", args.encoder, "--timeout", str(_SILENCE_S)]
    spans = ["--rate", str(SimulationConfig.sampling_frequency), "--warmup-s", str(args.warmup_s)]
    spans += ["--catch-up-s", str(args.catch_up_s), "--seconds", str(args.seconds)]
    if refreshed:
        run += ["--refresh-every", str(_STARTED * args.seconds / 60)]
    with family() as children:

        def start(name: str, *command: str) -> Child:
            children.append(Child(name, *command))
            return children[-1]

        receiver = start("the subscriber", *_ROLES, "receive", "--url", published, "--out", str(spikes), *spans)
        receiver.wait_ready()
        sleeper = start("the empty loop", *_ROLES, "idle", "--out", str(lateness))
        sleeper.wait_ready()
        sorter = start("the sorter", *run)
        recording = str(folder / "simulation" / "recording")
        player = start("the player", "-m", "streamsort", "replay", recording, "--to", source, "--timeout", "120", "--json")
        while all(child.running for child in children) and receiver.hear(LOOK_S) is None:
            pass
        sent = player.finish(interrupt=True)["samples_sent"]
        time.sleep(_QUIET_S)
        counted = sorter.finish(interrupt=True)
        sleeper.finish()
        heard = receiver.finish()
    return Run(Session(session), sent, counted, np.load(spikes), np.load(lateness), heard, refreshed)


def figures(run: Run, config: SimulationConfig, args: argparse.Namespace, swap: int | None) -> dict[str, Any]:
    """Sum up a run; `swap` is where units are compared before and after, the middle if there was none."""
    rate, statuses = config.sampling_frequency, run.heard["statuses"]
    from_s = run.heard["from_sample"] / rate
    to_s = from_s + args.seconds
    at_s, latency_ms = run.arrivals["sample_index"] / rate, 1e3 * latency_s(run.arrivals)
    counts = (at_s >= from_s) & (at_s < to_s)
    swap_s = (from_s + to_s) / 2 if swap is None else swap / rate
    began = min(status["time"] - status["samples_acquired"] / rate for status in statuses)
    calibrated_s = next((status["time"] - began for status in statuses if status["calibrated"]), math.inf)
    refreshing = counts & (at_s >= calibrated_s + _STARTED * args.seconds) & (at_s < swap_s + RefreshConfig.watch_s)
    empty = 1e3 * run.lateness[run.lateness[:, 0] >= began + from_s, 1]
    took_over = next((event for event in run.events if event["sample_index"] == run.swap), {})
    return {
        "refresh": "yes" if run.refreshed else "no",
        "encoder": run.counted["encoder"],
        "units": run.counted["n_units"],
        "catch_up_s": from_s - args.warmup_s,
        "spikes_per_s": float(counts.sum() / args.seconds),
        **spread(latency_ms[counts], (50, 99, 99.9)),
        **{f"refreshing_{name}": value for name, value in spread(latency_ms[refreshing], (50, 99)).items()},
        **{f"empty_{name}": value for name, value in spread(empty, (50, 99)).items()},
        "late": int((latency_ms[counts] > StreamConfig.deadline_ms).sum()),
        "samples_lost": run.sent - run.counted["samples_acquired"],
        **_ids(run, config, (from_s, swap_s, to_s)),
        "swap_s": None if run.swap is None else run.swap / rate,
        "agreement": took_over.get("agreement"),
        "agreement_by_unit": took_over.get("agreement_by_unit"),
        "events": run.events,
        "offers": {path.stem: path.read_text() for path in sorted((run.session.path / "models").glob("*.json"))},
        "status": statuses[-1].get("refresh"),
    }


def _ids(run: Run, config: SimulationConfig, times_s: tuple[float, float, float]) -> dict[str, Any]:
    """Match the larger true units with published ones, before the swap and after it; times are start, swap and end."""
    from_s, swap_s, to_s = times_s
    third = (to_s - from_s) / 3
    spans = (max(swap_s - third, from_s), swap_s), (swap_s, min(swap_s + third, to_s))
    large = np.flatnonzero(units_of(config).snr >= MIN_SNR)
    ids = []
    for start, end in spans:
        found = score(run.session.spikes, truth(config), config.sampling_frequency, from_s=start, to_s=end)
        ids.append({unit.unit_true: unit.unit_id for unit in found.units})
    rows = [(int(unit), ids[0].get(unit, -1), ids[1].get(unit, -1)) for unit in large.tolist()]
    both = [row for row in rows if row[1] >= 0 and row[2] >= 0]
    return {
        "true_units": len(rows),
        "found": len(both),
        "changed": sum(before != after for _, before, after in both),
        "ids": [dict(zip(("true", "before", "after"), row, strict=True)) for row in rows],
    }


if __name__ == "__main__":
    main()
