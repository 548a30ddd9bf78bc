import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "tools" / "start.py"
OLD_PYTHON = "import runpy, sys; sys.version_info = (3, 8, 10, 'final', 0); sys.argv = ['start.py', 'demo']; runpy.run_path({!r})"


class Checkout:
    """A copy of the launcher in a folder of its own; its installs are recorded, not done."""

    def __init__(self, root: Path) -> None:
        (root / "tools").mkdir()
        (root / "tools" / "start.py").write_bytes(SCRIPT.read_bytes())
        (root / "pyproject.toml").write_text("[project]\n")
        self.root = root
        self.steps: list[str] = []
        self.failing = ""
        self.start = self._load()
        self.start.run = self._run

    def _load(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("start_copy", self.root / "tools" / "start.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def _run(self, command: list[str | Path], timeout_s: float | None = None) -> bool:
        words = [str(part) for part in command]
        self.steps.append(" ".join(words))
        if "venv" in words:
            python = self.start.PYTHON
            python.parent.mkdir(parents=True, exist_ok=True)
            python.symlink_to(sys.executable)
        return not self.failing or self.failing not in self.steps[-1]

    def prepare(self, command: str) -> list[str]:
        self.steps.clear()
        self.start.prepare(command)
        return list(self.steps)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    return Checkout(tmp_path)


def test_an_old_python_is_told_in_one_line() -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 7))
    done = subprocess.run([sys.executable, "-c", OLD_PYTHON.format(str(SCRIPT))], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "streamsort needs Python 3.11 or newer, this is 3.8: try python3.11\n"


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["fly"], 2), (["--help"], 0)])
def test_usage(checkout: Checkout, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> None:
    assert checkout.start.main(arguments) == code
    assert "python3 tools/start.py demo" in capsys.readouterr().out
    assert checkout.steps == []


def test_installs_once_and_again_when_the_dependencies_change(checkout: Checkout) -> None:
    venv, install = checkout.prepare("demo")
    assert "--without-pip" in venv
    assert f"pip --python {checkout.start.PYTHON} install" in install and install.endswith("-e .[report]")
    assert checkout.prepare("demo") == []
    (checkout.root / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert [step.endswith("-e .[report]") for step in checkout.prepare("demo")] == [False, True]  # the first tries the python


def test_the_tests_add_to_what_the_demo_installed(checkout: Checkout) -> None:
    checkout.prepare("demo")
    *_, package, torch = checkout.prepare("test")
    assert package.endswith("-e .[dev,offline,report]")
    assert " torch==2.13.0 " in torch and " --python " not in torch
    assert checkout.prepare("check") == checkout.prepare("test") == checkout.prepare("demo") == []


def test_a_broken_environment_is_made_anew(checkout: Checkout) -> None:
    checkout.prepare("demo")
    checkout.start.PYTHON.unlink()
    assert len(checkout.prepare("demo")) == 2


def test_uv_is_used_and_pip_is_what_it_falls_back_to(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert checkout.prepare("demo")[-1].startswith("/bin/uv pip install")
    checkout.failing = "/bin/uv"
    (checkout.root / "pyproject.toml").write_text("")
    assert " -m pip --python " in checkout.prepare("demo")[-1]


def test_torch_may_be_missing_but_not_in_ci(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout.failing = "torch=="
    assert len(checkout.prepare("test")) == 3
    assert checkout.prepare("test") == []  # not tried again at every start
    checkout.start.STAMP.unlink()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(SystemExit, match=r"could not install torch==2\.13\.0"):
        checkout.prepare("test")


def test_a_failed_install_stops_and_is_tried_again(checkout: Checkout) -> None:
    checkout.failing = "-e ."
    with pytest.raises(SystemExit, match="could not install"):
        checkout.prepare("demo")
    checkout.failing = ""
    assert checkout.prepare("demo")[-1].endswith("-e .[report]")


@pytest.mark.skipif(os.name == "nt", reason="the link to Python needs rights there")
def test_arguments_and_exit_code_pass_through(checkout: Checkout) -> None:
    checkout.prepare("demo")
    (checkout.root / "streamsort.py").write_text("import sys; print(sys.argv[1:]); sys.exit(7)")
    command = [sys.executable, str(checkout.root / "tools" / "start.py"), "demo", "--seconds", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stdout) == (7, "['demo', '--seconds', '3']\n"), done.stderr
    assert json.loads(checkout.start.STAMP.read_text())["holds"] == ["report"]


def test_check_stops_at_the_first_failure(checkout: Checkout) -> None:
    checkout.prepare("check")
    (checkout.root / "ruff.py").write_text("import sys; sys.exit(3 if 'format' in sys.argv else 0)")
    (checkout.root / "mypy.py").write_text("raise AssertionError('not to be reached')")
    done = subprocess.run([sys.executable, str(checkout.root / "tools" / "start.py"), "check"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")
