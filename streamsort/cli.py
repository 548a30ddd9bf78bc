"""The command line: parses, calls one of `streamsort.commands` (or the demo, or the doctor), and turns mistakes into one line.

A mistake of the user's is a line on stderr and exit code 2; Ctrl-C lets what was acquired be sorted, saved and summed up, and is
exit code 0. Everything is imported when its command was chosen, so that help comes at once.
"""

import argparse
import importlib
import math
import os
import signal
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from streamsort import __version__
from streamsort.errors import StreamsortError

_SOURCES = """sources:
  lsl:NAME                       a Lab Streaming Layer stream (also lsl:type=...,source_id=...)
  tcp://host:port                a ZeroMQ publisher of raw samples, wire format 1
  PATH                           a recording: SpikeInterface binary folder, or raw file with a .json or .toml beside it
  sim:seconds=60,units=12,...    a simulation
"""

_OVERVIEW = """examples:
  streamsort demo                                               simulate, stream, sort, decode, report: a minute
  streamsort doctor                                             does everything work on this machine?
  streamsort run lsl:NAME --probe probe.json --publish tcp://127.0.0.1:5560
  streamsort sort recording/ --session out/                     as fast as the machine can
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    args = _parser().parse_args(argv)
    # Before numpy is there: on matrices as small as ours other threads save nothing, and spin beside the sorter.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code: int = importlib.import_module(args.module).main(args)
        sys.stdout.flush()
        return code
    except StreamsortError as error:
        return _fail(str(error))
    except BrokenPipeError:  # whoever read our stdout has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt as interrupt:
        return _stopped(args, interrupt)


def _fail(reason: str) -> int:
    print("streamsort: " + " ".join(reason.split()), file=sys.stderr)
    return 2


def _stopped(args: argparse.Namespace, interrupt: KeyboardInterrupt) -> int:
    """Tell what the Ctrl-C did that got here: the first does only before there is anything to drain, or where nothing drains."""
    if args.drains and type(interrupt) is KeyboardInterrupt:
        print("streamsort: stopped", file=sys.stderr)
        return 0
    print("streamsort: aborted", file=sys.stderr)
    return 130


def _parser() -> argparse.ArgumentParser:
    about = "Real-time spike sorting: a live multi-electrode voltage stream in, unit ids a few milliseconds after each spike out."
    parser = argparse.ArgumentParser(
        prog="streamsort", description=about, epilog=_OVERVIEW, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"streamsort {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    sorting = (_add_demo, _add_run, _add_sort, _add_score, _add_bench)
    for add in (*sorting, _add_replay, _add_listen, _add_simulate, _add_doctor, _add_train, _add_refresh):
        add(commands)
    return parser


def _add(
    commands: Any, name: str, about: str, epilog: str, *, module: str | None = None, drains: bool = False
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about[0].lower() + about[1:].split(".")[0],
        description=textwrap.fill(about, 88),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(module=module or f"streamsort.commands.{name}", drains=drains)
    return parser


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number


_positive.__name__ = "positive number"  # as argparse calls it


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")


def _add_sorting(parser: argparse.ArgumentParser) -> None:
    """Add what `run` and `sort` share."""
    parser.add_argument("--probe", metavar="FILE", help="probeinterface JSON, one contact per channel (the source's own)")
    parser.add_argument("--config", metavar="FILE", help="TOML with a table per stage, e.g. [detect] detect_threshold = 4.5")
    parser.add_argument("--warmup-s", type=float, metavar="S", help="length of the calibration, before any unit exists (60)")
    parser.add_argument("--seed", type=int, metavar="N", help="of all that is random in calibration (0)")
    parser.add_argument(
        "--encoder",
        metavar="WHICH",
        help="full, light, or an .onnx with its contract .json beside it; auto takes full where it is fast enough (auto)",
    )
    parser.add_argument("--provider", choices=("auto", "cpu", "cuda"), help="where the encoder runs; cuda never falls back (auto)")
    _add_json(parser)


def _add_demo(commands: Any) -> None:
    parser = _add(
        commands,
        "demo",
        "See it work: simulate 32 channels, stream them, sort them live, decode them, and report. "
        "A second process plays the recording in real time over LSL, this one sorts it, a third receives the units over ZeroMQ as "
        "a decoder would; the truth is known, so the report says how good the answer was, and how fast.",
        "example:\n  streamsort demo --seconds 60 --report demo-report\n",
        module="streamsort.demo",
        drains=True,
    )
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="of stream, 40 %% of it calibration (60)")
    parser.add_argument("--report", metavar="DIR", help="where report.json and report.png go (streamsort-demo-DATE-TIME)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="another seed is another recording (1)")
    _add_json(parser)


def _add_run(commands: Any) -> None:
    parser = _add(
        commands,
        "run",
        "Sort a stream live and publish units as they fire. "
        "After a calibration of --warmup-s, every spike carries a unit id; Ctrl-C finishes what was received and sums up.",
        f"{_SOURCES}\nexample:\n  streamsort run lsl:ephys --probe probe.json --publish tcp://127.0.0.1:5560 --session monday\n",
        drains=True,
    )
    parser.add_argument("source", metavar="SOURCE", help="what to sort, see below")
    parser.add_argument("--publish", metavar="URL", help="ZeroMQ address to publish on, e.g. tcp://127.0.0.1:5560")
    parser.add_argument("--lsl", metavar="NAME", help="also publish spikes as the LSL stream NAME")
    parser.add_argument("--session", metavar="DIR", help="new directory to save everything in")
    parser.add_argument(
        "--refresh-every",
        type=_positive,
        metavar="MIN",
        help="tune the encoder to the session's units so often, see refresh (never)",
    )
    parser.add_argument("--seconds", type=_positive, metavar="N", help="stop after so much of the stream")
    parser.add_argument("--timeout", type=_positive, metavar="S", help="give up after so much silence of a live stream (never)")
    parser.add_argument("--speed", type=float, metavar="X", help="multiple of real time, for recordings and simulations (1)")
    parser.add_argument("--chunk-ms", type=float, default=1.0, metavar="MS", help="length of a recording's chunks (1)")
    _add_sorting(parser)


def _add_sort(commands: Any) -> None:
    parser = _add(
        commands,
        "sort",
        "Sort a recording as fast as the machine can, with the units a live run would give. "
        "The session holds the spikes (numpy.load reads spikes.npy), units, ledger, gaps and templates. "
        "--engine huidurep-gmm is the HuiduRep paper's own pipeline instead, as a reference: offline, it fits a Gaussian mixture "
        "to the embeddings of the whole recording, pooled on a probe as small as a tetrode, on a larger one channel by channel.",
        "example:\n  streamsort sort recording/ --session out --warmup-s 30\n  streamsort score out truth/\n",
        drains=True,
    )
    parser.add_argument("source", metavar="RECORDING", help="SpikeInterface binary folder, raw file with a sidecar, or sim:...")
    parser.add_argument("--session", metavar="DIR", required=True, help="new directory to write")
    parser.add_argument(
        "--chunk-ms", type=float, default=20.0, metavar="MS", help="length of a chunk, which does not change the result (20)"
    )
    parser.add_argument("--engine", choices=("streamsort", "huidurep-gmm"), default="streamsort", help="(streamsort)")
    parser.add_argument(
        "--units",
        type=int,
        metavar="K",
        help="huidurep-gmm: components of the mixture, on a large probe of each channel's (by BIC)",
    )
    _add_sorting(parser)


def _add_refresh(commands: Any) -> None:
    parser = _add(
        commands,
        "refresh",
        "Tune the encoder of a session to the units it sees, and offer the result to the run. "
        "The run takes it over only if it gives the recent spikes the same units, so none changes its id; "
        "an offer that tells held-out spikes apart less well is not made. Needs `pip install 'streamsort[train]'`.",
        "example:\n  streamsort refresh monday          beside `streamsort run ... --session monday`\n",
    )
    parser.add_argument("session", metavar="SESSION", help="session directory")
    parser.add_argument("--seconds", type=_positive, default=60.0, metavar="S", help="length of the tuning (60)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is held out and drawn (0)")
    _add_json(parser)


def _add_score(commands: Any) -> None:
    parser = _add(
        commands,
        "score",
        "Compare a session with the truth. "
        "Spikes match within 0.4 ms; accuracy is tp / (tp + misses + false alarms), and a true unit that was not found counts 0.",
        "example:\n  streamsort score out truth/ --from-s 30\n",
    )
    parser.add_argument("session", metavar="SESSION", help="session directory")
    parser.add_argument("truth", metavar="TRUTH", help="SpikeInterface numpy folder, or .npz with samples and labels")
    parser.add_argument("--from-s", type=float, metavar="S", help="only what fires from here on, such as after calibration")
    parser.add_argument("--to-s", type=float, metavar="S", help="only what fires before")
    _add_json(parser)


def _add_bench(commands: Any) -> None:
    parser = _add(
        commands,
        "bench",
        "Measure how fast this machine sorts a recording live, and how well. "
        "A second process plays the recording over ZeroMQ or LSL, `streamsort run` sorts it in a third, a fourth notes when each "
        "spike arrives. Latency is split into what the look-ahead takes, what is computed, and what is waited for. "
        "Where the truth is known, accuracy is measured in the same run. What is too short is played again from its start.",
        "faults, each --fault a phase of its own, those with a comma between them together:\n"
        "  stall=200ms        the player pauses every 2 s, then sends what was due\n"
        "  loss=1e-3          each chunk is lost with this probability (over zmq: LSL numbers no samples)\n"
        "  jitter=5ms         each chunk comes up to so much late\n"
        "  burst=10x          so many times the spikes, for 5 s: copies of the recording's own, at other times\n"
        "  slow-encoder=20ms  each call of the encoder, which lessons need, takes so much longer\n"
        "  slow-subscriber    a second subscriber that never reads\n"
        "examples:\n"
        "  streamsort bench sim:channels=32,units=15,seconds=20 --seconds 10 --warmup-s 8\n"
        "  streamsort bench recording/ --headroom --fault stall=200ms --fault loss=1e-3,jitter=5ms --json > rig.json\n"
        "  streamsort bench --compare before.json after.json\n",
    )
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="a recording, or sim:...")
    parser.add_argument("--transport", choices=("zmq", "lsl"), default="zmq", help="between the player and the sorter (zmq)")
    parser.add_argument("--seconds", type=_positive, default=30.0, metavar="S", help="length of each phase (30)")
    parser.add_argument("--chunk-ms", type=_positive, default=1.0, metavar="MS", help="length of what is sent at once (1)")
    parser.add_argument(
        "--catch-up-s", type=_positive, default=60.0, metavar="S", help="measure at the latest so long after the warm-up (60)"
    )
    parser.add_argument("--fault", action="append", default=[], metavar="FAULT=VALUE,...", help="a phase with faults, see below")
    parser.add_argument("--headroom", action="store_true", help="at last play faster and faster, until the sorter falls behind")
    parser.add_argument(
        "--truth", metavar="TRUTH", help="as for score (the folder truth in or beside the recording, if there is one)"
    )
    parser.add_argument("--session", metavar="DIR", help="also record a session, as an experiment would")
    parser.add_argument("--picture", metavar="FILE", help="PNG to draw; needs pip install 'streamsort[report]'")
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="show two results of --json side by side, and measure nothing"
    )
    _add_sorting(parser)


def _add_replay(commands: Any) -> None:
    parser = _add(
        commands,
        "replay",
        "Send a recording out as a live stream, once somebody listens. Over LSL or ZeroMQ, as a headstage's software would.",
        "examples:\n  streamsort replay recording/ --to lsl:ephys\n  streamsort replay recording/ --to tcp://127.0.0.1:5550\n",
        drains=True,
    )
    parser.add_argument("recording", metavar="RECORDING", help="a recording, or sim:...")
    parser.add_argument("--to", metavar="URL", required=True, help="lsl:NAME, or tcp://127.0.0.1:PORT to bind")
    parser.add_argument("--speed", type=float, default=1.0, metavar="X", help="multiple of real time (1)")
    parser.add_argument("--chunk-ms", type=float, default=1.0, metavar="MS", help="length of what is sent at once (1)")
    parser.add_argument("--timeout", type=_positive, metavar="S", help="give up when nobody listens for so long (never)")
    parser.add_argument("--probe", metavar="FILE", help="probeinterface JSON to announce instead of the recording's own")
    _add_json(parser)


def _add_listen(commands: Any) -> None:
    parser = _add(
        commands,
        "listen",
        "Receive units from a running sorter and print spikes per second and unit, as UNIT:RATE.",
        "example:\n  streamsort listen tcp://127.0.0.1:5560\n",
        drains=True,
    )
    parser.add_argument("url", metavar="URL", help="where the sorter publishes")
    parser.add_argument("--seconds", type=_positive, metavar="N", help="stop after so long")
    parser.add_argument("--timeout", type=_positive, metavar="S", help="give up after so much silence (never)")
    _add_json(parser)


def _add_simulate(commands: Any) -> None:
    parser = _add(
        commands,
        "simulate",
        "Write a recording whose truth is known, as folders SpikeInterface loads: OUT/recording and OUT/truth.",
        "examples:\n  streamsort simulate easy --seconds 120 --probe grid32 --units 20\n"
        "  streamsort simulate hard --probe neuropixels64 --half-um 15 25 --drift-um 20 --pairs 0.1 --far-units 200\n",
    )
    probes = ("grid32", "linear32", "tetrode", "single", "neuropixels64", "neuropixels128", "neuropixels384")
    parser.add_argument("out", metavar="OUT", help="new or empty folder")
    parser.add_argument("--seconds", type=float, metavar="S", help="length (60)")
    parser.add_argument("--probe", dest="probe_name", choices=probes, help="(grid32)")
    parser.add_argument("--units", dest="n_units", type=int, metavar="N", help="(20)")
    parser.add_argument("--seed", type=int, metavar="N", help="(0)")
    parser.add_argument("--snr", type=float, nargs=2, metavar=("LOW", "HIGH"), help="trough over noise, broad-band (4 15)")
    parser.add_argument("--rates-hz", type=float, nargs=2, metavar=("LOW", "HIGH"), help="firing rates (1 12)")
    parser.add_argument("--noise-uv", type=float, metavar="UV", help="rms of the noise (8)")
    parser.add_argument(
        "--half-um",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="distance at which a trough halves; 15 25 is sharp (20 to 55)",
    )
    parser.add_argument("--lfp-uv", type=float, metavar="UV", help="rms of a slow potential (0)")
    parser.add_argument("--far-units", type=int, metavar="N", help="neurons too distant to be told apart, not in the truth (0)")
    parser.add_argument("--artifacts-hz", type=float, metavar="HZ", help="rate of large events on all contacts or one (0)")
    parser.add_argument("--drift-um", type=float, metavar="UM", help="the sources move by up to this, both ways (0)")
    parser.add_argument("--drift-kind", choices=("sine", "zigzag", "step"), help="(sine)")
    parser.add_argument("--drift-period-s", type=float, metavar="S", help="a step comes after half of it (120)")
    parser.add_argument("--drift-gradient", type=float, metavar="G", help="0 rigid, 1 the foot of the probe stands still (0)")
    parser.add_argument("--bursting", type=float, metavar="SHARE", help="of units that fire in bursts, 0 to 1 (0)")
    parser.add_argument("--pairs", type=float, metavar="SHARE", help="of spikes within 0.5 ms of a neighbouring unit's, 0 to 1 (0)")
    parser.add_argument(
        "--pauses",
        type=float,
        nargs=3,
        metavar=("SHARE", "FROM", "TO"),
        help="share of units silent from one second to another (0)",
    )


def _add_doctor(commands: Any) -> None:
    parser = _add(
        commands,
        "doctor",
        "Check this machine: versions, encoder and provider, LSL and ZeroMQ over the loopback, clock. "
        "Exit code 0 if all works, else 1.",
        "example:\n  streamsort doctor\n",
        module="streamsort.doctor",
    )
    _add_json(parser)


def _add_train(commands: Any) -> None:
    parser = _add(
        commands,
        "train",
        "Train an encoder on simulated spikes and export it for the live sorter. Needs `pip install 'streamsort[train]'`. "
        "The preset is one of those shipped, or a TOML file: the losses, the data, and the network in [network]. "
        "Under torchrun several processes train together.",
        "examples:\n  streamsort train small --out my-encoder --minutes 40\n"
        "  streamsort train light --out my-light --teacher my-encoder/encoder.onnx\n"
        "  torchrun --nproc-per-node 2 -m streamsort train full --out my-encoder\n"
        "  streamsort run lsl:ephys --encoder my-encoder/encoder.onnx\n",
    )
    parser.add_argument("preset", metavar="PRESET", help="full, light, small, or a .toml")
    parser.add_argument("--out", metavar="DIR", required=True, help="for model and checkpoint; training goes on where it stopped")
    parser.add_argument("--name", default="encoder", metavar="NAME", help="of the model (encoder)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=_positive, metavar="M", help="length of the training (the preset's)")
    length.add_argument("--steps", type=int, metavar="N", help="length in steps instead")
    parser.add_argument("--seed", type=int, metavar="N", help="of all that is drawn (0)")
    parser.add_argument("--teacher", metavar="FILE", help="model or checkpoint whose embeddings are to be learnt too (none)")
    parser.add_argument("--distil", type=_positive, metavar="W", help="weight of the distance from the teacher (1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="auto takes a GPU that is there (auto)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), help="auto is bf16 on a GPU, fp32 on a CPU (auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch, per process (1)")
