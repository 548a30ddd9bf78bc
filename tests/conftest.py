"""Fixtures shared by all tests, and what must be set before the first import of pylsl."""

import importlib.util
import os
import socket
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest

# liblsl reads its configuration once, at its first call: this machine only, and a session of its own, so that neither another test
# run nor a lab's streams are seen. Child processes inherit the variable.
_LSL_FOLDER = tempfile.TemporaryDirectory(prefix="streamsort-lsl-")
_LSL_CONFIG = Path(_LSL_FOLDER.name) / "lsl_api.cfg"
_LSL_CONFIG.write_text(f"[log]\nlevel = -3\n[multicast]\nResolveScope = machine\n[lab]\nSessionID = {uuid.uuid4().hex}\n")
os.environ["LSLAPICFG"] = str(_LSL_CONFIG)

# The same examples on every run, on machines of any speed.
hypothesis.settings.register_profile("streamsort", deadline=None, derandomize=True)
hypothesis.settings.load_profile("streamsort")


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("torch") is None:  # doctests import every module, and training needs torch
        config.option.ignore_glob = [*(config.option.ignore_glob or []), "*/streamsort/train/*"]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def free_port() -> int:
    """Return a TCP port of the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def lsl_config() -> Iterator[Path]:
    """Return the configuration that liblsl runs with here; skip where pylsl has no library."""
    try:
        import pylsl  # noqa: F401
    except RuntimeError as error:
        pytest.skip(f"no liblsl: {error}")
    yield _LSL_CONFIG
