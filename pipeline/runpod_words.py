"""A job in the words of RunPod's API: for its routes, and for its webhooks.  No HTTP."""

from __future__ import annotations

import base64
from typing import Any

from pipeline.job_records import Job
from pipeline.job_store import JobStore

STATUS = {
    "queued": "IN_QUEUE",
    "in_progress": "IN_PROGRESS",
    "completed": "COMPLETED",
    "cancelled": "CANCELLED",
}
"""A failed job is FAILED, or TIMED_OUT."""
TIME_CODES = ("timed_out", "expired")


def status_body(job: Job, store: JobStore) -> dict[str, Any]:
    """A job in RunPod's words.  Times are milliseconds."""
    body: dict[str, Any] = {"id": job.id, "status": status_of(job)}
    if job.started is not None:
        body["delayTime"] = int((job.started - job.created) * 1000)
        body["workerId"] = "infinitetalk"
        if job.finished is not None:
            body["executionTime"] = int((job.finished - job.started) * 1000)
    if job.state == "in_progress":
        body["output"] = {
            "progress": job.progress,
            "stage": job.stage,
            "eta_seconds": job.eta_seconds,
        }
    elif job.state == "completed":
        body["output"] = output(job, store)
    elif job.state == "failed" and job.error is not None:
        body["error"] = job.error["message"]
    return body


def status_of(job: Job) -> str:
    """RunPod's name of a job's state."""
    if job.state == "failed":
        return "TIMED_OUT" if (job.error or {}).get("code") in TIME_CODES else "FAILED"
    return STATUS[job.state]


def output(job: Job, store: JobStore) -> dict[str, Any]:
    """What the hub handler gives, and what the job says of itself.

    The video itself only where it went nowhere else.  Raises ``JobConflict`` for a job without a video.
    """
    result = job.result or {}
    told = {name: result[name] for name in ("success", "gpu_count", "segments_processed", "message")}
    if "delivery_error" in result:
        told["delivery_error"] = result["delivery_error"]
    places = {"volume_path": "video_path", "video_url": "video_url"}
    delivered = {name: result[place] for place, name in places.items() if place in result}
    if delivered:
        return {**delivered, **told}
    return {"video": base64.b64encode(store.result(job).read_bytes()).decode(), **told}
