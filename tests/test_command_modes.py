"""Two speakers on the command line: real Ray and draft engines; refusals before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.render_command import Command, decoded, samples

SpeechOf = Callable[[int], Path]


def test_two_speakers_on_two_renderers(tmp_path: Path, portrait: Path, speech_of: SpeechOf) -> None:
    """Together, with boxes: as long as the longer speech, sound and picture, on two GPUs."""
    with Image.open(portrait) as picture:
        width, height = picture.size
    output = tmp_path / "talk.mp4"
    arguments = ["--image", portrait, "--audio", speech_of(150), "--audio-2", speech_of(120)]
    arguments += ["--box-1", f"0,0,{width // 2},{height}", "--box-2", f"[{width // 2},0,{width},{height}]"]
    arguments += ["--gpus", 2, "--width", 96, "--height", 96, "--steps", 2, "--negative-prompt", "blurred"]
    command = Command(tmp_path, [*arguments, "-o", output, "--json"])
    assert command.finish() == 0, command.log
    assert len(decoded(output)) == command.result["frames"] == 150
    assert abs(samples(output) - 150 * 640) <= 1024
    assert command.result["segments_processed"] == 2
    assert "negative prompt changes nothing" in command.log


@pytest.mark.parametrize(
    ("arguments", "env", "code", "words"),
    [
        (["--mask-1", "PORTRAIT", "--mask-2", "PORTRAIT"], {}, 2, "mask_1: only together with audio_2"),
        (["--audio-2", "SPEECH", "--box-1", "0,0,9,9"], {}, 2, "box_2: needed with box_1"),
        (
            ["--audio-2", "SPEECH", "--box-1", "0,0,9,9", "--box-2", "0,0,9,99999"],
            {},
            2,
            "beyond the picture",
        ),
        (["--audio-2", "MISSING"], {}, 2, "audio_2: "),
        (["--audio-2", "SPEECH", "--box-1", "left"], {}, 2, "--box-1"),
        (["--size", "720p", "--width", "640"], {}, 2, "size: not together"),
        (["--audio-2", "SPEECH"], {"INFINITETALK_NODE_PACK": "0"}, 3, "two speakers need the node pack"),
    ],
)
def test_refusals(
    tmp_path: Path,
    portrait: Path,
    speech_of: SpeechOf,
    arguments: list[str],
    env: dict[str, str],
    code: int,
    words: str,
) -> None:
    """One line that names the field or the setting; Ray was never started."""
    files = {"PORTRAIT": portrait, "SPEECH": speech_of(30), "MISSING": tmp_path / "nothing.wav"}
    filled = [files.get(word, word) for word in arguments]
    output = tmp_path / "talk.mp4"
    command = Command(
        tmp_path, ["--image", portrait, "--audio", speech_of(30), "-o", output, *filled, "--json"], **env
    )
    assert command.finish(150) == code
    assert words in command.log
    assert "Traceback" not in command.log
    assert "found" not in command.log
