"""The command line, whole: real Ray, processes and files; the draft engine in the GPU's place.

What ends it too early is in ``test_crashes``, what it refuses in ``test_refusals``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from tests.conftest import SHARED
from tests.render_command import SIZE, Command, SpeechOf, Talk, decoded, samples


def test_a_speech_is_rendered_on_two_renderers(talk: Talk) -> None:
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


def test_the_mouth_follows_the_speech(talk: Talk) -> None:
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
    render: Callable[..., Command], speech_of: SpeechOf, tmp_path: Path, warm: dict[str, str]
) -> None:
    """Less than one window works, and less than 100 frames are not split."""
    for frames in (1, 99):
        output = tmp_path / f"{frames}.mp4"
        command = render("--audio", speech_of(frames), "-o", output, "--gpus", 2, **warm)
        assert command.finish() == 0, command.log
        assert (len(decoded(output)), command.result["segments_processed"]) == (frames, 1)


def test_max_frames_and_one_gpu(
    render: Callable[..., Command], speech_of: SpeechOf, tmp_path: Path, warm: dict[str, str]
) -> None:
    """--max-frames cuts picture and sound; --no-multi-gpu renders in one piece."""
    output = tmp_path / "talk.mp4"
    arguments = ("--audio", speech_of(300), "-o", output, "--max-frames", 120, "--no-multi-gpu")
    command = render(*arguments, **warm)
    assert command.finish() == 0, command.log
    assert len(decoded(output)) == 120
    assert abs(samples(output) - 120 * 640) <= 1024
    assert (command.result["gpu_count"], command.result["segments_processed"]) == (1, 1)


@pytest.mark.long
def test_no_gpu_is_visible_and_a_draft_does_not_care(
    render: Callable[..., Command], speech_of: SpeechOf, tmp_path: Path
) -> None:
    """Lanes on the CPU are not counted against CUDA_VISIBLE_DEVICES."""
    output = tmp_path / "talk.mp4"
    command = render("--audio", speech_of(30), "-o", output, CUDA_VISIBLE_DEVICES="")
    assert command.finish() == 0, command.log


def test_a_video_conditions_each_window(speech_of: SpeechOf, tmp_path: Path, warm: dict[str, str]) -> None:
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
    command = Command(tmp_path, ["--video", source, "--audio", speech_of(90), "-o", output, *sizes], **warm)
    assert command.finish() == 0, command.log
    frames = decoded(output)
    assert len(frames) == 90
    corner = [float(frame[:8, :8].mean()) for frame in frames]
    assert corner[-1] > corner[0] + 30


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="the shared example media are not here")
@pytest.mark.parametrize("lanes", [*(pytest.param(n, marks=pytest.mark.long) for n in (1, 2)), 4])
def test_the_real_example_on_several_renderers(
    render: Callable[..., Command], tmp_path: Path, lanes: int, warm: dict[str, str]
) -> None:
    """The singing woman of the InfiniteTalk project: exact length on 1, 2 and 4 renderers."""
    data = SHARED / "data" / "infinitetalk" / "single"
    output = tmp_path / "song.mp4"
    arguments = ("--audio", data / "1.wav", "-o", output, "--gpus", lanes)
    command = render(*arguments, image=data / "ref_image.png", **warm)
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
def test_the_other_real_examples(tmp_path: Path, given: dict[str, str], warm: dict[str, str]) -> None:
    """Two speakers in one picture, and a video in the portrait's place: 110 frames, whatever the segments.

    How many depends on the speeds that the pool has seen.
    """
    output = tmp_path / "talk.mp4"
    inputs = [
        word for option, file in given.items() for word in (option, SHARED / "data/infinitetalk" / file)
    ]
    options = ["-o", output, "--width", SIZE, "--height", SIZE, "--max-frames", 110, "--gpus", 2, "--json"]
    command = Command(tmp_path, [*inputs, *options], **warm)
    assert command.finish() == 0, command.log
    assert len(decoded(output)) == 110
    assert command.result["segments_processed"] == len(command.result["seams"]) + 1
