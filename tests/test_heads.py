"""Several heads on one PostgreSQL and one data directory: what one drops, the other picks up."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
import sqlalchemy as sa

from pipeline.job_index import JobIndex
from pipeline.job_records import JOBS
from tests.service_process import Service, kill_all, running_service


def held(url: str, pids: list[int]) -> list[str]:
    """The jobs in progress whose runner is one of these processes."""
    engine = sa.create_engine(url)
    with engine.connect() as db:
        rows = db.execute(sa.select(JOBS.c.id, JOBS.c.runner).where(JOBS.c.state == "in_progress")).all()
    engine.dispose()
    return [row.id for row in rows if int(row.runner.split("-")[-2]) in pids]


@pytest.mark.long
def test_a_head_finishes_what_a_dead_one_has_begun(
    postgres: str,
    tmp_path: Path,
    speech_of: Callable[[int], Path],
    processes_with: Callable[[str], list[int]],
) -> None:
    """kill -9 of one of two services in the middle of a job: the other does all jobs, each once at a time."""
    first, second = uuid.uuid4().hex, uuid.uuid4().hex

    def start(mark: str) -> Service:
        settings = {
            "INFINITETALK_SERVE_DATABASE_URL": postgres,
            "INFINITETALK_DRAFT_ARGS": "--draft-window-seconds 0.4",
        }
        return stack.enter_context(running_service(tmp_path / "data", mark, tmp_path / mark, **settings))

    with ExitStack() as stack, ThreadPoolExecutor(2) as starters:
        dying, living = starters.map(start, (first, second))
        pids = processes_with(f"TEST_MARK={first}")
        jobs = [service.submit(320, speech_of) for service in (dying, living, dying, living)]

        def finished_windows(job: str) -> int:
            return len(
                list((tmp_path / "data" / "jobs" / job).glob("work/segments/*.windows/0*/segment.json"))
            )

        # Seen from either head: the job of the one, with a window done.
        living.until(jobs[0], lambda _: any(finished_windows(job) for job in held(postgres, pids)))
        begun = held(postgres, pids)
        kept = {job: finished_windows(job) for job in begun}
        assert kill_all(first)
        dying.process.wait()
        assert begun and any(kept.values())
        done = {job: living.until_over(job) for job in jobs}

    index = JobIndex(postgres)
    for job, found in done.items():
        assert (found["state"], found["result"]["frames"]) == ("completed", 320), found
        assert found["attempt"] == (2 if job in begun else 1)
        told = [event.data["state"] for event in index.events(job) if event.kind == "status"]
        assert told.count("in_progress") == found["attempt"]
        assert all(a == "queued" for a, b in pairwise(told) if b == "in_progress"), told
        left = found["detail"]["windows_total"] - kept.get(job, 0)
        assert found["result"]["nodes"]["KSampler"]["ran"] <= left, "a finished window was rendered again"
    index.close()
