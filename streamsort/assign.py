"""Which unit each spike is of, once there are units.

In come batches of traces with their threshold peaks, embedded; out go spikes. Template matching names the spikes, also those that
overlap and those too small for the threshold; a peak that is still there when all of them are subtracted is published as unsorted.
A peak that a spike explains lends its embedding to that unit, an unexplained one may be the first of a new unit. State is the
matcher's window and the peaks whose surroundings are not decided yet; nothing is learned here.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamsort.bank import Bank
from streamsort.cluster import Assignment, Space
from streamsort.config import SorterConfig
from streamsort.match import MATCH_DTYPE, Match
from streamsort.noise import divisor
from streamsort.probe import Probe
from streamsort.records import SPIKE_DTYPE, UNSORTED, Flag, PeakBatch, join_records

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_SAME_SPIKE_MS = 0.3  # a peak so near a spike, on one of its channels, is that spike
_STILL_THERE = 0.9  # of the detection threshold: what remains of a peak after subtraction, or it counts as explained
_LEFTOVER = 0.35  # of the height of the spike that explains it: no template is quite right
_CERTAINTY = 0.5  # a gain is twice a log-likelihood ratio


class Explained(NamedTuple):
    """Peaks whose spikes are decided, row by row.

    `unit` is the unit of the spike that explains it, -1 for none: such peaks are published as unsorted. `strange` are those of
    which most is still there when all spikes are subtracted.
    """

    peaks: NDArray[Any]
    assignment: Assignment
    snippets: Floats
    noise_level: Floats
    unit: Ints
    strange: NDArray[np.bool_]


class Assign:
    """Name the spikes of a calibrated stream.

    Parameters
    ----------
    config : SorterConfig
    probe : Probe
    sampling_frequency : float
    channel_noise : ndarray, shape (n_channels,), float32
        Noise level in uV that makes the templates' noise units; it stays what it was at calibration, so templates need not change
        with it.
    bank : Bank
    unit_ids : sequence of int
        Published id of each of its rows.
    published_through : int
        All threshold peaks before this sample came out when there were no units yet; no spikes before it follow.

    Attributes
    ----------
    unit_ids : list of int
        Grows with the bank; -1 for rows that ended.
    """

    def __init__(
        self,
        config: SorterConfig,
        probe: Probe,
        sampling_frequency: float,
        channel_noise: Floats,
        bank: Bank,
        unit_ids: list[int],
        published_through: int,
    ) -> None:
        self._nearby = probe.distances_um() <= config.match.radius_um
        self._threshold = config.detect.detect_threshold * _STILL_THERE
        self.channel_noise = divisor(channel_noise)
        self._same = round(_SAME_SPIKE_MS * sampling_frequency / 1000)
        self.bank, self.unit_ids, self._published_through = bank, unit_ids, published_through
        self.match = Match(config.match, probe.n_channels, sampling_frequency)
        # A spike not found yet may still be subtracted up to n_before earlier; only then is it certain what remains of a peak.
        self._hold = max(self._same, self.match.n_before)
        self.refresh()
        self._waiting: list[tuple[PeakBatch, Assignment]] = []
        self._recent = np.zeros(0, MATCH_DTYPE)
        self._near_gap = np.zeros(0, np.int64)

    @property
    def through_sample(self) -> int:
        """All spikes and peaks before it have come out."""
        return max(self.match.through_sample - self._hold, self._published_through)

    def refresh(self) -> None:
        """Match with the bank's templates as they are now."""
        self.match.use(self.bank.templates, self.bank.threshold)

    def run_in(self, start_sample: int, traces: Floats) -> None:
        """Match what lies before the first batch, in noise units; its spikes do not count."""
        self.restart(start_sample)
        self._recent = self.match(traces)
        self.match.settled()

    def restart(self, start_sample: int) -> None:
        """Forget the traces, as after a gap."""
        self._recent = self._recent[:0]
        self.match.restart(start_sample)
        self.refresh()

    def __call__(self, batch: PeakBatch, assignment: Assignment | None) -> tuple[NDArray[np.void], list[Explained]]:
        """Take a batch with what the embeddings of its peaks say, None without peaks; return matches, and peaks decided now."""
        explained = []
        if batch.start_sample != self.match.next_sample and len(batch.traces):
            explained = self._decide(batch.start_sample)  # what came before a gap is not going to be explained any more
            self.restart(batch.start_sample)
        recent = self._near_gap >= self.match.through_sample - self.match.n_before
        self._near_gap = np.concatenate([self._near_gap[recent], batch.start_sample + np.flatnonzero(batch.near_gap)])
        matches = self.match(batch.traces / self.channel_noise)
        if len(matches):
            self._recent = join_records([self._recent, matches])
        if assignment is not None:
            self._waiting.append((batch, assignment))
        explained += self._decide(self.through_sample)
        self._recent = self._recent[self._recent["sample_index"] > self.through_sample - 2 * self._same]
        return matches[matches["sample_index"] >= self._published_through], explained

    def _decide(self, through_sample: int) -> list[Explained]:
        """Decide the peaks before `through_sample`."""
        ready = [item for item in self._waiting if len(item[0].peaks)]
        if not ready or int(ready[0][0].peaks["sample_index"][0]) >= through_sample:
            self._waiting = ready
            return []
        peaks = join_records([batch.peaks for batch, _ in ready])
        snippets = np.concatenate([batch.snippets for batch, _ in ready])
        noise_level = np.concatenate([batch.noise_level for batch, _ in ready])
        assignment = Assignment.join([one for _, one in ready])
        n = int(np.searchsorted(peaks["sample_index"], through_sample))
        rest = PeakBatch(0, 0, peaks[n:], snippets[n:], noise_level[n:], snippets[:0, 0], np.zeros(0, bool), None)
        self._waiting = [(rest, assignment.take(slice(n, None)))] if len(rest.peaks) else []
        unit, strange = self._explain(peaks[:n])
        return [Explained(peaks[:n], assignment.take(slice(0, n)), snippets[:n], noise_level[:n], unit, strange)]

    def explain(self, peaks: NDArray[Any], matches: NDArray[np.void]) -> Ints:
        """Return which of the matches each peak is, -1 for none."""
        return explain(peaks, matches, self.bank.templates.channels[:, 0], self._nearby, self._same)

    def _explain(self, peaks: NDArray[Any]) -> tuple[Ints, NDArray[np.bool_]]:
        match = self.explain(peaks, self._recent)
        unit = np.full(len(peaks), UNSORTED, np.int64)
        strange = np.zeros(len(peaks), bool)
        heights = np.abs(self._heights(self._recent))
        for k, (sample_index, channel) in enumerate(zip(peaks["sample_index"].tolist(), peaks["channel"].tolist(), strict=True)):
            left = np.abs(self.match.residual(sample_index, sample_index + 1)[channel])
            least = self._threshold if match[k] < 0 else max(self._threshold, _LEFTOVER * heights[match[k]])
            strange[k] = len(left) == 1 and left[0] > least
            if match[k] >= 0 and not strange[k]:
                unit[k] = self.unit_ids[int(self._recent["row"][match[k]])]
        return unit, strange

    def _heights(self, matches: NDArray[np.void]) -> Floats:
        """Return the largest deflection of each spike's template, signed, in noise units."""
        waveform = self.bank.templates.centred[matches["row"]][:, :, 0]
        extreme = np.abs(waveform).argmax(axis=1) if len(matches) else np.zeros(0, np.int64)
        heights: Floats = matches["amplitude"] * np.take_along_axis(waveform, extreme[:, None], axis=1)[:, 0]
        return heights

    def move(self, space: Space) -> None:
        """Take the peaks that still wait to another encoder's space."""
        self._waiting = [(batch, replace(one, white=one.white @ space.linear + space.shift)) for batch, one in self._waiting]

    def spikes(self, matches: NDArray[np.void]) -> NDArray[np.void]:
        """Return matches as spikes, all but their times; sample_index is that of the filtered traces."""
        t, rows = self.bank.templates, matches["row"]
        spikes = np.zeros(len(matches), SPIKE_DTYPE)
        if not len(matches):
            return spikes
        spikes["sample_index"] = matches["sample_index"]
        spikes["unit_id"] = np.array(self.unit_ids, np.int64)[rows]
        spikes["channel"] = t.channels[rows, 0]
        spikes["amplitude_uv"] = self._heights(matches) * self.channel_noise[spikes["channel"]]
        spikes["flags"] = np.where(matches["collision"] > 0, int(Flag.COLLISION), 0)
        first, last = (
            np.searchsorted(self._near_gap, spikes["sample_index"] + k) for k in (-self.match.n_before, self.match.n_after)
        )
        spikes["flags"][last > first] |= int(Flag.NEAR_GAP)
        spikes["confidence"] = self._confidence(matches)
        return spikes

    def _confidence(self, matches: NDArray[np.void]) -> Floats:
        """Return the probability that the unit is right: against noise, and against the next best unit."""
        over_noise = matches["gain"] - self.bank.threshold[matches["row"]]
        over_other = matches["gain"] - matches["runner_up"]
        # Overlapped by a spike taken off before, a unit may gain less than its rival; cut off what would overflow.
        worst = np.float32(-100)
        doubt = np.exp(-_CERTAINTY * np.maximum(over_noise, worst)) + np.exp(-_CERTAINTY * np.maximum(over_other, worst))
        confidence: Floats = (1 / (1 + doubt)).astype(np.float32)
        return confidence


def explain(
    peaks: NDArray[Any], matches: NDArray[np.void], home: NDArray[np.int32], nearby: NDArray[np.bool_], same_samples: int
) -> Ints:
    """Return which of the spikes each peak is, -1 for none: the nearest in time of those nearby.

    Parameters
    ----------
    peaks : ndarray, shape (n_peaks,), PEAK_DTYPE
    matches : ndarray, shape (n_spikes,), MATCH_DTYPE
    home : ndarray, shape (n_units,), int32
        Largest channel of each unit.
    nearby : ndarray, shape (n_channels, n_channels), bool
    same_samples : int
        They lie no further apart in time.
    """
    order = np.argsort(matches["sample_index"], kind="stable")
    times = matches["sample_index"][order]
    low = np.searchsorted(times, peaks["sample_index"] - same_samples)
    high = np.searchsorted(times, peaks["sample_index"] + same_samples, side="right")
    found = np.full(len(peaks), -1, np.int64)
    for k, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        near = order[a:b]
        near = near[nearby[home[matches["row"][near]], peaks["channel"][k]]]
        if len(near):
            found[k] = near[np.abs(matches["sample_index"][near] - peaks["sample_index"][k]).argmin()]
    return found
