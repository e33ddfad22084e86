"""Workflow files: what is checked when they are loaded, and how slots are filled."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import WorkflowError
from pipeline.workflow import BUNDLED, IMAGE_SINGLE, SlotNames, Workflow, load

VALUES: dict[str, object] = {
    "portrait": "job/portrait.png",
    "speech": "job/speech.wav",
    "motion": "job/motion.png",
    "prompt": "a person talks",
    "seed": 7,
    "steps": 4,
    "width": 640,
    "height": 480,
    "length": 33,
    "frames": "job/window",
    "shift": 5.0,
    "audio_scale": 1.5,
    "lora": "other.safetensors",
    "lora_strength": 0.5,
}
MORE: dict[str, dict[str, object]] = {
    "image_single": {},
    "talk_single": {"context": 64, "negative": "blurred"},
    "talk_multi": {
        "context": 64,
        "negative": "blurred",
        "speech_2": "job/second.wav",
        "mask_1": "job/left.png",
        "mask_2": "job/right.png",
    },
}
TINY = SlotNames(required=frozenset({"size"}), optional=frozenset({"extra"}))


def tiny() -> dict[str, Any]:
    """A graph of three nodes with one required and one optional slot."""
    return {
        "1": {"class_type": "Make", "inputs": {"size": 1}, "_meta": {"title": "slot: size=size"}},
        "2": {"class_type": "Load", "inputs": {"file": "x"}, "_meta": {"title": "Slot: extra = file"}},
        "3": {"class_type": "Save", "inputs": {"made": ["1", 0], "extra": ["2", 1]}},
    }


def loaded(directory: Path, graph: object) -> Workflow:
    """``graph`` written to a file and loaded with the tiny slots."""
    path = directory / "tiny.json"
    path.write_text(graph if isinstance(graph, str) else json.dumps(graph))
    return load(path, TINY)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_workflow_fills_completely(name: str) -> None:
    """Every value lands in the input that the title names; nothing else changes."""
    workflow = load(name)
    values = VALUES | MORE[name]
    graph = workflow.fill(values)
    original = json.loads(workflow.text)
    for slot in workflow.slots:
        assert graph[slot.node]["inputs"][slot.input] == values[slot.name]
        original[slot.node]["inputs"][slot.input] = values[slot.name]
    assert graph == original


@pytest.mark.parametrize("name", BUNDLED)
def test_first_window_has_no_motion(name: str) -> None:
    """None for motion drops its LoadImage and the input previous_frames, and only those."""
    workflow = load(name)
    graph = workflow.fill(VALUES | MORE[name] | {"motion": None})
    later = workflow.fill(VALUES | MORE[name])
    assert later.keys() - graph.keys() == {workflow.slot_node("motion")}
    window = workflow.slot_node("length")
    assert later[window]["inputs"].keys() - graph[window]["inputs"].keys() == {"previous_frames"}


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_workflow_is_as_the_model_needs(name: str) -> None:
    """cfg is 1 (else the audio attention fails), 9 motion frames, and only new frames are saved."""
    graph = load(name).fill(VALUES | MORE[name])
    by_class = {node["class_type"]: (node_id, node["inputs"]) for node_id, node in graph.items()}
    window, inputs = by_class["WanInfiniteTalkToVideo"]
    assert by_class["KSampler"][1]["cfg"] == 1.0
    assert inputs["motion_frame_count"] == 9
    assert inputs["mode"] == ("two_speakers" if name == "talk_multi" else "single_speaker")
    trim, cut = by_class["ImageFromBatch"]
    assert cut["batch_index"] == [window, 4]
    assert by_class["SaveImage"][1]["images"] == [trim, 0]


@pytest.mark.parametrize("name", BUNDLED)
def test_every_bundled_node_has_a_title_and_a_reader(name: str) -> None:
    """Titles are for people who open the file; a node that nobody reads would be a mistake."""
    graph = json.loads(load(name).text)
    read = {
        value[0] for node in graph.values() for value in node["inputs"].values() if isinstance(value, list)
    }
    for node_id, node in graph.items():
        assert node["_meta"]["title"]
        assert node_id in read or node["class_type"] == "SaveImage"


def test_fill_leaves_the_workflow_untouched() -> None:
    """Two fills don't share anything; a workflow equals itself after pickling."""
    workflow = load("image_single")
    workflow.fill(VALUES)["1"]["inputs"].clear()
    assert workflow.fill(VALUES)["1"]["inputs"]
    assert pickle.loads(pickle.dumps(workflow)) == workflow


@pytest.mark.parametrize("name", sorted(IMAGE_SINGLE.required | IMAGE_SINGLE.optional))
def test_missing_value_names_file_and_slot(name: str) -> None:
    """A forgotten value is an error, also for the optional slot: leaving it out is said with None."""
    values = {key: value for key, value in VALUES.items() if key != name}
    with pytest.raises(WorkflowError, match=rf"image_single\.json: no value for slot '{name}'"):
        load("image_single").fill(values)


def test_steps_may_be_left_to_the_file() -> None:
    """The number of steps belongs to the LoRA in the file, so a preset slot needs no value."""
    workflow = load("image_single")
    graph = workflow.fill({key: value for key, value in VALUES.items() if key != "steps"})
    assert graph[workflow.slot_node("steps")]["inputs"]["steps"] == 6


def test_unknown_value_and_none_are_refused() -> None:
    """A value for no slot and None for a required slot name the slot."""
    workflow = load("image_single")
    with pytest.raises(WorkflowError, match="'colour'"):
        workflow.fill(VALUES | {"colour": "red"})
    with pytest.raises(WorkflowError, match="'seed' can't be left out"):
        workflow.fill(VALUES | {"seed": None})
    with pytest.raises(WorkflowError, match="'colour'"):
        workflow.slot_node("colour")


@pytest.mark.parametrize(
    ("node", "title", "reason"),
    [
        ("1", "just a title", "no slot 'size'"),
        ("2", "", "no slot 'extra'"),
        ("3", "slot: size=made", "slot 'size' is declared twice"),
        ("1", "slot: size=size, colour=size", "unknown slot 'colour' at node 1"),
        ("1", "slot: size=length", "slot 'size': node 1 .Make. has no input 'length'"),
        ("1", "slot: size", "node 1: 'size' in its title is not NAME=INPUT"),
        ("1", "slot:", "is not NAME=INPUT"),
    ],
)
def test_wrong_titles_name_the_slot(tmp_path: Path, node: str, title: str, reason: str) -> None:
    """Missing, double, unknown and misspelt slots fail at load with the file's and the slot's name."""
    graph = tiny()
    graph[node]["_meta"] = {"title": title}
    with pytest.raises(WorkflowError, match=rf"workflow tiny\.json: .*{reason}"):
        loaded(tmp_path, graph)


def test_a_linked_input_is_no_slot(tmp_path: Path) -> None:
    """A slot on a linked input would silently cut the link."""
    graph = tiny()
    del graph["1"]["_meta"]
    graph["3"]["_meta"] = {"title": "slot: size=made"}
    with pytest.raises(WorkflowError, match="'size': 'made' of node 3 is linked"):
        loaded(tmp_path, graph)


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        ("not json", "not JSON"),
        ([], "not a graph"),
        ({}, "not a graph"),
        ({"nodes": [], "links": []}, "editor's format"),
        ({"1": 5}, "node 1 has no class_type"),
        ({"1": {"class_type": "Make"}}, r"node 1 \(Make\) has no inputs"),
        (
            {"1": {"class_type": "Make", "inputs": {"a": ["9", 0]}}},
            "'a' of node 1 .* node 9, which",
        ),
    ],
)
def test_what_is_no_graph_is_refused(tmp_path: Path, graph: object, reason: str) -> None:
    """Other JSON, other formats and dangling links fail at load."""
    with pytest.raises(WorkflowError, match=reason):
        loaded(tmp_path, graph)


def test_missing_file_is_a_workflow_error(tmp_path: Path) -> None:
    """By name and by path."""
    for source in ("no_such_workflow", tmp_path / "none.json", str(tmp_path / "none.json")):
        with pytest.raises(WorkflowError, match="there is no such file"):
            load(source)
    with pytest.raises(WorkflowError, match="can't be read"):
        load(tmp_path)
