"""The four modes of both families on the draft engine: whose mouth moves, and when."""

from __future__ import annotations

import threading
import wave
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from actors.driver import choose_workflow, open_pool
from actors.driver import render as render_job
from actors.pool_client import PoolClient
from pipeline.comfy_client import ComfyClient
from pipeline.engine import RunningEngine, choose_engine, running_engine
from pipeline.errors import GraphError
from pipeline.frames import read_stack
from pipeline.job import JobDirectory
from pipeline.messages import WindowCheckpoint
from pipeline.plan import WARM_UP, Plan, calculate_segments
from pipeline.preparation import prepare
from pipeline.request import RenderRequest
from pipeline.segment import render_segment
from pipeline.settings import Settings
from pipeline.workflow import load
from tests.free_ports import free_ports
from tests.test_segment import joined

WIDTH, HEIGHT = 256, 128
FRAMES = 160
Rendered = list[tuple[int, np.ndarray]]
"""Of each segment: its first frame in the job, and its frames [N, H, W, 3]."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    """A draft engine with the node pack, started as a renderer starts it."""
    scratch = tmp_path_factory.mktemp("engine")
    settings = Settings(engine="draft", scratch_dir=scratch, ports=free_ports(10))
    with running_engine(choose_engine(settings), settings) as running:
        yield running


@pytest.fixture(scope="module")
def couple(tmp_path_factory: pytest.TempPathFactory, portrait: Path) -> Path:
    """The bundled portrait twice, side by side."""
    path = tmp_path_factory.mktemp("couple") / "couple.png"
    with Image.open(portrait) as picture:
        face = picture.convert("RGB").resize((256, 256))
    both = Image.new("RGB", (512, 256))
    both.paste(face, (0, 0))
    both.paste(face, (256, 0))
    both.save(path)
    return path


def speech(path: Path, frames: int, loud: np.ndarray) -> Path:
    """A tone of syllables in the frames that are ``loud``, digital silence elsewhere."""
    times = np.arange(frames * 640) / 16_000
    syllables = np.maximum(0, np.sin(2 * np.pi * 3 * times)) * np.sin(2 * np.pi * 180 * times)
    samples = syllables * np.repeat(loud[:frames], 640) * 14_000
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def loudness(path: Path) -> np.ndarray:
    """RMS of each frame."""
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(float)
    return np.sqrt((samples[: len(samples) // 640 * 640].reshape(-1, 640) ** 2).mean(axis=1))


def render(
    engine: RunningEngine, request: RenderRequest, folder: Path, workflow: str, gpus: int = 2
) -> tuple[Plan, Rendered]:
    """All segments of a job, lossless."""
    job = JobDirectory(folder / "job")
    with job.locked():
        prepared = prepare(request, job)
    plan = calculate_segments(prepared.total_frames, gpus)
    recipe = prepared.recipe(request, "job", load(workflow), plan)
    rendered: Rendered = []
    for segment in plan.segments:
        task = replace(prepared.task(recipe, plan, segment, 1), head=segment.frames, tail=0)
        windows: list[WindowCheckpoint] = []
        render_segment(
            task,
            ComfyClient(engine.url),
            folder / "window",
            report=lambda _: None,
            discard=lambda _: None,
            cancelled=threading.Event(),
            silent_after=30,
            keep=windows.append,
        )
        files = joined(windows, folder / f"segment-{segment.index}")
        rendered.append((segment.start, read_stack(files.path("head"), segment.frames)))
    return plan, rendered


def openings(frames: np.ndarray, side: int) -> np.ndarray:
    """How open the mouth of a half (0 left, 1 right) is: dark pixels more than when it is closed."""
    half = WIDTH // 2
    columns = slice(side * half + int(half * 0.38), side * half + int(half * 0.62))
    mouth = frames[:, int(HEIGHT * 0.48) : int(HEIGHT * 0.70), columns].astype(float).mean(axis=3)
    dark = (mouth < 60).mean(axis=(1, 2))
    return np.maximum(0, dark - np.quantile(dark, 0.05))


def follows(opening: np.ndarray, sound: np.ndarray) -> float:
    return float(np.corrcoef(opening, sound)[0, 1])


def turns(count: int) -> np.ndarray:
    """Loud in every other 20 frames."""
    return (np.arange(count) // 20 % 2 == 0).astype(float)


def test_two_speak_together_and_each_moves_its_own_mouth(
    engine: RunningEngine, couple: Path, tmp_path: Path
) -> None:
    """In every segment the left mouth follows track 1, the right one track 2, also where both speak."""
    first = speech(tmp_path / "1.wav", FRAMES, turns(FRAMES))
    second = speech(tmp_path / "2.wav", FRAMES, np.roll(turns(FRAMES), 10))
    request = RenderRequest.checked(image=couple, audio=first, audio_2=second, width=WIDTH, height=HEIGHT)
    plan, rendered = render(engine, request, tmp_path, "talk_multi")
    assert (plan.total_frames, len(plan.segments)) == (FRAMES, 2)
    both = 0
    for start, frames in rendered:
        sounds = [loudness(path)[start : start + len(frames)] for path in (first, second)]
        for side in (0, 1):
            own = follows(openings(frames, side), sounds[side])
            assert own > 0.6, (start, side, own)
            assert follows(openings(frames, side), sounds[1 - side]) < own - 0.3
        wide = [openings(frames, side) > 0.02 for side in (0, 1)]
        both += int((wide[0] & wide[1]).sum())
    assert both > 5


def test_in_turns_the_second_begins_when_the_first_has_ended(
    engine: RunningEngine, couple: Path, tmp_path: Path
) -> None:
    """The length is the sum; only the right mouth moves in the second half, wherever segments begin."""
    half = FRAMES // 2
    first, second = (speech(tmp_path / f"{n}.wav", half, np.ones(half)) for n in (1, 2))
    request = RenderRequest.checked(
        image=couple, audio=first, audio_2=second, audio_order="in_turns", width=WIDTH, height=HEIGHT
    )
    plan, rendered = render(engine, request, tmp_path, "talk_multi")
    assert plan.total_frames == 2 * half
    sounds = [np.append(loudness(first), np.zeros(half)), np.append(np.zeros(half), loudness(second))]
    for start, frames in rendered:
        for side in (0, 1):
            sound = sounds[side][start : start + len(frames)]
            opening = openings(frames, side)
            assert follows(opening, sound) > 0.5, (start, side)
            assert opening[sound == 0].max() < opening[sound > 0].max() / 2


def test_boxes_say_who_is_who(engine: RunningEngine, couple: Path, tmp_path: Path) -> None:
    """With the boxes exchanged, the first track moves the mouth on the right."""
    frames = 60
    first = speech(tmp_path / "1.wav", frames, np.ones(frames))
    second = speech(tmp_path / "2.wav", frames, np.zeros(frames) + (np.arange(frames) > 56))
    request = RenderRequest.checked(
        image=couple,
        audio=first,
        audio_2=second,
        box_1=(256, 0, 512, 256),
        box_2=(0, 0, 256, 256),
        width=WIDTH,
        height=HEIGHT,
    )
    _, [(_, pictures)] = render(engine, request, tmp_path, "talk_multi")
    left, right = (openings(pictures[9:56], side).max() for side in (0, 1))
    assert right > 2 * left


def test_context_only_shifts_where_speech_is_looked_up(
    engine: RunningEngine, portrait: Path, tmp_path: Path
) -> None:
    """The graph with the node pack draws what the core-only graph draws, at every window of every segment."""
    heard = speech(tmp_path / "1.wav", FRAMES, turns(FRAMES))
    request = RenderRequest.checked(image=portrait, audio=heard, width=96, height=96)
    _, ours = render(engine, request, tmp_path / "a", "talk_single")
    _, core = render(engine, request, tmp_path / "b", "image_single")
    assert max(start for start, _ in ours) > 64
    for (_, frames), (_, same) in zip(ours, core, strict=True):
        assert np.array_equal(frames, same)


def video_of(path: Path, frames: int, rate: int) -> Path:
    """A grey video that brightens all the time, with a white bar that wanders from left to right."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(frames):
            share = number / frames
            picture = np.full((HEIGHT, WIDTH, 3), round(30 + 140 * share), np.uint8)
            picture[:10, round(200 * share) : round(200 * share) + 40] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("two", [False, True], ids=["single", "multi"])
def test_a_source_video_is_followed(engine: RunningEngine, tmp_path: Path, two: bool) -> None:
    """Brightness and a bar's place go with the source, of another frame rate, there and back (ping-pong).

    Behind the warm-up, both renderings of an overlap follow the same picture.
    """
    count, source_frames = 300, 200
    source = video_of(tmp_path / "source.mp4", source_frames * 30 // 25, 30)
    heard = speech(tmp_path / "1.wav", count, turns(count))
    more = {"audio_2": heard} if two else {}
    request = RenderRequest.checked(video=source, audio=heard, width=WIDTH, height=HEIGHT, **more)
    plan, rendered = render(engine, request, tmp_path, "talk_multi" if two else "talk_single")
    for overlap, (_, before), (_, after) in zip(plan.overlaps, rendered, rendered[1:], strict=False):
        tail, head = before[-overlap:, -12:, :12], after[:overlap, -12:, :12]
        assert np.abs(tail.mean((1, 2, 3)) - head.mean((1, 2, 3)))[WARM_UP:].max() < 3
    place, corner, bar = [], [], []
    for start, frames in rendered:
        there_and_back = np.abs(
            (start + np.arange(len(frames)) + source_frames) % (2 * source_frames) - source_frames
        )
        top = frames[:, 2:8].mean(axis=(1, 3))
        place.append(there_and_back)
        corner.append(frames[:, -12:, :12].mean(axis=(1, 2, 3)))
        bar.append(((top > 230) * np.arange(WIDTH)).sum(axis=1) / np.maximum(1, (top > 230).sum(axis=1)))
    assert follows(np.concatenate(corner), np.concatenate(place)) > 0.7
    assert follows(np.concatenate(bar), np.concatenate(place)) > 0.7


def test_two_speakers_need_the_nodes(tmp_path: Path, couple: Path) -> None:
    """An engine without the node pack refuses the graph by the missing node's name."""
    heard = speech(tmp_path / "1.wav", 40, np.ones(40))
    request = RenderRequest.checked(image=couple, audio=heard, audio_2=heard, width=WIDTH, height=HEIGHT)
    settings = Settings(engine="draft", scratch_dir=tmp_path, ports=free_ports(10), node_pack=False)
    with (
        running_engine(choose_engine(settings), settings) as bare,
        pytest.raises(GraphError, match=r"InfiniteTalkSpeech|slot: context"),
    ):
        render(bare, request, tmp_path, "talk_multi")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolClient]:
    """Two draft renderers of one Ray session for all wrapper modes."""
    scratch = tmp_path_factory.mktemp("pool")
    settings = Settings(engine="draft", scratch_dir=scratch)
    with open_pool(settings, 2) as running:
        yield running


def still_video(path: Path, picture: Path, width: int) -> Path:
    """Ten seconds of one picture."""
    with Image.open(picture) as opened:
        pixels = np.asarray(opened.convert("RGB").resize((width, HEIGHT)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, HEIGHT, "yuv420p"
        for _ in range(250):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("source", ["image", "video"])
@pytest.mark.parametrize("people", ["single", "multi"])
def test_wrapper_modes_give_the_exact_video(
    pool: PoolClient, portrait: Path, couple: Path, tmp_path: Path, source: str, people: str
) -> None:
    """Through driver, Ray and stitching: every frame is there, and each mouth moves with its speech."""
    two = people == "multi"
    picture, width = (couple, WIDTH) if two else (portrait, HEIGHT)
    if source == "video":
        picture = still_video(tmp_path / "source.mp4", picture, width)
    first = speech(tmp_path / "1.wav", FRAMES, turns(FRAMES))
    second = speech(tmp_path / "2.wav", FRAMES, np.roll(turns(FRAMES), 10))
    more = {"audio_2": second} if two else {}
    request = RenderRequest.checked(
        **{source: picture}, audio=first, width=width, height=HEIGHT, workflow_family="wrapper", **more
    )
    settings = Settings(engine="draft", scratch_dir=tmp_path)
    assert choose_workflow(request, settings).file == f"wrapper_{source}_{people}.json"
    result = render_job(
        request,
        settings,
        tmp_path / "talk.mp4",
        job_dir=tmp_path / "job",
        pool=pool,
        on_progress=lambda _: None,
    )
    plan = JobDirectory(tmp_path / "job").stored_plan()
    assert plan is not None
    assert len(plan.segments) == 2
    assert {length for segment in plan.segments for length in segment.windows} == {81}
    assert result.nodes["WanVideoSampler"].ran == 2
    with av.open(str(tmp_path / "talk.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert len(frames) == result.frames == FRAMES
    for side, track in enumerate([first, second] if two else [first]):
        assert follows(openings(frames, side), loudness(track)) > 0.5, side


def test_force_offload_is_the_wrappers(
    portrait: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It reaches the wrapper's graph; the native family renders without it and says so."""
    heard = speech(tmp_path / "1.wav", 40, np.ones(40))
    for family in ("wrapper", "native"):
        request = RenderRequest.checked(
            image=portrait, audio=heard, workflow_family=family, force_offload=False, width=64, height=64
        )
        job = JobDirectory(tmp_path / family)
        with job.locked():
            prepared = prepare(request, job)
        workflow = choose_workflow(request, Settings(engine="draft"))
        recipe = prepared.recipe(request, "job", workflow, calculate_segments(prepared.total_frames, 1))
        assert (("force_offload", False) in recipe.presets) == (family == "wrapper")
    assert "force_offload changes nothing" in caplog.text
