"""What an engine has said about one prompt: a pure reducer of ComfyUI's WebSocket messages.

No sockets and no clock.  The same messages stand in ``status.messages`` of a history entry, so the reducer
reads both.  What is done about an answer is in ``comfy_client``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

State = Literal["waiting", "running", "success", "error", "interrupted"]


@dataclass(frozen=True, slots=True)
class Failure:
    """A node that failed while the graph ran, in the engine's words."""

    node: str
    node_type: str
    message: str
    exception_type: str

    @property
    def out_of_memory(self) -> bool:
        """Whether memory was short: smaller frames or an emptier GPU would help."""
        # "Allocation on device" is how torch's cudaMallocAsync backend says it.
        said = f"{self.exception_type} {self.message}".lower()
        return "outofmemory" in said or "out of memory" in said or "allocation on device" in said

    @property
    def gpu_failed(self) -> bool:
        """Whether the GPU or its driver failed: after that, every prompt of this process fails."""
        # torch.AcceleratorError since torch 2.8, RuntimeError before; the words are CUDA's.
        return "AcceleratorError" in self.exception_type or "CUDA error:" in self.message


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """What has been said so far about the prompt ``prompt_id``.

    ``execution_success`` is not the end: ComfyUI writes the history entry after it.  The end is an
    ``executing`` message that names no node.

    >>> seen = PromptProgress("p1").after({"type": "execution_success", "data": {"prompt_id": "p1"}})
    >>> seen.state, seen.ended
    ('success', False)
    >>> seen.after({"type": "executing", "data": {"prompt_id": "p1", "node": None}}).ended
    True
    """

    prompt_id: str
    state: State = "waiting"
    node: str | None = None
    """The node that runs now."""
    value: int = 0
    """Steps that the sampler has done, of ``maximum``.  Values are skipped: never wait for one."""
    maximum: int = 0
    cached: frozenset[str] = frozenset()
    """Nodes whose output was still there from an earlier prompt."""
    done: frozenset[str] = frozenset()
    """Nodes that have run to their end in this prompt."""
    failure: Failure | None = None
    ended: bool = False

    @property
    def fraction(self) -> float:
        """Share of the sampler's steps that is done, 0 to 1; the sampler is nearly all of a window's time."""
        if self.state == "success":
            return 1.0
        return min(self.value / self.maximum, 1.0) if self.maximum > 0 else 0.0

    def after(self, message: object) -> Self:
        """This and one message more.  Other prompts' messages, and what is no message, change nothing."""
        if not isinstance(message, Mapping) or not isinstance(message.get("data"), Mapping):
            return self
        data: Mapping[str, Any] = message["data"]
        if data.get("prompt_id") != self.prompt_id:
            return self
        match message.get("type"):
            case "execution_start":
                return replace(self, state="running")
            case "execution_cached":
                return replace(self, state="running", cached=frozenset(map(str, _list(data.get("nodes")))))
            case "executing":
                node = data.get("node")
                if node is None:
                    return replace(self, node=None, ended=True)
                return replace(self, state="running", node=str(node))
            case "progress":
                return self._stepped(data)
            case "progress_state":
                return replace(self, state="running", done=self.done | _finished(data.get("nodes")))
            case "executed":
                return replace(self, done=self.done | {str(data.get("node"))})
            case "execution_success":
                return replace(self, state="success", node=None)
            case "execution_error":
                return replace(self, state="error", failure=_failure(data))
            case "execution_interrupted":
                return replace(self, state="interrupted")
        return self

    def _stepped(self, data: Mapping[str, Any]) -> Self:
        value, maximum = data.get("value"), data.get("max")
        if not isinstance(value, int | float) or not isinstance(maximum, int | float):
            return self
        return replace(self, state="running", value=int(value), maximum=int(maximum))


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _finished(nodes: object) -> frozenset[str]:
    if not isinstance(nodes, Mapping):
        return frozenset()
    return frozenset(
        str(node)
        for node, about in nodes.items()
        if isinstance(about, Mapping) and about.get("state") == "finished"
    )


def _failure(data: Mapping[str, Any]) -> Failure:
    return Failure(
        node=str(data.get("node_id", "")),
        node_type=str(data.get("node_type", "")),
        message=str(data.get("exception_message", "")).strip(),
        exception_type=str(data.get("exception_type", "")),
    )
