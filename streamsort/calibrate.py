"""The first seconds of a stream turned into units.

In come the peaks of the calibration span with their embeddings and snippets (in noise units); out come prototypes: for every unit,
on every channel where its spikes peak, a mean embedding, a spread and a template. The order is over-cluster, then merge by
evidence:

1. k-means in each channel's embedding space, more clusters than there can be units;
2. on each channel, merge pairs whose spikes show no valley between them along their discriminant;
3. across clusters, on one channel or on neighbours, merge pairs whose mean snippets agree on the channels they share: a unit
   between two contacts peaks now on one, now on the other, and one that moves is compared between neighbouring stretches of time;
4. reject what hugs the threshold (noise: its amplitudes fall off from the threshold as a Gaussian tail does) and echoes (troughs
   that come with larger spikes: after-waves nearby, copies turned over by the common reference); forget what is too small.

Embeddings are compared after whitening with their pooled within-cluster covariance, the metric in which a unit is a ball. No clock
and no global state: the same peaks and seed give the same units.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamsort.config import ClusterConfig
from streamsort.kernels.cluster import compare_templates

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_WINDOW_S, _SLICE_SPIKES = 5.0, 15  # templates are compared between stretches of time of at least so long and so many spikes
_MOST_ECHOES = 0.3  # of a unit's spikes, beyond chance; a synapse drives fewer


@dataclass(frozen=True)
class Calibration:
    """What calibration found.

    Attributes
    ----------
    whitening : ndarray, shape (n_dims, n_dims), float32
        Embeddings are multiplied by it before any distance is taken.
    channel, unit, n_spikes : ndarray, shape (n_prototypes,), int64
        Peak channel of each prototype, its unit (0..n_units-1; -1 for a reject prototype, which attracts noise and echoes), its
        size.
    mean : ndarray, shape (n_prototypes, n_dims), float32
        Mean whitened embedding.
    spread : ndarray, shape (n_prototypes,), float32
        Mean squared distance of the members over n_dims.
    template : ndarray, shape (n_prototypes, n_snippet_samples, n_neighbors), float32
        Mean snippet in noise units, channels in the order of the peak channel's neighbours.
    label : ndarray, shape (n_peaks,), int64
        The unit of each peak, -1 for none.
    """

    whitening: Floats
    channel: Ints
    unit: Ints
    n_spikes: Ints
    mean: Floats
    spread: Floats
    template: Floats
    label: Ints

    def regrouped(self, unit: Ints, channel: NDArray[Any], embeddings: Floats, snippets: Floats, n_least: int) -> "Calibration":
        """Return prototypes of other units, one on each channel with `n_least` of a unit's peaks; reject prototypes stay.

        Parameters
        ----------
        unit : ndarray, shape (n_peaks,), int64
            The unit each peak is of, -1 for none.
        channel : ndarray, shape (n_peaks,), integer
        embeddings : ndarray, shape (n_peaks, n_dims), float32
        snippets : ndarray, shape (n_peaks, n_snippet_samples, n_neighbors), float32
            In noise units.
        n_least : int
        """
        white = embeddings @ self.whitening
        groups, member = np.unique(np.stack([unit, channel.astype(np.int64)], axis=1), axis=0, return_inverse=True)
        members = [np.flatnonzero(member.reshape(-1) == k) for k in range(len(groups))]
        members = [m for m, (name, _) in zip(members, groups.tolist(), strict=True) if name >= 0 and len(m) >= n_least]
        reject = self.unit < 0
        mean = np.array([white[m].mean(axis=0) for m in members], np.float32).reshape(len(members), white.shape[1])
        spread = np.array([np.mean((white[m] - mean[k]) ** 2) for k, m in enumerate(members)], np.float32)
        template = np.array([snippets[m].mean(axis=0) for m in members], np.float32).reshape(len(members), *snippets.shape[1:])
        size = np.array([len(m) for m in members], np.int64)
        return Calibration(
            self.whitening,
            np.concatenate([np.array([channel[m[0]] for m in members], np.int64), self.channel[reject]]),
            np.concatenate([np.array([unit[m[0]] for m in members], np.int64), self.unit[reject]]),
            np.concatenate([size, self.n_spikes[reject]]),
            np.concatenate([mean, self.mean[reject]]),
            np.concatenate([spread, self.spread[reject]]),
            np.concatenate([template, self.template[reject]]),
            unit,
        )


def calibrate(
    peaks: NDArray[Any],
    embeddings: Floats,
    snippets: Floats,
    *,
    neighbors: NDArray[np.int32],
    amplitudes: Floats,
    detect_threshold: float,
    sampling_frequency: float,
    config: ClusterConfig,
    seed: int,
) -> Calibration:
    """Find the units among the peaks of the calibration span.

    Parameters
    ----------
    peaks : ndarray, shape (n_peaks,), PEAK_DTYPE
        In order of sample_index.
    embeddings : ndarray, shape (n_peaks, n_dims), float32
    snippets : ndarray, shape (n_peaks, n_snippet_samples, n_neighbors), float32
        In noise units.
    neighbors : ndarray, shape (n_channels, n_neighbors), int32
        The channels of a snippet, nearest first, -1 where there is none.
    amplitudes : ndarray, shape (n_peaks,), float32
        Peak heights in noise units, positive.
    detect_threshold : float
        In noise units; tells noise by how closely it follows the threshold.
    sampling_frequency : float
        In Hz.
    config : ClusterConfig
    seed : int
        Of the k-means starts.

    Returns
    -------
    Calibration
        Empty (no prototypes) when there are too few peaks to speak of units.
    """
    rng = np.random.default_rng(seed)
    channel = peaks["channel"].astype(np.int64)
    groups = [members for members in _by_channel(channel) if len(members) >= config.min_members]
    fine = _number(len(peaks), groups, [_kmeans(embeddings[g], len(g) // 30, rng) for g in groups])
    whitening = _whitening(embeddings, fine)
    white = embeddings @ whitening
    parts = [split_by_valleys(white[g], config, rng) for g in groups]
    cluster = _drop_small(_number(len(peaks), groups, parts), config.min_members)
    n_clusters = int(cluster.max(initial=-1)) + 1
    members = [np.flatnonzero(cluster == k) for k in range(n_clusters)]
    home = np.array([channel[m[0]] for m in members], np.int64)
    size = np.array([len(m) for m in members], np.int64)
    template = np.array([snippets[m].mean(axis=0) for m in members], np.float32).reshape(n_clusters, *snippets.shape[1:])
    height = np.array([amplitudes[m].mean() for m in members])
    window = (peaks["sample_index"] / (_WINDOW_S * sampling_frequency)).astype(np.int64)
    unit = _merge_by_template([_slices(snippets[m], window[m]) for m in members], home, neighbors)
    total = np.bincount(unit, weights=size, minlength=1)[unit]
    # The heights of noise above a threshold t exceed it by 1/t on average; a unit's exceed it by more.
    reject = height < detect_threshold + config.noise_excess / detect_threshold
    for k in np.flatnonzero(~reject):
        wide = np.unique(neighbors[neighbors[home[k]]])
        reject[k] = _is_echo(members[k], height[k], peaks, amplitudes, wide, sampling_frequency)
    unit = np.where(reject, -1, unit)
    mean = np.array([white[m].mean(axis=0) for m in members], np.float32).reshape(n_clusters, white.shape[1])
    spread = np.array([np.mean((white[m] - mean[k]) ** 2) for k, m in enumerate(members)], np.float32)
    # What is too small for a unit is forgotten: as a reject prototype it would swallow the unit it may belong to.
    kept = reject | (total >= config.min_spikes)
    names = np.full(n_clusters + 1, -1, np.int64)  # by cluster; the last is that of peaks in none
    names[:-1][kept] = _renumber(unit[kept], size[kept])
    return Calibration(
        whitening, home[kept], names[:-1][kept], size[kept], mean[kept], spread[kept], template[kept], names[cluster]
    )


def _by_channel(channel: Ints) -> list[Ints]:
    order = np.argsort(channel, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(channel[order])) + 1) if len(order) else []


def _number(n_peaks: int, groups: list[Ints], labels: list[Ints]) -> Ints:
    """Put the labels of separate groups into one array, numbered through; -1 for peaks of no group."""
    out = np.full(n_peaks, -1, np.int64)
    start = 0
    for group, label in zip(groups, labels, strict=True):
        out[group] = label + start
        start += int(label.max()) + 1
    return out


def _drop_small(cluster: Ints, min_spikes: int) -> Ints:
    counts = np.bincount(cluster[cluster >= 0], minlength=1)
    new = np.cumsum(counts >= min_spikes) - 1
    return np.where((cluster >= 0) & (counts[cluster] >= min_spikes), new[cluster], -1)


def _renumber(unit: Ints, size: Ints) -> Ints:
    """Count units from 0 by falling size, so that unit ids start with the most active one."""
    out = np.full(len(unit), -1, np.int64)
    names = np.unique(unit[unit >= 0])
    order = np.argsort([-size[unit == name].sum() for name in names], kind="stable")
    for new, name in enumerate(names[order]):
        out[unit == name] = new
    return out


def _kmeans(x: Floats, n_clusters: int, rng: np.random.Generator, n_iterations: int = 20) -> Ints:
    """k-means from a k-means++ start (Arthur & Vassilvitskii 2007); at most 24 clusters."""
    k = int(np.clip(n_clusters, 1, 24))
    centers = x[rng.integers(len(x), size=1)].astype(np.float64)
    nearest = ((x - centers[0]) ** 2).sum(axis=1)
    while len(centers) < k and nearest.sum() > 0:
        centers = np.vstack([centers, x[rng.choice(len(x), p=nearest / nearest.sum())]])
        nearest = np.minimum(nearest, ((x - centers[-1]) ** 2).sum(axis=1))
    label = np.zeros(len(x), np.int64)
    for _ in range(n_iterations):
        label = np.argmin((centers**2).sum(axis=1) - 2 * x @ centers.T, axis=1)
        filled = np.unique(label)
        moved = np.array([x[label == j].mean(axis=0) for j in filled])
        if len(filled) == len(centers) and np.allclose(moved, centers):
            break
        centers = moved
    return np.unique(label, return_inverse=True)[1].astype(np.int64)


def _whitening(embeddings: Floats, cluster: Ints) -> Floats:
    """Inverse square root of the pooled within-cluster covariance, a little of the identity added."""
    n_dims = embeddings.shape[1]
    scatter, n = np.zeros((n_dims, n_dims)), 0
    for k in range(int(cluster.max(initial=-1)) + 1):
        x = embeddings[cluster == k].astype(np.float64)
        scatter += (x - x.mean(axis=0)).T @ (x - x.mean(axis=0))
        n += len(x) - 1
    if n <= n_dims:
        return np.identity(n_dims, np.float32)
    covariance = scatter / n
    covariance += 0.02 * np.trace(covariance) / n_dims * np.eye(n_dims)
    values, vectors = np.linalg.eigh(covariance)
    whitening: Floats = (vectors / np.sqrt(values)).astype(np.float32)
    return whitening


def split_by_valleys(x: Floats, config: ClusterConfig, rng: np.random.Generator) -> Ints:
    """Over-cluster the peaks of one channel, then merge the pair with the shallowest valley until every pair has one."""
    label = _kmeans(x, len(x) // config.spikes_per_seed, rng)
    parts = {int(k): x[label == k] for k in np.unique(label)}
    depth: dict[tuple[int, int], float] = {}
    while len(parts) > 1:
        for a, b in _near_pairs(parts):
            if (a, b) not in depth:
                depth[a, b] = valley_ratio(parts[a], parts[b])
        (a, b), ratio = max(depth.items(), key=lambda item: item[1])
        if ratio < config.valley_ratio:
            break
        label[label == b] = a
        parts[a] = x[label == a]
        del parts[b]
        depth = {pair: value for pair, value in depth.items() if a not in pair and b not in pair}
    return np.unique(label, return_inverse=True)[1].astype(np.int64)


def _near_pairs(parts: dict[int, Floats], n_near: int = 4) -> list[tuple[int, int]]:
    """Each cluster with its few nearest: a merge of far ones is never the first."""
    names = np.array(list(parts))
    means = np.array([part.mean(axis=0) for part in parts.values()])
    distances = ((means[:, None] - means[None]) ** 2).sum(axis=2)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, 1 : n_near + 1]
    pairs = {(int(min(a, b)), int(max(a, b))) for a, row in zip(names, names[nearest], strict=True) for b in row}
    return sorted(pairs)


def valley_ratio(a: Floats, b: Floats) -> float:
    """Tell how deep the valley between two clusters is along their linear discriminant.

    Parameters
    ----------
    a, b : ndarray, shape (n, n_dims), float32
        Members of the two clusters.

    Returns
    -------
    float
        Smallest density between the two medians over the lower of the two peak densities: 1 for one hill, near 0 for two.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(400, 3)).astype(np.float32)
    >>> valley_ratio(x[:200], x[200:]) > 0.8, valley_ratio(x[:200], x[200:] + 6) < 0.2
    (True, True)
    """
    n_dims = a.shape[1]
    ca, cb = a - a.mean(axis=0), b - b.mean(axis=0)
    covariance = (ca.T @ ca + cb.T @ cb).astype(np.float64) / max(len(a) + len(b) - 2, 1)
    covariance += (0.1 * np.trace(covariance) / n_dims + 1e-9) * np.eye(n_dims)
    axis = np.linalg.solve(covariance, (b.mean(axis=0) - a.mean(axis=0)).astype(np.float64))
    left, right = a @ axis, b @ axis
    low, high = sorted((float(np.median(left)), float(np.median(right))))
    width = max(float(np.sqrt((left.var() * len(left) + right.var() * len(right)) / (len(left) + len(right)))), 1e-9)
    both = np.sort(np.concatenate([left, right]))
    grid = np.linspace(low - width, high + width, 48)
    bandwidth = width * (len(both) / 2) ** -0.2
    density = np.exp(-0.5 * ((grid[:, None] - both) / bandwidth) ** 2).sum(axis=1)
    between = density[(grid >= low) & (grid <= high)]
    peak = min(density[grid <= low + width].max(), density[grid >= high - width].max())
    return float(between.min() / peak) if len(between) else 1.0


def template_mismatch(
    a: Floats, b: Floats, neighbors_a: NDArray[np.int32], neighbors_b: NDArray[np.int32], noise: float, max_lag: int = 3
) -> float:
    """Compare two templates on the channels they share.

    Parameters
    ----------
    a, b : ndarray, shape (n_snippet_samples, n_neighbors), float32
        Mean snippets in noise units; `neighbors_a`, `neighbors_b` name the channels of their columns.
    noise : float
        Variance that averaging left in each sample of their difference, (1/n_a + 1/n_b) noise units squared; taken off.
    max_lag : int
        They are slid by up to this many samples: two channels see a trough at slightly different times.

    Returns
    -------
    float
        Energy of the difference over what one unit's clusters may differ by, smallest over lags: below 1 they are one unit.
        Infinite when the peak channel of one is not among the other's channels.

    Notes
    -----
    Measured on the clusters of 9 simulated and real-footprint recordings: the energy of the difference is 4 to 140 within a unit,
    growing with the template's own energy E (amplitudes vary, and a cluster is what noise moved one way), and 100 to 5000 between
    units. 80 + 0.02 E, at most 0.2 E, parts them.
    """
    columns = _shared_columns(neighbors_a, neighbors_b)
    if columns is None:
        return float("inf")
    n_lags = 2 * max_lag + 1
    differences, energies = np.empty(n_lags, np.float32), np.empty(n_lags, np.float32)
    n_shared = compare_templates(a, b, columns, max_lag, differences, energies)
    bias = noise * n_shared * (len(a) - np.abs(np.arange(-max_lag, max_lag + 1)))
    energies, differences = np.maximum(energies - bias, 1.0), np.maximum(differences - bias, 0.0)
    return float((differences / np.minimum(0.2 * energies, 80.0 + 0.02 * energies)).min())


def _shared_columns(neighbors_a: NDArray[np.int32], neighbors_b: NDArray[np.int32]) -> NDArray[np.int32] | None:
    """Tell for each channel of a which column of b it is, -1 for none; None when a peak channel is not shared."""
    same = (neighbors_a[:, None] == neighbors_b[None]) & (neighbors_a[:, None] >= 0)
    columns: NDArray[np.int32] = np.where(same.any(axis=1), same.argmax(axis=1), -1).astype(np.int32)
    return columns if columns[0] >= 0 and same[:, 0].any() else None


class _Slice(NamedTuple):
    """Part of a cluster: its mean snippet between two windows of time, and of how many spikes."""

    first: int
    last: int
    template: Floats
    n_spikes: int


def _slices(snippets: Floats, window: Ints) -> list[_Slice]:
    """Cut a cluster in time, into stretches of at least _SLICE_SPIKES spikes."""
    slices: list[_Slice] = []
    start = 0
    for stop in [*(np.flatnonzero(np.diff(window)) + 1).tolist(), len(window)]:
        if stop - start >= _SLICE_SPIKES or (stop == len(window) and not slices):
            template = snippets[start:stop].mean(axis=0)
            slices.append(_Slice(int(window[start]), int(window[stop - 1]), template, stop - start))
            start = stop
    return slices


def _cluster_mismatch(a: list[_Slice], b: list[_Slice], neighbors_a: NDArray[np.int32], neighbors_b: NDArray[np.int32]) -> float:
    """Return the smallest mismatch between slices that are neighbours in time, so that a unit may have moved in between."""
    found = [
        template_mismatch(x.template, y.template, neighbors_a, neighbors_b, 1 / x.n_spikes + 1 / y.n_spikes)
        for x in a
        for y in b
        if x.first <= y.last + 1 and y.first <= x.last + 1
    ]
    return min(found, default=float("inf"))


def _merge_by_template(slices: list[list[_Slice]], home: Ints, neighbors: NDArray[np.int32]) -> Ints:
    """Join clusters whose templates agree, best agreement first, as long as the joined units agree on the whole."""
    n = len(slices)
    mismatch = np.full((n, n), np.inf)
    for i in range(n):
        for j in np.flatnonzero(np.isin(home[:i], neighbors[home[i]])):
            mismatch[i, j] = _cluster_mismatch(slices[i], slices[j], neighbors[home[i]], neighbors[home[j]])
    unit = np.arange(n)
    order = np.argwhere(mismatch < 1)
    for i, j in order[np.argsort(mismatch[order[:, 0], order[:, 1]], kind="stable")]:
        ours, theirs = np.flatnonzero(unit == unit[i]), np.flatnonzero(unit == unit[j])
        across = np.fmin(mismatch[np.ix_(ours, theirs)], mismatch[np.ix_(theirs, ours)].T)
        if unit[i] != unit[j] and across[np.isfinite(across)].mean() < 2:
            unit[theirs] = unit[i]
    return unit


def _is_echo(own: Ints, height: float, peaks: NDArray[Any], amplitudes: Floats, wide: Ints, rate: float) -> bool:
    """Tell whether a cluster's spikes mostly come with larger ones: after-waves nearby, the reference's inverted copies anywhere.

    The share that has a larger peak (1.5 times nearby, 3 times elsewhere) from 2 ms before to 0.3 ms after is compared with chance.
    """
    loud = amplitudes > np.where(np.isin(peaks["channel"], wide), 1.5, 3.0) * height
    times, loud_times = peaks["sample_index"][own], peaks["sample_index"][loud]
    before, after = int(2e-3 * rate), int(0.3e-3 * rate)
    hit = np.searchsorted(loud_times, times + after, "right") > np.searchsorted(loud_times, times - before)
    span = max(int(peaks["sample_index"][-1] - peaks["sample_index"][0]), 1)
    chance = 1 - np.exp(-len(loud_times) * (before + after) / span)
    return bool((hit.mean() - chance) / max(1 - chance, 1e-9) > _MOST_ECHOES)
