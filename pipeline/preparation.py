"""What a job needs before it can be rendered: fitted pictures, the model's speech, and the tasks.

Uses ``portrait``, ``source_video``, ``masks`` and ``speech``; where segments begin and end is ``plan``'s
business.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from pipeline.errors import InvalidRequest
from pipeline.job import JobDirectory, finished
from pipeline.masks import speaker_masks
from pipeline.messages import Blob, Recipe, SegmentTask
from pipeline.plan import MAX_WINDOWS, Plan, Segment
from pipeline.portrait import Size, prepare_portrait
from pipeline.request import RenderRequest
from pipeline.sound import WHOLE, Part, make_track, mix_tracks
from pipeline.source_video import SourceVideo
from pipeline.speech import Speech, cut_speech, prepare_speech
from pipeline.timeline import FPS, SPEECH_RATE, frames_of
from pipeline.vocals import VocalSeparator, separate_vocals
from pipeline.workflow import Workflow

log = logging.getLogger(__name__)

SPEECH_MARGIN = 64
"""Frames of speech around a window that the audio encoder hears too: its position convolution reaches
2.56 s, 64 frames.  Those before the window need a workflow that can say where the window begins."""

TASK_WINDOWS = MAX_WINDOWS
"""Most windows of one task; a longer segment is several tasks in a row, each going on from the last one."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """The prepared inputs of one job."""

    speech: tuple[Speech, ...]
    """What the model hears of each speaker, all on the job's clock."""
    portrait: Path | None
    """The fitted picture; None where a source video conditions each window."""
    video: SourceVideo | None
    sounds: tuple[Path, ...]
    """The caller's own tracks, for the result."""
    in_turns: bool
    masks: tuple[bytes, ...]
    """Of two speakers, PNG."""
    width: int
    height: int
    total_frames: int
    duration: Fraction
    """Seconds of the sound, or of the frames where those are fewer."""
    part: Part = WHOLE
    """Of the caller's sound."""

    def frames_at(self, fps: int) -> int:
        """Frames of a result with ``fps`` a second: ``round(duration * fps)``, half up."""
        return frames_of(self.duration.numerator, self.duration.denominator, fps)

    def make_sound(self, target: Path, stop: threading.Event | None = None) -> tuple[Path, int]:
        """The sound of the result, as a stream ``(path, index)``; ``target`` is for what has to be encoded.

        ``stop`` ends the encoding early, as an error.
        Raises ``InvalidRequest``, ``MediaError``, ``StorageError``.
        """
        if len(self.sounds) == 1:
            return make_track(self.sounds[0], self.total_frames, target, self.part, stop)
        return mix_tracks(self.sounds, self.in_turns, self.total_frames, target, stop)

    def recipe(self, request: RenderRequest, job: str, workflow: Workflow, plan: Plan) -> Recipe:
        """What all segments share."""
        steps = request.sampler_steps
        presets = ["shift", "audio_scale", "lora", "lora_strength"]
        if workflow.has("force_offload"):
            presets.append("force_offload")
        given = {name: getattr(request, name) for name in presets}
        return Recipe(
            job=job,
            workflow=workflow,
            prompt=request.prompt,
            seed=request.seed,
            steps=workflow.default("steps") if steps is None else steps,
            width=self.width,
            height=self.height,
            motion=plan.motion,
            negative=request.negative_prompt,
            presets=tuple((name, value) for name, value in given.items() if value is not None),
            color_match=request.color_match,
        )

    def task(
        self,
        recipe: Recipe,
        plan: Plan,
        segment: Segment,
        attempt: int,
        first: int = 0,
        motion: Blob | None = None,
    ) -> SegmentTask:
        """The next windows of a segment, from ``first`` on, with their pictures and their speech.

        At most ``TASK_WINDOWS``: an hour in one chain would be gigabytes.  ``motion``: see ``SegmentTask``.
        """
        todo = slice(first, first + TASK_WINDOWS)
        starts, windows = window_starts(segment, plan.motion)[todo], segment.windows[todo]
        overlaps = (0, *plan.overlaps, 0)
        last = segment.index + 1 == len(plan.segments)
        after = None if last else plan.segments[segment.index + 1].start
        context: tuple[int, ...] = ()
        if recipe.workflow.has("context"):
            context = tuple(min(SPEECH_MARGIN, start) for start in starts)
        speech: list[tuple[bytes, ...]]
        if recipe.workflow.whole_segments:
            speech = [(cut_speech(track.path, segment.start, segment.rendered, 1),) for track in self.speech]
        else:
            speech = [self._cuts(track, starts, windows, context) for track in self.speech]
        return SegmentTask(
            recipe=recipe,
            index=segment.index,
            frames=segment.frames,
            windows=segment.windows,
            head=overlaps[segment.index],
            tail=overlaps[segment.index + 1],
            portraits=self._pictures(picture_frames(starts, windows, after)),
            speech=speech[0],
            attempt=attempt,
            context=context,
            speech_2=speech[1] if len(speech) > 1 else (),
            masks=self.masks,
            first=first,
            motion=motion,
        )

    @staticmethod
    def _cuts(
        track: Speech, starts: list[int], windows: tuple[int, ...], context: tuple[int, ...]
    ) -> tuple[bytes, ...]:
        cuts = []
        for number, (start, length) in enumerate(zip(starts, windows, strict=True)):
            if not context:
                cuts.append(cut_speech(track.path, start, length, SPEECH_MARGIN))
                continue
            # A frame more: the encoder's own counting loses the last one to rounding now and then.
            before = context[number]
            cuts.append(cut_speech(track.path, start - before, before + length + 1, SPEECH_MARGIN - 1))
        return tuple(cuts)

    def _pictures(self, frames: list[int]) -> tuple[bytes, ...]:
        if self.portrait is not None:
            return (self.portrait.read_bytes(),)
        assert self.video is not None
        return tuple(self.video.png_at(frame, self.width, self.height) for frame in frames)


def window_starts(segment: Segment, motion: int) -> list[int]:
    """The job frame of each window's frame 0.

    >>> window_starts(Segment(1, 100, 300, (81, 81, 81), 0), 9)
    [100, 172, 244]
    """
    starts = [segment.start]
    for length in segment.windows[:-1]:
        starts.append(starts[-1] + length - motion)
    return starts


def picture_frames(starts: Sequence[int], windows: Sequence[int], after: int | None) -> list[int]:
    """The frame of a source video that conditions each window of a segment: that at the window's start.

    ``after`` is where the next segment starts: windows that reach so far get that frame, which is also the
    first picture of the next segment.  So both renderings of an overlap follow one picture.

    >>> picture_frames([100, 172, 244], [81, 81, 81], 285)
    [100, 172, 285]
    """
    return [
        start if after is None or start + length <= after else after
        for start, length in zip(starts, windows, strict=True)
    ]


def prepare(
    request: RenderRequest,
    job: JobDirectory,
    separator: VocalSeparator | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Preparation:
    """Check and convert the inputs into the job directory.

    ``separator``: for a request that wants the vocals separated; it runs once in a job's life, and ``tick``
    is called meanwhile.  Raises ``InvalidRequest`` naming the field, ``StorageError``, what
    ``separate_vocals`` raises.
    """
    # The caller's own files are read first, so that errors name them; the copies serve a later start.
    sounds = {"sound": request.audio} | ({} if request.audio_2 is None else {"sound_2": request.audio_2})
    originals = {kind: _copy_or_original(job, kind, path) for kind, path in sounds.items()}
    part = Part(request.audio_start, request.audio_end)
    video, source, size = _picture(request, job)
    masks: tuple[bytes, ...] = ()
    if request.audio_2 is not None:
        given = {name: _copy_or_original(job, name, path) for name, path in _mask_files(request).items()}
        masks = speaker_masks(request.model_copy(update=given), source, size)
        for name, path in given.items():
            job.take_input(name, path)

    def voice_of(sound: Path, voice: Path) -> Path | None:
        if request.vocals == "mixed":
            return None
        if not voice.exists():
            log.info("separating the voice from the music", extra={"job": job.name})
            separate_vocals(separator, sound, part, voice, job.work / "vocals", tick)
        return voice

    speech, duration = _speech(request, job, list(originals.values()), part, voice_of)
    total = frames_of(duration.numerator, duration.denominator)
    if request.max_frames is not None and request.max_frames < total:
        total, duration = request.max_frames, Fraction(request.max_frames, FPS)
    kept = tuple(job.take_input(kind, path) for kind, path in originals.items())
    in_turns = request.audio_order == "in_turns"
    portrait = None if video else job.portrait
    return Preparation(speech, portrait, video, kept, in_turns, masks, *size, total, duration, part)


def _speech(
    request: RenderRequest,
    job: JobDirectory,
    sounds: list[Path],
    part: Part,
    voice_of: Callable[[Path, Path], Path | None],
) -> tuple[tuple[Speech, ...], Fraction]:
    """The track of each speaker on the job's clock, and the seconds that all of them last.

    ``voice_of(sound, place)``: the voice alone, where it is wanted.
    """
    first = prepare_speech(sounds[0], job.speech, 0, part, voice_of(sounds[0], job.voice))
    if len(sounds) == 1:
        return (first,), first.source_seconds
    lead = round(first.source_seconds * SPEECH_RATE) if request.audio_order == "in_turns" else 0
    try:
        second = prepare_speech(sounds[1], job.speech_2, lead, voice=voice_of(sounds[1], job.voice_2))
    except InvalidRequest as error:
        raise InvalidRequest("audio_2", error.reason) from error
    ends = (round(first.source_seconds * SPEECH_RATE), lead + round(second.source_seconds * SPEECH_RATE))
    return (first, second), Fraction(max(ends), SPEECH_RATE)


def _picture(request: RenderRequest, job: JobDirectory) -> tuple[SourceVideo | None, Size, Size]:
    """The source video, if that is what was given; the size of the picture as given, and the fitted one."""
    picture = _copy_or_original(job, "picture", request.picture)
    if request.video is not None:
        video = SourceVideo.opened(picture)
        size = video.fitted_size(*request.wanted_size, request.area)
        return SourceVideo.opened(job.take_input("picture", picture)), video.size, size
    portrait = prepare_portrait(picture, *request.wanted_size, request.area)
    with finished(job.portrait) as partial:
        partial.write_bytes(portrait.png)
    job.take_input("picture", picture)
    return None, portrait.source, portrait.size


def _mask_files(request: RenderRequest) -> dict[str, Path]:
    return {name: path for name, path in request.files.items() if name.startswith("mask_")}


def _copy_or_original(job: JobDirectory, kind: str, original: Path) -> Path:
    copy = job.source(kind, original)
    return copy if copy.exists() else original
