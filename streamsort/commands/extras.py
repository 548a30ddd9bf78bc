"""Whether an optional extra is installed, asked without importing it."""

import importlib.util

from streamsort.errors import StreamsortError

_TRAINING = ("torch", "onnx")


def require_training(command: str) -> None:
    """Refuse a command that trains where the extra `train` is missing.

    Raises
    ------
    StreamsortError
        If torch or onnx is not installed.
    """
    for name in _TRAINING:
        if importlib.util.find_spec(name) is None:
            raise StreamsortError(f"{command}: {name} is not installed, expected pip install 'streamsort[train]'")
