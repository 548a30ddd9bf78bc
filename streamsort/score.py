"""Agreement of published spikes with the truth.

Spikes and a truth come in; a `Score` goes out, by the definition of SpikeInterface's `compare_sorter_to_ground_truth`: spikes of a
true and a found unit coincide within +- `delta_ms`, each spike at most once; the agreement of two units is
tp / (n_true + n_found - tp); true units get at most one found unit each, by the assignment of largest total agreement, and none
below 0.5. A true unit without one scores 0. Units are matched once over the whole span, so an identity that changes half-way costs
accuracy; `id_stability` says how often it did.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from streamsort.errors import StreamsortError
from streamsort.records import UNSORTED
from streamsort.simulate import Truth

MIN_AGREEMENT = 0.5  # below, a true unit counts as not found
STABILITY_WINDOW_S = 10.0
_LONGEST_S = 1e9


@dataclass(frozen=True)
class UnitScore:
    """How well one true unit was found; `unit_id` is -1 and the shares are 0 when it was not.

    `id_stability` looks at the 10-s windows in which one id carries at least half of the unit's spikes: the share of them in which
    it is the same id as in most; None when there is no such window.
    """

    unit_true: int
    unit_id: int
    n_true: int
    n_found: int
    tp: int
    accuracy: float
    precision: float
    recall: float
    id_stability: float | None


@dataclass(frozen=True)
class Score:
    """The scores of all true units that fire in the span, in order of `unit_true`."""

    units: tuple[UnitScore, ...]
    n_units_found: int

    @property
    def n_units_true(self) -> int:
        return len(self.units)

    @property
    def accuracy_mean(self) -> float:
        """Mean over all true units; one that was not found counts 0."""
        return _mean([unit.accuracy for unit in self.units])

    @property
    def accuracy_median(self) -> float:
        """Median over all true units."""
        return float(np.median([unit.accuracy for unit in self.units])) if self.units else 0.0

    @property
    def precision_mean(self) -> float:
        """Mean over the true units that were found."""
        return _mean([unit.precision for unit in self.units if unit.tp])

    @property
    def recall_mean(self) -> float:
        """Mean over all true units; one that was not found counts 0."""
        return _mean([unit.recall for unit in self.units])

    @property
    def id_stability_mean(self) -> float:
        """Mean over the true units that carried an id in any window."""
        return _mean([unit.id_stability for unit in self.units if unit.id_stability is not None])

    def to_dict(self) -> dict[str, Any]:
        """Turn into what JSON takes."""
        names = (
            "accuracy_mean",
            "accuracy_median",
            "precision_mean",
            "recall_mean",
            "id_stability_mean",
            "n_units_true",
            "n_units_found",
        )
        return {**{name: getattr(self, name) for name in names}, "units": [asdict(unit) for unit in self.units]}


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def score(
    spikes: NDArray[Any],
    truth: Truth,
    sampling_frequency: float,
    from_s: float | None = None,
    to_s: float | None = None,
    delta_ms: float = 0.4,
) -> Score:
    """Compare published spikes with the truth.

    Parameters
    ----------
    spikes : ndarray, shape (n_spikes,), with the fields `sample_index` and `unit_id`
        In any order; those with `unit_id` -1 do not count.
    truth : Truth
        As from `load_truth` or `streamsort.simulate.truth`.
    from_s, to_s : float, optional
        Only what lies in [from_s, to_s) counts, of both.
    delta_ms : float
        Two spikes up to this apart, inclusive, coincide.

    Returns
    -------
    result : Score

    Examples
    --------
    >>> found = np.array([(100, 7), (205, 7), (900, -1)], [("sample_index", "<i8"), ("unit_id", "<i4")])
    >>> result = score(found, Truth(np.array([100, 200, 900]), np.array([0, 0, 0])), sampling_frequency=30000.0)
    >>> round(result.accuracy_mean, 3), result.units[0].unit_id, result.precision_mean
    (0.667, 7, 1.0)
    """
    if not (sampling_frequency > 0 and delta_ms >= 0):
        expected = "expected a positive rate and 0 or more ms"
        raise StreamsortError(f"score: sampling_frequency = {sampling_frequency}, delta_ms = {delta_ms}, {expected}")
    for name, seconds in (("from_s", from_s), ("to_s", to_s)):
        if seconds is not None and not abs(seconds) < _LONGEST_S:
            raise StreamsortError(f"score: {name} = {seconds}, expected a number of seconds")
    low = 0 if from_s is None else round(from_s * sampling_frequency)
    high = np.iinfo(np.int64).max if to_s is None else round(to_s * sampling_frequency)
    true = _Trains.cut(truth.sample_index, truth.unit_index, low, high)
    sorted_spikes = spikes[spikes["unit_id"] != UNSORTED]
    found = _Trains.cut(sorted_spikes["sample_index"], sorted_spikes["unit_id"], low, high)
    delta_samples = int(delta_ms * sampling_frequency / 1e3 + 1e-6)
    matches = _matches(true, found, delta_samples)
    windows = ((true.sample_index - low) // (STABILITY_WINDOW_S * sampling_frequency)).astype(np.int64)
    return Score(tuple(_unit_scores(true, found, matches, windows)), len(found.labels))


@dataclass(frozen=True)
class _Trains:
    """Spikes in order of time: where, and whose as an index into `labels`."""

    sample_index: NDArray[np.int64]
    unit: NDArray[np.int64]
    labels: NDArray[np.int64]

    @classmethod
    def cut(cls, sample_index: NDArray[Any], label: NDArray[Any], low: int, high: int) -> "_Trains":
        keep = (sample_index >= low) & (sample_index < high)
        order = np.argsort(sample_index[keep], kind="stable")
        labels, unit = np.unique(label[keep][order].astype(np.int64), return_inverse=True)
        return cls(sample_index[keep][order].astype(np.int64), unit.astype(np.int64), labels)

    def counts(self) -> NDArray[np.int64]:
        return np.bincount(self.unit, minlength=len(self.labels))


def _matches(true: _Trains, found: _Trains, delta_samples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """List the coincidences (row of `true`, row of `found`), each spike at most once for every pair of units.

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


def _unit_scores(
    true: _Trains, found: _Trains, matches: tuple[NDArray[np.int64], NDArray[np.int64]], windows: NDArray[np.int64]
) -> list[UnitScore]:
    n_true, n_found = true.counts(), found.counts()
    i, j = matches
    tp = np.zeros((len(n_true), len(n_found)), np.int64)
    np.add.at(tp, (true.unit[i], found.unit[j]), 1)
    agreement = tp / np.maximum(n_true[:, None] + n_found[None] - tp, 1)
    partner = dict(zip(*linear_sum_assignment(-np.where(agreement < MIN_AGREEMENT, 0.0, agreement)), strict=True))
    stability = _id_stability(true, windows, i, found.unit[j])
    units = []
    for u, label in enumerate(true.labels):
        f = partner.get(u)
        if f is None or agreement[u, f] < MIN_AGREEMENT:
            units.append(UnitScore(int(label), UNSORTED, int(n_true[u]), 0, 0, 0.0, 0.0, 0.0, stability[u]))
            continue
        hits = int(tp[u, f])
        shares = float(agreement[u, f]), hits / int(n_found[f]), hits / int(n_true[u])
        units.append(UnitScore(int(label), int(found.labels[f]), int(n_true[u]), int(n_found[f]), hits, *shares, stability[u]))
    return units


def _id_stability(
    true: _Trains, windows: NDArray[np.int64], i: NDArray[np.int64], found_unit: NDArray[np.int64]
) -> list[float | None]:
    """Share of each true unit's windows whose id is that of most of its windows."""
    n_windows, n_labels = int(windows.max(initial=0)) + 1, int(found_unit.max(initial=0)) + 1
    cell = true.unit * n_windows + windows  # one of a unit's windows
    code, n_carried = np.unique(cell[i] * n_labels + found_unit, return_counts=True)
    carried_half = 2 * n_carried >= np.bincount(cell)[code // n_labels]
    code, n_carried = code[carried_half], n_carried[carried_half]
    by_share = code[np.lexsort((code, -n_carried, code // n_labels))]
    _, largest = np.unique(by_share // n_labels, return_index=True)
    carrier = by_share[largest]
    stability: list[float | None] = []
    for unit in range(len(true.labels)):
        ids = carrier[carrier // n_labels // n_windows == unit] % n_labels
        stability.append(float(np.bincount(ids).max() / len(ids)) if len(ids) else None)
    return stability


def load_truth(path: str | Path) -> Truth:
    """Read the spikes of a recording whose truth is known.

    Parameters
    ----------
    path : path
        A SpikeInterface numpy folder (spikes.npy), a folder with one in `truth/`, or an .npz with `samples` and `labels` or with
        `spike_indexes_seg0` and `spike_labels_seg0` (SpikeInterface's NpzSorting).

    Returns
    -------
    truth : Truth
        In order of `sample_index`.

    Raises
    ------
    StreamsortError
        If there is nothing of the kind, or if it has more than one segment.
    """
    path = Path(path)
    folder = path / "truth" if (path / "truth").is_dir() else path
    try:
        samples, labels = _read_npz(path) if path.suffix == ".npz" else _read_folder(folder)
    except FileNotFoundError as error:
        raise StreamsortError(f"truth {path}: no such file ({error.filename})") from None
    except (OSError, ValueError, KeyError, IndexError) as error:
        kinds = "a SpikeInterface sorting folder or an .npz with samples and labels"
        raise StreamsortError(f"truth {path}: {error}; expected {kinds}") from None
    order = np.argsort(samples, kind="stable")
    return Truth(samples[order].astype(np.int64), labels[order].astype(np.int32))


def _read_folder(folder: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    n_segments = json.loads((folder / "numpysorting_info.json").read_text())["num_segments"]
    if n_segments != 1:
        raise ValueError(f"{n_segments} segments, expected 1")
    spikes = np.load(folder / "spikes.npy")
    return spikes["sample_index"], spikes["unit_index"]


def _read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    with np.load(path) as file:
        if "samples" in file:
            return file["samples"], file["labels"]
        if int(file["num_segment"][0]) != 1:
            raise ValueError(f"{int(file['num_segment'][0])} segments, expected 1")
        unit_ids = file["unit_ids"]
        order = np.argsort(unit_ids)
        labels = file["spike_labels_seg0"]
        return file["spike_indexes_seg0"], order[np.searchsorted(unit_ids, labels, sorter=order)]
