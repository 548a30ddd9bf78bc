"""Wire format 1: how messages look, both ways, in one place.

A message is three frames `[topic, header, payload]`: the header one compact JSON object, the payload little-endian. `Envelope`
writes what goes out with a `seq` per topic, `decode` reads it back, `encode_traces` and `decode_traces` are the way in. What
arrives from a socket may be anything: every breach of the format is a `MalformedMessage` that says which, and receivers count it
and go on.
"""

import json
import math
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
# What may change from one header of traces to the next, in the usual notation and within the limits above.
_CHANGING = {
    b"seq": rb"0|[1-9]\d{0,17}",
    b"start_sample": rb"0|[1-9]\d{0,17}",
    b"n_samples": rb"[1-9]\d{0,6}",
    b"t_acquired": rb"(?:0|[1-9]\d{0,17})\.\d{1,17}",
}
_CHANGING_MEMBER = re.compile(rb'("(%b)":(?:\\ )?)[\d.\\]+(?=,|\\})' % b"|".join(_CHANGING))  # of what re.escape makes of a header
_TRACE_DTYPES: dict[str, np.dtype[Any]] = {"<i2": np.dtype("<i2"), "<f4": np.dtype("<f4")}


class MalformedMessage(ValueError):  # noqa: N818 - it is counted, not raised to anybody
    """Say what about a received message breaks the format."""


@dataclass(frozen=True)
class Message:
    """One message as received: `payload` is a spike array, int16 counts, or what the JSON says, by topic."""

    topic: str
    header: dict[str, Any]
    payload: Any


class Traces(NamedTuple):
    """One `traces` message: `samples` is (n_samples, n_channels), writable; times `gain_uv` (n_channels,) for microvolts."""

    seq: int
    start_sample: int
    sampling_frequency: float
    samples: NDArray[Any]
    gain_uv: NDArray[np.float32]
    t_acquired: float | None

    @property
    def format(self) -> tuple[int, np.dtype[Any], float, bytes]:
        """What must not change in the course of a stream."""
        return self.samples.shape[1], self.samples.dtype, self.sampling_frequency, self.gain_uv.tobytes()


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
        return _DECODER.decode(frame.decode(json.detect_encoding(frame), "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(f"not JSON ({type(error).__name__})") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # json.loads would make one for each message


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
        same = {"schema": SCHEMA, "session": self.session, "sampling_frequency": sampling_frequency, "clock": CLOCK}
        self._header_begins = to_json(same)[:-1] + b","
        self._seq: dict[str, int] = defaultdict(int)

    def message(self, topic: str, payload: bytes, n: int, **extra: Any) -> list[bytes]:
        """Return the three frames of one message of `n` records; `extra` goes into the header."""
        changing = {"seq": self._seq[topic], "t_published": time.monotonic(), "n": n, **extra}
        self._seq[topic] += 1
        return [topic.encode(), self._header_begins + to_json(changing)[1:], payload]


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
        samples=_samples(payload, dtype, n_channels),
        gain_uv=_gain(header.get("gain_uv"), n_channels),
        t_acquired=None if stamp is None else _number(stamp, "t_acquired"),
    )


class TracesDecoder:
    """Read the `traces` messages of one publisher, in a third of the time that `decode_traces` takes.

    Its headers differ in a few numbers only. The first one becomes a pattern, and of those that match it nothing but these numbers
    is read; any other is read in full.
    """

    def __init__(self) -> None:
        self._first: Traces | None = None
        self._alike: re.Pattern[bytes] | None = None

    def decode(self, frames: Sequence[bytes]) -> Traces:
        """Read one message.

        Raises
        ------
        MalformedMessage
            As `decode_traces`.
        """
        first = self._first
        if first is None:
            self._first, self._alike = decode_traces(frames), _alike(frames[1])
            return self._first
        if self._alike is None or len(frames) != 3 or frames[0] != b"traces":
            return decode_traces(frames)
        found = self._alike.fullmatch(frames[1])
        if found is None or len(frames[2]) != int(found["n_samples"]) * first.samples[0].nbytes:
            return decode_traces(frames)
        numbers = found.groupdict()
        return Traces(
            seq=int(numbers["seq"]),
            start_sample=int(numbers["start_sample"]),
            sampling_frequency=first.sampling_frequency,
            samples=_samples(frames[2], first.samples.dtype, first.samples.shape[1]),
            gain_uv=first.gain_uv,
            t_acquired=float(numbers["t_acquired"]) if "t_acquired" in numbers else first.t_acquired,
        )


def _alike(header: bytes) -> re.Pattern[bytes] | None:
    """Make a pattern of the headers that differ from this one in nothing but what may change.

    None if a name might not be a member's, as in a nested object, or a number is written in an unusual way.
    """
    if b"\\" in header or header.count(b"{") > 1 or any(header.count(b'"%b"' % name) > 1 for name in _CHANGING):
        return None
    places = _CHANGING_MEMBER.sub(lambda found: b"%b(?P<%b>%b)" % (found[1], found[2], _CHANGING[found[2]]), re.escape(header))
    pattern = re.compile(places)
    return pattern if pattern.groupindex.keys() >= {"seq", "start_sample", "n_samples"} else None


def _samples(payload: bytes, dtype: np.dtype[Any], n_channels: int) -> NDArray[Any]:
    """Copy samples out of a frame: a view of it would be read-only, which compiles every kernel a second time."""
    return np.frombuffer(bytearray(payload), dtype).reshape(-1, n_channels)


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
    if len(gains) not in (1, n_channels) or not gains.all():
        raise MalformedMessage(f"gain_uv {value!r:.40}, expected microvolts per step, one number or one per channel")
    return gains if len(gains) == n_channels else gains.repeat(n_channels)


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
