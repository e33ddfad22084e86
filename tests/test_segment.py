"""A segment on a real engine process: windows that continue each other, each with its own time's speech."""

from __future__ import annotations

import io
import threading
import wave
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.comfy_client import ComfyClient
from pipeline.draft.stamp import read_stamp
from pipeline.engine import RunningEngine, choose_engine, discard_outputs, running_engine
from pipeline.errors import GraphError, JobCancelled
from pipeline.frames import check_video, read_frames, read_stack
from pipeline.messages import Recipe, SegmentProgress, SegmentTask, WindowCheckpoint
from pipeline.segment import render_segment, rest, window_parts
from pipeline.segment_files import SegmentFiles, join_windows
from pipeline.settings import Settings
from pipeline.workflow import load
from tests.free_ports import free_ports

SIZE = 64
WINDOWS = (81, 81, 21)
FRAMES = 81 + 72 + 12
START = 1000
"""The segment's place in the job; its speech is silent but for one second at a time that is known."""
LOUD = range(START + 100, START + 125)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    settings = Settings(engine="draft", scratch_dir=tmp_path_factory.mktemp("scratch"), ports=free_ports(10))
    with running_engine(choose_engine(settings), settings) as running:
        yield running


def wav(first: int, frames: int) -> bytes:
    """Speech of the job's frames ``[first, first + frames)``: a tone in ``LOUD``, silence elsewhere."""
    tone = (np.sin(np.arange(640) * 2 * np.pi * 200 / 16_000) * 15_000).astype(np.int16)
    parts = [tone if frame in LOUD else np.zeros(640, np.int16) for frame in range(first, first + frames + 2)]
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.concatenate(parts).tobytes())
    return target.getvalue()


def task_of(portrait: Path, **changes: object) -> SegmentTask:
    with Image.open(portrait) as picture:
        target = io.BytesIO()
        picture.convert("RGB").resize((SIZE, SIZE)).save(target, format="PNG")
    recipe = Recipe("job", load("image_single"), "A person talks", 7, 4, SIZE, SIZE, 9)
    starts = (START, START + 72, START + 144)
    fields = {
        "recipe": recipe,
        "index": 3,
        "frames": FRAMES,
        "windows": WINDOWS,
        "head": FRAMES,  # lossless, so that every frame can be looked at
        "tail": 0,
        "portraits": (target.getvalue(),),
        "speech": tuple(wav(start, length) for start, length in zip(starts, WINDOWS, strict=True)),
        **changes,
    }
    return SegmentTask(**fields)  # type: ignore[arg-type]


def joined(windows: Sequence[WindowCheckpoint], folder: Path) -> SegmentFiles:
    """The segment that these windows make in ``folder``."""
    parts = [SegmentFiles.store(folder / f"window-{w.window}", w.files) for w in windows]
    return join_windows(parts, folder / "whole", folder)


def checkpoints(engine: RunningEngine, task: SegmentTask, folder: Path) -> list[WindowCheckpoint]:
    """The windows of ``task``."""
    windows: list[WindowCheckpoint] = []
    render_segment(
        task,
        ComfyClient(engine.url),
        folder / "window",
        report=lambda _: None,
        discard=lambda fetched: discard_outputs(engine, fetched),
        cancelled=threading.Event(),
        silent_after=20,
        keep=windows.append,
    )
    return windows


def run(engine: RunningEngine, task: SegmentTask, folder: Path) -> tuple[np.ndarray, list[SegmentProgress]]:
    seen: list[SegmentProgress] = []
    windows: list[WindowCheckpoint] = []
    seconds, nodes = render_segment(
        task,
        ComfyClient(engine.url),
        folder / "segment",
        report=seen.append,
        discard=lambda fetched: discard_outputs(engine, fetched),
        cancelled=threading.Event(),
        silent_after=20,
        keep=windows.append,
    )
    assert not (folder / "segment").exists()
    assert len(seconds) == len(task.windows)
    sampler = nodes["KSampler"]
    assert sampler.ran + sampler.cached == len(task.windows)
    if len(task.windows) > 1:  # one prompt for each window: what does not change is encoded once
        for once in ("CLIPTextEncode", "CLIPVisionEncode", "UNETLoader"):
            assert nodes[once].ran <= 1
            assert nodes[once].cached >= len(task.windows) - 1
    return read_stack(joined(windows, folder).path("head"), task.head), seen


def test_windows_continue_each_other_and_hear_their_own_time(
    engine: RunningEngine, portrait: Path, tmp_path: Path
) -> None:
    """One unbroken motion over three windows; the mouth opens in the loud second only."""
    frames, seen = run(engine, task_of(portrait), tmp_path)
    stamps = [read_stamp(frame) for frame in frames]
    assert [stamp.frame for stamp in stamps if stamp] == list(range(FRAMES))
    opening = np.array([stamp.opening for stamp in stamps if stamp])
    loud = np.array([START + i in LOUD for i in range(FRAMES)])
    assert opening[loud][3:].min() > 0.3
    quiet = ~loud & ~np.roll(loud, 6)  # the mouth takes some frames to close
    assert opening[quiet].max() < 0.1
    steps = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    assert max(steps[80], steps[152]) <= np.percentile(steps, 99) * 1.2
    assert [p.windows_done for p in seen if p.fraction == 0.0][-1] == 3
    assert any(0 < p.fraction < 1 for p in seen)
    assert not list((engine.base_dir / "output").rglob("*.png"))


def test_the_same_task_gives_the_same_pixels(engine: RunningEngine, portrait: Path, tmp_path: Path) -> None:
    """A segment that is sent twice comes out the same; another segment moves differently."""
    short = {"frames": 81, "head": 81, "windows": (81,), "speech": (wav(START, 81),)}
    first, _ = run(engine, task_of(portrait, **short), tmp_path / "a")
    again, _ = run(engine, task_of(portrait, **short), tmp_path / "b")
    other, _ = run(engine, task_of(portrait, **short, index=4), tmp_path / "c")
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_task_goes_on_from_any_window(engine: RunningEngine, portrait: Path, tmp_path: Path) -> None:
    """The windows after a checkpoint are those of an unbroken run, bit by bit, in all three files."""
    task = task_of(portrait, head=26, tail=40)  # the tail begins in the second window
    windows = checkpoints(engine, task, tmp_path)
    assert [sum(parts) for parts in window_parts(task)] == [81, 72, 12]
    again = checkpoints(engine, rest(task, windows[0]), tmp_path)
    last = checkpoints(engine, rest(rest(task, windows[0]), again[0]), tmp_path)
    whole = joined(windows, tmp_path)
    pieces = joined([windows[0], again[0], last[0]], tmp_path / "pieces")
    for part, frames in whole.frames.items():
        assert np.array_equal(read_stack(whole.path(part), frames), read_stack(pieces.path(part), frames))
    assert whole.frames == {"head": 26, "body": FRAMES - 66, "tail": 40}
    check_video(whole.path("body"), FRAMES - 66)
    parts = [list(read_frames(tmp_path / f"window-{number}" / "body.mp4")) for number in (0, 1)]
    assert np.array_equal(np.stack(list(read_frames(whole.path("body")))), np.stack([*parts[0], *parts[1]]))
    stamps = [read_stamp(frame) for frame in read_stack(whole.path("tail"), 40)]
    assert [stamp.frame for stamp in stamps if stamp] == list(range(FRAMES - 40, FRAMES))


def test_a_window_that_gives_too_few_frames_is_an_error(
    engine: RunningEngine, portrait: Path, tmp_path: Path
) -> None:
    """Frames are counted: a graph that drops one never becomes a segment."""
    task = task_of(portrait)
    broken = load("image_single").text.replace('"length": 4096', '"length": 5')
    recipe = Recipe(
        "job",
        type(task.recipe.workflow)("x.json", task.recipe.workflow.slots, broken),
        "",
        7,
        4,
        SIZE,
        SIZE,
        9,
    )
    with pytest.raises(GraphError, match="5 frames instead of 81"):
        run(engine, task_of(portrait, recipe=recipe), tmp_path)
    assert not (tmp_path / "segment").exists()


def test_cancelling_stops_a_window_within_two_seconds(portrait: Path, tmp_path: Path) -> None:
    """The engine is idle again soon after, and nothing half is left."""
    settings = Settings(
        engine="draft", scratch_dir=tmp_path, ports=free_ports(10), draft_args="--draft-window-seconds 8"
    )
    cancelled = threading.Event()
    with running_engine(choose_engine(settings), settings) as slow:
        client = ComfyClient(slow.url)

        def report(progress: SegmentProgress) -> None:
            if progress.fraction > 0:
                cancelled.set()

        with pytest.raises(JobCancelled):
            render_segment(
                task_of(portrait),
                client,
                tmp_path / "segment",
                report=report,
                discard=lambda _: None,
                cancelled=cancelled,
                silent_after=20,
                keep=lambda _: None,
            )
        idle = threading.Event()
        for _ in range(20):
            if not client.queue().running:
                break
            idle.wait(0.1)
        assert not client.queue().running
    assert not (tmp_path / "segment").exists()


def test_a_drift_is_taken_out_and_a_lost_engine_changes_nothing(portrait: Path, tmp_path: Path) -> None:
    """An engine that gets 0.05 levels warmer with each frame; the frames handed on are those that are shown.

    Matched, a level or so is left after three windows instead of eight, the motion is unbroken, and windows
    that go on from a checkpoint are those of an unbroken run, bit by bit.
    """
    settings = Settings(
        engine="draft", scratch_dir=tmp_path, ports="18220-18239", draft_args="--draft-drift 0.05"
    )
    task = task_of(portrait)
    matched = replace(task, recipe=replace(task.recipe, color_match=True))
    with Image.open(io.BytesIO(task.portraits[0])) as picture:
        true = np.asarray(picture.convert("RGB"), float)
    with running_engine(choose_engine(settings), settings) as drifting:
        plain = joined(checkpoints(drifting, task, tmp_path / "plain"), tmp_path / "plain")
        windows = checkpoints(drifting, matched, tmp_path / "matched")
        again = checkpoints(drifting, rest(matched, windows[0]), tmp_path / "again")
    others = joined([windows[0], *again], tmp_path / "again")
    warm = []
    for files in (plain, joined(windows, tmp_path / "matched")):
        frames = read_stack(files.path("head"), FRAMES)
        red, _, blue = (frames[:, -8:].astype(float) - true[-8:]).mean((1, 2)).T
        warm.append((red - blue) / 2)
        stamps = [read_stamp(frame) for frame in frames]
        assert [stamp.frame for stamp in stamps if stamp] == list(range(FRAMES))
    assert warm[0][-1] > 7
    assert warm[1].max() < 1.8
    assert np.abs(np.diff(warm[1])).max() < 0.6
    assert np.array_equal(frames, read_stack(others.path("head"), FRAMES))
    assert [bytes(one.motion) for one in windows[1:2]] == [bytes(other.motion) for other in again[:1]]
    with Image.open(io.BytesIO(bytes(windows[0].motion))) as handed:
        assert np.array_equal(np.asarray(handed.convert("RGB")), frames[81 - 9])


def test_matching_changes_nothing_where_nothing_drifts(
    engine: RunningEngine, portrait: Path, tmp_path: Path
) -> None:
    """The same pixels, asked for or not."""
    task = task_of(portrait)
    matched = replace(task, recipe=replace(task.recipe, color_match=True))
    first, _ = run(engine, task, tmp_path / "a")
    second, _ = run(engine, matched, tmp_path / "b")
    assert np.array_equal(first, second)
