"""A recording through the sorter, once and forwards, as it would arrive live; and what that came to.

`sort_case` runs it, with an encoder or with principal components in its place; `scores` compares the outcome with the truth and
`violations` looks at what needs none.
"""

import argparse
import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from accuracy_data import Case, mean_snippets
from numpy.typing import NDArray
from scipy.linalg import eigh

from streamsort.compare import Comparison, compare
from streamsort.config import SorterConfig
from streamsort.encode import Encoder
from streamsort.records import SPIKE_DTYPE, UNSORTED, Chunk
from streamsort.score import Score, accuracy_in_windows, overlapping_pairs
from streamsort.sorter import Sorter
from streamsort.sources import Source, open_source
from streamsort.trust import calibration, separation

SNR_BINS = {"3-5": (3.0, 5.0), "5-8": (5.0, 8.0), "8+": (8.0, np.inf)}
OVERLAPS_MS = (0.5, 1.0)
CLEAR_SNR = 6.0  # ids and overlaps are judged by the units from here on
GOOD_ACCURACY = 0.8  # what a unit should have to be called stable
REFRACTORY_MS = 1.5  # SpikeInterface's isi_threshold_ms
Floats = NDArray[np.float32]


class PrincipalComponents(Encoder):
    """What stands in an encoder's place: the leading principal components of snippets in noise units, as many as it has dimensions.

    Parameters
    ----------
    snippets : ndarray, shape (n, n_samples, n_neighbors), float32
        To fit to, in uV; those of the warm-up.
    noise_level : ndarray, shape (n, n_neighbors), float32
    sampling_frequency : float
    """

    def __init__(self, snippets: Floats, noise_level: Floats, sampling_frequency: float) -> None:
        super().__init__(provider="cpu", sampling_frequency=sampling_frequency)  # for its contract: the window and the size
        values = self._values(snippets, noise_level).astype(np.float64)
        self._mean = values.mean(axis=0).astype(np.float32)
        size = values.shape[1]
        _, axes = eigh(np.cov(values.T), subset_by_index=[size - self.n_dims, size - 1])
        self._axes = axes.astype(np.float32)

    @property
    def name(self) -> str:
        return f"pca-{self.n_dims}"

    def _values(self, snippets: Floats, noise_level: Floats) -> Floats:
        scale = np.divide(1.0, noise_level, out=np.zeros_like(noise_level), where=noise_level > 0)
        values = self.at_models_rate(snippets) * scale[:, None]
        return values.reshape(len(values), values.shape[1] * values.shape[2])

    def __call__(self, snippets: Floats, noise_level: Floats) -> Floats:
        """Project snippets, (n, n_dims) float32."""
        projected: Floats = (self._values(snippets, noise_level) - self._mean) @ self._axes
        return projected


@dataclass(frozen=True)
class Sorted:
    """What was published, how long it took, and by which encoder; the first `warmup_s` are calibration."""

    case: Case
    spikes: NDArray[Any]
    units: list[dict[str, Any]]
    sampling_frequency: float
    channel_locations: NDArray[np.float64] | None
    seconds: float
    warmup_s: float
    wall_s: float
    cpu_s: float
    encoder: str
    provider: str


def sort_case(case: Case, feature: str | None, args: argparse.Namespace) -> Sorted:
    """Sort one recording; `feature` is light, full, pca, or None for what the arguments say."""
    config = SorterConfig.from_toml(args.config) if args.config else SorterConfig()
    encoder = "light" if feature == "pca" else feature or args.encoder or config.encode.encoder
    config = replace(config, encode=replace(config.encode, encoder=encoder, provider=args.provider))
    with open_source(str(case.path), chunk_ms=args.chunk_ms) as source:
        seconds = source.n_samples / source.info.sampling_frequency  # type: ignore[attr-defined]
        config = replace(config, warmup_s=args.warmup * seconds)
        sorter = Sorter(config, source.info)
        if feature == "pca":
            sorter.encoder = _components(config, case, args.chunk_ms)
        sorter.warmup()
        began = time.perf_counter(), time.process_time()
        spikes = _spikes(sorter, source)
        spent = time.perf_counter() - began[0], time.process_time() - began[1]
    rate, probe = source.info.sampling_frequency, source.info.probe
    places = None if probe is None else probe.channel_locations
    used = sorter.encoder.name, sorter.encoder.provider
    return Sorted(case, spikes, sorter.units_table(), rate, places, seconds, config.warmup_s, *spent, *used)


def _spikes(sorter: Sorter, chunks: Iterable[Chunk]) -> NDArray[Any]:
    outputs = itertools.chain.from_iterable(map(sorter.process, chunks))
    return np.concatenate([np.zeros(0, SPIKE_DTYPE), *(output.spikes for output in outputs)])


def _components(config: SorterConfig, case: Case, chunk_ms: float) -> PrincipalComponents:
    """Fit principal components to the snippets that calibration will see."""
    with open_source(str(case.path), chunk_ms=chunk_ms) as source:
        sorter = Sorter(config, source.info)
        batches = [batch for chunk in _until(source, config.warmup_s) for batch in sorter.detect(chunk) if len(batch.peaks)]
        snippets, noise_level = (
            np.concatenate([getattr(batch, name) for batch in batches]) for name in ("snippets", "noise_level")
        )
        return PrincipalComponents(snippets, noise_level, source.info.sampling_frequency)


def _until(source: Source, seconds: float) -> Iterable[Chunk]:
    return itertools.takewhile(lambda chunk: chunk.end_sample <= seconds * source.info.sampling_frequency, source)


def scores(result: Sorted) -> dict[str, Any]:
    """Compare what was published after the warm-up with the truth."""
    case, true = result.case, result.case.true
    assert true is not None
    compared = compare(result.spikes, true, result.sampling_frequency, result.warmup_s, result.seconds)
    score = Score.of(compared)
    snr = case.snr[[unit.unit_true for unit in score.units]]
    units = judged(result, score)
    reliability = calibration(compared, result.spikes["confidence"])
    clear = [unit for unit, height in zip(score.units, snr, strict=True) if height >= CLEAR_SNR]
    purities = [unit.id_purity for unit in clear if unit.id_purity is not None]
    return {
        **score.to_dict(),
        **by_snr("snr", np.array([unit.accuracy for unit in score.units]), snr),
        "n_units_surplus": (score.n_units_false + score.n_units_redundant) / max(score.n_units_true, 1),
        "id_purity_clear": float(np.mean(purities)) if purities else None,
        "id_purity_clear_min": min(purities, default=None),
        "id_switches_clear": sum(unit.id_switches for unit in clear) if clear else None,
        "calibration_error": reliability.error,
        "calibration": [asdict(one) for one in reliability.bins],
        "units_judged": units,
        "stable_auc": stable_auc(units),
        **_overlaps(result, compared),
        "windows": [None if np.isnan(value) else value for value in accuracy_in_windows(compared).tolist()],
    }


def by_snr(key: str, values: NDArray[Any], snr: NDArray[np.float64]) -> dict[str, float]:
    """Split a mean by SNR; empty bins are left out."""
    bins = {}
    for name, (low, high) in SNR_BINS.items():
        within = (snr >= low) & (snr < high)
        if within.any():
            bins[f"{key}_{name}"] = float(values[within].mean())
    return bins


def judged(result: Sorted, score: Score) -> list[dict[str, Any]]:
    """List the units that published spikes after the warm-up: their state at the end, and how accurate they are."""
    accuracy = {unit.unit_id: unit.accuracy for unit in score.units if unit.tp}
    late = result.spikes["sample_index"] >= result.warmup_s * result.sampling_frequency
    seen = set(np.unique(result.spikes["unit_id"][late]).tolist())
    return [
        {"unit_id": unit["unit_id"], "state": unit["state"], "accuracy": accuracy.get(unit["unit_id"], 0.0)}
        for unit in result.units
        if unit["unit_id"] in seen
    ]


def stable_auc(units: Sequence[dict[str, Any]]) -> float | None:
    """Tell how well `stable` marks the good ones among units as `judged` lists them."""
    stable = np.array([unit["state"] == "stable" for unit in units], np.bool_)
    return separation(stable, np.array([unit["accuracy"] >= GOOD_ACCURACY for unit in units], np.bool_))


def _overlaps(result: Sorted, compared: Comparison) -> dict[str, Any]:
    """Tell how often both spikes of an overlapping pair were found, by the SNR of the smaller one."""
    true = result.case.true
    if result.channel_locations is None or true is None:
        return {}
    size = np.ptp(mean_snippets(result.case.path, *true), axis=1)
    found: dict[str, Any] = {}
    for within_ms in OVERLAPS_MS:
        units, both = overlapping_pairs(compared, result.channel_locations[size.argmax(axis=1)], within_ms)
        snr = result.case.snr[units].min(axis=1)
        clear = snr >= CLEAR_SNR
        key = f"pairs_{within_ms:g}ms"
        found |= {f"n_{key}_clear": int(clear.sum()), f"{key}_clear": float(both[clear].mean()) if clear.any() else None}
        found |= by_snr(key, both, snr)
    return found


def violations(result: Sorted) -> dict[str, Any]:
    """Count, after the warm-up, each unit's spikes and the share of its intervals shorter than 1.5 ms."""
    spikes = result.spikes[result.spikes["sample_index"] >= result.warmup_s * result.sampling_frequency]
    units = []
    for unit_id in np.unique(spikes["unit_id"][spikes["unit_id"] != UNSORTED]).tolist():
        own = spikes[spikes["unit_id"] == unit_id]
        intervals_ms = np.diff(np.sort(own["sample_index"])) / result.sampling_frequency * 1e3
        rate_hz = len(own) / (result.seconds - result.warmup_s)
        share = float((intervals_ms < REFRACTORY_MS).mean()) if len(intervals_ms) else 0.0
        units.append({"unit_id": unit_id, "n_spikes": len(own), "firing_rate": rate_hz, "isi_violations_share": share})
    shares = [unit["isi_violations_share"] for unit in units]
    return {
        "n_units_published": len(units),
        "n_spikes_published": len(spikes),
        "sorted_share": float((spikes["unit_id"] != UNSORTED).mean()) if len(spikes) else 0.0,
        "isi_violations_mean": float(np.mean(shares)) if shares else None,
        "isi_violations_max": max(shares, default=None),
        "published": units,
    }
