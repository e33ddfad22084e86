"""The driver: carries one video through, from a checked request to a finished file, on a Ray cluster.

Puts together what others know: ``cluster`` and ``pool`` here, the story itself in ``pipeline.render``.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from actors.cluster import check_gpus, cluster
from actors.pool_client import PoolClient
from pipeline import ffmpeg
from pipeline.dispatch import Renderers
from pipeline.engine import choose_engine, engine_kind
from pipeline.errors import (
    ConfigurationError,
    InvalidRequest,
    JobCancelled,
    JobInUse,
    PipelineError,
    StorageError,
)
from pipeline.job import JobDirectory, job_id, storage_errors
from pipeline.models import packs_of
from pipeline.plan import Plan
from pipeline.redo import Redone, Side, redo
from pipeline.render import OnProgress, render_video
from pipeline.request import RenderRequest
from pipeline.result import RenderResult
from pipeline.settings import Settings
from pipeline.vocals import VocalSeparator
from pipeline.workflow import Workflow, load
from pipeline.workflow_family import WRAPPER, workflow_for

FREE_BYTES = 200 << 20
"""Less free space than this in the output's folder is refused at the start."""

log = logging.getLogger(__name__)


@contextmanager
def open_pool(settings: Settings, gpus: int | None = None) -> Iterator[PoolClient]:
    """Ray, and its pool of GPUs.  For many jobs at once, from many threads.

    Started for this, on ``gpus`` GPUs (default: all), nothing of it is left afterwards.  The pool of a
    cluster that is joined stays.
    """
    with cluster(settings, gpus):
        pool = PoolClient(settings)
        try:
            yield pool
        finally:
            if settings.ray_address == "local":
                pool.end()


def render(
    request: RenderRequest,
    settings: Settings,
    output: Path,
    *,
    gpus: int | None = None,
    job_dir: Path | None = None,
    name: str | None = None,
    priority: int = 0,
    pool: PoolClient | None = None,
    watched: bool = True,
    on_progress: OnProgress,
    make_plan: Callable[[int, int], Plan] | None = None,
) -> RenderResult:
    """Render ``request`` into ``output`` (an mp4).

    Finished segments and windows are kept beside the output until the video is there, so the same call after
    a failure goes on with what is missing; with ``job_dir`` the job lives there, and stays.  ``name`` is what
    it is called in logs (default: a digest of the request).  Renderers are lent by ``pool``, or by one that
    is opened for this job; it takes ``gpus`` of them at a time (default: all, in fairness to other jobs,
    among which ``priority`` counts: see ``pipeline.scheduling``).  ``watched``: what is finished of a job
    that stays can be played meanwhile.  Raises ``PipelineError``; a KeyboardInterrupt becomes
    ``JobCancelled``, and leaves no process behind.
    """
    check_gpus(gpus)
    engine = engine_kind(settings)
    workflow = choose_workflow(request, settings)
    if settings.ray_address == "local":
        # What is wrong with it is told before anything starts.
        choose_engine(settings, packs_of(json.loads(workflow.text)))
    if engine == "draft":
        log.warning("DRAFT ENGINE: this is a preview that moves the portrait, not the InfiniteTalk model")
    ffmpeg.binary()  # none: an error now, not after an hour of rendering
    mark = job_id(request, _engine_mark(settings), workflow.text)
    name = name or mark
    _check_output(output)
    job = JobDirectory((job_dir or output.parent / ".infinitetalk" / mark).resolve(), name)
    if job_dir is not None:
        _check_same_job(job, mark)

    limits = [limit for limit in (gpus, request.gpu_count) if limit is not None]
    at_most = min(limits, default=None) if request.use_multi_gpu else 1

    @contextmanager
    def renderers() -> Iterator[Renderers]:
        with ExitStack() as stack:
            lender = pool or stack.enter_context(open_pool(settings, at_most))
            yield stack.enter_context(lender.job(name, priority, at_most))

    log.info("job %s into %s", name, output, extra={"job": name, "engine": engine})
    try:
        result = render_video(
            request,
            job,
            engine,
            workflow,
            renderers,
            output,
            max_attempts=settings.max_attempts,
            on_progress=on_progress,
            make_plan=make_plan,
            separator=VocalSeparator.configured(settings),
            watched=watched and job_dir is not None,
        )
    except (PipelineError, KeyboardInterrupt) as error:
        if job.has_segments or (job.voice.exists() and not isinstance(error, InvalidRequest)):
            log.warning("what is finished is kept in %s; the same command goes on with the rest", job.path)
        elif job_dir is None and not isinstance(error, JobInUse):
            job.remove()
        if isinstance(error, KeyboardInterrupt):
            raise JobCancelled(name) from None
        raise
    if job_dir is None:
        job.remove()
    return result


def redo_part(
    job_dir: Path,
    settings: Settings,
    *,
    seam: int | None = None,
    side: Side | None = None,
    segment: int | None = None,
    seed: int | None = None,
    name: str | None = None,
    priority: int = 0,
    pool: PoolClient | None = None,
    on_progress: OnProgress,
) -> Redone:
    """Render one segment of the finished job in ``job_dir`` again on one GPU: ``pipeline.redo`` says how.

    ``name`` and ``priority`` are those of ``render``.
    Raises ``InvalidRequest`` where the job was made with another engine or workflow, ``PipelineError``;
    a KeyboardInterrupt becomes ``JobCancelled``, and the job is as it was.
    """
    engine = engine_kind(settings)
    if settings.ray_address == "local":
        choose_engine(settings)
    request = JobDirectory(job_dir.resolve()).kept_request()
    workflow = choose_workflow(request, settings)
    mark = job_id(request, _engine_mark(settings), workflow.text)
    name = name or mark
    try:
        known = (job_dir / "id").read_text().strip()
    except OSError as error:
        raise InvalidRequest("job", f"{job_dir} holds no job that was kept with --job-dir") from error
    if known != mark:
        raise InvalidRequest(
            "job", f"{job_dir} was rendered with another engine, or another version of its workflow"
        )

    @contextmanager
    def renderers() -> Iterator[Renderers]:
        with ExitStack() as stack:
            lender = pool or stack.enter_context(open_pool(settings, 1))
            yield stack.enter_context(lender.job(name, priority, at_most=1))

    try:
        return redo(
            JobDirectory(job_dir.resolve(), name),
            engine,
            workflow,
            renderers,
            seam=seam,
            side=side,
            segment=segment,
            seed=seed,
            max_attempts=settings.max_attempts,
            on_progress=on_progress,
        )
    except KeyboardInterrupt:
        raise JobCancelled(name) from None


def choose_workflow(request: RenderRequest, settings: Settings) -> Workflow:
    """The graph for a request.  In the native family one serves portraits and source videos.

    Raises ``ConfigurationError`` for two speakers without the node pack.
    """
    if request.negative_prompt:
        log.warning("the negative prompt changes nothing: the model runs at cfg 1, where it is not read")
    if request.workflow_family == WRAPPER:
        return load(*workflow_for(WRAPPER, request.input_type, request.person_count))
    if request.force_offload is not None:
        log.warning("force_offload changes nothing: only the wrapper family's nodes have it")
    if settings.node_pack:
        return load("talk_single" if request.audio_2 is None else "talk_multi")
    if request.audio_2 is not None:
        raise ConfigurationError(
            "two speakers need the node pack: ComfyUI's own node plays their tracks one after the other "
            "in every segment; set INFINITETALK_NODE_PACK=1"
        )
    log.warning(
        "the node pack is off: the model hears nothing from before a window, so lips are less sure "
        "at the start of each window"
    )
    return load("image_single")


def _engine_mark(settings: Settings) -> str:
    """What of the engine shapes the pictures: segments of one mark may stand in one video."""
    if engine_kind(settings) == "draft":
        return "draft"
    return f"comfyui {settings.comfyui_dir} {settings.comfyui_models} {settings.comfyui_args}"


def _check_output(output: Path) -> None:
    """Refuse an output that can't be written before any time is spent on it."""
    if output.suffix.lower() != ".mp4":
        raise InvalidRequest("output", f"{output}: the result is an mp4; name it so")
    if output.is_dir():
        raise InvalidRequest("output", f"{output} is a folder")
    with storage_errors(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass  # it can be written
        free = shutil.disk_usage(output.parent).free
    if free < FREE_BYTES:
        raise StorageError(
            str(output.parent), f"only {free >> 20} MiB are free, {FREE_BYTES >> 20} MiB are needed"
        )


def _check_same_job(job: JobDirectory, digest: str) -> None:
    """A directory that holds another request's job is left alone."""
    mark = job.path / "id"
    with storage_errors(job.path):
        job.path.mkdir(parents=True, exist_ok=True)
        if mark.exists() and mark.read_text().strip() != digest:
            raise InvalidRequest("job-dir", f"{job.path} holds another job (other inputs, options or engine)")
        mark.write_text(digest + "\n")
