"""What the learner asks about groups of strangers: whether they are what larger spikes leave, and whether they are known."""

from collections.abc import Sequence

import numpy as np
import pytest
from scenes import RATE, Cell, maker, mean_snippets

from streamsort.assign import Notes
from streamsort.bank import Bank
from streamsort.config import SorterConfig
from streamsort.learner import Learner, share_near
from streamsort.probe import Probe
from streamsort.snippets import Snippets

PROBE = Probe.linear(24, 20.0)
LARGE, SMALL, FAR = Cell(20.0, 40.0, 15.0), Cell(8.0, 60.0, 15.0), Cell(6.0, 440.0, 15.0)
REACH = 60


def test_chance_makes_no_share(rng: np.random.Generator) -> None:
    span = 1_000_000
    times, others = (np.sort(rng.integers(0, span, n)) for n in (4000, 3000))
    assert share_near(times, others, REACH, span) == pytest.approx(0.0, abs=0.03)
    assert share_near(others + 40, others, REACH, span) == pytest.approx(1 - 0.304, abs=0.01)
    assert share_near(times, others[:0], REACH, span) == 0.0


@pytest.mark.parametrize("lag", [-6, 0, 5])
def test_a_known_unit_is_recognised_out_of_place(lag: int) -> None:
    units = Bank(maker(PROBE), mean_snippets([LARGE, SMALL, FAR], PROBE), np.full(3, 200), np.full(3, 5.0), RATE)
    cosine, energy = units.likeness_to(np.roll(units.mean(1), lag, axis=0) * np.float32(1.1))
    assert cosine.argmax() == 1 and cosine[1] > 0.9 and cosine[0] < 0.8 and cosine[2] == 0
    assert energy == pytest.approx(1.21 * units.templates.energy[1], rel=0.1)


def learner_of(cells: Sequence[Cell]) -> tuple[Learner, Bank]:
    """Return a learner with a bank of these units."""
    config, n = SorterConfig(), len(cells)
    learner = Learner(config, PROBE, RATE, Snippets(config.snippets, PROBE, RATE), n_dims=4)
    bank = learner.bank = Bank(maker(PROBE), mean_snippets(cells, PROBE), np.full(n, 200), np.full(n, 5.0), RATE)
    learner.unit_ids = [learner.registry.born(0, "calibration") for _ in range(n)]
    for row in range(n):
        learner._place(bank, row)
    return learner, bank


def test_units_in_force_stay_as_they_are_until_the_next_are_known() -> None:
    """Also when a unit is born meanwhile, and when nothing was learned."""
    learner, bank = learner_of([LARGE, FAR])
    in_force = learner._known()
    assert learner._known().templates is in_force.templates
    for k in range(6):
        before = in_force.templates.copied()
        bank.reset(k % 2, (1 + 0.1 * k) * LARGE.at(PROBE), 200)
        if k == 3:
            bank.add(SMALL.at(PROBE), 20, 2.0)
            learner.unit_ids.append(learner.registry.born(0, "new cluster"))
        coming = learner._known()
        for name, was, now in zip(before._fields, before, in_force.templates, strict=True):
            np.testing.assert_array_equal(now, was, err_msg=name)
        for name, learned, now in zip(before._fields, bank.templates, coming.templates, strict=True):
            np.testing.assert_array_equal(now, learned, err_msg=name)
        in_force = coming


def test_after_a_step_units_are_where_the_tissue_took_them() -> None:
    learner, bank = learner_of([LARGE, FAR])
    units = learner.registry.units.values()
    before = [unit.y_um for unit in units]
    learner.motion.change_um[:] = -20.0
    learner._follow(bank, Notes(learner._known(), [], [], [], [], 0), 7500)
    np.testing.assert_allclose([unit.y_um for unit in units], np.array(before) - 20, atol=4)
