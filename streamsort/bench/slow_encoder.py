"""`streamsort run` with an encoder that takes longer while it is told to.

Started with `python -m streamsort.bench.slow_encoder OUT run ...`; each line on stdin is the further time of each call from then
on, as `{"slow_ms": 20}`. When the calls that were slowed began, on the host's clock, is written to OUT at the end.
"""

import json
import sys
import threading
import time
from typing import Any

import numpy as np

from streamsort.cli import main as streamsort
from streamsort.encode import Encoder


def main() -> int:
    """Slow the encoder of this process down, and run the sorter."""
    out, *arguments = sys.argv[1:]
    embed, slow_ms, slowed_at = Encoder.__call__, 0.0, []

    def obey() -> None:
        nonlocal slow_ms
        for line in sys.stdin:
            slow_ms = json.loads(line)["slow_ms"]

    def embed_slowly(encoder: Encoder, *inputs: Any) -> Any:
        if slow_ms:
            slowed_at.append(time.monotonic())
            time.sleep(slow_ms / 1e3)
        return embed(encoder, *inputs)

    Encoder.__call__ = embed_slowly  # type: ignore[method-assign,assignment]
    threading.Thread(target=obey, daemon=True).start()
    code = streamsort(arguments)
    np.save(out, np.array(slowed_at))
    return code


if __name__ == "__main__":
    sys.exit(main())
