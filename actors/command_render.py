"""``infinitetalk render``: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, get_args

from actors.driver import render
from actors.terminal import progress_display
from pipeline.errors import JobCancelled
from pipeline.request import (
    DEFAULT_PROMPT,
    Aspect,
    AudioOrder,
    Continuity,
    Family,
    Preset,
    RenderRequest,
    SeamMethod,
    SizeName,
    Vocals,
)
from pipeline.settings import Settings
from pipeline.timeline import FPS

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
    picture.add_argument("--negative-prompt", default="", metavar="TEXT", help="not read at cfg 1")
    second = command.add_argument_group("second speaker")
    second.add_argument("--audio-2", type=Path, metavar="FILE", help="the speech of a second person")
    second.add_argument(
        "--audio-order",
        choices=get_args(AudioOrder),
        help="both start at once (default), or one after the other",
    )
    for number in (1, 2):
        second.add_argument(
            f"--mask-{number}", type=Path, metavar="FILE", help=f"a picture, white where speaker {number} is"
        )
        second.add_argument(
            f"--box-{number}",
            type=_box,
            metavar="X0,Y0,X1,Y1",
            help=f"or speaker {number} as a box in pixels (default: {('left', 'right')[number - 1]} half)",
        )
    picture.add_argument(
        "--vocals",
        choices=get_args(Vocals),
        default="mixed",
        help="separate: the model hears the voice without the music (INFINITETALK_VOCAL_SEPARATOR)",
    )
    output = command.add_argument_group("output")
    output.add_argument("-o", "--output", type=Path, metavar="FILE", required=True, help="the mp4 to write")
    output.add_argument("--size", choices=get_args(SizeName), help="so many pixels (default: 480p)")
    output.add_argument("--aspect", choices=get_args(Aspect), help="default: the picture's shape")
    output.add_argument("--width", type=int, metavar="PIXELS", help="rounded to a multiple of 16")
    output.add_argument(
        "--height", type=int, metavar="PIXELS", help="default: the picture's shape at about 832x480"
    )
    output.add_argument("--max-frames", type=int, metavar="N", help="at most N frames, 25 a second")
    output.add_argument("--audio-start", type=float, metavar="SECONDS", default=0, help="begin there")
    output.add_argument("--audio-end", type=float, metavar="SECONDS", help="and end there (default: its end)")
    output.add_argument(
        "--fps", type=int, metavar="N", default=FPS, help="by repeating or leaving out frames (default: 25)"
    )
    output.add_argument(
        "--seam", choices=get_args(SeamMethod), default="morph", help="how segments are joined"
    )
    output.add_argument(
        "--color-match",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take out what colours drift from the picture (default: yes)",
    )
    output.add_argument("--seed", type=int, default=0, help="another seed, another take (default: 0)")
    model = command.add_argument_group("model")
    model.add_argument(
        "--preset",
        choices=get_args(Preset),
        default="fast",
        help="6 or 8 sampler steps (default: %(default)s)",
    )
    model.add_argument("--steps", type=int, metavar="N", help="another number of steps")
    model.add_argument(
        "--shift", type=float, metavar="X", help="of the noise schedule (default: 8; wrapper: 11)"
    )
    model.add_argument(
        "--audio-scale", type=float, metavar="X", help="how much the speech moves the face (default: 1)"
    )
    model.add_argument("--lora", metavar="FILE", help="another few-step LoRA of ComfyUI's loras folder")
    model.add_argument("--lora-strength", type=float, metavar="X", help="(default: 1)")
    model.add_argument(
        "--workflow-family",
        choices=get_args(Family),
        default="native",
        help="ComfyUI's own nodes, or ComfyUI-WanVideoWrapper's (default: %(default)s)",
    )
    model.add_argument(
        "--force-offload",
        action=argparse.BooleanOptionalAction,
        help="wrapper family only: the model leaves the GPU after a segment (default: by its memory)",
    )
    machine = command.add_argument_group("machine")
    machine.add_argument("--gpus", type=int, metavar="N", help="use N GPUs (default: all; 2 draft renderers)")
    machine.add_argument("--no-multi-gpu", action="store_true", help="render on one GPU")
    machine.add_argument(
        "--overlap-frames", type=int, metavar="N", help="what neighbours share (default: chosen)"
    )
    machine.add_argument(
        "--continuity",
        choices=get_args(Continuity),
        default="segments",
        help="exact: one chain of windows without a seam, on one GPU (default: %(default)s)",
    )
    machine.add_argument(
        "--max-chain-seconds", type=float, metavar="SECONDS", help="with exact: the fewest chains so long"
    )
    machine.add_argument("--job-dir", type=Path, metavar="DIR", help="keep the job's files here")
    machine.add_argument("--json", action="store_true", help="print the result as JSON")
    machine.add_argument("--quiet", action="store_true", help="no progress, warnings only")


def run(options: argparse.Namespace) -> int:
    """Render; raises ``PipelineError``, ``JobCancelled`` for Ctrl-C and SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    with progress_display(options.quiet) as on_progress:
        try:
            request = RenderRequest.checked(
                image=options.image,
                video=options.video,
                audio=options.audio,
                audio_2=options.audio_2,
                audio_order=options.audio_order,
                mask_1=options.mask_1,
                mask_2=options.mask_2,
                box_1=options.box_1,
                box_2=options.box_2,
                prompt=options.prompt,
                negative_prompt=options.negative_prompt,
                size=options.size,
                aspect=options.aspect,
                width=options.width,
                height=options.height,
                seed=options.seed,
                preset=options.preset,
                steps=options.steps,
                shift=options.shift,
                audio_scale=options.audio_scale,
                lora=options.lora,
                lora_strength=options.lora_strength,
                workflow_family=options.workflow_family,
                force_offload=options.force_offload,
                max_frames=options.max_frames,
                audio_start=options.audio_start,
                audio_end=options.audio_end,
                vocals=options.vocals,
                fps=options.fps,
                overlap_frames=options.overlap_frames,
                seam=options.seam,
                color_match=options.color_match,
                use_multi_gpu=not options.no_multi_gpu,
                continuity=options.continuity,
                max_chain_seconds=options.max_chain_seconds,
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
            raise JobCancelled("that was asked for") from None
    if options.json:
        print(json.dumps(result))
    else:
        length = f"{result['frames']} frames, {result['duration']:.2f} s"
        print(f"{result['video_path']}: {length}; {result['message']}")
    return 0


def _box(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.strip("[]").split(","))


def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    """Cancel, once: stopping the engines takes some seconds, and a second signal would leave it half done."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    log.warning("cancelling: the engines are being stopped")
    raise KeyboardInterrupt
