"""The renderer: the Ray actor that owns one GPU and one engine, and renders one segment at a time.

Thin: what a segment is made of is in ``pipeline.segment``, what an engine is in ``pipeline.engine``.
Nobody repairs a renderer: when its engine is lost, the pool drops it and makes another.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import threading
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from actors import metrics
from pipeline import profiles
from pipeline.comfy_client import ComfyClient
from pipeline.devices import Device, this_cpu, visible_gpus
from pipeline.engine import (
    RunningEngine,
    choose_engine,
    clear_files,
    discard_outputs,
    engine_kind,
    running_engine,
)
from pipeline.errors import (
    ConfigurationError,
    EngineError,
    GraphError,
    JobCancelled,
    MediaError,
    OutOfMemory,
    PipelineError,
    StorageError,
)
from pipeline.job import storage_errors
from pipeline.logs import log_about, write_json_logs
from pipeline.messages import (
    RenderedSegment,
    RendererInfo,
    RendererState,
    SegmentProgress,
    SegmentTask,
    WindowCheckpoint,
)
from pipeline.mode_check import require_mode
from pipeline.models import packs_of
from pipeline.segment import render_segment, rest
from pipeline.settings import Settings
from pipeline.wrapper_segment import render_segment as render_whole_segment

DIED_WITHIN_SECONDS = 2.0
"""A request fails before the guard has told of the engine's death; this long is waited for the word."""
OLD_PROMPT_SECONDS = 20.0
"""How long a prompt that was cancelled may go on: its step on a large video takes as long."""
UNLOAD_SECONDS = 5.0
DRAFT_NICENESS = 10
"""A draft's frames come a hundred times as fast as a GPU's: clients need not wait for them to be taken."""
LEFT_BEHIND = 0.15
"""Share of the memory that may stay in use after everything was unloaded: CUDA keeps some for itself."""

log = logging.getLogger(__name__)


def _step_back() -> None:
    """Lower the priority of this whole process: on Linux, ``os.nice`` is the calling thread's alone."""
    for thread in Path("/proc/self/task").iterdir():
        os.setpriority(os.PRIO_PROCESS, int(thread.name), DRAFT_NICENESS)


class Renderer:
    """One GPU, one engine, one segment at a time.

    The constructor only stores: whatever it raised would reach callers as a bare ActorDiedError.
    """

    def __init__(self, lane: int, settings: Settings, index: int = 0) -> None:
        self._lane, self._settings, self._index = lane, settings, index
        self._node = socket.gethostname()
        write_json_logs(settings.log, node=self._node, gpu=lane)
        if engine_kind(settings) == "draft":
            _step_back()
        self._open = ExitStack()
        self._info: RendererInfo | None = None
        self._clock: metrics.LaneClock | None = None
        self._turn = threading.Lock()
        self._holder: str | None = None
        """The job whose segment is in work."""
        self._lease = 0
        """Under which it is in work (``actors.pool.Lease``)."""
        self._over = False
        self._ended = 0
        """Leases up to this one are over."""
        self._free_memory: int | None = None
        """Bytes of the GPU that were free before anything was rendered; None where it is a CPU."""
        self._engine: RunningEngine | None = None
        self._client: ComfyClient | None = None
        self._device: Device | None = None
        self._profile: profiles.Profile | None = None
        self._workflow: str | None = None
        self._packs: tuple[str, ...] = ()
        self._cancelled = threading.Event()
        self._progress: SegmentProgress | None = None
        self._last: WindowCheckpoint | None = None
        self._windows: dict[int, WindowCheckpoint] = {}
        """Finished windows of the segment in work that nobody has fetched."""

    @ray.method(concurrency_group="work")
    def start(self) -> RendererInfo:
        """Start the engine and wait until it answers; who this renderer is.

        Raises ``EngineError``, ``ConfigurationError``, ``StorageError``.
        """
        where = f"GPU {self._lane} on {self._node}"
        try:
            client, engine = self._started()
        except EngineError as error:
            raise EngineError(f"{where}: {error.reason}", error.log) from None
        except ConfigurationError as error:
            raise ConfigurationError(f"{where}: {error.reason}") from None
        assert self._device is not None
        self._info = RendererInfo(
            lane=self._lane,
            node=self._node,
            engine=engine_kind(self._settings),
            engine_version=client.version(),
            profile=self._profile.name if self._profile else "none",
            port=engine.port,
            pid=os.getpid(),
            engine_pid=engine.pid,
            guard_pid=engine.guard_pid,
            device=self._device.name,
            memory_gb=self._device.memory_gb,
        )
        self._clock = self._clock or metrics.LaneClock(self._lane, self._node)
        return self._info

    def _started(self) -> tuple[ComfyClient, RunningEngine]:
        if self._engine is None or self._client is None:
            if self._device is None:
                self._device, self._profile = self._look_at_the_gpu()
            program = choose_engine(self._settings, self._packs)  # on this node: paths are the node's own
            if self._profile is not None:
                program = replace(program, command=(*program.command, *self._profile.flags))
            self._engine = self._open.enter_context(running_engine(program, self._settings))
            self._client = ComfyClient(self._engine.url, stalled_after=self._settings.stalled_seconds)
            self._free_memory = self._client.free_memory()
        return self._client, self._engine

    def _end_engine(self) -> None:
        """The next use starts another one."""
        self._open.close()
        self._engine = self._client = self._workflow = None

    def _look_at_the_gpu(self) -> tuple[Device, profiles.Profile | None]:
        """The device, and how much may be kept on it; None where the operator has said it in flags."""
        gpus = visible_gpus() if engine_kind(self._settings) == "comfyui" else ()
        device = gpus[0] if gpus else this_cpu()
        if self._settings.profile != "auto":
            return device, profiles.named(self._settings.profile)
        if not gpus or profiles.MEMORY_FLAGS.intersection(self._settings.comfyui_flags):
            return device, None
        return device, profiles.profile_for(device.memory_gb)

    @ray.method(concurrency_group="work")
    def render(self, task: SegmentTask, holder: str, lease: int) -> RenderedSegment:
        """Render the windows of one task; what ``windows`` did not hand out comes back, nothing stays here.

        ``holder``: the job as the pool calls it; ``lease``: the number under which it has this renderer.

        Out of memory, there is one more try with everything unloaded and the next smaller profile.
        Raises ``GraphError``, ``EngineError`` (with the engine's log), ``StorageError``, and ``JobCancelled``
        (also where the lease is over).
        """
        with self._turn:
            if lease <= self._ended:
                raise JobCancelled(task.recipe.job)
            self._cancelled.clear()
            self._holder, self._lease = holder, lease
        try:
            about = log_about(job=task.recipe.job, segment=task.index, attempt=task.attempt)
            with about, self._clock.busy() if self._clock is not None else nullcontext():
                log.info("segment %d begins with window %d", task.index, task.first)
                return self._render_task(task)
        except GraphError as error:
            self._recover_memory(error)
            raise
        finally:
            with self._turn:
                self._holder, self._lease = None, 0
            self._windows = {}

    def _render_task(self, task: SegmentTask) -> RenderedSegment:
        self._last, self._windows = None, {}
        self._load_packs(task)
        client, engine = self._started()
        began = time.monotonic()
        try:
            client = self._without_old_prompts(client, task)
            if self._workflow not in (None, task.recipe.workflow.file):
                client.free()  # other models: the old ones would stay in memory beside them
            if self._workflow != task.recipe.workflow.file:
                require_mode(client, task.recipe.workflow)
        except EngineError as error:
            raise self._lost(engine, error, task, began) from error
        self._workflow = task.recipe.workflow.file
        try:
            return self._render(task)
        except OutOfMemory as first:
            log.warning("segment %d: %s; one more try with less on the GPU", task.index, first)
            self._take_less()
        try:
            return self._render(task if self._last is None else rest(task, self._last))
        except OutOfMemory as again:
            width, height = task.recipe.width, task.recipe.height
            raise OutOfMemory(again.node, f"{again.reason}; {profiles.advice(width, height)}") from None

    def _without_old_prompts(self, client: ComfyClient, task: SegmentTask) -> ComfyClient:
        """The client, once the engine is idle: a prompt that was cancelled runs on to its next step.

        One that goes on for long hangs, and all that is queued behind it would wait for ever: a new engine.
        """
        late = time.monotonic() + OLD_PROMPT_SECONDS
        while client.queue().busy:
            if time.monotonic() > late:
                log.warning("GPU %d: the engine does not let go of a prompt; it is started anew", self._lane)
                self._end_engine()
                return self._started()[0]
            if self._cancelled.wait(0.1):
                raise JobCancelled(task.recipe.job)
        return client

    def _recover_memory(self, error: GraphError) -> None:
        """After a failure: what it left in the GPU's memory would be missing in every job that comes.

        The engine is asked to unload all; where far less is free than at its start, there is a new one.
        """
        before = self._free_memory
        try:
            client, _ = self._started()
            if before is None:
                return
            client.free()
            late = time.monotonic() + UNLOAD_SECONDS
            while (free := client.free_memory() or 0) < (1 - LEFT_BEHIND) * before:
                if time.monotonic() > late:
                    log.warning(
                        "GPU %d: %.1f GiB of memory are gone after a failure (%s); a new engine",
                        self._lane,
                        (before - free) / 2**30,
                        error,
                    )
                    self._end_engine()
                    metrics.engine_restarted(self._lane, self._node, "memory")
                    self._started()
                    return
                time.sleep(0.2)  # the engine unloads when it comes to it, and tells nobody
        except PipelineError as trouble:
            # The job's own error is what its user has to hear; the next use, or the pool, finds this one.
            log.warning("GPU %d: the engine is not well after a failure: %s", self._lane, trouble)

    def _load_packs(self, task: SegmentTask) -> None:
        """A new engine where the graph needs packs of nodes that this one was started without.

        Raises ``ConfigurationError`` where a pack is not on this node; the engine goes on as it is then.
        """
        packs = packs_of(json.loads(task.recipe.workflow.text))
        if engine_kind(self._settings) == "comfyui" and not set(packs) <= set(self._packs):
            choose_engine(self._settings, packs)
            self._end_engine()
            metrics.engine_restarted(self._lane, self._node, "packs")
            self._packs = packs

    def _take_less(self) -> None:
        """Unload everything; where a smaller profile has other flags, a new engine with those."""
        client, _ = self._started()
        less = profiles.smaller(self._profile) if self._profile is not None else None
        if less is None:
            client.free()
            return
        self._end_engine()
        metrics.engine_restarted(self._lane, self._node, "memory")
        self._profile = less

    def _render(self, task: SegmentTask) -> RenderedSegment:
        client, engine = self._started()
        began = time.monotonic()
        task = self._with_memory_presets(task)
        run = render_whole_segment if task.recipe.workflow.whole_segments else render_segment
        try:
            with (
                storage_errors(self._settings.scratch),
                tempfile.TemporaryDirectory(prefix="segment-", dir=engine.base_dir) as folder,
            ):
                seconds, nodes = run(
                    task,
                    client,
                    Path(folder) / "window",
                    report=self._report,
                    discard=lambda fetched: discard_outputs(engine, fetched),
                    cancelled=self._cancelled,
                    silent_after=self._settings.silent_seconds,
                    keep=self._keep,
                )
        except (EngineError, MediaError, StorageError) as error:
            # The guard removes the base directory when the engine dies, so files vanish below our hands too.
            raise self._lost(engine, error, task, began) from error
        finally:
            self._progress = None
            if engine.alive:
                clear_files(engine)
        windows, self._windows = self._windows, {}
        return RenderedSegment(
            index=task.index,
            lane=self._lane,
            node=self._node,
            attempt=task.attempt,
            windows=tuple(windows.values()),
            window_seconds=seconds,
            nodes=nodes,
            left=len(task.windows) - task.first - len(seconds),
        )

    def _lost(
        self, engine: RunningEngine, error: PipelineError, task: SegmentTask, began: float
    ) -> PipelineError:
        """What became of the engine, with the end of its log; ``error`` itself where it lives."""
        if engine.process.exited.wait(DIED_WITHIN_SECONDS):
            reason = f"the engine (pid {engine.pid}) died with exit code {engine.process.exit_code}"
        elif isinstance(error, EngineError):
            reason = error.reason
        else:
            return error
        after = f"{reason} {time.monotonic() - began:.0f} s into segment {task.index}"
        return EngineError(f"GPU {self._lane} on {self._node}: {after}", engine.log_tail())

    def _with_memory_presets(self, task: SegmentTask) -> SegmentTask:
        """What the GPU's profile says of the wrapper's slots, unless the request has said it."""
        if self._profile is None or not task.recipe.workflow.has("blocks_to_swap"):
            return task
        known = {
            "blocks_to_swap": self._profile.blocks_to_swap,
            "force_offload": self._profile.force_offload,
        }
        presets = tuple({**known, **dict(task.recipe.presets)}.items())
        return replace(task, recipe=replace(task.recipe, presets=presets))

    def _report(self, progress: SegmentProgress) -> None:
        before = 0 if self._progress is None else len(self._progress.window_seconds)
        for seconds in progress.window_seconds[before:]:
            profile = self._profile.name if self._profile else "none"
            metrics.window_done(self._lane, self._node, profile, seconds)
        self._progress = progress

    @ray.method(concurrency_group="control")
    def progress(self, lease: int) -> SegmentProgress | None:
        """How far the segment in work is; None for who has not this lease."""
        return self._progress if lease == self._lease else None

    def _keep(self, window: WindowCheckpoint) -> None:
        self._windows[window.window] = self._last = window

    @ray.method(concurrency_group="control")
    def windows(self, lease: int, segment: int, first: int) -> tuple[WindowCheckpoint, ...]:
        """Finished windows of the segment in work, from ``first`` on; those before are stored, and let go.

        None for who has not this lease: segments of other jobs have the same numbers.
        """
        if lease != self._lease:
            return ()
        for number, window in self._windows.copy().items():
            if window.segment == segment and number < first:
                self._windows.pop(number, None)
        return tuple(w for w in self._windows.copy().values() if w.segment == segment and w.window >= first)

    @ray.method(concurrency_group="control")
    def state(self) -> RendererState:
        """Who this is and what it does, for a pool that was started again.  Raises ``EngineError``."""
        node = str(ray.get_runtime_context().get_node_id())
        if self._over:
            raise EngineError(f"the renderer of GPU {self._lane} has ended")
        with self._turn:
            return RendererState(
                self._lane, node, self._index, self._info, self._holder, self._lease, self._settings
            )

    @ray.method(concurrency_group="control")
    def trouble(self) -> str | None:
        """What is wrong with the engine; None while it answers."""
        engine, client = self._engine, self._client
        if engine is None or client is None:
            return None
        if not engine.alive:
            return f"the engine (pid {engine.pid}) died with exit code {engine.process.exit_code}"
        try:
            client.version()
        except EngineError as error:
            return error.reason
        return None

    @ray.method(concurrency_group="control")
    def cancel(self, lease: int) -> None:
        """This lease and all before it are over: their ``render`` raises ``JobCancelled``, now and later."""
        with self._turn:
            self._ended = max(self._ended, lease)
            if self._lease <= self._ended:
                self._cancelled.set()

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """End the engine."""
        self._over = True
        self._cancelled.set()
        self._open.close()
        if self._clock is not None:
            self._clock.stop()


# num_cpus=0: an actor with GPUs also takes a CPU for its life otherwise, and a third one hangs on two cores.
RendererActor: Any = ray.remote(  # type: ignore[call-overload]  # Ray's stubs lack concurrency_groups
    num_gpus=1, num_cpus=0, max_restarts=0, max_task_retries=0, concurrency_groups={"work": 1, "control": 4}
)(Renderer)
