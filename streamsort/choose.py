"""Which encoder a stream gets: the full one where it runs fast enough and is the better one, else the light one.

The word of the config comes in (`auto`, `full`, `light` or a path); an `Encoder` and a `Choice`, which says why, go out. For `auto`
the contracts are asked first which of the two tells held-out units apart better. If that is the full one, it is run for a moment on
what it would run on, CUDA where that works, and taken if a single spike costs at most a quarter of the deadline and if it does five
times the spikes that so many channels may bring. The rule knows neither the pace of a source nor its content, so a recording is
sorted with the encoder that its stream would have had.
"""

import functools
import logging
import time
from dataclasses import dataclass

import numpy as np

from streamsort.config import EncodeConfig
from streamsort.encode import SHIPPED, Contract, Encoder, Provider, shipped_model

# Two or three spikes that come together still meet the deadline, with 2 ms of look-ahead and filling of chunks before them.
_SPIKE_SHARE = 0.25
# Measured at a threshold of 4: 10 on a tetrode with 6 units, 4 on 32 contacts with 15; noise above the threshold included.
_PEAKS_HZ = 10.0  # per channel
_HEADROOM = 5.0  # for bursts and dense probes, and so that the rest of sorting has its share of the core
_WARMUP_RUNS = 3
_N_FIGURES, _FIGURE_S = 5, 0.02  # longer than the coarsest clock's step, 16 ms

_log = logging.getLogger("streamsort.choose")


@dataclass(frozen=True)
class Speed:
    """How fast an encoder runs here: `run_ms` for a run of `batch_size` spikes, which is also what a single spike waits for."""

    provider: str
    batch_size: int
    run_ms: float

    @property
    def spikes_per_s(self) -> float:
        return 1e3 * self.batch_size / self.run_ms


@dataclass(frozen=True)
class Choice:
    """What was asked for, what is used, and why.

    `asked` is the config's word, `used` is `full`, `light` or a path. `run_ms` and `spikes_per_s` are those of the full encoder,
    None when nothing was measured.
    """

    asked: str
    used: str
    reason: str
    run_ms: float | None = None
    spikes_per_s: float | None = None


def measure_speed(encoder: Encoder) -> Speed:
    """Run an encoder for a tenth of a second; the lowest of five figures, since whatever disturbs can only add.

    On a CPU what counts is the processor time of the thread, in which a session of one thread does all its work: what other
    programs take differs from moment to moment, while the same machine is to get the same answer, within some per cent. On CUDA it
    is the time on the clock.
    """
    clock = time.thread_time if encoder.provider == "cpu" else time.perf_counter
    rng = np.random.default_rng(0)
    shape = (encoder.batch_size, encoder.n_before + encoder.n_after, encoder.contract.n_neighbors)
    snippets = rng.normal(size=shape).astype(np.float32)
    noise_level = np.ones((shape[0], shape[2]), np.float32)
    for _ in range(_WARMUP_RUNS):
        encoder(snippets, noise_level)
    figures = []
    for _ in range(_N_FIGURES):
        n_runs, began, passed_s = 0, clock(), 0.0
        while passed_s < _FIGURE_S:
            encoder(snippets, noise_level)
            n_runs, passed_s = n_runs + 1, clock() - began
        figures.append(1e3 * passed_s / n_runs)
    return Speed(encoder.provider, encoder.batch_size, min(figures))


@functools.cache
def full_speed(provider: Provider) -> Speed:
    """Measure the full encoder, once per process: all sorters of a process choose by the same figure."""
    return measure_speed(Encoder(shipped_model("full"), provider))


def decide(speed: Speed, n_channels: int, deadline_ms: float) -> Choice:
    """Say whether the full encoder is fast enough for a stream.

    Parameters
    ----------
    speed : Speed
        Of the full encoder.
    n_channels : int
    deadline_ms : float
        From trough to publication.

    Returns
    -------
    Choice
        Of `full` or `light`.

    Examples
    --------
    >>> decide(Speed("cpu", 1, 1.5), n_channels=4, deadline_ms=10.0).used
    'full'
    >>> decide(Speed("cpu", 1, 1.5), n_channels=32, deadline_ms=10.0).reason
    'light: full takes 1.50 ms a spike (at most 2.50) and does 667 spikes/s (at least 1600 for 32 channels) on cpu'
    """
    most_ms, least_per_s = _SPIKE_SHARE * deadline_ms, _HEADROOM * _PEAKS_HZ * n_channels
    used = "full" if speed.run_ms <= most_ms and speed.spikes_per_s >= least_per_s else "light"
    reason = (
        f"{used}: full takes {speed.run_ms:.2f} ms a spike (at most {most_ms:.2f}) and does {speed.spikes_per_s:.0f} spikes/s "
        f"(at least {least_per_s:.0f} for {n_channels} channels) on {speed.provider}"
    )
    return Choice("auto", used, reason, speed.run_ms, speed.spikes_per_s)


def _scores() -> tuple[float, float]:
    """Read how well the full and the light encoder that are shipped told held-out units apart."""
    full, light = (Contract.read(shipped_model(which).with_suffix(".json")).score for which in ("full", "light"))
    return full, light


def auto_choice(provider: Provider, n_channels: int, deadline_ms: float) -> Choice:
    """Choose for a stream of so many channels; see `decide` for the parameters. A full one that is no better is not measured."""
    full, light = _scores()
    if full > light:
        return decide(full_speed(provider), n_channels, deadline_ms)
    return Choice("auto", "light", f"light: scores {light:.3f} on held-out units, full {full:.3f}")


def choose_encoder(
    config: EncodeConfig, *, n_channels: int, sampling_frequency: float, deadline_ms: float
) -> tuple[Encoder, Choice]:
    """Make the encoder of a stream.

    Parameters
    ----------
    config : EncodeConfig
        `encoder` is `auto`, `full`, `light` or the path of an `.onnx`.
    n_channels : int
    sampling_frequency : float
        In Hz, of the stream.
    deadline_ms : float
        From trough to publication.

    Returns
    -------
    encoder : Encoder
    choice : Choice
        Logged in one line, and to be kept with what is sorted.

    Raises
    ------
    StreamsortError
        If the model or its contract is missing or broken, or CUDA is asked for and does not run.
    """
    if config.encoder == "auto":
        choice = auto_choice(config.provider, n_channels, deadline_ms)
    else:
        choice = Choice(config.encoder, config.encoder, f"{config.encoder}: as asked")
    path = shipped_model(choice.used) if choice.used in SHIPPED else choice.used
    encoder = Encoder(path, config.provider, sampling_frequency=sampling_frequency)
    _log.info("encoder %s on %s; %s", encoder.name, encoder.provider, choice.reason)
    return encoder, choice
