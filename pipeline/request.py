"""What a caller may ask for: the door where requests are checked, before any GPU is touched.

Checks here need no decoding; files are opened by ``portrait``, ``source_video`` and ``speech``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import InvalidRequest

DEFAULT_PROMPT = "A person talking naturally"


class RenderRequest(BaseModel):
    """One video to make.  Build it with ``RenderRequest.checked``, which raises ``InvalidRequest``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: Path | None = None
    video: Path | None = None
    """Exactly one of the two: a portrait, or a video whose frames condition the windows."""
    audio: Path
    prompt: str = Field(default=DEFAULT_PROMPT, max_length=4000)
    width: int | None = Field(default=None, ge=64, le=2048)
    height: int | None = Field(default=None, ge=64, le=2048)
    """Pixels; rounded to multiples of 16.  Default: the portrait's shape at the area of 832x480."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: int | None = Field(default=None, ge=1, le=100)
    """Sampler steps; default: the workflow's."""
    max_frames: int | None = Field(default=None, ge=1)
    """The video's length is the speech's, or this many frames (25 a second) if that is less."""
    overlap_frames: int | None = None
    """Frames that neighbouring segments share; default: chosen by the planner."""
    use_multi_gpu: bool = True

    @model_validator(mode="after")
    def _one_picture(self) -> RenderRequest:
        if (self.image is None) == (self.video is None):
            raise ValueError("give either an image or a video")
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

    @classmethod
    def checked(cls, **fields: Any) -> RenderRequest:
        """Validate; raises ``InvalidRequest`` naming the first wrong field."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            field = str(first["loc"][0]) if first["loc"] else "image"
            raise InvalidRequest(field, first["msg"].removeprefix("Value error, ")) from None
