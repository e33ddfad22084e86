"""A job's side of the pool: asks for lanes, sends segments to their renderers, gives the lanes back.

``PoolClient`` is one per process and shared by all its jobs; ``LeasedRenderers`` is one per job and
implements ``pipeline.dispatch.Renderers``.  A pool that dies meanwhile is started again by Ray; segments in
work do not notice.  A job that was thought dead and comes back learns that its lanes are others' now: what it
had in work on them is lost, and nothing it sends there is done (``Lease``).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from actors.pool import NAMESPACE, JobEntry, Lease, Lent, PoolActor, PoolView
from actors.ray_errors import our_error
from pipeline.dispatch import Lanes
from pipeline.errors import ConfigurationError, EngineError, JobCancelled, PipelineError, RendererLost
from pipeline.messages import (
    RenderedSegment,
    RendererInfo,
    SegmentProgress,
    SegmentTask,
    WindowCheckpoint,
)
from pipeline.plan import latents
from pipeline.settings import Settings

PROGRESS_SECONDS = 1.0
WINDOWS_SECONDS = 5.0
CANCEL_SECONDS = 5.0
"""How long a segment may take to stop; then its engine is ended."""
ANSWER_SECONDS = 15.0
GONE_SECONDS = 60.0
"""How long the pool may be away, before jobs give up."""
BEAT_SECONDS = 2.0
AGAIN_SECONDS = 0.3
OTHERS_SECONDS = 20.0
"""How long a job waits for the other engines to start, once the first one answers."""

log = logging.getLogger(__name__)


class PoolClient:
    """The cluster's pool, started where there is none.  For all threads of a process."""

    def __init__(self, settings: Settings) -> None:
        """Needs a connection to Ray.

        Raises ``ConfigurationError`` where the pool's engines have other settings, and it is in use.
        """
        self._settings = settings
        self._name = pool_name()
        self._lock, self._agreeing = threading.Lock(), threading.Lock()
        self._pool = self._connect()
        self.agree()

    def agree(self) -> None:
        """A pool of our own settings in place of one with others.  Raises ``ConfigurationError``."""
        with self._agreeing:
            while (known := self.ask("settings")).of_engines() != self._settings.of_engines():
                self._replace(known)

    def _connect(self) -> Any:
        return PoolActor.options(
            name=self._name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            resources={"node:__internal_head__": 0.001},
        ).remote(self._name, self._settings)

    def _replace(self, known: Settings) -> None:
        used = [entry["job"] for entry in self.ask("status")["jobs"]]
        ours, theirs = self._settings.of_engines(), known.of_engines()
        names = ", ".join(f"INFINITETALK_{name.upper()}" for name in ours if ours[name] != theirs[name])
        if used:
            raise ConfigurationError(
                f"the GPUs of this cluster are in use by {len(used)} jobs with other settings ({names}); "
                "use the same, or wait for them to end"
            )
        log.warning("the pool of this cluster is started anew, with other settings: %s", names)
        self.end()
        self._pool = self._connect()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call the pool, again where it was being started anew.  Raises ``EngineError``."""
        deadline = time.monotonic() + GONE_SECONDS
        while True:
            pool = self._pool
            try:
                return ray.get(getattr(pool, method).remote(*arguments), timeout=ANSWER_SECONDS)
            except (RayActorError, TimeoutError) as error:
                if time.monotonic() > deadline:
                    raise our_error(error, "the pool") from error
                time.sleep(AGAIN_SECONDS)
                with self._lock:
                    if self._pool is pool and isinstance(error, RayActorError):
                        self._pool = self._connect()

    def tell(self, method: str, *arguments: Any) -> None:
        """Call the pool without waiting for an answer."""
        getattr(self._pool, method).remote(*arguments)

    def start(self, tick: Callable[[], None] = lambda: None) -> Sequence[RendererInfo]:
        """Wait until all engines answer that can; who the renderers are.  ``tick`` is called meanwhile.

        Raises the error of the first engine where none starts.
        """
        return _once_started(lambda: self.ask("renderers"), math.inf, tick)

    def gpus(self) -> int:
        """GPUs whose engine answers or is being started."""
        view, _ = self.ask("renderers")
        return len(view.ready | view.starting)

    @contextmanager
    def job(self, name: str, priority: int = 0, at_most: int | None = None) -> Iterator[LeasedRenderers]:
        """The renderers as one job sees them; whatever it has in work at the end is stopped.

        Raises ``ConfigurationError`` where others have given the pool other settings meanwhile, and use it.
        """
        self.agree()
        renderers = LeasedRenderers(self, JobEntry(f"{name}/{uuid.uuid4().hex[:6]}", priority, at_most))
        try:
            yield renderers
        finally:
            renderers.close()

    def end(self) -> None:
        """End the pool and all its engines."""
        with contextlib.suppress(RayError):
            ray.get(self._pool.close.remote(), timeout=ANSWER_SECONDS)
        ray.kill(self._pool)


class LeasedRenderers:
    """The lanes that one job has at the moment."""

    def __init__(self, pool: PoolClient, entry: JobEntry) -> None:
        self._pool, self._entry = pool, entry
        self._lock = threading.RLock()
        self._held: dict[int, _Loan] = {}
        self._work: dict[int, _Work] = {}
        self._asked: dict[Lease, Any] = {}
        """Questions for progress that were not answered yet."""
        self._returned: dict[Lease, tuple[Any, ...]] = {}
        """What was said of leases when they were given back: said again to a pool that has not heard it."""
        self._want, self._avoid = 0, frozenset[int]()
        self._view = PoolView(frozenset(), frozenset())
        self._heard = threading.Event()
        """Set whenever this job's wish has changed."""
        self._arrival: Future[None] = Future()
        self._closed = False
        self._gone: PipelineError | None = None
        self._settling = ThreadPoolExecutor(1, thread_name_prefix="settling")
        self._thread = threading.Thread(target=self._keep_asking, name="lanes", daemon=True)
        self._thread.start()

    def start(self, tick: Callable[[], None]) -> Sequence[RendererInfo]:
        """Wait until engines answer; those that the job should be cut for now.

        Others that are being started are waited for, some seconds at most; ``tick`` is called meanwhile.
        Raises the error of the first engine where none starts.
        """

        def look() -> tuple[PoolView, Sequence[RendererInfo]]:
            found: tuple[PoolView, Sequence[RendererInfo]] = self._pool.ask("share", self._entry)
            with self._lock:
                self._view = found[0]  # or the first question for lanes might find none
            return found

        infos = _once_started(look, OTHERS_SECONDS, tick)
        self._entry = replace(self._entry, planned=True)
        return infos

    def lanes(self) -> Lanes:
        """Lanes that this job has and that are idle; others of the pool may come."""
        with self._lock:
            if self._gone is not None:
                raise self._gone
            idle = frozenset(lane for lane in self._held if lane not in self._work)
            return Lanes(idle, (self._view.ready | self._view.starting) - idle)

    def want(self, count: int, avoid: frozenset[int] = frozenset()) -> None:
        """So many lanes more could be used now, none of ``avoid``; idle ones beyond that are given back."""
        with self._lock:
            idle = [lane for lane in self._held if lane not in self._work]
            keep = [lane for lane in idle if lane not in avoid][:count]
            for lane in idle:
                if lane not in keep:
                    self._give_back(self._held[lane], 0.0)
            count -= len(keep)
            if (count, avoid) != (self._want, self._avoid):
                self._want, self._avoid = count, avoid
                self._heard.set()

    def arrival(self) -> Future[None]:
        """Done as soon as there is another lane, or news of them."""
        with self._lock:
            if self._arrival.done():
                self._arrival = Future()
            return self._arrival

    def _keep_asking(self) -> None:
        """``_ask_on``, whose end the job must hear of: it would wait for lanes for ever."""
        try:
            self._ask_on()
        except BaseException as error:
            with self._lock:
                self._gone = error if isinstance(error, PipelineError) else our_error(error, "the pool")
                self._tell_arrival()
            if not isinstance(error, PipelineError):
                raise

    def _ask_on(self) -> None:
        """The job's line to the pool: its wish, its sign of life, and what it gets.

        Raises ``EngineError`` once the pool is gone for good, ``ConfigurationError`` where it is another's,
        with other settings, and in use.
        """
        silent_since = time.monotonic()
        stay: Any = None
        while not self._closed:
            pool = self._pool._pool
            if stay is None:
                stay = pool.stay.remote(self._entry)
                pool.watch.remote(self._entry.job, [stay])
            self._heard.clear()
            with self._lock:
                want, avoid, entry = self._want, self._avoid, self._entry
                held = frozenset(loan.lease for loan in self._held.values())
            try:
                lent: Lent = ray.get(pool.lend.remote(entry, want, avoid, held), timeout=ANSWER_SECONDS)
            except (RayError, TimeoutError) as error:
                if time.monotonic() - silent_since > GONE_SECONDS:
                    raise our_error(error, "the pool") from error
                stay = None
                self._heard.wait(AGAIN_SECONDS)
                with contextlib.suppress(EngineError, RayError):
                    self._pool.agree()  # connects again where that is needed
                continue
            silent_since = time.monotonic()
            with self._lock:
                changed = lent.view != self._view
                self._view = lent.view
                for lease in lent.gone:
                    if lease.lane not in self._work and self._is_held(lease):
                        del self._held[lease.lane]
                taken = [entry for entry in lent.lanes if self._take(*entry)]
                if taken or changed:
                    self._tell_arrival()
                idle = self._want == 0
            if idle:
                self._heard.wait(BEAT_SECONDS)
            elif len(taken) < len(lent.lanes):
                self._heard.wait(AGAIN_SECONDS)

    def _is_held(self, lease: Lease) -> bool:
        return lease.lane in self._held and self._held[lease.lane].lease == lease

    def _take(self, lease: Lease, renderer: Any) -> bool:
        """A lane has come; False where it can't be used."""
        if lease in self._returned:  # the pool has not heard it yet, or never will
            self._pool.tell("give_back", self._entry.job, lease, *self._returned[lease])
            return False
        if self._closed or lease.lane in self._held:
            return False
        self._held[lease.lane] = _Loan(lease, renderer)
        self._want = max(0, self._want - 1)
        return True

    def _tell_arrival(self) -> None:
        if not self._arrival.done():
            self._arrival.set_result(None)

    def submit(self, task: SegmentTask, lane: int) -> Future[RenderedSegment]:
        """Render on a lane that ``lanes`` has named; afterwards it is given back.

        A lost renderer is the pool's to replace, and the future fails with ``RendererLost``; so it does where
        the pool has taken the lane back.
        """
        result: Future[RenderedSegment] = Future()
        with self._lock:
            loan = self._held.get(lane)
            if loan is None:
                result.set_exception(RendererLost(task.index, f"GPU {lane} was taken back"))
                return result
            work = self._work[lane] = _Work(task, loan, result, time.monotonic())

        def settle(rays: Future[RenderedSegment]) -> None:
            # Whatever happens here, somebody waits for the result.
            try:
                self._settle(lane, work, rays)
            except BaseException as trouble:
                result.set_exception(RendererLost(task.index, f"GPU {lane}: {trouble}"))
                raise

        def hand_over(rays: Future[RenderedSegment]) -> None:
            # Ray calls back on a thread of its core: a call into Ray from there waits for itself.
            with contextlib.suppress(RuntimeError):  # closed meanwhile: nobody waits for the result
                self._settling.submit(settle, rays)

        called = loan.renderer.render.remote(task, self._entry.job, loan.lease.number)
        called.future().add_done_callback(hand_over)
        return result

    def _settle(self, lane: int, work: _Work, rays: Future[RenderedSegment]) -> None:
        error, task = rays.exception(), work.task
        seconds = time.monotonic() - work.began
        with self._lock:
            self._work.pop(lane, None)  # or the last result stays in the object store
        if error is None:
            rendered = rays.result()
            lengths = task.windows[task.first : task.first + len(rendered.window_seconds)]
            recipe = task.recipe
            size = recipe.width * recipe.height * recipe.steps
            self._give_back(work.loan, seconds, units=float(size * sum(map(latents, lengths))))
            work.result.set_result(rendered)
            return
        ours = our_error(error, f"the renderer of GPU {lane}")
        lost = isinstance(ours, EngineError)
        self._give_back(work.loan, seconds, lost=str(ours) if lost else None)
        if lost:
            ours = RendererLost(task.index, str(ours))
        elif isinstance(ours, JobCancelled) and not work.cancelled:
            ours = RendererLost(task.index, f"GPU {lane} was taken back: this job was silent for too long")
        work.result.set_exception(ours)

    def _give_back(self, loan: _Loan, seconds: float, units: float = 0.0, lost: str | None = None) -> None:
        with self._lock:
            if self._held.get(loan.lease.lane) is not loan:
                return  # it was given back already, and may be here again under another lease
            del self._held[loan.lease.lane]
            self._returned[loan.lease] = (seconds, units, lost)
        self._pool.tell("give_back", self._entry.job, loan.lease, seconds, units, lost)

    def progress(self) -> Sequence[SegmentProgress]:
        """What the busy renderers say; one that does not answer is left out, and not waited for again."""
        with self._lock:
            loans = [self._held[lane] for lane in self._work if lane in self._held]
        late, self._asked = self._asked, {}
        for loan in loans:
            ask = loan.renderer.progress.remote
            self._asked[loan.lease] = late.get(loan.lease) or ask(loan.lease.number)
        fresh = [asked for lease, asked in self._asked.items() if lease not in late]
        if fresh:
            ray.wait(fresh, num_returns=len(fresh), timeout=PROGRESS_SECONDS)
        seen: list[SegmentProgress] = []
        for lease, asked in list(self._asked.items()):
            if not ray.wait([asked], timeout=0)[0]:
                continue
            del self._asked[lease]
            try:
                progress = ray.get(asked)
            except RayError:
                continue  # its render call fails too, and tells why
            if progress is not None:
                seen.append(progress)
        return seen

    def windows(self, lane: int, segment: int, first: int) -> Sequence[WindowCheckpoint]:
        """Finished windows of the segment in work on a lane; none where its renderer does not answer."""
        with self._lock:
            loan = self._held.get(lane)
            if loan is None or lane not in self._work or loan.lease in self._asked:
                return ()  # one that does not tell its progress would hold up the others' windows
        try:
            found: Sequence[WindowCheckpoint] = ray.get(
                loan.renderer.windows.remote(loan.lease.number, segment, first), timeout=WINDOWS_SECONDS
            )
        except (RayError, TimeoutError):
            return ()  # its render call fails too, and tells why
        return found

    def cancel(self, lane: int | None = None) -> None:
        """Interrupt the engines in work (or that of one lane) and wait for them, a few seconds at most."""
        with self._lock:
            busy = {at: work for at, work in self._work.items() if lane in (None, at)}
            for at, work in busy.items():
                work.cancelled = True
                if at in self._held:
                    self._held[at].renderer.cancel.remote(self._held[at].lease.number)
        _, late = wait([work.result for work in busy.values()], timeout=CANCEL_SECONDS)
        for at, work in busy.items():
            if work.result in late:
                said = f"it did not stop within {CANCEL_SECONDS:g} s"
                log.warning("GPU %d: %s; its engine is ended", at, said)
                self._give_back(work.loan, time.monotonic() - work.began, lost=said)  # the pool replaces it

    def close(self) -> None:
        """Give everything back; what is still in work is stopped by the pool."""
        self._closed = True
        self._heard.set()
        self._settling.shutdown(wait=True, cancel_futures=True)
        self._pool.tell("leave", self._entry.job)
        self._thread.join()
        self._pool.tell("leave", self._entry.job)  # a last question may have come after the first one


def _once_started(
    look: Callable[[], tuple[PoolView, Sequence[RendererInfo]]],
    patience: float,
    tick: Callable[[], None] = lambda: None,
) -> Sequence[RendererInfo]:
    """The renderers, as soon as no engine is being started, or ``patience`` seconds after the first is up."""
    first: float | None = None
    while True:
        view, infos = look()
        if view.ready and first is None:
            first = time.monotonic()
        if infos and (not view.starting or time.monotonic() > (first or 0.0) + patience):
            if view.error is not None:
                log.warning("a GPU is left out: %s", view.error)
            return infos
        if not view.ready and not view.starting and view.error is not None:
            raise view.error
        tick()
        time.sleep(AGAIN_SECONDS)


@dataclass(frozen=True, slots=True)
class _Loan:
    """A lane that this job has."""

    lease: Lease
    renderer: Any


@dataclass(slots=True)
class _Work:
    """A segment in work."""

    task: SegmentTask
    loan: _Loan
    result: Future[RenderedSegment]
    began: float
    cancelled: bool = False
    """By this job itself."""


def pool_name() -> str:
    """What the pool of this code is called in Ray."""
    return f"pool-{code_mark()}"


@cache
def code_mark() -> str:
    """Digest of this code: nodes and drivers with another one have another pool."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for folder in ("pipeline", "actors", "workflows"):
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in (".py", ".json", ".yaml"):
                digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]
