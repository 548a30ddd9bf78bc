import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamsort.cli import main
from streamsort.config import SorterConfig
from streamsort.encode import Encoder
from streamsort.errors import StreamsortError
from streamsort.probe import Probe
from streamsort.session import Session, SessionWriter

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from streamsort.train import export  # noqa: E402
from streamsort.train import refresh as module  # noqa: E402
from streamsort.train.export import load_encoder, write_model  # noqa: E402
from streamsort.train.held_out import Figures, HeldOut, embed  # noqa: E402
from streamsort.train.networks import NetworkConfig, make_encoder, to_table  # noqa: E402
from streamsort.train.networks.huidurep import HuiduRepConfig  # noqa: E402
from streamsort.train.networks.light import LightConfig  # noqa: E402
from streamsort.train.refresh import Outcome, refresh  # noqa: E402
from streamsort.train.session_snippets import SessionSnippets, Views, Wear, read_snippets  # noqa: E402
from streamsort.train.tune import TuneConfig, tune  # noqa: E402

FAMILIES = {
    "light": LightConfig(hidden=(64, 32)),
    "huidurep": HuiduRepConfig(d_model=16, n_heads=2, d_ff=16, n_layers=1, stride=4, decoder_layers=1),
}
N_SAMPLES, N_NEIGHBORS, N_BEFORE = 48, 11, 18
PROBE = Probe.linear(4, 40.0)  # a snippet of the first channel reaches the second and third
SHORT = TuneConfig(steps=20, learning_rate=1e-3, anchor=1.0)


def spikes(n_units: int = 4, n_spikes: int = 30, n_samples: int = N_SAMPLES, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw spikes of units that differ in width and height, two of them on each channel."""
    rng = np.random.default_rng(seed)
    unit = np.repeat(np.arange(n_units), n_spikes)
    time = (np.arange(n_samples) - n_samples * N_BEFORE / N_SAMPLES) / n_samples
    width = 0.03 + 0.02 * (unit % 2)
    shape = -np.exp(-0.5 * np.square(time / width[:, None]))
    reach = np.where(np.arange(N_NEIGHBORS) < 3, 0.5 ** np.arange(N_NEIGHBORS), 0.0)
    snippets = (8 + 2 * (unit % 2))[:, None, None] * shape[:, :, None] * reach
    snippets = snippets + rng.normal(size=snippets.shape) * (reach > 0)
    return {
        "snippets": snippets.astype(np.float32),
        "unit_id": unit.astype(np.int32),
        "channel": (unit // 2).astype(np.uint16),
        "sample_index": np.arange(len(unit)) * 1000,
    }


def make_model(folder: Path, network: NetworkConfig, name: str = "tiny") -> Path:
    torch.manual_seed(0)
    write_model(make_encoder(network).eval(), folder / f"{name}.onnx", {"network": to_table(network)})
    return folder / f"{name}.onnx"


def make_session(folder: Path, model: Path, table: dict[str, np.ndarray] | None, rate: float = 30000.0) -> Path:
    contract = json.loads(model.with_suffix(".json").read_text())
    about = {"path": str(model), "name": contract["name"], "sha256": contract["sha256"]}
    path = folder / "session"
    SessionWriter(path, {"config": SorterConfig().to_dict(), "model": about}, PROBE, rate).close()
    if table is not None:
        np.savez(path / "reservoir.npz", **table)
    return path


@pytest.fixture(scope="module", autouse=True)
def quick_export() -> Iterator[None]:
    """Leave out of each contract what takes a second to measure and is not tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "spread", lambda encoder: 1.0)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, quick_export: None) -> dict[str, Path]:
    """Return an untrained model of each family; the tests leave them as they are."""
    return {family: make_model(tmp_path_factory.mktemp(family), network) for family, network in FAMILIES.items()}


@pytest.fixture
def data(models: dict[str, Path], tmp_path: Path) -> SessionSnippets:
    return read_snippets(Session(make_session(tmp_path, models["light"], spikes())), Encoder(models["light"], "cpu"), seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_offer_is_a_model_of_the_same_space(models: dict[str, Path], tmp_path: Path, family: str) -> None:
    fractions: list[float] = []
    session = make_session(tmp_path, models[family], spikes())
    outcome = refresh(session, SHORT, fractions.append)
    assert (outcome.n_units, outcome.n_spikes, outcome.n_held_out, outcome.steps) == (4, 120, 24, 20)
    assert fractions == pytest.approx(np.arange(1, 21) / 20)
    assert outcome.model == session / "models" / "tiny-r1.onnx"
    assert outcome.after.score >= outcome.before.score
    assert 0.9 < outcome.cosine < 1.0

    live, parent = Encoder(outcome.model, "cpu"), Encoder(models[family], "cpu")
    contract = json.loads(outcome.model.with_suffix(".json").read_text())
    assert live.name == "tiny-r1" and live.sha256 != parent.sha256 == contract["parent_sha256"]
    assert contract["parity"] <= 1e-4 and contract["cpu_batch"] == parent.contract.cpu_batch
    assert contract["training"]["after"] == outcome.after.shares() and contract["training"]["refresh_of"] == "tiny"
    snippets = spikes(seed=1)["snippets"]
    found, expected = (
        live(snippets, np.ones((len(snippets), N_NEIGHBORS), np.float32)),
        embed(load_encoder(outcome.model)[0], snippets),
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_next_refresh_goes_on_from_the_model_that_took_over(models: dict[str, Path], tmp_path: Path) -> None:
    session = make_session(tmp_path, models["light"], spikes())
    first = refresh(session, SHORT).model
    assert first is not None
    refused = refresh(session, SHORT)
    assert refused.parent == "tiny" and refused.model is not None and refused.model.name == "tiny-r2.onnx"
    event = {"event": "model", "model": "tiny-r1", "sha256": Encoder(first, "cpu").sha256, "sample_index": 0}
    (session / "ledger.jsonl").write_text(json.dumps(event) + "\n")
    second = refresh(session, SHORT)
    assert second.parent == "tiny-r1" and second.model is not None and second.model.name == "tiny-r3.onnx"
    assert json.loads(second.model.with_suffix(".json").read_text())["parent_sha256"] == event["sha256"]


def test_an_encoder_that_got_worse_is_not_offered(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(encoder: Any, *_: object) -> tuple[Any, int]:
        blind = make_encoder(encoder.config).eval()
        with torch.no_grad():
            blind.reduce.weight.zero_()
        return blind, 1

    monkeypatch.setattr(module, "tune", spoil)
    session = make_session(tmp_path, models["light"], spikes())
    assert main(["refresh", str(session)]) == 0
    assert "less well than the encoder in force, which stays" in capsys.readouterr().out
    assert not (session / "models").exists()


def test_the_same_seed_tunes_the_same(models: dict[str, Path], data: SessionSnippets) -> None:
    encoder, _ = load_encoder(models["light"])
    one, two, other = (tune(encoder, data, TuneConfig(steps=3, seed=seed))[0] for seed in (1, 1, 2))
    weights = [torch.nn.utils.parameters_to_vector(tuned.parameters()) for tuned in (one, two, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_anchor_keeps_the_space(models: dict[str, Path], data: SessionSnippets) -> None:
    encoder, _ = load_encoder(models["light"])
    before = embed(encoder, data.snippets)

    def moved(anchor: float) -> float:
        tuned, _ = tune(encoder, data, TuneConfig(steps=30, learning_rate=3e-3, anchor=anchor))
        return float(np.square(embed(tuned, data.snippets) - before).mean() / before.var())

    assert moved(10.0) < 0.5 * moved(0.0)


def test_tuning_brings_units_apart(models: dict[str, Path], data: SessionSnippets) -> None:
    encoder, _ = load_encoder(models["light"])
    held_out = HeldOut(data, seed=0)
    tuned, _ = tune(encoder, data, TuneConfig(steps=60, learning_rate=3e-3, anchor=0.0))
    assert held_out(tuned).own_unit_worn > held_out(encoder).own_unit_worn + 0.02


def test_what_is_held_out_is_not_looked_at(models: dict[str, Path], data: SessionSnippets) -> None:
    assert np.bincount(data.group[data.held_out]).tolist() == [6, 6, 6, 6]
    data.snippets[data.held_out] = np.nan
    tuned, _ = tune(load_encoder(models["light"])[0], data, TuneConfig(steps=3))
    assert all(torch.isfinite(parameter).all() for parameter in tuned.parameters())


def test_figures_of_an_encoder_that_sees_nothing_are_chance(models: dict[str, Path], data: SessionSnippets) -> None:
    encoder, _ = load_encoder(models["light"])
    with torch.no_grad():
        encoder.reduce.weight.zero_()
    blind = HeldOut(data, seed=0)(encoder)
    assert blind.own_unit == pytest.approx(0.5, abs=0.01)  # two units on each channel, and always the first is taken


def test_a_collision_is_seen_from_the_peak_channel(data: SessionSnippets) -> None:
    rows = np.flatnonzero((data.group == 0) & ~data.held_out)
    worn = Views(data, Wear(amplitude=0.0, noise=0.0, jitter=0.0, collision=1.0)).worn(np.random.default_rng(0), rows)
    added = worn - data.snippets[rows]
    # The rivals of unit 0, on channel 0: unit 1 there, and units 2 and 3 on channel 1, whose snippets begin with channels 1, 0, 2.
    height = np.abs(added).max(axis=1)
    from_there = height[:, 1] > height[:, 0]
    assert 0 < from_there.sum() < len(rows)
    np.testing.assert_array_less(height[from_there, 0], height[from_there, 1])
    assert (height[:, 3:] == 0).all()


def test_snippets_of_another_rate_are_what_the_live_encoder_makes_of_them(models: dict[str, Path], tmp_path: Path) -> None:
    live = Encoder(models["light"], "cpu", sampling_frequency=25000.0)
    table = spikes(n_samples=live.n_before + live.n_after)
    session = make_session(tmp_path, models["light"], table, rate=25000.0)
    data = read_snippets(Session(session), live, seed=0)
    assert data.snippets.shape[1:] == (N_SAMPLES, N_NEIGHBORS)
    found = embed(load_encoder(models["light"])[0], data.snippets)
    expected = live(table["snippets"], np.ones((len(table["snippets"]), N_NEIGHBORS), np.float32))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def _without(table: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key: column for key, column in table.items() if key != name}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (None, "no reservoir.npz in it, expected a run that has calibrated"),
        (spikes(n_spikes=5), "0 units with 10 or more recent spikes on a channel, expected 2"),
        (spikes(n_units=1), "1 units with 10 or more recent spikes on a channel, expected 2"),
        (spikes(n_samples=40), r"snippets are \(40, 11\) .*, expected \(48, 11\) as encoder tiny takes at 30000 Hz"),
        (_without(spikes(), "channel"), "reservoir.npz cannot be read"),
        ({**spikes(), "unit_id": np.zeros(3)}, "expected as many of each"),
    ],
)
def test_a_reservoir_that_does_not_do_is_refused(
    models: dict[str, Path], tmp_path: Path, table: dict[str, np.ndarray] | None, words: str
) -> None:
    with pytest.raises(StreamsortError, match=words):
        refresh(make_session(tmp_path, models["light"], table), TuneConfig(steps=1))


def test_a_torn_reservoir_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    session = make_session(tmp_path, models["light"], spikes())
    whole = (session / "reservoir.npz").read_bytes()
    (session / "reservoir.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StreamsortError, match=r"reservoir\.npz cannot be read"):
        refresh(session, TuneConfig(steps=1))


def test_a_model_that_is_gone_is_named(tmp_path: Path) -> None:
    model = make_model(tmp_path, FAMILIES["light"])
    session = make_session(tmp_path, model, spikes())
    model.unlink()
    model.with_suffix(".json").unlink()
    with pytest.raises(StreamsortError, match=r"the encoder in force \(sha256 .*\) is not at .*tiny.onnx"):
        refresh(session, TuneConfig(steps=1))


@pytest.mark.parametrize("length", [{"seconds": 0.0}, {"seconds": float("inf")}, {"steps": 0}])
def test_wrong_lengths_are_named(length: dict[str, Any]) -> None:
    with pytest.raises(StreamsortError, match=r"refresh: .* expected"):
        TuneConfig(**length)


def test_the_command_tells_its_figures_even_if_they_are_no_better(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = make_session(tmp_path, models["light"], spikes())
    monkeypatch.setattr(module, "tune", lambda encoder, *_: (encoder, 1))
    assert main(["refresh", str(session), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["parent"] == "tiny" and said["held_out"] == 24 and Path(said["model"]).name == "tiny-r1.onnx"
    assert said["before"] == said["after"] and said["same_unit"] == 1.0
    assert main(["refresh", str(session)]) == 0
    assert "tiny-r2.onnx, although it is no better" in capsys.readouterr().out


def test_the_time_that_is_given_is_kept(models: dict[str, Path], data: SessionSnippets) -> None:
    fractions: list[float] = []
    began = time.monotonic()
    _, steps = tune(load_encoder(models["light"])[0], data, TuneConfig(seconds=0.3), fractions.append)
    assert time.monotonic() - began >= 0.3
    assert steps == len(fractions) and fractions == sorted(fractions) and fractions[-1] == 1.0


def test_an_outcome_tells_who_changed_sides() -> None:
    before, after = Figures(1.0, 0.8, np.array([1, 1, 2, 2])), Figures(1.0, 0.9, np.array([1, 2, 2, 2]))
    outcome = Outcome("old", 2, 20, 4, 1, 1.0, before, after, 1.0)
    assert outcome.same_unit == 0.75 and not outcome.worse


@pytest.mark.slow
def test_a_run_refreshes_its_own_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    caplog.set_level(logging.INFO, "streamsort.commands.refreshes")
    session = tmp_path / "session"
    source = "sim:seconds=60,units=6,probe=tetrode,seed=1"
    assert main(["run", source, "--encoder", "light", "--warmup-s", "6", "--session", str(session), "--refresh-every", "0.15"]) == 0
    told = [record for record in caplog.records if record.name == "streamsort.commands.refreshes"]
    assert not [record.getMessage() for record in told if record.levelno >= logging.WARNING]
    offers = sorted(path.stem for path in (session / "models").glob("*.json"))
    assert offers and offers[0] == "huidurep-light-r1"
    judged = [event["offered"] for event in Session(session).ledger if event["event"] == "model"]
    assert judged == offers[: len(judged)] and len(judged) >= len(offers) - 1  # the last one may have come too late
