"""Slow twins of the kernels, written from their definitions with plain loops; they share no code with them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def fill(raw: NDArray[Any], largest: float) -> Floats:
    """Replace what is not a number by the channel's last good value, and subtract its first one (0 before there is one)."""
    filled = np.zeros(raw.shape, np.float32)
    for c in range(raw.shape[1]):
        first = last = None
        for i in range(raw.shape[0]):
            value = np.float32(raw[i, c])
            if np.isfinite(value) and abs(value) <= largest:
                last = value
                first = value if first is None else first
            if last is not None and first is not None:
                filled[i, c] = last - first
    return filled


def band_pass(traces: Floats, sections: NDArray[Any]) -> Floats:
    """Run second-order sections from rest, transposed direct form II, one float32 operation at a time."""
    sections = sections.astype(np.float32)
    out = traces.copy()
    for b0, b1, b2, _, a1, a2 in sections:
        z0, z1 = np.zeros((2, traces.shape[1]), np.float32)
        for i in range(len(out)):
            x = out[i].copy()
            y = b0 * x + z0
            z0 = b1 * x - a1 * y + z1
            z1 = b2 * x - a2 * y
            out[i] = y
    return out


def subtract_reference(traces: Floats, good: NDArray[np.bool_], reference: str) -> Floats:
    """Subtract each sample's median or mean over the good channels and zero the others."""
    out = np.zeros_like(traces)
    for i, row in enumerate(traces):
        middle = {"none": 0.0, "mean": np.mean(row[good]), "median": np.median(row[good])}[reference]
        out[i, good] = row[good] - np.float32(middle)
    return out


def find_peaks(
    traces: Floats, thresholds: Floats, near: NDArray[np.bool_], sweep: int, sign: str, first: int, last: int
) -> list[tuple[int, int]]:
    """List (sample, channel) of the values in rows [first, last) that no other in their neighbourhood beats; `near` is a matrix."""
    values = {"neg": -traces, "pos": traces, "both": np.abs(traces)}[sign]
    peaks = []
    for s in range(first, last):
        for c in range(traces.shape[1]):
            if values[s, c] < thresholds[c]:
                continue
            beaten = False
            for s2 in range(s - sweep, s + sweep + 1):
                for c2 in np.flatnonzero(near[c]):
                    earlier = (s2, c2) < (s, c)
                    beaten |= values[s2, c2] > values[s, c] or (values[s2, c2] == values[s, c] and earlier)
            if not beaten:
                peaks.append((s, c))
    return peaks


def cut_snippets(traces: Floats, peaks: list[tuple[int, int]], neighbors: NDArray[np.int32], n_before: int, n_after: int) -> Floats:
    """Copy rows [s - n_before, s + n_after) of the neighbours of each peak (s, c), zeros where the table says -1."""
    out = np.zeros((len(peaks), n_before + n_after, neighbors.shape[1]), np.float32)
    for p, (s, c) in enumerate(peaks):
        for k, other in enumerate(neighbors[c]):
            if other >= 0:
                out[p, :, k] = traces[s - n_before : s + n_after, other]
    return out


def whiten(traces: Floats, table: NDArray[np.int32], weights: Floats) -> Floats:
    """Sum each channel's neighbourhood with its weights, in float64."""
    out = np.zeros(traces.shape)
    for k in range(len(table)):
        out += traces[:, table[k]].astype(np.float64) * weights[k]
    return out.astype(np.float32)


def assign_nearest(
    white: NDArray[Any],
    channel: NDArray[Any],
    home: NDArray[Any],
    mean: NDArray[Any],
    spread: NDArray[Any],
    log_weight: NDArray[Any],
    unit: NDArray[Any],
) -> tuple[list[int], list[float], list[float]]:
    """Most probable of the Gaussians on each spike's channel, its scaled distance, and the posterior of its unit."""
    prototypes, distances, confidences = [], [], []
    for x, c in zip(white, channel, strict=True):
        rows = [p for p in range(len(home)) if home[p] == c]
        if not rows:
            prototypes.append(-1)
            distances.append(float("inf"))
            confidences.append(0.0)
            continue
        z = [float(((x.astype(float) - mean[p]) ** 2).sum() / spread[p]) for p in rows]
        scores = [-0.5 * (d + len(x) * np.log(spread[p])) + log_weight[p] for d, p in zip(z, rows, strict=True)]
        best = int(np.argmax(scores))
        weights = np.exp(np.array(scores) - scores[best])
        ours = [unit[p] == unit[rows[best]] for p in rows]
        prototypes.append(rows[best])
        distances.append(z[best])
        confidences.append(float(weights[ours].sum() / weights.sum()))
    return prototypes, distances, confidences


def compare_templates(a: NDArray[Any], b: NDArray[Any], columns: NDArray[Any], max_lag: int) -> tuple[list[float], list[float]]:
    """Energy of the difference and mean energy at each lag, over the rows and channels both have."""
    differences, energies = [], []
    for lag in range(-max_lag, max_lag + 1):
        pairs = [
            (float(a[t, k]), float(b[t - lag, columns[k]]))
            for t in range(len(a))
            if 0 <= t - lag < len(a)
            for k in range(len(columns))
            if columns[k] >= 0
        ]
        differences.append(sum((u - v) ** 2 for u, v in pairs))
        energies.append(sum(u * u + v * v for u, v in pairs) / 2)
    return differences, energies
