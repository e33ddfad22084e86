"""Our own API, ``/v1/jobs``: create, look, cancel, delete, fetch the video."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel

from pipeline.job_index import Job, JobState
from pipeline.job_store import JobStore

router = APIRouter(prefix="/v1")


def store_of(request: Request) -> JobStore:
    """The store of this process."""
    store: JobStore = request.app.state.store
    return store


Store = Annotated[JobStore, Depends(store_of)]


class JobView(BaseModel):
    """A job as clients see it.  Times are seconds since 1970."""

    id: str
    state: JobState
    stage: str
    progress: float
    eta_seconds: float | None
    position: int | None
    """Queued jobs before this one."""
    created: float
    started: float | None
    finished: float | None
    attempt: int
    detail: dict[str, Any]
    error: dict[str, Any] | None
    result: dict[str, Any] | None


def view(job: Job, store: JobStore) -> JobView:
    """The job for a client."""
    return JobView(
        id=job.id,
        state=job.state,
        stage=job.stage,
        progress=job.progress,
        eta_seconds=job.eta_seconds,
        position=store.index.ahead(job) if job.state == "queued" else None,
        created=job.created,
        started=job.started,
        finished=job.finished,
        attempt=job.attempt,
        detail=job.detail,
        error=job.error,
        result=job.result,
    )


@router.get("/jobs/{job}")
def read(job: str, store: Store) -> JobView:
    """How a job is."""
    return view(store.index.get(job), store)


@router.post("/jobs/{job}/cancel")
def cancel(job: str, store: Store) -> JobView:
    """End a job; one that is over stays as it is."""
    return view(store.index.cancel(job), store)


@router.delete("/jobs/{job}", status_code=204)
def delete(job: str, store: Store) -> None:
    """Forget a job that is not in progress, and its video."""
    store.delete(job)


@router.get("/jobs/{job}/video", response_class=FileResponse)
def video(job: str, store: Store) -> FileResponse:
    """The mp4, with Range and ETag."""
    return FileResponse(store.result(store.index.get(job)), media_type="video/mp4")
