"""The index of jobs: what survives, who gets which job, and that nothing runs twice."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import job_index, job_records
from pipeline.errors import JobConflict, JobNotFound, QueueFull
from pipeline.job_index import JobIndex
from pipeline.job_records import NewJob


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty index."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'index.sqlite'}"
    found: str = request.getfixturevalue("postgres")
    index = JobIndex(found)
    job_records.TABLES.drop_all(index._engine)
    index.close()
    return found


@pytest.fixture
def index(url: str) -> Iterator[JobIndex]:
    """An open index."""
    index = JobIndex(url)
    yield index
    index.close()


def new(**values: object) -> NewJob:
    return NewJob(**{"api": "v1", "owner": "me", "fields": {}, "sources": {}, "fingerprint": "f"} | values)  # type: ignore[arg-type]


def test_higher_priority_goes_first_then_age(index: JobIndex) -> None:
    """Jobs are claimed by priority, and among equals by age; each tells how many go before it."""
    first = index.add(new(), 10)[0]
    second = index.add(new(), 10)[0]
    urgent = index.add(new(priority=5), 10)[0]
    assert [index.standing(job.id).ahead for job in (first, second, urgent)] == [1, 2, 0]
    claimed = [index.claim("a") for _ in range(4)]
    assert [job and job.id for job in claimed] == [urgent.id, first.id, second.id, None]


def test_many_runners_never_get_the_same_job(url: str, index: JobIndex) -> None:
    """Runners that claim at the same time share the jobs without a double."""
    wanted = {index.add(new(), 100)[0].id for _ in range(20)}
    got: list[str] = []

    def run() -> None:
        own = JobIndex(url)
        while job := own.claim(threading.current_thread().name):
            got.append(job.id)
        own.close()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(wanted)


def test_an_idempotency_key_stands_for_one_request(index: JobIndex) -> None:
    """The same key gives the same job; with another request it is a conflict; owners do not share keys."""
    job, created = index.add(new(idempotency_key="k"), 10)
    assert created
    again, created = index.add(new(idempotency_key="k"), 10)
    assert (again.id, created) == (job.id, False)
    with pytest.raises(JobConflict):
        index.add(new(idempotency_key="k", fingerprint="other"), 10)
    assert index.add(new(idempotency_key="k", owner="you"), 10)[1]


def test_a_full_queue_takes_no_more(index: JobIndex) -> None:
    """The limit counts waiting jobs only."""
    index.add(new(), 2)
    index.add(new(), 2)
    with pytest.raises(QueueFull):
        index.add(new(), 2)
    index.claim("a")
    assert index.add(new(), 2)[1]


def test_a_job_whose_runner_died_is_queued_again(index: JobIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its lease, a job goes to another runner; the first one can't touch it any more."""
    job = index.add(new(), 10)[0]
    monkeypatch.setattr(job_index, "LEASE_SECONDS", -1.0)
    index.claim("dead")
    monkeypatch.undo()
    assert index.recover() == [job.id]
    taken = index.claim("alive")
    assert taken is not None
    assert (taken.id, taken.attempt) == (job.id, 2)
    assert not index.keep(job.id, "dead", progress=50.0)
    assert not index.finish(job.id, "dead", "completed", result={})
    assert index.keep(job.id, "alive", progress=10.0)
    assert index.recover() == []
    assert index.get(job.id).progress == 10.0


@pytest.mark.parametrize("started", [False, True])
def test_cancelling_ends_a_job_at_once(index: JobIndex, started: bool) -> None:
    """A cancelled job is over, and its runner learns it from the next renewal."""
    job = index.add(new(), 10)[0]
    if started:
        index.claim("a")
    assert index.cancel(job.id).state == "cancelled"
    assert not index.keep(job.id, "a")
    assert index.claim("a") is None
    assert [event.data["state"] for event in index.events(job.id)][-1] == "cancelled"


def test_a_finished_job_stays_as_it_is_when_cancelled(index: JobIndex) -> None:
    """Cancelling what is over changes nothing."""
    job = index.add(new(), 10)[0]
    index.claim("a")
    assert index.finish(job.id, "a", "completed", result={"frames": 1}, size=10)
    assert index.cancel(job.id).state == "completed"
    assert index.finished_sizes()[0][2] == 10


def test_only_what_failed_can_be_retried(index: JobIndex) -> None:
    """``again`` takes the states that its caller names, and no other."""
    job = index.add(new(), 10)[0]
    with pytest.raises(JobConflict):
        index.again(job.id, {"kind": "render"}, ["failed"])
    index.claim("a")
    index.finish(job.id, "a", "failed", error={"code": "x", "message": "y", "field": None})
    assert index.again(job.id, {"kind": "render"}, ["failed"]).error is None
    assert index.claim("a") is not None


def test_a_job_that_waits_too_long_fails(index: JobIndex) -> None:
    """Its time to live over, a job is neither claimed nor forgotten, but failed with a reason."""
    job = index.add(new(queue_seconds=-1.0), 10)[0]
    assert index.claim("a") is None
    assert index.expire() == [job.id]
    found = index.get(job.id)
    assert found.state == "failed"
    assert found.error is not None and found.error["code"] == "expired"


def test_a_job_in_progress_is_not_deleted(index: JobIndex) -> None:
    """Only what waits or is over can be forgotten; then it is gone with its events."""
    job = index.add(new(), 10)[0]
    index.claim("a")
    with pytest.raises(JobConflict):
        index.delete(job.id)
    index.cancel(job.id)
    index.delete(job.id)
    assert index.events(job.id) == []
    for use in (index.get, index.delete):
        with pytest.raises(JobNotFound):
            use(job.id)


def test_pages_of_jobs_miss_none(index: JobIndex) -> None:
    """Page by page, in both orders, every job of the owner comes once."""
    ids = [index.add(new(), 10)[0].id for _ in range(5)]
    index.add(new(owner="you"), 10)
    for oldest_first in (False, True):
        seen: list[str] = []
        while page := index.jobs(
            owner="me", limit=2, after=seen[-1] if seen else None, oldest_first=oldest_first
        ):
            seen += [job.id for job in page]
        assert seen == (ids if oldest_first else ids[::-1])


def test_each_piece_of_a_stream_is_given_once(index: JobIndex) -> None:
    """``take_stream`` drains; events stay for those who read them by number."""
    job = index.add(new(), 10)[0]
    index.tell(job.id, "progress", {"progress": 1})
    assert len(index.take_stream(job.id)) == 2
    assert index.take_stream(job.id) == []
    index.tell(job.id, "progress", {"progress": 2})
    assert [event.data for event in index.take_stream(job.id)] == [{"progress": 2}]
    assert len(index.events(job.id)) == 3


def test_a_job_is_on_disk_when_it_is_accepted(tmp_path: Path) -> None:
    """kill -9 right after ``add`` has returned loses nothing."""
    url = f"sqlite:///{tmp_path / 'index.sqlite'}"
    code = (
        "import os, signal; from pipeline.job_index import JobIndex, NewJob;"
        f"job, _ = JobIndex({url!r}).add(NewJob('v1', 'me', {{}}, {{}}, 'f', id='kept'), 5);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    assert done.returncode == -9
    assert JobIndex(url).get("kept").state == "queued"


def test_only_lost_runners_count(index: JobIndex) -> None:
    """An attempt is taken back by who puts the job back; a retry or a redo begins at none."""
    job = index.add(new(), 10)[0].id
    for counts, attempt in ((False, 1), (False, 1), (True, 1), (False, 2)):
        taken = index.claim("a")
        assert taken is not None
        assert taken.attempt == attempt
        index.requeue(job, "a", counts=counts)
    index.claim("a")
    index.finish(job, "a", "completed", result={"frames": 1}, size=10)
    index.again(job, {"kind": "redo", "segment": 0}, ["completed"])
    taken = index.claim("b")
    assert taken is not None
    assert (taken.attempt, taken.task) == (1, {"kind": "redo", "segment": 0, "again": True})


def test_a_redo_that_was_cancelled_too_late_is_told(index: JobIndex) -> None:
    """Its video is the new one, so its result is, too; a job that is not cancelled is let alone."""
    job = index.add(new(), 10)[0].id
    index.claim("a")
    index.correct(job, {"frames": 2})
    assert index.get(job).result is None
    index.finish(job, "a", "completed", result={"frames": 1})
    index.again(job, {"kind": "redo", "segment": 0}, ["completed"])
    index.claim("b")
    index.cancel(job)
    assert not index.finish(job, "b", "completed", result={"frames": 2})
    index.correct(job, {"frames": 2})
    assert (index.get(job).state, index.get(job).result) == ("cancelled", {"frames": 2})
