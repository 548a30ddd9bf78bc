"""The live encoder: its contract is verified, a spike's embedding depends on that spike alone, and resampling keeps the trough."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamsort.config import PreprocessConfig
from streamsort.encode import CPU_BATCH, Encoder, shipped_model
from streamsort.errors import StreamsortError

N_SAMPLES, N_NEIGHBORS, N_DIMS = 48, 11, 32


def draw(n: int, seed: int = 0, n_samples: int = N_SAMPLES) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Make snippets that look like spikes in noise, and noise levels."""
    rng = np.random.default_rng(seed)
    trough = -np.exp(-0.5 * ((np.arange(n_samples) - 18) / 4) ** 2)[None, :, None] * np.exp(-np.arange(N_NEIGHBORS) / 3)
    snippets = rng.uniform(20, 80, (n, 1, 1)) * trough + rng.normal(0, 5, (n, n_samples, N_NEIGHBORS))
    return snippets.astype(np.float32), rng.uniform(4, 6, (n, N_NEIGHBORS)).astype(np.float32)


@pytest.fixture(scope="module", params=["full", "light"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    encoder = Encoder(shipped_model(request.param), provider="cpu")
    encoder.warmup()
    return encoder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Copy a shipped model, to be broken."""
    for source in (shipped_model(), shipped_model().with_suffix(".json")):
        shutil.copy(source, tmp_path)
    return tmp_path / shipped_model().name


def edit(model: Path, **changes: Any) -> None:
    path = model.with_suffix(".json")
    table = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not None}))


def test_shipped_models_are_what_the_sorter_is_built_for(encoder: Encoder) -> None:
    contract, pipeline = encoder.contract, PreprocessConfig()
    assert (contract.n_samples, contract.n_before, contract.n_neighbors, contract.n_dims) == (N_SAMPLES, 18, N_NEIGHBORS, N_DIMS)
    assert (contract.sampling_frequency, contract.freq_min_hz, contract.freq_max_hz) == (
        30000.0,
        pipeline.freq_min_hz,
        pipeline.freq_max_hz,
    )
    assert (encoder.n_before, encoder.n_after, encoder.provider) == (18, 30, "cpu")
    assert encoder.path.stat().st_size < 5_000_000


def test_the_contract_says_how_many_spikes_a_run_takes(model: Path) -> None:
    edit(model, cpu_batch=3)
    assert Encoder(model, provider="cpu").batch_size == 3
    edit(model, cpu_batch=None)
    assert Encoder(model, provider="cpu").batch_size == CPU_BATCH
    assert Encoder(model, provider="cpu", batch_size=5).batch_size == 5


def test_embeddings_are_finite_and_tell_shapes_apart(encoder: Encoder) -> None:
    snippets, noise = draw(40)
    wide = snippets[:, np.clip((np.arange(N_SAMPLES) - 18) // 2 + 18, 0, 47)]  # the same spikes, twice as slow
    one, two = encoder(snippets, noise), encoder(wide, noise)
    assert one.shape == (40, N_DIMS) and one.dtype == np.float32 and np.isfinite(one).all()
    between = np.linalg.norm(one.mean(axis=0) - two.mean(axis=0))
    assert between > 2 * max(one.std(axis=0).mean(), two.std(axis=0).mean())


def test_no_spikes_no_embeddings(encoder: Encoder) -> None:
    assert encoder(*draw(0)).shape == (0, N_DIMS)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 8])
def test_batch_sizes_agree_closely(encoder: Encoder, batch_size: int) -> None:
    snippets, noise = draw(11)
    other = Encoder(encoder.path, provider="cpu", batch_size=batch_size)
    np.testing.assert_allclose(other(snippets, noise), encoder(snippets, noise), atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(23)), cuts=st.lists(st.integers(0, 23), max_size=6))
def test_a_row_depends_on_itself_alone(encoder: Encoder, order: list[int], cuts: list[int]) -> None:
    snippets, noise = draw(23)
    alone = np.concatenate([encoder(snippets[k : k + 1], noise[k : k + 1]) for k in order])
    parts = [encoder(snippets[part], noise[part]) for part in np.split(np.array(order), sorted(cuts))]
    np.testing.assert_array_equal(np.concatenate(parts), alone)


def test_a_broken_neighbour_row_stays_in_its_row(encoder: Encoder) -> None:
    snippets, noise = draw(encoder.batch_size + 1)
    expected = encoder(snippets, noise)
    snippets[1] = np.nan
    found = encoder(snippets, noise)
    np.testing.assert_array_equal(np.delete(found, 1, axis=0), np.delete(expected, 1, axis=0))


def test_missing_neighbours_count_as_silent(encoder: Encoder) -> None:
    snippets, noise = draw(6)
    silent = snippets.copy()
    silent[:, :, 4:] = 0.0
    absent = noise.copy()
    absent[:, 4:] = 0.0
    found = encoder(snippets, absent)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, encoder(silent, noise))


def test_input_is_in_noise_units_and_not_written(encoder: Encoder) -> None:
    snippets, noise = draw(5)
    kept = snippets.copy(), noise.copy()
    found = encoder(snippets, noise)
    np.testing.assert_array_equal(found, encoder(snippets * 4, noise * 4))
    np.testing.assert_array_equal(snippets, kept[0])
    np.testing.assert_array_equal(noise, kept[1])


@pytest.mark.parametrize("rate", [20000.0, 24000.0, 25000.0, 32000.0, 50000.0])
def test_other_rates_are_resampled_around_the_trough(encoder: Encoder, rate: float) -> None:
    other = Encoder(encoder.path, provider="cpu", sampling_frequency=rate)
    assert (other.n_before, other.n_after) == (round(0.6e-3 * rate), round(1.0e-3 * rate))

    def spike(n_before: int, n_after: int, frequency: float) -> NDArray[np.float32]:
        t = (np.arange(n_before + n_after) - n_before) / frequency * 1e3
        wave = -50 * np.exp(-0.5 * (t / 0.2) ** 2) + 15 * np.exp(-0.5 * ((t - 0.5) / 0.2) ** 2)
        return (wave[None, :, None] * np.exp(-np.arange(N_NEIGHBORS) / 3)).astype(np.float32)

    noise = np.full((1, N_NEIGHBORS), 5.0, np.float32)
    expected = encoder(spike(18, 30, 30000.0), noise)
    np.testing.assert_allclose(other(spike(other.n_before, other.n_after, rate), noise), expected, atol=2.0)
    moved = encoder(np.roll(spike(18, 30, 30000.0), 4, axis=1), noise)
    assert np.abs(moved - expected).max() > np.abs(other(spike(other.n_before, other.n_after, rate), noise) - expected).max()


def test_wrong_shapes_are_named(encoder: Encoder) -> None:
    snippets, noise = draw(3)
    with pytest.raises(StreamsortError, match=r"snippets \(3, 40, 11\).*expected \(3, 48, 11\)"):
        encoder(snippets[:, :40], noise)
    with pytest.raises(StreamsortError, match=r"noise_level \(3, 5\)"):
        encoder(snippets, noise[:, :5])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sha256": "0" * 64}, "sha256 .* expected 000000000000"),
        ({"n_dims": None}, "key n_dims is missing"),
        ({"n_dims": "32"}, "n_dims = '32', expected int"),
        ({"n_dims": 16}, "outputs .* expected one embeddings float32 \\['batch', 16\\]"),
        ({"n_neighbors": 10}, "inputs .* expected one snippets float32 \\['batch', 48, 10\\]"),
        ({"n_samples": 50}, "n_samples = 50, expected 48"),
        ({"cpu_batch": 0}, "cpu_batch = 0, expected 1 or more"),
        ({"cpu_batch": 2.0}, "cpu_batch = 2.0, expected int"),
        ({"n_before": 48}, "n_before = 48, expected 1 to 47"),
        ({"sampling_frequency": 0}, "sampling_frequency = 0.0, expected a positive number"),
        ({"input_name": "spikes"}, "inputs .* expected one spikes"),
        ({"output_name": "logits"}, "outputs .* expected one logits"),
        ({"dtype": "float16"}, "dtype = 'float16', expected float32"),
        ({"normalisation": "uV"}, "normalisation = 'uV', expected noise units"),
    ],
)
def test_a_broken_contract_is_refused(model: Path, changes: dict[str, Any], words: str) -> None:
    edit(model, **changes)
    with pytest.raises(StreamsortError, match=words) as caught:
        Encoder(model, provider="cpu")
    assert "\n" not in str(caught.value)


def test_a_missing_or_unreadable_model_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(StreamsortError, match=r"no such file, expected an \.onnx"):
        Encoder(tmp_path / "none.onnx")
    contract = model.with_suffix(".json")
    kept = contract.read_text()
    for text, words in (("{", "not JSON"), ("[]", "list, expected an object")):
        contract.write_text(text)
        with pytest.raises(StreamsortError, match=words):
            Encoder(model)
    contract.unlink()
    with pytest.raises(StreamsortError, match=r"expected it beside the \.onnx"):
        Encoder(model)
    contract.write_text(kept)
    assert Encoder(model, provider="cpu").name == model.stem


def test_the_shipped_model_is_found_in_a_wheel_and_in_a_checkout(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "streamsort"
    package.mkdir(parents=True)
    monkeypatch.setattr("streamsort.encode.__file__", str(package / "encode.py"))
    with pytest.raises(StreamsortError, match="expected it with the package"):
        Encoder()
    for place in (package.parent / "models", package / "models"):  # a wheel's is looked for first
        place.mkdir()
        shutil.copy(model, place)
        assert shipped_model() == place / model.name


def _rewrite(model: Path, content: bytes) -> None:
    import hashlib

    model.write_bytes(content)
    edit(model, sha256=hashlib.sha256(content).hexdigest())


def test_what_onnxruntime_does_not_load_is_refused(model: Path) -> None:
    _rewrite(model, model.read_bytes()[:1000])
    with pytest.raises(StreamsortError, match="onnxruntime does not load it") as caught:
        Encoder(model, provider="cpu")
    assert "\n" not in str(caught.value)


def test_weights_in_another_file_are_refused(model: Path) -> None:
    onnx = pytest.importorskip("onnx")
    loaded = onnx.load(model)
    onnx.save(loaded, model, save_as_external_data=True, location="weights.bin", size_threshold=0)
    _rewrite(model, model.read_bytes())
    with pytest.raises(StreamsortError, match="keeps weights in another file"):
        Encoder(model, provider="cpu")


def test_arguments_are_checked() -> None:
    with pytest.raises(StreamsortError, match="provider 'gpu', expected auto, cpu or cuda"):
        Encoder(provider="gpu")  # type: ignore[arg-type]
    with pytest.raises(StreamsortError, match="batch_size 0, expected 1 or more"):
        Encoder(batch_size=0)
    with pytest.raises(StreamsortError, match="sampling_frequency -1"):
        Encoder(provider="cpu", sampling_frequency=-1.0)


def test_cuda_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamsort.encode._cuda_driver", lambda: False)
    assert Encoder(provider="auto").provider == "cpu"
    with pytest.raises(StreamsortError, match="no session runs on CUDA here"):
        Encoder(provider="cuda")


def test_a_session_that_fell_back_does_not_pass_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamsort import encode

    real = encode._session
    monkeypatch.setattr(encode, "_cuda_driver", lambda: True)
    monkeypatch.setattr(encode.ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(encode, "_session", lambda path, model, provider, batch_size: real(path, model, "cpu", batch_size))
    assert Encoder(provider="auto").provider == "cpu"
    with pytest.raises(StreamsortError, match="no session runs on CUDA here"):
        Encoder(provider="cuda")


def test_the_live_encoder_needs_no_training_packages() -> None:
    code = "import sys, streamsort.encode; print(sorted({'torch', 'onnx', 'onnxscript', 'scipy', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
