"""One run of a benchmark: start the processes, lead them through the phases, and collect what each noted.

The player sends until it is told to stop; what happens when is decided here, from what the subscriber and the status say. A phase
is known by its samples, so what was noted is sorted into phases afterwards, whatever was on its way when one ended.
"""

import contextlib
import dataclasses
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zmq
from numpy.typing import NDArray

from streamsort.bench.children import Child, family, free_port, looks_until
from streamsort.bench.faults import Faults
from streamsort.bench.played import Phase
from streamsort.client import subscribe
from streamsort.errors import StreamsortError

SPEEDS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)
STEP_S = 4.0  # at each speed
BEHIND_S = 0.3  # after a step, and not yet through it: no faster one is tried
REST_S = 5.0  # clean, after each fault
_QUIET_S = 1.0  # after the last sample, what is on its way still arrives
_SILENCE_S = 60.0
_REPLY_S = 60.0  # beyond the length of a phase


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes
    ----------
    recording : str
    n_samples : int
    rate : float
    chunk_ms, deadline_ms : float
    transport : {"zmq", "lsl"}
    warmup_s, catch_up_s, seconds : float
        Of calibration, at most until it is caught up with, and of each phase.
    faults : sequence of (str, Faults)
        A phase for each, by the name it is shown with.
    bursts : dict of str
        What a burst adds, an .npy file by the fault's factor.
    headroom : bool
    sorter : sequence of str
        Further arguments of `streamsort run`.
    seed : int
    """

    recording: str
    n_samples: int
    rate: float
    chunk_ms: float
    deadline_ms: float
    transport: str
    warmup_s: float
    catch_up_s: float
    seconds: float
    faults: tuple[tuple[str, Faults], ...]
    bursts: dict[float, str]
    headroom: bool
    sorter: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Notes:
    """What the processes noted.

    Attributes
    ----------
    sent : int
        Samples that the player sent.
    clean, faulted, steps : dict, list of dict, list of dict
        What the player said of each phase, with the fault's name and `until_sample`, the end of the clean stretch after it.
    counted : dict
        The summary of `streamsort run`.
    heard : dict
        What the subscriber said at its end.
    arrivals : ndarray, shape (n_spikes,), ARRIVAL_DTYPE
    lateness : ndarray, shape (n, 2), float64
        When the empty loop woke up, and how late, in s.
    slowed_at : ndarray, shape (n,), float64
        When calls of the encoder were slowed.
    usage : dict of list
        Of the sorter and the player, see `Child`.
    """

    sent: int
    clean: dict[str, Any]
    faulted: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    counted: dict[str, Any]
    heard: dict[str, Any]
    arrivals: NDArray[Any]
    lateness: NDArray[np.float64]
    slowed_at: NDArray[np.float64]
    usage: dict[str, list[Any]]


def conduct(plan: Plan, folder: Path, say: Callable[[str], None]) -> Notes:
    """Run the processes to the end of the plan.

    Raises
    ------
    StreamsortError
        If one of them ends before, with what it said last.
    """
    published = f"tcp://127.0.0.1:{free_port()}"
    stream = f"lsl:streamsort-bench-{os.getpid()}" if plan.transport == "lsl" else f"tcp://127.0.0.1:{free_port()}"
    arrivals, lateness, slowed = (folder / name for name in ("arrivals.npy", "lateness.npy", "slowed.npy"))
    roles = ("-m", "streamsort.bench.roles")
    spans = ("--rate", str(plan.rate), "--warmup-s", str(plan.warmup_s), "--catch-up-s", str(plan.catch_up_s), "--seconds", "0")
    play = ("play", "--recording", plan.recording, "--url", stream, "--chunk-ms", str(plan.chunk_ms))
    slows = any(faults.slow_encoder_ms for _, faults in plan.faults)
    command = ("-m", "streamsort.bench.slow_encoder", str(slowed)) if slows else ("-m", "streamsort")
    with family() as children:

        def start(name: str, *arguments: str) -> Child:
            children.append(Child(name, *arguments))
            return children[-1]

        player = start("the player", *roles, *play)
        receiver = start("the subscriber", *roles, "receive", "--url", published, "--out", str(arrivals), *spans)
        sleeper = start("the empty loop", *roles, "idle", "--out", str(lateness))
        for child in children:
            child.wait_ready()
        run = ("run", stream, "--publish", published, "--timeout", str(_SILENCE_S), "--json", *plan.sorter)
        sorter = start("the sorter", *command, *run)
        rig = _Rig(plan, player, receiver, sorter, published, say)
        clean, faulted, steps = rig.catch_up(), rig.faults(), rig.headroom()
        say("ending      the sorter finishes what it has")
        sent = player.finish()["samples_sent"]
        time.sleep(_QUIET_S)
        counted = sorter.finish(interrupt=True)
        sleeper.finish()
        time.sleep(_QUIET_S)
        heard = receiver.finish()
        usage = {"sorter": sorter.usage, "player": player.usage}
    slowed_at = np.load(slowed) if slows else np.zeros(0)
    return Notes(sent, clean, faulted, steps, counted, heard, np.load(arrivals), np.load(lateness), slowed_at, usage)


class _Rig:
    """The processes at work."""

    def __init__(
        self, plan: Plan, player: Child, receiver: Child, sorter: Child, published: str, say: Callable[[str], None]
    ) -> None:
        self._plan, self._player, self._receiver, self._sorter = plan, player, receiver, sorter
        self._published, self._say = published, say

    def catch_up(self) -> dict[str, Any]:
        """Wait until calibration is caught up with, and play the clean phase."""
        plan = self._plan
        self._say(f"calibrating {plan.warmup_s:g} s, then until that is caught up with")
        longest_s = plan.warmup_s + plan.catch_up_s + _SILENCE_S + _REPLY_S
        if looks_until(self._receiver, (self._player, self._sorter), longest_s) is None:
            raise StreamsortError(
                f"bench: no spike came within {longest_s:g} s, expected some after the warm-up; is it one that spikes?"
            )
        self._say(f"measuring   {plan.seconds:g} s, clean")
        return self._play(Phase(plan.seconds))

    def faults(self) -> list[dict[str, Any]]:
        """Play a phase for each fault, with a clean stretch after it."""
        told = []
        for number, (name, faults) in enumerate(self._plan.faults):
            seconds = faults.phase_s(self._plan.seconds)
            self._say(f"measuring   {seconds:g} s with {name}")
            with _never_reading(self._published) if faults.slow_subscriber else contextlib.nullcontext():
                self._slow_encoder(faults.slow_encoder_ms)
                burst = self._plan.bursts.get(faults.burst)
                phase = self._play(Phase(seconds, faults=faults, seed=self._plan.seed + number, burst=burst))
                self._slow_encoder(0.0)
            rest = self._play(Phase(REST_S))
            told.append({"name": name, "faults": faults, **phase, "until_sample": rest["to_sample"]})
        return told

    def headroom(self) -> list[dict[str, Any]]:
        """Play faster and faster, until the sorter is far behind."""
        steps: list[dict[str, Any]] = []
        if not self._plan.headroom:
            return steps
        with _Progress(self._published, self._plan.rate) as progress:
            for speed in SPEEDS:
                self._say(f"measuring   {STEP_S:g} s at {speed:g}x real time")
                steps.append(self._play(Phase(STEP_S * speed, speed=speed)))
                if progress.through_sample(after=steps[-1]["ended"] + BEHIND_S) < steps[-1]["to_sample"]:
                    break
        return steps

    def _slow_encoder(self, slow_ms: float) -> None:
        if any(faults.slow_encoder_ms for _, faults in self._plan.faults):
            self._sorter.tell(slow_ms=slow_ms)

    def _play(self, phase: Phase) -> dict[str, Any]:
        self._sorter.look()
        self._player.look()
        self._player.tell(**dataclasses.asdict(phase))
        told = looks_until(self._player, (self._sorter, self._receiver), phase.seconds / phase.speed + _REPLY_S)
        if told is None:
            raise StreamsortError(
                f"bench: the player needs more than {_REPLY_S:g} s too long for {phase.seconds:g} s at {phase.speed:g}x"
            )
        self._sorter.look()
        self._player.look()
        return dict(json.loads(told))


class _Progress:
    """How far the sorter is, as it says once a second."""

    def __init__(self, published: str, rate: float) -> None:
        self._rate = rate
        self._said: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._subscription = subscribe(published)
        self._messages = self._subscription.messages("status")
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def through_sample(self, after: float) -> int:
        """Wait for what it says after a time; return the first sample that was not taken to be sorted by then."""
        with contextlib.suppress(queue.Empty):
            while (status := self._said.get(timeout=_REPLY_S))["time"] < after:
                pass
            passed = status["samples_acquired"] + sum(status["samples_lost"].get(kind, 0) for kind in ("gap", "overrun"))
            return int(passed - status["queues"]["chunks_ms"] * self._rate / 1e3)
        return 0

    def _follow(self) -> None:
        for message in self._messages:
            self._said.put(message.payload)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._subscription.close()
        self._thread.join()


@contextlib.contextmanager
def _never_reading(published: str) -> Iterator[None]:
    """Subscribe to all that the sorter publishes, and read none of it."""
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.RCVHWM, 1)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(published)
        yield
