"""Simulated neurons: what a unit looks like on every contact, wherever it has drifted to.

A probe and a seed come in, `Units` goes out: parameters, not templates, from which a template is evaluated at any displacement and
any fraction of a sample. A unit is three currents (a trough, a repolarisation after it, a small peak before it) and three smaller
ones of either sign at any time and further away, as of dendrites and axon. Each has its own place and reach, so the shape changes
from contact to contact as in tissue.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamsort.probe import Probe

MS_BEFORE, MS_AFTER = 1.0, 2.5  # a template's extent around its trough
REACH_UV = 0.2  # a contact on which a unit has less than one bit does not get its spikes
N_CANDIDATES = 12  # contacts nearest to a trough's source; the deepest trough is on one of them
EDGE_UM = 8.0  # a sharp unit lies so far inside the outermost contacts, or so near the middle of a narrow probe
FAR_SNR, FAR_DEPTH_UM, FAR_MARGIN_UM = (0.5, 1.9), (60.0, 140.0), 40.0  # of distant neurons, around the probe


@dataclass(frozen=True)
class Units:
    """What makes the shapes of n_units neurons; six components each: trough, repolarisation, first peak, and three more.

    Attributes
    ----------
    sources_um : ndarray, shape (n_units, 6, 3)
        Where each component comes from: x and y in the plane of the probe, z away from it.
    gain_uv, decay_um, centre_ms : ndarray, shape (n_units, 6)
        Signed amplitude at distance 0, distance over which it falls to 1/e, time of its extremum after the unit's trough.
    width_ms : ndarray, shape (n_units, 6, 2)
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


class Kind(NamedTuple):
    """Ranges that the shapes of one kind of neuron are drawn from."""

    share: float  # of all units
    width_ms: tuple[float, float]  # of the trough at a tenth of its depth
    repolarisation: tuple[float, float]  # parts of the trough
    first_peak: tuple[float, float]
    decay_um: tuple[float, float]
    slowness_ms_per_um: float  # at most


KINDS = {
    "regular": Kind(0.40, (0.30, 0.60), (0.08, 0.40), (0.0, 0.12), (18.0, 60.0), 0.0015),
    "narrow": Kind(0.20, (0.18, 0.35), (0.25, 0.70), (0.0, 0.12), (15.0, 45.0), 0.0015),
    "broad": Kind(0.12, (0.50, 0.90), (0.05, 0.30), (0.0, 0.10), (20.0, 65.0), 0.0020),
    "triphasic": Kind(0.10, (0.20, 0.50), (0.15, 0.55), (0.25, 0.60), (15.0, 50.0), 0.0025),
    "axonal": Kind(0.10, (0.12, 0.25), (0.20, 0.60), (0.30, 0.80), (12.0, 25.0), 0.0050),
    "positive first": Kind(0.08, (0.20, 0.60), (0.10, 0.50), (0.70, 1.20), (18.0, 60.0), 0.0020),
}


def draw_units(
    n_units: int,
    probe: Probe,
    sampling_frequency: float,
    seed: int,
    snr: tuple[float, float] = (4.0, 15.0),
    noise_uv: float = 8.0,
    half_um: tuple[float, float] | None = None,
) -> Units:
    """Draw units of all `KINDS` around the contacts of a probe.

    Parameters
    ----------
    n_units : int
    probe : Probe
    sampling_frequency : float
    seed : int
    snr : tuple of float
        Units are spread evenly over this range.
    noise_uv : float
    half_um : tuple of float, optional
        Units are shrunk as a whole until their trough halves at a distance drawn from this range, and lie over the probe, so that
        drift does not take them out of sight. By default most halve within 20 to 55 um and some lie beside the probe.

    Returns
    -------
    units : Units
        The trough of every unit on its best contact is `snr * noise_uv` deep and lies at row `n_before` of its template.
    """
    rng = np.random.default_rng([seed, 0])
    contacts = probe.channel_locations
    contact = contacts[rng.integers(probe.n_channels, size=n_units)]
    soma = np.column_stack([contact + rng.normal(0, 12.0, (n_units, 2)), rng.uniform(8, 35, n_units)])
    shapes = draw_shapes(rng, n_units, sampling_frequency)
    places = replace(shapes, sources_um=shapes.sources_um + soma[:, None], snr=rng.permutation(np.linspace(*snr, n_units)))
    if half_um is None:
        return _scaled(places, contacts, noise_uv, _nearest_um(places, contacts))
    sharp = _sharpened(rng, places, contacts, half_um)
    return _scaled(sharp, contacts, noise_uv, np.abs(sharp.sources_um[:, :, 2]))


def draw_far_units(n_units: int, probe: Probe, sampling_frequency: float, seed: int, noise_uv: float) -> Units:
    """Draw neurons too distant to be told apart: broad and shallow (`FAR_SNR`), together the hash under the spikes."""
    rng = np.random.default_rng([seed, 4])
    contacts = probe.channel_locations
    low, high = contacts.min(axis=0) - FAR_MARGIN_UM, contacts.max(axis=0) + FAR_MARGIN_UM
    soma = np.column_stack([rng.uniform(low, high, (n_units, 2)), rng.uniform(*FAR_DEPTH_UM, n_units)])
    shapes = draw_shapes(rng, n_units, sampling_frequency)
    places = replace(shapes, sources_um=shapes.sources_um + soma[:, None], snr=rng.uniform(*FAR_SNR, n_units))
    return _scaled(places, contacts, noise_uv, _nearest_um(places, contacts))


def _sharpened(rng: np.random.Generator, units: Units, contacts: NDArray[np.float64], half_um: tuple[float, float]) -> Units:
    """Scale all lengths of every unit to the halving distance drawn for it, and put it over the probe."""
    soma = units.sources_um[:, :1]
    depth_um = soma[:, 0, 2]
    present_um = np.sqrt((depth_um + np.log(2) * units.decay_um[:, 0]) ** 2 - depth_um**2)
    factor = (rng.uniform(*half_um, units.n_units) / present_um)[:, None]
    low, high = contacts.min(axis=0), contacts.max(axis=0)
    around = np.maximum((high - low) / 2 - EDGE_UM, EDGE_UM)
    place = np.pad((low + high) / 2 + around * rng.uniform(-1, 1, (units.n_units, 2)), ((0, 0), (0, 1)))
    offsets = units.sources_um - soma * [1, 1, 0]
    return replace(units, sources_um=place[:, None] + factor[:, :, None] * offsets, decay_um=factor * units.decay_um)


def draw_shapes(rng: np.random.Generator, n_units: int, sampling_frequency: float) -> Units:
    """Draw shapes alone: units whose soma is at the origin, with a trough of -1 there, and of SNR 1."""
    kinds = list(KINDS.values())
    kind = rng.choice(len(kinds), n_units, p=[kind.share for kind in kinds])

    def draw(field: str, log: bool = False) -> NDArray[np.float64]:
        low, high = np.array([getattr(kind, field) for kind in kinds])[kind].T
        part = rng.random(n_units)
        drawn: NDArray[np.float64] = low * (high / low) ** part if log else low + (high - low) * part
        return drawn

    sigma_ms = draw("width_ms", log=True) / np.sqrt(8 * np.log(10))
    early_ms, other_ms = rng.uniform(0.05, 0.12, n_units), np.exp(rng.uniform(np.log(0.06), np.log(0.3), (n_units, 3)))
    before_ms = np.column_stack([sigma_ms, rng.uniform(0.1, 0.25, n_units), early_ms, other_ms])
    after_ms = np.column_stack([sigma_ms * rng.uniform(0.8, 1.3, n_units), rng.uniform(0.15, 0.45, n_units), early_ms, other_ms])
    centre_ms = [np.zeros(n_units), rng.uniform(0.25, 0.8, n_units), -rng.uniform(0.18, 0.35, n_units)]
    angle = rng.uniform(0, 2 * np.pi, n_units)
    slowness = rng.random(n_units) * np.array([kinds[k].slowness_ms_per_um for k in kind])
    reach = np.column_stack([np.ones(n_units), rng.uniform(0.9, 1.4, (n_units, 2)), rng.uniform(0.5, 1.0, (n_units, 3))])
    spread_um = np.array([0.0, 8.0, 12.0, 30.0, 30.0, 30.0])[None, :, None]
    return Units(
        sampling_frequency=sampling_frequency,
        sources_um=rng.normal(size=(n_units, 6, 3)) * spread_um,
        gain_uv=np.column_stack(
            [np.full(n_units, -1.0), draw("repolarisation"), draw("first_peak"), rng.normal(0.0, 0.15, (n_units, 3))]
        ),
        decay_um=draw("decay_um", log=True)[:, None] * reach,
        centre_ms=np.column_stack([*centre_ms, rng.uniform(-0.4, 0.9, (n_units, 3))]),
        width_ms=np.stack([before_ms, after_ms], axis=2),
        aspect=rng.uniform(0.8, 1.25, n_units),
        slowness_ms_per_um=slowness[:, None] * np.column_stack([np.cos(angle), np.sin(angle)]),
        snr=np.ones(n_units),
    )


def _nearest(units: Units, contacts: NDArray[np.float64]) -> NDArray[np.intp]:
    steps = contacts - units.sources_um[:, :1, :2]  # (n_units, n_channels, 2)
    return np.argsort(np.square(steps).sum(-1), axis=1)[:, :N_CANDIDATES]


def _nearest_um(units: Units, contacts: NDArray[np.float64]) -> NDArray[np.float64]:
    """From every component to the contact nearest to it, (n_units, 6)."""
    nearest_um: NDArray[np.float64] = _distances_um(units, contacts[_nearest(units, contacts)], np.zeros(units.n_units)).min(
        axis=-1
    )
    return nearest_um


def _scaled(shapes: Units, contacts: NDArray[np.float64], noise_uv: float, drawn_um: NDArray[np.float64]) -> Units:
    """Give every unit its depth on its best contact, and its trough there the time 0; gains were drawn as sizes at `drawn_um`."""
    nearest = _nearest(shapes, contacts)
    gain_uv = shapes.gain_uv * np.exp(drawn_um / shapes.decay_um)
    centre_ms = shapes.centre_ms.copy()
    fine_ms = np.arange(-0.5, 0.5, 1e-3)
    for k in range(shapes.n_units):
        rough = take(replace(shapes, gain_uv=gain_uv), slice(k, k + 1))
        wave = potentials(rough, contacts[nearest[k : k + 1]], np.zeros(1), fine_ms)[0]
        row, _ = np.unravel_index(np.argmin(wave), wave.shape)
        gain_uv[k] *= shapes.snr[k] * noise_uv / -wave.min()
        centre_ms[k] -= fine_ms[row]
    return replace(shapes, gain_uv=gain_uv, centre_ms=centre_ms)


def take(units: Units, which: slice | NDArray[np.intp]) -> Units:
    """Return some of the units."""
    table = {key: value[which] for key, value in vars(units).items() if key != "sampling_frequency"}
    return Units(units.sampling_frequency, **table)


def log_uniform(rng: np.random.Generator, low: float, high: float, n: int) -> NDArray[np.float64]:
    return np.exp(rng.uniform(np.log(low), np.log(high), n))


def _distances_um(units: Units, contacts: NDArray[np.float64], displacement_um: NDArray[np.float64]) -> NDArray[np.float64]:
    """From every component to the contacts of its unit, (n_units, 6, n_contacts)."""
    aspect = units.aspect[:, None, None]
    steps = contacts[:, None] - units.sources_um[:, :, None, :2]
    distances: NDArray[np.float64] = np.sqrt(
        (steps[..., 0] * aspect) ** 2
        + ((steps[..., 1] - displacement_um[:, None, None]) / aspect) ** 2
        + units.sources_um[:, :, 2:] ** 2
    )
    return distances


def amplitudes(units: Units, contacts: NDArray[np.float64], displacement_um: NDArray[np.float64]) -> NDArray[np.float64]:
    """Evaluate the size of each component, (n_units, 6, n_contacts) uV; parameters as for `potentials`."""
    sizes: NDArray[np.float64] = units.gain_uv[:, :, None] * np.exp(
        -_distances_um(units, contacts, displacement_um) / units.decay_um[:, :, None]
    )
    return sizes


def potentials(
    units: Units, contacts: NDArray[np.float64], displacement_um: NDArray[np.float64], times_ms: NDArray[np.floating[Any]]
) -> NDArray[np.floating[Any]]:
    """Evaluate units, each on contacts of its own.

    Parameters
    ----------
    units : Units
    contacts : ndarray, shape (n_units, n_contacts, 2)
        Where each unit is heard, in um.
    displacement_um : ndarray, shape (n_units,)
        How far each unit's sources are moved along y.
    times_ms : ndarray, shape (n_times,)

    Returns
    -------
    potentials : ndarray, shape (n_units, n_times, n_contacts)
        In uV.
    """
    dtype = times_ms.dtype  # float32 is enough for training, and twice as fast
    steps = contacts - units.sources_um[:, :1, :2]
    delay_ms = (steps * units.slowness_ms_per_um[:, None]).sum(-1) - displacement_um[:, None] * units.slowness_ms_per_um[:, 1:]
    sizes = amplitudes(units, contacts, displacement_um).astype(dtype)
    total = np.zeros((units.n_units, len(times_ms), contacts.shape[1]), dtype)
    for k in range(sizes.shape[1]):
        late_ms = times_ms[None, :, None] - (units.centre_ms[:, k, None] + delay_ms).astype(dtype)[:, None]
        before, after = (0.5**0.5 / units.width_ms[:, k]).astype(dtype).T[:, :, None, None]
        total += sizes[:, k, None] * np.exp(-np.square(late_ms * np.where(late_ms < 0, before, after)))
    return total


def templates_at(units: Units, probe: Probe, displacement_um: float | NDArray[np.float64] = 0.0) -> NDArray[np.float32]:
    """Evaluate all units at one displacement along y, or each at its own (n_units,).

    Returns
    -------
    templates : ndarray, shape (n_units, n_before + n_after, n_channels), float32
        In uV; without displacement the trough on the best contact is at row `units.n_before`.
    """
    templates = np.zeros((units.n_units, units.n_before + units.n_after, probe.n_channels), np.float32)
    moved = np.broadcast_to(displacement_um, units.n_units)
    for unit, template in enumerate(templates):
        channels, wave = sparse_template(units, unit, probe.channel_locations, float(moved[unit]), 0.0)
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
    one, moved = take(units, slice(unit, unit + 1)), np.array([displacement_um])
    wave = potentials(one, contacts[None, channels], moved, rows * 1e3 / units.sampling_frequency)[0]
    heard = np.abs(wave).max(axis=0, initial=0.0) >= REACH_UV
    return channels[heard], wave[:, heard].astype(np.float32)
