"""The encoder that was replaced, heard on a sample of the stream that the new one sorts.

In come snapshots of the sorter under the new encoder; out comes how far the two still agree, and, if that falls below the gate by
more than chance explains, the way back. The units are those of the sorter, taken to the old space by the map found before the swap,
so they have moved there as they move now. Kept are the names of the last spikes that both have seen. No clock, no thread.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from streamsort.cluster import Prototypes
from streamsort.config import RefreshConfig
from streamsort.encode import Encoder
from streamsort.errors import StreamsortError
from streamsort.refresh import Agreement, Snapshot, Verdict, embed
from streamsort.reservoir import Period

_SURE = 3.0  # standard errors by which agreement must have fallen for a swap to be undone
_FEW = 20  # spikes are no evidence either way
_SAMPLE = 400  # peaks that the former encoder is shown at a time
_WINDOW = 1000  # peaks over which its agreement is taken


class Shadow:
    """Ask the former encoder for its opinion.

    Parameters
    ----------
    former : Snapshot
        From which the swap was prepared; its encoder is ours from now on.
    verdict : Verdict
        That was accepted.
    config : RefreshConfig

    Raises
    ------
    StreamsortError
        If the verdict is a refusal.
    """

    def __init__(self, former: Snapshot, verdict: Verdict, config: RefreshConfig) -> None:
        if verdict.back is None:
            raise StreamsortError(
                f"encoder {verdict.name}: was not accepted ({verdict.reason}), expected an encoder to go back from"
            )
        self._members, self._back, self._config = former.members, verdict.back, config
        self.encoder: Encoder = former.encoder
        prototypes = former.prototypes
        self._known = set(zip(prototypes.unit.tolist(), prototypes.channel.tolist(), strict=True))
        self._seen_through = -1
        self._names: NDArray[np.int64] = np.empty((0, 2), np.int64)  # what we call a peak, what it was published as

    def look(self, snapshot: Snapshot, stopped: Callable[[], bool] = lambda: False) -> tuple[Agreement, Verdict | None]:
        """Name what came since the last look; if the two do not agree any more, say how to go back.

        Parameters
        ----------
        snapshot : Snapshot
            Of the sorter under the new encoder.
        stopped : callable, optional
            As for `prepare`.

        Returns
        -------
        agreement : Agreement
            Over the last looks.
        verdict : Verdict or None
            Accepts the former encoder.
        """
        prototypes = snapshot.prototypes.in_space(self._back)
        new = [period for period in snapshot.periods if period.peaks["sample_index"][-1] > self._seen_through]
        n_new = sum(len(period.peaks) for period in new)
        for period in new:
            self._name(prototypes, period, min(_SAMPLE * len(period.peaks) // n_new + 1, len(period.peaks)), stopped)
        agreement = Agreement.of(*self._names.T)
        short = agreement.shortfall(self._config, _SURE) if agreement.n_spikes >= _FEW else ""
        if not short:
            return agreement, None
        name, sha256, reason = self.encoder.name, self.encoder.sha256, f"rolled back: {short}"
        return agreement, Verdict(name, sha256, reason, agreement, space=self._back, members=self._members)

    def _name(self, prototypes: Prototypes, period: Period, most: int, stopped: Callable[[], bool]) -> None:
        """Name so many of a period's peaks, evenly chosen."""
        self._seen_through = int(period.peaks["sample_index"][-1])
        chosen = np.linspace(0, len(period.peaks) - 1, most).astype(np.int64)
        channel, theirs = period.peaks["channel"][chosen], period.unit[chosen]
        ours = prototypes.predict(embed(self.encoder, period.snippets[chosen], stopped), channel).unit
        # What was born, or first went to a channel, after the swap is not for us to judge.
        pairs = zip(theirs.tolist(), channel.tolist(), strict=True)
        judged = np.array([unit < 0 or (unit, place) in self._known for unit, place in pairs])
        self._names = np.concatenate([self._names, np.stack([ours, theirs], axis=1)[judged]])[-_WINDOW:]
