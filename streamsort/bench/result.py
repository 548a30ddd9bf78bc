"""What a benchmark says: the report, as JSON takes it, from what the processes noted.

Spikes count in the phase in which their trough lies. Injected and counted faults stand beside each other: what the player and the
sorter's process did, and what the sorter said of it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.bench import figures
from streamsort.bench.conduct import Notes, Plan
from streamsort.bench.figures import Clock
from streamsort.records import Flag
from streamsort.score import score
from streamsort.simulate import Truth
from streamsort.sources.pace import chunk_length

_LOST = ("gap", "overrun")


def repeated(truth: Truth, round_samples: int, from_sample: int, to_sample: int) -> Truth:
    """Return the truth of a recording that is played over and over, of all rounds around [from_sample, to_sample).

    Examples
    --------
    >>> truth = Truth(np.array([3, 9]), np.array([0, 1]))
    >>> repeated(truth, 8, 9, 16).sample_index
    array([ 3, 11, 19])
    """
    played = truth.sample_index < round_samples
    rounds = np.arange(max(from_sample // round_samples - 1, 0), to_sample // round_samples + 1)
    samples = (truth.sample_index[played] + rounds[:, None] * round_samples).ravel()
    return Truth(samples, np.tile(truth.unit_index[played], len(rounds)))


class Report:
    """Put a report together.

    Parameters
    ----------
    plan : Plan
    notes : Notes
    truth : Truth or None
        Of the recording, once; None where it is not known.
    bursts : dict of Truth
        What bursts added, by their factor.
    """

    def __init__(self, plan: Plan, notes: Notes, truth: Truth | None, bursts: dict[float, Truth]) -> None:
        self._plan, self._notes, self._truth, self._bursts = plan, notes, truth, bursts
        margin = round(notes.counted["floor_ms"] * plan.rate / 1e3)
        self._clock = Clock(plan.rate, margin, chunk_length(plan.rate, plan.chunk_ms))
        sorted_ones = self._arrived(notes.clean)
        self._clean_s = float(np.median(figures.latency_s(sorted_ones))) if len(sorted_ones) else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, ready for JSON."""
        plan, notes, counted = self._plan, self._notes, self._notes.counted
        catch_up_s = notes.heard["from_sample"] / plan.rate - plan.warmup_s
        came = counted["samples_acquired"] + counted["samples_lost"]
        return {
            "recording": plan.recording,
            "rate_hz": plan.rate,
            "transport": plan.transport,
            "chunk_ms": plan.chunk_ms,
            "warmup_s": plan.warmup_s,
            "catch_up_s": catch_up_s if catch_up_s < plan.catch_up_s else None,
            "deadline_ms": plan.deadline_ms,
            "look_ahead_ms": counted["floor_ms"],
            **{name: counted[name] for name in ("n_units", "calibrated", "encoder", "encoder_choice", "provider")},
            "samples_sent": notes.sent,
            "samples_acquired": counted["samples_acquired"],
            "samples_counted_lost": counted["samples_lost"],
            # What LSL drops when it is sent too much too fast it does not tell.
            "samples_unaccounted": None if notes.steps and plan.transport == "lsl" else notes.sent - came,
            "spikes_published": counted["spikes"],
            "spikes_lost": counted["spikes"] - len(notes.arrivals),
            "messages_lost": notes.heard["messages_lost"],
            "outputs_dropped": counted["outputs_dropped"],
            "clean": self._phase(notes.clean) | self._machine(notes.clean),
            "faults": [self._faulted(phase) for phase in notes.faulted],
            "headroom": figures.headroom(notes.arrivals, notes.steps, plan.rate) if notes.steps else None,
        }

    def _arrived(self, phase: dict[str, Any]) -> NDArray[Any]:
        arrived = figures.within(self._notes.arrivals, phase["from_sample"], phase["to_sample"])
        return arrived[figures.is_sorted(arrived)]

    def _phase(self, phase: dict[str, Any]) -> dict[str, Any]:
        """Sum up the spikes of a phase; times in ms."""
        everything = figures.within(self._notes.arrivals, phase["from_sample"], phase["to_sample"])
        arrived = everything[figures.is_sorted(everything)]
        at_once = arrived[figures.decided_at_once(arrived)]
        seconds = (phase["to_sample"] - phase["from_sample"]) / self._plan.rate
        times = {"total": figures.latency_s(arrived)}
        times |= {"unsorted": figures.latency_s(everything[~figures.is_sorted(everything)])}
        times |= figures.split_s(at_once, self._clock) | figures.stages_s(at_once, self._clock)
        return {
            "seconds": seconds,
            "spikes_per_s": len(everything) / seconds,
            "latency_ms": {name: figures.spread(1e3 * values) for name, values in times.items()},
            "deadline_misses": int((1e3 * times["total"] > self._plan.deadline_ms).sum()),
            "late_flags": int((arrived["flags"] & int(Flag.LATE) > 0).sum()),
            "samples_lost": self._gaps(phase),
            "samples_shed": self._shed(phase),
            "accuracy": self._accuracy(phase),
        }

    def _gaps(self, phase: dict[str, Any]) -> dict[str, int]:
        """Count what the sorter said is missing, by kind, from its own samples."""
        lost: dict[str, int] = {}
        for gap in self._notes.heard["gaps"]:
            if phase["from_sample"] <= gap["start_sample"] < phase["to_sample"]:
                lost[gap["kind"]] = lost.get(gap["kind"], 0) + gap["n_samples"]
        return lost

    def _shed(self, phase: dict[str, Any]) -> dict[str, int]:
        """Count, to a second, the samples for which something was left out, by `streamsort.shed.Level`."""
        said = [status for status in self._notes.heard["statuses"] if phase["began"] <= status["time"] < phase["ended"] + 1.0]
        if not said:
            return {}
        first, last = said[0]["samples_shed"], said[-1]["samples_shed"]
        return {name: n - first.get(name, 0) for name, n in last.items() if n > first.get(name, 0)}

    def _accuracy(self, phase: dict[str, Any]) -> dict[str, float] | None:
        if self._truth is None:
            return None
        rate, from_sample, to_sample = self._plan.rate, phase["from_sample"], phase["to_sample"]
        round_samples = self._plan.n_samples // self._clock.chunk * self._clock.chunk
        true = repeated(self._truth, round_samples, from_sample, to_sample)
        if (burst := self._burst_of(phase)) is not None:
            samples = np.concatenate([true.sample_index, burst.sample_index + from_sample])
            order = np.argsort(samples, kind="stable")
            true = Truth(samples[order], np.concatenate([true.unit_index, burst.unit_index])[order])
        found = score(self._notes.arrivals, true, rate, from_sample / rate, to_sample / rate)
        return {
            "mean": found.accuracy_mean,
            "precision": found.precision_mean,
            "recall": found.recall_mean,
            "units_true": found.n_units_true,
            "units_found": sum(unit.tp > 0 for unit in found.units),
        }

    def _burst_of(self, phase: dict[str, Any]) -> Truth | None:
        return self._bursts.get(phase["faults"].burst) if "faults" in phase else None

    def _machine(self, phase: dict[str, Any]) -> dict[str, Any]:
        """Sum up what the machine did meanwhile: the empty loop, CPU and memory."""
        began, ended = phase["began"], phase["ended"]
        woke = self._notes.lateness
        empty = woke[(woke[:, 0] >= began) & (woke[:, 0] < ended), 1]
        names = {number: name for status in self._notes.heard["statuses"] for name, number in status["threads"].items()}
        used = figures.usage(self._notes.usage["sorter"], began - 1.0, ended + 1.0)
        threads: dict[str, float] = {}
        for (number, called), share in used.pop("threads", {}).items():  # the system may call all of them python
            name = names.get(number, called).removeprefix("streamsort-")
            threads[name] = threads.get(name, 0.0) + share
        player = figures.usage(self._notes.usage["player"], began - 1.0, ended + 1.0)
        return {
            "empty_loop_ms": figures.spread(1e3 * empty),
            **used,
            "cpu_threads": dict(sorted(threads.items(), key=lambda item: -item[1])),
            "cpu_player": player.get("cpu"),
        }

    def _faulted(self, phase: dict[str, Any]) -> dict[str, Any]:
        """Sum up a phase with faults: what was injected, what the sorter counted of it, and how long latency took to recover."""
        injected = dict(phase["injected"])
        if (burst := self._burst_of(phase)) is not None:
            injected["spikes_added"] = len(burst.sample_index)
        if phase["faults"].slow_encoder_ms:
            slowed = self._notes.slowed_at
            injected["encoder_calls_slowed"] = int(((slowed >= phase["began"]) & (slowed < phase["ended"])).sum())
        if phase["faults"].slow_subscriber:
            injected["subscribers_not_reading"] = 1
        figures_of = self._phase(phase)
        counted_exactly = injected.get("samples_dropped", 0) == sum(figures_of["samples_lost"].get(kind, 0) for kind in _LOST)
        recovery = {"recovery_s": self._recovery(phase), "losses_counted": counted_exactly}
        return {"name": phase["name"], "injected": injected, **figures_of, **recovery}

    def _recovery(self, phase: dict[str, Any]) -> float | None:
        """Return the longest that latency took to be normal again, after any of the faults or the last."""
        rate, until_s = self._plan.rate, phase["until_sample"] / self._plan.rate
        arrived = self._arrived(phase | {"to_sample": phase["until_sample"]})
        at_s, latency_s = arrived["sample_index"] / rate, figures.latency_s(arrived)
        ends_s = [sample / rate for sample in (*phase["fault_ends"], phase["to_sample"])]
        took = [figures.recovery_s(at_s, latency_s, end_s, until_s, self._clean_s) for end_s in ends_s]
        return None if None in took else max(seconds for seconds in took if seconds is not None)
