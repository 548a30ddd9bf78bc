"""Live equals file: a recording played by another process over real sockets is sorted to the same spikes as the file itself."""

import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import Kept
from numpy.typing import NDArray

from streamsort.config import SorterConfig
from streamsort.records import Chunk, Output
from streamsort.score import score
from streamsort.simulate import SimulationConfig, truth, write_recording
from streamsort.sorter import Sorter
from streamsort.sources import Source, open_source
from streamsort.stream import Stream

SIMULATION = SimulationConfig(seconds=6.0, probe_name="tetrode", n_units=3, snr=(8, 16), rates_hz=(15, 40), seed=5)
CONFIG = SorterConfig.from_dict({"warmup_s": 3.0, "preprocess": {"noise_s": 0.5, "noise_period_s": 0.5}})
COMPARED = ["sample_index", "unit_id", "channel", "amplitude_uv", "confidence"]  # `time` and `late` are of the host's clock


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording")
    write_recording(SIMULATION, path)
    return path / "recording"


@pytest.fixture(scope="module")
def traces(folder: Path) -> NDArray[Any]:
    with open_source(str(folder)) as source:
        return np.concatenate([chunk.traces for chunk in source])


class UpTo:
    """A live source that ends when the last sample of the recording has come, and knows at which sample it began."""

    def __init__(self, source: Source, traces: NDArray[Any]) -> None:
        self._source, self._traces = source, traces
        self.info, self.counters = source.info, source.counters
        self.offset: int | None = None
        self.n_missing = 0

    def __iter__(self) -> Iterator[Chunk]:
        for chunk in self._source:
            if self.offset is None:
                row = chunk.traces[0].astype(self._traces.dtype)
                self.offset = int(np.flatnonzero((self._traces == row).all(axis=1))[0])
            self.n_missing += sum(gap.n_samples for gap in chunk.gaps)
            yield chunk
            if chunk.end_sample + self.offset >= len(self._traces):
                return

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> "UpTo":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sort_live(url: str, folder: Path, traces: NDArray[Any]) -> tuple[int, NDArray[Any], dict[str, Any]]:
    """Play the recording from a second process and sort it here; return the start offset, the spikes and the status."""
    player = subprocess.Popen([sys.executable, "-m", "streamsort", "replay", str(folder), "--to", url, "--chunk-ms", "3"])
    try:
        with open_source(url, probe=SIMULATION.probe, timeout_s=30.0) as live:  # wire format 1 carries no geometry
            source, kept = UpTo(live, traces), Kept()
            sorter = Sorter(CONFIG, live.info)
            with Stream(source, sorter, [kept]) as stream:
                assert stream.wait(60.0)
                status = stream.status()
        assert player.wait(20) == 0
    finally:
        player.kill()
        player.wait()
    assert source.offset is not None and source.n_missing == 0
    return source.offset, in_order(kept.outputs), status


def sort_file(traces: NDArray[Any], source: Source) -> NDArray[Any]:
    sorter = Sorter(CONFIG, source.info)
    parts = [Chunk(start, traces[start : start + 600]) for start in range(0, len(traces), 600)]
    return in_order(output for part in parts for output in sorter.process(part))


def in_order(outputs: Iterable[Output]) -> NDArray[Any]:
    """Return all spikes in order of time; those that no unit explains come out a little later than the others."""
    spikes = np.concatenate([output.spikes for output in outputs])
    return spikes[np.lexsort((spikes["channel"], spikes["unit_id"], spikes["sample_index"]))]


@pytest.mark.parametrize("transport", ["lsl", "zmq"])
def test_live_gives_the_spikes_of_the_file(
    transport: str, folder: Path, traces: NDArray[Any], free_port: int, lsl_config: Path
) -> None:
    url = f"lsl:e2e-{uuid.uuid4().hex[:8]}" if transport == "lsl" else f"tcp://127.0.0.1:{free_port}"
    offset, live, status = sort_live(url, folder, traces)
    with open_source(str(folder)) as source:
        filed = sort_file(traces[offset:], source)
    assert live[COMPARED].tolist() == filed[COMPARED].tolist()
    assert status["samples_lost"] == {} and status["overruns"] == 0
    live["sample_index"] += offset
    assert score(live, truth(SIMULATION), 30000.0, from_s=3.5).accuracy_mean > 0.85
