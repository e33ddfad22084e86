"""Finished videos elsewhere: an S3-compatible server (rclone's), a network volume; and what is forgotten."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from pipeline.errors import StorageError
from pipeline.job_records import Job, NewJob
from pipeline.job_store import JobStore
from pipeline.result_delivery import deliver
from pipeline.result_upload import Bucket, upload
from pipeline.retention import clean_up
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


def test_a_signed_link_gives_the_video(s3: tuple[Bucket, Path], tmp_path: Path) -> None:
    """What was uploaded is there, and the link works without a key."""
    bucket, folder = s3
    video = tmp_path / "video.mp4"
    video.write_bytes(CONTENT)
    link = upload(video, "a/b.mp4", bucket)
    assert (folder / "a" / "b.mp4").read_bytes() == CONTENT
    assert requests.get(link, timeout=10).content == CONTENT
    assert not requests.get(link.partition("?")[0], timeout=10).ok


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
    assert requests.get(told["video_url"], timeout=10).content == CONTENT
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
