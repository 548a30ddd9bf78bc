"""Numbers out of what the processes of a benchmark noted: pure functions of arrays.

The latency of a spike, from its trough to the subscriber's hands, is split into three. The floor no implementation gets below: the
look-ahead, and the wait until the chunk is full that completes it. Compute is the time on a processor that the sort thread took
from that chunk to the spike. Waiting is the rest: transport, queues, the scheduler, and whatever else the processes do. A spike
that another had hidden (flag `collision`) or that no unit explains is decided up to 4 ms later; the split is of the others.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamsort.records import UNSORTED, Flag

PERCENTILES = (50, 95, 99, 99.9)
STAGES = ("acquire", "detect", "assign", "publish", "receive")
RECOVERED, HOLD_S, _STEP_S = 1.5, 0.1, 0.01
_KEPT_UP_S, _LAST_SHARE = 0.1, 0.25  # of delay, in the last part of a step

Floats = NDArray[np.float64]


def spread(values: ArrayLike, percentiles: tuple[float, ...] = PERCENTILES) -> dict[str, Any]:
    """Return `n`, percentiles and the maximum; None of everything where nothing was measured.

    Examples
    --------
    >>> spread([1.0, 2.0, 4.0], (50,))
    {'n': 3, 'p50': 2.0, 'max': 4.0}
    """
    values = np.asarray(values, np.float64)
    names = [f"p{q:g}" for q in percentiles]
    if not len(values):
        return {"n": 0} | dict.fromkeys([*names, "max"])
    found = dict(zip(names, np.percentile(values, percentiles).tolist(), strict=True))
    return {"n": len(values)} | found | {"max": float(values.max())}


@dataclass(frozen=True)
class Clock:
    """What is known of when samples are delivered: `margin` samples of look-ahead, chunks of `chunk` samples from sample 0 on."""

    rate: float
    margin: int
    chunk: int

    def floor_s(self, sample_index: NDArray[np.int64]) -> Floats:
        """Return how long after its trough the chunk is complete that completes a spike's look-ahead.

        Examples
        --------
        >>> Clock(1000.0, margin=2, chunk=10).floor_s(np.array([0, 7, 9]))
        array([0.01 , 0.003, 0.011])
        """
        ends = -(-(sample_index + self.margin + 1) // self.chunk) * self.chunk
        result: Floats = (ends - sample_index) / self.rate
        return result


def latency_s(arrivals: NDArray[Any]) -> Floats:
    """Return receipt minus trough of each spike."""
    result: Floats = arrivals["t_received"] - arrivals["time"]
    return result


def split_s(arrivals: NDArray[Any], clock: Clock) -> dict[str, Floats]:
    """Split each spike's latency into `floor`, `compute` and `waiting`."""
    floor, compute = clock.floor_s(arrivals["sample_index"]), arrivals["compute_s"].copy()
    return {"floor": floor, "compute": compute, "waiting": latency_s(arrivals) - floor - compute}


def stages_s(arrivals: NDArray[Any], clock: Clock) -> dict[str, Floats]:
    """Split what follows the floor by stage: from the end of the deciding chunk to our hands, and on to the subscriber's.

    `acquire` is until the chunk is here, `detect` until its peaks are, with the time in the queue, `assign` until they are named,
    `publish` until the message is made, with the time in its queue, `receive` until the subscriber has it.
    """
    due = arrivals["time"] + clock.floor_s(arrivals["sample_index"])
    # Chunks that waited are joined and as old as the first of them, which may have come before the one that decides.
    here = np.maximum(arrivals["t_acquired"], due)
    points = [due, here, *(np.maximum(arrivals[f"t_{name}"], here) for name in ("detected", "assigned", "published", "received"))]
    return {stage: end - start for stage, start, end in zip(STAGES, points[:-1], points[1:], strict=True)}


def is_sorted(arrivals: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell which spikes carry a unit."""
    result: NDArray[np.bool_] = arrivals["unit_id"] != UNSORTED
    return result


def decided_at_once(arrivals: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell which spikes were decided as soon as their look-ahead was there."""
    result: NDArray[np.bool_] = is_sorted(arrivals) & (arrivals["flags"] & int(Flag.COLLISION) == 0)
    return result


def within(arrivals: NDArray[Any], from_sample: int, to_sample: int) -> NDArray[Any]:
    """Return the spikes whose troughs lie in [from_sample, to_sample)."""
    at = arrivals["sample_index"]
    return arrivals[(at >= from_sample) & (at < to_sample)]


def recovery_s(at_s: Floats, latency: Floats, after_s: float, until_s: float, clean: float) -> float | None:
    """Return how long after a fault latency is normal again: the median of `HOLD_S` within `RECOVERED` times the clean one.

    Parameters
    ----------
    at_s, latency : ndarray, shape (n_spikes,)
        When each spike's trough was, and how late it was received.
    after_s, until_s : float
        The end of the fault, and of what is looked at.
    clean : float
        The clean median.

    Returns
    -------
    seconds : float or None
        None if that does not happen before `until_s`.
    """
    order = np.argsort(at_s, kind="stable")
    at_s, latency = at_s[order], latency[order]
    for start_s in np.arange(after_s, until_s - HOLD_S, _STEP_S):
        near = latency[slice(*np.searchsorted(at_s, [start_s, start_s + HOLD_S]))]
        if len(near) and np.median(near) <= RECOVERED * clean:
            return float(start_s - after_s)
    return None


def pace(arrivals: NDArray[Any], rate: float) -> float:
    """Return how many seconds of the stream arrived per second."""
    span_s = float(np.ptp(arrivals["t_received"])) if len(arrivals) else 0.0
    return float(np.ptp(arrivals["sample_index"])) / rate / span_s if span_s else 0.0


def headroom(arrivals: NDArray[Any], steps: list[dict[str, Any]], rate: float) -> dict[str, Any]:
    """Say up to which speed the sorter kept up, and how fast it was at the first at which it did not.

    Parameters
    ----------
    arrivals : ndarray, shape (n_spikes,), ARRIVAL_DTYPE
    steps : list of dict
        What the player said of each, slowest first.
    rate : float
    """
    tried: list[dict[str, Any]] = []
    for step in steps:
        tried.append(_step(arrivals, step, rate))
        if not tried[-1]["kept_up"]:  # the next had no fair start
            break
    kept_up = [step["speed"] for step in tried if step["kept_up"]]
    return {"kept_up_x": max(kept_up, default=1.0), "sorted_x": max(step["sorted_x"] for step in tried), "steps": tried}


def _step(arrivals: NDArray[Any], step: dict[str, Any], rate: float) -> dict[str, Any]:
    span = step["to_sample"] - step["from_sample"]
    arrived = within(arrivals, step["from_sample"], step["to_sample"])
    last = within(arrived, step["to_sample"] - round(_LAST_SHARE * span), step["to_sample"])
    due = step["began"] + (last["sample_index"] - step["from_sample"]) / (rate * step["speed"])
    behind_s = float(np.median(last["t_received"] - due)) if len(last) else None
    return {
        "speed": step["speed"],
        "sent_x": span / rate / (step["ended"] - step["began"]),
        "sorted_x": pace(arrived, rate),
        "behind_s": behind_s,
        "kept_up": behind_s is not None and behind_s < _KEPT_UP_S,
    }


def usage(looks: list[tuple[float, float, float, dict[tuple[int, str], float]]], began: float, ended: float) -> dict[str, Any]:
    """Sum up memory and CPU between two times; CPU is a share of one core, memory in MB."""
    rows = [row for row in looks if began <= row[0] <= ended]
    if len(rows) < 2:
        return {}
    at, memory = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    seconds, (first, last) = at[-1] - at[0], (rows[0], rows[-1])
    threads = {key: (cpu_s - first[3].get(key, 0.0)) / seconds for key, cpu_s in last[3].items()}
    return {
        "cpu": float((last[2] - first[2]) / seconds),
        "threads": threads,
        "rss_first_mb": float(np.median(memory[at < at[0] + 60])),
        "rss_last_mb": float(np.median(memory[at > at[-1] - 60])),
        "rss_max_mb": max(row[1] for row in looks),
        "rss_slope_mb_per_min": float(60 * np.polyfit(at, memory, 1)[0]),
    }
