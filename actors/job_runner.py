"""The runner: the detached Ray actor that takes jobs from the store and renders them, several at once.

It holds no state that matters: whatever kills it, the next one goes on from the index and the job
directories.  How a job is made is the driver's business, how far it is ``job_watch``'s, and which job gets
which GPU the pool's: a job that prepares or joins has none.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import threading
import time
import uuid
from typing import Any

import ray
from ray.exceptions import RayError

from actors.driver import redo_part, render
from actors.job_report import JobReport, tell_end, tell_start
from actors.job_watch import JobWatch
from actors.pool import NAMESPACE, PoolView
from actors.pool_client import PoolClient
from pipeline.errors import (
    ConfigurationError,
    EngineError,
    InvalidRequest,
    JobCancelled,
    JobInUse,
    PipelineError,
    RenderFailed,
    code_of,
)
from pipeline.job import JobDirectory
from pipeline.job_inputs import resolve
from pipeline.job_records import Job
from pipeline.job_store import JobStore
from pipeline.logs import write_json_logs
from pipeline.result_delivery import deliver
from pipeline.retention import clean_up
from pipeline.service_settings import ServiceSettings
from pipeline.settings import Settings
from pipeline.webhooks import WebhookSender

NAME = "runner"
IDLE_SECONDS = 0.2
"""How often the runner looks for work."""
CLEAN_UP_SECONDS = 60.0
LOOK_SECONDS = 1.0
"""How often it looks at the pool."""
MAX_ATTEMPTS = 20
"""Runners that one job may lose, or find its directory held."""
HELD_SECONDS = 2.0
"""Before it is tried again."""
NO_GPU_SECONDS = 10.0
"""Before a job is tried again that has met no GPU."""
MORE_JOBS = 2
"""Jobs in work beside two for each GPU: those that prepare and join while others render."""
NICENESS = 19
"""Looking at inputs, joining and encoding wait where the API needs the CPU; engines are not the runner's."""

log = logging.getLogger(__name__)


class JobRunner:
    """Renders the jobs of one data directory on all GPUs of the cluster."""

    def __init__(self, service: ServiceSettings, settings: Settings) -> None:
        os.nice(NICENESS)
        self._service, self._settings = service, settings
        self._name = f"{socket.gethostname()[:30]}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._claims = itertools.count(1)
        self._pool: PoolClient | None = None
        self._view = PoolView(frozenset(), frozenset())
        self._stop = threading.Event()
        self._jobs: dict[threading.Thread, JobWatch] = {}
        self._trouble: str | None = None
        self._next_clean_up = self._next_look = 0.0
        write_json_logs(settings.log, node=socket.gethostname())
        for name in ("pipeline", "actors"):
            logging.getLogger(name).setLevel(logging.INFO)  # jobs' logs become events
        self._loop = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._loop.start()

    def state(self) -> dict[str, Any]:
        """For readiness: who runs, on what, and what is wrong where something is."""
        return {
            "runner": self._name,
            "pid": os.getpid(),
            "settings": [self._service.model_dump_json(), self._settings.model_dump_json()],
            "alive": self._loop.is_alive(),
            "gpus": len(self._view.ready),
            "starting": len(self._view.starting),
            "jobs": len(self._jobs),
            "trouble": self._trouble,
        }

    def stop(self) -> None:
        """Put the jobs in work back into the queue."""
        self._stop.set()
        self._loop.join()

    def _run(self) -> None:
        sender = report = None
        try:
            store = JobStore(self._service)
            sender = WebhookSender(store)
            report = JobReport(store.index, self.state)
            while not self._stop.is_set():
                self._look_after(store)
                self._look_at_the_pool(store)
                # A name for each claim: a thread that still ends must not take another claim for its own.
                holder, claimed = f"{self._name}/{next(self._claims)}", time.time()
                job = store.index.claim(holder) if self._has_room() else None
                if job is None:
                    self._stop.wait(IDLE_SECONDS)
                else:
                    self._begin(store, job, holder, claimed)
                    self._next_look = 0.0  # it is the pool that counts it now: it no longer waits outside
        except BaseException:
            log.exception("the runner ends; Ray starts another one")
            os._exit(1)  # a thread's end alone would leave an actor that does nothing
        finally:
            for watch in list(self._jobs.values()):
                watch.stop.set()
            for thread in list(self._jobs):
                thread.join()
            for helper in (sender, report):
                if helper is not None:
                    helper.stop()

    def _look_after(self, store: JobStore) -> None:
        if time.monotonic() >= self._next_clean_up:
            self._next_clean_up = time.monotonic() + CLEAN_UP_SECONDS
            clean_up(store)
        for job in store.index.recover():
            log.warning("job %s lost its runner and waits again", job, extra={"job": job})
        for job in store.index.expire():
            log.warning("job %s waited too long", job, extra={"job": job})

    def _look_at_the_pool(self, store: JobStore) -> None:
        """Engines start with the service, not with its first job, and stay warm as long as it runs."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        try:
            if self._pool is None:
                self._pool = PoolClient(self._settings)
            waiting = store.index.counts()["queued"]
            trouble: str | None
            self._view = self._pool.ask("backlog", self._name, waiting, not self._settings.max_gpus)
        except (PipelineError, RayError) as error:
            self._view, trouble = PoolView(frozenset(), frozenset()), str(error)
        else:
            usable = self._view.ready or self._view.starting
            trouble = None if usable else str(self._view.error or "no GPU of the cluster has an engine")
        if trouble is not None and trouble != self._trouble:
            log.error("no renderers: %s", trouble)
        self._trouble = trouble

    def _has_room(self) -> bool:
        """Whether another job would come forward: jobs without any GPU in sight wait in the queue."""
        lanes = len(self._view.ready | self._view.starting)
        if not lanes:  # but a cluster that grows by itself has to see that there is work
            return bool(self._settings.max_gpus) and not self._jobs
        return len(self._jobs) < 2 * lanes + MORE_JOBS

    def _begin(self, store: JobStore, job: Job, holder: str, claimed: float) -> None:
        watch = JobWatch(store.index, job, holder)

        def work() -> None:
            try:
                tell_start(job, claimed)
                self._do(store, job, watch, holder)
                tell_end(store.index, job.id)
                store.let_go(job.id)
            except BaseException:
                log.exception("job %s ends the runner; Ray starts another one", job.id, extra={"job": job.id})
                os._exit(1)
            finally:
                self._jobs.pop(threading.current_thread(), None)

        thread = threading.Thread(target=work, name=f"job-{job.id[:8]}", daemon=True)
        self._jobs[thread] = watch
        thread.start()

    def _do(self, store: JobStore, job: Job, watch: JobWatch, holder: str) -> None:
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
                if isinstance(error, JobInUse) and job.attempt < MAX_ATTEMPTS:
                    # A runner that is not quite dead holds its directory, or a thread that is just ending.
                    watch.stop.wait(HELD_SECONDS)
                    store.index.requeue(job.id, holder, counts=True)
                    return
                said = _error(code_of(error), str(error), error.field)
            except PipelineError as error:
                if watch.reason == "stopping":  # what it used was ended with this runner
                    log.info("job %s stops: %s", job.id, error, extra={"job": job.id})
                    store.index.requeue(job.id, holder)
                    return
                if (
                    isinstance(error, RenderFailed | EngineError | ConfigurationError)
                    and self._pool_is_empty()
                ):
                    log.warning("job %s waits for GPUs: %s", job.id, error, extra={"job": job.id})
                    watch.stop.wait(NO_GPU_SECONDS)
                    store.index.requeue(job.id, holder)
                    return
                log.error("job %s failed: %s", job.id, error, extra={"job": job.id})
                said = _error(code_of(error), str(error))
            except Exception:
                log.exception("job %s failed in a way that nobody foresaw", job.id, extra={"job": job.id})
                said = _error("internal_error", "an error inside the service; its log tells more")
            else:
                watch.flush()
                result |= deliver(store, job)
                size = store.size(job.id)
                held = store.index.finish(job.id, holder, "completed", result=result, size=size)
                if not held and job.task["kind"] == "redo":
                    store.index.correct(job.id, result)  # cancelled when its video was the new one already
                return
            if said:
                store.index.finish(job.id, holder, "failed", error=said, size=store.size(job.id))
            elif watch.reason == "stopping":
                store.index.requeue(job.id, holder)

    def _pool_is_empty(self) -> bool:
        """Whether all GPUs are gone: that is no job's fault."""
        try:
            view, _ = PoolClient(self._settings).ask("renderers")
        except (PipelineError, RayError):
            return True
        return not view.ready and not view.starting

    def _make(self, store: JobStore, job: Job, watch: JobWatch, pool: PoolClient) -> dict[str, Any]:
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
            priority=job.priority,
            pool=pool,
            on_progress=watch.progress,
        ).as_dict()

    def _redo(self, store: JobStore, job: Job, watch: JobWatch, pool: PoolClient) -> dict[str, Any]:
        """A segment anew; one that fails costs nobody the video that is there."""
        wanted = {name: job.task[name] for name in ("seam", "segment", "seed") if name in job.task}
        work = store.work(job.id)
        try:
            done = redo_part(
                work,
                self._settings,
                **wanted,
                name=job.id,
                priority=job.priority,
                pool=pool,
                on_progress=watch.progress,
            )
        except JobCancelled:
            raise
        except PipelineError as error:
            if watch.reason == "stopping" or (isinstance(error, JobInUse) and job.attempt < MAX_ATTEMPTS):
                raise
            log.error("the redo failed: %s", error, extra={"job": job.id})
            return {**(job.result or {}), "redo": {"success": False, "message": str(error)}}
        result: dict[str, Any] = json.loads(JobDirectory(work).result.read_text())
        return {**result, "redo": {k: v for k, v in done.as_dict().items() if k != "video_path"}}


def _error(code: str, message: str, field: str | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "field": field}


RunnerActor: Any = ray.remote(  # type: ignore[call-overload]
    num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=4
)(JobRunner)


def _runner(service: ServiceSettings, settings: Settings) -> Any:
    """On the head, whose disk has the data directory; with num_cpus=0 Ray would take any node."""
    return RunnerActor.options(
        name=NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        resources={"node:__internal_head__": 0.001},
    ).remote(service, settings)


def ensure_runner(service: ServiceSettings, settings: Settings) -> Any:
    """The cluster's runner, started where there is none; one with other settings is replaced.

    Raises Ray's errors.
    """
    runner = _runner(service, settings)
    state = ray.get(runner.state.remote())
    if state["settings"] == [service.model_dump_json(), settings.model_dump_json()]:
        return runner
    log.warning("the runner is replaced by one with the settings of now")
    stop_runner()
    return _runner(service, settings)


def stop_runner() -> None:
    """End the cluster's runner, if there is one; its job goes back into the queue."""
    try:
        runner = ray.get_actor(NAME, NAMESPACE)
    except ValueError:
        return
    ray.get(runner.stop.remote())
    ray.kill(runner)
