"""Windows and segments on a real ComfyUI on the CPU: ``make test-comfyui COMFYUI_DIR=...`` only.

What our own nodes do, and what the engine runs and what it still has.  Whole jobs are in ``test_comfyui``.

The weights are random, so pictures mean nothing; that they are the same, or not the same, does.
"""

from __future__ import annotations

import io
import threading
import uuid
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import motion_frames
from pipeline.comfy_client import ComfyClient
from pipeline.errors import GraphError
from pipeline.frames import read_stack
from pipeline.messages import NodeRuns, Recipe, SegmentTask, WindowCheckpoint
from pipeline.segment import render_segment
from pipeline.workflow import Graph, load
from tests.comfyui_process import NEEDS_COMFYUI
from tests.draft_process import Engine
from tests.test_comfyui import LOADERS
from tests.test_segment import joined

pytestmark = NEEDS_COMFYUI
SIZE, LENGTH, MOTION = 64, 17, 9


class Comfy:
    """A running ComfyUI with what the windows of these tests share."""

    def __init__(self, client: ComfyClient) -> None:
        self.client = client
        self.portrait = client.upload("portrait.png", png(0))
        self.left = client.upload("left.png", png_of(half(left=True)))
        self.right = client.upload("right.png", png_of(half(left=False)))

    def graph(
        self,
        name: str,
        speech: tuple[bytes, ...],
        context: int = 0,
        previous: int = 0,
        direct: bool = False,
        **changes: object,
    ) -> Graph:
        """The graph of a window.

        ``previous``: junk frames in front of 9 real motion frames; ``direct`` leaves our node out.
        """
        motion = None
        if previous or context:
            frames = [random_frame(7)] * previous + [random_frame(100 + number) for number in range(MOTION)]
            motion = self.client.upload("motion.png", motion_frames.pack(frames))
        values: dict[str, object] = {
            "portrait": self.portrait,
            "negative": "",
            "speech": self.client.upload("speech.wav", speech[0]),
            "motion": motion,
            "prompt": "two people talk",
            "seed": 5,
            "steps": 2,
            "width": SIZE,
            "height": SIZE,
            "length": LENGTH,
            "frames": uuid.uuid4().hex,
        }
        if name != "image_single":
            values["context"] = context
        else:
            del values["negative"]
        if name == "talk_multi":
            second = self.client.upload("second.wav", speech[1])
            values |= {"speech_2": second, "mask_1": self.left, "mask_2": self.right}
        graph = load(name).fill(values | changes)
        if direct:
            leave_out_our_node(graph)
        return graph

    def window(self, name: str, speech: tuple[bytes, ...], **more: Any) -> np.ndarray:
        """New frames [N, H, W, 3] of a window; arguments as for ``graph``."""
        files = self.run(self.graph(name, speech, **more))[load(name).slot_node("frames")]
        return np.stack(
            [np.asarray(Image.open(io.BytesIO(self.client.view(file))).convert("RGB")) for file in files]
        )

    def run(self, graph: Graph) -> dict[str, list]:  # type: ignore[type-arg]
        return self.client.run(
            graph, on_progress=lambda _: None, cancelled=threading.Event(), silent_after=300
        )


def leave_out_our_node(graph: Graph) -> None:
    """Link the sampler to ComfyUI's own node."""
    [ours] = [key for key, node in graph.items() if node["class_type"] == "InfiniteTalkSpeech"]
    own = graph.pop(ours)["inputs"]["model"]
    for node in graph.values():
        node["inputs"] = {key: own if value == [ours, 0] else value for key, value in node["inputs"].items()}


def random_frame(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def half(*, left: bool) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE, 3), np.uint8)
    mask[:, : SIZE // 2] = 255
    return mask if left else 255 - mask


def png_of(picture: np.ndarray) -> bytes:
    target = io.BytesIO()
    Image.fromarray(picture).save(target, "PNG")
    return target.getvalue()


def png(seed: int) -> bytes:
    return png_of(random_frame(seed))


def speech(seed: int, frames: int, loud: slice = slice(None)) -> bytes:
    """Noise of so many frames, silent outside of ``loud`` (frames)."""
    samples = np.random.default_rng(seed).normal(0, 4000, (frames, 640))
    heard = np.zeros_like(samples)
    heard[loud] = samples[loud]
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(np.append(heard.ravel(), np.zeros(80)).clip(-32768, 32767).astype("<i2").tobytes())
    return target.getvalue()


@pytest.fixture(scope="module")
def comfy(comfyui: Engine) -> Comfy:
    return Comfy(ComfyClient(comfyui.url))


def test_without_context_our_node_changes_nothing(comfy: Comfy) -> None:
    """The graph with the pack gives the core-only graph's pixels, bit for bit."""
    heard = (speech(1, LENGTH + 20),)
    assert np.array_equal(comfy.window("image_single", heard), comfy.window("talk_single", heard))


def test_context_is_the_core_nodes_own_offset(comfy: Comfy) -> None:
    """Speech that begins k frames earlier gives what ComfyUI's node makes of k more previous frames."""
    heard = (speech(1, LENGTH + 60),)
    ours = comfy.window("talk_single", heard, context=12)
    core = comfy.window("image_single", heard, previous=12)
    assert ours.shape == (LENGTH - MOTION, SIZE, SIZE, 3)
    assert np.array_equal(ours, core)
    assert not np.array_equal(ours, comfy.window("talk_single", heard, context=16))


def test_both_speakers_are_heard_at_the_same_time(comfy: Comfy) -> None:
    """Another second track changes the picture while the first still speaks; with the core node alone: no."""
    first = speech(1, LENGTH + 20)
    pairs = [(first, speech(seed, LENGTH + 20)) for seed in (2, 3)]
    ours = [comfy.window("talk_multi", pair) for pair in pairs]
    core = [comfy.window("talk_multi", pair, direct=True) for pair in pairs]
    assert not np.array_equal(*ours)
    assert np.array_equal(*core)
    other_first = comfy.window("talk_multi", (speech(4, LENGTH + 20), pairs[0][1]))
    assert not np.array_equal(ours[0], other_first)


def test_a_silent_speaker_is_no_error(comfy: Comfy) -> None:
    """Digital silence in one track, as in a dialogue, gives a picture like any other: no NaN, not black."""
    silent = speech(1, LENGTH + 20, slice(0, 0))
    frames = comfy.window("talk_multi", (silent, speech(2, LENGTH + 20)))
    assert len(frames) == LENGTH
    assert frames.std() > 1


def test_speech_that_is_too_short_is_said(comfy: Comfy) -> None:
    """Too little speech fails with the node's name and the numbers, not with a silent repetition."""
    with pytest.raises(GraphError, match=r"InfiniteTalkSpeech.*Speech 1 has \d+ frames"):
        comfy.window("talk_single", (speech(1, LENGTH + 2),), context=16)


@pytest.mark.parametrize("name", ["talk_single", "talk_multi"])
def test_a_segment_has_the_exact_length_and_encodes_once(comfy: Comfy, tmp_path: Path, name: str) -> None:
    """Two chained windows: L + (L - 9) frames; text and portrait are encoded for the first one only."""
    two = name == "talk_multi"
    frames = 2 * LENGTH - MOTION
    tracks = [tuple(speech(seed + n, LENGTH + 30) for n in (0, 1)) for seed in (1, 5)]
    recipe = Recipe(
        "job", load(name), f"of {name}", 7, 2, SIZE, SIZE, MOTION, f"not {name}", (("shift", 5.0),)
    )
    task = SegmentTask(
        recipe,
        index=1,
        frames=frames,
        windows=(LENGTH, LENGTH),
        head=frames,
        tail=0,
        portraits=(png(31 + two),),
        speech=tracks[0],
        context=(0, 8),
        speech_2=tracks[1] if two else (),
        masks=(png_of(half(left=True)), png_of(half(left=False))) if two else (),
    )
    windows: list[WindowCheckpoint] = []
    _, nodes = render_segment(
        task,
        comfy.client,
        tmp_path / "window",
        report=lambda _: None,
        discard=lambda _: None,
        cancelled=threading.Event(),
        silent_after=300,
        keep=windows.append,
    )
    files = joined(windows, tmp_path / "segment")
    assert len(read_stack(files.path("head"), frames)) == frames
    assert nodes["CLIPTextEncode"] == NodeRuns(ran=2, cached=2)  # the prompt and the negative one
    assert nodes["CLIPVisionEncode"] == NodeRuns(ran=1, cached=1)
    assert nodes["LoadImage"] == NodeRuns(ran=2, cached=1)  # the portrait; the second window's motion frames
    assert nodes["AudioEncoderEncode"] == NodeRuns(ran=4 if two else 2)
    for kind in ("WanInfiniteTalkToVideo", "InfiniteTalkSpeech", "KSampler", "VAEDecode", "SaveImage"):
        assert nodes[kind] == NodeRuns(ran=2), kind


def test_a_second_jobs_prompt_finds_all_models_loaded(comfy: Comfy, comfyui: Engine) -> None:
    """Another picture, speech, prompt and seed: the engine's own messages list every loader as cached."""
    comfyui.run(comfy.graph("talk_single", (speech(1, LENGTH + 20),)))
    graph = comfy.graph(
        "talk_single", (speech(2, LENGTH + 20),), portrait=comfy.left, prompt="another one", seed=6
    )
    messages = comfyui.run(graph)
    [cached] = [set(m["data"]["nodes"]) for m in messages if m["type"] == "execution_cached"]
    ran = {m["data"]["node"] for m in messages if m["type"] == "executing"} - {None}
    loaders = {key for key, node in graph.items() if node["class_type"] in LOADERS}
    assert len(loaders) == len(LOADERS)
    assert loaders <= cached
    assert ran | cached == set(graph)
    assert not ran & cached
    assert messages[-3]["type"] == "execution_success"
