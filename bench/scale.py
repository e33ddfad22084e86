"""``python -m bench.scale [--json]``: what planning and scheduling cost with many GPUs and many jobs.

Nothing is rendered.  Measured are the planner; a saturated pool in simulation (a queue of jobs, every lane
that comes free goes to one of them by ``FairShares``); and the pool actor's own methods on its own state, in
this process, with simulated renderers in its lanes and as many jobs asking as a runner takes.  *Lost* is the
processor time of all decisions over the time that all GPUs render meanwhile: what is lost if every decision
keeps its GPU waiting.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pickle
import tempfile
import time
import tracemalloc
from types import SimpleNamespace
from typing import Any

import ray

from actors.cluster import cluster
from actors.pool import HOLD_SECONDS, GpuPool, JobEntry, Lease, _Slot
from bench.simulation import MORE_JOBS, Arrival, plan_for, simulate
from bench.traces import batch
from pipeline.dispatch import TICK_SECONDS
from pipeline.job_index import JobIndex
from pipeline.job_records import NewJob
from pipeline.messages import RendererInfo
from pipeline.plan import calculate_segments
from pipeline.scheduling import FairShares
from pipeline.settings import Settings
from pipeline.timeline import FPS

CALL_SECONDS, AT_ONCE = 2.0, 16


def main() -> None:
    """Measure and print."""
    options = _options()
    told: dict[str, Any] = {
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "planner": [_planner(frames, gpus) for gpus in options.gpus for frames in (30 * FPS, 3600 * FPS)],
        "simulation": [_simulation(gpus, options.jobs) for gpus in options.gpus],
        "one lane for one of": [_grant(options.jobs)],
        "pool": [asyncio.run(_pool(gpus)) for gpus in options.gpus],
        "index": [_index(options.jobs)],
    }
    if options.ray:
        with cluster(Settings(engine="draft"), 1):
            told["calls"] = [_calls(gpus) for gpus in options.gpus]
    print(json.dumps(told) if options.json else _table(told))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 256, 1000])
    parser.add_argument("--jobs", type=int, default=10_000, help="in the queue")
    parser.add_argument("--ray", action="store_true", help="call the actor through a local Ray, too")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _planner(frames: int, gpus: int) -> dict[str, Any]:
    """The planner alone, for one job over so many GPUs."""
    seconds = _least(lambda: calculate_segments(frames, gpus), 3)
    segments = len(calculate_segments(frames, gpus).segments)
    return {"gpus": gpus, "frames": frames, "segments": segments, "ms": round(1e3 * seconds, 2)}


class _Counted(FairShares):
    """Counts its decisions and their time."""

    def __init__(self) -> None:
        super().__init__()
        self.lanes = self.calls = 0
        self.seconds = 0.0

    def grant(self, free: Any) -> list[tuple[str, int]]:
        began = time.perf_counter()
        given = super().grant(free)
        self.seconds += time.perf_counter() - began
        self.calls += 1
        self.lanes += len(given)
        return given


def _simulation(gpus: int, jobs: int) -> dict[str, Any]:
    """A queue of so many jobs at once, to its end; plans are made before and not counted."""
    arrivals: list[Arrival] = batch(jobs)
    for arrival in arrivals:
        plan_for(arrival.frames, 1)
    shares = _Counted()
    began = time.perf_counter()
    outcome = simulate(arrivals, gpus, shares=shares)
    whole = time.perf_counter() - began
    segments = [job.gpu_seconds for job in outcome.jobs]
    return {
        "gpus": gpus,
        "jobs": jobs,
        "decisions": shares.lanes,
        "decisions_per_second": round(shares.lanes / shares.seconds),
        "ms_each": round(1e3 * shares.seconds / shares.lanes, 4),
        "segment_seconds": round(sum(segments) / shares.lanes, 1),
        "lost": shares.seconds / sum(segments),
        "busy": round(outcome.busy, 4),
        "wall_seconds": round(whole, 1),
    }


def _grant(jobs: int) -> dict[str, Any]:
    """A single decision where all jobs are in the pool at once, each of them hungry."""
    shares = FairShares()
    for number in range(jobs):
        shares.enter(str(number)).want = jobs
    return {"jobs": jobs, "ms": round(1e3 * _least(lambda: shares.grant([0]), 20), 2)}


_NOBODY = SimpleNamespace(cancel=SimpleNamespace(remote=lambda _: None))
"""A renderer that does nothing."""


class _Still(GpuPool):
    """The pool without its loop, which asks Ray for nodes; all the rest of it is the real one."""

    async def _run(self) -> None:
        """Do nothing."""

    async def fill(self, gpus: int) -> list[JobEntry]:
        """Lanes that are ready, and as many jobs as a runner takes; the first of them have the lanes."""
        for lane in range(gpus):
            node = f"node-{lane // 8:04d}"
            slot = _Slot(lane, node, lane % 8, renderer=_NOBODY)
            slot.info = RendererInfo(lane, node, "draft", "1", "none", 8188, 1, 2, 3, "NVIDIA L40S", 48.0)
            self._slots[(node, lane % 8)] = slot
        jobs = 2 * gpus + MORE_JOBS
        entries = [JobEntry(f"job-{number:05d}/abcdef", planned=True) for number in range(jobs)]
        for entry in entries:
            self._enter(entry)[1].want = 1
        self._resumed.set()
        self._grant()
        return entries


async def _pool(gpus: int) -> dict[str, Any]:
    """The pool actor's methods with all lanes lent and twice as many jobs asking.

    ``core_share``: of one core, what the questions of all jobs take, one in two seconds from each."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    pool = _Still("pool-bench", Settings(engine="draft"))
    entries = await pool.fill(gpus)
    memory = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    held = {slot.holder: Lease(slot.lane, slot.lease) for slot in pool._slots.values() if slot.lease}
    waiting = next(entry for entry in entries if entry.job not in held)
    busy = [entry for entry in entries if entry.job in held]

    def ask() -> None:  # what ``lend`` does before it waits
        pool._enter(waiting)[1].want = 1
        pool._grant()

    nodes = [
        {"NodeID": node, "Alive": True, "Resources": {"GPU": 8.0}}
        for node in sorted({slot.node for slot in pool._slots.values()})
    ]
    asked = _least(ask, 20)
    answer = pickle.dumps(pool._view())
    view = _least(lambda: pickle.loads(pickle.dumps(pool._view())), 20)
    began = time.perf_counter()
    pool._follow_nodes(nodes)
    looked = time.perf_counter() - began
    given_back = []
    for entry in busy[:20]:  # each lane goes on to a job that waits
        began = time.perf_counter()
        await pool.give_back(entry.job, held[entry.job], 60.0, 1e6)
        given_back.append(time.perf_counter() - began)
    assert not any(slot.free for slot in pool._slots.values())
    beats = len(entries) / HOLD_SECONDS
    pool._loop.cancel()
    return {
        "gpus": gpus,
        "jobs": len(entries),
        "state_kb": round(memory / 1024),
        "give_back_ms": round(1e3 * min(given_back), 3),
        "ask_ms": round(1e3 * asked, 3),
        "answer_ms": round(1e3 * view, 3),
        "answer_bytes": len(answer),
        "asks_a_second": round(beats),
        "core_share": round(beats * (asked + view), 3),
        "look_ms": round(1e3 * looked, 3),
    }


def _index(jobs: int) -> dict[str, Any]:
    """The service's index (SQLite) with so many queued jobs: what a new job and a runner's claim take."""
    with tempfile.TemporaryDirectory() as folder:
        index = JobIndex(f"sqlite:///{folder}/index.sqlite")
        began = time.perf_counter()
        for number in range(jobs):
            index.add(NewJob("v1", "bench", {}, {}, str(number)), jobs)
        added = time.perf_counter() - began
        claimed = _least(lambda: index.claim("bench"), 20)
        index.close()
    return {"jobs": jobs, "add_ms": round(1e3 * added / jobs, 2), "claim_ms": round(1e3 * claimed, 2)}


def _calls(gpus: int) -> dict[str, Any]:
    """Questions of jobs through Ray, sixteen at a time from one process; and how many there would be.

    ``looks_a_second``: of drivers at their renderers, one for each busy GPU and tick.
    """
    actor: Any = ray.remote(num_cpus=0)(_Still)
    pool = actor.remote("pool-bench", Settings(engine="draft"))
    waiting = ray.get(pool.fill.remote(gpus))[gpus:]
    count, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < CALL_SECONDS:
        some = [waiting[(count + turn) % len(waiting)] for turn in range(AT_ONCE)]
        asked = [pool.lend.remote(entry, 0, frozenset(), frozenset()) for entry in some]
        ray.get(asked)
        count += len(asked)
    ray.kill(pool)
    return {
        "gpus": gpus,
        "calls_a_second": round(count / seconds),
        "asks_a_second": round((gpus + len(waiting)) / HOLD_SECONDS),
        "looks_a_second": round(gpus / TICK_SECONDS),
    }


def _least(work: Any, times: int) -> float:
    """Seconds of the fastest of several tries: others use this machine, too."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def _table(told: dict[str, Any]) -> str:
    lines = [f"{told['cores']} cores, load average {told['load_average']}"]
    for part in ("planner", "simulation", "one lane for one of", "pool", "index", "calls"):
        if not (rows := told.get(part)):
            continue
        lines += ["", part, "  ".join(f"{name:>12}" for name in rows[0])]
        lines += ["  ".join(f"{_short(value):>12}" for value in row.values()) for row in rows]
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.2e}" if isinstance(value, float) and 0 < value < 1e-3 else str(value)


if __name__ == "__main__":
    main()
