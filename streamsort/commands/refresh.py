"""`streamsort refresh`: tune the encoder of a session to its units, and offer it to the run."""

import argparse
import contextlib
import json
import os
from typing import TYPE_CHECKING

from streamsort.commands.extras import require_training
from streamsort.commands.summary import print_rows
from streamsort.commands.terminal import Terminal

if TYPE_CHECKING:
    from streamsort.train.refresh import Outcome


def main(args: argparse.Namespace) -> int:
    """Tune for `--seconds` with the lowest priority, say what it did to spikes that were held out, and write the offer."""
    require_training("refresh")
    _give_way()
    from streamsort.train.refresh import refresh
    from streamsort.train.tune import TuneConfig

    config = TuneConfig(seconds=args.seconds, seed=args.seed)
    with Terminal() as terminal:
        with terminal.bar("tuning") as show:
            outcome = refresh(args.session, config, show)
        terminal.release_warnings()
    if args.json:
        print(json.dumps({"parent": outcome.parent, **outcome.figures(), "model": outcome.model and str(outcome.model)}, indent=1))
    else:
        _print(outcome)
    return 0


def _give_way() -> None:
    """Let whatever sorts on this machine go first."""
    with contextlib.suppress(AttributeError, OSError):  # there is no nice on Windows
        os.nice(19)


def _print(outcome: "Outcome") -> None:
    before, after = outcome.before, outcome.after
    if outcome.model is None:
        verdict = "none: it tells the held-out spikes apart less well than the encoder in force, which stays"
    else:
        verdict = f"{outcome.model}" + ("" if after.score > before.score else ", although it is no better")
    print_rows(
        [
            ("read", f"{outcome.n_spikes} spikes of {outcome.n_units} units, {outcome.n_held_out} of them held out"),
            ("tuned", f"{outcome.parent}, {outcome.steps} steps in {outcome.seconds:.0f} s"),
            ("held out", f"{before.own_unit:.2%} nearest to their own unit before, {after.own_unit:.2%} after"),
            ("made worse", f"{before.own_unit_worn:.2%} before, {after.own_unit_worn:.2%} after, with noise and collisions added"),
            ("unmoved", f"{outcome.same_unit:.2%} nearest to the same unit as before; cosine of embeddings {outcome.cosine:.3f}"),
            ("offer", verdict),
        ]
    )
