"""Recordings on disk: every layout gives the same samples, every broken one a single line that says what is wrong."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamsort.errors import StreamsortError
from streamsort.probe import Probe
from streamsort.sources import open_source
from streamsort.sources.recording import Recording

pytestmark = pytest.mark.timeout(20)

FS = 30000.0
SAMPLES = np.random.default_rng(7).integers(-3000, 3000, (1000, 4)).astype("<i2")


def write_raw(folder: Path, samples: np.ndarray = SAMPLES, **changes: Any) -> Path:
    """Write NAME.raw with a JSON sidecar; a change to None leaves the key out."""
    table = {"sampling_frequency": FS, "n_channels": samples.shape[1], "dtype": samples.dtype.name, "gain_uv": 0.195} | changes
    (folder / "rec.raw").write_bytes(samples.tobytes())
    (folder / "rec.json").write_text(json.dumps({key: value for key, value in table.items() if value is not None}))
    return folder / "rec.raw"


def write_spikeinterface(folder: Path, samples: np.ndarray = SAMPLES, **changes: Any) -> Path:
    """Write what `recording.save(folder=...)` of SpikeInterface leaves, probe included."""
    n_channels = samples.shape[1]
    kwargs = {
        "file_paths": ["traces_cached_seg0.raw"],
        "sampling_frequency": FS,
        "num_channels": n_channels,
        "dtype": samples.dtype.str,
        "time_axis": 0,
        "file_offset": 0,
        "gain_to_uV": [0.195] * n_channels,
        "offset_to_uV": [0.0] * n_channels,
    }
    (folder / "traces_cached_seg0.raw").write_bytes(samples.tobytes())
    (folder / "binary.json").write_text(json.dumps({"class": "BinaryRecordingExtractor", "kwargs": kwargs | changes}))
    Probe.linear(n_channels, 25.0).to_probeinterface(folder / "probegroup.json")
    return folder


def read_all(source: Any) -> np.ndarray:
    """Concatenate the chunks after checking that their indices join up."""
    expected, blocks = 0, []
    for chunk in source:
        assert chunk.start_sample == expected
        assert chunk.traces.flags.c_contiguous and chunk.traces.flags.writeable and type(chunk.traces) is np.ndarray
        assert not chunk.gaps
        expected = chunk.end_sample
        blocks.append(chunk.traces)
    return np.concatenate(blocks)


def test_spikeinterface_folder(tmp_path: Path) -> None:
    with open_source(str(write_spikeinterface(tmp_path))) as source:
        assert (source.info.sampling_frequency, source.info.n_channels, source.info.live) == (FS, 4, False)
        assert source.info.dtype == np.int16
        np.testing.assert_allclose(source.info.gain_uv, 0.195)
        assert source.info.probe is not None
        np.testing.assert_allclose(source.info.probe.channel_locations[:, 1], [0, 25, 50, 75])
        np.testing.assert_array_equal(read_all(source), SAMPLES)


def test_traces_and_meta_folder(tmp_path: Path) -> None:
    (tmp_path / "traces.raw").write_bytes(SAMPLES.tobytes())
    meta = {"fs": FS, "num_channels": 4, "dtype": "int16", "gain_uv": 0.195, "num_samples": 1000, "offset_uv": 0.0, "num_units": 3}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    Probe.linear(4).to_probeinterface(tmp_path / "probe.json")
    source = open_source(str(tmp_path))
    assert source.info.probe is not None
    np.testing.assert_array_equal(read_all(source), SAMPLES)


@pytest.mark.parametrize("chunk_samples", [1, 7, 30, 1000, 4096])
def test_any_chunking_gives_the_same_samples(tmp_path: Path, chunk_samples: int) -> None:
    source = Recording(write_raw(tmp_path), chunk_samples=chunk_samples)
    np.testing.assert_array_equal(read_all(source), SAMPLES)
    assert {(chunk.t_origin, chunk.n_samples) for chunk in list(source)[:-1]} <= {(0.0, chunk_samples)}
    assert source.n_samples == 1000


def test_toml_sidecar_with_probe_beside_it(tmp_path: Path) -> None:
    Probe.linear(4, 33.0).to_probeinterface(tmp_path / "layout.json")
    (tmp_path / "rec.dat").write_bytes(SAMPLES.tobytes())
    (tmp_path / "rec.toml").write_text(
        'sampling_rate = 20000\nnum_channels = 4\ndtype = "<i2"\ngain_to_uV = 2\nprobe = "layout.json"\n'
    )
    source = Recording(tmp_path / "rec.dat")
    assert source.info.sampling_frequency == 20000.0
    assert source.info.probe is not None and source.info.probe.channel_locations[1, 1] == 33.0
    np.testing.assert_array_equal(read_all(source), SAMPLES)


def test_float32_is_passed_through_and_other_types_become_float32(tmp_path: Path) -> None:
    for dtype in ("float32", "float64", "int32"):
        source = Recording(write_raw(tmp_path, SAMPLES.astype(dtype)))
        assert source.info.dtype == np.float32
        np.testing.assert_array_equal(read_all(source), SAMPLES.astype(np.float32))


def test_big_endian_and_channel_major(tmp_path: Path) -> None:
    folder = write_spikeinterface(tmp_path, time_axis=1, dtype=">i2")
    (folder / "traces_cached_seg0.raw").write_bytes(SAMPLES.T.astype(">i2").tobytes())
    np.testing.assert_array_equal(read_all(Recording(folder)), SAMPLES)


def test_an_offset_gives_float32_microvolts(tmp_path: Path) -> None:
    unsigned = (SAMPLES.astype(np.int32) + 32768).astype(np.uint16)
    source = Recording(write_raw(tmp_path, unsigned, gain_uv=0.5, offset_uv=-16384.0))
    assert source.info.dtype == np.float32
    np.testing.assert_allclose(read_all(source) * source.info.gain_uv, SAMPLES * 0.5)


def test_header_before_the_samples(tmp_path: Path) -> None:
    path = write_raw(tmp_path, file_offset=12)
    path.write_bytes(b"twelve bytes" + SAMPLES.tobytes())
    np.testing.assert_array_equal(read_all(Recording(path)), SAMPLES)


def test_given_probe_wins(tmp_path: Path) -> None:
    probe = Probe.linear(4, 99.0)
    assert Recording(write_spikeinterface(tmp_path), probe=probe).info.probe is probe


BAD_SIDECARS = {
    "rate_zero": ({"sampling_frequency": 0}, "sampling_frequency 0, expected a positive"),
    "rate_negative": ({"sampling_frequency": -30000}, "sampling_frequency -30000"),
    "rate_nan": ({"sampling_frequency": float("nan")}, "sampling_frequency nan"),
    "rate_text": ({"sampling_frequency": "30k"}, "sampling_frequency '30k'"),
    "rate_missing": ({"sampling_frequency": None}, "sampling_frequency None"),
    "channels_wrong": ({"n_channels": 3}, "8000 bytes, expected a multiple of 6"),
    "channels_zero": ({"n_channels": 0}, "n_channels 0, expected a whole number"),
    "channels_fraction": ({"n_channels": 4.5}, "n_channels 4.5"),
    "channels_missing": ({"n_channels": None}, "n_channels None"),
    "dtype_unknown": ({"dtype": "int24"}, "dtype 'int24', expected one of int16"),
    "dtype_text": ({"dtype": "U4"}, "dtype 'U4'"),
    "dtype_missing": ({"dtype": None}, "dtype None"),
    "gain_zero": ({"gain_uv": 0}, "gain_uv 0"),
    "gain_nan": ({"gain_uv": float("nan")}, "gain_uv nan"),
    "gain_too_few": ({"gain_uv": [1.0, 2.0]}, "gain_uv 2 values, expected a number or 4"),
    "too_few_samples": ({"n_samples": 2000}, "1000 samples, expected 2000"),
    "misspelt": ({"gian_uv": 1.0}, "unknown key gian_uv; did you mean gain_uv?"),
    "probe_missing": ({"probe": "nowhere.json"}, "no such file"),
    "time_axis": ({"time_axis": 2}, "time_axis 2"),
    "offset_beyond_end": ({"file_offset": 8000}, "0 bytes of samples"),
}


@pytest.mark.parametrize("changes,message", BAD_SIDECARS.values(), ids=BAD_SIDECARS)
def test_bad_sidecars_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamsortError) as caught:
        open_source(str(write_raw(tmp_path, **changes)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_files_are_one_line(tmp_path: Path) -> None:
    raw = write_raw(tmp_path)
    raw.write_bytes(SAMPLES.tobytes()[:-3])
    with pytest.raises(StreamsortError, match="7997 bytes, expected a multiple of 8"):
        Recording(raw)
    raw.write_bytes(b"")
    with pytest.raises(StreamsortError, match="expected at least one row"):
        Recording(raw)
    (tmp_path / "rec.json").write_text("{not json")
    with pytest.raises(StreamsortError, match="not JSON"):
        Recording(raw)
    (tmp_path / "rec.json").write_text("[1]")
    with pytest.raises(StreamsortError, match="a list, expected a table"):
        Recording(raw)
    (tmp_path / "rec.json").unlink()
    with pytest.raises(StreamsortError, match=r"expected rec.json or rec.toml"):
        Recording(raw)
    with pytest.raises(StreamsortError, match="no such file or folder"):
        Recording(tmp_path / "absent")
    with pytest.raises(StreamsortError, match=r"expected binary.json, or traces.raw and meta.json"):
        Recording(tmp_path)


def test_broken_folders_are_one_line(tmp_path: Path) -> None:
    folder = write_spikeinterface(tmp_path)
    Probe.linear(5).to_probeinterface(folder / "probegroup.json")
    with pytest.raises(StreamsortError, match="probe has 5 contacts, expected 4"):
        Recording(folder)
    write_spikeinterface(folder, file_paths=["one.raw", "two.raw"])
    with pytest.raises(StreamsortError, match="expected kwargs with one file"):
        Recording(folder)
    write_spikeinterface(folder, file_paths=["absent.raw"])
    with pytest.raises(StreamsortError, match=r"absent.raw: no such file"):
        Recording(folder)
    write_spikeinterface(folder, num_channels=True)
    with pytest.raises(StreamsortError, match="n_channels True"):
        Recording(folder)


@pytest.mark.parametrize(
    "options",
    [{"speed": 0.0}, {"speed": -1.0}, {"speed": float("inf")}, {"chunk_ms": 0.0}, {"chunk_ms": float("nan")}, {"chunk_samples": 0}],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(StreamsortError, match="expected"):
        open_source(str(write_raw(tmp_path)), **options)


def test_unknown_url_kind() -> None:
    with pytest.raises(StreamsortError, match="unknown kind 'udp', expected a path"):
        open_source("udp://127.0.0.1:1")
    with pytest.raises(StreamsortError, match="a live stream sets its own pace"):
        open_source("tcp://127.0.0.1:1", speed=2.0)


@pytest.mark.parametrize("speed", [1.0, 4.0])
def test_pace_is_kept_and_chunks_are_never_early(tmp_path: Path, speed: float) -> None:
    source = Recording(write_raw(tmp_path, np.tile(SAMPLES, (9, 1))), speed=speed, chunk_ms=10.0)
    assert source.info.live
    started = time.monotonic()
    chunks = list(source)
    wanted_s = 9000 / FS / speed
    assert wanted_s <= time.monotonic() - started < wanted_s + 1.0
    for chunk in chunks:
        assert chunk.t_acquired >= chunk.t_origin + chunk.end_sample / FS
    ends = [chunk.t_origin + chunk.end_sample / FS for chunk in chunks]
    np.testing.assert_allclose(np.diff(ends), 300 / FS / speed, atol=1e-9)


def test_a_slow_consumer_does_not_shift_the_schedule(tmp_path: Path) -> None:
    source = Recording(write_raw(tmp_path, np.tile(SAMPLES, (6, 1))), speed=1.0, chunk_ms=10.0)
    origins = []
    for k, chunk in enumerate(source):
        origins.append(chunk.t_origin)
        if k == 5:
            time.sleep(0.06)
    np.testing.assert_allclose(origins, origins[0], atol=1e-9)


def test_close_ends_a_waiting_iteration(tmp_path: Path) -> None:
    source = Recording(write_raw(tmp_path), speed=0.001, chunk_samples=500)
    timer = threading.Timer(0.1, source.close)
    started = time.monotonic()
    timer.start()
    assert list(source) == []
    assert time.monotonic() - started < 1.0
    source.close()
