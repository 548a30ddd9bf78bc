"""The noise between the spikes is found though there are spikes."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scenes import N_SAMPLES, Cell, Event, add_spikes
from scipy.linalg import toeplitz
from scipy.signal import lfilter

from streamsort.covariance import NoiseModel, estimate_noise
from streamsort.probe import Probe

Floats = NDArray[np.float32]
IN_TIME, IN_SPACE, QUIET_SAMPLES = 0.6, 0.5, 30
SPACE = toeplitz(IN_SPACE ** np.arange(4))
ALONG = IN_TIME ** np.arange(N_SAMPLES)


def traces(n_samples: int = 150_000, seed: int = 0) -> Floats:
    """Make noise of variance 1, correlated over 4 channels and from sample to sample, (n_samples, 4)."""
    white = np.random.default_rng(seed).normal(size=(n_samples, 4)) @ np.linalg.cholesky(SPACE).T
    noise: Floats = lfilter([np.sqrt(1 - IN_TIME**2)], [1, -IN_TIME], white, axis=0).astype(np.float32)
    return noise


def with_spikes(quiet: Floats) -> Floats:
    probe, busy = Probe.linear(4, 20.0), quiet.copy()
    cells = [Cell(25.0, 25.0, 30.0), Cell(15.0, 55.0)]
    rng = np.random.default_rng(1)
    times = rng.integers(100, len(busy) - 100, len(busy) // 500).tolist()
    add_spikes(busy, cells, probe, [Event(int(rng.integers(2)), at) for at in times])
    return busy


def autocorrelation(model: NoiseModel) -> NDArray[Any]:
    return np.linalg.inv(model.time_root @ model.time_root.T)


def estimated(*blocks: Floats) -> NoiseModel:
    return estimate_noise([np.ascontiguousarray(block.T) for block in blocks], N_SAMPLES, QUIET_SAMPLES)


def test_noise_is_found_between_spikes() -> None:
    busy = with_spikes(traces())
    assert np.abs(np.cov(busy.T) - SPACE).max() > 0.5  # with the spikes it would be far off
    model = estimated(busy)
    np.testing.assert_allclose(model.space, SPACE, atol=0.05)
    np.testing.assert_allclose(autocorrelation(model), toeplitz(ALONG), atol=0.05)


def test_a_recording_in_pieces_gives_the_same_as_whole() -> None:
    whole = with_spikes(traces(60_000))
    one, other = estimated(whole), estimated(whole[:20_000], whole[20_000:33_000], whole[33_000:])
    np.testing.assert_allclose(one.space, other.space, atol=0.02)
    np.testing.assert_allclose(autocorrelation(one), autocorrelation(other), atol=0.02)


def test_roots_are_lower_triangular_roots_of_inverses() -> None:
    model = estimated(traces(30_000))
    channels = np.array([3, 1], np.int32)
    root = model.space_root(channels)
    for lower in (root, model.time_root):
        np.testing.assert_array_equal(lower, np.tril(lower))
    np.testing.assert_allclose(root @ root.T @ model.space[np.ix_(channels, channels)], np.eye(2), atol=1e-9)


def test_noise_through_the_roots_is_white() -> None:
    noise = traces(30_000)
    model = estimated(noise)
    windows = np.stack([noise[k : k + N_SAMPLES] for k in range(0, 29_000, N_SAMPLES)])
    white = np.einsum("nsc,st,ck->ntk", windows, model.time_root, model.space_root(np.arange(4, dtype=np.int32)))
    assert white.std() == pytest.approx(1.0, abs=0.03)
    assert abs((white[:, 1:] * white[:, :-1]).mean()) < 0.03
    assert abs((white[..., 0] * white[..., 1]).mean()) < 0.03


@pytest.mark.parametrize("what", ["dead", "never quiet", "constant"])
def test_a_channel_that_tells_nothing_does_no_harm(what: str) -> None:
    noise = traces(30_000)
    noise[:, 2] = np.full(len(noise), what == "constant") if what != "never quiet" else 50 * noise[:, 2]
    model = estimated(noise)
    assert np.isfinite(model.space).all() and np.isfinite(model.time_root).all()
    assert np.linalg.eigvalsh(model.space).min() > 0
    others = np.ix_([0, 1, 3], [0, 1, 3])
    np.testing.assert_allclose(model.space[others], SPACE[others], atol=0.1)


def test_what_a_filter_removed_does_not_blow_up_the_inverse() -> None:
    """Without noise in a band, the inverse would weigh that band without bounds."""
    spectrum = np.fft.rfft(np.random.default_rng(0).normal(size=(30_000, 4)), axis=0)
    spectrum[3000:] = 0
    noise = np.fft.irfft(spectrum, axis=0)
    model = estimated((noise / noise.std()).astype(np.float32))
    values = np.linalg.eigvalsh(autocorrelation(model))
    assert values.max() / values.min() < 100
