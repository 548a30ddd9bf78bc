"""Agreement with the truth: against answers that can be seen, and against a matcher written from the definition."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamsort.compare import compare
from streamsort.errors import StreamsortError
from streamsort.records import SPIKE_DTYPE
from streamsort.score import accuracy_in_windows, load_truth, overlapping_pairs, score
from streamsort.simulate import SimulationConfig, Truth, truth, write_recording
from streamsort.trust import Bin, calibration, separation

pytestmark = pytest.mark.timeout(20)
RATE = 10000.0  # delta of 0.4 ms: 4 samples


def make_spikes(samples: Any, unit_ids: Any) -> NDArray[Any]:
    spikes = np.zeros(len(samples), SPIKE_DTYPE)
    spikes["sample_index"], spikes["unit_id"] = samples, unit_ids
    return spikes


def make_truth(samples: Any, units: Any) -> Truth:
    return Truth(np.array(samples, np.int64), np.array(units, np.int32))


def naive_tp(true: list[int], found: list[int], delta: int) -> int:
    """Count one pair's coincidences: each true spike, in order, takes the first found one that is near and free."""
    free, tp = sorted(found), 0
    for sample in sorted(true):
        near = [f for f in free if abs(f - sample) <= delta]
        if near:
            free.remove(near[0])
            tp += 1
    return tp


def naive_best_agreement(true: dict[int, list[int]], found: dict[int, list[int]], delta: int) -> float:
    """Try every assignment of found to true units; agreements below one half are worth nothing."""

    def agreement(u: int, f: int) -> float:
        tp = naive_tp(true[u], found[f], delta)
        share = tp / (len(true[u]) + len(found[f]) - tp)
        return share if share >= 0.5 else 0.0

    slots = [*found, *[None] * len(true)]
    return max(
        sum(agreement(u, f) for u, f in zip(true, order, strict=True) if f is not None)
        for order in set(itertools.permutations(slots, len(true)))
    )


train = st.lists(st.integers(0, 60), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    true=st.dictionaries(st.integers(0, 5), train, min_size=1, max_size=3),
    found=st.dictionaries(st.integers(1, 9), train, max_size=3),
)
def test_equals_the_naive_matcher(true: dict[int, list[int]], found: dict[int, list[int]]) -> None:
    pairs = [(s, u) for u, samples in true.items() for s in samples]
    spikes = [(s, f) for f, samples in found.items() for s in samples]
    result = score(
        make_spikes(*(zip(*spikes, strict=True) if spikes else ([], []))), make_truth(*zip(*sorted(pairs), strict=True)), RATE
    )
    assert [unit.unit_true for unit in result.units] == sorted(true)
    for unit in result.units:
        if unit.unit_id != -1:
            tp = naive_tp(true[unit.unit_true], found[unit.unit_id], 4)
            assert (unit.tp, unit.n_found) == (tp, len(found[unit.unit_id]))
            assert unit.accuracy == tp / (unit.n_true + unit.n_found - tp) >= 0.5
            assert unit.precision == tp / unit.n_found and unit.recall == tp / unit.n_true
    total = sum(unit.accuracy for unit in result.units)
    assert total == pytest.approx(naive_best_agreement(true, found, 4), abs=1e-12)
    used = [unit.unit_id for unit in result.units if unit.unit_id != -1]
    assert len(used) == len(set(used))


def test_truth_against_itself_is_perfect() -> None:
    known = truth(SimulationConfig(seconds=30, n_units=6, seed=3))
    result = score(make_spikes(known.sample_index, known.unit_index + 1), known, 30000.0)
    assert result.accuracy_mean == result.accuracy_median == result.precision_mean == result.recall_mean == 1.0
    assert result.id_stability_mean == 1.0 and result.n_units_true == result.n_units_found == 6
    assert [unit.unit_id for unit in result.units] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("late", "tp"), [(4, 1), (5, 0), (-4, 1), (-5, 0)])
def test_window_is_inclusive(late: int, tp: int) -> None:
    assert score(make_spikes([100 + late], [1]), make_truth([100], [0]), RATE).units[0].tp == tp


def test_delta_is_cut_to_whole_samples_as_spikeinterface_does() -> None:
    at_9, at_10 = (score(make_spikes([100 + k], [1]), make_truth([100], [0]), 24414.0625).units[0].tp for k in (9, 10))
    assert (at_9, at_10) == (1, 0)  # 0.4 ms are 9.77 samples


def test_one_found_spike_counts_once() -> None:
    unit = score(make_spikes([101], [1]), make_truth([100, 102], [0, 0]), RATE).units[0]
    assert (unit.tp, unit.accuracy, unit.precision, unit.recall) == (1, 0.5, 1.0, 0.5)


def test_unsorted_spikes_do_not_count() -> None:
    known = make_truth([100, 200], [0, 0])
    with_unsorted = score(make_spikes([100, 100, 200, 300], [1, -1, 1, -1]), known, RATE)
    assert with_unsorted.accuracy_mean == 1.0 and with_unsorted.n_units_found == 1


def test_agreement_below_one_half_is_not_found() -> None:
    result = score(make_spikes([100], [1]), make_truth([100, 200, 300], [0, 0, 0]), RATE)
    assert result.units[0].unit_id == -1 and result.accuracy_mean == result.precision_mean == result.recall_mean == 0.0
    assert result.n_units_found == 1


def test_precision_is_of_found_units_and_recall_of_all() -> None:
    known = make_truth([100, 200, 300, 400], [0, 0, 1, 1])
    result = score(make_spikes([100, 200, 250], [5, 5, 5]), known, RATE)
    assert result.precision_mean == pytest.approx(2 / 3) and result.recall_mean == 0.5
    assert result.accuracy_mean == pytest.approx(1 / 3)


def test_span_is_half_open_and_cuts_both() -> None:
    known = make_truth([9999, 10000, 19999, 20000], [0, 1, 1, 2])
    spikes = make_spikes([9999, 10000, 19999, 20000], [4, 5, 5, 6])
    result = score(spikes, known, RATE, from_s=1.0, to_s=2.0)
    assert [(unit.unit_true, unit.unit_id, unit.n_true) for unit in result.units] == [(1, 5, 2)]
    assert result.n_units_found == 1


def test_order_of_spikes_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    known = truth(SimulationConfig(seconds=20, n_units=5, seed=1))
    spikes = make_spikes(known.sample_index + rng.integers(-20, 21, len(known.sample_index)), rng.permutation(known.unit_index) + 1)
    spikes["unit_id"][::2] = known.unit_index[::2] + 1
    assert score(spikes, known, 30000.0) == score(rng.permutation(spikes), known, 30000.0)


def test_id_stability_falls_when_an_identity_swaps() -> None:
    samples = np.arange(0, 40 * 10000, 1000)  # 40 s, 10 spikes a second
    ids = np.where(samples < 30 * 10000, 1, 2)
    unit = score(make_spikes(samples, ids), make_truth(samples, np.zeros(len(samples))), RATE).units[0]
    assert unit.id_stability == 0.75 and unit.accuracy == 0.75


def test_id_stability_ignores_windows_in_which_the_unit_was_lost() -> None:
    samples = np.arange(0, 40 * 10000, 1000)
    ids = np.where(samples < 20 * 10000, 1, -1)
    ids[250] = 9  # a chance coincidence is no identity
    unit = score(make_spikes(samples, ids), make_truth(samples, np.zeros(len(samples))), RATE).units[0]
    assert unit.id_stability == 1.0


@pytest.mark.parametrize(
    ("hits", "misses", "false", "redundant"),
    [
        (1, 9, 1, 0),  # agreement 1 / 19 with the unit
        (2, 0, 0, 1),  # 0.2; the other one has 0.8
        (9, 0, 0, 1),  # 0.9 is the one that is matched, and the other one, with 0.8, is left over
        (0, 3, 1, 0),
    ],
)
def test_false_and_redundant_units(hits: int, misses: int, false: int, redundant: int) -> None:
    samples = 1000 * np.arange(1, 11)
    extra = [*samples[:hits], *(500 + samples[:misses])]
    spikes = make_spikes([*samples[:8], *extra], [1] * 8 + [2] * len(extra))
    result = score(spikes, make_truth(samples, [0] * 10), RATE)
    assert (result.n_units_false, result.n_units_redundant) == (false, redundant)


def test_best_but_bad_is_neither_false_nor_redundant() -> None:
    result = score(make_spikes([1000, 2000], [1, 1]), make_truth(1000 * np.arange(1, 6), [0] * 5), RATE)
    assert (result.n_units_found, result.n_units_false, result.n_units_redundant) == (1, 0, 0)  # agreement 0.4


def forty_seconds(ids: Any) -> Any:
    """Score one unit that fires ten times a second for 40 s; `ids` are those of its spikes."""
    samples = np.arange(0, 40 * 10000, 1000)
    return score(make_spikes(samples, ids), make_truth(samples, np.zeros(len(samples))), RATE, 0.0, 40.0).units[0]


@pytest.mark.parametrize(
    ("late", "purity"),
    [([7] * 40, 1.0), ([7] * 30 + [8] * 10, 0.75), ([8] * 40, 0.0), ([-1] * 20 + [7] * 20, 1.0), ([-1] * 40, None)],
)
def test_id_purity_compares_the_last_tenth_with_the_first(late: list[int], purity: float | None) -> None:
    assert forty_seconds([8] * 10 + [7] * 30 + [9] * 320 + late).id_purity == purity


@pytest.mark.parametrize(
    ("changes", "switches"),
    [
        ({}, 0),
        ({50: 2}, 0),  # a single one
        ({k: 2 for k in range(105, 115)}, 0),  # half a window
        ({k: 2 for k in range(100, 111)}, 2),  # most of one, there and back
        ({k: 2 for k in range(200, 400)}, 1),  # for good
        ({k: -1 for k in range(100, 300)}, 0),  # lost and found again
        ({**{k: -1 for k in range(100, 300)}, **{k: 2 for k in range(300, 400)}}, 1),
        ({**{k: -1 for k in range(100, 200)}, 150: 2, 151: 2}, 0),  # two spikes hold no window
    ],
)
def test_id_switches_are_changes_of_who_holds_a_window(changes: dict[int, int], switches: int) -> None:
    assert forty_seconds([changes.get(k, 1) for k in range(400)]).id_switches == switches


def test_windows_of_a_slow_unit_are_longer() -> None:
    samples = np.arange(0, 200 * 10000, 10000)  # 1 Hz: windows of 10 s
    ids = [2 if 40 <= k < 44 else 1 for k in range(200)]
    unit = score(make_spikes(samples, ids), make_truth(samples, np.zeros(200)), RATE, 0.0, 200.0).units[0]
    assert unit.id_switches == 0


def test_two_ids_on_every_spike_are_no_switch() -> None:
    samples = np.arange(0, 40 * 10000, 1000)
    missing = np.arange(100, 110)  # id 1 is on fewer spikes of a window than id 2, but still on half of them
    spikes = np.concatenate([make_spikes(np.delete(samples, missing[1:]), [1] * 391), make_spikes(samples, [2] * 400)])
    assert score(spikes, make_truth(samples, np.zeros(400)), RATE, 0.0, 40.0).units[0].id_switches == 0


def test_a_neighbour_that_is_right_lends_no_id() -> None:
    samples = np.arange(0, 40 * 10000, 1000)
    busy = np.arange(0, 40 * 10000, 500)  # the second unit fires with every spike of the first, and between them
    units = np.repeat([0, 1], [len(samples), len(busy)])
    order = np.argsort(np.concatenate([samples, busy]), kind="stable")
    known = make_truth(np.concatenate([samples, busy])[order], units[order])
    spikes = np.concatenate([make_spikes(samples[:300], [1] * 300), make_spikes(busy, [2] * len(busy))])  # lost for 10 s
    lost = score(spikes, known, RATE, 0.0, 40.0).units[0]
    assert (lost.unit_id, lost.id_purity, lost.id_switches) == (1, None, 0)


def test_accuracy_in_windows_adds_up() -> None:
    samples = np.arange(0, 25 * 10000, 1000)  # the last window, of 5 s, is long enough
    ids = np.where((samples >= 10 * 10000) & (samples < 15 * 10000), 2, 1)
    spikes = np.concatenate([make_spikes(samples, ids), make_spikes([205500], [1])])
    compared = compare(spikes, make_truth(samples, np.zeros(len(samples))), RATE, 0.0, 25.0)
    np.testing.assert_allclose(accuracy_in_windows(compared), [1.0, 0.5, 50 / 51])
    short = compare(spikes, make_truth(samples[:100], np.zeros(100)), RATE, 0.0, 24.9)
    np.testing.assert_array_equal(accuracy_in_windows(short), [1.0, np.nan])


def test_overlapping_pairs_are_near_in_time_and_space() -> None:
    known = make_truth([1000, 1005, 2000, 2006, 3000, 3005, 4000, 4005], [0, 1, 0, 1, 0, 2, 0, 0])
    places = np.array([[0.0, 0.0], [60.0, 80.0], [0.0, 101.0]])
    compared = compare(make_spikes([1000, 1005, 2000, 3000, 4000, 4005], [5, 6, 5, 5, 5, 5]), known, RATE)
    units, both = overlapping_pairs(compared, places, within_ms=0.5)
    assert units.tolist() == [[0, 1]] and both.tolist() == [True]
    units, both = overlapping_pairs(compared, places, within_ms=1.0, within_um=101.0)
    assert units.tolist() == [[0, 1], [0, 1], [0, 2]] and both.tolist() == [True, False, False]
    places[1] = np.nan
    assert len(overlapping_pairs(compared, places, within_ms=0.5)[0]) == 0


def test_calibration_bins_and_error() -> None:
    spikes = make_spikes([100, 200, 300, 400, 500, 600], [1, 1, 1, 1, -1, 2])
    spikes["confidence"] = [0.92, 0.98, 1.0, 0.55, 0.3, 0.1]  # the unsorted one does not count, unit 2 is nobody
    compared = compare(spikes, make_truth([100, 200, 310, 400, 500], [0] * 5), RATE)
    result = calibration(compared, spikes["confidence"])
    assert [(b.low, b.high, b.n_spikes) for b in result.bins] == [(0.1, 0.2, 1), (0.5, 0.6, 1), (0.9, 1.0, 3)]
    np.testing.assert_allclose([b.right for b in result.bins], [0.0, 1.0, 2 / 3])
    np.testing.assert_allclose([b.confidence for b in result.bins], [0.1, 0.55, 2.9 / 3], rtol=1e-6)
    assert result.error == pytest.approx((0.1 + 0.45 + 3 * abs(2.9 - 2) / 3) / 5)
    assert calibration(compare(spikes[4:5], make_truth([1], [0]), RATE), np.ones(1)).error is None


def test_confidence_is_taken_from_the_right_spike_in_any_order() -> None:
    spikes = make_spikes([400, 100, 200], [1, 1, 1])
    spikes["confidence"] = [0.05, 1.0, 1.0]
    compared = compare(spikes, make_truth([100, 200], [0, 0]), RATE)
    assert calibration(compared, spikes["confidence"]).bins[0] == Bin(0.0, 0.1, 1, pytest.approx(0.05), 0.0)


def test_separation_is_the_area_under_the_curve() -> None:
    good = np.array([True, True, True, False])
    assert [separation(marked, good) for marked in (good, ~good, np.ones(4, bool))] == [1.0, 0.0, 0.5]
    assert separation(good, np.ones(4, bool)) is None and separation(good, np.zeros(4, bool)) is None


def test_nothing_found_and_nothing_to_find() -> None:
    assert score(make_spikes([], []), make_truth([5], [0]), RATE).to_dict()["accuracy_mean"] == 0.0
    empty = score(make_spikes([5], [1]), make_truth([], []), RATE)
    assert (empty.n_units_true, empty.n_units_found, empty.accuracy_median) == (0, 1, 0.0)


def test_to_dict_is_json() -> None:
    table = score(make_spikes([100], [1]), make_truth([100, 900], [0, 1]), RATE).to_dict()
    assert json.loads(json.dumps(table)) == table
    names = {
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
    }
    assert set(table) == names | {"units"}
    assert {"unit_true", "unit_id", "n_true", "n_found", "tp", "accuracy", "precision", "recall"} <= set(table["units"][0])


def test_bad_rate_is_refused() -> None:
    with pytest.raises(StreamsortError, match="sampling_frequency = 0"):
        score(make_spikes([1], [1]), make_truth([1], [0]), 0.0)


def test_load_truth_reads_every_kind(tmp_path: Path) -> None:
    config = SimulationConfig(seconds=3, probe_name="single", n_units=3)
    known = truth(config)
    write_recording(config, tmp_path / "sim")
    np.savez(tmp_path / "plain.npz", samples=known.sample_index[::-1], labels=known.unit_index[::-1])
    names = np.array(["b", "c", "a"])
    labels: dict[str, Any] = dict(spike_indexes_seg0=known.sample_index, spike_labels_seg0=names[known.unit_index])
    np.savez(tmp_path / "si.npz", unit_ids=names, num_segment=[1], sampling_frequency=[30000.0], **labels)
    for path in ("sim", "sim/truth", "plain.npz", "si.npz"):
        loaded = load_truth(tmp_path / path)
        np.testing.assert_array_equal(loaded.sample_index, known.sample_index)
        np.testing.assert_array_equal(loaded.unit_index, known.unit_index)


def test_load_truth_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "numpysorting_info.json").write_text('{"num_segments": 2}')
    np.savez(tmp_path / "other.npz", x=[1])
    (tmp_path / "text.npz").write_text("text")
    messages = {
        "none": "no such file",
        "two": "2 segments",
        "other.npz": "expected a SpikeInterface",
        "text.npz": "expected a SpikeInt",
    }
    for name, says in messages.items():
        with pytest.raises(StreamsortError, match=says) as caught:
            load_truth(tmp_path / name)
        assert "\n" not in str(caught.value)
