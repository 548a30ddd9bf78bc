"""What to simulate: `SimulationConfig`, the probes it may name, and how the sources move.

A config is checked when it is made and everything of a recording follows from it, so truth, neurons and samples can each be had
without the others. Nothing here draws a random number.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from streamsort.errors import StreamsortError
from streamsort.probe import Probe

PROBES = ("grid32", "linear32", "tetrode", "single", "neuropixels64", "neuropixels128", "neuropixels384")
PROBE_OF = {1: "single", 4: "tetrode", 32: "grid32", 64: "neuropixels64", 128: "neuropixels128", 384: "neuropixels384"}  # channels


@dataclass(frozen=True)
class SimulationConfig:
    """What to simulate.

    The defaults are an easy recording. What makes one hard: `half_um` with `drift_um`, `pairs`, `pauses`, `bursting`, `far_units`,
    `lfp_uv` and `artifacts_hz`.

    Examples
    --------
    >>> config = SimulationConfig(seconds=2, probe_name="tetrode", n_units=3, half_um=(15.0, 25.0), drift_um=20.0)
    >>> config.n_samples, config.probe.n_channels
    (60000, 4)
    """

    seconds: float = 60.0
    probe_name: str = "grid32"  # see `named_probe`
    n_units: int = 20
    sampling_frequency: float = 30000.0
    snr: tuple[float, float] = (4.0, 15.0)  # trough on the best contact over noise_uv; units are spread evenly over this range
    rates_hz: tuple[float, float] = (1.0, 12.0)  # drawn log-uniformly
    half_um: tuple[float, float] | None = None  # in the probe's plane, where the trough halves; None: 20 to 55 um, median 35
    noise_uv: float = 8.0  # white in time, correlated over contacts as exp(-distance / 25 um); without it snr is in uV
    lfp_uv: float = 0.0  # rms of a slow 1/f potential shared by neighbouring contacts
    far_units: int = 0  # distant neurons of snr 0.5 to 1.9, which are not in the truth
    artifacts_hz: float = 0.0  # rate of large events on all contacts, or on one of them, which are not in the truth
    drift_um: float = 0.0  # amplitude; the sources move by up to this along the probe, both ways
    drift_kind: Literal["sine", "zigzag", "step"] = "sine"
    drift_period_s: float = 120.0  # a step comes after half of it
    drift_gradient: float = 0.0  # part of the displacement that is missing at the foot: 0 rigid, 1 still there, 2 the other way
    bursting: float = 0.0  # share of units that fire in bursts of falling amplitude
    amplitude_jitter: float = 0.05  # relative, from spike to spike
    pairs: float = 0.0  # neighbours two by two: share of the rarer one's spikes moved to within 0.5 ms of the other's
    pauses: tuple[float, float, float] | None = None  # (share of units, from_s, to_s): units drawn to be silent, and to return
    silences: tuple[tuple[int, float, float], ...] = ()  # (unit_index, from_s, to_s): times without its spikes
    seed: int = 0

    def __post_init__(self) -> None:
        _require(0 < self.seconds < np.inf, "seconds", self.seconds, "a positive number")
        _require(self.n_units >= 0, "n_units", self.n_units, "0 or more")
        _require(self.sampling_frequency >= 5000, "sampling_frequency", self.sampling_frequency, "5000 Hz or more")
        for name in ("snr", "rates_hz", "half_um"):
            low, high = getattr(self, name) or (1, 1)
            _require(0 < low <= high < np.inf, name, (low, high), "two positive numbers, the smaller first")
        _require(self.rates_hz[1] <= 100, "rates_hz", self.rates_hz, "at most 100 Hz")
        for name in ("noise_uv", "lfp_uv", "drift_um", "amplitude_jitter", "far_units", "seed"):
            _require(0 <= getattr(self, name) < np.inf, name, getattr(self, name), "0 or more")
        _require(0 <= self.artifacts_hz <= 100, "artifacts_hz", self.artifacts_hz, "0 to 100 Hz")
        _require(self.drift_kind in ("sine", "zigzag", "step"), "drift_kind", self.drift_kind, "sine, zigzag or step")
        _require(self.drift_period_s > 0, "drift_period_s", self.drift_period_s, "a positive number of seconds")
        _require(0 <= self.drift_gradient <= 2, "drift_gradient", self.drift_gradient, "0 to 2")
        for name in ("bursting", "pairs"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        share, from_s, to_s = self.pauses or (0, 0, 1)
        _require(0 <= share <= 1 and 0 <= from_s < to_s, "pauses", self.pauses, "(a share of 0 to 1, from_s, a later to_s)")
        for unit, from_s, to_s in self.silences:
            _require(
                0 <= unit < self.n_units and from_s < to_s, "silences", (unit, from_s, to_s), "(a unit_index, from_s, a later to_s)"
            )
        named_probe(self.probe_name)

    @property
    def probe(self) -> Probe:
        return named_probe(self.probe_name)

    @property
    def n_samples(self) -> int:
        return round(self.seconds * self.sampling_frequency)


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise StreamsortError(f"simulation: {name} = {value!r}, expected {expected}")


@functools.cache
def named_probe(name: str) -> Probe:
    """Make one of the probes in `PROBES`.

    Raises
    ------
    StreamsortError
        If the name is another one.
    """
    if name not in PROBES:
        raise StreamsortError(f"simulation: probe_name = {name!r}, expected {', '.join(PROBES[:-1])} or {PROBES[-1]}")
    if name == "linear32":
        return Probe.linear(32, pitch_um=20.0)
    if name == "grid32":  # three columns of 10, 12 and 10 contacts, the outer ones shifted by half a pitch
        sites = [(30.0 * x, 30.0 * k + (0 if x == 1 else 15)) for x in range(3) for k in range(12 if x == 1 else 10)]
        sites.sort(key=lambda site: (site[1], site[0]))
    elif name == "tetrode":
        sites = [(0.0, 0.0), (25.0, 0.0), (0.0, 25.0), (25.0, 25.0)]
    elif name == "single":
        sites = [(0.0, 0.0)]
    else:  # two sites a row, every other row shifted by half the pitch
        sites = [(32.0 * (k % 2) + 16 * (k // 2 % 2 == 0), 20.0 * (k // 2)) for k in range(int(name.removeprefix("neuropixels")))]
    return Probe(np.array(sites), np.zeros(len(sites), np.int32))


def displacement_um(config: SimulationConfig, times_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tell how far (um, along y) the sources are from where they were drawn; the probe stands still.

    With a gradient this is the displacement at the uppermost contact; for others it is to be multiplied by `drift_share`.
    """
    phase = times_s / config.drift_period_s
    if config.drift_kind == "sine":
        return config.drift_um * np.sin(2 * np.pi * phase)
    if config.drift_kind == "zigzag":
        return config.drift_um * (1 - 4 * np.abs((phase + 0.25) % 1 - 0.5))
    return np.where(phase < 0.5, 0.0, config.drift_um)


def drift_share(config: SimulationConfig, y_um: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tell which part of the displacement sources take that were drawn at these heights: all at the top, linear below."""
    along = config.probe.channel_locations[:, 1]
    share: NDArray[np.float64] = 1 - config.drift_gradient * (along.max() - y_um) / (np.ptp(along) or np.inf)
    return share
