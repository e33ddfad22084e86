"""``infinitetalk timeline``: what every GPU did for one job or for many: numbers, a picture, a trace."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pipeline.errors import InvalidRequest
from pipeline.job import JobDirectory, finished
from pipeline.job_timeline import JobTimeline, chrome_trace, numbers
from pipeline.timeline_picture import draw_timeline
from pipeline.timeline_recorder import stored_timeline

FORMATS = "x.png and x.svg are pictures, x.trace.json loads in Perfetto, x.json is the timeline itself"


def add_command(commands: Any) -> None:
    """Declare the command to argparse."""
    command = commands.add_parser(
        "timeline",
        help="show what every GPU did for a job, and when",
        description="What every GPU did for a job, or for several that shared GPUs.  " + FORMATS + ".",
    )
    command.set_defaults(run=run)
    command.add_argument(
        "jobs", type=Path, nargs="+", metavar="JOB_DIR", help="job directories, or their timeline.json"
    )
    command.add_argument("-o", "--output", type=Path, metavar="FILE", help="what to write, by its suffix")
    command.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(options: argparse.Namespace) -> int:
    """Print the numbers, write the file; raises ``PipelineError``."""
    jobs = [_timeline(path) for path in options.jobs]
    if not any(job.spans for job in jobs):
        raise InvalidRequest("job", "nothing was recorded of it")
    if options.output is not None:
        content = _content(jobs, options.output)
        with finished(options.output) as partial:
            if isinstance(content, str):
                partial.write_text(content)
            else:
                content.save(partial, "PNG")
    found = {"jobs": len(jobs), **numbers(jobs)}
    if options.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name:>18}  {value:g}" for name, value in found.items()))
    return 0


def _timeline(path: Path) -> JobTimeline:
    """Of a job directory, or of a file that was copied out of one."""
    if not path.is_file():
        return stored_timeline(JobDirectory(path))
    try:
        return JobTimeline.from_json(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise InvalidRequest("job", f"{path} can't be read: {error}") from error


def _content(jobs: list[JobTimeline], output: Path) -> Any:
    """A string, or an image."""
    if output.name.lower().endswith("trace.json"):
        return json.dumps(chrome_trace(jobs))
    match output.suffix.lower():
        case ".png":
            return draw_timeline(jobs).image()
        case ".svg":
            return draw_timeline(jobs).svg()
        case ".json":
            told = [job.to_json() for job in jobs]
            return json.dumps(told[0] if len(told) == 1 else {"jobs": told, "numbers": numbers(jobs)}) + "\n"
    raise InvalidRequest("output", f"{output}: {FORMATS}; name it so")
