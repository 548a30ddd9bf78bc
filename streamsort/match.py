"""Template matching: which units fired when, overlapping spikes taken apart.

In come traces and templates, both in noise units; out go spikes as rows of MATCH_DTYPE, and for learning the snippet of each with
all other spikes taken off. State is a window of the residual, what is left of the traces after the spikes found so far, and the
units' scores along it. A sample is decided once `margin` samples after it are there; then the unit that explains most is subtracted
and its surroundings are looked at again (greedy matching pursuit, as in Yger et al. 2018 and Pachitariu et al. 2024, here sample by
sample and with a bounded look back, so that any chunking gives the same spikes). A large spike that is better explained as two at
once, which is what greed falls for, is taken apart.

A spike is subtracted for longer than it is matched, also from samples that are yet to come. The residual is therefore kept in steps
of 1/1024: sums of such numbers are exact, and it makes no difference what comes first.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamsort.config import MatchConfig
from streamsort.covariance import NoiseModel
from streamsort.kernels.match import advance, clean_snippets, score
from streamsort.probe import Probe
from streamsort.records import join_records
from streamsort.templates import TemplateMaker, Templates

Floats = NDArray[np.float32]
Settled = tuple[NDArray[np.void], Floats, NDArray[np.int32]]

MATCH_DTYPE = np.dtype(
    [
        ("sample_index", "<i8"),
        ("row", "<i4"),
        ("shift", "<i2"),
        ("collision", "<i2"),  # 1 when it overlaps another spike on shared channels
        ("amplitude", "<f4"),  # over the template's
        ("gain", "<f4"),  # twice its log-likelihood over that of no spike
        ("runner_up", "<f4"),  # what the next best unit gains
    ]
)

_N_RECENT = 256  # spikes on the whole probe within the length of what is subtracted
_FREE_COLUMNS = 8192  # between two moves of the window
_LONG_AGO = -(1 << 20)


class Window(NamedTuple):
    """Scratch and state of the kernels; columns are samples, and a few beyond the last of them are spare."""

    residual: Floats  # (n_channels, n_columns); of samples yet to come, what is subtracted already
    scores: Floats  # (n_units, n_columns); 0 where they are far from a spike's
    lines: Floats  # (n_units, n_ranks and up to two more, n_columns) the residual through each unit's spatial factors
    units: NDArray[np.int32]  # (n_units,) all of them
    norms: Floats  # (n_units, n_ranks) of the temporal factors
    last: NDArray[np.int32]  # (n_units,) column of each unit's last spike
    until: NDArray[np.int32]  # (n_units,) column from which on no score is large enough for a spike
    tall: NDArray[np.bool_]  # (n_columns,) where some unit's may be
    deferred: NDArray[np.bool_]  # (n_columns,) to be looked at again
    recent: NDArray[np.int32]  # (n, 3) unit, column, shift of the latest spikes
    recent_amplitude: Floats
    found: NDArray[np.int32]  # (n, 4) unit, column, shift, collision
    amplitude: Floats
    gain: Floats
    runner_up: Floats
    scratch: Floats  # (n_columns,)
    seen: Floats  # scores of one unit where another fires
    through: NDArray[np.int32]  # (1,) column before which no spike is found any more


class Spans(NamedTuple):
    """What the kernels know of the config, in samples."""

    n_before: int
    sweep: int
    look_back: int
    refractory: int
    overlap: int
    apart: int
    n_whole: int
    patience: int
    rounds: int
    tolerance: np.float32


class Match:
    """Find the spikes of known units.

    Parameters
    ----------
    config : MatchConfig
    n_channels : int
    sampling_frequency : float
        In Hz.

    Attributes
    ----------
    n_before, n_after : int
        A spike is matched on samples [spike - n_before, spike + n_after).
    n_whole : int
        And subtracted from so many, beginning with the same.
    margin : int
        Samples of look-ahead.
    """

    def __init__(self, config: MatchConfig, n_channels: int, sampling_frequency: float) -> None:
        self.n_before, self.n_after, spans = sizes(config, sampling_frequency)
        self._spans, self.n_whole = spans, spans.n_whole
        self.margin = self.n_after + spans.sweep
        n_samples = self.n_before + self.n_after
        # A spike found late lies look_back behind, is rescored over a template's length, and its snippet must still be there.
        self._history = 3 * self.n_whole + 2 * (n_samples + spans.look_back + spans.sweep)
        n_columns = self._history + _FREE_COLUMNS + self.n_whole
        self._ones = np.ones(n_channels, np.float32)
        self.templates: Templates | None = None
        self._window = Window(
            residual=np.zeros((n_channels, n_columns), np.float32),
            scores=np.zeros((0, n_columns), np.float32),
            lines=np.zeros((0, -(-config.n_ranks // 3) * 3, n_columns), np.float32),
            units=np.zeros(0, np.int32),
            norms=np.zeros((0, config.n_ranks), np.float32),
            last=np.zeros(0, np.int32),
            until=np.zeros(0, np.int32),
            tall=np.zeros(n_columns, np.bool_),
            deferred=np.zeros(n_columns, np.bool_),
            recent=np.full((_N_RECENT, 3), -1, np.int32),
            recent_amplitude=np.zeros(_N_RECENT, np.float32),
            found=np.zeros((n_columns, 4), np.int32),
            amplitude=np.zeros(n_columns, np.float32),
            gain=np.zeros(n_columns, np.float32),
            runner_up=np.zeros(n_columns, np.float32),
            scratch=np.zeros(n_columns, np.float32),
            seen=np.zeros(n_columns, np.float32),
            through=np.zeros(1, np.int32),
        )
        self.restart(0)

    @property
    def next_sample(self) -> int:
        """The one expected next."""
        return self._origin + self._stop

    def restart(self, start_sample: int) -> None:
        """Forget the traces, as after a gap; the next sample is `start_sample`, and silence is taken to lie before it."""
        self._window.residual[:] = 0
        self._window.last[:] = self._window.until[:] = _LONG_AGO
        self._window.deferred[:] = self._window.tall[:] = False
        self._window.recent[:, 0] = -1
        self._stop = self._history
        self._origin = start_sample - self._history
        self._decided = self._history - self.margin
        self._computed = self._history - self.n_after + 1
        self._window.scores[:, : self._history] = 0
        self._window.lines[..., : self._history] = 0
        self._unsettled = np.zeros(0, MATCH_DTYPE)
        self._settled: list[Settled] = []
        self._window.through[0] = self._decided - self._spans.look_back

    @property
    def through_sample(self) -> int:
        """All spikes before it have come out."""
        return self._origin + int(self._window.through[0])

    def use(self, templates: Templates, threshold: Floats) -> None:
        """Match with these templates from the next sample to decide on.

        Rows stay what they were: a row more is a new unit, and none goes away.

        Parameters
        ----------
        templates : Templates
        threshold : ndarray, shape (n_units,), float32
            Least gain of a spike.
        """
        self._threshold = threshold
        if templates is self.templates:
            return
        self.templates = templates
        n_new = templates.n_units - len(self._window.last)
        if n_new:
            scores, lines = (
                np.zeros((templates.n_units, *array.shape[1:]), np.float32) for array in (self._window.scores, self._window.lines)
            )
            new = np.full(n_new, _LONG_AGO, np.int32)
            last, until = np.append(self._window.last, new), np.append(self._window.until, new)
            units = np.arange(templates.n_units, dtype=np.int32)
            self._window = self._window._replace(scores=scores, lines=lines, units=units, last=last, until=until)
        self._window = self._window._replace(norms=np.linalg.norm(templates.temporal, axis=2))
        first = int(self._window.through[0]) - self._spans.sweep - 1
        score(self._window, templates, self._window.units, first - self.n_before, first, self._computed, self.n_before)

    def warmup(self, config: MatchConfig) -> None:
        """Compile the kernels on scratch data."""
        n_samples, n_channels = self.n_before + self.n_after, len(self._window.residual)
        means = np.zeros((1, self.n_whole, n_channels), np.float32)
        means[0, self.n_before, 0] = 10
        noise = NoiseModel(np.eye(n_channels), np.eye(n_samples))
        self.use(TemplateMaker(config, Probe.linear(n_channels), noise, self.n_before)(means), np.full(1, 20, np.float32))
        traces = np.zeros((6 * self.n_whole, n_channels), np.float32)
        traces[2 * self.n_whole, 0] = 10
        self(traces)

    def __call__(self, traces: Floats, level: Floats | None = None) -> NDArray[np.void]:
        """Take the next samples and return the spikes they complete.

        Parameters
        ----------
        traces : ndarray, shape (n_samples, n_channels), float32
            Read-only, copied.
        level : ndarray, shape (n_channels,), float32, optional
            What is a noise unit in each; without it traces come in noise units.

        Returns
        -------
        matches : ndarray, shape (n_spikes,), MATCH_DTYPE
            In the order they were found: one that another spike had hidden comes after it.
        """
        level = self._ones if level is None else level
        parts = [self._step(traces[i : i + _FREE_COLUMNS], level) for i in range(0, len(traces), _FREE_COLUMNS)]
        return parts[0] if len(parts) == 1 else join_records([np.zeros(0, MATCH_DTYPE), *parts])

    def _step(self, traces: Floats, level: Floats) -> NDArray[np.void]:
        self._make_room(len(traces))
        at = self._stop, self._computed, self._decided
        self._computed, self._decided, n = advance(
            self._window, self.templates, self._threshold, np.ascontiguousarray(traces), level, at, self._spans
        )
        self._stop += len(traces)
        if not n:
            if len(self._unsettled):
                self._settle()
            return self._unsettled[:0]
        matches = np.zeros(n, MATCH_DTYPE)
        found = self._window.found[:n]
        matches["row"], matches["shift"], matches["collision"] = found[:, 0], found[:, 2], found[:, 3]
        matches["sample_index"] = found[:, 1] + self._origin
        for name in ("amplitude", "gain", "runner_up"):
            matches[name] = getattr(self._window, name)[:n]
        self._unsettled = join_records([self._unsettled, matches])
        self._settle()
        return matches

    def settled(self) -> Settled:
        """Return the spikes whose surroundings are decided since the last call, and their clean snippets.

        Returns
        -------
        matches : ndarray, shape (n_spikes,), MATCH_DTYPE
        snippets : ndarray, shape (n_spikes, n_known, n_whole), float32
            The residual plus the spike itself, as if it had come at a whole sample and alone.
        channels : ndarray, shape (n_spikes, n_known), int32
            Where each was cut: those on which its unit is known.
        """
        return join_settled(self.take_settled())

    def take_settled(self) -> list[Settled]:
        """Return the same in parts, in no time."""
        parts, self._settled = self._settled, []
        return parts

    def _settle(self) -> None:
        """Cut the snippets of spikes that nothing found from now on can overlap."""
        done = self._unsettled["sample_index"] + self.n_whole < self.through_sample
        if not done.any():
            return
        matches, self._unsettled = self._unsettled[done], self._unsettled[~done]
        first = matches["sample_index"] - self._origin - self.n_before
        # Contiguous: a field's view of several records is another type to numba than that of one, and would be compiled for live.
        row, amplitude = (np.ascontiguousarray(matches[name]) for name in ("row", "amplitude"))
        assert self.templates is not None
        channels = self.templates.around[row]
        snippets = np.empty((*channels.shape, self.n_whole), np.float32)
        clean_snippets(self._window.residual, self.templates, first, row, amplitude, snippets)
        self._settled.append((matches, snippets, channels))

    def _make_room(self, n_samples: int) -> None:
        """Move the window if so many samples more would not fit."""
        window = self._window
        if self._stop + n_samples + self.n_whole <= window.residual.shape[1]:
            return
        by = self._stop - self._history
        for array in (window.residual, window.scores, window.lines, window.deferred, window.tall):
            array[..., : self._history + self.n_whole] = array[..., by : self._stop + self.n_whole].copy()
        window.residual[:, self._history + self.n_whole :] = 0
        window.deferred[self._history + self.n_whole :] = window.tall[self._history + self.n_whole :] = False
        for column in (window.last, window.until):
            column[:] = np.maximum(column - by, _LONG_AGO)
        window.recent[:, 1] = np.maximum(window.recent[:, 1] - by, _LONG_AGO)
        self._stop, self._decided, self._computed = self._stop - by, self._decided - by, self._computed - by
        self._origin += by
        window.through[0] -= by

    def left(self, sample_index: NDArray[np.int64], channel: NDArray[np.int32]) -> Floats:
        """Return how large what is left of the traces is at single samples, of the latest ones."""
        left: Floats = np.abs(self._window.residual[channel, sample_index - self._origin])
        return left

    def residual(self, start_sample: int, stop_sample: int) -> Floats:
        """Return what is left of the traces, (n_channels, n), a view; of the latest samples only."""
        return self._window.residual[:, start_sample - self._origin : stop_sample - self._origin]


def join_settled(parts: list[Settled]) -> Settled:
    """Put parts of what `Match.settled` gives together."""
    if not parts:
        return np.zeros(0, MATCH_DTYPE), np.zeros((0, 0, 0), np.float32), np.zeros((0, 0), np.int32)
    matches, snippets, channels = zip(*parts, strict=True)
    return join_records(matches), np.concatenate(snippets), np.concatenate(channels)


def sizes(config: MatchConfig, sampling_frequency: float) -> tuple[int, int, Spans]:
    """Convert the config to samples: before and after a spike, and what the kernels need."""

    def samples(ms: float) -> int:
        return max(round(ms * sampling_frequency / 1000), 1)

    n_before, n_after, sweep = samples(config.ms_before), samples(config.ms_after), samples(config.sweep_ms)
    spans = Spans(
        n_before=n_before,
        sweep=sweep,
        # A spike hidden by a larger one comes out when that one is found. 0.5 ms would cost up to 0.006 of accuracy.
        look_back=max(samples(1.0), 2 * sweep),
        refractory=samples(config.refractory_ms),
        overlap=samples(0.5),
        apart=samples(0.33),  # from a spike that is two: more has been tried and finds no more
        n_whole=n_before + max(samples(config.ms_tail), n_after + 1),
        patience=n_before + n_after,
        rounds=config.rounds,
        tolerance=np.float32(config.tolerance),
    )
    return n_before, n_after, spans
