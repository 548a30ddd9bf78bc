"""`streamsort demo`: the whole way in one command, measured at its end.

A recording with known truth is simulated; a second process plays it in real time through an LSL outlet; this one sorts it live and
publishes over ZeroMQ; a third receives the units as a decoder would, and notes how long after its trough each spike was there. What
comes out is a table, report.json and report.png. Everything stays on this machine.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort import __version__, report
from streamsort.commands.summary import lost_samples, print_rows, spread_words
from streamsort.commands.terminal import Interrupts, Terminal
from streamsort.config import SorterConfig
from streamsort.errors import StreamsortError
from streamsort.loopback import keep_lsl_private
from streamsort.records import SPIKE_DTYPE, UNSORTED, Output
from streamsort.score import Score, score
from streamsort.simulate import SimulationConfig, Truth, truth, write_recording
from streamsort.sinks.zmq import ZmqSink
from streamsort.sorter import Sorter
from streamsort.sources import open_source
from streamsort.stream import Stream

LEAST_S = 10.0
WARMUP_SHARE = 0.4

_READY_S = 60.0
_END_S = 10.0
_POLL_S = 0.1
_QUIET_S = 0.3
_ALIGN_MS = 50.0
_MAP_SPIKES = 4000


class Child:
    """One of the other processes; it ends when its stdin is closed, and is killed if it does not.

    Parameters
    ----------
    role : str
        `play` or `decode`, see `streamsort.demo_children`.
    *arguments : str
    """

    def __init__(self, role: str, *arguments: str) -> None:
        self._role = role
        self._process = subprocess.Popen(
            [sys.executable, "-m", "streamsort.demo_children", role, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C in the terminal is for the demo alone
        )

    def wait_ready(self) -> None:
        """Wait until it says so.

        Raises
        ------
        StreamsortError
            If it ended instead.
        """
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            raise StreamsortError(f"demo: the process that should {self._role} ended with code {self._process.wait(_END_S)}")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def end(self) -> dict[str, int]:
        """Let it finish; return what it counted, nothing if it had to be killed."""
        try:
            said, _ = self._process.communicate(timeout=_END_S)
            return dict(json.loads(said))
        except (subprocess.TimeoutExpired, ValueError):
            self.kill()
            return {}

    def kill(self) -> None:
        """Make sure that it is gone; does nothing when it is."""
        if self.running:
            self._process.kill()
            self._process.wait()


class _Keep:
    """Keep all spikes, to compare them with the truth."""

    clean = True

    def __init__(self) -> None:
        self._kept = [np.zeros(0, SPIKE_DTYPE)]

    def publish(self, output: Output) -> None:
        self._kept.append(output.spikes)

    def close(self) -> None:
        pass

    @property
    def spikes(self) -> NDArray[Any]:
        return np.concatenate(self._kept)


@dataclass(frozen=True)
class Run:
    """What came of the stream: of the sorter, of the player and of the decoder."""

    sorter: Sorter
    status: dict[str, Any]
    spikes: NDArray[Any]
    samples_sent: int
    received: dict[str, NDArray[Any]]
    complete: bool


def main(args: argparse.Namespace) -> int:
    """Run the demo; Ctrl-C reports on what was received so far."""
    if args.seconds < LEAST_S:
        raise StreamsortError(f"demo: seconds = {args.seconds:g}, expected {LEAST_S:g} or more")
    simulation = SimulationConfig(
        seconds=args.seconds, snr=(5.0, 20.0), rates_hz=(2.0, 12.0), drift_um=5.0, drift_period_s=2 * args.seconds, seed=args.seed
    )
    out = Path(args.report or time.strftime("streamsort-demo-%Y%m%d-%H%M%S"))
    out.mkdir(parents=True, exist_ok=True)
    with Terminal() as terminal, tempfile.TemporaryDirectory(prefix="streamsort-demo-") as work:
        drawing = report.can_draw(terminal.say)
        keep_lsl_private(work)
        terminal.say(f"simulating   {args.seconds:g} s of {simulation.probe.n_channels} channels, {simulation.n_units} units")
        with terminal.bar("simulating") as show:
            write_recording(simulation, Path(work) / "sim", show)
        run = _stream(simulation, Path(work), terminal)
        terminal.say(f"writing      {out}{os.sep}")
        figures = _figures(run, simulation)
        (out / "report.json").write_text(json.dumps(figures, indent=1))
        if drawing:
            report.draw(_page(run, simulation, figures), out / "report.png")
    if args.json:
        print(json.dumps(figures, indent=1))
    else:
        _print_table(figures, out, drawing)
    return 0


def _stream(simulation: SimulationConfig, work: Path, terminal: Terminal) -> Run:
    """Start the other processes, sort what the one plays for the other, and see to it that both end."""
    recording, name, heard = work / "sim" / "recording", f"streamsort-demo-{uuid.uuid4().hex[:8]}", work / "decoder.json"
    with contextlib.ExitStack() as stack:
        player = Child("play", str(recording), name)
        stack.callback(player.kill)
        info = replace(open_source(str(recording)).info, live=True)
        config = replace(SorterConfig(), warmup_s=WARMUP_SHARE * simulation.seconds)
        sorter, keep = Sorter(config, info), _Keep()
        terminal.say(f"warming up   {sorter.encoder.name} on {sorter.encoder.provider}")
        with terminal.waiting("warming up"):
            sorter.warmup()
            sink = ZmqSink("tcp://127.0.0.1:*", info=info, model=sorter.encoder.name)
            stack.callback(sink.close)
            decoder = Child("decode", sink.endpoint, str(heard))
            stack.callback(decoder.kill)
            decoder.wait_ready()
            player.wait_ready()
            source = open_source(f"lsl:{name}", timeout_s=_READY_S)  # the player plays from here on
        stream = Stream(source, sorter, [sink], archive=keep)
        complete = _run_stream(stream, sorter, player, simulation, terminal)
        sent, _ = player.end(), decoder.end()
        received = {key: np.array(value) for key, value in json.loads(heard.read_text()).items()} if heard.exists() else {}
        return Run(sorter, stream.status(), keep.spikes, sent.get("samples_sent", 0), received, complete)


def _run_stream(stream: Stream, sorter: Sorter, player: Child, simulation: SimulationConfig, terminal: Terminal) -> bool:
    """Run to the end of what is played; False if Ctrl-C came first."""
    with Interrupts() as interrupts:
        try:
            stream.start()
            terminal.release_warnings()
            _follow(stream, sorter, player, simulation, terminal, interrupts)
            stream.stop()
        except BaseException:
            stream.abort()
            raise
        return not interrupts.requested


def _follow(
    stream: Stream, sorter: Sorter, player: Child, simulation: SimulationConfig, terminal: Terminal, interrupts: Interrupts
) -> None:
    def goes_on() -> bool:
        status = stream.status()
        if status["samples_acquired"] + status["samples_overrun"] >= simulation.n_samples or not player.running:
            _wait_for_quiet(stream)
            return False
        return not interrupts.requested and not stream.wait(_POLL_S)

    terminal.say(f"calibrating  on the first {sorter.config.warmup_s:g} s")
    with terminal.bar("calibrating") as show:
        while not sorter.calibrated and goes_on():
            show(sorter.progress)
    if not sorter.calibrated:
        return
    terminal.say(f"sorting      {len(sorter.units_table())} units, live")
    with terminal.bar("sorting") as show:
        while goes_on():
            show(stream.status()["samples_acquired"] / simulation.n_samples)


def _wait_for_quiet(stream: Stream) -> None:
    """Wait until all that was acquired is with the decoder: what is in a socket when it closes would be lost."""
    before, since, deadline = -1, time.monotonic(), time.monotonic() + _END_S
    while time.monotonic() < deadline and time.monotonic() - since < _QUIET_S:
        status = stream.status()
        if status["spikes"] != before or status["queues"]["chunks_ms"]:
            before, since = status["spikes"], time.monotonic()
        time.sleep(_POLL_S)


def _figures(run: Run, simulation: SimulationConfig) -> dict[str, Any]:
    """Put together what the report says in numbers."""
    rate, warmup_s = simulation.sampling_frequency, run.sorter.config.warmup_s
    heard_s = run.status["samples_acquired"] / rate
    true = truth(simulation)
    result = score(run.spikes, true, rate, warmup_s, heard_s) if heard_s > warmup_s else Score((), 0)
    shares = result.to_dict()
    # the player goes on after a Ctrl-C, for a moment
    lost = run.samples_sent - run.status["samples_acquired"] if run.complete else lost_samples(run.status)
    return {
        **shares,
        "n_units_matched": sum(unit["tp"] > 0 for unit in shares["units"]),
        "latency_ms": {"floor": run.status["floor_ms"], **_latency(run, rate, warmup_s)},
        "stages_ms": run.status["latency_ms"],
        "samples_sent": run.samples_sent,
        "samples_received": run.status["samples_acquired"],
        "samples_lost": lost,
        "alignment_samples": alignment_samples(run.spikes, true, rate),
        "spikes_published": run.status["spikes"],
        "spikes_received": len(run.received.get("unit_id", ())),
        "messages_lost": int(run.received.get("messages_lost", 0)),
        "encoder": run.sorter.encoder.name,
        "encoder_sha256": run.sorter.encoder.sha256,
        "provider": run.sorter.encoder.provider,
        "seconds": heard_s,
        "warmup_s": warmup_s,
        "scored_s": [warmup_s, heard_s],
        "simulation": asdict(simulation),
        "n_channels": simulation.probe.n_channels,
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()},
        "streamsort": __version__,
    }


def settled_s(run: Run, rate: float, warmup_s: float) -> float | None:
    """Return from when on latency counts, in s of the stream: from the first spike after the warm-up that is there in time.

    Until then spikes wait for calibration, a pause that is reported by itself; None if they wait to the end.
    """
    at, latency_ms = run.received["sample_index"] / rate, run.received["latency_ms"]
    in_time = at[(at >= warmup_s) & (latency_ms <= run.sorter.config.stream.deadline_ms)]
    return float(in_time.min()) if len(in_time) else None


def measured(run: Run, rate: float, warmup_s: float) -> NDArray[np.float64]:
    """Return the decoder's latencies (ms) that count."""
    from_s = settled_s(run, rate, warmup_s) if run.received else None
    if from_s is None:
        return np.zeros(0)
    kept: NDArray[np.float64] = run.received["latency_ms"][run.received["sample_index"] / rate >= from_s]
    return kept


def _latency(run: Run, rate: float, warmup_s: float) -> dict[str, Any]:
    latency_ms, from_s = measured(run, rate, warmup_s), settled_s(run, rate, warmup_s) if run.received else None
    if from_s is None:
        return dict.fromkeys(("p50", "p95", "p99", "max"), None) | {"n": 0}
    quantiles = {f"p{q}": float(np.percentile(latency_ms, q)) for q in (50, 95, 99)}
    at = run.received["sample_index"] / rate
    pause = run.received["latency_ms"][(at >= warmup_s) & (at < from_s)]
    counted = {"n": len(latency_ms), "from_s": from_s, "calibration_pause": float(pause.max(initial=0.0))}
    return {**quantiles, "max": float(latency_ms.max()), **counted}


def alignment_samples(spikes: NDArray[Any], true: Truth, rate: float) -> int | None:
    """Return the shift at which most found spikes coincide with true ones.

    The first sample received is our sample 0; that it is the player's too shows here: the shift is then a few samples at most.
    """
    span = int(_ALIGN_MS * rate / 1e3)
    found = np.sort(spikes["sample_index"])
    first = np.searchsorted(found, true.sample_index - span)
    n_near = np.searchsorted(found, true.sample_index + span, side="right") - first
    near = np.arange(n_near.sum()) - np.repeat(np.cumsum(n_near) - n_near - first, n_near)
    if not len(near):
        return None
    counts = np.bincount(found[near] - np.repeat(true.sample_index, n_near) + span)
    return int(counts.argmax()) - span


def _page(run: Run, simulation: SimulationConfig, figures: dict[str, Any]) -> report.Page:
    snapshot = run.sorter.snapshot()
    periods = () if snapshot is None else snapshot.periods
    unit, channel, embeddings = (
        np.concatenate([np.zeros(0, np.int64), *(one.published for one in periods)]),
        np.concatenate([np.zeros(0, np.int64), *(one.peaks["channel"] for one in periods)]),
        np.concatenate([np.zeros((0, run.sorter.encoder.n_dims), np.float32), *(one.white for one in periods)]),
    )
    return report.Page(
        figures=figures,
        spikes=run.spikes,
        sampling_frequency=simulation.sampling_frequency,
        probe=run.sorter.probe,
        templates=run.sorter.templates(),
        units=run.sorter.units_table(),
        embeddings=embeddings[unit != UNSORTED],
        embedded_units=unit[unit != UNSORTED],
        embedded_channels=channel[unit != UNSORTED],
        latency_ms=measured(run, simulation.sampling_frequency, run.sorter.config.warmup_s),
    )


def _print_table(figures: dict[str, Any], out: Path, drawn: bool) -> None:
    latency = figures["latency_ms"]
    rows = [
        (
            "units",
            f"{figures['n_units_matched']} of {figures['n_units_true']} true ones found, {figures['n_units_found']} published",
        ),
        ("accuracy", f"{figures['accuracy_mean']:.3f} mean, {figures['accuracy_median']:.3f} median, after calibration"),
        (
            "latency",
            f"{spread_words(latency)}, trough to decoder" if latency["n"] else "none: calibration was never caught up with",
        ),
        ("floor", f"{latency['floor']:.1f} ms, the look-ahead"),
        ("lost", f"{figures['samples_lost']} of {figures['samples_sent']} samples"),
        ("spikes", f"{figures['spikes_received']} received by the decoder of {figures['spikes_published']} published"),
        ("encoder", f"{figures['encoder']} on {figures['provider']}"),
        ("report", str(out / ("report.png" if drawn else "report.json"))),
    ]
    print_rows(rows)
