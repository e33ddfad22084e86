"""A real ComfyUI on the CPU with tiny random weights: ``make test-comfyui COMFYUI_DIR=...`` only.

The production graph as it is, under production file names, through the command line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import pytest

from tests import comfyui_weights
from tests.conftest import ROOT

CHECKOUT = os.environ.get("COMFYUI_DIR", "")

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not CHECKOUT, reason="no real ComfyUI given: make test-comfyui COMFYUI_DIR=..."),
]


def comfyui_env(folder: Path) -> dict[str, str]:
    """The settings of a run with the given checkout, tiny weights and short waits."""
    comfyui_weights.write_weights(folder / "models")
    env = {
        **os.environ,
        "INFINITETALK_ENGINE": "comfyui",
        "INFINITETALK_COMFYUI_DIR": CHECKOUT,
        "INFINITETALK_COMFYUI_MODELS": str(folder / "models"),
        "INFINITETALK_COMFYUI_ARGS": "--cpu",
        "INFINITETALK_SCRATCH_DIR": str(folder),
        "INFINITETALK_PORTS": "18300-18319",
    }
    if python := os.environ.get("COMFYUI_PYTHON"):
        env["INFINITETALK_COMFYUI_PYTHON"] = python
    return env


def test_two_renderers_give_the_exact_length(
    tmp_path: Path, portrait: Path, speech_of: Callable[[int], Path]
) -> None:
    """Two segments of two windows each on two real ComfyUIs: exactly 250 frames, with the sound."""
    output = tmp_path / "talk.mp4"
    command = [sys.executable, "-m", "infinitetalk", "render", "--image", portrait, "--audio", speech_of(250)]
    options = ["-o", output, "--gpus", "2", "--width", "64", "--height", "64", "--steps", "2", "--json"]
    done = subprocess.run(
        [str(word) for word in [*command, *options]],
        cwd=ROOT,
        env=comfyui_env(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stderr)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["engine"], result["frames"], result["segments_processed"], result["gpu_count"]) == (
        "comfyui",
        250,
        2,
        2,
    )
    with av.open(str(output)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 250
    assert done.stderr.count("windows=2") == 2
