"""``infinitetalk redo``: one side of a seam, or one segment, of a kept job again with another seed."""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path
from typing import Any, get_args

from actors.command_render import interrupt
from actors.driver import redo_part
from actors.terminal import progress_display
from pipeline.errors import JobCancelled
from pipeline.redo import Side
from pipeline.settings import Settings

COLUMNS = ("verdict", "jump", "natural", "speed", "ghosting", "sharpness", "colour_step")


def add_command(commands: Any) -> None:
    """Declare the command to argparse."""
    command = commands.add_parser(
        "redo",
        help="render one side of a seam again, and keep the better take",
        description="Render a segment of a finished job again with another seed, and join the video anew.",
    )
    command.set_defaults(run=run)
    command.add_argument("job", type=Path, metavar="JOB_DIR", help="what render's --job-dir was")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--seam", type=int, metavar="K", help="the better take stays; 0 is the first seam")
    which.add_argument("--segment", type=int, metavar="K", help="the new take stays; 0 is the first segment")
    command.add_argument(
        "--side",
        choices=get_args(Side),
        help="of the seam (default: later, or earlier where that has another bad seam)",
    )
    command.add_argument("--seed", type=int, metavar="N", help="default: one that was not tried yet")
    command.add_argument("--json", action="store_true", help="print the outcome as JSON")
    command.add_argument("--quiet", action="store_true", help="no progress, warnings only")


def run(options: argparse.Namespace) -> int:
    """Render again and say what stayed; raises ``PipelineError``."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    with progress_display(options.quiet) as on_progress:
        try:
            done = redo_part(
                options.job,
                Settings.from_env(),
                seam=options.seam,
                side=options.side,
                segment=options.segment,
                seed=options.seed,
                on_progress=on_progress,
            )
        except KeyboardInterrupt:
            raise JobCancelled("that was asked for") from None
    if options.json:
        print(json.dumps(done.as_dict()))
        return 0
    before, after = done.excess
    print(f"segment {done.segment}, seed {done.seed}: the {done.kept} take is kept")
    print(f"measures over their limits, summed over its seams: {before:.2f} before, {after:.2f} with the new")
    print("  ".join(f"{name:>11}" for name in ("seam", "take", *COLUMNS)))
    for change in done.changes:
        for take, report in (("old", change.before), ("new", change.after)):
            row = (change.seam, take, *(getattr(report, name) for name in COLUMNS))
            print("  ".join(f"{value:>11}" for value in row))
    return 0
