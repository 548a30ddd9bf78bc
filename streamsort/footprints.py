"""What units look like at a displacement, from what they looked like at another.

In come mean snippets, out go the same units further along the probe. A footprint is interpolated by kriging: weights that depend on
the places of the contacts alone, so a whole set of units is moved by a few small matrix products, and what lies outside the
contacts falls off to nothing. Contacts are often too far apart for that to be exact: of real footprints on sites 20 um apart, moved
by as much, two in twenty resemble their units by a cosine of no more than 0.7, whatever the kernel; the others by 0.9 to 1.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

# Tuned on measured footprints (sites 16 to 20 um apart) and simulated ones; a third more or less makes no difference. Measured
# footprints reach further along the probe than across.
_REACH_UM = np.array([28.0, 40.0])
_NUGGET = 0.005  # noise of a mean over its power
_FAR_UM = 1e6  # where a missing channel is put


def move_templates(
    mean: Floats,
    channels: Ints,
    channel_locations: NDArray[np.float64],
    displacement_um: NDArray[np.float64],
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

    Returns
    -------
    moved : ndarray, shape (n_units, n_samples, n_neighbors), float32
    """
    spread = _FAR_UM * np.arange(1, channels.shape[1] + 1)[:, None]
    known = np.where(channels[:, :, None] >= 0, channel_locations[channels], spread)
    wanted = channel_locations[channels] - np.stack([np.zeros_like(displacement_um), displacement_um], axis=1)[:, None]
    covariance = _covariance(known, known) + _NUGGET * np.eye(channels.shape[1])
    weight = np.linalg.solve(covariance, _covariance(known, wanted))
    weight[(channels < 0)[:, :, None] | (channels < 0)[:, None]] = 0
    moved: Floats = mean @ weight.astype(np.float32)
    return moved


def _covariance(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Matern covariance of smoothness 3/2 between places (n, p, 2) and (n, q, 2)."""
    x, y = ((a[:, :, None, axis] - b[:, None, :, axis]) / _REACH_UM[axis] for axis in (0, 1))
    r = np.sqrt(3 * (x * x + y * y))
    covariance: NDArray[np.float64] = (1 + r) * np.exp(-r)
    return covariance
