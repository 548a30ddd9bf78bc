"""The compiled loop of assignment: which spike each peak is."""

from typing import Any

from numpy.typing import NDArray

from streamsort.kernels import Ints, kernel


@kernel
def nearest_spikes(
    peaks_at: NDArray[Any],
    peak_channels: Ints,
    spikes_at: NDArray[Any],
    spike_channels: Ints,
    nearby: NDArray[Any],
    same_samples: int,
    found: NDArray[Any],
) -> None:
    """Find the nearest spike in time of those no more than `same_samples` from each peak and on a channel nearby; -1 for none.

    Peaks and spikes are in order of time; of two as near the first wins.
    """
    first = 0
    for k in range(len(peaks_at)):
        while first < len(spikes_at) and spikes_at[first] < peaks_at[k] - same_samples:
            first += 1
        found[k], least, i = -1, same_samples + 1, first
        while i < len(spikes_at) and spikes_at[i] <= peaks_at[k] + same_samples:
            apart = abs(spikes_at[i] - peaks_at[k])
            if apart < least and nearby[spike_channels[i], peak_channels[k]]:
                found[k], least = i, apart
            i += 1
