"""Schemas of the draft engine's nodes, in the form of ComfyUI's ``GET /object_info``; look-up only.

The data is in ``schemas.json``: names, types, ranges and defaults are those that a running ComfyUI 0.33.0
reports.  What is only for a graphical editor (tool tips, search words) is left empty.  Custom nodes bring
their own (``load_node_packs``).  Combos of model files are filled from the workflows of this project and
from the models' folder: the draft has no weights and needs none.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
from collections.abc import Collection, Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pipeline.draft.folders import Folders

DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"

Schema = dict[str, Any]

MODEL_FOLDERS = {
    ("UNETLoader", "unet_name"): ("diffusion_models", "unet"),
    ("CLIPLoader", "clip_name"): ("text_encoders", "clip"),
    ("VAELoader", "vae_name"): ("vae",),
    ("ModelPatchLoader", "name"): ("model_patches",),
    ("AudioEncoderLoader", "audio_encoder_name"): ("audio_encoders",),
    ("CLIPVisionLoader", "clip_name"): ("clip_vision",),
    ("LoraLoaderModelOnly", "lora_name"): ("loras",),
    ("WanVideoModelLoader", "model"): ("diffusion_models", "unet"),
    ("MultiTalkModelLoader", "model"): ("diffusion_models", "unet"),
    ("WanVideoLoraSelect", "lora"): ("loras",),
    ("WanVideoVAELoader", "model_name"): ("vae",),
    ("WanVideoTextEncodeCached", "model_name"): ("text_encoders", "clip"),
    ("Wav2VecModelLoader", "model"): ("wav2vec2",),
}
"""Inputs that name a model file, and the folders below ``models`` where ComfyUI looks for it."""

INPUT_FILES = {
    ("LoadImage", "image"): (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    ("LoadImageMask", "image"): (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    ("LoadAudio", "audio"): (".wav", ".mp3", ".flac", ".ogg", ".m4a", ".mp4", ".mov", ".mkv", ".webm"),
}
"""Inputs that name an uploaded file, and the suffixes that their combos list."""

log = logging.getLogger(__name__)

SCHEMAS: dict[str, Schema] = json.loads(
    (resources.files("pipeline.draft") / "schemas.json").read_text("utf-8")
)


def _completed(name: str, known: Schema) -> Schema:
    """A schema of ``schemas_wrapper.json`` with what ``GET /object_info`` has besides."""
    outputs = known["output"]
    return {
        "input_order": {section: list(inputs) for section, inputs in known["input"].items()},
        "is_input_list": False,
        "output_is_list": [False] * len(outputs),
        "output_name": outputs,
        "name": name,
        "display_name": name,
        "description": "",
        "python_module": "nodes" if name == "ImageScale" else "custom_nodes.ComfyUI-WanVideoWrapper",
        "category": "",
        "has_intermediate_output": False,
        "search_aliases": [],
        **known,
    }


WRAPPER_SCHEMAS: dict[str, Schema] = json.loads(
    (resources.files("pipeline.draft") / "schemas_wrapper.json").read_text("utf-8")
)["nodes"]
"""Of the wrapper family's nodes, read from its public source: no running ComfyUI has told them."""

SCHEMAS |= {name: _completed(name, known) for name, known in WRAPPER_SCHEMAS.items() if name not in SCHEMAS}


def load_node_packs(folder: Path, only: Collection[str] | None = None) -> None:
    """Offer the nodes of the packs (folders with ``__init__.py``) in a ``custom_nodes`` folder too.

    ``only``: no others than these.  What a node does must be in ``node_functions`` as well.  A pack that
    can't be imported is logged and left out, as ComfyUI does.
    """
    for path in sorted(folder.glob("*/__init__.py")):
        name = path.parent.name
        if only is not None and name not in only:
            continue
        try:
            spec = importlib.util.spec_from_file_location(f"custom_nodes_{name}", path)
            assert spec is not None and spec.loader is not None
            pack = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(pack)
            found = {node: _schema_of(node, kind, name) for node, kind in pack.NODE_CLASS_MAPPINGS.items()}
        except Exception:
            log.exception("Cannot import %s module for custom nodes", path.parent)
            continue
        SCHEMAS.update(found)
        log.info("loaded custom nodes from %s: %s", path.parent, ", ".join(found))


def _schema_of(name: str, kind: Any, pack: str) -> Schema:
    """What ``GET /object_info`` says of a node of a pack."""
    sections = {section: _lists(inputs) for section, inputs in kind.INPUT_TYPES().items()}
    outputs = list(kind.RETURN_TYPES)
    return {
        "input": sections,
        "input_order": {section: list(inputs) for section, inputs in sections.items()},
        "is_input_list": False,
        "output": outputs,
        "output_is_list": [False] * len(outputs),
        "output_name": list(getattr(kind, "RETURN_NAMES", outputs)),
        "name": name,
        "display_name": name,
        "description": getattr(kind, "DESCRIPTION", ""),
        "python_module": f"custom_nodes.{pack}",
        "category": getattr(kind, "CATEGORY", "sd"),
        "output_node": bool(getattr(kind, "OUTPUT_NODE", False)),
        "has_intermediate_output": False,
        "search_aliases": [],
    }


def _lists(inputs: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: list(spec) for name, spec in inputs.items()}


def object_info(name: str, folders: Folders, *, uploads: bool = True) -> Schema | None:
    """Schema of a node with its combos filled from the disk, or None for an unknown node.

    ``uploads=False`` leaves the lists of uploaded files empty: they grow with every window rendered.
    """
    schema = SCHEMAS.get(name)
    if schema is None:
        return None
    files = {key: _model_names(name, key, folders) for node, key in MODEL_FOLDERS if node == name}
    if uploads:
        files |= {
            key: _input_files(folders, suffixes)
            for (node, key), suffixes in INPUT_FILES.items()
            if node == name
        }
    if not files:
        return schema
    schema = copy.deepcopy(schema)
    for key, names in files.items():
        spec = schema["input"]["required"][key]
        if spec[0] == "COMBO":
            spec[1]["options"] = names
        else:
            spec[0] = names
    return schema


def _model_names(node: str, key: str, folders: Folders) -> list[str]:
    names = set(workflow_models().get((node, key), ()))
    for kind in MODEL_FOLDERS[node, key]:
        names.update(folders.model_files(kind))
    return sorted(names) + (["pixel_space"] if node == "VAELoader" else [])


def _input_files(folders: Folders, suffixes: tuple[str, ...]) -> list[str]:
    return sorted(
        entry.name
        for entry in (folders.base / "input").iterdir()
        if entry.is_file() and entry.suffix.lower() in suffixes
    )


@cache
def workflow_models() -> dict[tuple[str, str], frozenset[str]]:
    """Model files that this project's workflows name, by loader node and input."""
    found: dict[tuple[str, str], set[str]] = {}
    for node in _workflow_nodes():
        for key, value in node.get("inputs", {}).items():
            if (node.get("class_type"), key) in MODEL_FOLDERS and isinstance(value, str):
                found.setdefault((node["class_type"], key), set()).add(value)
    return {key: frozenset(names) for key, names in found.items()}


def _workflow_nodes() -> Iterator[dict[str, Any]]:
    for entry in resources.files("workflows").iterdir():
        if entry.name.endswith(".json"):
            graph = json.loads(entry.read_text(encoding="utf-8"))
            yield from (node for node in graph.values() if isinstance(node, dict))
