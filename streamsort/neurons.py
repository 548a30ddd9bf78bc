"""Simulated neurons: what a unit looks like on every contact, wherever it has drifted to.

A probe and a seed come in, `Units` goes out: parameters, not templates, from which a template is evaluated at any displacement and
any fraction of a sample. A unit is three currents (a trough, a repolarisation after it, a small peak before it), each with its own
place and reach, so its shape changes from contact to contact as in tissue.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsort.probe import Probe

MS_BEFORE, MS_AFTER = 1.0, 2.5  # a template's extent around its trough
REACH_UV = 0.2  # a contact on which a unit has less than one bit does not get its spikes
N_CANDIDATES = 12  # contacts nearest to a trough's source; the deepest trough is on one of them


@dataclass(frozen=True)
class Units:
    """What makes the shapes of n_units neurons; three components each: trough, repolarisation, first peak.

    Attributes
    ----------
    sources_um : ndarray, shape (n_units, 3, 3)
        Where each component comes from: x and y in the plane of the probe, z away from it.
    gain_uv, decay_um, centre_ms : ndarray, shape (n_units, 3)
        Signed amplitude at distance 0, distance over which it falls to 1/e, time of its extremum after the unit's trough.
    width_ms : ndarray, shape (n_units, 3, 2)
        Standard deviations of the Gaussian flank before and after the extremum.
    aspect : ndarray, shape (n_units,)
        Distances along x are multiplied by this, those along y divided.
    slowness_ms_per_um : ndarray, shape (n_units, 2)
        Propagation delay per um along x and y.
    snr : ndarray, shape (n_units,)
        Trough on the best contact over the noise, without drift.
    """

    sampling_frequency: float
    sources_um: NDArray[np.float64]
    gain_uv: NDArray[np.float64]
    decay_um: NDArray[np.float64]
    centre_ms: NDArray[np.float64]
    width_ms: NDArray[np.float64]
    aspect: NDArray[np.float64]
    slowness_ms_per_um: NDArray[np.float64]
    snr: NDArray[np.float64]

    @property
    def n_units(self) -> int:
        return len(self.snr)

    @property
    def n_before(self) -> int:
        """Row of the trough in a template."""
        return round(MS_BEFORE * self.sampling_frequency / 1e3)

    @property
    def n_after(self) -> int:
        return round(MS_AFTER * self.sampling_frequency / 1e3)


def draw_units(
    n_units: int, probe: Probe, sampling_frequency: float, seed: int, snr: tuple[float, float] = (4.0, 15.0), noise_uv: float = 8.0
) -> Units:
    """Draw units of many shapes around the contacts of a probe.

    Trough widths are 0.2-0.6 ms at a tenth of the depth, every fifth unit is triphasic, footprints fall by 1/e over 15-60 um,
    delays reach 0.2 ms over 100 um.

    Returns
    -------
    units : Units
        The trough of every unit on its best contact is `snr * noise_uv` deep and lies at row `n_before` of its template.
    """
    rng = np.random.default_rng([seed, 0])
    contact = probe.channel_locations[rng.integers(probe.n_channels, size=n_units)]
    soma = np.column_stack([contact + rng.normal(0, 12.0, (n_units, 2)), rng.uniform(8, 35, n_units)])
    spread_um = np.array([0.0, 8.0, 12.0])[None, :, None]
    sigma_ms = log_uniform(rng, 0.2, 0.6, n_units) / np.sqrt(8 * np.log(10))
    before_ms = np.column_stack([sigma_ms, rng.uniform(0.1, 0.25, n_units), rng.uniform(0.05, 0.12, n_units)])
    after_ms = np.column_stack([sigma_ms * rng.uniform(0.8, 1.3, n_units), rng.uniform(0.15, 0.45, n_units), before_ms[:, 2]])
    first_peak = np.where(rng.random(n_units) < 0.2, rng.uniform(0.2, 0.45, n_units), rng.uniform(0.0, 0.12, n_units))
    angle, slowness = rng.uniform(0, 2 * np.pi, n_units), rng.uniform(0, 0.002, n_units)
    shapes = Units(
        sampling_frequency=sampling_frequency,
        sources_um=soma[:, None] + rng.normal(size=(n_units, 3, 3)) * spread_um,
        gain_uv=np.column_stack([np.full(n_units, -1.0), rng.uniform(0.08, 0.55, n_units), first_peak]),
        decay_um=log_uniform(rng, 15.0, 60.0, n_units)[:, None]
        * np.column_stack([np.ones(n_units), rng.uniform(0.9, 1.4, (n_units, 2))]),
        centre_ms=np.column_stack([np.zeros(n_units), rng.uniform(0.25, 0.8, n_units), -rng.uniform(0.18, 0.35, n_units)]),
        width_ms=np.stack([before_ms, after_ms], axis=2),
        aspect=rng.uniform(0.8, 1.25, n_units),
        slowness_ms_per_um=slowness[:, None] * np.column_stack([np.cos(angle), np.sin(angle)]),
        snr=rng.permutation(np.linspace(*snr, n_units)),
    )
    return _scaled(shapes, probe.channel_locations, noise_uv)


def _scaled(shapes: Units, contacts: NDArray[np.float64], noise_uv: float) -> Units:
    """Give every unit its depth on its best contact, and its trough there the time 0."""
    gain_uv, centre_ms = shapes.gain_uv.copy(), shapes.centre_ms.copy()
    distances = _distances_um(shapes, contacts)
    nearest = np.argsort(distances[:, 0], axis=1)[:, :N_CANDIDATES]
    at_nearest = np.take_along_axis(distances, nearest[:, None, :1], axis=2)[..., 0]
    gain_uv *= np.exp(at_nearest / shapes.decay_um)  # so far shares of the trough at the nearest contact
    fine_ms = np.arange(-0.5, 0.5, 1e-3)
    for unit in range(shapes.n_units):
        rough = Units(**{**vars(shapes), "gain_uv": gain_uv})
        wave = _evaluate(rough, unit, contacts[nearest[unit]], 0.0, fine_ms)
        row, best = np.unravel_index(np.argmin(wave), wave.shape)
        gain_uv[unit] *= shapes.snr[unit] * noise_uv / -wave[row, best]
        centre_ms[unit] -= fine_ms[row]
    return Units(**{**vars(shapes), "gain_uv": gain_uv, "centre_ms": centre_ms})


def log_uniform(rng: np.random.Generator, low: float, high: float, n: int) -> NDArray[np.float64]:
    return np.exp(rng.uniform(np.log(low), np.log(high), n))


def _distances_um(units: Units, contacts: NDArray[np.float64]) -> NDArray[np.float64]:
    """From every component to every contact, (n_units, 3, n_channels)."""
    x, y, z = (units.sources_um[..., k, None] for k in range(3))
    aspect = units.aspect[:, None, None]
    distances: NDArray[np.float64] = np.sqrt(((contacts[:, 0] - x) * aspect) ** 2 + ((contacts[:, 1] - y) / aspect) ** 2 + z**2)
    return distances


def _evaluate(
    units: Units, unit: int, contacts: NDArray[np.float64], displacement_um: float, times_ms: NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    """Compute one unit's potential, (n_times, n_contacts), its sources moved by `displacement_um` along y."""
    x, y, z = units.sources_um[unit].T[:, :, None]
    step_x, step_y = contacts[:, 0] - x, contacts[:, 1] - (y + displacement_um)
    aspect = units.aspect[unit]
    distance = np.sqrt((step_x * aspect) ** 2 + (step_y / aspect) ** 2 + z**2)
    amplitude = units.gain_uv[unit, :, None] * np.exp(-distance / units.decay_um[unit, :, None])
    delay_ms = units.slowness_ms_per_um[unit] @ np.stack([step_x[0], step_y[0]])
    late_ms = times_ms[None, :, None] - units.centre_ms[unit, :, None, None] - delay_ms
    before_ms, after_ms = units.width_ms[unit].T[:, :, None, None]
    shape = np.exp(-0.5 * (late_ms / np.where(late_ms < 0, before_ms, after_ms)) ** 2)
    potential: NDArray[np.float64] = np.einsum("kc,ktc->tc", amplitude, shape)
    return potential


def templates_at(units: Units, probe: Probe, displacement_um: float = 0.0) -> NDArray[np.float32]:
    """Evaluate all units at one displacement along y.

    Returns
    -------
    templates : ndarray, shape (n_units, n_before + n_after, n_channels), float32
        In uV; without displacement the trough on the best contact is at row `units.n_before`.
    """
    templates = np.zeros((units.n_units, units.n_before + units.n_after, probe.n_channels), np.float32)
    for unit, template in enumerate(templates):
        channels, wave = sparse_template(units, unit, probe.channel_locations, displacement_um, 0.0)
        template[:, channels] = wave
    return templates


def sparse_template(
    units: Units, unit: int, contacts: NDArray[np.float64], displacement_um: float, shift_samples: float
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Evaluate one unit where it reaches: channels (k,), uV (n_samples, k), the trough `shift_samples` after row n_before."""
    distance = np.hypot(
        contacts[:, 0] - units.sources_um[unit, 0, 0], contacts[:, 1] - units.sources_um[unit, 0, 1] - displacement_um
    )
    loudest = np.abs(units.gain_uv[unit]).max()
    channels = np.flatnonzero(distance < 1.5 * units.decay_um[unit].max() * np.log(max(loudest / REACH_UV, 1.0)))
    rows = np.arange(-units.n_before, units.n_after) - shift_samples
    wave = _evaluate(units, unit, contacts[channels], displacement_um, rows * 1e3 / units.sampling_frequency)
    heard = np.abs(wave).max(axis=0, initial=0.0) >= REACH_UV
    return channels[heard], wave[:, heard].astype(np.float32)
