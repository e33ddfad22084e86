"""The runner: the detached Ray actor that takes jobs from the store and renders them, one after the other.

It holds no state that matters: whatever kills it, the next one goes on from the index and the job
directories.  How a job is made is the driver's business, how far it is ``job_watch``'s.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from typing import Any

import ray

from actors.cluster import DEFAULT_DRAFT_LANES
from actors.driver import redo_part, render
from actors.job_report import JobReport, tell_end, tell_start
from actors.job_watch import JobWatch
from actors.pool import RendererPool
from pipeline.engine import runs_on_cpu
from pipeline.errors import ConfigurationError, InvalidRequest, JobCancelled, PipelineError, RenderFailed
from pipeline.job import JobDirectory
from pipeline.job_inputs import resolve
from pipeline.job_records import Job
from pipeline.job_store import JobStore
from pipeline.result_delivery import deliver
from pipeline.retention import clean_up
from pipeline.service_settings import ServiceSettings
from pipeline.settings import Settings
from pipeline.webhooks import WebhookSender

NAME, NAMESPACE = "runner", "infinitetalk"
IDLE_SECONDS = 0.2
"""How often an idle runner looks for work."""
CLEAN_UP_SECONDS = 60.0
LOOK_SECONDS = 1.0
"""How often an idle runner looks at its engines."""
MAX_ATTEMPTS = 20
"""Runners that one job may lose, or find its directory held."""
NICENESS = 10
"""Looking at inputs, joining and encoding wait where the API needs the CPU; engines are not the runner's."""
AGAIN_SECONDS = 30.0
"""Before engines that do not start are tried again."""

log = logging.getLogger(__name__)


class JobRunner:
    """Renders the jobs of one data directory on all GPUs of the cluster."""

    def __init__(self, service: ServiceSettings, settings: Settings) -> None:
        os.nice(NICENESS)
        self._service, self._settings = service, settings
        self._name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._pool: RendererPool | None = None
        self._stop = threading.Event()
        self._watch: JobWatch | None = None
        self._trouble: str | None = None
        self._next_clean_up = self._next_look = self._next_pool = 0.0
        for name in ("pipeline", "actors"):
            logging.getLogger(name).setLevel(logging.INFO)  # jobs' logs become events
        self._loop = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._loop.start()

    def state(self) -> dict[str, Any]:
        """For readiness: who runs, on what, and what is wrong where something is."""
        pool = self._pool  # its thread may close it meanwhile
        lanes = None if pool is None else pool.lanes()
        return {
            "runner": self._name,
            "pid": os.getpid(),
            "settings": [self._service.model_dump_json(), self._settings.model_dump_json()],
            "alive": self._loop.is_alive(),
            "gpus": 0 if lanes is None else len(lanes.ready),
            "starting": 0 if lanes is None else len(lanes.starting),
            "trouble": self._trouble,
        }

    def stop(self) -> None:
        """Put the job in work back into the queue, and end the engines."""
        self._stop.set()
        if self._watch is not None:
            self._watch.stop.set()
        self._loop.join()

    def _run(self) -> None:
        sender = report = None
        try:
            store = JobStore(self._service)
            sender = WebhookSender(store)
            report = JobReport(store.index, self.state)
            while not self._stop.is_set():
                self._look_after(store)
                self._warm_up()
                job = store.index.claim(self._name)
                if job is None:
                    self._stop.wait(IDLE_SECONDS)
                else:
                    tell_start(job)
                    self._do(store, job)
                    tell_end(store.index, job.id)
        except BaseException:
            log.exception("the runner ends; Ray starts another one")
            os._exit(1)  # a thread's end alone would leave an actor that does nothing
        finally:
            self._close_pool()
            for thread in (sender, report):
                if thread is not None:
                    thread.stop()

    def _look_after(self, store: JobStore) -> None:
        if time.monotonic() >= self._next_clean_up:
            self._next_clean_up = time.monotonic() + CLEAN_UP_SECONDS
            clean_up(store)
        for job in store.index.recover():
            log.warning("job %s lost its runner and waits again", job, extra={"job": job})
        for job in store.index.expire():
            log.warning("job %s waited too long", job, extra={"job": job})

    def _warm_up(self) -> None:
        """Engines start with the service, not with its first job; where none does, it is tried again."""
        now = time.monotonic()
        if self._pool is not None and now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            lanes = self._pool.lanes()
            if lanes.ready or lanes.starting:
                self._trouble = None
                return
            self._say(self._pool.trouble() or "no engine answers")
            self._close_pool()
            self._next_pool = now + AGAIN_SECONDS
        if self._pool is None and now >= self._next_pool:
            try:
                self._pool = _pool(self._settings)
            except PipelineError as error:
                self._say(str(error))
                self._next_pool = now + AGAIN_SECONDS

    def _say(self, trouble: str) -> None:
        if trouble != self._trouble:
            log.error("no renderers: %s", trouble)
        self._trouble = trouble

    def _close_pool(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _do(self, store: JobStore, job: Job) -> None:
        self._watch = watch = JobWatch(store.index, job, self._name)
        said: dict[str, Any] = {}
        with watch:
            try:
                if job.attempt > MAX_ATTEMPTS:
                    raise RenderFailed(0, f"{job.attempt - 1} runners were lost with this job")
                if self._pool is None:
                    raise ConfigurationError(self._trouble or "there are no renderers")
                result = self._make(store, job, watch, self._pool)
            except JobCancelled:
                log.info("job %s stops: %s", job.id, watch.reason, extra={"job": job.id})
                if watch.reason == "timed_out":
                    limit = job.execution_seconds or 0
                    said = _error("timed_out", f"the job took longer than the {limit:g} s it may take")
            except InvalidRequest as error:
                if error.field == "job" and job.attempt < MAX_ATTEMPTS:
                    # A runner that is not quite dead holds its directory.
                    store.index.requeue(job.id, self._name)
                said = _error("invalid_input", str(error), error.field)
            except PipelineError as error:
                log.error("job %s failed: %s", job.id, error, extra={"job": job.id})
                said = _error(_code(error), str(error))
                if isinstance(error, ConfigurationError):
                    self._close_pool()  # the next job gets new renderers
            except Exception:
                log.exception("job %s failed in a way that nobody foresaw", job.id, extra={"job": job.id})
                said = _error("internal_error", "an error inside the service; its log tells more")
            else:
                watch.flush()
                result |= deliver(store, job)
                size = store.size(job.id)
                store.index.finish(job.id, self._name, "completed", result=result, size=size)
                return
            if said:
                store.index.finish(job.id, self._name, "failed", error=said)
            elif watch.reason == "stopping":
                store.index.requeue(job.id, self._name)

    def _make(self, store: JobStore, job: Job, watch: JobWatch, pool: RendererPool) -> dict[str, Any]:
        """Do the job's task; its result."""
        if job.task["kind"] == "redo":
            return self._redo(store, job, watch, pool)
        request = resolve(store, job, watch.stop)
        return render(
            request,
            self._settings,
            store.video(job.id),
            job_dir=store.work(job.id),
            name=job.id,
            pool=pool,
            on_progress=watch.progress,
        ).as_dict()

    def _redo(self, store: JobStore, job: Job, watch: JobWatch, pool: RendererPool) -> dict[str, Any]:
        """A segment anew; one that fails costs nobody the video that is there."""
        wanted = {name: job.task[name] for name in ("seam", "segment", "seed") if name in job.task}
        work = store.work(job.id)
        try:
            done = redo_part(work, self._settings, **wanted, pool=pool, on_progress=watch.progress)
        except JobCancelled:
            raise
        except PipelineError as error:
            log.error("the redo failed: %s", error, extra={"job": job.id})
            return {**(job.result or {}), "redo": {"success": False, "message": str(error)}}
        result: dict[str, Any] = json.loads(JobDirectory(work).result.read_text())
        return {**result, "redo": {k: v for k, v in done.as_dict().items() if k != "video_path"}}


def _pool(settings: Settings) -> RendererPool:
    """Renderers on all GPUs; where engines need none and there is none, some on the CPU."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = int(resources.get("GPU", 0))
    if gpus:
        return RendererPool(gpus, settings)
    if runs_on_cpu(settings):
        return RendererPool(DEFAULT_DRAFT_LANES, settings, gpus_each=0)
    raise ConfigurationError("the cluster has no GPU; INFINITETALK_ENGINE=draft renders previews without one")


def _code(error: PipelineError) -> str:
    """``RenderFailed`` is ``render_failed`` for clients."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()


def _error(code: str, message: str, field: str | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "field": field}


RunnerActor: Any = ray.remote(  # type: ignore[call-overload]
    num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=4
)(JobRunner)


def ensure_runner(service: ServiceSettings, settings: Settings) -> Any:
    """The cluster's runner, started where there is none; one with other settings is replaced.

    Raises Ray's errors.
    """
    runner = RunnerActor.options(
        name=NAME, namespace=NAMESPACE, lifetime="detached", get_if_exists=True
    ).remote(service, settings)
    state = ray.get(runner.state.remote())
    if state["settings"] == [service.model_dump_json(), settings.model_dump_json()]:
        return runner
    log.warning("the runner is replaced by one with the settings of now")
    stop_runner()
    return RunnerActor.options(
        name=NAME, namespace=NAMESPACE, lifetime="detached", get_if_exists=True
    ).remote(service, settings)


def stop_runner() -> None:
    """End the cluster's runner, if there is one; its job goes back into the queue."""
    try:
        runner = ray.get_actor(NAME, NAMESPACE)
    except ValueError:
        return
    ray.get(runner.stop.remote())
    ray.kill(runner)
