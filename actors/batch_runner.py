"""The runner of a batch: many jobs in one driver process, on one pool of renderers.

Several jobs are in work at once, so that one is prepared or joined while others render; which GPU takes which
segment is the pool's decision.  What is on disk is ``pipeline.batch_folder``'s business, what people see
``batch_terminal``'s.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from actors.driver import open_pool, render
from actors.pool_client import PoolClient
from pipeline import ffmpeg
from pipeline.batch_folder import BatchFolder, Record, Results
from pipeline.batch_manifest import BatchJob, in_order
from pipeline.engine import engine_kind
from pipeline.errors import InvalidRequest, JobCancelled, PipelineError, StorageError, code_of
from pipeline.job import JobDirectory
from pipeline.progress import JobProgress
from pipeline.remote_files import download, is_remote, upload
from pipeline.result import RenderResult
from pipeline.safe_fetch import FetchLimits
from pipeline.settings import Settings

NEWS_SECONDS = 30.0
"""Between two lines of the log that tell how far the batch is."""
LIMITS = FetchLimits(max_bytes=16 << 30, seconds=2 * 3600)
"""Of one file that comes over the network."""
GRACE_SECONDS = 1.0
"""After a cancellation, before ffmpeg is ended too: `ray job stop` kills after 3 s."""
LEAVE_SECONDS = 10.0
"""After a cancellation, before work that does not stop is left to the end of the process."""

log = logging.getLogger("batch")


MORE_JOBS = 2
"""Jobs in work beside one for each GPU: those that prepare and join while others render."""
BEAT_SECONDS = 3.0
"""How often the pool is told how many jobs wait."""


@dataclass(frozen=True, slots=True)
class BatchState:
    """How far a batch is."""

    jobs: int
    before: int
    """Done by an earlier run."""
    done: int
    failed: int
    running: tuple[tuple[BatchJob, JobProgress | None], ...]
    elapsed: float
    gpus: int
    gpu_seconds: float
    """Of the windows of finished jobs that this run rendered."""
    gpu_busy: float | None
    """Their share of the time since the renderers were there, of all GPUs; None where none was needed."""

    @property
    def fraction(self) -> float:
        """Share of this run's work that is over, 0 to 1, each job counted the same."""
        todo = self.jobs - self.before
        share = sum(0.99 * seen.fraction for _, seen in self.running if seen is not None)  # joining comes
        return (self.done + self.failed + share) / todo if todo else 1.0

    @property
    def left_seconds(self) -> float | None:
        """By the pace so far; None while there is none."""
        return self.elapsed / self.fraction * (1 - self.fraction) if self.fraction else None


class BatchRunner:
    """Renders what is not done yet."""

    def __init__(
        self, jobs: Sequence[BatchJob], folder: BatchFolder, results: Results, settings: Settings
    ) -> None:
        self._jobs, self._folder, self._results, self._settings = jobs, folder, results, settings
        self._engine = engine_kind(settings)
        self._name = f"batch-{uuid.uuid4().hex[:8]}"
        self._waiting: deque[BatchJob] = deque()
        self._running: dict[str, tuple[BatchJob, JobProgress | None]] = {}
        self._before = self._done = self._failed = 0
        self._count = threading.Lock()
        self._stop = threading.Event()
        self._over = threading.Event()
        """Every worker has ended, or the batch can't go on."""
        self._engines_are_up = threading.Event()
        self._trouble: BaseException | None = None
        self._began = time.monotonic()
        self._ready: float | None = None
        """Since when the renderers answer."""
        self._ended: float | None = None
        self._gpus, self._gpu_seconds = 0, 0.0
        self._at_most: int | None = None
        """GPUs of each job, of a cluster that others use too."""

    def state(self) -> BatchState:
        """How far it is now; from any thread."""
        with self._count:
            running = tuple(self._running.values())
            now = self._ended or time.monotonic()
            rendering = 0.0 if self._ready is None else self._gpus * (now - self._ready)
            return BatchState(
                jobs=len(self._jobs),
                before=self._before,
                done=self._done,
                failed=self._failed,
                running=running,
                elapsed=now - self._began,
                gpus=self._gpus,
                gpu_seconds=self._gpu_seconds,
                gpu_busy=self._gpu_seconds / rendering if rendering else None,
            )

    def run(self, gpus: int | None, on_news: Callable[[BatchState], None]) -> None:
        """Render; a job that fails is told in the results and stops no other.

        ``on_news`` is called now and then.  Raises ``JobCancelled`` for a KeyboardInterrupt, ``StorageError``
        where results can't be stored, and what the pool says where no renderer starts.
        """
        self._at_most = gpus
        try:
            self._look_at_earlier_results()
            if self._waiting:
                with open_pool(self._settings, gpus) as pool:
                    self._render(pool, on_news)
        except BaseException as error:
            try:
                self._results.close()
            except StorageError as unstored:
                log.error("%s; the same command stores the results", unstored)
            if isinstance(error, KeyboardInterrupt):
                raise JobCancelled("batch") from None
            raise
        self._results.close()

    def _look_at_earlier_results(self) -> None:
        left = self._folder.left_over()
        todo = []
        for job in self._jobs:
            last = self._results.last.get(job.id, {})
            if last.get("status") == "done":
                with suppress(InvalidRequest):  # a file that is gone meanwhile: told when its turn comes
                    if last.get("digest") == job.digest(self._engine):
                        self._before += 1
                        for folder in left.get(job.id, ()):
                            shutil.rmtree(folder, ignore_errors=True)
                        continue
                log.info("changed since it was made, and done again", extra={"job": job.id, "line": job.line})
            todo.append(job)
        self._waiting.extend(in_order(todo))
        log.info("%d jobs: %d done before, %d to do", len(self._jobs), self._before, len(self._waiting))

    def _render(self, pool: PoolClient, on_news: Callable[[BatchState], None]) -> None:
        # The first jobs are prepared while the engines start.
        lanes = max(pool.gpus(), self._settings.max_gpus)  # a cluster that grows sees what waits
        lanes = lanes if self._at_most is None else min(lanes, self._at_most)
        count = min(lanes + MORE_JOBS, len(self._waiting))
        left = [count]

        def work() -> None:
            try:
                while not self._stop.is_set():
                    try:
                        job = self._waiting.popleft()
                    except IndexError:
                        return
                    self._do(job, pool)
            except BaseException as error:  # noqa: BLE001 - the main thread raises it
                self._trouble = self._trouble or error
                self._over.set()
            finally:
                with self._count:
                    left[0] -= 1
                    if not left[0]:
                        self._over.set()

        def tell() -> None:
            pool.tell(
                "backlog", self._name, len(self._waiting) or int(not self._engines_are_up.is_set()), True
            )

        # Daemons: what hangs in a system call must not keep the process.
        threads = [threading.Thread(target=work, name=f"job-{n}", daemon=True) for n in range(count)]
        for thread in threads:
            thread.start()
        try:
            self._gpus, self._ready = len(pool.start(tell)), time.monotonic()
            self._engines_are_up.set()
            news = time.monotonic() + NEWS_SECONDS
            while not self._over.wait(BEAT_SECONDS):
                tell()
                if time.monotonic() >= news:
                    news += NEWS_SECONDS
                    on_news(self.state())
        finally:
            self._ended = time.monotonic()
            self._stop.set()
            self._engines_are_up.set()  # or whoever waits for them does so for ever
            try:
                self._results.close()  # now: what cancels may kill soon
            except StorageError as error:
                log.warning("the results are not stored yet: %s", error)  # ``run`` tries once more
            _wait_for(threads)
        if self._trouble is not None:
            raise self._trouble

    def _do(self, job: BatchJob, pool: PoolClient) -> None:
        """One job from its files to its line in the results."""
        began = time.monotonic()
        with self._count:
            self._running[job.id] = (job, None)
        try:
            try:
                digest = job.digest(self._engine)
                work = self._folder.job(job, digest)
                self._forget_other(job, work)
                result = self._make(job, work, pool)
            except JobCancelled:
                return
            except StorageError as error:
                if self._stop.is_set():
                    return
                if self._folder.holds(error.path):
                    raise  # every other job would meet it too
                self._fail(job, error, began)
            except PipelineError as error:
                if not self._stop.is_set():  # else its ffmpeg or its renderer was ended
                    self._fail(job, error, began)
            except Exception as error:
                log.exception("failed in a way that nobody foresaw", extra={"job": job.id})
                if not self._stop.is_set():
                    self._fail(job, PipelineError(f"{type(error).__name__}: {error}"), began)
            else:
                try:
                    self._folder.keep_timeline(job, JobDirectory(work / "job"))
                except StorageError as error:
                    log.warning("its timeline is not kept: %s", error, extra={"job": job.id})
                self._results.append(self._record(job, began, digest, result))
                self._forget_other(job, None)
                if self._folder.address is not None:
                    self._folder.video(job).unlink(missing_ok=True)
                with self._count:
                    self._done += 1
                    self._gpu_seconds += result.timings["gpu_seconds"]
                log.info(
                    "done",
                    extra={
                        "job": job.id,
                        "line": job.line,
                        "frames": result.frames,
                        "seconds": round(time.monotonic() - began, 1),
                        "gpus": result.gpu_count,
                        "segments": result.segments_processed,
                        "output": self._folder.place(job),
                    },
                )
        finally:
            with self._count:
                del self._running[job.id]

    def _make(self, job: BatchJob, work: Path, pool: PoolClient) -> RenderResult:
        """The video, where it is to be."""
        files = {}
        for field, source in job.sources.items():
            if is_remote(source):
                # The suffix helps decoders; a rerun of the job needs the network no more.
                files[field] = work / "fetched" / (field + Path(source.partition("?")[0]).suffix[:10])
                if not files[field].exists():
                    download(source, files[field], field, LIMITS, self._stop)
            else:
                files[field] = Path(source)
        request = job.request(files)
        if JobDirectory(work / "job").has_segments:
            log.info("goes on with the segments and windows that are kept", extra={"job": job.id})

        def seen(progress: JobProgress) -> None:
            if progress.stage == "starting":
                self._engines_are_up.wait()  # where none comes up, that is no job's fault
            if self._stop.is_set():
                raise JobCancelled(job.id)
            with self._count:
                self._running[job.id] = (job, progress)

        def made() -> RenderResult:
            return render(
                request,
                self._settings,
                self._folder.video(job),
                gpus=self._at_most,
                job_dir=work / "job",
                name=job.id,
                priority=job.priority,
                pool=pool,
                watched=False,
                on_progress=seen,
            )

        try:
            result = made()
        except InvalidRequest as error:
            if error.field != "job-dir":
                raise
            log.warning("what was kept is of other engine settings; begins anew", extra={"job": job.id})
            shutil.rmtree(work / "job", ignore_errors=True)
            result = made()
        if self._folder.address is not None:
            upload(self._folder.video(job), self._folder.place(job), "video/mp4")
        return result

    def _forget_other(self, job: BatchJob, keep: Path | None) -> None:
        for folder in self._folder.left_over().get(job.id, ()):
            if folder != keep:
                shutil.rmtree(folder, ignore_errors=True)

    def _fail(self, job: BatchJob, error: PipelineError, began: float) -> None:
        record = self._record(job, began)
        field = error.field if isinstance(error, InvalidRequest) else None
        record["error"] = {"code": code_of(error), "message": str(error), "field": field}
        self._results.append(record)
        with self._count:
            self._failed += 1
        log.error("failed: %s", error, extra={"job": job.id, "line": job.line, "code": code_of(error)})

    def _record(
        self, job: BatchJob, began: float, digest: str | None = None, result: RenderResult | None = None
    ) -> Record:
        record: dict[str, Any] = {
            "id": job.id,
            "line": job.line,
            "status": "failed" if result is None else "done",
            "ended": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "seconds": round(time.monotonic() - began, 3),
            "engine": self._engine,
        }
        if result is not None:
            record |= {
                "output": self._folder.place(job),
                "frames": result.frames,
                "fps": result.fps,
                "width": result.width,
                "height": result.height,
                "gpu_count": result.gpu_count,
                "segments": result.segments_processed,
                "gpu_seconds": round(result.timings["gpu_seconds"], 3),
                "seams": [{"frame": seam.frame, "verdict": seam.verdict} for seam in result.seams],
                "digest": digest,
            }
        return record


def _wait_for(threads: Sequence[threading.Thread]) -> None:
    """Until the workers have ended; what they wait for is ended after a moment."""
    began = time.monotonic()
    for thread in threads:
        thread.join(max(0.0, began + GRACE_SECONDS - time.monotonic()))
    while any(thread.is_alive() for thread in threads):
        if time.monotonic() > began + LEAVE_SECONDS:
            log.warning("some work does not stop; it ends with this process")
            return
        ffmpeg.end_all()
        next(thread for thread in threads if thread.is_alive()).join(0.2)
