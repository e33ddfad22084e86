"""What answers mean, with bodies as ComfyUI 0.33 sends them."""

from typing import Any

import pytest

from pipeline.comfy_answers import files_of, one_line, why_failed, why_refused
from pipeline.comfy_events import Failure
from pipeline.workflow import Graph

GRAPH: Graph = {
    "1": {"class_type": "UNETLoader", "inputs": {}},
    "9": {"class_type": "LoadImage", "inputs": {}, "_meta": {"title": "slot: portrait=image"}},
}
FAILED = {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation"}


def invalid(**nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """A refusal that names nodes."""
    errors = {name[1:]: {"errors": found, "dependent_outputs": ["20"]} for name, found in nodes.items()}
    return {"error": FAILED | {"details": "", "extra_info": {}}, "node_errors": errors}


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            invalid(_9=[{"message": "Custom validation failed", "details": "image - Invalid image: nope"}]),
            "node 9 (LoadImage, slot: portrait=image): Custom validation failed: image - Invalid image: nope",
        ),
        (
            invalid(_1=[{"message": "Value not in list", "details": "unet_name: 'a' not in ['b']"}], _9=[{}]),
            "node 1 (UNETLoader): Value not in list: unet_name: 'a' not in ['b'] (and 1 more)",
        ),
        (
            {
                "error": {
                    "type": "missing_node_type",
                    "message": "Node 'X' not found.",
                    "details": "Node ID '#1'",
                    "extra_info": {"node_id": "1", "class_type": "X"},
                },
                "node_errors": {},
            },
            "node 1 (UNETLoader): Node 'X' not found.: Node ID '#1'",
        ),
        (
            {"error": {"message": "No prompt provided", "details": "No prompt provided", "extra_info": {}}},
            "No prompt provided",
        ),
        ({}, "the engine refused the graph: {}"),
    ],
)
def test_refusals_become_one_sentence(answer: dict[str, Any], sentence: str) -> None:
    """The first complaint with node, class and title; the number of others; never a bare code."""
    assert str(why_refused(GRAPH, answer)) == sentence


def test_failures_keep_the_engines_words() -> None:
    """On one line; a failure without words still says something; memory is named first."""
    error = why_failed(GRAPH, Failure("9", "LoadImage", "cannot identify\nimage file", "ValueError"))
    assert str(error) == "node 9 (LoadImage, slot: portrait=image): cannot identify image file"
    assert str(why_failed(GRAPH, Failure("7", "Gone", "", ""))) == "node 7 (Gone): failed without a message"
    memory = Failure("1", "UNETLoader", "Allocation on device", "torch.OutOfMemoryError")
    assert why_failed(GRAPH, memory).reason == "out of memory: Allocation on device"


def test_files_are_found_under_every_key() -> None:
    """Pictures and videos stand under 'images', sounds under 'audio'; other entries are no files."""
    picture = {"filename": "a.png", "subfolder": "s", "type": "temp"}
    outputs = {"20": {"images": [picture, {"filename": "b.mp4"}], "animated": [True]}, "21": {"text": "x"}}
    assert files_of(outputs) == {
        "20": [picture, {"filename": "b.mp4", "subfolder": "", "type": "output"}],
        "21": [],
    }
    assert files_of(None) == {}


def test_one_line_is_short() -> None:
    """Line breaks become blanks, the end of long texts becomes dots."""
    assert one_line(" a\n  b\t") == "a b"
    assert len(one_line("x" * 5000)) == 300
