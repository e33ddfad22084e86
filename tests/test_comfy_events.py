"""What the reducer makes of an engine's messages; the sequences are ComfyUI's own order."""

from typing import Any

import pytest

from pipeline.comfy_events import Failure, PromptProgress

PROMPT = "p1"


def message(kind: str, **data: Any) -> dict[str, Any]:
    """A message about our prompt."""
    return {"type": kind, "data": {"prompt_id": PROMPT, **data}}


def after(*messages: object) -> PromptProgress:
    """What has been seen after ``messages``."""
    seen = PromptProgress(PROMPT)
    for one in messages:
        seen = seen.after(one)
    return seen


START = message("execution_start", timestamp=1)


def test_a_run_from_start_to_end() -> None:
    """Cached nodes, the running node, sampler steps, finished nodes; the end names no node."""
    running = [
        {"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 1}}, "sid": "x"}},
        START,
        message("execution_cached", nodes=["1", "2"]),
        message("progress_state", nodes={"17": {"value": 0.0, "max": 1.0, "state": "running"}}),
        message("executing", node="17", display_node="17"),
        message("progress", value=1, max=4, node="17"),
    ]
    seen = after(*running)
    assert (seen.state, seen.node) == ("running", "17")
    assert seen.cached == {"1", "2"}
    assert seen.done == set()
    assert (seen.value, seen.maximum, seen.fraction, seen.ended) == (1, 4, 0.25, False)
    finished = [
        message("progress_state", nodes={"17": {"value": 4, "max": 4, "state": "finished"}}),
        message("executing", node="20", display_node="20"),
        message("executed", node="20", display_node="20", output={"images": []}),
        message("execution_success", timestamp=2),
        message("executing", node=None),
    ]
    seen = after(*running, *finished)
    assert (seen.state, seen.node) == ("success", None)
    assert seen.done == {"17", "20"}
    assert (seen.fraction, seen.ended, seen.failure) == (1.0, True, None)


def test_success_is_not_the_end() -> None:
    """The history entry is written after execution_success, so waiting ends only later."""
    assert not after(START, message("execution_success")).ended


def test_an_error_carries_the_nodes_words() -> None:
    """Node, class, message without the trailing line break; the end comes afterwards."""
    seen = after(
        START,
        message(
            "execution_error",
            node_id="16",
            node_type="WanInfiniteTalkToVideo",
            exception_message="Not enough previous frames provided.\n",
            exception_type="ValueError",
        ),
    )
    assert (seen.state, seen.ended) == ("error", False)
    assert seen.failure == Failure(
        "16", "WanInfiniteTalkToVideo", "Not enough previous frames provided.", "ValueError"
    )
    assert not seen.failure.out_of_memory
    assert seen.after(message("executing", node=None)).ended


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("torch.OutOfMemoryError", "Allocation on device"),
        ("torch.cuda.OutOfMemoryError", ""),
        ("RuntimeError", "CUDA error: out of memory"),
        ("", "Allocation on device 0 would exceed allowed memory."),
    ],
)
def test_out_of_memory_is_recognised(kind: str, text: str) -> None:
    """By the exception's type or by its words."""
    assert Failure("17", "KSampler", text, kind).out_of_memory


def test_interrupted_is_its_own_state() -> None:
    """In /history an interrupted prompt looks like a failed one; the message tells them apart."""
    assert after(START, message("execution_interrupted", node_id="17")).state == "interrupted"


@pytest.mark.parametrize(
    "other",
    [
        {"type": "executing", "data": {"prompt_id": "p2", "node": None}},
        {"type": "executing", "data": {"node": "17"}},
        {"type": "progress", "data": {"prompt_id": PROMPT, "value": "x"}},
        {"type": "something_new", "data": {"prompt_id": PROMPT}},
        {"type": "executing"},
        {"data": None},
        None,
        "text",
        [1],
    ],
)
def test_everything_else_changes_nothing(other: object) -> None:
    """Other prompts, a reconnect's 'executing' without a prompt id, unknown and broken messages."""
    assert after(START, other) == after(START)
