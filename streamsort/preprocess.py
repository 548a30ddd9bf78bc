"""Raw samples to referenced, band-passed microvolts, and the noise level of every channel.

In come int16 or float32 samples as a source delivers them, out go float32 traces in uV. State: two values per filter section and
channel, each channel's first and last good value, the noise level, which channels are bad, and the whitening weights. All of it but
the filter's changes only at multiples of `period_samples` of the absolute sample_index (at the end of a gap, if the gap took the
multiple with it), and the filter runs sample by sample, so any chunking gives the same bits. Whoever calls it cuts chunks at those
multiples.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, sosfilt

from streamsort.config import PreprocessConfig
from streamsort.errors import StreamsortError
from streamsort.kernels import preprocess as kernels
from streamsort.noise import NoiseLevel, RowCollector, Whitening, find_good_channels, mad, subtract_reference
from streamsort.probe import Probe
from streamsort.records import Gap, GapKind, StreamInfo

_REFERENCES = {"none": kernels.REFERENCE_NONE, "mean": kernels.REFERENCE_MEAN, "median": kernels.REFERENCE_MEDIAN}
_MIN_MEDIAN_CHANNELS = 16  # "auto": with fewer, the median takes a visible part of each spike away
_MIN_REFERENCE_CHANNELS = 3  # with fewer good ones a reference would mostly be the channel itself
_LARGEST_UV = 1e9  # a float beyond a kilovolt is no measurement, and could overflow the filter for good
_SETTLE_S = 0.05  # what follows a start or a gap this closely does not count for the noise level
_FIRST_ROWS, _PERIOD_ROWS = 4096, 256  # samples per estimate: errors of 1.8 % and 7 %, the latter averaged over many periods
_IDENTITY = [[1.0, 0.0, 0.0, 1.0, 0.0, 0.0]]
_MOST_UNUSABLE = 0.5  # a channel with more of its samples unusable in a period is bad


class Preprocess:
    """Scale, fill, band-pass, reference and (if asked) whiten a stream.

    The filter is a causal Butterworth band-pass started at the first value of each channel, so that an offset does not ring. A
    value that is not finite (or beyond 1e9 uV) is replaced by the channel's last good one. Until the noise level is known, at the
    first multiple of `period_samples` that is `noise_s` after the first sample, traces are filtered only; from then on the
    reference over the good channels is subtracted (if there are 3 of them) and bad ones are zeroed. A channel is bad, for good,
    when its noise level was then 0, below 0.1 or above 5 times the median one, or as soon as more than half of its samples of a
    period were not usable.

    Parameters
    ----------
    config : PreprocessConfig
    info : StreamInfo
        Sampling frequency, dtype (int16 or float32) and gains of the stream.
    probe : Probe
        Used for whitening.

    Attributes
    ----------
    period_samples : int
        A call's samples must not straddle a multiple of it.
    delay_samples : int
        By how much the causal filter shifts the trough of a spike; subtract it from the sample_index of peaks.
    unusable : ndarray, shape (n_samples,), uint8
        Per sample of the last call: bits NONFINITE and SATURATED (int16 at either end of its range) on any good channel.
    gaps : list of Gap
        Runs of such samples in the last call, of kind "nan" and "saturation".
    n_nonfinite, n_saturated : int
        How many samples of the last call these are.

    Raises
    ------
    StreamsortError
        If dtype, gains, probe or sampling frequency do not fit.
    """

    def __init__(self, config: PreprocessConfig, info: StreamInfo, probe: Probe) -> None:
        _check(config, info, probe)
        self._config, self._info, self._probe = config, info, probe
        n_channels, rate = info.n_channels, info.sampling_frequency
        self.period_samples = max(round(config.noise_period_s * rate), 1)
        self._noise_samples = max(round(config.noise_s * rate), 1)
        self._settle_samples = round(_SETTLE_S * rate)
        sections = butter(config.filter_order, [config.freq_min_hz, config.freq_max_hz], "bandpass", output="sos", fs=rate)
        self.delay_samples = _delay_samples(sections, rate)
        sections = np.concatenate((sections, _IDENTITY))[: max(len(sections), 2)]  # the kernel takes the first two in one step
        self._sections = sections.astype(np.float32)
        self._state = aligned_zeros(2 * len(sections), n_channels)
        self._channels = aligned_zeros(kernels.N_CHANNEL_ROWS, n_channels)
        self._channels[kernels.GAIN] = info.gain_uv
        self._channels[kernels.GOOD] = 1
        self._limits = _limits(info)
        self._fault = kernels.SATURATED if info.dtype == np.int16 else kernels.NONFINITE
        self._reference, self._spread = kernels.REFERENCE_NONE, 1.0
        self._scratch = aligned_zeros(2, n_channels)
        self._hits, self._n_seen = np.zeros(n_channels, np.int64), 0
        self._whitening: Whitening | None = None
        self._unreferenced = RowCollector(self._noise_samples // _FIRST_ROWS | 1)
        self._noise = NoiseLevel(self.period_samples // _PERIOD_ROWS | 1, 0.5 ** (config.noise_period_s / config.noise_halflife_s))
        self._next_sample = self._next_update = -1
        self._settled_sample = 0
        self._filter(np.zeros((0, n_channels), info.dtype), 0)  # compiles

    @property
    def noise_level(self) -> NDArray[np.float32] | None:
        """Noise level in uV, (n_channels,) float32; None until it is known; replaced, never changed in place."""
        return self._noise.level

    @property
    def bad_channels(self) -> NDArray[np.bool_]:
        """Mask of the channels left out, (n_channels,) bool."""
        bad: NDArray[np.bool_] = self._channels[kernels.GOOD] == 0
        return bad

    def reset(self) -> None:
        """Start the filter anew at the next sample, as after a gap; noise level, bad channels and whitening are kept."""
        self._next_sample = -1

    def __call__(self, traces: NDArray[Any], start_sample: int) -> NDArray[np.float32]:
        """Preprocess the next samples.

        Parameters
        ----------
        traces : ndarray, shape (n_samples, n_channels), int16 or float32
            As the source delivers them; read-only.
        start_sample : int
            sample_index of the first row; when it does not follow the last call's samples, this is a gap and works like `reset`.

        Returns
        -------
        traces : ndarray, shape (n_samples, n_channels), float32
            In uV; a new array.

        Raises
        ------
        StreamsortError
            If shape or dtype differ from the stream's, or the samples straddle a multiple of `period_samples`.
        """
        self._check_chunk(traces, start_sample)
        if start_sample != self._next_sample:
            self._restart(start_sample)
        self._next_sample = start_sample + len(traces)
        if len(traces) and start_sample >= self._next_update:
            self._adapt(start_sample)
        out = self._filter(traces, start_sample)
        skip = max(self._settled_sample - start_sample, 0)
        collector = self._unreferenced if self._noise.level is None else self._noise
        collector.add(out[skip:], start_sample + skip)
        return out

    def _check_chunk(self, traces: NDArray[Any], start_sample: int) -> None:
        if traces.ndim != 2 or traces.shape[1] != self._info.n_channels or traces.dtype != self._info.dtype:
            raise StreamsortError(
                f"traces have shape {traces.shape} and dtype {traces.dtype}, "
                f"expected (n_samples, {self._info.n_channels}) and {self._info.dtype}"
            )
        if start_sample % self.period_samples + len(traces) > self.period_samples:
            raise StreamsortError(
                f"samples [{start_sample}, {start_sample + len(traces)}) straddle a multiple of {self.period_samples}, "
                "expected chunks cut there"
            )

    def _restart(self, start_sample: int) -> None:
        self._state[:] = 0
        self._channels[[kernels.BASE, kernels.LAST, kernels.PRIMED]] = 0
        self._settled_sample = start_sample + self._settle_samples
        if self._next_update < 0:
            ready = start_sample + self._noise_samples
            self._next_update = -(-ready // self.period_samples) * self.period_samples

    def _adapt(self, start_sample: int) -> None:
        """Change what may change only at multiples of the period."""
        self._next_update = (start_sample // self.period_samples + 1) * self.period_samples
        good = ~self.bad_channels
        usable = good & (self._hits <= _MOST_UNUSABLE * self._n_seen)
        if 2 * usable.sum() < good.sum():  # most at once: the stream is in trouble, not its channels
            usable = good
        self._hits[:], self._n_seen = 0, 0
        if self._noise.level is None:
            self._calibrate(usable)
        else:
            self._set_good(usable)
            self._noise.update(usable)

    def _calibrate(self, usable: NDArray[np.bool_]) -> None:
        """Decide bad channels, whitening and the first noise level; without one good channel, wait another period."""
        rows = self._unreferenced.take()
        if rows is None:
            return
        good = find_good_channels(rows, usable, self._reference_name(usable))
        if not good.any():
            return
        rows = subtract_reference(rows, good, self._reference_name(good))
        if self._config.whiten:
            self._whitening = Whitening(rows, good, self._probe)
            self._whitening(rows)
        level = mad(rows)
        self._spread = float(np.median(level[good]))
        self._set_good(good)
        self._noise.start(level, good)

    def _reference_name(self, good: NDArray[np.bool_]) -> str:
        name: str = self._config.reference
        if name == "auto":
            name = "median" if len(good) >= _MIN_MEDIAN_CHANNELS else "none"
        return name if good.sum() >= _MIN_REFERENCE_CHANNELS else "none"

    def _set_good(self, good: NDArray[np.bool_]) -> None:
        self._channels[kernels.GOOD] = good
        self._reference = _REFERENCES[self._reference_name(good)]

    def _filter(self, traces: NDArray[Any], start_sample: int) -> NDArray[np.float32]:
        flags = traces.flags
        if not (flags.c_contiguous and flags.aligned):
            traces = traces.copy()
        raw = traces.view()
        raw.setflags(write=False)  # a read-only and a writeable array would each compile a kernel of their own
        out = np.empty(traces.shape, np.float32)
        self.unusable = np.empty(len(traces), np.uint8)
        n_unusable = kernels.preprocess_rows(
            raw, self._limits, self._fault, self._channels, self._sections, self._state,
            self._reference, self._spread, self._scratch, self._hits, out, self.unusable,
        )  # fmt: skip
        if self._whitening is not None:
            self._whitening(out)
        self._n_seen += len(traces)
        self.gaps: list[Gap] = []
        self.n_nonfinite = self.n_saturated = 0
        if n_unusable:
            self._report(start_sample)
        return out

    def _report(self, start_sample: int) -> None:
        nonfinite, saturated = self.unusable & kernels.NONFINITE != 0, self.unusable & kernels.SATURATED != 0
        self.n_nonfinite, self.n_saturated = int(nonfinite.sum()), int(saturated.sum())
        self.gaps = _runs(nonfinite, start_sample, "nan") + _runs(saturated, start_sample, "saturation")


def _runs(hit: NDArray[np.bool_], start_sample: int, kind: GapKind) -> list[Gap]:
    edges = np.flatnonzero(np.diff(hit, prepend=False, append=False))
    return [Gap(start_sample + int(first), int(last - first), kind) for first, last in edges.reshape(-1, 2)]


def aligned_zeros(n_rows: int, n_channels: int) -> NDArray[np.float32]:
    """Allocate rows that start where a cache line does: vectors across two lines make the filter 1.5 times as slow."""
    n_bytes = 4 * n_rows * n_channels
    buffer = np.zeros(n_bytes + 63, np.uint8)
    first = -buffer.ctypes.data % 64
    return buffer[first : first + n_bytes].view(np.float32).reshape(n_rows, n_channels)


def _limits(info: StreamInfo) -> NDArray[Any]:
    """Return the lowest and the highest usable value; int16 is saturated at either end of its range."""
    if info.dtype == np.int16:
        return np.array([-32767, 32766], np.int16)
    real = np.finfo(np.float32)
    largest = min(_LARGEST_UV / max(float(np.abs(info.gain_uv).max()), float(real.tiny)), float(real.max))
    return np.array([-largest, largest], np.float32)


def _delay_samples(sections: NDArray[np.float64], sampling_frequency: float) -> int:
    """Measure the shift of the trough of a usual spike: 0.3 ms wide, followed by a slower, smaller hump."""
    time_ms = np.arange(-5.0, 5.0, 1000 / sampling_frequency)
    spike = 0.3 * np.exp(-(((time_ms - 0.4) / 0.3) ** 2)) - np.exp(-((time_ms / 0.15) ** 2))
    return int(np.argmin(sosfilt(sections, spike)) - np.argmin(spike))


def _check(config: PreprocessConfig, info: StreamInfo, probe: Probe) -> None:
    if info.dtype not in (np.dtype(np.int16), np.dtype(np.float32)):
        raise StreamsortError(f"stream {info.name}: dtype {info.dtype}, expected int16 or float32")
    if info.gain_uv.shape != (info.n_channels,) or not np.isfinite(info.gain_uv).all():
        raise StreamsortError(
            f"stream {info.name}: gain_uv of shape {info.gain_uv.shape}, expected ({info.n_channels},) finite numbers"
        )
    if probe.n_channels != info.n_channels:
        raise StreamsortError(f"probe has {probe.n_channels} channels, expected the stream's {info.n_channels}")
    if config.freq_max_hz >= info.sampling_frequency / 2:
        raise StreamsortError(
            f"config: preprocess.freq_max_hz = {config.freq_max_hz}, expected less than half of {info.sampling_frequency} Hz"
        )
