"""OpenAI's Videos API, ``/v1/videos``, as its SDK speaks it; the speech is a form field of its own.

client.videos.create(prompt="...", input_reference=portrait, size="512x512",
                     extra_body={"audio": "data:audio/wav;base64,..."})
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse
from PIL import Image
from pydantic import BaseModel

from pipeline.errors import InvalidRequest, JobConflict, JobNotFound
from pipeline.job_records import Job
from pipeline.job_store import JobStore, Source
from pipeline.portrait import FORMATS
from pipeline.timeline import FPS
from service import api_v1
from service.api_v1 import Owner, Store, own_standing
from service.errors import Failure
from service.intake import Submission, submit
from service.uploads import Inputs, discarding, read_inputs, render_fields, take_sources

router = APIRouter(prefix="/v1/videos", tags=["OpenAI Videos"])

MODEL = "infinitetalk"
POLL_MILLISECONDS = "1000"
STATUS = {"queued": "queued", "in_progress": "in_progress", "completed": "completed"}
"""A cancelled job has failed, for this API."""
REFERENCE = "input_reference"


class VideoError(BaseModel):
    """Why it failed."""

    code: str
    message: str


class Video(BaseModel):
    """OpenAI's video object."""

    id: str
    object: Literal["video"] = "video"
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    model: str
    prompt: str | None = None
    seconds: str
    size: str
    error: VideoError | None = None
    remixed_from_video_id: str | None = None


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class Deleted(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class OpenAIError(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIErrorBody(BaseModel):
    """Every error of this API."""

    error: OpenAIError


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {**told, "model": OpenAIErrorBody} for status, told in api_v1.ERRORS.items()
}


def error_body(failure: Failure) -> dict[str, Any]:
    """An error as OpenAI's SDK reads it."""
    kind = "invalid_request_error" if failure.status < 500 else "server_error"
    return {"error": {"message": failure.message, "type": kind, "param": failure.field, "code": failure.code}}


def video_of(job: Job) -> Video:
    """A job in OpenAI's words."""
    result = job.result or {}
    failed = job.state in ("failed", "cancelled")
    why = job.error or {"code": "cancelled", "message": "the job was cancelled"}
    size = f"{result['width']}x{result['height']}" if result else job.extra["size"]
    return Video(
        id=job.id,
        created_at=int(job.created),
        completed_at=int(job.finished) if job.state == "completed" and job.finished else None,
        status="failed" if failed else STATUS[job.state],  # type: ignore[arg-type]
        progress=int(job.progress),
        model=job.extra["model"],
        prompt=job.fields.get("prompt"),
        seconds=f"{result['duration']:g}" if result else job.extra["seconds"],
        size=size,
        error=VideoError(code=why["code"], message=why["message"]) if failed else None,
    )


async def _own(video: str, request: Request, owner: Owner) -> Job:
    job = (await own_standing(video, request, owner)).job
    if job.api != "openai":
        raise JobNotFound(video)
    return job


OwnVideo = Annotated[Job, Depends(_own)]

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["prompt", REFERENCE, "audio"],
                    "properties": {
                        "prompt": {"type": "string"},
                        REFERENCE: {"type": "string", "format": "binary"},
                        "audio": {"type": "string", "description": "a file, a URL or a data: URI"},
                        "model": {"type": "string"},
                        "size": {"type": "string", "example": "832x480"},
                        "seconds": {"type": "string", "example": "8"},
                    },
                }
            }
        },
    }
}


@router.post("", responses=ERRORS, openapi_extra=_FORM)
async def create(request: Request, response: Response, store: Store, owner: Owner) -> Video:
    """Make a video of `input_reference` (a picture or a video) and `audio`, the speech."""
    inputs = await read_inputs(request, store, (REFERENCE,))
    with discarding(inputs):
        await asyncio.to_thread(_take_reference, inputs, store)
        given = inputs.take("model", "seconds", "size")
        if not inputs.values.get("prompt"):
            raise InvalidRequest("prompt", "it is needed")
        for name in ("input_reference", "audio"):
            field = {"input_reference": ("image", "video"), "audio": ("audio",)}[name]
            if not any(key in inputs.sources for key in field):
                raise InvalidRequest(name, "it is needed: a file, a URL or a data: URI")
        fields = render_fields(inputs) | _size(given.get("size")) | _frames(given.get("seconds"))
        extra = {
            "model": str(given.get("model") or MODEL),
            "size": str(given.get("size") or "auto"),
            "seconds": str(given.get("seconds") or "0"),
        }
    submission = Submission("openai", owner, fields, inputs.sources, inputs.files, extra=extra)
    job, _ = await asyncio.to_thread(submit, store, submission)
    response.headers["openai-poll-after-ms"] = POLL_MILLISECONDS
    return video_of(job)


def _take_reference(inputs: Inputs, store: JobStore) -> None:
    """``input_reference`` is a picture or a video: what it is, is seen in it."""
    reference = inputs.values.pop(REFERENCE, None)
    if isinstance(reference, dict):
        reference = reference.get("image_url") or reference.get("url")
    if reference is not None:
        kind = "video" if str(reference).startswith("data:video/") else "image"
        inputs.values[kind] = reference
        take_sources(inputs, store)
        return
    if REFERENCE not in inputs.files:
        return
    path = inputs.files.pop(REFERENCE)
    inputs.sources.pop(REFERENCE, None)
    try:
        with Image.open(path, formats=FORMATS):
            kind = "image"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        kind = "video"
    inputs.files[kind] = path
    inputs.sources[kind] = Source("file", kind)


def _size(text: Any) -> dict[str, Any]:
    if not text:
        return {}
    width, cross, height = str(text).lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise InvalidRequest("size", f"{text!r} is no size such as 832x480")
    return {"width": int(width), "height": int(height)}


def _frames(seconds: Any) -> dict[str, Any]:
    """The video is as long as the speech, or that long if it is less."""
    if not seconds:
        return {}
    try:
        return {"max_frames": max(1, round(float(seconds) * FPS))}
    except (ValueError, OverflowError):
        raise InvalidRequest("seconds", f"{seconds!r} is no number") from None


@router.get("", responses=ERRORS)
def list_videos(
    store: Store,
    owner: Owner,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """The caller's videos, page by page."""
    jobs = store.index.jobs(
        api="openai", owner=owner, after=after, limit=limit + 1, oldest_first=order == "asc"
    )
    data = [video_of(job) for job in jobs[:limit]]
    return VideoList(
        data=data,
        has_more=len(jobs) > limit,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )


@router.get("/{video}", responses=ERRORS)
async def retrieve(video: OwnVideo, response: Response) -> Video:
    """How a video is."""
    response.headers["openai-poll-after-ms"] = POLL_MILLISECONDS
    return video_of(video)


@router.delete("/{video}", responses=ERRORS)
def delete(video: OwnVideo, store: Store) -> Deleted:
    """Forget a video; one in the making is cancelled."""
    store.index.cancel(video.id)
    store.delete(video.id)
    return Deleted(id=video.id)


@router.get(
    "/{video}/content",
    response_class=FileResponse,
    responses={**ERRORS, 200: {"content": {"video/mp4": {}}}},
)
def content(video: OwnVideo, store: Store, variant: Literal["video"] = "video") -> FileResponse:
    """The mp4."""
    if video.state != "completed":
        raise JobConflict(video.id, f"it is {video.state} and has no video yet")
    return FileResponse(store.result(video), media_type="video/mp4")
