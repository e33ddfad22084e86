"""For ComfyUI 0.11 with tests/comfyui_weights.py only: text as wide as the diffusion model wants it.

0.11 can't be told that the model takes text of another width than 4096, and the only encoders so wide have
billions of weights.  This fills what a 768 wide encoder gives with zeros.
"""

import nodes  # ComfyUI's
import torch

WIDTH = 4096

_encode = nodes.CLIPTextEncode.encode


def _widened(self, clip, text):
    """ComfyUI's own answer, [1, tokens, WIDTH]."""
    (conditioning,) = _encode(self, clip, text)
    return (
        [
            [torch.nn.functional.pad(features, (0, WIDTH - features.shape[-1])), more]
            for features, more in conditioning
        ],
    )


nodes.CLIPTextEncode.encode = _widened
NODE_CLASS_MAPPINGS: dict[str, type] = {}
