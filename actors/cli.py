"""The command line: ``infinitetalk render``.  Arguments in, exit code out; no domain decisions.

Exit codes: 0 done; 1 the job failed; 2 the request is wrong; 3 the machine or a setting is; 130 cancelled.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from actors.driver import render
from actors.terminal import progress_display
from pipeline.errors import (
    ConfigurationError,
    InvalidRequest,
    JobCancelled,
    PipelineError,
    StorageError,
    WorkflowError,
)
from pipeline.request import DEFAULT_PROMPT, RenderRequest
from pipeline.settings import Settings

EXIT_FAILED, EXIT_REQUEST, EXIT_SETUP, EXIT_CANCELLED = 1, 2, 3, 130
EXIT_CODES: dict[type[PipelineError], int] = {
    InvalidRequest: EXIT_REQUEST,
    ConfigurationError: EXIT_SETUP,
    StorageError: EXIT_SETUP,
    WorkflowError: EXIT_SETUP,
    JobCancelled: EXIT_CANCELLED,
    PipelineError: EXIT_FAILED,
}

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    with progress_display(options.quiet) as on_progress:
        try:
            request = RenderRequest.checked(
                image=options.image,
                video=options.video,
                audio=options.audio,
                prompt=options.prompt,
                width=options.width,
                height=options.height,
                seed=options.seed,
                steps=options.steps,
                max_frames=options.max_frames,
                overlap_frames=options.overlap_frames,
                use_multi_gpu=not options.no_multi_gpu,
            )
            result = render(
                request,
                Settings.from_env(),
                options.output,
                gpus=options.gpus,
                job_dir=options.job_dir,
                on_progress=on_progress,
            ).as_dict()
        except PipelineError as error:
            return _failed(error, options)
        except KeyboardInterrupt:
            return _failed(JobCancelled("of this command"), options)
    if options.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['video_path']}: {result['frames']} frames, {result['duration']:.2f} s; "
            + result["message"]
        )
    return 0


def _failed(error: PipelineError, options: argparse.Namespace) -> int:
    if options.json:
        print(json.dumps({"success": False, "error": type(error).__name__, "message": str(error)}))
    print(f"infinitetalk: {error}", file=sys.stderr)
    if not isinstance(error, InvalidRequest | ConfigurationError):
        print(
            "infinitetalk: finished segments are kept; the same command goes on with what is missing",
            file=sys.stderr,
        )
    return next(EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES)


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="infinitetalk",
        description="Long talking videos from a picture and a speech, on every GPU at once.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("render", help="render one video", description="Render one video.")
    picture = command.add_argument_group("input")
    picture.add_argument("--image", type=Path, metavar="FILE", help="the portrait")
    picture.add_argument(
        "--video", type=Path, metavar="FILE", help="a video of the person, instead of --image"
    )
    picture.add_argument("--audio", type=Path, metavar="FILE", required=True, help="the speech")
    picture.add_argument(
        "--prompt", default=DEFAULT_PROMPT, help="what the model is told (default: %(default)r)"
    )
    output = command.add_argument_group("output")
    output.add_argument("-o", "--output", type=Path, metavar="FILE", required=True, help="the mp4 to write")
    output.add_argument("--width", type=int, metavar="PIXELS", help="rounded to a multiple of 16")
    output.add_argument(
        "--height", type=int, metavar="PIXELS", help="default: the picture's shape at about 832x480"
    )
    output.add_argument("--max-frames", type=int, metavar="N", help="at most N frames, 25 a second")
    output.add_argument("--seed", type=int, default=0, help="another seed, another take (default: 0)")
    output.add_argument("--steps", type=int, metavar="N", help="sampler steps (default: the workflow's)")
    machine = command.add_argument_group("machine")
    machine.add_argument("--gpus", type=int, metavar="N", help="use N GPUs (default: all; 2 draft renderers)")
    machine.add_argument("--no-multi-gpu", action="store_true", help="render on one GPU")
    machine.add_argument(
        "--overlap-frames", type=int, metavar="N", help="what neighbours share (default: chosen)"
    )
    machine.add_argument("--job-dir", type=Path, metavar="DIR", help="keep the job's files here")
    machine.add_argument("--json", action="store_true", help="print the result as JSON")
    machine.add_argument("--quiet", action="store_true", help="no progress, warnings only")
    return parser


if __name__ == "__main__":
    sys.exit(main())
