"""What an engine's answers mean: why a graph was refused or failed, and which files it made.

Pure: decoded JSON goes in, ``GraphError``s and file names come out.  Asking is ``comfy_client``'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

from pipeline.comfy_events import Failure
from pipeline.errors import EngineError, GraphError, OutOfMemory
from pipeline.workflow import Graph

REASON_CHARACTERS = 300


class OutputFile(TypedDict):
    """A file that an output node has written; ``type`` is output, temp or input."""

    filename: str
    subfolder: str
    type: str


Outputs = dict[str, list[OutputFile]]
"""Files by the id of the output node, in order."""


def why_refused(graph: Graph, answer: Mapping[str, Any]) -> GraphError:
    """Why ``/prompt`` did not take the graph: the first complaint, and how many more there are."""
    complaints = [
        (_label(graph, node_id, str(_object(about).get("class_type", ""))), _sentence(_object(error)))
        for node_id, about in _object(answer.get("node_errors")).items()
        for error in _list(_object(about).get("errors"))
    ]
    error = _object(answer.get("error"))
    if not complaints and error:
        node_id = str(_object(error.get("extra_info")).get("node_id", ""))
        complaints.append((_label(graph, node_id, ""), _sentence(error)))
    if not complaints:
        return GraphError("", f"the engine refused the graph: {one_line(answer)}")
    where, reason = complaints[0]
    more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
    return GraphError(where, reason + more)


def why_failed(graph: Graph, failure: Failure) -> GraphError | EngineError:
    """How a node failed while the graph ran; ``EngineError`` where another GPU would not."""
    reason = one_line(failure.message) or failure.exception_type or "failed without a message"
    label = _label(graph, failure.node, failure.node_type)
    if failure.out_of_memory:
        return OutOfMemory(label, f"out of memory: {reason}")
    if failure.gpu_failed:
        return EngineError(f"the GPU failed in {label}: {reason}")
    return GraphError(label, reason)


def files_of(outputs: object) -> Outputs:
    """Files of every output node.  Pictures, videos and sounds stand under different keys."""
    return {str(node_id): list(_files(_object(made))) for node_id, made in _object(outputs).items()}


def one_line(what: object) -> str:
    """On one line, and not too long."""
    text = " ".join(str(what).split())
    return text if len(text) <= REASON_CHARACTERS else text[: REASON_CHARACTERS - 3] + "..."


def _files(made: Mapping[str, Any]) -> Iterator[OutputFile]:
    for files in made.values():
        for file in map(_object, _list(files)):
            if "filename" in file:
                yield OutputFile(
                    filename=str(file["filename"]),
                    subfolder=str(file.get("subfolder", "")),
                    type=str(file.get("type", "output")),
                )


def _label(graph: Graph, node_id: str, class_type: str) -> str:
    """A node as people know it: ``node 9 (LoadImage, slot: portrait=image)``."""
    node = graph.get(node_id)
    if node is None:
        return f"node {node_id} ({class_type})" if class_type else ""
    title = (node.get("_meta") or {}).get("title")
    names = [class_type or str(node.get("class_type")), *([str(title)] if title else [])]
    return f"node {node_id} ({', '.join(names)})"


def _sentence(error: Mapping[str, Any]) -> str:
    message = one_line(error.get("message") or error.get("type") or "refused")
    details = error.get("details")
    return one_line(f"{message}: {details}") if details and details != message else message


def _object(value: object) -> Mapping[str, Any]:
    """``value`` if it is a JSON object; an empty one otherwise."""
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
