"""From arguments to what they mean: the config, the probe, the manifest of a session."""

import argparse
import dataclasses
import logging
import sys
from typing import Any

from streamsort.config import SorterConfig
from streamsort.probe import Probe
from streamsort.records import StreamInfo
from streamsort.sorter import Sorter

_log = logging.getLogger("streamsort.commands")


def config_of(args: argparse.Namespace) -> SorterConfig:
    """Read `--config`, and put over it what was given on the command line."""
    config = SorterConfig.from_toml(args.config) if args.config is not None else SorterConfig()
    given = {key: value for key in ("warmup_s", "seed") if (value := getattr(args, key)) is not None}
    encode = {key: value for key in ("encoder", "provider") if (value := getattr(args, key)) is not None}
    return dataclasses.replace(config, **given, encode=dataclasses.replace(config.encode, **encode))


def is_live(url: str) -> bool:
    """Tell a stream that sets its own pace from a recording or a simulation."""
    return url.startswith("lsl:") or "://" in url


def probe_of(args: argparse.Namespace) -> Probe | None:
    return None if args.probe is None else Probe.from_probeinterface(args.probe)


def warn_of_assumed_probe(sorter: Sorter) -> None:
    if sorter.info.probe is None:
        _log.warning("%s says nothing of its probe: a column of contacts 20 um apart is assumed; see --probe", sorter.info.name)


def manifest_of(sorter: Sorter, url: str) -> dict[str, Any]:
    """Say what runs, for the session's manifest."""
    encoder, info = sorter.encoder, sorter.info
    return {
        "command": ["streamsort", *sys.argv[1:]],
        "config": sorter.config.to_dict(),
        "model": {
            "name": encoder.name,
            "version": encoder.contract.version,
            "sha256": encoder.sha256,
            "path": str(encoder.path),
            "provider": encoder.provider,
            "choice": dataclasses.asdict(sorter.encoder_choice),
        },
        "stream": {"url": url, **_plain(info)},
        "margin_samples": sorter.margin_samples,
        "probe_assumed": info.probe is None,
    }


def _plain(info: StreamInfo) -> dict[str, Any]:
    gains = sorted(set(info.gain_uv.tolist()))
    return {
        "name": info.name,
        "sampling_frequency": info.sampling_frequency,
        "n_channels": info.n_channels,
        "dtype": info.dtype.name,
        "gain_uv": gains[0] if len(gains) == 1 else info.gain_uv.tolist(),
        "live": info.live,
    }
