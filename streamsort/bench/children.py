"""The other processes of a benchmark, as their parent sees them."""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import streamsort
from streamsort.bench.roles import ENOUGH
from streamsort.errors import StreamsortError

LOOK_S = 0.5
_END_S = 600.0  # a sorter first sorts what it has queued


class Child:
    """One process beside this one; it may be killed at any time, by its id.

    Parameters
    ----------
    name : str
        As errors call it.
    *command : str
        What Python runs.

    Attributes
    ----------
    usage : list of tuple
        Time, resident MB, CPU seconds, and CPU seconds of each thread by its id and what the system calls it, at each `look`.
    """

    def __init__(self, name: str, *command: str) -> None:
        self._name = name
        package = str(Path(streamsort.__file__).parent.parent)  # children import the same streamsort
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # a Ctrl-C in the terminal is for this process alone
        )
        self.usage: list[tuple[float, float, float, dict[tuple[int, str], float]]] = []
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait_ready(self) -> None:
        """Wait until it says so."""
        while (said := self.hear(LOOK_S)) is None:
            self.check()
        if said != "ready":
            raise self._failure()

    def hear(self, within_s: float) -> str | None:
        """Wait for the next line that it says; None when none came."""
        try:
            return self._lines.get(timeout=within_s)
        except queue.Empty:
            return None

    def tell(self, **what: Any) -> None:
        """Write a line of JSON to it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `check` says why it has gone
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()

    def check(self) -> None:
        """Do nothing while it runs.

        Raises
        ------
        StreamsortError
            If it has ended, with what it said last.
        """
        if not self.running:
            raise self._failure()

    def look(self) -> None:
        """Note memory and CPU time, where the system has /proc."""
        with contextlib.suppress(OSError):
            folder = Path(f"/proc/{self.process.pid}")
            pages = int((folder / "statm").read_text().split()[1])
            threads = {}
            for task in (folder / "task").iterdir():
                with contextlib.suppress(OSError):  # it may have ended
                    threads[int(task.name), (task / "comm").read_text().strip()] = _cpu_s(task)
            memory_mb = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            self.usage.append((time.monotonic(), memory_mb, _cpu_s(folder), threads))

    def finish(self, interrupt: bool = False) -> dict[str, Any]:
        """Let it end, and return what it said."""
        if interrupt:
            self.process.send_signal(signal.SIGINT)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            raise StreamsortError(f"bench: {self._name} is still there after {_END_S:g} s, expected it to end") from None
        self._listener.join()
        if self.process.returncode:
            raise self._failure()
        said = []
        while (line := self.hear(0.0)) is not None:
            said.append(line)
        return dict(json.loads("".join(line for line in said if line != ENOUGH)))

    def kill(self) -> None:
        """Make sure that it is gone."""
        if self.running:
            self.process.kill()
            self.process.wait()
        self._listener.join()
        self._stderr.close()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                self._lines.put(line.strip())

    def _failure(self) -> StreamsortError:
        code = self.process.wait()
        self._stderr.seek(0)
        said = [line for line in self._stderr.read().splitlines() if line.strip()]
        return StreamsortError(f"bench: {self._name} ended with code {code}" + (f": {said[-1].strip()}" if said else ""))


def _cpu_s(folder: Path) -> float:
    """Read user and system time of a process or of a thread."""
    ticks = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def family() -> Iterator["list[Child]"]:
    """Yield a list; those that are in it at the end are killed."""
    children: list[Child] = []
    try:
        yield children
    finally:
        for child in children:
            child.kill()


def looks_until(speaker: Child, others: Sequence[Child], within_s: float) -> str | None:
    """Look at all twice a second until one of them says something; return that, or None when it was silent for so long.

    Raises
    ------
    StreamsortError
        If one of them ends.
    """
    deadline = time.monotonic() + within_s
    while (said := speaker.hear(LOOK_S)) is None:
        for child in (speaker, *others):
            child.check()
            child.look()
        if time.monotonic() >= deadline:
            return None
    return said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
