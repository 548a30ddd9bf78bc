"""Snippets that a session keeps of its units, as an encoder is tuned to them.

In comes SESSION/reservoir.npz (`snippets` in noise units at the stream's rate, `unit_id`, `channel`, `sample_index`, row by row);
out come groups, the spikes of one unit that peak on one channel, with a fifth of each held out, and views: a spike of a group made
worse, as the next ones may be. What makes it worse is the session's own: residuals of its spikes are the noise, mean spikes of its
other units collide.
"""

import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.encode import Encoder
from streamsort.errors import StreamsortError
from streamsort.session import Session

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

RESERVOIR = "reservoir.npz"
MIN_SPIKES = 10  # of a group: fewer give no mean to hold a spike against
MIN_UNITS = 2
MOST_SPIKES = 8192  # of all groups: a full encoder takes 1.5 ms for each on a core
HELD_OUT = 0.2
_COLUMNS = ("snippets", "unit_id", "channel", "sample_index")


@dataclass(frozen=True)
class Wear:
    """How a view is made worse than its spike.

    Attributes
    ----------
    amplitude : float
        Standard deviation of the relative size.
    noise : float
        The most that is added of another spike's residual.
    jitter : float
        The most samples by which it is shifted, both ways.
    collision : float
        Chance that another unit's mean spike lies on top.
    """

    amplitude: float = 0.08
    noise: float = 0.8
    jitter: float = 0.3
    collision: float = 0.3


@dataclass(frozen=True)
class SessionSnippets:
    """The groups of a session.

    Attributes
    ----------
    snippets : ndarray, shape (n, n_samples, n_neighbors), float32
        Noise units, at the encoder's rate and length.
    group : ndarray, shape (n,), int64
        Group of each snippet.
    held_out : ndarray, shape (n,), bool
        Snippets that nothing is learned from.
    unit, channel : ndarray, shape (n_groups,), int64
        What a group is of.
    template : ndarray, shape (n_groups, n_samples, n_neighbors), float32
        Mean of the snippets that are not held out.
    neighbors : ndarray, shape (n_channels, n_neighbors), int32
        Channels of a snippet's columns, -1 where there is none.
    """

    snippets: Floats
    group: Ints
    held_out: NDArray[np.bool_]
    unit: Ints
    channel: Ints
    template: Floats
    neighbors: NDArray[np.int32]

    @property
    def n_units(self) -> int:
        return len(np.unique(self.unit))

    def rivals(self) -> NDArray[np.bool_]:
        """Tell which groups a spike could be taken for: (n_groups, n_groups), those on the same channel or a neighbouring one."""
        near: NDArray[np.bool_] = (self.neighbors[self.channel][:, :, None] == self.channel).any(axis=1)
        return near

    def same_unit(self) -> NDArray[np.bool_]:
        """Tell which groups are of one unit: (n_groups, n_groups)."""
        same: NDArray[np.bool_] = self.unit[:, None] == self.unit
        return same


def read_snippets(session: Session, encoder: Encoder, seed: int) -> SessionSnippets:
    """Read the reservoir of a session and hold out a fifth of each group.

    Parameters
    ----------
    session : Session
    encoder : Encoder
        At the session's sampling frequency: snippets are resampled as it does.
    seed : int
        Of what is held out.

    Raises
    ------
    StreamsortError
        If there is no reservoir, it is broken or of another shape than the encoder takes, or it holds too few spikes or units.
    """
    table = _read(session)
    length = encoder.n_before + encoder.n_after
    expected = (length, encoder.contract.n_neighbors)
    if table["snippets"].shape[1:] != expected:
        raise StreamsortError(
            f"session {session.path}: snippets are {table['snippets'].shape[1:]} (samples, channels), "
            f"expected {expected} as encoder {encoder.name} takes at {encoder.sampling_frequency:g} Hz"
        )
    rows, group, unit, channel = _groups(table)
    if (n_units := len(np.unique(unit))) < MIN_UNITS:
        raise StreamsortError(
            f"session {session.path}: {n_units} units with {MIN_SPIKES} or more recent spikes on a channel, expected {MIN_UNITS}"
        )
    snippets = encoder.at_models_rate(table["snippets"][rows].astype(np.float32))
    held_out = _hold_out(group, np.random.default_rng((seed, 0)))
    template = np.stack([snippets[(group == k) & ~held_out].mean(axis=0) for k in range(len(unit))])
    config = session.manifest["config"]["snippets"]
    neighbors = session.probe.neighbors(config["radius_um"], config["n_neighbors"])
    return SessionSnippets(snippets, group, held_out, unit, channel, template, neighbors)


def _read(session: Session) -> dict[str, NDArray[Any]]:
    path = session.path / RESERVOIR
    try:
        with open(path, "rb") as file, np.load(file) as columns:
            table = {name: columns[name] for name in _COLUMNS}
    except FileNotFoundError:
        raise StreamsortError(f"session {session.path}: no {RESERVOIR} in it, expected a run that has calibrated") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise StreamsortError(f"session {session.path}: {RESERVOIR} cannot be read ({error})") from None
    lengths = {name: len(column) for name, column in table.items()}
    if table["snippets"].ndim != 3 or len(set(lengths.values())) != 1:
        raise StreamsortError(f"session {session.path}: {RESERVOIR} has rows {lengths}, expected as many of each")
    return table


def _groups(table: dict[str, NDArray[Any]]) -> tuple[NDArray[np.intp], Ints, Ints, Ints]:
    """Choose the rows to use, the newest of each group; return them, the group of each, and the unit and channel of each group."""
    pairs = np.column_stack([table["unit_id"], table["channel"]]).astype(np.int64)
    named, group, counts = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    enough = np.flatnonzero((counts >= MIN_SPIKES) & (named[:, 0] >= 0))
    most = max(MOST_SPIKES // max(len(enough), 1), MIN_SPIKES)
    newest = np.argsort(table["sample_index"], kind="stable")
    rows = [newest[group.reshape(-1)[newest] == k][-most:] for k in enough]
    which = np.repeat(np.arange(len(enough)), [len(mine) for mine in rows])
    return np.concatenate([np.zeros(0, np.intp), *rows]), which, named[enough, 0], named[enough, 1]


def _hold_out(group: Ints, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Choose a fifth of each group, at least two."""
    held_out = np.zeros(len(group), np.bool_)
    for k in range(group.max() + 1):
        members = np.flatnonzero(group == k)
        held_out[rng.choice(members, max(round(HELD_OUT * len(members)), 2), replace=False)] = True
    return held_out


class Views:
    """Draw views of the spikes that are not held out; the same seed gives the same views.

    Parameters
    ----------
    data : SessionSnippets
    wear : Wear
    """

    def __init__(self, data: SessionSnippets, wear: Wear) -> None:
        self._data, self._wear = data, wear
        learned = np.flatnonzero(~data.held_out)
        order = learned[np.argsort(data.group[learned], kind="stable")]
        self._rows = np.split(order, np.cumsum(np.bincount(data.group[order]))[:-1])
        self._on_channel = {int(c): order[data.channel[data.group[order]] == c] for c in np.unique(data.channel)}
        near = data.rivals() & ~data.same_unit()
        self._colliders = [np.flatnonzero(row) for row in near]

    def draw_pairs(self, rng: np.random.Generator, groups: Ints) -> tuple[Floats, Floats]:
        """Draw two different spikes of each group, both made worse."""
        pairs = np.stack([rng.choice(self._rows[k], 2, replace=False) for k in groups])
        return self.worn(rng, pairs[:, 0]), self.worn(rng, pairs[:, 1])

    def draw_rows(self, rng: np.random.Generator, groups: Ints) -> NDArray[np.intp]:
        """Draw a spike of each group, as a row of the session's snippets."""
        return np.array([rng.choice(self._rows[k]) for k in groups], np.intp)

    def worn(self, rng: np.random.Generator, rows: NDArray[np.intp]) -> Floats:
        """Make the snippets of these rows worse: (n, n_samples, n_neighbors)."""
        data, wear, n = self._data, self._wear, len(rows)
        views = _shifted(data.snippets[rows], rng.uniform(-wear.jitter, wear.jitter, n).astype(np.float32))
        views *= np.exp(rng.normal(0.0, wear.amplitude, n)).astype(np.float32)[:, None, None]
        other = np.array([rng.choice(self._on_channel[int(c)]) for c in data.channel[data.group[rows]]])
        residual = data.snippets[other] - data.template[data.group[other]]
        views += residual * rng.uniform(0.0, wear.noise, n).astype(np.float32)[:, None, None]
        return views + self._collisions(rng, data.group[rows])

    def _collisions(self, rng: np.random.Generator, groups: Ints) -> Floats:
        """Take mean spikes of rivals, shifted; close to the trough never so large that it would have been found elsewhere."""
        data = self._data
        n_samples = data.snippets.shape[1]
        added = np.zeros((len(groups), *data.snippets.shape[1:]), np.float32)
        hit = np.flatnonzero((rng.random(len(groups)) < self._wear.collision) & [len(self._colliders[k]) > 0 for k in groups])
        if not len(hit):
            return added
        own = groups[hit]
        other = np.array([rng.choice(self._colliders[k]) for k in own])
        lag = rng.integers(n_samples // 12, n_samples - n_samples // 8, len(hit)) * rng.choice([-1, 1], len(hit))
        seen = self._seen_from(own, other)
        height, most = np.abs(seen[:, :, 0]).max(axis=1), 0.7 * np.abs(data.template[own, :, 0]).max(axis=1)
        size = rng.uniform(0.6, 1.1, len(hit))
        near = np.abs(lag) < n_samples // 5
        size = np.where(near, np.minimum(size, most / np.maximum(height, 1e-6)), size).astype(np.float32)
        row = np.arange(n_samples) - lag[:, None]
        inside = (row >= 0) & (row < n_samples)
        shifted = np.take_along_axis(seen, np.clip(row, 0, n_samples - 1)[..., None], axis=1)
        added[hit] = shifted * (inside * size[:, None])[..., None]
        return added

    def _seen_from(self, own: Ints, other: Ints) -> Floats:
        """Bring the templates of `other` into the order of channels that snippets of `own` have; silent where they do not reach."""
        data = self._data
        ours, theirs = data.neighbors[data.channel[own]], data.neighbors[data.channel[other]]
        match = (ours[:, :, None] == theirs[:, None, :]) & (ours >= 0)[:, :, None]
        seen: Floats = data.template[other] @ match.transpose(0, 2, 1).astype(np.float32)
        return seen


def _shifted(snippets: Floats, shift: Floats) -> Floats:
    """Move snippets by a part of a sample, linearly between neighbours."""
    ahead = np.concatenate([snippets[:, 1:], snippets[:, -1:]], axis=1)
    behind = np.concatenate([snippets[:, :1], snippets[:, :-1]], axis=1)
    towards = np.where(shift[:, None, None] > 0, ahead, behind)
    moved: Floats = (snippets + np.abs(shift)[:, None, None] * (towards - snippets)).astype(np.float32)
    return moved
