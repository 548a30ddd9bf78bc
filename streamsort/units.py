"""Published identities and the ledger of what happened to them.

A cluster is an internal thing whose rows come and go; a unit is a promise to a decoder. Unit ids come from one counter that only
grows, so an id is never given to another unit, and each has a slot, its place in a decoder's input vector. Every event in a unit's
life is a ledger line with the sample index at which it took effect and the reason. The registry changes only at learning
boundaries.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.drift import DriftWatch
from streamsort.records import Flag

PROBATION_SPIKES = 100  # below this a unit's numbers are not yet to be relied on
UNSTABLE_S = 10.0  # how long a drift alarm marks a unit
DORMANT_INTERVALS = 20.0  # silence of so many mean intervals (and 30 s at least) makes a unit dormant
_RECENT = 0.02  # running means follow the last 50 spikes


@dataclass
class Unit:
    """One identity and its running statistics.

    Attributes
    ----------
    unit_id, slot : int
        Published id (from 1) and its place in a decoder's input vector (from 0).
    channel_index : int
        Channel where most of its spikes peak.
    x_um, y_um : float
        Centre of mass of the template's peak-to-peak.
    amplitude_uv, snr, confidence : float
        Running means.
    """

    unit_id: int
    slot: int
    born_sample: int
    channel_index: int = 0
    x_um: float = 0.0
    y_um: float = 0.0
    n_spikes: int = 0
    last_sample: int = 0
    amplitude_uv: float = 0.0
    snr: float = 0.0
    confidence: float = 0.0
    dormant: bool = False
    unstable_until: int = 0
    drift: DriftWatch = field(default_factory=DriftWatch)

    def see(self, spikes: NDArray[Any], noise_units: NDArray[np.float32], distance: NDArray[np.float32]) -> str | None:
        """Take a period's spikes of this unit into account; name what drifted, if anything did."""
        alarm = None
        for amplitude, height, far, confidence in zip(
            spikes["amplitude_uv"].tolist(), noise_units.tolist(), distance.tolist(), spikes["confidence"].tolist(), strict=True
        ):
            self.n_spikes += 1
            rate = max(1.0 / self.n_spikes, _RECENT)
            self.amplitude_uv += rate * (amplitude - self.amplitude_uv)
            self.snr += rate * (height - self.snr)
            self.confidence += rate * (confidence - self.confidence)
            alarm = self.drift.update(far, height) or alarm
        self.last_sample = int(spikes["sample_index"][-1])
        return alarm

    def state(self, sample_index: int) -> str:
        """Say how far the unit can be trusted now: stable, probation, unstable or dormant."""
        if self.dormant:
            return "dormant"
        if sample_index < self.unstable_until:
            return "unstable"
        return "probation" if self.n_spikes < PROBATION_SPIKES else "stable"


class Registry:
    """Give out unit ids and keep the ledger.

    Examples
    --------
    >>> registry = Registry(sampling_frequency=30000.0)
    >>> registry.born(0, reason="calibration"), registry.born(300, reason="new cluster")
    (1, 2)
    >>> [event["event"] for event in registry.take_events()]
    ['born', 'born']
    """

    def __init__(self, sampling_frequency: float) -> None:
        self.units: dict[int, Unit] = {}
        self._sampling_frequency = sampling_frequency
        self._next_id = 1
        self._events: list[dict[str, Any]] = []

    def born(self, sample_index: int, reason: str) -> int:
        """Open a unit and return its id, which no other unit will ever have."""
        unit = Unit(self._next_id, slot=len(self.units), born_sample=sample_index, last_sample=sample_index)
        self._next_id += 1
        self.units[unit.unit_id] = unit
        self.record("born", sample_index, unit.unit_id, reason, slot=unit.slot)
        return unit.unit_id

    def record(self, event: str, sample_index: int, unit_id: int | None, reason: str, **more: Any) -> None:
        """Append one line to the ledger; what is of no one unit has `unit_id` None."""
        line = {"event": event, "sample_index": sample_index, "unit_id": unit_id, "into": None, "reason": reason}
        self._events.append(line | more)

    def take_events(self) -> list[dict[str, Any]]:
        """Hand over the ledger lines written since the last call."""
        events, self._events = self._events, []
        return events

    def see(self, spikes: NDArray[Any], noise_units: NDArray[np.float32], distance: NDArray[np.float32], sample_index: int) -> None:
        """Update the units with one learning period's spikes and record alarms and returns.

        Parameters
        ----------
        spikes : ndarray, shape (n_spikes,), SPIKE_DTYPE
            In order of sample_index.
        noise_units, distance : ndarray, shape (n_spikes,), float32
            Height of each spike in noise units and its distance to its prototype.
        sample_index : int
            End of the period.
        """
        order = np.argsort(spikes["unit_id"], kind="stable")
        names, starts = np.unique(spikes["unit_id"][order], return_index=True)
        for unit_id, mine in zip(names.tolist(), np.split(order, starts[1:]), strict=True):
            if unit_id < 0:
                continue
            unit = self.units[unit_id]
            if unit.dormant:
                unit.dormant = False
                self.record("revived", int(spikes["sample_index"][mine][0]), unit_id, "fires again")
            alarm = unit.see(spikes[mine], noise_units[mine], distance[mine])
            if alarm:
                unit.unstable_until = sample_index + int(UNSTABLE_S * self._sampling_frequency)
                self.record("drift_alarm", sample_index, unit_id, alarm)

    def note_silence(self, sample_index: int) -> None:
        """Record the units that have been silent for long by now."""
        for unit in self.units.values():
            silence = sample_index - unit.last_sample
            interval = (unit.last_sample - unit.born_sample) / max(unit.n_spikes, 1)
            if not unit.dormant and silence > max(DORMANT_INTERVALS * interval, 30 * self._sampling_frequency):
                unit.dormant = True
                self.record("dormant", sample_index, unit.unit_id, f"silent for {silence / self._sampling_frequency:.0f} s")

    def skip_gap(self, n_samples: int) -> None:
        """Leave samples that never came out of every unit's silence and rate."""
        for unit in self.units.values():
            unit.last_sample += n_samples
            unit.born_sample += n_samples

    def forget_distances(self) -> None:
        """Let no alarm compare distances in one encoder's space with those in another's."""
        for unit in self.units.values():
            unit.drift.forget_distances()

    def flags(self, unit_id: NDArray[Any]) -> NDArray[np.uint16]:
        """Return the flags that units lend their spikes, (n_spikes,) uint16; none for unit -1."""
        units = [self.units.get(name) for name in unit_id.tolist()]
        return np.array([Flag.PROBATION if unit and unit.n_spikes < PROBATION_SPIKES else 0 for unit in units], np.uint16)

    def table(self, sample_index: int) -> list[dict[str, Any]]:
        """List all units as the `units` topic publishes them."""
        return [
            {
                "unit_id": unit.unit_id,
                "slot": unit.slot,
                "state": unit.state(sample_index),
                "channel_index": unit.channel_index,
                "x_um": round(unit.x_um, 1),
                "y_um": round(unit.y_um, 1),
                "amplitude_uv": round(unit.amplitude_uv, 1),
                "snr": round(unit.snr, 2),
                "n_spikes": unit.n_spikes,
                "firing_rate_hz": round(
                    unit.n_spikes * self._sampling_frequency / max(sample_index - unit.born_sample, self._sampling_frequency), 2
                ),
                "quality": round(unit.confidence, 3),
            }
            for unit in list(self.units.values())  # at once: a command asks while another thread may open a unit
        ]
