"""The pool: the one detached actor of a cluster that owns the renderers and lends them to jobs.

There is one for each version of this code.  It makes a renderer for every GPU of the cluster, watches them,
and gives lanes to jobs by ``pipeline.scheduling``.  Renderers are detached, too, so a pool that is killed
takes none along: Ray starts it again, and it finds them and asks what they do.  Jobs reach it through
``pool_client``; segments go from there to the renderers directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.ray_errors import our_error
from actors.renderer import RendererActor
from pipeline.engine import runs_on_cpu
from pipeline.errors import ConfigurationError, PipelineError
from pipeline.job import finished
from pipeline.logs import write_json_logs
from pipeline.messages import RendererInfo
from pipeline.scheduling import FairShares, Speeds, gpus_for
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
ANSWER_SECONDS = 10.0
"""How long a renderer may take to say how it is."""
HEALTH_SECONDS = 10.0
"""Between two questions to an idle engine."""
STOP_SECONDS = 8.0
DRAIN_SECONDS = 8.0
"""How long a renderer whose job is gone may take to stop; then it is killed."""
SCHEDULING_SECONDS = 60.0
"""How long Ray may take to find a GPU for a renderer, on top of the engine's own time to start."""
MOST_BACK_OFF_SECONDS = 60.0
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
class Lent:
    """The answer to a job that wants lanes: those it got, with their renderers."""

    lanes: tuple[tuple[int, Any], ...]
    view: PoolView


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
    changed: float = 0.0
    """When it was lent, or came back."""
    lost_by: list[str] = field(default_factory=list)
    """Jobs that lost it, in a row."""
    fenced: bool = False
    draining: float | None = None
    """Its job is gone, and it is told to stop; since when."""
    asked: float = 0.0
    """When its health was asked for."""
    restarts: int = 0

    @property
    def ready(self) -> bool:
        return self.info is not None and not self.fenced

    @property
    def free(self) -> bool:
        return self.ready and self.holder is None and self.draining is None

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
        self._entries: dict[str, JobEntry] = {}
        self._seen: dict[str, float] = {}
        self._arrived: dict[str, asyncio.Event] = {}
        self._backlogs: dict[str, tuple[int, bool, float]] = {}
        self._generation = 0
        self._retired = self._closed = False
        self._used = time.monotonic()
        self._asked_for = 0
        self._loop = asyncio.get_running_loop().create_task(self._run())

    # --- jobs ------------------------------------------------------------------------------------

    async def lend(self, entry: JobEntry, want: int, avoid: frozenset[int], held: frozenset[int]) -> Lent:
        """Lanes for a job that wants ``want`` more than those it holds; waits up to 2 s for the first one.

        Also a job's sign of life: one that is silent is dropped.  ``held`` is the truth as the job knows it,
        so answers that got lost and a pool that was started again do no harm.
        """
        claim = self._enter(entry, held)
        claim.want, claim.avoid = want, avoid
        self._grant()
        if want and claim.held <= held:
            self._arrived[entry.job].clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived[entry.job].wait(), HOLD_SECONDS)
        if entry.job not in self._entries:  # it has left meanwhile
            return Lent((), self._view())
        claim.want = 0
        self._seen[entry.job] = self._used = time.monotonic()
        lanes = {slot.lane: slot for slot in self._slots.values()}
        new = tuple((lane, lanes[lane].renderer) for lane in sorted(claim.held - held) if lane in lanes)
        return Lent(new, self._view())

    def _enter(self, entry: JobEntry, held: frozenset[int]) -> Any:
        job, now = entry.job, time.monotonic()
        claim = self._shares.enter(job, entry.priority, entry.at_most)
        self._entries[job] = entry
        self._seen[job] = self._used = now
        self._arrived.setdefault(job, asyncio.Event())
        for slot in self._slots.values():
            if slot.lane in held and slot.lane not in claim.held:
                if slot.holder in (None, job) and slot.draining is None:  # this pool was started again
                    slot.holder, slot.changed = job, now
                    claim.held.add(slot.lane)
            elif slot.lane in claim.held and slot.lane not in held:  # the answer never arrived
                self._free(slot)
        return claim

    async def share(self, entry: JobEntry) -> tuple[PoolView, Sequence[RendererInfo]]:
        """How the pool is, and the renderers that a job should be cut for now, free and fast ones first."""
        if entry.job not in self._entries:
            self._enter(entry, frozenset())
        ready = [slot for slot in self._slots.values() if slot.ready]
        waiting = sum(count for count, _, _ in self._backlogs.values())
        unplanned = sum(not known.planned for known in self._entries.values())
        count = gpus_for(
            len(ready),
            sum(slot.free for slot in ready),
            len(self._entries) + waiting,
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
        """How the pool is, and all renderers whose engine answers, by lane."""
        speeds = self._relative_speeds()
        ready = sorted((slot for slot in self._slots.values() if slot.ready), key=lambda slot: slot.lane)
        infos = [replace(slot.info, speed=speeds[slot.lane]) for slot in ready if slot.info is not None]
        return self._view(), infos

    async def give_back(
        self, job: str, lane: int, seconds: float, units: float = 0.0, lost: str | None = None
    ) -> None:
        """A job is done with a lane after so many seconds, in which it did ``units`` of work; or lost it."""
        self._shares.served(job, seconds)
        slot = next((slot for slot in self._slots.values() if slot.lane == lane), None)
        if slot is None or slot.holder != job:
            return
        self._free(slot)
        if lost is None:
            slot.lost_by.clear()
            if units:
                self._speeds.learn(lane, slot.kind, units, seconds)
                self._speeds_changed = True
        else:
            if job not in slot.lost_by:
                slot.lost_by.append(job)
            slot.fenced = slot.fenced or len(slot.lost_by) >= FENCED_AFTER
            level, what = (logging.ERROR, "fenced off") if slot.fenced else (logging.WARNING, "replaced")
            log.log(level, "GPU %d is %s: %s", lane, what, lost, extra=self._extra(slot, job=job))
            await self._drop_renderer(slot)
            if not slot.fenced:
                self._spawn(slot)
        self._grant()

    async def leave(self, job: str) -> None:
        """A job needs no GPU any more, or is dead; what it still has in work is stopped."""
        self._entries.pop(job, None)
        self._seen.pop(job, None)
        if (event := self._arrived.pop(job, None)) is not None:
            event.set()
        self._shares.leave(job)
        for slot in self._slots.values():
            if slot.holder == job:
                slot.holder, slot.changed, slot.draining = None, time.monotonic(), time.monotonic()
                slot.renderer.cancel.remote()
        self._used = time.monotonic()
        await self._drain()

    async def backlog(self, source: str, waiting: int, warm: bool) -> PoolView:
        """Jobs that wait outside, with the service or a batch; ``warm``: engines are not let go meanwhile.

        To be said again every few seconds.
        """
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
                    "wants": claim.want,
                    "seconds_since": round(now - self._seen[claim.job], 1),
                }
                for claim in self._shares.claims.values()
            ],
            "waiting": sum(count for count, _, _ in self._backlogs.values()),
        }

    async def readmit(self, lane: int) -> bool:
        """Use a fenced GPU again; False where there is no such."""
        for slot in self._slots.values():
            if slot.lane == lane and slot.fenced:
                slot.fenced, slot.starts_failed = False, 0
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
        await asyncio.gather(*(self._drop_renderer(slot, gently=True) for slot in self._slots.values()))

    # --- the loop --------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._find_others()
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
                await self._adopt(actor)
            elif pool not in pools:
                ray.kill(actor)

    async def _adopt(self, renderer: Any) -> None:
        try:
            state = await asyncio.wait_for(renderer.state.remote(), ANSWER_SECONDS)
        except (RayError, TimeoutError):
            ray.kill(renderer)
            return
        now = time.monotonic()
        slot = _Slot(state.lane, state.node_id, state.index, changed=now)
        slot.renderer, slot.deadline = renderer, now + self._patience
        slot.info, slot.holder = state.info, state.job
        if state.job is not None:  # its driver says so within some seconds, or is gone
            self._shares.enter(state.job, held=[slot.lane])
            self._entries[state.job] = JobEntry(state.job, planned=True)
            self._seen[state.job] = now
            self._arrived[state.job] = asyncio.Event()
        self._slots[(slot.node, slot.index)] = slot
        if slot.info is None:
            self._watch_start(slot)
        log.info("GPU %d is taken over from the pool's last life", slot.lane, extra=self._extra(slot))

    async def _look(self) -> None:
        now = time.monotonic()
        for job, seen in list(self._seen.items()):
            if now - seen > SILENT_SECONDS:
                log.warning("job %s is silent; its GPUs are taken back", job, extra={"job": job})
                await self.leave(job)
        for source, (_, _, said) in list(self._backlogs.items()):
            if now - said > SILENT_SECONDS:
                del self._backlogs[source]
        await self._follow_nodes(await asyncio.to_thread(_nodes))
        await self._drain()
        await self._ask_idle_engines()
        self._let_go_of_idle()
        self._ask_for_nodes()
        self._write_speeds()
        self._grant()

    async def _follow_nodes(self, nodes: list[dict[str, Any]]) -> None:
        """A slot for each GPU of the nodes that are alive; those of dead nodes go."""
        alive = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}
        places = [
            (node, index)
            for node, resources in sorted(
                alive.items(), key=lambda item: "node:__internal_head__" not in item[1]
            )
            for index in range(int(resources.get("GPU", 0)))
        ]
        on_cpu = not places and runs_on_cpu(self._settings)
        if on_cpu:
            head = next((node for node, has in alive.items() if "node:__internal_head__" in has), None)
            places = [] if head is None else [(head, index) for index in range(CPU_LANES)]
        for place in [place for place in self._slots if place[0] not in alive]:
            slot = self._slots.pop(place)
            log.warning("GPU %d is gone with its node", slot.lane, extra=self._extra(slot))
            await self._drop_renderer(slot)
            if slot.holder is not None:
                self._shares.returned(slot.holder, slot.lane)
            self._speeds.forget(slot.lane)
        if self._retired:
            return
        wanted = self._needed or not self._slots
        for place in places:
            if place not in self._slots and wanted:
                lanes = {slot.lane for slot in self._slots.values()}
                lane = next(number for number in range(len(lanes) + 1) if number not in lanes)
                self._slots[place] = _Slot(lane, *place, on_cpu=on_cpu)
                self._spawn(self._slots[place])
        for slot in self._slots.values():
            if slot.renderer is None and not slot.fenced and wanted and time.monotonic() >= slot.retry_at:
                self._spawn(slot)

    @property
    def _needed(self) -> bool:
        """Whether engines should run: there are jobs, a service, or there were some a while ago."""
        if self._entries or any(count or warm for count, warm, _ in self._backlogs.values()):
            return True
        return time.monotonic() - self._used < self._settings.idle_seconds

    @property
    def _patience(self) -> float:
        return self._settings.ready_seconds + SCHEDULING_SECONDS

    def _spawn(self, slot: _Slot) -> None:
        self._generation += 1
        slot.restarts += slot.renderer is None and slot.changed > 0
        now = time.monotonic()
        slot.renderer = RendererActor.options(
            name=f"{self._name}:{self._generation}",
            namespace=NAMESPACE,
            lifetime="detached",
            num_gpus=0 if slot.on_cpu else 1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(slot.node, soft=False),
        ).remote(slot.lane, self._settings, slot.index)
        slot.info, slot.deadline, slot.changed = None, now + self._patience, now
        self._watch_start(slot)

    def _watch_start(self, slot: _Slot) -> None:
        task = asyncio.get_running_loop().create_task(self._started(slot, slot.renderer))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

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
            await self._drop_renderer(slot)
        else:
            if slot.renderer is renderer:
                slot.info, slot.error, slot.starts_failed = info, None, 0
                self._grant()
        for event in self._arrived.values():
            event.set()  # who waits hears that something has changed

    async def _drop_renderer(self, slot: _Slot, gently: bool = False) -> None:
        renderer, slot.renderer, slot.info, slot.draining = slot.renderer, None, None, None
        if renderer is None:
            return
        if gently:
            with contextlib.suppress(RayError, TimeoutError):
                await asyncio.wait_for(renderer.stop.remote(), STOP_SECONDS)
        ray.kill(renderer)

    async def _drain(self) -> None:
        """Renderers whose job is gone are free again once they have stopped, or killed."""
        for slot in list(self._slots.values()):
            if slot.draining is None or slot.renderer is None:
                continue
            try:
                state = await asyncio.wait_for(slot.renderer.state.remote(), ANSWER_SECONDS)
                busy = state.job is not None
            except (RayError, TimeoutError):
                busy, slot.draining = True, 0.0
            if not busy:
                slot.draining = None
            elif time.monotonic() - (slot.draining or 0.0) > DRAIN_SECONDS:
                log.warning("GPU %d does not stop; it is replaced", slot.lane, extra=self._extra(slot))
                await self._drop_renderer(slot)
                self._spawn(slot)

    async def _ask_idle_engines(self) -> None:
        """An engine that died while nobody used it is replaced before a job finds out."""
        now = time.monotonic()
        due = [slot for slot in self._slots.values() if slot.free and now - slot.asked > HEALTH_SECONDS]
        for slot in due:
            slot.asked = now
        answers = await asyncio.gather(*(self._is_well(slot.renderer) for slot in due))
        for slot, trouble in zip(due, answers, strict=True):
            if trouble is not None and slot.free:
                log.warning("GPU %d is replaced: %s", slot.lane, trouble, extra=self._extra(slot))
                await self._drop_renderer(slot)
                self._spawn(slot)

    @staticmethod
    async def _is_well(renderer: Any) -> str | None:
        try:
            trouble: str | None = await asyncio.wait_for(renderer.trouble.remote(), ANSWER_SECONDS)
        except (RayError, TimeoutError) as error:
            return f"it does not answer ({type(error).__name__})"
        return trouble

    def _let_go_of_idle(self) -> None:
        """Without work for long, engines end, and the pool too; a cluster that shrinks takes their nodes."""
        if self._needed and not self._retired:
            return
        if self._retired and any(claim.want for claim in self._shares.claims.values()):
            return
        for place, slot in list(self._slots.items()):
            if slot.holder is None and slot.draining is None:
                del self._slots[place]
                _spawn_task(self._drop_renderer(slot, gently=True))
        if not self._slots and not self._entries:
            log.info("the pool %s ends: nobody needs it", self._name)
            self._write_speeds()
            ray.kill(ray.get_runtime_context().current_actor)

    def _ask_for_nodes(self) -> None:
        """On an autoscaling cluster: so many GPUs as there is work for."""
        if not self._settings.max_gpus:
            return
        claims = self._shares.claims.values()
        work = sum(max(claim.want + len(claim.held), 1) for claim in claims)
        work += sum(count for count, _, _ in self._backlogs.values())
        wanted = min(self._settings.max_gpus, work)
        if wanted != self._asked_for:
            from ray.autoscaler.sdk import request_resources

            request_resources(bundles=[{"GPU": 1}] * wanted)
            self._asked_for = wanted

    # --- lanes -----------------------------------------------------------------------------------

    def _grant(self) -> None:
        free = [slot.lane for slot in self._slots.values() if slot.free]
        if not free:  # as it mostly is while jobs ask
            return
        speeds = self._relative_speeds()
        free.sort(key=lambda lane: (-speeds[lane], lane))
        lanes = {slot.lane: slot for slot in self._slots.values()}
        now = time.monotonic()
        for job, lane in self._shares.grant(free):
            lanes[lane].holder, lanes[lane].changed = job, now
            self._arrived[job].set()

    def _free(self, slot: _Slot) -> None:
        if slot.holder is not None:
            self._shares.returned(slot.holder, slot.lane)
        slot.holder, slot.changed = None, time.monotonic()

    def _view(self) -> PoolView:
        now = time.monotonic()
        slots = self._slots.values()
        starting = [
            slot.lane
            for slot in slots
            if slot.renderer is not None and slot.info is None and now < slot.deadline
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
        if slot.draining is not None:
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


_TASKS: set[asyncio.Task[None]] = set()


def _spawn_task(work: Any) -> None:
    """Run a coroutine by itself; the set keeps it from being collected."""
    task = asyncio.get_running_loop().create_task(work)
    _TASKS.add(task)
    task.add_done_callback(_TASKS.discard)


def _read_speeds(path: Path) -> dict[str, float]:
    try:
        found = json.loads(path.read_text())
        return {str(kind): float(rate) for kind, rate in found.items() if float(rate) > 0}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("%s is not read, speeds are learned anew: %s", path, error)
        return {}


# On the head, where the service's data is; one that is killed is started again, and finds its renderers.
PoolActor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(GpuPool)
