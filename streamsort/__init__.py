"""streamsort: a live multi-electrode voltage stream in, unit ids out, a few milliseconds after each spike.

The public names are imported when they are first used, so that a decoder's `from streamsort import subscribe` costs no more than
numpy and ZeroMQ.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from streamsort.client import subscribe
    from streamsort.config import SorterConfig
    from streamsort.errors import StreamsortError
    from streamsort.probe import Probe
    from streamsort.records import SPIKE_DTYPE
    from streamsort.session import Session
    from streamsort.sinks import open_sink
    from streamsort.sorter import Sorter
    from streamsort.sources import open_source
    from streamsort.stream import Stream

_HOME = {
    "SPIKE_DTYPE": "records",
    "Probe": "probe",
    "Session": "session",
    "Sorter": "sorter",
    "SorterConfig": "config",
    "Stream": "stream",
    "StreamsortError": "errors",
    "open_sink": "sinks",
    "open_source": "sources",
    "subscribe": "client",
}

__all__ = [
    "SPIKE_DTYPE",
    "Probe",
    "Session",
    "Sorter",
    "SorterConfig",
    "Stream",
    "StreamsortError",
    "open_sink",
    "open_source",
    "subscribe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'streamsort' has no attribute {name!r}")
    return getattr(import_module(f"streamsort.{_HOME[name]}"), name)
