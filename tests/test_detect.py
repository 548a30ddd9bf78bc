from collections.abc import Callable
from typing import Any

import checks
import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamsort.config import DetectConfig, PreprocessConfig, SnippetConfig
from streamsort.detect import Detect
from streamsort.kernels import detect as kernels_detect
from streamsort.kernels import preprocess as kernels
from streamsort.preprocess import Preprocess
from streamsort.probe import Probe
from streamsort.records import PEAK_DTYPE, Flag, StreamInfo
from streamsort.snippets import Snippets

RATE = 30000.0
PROBE = Probe.linear(6, 20.0)
SNIPPETS = Snippets(SnippetConfig(n_neighbors=5), PROBE, RATE)
CONFIG = DetectConfig(radius_um=25.0)
LEVEL = np.full(6, 10, np.float32)
NO_PEAKS = np.zeros(0, PEAK_DTYPE)


def make() -> Detect:
    return Detect(CONFIG, PROBE, RATE, SNIPPETS.n_before, SNIPPETS.n_after)


def feed(stage: Detect, traces: NDArray[Any], start: int) -> checks.Arrays:
    before = stage.through_sample
    peaks = stage(traces, start, LEVEL, (np.abs(traces[:, 0]) > 39).astype(np.uint8))
    assert stage.through_sample >= start + len(traces) - stage.margin
    assert ((peaks["sample_index"] >= before) & (peaks["sample_index"] < stage.through_sample)).all()
    return peaks, SNIPPETS(stage.window, peaks)


def noise(n_samples: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 18, (n_samples, 6)).astype(np.float32)


def quiet(n_samples: int, *spikes: tuple[int, int, float]) -> NDArray[np.float32]:
    traces = np.zeros((n_samples, 6), np.float32)
    for s, c, amplitude in spikes:
        traces[s, c] = amplitude
    return traces


def detect(stage: Detect, traces: NDArray[np.float32], start: int = 0) -> list[tuple[int, int]]:
    peaks = stage(traces, start, LEVEL, np.zeros(len(traces), np.uint8))
    return [(int(peak["sample_index"]), int(peak["channel"])) for peak in peaks]


def test_peaks_and_snippets_equal_their_definition() -> None:
    traces = noise(2000)
    peaks, snippets = checks.run(make(), feed, traces, [50], 10000)
    found = [(int(peak["sample_index"]), int(peak["channel"])) for peak in peaks]
    near = PROBE.distances_um() <= 25.0
    assert found == naive.find_peaks(traces, LEVEL * 4, near, 9, "neg", 18, 2000 - 29) and len(found) > 50
    np.testing.assert_array_equal(snippets, naive.cut_snippets(traces, found, PROBE.neighbors(100.0, 5), 18, 30))
    np.testing.assert_array_equal(snippets[:, 18, 0], peaks["amplitude_uv"])


def test_chunk_invariant() -> None:
    checks.chunk_invariant(make, feed, noise(6000), 3000, [[1], [7], [30], [300], [3000], [1, 999, 13]])


@given(st.lists(st.integers(1, 700), min_size=1, max_size=8), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_chunk_invariant_with_random_chunks(sizes: list[int], seed: int) -> None:
    checks.chunk_invariant(make, feed, noise(1500, seed), 10000, [sizes])


@pytest.mark.parametrize("check", [checks.empty_chunk, checks.input_kept, checks.state_continues, checks.reset_is_fresh])
def test_contract(check: Callable[..., None]) -> None:
    check(make, feed, noise(3000), 1000)


def test_a_peak_comes_out_as_soon_as_its_margin_is_there() -> None:
    stage = make()
    traces = quiet(200, (100, 2, -90))
    assert stage.margin == 29
    assert detect(stage, traces[:129]) == [] and stage.through_sample == 100
    assert detect(stage, traces[129:130], 129) == [(100, 2)] and stage.through_sample == 101


def test_the_largest_of_a_neighbourhood_wins_and_channels_farther_away_are_independent() -> None:
    traces = quiet(200, (100, 2, -90), (104, 3, -80), (100, 5, -70), (113, 2, -60), (114, 2, -50))
    assert detect(make(), traces) == [(100, 2), (100, 5)]
    traces[114, 2] = -61
    assert detect(make(), traces) == [(100, 2), (100, 5), (114, 2)]


def test_ties_go_to_the_earlier_sample_then_the_lower_channel() -> None:
    assert detect(make(), quiet(200, (100, 3, -90), (101, 2, -90))) == [(100, 3)]
    assert detect(make(), quiet(200, (100, 3, -90), (100, 2, -90))) == [(100, 2)]


def test_suppression_is_one_hop() -> None:
    assert detect(make(), quiet(200, (100, 1, -90), (100, 2, -80), (100, 3, -70))) == [(100, 1)]


@pytest.mark.parametrize(("sign", "expected"), [("neg", [(100, 1)]), ("pos", [(150, 4)]), ("both", [(100, 1), (150, 4)])])
def test_signs(sign: Any, expected: list[tuple[int, int]]) -> None:
    stage = Detect(DetectConfig(peak_sign=sign, radius_um=25.0), PROBE, RATE, 18, 30)
    assert detect(stage, quiet(300, (100, 1, -50), (150, 4, 50), (200, 0, -39))) == expected


def test_nothing_before_the_noise_level_is_known_nor_where_a_snippet_would_reach_before_that() -> None:
    stage, traces = make(), quiet(1000, (100, 1, -90), (517, 1, -90), (560, 1, -90))
    assert len(stage(traces[:500], 0, None, np.zeros(500, np.uint8))) == 0 and stage.through_sample == 500
    assert detect(stage, traces[500:], 500) == [(560, 1)]


def test_after_a_gap_snippets_do_not_reach_across_and_peaks_are_flagged_for_50_ms() -> None:
    stage = make()
    detect(stage, quiet(3000, (2990, 1, -90)))
    traces = quiet(5000, (17, 1, -90), (100, 1, -90), (1499, 1, -90), (1500, 1, -99), (1600, 1, -90))
    peaks = stage(traces, 7000, LEVEL, np.zeros(5000, np.uint8))
    assert peaks["sample_index"].tolist() == [7100, 8500, 8600]
    assert peaks["flags"].tolist() == [Flag.NEAR_GAP, 0, 0]


def test_peaks_whose_snippet_touches_unusable_samples_are_flagged() -> None:
    stage = make()
    detect(stage, quiet(3000))
    unusable = np.zeros(600, np.uint8)
    unusable[200] = 1
    traces = quiet(600, (170, 1, -90), (171, 4, -90), (218, 1, -90), (219, 4, -90))
    peaks = stage(traces, 3000, LEVEL, unusable)
    assert [(int(p["sample_index"]) - 3000, int(p["flags"])) for p in peaks] == [(170, 0), (171, 2), (218, 2), (219, 0)]


def test_a_new_noise_level_holds_for_peaks_completed_from_then_on() -> None:
    stage, traces = make(), quiet(400, (170, 1, -50), (171, 4, -50))
    assert detect(stage, traces[:200]) == [(170, 1)]
    assert len(stage(traces[200:], 200, LEVEL * 2, np.zeros(200, np.uint8))) == 0


def test_the_window_does_not_grow() -> None:
    stage = make()
    shape = stage.window.traces.shape
    checks.run(stage, feed, noise(6000), [30, 200], 10000)
    assert stage.window.traces.shape == shape


def test_planted_spikes_are_found_where_they_were_put() -> None:
    rng = np.random.default_rng(6)
    traces = rng.normal(0, 20, (60000, 6))
    time_ms = np.arange(-30, 60) / 30
    spike = 0.3 * np.exp(-(((time_ms - 0.4) / 0.3) ** 2)) - np.exp(-((time_ms / 0.15) ** 2))
    truth = [(s, int(rng.integers(6))) for s in range(16000, 59000, 997)]
    for s, c in truth:
        traces[s - 30 : s + 60, c] += 600 * spike
    info = StreamInfo("test", RATE, 6, np.dtype(np.int16), np.full(6, 0.5, np.float32), PROBE, False)
    preprocess = Preprocess(PreprocessConfig(noise_s=0.3, noise_period_s=0.1), info, PROBE)
    stage, found = make(), []
    all_kernels = (kernels.preprocess_rows, kernels_detect.find_peaks, kernels_detect.cut_snippets)
    compiled = [list(kernel.signatures) for kernel in all_kernels]
    for start, stop in checks.pieces(0, 60000, [30], preprocess.period_samples):
        filtered = preprocess(traces[start:stop].astype(np.int16), start)
        peaks = stage(filtered, start, preprocess.noise_level, preprocess.unusable)
        SNIPPETS(stage.window, peaks)
        found += [(int(p["sample_index"]) - preprocess.delay_samples, int(p["channel"])) for p in peaks if p["amplitude_uv"] < -100]
    assert len(found) == len(truth)
    assert all(c == c2 and abs(s - s2) <= 1 for (s, c), (s2, c2) in zip(found, truth, strict=True))
    after = [list(kernel.signatures) for kernel in all_kernels]
    assert after == compiled  # construction compiled all that a stream needs
