"""The kernels of template matching against their definitions."""

import itertools

import naive_match
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scenes import (
    CELLS,
    LIMITS,
    N_AFTER,
    N_BEFORE,
    N_SAMPLES,
    PROBE,
    SPANS,
    THRESHOLD,
    Cell,
    Event,
    add_spikes,
    coloured,
    maker,
    mean_snippets,
    noise,
    recorded,
    templates,
)

from streamsort.kernels import match as kernels
from streamsort.match import Window
from streamsort.templates import Templates

Floats = NDArray[np.float32]


def window(residual: Floats, t: Templates, everywhere: bool = False) -> Window:
    """Make a window of a residual; `everywhere`: no score is taken to be small."""
    n_units = len(t.energy)
    residual = np.pad(residual, ((0, 0), (0, 7)))
    n_columns = residual.shape[1]
    return Window(
        residual=residual,
        scores=np.zeros((n_units, n_columns), np.float32),
        lines=np.zeros((n_units, 3, n_columns), np.float32),
        units=np.arange(n_units, dtype=np.int32),
        norms=np.full((n_units, 3), np.inf, np.float32) if everywhere else np.linalg.norm(t.temporal, axis=2),
        last=np.full(n_units, -(1 << 20), np.int32),
        until=np.full(n_units, -(1 << 20), np.int32),
        tall=np.zeros(n_columns, np.bool_),
        deferred=np.zeros(n_columns, np.bool_),
        recent=np.full((16, 3), -1, np.int32),
        recent_amplitude=np.zeros(16, np.float32),
        found=np.zeros((n_columns, 4), np.int32),
        amplitude=np.zeros(n_columns, np.float32),
        gain=np.zeros(n_columns, np.float32),
        runner_up=np.zeros(n_columns, np.float32),
        scratch=np.zeros(n_columns, np.float32),
        seen=np.zeros(n_columns, np.float32),
        through=np.zeros(1, np.int32),
    )


@pytest.mark.parametrize("n_columns", [1, 2, 7, 64, 301])
def test_a_score_is_the_inner_product_of_filter_and_residual(n_columns: int) -> None:
    t = maker(PROBE, coloured(5)[0])(mean_snippets(CELLS, PROBE))
    one = window(noise(n_columns + N_SAMPLES + 1).T, t, everywhere=True)
    kernels.score(one, t, one.units, 0, N_BEFORE + 1, N_BEFORE + 1 + n_columns, N_BEFORE)
    for unit in range(3):
        weights = naive_match.filter_on_all(t, unit, 5)
        columns = range(N_BEFORE + 1, N_BEFORE + 1 + n_columns)
        expected = [naive_match.score_at(one.residual.astype(float), weights, c, N_BEFORE) for c in columns]
        np.testing.assert_allclose(one.scores[unit, columns], expected, rtol=1e-4, atol=1e-3)


def scored(residual: Floats, t: Templates, cuts: list[int], everywhere: bool = False) -> Window:
    """Score a residual between the cuts, one stretch after the other."""
    one, begun = window(residual, t, everywhere), 0
    for start, stop in itertools.pairwise(cuts):
        kernels.score(one, t, one.units, begun, start, stop, N_BEFORE)
        begun = stop - N_BEFORE + N_SAMPLES - 1
    return one


CUTS = [[N_BEFORE + 1, 300], [N_BEFORE + 1, 20, 26, 121, 122, 300], list(range(N_BEFORE + 1, 301))]


@pytest.mark.parametrize("cuts", CUTS)
def test_a_score_has_the_same_bits_wherever_the_stretch_begins(cuts: list[int]) -> None:
    t, residual = templates(), noise(400).T
    whole, parts = (scored(residual, t, where, everywhere=True).scores[:, N_BEFORE + 1 : 300] for where in (CUTS[0], cuts))
    np.testing.assert_array_equal(whole, parts)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("seed", range(4))
def test_small_scores_are_left_out_but_for_those_beside_large_ones(seed: int, cuts: list[int]) -> None:
    """Among them a spike so small that its score is hardly large, and one at a cut."""
    t, rng = templates(), np.random.default_rng(seed)
    events = [Event(unit, at, rng.uniform(-0.5, 0.5), size) for unit, at, size in ((0, 60, 0.52), (1, 121, 1.0), (2, 260, 0.55))]
    residual = naive_match.in_steps(recorded(0.3 * noise(400, seed), *events).T).astype(np.float32)
    every, some = (scored(residual, t, cuts, everywhere).scores[:, N_BEFORE + 1 : 300] for everywhere in (True, False))
    large = every >= float(kernels._LEAST) * t.energy[:, None]
    needed = large.copy()
    needed[:, 1:] |= large[:, :-1]
    needed[:, :-1] |= large[:, 1:]
    assert large.any(axis=1).all()
    np.testing.assert_array_equal(some[needed], every[needed])
    assert ((some == every) | (some == 0)).all() and (some[~needed] == 0).mean() > 0.5


@given(score=st.floats(-100, 900), energy=st.floats(10, 900), tightness=st.floats(1, 200))
def test_gain_and_amplitude_are_those_of_the_best_of_all_amplitudes(score: float, energy: float, tightness: float) -> None:
    arguments = np.float32(score), np.float32(energy), np.float32(tightness)
    amplitude, gain = naive_match.best_amplitude(score, energy, tightness, LIMITS)
    assert kernels.amplitude_of(*arguments) == pytest.approx(amplitude, abs=2e-4)
    assert kernels.gain_of(*arguments) == pytest.approx(gain, rel=1e-3, abs=0.02)


def test_a_gain_is_what_subtraction_takes_off_the_whitened_residual() -> None:
    """What the filter sees of it: at amplitude 1 nothing is charged, so the gain is the difference of two squares."""
    model, time = coloured(5)
    t = maker(PROBE, model)(mean_snippets(CELLS[:1], PROBE))
    channels, weights = t.channels[0], t.filters[0].reshape(-1).astype(float)
    spread = np.sqrt(weights @ np.kron(time, model.space[np.ix_(channels, channels)]) @ weights)
    x = noise(N_SAMPLES, seed=3)[:, channels].astype(float) + t.centred[0, :N_SAMPLES]
    left = x - t.centred[0, :N_SAMPLES]
    before, after = (float(weights @ part.reshape(-1) / spread) for part in (x, left))
    score = np.float32((x * t.filters[0]).sum())
    assert kernels.gain_of(score, t.energy[0], np.float32(1e9)) == pytest.approx(before**2 - after**2, rel=1e-3)


@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(-50, 50))
def test_between_is_the_height_of_the_parabola(before: float, here: float, after: float) -> None:
    values = [np.float32(value) for value in (before, here, after)]
    expected = naive_match.peak_height(*(float(value) for value in values))
    assert kernels.between(*values) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("seed", range(8))
def test_peeling_equals_its_definition(seed: int) -> None:
    n_columns, computed = 640, 640 - N_AFTER + 1
    rng = np.random.default_rng(seed)
    traces = noise(n_columns, seed)
    for at in rng.integers(2 * N_SAMPLES, 380, 9).tolist():
        add_spikes(traces, CELLS, PROBE, [Event(int(rng.integers(3)), at, rng.uniform(-0.5, 0.5), rng.uniform(0.6, 1.5))])
    # A large spike of nobody's, and before it one that looks like a part of it.
    add_spikes(traces, [CELLS[2], Cell(25.0, 45.0, width=6.0)], PROBE, [Event(0, 480), Event(1, 500)])
    traces = naive_match.in_steps(traces).astype(np.float32)
    t, threshold = templates(), np.full(3, THRESHOLD, np.float32)
    first, stop = 2 * N_SAMPLES, computed - SPANS.sweep - 1
    slow = naive_match.Peeler(traces.T.astype(float), t, threshold, SPANS, LIMITS)
    slow(first, stop)
    one = window(traces.T, t)
    one.through[0] = first - SPANS.look_back
    kernels.score(one, t, one.units, 0, N_BEFORE + 1, computed, N_BEFORE)
    n = kernels.peel(one, t, threshold, first, stop, computed, 0, SPANS)
    assert n >= 2 and slow.waited and slow.n_apart
    assert [tuple(row) for row in one.found[:n].tolist()] == slow.found
    measured = np.stack([one.amplitude[:n], one.gain[:n], one.runner_up[:n]], axis=1)
    np.testing.assert_allclose(measured, slow.measured, rtol=2e-3, atol=0.05)
    np.testing.assert_allclose(one.residual[:, :n_columns], slow.residual, atol=2e-3)
    np.testing.assert_array_equal(one.residual * 1024, np.rint(one.residual * 1024))
    assert set(np.flatnonzero(one.deferred).tolist()) == slow.waiting
    assert one.through[0] == slow.through
