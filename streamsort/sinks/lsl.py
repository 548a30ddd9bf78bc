"""Spikes as an irregular LSL stream: six doubles per spike, stamped with the time of its trough.

Doubles hold sample indices exactly up to 2^53. Times come on the host's monotonic clock and go out on LSL's, which on Linux is the
same. Nothing is kept between outputs.
"""

import logging
import uuid
from typing import Any

import numpy as np

from streamsort.liblsl import clock_offset_s, load_pylsl, stream_name
from streamsort.records import Output, StreamInfo

_log = logging.getLogger("streamsort.sinks.lsl")

# label and unit of each channel, in order
_CHANNELS = (
    ("unit_id", "none"),
    ("channel", "none"),
    ("sample_index", "samples"),
    ("amplitude_uv", "microvolts"),
    ("confidence", "none"),
    ("flags", "none"),
)


class LslSink:
    """Publish spikes as an outlet of type `Spikes`.

    Parameters
    ----------
    url : str
        `lsl:NAME`.
    info : StreamInfo
        Of the stream that is sorted; its rate is written into the description.

    Raises
    ------
    StreamsortError
        If the name is missing or liblsl is not installed.
    """

    def __init__(self, url: str, *, info: StreamInfo) -> None:
        pylsl = load_pylsl()
        name = stream_name(url)
        spikes = pylsl.StreamInfo(name, "Spikes", len(_CHANNELS), pylsl.IRREGULAR_RATE, pylsl.cf_double64, f"{name}-{uuid.uuid4()}")
        spikes.desc().append_child_value("sampling_frequency", repr(info.sampling_frequency))
        channels = spikes.desc().append_child("channels")
        for label, unit in _CHANNELS:
            channels.append_child("channel").append_child_value("label", label).append_child_value("unit", unit)
        self._outlet: Any = pylsl.StreamOutlet(spikes)
        self._to_lsl_s = -clock_offset_s(pylsl)
        _log.info("publishing spikes as the LSL stream %s", name)

    def publish(self, output: Output) -> None:
        """Push the spikes of one output as one chunk."""
        if self._outlet is None or not len(output.spikes):
            return
        rows = np.stack([output.spikes[label].astype(np.float64) for label, _ in _CHANNELS], axis=1)
        self._outlet.push_chunk(rows, (output.spikes["time"] + self._to_lsl_s).tolist())

    def close(self) -> None:
        """Take the outlet down."""
        self._outlet = None
