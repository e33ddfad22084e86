"""Workflow files and their slots: load, check, fill.

A workflow is a ComfyUI graph in API format.  What the code fills in is marked in node titles,
``slot: NAME=INPUT[, NAME=INPUT...]``, so a graph can be rearranged in ComfyUI without touching the code.
Pure but for the one read in ``load``; talking to an engine is ``comfy_client``'s business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from pipeline.errors import WorkflowError

Graph = dict[str, dict[str, Any]]
"""A graph in API format: node id -> ``{"class_type", "inputs", "_meta"}``."""

_TITLE = re.compile(r"slot:\s*(?P<slots>.*)", re.IGNORECASE | re.DOTALL)
_SLOT = re.compile(r"(?P<name>[a-z][a-z0-9_]*)\s*=\s*(?P<input>\S+)")


@dataclass(frozen=True, slots=True)
class SlotNames:
    """The slots that a file must have."""

    required: frozenset[str]
    """Always filled."""
    optional: frozenset[str] = frozenset()
    """None drops the node."""
    preset: frozenset[str] = frozenset()
    """Without a value, the file's own stays: the graph's author knows best."""

    @property
    def all(self) -> frozenset[str]:
        """Every slot."""
        return self.required | self.optional | self.preset


IMAGE_SINGLE = SlotNames(
    required=frozenset(
        {"portrait", "speech", "prompt", "seed", "width", "height", "length", "frames"},
    ),
    optional=frozenset({"motion"}),
    preset=frozenset({"steps", "shift", "audio_scale", "lora", "lora_strength"}),
)
"""One portrait, one speaker, one window, core nodes only.  ``motion`` is None in a chain's first window."""

TALK_SINGLE = replace(IMAGE_SINGLE, required=IMAGE_SINGLE.required | {"context", "negative"})
"""The same with our nodes: the speech starts ``context`` frames before the window."""

TALK_MULTI = replace(TALK_SINGLE, required=TALK_SINGLE.required | {"speech_2", "mask_1", "mask_2"})
"""Two speakers: each mask is white where its speaker is."""

BUNDLED = {"image_single": IMAGE_SINGLE, "talk_single": TALK_SINGLE, "talk_multi": TALK_MULTI}
"""The files that come with the program."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in the graph: the input ``input`` of the node ``node``."""

    name: str
    node: str
    input: str
    optional: bool = False
    preset: bool = False


@dataclass(frozen=True, slots=True)
class Workflow:
    """A checked workflow file; immutable and picklable (the graph is kept as JSON text)."""

    file: str
    slots: tuple[Slot, ...]
    text: str

    def has(self, slot: str) -> bool:
        """Whether there is such a slot."""
        return any(known.name == slot for known in self.slots)

    @property
    def whole_segments(self) -> bool:
        """Whether one prompt renders all windows of a segment (the wrapper's nodes), not one window."""
        return self.has("frames_total")

    def slot_node(self, slot: str) -> str:
        """Id of the node that holds ``slot``; the outputs of a run are listed by it.

        Raises:
            WorkflowError: there is no such slot.
        """
        for known in self.slots:
            if known.name == slot:
                return known.node
        raise WorkflowError(self.file, f"no slot {slot!r}")

    def default(self, slot: str) -> Any:
        """What the file itself has in ``slot``.

        Raises:
            WorkflowError: there is no such slot.
        """
        node = self.slot_node(slot)
        name = next(known.input for known in self.slots if known.name == slot)
        return json.loads(self.text)[node]["inputs"][name]

    def fill(self, values: Mapping[str, object]) -> Graph:
        """A new graph with every slot filled.

        None for an optional slot drops its node and every input linked to that node; a preset slot
        without a value keeps what the file says.

        Raises:
            WorkflowError: a slot without a value, a value without a slot, or None for a required slot.
        """
        names = {slot.name for slot in self.slots}
        if missing := {slot.name for slot in self.slots if not slot.preset} - values.keys():
            raise WorkflowError(self.file, f"no value for slot {_listed(missing)}")
        if unknown := values.keys() - names:
            raise WorkflowError(self.file, f"a value for slot {_listed(unknown)}, which is not there")
        graph: Graph = json.loads(self.text)
        dropped: set[str] = set()
        for slot in self.slots:
            if slot.name not in values:
                continue
            if values[slot.name] is not None:
                graph[slot.node]["inputs"][slot.input] = values[slot.name]
            elif slot.optional:
                dropped.add(slot.node)
            else:
                raise WorkflowError(self.file, f"slot {slot.name!r} can't be left out")
        return _without(graph, dropped)


def load(source: str | Path, names: SlotNames | None = None) -> Workflow:
    """Read and check a workflow: the name of one that comes with the program, or a path.

    Raises:
        WorkflowError: unreadable, not an API-format graph, a dangling link, or slots other than ``names``
            (default: those of the bundled file).
    """
    names = names or BUNDLED.get(str(source), IMAGE_SINGLE)
    file, text = _read(source)
    graph = _parsed(file, text)
    _check_links(file, graph)
    return Workflow(file, tuple(_slots(file, graph, names)), text)


def _read(source: str | Path) -> tuple[str, str]:
    """Name and text of a workflow file."""
    plain_name = isinstance(source, str) and re.fullmatch(r"\w+", source)
    path = resources.files("workflows") / f"{source}.json" if plain_name else Path(source)
    file = path.name
    try:
        return file, path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise WorkflowError(file, "there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise WorkflowError(file, f"can't be read: {error}") from error


def _parsed(file: str, text: str) -> Graph:
    """The graph, if it is one in API format."""
    try:
        graph = json.loads(text)
    except json.JSONDecodeError as error:
        raise WorkflowError(file, f"not JSON: {error}") from error
    if not isinstance(graph, dict) or not graph:
        raise WorkflowError(file, "not a graph: a JSON object of nodes is expected")
    if isinstance(graph.get("nodes"), list):
        raise WorkflowError(file, "saved in the editor's format; export it with 'Export (API)'")
    for node_id, node in graph.items():
        if not isinstance(node, dict) or not isinstance(node.get("class_type"), str):
            raise WorkflowError(file, f"node {node_id} has no class_type")
        if not isinstance(node.get("inputs"), dict):
            raise WorkflowError(file, f"node {node_id} ({node['class_type']}) has no inputs")
    return graph


def _is_link(value: object) -> bool:
    """Whether an input is an output of another node: ``[node id, output number]``."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int


def _check_links(file: str, graph: Graph) -> None:
    """Every link starts at a node of the graph."""
    for node_id, node in graph.items():
        for name, value in node["inputs"].items():
            if _is_link(value) and value[0] not in graph:
                where = f"{name!r} of node {node_id} ({node['class_type']})"
                raise WorkflowError(file, f"{where} is linked to node {value[0]}, which does not exist")


def _slots(file: str, graph: Graph, names: SlotNames) -> Iterator[Slot]:
    """The slots that the titles declare; complete, known and each once."""
    seen: set[str] = set()
    for node_id, node in graph.items():
        for name, entry in _declared(file, node_id, node):
            if name in seen:
                raise WorkflowError(file, f"slot {name!r} is declared twice")
            if name not in names.all:
                raise WorkflowError(file, f"unknown slot {name!r} at node {node_id} ({node['class_type']})")
            if entry not in node["inputs"]:
                raise WorkflowError(
                    file, f"slot {name!r}: node {node_id} ({node['class_type']}) has no input {entry!r}"
                )
            if _is_link(node["inputs"][entry]):
                raise WorkflowError(file, f"slot {name!r}: {entry!r} of node {node_id} is linked")
            seen.add(name)
            yield Slot(name, node_id, entry, name in names.optional, name in names.preset)
    if missing := names.all - seen:
        raise WorkflowError(file, f"no slot {_listed(missing)}")


def _declared(file: str, node_id: str, node: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(slot, input) pairs in the node's title."""
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    match = _TITLE.fullmatch(title.strip()) if isinstance(title, str) else None
    if match is None:
        return
    for part in match["slots"].split(","):
        slot = _SLOT.fullmatch(part.strip())
        if slot is None:
            raise WorkflowError(file, f"node {node_id}: {part.strip()!r} in its title is not NAME=INPUT")
        yield slot["name"], slot["input"]


def _without(graph: Graph, dropped: set[str]) -> Graph:
    """The graph without some nodes and the inputs linked to them."""
    for node in graph.values():
        node["inputs"] = {
            name: value
            for name, value in node["inputs"].items()
            if not (_is_link(value) and value[0] in dropped)
        }
    return {node_id: node for node_id, node in graph.items() if node_id not in dropped}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
