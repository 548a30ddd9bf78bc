"""`python -m streamsort`: the same as the command `streamsort`."""

import sys

from streamsort.cli import main

if __name__ == "__main__":
    sys.exit(main())
