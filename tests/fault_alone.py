"""Faults that need a cluster of their own: parts of the service, the head (state lost or kept), a network.

What the others share is in ``fault_cases``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fault_cases import FRAMES, SLOW, SPARE, Measured, cluster_of, held_up, measured, speech
from tests.fault_cluster import (
    Cluster,
    Node,
    Watch,
    engines,
    processes,
    submit,
    until,
    windows_rendered,
)
from tests.free_ports import free_port
from tests.service_process import Service, running_service

LANES = 4


def missing_for(fault: str) -> str | None:
    """Why this machine can't do it; None where it can."""
    if fault == "head, state kept" and shutil.which("redis-server") is None:
        return "there is no redis-server"
    if fault == "partition" and (shutil.which("ip") is None or not _may_make_namespaces()):
        return "network namespaces need root and iproute2"
    return None


def _may_make_namespaces() -> bool:
    name = f"probe-{uuid.uuid4().hex[:6]}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return False
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return True


def break_service(folder: Path) -> list[Measured]:
    """kill -9 of the runner and of the replica, and of all nodes with GPUs: the service's jobs go on."""
    with cluster_of(folder) as cluster, service_on(cluster) as service:

        def kill(title: str) -> None:
            pids = processes(f"TEST_MARK={cluster.mark}", title)
            assert pids, title
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

        def lose_nodes() -> None:
            for node in cluster.nodes:
                node.kill("raylet/raylet")
            cluster.wait_for_guards()
            for node in cluster.nodes:
                node.kill()
            cluster.nodes.clear()
            until(lambda: service.job(job)["state"] == "queued", 60)
            cluster.add_node(2)

        found = []
        faults: dict[str, Callable[[], None]] = {
            "runner": lambda: kill("ray::JobRunner"),
            "replica": lambda: kill("ray::ServeReplica"),
            "all nodes with GPUs": lose_nodes,
        }
        for fault, break_it in faults.items():
            before = windows_rendered(cluster)
            job, watch = _begun(service, cluster)
            killed = time.monotonic()
            break_it()
            found.append(_outcome(fault, cluster, service, job, watch, killed, before))
        return found


def lose_head(folder: Path) -> list[Measured]:
    """kill -9 of all of the head, with all that Ray knew: the nodes end; on a new cluster the job goes on."""
    with cluster_of(folder, {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}) as cluster:

        def start_again() -> None:
            nodes = cluster.nodes
            until(
                lambda: not any(node.pids("raylet/raylet") or node.pids("ray::Renderer") for node in nodes),
                60,
            )
            assert not engines(f"TEST_MARK={cluster.mark}")
            for node in nodes:
                node.kill()
            nodes.clear()
            cluster.start()

        # What is rendered until the nodes notice is lost with them.
        return _lose_head(cluster, "head, state lost", start_again, spare=LANES * 6)


def restart_head(folder: Path) -> list[Measured]:
    """kill -9 of all of the head, its state in Redis: it comes back to nodes that went on."""
    with redis(folder) as address, cluster_of(folder, head_env={"RAY_REDIS_ADDRESS": address}) as cluster:

        def start_again() -> None:
            assert engines(f"TEST_MARK={cluster.mark}"), "the engines ended though Ray's state was kept"
            cluster.start_head()

        # The nodes work on until the new head's pool has found them, and has waited for the old job to speak.
        return _lose_head(cluster, "head, state kept", start_again, spare=LANES * 12)


def _lose_head(cluster: Cluster, fault: str, start_again: Callable[[], None], spare: int) -> list[Measured]:
    before = windows_rendered(cluster)
    with service_on(cluster) as service:
        job, watch = _begun(service, cluster)
        killed = time.monotonic()
        cluster.head.kill()
        service.process.kill()
        service.process.wait()
    start_again()
    port = int(service.url.rpartition(":")[2])  # Serve, too, may have been kept
    with service_on(cluster, port) as service:
        return [_outcome(fault, cluster, service, job, watch, killed, before, spare)]


@contextmanager
def service_on(cluster: Cluster, port: int | None = None) -> Iterator[Service]:
    """The service, on this cluster and its data; the head is its home."""
    env = cluster.environment(
        TEST_NODE=cluster.head.mark,
        INFINITETALK_RAY_ADDRESS=cluster.address,
        INFINITETALK_SCRATCH_DIR=str(cluster.scratch),
        INFINITETALK_DRAFT_ARGS=SLOW,
    )
    data, log = cluster.folder / "data", cluster.folder / "service.log"
    with running_service(data, cluster.mark, log, at=port, **env) as service:
        yield service


def _begun(service: Service, cluster: Cluster) -> tuple[str, Watch]:
    """A job that has some windows."""
    job = service.submit(FRAMES, lambda frames: speech(cluster.folder, frames))
    watch = Watch(service.data / "jobs" / job / "work")
    until(lambda: len(watch.seen) >= 3, 90)
    return job, watch


def _outcome(
    fault: str,
    cluster: Cluster,
    service: Service,
    job: str,
    watch: Watch,
    killed: float,
    before: int,
    spare: int = LANES * (SPARE + 1),
) -> Measured:
    """The job is done; ``spare``: windows that may be lost with what was broken, on all GPUs."""
    done = service.until_over(job, 180)
    over = time.monotonic()
    watch.over.set()
    assert done["state"] == "completed", done
    assert done["result"]["frames"] == FRAMES
    windows, rendered = done["detail"]["windows_total"], windows_rendered(cluster) - before
    assert 0 <= rendered - windows <= spare, (rendered, windows)
    return Measured(fault, watch.longest_pause(killed), over - killed, windows, rendered - windows, 0)


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    """A Redis server for Ray's state, as Ray documents it (RAY_REDIS_ADDRESS)."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with (folder / "redis.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until(lambda: b"Ready to accept connections" in (folder / "redis.log").read_bytes(), 20)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


class TwoNetworks(Cluster):
    """The head and a node in one network namespace, another node in a second one, a cable in between."""

    def __init__(self, folder: Path) -> None:
        # Addresses of their own: Ray need not be kept to loopback, nobody else is on this cable.
        real = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1", "RAY_gcs_rpc_server_reconnect_timeout_s": "15"}
        super().__init__(folder, env=real)
        tag = self.mark[:6]
        self.home, self.far = f"home-{tag}", f"far-{tag}"
        self._cables = (f"vh{tag}", f"vf{tag}")
        self.address = f"10.77.0.1:{self._port}"
        self.ray = (str(Path(sys.executable).with_name("ray")),)

    def _where(self, name: str) -> tuple[list[str], str]:
        if name == "node1":
            return ["ip", "netns", "exec", self.far], "10.77.0.2"
        return ["ip", "netns", "exec", self.home], "10.77.0.1"

    def connect(self) -> None:
        """Lay the cable."""
        ip("link", "add", self._cables[0], "type", "veth", "peer", "name", self._cables[1])
        ends = zip((self.home, self.far), self._cables, ("10.77.0.1", "10.77.0.2"), strict=True)
        for network, cable, address in ends:
            ip("netns", "add", network)
            ip("link", "set", cable, "netns", network)
            ip("-n", network, "address", "add", f"{address}/24", "dev", cable)
            for device in ("lo", cable):
                ip("-n", network, "link", "set", device, "up")

    def cable(self, state: str) -> None:
        """``down``: nothing gets through; ``up``: all does."""
        ip("-n", self.home, "link", "set", self._cables[0], state)

    def remove(self) -> None:
        """Take the namespaces away, and the cable with them."""
        for network in (self.home, self.far):
            subprocess.run(["ip", "netns", "delete", network], check=False, capture_output=True)


def ip(*arguments: str) -> None:
    """The program of iproute2."""
    subprocess.run(["ip", *arguments], check=True)


def cut_off(folder: Path) -> list[Measured]:
    """The network of a node breaks: its segments go on elsewhere; it ends by itself what it still does."""
    cluster = TwoNetworks(folder)
    try:
        cluster.connect()
        cluster.start()
        home, _ = cluster._where("head")
        job = submit(cluster, speech(folder), "cut", prefix=home, draft_args=SLOW)
        job.until_windows(3)
        far: Node = cluster.nodes[1]
        until(lambda: bool(engines(f"TEST_NODE={far.mark}")), 60)
        killed = time.monotonic()
        cluster.cable("down")
        job.finish()
        recovered, rendered = held_up(job, killed), windows_rendered(cluster)
        # The node that is cut off finishes what it has in work; nobody hears of it.
        result = measured("partition", job, killed, recovered, rendered, spare=2 * 5)
        cluster.cable("up")
        until(lambda: not engines(f"TEST_NODE={far.mark}") and not far.pids("raylet/raylet"), 90)
    finally:
        left = cluster.stop()
        cluster.remove()
    assert not left, "these processes did not end: " + "; ".join(left)
    return [result]


ALONE: dict[str, Callable[[Path], list[Measured]]] = {
    "service": break_service,
    "head, state lost": lose_head,
    "head, state kept": restart_head,
    "partition": cut_off,
}
