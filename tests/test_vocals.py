"""The voice without the music: real separators in processes of their own, and those that fail."""

from __future__ import annotations

import shlex
import sys
import wave
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import ConfigurationError, InvalidRequest, MediaError, PipelineError
from pipeline.job import JobDirectory
from pipeline.preparation import Preparation, prepare
from pipeline.request import RenderRequest
from pipeline.settings import Settings
from pipeline.speech import find_pauses
from pipeline.vocals import VocalSeparator
from tests.render_command import Command, decoded

SECONDS = 4.0

# The music of ``mixed`` is twice as loud on the left as on the right, and in opposite phase there.
SEPARATOR = """
import sys, wave
import numpy as np
with wave.open(sys.argv[1]) as track:
    rate = track.getframerate()
    sound = np.frombuffer(track.readframes(track.getnframes()), "<i2").reshape(-1, 2).astype(float)
voice = np.rint((sound[:, 0] + 2 * sound[:, 1]) / 3).astype("<i2")
music = (sound[:, 0] - voice).astype("<i2")
{then}
def write(name, samples):
    with wave.open(sys.argv[2] + "/" + name, "wb") as out:
        out.setparams((1, 2, rate, 0, "NONE", ""))
        out.writeframes(samples.tobytes())
write("vocals.wav", voice)
write("no_vocals.wav", music)
"""


def separator(folder: Path, then: str = "", seconds: float = 60) -> VocalSeparator:
    """A program that takes the music of ``mixed`` away exactly; ``then``: what it does before it writes."""
    program = folder / "separator.py"
    program.write_text(SEPARATOR.replace("{then}", then))
    found = VocalSeparator.configured(
        Settings(vocal_separator=command_of(program), vocal_separator_seconds=seconds)
    )
    assert found is not None
    return found


def command_of(program: Path) -> str:
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(program))} {{input}} {{folder}}"


def voice_of(rate: int, pitch: float = 220) -> np.ndarray:
    """Syllables, with a pause of a second in the middle."""
    times = np.arange(round(SECONDS * rate)) / rate
    loud = np.maximum(0, np.sin(2 * np.pi * 3 * times)) * (np.abs(times - SECONDS / 2) > 0.5)
    return 0.3 * loud * np.sin(2 * np.pi * pitch * times)


def mixed(folder: Path, rate: int = 48_000, name: str = "mixed.wav") -> Path:
    """A voice in the middle with loud music, which no mix of the channels by itself takes away."""
    music = 0.3 * np.sin(2 * np.pi * 550 * np.arange(round(SECONDS * rate)) / rate)
    return save(folder / name, np.stack([voice_of(rate) + music, voice_of(rate) - music / 2]), rate)


def alone(folder: Path, rate: int = 48_000) -> Path:
    """The same voice without music."""
    return save(folder / "alone.wav", np.stack([voice_of(rate)] * 2), rate)


def save(path: Path, channels: np.ndarray, rate: int) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((len(channels), 2, rate, 0, "NONE", ""))
        file.writeframes(np.rint(channels.T * 32_767).astype("<i2").tobytes())
    return path


def heard(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        assert file.getparams()[:3] == (1, 2, 16_000)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(int)


def prepared(
    folder: Path,
    portrait: Path,
    program: VocalSeparator | None = None,
    tick: Callable[[], None] = lambda: None,
    **fields: object,
) -> Preparation:
    folder.mkdir(exist_ok=True)
    request = RenderRequest.checked(image=portrait, width=64, height=64, **fields)
    job = JobDirectory(folder / "job")
    with job.locked():
        return prepare(request, job, program, tick)


def test_the_model_hears_the_voice_alone(tmp_path: Path, portrait: Path) -> None:
    """Sample by sample what it hears of the voice without music, pauses included; the sound stays mixed."""
    wanted = prepared(tmp_path / "alone", portrait, audio=alone(tmp_path))
    noisy = prepared(tmp_path / "mixed", portrait, audio=mixed(tmp_path))
    clean = prepared(
        tmp_path / "clean", portrait, separator(tmp_path), audio=mixed(tmp_path), vocals="separate"
    )
    difference = np.abs(heard(clean.speech[0].path) - heard(wanted.speech[0].path))
    assert difference.max() <= 12  # 16 bits at the separator's rate, and again
    assert np.abs(heard(noisy.speech[0].path) - heard(wanted.speech[0].path)).max() > 1000
    assert (clean.total_frames, clean.duration) == (noisy.total_frames, noisy.duration)

    def pauses(preparation: Preparation) -> list[tuple[int, int]]:
        return find_pauses([preparation.speech[0].path], preparation.total_frames)

    assert max(stop - first for first, stop in pauses(wanted)) > 20  # the second in the middle
    assert pauses(clean) == pauses(wanted) != pauses(noisy)
    sounds = [made.make_sound(tmp_path / f"{made is clean}.mp4")[0].read_bytes() for made in (clean, noisy)]
    assert sounds[0] == sounds[1]
    assert not (tmp_path / "clean" / "job" / "work").exists()


def test_a_part_starts_at_its_own_sample(tmp_path: Path, portrait: Path) -> None:
    """Of a part of the track the separator gets that part, and frames are counted as without it."""
    part = {"audio_start": 0.5017, "audio_end": 3.2203}
    wanted = prepared(tmp_path / "alone", portrait, audio=alone(tmp_path), **part)
    clean = prepared(
        tmp_path / "clean", portrait, separator(tmp_path), audio=mixed(tmp_path), vocals="separate", **part
    )
    assert (clean.total_frames, clean.duration) == (wanted.total_frames, wanted.duration)
    assert np.abs(heard(clean.speech[0].path) - heard(wanted.speech[0].path)).max() <= 12


def test_both_speakers_once_in_a_jobs_life(tmp_path: Path, portrait: Path) -> None:
    """Each track is separated whole; a later start of the job needs no separator and hears the same."""
    ran = tmp_path / "ran"
    program = separator(tmp_path, f"open({str(ran)!r}, 'a').write('x')")
    fields = {
        "audio": mixed(tmp_path),
        "audio_2": mixed(tmp_path, 44_100, "second.wav"),
        "audio_order": "in_turns",
        "vocals": "separate",
    }
    first = prepared(tmp_path, portrait, program, **fields)
    assert ran.read_text() == "xx"
    voices = [heard(track.path) for track in first.speech]
    assert [len(voice) for voice in voices] == [64_000, 128_000]
    assert not voices[1][:64_000].any()
    assert np.abs(voices[1][64_000:] - voices[0]).max() <= 24
    again = prepared(tmp_path, portrait, None, **fields)
    assert again.speech == first.speech
    for before, track in zip(voices, again.speech, strict=True):
        assert np.array_equal(heard(track.path), before)


@pytest.mark.parametrize(
    ("then", "error", "words"),
    [
        (
            "print('loading'); print('10%\\r50%\\rno weights here', file=sys.stderr); sys.exit(4)",
            MediaError,
            r"ended with exit code 4: .*no weights here$",
        ),
        ("voice = voice[:-2000]", MediaError, r"changes the length.*3\.955 s of voice came of 4\.000 s"),
        ("voice = np.concatenate([np.zeros(2000, '<i2'), voice])", MediaError, r"4\.045 s of voice"),
        ("sys.exit()", MediaError, "has to leave one file.*it left nothing"),
        ("open(sys.argv[2] + '/vocals.txt', 'w').write('x')", MediaError, "no_vocals.wav, vocals.txt"),
        ("open(sys.argv[2] + '/vocals.wav', 'w').write('x'); sys.exit()", MediaError, "is no sound"),
        ("voice *= 0", InvalidRequest, "audio: the vocal separator found no voice in"),
        ("import time; time.sleep(60)", MediaError, "not done within 1 s.*VOCAL_SEPARATOR_SECONDS"),
    ],
    ids=["fails", "too short", "too long", "nothing", "two voices", "no sound", "silent", "too slow"],
)
def test_a_separator_that_does_not_work(
    tmp_path: Path, portrait: Path, then: str, error: type[PipelineError], words: str
) -> None:
    """Its last words, or what is wrong with its file; nothing is kept, so the next start tries again."""
    program = separator(tmp_path, then, 1 if "sleep" in then else 60)
    with pytest.raises(error, match=words):
        prepared(tmp_path, portrait, program, audio=mixed(tmp_path), vocals="separate")
    assert not (tmp_path / "job" / "inputs" / "voice.wav").exists()
    assert not (tmp_path / "job" / "work").exists()


def test_a_frame_more_or_less_is_filled_up_and_cut(tmp_path: Path, portrait: Path) -> None:
    """Within a frame the end alone changes: what is there stays at its sample."""
    wanted = heard(prepared(tmp_path / "a", portrait, audio=alone(tmp_path)).speech[0].path)
    for name, then in (("b", "voice = voice[:-1500]"), ("c", "voice = np.append(voice, voice[:1500])")):
        program = separator(tmp_path, then)
        got = prepared(tmp_path / name, portrait, program, audio=mixed(tmp_path), vocals="separate")
        samples = heard(got.speech[0].path)
        assert len(samples) == len(wanted)
        assert np.abs(samples - wanted)[:-600].max() <= 12
        assert name == "c" or not samples[-500:].any()


def test_a_cancelled_job_ends_its_separator(
    tmp_path: Path, portrait: Path, wait_gone: Callable[[Iterable[int], float], list[int]]
) -> None:
    """What a tick raises comes out, and the program is gone with what it started."""
    told = tmp_path / "pids"
    then = f"""
import os, subprocess, time
child = subprocess.Popen(["sleep", "60"])
open({str(told)!r} + ".new", "w").write(f"{{os.getpid()}} {{child.pid}}")
os.rename({str(told)!r} + ".new", {str(told)!r})
time.sleep(60)
"""

    def cancelled() -> None:
        if told.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(
            tmp_path, portrait, separator(tmp_path, then), cancelled, audio=mixed(tmp_path), vocals="separate"
        )
    assert wait_gone(map(int, told.read_text().split()), 60) == []


@pytest.mark.long
def test_what_was_separated_is_kept_when_engines_do_not_start(
    render: Callable[..., Command], tmp_path: Path
) -> None:
    """The command separates, fails, and goes on with the voice that it has; the video is whole."""
    separator(tmp_path)
    output = tmp_path / "talk.mp4"
    arguments = ("--audio", mixed(tmp_path), "--vocals", "separate", "--gpus", 1, "-o", output)
    first = render(
        *arguments,
        draft_args="--draft-fault die-at-start",
        INFINITETALK_VOCAL_SEPARATOR=command_of(tmp_path / "separator.py"),
    )
    assert first.finish() == 1, first.log
    assert "separating the voice" in first.log
    second = render(*arguments)
    assert second.finish() == 0, second.log
    assert "separating the voice" not in second.log
    assert len(decoded(output)) == 100


def test_without_a_separator_it_is_told_before_anything_starts(tmp_path: Path, portrait: Path) -> None:
    """Exit code 3 and the setting; a program that is not there is named."""
    arguments = ["--image", portrait, "--audio", mixed(tmp_path), "-o", tmp_path / "talk.mp4"]
    command = Command(tmp_path, [*arguments, "--vocals", "separate"])
    assert command.finish() == 3
    assert "INFINITETALK_VOCAL_SEPARATOR" in command.log
    assert not (tmp_path / ".infinitetalk").exists()
    missing = VocalSeparator(("no-such-program", "{input}", "{folder}"), 60)
    with pytest.raises(ConfigurationError, match=r"INFINITETALK_VOCAL_SEPARATOR.*no-such-program"):
        prepared(tmp_path, portrait, missing, audio=mixed(tmp_path), vocals="separate")


@pytest.mark.parametrize("text", ["demucs -o {folder}", "demucs {input}", "demucs '{input} {folder}"])
def test_a_command_that_can_not_be_used_is_refused(text: str) -> None:
    """Both places have to be in it, and it must be a command line."""
    with pytest.raises(ConfigurationError, match="INFINITETALK_VOCAL_SEPARATOR: "):
        Settings.from_env({"INFINITETALK_VOCAL_SEPARATOR": text})
