"""`streamsort train`: train an encoder on simulated spikes, and export it for the live sorter."""

import argparse
from pathlib import Path

from streamsort.commands.summary import print_rows
from streamsort.errors import StreamsortError


def main(args: argparse.Namespace) -> int:
    """Train, or go on with the training in `--out`, and export the model."""
    try:
        from streamsort.train.export import export
        from streamsort.train.loop import TrainConfig, train
    except ImportError as error:
        if (error.name or "").split(".")[0] == "streamsort":
            raise
        raise StreamsortError(f"train: {error.name} is not installed, expected pip install 'streamsort[train]'") from None
    out = Path(args.out)
    config = TrainConfig(out, preset=args.preset, minutes=args.minutes, steps=args.steps, seed=args.seed, threads=args.threads)
    try:
        train(config)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from the last checkpoint in {out}")
        return 0
    model = out / f"{args.name}.onnx"
    contract = export(out, model)
    print_rows([("model", str(model)), ("sha256", contract["sha256"]), ("use", "with --model, or encode.model in a config")])
    return 0
