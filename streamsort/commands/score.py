"""`streamsort score`: a session compared with the truth."""

import argparse
import json

from streamsort.commands.summary import print_rows
from streamsort.score import Score, load_truth, score
from streamsort.session import Session


def main(args: argparse.Namespace) -> int:
    """Print accuracy, precision and recall per unit, and their means."""
    session = Session(args.session)
    truth = load_truth(args.truth)
    result = score(session.spikes, truth, session.sampling_frequency, args.from_s, args.to_s)
    if args.json:
        print(json.dumps(result.to_dict(), indent=1))
    else:
        _print(result)
    return 0


def _print(result: Score) -> None:
    print("true unit  found as  spikes  accuracy  precision  recall")
    for unit in result.units:
        found = str(unit.unit_id) if unit.tp else "-"
        shares = f"{unit.accuracy:8.3f}  {unit.precision:9.3f}  {unit.recall:6.3f}"
        print(f"{unit.unit_true:9d}  {found:>8}  {unit.n_true:6d}  {shares}")
    n_matched = sum(unit.tp > 0 for unit in result.units)
    print()
    print_rows(
        [
            ("units", f"{n_matched} of {result.n_units_true} true ones found; {result.n_units_found} published"),
            ("accuracy", f"{result.accuracy_mean:.3f} mean, {result.accuracy_median:.3f} median, over all true units"),
            ("precision", f"{result.precision_mean:.3f} mean over the units found"),
            ("recall", f"{result.recall_mean:.3f} mean over all true units"),
            ("same id", f"{result.id_stability_mean:.3f} of the time, mean over the units found"),
        ]
    )
