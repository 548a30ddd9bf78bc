"""The units' mean snippets, and how they follow their units.

In come matched spikes with their clean snippets; kept are each unit's mean snippet on all channels and its firing rate, and from
them the templates in force. A mean forgets as fast as its noise allows: the mean of n snippets is off by an energy in proportion to
1/n, which a large unit bears and a small one does not. Everything changes at the caller's learning boundaries only, a few units at
each, those with most news first.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from streamsort.footprints import move_templates
from streamsort.templates import TemplateMaker, Templates, likeness

Floats = NDArray[np.float32]

_TIMELY = 0.5  # of a unit's energy: a spike that explains less teaches nothing; it may be a neighbour's
_SLOWEST, _FASTEST, _SPIKES_ENERGY = 1 / 400, 1 / 12, 4000.0
_RATE_S = 60.0  # firing rates are averaged over so long
_LOWEST_HZ, _HIGHEST_HZ = 0.2, 20.0
_MOST_OFFSET = 3  # samples
_POSITIVE = 1.5  # a peak so many times its trough makes a unit positive
_AFTER_MOVE = 10  # spikes a moved template counts for: it is an interpolation
_MOST_REMADE = 8  # 0.2 ms each


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
        self.templates: Templates = maker(self.means)
        self.remade: list[int] = []
        self._news = np.zeros(len(means))

    def __len__(self) -> int:
        return len(self.means)

    @property
    def threshold(self) -> Floats:
        """Least gain of a spike, (n_units,) float32: where it is as likely as noise, twice the log of samples per spike."""
        return (2 * np.log(self._rate / np.clip(self.rates_hz, _LOWEST_HZ, _HIGHEST_HZ))).astype(np.float32)

    def add(self, mean: Floats, n_spikes: int, rate_hz: float) -> None:
        """Append a unit: its mean snippet (n_samples, n_channels), of how many spikes, and how often it fires."""
        self.means = np.concatenate([self.means, mean[None]])
        self.n_spikes, self.rates_hz = np.append(self.n_spikes, n_spikes), np.append(self.rates_hz, rate_hz)
        self._news = np.append(self._news, 0.0)
        self.templates = self._maker(self.means)

    def likeness_to(self, mean: Floats) -> tuple[NDArray[np.float64], float]:
        """Compare a mean snippet (n_samples, n_channels) with the units: cosine with each template, (n_units,), and its energy."""
        templates = self._maker(np.concatenate([self.means, mean[None]]))
        return likeness(templates)[-1, :-1], float(templates.energy[-1])

    def keep(self, rows: list[int]) -> None:
        """Keep these rows alone, in this order."""
        self.means, self.n_spikes = self.means[rows], self.n_spikes[rows]
        self.rates_hz, self._news = self.rates_hz[rows], self._news[rows]
        self.templates = self._maker(self.means)

    def reset(self, row: int, mean: Floats, n_spikes: int) -> None:
        """Give a unit another mean snippet, of how many spikes."""
        self.means[row], self.n_spikes[row] = mean, n_spikes
        self._maker.put(self.templates, row, mean)
        self.templates = self._maker.related(self.templates)

    def move(self, displacement_um: NDArray[np.float64], near: NDArray[np.int32], channel_locations: NDArray[np.float64]) -> None:
        """Move all units along y; from there they learn anew.

        Parameters
        ----------
        displacement_um : ndarray, shape (n_units,), float64
        near : ndarray, shape (n_channels, n_near), int32
            The channels near each, -1 for none.
        channel_locations : ndarray, shape (n_channels, 2), float64
            In um.
        """
        channels = near[self.templates.channels[:, 0]]
        for row, around in enumerate(channels):
            around = around[around >= 0]
            by = displacement_um[row : row + 1]
            moved = move_templates(self.means[row : row + 1][:, :, around], around[None], channel_locations, by)
            self.means[row] = 0
            self.means[row][:, around] = moved[0]
        self.n_spikes[:] = np.minimum(self.n_spikes, _AFTER_MOVE)
        self.templates = self._maker(self.means)

    def learn(self, matches: NDArray[np.void], snippets: Floats, seconds: float) -> bool:
        """Take a period's spikes in; tell whether templates changed.

        Parameters
        ----------
        matches : ndarray, shape (n_spikes,), MATCH_DTYPE
        snippets : ndarray, shape (n_spikes, n_samples, n_channels), float32
            In noise units, other spikes taken off.
        seconds : float
            Length of the period.
        """
        counts = np.bincount(matches["row"], minlength=len(self))
        self.rates_hz += (1 - np.exp(-seconds / _RATE_S)) * (counts / seconds - self.rates_hz)
        energy = self.templates.energy
        expected = self._expected_amplitude()
        for row, match, snippet in zip(matches["row"].tolist(), matches, snippets, strict=True):
            timely = _TIMELY if self.n_spikes[row] > _AFTER_MOVE * 3 else _TIMELY / 2
            if match["gain"] > timely * energy[row] and not match["collision"]:
                self._level(snippet, row, float(match["amplitude"]), expected[row])
                self.n_spikes[row] += 1
                speed = float(np.clip(energy[row] / _SPIKES_ENERGY, _SLOWEST, _FASTEST))
                rate = max(speed, 1.0 / self.n_spikes[row])
                self.means[row] += np.float32(rate) * (snippet - self.means[row])
                self._news[row] += rate
        return self.remake(_MOST_REMADE)

    def _expected_amplitude(self) -> NDArray[np.float64]:
        """Return the mean score over energy of the spikes that pass the threshold: over 1 for a unit hardly above it."""
        energy = np.maximum(self.templates.energy.astype(np.float64), 1.0)
        least = (self.threshold - energy) / 2 / np.sqrt(energy)
        hazard = np.exp(-(least**2) / 2) / np.sqrt(2 * np.pi) / np.maximum(ndtr(-least), 1e-6)
        return np.asarray(1 + hazard / np.sqrt(energy))

    def _level(self, snippet: Floats, row: int, amplitude: float, expected: float) -> None:
        """Take off the part of a snippet's size that it owes to having passed the threshold, in place.

        Without this a weak unit is taught by its largest spikes, grows, passes fewer, and is lost.
        """
        t = self.templates
        channels = t.channels[row]
        n = int((channels >= 0).sum())
        energy = float(t.energy[row])
        score = amplitude * (energy + self._tightness) - self._tightness
        snippet[:, channels[:n]] -= np.float32(score / energy * (1 - 1 / expected)) * t.centred[row][:, :n]

    def remake(self, n_most: int) -> bool:
        """Bring the templates with most news up to date; tell whether there were any."""
        rows = np.argsort(-self._news, kind="stable")[:n_most]
        rows = rows[self._news[rows] > 0.05]
        for row in rows.tolist():
            self._maker.put(self.templates, row, self.means[row])
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
            self._maker.put(t, row, self.means[row])
