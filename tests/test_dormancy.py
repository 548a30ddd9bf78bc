"""A unit silent for ten minutes, which really pass through the sorter, comes back under its id; a new one gets a new one."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from streamsort.compare import compare
from streamsort.config import SorterConfig
from streamsort.identity import carried
from streamsort.records import Chunk, Output, StreamInfo
from streamsort.simulate import GAIN_UV, SimulationConfig, simulated_blocks, truth
from streamsort.sorter import Sorter

RATE = 15000.0  # half the usual samples: ten minutes are long
WARMUP_S, SILENT_S, BACK_S, END_S = 15.0, 25.0, 625.0, 640.0


SIMULATION = SimulationConfig(
    seconds=END_S,
    probe_name="tetrode",
    n_units=3,
    sampling_frequency=RATE,
    snr=(6.0, 12.0),
    rates_hz=(4.0, 6.0),
    silences=((1, SILENT_S, BACK_S),),
    seed=3,
)


@pytest.mark.timeout(300)
def test_ten_minutes_of_silence_leave_a_unit_its_id() -> None:
    outputs = sort(SIMULATION)
    before, after = (ids_of(1, SIMULATION, outputs, *span) for span in ((WARMUP_S, SILENT_S), (BACK_S, END_S)))
    home = int(np.bincount(before).argmax())
    assert (after == home).mean() > 0.95
    assert told(outputs, home).index("dormant") < told(outputs, home).index("revived")
    spikes = np.concatenate([output.spikes for output in outputs])
    quiet = (spikes["sample_index"] > (SILENT_S + 1) * RATE) & (spikes["sample_index"] < (BACK_S - 1) * RATE)
    assert np.count_nonzero(spikes["unit_id"][quiet] == home) < 0.01 * (BACK_S - SILENT_S)


@pytest.mark.timeout(120)
def test_a_unit_that_was_never_there_gets_an_id_of_its_own() -> None:
    simulation = replace(SIMULATION, seconds=45.0, silences=((1, 0.0, 20.0),))
    outputs = sort(simulation)
    known = {name for unit in (0, 2) for name in ids_of(unit, simulation, outputs, WARMUP_S, 20.0).tolist()}
    late = ids_of(1, simulation, outputs, 30.0, 45.0)
    new = int(np.bincount(late).argmax())
    assert (late == new).mean() > 0.95 and new not in known
    assert told(outputs, new)[0] == "born"


def sort(simulation: SimulationConfig) -> list[Output]:
    info = StreamInfo("simulated", RATE, 4, np.dtype(np.int16), np.full(4, GAIN_UV, np.float32), simulation.probe, False)
    sorter = Sorter(SorterConfig.from_dict({"warmup_s": WARMUP_S, "encode": {"encoder": "light"}}), info)
    return [output for chunk in chunks(simulation) for output in sorter.process(chunk)]


def ids_of(unit: int, simulation: SimulationConfig, outputs: list[Output], from_s: float, to_s: float) -> NDArray[np.int64]:
    """Return the ids that a unit's spikes carry, which are most of its spikes."""
    spikes = np.concatenate([output.spikes for output in outputs])
    compared = compare(spikes, truth(simulation), RATE, from_s, to_s)
    spike, found = carried(compared)
    ids = compared.found.labels[found[compared.true.labels[compared.true.unit[spike]] == unit]]
    n_true = int(compared.true.counts()[compared.true.labels == unit].sum())
    assert len(ids) > 0.9 * n_true > 18
    return ids


def told(outputs: list[Output], unit_id: int) -> list[str]:
    return [event["event"] for output in outputs for event in output.ledger if event["unit_id"] == unit_id]


def chunks(simulation: SimulationConfig) -> Iterator[Chunk]:
    for k, block in enumerate(simulated_blocks(simulation)):
        yield Chunk(k * len(block), block)
