"""Agreement of published spikes with the truth.

Spikes and a truth come in; a `Score` goes out, read off a `Comparison`, by SpikeInterface's definitions: accuracy, precision and
recall of a true unit are those of the one found unit it is matched to, and 0 when there is none. A found unit matched to none is
false when its agreement with every true unit is below 0.2. It is redundant when with some unit it is 0.2 or more, and another found
unit agrees better with that one; what is left (the best there is for a unit that counts as not found) is neither. Units are matched
once over the whole span, so an identity that changes half-way costs accuracy; `streamsort.identity` says how often it did.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.compare import Comparison, compare
from streamsort.errors import StreamsortError
from streamsort.identity import Identity, identities
from streamsort.records import UNSORTED
from streamsort.simulate import Truth

REDUNDANT_AGREEMENT = 0.2  # SpikeInterface's redundant_score


@dataclass(frozen=True)
class UnitScore:
    """How well one true unit was found; `unit_id` is -1 and the shares are 0 when it was not.

    `id_stability` looks at the 10-s windows in which one id carries at least half of the unit's spikes: the share of them in which
    it is the same id as in most. `id_purity` looks at the spikes published under any id in the last tenth of the span: the share
    with the id that most have in the first tenth. Both are None where there is nothing to look at. `id_switches` counts how often
    the id of most of the spikes changes between consecutive windows of 2 s, or as long as the unit takes for 10 spikes;
    `streamsort.identity` has the details.
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
    id_purity: float | None
    id_switches: int


@dataclass(frozen=True)
class Score:
    """The scores of all true units that fire in the span, in order of `unit_true`, and what was found beyond them."""

    units: tuple[UnitScore, ...]
    n_units_found: int
    n_units_false: int = 0
    n_units_redundant: int = 0

    @classmethod
    def of(cls, comparison: Comparison) -> "Score":
        """Read the scores off a comparison."""
        units = [_unit_score(comparison, u, identity) for u, identity in enumerate(identities(comparison))]
        return cls(tuple(units), len(comparison.found.labels), *_surplus(comparison))

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

    @property
    def id_purity_mean(self) -> float:
        """Mean over the true units that carried an id in the first and in the last tenth."""
        return _mean([unit.id_purity for unit in self.units if unit.id_purity is not None])

    @property
    def id_switches(self) -> int:
        """Sum over all true units."""
        return sum(unit.id_switches for unit in self.units)

    def to_dict(self) -> dict[str, Any]:
        """Turn into what JSON takes."""
        names = (
            "accuracy_mean",
            "accuracy_median",
            "precision_mean",
            "recall_mean",
            "id_stability_mean",
            "id_purity_mean",
            "id_switches",
            "n_units_true",
            "n_units_found",
            "n_units_false",
            "n_units_redundant",
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

    Raises
    ------
    StreamsortError
        If the rate is not positive, `delta_ms` is negative, or an end of the span is no number of seconds.

    Examples
    --------
    >>> found = np.array([(100, 7), (205, 7), (900, -1)], [("sample_index", "<i8"), ("unit_id", "<i4")])
    >>> result = score(found, Truth(np.array([100, 200, 900]), np.array([0, 0, 0])), sampling_frequency=30000.0)
    >>> round(result.accuracy_mean, 3), result.units[0].unit_id, result.precision_mean
    (0.667, 7, 1.0)
    """
    return Score.of(compare(spikes, truth, sampling_frequency, from_s, to_s, delta_ms))


def _unit_score(comparison: Comparison, u: int, identity: Identity) -> UnitScore:
    label, n_true, f = int(comparison.true.labels[u]), int(comparison.true.counts()[u]), int(comparison.partner[u])
    if f < 0:
        return UnitScore(label, UNSORTED, n_true, 0, 0, 0.0, 0.0, 0.0, *identity)
    n_found, tp = int(comparison.found.counts()[f]), int(comparison.tp[u, f])
    shares = float(comparison.agreement[u, f]), tp / n_found, tp / n_true
    return UnitScore(label, int(comparison.found.labels[f]), n_true, n_found, tp, *shares, *identity)


def _surplus(comparison: Comparison) -> tuple[int, int]:
    """Count the false and the redundant ones among the found units."""
    agreement, n_found = comparison.agreement, len(comparison.found.labels)
    if not len(comparison.true.labels):
        return n_found, 0
    free = np.setdiff1d(np.arange(n_found), comparison.partner)
    nearest = agreement[:, free].argmax(axis=0)
    like = agreement[nearest, free] >= REDUNDANT_AGREEMENT
    outdone = agreement.argmax(axis=1)[nearest] != free if n_found else like
    return int((~like).sum()), int((like & outdone).sum())


def accuracy_in_windows(comparison: Comparison, window_s: float = 10.0) -> NDArray[np.float64]:
    """Split accuracy over time, with units matched as they are over the whole span: an id that changed does not count.

    Parameters
    ----------
    comparison : Comparison
    window_s : float
        Length of a window; the first begins with the span, and one that the span cuts to less than half is left out.

    Returns
    -------
    accuracy : ndarray, shape (n_windows,)
        Mean over the true units that fire in a window; NaN where none does.
    """
    length = window_s * comparison.sampling_frequency
    n_windows = int((comparison.high - comparison.low) / length + 0.5)
    true, found, right = comparison.true, comparison.found, comparison.true_right
    owner = np.full(len(found.labels) + 1, -1)  # the last row takes those that are matched to none
    owner[comparison.partner] = np.arange(len(comparison.partner))
    owner[-1] = -1
    wrong = ~comparison.found_right & (owner[found.unit] >= 0)

    def count(samples: NDArray[np.int64], unit: NDArray[np.int64]) -> NDArray[np.float64]:
        table = np.zeros((len(true.labels), n_windows + 1))
        place = np.minimum((samples - comparison.low) // length, n_windows).astype(np.int64)
        np.add.at(table, (unit, place), 1)
        return table[:, :n_windows]

    fired = count(true.sample_index, true.unit)
    both = fired + count(found.sample_index[wrong], owner[found.unit[wrong]])
    accuracy = np.divide(count(true.sample_index[right], true.unit[right]), both, out=np.zeros_like(both), where=both > 0)
    n_firing = (fired > 0).sum(axis=0)
    mean = np.full(n_windows, np.nan)
    np.divide((accuracy * (fired > 0)).sum(axis=0), n_firing, out=mean, where=n_firing > 0)
    return mean


def overlapping_pairs(
    comparison: Comparison, places_um: NDArray[np.float64], within_ms: float, within_um: float = 100.0
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """List the pairs of true spikes of different units that overlap in time and on the probe.

    Parameters
    ----------
    comparison : Comparison
    places_um : ndarray, shape (n, 2)
        Where each true unit is largest, by its label; NaN where that is not known.
    within_ms, within_um : float
        How near in time and in space, inclusive, the two must be.

    Returns
    -------
    units : ndarray, shape (n_pairs, 2)
        Labels of the two.
    both : ndarray, shape (n_pairs,), bool
        Whether each was published under the id of its unit.
    """
    true, reach = comparison.true, within_ms * comparison.sampling_frequency / 1e3
    n_after = np.searchsorted(true.sample_index, true.sample_index + reach, side="right") - np.arange(len(true.unit)) - 1
    first = np.repeat(np.arange(len(n_after)), n_after)
    second = first + 1 + np.arange(len(first)) - np.repeat(np.cumsum(n_after) - n_after, n_after)
    units = true.labels[np.column_stack([true.unit[first], true.unit[second]])]
    steps = places_um[units[:, 0]] - places_um[units[:, 1]]
    overlap = (units[:, 0] != units[:, 1]) & (np.hypot(*steps.T) <= within_um)
    right = comparison.true_right
    return units[overlap], right[first[overlap]] & right[second[overlap]]


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
