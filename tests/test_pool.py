"""Renderers as real Ray actors: lost ones are replaced, and no process outlives the way its owner went."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from actors.pool_client import LeasedRenderers, PoolClient
from pipeline.draft.stamp import read_stamp
from pipeline.errors import EngineError, JobCancelled, OutOfMemory, RendererLost
from pipeline.frames import read_stack
from pipeline.messages import NodeRuns, RenderedSegment, RendererInfo, SegmentTask
from pipeline.segment import rest
from pipeline.settings import Settings
from pipeline.workflow import load
from tests.test_segment import FRAMES, SIZE, START, joined, task_of, wav

WaitGone = Callable[[Iterable[int], float], list[int]]
SHORT = {"frames": 81, "head": 81, "windows": (81,), "speech": (wav(START, 81),)}


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=150 << 20,
    )
    yield
    ray.shutdown()


class Pool:
    """A pool, and one job in it that has all of its lanes."""

    def __init__(self, client: PoolClient, renderers: LeasedRenderers, lanes: int) -> None:
        self.client, self.renderers, self.lanes = client, renderers, lanes

    def start(self) -> Sequence[RendererInfo]:
        return self.client.start()[: self.lanes]

    def submit(self, task: SegmentTask, lane: int) -> Future[RenderedSegment]:
        hold(self.renderers, lane, avoid=frozenset(range(self.lanes, 2)))
        return self.renderers.submit(task, lane)

    def close(self) -> None:
        self.renderers.close()
        self.client.end()


def hold(renderers: LeasedRenderers, lane: int, avoid: frozenset[int] = frozenset()) -> None:
    """Wait until the job has the lane (and all before it)."""
    deadline = time.monotonic() + 150
    while lane not in renderers.lanes().ready:
        assert time.monotonic() < deadline
        renderers.want(lane + 1, avoid)
        wait([renderers.arrival()], timeout=1)


@pytest.fixture
def open_pool(tmp_path: Path) -> Iterator[Callable[..., Pool]]:
    with ExitStack() as pools:

        def start(lanes: int, draft_args: str = "", **more: object) -> Pool:
            settings = Settings.model_validate(
                {"engine": "draft", "draft_args": draft_args, "scratch_dir": tmp_path, **more}
            )
            client = PoolClient(settings)
            pools.callback(client.end)
            return Pool(client, pools.enter_context(client.job("test", at_most=lanes)), lanes)

        yield start


def test_each_renderer_owns_an_engine_of_its_own(
    open_pool: Callable[..., Pool], portrait: Path, tmp_path: Path, wait_gone: WaitGone
) -> None:
    """Two lanes, two ports; a segment comes back as files; closing leaves no process and no folder."""
    pool = open_pool(2)
    infos = pool.start()
    assert [info.lane for info in infos] == [0, 1]
    assert len({info.port for info in infos}) == 2
    rendered = pool.submit(task_of(portrait, **SHORT), 1).result(150)
    assert (rendered.index, rendered.lane, len(rendered.window_seconds)) == (3, 1, 1)
    stored = joined(rendered.windows, tmp_path)
    assert (stored.frames["head"], stored.width) == (81, SIZE)
    pool.close()
    pids = [pid for info in infos for pid in (info.pid, info.guard_pid, info.engine_pid)]
    assert wait_gone(pids, 60) == []
    assert not list(tmp_path.glob("infinitetalk-engine-*"))


def test_a_pool_knows_its_gpus_from_its_first_answer(open_pool: Callable[..., Pool]) -> None:
    """A service that asks at once must not take a pool that has not looked yet for a cluster without GPUs."""
    view = open_pool(2).client.ask("backlog", "test", 0, True)
    assert view.ready | view.starting == {0, 1}


def test_a_killed_renderer_takes_its_engine_along_and_is_replaced(
    open_pool: Callable[..., Pool], portrait: Path, tmp_path: Path, wait_gone: WaitGone
) -> None:
    """kill -9 of the actor in its second window: nothing of it is left, and the lane renders the rest."""
    pool = open_pool(1, "--draft-window-seconds 1.5")
    (info,) = pool.start()
    task = task_of(portrait)
    work = pool.submit(task, 0)
    while not (first := pool.renderers.windows(0, task.index, 0)):
        assert not work.done()
    assert [window.window for window in first] == [0]
    assert pool.renderers.windows(0, task.index, 1) == ()  # it was let go
    os.kill(info.pid, signal.SIGKILL)
    with pytest.raises(RendererLost, match="the renderer of GPU 0 is gone"):
        work.result(150)
    assert wait_gone([info.pid, info.engine_pid, info.guard_pid], 60) == []
    (fresh,) = pool.start()
    assert fresh.pid != info.pid
    others = pool.submit(rest(task, first[0]), 0).result(150)
    assert (others.nodes["KSampler"].ran, others.left) == (2, 0)
    frames = read_stack(joined([*first, *others.windows], tmp_path).path("head"), FRAMES)
    assert [stamp.frame for stamp in map(read_stamp, frames) if stamp] == list(range(FRAMES))
    assert len(list(tmp_path.glob("infinitetalk-engine-*"))) == 2  # of the two lanes


def test_a_killed_engine_is_told_with_its_log(
    open_pool: Callable[..., Pool], portrait: Path, wait_gone: WaitGone
) -> None:
    """kill -9 of the engine: the reason names pid and exit code and carries the log; the lane is replaced."""
    pool = open_pool(1, "--draft-window-seconds 30")
    (info,) = pool.start()
    work = pool.submit(task_of(portrait, **SHORT), 0)
    while not pool.renderers.progress():
        assert not work.done()
    os.kill(info.engine_pid, signal.SIGKILL)
    with pytest.raises(RendererLost) as lost:
        work.result(150)
    assert f"the engine (pid {info.engine_pid}) died with exit code -9" in lost.value.reason
    assert "the end of its log:\n    | DRAFT ENGINE" in lost.value.reason
    assert wait_gone([info.pid, info.guard_pid], 60) == []
    assert pool.start()[0].engine_pid != info.engine_pid


def test_out_of_memory_gets_one_more_try(open_pool: Callable[..., Pool], portrait: Path) -> None:
    """Out of memory once: everything is unloaded, and the same renderer makes the segment."""
    pool = open_pool(1, "--draft-fault oom@1")
    (info,) = pool.start()
    rendered = pool.submit(task_of(portrait, **SHORT), 0).result(150)
    assert rendered.nodes["UNETLoader"] == NodeRuns(ran=1)  # /free: nothing was left of the first try
    assert pool.start()[0].pid == info.pid


def test_out_of_memory_costs_one_window_only(open_pool: Callable[..., Pool], portrait: Path) -> None:
    """Out of memory in the second window: the second try goes on with it."""
    pool = open_pool(1, "--draft-fault oom@2")
    rendered = pool.submit(task_of(portrait), 0).result(150)
    assert [window.window for window in rendered.windows] == [0, 1, 2]
    assert (rendered.nodes["KSampler"].ran, rendered.left) == (2, 0)


def test_models_stay_warm_between_jobs(open_pool: Callable[..., Pool], portrait: Path) -> None:
    """The next segment of the next job loads nothing again, and encodes neither prompt nor portrait."""
    pool = open_pool(1)
    pool.submit(task_of(portrait, **SHORT), 0).result(150)
    other = replace(task_of(portrait).recipe, job="next", seed=8)
    warm = pool.submit(task_of(portrait, **SHORT, recipe=other, index=0), 0).result(150).nodes
    ran = {name for name, runs in warm.items() if runs.ran}
    assert ran.isdisjoint({"UNETLoader", "VAELoader", "CLIPLoader", "CLIPTextEncode", "CLIPVisionEncode"})
    assert "KSampler" in ran


def test_errors_arrive_as_our_own(open_pool: Callable[..., Pool], portrait: Path) -> None:
    """Out of memory twice: the node, the engine's words and a size that needs half; the renderer stays."""
    pool = open_pool(1, "--draft-fault oom@1 --draft-fault oom@2")
    (info,) = pool.start()
    with pytest.raises(OutOfMemory, match=r"KSampler.*out of memory.*64x64 has half"):
        pool.submit(task_of(portrait, **SHORT), 0).result(150)
    assert pool.submit(task_of(portrait, **SHORT), 0).result(150).index == 3
    assert pool.start()[0].pid == info.pid


def test_an_engine_that_can_not_start_is_the_pools_error(open_pool: Callable[..., Pool]) -> None:
    """start() raises what the engine's end was, not a bare actor error."""
    with pytest.raises(EngineError, match="exit code 1"):
        open_pool(1, "--draft-fault die-at-start").start()


def test_a_hung_engine_does_not_hold_up_cancelling(
    open_pool: Callable[..., Pool], portrait: Path, wait_gone: WaitGone
) -> None:
    """An engine that ignores interrupts: cancel returns, the work ends as cancelled, close kills it."""
    pool = open_pool(1, "--draft-fault hang@1")
    (info,) = pool.start()
    work = pool.submit(task_of(portrait, **SHORT), 0)
    while not pool.renderers.progress():
        assert not work.done()
    pool.renderers.cancel()
    with pytest.raises(JobCancelled):
        work.result(150)
    pool.close()
    assert wait_gone([info.pid, info.engine_pid, info.guard_pid], 60) == []


def test_a_workflow_travels_with_the_task() -> None:
    """Tasks pickle: what a renderer needs is in the task, not on the driver's disk."""
    assert ray.get(ray.put(load("image_single"))) == load("image_single")


@pytest.mark.long
def test_memory_does_not_grow_with_a_segment(open_pool: Callable[..., Pool], portrait: Path) -> None:
    """A segment of 20 windows takes no more memory than one of 2, in the renderer and in its engine."""
    pool = open_pool(1)
    (info,) = pool.start()
    peaks = []
    for windows in (2, 20):
        frames = 9 + 72 * windows
        starts = [START + 72 * window for window in range(windows)]
        long = {
            "frames": frames,
            "head": 26,
            "windows": (81,) * windows,
            "speech": tuple(wav(start, 81) for start in starts),
        }
        rendered = pool.submit(task_of(portrait, **long), 0).result(150)
        assert len(rendered.window_seconds) == windows
        peaks.append([peak_memory(pid) for pid in (info.pid, info.engine_pid)])
    for few, many in zip(*peaks, strict=True):
        assert many < few + (10 << 20), peaks  # the 1,296 frames more are 16 MB


def peak_memory(pid: int) -> int:
    """Bytes that a process has held at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
