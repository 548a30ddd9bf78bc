"""The recipe as a whole: the size of the chunks makes no difference, threads make no difference, learning happens at its time."""

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import pytest
from checks import Kept
from numpy.typing import NDArray

from streamsort.config import SorterConfig
from streamsort.errors import StreamsortError
from streamsort.probe import Probe
from streamsort.records import SPIKE_DTYPE, Chunk, Flag, Gap, Output, StreamInfo
from streamsort.score import score
from streamsort.simulate import GAIN_UV, Recording, SimulationConfig, simulate_recording
from streamsort.sorter import Sorter
from streamsort.stream import Stream

CONFIG = SorterConfig.from_dict(
    {"warmup_s": 3.0, "preprocess": {"noise_s": 0.5, "noise_period_s": 0.5}, "cluster": {"birth_s": 5.0}}
)


@pytest.fixture(scope="module")
def recording() -> Recording:
    return simulate_recording(
        SimulationConfig(seconds=6.5, probe_name="tetrode", n_units=4, snr=(8, 16), rates_hz=(15, 40), drift_um=10, seed=5)
    )


def stream_info(recording: Recording, live: bool = False) -> StreamInfo:
    n_channels = recording.traces.shape[1]
    gain = np.full(n_channels, GAIN_UV, np.float32)
    return StreamInfo("simulated", 30000.0, n_channels, recording.traces.dtype, gain, recording.probe, live)


def chunks(traces: NDArray[Any], sizes: Iterable[int]) -> Iterable[Chunk]:
    start = 0
    for size in cycle(sizes):
        if start >= len(traces):
            return
        yield Chunk(start, traces[start : start + size])
        start += size


def sort(recording: Recording, sizes: Iterable[int], config: SorterConfig = CONFIG) -> tuple[Sorter, list[Output]]:
    sorter = Sorter(config, stream_info(recording))
    outputs = [output for chunk in chunks(recording.traces, sizes) for output in sorter.process(chunk)]
    sorter.settle()
    outputs[-1].ledger.extend(sorter.take_events())  # those of the last boundary
    return sorter, outputs


def spikes_of(outputs: Iterable[Output]) -> NDArray[Any]:
    """Return all spikes, in order of time; they come out a little out of order, those that no unit explains last."""
    spikes = np.concatenate([output.spikes for output in outputs])
    return spikes[np.lexsort((spikes["channel"], spikes["unit_id"], spikes["sample_index"]))]


def run(sorter: Sorter, traces: NDArray[Any], size: int) -> list[Output]:
    return [output for chunk in chunks(traces, [size]) for output in sorter.process(chunk)]


def ledger_of(outputs: Iterable[Output]) -> list[dict[str, Any]]:
    return [event for output in outputs for event in output.ledger]


@pytest.fixture(scope="module")
def whole(recording: Recording) -> list[Output]:
    return sort(recording, [3000])[1]


def test_units_are_found_and_right(recording: Recording, whole: list[Output]) -> None:
    found = score(spikes_of(whole), recording.truth, 30000.0, from_s=3.5)
    assert found.accuracy_mean > 0.85
    assert len(found.units) == 4


ONES = [1] * 1500 + [5000]  # single samples at ever other places of a learning period
RANDOM = np.random.default_rng(7).integers(1, 900, 200).tolist()


@pytest.mark.parametrize("sizes", [ONES, [7], [30], [300], [100_000], RANDOM], ids=["1", "7", "30", "300", "all", "random"])
def test_chunk_size_makes_no_difference(recording: Recording, whole: list[Output], sizes: list[int]) -> None:
    _, outputs = sort(recording, sizes)
    assert spikes_of(outputs).tobytes() == spikes_of(whole).tobytes()
    assert ledger_of(outputs) == ledger_of(whole)


class Played:
    """A source that hands out prepared chunks as fast as they are taken."""

    counters: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, recording: Recording, sizes: Iterable[int]) -> None:
        self.info = stream_info(recording)
        self._chunks = chunks(recording.traces, sizes)

    def __iter__(self) -> Iterable[Chunk]:
        return iter(self._chunks)

    def close(self) -> None:
        pass

    def __enter__(self) -> "Played":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("sizes", [[30], [3000], RANDOM], ids=["30", "3000", "random"])
def test_threads_make_no_difference(recording: Recording, whole: list[Output], sizes: list[int]) -> None:
    kept = Kept()
    with Stream(Played(recording, sizes), Sorter(CONFIG, stream_info(recording)), [kept]) as stream:
        stream.wait()
    assert spikes_of(kept.outputs).tobytes() == spikes_of(whole).tobytes()
    assert ledger_of(kept.outputs) == ledger_of(whole)


def test_every_spike_was_announced_in_time(whole: list[Output]) -> None:
    """`through_sample` is a promise: nothing older comes later."""
    for before, after in pairwise(whole):
        assert after.through_sample >= before.through_sample
        assert (after.spikes["sample_index"] >= before.through_sample).all()


def test_nothing_is_named_before_calibration(whole: list[Output]) -> None:
    spikes = spikes_of(whole)
    early = spikes["sample_index"] < 3 * 30000 - 100
    assert early.any() and (spikes["unit_id"][early] == -1).all()
    assert (spikes["confidence"][spikes["unit_id"] == -1] == 0).all()
    assert (spikes["unit_id"][spikes["sample_index"] > 3.1 * 30000] > 0).mean() > 0.5


def test_assignment_alone_learns_nothing(recording: Recording) -> None:
    sorter, _ = sort(recording, [3000])
    detecting = Sorter(CONFIG, sorter.info)
    batches = [b for chunk in chunks(recording.traces, [30000]) for b in detecting.detect(chunk) if len(b.peaks)]
    batch = batches[-1]  # each time it comes after a gap
    first, second = sorter.assign(batch), sorter.assign(batch)
    named = first.spikes["unit_id"] > 0
    assert named.sum() > 5
    assert first.spikes[named].tobytes() == second.spikes[second.spikes["unit_id"] > 0].tobytes()


def test_warmup_leaves_no_trace(recording: Recording, whole: list[Output]) -> None:
    sorter = Sorter(CONFIG, stream_info(recording))
    sorter.warmup()
    outputs = [output for chunk in chunks(recording.traces, [3000]) for output in sorter.process(chunk)]
    assert spikes_of(outputs).tobytes() == spikes_of(whole).tobytes()


def test_input_is_neither_written_nor_kept(recording: Recording, whole: list[Output]) -> None:
    sorter = Sorter(CONFIG, stream_info(recording))
    outputs = []
    for chunk in chunks(recording.traces, [3000]):
        lent = chunk.traces.copy()
        outputs += sorter.process(Chunk(chunk.start_sample, lent))
        assert (lent == chunk.traces).all()
        lent[:] = 0
    assert spikes_of(outputs).tobytes() == spikes_of(whole).tobytes()


def test_a_gap_is_passed_on_and_spikes_near_it_are_flagged(recording: Recording) -> None:
    sorter = Sorter(CONFIG, stream_info(recording))
    lost = Gap(120_000, 600, "gap")
    first, second = recording.traces[:120_000], recording.traces[120_600:]
    outputs = [o for part in chunks(first, [3000]) for o in sorter.process(part)]
    after = []
    for chunk in chunks(second, [3000]):
        gaps = (lost,) if chunk.start_sample == 0 else ()
        after += sorter.process(Chunk(chunk.start_sample + 120_600, chunk.traces, gaps=gaps))
    assert [gap for output in outputs + after for gap in output.gaps] == [lost]
    spikes = spikes_of(after)
    near = spikes["sample_index"] < 120_600 + 1400
    assert (spikes["flags"][near] & Flag.NEAR_GAP).all() and near.any()
    assert not (spikes["flags"][spikes["sample_index"] > 125_000] & Flag.NEAR_GAP).any()
    assert score(spikes, recording.truth, 30000.0, from_s=4.2).accuracy_mean > 0.85


def test_samples_seen_before_are_left_out_and_reported(recording: Recording, whole: list[Output]) -> None:
    sorter = Sorter(CONFIG, stream_info(recording))
    outputs = []
    for chunk in chunks(recording.traces, [3000]):
        start = max(chunk.start_sample - 500, 0)
        outputs += sorter.process(Chunk(start, recording.traces[start : chunk.end_sample]))
    assert spikes_of(outputs).tobytes() == spikes_of(whole).tobytes()
    gaps = [gap for output in outputs for gap in output.gaps]
    assert gaps[0] == Gap(2500, 500, "duplicate")
    assert sum(gap.n_samples for gap in gaps) == 500 * (len(recording.traces) // 3000 - 1)


@pytest.mark.parametrize("sizes", [[30], [7000], RANDOM], ids=["30", "7000", "random"])
def test_chunk_size_makes_no_difference_across_a_gap(recording: Recording, sizes: list[int]) -> None:
    """The gap covers the end of calibration and several learning boundaries."""

    def with_gap(sizes: Iterable[int]) -> NDArray[Any]:
        sorter, first, start = Sorter(CONFIG, stream_info(recording)), 80_000, 95_100
        parts = [*chunks(recording.traces[:first], sizes)]
        parts += [Chunk(c.start_sample + start, c.traces) for c in chunks(recording.traces[start:], sizes)]
        return spikes_of(output for part in parts for output in sorter.process(part))

    spikes = with_gap(sizes)
    assert spikes.tobytes() == with_gap([3000]).tobytes()
    assert (spikes["unit_id"] > 0).any()


def test_a_chunk_seen_before_changes_nothing(recording: Recording, whole: list[Output]) -> None:
    sorter = Sorter(CONFIG, stream_info(recording))
    outputs: list[Output] = []
    for chunk in chunks(recording.traces, [3000]):
        outputs += sorter.process(chunk)
        if chunk.start_sample in (30_000, 120_000):
            outputs += sorter.process(Chunk(chunk.start_sample - 6000, recording.traces[chunk.start_sample - 6000 :][:3000]))
    assert spikes_of(outputs).tobytes() == spikes_of(whole).tobytes()
    assert [g for o in outputs for g in o.gaps] == [Gap(24_000, 3000, "duplicate"), Gap(114_000, 3000, "duplicate")]


def test_a_second_without_any_good_sample_is_survived(recording: Recording, whole: list[Output]) -> None:
    traces = recording.traces.astype(np.float32) * np.float32(GAIN_UV)
    traces[100_000:130_000] = np.nan
    info = StreamInfo("float", 30000.0, 4, traces.dtype, np.ones(4, np.float32), recording.probe, False)
    sorter = Sorter(CONFIG, info)
    outputs = [output for chunk in chunks(traces, [3000]) for output in sorter.process(chunk)]
    assert sum(gap.n_samples for output in outputs for gap in output.gaps) == 30_000
    assert score(spikes_of(outputs), recording.truth, 30000.0, from_s=4.5).accuracy_mean > 0.8


def test_an_empty_chunk_still_delivers_its_gaps(recording: Recording) -> None:
    sorter = Sorter(CONFIG, stream_info(recording))
    gap = Gap(0, 300, "overrun")
    outputs = sorter.process(Chunk(300, recording.traces[:0], gaps=(gap,)))
    assert [g for output in outputs for g in output.gaps] == [gap]


def test_bad_samples_never_raise(recording: Recording) -> None:
    traces = recording.traces.astype(np.float32) * np.float32(GAIN_UV)
    traces[100_000:100_020, 1] = np.nan
    traces[150_000, :] = np.inf
    info = StreamInfo("float", 30000.0, 4, traces.dtype, np.ones(4, np.float32), recording.probe, False)
    sorter = Sorter(CONFIG, info)
    outputs = [output for chunk in chunks(traces, [3000]) for output in sorter.process(chunk)]
    assert [gap for output in outputs for gap in output.gaps] == [Gap(100_000, 20, "nan"), Gap(150_000, 1, "nan")]
    spikes = spikes_of(outputs)
    assert np.isfinite(spikes["amplitude_uv"]).all() and np.isfinite(spikes["confidence"]).all()
    assert score(spikes, recording.truth, 30000.0, from_s=3.5).accuracy_mean > 0.85


@pytest.mark.parametrize("n_channels", [1, 2, 4])
def test_few_channels_work(n_channels: int, recording: Recording) -> None:
    """Single electrodes and stereotrodes are padded with silent channels."""
    probe = Probe(recording.probe.channel_locations[:n_channels], np.zeros(n_channels, np.int32))
    gain = np.full(n_channels, GAIN_UV, np.float32)
    info = StreamInfo("few", 30000.0, n_channels, recording.traces.dtype, gain, probe, False)
    sorter = Sorter(CONFIG, info)
    part = np.ascontiguousarray(recording.traces[:, :n_channels])
    spikes = spikes_of(output for chunk in chunks(part, [3000]) for output in sorter.process(chunk))
    assert spikes.dtype == SPIKE_DTYPE
    assert (spikes["unit_id"] > 0).any()


@pytest.mark.parametrize("rate", [20_000.0, 24_414.0625, 32_000.0, 50_000.0])
def test_chunk_size_makes_no_difference_at_other_rates(rate: float, recording: Recording) -> None:
    """At 50 kHz a learning period is longer than the matcher's window."""
    info = replace(stream_info(recording), sampling_frequency=rate)
    small, large = (spikes_of(run(Sorter(CONFIG, info), recording.traces, size)) for size in (100, 100_000))
    assert small.tobytes() == large.tobytes() and (small["unit_id"] > 0).sum() > 50


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_dead_channels_are_survived(value: float, recording: Recording) -> None:
    traces = recording.traces.astype(np.float32) * np.float32(GAIN_UV)
    traces[:, 2] = value
    info = StreamInfo("dead", 30000.0, 4, traces.dtype, np.ones(4, np.float32), recording.probe, False)
    spikes = spikes_of(run(Sorter(CONFIG, info), traces, 3000))
    assert np.isfinite(spikes["amplitude_uv"]).all() and (spikes["unit_id"] > 0).sum() > 50
    assert (spikes["channel"] != 2).all()


@pytest.mark.parametrize("at", [60_000, 150_000], ids=["warmup", "live"])
def test_a_huge_artifact_is_survived(at: int, recording: Recording) -> None:
    traces = recording.traces.astype(np.float32) * np.float32(GAIN_UV)
    traces[at : at + 10] = 1e8
    info = StreamInfo("float", 30000.0, 4, traces.dtype, np.ones(4, np.float32), recording.probe, False)
    spikes = spikes_of(run(Sorter(CONFIG, info), traces, 3000))
    assert np.isfinite(spikes["amplitude_uv"]).all() and np.isfinite(spikes["confidence"]).all()
    assert (spikes["unit_id"][spikes["sample_index"] > at + 15_000] > 0).sum() > 50


def test_silence_makes_no_units() -> None:
    info = StreamInfo("silent", 30000.0, 4, np.dtype(np.int16), np.ones(4, np.float32), Probe.linear(4), False)
    sorter = Sorter(CONFIG, info)
    outputs = [o for chunk in chunks(np.zeros((150_000, 4), np.int16), [3000]) for o in sorter.process(chunk)]
    assert len(spikes_of(outputs)) == 0
    assert sorter.units_table() == []


def test_noise_alone_makes_no_units(rng: np.random.Generator) -> None:
    noise = rng.normal(0, 40, (300_000, 4)).astype(np.int16)
    info = StreamInfo("noise", 30000.0, 4, noise.dtype, np.full(4, 0.2, np.float32), Probe.linear(4), False)
    sorter = Sorter(SorterConfig.from_dict({**CONFIG.to_dict(), "detect": {"detect_threshold": 3.2}}), info)
    spikes = spikes_of(o for chunk in chunks(noise, [3000]) for o in sorter.process(chunk))
    assert len(spikes) > 200
    assert sorter.calibrated and sorter.units_table() == []


def test_a_chunk_of_another_width_is_refused(recording: Recording) -> None:
    sorter = Sorter(CONFIG, stream_info(recording))
    with pytest.raises(StreamsortError, match=r"shape \(30, 3\), expected \(n, 4\)"):
        sorter.process(Chunk(0, recording.traces[:30, :3]))


def test_a_snippet_the_model_was_not_made_for_is_refused(recording: Recording) -> None:
    config = SorterConfig.from_dict({"snippets": {"ms_after": 1.5}})
    with pytest.raises(StreamsortError, match=r"set snippets\.ms_before"):
        Sorter(config, stream_info(recording))


STREAMED = """
import numpy as np
from streamsort.config import SorterConfig
from streamsort.kernels import assign, cluster, detect, learn, match, preprocess
from streamsort.records import Chunk, StreamInfo
from streamsort.simulate import GAIN_UV, SimulationConfig, simulate_recording
from streamsort.sorter import Sorter

def signatures():
    return {
        name: len(kernel.signatures)
        for module in (assign, cluster, detect, learn, match, preprocess)
        for name, kernel in vars(module).items()
        if hasattr(kernel, "signatures")
    }

made = simulate_recording(SimulationConfig(seconds=5, probe_name="tetrode", n_units=3, snr=(8, 16), rates_hz=(15, 40)))
info = StreamInfo("made", 30000.0, 4, made.traces.dtype, np.full(4, GAIN_UV, np.float32), made.probe, False)
sorter = Sorter(SorterConfig.from_dict({"warmup_s": 3.0, "preprocess": {"noise_s": 0.5}}), info)
sorter.warmup()
before = signatures()
made.traces.flags.writeable = False
for start in range(0, len(made.traces), 300):
    sorter.process(Chunk(start, made.traces[start : start + 300]))
assert sorter.units_table()
names = ("clean_snippets", "teach", "compare_spikes", "slide", "follow", "find_peaks", "advance", "score", "nearest_spikes")
used = min(before[name] for name in names)
print(max(signatures().values()), signatures() == before, used)
"""


def test_nothing_is_compiled_while_streaming() -> None:
    done = subprocess.run([sys.executable, "-c", STREAMED], capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["1", "True", "1"], done.stderr
