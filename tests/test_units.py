"""Identities: ids are never given twice, states do not flicker, and what happens to a unit is in the ledger with its numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from streamsort.drift import DriftWatch
from streamsort.quality import NAMES
from streamsort.records import SPIKE_DTYPE, UNSORTED, Flag
from streamsort.units import DORMANT_S, PROBATION_SPIKES, REVIVED_SPIKES, Registry
from streamsort.wire import to_json

RATE = 1000.0
MINUTE = 60_000


def see(
    registry: Registry, unit_id: int, samples: NDArray[Any], height: Any = 8.0, confidence: float = 0.9, far: float = 32.0
) -> None:
    """Show a unit's spikes to the registry, a period of a quarter of a second at a time."""
    spikes = np.zeros(len(samples), SPIKE_DTYPE)
    heights = np.broadcast_to(np.float32(height), len(samples))
    spikes["sample_index"], spikes["unit_id"], spikes["amplitude_uv"] = samples, unit_id, -heights * 8
    spikes["confidence"] = confidence
    periods = samples // 250
    for k in np.unique(periods).tolist():
        mine = periods == k
        registry.see(spikes[mine], heights[mine], np.full(mine.sum(), far, np.float32), (k + 1) * 250, np.full(mine.sum(), 100.0))
        registry.note_silence((k + 1) * 250)


def events(registry: Registry) -> list[tuple[str, int]]:
    return [(event["event"], event["unit_id"]) for event in registry.take_events()]


def state(registry: Registry, unit_id: int = 1) -> str:
    found: str = next(row["state"] for row in registry.table(0) if row["unit_id"] == unit_id)
    return found


def grown(n_units: int = 2, n_spikes: int = 2 * PROBATION_SPIKES) -> Registry:
    """Return a registry of units that have fired regularly since 0 and were confirmed; its ledger was taken."""
    registry = Registry(RATE)
    for unit_id in [registry.born(0, "test") for _ in range(n_units)]:
        see(registry, unit_id, np.arange(n_spikes) * 20 + 5)
    registry.take_events()
    return registry


def test_ids_only_grow() -> None:
    registry = Registry(RATE)
    ids = [registry.born(k, "test") for k in range(5)]
    assert ids == [1, 2, 3, 4, 5]
    assert registry.slots().tolist() == ids
    assert events(registry) == [("born", k) for k in ids]
    assert registry.take_events() == []


def test_born_tells_the_slot_and_the_evidence() -> None:
    registry = Registry(RATE)
    registry.born(7, "new cluster", n_spikes=15)
    expected = {"event": "born", "sample_index": 7, "unit_id": 1, "into": None, "reason": "new cluster", "slot": 0, "n_spikes": 15}
    assert registry.take_events() == [expected]


def test_probation_ends_with_spikes_and_flags_them_until_then() -> None:
    registry = Registry(RATE)
    registry.born(0, "test")
    see(registry, 1, np.arange(PROBATION_SPIKES - 1) * 10)
    assert state(registry) == "probation"
    assert registry.flags(np.array([1, -1])).tolist() == [Flag.PROBATION, 0]
    assert events(registry) == [("born", 1)]
    see(registry, 1, np.array([2000]))
    assert state(registry) == "stable"
    assert registry.flags(np.array([1, -1])).tolist() == [0, 0]
    confirmed = registry.take_events()[0]
    assert (confirmed["event"], confirmed["n_spikes"], confirmed["expected_accuracy"]) == ("confirmed", PROBATION_SPIKES, 0.9)


@pytest.mark.parametrize(
    "bad",
    [
        lambda n, rng: {"confidence": 0.6},
        lambda n, rng: {"height": 4.0 + rng.exponential(0.5, n)},  # the tail of what noise there is above a threshold
    ],
    ids=["unsure", "noise"],
)
def test_a_bad_unit_leaves_probation_as_unstable(bad: Callable[..., dict[str, Any]], rng: np.random.Generator) -> None:
    registry, n = Registry(RATE), 3 * PROBATION_SPIKES
    registry.born(0, "test")
    see(registry, 1, np.arange(n) * 20, **bad(n, rng))
    assert state(registry) == "unstable"
    assert [event for event, _ in events(registry)] == ["born", "unstable"]
    assert registry.flags(np.array([1])).tolist() == [0]


def test_refractory_violations_make_a_unit_unstable(rng: np.random.Generator) -> None:
    """Two neurons under one id, 20 Hz each: half of the spikes are the other's."""
    registry = Registry(RATE)
    registry.born(0, "test")
    times = np.sort(np.concatenate([np.cumsum(3 + rng.exponential(47.0, 4000)) for _ in range(2)])).astype(np.int64)
    see(registry, 1, times, confidence=1.0)
    assert state(registry) == "unstable"
    assert registry.take_events()[-1]["contamination"] > 0.3


@pytest.mark.parametrize(("threshold", "found", "tolerance"), [(0.0, 1.0, 0.05), (4.0, 0.84, 0.1), (5.0, 0.5, 0.2)])
def test_a_clipped_distribution_of_heights_costs_what_it_misses(
    threshold: float, found: float, tolerance: float, rng: np.random.Generator
) -> None:
    registry, heights = Registry(RATE), rng.normal(5.0, 1.0, 2000)
    heights = heights[heights > threshold]
    registry.born(0, "test")
    see(registry, 1, np.arange(len(heights)) * 20, height=heights, confidence=1.0)
    assert registry.table(0)[0]["quality"] == pytest.approx(found, abs=tolerance)


def test_an_amplitude_that_goes_up_and_down_is_no_clipped_distribution(rng: np.random.Generator) -> None:
    registry, n = Registry(RATE), 3000
    registry.born(0, "test")
    moves = 6 + 4 * np.sin(np.arange(n) / 190) ** 4  # passes by a contact now and then
    see(registry, 1, np.arange(n) * 20, height=moves * rng.normal(1.0, 0.1, n), confidence=0.95)
    assert state(registry) == "stable"
    assert {event for event, _ in events(registry)} == {"born", "confirmed", "drift_alarm"}


def test_between_the_thresholds_nothing_changes() -> None:
    registry = grown(1)
    for k, confidence in enumerate([0.72, 0.88, 0.73, 0.9]):
        see(
            registry,
            1,
            np.arange(10_000) // 200 * 20_000 + np.arange(10_000) % 200 * 20 + 10_000 + k * MINUTE * 20,
            confidence=confidence,
        )
        assert state(registry) == "stable"
    assert events(registry) == []


def test_a_unit_that_falls_off_comes_back_only_when_it_is_good() -> None:
    registry = grown(1)
    fired = np.arange(200) * 20
    for start, confidence, expected in [(10_000, 0.5, "unstable"), (30_000, 0.76, "unstable"), (50_000, 0.95, "stable")]:
        see(registry, 1, fired + start, confidence=confidence)
        assert state(registry) == expected
    lines = registry.take_events()
    assert [line["event"] for line in lines] == ["unstable", "stable"]
    assert lines[0]["confidence"] < 0.7 and lines[1]["confidence"] >= 0.8


def test_silence_is_noted_once_and_so_is_the_return() -> None:
    registry = grown(2)
    see(registry, 2, np.arange(4_000, 33_000, 10))
    assert ("dormant", 1) not in events(registry)
    see(registry, 2, np.arange(33_000, 70_000, 10))
    line = next(event for event in registry.take_events() if event["event"] == "dormant")
    assert (line["unit_id"], line["n_spikes"]) == (1, 200) and line["silent_s"] == pytest.approx(DORMANT_S, abs=0.3)
    assert state(registry, 1) == "dormant"
    see(registry, 1, np.array([70_500, 70_900]))
    assert state(registry, 1) == "dormant"
    see(registry, 1, np.array([71_000]))
    assert state(registry, 1) == "stable"
    revived = registry.take_events()
    assert [(event["event"], event["unit_id"]) for event in revived] == [("revived", 1)]
    assert revived[0]["silent_s"] == pytest.approx(66.5, abs=0.1)


def test_a_unit_silent_for_ten_minutes_returns_under_its_id() -> None:
    registry = grown(1)
    for k in range(10 * 60 * 4):
        registry.note_silence(4_000 + (k + 1) * 250)
    see(registry, 1, np.arange(PROBATION_SPIKES) * 20 + 610_000)
    assert events(registry) == [("dormant", 1), ("revived", 1)]
    assert state(registry) == "stable" and registry.slots().tolist() == [1]


def test_a_long_silence_makes_no_unit_bad() -> None:
    registry = grown(1, n_spikes=400)
    see(registry, 1, np.array([9000, 9001]), confidence=1.0)
    before = registry.units[1].contamination
    see(registry, 1, np.array([20 * MINUTE]), confidence=1.0)
    assert 0 < before < 0.2 and registry.units[1].contamination < 1.8 * before


def test_stray_spikes_do_not_wake_a_unit() -> None:
    registry = grown(1)
    registry.note_silence(2 * MINUTE)
    see(registry, 1, np.arange(20) * (int(DORMANT_S * RATE) // (REVIVED_SPIKES - 1) + 500) + 3 * MINUTE)
    registry.note_silence(30 * MINUTE)
    assert events(registry) == [("dormant", 1)]
    assert state(registry) == "dormant"


def test_a_change_of_distance_raises_an_alarm_and_marks_the_unit() -> None:
    registry = grown(1)
    see(registry, 1, np.arange(5000, 9000, 10), far=60.0)
    alarm, unstable = registry.take_events()[:2]
    assert (alarm["event"], alarm["reason"]) == ("drift_alarm", "distance to its prototype changed")
    assert alarm["before"] == 32 and alarm["after"] > 32
    assert (unstable["event"], unstable["reason"]) == ("unstable", "after a drift alarm")
    assert state(registry) == "unstable"
    see(registry, 1, np.arange(9000, 21_000, 10), far=60.0)
    assert state(registry) == "stable"


def test_a_fall_in_amplitude_is_told_but_is_no_fault() -> None:
    registry = grown(1)
    see(registry, 1, np.arange(5000, 9000, 10), height=5.0)
    alarm = registry.take_events()[0]
    assert (alarm["event"], alarm["reason"], alarm["of"]) == ("drift_alarm", "amplitude fell", "amplitude")
    assert state(registry) == "stable"


def test_the_table_has_running_means_and_metrics() -> None:
    registry = grown(1, n_spikes=7000)
    row = registry.table(140_000)[0]
    assert (row["n_spikes"], row["amplitude_uv"], row["confidence"], row["quality"]) == (7000, -64.0, 0.9, 0.9)
    assert row["firing_rate_hz"] == pytest.approx(50, rel=0.01)
    assert set(NAMES) < set(row)
    assert (row["snr"], row["presence_ratio"], row["isi_violations_count"], row["drift_ptp"]) == (8.0, 1.0, 0, 0.0)
    assert row["amplitude_median"] == pytest.approx(-64, rel=0.003) and row["firing_rate"] == pytest.approx(50, rel=0.01)
    assert row["num_spikes"] == pytest.approx(7000, abs=600)  # up to ten seconds old


def test_what_is_not_known_is_null_on_the_wire() -> None:
    registry = Registry(RATE)
    registry.born(0, "test")
    assert b'"presence_ratio":null' in to_json(registry.table(0)) and b"NaN" not in to_json(registry.table(0))


def test_metrics_are_renewed_in_turns() -> None:
    """Six units whose spikes come in the same periods do not all take their time in the same one."""
    registry = grown(6)
    ages = []
    for k in range(80):
        for unit_id in range(1, 7):
            see(registry, unit_id, np.arange(5) * 50 + 5000 + k * 250)
        ages.append([row["num_spikes"] for row in registry.table(0)])
    changed = (np.diff(ages, axis=0) != 0).sum(axis=1)
    assert changed.max() == 1 and changed.sum() >= 6


def test_merging_ends_one_unit_and_keeps_its_slot_empty() -> None:
    registry = grown(3)
    registry.merge(2, 1, 5000, "same template", similarity=0.97)
    line = registry.take_events()[0]
    assert (line["event"], line["unit_id"], line["into"], line["similarity"]) == ("merged", 2, 1, 0.97)
    assert (line["n_spikes"], line["into_n_spikes"]) == (200, 200)
    assert registry.slots().tolist() == [1, UNSORTED, 3]
    assert [row["unit_id"] for row in registry.table(5000)] == [1, 3]
    assert [registry.current(k) for k in (1, 2, 3, 4)] == [1, 1, 3, UNSORTED]
    assert registry.born(5000, "test") == 4 and registry.slots().tolist() == [1, UNSORTED, 3, 4]


def test_spikes_of_a_merged_unit_count_for_its_heir() -> None:
    registry = grown(3)
    registry.merge(2, 1, 5000, "test")
    registry.retire(3, 5000, "test")
    see(registry, 2, np.arange(5000, 5100, 20))
    see(registry, 3, np.arange(5000, 5100, 20))
    assert [row["n_spikes"] for row in registry.table(6000)] == [205]


def test_a_sleeper_that_fires_under_another_id_wakes_by_merging() -> None:
    registry = grown(1)
    registry.note_silence(10 * MINUTE)
    other = registry.born(10 * MINUTE, "new cluster")
    see(registry, other, np.arange(50) * 20 + 10 * MINUTE)
    registry.merge(other, 1, 10 * MINUTE + 1000, "same template")
    assert events(registry) == [("dormant", 1), ("born", 2), ("merged", 2), ("revived", 1)]
    registry.note_silence(10 * MINUTE + 2000)
    assert state(registry) == "stable" and events(registry) == []


def test_splitting_keeps_the_id_for_the_rest_which_proves_itself_anew() -> None:
    registry = grown(1)
    registry.units[1].channel_index = 5
    part = registry.split(1, 5000, "two hills", valley=0.2)
    lines = registry.take_events()
    assert [(line["event"], line["unit_id"], line["into"]) for line in lines] == [("born", part, None), ("split", 1, part)]
    assert lines[1]["valley"] == 0.2 and lines[1]["n_spikes"] == 200
    assert registry.slots().tolist() == [1, part]
    assert {state(registry, 1), state(registry, part)} == {"probation"}
    assert registry.units[1].channel_index == 5


def test_retiring_is_for_good() -> None:
    registry = grown(2)
    registry.retire(1, 5000, "noise", snr=3.9, n_spikes=150)
    line = registry.take_events()[0]
    assert (line["event"], line["unit_id"], line["into"], line["snr"], line["n_spikes"]) == ("retired", 1, None, 3.9, 150)
    assert registry.current(1) == UNSORTED and registry.slots().tolist() == [UNSORTED, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.merge(1, 1, 0, ""), "merge: unit 1 into itself, expected two units"),
        (lambda r: r.merge(2, 9, 0, ""), "merge: unit 9, expected a living one"),
        (lambda r: r.merge(3, 1, 0, ""), "merge: unit 3, expected a living one"),
        (lambda r: r.split(3, 0, ""), "split: unit 3, expected a living one"),
        (lambda r: r.retire(-1, 0, ""), "retire: unit -1, expected a living one"),
    ],
)
def test_nonsense_is_refused_and_changes_nothing(change: Callable[[Registry], Any], message: str) -> None:
    registry = grown(3)
    registry.retire(3, 0, "test")
    registry.take_events()
    with pytest.raises(ValueError, match=f"^{message}$"):
        change(registry)
    assert registry.slots().tolist() == [1, 2, UNSORTED] and registry.take_events() == []


class Lives(RuleBasedStateMachine):
    """Whatever happens to units in whatever order, an id means one neuron and ends once."""

    ids = Bundle("ids")

    @initialize()
    def start(self) -> None:
        self.registry = Registry(RATE)
        self.now = 0
        self.ledger: list[dict[str, Any]] = []
        self.slot_of: dict[int, int] = {}
        self.ended: set[int] = set()

    @rule(target=ids)
    def born(self) -> int:
        return self.new(self.registry.born(self.now, "test"))

    @rule(target=ids, unit_id=ids)
    def split(self, unit_id: int) -> int:
        if unit_id in self.ended:
            with pytest.raises(ValueError):
                self.registry.split(unit_id, self.now, "test")
            return unit_id
        return self.new(self.registry.split(unit_id, self.now, "test"))

    @rule(old=ids, into=ids)
    def merge(self, old: int, into: int) -> None:
        if old == into or self.ended & {old, into}:
            with pytest.raises(ValueError):
                self.registry.merge(old, into, self.now, "test")
        else:
            self.registry.merge(old, into, self.now, "test")
            self.ended.add(old)

    @rule(unit_id=ids)
    def retire(self, unit_id: int) -> None:
        if unit_id in self.ended:
            with pytest.raises(ValueError):
                self.registry.retire(unit_id, self.now, "test")
        else:
            self.registry.retire(unit_id, self.now, "test")
            self.ended.add(unit_id)

    @precondition(lambda self: self.slot_of)
    @rule(units=st.lists(ids, min_size=1, max_size=4), n=st.integers(1, 60))
    def fire(self, units: list[int], n: int) -> None:
        spikes = np.zeros(n, SPIKE_DTYPE)
        spikes["sample_index"], spikes["unit_id"] = self.now + np.arange(n), np.resize(units, n)
        spikes["confidence"] = 0.9
        self.now += 250
        self.registry.see(spikes, np.full(n, 8, np.float32), np.full(n, 32, np.float32), self.now)

    @rule(seconds=st.sampled_from([1, 40, 600]))
    def wait(self, seconds: int) -> None:
        self.now += int(seconds * RATE)
        self.registry.note_silence(self.now)

    @rule(n_samples=st.integers(1, 100_000))
    def gap(self, n_samples: int) -> None:
        self.now += n_samples
        self.registry.skip_gap(n_samples)

    def new(self, unit_id: int) -> int:
        assert unit_id not in self.slot_of and unit_id > max(self.slot_of, default=0)
        self.slot_of[unit_id] = self.registry.units[unit_id].slot
        return unit_id

    @invariant()
    def an_id_lives_in_its_slot_until_it_ends_for_good(self) -> None:
        living = set(self.slot_of) - self.ended
        assert set(self.registry.units) == {row["unit_id"] for row in self.registry.table(self.now)} == living
        slots = self.registry.slots()
        assert len(slots) == len(self.slot_of) == len(set(self.slot_of.values()))
        assert {int(slots[slot]) for slot in range(len(slots))} - {UNSORTED} == living
        assert all(slots[self.slot_of[unit_id]] == unit_id for unit_id in living)

    @invariant()
    def an_id_leads_to_a_living_unit_or_to_one_that_was_retired(self) -> None:
        for unit_id in self.slot_of:
            heir = self.registry.current(unit_id)
            assert heir in self.registry.units or (heir == UNSORTED and unit_id in self.ended)
            assert unit_id in self.ended or heir == unit_id

    @invariant()
    def the_ledger_tells_it_in_order(self) -> None:
        for line in self.registry.take_events():
            name, unit_id = line["event"], line["unit_id"]
            gone = {earlier["unit_id"] for earlier in self.ledger if earlier["event"] in ("merged", "retired")}
            asleep = [earlier["event"] for earlier in self.ledger if earlier["unit_id"] == unit_id]
            assert unit_id not in gone and line["into"] not in gone
            assert name != "born" or not asleep
            assert name != "revived" or "dormant" in asleep
            if name in ("dormant", "revived"):
                turns = [event for event in asleep if event in ("dormant", "revived", "split")]
                assert turns[-1:] != [name]
            self.ledger.append(line)


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=60, stateful_step_count=40)


def test_steady_spikes_raise_no_alarm(rng: np.random.Generator) -> None:
    watch = DriftWatch()
    assert watch.update(rng.chisquare(32, 5000).tolist(), rng.normal(8, 1, 5000).tolist()) is None


def test_a_change_of_distance_raises_an_alarm(rng: np.random.Generator) -> None:
    watch = DriftWatch()
    assert watch.update(rng.chisquare(32, 500).tolist(), [8.0] * 500) is None
    alarm = watch.update(rng.chisquare(60, 500).tolist(), [8.0] * 500)
    assert alarm is not None and alarm.reason == "distance to its prototype changed"
    assert alarm.before == pytest.approx(32, rel=0.1) and alarm.after == pytest.approx(60, rel=0.1)


def test_a_gap_is_not_silence() -> None:
    registry = grown(1)
    registry.skip_gap(100_000)
    registry.note_silence(104_100)
    assert events(registry) == []
    registry.note_silence(150_000)
    assert events(registry) == [("dormant", 1)]
