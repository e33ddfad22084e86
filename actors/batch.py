"""``python -m actors.batch MANIFEST --out DIR``: ``infinitetalk batch`` as a module (``ray job submit``)."""

from __future__ import annotations

import sys

from actors import cli

if __name__ == "__main__":
    sys.exit(cli.main(["batch", *sys.argv[1:]]))
