"""A real ComfyUI for the tests: which checkout, its settings and tiny weights, and one that runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.engine import choose_engine, running_engine
from pipeline.settings import Settings
from tests import comfyui_weights
from tests.draft_process import MODELS, DraftEngine, Engine, put_inputs
from tests.free_ports import free_ports

CHECKOUT = os.environ.get("COMFYUI_DIR", "")
if CHECKOUT:
    # Of two outputs ComfyUI runs first what a set of their ids has first; with this, as in the recordings.
    os.environ["PYTHONHASHSEED"] = "0"
NEEDS_COMFYUI = [pytest.mark.comfyui, pytest.mark.timeout(900)]
"""Marks of a test that ``conftest`` leaves out where no checkout is given."""
BOTH_ENGINES = ["draft", pytest.param("comfyui", marks=NEEDS_COMFYUI)]
"""Parameters of a fixture whose tests hold for the draft engine and for a real ComfyUI."""
NODES = Path(__file__).resolve().parent / "comfyui_nodes"


def is_old() -> bool:
    """Whether the checkout is of before 0.33: other weights, and less that can be asked of it."""
    if not CHECKOUT:
        return False
    version: dict[str, str] = {}
    exec((Path(CHECKOUT) / "comfyui_version.py").read_text(), version)
    return tuple(map(int, version["__version__"].split(".")[:2])) < (0, 33)


def needs_new(engine: Engine, reason: str) -> None:
    """Skip a test that an older ComfyUI can't pass."""
    if is_old() and not isinstance(engine, DraftEngine):
        pytest.skip(f"ComfyUI of before 0.33: {reason}")


def comfyui_env(folder: Path) -> dict[str, str]:
    """The project's settings for the checkout, on the CPU, with tiny weights below ``folder``."""
    models = folder / "models"
    if not models.exists():
        comfyui_weights.write_weights(models, comfyui_weights.OLD if is_old() else comfyui_weights.Sizes())
        for (kind, name), file in zip(MODELS.items(), WEIGHTS, strict=True):
            (models / kind / f"{name}.safetensors").symlink_to(f"{file}.safetensors")
    flags = "--cpu"
    if is_old():
        paths = folder / "paths.yaml"
        paths.write_text(f"tests:\n  custom_nodes: {NODES}\n")
        flags += f" --extra-model-paths-config {paths} --whitelist-custom-nodes wide_text"
    env = {
        "INFINITETALK_ENGINE": "comfyui",
        "INFINITETALK_COMFYUI_DIR": CHECKOUT,
        "INFINITETALK_COMFYUI_MODELS": str(models),
        "INFINITETALK_COMFYUI_ARGS": flags,
        "INFINITETALK_SCRATCH_DIR": str(folder),
        "INFINITETALK_PORTS": free_ports(20),
    }
    if python := os.environ.get("COMFYUI_PYTHON"):
        env["INFINITETALK_COMFYUI_PYTHON"] = python
    return env


WEIGHTS = (
    "Wan2_1-I2V-14B-480p_fp8_e4m3fn_scaled_KJ",
    "umt5_xxl_fp8_e4m3fn_scaled",
    "wan_2.1_vae",
    "wan2.1_infiniteTalk_single_fp16",
    "wav2vec2-chinese-base_fp16",
)
"""What the graph of the recordings names otherwise, in the order of ``MODELS``."""


@contextmanager
def comfyui_engine(settings: Settings) -> Iterator[Engine]:
    """A running ComfyUI, with the inputs of the graph of the recordings."""
    with running_engine(choose_engine(settings), settings) as running:
        put_inputs(running.base_dir)
        yield Engine(running.url, running.base_dir)
