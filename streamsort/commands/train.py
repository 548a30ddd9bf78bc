"""`streamsort train`: train an encoder on simulated spikes, and export it for the live sorter."""

import argparse
from pathlib import Path

from streamsort.commands.extras import require_training
from streamsort.commands.summary import print_rows

_CHANGES = ("steps", "minutes", "seed", "threads", "device", "precision", "teacher", "distil")


def main(args: argparse.Namespace) -> int:
    """Train, or go on with the training in `--out`, and export the model."""
    require_training("train")
    from streamsort.train.config import TrainConfig
    from streamsort.train.export import export
    from streamsort.train.loop import train

    changes = {name: getattr(args, name) for name in _CHANGES if getattr(args, name) is not None}
    if "minutes" in changes:
        changes["steps"] = 0
    config, out = TrainConfig.from_preset(args.preset, **changes), Path(args.out)
    try:
        leads = train(config, out)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from the last checkpoint in {out}")
        return 0
    if leads:
        model = out / f"{args.name}.onnx"
        contract = export(out, model)
        card = str(model.with_suffix(".md"))
        print_rows([("model", str(model)), ("card", card), ("sha256", contract["sha256"]), ("use", f"--encoder {model}")])
    return 0
