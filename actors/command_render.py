"""``infinitetalk render``: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from actors.driver import render
from actors.terminal import progress_display
from pipeline.errors import JobCancelled
from pipeline.request import DEFAULT_PROMPT, RenderRequest
from pipeline.settings import Settings

log = logging.getLogger(__name__)


def add_command(commands: Any) -> None:
    """Declare the command to argparse."""
    command = commands.add_parser("render", help="render one video", description="Render one video.")
    command.set_defaults(run=run)
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


def run(options: argparse.Namespace) -> int:
    """Render; raises ``PipelineError``, ``JobCancelled`` for Ctrl-C and SIGTERM."""
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
        except KeyboardInterrupt:
            raise JobCancelled("of this command") from None
    if options.json:
        print(json.dumps(result))
    else:
        length = f"{result['frames']} frames, {result['duration']:.2f} s"
        print(f"{result['video_path']}: {length}; {result['message']}")
    return 0


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
