"""What is left out when there is no time: in order, told, and never a peak lost or published twice."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamsort.config import SorterConfig, StreamConfig
from streamsort.records import UNSORTED, Chunk, Flag, Output, StreamInfo
from streamsort.score import score
from streamsort.shed import Level, Shedder
from streamsort.simulate import GAIN_UV, Recording, SimulationConfig, simulate_recording
from streamsort.sorter import Sorter

RATE = 30_000
CONFIG = SorterConfig.from_dict({"warmup_s": 4.0, "preprocess": {"noise_s": 0.5, "noise_period_s": 0.5}})
BEGINS_S = {4.5: Level.NEAREST, 6.0: Level.CROSSINGS, 7.5: Level.NOT_TAUGHT, 8.5: Level.SORTED}
END_S = 10.0


@pytest.fixture(scope="module")
def recording() -> Recording:
    return simulate_recording(
        SimulationConfig(seconds=END_S, probe_name="tetrode", n_units=4, snr=(8, 16), rates_hz=(10, 25), seed=5)
    )


def outputs_of(recording: Recording, levels: dict[float, Level]) -> Iterator[Output]:
    traces = recording.traces
    gain = np.full(traces.shape[1], GAIN_UV, np.float32)
    sorter = Sorter(CONFIG, StreamInfo("simulated", RATE, traces.shape[1], traces.dtype, gain, recording.probe, True))
    for start in range(0, len(traces), 300):
        if start / RATE in levels:
            sorter.shed(levels[start / RATE])
        yield from sorter.process(Chunk(start, traces[start : start + 300]))


@pytest.fixture(scope="module")
def shed(recording: Recording) -> list[Output]:
    return list(outputs_of(recording, BEGINS_S))


@pytest.fixture(scope="module")
def spikes(shed: list[Output]) -> NDArray[Any]:
    found = np.concatenate([output.spikes for output in shed])
    return found[np.argsort(found["sample_index"], kind="stable")]


def between(spikes: NDArray[Any], first_s: float, last_s: float) -> NDArray[Any]:
    """Return the spikes of a span, but for a little after it began: what is under way is finished as it was begun."""
    return spikes[(spikes["sample_index"] > (first_s + 0.01) * RATE) & (spikes["sample_index"] < (last_s - 0.01) * RATE)]


def test_the_nearest_template_names_most_spikes_rightly(recording: Recording, spikes: NDArray[Any]) -> None:
    named = between(spikes, 4.5, 6.0)
    assert (named["flags"] & Flag.NEAREST_TEMPLATE).all()
    assert score(spikes, recording.truth, RATE, from_s=4.5, to_s=6.0).accuracy_mean > 0.75


def test_crossings_are_all_published_without_a_unit(recording: Recording, spikes: NDArray[Any]) -> None:
    crossings = between(spikes, 6.0, 7.5)
    assert (crossings["unit_id"] == UNSORTED).all() and (crossings["flags"] & Flag.UNTRIED).all()
    true = recording.truth.sample_index
    true = true[(true > 6.01 * RATE) & (true < 7.49 * RATE)]
    reach = np.abs(true[:, None] - crossings["sample_index"]).min(axis=1)
    assert (reach < 30).mean() > 0.97  # two at once are one crossing


@pytest.mark.parametrize(("first_s", "last_s"), [(7.5, 8.5), (8.5, END_S)])
def test_sorting_goes_on_where_it_was(recording: Recording, spikes: NDArray[Any], first_s: float, last_s: float) -> None:
    sorted_again = between(spikes, first_s, last_s)
    assert not (sorted_again["flags"] & (Flag.NEAREST_TEMPLATE | Flag.UNTRIED)).any()
    found = score(spikes, recording.truth, RATE, from_s=4.0, to_s=4.5), score(spikes, recording.truth, RATE, first_s, last_s)
    assert found[1].accuracy_mean > 0.85
    assert {unit.unit_true: unit.unit_id for unit in found[0].units} == {unit.unit_true: unit.unit_id for unit in found[1].units}


def test_no_unit_fires_twice_at_once_where_one_level_follows_another(spikes: NDArray[Any]) -> None:
    for unit_id in np.unique(spikes["unit_id"][spikes["unit_id"] != UNSORTED]):
        assert np.diff(spikes["sample_index"][spikes["unit_id"] == unit_id]).min() > 20


def test_the_ledger_tells_of_each_change(shed: list[Output]) -> None:
    told = [event for output in shed for event in output.ledger if event["event"] == "shedding"]
    assert [event["level"] for event in told] == [level.name.lower() for level in BEGINS_S.values()]
    for event, at_s in zip(told, BEGINS_S, strict=True):
        assert at_s * RATE - 200 < event["sample_index"] <= at_s * RATE


def test_without_learning_spikes_are_those_of_the_templates_in_force(recording: Recording) -> None:
    """Learning put off from the first unit on names the same spikes until the first lesson would have taken force."""
    taught, untaught = (
        np.concatenate([output.spikes for output in outputs_of(recording, levels)]) for levels in ({}, {4.0: Level.NOT_TAUGHT})
    )
    until = round(4.4 * RATE)
    assert taught[taught["sample_index"] < until].tobytes() == untaught[untaught["sample_index"] < until].tobytes()
    assert taught.tobytes() != untaught.tobytes()


@given(waits_s=st.lists(st.floats(0, 1), min_size=1, max_size=60), step_s=st.floats(0.001, 0.9))
def test_levels_rise_at_once_and_fall_one_at_a_time_after_a_calm_second(waits_s: list[float], step_s: float) -> None:
    shedder, last, fell_s = Shedder(StreamConfig(shed_ms=20.0)), Level.SORTED, -np.inf
    for k, wait_s in enumerate(waits_s):
        level = shedder.see(wait_s, k * step_s)
        needed = sum(wait_s > limit for limit in (0.02, 0.06, 0.18))
        assert level >= needed
        if level > last:
            assert level == needed
        elif level < last:
            assert level == last - 1 and wait_s <= 0.01
            assert k * step_s - fell_s >= 0.99
            fell_s = k * step_s
        last = level
