"""The units' mean snippets, and how they follow their units.

In come matched spikes with their clean snippets, and how far the tissue has moved; kept are each unit's firing rate and its mean
snippet, on the channels around it, and from them the templates in force. Means move with the tissue, which needs no spikes, and
what remains is learned from spikes, by each unit at its own speed: when the errors of successive spikes are alike, the mean lags
behind and learns faster; when they are unlike, it follows noise and learns more slowly. So a unit that changes is kept up with,
and one that does not is averaged over hundreds of spikes. Templates change at the caller's learning boundaries only, a few at
each, those with most news first.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from streamsort.footprints import move_templates
from streamsort.kernels.learn import find_alone, teach
from streamsort.templates import TemplateMaker, Templates, likeness, overlap

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

_TIMELY = 0.5  # of a unit's energy: a spike that explains less teaches nothing; it may be a neighbour's
_SLOWEST, _FIRST, _FASTEST = 1 / 400, 1 / 30, 1 / 4  # of an error is learned from one spike
_EAGERNESS = 0.5  # by e to this the speed changes when two errors are the same
_LARGE = 12  # channels on which errors are compared; the others are mostly noise
_SURE = 16.0  # gain over the next best unit's: what is hardly its own teaches a unit to be its neighbour, above all a silent one
_LARGE_SPIKE = 2.0  # standard deviations of amplitude: a larger one may be that of a neighbour which has lost its template
# A unit's own spread of sizes tells two units apart that differ in size alone. The usual one counts as so many spikes, the unit's
# are averaged over so many, and a template that is never quite right makes any unit seem to vary by so much.
_USUAL_SPREAD, _SPREAD_SPIKES, _LEAST_SPREAD = 30, 300, 0.06
_RATE_S = 60.0  # firing rates are averaged over so long
_LOWEST_HZ, _HIGHEST_HZ = 0.2, 20.0
_MOST_OFFSET = 3  # samples
_POSITIVE = 1.5  # a peak so many times its trough makes a unit positive
_AFTER_JUMP = 10  # spikes a template counts for that was moved far: it is an interpolation
# So long after a jump, units that took each other's places are exchanged, if squared distances to what they were moved to, with a
# part of the energies added, shrink by such a factor when multiplied. Where nothing was amiss it stayed below 1.1.
_DOUBT_S, _BLUR, _EXCHANGED = 20.0, 0.02, 2.0
_LEAST_MOVE_UM = 1.0  # smaller moves wait: the estimate of the displacement trembles by as much
_NEWS_PER_UM = 0.1  # as much as a tenth of an error learned

_COLUMNS = (
    "means", "n_spikes", "rates_hz", "_news", "_owed_um", "_taught", "_moved_um", "_speed", "_error", "_variance", "_n_sizes",
)  # fmt: skip
MOST_REMADE = 4  # templates at a learning boundary, 0.5 to 1 ms each


class Bank:
    """Hold the templates of all units.

    Parameters
    ----------
    maker : TemplateMaker
    means : ndarray, shape (n_units, n_whole, n_channels), float32
        Mean snippets in noise units.
    n_spikes : ndarray, shape (n_units,), int64
        How many spikes each is the mean of.
    rates_hz : ndarray, shape (n_units,), float64
    sampling_frequency : float

    Attributes
    ----------
    means : ndarray, shape (n_units, n_known, n_whole), float32
        As above, on the channels `templates.around`; changed in place, like
    n_spikes, rates_hz : ndarray
    templates : Templates
        In force; a row keeps its unit.
    remade : list of int
        Rows whose templates changed at the last boundary.
    """

    def __init__(
        self,
        maker: TemplateMaker,
        means: Floats,
        n_spikes: NDArray[np.int64],
        rates_hz: NDArray[np.float64],
        sampling_frequency: float,
    ) -> None:
        self._maker, self._rate, self._n_before = maker, sampling_frequency, maker.n_before
        around = np.array([maker.around(mean) for mean in means], np.int32).reshape(len(means), maker.n_known)
        self.means: Floats = np.take_along_axis(means.transpose(0, 2, 1), around[:, :, None], axis=1).copy()
        self.n_spikes, self.rates_hz = n_spikes.copy(), rates_hz.astype(np.float64)
        self.templates: Templates = maker(self.means.transpose(0, 2, 1), self.n_spikes, around)
        self.remade: list[int] = []
        self._news, self._owed_um = np.zeros(len(means)), np.zeros(len(means))
        self._taught, self._moved_um = self.means.copy(), np.zeros(len(means))  # of those moved: as last taught, and how far since
        t = self.templates
        self._speed = np.full(len(means), _FIRST)
        self._variance, self._n_sizes = np.full(len(means), 1 / maker.tightness), np.full(len(means), _USUAL_SPREAD)  # of sizes
        self._error: Floats = np.zeros((len(means), min(_LARGE, t.channels.shape[1]), t.filters.shape[1]), np.float32)
        self._expected, self._doubt_s = self.templates, 0.0  # what the last jump made of the units, and how long that still counts

    def __len__(self) -> int:
        return len(self.means)

    @property
    def threshold(self) -> Floats:
        """Least gain of a spike, (n_units,) float32: where it is as likely as noise, twice the log of samples per spike."""
        return (2 * np.log(self._rate / np.clip(self.rates_hz, _LOWEST_HZ, _HIGHEST_HZ))).astype(np.float32)

    @property
    def worth(self) -> NDArray[np.float64]:
        """How many spikes' mean each is as good as, (n_units,): it forgets the older ones."""
        return np.minimum(self.n_spikes, 2 / self._speed)

    def add(self, mean: Floats, n_spikes: int, rate_hz: float) -> None:
        """Append a unit: its mean snippet (n_samples, n_channels), of how many spikes, and how often it fires."""
        around = self._maker.around(mean)
        mean = mean.T[around]
        self.means = np.concatenate([self.means, mean[None]])
        self.n_spikes, self.rates_hz = np.append(self.n_spikes, n_spikes), np.append(self.rates_hz, rate_hz)
        self._news, self._owed_um = np.append(self._news, 0.0), np.append(self._owed_um, 0.0)
        self._taught, self._moved_um = np.concatenate([self._taught, mean[None]]), np.append(self._moved_um, 0.0)
        self._speed = np.append(self._speed, _FIRST)
        self._variance = np.append(self._variance, 1 / self._maker.tightness)
        self._n_sizes = np.append(self._n_sizes, _USUAL_SPREAD)
        self._error = np.pad(self._error, ((0, 1), (0, 0), (0, 0)))
        new = self._maker(mean.T[None], self.n_spikes[-1:], around[None])
        self.templates = self._maker.related(self.templates.joined(new), [len(self) - 1])

    def mean(self, row: int) -> Floats:
        """Return a unit's mean snippet on all channels, (n_whole, n_channels): silent where it is not known."""
        mean = np.zeros((self.means.shape[2], self.templates.place.shape[1]), np.float32)
        mean[:, self.templates.around[row]] = self.means[row].T
        return mean

    def likeness_to(self, mean: Floats) -> tuple[NDArray[np.float64], float]:
        """Compare a mean snippet with the units: cosine with each template, at the lag where it is largest, and its energy.

        Parameters
        ----------
        mean : ndarray, shape (n_whole, n_channels), float32
            In noise units.

        Returns
        -------
        cosine : ndarray, shape (n_units,), float64
        energy : float
        """
        around = self._maker.around(mean)
        own = self._maker(mean[None, :, around], np.ones(1, np.int64), around[None])
        channels = own.channels[0][own.channels[0] >= 0]
        cosine = np.zeros(len(self))
        rows = np.flatnonzero((self.templates.place[:, channels] >= 0).any(axis=1))
        both, new = self.templates.taken(rows).joined(own), len(rows)
        for k, row in enumerate(rows.tolist()):
            product = max(overlap(both, k, new)[0], overlap(both, new, k)[0])
            cosine[row] = product / np.sqrt(max(float(both.energy[k] * both.energy[new]), 1e-9))
        return cosine, float(own.energy[0])

    def keep(self, rows: list[int]) -> None:
        """Keep these rows alone, in this order."""
        for name in _COLUMNS:
            setattr(self, name, getattr(self, name)[rows])
        self._doubt_s = 0.0
        self.templates = self._maker(self.means.transpose(0, 2, 1), self.n_spikes, self.templates.around[rows])
        self.templates.tightness[:] = self._tightness()

    def reset(self, row: int, mean: Floats, n_spikes: int) -> None:
        """Give a unit another mean snippet (n_whole, n_channels), of how many spikes."""
        around = self._maker.around(mean)
        self.means[row], self.n_spikes[row] = mean.T[around], n_spikes
        self._owed_um[row], self._speed[row], self._error[row] = 0.0, _FIRST, 0.0
        self._vary_as_usual([row])
        self._moved_um[row] = 0
        self.templates.around[row] = around
        self._put(row)
        self.templates = self._maker.related(self.templates, [row])

    def move(self, displacement_um: NDArray[np.float64], near: NDArray[np.int32], channel_locations: NDArray[np.float64]) -> None:
        """Move units along y with the tissue; templates follow at the next `learn` or `remake`.

        Parameters
        ----------
        displacement_um : ndarray, shape (n_units,), float64
            Since the last call. Less than 1 um in all waits for more.
        near : ndarray, shape (n_channels, n_near), int32
            The channels near each, -1 for none.
        channel_locations : ndarray, shape (n_channels, 2), float64
            In um.
        """
        self._owed_um += displacement_um
        rows = np.flatnonzero(np.abs(self._owed_um) >= _LEAST_MOVE_UM)
        first = rows[self._moved_um[rows] == 0]
        self._taught[first] = self.means[first]
        self._moved_um[rows] += self._owed_um[rows]
        channels, by_um = near[self.templates.channels[rows, 0]], self._moved_um[rows]
        columns = [np.searchsorted(self.templates.around[row], nearby) for row, nearby in zip(rows.tolist(), channels, strict=True)]
        means = np.zeros((len(rows), self.means.shape[2], channels.shape[1]), np.float32)
        for k, row in enumerate(rows.tolist()):
            means[k] = self._taught[row][columns[k]].T
        # The change alone, and all of it since the unit was last taught: interpolating again and again would blur a mean, and that
        # of a silent unit would fade as the estimate of the displacement trembles.
        moved, still = (move_templates(means, channels, channel_locations, by) for by in (by_um, np.zeros_like(by_um)))
        for k, row in enumerate(rows.tolist()):
            self.means[row] = self._taught[row]
            self.means[row][columns[k][channels[k] >= 0]] += (moved[k] - still[k]).T[channels[k] >= 0]
        self._news[rows] += _NEWS_PER_UM * np.abs(self._owed_um[rows])
        self._owed_um[rows] = 0

    def jump(self, displacement_um: NDArray[np.float64], near: NDArray[np.int32], channel_locations: NDArray[np.float64]) -> None:
        """Move units as `move` does, but at once and by much: from there they learn anew."""
        self.move(displacement_um, near, channel_locations)
        self.n_spikes = np.minimum(self.n_spikes, _AFTER_JUMP)
        self._error[:] = 0
        self._vary_as_usual(slice(None))
        self.remake(len(self))
        self._expected, self._doubt_s = self.templates.copied(), _DOUBT_S

    def learn(self, matches: NDArray[np.void], snippets: Floats, channels: Ints, seconds: float, n_most: int = MOST_REMADE) -> bool:
        """Take a period's spikes in; tell whether templates changed.

        Parameters
        ----------
        matches : ndarray, shape (n_spikes,), MATCH_DTYPE
        snippets : ndarray, shape (n_spikes, n_known, n_whole), float32
            In noise units, other spikes taken off.
        channels : ndarray, shape (n_spikes, n_known), int32
            Where each was cut: where its unit was known. A spike found before that changed teaches nothing.
        seconds : float
            Length of the period.
        n_most : int
            So many templates are remade.
        """
        counts = np.bincount(matches["row"], minlength=len(self))
        self.rates_hz += (1 - np.exp(-seconds / _RATE_S)) * (counts / seconds - self.rates_hz)
        if len(matches):
            self._teach(matches, snippets, channels)
        self._doubt_s -= seconds
        return self.remake(n_most + self._exchange())

    def _teach(self, matches: NDArray[np.void], snippets: Floats, channels: Ints) -> None:
        """Let the spikes that are clearly of their units teach them."""
        known = (channels == self.templates.around[matches["row"]]).all(axis=1)
        chosen = np.flatnonzero(self._alone(matches) & self._own(matches) & known)
        row = matches["row"][chosen].astype(np.int64)
        size = self._size(row, matches["amplitude"][chosen])
        teach(
            snippets, chosen, row, self._too_large(row, size), self.templates,
            (_SLOWEST, _FASTEST, _EAGERNESS), self.n_spikes, self._speed, self._news, self.means, self._error,
        )  # fmt: skip
        self._moved_um[row] = 0
        self._see_sizes(row, size)

    def _exchange(self) -> int:
        """Give two units that took each other's places after a jump their own again; return how many templates are to be remade.

        Moved far, a template may resemble a neighbour more than its own unit, and each may then follow the other's spikes. Mostly
        one of the two was moved well: of its unit it hardly differs, which the product of distances shows and their sum does not.
        """
        if self._doubt_s <= 0:
            return 0
        n = self._expected.n_units
        cosine = likeness(self._expected, self.templates)[:, :n]
        expected, now = (energy.astype(np.float64) for energy in (self._expected.energy[:, None], self.templates.energy[:n]))
        apart = (1 + _BLUR) * (expected + now) - 2 * cosine * np.sqrt(expected * now)
        ratio = np.multiply.outer(apart.diagonal(), apart.diagonal()) / (apart * apart.T)
        pair = list(np.unravel_index(ratio.argmax(), ratio.shape))
        if ratio.max() < _EXCHANGED:
            return 0
        names = [name for name in _COLUMNS if name not in ("rates_hz", "_news")]
        for column in (self.templates.around, self.templates.channels, *(getattr(self, name) for name in names)):
            column[pair] = column[pair[::-1]]
        self._news[pair] = np.inf
        return len(pair)

    def _own(self, matches: NDArray[np.void]) -> NDArray[np.bool_]:
        """Tell which spikes are surely of their unit: most of it is there, and one that is too large fits no other unit as well."""
        gain, rival = matches["gain"], matches["runner_up"]
        complete = (gain > _TIMELY * self.templates.energy[matches["row"]]) & (gain - rival > _SURE)
        large = matches["amplitude"] > 1 + _LARGE_SPIKE / np.sqrt(self.templates.tightness[matches["row"]])
        own: NDArray[np.bool_] = complete & ~(large & (rival > _TIMELY * gain))
        return own

    def _alone(self, matches: NDArray[np.void]) -> NDArray[np.bool_]:
        """Tell which spikes overlap no larger one on shared channels: a little of that is always left, and often the same."""
        order = np.argsort(matches["sample_index"], kind="stable")
        alone, sorted_alone = np.empty((2, len(order)), np.bool_)
        find_alone(matches["sample_index"][order], matches["row"][order], self.templates, sorted_alone)
        alone[order] = sorted_alone
        return alone

    def _expected_amplitude(self) -> NDArray[np.float64]:
        """Return the mean score over energy of the spikes that pass the threshold: over 1 for a unit hardly above it."""
        energy = np.maximum(self.templates.energy.astype(np.float64), 1.0)
        least = (self.threshold - energy) / 2 / np.sqrt(energy)
        hazard = np.exp(-(least**2) / 2) / np.sqrt(2 * np.pi) / np.maximum(ndtr(-least), 1e-6)
        return np.asarray(1 + hazard / np.sqrt(energy))

    def _size(self, row: NDArray[np.int64], amplitude: Floats) -> NDArray[np.float64]:
        """Return the score of spikes over their units' energy: their amplitude, were it not drawn to 1."""
        energy, tightness = (column[row].astype(np.float64) for column in (self.templates.energy, self.templates.tightness))
        size: NDArray[np.float64] = (amplitude * (energy + tightness) - tightness) / energy
        return size

    def _see_sizes(self, row: NDArray[np.int64], size: NDArray[np.float64]) -> None:
        """Let the units' spread of sizes follow their spikes; what noise adds to it is taken off."""
        n_new = np.bincount(row, minlength=len(self))
        total = np.bincount(row, (size - 1) ** 2 - 1 / self.templates.energy[row], len(self))
        self._n_sizes = np.minimum(self._n_sizes + n_new, np.maximum(_SPREAD_SPIKES, n_new))
        self._variance += (total - n_new * self._variance) / self._n_sizes

    def _vary_as_usual(self, rows: Any) -> None:
        """Take the units to vary in size as most do."""
        self._variance[rows], self._n_sizes[rows] = 1 / self._maker.tightness, _USUAL_SPREAD

    def _tightness(self) -> NDArray[np.float64]:
        tightness: NDArray[np.float64] = 1 / np.maximum(self._variance, _LEAST_SPREAD**2)
        return tightness

    def _too_large(self, row: NDArray[np.int64], size: NDArray[np.float64]) -> Floats:
        """Return how much of its template each spike owes to having passed the threshold.

        Taught with that, a weak unit would learn from its largest spikes, grow, pass fewer, and be lost.
        """
        too_large: Floats = (size * (1 - 1 / self._expected_amplitude()[row])).astype(np.float32)
        return too_large

    def remake(self, n_most: int) -> bool:
        """Bring the templates with most news up to date; tell whether there were any."""
        rows = np.argsort(-self._news, kind="stable")[:n_most]
        rows = rows[self._news[rows] > 0.05]
        for row in rows.tolist():
            self._know(row)
            self._put(row)
            self._anchor(row)
        self._news[rows] = 0
        self.remade = rows.tolist()
        if len(rows):
            self.templates = self._maker.related(self.templates, self.remade)
        return bool(len(rows))

    def _know(self, row: int) -> None:
        """Let the channels on which a unit is known follow it; those that are new are silent at first."""
        before = self.templates.around[row].copy()
        after = self._maker.around(self.means[row].T, before)
        if (after == before).all():
            return
        place, stays = np.searchsorted(before, after), np.isin(after, before)
        for array in (self.means, self._taught):
            array[row] = np.where(stays[:, None], array[row].take(place, axis=0, mode="clip"), 0)
        self.templates.around[row] = after

    def _put(self, row: int) -> None:
        """Write a template anew; the unit's last error stays on the channels it was found on."""
        channels = self.templates.channels[row, : self._error.shape[1]]
        before = channels.copy()
        self._maker.put(self.templates, row, self.means[row].T, int(self.n_spikes[row]), self.templates.around[row])
        self.templates.tightness[row] = self._tightness()[row]
        same = (channels[:, None] == before) & (channels[:, None] >= 0)
        self._error[row] = same.astype(np.float32) @ self._error[row]

    def _anchor(self, row: int) -> None:
        """Hold a template's trough where it belongs: spikes are aligned to it, so nothing else does, and it would creep."""
        t = self.templates
        waveform = t.centred[row][:, 0]
        extreme = waveform.argmax() if waveform.max() > -_POSITIVE * waveform.min() else waveform.argmin()
        offset = int(extreme) - self._n_before
        if abs(offset) > _MOST_OFFSET:
            self.means[row] = np.roll(self.means[row], -int(np.sign(offset)), axis=1)
            self._moved_um[row] = 0
            self._put(row)
