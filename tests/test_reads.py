"""Reads of jobs for many requests at once, from a file and from a server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pipeline.errors import JobNotFound
from pipeline.job_index import JobIndex
from pipeline.job_records import NewJob, Standing
from service.reads import JobReads


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_each_request_gets_its_own_job(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Many ask at once for some jobs and for one that is none; what was written before is seen."""
    in_a_file = f"sqlite:///{tmp_path / 'index.sqlite'}"
    url: str = in_a_file if kind == "sqlite" else request.getfixturevalue("postgres")
    index = JobIndex(url)
    jobs = [index.add(NewJob("v1", "me", {}, {}, "f"), 10)[0].id for _ in range(4)]

    async def ask() -> None:
        reads = JobReads(url)
        asked = [*jobs * 5, "nobody"]
        found = await asyncio.gather(*(reads.standing(job) for job in asked), return_exceptions=True)
        assert isinstance(found.pop(), JobNotFound)
        told = [(seen.job.id, seen.ahead) for seen in found if isinstance(seen, Standing)]
        assert told == [(job, place) for place, job in enumerate(jobs)] * 5
        index.cancel(jobs[0])
        first, second = await asyncio.gather(*(reads.standing(job) for job in jobs[:2]))
        assert (first.job.state, first.ahead, second.ahead) == ("cancelled", None, 0)
        reads.close()

    asyncio.run(ask())
    index.close()
