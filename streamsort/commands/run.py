"""`streamsort run`: a source sorted live, with a line that says how it goes."""

import argparse
import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from streamsort.commands.extras import require_training
from streamsort.commands.options import config_of, is_live, manifest_of, probe_of, warn_of_assumed_probe
from streamsort.commands.refreshes import Refreshes
from streamsort.commands.summary import lost_samples, print_summary, spread_words
from streamsort.commands.terminal import Interrupts, Terminal
from streamsort.config import SorterConfig
from streamsort.errors import StreamsortError
from streamsort.probe import Probe
from streamsort.records import StreamInfo
from streamsort.session import SessionWriter
from streamsort.sinks import Sink, open_sink
from streamsort.sorter import Sorter
from streamsort.sources import Source, open_source
from streamsort.stream import Stream

_POLL_S = 0.1
_STATUS_S = 1.0


def main(args: argparse.Namespace) -> int:
    """Sort live until the source ends, Ctrl-C, or `--seconds`."""
    _check_refresh(args)
    config, probe = config_of(args), probe_of(args)
    with Terminal() as terminal, contextlib.ExitStack() as stack:
        source = stack.enter_context(_open(args, config, probe, terminal))
        sorter = Sorter(config, source.info, probe)
        warn_of_assumed_probe(sorter)
        session = str(uuid.uuid4())
        sinks = _open_sinks(args, sorter, session, stack)
        writer = _open_session(args, sorter, session)
        stream = Stream(source, sorter, sinks, archive=writer)
        began = time.monotonic()
        run_stream(stream, sorter, terminal, args)
        if writer is not None:
            writer.save_templates(sorter.templates())
        print_summary(stream.status(), sorter, args, time.monotonic() - began)
    return 0


def _check_refresh(args: argparse.Namespace) -> None:
    if args.refresh_every is not None:
        if args.session is None:
            raise StreamsortError("run: --refresh-every without --session, expected one, where the units' spikes are kept")
        require_training("run --refresh-every")


def run_stream(stream: Stream, sorter: Sorter, terminal: Terminal, args: argparse.Namespace) -> None:
    """Run to the end, or to Ctrl-C or `--seconds` of the stream, after which what was acquired is sorted and published.

    Raises
    ------
    BaseException
        The first one that ended a thread; `Aborted` after a second Ctrl-C.
    """
    with Interrupts() as interrupts:
        try:
            with terminal.waiting("warming up"):
                stream.start()
            terminal.release_warnings()
            _follow(stream, sorter, terminal, interrupts, args)
            stream.stop()
        except BaseException:
            stream.abort()
            raise


def _follow(stream: Stream, sorter: Sorter, terminal: Terminal, interrupts: Interrupts, args: argparse.Namespace) -> None:
    rate = sorter.info.sampling_frequency

    def ends() -> bool:
        enough = args.seconds is not None and stream.status()["samples_acquired"] >= args.seconds * rate
        return enough or interrupts.requested or stream.wait(_POLL_S)

    with terminal.bar("calibrating") as show:
        while not sorter.calibrated:
            if ends():
                return
            show(sorter.progress)
    terminal.say(f"calibrated: {len(sorter.units_table())} units")
    with terminal.status_line() as show_line, _refreshing(args) as refresh:
        before, due = stream.status(), time.monotonic() + _STATUS_S
        while not ends():
            refresh()
            if time.monotonic() >= due:
                status = stream.status()
                show_line(_status_words(status, before, rate))
                before, due = status, max(due + _STATUS_S, time.monotonic())


@contextlib.contextmanager
def _refreshing(args: argparse.Namespace) -> Iterator[Callable[[], None]]:
    """Keep refreshes of the encoder going while the function that is yielded is called, if they are asked for."""
    if args.refresh_every is None:
        yield lambda: None
        return
    with Refreshes(args.session, 60 * args.refresh_every) as refreshes:
        yield refreshes.poll


def _status_words(status: dict[str, Any], before: dict[str, Any], rate: float) -> str:
    spikes_per_s = (status["spikes"] - before["spikes"]) / max(status["time"] - before["time"], 1e-3)
    minutes, seconds = divmod(int(status["samples_acquired"] / rate), 60)
    words = [
        f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}",
        f"{status.get('n_units', 0):3d} units",
        f"{spikes_per_s:7.1f} spikes/s",
    ]
    total = status["latency_interval_ms"].get("total", {"n": 0})
    if total["n"]:
        words.append(f"latency {spread_words(total, ('p50', 'p99'))}")
    words.append(f"lost {lost_samples(status)} samples")
    words += [f"{status['late']} late"] if status["late"] else []
    words += [f"{status['outputs_dropped']} outputs dropped"] if status["outputs_dropped"] else []
    words += [f"{status['sink_errors']} sink errors"] if status["sink_errors"] else []
    return "   ".join(words)


def _open(args: argparse.Namespace, config: SorterConfig, probe: Probe | None, terminal: Terminal) -> Source:
    """Open the source; what starts to flow when it is opened is opened last, with everything compiled."""
    if not is_live(args.source):
        speed = 1.0 if args.speed is None else args.speed
        return open_source(args.source, probe=probe, speed=speed, chunk_ms=args.chunk_ms)
    with terminal.waiting("warming up"):
        _rehearse(config)
    with terminal.waiting(f"waiting for {args.source}"):
        return open_source(args.source, probe=probe, speed=args.speed, timeout_s=args.timeout)


def _rehearse(config: SorterConfig) -> None:
    """Compile and load all that a sorter needs, on a stream that is not there: a real one does not wait for it."""
    for dtype in (np.int16, np.float32):
        info = StreamInfo("rehearsal", 30000.0, 32, np.dtype(dtype), np.ones(32, np.float32), None, live=True)
        Sorter(SorterConfig(snippets=config.snippets, encode=config.encode), info).warmup()


def _open_sinks(args: argparse.Namespace, sorter: Sorter, session: str, stack: contextlib.ExitStack) -> list[Sink]:
    urls = [url for url in (args.publish, f"lsl:{args.lsl}" if args.lsl is not None else None) if url is not None]
    sinks: list[Sink] = []
    for url in urls:
        sinks.append(open_sink(url, info=sorter.info, session=session, model=sorter.encoder.name))
        stack.callback(sinks[-1].close)
    return sinks


def _open_session(args: argparse.Namespace, sorter: Sorter, session: str) -> SessionWriter | None:
    if args.session is None:
        return None
    manifest = {"session": session, **manifest_of(sorter, args.source)}
    return SessionWriter(args.session, manifest, sorter.probe, sorter.info.sampling_frequency)
