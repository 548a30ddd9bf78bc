"""Which unit each spike is of, once there are units.

In come batches of traces with their threshold peaks; out go spikes. Template matching names the spikes, also those that overlap and
those too small for the threshold; a peak that is still there when all of them are subtracted is published as unsorted. State is the
matcher's window and the peaks whose surroundings are not decided yet. Nothing is learned here, nor embedded: what there is to learn
from is noted, and what was learned comes back as `Known` at a learning boundary. Where there is no time to match, `hasten` names
the peaks alone.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamsort.config import SorterConfig
from streamsort.kernels.assign import nearest_spikes
from streamsort.kernels.nearest import nearest
from streamsort.match import MATCH_DTYPE, Match, Settled
from streamsort.noise import divisor
from streamsort.probe import Probe
from streamsort.records import PEAK_DTYPE, SPIKE_DTYPE, UNSORTED, Flag, PeakBatch, join_records
from streamsort.templates import Templates

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_SAME_SPIKE_MS = 0.3  # a peak so near a spike, on one of its channels, is that spike
_STILL_THERE = 0.9  # of the detection threshold: what remains of a peak after subtraction, or it counts as explained
_LEFTOVER = 0.35  # of the height of the spike that explains it: no template is quite right
_CERTAINTY = 0.5  # a gain is twice a log-likelihood ratio


class Known(NamedTuple):
    """The units as assignment knows them until the next learning boundary, a row each; nobody writes to it.

    Attributes
    ----------
    templates : Templates
    threshold : ndarray, shape (n_units,), float32
        Least gain of a spike.
    unit_id : ndarray, shape (n_units,), int64
        As published; -1 for rows that ended.
    flags : ndarray, shape (n_units,), uint16
        Which each unit lends its spikes.
    """

    templates: Templates
    threshold: Floats
    unit_id: Ints
    flags: NDArray[np.uint16]


class Explained(NamedTuple):
    """Peaks whose spikes are decided, row by row.

    `unit` is the unit of the spike that explains it, -1 for none: such peaks are published as unsorted. `strange` are those of
    which most is still there when all spikes are subtracted.
    """

    peaks: NDArray[Any]
    snippets: Floats
    noise_level: Floats
    unit: Ints
    strange: NDArray[np.bool_]


class Notes(NamedTuple):
    """What assignment saw in a learning period, to be learned from.

    Attributes
    ----------
    known : Known
        The units as they were named by.
    spikes, matches : list of ndarray
        As published, and as matched: row by row the same.
    explained : list of Explained
    settled : list of Settled
        Spikes whose surroundings were decided, with their clean snippets.
    n_skipped : int
        Samples that never came.
    """

    known: Known
    spikes: list[NDArray[Any]]
    matches: list[NDArray[Any]]
    explained: list[Explained]
    settled: list[Settled]
    n_skipped: int


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
    known : Known
    published_through : int
        All threshold peaks before this sample came out when there were no units yet; no spikes before it follow.
    """

    def __init__(
        self,
        config: SorterConfig,
        probe: Probe,
        sampling_frequency: float,
        channel_noise: Floats,
        known: Known,
        published_through: int,
    ) -> None:
        self._nearby = probe.distances_um() <= config.match.radius_um
        self._neighbors = probe.neighbors(config.snippets.radius_um, config.snippets.n_neighbors)
        self._threshold = config.detect.detect_threshold * _STILL_THERE
        self.channel_noise = divisor(channel_noise)
        self._same = round(_SAME_SPIKE_MS * sampling_frequency / 1000)
        self._published_through = published_through
        self.match = Match(config.match, probe.n_channels, sampling_frequency)
        # A spike not found yet may still be subtracted up to n_before earlier; only then is it certain what remains of a peak.
        self._hold = max(self._same, self.match.n_before)
        self.use(known)
        self._waiting: list[tuple[NDArray[Any], Floats, Floats]] = []  # peaks, snippets, noise level
        self._recent = np.zeros(0, MATCH_DTYPE)
        self._near_gap = np.zeros(0, np.int64)
        self._notes = Notes(known, [], [], [], [], 0)

    def warmup(self) -> None:
        """Compile the kernels that name peaks; those of matching have a warmup of their own."""
        self.explain(np.zeros(1, PEAK_DTYPE), np.zeros(1, MATCH_DTYPE))
        self._nearest(np.zeros(1, np.uint16), np.zeros((1, 1, self._neighbors.shape[1]), np.float32))

    @property
    def through_sample(self) -> int:
        """All spikes and peaks before it have come out."""
        return max(self.match.through_sample - self._hold, self._published_through)

    def use(self, known: Known) -> None:
        """Go by these units from now on; rows stay what they were, and more of them are new units."""
        self.known = known
        self.match.use(known.templates, known.threshold)

    def run_in(self, start_sample: int, traces: Floats) -> None:
        """Match what lies before the first batch, in noise units; its spikes do not count."""
        self.restart(start_sample)
        self._recent = self.match(traces)
        self.match.settled()

    def restart(self, start_sample: int) -> None:
        """Forget the traces, as after a gap."""
        self._recent = self._recent[:0]
        self.match.restart(start_sample)

    def __call__(self, batch: PeakBatch) -> NDArray[np.void]:
        """Take a batch; return the spikes decided now, all but their times: matches, and peaks that no unit explains.

        `sample_index` is that of the filtered traces. What there is to learn from is noted.
        """
        decided: list[NDArray[Any]] = []
        if batch.start_sample != self.match.next_sample and len(batch.traces):
            decided = self._decide(batch.start_sample)  # what came before a gap is not going to be explained any more
            self.restart(batch.start_sample)
        if len(self._near_gap) or np.count_nonzero(batch.near_gap):
            recent = self._near_gap >= self.match.through_sample - self.match.n_before
            self._near_gap = np.concatenate([self._near_gap[recent], batch.start_sample + np.flatnonzero(batch.near_gap)])
        matches = self.match(batch.traces, self.channel_noise)
        if len(batch.peaks):
            self._waiting.append((batch.peaks, batch.snippets, batch.noise_level))
        if len(matches):
            self._recent = join_records([self._recent, matches])
        decided += self._decide(self.through_sample)
        if len(matches):
            self._recent = self._recent[self._recent["sample_index"] > self.through_sample - 2 * self._same]
            decided = [*self._publish(matches[matches["sample_index"] >= self._published_through]), *decided]
        return join_records(decided) if decided else np.zeros(0, SPIKE_DTYPE)

    def hasten(self, batch: PeakBatch, through_sample: int, named: bool) -> NDArray[np.void]:
        """Take a batch without matching it; return its peaks, and those that waited, as spikes, all but their times.

        Parameters
        ----------
        batch : PeakBatch
        through_sample : int
            All its peaks lie before.
        named : bool
            Whether each gets the unit of the nearest template; else all are unsorted.
        """
        parts, *columns = zip(*self._waiting, (batch.peaks, batch.snippets, batch.noise_level), strict=True)
        self._waiting, self._published_through = [], through_sample
        peaks, snippets = join_records(parts), np.concatenate(columns[0])
        new = self.explain(peaks, self._recent) < 0
        spikes = as_spikes(peaks[new])
        if not named:
            spikes["flags"] |= int(Flag.UNTRIED)
            return spikes
        row, gain, second = self._nearest(spikes["channel"].copy(), snippets[new])
        sure = np.flatnonzero(row >= 0)
        sure = sure[gain[sure] > self.known.threshold[row[sure]]]
        over_noise, over_other = gain[sure] - self.known.threshold[row[sure]], gain[sure] - second[sure]
        spikes["unit_id"][sure] = self.known.unit_id[row[sure]]
        spikes["confidence"][sure] = _confidence(over_noise, over_other)
        spikes["flags"] |= int(Flag.NEAREST_TEMPLATE)
        return spikes

    def _nearest(self, channel: NDArray[np.uint16], snippets: Floats) -> tuple[NDArray[np.int32], Floats, Floats]:
        row = np.empty(len(channel), np.int32)
        gain, second = np.empty((2, len(channel)), np.float32)
        nearest(channel, snippets, self.channel_noise, self._neighbors, self.known.templates, row, gain, second)
        return row, gain, second

    def skip_gap(self, n_samples: int) -> None:
        """Note that so many samples never came."""
        self._notes = self._notes._replace(n_skipped=self._notes.n_skipped + n_samples)

    def take_notes(self) -> Notes:
        """Hand over what was noted since the last call, as at a learning boundary."""
        notes = self._notes._replace(settled=self.match.take_settled())
        self._notes = Notes(self.known, [], [], [], [], 0)
        return notes

    def _decide(self, through_sample: int) -> list[NDArray[np.void]]:
        """Decide the peaks before `through_sample`; return those that nothing explains, as unsorted spikes."""
        if not self._waiting or int(self._waiting[0][0]["sample_index"][0]) >= through_sample:
            return []
        parts, *columns = zip(*self._waiting, strict=True)
        peaks = join_records(parts)
        snippets, noise_level = map(np.concatenate, columns)
        n = int(np.searchsorted(peaks["sample_index"], through_sample))
        self._waiting = [(peaks[n:], snippets[n:], noise_level[n:])] if n < len(peaks) else []
        unit, strange = self._explain(peaks[:n])
        self._notes.explained.append(Explained(peaks[:n], snippets[:n], noise_level[:n], unit, strange))
        return [as_spikes(peaks[:n][unit < 0])]

    def _publish(self, matches: NDArray[np.void]) -> list[NDArray[np.void]]:
        """Note the matches, if there are any, and return them as spikes."""
        if not len(matches):
            return []
        spikes = self.spikes(matches)
        self._notes.spikes.append(spikes)
        self._notes.matches.append(matches)
        return [spikes]

    def explain(self, peaks: NDArray[Any], matches: NDArray[np.void]) -> Ints:
        """Return which of the matches each peak is, -1 for none."""
        return explain(peaks, matches, self.known.templates.channels[:, 0], self._nearby, self._same)

    def _explain(self, peaks: NDArray[Any]) -> tuple[Ints, NDArray[np.bool_]]:
        match = self.explain(peaks, self._recent)
        unit, least = np.full(len(peaks), UNSORTED, np.int64), np.full(len(peaks), self._threshold, np.float32)
        by = (match >= 0).nonzero()[0]
        if len(by):
            spikes = self._recent[match[by]]
            rows = spikes["row"]
            unit[by] = self.known.unit_id[rows]
            least[by] = np.maximum(least[by], _LEFTOVER * (spikes["amplitude"] * self.known.templates.height[rows]))
        strange = self.match.left(peaks["sample_index"], peaks["channel"]) > least
        unit[strange] = UNSORTED
        return unit, strange

    def spikes(self, matches: NDArray[np.void]) -> NDArray[np.void]:
        """Return matches as spikes, all but their times; sample_index is that of the filtered traces."""
        t, rows = self.known.templates, matches["row"]
        spikes = np.zeros(len(matches), SPIKE_DTYPE)
        spikes["sample_index"] = matches["sample_index"]
        spikes["unit_id"] = self.known.unit_id[rows]
        spikes["channel"] = t.channels[rows, 0]
        sign = np.sign(t.centred[rows, self.match.n_before, 0])
        spikes["amplitude_uv"] = sign * matches["amplitude"] * t.height[rows] * self.channel_noise[spikes["channel"]]
        spikes["flags"] = self.known.flags[rows] | np.where(matches["collision"] > 0, int(Flag.COLLISION), 0)
        if len(self._near_gap):
            ends = -self.match.n_before, self.match.n_after
            first, last = (np.searchsorted(self._near_gap, spikes["sample_index"] + k) for k in ends)
            spikes["flags"][last > first] |= int(Flag.NEAR_GAP)
        over_noise = matches["gain"] - self.known.threshold[matches["row"]]
        spikes["confidence"] = _confidence(over_noise, matches["gain"] - matches["runner_up"])
        return spikes


def _confidence(over_noise: Floats, over_other: Floats) -> Floats:
    """Return the probability that a unit is right: against noise, and against the next best unit, by so much gain over each."""
    # Overlapped by a spike taken off before, a unit may gain less than its rival; cut off what would overflow.
    worst = np.float32(-100)
    doubt = np.exp(-_CERTAINTY * np.maximum(over_noise, worst)) + np.exp(-_CERTAINTY * np.maximum(over_other, worst))
    confidence: Floats = (1 / (1 + doubt)).astype(np.float32)
    return confidence


def explain(
    peaks: NDArray[Any], matches: NDArray[np.void], home: NDArray[np.int32], nearby: NDArray[np.bool_], same_samples: int
) -> Ints:
    """Return which of the spikes each peak is, -1 for none: the nearest in time of those nearby, the earlier of two.

    Parameters
    ----------
    peaks : ndarray, shape (n_peaks,), PEAK_DTYPE
        In order of time.
    matches : ndarray, shape (n_spikes,), MATCH_DTYPE
    home : ndarray, shape (n_units,), int32
        Largest channel of each unit.
    nearby : ndarray, shape (n_channels, n_channels), bool
    same_samples : int
        They lie no further apart in time.
    """
    order = np.argsort(matches["sample_index"], kind="stable")
    spikes, found = matches[order], np.empty(len(peaks), np.int64)
    # Contiguous: a field's view of several records is another type to numba than that of one, and would be compiled for live.
    at, channel, spike_at = map(np.ascontiguousarray, (peaks["sample_index"], peaks["channel"], spikes["sample_index"]))
    nearest_spikes(at, channel, spike_at, home[spikes["row"]], nearby, same_samples, found)
    named: Ints = np.append(order, -1)[found]
    return named


def as_spikes(peaks: NDArray[Any]) -> NDArray[np.void]:
    """Return peaks as unsorted spikes, all but their times."""
    spikes = np.zeros(len(peaks), SPIKE_DTYPE)
    for name in ("sample_index", "channel", "amplitude_uv", "flags"):
        spikes[name] = peaks[name]
    spikes["unit_id"] = UNSORTED
    return spikes
