"""Which unit each spike is of, once there are units.

In come batches of traces with their threshold peaks, embedded; out go spikes. Template matching names the spikes, also those that
overlap and those too small for the threshold; a peak that is still there when all of them are subtracted is published as unsorted.
A peak that a spike explains lends its embedding to that unit, an unexplained one may be the first of a new unit. State is the
matcher's window and the peaks whose surroundings are not decided yet; nothing is learned here.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamsort.bank import Bank
from streamsort.cluster import Assignment
from streamsort.config import SorterConfig
from streamsort.match import MATCH_DTYPE, Match
from streamsort.records import SPIKE_DTYPE, UNSORTED, Flag, PeakBatch

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

SAME_SPIKE_MS = 0.3  # a peak so near a spike, on one of its channels, is that spike
_STILL_THERE = 0.9  # of the detection threshold: what remains of a peak after subtraction, or it counts as explained
_CERTAINTY = 0.5  # of a gain, the log-likelihood; less would call confident spikes doubtful (measured: see the README's calibration)


class Explained(NamedTuple):
    """Peaks whose spikes are decided, row by row.

    `unit` is the unit of the spike that explains it; -1 for none, such peaks are published as unsorted. `strange` are those of which
    most is still there when all spikes are subtracted.
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
    n_channels : int
    sampling_frequency : float
    channel_noise : ndarray, shape (n_channels,), float32
        Noise level in uV that makes the templates' noise units; it stays what it was at calibration, so templates need not change
        with it.
    bank : Bank
    unit_ids : sequence of int
        Published id of each of its rows.

    Attributes
    ----------
    unit_ids : list of int
        Grows with the bank; -1 for rows that ended.
    """

    def __init__(
        self, config: SorterConfig, n_channels: int, sampling_frequency: float, channel_noise: Floats, bank: Bank, unit_ids: list[int]
    ) -> None:
        self._threshold = config.detect.detect_threshold * _STILL_THERE
        self.channel_noise = self._noise = np.where(channel_noise > 0, channel_noise, np.float32(np.inf)).astype(np.float32)
        self._same = round(SAME_SPIKE_MS * sampling_frequency / 1000)
        self.bank, self.unit_ids = bank, unit_ids
        self.match = Match(config.match, n_channels, sampling_frequency)
        self.refresh()
        self._waiting: list[tuple[PeakBatch, Assignment]] = []
        self._recent = np.zeros(0, MATCH_DTYPE)

    @property
    def hold_samples(self) -> int:
        """How long after the matcher's decision a peak waits for the spike that explains it."""
        return self._same

    @property
    def through_sample(self) -> int:
        """All spikes and peaks before it have come out."""
        return self.match.through_sample - self._same

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
        self.match.restart(start_sample)
        self.refresh()

    def __call__(self, batch: PeakBatch, assignment: Assignment) -> tuple[NDArray[np.void], Explained | None]:
        """Take a batch with what its embeddings say; return matched spikes, and the peaks that are decided now."""
        self._waiting.append((batch, assignment))
        if batch.start_sample != self.match.next_sample and len(batch.traces):
            explained = self._decide(batch.start_sample)  # what came before a gap is not going to be explained any more
            self.restart(batch.start_sample)
            matches = self.match(batch.traces / self._noise)
            return matches, explained
        matches = self.match(batch.traces / self._noise)
        self._recent = np.concatenate([self._recent, matches])
        return matches, self._decide(self.through_sample)

    def _decide(self, through_sample: int) -> Explained | None:
        """Decide the peaks before `through_sample`."""
        ready = [item for item in self._waiting if len(item[0].peaks)]
        if not ready or int(ready[0][0].peaks["sample_index"][0]) >= through_sample:
            self._waiting = ready
            return None
        peaks = np.concatenate([batch.peaks for batch, _ in ready])
        snippets = np.concatenate([batch.snippets for batch, _ in ready])
        noise_level = np.concatenate([batch.noise_level for batch, _ in ready])
        assignment = Assignment.join([one for _, one in ready])
        n = int(np.searchsorted(peaks["sample_index"], through_sample))
        rest = PeakBatch(0, 0, peaks[n:], snippets[n:], noise_level[n:], snippets[:0, 0], None)
        self._waiting = [(rest, assignment.take(slice(n, None)))]
        unit, strange = self._explain(peaks[:n])
        self._recent = self._recent[self._recent["sample_index"] > through_sample - 2 * self._same]
        return Explained(peaks[:n], assignment.take(slice(0, n)), snippets[:n], noise_level[:n], unit, strange)

    def _explain(self, peaks: NDArray[Any]) -> tuple[Ints, NDArray[np.bool_]]:
        strange = np.zeros(len(peaks), bool)
        for k, (sample_index, channel) in enumerate(zip(peaks["sample_index"].tolist(), peaks["channel"].tolist(), strict=True)):
            left = self.match.residual(sample_index, sample_index + 1)[channel]
            strange[k] = len(left) == 1 and abs(float(left[0])) > self._threshold
        row = explain(peaks, self._recent, self.bank.templates.place, self._same)
        unit = np.array([*self.unit_ids, UNSORTED], np.int64)[row]
        return np.where(strange, UNSORTED, unit), strange

    def forget_embeddings(self) -> None:
        """Let no peak that still waits teach anything: it was embedded by another encoder."""
        self._waiting = [(batch, Assignment.blank(len(batch.peaks), one.white.shape[1])) for batch, one in self._waiting]

    def spikes(self, matches: NDArray[np.void]) -> NDArray[np.void]:
        """Return matches as spikes, all but their times; sample_index is that of the filtered traces."""
        t, rows = self.bank.templates, matches["row"]
        spikes = np.zeros(len(matches), SPIKE_DTYPE)
        spikes["sample_index"] = matches["sample_index"]
        spikes["unit_id"] = np.array(self.unit_ids, np.int64)[rows]
        spikes["channel"] = t.channels[rows, 0]
        waveform = t.centred[rows][:, :, 0]
        trough = np.take_along_axis(waveform, np.abs(waveform).argmax(axis=1)[:, None], axis=1)[:, 0]
        spikes["amplitude_uv"] = matches["amplitude"] * trough * self._noise[spikes["channel"]]
        spikes["flags"] = np.where(matches["collision"] > 0, int(Flag.COLLISION), 0)
        spikes["confidence"] = self._confidence(matches)
        return spikes

    def _confidence(self, matches: NDArray[np.void]) -> Floats:
        """Return the probability that the unit is right: against noise, and against the next best unit."""
        over_noise = matches["gain"] - self.bank.threshold[matches["row"]]
        over_other = matches["gain"] - matches["runner_up"]
        doubt = np.exp(-_CERTAINTY * over_noise) + np.exp(-_CERTAINTY * over_other)
        confidence: Floats = (1 / (1 + doubt)).astype(np.float32)
        return confidence


def explain(peaks: NDArray[Any], matches: NDArray[np.void], place: NDArray[np.int32], same_samples: int) -> Ints:
    """Return the row of the unit whose spike each peak is, -1 for none: the nearest in time on whose channels it lies."""
    order = np.argsort(matches["sample_index"], kind="stable")
    ordered = matches[order]
    low = np.searchsorted(ordered["sample_index"], peaks["sample_index"] - same_samples)
    high = np.searchsorted(ordered["sample_index"], peaks["sample_index"] + same_samples, side="right")
    row = np.full(len(peaks), -1, np.int64)
    for k, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        near = ordered[a:b]
        near = near[place[near["row"], peaks["channel"][k]] >= 0]
        if len(near):
            row[k] = near["row"][np.abs(near["sample_index"] - peaks["sample_index"][k]).argmin()]
    return row
