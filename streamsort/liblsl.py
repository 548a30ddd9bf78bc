"""What the LSL source, sink and player share: the library, loaded when it is needed, and the stream's description.

Channel metadata follows the XDF conventions: `desc/channels/channel` with `label`, `unit`, `scaling_factor` (multiplied by it,
samples are in `unit`) and `location/X,Y,Z`. XDF leaves the location's unit open in practice, so ours carries `location/unit`;
without one it is um, as every probe map in this field has it.
"""

import logging
import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from streamsort.errors import StreamsortError
from streamsort.probe import Probe
from streamsort.records import StreamInfo

_log = logging.getLogger("streamsort.liblsl")

_UV_PER = {"microvolt": 1.0, "microvolts": 1.0, "uv": 1.0, "volt": 1e6, "volts": 1e6, "v": 1e6}
_UV_PER |= {"millivolt": 1e3, "millivolts": 1e3, "mv": 1e3, "nanovolt": 1e-3, "nanovolts": 1e-3, "nv": 1e-3}
_UM_PER = {"um": 1.0, "micrometer": 1.0, "micrometers": 1.0, "mm": 1e3, "millimeters": 1e3, "m": 1e6, "meters": 1e6}


def load_pylsl() -> ModuleType:
    """Import pylsl.

    Raises
    ------
    StreamsortError
        If it, or the library it binds, is not installed.
    """
    try:
        import pylsl
    except (ImportError, RuntimeError):
        hint = "expected `pip install pylsl` to bring it, or conda-forge's liblsl, or PYLSL_LIB=/path/to/liblsl.so"
        raise StreamsortError(f"lsl: the library liblsl was not found, {hint}") from None
    module: ModuleType = pylsl
    return module


def clock_offset_s(pylsl: ModuleType) -> float:
    """Return what must be added to an LSL time on this machine to have `time.monotonic()`; some microseconds on Linux."""
    offsets: list[float] = []
    for _ in range(5):
        before = time.monotonic()
        lsl_time = pylsl.local_clock()
        offsets.append((before + time.monotonic()) / 2 - lsl_time)
    return sorted(offsets)[2]


def stream_name(url: str) -> str:
    """Return NAME of `lsl:NAME`, for what is published."""
    name = url.partition(":")[2]
    if not name:
        raise StreamsortError(f"{url}: no name, expected lsl:NAME")
    return name


@dataclass(frozen=True)
class Description:
    """What a stream says about its channels: (n_channels,) float32 `gain_uv`, and a probe if it tells where the contacts are."""

    gain_uv: NDArray[np.float32]
    probe: Probe | None


def read_description(xml: str, n_channels: int) -> Description:
    """Read units, scaling and locations from a stream's XML; what is missing or makes no sense counts as not said."""
    try:
        channels = ElementTree.fromstring(xml).findall("desc/channels/channel")
    except ElementTree.ParseError:
        channels = []
    if len(channels) != n_channels:
        if channels:
            _log.warning("the stream describes %d of its %d channels; the description is not used", len(channels), n_channels)
        return Description(np.ones(n_channels, np.float32), None)
    return Description(np.array([_gain_uv(channel) for channel in channels], np.float32), _probe(channels))


def _gain_uv(channel: ElementTree.Element) -> float:
    unit = (channel.findtext("unit") or "microvolts").strip().replace("µ", "u").replace("μ", "u").lower()
    scale = _number(channel.findtext("scaling_factor"))
    if unit not in _UV_PER:
        _log.warning("unknown channel unit %r: samples are taken as microvolts", unit)
    return _UV_PER.get(unit, 1.0) * (scale if np.isfinite(scale) and scale != 0 else 1.0)


def _probe(channels: list[ElementTree.Element]) -> Probe | None:
    """Take the two axes along which the contacts differ most, X before Y before Z."""
    found = [channel.find("location") for channel in channels]
    places = [place for place in found if place is not None]
    if len(places) != len(channels):
        return None
    axes = [axis for axis in "XYZ" if all(place.findtext(axis) is not None for place in places)]
    unit = (places[0].findtext("unit") or "um").strip().lower()
    points = np.array([[_number(place.findtext(axis)) for axis in axes] for place in places]) * _UM_PER.get(unit, 1.0)
    if len(axes) < 2 or not np.isfinite(points).all():
        return None
    widest = np.sort(np.argsort(-np.ptp(points, axis=0), kind="stable")[:2])
    shanks = [int(_number(place.findtext("shank") or "0")) if (place.findtext("shank") or "0").isdigit() else 0 for place in places]
    return Probe(points[:, widest], np.array(shanks, np.int32))


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def describe_channels(lsl_info: Any, info: StreamInfo) -> None:
    """Write what `read_description` reads into the description of an outlet that is about to be made."""
    channels = lsl_info.desc().append_child("channels")
    for k in range(info.n_channels):
        channel = channels.append_child("channel")
        channel.append_child_value("label", str(k)).append_child_value("unit", "microvolts").append_child_value("type", "ephys")
        channel.append_child_value("scaling_factor", repr(float(info.gain_uv[k])))
        if info.probe is not None:
            location = channel.append_child("location")
            x_um, y_um = info.probe.channel_locations[k]
            location.append_child_value("X", repr(float(x_um))).append_child_value("Y", repr(float(y_um)))
            location.append_child_value("unit", "um").append_child_value("shank", str(info.probe.shanks[k]))
