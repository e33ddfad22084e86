"""The command line, whole: real Ray, processes and files; the draft engine in the GPU's place."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.conftest import ROOT, SHARED

SIZE = 96
SpeechOf = Callable[[int], Path]
ProcessesWith = Callable[[str], list[int]]
WaitGone = Callable[[Iterable[int], float], list[int]]


class Command:
    """``infinitetalk render`` in a process of its own; its standard error is read as it comes."""

    def __init__(self, folder: Path, arguments: list[object], draft_args: str = "", **env: str) -> None:
        self.scratch = folder / "scratch"
        self.scratch.mkdir(exist_ok=True)
        self.lines: list[str] = []
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "infinitetalk", "render", *map(str, arguments)],
            cwd=ROOT,
            env={
                **os.environ,
                "INFINITETALK_SCRATCH_DIR": str(self.scratch),
                "INFINITETALK_ENGINE": "draft",
                "INFINITETALK_DRAFT_ARGS": draft_args,
                **env,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip())
                self._news.notify_all()
        with self._news:
            self.lines.append("(end)")
            self._news.notify_all()

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """The first line of the log that has ``pattern`` in it."""

        def found() -> str | None:
            return next((line for line in self.lines if re.search(pattern, line)), None)

        with self._news:
            self._news.wait_for(lambda: found() or self.lines[-1:] == ["(end)"], seconds)
            line = found()
        assert line is not None, f"no {pattern!r} in the log:\n" + "\n".join(self.lines)
        return line

    def finish(self, seconds: float = 120) -> int:
        """Wait for the end; the exit code."""
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    @cached_property
    def result(self) -> dict[str, Any]:
        """What ``--json`` printed."""
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.read())
        return answer


@pytest.fixture
def render(tmp_path: Path, portrait: Path, processes_with: ProcessesWith) -> Iterator[Callable[..., Command]]:
    """Starts the command with the bundled portrait at a small size; afterwards no process is left."""
    started: list[Command] = []

    def start(*arguments: object, draft_args: str = "", image: Path = portrait, **env: str) -> Command:
        sizes = ["--width", SIZE, "--height", SIZE, "--json"]
        command = Command(tmp_path, ["--image", image, *sizes, *arguments], draft_args, **env)
        started.append(command)
        return command

    yield start
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()
    assert processes_with(str(tmp_path / "scratch")) == []


def decoded(path: Path) -> list[np.ndarray[Any, Any]]:
    """All frames of a video, grey, counted by decoding."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]


def samples(path: Path) -> int:
    """Samples of the sound at 16 kHz, by decoding."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=16_000)
    with av.open(str(path)) as container:
        parts = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
        return sum(part.samples for part in [*parts, *resampler.resample(None)])


@pytest.fixture(scope="module")
def talk(
    tmp_path_factory: pytest.TempPathFactory, portrait: Path, speech_of: SpeechOf
) -> tuple[Command, Path, Path]:
    """A finished run of 300 frames on two renderers: the command, its output and its speech."""
    folder = tmp_path_factory.mktemp("talk")
    output, speech = folder / "talk.mp4", speech_of(300)
    sizes = ["--width", SIZE, "--height", SIZE, "--json", "--gpus", 2]
    command = Command(folder, ["--image", portrait, "--audio", speech, "-o", output, *sizes])
    assert command.finish() == 0, command.log
    return command, output, speech


def test_a_speech_is_rendered_on_two_renderers(talk: tuple[Command, Path, Path]) -> None:
    """300 frames of speech give an mp4 of 300 frames with the whole sound, made of two segments."""
    command, output, _ = talk
    result = command.result
    assert len(decoded(output)) == 300
    assert abs(samples(output) - 300 * 640) <= 1024
    assert result["success"] is True
    assert {
        k: result[k] for k in ("engine", "gpu_count", "segments_processed", "frames", "fps", "duration")
    } == {
        "engine": "draft",
        "gpu_count": 2,
        "segments_processed": 2,
        "frames": 300,
        "fps": 25,
        "duration": 12.0,
    }
    assert "2 GPUs" in result["message"]
    assert "preview" in result["message"]
    assert Path(result["video_path"]) == output
    assert len(result["seams"]) == 1
    for words in (
        "DRAFT ENGINE",
        "found 2 GPU devices",
        r"GPU 0: .* \(\d+\.\d GB\)",
        "created 2 segments",
        r"GPU 0: frames 0-\d+ \(\d+ frames\)",
        r"GPU 1: frames \d+-300",
        "segment 0 processed successfully",
        "segment 1 processed successfully",
        "GPUs used: 2",
    ):
        assert re.search(words, command.log), words
    assert not (output.parent / ".infinitetalk").exists()
    with av.open(str(output)) as container:
        video = container.streams.video[0].codec_context
        assert (video.name, video.pix_fmt, video.width, video.height) == ("h264", "yuv420p", SIZE, SIZE)
    head = output.read_bytes()[:4096]
    assert b"moov" in head  # faststart: a browser can play it while it loads


def test_the_mouth_follows_the_speech(talk: tuple[Command, Path, Path]) -> None:
    """Mouth pixels of the video move with the loudness of the frame's own speech, in every segment."""
    _, output, speech = talk
    frames = np.stack(decoded(output)).astype(float)
    mouth = frames[:, int(SIZE * 0.50) : int(SIZE * 0.64), int(SIZE * 0.40) : int(SIZE * 0.60)]
    opening = np.abs(mouth - np.median(mouth, axis=0)).mean(axis=(1, 2))
    with av.open(str(speech)) as container:
        sound = np.concatenate([f.to_ndarray().ravel() for f in container.decode(audio=0)]).astype(float)
    loudness = np.sqrt((sound[: 300 * 640].reshape(300, 640) ** 2).mean(axis=1))
    best = {
        shift: np.corrcoef(np.roll(opening, -shift)[20:-20], loudness[20:-20])[0, 1] for shift in range(-8, 9)
    }
    assert best[0] > 0.5, best
    assert abs(max(best, key=lambda shift: best[shift])) <= 1, best
    for half in (slice(20, 140), slice(160, 280)):
        assert np.corrcoef(opening[half], loudness[half])[0, 1] > 0.5


def test_a_short_speech_goes_to_one_renderer(
    render: Callable[..., Command], speech_of: SpeechOf, tmp_path: Path
) -> None:
    """Less than one window works, and less than 100 frames are not split."""
    for frames in (1, 99):
        output = tmp_path / f"{frames}.mp4"
        command = render("--audio", speech_of(frames), "-o", output, "--gpus", 2)
        assert command.finish() == 0, command.log
        assert (len(decoded(output)), command.result["segments_processed"]) == (frames, 1)


def test_max_frames_and_one_gpu(render: Callable[..., Command], speech_of: SpeechOf, tmp_path: Path) -> None:
    """--max-frames cuts picture and sound; --no-multi-gpu renders in one piece."""
    output = tmp_path / "talk.mp4"
    command = render("--audio", speech_of(300), "-o", output, "--max-frames", 120, "--no-multi-gpu")
    assert command.finish() == 0, command.log
    assert len(decoded(output)) == 120
    assert abs(samples(output) - 120 * 640) <= 1024
    assert (command.result["gpu_count"], command.result["segments_processed"]) == (1, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_and_the_same_command_goes_on(
    number: signal.Signals,
    render: Callable[..., Command],
    speech_of: SpeechOf,
    tmp_path: Path,
    processes_with: ProcessesWith,
    wait_gone: WaitGone,
) -> None:
    """Exit code 130, no process, no half video; finished segments are not rendered again."""
    output = tmp_path / "talk.mp4"
    arguments = ("--audio", speech_of(400), "-o", output, "--gpus", 3)
    first = render(*arguments, draft_args="--draft-window-seconds 1.5")
    first.wait_for("segment . processed successfully")
    pids = processes_with(str(tmp_path / "scratch"))
    first.process.send_signal(number)
    first.wait_for("cancelling")
    first.process.send_signal(signal.SIGINT)  # impatience changes nothing
    assert first.finish(30) == 130
    assert first.result["error"] == "JobCancelled"
    assert "what is finished is kept" in first.log
    assert "Traceback" not in first.log
    assert wait_gone(pids, 10) == []
    assert not output.exists()
    kept = sorted(path.name for path in (tmp_path / ".infinitetalk").glob("*/segments/????"))
    assert kept
    second = render(*arguments)
    assert second.finish() == 0, second.log
    assert len(decoded(output)) == 400
    redone = {int(index) for index in re.findall(r"segment (\d+) processed", second.log)}
    assert redone.isdisjoint(int(name) for name in kept)


def test_a_killed_driver_leaves_nothing_running(
    render: Callable[..., Command],
    speech_of: SpeechOf,
    tmp_path: Path,
    processes_with: ProcessesWith,
    wait_gone: WaitGone,
    talk: tuple[Command, Path, Path],
) -> None:
    """kill -9 of the driver in a second window: engines and guards are gone within seconds.

    The same command then renders no finished window again, and gives the frames of an undisturbed run.
    """
    arguments = ("--audio", speech_of(300), "-o", tmp_path / "talk.mp4", "--gpus", 2)
    command = render(*arguments, draft_args="--draft-window-seconds 3")
    command.wait_for("created 2 segments")
    wait_for_window(tmp_path, 0)
    pids = processes_with(str(tmp_path / "scratch"))
    ours = [pid for pid in pids if re.search("pipeline|ray::Renderer", command_line(pid))]
    assert len(ours) == 6  # two renderers, two guards, two engines
    command.process.kill()
    assert wait_gone(ours, 10) == []
    # Two agents of Ray's own look for their dead head for up to a minute before they end.
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert wait_gone(pids, 10) == []
    assert not list(command.scratch.glob("infinitetalk-engine-*"))
    assert not (tmp_path / "talk.mp4").exists()
    kept = len(list(tmp_path.glob(".infinitetalk/*/segments/*.windows/00????/")))
    again = render(*arguments)
    assert again.finish() == 0, again.log
    assert re.search(r"segment \d goes on after window \d of 3", again.log)
    assert again.result["nodes"]["KSampler"]["ran"] == 6 - kept
    assert np.array_equal(decoded(tmp_path / "talk.mp4"), decoded(talk[1]))


def test_an_engine_killed_in_the_middle_costs_one_more_try(
    render: Callable[..., Command], speech_of: SpeechOf, tmp_path: Path, talk: tuple[Command, Path, Path]
) -> None:
    """Engines that crash in their second windows are replaced; finished windows are not rendered again.

    The frames are those of an undisturbed run, bit by bit.
    """
    output = tmp_path / "talk.mp4"
    command = render(
        "--audio", speech_of(300), "-o", output, "--gpus", 2, draft_args="--draft-window-seconds 3"
    )
    wait_for_window(tmp_path, 0)
    engines = engines_of(command)
    assert len(engines) == 2
    os.kill(engines[0], signal.SIGKILL)
    assert command.finish() == 0, command.log
    assert "gets another try" in command.log
    assert "died with exit code -9" in command.log
    (kept,) = re.findall(r"segment \d goes on after window (\d) of 3", command.log)
    assert command.result["nodes"]["KSampler"]["ran"] == 6 - int(kept) < 6  # the lost task's do not count
    assert np.array_equal(decoded(output), decoded(talk[1]))


def test_exact_is_one_chain_through_a_crash(
    render: Callable[..., Command], speech_of: SpeechOf, tmp_path: Path
) -> None:
    """--continuity exact has no seam, and one renderer that goes on where another died changes no frame."""
    whole, output = tmp_path / "whole.mp4", tmp_path / "talk.mp4"
    arguments = ("--audio", speech_of(250), "--continuity", "exact")
    alone = render(*arguments, "-o", whole, "--gpus", 1)
    assert alone.finish() == 0, alone.log
    assert (alone.result["seams"], alone.result["segments_processed"]) == ([], 1)
    assert alone.result["nodes"]["KSampler"]["ran"] == 4
    assert len(decoded(whole)) == 250
    command = render(*arguments, "-o", output, "--gpus", 2, draft_args="--draft-window-seconds 2")
    assert "1 of 2 GPUs" in command.wait_for("continuity exact: 1 chain")
    wait_for_window(tmp_path, 0)
    (busy,) = [pid for pid in engines_of(command) if any((base_directory(pid) / "input").glob("*.wav"))]
    os.kill(busy, signal.SIGKILL)
    assert command.finish() == 0, command.log
    assert re.search(r"segment 0 goes on after window [1-3] of 4", command.log)
    assert command.result["gpu_count"] == 1
    assert np.array_equal(decoded(output), decoded(whole))


def wait_for_window(folder: Path, window: int, seconds: float = 60) -> None:
    """Wait until this window of every segment that is planned is stored in the job's directory."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        plans = list(folder.glob(".infinitetalk/*/plan.json"))
        count = len(json.loads(plans[0].read_text())["segments"]) if plans else 1
        if len(list(folder.glob(f".infinitetalk/*/segments/*.windows/{window:06d}/"))) == count:
            return
        time.sleep(0.05)
    raise AssertionError(f"window {window} was not stored within {seconds} s")


def base_directory(engine: int) -> Path:
    """The folder of an engine."""
    words = command_line(engine).split()
    return Path(words[words.index("--base-directory") + 1])


def engines_of(command: Command) -> list[int]:
    """Pids of the engines of a run."""
    return [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal() and is_engine(entry, str(command.scratch))
    ]


def command_line(pid: int) -> str:
    """The words of a process, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def is_engine(process: Path, scratch: str) -> bool:
    """Whether a process is an engine of this run, not its guard."""
    try:
        words = (process / "cmdline").read_bytes().decode().split("\0")
    except OSError:
        return False
    return words[1:3] == ["-m", "pipeline.draft"] and any(word.startswith(scratch) for word in words)


def test_an_engine_that_never_starts_is_told_with_its_log(
    render: Callable[..., Command], speech_of: SpeechOf, tmp_path: Path
) -> None:
    """One clear sentence, the end of the engine's log, no traceback, exit code 1."""
    command = render(
        "--audio", speech_of(30), "-o", tmp_path / "talk.mp4", draft_args="--draft-fault die-at-start"
    )
    assert command.finish() == 1
    assert "ended with exit code 1 before it was ready" in command.log
    assert "    | " in command.log
    assert "Traceback" not in command.log
    assert command.result["error"] == "EngineError"


def test_out_of_memory_names_the_node_and_ends_the_job(
    render: Callable[..., Command], speech_of: SpeechOf, tmp_path: Path
) -> None:
    """A failing graph is not tried again elsewhere; the node and the engine's words are told."""
    command = render(
        "--audio",
        speech_of(300),
        "-o",
        tmp_path / "talk.mp4",
        draft_args="--draft-fault oom@2 --draft-fault oom@3",
    )
    assert command.finish() == 1
    answer = command.result
    assert answer["error"] == "RenderFailed"
    assert re.search(r"segment \d can't be rendered: GPU \d: .*KSampler.*out of memory", answer["message"])
    assert "Traceback" not in command.log
    assert not (tmp_path / "talk.mp4").exists()


BAD_FILES = {
    "empty.png": b"",
    "text.png": b"this is a text file named .png\n",
    "empty.wav": b"",
    "text.wav": b"not a sound at all\n",
}


@pytest.mark.parametrize(
    ("option", "name", "field"),
    [
        ("--image", "missing.png", "image"),
        ("--image", "empty.png", "image"),
        ("--image", "text.png", "image"),
        ("--audio", "missing.wav", "audio"),
        ("--audio", "empty.wav", "audio"),
        ("--audio", "text.wav", "audio"),
    ],
)
def test_bad_files_are_refused(
    render: Callable[..., Command], speech_of: SpeechOf, tmp_path: Path, option: str, name: str, field: str
) -> None:
    """One line that names the field, exit code 2, nothing left behind."""
    if name in BAD_FILES:
        (tmp_path / name).write_bytes(BAD_FILES[name])
    output = tmp_path / "talk.mp4"
    command = render("--audio", speech_of(30), "-o", output, option, tmp_path / name)
    assert command.finish() == 2
    assert command.result["error"] == "InvalidRequest"
    assert re.search(rf"infinitetalk: {field}: ", command.log)
    assert "Traceback" not in command.log
    assert "starting the engines" not in command.log
    assert not output.exists()
    assert not (tmp_path / ".infinitetalk").exists()


@pytest.mark.parametrize(
    ("arguments", "env", "code", "words"),
    [
        (["--width", "8"], {}, 2, "width"),
        (["--gpus", "0"], {}, 2, "gpus"),
        (["--overlap-frames", "5"], {}, 2, "overlap_frames"),
        ([], {"INFINITETALK_DRAFT_ARGS": '--x"'}, 3, "INFINITETALK_DRAFT_ARGS"),
        (["--max-frames", "0"], {}, 2, "max_frames"),
        (["-o", "OUT/talk.avi"], {}, 2, "mp4"),
        (["-o", "/proc/talk.mp4"], {}, 3, "can't write"),
        ([], {"INFINITETALK_ENGINE": "comfyui"}, 3, "INFINITETALK_COMFYUI_DIR"),
        ([], {"INFINITETALK_COMFYUI_DIR": "/nowhere", "INFINITETALK_ENGINE": "auto"}, 3, "no main.py"),
        ([], {"INFINITETALK_PORTS": "1-2"}, 3, "INFINITETALK_PORTS"),
        ([], {"INFINITETALK_TYPO": "1"}, 3, "is not a setting"),
    ],
)
def test_wrong_options_are_refused(
    render: Callable[..., Command],
    speech_of: SpeechOf,
    tmp_path: Path,
    arguments: list[str],
    env: dict[str, str],
    code: int,
    words: str,
) -> None:
    """Exit code 2 for the request, 3 for the machine; the message names what to change."""
    filled = [argument.replace("OUT", str(tmp_path)) for argument in arguments]
    command = render("--audio", speech_of(30), "-o", tmp_path / "talk.mp4", *filled, **env)
    assert command.finish() == code
    assert words in command.log
    assert "Traceback" not in command.log


def test_a_damaged_job_is_mended(render: Callable[..., Command], speech_of: SpeechOf, tmp_path: Path) -> None:
    """A kept segment that was cut short is rendered again; a damaged plan is made again."""
    output, job = tmp_path / "talk.mp4", tmp_path / "job"
    arguments = ("--audio", speech_of(150), "-o", output, "--gpus", 2, "--job-dir", job)
    assert render(*arguments).finish() == 0
    whole = output.read_bytes()
    assert len(list((job / "segments").iterdir())) == 2
    body = job / "segments" / "0000" / "body.mp4"
    body.write_bytes(body.read_bytes()[:100])
    again = render(*arguments)
    assert again.finish() == 0, again.log
    assert "segment 0 processed" in again.log
    assert "segment 1 processed" not in again.log
    (job / "plan.json").write_text("{")
    assert render(*arguments).finish() == 0
    assert len(decoded(output)) == 150
    assert len(output.read_bytes()) == len(whole)


def test_no_gpu_is_visible_and_a_draft_does_not_care(
    render: Callable[..., Command], speech_of: SpeechOf, tmp_path: Path
) -> None:
    """Lanes on the CPU are not counted against CUDA_VISIBLE_DEVICES."""
    output = tmp_path / "talk.mp4"
    command = render("--audio", speech_of(30), "-o", output, CUDA_VISIBLE_DEVICES="")
    assert command.finish() == 0, command.log


def test_a_full_range_of_ports_is_told(
    render: Callable[..., Command], speech_of: SpeechOf, tmp_path: Path
) -> None:
    """The one port is taken by a stranger: exit code 3, and the setting to change."""
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        command = render(
            "--audio", speech_of(30), "-o", tmp_path / "talk.mp4", INFINITETALK_PORTS=f"{port}-{port}"
        )
        assert command.finish() == 3
    assert f"no free port from {port} to {port}" in command.log


def test_a_video_conditions_each_window(
    render: Callable[..., Command], speech_of: SpeechOf, tmp_path: Path
) -> None:
    """--video in the portrait's place gives the exact length too, with the source's frames."""
    source = tmp_path / "source.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for number in range(120):
            picture = np.full((SIZE, SIZE, 3), 40 + number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    output = tmp_path / "talk.mp4"
    sizes = ["--width", SIZE, "--height", SIZE, "--json"]
    command = Command(tmp_path, ["--video", source, "--audio", speech_of(90), "-o", output, *sizes])
    assert command.finish() == 0, command.log
    frames = decoded(output)
    assert len(frames) == 90
    corner = [float(frame[:8, :8].mean()) for frame in frames]
    assert corner[-1] > corner[0] + 30


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="the shared example media are not here")
@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_the_real_example_on_several_renderers(
    render: Callable[..., Command], tmp_path: Path, lanes: int
) -> None:
    """The singing woman of the InfiniteTalk project: exact length on 1, 2 and 4 renderers."""
    data = SHARED / "data" / "infinitetalk" / "single"
    output = tmp_path / "song.mp4"
    command = render("--audio", data / "1.wav", "-o", output, "--gpus", lanes, image=data / "ref_image.png")
    assert command.finish() == 0, command.log
    assert len(decoded(output)) == command.result["frames"] == round(samples(data / "1.wav") / 640)


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="the shared example media are not here")
@pytest.mark.parametrize(
    "given",
    [
        {"--image": "multi/ref_img.png", "--audio": "multi/1-man.WAV", "--audio-2": "multi/1-woman.WAV"},
        {"--video": "single/ref_video.mp4", "--audio": "single/1.wav"},
    ],
    ids=["two speakers", "talking-head video"],
)
def test_the_other_real_examples(tmp_path: Path, given: dict[str, str]) -> None:
    """Two speakers in one picture, and a video in the portrait's place: 110 frames in two segments."""
    output = tmp_path / "talk.mp4"
    inputs = [
        word for option, file in given.items() for word in (option, SHARED / "data/infinitetalk" / file)
    ]
    options = ["-o", output, "--width", SIZE, "--height", SIZE, "--max-frames", 110, "--json"]
    command = Command(tmp_path, [*inputs, *options])
    assert command.finish() == 0, command.log
    assert len(decoded(output)) == 110
    assert command.result["segments_processed"] == 2
