"""`streamsort simulate`: write a recording whose truth is known."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from streamsort.commands.summary import print_rows
from streamsort.commands.terminal import Terminal
from streamsort.simulate import SimulationConfig, truth, write_recording


def main(args: argparse.Namespace) -> int:
    """Write OUT/recording and OUT/truth."""
    names = {field.name for field in dataclasses.fields(SimulationConfig)}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(args).items() if value is not None
    }
    config = SimulationConfig(**{name: value for name, value in given.items() if name in names})
    with Terminal() as terminal, terminal.bar("simulating") as show:
        write_recording(config, args.out, show)
    out = Path(args.out)
    print_rows(
        [
            ("recording", f"{out / 'recording'}: {config.seconds:g} s, {config.probe.n_channels} channels, {config.probe_name}"),
            ("truth", f"{out / 'truth'}: {len(truth(config).sample_index)} spikes of {config.n_units} units"),
        ]
    )
    return 0
