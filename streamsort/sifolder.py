"""Describe a simulated recording and its truth as folders that SpikeInterface (0.101 to 0.105) loads.

The samples themselves are written by whoever makes them, to `TRACES` in the recording's folder; here go the descriptions beside
them, and the truth. No SpikeInterface is needed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from streamsort.probe import Probe
from streamsort.trains import Truth

TRACES = "traces_cached_seg0.raw"


def describe_recording(folder: Path, probe: Probe, sampling_frequency: float, gain_uv: float) -> None:
    """Write binary.json, probegroup.json and the properties beside little-endian int16 samples."""
    n_channels = probe.n_channels
    layout = {
        "file_paths": [TRACES],
        "sampling_frequency": sampling_frequency,
        "t_starts": None,
        "num_channels": n_channels,
        "dtype": "<i2",
        "channel_ids": list(range(n_channels)),
        "time_axis": 0,
        "file_offset": 0,
        "gain_to_uV": [gain_uv] * n_channels,
        "offset_to_uV": [0.0] * n_channels,
        "is_filtered": False,
    }
    (folder / "properties").mkdir(parents=True, exist_ok=True)
    _dump(folder / "binary.json", "spikeinterface.core.binaryrecordingextractor.BinaryRecordingExtractor", layout)
    _dump(folder / "si_folder.json", "spikeinterface.core.binaryfolder.BinaryFolderRecording", {"folder_path": "."})
    np.save(folder / "properties" / "gain_to_uV.npy", np.full(n_channels, gain_uv))
    np.save(folder / "properties" / "offset_to_uV.npy", np.zeros(n_channels))
    np.save(folder / "properties" / "group.npy", probe.shanks.astype(np.int64))
    probe.to_probeinterface(folder / "probegroup.json")


def write_truth(folder: Path, truth: Truth, n_units: int, sampling_frequency: float) -> None:
    """Write spikes.npy and numpysorting_info.json into a new folder."""
    folder.mkdir()
    spikes = np.zeros(len(truth.sample_index), [("sample_index", "<i8"), ("unit_index", "<i8"), ("segment_index", "<i8")])
    spikes["sample_index"], spikes["unit_index"] = truth
    np.save(folder / "spikes.npy", spikes)
    info = {"sampling_frequency": sampling_frequency, "unit_ids": list(range(n_units)), "num_segments": 1}
    (folder / "numpysorting_info.json").write_text(json.dumps(info))
    _dump(
        folder / "si_folder.json", "spikeinterface.core.sortingfolder.NumpyFolderSorting", {"folder_path": ".", "mmap_mode": None}
    )


def _dump(path: Path, extractor: str, kwargs: dict[str, Any]) -> None:
    about = {
        "class": extractor,
        "module": "spikeinterface",
        "version": "0.105.0",
        "kwargs": kwargs,
        "annotations": {},
        "properties": {},
    }
    path.write_text(json.dumps({**about, "relative_paths": True}, indent=1))
