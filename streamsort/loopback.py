"""Lab Streaming Layer kept to this machine and to ourselves, for the demo and the doctor.

liblsl reads its configuration once, when it is first used; so this must come before. Child processes inherit it.
"""

import os
import sys
import uuid
from pathlib import Path

from streamsort.errors import StreamsortError


def keep_lsl_private(folder: str | Path) -> None:
    """Write a configuration into `folder` by which neither a lab's streams nor another run's are seen, and put it in force.

    Raises
    ------
    StreamsortError
        If pylsl is already in use in this process.
    """
    if "pylsl" in sys.modules:
        raise StreamsortError("lsl: already in use in this process, expected a fresh one")
    path = Path(folder) / "lsl_api.cfg"
    path.write_text(f"[log]\nlevel = -3\n[multicast]\nResolveScope = machine\n[lab]\nSessionID = {uuid.uuid4().hex}\n")
    os.environ["LSLAPICFG"] = str(path)
