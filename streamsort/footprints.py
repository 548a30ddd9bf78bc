"""What units look like at a displacement, from what they looked like at others.

In come mean snippets or single spikes with the displacement of the tissue at their time, out go templates at any displacement.
Along the probe a footprint is interpolated by kriging: weights that depend on the places of the contacts alone, so a whole set of
units is moved by a few small matrix products, and what lies outside the contacts falls off to nothing. Contacts are often too far
apart for that to be exact, but a drifting unit shows itself between them: `Footprints` keeps a running mean per unit and step of
displacement, and a template is taken from the nearest ones. So following is not paid for with a lag or with the blur of moving the
same template again and again, and a unit that returns to where it was is known there.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

# Tuned on measured footprints (sites 16 to 20 um apart) and simulated ones; a third more or less makes no difference. Measured
# footprints reach further along the probe than across.
_REACH_UM = np.array([28.0, 40.0])
_NUGGET = 0.005  # noise of a mean over its power
_FAR_UM = 1e6  # where a missing channel is put

_STEP_UM = 4.0  # of displacement, per running mean
_N_STEPS = 32  # remembered about the present displacement: 128 um
_N_NEAREST = 3  # running means that make one template
_NEGLIGIBLE = 0.03  # part of the best one's weight
_MOST_SPIKES = 100  # a running mean forgets faster ones before these, for units change
_ERROR_PER_UM = 1 / 90  # relative rms error of a moved template: 0.05 of its energy at 20 um
_UNSURE_UM = 1.0  # the displacement's own error


def move_templates(
    mean: Floats,
    channels: Ints,
    channel_locations: NDArray[np.float64],
    displacement_um: NDArray[np.float64],
    target: Ints | None = None,
) -> Floats:
    """Return templates as they look once their sources have moved along y.

    Parameters
    ----------
    mean : ndarray, shape (n_units, n_samples, n_neighbors), float32
    channels : ndarray, shape (n_units, n_neighbors), int32
        Channel of each column, -1 for none.
    channel_locations : ndarray, shape (n_channels, 2), float64
        In um.
    displacement_um : ndarray, shape (n_units,), float64
        How far each unit moves.
    target : ndarray, shape (n_units, n_targets), int32, optional
        Channels of the columns returned, -1 for none; by default `channels`.

    Returns
    -------
    moved : ndarray, shape (n_units, n_samples, n_targets), float32
    """
    target = channels if target is None else target
    spread = _FAR_UM * np.arange(1, channels.shape[1] + 1)[:, None]
    known = np.where(channels[:, :, None] >= 0, channel_locations[channels], spread)
    wanted = channel_locations[target] - np.stack([np.zeros_like(displacement_um), displacement_um], axis=1)[:, None]
    covariance = _covariance(known, known) + _NUGGET * np.eye(channels.shape[1])
    weight = np.linalg.solve(covariance, _covariance(known, wanted))
    weight[(channels < 0)[:, :, None] | (target < 0)[:, None]] = 0
    moved: Floats = mean @ weight.astype(np.float32)
    return moved


def _covariance(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Matern covariance of smoothness 3/2 between places (n, p, 2) and (n, q, 2)."""
    x, y = ((a[:, :, None, axis] - b[:, None, :, axis]) / _REACH_UM[axis] for axis in (0, 1))
    r = np.sqrt(3 * (x * x + y * y))
    covariance: NDArray[np.float64] = (1 + r) * np.exp(-r)
    return covariance


class Footprints:
    """Remember every unit at the displacements it was seen at.

    Parameters
    ----------
    channel_locations : ndarray, shape (n_channels, 2), float64
        In um.
    n_samples, n_neighbors : int
        Of a template.

    Attributes
    ----------
    channels : ndarray, shape (n_units, n_neighbors), int32
        Where each unit is looked at; -1 for none.
    """

    def __init__(self, channel_locations: NDArray[np.float64], n_samples: int, n_neighbors: int) -> None:
        self._locations = channel_locations
        self.channels: Ints = np.zeros((0, n_neighbors), np.int32)
        self._mean: Floats = np.zeros((0, _N_STEPS, n_samples, n_neighbors), np.float32)
        self._n_spikes: Floats = np.zeros((0, _N_STEPS), np.float32)
        self._at_um = np.zeros((0, _N_STEPS))  # mean displacement of these spikes

    def add(self, channels: Ints, mean: Floats, n_spikes: int, displacement_um: float) -> None:
        """Take one more unit in: its mean snippet (n_samples, n_neighbors) on `channels` (n_neighbors,) at a displacement."""
        self.channels = np.concatenate([self.channels, channels[None]])
        for name in ("_mean", "_n_spikes", "_at_um"):
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros((1, *column.shape[1:]), column.dtype)]))
        slot = _slot(displacement_um)
        self._mean[-1, slot], self._n_spikes[-1, slot], self._at_um[-1, slot] = mean, min(n_spikes, _MOST_SPIKES), displacement_um

    def learn(self, unit: NDArray[Any], snippets: Floats, displacement_um: NDArray[np.float64]) -> None:
        """Take spikes in.

        Parameters
        ----------
        unit : ndarray, shape (n_spikes,), integer
            Row of each one's unit.
        snippets : ndarray, shape (n_spikes, n_samples, n_neighbors), float32
            On the channels of that unit, aligned as its template is.
        displacement_um : ndarray, shape (n_spikes,), float64
            Of each one's unit at that time.
        """
        for u, snippet, at_um in zip(unit.tolist(), snippets, displacement_um.tolist(), strict=True):
            slot = _slot(at_um)
            if abs(self._at_um[u, slot] - at_um) > _STEP_UM:  # another displacement, a whole round away
                self._n_spikes[u, slot] = 0
            self._n_spikes[u, slot] = n = min(self._n_spikes[u, slot] + 1, _MOST_SPIKES)
            self._mean[u, slot] += (snippet - self._mean[u, slot]) / n
            self._at_um[u, slot] += (at_um - self._at_um[u, slot]) / n

    def templates(self, unit: NDArray[Any], displacement_um: NDArray[np.float64]) -> Floats:
        """Return the templates (n, n_samples, n_neighbors) of some units, each at its displacement (n,).

        They are means of what was seen at the nearest displacements, each moved from there and weighted against its noise and
        the error of moving.
        """
        by_um = displacement_um[:, None] - self._at_um[unit]
        n_spikes = self._n_spikes[unit]
        strongest = self._mean[unit, n_spikes.argmax(axis=1)]
        power = np.square(strongest).mean(axis=(1, 2))[:, None]
        error = 1 / np.maximum(n_spikes, 1e-9) + power * (by_um**2 + _UNSURE_UM**2) * _ERROR_PER_UM**2
        nearest = np.argsort(error, axis=1, kind="stable")[:, :_N_NEAREST]
        weight = np.take_along_axis(1 / error, nearest, axis=1)
        weight[weight < _NEGLIGIBLE * weight[:, :1]] = 0
        weight /= weight.sum(axis=1, keepdims=True)
        total: Floats = np.zeros_like(strongest)
        for k in range(_N_NEAREST):
            used = np.flatnonzero(weight[:, k])
            rows, slots = unit[used], nearest[used, k]
            moved = move_templates(self._mean[rows, slots], self.channels[rows], self._locations, by_um[used, slots])
            total[used] += weight[used, k, None, None].astype(np.float32) * moved
        return total


def _slot(displacement_um: float) -> int:
    return round(displacement_um / _STEP_UM) % _N_STEPS
