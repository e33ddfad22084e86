"""The pool: the one detached actor of a cluster that owns the renderers and lends them to jobs.

There is one for each version of this code.  It makes a renderer for every GPU of the cluster, watches them,
and gives lanes to jobs by ``pipeline.scheduling``.  Renderers are detached, too, so a pool that is killed
takes none along: Ray starts it again, and it finds them and asks what they do.  Jobs reach it through
``pool_client``; segments go from there to the renderers directly.

What a job gets is a *lease* of a lane.  Leases are numbered, and the numbers only grow: a renderer serves
none that is older than one it was told to end, so a job that was thought dead and comes back disturbs nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import metrics
from actors.ray_errors import our_error
from actors.renderer import RendererActor
from pipeline.engine import runs_on_cpu
from pipeline.errors import ConfigurationError, EngineError, PipelineError
from pipeline.job import finished
from pipeline.logs import write_json_logs
from pipeline.messages import RendererInfo
from pipeline.scheduling import Claim, FairShares, Speeds, gpus_for
from pipeline.settings import Settings

NAMESPACE = "infinitetalk"
CPU_LANES = 2
"""Renderers on a cluster without GPUs, for engines that run on the CPU."""
LOOK_SECONDS = 0.5
"""Between two looks at nodes, renderers and jobs."""
HOLD_SECONDS = 2.0
"""How long a job's question for lanes is held open."""
SILENT_SECONDS = 10.0
"""A job that has not asked for so long is dead; its lanes are taken back."""
LATE_SECONDS = 2.0
"""A pool that looks so late was held up itself (a busy machine, a suspended one)."""
ANSWER_SECONDS = 10.0
"""How long a renderer may take to say how it is."""
HEALTH_SECONDS = 10.0
"""Between two questions to an idle engine."""
STOP_SECONDS = 8.0
DRAIN_SECONDS = 8.0
"""How long a renderer whose job is gone may take to stop; then it is killed."""
DRAIN_LOOK_SECONDS = 0.2
RESUME_SECONDS = 3.0
"""How long a pool that was started again leaves idle renderers to the jobs that had them."""
SCHEDULING_SECONDS = 60.0
"""How long Ray may take to find a GPU for a renderer, on top of the engine's own time to start."""
MOST_BACK_OFF_SECONDS = 60.0
STARTS_TRIED = 4
"""An engine that ran before, and does not start again so many times, is not waited for any more."""
FENCED_AFTER = 3
"""Jobs in a row that lost a GPU: it is not used any more until somebody says so."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JobEntry:
    """A job as the pool knows it."""

    job: str
    priority: int = 0
    at_most: int | None = None
    """GPUs at once; None: all."""
    planned: bool = False
    """Whether it has been cut already."""


@dataclass(frozen=True, slots=True)
class PoolView:
    """How the pool is: lanes whose engine answers, lanes that may come, and the first trouble there is."""

    ready: frozenset[int]
    starting: frozenset[int]
    error: PipelineError | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """A lane that one job has."""

    lane: int
    number: int


@dataclass(frozen=True, slots=True)
class Lent:
    """The answer to a job that wants lanes: leases that it did not name, with their renderers."""

    lanes: tuple[tuple[Lease, Any], ...]
    gone: frozenset[Lease]
    """Leases that it named, and that are over."""
    view: PoolView


@dataclass(slots=True)
class _JobState:
    """A job that talks to the pool."""

    entry: JobEntry
    seen: float
    wish: int = 0
    """Lanes that it said it could use beside those it has."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Slot:
    """One GPU: its renderer, and who has it."""

    lane: int
    node: str
    index: int
    on_cpu: bool = False
    renderer: Any = None
    deadline: float = 0.0
    """Until then a start that is under way counts."""
    info: RendererInfo | None = None
    error: PipelineError | None = None
    starts_failed: int = 0
    retry_at: float = 0.0
    holder: str | None = None
    lease: int | None = None
    """Of the holder."""
    changed: float = 0.0
    """When it was lent, or came back."""
    adopted: float | None = None
    """When it was taken over from the pool's last life, as long as nobody was given it since."""
    host: str = ""
    """The name of its node, once its engine has answered."""
    worked: bool = False
    """Whether its engine has answered before."""
    lost_by: list[str] = field(default_factory=list)
    """Jobs that lost it, in a row."""
    fenced: bool = False
    draining: bool = False
    """Its job is gone, and it was told to stop."""
    leaving: bool = False
    """It is let go for want of work."""
    asked: float = 0.0
    """When its health was asked for."""
    in_doubt: bool = False
    """It is being asked, because its node has just lost another renderer."""
    restarts: int = 0

    @property
    def ready(self) -> bool:
        return self.info is not None and not self.fenced

    @property
    def free(self) -> bool:
        busy = self.holder is not None or self.draining or self.in_doubt or self.leaving
        return self.ready and not busy

    @property
    def kind(self) -> str:
        return "" if self.info is None else f"{self.info.device}, {self.info.engine}"


class GpuPool:
    """All renderers of a cluster.  An async actor: everything runs on its one event loop."""

    def __init__(self, name: str, settings: Settings) -> None:
        write_json_logs(settings.log, node=socket.gethostname(), pool=name)
        self._name, self._settings = name, settings
        self._shares = FairShares()
        self._speeds = Speeds(_read_speeds(settings.speeds_path))
        self._speeds_changed = False
        self._slots: dict[tuple[str, int], _Slot] = {}
        self._jobs: dict[str, _JobState] = {}
        self._backlogs: dict[str, tuple[int, bool, float]] = {}
        self._generation = 0
        self._first_lease = time.time_ns()  # above those of the pool's last life
        self._leases = itertools.count(self._first_lease)
        self._let_go: set[tuple[str, int]] = set()
        """Places without an engine because there was no work for one."""
        self._retired = self._closed = self._saw_gpus = False
        self._used = self._looked = time.monotonic()
        self._asked_for: int | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._resumed = asyncio.Event()
        """The renderers of the pool's last life are known, and the cluster's GPUs."""
        self._loop = asyncio.get_running_loop().create_task(self._run())

    # --- jobs ------------------------------------------------------------------------------------

    async def lend(self, entry: JobEntry, want: int, avoid: frozenset[int], held: frozenset[Lease]) -> Lent:
        """Lanes for a job that wants ``want`` more than those it holds; waits up to 2 s for the first one.

        Also a job's sign of life: one that is silent is dropped.  ``held`` are the leases it knows of, so an
        answer that got lost is given again, and a pool that was started again learns what was lent.
        """
        await self._resumed.wait()
        job, claim = self._enter(entry)
        gone = self._compare(entry.job, held)
        claim.want, claim.avoid, job.wish = want, avoid, want
        self._grant()
        if want and not self._untold(entry.job, held):
            job.news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(job.news.wait(), HOLD_SECONDS)
        if self._jobs.get(entry.job) is not job:  # it has left meanwhile
            return Lent((), held, self._view())
        claim.want = 0  # nothing is given to a job that does not listen
        job.seen = self._used = time.monotonic()
        new = self._untold(entry.job, held)
        job.wish = max(0, want - len(new))
        return Lent(new, gone, self._view())

    def _enter(self, entry: JobEntry) -> tuple[_JobState, Claim]:
        now = time.monotonic()
        claim = self._shares.enter(entry.job, entry.priority, entry.at_most)
        job = self._jobs.setdefault(entry.job, _JobState(entry, now))
        job.entry, job.seen, self._used = entry, now, now
        return job, claim

    def _untold(self, job: str, held: frozenset[Lease]) -> tuple[tuple[Lease, Any], ...]:
        mine = [slot for slot in self._slots.values() if slot.holder == job and slot.lease is not None]
        leases = [(Lease(slot.lane, slot.lease or 0), slot.renderer) for slot in mine]
        return tuple(entry for entry in leases if entry[0] not in held)

    def _compare(self, job: str, held: frozenset[Lease]) -> frozenset[Lease]:
        """Leases that the job believes in, and that are not (any more)."""
        gone = set()
        for lease in held:
            slot = self._lane(lease.lane)
            if slot is not None and slot.holder == job and slot.lease == lease.number:
                continue
            old = lease.number < self._first_lease
            if slot is not None and slot.adopted is not None and slot.free and old:
                self._give(slot, job, lease.number)  # lent by the pool's last life
            else:
                gone.add(lease)
        return frozenset(gone)

    async def stay(self, entry: JobEntry) -> None:
        """Returns when the job has left: an answer that ``watch`` can wait for."""
        await self._resumed.wait()
        await self._enter(entry)[0].over.wait()

    async def watch(self, job: str, stay: Sequence[Any]) -> None:
        """``stay``: the reference to the answer of ``stay``, in a list, which its caller's process owns.

        Ray tells everybody who waits for it when that process is dead, some seconds before its job is silent
        for too long; windows that were rendered meanwhile would be lost.
        """
        with contextlib.suppress(RayError):
            await stay[0]
            return
        if job in self._jobs:
            log.warning("the process of job %s is gone; its GPUs are taken back", job, extra={"job": job})
            await self.leave(job)

    async def share(self, entry: JobEntry) -> tuple[PoolView, Sequence[RendererInfo]]:
        """How the pool is, and the renderers that a job should be cut for now, free and fast ones first."""
        await self._resumed.wait()
        if entry.job not in self._jobs:
            self._enter(entry)
        ready = [slot for slot in self._slots.values() if slot.ready]
        waiting = sum(count for count, _, _ in self._backlogs.values())
        unplanned = sum(not job.entry.planned for job in self._jobs.values())
        count = gpus_for(
            len(ready),
            sum(slot.free for slot in ready),
            len(self._jobs) + waiting,
            unplanned + waiting,
            entry.at_most,
        )
        speeds = self._relative_speeds()
        ready.sort(key=lambda slot: (not slot.free, -speeds[slot.lane], slot.lane))
        infos = [
            replace(slot.info, speed=speeds[slot.lane]) for slot in ready[:count] if slot.info is not None
        ]
        return self._view(), sorted(infos, key=lambda info: info.lane)

    async def renderers(self) -> tuple[PoolView, Sequence[RendererInfo]]:
        """How the pool is, and all renderers whose engine answers, by lane; who asks will want them soon."""
        await self._resumed.wait()
        self._used = time.monotonic()
        if not self._slots:
            self._let_go.clear()
        speeds = self._relative_speeds()
        ready = sorted((slot for slot in self._slots.values() if slot.ready), key=lambda slot: slot.lane)
        infos = [replace(slot.info, speed=speeds[slot.lane]) for slot in ready if slot.info is not None]
        return self._view(), infos

    async def give_back(
        self, job: str, lease: Lease, seconds: float, units: float = 0.0, lost: str | None = None
    ) -> None:
        """A job is done with a lane after so many seconds, in which it did ``units`` of work; or lost it."""
        await self._resumed.wait()
        slot = self._lane(lease.lane)
        if slot is None or slot.holder != job or slot.lease != lease.number:
            return  # it was taken back meanwhile, or this is said twice
        self._shares.served(job, seconds)
        self._free(slot)
        if lost is not None:
            self._lost(slot, job, lost)
        elif units:
            slot.lost_by.clear()
            self._speeds.learn(slot.lane, slot.kind, units, seconds)
            self._speeds_changed = True
        self._grant()

    def _lost(self, slot: _Slot, job: str, why: str) -> None:
        """A renderer was lost in the middle of a job's work: it gets a new one, or is fenced off."""
        if job not in slot.lost_by:
            slot.lost_by.append(job)
        slot.fenced = len(slot.lost_by) >= FENCED_AFTER
        level, what = (logging.ERROR, "fenced off") if slot.fenced else (logging.WARNING, "replaced")
        log.log(level, "GPU %d is %s: %s", slot.lane, what, why, extra=self._extra(slot, job=job))
        metrics.segment_retried(slot.lane, slot.host)
        self._drop_renderer(slot)
        if slot.fenced:
            jobs = f"{len(slot.lost_by)} jobs in a row lost it"
            slot.error = EngineError(f"GPU {slot.lane} is fenced off: {jobs}, the last one so: {why}")
        else:
            self._spawn(slot)
        for other in self._slots.values():  # or a dying node would cost a segment all of its tries
            if other.node == slot.node and other.free:
                other.in_doubt = True
                self._start_task(self._check(other, other.renderer))

    async def leave(self, job: str) -> None:
        """A job needs no GPU any more, or is dead; what it still has in work is stopped."""
        await self._resumed.wait()
        if (state := self._jobs.pop(job, None)) is not None:
            state.news.set()
            state.over.set()
            self._used = time.monotonic()
        self._shares.leave(job)
        for slot in self._slots.values():
            if slot.holder == job:
                self._take_back(slot)
        self._grant()

    def _take_back(self, slot: _Slot) -> None:
        renderer, lease = slot.renderer, slot.lease
        self._free(slot)
        slot.draining = True
        renderer.cancel.remote(lease)
        self._start_task(self._drain(slot, renderer))

    async def backlog(self, source: str, waiting: int, warm: bool) -> PoolView:
        """Jobs that wait outside, with the service or a batch; ``warm``: engines are not let go meanwhile.

        To be said again every few seconds.
        """
        await self._resumed.wait()
        self._backlogs[source] = (waiting, warm, time.monotonic())
        return self._view()

    # --- people ----------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """Lanes, jobs and speeds, for people and for ``/ready``."""
        speeds = self._relative_speeds()
        now = time.monotonic()
        return {
            "name": self._name,
            "retired": self._retired,
            "lanes": [
                {
                    "gpu": slot.lane,
                    "node": slot.info.node if slot.info else slot.node[:12],
                    "device": slot.info.device if slot.info else None,
                    "state": self._state(slot),
                    "job": slot.holder,
                    "speed": round(speeds.get(slot.lane, 1.0), 3),
                    "restarts": slot.restarts,
                    "trouble": None if slot.error is None else str(slot.error),
                }
                for slot in sorted(self._slots.values(), key=lambda slot: slot.lane)
            ],
            "jobs": [
                {
                    "job": claim.job,
                    "gpus": sorted(claim.held),
                    "wants": job.wish,
                    "seconds_since": round(now - job.seen, 1),
                }
                for name, job in self._jobs.items()
                if (claim := self._shares.claims.get(name)) is not None
            ],
            "waiting": sum(count for count, _, _ in self._backlogs.values()),
        }

    async def readmit(self, lane: int) -> bool:
        """Use a fenced GPU again; False where there is no such."""
        for slot in self._slots.values():
            if slot.lane == lane and slot.fenced:
                slot.fenced, slot.starts_failed, slot.error = False, 0, None
                slot.lost_by.clear()
                self._spawn(slot)
                return True
        return False

    async def settings(self) -> Settings:
        """Of the engines."""
        return self._settings

    async def retire(self) -> None:
        """A newer version of this code is there: give GPUs away as they come free, then end."""
        log.info("the pool %s retires", self._name)
        self._retired = True

    async def close(self) -> None:
        """End all renderers."""
        self._closed = True
        self._loop.cancel()
        self._write_speeds()
        self._ask_for_nodes(0)
        await asyncio.gather(*(self._stop_renderer(slot) for slot in self._slots.values()))

    # --- the loop --------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._find_others()
            # Who asks before the GPUs are known would hear that there are none.
            self._follow_nodes(await asyncio.to_thread(_nodes))
            self._resumed.set()
            while not self._closed:
                await self._look()
                await asyncio.sleep(LOOK_SECONDS)
        except asyncio.CancelledError:
            raise
        except BaseException:
            log.exception("the pool fails; Ray starts it again")
            os._exit(1)

    async def _find_others(self) -> None:
        """Renderers of the pool's last life go on; those of pools that are gone end; older pools retire."""
        named = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        names = [actor["name"] for actor in named if actor["namespace"] == NAMESPACE]
        pools = {name for name in names if name.startswith("pool-") and ":" not in name}
        mine = []
        for name in names:
            pool, colon, generation = name.partition(":")
            if not pool.startswith("pool-"):
                continue
            try:
                actor = ray.get_actor(name, NAMESPACE)
            except ValueError:
                continue
            if not colon:
                if name != self._name:
                    actor.retire.remote()
            elif pool == self._name:
                self._generation = max(self._generation, int(generation))
                mine.append(actor)
            elif pool not in pools:
                ray.kill(actor)
        await asyncio.gather(*map(self._adopt, mine))

    async def _adopt(self, renderer: Any) -> None:
        try:
            state = await asyncio.wait_for(renderer.state.remote(), ANSWER_SECONDS)
        except (RayError, TimeoutError):
            ray.kill(renderer)
            return
        other = state.settings.of_engines() != self._settings.of_engines()
        if other or (state.node_id, state.index) in self._slots:
            ray.kill(renderer)
            return
        now = time.monotonic()
        slot = _Slot(state.lane, state.node_id, state.index, changed=now, adopted=now)
        slot.renderer, slot.deadline = renderer, now + self._patience
        slot.info, slot.worked = state.info, state.info is not None
        slot.host = state.info.node if state.info is not None else ""
        self._slots[(slot.node, slot.index)] = slot
        if state.job is not None:  # its driver says so within some seconds, or is gone
            if state.job not in self._jobs:
                self._enter(JobEntry(state.job, planned=True))
            self._give(slot, state.job, state.lease)
        if slot.info is None:
            self._watch_start(slot)
        log.info("GPU %d is taken over from the pool's last life", slot.lane, extra=self._extra(slot))

    async def _look(self) -> None:
        now = time.monotonic()
        late, self._looked = now - self._looked - LOOK_SECONDS, now
        for name, job in list(self._jobs.items()):
            if late > LATE_SECONDS:  # the pool itself was held up, and has not heard what they said meanwhile
                job.seen = now
            if now - job.seen > SILENT_SECONDS:
                log.warning("job %s is silent; its GPUs are taken back", name, extra={"job": name})
                await self.leave(name)
        for source, (_, _, said) in list(self._backlogs.items()):
            if now - said > SILENT_SECONDS:
                del self._backlogs[source]
        self._follow_nodes(await asyncio.to_thread(_nodes))
        self._ask_idle_engines()
        self._let_go_of_idle()
        self._ask_for_nodes(self._work)
        self._write_speeds()
        self._grant()

    def _follow_nodes(self, nodes: list[dict[str, Any]]) -> None:
        """A slot for each GPU of the nodes that are alive; those of dead nodes go."""
        alive = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}
        places = [
            (node, index)
            for node, resources in sorted(
                alive.items(), key=lambda item: "node:__internal_head__" not in item[1]
            )
            for index in range(int(resources.get("GPU", 0)))
        ]
        self._saw_gpus |= bool(places)
        on_cpu = not self._saw_gpus and runs_on_cpu(self._settings)
        if on_cpu:
            head = next((node for node, has in alive.items() if "node:__internal_head__" in has), None)
            places = [] if head is None else [(head, index) for index in range(CPU_LANES)]
        for place in [place for place in self._slots if place[0] not in alive]:
            slot = self._slots.pop(place)
            log.warning("GPU %d is gone with its node", slot.lane, extra=self._extra(slot))
            self._free(slot)
            self._drop_renderer(slot)
            self._speeds.forget(slot.lane)
        self._let_go &= set(places)
        if not self._needed:
            return
        for place in places if not self._retired else ():
            enough = self._settings.max_gpus and self._work <= len(self._slots)
            if place not in self._slots and not (enough and place in self._let_go):
                self._let_go.discard(place)
                lanes = {slot.lane for slot in self._slots.values()}
                lane = next(number for number in range(len(lanes) + 1) if number not in lanes)
                self._slots[place] = _Slot(lane, *place, on_cpu=on_cpu)
                self._spawn(self._slots[place])
        for slot in self._slots.values():
            down = slot.renderer is None and not (slot.fenced or slot.leaving)
            if down and time.monotonic() >= slot.retry_at:
                self._spawn(slot)

    @property
    def _needed(self) -> bool:
        """Whether engines should run: there are jobs, a service, or there were some a while ago."""
        if self._jobs or any(count or warm for count, warm, _ in self._backlogs.values()):
            return True
        return time.monotonic() - self._used < self._settings.idle_seconds

    @property
    def _work(self) -> int:
        """GPUs that there is work for: those in use, those wished for, one for each job that waits."""
        held = (len(claim.held) for claim in self._shares.claims.values())
        wished = sum(max(job.wish, not job.entry.planned) for job in self._jobs.values())
        return sum(held) + wished + sum(count for count, _, _ in self._backlogs.values())

    @property
    def _patience(self) -> float:
        return self._settings.ready_seconds + SCHEDULING_SECONDS

    def _spawn(self, slot: _Slot) -> None:
        if self._closed:
            return
        self._generation += 1
        if slot.renderer is None and slot.changed > 0:
            slot.restarts += 1
            metrics.engine_restarted(slot.lane, slot.host, "lost")
        now = time.monotonic()
        slot.renderer = RendererActor.options(
            name=f"{self._name}:{self._generation}",
            namespace=NAMESPACE,
            lifetime="detached",
            num_gpus=0 if slot.on_cpu else 1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(slot.node, soft=False),
        ).remote(slot.lane, self._settings, slot.index)
        slot.info, slot.deadline, slot.changed, slot.adopted = None, now + self._patience, now, None
        self._watch_start(slot)

    def _watch_start(self, slot: _Slot) -> None:
        self._start_task(self._started(slot, slot.renderer))

    async def _started(self, slot: _Slot, renderer: Any) -> None:
        try:
            info = await renderer.start.remote()
        except RayError as error:
            if slot.renderer is not renderer:
                return
            slot.starts_failed += 1
            slot.error = our_error(error, f"the renderer of GPU {slot.lane}")
            wait = min(MOST_BACK_OFF_SECONDS, 2.0 ** (slot.starts_failed - 1))
            slot.retry_at = time.monotonic() + wait
            log.warning(
                "GPU %d does not start, another try in %.0f s: %s",
                slot.lane,
                wait,
                slot.error,
                extra=self._extra(slot),
            )
            self._drop_renderer(slot)
        else:
            if slot.renderer is renderer:
                slot.info, slot.error, slot.starts_failed, slot.worked = info, None, 0, True
                slot.host = info.node
                slot.changed = time.monotonic()
                self._grant()
        for job in self._jobs.values():
            job.news.set()  # who waits hears that something has changed

    def _drop_renderer(self, slot: _Slot) -> None:
        renderer, slot.renderer, slot.info = slot.renderer, None, None
        slot.draining = slot.in_doubt = False
        if renderer is not None:
            ray.kill(renderer)

    async def _stop_renderer(self, slot: _Slot) -> None:
        """``_drop_renderer`` with a chance to end the engine in order."""
        renderer, slot.info = slot.renderer, None
        if renderer is not None:
            with contextlib.suppress(RayError, TimeoutError):
                await asyncio.wait_for(renderer.stop.remote(), STOP_SECONDS)
        if slot.renderer is renderer:
            self._drop_renderer(slot)

    async def _drain(self, slot: _Slot, renderer: Any) -> None:
        """A renderer whose job is gone is free again once it has stopped; one that does not is killed."""
        end = time.monotonic() + DRAIN_SECONDS
        while slot.renderer is renderer:
            try:
                state = await asyncio.wait_for(renderer.state.remote(), DRAIN_SECONDS)
            except (RayError, TimeoutError):
                break
            if state.job is None:
                if slot.renderer is renderer:
                    slot.draining = False
                    self._grant()
                return
            if time.monotonic() > end:
                break
            await asyncio.sleep(DRAIN_LOOK_SECONDS)
        if slot.renderer is renderer:
            log.warning("GPU %d does not stop; it is replaced", slot.lane, extra=self._extra(slot))
            self._drop_renderer(slot)
            self._spawn(slot)

    def _ask_idle_engines(self) -> None:
        """An engine that died while nobody used it is replaced before a job finds out."""
        now = time.monotonic()
        for slot in self._slots.values():
            if slot.free and now - slot.asked > HEALTH_SECONDS:
                slot.asked = now
                self._start_task(self._check(slot, slot.renderer))

    async def _check(self, slot: _Slot, renderer: Any) -> None:
        trouble: str | None
        try:
            trouble = await asyncio.wait_for(renderer.trouble.remote(), ANSWER_SECONDS)
        except (RayError, TimeoutError) as error:
            trouble = f"it does not answer ({type(error).__name__})"
        if slot.renderer is not renderer:
            return
        slot.in_doubt = False
        if trouble is not None and slot.free:
            log.warning("GPU %d is replaced: %s", slot.lane, trouble, extra=self._extra(slot))
            self._drop_renderer(slot)
            self._spawn(slot)
        self._grant()

    def _let_go_of_idle(self) -> None:
        """Without work for long, engines end, and the pool too; a cluster that shrinks takes their nodes.

        On an autoscaling cluster each engine does so by itself.  A pool that retires gives up all GPUs but
        those that its jobs use, and the last one as long as there are any.
        """
        idle = [slot for slot in self._slots.values() if self._is_idle(slot)]
        now = time.monotonic()
        if self._retired:
            spare = 1 if self._jobs and len(idle) == len(self._slots) else 0
            idle = idle[spare:] if not any(job.wish for job in self._jobs.values()) else []
        elif self._needed:
            late = now - self._settings.idle_seconds
            most = max(0, sum(not slot.leaving for slot in self._slots.values()) - self._work)
            scales = self._settings.max_gpus and not any(warm for _, warm, _ in self._backlogs.values())
            idle = [slot for slot in idle if slot.ready and slot.changed < late][:most] if scales else []
        for slot in idle:
            slot.leaving = True
            self._start_task(self._dismiss(slot))
        over = not self._jobs and (self._retired or not (self._needed or self._backlogs))
        over |= self._retired and not self._slots  # who came meanwhile finds the pool of its own version
        if over and all(slot.fenced for slot in self._slots.values()):
            log.info("the pool %s ends: nobody needs it", self._name)
            self._write_speeds()
            self._ask_for_nodes(0)
            ray.kill(ray.get_runtime_context().current_actor)

    @staticmethod
    def _is_idle(slot: _Slot) -> bool:
        return slot.holder is None and not (slot.draining or slot.fenced or slot.leaving or slot.in_doubt)

    async def _dismiss(self, slot: _Slot) -> None:
        await self._stop_renderer(slot)
        place = (slot.node, slot.index)
        if self._slots.get(place) is slot:
            del self._slots[place]
            self._let_go.add(place)
            self._speeds.forget(slot.lane)

    def _ask_for_nodes(self, work: int) -> None:
        """On an autoscaling cluster: so many GPUs as there is work for."""
        wanted = min(self._settings.max_gpus, work)
        if self._settings.max_gpus and wanted != self._asked_for:
            from ray.autoscaler.sdk import request_resources

            request_resources(bundles=[{"GPU": 1}] * wanted)
            self._asked_for = wanted

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine by itself; one that fails ends the pool, which Ray starts again."""

        def over(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)  # the set keeps it from being collected
            if not task.cancelled() and task.exception() is not None:
                log.error("the pool fails; Ray starts it again", exc_info=task.exception())
                os._exit(1)

        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(over)

    # --- lanes -----------------------------------------------------------------------------------

    def _grant(self) -> None:
        now = time.monotonic()
        free = [
            slot.lane
            for slot in self._slots.values()
            if slot.free and (slot.adopted is None or now > slot.adopted + RESUME_SECONDS)
        ]
        if not free:  # as it mostly is while jobs ask
            return
        speeds = self._relative_speeds()
        free.sort(key=lambda lane: (-speeds[lane], lane))
        lanes = {slot.lane: slot for slot in self._slots.values()}
        for job, lane in self._shares.grant(free):
            lease = next(self._leases)
            lanes[lane].renderer.cancel.remote(lease - 1)  # whoever had it before has it no more
            self._give(lanes[lane], job, lease)
            self._jobs[job].news.set()

    def _give(self, slot: _Slot, job: str, lease: int) -> None:
        slot.holder, slot.lease, slot.changed, slot.adopted = job, lease, time.monotonic(), None
        self._shares.claims[job].held.add(slot.lane)

    def _free(self, slot: _Slot) -> None:
        if slot.holder is not None:
            self._shares.returned(slot.holder, slot.lane)
        slot.holder, slot.lease, slot.changed = None, None, time.monotonic()

    def _lane(self, lane: int) -> _Slot | None:
        return next((slot for slot in self._slots.values() if slot.lane == lane), None)

    def _view(self) -> PoolView:
        now = time.monotonic()
        slots = self._slots.values()
        starting = [
            slot.lane
            for slot in slots
            if (slot.renderer is not None and slot.info is None and now < slot.deadline)
            or (slot.renderer is None and slot.worked and 0 < slot.starts_failed < STARTS_TRIED)
        ]
        errors = [slot.error for slot in slots if slot.error is not None]
        late = [
            slot for slot in slots if slot.renderer is not None and slot.info is None and now >= slot.deadline
        ]
        if late and not errors:
            errors = [ConfigurationError(f"GPU {late[0].lane} was not free within {self._patience:.0f} s")]
        return PoolView(
            frozenset(slot.lane for slot in slots if slot.ready),
            frozenset(starting),
            errors[0] if errors else None,
        )

    def _state(self, slot: _Slot) -> str:
        if slot.fenced:
            return "fenced"
        if slot.draining or slot.leaving:
            return "stopping"
        if slot.info is None:
            return "starting" if slot.renderer is not None else "down"
        return "idle" if slot.holder is None else "busy"

    def _relative_speeds(self) -> dict[int, float]:
        return self._speeds.relative({slot.lane: slot.kind for slot in self._slots.values()})

    def _write_speeds(self) -> None:
        if not self._speeds_changed:
            return
        self._speeds_changed = False
        path = self._settings.speeds_path
        try:
            with finished(path) as partial:
                partial.write_text(json.dumps(self._speeds.kinds, indent=1, sort_keys=True) + "\n")
        except PipelineError as error:
            log.warning("the speeds of the GPUs are not kept: %s", error)

    @staticmethod
    def _extra(slot: _Slot, **more: Any) -> dict[str, Any]:
        return {"gpu": slot.lane, "node": slot.info.node if slot.info else slot.node, **more}


def _nodes() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return found


def _read_speeds(path: Path) -> dict[str, float]:
    try:
        found = json.loads(path.read_text())
        return {str(kind): float(rate) for kind, rate in found.items() if float(rate) > 0}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("%s is not read, speeds are learned anew: %s", path, error)
        return {}


# One that is killed is started again, and finds its renderers.  Each job has two or three calls that wait.
PoolActor: Any = ray.remote(  # type: ignore[call-overload]  # Ray's stubs lack max_concurrency
    num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=100_000
)(GpuPool)
