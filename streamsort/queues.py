"""The queue between two threads of a stream.

Items go in with a weight (samples, or bytes) and come out in order. What is bounded is the summed weight, so memory is, however
large single items are; what a full queue means is the writer's choice among `put`, `offer` and `push`.
"""

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

ITEM_BYTES = 1 << 10  # what a batch or an output weighs beside its arrays

T = TypeVar("T")


class BoundedQueue(Generic[T]):
    """Hand items from one thread to another, bounded by their summed weight.

    An item heavier than the limit is taken when the queue is empty. After `close` the rest can still be taken; after `abort` not.
    One thread writes and one reads; any may close.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._items: deque[tuple[T, float]] = deque()
        self._weight = 0.0
        self._closed = False
        self._lock = threading.Lock()
        self._arrival, self._room = _Signal(self._lock), _Signal(self._lock)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def weight(self) -> float:
        return self._weight

    def put(self, item: T, weight: float) -> bool:
        """Append when there is room, however long that takes; False when nobody reads any more."""
        with self._lock:
            while not (self._closed or self._has_room(weight)):
                self._room.wait()
            return self._append(item, weight)

    def offer(self, item: T, weight: float, limit: float | None = None) -> bool:
        """Append if there is room now, by another limit than the queue's own if one is given."""
        with self._lock:
            return self._has_room(weight, limit) and self._append(item, weight)

    def push(self, item: T, weight: float) -> int:
        """Append in any case; return how many of the oldest had to go."""
        n_dropped = 0
        with self._lock:
            while not self._has_room(weight):
                self._weight -= self._items.popleft()[1]
                n_dropped += 1
            self._append(item, weight)
        return n_dropped

    @property
    def ended(self) -> bool:
        """Whether no more will come."""
        return self._closed and not self._items

    def take(self, limit: float = 0.0, timeout: float | None = None) -> list[T]:
        """Wait for an item and take it, with those after it up to a summed weight; none at the end, or after `timeout` seconds."""
        with self._lock:
            while not (self._items or self._closed):
                if not self._arrival.wait(timeout):
                    return []
            taken: list[T] = []
            weight = 0.0
            while self._items and (not taken or weight + self._items[0][1] <= limit):
                item, item_weight = self._items.popleft()
                taken.append(item)
                weight += item_weight
            self._weight -= weight
            self._room.give()
            return taken

    def __iter__(self) -> Iterator[T]:
        """Take one after the other until no more will come."""
        while taken := self.take():
            yield from taken

    def close(self) -> None:
        """Say that nothing more will be put."""
        with self._lock:
            self._closed = True
            self._arrival.give()
            self._room.give()

    def abort(self) -> None:
        """Discard what is waiting and refuse what is put from now on."""
        with self._lock:
            self._items.clear()
            self._weight = 0.0
        self.close()

    def _has_room(self, weight: float, limit: float | None = None) -> bool:
        return not self._items or self._weight + weight <= (self._limit if limit is None else limit)

    def _append(self, item: T, weight: float) -> bool:
        if self._closed:
            return False
        self._items.append((item, weight))
        self._weight += weight
        self._arrival.give()
        return True


class _Signal:
    """Wake the one thread that waits, if one does; both sides hold the queue's lock, which is let go while waiting.

    A `threading.Condition` does the same in Python, with a new lock for each wait: some 30 us of the interpreter for every item.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._awaited = False
        self._given = threading.Lock()
        self._given.acquire()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait to be woken, spuriously too; False after `timeout` seconds."""
        self._awaited = True
        self._lock.release()
        try:
            given = self._given.acquire(timeout=-1 if timeout is None else timeout)
        finally:
            self._lock.acquire()
        if not given and not self._awaited:  # woken between the timeout and here
            given = self._given.acquire()
        self._awaited = False
        return given

    def give(self) -> None:
        if self._awaited:
            self._awaited = False
            self._given.release()
