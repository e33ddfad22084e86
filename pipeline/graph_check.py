"""Does a graph fit its nodes?  Compares it with schemas in the form of ComfyUI's ``GET /object_info``.

Stricter than an engine, which ignores inputs that it does not know and nodes that nothing reads: both are
typing errors in a workflow file.  Pure; where schemas come from (files, a running engine) is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.workflow import Graph

Schemas = Mapping[str, Mapping[str, Any]]
"""Class of a node -> its ``input`` (``required``, ``optional``), ``output`` and ``output_node``."""

DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
"""A choice that brings inputs of its own: those of ``mode`` are called ``mode.NAME``."""

_ANY = ("*", "COMFY_MATCHTYPE_V3")
_GROWING = "COMFY_AUTOGROW_V3"
_LITERALS: dict[str, tuple[type, ...]] = {
    "INT": (int,),
    "FLOAT": (int, float),
    "STRING": (str,),
    "BOOLEAN": (bool,),
}
_UPLOADS = ("image_upload", "audio_upload", "video_upload")


@dataclass(frozen=True, slots=True)
class GraphProblem:
    """What is wrong, and where: node id, its class, and the input (empty for the node as a whole)."""

    node: str
    kind: str
    input: str
    reason: str

    def __str__(self) -> str:
        where = f"node {self.node} ({self.kind})" if self.node else "graph"
        return f"{where}: {f'{self.input}: ' if self.input else ''}{self.reason}"


def problems(graph: Graph, schemas: Schemas) -> list[GraphProblem]:
    """All that is wrong with ``graph``; an empty list if an engine with these nodes would run all of it.

    Choices among files are not checked where the schema lists none, nor names of uploaded files.
    """
    return [*_graph(graph, schemas), *(p for node in graph for p in _node(graph, node, schemas))]


def _graph(graph: Graph, schemas: Schemas) -> Iterator[GraphProblem]:
    outputs = [id_ for id_, node in graph.items() if schemas.get(node["class_type"], {}).get("output_node")]
    if not outputs:
        yield GraphProblem("", "", "", "no output node: nothing would be rendered")
    feeds = {id_: [v[0] for v in node["inputs"].values() if _is_link(v)] for id_, node in graph.items()}
    read = set(outputs)
    waiting = list(outputs)
    while waiting:
        new = [source for source in feeds.get(waiting.pop(), []) if source not in read]
        read.update(new)
        waiting += new
    for id_ in graph.keys() - read if outputs else ():
        yield GraphProblem(id_, graph[id_]["class_type"], "", "no output node reads it")
    for id_ in _in_a_circle(feeds):
        yield GraphProblem(id_, graph[id_]["class_type"], "", "reads its own output")


def _in_a_circle(feeds: dict[str, list[str]]) -> list[str]:
    """What is left when every node without unread sources has been taken away again and again."""
    left = {id_: {source for source in sources if source in feeds} for id_, sources in feeds.items()}
    while done := {id_ for id_, sources in left.items() if not sources}:
        left = {id_: sources - done for id_, sources in left.items() if id_ not in done}
    return sorted(left)


def _node(graph: Graph, id_: str, schemas: Schemas) -> Iterator[GraphProblem]:
    kind, given = graph[id_]["class_type"], graph[id_]["inputs"]
    if kind not in schemas:
        yield GraphProblem(id_, kind, "", "unknown class")
        return
    known: set[str] = set()
    for name, section, spec in _inputs(schemas[kind]["input"], given):
        known.add(name)
        if spec[0] == _GROWING:
            known.update(entry for entry in given if entry.startswith(f"{name}."))
        elif name not in given:
            if section == "required":
                yield GraphProblem(id_, kind, name, "required, but missing")
        elif _is_link(given[name]):
            yield from _link(graph, id_, name, spec, schemas)
        else:
            yield from (GraphProblem(id_, kind, name, reason) for reason in _literal(given[name], spec))
    for name in given.keys() - known:
        yield GraphProblem(id_, kind, name, "unknown input")


def _inputs(
    sections: Mapping[str, Any], given: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str, Any]]:
    """(name, section, spec) of every input; with those that the chosen option of a dynamic choice brings."""
    for section in ("required", "optional"):
        for name, spec in sections.get(section, {}).items():
            yield prefix + name, section, spec
            if spec[0] != DYNAMIC_COMBO:
                continue
            for option in _config(spec).get("options", ()):
                if option["key"] == given.get(prefix + name):
                    yield from _inputs(option["inputs"], given, f"{prefix}{name}.")


def _link(graph: Graph, id_: str, name: str, spec: Any, schemas: Schemas) -> Iterator[GraphProblem]:
    kind = graph[id_]["class_type"]
    source, number = graph[id_]["inputs"][name]
    if source not in graph:
        yield GraphProblem(id_, kind, name, f"linked to node {source}, which does not exist")
        return
    maker = graph[source]["class_type"]
    outputs = schemas[maker]["output"] if maker in schemas else None
    if outputs is None:
        return  # said of that node
    if not 0 <= number < len(outputs):
        yield GraphProblem(
            id_, kind, name, f"{maker} has {len(outputs)} outputs, there is no number {number}"
        )
    elif not _fits(outputs[number], spec[0]):
        wanted = "a choice" if isinstance(spec[0], list) else spec[0]
        yield GraphProblem(id_, kind, name, f"takes {wanted}, but {maker} gives {outputs[number]}")


def _fits(made: Any, wanted: Any) -> bool:
    """Types as ComfyUI compares them: ``*`` is any, several are parted by commas, choices are COMBO."""
    made, wanted = ("COMBO" if isinstance(kind, list) else str(kind) for kind in (made, wanted))
    if made in _ANY or wanted in _ANY:
        return True
    return bool({part.strip() for part in made.split(",")} & {part.strip() for part in wanted.split(",")})


def _literal(value: Any, spec: Any) -> Iterator[str]:
    kind, config = spec[0], _config(spec)
    if isinstance(kind, list) or kind in ("COMBO", DYNAMIC_COMBO):
        yield from _choice(value, kind, config)
        return
    if kind in _ANY:
        return
    if kind not in _LITERALS:
        yield f"takes a link to {kind}, not {value!r}"
        return
    if not isinstance(value, _LITERALS[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
        yield f"takes {kind}, not {value!r}"
        return
    if kind not in ("INT", "FLOAT"):
        return
    if "min" in config and value < config["min"]:
        yield f"{value} is less than {config['min']}"
    if "max" in config and value > config["max"]:
        yield f"{value} is more than {config['max']}"


def _choice(value: Any, kind: Any, config: Mapping[str, Any]) -> Iterator[str]:
    options = kind if isinstance(kind, list) else config.get("options", [])
    if kind == DYNAMIC_COMBO:
        options = [option["key"] for option in options]
    if not options or any(config.get(upload) for upload in _UPLOADS):
        if not isinstance(value, str) or not value:
            yield f"takes the name of a file, not {value!r}"
    elif value not in options:
        listed = ", ".join(map(repr, options[:12])) + (", ..." if len(options) > 12 else "")
        yield f"{value!r} is none of {listed}"


def _config(spec: Any) -> Mapping[str, Any]:
    return spec[1] if len(spec) > 1 else {}


def _is_link(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int
