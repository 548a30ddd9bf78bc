"""A new encoder for a running stream: ids are kept, no spike is lost, and whatever is wrong with an offer, sorting goes on."""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import Kept
from numpy.typing import NDArray

from streamsort import offers, refresh
from streamsort.cluster import Newcomer
from streamsort.config import RefreshConfig, SorterConfig
from streamsort.encode import Encoder
from streamsort.records import PEAK_DTYPE, Chunk, Output, StreamInfo
from streamsort.refresh import Abandoned, Agreement, Snapshot, Verdict, prepare
from streamsort.reservoir import Memory, Period
from streamsort.session import Session, SessionWriter
from streamsort.shadow import Shadow
from streamsort.simulate import GAIN_UV, Recording, SimulationConfig, simulate_recording
from streamsort.sorter import Sorter
from streamsort.stream import Stream

onnx = pytest.importorskip("onnx", reason="models are made with it")

pytestmark = pytest.mark.timeout(60)

RATE = 30000
PATIENCE_S = 30.0
SNAPSHOT_AT, OFFER_AT = 165_000, 168_000  # the swap is at the next learning boundary
BOUNDARY, BACK_AT = 172_500, 195_000  # the first is the end of a learning period
Edit = Callable[[str, NDArray[Any], np.random.Generator], NDArray[Any]]


@pytest.fixture(scope="module")
def shipped() -> Path:
    return Encoder(provider="cpu").path


def config_of(path: Path, **refresh: Any) -> SorterConfig:
    return SorterConfig.from_dict(
        {
            "warmup_s": 3.0,
            "preprocess": {"noise_s": 0.5, "noise_period_s": 0.5},
            "encode": {"encoder": str(path), "provider": "cpu"},
            "refresh": {"replay_s": 5.0, "watch_s": 3.0, "save_s": 0.1, **refresh},
            "stream": {"status_s": 0.05},
        }
    )


@pytest.fixture(scope="module")
def recording() -> Recording:
    return simulate_recording(
        SimulationConfig(seconds=7.5, probe_name="tetrode", n_units=4, snr=(6, 14), rates_hz=(20, 40), drift_um=10, seed=3)
    )


def info_of(recording: Recording) -> StreamInfo:
    n_channels = recording.traces.shape[1]
    gain = np.full(n_channels, GAIN_UV, np.float32)
    return StreamInfo("simulated", float(RATE), n_channels, recording.traces.dtype, gain, recording.probe, False)


def write_model(folder: Path, name: str, model: Any, source: Path, **changes: Any) -> Path:
    """Put a model and its contract where a trainer would, the contract last."""
    folder.mkdir(exist_ok=True)
    data = model.SerializeToString()
    contract = json.loads(source.with_suffix(".json").read_text()) | {"name": name, "sha256": hashlib.sha256(data).hexdigest()}
    (folder / f"{name}.onnx").write_bytes(data)
    partial = folder / f"{name}.partial"
    partial.write_text(json.dumps(contract | changes))
    os.replace(partial, folder / f"{name}.json")
    return folder / f"{name}.onnx"


def with_weights(source: Path, edit: Edit) -> Any:
    model, rng = onnx.load(source), np.random.default_rng(1)
    for item in model.graph.initializer:
        weights = onnx.numpy_helper.to_array(item)
        if weights.dtype == np.float32 and weights.ndim:
            new = np.ascontiguousarray(edit(item.name, weights, rng), np.float32)
            item.CopyFrom(onnx.numpy_helper.from_array(new, item.name))
    return model


def with_output(source: Path, matrix: NDArray[Any], shift: float = 0.0) -> Any:
    """Multiply the embeddings by a matrix, inside the graph."""
    model = onnx.load(source)
    output = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["before" if name == output else name for name in node.output]
    constants = {"matrix": matrix.astype(np.float32), "shift": np.full(len(matrix), shift, np.float32)}
    model.graph.initializer.extend([onnx.numpy_helper.from_array(array, name) for name, array in constants.items()])
    model.graph.node.append(onnx.helper.make_node("MatMul", ["before", "matrix"], ["turned"]))
    model.graph.node.append(onnx.helper.make_node("Add", ["turned", "shift"], [output]))
    return model


def turned(source: Path) -> Any:
    """Make a model that says the same in other words: its space is rotated, stretched and moved."""
    matrix = np.linalg.qr(np.random.default_rng(5).normal(size=(32, 32)))[0]
    return with_output(source, 3 * matrix, 1.0)


def blind(source: Path) -> Any:
    """Make a model to which all spikes are the same."""
    return with_output(source, np.zeros((32, 32)), 1.0)


def linear(n_samples: int) -> Any:
    """Make a model for windows of that length: one matrix."""
    matrix = onnx.numpy_helper.from_array(np.ones((n_samples * 11, 32), np.float32), "matrix")
    nodes = [
        onnx.helper.make_node("Flatten", ["snippets"], ["row"]),
        onnx.helper.make_node("MatMul", ["row", "matrix"], ["embeddings"]),
    ]
    shapes = {"snippets": ["batch", n_samples, 11], "embeddings": ["batch", 32]}
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = onnx.helper.make_graph(nodes, "linear", ends[:1], ends[1:], [matrix])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)


def random_weights(source: Path) -> Any:
    return with_weights(source, lambda _, weights, rng: weights.std() * rng.normal(size=weights.shape))


def a_little_trained(source: Path) -> Any:
    return with_weights(source, lambda _, weights, rng: weights + 0.02 * weights.std() * rng.normal(size=weights.shape))


@pytest.fixture(scope="module")
def models(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    makers = {"turned": turned, "trained": a_little_trained, "random": random_weights, "blind": blind}
    return {name: write_model(folder, name, make(shipped), shipped) for name, make in makers.items()}


def chunks(traces: NDArray[Any], sizes: Iterable[int], start: int = 0) -> Iterator[Chunk]:
    for size in cycle(sizes):
        if start >= len(traces):
            return
        yield Chunk(start, traces[start : start + size])
        start += size


def process(sorter: Sorter, traces: NDArray[Any], start: int, stop: int, sizes: Iterable[int] = (3000,)) -> list[Output]:
    return [output for chunk in chunks(traces[:stop], sizes, start) for output in sorter.process(chunk)]


def spikes_of(outputs: Iterable[Output]) -> NDArray[Any]:
    """Return all spikes in order of time; those that no unit explains come out a little later than the others."""
    spikes = np.concatenate([output.spikes for output in outputs])
    return spikes[np.lexsort((spikes["channel"], spikes["unit_id"], spikes["sample_index"]))]


def ledger_of(outputs: Iterable[Output], event: str = "model") -> list[dict[str, Any]]:
    return [line for output in outputs for line in output.ledger if line["event"] == event]


@pytest.fixture(scope="module")
def steady(recording: Recording, shipped: Path) -> list[Output]:
    """Sort with one encoder from beginning to end."""
    return process(Sorter(config_of(shipped), info_of(recording)), recording.traces, 0, len(recording.traces))


@pytest.fixture(scope="module")
def snapshot(recording: Recording, shipped: Path) -> Snapshot:
    sorter = Sorter(config_of(shipped), info_of(recording))
    process(sorter, recording.traces, 0, SNAPSHOT_AT)
    found = sorter.snapshot()
    assert found is not None and found.sample_index == SNAPSHOT_AT
    return found


def judge(path: Path, snapshot: Snapshot) -> Verdict:
    return prepare(Encoder(path, "cpu"), snapshot, RefreshConfig())


def swapped(
    recording: Recording, shipped: Path, verdict: Verdict, encoder: Encoder, sizes: Iterable[int]
) -> tuple[Sorter, list[Output]]:
    sorter = Sorter(config_of(shipped), info_of(recording))
    outputs = process(sorter, recording.traces, 0, OFFER_AT, sizes)
    sorter.offer(verdict, encoder)
    return sorter, outputs + process(sorter, recording.traces, OFFER_AT, len(recording.traces), sizes)


# ---- what is remembered


def period(start: int, n: int, unit: int = 1) -> Period:
    peaks = np.zeros(n, PEAK_DTYPE)
    peaks["sample_index"] = start + np.arange(n)
    return Period(peaks, np.full(n, unit), np.full(n, unit), np.zeros((n, 2), np.float32), np.zeros((n, 3, 1), np.float32))


def test_memory_of_peaks_is_bounded_by_time_and_by_number() -> None:
    memory = Memory(RefreshConfig(replay_s=1.0, replay_spikes=100), sampling_frequency=1000.0)
    for start in range(0, 5000, 250):
        memory.add_period(period(start, 10))
    assert [int(kept.peaks["sample_index"][0]) for kept in memory.periods()] == [3750, 4000, 4250, 4500, 4750]
    memory.add_period(period(5000, 85))
    assert sum(len(kept.peaks) for kept in memory.periods()) == 95


def test_memory_of_prototypes_keeps_the_latest_one_of_each_period() -> None:
    memory = Memory(RefreshConfig(snippets=3), sampling_frequency=1000.0)
    for start in range(0, 500, 100):
        some = period(start, 6)
        memory.add_members(np.array([7, -1, 7, 4, 7, -1]), some.peaks, some.white, some.snippets)
    kept = {serial: [member.sample_index for member in members] for serial, members in memory.members().items()}
    assert kept == {4: [203, 303, 403], 7: [202, 302, 402]}
    memory.keep_only([7, 8])
    assert memory.members().keys() == {7}


# ---- what agreement is


def test_agreement_leaves_out_what_both_leave_unsorted() -> None:
    before = np.array([1, 1, 1, 2, 2, -1, -1, -1])
    after = np.array([1, 1, 2, 2, -1, 3, -1, -1])
    found = Agreement.of(before, after, few=1)
    assert (found.overall, found.n_spikes) == (0.5, 6)
    assert found.by_unit == {1: 0.6667, 2: 0.3333, 3: 0.0}


def test_a_unit_with_few_spikes_is_judged_by_what_is_remembered_of_it() -> None:
    before = np.repeat([1, 2, 3], [50, 5, 5])
    remembered = np.repeat([1, 2], [30, 30]), np.repeat([4, 2, 4], [30, 21, 9])
    found = Agreement.of(before, before, extra=remembered)
    assert found.overall == 1.0  # which is of the stream alone
    # Unit 1 fired enough to be judged without; of unit 3 too little is known; what was taken for unit 4 never was.
    assert found.by_unit == {1: 1.0, 2: round(26 / 35, 4), 4: 0.0}
    assert "unit 4 over 39 spikes" in found.shortfall(RefreshConfig())


def test_a_swap_is_undone_for_what_is_no_chance_alone() -> None:
    found = Agreement.of(np.repeat([1, 2], [970, 30]), np.repeat([1, 2], [975, 25]))
    assert found.by_unit == {1: 0.9949, 2: 0.8333}
    assert "unit 2 over 30 spikes" in found.shortfall(RefreshConfig())
    assert found.shortfall(RefreshConfig(), n_errors=3.0) == ""
    many = Agreement.of(np.repeat([1, 2], [97000, 3000]), np.repeat([1, 2], [97500, 2500]))
    assert "unit 2 over 3000 spikes" in many.shortfall(RefreshConfig(), n_errors=3.0)


# ---- whom the gate lets through


@pytest.mark.parametrize(("name", "at_least"), [("turned", 0.999), ("trained", 0.99)])
def test_an_equivalent_encoder_is_accepted(models: dict[str, Path], snapshot: Snapshot, name: str, at_least: float) -> None:
    verdict = judge(models[name], snapshot)
    assert verdict.ok and verdict.reason == "accepted" and verdict.name == name
    assert verdict.agreement is not None and verdict.agreement.overall >= at_least
    assert min(verdict.agreement.by_unit.values()) >= 0.97 and len(verdict.agreement.by_unit) >= 4
    assert verdict.separation == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("name", ["random", "blind"])
def test_an_encoder_that_forgot_is_refused(models: dict[str, Path], snapshot: Snapshot, name: str) -> None:
    verdict = judge(models[name], snapshot)
    assert not verdict.ok and verdict.space is None and "expected" in verdict.reason
    assert verdict.separation is not None and verdict.separation < RefreshConfig().separation


def test_an_encoder_that_gives_no_numbers_is_refused(shipped: Path, snapshot: Snapshot, tmp_path: Path) -> None:
    path = write_model(tmp_path, "nan", with_output(shipped, np.full((32, 32), np.nan)), shipped)
    assert judge(path, snapshot).reason == "its embeddings are not finite"


def test_too_few_spikes_are_no_evidence(models: dict[str, Path], snapshot: Snapshot) -> None:
    short = replace(snapshot, periods=snapshot.periods[-2:])
    assert judge(models["turned"], short).reason == f"{short.n_sorted} recent spikes to compare on, expected 200"


def test_a_comparison_can_be_given_up(models: dict[str, Path], snapshot: Snapshot) -> None:
    with pytest.raises(Abandoned):
        prepare(Encoder(models["turned"], "cpu"), snapshot, RefreshConfig(), stopped=lambda: True)


def test_the_same_snapshot_gives_the_same_verdict(models: dict[str, Path], snapshot: Snapshot) -> None:
    one, other = judge(models["trained"], snapshot), judge(models["trained"], snapshot)
    assert one.space is not None and other.space is not None
    assert all(a.tobytes() == b.tobytes() for a, b in zip(vars(one.space).values(), vars(other.space).values(), strict=True))


# ---- the swap


@pytest.fixture(scope="module")
def verdict(models: dict[str, Path], snapshot: Snapshot) -> Verdict:
    return judge(models["turned"], snapshot)


def test_a_swap_keeps_ids_and_loses_nothing(
    recording: Recording, shipped: Path, models: dict[str, Path], verdict: Verdict, steady: list[Output]
) -> None:
    sorter, outputs = swapped(recording, shipped, verdict, Encoder(models["turned"], "cpu"), [3000])
    spikes, reference = spikes_of(outputs), spikes_of(steady)
    np.testing.assert_array_equal(spikes["sample_index"], reference["sample_index"])
    (event,) = ledger_of(outputs)
    assert event["sample_index"] == max(output.through_sample for output in outputs if output.model != "turned")
    assert BOUNDARY - 120 < event["sample_index"] < BOUNDARY
    assert (event["model"], event["offered"], event["unit_id"], event["reason"]) == ("turned", "turned", None, "accepted")
    assert event["agreement"] >= 0.999 and len(event["agreement_by_unit"]) >= 4
    before = spikes["sample_index"] < event["sample_index"]
    assert spikes[before].tobytes() == reference[before].tobytes()
    assert (~before).sum() > 100
    assert (spikes["unit_id"][~before] == reference["unit_id"][~before]).mean() > 0.995
    assert ledger_of(outputs, "born") == ledger_of(steady, "born")
    assert sorter.counters()["encoder"] == "turned"


def test_each_output_names_the_encoder_that_named_its_spikes(
    recording: Recording, shipped: Path, models: dict[str, Path], verdict: Verdict
) -> None:
    _, outputs = swapped(recording, shipped, verdict, Encoder(models["turned"], "cpu"), [1000])
    at = ledger_of(outputs)[0]["sample_index"]
    names = [output.model for output in outputs]
    assert names == sorted(names) and set(names) == {json.loads(shipped.with_suffix(".json").read_text())["name"], "turned"}
    for output in outputs:
        if output.model == "turned":
            assert (output.spikes["sample_index"] >= at).all()
        else:
            assert (output.spikes["sample_index"] < BOUNDARY).all()
    assert [line["event"] for line in outputs[names.index("turned")].ledger][-1] == "model"


@pytest.mark.parametrize("sizes", [[OFFER_AT // 3], [600, 30, 2370]], ids=["large", "mixed"])
def test_chunk_size_makes_no_difference_to_a_swap(
    recording: Recording, shipped: Path, models: dict[str, Path], verdict: Verdict, sizes: list[int]
) -> None:
    _, expected = swapped(recording, shipped, verdict, Encoder(models["turned"], "cpu"), [3000])
    _, outputs = swapped(recording, shipped, verdict, Encoder(models["turned"], "cpu"), sizes)
    assert spikes_of(outputs).tobytes() == spikes_of(expected).tobytes()
    assert [line for o in outputs for line in o.ledger] == [line for o in expected for line in o.ledger]


class Played:
    """A source of prepared chunks, as fast as they are taken or so many times faster than they came."""

    counters: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, info: StreamInfo, played: Iterable[Chunk], speed: float = float("inf")) -> None:
        self.info = info
        self._chunks, self._speed = iter(played), speed
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[Chunk]:
        for chunk in self._chunks:
            if self._closed.wait(chunk.n_samples / RATE / self._speed):
                return
            yield chunk

    def close(self) -> None:
        self._closed.set()

    def __enter__(self) -> "Played":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_threads_make_no_difference_to_a_swap(
    recording: Recording, shipped: Path, models: dict[str, Path], verdict: Verdict
) -> None:
    """What waits behind the boundary is encoded together with what lies before it, and once more after the swap."""
    expected, kept = Kept(), Kept()
    for sink, threaded in ((expected, False), (kept, True)):
        sorter = Sorter(config_of(shipped), info_of(recording))
        sorter.offer(verdict, Encoder(models["turned"], "cpu"))  # at the first boundary with units
        if threaded:
            with Stream(Played(sorter.info, chunks(recording.traces, [30_000])), sorter, [sink]) as stream:
                assert stream.wait(PATIENCE_S)
        else:
            sink.outputs = process(sorter, recording.traces, 0, len(recording.traces))
    assert spikes_of(kept.outputs).tobytes() == spikes_of(expected.outputs).tobytes()
    assert ledger_of(kept.outputs) == ledger_of(expected.outputs) != []


def test_a_unit_born_between_snapshot_and_swap_is_carried_over(
    shipped: Path, models: dict[str, Path], snapshot: Snapshot, verdict: Verdict
) -> None:
    prototypes = snapshot.prototypes.copy()
    member = next(iter(snapshot.members.values()))[-1]
    place = member.white + np.float32(9)  # where there was nothing
    prototypes.add(Newcomer(0, -1, np.arange(81, 101), place, 1.0, member.snippet), unit_id=99)
    assert verdict.space is not None
    moved = prototypes.in_space(verdict.space)
    assert moved.unit.tolist() == prototypes.unit.tolist() and moved.serial.tolist() == prototypes.serial.tolist()
    raw = np.linalg.solve(prototypes.whitening.T.astype(np.float64), place)
    matrix = np.linalg.qr(np.random.default_rng(5).normal(size=(32, 32)))[0]
    there = (raw @ (3 * matrix) + 1.0).astype(np.float32)
    assert moved.predict(there[None], np.array([0])).unit.tolist() == [99]
    assert prototypes.predict(raw.astype(np.float32)[None], np.array([0])).unit.tolist() == [99]


def test_a_refusal_changes_nothing_but_the_ledger(recording: Recording, shipped: Path, steady: list[Output]) -> None:
    sorter = Sorter(config_of(shipped), info_of(recording))
    sorter.offer(Verdict("bad", "", "refused for a test"))
    outputs = process(sorter, recording.traces, 0, len(recording.traces))
    assert spikes_of(outputs).tobytes() == spikes_of(steady).tobytes()
    (event,) = ledger_of(outputs)
    assert (event["offered"], event["reason"], event["agreement"]) == ("bad", "refused for a test", None)
    assert event["model"] == sorter.encoder.name != "bad"


# ---- after the swap


@contextlib.contextmanager
def open_gate() -> Iterator[None]:
    """Let everyone through."""
    with pytest.MonkeyPatch.context() as gate:
        gate.setattr(Agreement, "shortfall", lambda *_: "")
        gate.setattr(refresh, "_separation", lambda *_: 1.0)
        yield


def after_swap(recording: Recording, shipped: Path, path: Path, snapshot: Snapshot) -> tuple[Sorter, Shadow]:
    """Let an encoder take over, whatever it is worth, and run on for a while."""
    sorter = Sorter(config_of(shipped), info_of(recording))
    process(sorter, recording.traces, 0, SNAPSHOT_AT)
    with open_gate():
        verdict = judge(path, snapshot)
    sorter.offer(verdict, Encoder(path, "cpu"))
    process(sorter, recording.traces, SNAPSHOT_AT, BACK_AT)
    return sorter, Shadow(replace(snapshot, encoder=Encoder(shipped, "cpu")), verdict, RefreshConfig())


def test_the_former_encoder_agrees_with_a_good_one(
    recording: Recording, shipped: Path, models: dict[str, Path], snapshot: Snapshot
) -> None:
    sorter, shadow = after_swap(recording, shipped, models["turned"], snapshot)
    now = sorter.snapshot()
    assert now is not None
    agreement, back = shadow.look(now)
    assert back is None and agreement.overall > 0.97 and agreement.n_spikes > 50
    assert shadow.look(now)[0].n_spikes == agreement.n_spikes  # nothing is heard twice


def test_a_bad_encoder_is_put_back_and_ids_are_what_they_were(
    recording: Recording, shipped: Path, models: dict[str, Path], snapshot: Snapshot, steady: list[Output]
) -> None:
    sorter, shadow = after_swap(recording, shipped, models["blind"], snapshot)
    now = sorter.snapshot()
    assert now is not None
    agreement, back = shadow.look(now)
    assert back is not None and agreement.overall < 0.9 and back.reason.startswith("rolled back: agreement 0.")
    sorter.offer(back, shadow.encoder)
    outputs = process(sorter, recording.traces, BACK_AT, len(recording.traces))
    at = ledger_of(outputs)[-1]["sample_index"]
    spikes, reference = (all_of[all_of["sample_index"] >= at] for all_of in (spikes_of(outputs), spikes_of(steady)))
    # Embeddings say what is born, so the trains need not be equal to the last spike.
    apart = np.abs(spikes["sample_index"][:, None] - reference["sample_index"])
    nearest = apart.argmin(axis=0)
    same = (apart.min(axis=0) < 12) & (spikes["unit_id"][nearest] == reference["unit_id"])
    assert len(reference) > 50 and same.mean() > 0.8


# ---- a stream with a session directory


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def until(stream: Stream, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_S
    while not holds(status := stream.status()):
        assert time.monotonic() < deadline, status["refresh"]
        assert not stream.wait(0.01)
    return status


def endless(traces: NDArray[Any]) -> Iterator[Chunk]:
    start = 0
    while True:
        yield from (replace(chunk, start_sample=chunk.start_sample + start) for chunk in chunks(traces, [3000]))
        start += len(traces)


class Live:
    """A stream in the middle of a session."""

    def __init__(self, recording: Recording, shipped: Path, folder: Path) -> None:
        self.sorter = Sorter(config_of(shipped), info_of(recording))
        self.first = self.sorter.encoder.name
        self.kept = Kept()
        self.path = folder / "session"
        writer = SessionWriter(self.path, {}, recording.probe, float(RATE))
        self.models = self.path / "models"
        self.stream = Stream(
            Played(self.sorter.info, endless(recording.traces), speed=4.0), self.sorter, [self.kept], archive=writer
        )

    def judged(self, n_offers: int) -> dict[str, Any]:
        def holds(status: dict[str, Any]) -> bool:
            news = status["refresh"]
            return news["accepted"] + news["refused"] == n_offers and not news["watching"]  # type: ignore[no-any-return]

        return until(self.stream, holds)


@pytest.fixture
def live(recording: Recording, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    monkeypatch.setattr(offers, "_POLL_S", 0.02)
    live = Live(recording, shipped, tmp_path)
    with live.stream:
        yield live


def test_broken_offers_are_refused_once_and_a_good_one_takes_over(live: Live, shipped: Path, models: dict[str, Path]) -> None:
    offer = partial(write_model, live.models, source=shipped)
    good = onnx.load(models["turned"])
    offer("a-random", random_weights(shipped))
    offer("b-window", linear(60), n_samples=60, n_before=30, ms_before=1.0)
    offer("c-replaced", good, sha256=hashlib.sha256(b"another").hexdigest())
    (live.models / "d-torn.onnx").write_bytes(models["turned"].read_bytes()[:5000])
    torn = json.loads(models["turned"].with_suffix(".json").read_text())
    torn["sha256"] = hashlib.sha256(models["turned"].read_bytes()[:5000]).hexdigest()
    (live.models / "d-torn.json").write_text(json.dumps(torn))
    (live.models / "e-alone.json").write_text(json.dumps(torn))
    (live.models / "f-half.onnx").write_bytes(models["turned"].read_bytes())
    (live.models / "f-half.json").write_text("{")
    assert live.judged(6)["refresh"]["refused"] == 6
    (live.models / "f-half.json").write_text("{")  # touched, not another
    offer("g-good", good)
    status = live.judged(7)
    live.stream.stop()
    news, session = live.stream.status()["refresh"], Session(live.path)
    assert (news["offers"], news["accepted"], news["refused"], news["rolled_back"]) == (7, 1, 6, 0)
    assert status["encoder"] == "g-good" and news["agreement"] > 0.98 and news["last_offer"] == "g-good"
    events = {event["offered"]: event for event in session.ledger if event["event"] == "model"}
    says = {"a-random": "expected", "b-window": "takes (30, 30, 11)", "c-replaced": "sha256", "e-alone": "no such file"}
    for name, words in {**says, "d-torn": "", "f-half": "not JSON", "g-good": "accepted"}.items():
        assert words in events[name]["reason"] and "\n" not in events[name]["reason"]
        assert events[name]["model"] == ("g-good" if name == "g-good" else live.first)
    assert session.manifest["counters"]["model"] == "g-good" and session.manifest["clean"] is True


def test_the_trainer_finds_the_snippets_of_each_unit(live: Live) -> None:
    until(live.stream, lambda status: status["samples_acquired"] > 8 * RATE and (live.path / "reservoir.npz").is_file())
    running = dict(np.load(live.path / "reservoir.npz"))
    live.stream.stop()
    ended = dict(np.load(live.path / "reservoir.npz"))
    for found in (running, ended):
        n = len(found["unit_id"])
        assert n > 50 and found["snippets"].shape == (n, 48, 11)
        assert [found[name].dtype for name in ("snippets", "unit_id", "channel", "sample_index")] == ["f4", "i4", "u2", "i8"]
        assert (found["unit_id"] > 0).all() and (np.bincount(found["unit_id"]) <= 4 * 6 * 64).all()
    spikes = Session(live.path).spikes
    delay = live.sorter._preprocess.delay_samples
    late = ended["sample_index"] > 5 * RATE
    same = [  # a peak is not quite where its unit's template lies
        (np.abs(spikes["sample_index"][spikes["unit_id"] == unit] + delay - index) <= round(0.3e-3 * RATE)).any()
        for index, unit in zip(ended["sample_index"][late], ended["unit_id"][late], strict=True)
    ]
    assert late.sum() > 20 and np.mean(same) > 0.99


def test_a_live_fall_in_agreement_rolls_back(live: Live, shipped: Path, models: dict[str, Path]) -> None:
    with open_gate():
        write_model(live.models, "blind", onnx.load(models["blind"]), shipped)
        until(live.stream, lambda status: status["refresh"]["accepted"] == 1)
    status = until(live.stream, lambda status: status["refresh"]["rolled_back"] == 1)
    n_kept = len(live.kept.outputs)
    until(live.stream, lambda _: any(output.model for output in live.kept.outputs[n_kept + 10 :]))
    live.stream.stop()
    assert (status["refresh"]["offers"], status["refresh"]["watching"]) == (1, False)
    events = [event for event in Session(live.path).ledger if event["event"] == "model"]
    assert [event["model"] for event in events] == ["blind", live.first]
    assert events[1]["reason"].startswith("rolled back: agreement")
    names = [output.model for output in live.kept.outputs if output.model]
    assert names[0] == names[-1] == live.first and "blind" in names


def test_without_a_session_there_is_no_refresh(recording: Recording, shipped: Path) -> None:
    sorter = Sorter(config_of(shipped), info_of(recording))
    with Stream(Played(sorter.info, chunks(recording.traces, [3000])), sorter, [Kept()]) as stream:
        assert not [thread for thread in threading.enumerate() if "refresh" in thread.name]
        assert stream.wait(PATIENCE_S)
    assert stream.status()["refresh"] == {}
