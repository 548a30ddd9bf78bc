"""The paper's pipeline as a reference: the stream's own peaks, a mixture over all of them, a session that can be scored."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from streamsort.cli import main
from streamsort.config import EncodeConfig, SorterConfig
from streamsort.errors import StreamsortError
from streamsort.offline import Mixture, sort_offline
from streamsort.score import load_truth, score
from streamsort.session import Session
from streamsort.simulate import SimulationConfig, write_recording
from streamsort.sorter import Sorter
from streamsort.sources import open_source


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    with pytest.raises(StreamsortError, match=r"scikit-learn is not installed, expected pip install 'streamsort\[offline\]'"):
        Mixture()


@pytest.fixture
def _sklearn() -> None:
    pytest.importorskip("sklearn.mixture")


def blobs(rng: np.random.Generator, sizes: tuple[int, ...], n_dims: int = 4) -> tuple[np.ndarray, np.ndarray]:
    label = np.repeat(np.arange(len(sizes)), sizes)
    return (rng.normal(size=(len(label), n_dims)) + 12 * np.eye(n_dims)[label]).astype(np.float32), label


@pytest.mark.usefixtures("_sklearn")
def test_bic_finds_the_number_of_clusters(rng: np.random.Generator) -> None:
    embeddings, label = blobs(rng, (200, 90, 140))
    component, posterior = Mixture()(embeddings)
    assert len(set(zip(label.tolist(), component.tolist(), strict=True))) == 3 == component.max() + 1
    assert posterior.dtype == np.float32 and posterior.min() > 0.9
    again, _ = Mixture()(embeddings)
    np.testing.assert_array_equal(again, component)


@pytest.mark.usefixtures("_sklearn")
def test_a_number_that_is_given_is_kept_as_far_as_there_are_peaks(rng: np.random.Generator) -> None:
    embeddings, _ = blobs(rng, (200, 90, 140))
    assert len(np.unique(Mixture(5)(embeddings)[0])) == 5
    for n, most in ((1, 1), (9, 1), (12, 2)):  # 4 dimensions: 5 peaks for a component
        assert len(np.unique(Mixture(5)(embeddings[:n])[0])) == most
    with pytest.raises(StreamsortError, match="units 0, expected 1 or more"):
        Mixture(0)


@pytest.mark.usefixtures("_sklearn")
def test_a_tetrode_is_sorted_and_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = SimulationConfig(seconds=20, probe_name="tetrode", n_units=3, rates_hz=(12, 20), snr=(8, 15), seed=4)
    write_recording(config, tmp_path / "sim")
    common = ["sort", str(tmp_path / "sim" / "recording"), "--warmup-s", "10", "--encoder", "light", "--session"]
    assert main([*common, str(tmp_path / "stream"), "--warmup-s", "30"]) == 0  # without units, all peaks are published
    capsys.readouterr()
    assert main([*common, str(tmp_path / "paper"), "--engine", "huidurep-gmm", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    stream, paper = Session(tmp_path / "stream"), Session(tmp_path / "paper")
    for name in ("sample_index", "time", "channel", "amplitude_uv"):  # the same peaks, each in some unit
        np.testing.assert_array_equal(paper.spikes[name], stream.spikes[name])
    ids = np.unique(paper.spikes["unit_id"])
    assert ids[0] == 1 and [unit["unit_id"] for unit in paper.units] == ids.tolist()
    assert sum(unit["n_spikes"] for unit in paper.units) == len(paper.spikes) == figures["spikes"]
    assert paper.manifest["engine"] == "huidurep-gmm" and paper.manifest["clean"] is True
    assert paper.manifest["model"]["sha256"] == stream.manifest["model"]["sha256"]

    # The BIC of 20 s has too few spikes for so many parameters; two components more than units are for noise and overlaps.
    assert main([*common, str(tmp_path / "five"), "--engine", "huidurep-gmm", "--units", "5"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["units"] == "5" and rows["session"] == str(tmp_path / "five")
    assert score(Session(tmp_path / "five").spikes, load_truth(tmp_path / "sim"), 30000.0, 2.0).accuracy_mean > 0.7


@pytest.mark.usefixtures("_sklearn")
def test_a_large_probe_is_sorted_by_channel_and_joined() -> None:
    url = "sim:seconds=10,probe=linear32,units=3,rates_hz=12:20,snr=10:15,seed=3"
    with open_source(url, chunk_ms=100) as source:
        sorter = Sorter(SorterConfig(warmup_s=5, encode=EncodeConfig("light", "cpu")), source.info)
        done: list[float] = []
        output = sort_offline(source, sorter, Mixture(), done.append)
    assert done == sorted(done) and done[-1] == 1.0
    spikes, distances = output.spikes, sorter.probe.distances_um()
    channels = [np.unique(spikes["channel"][spikes["unit_id"] == unit["unit_id"]]) for unit in output.units or []]
    assert max(map(len, channels)) > 1  # a unit between two contacts peaks now on one, now on the other
    assert all(distances[np.ix_(of_unit, of_unit)].max() <= 200 for of_unit in channels)
