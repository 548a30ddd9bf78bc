"""What crosses the boundaries between stages: plain records, no behaviour beyond arithmetic.

A `Chunk` comes out of a source, a `PeakBatch` goes from detection to assignment, an `Output` goes to the sinks. Sample indices are
absolute (int64 since stream start) everywhere but inside the detection kernel. Times are seconds on the host's monotonic clock, and
every chunk carries its own estimate of when sample 0 was (`t_origin`), so a sample is dated without asking a clock:
`time = t_origin + sample_index / sampling_frequency`. A file has `t_origin = 0`, which makes its spike times exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntFlag
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # a client needs the records, not the geometry
    from streamsort.probe import Probe

# One threshold event before it has an identity.
PEAK_DTYPE = np.dtype([("sample_index", "<i8"), ("channel", "<u2"), ("flags", "<u2"), ("amplitude_uv", "<f4")])

# The record of wire format 1: 32 bytes, little-endian, no padding.
SPIKE_DTYPE = np.dtype(
    [
        ("sample_index", "<i8"),
        ("time", "<f8"),
        ("unit_id", "<i4"),
        ("channel", "<u2"),
        ("flags", "<u2"),
        ("amplitude_uv", "<f4"),
        ("confidence", "<f4"),
    ]
)

UNSORTED = -1


def join_records(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Put record arrays of one dtype one after the other; np.concatenate takes 20 us to compare their fields, this 1 us."""
    return np.frombuffer(bytearray(b"".join(part.tobytes() for part in parts)), parts[0].dtype)


class Flag(IntFlag):
    """Bits of the `flags` field of a spike (wire format 1)."""

    LATE = 1
    NEAR_GAP = 2
    BLANKED = 4
    COLLISION = 8
    PROBATION = 16
    LIGHT_ENCODER = 32
    NEAREST_TEMPLATE = 64
    UNTRIED = 128


GapKind = Literal["gap", "duplicate", "reorder", "nan", "saturation", "overrun"]


@dataclass(frozen=True)
class Gap:
    """One breach of continuity, as it is published and logged.

    `n_samples` counts the samples concerned: missing (gap, overrun), thrown away (duplicate, reorder) or not usable as they came
    (nan, saturation: time steps in which at least one channel was hit).
    """

    start_sample: int
    n_samples: int
    kind: GapKind


@dataclass(frozen=True)
class StreamInfo:
    """What a source knows before its first chunk.

    `gain_uv` is (n_channels,) float32: microvolts per unit of `traces`. `live` sources cannot wait: when the sorter is behind,
    chunks are dropped and counted, while a file is simply read more slowly.
    """

    name: str
    sampling_frequency: float
    n_channels: int
    dtype: np.dtype[Any]
    gain_uv: NDArray[np.float32]
    probe: "Probe | None"
    live: bool


@dataclass(frozen=True)
class Chunk:
    """Contiguous samples delivered together.

    Attributes
    ----------
    start_sample : int
        Absolute index of the first row; the chunk covers [start_sample, end_sample).
    traces : ndarray, shape (n_samples, n_channels), int16 or float32
        As the source delivers them, C-order; multiply by `StreamInfo.gain_uv` for microvolts. Never written by a stage.
    t_origin : float
        Estimate of the host-clock time (s) of sample 0 of the stream; 0 for a file.
    t_acquired : float
        Host-clock time (s) at which the chunk was in our hands.
    gaps : tuple of Gap
        What the source found wrong since the chunk before.
    """

    start_sample: int
    traces: NDArray[Any]
    t_origin: float = 0.0
    t_acquired: float = 0.0
    gaps: tuple[Gap, ...] = ()

    @property
    def n_samples(self) -> int:
        return int(self.traces.shape[0])

    @property
    def end_sample(self) -> int:
        return self.start_sample + self.n_samples

    @staticmethod
    def joined(chunks: Sequence["Chunk"]) -> list["Chunk"]:
        """Return chunks with those that follow one another without a gap made one, as old as its first."""
        runs: list[list[Chunk]] = []
        for chunk in chunks:
            last = runs[-1][-1] if runs else chunk
            alike = chunk.traces.dtype == last.traces.dtype and chunk.traces.shape[1:] == last.traces.shape[1:]
            if runs and chunk.start_sample == last.end_sample and alike and not chunk.gaps:
                runs[-1].append(chunk)
            else:
                runs.append([chunk])
        return [replace(run[0], traces=np.concatenate([one.traces for one in run])) if len(run) > 1 else run[0] for run in runs]


@dataclass(frozen=True)
class PeakBatch:
    """What detection hands to assignment: all peaks whose look-ahead ended in [start_sample, through_sample).

    `peaks` is (n_peaks,) PEAK_DTYPE in order of (sample_index, channel); `snippets` is (n_peaks, n_snippet_samples, n_neighbors)
    float32 uV, zero where a probe has fewer neighbours; `noise_level` is (n_peaks, n_neighbors) float32 uV, of each snippet's
    channels when the peak was found, 0 where there is none. `traces` is the stretch itself, (n_samples, n_channels) float32 uV,
    filtered; `near_gap` (n_samples,) bool, which of its samples follow the start or a gap closely or were not usable;
    `channel_noise` is (n_channels,) float32 uV, or None before it is known. A batch never straddles a learning boundary.
    """

    start_sample: int
    through_sample: int
    peaks: NDArray[Any]
    snippets: NDArray[np.float32]
    noise_level: NDArray[np.float32]
    traces: NDArray[np.float32]
    near_gap: NDArray[np.bool_]
    channel_noise: NDArray[np.float32] | None
    t_origin: float = 0.0
    t_acquired: float = 0.0
    gaps: tuple[Gap, ...] = ()


@dataclass
class Output:
    """What the sinks receive.

    Every spike with `sample_index < through_sample` has been emitted, in this output or before. `units` and `status` are there only
    when they are due (once a second), else None. `model` is the encoder that named the spikes. The times are when, by the host's
    clock, the chunk was in our hands, its peaks were found and its spikes named; `compute_s` is the processor time that took.
    """

    through_sample: int
    spikes: NDArray[Any]
    ledger: list[dict[str, Any]] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    units: list[dict[str, Any]] | None = None
    status: dict[str, Any] | None = None
    t_acquired: float = 0.0
    t_detected: float = 0.0
    t_assigned: float = 0.0
    compute_s: float = 0.0
    model: str = ""
