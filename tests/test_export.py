"""Export: the file computes what torch does, loads live, gives its weights back by name, and comes with a card that fits it."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from streamsort.encode import Encoder as LiveEncoder  # noqa: E402
from streamsort.errors import StreamsortError  # noqa: E402
from streamsort.train import export as module  # noqa: E402
from streamsort.train.card import multiply_adds, trend  # noqa: E402
from streamsort.train.config import TrainConfig  # noqa: E402
from streamsort.train.data import N_NEIGHBORS  # noqa: E402
from streamsort.train.export import PARITY, PARITY_FP16, export, half_parity, load_encoder, load_onnx_weights, write_model  # noqa: E402
from streamsort.train.networks import PRESETS, AnyEncoder, make_encoder, to_table  # noqa: E402
from streamsort.train.networks.huidurep import HuiduRepConfig  # noqa: E402
from streamsort.train.networks.light import LightConfig  # noqa: E402
from streamsort.train.networks.moco import HeadConfig  # noqa: E402
from streamsort.train.run import CHECKPOINT, Run  # noqa: E402
from streamsort.train.space import drawn, spread  # noqa: E402

pytestmark = pytest.mark.timeout(120)

torch.set_num_threads(1)  # as a training run does; on a busy machine two wait for each other
TINY = HuiduRepConfig(d_model=16, d_ff=16, n_layers=1, decoder_layers=1)
STUDENT = LightConfig(hidden=(48, 32))
CONFIG = TrainConfig(
    device="cpu", steps=3, validate_sites=1, network=TINY, head=HeadConfig(projection_hidden=16, projection_dims=8)
)


def saved(config: TrainConfig, out: Path) -> Run:
    """Leave a run that has only begun."""
    run = Run.start(config, out)
    for step in range(3):
        run.count([1.0 - 0.1 * step, 5.0, 0.0], 60.0)
        run.record({"ari_clean": 0.5 + 0.1 * step} if step else {})
    run.save(config, out)
    return run


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an exported model beside its checkpoint."""
    out = tmp_path_factory.mktemp("exported")
    saved(CONFIG, out)
    export(out, out / "tiny.onnx", version="7")
    return out / "tiny.onnx"


def random_model(network: HuiduRepConfig | LightConfig, path: Path, **more: object) -> AnyEncoder:
    torch.manual_seed(0)
    encoder = make_encoder(network).eval()
    write_model(encoder, path, {"network": to_table(network)}, **more)
    return encoder


def test_export_computes_what_torch_does_and_loads_live(exported: Path) -> None:
    contract = json.loads(exported.with_suffix(".json").read_text())
    assert contract["parity"] <= PARITY and contract["version"] == "7" and contract["training"]["seed"] == 0
    assert contract["spread"] == pytest.approx(1.0, rel=0.2)  # on other spikes than it was evened out with
    assert set(contract["validation"]) == {"encoder", "pca_5", "pca_32"}
    assert ("parity_fp16" in contract) == torch.cuda.is_available()
    names = {CHECKPOINT, "history.jsonl", "tiny.onnx", "tiny.json", "tiny.md"}
    assert {path.name for path in exported.parent.iterdir()} == names

    snippets = drawn(2, 4, TINY.n_samples).flatten(0, 1)
    expected = load_encoder(exported.parent)[0](snippets).detach().numpy()
    live = LiveEncoder(exported, provider="cpu")
    np.testing.assert_allclose(live(snippets.numpy(), np.ones((len(snippets), N_NEIGHBORS), np.float32)), expected, atol=1e-4)


@pytest.mark.parametrize("network", [TINY, replace(TINY, n_layers=3, stride=2), STUDENT, PRESETS["light"]])
def test_weights_are_read_back_by_their_names(network: HuiduRepConfig | LightConfig, tmp_path: Path) -> None:
    encoder = random_model(network, tmp_path / "model.onnx")
    weights = load_onnx_weights(tmp_path / "model.onnx")
    for name, value in encoder.state_dict().items():  # equal parameters, such as norms that were never trained, too
        torch.testing.assert_close(weights[name], value, rtol=0, atol=0)
    again, training = load_encoder(tmp_path / "model.onnx")
    assert training["network"] == json.loads(json.dumps(to_table(network)))
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_a_contract_takes_further_keys(tmp_path: Path) -> None:
    random_model(TINY, tmp_path / "model.onnx", version="2", parent_sha256="abc")
    contract = json.loads((tmp_path / "model.json").read_text())
    assert contract["parent_sha256"] == "abc" and contract["version"] == "2"
    assert LiveEncoder(tmp_path / "model.onnx", provider="cpu").n_dims == 32


def test_a_model_that_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(StreamsortError, match="no such file"):
        load_encoder(path)
    with pytest.raises(StreamsortError, match=r"no such file, expected an \.onnx"):
        load_onnx_weights(path)
    random_model(TINY, path)
    content, contract = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())

    def offer(content: bytes, **changes: object) -> None:
        digest = module.hashlib.sha256(content).hexdigest()
        path.write_bytes(content)
        path.with_suffix(".json").write_text(json.dumps({**contract, "sha256": digest, **changes}))

    offer(b"not a model")
    with pytest.raises(StreamsortError, match="not ONNX"):
        load_encoder(path)
    offer(content, sha256="0" * 64)
    with pytest.raises(StreamsortError, match="is not the file of its contract"):
        load_encoder(path)
    offer(content, training={})
    with pytest.raises(StreamsortError, match=r"training\.network is missing"):
        load_encoder(path)
    offer(content, training={"network": to_table(replace(TINY, n_layers=2))})
    with pytest.raises(StreamsortError, match=r"has no weights called layers\.1"):
        load_encoder(path)
    offer(content, training={"network": to_table(replace(TINY, d_ff=32))})
    with pytest.raises(StreamsortError, match="is not of the network in its contract"):
        load_encoder(path)


def test_export_evens_out_the_spread_within_units(exported: Path, tmp_path: Path) -> None:
    run = saved(CONFIG, tmp_path)

    def eigenvalues(encoder: AnyEncoder) -> torch.Tensor:
        with torch.no_grad():
            embeddings = torch.stack([encoder(unit) for unit in drawn(64, 20, TINY.n_samples)])
        residuals = (embeddings - embeddings.mean(dim=1, keepdim=True)).flatten(0, 1)
        return torch.linalg.eigvalsh(residuals.T @ residuals / (512 * 19))

    before = eigenvalues(run.model.slow_encoder.eval())
    after = eigenvalues(load_encoder(exported)[0])
    assert after.mean().item() == pytest.approx(1.0, rel=1e-2)
    assert after.max() / after.mean() < 0.5 * before.max() / before.mean()


def test_a_student_is_exported_as_it_was_trained(exported: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, network=STUDENT, teacher=str(exported))
    run = saved(config, tmp_path)
    contract = export(tmp_path, tmp_path / "student.onnx")
    for name, value in load_encoder(tmp_path / "student.onnx")[0].state_dict().items():
        torch.testing.assert_close(value, run.model.slow_encoder.state_dict()[name], rtol=0, atol=0)
    assert contract["spread"] == pytest.approx(spread(run.model.slow_encoder), abs=1e-4) and contract["spread"] < 0.9
    teacher = json.loads(exported.with_suffix(".json").read_text())
    assert contract["validation"]["teacher"] == teacher["validation"]["encoder"]
    assert contract["training"]["teacher"] == "tiny.onnx"
    assert "The teacher is tiny" in (tmp_path / "student.md").read_text()


def test_half_precision_stays_within_its_tolerance(exported: Path) -> None:
    assert 0 < half_parity(load_encoder(exported)[0], "cpu") < PARITY_FP16


def test_an_export_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "parity", lambda encoder, model: 0.5)
    with pytest.raises(StreamsortError, match=r"differ by 0\.5, expected at most 0\.0001"):
        random_model(TINY, tmp_path / "bad.onnx")
    assert not list(tmp_path.iterdir())


def test_export_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(StreamsortError, match="no such file, expected the output of a training run"):
        export(tmp_path, tmp_path / "none.onnx")


# Cards


def test_multiply_adds_are_those_of_the_layers() -> None:
    light = PRESETS["light"]
    sizes = (light.n_samples * light.n_neighbors, *light.hidden, light.n_dims)
    assert multiply_adds(make_encoder(light)) == sum(a * b for a, b in itertools.pairwise(sizes)) < 1e6
    tokens, d = 48, 64
    convolutions = tokens * (5 * 11 + 3 * d) * d
    layer = tokens * (3 * d * d + d * d + 2 * d * 128) + 2 * tokens * tokens * d
    assert multiply_adds(make_encoder(PRESETS["full"])) == convolutions + 16 * layer + d * 32


def test_a_card_tells_the_model_and_where_its_curve_stood(exported: Path) -> None:
    text = exported.with_suffix(".md").read_text()
    encoder = load_encoder(exported)[0]
    for said in (
        "# tiny",
        f"{sum(p.numel() for p in encoder.parameters()):,} parameters, {multiply_adds(encoder) / 1e6:.2f} million multiply-adds",
        "150-3000 Hz",
        "3 steps of 256 pairs in 3 minutes",
        "1 x contrastive (of the embedding) + 0.2 x denoising error.",
        "| contrastive | 0.800 | 0.900 to 0.800 |",
        "| ari_clean | 0.700 | 0.600 to 0.700 |",
        "| | encoder | pca_5 | pca_32 |",
    ):
        assert said in text


def test_the_trend_is_of_the_last_third() -> None:
    history = [{"step": step, "losses": {"contrastive": max(0.0, 6.0 - step)}, "figures": {}} for step in range(1, 10)]
    assert trend(history, "losses", "contrastive") == pytest.approx((0.0, 0.0))
    rising = [{"step": step, "losses": {}, "figures": {"ari": 0.1 * step}} for step in range(1, 10)]
    assert trend(rising, "figures", "ari") == pytest.approx((0.6, 0.9))
    assert trend(rising[:1], "figures", "ari") is None and trend([], "losses", "contrastive") is None
