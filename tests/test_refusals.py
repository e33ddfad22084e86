"""What the command refuses, or gives up: one clear sentence, the right exit code, nothing left behind."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.render_command import Command, SpeechOf

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


@pytest.mark.long
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


@pytest.mark.long
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
