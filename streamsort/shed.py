"""What is left out when more comes than can be sorted in time, and in which order.

How long the chunk at hand has waited comes in, a level goes out; a stream sorts by it, says so in the ledger, counts the samples of
each level, and flags the spikes concerned. Acquisition is never held up:

    SORTED      everything
    NOT_TAUGHT  learning pauses: templates stay what they are, spikes are named as ever
    NEAREST     peaks are named by the nearest template, overlapping spikes are not taken apart; flag 64
    CROSSINGS   peaks are published as threshold crossings, with unit -1; flag 128

and only after that are chunks dropped, counted as gaps of kind `overrun`. The levels go up as fast as the wait grows, and down one
at a time, each after a second without a wait worth the name, so that they do not flicker.
"""

from enum import IntEnum

from streamsort.config import StreamConfig

_STEPS = 1.0, 3.0, 9.0  # times `shed_ms`, at which each level begins
_CALM_S = 1.0  # before the next lower level
_CALM = 0.5  # of `shed_ms`: a shorter wait is none


class Level(IntEnum):
    """How much is left out; each step includes those before it."""

    SORTED = 0
    NOT_TAUGHT = 1
    NEAREST = 2
    CROSSINGS = 3


class Shedder:
    """Choose the level of a stream.

    Parameters
    ----------
    config : StreamConfig

    Attributes
    ----------
    level : Level

    Examples
    --------
    >>> shedder = Shedder(StreamConfig(shed_ms=20.0))
    >>> [shedder.see(wait_s, at_s).name for at_s, wait_s in enumerate([0.005, 0.03, 0.2, 0.001, 0.001, 0.001, 0.001])]
    ['SORTED', 'NOT_TAUGHT', 'CROSSINGS', 'CROSSINGS', 'NEAREST', 'NOT_TAUGHT', 'SORTED']
    """

    def __init__(self, config: StreamConfig) -> None:
        self._begins = [step * config.shed_ms / 1e3 for step in _STEPS]
        self._calm = _CALM * config.shed_ms / 1e3
        self._calm_since: float | None = None
        self.level = Level.SORTED

    def see(self, waited_s: float, at_s: float) -> Level:
        """Return the level for a chunk that waited so long, at a time of the stream."""
        wanted = Level(sum(waited_s > begins for begins in self._begins))
        if wanted > self.level:
            self.level, self._calm_since = wanted, None
        elif waited_s > self._calm or self.level == Level.SORTED:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = at_s
        elif at_s - self._calm_since >= _CALM_S:
            self.level, self._calm_since = Level(self.level - 1), at_s
        return self.level
