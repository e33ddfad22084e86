"""Every graph of every family against the schemas of its nodes, in milliseconds and without an engine.

Schemas: the draft engine's recordings of ComfyUI, what it has of the wrapper's nodes from their source, and
what our own node pack says of itself.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import workflow as native
from pipeline import workflow_family as wrapper
from pipeline.draft.schemas import SCHEMAS, WRAPPER_SCHEMAS
from pipeline.errors import InvalidRequest, WorkflowError
from pipeline.graph_check import Schemas, problems
from pipeline.workflow import Graph, SlotNames, Workflow, load

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
PACK = ROOT / "workflows" / "comfyui_nodes" / "infinitetalk_ray"

SAMPLES: dict[str, object] = {
    "portrait": "p.png",
    "motion": "m.png",
    "masks": "masks.png",
    "mask_1": "l.png",
    "mask_2": "r.png",
    "speech": "s.wav",
    "speech_2": "t.wav",
    "context": 64,
    "frames_total": 82,
    "length": 81,
    "prompt": "a person talks",
    "negative": "blurred",
    "seed": 2**48 - 1,
    "steps": 4,
    "cfg": 1.0,
    "shift": 8.0,
    "audio_scale": 1.5,
    "lora": "other.safetensors",
    "lora_strength": 0.5,
    "width": 640,
    "height": 480,
    "frames": "job/segment",
    "blocks_to_swap": 40,
    "force_offload": False,
    "offload_windows": True,
}
"""One good value for every slot of any workflow."""


def as_schema(node: Any) -> dict[str, Any]:
    """What ComfyUI would report of a node class."""
    sections = {
        section: {name: list(spec) for name, spec in inputs.items()}
        for section, inputs in node.INPUT_TYPES().items()
    }
    output = [list(kind) if isinstance(kind, list) else kind for kind in node.RETURN_TYPES]
    return {"input": sections, "output": output, "output_node": getattr(node, "OUTPUT_NODE", False)}


def all_schemas() -> Schemas:
    ours: dict[str, Any] = {}
    if PACK.is_dir():
        sys.path.insert(0, str(PACK.parent))
        try:
            pack = importlib.import_module(PACK.name)
        finally:
            sys.path.remove(str(PACK.parent))
        ours = {name: as_schema(node) for name, node in pack.NODE_CLASS_MAPPINGS.items()}
    return SCHEMAS | ours


ALL = all_schemas()


def slot_names() -> list[SlotNames]:
    """All sets of slots that the code knows."""
    found = [
        value
        for module in (native, wrapper)
        for value in vars(module).values()
        if isinstance(value, SlotNames)
    ]
    return [names for place, names in enumerate(found) if names not in found[:place]]


def opened(path: Path) -> Workflow:
    """The workflow with the slots that fit it, or the error of those that it is registered with."""
    errors = []
    for names in slot_names():
        try:
            return load(path, names)
        except WorkflowError as error:
            errors.append(str(error))
    known = dict(native.BUNDLED) | dict(wrapper.WORKFLOWS.values())
    if path.stem in known:
        load(path, known[path.stem])
    raise AssertionError("no SlotNames of the code fits: " + min(errors, key=len))


def filled(path: Path, *without: str) -> Graph:
    """The graph with sample values; ``without`` are optional slots that are left out."""
    workflow = opened(path)
    values = {slot.name: SAMPLES[slot.name] for slot in workflow.slots}
    return workflow.fill(values | dict.fromkeys(without))


def complaints(graph: Graph) -> list[str]:
    return [str(problem) for problem in problems(graph, ALL)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_graph_fits_its_nodes(path: Path) -> None:
    """As it is, filled, and without each of the slots that may be left out, and without all of them."""
    optional = [slot.name for slot in opened(path).slots if slot.optional]
    assert complaints(json.loads(path.read_text())) == []
    for without in ([], *([name] for name in optional), optional):
        assert complaints(filled(path, *without)) == [], f"without {without}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_slot_is_filled(path: Path) -> None:
    """Each slot has a sample value here and takes it."""
    workflow, graph = opened(path), filled(path)
    assert {slot.name for slot in workflow.slots} <= SAMPLES.keys()
    for slot in workflow.slots:
        assert graph[slot.node]["inputs"][slot.input] == SAMPLES[slot.name]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_titles_tell_nodes_apart(path: Path) -> None:
    """Errors name nodes by their titles, so each node has one of its own."""
    titles = [node.get("_meta", {}).get("title", "") for node in json.loads(path.read_text()).values()]
    assert all(titles)
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("mode", wrapper.WORKFLOWS)
def test_every_wrapper_mode_has_a_file(mode: tuple[str, str, str]) -> None:
    """Family, input type and person count lead to a file that has exactly the slots promised for it."""
    file, names = wrapper.workflow_for(*mode)
    assert {slot.name for slot in load(file, names).slots} == names.all


@pytest.mark.parametrize(
    ("mode", "field"),
    [
        (("wraper", "image", "single"), "workflow_family"),
        (("wrapper", "audio", "single"), "input_type"),
        (("wrapper", "image", "three"), "person_count"),
    ],
)
def test_an_unknown_mode_is_an_invalid_request(mode: tuple[str, str, str], field: str) -> None:
    """The field that is wrong is named."""
    with pytest.raises(InvalidRequest) as caught:
        wrapper.workflow_for(*mode)
    assert caught.value.field == field


@pytest.mark.parametrize("mode", wrapper.WORKFLOWS)
def test_wrapper_graphs_are_as_the_pipeline_needs(mode: tuple[str, str, str]) -> None:
    """81 frames with 9 repeated, 25 a second; loudness and colours are left to the pipeline; no download."""
    graph = filled(ROOT / "workflows" / f"{wrapper.workflow_for(*mode)[0]}.json")
    nodes = {node["class_type"]: node["inputs"] for node in graph.values()}
    loop, speech = nodes["WanVideoImageToVideoMultiTalk"], nodes["MultiTalkWav2VecEmbeds"]
    assert (loop["frame_window_size"], loop["motion_frame"], loop["mode"]) == (81, 9, "infinitetalk")
    assert (loop["colormatch"], loop["output_path"]) == ("disabled", "")
    assert (speech["normalize_loudness"], speech["fps"], speech["multi_audio_type"]) == (False, 25.0, "para")
    assert nodes["WanVideoTextEncodeCached"]["use_disk_cache"] is False
    assert not any("Download" in kind for kind in nodes)
    assert ({"audio_2", "ref_target_masks"} <= speech.keys()) == (mode[2] == "multi")
    assert graph[loop["start_image"][0]]["class_type"] == "LoadImage"  # all of the pictures, one per window
    assert ("ImageFromBatch" in nodes) == (mode[1] == "video")  # the image encoder would average them


Break = Callable[[Graph], None]


def setting(node: str, name: str, value: object) -> Break:
    def change(graph: Graph) -> None:
        graph[node]["inputs"][name] = value

    return change


def removing(node: str, name: str) -> Break:
    def change(graph: Graph) -> None:
        del graph[node]["inputs"][name]

    return change


def naming(node: str, kind: str) -> Break:
    def change(graph: Graph) -> None:
        graph[node]["class_type"] = kind

    return change


def dropping(node: str) -> Break:
    def change(graph: Graph) -> None:
        del graph[node]

    return change


def renaming(node: str, old: str, new: str) -> Break:
    def change(graph: Graph) -> None:
        graph[node]["inputs"][new] = graph[node]["inputs"].pop(old)

    return change


SAMPLER = r"node 15 \(WanVideoSampler\): "


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (naming("15", "WanVideoSampIer"), r"node 15 \(WanVideoSampIer\): unknown class"),
        (removing("15", "cfg"), SAMPLER + "cfg: required, but missing"),
        (renaming("15", "steps", "step"), SAMPLER + "steps: required, but missing"),
        (setting("15", "sampler_name", "euler"), SAMPLER + "sampler_name: unknown input"),
        (setting("15", "scheduler", "dpm++sde"), SAMPLER + "scheduler: 'dpm\\+\\+sde' is none of 'unipc'"),
        (setting("15", "steps", 0), SAMPLER + "steps: 0 is less than 1"),
        (setting("15", "cfg", 31.0), SAMPLER + "cfg: 31.0 is more than 30.0"),
        (setting("15", "steps", "6"), SAMPLER + "steps: takes INT, not '6'"),
        (setting("15", "steps", 6.0), SAMPLER + "steps: takes INT, not 6.0"),
        (setting("15", "seed", True), SAMPLER + "seed: takes INT, not True"),
        (setting("15", "force_offload", 1), SAMPLER + "force_offload: takes BOOLEAN, not 1"),
        (setting("15", "model", "wan.safetensors"), SAMPLER + "model: takes a link to WANVIDEOMODEL"),
        (
            setting("15", "model", ["2", 0]),
            SAMPLER + "model: takes WANVIDEOMODEL, but .* gives MULTITALKMODEL",
        ),
        (setting("15", "model", ["1", 1]), SAMPLER + "model: WanVideoModelLoader has 1 outputs"),
        (setting("15", "model", ["99", 0]), SAMPLER + "model: linked to node 99, which does not exist"),
        (
            setting("15", "scheduler", ["12", 0]),
            SAMPLER + "scheduler: takes a choice, but .* gives WAV2VECMODEL",
        ),
        (setting("15", "samples", ["15", 0]), SAMPLER + "reads its own output"),
        (
            setting("5", "model_name", ""),
            r"node 5 \(WanVideoVAELoader\): model_name: takes the name of a file",
        ),
        (dropping("17"), "graph: no output node"),
        (removing("1", "lora"), r"node 4 \(WanVideoLoraSelect\): no output node reads it"),
    ],
)
def test_a_broken_graph_is_found(broken: Break, said: str) -> None:
    """Each kind of mistake names the node, its class and the input."""
    graph = filled(ROOT / "workflows" / "wrapper_image_single.json")
    broken(graph)
    with pytest.raises(AssertionError, match=said):
        assert not complaints(graph), "\n".join(complaints(graph))


def two_speakers() -> Graph:
    """A graph around ComfyUI's node with a choice that brings inputs of its own."""
    graph: Graph = filled(ROOT / "workflows" / "image_single.json")
    node = next(node for node in graph.values() if node["class_type"] == "WanInfiniteTalkToVideo")
    graph["90"] = {"class_type": "LoadImageMask", "inputs": {"image": "l.png", "channel": "red"}}
    node["inputs"] |= {"mode": "two_speakers", "mode.mask_1": ["90", 0]}
    return graph


def test_inputs_of_a_choice_are_known_by_their_dotted_names() -> None:
    """``mode.mask_1`` belongs to two_speakers; elsewhere, misspelt or of another type it is an error."""
    good = two_speakers()
    assert complaints(good) == []
    node_id = next(id_ for id_, node in good.items() if node["class_type"] == "WanInfiniteTalkToVideo")

    def after(change: Break) -> str:
        graph = copy.deepcopy(good)
        change(graph)
        return "\n".join(complaints(graph))

    assert "mode.mask_1: unknown input" in after(setting(node_id, "mode", "single_speaker"))
    assert "mode.mask_3: unknown input" in after(setting(node_id, "mode.mask_3", ["90", 0]))
    assert "mode.mask_1: takes MASK, but" in after(setting(node_id, "mode.mask_1", ["9", 0]))
    assert "mode: 'two' is none of 'single_speaker'" in after(setting(node_id, "mode", "two"))


def test_a_mistyped_slot_names_file_node_and_input(tmp_path: Path) -> None:
    """A slot on an input that the node does not have fails when the file is read."""
    text = (ROOT / "workflows" / "wrapper_image_single.json").read_text()
    path = tmp_path / "wrapper_image_single.json"
    path.write_text(text.replace("height=height", "height=hight"))
    said = r"wrapper_image_single\.json: slot 'height': node 14 .WanVideoImageToVideoMultiTalk. .* 'hight'"
    with pytest.raises(WorkflowError, match=said):
        opened(path)


@pytest.mark.parametrize("name", sorted(WRAPPER_SCHEMAS))
def test_the_written_schemas_are_used_and_consistent(name: str) -> None:
    """Every schema belongs to a node of a graph, and each default is in its own range."""
    used = {node["class_type"] for path in WORKFLOWS for node in json.loads(path.read_text()).values()}
    assert name in used
    for section in ALL[name]["input"].values():
        for kind, *rest in section.values():
            config: dict[str, Any] = rest[0] if rest else {}
            default: Any = config.get("default")
            if isinstance(kind, list) and kind and default is not None:
                assert default in kind
            if kind in ("INT", "FLOAT"):
                assert config.get("min", default) <= default <= config.get("max", default)
