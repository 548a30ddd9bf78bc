"""Draw noisy spikes from a bank: two different spikes of the same unit are a positive pair.

The published encoder makes both views from one recorded spike. Here the simulator can do what augmentation imitates: another
spike of the unit has its own noise, amplitude, sub-sample phase and, on occasion, a neighbour unit's spike on top, and is
aligned to its own noisy trough as the live detector would. The clean spike of the unit, unshifted, is the target of the
denoising decoder.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamsort.train.data import MARGIN, N_BEFORE, N_NEIGHBORS, N_PHASES, N_SAMPLES, N_TEMPLATE, Bank, Floats

SLACK = 4  # the noisy trough may be this many samples off


@dataclass(frozen=True)
class Spikes:
    """Spikes drawn from a bank.

    `snippets` and `clean` are (n, N_SAMPLES, N_NEIGHBORS) float32 in noise units; `clean` is the unit's own template at its nominal
    size and alignment.
    """

    snippets: Floats
    clean: Floats


def draw_spikes(
    bank: Bank, rng: np.random.Generator, sites: NDArray[np.int64], units: NDArray[np.int64], collision: float
) -> Spikes:
    """Draw one noisy spike of each (site, unit).

    Parameters
    ----------
    bank : Bank
        Where the units are.
    sites, units : ndarray, shape (n,), int64
        Which unit of which site each spike is of.
    collision : float
        Probability that a spike of another unit of the site lies on top.
    """
    wide = _own(bank, rng, sites, units) + _noise(bank, rng, sites)
    wide += _others(bank, rng, sites, units, collision)
    snippets = _align(wide)
    clean = bank.templates[sites, units, 0, MARGIN : MARGIN + N_SAMPLES] * bank.snr[sites, units][:, None, None]
    return Spikes(snippets, clean)


def _own(bank: Bank, rng: np.random.Generator, sites: NDArray[np.int64], units: NDArray[np.int64]) -> Floats:
    """Take the unit's template at a random phase, with the spread of sizes that bursts and drift give a unit (about 8 %)."""
    phase = rng.integers(N_PHASES, size=len(sites))
    size = bank.snr[sites, units] * np.exp(rng.normal(0.0, 0.08, len(sites))).astype(np.float32)
    window = slice(MARGIN - SLACK, MARGIN + N_SAMPLES + SLACK)
    spikes: Floats = bank.templates[sites, units, phase, window] * size[:, None, None]
    return spikes


def _others(bank: Bank, rng: np.random.Generator, sites: NDArray[np.int64], units: NDArray[np.int64], collision: float) -> Floats:
    """Take another unit of the site, shifted; never so large near the trough that the detector would have aligned to it."""
    n, length = len(sites), N_SAMPLES + 2 * SLACK
    wide = np.zeros((n, length, N_NEIGHBORS), np.float32)
    hit = np.flatnonzero(rng.random(n) < collision)
    n_units = bank.snr.shape[1]
    if not len(hit) or n_units < 2:
        return wide
    s = sites[hit]
    other = (units[hit] + rng.integers(1, n_units, len(hit))) % n_units
    lag = rng.integers(4, 42, len(hit)) * rng.choice([-1, 1], len(hit))
    own, size = bank.snr[s, units[hit]], bank.snr[s, other] * rng.uniform(0.6, 1.1, len(hit))
    size = np.where(np.abs(lag) < 10, np.minimum(size, 0.7 * own), size).astype(np.float32)
    rows = MARGIN - SLACK + np.arange(length) - lag[:, None]
    inside = (rows >= 0) & (rows < N_TEMPLATE)
    taken = bank.templates[s[:, None], other[:, None], 0, np.clip(rows, 0, N_TEMPLATE - 1)]
    wide[hit] = taken * (inside * size[:, None])[..., None]
    return wide


def _noise(bank: Bank, rng: np.random.Generator, sites: NDArray[np.int64]) -> Floats:
    """Cut independent pieces of the site's color and mix them over channels."""
    length = N_SAMPLES + 2 * SLACK
    start = rng.integers(bank.noise.shape[1] - length, size=(len(sites), 1, N_NEIGHBORS))
    pieces = bank.noise[bank.color[sites][:, None, None], start + np.arange(length)[:, None]]
    mixed: Floats = pieces @ np.swapaxes(bank.mixing[sites], 1, 2)
    return mixed


def _align(wide: Floats) -> Floats:
    """Cut each snippet so that the deepest sample near the nominal trough of channel 0 is at row N_BEFORE."""
    trough = N_BEFORE + wide[:, N_BEFORE : N_BEFORE + 2 * SLACK + 1, 0].argmin(axis=1)
    rows = trough[:, None] - N_BEFORE + np.arange(N_SAMPLES)
    aligned: Floats = np.take_along_axis(wide, rows[..., None], axis=1)
    return aligned
