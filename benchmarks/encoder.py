"""How well embeddings tell units apart, against principal components, and how fast they are made.

    python benchmarks/encoder.py --data DIR --json encoder.json --plot encoder.png
    python benchmarks/encoder.py --data DIR --draws 20 --model models/huidurep-light.onnx other.onnx

The protocol is that of the HuiduRep and CEED papers: of a pool of units, ten are drawn at random, a Gaussian mixture with full
covariances and the true number of components is fitted to their spikes (100 each), and the adjusted Rand index (ARI) is the mean
over 100 draws; beside it the share of spikes whose 10 nearest others are mostly of their own unit (k-NN). The errors are standard
errors over draws, which share units. PCA is fitted to the very spikes of a draw; encoders have seen none of them.

Footprints (simulated; with `--data` also measured ones) are made into spikes by SNR and by drift between the spikes of a unit, see
`encoder_data`. Snippets carry no channel numbers. Peak channel "live" is found spike by spike, as the detector does, so it hops
between contacts with noise and drift: this is what an encoder gets from the sorter, and the headline. With "fixed" it is the unit's
best one without drift, as in the papers, cut around a sorted unit's channel. Placement "anywhere" is also theirs, each unit
at its own place on the probe; with "together" all share one place, and a sorter has to part them. The other data sets come as they
are: their units are few, and draws are random choices of their spikes.

Speed is measured in turns on one core; the last column compares CPU time, or time on a GPU, with the first model's. With two
encoders everything takes a core 5 minutes for every 10 draws (fitting mixtures, shared by `--jobs` processes), plus what they
need for 175 000 spikes; `--snr 4-6 --drift-um 0 20` is a look at the bins that matter most.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from encoder_data import (
    DRIFTS_UM,
    LOOK_AHEAD_DRIFTS_UM,
    LOOK_AHEAD_MS,
    SNR_BINS,
    TYPICAL_SNR,
    Band,
    Case,
    Spikes,
    World,
    file_cases,
    footprint_case,
    footprint_cases,
    worlds,
)
from numpy.typing import NDArray
from report import one_core, publish
from rich.console import Console
from rich.progress import track
from scipy.linalg import eigh

from streamsort.config import SnippetConfig
from streamsort.encode import Encoder
from streamsort.errors import StreamsortError

try:
    from matplotlib.figure import Figure
    from threadpoolctl import threadpool_limits

    from streamsort.train.scores import knn_accuracy, mixture_ari
except ImportError as error:
    sys.exit(f"benchmarks/encoder.py: {error.name} is not installed, expected it: pip install 'streamsort[offline,report]'")

Floats = NDArray[np.floating[Any]]
Row = dict[str, Any]
Features = dict[Any, tuple[Floats, int]]  # per spike, and how many principal components to take of them; 0: as they are
Scores = dict[Any, dict[str, float]]

MODELS = Path(__file__).parent.parent / "models"
COMPONENTS = {"pca-5": 5, "pca-32": 32}
DRAW_UNITS, K_NEAREST = 10, 10
EMBED_BATCH = 32
BATCHES, SPEED_TURNS = (1, 8, 32, 128), 5
ABOUT = {"dataset": "data", "placement": "placement", "peak": "peak channel", "snr": "SNR", "drift_um": "drift um"}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write and plot."""
    args = _parse(arguments)
    try:
        models = [Model(path, args.provider) for path in args.model or sorted(MODELS.glob("*.onnx"))]
        trained = [Model(path, args.provider) for path in args.lookahead_models]
        band = _common_band(models + trained)
        speed = speed_rows(models, args.speed_s)
        made = list(worlds(args.data, args.units, band))
        cases = [case for world in made for case in footprint_cases(world, args.spikes, args.snr, args.drift_um)]
        cases += file_cases(args.data, band)
        rows = [
            about | {f"{name} {key}": value for name, score in scores.items() for key, value in score.items()}
            for about, scores in score_cases("SNR and drift", cases, lambda spikes: features(spikes, models), args)
        ]
        ahead = look_ahead_rows(made, models[0], trained, args)
    except StreamsortError as error:
        sys.exit(f"benchmarks/encoder.py: {error}")
    publish_all(rows, ahead, speed, args)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how well embeddings tell units apart, and how fast they are made.")
    parser.add_argument("--model", type=Path, nargs="+", default=[], metavar="ONNX", help="encoders (all those of models/)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="with real-footprints/, mearec-tetrode/, quiroga-difficult2/")
    parser.add_argument("--snr", nargs="+", choices=tuple(SNR_BINS), default=tuple(SNR_BINS), help="bins (all)")
    parser.add_argument("--drift-um", nargs="+", type=float, choices=DRIFTS_UM, default=DRIFTS_UM, help="bins (all)")
    parser.add_argument("--draws", type=int, default=100, help="of ten units (100)")
    parser.add_argument("--units", type=int, default=20, help="in the simulated pools (20)")
    parser.add_argument("--spikes", type=int, default=100, help="per unit (100)")
    parser.add_argument(
        "--lookahead-models", type=Path, nargs="+", default=[], metavar="ONNX", help="each trained for its ms_after"
    )
    parser.add_argument("--speed-s", type=float, default=2.0, help="seconds per measurement of speed (2)")
    parser.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="auto", help="for the embeddings (auto)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that fit mixtures (one for each core)")
    parser.add_argument("--json", metavar="FILE", help="where to write the results")
    parser.add_argument("--plot", metavar="FILE", help="where to draw ARI over drift (PNG)")
    return parser.parse_args(arguments)


class Model:
    """An encoder for spikes of any sampling rate.

    Parameters
    ----------
    path : Path
        Of the `.onnx`.
    provider : {"auto", "cpu", "cuda"}
    """

    def __init__(self, path: Path, provider: str) -> None:
        self.path, self._provider = path, provider
        self._encoders: dict[float, Encoder] = {}
        contract = Encoder(path, "cpu").contract
        if contract.ms_before > SnippetConfig().ms_before or contract.ms_after > max(LOOK_AHEAD_MS):
            window = f"{contract.ms_before:g} to {contract.ms_after:g} ms around the trough"
            raise StreamsortError(
                f"model {path}: {window}, expected at most {SnippetConfig().ms_before:g} to {max(LOOK_AHEAD_MS):g}"
            )
        self.name, self.ms_after = path.stem, contract.ms_after
        self.band = Band(contract.freq_min_hz, contract.freq_max_hz)

    def __call__(self, spikes: Spikes, until_ms: float = np.inf) -> Floats:
        """Embed spikes, (n, n_dims); what comes later than `until_ms` after the trough is set to 0 before."""
        if spikes.rate_hz not in self._encoders:
            provider: Any = self._provider
            self._encoders[spikes.rate_hz] = Encoder(self.path, provider, sampling_frequency=spikes.rate_hz, batch_size=EMBED_BATCH)
        encoder = self._encoders[spikes.rate_hz]
        snippets = spikes.snippets[:, spikes.n_before - encoder.n_before : spikes.n_before + encoder.n_after].copy()
        if until_ms < self.ms_after:
            snippets[:, encoder.n_before + round(until_ms * spikes.rate_hz / 1e3) :] = 0.0
        return encoder(snippets, spikes.noise_level)


def _common_band(models: Sequence[Model]) -> Band:
    """Return the band-pass all models expect; spikes are filtered once."""
    if not models:
        raise StreamsortError(f"models: none in {MODELS}, expected one there or by --model")
    for model in models:
        if model.band != models[0].band:
            raise StreamsortError(f"model {model.path}: {model.band}, expected {models[0].band} as of {models[0].path}")
    return models[0].band


def features(spikes: Spikes, models: Sequence[Model]) -> Features:
    """Describe spikes in every way that is compared; PCA of the window of the first model."""
    flat = spikes.window(models[0].ms_after).reshape(len(spikes.unit), -1)
    found: Features = {name: (flat, n_components) for name, n_components in COMPONENTS.items()}
    return found | {model.name: (model(spikes), 0) for model in models}


def score_cases(
    what: str, cases: Sequence[Case], describe: Callable[[Spikes], Features], args: argparse.Namespace
) -> list[tuple[Row, Scores]]:
    """Make each case's spikes, describe and judge them; say what each case is, and the scores of each feature."""
    about: list[Row] = []
    judged: list[Any] = []
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        for case in track(cases, what, console=Console(stderr=True)):
            spikes = case.make()
            work = (describe(spikes), spikes.unit, args.draws, args.spikes)
            about.append({**case.about, "detected": spikes.detected})
            judged.append(pool.submit(judge, *work) if args.jobs > 1 else judge(*work))
        return [(row, scores.result() if args.jobs > 1 else scores) for row, scores in zip(about, judged, strict=True)]


def judge(described: Features, unit: NDArray[np.int64], n_draws: int, n_spikes: int) -> Scores:
    """Return mean and standard error over draws of ARI and k-NN accuracy of every feature."""
    drawn: dict[Any, list[tuple[float, float]]] = {name: [] for name in described}
    with threadpool_limits(1):  # matrices so small are a hundred times slower with more threads than free cores
        for seed, (name, (values, n_components)) in itertools.product(range(n_draws), described.items()):
            spikes = draw(unit, n_spikes, np.random.default_rng(seed))
            own = components(values[spikes], n_components) if n_components else values[spikes]
            drawn[name].append((mixture_ari(own, unit[spikes], seed), knn_accuracy(own, unit[spikes], K_NEAREST)))
    scores: Scores = {}
    for name, pairs in drawn.items():
        mean, error = np.mean(pairs, axis=0), np.std(pairs, axis=0) / np.sqrt(len(pairs))
        figures = {"ari": mean[0], "ari_se": error[0], "knn": mean[1], "knn_se": error[1]}
        scores[name] = {key: round(float(value), 4) for key, value in figures.items()}
    return scores


def draw(unit: NDArray[np.int64], n_spikes: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw ten units, or all if they are fewer, and at most so many spikes of each; return rows."""
    known = np.unique(unit)
    chosen = rng.choice(known, min(DRAW_UNITS, len(known)), replace=False)
    return np.concatenate([rng.permutation(np.flatnonzero(unit == k))[:n_spikes] for k in chosen])


def components(values: Floats, n: int) -> Floats:
    """Project on the first `n` principal components of these very values."""
    values = values - values.mean(axis=0)
    size = values.shape[1]
    _, vectors = eigh(values.T @ values, subset_by_index=[max(size - n, 0), size - 1])
    projected: Floats = values @ vectors
    return projected


def look_ahead_rows(made: Sequence[World], model: Model, trained: Sequence[Model], args: argparse.Namespace) -> list[Row]:
    """Judge windows that end sooner or later after the trough; PCA, the model with zeros from there on, models made for one."""

    def describe(spikes: Spikes) -> Features:
        found: Features = {}
        for ms in LOOK_AHEAD_MS:
            found["pca-32", ms] = (spikes.window(ms).reshape(len(spikes.unit), -1), COMPONENTS["pca-32"])
            if ms <= model.ms_after:
                found[f"{model.name}, then zeros", ms] = (model(spikes, ms), 0)
        return found | {(other.name, other.ms_after): (other(spikes), 0) for other in trained}

    anywhere = [world for world in made if world.placement == "anywhere"]
    cases = [footprint_case(world, args.spikes, TYPICAL_SNR, um) for world in anywhere for um in LOOK_AHEAD_DRIFTS_UM]
    rows = []
    for about, scores in score_cases("look-ahead", cases, describe, args):
        for feature in dict.fromkeys(feature for feature, _ in scores):
            own = {ms: score for (name, ms), score in scores.items() if name == feature}
            by_ms = {f"{key} {ms:g}": score[key] for key in ("ari", "knn") for ms, score in own.items()}
            rows.append({**about, "feature": feature, **by_ms})
    return rows


def speed_rows(models: Sequence[Model], seconds: float) -> list[Row]:
    """Measure spikes per second on one core, and on a GPU where one runs; the models take turns."""
    rows: list[Row] = []
    for provider, batch in itertools.product(("cpu", "cuda"), BATCHES):
        try:
            encoders = [Encoder(model.path, provider, batch_size=batch) for model in models]  # type: ignore[arg-type]
        except StreamsortError:
            break  # no CUDA here
        with one_core():
            turns = [[run_times(encoder, seconds / SPEED_TURNS) for encoder in encoders] for _ in range(SPEED_TURNS)]
        rates = [batch / np.median(np.concatenate(runs), axis=0) for runs in zip(*turns, strict=True)]
        decisive = ("cpu", "cuda").index(provider)  # other programs do not count in the CPU time, the GPU's work neither
        for model, (by_cpu, by_clock) in zip(models, rates, strict=True):
            about = {"model": model.name, "provider": provider, "batch": batch}
            over_first = (by_cpu, by_clock)[decisive] / rates[0][decisive]
            rows.append({**about, "spikes_per_s": by_clock, "spikes_per_cpu_s": by_cpu, "over_first": over_first})
    return rows


def run_times(encoder: Encoder, seconds: float) -> list[tuple[float, float]]:
    """Embed one batch again and again for some seconds, at least once; return CPU time and time of each run."""
    contract, rng = encoder.contract, np.random.default_rng(0)
    snippets = rng.normal(size=(encoder.batch_size, contract.n_samples, contract.n_neighbors)).astype(np.float32)
    noise_level = np.ones((encoder.batch_size, contract.n_neighbors), np.float32)
    encoder(snippets, noise_level)  # what a session does once
    spent: list[tuple[float, float]] = []
    until = time.perf_counter() + seconds
    while not spent or time.perf_counter() < until:
        began = time.thread_time(), time.perf_counter()
        encoder(snippets, noise_level)
        spent.append((time.thread_time() - began[0], time.perf_counter() - began[1]))
    return spent


def publish_all(rows: list[Row], ahead: list[Row], speed: list[Row], args: argparse.Namespace) -> None:
    """Print four tables, write one file and draw one plot."""
    names = [key.removesuffix(" ari") for key in rows[0] if key.endswith(" ari")]
    ari, knn = (
        {key: head for name in names for key, head in ((f"{name} {kind}", name), (f"{name} {kind}_se", "+-"))}
        for kind in ("ari", "knn")
    )
    silent = argparse.Namespace(json=None)
    by_ms = {f"{key} {ms:g}": f"{head} {ms:g} ms" for key, head in (("ari", "ARI"), ("knn", "k-NN")) for ms in LOOK_AHEAD_MS}
    rates = {"model": "model", "provider": "provider", "batch": "batch", "spikes_per_s": "spikes/s"}
    rates |= {"spikes_per_cpu_s": "by CPU time", "over_first": "over the first"}
    publish("ARI of ten units", ABOUT | {"detected": "found"} | ari, rows, args, look_ahead=ahead, speed=speed)
    publish("k-NN accuracy", ABOUT | knn, rows, silent)
    title = f"by the end of the window after the trough, SNR {TYPICAL_SNR}"
    publish(title, {"dataset": "data", "drift_um": "drift um", "feature": "feature"} | by_ms, ahead, silent)
    publish("speed of embedding", rates, speed, silent)
    if args.plot:
        plot(rows, names, Path(args.plot))


def plot(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Draw ARI over drift: a row of panels for each world and kind of peak channel, a panel for each SNR bin."""
    grid = [row for row in rows if row.get("placement") == "anywhere"]
    snrs = list(dict.fromkeys(row["snr"] for row in grid))
    kinds = list(dict.fromkeys((row["dataset"], row["peak"]) for row in grid))
    figure = Figure(figsize=(3 * len(snrs), 2.8 * len(kinds) + 0.6), layout="constrained")
    panels = figure.subplots(len(kinds), len(snrs), sharex=True, sharey=True, squeeze=False)
    for (r, (dataset, peak)), (c, snr) in itertools.product(enumerate(kinds), enumerate(snrs)):
        panel = panels[r, c]
        panel.set_title(f"{dataset}, {peak} peak, SNR {snr}", fontsize=9)
        panel.grid(alpha=0.3)
        bins = [row for row in grid if (row["dataset"], row["peak"], row["snr"]) == (dataset, peak, snr)]
        for name in names:
            mean, error = ([row[f"{name} {key}"] for row in bins] for key in ("ari", "ari_se"))
            style = {"linestyle": "--", "color": "0.5" if name == "pca-5" else "0.2"} if name in COMPONENTS else {}
            panel.errorbar([row["drift_um"] for row in bins], mean, error, marker="o", markersize=4, label=name, **style)
    for panel in panels[-1]:
        panel.set_xlabel("drift between a unit's spikes (um)")
        panel.set_xticks(DRIFTS_UM)
    for panel in panels[:, 0]:
        panel.set_ylabel("ARI of ten units")
        panel.set_ylim(0, 1.02)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
