"""What every benchmark says: the machine it ran on, one table, one JSON file.

Results come in as a list of flat dictionaries, one per row; the same dictionaries are what the JSON holds.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console
from rich.table import Table

_PACKAGES = ("streamsort", "numpy", "numba", "scipy", "onnxruntime", "onnxruntime-gpu", "pyzmq", "pylsl", "river")
_WIDTH = 200  # of a table in a pipe, where nothing says how wide the terminal is


def machine() -> dict[str, Any]:
    """Describe the machine, and how busy it is with other things."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Name the versions of what takes part, and the commit of the checkout, marked when it was changed since."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit:
        found["commit"] = commit + (" and changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    return found


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def spread(values: ArrayLike, percentiles: Sequence[float] = (50, 95, 99)) -> dict[str, float | None]:
    """Return percentiles and the maximum; None of everything where nothing was measured."""
    values = np.asarray(values, np.float64)
    names = [f"p{q:g}" for q in percentiles]
    if not len(values):
        return dict.fromkeys([*names, "max"])
    found: dict[str, float | None] = dict(zip(names, np.percentile(values, percentiles).tolist(), strict=True))
    return found | {"max": float(values.max())}


@contextlib.contextmanager
def one_core() -> Iterator[int | None]:
    """Keep this thread, and those it starts, on one core where the system can do that; yields which."""
    if not hasattr(os, "sched_setaffinity"):
        yield None
        return
    before = os.sched_getaffinity(0)
    core = max(before)  # the first one often serves interrupts
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, before)


def publish(
    title: str, columns: Mapping[str, str], results: Sequence[dict[str, Any]], args: argparse.Namespace, **more: Any
) -> None:
    """Print one table, and write `args.json` if it is given.

    Parameters
    ----------
    title : str
    columns : mapping
        From a key of the results to the head of its column.
    results : sequence of dict
        One per row.
    args : argparse.Namespace
        Of the benchmark; kept in the JSON.
    **more
        Further entries of the JSON.
    """
    about: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    console = Console(width=None if Console().is_terminal else _WIDTH, highlight=False)
    place = (
        f"{about['machine']['processor']}, {about['machine']['cores']} cores, commit {about['versions'].get('commit', 'unknown')}"
    )
    table = Table(title=title, caption=place, title_justify="left", caption_justify="left")
    for head in columns.values():
        table.add_column(head, justify="right")
    for row in results:
        table.add_row(*(_cell(row.get(key)) for key in columns))
    console.print(table)
    if args.json is not None:
        text = json.dumps({"benchmark": title, **about, "arguments": vars(args), **more, "results": results}, indent=1, default=str)
        Path(args.json).write_text(text + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return (
            "0"
            if abs(value) < 5e-4
            else f"{value:.3g}"
            if abs(value) < 10
            else f"{value:.1f}"
            if abs(value) < 1000
            else f"{value:.0f}"
        )
    return str(value)
