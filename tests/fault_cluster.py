"""A real Ray cluster of several nodes on this machine, to be broken: ``ray start``, processes, kills.

For ``tests/test_faults.py`` and ``python -m bench.faults``; what is broken and how is in ``fault_cases``.
Every process has the cluster's mark in its environment, and its node's: they are found, killed and counted
by that, never by a name alone.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.pool import NAMESPACE
from actors.pool_client import pool_name
from tests.free_ports import free_port

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 60.0
LEFT_SECONDS = 25.0
"""How long processes may live on by themselves: guards end their engines first."""
PATIENCE = 5
"""A test fails by what does not happen, never by how slow the machine is; `bench.faults` measures."""
RAY_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_worker_niceness": "0",
    "RAY_raylet_start_wait_time_s": "90",
    # Ray finds a dead node in 12 s by itself; these are for loaded machines, and still 6 s.
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass(slots=True)
class Node:
    """One Ray node: what ``ray start --block`` started."""

    name: str
    mark: str
    process: subprocess.Popen[bytes]

    def pids(self, title: str = "") -> list[int]:
        """Its processes whose command line has ``title`` in it."""
        return processes(f"TEST_NODE={self.mark}", title)

    def kill(self, title: str = "") -> None:
        """SIGKILL, as a power cut does (or to those processes only)."""
        for pid in self.pids(title):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not title:
            self.process.wait()


class Cluster:
    """A head, mostly without GPUs, and nodes that have some."""

    def __init__(
        self,
        folder: Path,
        gpus: Sequence[int] = (2, 2),
        env: Mapping[str, str] | None = None,
        head_env: Mapping[str, str] | None = None,
        head_gpus: int = 0,
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.folder = folder
        self.scratch = folder / "scratch"
        self.scratch.mkdir(parents=True, exist_ok=True)
        self._temp = Path(tempfile.mkdtemp(prefix="rf-"))  # short: the paths of sockets are limited
        self._env, self._head_env = env or {}, head_env or {}
        self._head_gpus = head_gpus
        self.ray: tuple[str, ...] = (sys.executable, "-m", "tests.ray_on_loopback")
        self._port = free_port()
        self.address = f"127.0.0.1:{self._port}"
        self.nodes: list[Node] = []
        self.head: Node
        self._shape = tuple(gpus)

    def environment(self, **more: str) -> dict[str, str]:
        """Of every process."""
        ours = {"PYTHONPATH": str(ROOT), "TEST_MARK": self.mark, "XDG_CACHE_HOME": str(self.folder / "cache")}
        return {**os.environ, **RAY_ENV, **self._env, **ours, **more}

    def start(self) -> Cluster:
        """Start all nodes."""
        self.start_head()
        for gpus in self._shape:  # one after the other: two that start at once, on one address, hang
            self.add_node(gpus)
        return self

    def start_head(self) -> Node:
        """The head; a second one goes to the first one's address."""
        # Ray takes a second head on one machine for a mistake, as long as nodes of the first one are there.
        (self._temp / "ray_current_cluster").unlink(missing_ok=True)
        self.head = self._ray_start("head", self._head_gpus, **self._head_env)
        self._wait_started(self.head)
        return self.head

    def add_node(self, gpus: int) -> Node:
        """One node more."""
        node = self._ray_start(f"node{len(self.nodes)}", gpus)
        self._wait_started(node)
        self.nodes.append(node)
        return node

    def _where(self, name: str) -> tuple[list[str], str]:
        """What goes before a node's commands, and its address."""
        return [], "127.0.0.1"

    def _ray_start(self, name: str, gpus: int, **env: str) -> Node:
        mark = f"{self.mark}-{uuid.uuid4().hex[:6]}"
        prefix, ip = self._where(name)
        place = [f"--address={self.address}"]
        if name == "head":
            client = f"--ray-client-server-port={free_port()}"
            place = ["--head", f"--port={self._port}", client, "--include-dashboard=false"]
            place += [f"--temp-dir={self._temp}", "--disable-usage-stats"]
        command = [
            *(*prefix, *self.ray, "start", *place, "--block", f"--node-ip-address={ip}"),
            *("--num-cpus=1", f"--num-gpus={gpus}", "--object-store-memory=104857600"),
            "--include-log-monitor=false",  # nobody reads it, and each node would have one
            *("--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"),
        ]
        log = (self.folder / f"{name}-{mark[-6:]}.log").open("wb")
        with log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment(TEST_NODE=mark, **env),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return Node(name, mark, process)

    def _wait_started(self, node: Node) -> None:
        log = self.folder / f"{node.name}-{node.mark[-6:]}.log"
        until(
            lambda: "Ray runtime started" in log.read_text() or node.process.poll() is not None, START_SECONDS
        )
        assert node.process.poll() is None, log.read_text()

    @contextmanager
    def connected(self) -> Iterator[PoolLook]:
        """This process as a driver of the cluster, to look at its pool."""
        saved = {name: os.environ.get(name) for name in RAY_ENV}
        os.environ.update(RAY_ENV)
        ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            yield PoolLook()
        finally:
            ray.shutdown()
            for name, value in saved.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def wait_for_guards(self) -> None:
        """Guards live on to end their engines, and to remove their folders."""
        until(lambda: not processes(f"TEST_MARK={self.mark}", "process_guard"), LEFT_SECONDS)

    def stop(self) -> list[str]:
        """Kill all nodes; the command lines of what did not end with them."""
        for node in [*self.nodes, self.head]:
            node.kill("raylet/raylet")
        with suppress(TimeoutError):
            self.wait_for_guards()
        for node in [*self.nodes, self.head]:
            node.kill()
        mine = f"TEST_MARK={self.mark}"

        def living() -> set[int]:
            # Agents of Ray look for their dead head for up to a minute.
            return set(processes(mine)) - set(processes(mine, "Agent")) - set(processes(mine, "agent"))

        with suppress(TimeoutError):
            until(lambda: not living(), LEFT_SECONDS)
        left = [command_line(pid) for pid in living()]
        for pid in processes(mine):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self._temp, ignore_errors=True)
        return left


class PoolLook:
    """The pool of the cluster that this process is connected to."""

    def status(self) -> dict[str, Any]:
        """``GpuPool.status``; nothing where there is no pool."""
        found: dict[str, Any] = {"lanes": [], "jobs": []}
        with suppress(ValueError, ray.exceptions.RayError):
            pool: Any = ray.get_actor(pool_name(), NAMESPACE)
            found.update(ray.get(pool.status.remote(), timeout=10))
        return found

    def holders(self) -> set[str]:
        """Jobs that have lanes."""
        return {lane["job"] for lane in self.status()["lanes"] if lane["job"]}

    def states(self) -> list[str]:
        """Of the lanes."""
        return [lane["state"] for lane in self.status()["lanes"]]


class Watch:
    """Follows the windows of a job as they appear in its directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.seen: list[tuple[float, int, int]] = []
        """When which (segment, window) was stored; window -1: the whole segment."""
        self.over = threading.Event()
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        known: set[tuple[int, int]] = set()
        while not self.over.wait(0.02):
            now = time.monotonic()
            for path in self.directory.glob("segments/[0-9]*"):
                segment = int(path.name[:4])
                found = {(segment, int(window.name)) for window in path.glob("[0-9]" * 6)}
                if path.suffix != ".windows" and "-" not in path.name:
                    found = {(segment, -1)}
                for entry in found - known:
                    self.seen.append((now, *entry))
                known |= found

    def longest_pause(self, since: float) -> float:
        """The longest time in which no window of the job was stored, since then."""
        times = [since, *sorted(at for at, _, _ in self.seen if at > since)]
        return max(later - earlier for earlier, later in itertools.pairwise(times))


class Job(Watch):
    """``infinitetalk render`` on the cluster."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path, output: Path, log: Path) -> None:
        super().__init__(directory)
        self.process, self.output, self.log = process, output, log
        self.ended = 0.0
        threading.Thread(target=self._await, daemon=True).start()

    def _await(self) -> None:
        self.process.wait()
        self.ended = time.monotonic()
        self.over.set()

    def said(self) -> str:
        """Its standard error so far."""
        return self.log.read_text()

    def until_windows(self, count: int, seconds: float = 120) -> None:
        """Wait until so many windows are stored."""
        until(lambda: len(self.seen) >= count or self.over.is_set(), seconds)
        assert len(self.seen) >= count, self.said()

    def finish(self, seconds: float = 180) -> int:
        """Wait for the end; the exit code."""
        self.over.wait(seconds)
        return self.process.wait(5)

    @property
    def lost(self) -> list[int]:
        """Segments that lost a renderer."""
        return [int(index) for index in re.findall(r"segment (\d+) lost ", self.said())]

    @property
    def twins(self) -> list[int]:
        """Segments that were run a second time because they were held up."""
        return [int(index) for index in re.findall(r"segment (\d+) is held up", self.said())]


def submit(
    cluster: Cluster,
    speech: Path,
    name: str,
    *arguments: object,
    draft_args: str = "--draft-window-seconds 0.5",
    folder: Path | None = None,
    prefix: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Job:
    """Start a job with the bundled portrait at 64x64; the same name is the same job."""
    place = cluster.folder / name
    place.mkdir(exist_ok=True)
    directory, output = folder or place / "job", place / "talk.mp4"
    portrait = ROOT / "examples" / "portrait.png"
    command = [
        *(*prefix, sys.executable, "-m", "infinitetalk", "render", "--image", portrait, "--audio", speech),
        *("-o", output, "--width", 64, "--height", 64, "--job-dir", directory, *arguments),
    ]
    settings = {
        "INFINITETALK_ENGINE": "draft",
        "INFINITETALK_DRAFT_ARGS": draft_args,
        "INFINITETALK_SCRATCH_DIR": str(cluster.scratch),
        "INFINITETALK_RAY_ADDRESS": cluster.address,
    }
    log = place / f"{uuid.uuid4().hex[:6]}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=cluster.environment(**{**settings, **(env or {})}),
            stdout=out,
            stderr=out,
        )
    return Job(process, directory, output, log)


def windows_rendered(cluster: Cluster) -> int:
    """Prompts that the cluster's engines have finished, all in all: one for each window."""
    logs = [
        log.read_text(errors="replace") for log in cluster.scratch.glob("infinitetalk-logs-*/engine-*.log")
    ]
    ended = sum(log.count("Prompt executed in") for log in logs)
    return ended - sum(log.count("Processing interrupted") for log in logs)


def command_line(pid: int) -> str:
    """The words of a process; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def processes(mark: str, title: str = "") -> list[int]:
    """Pids of living processes with ``mark`` in their environment and ``title`` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        with suppress(OSError):
            if mark.encode() not in (entry / "environ").read_bytes():
                continue
            words = command_line(int(entry.name))
            alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            if alive and title in words:
                found.append(int(entry.name))
    return found


def engines(mark: str) -> list[tuple[int, Path]]:
    """Engines, and their base directories."""
    found = []
    for pid in processes(mark, "-m pipeline.draft"):
        with suppress(OSError, ValueError):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if words[1:3] == ["-m", "pipeline.draft"]:  # not their guards
                found.append((pid, Path(words[words.index("--base-directory") + 1])))
    return found


def busy_engine(cluster: Cluster, seconds: float = 60) -> tuple[int, Path]:
    """An engine in the middle of a window."""

    def busy() -> list[tuple[int, Path]]:
        found = engines(f"TEST_MARK={cluster.mark}")
        return [(pid, base) for pid, base in found if any((base / "input").glob("*.wav"))]

    until(lambda: bool(busy()), seconds)
    return busy()[0]


def owner_of(engine: int) -> int:
    """The renderer of an engine: the engine's log has its pid in its name."""
    log = Path(f"/proc/{engine}/fd/1").readlink()
    return int(log.stem.split("-")[-2])


def until(holds: Callable[[], bool], seconds: float, every: float = 0.05) -> None:
    """Wait for something to hold, on a busy machine ``PATIENCE`` times as long.  Raises ``TimeoutError``."""
    end = time.monotonic() + PATIENCE * seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {PATIENCE * seconds:g} s")
        time.sleep(every)


def run_command(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``infinitetalk`` with other commands, on the cluster."""
    env = cluster.environment(INFINITETALK_ENGINE="draft", INFINITETALK_RAY_ADDRESS=cluster.address)
    return subprocess.run(
        [sys.executable, "-m", "infinitetalk", *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
