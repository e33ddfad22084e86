"""Our own API, ``/v1/jobs``: create, look, follow, cancel, retry, delete, fetch the video."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import InvalidRequest, JobConflict, JobNotFound
from pipeline.job import JobDirectory
from pipeline.job_records import Job, JobState, Standing
from pipeline.job_store import JobStore
from pipeline.job_timeline import JobTimeline
from pipeline.request import RenderRequest
from pipeline.timeline_picture import draw_timeline
from pipeline.timeline_recorder import stored_timeline
from service.intake import FILE_FIELDS, Submission, submit
from service.news import News
from service.reads import JobReads
from service.tokens import owner_or_link, requested_by
from service.uploads import discarding, read_inputs, render_fields

router = APIRouter(prefix="/v1", tags=["jobs"])
VIDEO_PATH = "/v1/jobs/{job}/video"


async def store_of(request: Request) -> JobStore:
    """The store of this process; async, or it would cost a turn on a thread."""
    store: JobStore = request.app.state.store
    return store


Store = Annotated[JobStore, Depends(store_of)]
Owner = Annotated[str, Depends(requested_by)]


class JobView(BaseModel):
    """A job as clients see it.  Times are seconds since 1970."""

    id: str
    state: JobState
    stage: str = Field(description="queued, preparing, starting, rendering, joining, or the final state")
    progress: float = Field(description="0 to 100, by windows rendered")
    eta_seconds: float | None = Field(description="until the last window, once one was timed")
    position: int | None = Field(description="queued jobs that go before this one")
    priority: int
    created: float
    started: float | None
    finished: float | None
    attempt: int = Field(description="how often a runner has taken it")
    detail: dict[str, Any] = Field(description="windows, segments and GPUs")
    error: dict[str, Any] | None
    result: dict[str, Any] | None
    video: str | None = Field(description="where the mp4 is; signed for some hours where tokens are used")
    stream: str | None = Field(description="HLS of what is finished, once there is any; signed like `video`")
    seams: str | None = Field(description="a picture of the seams, once the video has some; signed likewise")


class JobPage(BaseModel):
    """Some jobs, newest first."""

    jobs: list[JobView]
    has_more: bool


class JobOptions(BaseModel):
    """What a client may say about a job beside the video it wants."""

    model_config = ConfigDict(extra="forbid")

    priority: int = Field(default=0, ge=-100, le=100, description="higher goes first")
    execution_seconds: float | None = Field(default=None, gt=0, description="how long it may be in progress")
    queue_seconds: float | None = Field(default=None, gt=0, description="how long it may wait")
    webhook: str | None = Field(
        default=None, pattern="^https?://", max_length=2000, description="is told when the job is over"
    )


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str
    message: str
    field: str | None
    job_id: str | None


class ErrorBody(BaseModel):
    """Every error of this API."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": words}
    for status, words in {
        400: "something in the request is wrong; `field` says where",
        401: "no known token",
        403: "not from here",
        404: "no such job",
        409: "the job is in no state for this",
        413: "too large",
        415: "neither multipart nor JSON",
        422: "a parameter is wrong",
        429: "the queue is full; see Retry-After",
        503: "the service is not set up",
        507: "the disk is full",
    }.items()
}


def view(standing: Standing, request: Request) -> JobView:
    """The job for a client."""
    job, store = standing.job, request.app.state.store
    path = VIDEO_PATH.format(job=job.id)
    signed, own = request.app.state.tokens.signed, f"/v1/jobs/{job.id}"
    return JobView(
        id=job.id,
        state=job.state,
        stage=job.stage,
        progress=job.progress,
        eta_seconds=job.eta_seconds,
        position=standing.ahead,
        priority=job.priority,
        created=job.created,
        started=job.started,
        finished=job.finished,
        attempt=job.attempt,
        detail=job.detail,
        error=job.error,
        result=job.result and {name: value for name, value in job.result.items() if name != "video_path"},
        video=request.app.state.tokens.signed(path) if job.result is not None else None,
        stream=signed(f"{own}/stream.m3u8") if store.playlist(job.id).exists() else None,
        seams=signed(f"{own}/seams.png") if (job.result or {}).get("seams") else None,
    )


def reads_of(request: Request) -> JobReads:
    reads: JobReads = request.app.state.reads
    return reads


async def own_standing(job: str, request: Request, owner: Owner) -> Standing:
    """A job of the caller's; others' do not exist for them."""
    found = await reads_of(request).standing(job)
    if found.job.owner != owner:
        raise JobNotFound(job)
    return found


OwnStanding = Annotated[Standing, Depends(own_standing)]


async def own_job(standing: OwnStanding) -> Job:
    """The job alone."""
    return standing.job


OwnJob = Annotated[Job, Depends(own_job)]


def linked_job(job: str, request: Request, store: Store) -> Job:
    """A job of the caller's, or one that the caller has a signed link for."""
    owner = owner_or_link(request)
    found = store.index.get(job)
    if owner is not None and found.owner != owner:
        raise JobNotFound(job)
    return found


LinkedJob = Annotated[Job, Depends(linked_job)]


def _body_schema() -> dict[str, Any]:
    """The body of a new job for the OpenAPI document: what ``RenderRequest`` takes, and the files."""
    schema = RenderRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    fields = {name: part for name, part in schema["properties"].items() if name not in FILE_FIELDS}
    fields |= JobOptions.model_json_schema()["properties"]
    text = {"type": "string"}
    by_name = {
        f"{name}{ending}": {**text, "description": words}
        for name in FILE_FIELDS
        for ending, words in (
            ("", "http(s) URL or data: URI"),
            ("_url", "http(s) URL"),
            ("_base64", "the file, base64"),
            ("_path", "a file that the server may read"),
        )
    }
    files = {name: {**text, "format": "binary"} for name in FILE_FIELDS}
    example = {
        "image_url": "https://example.org/portrait.png",
        "audio_url": "https://example.org/speech.wav",
        "prompt": "A person talking naturally",
        "size": "480p",
    }
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"type": "object", "properties": {**by_name, **fields}},
                    "example": example,
                },
                "multipart/form-data": {
                    "schema": {"type": "object", "properties": {**by_name, **files, **fields}}
                },
            },
        }
    }


@router.post(
    "/jobs",
    status_code=202,
    response_model=JobView,
    responses={**ERRORS, 200: {"model": JobView}},
    openapi_extra=_body_schema(),
)
async def create(
    request: Request,
    response: Response,
    store: Store,
    owner: Owner,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> JobView:
    """Make a job.  When this answers, the job is stored; it is rendered whatever happens to the server.

    The files come as form files, URLs, base64 or paths.  A second request with the same `Idempotency-Key`
    gets the first one's job (200).
    """
    inputs = await read_inputs(request, store)
    with discarding(inputs):
        try:
            options = JobOptions.model_validate(inputs.take(*JobOptions.model_fields))
        except ValidationError as error:
            first = error.errors()[0]
            raise InvalidRequest(str(first["loc"][0]), first["msg"]) from None
        submission = Submission(
            api="v1",
            owner=owner,
            fields=render_fields(inputs),
            sources=inputs.sources,
            files=inputs.files,
            priority=options.priority,
            idempotency_key=idempotency_key,
            queue_seconds=options.queue_seconds,
            execution_seconds=options.execution_seconds,
            extra={"webhook": options.webhook} if options.webhook else {},
        )
    job, created = await asyncio.to_thread(submit, store, submission)
    response.status_code = 202 if created else 200
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return view(await reads_of(request).standing(job.id), request)


@router.get("/jobs", responses=ERRORS)
def list_jobs(
    request: Request,
    store: Store,
    owner: Owner,
    state: Annotated[list[JobState] | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: str | None = None,
) -> JobPage:
    """The caller's jobs, newest first, page by page: `after` is the last id of the page before."""
    found = store.index.jobs(owner=owner, states=state, after=after, limit=limit + 1)
    standings = store.index.standings([job.id for job in found[:limit]])
    views = [view(standings[job.id], request) for job in found[:limit] if job.id in standings]
    return JobPage(jobs=views, has_more=len(found) > limit)


@router.get("/jobs/{job}", responses=ERRORS)
async def read(job: str, standing: OwnStanding, request: Request) -> JobView:
    """How a job is."""
    return view(standing, request)


@router.post("/jobs/{job}/cancel", responses=ERRORS)
def cancel(job: OwnJob, request: Request, store: Store) -> JobView:
    """End a job; one that is over stays as it is."""
    store.index.cancel(job.id)
    return view(store.index.standing(job.id), request)


@router.post("/jobs/{job}/retry", status_code=202, responses=ERRORS)
def retry(job: OwnJob, request: Request, store: Store) -> JobView:
    """Queue a failed or cancelled job again; what is rendered of it is kept."""
    store.index.again(job.id, {"kind": "render"}, ["failed", "cancelled"])
    return view(store.index.standing(job.id), request)


class Redo(BaseModel):
    """Which part shall be rendered again."""

    model_config = ConfigDict(extra="forbid")

    segment: int | None = Field(default=None, ge=0, description="render it again, and keep the new take")
    seam: int | None = Field(default=None, ge=0, description="render one side again, and keep the better")
    seed: int | None = Field(default=None, ge=0, le=2**53, description="default: one that was not tried yet")

    @model_validator(mode="after")
    def _one_part(self) -> Redo:
        if (self.segment is None) == (self.seam is None):
            raise ValueError("give either a segment or a seam")
        return self


@router.post("/jobs/{job}/redo", status_code=202, responses=ERRORS)
def redo(job: OwnJob, wanted: Redo, request: Request, store: Store) -> JobView:
    """Render one segment of a completed job again with another seed; the video is joined anew.

    Until that is done the video stays as it is; `result.redo` says what was kept.
    """
    task = {"kind": "redo", **wanted.model_dump(exclude_none=True)}
    store.index.again(job.id, task, ["completed"])
    return view(store.index.standing(job.id), request)


@router.delete("/jobs/{job}", status_code=204, responses=ERRORS)
def delete(job: OwnJob, store: Store) -> None:
    """Forget a job that is not in progress, and its video."""
    store.delete(job.id)


@router.get(
    "/jobs/{job}/video",
    name="read_video",
    response_class=FileResponse,
    responses={**ERRORS, 200: {"content": {"video/mp4": {}}}, 206: {"description": "a part"}, 416: {}},
)
@router.head("/jobs/{job}/video", include_in_schema=False)
async def read_video(
    job: LinkedJob,
    store: Store,
    encoding: Annotated[Literal["base64"] | None, Query()] = None,
) -> Response:
    """The mp4, with Range and ETag; with `encoding=base64`, as JSON."""
    path = store.result(job)
    if encoding == "base64":
        content = await asyncio.to_thread(lambda: base64.b64encode(path.read_bytes()).decode())
        return JSONResponse({"id": job.id, "video_base64": content})
    return FileResponse(
        path, media_type="video/mp4", filename=f"{job.id}.mp4", content_disposition_type="inline"
    )


def timeline_of(job: OwnJob, store: Store) -> JobTimeline:
    """What was recorded of a job of the caller's; the time in the queue comes first."""
    directory = JobDirectory(store.work(job.id), job.id)
    if not directory.timeline.exists():
        raise JobConflict(job.id, "nothing of it was rendered yet")
    return stored_timeline(directory).queued(job.created)


Timeline = Annotated[JobTimeline, Depends(timeline_of)]


@router.get("/jobs/{job}/timeline", responses=ERRORS)
def read_timeline(timeline: Timeline) -> dict[str, Any]:
    """What every GPU did for the job, and when; see docs/timeline.md."""
    return timeline.to_json()


@router.get(
    "/jobs/{job}/timeline.svg",
    response_class=Response,
    responses={**ERRORS, 200: {"content": {"image/svg+xml": {"schema": {"type": "string"}}}}},
)
def draw(timeline: Timeline) -> Response:
    """The same as a picture."""
    return Response(draw_timeline([timeline]).svg(), media_type="image/svg+xml")


@router.get(
    "/jobs/{job}/events",
    response_class=StreamingResponse,
    responses={**ERRORS, 200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def follow(
    job: OwnJob,
    request: Request,
    last_event_id: Annotated[int, Header(ge=0, le=2**62)] = 0,
) -> StreamingResponse:
    """Server-sent events `status`, `progress`, `segment` and `log`, until the job is over.

    A client that comes back with `Last-Event-ID` gets what it missed.
    """
    news: News = request.app.state.news

    async def lines() -> AsyncIterator[str]:
        async for event in news.events(job.id, last_event_id):
            if event is None:
                yield ": still here\n\n"
            else:
                data = json.dumps({"at": event.at, **event.data})
                yield f"id: {event.id}\nevent: {event.kind}\ndata: {data}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


class GpuView(BaseModel):
    """One GPU of the cluster."""

    gpu: int
    node: str
    device: str | None
    state: str = Field(description="idle, busy, starting, stopping, down or fenced")


class PoolStatus(BaseModel):
    """The GPUs behind this service."""

    gpus: list[GpuView]
    jobs: int = Field(description="that have GPUs, or wait for some")


@router.get("/pool", tags=["service"], responses=ERRORS)
def pool(request: Request, owner: Owner) -> PoolStatus:
    """The GPUs of the cluster and what they do; none where none was needed yet."""
    status = request.app.state.backend.pool() or {"lanes": [], "jobs": []}
    gpus = [GpuView.model_validate(lane) for lane in status["lanes"]]
    return PoolStatus(gpus=gpus, jobs=len(status["jobs"]))
