"""`streamsort doctor`: whether all that a live run needs works on this machine, and how fast.

Every check is made, none is guessed: a session is opened on each provider, samples go through an LSL outlet and back, a message
through ZeroMQ. Nothing leaves this machine.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numba
import numpy as np
import onnxruntime as ort
import zmq

from streamsort import __version__
from streamsort.choose import auto_choice, measure_speed
from streamsort.commands.terminal import Terminal
from streamsort.config import SorterConfig
from streamsort.encode import Encoder, shipped_model
from streamsort.errors import StreamsortError
from streamsort.liblsl import load_pylsl
from streamsort.loopback import keep_lsl_private
from streamsort.records import StreamInfo
from streamsort.sorter import Sorter

_PACKAGES = ("numpy", "scipy", "numba", "river", "probeinterface", "pyzmq", "pylsl", "rich", "matplotlib", "torch")
_RATE_HZ, _N_CHANNELS = 30000.0, 32
_AUTO_CHANNELS = (4, 16, 32, 128, 384)
_TRANSPORT_S = 10.0
_TRANSPORT_MS = 10_000


@dataclass(frozen=True)
class Check:
    """One line of the answer; `ok` is None for what is only told."""

    name: str
    ok: bool | None
    text: str


def main(args: argparse.Namespace) -> int:
    """Make all checks; exit code 1 if one fails."""
    checks: list[Check] = []
    with Terminal() as terminal, tempfile.TemporaryDirectory(prefix="streamsort-doctor-") as folder:
        keep_lsl_private(folder)
        for name, check in _CHECKS.items():
            with terminal.waiting(name):
                checks.append(_make(name, check))
            if not args.json:
                _print(checks[-1])
    failed = [check.name for check in checks if check.ok is False]
    if args.json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        print(f"\n{'not working: ' + ', '.join(failed) if failed else 'all works'}")
    return 1 if failed else 0


def _make(name: str, check: Callable[[], tuple[bool | None, str]]) -> Check:
    try:
        return Check(name, *check())
    except Exception as error:  # whatever is wrong with this machine is the answer
        reason = str(error) if isinstance(error, StreamsortError) else f"{type(error).__name__}: {error}"
        return Check(name, False, " ".join(reason.split()))


def _print(check: Check) -> None:
    mark = {True: "ok", False: "FAIL", None: ""}[check.ok]
    print(f"{check.name:<16}{mark:<6}{check.text}", flush=True)


def _python() -> tuple[None, str]:
    return None, f"{platform.python_version()} on {platform.platform()}"


def _versions() -> tuple[None, str]:
    found = [f"streamsort {__version__}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return None, ", ".join(found)


def _cores() -> tuple[None, str]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return None, f"{usable} usable of {os.cpu_count()}"


def _clock() -> tuple[bool, str]:
    told_ns = 1e9 * time.get_clock_info("monotonic").resolution
    steps = np.diff([time.monotonic() for _ in range(10_000)])
    smallest_us = 1e6 * float(steps[steps > 0].min(initial=1.0))
    return smallest_us < 1000, f"monotonic, {told_ns:g} ns by its own account, smallest step seen {smallest_us:.2f} us"


def _compiler() -> tuple[bool, str]:
    compiled = numba.njit(lambda x: x + 1)
    began = time.monotonic()
    answer = compiled(1)
    return answer == 2, f"numba {numba.__version__} compiles, {1e3 * (time.monotonic() - began):.0f} ms for a small kernel"


def _providers() -> tuple[bool, str]:
    """Open a session on each; what onnxruntime lists is only what it was built for."""
    words = [f"onnxruntime {ort.__version__}"]
    for provider in ("cpu", "cuda"):
        try:
            words.append(f"{Encoder(provider=provider).provider} runs")
        except StreamsortError:
            words.append(f"{provider} does not")
    return "cpu runs" in words, ", ".join(words)


def _encoder(which: str) -> tuple[bool, str]:
    encoder = Encoder(shipped_model(which))
    speed = measure_speed(encoder)
    return True, (
        f"{encoder.name}, sha256 {encoder.sha256[:12]}, on {speed.provider}: {speed.run_ms:.2f} ms for a spike, "
        f"{speed.spikes_per_s:.0f} spikes/s in batches of {speed.batch_size}"
    )


def _encoder_auto() -> tuple[None, str]:
    config = SorterConfig()
    choices = [auto_choice(config.encode.provider, n, config.stream.deadline_ms) for n in _AUTO_CHANNELS]
    if len({choice.reason for choice in choices}) == 1:
        return None, f"would take {choices[0].reason}"
    chosen = [f"{choice.used} for {n}" for choice, n in zip(choices, _AUTO_CHANNELS, strict=True)]
    return None, f"would take {', '.join(chosen)} channels"


def _look_ahead() -> tuple[None, str]:
    info = StreamInfo("doctor", _RATE_HZ, _N_CHANNELS, np.dtype(np.int16), np.ones(_N_CHANNELS, np.float32), None, live=True)
    n = Sorter(SorterConfig(), info).margin_samples
    return None, f"{1e3 * n / _RATE_HZ:.2f} ms ({n} samples at {_RATE_HZ:g} Hz): no spike is published sooner after its trough"


def _liblsl() -> tuple[bool, str]:
    pylsl = load_pylsl()
    version = pylsl.library_version()
    return True, f"{version // 100}.{version % 100}, {pylsl.lib.lib._name}"


def _lsl_loopback() -> tuple[bool, str]:
    pylsl, name = load_pylsl(), f"streamsort-doctor-{uuid.uuid4().hex[:8]}"
    outlet = pylsl.StreamOutlet(pylsl.StreamInfo(name, "Test", 1, pylsl.IRREGULAR_RATE, pylsl.cf_double64, name))
    found = pylsl.resolve_byprop("name", name, 1, _TRANSPORT_S)
    if not found:
        return False, f"an outlet of our own was not found within {_TRANSPORT_S:g} s; is a firewall in the way?"
    inlet = pylsl.StreamInlet(found[0])
    inlet.open_stream(_TRANSPORT_S)
    delays = []
    for _ in range(50):
        sent = time.monotonic()
        outlet.push_sample([sent])
        sample, _ = inlet.pull_sample(_TRANSPORT_S)
        delays.append(time.monotonic() - sent)
        if sample is None or sample[0] != sent:
            return False, "a sample did not come back"
    return True, f"outlet to inlet, {1e3 * float(np.median(delays)):.2f} ms median"


def _zmq_loopback() -> tuple[bool, str]:
    context = zmq.Context()
    publisher, subscriber = context.socket(zmq.XPUB), context.socket(zmq.SUB)
    try:
        port = publisher.bind_to_random_port("tcp://127.0.0.1")
        subscriber.connect(f"tcp://127.0.0.1:{port}")
        subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        if not publisher.poll(_TRANSPORT_MS):
            return False, f"a subscriber was not seen within {_TRANSPORT_S:g} s"
        publisher.recv()
        delays = []
        for _ in range(50):
            sent = time.monotonic()
            publisher.send(b"spikes")
            if not subscriber.poll(_TRANSPORT_MS) or subscriber.recv() != b"spikes":
                return False, "a message did not arrive"
            delays.append(time.monotonic() - sent)
        return True, f"pyzmq {zmq.__version__}, publisher to subscriber, {1e3 * float(np.median(delays)):.2f} ms median"
    finally:
        context.destroy(linger=0)


_CHECKS: dict[str, Any] = {
    "python": _python,
    "versions": _versions,
    "cores": _cores,
    "clock": _clock,
    "compiler": _compiler,
    "providers": _providers,
    "encoder full": lambda: _encoder("full"),
    "encoder light": lambda: _encoder("light"),
    "encoder auto": _encoder_auto,
    "look-ahead": _look_ahead,
    "liblsl": _liblsl,
    "LSL loopback": _lsl_loopback,
    "ZeroMQ loopback": _zmq_loopback,
}
