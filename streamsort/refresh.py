"""Whether another encoder may take over a running stream, and how the units come with it.

In come a candidate encoder and a snapshot of the sorter at a learning boundary; out comes a verdict. The units are carried over
spike by spike: what the memory holds of each prototype is embedded by the candidate, and compared with what the old encoder made
of the same spikes. A linear map takes the old space to the new one; each prototype is corrected by what its own spikes show the map
to miss. Unit ids, templates and weights know of no encoder and stay. Then both encoders name the same recent peaks.

Agreement is the share of those peaks, of all that either encoder sorts, which both give to one unit: a spike that one of them
leaves unsorted is a disagreement, noise that both leave is none. The same is asked of each unit with enough spikes; where a unit
fired too little for that, the spikes that the memory holds of it count too. Nothing here knows of threads or of a clock.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.cluster import Prototypes, Space
from streamsort.config import RefreshConfig
from streamsort.encode import Encoder
from streamsort.reservoir import Member, Period

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

ENOUGH_SPIKES = 200  # to speak of 98 %
_ENOUGH_OF_UNIT = 20  # with fewer the share of a unit says little, and counts in the whole only
_SLICE = 30  # members whose scatter is taken together: over more of them a unit may have drifted
_EMBEDDED_AT_ONCE = 4  # between two looks whether it is still wanted, where a thread may rest: about a millisecond


class Abandoned(Exception):  # noqa: N818 - nothing went wrong
    """A comparison was given up because nobody waits for it any more."""


@dataclass(frozen=True)
class Snapshot:
    """A sorter's units and memory as they were at one learning boundary; shares nothing that changes.

    Attributes
    ----------
    sample_index : int
        The boundary.
    encoder : Encoder
        In force then; not to be called while the sorter may use it.
    prototypes : Prototypes
    members : dict of tuple of Member
        By serial number of the prototype.
    periods : tuple of Period
        The last seconds, in this encoder's space.
    """

    sample_index: int
    encoder: Encoder
    prototypes: Prototypes
    members: dict[int, tuple[Member, ...]]
    periods: tuple[Period, ...]

    @property
    def n_sorted(self) -> int:
        """Count the recent peaks that have a unit; a comparison needs `ENOUGH_SPIKES`."""
        return sum(int((period.unit >= 0).sum()) for period in self.periods)


@dataclass(frozen=True)
class Agreement:
    """How far two encoders gave the same names; `by_unit` leaves out units with too few spikes.

    Examples
    --------
    >>> found = Agreement.of(np.array([1, 1, 2, -1, -1]), np.array([1, -1, 2, 2, -1]), few=1)
    >>> found.overall, found.by_unit
    (0.5, {1: 0.5, 2: 0.5})
    """

    overall: float
    n_spikes: int
    by_unit: dict[int, float]
    n_of_unit: dict[int, int] = field(repr=False)

    @classmethod
    def of(cls, before: Ints, after: Ints, extra: tuple[Ints, Ints] | None = None, few: int = _ENOUGH_OF_UNIT) -> "Agreement":
        """Compare unit ids row by row; `extra` are more of them, heard only for units that have fewer than `few` without."""
        n_spikes = int(((before >= 0) | (after >= 0)).sum())
        shares = {int(name): _share(before, after, name) for name in np.unique([before, after]) if name >= 0}
        if extra is not None:
            more = np.concatenate([before, extra[0]]), np.concatenate([after, extra[1]])
            rare = [name for name in np.unique(extra).tolist() if name >= 0 and shares.get(name, (0.0, 0))[1] < few]
            shares |= {name: _share(*more, name) for name in rare}
        judged = {name: share for name, share in sorted(shares.items()) if share[1] >= few}
        same = int(((before == after) & (before >= 0)).sum())
        return cls(
            round(same / max(n_spikes, 1), 4),
            n_spikes,
            {name: round(share, 4) for name, (share, _) in judged.items()},
            {name: n for name, (_, n) in judged.items()},
        )

    def shortfall(self, config: RefreshConfig, n_errors: float = 0.0) -> str:
        """Say what is below its gate, by more than so many standard errors; nothing if nothing is."""

        def best(share: float, n: int) -> float:
            return share + n_errors * float(np.sqrt(share * (1 - share) / max(n, 1)))

        if best(self.overall, self.n_spikes) < config.agreement:
            return f"agreement {self.overall:.3f} over {self.n_spikes} spikes, expected {config.agreement:g}"
        worst = min(self.by_unit, key=lambda name: best(self.by_unit[name], self.n_of_unit[name]), default=None)
        if worst is not None and best(self.by_unit[worst], self.n_of_unit[worst]) < config.unit_agreement:
            n = self.n_of_unit[worst]
            return f"agreement {self.by_unit[worst]:.3f} on unit {worst} over {n} spikes, expected {config.unit_agreement:g}"
        return ""


def _share(before: Ints, after: Ints, name: int) -> tuple[float, int]:
    one, other = before == name, after == name
    n = int((one | other).sum())
    return int((one & other).sum()) / max(n, 1), n


@dataclass(frozen=True)
class Verdict:
    """What became of an offer; with a `space` it is accepted, and says how to get there.

    Attributes
    ----------
    name, sha256 : str
        The encoder that was offered.
    reason : str
        Why it was refused, or that it was accepted.
    agreement : Agreement, optional
        With the encoder in force, if it came to that.
    separation : float, optional
        How far apart units stand, over how far they stood.
    space, back : Space, optional
        To the encoder's space, and from there to the one in force.
    members : dict of tuple of Member
        The memory in the new space.
    """

    name: str
    sha256: str
    reason: str
    agreement: Agreement | None = None
    separation: float | None = None
    space: Space | None = None
    back: Space | None = None
    members: dict[int, tuple[Member, ...]] = field(default_factory=dict, repr=False)

    @property
    def ok(self) -> bool:
        return self.space is not None

    def figures(self) -> dict[str, Any]:
        """Return what the ledger tells of it, beside the reason."""
        agreement = self.agreement
        return {
            "offered": self.name,
            "agreement": None if agreement is None else agreement.overall,
            "agreement_by_unit": {} if agreement is None else agreement.by_unit,
            "separation": self.separation,
        }


def prepare(encoder: Encoder, snapshot: Snapshot, config: RefreshConfig, stopped: Callable[[], bool] = lambda: False) -> Verdict:
    """Find the units of a snapshot in another encoder's space, and judge whether it sorts as the one in force does.

    Parameters
    ----------
    encoder : Encoder
        The candidate; fit for the stream's snippets.
    snapshot : Snapshot
        Of the sorter that is to use it.
    config : RefreshConfig
    stopped : callable, optional
        Asked now and then; true makes an end.

    Raises
    ------
    Abandoned
        If `stopped` said so.
    """
    refused = Verdict(encoder.name, encoder.sha256, "")
    if snapshot.n_sorted < ENOUGH_SPIKES:
        return replace(refused, reason=f"{snapshot.n_sorted} recent spikes to compare on, expected {ENOUGH_SPIKES}")
    serials = sorted(snapshot.members)
    kept = [snapshot.members[serial] for serial in serials]
    serial = np.repeat(np.array(serials, np.int64), [len(members) for members in kept])
    old = np.concatenate([np.stack([member.white for member in members]) for members in kept])
    new = np.concatenate([embed(encoder, np.stack([m.snippet for m in members]), stopped) for members in kept])
    recent_new = np.concatenate([embed(encoder, period.snippets, stopped) for period in snapshot.periods])
    if not (np.isfinite(new).all() and np.isfinite(recent_new).all()):
        return replace(refused, reason="its embeddings are not finite")
    whitening = _whitening(serial, old, new)
    white = new @ whitening
    recent_old = np.concatenate([period.white for period in snapshot.periods])
    recent_white = recent_new @ whitening
    linear, shift = fit_map(np.concatenate([old, recent_old]), np.concatenate([white, recent_white]))
    offset, spread = _corrections(snapshot.prototypes, serial, old, white, linear, shift)
    space = Space(whitening, linear, shift, np.array(serials, np.int64), offset, spread)
    agreement = _compare(snapshot, space, serial, (old, recent_old), (new, recent_new))
    separation = _separation(snapshot.prototypes, space, serial, old, white)
    short = agreement.shortfall(config)
    if not short and separation < config.separation:
        short = f"units stand {separation:.2f} times as far apart as before, expected {config.separation:g}"
    if short:
        return replace(refused, reason=short, agreement=agreement, separation=separation)
    edges = np.cumsum([len(members) for members in kept])[:-1]
    moved = {
        name: tuple(member._replace(white=row) for member, row in zip(members, rows, strict=True))
        for name, members, rows in zip(serials, kept, np.split(white, edges), strict=True)
    }
    back = _way_back(snapshot.prototypes, space, fit_map(np.concatenate([white, recent_white]), np.concatenate([old, recent_old])))
    return Verdict(encoder.name, encoder.sha256, "accepted", agreement, separation, space, back, moved)


def embed(encoder: Encoder, snippets: Floats, stopped: Callable[[], bool]) -> Floats:
    """Embed snippets that are in noise units already."""
    noise_level = np.ones((len(snippets), snippets.shape[2]), np.float32)
    parts = [np.empty((0, encoder.n_dims), np.float32)]
    for start in range(0, len(snippets), _EMBEDDED_AT_ONCE):
        if stopped():
            raise Abandoned
        part = slice(start, start + _EMBEDDED_AT_ONCE)
        parts.append(encoder(snippets[part], noise_level[part]))
    return np.concatenate(parts)


def _whitening(serial: Ints, old: Floats, new: Floats) -> Floats:
    """Whiten embeddings as calibration did, with the scatter of members within their prototype.

    Members are few, and the old space was whitened with many: what the new scatter has in common with the old, found by regression
    within slices, is taken from there, and only the rest from the members.
    """
    nth = np.arange(len(serial)) - np.searchsorted(serial, serial)
    starts = np.flatnonzero(nth % _SLICE == 0)
    x, y = _around_mean(old, starts), _around_mean(new, starts)
    common, _ = fit_map(x, y)
    rest = (y - x @ common).astype(np.float64)
    covariance = common.T.astype(np.float64) @ common + rest.T @ rest / max(len(rest) - len(starts), 1)
    values, vectors = np.linalg.eigh(covariance)
    whitening: Floats = (vectors / np.sqrt(np.maximum(values, 1e-6 * values[-1] + 1e-12))).astype(np.float32)
    return whitening


def _around_mean(x: Floats, starts: Ints) -> Floats:
    """Take its own mean off each stretch of rows."""
    counts = np.diff(starts, append=len(x))
    mean = np.add.reduceat(x, starts, axis=0) / counts[:, None]
    centred: Floats = (x - np.repeat(mean, counts, axis=0)).astype(np.float32)
    return centred


def fit_map(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Map x to y linearly by least squares, with the weight of one spike against large coefficients."""
    mean_x, mean_y = x.mean(axis=0, dtype=np.float64), y.mean(axis=0, dtype=np.float64)
    centred = x - mean_x
    linear = np.linalg.solve(centred.T @ centred + np.eye(x.shape[1]), centred.T @ (y - mean_y))
    return linear.astype(np.float32), (mean_y - mean_x @ linear).astype(np.float32)


def _corrections(
    prototypes: Prototypes, serial: Ints, old: Floats, white: Floats, linear: Floats, shift: Floats
) -> tuple[Floats, Floats]:
    """Find for each prototype with members what the map misses, and its spread in the new space."""
    names = np.unique(serial)
    offset, spread = np.zeros((len(names), white.shape[1]), np.float32), np.ones(len(names), np.float32)
    row_of = {name: row for row, name in enumerate(prototypes.serial.tolist())}
    for k, name in enumerate(names.tolist()):
        mine, row = serial == name, row_of[name]
        mean = prototypes.mean[row]
        missed = white[mine] - (old[mine] @ linear + shift)
        offset[k] = missed.sum(axis=0) / (len(missed) + 1)  # as if one more had shown nothing: a single spike proves little
        there = mean @ linear + shift + offset[k]
        # One typical member more on both sides, for the same reason.
        wide, was = ((white[mine] - there) ** 2).mean(axis=1).sum() + 1, ((old[mine] - mean) ** 2).mean(axis=1).sum() + 1
        spread[k] = prototypes.spread[row] * wide / was
    return offset, spread


def _way_back(here: Prototypes, space: Space, fitted: tuple[Floats, Floats]) -> Space:
    """Return from a space so that each prototype comes to lie where it was."""
    (linear, shift), there = fitted, here.in_space(space)
    order = np.argsort(here.serial)
    offset = (here.mean - (there.mean @ linear + shift))[order]
    return Space(here.whitening, linear, shift, here.serial[order], offset, here.spread[order])


def _compare(snapshot: Snapshot, space: Space, serial: Ints, old: tuple[Floats, Floats], new: tuple[Floats, Floats]) -> Agreement:
    """Let both name the members and the recent peaks, each with its prototypes as they were at the snapshot."""
    here, there = snapshot.prototypes, snapshot.prototypes.in_space(space)
    channel_of = dict(zip(here.serial.tolist(), here.channel.tolist(), strict=True))
    of_members = np.array([channel_of[name] for name in serial.tolist()])
    recent = np.concatenate([period.peaks["channel"] for period in snapshot.periods])
    before = [here.predict_white(white, channel).unit for white, channel in zip(old, (of_members, recent), strict=True)]
    after = [there.predict(raw, channel).unit for raw, channel in zip(new, (of_members, recent), strict=True)]
    return Agreement.of(before[1], after[1], extra=(before[0], after[0]))


def _separation(here: Prototypes, space: Space, serial: Ints, old: Floats, new: Floats) -> float:
    """Return how far members lie from the nearest prototype of another unit, in spreads of their own, over how far they lay."""
    there, ratios = here.in_space(space), [0.0]
    for row, name in enumerate(here.serial.tolist()):
        others = np.flatnonzero((here.channel == here.channel[row]) & (here.unit != here.unit[row]))
        mine = serial == name
        if here.unit[row] >= 0 and len(others) and mine.any():
            far, was = (_distance(p, x[mine], row, others) for p, x in ((there, new), (here, old)))
            ratios.append(np.log(far / was))
    return round(float(np.exp(sum(ratios) / max(len(ratios) - 1, 1))), 3)


def _distance(prototypes: Prototypes, x: Floats, row: int, others: Ints) -> float:
    nearest = ((x[:, None] - prototypes.mean[others]) ** 2).sum(axis=2).min(axis=1)
    own = ((x - prototypes.mean[row]) ** 2).sum(axis=1)
    return float(np.sqrt(max(np.median(nearest), 1e-12) / max(own.mean(), 1e-12)))
