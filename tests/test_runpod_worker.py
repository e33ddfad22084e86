"""The RunPod worker as RunPod starts it: in the SDK's local server, and in its loop for a platform."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests

from pipeline.frames import check_video
from tests.conftest import ROOT
from tests.runpod_platform import Platform, running_platform
from tests.service_process import free_port

SpeechOf = Callable[[int], Path]
READY_SECONDS = 300.0


@contextmanager
def worker(folder: Path, *arguments: str, **env: str) -> Iterator[Path]:
    """``.runpod/handler.py`` in a process of its own, ended with SIGTERM; its log."""
    mark = uuid.uuid4().hex
    settings = {
        "INFINITETALK_ENGINE": "draft",
        "INFINITETALK_SERVE_DATA_DIR": str(folder / "data"),
        "INFINITETALK_SERVE_VOLUME": str(folder),
        "TEST_MARK": mark,
    }
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / ".runpod" / "handler.py"), *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), **settings, **env},
            stdout=out,
            stderr=out,
        )
    try:
        yield log
        assert process.poll() is None, log.read_text()[-3000:]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert code in (0, -signal.SIGTERM), log.read_text()[-3000:]


def given(speech: Path, frames: int | None = None, **more: Any) -> dict[str, Any]:
    """An input as the hub handler's clients send it."""
    return {
        "input_type": "image",
        "person_count": "single",
        "image_base64": base64.b64encode((ROOT / "examples" / "portrait.png").read_bytes()).decode(),
        "wav_base64": base64.b64encode(speech.read_bytes()).decode(),
        "width": 64,
        "height": 64,
        "max_frame": frames,
        **more,
    }


def video_of(answer: dict[str, Any], folder: Path, frames: int) -> None:
    """The answer's base64 is a video of so many frames, and the answer says what the hub handler's says."""
    path = folder / "answer.mp4"
    path.write_bytes(base64.b64decode(answer["video"]))
    check_video(path, frames)
    assert answer["success"] is True
    assert set(answer) == {"video", "success", "gpu_count", "segments_processed", "message"}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The SDK's local server around a worker that streams; its address."""
    port = free_port()
    folder = tmp_path_factory.mktemp("local")
    arguments = ("--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port))
    with worker(folder, *arguments, INFINITETALK_SERVE_RUNPOD_STREAM="1") as log:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + READY_SECONDS
        while True:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            with suppress(requests.ConnectionError):
                requests.get(url, timeout=120)
                break
            time.sleep(0.2)
        yield url


def post(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The local server takes POST only."""
    answer: dict[str, Any] = requests.post(url, json=body or {}, timeout=120).json()
    return answer


def test_the_local_server_streams(local: str, speech_of: SpeechOf, tmp_path: Path) -> None:
    """/run, /stream: progress that rises, and the answer last."""
    job = post(f"{local}/run", {"input": given(speech_of(60), 40)})["id"]
    told = post(f"{local}/stream/{job}")
    assert told["status"] == "COMPLETED"
    pieces = [piece["output"] for piece in told["stream"]]
    progress = [piece["progress"] for piece in pieces if "progress" in piece]
    assert progress == sorted(progress)
    assert [piece["gpu"] in (0, 1) for piece in pieces if piece.get("stage") == "finished"] == [True]
    video_of(pieces[-1], tmp_path, 40)


def test_the_local_server_answers_at_once_and_later(local: str, speech_of: SpeechOf, tmp_path: Path) -> None:
    """/runsync, and /run with /status: what a stream gave, as one list; the answer is its last item."""
    at_once = post(f"{local}/runsync", {"input": given(speech_of(30))})
    assert at_once["status"] == "COMPLETED"
    video_of(at_once["output"][-1], tmp_path, 30)
    later = post(f"{local}/run", {"input": given(speech_of(30), network_volume=True)})["id"]
    done = post(f"{local}/status/{later}")
    assert done["status"] == "COMPLETED"
    assert "video" not in done["output"][-1]
    check_video(Path(done["output"][-1]["video_path"]), 30)


def test_the_hubs_own_test_passes(local: str, tmp_path: Path) -> None:
    """What RunPod's Hub sends to a new version (tests.json): one second of talking."""
    (case,) = json.loads((ROOT / ".runpod" / "tests.json").read_text())["tests"]
    answer = post(f"{local}/runsync", {"input": case["input"]})
    video_of(answer["output"][-1], tmp_path, 25)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"wav_base64": None}, "audio"),
        ({"image_base64": "@@@"}, "image_base64"),
        ({"image_base64": None, "image_path": "/etc/passwd"}, "image_path"),
        ({"person_count": "many"}, "person_count"),
        ({"width": -4}, "width"),
    ],
)
def test_bad_input_is_told(local: str, speech_of: SpeechOf, change: dict[str, Any], field: str) -> None:
    """An error names the field as the client called it, and no job is made of it."""
    answer = post(f"{local}/runsync", {"input": given(speech_of(30)) | change})
    assert answer["output"] == [{"error": answer["output"][0]["error"]}]
    assert answer["output"][0]["error"].startswith(f"{field}: ")


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Platform, Path]]:
    """A platform and a worker for it that answers as the hub handler, 0.5 s a window; and its folder."""
    folder = tmp_path_factory.mktemp("platform")
    with running_platform() as platform:
        env = platform.environment | {"INFINITETALK_DRAFT_ARGS": "--draft-window-seconds 0.5"}
        with worker(folder, **env):
            yield platform, folder


def test_a_job_from_the_platform(
    platform: tuple[Platform, Path], speech_of: SpeechOf, tmp_path: Path
) -> None:
    """Progress comes as IN_PROGRESS, the answer is an object, all GPUs worked, and nothing stays behind."""
    runpod, folder = platform
    runpod.send("first", given(speech_of(300)))
    answer = runpod.wait("first", progress=False, seconds=READY_SECONDS)
    video_of(answer["output"], tmp_path, 300)
    assert answer["output"]["gpu_count"] == 2
    progress = [body["output"] for body in runpod.of("first") if body.get("status") == "IN_PROGRESS"]
    assert {"rendering"} <= {piece["stage"] for piece in progress}
    assert all(0 <= piece["progress"] < 100 for piece in progress)
    assert list((folder / "data" / "jobs").iterdir()) == []


def test_a_failed_job_is_told(platform: tuple[Platform, Path], speech_of: SpeechOf) -> None:
    """What is no recording fails with the field's name."""
    runpod, _ = platform
    runpod.send("broken", given(speech_of(30), wav_base64=base64.b64encode(b"\0" * 1000).decode()))
    answer = runpod.wait("broken", progress=False, seconds=30)
    assert answer["error"].startswith("audio: ")
    assert "output" not in answer


def test_a_cancel_frees_the_gpus(
    platform: tuple[Platform, Path], speech_of: SpeechOf, tmp_path: Path
) -> None:
    """RunPod stops a job of a minute (its time limits do the same): the next one is done long before that.

    Nothing of it stays on the disk.
    """
    runpod, folder = platform
    runpod.send("long", given(speech_of(9000)))
    runpod.wait("long", progress=True, seconds=30)
    runpod.stops.put("long")
    runpod.send("next", given(speech_of(30)))
    answer = runpod.wait("next", progress=False, seconds=25)
    video_of(answer["output"], tmp_path, 30)
    assert [body for body in runpod.of("long") if body.get("status") != "IN_PROGRESS"] == []
    assert list((folder / "data" / "jobs").iterdir()) == []
