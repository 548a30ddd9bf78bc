"""Draw noisy spikes from a bank: two different spikes of the same unit are a positive pair.

The published encoder makes both views from one recorded spike. Here the simulator does what augmentation imitates: another spike of
the unit has its own noise (with the covariance of its patch), size and sub-sample phase and, on occasion, another unit's spike on
top; half of the pairs may be of two places, up to 40 um of drift apart. Then each is treated as the live detector would: the
deepest sample near the trough, on whichever contact noise and drift made it, is the peak, and the snippet is cut around it, off
its centre as often as in life. The clean spike on the same channels is the target of the denoising decoder. All of it is in torch,
on the bank's device, and random through one generator.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from streamsort.train.data import MARGIN, N_BEFORE, N_PHASES, TROUGH, Bank

SLACK = 4  # the noisy trough may be this many samples off
SIZE_SPREAD = 0.08  # of the spikes of a unit: bursts and small moves
STILL_SHARE = 0.5  # of the sites whose pairs are of one place
AUDIBLE = 0.5  # a contact can be the peak channel where the clean trough is at least this part of the deepest


@dataclass(frozen=True)
class Spikes:
    """Spikes drawn from a bank.

    `snippets` and `clean` are (n, n_samples, n_neighbors) float32 in noise units; `clean` is the unit's own template at its nominal
    size and alignment.
    """

    snippets: Tensor
    clean: Tensor


@dataclass(frozen=True)
class Draw:
    """A bank as tensors on one device, and the probability that a spike of another unit of the site lies on top."""

    templates: Tensor
    neighbors: Tensor
    mixing: Tensor
    color: Tensor
    noise: Tensor
    collision: float

    @classmethod
    def of(cls, bank: Bank, collision: float, device: str = "cpu") -> "Draw":
        """Put a bank on a device."""
        tensors = {name: torch.from_numpy(array).to(device) for name, array in vars(bank).items()}
        return cls(**tensors, collision=collision)

    @property
    def n_samples(self) -> int:
        return int(self.templates.shape[4]) - 2 * MARGIN

    def pairs(self, generator: torch.Generator, n_sites: int) -> tuple[Spikes, Spikes]:
        """Draw two spikes of every unit of `n_sites` sites; all units of a site are at the same two places."""
        device = self.templates.device
        n_all, n_units, n_places = self.templates.shape[:3]
        sites = torch.randperm(n_all, generator=generator, device=device)[:n_sites].repeat_interleave(n_units)
        units = torch.arange(n_units, device=device).repeat(n_sites)
        first, second = torch.randint(n_places, (2, n_sites), generator=generator, device=device)
        still = torch.rand(n_sites, generator=generator, device=device) < STILL_SHARE
        second = torch.where(still, first, second)
        one, two = (place.repeat_interleave(n_units) for place in (first, second))
        return self.spikes(generator, sites, units, one), self.spikes(generator, sites, units, two)

    def spikes(self, generator: torch.Generator, sites: Tensor, units: Tensor, places: Tensor) -> Spikes:
        """Draw one noisy spike of each (site, unit, place), all of shape (n,)."""
        wide = self._own(generator, sites, units, places)
        self._add_others(generator, wide, sites, units, places)
        wide += self._noise(generator, sites)
        own = self.templates[sites, units, places, 0]
        depth = own[:, TROUGH - SLACK : TROUGH + SLACK + 1].amin(dim=1)
        audible = depth <= AUDIBLE * depth.amin(dim=1, keepdim=True)
        late, peak = self._peaks(wide, audible)
        columns = self.neighbors[sites, peak]
        rows = late[:, None] + torch.arange(self.n_samples, device=wide.device)
        nominal = torch.arange(MARGIN, MARGIN + self.n_samples, device=wide.device).expand(len(sites), -1)
        return Spikes(_cut(wide, rows, columns), _cut(own, nominal, columns))

    def _own(self, generator: torch.Generator, sites: Tensor, units: Tensor, places: Tensor) -> Tensor:
        """Take each template at a random phase and a random size around its own, (n, n_samples + 2 * SLACK, N_NEAR)."""
        phase = torch.randint(N_PHASES, sites.shape, generator=generator, device=sites.device)
        size = torch.exp(SIZE_SPREAD * torch.randn(sites.shape, generator=generator, device=sites.device))
        return self.templates[sites, units, places, phase, MARGIN - SLACK : -MARGIN + SLACK] * size[:, None, None]

    def _add_others(self, generator: torch.Generator, wide: Tensor, sites: Tensor, units: Tensor, places: Tensor) -> None:
        """Add another unit of the site, shifted; never so large near the trough that the detector would have aligned to it."""
        device, n_units, n_template = sites.device, self.templates.shape[1], self.templates.shape[4]
        drawn = torch.rand((5, len(sites)), generator=generator, device=device)
        hit = torch.nonzero(drawn[0] < self.collision)[:, 0]
        if n_units < 2 or not len(hit):
            return
        drawn, sites, units, places = drawn[1:, hit], sites[hit], units[hit], places[hit]
        other = (units + 1 + (drawn[0] * (n_units - 1)).long()) % n_units
        lag = (4 + (drawn[1] * 38).long()) * torch.where(drawn[2] < 0.5, -1, 1)
        own, theirs = (-self.templates[sites, unit, places, 0, TROUGH].amin(dim=1) for unit in (units, other))
        size = 0.6 + 0.5 * drawn[3]
        near = (lag.abs() < 10) & (size * theirs > 0.7 * own)
        size = torch.where(near, 0.7 * own / theirs.clamp(min=1e-3), size)
        rows = MARGIN - SLACK + torch.arange(wide.shape[1], device=device) - lag[:, None]
        inside = (rows >= 0) & (rows < n_template)
        taken = self.templates[sites[:, None], other[:, None], places[:, None], 0, rows.clamp(0, n_template - 1)]
        wide[hit] += taken * (inside * size[:, None])[..., None]

    def _noise(self, generator: torch.Generator, sites: Tensor) -> Tensor:
        """Cut independent pieces of the site's color and mix them over contacts."""
        length, n_near = self.n_samples + 2 * SLACK, self.templates.shape[5]
        n_starts = self.noise.shape[1] - length
        start = torch.randint(n_starts, (len(sites), n_near), generator=generator, device=sites.device)
        pieces = self.noise.unfold(1, length, 1)[self.color[sites][:, None], start]
        return (self.mixing[sites] @ pieces).transpose(1, 2)

    @staticmethod
    def _peaks(wide: Tensor, audible: Tensor) -> tuple[Tensor, Tensor]:
        """Find the deepest sample near the nominal trough: how many rows later than `-SLACK` it is, and on which contact."""
        near = wide[:, N_BEFORE : N_BEFORE + 2 * SLACK + 1].masked_fill(~audible[:, None], torch.inf)
        deepest = near.flatten(1).argmin(dim=1)
        return deepest // wide.shape[2], deepest % wide.shape[2]


def _cut(traces: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Take rows (n, n_rows) and columns (n, n_columns; -1 for silence) of each of (n, length, n_contacts)."""
    index = torch.arange(len(traces), device=traces.device)[:, None, None]
    return traces[index, rows[:, :, None], columns.clamp(min=0)[:, None]] * (columns >= 0)[:, None]
