"""``infinitetalk seams``: the seams of a kept job, as a table and as a picture."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.errors import InvalidRequest
from pipeline.job import JobDirectory, finished
from pipeline.seam import SeamReport
from pipeline.seam_picture import draw_seams

COLUMNS = (
    "frame",
    "frames",
    "method",
    "verdict",
    "jump",
    "natural",
    "speed",
    "ghosting",
    "sharpness",
    "colour_step",
)


def add_command(commands: Any) -> None:
    """Declare the command to argparse."""
    command = commands.add_parser(
        "seams",
        help="show how the seams of a finished job look",
        description="The frames around each seam of a finished job, and how much each frame moves.",
    )
    command.set_defaults(run=run)
    command.add_argument("job", type=Path, metavar="JOB_DIR", help="what render's --job-dir was")
    command.add_argument("-o", "--output", type=Path, metavar="FILE.png", help="the picture to write")
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> int:
    """Print the report, draw the picture; raises ``PipelineError``."""
    result = _result(JobDirectory(options.job))
    seams = [_report(entry, options.job) for entry in result["seams"]]
    if options.output is not None:
        if options.output.suffix.lower() != ".png":
            raise InvalidRequest("output", f"{options.output}: the picture is a png; name it so")
        if not seams:
            raise InvalidRequest("job", f"{options.job} is one segment and has no seam to draw")
        video = Path(result["video_path"])
        if not video.is_file():
            raise InvalidRequest("job", f"its video {video} is not there any more")
        picture = draw_seams(video, seams, result.get("fps", 25))
        with finished(options.output) as partial:
            picture.save(partial, "PNG")
    if options.json:
        print(json.dumps([asdict(seam) for seam in seams]))
        return 0
    print("  ".join(f"{name:>11}" for name in COLUMNS))
    for seam in seams:
        print("  ".join(f"{getattr(seam, name):>11}" for name in COLUMNS))
    return 0


def _result(job: JobDirectory) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(job.result.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest("job", f"{job.path} holds no finished job") from error
    return result


def _report(entry: dict[str, Any], job: Path) -> SeamReport:
    try:
        return SeamReport(**entry)
    except TypeError as error:
        raise InvalidRequest("job", f"{job} was joined by another version of this program") from error
