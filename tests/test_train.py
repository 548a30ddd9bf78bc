"""Training: losses fall, a killed run goes on as if it had not been, processes train one model, a student learns its teacher."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from streamsort.errors import StreamsortError  # noqa: E402
from streamsort.train.augment import Draw  # noqa: E402
from streamsort.train.config import PRESET_FOLDER, TrainConfig  # noqa: E402
from streamsort.train.data import N_NEIGHBORS, N_SAMPLES, make_bank  # noqa: E402
from streamsort.train.export import export, load_encoder  # noqa: E402
from streamsort.train.loop import draw_of, draw_pairs, train, train_step  # noqa: E402
from streamsort.train.networks import PRESETS, make_encoder, to_table  # noqa: E402
from streamsort.train.networks.huidurep import HuiduRepConfig  # noqa: E402
from streamsort.train.networks.light import LightConfig  # noqa: E402
from streamsort.train.networks.moco import HeadConfig, MoCo  # noqa: E402
from streamsort.train.parallel import World  # noqa: E402
from streamsort.train.run import CHECKPOINT, HISTORY, Run, read_checkpoint  # noqa: E402
from streamsort.train.scores import knn_accuracy, mixture_ari  # noqa: E402
from streamsort.train.validate import Validation, centroid_accuracy  # noqa: E402

pytestmark = pytest.mark.timeout(120)

torch.set_num_threads(1)  # as a training run does; on a busy machine two wait for each other
ROOT = Path(__file__).resolve().parent.parent
TINY = HuiduRepConfig(d_model=16, d_ff=16, n_layers=1, decoder_layers=1)
STUDENT = LightConfig(hidden=(48, 32))
HEAD = HeadConfig(compare="projection", projection_hidden=16, projection_dims=8)
ALONE = World()
PRESET = """
steps = 12
n_sites = 4
bank_sites = 16
bank_steps = 5
warmup_steps = 2
record_steps = 4
validate_s = 0
validate_sites = 1
save_s = 0
device = "cpu"

[network]
preset = "full"
d_model = 16
d_ff = 16
n_layers = 1
decoder_layers = 1

[head]
compare = "projection"
projection_hidden = 16
projection_dims = 8
"""


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preset") / "tiny.toml"
    path.write_text(PRESET)
    return path


@pytest.fixture
def config(preset: Path) -> TrainConfig:
    return TrainConfig.from_preset(preset)


@pytest.fixture(scope="module")
def whole(preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run that nothing disturbed, with its model."""
    out = tmp_path_factory.mktemp("whole")
    train(TrainConfig.from_preset(preset), out)
    export(out, out / "tiny.onnx")
    return out


def child(code: str, *arguments: str | Path, launcher: tuple[str, ...] = ("-c",), timeout_s: float = 100.0) -> int:
    """Run Python in a child process, one thread in each library; return its exit code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, code, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, timeout=timeout_s).returncode


# What a run is made of


@pytest.mark.parametrize("name", ["full", "light", "small"])
def test_a_shipped_preset_is_its_network(name: str) -> None:
    config = TrainConfig.from_preset(name, device="cpu")
    assert config.network == PRESETS[name] and not config.teacher
    assert (PRESET_FOLDER / f"{name}.toml").is_file()


def test_a_preset_file_is_read_and_changed(preset: Path) -> None:
    config = TrainConfig.from_preset(preset, seed=5, steps=3)
    assert (config.network, config.head, config.seed, config.steps) == (TINY, HEAD, 5, 3)
    light = TrainConfig.from_table({"network": {"preset": "light", "hidden": [8, 4]}})
    assert light.network == LightConfig(hidden=(8, 4))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"learning_rat": 1e-3}, "unknown key learning_rat; did you mean learning_rate"),
        ({"network": {"n_layer": 3}}, "unknown key network.n_layer; did you mean network.n_layers"),
        ({"network": {"preset": "light", "n_layers": 3}}, "unknown key network.n_layers; "),
        ({"network": {"preset": "huge"}}, "network.preset = 'huge', expected one of full, small, light"),
        ({"network": 3}, "network = 3, expected a table"),
        ({"network": {"preset": "light", "hidden": 3}}, "network.hidden = 3, expected a list"),
        ({"head": {"temprature": 0.1}}, "unknown key head.temprature; did you mean head.temperature"),
        ({"steps": "many"}, "steps = 'many', expected int"),
        ({"minutes": 0}, r"minutes = 0\.0, expected a positive number"),
        ({"steps": -1}, "steps = -1, expected 0 or more"),
        ({"bank_sites": 8}, "n_sites = 32, expected at most bank_sites = 8"),
        ({"collision": 1.5}, r"collision = 1\.5, expected 0 to 1"),
        ({"device": "tpu"}, "device = 'tpu', expected auto, cpu or cuda"),
        ({"device": "cpu", "precision": "bf16"}, "precision = 'bf16', expected fp32 on a CPU"),
        ({"contrastive": 0}, r"contrastive = 0\.0, expected more than 0 without a teacher"),
        ({"teacher": "x.onnx", "distil": 0}, r"distil = 0\.0, expected more than 0 with a teacher"),
    ],
)
def test_wrong_settings_are_named(table: dict[str, object], message: str) -> None:
    with pytest.raises(StreamsortError, match=message):
        TrainConfig.from_table(table)


def test_a_preset_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StreamsortError, match="train lihgt: no such preset or file; did you mean light"):
        TrainConfig.from_preset("lihgt")
    with pytest.raises(StreamsortError, match=r"expected a \.toml or one of full, full-cpu, light, small"):
        TrainConfig.from_preset(tmp_path / "none.toml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_not_promised() -> None:
    with pytest.raises(StreamsortError, match="device = 'cuda', expected cpu, or cuda where torch finds a GPU"):
        TrainConfig(device="cuda")
    assert not TrainConfig().on_cuda and not TrainConfig().bf16


# Networks and losses


def test_the_full_network_is_of_the_published_size() -> None:
    assert sum(p.numel() for p in make_encoder(PRESETS["full"]).parameters()) == 553_568


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_network_maps_snippets_to_embeddings(name: str) -> None:
    assert make_encoder(PRESETS[name])(torch.zeros(2, N_SAMPLES, N_NEIGHBORS)).shape == (2, 32)


def test_slow_encoder_follows_and_gets_no_gradient() -> None:
    model = MoCo(TINY, HEAD)
    views = torch.randn(2, 8, N_SAMPLES, N_NEIGHBORS)
    contrastive, error, _ = model(views[0], views[1], views[0])
    (contrastive + error).backward()
    assert all(p.grad is None for p in model.slow_encoder.parameters())
    learned = (model.encoder, model.projector, model.predictor, model.decoder)
    assert all(p.grad is not None for part in learned for p in part.parameters())
    with torch.no_grad():
        for p in model.encoder.parameters():
            p += 1.0
    before = [p.clone() for p in model.slow_encoder.parameters()]
    model.update_slow()
    for old, new in zip(before, model.slow_encoder.parameters(), strict=True):
        torch.testing.assert_close(new - old, torch.full_like(old, 1 - model.head.momentum), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(("network", "head"), [(TINY, HEAD), (STUDENT, HeadConfig())])
def test_losses_fall(config: TrainConfig, tmp_path: Path, network: HuiduRepConfig | LightConfig, head: HeadConfig) -> None:
    config = replace(config, steps=100, n_sites=8, bank_steps=100, alpha=1.0, learning_rate=5e-3, network=network, head=head)
    run, draw = Run.start(config, tmp_path), draw_of(config, 0, ALONE)
    losses = []
    for _ in range(config.steps):
        losses.append(train_step(run, config, draw, ALONE))
        run.count(losses[-1], 0.1)
    first, last = np.mean(losses[:10], axis=0), np.mean(losses[-10:], axis=0)
    assert last[0] < 0.9 * first[0] and last[1] < 0.9 * first[1] and last[2] == 0.0


def test_a_batch_comes_from_seed_step_and_process(config: TrainConfig) -> None:
    draw = Draw.of(make_bank((1,), 4, 3), 0.2)

    def batch(step: int, rank: int, seed: int = 0) -> torch.Tensor:
        return draw_pairs(draw, replace(config, seed=seed), step, World(rank, 2))[1].snippets

    torch.testing.assert_close(batch(7, 0), batch(7, 0), rtol=0, atol=0)
    for other in (batch(8, 0), batch(7, 1), batch(7, 0, seed=1)):
        assert not torch.equal(batch(7, 0), other)
    banks = [draw_of(config, step, World(rank, 2)).templates for step, rank in ((0, 0), (4, 0), (5, 0), (0, 1))]
    assert torch.equal(banks[0], banks[1])
    assert not any(torch.equal(banks[0], bank) for bank in banks[2:])


# The run


def test_history_and_checkpoint_tell_the_run(whole: Path) -> None:
    history = [json.loads(line) for line in (whole / HISTORY).read_text().splitlines()]
    assert history == read_checkpoint(whole / CHECKPOINT)["history"]
    assert [record["step"] for record in history] == [4, 8, 12]
    assert all(set(record["losses"]) == {"contrastive", "reconstruction", "distance"} for record in history)
    assert all({"ari_clean", "ari_collisions", "ari_drift", "knn_clean"} <= set(record["figures"]) for record in history)
    assert not list(whole.glob("*.tmp"))


KILLED = """
import os, signal, sys
from pathlib import Path
from streamsort.train import loop
from streamsort.train.config import TrainConfig
real = loop.train_step
def dies(run, *rest):
    if run.step == 7:  # in the middle of a bank, and of a record
        os.kill(os.getpid(), signal.SIGKILL)
    return real(run, *rest)
loop.train_step = dies
loop.train(TrainConfig.from_preset(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_killed_run_goes_on_as_if_it_had_not_been(config: TrainConfig, preset: Path, whole: Path, tmp_path: Path) -> None:
    assert child(KILLED, preset, tmp_path) == -signal.SIGKILL
    assert read_checkpoint(tmp_path / CHECKPOINT)["step"] == 7
    train(config, tmp_path)
    one, two = (read_checkpoint(path / CHECKPOINT) for path in (whole, tmp_path))
    assert two["step"] == 12
    for mine, theirs in zip(one["history"], two["history"], strict=True):
        assert mine["losses"] == theirs["losses"] and mine["step"] == theirs["step"]
        assert mine["figures"]["knn_clean"] == theirs["figures"]["knn_clean"]
    for key, value in one["model"].items():
        torch.testing.assert_close(value, two["model"][key], rtol=0, atol=0)


def test_a_finished_run_is_left_alone(config: TrainConfig, whole: Path) -> None:
    before = (whole / CHECKPOINT).read_bytes()
    assert train(config, whole)
    assert (whole / CHECKPOINT).read_bytes() == before


def test_a_checkpoint_that_does_not_fit_is_refused(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(StreamsortError, match="made with another network"):
        Run.start(replace(config, network=replace(TINY, n_layers=2)), whole)
    with pytest.raises(StreamsortError, match="made with another network"):
        Run.start(replace(config, head=replace(HEAD, temperature=0.5)), whole)
    content = (whole / CHECKPOINT).read_bytes()
    for broken in (content[: len(content) // 2], b"", b"no checkpoint"):
        (tmp_path / CHECKPOINT).write_bytes(broken)
        with pytest.raises(StreamsortError, match="cannot be read"):
            Run.start(config, tmp_path)
    torch.save({"model": {}}, tmp_path / CHECKPOINT)
    with pytest.raises(StreamsortError, match="not one of a training run"):
        Run.start(config, tmp_path)


TOGETHER = """
import sys
import torch
from streamsort.cli import main
from streamsort.train import loop, parallel
real = loop.train_step
def checked(run, config, draw, world, teacher=None):
    losses = real(run, config, draw, world, teacher)
    assert world.size == 2
    state = [value.flatten() for value in run.model.state_dict().values() if value.is_floating_point()]
    weights, first = parallel.gather(torch.cat(state)[None])
    assert first == world.rank and torch.equal(weights[0], weights[1]), "processes hold different weights"
    seen, _ = parallel.gather(loop.draw_pairs(draw, config, run.step, world)[0].snippets[None])
    assert not torch.equal(seen[0], seen[1]), "processes draw the same spikes"
    assert parallel.from_first(world.rank, "cpu") == 0
    return losses
loop.train_step = checked
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.skipif(os.name == "nt", reason="torchrun there has no loopback rendezvous")
def test_two_processes_train_one_model(preset: Path, whole: Path, tmp_path: Path, free_port: int) -> None:
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    torchrun = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(free_port),
    )
    out = tmp_path / "out"
    assert child(str(script), preset, "--steps", "4", "--out", out, "--name", "tiny", launcher=torchrun) == 0
    contract, alone = (json.loads((path / "tiny.json").read_text()) for path in (out, whole))
    assert contract["training"]["machine"]["processes"] == 2 and contract["training"]["steps_done"] == 4
    for key in ("n_samples", "n_neighbors", "n_dims", "n_before", "freq_min_hz", "freq_max_hz", "opset"):
        assert contract[key] == alone[key]
    one, two = (load_encoder(path / "tiny.onnx")[0].state_dict() for path in (out, whole))
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in two.items()}


# Teacher and student


def test_a_student_comes_near_its_teacher(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    alone = replace(config, steps=200, bank_steps=200, network=STUDENT, learning_rate=5e-3, record_steps=20, validate_s=60.0)
    train(replace(alone, teacher=str(whole / "tiny.onnx"), contrastive=0.0, alpha=0.0), tmp_path)
    distances = [record["losses"]["distance"] for record in read_checkpoint(tmp_path / CHECKPOINT)["history"]]
    assert distances[-1] < 0.6 * distances[0]


def test_a_student_stays_in_the_space_of_its_teacher(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    taught = replace(config, network=STUDENT, teacher=str(whole))
    run = Run.start(taught, tmp_path)
    run.save(taught, tmp_path)
    for name, value in load_encoder(tmp_path)[0].state_dict().items():  # as trained, not evened out
        torch.testing.assert_close(value, run.model.slow_encoder.state_dict()[name], rtol=0, atol=0)
    snippets = torch.randn(4, N_SAMPLES, N_NEIGHBORS)
    models = [load_encoder(source)[0] for source in (whole, whole / CHECKPOINT, whole / "tiny.onnx")]
    expected, *others = (model(snippets) for model in models)
    for found in others:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_teacher_that_is_not_there_is_named(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(StreamsortError, match=r"none\.json: no such file"):
        train(replace(config, teacher=str(tmp_path / "none.onnx")), tmp_path)


# Figures


def test_scores_of_features_that_are_known() -> None:
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(4), 40)
    apart = np.eye(4)[units] * 10 + rng.normal(size=(160, 4))
    chance = rng.normal(size=(160, 4))
    # The unit is in a small first number beside a large common second one: only whitening finds it.
    hidden = np.stack([units + 0.05 * rng.normal(size=160), 50 * rng.normal(size=160)], axis=1)
    assert knn_accuracy(apart, units) == centroid_accuracy(apart, units, whiten=False) == mixture_ari(apart, units) == 1.0
    assert knn_accuracy(chance, units) < 0.5 and centroid_accuracy(chance, units, whiten=True) < 0.5
    assert abs(mixture_ari(chance, units)) < 0.1
    assert centroid_accuracy(hidden, units, whiten=False) < 0.6


def test_validation_scores_an_encoder_and_the_components() -> None:
    validation = Validation(n_sites=3)
    untrained = validation(make_encoder(TINY))
    components = validation.baseline(5)
    assert set(untrained) == set(components) and len(components) == 12
    assert components["lda_clean"] > untrained["knn_collisions"] and components["ari_clean"] > components["ari_drift"]
    assert "knn_clean 0." in Validation.say(untrained)


def test_a_contract_keeps_the_network(whole: Path) -> None:
    training = json.loads((whole / "tiny.json").read_text())["training"]
    assert training["network"] == to_table(TINY) and training["steps_done"] == 12 and training["machine"]["processes"] == 1
