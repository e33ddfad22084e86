"""The command line ``infinitetalk``: which commands there are, and what errors mean for the exit code.

Exit codes: 0 done; 1 the job failed; 2 the request is wrong; 3 the machine or a setting is; 130 cancelled.
What a command does is in its own module (``command_*``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from actors import (
    command_batch,
    command_comfyui,
    command_doctor,
    command_models,
    command_pool,
    command_redo,
    command_render,
    command_seams,
    command_timeline,
)
from pipeline.errors import (
    ConfigurationError,
    InvalidRequest,
    JobCancelled,
    PipelineError,
    StorageError,
    WorkflowError,
)

EXIT_FAILED, EXIT_REQUEST, EXIT_SETUP, EXIT_CANCELLED = 1, 2, 3, 130
EXIT_CODES: dict[type[PipelineError], int] = {
    InvalidRequest: EXIT_REQUEST,
    ConfigurationError: EXIT_SETUP,
    StorageError: EXIT_SETUP,
    WorkflowError: EXIT_SETUP,
    JobCancelled: EXIT_CANCELLED,
    PipelineError: EXIT_FAILED,
}
COMMANDS = (
    command_render,
    command_batch,
    command_seams,
    command_timeline,
    command_redo,
    command_pool,
    command_doctor,
    command_models,
    command_comfyui,
)


def main(arguments: Sequence[str] | None = None, more: Sequence[Any] = ()) -> int:
    """Run the command line; the exit code.  ``more``: modules of further commands."""
    parser = argparse.ArgumentParser(
        prog="infinitetalk",
        description="Long talking videos from a picture and a speech, on every GPU at once.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (*COMMANDS, *more):
        command.add_command(commands)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except PipelineError as error:
        return _failed(error, options)
    return code


def _failed(error: PipelineError, options: argparse.Namespace) -> int:
    if getattr(options, "json", False):
        print(json.dumps({"success": False, "error": type(error).__name__, "message": str(error)}))
    print(f"infinitetalk: {error}", file=sys.stderr)
    return next(EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES)
