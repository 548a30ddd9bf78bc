"""The units' mean snippets, and how they follow their units.

In come matched spikes with their clean snippets, and how far the tissue has moved; kept are each unit's mean snippet on all
channels and its firing rate, and from them the templates in force. Means move with the tissue, which needs no spikes, and what
remains is learned from spikes, by each unit at its own speed: when the errors of successive spikes are alike, the mean lags behind
and learns faster; when they are unlike, it follows noise and learns more slowly. So a unit that changes is kept up with, and one
that does not is averaged over hundreds of spikes. Templates change at the caller's learning boundaries only, a few at each, those
with most news first.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from streamsort.footprints import move_templates
from streamsort.templates import TemplateMaker, Templates, likeness, overlap

Floats = NDArray[np.float32]

_TIMELY = 0.5  # of a unit's energy: a spike that explains less teaches nothing; it may be a neighbour's
_SLOWEST, _FIRST, _FASTEST = 1 / 400, 1 / 30, 1 / 4  # of an error is learned from one spike
_EAGERNESS = 0.5  # by e to this the speed changes when two errors are the same
_LARGE = 12  # channels on which errors are compared; the others are mostly noise
_SURE = 16.0  # gain over the next best unit's: what is hardly its own teaches a unit to be its neighbour, above all a silent one
_LARGE_SPIKE = 2.0  # standard deviations of amplitude: a larger one may be that of a neighbour which has lost its template
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

MOST_REMADE = 4  # templates at a learning boundary, 0.5 to 1 ms each


class Bank:
    """Hold the templates of all units.

    Parameters
    ----------
    maker : TemplateMaker
    means : ndarray, shape (n_units, n_samples, n_channels), float32
        Mean snippets in noise units.
    n_spikes : ndarray, shape (n_units,), int64
        How many spikes each is the mean of.
    rates_hz : ndarray, shape (n_units,), float64
    sampling_frequency : float

    Attributes
    ----------
    means, n_spikes, rates_hz : ndarray
        As above; changed in place.
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
        self._maker, self._rate, self._tightness, self._n_before = maker, sampling_frequency, maker.tightness, maker.n_before
        self.means, self.n_spikes, self.rates_hz = means.copy(), n_spikes.copy(), rates_hz.astype(np.float64)
        self.templates: Templates = maker(self.means, self.n_spikes)
        self.remade: list[int] = []
        self._news, self._owed_um = np.zeros(len(means)), np.zeros(len(means))
        self._taught, self._moved_um = self.means.copy(), np.zeros(len(means))  # as last taught, and by how much moved since
        self._speed, self._error = np.full(len(means), _FIRST), np.zeros_like(self.means)
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
        self.means = np.concatenate([self.means, mean[None]])
        self.n_spikes, self.rates_hz = np.append(self.n_spikes, n_spikes), np.append(self.rates_hz, rate_hz)
        self._news, self._owed_um = np.append(self._news, 0.0), np.append(self._owed_um, 0.0)
        self._taught, self._moved_um = np.concatenate([self._taught, mean[None]]), np.append(self._moved_um, 0.0)
        self._speed = np.append(self._speed, _FIRST)
        self._error = np.concatenate([self._error, np.zeros_like(mean[None])])
        self.templates = self._maker.related(self.templates.joined(self._maker(mean[None], self.n_spikes[-1:])))

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
        own, new = self._maker(mean[None], np.ones(1, np.int64)), len(self)
        both = self.templates.joined(own)
        channels = own.channels[0][own.channels[0] >= 0]
        cosine = np.zeros(new)
        for row in np.flatnonzero((self.templates.place[:, channels] >= 0).any(axis=1)).tolist():
            product = max(overlap(both, row, new)[0], overlap(both, new, row)[0])
            cosine[row] = product / np.sqrt(max(float(both.energy[row] * both.energy[new]), 1e-9))
        return cosine, float(own.energy[0])

    def keep(self, rows: list[int]) -> None:
        """Keep these rows alone, in this order."""
        for name in ("means", "n_spikes", "rates_hz", "_news", "_owed_um", "_taught", "_moved_um", "_speed", "_error"):
            setattr(self, name, getattr(self, name)[rows])
        self._doubt_s = 0.0
        self.templates = self._maker(self.means, self.n_spikes)

    def reset(self, row: int, mean: Floats, n_spikes: int) -> None:
        """Give a unit another mean snippet, of how many spikes."""
        self.means[row], self.n_spikes[row] = mean, n_spikes
        self._owed_um[row], self._speed[row], self._error[row] = 0.0, _FIRST, 0.0
        self._note_taught(row)
        self._maker.put(self.templates, row, mean, n_spikes)
        self.templates = self._maker.related(self.templates)

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
        self._moved_um[rows] += self._owed_um[rows]
        channels, by_um = near[self.templates.channels[rows, 0]], self._moved_um[rows]
        means = self._taught[rows[:, None], :, channels].transpose(0, 2, 1)
        # The change alone, and all of it since the unit was last taught: interpolating again and again would blur a mean, and that
        # of a silent unit would fade as the estimate of the displacement trembles.
        moved, still = (move_templates(means, channels, channel_locations, by) for by in (by_um, np.zeros_like(by_um)))
        for row, around, change in zip(rows.tolist(), channels, moved - still, strict=True):
            self.means[row] = self._taught[row]
            self.means[row][:, around[around >= 0]] += change[:, around >= 0]
        self._news[rows] += _NEWS_PER_UM * np.abs(self._owed_um[rows])
        self._owed_um[rows] = 0

    def jump(self, displacement_um: NDArray[np.float64], near: NDArray[np.int32], channel_locations: NDArray[np.float64]) -> None:
        """Move units as `move` does, but at once and by much: from there they learn anew."""
        self.move(displacement_um, near, channel_locations)
        self.n_spikes = np.minimum(self.n_spikes, _AFTER_JUMP)
        self._error[:] = 0
        self.remake(len(self))
        self._expected, self._doubt_s = self.templates.copied(), _DOUBT_S

    def learn(self, matches: NDArray[np.void], snippets: Floats, seconds: float, n_most: int = MOST_REMADE) -> bool:
        """Take a period's spikes in; tell whether templates changed.

        Parameters
        ----------
        matches : ndarray, shape (n_spikes,), MATCH_DTYPE
        snippets : ndarray, shape (n_spikes, n_samples, n_channels), float32
            In noise units, other spikes taken off.
        seconds : float
            Length of the period.
        n_most : int
            So many templates are remade.
        """
        counts = np.bincount(matches["row"], minlength=len(self))
        self.rates_hz += (1 - np.exp(-seconds / _RATE_S)) * (counts / seconds - self.rates_hz)
        expected = self._expected_amplitude()
        teaching = self._alone(matches) & self._own(matches)
        for match, snippet in zip(matches[teaching], snippets[teaching], strict=True):
            row = int(match["row"])
            error = self._levelled(snippet, row, float(match["amplitude"]), expected[row]) - self.means[row]
            self.n_spikes[row] += 1
            faster = np.exp(_EAGERNESS * self._agreement(row, error))
            self._speed[row] = np.clip(faster * self._speed[row], _SLOWEST, _FASTEST)
            rate = max(self._speed[row], 1 / self.n_spikes[row])
            self.means[row] += np.float32(rate) * error
            self._note_taught(row)
            self._news[row] += rate
        self._doubt_s -= seconds
        return self.remake(n_most + self._exchange())

    def _exchange(self) -> int:
        """Give two units that took each other's places after a jump their own again; return how many templates are to be remade.

        Moved far, a template may resemble a neighbour more than its own unit, and each may then follow the other's spikes. Mostly
        one of the two was moved well: of its unit it hardly differs, which the product of distances shows and their sum does not.
        """
        if self._doubt_s <= 0:
            return 0
        n = self._expected.n_units
        cosine = likeness(self._expected.joined(self.templates))[:n, n : 2 * n]
        expected, now = (energy.astype(np.float64) for energy in (self._expected.energy[:, None], self.templates.energy[:n]))
        apart = (1 + _BLUR) * (expected + now) - 2 * cosine * np.sqrt(expected * now)
        ratio = np.multiply.outer(apart.diagonal(), apart.diagonal()) / (apart * apart.T)
        pair = list(np.unravel_index(ratio.argmax(), ratio.shape))
        if ratio.max() < _EXCHANGED:
            return 0
        for name in ("means", "n_spikes", "_owed_um", "_taught", "_moved_um", "_speed", "_error"):
            column = getattr(self, name)
            column[pair] = column[pair[::-1]]
        self._news[pair] = np.inf
        return len(pair)

    def _own(self, matches: NDArray[np.void]) -> NDArray[np.bool_]:
        """Tell which spikes are surely of their unit: most of it is there, and one that is too large fits no other unit as well."""
        gain, rival = matches["gain"], matches["runner_up"]
        complete = (gain > _TIMELY * self.templates.energy[matches["row"]]) & (gain - rival > _SURE)
        large = matches["amplitude"] > 1 + _LARGE_SPIKE / np.sqrt(self._tightness)
        own: NDArray[np.bool_] = complete & ~(large & (rival > _TIMELY * gain))
        return own

    def _alone(self, matches: NDArray[np.void]) -> NDArray[np.bool_]:
        """Tell which spikes overlap no larger one on shared channels: a little of that is always left, and often the same."""
        t, n_samples = self.templates, self.templates.filters.shape[1]
        order = np.argsort(matches["sample_index"], kind="stable")
        rows, at = matches["row"][order], matches["sample_index"][order]
        energy = t.energy[rows]
        alone = np.ones(len(at), bool)
        first = np.searchsorted(at, at - n_samples)
        for k in range(1, len(at)):
            before = slice(int(first[k]), k)
            shared = (t.rivals[rows[k]] == rows[before][:, None]).any(axis=1)
            alone[before] &= ~(shared & (energy[k] >= energy[before]))
            alone[k] &= not (shared & (energy[before] >= energy[k])).any()
        alone[order] = alone.copy()
        return alone

    def _agreement(self, row: int, error: Floats) -> float:
        """Return the cosine between this error of a mean and that of the spike before, where the unit is large."""
        t = self.templates
        channels = t.channels[row][:_LARGE]
        now, last = (one[: t.filters.shape[1], channels[channels >= 0]] for one in (error, self._error[row]))
        self._error[row] = error
        return float((now * last).sum() / np.sqrt((now * now).sum() * (last * last).sum() + 1e-12))

    def _expected_amplitude(self) -> NDArray[np.float64]:
        """Return the mean score over energy of the spikes that pass the threshold: over 1 for a unit hardly above it."""
        energy = np.maximum(self.templates.energy.astype(np.float64), 1.0)
        least = (self.threshold - energy) / 2 / np.sqrt(energy)
        hazard = np.exp(-(least**2) / 2) / np.sqrt(2 * np.pi) / np.maximum(ndtr(-least), 1e-6)
        return np.asarray(1 + hazard / np.sqrt(energy))

    def _levelled(self, snippet: Floats, row: int, amplitude: float, expected: float) -> Floats:
        """Return a snippet without the part of its size that it owes to having passed the threshold.

        Without this a weak unit is taught by its largest spikes, grows, passes fewer, and is lost.
        """
        t = self.templates
        channels = t.channels[row]
        n = int((channels >= 0).sum())
        energy = float(t.energy[row])
        score = amplitude * (energy + self._tightness) - self._tightness
        levelled = snippet.copy()
        levelled[:, channels[:n]] -= np.float32(score / energy * (1 - 1 / expected)) * t.centred[row][:, :n]
        return levelled

    def _note_taught(self, row: int) -> None:
        self._taught[row], self._moved_um[row] = self.means[row], 0.0

    def remake(self, n_most: int) -> bool:
        """Bring the templates with most news up to date; tell whether there were any."""
        rows = np.argsort(-self._news, kind="stable")[:n_most]
        rows = rows[self._news[rows] > 0.05]
        for row in rows.tolist():
            self._maker.put(self.templates, row, self.means[row], int(self.n_spikes[row]))
            self._anchor(row)
        self._news[rows] = 0
        self.remade = rows.tolist()
        if len(rows):
            self.templates = self._maker.related(self.templates)
        return bool(len(rows))

    def _anchor(self, row: int) -> None:
        """Hold a template's trough where it belongs: spikes are aligned to it, so nothing else does, and it would creep."""
        t = self.templates
        waveform = t.centred[row][:, 0]
        extreme = waveform.argmax() if waveform.max() > -_POSITIVE * waveform.min() else waveform.argmin()
        offset = int(extreme) - self._n_before
        if abs(offset) > _MOST_OFFSET:
            self.means[row] = np.roll(self.means[row], -int(np.sign(offset)), axis=0)
            self._note_taught(row)
            self._maker.put(t, row, self.means[row], int(self.n_spikes[row]))
