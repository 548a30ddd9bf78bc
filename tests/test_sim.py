"""The simulation as a source: the same samples as the simulator's, whatever the chunk, and every bad option one line."""

import itertools
import threading
import time

import numpy as np
import pytest

from streamsort.errors import StreamsortError
from streamsort.probe import Probe
from streamsort.simulate import SimulationConfig, simulated_blocks
from streamsort.sources import open_source
from streamsort.sources.sim import Simulation, parse_options, rechunked

pytestmark = pytest.mark.timeout(20)


@pytest.mark.parametrize("chunk_samples", [30, 7001, 30_000, 100_000])
def test_samples_are_the_simulators(chunk_samples: int) -> None:
    config = SimulationConfig(seconds=2.5, probe_name="tetrode", n_units=3, seed=4)
    with open_source("sim:seconds=2.5,probe=tetrode,units=3,seed=4", chunk_samples=chunk_samples) as source:
        assert isinstance(source, Simulation) and source.config == config
        assert source.info.probe is config.probe and not source.info.live
        chunks = list(source)
    assert [chunk.start_sample for chunk in chunks] == list(range(0, 75_000, chunk_samples))
    assert all(chunk.traces.flags.owndata and chunk.traces.dtype == np.int16 for chunk in chunks)
    np.testing.assert_array_equal(
        np.concatenate([chunk.traces for chunk in chunks]), np.concatenate(list(simulated_blocks(config)))
    )


def test_rechunking_any_blocks() -> None:
    rows = np.arange(40)[:, None]
    for edges in ([0, 40], [0, 1, 2, 40], [0, 13, 13, 26, 39, 40]):
        blocks = iter([rows[a:b] for a, b in itertools.pairwise(edges)])
        chunks = list(rechunked(blocks, 7))
        assert [len(chunk) for chunk in chunks] == [7] * 5 + [5]
        np.testing.assert_array_equal(np.concatenate(chunks), rows)


def test_options() -> None:
    config = parse_options("units=5,snr=4:15,drift_kind=zigzag,drift_um=10,noise_uv=6.5")
    assert config == SimulationConfig(n_units=5, snr=(4.0, 15.0), drift_kind="zigzag", drift_um=10.0, noise_uv=6.5)
    assert parse_options("half_um=15:25,pauses=0.3:60:660,far_units=9") == SimulationConfig(
        half_um=(15.0, 25.0), pauses=(0.3, 60.0, 660.0), far_units=9
    )
    assert parse_options("") == SimulationConfig()


@pytest.mark.parametrize(
    "options,message",
    [
        ("unit=3", "unknown key 'unit'; did you mean units"),
        ("xyz=3", "unknown key 'xyz'; known: units"),
        ("silences=1", "unknown key 'silences'"),
        ("seconds", "expected seconds=value once"),
        ("seconds=1,seconds=2", "expected seconds=value once"),
        ("units=3,n_units=4", "expected n_units=value once"),
        ("seconds=long", "seconds = 'long', expected a number"),
        ("seconds=nan", "seconds = 'nan', expected a number"),
        ("seconds=-1", "expected a positive number"),
        ("units=2.5", "units = '2.5', expected a whole number"),
        ("snr=4", "snr = '4', expected low:high"),
        ("half_um=15:25:35", "half_um = '15:25:35', expected low:high"),
        ("pauses=0.3:60", "pauses = '0.3:60', expected share:from_s:to_s"),
        ("snr=9:4", "expected two positive numbers"),
        ("drift_kind=up", "expected sine, zigzag or step"),
        ("probe=nothing", "probe_name = 'nothing'"),
    ],
)
def test_bad_options_are_one_line(options: str, message: str) -> None:
    with pytest.raises(StreamsortError) as caught:
        open_source(f"sim:{options}")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_another_probe_must_fit() -> None:
    probe = Probe.linear(4)
    assert open_source("sim:probe=tetrode", probe=probe).info.probe is probe
    with pytest.raises(StreamsortError, match="probe has 4 contacts, expected 32"):
        open_source("sim:", probe=probe)


def test_pace_is_kept_and_close_ends_it() -> None:
    source = open_source("sim:seconds=600,probe=single,units=0", speed=2.0)
    timer = threading.Timer(0.5, source.close)
    timer.start()
    chunks, started = [], 0.0
    for chunk in source:
        started = started or time.monotonic()
        chunks.append(chunk)
    assert source.info.live
    assert chunks[-1].end_sample <= 1.02 * 60_000 * (time.monotonic() - started) + 60
    assert all(chunk.t_acquired >= chunk.t_origin + chunk.end_sample / 30_000 for chunk in chunks)
