"""What a caller may ask for: the door where requests are checked, before any GPU is touched.

Checks here need no decoding; files are opened by ``portrait``, ``source_video`` and ``speech``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from pipeline.errors import InvalidRequest
from pipeline.plan import MOTION, WINDOW
from pipeline.timeline import FPS

DEFAULT_PROMPT = "A person talking naturally"

Box = tuple[int, int, int, int]
"""A part of the picture as given, in its pixels: x0, y0, x1, y1; x1 and y1 are the first outside."""

AudioOrder = Literal["together", "in_turns"]
Continuity = Literal["segments", "exact"]
Preset = Literal["fast", "quality"]
Family = Literal["native", "wrapper"]
SeamMethod = Literal["morph", "crossfade", "cut"]
SizeName = Literal["480p", "720p"]
Vocals = Literal["mixed", "separate"]
Aspect = Literal["16:9", "9:16", "1:1", "4:3", "3:4"]

PRESET_STEPS: dict[Preset, int | None] = {"fast": None, "quality": 8}
"""Sampler steps; None: the workflow's own, 6.  The few-step LoRA stays in both: without it the model needs
cfg above 1, which ComfyUI's node can't do."""

AREAS: dict[SizeName, int] = {"480p": 832 * 480, "720p": 1280 * 720}
"""Pixels of a frame."""

SHAPES: dict[SizeName, dict[Aspect, tuple[int, int]]] = {
    "480p": {"16:9": (832, 480), "9:16": (480, 832), "1:1": (624, 624), "4:3": (704, 544), "3:4": (544, 704)},
    "720p": {
        "16:9": (1280, 720),
        "9:16": (720, 1280),
        "1:1": (960, 960),
        "4:3": (1088, 832),
        "3:4": (832, 1088),
    },
}
"""Width and height: the usual sizes of Wan's models, on the grid of 16 pixels."""

_SECOND_SPEAKER = ("audio_order", "mask_1", "mask_2", "box_1", "box_2")


class RenderRequest(BaseModel):
    """One video to make.  Build it with ``RenderRequest.checked``, which raises ``InvalidRequest``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: Path | None = None
    video: Path | None = None
    """Exactly one of the two: a portrait, or a video whose frames condition the windows."""
    audio: Path
    audio_2: Path | None = None
    """The speech of a second person; the picture then shows two."""
    audio_order: AudioOrder | None = None
    """Two speakers start together (default), or the second when the first has ended."""
    mask_1: Path | None = None
    mask_2: Path | None = None
    """Pictures as large as the portrait (or of its shape), white where the speaker is."""
    box_1: Box | None = None
    box_2: Box | None = None
    """The same as boxes.  Without masks and boxes: the left and the right half."""
    prompt: str = Field(default=DEFAULT_PROMPT, max_length=4000)
    negative_prompt: str = Field(default="", max_length=4000)
    """Handed to the model, which does not read it at cfg 1, the only cfg that ComfyUI's node can do."""
    size: SizeName | None = None
    """About so many pixels, in the picture's shape or in ``aspect``."""
    aspect: Aspect | None = None
    width: int | None = Field(default=None, ge=64, le=2048)
    height: int | None = Field(default=None, ge=64, le=2048)
    """Pixels; rounded to multiples of 16.  Default: the portrait's shape at the area of 832x480."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    preset: Preset = "fast"
    steps: int | None = Field(default=None, ge=1, le=100)
    """Sampler steps; default: those of ``preset``."""
    shift: float | None = Field(default=None, gt=0, le=100)
    """Of the noise schedule; default: the workflow's, like the following."""
    audio_scale: float | None = Field(default=None, ge=0, le=10)
    """How much the speech moves the face."""
    lora: str | None = Field(default=None, min_length=1, max_length=300)
    """File of another few-step LoRA in ComfyUI's ``loras`` folder."""
    lora_strength: float | None = Field(default=None, ge=-10, le=10)
    workflow_family: Family = "native"
    """Whose nodes render: ComfyUI's own, or ComfyUI-WanVideoWrapper's (docs/workflows.md)."""
    force_offload: bool | None = None
    """Wrapper family only: whether the model leaves the GPU after a segment; default: by the GPU's memory."""
    max_frames: int | None = Field(default=None, ge=1)
    """The video's length is the speech's, or this many frames (25 a second) if that is less."""
    audio_start: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    audio_end: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds: the video is exactly this part of the speech.  Default: all of it."""
    vocals: Vocals = "mixed"
    """``separate``: the model hears the voice without the music; the video's sound stays as it is."""
    fps: int = Field(default=FPS, ge=10, le=120)
    """Frames a second of the result.  The model makes 25; others are made by repeating or leaving out."""
    overlap_frames: int | None = Field(default=None, ge=MOTION, lt=WINDOW)
    """Frames that neighbouring segments share; default: chosen by the planner."""
    seam: SeamMethod = "morph"
    """How segments are joined: rendered segments serve all of them."""
    color_match: bool = True
    """Take out what a window's colours drift from the picture that conditions it, before it is encoded."""
    use_multi_gpu: bool = True
    gpu_count: int | None = Field(default=None, ge=1)
    continuity: Continuity = "segments"
    """``exact``: one chain of windows from the first frame to the last, on one GPU, without a seam."""
    max_chain_seconds: float | None = Field(default=None, ge=WINDOW / FPS, allow_inf_nan=False)
    """With ``exact``: the fewest chains that are no longer than this, joined as segments are."""

    @model_validator(mode="after")
    def _one_picture(self) -> RenderRequest:
        if (self.image is None) == (self.video is None):
            raise ValueError("give either an image or a video")
        return self

    @model_validator(mode="after")
    def _fit_together(self) -> RenderRequest:
        given = {field for field in _SECOND_SPEAKER if getattr(self, field) is not None}
        if self.audio_2 is None and given:
            raise _refused(min(given), "only together with audio_2, a second speaker")
        for first, second in (("mask_1", "mask_2"), ("box_1", "box_2")):
            for field, other in ((first, second), (second, first)):
                if other in given and field not in given:
                    raise _refused(field, f"needed with {other}: one for each speaker")
        if {"mask_1", "box_1"} <= given:
            raise _refused("mask_1", "give masks or boxes, not both")
        for field in ("box_1", "box_2"):
            box: Box | None = getattr(self, field)
            if box is not None and not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
                raise _refused(field, f"{list(box)} is no box: [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
        if self.audio_end is not None and self.audio_end <= self.audio_start:
            raise _refused("audio_end", f"{self.audio_end} s is not after audio_start, {self.audio_start} s")
        if self.audio_2 is not None and (self.audio_start or self.audio_end is not None):
            raise _refused("audio_start" if self.audio_start else "audio_end", "only with one speaker")
        if self.continuity == "exact" and self.workflow_family == "wrapper":
            raise _refused("continuity", "exact needs the native family: the wrapper continues no chain")
        if self.max_chain_seconds is not None and self.continuity != "exact":
            raise _refused("max_chain_seconds", "only together with continuity exact")
        if (self.size or self.aspect) and (self.width or self.height):
            raise _refused("size" if self.size else "aspect", "not together with width and height")
        return self

    @property
    def input_type(self) -> str:
        """``image`` or ``video``."""
        return "image" if self.image is not None else "video"

    @property
    def picture(self) -> Path:
        """The portrait or the source video."""
        picture = self.image or self.video
        assert picture is not None
        return picture

    @property
    def person_count(self) -> str:
        """``single`` or ``multi``."""
        return "single" if self.audio_2 is None else "multi"

    @property
    def wanted_size(self) -> tuple[int | None, int | None]:
        """Width and height where the request says them."""
        if self.aspect is not None:
            return SHAPES[self.size or "480p"][self.aspect]
        return self.width, self.height

    @property
    def area(self) -> int:
        """Pixels of a frame where the picture's shape counts."""
        return AREAS[self.size or "480p"]

    @property
    def sampler_steps(self) -> int | None:
        """None: the workflow's own number."""
        return PRESET_STEPS[self.preset] if self.steps is None else self.steps

    @property
    def max_chain_frames(self) -> int | None:
        """``max_chain_seconds`` in frames."""
        # Tolerant of binary fractions: 3.24 s are 81 frames.
        return None if self.max_chain_seconds is None else int(self.max_chain_seconds * FPS + 1e-6)

    @property
    def files(self) -> dict[str, Path]:
        """The caller's files by field."""
        names = ("image", "video", "audio", "audio_2", "mask_1", "mask_2")
        return {name: path for name in names if (path := getattr(self, name)) is not None}

    @classmethod
    def checked(cls, **fields: Any) -> RenderRequest:
        """Validate; raises ``InvalidRequest`` naming the first wrong field."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise wrong_fields(error)[0] from None


def wrong_fields(error: ValidationError) -> list[InvalidRequest]:
    """Every field that a request was refused for, with the reason."""
    found = []
    for wrong in error.errors():
        field = str(wrong["loc"][0]) if wrong["loc"] else wrong.get("ctx", {}).get("field", "image")
        found.append(InvalidRequest(field, wrong["msg"].removeprefix("Value error, ")))
    return found


def _refused(field: str, reason: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{reason}", {"field": field, "reason": reason})
