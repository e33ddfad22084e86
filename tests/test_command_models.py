"""``infinitetalk models``, run as a user runs it, against a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors import cli
from pipeline.models import manifest
from tests.hub_server import TOKEN, Hub, running_hub

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Every file of the manifest, with other content than the real ones."""
    with running_hub() as hub:
        for weight in manifest().weights:
            hub.files[f"{weight.repository}/{weight.path}"] = f"not the real {weight.file}".encode()
        yield hub


@pytest.fixture
def infinitetalk(hub: Hub, tmp_path: Path) -> Run:
    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        env = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "INFINITETALK_"))
        }
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "COLUMNS": "200", **more}
        command = [sys.executable, "-m", "infinitetalk", *arguments]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    return run


def test_download_fetches_what_a_mode_needs(infinitetalk: Run, hub: Hub, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_TOKEN are honoured, and each file of the mode lies in its folder."""
    hub.gated.add("Kijai/WanVideo_comfy")
    arguments = ("models", "download", "--mode", "image_single", "--any-version", "--json")
    done = infinitetalk(*arguments, INFINITETALK_COMFYUI_MODELS=str(tmp_path / "models"), HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    weights = manifest().select("native", ["image_single"])
    paths = [str(tmp_path / "models" / weight.folder / weight.file) for weight in weights]
    assert json.loads(done.stdout)["downloaded"] == paths
    assert Path(paths[0]).read_text() == f"not the real {weights[0].file}"


def test_download_says_what_is_wrong_before_it_begins(infinitetalk: Run, hub: Hub, tmp_path: Path) -> None:
    """Of two files one is refused: nothing is fetched, exit code 3, one JSON object with the reason."""
    hub.gated.add("Kijai/WanVideo_comfy")
    folder = tmp_path / "models"
    done = infinitetalk("models", "download", "--any-version", "--json", "--folder", str(folder))
    assert done.returncode == 3
    answer = json.loads(done.stdout)
    assert (answer["success"], answer["error"]) == (False, "ConfigurationError")
    assert "set HF_TOKEN" in answer["message"]
    assert "segments" not in done.stderr
    assert hub.ranges() == []
    assert not folder.exists()


def test_verify_says_what_is_missing_for_which_mode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of the right size make their modes ready; the others are named with the command for them."""
    for weight in manifest().select("native", ["image_single"]):
        path = tmp_path / weight.folder / weight.file
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.truncate(weight.size)  # sparse
    arguments = ["models", "verify", "--quick", "--folder", str(tmp_path)]
    assert cli.main(arguments) == 3
    said = capsys.readouterr().out
    assert "mode image_single  ready" in said
    assert (
        "mode image_multi   lacks 1 file, 5.1 GB to fetch: wan2.1_infiniteTalk_multi_fp16.safetensors" in said
    )
    assert "infinitetalk models download --mode image_multi --mode video_multi" in said
    assert cli.main([*arguments, "--mode", "image_single", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["success"], answer["modes"]) == (True, {"image_single": True})


def test_list_needs_no_settings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a ComfyUI the list shows files, sizes, repositories and licenses; an unknown size is ``?``."""
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["models", "list", "--family", "wrapper"]) == 0
    said = capsys.readouterr().out
    assert " 17.0 GB  diffusion_models/Wan2_1-I2V-14B-480P_fp8_e4m3fn.safetensors" in said
    assert "       ?  diffusion_models/Wan2_1-InfiniteTalk-Multi_fp8_e4m3fn_scaled_KJ.safetensors" in said
    assert "and 1 of unknown size" in said
    assert "INFINITETALK_COMFYUI_DIR" in said
    assert cli.main(["models", "list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["weights"]) == len(manifest().select())


def test_download_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    """Without settings and --folder the error says which of them to give."""
    assert cli.main(["models", "verify"]) == 3
    assert "--folder" in capsys.readouterr().err
