"""``python -m infinitetalk``: the command line, which is in ``actors.cli``."""

import sys

from actors.cli import main

if __name__ == "__main__":
    sys.exit(main())
