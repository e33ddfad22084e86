"""RunPod's serverless API, ``/v2/{endpoint}/...``, with the fields of the InfiniteTalk hub handler.

What its clients and its SDK rely on, field by field, is in docs/api.md.  Endpoint names are taken as given:
all of them lead to the same jobs.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import InvalidRequest, JobConflict
from pipeline.job_records import Job
from pipeline.job_store import JobStore
from pipeline.request import RenderRequest
from pipeline.runpod_words import status_body, status_of
from service import api_v1
from service.api_v1 import Owner, OwnJob, Store
from service.errors import Failure
from service.intake import FILE_FIELDS, Submission, submit
from service.news import News
from service.uploads import Inputs, discarding, read_json, take_sources

router = APIRouter(prefix="/v2/{endpoint}", tags=["RunPod"])

FILES = {
    "image": ("image_path", "image_url", "image_base64", "image", "image1"),
    "video": ("video_path", "video_url", "video_base64", "video"),
    "audio": (
        "wav_path",
        "wav_url",
        "wav_base64",
        "audio",
        "audio1",
        "audio_url",
        "audio_base64",
        "left_audio",
    ),
    "audio_2": ("wav_path_2", "wav_url_2", "wav_base64_2", "audio2", "audio_2", "right_audio"),
    "mask_1": ("mask_1", "mask_image"),
    "mask_2": ("mask_2",),
}
"""Names of each file in the handler's order: the first one that is there and not null counts."""
FIELDS = {
    "max_frame": "max_frames",
    "sample_steps": "steps",
    "gpuCount": "gpu_count",
}
IGNORED = ("input_type", "person_count", "network_volume", "order")


class Policy(BaseModel):
    """Times are milliseconds."""

    executionTimeout: int | None = Field(default=None, ge=5_000, le=7 * 86_400_000)
    ttl: int | None = Field(default=None, ge=10_000, le=7 * 86_400_000)
    lowPriority: bool = False


class S3Config(BaseModel):
    """A bucket of the client's."""

    accessId: str
    accessSecret: str
    bucketName: str
    endpointUrl: str = Field(pattern="^https?://", max_length=2000)


class RunRequest(BaseModel):
    """RunPod's envelope."""

    model_config = ConfigDict(extra="ignore")

    input: dict[str, Any] = Field(description="The hub handler's fields, and those of /v1/jobs")
    policy: Policy = Field(default_factory=Policy)
    webhook: str | None = Field(default=None, pattern="^https?://", max_length=2000)
    s3Config: S3Config | None = None


class RunPodError(BaseModel):
    """Every error of this API."""

    error: str
    code: str
    field: str | None


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {**told, "model": RunPodError} for status, told in api_v1.ERRORS.items()
}


def error_body(failure: Failure) -> dict[str, Any]:
    """An error as RunPod's clients read it."""
    return {"error": failure.message, "code": failure.code, "field": failure.field}


async def _accept(request: Request, store: JobStore, owner: str) -> Job:
    asked = read_envelope(await read_json(request, store.settings.max_json_bytes))
    return await asyncio.to_thread(lambda: submit(store, submission(asked, owner, store))[0])


def read_envelope(body: dict[str, Any]) -> RunRequest:
    """RunPod's envelope around an ``input``.  Raises ``InvalidRequest`` naming the field."""
    try:
        return RunRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(".".join(map(str, first["loc"])) or "input", first["msg"]) from None


def submission(asked: RunRequest, owner: str, store: JobStore) -> Submission:
    """A request as a job to submit; what came with it lies in ``incoming``.  Raises ``InvalidRequest``."""
    with discarding(Inputs()) as inputs:
        fields, extra = understand(asked.input, inputs, store)
        if asked.s3Config is not None:
            extra["s3"] = _bucket(asked.s3Config, store)
    if asked.webhook:
        extra["webhook"] = asked.webhook
    seconds, ttl = asked.policy.executionTimeout, asked.policy.ttl
    return Submission(
        api="runpod",
        owner=owner,
        fields=fields,
        sources=inputs.sources,
        files=inputs.files,
        priority=-1 if asked.policy.lowPriority else 0,
        execution_seconds=None if seconds is None else seconds / 1000,
        queue_seconds=None if ttl is None else ttl / 1000,
        extra=extra,
    )


def understand(
    given: dict[str, Any], inputs: Inputs, store: JobStore
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The hub handler's ``input`` as fields of a ``RenderRequest``, and what concerns only the answer.

    Files land in ``inputs``.  Null counts as not given; names that nobody knows are ignored, as there.
    Raises ``InvalidRequest`` naming the field as the client called it.
    """
    given = {name: value for name, value in given.items() if value is not None}
    kind, persons = given.get("input_type"), given.get("person_count", "single")
    if kind not in (None, "image", "video"):
        raise InvalidRequest("input_type", "image or video")
    if persons not in ("single", "multi"):
        raise InvalidRequest("person_count", "single or multi")
    wanted = {
        "image": kind != "video",
        "video": kind != "image",
        "audio": True,
        "audio_2": persons == "multi" or "person_count" not in given,
        "mask_1": persons == "multi",
        "mask_2": persons == "multi",
    }
    for field, names in FILES.items():
        name = next((name for name in names if name in given), None)
        if name is None or not wanted[field] or (field == "video" and "image" in inputs.sources):
            continue
        ending = re.sub(r"_2$", "", name).rpartition("_")[2]
        key = f"{field}_{ending}" if ending in ("path", "url", "base64") else field
        inputs.values[key] = given[name]
    take_sources(inputs, store)
    if persons == "multi" and "audio_2" not in inputs.sources and "audio" in inputs.sources:
        inputs.sources["audio_2"] = inputs.sources["audio"]  # as the handler does
    taken = {name for names in FILES.values() for name in names}
    fields: dict[str, Any] = {}
    ignored = []
    for name, value in given.items():
        field = FIELDS.get(name, name)
        if name in taken or name in IGNORED:
            continue
        if field in RenderRequest.model_fields and field not in FILE_FIELDS:
            fields[field] = value
        else:
            ignored.append(name)
    if ignored:
        logging.getLogger(__name__).info(
            "input fields that are not known are ignored: %s", ", ".join(ignored)
        )
    if "order" in given and "audio_2" in inputs.sources:
        fields["audio_order"] = "together" if given["order"] == "meanwhile" else "in_turns"
    if not {"size", "aspect", "width", "height"} & set(fields):
        fields |= {"width": 512, "height": 512}
    extra: dict[str, Any] = {}
    if given.get("network_volume"):
        extra["volume"] = _volume(store)
    return fields, extra


def _bucket(wanted: S3Config, store: JobStore) -> dict[str, str]:
    """Only servers that the operator knows: nobody checks where the S3 library connects to."""
    host = urlsplit(wanted.endpointUrl).hostname or ""
    known = {urlsplit(store.settings.s3_endpoint).hostname, *store.settings.allowed}
    if host not in known and not host.endswith(".amazonaws.com"):
        raise InvalidRequest("s3Config", f"{host} is not among INFINITETALK_SERVE_ALLOWED_HOSTS")
    return {
        "name": wanted.bucketName,
        "endpoint": wanted.endpointUrl,
        "access_key": wanted.accessId,
        "secret_key": wanted.accessSecret,
    }


def _volume(store: JobStore) -> str:
    folder = store.settings.volume
    if not folder.is_dir():
        raise InvalidRequest("network_volume", f"no volume is mounted at {folder}")
    return str(folder)


_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["input"],
                    "properties": {"input": {"type": "object"}, "policy": {"type": "object"}},
                },
                "example": {
                    "input": {
                        "input_type": "image",
                        "image_url": "https://example.org/portrait.png",
                        "wav_url": "https://example.org/speech.wav",
                        "width": 512,
                        "height": 512,
                    }
                },
            }
        },
    }
}


@router.post("/run", responses=ERRORS, openapi_extra=_BODY)
async def run(endpoint: str, request: Request, store: Store, owner: Owner) -> dict[str, Any]:
    """Make a job."""
    job = await _accept(request, store, owner)
    return {"id": job.id, "status": "IN_QUEUE"}


@router.post("/runsync", responses=ERRORS, openapi_extra=_BODY)
async def runsync(
    endpoint: str,
    request: Request,
    store: Store,
    owner: Owner,
    wait: Annotated[int, Query(ge=1000, le=300_000, description="milliseconds")] = 90_000,
) -> dict[str, Any]:
    """Make a job and wait for it; after `wait`, the answer is how far it is."""
    job = await _accept(request, store, owner)
    news: News = request.app.state.news
    job = await news.until_over(job.id, wait / 1000)
    return await asyncio.to_thread(status_body, job, store)


@router.post("/status/{job}", responses=ERRORS, include_in_schema=False)
@router.get("/status/{job}", responses=ERRORS)
def status(endpoint: str, job: OwnJob, store: Store) -> dict[str, Any]:
    """How a job is; of a completed one, the video."""
    return status_body(job, store)


@router.post("/stream/{job}", responses=ERRORS, include_in_schema=False)
@router.get("/stream/{job}", responses=ERRORS)
def stream(endpoint: str, job: OwnJob, store: Store) -> dict[str, Any]:
    """Progress since the last call; each piece is given once.

    A cancelled job says FAILED here: RunPod's SDK would ask for ever otherwise.
    """
    told = [
        {"output": event.data}
        for event in store.index.take_stream(job.id)
        if event.kind in ("progress", "segment")
    ]
    name = status_of(job)
    return {"status": "FAILED" if name == "CANCELLED" else name, "stream": told}


@router.post("/cancel/{job}", responses=ERRORS)
def cancel(endpoint: str, job: OwnJob, store: Store) -> dict[str, Any]:
    """End a job."""
    found = store.index.cancel(job.id)
    return {"id": found.id, "status": status_of(found)}


@router.post("/retry/{job}", responses=ERRORS)
def retry(endpoint: str, job: OwnJob, store: Store) -> dict[str, Any]:
    """Queue a failed job again."""
    if job.state != "failed":
        raise JobConflict(job.id, f"it is {status_of(job)}; only FAILED and TIMED_OUT jobs can be retried")
    store.index.again(job.id, {"kind": "render"}, ["failed"])
    return {"id": job.id, "status": "IN_QUEUE"}


@router.post("/purge-queue", responses=ERRORS)
def purge(endpoint: str, store: Store, owner: Owner) -> dict[str, Any]:
    """Cancel the caller's jobs that wait."""
    return {"removed": len(store.index.cancel_queued("runpod", owner)), "status": "completed"}


@router.get("/health", responses=ERRORS)
def health(endpoint: str, request: Request, store: Store, owner: Owner) -> dict[str, Any]:
    """Jobs by state, and GPUs as workers."""
    counts = store.index.counts("runpod")
    state = request.app.state.backend.state()
    pool = request.app.state.backend.pool() if state["gpus"] else None
    lanes = [] if pool is None else pool["lanes"]
    running = min(state["gpus"], sum(lane["state"] == "busy" for lane in lanes))
    return {
        "jobs": {
            "completed": counts["completed"],
            "failed": counts["failed"],
            "inProgress": counts["in_progress"],
            "inQueue": counts["queued"],
            "retried": 0,
        },
        "workers": {
            "idle": state["gpus"] - running,
            "initializing": state["starting"],
            "ready": state["gpus"],
            "running": running,
            "throttled": 0,
            "unhealthy": 0,
        },
    }
