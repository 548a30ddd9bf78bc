"""How fast the kernels of the signal path are: against real time, against scipy and SpikeInterface, and against the core itself.

    python benchmarks/kernels.py --channels 32 128 384 1024 --chunk-ms 1 10 --json kernels.json

One second of a simulated recording (int16) is gone through in chunks, by CPU time of this thread, kept on one core. In every repeat
the following take turns on the same chunks, and the median over the repeats of each figure, ratios too, is reported:

- ours: fill and filter; these and the median reference; these and detection with the window it needs; and `Preprocess` and
  `Detect`, the stages of the sorter, with all the Python around the kernels;
- theirs: `scipy.signal.sosfilt` in float32 with its state carried along; this and the median in numpy; these and SpikeInterface's
  locally exclusive detector with its margins carried along. It is left out where SpikeInterface is not installed.

Each step finds what the one before it has left in the cache, so what it takes is the difference to the one before.

The roof is the time in which the core could do the work if nothing else were needed: the longer of what memory takes to move the
samples and of what the arithmetic takes at the peak rate of multiply-adds, both measured here. An operation counts as one whether
or not it could be fused with another, since the kernels may not fuse: their bits would depend on the machine. Of the search for the
median a single comparison is counted, though the exact one takes several.
"""

import argparse
import importlib
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from looped import simulation
from numba import njit
from numpy.typing import NDArray
from report import one_core, publish
from scipy.signal import butter, sosfilt

from streamsort.config import DetectConfig, PreprocessConfig
from streamsort.detect import Detect, Window
from streamsort.kernels import Floats
from streamsort.kernels import preprocess as kernels
from streamsort.kernels.detect import find_peaks
from streamsort.noise import mad
from streamsort.preprocess import Preprocess, aligned_zeros
from streamsort.probe import Probe
from streamsort.records import PEAK_DTYPE, StreamInfo
from streamsort.simulate import GAIN_UV, simulate_recording

RATE = 30000
PREPROCESS, DETECT = PreprocessConfig(reference="median"), DetectConfig()
SECTIONS = butter(
    PREPROCESS.filter_order, [PREPROCESS.freq_min_hz, PREPROCESS.freq_max_hz], "bandpass", output="sos", fs=RATE
).astype(np.float32)
SWEEP = round(DETECT.exclude_sweep_ms * RATE / 1000)
N_BEFORE, N_AFTER = 18, 30
WARMUP_SAMPLES = 2 * round(PREPROCESS.noise_s * RATE)

# Per sample and channel: int16 in and float32 out, into the window and out of it; scaling, sections, reference, two comparisons.
BYTES = 2 + 4 + 4 + 4
OPERATIONS = 2 + 9 * len(SECTIONS) + 1 + 2

COLUMNS = {
    "channels": "channels",
    "chunk_ms": "chunk ms",
    "filter_x": "filter x real time",
    "reference_x": "reference",
    "detect_x": "detect",
    "kernels_x": "together",
    "stages_x": "stages",
    "sosfilt_x": "scipy sosfilt",
    "median_x": "numpy median",
    "exclusive_x": "SpikeInterface detect",
    "ratio": "faster than sosfilt + detect",
    "ratio_all": "with median",
    "filter_over_roof": "filter / roof",
    "over_roof": "together / roof",
}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    args = _parse(arguments)
    exclusive = _exclusive_detector()
    with one_core():
        core = measure_core()
        recording = simulate_recording(simulation(384, args.seconds))
        results = []
        for n_channels in args.channels:
            traces, probe = spread_over(recording.traces, recording.probe, n_channels)
            results += [measure(traces, probe, ms, args.repeats, exclusive, core) for ms in args.chunk_ms]
    peers = {name: importlib.metadata.version(name) for name in ("scipy", "spikeinterface")[: 2 if exclusive else 1]}
    title = "kernels on one core" + ("" if exclusive else ", without SpikeInterface, which is not installed")
    publish(title, COLUMNS, results, args, core=core, peers=peers)
    print("The core: " + ", ".join(f"{value:.1f} {name.replace('_', ' ')}" for name, value in core.items()))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the kernels of the signal path.")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 128, 384, 1024])
    parser.add_argument("--chunk-ms", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of signal, gone through once per repeat (1)")
    parser.add_argument("--repeats", type=int, default=7, help="(7)")
    parser.add_argument("--json", metavar="FILE", help="where to write the results")
    return parser.parse_args(arguments)


def _exclusive_detector() -> Callable[..., Any] | None:
    try:
        module = importlib.import_module("spikeinterface.sortingcomponents.peak_detection.locally_exclusive")
    except ImportError:
        return None
    detector: Callable[..., Any] = module.detect_peaks_numba_locally_exclusive_on_chunk
    return detector


def spread_over(traces: NDArray[np.int16], probe: Probe, n_channels: int) -> tuple[NDArray[np.int16], Probe]:
    """Take the first channels of a recording; if there are too few, go on with the same ones further up, at another time."""
    n_copies = -(-n_channels // probe.n_channels)
    up = np.array([0.0, np.ptp(probe.channel_locations[:, 1]) + 20.0])
    copies = [np.roll(traces, k * len(traces) // n_copies, axis=0) for k in range(n_copies)]
    places = [probe.channel_locations + k * up for k in range(n_copies)]
    made = np.ascontiguousarray(np.concatenate(copies, axis=1)[:, :n_channels])
    return made, Probe(np.concatenate(places)[:n_channels], np.zeros(n_channels, np.int32))


def measure(
    traces: NDArray[np.int16],
    probe: Probe,
    chunk_ms: float,
    repeats: int,
    exclusive: Callable[..., Any] | None,
    core: dict[str, float],
) -> dict[str, Any]:
    """Measure one number of channels at one length of chunks."""
    size = round(chunk_ms * RATE / 1000)
    traces = traces[: len(traces) // size * size]
    traces.flags.writeable = False
    chunks = [traces[first : first + size] for first in range(0, len(traces), size)]
    plain = Filter(probe, size, kernels.REFERENCE_NONE, 1.0)
    spread_uv = float(np.median(mad(np.concatenate([plain(chunk).copy() for chunk in chunks]))))
    filters = Filter(probe, size, kernels.REFERENCE_MEDIAN, spread_uv)
    thresholds = mad(np.concatenate([filters(chunk).copy() for chunk in chunks])) * np.float32(DETECT.detect_threshold)
    detects, scipy_filters = Detection(probe, thresholds), ScipyFilter(probe.n_channels)
    passes: dict[str, Callable[[NDArray[np.int16]], Any]] = {
        "filter": plain,
        "referenced": filters,
        "kernels": lambda chunk: detects(filters(chunk)),
        "stages": Stages(traces, probe),
        "sosfilt": scipy_filters,
        "subtracted": lambda chunk: minus_median(scipy_filters(chunk)),
    }
    if exclusive is not None:
        theirs = Exclusive(exclusive, probe, thresholds)
        passes["theirs"] = lambda chunk: theirs(minus_median(scipy_filters(chunk)))
    lap = {name: 0.0 for name in passes}
    figures = []
    for repeat in range(repeats + 1):
        for name, work in passes.items():
            began = time.thread_time()
            for chunk in chunks:
                work(chunk)
            lap[name] = time.thread_time() - began
        if repeat:  # the first one compiles, and fills the caches
            figures.append(_figures(lap, len(traces), probe.n_channels, core))
    middle = {key: float(np.median([one[key] for one in figures])) for key in figures[0]}
    n_peaks = sum(detects(filters(chunk)) for chunk in chunks)
    return {"channels": probe.n_channels, "chunk_ms": chunk_ms, "n_peaks": n_peaks, **middle, "repeats": figures}


def _figures(lap: dict[str, float], n_samples: int, n_channels: int, core: dict[str, float]) -> dict[str, float]:
    def part(whole: str, before: str) -> float:
        return max(lap[whole] - lap[before], 1e-9)

    spent = {**lap, "reference": part("referenced", "filter"), "detect": part("kernels", "referenced")}
    spent["median"] = part("subtracted", "sosfilt")
    found = {}
    if "theirs" in lap:
        spent["exclusive"] = part("theirs", "subtracted")
        found["ratio"] = (lap["sosfilt"] + spent["exclusive"]) / lap["kernels"]
        found["ratio_all"] = lap["theirs"] / lap["kernels"]
    n_values = n_samples * n_channels
    found["filter_over_roof"] = lap["filter"] / roof_s(n_values, 2 + 4, 2 + 9 * len(SECTIONS), core)
    found["over_roof"] = lap["kernels"] / roof_s(n_values, BYTES, OPERATIONS, core)
    return found | {f"{name}_x": n_samples / RATE / seconds for name, seconds in spent.items()}


def minus_median(rows: Floats) -> Floats:
    """Subtract the median of every sample, in numpy."""
    referenced: Floats = rows - np.median(rows, axis=1, keepdims=True)
    return referenced


class Filter:
    """The preprocessing kernel with its arrays."""

    def __init__(self, probe: Probe, size: int, reference: int, spread_uv: float) -> None:
        n_channels = probe.n_channels
        self._channels = aligned_zeros(kernels.N_CHANNEL_ROWS, n_channels)
        self._channels[kernels.GAIN], self._channels[kernels.GOOD] = GAIN_UV, 1
        self._state, self._scratch = aligned_zeros(2 * len(SECTIONS), n_channels), aligned_zeros(2, n_channels)
        self._limits, self._hits = np.array([-32767, 32766], np.int16), np.zeros(n_channels, np.int64)
        self._out, self._unusable = aligned_zeros(size, n_channels), np.zeros(size, np.uint8)
        self._reference, self._spread = reference, spread_uv

    def __call__(self, raw: NDArray[np.int16]) -> Floats:
        """Filter a chunk; the result is overwritten by the next."""
        kernels.preprocess_rows(
            raw, self._limits, kernels.SATURATED, self._channels, SECTIONS, self._state,
            self._reference, self._spread, self._scratch, self._hits, self._out, self._unusable,
        )  # fmt: skip
        return self._out


class Detection:
    """The detection kernel with its window and arrays."""

    def __init__(self, probe: Probe, thresholds: Floats) -> None:
        self._thresholds, self._adjacency = thresholds, probe.neighbors(DETECT.radius_um)
        self._window = Window(probe.n_channels, 512)
        self._polarity = np.array([-1, -1], np.float32)
        self._peaks = np.zeros(2**16, PEAK_DTYPE)
        self._keep = N_BEFORE + N_AFTER - 1

    def __call__(self, rows: Floats) -> int:
        """Find the peaks that a chunk decides; return how many."""
        window = self._window
        window.append(rows, np.zeros(len(rows), np.uint8), self._keep)
        last = window.stop - N_AFTER + 1
        span = max(last - len(rows), window.start + N_BEFORE), max(last, window.start + N_BEFORE)
        spans = np.array([SWEEP, N_BEFORE, N_AFTER, window.origin, 0])
        n_peaks: int = find_peaks(
            window.traces, window.unusable, *span, self._thresholds, self._adjacency, self._polarity, spans, self._peaks
        )
        return n_peaks


class Stages:
    """`Preprocess` and `Detect`, as the sorter calls them, past the time in which they learn the noise level."""

    def __init__(self, traces: NDArray[np.int16], probe: Probe) -> None:
        gain_uv = np.full(probe.n_channels, GAIN_UV, np.float32)
        info = StreamInfo("simulated", float(RATE), probe.n_channels, traces.dtype, gain_uv, probe, False)
        self._preprocess = Preprocess(PREPROCESS, info, probe)
        self._detect = Detect(DETECT, probe, float(RATE), N_BEFORE, N_AFTER)
        self._next_sample = 0
        step = self._preprocess.period_samples // 10
        while self._next_sample < WARMUP_SAMPLES:
            self(np.take(traces, range(self._next_sample, self._next_sample + step), axis=0, mode="wrap"))

    def __call__(self, chunk: NDArray[np.int16]) -> NDArray[Any]:
        """Return the peaks that a chunk decides."""
        start, period = self._next_sample, self._preprocess.period_samples
        if start % period + len(chunk) > period:  # a chunk must not straddle
            start += period - start % period
        self._next_sample = start + len(chunk)
        filtered = self._preprocess(chunk, start)
        return self._detect(filtered, start, self._preprocess.noise_level, self._preprocess.unusable)


class ScipyFilter:
    """`scipy.signal.sosfilt`, in float32, from chunk to chunk."""

    def __init__(self, n_channels: int) -> None:
        self._state = np.zeros((len(SECTIONS), 2, n_channels), np.float32)

    def __call__(self, raw: NDArray[np.int16]) -> Floats:
        """Filter a chunk."""
        filtered: Floats
        filtered, self._state = sosfilt(SECTIONS, raw * np.float32(GAIN_UV), axis=0, zi=self._state)
        return filtered


class Exclusive:
    """SpikeInterface's locally exclusive detector, from chunk to chunk."""

    def __init__(self, detector: Callable[..., Any], probe: Probe, thresholds: Floats) -> None:
        self._detector, self._thresholds = detector, thresholds
        self._near = probe.distances_um() <= DETECT.radius_um
        self._kept = np.zeros((2 * (SWEEP + 1), probe.n_channels), np.float32)

    def __call__(self, rows: Floats) -> Any:
        """Return samples and channels of the peaks that a chunk decides."""
        rows = np.concatenate((self._kept, rows))
        self._kept = rows[-len(self._kept) :]
        return self._detector(rows, "neg", self._thresholds, SWEEP, self._near)


def roof_s(n_values: int, n_bytes: int, n_operations: int, core: dict[str, float]) -> float:
    """Return the time that moving and computing take at least."""
    return n_values * max(n_bytes / core["GB/s_copied_in_the_second_cache"], n_operations / core["1e9_multiply-adds_per_s"]) / 1e9


def measure_core() -> dict[str, float]:
    """Measure what the core can do at best: bytes read and written by copies, and fused multiply-adds per second."""
    values = aligned_zeros(1, 256)[0]
    rates = {"1e9_multiply-adds_per_s": 2000 * 16 * values.size / _least_s(_multiply_add, values, 2000)}
    for name, n_bytes in (("the_second_cache", 2**18), ("memory", 2**26)):
        a, b = aligned_zeros(2, n_bytes // 8)
        n_rounds = 2**28 // n_bytes
        rates[f"GB/s_copied_in_{name}"] = n_rounds * n_bytes / _least_s(_copy, a, b, n_rounds)
    return {name: rate / 1e9 for name, rate in rates.items()}


def _least_s(kernel: Callable[..., None], *arguments: Any) -> float:
    spent = []
    for _ in range(8):
        began = time.thread_time()
        kernel(*arguments)
        spent.append(time.thread_time() - began)
    return min(spent[1:])  # the first one compiles


@njit(error_model="numpy", fastmath={"contract"})
def _multiply_add(values: Floats, n_rounds: int) -> None:
    factor, more = np.float32(0.999), np.float32(0.001)
    for _ in range(n_rounds):
        for i in range(values.size):
            x = values[i]
            for _ in range(16):
                x = x * factor + more
            values[i] = x


@njit(error_model="numpy")
def _copy(a: Floats, b: Floats, n_rounds: int) -> None:
    for _ in range(n_rounds):
        for i in range(a.size):
            b[i] = a[i]


if __name__ == "__main__":
    main()
