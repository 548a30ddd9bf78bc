"""Identities: ids are never reused, and what happens to a unit is in the ledger."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from streamsort.drift import DriftWatch
from streamsort.records import SPIKE_DTYPE, Flag
from streamsort.units import PROBATION_SPIKES, Registry

RATE = 1000.0


def see(registry: Registry, unit_id: int, samples: NDArray[Any], height: float = 8.0) -> None:
    spikes = np.zeros(len(samples), SPIKE_DTYPE)
    spikes["sample_index"], spikes["unit_id"], spikes["amplitude_uv"] = samples, unit_id, -height * 8
    spikes["confidence"] = 0.9
    same = np.full(len(samples), height, np.float32)
    registry.see(spikes, same, np.full(len(samples), 32, np.float32), int(samples[-1]) + 1)
    registry.note_silence(int(samples[-1]) + 1)


def events(registry: Registry) -> list[tuple[str, int]]:
    return [(event["event"], event["unit_id"]) for event in registry.take_events()]


def test_ids_only_grow() -> None:
    registry = Registry(RATE)
    ids = [registry.born(k, "test") for k in range(5)]
    assert ids == [1, 2, 3, 4, 5]
    assert [unit.slot for unit in registry.units.values()] == [0, 1, 2, 3, 4]
    assert events(registry) == [("born", k) for k in ids]
    assert registry.take_events() == []


def test_born_tells_the_slot() -> None:
    registry = Registry(RATE)
    registry.born(7, "calibration")
    expected = {"event": "born", "sample_index": 7, "unit_id": 1, "into": None, "reason": "calibration", "slot": 0}
    assert registry.take_events() == [expected]


def test_probation_ends_with_spikes_and_flags_them_until_then() -> None:
    registry = Registry(RATE)
    registry.born(0, "test")
    see(registry, 1, np.arange(PROBATION_SPIKES - 1) * 10)
    assert registry.table(1000)[0]["state"] == "probation"
    assert registry.flags(np.array([1, -1])).tolist() == [Flag.PROBATION, 0]
    see(registry, 1, np.array([2000]))
    assert registry.table(2001)[0]["state"] == "stable"
    assert registry.flags(np.array([1, -1])).tolist() == [0, 0]


def test_silence_is_noted_once_and_so_is_the_return() -> None:
    registry = Registry(RATE)
    first, second = registry.born(0, "test"), registry.born(0, "test")
    see(registry, first, np.arange(0, 10_000, 10))
    see(registry, second, np.arange(10_000, 35_000, 10))
    assert ("dormant", first) not in events(registry)
    see(registry, second, np.arange(35_000, 60_000, 10))
    see(registry, second, np.arange(60_000, 70_000, 10))
    assert [event for event in events(registry) if event[0] == "dormant"] == [("dormant", first)]
    assert registry.table(70_000)[0]["state"] == "dormant"
    see(registry, first, np.array([70_500]))
    assert ("revived", first) in events(registry)
    assert registry.table(70_501)[0]["state"] == "stable"


def test_a_fall_in_amplitude_raises_an_alarm_and_marks_the_unit() -> None:
    registry = Registry(RATE)
    registry.born(0, "test")
    see(registry, 1, np.arange(0, 5000, 10), height=9.0)
    assert [event["event"] for event in registry.take_events()] == ["born"]
    see(registry, 1, np.arange(5000, 7000, 10), height=6.0)
    alarm = registry.take_events()[0]
    assert (alarm["event"], alarm["reason"]) == ("drift_alarm", "amplitude fell")
    assert registry.table(7000)[0]["state"] == "unstable"
    assert registry.table(7000 + 11_000)[0]["state"] == "stable"


def test_the_table_has_running_means() -> None:
    registry = Registry(RATE)
    registry.born(0, "test")
    see(registry, 1, np.arange(0, 5000, 10))
    row = registry.table(5000)[0]
    assert (row["n_spikes"], row["snr"], row["amplitude_uv"], row["quality"]) == (500, 8.0, -64.0, 0.9)
    assert row["firing_rate_hz"] == pytest.approx(100, rel=0.01)


def test_steady_spikes_raise_no_alarm(rng: np.random.Generator) -> None:
    watch = DriftWatch()
    alarms = [watch.update(float(d), float(a)) for d, a in zip(rng.chisquare(32, 5000), rng.normal(8, 1, 5000), strict=True)]
    assert not any(alarms)


def test_a_change_of_distance_raises_an_alarm(rng: np.random.Generator) -> None:
    watch = DriftWatch()
    alarms = [watch.update(float(d), 8.0) for d in [*rng.chisquare(32, 500), *rng.chisquare(60, 500)]]
    assert "distance to its prototype changed" in alarms


def test_a_gap_is_not_silence() -> None:
    registry = Registry(RATE)
    unit = registry.born(0, "test")
    see(registry, unit, np.arange(0, 10_000, 10))
    registry.skip_gap(100_000)
    registry.note_silence(110_100)
    assert events(registry) == [("born", unit)]
    registry.note_silence(150_000)
    assert events(registry) == [("dormant", unit)]
