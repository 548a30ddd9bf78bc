"""Training: simulated snippets are what they claim, losses fall, a resumed run is the same run, exports compute what torch does."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import butter, sosfilt

torch = pytest.importorskip("torch")

from streamsort.config import PreprocessConfig  # noqa: E402
from streamsort.encode import Encoder as LiveEncoder  # noqa: E402
from streamsort.errors import StreamsortError  # noqa: E402
from streamsort.train.augment import draw_spikes  # noqa: E402
from streamsort.train.data import N_BEFORE, N_NEIGHBORS, N_SAMPLES, TROUGH, Bank, draw_noise, make_bank  # noqa: E402
from streamsort.train.loop import CHECKPOINT, Run, TrainConfig, draw_pairs, train, train_step  # noqa: E402
from streamsort.train.networks.huidurep import PRESETS, Encoder, HuiduRep, HuiduRepConfig  # noqa: E402
from streamsort.train.validate import Validation, centroid_accuracy, knn_accuracy  # noqa: E402

pytestmark = pytest.mark.timeout(60)

TINY = HuiduRepConfig(d_model=16, d_ff=16, n_layers=1, projection_hidden=16, projection_dims=8, dropout=0.1)


@pytest.fixture(scope="module")
def bank() -> Bank:
    return make_bank((3,), 64, 8)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(tmp_path, steps=12, n_sites=4, bank_sites=16, bank_steps=5, warmup_steps=2, network=TINY)


def test_templates_peak_on_channel_0_at_the_trough(bank: Bank) -> None:
    near = bank.templates[:, :, 0, TROUGH - 6 : TROUGH + 7]
    np.testing.assert_allclose(near[:, :, :, 0].min(axis=2), -1.0, atol=0.05)
    assert (near.min(axis=2).argmin(axis=-1) == 0).all()
    assert np.isfinite(bank.templates).all() and (bank.snr >= 3.5).all() and (bank.snr <= 25.0).all()


def test_phases_are_later_by_quarters_of_a_sample(bank: Bank) -> None:
    own = bank.templates[:, :, :, :, 0]
    ahead, late = own[:, :, 0], own[:, :, 2]
    middle = 0.5 * (ahead[..., :-1] + ahead[..., 1:])  # half a sample later, value k of `late` lies between k - 1 and k of phase 0
    assert np.abs(late[..., 1:] - middle).max() < 0.1
    assert np.abs(late[..., 1:] - middle).mean() < 0.3 * np.abs(late[..., 1:] - ahead[..., 1:]).mean()


def test_units_of_a_site_differ_and_some_are_close(bank: Bank) -> None:
    flat = (bank.templates[:, :, 0] * bank.snr[:, :, None, None]).reshape(64, 8, -1)
    gaps = np.linalg.norm(flat[:, :, None] - flat[:, None], axis=-1)[:, ~np.eye(8, dtype=bool)]
    assert gaps.min() > 0.5
    assert 0.02 < (gaps < 10).mean() < 0.5


def test_noise_has_unit_variance_and_the_band_of_the_filter() -> None:
    noise = draw_noise(np.random.default_rng(0))
    np.testing.assert_allclose(noise.std(axis=1), 1.0, rtol=0.02)
    power = np.abs(np.fft.rfft(noise[:, : 1 << 17], axis=1)) ** 2
    hz = np.fft.rfftfreq(1 << 17, 1 / 30000.0)
    inside = power[:, (hz > 500) & (hz < 1500)].mean(axis=1)
    assert (power[:, hz < 20].mean(axis=1) < 0.1 * inside).all()
    assert (power[:, hz > 10000].mean(axis=1) < 0.1 * inside).all()


def test_spikes_are_aligned_to_their_noisy_trough(bank: Bank) -> None:
    sites, units = np.repeat(np.arange(64), 8), np.tile(np.arange(8), 64)
    spikes = draw_spikes(bank, np.random.default_rng(0), sites, units, 0.3)
    assert spikes.snippets.shape == spikes.clean.shape == (512, N_SAMPLES, N_NEIGHBORS)
    assert (spikes.snippets[:, N_BEFORE - 1 : N_BEFORE + 2, 0].argmin(axis=1) == 1).mean() > 0.98
    residual = spikes.snippets[:, N_BEFORE, 0] - spikes.clean[:, N_BEFORE, 0]
    assert 0.5 < residual.std() < 2.5
    silent = (bank.mixing[sites] == 0).all(axis=2)
    assert silent.any()
    assert (spikes.snippets.transpose(0, 2, 1)[silent] == 0).all()


def test_collisions_add_another_spike(bank: Bank) -> None:
    sites, units = np.repeat(np.arange(64), 8), np.tile(np.arange(8), 64)
    energy = [
        np.square(s.snippets - s.clean).mean()
        for s in (draw_spikes(bank, np.random.default_rng(0), sites, units, c) for c in (0.0, 1.0))
    ]
    assert energy[1] > 1.5 * energy[0]


def test_the_data_filter_is_the_pipeline_filter() -> None:
    from streamsort.train import data

    pipeline = PreprocessConfig()
    impulse = np.eye(1, 64)[0]
    expected = sosfilt(
        butter(pipeline.filter_order, [pipeline.freq_min_hz, pipeline.freq_max_hz], btype="bandpass", fs=30000.0, output="sos"),
        impulse,
    )
    np.testing.assert_allclose(sosfilt(data._SOS, impulse), expected)


def test_banks_and_batches_come_from_their_seed(config: TrainConfig) -> None:
    one, two, other = (make_bank(seed, 4, 3) for seed in ((1, 2), (1, 2), (1, 3)))
    np.testing.assert_array_equal(one.templates, two.templates)
    assert not np.array_equal(one.templates, other.templates)
    config = replace(config, bank_sites=4, n_units=3)
    np.testing.assert_array_equal(draw_pairs(one, config, 7)[1].snippets, draw_pairs(two, config, 7)[1].snippets)
    assert not np.array_equal(draw_pairs(one, config, 7)[0].snippets, draw_pairs(one, config, 8)[0].snippets)


def test_shapes_and_size_of_the_presets() -> None:
    paper = Encoder(PRESETS["paper"])
    assert sum(p.numel() for p in paper.parameters()) == 553_568  # as published: convolutions, 16 layers, reduction
    for encoder in (paper, Encoder(PRESETS["small"])):
        assert encoder(torch.zeros(2, N_SAMPLES, N_NEIGHBORS)).shape == (2, 32)


def test_slow_encoder_follows_and_gets_no_gradient() -> None:
    model = HuiduRep(TINY)
    views = torch.randn(2, 8, N_SAMPLES, N_NEIGHBORS)
    contrastive, error = model(views[0], views[1], views[0])
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
        torch.testing.assert_close(new - old, torch.full_like(old, 1 - TINY.momentum), rtol=1e-2, atol=1e-4)


def test_losses_fall(config: TrainConfig, bank: Bank) -> None:
    config = replace(config, steps=60, n_sites=8, bank_sites=64)
    run = Run.start(config)
    losses = np.array([train_step(run, config, bank) for _ in range(60)])
    first, last = losses[:5].mean(axis=0), losses[-5:].mean(axis=0)
    assert last[0] < 0.9 * first[0] and last[1] < 0.9 * first[1]


class KilledError(Exception):
    """Stands for a killed process."""


def test_a_resumed_run_is_the_same_run(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamsort.train import loop

    monkeypatch.setattr(loop, "Validation", lambda: lambda encoder: {"knn_clean": 0.5})
    monkeypatch.setattr(loop.Validation, "say", str, raising=False)
    whole, parts = replace(config, out=tmp_path / "whole"), replace(config, out=tmp_path / "parts", save_s=0.0)
    train(whole)
    real = loop.train_step

    def dies(run: Run, config: TrainConfig, bank: Bank) -> tuple[float, float]:
        if run.step == 7:  # in the middle of a bank
            raise KilledError
        return real(run, config, bank)

    monkeypatch.setattr(loop, "train_step", dies)
    with pytest.raises(KilledError):
        train(parts)
    monkeypatch.setattr(loop, "train_step", real)
    assert torch.load(parts.out / CHECKPOINT, weights_only=True)["step"] == 7
    train(parts)
    one, two = (torch.load(c.out / CHECKPOINT, weights_only=True) for c in (whole, parts))
    assert one["step"] == two["step"] == 12
    for key, value in one["model"].items():
        torch.testing.assert_close(value, two["model"][key], rtol=0, atol=0)


def test_a_checkpoint_of_another_network_is_refused(config: TrainConfig) -> None:
    run = Run.start(config)
    run.save(config)
    with pytest.raises(StreamsortError, match="made with another network"):
        Run.start(replace(config, network=replace(TINY, n_layers=2)))


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(StreamsortError, match="preset 'huge', expected one of small, paper"):
        TrainConfig(tmp_path, preset="huge")
    if not torch.cuda.is_available():
        with pytest.raises(StreamsortError, match="device 'cuda', expected cpu, or cuda where torch finds a GPU"):
            TrainConfig(tmp_path, device="cuda")
    for length in ({"minutes": 0.0}, {"steps": 0}):
        with pytest.raises(StreamsortError, match="expected a positive length"):
            TrainConfig(tmp_path, **length)
    with pytest.raises(StreamsortError, match="n_sites = 32, expected at most bank_sites = 8"):
        TrainConfig(tmp_path, bank_sites=8)


def test_scores_of_features_that_are_known() -> None:
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(4), 40)
    apart = np.eye(4)[units] * 10 + rng.normal(size=(160, 4))
    chance = rng.normal(size=(160, 4))
    # The unit is in a small first number beside a large common second one: only whitening finds it.
    hidden = np.stack([units + 0.05 * rng.normal(size=160), 50 * rng.normal(size=160)], axis=1)
    assert knn_accuracy(apart, units) == centroid_accuracy(apart, units, whiten=False) == 1.0
    assert knn_accuracy(chance, units) < 0.5 and centroid_accuracy(chance, units, whiten=True) < 0.5
    assert centroid_accuracy(hidden, units, whiten=False) < 0.6


def test_export_computes_what_torch_does_and_loads_live(
    config: TrainConfig, bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    from streamsort.train import export as module
    from streamsort.train.export import export, load_encoder

    monkeypatch.setattr(module, "Validation", lambda: Validation(n_sites=2))
    Run.start(config).save(config)
    contract = export(config.out, tmp_path / "tiny.onnx", version="7")
    assert json.loads((tmp_path / "tiny.json").read_text()) == contract
    assert contract["parity"] <= 1e-4 and contract["version"] == "7" and contract["training"]["seed"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([CHECKPOINT, "tiny.onnx", "tiny.json"])

    live = LiveEncoder(tmp_path / "tiny.onnx", provider="cpu")
    sites, units = np.repeat(np.arange(16), 8), np.tile(np.arange(8), 16)
    snippets = draw_spikes(bank, np.random.default_rng(1), sites, units, 0.2).snippets
    expected = load_encoder(config.out / CHECKPOINT)[0](torch.from_numpy(snippets)).detach().numpy()
    np.testing.assert_allclose(live(snippets, np.ones((128, N_NEIGHBORS), np.float32)), expected, atol=1e-4)


def test_export_evens_out_the_spread_within_units(config: TrainConfig) -> None:
    from streamsort.train import export

    Run.start(config).save(config)
    units = torch.from_numpy(export._drawn(64, 8, 20))

    def spread(encoder: Encoder) -> torch.Tensor:
        with torch.no_grad():
            embeddings = torch.stack([encoder(unit) for unit in units])
        residuals = (embeddings - embeddings.mean(dim=1, keepdim=True)).flatten(0, 1)
        return torch.linalg.eigvalsh(residuals.T @ residuals / (512 * 19))

    before = spread(Run.start(config).model.slow_encoder.eval())
    after = spread(export.load_encoder(config.out / CHECKPOINT)[0])
    assert after.mean().item() == pytest.approx(1.0, rel=1e-2)
    assert after.max() / after.mean() < 0.5 * before.max() / before.mean()


def test_an_export_that_computes_something_else_is_refused(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamsort.train import export

    Run.start(config).save(config)
    monkeypatch.setattr(export, "parity", lambda encoder, model: 0.5)
    with pytest.raises(StreamsortError, match=r"differ by 0\.5, expected at most 0\.0001"):
        export.export(config.out, tmp_path / "bad.onnx")
    assert not (tmp_path / "bad.onnx").exists()


def test_export_needs_a_checkpoint(tmp_path: Path) -> None:
    from streamsort.train.export import export

    with pytest.raises(StreamsortError, match="no such file, expected the output of a training run"):
        export(tmp_path, tmp_path / "none.onnx")


def test_validation_scores_an_encoder_and_the_components() -> None:
    validation = Validation(n_sites=3)
    untrained = validation(Encoder(TINY))
    components = validation.baseline(5)
    assert set(untrained) == set(components) and len(components) == 6
    assert components["lda_clean"] > 0.6 and components["lda_clean"] > untrained["knn_collisions"]
    assert "knn_clean 0." in Validation.say(untrained)
