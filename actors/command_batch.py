"""``infinitetalk batch``, and ``python -m actors.batch``: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.batch_runner import BatchRunner, BatchState
from actors.batch_terminal import batch_display
from actors.cluster import check_gpus
from actors.command_render import interrupt
from actors.driver import choose_workflow
from actors.terminal import logging_on
from pipeline.batch_folder import BatchFolder, Results
from pipeline.batch_manifest import Problem, read_manifest
from pipeline.errors import ConfigurationError, InvalidRequest, JobCancelled
from pipeline.job import storage_errors
from pipeline.remote_files import s3_place
from pipeline.request import RenderRequest
from pipeline.settings import Settings

EXIT_SOME_FAILED, EXIT_MANIFEST = 1, 2


def add_command(commands: Any) -> None:
    """Declare the command to argparse."""
    command = commands.add_parser(
        "batch",
        help="render many videos",
        description="Render every line of a manifest (JSON lines or CSV) that is not done yet.",
    )
    command.set_defaults(run=run)
    command.add_argument("manifest", type=Path, metavar="MANIFEST", help="a job on each line: docs/batch.md")
    command.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder of the videos and results.jsonl, or s3://bucket/prefix",
    )
    command.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="with s3://: jobs in work (default: in the scratch folder)",
    )
    command.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="use N GPUs; on a cluster that is joined, N for each job at a time",
    )
    command.add_argument("--json", action="store_true", help="print the outcome as JSON")
    command.add_argument("--quiet", action="store_true", help="no progress, warnings only")


def run(options: argparse.Namespace) -> int:
    """Render what is not done; 0, or 1 where a job failed, 2 for a wrong manifest.

    Raises ``PipelineError``, ``JobCancelled`` for Ctrl-C and SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    console = Console(stderr=True)
    try:
        with logging_on(console, logging.WARNING, plain=options.quiet), _each_warning_once():
            logging.getLogger("batch").setLevel(logging.WARNING if options.quiet else logging.INFO)
            settings = _settings()
            check_gpus(options.gpus)

            def check(request: RenderRequest) -> None:
                choose_workflow(request, settings)

            jobs, problems = read_manifest(options.manifest, check)
            if problems:
                return _refused(options, problems)
            folder = _folder(options, settings)
            with folder.locked():
                runner = BatchRunner(jobs, folder, Results(folder), settings)
                with batch_display(console, runner.state, quiet=options.quiet) as on_news:
                    runner.run(options.gpus, on_news)
    except KeyboardInterrupt:
        raise JobCancelled("batch") from None
    return _told(options, folder, runner.state())


def _in_ray_job() -> bool:
    """Whether `ray job submit` started this process: Ray sets this variable, and RAY_ADDRESS, for it."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _settings() -> Settings:
    """The operator's; a job of a Ray cluster renders on that cluster unless they say otherwise."""
    settings = Settings.from_env()
    if _in_ray_job() and "ray_address" not in settings.model_fields_set:
        return settings.model_copy(update={"ray_address": os.environ["RAY_ADDRESS"]})
    return settings


def _folder(options: argparse.Namespace, settings: Settings) -> BatchFolder:
    """Where the batch lives.  Raises ``InvalidRequest``."""
    out: str = options.out
    if "://" not in out:
        if options.work_dir is not None:
            raise InvalidRequest("work-dir", "only together with --out s3://...")
        if _in_ray_job() and not Path(out).is_absolute():
            raise InvalidRequest(
                "out",
                f"{out} would lie in the folder that Ray made for this job and deletes; "
                "give an absolute path or s3://bucket/prefix",
            )
        return BatchFolder(Path(out).resolve())
    try:
        s3_place(out)
    except ValueError as error:
        raise InvalidRequest("out", f"{error}; results go to a folder or to s3://bucket/prefix") from None
    if options.work_dir is not None:
        return BatchFolder(options.work_dir.resolve(), out.rstrip("/"))
    return BatchFolder(_own_folder(settings) / hashlib.sha256(out.encode()).hexdigest()[:12], out.rstrip("/"))


def _own_folder(settings: Settings) -> Path:
    """Of this user's batches in the scratch folder, where others can make folders too.

    Raises ``ConfigurationError`` where it is not this user's alone, ``StorageError``.
    """
    folder = settings.scratch.resolve() / f"infinitetalk-batches-{os.getuid()}"
    with storage_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigurationError(f"{folder} is no folder of this user's alone; remove it, or give --work-dir")
    return folder


def _refused(options: argparse.Namespace, problems: list[Problem]) -> int:
    """Tell all that is wrong with the manifest."""
    plural = "thing is" if len(problems) == 1 else "things are"
    message = f"{options.manifest}: {len(problems)} {plural} wrong, and nothing was started"
    if options.json:
        told = [asdict(problem) for problem in problems]
        print(
            json.dumps({"success": False, "error": "InvalidManifest", "message": message, "problems": told})
        )
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"infinitetalk: {message}", file=sys.stderr)
    return EXIT_MANIFEST


def _told(options: argparse.Namespace, folder: BatchFolder, state: BatchState) -> int:
    """Tell what became of the jobs; the exit code."""
    results = str(folder.results) if folder.address is None else f"{folder.address}/{folder.results.name}"
    if options.json:
        print(
            json.dumps(
                {
                    "success": not state.failed,
                    "jobs": state.jobs,
                    "done_before": state.before,
                    "done": state.done,
                    "failed": state.failed,
                    "seconds": round(state.elapsed, 3),
                    "gpus": state.gpus,
                    "gpu_seconds": round(state.gpu_seconds, 3),
                    "gpu_busy": None if state.gpu_busy is None else round(state.gpu_busy, 4),
                    "results": results,
                }
            )
        )
    else:
        busy = "" if state.gpu_busy is None else f"; {state.gpus} GPUs busy {state.gpu_busy:.0%} of the time"
        print(f"{state.done} done, {state.failed} failed, {state.before} done before{busy}: {results}")
    return EXIT_SOME_FAILED if state.failed else 0


@contextmanager
def _each_warning_once() -> Iterator[None]:
    """What is said of every job alike (the draft engine, a setting) is said once."""
    said: set[str] = set()

    def new(record: logging.LogRecord) -> bool:
        words = record.getMessage()
        if record.levelno != logging.WARNING or hasattr(record, "job"):
            return True
        known = words in said
        said.add(words)
        return not known

    handlers = list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(new)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(new)
