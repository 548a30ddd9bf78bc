"""Whether what is published beside an id can be trusted: the confidence of a spike, and the state of a unit.

A `Comparison` or plain arrays come in, figures go out. A spike is right when it coincides with one of the true unit its id is
matched to; so a spike of a unit that is matched to none is wrong, however well it was assigned.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.compare import Comparison


@dataclass(frozen=True)
class Bin:
    """Spikes whose confidence lies in [low, high), in the last bin up to 1: its mean, and the share of them that are right."""

    low: float
    high: float
    n_spikes: int
    confidence: float
    right: float


@dataclass(frozen=True)
class Calibration:
    """A reliability diagram, empty bins left out, and the expected calibration error; None without a spike.

    The error is the mean over spikes of |confidence - share of right ones| of their bin (Guo et al. 2017, eq. 3).
    """

    error: float | None
    bins: tuple[Bin, ...]


def calibration(comparison: Comparison, confidence: NDArray[Any], n_bins: int = 10) -> Calibration:
    """Compare the confidence of published spikes with how many are right.

    Parameters
    ----------
    comparison : Comparison
    confidence : ndarray, shape (n_spikes,)
        0 to 1, of the spikes that were compared, in their order; also of the unsorted ones, which do not count.
    n_bins : int
        Of equal width.

    Returns
    -------
    calibration : Calibration
    """
    value = np.clip(confidence[comparison.found.row].astype(np.float64), 0.0, 1.0)
    right, place = comparison.found_right, np.minimum((value * n_bins).astype(np.int64), n_bins - 1)
    bins = []
    for k in np.unique(place):
        inside = place == k
        means = float(value[inside].mean()), float(right[inside].mean())
        bins.append(Bin(float(k / n_bins), float((k + 1) / n_bins), int(inside.sum()), *means))
    error = sum(b.n_spikes * abs(b.confidence - b.right) for b in bins) / len(value) if bins else None
    return Calibration(error, tuple(bins))


def separation(marked: NDArray[np.bool_], good: NDArray[np.bool_]) -> float | None:
    """Return the area under the ROC curve of a mark: 1 when it is on the good ones alone, 0.5 when it tells nothing.

    It is the chance that of a good and a bad one, drawn at random, the good one alone is marked; ties count half. None when all are
    good, or all bad.

    Examples
    --------
    >>> separation(np.array([True, True, False, True]), np.array([True, True, False, False]))
    0.75
    """
    if good.all() or not good.any():
        return None
    return float((1 + marked[good].mean() - marked[~good].mean()) / 2)
