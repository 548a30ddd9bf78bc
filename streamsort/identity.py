"""Whether a neuron keeps its id: three figures for every true unit of a `Comparison`.

A true spike carries the ids of the published spikes that coincide with it, except of those that are right for another unit: a spike
that was missed, and at the moment of which a neighbour rightly fired, carries none. What was missed or not found is a matter of
accuracy; here only the ids that were published count.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamsort.compare import Comparison

STABILITY_WINDOW_S = 10.0
SWITCH_WINDOW_S, SWITCH_SPIKES = 2.0, 10  # a window lasts so long, and longer where a unit fires less than so often in it
LEAST_CARRIED = 3  # fewer spikes are no majority: one that was misassigned, or two, make no switch


class Identity(NamedTuple):
    """How an id lasted; None where there was nothing to tell it from."""

    stability: float | None
    purity: float | None
    switches: int


def identities(comparison: Comparison) -> list[Identity]:
    """Tell for each true unit how its id lasted, in order of `comparison.true.labels`."""
    i, found_unit = carried(comparison)
    true, n_units = comparison.true, len(comparison.true.labels)
    order = np.lexsort((i, true.unit[i]))
    i, found_unit = i[order], found_unit[order]
    bounds = np.searchsorted(true.unit[i], np.arange(n_units + 1))
    return [
        _identity(comparison, true.sample_index[true.unit == u], true.sample_index[i[a:b]], found_unit[a:b])
        for u, a, b in zip(range(n_units), bounds[:-1], bounds[1:], strict=True)
    ]


def carried(comparison: Comparison) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """List which true spikes carry which id: indices into `comparison.true` and, (n_carried,) each, into `found.labels`."""
    i, j = comparison.near
    rightly_anothers = comparison.found_right[j] & ~comparison.of_partners
    return i[~rightly_anothers], comparison.found.unit[j[~rightly_anothers]]


def _identity(
    comparison: Comparison, fired: NDArray[np.int64], carried: NDArray[np.int64], found_unit: NDArray[np.int64]
) -> Identity:
    """Judge one unit by the sample indices of all its spikes and by (sample index, id) of what they carry."""
    rate, low, high = comparison.sampling_frequency, comparison.low, comparison.high
    window = max(SWITCH_WINDOW_S * rate, SWITCH_SPIKES * (high - low) / len(fired))
    stability_window = STABILITY_WINDOW_S * rate
    return Identity(
        _stability((fired - low) // stability_window, (carried - low) // stability_window, found_unit),
        _purity(carried < low + (high - low) / 10, carried >= high - (high - low) / 10, carried, found_unit),
        _switches((carried - low) // window, carried, found_unit),
    )


def _stability(
    fired_in: NDArray[np.floating[Any]], carried_in: NDArray[np.floating[Any]], found_unit: NDArray[np.int64]
) -> float | None:
    """Return the share of windows whose id is that of most of them; in a window, an id has to be on half of the unit's spikes."""
    carriers = []
    for window in np.unique(carried_in):
        counts = np.bincount(found_unit[carried_in == window])
        if 2 * counts.max() >= np.count_nonzero(fired_in == window):
            carriers.append(int(counts.argmax()))
    return float(np.bincount(carriers).max() / len(carriers)) if carriers else None


def _purity(
    early: NDArray[np.bool_], late: NDArray[np.bool_], carried: NDArray[np.int64], found_unit: NDArray[np.int64]
) -> float | None:
    """Return how many of the late spikes that carry an id carry the one that most of the early ones do."""
    if not early.any() or not late.any():
        return None
    home = np.bincount(found_unit[early]).argmax()
    return float(len(np.unique(carried[late & (found_unit == home)])) / len(np.unique(carried[late])))


def _switches(window: NDArray[np.floating[Any]], carried: NDArray[np.int64], found_unit: NDArray[np.int64]) -> int:
    """Count how often, from window to window, another id takes over.

    An id holds a window when more than half of the unit's spikes that carry any carry it, and at least three. The one that held
    the last window keeps it as long as that is so, even if another is on more spikes: two units that publish every spike are not
    a switch. Windows that none holds are passed over.
    """
    held, switches = -1, 0
    for one in np.unique(window):
        inside = window == one
        counts = np.bincount(found_unit[inside], minlength=held + 1)
        holds = (counts >= LEAST_CARRIED) & (2 * counts > len(np.unique(carried[inside])))
        if holds.any() and not (held >= 0 and holds[held]):
            switches += held >= 0
            held = int(counts.argmax())
    return int(switches)
