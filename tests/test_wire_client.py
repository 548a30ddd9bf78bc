"""A client made from the wire-format page alone, in a process that knows nothing of streamsort, receives every topic."""

import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from streamsort.records import SPIKE_DTYPE, Gap, Output, StreamInfo
from streamsort.sinks.zmq import ZmqSink

pytestmark = pytest.mark.timeout(25)

CLIENT = r"""
import json, struct, sys, time
import zmq

assert not any(name.startswith("streamsort") for name in sys.modules)
socket = zmq.Context().socket(zmq.SUB)
socket.connect(sys.argv[1])
socket.setsockopt(zmq.SUBSCRIBE, b"")
record = struct.Struct("<qdiHHff")
wanted, seen, lost, expected = {"spikes", "bins", "units", "ledger", "gaps", "status"}, {}, {}, {}
print("ready", flush=True)
deadline = time.monotonic() + 15
while wanted - seen.keys() and time.monotonic() < deadline:
    if not socket.poll(100):
        continue
    topic, header, payload = socket.recv_multipart()
    topic, header = topic.decode(), json.loads(header)
    lost[topic] = lost.get(topic, 0) + header["seq"] - expected.get(topic, header["seq"])
    expected[topic] = header["seq"] + 1
    if topic == "spikes":
        body = [record.unpack_from(payload, k * 32) for k in range(header["n"])]
        assert len(payload) == 32 * header["n"]
    elif topic == "bins":
        body = list(struct.unpack("<%dh" % header["n"], payload))
    else:
        body = json.loads(payload)
    seen[topic] = [header, body, time.monotonic()]
print(json.dumps([seen, lost]))
"""


def outputs(k: int) -> Output:
    """Make the k-th 20 ms of a sorter that knows two units."""
    spikes = np.zeros(2, SPIKE_DTYPE)
    spikes["sample_index"] = [600 * k + 7, 600 * k + 500]
    spikes["time"] = time.monotonic()
    spikes["unit_id"], spikes["channel"], spikes["flags"] = [1, -1], [3, 65535], [16, 0]
    spikes["amplitude_uv"], spikes["confidence"] = [-81.5, -40.25], [0.75, 0.0]
    return Output(
        through_sample=600 * (k + 1),
        spikes=spikes,
        ledger=[{"event": "born", "sample_index": 600 * k, "unit_id": 1, "into": None, "reason": "calibration"}],
        gaps=[Gap(600 * k + 5, 30, "gap")],
        units=[{"unit_id": 1, "slot": 0, "state": "stable", "snr": np.float32(7.5), "quality": float("nan")}],
        status={"queue": 0, "latency_ms": {"p50": 1.25}, "provider": "cpu"},
        t_acquired=time.monotonic(),
    )


@pytest.fixture(scope="module")
def received() -> Any:
    info = StreamInfo("test", 30000.0, 4, np.dtype(np.int16), np.ones(4, np.float32), None, live=True)
    sink = ZmqSink("tcp://127.0.0.1:*", info=info, session="s-1", model="light-1")
    with subprocess.Popen([sys.executable, "-c", CLIENT, sink.endpoint], stdout=subprocess.PIPE, text=True) as client:
        try:
            assert client.stdout is not None and client.stdout.readline() == "ready\n"
            k, deadline = 0, time.monotonic() + 15
            while client.poll() is None and time.monotonic() < deadline:
                sink.publish(outputs(k))
                k += 1
                time.sleep(0.005)
            return json.loads(client.stdout.read())
        finally:
            client.kill()
            sink.close()


def test_every_topic_arrives_with_the_common_header(received: Any) -> None:
    seen, lost = received
    assert seen.keys() == {"spikes", "bins", "units", "ledger", "gaps", "status"}
    assert set(lost.values()) == {0}
    for header, _, heard_at in seen.values():
        assert (header["schema"], header["session"], header["sampling_frequency"]) == ("streamsort/1", "s-1", 30000.0)
        assert header["clock"] == "monotonic"
        assert heard_at - 1.0 < header["t_published"] <= heard_at


def test_spike_records(received: Any) -> None:
    header, (first, second), _ = received[0]["spikes"]
    assert header["n"] == 2 and header["model"] == "light-1"
    assert 0 <= header["t_published"] - header["t_acquired"] < 1.0
    assert 0 <= header["t_published"] - first[1] < 1.0
    assert first[0] % 600 == 7 and second[0] == first[0] + 493
    assert first[2:] == [1, 3, 16, -81.5, 0.75]
    assert second[2:] == [-1, 65535, 0, -40.25, 0.0]


def test_bins_and_json_topics(received: Any) -> None:
    seen, _ = received
    header, counts, _ = seen["bins"]
    assert counts == [1] and header["start_sample"] % 600 == 0 and (header["n_samples"], header["slots"]) == (600, 1)
    assert seen["units"][1] == [{"unit_id": 1, "slot": 0, "state": "stable", "snr": 7.5, "quality": None}]
    assert seen["ledger"][1].keys() == {"event", "sample_index", "unit_id", "into", "reason"}
    gap = seen["gaps"][1]
    assert (gap["start_sample"] % 600, gap["n_samples"], gap["kind"]) == (5, 30, "gap")
    assert seen["status"][1] == {"queue": 0, "latency_ms": {"p50": 1.25}, "provider": "cpu"}
