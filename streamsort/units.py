"""Published identities and the ledger of what happened to them.

A cluster or template is an internal thing that comes and goes; a unit is a promise to a decoder. Ids come from one counter that
only grows, and so do slots, the places in a decoder's input vector: neither is ever given to another unit. A unit is born on
probation, is confirmed when it has shown enough good spikes, may be unstable for a while, and sleeps (dormant) through any silence
until it fires again. It ends only when it is told so: merged into another, or retired.

Every such event is a line of the ledger with the sample index at which it took effect, the reason, and the numbers it rests on. The
registry changes at learning boundaries only.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.drift import Alarm, DriftWatch
from streamsort.quality import ISI_THRESHOLD_S, NAMES, Quality
from streamsort.records import UNSORTED, Flag

PROBATION_SPIKES = 100  # below this a unit's numbers are not yet to be relied on
STABLE_ABOVE, UNSTABLE_BELOW = 0.8, 0.7  # expected accuracy; between the two a unit stays what it is
UNSTABLE_S = 10.0  # how long an alarm marks a unit
UNSTABLE_DISTANCE = 10.0  # standard deviations: by how much spikes must be further from their template
DORMANT_INTERVALS, DORMANT_S = 20.0, 30.0  # silence of so many mean intervals, and so long, makes a unit dormant
REVIVED_SPIKES = 3  # so many within DORMANT_S wake it; a single one may be a mistake
MEASURED_S = 10.0  # how often a unit's metrics are computed anew: 0.2 ms each, and each unit in its own turn
_TURNS = 40
_RECENT = 0.02  # running means follow the last 50 spikes,
_RECENT_ISI = 0.002  # violations, which are rare, the last 500
_RECENT_SIZES = 512  # amplitudes over their running mean, so that a drifting unit keeps the shape of its distribution
_PRIOR_VIOLATIONS = 2.0  # so many must be expected of pure contamination before none of them proves anything
# Quantile skewness of a normal distribution of which the lower part, in the second row, is cut off.
_SKEWNESS = (0.0, 0.039, 0.084, 0.14, 0.219, 0.275, 0.355, 0.415, 0.472)
_CUT_OFF = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


@dataclass
class Unit:
    """One identity and its running statistics.

    Attributes
    ----------
    unit_id, slot : int
        Published id (from 1) and its place in a decoder's input vector (from 0).
    born_sample : int
        Where its statistics begin, moved on by gaps.
    quality : Quality
        Its metrics over that time; `metrics` is what they last were.
    channel_index : int
        Channel where most of its spikes peak.
    x_um, y_um : float
        Centre of mass of the template's peak-to-peak.
    trust : str
        probation, stable or unstable, whether it sleeps or not.
    amplitude_uv, confidence : float
        Running means.
    cut_off : float
        Share of its spikes that the shape of its amplitude distribution says are missed.
    """

    unit_id: int
    slot: int
    born_sample: int
    quality: Quality
    channel_index: int = 0
    x_um: float = 0.0
    y_um: float = 0.0
    n_spikes: int = 0
    last_sample: int = 0
    trust: str = "probation"
    dormant: bool = False
    silent_since: int = 0
    returns: deque[int] = field(default_factory=lambda: deque(maxlen=REVIVED_SPIKES))
    unstable_until: int = 0
    measure_at: int = 0
    amplitude_uv: float = 0.0
    confidence: float = 0.0
    cut_off: float = 0.0
    isi: tuple[float, float, float] = (0.0, 0.0, 0.0)  # recent violations, spikes, seconds
    sizes: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_SIZES))
    drift: DriftWatch = field(default_factory=DriftWatch)
    metrics: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(NAMES))

    @property
    def state(self) -> str:
        """How far the unit can be trusted now: stable, probation, unstable or dormant."""
        return "dormant" if self.dormant else self.trust

    @property
    def contamination(self) -> float:
        """Share of its spikes that are others', by the refractory violations of late (Hill et al. 2011, for few of them)."""
        n_violations, n_spikes, seconds = self.isi
        expected = 2 * ISI_THRESHOLD_S * n_spikes**2 / max(seconds, 1e-9)
        ratio = n_violations / (expected + _PRIOR_VIOLATIONS)
        return (1 - math.sqrt(max(1 - 4 * ratio, 0.0))) / 2

    @property
    def expected_accuracy(self) -> float:
        """Estimate tp / (tp + fp + fn) as it is now: of the spikes so many are its own, of its own so many are found."""
        precision, recall = min(self.confidence, 1 - self.contamination), 1 - self.cut_off
        return 1 / (1 / max(precision, 1e-3) + 1 / max(recall, 1e-3) - 1)

    def evidence(self) -> dict[str, float]:
        """Return the numbers that its trust rests on."""
        return {
            "expected_accuracy": round(self.expected_accuracy, 3),
            "confidence": round(self.confidence, 3),
            "contamination": round(self.contamination, 3),
            "cut_off": round(self.cut_off, 3),
            "n_spikes": self.n_spikes,
        }

    def see(
        self,
        spikes: NDArray[Any],
        noise_units: NDArray[np.float32],
        distance: NDArray[np.float32],
        y_um: NDArray[np.float32] | None,
        sampling_frequency: float,
    ) -> Alarm | None:
        """Take a period's spikes of this unit into account; tell what drifted, if anything did."""
        self.quality.add(spikes["sample_index"], spikes["amplitude_uv"], noise_units, y_um)
        columns = (spikes[name].tolist() for name in ("sample_index", "amplitude_uv", "confidence"))
        for sample, amplitude, confidence in zip(*columns, strict=True):
            if self.n_spikes:
                self._count_interval((sample - self.last_sample) / sampling_frequency)
            self.n_spikes += 1
            self.last_sample = sample
            rate = max(1.0 / self.n_spikes, _RECENT)
            self.amplitude_uv += rate * (amplitude - self.amplitude_uv)
            self.confidence += rate * (confidence - self.confidence)
            self.sizes.append(amplitude / (self.amplitude_uv or 1.0))
        return self.drift.update(distance.tolist(), noise_units.tolist())

    def measure(self, sample_index: int) -> None:
        """Compute what is too much work for every period."""
        self.metrics = {
            name: None if value != value else round(value, 4) for name, value in self.quality.metrics(sample_index).items()
        }
        low, middle, high = np.percentile(self.sizes, (5, 50, 95)).tolist()
        self.cut_off = float(np.interp((high + low - 2 * middle) / max(high - low, 1e-9), _SKEWNESS, _CUT_OFF))

    def _count_interval(self, seconds: float) -> None:
        violations, n, total = self.isi
        kept = 1 - _RECENT_ISI
        # A silence counts for a part only: it would make the rate low, and what violations there are too many for it.
        seconds = min(seconds, max(DORMANT_INTERVALS * total / max(n, 1.0), 1.0))
        self.isi = violations * kept + (seconds < ISI_THRESHOLD_S), n * kept + 1, total * kept + seconds


class Registry:
    """Give out unit ids and keep the ledger.

    Attributes
    ----------
    units : dict of Unit
        The living ones by id; those that were merged or retired are no longer there.

    Examples
    --------
    >>> registry = Registry(sampling_frequency=30000.0)
    >>> registry.born(0, "calibration"), registry.born(300, "new cluster", n_spikes=15)
    (1, 2)
    >>> registry.merge(2, 1, 900, "same template", similarity=0.97)
    >>> [(event["event"], event["unit_id"], event["into"]) for event in registry.take_events()]
    [('born', 1, None), ('born', 2, None), ('merged', 2, 1)]
    >>> registry.born(900, "new cluster"), registry.slots().tolist()
    (3, [1, -1, 3])
    """

    def __init__(self, sampling_frequency: float) -> None:
        self.units: dict[int, Unit] = {}
        self._sampling_frequency = sampling_frequency
        self._ended: dict[int, int] = {}  # to what it was merged into, or -1
        self._events: list[dict[str, Any]] = []

    def born(self, sample_index: int, reason: str, **evidence: Any) -> int:
        """Open a unit and return its id, which no other unit will ever have."""
        slot = len(self.units) + len(self._ended)
        unit = Unit(slot + 1, slot, sample_index, Quality(sample_index, self._sampling_frequency), last_sample=sample_index)
        self.units[unit.unit_id] = unit
        self.record("born", sample_index, unit.unit_id, reason, slot=slot, **evidence)
        return unit.unit_id

    def merge(self, old: int, into: int, sample_index: int, reason: str, **evidence: Any) -> None:
        """End a unit whose neuron has another id; a dormant `into` wakes with it.

        Raises
        ------
        ValueError
            If either is not a living unit, or both are the same.
        """
        gone, stays = self._living(old, "merge"), self._living(into, "merge")
        if gone is stays:
            raise ValueError(f"merge: unit {old} into itself, expected two units")
        self._end(gone, into, sample_index, "merged", reason, {"into_n_spikes": stays.n_spikes} | evidence)
        if stays.dormant and not gone.dormant:
            self._wake(stays, sample_index, f"unit {old} is it", gone.born_sample)
        stays.last_sample = max(stays.last_sample, gone.last_sample)

    def split(self, unit_id: int, sample_index: int, reason: str, **evidence: Any) -> int:
        """Open a unit for a part of another; return its id. What remains keeps its own and goes on probation again.

        Raises
        ------
        ValueError
            If it is not a living unit.
        """
        unit = self._living(unit_id, "split")
        part = self.born(sample_index, f"split from unit {unit_id}", **evidence)
        self.record("split", sample_index, unit_id, reason, into=part, **{"n_spikes": unit.n_spikes} | evidence)
        anew = Unit(unit_id, unit.slot, sample_index, Quality(sample_index, self._sampling_frequency), last_sample=sample_index)
        anew.channel_index, anew.x_um, anew.y_um = unit.channel_index, unit.x_um, unit.y_um
        self.units[unit_id] = anew
        return part

    def retire(self, unit_id: int, sample_index: int, reason: str, **evidence: Any) -> None:
        """End a unit that is none.

        Raises
        ------
        ValueError
            If it is not a living unit.
        """
        self._end(self._living(unit_id, "retire"), UNSORTED, sample_index, "retired", reason, evidence)

    def current(self, unit_id: int) -> int:
        """Return the living unit that an id stands for now, after all mergers; -1 if there is none."""
        while unit_id in self._ended:
            unit_id = self._ended[unit_id]
        return unit_id if unit_id in self.units else UNSORTED

    def slots(self) -> NDArray[np.int32]:
        """Return the living unit of each slot, (n_slots,); -1 where it ended, for good. Slots are only ever added."""
        slots = np.full(len(self.units) + len(self._ended), UNSORTED, np.int32)
        for unit in self.units.values():
            slots[unit.slot] = unit.unit_id
        return slots

    def record(self, event: str, sample_index: int, unit_id: int | None, reason: str, **more: Any) -> None:
        """Append one line to the ledger; what is of no one unit has `unit_id` None."""
        line = {"event": event, "sample_index": sample_index, "unit_id": unit_id, "into": None, "reason": reason}
        self._events.append(line | more)

    def take_events(self) -> list[dict[str, Any]]:
        """Hand over the ledger lines written since the last call."""
        events, self._events = self._events, []
        return events

    def see(
        self,
        spikes: NDArray[Any],
        noise_units: NDArray[np.float32],
        distance: NDArray[np.float32],
        sample_index: int,
        y_um: NDArray[np.float32] | None = None,
    ) -> None:
        """Update the units with one learning period's spikes, and judge them.

        Parameters
        ----------
        spikes : ndarray, shape (n_spikes,), SPIKE_DTYPE
            In order of sample_index. Those of a unit that was merged meanwhile count for the one it is now.
        noise_units, distance : ndarray, shape (n_spikes,), float32
            Height of each spike in noise units and its distance to its prototype.
        sample_index : int
            End of the period.
        y_um : ndarray, shape (n_spikes,), float32, optional
            Position of each spike along the probe, for the drift metrics.
        """
        owner = np.array([self.current(name) for name in spikes["unit_id"].tolist()], np.int64)
        order = np.argsort(owner, kind="stable")[np.count_nonzero(owner == UNSORTED) :]
        spikes, noise_units, distance = spikes[order], noise_units[order], distance[order]
        places = None if y_um is None else y_um[order]
        names, starts = np.unique(owner[order], return_index=True)
        for unit_id, (a, b) in zip(names.tolist(), pairwise([*starts.tolist(), len(order)]), strict=True):
            unit, y_um = self.units[unit_id], None if places is None else places[a:b]
            if unit.dormant:
                self._note_return(unit, spikes["sample_index"][a:b], sample_index)
            alarm = unit.see(spikes[a:b], noise_units[a:b], distance[a:b], y_um, self._sampling_frequency)
            if alarm:
                self._note_alarm(unit, alarm, sample_index)
            self._judge(unit, sample_index)

    def note_silence(self, sample_index: int) -> None:
        """Record the units that have been silent for long by now."""
        for unit in self.units.values():
            silence_s = (sample_index - unit.last_sample) / self._sampling_frequency
            interval_s = (unit.last_sample - unit.born_sample) / max(unit.n_spikes, 1) / self._sampling_frequency
            if not unit.dormant and silence_s > max(DORMANT_INTERVALS * interval_s, DORMANT_S):
                unit.dormant, unit.silent_since = True, unit.last_sample
                evidence = {"silent_s": round(silence_s, 1), "mean_interval_s": round(interval_s, 3), "n_spikes": unit.n_spikes}
                self.record("dormant", sample_index, unit.unit_id, f"silent for {silence_s:.0f} s", **evidence)

    def skip_gap(self, n_samples: int) -> None:
        """Leave samples that never came out of every unit's silence and rate."""
        for unit in self.units.values():
            unit.last_sample += n_samples
            unit.born_sample += n_samples
            unit.silent_since += n_samples
            unit.quality.skip_gap(n_samples)

    def flags(self, unit_id: NDArray[Any]) -> NDArray[np.uint16]:
        """Return the flags that units lend their spikes, (n_spikes,) uint16; none for unit -1."""
        units = [self.units.get(name) for name in unit_id.tolist()]
        return np.array([Flag.PROBATION if unit and unit.trust == "probation" else 0 for unit in units], np.uint16)

    def table(self, sample_index: int) -> list[dict[str, Any]]:
        """List the living units as the `units` topic publishes them; metrics are at most some ten seconds old, None if unknown."""
        return [
            {
                "unit_id": unit.unit_id,
                "slot": unit.slot,
                "state": unit.state,
                "channel_index": unit.channel_index,
                "x_um": round(unit.x_um, 1),
                "y_um": round(unit.y_um, 1),
                "amplitude_uv": round(unit.amplitude_uv, 1),
                "n_spikes": unit.n_spikes,
                "firing_rate_hz": round(
                    unit.n_spikes * self._sampling_frequency / max(sample_index - unit.born_sample, self._sampling_frequency), 2
                ),
                "confidence": round(unit.confidence, 3),
                "quality": round(unit.expected_accuracy, 3),
                **unit.metrics,
            }
            for unit in list(self.units.values())  # at once: a command asks while another thread may open a unit
        ]

    def _living(self, unit_id: int, what: str) -> Unit:
        unit = self.units.get(unit_id)
        if unit is None:
            raise ValueError(f"{what}: unit {unit_id}, expected a living one")
        return unit

    def _end(self, unit: Unit, into: int, sample_index: int, event: str, reason: str, evidence: dict[str, Any]) -> None:
        self._ended[unit.unit_id] = into
        del self.units[unit.unit_id]
        heir = None if into == UNSORTED else into
        self.record(event, sample_index, unit.unit_id, reason, into=heir, **{"n_spikes": unit.n_spikes} | evidence)

    def _wake(self, unit: Unit, sample_index: int, reason: str, again_at: int) -> None:
        silent_s = (again_at - unit.silent_since) / self._sampling_frequency
        unit.dormant = False
        unit.returns.clear()
        self.record("revived", sample_index, unit.unit_id, reason, silent_s=round(max(silent_s, 0.0), 1), n_spikes=unit.n_spikes)

    def _note_return(self, unit: Unit, samples: NDArray[np.int64], sample_index: int) -> None:
        """Wake a dormant unit once enough of its spikes came close together."""
        for sample in samples.tolist():
            unit.returns.append(sample)
            if len(unit.returns) == REVIVED_SPIKES and sample - unit.returns[0] < DORMANT_S * self._sampling_frequency:
                return self._wake(unit, sample_index, "fires again", unit.returns[0])

    def _note_alarm(self, unit: Unit, alarm: Alarm, sample_index: int) -> None:
        """Tell of an alarm; amplitudes change when a unit moves, distances when its template does not go with it.

        Where a template lags a little its unit is as sure as ever; one whose spikes lie far from it may be another by now.
        """
        if alarm.what == "distance" and alarm.after - alarm.before > UNSTABLE_DISTANCE:
            unit.unstable_until = sample_index + int(UNSTABLE_S * self._sampling_frequency)
        evidence = {"before": round(alarm.before, 2), "after": round(alarm.after, 2), "n_spikes": unit.n_spikes}
        self.record("drift_alarm", sample_index, unit.unit_id, alarm.reason, of=alarm.what, **evidence)

    def _judge(self, unit: Unit, sample_index: int) -> None:
        """Compute the unit's metrics when it is its turn, and say whether it is to be trusted."""
        enough = unit.n_spikes >= PROBATION_SPIKES
        if sample_index >= unit.measure_at or (enough and unit.trust == "probation"):
            unit.measure(sample_index)
            every = int(MEASURED_S * self._sampling_frequency)
            turn = unit.slot % _TURNS * every // _TURNS
            unit.measure_at = ((sample_index - turn) // every + 1) * every + turn
        if not enough:
            return
        accuracy, least = unit.expected_accuracy, UNSTABLE_BELOW if unit.trust == "stable" else STABLE_ABOVE
        trust = "unstable" if sample_index < unit.unstable_until or accuracy < least else "stable"
        if trust == unit.trust:
            return
        if trust == "unstable":
            unit.unstable_until = max(unit.unstable_until, sample_index + int(UNSTABLE_S * self._sampling_frequency))
        event = "confirmed" if (unit.trust, trust) == ("probation", "stable") else trust
        reason = f"expected accuracy {accuracy:.2f}" if accuracy < least or trust == "stable" else "after a drift alarm"
        unit.trust = trust
        self.record(event, sample_index, unit.unit_id, reason, **unit.evidence())
