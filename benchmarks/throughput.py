"""How much faster than real time it sorts.

    python benchmarks/throughput.py --channels 32 128 384 --chunk-ms 1 10 --json throughput.json

A few simulated seconds are played over and over (see `looped`) through `Sorter` in this thread, kept on one core. After calibration
two passes alternate, `--repeats` times, and the median over the repeats of each figure is reported:

- the signal path: `Sorter.detect`, which is fill, filter, reference, noise level, detection and snippets, without encoder;
- everything: `Sorter.detect`, `assign` and `learn`, one after the other, as `Sorter.process` does. With `--cores 2` lessons, which
  hold the encoder, are learned in a second thread, as they are live.

Times of `assign` are of chunks with at least one peak, those of `learn` of chunks that end a learning period; both are rare with
chunks of 1 ms, so the medians of the stages do not add up to the median of a chunk. Where other programs compete for the core, the
figures by CPU time (of this thread, which also counts the making of chunks) are the ones to compare. The encoder is also measured
alone: spikes per second in batches of its fixed shape. Where the peaks per second of a row come near to that figure, the encoder is
the limit.
"""

import argparse
import contextlib
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
from looped import Looped, simulation
from numpy.typing import NDArray
from report import one_core, publish, spread

from streamsort.choose import measure_speed
from streamsort.config import EncodeConfig, SorterConfig
from streamsort.latency import low_latency
from streamsort.records import Chunk
from streamsort.simconfig import PROBE_OF
from streamsort.sorter import Sorter

STAGES = ("detect", "assign", "learn")
COLUMNS = {
    "channels": "channels",
    "chunk_ms": "chunk ms",
    "peaks_per_s": "peaks/s",
    "units": "units",
    "signal_x": "signal path x real time",
    "signal_cpu_x": "by CPU time",
    "signal_p99_ms": "its p99 ms",
    "whole_x": "all x real time",
    "whole_cpu_x": "by CPU time",
    "whole_p50_ms": "chunk p50 ms",
    "whole_p95_ms": "p95",
    "whole_p99_ms": "p99",
    "whole_max_ms": "max",
    "detect_us": "detect us",
    "assign_us": "assign us",
    "learn_us": "learn us",
    "encoder": "encoder",
    "encoder_spikes_per_s": "its spikes/s",
}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    args = _parse(arguments)
    with one_core() if args.cores == 1 else contextlib.nullcontext(), ThreadPoolExecutor(1) as threads, low_latency():
        pool = threads if args.cores > 1 else None
        cases = itertools.product(args.channels, args.chunk_ms)
        results = [measure(n_channels, chunk_ms, args, pool) for n_channels, chunk_ms in cases]
    publish(f"throughput on {args.cores} core{'s' * (args.cores > 1)}", COLUMNS, results, args)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how much faster than real time it sorts.")
    parser.add_argument("--cores", type=int, choices=(1, 2), default=1, help="(1)")
    parser.add_argument("--channels", type=int, nargs="+", choices=tuple(PROBE_OF), default=[32, 128, 384])
    parser.add_argument("--chunk-ms", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--units", type=int, help="of the simulation (one for every two channels)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of signal per pass and repeat (10)")
    parser.add_argument("--repeats", type=int, default=5, help="(5)")
    parser.add_argument("--warmup-s", type=float, default=15.0, help="of signal to calibrate on (15)")
    parser.add_argument("--loop-s", type=float, default=5.0, help="of signal that are simulated and repeated (5)")
    parser.add_argument("--encoder", default="auto", metavar="WHICH", help="auto, full, light or an .onnx (auto)")
    parser.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="cpu", help="of the encoder (cpu)")
    parser.add_argument("--json", metavar="FILE", help="where to write the results")
    return parser.parse_args(arguments)


def measure(n_channels: int, chunk_ms: float, args: argparse.Namespace, pool: Executor | None) -> dict[str, Any]:
    """Measure one number of channels at one length of chunks."""
    total_s = args.warmup_s + 1.0 + 2 * args.repeats * args.seconds
    source = Looped(simulation(n_channels, args.loop_s, args.units), total_s, chunk_ms=chunk_ms)
    config = SorterConfig(warmup_s=args.warmup_s, encode=EncodeConfig(args.encoder, args.provider))
    sorter = Sorter(config, source.info)
    sorter.warmup()
    chunks = iter(source)
    n_pass = round(args.seconds * 1e3 / chunk_ms)
    for chunk in itertools.islice(chunks, round((args.warmup_s + 1.0) * 1e3 / chunk_ms)):
        sorter.process(chunk)
    seconds = n_pass * chunk_ms / 1e3
    repeats = []
    for _ in range(args.repeats):
        began_s = time.thread_time()
        signal = signal_pass(sorter, itertools.islice(chunks, n_pass))
        between_s = time.thread_time()
        stages, n_peaks = whole_pass(sorter, itertools.islice(chunks, n_pass), pool)
        cpu = {"signal_cpu_x": seconds / (between_s - began_s), "whole_cpu_x": seconds / (time.thread_time() - between_s)}
        n_learns = max(round(seconds / config.cluster.period_s), 1)
        repeats.append(_figures(signal, stages, n_peaks, seconds, n_learns) | cpu)
    middle = {key: float(np.median([repeat[key] for repeat in repeats])) for key in repeats[0]}
    about = {
        "channels": n_channels,
        "chunk_ms": chunk_ms,
        "units": len(sorter.units_table()),
        "encoder": sorter.encoder.name,
        "provider": sorter.encoder.provider,
        "encoder_spikes_per_s": measure_speed(sorter.encoder).spikes_per_s,
    }
    return {**about, **middle, "repeats": repeats}


def signal_pass(sorter: Sorter, chunks: Iterator[Chunk]) -> NDArray[np.float64]:
    """Run the signal path alone; return seconds per chunk."""
    spent = []
    for chunk in chunks:
        began = time.perf_counter()
        sorter.detect(chunk)
        spent.append(time.perf_counter() - began)
    return np.array(spent)


def whole_pass(sorter: Sorter, chunks: Iterator[Chunk], pool: Executor | None) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Run everything; return seconds per chunk and stage, (n_chunks, 4), and the peaks of each chunk."""
    spent, n_peaks = [], []
    for chunk in chunks:
        row = dict.fromkeys(STAGES, 0.0)
        at = time.perf_counter()

        def lap(stage: str, row: dict[str, float] = row) -> None:
            nonlocal at
            now = time.perf_counter()
            row[stage] += now - at
            at = now

        batches = sorter.detect(chunk)
        lap("detect")
        for batch in batches:
            sorter.assign(batch)
            lap("assign")
            sorter.learn(pool)
            lap("learn")
        spent.append([row[stage] for stage in STAGES])
        n_peaks.append(sum(len(batch.peaks) for batch in batches))
    return np.array(spent), np.array(n_peaks)


def _figures(
    signal: NDArray[np.float64], stages: NDArray[np.float64], n_peaks: NDArray[np.int64], seconds: float, n_learns: int
) -> dict[str, float]:
    whole = stages.sum(axis=1)
    busy = n_peaks > 0
    # Most chunks learn nothing, in some microseconds: the slowest of them all are the ends of the periods.
    learns = np.sort(stages[:, STAGES.index("learn")])[-n_learns:]
    of_stage = {
        "detect_us": stages[:, 0],
        "assign_us": stages[busy, 1],
        "learn_us": learns,
    }
    return {
        "peaks_per_s": float(n_peaks.sum() / seconds),
        "signal_x": seconds / float(signal.sum()),
        "whole_x": seconds / float(whole.sum()),
        **{f"signal_{name}_ms": value for name, value in spread(1e3 * signal).items() if value is not None},
        **{f"whole_{name}_ms": value for name, value in spread(1e3 * whole).items() if value is not None},
        **{name: 1e6 * float(np.median(values)) if len(values) else 0.0 for name, values in of_stage.items()},
        **{f"{stage}_share": float(stages[:, k].sum() / whole.sum()) for k, stage in enumerate(STAGES)},
    }


if __name__ == "__main__":
    main()
