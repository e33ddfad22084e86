"""Several jobs, processes, nodes and kinds of GPUs with one pool, on a real cluster."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.experimental.internal_kv import _internal_kv_get

from actors.driver import render
from actors.pool import NAMESPACE, PoolActor
from actors.pool_client import LeasedRenderers, PoolClient, pool_name
from pipeline.errors import ConfigurationError, GraphError, JobCancelled, RendererLost
from pipeline.plan import calculate_segments
from pipeline.progress import JobProgress
from pipeline.request import RenderRequest
from pipeline.result import RenderResult
from pipeline.settings import Settings
from tests.fault_cases import speech
from tests.fault_cluster import ROOT, Cluster, PoolLook, Watch, engines, run_command, submit, until
from tests.test_segment import START, task_of, wav

SHORT = {"frames": 81, "head": 81, "windows": (81,), "speech": (wav(START, 81),)}
LONG = {
    "frames": 9 + 72 * 20,
    "windows": (81,) * 20,
    "head": 26,
    "speech": tuple(wav(START + 72 * window, 81) for window in range(20)),
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and one node with two GPUs; this process is a driver of it."""
    started = Cluster(tmp_path_factory.mktemp("pool"), gpus=(2,))
    try:
        started.start()
        with started.connected():
            yield started
    finally:
        left = started.stop()
    assert not left


@pytest.fixture
def open_pool(cluster: Cluster) -> Iterator[Callable[..., PoolClient]]:
    """Opens the cluster's pool with an engine that takes its time; it ends with the test."""
    clients = []

    def start(draft_args: str = "", **more: object) -> PoolClient:
        given = {"engine": "draft", "draft_args": draft_args, "ray_address": cluster.address, **more}
        clients.append(PoolClient(Settings.model_validate({"scratch_dir": cluster.scratch, **given})))
        return clients[-1]

    yield start
    for client in clients[-1:]:
        client.end()
    until(lambda: not engines(f"TEST_MARK={cluster.mark}"), 30)


def hold(renderers: LeasedRenderers, *lanes: int) -> None:
    """Wait until the job has just these lanes."""
    deadline = time.monotonic() + 150
    others = frozenset(range(4)) - set(lanes)
    while renderers.lanes().ready != set(lanes):
        assert time.monotonic() < deadline, renderers.lanes()
        renderers.want(len(lanes), others)
        wait([renderers.arrival()], timeout=0.5)


def render_with(
    pool: PoolClient, folder: Path, frames: int, name: str, **more: Any
) -> tuple[RenderResult, float]:
    """A whole job; the result, and when it was done."""
    request = RenderRequest.checked(
        image=ROOT / "examples" / "portrait.png", audio=speech(folder, frames), width=64, height=64
    )
    place = folder / name
    result = render(
        request,
        pool._settings,
        folder / f"{name}.mp4",
        job_dir=place,
        name=name,
        pool=pool,
        **{"on_progress": lambda _: None, **more},
    )
    return result, time.monotonic()


def test_a_short_job_starts_within_one_segment(open_pool: Callable[..., PoolClient], tmp_path: Path) -> None:
    """A job of one window, sent while a long one has all GPUs, is done long before that one."""
    pool = open_pool("--draft-window-seconds 1")
    pool.start()
    segments = tmp_path / "long" / "segments"
    enough = threading.Event()

    def finished() -> int:
        return len(list(segments.glob("[0-9]" * 4)))

    def until_enough(_: JobProgress) -> None:
        if enough.is_set():
            raise JobCancelled("long")

    with ThreadPoolExecutor(2) as threads:
        try:
            long = threads.submit(render_with, pool, tmp_path, 6000, "long", on_progress=until_enough)
            until(lambda: any(segments.glob("*.windows/*")), 60)
            before = finished()
            assert render_with(pool, tmp_path, 60, "short")[0].frames == 60
            # One segment's end gives the lane; the other lane may have had one, too, and one is on its way.
            assert finished() - before <= 3
            assert not long.done()
        finally:
            enough.set()
        with pytest.raises(JobCancelled):
            long.result(150)


def test_a_job_takes_no_more_than_it_may(open_pool: Callable[..., PoolClient]) -> None:
    """``at_most`` holds though another GPU is free; the status tells it."""
    pool = open_pool()
    pool.start()
    with pool.job("one", at_most=1) as one, pool.job("two") as two:
        one.want(2)
        until(lambda: len(one.lanes().ready) == 1, 30)
        two.want(2)
        until(lambda: len(two.lanes().ready) == 1, 30)
        held = {job["job"].partition("/")[0]: job["gpus"] for job in pool.ask("status")["jobs"]}
        assert sorted(held["one"] + held["two"]) == [0, 1]
        assert len(held["one"]) == 1


def test_a_job_of_priority_leaves_the_others_as_they_were(
    open_pool: Callable[..., PoolClient], portrait: Path
) -> None:
    """Once it has left, the GPU of a job that was there before it comes back as ever."""
    pool = open_pool()
    pool.start()
    with pool.job("plain") as plain:
        hold(plain, 1)
        with pool.job("urgent", priority=25) as urgent:
            hold(urgent, 0)
        until(lambda: len(pool.ask("status")["jobs"]) == 1, 20)
        plain.submit(task_of(portrait, **SHORT), 1).result(150)
        until(lambda: [lane["state"] for lane in PoolLook().status()["lanes"]] == ["idle", "idle"], 20)


def test_a_job_is_cancelled_while_engines_start(open_pool: Callable[..., PoolClient], tmp_path: Path) -> None:
    """Its progress is told meanwhile, so whoever wants it to end is heard before any engine answers."""
    pool = open_pool("--draft-start-seconds 60")
    told = []

    def on_progress(progress: JobProgress) -> None:
        told.append(progress.stage)
        if told.count("starting") == 3:
            raise JobCancelled("early")

    with pytest.raises(JobCancelled):
        render_with(pool, tmp_path, 60, "early", on_progress=on_progress)
    assert set(told) == {"preparing", "starting"}


@pytest.mark.long
def test_who_was_thought_dead_disturbs_nobody(open_pool: Callable[..., PoolClient], portrait: Path) -> None:
    """A job whose GPU was taken back and given away: its work is lost, its next call does nothing there."""
    pool = open_pool("--draft-window-seconds 0.5")
    pool.start()
    with pool.job("asleep") as asleep, pool.job("next") as other:
        hold(asleep, 0, 1)
        working = asleep.submit(task_of(portrait, **LONG), 0)
        until(lambda: bool(asleep.progress()), 60)
        sleeper = asleep._entry.job
        asleep._pool.ask("leave", sleeper)  # as the pool does by itself after SILENT_SECONDS
        with pytest.raises(RendererLost, match="taken back"):
            working.result(150)
        stale = dict(asleep._held)
        hold(other, 0, 1)
        mine = other.submit(task_of(portrait, **LONG), 1)
        until(lambda: bool(other.progress()), 60)
        # The sleeper still believes in lane 1, for a moment or for as long as nobody tells it.
        loan = stale.get(1)
        if loan is not None:
            late = loan.renderer.render.remote(task_of(portrait, **SHORT), sleeper, loan.lease.number)
            assert ray.get(loan.renderer.windows.remote(loan.lease.number, 3, 0)) == ()
            assert ray.get(loan.renderer.progress.remote(loan.lease.number)) is None
            loan.renderer.cancel.remote(loan.lease.number)
        rendered = mine.result(150)
        assert len(rendered.window_seconds) == 20
        if loan is not None:
            with pytest.raises(ray.exceptions.RayTaskError, match="JobCancelled"):
                ray.get(late, timeout=30)
        until(lambda: 1 not in asleep._held or asleep._held[1].lease != stale[1].lease, 20)


@pytest.mark.long
def test_a_gpu_that_fails_three_jobs_is_fenced_off(
    open_pool: Callable[..., PoolClient], portrait: Path, cluster: Cluster
) -> None:
    """Three jobs in a row lose the same GPU: it is shown as fenced, not lent, and comes back on request."""
    pool = open_pool("--draft-fault crash@1")
    pool.start()
    for number in range(3):
        with pool.job(f"job{number}") as job:
            hold(job, 0)
            with pytest.raises(RendererLost, match="exit code -9"):
                job.submit(task_of(portrait, **SHORT), 0).result(150)
    until(lambda: PoolLook().status()["lanes"][0]["state"] == "fenced", 10)
    with pool.job("another") as job:
        job.want(2)
        until(lambda: job.lanes().ready == {1}, 30)
        assert 0 not in job.lanes().coming
    shown = run_command(cluster, "pool", "--json")
    lane = json.loads(shown.stdout)["lanes"][0]
    assert (shown.returncode, lane["state"]) == (0, "fenced")
    assert "3 jobs in a row lost it" in lane["trouble"]
    again = run_command(cluster, "pool", "--readmit", "0")
    assert again.returncode == 0, again.stderr
    until(lambda: PoolLook().status()["lanes"][0]["state"] == "idle", 60)
    wrong = run_command(cluster, "pool", "--readmit", "1")
    assert (wrong.returncode, "no GPU 1 is fenced off" in wrong.stderr) == (2, True)


def test_an_idle_engine_that_dies_is_replaced(open_pool: Callable[..., PoolClient]) -> None:
    """kill -9 of an engine that nobody uses: some seconds later another one is there."""
    pool = open_pool()
    killed = pool.start()[1]
    os.kill(killed.engine_pid, signal.SIGKILL)
    until(lambda: killed.engine_pid not in {info.engine_pid for info in pool.start()}, 60)
    assert [info.lane for info in pool.start()] == [0, 1]
    assert PoolLook().status()["lanes"][1]["restarts"] == 1


@pytest.mark.long
def test_memory_that_a_failure_left_behind_is_noticed(
    open_pool: Callable[..., PoolClient], portrait: Path, cluster: Cluster
) -> None:
    """A failed graph that leaves half of the GPU's memory in use costs the engine, and no job after it."""
    pool = open_pool("--draft-fault leak@2")
    pool.start()
    known = {pid for pid, _ in engines(f"TEST_MARK={cluster.mark}")}
    with pool.job("job") as job:
        hold(job, 0)
        job.submit(task_of(portrait, **SHORT), 0).result(150)
        hold(job, 0)
        other = replace(task_of(portrait).recipe, seed=8)  # the engine still has the first one's frames
        with pytest.raises(GraphError, match="leaks memory"):
            job.submit(task_of(portrait, **SHORT, recipe=other), 0).result(150)
        now = {pid for pid, _ in engines(f"TEST_MARK={cluster.mark}")}
        assert len(known & now) == 1
        assert len(now) == 2
        hold(job, 0)
        assert job.submit(task_of(portrait, **SHORT), 0).result(150).left == 0


def test_a_gpu_with_a_cuda_error_is_left(open_pool: Callable[..., PoolClient], portrait: Path) -> None:
    """Every prompt after it would fail, whoever's: another engine gets the segment."""
    pool = open_pool("--draft-fault broken@2")
    pool.start()
    with pool.job("job") as job:
        hold(job, 0)
        with pytest.raises(RendererLost, match=r"the GPU failed in .*KSampler.*CUDA error"):
            job.submit(task_of(portrait), 0).result(150)


@pytest.mark.long
def test_other_settings_wait_for_the_jobs_in_the_pool(open_pool: Callable[..., PoolClient]) -> None:
    """Used: an error that names the setting.  Idle: the pool is started anew with them.

    So it is for a job of a process that was there before: it never gets the engines of others.
    """
    pool = open_pool("--draft-window-seconds 0.1")
    first = {info.engine_pid for info in pool.start()}
    with pool.job("busy") as job:
        hold(job, 0)
        with pytest.raises(ConfigurationError, match=r"in use by 1 jobs.*INFINITETALK_DRAFT_ARGS"):
            open_pool("--draft-window-seconds 0.2")
    until(lambda: not pool.ask("status")["jobs"], 20)
    other = open_pool("--draft-window-seconds 0.2")
    assert first.isdisjoint({info.engine_pid for info in other.start()})
    with other.job("others") as job:
        hold(job, 0)
        with (
            pytest.raises(ConfigurationError, match=r"in use by 1 jobs.*INFINITETALK_DRAFT_ARGS"),
            pool.job("mine"),
        ):
            pass
    until(lambda: not other.ask("status")["jobs"], 20)
    with pool.job("mine") as job:
        hold(job, 0)
        assert pool.ask("settings").draft_args == "--draft-window-seconds 0.1"
    pool.end()


def test_two_processes_share_a_pool_that_outlives_them(
    open_pool: Callable[..., PoolClient], cluster: Cluster
) -> None:
    """Two commands at once: done by the same engines, which stay; without work they end, then the pool."""
    jobs = [
        submit(
            cluster,
            speech(cluster.folder, 300),
            name,
            draft_args="--draft-window-seconds 0.3",
            env={"INFINITETALK_IDLE_SECONDS": "4"},
        )
        for name in ("left", "right")
    ]
    for job in jobs:
        assert job.finish() == 0, job.said()
    look = PoolLook()
    assert look.states() == ["idle", "idle"]
    until(lambda: not engines(f"TEST_MARK={cluster.mark}"), 40)
    until(lambda: pool_is_gone(), 20)
    none = run_command(cluster, "pool")
    assert (none.returncode, "there is no pool of GPUs on this cluster" in none.stderr) == (3, True)
    assert pool_is_gone()


def pool_is_gone() -> bool:
    try:
        ray.get_actor(pool_name(), NAMESPACE)
    except ValueError:
        return True
    return False


@pytest.mark.long
def test_another_versions_pool_takes_over(open_pool: Callable[..., PoolClient], portrait: Path) -> None:
    """The old pool keeps its job's lane and gives the other one up; with the job over, it is gone."""
    old = open_pool("--draft-window-seconds 0.3")
    old.start()
    with pool_of_another_version(old) as new, old.job("last") as job:
        hold(job, 1)
        working = job.submit(task_of(portrait, **LONG), 1)
        until(lambda: len(ray.get(new.renderers.remote())[1]) == 1, 60)
        assert not working.done()
        assert working.result(150).left == 0
        job.close()
        until(lambda: len(ray.get(new.renderers.remote())[1]) == 2, 60)
        until(pool_is_gone, 20)


class pool_of_another_version:
    def __init__(self, like: PoolClient) -> None:
        self._settings = like._settings

    def __enter__(self) -> Any:
        where = {"namespace": NAMESPACE, "lifetime": "detached"}
        self._pool = PoolActor.options(name="pool-other", **where).remote("pool-other", self._settings)
        return self._pool

    def __exit__(self, *_: object) -> None:
        ray.get(self._pool.close.remote())
        ray.kill(self._pool)


@pytest.mark.long
def test_nodes_come_and_go_under_a_job(
    open_pool: Callable[..., PoolClient], cluster: Cluster, tmp_path: Path
) -> None:
    """A node that joins is used by the job in work; it is killed: that costs a window, and its lane goes."""
    pool = open_pool("--draft-window-seconds 2")
    pool.start()
    enough = threading.Event()

    def on_progress(_: JobProgress) -> None:
        if enough.is_set():
            raise JobCancelled("job")

    watch, look = Watch(tmp_path / "job"), PoolLook()
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(render_with, pool, tmp_path, 6000, "job", on_progress=on_progress)
        try:
            until(lambda: bool(watch.seen), 90)
            node = cluster.add_node(1)
            until(lambda: [lane["state"] for lane in look.status()["lanes"]][2:] == ["busy"], 90)
            (taken,) = [found["gpus"] for found in look.status()["jobs"]]
            assert 2 in taken
            killed = time.monotonic()
            node.kill()
            cluster.nodes.remove(node)
            until(lambda: len(look.status()["lanes"]) == 2, 60)
            # Its segment waits for one of the others; those did not stop.
            until(lambda: len([at for at, _, _ in watch.seen if at > killed + 2]) >= 2, 60)
            assert not job.done()
        finally:
            enough.set()
            watch.over.set()
        with pytest.raises(JobCancelled):
            job.result(150)


def test_an_autoscaling_cluster_is_asked_by_the_queue(
    open_pool: Callable[..., PoolClient], cluster: Cluster
) -> None:
    """GPUs are asked of Ray for jobs that wait and lanes that are wished for; none without work."""

    def asked() -> int:
        found = _internal_kv_get("autoscaler_resource_request")
        return len(json.loads(found)) if found else 0

    pool = open_pool(max_gpus=5, idle_seconds=2)
    pool.start()
    pool.ask("backlog", "service", 3, False)
    until(lambda: asked() == 3, 20)
    with pool.job("wide") as job:
        job.want(7)
        until(lambda: len(job.lanes().ready) == 2, 30)
        until(lambda: asked() == 5, 20)
    until(lambda: asked() == 0, 40)  # the backlog was said once only: its source is gone
    until(lambda: not engines(f"TEST_MARK={cluster.mark}"), 40)


@pytest.mark.long
def test_unequal_gpus_get_unequal_segments(open_pool: Callable[..., PoolClient], tmp_path: Path) -> None:
    """Speeds are learned by rendering, kept in the file, and shape the next job; a straggler is run twice."""
    speeds = tmp_path / "speeds.json"
    pool = open_pool("--draft-window-seconds 0.2,4", speeds_file=speeds)
    pool.start()
    frames = 500
    first, _ = render_with(pool, tmp_path, frames, "first")
    # The slow GPU's segment was done by the fast one, which had nothing else to do.
    assert len(calculate_segments(frames, 2).segments) == 2
    assert first.gpu_count == 1
    portrait = ROOT / "examples" / "portrait.png"
    with pool.job("learn") as job:
        for lane in (0, 1):
            hold(job, lane)
            job.submit(task_of(portrait, **SHORT), lane).result(150)

    def known() -> list[float]:
        return [lane["speed"] for lane in PoolLook().status()["lanes"]]

    until(lambda: min(known()) < 0.7, 10)  # on a busy machine the fast one is not twenty times as fast
    slow = known().index(min(known()))  # Ray decides which of them is the node's GPU 1
    until(speeds.exists, 10)
    assert all(rate > 0 for rate in json.loads(speeds.read_text()).values())
    render_with(pool, tmp_path, 1000, "second")
    plan = json.loads((tmp_path / "second" / "plan.json").read_text())
    shares = [0, 0]
    for segment in plan["segments"]:
        shares[segment["gpu"]] += segment["stop"] - segment["start"]
    assert shares[1 - slow] > shares[slow], shares
