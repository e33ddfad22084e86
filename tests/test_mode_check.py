"""What an engine lacks for a graph is found by asking it, here the draft engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.comfy_client import ComfyClient
from pipeline.errors import ConfigurationError
from pipeline.mode_check import Missing, check_graph, check_mode, in_words, require_mode
from pipeline.workflow import Workflow, load
from tests.draft_process import draft_engine


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyClient]:
    with draft_engine(tmp_path_factory.mktemp("engine")) as engine:
        yield ComfyClient(engine.url)


def changed(workflow: Workflow, **changes: str) -> Workflow:
    """The workflow with words replaced."""
    text = workflow.text
    for old, new in changes.items():
        text = text.replace(old, new)
    return Workflow(workflow.file, workflow.slots, text)


def test_nothing_is_missing_for_the_bundled_graph(client: ComfyClient) -> None:
    """The engine has every node and file; uploads such as the portrait are no weights."""
    assert check_mode(client, load("image_single")) == ()


def test_a_missing_node_is_found(client: ComfyClient) -> None:
    """A class that the engine does not know is named once, with the version that has it."""
    workflow = changed(load("image_single"), WanInfiniteTalkToVideo="WanInfiniteTalkToVideo2")
    (missing,) = check_mode(client, workflow)
    assert missing == Missing("WanInfiniteTalkToVideo2")
    assert "0.11 or newer" in missing.remedy


def test_a_missing_weight_is_found_in_both_kinds_of_lists(client: ComfyClient) -> None:
    """Files are looked for in lists of the old form (VAELoader) and of the new (AudioEncoderLoader)."""
    workflow = changed(load("image_single"), **{"wan_2.1_vae": "lost_vae", "wav2vec2-chinese": "lost_ears"})
    assert check_mode(client, workflow) == (
        Missing("VAELoader", "lost_vae.safetensors"),
        Missing("AudioEncoderLoader", "lost_ears-base_fp16.safetensors"),
    )


def test_a_mode_is_refused_with_names_and_remedies(client: ComfyClient) -> None:
    """The error names graph, files and the command that fetches them."""
    workflow = changed(load("image_single"), **{"wan_2.1_vae": "lost_vae"})
    words = r"can't render image_single\.json: missing lost_vae\.safetensors \(infinitetalk models download\)"
    with pytest.raises(ConfigurationError, match=words):
        require_mode(client, workflow)
    require_mode(client, load("image_single"))


def test_nodes_of_a_pack_name_the_pack(client: ComfyClient) -> None:
    """A class of the wrapper's pack that the engine lacks leads to the pack; the sentence says so once."""
    text = (Path(__file__).parent.parent / "workflows" / "wrapper_image_single.json").read_text()
    assert check_graph(client, json.loads(text)) == ()
    graph = json.loads(text.replace("WanVideoSampler", "WanVideoSampler2").replace("VAELoader", "VAELoader2"))
    words = in_words(check_graph(client, graph))
    assert "node WanVideoSampler2" in words
    assert words.count("https://github.com/kijai/ComfyUI-WanVideoWrapper") == 1
    assert "comfyui install DIR --family wrapper" in words
