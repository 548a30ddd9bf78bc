"""Write tests/golden/quality.json: what SpikeInterface says of the seeded spike trains of tests/seeded_spikes.py.

    python tools/make_quality_golden.py

Needs spikeinterface beside numpy; the tests need only the file. Each unit gets a channel of its own with white noise, and each
spike is one sample of it, so that SpikeInterface finds the very amplitudes that were drawn. The positions that were drawn take the
place of those it found, since it is the drift that is compared and not how a spike is localised.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import spikeinterface as si
import spikeinterface.metrics as sm
from probeinterface import generate_linear_probe

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))
from seeded_spikes import DURATION_S, NOISE_UV, RATE, SEED, Train, trains  # noqa: E402

METRICS = ["num_spikes", "firing_rate", "presence_ratio", "snr", "isi_violation", "amplitude_median", "amplitude_cv", "drift"]
COLUMNS = [
    *("num_spikes", "firing_rate", "presence_ratio", "snr", "isi_violations_ratio", "isi_violations_count"),
    *("amplitude_median", "amplitude_cv_median", "drift_ptp", "drift_std", "drift_mad"),
]


def recording_of(units: list[Train]) -> si.BaseRecording:
    """Return noise with the spikes in it, a channel for each unit."""
    rng = np.random.default_rng(SEED)
    traces = rng.normal(0.0, NOISE_UV, (int(DURATION_S * RATE), len(units))).astype(np.float32)
    for channel, unit in enumerate(units):
        traces[unit.sample_index, channel] = unit.amplitude_uv
    recording = si.NumpyRecording([traces], RATE)
    recording.set_channel_gains(1.0)
    recording.set_channel_offsets(0.0)
    probe = generate_linear_probe(len(units), ypitch=200.0)
    probe.set_device_channel_indices(np.arange(len(units)))
    recording.set_probe(probe)
    return recording


def analyzer_of(units: list[Train]) -> si.SortingAnalyzer:
    """Return an analyzer with all that the metrics need."""
    sorting = si.NumpySorting.from_unit_dict({unit.name: unit.sample_index for unit in units}, RATE)
    analyzer = si.create_sorting_analyzer(sorting, recording_of(units), sparse=False, return_in_uV=True)
    analyzer.compute({"random_spikes": {"method": "all"}, "noise_levels": {}, "templates": {}, "spike_amplitudes": {}})
    analyzer.compute("spike_locations", method="center_of_mass")
    locations = analyzer.get_extension("spike_locations").data["spike_locations"]
    spikes = analyzer.sorting.to_spike_vector()
    for k, unit in enumerate(units):
        locations["y"][spikes["unit_index"] == k] = unit.y_um
    return analyzer


def main() -> None:
    """Compute the metrics and write the file."""
    warnings.simplefilter("ignore")  # of NaN, which is part of what is written
    si.set_global_job_kwargs(progress_bar=False)
    units = trains()
    table = sm.compute_quality_metrics(analyzer_of(units), metric_names=METRICS)
    rows = {str(name): {c: _number(row[c]) for c in COLUMNS if c in row} for name, row in table.iterrows()}
    (TESTS / "golden").mkdir(exist_ok=True)
    golden = {"spikeinterface": si.__version__, "metrics": rows}
    (TESTS / "golden" / "quality.json").write_text(json.dumps(golden, indent=1) + "\n")


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 9)


if __name__ == "__main__":
    main()
