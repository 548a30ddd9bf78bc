"""Where the contacts are, and which of them are neighbours.

Geometry comes from probeinterface; what the stages need of it are tables of `neighbors`: the channels of a snippet, nearest first,
and those among which only one peak may win. They are (n_channels, k) int32 padded with -1, so kernels index them without a
dictionary. Contacts on different shanks are never neighbours.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import probeinterface
from numpy.typing import NDArray

from streamsort.errors import StreamsortError

_UM_PER = {"um": 1.0, "mm": 1e3, "m": 1e6}


def _shank_ids(probe: Any) -> list[str]:
    ids = probe.shank_ids
    return [""] * probe.get_contact_count() if ids is None else [str(name) for name in ids]


@dataclass(frozen=True)
class Probe:
    """Contacts in the order of the stream's channels.

    Parameters
    ----------
    channel_locations : ndarray, shape (n_channels, 2), float64
        Position of each channel's contact in um.
    shanks : ndarray, shape (n_channels,), int32
        Shank of each contact; channels of different shanks never share a snippet.

    Examples
    --------
    >>> probe = Probe.linear(4, pitch_um=20.0)
    >>> probe.neighbors(radius_um=25.0, n_neighbors=3)
    array([[ 0,  1, -1],
           [ 1,  0,  2],
           [ 2,  1,  3],
           [ 3,  2, -1]], dtype=int32)
    """

    channel_locations: NDArray[np.float64]
    shanks: NDArray[np.int32]

    def __post_init__(self) -> None:
        locations = np.asarray(self.channel_locations, dtype=np.float64)
        if locations.ndim != 2 or locations.shape[1] != 2 or not np.isfinite(locations).all():
            raise StreamsortError(f"probe: channel_locations have shape {locations.shape}, expected (n_channels, 2) finite um")
        shanks = np.asarray(self.shanks, dtype=np.int32)
        if shanks.shape != locations.shape[:1]:
            raise StreamsortError(f"probe: {shanks.shape[0]} shank ids for {locations.shape[0]} contacts")
        object.__setattr__(self, "channel_locations", locations)
        object.__setattr__(self, "shanks", shanks)

    @property
    def n_channels(self) -> int:
        return len(self.channel_locations)

    @classmethod
    def linear(cls, n_channels: int, pitch_um: float = 20.0) -> "Probe":
        """Make one column of contacts: what is assumed, and said, when a source knows no geometry."""
        locations = np.zeros((n_channels, 2))
        locations[:, 1] = np.arange(n_channels) * pitch_um
        return cls(locations, np.zeros(n_channels, np.int32))

    @classmethod
    def from_probeinterface(cls, path: str | Path) -> "Probe":
        """Read a probeinterface JSON file; several probes in it become one channel list with shanks kept apart.

        Raises
        ------
        StreamsortError
            If the file is missing, is not a probeinterface document, or does not connect each channel 0..n-1 exactly once.
        """
        try:
            group = probeinterface.read_probeinterface(path)
            positions = np.concatenate([np.asarray(p.contact_positions)[:, :2] * _UM_PER[p.si_units] for p in group.probes])
        except FileNotFoundError:
            raise StreamsortError(f"probe {path}: no such file") from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise StreamsortError(f"probe {path}: not a probeinterface file ({type(error).__name__}: {error})") from None
        wired = [p.device_channel_indices for p in group.probes]
        channels = np.concatenate(wired) if all(w is not None for w in wired) else np.arange(len(positions))
        used = np.flatnonzero(channels >= 0)
        rank = used[np.argsort(channels[used], kind="stable")]
        if not np.array_equal(channels[rank], np.arange(len(rank))):
            raise StreamsortError(f"probe {path}: device_channel_indices are not 0..{len(rank) - 1}, each once")
        names = [f"{k}/{name}" for k, p in enumerate(group.probes) for name in _shank_ids(p)]
        order = {name: k for k, name in enumerate(dict.fromkeys(names))}
        return cls(positions[rank], np.array([order[name] for name in names], np.int32)[rank])

    def to_probeinterface(self, path: str | Path) -> None:
        """Write a probeinterface JSON file with the contacts in channel order."""
        probe = probeinterface.Probe(ndim=2, si_units="um")
        probe.set_contacts(self.channel_locations, shapes="circle", shape_params={"radius": 6.0}, shank_ids=self.shanks.astype(str))
        probe.set_device_channel_indices(np.arange(self.n_channels))
        probeinterface.write_probeinterface(path, probe)

    def distances_um(self) -> NDArray[np.float64]:
        """Distance between every two contacts, (n_channels, n_channels) um; infinite between shanks."""
        steps = self.channel_locations[:, None] - self.channel_locations[None]
        distances: NDArray[np.float64] = np.hypot(steps[..., 0], steps[..., 1])
        distances[self.shanks[:, None] != self.shanks[None]] = np.inf
        return distances

    def neighbors(self, radius_um: float, n_neighbors: int | None = None) -> NDArray[np.int32]:
        """List each channel's neighbours, nearest first and itself at the head, padded with -1.

        Parameters
        ----------
        radius_um : float
            Contacts up to this distance count, inclusive.
        n_neighbors : int, optional
            Width of the table; by default as wide as the fullest neighbourhood.

        Returns
        -------
        table : ndarray, shape (n_channels, n_neighbors), int32
            Equal distances are ordered by channel, so the table is the same on every machine.
        """
        distances = np.round(self.distances_um(), 3)
        order = np.argsort(distances, axis=1, kind="stable")
        within = np.take_along_axis(distances, order, axis=1) <= radius_um
        width = n_neighbors if n_neighbors is not None else max(int(within.sum(axis=1).max(initial=0)), 1)
        table = np.full((self.n_channels, width), -1, np.int32)
        keep = min(width, self.n_channels)
        table[:, :keep] = np.where(within, order, -1)[:, :keep]
        return table
