from collections.abc import Callable
from typing import Any

import checks
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.signal import butter, sosfilt

from streamsort.config import PreprocessConfig
from streamsort.errors import StreamsortError
from streamsort.kernels import preprocess as kernels
from streamsort.preprocess import Preprocess
from streamsort.probe import Probe
from streamsort.records import Gap, StreamInfo

RATE = 30000.0
PERIOD = 3000
CONFIG = PreprocessConfig(noise_s=0.2, noise_period_s=0.1, noise_halflife_s=0.3)
MANY_SIZES = [[1], [7], [30], [300], [3000], [1, 500, 13]]


def stream(n_channels: int, dtype: type, gain: float = 0.5) -> StreamInfo:
    return StreamInfo("test", RATE, n_channels, np.dtype(dtype), np.full(n_channels, gain, np.float32), None, False)


def maker(n_channels: int, dtype: type = np.int16, config: PreprocessConfig = CONFIG) -> Callable[[], Preprocess]:
    return lambda: Preprocess(config, stream(n_channels, dtype), Probe.linear(n_channels))


def feed(stage: Preprocess, traces: NDArray[Any], start: int) -> checks.Arrays:
    """Return traces, unusable, and the noise level and mask in force at each sample."""
    out = stage(traces, start)
    level = np.full(traces.shape[1], -1, np.float32) if stage.noise_level is None else stage.noise_level
    return out, stage.unusable, np.tile(level, (len(traces), 1)), np.tile(stage.bad_channels, (len(traces), 1))


def noise(n_samples: int, n_channels: int, dtype: type = np.int16, seed: int = 0) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    return (rng.normal(0, 100, (n_samples, n_channels)) + rng.normal(0, 60, (n_samples, 1)) + 1000).astype(dtype)


def level_after(stage: Preprocess, traces: NDArray[Any]) -> NDArray[np.float32]:
    checks.run(stage, feed, traces, [PERIOD], PERIOD)
    assert stage.noise_level is not None
    return stage.noise_level


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("reference", ["median", "mean", "none", "auto"])
def test_chunk_invariant(reference: Any, whiten: bool) -> None:
    config = PreprocessConfig(noise_s=0.2, noise_period_s=0.1, noise_halflife_s=0.3, reference=reference, whiten=whiten)
    traces = noise(11000, 17)
    traces[:, 3] = 0
    traces[8000:8003, 5] = 32767
    sizes = MANY_SIZES if reference == "median" else MANY_SIZES[1::2]
    checks.chunk_invariant(maker(17, config=config), feed, traces, PERIOD, sizes)


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_chunk_invariant_with_random_chunks_and_values_that_are_no_number(data: st.DataObject) -> None:
    traces = noise(10000, 5, np.float32, data.draw(st.integers(0, 99)))
    for start, n, c in data.draw(st.lists(st.tuples(st.integers(0, 9999), st.integers(1, 4000), st.integers(0, 4)), max_size=4)):
        traces[start : start + n, c] = np.nan
    sizes = data.draw(st.lists(st.integers(1, 900), min_size=1, max_size=8))
    checks.chunk_invariant(maker(5, np.float32), feed, traces, PERIOD, [sizes])


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("check", [checks.empty_chunk, checks.input_kept, checks.state_continues])
def test_contract(check: Callable[..., None], dtype: type) -> None:
    check(maker(5, dtype), feed, noise(12000, 5, dtype), PERIOD)


def test_reset_starts_the_filter_anew() -> None:
    late = PreprocessConfig(noise_s=10.0, noise_period_s=0.1)
    checks.reset_is_fresh(maker(4, config=late), feed, noise(6000, 4), PERIOD)


def test_reset_keeps_the_noise_level_and_a_gap_works_like_it() -> None:
    traces = noise(12000, 4)
    one, other = maker(4)(), maker(4)()
    level = level_after(one, traces[:9000])
    level_after(other, traces[:9000])
    one.reset()
    after_reset, after_gap = one(traces[9000:9500], 9000), other(traces[9000:9500], 12000)
    np.testing.assert_array_equal(after_reset, after_gap)
    assert not after_reset[0].any() and one.noise_level is not None
    np.testing.assert_allclose(one.noise_level, level, rtol=0.2)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_read_only_strided_and_unaligned_input_compile_nothing_more(dtype: type) -> None:
    stage, traces = maker(4, dtype)(), noise(100, 4, dtype)
    expected = maker(4, dtype)()(traces, 0)
    n_signatures = len(kernels.preprocess_rows.signatures)
    size = traces.itemsize
    frozen: NDArray[Any] = np.frombuffer(traces.tobytes(), dtype).reshape(traces.shape)
    unaligned: NDArray[Any] = np.frombuffer(b"x" + traces.tobytes(), dtype, offset=1).reshape(traces.shape)
    assert size > 1 and not unaligned.flags.aligned
    for variant in (frozen, np.asfortranarray(traces), np.repeat(traces, 2, axis=0)[::2], unaligned):
        stage.reset()
        np.testing.assert_array_equal(stage(variant, 0), expected)
    assert len(kernels.preprocess_rows.signatures) == n_signatures


def test_noise_level_is_that_of_the_band_and_spikes_hardly_move_it() -> None:
    rng = np.random.default_rng(1)
    clean = rng.normal(0, 100, (12000, 4))
    spiky = clean.copy()
    for start in range(50, 11900, 1500):
        spiky[start : start + 8, 1] -= 2000
    with_spikes = level_after(maker(4)(), spiky.astype(np.int16))
    without = level_after(maker(4)(), clean.astype(np.int16))
    sections = butter(2, [CONFIG.freq_min_hz, CONFIG.freq_max_hz], "bandpass", output="sos", fs=RATE)
    np.testing.assert_allclose(without, sosfilt(sections, clean * 0.5, axis=0).std(), rtol=0.1)
    np.testing.assert_allclose(with_spikes, without, rtol=0.1)


def test_noise_level_changes_only_at_multiples_of_the_period() -> None:
    levels = checks.run(maker(3)(), feed, noise(15000, 3), [100], PERIOD)[2]
    changes = np.flatnonzero((np.diff(levels, axis=0) != 0).any(axis=1)) + 1
    assert changes.tolist() == [6000, 9000, 12000]


def test_noise_level_forgets_with_its_half_life() -> None:
    traces = noise(6000 + 15 * PERIOD, 3)
    traces[6000:] = (traces[6000:] - 1000) * 3 + 1000
    levels = checks.run(maker(3)(), feed, traces, [PERIOD], PERIOD)[2]
    before, after = levels[6000, 0], levels[-1, 0]
    halfway = levels[6000 + 3 * PERIOD, 0]  # three periods are one half-life
    assert after == pytest.approx(3 * before, rel=0.1)
    assert (halfway - before) / (after - before) == pytest.approx(0.5, abs=0.12)


def test_flat_and_noisy_channels_are_bad_zeroed_and_harmless() -> None:
    traces = noise(9000, 20)
    traces[:, 4] = 77
    traces[:, 9] = (np.random.default_rng(3).normal(0, 2500, 9000)).astype(np.int16)
    stage = maker(20)()
    level = level_after(stage, traces[:8000])
    assert np.flatnonzero(stage.bad_channels).tolist() == [4, 9]
    out = stage(traces[8000:], 8000)
    assert not out[:, [4, 9]].any() and out[:, 0].any()
    good = ~stage.bad_channels
    np.testing.assert_allclose(level[~good], np.median(level[good]))
    np.testing.assert_allclose(level_after(maker(18)(), traces[:8000, good]), level[good])


def test_a_stream_without_signal_waits_until_there_is_some() -> None:
    traces = np.zeros((12000, 4), np.int16)
    traces[8900:] = noise(3100, 4)
    stage = maker(4)()
    levels = checks.run(stage, feed, traces, [500], PERIOD)[2]
    assert np.flatnonzero(levels[:, 0] > 0).size == 0
    checks.run(stage, feed, noise(18000, 4), [500], PERIOD, start=12000)
    assert stage.noise_level is not None and not stage.bad_channels.any()


def test_a_channel_that_stays_unusable_becomes_bad_at_the_next_multiple_and_is_no_longer_reported() -> None:
    traces = noise(15000, 4, np.float32)
    traces[7000:, 2] = np.nan
    masks = checks.run(maker(4, np.float32)(), feed, traces, [250], PERIOD)
    assert np.flatnonzero(masks[3][:, 2])[0] == 9000 and not masks[3][:, [0, 1, 3]].any()
    assert np.flatnonzero(masks[1]).tolist() == list(range(7000, 9000))


def test_runs_of_unusable_samples_are_gaps() -> None:
    traces = noise(100, 3, np.float32)
    traces[10:13, 0], traces[12:15, 1], traces[99, 2] = np.nan, np.inf, np.nan
    stage = maker(3, np.float32)()
    out = stage(traces, 600)
    assert stage.gaps == [Gap(610, 5, "nan"), Gap(699, 1, "nan")]
    assert (stage.n_nonfinite, stage.n_saturated) == (6, 0) and np.isfinite(out).all()
    stage(traces[:5], 700)
    assert stage.gaps == [] and stage.n_nonfinite == 0


def test_both_ends_of_int16_are_saturation() -> None:
    traces = noise(20, 2)
    traces[3:5, 0], traces[4:6, 1] = 32767, -32768
    stage = maker(2)()
    stage(traces, 0)
    assert stage.gaps == [Gap(3, 3, "saturation")] and stage.n_saturated == 3


def test_delay_is_how_much_later_a_trough_comes_out() -> None:
    traces = np.zeros((600, 1), np.int16)
    time_ms = np.arange(-30, 30) / 30
    traces[270:330, 0] = -2000 * np.exp(-((time_ms / 0.15) ** 2))
    stage = maker(1)()
    assert abs(int(np.argmin(stage(traces, 0))) - 300 - stage.delay_samples) <= 1
    assert 0 < stage.delay_samples < 6


def test_whitening_decorrelates_neighbours_and_keeps_microvolts() -> None:
    rng = np.random.default_rng(5)
    own = rng.normal(0, 100, (12000, 8))
    mixed = own.astype(np.int16)
    mixed[:, 1:] += (0.7 * own[:, :-1]).astype(np.int16)
    plain = PreprocessConfig(noise_s=0.2, noise_period_s=0.1, reference="none")
    white = PreprocessConfig(noise_s=0.2, noise_period_s=0.1, reference="none", whiten=True)
    results = [checks.run(maker(8, config=config)(), feed, mixed, [PERIOD], PERIOD) for config in (plain, white)]
    correlation = [np.abs(np.corrcoef(result[0][6000:].T) - np.eye(8)).max() for result in results]
    assert correlation[0] > 0.4 and correlation[1] < 0.15
    np.testing.assert_allclose(results[1][2][-1], results[0][2][-1], rtol=0.1)


@pytest.mark.parametrize(
    ("traces", "start", "message"),
    [
        (np.zeros((10, 3), np.int16), 0, "shape"),
        (np.zeros((10, 4), np.float32), 0, "dtype"),
        (np.zeros(10, np.int16), 0, "shape"),
        (np.zeros((10, 4), np.int16), 2995, "straddle"),
    ],
)
def test_wrong_chunks_are_refused(traces: NDArray[Any], start: int, message: str) -> None:
    with pytest.raises(StreamsortError, match=message):
        maker(4)()(traces, start)


def test_one_section_is_enough() -> None:
    config = PreprocessConfig(filter_order=1, reference="none")
    traces = noise(2000, 4)
    sections = butter(1, [config.freq_min_hz, config.freq_max_hz], "bandpass", output="sos", fs=RATE)
    expected = sosfilt(sections, (traces - traces[0]) * 0.5, axis=0)
    np.testing.assert_allclose(maker(4, config=config)()(traces, 0), expected, atol=1e-3 * expected.std())


def test_wrong_streams_are_refused() -> None:
    with pytest.raises(StreamsortError, match="dtype float64"):
        Preprocess(CONFIG, stream(4, np.float64), Probe.linear(4))
    with pytest.raises(StreamsortError, match="probe has 5 channels"):
        Preprocess(CONFIG, stream(4, np.int16), Probe.linear(5))
    with pytest.raises(StreamsortError, match="freq_max_hz = 15000"):
        Preprocess(PreprocessConfig(freq_max_hz=15000.0), stream(4, np.int16), Probe.linear(4))
