"""`streamsort replay`: send a recording out as a live stream, over LSL or ZeroMQ."""

import argparse
import json
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from streamsort.commands.options import probe_of
from streamsort.commands.summary import print_rows
from streamsort.commands.terminal import Interrupts, Terminal
from streamsort.player import replay
from streamsort.records import Chunk, StreamInfo
from streamsort.sources import Source, open_source

_POLL_S = 0.1


class _Watched:
    """A source that can be asked how far it is."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.end_sample = 0
        self.began: float | None = None

    @property
    def info(self) -> StreamInfo:
        return self._source.info

    @property
    def counters(self) -> dict[str, int]:
        return self._source.counters

    def __iter__(self) -> Iterator[Chunk]:
        self.began = time.monotonic()
        for chunk in self._source:
            yield chunk
            self.end_sample = chunk.end_sample

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Replay(threading.Thread):
    """The replay in a thread of its own, so that this one can draw and listen for Ctrl-C."""

    def __init__(self, source: _Watched, url: str, wait_s: float | None) -> None:
        super().__init__(name="replay", daemon=True)
        self.stop = threading.Event()
        self.n_samples = 0
        self._source, self._url, self._wait_s = source, url, wait_s
        self._failure: Exception | None = None

    def run(self) -> None:
        try:
            self.n_samples = replay(self._source, self._url, wait_s=self._wait_s, stop=self.stop)
        except Exception as error:
            self._failure = error

    def end(self) -> None:
        """Stop, wait until the last samples are on their way, and raise what went wrong."""
        self.stop.set()
        self.join()
        if self._failure is not None:
            raise self._failure


def main(args: argparse.Namespace) -> int:
    """Send a recording to whoever listens."""
    with Terminal() as terminal:
        source = open_source(args.recording, probe=probe_of(args), speed=args.speed, chunk_ms=args.chunk_ms)
        watched = _Watched(source)
        sending = _Replay(watched, args.to, args.timeout)
        with Interrupts() as interrupts:
            sending.start()
            terminal.release_warnings()
            _follow(sending, watched, getattr(source, "n_samples", 0), terminal, interrupts, args.to)
            sending.end()
        _summarise(args, watched, sending.n_samples)
    return 0


def _follow(sending: _Replay, watched: _Watched, n_samples: int, terminal: Terminal, interrupts: Interrupts, url: str) -> None:
    def goes_on() -> bool:
        sending.join(_POLL_S)
        return sending.is_alive() and not interrupts.requested

    with terminal.waiting(f"{watched.info.name}: waiting for somebody who listens to {url}"):
        while watched.began is None and goes_on():
            pass
    with terminal.bar("replaying") as show:
        while goes_on():
            show(watched.end_sample / n_samples if n_samples else 0.0)


def _summarise(args: argparse.Namespace, watched: _Watched, n_samples: int) -> None:
    wall_s = 0.0 if watched.began is None else time.monotonic() - watched.began
    if args.json:
        print(json.dumps({"to": args.to, "samples_sent": n_samples, "wall_s": wall_s}))
        return
    seconds = n_samples / watched.info.sampling_frequency
    print_rows([("sent", f"{n_samples} samples, {seconds:.1f} s of {watched.info.n_channels} channels"), ("to", args.to)])
