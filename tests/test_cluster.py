"""The online prototypes: predicting reads, learning follows, strangers become units."""

from typing import Any

import naive
import numpy as np
from numpy.typing import NDArray

from streamsort.calibrate import Calibration
from streamsort.cluster import Assignment, Prototypes
from streamsort.config import ClusterConfig
from streamsort.records import PEAK_DTYPE

N_DIMS, N_ROWS = 8, 12
NEIGHBORS = np.array([[0, 1], [1, 0], [2, -1]], np.int32)
SHAPE = -np.exp(-0.5 * ((np.arange(N_ROWS) - 5) / 1.5) ** 2).astype(np.float32)


def template(left: float, right: float) -> NDArray[np.float32]:
    return np.stack([left * SHAPE, right * SHAPE], axis=1).astype(np.float32)


def store(**changes: Any) -> Prototypes:
    """Two units (ids 5 and 9) and a reject prototype on channel 0, another unit (id 9) on channel 1."""
    mean = np.zeros((4, N_DIMS), np.float32)
    mean[1, 0], mean[2, 1], mean[3, 0] = 10, 10, 10
    calibration = Calibration(
        whitening=np.identity(N_DIMS, np.float32),
        channel=np.array([0, 0, 0, 1]),
        unit=np.array([0, 1, -1, 1]),
        n_spikes=np.array([200, 100, 50, 30]),
        mean=mean,
        spread=np.ones(4, np.float32),
        template=np.stack([template(8, 2), template(14, 12), template(4, 0), template(12, 14)]),
        label=np.zeros(0, np.int64),
    )
    return Prototypes(calibration, [5, 9], NEIGHBORS, 4.0, ClusterConfig(**changes))


def at(channel: int, x: NDArray[Any], start: int = 0) -> tuple[NDArray[np.float32], NDArray[Any]]:
    peaks = np.zeros(len(x), PEAK_DTYPE)
    peaks["sample_index"], peaks["channel"] = start + np.arange(len(x)) * 100, channel
    return x.astype(np.float32), peaks


def teach(prototypes: Prototypes, channel: int, x: NDArray[Any], snippet: NDArray[np.float32], start: int = 0) -> Assignment:
    embeddings, peaks = at(channel, x, start)
    assignment = prototypes.predict(embeddings, peaks["channel"])
    prototypes.learn(assignment, peaks, np.repeat(snippet[None], len(x), axis=0))
    return assignment


def test_spikes_go_to_the_nearest_on_their_channel(rng: np.random.Generator) -> None:
    prototypes = store()
    x = rng.normal(size=(4, N_DIMS)).astype(np.float32) * np.float32(0.5)
    x[1, 0] += 10
    x[2, 1] += 10
    found = prototypes.predict(x, np.array([0, 0, 0, 2]))
    assert found.unit.tolist() == [5, 9, -1, -1]
    assert found.prototype.tolist() == [0, 1, 2, -1]
    assert (found.confidence[:2] > 0.99).all() and (found.confidence[2:] == 0).all()


def test_far_spikes_are_unsorted() -> None:
    found = store().predict(np.full((1, N_DIMS), 30, np.float32), np.array([0]))
    assert (found.unit[0], found.prototype[0], found.confidence[0]) == (-1, -1, 0)


def test_kernel_agrees_with_its_definition(rng: np.random.Generator) -> None:
    prototypes = store(outlier=1e9)
    prototypes.spread[:] = [0.6, 1.0, 2.0, 1.5]
    prototypes.learn(prototypes.predict(*at_nothing()), np.zeros(0, PEAK_DTYPE), np.zeros((0, N_ROWS, 2), np.float32))
    x = (rng.normal(size=(200, N_DIMS)) * 4).astype(np.float32)
    x[:, 0] += rng.uniform(0, 10, 200).astype(np.float32)
    channel = rng.integers(0, 3, 200)
    found = prototypes.predict(x, channel)
    weight = np.log([200.0, 100.0, 50.0, 30.0])
    spread = np.array([0.6, 1.0, 1.0, 1.5])  # the reject prototype is no wider than a unit
    prototype, distance, confidence = naive.assign_nearest(
        x, channel, prototypes.channel, prototypes.mean, spread, weight, prototypes.unit
    )
    assert found.prototype.tolist() == prototype
    np.testing.assert_allclose(found.distance, distance, rtol=1e-4)
    named = found.unit >= 0
    np.testing.assert_allclose(found.confidence[named], np.array(confidence)[named], atol=1e-4)


def at_nothing() -> tuple[NDArray[np.float32], NDArray[Any]]:
    return np.zeros((0, N_DIMS), np.float32), np.zeros(0, np.int64)


def test_a_row_does_not_depend_on_its_company(rng: np.random.Generator) -> None:
    prototypes = store()
    prototypes.whitening = rng.normal(size=(N_DIMS, N_DIMS)).astype(np.float32)
    x, channel = rng.normal(size=(33, N_DIMS)).astype(np.float32), np.zeros(33, np.int64)
    together = prototypes.predict(x, channel)
    for i in range(33):
        alone = prototypes.predict(x[i : i + 1], channel[:1])
        assert alone.white.tobytes() == together.white[i].tobytes()
        assert alone.distance[0] == together.distance[i]


def test_predict_changes_nothing(rng: np.random.Generator) -> None:
    prototypes = store()
    before = [getattr(prototypes, name).copy() for name in ("mean", "spread", "template", "n_spikes")]
    prototypes.predict(rng.normal(size=(50, N_DIMS)).astype(np.float32), np.zeros(50, np.int64))
    for name, value in zip(("mean", "spread", "template", "n_spikes"), before, strict=True):
        assert (getattr(prototypes, name) == value).all()


def test_a_prototype_follows_its_unit(rng: np.random.Generator) -> None:
    """Ten noise units of drift in 400 spikes, no step of them clear of the last: one identity."""
    prototypes = store()
    for k in range(40):
        x = rng.normal(size=(10, N_DIMS))
        x[:, 2] += 0.25 * k
        found = teach(prototypes, 0, x, template(8, 2), start=k * 1000)
        assert (found.unit == 5).mean() >= 0.8
    assert 8 < prototypes.mean[0, 2] < 10
    assert np.abs(prototypes.mean[1] - store().mean[1]).max() == 0


def test_strangers_become_a_newcomer(rng: np.random.Generator) -> None:
    prototypes = store(outlier=4.0)
    x = rng.normal(size=(30, N_DIMS))
    x[:, 5] += 40
    found = teach(prototypes, 0, x, template(0.5, 9))
    assert (found.unit == -1).all()
    newcomers = list(prototypes.discover(0))
    assert [(new.channel, new.unit, new.n_spikes) for new in newcomers] == [(0, -1, 30)]
    prototypes.add(newcomers[0], 12)
    assert (prototypes.predict(*at(0, x)[:1], at(0, x)[1]["channel"]).unit == 12).all()
    assert list(prototypes.discover(0)) == []


def test_a_unit_that_moves_to_another_channel_keeps_its_id(rng: np.random.Generator) -> None:
    """Spikes on channel 1 that fit nothing there, but look like unit 5 seen from its other side."""
    prototypes = store()
    x = rng.normal(size=(30, N_DIMS))
    x[:, 4] += 60
    teach(prototypes, 1, x, template(2, 8))
    newcomer = next(prototypes.discover(0))
    assert (newcomer.channel, newcomer.unit) == (1, 5)


def test_scattered_strangers_are_not_a_unit(rng: np.random.Generator) -> None:
    prototypes = store()
    teach(prototypes, 2, rng.normal(size=(60, N_DIMS)) * 6, template(9, 0))
    assert list(prototypes.discover(0)) == []


def test_old_strangers_are_forgotten(rng: np.random.Generator) -> None:
    prototypes = store()
    for start, expected in ((0, []), (1_000_000, []), (1_100_000, [20])):
        teach(prototypes, 2, rng.normal(size=(10, N_DIMS)), template(9, 0), start=start)
        assert [new.n_spikes for new in prototypes.discover(oldest_sample=start - 500_000)] == expected


def test_a_unit_that_fell_silent_is_known_again_after_a_larger_step(rng: np.random.Generator) -> None:
    """On channel 1 its template has changed too much for a unit that still fires on channel 0, not for one that moved."""
    for silent, expected in ((True, 5), (False, -1)):
        prototypes = store()
        teach(prototypes, 0, rng.normal(size=(60, N_DIMS)), template(8, 2), start=0)
        if not silent:
            teach(prototypes, 0, rng.normal(size=(30, N_DIMS)), template(8, 2), start=6000)
        teach(prototypes, 1, rng.normal(size=(30, N_DIMS)) + 60, template(5, 12), start=6000)
        assert [new.unit for new in prototypes.discover(0)] == [expected]


def test_a_wide_echo_swallows_no_stranger(rng: np.random.Generator) -> None:
    prototypes = store()
    prototypes.spread[2] = 3.0
    x = rng.normal(size=(30, N_DIMS))
    x[:, 1] += 18
    teach(prototypes, 0, x, template(12, 0))
    assert [new.n_spikes for new in prototypes.discover(0)] == [30]


def test_noise_is_known_by_its_height(rng: np.random.Generator) -> None:
    prototypes = store()
    teach(prototypes, 2, rng.normal(size=(40, N_DIMS)), template(4.2, 0))
    assert prototypes.is_noise(next(prototypes.discover(0)))
    teach(prototypes, 2, rng.normal(size=(40, N_DIMS)), template(7, 0))
    assert not prototypes.is_noise(next(prototypes.discover(0)))
