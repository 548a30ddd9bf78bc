"""`streamsort sort`: a recording sorted as fast as it can be, into a session directory."""

import argparse
import time

from streamsort.commands.options import config_of, is_live, manifest_of, probe_of, warn_of_assumed_probe
from streamsort.commands.summary import print_summary
from streamsort.commands.terminal import Interrupts, Terminal
from streamsort.errors import StreamsortError
from streamsort.session import SessionWriter
from streamsort.sorter import Sorter
from streamsort.sources import open_source
from streamsort.stream import Stream

_POLL_S = 0.1


def main(args: argparse.Namespace) -> int:
    """Sort a recording; Ctrl-C leaves a session of what was read so far."""
    if is_live(args.source):
        raise StreamsortError(f"sort {args.source}: a live stream, expected a recording; `streamsort run` takes live ones")
    config, probe = config_of(args), probe_of(args)
    with Terminal() as terminal, open_source(args.source, probe=probe, chunk_ms=args.chunk_ms) as source:
        sorter = Sorter(config, source.info, probe)
        warn_of_assumed_probe(sorter)
        writer = SessionWriter(args.session, manifest_of(sorter, args.source), sorter.probe, source.info.sampling_frequency)
        stream = Stream(source, sorter, archive=writer)
        began = time.monotonic()
        _run(stream, terminal, getattr(source, "n_samples", 0))
        writer.save_templates(sorter.templates())
        print_summary(stream.status(), sorter, args, time.monotonic() - began)
    return 0


def _run(stream: Stream, terminal: Terminal, n_samples: int) -> None:
    with Interrupts() as interrupts:
        try:
            with terminal.waiting("warming up"):
                stream.start()
            terminal.release_warnings()
            with terminal.bar("sorting") as show:
                while not stream.wait(_POLL_S) and not interrupts.requested:
                    show(stream.status()["samples_acquired"] / n_samples if n_samples else 0.0)
            stream.stop()
        except BaseException:
            stream.abort()
            raise
