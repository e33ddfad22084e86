"""The manifest lists what the graphs load, and a folder is compared with it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from pipeline.errors import ConfigurationError, InvalidRequest
from pipeline.mode_check import weights_of
from pipeline.models import State, Weight, manifest, models_folder, parse, verify
from pipeline.settings import Settings

WORKFLOWS = Path(__file__).resolve().parent.parent / "workflows"
FOLDERS = {
    ("UNETLoader", "unet_name"): "diffusion_models",
    ("LoraLoaderModelOnly", "lora_name"): "loras",
    ("ModelPatchLoader", "name"): "model_patches",
    ("VAELoader", "vae_name"): "vae",
    ("CLIPLoader", "clip_name"): "text_encoders",
    ("CLIPVisionLoader", "clip_name"): "clip_vision",
    ("AudioEncoderLoader", "audio_encoder_name"): "audio_encoders",
    ("WanVideoModelLoader", "model"): "diffusion_models",
    ("MultiTalkModelLoader", "model"): "diffusion_models",
    ("WanVideoLoraSelect", "lora"): "loras",
    ("WanVideoVAELoader", "model_name"): "vae",
    ("WanVideoTextEncodeCached", "model_name"): "text_encoders",
    ("Wav2VecModelLoader", "model"): "wav2vec2",
}
"""Where ComfyUI, or the wrapper, looks for what an input names."""

GRAPHS = [
    (family, mode, name)
    for family, modes in manifest().graphs.items()
    for mode, names in modes.items()
    for name in names
]


@pytest.mark.parametrize(("family", "mode", "name"), GRAPHS)
def test_a_mode_lists_exactly_what_its_graph_loads(family: str, mode: str, name: str) -> None:
    """Every weight that a graph names is in the manifest for that mode, in the right folder; and no other."""
    graph = json.loads((WORKFLOWS / f"{name}.json").read_text())
    loaded = {(FOLDERS[node, key], file) for node, key, file in weights_of(graph)}
    assert {(weight.folder, weight.file) for weight in manifest().select(family, [mode])} == loaded


def test_every_graph_serves_a_mode() -> None:
    """No workflow file is left out of the manifest."""
    assert {path.stem for path in WORKFLOWS.glob("*.json")} == {name for *_, name in GRAPHS}


def test_numbers_are_whole() -> None:
    """Checksums are SHA-256 in lower case, sizes are bytes, and the path ends in the file's name."""
    for weight in manifest().weights:
        assert weight.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", weight.sha256)
        assert weight.size is None or weight.size > 10**8
        assert weight.path.rpartition("/")[2] == weight.file
        assert weight.license


def test_a_node_of_the_wrapper_leads_to_its_pack() -> None:
    """A node class is traced to the repository that brings it; a core node to none."""
    pack = manifest().pack_of("WanVideoSampler")
    assert pack is not None
    assert pack.name == "ComfyUI-WanVideoWrapper"
    assert manifest().pack_of("KSampler") is None


def test_wrong_choices_are_refused() -> None:
    """A family or mode that there is not is named with those that there are."""
    with pytest.raises(InvalidRequest, match="family: 'kijai' is none; there are native, wrapper"):
        manifest().select("kijai")
    with pytest.raises(InvalidRequest, match="mode: 'audio' is none; there are image_single"):
        manifest().select("native", ["audio"])


@pytest.mark.parametrize(
    "text", ["", "modes: [a]", "modes: [a]\nweights: [{file: x, needed_by: {n: [b]}}]", "\t"]
)
def test_a_broken_manifest_is_an_error(text: str) -> None:
    """What is no manifest is a ConfigurationError."""
    with pytest.raises(ConfigurationError, match=r"models\.yaml can't be read"):
        parse(text)


def weight(file: str, folder: str = "vae", content: bytes | None = None) -> Weight:
    size = None if content is None else len(content)
    sha256 = None if content is None else hashlib.sha256(content).hexdigest()
    return Weight(file, "", folder, "a/b", file, "", {"native": ("m",)}, size, sha256)


def test_verify_tells_what_is_wrong(tmp_path: Path) -> None:
    """Missing, unfinished, wrong size, wrong content and fine are told apart; content only if asked."""
    (tmp_path / "vae").mkdir()
    weights = [weight(name, content=b"right") for name in ("fine", "short", "other", "begun", "gone")]
    for name, content in (
        ("fine", b"right"),
        ("short", b"r"),
        ("other", b"wrong"),
        ("begun.abc.part", b"ri"),
    ):
        (tmp_path / "vae" / name).write_bytes(content)
    read: list[int] = []
    found = verify(weights, tmp_path, checksums=True, on_bytes=lambda _, done, total: read.append(done))
    states = [State.PRESENT, State.WRONG_SIZE, State.WRONG_CHECKSUM, State.UNFINISHED, State.MISSING]
    assert [file.state for file in found] == states
    assert [file.bytes_left for file in found] == [0, 5, 5, 3, 5]
    assert read == [5, 5]
    quick = verify(weights, tmp_path, checksums=False)
    assert [file.fine for file in quick] == [True, False, True, False, False]


def test_older_folders_count(tmp_path: Path) -> None:
    """A model in ``unet`` is found, as ComfyUI finds it."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "net").touch()
    (found,) = verify([weight("net", "diffusion_models")], tmp_path, checksums=True)
    assert (found.fine, found.path) == (True, tmp_path / "unet" / "net")


def test_a_file_in_another_folder_is_pointed_out(tmp_path: Path) -> None:
    """A file in a folder of its own is missing, and the hint says where it lies."""
    (tmp_path / "vae" / "wan").mkdir(parents=True)
    (tmp_path / "vae" / "wan" / "net").touch()
    (found,) = verify([weight("net")], tmp_path, checksums=True)
    assert found.state is State.MISSING
    assert "vae/wan/net" in found.hint


def test_the_folder_comes_from_the_settings(tmp_path: Path) -> None:
    """The models' folder is the one named, else the checkout's; without both the error names them."""
    assert models_folder(Settings(comfyui_dir=tmp_path)) == tmp_path / "models"
    assert models_folder(Settings(comfyui_dir=tmp_path, comfyui_models=tmp_path / "w")) == tmp_path / "w"
    with pytest.raises(ConfigurationError, match="INFINITETALK_COMFYUI_DIR"):
        models_folder(Settings())
