"""The processes that refresh the encoder of a run, started beside it every so often.

Each is `streamsort refresh SESSION`, which lowers its own priority; it shares nothing with the run but files. One that fails, or is
killed, costs a line in the log. None outlives the run.
"""

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

_log = logging.getLogger("streamsort.commands.refreshes")

_TUNE_S = 60.0  # at most, and never more than half of the time
_END_S = 2.0  # from SIGTERM to SIGKILL
_SAID_BYTES = 4096
# A group of its own, so that a Ctrl-C in the terminal is the run's alone; not a session, since Linux shares the CPU out between
# sessions first, and then no priority counts against the run.
_OWN_GROUP: dict[str, Any] = {"process_group": 0} if os.name == "posix" else {}


class Refreshes:
    """Start a refresh every `every_s` seconds, one at a time; the first after that long.

    Parameters
    ----------
    session : path
        The session directory of the run.
    every_s : float
    command : sequence of str, optional
        Started instead of `streamsort refresh SESSION`.

    Examples
    --------
    ::

        with Refreshes("monday", 600.0) as refreshes:
            while running:
                refreshes.poll()
    """

    def __init__(self, session: str | Path, every_s: float, command: Sequence[str] | None = None) -> None:
        tune_s = min(_TUNE_S, every_s / 2)
        ours = (sys.executable, "-m", "streamsort", "refresh", str(session), "--seconds", f"{tune_s:g}")
        self._command = list(command or ours)
        self._every_s = every_s
        self._due = time.monotonic() + every_s
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None
        self._opened = contextlib.ExitStack()

    @property
    def pid(self) -> int | None:
        """Process id of the one that runs, if any."""
        return None if self._process is None else self._process.pid

    def poll(self) -> None:
        """Start the next one if it is due, and tell how one has ended; to be called several times a second."""
        if self._process is not None and self._process.poll() is not None:
            self._tell()
        if time.monotonic() >= self._due:
            self._due += self._every_s
            if self._process is None:
                self._start()

    def close(self) -> None:
        """End the one that runs: SIGTERM, and SIGKILL after two seconds."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                said = stack.enter_context(tempfile.TemporaryFile())  # a pipe that nobody empties would stop whoever writes much
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, **_OWN_GROUP
                )
                self._said = said
                self._opened = stack.pop_all()
        except OSError as error:
            _log.warning("refresh cannot be started (%s)", error)

    def _tell(self) -> None:
        """Say how the process ended, with the last line of what it said."""
        assert self._process is not None and self._said is not None
        code = self._process.returncode
        self._said.seek(max(self._said.seek(0, os.SEEK_END) - _SAID_BYTES, 0))
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        last = " ".join(lines[-1].removeprefix("streamsort: ").split()) if lines else "it said nothing"
        if code:
            ended = f"was killed by signal {-code}" if code < 0 else f"failed with code {code}"
            _log.warning("refresh %s (%s); the encoder stays", ended, last)
        else:
            _log.info("refresh ended (%s)", last)
        self._forget()

    def _forget(self) -> None:
        self._opened.close()
        self._process = self._said = None
