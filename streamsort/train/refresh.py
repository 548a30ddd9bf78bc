"""Tune the encoder of a session to the units it sees, and offer the result to the run.

In come SESSION/reservoir.npz and the `.onnx` of the encoder in force; out comes SESSION/models/NAME-rK.onnx with its contract, the
offer, which the live sorter finds and judges for itself. Nothing else is shared with the run, so it may go on, have ended, or die
meanwhile. An encoder that tells the held-out spikes apart less well than its parent is not offered.
"""

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamsort.encode import Contract, Encoder
from streamsort.errors import StreamsortError
from streamsort.session import Session
from streamsort.train.export import load_encoder, write_model
from streamsort.train.held_out import Figures, HeldOut, embed
from streamsort.train.networks import AnyEncoder, to_table
from streamsort.train.session_snippets import Floats, read_snippets
from streamsort.train.tune import TuneConfig, tune

MODELS = "models"


@dataclass(frozen=True)
class Outcome:
    """What a refresh came to.

    Attributes
    ----------
    parent : str
        The encoder in force when it began.
    n_units, n_spikes, n_held_out : int
        What was read.
    steps : int
    seconds : float
        Of tuning.
    before, after : Figures
        Of the held-out spikes, under the parent and under the tuned encoder.
    cosine : float
        Mean cosine between both embeddings of a held-out spike.
    model : Path or None
        The offer; None if the tuned encoder scores less than its parent.
    """

    parent: str
    n_units: int
    n_spikes: int
    n_held_out: int
    steps: int
    seconds: float
    before: Figures
    after: Figures
    cosine: float
    model: Path | None = None

    @property
    def same_unit(self) -> float:
        """Share of held-out spikes that lie nearest to the same unit under both encoders."""
        return float((self.before.nearest == self.after.nearest).mean())

    @property
    def worse(self) -> bool:
        return self.after.score < self.before.score

    def figures(self) -> dict[str, Any]:
        """Return what the contract of the offer keeps, ready for JSON."""
        return {
            "units": self.n_units,
            "spikes": self.n_spikes,
            "held_out": self.n_held_out,
            "steps_done": self.steps,
            "tuned_s": round(self.seconds, 1),
            "before": self.before.shares(),
            "after": self.after.shares(),
            "same_unit": round(self.same_unit, 4),
            "cosine": round(self.cosine, 4),
        }


def refresh(path: str | Path, config: TuneConfig, progress: Callable[[float], None] = lambda fraction: None) -> Outcome:
    """Tune the encoder in force in a session, and write the offer unless it is worse.

    Parameters
    ----------
    path : path
        The session directory.
    config : TuneConfig
    progress : callable, optional
        Called after each step with the fraction that is done.

    Raises
    ------
    StreamsortError
        If there is no session, no reservoir or too little in it, or the encoder in force is not there or cannot be tuned.
    """
    torch.set_num_threads(1)  # the other cores are the run's
    session = Session(path)
    parent = Encoder(model_in_force(session), "cpu", sampling_frequency=session.sampling_frequency)
    data = read_snippets(session, parent, config.seed)
    encoder, _ = load_encoder(parent.path)
    held_out = HeldOut(data, config.seed)
    before, began = held_out(encoder), time.monotonic()
    tuned, steps = tune(encoder, data, config, progress)
    seconds = time.monotonic() - began
    cosine = _cosine(encoder, tuned, data.snippets[data.held_out])
    counts = data.n_units, len(data.snippets), int(data.held_out.sum())
    outcome = Outcome(parent.name, *counts, steps, seconds, before, held_out(tuned), cosine)
    return outcome if outcome.worse else _offer(session, parent, tuned, config, outcome)


def model_in_force(session: Session) -> Path:
    """Find the model that sorts in a session: the one of the last swap its ledger tells of, else the one it began with.

    Raises
    ------
    StreamsortError
        If it is neither in SESSION/models nor where the manifest says.
    """
    told = session.manifest.get("model", {})
    sha256 = next((event["sha256"] for event in reversed(session.ledger) if event.get("event") == "model"), told.get("sha256"))
    for path in (Path(str(told.get("path"))), *sorted((session.path / MODELS).glob("*.onnx"))):
        try:
            if Contract.read(path.with_suffix(".json")).sha256 == sha256:
                return path
        except StreamsortError:
            continue
    raise StreamsortError(
        f"session {session.path}: the encoder in force (sha256 {str(sha256)[:12]}...) is not at {told.get('path')} "
        f"nor in {session.path / MODELS}, expected it with its contract"
    )


def _cosine(one: AnyEncoder, other: AnyEncoder, snippets: Floats) -> float:
    a, b = embed(one, snippets), embed(other, snippets)
    return float(((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).mean())


def _offer(session: Session, parent: Encoder, tuned: AnyEncoder, config: TuneConfig, outcome: Outcome) -> Outcome:
    training = {
        "network": to_table(tuned.config),
        "refresh_of": parent.name,
        "session": str(session.manifest.get("session")),
        "tuning": asdict(config),
        **outcome.figures(),
    }
    path = _next_path(session.path / MODELS, parent.name)
    inherited = {"parent_sha256": parent.sha256, "cpu_batch": parent.contract.cpu_batch}
    write_model(tuned, path, training, version=parent.contract.version, **inherited)
    return replace(outcome, model=path)


def _next_path(folder: Path, parent: str) -> Path:
    """Name an offer BASE-rK.onnx; K counts all that were ever offered here."""
    base = re.sub(r"-r\d+$", "", parent)
    taken = [int(found[1]) for path in folder.glob("*") if (found := re.search(r"-r(\d+)\.", path.name))]
    return folder / f"{base}-r{max(taken, default=0) + 1}.onnx"
