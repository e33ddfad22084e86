"""Tiny weights under production file names, so that a real ComfyUI runs a production graph on a CPU.

    python tests/comfyui_weights.py MODELS_DIR [--old]

ComfyUI 0.33 reads the sizes of the diffusion model from the file's metadata, 0.11 guesses them: there
heads are 128 wide and text is 4096 (``OLD``; tests/comfyui_nodes/wide_text makes text so wide).  The
pictures are noise; sizes, frame counts and the order of events are the real ones.  Small models get seeded
random weights.  The three encoders have sizes that ComfyUI fixes, so their big matrices are left out as
holes of zeros: 1.7 GB of files that take 150 MB of disk.  Needs numpy only.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HOLE = 1_000_000
"""Tensors of an encoder with at least so many elements are zeros and take no disk."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the diffusion model: widths of itself and of the text it takes, heads.

    InfiniteTalk has 40 heads of even size, so the smallest width is 80.
    """

    width: int = 80
    text: int = 768
    heads: int = 2

    @property
    def metadata(self) -> dict[str, str]:
        """What ComfyUI 0.33 reads them from."""
        return {"config": json.dumps({"transformer": {"num_heads": self.heads, "text_dim": self.text}})}


OLD = Sizes(width=640, text=4096, heads=5)
"""What ComfyUI 0.11 can load: the smallest width that 128 and 40 divide."""


class Tensors:
    """Names and shapes of a model; the values are made when the file is written."""

    def __init__(self, dtype: type[np.floating], holes: bool = False) -> None:
        self.dtype, self.holes = np.dtype(dtype), holes
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.constants: dict[str, float] = {}

    def random(self, name: str, *shape: int) -> None:
        """Normal values, scaled so that a layer neither grows nor shrinks what it gets."""
        self.shapes[name] = shape

    def constant(self, name: str, value: float, *shape: int) -> None:
        """The same value everywhere."""
        self.shapes[name], self.constants[name] = shape, value

    def layer(self, name: str, out: int, *into: int, bias: bool = True) -> None:
        """A linear layer or a convolution: weight [out, *into], bias [out]."""
        self.random(f"{name}.weight", out, *into)
        if bias:
            self.constant(f"{name}.bias", 0.0, out)

    def norm(self, name: str, size: int, bias: bool = True) -> None:
        """A normalisation that starts as the identity."""
        self.constant(f"{name}.weight", 1.0, size)
        if bias:
            self.constant(f"{name}.bias", 0.0, size)

    def write(self, path: Path, seed: int, metadata: dict[str, str] | None = None) -> None:
        """A safetensors file: length of the header, header, tensors one after the other."""
        rng, header, offset = np.random.default_rng(seed), {}, 0
        for name, shape in self.shapes.items():
            size = math.prod(shape) * self.dtype.itemsize
            kind = {"float16": "F16", "float32": "F32"}[self.dtype.name]
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps({"__metadata__": metadata, **header} if metadata else header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, shape in self.shapes.items():
                count = math.prod(shape)
                if name in self.constants:
                    file.write(np.full(count, self.constants[name], self.dtype).tobytes())
                elif self.holes and count >= HOLE:
                    file.seek(count * self.dtype.itemsize, 1)
                else:
                    values = rng.standard_normal(count, np.float32) / math.sqrt(count / shape[0])
                    file.write(values.astype(self.dtype).tobytes())
            file.truncate(8 + len(text) + offset)


def diffusion(sizes: Sizes) -> Tensors:
    """Wan 2.1 image-to-video, 2 blocks."""
    width, feed, text, picture = sizes.width, 2 * sizes.width, sizes.text, 1280
    model = Tensors(np.float32)
    model.layer("patch_embedding", width, 36, 1, 2, 2)  # 36 channels and img_emb make it image-to-video
    for name, into in (("text_embedding", text), ("time_embedding", 256)):
        model.layer(f"{name}.0", width, into)
        model.layer(f"{name}.2", width, width)
    model.layer("time_projection.1", 6 * width, width)
    for block in ("blocks.0", "blocks.1"):
        model.random(f"{block}.modulation", 1, 6, width)
        for attention in (f"{block}.self_attn", f"{block}.cross_attn"):
            for part in "qkvo":
                model.layer(f"{attention}.{part}", width, width)
            model.norm(f"{attention}.norm_q", width, bias=False)
            model.norm(f"{attention}.norm_k", width, bias=False)
        model.layer(f"{block}.cross_attn.k_img", width, width)
        model.layer(f"{block}.cross_attn.v_img", width, width)
        model.norm(f"{block}.cross_attn.norm_k_img", width, bias=False)
        model.norm(f"{block}.norm3", width)
        model.layer(f"{block}.ffn.0", feed, width)
        model.layer(f"{block}.ffn.2", width, feed)
    model.random("head.modulation", 1, 2, width)
    model.layer("head.head", 64, width)
    model.norm("img_emb.proj.0", picture)
    model.layer("img_emb.proj.1", picture, picture)
    model.layer("img_emb.proj.3", width, picture)
    model.norm("img_emb.proj.4", width)
    return model


def lora(_: Sizes) -> Tensors:
    """A LoRA that changes nothing: no tensor at all."""
    return Tensors(np.float16)


def patch(sizes: Sizes) -> Tensors:
    """InfiniteTalk, for one speaker or two; ComfyUI makes 40 blocks whatever the file says."""
    width, inner, context, audio = sizes.width, 16, 32, 12 * 768
    model = Tensors(np.float32)
    model.layer("audio_proj.proj1", inner, 5 * audio)
    model.layer("audio_proj.proj1_vf", inner, 8 * audio)
    model.layer("audio_proj.proj2", inner, inner)
    model.layer("audio_proj.proj3", 32 * context, inner)
    model.norm("audio_proj.norm", context)
    for number in range(40):
        attention = f"blocks.{number}.audio_cross_attn"
        model.layer(f"{attention}.q_linear", width, width)
        model.layer(f"{attention}.kv_linear", 2 * width, context)
        model.layer(f"{attention}.proj", width, width)
        model.norm(f"blocks.{number}.norm_x", width)
    return model


def vae(_: Sizes) -> Tensors:
    """Wan 2.1's VAE, 8 channels wide instead of 96."""
    base, latent = 8, 16
    model = Tensors(np.float32)

    def residual(name: str, into: int, out: int) -> None:
        model.constant(f"{name}.residual.0.gamma", 1.0, into, 1, 1, 1)
        model.layer(f"{name}.residual.2", out, into, 3, 3, 3)
        model.constant(f"{name}.residual.3.gamma", 1.0, out, 1, 1, 1)
        model.layer(f"{name}.residual.6", out, out, 3, 3, 3)
        if into != out:
            model.layer(f"{name}.shortcut", out, into, 1, 1, 1)

    def ends(side: str, width: int, into: tuple[int, int], out: tuple[int, int]) -> None:
        """First convolution, middle and head of a side; (out, in) channels of the outer two."""
        model.layer(f"{side}.conv1", *into, 3, 3, 3)
        residual(f"{side}.middle.0", width, width)
        model.constant(f"{side}.middle.1.norm.gamma", 1.0, width, 1, 1)
        model.layer(f"{side}.middle.1.to_qkv", 3 * width, width, 1, 1)
        model.layer(f"{side}.middle.1.proj", width, width, 1, 1)
        residual(f"{side}.middle.2", width, width)
        model.constant(f"{side}.head.0.gamma", 1.0, out[1], 1, 1, 1)
        model.layer(f"{side}.head.2", *out, 3, 3, 3)

    ends("encoder", 4 * base, (base, 3), (2 * latent, 4 * base))
    # (channels in, out, what follows) of the four levels; "time" halves or doubles frames as well as pixels.
    down = ((1, 1, "space"), (1, 2, "time"), (2, 4, "time"), (4, 4, ""))
    number = _counter("encoder.downsamples")
    for into, out, after in down:
        for first in (into, out):
            residual(next(number), first * base, out * base)
        if after:
            name = next(number)
            model.layer(f"{name}.resample.1", out * base, out * base, 3, 3)
            if after == "time":
                model.layer(f"{name}.time_conv", out * base, out * base, 3, 1, 1)
    model.layer("conv1", 2 * latent, 2 * latent, 1, 1, 1)
    model.layer("conv2", latent, latent, 1, 1, 1)
    ends("decoder", 4 * base, (4 * base, latent), (3, base))
    up = ((4, 4, "time"), (2, 4, "time"), (2, 2, "space"), (1, 1, ""))
    number = _counter("decoder.upsamples")
    for into, out, after in up:
        for first in (into, out, out):
            residual(next(number), first * base, out * base)
        if after:
            name = next(number)
            model.layer(f"{name}.resample.1", out * base // 2, out * base, 3, 3)
            if after == "time":
                model.layer(f"{name}.time_conv", 2 * out * base, out * base, 3, 1, 1)
    return model


def text(_: Sizes) -> Tensors:
    """T5 base in UMT5's place: the narrowest text encoder whose tokenizer comes with ComfyUI."""
    width, feed = 768, 3072
    model = Tensors(np.float16, holes=True)
    for number in range(12):
        block = f"encoder.block.{number}.layer"
        for part in "qkvo":
            model.random(f"{block}.0.SelfAttention.{part}.weight", width, width)
        if number == 0:
            model.random(f"{block}.0.SelfAttention.relative_attention_bias.weight", 32, 12)
        model.norm(f"{block}.0.layer_norm", width, bias=False)
        model.random(f"{block}.1.DenseReluDense.wi.weight", feed, width)
        model.random(f"{block}.1.DenseReluDense.wo.weight", width, feed)
        model.norm(f"{block}.1.layer_norm", width, bias=False)
    model.norm("encoder.final_layer_norm", width, bias=False)
    model.random("shared.weight", 32128, width)
    return model


def image(_: Sizes) -> Tensors:
    """CLIP ViT-H/14 without its matrices."""
    width, feed = 1280, 5120
    model = Tensors(np.float16, holes=True)
    model.random("vision_model.embeddings.class_embedding", width)
    model.random("vision_model.embeddings.patch_embedding.weight", width, 3, 14, 14)
    model.random("vision_model.embeddings.position_embedding.weight", 257, width)
    model.norm("vision_model.pre_layrnorm", width)
    model.norm("vision_model.post_layernorm", width)
    for number in range(32):
        layer = f"vision_model.encoder.layers.{number}"
        for part in "kvq":
            model.layer(f"{layer}.self_attn.{part}_proj", width, width)
        model.layer(f"{layer}.self_attn.out_proj", width, width)
        model.norm(f"{layer}.layer_norm1", width)
        model.norm(f"{layer}.layer_norm2", width)
        model.layer(f"{layer}.mlp.fc1", feed, width)
        model.layer(f"{layer}.mlp.fc2", width, feed)
    model.random("visual_projection.weight", 1024, width)
    return model


def audio(_: Sizes) -> Tensors:
    """wav2vec2 base; sound still reaches the output, past the matrices that are left out."""
    width, feed, channels = 768, 3072, 512
    model = Tensors(np.float16, holes=True)
    model.random("masked_spec_embed", width)
    model.random("feature_extractor.conv_layers.0.conv.weight", channels, 1, 10)
    model.norm("feature_extractor.conv_layers.0.layer_norm", channels)
    for number, taps in enumerate((3, 3, 3, 3, 2, 2), start=1):
        model.random(f"feature_extractor.conv_layers.{number}.conv.weight", channels, channels, taps)
    model.norm("feature_projection.layer_norm", channels)
    model.layer("feature_projection.projection", width, channels)
    position = "encoder.pos_conv_embed.conv"
    model.constant(f"{position}.bias", 0.0, width)
    model.constant(f"{position}.parametrizations.weight.original0", 1.0, 1, 1, 128)
    # A constant, not a hole: it is divided by its length.
    model.constant(f"{position}.parametrizations.weight.original1", 1.0, width, 48, 128)
    for number in range(12):
        layer = f"encoder.layers.{number}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            model.layer(f"{layer}.attention.{part}", width, width)
        model.norm(f"{layer}.layer_norm", width)
        model.layer(f"{layer}.feed_forward.intermediate_dense", feed, width)
        model.layer(f"{layer}.feed_forward.output_dense", width, feed)
        model.norm(f"{layer}.final_layer_norm", width)
    model.norm("encoder.layer_norm", width)
    return model


def _counter(prefix: str) -> Iterator[str]:
    number = 0
    while True:
        yield f"{prefix}.{number}"
        number += 1


FILES: dict[str, Callable[[Sizes], Tensors]] = {
    "diffusion_models/Wan2_1-I2V-14B-480p_fp8_e4m3fn_scaled_KJ": diffusion,
    "loras/lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16": lora,
    "model_patches/wan2.1_infiniteTalk_single_fp16": patch,
    "vae/wan_2.1_vae": vae,
    "text_encoders/umt5_xxl_fp8_e4m3fn_scaled": text,
    "clip_vision/clip_vision_h": image,
    "audio_encoders/wav2vec2-chinese-base_fp16": audio,
    "model_patches/wan2.1_infiniteTalk_multi_fp16": patch,
}


def write_weights(directory: Path, sizes: Sizes = Sizes(), seed: int = 0) -> None:
    """All the files that the workflows name, in ComfyUI's folders below ``directory``."""
    for number, (name, model) in enumerate(FILES.items()):
        path = directory / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        model(sizes).write(path, seed + number, sizes.metadata if model is diffusion else None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write tiny weights for a real ComfyUI.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--old", action="store_true", help="for ComfyUI 0.11")
    arguments = parser.parse_args()
    write_weights(arguments.directory, OLD if arguments.old else Sizes())
