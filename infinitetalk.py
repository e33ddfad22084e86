"""``infinitetalk``, and ``python -m infinitetalk``: the command line of ``actors.cli``, and ``serve``.

Only ``serve`` needs the web framework, so it is loaded when it is asked for.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from actors import cli


def add_command(commands: Any) -> None:
    """Declare ``serve`` to argparse."""
    command = commands.add_parser("serve", help="the HTTP service", description="Run the HTTP service.")
    command.set_defaults(run=run)
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    command.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    command.add_argument("--gpus", type=int, metavar="N", help="use N GPUs (default: all; 2 draft renderers)")


def run(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    from serve_app import serve_until_stopped

    return serve_until_stopped(options.host, options.port, options.gpus)


def main() -> int:
    """The command line; the exit code."""
    return cli.main(more=(sys.modules[__name__],))


if __name__ == "__main__":
    sys.exit(main())
