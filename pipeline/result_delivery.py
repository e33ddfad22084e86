"""Where else a finished video goes: a network volume, an S3-compatible bucket."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.job import finished
from pipeline.job_records import Job
from pipeline.job_store import JobStore
from pipeline.result_upload import Bucket, upload

log = logging.getLogger(__name__)


def deliver(store: JobStore, job: Job) -> dict[str, Any]:
    """Copy the video to where the job or the operator wants it; what to add to the result.

    A copy that fails costs nobody the video: the result says what went wrong instead.
    """
    told: dict[str, Any] = {}
    video = store.video(job.id)
    try:
        if folder := job.extra.get("volume"):
            target = Path(folder) / f"infinitetalk_task_{job.id}.mp4"  # the hub handler's name
            with finished(target) as partial:
                shutil.copyfile(video, partial)
            told["volume_path"] = str(target)
        bucket = Bucket(**job.extra["s3"]) if "s3" in job.extra else Bucket.of(store.settings)
        if bucket is not None:
            told["video_url"] = upload(video, f"{job.id}.mp4", bucket)
            # The client's secret is not kept longer than it is needed.
            store.index.set_extra(job.id, {name: value for name, value in job.extra.items() if name != "s3"})
    except PipelineError as error:
        log.error("the video could not be copied: %s", error, extra={"job": job.id})
        told["delivery_error"] = str(error)
    except Exception as error:
        log.exception("the video could not be copied", extra={"job": job.id})
        told["delivery_error"] = f"{type(error).__name__}: an error inside the service; its log tells more"
    return told
