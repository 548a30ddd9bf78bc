"""A spike is subtracted with its tail, and what is only a part of a larger spike is none of a small unit's."""

from collections.abc import Sequence

import checks
import naive_match
import numpy as np
import pytest
from scenes import (
    CONFIG,
    LARGE,
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
    maker,
    matcher,
    mean_snippets,
    noise,
    recorded,
    silence,
    templates,
)

from streamsort.match import Match

# --- tails ---------------------------------------------------------------------------------------------------------------

# One swings back after the band-pass as if a small unit fired; the other is that unit.
SWINGING, LIKE_ITS_TAIL = Cell(40.0, 40.0, tail=-0.25, tail_width=2.2), Cell(10.0, 40.0)


def cut_off(matcher_of: Sequence[Cell]) -> Match:
    """Match with templates of the same cells that end where filters do."""
    means = mean_snippets(matcher_of, PROBE)
    means[:, N_SAMPLES:] = 0
    match = Match(CONFIG, PROBE.n_channels, RATE)
    match.use(maker(PROBE)(means), np.full(len(means), THRESHOLD, np.float32))
    return match


@pytest.mark.parametrize("chunk", [1, 50, 600])
def test_the_tail_of_a_large_spike_is_no_small_unit(chunk: int) -> None:
    """Nor when the tail is yet to come as the spike is found."""
    cells = [SWINGING, LIKE_ITS_TAIL]
    traces = recorded(noise(600, seed=2), Event(0, 300, 0.2, 1.05), cells=cells)
    for match, rows in ((matcher(cells), [0]), (cut_off(cells), [0, 1])):
        found = np.concatenate([match(traces[a:b]) for a, b in checks.pieces(0, 600, [chunk], 600)])
        assert found["row"].tolist() == rows


def test_a_small_spike_upon_the_tail_of_a_large_one_is_found() -> None:
    cells = [SWINGING, Cell(7.0, 40.0, width=4.0)]
    matches = matcher(cells)(recorded(0.7 * noise(600, seed=3), Event(0, 300), Event(1, 375), cells=cells))
    assert matches["row"].tolist() == [0, 1] and abs(matches["sample_index"][1] - 375) <= 1


@pytest.mark.parametrize("cut", [301, 340, 360, 420])
def test_what_is_subtracted_of_samples_to_come_is_taken_off_when_they_come(cut: int) -> None:
    traces = recorded(silence(700), Event(0, 300, amplitude=1.1), cells=[SWINGING])
    at_once, later = matcher([SWINGING]), matcher([SWINGING])
    at_once(traces)
    later(traces[:cut])
    later(traces[cut:])
    left = later.residual(250, 500)
    np.testing.assert_array_equal(left, at_once.residual(250, 500))
    assert np.abs(left[:, 90:]).max() < 0.1 * np.abs(traces[340:500]).max()


def test_a_residual_is_kept_in_steps() -> None:
    match = matcher()
    found = match(recorded(noise(3000, seed=8), *[Event(k % 3, at, 0.3) for k, at in enumerate(range(200, 2980, 60))]))
    assert len(found) > 30
    left = match.residual(2000, 3000 + N_WHOLE - N_BEFORE)  # also of what is to come
    np.testing.assert_array_equal(left * 1024, np.rint(left * 1024))
    match = matcher([])
    match(np.full((10, 5), np.float32(1e30)))
    assert np.isfinite(match.residual(0, 10)).all()  # an artifact cannot spoil what is subtracted later


# --- parts of something larger -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [-16, -13, 25, 45])
def test_a_piece_of_a_large_spike_is_no_small_one(lag: int) -> None:
    """Its unit's spikes have a second trough, before or after the first, that the small unit's template fits."""
    means = mean_snippets([LARGE, SMALL], PROBE)
    means[0] += np.roll(means[1], lag, axis=0)
    traces = 0.5 * noise(600, seed=5)
    traces[300 - N_BEFORE :][:N_WHOLE] += means[0]
    match = Match(CONFIG, PROBE.n_channels, RATE)
    match.use(maker(PROBE)(means), np.full(2, THRESHOLD, np.float32))
    found = match(traces)
    assert found["row"].tolist() == [0] and abs(found["sample_index"][0] - 300) <= 1
    alone = 0.5 * noise(600, seed=5)
    add_spikes(alone, [SMALL], PROBE, [Event(0, 300 + lag)])
    match.restart(0)
    assert match(alone)["row"].tolist() == [1]


@pytest.mark.parametrize("lag", [9, 14, 20, 30])
def test_a_small_spike_before_a_large_one_comes_late_but_in_time(lag: int) -> None:
    cells = [SMALL, LARGE]
    match = matcher(cells)
    traces = recorded(0.5 * noise(600, seed=lag), Event(0, 300), Event(1, 300 + lag), cells=cells)
    came = arrival(match, traces)
    assert sorted(row for row, *_ in came) == [0, 1]
    for row, sample_index, k, through in came:
        assert abs(sample_index - (300, 300 + lag)[row]) <= 1
        assert through <= sample_index and k <= sample_index + match.margin + SPANS.patience
    assert came[0][0] == 1 and came[1][2] > 300 + match.margin  # the small one waited for what was to come
    alone = arrival(matcher(cells), recorded(0.5 * noise(600, seed=lag), Event(0, 300), cells=cells))
    assert len(alone) == 1 and alone[0][2] <= 301 + match.margin


@pytest.mark.parametrize("lag", [-10, 6, 14, 30])
def test_what_nobodys_large_spike_holds_is_none(lag: int) -> None:
    """What is left larger than a spike when its time is over shows that it was a part of something else, and stays there."""
    match, cells = matcher([SMALL]), [SMALL, NOBODYS]
    traces = naive_match.in_steps(recorded(0.5 * noise(600, seed=6), Event(0, 300), Event(1, 300 + lag), cells=cells))
    lowest = []
    for k in range(600):
        assert not len(match(traces[k : k + 1].astype(np.float32)))
        lowest.append(k - match.through_sample)
    np.testing.assert_array_equal(match.residual(200, 500), traces[200:500].T)
    assert lowest[-1] == min(lowest[300:])  # nothing waits any more


def test_two_spikes_at_once_do_not_wait_for_each_other() -> None:
    """Each would leave the other, as large as itself; in the noise either may look the larger."""
    pair = [Cell(12.0, 20.0), Cell(12.0, 60.0)]
    for seed in range(20):
        lag = seed - 10
        found = matcher(pair)(recorded(noise(600, seed=seed), Event(0, 300), Event(1, 300 + lag), cells=pair))
        assert sorted(found["row"].tolist()) == [0, 1], lag


def test_a_spike_that_waits_survives_a_change_of_templates() -> None:
    """Far from it a larger unit seemed to come, but it was nobody; meanwhile a unit is added."""
    cells = [Cell(8.0, 0.0, 20.0), Cell(30.0, 80.0, 20.0), Cell(9.0, 80.0, width=1.4)]
    traces = recorded(0.3 * noise(600, seed=7), Event(0, 300), cells=cells)
    add_spikes(traces, [Cell(-24.0, 80.0, 8.0, width=7.0)], PROBE, [Event(0, 325)])
    match, known = matcher(cells[:2]), matcher(cells)
    cut = 345 + match.margin
    assert not len(match(traces[:cut])) and match.through_sample <= 300
    match.use(templates(cells), np.full(3, THRESHOLD, np.float32))
    found = match(traces[cut:])
    assert found["row"].tolist() == [0] and abs(found["sample_index"][0] - 300) <= 1
    assert found.tobytes() == known(traces).tobytes()
