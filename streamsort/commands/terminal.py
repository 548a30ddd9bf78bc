"""What all commands share at the terminal: where things are printed, progress, warnings, and Ctrl-C.

Results go to stdout; progress, status and warnings to stderr, so that a pipe gets results only. While a command sets itself up,
warnings are held back: if it fails, the one line that says why stands alone.
"""

import contextlib
import logging
import logging.handlers
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

_HELD_RECORDS = 1000
_LABEL_WIDTH = 12
_REFRESH_S = 0.5  # drawing takes a millisecond or two from the threads that sort


class Aborted(KeyboardInterrupt):
    """A second Ctrl-C: do not drain, end."""


class Interrupts:
    """Turn Ctrl-C and SIGTERM into a question that a loop asks, while it is entered; a second one raises `Aborted`.

    Attributes
    ----------
    requested : bool
        Whether an end was asked for.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise Aborted
        self.requested = True


class _OneLine(logging.Formatter):
    """A record on one line; an exception is named, not traced."""

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        text = record.getMessage() + (f" ({error!r})" if error is not None else "")
        return "streamsort: " + " ".join(text.split())


class _Printer(logging.Handler):
    """Print records above whatever is live on the terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(_OneLine())
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(Text(self.format(record), "yellow"), soft_wrap=True)


class Terminal:
    """Print for one command.

    Attributes
    ----------
    console : Console
        On stderr.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._held = logging.handlers.MemoryHandler(
            _HELD_RECORDS, flushLevel=logging.CRITICAL + 1, target=_Printer(self.console), flushOnClose=False
        )
        self._held.setLevel(logging.WARNING)
        self._log = logging.getLogger("streamsort")
        self._log.addHandler(self._held)
        self._log.propagate = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._log.removeHandler(self._held)
        self._log.propagate = True
        self._held.close()

    def release_warnings(self) -> None:
        """Print the warnings held back so far, and from now on each at once."""
        self._held.flush()
        self._held.flushLevel = logging.NOTSET

    def say(self, text: str, style: str = "") -> None:
        """Print a line."""
        self.console.print(Text(text, style), soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, label: str) -> Iterator[Callable[[float], None]]:
        """Show a progress bar; the function that is yielded takes the fraction done. Nothing is drawn into a pipe."""
        columns = (
            TextColumn(f"{label:<{_LABEL_WIDTH}}"),
            BarColumn(40),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
        )
        with Progress(
            *columns, console=self.console, transient=True, auto_refresh=False, disable=not self.console.is_terminal
        ) as bar:
            task = bar.add_task(label, total=1.0)
            drawn = 0.0

            def show(fraction: float) -> None:
                nonlocal drawn
                now = time.monotonic()
                if now - drawn >= _REFRESH_S:
                    bar.update(task, completed=fraction, refresh=True)
                    drawn = now

            yield show

    @contextlib.contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Say what is waited for, until it is there. Nothing is drawn into a pipe."""
        if not self.console.is_terminal:
            yield
            return
        with self.console.status(label):
            yield

    @contextlib.contextmanager
    def status_line(self) -> Iterator[Callable[[str], None]]:
        """Show one line that changes in place; in a pipe, one line after the other."""
        if not self.console.is_terminal:
            yield lambda text: print(text, file=sys.stderr, flush=True)
            return
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            yield lambda text: live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
