"""`streamsort bench`: how fast this machine sorts a recording live, and how well; or two such results side by side."""

import argparse
import json
import os
import platform
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from streamsort import __version__
from streamsort.bench import picture
from streamsort.bench.burst import make_burst
from streamsort.bench.conduct import Notes, Plan, conduct
from streamsort.bench.faults import Faults, parse_faults
from streamsort.bench.result import Report
from streamsort.bench.show import comparison, table
from streamsort.commands.options import config_of, is_live, probe_of
from streamsort.commands.terminal import Terminal
from streamsort.errors import StreamsortError
from streamsort.loopback import keep_lsl_private
from streamsort.score import load_truth
from streamsort.simulate import Truth, truth, write_recording
from streamsort.sources.pace import chunk_length
from streamsort.sources.recording import Recording
from streamsort.sources.sim import parse_options

_PASSED_ON = ("config", "warmup_s", "seed", "encoder", "provider", "session")  # to `streamsort run`


def main(args: argparse.Namespace) -> int:
    """Measure and print, or compare."""
    if args.compare is not None:
        _check(args.source is None, f"source {args.source} with --compare, expected none")
        print("\n".join(comparison(*(_read(path) for path in args.compare))))
        return 0
    _check(args.source is not None, "no source, expected a recording, sim:... or --compare A B")
    _check(not is_live(args.source), f"{args.source}: a live stream, expected a recording or sim:..., which can be played faster")
    faults = _faults(args)
    if args.picture is not None:
        picture.check()
    with Terminal() as terminal, tempfile.TemporaryDirectory(prefix="streamsort-bench-") as work:
        if args.transport == "lsl":
            keep_lsl_private(work)
        report, notes = _measure(args, faults, Path(work), terminal)
    if args.picture is not None:
        picture.draw(report, notes, args.picture)
    print(json.dumps(report, indent=1) if args.json else "\n".join(table(report)))
    return 0


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise StreamsortError(f"bench: {otherwise}")


def _faults(args: argparse.Namespace) -> tuple[tuple[str, Faults], ...]:
    faults = tuple((text, parse_faults(text)) for text in args.fault)
    for text, one in faults:
        _check(not one.loss or args.transport == "zmq", f"fault {text} over lsl, expected --transport zmq: LSL numbers no samples")
    return faults


def _read(path: str) -> dict[str, Any]:
    try:
        report = json.loads(Path(path).read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise StreamsortError(f"bench {path}: not JSON ({error}), expected a result of `streamsort bench --json`") from None
    _check(
        isinstance(report, dict) and "clean" in report, f"{path}: something else, expected a result of `streamsort bench --json`"
    )
    return dict(report)


def _measure(
    args: argparse.Namespace, faults: tuple[tuple[str, Faults], ...], work: Path, terminal: Terminal
) -> tuple[dict[str, Any], Notes]:
    config, probe = config_of(args), probe_of(args)
    recording, known = _recording(args, work, terminal)
    with Recording(recording, probe=probe) as source:
        info, n_samples = source.info, source.n_samples
    _check(
        n_samples >= chunk_length(info.sampling_frequency, args.chunk_ms),
        f"{args.source}: {n_samples} samples, expected a chunk of {args.chunk_ms:g} ms or more",
    )
    bursts, files = {}, {}
    for factor in {one.burst for _, one in faults if one.burst}:
        terminal.say(f"preparing   a burst of {factor:g}x")
        burst = make_burst(str(recording), known, probe, factor, config.seed)
        files[factor], bursts[factor] = str(work / f"burst-{factor:g}.npy"), burst.truth
        np.save(files[factor], burst.traces)
    passed = [text for name in _PASSED_ON for text in _option(name, getattr(args, name))]
    if info.probe is not None:  # which ZeroMQ does not tell of
        info.probe.to_probeinterface(work / "probe.json")
        passed += ["--probe", str(work / "probe.json")]
    plan = Plan(
        recording=str(recording),
        n_samples=n_samples,
        rate=info.sampling_frequency,
        chunk_ms=args.chunk_ms,
        deadline_ms=config.stream.deadline_ms,
        transport=args.transport,
        warmup_s=config.warmup_s,
        catch_up_s=args.catch_up_s,
        seconds=args.seconds,
        faults=faults,
        bursts=files,
        headroom=args.headroom,
        sorter=tuple(passed),
        seed=config.seed,
    )
    notes = conduct(plan, work, terminal.say)
    return _about(args, info.n_channels) | Report(plan, notes, known, bursts).to_dict(), notes


def _option(name: str, value: Any) -> list[str]:
    return [] if value is None else [f"--{name.replace('_', '-')}", str(value)]


def _recording(args: argparse.Namespace, work: Path, terminal: Terminal) -> tuple[Path, Truth | None]:
    """Return where the recording is, a simulation's having been made, and its truth if it is known."""
    if args.source.startswith("sim:"):
        config = parse_options(args.source.removeprefix("sim:"))
        terminal.say(f"simulating  {config.seconds:g} s of {config.probe.n_channels} channels, {config.n_units} units")
        with terminal.bar("simulating") as show:
            write_recording(config, work / "simulation", show)
        return work / "simulation" / "recording", truth(config)
    path = Path(args.source)
    places = [path / "truth", path.parent / "truth"] if args.truth is None else [Path(args.truth)]
    found = next((place for place in places if args.truth is not None or place.is_dir()), None)
    return path, None if found is None else load_truth(found)


def _about(args: argparse.Namespace, n_channels: int) -> dict[str, Any]:
    """Say what was measured, and where and when."""
    return {
        "source": args.source,
        "n_channels": n_channels,
        "streamsort": __version__,
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()},
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
