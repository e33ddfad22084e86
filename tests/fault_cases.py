"""What is broken, and what has to hold afterwards: every fault on a real cluster (``fault_cluster``).

Each case starts a job, breaks something for real, waits for the end and checks the video, the windows and
what is left.  It returns what it measured.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import time
import wave
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actors.pool import SILENT_SECONDS
from pipeline.frames import check_video
from tests.fault_cluster import (
    Cluster,
    Job,
    busy_engine,
    engines,
    owner_of,
    processes,
    submit,
    until,
    windows_rendered,
)

FRAMES = 900
SLOW = "--draft-window-seconds 2"
"""Where seconds pass before anybody knows: what is rendered in them is lost with the driver."""
SPARE = 3
"""Windows that a lost segment may cost: the one in work, the one before it, whose frames are encoded while
the next is sampled (docs/exactness.md), and one more that ends while a busy driver waits: they take 0.5 s."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one fault cost."""

    fault: str
    recovered: float | None
    """Seconds from the kill until the affected work went on."""
    ended: float
    """Seconds from the kill to the job's end."""
    windows: int
    twice: int
    """Windows that were rendered and not kept, of those finished before the fault."""
    lost: int
    """Segments that lost their renderer."""


def speech(folder: Path, frames: int = FRAMES) -> Path:
    """A sound of exactly so many frames."""
    path = folder / f"{frames}.wav"
    if not path.exists():
        times = np.arange(frames * 640) / 16_000
        sound = np.sin(2 * np.pi * 180 * times) * np.maximum(0, np.sin(2 * np.pi * 3 * times))
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes((sound * 12_000).astype("<i2").tobytes())
    return path


def whole(job: Job, frames: int = FRAMES) -> list[int]:
    """The job is done and its video is whole; the windows of each segment."""
    assert job.finish() == 0, job.said()
    assert "Traceback" not in job.said(), job.said()
    check_video(job.output, frames)
    plan = json.loads((job.directory / "plan.json").read_text())
    return [len(segment["windows"]) for segment in plan["segments"]]


def measured(
    fault: str, job: Job, killed: float, recovered: float | None, rendered: int, spare: int | None = None
) -> Measured:
    """Check the end of a job, and what it cost; ``rendered``: windows that the engines made for it."""
    windows = whole(job)
    twice, lost = rendered - sum(windows), len(job.lost)
    spare = SPARE * lost if spare is None else spare
    spare += sum(windows[segment] for segment in job.twins)  # both runs of those may have done much
    assert 0 <= twice <= spare, (twice, spare, job.said())
    return Measured(fault, recovered, job.ended - killed, sum(windows), twice, lost)


def held_up(job: Job, killed: float) -> float:
    """The job is over: the longest time that a segment hit by the fault went without a new window since then.

    Hit: it lost its renderer, or somebody else took it over because it did not go on.
    """
    hit = {*job.lost, *job.twins}
    assert hit, job.said()
    gaps = []
    for segment in hit:
        times = [killed, *sorted(at for at, index, _ in job.seen if index == segment and at > killed)]
        gaps += [later - earlier for earlier, later in itertools.pairwise(times)]
    return max(gaps)


def kill_engine(cluster: Cluster) -> Measured:
    """kill -9 of an engine in the middle of a window."""
    before = windows_rendered(cluster)
    job = submit(cluster, speech(cluster.folder), "engine")
    job.until_windows(3)
    pid, base = busy_engine(cluster)
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not base.exists(), 15)
    job.finish()
    return measured("engine", job, killed, held_up(job, killed), windows_rendered(cluster) - before)


def kill_renderer(cluster: Cluster) -> Measured:
    """kill -9 of a renderer in the middle of a segment: its engine, guard and folder go with it."""
    before = windows_rendered(cluster)
    job = submit(cluster, speech(cluster.folder), "renderer")
    job.until_windows(3)
    mine = f"TEST_MARK={cluster.mark}"
    known = dict(engines(mine))
    engine, _ = busy_engine(cluster)
    pid = owner_of(engine)
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    until(lambda: sum(base.exists() for base in known.values()) < len(known), 15)
    job.finish()
    return measured("renderer", job, killed, held_up(job, killed), windows_rendered(cluster) - before)


def kill_node(cluster: Cluster) -> Measured:
    """kill -9 of a raylet with two GPUs: what was on them goes on elsewhere; nothing of the node lives on."""
    node = cluster.nodes[-1]
    before = windows_rendered(cluster)
    job = submit(cluster, speech(cluster.folder), "node")
    job.until_windows(3)
    killed = time.monotonic()
    try:
        (raylet,) = node.pids("raylet/raylet")
        os.kill(raylet, signal.SIGKILL)
        until(lambda: not node.pids("ray::Renderer") and not engines(f"TEST_NODE={node.mark}"), 30)
        job.finish()
        return measured("node", job, killed, held_up(job, killed), windows_rendered(cluster) - before)
    finally:
        node.kill()
        cluster.nodes.remove(node)
        cluster.add_node(2)  # for those that come


def kill_driver(cluster: Cluster) -> Measured:
    """kill -9 of the command: its GPUs come free; the same command goes on with what is kept."""
    before = windows_rendered(cluster)
    job = submit(cluster, speech(cluster.folder), "driver", draft_args=SLOW)
    job.until_windows(3)
    with cluster.connected() as pool:
        assert pool.holders()
        killed = time.monotonic()
        job.process.kill()
        until(lambda: not pool.holders() and "stopping" not in pool.states(), SILENT_SECONDS + 15)
        recovered = time.monotonic() - killed
    job.finish()
    kept = len(job.seen)
    again = submit(cluster, speech(cluster.folder), "driver", draft_args=SLOW)
    again.finish()
    # What its renderers had in work and had finished, but nobody fetched any more, is rendered again.
    rendered = windows_rendered(cluster) - before
    result = measured("driver", again, killed, recovered, rendered, spare=4 * (SPARE + 1))
    assert kept >= 3
    return result


def stop_driver(cluster: Cluster) -> Measured:
    """SIGSTOP of the command for longer than the pool waits: others get its GPUs; it wakes and goes on."""
    before = windows_rendered(cluster)
    job = submit(cluster, speech(cluster.folder), "stopped", draft_args=SLOW)
    job.until_windows(3)
    os.kill(job.process.pid, signal.SIGSTOP)
    killed = time.monotonic()
    other = submit(cluster, speech(cluster.folder, 300), "other", draft_args=SLOW)
    other.until_windows(1)
    recovered = other.seen[0][0] - killed
    os.kill(job.process.pid, signal.SIGCONT)
    extra = sum(whole(other, 300))
    job.finish()
    rendered = windows_rendered(cluster) - before - extra
    return measured("driver that stood still", job, killed, recovered, rendered, spare=4 * (SPARE + 1))


def kill_pool(cluster: Cluster) -> Measured:
    """kill -9 of the pool: segments in work go on; the next pool takes the renderers over."""
    before = windows_rendered(cluster)
    job = submit(cluster, speech(cluster.folder), "pool", draft_args=SLOW)
    job.until_windows(3)
    mine = f"TEST_MARK={cluster.mark}"
    known = set(engines(mine))
    with cluster.connected() as pool:
        assert pool.holders()
        (pid,) = processes(mine, "ray::GpuPool")
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        until(lambda: not pool.states(), 10)
        until(lambda: bool(pool.states()), 60)
        recovered = time.monotonic() - killed
    job.finish()
    assert set(engines(mine)) == known, "engines were started anew"
    assert not job.lost
    return measured("pool", job, killed, recovered, windows_rendered(cluster) - before)


def hang(cluster: Cluster) -> Measured:
    """Engines that accept a window and never finish it: found by the lack of progress, and replaced."""
    return _misbehave(cluster, "hang", {"INFINITETALK_STALLED_SECONDS": "4"})


def garbage(cluster: Cluster) -> Measured:
    """Engines that answer with what is no JSON: replaced."""
    return _misbehave(cluster, "garbage")


def _misbehave(cluster: Cluster, fault: str, env: Mapping[str, str] | None = None) -> Measured:
    before = windows_rendered(cluster)
    args = f"--draft-window-seconds 0.5 --draft-fault {fault}@4"
    job = submit(cluster, speech(cluster.folder), fault, draft_args=args, env=env)
    job.until_windows(2)
    killed = time.monotonic()
    job.finish()
    return measured(fault, job, killed, held_up(job, killed), windows_rendered(cluster) - before)


def fill_disk(cluster: Cluster) -> Measured:
    """The disk of the job's directory fills up: the job says so; with space, the same command completes."""
    disk = cluster.folder / "small"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], check=True)
    try:
        before = windows_rendered(cluster)
        job = submit(cluster, speech(cluster.folder), "disk", folder=disk / "job")
        job.until_windows(3)
        killed = time.monotonic()
        filler = disk / "filler"
        with filler.open("wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
            except OSError:
                pass
        assert job.finish() == 3, job.said()
        recovered = job.ended - killed
        assert "No space left" in job.said(), job.said()
        assert "Traceback" not in job.said(), job.said()
        assert not job.output.exists()
        assert not [path for path in (disk / "job").rglob("*") if "partial" in path.name]
        filler.unlink()
        again = submit(cluster, speech(cluster.folder), "disk", folder=disk / "job")
        again.finish()
        rendered = windows_rendered(cluster) - before
        # One window of each of the four segments in work may be lost with the job, and the one before it.
        return measured("full disk", again, killed, recovered, rendered, spare=4 * (SPARE + 1))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


CASES: dict[str, Callable[[Cluster], Measured]] = {
    "engine": kill_engine,
    "renderer": kill_renderer,
    "node": kill_node,
    "driver": kill_driver,
    "stopped": stop_driver,
    "pool": kill_pool,
    "disk": fill_disk,
    "hang": hang,
    "garbage": garbage,
}
"""On one cluster, one after the other."""


@contextmanager
def cluster_of(
    folder: Path, env: Mapping[str, str] | None = None, head_env: Mapping[str, str] | None = None
) -> Iterator[Cluster]:
    """A head and two nodes with two GPUs each; afterwards nothing of it is left."""
    cluster = Cluster(folder, env=env, head_env=head_env)
    try:
        yield cluster.start()
    finally:
        left = cluster.stop()
    assert not left, "these processes did not end: " + "; ".join(left)
    until(lambda: not list(cluster.scratch.glob("infinitetalk-engine-*")), 20)  # their guards remove them
