"""Executes one prompt: order of nodes, cache, the messages on the way.  Knows no single node and no HTTP."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.draft.queue import Item, Outcome

log = logging.getLogger(__name__)

Inputs = dict[str, Any]
Send = Callable[[str, dict[str, Any], str | None], None]


class Interrupted(Exception):
    """The prompt was asked to stop."""


class NodeError(Exception):
    """A node failed as ComfyUI's would: ``kind`` is the exception's type there, ``tips`` its advice."""

    def __init__(self, kind: str, message: str, tips: str = "") -> None:
        super().__init__(kind, message, tips)
        self.kind, self.message, self.tips = kind, message, tips


@dataclass(frozen=True, slots=True)
class Result:
    """What a node gives: its outputs by slot, and for output nodes what the user is shown."""

    outputs: tuple[Any, ...]
    ui: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """What a node may ask of the engine while it runs."""

    interrupted: threading.Event
    progress: Callable[[int, int], None]
    faults: frozenset[str] = frozenset()
    mute: Callable[[], None] = lambda: None

    def check(self) -> None:
        """Raise ``Interrupted`` if the prompt was asked to stop."""
        if self.interrupted.is_set():
            raise Interrupted

    def wait(self, seconds: float) -> None:
        """Wait, but not longer than until somebody interrupts."""
        if seconds > 0:
            self.interrupted.wait(seconds)
        self.check()


class NodeSet(Protocol):
    """The nodes that can be executed."""

    def prepare(self) -> None:
        """Load what takes long, before the first prompt."""

    def run(self, name: str, inputs: Inputs, context: Context) -> Result:
        """Execute the node ``name``."""

    def fingerprint(self, name: str, inputs: Inputs) -> str:
        """Changes when a node would give something else though its inputs are the same (a file's content)."""

    def is_output(self, name: str) -> bool:
        """Is it one of the nodes that a prompt is run for?"""


@dataclass(slots=True)
class Executor:
    """Runs prompts one after the other and keeps the results of the last one's nodes.

    As ComfyUI's classic cache: a node whose inputs and ancestors are unchanged is not executed again.
    """

    nodes: NodeSet
    send: Send
    interrupted: threading.Event
    mute: Callable[[], None] = lambda: None
    client_id: str | None = None
    current_node: str | None = None
    _cache: dict[str, Result] = field(default_factory=dict)

    @property
    def loaded(self) -> bool:
        """Whether models are (as if they were) in memory."""
        return bool(self._cache)

    def free(self) -> None:
        """Forget all cached results: the next prompt executes everything."""
        self._cache.clear()

    def execute(self, item: Item, faults: frozenset[str] = frozenset()) -> Outcome:
        """Run a prompt to its end, whatever that is; never raises for what a node does."""
        self.client_id = item.extra.get("client_id")
        run = _Run(self, item, faults)
        run.report("execution_start")
        keys = Signatures(item.graph, self.nodes)
        wanted = {node_id: keys.of(node_id) for node_id in item.graph}
        self._cache = {key: self._cache[key] for key in wanted.values() if key in self._cache}
        run.report(
            "execution_cached", nodes=[node_id for node_id, key in wanted.items() if key in self._cache]
        )
        run.nodes_of(wanted, self._cache)
        self.current_node = None
        return run.outcome


class _Run:
    """One prompt being executed."""

    def __init__(self, executor: Executor, item: Item, faults: frozenset[str]) -> None:
        self._executor, self._item, self._faults = executor, item, faults
        self._states: dict[str, dict[str, Any]] = {}
        self._executed: list[str] = []
        self.outcome = Outcome()

    def nodes_of(self, keys: Mapping[str, str], cache: dict[str, Result]) -> None:
        """Execute the nodes in order; fills ``outcome``."""
        todo = Order(
            self._item.graph,
            self._item.outputs,
            {n for n, key in keys.items() if key in cache},
            self._is_output,
        )
        while (node_id := todo.next()) is not None:
            key = keys[node_id]
            if key in cache:
                self._show(node_id, cache[key])
                self._finish(node_id)
            else:
                try:
                    cache[key] = self._node(
                        node_id, {n: cache[keys[n]] for n in sources(self._item.graph[node_id])}
                    )
                except Interrupted:
                    log.info("Processing interrupted")
                    self._stopped("execution_interrupted", node_id, everybody=True)
                    return
                except Exception as exc:  # noqa: BLE001 - a node may raise anything; the prompt fails, not the engine
                    self._stopped("execution_error", node_id, **self._describe(node_id, exc))
                    return
                self._executed.append(node_id)
                self._finish(node_id)
            todo.done(node_id)
        self.report("execution_success")

    def report(self, event: str, everybody: bool = False, **data: Any) -> None:
        """Send one of the messages that history keeps."""
        message = {"prompt_id": self._item.prompt_id, **data, "timestamp": int(time.time() * 1000)}
        self.outcome.messages.append([event, message])
        if self._executor.client_id is not None or everybody:
            self._executor.send(event, message, self._executor.client_id)

    def _node(self, node_id: str, results: dict[str, Result]) -> Result:
        node = self._item.graph[node_id]
        self._progress(node_id, "running", 0.0, 1.0)
        self._executor.current_node = node_id
        self._tell("executing", node=node_id, display_node=node_id)
        context = Context(
            self._executor.interrupted,
            lambda value, top: self._step(node_id, value, top),
            self._faults,
            self._executor.mute,
        )
        context.check()
        inputs = {
            name: results[value[0]].outputs[value[1]] if is_link(value) else value
            for name, value in node["inputs"].items()
        }
        result = self._executor.nodes.run(node["class_type"], inputs, context)
        if result.ui is not None:
            self._show(node_id, result)
        return result

    def _show(self, node_id: str, result: Result) -> None:
        if result.ui is not None:
            self.outcome.outputs[node_id] = result.ui
            self.outcome.meta[node_id] = {
                "node_id": node_id,
                "display_node": node_id,
                "parent_node": None,
                "real_node_id": node_id,
            }
        self._tell("executed", node=node_id, display_node=node_id, output=result.ui)

    def _step(self, node_id: str, value: int, top: int) -> None:
        self._progress(node_id, "running", value, top)
        data = {"value": value, "max": top, "prompt_id": self._item.prompt_id, "node": node_id}
        self._executor.send("progress", data, self._executor.client_id)

    def _finish(self, node_id: str) -> None:
        top = self._states.get(node_id, {"max": 1})["max"]
        self._progress(node_id, "finished", top, top)

    def _progress(self, node_id: str, state: str, value: float, top: float) -> None:
        self._states[node_id] = {
            "value": value,
            "max": top,
            "state": state,
            "node_id": node_id,
            "prompt_id": self._item.prompt_id,
            "display_node_id": node_id,
            "parent_node_id": None,
            "real_node_id": node_id,
        }
        data = {"prompt_id": self._item.prompt_id, "nodes": dict(self._states)}
        self._executor.send("progress_state", data, self._executor.client_id)

    def _tell(self, event: str, **data: Any) -> None:
        if self._executor.client_id is not None:
            message = {**data, "prompt_id": self._item.prompt_id}
            self._executor.send(event, message, self._executor.client_id)

    def _stopped(self, event: str, node_id: str, everybody: bool = False, **data: Any) -> None:
        self.outcome.success = False
        kind = self._item.graph[node_id]["class_type"]
        self.report(event, everybody, node_id=node_id, node_type=kind, executed=list(self._executed), **data)

    def _describe(self, node_id: str, exc: Exception) -> dict[str, Any]:
        if isinstance(exc, NodeError):
            kind, text, tips = exc.kind, exc.message, exc.tips
        else:
            kind, text, tips = type(exc).__name__, str(exc), ""
        log.error("!!! Exception during processing !!! %s", text, exc_info=not isinstance(exc, NodeError))
        inputs = self._item.graph[node_id]["inputs"]
        return {
            "exception_message": f"{text}\n{tips}",
            "exception_type": kind,
            "traceback": traceback.format_tb(exc.__traceback__),
            "current_inputs": {name: [value] for name, value in inputs.items() if not is_link(value)},
            "current_outputs": list(self._item.graph),
        }

    def _is_output(self, node_id: str) -> bool:
        return self._executor.nodes.is_output(self._item.graph[node_id]["class_type"])


class Order:
    """The order of execution: output nodes and what leads to them first, all others as they become ready."""

    def __init__(
        self, graph: dict[str, Any], outputs: list[str], cached: set[str], is_output: Callable[[str], bool]
    ) -> None:
        self._is_output = is_output
        self._waiting: dict[str, set[str]] = {}
        self._next: dict[str, list[str]] = {}
        for output in outputs:
            stack = [output]
            while stack:
                node_id = stack.pop()
                if node_id in self._waiting:
                    continue
                needs = [] if node_id in cached else [n for n in sources(graph[node_id]) if n not in cached]
                self._waiting[node_id] = set(needs)
                stack += needs
        for node_id, waits_for in self._waiting.items():
            for need in waits_for:
                self._next.setdefault(need, []).append(node_id)

    def next(self) -> str | None:
        """The node to execute now, None when all is done."""
        ready = [node_id for node_id, needs in self._waiting.items() if not needs]
        for hops in range(3):
            for node_id in ready:
                if self._leads_to_output(node_id, hops):
                    return node_id
        return ready[0] if ready else None

    def done(self, node_id: str) -> None:
        """``node_id`` was executed: those that waited for it may follow."""
        del self._waiting[node_id]
        for follower in self._next.get(node_id, ()):
            self._waiting[follower].discard(node_id)

    def _leads_to_output(self, node_id: str, hops: int) -> bool:
        if hops == 0:
            return self._is_output(node_id)
        return any(self._leads_to_output(follower, hops - 1) for follower in self._next.get(node_id, ()))


class Signatures:
    """What identifies a node's result: its kind, its inputs, the same of all it is linked to."""

    def __init__(self, graph: dict[str, Any], nodes: NodeSet) -> None:
        self._graph, self._nodes = graph, nodes
        self._known: dict[str, str] = {}

    def of(self, node_id: str) -> str:
        """Signature of one node of the graph; equal only if the result would be equal."""
        if node_id not in self._known:
            self._known[node_id] = node_id  # a cycle outside the outputs must not recurse for ever
            self._known[node_id] = self._compute(node_id)
        return self._known[node_id]

    def _compute(self, node_id: str) -> str:
        node = self._graph[node_id]
        inputs = {}
        for name, value in node.get("inputs", {}).items():
            known = is_link(value) and value[0] in self._graph
            inputs[name] = [self.of(value[0]), value[1]] if known else ["=", value]
        kind = node["class_type"]
        content = [kind, inputs, self._nodes.fingerprint(kind, node.get("inputs", {}))]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def is_link(value: object) -> bool:
    """Is an input's value a link to another node's output?"""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def sources(node: dict[str, Any]) -> list[str]:
    """Ids of the nodes that a node is linked to, in order of its inputs."""
    return [value[0] for value in node["inputs"].values() if is_link(value)]
