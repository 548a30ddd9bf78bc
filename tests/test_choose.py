"""Which encoder a stream gets: by a measurement that a busy machine does not upset, and the same for a file and a live stream."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from streamsort import choose
from streamsort.choose import Choice, Speed, choose_encoder, decide, full_speed, measure_speed
from streamsort.config import EncodeConfig, SorterConfig
from streamsort.encode import Encoder, shipped_model
from streamsort.errors import StreamsortError
from streamsort.records import StreamInfo
from streamsort.sorter import Sorter

FAST, SLOW = Speed("cpu", 1, 0.2), Speed("cpu", 1, 40.0)


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(choose, "_scores", lambda: (0.9, 0.8))
    full_speed.cache_clear()
    yield
    full_speed.cache_clear()


@pytest.mark.parametrize(
    ("speed", "n_channels", "deadline_ms", "used"),
    [
        (Speed("cpu", 1, 2.5), 4, 10.0, "full"),
        (Speed("cpu", 1, 2.6), 4, 10.0, "light"),  # a spike takes too much of the deadline
        (Speed("cpu", 1, 2.6), 4, 20.0, "full"),
        (Speed("cpu", 1, 2.5), 8, 10.0, "full"),
        (Speed("cpu", 1, 2.5), 9, 10.0, "light"),  # 400 spikes/s, 450 needed
        (Speed("cuda", 32, 1.6), 384, 10.0, "full"),
        (Speed("cuda", 32, 1.7), 384, 10.0, "light"),
    ],
)
def test_full_must_meet_the_deadline_and_the_rate(speed: Speed, n_channels: int, deadline_ms: float, used: str) -> None:
    choice = decide(speed, n_channels, deadline_ms)
    assert (choice.asked, choice.used, choice.run_ms) == ("auto", used, speed.run_ms)
    assert choice.reason.startswith(f"{used}: full takes {speed.run_ms:.2f} ms") and f"{n_channels} channels" in choice.reason


class Scripted(Encoder):
    """An encoder whose runs take the scripted times, on a clock of its own; the last one goes on for ever."""

    def __init__(self, run_ms: list[float], provider: str = "cpu") -> None:
        super().__init__(provider="cpu", batch_size=2)
        self.now, self._run_ms, self.provider = 0.0, run_ms, provider

    def __call__(self, snippets: np.ndarray, noise_level: np.ndarray) -> np.ndarray:
        self.now += 1e-3 * (self._run_ms.pop(0) if len(self._run_ms) > 1 else self._run_ms[0])
        return np.zeros((len(snippets), self.n_dims), np.float32)


@pytest.mark.parametrize(
    ("run_ms", "expected"),
    [
        ([1.0], 1.0),
        ([900.0, 50.0, 10.0, 1.0], 1.0),  # what a session does once
        ([1.0] * 3 + [9.0] * 12 + [1.0], 1.0),  # most figures are spoilt
        ([50.0], 50.0),
    ],
)
@pytest.mark.parametrize(("provider", "clock"), [("cpu", "thread_time"), ("cuda", "perf_counter")])
def test_a_bad_moment_does_not_change_the_measurement(
    provider: str, clock: str, run_ms: list[float], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Scripted(list(run_ms), provider)
    monkeypatch.setattr(f"streamsort.choose.time.{clock}", lambda: encoder.now)
    speed = measure_speed(encoder)
    assert (speed.provider, speed.batch_size) == (provider, 2)
    assert speed.run_ms == pytest.approx(expected) and speed.spikes_per_s == pytest.approx(2000.0 / expected)
    assert encoder.now - sum(run_ms[:3]) < 0.4  # seconds, by that clock


def test_a_full_encoder_that_is_no_better_is_not_even_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_scores", lambda: (0.812, 0.843))
    monkeypatch.setattr(choose, "full_speed", lambda provider: pytest.fail("measured"))
    encoder, choice = choose_encoder(EncodeConfig(provider="cpu"), n_channels=4, sampling_frequency=30000.0, deadline_ms=10.0)
    assert encoder.path == shipped_model("light")
    assert choice == Choice("auto", "light", "light: scores 0.843 on held-out units, full 0.812")


def test_scores_are_those_of_the_shipped_contracts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert choose._scores() == tuple(Encoder(shipped_model(which), "cpu").contract.score for which in ("full", "light"))


def test_one_process_measures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Encoder] = []

    def measure(encoder: Encoder) -> Speed:
        measured.append(encoder)
        return FAST if len(measured) == 1 else SLOW

    monkeypatch.setattr(choose, "measure_speed", measure)
    for _ in range(2):
        _, choice = choose_encoder(EncodeConfig(provider="cpu"), n_channels=4, sampling_frequency=30000.0, deadline_ms=10.0)
        assert choice.used == "full"
    assert [encoder.path for encoder in measured] == [shipped_model("full")]


@pytest.mark.parametrize(("speed", "used"), [(FAST, "full"), (SLOW, "light")])
@pytest.mark.parametrize("live", [False, True])
def test_a_file_and_a_stream_get_the_same(
    live: bool, speed: Speed, used: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choose, "full_speed", lambda provider: speed)
    info = StreamInfo("test", 24000.0, 4, np.dtype(np.int16), np.ones(4, np.float32), None, live=live)
    with caplog.at_level(logging.INFO, "streamsort.choose"):
        sorter = Sorter(SorterConfig(), info)
    assert sorter.encoder.path == shipped_model(used) and sorter.encoder.sampling_frequency == 24000.0
    assert sorter.encoder_choice == decide(speed, 4, 10.0)
    assert sorter.counters()["encoder_choice"] == sorter.encoder_choice.reason
    (record,) = caplog.records
    assert sorter.encoder.name in record.getMessage() and sorter.encoder_choice.reason in record.getMessage()


@pytest.mark.parametrize("asked", ["full", "light", "other.onnx"])
def test_what_was_asked_for_is_taken_and_nothing_is_measured(asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "full_speed", lambda provider: pytest.fail("measured"))
    path = shipped_model(asked) if asked != "other.onnx" else tmp_path / asked
    if asked == "other.onnx":
        shutil.copy(shipped_model(), path)
        shutil.copy(shipped_model().with_suffix(".json"), path.with_suffix(".json"))
        asked = str(path)
    encoder, choice = choose_encoder(EncodeConfig(asked, "cpu"), n_channels=999, sampling_frequency=30000.0, deadline_ms=1.0)
    assert encoder.path == path
    assert choice == Choice(asked, asked, f"{asked}: as asked")


def test_cuda_that_does_not_run_is_refused_before_anything_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamsort.encode._cuda_driver", lambda: False)
    with pytest.raises(StreamsortError, match="no session runs on CUDA here"):
        choose_encoder(EncodeConfig(provider="cuda"), n_channels=4, sampling_frequency=30000.0, deadline_ms=10.0)


def test_the_config_takes_the_words_and_paths_only() -> None:
    assert SorterConfig.from_dict({"encode": {"encoder": "models/mine.onnx"}}).encode.encoder == "models/mine.onnx"
    for word in ("fast", "", "mine.json"):
        with pytest.raises(StreamsortError, match=r"encode\.encoder = .*, expected auto, full, light or the path of an \.onnx"):
            SorterConfig.from_dict({"encode": {"encoder": word}})
