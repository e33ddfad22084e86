"""What a job needs before it can be rendered: the fitted picture, the model's speech, and the tasks.

Uses ``portrait``, ``source_video`` and ``speech``; where segments begin and end is ``plan``'s business.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.job import JobDirectory, finished
from pipeline.messages import Recipe, SegmentTask
from pipeline.plan import Plan, Segment
from pipeline.portrait import prepare_portrait
from pipeline.request import RenderRequest
from pipeline.source_video import SourceVideo
from pipeline.speech import Speech, cut_speech, prepare_speech
from pipeline.workflow import Workflow

SPEECH_AFTER_WINDOW = 64
"""Frames of speech past a window's end that the audio encoder hears too: its position convolution
reaches 2.56 s, 64 frames."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """The prepared inputs of one job."""

    speech: Speech
    portrait: Path | None
    """The fitted picture; None where a source video conditions each window."""
    video: SourceVideo | None
    sound: Path
    """The caller's own track, for the result."""
    width: int
    height: int
    total_frames: int

    def recipe(self, request: RenderRequest, job: str, workflow: Workflow, plan: Plan) -> Recipe:
        """What all segments share."""
        return Recipe(
            job=job,
            workflow=workflow,
            prompt=request.prompt,
            seed=request.seed,
            steps=workflow.default("steps") if request.steps is None else request.steps,
            width=self.width,
            height=self.height,
            motion=plan.motion,
        )

    def task(self, recipe: Recipe, plan: Plan, segment: Segment, attempt: int) -> SegmentTask:
        """One segment with its pictures and its speech, window by window."""
        starts = window_starts(segment, plan.motion)
        overlaps = (0, *plan.overlaps, 0)
        return SegmentTask(
            recipe=recipe,
            index=segment.index,
            lane=segment.gpu,
            start=segment.start,
            frames=segment.frames,
            windows=segment.windows,
            head=overlaps[segment.index],
            tail=overlaps[segment.index + 1],
            portraits=self._pictures(starts),
            speech=tuple(
                cut_speech(self.speech.path, start, length, SPEECH_AFTER_WINDOW)
                for start, length in zip(starts, segment.windows, strict=True)
            ),
            attempt=attempt,
        )

    def _pictures(self, starts: list[int]) -> tuple[bytes, ...]:
        if self.portrait is not None:
            return (self.portrait.read_bytes(),)
        assert self.video is not None
        return tuple(self.video.png_at(start, self.width, self.height) for start in starts)


def window_starts(segment: Segment, motion: int) -> list[int]:
    """The job frame of each window's frame 0.

    >>> window_starts(Segment(1, 100, 300, (81, 81, 81), 0), 9)
    [100, 172, 244]
    """
    starts = [segment.start]
    for length in segment.windows[:-1]:
        starts.append(starts[-1] + length - motion)
    return starts


def prepare(request: RenderRequest, job: JobDirectory) -> Preparation:
    """Check and convert the inputs into the job directory.

    Raises ``InvalidRequest`` naming the field, ``StorageError``.
    """
    # The caller's own files are read first, so that errors name them; the copies serve a later start.
    picture = _copy_or_original(job, "picture", request.picture)
    sound = _copy_or_original(job, "sound", request.audio)
    speech = prepare_speech(sound, job.speech)
    total = speech.frames if request.max_frames is None else min(speech.frames, request.max_frames)
    video: SourceVideo | None = None
    if request.video is not None:
        video = SourceVideo.opened(picture)
        fitted = video.fitted_size(request.width, request.height)
        video = SourceVideo.opened(job.take_input("picture", picture))
    else:
        content, fitted = prepare_portrait(picture, request.width, request.height)
        with finished(job.portrait) as partial:
            partial.write_bytes(content)
        job.take_input("picture", picture)
    kept = job.take_input("sound", sound)
    return Preparation(speech, None if video else job.portrait, video, kept, *fitted, total)


def _copy_or_original(job: JobDirectory, kind: str, original: Path) -> Path:
    copy = job.source(kind, original)
    return copy if copy.exists() else original
