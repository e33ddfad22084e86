"""Is a graph fit to run?  Checks it against the node schemas and answers in ComfyUI's words.

No execution here, no files apart from the question whether an input file exists.
"""

from __future__ import annotations

import traceback
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.draft.folders import Folders, OutsideFolder
from pipeline.draft.schemas import DYNAMIC_COMBO, INPUT_FILES, SCHEMAS, object_info

Graph = dict[str, dict[str, Any]]
Problem = dict[str, Any]

FILE_WORDS = {"image": "image", "audio": "audio"}
LONGEST_LIST = 20
"""Combos with more entries than this are not repeated in an error."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What POST /prompt answers: ``outputs`` to run; ``error`` (400) when there is none."""

    outputs: list[str]
    error: Problem | None
    node_errors: dict[str, Problem]


@dataclass(slots=True)
class _Check:
    """One validation of a graph; results per node are shared between outputs."""

    graph: Graph
    folders: Folders
    results: dict[str, tuple[bool, list[Problem]]] = field(default_factory=dict)
    visiting: list[str] = field(default_factory=list)


def problem(kind: str, message: str, details: str, **extra: Any) -> Problem:
    """An error in the form that ComfyUI gives it."""
    return {"type": kind, "message": message, "details": details, "extra_info": extra}


def valid_prompt_id(value: object) -> bool:
    """Is it a UUID in canonical lower-case form?  ComfyUI 0.33 takes nothing else.

    >>> valid_prompt_id("1"), valid_prompt_id("5f4c0e9e-7d0f-4c3e-8a37-1c2f7f0d8a10")
    (False, True)
    """
    try:
        return isinstance(value, str) and str(uuid.UUID(value)) == value
    except ValueError:
        return False


def validate(graph: Graph, folders: Folders) -> Verdict:
    """Check a whole graph; numbers given as text are converted in place, as ComfyUI does.

    Outputs that fail are dropped as long as one is good: the verdict then has both outputs and node errors.
    """
    outputs = []
    for node_id, node in graph.items():
        name, title = node.get("class_type"), node.get("_meta", {}).get("title")
        if name is None:
            message = f"Node '{title or f'ID #{node_id}'}' has no class_type. "
            message += "The workflow may be corrupted or a custom node is missing."
        elif name not in SCHEMAS:
            title = title or name
            message = f"Node '{title}' not found. The custom node may not be installed."
        else:
            if SCHEMAS[name]["output_node"]:
                outputs.append(node_id)
            continue
        where = {"node_id": node_id, "class_type": name, "node_title": title}
        return Verdict([], problem("missing_node_type", message, f"Node ID '#{node_id}'", **where), {})
    if not outputs:
        return Verdict([], problem("prompt_no_outputs", "Prompt has no outputs", ""), {})
    return _validate_outputs(_Check(graph, folders), outputs)


def _validate_outputs(check: _Check, outputs: list[str]) -> Verdict:
    good: list[str] = []
    node_errors: dict[str, Problem] = {}
    lines: list[str] = []
    for output in outputs:
        try:
            valid, reasons = _node(check, output)
        except Exception as exc:  # noqa: BLE001 - ComfyUI reports whatever a malformed graph raises
            reasons = [
                problem(
                    "exception_during_validation", "Exception when validating node", str(exc), **_raised(exc)
                )
            ]
            valid = False
            check.results[output] = False, reasons
        if valid:
            good.append(output)
            continue
        lines += [f"{reason['message']}: {reason['details']}" for reason in reasons]
        for node_id, (node_valid, node_reasons) in check.results.items():
            if (
                not node_valid and node_reasons
            ):  # nodes below a bad one are invalid without a reason of their own
                kind = check.graph[node_id]["class_type"] if node_id in check.graph else None
                entry = node_errors.setdefault(
                    node_id, {"errors": node_reasons, "dependent_outputs": [], "class_type": kind}
                )
                entry["dependent_outputs"].append(output)
    error = None
    if not good:
        error = problem(
            "prompt_outputs_failed_validation", "Prompt outputs failed validation", "\n".join(lines)
        )
    return Verdict(good, error, node_errors)


def _node(check: _Check, node_id: str) -> tuple[bool, list[Problem]]:
    if node_id in check.results:
        return check.results[node_id]
    if node_id in check.visiting:
        return _cycle(check, node_id)
    node = check.graph[node_id]
    schema = object_info(node["class_type"], check.folders, uploads=False)
    if schema is None:
        raise KeyError(node["class_type"])
    inputs: dict[str, Any] = node["inputs"]
    errors: list[Problem] = []
    valid = True
    for name, section, spec in _inputs(schema, inputs):
        if name not in inputs:
            if section == "required":
                errors.append(
                    problem("required_input_missing", "Required input is missing", name, input_name=name)
                )
        elif isinstance(inputs[name], list):
            link_valid, found = _link(check, node_id, name, spec)
            valid = valid and link_valid
            errors += found
        else:
            errors += _value(check, node, name, spec)
    earlier = check.results.get(node_id, (True, []))[1]
    reasons = earlier + [error for error in errors if error not in earlier]
    check.results[node_id] = valid and not reasons, reasons
    return check.results[node_id]


def _inputs(schema: dict[str, Any], given: dict[str, Any]) -> Iterator[tuple[str, str, list[Any]]]:
    """Inputs to check; a dynamic combo is not checked itself but adds the inputs of the chosen option."""
    for section in ("required", "optional"):
        for name, spec in schema["input"].get(section, {}).items():
            if spec[0] != DYNAMIC_COMBO:
                yield name, section, spec
                continue
            for option in spec[1]["options"]:
                if option["key"] == given.get(name):
                    for kind, inner in option["inputs"].items():
                        yield from (
                            (f"{name}.{key}", kind, v) for key, v in inner.items() if v[0] != DYNAMIC_COMBO
                        )


def _link(check: _Check, node_id: str, name: str, spec: list[Any]) -> tuple[bool, list[Problem]]:
    value = check.graph[node_id]["inputs"][name]
    config = _config(spec)
    if len(value) != 2:
        return True, [
            problem(
                "bad_linked_input",
                "Bad linked input, must be a length-2 list of [node_id, slot_index]",
                name,
                input_name=name,
                input_config=config,
                received_value=value,
            )
        ]
    source, slot = value
    received = SCHEMAS[check.graph[source]["class_type"]]["output"][slot]
    wanted = "COMBO" if isinstance(spec[0], list) else spec[0]
    if received != wanted:
        details = f"{name}, received_type({received}) mismatch input_type({spec[0]})"
        return True, [
            problem(
                "return_type_mismatch",
                "Return type mismatch between linked nodes",
                details,
                input_name=name,
                input_config=config,
                received_type=received,
                linked_node=value,
            )
        ]
    check.visiting.append(node_id)
    try:
        return _node(check, source)[0], []
    except Exception as exc:  # noqa: BLE001 - a malformed node further up: ComfyUI blames the linked node
        where = {
            "input_name": name,
            "input_config": config,
            "exception_message": str(exc),
            "linked_node": value,
        }
        reason = problem(
            "exception_during_inner_validation",
            "Exception when validating inner node",
            str(exc),
            **where,
            **_raised(exc),
        )
        check.results[source] = False, [reason]
        return False, []
    finally:
        check.visiting.pop()


def _value(check: _Check, node: dict[str, Any], name: str, spec: list[Any]) -> list[Problem]:
    inputs, kind, extra = node["inputs"], spec[0], _config(spec)[1]
    value = inputs[name]
    if isinstance(value, dict) and "__value__" in value:
        value = value["__value__"]
    where = {"input_name": name, "input_config": _config(spec), "received_value": value}
    if isinstance(kind, str):
        try:
            value = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}.get(kind, _same)(value)
        except (TypeError, ValueError, OverflowError) as exc:
            message = f"Failed to convert an input value to a {kind} value"
            details = f"{name}, {value}, {exc}"
            return [problem("invalid_input_type", message, details, **where, exception_message=str(exc))]
    inputs[name] = where["received_value"] = value
    if (node["class_type"], name) in INPUT_FILES:
        return _file(check.folders, name, value)
    if "min" in extra and value < extra["min"]:
        message = f"Value {value} smaller than min of {extra['min']}"
        return [problem("value_smaller_than_min", message, name, **where)]
    if "max" in extra and value > extra["max"]:
        message = f"Value {value} bigger than max of {extra['max']}"
        return [problem("value_bigger_than_max", message, name, **where)]
    options = kind if isinstance(kind, list) else extra.get("options", []) if kind == "COMBO" else None
    if options is None or value in options:
        return []
    listed = str(options)
    if len(options) > LONGEST_LIST:
        listed, where["input_config"] = f"(list of length {len(options)})", None
    return [problem("value_not_in_list", "Value not in list", f"{name}: {value!r} not in {listed}", **where)]


def _file(folders: Folders, name: str, value: object) -> list[Problem]:
    try:
        if isinstance(value, str) and folders.find(value).exists():
            return []
    except OutsideFolder:
        pass
    details = f"{name} - Invalid {FILE_WORDS[name]} file: {value}"
    return [
        problem("custom_validation_failed", "Custom validation failed for node", details, input_name=name)
    ]


def _cycle(check: _Check, node_id: str) -> tuple[bool, list[Problem]]:
    path = [*check.visiting[check.visiting.index(node_id) :], node_id]
    nodes = list(dict.fromkeys(path))
    details = " -> ".join(f"{step} ({check.graph[step]['class_type']})" for step in path)
    for step in nodes:
        reason = problem(
            "dependency_cycle", "Dependency cycle detected", details, node_id=step, cycle_nodes=nodes
        )
        check.results[step] = False, [reason]
    return check.results[node_id]


def _config(spec: list[Any]) -> list[Any]:
    return [spec[0], spec[1] if len(spec) > 1 else {}]


def _raised(exc: Exception) -> dict[str, Any]:
    return {"exception_type": type(exc).__name__, "traceback": traceback.format_tb(exc.__traceback__)}


def _same(value: object) -> object:
    return value
