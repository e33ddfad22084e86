"""A draft engine process, the plainest of clients for it, and the graph of the recordings."""

from __future__ import annotations

import copy
import json
import socket
import subprocess
import sys
import threading
import uuid
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import requests
import websocket
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CAPTURES = ROOT.parent / "shared" / "comfyui" / "captures"
"""Recordings of a real ComfyUI; may be missing."""
MODELS = {
    "diffusion_models": "tiny_wan21_i2v",
    "text_encoders": "tiny_t5_base",
    "vae": "tiny_wan_2.1_vae",
    "model_patches": "tiny_infinitetalk_single",
    "audio_encoders": "tiny_wav2vec2_base",
}
ORDER = ["7", "3", "5", "8", "6", "2", "10", "9", "4", "1", "11", "100", "101", "102", "900", "901", "902"]
"""In which a real ComfyUI executed the nodes of ``window``."""

ANSWER_SECONDS = 120
"""A real ComfyUI that loads weights on a busy machine says nothing for long."""

Graph = dict[str, dict[str, Any]]
Message = dict[str, Any]


class Engine:
    """An engine (the draft, or a real ComfyUI) and the plainest of clients."""

    def __init__(self, url: str, base: Path) -> None:
        self.url, self.base = url, base

    def get(self, path: str, **more: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=ANSWER_SECONDS, **more)

    def post(self, path: str, **more: Any) -> requests.Response:
        return requests.post(self.url + path, timeout=ANSWER_SECONDS, **more)

    def listen(self, client: str = "") -> websocket.WebSocket:
        return websocket.create_connection(
            f"{self.url.replace('http', 'ws')}/ws?clientId={client}", timeout=ANSWER_SECONDS
        )

    def submit(self, graph: Graph, **more: Any) -> str:
        reply = self.post("/prompt", json={"prompt": graph, **more})
        assert reply.status_code == 200, reply.text
        return str(reply.json()["prompt_id"])

    def run(self, graph: Graph, **more: Any) -> list[Message]:
        """Messages of one prompt from connecting to ``executing null``."""
        client = str(uuid.uuid4())
        listener = self.listen(client)
        prompt_id = self.submit(graph, client_id=client, **more)
        messages = until(listener, lambda message: ended(message, prompt_id))
        listener.close()
        return messages

    def forget_all(self) -> None:
        """Empty the cache, and wait for it: /free acts after the prompt that runs, or after the next one."""
        assert self.post("/free", json={"unload_models": True, "free_memory": True}).text == ""
        other = {"class_type": "LoadImage", "inputs": {"image": "other.png"}}
        self.run({"1": other, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}})

    def history(self, prompt_id: str) -> dict[str, Any]:
        entry: dict[str, Any] = self.get(f"/history/{prompt_id}").json()[prompt_id]
        return entry


def until(listener: websocket.WebSocket, last: Callable[[Message], bool]) -> list[Message]:
    messages: list[Message] = []
    while not messages or not last(messages[-1]):
        messages.append(json.loads(listener.recv()))
    return messages


def ended(message: Message, prompt_id: str) -> bool:
    return bool(message["type"] == "executing" and message["data"] == {"node": None, "prompt_id": prompt_id})


def progressing(message: Message) -> bool:
    return bool(message["type"] == "progress")


class DraftEngine(Engine):
    """A draft engine, with its process."""

    def __init__(self, process: subprocess.Popen[str], port: int, base: Path) -> None:
        super().__init__(f"http://127.0.0.1:{port}", base)
        self.process = process


def put_inputs(base: Path) -> None:
    """The files that ``window`` names, and another picture."""
    for name in ("face.png", "other.png"):
        Image.effect_noise((96, 96), 40).convert("RGB").save(base / "input" / name)
    with wave.open(str(base / "input" / "speech1.wav"), "wb") as sound:
        sound.setparams((1, 2, 16_000, 0, "NONE", ""))
        sound.writeframes((np.sin(np.arange(32_000) / 20) * 9_000).astype(np.int16).tobytes())


@contextmanager
def draft_engine(base: Path, *flags: str) -> Iterator[DraftEngine]:
    for folder, name in MODELS.items():
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
        (base / "models" / folder / f"{name}.safetensors").touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pipeline.draft", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--base-directory", str(base), "--cpu", "--disable-auto-launch", *flags]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "listens on port" in line:
                break
        threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would stop it
        put_inputs(base)
        yield DraftEngine(process, port, base)
    finally:
        process.kill()
        process.wait()


def window(seed: int | None = None, **changes: Any) -> Graph:
    """The graph of the recordings: one window of 17 frames at 64x64, a video and its frames."""
    name = f"it/{uuid.uuid4().hex}"
    seed = uuid.uuid4().int % 2**32 if seed is None else seed
    talk: dict[str, Any] = {
        "mode": "single_speaker",
        "model": ["11", 0],
        "model_patch": ["4", 0],
        "vae": ["3", 0],
    }
    talk |= {"positive": ["9", 0], "negative": ["10", 0], "width": 64, "height": 64, "length": 17}
    talk |= {"start_image": ["6", 0], "audio_encoder_output_1": ["8", 0], "motion_frame_count": 9}
    sampler: dict[str, Any] = {
        "model": ["100", 0],
        "positive": ["100", 1],
        "negative": ["100", 2],
        "latent_image": ["100", 3],
    }
    sampler |= {"seed": seed, "steps": 3, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "1": ("UNETLoader", {"unet_name": "tiny_wan21_i2v.safetensors", "weight_dtype": "default"}),
        "2": ("CLIPLoader", {"clip_name": "tiny_t5_base.safetensors", "type": "wan", "device": "default"}),
        "3": ("VAELoader", {"vae_name": "tiny_wan_2.1_vae.safetensors"}),
        "4": ("ModelPatchLoader", {"name": "tiny_infinitetalk_single.safetensors"}),
        "5": ("AudioEncoderLoader", {"audio_encoder_name": "tiny_wav2vec2_base.safetensors"}),
        "6": ("LoadImage", {"image": "face.png"}),
        "7": ("LoadAudio", {"audio": "speech1.wav"}),
        "8": ("AudioEncoderEncode", {"audio_encoder": ["5", 0], "audio": ["7", 0]}),
        "9": ("CLIPTextEncode", {"clip": ["2", 0], "text": "a person talking"}),
        "10": ("CLIPTextEncode", {"clip": ["2", 0], "text": "bad"}),
        "11": ("ModelSamplingSD3", {"model": ["1", 0], "shift": 11.0}),
        "100": ("WanInfiniteTalkToVideo", {**talk, "audio_scale": 1.0}),
        "101": ("KSampler", {**sampler, "denoise": 1.0}),
        "102": ("VAEDecode", {"samples": ["101", 0], "vae": ["3", 0]}),
        "901": ("CreateVideo", {"images": ["102", 0], "fps": 25.0, "audio": ["7", 0]}),
        "902": (
            "SaveVideo",
            {"video": ["901", 0], "filename_prefix": f"{name}_v", "format": "mp4", "codec": "h264"},
        ),
        "900": ("SaveImage", {"images": ["102", 0], "filename_prefix": f"{name}_f"}),
    }
    graph: Graph = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}
    return changed(graph, changes)


def changed(graph: Graph, changes: dict[str, Any]) -> Graph:
    """``n100_width=8`` sets an input of node 100, None drops it, ``n900=None`` drops the node."""
    graph = copy.deepcopy(graph)
    for key, value in changes.items():
        node, _, name = key[1:].partition("_")
        target, word = (graph[node]["inputs"], name) if name else (graph, node)
        if value is None:
            del target[word]
        else:
            target[word] = value
    return graph
