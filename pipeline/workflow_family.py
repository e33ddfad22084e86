"""The wrapper family: graphs for ComfyUI-WanVideoWrapper's nodes, one prompt for a whole segment.

Which file and which slots belong to a mode.  How a segment is rendered with them is ``wrapper_segment``'s
business, reading and filling the files ``workflow``'s; docs/workflows.md explains nodes and slots.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.errors import InvalidRequest
from pipeline.workflow import SlotNames

WRAPPER = "wrapper"

WRAPPER_SINGLE = SlotNames(
    required=frozenset(
        {"portrait", "speech", "frames_total", "prompt", "negative", "seed", "width", "height", "frames"}
    ),
    preset=frozenset(
        {
            *("steps", "shift", "cfg", "audio_scale", "lora", "lora_strength"),
            *("blocks_to_swap", "force_offload", "offload_windows"),
        }
    ),
)
"""One speaker.  ``portrait`` is the picture, or (video) one picture for each window in one animated PNG;
``frames_total`` is one frame more than the windows give (docs/workflows.md, "Frames and samples")."""

WRAPPER_MULTI = replace(WRAPPER_SINGLE, required=WRAPPER_SINGLE.required | {"speech_2", "masks"})
"""Two speakers.  ``masks``: an animated PNG of three pictures, white where speaker 1, 2 and nobody is."""

WORKFLOWS: dict[tuple[str, str, str], tuple[str, SlotNames]] = {
    (WRAPPER, "image", "single"): ("wrapper_image_single", WRAPPER_SINGLE),
    (WRAPPER, "image", "multi"): ("wrapper_image_multi", WRAPPER_MULTI),
    (WRAPPER, "video", "single"): ("wrapper_video_single", WRAPPER_SINGLE),
    (WRAPPER, "video", "multi"): ("wrapper_video_multi", WRAPPER_MULTI),
}
"""(family, input type, person count) -> bundled file and its slots, as ``workflow.load`` takes them."""


def workflow_for(family: str, input_type: str, person_count: str) -> tuple[str, SlotNames]:
    """The bundled file of a mode, and its slots.

    >>> workflow_for("wrapper", "video", "single")[0]
    'wrapper_video_single'

    Raises:
        InvalidRequest: there is no such family, input type or person count; names the first that is wrong.
    """
    found = WORKFLOWS.get((family, input_type, person_count))
    if found is not None:
        return found
    fields = ("workflow_family", "input_type", "person_count")
    for place, (field, value) in enumerate(zip(fields, (family, input_type, person_count), strict=True)):
        known = sorted({key[place] for key in WORKFLOWS})
        if value not in known:
            raise InvalidRequest(field, f"{value!r} is none of {', '.join(known)}")
    raise InvalidRequest(
        "workflow_family", f"{family} has no workflow for {input_type} with person_count {person_count}"
    )
