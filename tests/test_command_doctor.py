"""``infinitetalk doctor``, run as a user runs it; the running ComfyUI is a draft engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors import cli
from tests.draft_process import draft_engine

NAMES = [
    "GPU driver",
    "torch of infinitetalk",
    "memory",
    "disk",
    "shared memory",
    "ffmpeg",
    "ports",
    "Ray",
    "ComfyUI",
]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An nvidia-smi that finds nothing, so that the tests say the same on machines with GPUs."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setenv("COLUMNS", "200")


def test_a_machine_for_drafts_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    """Without GPU and ComfyUI the lines warn and say what to do, and the exit code is 0."""
    assert cli.main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["success"]
    checks = {check["name"]: check for check in answer["checks"]}
    assert list(checks) == NAMES
    assert checks["GPU driver"]["level"] == "warn"
    assert "No devices were found" in checks["GPU driver"]["said"]
    assert "comfyui install" in checks["ComfyUI"]["remedy"]


def test_a_vocal_separator_must_be_there_where_one_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its program's place is a line; where there is none, that fails and names the setting."""

    def line(program: str) -> dict[str, str]:
        monkeypatch.setenv("INFINITETALK_VOCAL_SEPARATOR", f"{program} {{input}} {{folder}}")
        code = cli.main(["doctor", "--json"])
        checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
        found: dict[str, str] = checks["vocal separator"]
        assert code == (3 if found["level"] == "fail" else 0)
        return found

    there = tmp_path / "bin" / "separate"
    there.touch(0o755)
    assert (line("separate")["level"], line("separate")["said"]) == ("pass", str(there))
    gone = line("seperate")
    assert (gone["level"], gone["said"]) == ("fail", "there is no program seperate")
    assert "INFINITETALK_VOCAL_SEPARATOR" in gone["remedy"]


def test_a_running_engine_is_asked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --url its version and every mode are lines; a wanted mode that it lacks nodes for fails with 3."""
    monkeypatch.setenv("INFINITETALK_COMFYUI_ARGS", "--cpu")
    with draft_engine(tmp_path / "engine") as engine:
        code = cli.main(["doctor", "--url", engine.url, "--json"])
        native = json.loads(capsys.readouterr().out)["checks"]
        assert cli.main(["doctor", "--url", engine.url, "--mode", "image_multi"]) == 3
        said = capsys.readouterr().out
        assert cli.main(["doctor", "--url", engine.url, "--family", "wrapper", "--mode", "image_single"]) == 0
        assert "mode image_single (wrapper)" in capsys.readouterr().out
    modes = [check for check in native if check["name"].startswith("mode ")]
    assert [check["name"] for check in modes] == [
        "mode image_single",
        "mode image_multi",
        "mode video_single",
        "mode video_multi",
    ]
    assert modes[0]["level"] in ("pass", "warn"), modes[0]  # whether the engine has our nodes or not
    assert code == int(any(check["level"] == "fail" for check in native)) * 3
    assert "node InfiniteTalkSpeech" in said
    assert said.rstrip().endswith("1 fail")


def test_an_engine_that_is_not_there_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """A dead URL is a failed line, not a traceback."""
    assert cli.main(["doctor", "--url", "http://127.0.0.1:9", "--json"]) == 3
    last = json.loads(capsys.readouterr().out)["checks"][-1]
    assert (last["name"], last["level"]) == ("ComfyUI", "fail")
    assert "is gone" in last["said"]


def test_a_configured_comfyui_that_is_none_fails(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder without ComfyUI is a failed line that names the setting."""
    monkeypatch.setenv("INFINITETALK_COMFYUI_DIR", str(tmp_path))
    assert cli.main(["doctor", "--json"]) == 3
    last = json.loads(capsys.readouterr().out)["checks"][-1]
    assert last["level"] == "fail"
    assert "INFINITETALK_COMFYUI_DIR" in last["said"]


def test_wrong_settings_are_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typo in a setting's name is said by the doctor too."""
    monkeypatch.setenv("INFINITETALK_PROTS", "1-2")
    assert cli.main(["doctor", "--json"]) == 3
    assert "INFINITETALK_PROTS is not a setting" in json.loads(capsys.readouterr().out)["message"]
