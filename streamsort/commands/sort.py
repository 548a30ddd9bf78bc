"""`streamsort sort`: a recording sorted as fast as it can be, into a session directory; by the stream's engine or the paper's."""

import argparse
import json
import time
from typing import Any

from streamsort.commands.options import config_of, is_live, manifest_of, probe_of, warn_of_assumed_probe
from streamsort.commands.summary import print_rows, print_summary
from streamsort.commands.terminal import Interrupts, Terminal
from streamsort.errors import StreamsortError
from streamsort.offline import Mixture, sort_offline
from streamsort.session import SessionWriter
from streamsort.sorter import Sorter
from streamsort.sources import Source, open_source
from streamsort.stream import Stream

_POLL_S = 0.1


def main(args: argparse.Namespace) -> int:
    """Sort a recording; Ctrl-C leaves a session of what was read so far."""
    if is_live(args.source):
        raise StreamsortError(f"sort {args.source}: a live stream, expected a recording; `streamsort run` takes live ones")
    if args.units is not None and args.engine == "streamsort":
        raise StreamsortError(f"sort --units {args.units}: the engine streamsort finds the number itself, expected none")
    config, probe = config_of(args), probe_of(args)
    with Terminal() as terminal, open_source(args.source, probe=probe, chunk_ms=args.chunk_ms) as source:
        sorter = Sorter(config, source.info, probe)
        warn_of_assumed_probe(sorter)
        manifest = {"engine": args.engine, **manifest_of(sorter, args.source)}
        if args.engine == "huidurep-gmm":
            return _sort_offline(args, terminal, source, sorter, manifest)
        writer = SessionWriter(args.session, manifest, sorter.probe, source.info.sampling_frequency)
        stream = Stream(source, sorter, archive=writer)
        began = time.monotonic()
        _run(stream, terminal, getattr(source, "n_samples", 0))
        writer.save_templates(sorter.templates())
        print_summary(stream.status(), sorter, args, time.monotonic() - began)
    return 0


def _sort_offline(args: argparse.Namespace, terminal: Terminal, source: Source, sorter: Sorter, manifest: dict[str, Any]) -> int:
    """Sort by the paper's pipeline; there is nothing to save before its end, so Ctrl-C aborts."""
    args.drains, began = False, time.monotonic()
    mixture = Mixture(args.units, sorter.config.seed)
    writer = SessionWriter(args.session, manifest, sorter.probe, source.info.sampling_frequency)
    terminal.release_warnings()
    with terminal.bar("clustering") as show:
        output = sort_offline(source, sorter, mixture, show)
    writer.publish(output)
    writer.close()
    figures = {
        "source": args.source,
        "engine": args.engine,
        "seconds": output.through_sample / source.info.sampling_frequency,
        "wall_s": time.monotonic() - began,
        "n_units": len(output.units or []),
        "spikes": len(output.spikes),
        "encoder": sorter.encoder.name,
        "encoder_choice": sorter.encoder_choice.reason,
        "provider": sorter.encoder.provider,
        "session": args.session,
    }
    if args.json:
        print(json.dumps(figures, indent=1))
        return 0
    print_rows(
        [
            ("sorted", f"{figures['seconds']:.1f} s of {source.info.n_channels} channels in {figures['wall_s']:.1f} s, offline"),
            ("units", str(figures["n_units"])),
            ("spikes", str(figures["spikes"])),
            ("encoder", f"{sorter.encoder.name} on {sorter.encoder.provider}"),
            ("", sorter.encoder_choice.reason),
            ("session", str(args.session)),
        ]
    )
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
