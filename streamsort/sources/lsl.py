"""Chunks from a Lab Streaming Layer outlet.

LSL delivers samples in order, in pieces of any size; `GapFinder` gives them their indices. What is kept here is the connection:
liblsl's own buffer is short, so that memory is bounded and a stall of ours is seen as a gap, and an outlet that dies is looked for
until one of the same name and format is back. On another machine's clock, a side thread keeps the correction to ours up to date.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from streamsort.errors import StreamsortError
from streamsort.liblsl import Description, clock_offset_s, load_pylsl, read_description
from streamsort.probe import Probe
from streamsort.records import Chunk, StreamInfo
from streamsort.sockets import Silence
from streamsort.sources import check_probe
from streamsort.sources.gaps import GapFinder

_log = logging.getLogger("streamsort.sources.lsl")

_BUFFER_S = 2  # what liblsl keeps for us when we are late; beyond it drops the oldest, silently
_MAX_PULL_S = 0.1
_POLL_S = 0.1
_HOLDING_POLL_S = 0.01
_STALL_S = 1.0
_CONNECT_S = 5.0
_RECONNECT_S = 0.5  # short: the name of a dead outlet lingers for a while
_CORRECTION_PERIOD_S = 5.0
_KEYS = ("name", "type", "source_id", "hostname")


class LslSource:
    """Receive one stream.

    Parameters
    ----------
    url : str
        `lsl:NAME`, or `lsl:` with any of `name=`, `type=`, `source_id=`, `hostname=`, separated by commas.
    probe : Probe, optional
        Used instead of the locations in the stream's description.
    timeout_s : float, optional
        How long to look for the stream (5 s by default), and the silence after which an error is raised (None: wait for ever).

    Attributes
    ----------
    info : StreamInfo
    counters : dict of str to int
        stalls (silences of a second or more), reconnects, missing_samples, and backlog_samples that wait in the library right now.

    Raises
    ------
    StreamsortError
        If there is no such stream (those that are there are listed), it has no regular rate or no numbers, the probe does not fit,
        or liblsl is missing.
    """

    def __init__(self, url: str, *, probe: Probe | None = None, timeout_s: float | None = None) -> None:
        self._pylsl = load_pylsl()
        self._url = url
        self._predicate = predicate(url)
        self._timeout_s = timeout_s
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._resolver: Any = None
        self._inlet: Any = None
        self.counters = dict.fromkeys(("stalls", "reconnects", "missing_samples", "backlog_samples"), 0)
        found = _resolve(self._pylsl, url, self._predicate, _CONNECT_S if timeout_s is None else timeout_s)
        self._format = _format(self._pylsl, url, found)
        n_channels, name, rate_hz = self._format
        if not self._connect(found, _CONNECT_S):
            raise StreamsortError(f"{url}: the stream was found and lost again, expected it to answer within {_CONNECT_S:g} s")
        said = self._description(n_channels)
        self.info: StreamInfo = StreamInfo(
            name=found.name(),
            sampling_frequency=rate_hz,
            n_channels=n_channels,
            dtype=np.dtype(np.int16 if name == "int16" else np.float32),
            gain_uv=said.gain_uv,
            probe=check_probe(probe or said.probe, n_channels, url),
            live=True,
        )
        self._buffer: NDArray[Any] = np.empty((max(round(rate_hz * _MAX_PULL_S), 1), n_channels), name)
        self._finder: GapFinder = GapFinder(rate_hz, n_channels, self.info.dtype)
        self._to_monotonic_s: float = clock_offset_s(self._pylsl)
        remote = found.hostname() != socket.gethostname()
        self._correction: ClockCorrection | None = ClockCorrection(self._time_correction, self._closed) if remote else None

    def __iter__(self) -> Iterator[Chunk]:
        """Yield what arrives, as it arrives; iterating again goes on where the last iteration stopped."""
        silence = Silence(self._url, self._timeout_s)
        heard_at, stalled = time.monotonic(), False
        while not self._closed.is_set():
            traces, stamps = self._pull()
            now = time.monotonic()
            silence.note(heard=len(traces) > 0)
            if len(traces):
                heard_at, stalled = now, False
            elif now - heard_at > _STALL_S and not stalled:
                stalled = True
                self.counters["stalls"] += 1
                _log.warning("%s: no samples for %.1f s", self._url, now - heard_at)
            for placed in self._finder.place(traces, stamps, now):
                for gap in placed.gaps:
                    self.counters["missing_samples"] += gap.n_samples
                yield Chunk(placed.start_sample, placed.traces, self._t_origin(), now, placed.gaps)

    def close(self) -> None:
        """Disconnect; an iteration in another thread ends within 0.2 s."""
        self._closed.set()
        with self._lock:
            self._inlet = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _t_origin(self) -> float:
        correction_s = self._correction.seconds if self._correction else 0.0
        return self._finder.fit.t_origin(self._finder.next_sample) + correction_s + self._to_monotonic_s

    def _pull(self) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """Wait up to 0.1 s for samples and copy all that are there; nothing while the outlet is gone."""
        stamps: list[float] = []
        if self._inlet is None:
            self._look_again()
        with self._lock:
            if self._inlet is not None:
                timeout_s = _HOLDING_POLL_S if self._finder.holding else _POLL_S
                try:
                    _, stamps = self._inlet.pull_chunk(timeout_s, len(self._buffer), dest_obj=self._buffer, min_samples=1)
                    all_pulled = len(stamps) < len(self._buffer)
                    self.counters["backlog_samples"] = 0 if all_pulled else self._inlet.samples_available()
                except RuntimeError as error:  # LostError, and what liblsl says while a connection dies
                    _log.warning("%s: the outlet is gone (%s), looking for it", self._url, type(error).__name__)
                    self._inlet = None
        return self._buffer[: len(stamps)].astype(self.info.dtype), np.array(stamps)

    def _look_again(self) -> None:
        """Take the first stream that answers to the same description; another format ends the stream."""
        if self._closed.wait(_POLL_S):
            return
        if self._resolver is None:
            self._resolver = self._pylsl.ContinuousResolver(pred=self._predicate, forget_after=1.0)
        for found in self._resolver.results():
            told = _format(self._pylsl, self._url, found)
            if told != self._format:
                raise StreamsortError(f"{self._url}: came back with {_told(*told)}, expected {_told(*self._format)} as before")
            if self._connect(found, _RECONNECT_S):
                self.counters["reconnects"] += 1
                self._resolver = None
                _log.warning("%s: the outlet is back", self._url)
                return

    def _connect(self, found: Any, timeout_s: float) -> bool:
        inlet = self._pylsl.StreamInlet(found, max_buflen=_BUFFER_S, recover=False)
        try:
            inlet.open_stream(timeout_s)
        except RuntimeError as error:
            _log.info("%s: not connected (%s)", self._url, type(error).__name__)
            return False
        with self._lock:
            if not self._closed.is_set():
                self._inlet = inlet
        return self._inlet is not None

    def _description(self, n_channels: int) -> Description:
        try:
            return read_description(self._inlet.info(timeout=_CONNECT_S).as_xml(), n_channels)
        except RuntimeError:
            raise StreamsortError(f"{self._url}: the stream does not describe itself within {_CONNECT_S:g} s") from None

    def _time_correction(self) -> float:
        inlet = self._inlet
        if inlet is None:
            raise RuntimeError("no connection")
        return float(inlet.time_correction(timeout=_CONNECT_S))


class ClockCorrection:
    """Keep another machine's clock mapped to ours.

    The first measurement takes two thirds of a second and is waited for; later ones are made in a side thread until `closed`.

    Parameters
    ----------
    measure : callable
        Returns seconds to add to the other clock; raises RuntimeError when it cannot tell.
    closed : threading.Event

    Attributes
    ----------
    seconds : float
        The last measurement.
    """

    def __init__(self, measure: Callable[[], float], closed: threading.Event) -> None:
        self._measure = measure
        self._closed = closed
        self.seconds = 0.0
        self._update()
        threading.Thread(target=self._run, name="lsl-clock", daemon=True).start()

    def _run(self) -> None:
        while not self._closed.wait(_CORRECTION_PERIOD_S):
            self._update()

    def _update(self) -> None:
        try:
            self.seconds = self._measure()
        except RuntimeError as error:
            _log.info("no clock correction (%s)", error)


def predicate(url: str) -> str:
    """Turn `lsl:NAME` or `lsl:name=...,type=...` into the XPath predicate that liblsl resolves.

    Raises
    ------
    StreamsortError
        If a key is unknown, or nothing is named.
    """
    text = url.partition(":")[2]
    options = text.split(",") if "=" in text else [f"name={text}"]
    terms = []
    for option in options:
        key, _, value = option.partition("=")
        if key not in _KEYS or not value or "'" in value:
            raise StreamsortError(f"{url}: {option!r}, expected lsl:NAME or lsl: with {', '.join(f'{name}=...' for name in _KEYS)}")
        terms.append(f"{key}='{value}'")
    return " and ".join(terms)


def _resolve(pylsl: ModuleType, url: str, wanted: str, timeout_s: float) -> Any:
    deadline = time.monotonic() + timeout_s
    found: list[Any] = []
    # In slices, since Ctrl-C is not heard inside the library; longer than the 0.5 s after which it asks a second time.
    while not found and (left_s := deadline - time.monotonic()) > 0:
        found = pylsl.resolve_bypred(wanted, 1, min(left_s, 1.0))
    if not found:
        there = [
            f"{s.name()} ({s.type()}, {s.channel_count()} channels, {s.nominal_srate():g} Hz)" for s in pylsl.resolve_streams(1.0)
        ]
        raise StreamsortError(f"{url}: no such stream within {timeout_s:g} s; there are: {'; '.join(there) or 'none'}")
    if len(found) > 1:
        _log.warning("%s: %d streams answer to this, the first is taken; source_id=... would tell them apart", url, len(found))
    return found[0]


def _format(pylsl: ModuleType, url: str, found: Any) -> tuple[int, str, float]:
    names = {
        pylsl.cf_int8: "int8",
        pylsl.cf_int16: "int16",
        pylsl.cf_int32: "int32",
        pylsl.cf_float32: "float32",
        pylsl.cf_double64: "float64",
    }
    name, rate_hz = names.get(found.channel_format()), found.nominal_srate()
    if name is None or not rate_hz > 0:
        kind = "text or 64-bit integers" if name is None else "no regular rate"
        raise StreamsortError(f"{url}: a stream of {kind}, expected int8 to int32, float32 or double64 at a regular rate")
    return found.channel_count(), name, float(rate_hz)


def _told(n_channels: int, name: str, rate_hz: float) -> str:
    return f"{n_channels} channels of {name} at {rate_hz:g} Hz"
