"""The online prototypes: which unit a spike belongs to, and how units move, appear and come back.

State is one store of prototypes. A unit has one prototype on each channel where its spikes peak, so a unit between two contacts, or
one that drifts from one to the next, keeps one identity. `predict` only reads; `learn` runs at fixed multiples of sample_index, so
that any chunking gives the same units. Learning does two things: prototypes follow the spikes they were given, and spikes that
fitted none are kept per channel until they form a compact group; such a group either carries a known unit's template (the unit
moved here) or opens a new unit. What hugs the threshold becomes a reject prototype, which attracts noise and names nothing.
"""

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.calibrate import Calibration, split_by_valleys, template_mismatch
from streamsort.config import ClusterConfig
from streamsort.kernels.cluster import assign_nearest, follow, rotate_rows
from streamsort.records import UNSORTED

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_RECENT_SPIKES = 64  # remembered per unit, to know its usual rate
_MOST_ON_CHANNEL = 6  # prototypes of one unit; and of all that is rejected
_COLUMNS = ("serial", "channel", "unit", "n_spikes", "last_sample", "log_weight", "mean", "spread", "template")
_MOVED = 4.0  # so many times the usual difference of templates is forgiven to a unit that fell silent


@dataclass(frozen=True)
class Assignment:
    """What `predict` says of each peak.

    Attributes
    ----------
    unit : ndarray, shape (n_peaks,), int64
        Unit id, -1 when the peak fits no unit.
    prototype : ndarray, shape (n_peaks,), int64
        Row of the store, -1 for an outlier.
    white : ndarray, shape (n_peaks, n_dims), float32
        Whitened embeddings.
    distance : ndarray, shape (n_peaks,), float32
        Squared distance to the nearest prototype over its spread; about n_dims for a typical member, infinite without a candidate.
    confidence : ndarray, shape (n_peaks,), float32
        Posterior of the unit among the candidates; 0 for unit -1.
    """

    unit: Ints
    prototype: Ints
    white: Floats
    distance: Floats
    confidence: Floats

    @classmethod
    def join(cls, parts: Sequence["Assignment"]) -> "Assignment":
        """Put several one after the other."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def take(self, rows: slice | NDArray[Any]) -> "Assignment":
        """Return some of the rows."""
        return Assignment(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class Newcomer:
    """A compact group of spikes that fitted no prototype; `unit` is the known unit whose template it has, or -1.

    `sample_index` (n_spikes,) is in order; the other fields are as in `Calibration`.
    """

    channel: int
    unit: int
    sample_index: Ints
    mean: Floats
    spread: float
    template: Floats

    @property
    def n_spikes(self) -> int:
        return len(self.sample_index)


@dataclass(frozen=True)
class Space:
    """The way from the space that prototypes are in to another encoder's, as found on spikes embedded by both.

    A prototype at whitened `x` goes to `x @ linear + shift` plus its own `offset`, what its own spikes showed the map to miss; one
    that is not named, being younger than the comparison, goes where the map says. So nothing that was learned meanwhile is lost.

    Attributes
    ----------
    whitening : ndarray, shape (n_dims, n_dims), float32
        Of the other encoder's embeddings.
    linear : ndarray, shape (n_dims_here, n_dims), float32
    shift : ndarray, shape (n_dims,), float32
    serial : ndarray, shape (n_named,), int64
        Rising serial numbers of the prototypes that the two next are for.
    offset : ndarray, shape (n_named, n_dims), float32
    spread : ndarray, shape (n_named,), float32
        What they have there; the others keep theirs.
    """

    whitening: Floats
    linear: Floats
    shift: Floats
    serial: Ints
    offset: Floats
    spread: Floats


class Prototypes:
    """Hold the prototypes and keep them up to date.

    Attributes
    ----------
    serial : ndarray, shape (n_prototypes,), int64
        A number for each prototype that no other one will ever have, unlike its row.

    Parameters
    ----------
    calibration : Calibration
        Its units are named by `unit_ids`.
    unit_ids : sequence of int
        Published id of each calibrated unit.
    neighbors : ndarray, shape (n_channels, n_neighbors), int32
        Channels of a snippet's columns.
    detect_threshold : float
        In noise units.
    config : ClusterConfig
    seed : int
        Of the k-means starts of discovery.
    """

    def __init__(
        self,
        calibration: Calibration,
        unit_ids: list[int],
        neighbors: NDArray[np.int32],
        detect_threshold: float,
        config: ClusterConfig,
        seed: int = 0,
    ) -> None:
        self.whitening = calibration.whitening
        self.neighbors = neighbors
        self._config = config
        self._rng = np.random.default_rng(seed)
        self._min_height = detect_threshold + config.noise_excess / detect_threshold
        ids = np.array([*unit_ids, UNSORTED], np.int64)
        self.channel: Ints = calibration.channel.copy()
        self.unit: Ints = ids[calibration.unit]
        self.n_spikes: Ints = calibration.n_spikes.copy()
        # Weights stay those of calibration: a weight that grows with each spike it won feeds itself.
        self.log_weight: Floats = np.log(np.maximum(calibration.n_spikes, 1)).astype(np.float32)
        self.mean: Floats = calibration.mean.copy()
        self.spread: Floats = calibration.spread.copy()
        self.template: Floats = calibration.template.copy()
        self.last_sample: Ints = np.zeros(len(self.unit), np.int64)
        self.serial: Ints = np.arange(len(self.unit))
        self._pending: dict[int, list[tuple[int, Floats, Floats]]] = {}
        self._fired: dict[int, deque[int]] = {}
        self._index()

    def __len__(self) -> int:
        return len(self.unit)

    def predict(self, embeddings: Floats, channel: NDArray[Any]) -> Assignment:
        """Assign each embedding to the most probable prototype on its channel, or to none.

        Parameters
        ----------
        embeddings : ndarray, shape (n_peaks, n_dims), float32
        channel : ndarray, shape (n_peaks,), integer
            Peak channel of each.
        """
        white = np.empty((len(embeddings), self.whitening.shape[1]), np.float32)
        rotate_rows(embeddings, self.whitening, white)
        return self.predict_white(white, channel)

    def predict_white(self, white: Floats, channel: NDArray[Any]) -> Assignment:
        """Do as `predict` does, with embeddings that are whitened already."""
        n, n_dims = white.shape
        prototype = np.empty(n, np.int64)
        distance, confidence = np.empty(n, np.float32), np.empty(n, np.float32)
        assign_nearest(
            white, channel.astype(np.int64), self._table, self.mean, self._scale, self.log_weight, self.unit, self._scores,
            prototype, distance, confidence,
        )  # fmt: skip
        prototype[distance > self._config.outlier * n_dims] = UNSORTED
        unit = np.where(prototype >= 0, self.unit[prototype], UNSORTED) if len(self) else prototype.copy()
        confidence[unit < 0] = 0
        return Assignment(unit, prototype, white, distance, confidence)

    def learn(self, assignment: Assignment, peaks: NDArray[Any], snippets: Floats) -> None:
        """Let prototypes follow their clear spikes and remember the spikes that fitted none.

        Parameters
        ----------
        assignment : Assignment
        peaks : ndarray, shape (n_peaks,), PEAK_DTYPE
        snippets : ndarray, shape (n_peaks, n_snippet_samples, n_neighbors), float32
            In noise units.
        """
        clear = self._near(assignment) & (assignment.confidence > 0.9)
        teacher = np.where(clear, assignment.prototype, UNSORTED)
        follow(assignment.white, snippets, teacher, self._config.slowest, self.n_spikes, self.mean, self.spread, self.template)
        np.maximum.at(self.last_sample, teacher[clear], peaks["sample_index"][clear])
        for unit_id, sample_index in zip(assignment.unit.tolist(), peaks["sample_index"].tolist(), strict=True):
            if unit_id != UNSORTED:
                self._fired.setdefault(unit_id, deque(maxlen=_RECENT_SPIKES)).append(sample_index)
        for i in np.flatnonzero(assignment.distance > self._config.strange * self.mean.shape[1]):
            waiting = self._pending.setdefault(int(peaks["channel"][i]), [])
            waiting.append((int(peaks["sample_index"][i]), assignment.white[i].copy(), snippets[i].copy()))
        self._bound_scale()

    def surely(self, assignment: Assignment) -> Ints:
        """Return the serial number of the prototype each peak surely belongs to, -1 for none; reject prototypes have theirs too."""
        sure = self._near(assignment) & ((assignment.confidence > 0.9) | (assignment.unit < 0)) & (assignment.prototype >= 0)
        return np.where(sure, self.serial[assignment.prototype], -1) if len(self) else assignment.prototype

    def copy(self) -> "Prototypes":
        """Return the prototypes as they are now; what was not yet made a group, and who fired when, stays behind."""
        twin = copy.copy(self)
        for name in _COLUMNS:
            setattr(twin, name, getattr(self, name).copy())
        twin._pending, twin._fired = {}, {}
        twin._index()
        return twin

    def in_space(self, space: Space) -> "Prototypes":
        """Return the same prototypes in another encoder's space.

        Strangers are forgotten, not mapped: they lie far from all that the map was found on. A unit that was about to be born, or
        seen to have moved, shows itself again.
        """
        twin = self.copy()
        row, place = np.nonzero(self.serial[:, None] == space.serial)
        twin.whitening, twin.mean = space.whitening, self.mean @ space.linear + space.shift
        twin.mean[row] += space.offset[place]
        twin.spread[row] = space.spread[place]
        twin._fired = self._fired
        twin._index()
        return twin

    def discover(self, oldest_sample: int) -> Iterator[Newcomer]:
        """Look for compact groups among the spikes remembered since `oldest_sample`; the groups found are taken out.

        What the caller adds between two steps is known at the next, so a unit that appears on two channels at once is one.
        """
        for channel in sorted(self._pending):
            recent = [item for item in self._pending[channel] if item[0] >= oldest_sample]
            self._pending[channel] = waiting = recent[-8 * self._config.birth_spikes :]
            if len(waiting) >= self._config.birth_spikes:
                # Looked at once: half of them go, so that the next look has mostly new ones; all go when a group is found.
                self._pending[channel] = waiting[len(waiting) // 2 :]
                for newcomer in self._groups(channel, waiting):
                    self._pending[channel] = []
                    yield newcomer

    def add(self, newcomer: Newcomer, unit_id: int) -> None:
        """Store a prototype for `unit_id` (-1: a reject prototype).

        On one channel a unit has a few at the most; then the one that was longest without a spike is replaced.
        """
        rows = np.flatnonzero((self.unit == unit_id) & (self.channel == newcomer.channel))
        if len(rows) < _MOST_ON_CHANNEL:
            for name in _COLUMNS:
                column = getattr(self, name)
                setattr(self, name, np.concatenate([column, np.zeros((1, *column.shape[1:]), column.dtype)]))
            row = len(self) - 1
        else:
            row = int(rows[np.argmin(self.last_sample[rows])])
        self.serial[row] = self.serial.max(initial=-1) + 1
        self.channel[row], self.unit[row], self.n_spikes[row] = newcomer.channel, unit_id, newcomer.n_spikes
        self.mean[row], self.spread[row], self.template[row] = newcomer.mean, newcomer.spread, newcomer.template
        self.log_weight[row], self.last_sample[row] = np.log(newcomer.n_spikes), newcomer.sample_index[-1]
        self._index()

    def skip_gap(self) -> None:
        """Forget who fired when: after a gap, silence says nothing."""
        self._fired.clear()

    def is_noise(self, newcomer: Newcomer) -> bool:
        """Tell whether a group hugs the detection threshold, as noise does."""
        return bool(np.abs(newcomer.template[:, 0]).max() < self._min_height)

    def home(self, unit_id: int) -> int:
        """Return the row of a unit's largest prototype."""
        rows = np.flatnonzero(self.unit == unit_id)
        return int(rows[np.argmax(self.n_spikes[rows])])

    def _index(self) -> None:
        """Derive from the rows what `predict` reads: the candidates of each channel, and their scales."""
        n_channels = len(self.neighbors)
        order = np.argsort(self.channel, kind="stable")
        counts = np.bincount(self.channel, minlength=n_channels)
        width = max(int(counts.max(initial=0)), 1)
        self._table = np.full((n_channels, width), -1, np.int32)
        column = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._table[self.channel[order], column] = order
        self._scores = np.empty(width, np.float32)
        self._bound_scale()

    def _bound_scale(self) -> None:
        # Echoes are spread wide; as wide a prototype of them would swallow a unit that moves there.
        self._scale = np.clip(self.spread, 0.5, np.where(self.unit < 0, 1.0, 3.0)).astype(np.float32)

    def _near(self, assignment: Assignment) -> NDArray[np.bool_]:
        near: NDArray[np.bool_] = assignment.distance < self._config.clear * self.mean.shape[1]
        return near

    def _groups(self, channel: int, waiting: list[tuple[int, Floats, Floats]]) -> Iterator[Newcomer]:
        white = np.array([item[1] for item in waiting])
        snippets = np.array([item[2] for item in waiting])
        label = split_by_valleys(white, self._config, self._rng)
        for k in range(int(label.max()) + 1):
            x = white[label == k]
            mean = x.mean(axis=0)
            spread = float(np.mean((x - mean) ** 2))
            if len(x) >= self._config.birth_spikes and spread < self._config.compact:
                template = snippets[label == k].mean(axis=0)
                times = np.array([item[0] for item in waiting])[label == k]
                owner = self._whose(channel, template, len(x), int(times[0]), int(times[-1]))
                yield Newcomer(channel, owner, times, mean, spread, template)

    def _whose(self, channel: int, template: Floats, n_spikes: int, first_sample: int, last_sample: int) -> int:
        """Name the unit whose template this is, or -1; more difference is forgiven to one that fell silent meanwhile: it moved."""
        best, owner = 1.0, UNSORTED
        for row in np.flatnonzero((self.unit >= 0) & np.isin(self.channel, self.neighbors[channel])):
            unit_id = int(self.unit[row])
            noise = 1 / n_spikes + 1 / min(int(self.n_spikes[row]), int(1 / self._config.slowest))
            neighbors = self.neighbors[self.channel[row]]
            mismatch = template_mismatch(template, self.template[row], self.neighbors[channel], neighbors, noise)
            if self._fell_silent(unit_id, first_sample, last_sample):
                mismatch /= _MOVED
            if mismatch < best:
                best, owner = mismatch, unit_id
        return owner

    def _fell_silent(self, unit_id: int, first_sample: int, last_sample: int) -> bool:
        """Tell whether a unit fired less than a third of its usual while the strangers did."""
        fired = np.array(self._fired.get(unit_id, ()), np.int64)
        before = fired[fired < first_sample]
        if len(before) < _RECENT_SPIKES // 4:
            return False
        expected = len(before) / max(before[-1] - before[0], 1) * (last_sample - first_sample)
        return bool(expected >= _RECENT_SPIKES // 8 and (fired >= first_sample).sum() < expected / 3)
