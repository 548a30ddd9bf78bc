"""How the noise between the spikes is correlated, over channels and along time.

In come filtered traces in noise units, out goes a `NoiseModel`: what a matched filter must know to weigh samples by how much they
tell. It is estimated from quiet samples alone, those with no threshold crossing of their channel within a millisecond: with the
spikes left in, units of a busy tetrode lose a fifth of their distance from the noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import toeplitz
from scipy.ndimage import maximum_filter1d

Floats = NDArray[np.float32]

_CROSSING = 4.0  # noise units
_TIME_FLOOR, _SPACE_FLOOR = 0.03, 0.01  # of the largest eigenvalue; outside the filter's band there is no noise, and no signal
_MOST_COLUMNS = 1_200_000  # 40 s at 30 kHz


@dataclass(frozen=True)
class NoiseModel:
    """Noise, as if what it does in space and in time were independent.

    Attributes
    ----------
    space : ndarray, shape (n_channels, n_channels), float64
        Covariance of channels at one sample, noise units squared.
    time_root : ndarray, shape (n_samples, n_samples), float64
        Lower triangular; `time_root @ time_root.T` is the inverse of the autocorrelation over a template's samples.
    """

    space: NDArray[np.float64]
    time_root: NDArray[np.float64]

    def space_root(self, channels: NDArray[np.int32]) -> NDArray[np.float64]:
        """Return the lower triangular root of the inverse covariance of these channels."""
        root: NDArray[np.float64] = np.linalg.cholesky(np.linalg.inv(self.space[np.ix_(channels, channels)]))
        return root


def estimate_noise(blocks: Sequence[Floats], n_samples: int, quiet_samples: int) -> NoiseModel:
    """Estimate the noise from blocks of traces.

    Parameters
    ----------
    blocks : sequence of ndarray, shape (n_channels, n_columns), float32
        In noise units, each contiguous in time.
    n_samples : int
        Of a template.
    quiet_samples : int
        Samples around a threshold crossing that do not count.
    """
    n_channels = len(blocks[0])
    products, counts = np.zeros((n_channels, n_channels)), np.zeros((n_channels, n_channels))
    lagged, lag_counts = np.zeros(n_samples), np.zeros(n_samples)
    n_columns = 0
    for block in blocks:
        quiet = (maximum_filter1d(np.abs(block), 2 * quiet_samples + 1, axis=1) < _CROSSING).astype(np.float32)
        noise = block * quiet
        products += noise @ noise.T
        counts += quiet @ quiet.T
        lagged += _autocorrelation(noise, n_samples)
        lag_counts += _autocorrelation(quiet, n_samples)
        n_columns += block.shape[1]
        if n_columns >= _MOST_COLUMNS:
            break
    space = _floored(products / np.maximum(counts, 1.0) + np.diag(np.where(np.diag(counts) > 0, 0.0, 1.0)), _SPACE_FLOOR)
    along = lagged / np.maximum(lag_counts, 1.0)
    time = _floored(toeplitz(along / along[0] if along[0] > 0 else np.eye(n_samples)[0]), _TIME_FLOOR)
    return NoiseModel(space, np.linalg.cholesky(np.linalg.inv(time)))


def _autocorrelation(rows: Floats, n_lags: int) -> NDArray[np.float64]:
    """Sum over rows of x[t] x[t + lag]."""
    n = 1 << int(rows.shape[1] + n_lags).bit_length()
    power = np.zeros(n // 2 + 1)
    for row in rows:
        power += np.abs(np.fft.rfft(row, n)) ** 2
    return np.asarray(np.fft.irfft(power, n)[:n_lags])


def _floored(covariance: NDArray[np.float64], floor: float) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.maximum(values, floor * values.max())) @ vectors.T)
