"""What every streaming stage must keep: checks that any of them can be run through.

A stage is made by `make()` and fed by `feed(stage, traces, start_sample)`, which returns a tuple of arrays with one row per result;
`period` is the number of samples at whose multiples chunks are cut in addition. A stage has `reset()` and can be pickled.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.records import Chunk, Output


class Kept:
    """A sink that keeps every output."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []

    def publish(self, output: Output) -> None:
        self.outputs.append(output)

    def close(self) -> None:
        pass


def take(source: Iterable[Chunk], until: int) -> list[Chunk]:
    """Take chunks of a source up to that sample."""
    chunks = []
    for chunk in source:
        chunks.append(chunk)
        if chunk.end_sample >= until:
            return chunks
    raise AssertionError("the source ended")


Arrays = tuple[NDArray[Any], ...]
Feed = Callable[[Any, NDArray[Any], int], Arrays]


def pieces(start: int, stop: int, sizes: Iterable[int], period: int) -> Iterator[tuple[int, int]]:
    """Cut [start, stop) into chunks of the given sizes (repeated), and those at multiples of the period."""
    for size in cycle(sizes):
        end = min(start + size, stop)
        while start < end:
            cut = min((start // period + 1) * period, end)
            yield start, cut
            start = cut
        if start == stop:
            return


def run(
    stage: Any, feed: Feed, traces: NDArray[Any], sizes: Iterable[int], period: int, start: int = 0, stop: int | None = None
) -> Arrays:
    """Feed traces[start:stop] in chunks and join what comes out."""
    stop = len(traces) if stop is None else stop
    results = [feed(stage, traces[a:b], a) for a, b in pieces(start, stop, sizes, period)]
    return tuple(np.concatenate(column) for column in zip(*results, strict=True))


def assert_same(found: Arrays, expected: Arrays) -> None:
    """Compare bit for bit."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert one.tobytes() == other.tobytes()


def chunk_invariant(
    make: Callable[[], Any], feed: Feed, traces: NDArray[Any], period: int, many_sizes: Iterable[list[int]]
) -> None:
    """Any chunking gives the same bits as the largest chunks there can be."""
    expected = run(make(), feed, traces, [period], period)
    assert len(expected[0])
    for sizes in many_sizes:
        assert_same(run(make(), feed, traces, sizes, period), expected)


def empty_chunk(make: Callable[[], Any], feed: Feed, traces: NDArray[Any], period: int) -> None:
    """An empty chunk gives empty results and changes nothing."""
    stage, half = make(), len(traces) // 2
    assert all(len(array) == 0 for array in feed(stage, traces[:0], 0))
    first = run(stage, feed, traces, [period], period, 0, half)
    assert all(len(array) == 0 for array in feed(stage, traces[:0], half))
    second = run(stage, feed, traces, [period], period, half)
    expected = run(make(), feed, traces, [half], period)
    assert_same(tuple(np.concatenate(pair) for pair in zip(first, second, strict=True)), expected)


def input_kept(make: Callable[[], Any], feed: Feed, traces: NDArray[Any], period: int) -> None:
    """The input is not written, not returned and not remembered: overwriting it afterwards changes nothing."""

    def feed_and_spoil(stage: Any, chunk: NDArray[Any], start: int) -> Arrays:
        mine = chunk.copy()
        results = feed(stage, mine, start)
        assert mine.tobytes() == chunk.tobytes()
        assert not any(np.shares_memory(array, mine) for array in results)
        copies = tuple(array.copy() for array in results)
        mine[:] = 7
        assert_same(results, copies)
        return results

    assert_same(run(make(), feed_and_spoil, traces, [97], period), run(make(), feed, traces, [97], period))


def reset_is_fresh(make: Callable[[], Any], feed: Feed, traces: NDArray[Any], period: int) -> None:
    """After `reset` a stage does what a new one does."""
    stage, half = make(), len(traces) // 2
    run(stage, feed, traces, [period], period, 0, half)
    stage.reset()
    again = run(stage, feed, traces, [period], period, half)
    assert_same(again, run(make(), feed, traces, [period], period, half))


def state_continues(make: Callable[[], Any], feed: Feed, traces: NDArray[Any], period: int) -> None:
    """A stage saved in the middle and loaded elsewhere goes on identically, and the original is not touched by that."""
    stage, half = make(), len(traces) // 2 + 11
    run(stage, feed, traces, [101], period, 0, half)
    loaded = pickle.loads(pickle.dumps(stage))
    expected = run(stage, feed, traces, [101], period, half)
    assert_same(run(loaded, feed, traces, [101], period, half), expected)
