"""Peaks are explained by the spikes that are matched; what nothing explains stays unsorted."""

import pickle
from collections.abc import Iterable
from typing import Any

import checks
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scenes import N_BEFORE, RATE, SPANS, Cell, Event, add_spikes, maker, mean_snippets

from streamsort.assign import Assign, Explained, Known, explain
from streamsort.bank import Bank
from streamsort.config import SorterConfig
from streamsort.match import MATCH_DTYPE
from streamsort.probe import Probe
from streamsort.records import PEAK_DTYPE, SPIKE_DTYPE, UNSORTED, Flag, PeakBatch

Floats = NDArray[np.float32]

CONFIG = SorterConfig()
PROBE = Probe.linear(14, 20.0)
CELLS = [Cell(12.0, 32.0, 15.0), Cell(11.0, 82.0, 18.0, width=4.0)]
UNIT_IDS = [7, 3]
NOISE_UV = np.linspace(5, 12, 14).astype(np.float32)
STRANGER = Cell(13.0, 250.0, 12.0, width=1.5)
PERIOD, LENGTH = 7500, 15_000


def bank() -> Bank:
    return Bank(maker(PROBE), mean_snippets(CELLS, PROBE), np.full(2, 200), np.full(2, 10.0), RATE)


def known(units: Bank | None = None, unit_ids: Iterable[int] = UNIT_IDS) -> Known:
    units, names = units or bank(), np.array(list(unit_ids), np.int64)
    return Known(units.templates, units.threshold, names, np.zeros(len(names), np.uint16))


def assigner(published_through: int = 0) -> Assign:
    return Assign(CONFIG, PROBE, RATE, NOISE_UV, known(), published_through)


def peaks_at(*where: tuple[int, int]) -> NDArray[Any]:
    peaks = np.zeros(len(where), PEAK_DTYPE)
    for peak, (sample_index, channel) in zip(peaks, sorted(where), strict=True):
        peak["sample_index"], peak["channel"] = sample_index, channel
    return peaks


def batch_of(traces: Floats, start_sample: int, peaks: NDArray[Any], near_gap: bool = False) -> PeakBatch:
    """Make a batch of traces in noise units and of some peaks; each snippet is full of its peak's sample."""
    snippets, level = np.zeros((len(peaks), 48, 11), np.float32), np.ones((len(peaks), 11), np.float32)
    snippets[:] = peaks["sample_index"][:, None, None]
    unusable = np.full(len(traces), near_gap)
    return PeakBatch(start_sample, start_sample + len(traces), peaks, snippets, level, traces * NOISE_UV, unusable, NOISE_UV)


Result = tuple[NDArray[Any], list[Explained]]


def run(assign: Assign, traces: Floats, peaks: NDArray[Any], sizes: Iterable[int], start_sample: int = 0) -> Result:
    """Feed traces in chunks; a peak comes with the chunk that holds the last sample of its snippet, 30 later."""
    spikes = []
    for a, b in checks.pieces(start_sample, start_sample + len(traces), sizes, PERIOD):
        due = (peaks["sample_index"] + 30 >= a) & (peaks["sample_index"] + 30 < b)
        spikes.append(assign(batch_of(traces[a - start_sample : b - start_sample], a, peaks[due])))
    return named(np.concatenate(spikes)), assign.take_notes().explained


def named(spikes: NDArray[Any]) -> NDArray[Any]:
    return spikes[spikes["unit_id"] != UNSORTED]


def columns(result: Result) -> tuple[NDArray[Any], ...]:
    spikes, explained = result
    assert explained
    names = "peaks", "unit", "strange", "snippets"
    return spikes, *(np.concatenate([getattr(one, name) for one in explained]) for name in names)


def units_of(result: Result) -> dict[tuple[int, int], int]:
    _, peaks, unit, _, _ = columns(result)
    return dict(zip(zip(peaks["sample_index"].tolist(), peaks["channel"].tolist(), strict=True), unit.tolist(), strict=True))


def quiet(n_samples: int = 1500, seed: int = 0) -> Floats:
    noise: Floats = 0.3 * np.random.default_rng(seed).normal(size=(n_samples, PROBE.n_channels)).astype(np.float32)
    return noise


def with_events(traces: Floats, *events: Event) -> Floats:
    add_spikes(traces, [*CELLS, STRANGER], PROBE, events)
    return traces


# --- peaks ---------------------------------------------------------------------------------------------------------------


def test_a_peak_that_a_spike_explains_has_its_unit() -> None:
    traces = with_events(quiet(), Event(0, 300), Event(1, 700), Event(0, 1000))
    found = run(assigner(), traces, peaks_at((300, 2), (699, 4), (1001, 1)), [100])
    assert units_of(found) == {(300, 2): 7, (699, 4): 3, (1001, 1): 7}
    assert not columns(found)[3].any()


def test_a_peak_that_nothing_explains_is_unsorted_and_strange() -> None:
    traces = with_events(quiet(), Event(0, 300), Event(2, 700))
    found = run(assigner(), traces, peaks_at((300, 2), (700, 12)), [100])
    assert units_of(found) == {(300, 2): 7, (700, 12): UNSORTED}
    assert columns(found)[3].tolist() == [False, True]
    assert found[0]["unit_id"].tolist() == [7]  # unsorted ones are not among the spikes


def test_a_peak_of_chance_is_unsorted_but_not_strange() -> None:
    found = run(assigner(), quiet(), peaks_at((700, 12)), [100])
    assert units_of(found) == {(700, 12): UNSORTED} and not columns(found)[3].any()


def test_a_spike_hidden_behind_another_units_is_strange() -> None:
    """The stranger is on the same channels; what remains of it when the known spike is subtracted is a peak of its own."""
    stranger = Cell(6.0, 60.0, 12.0, width=1.3)
    traces = with_events(quiet(), Event(0, 300))
    add_spikes(traces, [stranger], PROBE, [Event(0, 304)])
    found = run(assigner(), traces, peaks_at((300, 2), (304, 3)), [100])
    assert units_of(found) == {(300, 2): 7, (304, 3): UNSORTED}


def test_what_a_large_spike_leaves_of_itself_is_not_strange() -> None:
    """No spike is quite its template; what is left of a large one is above the threshold, and a peak there is still its own."""
    template, actual = Cell(40.0, 40.0, 15.0), Cell(40.0, 40.0, 15.0, width=3.0)
    large = Bank(maker(PROBE), template.at(PROBE)[None], np.full(1, 200), np.full(1, 10.0), RATE)
    assign = Assign(CONFIG, PROBE, RATE, NOISE_UV, known(large, [5]), 0)
    traces = quiet()
    add_spikes(traces, [actual], PROBE, [Event(0, 300)])
    found = run(assign, traces, peaks_at((304, 2)), [100])
    assert abs(assign.match.residual(304, 305)[2, 0]) > CONFIG.detect.detect_threshold
    assert units_of(found) == {(304, 2): 5} and not columns(found)[3].any()


def test_a_spike_explains_no_peak_far_away_in_time_or_space() -> None:
    probe = Probe.linear(20, 20.0)
    nearby, home = probe.distances_um() <= 100.0, np.array([2, 12], np.int32)
    matches = np.zeros(3, MATCH_DTYPE)
    matches["sample_index"], matches["row"] = [500, 100, 104], [1, 0, 0]  # in the order found
    peaks = peaks_at((95, 2), (101, 3), (103, 2), (113, 7), (114, 2), (101, 8), (500, 11), (500, 2))
    found = explain(peaks, matches, home, nearby, 9)
    where = list(zip(peaks["sample_index"].tolist(), peaks["channel"].tolist(), strict=True))
    assert dict(zip(where, found.tolist(), strict=True)) == {
        (95, 2): 1,
        (101, 3): 1,
        (101, 8): -1,
        (103, 2): 2,
        (113, 7): 2,
        (114, 2): -1,
        (500, 2): -1,
        (500, 11): 0,
    }


@pytest.mark.parametrize("seed", range(5))
def test_each_peak_is_the_nearest_spike_in_time_the_earlier_of_two_the_first_of_equals(seed: int) -> None:
    rng = np.random.default_rng(seed)
    home, nearby = rng.integers(0, 6, 4).astype(np.int32), rng.random((6, 6)) < 0.6
    matches = np.zeros(60, MATCH_DTYPE)
    matches["sample_index"], matches["row"] = rng.integers(0, 300, 60), rng.integers(0, 4, 60)
    peaks = peaks_at(*zip(np.sort(rng.integers(0, 300, 80)).tolist(), rng.integers(0, 6, 80).tolist(), strict=True))
    expected = []
    for peak in peaks:
        times = matches["sample_index"].tolist()
        late = [(abs(at - int(peak["sample_index"])), at, k) for k, at in enumerate(times)]
        near = [one for one in late if one[0] <= 9 and nearby[home[matches["row"][one[2]]], peak["channel"]]]
        expected.append(min(near)[2] if near else -1)
    assert explain(peaks, matches, home, nearby, 9).tolist() == expected
    assert -1 in expected and len(set(expected)) > 20


def test_nothing_explains_without_spikes_and_nothing_is_explained_without_peaks() -> None:
    none, nearby = np.zeros(0, MATCH_DTYPE), np.ones((4, 4), bool)
    assert explain(peaks_at((5, 1)), none, np.zeros(0, np.int32), nearby, 9).tolist() == [-1]
    assert explain(peaks_at(), np.zeros(2, MATCH_DTYPE), np.zeros(1, np.int32), nearby, 9).tolist() == []


def test_units_that_ended_explain_nothing() -> None:
    assign = assigner()
    assign.use(known(unit_ids=[UNSORTED, 3]))
    found = run(assign, with_events(quiet(), Event(0, 300)), peaks_at((300, 2)), [100])
    assert units_of(found) == {(300, 2): UNSORTED}


def test_a_later_unit_explains_later_peaks() -> None:
    assign = assigner()
    traces = with_events(quiet(3000), Event(2, 700), Event(2, 2200))
    early = run(assign, traces[:1500], peaks_at((700, 12)), [100])
    more = bank()
    more.add(STRANGER.at(PROBE), 20, 5.0)
    assign.use(known(more, [*UNIT_IDS, 11]))
    late = run(assign, traces[1500:], peaks_at((2200, 12)), [100], 1500)
    assert units_of(early) == {(700, 12): UNSORTED} and units_of(late) == {(2200, 12): 11}
    assert late[0]["unit_id"].tolist() == [11]


def test_each_peak_comes_out_once_with_its_own_snippet() -> None:
    peaks = peaks_at(*[(at, 2) for at in range(200, 1200, 37)])
    spikes, decided, unit, strange, snippets = columns(run(assigner(), quiet(), peaks, [64]))
    assert decided.tobytes() == peaks.tobytes() and len(unit) == len(strange) == len(peaks)
    np.testing.assert_array_equal(snippets[:, 0, 0], peaks["sample_index"])
    assert not len(spikes)


# --- spikes --------------------------------------------------------------------------------------------------------------


def test_spikes_are_in_microvolts_on_their_units_channel() -> None:
    spikes, _ = run(assigner(), with_events(quiet(), Event(0, 300), Event(1, 700, amplitude=1.1)), peaks_at(), [100])
    assert spikes.dtype == SPIKE_DTYPE
    assert spikes["unit_id"].tolist() == [7, 3] and spikes["sample_index"].tolist() == [300, 700]
    assert spikes["channel"].tolist() == [2, 4]
    for spike, cell, size in zip(spikes, CELLS, (1.0, 1.1), strict=True):
        expected = size * cell.at(PROBE)[N_BEFORE, spike["channel"]] * NOISE_UV[spike["channel"]]
        assert spike["amplitude_uv"] == pytest.approx(expected, rel=0.05) and spike["amplitude_uv"] < 0
    assert (spikes["confidence"] > 0.99).all() and not spikes["flags"].any()


def test_overlapping_spikes_are_flagged() -> None:
    spikes, _ = run(assigner(), with_events(quiet(), Event(0, 300), Event(1, 305), Event(0, 900)), peaks_at(), [100])
    flagged = (spikes["flags"] & Flag.COLLISION) > 0
    assert len(spikes) == 3 and flagged.sum() == 1
    assert not flagged[spikes["sample_index"] == 900]


def test_spikes_near_a_gap_are_flagged() -> None:
    assign = assigner()
    traces = with_events(quiet(1600), Event(0, 300), Event(0, 810), Event(0, 1200))
    joined = np.concatenate([assign(batch_of(traces[a : a + 400], a, peaks_at(), near_gap=a == 400)) for a in range(0, 1600, 400)])
    assert joined["sample_index"].tolist() == [300, 810, 1200]
    assert (joined["flags"] & Flag.NEAR_GAP > 0).tolist() == [False, True, False]


def test_confidence_tells_sure_spikes_from_doubtful_ones() -> None:
    twins = [Cell(9.0, 40.0, 18.0), Cell(9.0, 46.0, 18.0)]
    means = mean_snippets([*twins, Cell(3.0, 200.0, 18.0, width=3.0)], PROBE)
    both = Bank(maker(PROBE), means, np.full(3, 200), np.full(3, 10.0), RATE)
    assign = Assign(CONFIG, PROBE, RATE, NOISE_UV, known(both, [0, 1, 2]), 0)
    traces = np.zeros((1500, 14), np.float32)
    between = Cell(9.0, 43.0, 18.0)
    add_spikes(traces, [between, twins[0], Cell(3.0, 200.0, 18.0, width=3.0)], PROBE, [Event(0, 300), Event(1, 600), Event(2, 900)])
    spikes = assign(batch_of(traces, 0, peaks_at()))
    confidence = dict(zip(spikes["sample_index"].tolist(), spikes["confidence"].tolist(), strict=True))
    assert confidence[300] < 0.9 < confidence[600]
    assert all(0 <= value <= 1 for value in confidence.values()) and set(confidence) == {300, 600, 900}


def test_a_dead_channel_is_silent() -> None:
    level = NOISE_UV.copy()
    level[2] = 0
    assign = Assign(CONFIG, PROBE, RATE, level, known(), 0)
    spikes, _ = run(assign, with_events(quiet(), Event(1, 700)), peaks_at(), [100])
    assert spikes["unit_id"].tolist() == [3] and np.isfinite(spikes["amplitude_uv"]).all()


def test_spikes_that_came_out_before_there_were_units_do_not_come_again() -> None:
    assign = assigner(published_through=500)
    spikes, _ = run(assign, with_events(quiet(), Event(0, 300), Event(0, 900)), peaks_at(), [100])
    assert spikes["sample_index"].tolist() == [900]


def test_running_in_finds_the_spike_that_began_before() -> None:
    """The traces are cut within a spike: without what lies before it would be lost."""
    traces = with_events(quiet(1500), Event(0, 600), Event(0, 300))
    assign = assigner()
    assign.run_in(0, traces[:605])
    assert assign(batch_of(traces[605:], 605, peaks_at()))["sample_index"].tolist() == [600]
    assert not (assigner()(batch_of(traces[605:], 605, peaks_at()))["sample_index"] == 600).any()


# --- the stage -----------------------------------------------------------------------------------------------------------


def busy() -> tuple[Floats, NDArray[Any]]:
    """Make a recording full of overlapping known and unknown spikes, with a peak for most and some besides."""
    rng = np.random.default_rng(4)
    events = [
        Event(int(rng.integers(3)), int(at), rng.uniform(-0.5, 0.5), rng.normal(1, 0.1)) for at in range(120, LENGTH - 200, 90)
    ]
    events += [Event(1, event.sample_index + int(rng.integers(4, 16))) for event in events[::3] if event.unit == 0]
    traces = rng.normal(size=(LENGTH, PROBE.n_channels)).astype(np.float32)
    home = [2, 4, 12]
    spikes = [(event.sample_index + int(rng.integers(-2, 3)), home[event.unit]) for event in events if rng.random() < 0.8]
    chance = [(int(rng.integers(100, LENGTH - 200)), int(rng.integers(14))) for _ in range(60)]
    return with_events(traces, *events), peaks_at(*{*spikes, *chance})


BUSY, PEAKS = busy()


@pytest.fixture(scope="module")
def at_once() -> tuple[NDArray[Any], ...]:
    return columns(run(assigner(), BUSY, PEAKS, [PERIOD]))


def test_the_busy_recording_has_everything(at_once: tuple[NDArray[Any], ...]) -> None:
    spikes, _, unit, strange, _ = at_once
    assert set(unit.tolist()) == {7, 3, UNSORTED}
    assert 5 < strange.sum() < (unit == UNSORTED).sum()
    assert (spikes["flags"] & Flag.COLLISION).any()


@given(sizes=st.lists(st.integers(1, 800), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_decisions_do_not_depend_on_chunks(at_once: tuple[NDArray[Any], ...], sizes: list[int]) -> None:
    checks.assert_same(columns(run(assigner(), BUSY, PEAKS, sizes)), at_once)


def test_a_peak_is_decided_before_through_sample_and_not_earlier() -> None:
    assign = assigner()
    for a, b in checks.pieces(0, LENGTH, [53], PERIOD):
        due = (PEAKS["sample_index"] + 30 >= a) & (PEAKS["sample_index"] + 30 < b)
        before = assign.through_sample
        spikes = assign(batch_of(BUSY[a:b], a, PEAKS[due]))
        assert (spikes["sample_index"] >= before).all()
        for one in assign.take_notes().explained:
            assert (one.peaks["sample_index"] >= before).all() and (one.peaks["sample_index"] < assign.through_sample).all()
    assert assign.through_sample > LENGTH - 200


def test_traces_are_neither_written_nor_remembered() -> None:
    one, other, traces = assigner(), assigner(), BUSY.copy()
    for a in range(0, 3000, 500):
        batch = batch_of(traces[a : a + 500], a, PEAKS[:0])
        before = batch.traces.copy()
        found = one(batch)
        np.testing.assert_array_equal(batch.traces, before)
        batch.traces[:] = 1e6
        expected = other(batch_of(BUSY[a : a + 500], a, PEAKS[:0]))
        assert found.tobytes() == expected.tobytes()


def test_after_a_gap_peaks_before_it_are_out_and_those_after_it_explained() -> None:
    assign = assigner()
    traces = with_events(quiet(), Event(0, 300), Event(0, 1450))
    run(assign, traces[:1480], peaks_at((300, 2), (1440, 12)), [1480])
    after = with_events(quiet(), Event(1, 200))
    spikes = named(assign(batch_of(after, 50_000, peaks_at((50_200, 4)))))
    assert spikes["sample_index"].tolist() == [50_200] and spikes["unit_id"].tolist() == [3]
    explained = assign.take_notes().explained
    decided = {int(s): int(u) for one in explained for s, u in zip(one.peaks["sample_index"], one.unit, strict=True)}
    assert decided == {1440: UNSORTED, 50_200: 3}


def test_an_empty_batch_decides_nothing() -> None:
    assign = assigner()
    assign(batch_of(BUSY[:500], 0, PEAKS[:0]))
    assign.take_notes()
    for start in (500, 9000):  # also where a gap is announced
        assert not len(assign(batch_of(BUSY[:0], start, PEAKS[:0])))
        assert not assign.take_notes().explained


@pytest.mark.parametrize("with_peaks", [True, False])
def test_memory_does_not_grow(with_peaks: bool) -> None:
    """Also when no peak comes for long: spikes below the threshold have none."""
    assign, held = assigner(), []
    for k in range(10):
        peaks = PEAKS.copy() if with_peaks else PEAKS[:0]
        peaks["sample_index"] += k * LENGTH
        run(assign, BUSY, peaks, [500], k * LENGTH)
        held.append(len(pickle.dumps(assign)))
    assert max(held[2:]) < min(held[2:]) + 4000


def test_look_ahead_is_that_of_the_matcher_and_of_a_template() -> None:
    assign = assigner()
    assign(batch_of(BUSY[:5000], 0, PEAKS[:0]))
    assert 5000 - assign.through_sample <= assign.match.margin + SPANS.look_back + N_BEFORE + 2
