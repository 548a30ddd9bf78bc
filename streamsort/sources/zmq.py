"""Chunks from a lab's own publisher: ZeroMQ SUB, topic `traces` of wire format 1.

The publisher's `start_sample` is the clock. A jump ahead is a gap, samples that were there before are dropped as duplicate (or
reorder, when they had been missing), a jump in `seq` counts lost messages, and a message that breaks the format is counted and
skipped. A publisher that starts anew, so that its indices make no sense any more, is taken up after a tenth of a second with a gap
as long as the host's clock says.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from streamsort.errors import StreamsortError
from streamsort.probe import Probe
from streamsort.records import Chunk, Gap, StreamInfo
from streamsort.sockets import Subscriber
from streamsort.sources import check_probe
from streamsort.sources.clock import ClockFit
from streamsort.wire import LossCounter, MalformedMessage, Traces, TracesDecoder

_log = logging.getLogger("streamsort.sources.zmq")

_RESTART_S = 0.1  # of samples in a row that do not fit, before they are believed
_MAX_JUMP_S = 60.0  # a longer gap must agree with the time that passed
_NEW_LINE_S = 1.0  # further from the line of arrivals than this, a new one is begun
_EARLY_S = 2e-3  # no sample arrives before it was taken: a line later than an arrival was begun too late
_SAME_CLOCK_S = 60.0  # a stamp further from our clock is another clock's


class Continuity:
    """Place a publisher's samples on the stream's own axis, which starts at 0 and never goes back.

    Parameters
    ----------
    sampling_frequency : float
    first_sample : int
        The publisher's index of our sample 0.

    Attributes
    ----------
    next_sample : int
        Our index of the sample that is due next.
    """

    def __init__(self, sampling_frequency: float, first_sample: int) -> None:
        self.next_sample = 0
        self._sampling_frequency = sampling_frequency
        self._base = first_sample
        self._missing: deque[tuple[int, int]] = deque(maxlen=64)
        self._stray_next = -1
        self._n_stray = 0
        self._heard_at: float | None = None

    def place(self, start_sample: int, n_samples: int, now: float) -> tuple[int, list[Gap]]:
        """Say how many leading samples of a message to drop, and what was wrong.

        Parameters
        ----------
        start_sample, n_samples : int
            As in the message's header.
        now : float
            Host-clock time (s) of its arrival.

        Returns
        -------
        n_drop : int
            Equal to `n_samples` when nothing is left; else the rest starts at `next_sample` less its length.
        gaps : list of Gap
        """
        start = start_sample - self._base
        elapsed_s = 0.0 if self._heard_at is None else now - self._heard_at
        jump = start - self.next_sample
        if jump > max(_MAX_JUMP_S, 1.5 * elapsed_s) * self._sampling_frequency or jump <= -n_samples:
            if not self._restarted(start, n_samples):
                return n_samples, [self._dropped(start, n_samples)] if jump < 0 <= start else []
            jump = max(round(elapsed_s * self._sampling_frequency) - n_samples, 0)
            start = self.next_sample + jump
            self._base = start_sample - start
            self._missing.clear()
            _log.warning("the publisher started anew at its sample %d", start_sample)
        self._n_stray = 0
        self._heard_at = now
        gaps = []
        if jump > 0:
            gaps = [Gap(self.next_sample, jump, "gap")]
            self._missing.append((self.next_sample, start))
        elif jump < 0:
            gaps = [self._dropped(start, -jump)]
        self.next_sample = start + n_samples
        return max(-jump, 0), gaps

    def _restarted(self, start: int, n_samples: int) -> bool:
        """Believe a new time base once enough samples in a row have followed it."""
        self._n_stray = n_samples + (self._n_stray if start == self._stray_next else 0)
        self._stray_next = start + n_samples
        return self._n_stray >= _RESTART_S * self._sampling_frequency

    def _dropped(self, start: int, n_samples: int) -> Gap:
        late = any(first < start + n_samples and start < end for first, end in self._missing)
        return Gap(start, n_samples, "reorder" if late else "duplicate")


class ZmqSource:
    """Receive traces from a publisher.

    Parameters
    ----------
    url : str
        Where the publisher is bound, `tcp://host:port`.
    probe : Probe, optional
    timeout_s : float, optional
        Silence after which an error is raised; None waits for ever, and says once that it does.

    Attributes
    ----------
    info : StreamInfo
        From the first message, which the constructor waits for.
    counters : dict of str to int
        malformed, lost_messages, stray_messages (with an index that cannot be), dropped_samples, missing_samples.

    Raises
    ------
    StreamsortError
        If the address is none, nothing arrives within `timeout_s`, the probe does not fit, or the stream changes its format.
    """

    def __init__(self, url: str, *, probe: Probe | None = None, timeout_s: float | None = None) -> None:
        self.counters = dict.fromkeys(("malformed", "lost_messages", "stray_messages", "dropped_samples", "missing_samples"), 0)
        self._url = url
        self._losses = LossCounter()
        self._decoder = TracesDecoder()
        self._subscriber = Subscriber(url, "source", "traces", high_water=0, timeout_s=timeout_s)
        try:
            self._first: Traces | None = next(self._received())
            traces = self._first
            check_probe(probe, traces.samples.shape[1], url)
        except BaseException:
            self.close()
            raise
        self.info = StreamInfo(
            name=url,
            sampling_frequency=traces.sampling_frequency,
            n_channels=traces.samples.shape[1],
            dtype=traces.samples.dtype,
            gain_uv=traces.gain_uv,
            probe=probe,
            live=True,
        )
        self._format, self._told = traces.format, _told(traces)
        self._continuity = Continuity(traces.sampling_frequency, traces.start_sample)
        self._fit = ClockFit(traces.sampling_frequency)

    def __iter__(self) -> Iterator[Chunk]:
        """Yield chunks as they arrive; iterating again goes on where the last iteration stopped."""
        pending: list[Gap] = []
        for traces in self._all():
            if traces.format != self._format:
                raise StreamsortError(f"{self._url}: the stream became {_told(traces)}, expected it to stay {self._told}")
            now = time.monotonic()
            n_drop, gaps = self._continuity.place(traces.start_sample, len(traces.samples), now)
            self._count(gaps)
            pending += gaps
            if n_drop == len(traces.samples):
                self.counters["stray_messages"] += not gaps
                continue
            start = self._continuity.next_sample - len(traces.samples) + n_drop
            yield Chunk(start, traces.samples[n_drop:], self._t_origin(traces.t_acquired, now), now, tuple(pending))
            pending = []

    def close(self) -> None:
        """Disconnect; an iteration in another thread ends within 0.2 s."""
        self._subscriber.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _all(self) -> Iterator[Traces]:
        if self._first is not None:
            first, self._first = self._first, None
            yield first
        yield from self._received()

    def _received(self) -> Iterator[Traces]:
        for traces in self._subscriber.receive(self._decode):
            self.counters["lost_messages"] += self._losses.note("traces", traces.seq)
            yield traces

    def _decode(self, frames: list[bytes]) -> Traces:
        try:
            return self._decoder.decode(frames)
        except MalformedMessage:
            self.counters["malformed"] += 1
            raise

    def _count(self, gaps: list[Gap]) -> None:
        for gap in gaps:
            self.counters["missing_samples" if gap.kind == "gap" else "dropped_samples"] += gap.n_samples
            _log.info("%s: %s of %d samples at %d", self._url, gap.kind, gap.n_samples, gap.start_sample)

    def _t_origin(self, stamp: float | None, now: float) -> float:
        """Date sample 0 from the publisher's stamp of the newest sample, or, without one on our clock, from times of arrival."""
        newest = self._continuity.next_sample - 1
        if stamp is not None and 0 <= now - stamp < _SAME_CLOCK_S:
            return stamp - newest / self.info.sampling_frequency
        if self._fit.started:
            late_s = now - newest / self.info.sampling_frequency - self._fit.t_origin(newest)
            if late_s > _NEW_LINE_S or late_s < -_EARLY_S:
                self._fit.restart()
        self._fit.update(newest, now)
        return self._fit.t_origin(newest)


def _told(traces: Traces) -> str:
    n_channels, dtype, rate_hz, _ = traces.format
    gain = f"{traces.gain_uv[0]:g}" if (traces.gain_uv == traces.gain_uv[0]).all() else f"{traces.gain_uv[0]:g}, ..."
    return f"{n_channels} channels of {dtype} at {rate_hz:g} Hz with gain_uv {gain}"
