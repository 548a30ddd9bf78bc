"""Run streamsort from a bare checkout: one file, standard library only.

    python3 tools/start.py demo [arguments of streamsort demo]
    python3 tools/start.py test [arguments of pytest]
    python3 tools/start.py check        lint, format and types

The first call makes `.venv` in the repository root and installs streamsort into it, editable; later calls find the stamp left
inside (a hash of pyproject.toml and of the Python it was made with) and start at once. uv is used where it is on the PATH, else
pip. A Python without ensurepip is enough, because its own pip can install into an environment that has none.

Testing the training code takes torch. In CI it must be there; elsewhere, when it cannot be had in five minutes, those tests skip.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.version_info < (3, 11):  # what comes above must be understood by any Python 3
    raise SystemExit("streamsort needs Python 3.11 or newer, this is {}.{}: try python3.11".format(*sys.version_info))

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "streamsort.json"

EXTRAS = {"demo": ["report"], "test": ["dev", "offline", "report"], "check": ["dev", "offline", "report"]}
STEPS = {
    "demo": [["-m", "streamsort", "demo"]],
    "test": [["-m", "pytest"]],
    "check": [["-m", "ruff", "check", "."], ["-m", "ruff", "format", "--check", "."], ["-m", "mypy"]],
}
# A pinned torch: `torch` alone would bring whichever build is newest, with gigabytes of CUDA libraries.
TRAIN = ["torch==2.13.0", "onnx>=1.17", "onnxscript>=0.5", "scikit-learn>=1.5", "threadpoolctl>=3.5"]
TRAIN_TIMEOUT_S = 300.0


def say(text: str) -> None:
    print(f"start: {text}", file=sys.stderr, flush=True)


def run(command: Sequence[str | Path], timeout_s: float | None = None) -> bool:
    """Run one step; what it prints is for errors only. False if it failed or took too long."""
    try:
        return subprocess.run([str(part) for part in command], cwd=ROOT, timeout=timeout_s).returncode == 0
    except subprocess.TimeoutExpired:
        say(f"gave up after {timeout_s:.0f} s")
        return False


def fingerprint() -> str:
    """Identify what the environment is made from: the dependencies and the Python."""
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + sys.version.encode() + str(ROOT).encode()).hexdigest()


def installed() -> list[str]:
    """Return what the environment holds that is up to date; empty when it has to be made."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return []
    return list(stamp["holds"]) if PYTHON.exists() and stamp["fingerprint"] == fingerprint() else []


def install_package(extras: Sequence[str]) -> None:
    """Make the environment and install streamsort, editable, with pip beside it."""
    if not PYTHON.exists() or not run([PYTHON, "-c", ""]):
        say(f"making {VENV}")
        if not run([sys.executable, "-m", "venv", "--clear", "--without-pip", VENV]):
            raise SystemExit(f"start: could not make {VENV}")
    wanted: list[str | Path] = ["pip>=23", "-e", f".[{','.join(extras)}]"]
    uv = shutil.which("uv")
    say(f"installing streamsort[{','.join(extras)}] with {'uv' if uv else 'pip'} (a minute or so, once)")
    if uv and run([uv, "pip", "install", "--quiet", "--python", PYTHON, *wanted]):
        return
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", PYTHON, "install", "-qq", "--disable-pip-version-check"]
    if not run([*pip, *wanted]):
        raise SystemExit("start: could not install; without uv this needs pip 22.3 or newer (Debian: apt install python3-pip)")


def install_training() -> None:
    """Install torch, with pip even where there is uv: pip alone reads the package sources that are configured for it."""
    say(f"installing {TRAIN[0]} for the tests of training")
    required = bool(os.environ.get("CI"))
    pip: list[str | Path] = [PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    if not run([*pip, *TRAIN], None if required else TRAIN_TIMEOUT_S):
        if required:
            raise SystemExit(f"start: could not install {TRAIN[0]}, which CI must have")
        say("no torch: the tests of training will be skipped")


def prepare(command: str) -> None:
    """Bring the environment to what `command` needs, and stamp it."""
    held = installed()
    extras = sorted({*EXTRAS[command], *(name for name in held if name != "train")})
    if not set(extras) <= set(held):
        install_package(extras)
        held = extras
    if command != "demo" and "train" not in held:
        install_training()
        held = [*held, "train"]
    STAMP.write_text(json.dumps({"fingerprint": fingerprint(), "holds": held}))


def main(arguments: Sequence[str]) -> int:
    """Prepare, then become the last step of the command, so that its signals and exit code are the caller's."""
    if not arguments or arguments[0] not in STEPS:
        print(__doc__)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    command, *rest = arguments
    prepare(command)
    os.chdir(ROOT)
    *first, last = ([str(PYTHON), *step] for step in STEPS[command])
    for step in first:
        code = subprocess.run(step).returncode
        if code:
            return code
    last += rest
    if os.name == "nt":  # exec there returns to the shell at once
        return subprocess.run(last).returncode
    os.execv(last[0], last)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
