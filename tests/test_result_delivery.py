"""Finished videos elsewhere: an S3-compatible server (rclone's), a network volume; and what is forgotten."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from pipeline.errors import StorageError
from pipeline.job_records import Job, NewJob
from pipeline.job_store import JobStore
from pipeline.result_delivery import deliver
from pipeline.result_upload import Bucket, upload
from pipeline.retention import clean_up
from pipeline.runpod_words import output
from pipeline.service_settings import ServiceSettings
from tests.s3_server import KEY, SECRET, running_s3

CONTENT = os.urandom(300_000)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bucket, Path]]:
    """A bucket ``videos`` on a server of our own, and the folder behind it."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "videos").mkdir()
    with running_s3(folder) as endpoint:
        yield Bucket("videos", endpoint, KEY, SECRET), folder / "videos"


def completed(store: JobStore, **extra: object) -> Job:
    job = store.index.add(NewJob("v1", "me", {}, {}, "f", extra=dict(extra)), 10)[0]
    store.video(job.id).parent.mkdir(parents=True)
    store.video(job.id).write_bytes(CONTENT)
    store.index.claim("r")
    store.index.finish(job.id, "r", "completed", result={"frames": 1}, size=store.size(job.id))
    return store.index.get(job.id)


def submitted(store: JobStore) -> str:
    """A job that waits, with an upload."""
    upload = store.incoming / "upload"
    upload.write_bytes(CONTENT)
    return store.submit(NewJob("v1", "me", {}, {}, "f"), {"audio": upload})[0].id


def test_a_signed_link_gives_the_video(s3: tuple[Bucket, Path], tmp_path: Path) -> None:
    """What was uploaded is there, and the link works without a key."""
    bucket, folder = s3
    video = tmp_path / "video.mp4"
    video.write_bytes(CONTENT)
    link = upload(video, "a/b.mp4", bucket)
    assert (folder / "a" / "b.mp4").read_bytes() == CONTENT
    assert requests.get(link, timeout=120).content == CONTENT
    assert not requests.get(link.partition("?")[0], timeout=120).ok


def test_a_wrong_key_costs_nobody_the_video(s3: tuple[Bucket, Path], tmp_path: Path) -> None:
    """An upload that fails is an error with the server's words; the job says so and is whole."""
    bucket, _ = s3
    wrong = Bucket(bucket.name, bucket.endpoint, "key", "wrong-secret")
    store = JobStore(ServiceSettings(data_dir=tmp_path))
    job = completed(
        store, s3={"name": "videos", "endpoint": bucket.endpoint, "access_key": "key", "secret_key": "no"}
    )
    with pytest.raises(StorageError, match="s3://videos"):
        upload(store.video(job.id), "x.mp4", wrong)
    assert "s3://videos" in deliver(store, job)["delivery_error"]
    assert store.video(job.id).read_bytes() == CONTENT


def test_a_job_is_delivered_to_its_own_bucket_and_volume(s3: tuple[Bucket, Path], tmp_path: Path) -> None:
    """The client's bucket and the network volume both get it; the client's secret is forgotten then."""
    bucket, folder = s3
    store = JobStore(ServiceSettings(data_dir=tmp_path / "data"))
    (tmp_path / "volume").mkdir()
    given = {"name": "videos", "endpoint": bucket.endpoint, "access_key": "key", "secret_key": "secret"}
    job = completed(store, s3=given, volume=str(tmp_path / "volume"))
    told = deliver(store, job)
    assert Path(told["volume_path"]).read_bytes() == CONTENT
    assert (folder / f"{job.id}.mp4").read_bytes() == CONTENT
    assert requests.get(told["video_url"], timeout=120).content == CONTENT
    assert "s3" not in store.index.get(job.id).extra


def test_the_oldest_finished_jobs_are_forgotten_first(tmp_path: Path) -> None:
    """Beyond the bytes that may be kept, the oldest go; what runs or waits stays, whatever its age."""
    store = JobStore(ServiceSettings(data_dir=tmp_path, keep_bytes=2 * len(CONTENT)))
    jobs = [completed(store).id for _ in range(4)]
    running = store.index.add(NewJob("v1", "me", {}, {}, "f"), 10)[0].id
    store.job(running).mkdir()
    store.index.claim("r")
    assert clean_up(store) == jobs[:2]
    assert [store.job(job).exists() for job in (*jobs, running)] == [False, False, True, True, True]
    assert clean_up(store) == []
    store.index.close()


def test_old_jobs_and_lost_uploads_are_forgotten(tmp_path: Path) -> None:
    """By age: jobs after ``keep_days``, uploads that nobody claimed after a day."""
    store = JobStore(ServiceSettings(data_dir=tmp_path, keep_days=1e-9))
    job = completed(store).id
    lost, fresh = store.incoming / "lost", store.incoming / "fresh"
    for path in (lost, fresh):
        path.write_bytes(b"x")
    os.utime(lost, (0, 0))
    assert clean_up(store) == [job]
    assert (lost.exists(), fresh.exists()) == (False, True)
    store.index.close()


def test_runpods_answer_says_where_the_video_went(s3: tuple[Bucket, Path], tmp_path: Path) -> None:
    """A link in the place of base64; with a bucket that refuses, the video itself and the bucket's words."""
    bucket, _ = s3
    store = JobStore(ServiceSettings(data_dir=tmp_path))
    good = {"name": "videos", "endpoint": bucket.endpoint, "access_key": KEY, "secret_key": SECRET}
    told = {"success": True, "gpu_count": 1, "segments_processed": 1, "message": "made"}
    for given, names in ((good, {"video_url"}), (good | {"secret_key": "no"}, {"video", "delivery_error"})):
        job = completed(store, s3=given)
        answer = output(replace(job, result=told | deliver(store, job)), store)
        assert set(answer) == set(told) | names
        if "video" in names:
            assert base64.b64decode(answer["video"]) == CONTENT
            assert "s3://videos" in answer["delivery_error"]
        else:
            assert requests.get(answer["video_url"], timeout=120).content == CONTENT
    store.index.close()


def test_jobs_that_came_to_nothing_are_weighed_too(tmp_path: Path) -> None:
    """What was uploaded for a job that was cancelled while it waited counts, and a failed one's files."""
    store = JobStore(ServiceSettings(data_dir=tmp_path, keep_bytes=len(CONTENT)))
    jobs = [submitted(store) for _ in range(3)]
    for job in jobs[:2]:
        store.index.cancel(job)
    assert store.index.finished_bytes() == 0
    assert clean_up(store) == jobs[:1]
    assert store.index.finished_bytes() == len(CONTENT)
    store.index.claim("r")
    store.index.finish(jobs[2], "r", "failed", error={"code": "x"}, size=store.size(jobs[2]))
    assert clean_up(store) == jobs[1:2]
    store.index.again(jobs[2], {"kind": "render"}, ["failed"])
    store.index.cancel(jobs[2])
    store.let_go(jobs[2])
    assert store.index.finished_bytes() == len(CONTENT)
    store.index.close()


def test_what_is_written_after_a_deletion_goes_too(tmp_path: Path) -> None:
    """By who lets go of the job; where that one was killed, an hour later; never another index's jobs."""
    store = JobStore(ServiceSettings(data_dir=tmp_path))
    jobs = [submitted(store) for _ in range(3)]
    for job in jobs[:2]:
        store.delete(job)
        store.index.tell(job, "log", {"message": "late"})
        assert store.index.events(job) == []
        store.work(job).mkdir(parents=True)
        (store.work(job) / "timeline.json").write_text("{}")
    store.let_go(jobs[0])
    store.let_go(jobs[2])
    assert [store.job(job).exists() for job in jobs] == [False, True, True]
    clean_up(store)
    assert store.job(jobs[1]).exists()
    os.utime(store.job(jobs[1]), (0, 0))
    os.utime(store.job(jobs[2]), (0, 0))
    clean_up(store)
    assert [store.job(job).exists() for job in jobs] == [False, False, True]
    store.index.close()
    other = JobStore(ServiceSettings(data_dir=tmp_path, database_url=f"sqlite:///{tmp_path}/other"))
    clean_up(other)
    assert store.job(jobs[2]).exists()
    other.index.close()
