"""What known units leave: units too small for one channel come out as groups, noise and leftovers do not."""

import numpy as np
from numpy.typing import NDArray
from scenes import N_BEFORE, N_SAMPLES, N_WHOLE, RATE, Cell, Event, add_spikes, coloured, waveform, white

from streamsort.config import ClusterConfig
from streamsort.covariance import NoiseModel
from streamsort.discover import Discover, Group
from streamsort.probe import Probe

Floats = NDArray[np.float32]

PROBE = Probe.linear(6, 20.0)
SHAPES = np.stack([waveform(width=width)[:N_SAMPLES] for width in (1.8, 2.2, 2.8)]).astype(np.float32)
WEAK, OTHER = Cell(3.4, 20.0, 22.0, width=2.4), Cell(3.6, 80.0, 22.0, width=2.0)
LENGTH = 300_000  # 10 s
TIMES = np.random.default_rng(3).permutation(np.arange(200, LENGTH - 200, 700))


def residual(cells: list[Cell], n_spikes: int, seed: int = 0) -> Floats:
    traces = np.random.default_rng(seed).normal(size=(LENGTH, 6)).astype(np.float32)
    events = [Event(unit, int(at)) for unit in range(len(cells)) for at in TIMES[unit * n_spikes : (unit + 1) * n_spikes]]
    add_spikes(traces, cells, PROBE, events)
    return np.ascontiguousarray(traces.T)


def discovered(traces: Floats, busy: NDArray[np.bool_] | None = None, noise: NoiseModel | None = None) -> list[Group]:
    """Look at the traces in pieces, as calibration does, and group what was found."""
    discover = Discover(PROBE, noise or white(6), SHAPES, N_BEFORE, N_WHOLE)
    busy = np.zeros(traces.shape, bool) if busy is None else busy
    for start in range(N_WHOLE, LENGTH - N_WHOLE, 7500):
        stop = min(start + 7500, LENGTH - N_WHOLE)
        around = slice(start - N_WHOLE, stop + N_WHOLE)
        discover.look(traces[:, around], N_WHOLE, N_WHOLE + stop - start, busy[:, around])
    return discover.groups(20, ClusterConfig(), 0)


def cosine(group: Group, cell: Cell) -> float:
    one, other = group.mean.reshape(-1).astype(float), cell.at(PROBE).reshape(-1)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_a_unit_below_the_threshold_of_every_channel_is_found() -> None:
    assert np.abs(WEAK.at(PROBE)).max() < 4.0
    groups = discovered(residual([WEAK], 150))
    assert len(groups) == 1
    assert 110 <= groups[0].n_spikes <= 200
    assert groups[0].mean.shape == (N_WHOLE, 6) and cosine(groups[0], WEAK) > 0.95
    assert abs(int(groups[0].mean.sum(axis=1).argmin()) - N_BEFORE) <= 1


def test_two_such_units_make_two_groups() -> None:
    groups = discovered(residual([WEAK, OTHER], 120))
    for cell in (WEAK, OTHER):
        assert max(cosine(group, cell) for group in groups) > 0.93
    assert len(groups) == 2


def test_noise_alone_makes_no_group() -> None:
    assert not discovered(residual([], 0))
    model, _ = coloured(6)
    white_noise = residual([], 0, seed=5)
    in_space = (np.linalg.cholesky(model.space) @ white_noise).astype(np.float32)
    assert not discovered(in_space, noise=NoiseModel(model.space, white(6).time_root))


def test_where_a_spike_was_subtracted_nothing_is_a_candidate() -> None:
    traces, busy = residual([WEAK], 150), np.zeros((6, LENGTH), bool)
    for at in TIMES[:150]:
        busy[:, at - N_BEFORE : at + N_SAMPLES - N_BEFORE] = True
    assert not discovered(traces, busy)
    assert len(discovered(traces, busy[:, ::-1])) == 1  # other places do not matter


def test_too_few_spikes_make_no_group() -> None:
    assert not discovered(residual([WEAK], 15))


def test_a_candidate_counts_once_and_only_within_what_is_looked_at() -> None:
    traces = np.zeros((6, 600), np.float32)
    add_spikes(traces.T, [Cell(9.0, 40.0, 20.0)], PROBE, [Event(0, 300)])
    config, idle = ClusterConfig(min_spikes=2), np.zeros((6, 600), bool)
    for looks, found in (([(100, 301)], 1), ([(100, 300), (301, 500)], 0), ([(100, 300), (300, 500)], 1)):
        discover = Discover(PROBE, white(6), SHAPES, N_BEFORE, N_WHOLE)
        for first, stop in looks:
            discover.look(traces, first, stop, idle)
        groups = discover.groups(1, config, 0)
        assert [group.n_spikes for group in groups] == [1] * found
        for group in groups:
            np.testing.assert_array_equal(group.mean, traces[:, 300 - N_BEFORE : 300 - N_BEFORE + N_WHOLE].T)


def test_a_groups_mean_goes_on_to_the_end_of_the_tail() -> None:
    """Candidates are found and compared by what a filter sees of them, and kept with what follows."""
    weak = Cell(3.4, 20.0, 22.0, width=2.4, tail=0.3)
    groups = discovered(residual([weak], 150))
    assert len(groups) == 1
    found, true = groups[0].mean[N_SAMPLES:], weak.at(PROBE)[N_SAMPLES:]
    assert float((found * true).sum() / (true * true).sum()) > 0.7


def test_candidates_are_forgotten_once_grouped() -> None:
    discover = Discover(PROBE, white(6), SHAPES, N_BEFORE, N_WHOLE)
    traces = residual([WEAK], 150)[:, :200_000]
    discover.look(traces, N_WHOLE, 200_000 - N_WHOLE, np.zeros(traces.shape, bool))
    assert discover.groups(20, ClusterConfig(), 0) and not discover.groups(20, ClusterConfig(), 0)


def test_noise_gives_few_candidates_a_second() -> None:
    discover = Discover(PROBE, white(6), SHAPES, N_BEFORE, N_WHOLE)
    traces = residual([], 0)
    discover.look(traces, N_WHOLE, LENGTH - N_WHOLE, np.zeros(traces.shape, bool))
    n = sum(group.n_spikes for group in discover.groups(1, ClusterConfig(spikes_per_seed=1000), 0))
    assert 0 < n < 2 * LENGTH / RATE
