"""Everything that is compiled, a file per stage, and the two decorators that compile it.

A kernel takes contiguous arrays and constants and writes into arrays its caller allocated: no allocation, no GIL, no thread. No
kernel calls one of another file, because Numba's cache does not notice that a callee elsewhere was edited.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

kernel: Callable[..., Any] = njit(nogil=True, cache=True, error_model="numpy")
# A reduction over one row may be reordered; naming the set keeps isnan, which fastmath=True would delete.
reduction: Callable[..., Any] = njit(
    nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp", "afn"}
)
