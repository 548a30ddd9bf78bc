"""The compiled loop of naming peaks without matching: which template each is nearest to.

It costs as much for every peak as a few units near it do, whatever else is on the probe; so it is what remains when peaks come
faster than they can be matched.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.kernels import Floats, Ints, kernel

_ZERO = np.float32(0)


@kernel
def nearest(
    channel: NDArray[np.uint16], snippets: Floats, level: Floats, neighbors: Ints, t: Any, row: Ints, gain: Floats, second: Floats
) -> None:
    """Find the unit whose template lies nearest to each snippet.

    Parameters
    ----------
    channel : ndarray, shape (n_peaks,), uint16
    snippets : ndarray, shape (n_peaks, n_snippet_samples, n_neighbors), float32
        In uV, beginning as many samples before the peak as templates do.
    level : ndarray, shape (n_channels,), float32
        What is a noise unit on each channel.
    neighbors : ndarray, shape (n_channels, n_neighbors), int32
        Channels of a snippet, -1 for none.
    t : Templates
    row : ndarray, shape (n_peaks,), int32
        Written: the unit, -1 where silence is nearer than any.
    gain, second : ndarray, shape (n_peaks,), float32
        Written: by how much that unit, and the next best one, lies nearer than silence, as squared distances in noise units.
    """
    middle = t.shifted.shape[1] // 2
    for p in range(len(channel)):
        row[p], gain[p], second[p] = -1, _ZERO, _ZERO
        for u in range(len(t.energy)):
            if t.place[u, channel[p]] < 0:
                continue
            nearer = _ZERO
            for k in range(neighbors.shape[1]):
                c = neighbors[channel[p], k]
                m = t.place[u, c] if c >= 0 else -1
                if m < 0:
                    continue
                for j in range(snippets.shape[1]):
                    template = t.shifted[u, middle, j, m]
                    nearer += template * (np.float32(2) * snippets[p, j, k] / level[c] - template)
            if nearer > gain[p]:
                row[p], gain[p], second[p] = u, nearer, gain[p]
            elif nearer > second[p]:
                second[p] = nearer
