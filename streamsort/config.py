"""All that can be set, in physical units, one frozen dataclass per stage.

A config is checked when it is made, converted to samples once by the stage that owns it, and never changed afterwards. TOML in and
out: a table per stage, unknown keys refused with the nearest known one. Every default is justified beside it.
"""

import dataclasses
import difflib
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from streamsort.errors import StreamsortError


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise StreamsortError(f"config: {name} = {value!r}, expected {expected}")


@dataclass(frozen=True)
class PreprocessConfig:
    """Raw samples to referenced, band-passed microvolts."""

    # A causal filter distorts, and the classic 300-6000 Hz costs a fifth of a spike's peak SNR that way. Measured on simulated and
    # on real footprints over white noise, peak SNR is 1.4 times (tetrode, 32 channels) and 1.1 times (sharp real footprints) higher
    # in this band.
    freq_min_hz: float = 150.0
    freq_max_hz: float = 3000.0
    filter_order: int = 2  # two biquads per channel; order 3 costs time and more SNR (it rings)
    reference: Literal["median", "mean", "none", "auto"] = "auto"  # auto: median from 16 channels on, none below
    whiten: bool = False  # local whitening with the covariance of the first noise_s seconds
    noise_s: float = 2.0  # nothing is detected before the noise level is known
    noise_period_s: float = 1.0  # the noise level changes only at multiples of this
    noise_halflife_s: float = 20.0  # and forgets this slowly

    def __post_init__(self) -> None:
        _require(
            0 < self.freq_min_hz < self.freq_max_hz, "preprocess.freq_min_hz", self.freq_min_hz, "0 < freq_min_hz < freq_max_hz"
        )
        _require(1 <= self.filter_order <= 5, "preprocess.filter_order", self.filter_order, "1 to 5")
        _require(
            self.reference in ("median", "mean", "none", "auto"),
            "preprocess.reference",
            self.reference,
            "median, mean, none or auto",
        )
        _require(self.noise_period_s > 0, "preprocess.noise_period_s", self.noise_period_s, "a positive number of seconds")
        _require(self.noise_s > 0, "preprocess.noise_s", self.noise_s, "a positive number of seconds")
        _require(self.noise_halflife_s > 0, "preprocess.noise_halflife_s", self.noise_halflife_s, "a positive number of seconds")


@dataclass(frozen=True)
class DetectConfig:
    """Locally exclusive threshold peaks."""

    peak_sign: Literal["neg", "pos", "both"] = "neg"
    detect_threshold: float = 4.0  # multiples of the noise level
    exclude_sweep_ms: float = 0.3  # one peak per neighbourhood within +- this
    radius_um: float = 60.0  # the neighbourhood in which only the largest peak counts

    def __post_init__(self) -> None:
        _require(self.peak_sign in ("neg", "pos", "both"), "detect.peak_sign", self.peak_sign, "neg, pos or both")
        _require(
            self.detect_threshold > 0, "detect.detect_threshold", self.detect_threshold, "a positive multiple of the noise level"
        )
        _require(self.exclude_sweep_ms > 0, "detect.exclude_sweep_ms", self.exclude_sweep_ms, "a positive number of ms")
        _require(self.radius_um >= 0, "detect.radius_um", self.radius_um, "0 or more um")


@dataclass(frozen=True)
class SnippetConfig:
    """The cut-out around a peak; its `ms_after` is the largest part of the look-ahead, so of the floor of latency."""

    ms_before: float = 0.6
    ms_after: float = 1.0
    n_neighbors: int = 11  # HuiduRep's channel count
    radius_um: float = 100.0

    def __post_init__(self) -> None:
        _require(self.ms_before > 0, "snippets.ms_before", self.ms_before, "a positive number of ms")
        _require(self.ms_after > 0, "snippets.ms_after", self.ms_after, "a positive number of ms")
        _require(1 <= self.n_neighbors <= 64, "snippets.n_neighbors", self.n_neighbors, "1 to 64")
        _require(self.radius_um >= 0, "snippets.radius_um", self.radius_um, "0 or more um")


@dataclass(frozen=True)
class EncodeConfig:
    """Which encoder, and where it runs."""

    # auto: the full encoder where it is fast enough for the stream, else the light one (`choose` holds the rule); full; light; or
    # the path of an .onnx with its contract .json beside it
    encoder: str = "auto"
    provider: Literal["auto", "cpu", "cuda"] = "auto"  # cuda: refuse to start when the session does not really run there

    def __post_init__(self) -> None:
        words = "auto, full, light or the path of an .onnx"
        _require(self.encoder in ("auto", "full", "light") or self.encoder.endswith(".onnx"), "encode.encoder", self.encoder, words)
        _require(self.provider in ("auto", "cpu", "cuda"), "encode.provider", self.provider, "auto, cpu or cuda")


@dataclass(frozen=True)
class ClusterConfig:
    """Calibration and the online prototypes."""

    period_s: float = 0.25  # prototypes, births and alarms change only at multiples of this; short, so that each change is quick
    min_spikes: int = 20  # fewer spikes make no unit
    min_members: int = 8  # fewer spikes on a channel make no prototype of it
    spikes_per_seed: int = 40  # over-clustering: one k-means seed per so many spikes
    valley_ratio: float = 0.5  # two hills are one unit when the density between them stays above this part of the lower one
    # Squared distances to the own prototype, as multiples of a member's mean (n_dims). Overlapping spikes reach 8.
    outlier: float = 8.0  # further off a spike is unsorted
    strange: float = 4.0  # further off it is remembered: many of them together are a unit that moved or a new one
    clear: float = 2.5  # only spikes nearer than this, with a posterior over 0.9, teach their prototype
    slowest: float = 0.04  # a prototype follows its last 25 spikes
    birth_spikes: int = 15  # so many spikes that fit no prototype and lie together make a new one
    birth_s: float = 60.0  # within this time
    compact: float = 2.0  # lie together: mean squared distance over n_dims; members of a unit have 1, overlaps more
    noise_excess: float = 1.75  # noise: mean height under detect_threshold + this / detect_threshold (a Gaussian tail has 1)

    def __post_init__(self) -> None:
        _require(self.period_s > 0, "cluster.period_s", self.period_s, "a positive number of seconds")
        _require(self.min_spikes >= 2, "cluster.min_spikes", self.min_spikes, "2 or more spikes")
        _require(self.spikes_per_seed >= 2, "cluster.spikes_per_seed", self.spikes_per_seed, "2 or more spikes")
        for name in ("outlier", "strange", "clear", "birth_s", "compact", "noise_excess"):
            _require(getattr(self, name) > 0, f"cluster.{name}", getattr(self, name), "a positive number")
        _require(0 < self.slowest <= 1, "cluster.slowest", self.slowest, "more than 0, at most 1")
        _require(self.birth_spikes >= 2, "cluster.birth_spikes", self.birth_spikes, "2 or more spikes")
        _require(self.min_members >= 2, "cluster.min_members", self.min_members, "2 or more spikes")
        _require(0 < self.valley_ratio < 1, "cluster.valley_ratio", self.valley_ratio, "between 0 and 1")


@dataclass(frozen=True)
class MatchConfig:
    """Templates and how they are matched."""

    ms_before: float = 0.6
    # Look-ahead, together with sweep_ms. The band-pass draws spikes out: with 1.0 units of SNR 3 on a tetrode lose 0.05 of
    # accuracy, with 0.8 they lose 0.18.
    ms_after: float = 1.3
    ms_tail: float = 4.0  # so far after its trough a spike is subtracted: large ones swing back for long after the band-pass
    n_channels: int = 32  # of a template: those where it is largest
    radius_um: float = 120.0  # its neighbourhood; further away only what stands out
    n_ranks: int = 3
    sweep_ms: float = 0.13  # of two rivals within this, the one that explains more is subtracted first
    refractory_ms: float = 1.0  # a unit does not fire twice within this
    rounds: int = 6  # overlapping spikes looked for at one place
    amplitude_spread: float = 0.13  # standard deviation of a spike's size over its unit's, until the unit has shown its own
    tolerance: float = 0.2  # of a subtracted spike, so much may be left and is not taken for another

    def __post_init__(self) -> None:
        for name in ("ms_before", "ms_after", "sweep_ms", "refractory_ms", "amplitude_spread"):
            _require(getattr(self, name) > 0, f"match.{name}", getattr(self, name), "a positive number")
        _require(self.ms_tail > self.ms_after, "match.ms_tail", self.ms_tail, f"more than ms_after = {self.ms_after:g}")
        for name in ("n_channels", "n_ranks", "rounds"):
            _require(getattr(self, name) >= 1, f"match.{name}", getattr(self, name), "1 or more")
        for name in ("radius_um", "tolerance"):
            _require(getattr(self, name) >= 0, f"match.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True)
class RefreshConfig:
    """A new encoder for a running stream: what is remembered to judge it by, and how like the old one it must sort."""

    agreement: float = 0.98  # of the recent spikes that either encoder sorts, so many must get the same unit from both
    unit_agreement: float = 0.9  # and so many of each unit's, counted likewise: no unit pays for the others
    # Units must stand at least so many times as far apart as before, in spreads. Well isolated ones keep their names even under
    # random weights (agreement 0.97 to 0.98 in simulations) but then stand 0.66 to 0.90 times as far apart; with weights moved by
    # 30 %, 0.95.
    separation: float = 0.92
    snippets: int = 64  # remembered per prototype, 2 kB each: a mean of so many is off by an eighth of the spread
    replay_s: float = 20.0  # the encoders are compared on this much of the stream: a unit of 1 Hz counts
    replay_spikes: int = 4000  # but on no more peaks, 8 MB: on a big probe the light encoder takes a second for them
    watch_s: float = 60.0  # after a swap the old encoder is asked for its opinion for so long
    # The remembered snippets are written for the trainer so often. Meanwhile spikes wait: every 10 s gave p99 12 ms, this 6 ms.
    save_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("agreement", "unit_agreement", "separation"):
            _require(0 < getattr(self, name) <= 1, f"refresh.{name}", getattr(self, name), "more than 0, at most 1")
        _require(self.snippets >= 2, "refresh.snippets", self.snippets, "2 or more per prototype")
        _require(self.replay_spikes >= 1, "refresh.replay_spikes", self.replay_spikes, "1 or more spikes")
        for name in ("replay_s", "watch_s", "save_s"):
            _require(getattr(self, name) > 0, f"refresh.{name}", getattr(self, name), "a positive number of seconds")


@dataclass(frozen=True)
class StreamConfig:
    """Threads and queues."""

    queue_s: float = 10.0  # data that may wait before a live source's chunks are dropped (and counted)
    # As long as nobody waits for units: making them takes longer than queue_s on a large probe, and is caught up with afterwards.
    calibration_queue_s: float = 180.0
    deadline_ms: float = 10.0  # a spike published later than this after its trough carries the flag `late`
    # A live chunk that waited longer makes the sorter leave things out (`streamsort.shed`); a machine's hiccups are shorter.
    shed_ms: float = 100.0
    status_s: float = 1.0  # units and status are published this often

    def __post_init__(self) -> None:
        for name in ("queue_s", "calibration_queue_s"):
            _require(getattr(self, name) > 0, f"stream.{name}", getattr(self, name), "a positive number of seconds")
        _require(self.deadline_ms > 0, "stream.deadline_ms", self.deadline_ms, "a positive number of ms")
        _require(self.shed_ms > 0, "stream.shed_ms", self.shed_ms, "a positive number of ms")
        _require(self.status_s > 0, "stream.status_s", self.status_s, "a positive number of seconds")


@dataclass(frozen=True)
class SorterConfig:
    """Everything a sorter is made of.

    Examples
    --------
    >>> SorterConfig.from_dict({"warmup_s": 30, "detect": {"detect_threshold": 4.5}}).detect.detect_threshold
    4.5
    """

    warmup_s: float = 60.0  # calibration: this much of the stream is looked at before units are named
    seed: int = 0
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    detect: DetectConfig = field(default_factory=DetectConfig)
    snippets: SnippetConfig = field(default_factory=SnippetConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)

    def __post_init__(self) -> None:
        _require(self.preprocess.noise_s < self.warmup_s < math.inf, "warmup_s", self.warmup_s, "more than preprocess.noise_s")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> "SorterConfig":
        """Build from nested tables; a key that does not exist is refused with the nearest one that does."""
        config: SorterConfig = build(cls, table)
        return config

    @classmethod
    def from_toml(cls, path: str | Path) -> "SorterConfig":
        """Read a TOML file with a table per stage.

        Raises
        ------
        StreamsortError
            If the file is missing, is not TOML, has unknown keys or values out of range.
        """
        return cls.from_dict(read_toml(path))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """Write as TOML that `from_toml` reads back to an equal config."""
        top, tables = [], []
        for name, value in self.to_dict().items():
            if isinstance(value, dict):
                tables.append(f"\n[{name}]\n" + "".join(f"{key} = {_toml(item)}\n" for key, item in value.items()))
            else:
                top.append(f"{name} = {_toml(value)}\n")
        return "".join(top + tables)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises
    ------
    StreamsortError
        If the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise StreamsortError(f"config {path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StreamsortError(f"config {path}: not TOML ({error})") from None


def build(cls: Any, table: Any, prefix: str = "") -> Any:
    """Make the dataclass `cls` from nested tables; `prefix` is where the table stands, as messages name it.

    Raises
    ------
    StreamsortError
        If a key is unknown (the nearest known one is named) or a value has the wrong type.
    """
    where = prefix.rstrip(".") or "the config"
    if not isinstance(table, dict):
        raise StreamsortError(f"config: {where} = {table!r}, expected a table")
    hints = get_type_hints(cls)
    values = {}
    for key, value in table.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else "known: " + ", ".join(hints)
            raise StreamsortError(f"config: unknown key {prefix}{key}; {hint}")
        kind = hints[key]
        values[key] = (
            build(kind, value, f"{prefix}{key}.") if dataclasses.is_dataclass(kind) else _convert(kind, value, prefix + key)
        )
    return cls(**values)


def _convert(kind: Any, value: Any, name: str) -> Any:
    """Accept an int where a float is meant; refuse every other mismatch of type."""
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise StreamsortError(f"config: {name} = {value!r}, expected a finite number")
        return float(value)
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise StreamsortError(f"config: {name} = {value!r}, expected a list")
        return tuple(_convert(get_args(kind)[0], item, f"{name}[{index}]") for index, item in enumerate(value))
    plain = kind if isinstance(kind, type) else str  # the Literal fields are strings
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise StreamsortError(f"config: {name} = {value!r}, expected {plain.__name__}")
    return value
