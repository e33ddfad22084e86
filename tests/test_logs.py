"""Logs as JSON: every record says what it is about, so those of a job can be put together again."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.logs import JsonFormatter, log_about
from tests.conftest import ROOT


def said(**record: Any) -> dict[str, Any]:
    """A record as the formatter of GPU 3 writes it."""
    line = JsonFormatter(node="n1", gpu=3).format(logging.makeLogRecord(record))
    assert "\n" not in line
    found: dict[str, Any] = json.loads(line)
    return found


def test_a_record_has_its_own_fields_those_of_the_work_and_those_of_the_process() -> None:
    """What is said of the record itself goes before the rest; what is no JSON is written as text."""
    with log_about(job="talk", segment=1), log_about(segment=2):
        line = said(name="pipeline.x", levelname="WARNING", msg="%d lost", args=(7,), path=Path("/a"), gpu=4)
        with ThreadPoolExecutor(1) as thread:
            assert "job" not in thread.submit(said, msg="of another thread").result()
    assert (line["message"], line["level"], line["logger"]) == ("7 lost", "warning", "pipeline.x")
    assert (line["job"], line["segment"], line["gpu"], line["node"], line["path"]) == (
        "talk",
        2,
        4,
        "n1",
        "/a",
    )
    assert datetime.fromisoformat(line["time"]).utcoffset() is not None
    assert "job" not in said(msg="of no job")


def test_a_traceback_stays_on_its_line() -> None:
    """As a field of the record."""
    try:
        raise ValueError("wrong")
    except ValueError:
        line = said(msg="it failed", exc_info=sys.exc_info())
    assert line["error"].endswith("ValueError: wrong")


def test_one_job_can_be_followed_through_all_processes(
    portrait: Path, speech_of: Callable[[int], Path], tmp_path: Path
) -> None:
    """The command line and the renderer, each JSON lines, with the same job, the segment, GPU and node."""
    ray_folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets need a short path
    try:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "infinitetalk", "render", "-o", tmp_path / "talk.mp4"),
                *("--image", portrait, "--audio", speech_of(60), "--width", "96", "--height", "96"),
                *("--gpus", "1", "--job-dir", tmp_path / "job"),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "INFINITETALK_ENGINE": "draft",
                "INFINITETALK_LOG": "json",
                "INFINITETALK_SCRATCH_DIR": str(tmp_path),
                "RAY_TMPDIR": ray_folder,
            },
            capture_output=True,
            text=True,
            check=True,
        )
        driver = [json.loads(line) for line in done.stderr.splitlines()]
        logs = (Path(ray_folder) / "ray" / "session_latest" / "logs").resolve()
        lines = [line for file in logs.glob("worker-*.err") for line in file.read_text().splitlines()]
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
    others = [json.loads(line) for line in lines if line.startswith("{")]
    (job,) = {line["job"] for line in driver if "job" in line}
    (begun,) = (line for line in others if line["logger"] == "actors.renderer")
    assert (begun["job"], begun["segment"], begun["gpu"], begun["attempt"]) == (job, 0, 0, 1)
    finished = next(line for line in driver if line["message"] == "segment 0 processed successfully")
    assert (finished["job"], finished["segment"], finished["gpu"]) == (job, 0, 0)
    assert finished["node"] == begun["node"]
    timeline = json.loads((tmp_path / "job" / "timeline.json").read_text())
    assert {span["node"] for span in timeline["spans"] if "gpu" in span} == {begun["node"]}
