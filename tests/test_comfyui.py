"""Whole jobs on real ComfyUIs on the CPU: ``make test-comfyui COMFYUI_DIR=...`` only.

Tiny random weights under production file names, the production graphs as they are, two renderers, every
mode; then engines that are killed and jobs that are cancelled.  Windows alone are in ``test_comfyui_modes``.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import requests

from actors.driver import open_pool, render
from actors.pool_client import PoolClient
from pipeline.errors import JobCancelled
from pipeline.messages import NodeRuns
from pipeline.progress import JobProgress
from pipeline.request import RenderRequest
from pipeline.result import RenderResult
from pipeline.settings import Settings
from tests.comfyui_process import NEEDS_COMFYUI
from tests.render_command import Command, decoded, samples

pytestmark = NEEDS_COMFYUI

SIZE = 64
FRAMES = 150
"""Two segments of two windows each, of 81 and 17 frames."""
MODES = ("image_single", "video_single", "image_multi", "video_multi")
LOADERS = {
    *("UNETLoader", "LoraLoaderModelOnly", "ModelPatchLoader", "VAELoader", "CLIPLoader"),
    *("CLIPVisionLoader", "AudioEncoderLoader"),
}
CANCEL_SECONDS = 2.0

Jobs = dict[str, tuple[RenderResult, Path]]


@pytest.fixture
def command(
    comfyui_settings: Settings, tmp_path: Path, portrait: Path, speech_of: Callable[[int], Path]
) -> Iterator[Callable[[int], Command]]:
    """Starts ``infinitetalk render`` with so many steps on two ComfyUIs, in a process of its own."""
    running: list[Command] = []

    def start(steps: int) -> Command:
        settings = comfyui_settings.model_dump(exclude={"scratch_dir"}, exclude_defaults=True)
        env = {f"INFINITETALK_{name.upper()}": str(value) for name, value in settings.items()}
        files = ["--image", portrait, "--audio", speech_of(FRAMES), "-o", tmp_path / "talk.mp4"]
        sizes = ["--width", SIZE, "--height", SIZE, "--gpus", 2, "--steps", steps, "--json"]
        running.append(Command(tmp_path, [*files, *sizes], **env))
        return running[-1]

    yield start
    for one in running:
        one.process.kill()  # what a failed test has left
        one.process.wait()


def engines_of(command: Command) -> list[int]:
    """Pids of the ComfyUIs of a command."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0") if entry.name.isdecimal() else []
        except OSError:
            continue
        if words[1:2] == ["main.py"] and any(word.startswith(str(command.scratch)) for word in words):
            found.append(int(entry.name))
    return found


def left_over(command: Command, processes_with: Callable[[str], list[int]]) -> list[object]:
    """Processes, engines' folders and half-made files of a command."""
    beside = [path for path in command.scratch.parent.iterdir() if path.name not in ("scratch", "talk.mp4")]
    return [
        *processes_with(str(command.scratch)),
        *command.scratch.glob("infinitetalk-engine-*"),
        *beside,
    ]


def test_a_killed_comfyui_costs_one_more_try(
    command: Callable[[int], Command], tmp_path: Path, processes_with: Callable[[str], list[int]]
) -> None:
    """kill -9 in the middle of a job: the video is exact all the same, and nothing is left behind."""
    job = command(2)
    job.wait_for("windows [1-9]", 400)
    engines = engines_of(job)
    assert len(engines) == 2
    os.kill(engines[0], signal.SIGKILL)
    assert job.finish(400) == 0, job.log
    assert "gets another try" in job.log
    assert "died with exit code -9" in job.log
    assert len(decoded(tmp_path / "talk.mp4")) == FRAMES
    assert left_over(job, processes_with) == []


def test_ctrl_c_ends_every_process(
    command: Callable[[int], Command],
    tmp_path: Path,
    processes_with: Callable[[str], list[int]],
    wait_gone: Callable[[Iterable[int], float], list[int]],
) -> None:
    """In the first window: exit code 130, no video, no process, no file."""
    job = command(100)
    job.wait_for("created 2 segments", 400)
    engines = engines_of(job)
    assert len(engines) == 2
    job.process.send_signal(signal.SIGINT)
    assert job.finish(150) == 130, job.log
    assert wait_gone(engines, 60) == []
    assert not (tmp_path / "talk.mp4").exists()
    assert left_over(job, processes_with) == []


@pytest.fixture(scope="module")
def pool(comfyui_settings: Settings) -> Iterator[PoolClient]:
    """Two renderers, each with a ComfyUI of its own, that have rendered nothing yet."""
    with open_pool(comfyui_settings, 2) as started:
        yield started


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source video that is shorter than the speech."""
    path = tmp_path_factory.mktemp("video") / "source.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for number in range(100):
            picture = np.full((SIZE, SIZE, 3), 2 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def jobs(
    pool: PoolClient,
    comfyui_settings: Settings,
    tmp_path_factory: pytest.TempPathFactory,
    portrait: Path,
    video: Path,
    speech_of: Callable[[int], Path],
) -> Jobs:
    """A job of every mode, one after the other on the same renderers."""
    folder = tmp_path_factory.mktemp("jobs")
    done = {}
    for mode in MODES:
        picture, persons = mode.split("_")
        more = {"audio_2": speech_of(FRAMES - 10)} if persons == "multi" else {}
        request = RenderRequest.checked(
            **{picture: portrait if picture == "image" else video},
            audio=speech_of(FRAMES),
            width=SIZE,
            height=SIZE,
            steps=2,
            **more,
        )
        output = folder / f"{mode}.mp4"
        done[mode] = render(request, comfyui_settings, output, pool=pool, on_progress=lambda _: None), output
    return done


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_the_exact_length(jobs: Jobs, mode: str) -> None:
    """Two segments, two renderers, as many frames as the speech has, and all of its sound."""
    result, output = jobs[mode]
    assert (result.engine, result.frames, result.segments_processed, result.gpu_count) == (
        "comfyui",
        FRAMES,
        2,
        2,
    )
    assert len(decoded(output)) == FRAMES
    assert abs(samples(output) - FRAMES * 640) <= 1024
    assert len(result.seams) == 1


def test_a_first_job_runs_each_node_as_often_as_it_must(jobs: Jobs) -> None:
    """Two segments of two windows on two engines that are cold: what no window changes runs once on each."""
    result, _ = jobs["image_single"]
    once, each = NodeRuns(ran=2, cached=2), NodeRuns(ran=4)
    assert result.nodes == {
        **dict.fromkeys(LOADERS, once),
        "ModelSamplingSD3": once,
        "CLIPTextEncode": NodeRuns(ran=4, cached=4),  # the prompt and the negative one
        "CLIPVisionEncode": once,
        "LoadImage": NodeRuns(ran=4, cached=2),  # the portrait once, and motion frames in second windows
        "LoadAudio": each,
        "AudioEncoderEncode": each,
        "WanInfiniteTalkToVideo": each,
        "InfiniteTalkSpeech": each,
        "KSampler": each,
        "VAEDecode": each,
        "ImageFromBatch": each,
        "SaveImage": each,
    }


@pytest.mark.parametrize("mode", ["video_single", "video_multi"])
def test_a_second_job_of_the_same_models_loads_none(jobs: Jobs, mode: str) -> None:
    """In every prompt the engine says (``execution_cached``) that it still has what the loaders gave."""
    result, _ = jobs[mode]
    assert {name: result.nodes[name] for name in LOADERS} == dict.fromkeys(LOADERS, NodeRuns(cached=4))
    assert result.nodes["CLIPTextEncode"] == NodeRuns(cached=8)


def test_the_engines_own_logs_say_how_often_models_were_loaded(
    jobs: Jobs, pool: PoolClient, comfyui_settings: Settings
) -> None:
    """The diffusion model twice in four jobs: for one speaker, and, with all unloaded before, for two."""
    assert len(jobs) == 4
    for info in pool.start():
        [log] = comfyui_settings.scratch.glob(f"infinitetalk-logs-*/engine-*-{info.port}.log")
        assert len(re.findall(r"model_type FLOW", log.read_text())) == 2


def test_a_cancelled_job_leaves_its_engines_idle_and_empty(
    pool: PoolClient,
    comfyui_settings: Settings,
    tmp_path: Path,
    portrait: Path,
    speech_of: Callable[[int], Path],
) -> None:
    """Cancelled while both sample: both queues are empty within 2 s, as the engines say; nothing is kept."""
    engines = [f"http://127.0.0.1:{info.port}" for info in pool.start()]
    idle_after: dict[str, float] = {}

    def watch(engine: str, began: float) -> None:
        while requests.get(f"{engine}/prompt", timeout=120).json()["exec_info"]["queue_remaining"]:
            time.sleep(0.02)
        idle_after[engine] = time.monotonic() - began

    watching: list[threading.Thread] = []

    def cancel(progress: JobProgress) -> None:
        sampling = [0 < state.fraction < 0.8 for state in progress.states]
        if progress.stage == "rendering" and all(sampling):
            now = time.monotonic()
            watching.extend(threading.Thread(target=watch, args=(engine, now)) for engine in engines)
            for thread in watching:
                thread.start()
            raise KeyboardInterrupt

    request = RenderRequest.checked(
        image=portrait, audio=speech_of(FRAMES), width=SIZE, height=SIZE, steps=100, seed=5
    )
    with pytest.raises(JobCancelled):
        render(request, comfyui_settings, tmp_path / "talk.mp4", pool=pool, on_progress=cancel)
    for thread in watching:
        thread.join()
    assert sorted(idle_after) == sorted(engines)
    assert max(idle_after.values()) < CANCEL_SECONDS
    assert list(tmp_path.iterdir()) == []
    for engine in engines:
        assert requests.get(f"{engine}/history", timeout=120).json() == {}
        argv = requests.get(f"{engine}/system_stats", timeout=120).json()["system"]["argv"]
        base = Path(argv[argv.index("--base-directory") + 1])
        assert [path for name in ("input", "output") for path in (base / name).rglob("*")] == []
        assert list(base.glob("segment-*")) == []
