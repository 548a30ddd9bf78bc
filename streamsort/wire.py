"""Wire format 1: how messages look, both ways, in one place.

A message is three frames `[topic, header, payload]`: the header one compact JSON object, the payload little-endian. `Envelope`
writes what goes out with a `seq` per topic, `decode` reads it back, `encode_traces` and `decode_traces` are the way in. What
arrives from a socket may be anything: every breach of the format is a `MalformedMessage` that says which, and receivers count it
and go on.
"""

import json
import math
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.records import SPIKE_DTYPE

SCHEMA = "streamsort/1"
CLOCK = "monotonic"

_MAX_HEADER_BYTES = 65536
_MAX_CHANNELS = 4096
_MAX_SAMPLES = 1 << 24  # of one message
_MAX_INDEX = 1 << 60
_MAX_RATE_HZ = 1e7
_MAX_NUMBER = 1e30
_LATE_MESSAGES = 64
_TRACE_DTYPES: dict[str, np.dtype[Any]] = {"<i2": np.dtype("<i2"), "<f4": np.dtype("<f4")}


class MalformedMessage(ValueError):  # noqa: N818 - it is counted, not raised to anybody
    """Say what about a received message breaks the format."""


@dataclass(frozen=True)
class Message:
    """One message as received: `payload` is a spike array, int16 counts, or what the JSON says, by topic."""

    topic: str
    header: dict[str, Any]
    payload: Any


@dataclass(frozen=True)
class Traces:
    """One `traces` message: `samples` is (n_samples, n_channels), writable; times `gain_uv` (n_channels,) for microvolts."""

    seq: int
    start_sample: int
    sampling_frequency: float
    samples: NDArray[Any]
    gain_uv: NDArray[np.float32]
    t_acquired: float | None

    @property
    def format(self) -> tuple[int, str, float, bytes]:
        """What must not change in the course of a stream."""
        return self.samples.shape[1], self.samples.dtype.name, self.sampling_frequency, self.gain_uv.tobytes()


def to_json(value: Any) -> bytes:
    """Write compact JSON; numpy scalars and arrays become plain numbers and lists, NaN and infinities null."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError):
        return json.dumps(_plain(value), separators=(",", ":"), allow_nan=False).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str | None) else str(value)


def _from_json(frame: bytes) -> Any:
    try:
        return json.loads(frame, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(f"not JSON ({type(error).__name__})") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


class Envelope:
    """Make the messages of one session, with a running `seq` per topic.

    Parameters
    ----------
    sampling_frequency : float
    session : str, optional
        Names the session in every header; a fresh uuid by default.
    """

    def __init__(self, sampling_frequency: float, session: str | None = None) -> None:
        self.session = session or str(uuid.uuid4())
        self._sampling_frequency = sampling_frequency
        self._seq: dict[str, int] = defaultdict(int)

    def message(self, topic: str, payload: bytes, n: int, **extra: Any) -> list[bytes]:
        """Return the three frames of one message of `n` records; `extra` goes into the header."""
        header = {
            "schema": SCHEMA,
            "session": self.session,
            "seq": self._seq[topic],
            "sampling_frequency": self._sampling_frequency,
            "clock": CLOCK,
            "t_published": time.monotonic(),
            "n": n,
        }
        self._seq[topic] += 1
        return [topic.encode(), to_json(header | extra), payload]


def decode(frames: Sequence[bytes]) -> Message:
    """Read one outgoing message.

    Raises
    ------
    MalformedMessage
        If the frames are not three, the header is not a JSON object with a `seq`, or the payload does not fit its topic.
    """
    topic, header, payload = _open(frames)
    if topic not in ("spikes", "bins"):
        return Message(topic, header, _from_json(payload))
    dtype = SPIKE_DTYPE if topic == "spikes" else np.dtype("<i2")
    n = _integer(header, "n", 0, _MAX_INDEX)
    if len(payload) != n * dtype.itemsize:
        raise MalformedMessage(f"{len(payload)} payload bytes, expected {n} x {dtype.itemsize}")
    return Message(topic, header, np.frombuffer(payload, dtype).copy())


def encode_traces(
    samples: NDArray[Any],
    *,
    seq: int,
    start_sample: int,
    sampling_frequency: float,
    gain_uv: NDArray[np.float32],
    t_acquired: float | None = None,
) -> list[bytes]:
    """Return the three frames of one `traces` message; `samples` is (n_samples, n_channels) int16 or float32."""
    same = bool((gain_uv == gain_uv[0]).all())
    header: dict[str, Any] = {
        "schema": SCHEMA,
        "seq": seq,
        "start_sample": start_sample,
        "n_samples": samples.shape[0],
        "n_channels": samples.shape[1],
        "sampling_frequency": sampling_frequency,
        "dtype": "<i2" if samples.dtype == np.int16 else "<f4",
        "gain_uv": float(gain_uv[0]) if same else gain_uv.tolist(),
    }
    if t_acquired is not None:
        header["t_acquired"] = t_acquired
    return [b"traces", to_json(header), samples.astype(header["dtype"], order="C", copy=False).tobytes()]


def decode_traces(frames: Sequence[bytes]) -> Traces:
    """Read one `traces` message.

    Raises
    ------
    MalformedMessage
        If anything about it breaks the format: frames, JSON, keys, ranges, dtype, or the length of the payload.
    """
    topic, header, payload = _open(frames)
    if topic != "traces":
        raise MalformedMessage(f"topic {topic!r}, expected 'traces'")
    n_samples = _integer(header, "n_samples", 1, _MAX_SAMPLES)
    n_channels = _integer(header, "n_channels", 1, _MAX_CHANNELS)
    name = header.get("dtype")
    dtype = _TRACE_DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise MalformedMessage(f"dtype {name!r}, expected <i2 or <f4")
    if len(payload) != n_samples * n_channels * dtype.itemsize:
        raise MalformedMessage(f"{len(payload)} payload bytes, expected {n_samples} x {n_channels} x {dtype.itemsize}")
    rate_hz = _number(header.get("sampling_frequency"), "sampling_frequency")
    if not 0 < rate_hz <= _MAX_RATE_HZ:
        raise MalformedMessage(f"sampling_frequency {rate_hz:g}, expected a positive number of Hz")
    stamp = header.get("t_acquired")
    return Traces(
        seq=_integer(header, "seq", 0, _MAX_INDEX),
        start_sample=_integer(header, "start_sample", 0, _MAX_INDEX),
        sampling_frequency=rate_hz,
        # copied: a view of the frame would be read-only, which compiles every kernel a second time
        samples=np.frombuffer(payload, dtype).reshape(n_samples, n_channels).copy(),
        gain_uv=_gain(header.get("gain_uv"), n_channels),
        t_acquired=None if stamp is None else _number(stamp, "t_acquired"),
    )


def _open(frames: Sequence[bytes]) -> tuple[str, dict[str, Any], bytes]:
    if len(frames) != 3:
        raise MalformedMessage(f"{len(frames)} frames, expected 3")
    if len(frames[1]) > _MAX_HEADER_BYTES:
        raise MalformedMessage(f"a header of {len(frames[1])} bytes")
    header = _from_json(frames[1])
    if not isinstance(header, dict):
        raise MalformedMessage(f"the header is a {type(header).__name__}, expected an object")
    if header.get("schema", SCHEMA) != SCHEMA:
        raise MalformedMessage(f"schema {header['schema']!r}, expected {SCHEMA!r}")
    _integer(header, "seq", 0, _MAX_INDEX)
    return frames[0].decode(errors="replace"), header, frames[2]


def _integer(header: dict[str, Any], key: str, least: int, most: int) -> int:
    value = header.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise MalformedMessage(f"{key} {value!r:.40}, expected a whole number from {least} to {most}")
    return value


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MAX_NUMBER:
        raise MalformedMessage(f"{key} {value!r:.40}, expected a number")
    return float(value)


def _gain(value: Any, n_channels: int) -> NDArray[np.float32]:
    """Read one gain for all channels, or a list with one per channel."""
    gains = np.array([_number(item, "gain_uv") for item in (value if isinstance(value, list) else [value])], np.float32)
    if len(gains) not in (1, n_channels) or not (np.isfinite(gains) & (gains != 0)).all():
        raise MalformedMessage(f"gain_uv {value!r:.40}, expected microvolts per step, one number or one per channel")
    return np.broadcast_to(gains, (n_channels,)).copy()


class LossCounter:
    """Count lost messages per topic from their `seq`.

    A message that comes late stays counted; a `seq` that goes back far is a publisher that started anew, not a loss.
    """

    def __init__(self) -> None:
        self.lost: dict[str, int] = {}
        self._expected: dict[str, int] = {}

    def note(self, topic: str, seq: int) -> int:
        """Return how many messages of `topic` went missing just before this one; the first one seen has no before."""
        expected = self._expected.get(topic, seq)
        missing = max(seq - expected, 0)
        if not expected - _LATE_MESSAGES < seq < expected:
            self._expected[topic] = seq + 1
        self.lost[topic] = self.lost.get(topic, 0) + missing
        return missing
