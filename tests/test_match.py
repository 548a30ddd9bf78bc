"""Template matching on spikes whose place is known, in chunks of any size."""

import pickle
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import checks
import naive_match
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scenes import (
    CELLS,
    CONFIG,
    LARGE,
    LIMITS,
    N_AFTER,
    N_BEFORE,
    N_SAMPLES,
    N_WHOLE,
    NOBODYS,
    PROBE,
    RATE,
    SMALL,
    SPANS,
    THRESHOLD,
    Cell,
    Event,
    add_spikes,
    arrival,
    matcher,
    mean_snippets,
    noise,
    recorded,
    silence,
    templates,
)

from streamsort.kernels import match as kernels
from streamsort.match import MATCH_DTYPE, Match
from streamsort.probe import Probe
from streamsort.templates import SHIFTS

Floats = NDArray[np.float32]


def crowd(n_samples: int, seed: int, rate_hz: float = 300.0) -> list[Event]:
    """Draw spikes of all units, many of them overlapping, none nearer to another of its unit than the refractory time."""
    rng = np.random.default_rng(seed)
    events: list[Event] = []
    for unit in range(len(CELLS)):
        gaps = 1.3 * SPANS.refractory + rng.exponential(RATE / rate_hz, int(n_samples / RATE * rate_hz * 2) + 5)
        for at in np.cumsum(gaps)[np.cumsum(gaps) < n_samples - 2 * N_SAMPLES]:
            events.append(Event(unit, int(at) + N_SAMPLES, float(rng.uniform(-0.5, 0.5)), float(rng.normal(1, 0.08))))
    return events


# --- one spike -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [-0.5, -0.3, 0.0, 0.13, 0.37, 0.5])
@pytest.mark.parametrize("unit", [0, 1, 2])
def test_a_spike_is_found_at_its_sample_and_fraction(unit: int, delay: float) -> None:
    traces = recorded(silence(600), Event(unit, 300, delay, 1.1))
    matches = matcher()(traces)
    assert matches["row"].tolist() == [unit]
    assert matches["sample_index"][0] + SHIFTS[matches["shift"][0]] == pytest.approx(300 + delay, abs=0.1)
    assert matches["collision"][0] == 0


@pytest.mark.parametrize("amplitude", [0.7, 1.0, 1.3])
def test_an_amplitude_is_drawn_to_one_by_as_much_as_the_spread_says(amplitude: float) -> None:
    energy, tightness = float(templates().energy[0]), CONFIG.amplitude_spread**-2
    match = matcher()
    found = match(recorded(silence(600), Event(0, 300, amplitude=amplitude)))
    assert found["amplitude"][0] == pytest.approx((amplitude * energy + tightness) / (energy + tightness), rel=0.01)
    expected = naive_match.best_amplitude(amplitude * energy, energy, tightness, LIMITS)[1]
    assert found["gain"][0] == pytest.approx(expected, rel=0.01)


def test_an_event_of_twice_the_size_is_nobodys() -> None:
    for amplitude, found in ((1.5, 1), (2.5, 0), (6.0, 0)):
        matches = matcher()(recorded(silence(600), Event(0, 300, amplitude=amplitude)))
        assert (matches["sample_index"] == 300).sum() == found, amplitude


def test_a_spike_below_the_threshold_on_every_channel_is_found() -> None:
    cells = [Cell(3.4, 40.0, 40.0, width=3.0)]
    times = list(range(200, 30_000, 300))
    traces = noise(30_500)
    add_spikes(traces, cells, PROBE, [Event(0, at) for at in times])
    match = matcher(cells)
    assert np.abs(mean_snippets(cells, PROBE)).max() < 4
    found = match(traces)["sample_index"]
    assert (np.abs(found[:, None] - times).min(axis=0) <= 2).mean() > 0.95
    assert (np.abs(found[:, None] - times).min(axis=1) > 2).mean() < 0.02


def test_a_unit_does_not_fire_twice_within_its_refractory_time() -> None:
    for lag, n_found in ((SPANS.refractory - 5, 1), (SPANS.refractory + 2, 2)):
        found = matcher(CELLS[:1])(recorded(silence(600), Event(0, 300, amplitude=1.1), Event(0, 300 + lag, amplitude=0.9)))
        assert len(found) == n_found, lag


def test_the_refractory_time_holds_wherever_the_window_is_moved() -> None:
    """A train that is too fast for one unit, over seven windows: never are two of its spikes taken too near to each other."""
    traces = noise(60_000, seed=6)
    add_spikes(traces, CELLS, PROBE, [Event(0, at) for at in range(100, 59_900, 25)])
    match = matcher(CELLS[:1])
    found = np.concatenate([match(traces[a:b])["sample_index"] for a, b in checks.pieces(0, 60_000, [100], 60_000)])
    assert len(found) > 1000
    assert np.diff(np.sort(found)).min() >= SPANS.refractory


def test_noise_alone_is_rarely_a_spike() -> None:
    assert len(matcher()(noise(60_000))) <= 12  # per unit 2 per s, at a threshold that makes 18 the log-likelihood of one


# --- overlaps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("lag", [-14, -6, -3, 0, 3, 7, 14])
def test_both_of_two_overlapping_spikes_are_found(pair: tuple[int, int], lag: int) -> None:
    one, other = pair
    traces = recorded(0.5 * noise(700, seed=lag + 20), Event(one, 300, 0.2), Event(other, 300 + lag, -0.3))
    matches = matcher()(traces)
    assert sorted(matches["row"].tolist()) == sorted(pair)
    found = dict(zip(matches["row"].tolist(), matches["sample_index"].tolist(), strict=True))
    assert abs(found[one] - 300) <= 1 and abs(found[other] - 300 - lag) <= 1
    assert matches["collision"].tolist() == [0, 1]
    np.testing.assert_allclose(matches["amplitude"], 1.0, atol=0.3)


TWINS = [Cell(14.0, 30.0, 20.0), Cell(12.0, 50.0, 20.0, width=3.0)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lag", range(-4, 5))
def test_two_that_look_like_one_are_found_where_they_are(lag: int, seed: int) -> None:
    """The sum of both is fitted well by one of their units, larger than it ever is."""
    traces = recorded(0.5 * noise(700, seed), Event(0, 300, 0.2), Event(1, 300 + lag, -0.3), cells=TWINS)
    matches = matcher(TWINS)(traces)
    order = np.argsort(matches["row"])
    assert matches["row"][order].tolist() == [0, 1] and matches["collision"].tolist() == [0, 1]
    assert np.abs(matches["sample_index"][order] - [300, 300 + lag]).max() <= 1
    np.testing.assert_allclose(matches["amplitude"], 1.0, atol=0.2)


@pytest.mark.parametrize(
    ("cells", "lag"),
    [
        ([Cell(29.0, 32.0, 18.0, width=2.5), Cell(32.0, 66.0, 19.0, width=1.5)], 14),
        ([Cell(26.0, 41.0, 19.0, width=1.5), Cell(24.0, 58.0, 19.0, width=3.3)], 9),
        ([Cell(22.0, 44.0, 16.0, width=3.5), Cell(27.0, 58.0, 13.0, width=1.6)], -14),
    ],
)
def test_a_spike_hidden_by_one_that_waited_is_found(cells: list[Cell], lag: int) -> None:
    """When the one is subtracted at last, the columns around it are looked at again, however long ago they were."""
    for seed in range(3):
        match = matcher(cells)
        came = arrival(match, recorded(0.5 * noise(700, seed), Event(0, 300, 0.2), Event(1, 300 + lag, -0.3), cells=cells))
        assert sorted(row for row, *_ in came) == [0, 1]
        assert all(abs(at - (300, 300 + lag)[row]) <= 1 and through <= at for row, at, _, through in came)
        assert max(k for *_, k, _ in came) > 300 + match.margin + SPANS.patience // 2


@pytest.mark.parametrize("amplitude", [0.65, 1.0, 1.35, 1.5])
@pytest.mark.parametrize("unit", [0, 1])
def test_a_spike_of_odd_size_is_still_one(unit: int, amplitude: float) -> None:
    for seed in range(5):
        matches = matcher(TWINS)(recorded(noise(700, seed), Event(unit, 300, 0.2, amplitude), cells=TWINS))
        near = matches[np.abs(matches["sample_index"] - 300) < N_SAMPLES]
        assert near["row"].tolist() == [unit]


def test_a_spike_far_from_others_is_no_collision() -> None:
    far = [CELLS[0], Cell(10.0, 400.0)]
    probe = Probe.linear(24, 20.0)
    for lag, unit in ((SPANS.overlap + 30, 0), (4, 1)):  # late enough, or on other channels
        traces = np.zeros((700, 24), np.float32)
        add_spikes(traces, far, probe, [Event(0, 300), Event(unit, 300 + lag)])
        matches = matcher(far, probe)(traces)
        assert len(matches) == 2 and not matches["collision"].any()


def test_three_at_once_are_taken_apart() -> None:
    traces = recorded(0.5 * noise(700), Event(0, 300), Event(1, 304), Event(2, 309))
    matches = matcher()(traces)
    assert sorted(matches["row"].tolist()) == [0, 1, 2]
    assert np.abs(np.sort(matches["sample_index"]) - [300, 304, 309]).max() <= 1


def test_what_is_left_is_noise() -> None:
    pure = noise(8000, seed=4)
    events = crowd(8000, seed=4, rate_hz=25.0)
    traces = recorded(pure.copy(), *events)
    match = matcher()
    matches = match(traces)
    stop = match.through_sample - N_AFTER
    left, quiet = match.residual(N_SAMPLES, stop), pure[N_SAMPLES:stop].T
    assert len(matches) > 0.9 * len(events)
    assert ((traces[N_SAMPLES:stop].T - quiet) ** 2).sum() > 30 * ((left - quiet) ** 2).sum()
    assert left.std() < 1.08


def test_clean_snippets_have_the_spike_itself_and_no_other() -> None:
    traces = recorded(silence(900), Event(0, 300, amplitude=1.1), Event(1, 310), Event(2, 600))
    match = matcher()
    match(traces)
    matches, snippets, _ = match.settled()
    assert snippets.shape == (3, 5, N_WHOLE) and snippets.dtype == np.float32
    for row, snippet in zip(matches["row"].tolist(), snippets.transpose(0, 2, 1), strict=True):
        expected = np.float32(1.1 if row == 0 else 1.0) * CELLS[row].at(PROBE)
        assert ((snippet - expected) ** 2).sum() < 0.02 * (expected**2).sum()
        assert ((snippet - expected)[N_SAMPLES:] ** 2).sum() < 0.05 * max(float((expected[N_SAMPLES:] ** 2).sum()), 1.0)
    assert not len(match.settled()[0])


# --- the stage -----------------------------------------------------------------------------------------------------------

LENGTH = 9300  # more than the window holds, so that it is moved
CHANGES = {  # units drift, and one is new
    3000: [Cell(12.5, 13.0, 15.0), CELLS[1]],
    4650: [Cell(13.0, 14.0, 15.0), Cell(10.5, 64.0, 18.0, width=4.0), CELLS[2]],
    7000: [Cell(13.0, 16.0, 15.0), CELLS[1], CELLS[2]],
}
BUSY = recorded(noise(LENGTH, seed=9), *crowd(LENGTH, seed=9))
add_spikes(BUSY, [Cell(22.0, 45.0, 25.0, width=5.0)], PROBE, [Event(0, at) for at in range(700, LENGTH - 200, 900)])  # nobody's


class Changing:
    """A matcher whose templates change at fixed samples, where chunks are cut."""

    def __init__(self) -> None:
        self.match = matcher(CELLS[:2])
        self.matches: list[NDArray[Any]] = []
        self.snippets: list[Floats] = []

    def __call__(self, traces: Floats, start_sample: int) -> tuple[NDArray[Any], ...]:
        if start_sample in CHANGES:
            self.learn(CHANGES[start_sample])
        return (self.match(traces),)

    def learn(self, cells: Sequence[Cell]) -> None:
        """Take the settled spikes as a learning boundary does, and change the templates."""
        matches, snippets, _ = self.match.settled()
        order = np.lexsort((matches["row"], matches["sample_index"]))
        self.matches.append(matches[order])
        self.snippets.append(snippets[order])
        if len(cells):
            self.match.use(templates(cells), np.full(len(cells), THRESHOLD, np.float32))


def feed(stage: Changing, traces: Floats, start_sample: int) -> tuple[NDArray[Any], ...]:
    return stage(traces, start_sample)


def through(sizes: Iterable[int]) -> tuple[NDArray[Any], ...]:
    """Return all matches, what settled, what is left and up to where, of the busy recording in chunks of these sizes."""
    stage, parts, reached, start = Changing(), [], [], 0
    cuts = [*CHANGES, LENGTH]
    for cut in cuts:
        for a, b in checks.pieces(start, cut, sizes, cut):
            parts.append(stage(BUSY[a:b], a)[0])
        start = cut
        reached.append(stage.match.through_sample)
    stage.learn([])
    left = stage.match.residual(LENGTH - 300, LENGTH + N_WHOLE - N_BEFORE - stage.match.margin)  # and what is to come
    return np.concatenate(parts), np.concatenate(stage.matches), np.concatenate(stage.snippets), left.copy(), np.array(reached)


def test_the_busy_recording_is_hard_enough() -> None:
    matches = through([LENGTH])[0]
    assert (matches["collision"] > 0).sum() > 12
    assert (np.diff(matches["sample_index"]) < 0).any()  # one was found behind another
    assert set(matches["row"].tolist()) == {0, 1, 2}
    match = matcher()
    late = [one for one in arrival(match, BUSY[:3000]) if one[2] > one[1] + match.margin + SPANS.look_back]
    assert len(late) > 3  # they had waited


@pytest.fixture(scope="module")
def at_once() -> tuple[NDArray[Any], ...]:
    return through([LENGTH])


@given(sizes=st.lists(st.integers(1, 900), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_any_chunking_gives_the_same_bits(at_once: tuple[NDArray[Any], ...], sizes: list[int]) -> None:
    checks.assert_same(through(sizes), at_once)


@pytest.mark.parametrize("size", [1, 30, 4096])
def test_a_fixed_size_of_chunks_makes_no_difference(at_once: tuple[NDArray[Any], ...], size: int) -> None:
    checks.assert_same(through([size]), at_once)


def test_it_makes_no_difference_where_the_window_is_moved() -> None:
    """Also the second time, when its columns held something before: every now and then a spike waits as that happens."""
    n, rng = 60_000, np.random.default_rng(12)
    traces = noise(n, seed=12)
    at = np.cumsum(rng.integers(60, 240, 450))
    at = at[at < n - 300]
    events = [Event(0, int(s)) for s in at] + [Event(1, int(s) + 20) for s in at[::2]]
    add_spikes(traces, [SMALL, NOBODYS], PROBE, events)
    found = []
    for size in (1000, 40, 250):
        match, parts, reached = matcher([SMALL, LARGE]), [], []
        for a, b in checks.pieces(0, n, [size], 1000):
            parts.append(match(traces[a:b]))
            if b % 1000 == 0:
                reached.append(match.through_sample)
        found.append((np.concatenate(parts), np.array(reached)))
    checks.assert_same(found[1], found[0])
    checks.assert_same(found[2], found[0])
    assert len(set((found[0][1] % 1000).tolist())) > 5  # at times something waits at the cut


def test_a_saved_matcher_goes_on_identically() -> None:
    checks.state_continues(Changing, feed, BUSY, 500)


def test_an_empty_chunk_changes_nothing() -> None:
    checks.empty_chunk(Changing, feed, BUSY, 500)


def test_the_input_is_neither_written_nor_remembered() -> None:
    checks.input_kept(Changing, feed, BUSY, 500)


def test_templates_may_change_though_nothing_was_heard_yet() -> None:
    match = matcher()
    match.use(templates(), np.full(3, THRESHOLD, np.float32))
    assert len(match(recorded(silence(600), Event(1, 300)))) == 1


def test_a_new_unit_is_looked_for_as_far_back_as_one_looks() -> None:
    """Its spike lies before the change of templates, and shows when the larger one after the change is subtracted."""
    traces = recorded(silence(600), Event(0, 302), Event(2, 298))
    late, known = matcher(CELLS[:1]), matcher([CELLS[0], CELLS[2]])
    expected = known(traces)
    assert sorted(expected["row"].tolist()) == [0, 1]
    assert not len(late(traces[: 301 + late.margin]))  # decided up to 300
    late.use(templates([CELLS[0], CELLS[2]]), np.full(2, THRESHOLD, np.float32))
    assert late(traces[301 + late.margin :]).tobytes() == expected.tobytes()


def test_a_higher_threshold_holds_from_the_next_sample() -> None:
    match = matcher()
    traces = recorded(silence(900), Event(0, 300), Event(0, 600))
    first = match(traces[:450])
    match.use(templates(), np.full(3, 1e6, np.float32))
    assert first["sample_index"].tolist() == [300] and not len(match(traces[450:]))


def test_a_spike_comes_out_with_the_last_sample_of_its_margin() -> None:
    match = matcher()
    traces = recorded(silence(600), Event(0, 300))
    came = [k for k in range(600) if len(match(traces[k : k + 1]))]
    assert len(came) == 1 and 300 < came[0] <= 300 + match.margin


def test_all_spikes_before_through_sample_have_come_out() -> None:
    match, behind = matcher(), []
    for a, b in checks.pieces(0, LENGTH, [37], LENGTH):
        known = match.through_sample
        matches = match(BUSY[a:b])
        assert (matches["sample_index"] >= known).all()
        assert match.next_sample == b
        behind.append(b - match.margin - 2 - match.through_sample)
    assert max(behind) <= SPANS.patience + SPANS.look_back
    assert (np.array(behind) <= SPANS.look_back).mean() > 0.3 and SPANS.look_back < max(behind)  # some spikes wait, for as long


def test_after_a_gap_it_is_as_new() -> None:
    used, fresh = matcher(), matcher()
    used(BUSY[:5000])
    used(recorded(silence(500), Event(0, 450))[:460])  # not decided when the gap comes
    used.restart(1_000_000)
    fresh.restart(1_000_000)
    again, expected = used(BUSY[:4000]), fresh(BUSY[:4000])
    assert len(expected) and again.tobytes() == expected.tobytes()
    assert expected["sample_index"].min() > 1_000_000
    checks.assert_same(used.settled(), fresh.settled())
    shifted = matcher()(BUSY[:4000])
    shifted["sample_index"] += 1_000_000
    assert shifted.tobytes() == expected.tobytes()


def test_memory_does_not_grow() -> None:
    match, held = matcher(), []
    for _ in range(12):
        match(BUSY)
        match.settled()
        held.append(len(pickle.dumps(match)))
    assert max(held[2:]) <= min(held[2:]) + 50 * MATCH_DTYPE.itemsize


def test_without_units_nothing_is_found_and_nothing_is_lost() -> None:
    match = matcher([])
    traces = recorded(silence(900), Event(0, 300), Event(0, 700))
    assert not len(match(traces[:500]))
    np.testing.assert_array_equal(match.residual(400, 500), naive_match.in_steps(traces[400:500].T))
    match.use(templates(), np.full(3, THRESHOLD, np.float32))
    assert match(traces[500:])["sample_index"].tolist() == [700]


def test_a_tail_of_less_than_a_sample_will_do() -> None:
    config = replace(CONFIG, ms_tail=CONFIG.ms_after + 0.01)
    match = Match(config, 5, RATE)
    assert match.n_whole > match.n_before + match.n_after
    match.warmup(config)


def test_compiling_beforehand_leaves_later_matchers_alone() -> None:
    Match(CONFIG, 5, RATE).warmup(CONFIG)
    assert len(matcher()(recorded(silence(600), Event(0, 300)))) == 1
    assert len(kernels.advance.signatures) == 1
