"""True and published spikes side by side: which coincide, and which true unit goes with which id.

Two lists of spikes come in, a `Comparison` goes out; every score is read off it. By the definition of SpikeInterface's
`compare_sorter_to_ground_truth`, spikes of a true and a found unit coincide within +- `delta_ms`, each spike at most once; the
agreement of two units is tp / (n_true + n_found - tp); true units get at most one found unit each, by the assignment of largest
total agreement, and none below 0.5. It is one match over the whole span.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from streamsort.errors import StreamsortError
from streamsort.records import UNSORTED
from streamsort.simulate import Truth

MIN_AGREEMENT = 0.5  # below, a true unit counts as not found
_LONGEST_S = 1e9


@dataclass(frozen=True)
class Trains:
    """Spikes in order of time: where, whose as an index into `labels`, and which row of the input they were."""

    sample_index: NDArray[np.int64]
    unit: NDArray[np.int64]
    labels: NDArray[np.int64]
    row: NDArray[np.int64]

    @classmethod
    def cut(cls, sample_index: NDArray[Any], label: NDArray[Any], keep: NDArray[np.bool_]) -> "Trains":
        """Take the spikes where `keep` holds."""
        row = np.flatnonzero(keep)
        row = row[np.argsort(sample_index[row], kind="stable")]
        labels, unit = np.unique(label[row].astype(np.int64), return_inverse=True)
        return cls(sample_index[row].astype(np.int64), unit.astype(np.int64), labels, row)

    def counts(self) -> NDArray[np.int64]:
        return np.bincount(self.unit, minlength=len(self.labels))


@dataclass(frozen=True)
class Comparison:
    """What coincides in the span [low, high) of samples.

    Attributes
    ----------
    true, found : Trains
        Of the span; unsorted spikes are not among the found ones.
    near : two ndarrays, shape (n_coincidences,)
        Spikes of `true` and of `found` that coincide, each at most once for every pair of units.
    tp, agreement : ndarray, shape (n_units_true, n_units_found)
        Coincidences of two units, and how like each other the units are, 0 to 1.
    partner : ndarray, shape (n_units_true,)
        The found unit each true unit is matched to, an index into `found.labels`; -1 for none.
    """

    sampling_frequency: float
    low: int
    high: int
    true: Trains
    found: Trains
    near: tuple[NDArray[np.int64], NDArray[np.int64]]
    tp: NDArray[np.int64]
    agreement: NDArray[np.float64]
    partner: NDArray[np.int64]

    @property
    def of_partners(self) -> NDArray[np.bool_]:
        """Tell which coincidences are those of matched units: true positives."""
        i, j = self.near
        right: NDArray[np.bool_] = self.partner[self.true.unit[i]] == self.found.unit[j]
        return right

    @property
    def true_right(self) -> NDArray[np.bool_]:
        """Tell which true spikes were published under the id of their unit, (n_true,)."""
        return np.isin(np.arange(len(self.true.unit)), self.near[0][self.of_partners])

    @property
    def found_right(self) -> NDArray[np.bool_]:
        """Tell which published spikes coincide with one of the true unit their id is matched to, (n_found,)."""
        return np.isin(np.arange(len(self.found.unit)), self.near[1][self.of_partners])


def compare(
    spikes: NDArray[Any],
    truth: Truth,
    sampling_frequency: float,
    from_s: float | None = None,
    to_s: float | None = None,
    delta_ms: float = 0.4,
) -> Comparison:
    """Find out what coincides; see `streamsort.score.score` for the parameters and what is raised."""
    if not (sampling_frequency > 0 and delta_ms >= 0):
        expected = "expected a positive rate and 0 or more ms"
        raise StreamsortError(f"score: sampling_frequency = {sampling_frequency}, delta_ms = {delta_ms}, {expected}")
    for name, seconds in (("from_s", from_s), ("to_s", to_s)):
        if seconds is not None and not abs(seconds) < _LONGEST_S:
            raise StreamsortError(f"score: {name} = {seconds}, expected a number of seconds")
    last = max(int(spikes["sample_index"].max(initial=0)), int(truth.sample_index.max(initial=0)))
    low = 0 if from_s is None else round(from_s * sampling_frequency)
    high = last + 1 if to_s is None else round(to_s * sampling_frequency)
    true = Trains.cut(truth.sample_index, truth.unit_index, (truth.sample_index >= low) & (truth.sample_index < high))
    within = (spikes["sample_index"] >= low) & (spikes["sample_index"] < high)
    found = Trains.cut(spikes["sample_index"], spikes["unit_id"], within & (spikes["unit_id"] != UNSORTED))
    near = _coincidences(true, found, int(delta_ms * sampling_frequency / 1e3 + 1e-6))
    tp = np.zeros((len(true.labels), len(found.labels)), np.int64)
    np.add.at(tp, (true.unit[near[0]], found.unit[near[1]]), 1)
    agreement = tp / np.maximum(true.counts()[:, None] + found.counts()[None] - tp, 1)
    return Comparison(sampling_frequency, low, high, true, found, near, tp, agreement, _partners(agreement))


def _partners(agreement: NDArray[np.float64]) -> NDArray[np.int64]:
    """Assign found units to true ones for the largest total agreement."""
    partner = np.full(len(agreement), -1, np.int64)
    u, f = linear_sum_assignment(-np.where(agreement < MIN_AGREEMENT, 0.0, agreement))
    partner[u] = np.where(agreement[u, f] < MIN_AGREEMENT, -1, f)
    return partner


def _coincidences(true: Trains, found: Trains, delta_samples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """List the coincidences (index into `true`, index into `found`), each spike at most once for every pair of units.

    Within a pair, true spikes take, in order of time, the first found spike still free. All pairs are done at once: whoever is the
    first choice of the other is matched, the two are taken out, and so on; the result is that of going through them in order.
    SpikeInterface can count a found spike twice when true spikes of one unit are less than 2 delta apart; here it never is.
    """
    first = np.searchsorted(found.sample_index, true.sample_index - delta_samples, side="left")
    n_near = np.searchsorted(found.sample_index, true.sample_index + delta_samples, side="right") - first
    i = np.repeat(np.arange(len(first)), n_near)
    j = np.arange(len(i)) - np.repeat(np.cumsum(n_near) - n_near - first, n_near)
    matched_i, matched_j = [i[:0]], [j[:0]]
    while len(i):
        _, first_of_i, of_i = np.unique(i * len(found.labels) + found.unit[j], return_index=True, return_inverse=True)
        _, first_of_j, of_j = np.unique(j * len(true.labels) + true.unit[i], return_index=True, return_inverse=True)
        edge = np.arange(len(i))
        mutual = (first_of_i[of_i] == edge) & (first_of_j[of_j] == edge)
        matched_i.append(i[mutual])
        matched_j.append(j[mutual])
        i_taken, j_taken = np.zeros(len(first_of_i), bool), np.zeros(len(first_of_j), bool)
        i_taken[of_i[mutual]] = True
        j_taken[of_j[mutual]] = True
        left = ~(i_taken[of_i] | j_taken[of_j])
        i, j = i[left], j[left]
    return np.concatenate(matched_i), np.concatenate(matched_j)
