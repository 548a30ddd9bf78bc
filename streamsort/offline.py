"""The pipeline of the HuiduRep paper, offline, as a reference for what the stream gives: detect, embed, Gaussian mixture.

A source goes through the stream's own front end (causal filter, noise level, threshold, snippets, encoder), then one mixture with
full covariances is fitted to all embeddings of a group of peaks, and each peak belongs to its most likely component. It is not
causal: what a spike is called depends on spikes after it. Nothing follows drift, and nothing is rejected: noise over the threshold
becomes units too, as in the paper.

A group is the whole probe where every contact is within every other's snippet, as on a tetrode: the snippets then have their
channels in one order for all peaks, as the paper has them. On a larger probe the peaks of each channel are a group, and components
of two channels whose mean snippets agree are one unit. Everything is held in memory, 2 kB for a peak.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.calibrate import template_mismatch
from streamsort.errors import StreamsortError
from streamsort.noise import divisor
from streamsort.records import UNSORTED, Chunk, Gap, Output, PeakBatch
from streamsort.sorter import Sorter

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_PATIENCE = 3  # components more without a lower BIC end the search for their number


@dataclass(frozen=True)
class Embedded:
    """All peaks of a recording: n spikes without a unit, embeddings (n, n_dims), snippets (n, samples, n_neighbors) in uV."""

    spikes: NDArray[Any]
    embeddings: Floats
    snippets: Floats
    noise_level: Floats
    gaps: list[Gap]
    through_sample: int


class Mixture:
    """Gaussian mixtures with full covariances, fitted as the paper's code does (100 steps, one start).

    Parameters
    ----------
    n_units : int, optional
        Components; by default as many as give the lowest BIC.
    seed : int
        Of the start.

    Raises
    ------
    StreamsortError
        If scikit-learn is not installed, or `n_units` is not 1 or more.
    """

    def __init__(self, n_units: int | None = None, seed: int = 0) -> None:
        if n_units is not None and n_units < 1:
            raise StreamsortError(f"units {n_units}, expected 1 or more")
        try:
            from sklearn.mixture import GaussianMixture
        except ImportError:
            raise StreamsortError("scikit-learn is not installed, expected pip install 'streamsort[offline]'") from None
        self._n_units, self._seed, self._class = n_units, seed, GaussianMixture

    def __call__(self, embeddings: Floats) -> tuple[Ints, Floats]:
        """Return each row's component, (n,) int64, and its posterior, (n,) float32.

        A component has at least one row more than there are dimensions, so few rows are one component whatever was asked for.
        """
        most = max(len(embeddings) // (embeddings.shape[1] + 1), 1)
        if len(embeddings) < 2:
            return np.zeros(len(embeddings), np.int64), np.ones(len(embeddings), np.float32)
        best = self._fit(embeddings, min(self._n_units or 1, most))
        lowest = best.bic(embeddings)
        k = best_k = 1
        while self._n_units is None and k < min(most, best_k + _PATIENCE):
            k += 1
            model = self._fit(embeddings, k)
            if (bic := model.bic(embeddings)) < lowest:
                best, best_k, lowest = model, k, bic
        posterior = best.predict_proba(embeddings)
        return posterior.argmax(axis=1), posterior.max(axis=1).astype(np.float32)

    def _fit(self, embeddings: Floats, k: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # so few steps do not always converge
            model = self._class(k, covariance_type="full", max_iter=100, tol=1e-4, n_init=1, random_state=self._seed)
            return model.fit(embeddings.astype(np.float64))  # float32 has no covariance of few spikes


def sort_offline(
    chunks: Iterable[Chunk], sorter: Sorter, mixture: Mixture, show: Callable[[float], None] = lambda _: None
) -> Output:
    """Sort a whole recording with a Gaussian mixture.

    Parameters
    ----------
    chunks : iterable of Chunk
        The recording, to its end.
    sorter : Sorter
        Fresh; its front end and encoder are used, its clustering is not.
    mixture : Mixture
        Fitted to each group.
    show : callable, optional
        Is told the part of the groups that are done, 0 to 1.

    Returns
    -------
    Output
        All spikes, in order of sample_index, with the posterior as their confidence; and the table of units.

    Raises
    ------
    StreamsortError
        If there are no samples.
    """
    neighbors = sorter.probe.neighbors(sorter.config.snippets.radius_um, sorter.config.snippets.n_neighbors)
    one_group = bool(((neighbors >= 0).sum(axis=1) == len(neighbors)).all())
    found = _embed_all(chunks, sorter, neighbors if one_group else None)
    group = found.spikes["channel"].astype(np.int64) * (not one_group)
    component = np.full(len(group), UNSORTED, np.int64)
    for number in np.unique(group):
        own = np.flatnonzero(group == number)
        label, confidence = mixture(found.embeddings[own])
        component[own] = label + component.max(initial=UNSORTED) + 1
        found.spikes["confidence"][own] = confidence
        show((number + 1) / (group.max() + 1))
    unit = component if one_group else _joined_over_channels(found, component, neighbors)[component]
    found.spikes["unit_id"] = np.unique(unit, return_inverse=True)[1] + 1
    return Output(found.through_sample, found.spikes, gaps=found.gaps, units=_units_table(found, sorter), model=sorter.encoder.name)


def _embed_all(chunks: Iterable[Chunk], sorter: Sorter, order: NDArray[np.int32] | None) -> Embedded:
    """Detect and embed every peak; with a table of neighbours, its snippet has its channels in the order of the probe."""
    batches: list[PeakBatch] = [batch for chunk in chunks for batch in sorter.detect(chunk)]
    if not batches:
        raise StreamsortError("the recording is empty, expected samples")
    snippets = np.concatenate([batch.snippets for batch in batches])
    noise_level = np.concatenate([batch.noise_level for batch in batches])
    channel = np.concatenate([batch.peaks["channel"] for batch in batches])
    seen_by_encoder = (snippets, noise_level)
    if order is not None:
        column = np.argsort(order[:, : len(order)], axis=1)[channel]
        column = np.hstack([column, np.tile(np.arange(len(order), order.shape[1]), (len(channel), 1))])
        seen_by_encoder = (
            np.take_along_axis(snippets, column[:, None], axis=2),
            np.take_along_axis(noise_level, column, axis=1),
        )
    embeddings = sorter.encoder(*seen_by_encoder)
    outputs = [sorter.assign(batch) for batch in batches]  # before calibration: no units
    spikes = np.concatenate([output.spikes for output in outputs])
    gaps = list(itertools.chain.from_iterable(output.gaps for output in outputs))
    return Embedded(spikes, embeddings, snippets, noise_level, gaps, batches[-1].through_sample)


def _joined_over_channels(found: Embedded, component: Ints, neighbors: NDArray[np.int32]) -> Ints:
    """Return the unit of each component: those of different channels are one where their mean snippets agree, best first."""
    n = int(component.max(initial=UNSORTED)) + 1
    size = np.bincount(component, minlength=n)
    home, template = np.zeros(n, np.int64), np.zeros((n, *found.snippets.shape[1:]), np.float32)
    for k in range(n):
        own = component == k
        level = found.noise_level[own].mean(axis=0)
        home[k] = found.spikes["channel"][own][0]
        template[k] = found.snippets[own].mean(axis=0) / divisor(level)
    agreeing = []
    for a, b in itertools.combinations(range(n), 2):
        if home[a] != home[b] and home[b] in neighbors[home[a]]:
            noise = 1 / size[a] + 1 / size[b]
            agreeing.append((template_mismatch(template[a], template[b], neighbors[home[a]], neighbors[home[b]], noise), a, b))
    unit = np.arange(n)
    for mismatch, a, b in sorted(agreeing):
        if mismatch < 1:
            unit[unit == unit[b]] = unit[a]
    return unit


def _units_table(found: Embedded, sorter: Sorter) -> list[dict[str, Any]]:
    """Describe the units with the keys that the stream's table has, as far as they mean something here."""
    table = []
    for unit_id in np.unique(found.spikes["unit_id"]):
        own = found.spikes[found.spikes["unit_id"] == unit_id]
        channel = int(np.bincount(own["channel"]).argmax())
        x, y = sorter.probe.channel_locations[channel]
        table.append(
            {
                "unit_id": int(unit_id),
                "channel_index": channel,
                "x_um": round(float(x), 1),
                "y_um": round(float(y), 1),
                "amplitude_uv": round(float(own["amplitude_uv"].mean()), 1),
                "n_spikes": len(own),
                "firing_rate_hz": round(len(own) * sorter.info.sampling_frequency / found.through_sample, 2),
                "quality": round(float(own["confidence"].mean()), 3),
            }
        )
    return table
