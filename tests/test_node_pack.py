"""Our own ComfyUI nodes: found by both engines, importable without ComfyUI, and right in their arithmetic.

What they do in a real ComfyUI is in ``test_comfyui_modes``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests

from pipeline.engine import NODE_PACK, choose_engine, running_engine
from pipeline.errors import ConfigurationError
from pipeline.models import packs_of
from pipeline.settings import Settings
from tests.conftest import ROOT
from tests.draft_process import changed, draft_engine, window
from tests.free_ports import free_ports


def test_the_pack_needs_nothing_to_be_imported() -> None:
    """ComfyUI's modules and torch are looked up while a node runs, so that schemas can be read anywhere."""
    code = "import sys; from workflows.comfyui_nodes import infinitetalk_ray as pack; "
    code += "print([m for m in ('torch', 'comfy', 'numpy') if m in sys.modules], *pack.NODE_CLASS_MAPPINGS)"
    reply = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert reply.stdout.strip() == "[] InfiniteTalkSpeech"


def test_both_engines_are_told_to_load_it(tmp_path: Path) -> None:
    """No custom node but ours and those that the operator lists; switched off, none."""
    (tmp_path / "main.py").touch()
    (tmp_path / "models").mkdir()
    common = {"comfyui_dir": tmp_path, "comfyui_python": sys.executable}
    for fields in (common, {"engine": "draft"}):
        command = " ".join(choose_engine(Settings.model_validate(fields)).command)
        assert "--disable-all-custom-nodes --whitelist-custom-nodes infinitetalk_ray" in command
        off = choose_engine(Settings.model_validate({**fields, "node_pack": False}))
        assert "--disable-all-custom-nodes" in off.command
        assert "infinitetalk_ray" not in " ".join(off.command)
    more = {**common, "comfyui_args": "--lowvram --whitelist-custom-nodes other --cpu"}
    command = " ".join(choose_engine(Settings.model_validate(more)).command)
    assert command.endswith("--lowvram --whitelist-custom-nodes infinitetalk_ray other --cpu")


def test_comfyui_loads_a_pack_that_a_graph_needs(tmp_path: Path) -> None:
    """The wrapper's folder is whitelisted and linked from the checkout; without it the remedy is named."""
    (tmp_path / "main.py").touch()
    (tmp_path / "models").mkdir()
    settings = Settings(comfyui_dir=tmp_path, comfyui_python=Path(sys.executable))
    packs = packs_of(json.loads((ROOT / "workflows" / "wrapper_image_single.json").read_text()))
    assert packs == ("ComfyUI-WanVideoWrapper",)
    with pytest.raises(ConfigurationError, match="comfyui install DIR --family wrapper"):
        choose_engine(settings, packs)
    folder = tmp_path / "custom_nodes" / packs[0]
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    program = choose_engine(settings, packs)
    words = "--whitelist-custom-nodes infinitetalk_ray ComfyUI-WanVideoWrapper"
    assert words in " ".join(program.command)
    assert program.packs == (folder,)
    assert packs[0] not in " ".join(choose_engine(settings).command)


def test_the_draft_engine_offers_it_through_the_link(tmp_path: Path) -> None:
    """The schema in /object_info is the node's own; without the pack the node is unknown."""
    for pack in (True, False):
        settings = Settings(engine="draft", scratch_dir=tmp_path, ports=free_ports(10), node_pack=pack)
        with running_engine(choose_engine(settings), settings) as engine:
            link = engine.base_dir / "custom_nodes" / NODE_PACK.name
            assert link.is_symlink() == pack
            info = requests.get(f"{engine.url}/object_info/InfiniteTalkSpeech", timeout=120).json()
        if not pack:
            assert info == {}
            continue
        node = info["InfiniteTalkSpeech"]
        assert node["output"] == ["MODEL"]
        assert node["input"]["required"]["model"] == ["MODEL"]
        assert node["input"]["required"]["context"][1]["min"] == 0
        assert list(node["input"]["optional"]) == ["audio_encoder_output_2"]


def test_a_broken_pack_is_left_out(tmp_path: Path) -> None:
    """As in ComfyUI, a pack that can't be imported does not keep the engine from starting."""
    pack = tmp_path / "custom_nodes" / "broken"
    pack.mkdir(parents=True)
    (pack / "__init__.py").write_text("import no_such_module\n")
    with draft_engine(tmp_path) as engine:
        assert engine.get("/object_info/KSampler").json()


def test_the_draft_engine_checks_the_nodes_inputs(tmp_path: Path) -> None:
    """A missing input and a negative context are 400; too little speech fails while the node runs."""
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / NODE_PACK.name).symlink_to(NODE_PACK)
    ours: dict[str, Any] = {"model": ["100", 0], "model_patch": ["4", 0], "latent": ["100", 3]}
    ours |= {"audio_encoder_output_1": ["8", 0], "context": 8}
    graph = window(n101_model=["200", 0])
    graph["200"] = {"class_type": "InfiniteTalkSpeech", "inputs": ours}
    with draft_engine(tmp_path) as engine:
        for change, kind in (
            ({"n200_context": -1}, "value_smaller_than_min"),
            ({"n200_latent": None}, "required_input_missing"),
            ({"n200_latent": ["100", 0]}, "return_type_mismatch"),
        ):
            answer = engine.post("/prompt", json={"prompt": changed(graph, change)})
            assert answer.status_code == 400
            assert kind in json.dumps(answer.json()["node_errors"]["200"])
        assert engine.run(graph)[-2]["type"] == "status"
        short = engine.run(changed(graph, {"n200_context": 40}))
        [error] = [message["data"] for message in short if message["type"] == "execution_error"]
        assert error["node_type"] == "InfiniteTalkSpeech"
        assert "Speech 1 has 50 frames" in error["exception_message"]


class Features(np.ndarray):
    """A numpy array with the two methods of a tensor that the node calls."""

    def movedim(self, source: int, target: int) -> Any:
        return np.moveaxis(self, source, target).view(Features)

    def to(self, kind: str) -> tuple[str, Any]:
        return kind, np.asarray(self)


def test_tracks_lie_side_by_side_from_the_context_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node hands both tracks, the window's frames and the model's number type to ComfyUI's projection,
    leaves the given model as it is, and does not let clone() see its options."""
    from workflows.comfyui_nodes import infinitetalk_ray as pack

    asked: list[Any] = []

    def project(projection: str, tracks: list[Any], first: int, last: int) -> Any:
        asked.append((projection, [len(track) for track in tracks], first, last))
        return np.stack([track[first:last] for track in tracks]).view(Features)

    monkeypatch.setattr(pack, "_features", lambda encoded: np.asarray(encoded).view(Features))
    multitalk = SimpleNamespace(project_audio_features=project)
    monkeypatch.setitem(sys.modules, "comfy.ldm.wan.model_multitalk", multitalk)
    patch = SimpleNamespace(model=SimpleNamespace(audio_proj="projection"))
    latent = {"samples": np.zeros((1, 16, 3, 8, 8))}  # 9 frames
    before = {"transformer_options": {"audio_embeds": "old", "patches": "kept"}, "other": 1}

    class Model:
        def __init__(self, options: dict[str, Any]) -> None:
            self.model_options = options

        def clone(self) -> Model:
            assert self.model_options == {}
            return Model({})

        def model_dtype(self) -> str:
            return "bf16"

    model = Model(before)
    tracks = [np.arange(20), np.arange(100, 115)]
    [heard] = pack.InfiniteTalkSpeech().replace(model, patch, latent, tracks[0], 4, tracks[1])
    assert asked == [("projection", [20, 15], 4, 13)]
    kind, speech = heard.model_options["transformer_options"].pop("audio_embeds")
    assert kind == "bf16"
    assert np.array_equal(speech, [np.arange(4, 13), np.arange(104, 113)])
    assert heard.model_options == {"transformer_options": {"patches": "kept"}, "other": 1}
    assert model.model_options["transformer_options"]["audio_embeds"] == "old"
    with pytest.raises(ValueError, match=r"Speech 2 has 15 frames; 7 .* a window of 9 need 16"):
        pack.InfiniteTalkSpeech().replace(model, patch, latent, tracks[0], 7, tracks[1])
