"""Encoders that can be trained; each family is one file, read top to bottom, and `moco.py` holds what trains any of them."""

import dataclasses
from typing import Any

from streamsort.errors import StreamsortError
from streamsort.train.networks.huidurep import Encoder, HuiduRepConfig
from streamsort.train.networks.light import LightConfig, LightEncoder

NetworkConfig = HuiduRepConfig | LightConfig
AnyEncoder = Encoder | LightEncoder

_FAMILIES: dict[str, type[HuiduRepConfig] | type[LightConfig]] = {"huidurep": HuiduRepConfig, "light": LightConfig}

PRESETS: dict[str, NetworkConfig] = {
    "full": HuiduRepConfig(),
    "small": HuiduRepConfig(n_layers=3, stride=2, decoder_layers=1),
    "light": LightConfig(),
}


def make_encoder(config: NetworkConfig) -> AnyEncoder:
    """Make the network of a config, with random weights."""
    return Encoder(config) if isinstance(config, HuiduRepConfig) else LightEncoder(config)


def to_table(config: NetworkConfig) -> dict[str, Any]:
    """Write a config as a table of plain values, its `family` first."""
    family = next(name for name, kind in _FAMILIES.items() if isinstance(config, kind))
    return {"family": family, **dataclasses.asdict(config)}


def from_table(table: dict[str, Any]) -> NetworkConfig:
    """Read what `to_table` wrote.

    Raises
    ------
    StreamsortError
        If the family or a key is unknown.
    """
    values = dict(table)
    family = values.pop("family", "huidurep")
    if family not in _FAMILIES:
        raise StreamsortError(f"network family {family!r}, expected one of {', '.join(_FAMILIES)}")
    known = {item.name for item in dataclasses.fields(_FAMILIES[family])}
    if unknown := set(values) - known:
        raise StreamsortError(f"network {family}: unknown key {sorted(unknown)[0]}, known: {', '.join(sorted(known))}")
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return _FAMILIES[family](**plain)
