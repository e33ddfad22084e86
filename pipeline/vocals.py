"""The voice without the music, for the model's ears: a separator runs once over a speaker's whole track.

The separator is a program that the operator names (docs/setup.md); no model of one is part of this project.
What viewers hear is ``sound``'s, and stays as it was given.
"""

from __future__ import annotations

import math
import shutil
import time
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av

from pipeline.engine import GuardedProcess
from pipeline.errors import ConfigurationError, InvalidRequest, MediaError
from pipeline.job import finished, storage_errors
from pipeline.settings import Settings
from pipeline.sound import Part, SoundReader, measure
from pipeline.speech import write_voice
from pipeline.timeline import FPS, SPEECH_RATE

RATE = 44_100
"""Of the WAV that a separator gets, stereo and 16 bit: what the usual models were trained on."""

MOST_SECONDS = 6 * 3600
"""A WAV of this kind has no room for more than 6.7 hours."""

TOLERANCE = Fraction(1, FPS)
"""Seconds by which a voice may be longer or shorter than its track: one frame.  Filled up, or cut, at its
end; more than that is a separator that moves the sound, and lips with it."""

LOOK_SECONDS = 0.5
LAST_WORDS = 8
"""Lines of what a separator said that go into an error."""


@dataclass(frozen=True, slots=True)
class VocalSeparator:
    """The operator's program."""

    command: tuple[str, ...]
    """``{input}`` in it becomes the WAV to separate, ``{folder}`` an empty folder for what comes out."""
    seconds: float
    """How long it may take."""

    @classmethod
    def configured(cls, settings: Settings) -> VocalSeparator | None:
        """The one that the settings name, if any."""
        command = settings.vocal_separator_command
        return cls(tuple(command), settings.vocal_separator_seconds) if command else None

    @property
    def place(self) -> str | None:
        """The whole path of its program; None where there is none."""
        program = shutil.which(self.command[0])
        return None if program is None else str(Path(program).absolute())

    def found(self) -> VocalSeparator:
        """The same with its program's whole path.  Raises ``ConfigurationError`` where there is none."""
        if (place := self.place) is None:
            raise ConfigurationError(f"INFINITETALK_VOCAL_SEPARATOR: there is no program {self.command[0]}")
        return replace(self, command=(place, *self.command[1:]))


def separate_vocals(
    separator: VocalSeparator | None,
    source: Path,
    part: Part,
    target: Path,
    work: Path,
    tick: Callable[[], None],
) -> None:
    """Write the voice of ``source``'s ``part`` into the WAV ``target``: 16 kHz, mono, sample 0 is the part's.

    It is ``ceil(seconds * 16000)`` samples long.  ``work``: a folder for files on the way; ``tick`` is called
    while the separator runs, and ends it by raising.
    Raises ``ConfigurationError`` without a separator, ``InvalidRequest``, ``MediaError`` with the separator's
    last words, ``StorageError``.
    """
    if separator is None:
        raise ConfigurationError(
            "vocals can't be separated: INFINITETALK_VOCAL_SEPARATOR, the command that does it, is not set "
            "(docs/setup.md shows how)"
        )
    separator = separator.found()
    with storage_errors(work):
        shutil.rmtree(work, ignore_errors=True)  # of a start that was killed
        for folder in (work, work / "out", work / "scratch"):
            folder.mkdir(parents=True)
    given, seconds = _write_input(source, part, work / "track.wav")
    _run(separator, work, tick)
    voice = _voice_in(work / "out")
    try:
        track = measure(voice)
    except InvalidRequest as error:
        raise MediaError(f"the vocal separator's {voice.name} is no sound", error.reason) from error
    got = Fraction(track.samples, track.rate)
    if abs(got - given) > TOLERANCE:
        raise MediaError(
            "the vocal separator changes the length of the track",
            f"{float(got):.3f} s of voice came of {float(given):.3f} s",
        )
    with finished(target) as partial:
        if not write_voice(voice, partial, math.ceil(seconds * SPEECH_RATE)):
            raise InvalidRequest("audio", f"the vocal separator found no voice in {source}")
    shutil.rmtree(work, ignore_errors=True)


def _write_input(source: Path, part: Part, target: Path) -> tuple[Fraction, Fraction]:
    """The track as the separator gets it; its seconds, and those of the part, without a codec's padding."""
    written = 0
    with (
        storage_errors(target),
        SoundReader(source, part) as reader,
        wave.open(str(target), "wb") as wav,
    ):
        wav.setparams((2, 2, RATE, 0, "NONE", "not compressed"))
        for frame in _stereo(reader):
            written += frame.samples
            if written > MOST_SECONDS * RATE:
                raise InvalidRequest("vocals", f"no more than {MOST_SECONDS // 3600} hours can be separated")
            wav.writeframesraw(frame.to_ndarray().tobytes())
    return Fraction(written, RATE), Fraction(reader.samples, reader.rate)


def _stereo(reader: SoundReader) -> Iterator[av.AudioFrame]:
    """16 bit, interleaved, at ``RATE``."""
    layout, resampler = "", None
    for frame in reader:
        if resampler is None or frame.layout.name != layout:
            if resampler is not None:
                yield from resampler.resample(None)
            layout = frame.layout.name
            resampler = av.AudioResampler(format="s16", layout="stereo", rate=RATE)
        frame.pts = None  # samples are the clock, not what the container says
        yield from resampler.resample(frame)
    if resampler is not None:
        yield from resampler.resample(None)


def _run(separator: VocalSeparator, work: Path, tick: Callable[[], None]) -> None:
    """Run it to its end; it dies with us, and at the end of its time."""
    places = {"{input}": str(work / "track.wav"), "{folder}": str(work / "out")}
    command = list(separator.command)
    for word, place in places.items():
        command = [argument.replace(word, place) for argument in command]
    said = work / "said"
    deadline = time.monotonic() + separator.seconds
    with storage_errors(said), said.open("wb") as output:
        process = GuardedProcess(command, work / "scratch", work / "scratch", output)
    try:
        while not process.exited.wait(LOOK_SECONDS):
            tick()
            if time.monotonic() > deadline:
                raise MediaError(
                    f"the vocal separator was not done within {separator.seconds:g} s "
                    "(INFINITETALK_VOCAL_SEPARATOR_SECONDS)",
                    _last_words(said),
                )
    finally:
        process.stop()
    if process.exit_code != "0":
        what = f"the vocal separator ended with exit code {process.exit_code}"
        raise MediaError(what, _last_words(said))


def _last_words(said: Path) -> str:
    """The last lines of its output; of one that was written over and over (progress) what it says last."""
    with said.open("rb") as file:
        file.seek(max(0, said.stat().st_size - 65_536))
        lines = file.read().decode(errors="replace").split("\n")
    spoken = [line.rstrip("\r").rpartition("\r")[2].strip() for line in lines]
    return " | ".join([line for line in spoken if line][-LAST_WORDS:])


def _voice_in(folder: Path) -> Path:
    """The one file below ``folder``, or of several the one that is named ``vocals``."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    voices = files if len(files) == 1 else [path for path in files if path.stem.lower() == "vocals"]
    if len(voices) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in files[:10]) or "nothing"
        raise MediaError(
            "the vocal separator has to leave one file in {folder}, or one that is named vocals",
            f"it left {names}",
        )
    return voices[0]
