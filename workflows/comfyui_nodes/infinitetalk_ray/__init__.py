"""Nodes for InfiniteTalk in long videos: what ComfyUI's own nodes leave open, and nothing else.

Loaded as a custom node pack by ComfyUI (and, for its schemas, by the draft engine).  Importing it needs
nothing but Python; ComfyUI's functions are looked up while a node runs.
"""

from __future__ import annotations

import importlib
from typing import Any


class InfiniteTalkSpeech:
    """Gives the model of WanInfiniteTalkToVideo the speech of exactly its window, of one or two speakers.

    ComfyUI's node takes the speech from frame 0 of what it was given, so nothing can be heard that comes
    before; and it plays two tracks one after the other.  This node goes behind it, on the model's way to
    the sampler, and replaces the speech: tracks lie side by side on one clock, and the window starts
    ``context`` frames (of 1/25 s) after the start of what the speech encoder heard.
    """

    CATEGORY = "conditioning/infinitetalk"
    DESCRIPTION = "The speech of a window: two speakers at the same time, and sound before the window."
    FUNCTION = "replace"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """As ComfyUI asks for it."""
        return {
            "required": {
                "model": ("MODEL",),
                "model_patch": ("MODEL_PATCH",),
                "latent": ("LATENT",),
                "audio_encoder_output_1": ("AUDIO_ENCODER_OUTPUT",),
                "context": ("INT", {"default": 0, "min": 0, "max": 100_000, "step": 1}),
            },
            "optional": {"audio_encoder_output_2": ("AUDIO_ENCODER_OUTPUT",)},
        }

    def replace(
        self,
        model: Any,
        model_patch: Any,
        latent: Any,
        audio_encoder_output_1: Any,
        context: int,
        audio_encoder_output_2: Any = None,
    ) -> tuple[Any]:
        """The model with this window's speech; ``latent`` tells the window's length.

        Raises ``ValueError`` where a track ends before the window does.
        """
        multitalk = importlib.import_module("comfy.ldm.wan.model_multitalk")
        length = 4 * (latent["samples"].shape[2] - 1) + 1
        given = [track for track in (audio_encoder_output_1, audio_encoder_output_2) if track is not None]
        tracks = [_features(track) for track in given]
        for number, track in enumerate(tracks, start=1):
            if track.shape[0] < context + length:
                raise ValueError(
                    f"Speech {number} has {track.shape[0]} frames; "
                    f"{context} frames of context and a window of {length} need {context + length}."
                )
        heard = multitalk.project_audio_features(
            model_patch.model.audio_proj, tracks, context, context + length
        )
        return (_with_speech(model, heard.to(model.model_dtype())),)


def _features(encoded: dict[str, Any]) -> Any:
    """Features [frames, layers, channels] at 25 a second, as WanInfiniteTalkToVideo makes them."""
    torch = importlib.import_module("torch")
    wan = importlib.import_module("comfy_extras.nodes_wan")
    layers = torch.stack(encoded["encoded_audio_all_layers"], dim=0).squeeze(1)[1:]
    return wan.linear_interpolation(layers, input_fps=50, output_fps=25).movedim(0, 1)


def _with_speech(model: Any, heard: Any) -> Any:
    """A clone of the model with other speech."""
    # The options stay out of the cloning: ComfyUI 0.11 deep-copies them, and the patch's weights with them.
    options = model.model_options
    model.model_options = {}
    try:
        clone = model.clone()
    finally:
        model.model_options = options
    inner = {**options["transformer_options"], "audio_embeds": heard}
    clone.model_options = {**options, "transformer_options": inner}
    return clone


NODE_CLASS_MAPPINGS: dict[str, type] = {"InfiniteTalkSpeech": InfiniteTalkSpeech}
NODE_DISPLAY_NAME_MAPPINGS = {"InfiniteTalkSpeech": "InfiniteTalk speech of a window"}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
