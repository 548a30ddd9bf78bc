"""What the first process of a training run does between steps: record, score, save and show; the others do nothing here.

On a terminal there is a bar; in a pipe only the lines that say how the model scored. Both go to stderr.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from streamsort.train.config import TrainConfig
from streamsort.train.run import LOSSES, Run
from streamsort.train.validate import Validation

_COLUMNS = (
    TextColumn("step {task.fields[step]}, {task.fields[rate]:.2g}/s, loss {task.fields[losses]}"),
    BarColumn(20),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


class Keeper:
    """Keep a run; a context that shows its progress.

    Parameters
    ----------
    config : TrainConfig
    out : Path
        Where checkpoint and history go.
    run : Run
    leads : bool
        Whether this is the first process.
    """

    def __init__(self, config: TrainConfig, out: Path, run: Run, leads: bool = True) -> None:
        self._config, self._out, self._run, self._leads = config, out, run, leads
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(*_COLUMNS, console=self._console, refresh_per_second=1, disable=not self._console.is_terminal)
        self._validation = Validation(config.validate_sites, config.network.n_samples) if leads else None
        self._saved = time.monotonic()

    def __enter__(self) -> Self:
        if self._leads:
            self._bar.start()
        self._task = self._bar.add_task("train", total=1.0, step=self._run.step, rate=0.0, losses="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def keep(self, losses: Sequence[float]) -> None:
        """Do what is due after a step that had these losses."""
        if self._validation is None:
            return
        run, config = self._run, self._config
        done = run.progress(config) >= 1.0
        if done or run.step % config.record_steps == 0:
            scored = done or run.seconds - run.scored_s >= config.validate_s
            self._record(self._validation(run.model.slow_encoder) if scored else {})
        shown = " + ".join(f"{loss:.3g}" for loss in losses)
        self._bar.update(
            self._task, completed=run.progress(config), step=run.step, rate=run.step / max(run.seconds, 1e-9), losses=shown
        )
        if done or time.monotonic() - self._saved >= config.save_s:
            run.save(config, self._out)
            self._saved = time.monotonic()

    def _record(self, figures: dict[str, float]) -> None:
        losses = self._run.record(figures)["losses"]
        if figures:
            said = ", ".join(f"{name} {losses[name]:.3f}" for name in LOSSES)
            self._console.print(f"step {self._run.step}: {said}; {Validation.say(figures)}", soft_wrap=True)
