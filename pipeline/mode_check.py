"""Whether a running ComfyUI can render a graph: it has every node, and every weight that the graph names.

Asked by ``/object_info`` of the needed classes only, so it costs milliseconds.  The files themselves are
``models``' business.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.comfy_client import ComfyClient
from pipeline.errors import ConfigurationError
from pipeline.models import manifest
from pipeline.workflow import Graph, Workflow

WEIGHT_SUFFIXES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
"""What tells a weight from other choices of a node."""


@dataclass(frozen=True, slots=True)
class Missing:
    """One thing that the engine lacks: a node class, or a file in one of a node's lists."""

    node: str
    """The class."""
    file: str = ""
    """Empty: the class itself is missing."""

    @property
    def is_weight(self) -> bool:
        """Whether a file is missing, not a node."""
        return bool(self.file)

    def __str__(self) -> str:
        return self.file or f"node {self.node}"

    @property
    def remedy(self) -> str:
        """What helps."""
        if self.is_weight:
            return "infinitetalk models download"
        pack = manifest().pack_of(self.node)
        if pack is not None:
            command = f"infinitetalk comfyui install DIR --family {pack.families[0]}"
            return f"install {pack.name} ({pack.url}); {command}"
        if self.node.startswith("InfiniteTalk"):
            return "a ComfyUI that this program starts has it (INFINITETALK_NODE_PACK); see docs/setup.md"
        return "ComfyUI 0.11 or newer; infinitetalk comfyui install"


def check_mode(client: ComfyClient, workflow: Workflow) -> tuple[Missing, ...]:
    """What the engine lacks for ``workflow``; empty: nothing.  Raises ``EngineError`` where it is silent."""
    return check_graph(client, json.loads(workflow.text))


def check_graph(client: ComfyClient, graph: Graph) -> tuple[Missing, ...]:
    """The same for a graph in API format."""
    schemas = {name: client.object_info(name) for name in sorted({n["class_type"] for n in graph.values()})}
    missing = [Missing(name) for name, schema in schemas.items() if name not in schema]
    for node in graph.values():
        name = node["class_type"]
        for key, file in node["inputs"].items():
            choices = _choices(schemas[name].get(name, {}), key)
            if _is_weight(file) and choices is not None and file not in choices:
                missing.append(Missing(name, file))
    return tuple(dict.fromkeys(missing))


def require_mode(client: ComfyClient, workflow: Workflow) -> None:
    """Raises ``ConfigurationError`` naming what the engine lacks for ``workflow`` and what helps."""
    if missing := check_mode(client, workflow):
        raise ConfigurationError(f"ComfyUI at {client.url} can't render {workflow.file}: {in_words(missing)}")


def in_words(missing: tuple[Missing, ...]) -> str:
    """One sentence: what is missing, by remedy.

    >>> in_words((Missing("VAELoader", "a.safetensors"), Missing("VAELoader", "b.safetensors")))
    'missing a.safetensors, b.safetensors (infinitetalk models download)'
    """
    by_remedy: dict[str, list[str]] = {}
    for thing in missing:
        by_remedy.setdefault(thing.remedy, []).append(str(thing))
    return "; ".join(f"missing {', '.join(things)} ({remedy})" for remedy, things in by_remedy.items())


def weights_of(graph: Graph) -> Iterator[tuple[str, str, str]]:
    """(class, input, file) of every weight that a graph names."""
    for node in graph.values():
        for key, value in node["inputs"].items():
            if _is_weight(value):
                yield node["class_type"], key, value


def _is_weight(value: object) -> bool:
    return isinstance(value, str) and value.endswith(WEIGHT_SUFFIXES)


def _choices(schema: dict[str, Any], key: str) -> list[str] | None:
    """The list of an input; None where it has none.  ComfyUI writes lists in two ways."""
    inputs = schema.get("input", {})
    spec = inputs.get("required", {}).get(key) or inputs.get("optional", {}).get(key)
    match spec:
        case [list(names), *_]:
            return names
        case ["COMBO", {"options": list(names)}, *_]:
            return names
    return None
