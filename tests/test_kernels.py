from typing import Any

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.signal import butter, sosfilt

from streamsort.kernels import detect as kernels_detect
from streamsort.kernels import preprocess as kernels
from streamsort.probe import Probe
from streamsort.records import PEAK_DTYPE

SECTIONS = butter(2, [300, 6000], "bandpass", output="sos", fs=30000)


class Filter:
    """`preprocess_rows` with its arrays."""

    def __init__(
        self, n_channels: int, gain: float = 1.0, good: NDArray[Any] | None = None, sections: NDArray[Any] = SECTIONS
    ) -> None:
        self.channels = np.zeros((kernels.N_CHANNEL_ROWS, n_channels), np.float32)
        self.channels[kernels.GAIN] = gain
        self.channels[kernels.GOOD] = 1 if good is None else good
        self.sections = sections.astype(np.float32)
        self.state = np.zeros((2 * len(sections), n_channels), np.float32)
        self.hits = np.zeros(n_channels, np.int64)

    def __call__(self, raw: NDArray[Any], reference: int = kernels.REFERENCE_NONE, spread: float = 1.0) -> NDArray[np.float32]:
        raw = raw.view()
        raw.flags.writeable = False
        out = np.full(raw.shape, np.nan, np.float32)
        self.unusable = np.full(len(raw), 255, np.uint8)
        limits, fault = ([-32767, 32766], kernels.SATURATED) if raw.dtype == np.int16 else ([-1e9, 1e9], kernels.NONFINITE)
        scratch = np.zeros((2, raw.shape[1]), np.float32)
        self.n_unusable = kernels.preprocess_rows(
            raw, np.array(limits, raw.dtype), fault, self.channels, self.sections, self.state,
            reference, spread, scratch, self.hits, out, self.unusable,
        )  # fmt: skip
        return out


def test_filter_equals_its_definition_bit_for_bit() -> None:
    raw = np.random.default_rng(0).integers(-3000, 3000, (200, 21)).astype(np.int16)
    found = Filter(21, gain=0.25)(raw)
    np.testing.assert_array_equal(found, naive.band_pass(naive.fill(raw, np.inf) * np.float32(0.25), SECTIONS))


@pytest.mark.parametrize("order", [3, 5])
def test_filters_of_any_order_equal_their_definition(order: int) -> None:
    sections = butter(order, [300, 6000], "bandpass", output="sos", fs=30000)
    raw = np.random.default_rng(5).integers(-3000, 3000, (200, 21)).astype(np.int16)
    np.testing.assert_array_equal(Filter(21, sections=sections)(raw), naive.band_pass(naive.fill(raw, np.inf), sections))


def test_filter_in_float32_agrees_with_scipy_in_float64_despite_an_offset() -> None:
    raw = (np.random.default_rng(1).normal(0, 50, (3000, 8)) + 20000).astype(np.int16)
    found = Filter(8, gain=0.2)(raw)
    expected = sosfilt(SECTIONS, (raw - raw[0]) * 0.2, axis=0)
    assert np.abs(found - expected).max() < 1e-3 * expected.std()


def test_a_constant_offset_does_not_ring() -> None:
    assert not Filter(3)(np.full((100, 3), 12345, np.int16)).any()


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_values_that_are_no_number_are_held(data: st.DataObject) -> None:
    raw = np.random.default_rng(data.draw(st.integers(0, 99))).normal(0, 20, (40, 3)).astype(np.float32)
    places = data.draw(st.lists(st.tuples(st.integers(0, 39), st.integers(0, 2), st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))))
    for i, c, value in places:
        raw[i, c] = value
    one = Filter(3)
    np.testing.assert_array_equal(one(raw), naive.band_pass(naive.fill(raw, 1e9), SECTIONS))
    hit = ~(np.abs(raw) <= 1e9)
    np.testing.assert_array_equal(one.unusable, hit.any(axis=1) * kernels.NONFINITE)
    np.testing.assert_array_equal(one.hits, hit.sum(axis=0))
    assert one.n_unusable == hit.any(axis=1).sum()


def test_saturation_is_marked_on_good_channels_only() -> None:
    raw = np.zeros((4, 3), np.int16)
    raw[1, 0], raw[2, 1], raw[3, 2] = 32767, -32768, 32767
    one = Filter(3, good=np.array([1, 1, 0]))
    one(raw)
    assert one.unusable.tolist() == [0, kernels.SATURATED, kernels.SATURATED, 0]
    assert one.hits.tolist() == [1, 1, 0] and one.n_unusable == 2


@given(
    n_channels=st.sampled_from([1, 2, 3, 7, 16, 33, 64]),
    seed=st.integers(0, 999),
    kind=st.sampled_from(["normal", "integers", "heavy", "equal"]),
    spread=st.sampled_from([1e-3, 1.0, 1e4]),
    guess=st.sampled_from([-1e6, 0.0, 3.3]),
)
@settings(max_examples=150, deadline=None)
def test_median_is_exact(n_channels: int, seed: int, kind: str, spread: float, guess: float) -> None:
    rng = np.random.default_rng(seed)
    rows: dict[str, NDArray[Any]] = {
        "normal": rng.normal(0, 10, n_channels),
        "integers": rng.integers(-2, 3, n_channels),
        "heavy": rng.standard_cauchy(n_channels) * 1e3,
        "equal": np.full(n_channels, rng.integers(-1, 2)),
    }
    row = rows[kind].astype(np.float32)
    good = rng.random(n_channels) < 0.8
    good[rng.integers(n_channels)] = True
    keys = np.zeros(n_channels, np.int32)
    shown = np.where(good, row, np.inf).astype(np.float32)
    found = kernels._median(shown, int(good.sum()), np.float32(guess), np.float32(spread), keys)
    assert found == np.median(row[good])


@pytest.mark.parametrize("reference", ["none", "mean", "median"])
def test_reference_is_over_the_good_channels_and_bad_ones_are_zeroed(reference: str) -> None:
    rng = np.random.default_rng(2)
    raw = rng.integers(-500, 500, (60, 24)).astype(np.int16)
    good = np.ones(24, bool)
    good[[3, 11]] = False
    code = {"none": kernels.REFERENCE_NONE, "mean": kernels.REFERENCE_MEAN, "median": kernels.REFERENCE_MEDIAN}[reference]
    found = Filter(24, good=good)(raw, code, spread=100.0)
    expected = naive.subtract_reference(naive.band_pass(naive.fill(raw, np.inf), SECTIONS), good, reference)
    np.testing.assert_allclose(found, expected, atol=0 if reference == "median" else 1e-3)
    assert not found[:, ~good].any()


def test_whitening_sums_the_neighbourhood() -> None:
    rng = np.random.default_rng(3)
    traces = rng.normal(0, 10, (50, 9)).astype(np.float32)
    table, weights = rng.integers(0, 9, (4, 9)).astype(np.int32), rng.normal(0, 1, (4, 9)).astype(np.float32)
    found = traces.copy()
    kernels.whiten_rows(found, table, weights, np.zeros(9, np.float32))
    np.testing.assert_allclose(found, naive.whiten(traces, table, weights), atol=1e-4)


POLARITY = {"neg": (-1, -1), "pos": (1, 1), "both": (-1, 1)}


@given(
    seed=st.integers(0, 9999),
    sign=st.sampled_from(["neg", "pos", "both"]),
    sweep=st.integers(1, 6),
    radius_um=st.sampled_from([0.0, 25.0, 45.0]),
    coarse=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_peaks_equal_their_definition(seed: int, sign: str, sweep: int, radius_um: float, coarse: bool) -> None:
    rng = np.random.default_rng(seed)
    n_channels = int(rng.integers(1, 9))
    probe = Probe(20.0 * rng.integers(0, 5, (n_channels, 2)).astype(np.float64), rng.integers(0, 2, n_channels).astype(np.int32))
    traces = rng.normal(0, 2, (60, n_channels)).astype(np.float32)
    traces = np.round(traces) if coarse else traces  # coarse: many ties and plateaus
    thresholds = rng.uniform(0.5, 4, n_channels).astype(np.float32)
    peaks = np.zeros(60 * n_channels, PEAK_DTYPE)
    spans = np.array([sweep, 3, 4, 1000, 1030])
    unusable = np.zeros(60, np.uint8)
    unusable[40] = 1
    polarity = np.array(POLARITY[sign], np.float32)
    n = kernels_detect.find_peaks(traces, unusable, 8, 50, thresholds, probe.neighbors(radius_um), polarity, spans, peaks)
    expected = naive.find_peaks(traces, thresholds, np.round(probe.distances_um(), 3) <= radius_um, sweep, sign, 8, 50)
    assert [(int(p["sample_index"]) - 1000, int(p["channel"])) for p in peaks[:n]] == expected
    for peak, (s, c) in zip(peaks[:n], expected, strict=True):
        assert peak["amplitude_uv"] == traces[s, c]
        assert peak["flags"] == (2 if s < 30 or s - 3 <= 40 < s + 4 else 0)


def test_snippets_are_cut_with_zeros_where_there_is_no_neighbour() -> None:
    rng = np.random.default_rng(4)
    traces = rng.normal(0, 1, (60, 5)).astype(np.float32)
    neighbors = Probe.linear(5).neighbors(25.0, 4)
    where = [(10, 0), (30, 2), (55, 4)]
    peaks = np.array([(s + 500, c, 0, 0.0) for s, c in where], PEAK_DTYPE)
    found = np.full((3, 9, 4), np.nan, np.float32)
    kernels_detect.cut_snippets(traces, 500, peaks, neighbors, 5, found)
    np.testing.assert_array_equal(found, naive.cut_snippets(traces, where, neighbors, 5, 4))
    assert not found[:, :, 3].any()
