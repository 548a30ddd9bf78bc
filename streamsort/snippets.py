"""Cut the samples around each peak on the channels near it.

In come peaks and the detector's rolling window, out goes (n_peaks, n_snippet_samples, n_neighbors) float32 in uV with the peak
channel in column 0 and the peak sample in row `n_before`. There is no state: the detector holds a peak back until its whole window
is there.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.config import SnippetConfig
from streamsort.detect import Window
from streamsort.kernels.detect import cut_snippets
from streamsort.probe import Probe
from streamsort.records import PEAK_DTYPE


class Snippets:
    """Cut snippets out of the detector's window.

    Parameters
    ----------
    config : SnippetConfig
    probe : Probe
    sampling_frequency : float
        In Hz; the two durations are rounded to whole samples, each at least 1.

    Attributes
    ----------
    n_before, n_after : int
        A snippet is samples [peak - n_before, peak + n_after).
    neighbors : ndarray, shape (n_channels, n_neighbors), int32
        Channel of each column for a peak on each channel, nearest first, -1 where a probe has no more.
    """

    def __init__(self, config: SnippetConfig, probe: Probe, sampling_frequency: float) -> None:
        self.n_before = max(round(config.ms_before * sampling_frequency / 1000), 1)
        self.n_after = max(round(config.ms_after * sampling_frequency / 1000), 1)
        self.neighbors = probe.neighbors(config.radius_um, config.n_neighbors)
        self._cut(Window(probe.n_channels, 1), np.zeros(0, PEAK_DTYPE), self._empty(0))  # compiles

    def __call__(self, window: Window, peaks: NDArray[Any]) -> NDArray[np.float32]:
        """Cut one snippet per peak.

        Parameters
        ----------
        window : Window
            `Detect.window`, before the detector's next call.
        peaks : ndarray, shape (n_peaks,), PEAK_DTYPE
            What that detector returned.

        Returns
        -------
        snippets : ndarray, shape (n_peaks, n_snippet_samples, n_neighbors), float32
            In uV; a new array.
        """
        snippets = self._empty(len(peaks))
        if len(peaks):  # at 1 ms most chunks have none
            self._cut(window, peaks, snippets)
        return snippets

    def _empty(self, n_peaks: int) -> NDArray[np.float32]:
        return np.empty((n_peaks, self.n_before + self.n_after, self.neighbors.shape[1]), np.float32)

    def _cut(self, window: Window, peaks: NDArray[Any], snippets: NDArray[np.float32]) -> None:
        cut_snippets(window.traces, window.origin, peaks, self.neighbors, self.n_before, snippets)
