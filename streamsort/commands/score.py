"""`streamsort score`: a session compared with the truth."""

import argparse
import json
from dataclasses import asdict

from streamsort.commands.summary import print_rows
from streamsort.compare import compare
from streamsort.score import Score, load_truth
from streamsort.session import Session
from streamsort.trust import Calibration, calibration


def main(args: argparse.Namespace) -> int:
    """Print accuracy, precision and recall per unit, their means, and whether ids and confidence can be relied on."""
    session = Session(args.session)
    spikes = session.spikes
    compared = compare(spikes, load_truth(args.truth), session.sampling_frequency, args.from_s, args.to_s)
    result, reliability = Score.of(compared), calibration(compared, spikes["confidence"])
    if args.json:
        print(json.dumps({**result.to_dict(), "calibration": asdict(reliability)}, indent=1))
    else:
        _print(result, reliability)
    return 0


def _print(result: Score, reliability: Calibration) -> None:
    print("true unit  found as  spikes  accuracy  precision  recall")
    for unit in result.units:
        found = str(unit.unit_id) if unit.tp else "-"
        shares = f"{unit.accuracy:8.3f}  {unit.precision:9.3f}  {unit.recall:6.3f}"
        print(f"{unit.unit_true:9d}  {found:>8}  {unit.n_true:6d}  {shares}")
    published = f"{result.n_units_found} published, {result.n_units_false} of them false, {result.n_units_redundant} redundant"
    error = "-" if reliability.error is None else f"{reliability.error:.3f}"
    n_matched = sum(unit.tp > 0 for unit in result.units)
    print()
    print_rows(
        [
            ("units", f"{n_matched} of {result.n_units_true} true ones found; {published}"),
            ("accuracy", f"{result.accuracy_mean:.3f} mean, {result.accuracy_median:.3f} median, over all true units"),
            ("precision", f"{result.precision_mean:.3f} mean over the units found"),
            ("recall", f"{result.recall_mean:.3f} mean over all true units"),
            ("same id", f"{result.id_stability_mean:.3f} of the time, mean over the units found"),
            ("id purity", f"{result.id_purity_mean:.3f} from the first tenth to the last, {result.id_switches} switches in all"),
            ("confidence", f"{error} expected calibration error"),
        ]
    )
