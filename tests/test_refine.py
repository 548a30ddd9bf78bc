"""From a first idea of the units to exactly the true ones."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scenes import N_BEFORE, N_SAMPLES, N_WHOLE, RATE, Cell, Event, add_spikes, maker, mean_snippets, waveform, white

from streamsort.bank import Bank
from streamsort.calibrate import calibrate
from streamsort.config import SorterConfig
from streamsort.match import MATCH_DTYPE
from streamsort.probe import Probe
from streamsort.records import PEAK_DTYPE, Chunk, StreamInfo
from streamsort.refine import Refine, Seeds, _Pass, find_units
from streamsort.simulate import GAIN_UV, Recording, SimulationConfig, simulate_recording
from streamsort.snippets import Snippets
from streamsort.sorter import Sorter
from streamsort.warmup import Warmup

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

CONFIG = SorterConfig.from_dict({"preprocess": {"noise_s": 1.0}, "encode": {"encoder": "light"}})
PERIOD = 7500
PROBE = Probe.linear(4, 20.0)
SHAPES = np.stack([waveform(width=width)[:N_SAMPLES] for width in (1.8, 2.2, 2.8)]).astype(np.float32)
LARGE, BROAD, FAINT = Cell(14.0, 5.0, 20.0), Cell(10.0, 55.0, 20.0, width=4.0), Cell(3.5, 30.0, 40.0, width=2.8)
ECHO = Cell(6.0, 55.0, 18.0, width=4.0)


def hits(found: Ints, true: Ints, tolerance: int = 12) -> int:
    """Count the true spikes that were found; 0.4 ms cover the filter's delay."""
    if not len(found):
        return 0
    found = np.sort(found)
    at = np.searchsorted(found, true)
    nearest = np.minimum(np.abs(found[np.minimum(at, len(found) - 1)] - true), np.abs(found[np.maximum(at - 1, 0)] - true))
    return int((nearest <= tolerance).sum())


def accuracies(matches: NDArray[Any], n_rows: int, trains: Sequence[Ints]) -> NDArray[np.float64]:
    """Return the accuracy of every row (n_rows) for every true unit (n_units)."""
    table = np.zeros((n_rows, len(trains)))
    for row in range(n_rows):
        found = matches["sample_index"][matches["row"] == row]
        for unit, true in enumerate(trains):
            n = hits(found, true)
            table[row, unit] = n / max(len(found) + len(true) - n, 1)
    return table


def assert_exactly_these(bank: Bank, matches: NDArray[Any], trains: Sequence[Ints], least: float) -> None:
    """One row for each true unit and none besides."""
    table = accuracies(matches, len(bank), trains)
    assert len(bank) == len(trains), table.round(2)
    assert (table.max(axis=0) > least).all(), table.round(2)
    assert len(set(table.argmax(axis=0).tolist())) == len(trains)


# --- hand-made recordings ------------------------------------------------------------------------------------------------


class Scene:
    """Twenty seconds of noise with spikes in it, and the peaks of those a threshold would show."""

    def __init__(self, seconds: float = 20.0, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self.n_samples = round(seconds * RATE)
        self.traces = self._rng.normal(size=(self.n_samples, PROBE.n_channels)).astype(np.float32)
        self.trains: list[Ints] = []
        self._peaks: list[tuple[int, int, int]] = []

    def add(
        self,
        cell: Callable[[float], Cell],
        label: Callable[[float], int],
        rate_hz: float = 8.0,
        times: Ints | None = None,
    ) -> "Scene":
        """Add a unit that looks like `cell(seconds)`, its peaks labelled `label(seconds)`; -1 for those that are not seen."""
        if times is None:
            gaps = 60 + self._rng.exponential(RATE / rate_hz, int(3 * rate_hz * self.n_samples / RATE))
            times = np.cumsum(gaps).astype(np.int64) + 200
        times = times[times < self.n_samples - 200]
        for at in times.tolist():
            now, delay, size = cell(at / RATE), float(self._rng.uniform(-0.5, 0.5)), float(self._rng.normal(1, 0.05))
            add_spikes(self.traces, [now], PROBE, [Event(0, at, delay, size)])
            if label(at / RATE) >= 0:
                self._peaks.append((at, int(np.ptp(now.at(PROBE), axis=0).argmax()), label(at / RATE)))
        self.trains.append(times)
        return self

    def refined(self) -> tuple[Bank, NDArray[Any]]:
        starts = range(0, self.n_samples, PERIOD)
        stretches = [(start, self.traces[start : start + PERIOD]) for start in starts]
        refine = Refine(CONFIG, PROBE, white(PROBE.n_channels), SHAPES, stretches, RATE)
        peaks = np.array(sorted(self._peaks) or np.zeros((0, 3)), np.int64)
        return refine(Seeds(peaks[:, 0], peaks[:, 1], peaks[:, 2]))


def always(what: Any) -> Callable[[float], Any]:
    return lambda _: what


def test_units_are_found_one_of_them_though_no_threshold_showed_it() -> None:
    assert np.abs(FAINT.at(PROBE)).max() < 4.0
    scene = Scene().add(always(LARGE), always(0)).add(always(BROAD), always(1)).add(always(FAINT), always(-1))
    assert_exactly_these(*scene.refined(), scene.trains, 0.9)


def test_clusters_of_one_unit_become_one() -> None:
    """Its spikes were split at random, and another unit's by time."""
    parity = np.random.default_rng(1)
    scene = Scene().add(always(LARGE), lambda _: int(parity.integers(2))).add(always(BROAD), lambda t: 2 + int(t > 9))
    assert_exactly_these(*scene.refined(), scene.trains, 0.95)


def test_two_units_in_one_cluster_are_told_apart() -> None:
    one, other = Cell(12.0, 12.0, 20.0), Cell(11.0, 28.0, 20.0, width=3.2)
    scene = Scene().add(always(one), always(0)).add(always(other), always(0))
    assert_exactly_these(*scene.refined(), scene.trains, 0.9)


@pytest.mark.parametrize("burst", [False, True], ids=["two neurons", "bursts"])
def test_sizes_alone_tell_two_neurons_unless_the_small_follow_the_large(burst: bool) -> None:
    one, other = Cell(18.0, 12.0, 20.0), Cell(13.0, 15.0, 20.0, width=2.7)
    scene = Scene().add(always(one), always(0))
    scene.add(always(other), always(0), times=scene.trains[0] + 240 if burst else None)
    bank, matches = scene.refined()
    if burst:
        assert_exactly_these(bank, matches, [np.sort(np.concatenate(scene.trains))], 0.9)
    else:
        assert_exactly_these(bank, matches, scene.trains, 0.85)


def test_a_quarter_of_a_units_size_is_another_neuron() -> None:
    """No burst makes spikes so much smaller."""
    scene = Scene().add(always(Cell(24.0, 30.0, 20.0)), always(0)).add(always(Cell(6.0, 30.0, 20.0)), always(1))
    assert_exactly_these(*scene.refined(), scene.trains, 0.9)


def test_a_row_that_never_fires_alone_is_given_what_fires_with_it() -> None:
    """So the halves of spikes that were taken for two become one again; what meets by chance does not."""
    rng = np.random.default_rng(6)
    halves = np.sort(rng.integers(0, N_LENGTH, 100))
    others, third = (np.sort(rng.integers(0, N_LENGTH, 300)) for _ in range(2))
    trains = [halves, np.sort(np.concatenate([halves + 2, others])), third]
    bank = Bank(maker(PROBE), mean_snippets([LARGE, BROAD, FAINT], PROBE), np.full(3, 200), np.full(3, 5.0), RATE)
    refine = Refine(CONFIG, PROBE, white(PROBE.n_channels), SHAPES, [(0, np.zeros((N_LENGTH, 1), np.float32))], RATE)
    done = _Pass(bank, np.zeros(0, MATCH_DTYPE), [], [], [], np.zeros((3, 3)))
    missing = refine._halves(done, [0, 1, 2], trains)
    assert list(missing) == [0]
    np.testing.assert_array_equal(missing[0][2:], BROAD.at(PROBE)[:-2].astype(np.float32))


@pytest.mark.parametrize("neurons", [1, 2])
def test_rows_between_which_there_is_no_valley_are_one(neurons: int) -> None:
    """The spikes of one neuron, each with the row it is more like; and those of two, no further apart than such rows seem to be."""
    rng = np.random.default_rng(7)
    mean, other = (Cell(4.5, 30.0, 40.0, width=width).at(PROBE) for width in (2.2, 3.2))
    spikes = (mean + rng.normal(size=(400, *mean.shape))).astype(np.float32)
    second = np.arange(400) % 2 == 0
    if neurons == 1:
        axis = rng.normal(size=mean.shape)
        second = ((spikes - mean) * axis).sum(axis=(1, 2)) > 0
    else:
        spikes[second] += other - mean
    snippets = [list(spikes[~second]), list(spikes[second])]
    means = np.array([np.mean(part, axis=0) for part in snippets], np.float32)
    bank = Bank(maker(PROBE), means, np.full(2, 200), np.full(2, 5.0), RATE)
    refine = Refine(CONFIG, PROBE, white(PROBE.n_channels), SHAPES, [(0, np.zeros((N_LENGTH, 1), np.float32))], RATE)
    done = _Pass(bank, np.zeros(0, MATCH_DTYPE), [np.arange(4, dtype=np.int32)] * 2, snippets, [], np.zeros((2, 2)))
    assert refine._one_hill(done, 0, 1) == (neurons == 1)


def test_an_echo_is_no_unit() -> None:
    """What follows a unit's spikes at a fixed lag is part of them, however well it is clustered."""
    scene = Scene().add(always(LARGE), always(0))
    scene.add(always(ECHO), always(1), times=scene.trains[0] + 40)
    bank, matches = scene.refined()
    assert_exactly_these(bank, matches, scene.trains[:1], 0.95)
    alone = Scene().add(always(LARGE), always(0)).add(always(ECHO), always(1))
    assert_exactly_these(*alone.refined(), alone.trains, 0.85)  # the same spikes at times of their own


def kept(bank: Bank, trains: Sequence[Ints]) -> list[int]:
    """Ask which of these rows are units of their own, firing when `trains` say."""
    stretches = [(start, np.zeros((PERIOD, FAR.n_channels), np.float32)) for start in range(0, 80 * PERIOD, PERIOD)]
    refine = Refine(CONFIG, FAR, white(FAR.n_channels), SHAPES, stretches, RATE)
    matches = np.zeros(sum(len(train) for train in trains), MATCH_DTYPE)
    matches["row"], matches["sample_index"] = np.repeat(np.arange(len(trains)), [len(t) for t in trains]), np.concatenate(trains)
    matches["gain"] = 1e3
    n, snippets = len(bank), [[np.zeros((N_WHOLE, 1), np.float32)] * 2]
    channels, times = [np.zeros(1, np.int32)] * n, [train[:30].tolist() for train in trains]
    return refine._judge(_Pass(bank, matches, channels, snippets * n, times, np.zeros((n, n))))[0]


FAR = Probe.linear(60, 20.0)
FAR_LARGE = [Cell(14.0, 20.0 + 300.0 * k) for k in range(3)]
N_LENGTH = 80 * PERIOD


@pytest.mark.parametrize(("lag", "height", "echo"), [(15, 4.0, True), (15, 14.0, False), (60, 4.0, False)])
def test_what_several_far_units_leave_together_is_no_unit(lag: int, height: float, echo: bool) -> None:
    """A third of its spikes comes with each; none alone would tell. A strong one, or one that comes later, is a unit."""
    rng = np.random.default_rng(4)
    trains = [np.sort(rng.integers(0, N_LENGTH, 200)) for _ in range(3)]
    with_all = np.sort(np.concatenate([train[::5] + lag for train in trains] + [rng.integers(0, N_LENGTH, 60)]))
    cells = [*FAR_LARGE, Cell(height, 1150.0, 12.0)]
    bank = Bank(maker(FAR), mean_snippets(cells, FAR), np.full(4, 200), np.full(4, 10.0), RATE)
    assert all(row not in bank.templates.rivals[3] for row in range(3))
    assert kept(bank, [*trains, with_all]) == [0, 1, 2] + [3] * (not echo)


def test_a_unit_that_fires_with_others_by_chance_alone_is_one() -> None:
    """The others fire so often that many of its spikes come with some of theirs."""
    rng = np.random.default_rng(5)
    trains = [np.sort(rng.integers(0, N_LENGTH, 1500)) for _ in range(3)]
    cells = [*FAR_LARGE, Cell(4.0, 1150.0, 12.0)]
    bank = Bank(maker(FAR), mean_snippets(cells, FAR), np.full(4, 200), np.full(4, 10.0), RATE)
    own = np.sort(rng.integers(0, N_LENGTH, 300))
    near = np.abs(own[:, None] - np.concatenate(trains)).min(axis=1) <= RATE / 1000
    assert near.mean() > 0.35
    assert kept(bank, [*trains, own]) == [0, 1, 2, 3]


def test_a_unit_that_moves_is_one() -> None:
    """It goes from one channel to the next, so that it makes two clusters, one after the other."""
    scene = Scene().add(lambda t: Cell(13.0, 10.0 + 1.2 * t, 18.0), lambda t: int(t > 8)).add(always(BROAD), always(2))
    bank, matches = scene.refined()
    assert_exactly_these(bank, matches, scene.trains, 0.9)
    moved = bank.mean(int((accuracies(matches, 2, scene.trains)[:, 0]).argmax()))
    end, start = Cell(13.0, 34.0, 18.0).at(PROBE), Cell(13.0, 10.0, 18.0).at(PROBE)
    assert ((moved - end) ** 2).sum() < 0.3 * ((moved - start) ** 2).sum()  # the bank is that of the end


def test_noise_makes_no_units() -> None:
    nothing = Cell(1e-6, 30.0)
    bank, matches = Scene().add(always(nothing), always(0), rate_hz=15.0).refined()  # a cluster of chance crossings
    assert len(bank) == 0 and not len(matches)


def test_without_peaks_there_are_no_units() -> None:
    none = np.zeros(0, PEAK_DTYPE)
    n_snippet_samples = 48
    snippets = np.zeros((0, n_snippet_samples, 4), np.float32)
    clusters = calibrate(
        none,
        np.zeros((0, 8), np.float32),
        snippets,
        neighbors=PROBE.neighbors(100.0, 4),
        amplitudes=np.zeros(0, np.float32),
        detect_threshold=4.0,
        sampling_frequency=RATE,
        config=CONFIG.cluster,
        seed=0,
    )
    for warmup in ([], [(0, np.zeros((PERIOD, 4), np.float32))]):
        bank, matches = find_units(CONFIG, PROBE, RATE, warmup, none, clusters)
        assert len(bank) == 0 and not len(matches)


# --- seeds ---------------------------------------------------------------------------------------------------------------


def taken(seeds: Seeds, explained: Sequence[int] = ()) -> list[Floats]:
    """Show the seeds a residual in which sample s of channel c is s + c / 10, and ask for what is born."""
    residual = (np.arange(1000.0) + np.arange(4)[:, None] / 10).astype(np.float32)
    known = np.zeros(residual.shape, bool)
    known[:, list(explained)] = True
    seeds.take(residual, 5000, 5000 + 800, N_BEFORE, N_WHOLE, known)
    return seeds.births(3)


def test_a_seed_is_the_mean_of_its_unexplained_peaks() -> None:
    times = 5000 + np.array([100, 200, 300, 400, 500])
    born = taken(Seeds(times, np.zeros(5, np.int64), np.array([0, 0, 1, 0, -1])))
    assert len(born) == 1 and born[0].shape == (N_WHOLE, 4)
    middle = np.mean([100, 200, 400])
    np.testing.assert_allclose(born[0][N_BEFORE], middle + np.arange(4) / 10, rtol=1e-5)


def test_a_cluster_that_is_mostly_explained_gives_no_seed() -> None:
    times, channel = 5000 + 100 * np.arange(1, 9), np.zeros(8, np.int64)
    assert len(taken(Seeds(times, channel, channel), explained=[100, 200, 300])) == 1
    assert len(taken(Seeds(times, channel, channel), explained=[100, 200, 300, 400, 500])) == 0


def test_peaks_are_taken_once_and_in_their_time() -> None:
    seeds = Seeds(np.array([5100, 5200, 5300, 5950]), np.zeros(4, np.int64), np.zeros(4, np.int64))
    assert len(taken(seeds)) == 1
    assert not taken(seeds)


# --- simulated recordings ------------------------------------------------------------------------------------------------


def prepared(recording: Recording) -> tuple[Warmup, NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return traces, peaks, snippets and their noise levels as a sorter gathers them."""
    n_channels = recording.traces.shape[1]
    gain = np.full(n_channels, GAIN_UV, np.float32)
    info = StreamInfo("simulated", RATE, n_channels, recording.traces.dtype, gain, recording.probe, False)
    sorter, warmup, batches = Sorter(CONFIG, info), Warmup(), []
    for start in range(0, len(recording.traces), PERIOD):
        for batch in sorter.detect(Chunk(start, recording.traces[start : start + PERIOD])):
            warmup.add(batch)
            batches.append(batch)
        warmup.close()
    peaks, snippets = np.concatenate([batch.peaks for batch in batches]), np.concatenate([batch.snippets for batch in batches])
    return warmup, peaks, snippets, np.concatenate([batch.noise_level for batch in batches])


def components(snippets: Floats, n: int = 8) -> Floats:
    """Embed snippets by their principal components: any embedding will do."""
    flat = snippets.reshape(len(snippets), -1) - snippets.reshape(len(snippets), -1).mean(axis=0)
    embedded: Floats = flat @ np.linalg.svd(flat[::2], full_matrices=False)[2][:n].T
    return embedded


def found_in(recording: Recording) -> tuple[Bank, NDArray[Any], NDArray[Any]]:
    """Run both halves of calibration; return bank, matches and peaks."""
    warmup, peaks, snippets, level = prepared(recording)
    snippets = (snippets / np.where(level > 0, level, np.inf)[:, None]).astype(np.float32)
    cutter = Snippets(CONFIG.snippets, recording.probe, RATE)
    clusters = calibrate(
        peaks,
        components(snippets),
        snippets,
        neighbors=cutter.neighbors,
        amplitudes=np.abs(snippets[:, cutter.n_before, 0]),
        detect_threshold=CONFIG.detect.detect_threshold,
        sampling_frequency=RATE,
        config=CONFIG.cluster,
        seed=0,
    )
    return *find_units(CONFIG, recording.probe, RATE, warmup, peaks, clusters), peaks


def trains_of(recording: Recording, from_s: float = 1.2) -> list[Ints]:
    """Return each unit's spikes from when the noise level is known."""
    late = recording.truth.sample_index > from_s * RATE
    return [recording.truth.sample_index[late & (recording.truth.unit_index == unit)] for unit in range(recording.config.n_units)]


def simulated(**changes: Any) -> Recording:
    return simulate_recording(SimulationConfig(seconds=20, probe_name="tetrode", n_units=4, rates_hz=(8, 20), **changes))


@pytest.mark.timeout(60)
def test_a_tetrodes_units_are_found_the_one_below_the_threshold_too() -> None:
    recording = simulated(snr=(2.5, 14.0), seed=2)
    trains = trains_of(recording)
    bank, matches, peaks = found_in(recording)
    seen = [hits(peaks["sample_index"], train, 9) / len(train) for train in trains]
    assert min(seen) < 0.5 < sorted(seen)[1]
    assert_exactly_these(bank, matches, trains, 0.85)


@pytest.mark.timeout(60)
def test_units_of_tissue_that_drifts_are_still_one_each() -> None:
    drift = {"drift_um": 10.0, "drift_kind": "zigzag", "drift_period_s": 80.0, "half_um": (15.0, 25.0)}
    recording = simulated(snr=(4.0, 14.0), seed=8, **drift)
    bank, matches, _ = found_in(recording)
    assert_exactly_these(bank, matches, trains_of(recording), 0.85)
