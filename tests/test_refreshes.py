"""The processes beside a run that refresh its encoder: started in turn, told of when they fail, ended with it."""

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from streamsort.cli import main
from streamsort.commands import extras
from streamsort.commands.refreshes import Refreshes

DEADLINE_S = 20.0


def until(refreshes: Refreshes, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not happened():
        assert time.monotonic() < deadline
        refreshes.poll()
        time.sleep(0.01)


def program(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import sys; sys.exit('streamsort: no reservoir')", "refresh failed with code 1 (no reservoir)"),
        ("print('x' * 99999); print('done so far'); raise SystemExit(3)", "refresh failed with code 3 (done so far)"),
        ("raise SystemExit(2)", "refresh failed with code 2 (it said nothing)"),
        pytest.param(
            "import os; os.kill(os.getpid(), 9)",
            "refresh was killed by signal 9 (it said nothing)",
            marks=pytest.mark.skipif(os.name != "posix", reason="signals"),
        ),
    ],
)
def test_a_failure_is_one_line(caplog: pytest.LogCaptureFixture, text: str, told: str) -> None:
    with Refreshes("unused", 0.01, program(text)) as refreshes:
        until(refreshes, lambda: len(caplog.records) > 0)
    assert caplog.records[0].getMessage() == f"{told}; the encoder stays"
    assert caplog.records[0].levelno == logging.WARNING


def test_a_program_that_is_not_there_is_one_line(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with Refreshes("unused", 0.01, (str(tmp_path / "none"),)) as refreshes:
        until(refreshes, lambda: len(caplog.records) > 0)
    assert caplog.records[0].getMessage().startswith("refresh cannot be started")


def test_one_follows_the_other(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    text = f"import os, pathlib; p = pathlib.Path({str(tmp_path)!r}); assert not list(p.glob('*.running')); "
    text += "mine = p / f'{os.getpid()}.running'; mine.touch(); mine.rename(mine.with_suffix('.done'))"
    with Refreshes("unused", 0.01, program(text)) as refreshes:
        until(refreshes, lambda: len(list(tmp_path.glob("*.done"))) >= 3)
    assert not caplog.records  # none has met another


def test_the_first_is_not_started_at_once(tmp_path: Path) -> None:
    with Refreshes("unused", 3600.0, program(f"open({str(tmp_path / 'ran')!r}, 'w')")) as refreshes:
        refreshes.poll()
        assert refreshes.pid is None
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_even_one_that_will_not_end_ends_with_the_run(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    text = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    text += f"open({str(tmp_path / 'on')!r}, 'w').close(); time.sleep(600)"
    with Refreshes("unused", 0.01, program(text)) as refreshes:
        until(refreshes, (tmp_path / "on").exists)
        pid = refreshes.pid
        assert pid is not None and alive(pid)
    assert not alive(pid) and not caplog.records


def test_a_run_refuses_what_cannot_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["run", "sim:seconds=1", "--refresh-every", "1"]) == 2
    assert capsys.readouterr().err == (
        "streamsort: run: --refresh-every without --session, expected one, where the units' spikes are kept\n"
    )
    monkeypatch.setattr(extras, "_TRAINING", ("no_such_module",))
    assert main(["run", "sim:seconds=1", "--refresh-every", "1", "--session", str(tmp_path / "s")]) == 2
    told = "no_such_module is not installed, expected pip install 'streamsort[train]'\n"
    assert capsys.readouterr().err == f"streamsort: run --refresh-every: {told}"
    assert main(["refresh", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"streamsort: refresh: {told}"
