"""What a running stream does for a refresh of its encoder, beside the hot path; `stream.py` gives it a thread.

`SESSION/models/` is watched for contracts of new encoders. Each is loaded, compared with the one in force, and either offered to
the sorter, which swaps at a learning boundary, or refused; after a swap the former encoder is heard for a while, and put back if
the two part. `SESSION/reservoir.npz` is kept up to date for whoever trains. The sorter is looked at through snapshots alone, which
the sort thread makes when asked. An offer is tried once, and whatever is wrong with it, sorting goes on.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from streamsort.encode import Encoder
from streamsort.errors import StreamsortError
from streamsort.refresh import ENOUGH_SPIKES, Abandoned, Snapshot, Verdict, prepare
from streamsort.session import SessionWriter
from streamsort.shadow import Shadow
from streamsort.sorter import Sorter

_log = logging.getLogger("streamsort.refresh")

# Rest so many times as long as was worked: at most a fifth of a core is taken from the hot path where cores are short. A lower
# priority is no way to that: a thread that has the interpreter's lock and waits for a core makes all others wait with it.
_REST = 4.0
_POLL_S, _SWAP_POLL_S = 1.0, 0.02
_SAVE_REST = 20.0  # and after saving, of which a big probe has 100 MB to do
_LONGEST_S = 0.1  # counted as work at once: the rest of a longer while was waiting
_MOST_BYTES = 64 << 20  # of an offered model; ours have less than 5 MB


class Refresher:
    """Watch for encoders, judge them, and keep the trainer supplied.

    Parameters
    ----------
    sorter : Sorter
    writer : SessionWriter
        Of the session whose directory is watched.
    """

    def __init__(self, sorter: Sorter, writer: SessionWriter) -> None:
        self._sorter, self._writer = sorter, writer
        self._config = sorter.config.refresh
        self._folder = writer.path / "models"
        self._stopped, self._arrived = threading.Event(), threading.Event()
        self._wanted = False
        self._snapshot: Snapshot | None = None
        self._seen: dict[str, tuple[int, int]] = {}
        self._tried: set[tuple[str, str]] = set()
        self._shadow: Shadow | None = None
        self._watched_until = 0
        self._save_due = self._woke = 0.0
        self._last_error = ""
        self._status: dict[str, Any] = {
            "offers": 0,
            "accepted": 0,
            "refused": 0,
            "rolled_back": 0,
            "watching": False,
            "agreement": None,
            "last_offer": "",
            "last_reason": "",
        }

    def status(self) -> dict[str, Any]:
        """Return what became of the offers so far, ready for JSON; from any thread."""
        return dict(self._status)

    def serve(self) -> None:
        """Make a snapshot if one is wanted and nothing is being learned (on the thread that calls the sorter's `learn`)."""
        if self._wanted and not self._sorter.learning:
            self._wanted = False
            self._snapshot = self._sorter.snapshot()
            self._arrived.set()

    def close(self) -> None:
        """Make `run` return; the sorter must not be used by then."""
        self._stopped.set()

    def run(self) -> None:
        """Look around until closed, then save a last time."""
        while not self._stopped.wait(_POLL_S):
            self._attempt(self._look_around)
        self._attempt(lambda: self._save(self._sorter.snapshot()))

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Abandoned:
            pass
        except Exception as error:
            if repr(error) != self._last_error:  # not once a second
                self._last_error = repr(error)
                _log.exception("refresh failed; sorting goes on")

    def _look_around(self) -> None:
        if not self._sorter.calibrated:
            return
        began = time.monotonic()
        if began >= self._save_due:
            self._save(self._ask())
            self._save_due = began + max(self._config.save_s, _SAVE_REST * (time.monotonic() - began))
        if self._shadow is not None:
            self._watch(self._shadow)
        elif (path := self._next_offer()) is not None:
            self._consider(path)

    def _ask(self) -> Snapshot | None:
        """Have the sort thread make a snapshot; a silent source makes that take a moment."""
        self._arrived.clear()
        self._wanted = True
        while not self._arrived.wait(_POLL_S):
            if self._stopped.is_set():
                raise Abandoned
        return self._snapshot

    def _save(self, snapshot: Snapshot | None) -> None:
        """Write the units' members; those of reject prototypes are nobody's."""
        if snapshot is None:
            return
        prototypes = snapshot.prototypes
        rows = zip(prototypes.serial.tolist(), prototypes.unit.tolist(), prototypes.channel.tolist(), strict=True)
        kept = [
            (members, unit, channel) for serial, unit, channel in rows if unit >= 0 and (members := snapshot.members.get(serial))
        ]
        if kept:
            self._writer.save_reservoir(
                {
                    "snippets": [np.stack([member.snippet for member in members]) for members, _, _ in kept],
                    "unit_id": [np.full(len(members), unit, np.int32) for members, unit, _ in kept],
                    "channel": [np.full(len(members), channel, np.uint16) for members, _, channel in kept],
                    "sample_index": [np.array([member.sample_index for member in members]) for members, _, _ in kept],
                }
            )

    def _next_offer(self) -> Path | None:
        """Find a contract that was not tried yet, oldest first; one that is written again is another."""
        if not self._folder.is_dir():
            return None
        found = [(path.stat(), path) for path in self._folder.glob("*.json")]
        for stat, path in sorted(found, key=lambda item: (item[0].st_mtime_ns, item[1].name)):
            if self._seen.get(path.name) != (stat.st_mtime_ns, stat.st_size):
                return path
        return None

    def _consider(self, path: Path) -> None:
        """Judge an offer and let it take over if it may."""
        snapshot = self._ask()
        if snapshot is None or snapshot.n_sorted < ENOUGH_SPIKES:
            return  # later, when there is enough to judge by
        stat = path.stat()
        self._seen[path.name] = stat.st_mtime_ns, stat.st_size
        key = path.name, hashlib.sha256(path.read_bytes()).hexdigest()  # a contract holds the checksum of its model
        if key in self._tried:
            return
        self._tried.add(key)
        self._tell(offers=self._status["offers"] + 1, last_offer=path.stem)
        encoder, verdict = self._judge(path, snapshot)
        if encoder is None or not verdict.ok:
            self._refuse(verdict)
            return
        self._swap(verdict, encoder)
        self._shadow = Shadow(snapshot, verdict, self._config)
        self._watched_until = -1
        self._tell(accepted=self._status["accepted"] + 1, watching=True)
        _log.info("encoder %s takes over from %s: agreement %.4f", encoder.name, snapshot.encoder.name, self._status["agreement"])

    def _judge(self, path: Path, snapshot: Snapshot) -> tuple[Encoder | None, Verdict]:
        """Load and compare; what is broken must not break us."""
        try:
            encoder = self._load(path, snapshot.encoder.provider)
            return encoder, prepare(encoder, snapshot, self._config, self._pause)
        except StreamsortError as error:
            return None, Verdict(path.stem, "", str(error))
        except Abandoned:
            raise
        except Exception as error:  # onnxruntime's exceptions share no base class but this
            return None, Verdict(path.stem, "", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def _load(self, path: Path, provider: Any) -> Encoder:
        model = path.with_suffix(".onnx")
        if model.is_file() and model.stat().st_size > _MOST_BYTES:
            raise StreamsortError(f"encoder {model}: {model.stat().st_size} bytes, expected at most {_MOST_BYTES}")
        encoder = Encoder(model, provider, sampling_frequency=self._sorter.info.sampling_frequency)
        self._sorter.check(encoder)
        encoder.warmup()
        return encoder

    def _swap(self, verdict: Verdict, encoder: Encoder) -> None:
        """Offer, and wait until it is done: what comes next is judged in the new space."""
        self._tell(last_reason=verdict.reason, agreement=verdict.agreement and verdict.agreement.overall)
        self._sorter.offer(verdict, encoder)
        while self._sorter.encoder is not encoder:
            if self._stopped.wait(_SWAP_POLL_S):
                raise Abandoned

    def _pause(self) -> bool:
        """Rest after a piece of work; tell whether it is over for good."""
        worked_s = min(time.monotonic() - self._woke, _LONGEST_S)
        stopped = self._stopped.wait(_REST * worked_s)
        self._woke = time.monotonic()
        return stopped

    def _refuse(self, verdict: Verdict) -> None:
        self._sorter.offer(verdict)
        agreement = verdict.agreement.overall if verdict.agreement is not None else self._status["agreement"]
        self._tell(refused=self._status["refused"] + 1, last_reason=verdict.reason, agreement=agreement)
        _log.warning("the offered encoder %s is refused: %s", verdict.name, verdict.reason)

    def _watch(self, shadow: Shadow) -> None:
        """Hear the former encoder; go back to it, or let it go when the time is over."""
        snapshot = self._ask()
        if snapshot is None:
            return
        if self._watched_until < 0:
            self._watched_until = snapshot.sample_index + round(self._config.watch_s * self._sorter.info.sampling_frequency)
        agreement, back = shadow.look(snapshot, self._pause)
        self._tell(agreement=agreement.overall if agreement.n_spikes else self._status["agreement"])
        if back is not None:
            self._swap(back, shadow.encoder)
            _log.warning("encoder %s is %s; back to %s", snapshot.encoder.name, back.reason, shadow.encoder.name)
        over = snapshot.sample_index >= self._watched_until and agreement.n_spikes >= ENOUGH_SPIKES
        if back is not None or over:
            self._shadow = None
            self._tell(watching=False, rolled_back=self._status["rolled_back"] + (back is not None))

    def _tell(self, **news: Any) -> None:
        self._status = {**self._status, **news}  # a new one: another thread may be reading the old
