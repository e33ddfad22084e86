"""``infinitetalk comfyui install`` shows its lines, and runs exactly those."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from actors import cli
from pipeline.comfyui_install import COMFYUI_VERSION, Wanted, steps
from pipeline.errors import InvalidRequest
from pipeline.models import manifest

UVX = """#!/bin/sh
echo "$@" >> {log}
echo "VIRTUAL_ENV=$VIRTUAL_ENV CONDA_PREFIX=$CONDA_PREFIX DO_NOT_TRACK=$DO_NOT_TRACK" >> {log}
exit {code}
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on PATH, for the test's own uvx; an environment is active, as for most users."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("VIRTUAL_ENV", "/somewhere")
    monkeypatch.setenv("CONDA_PREFIX", "/elsewhere")
    return folder


def write_uvx(folder: Path, code: int = 0) -> Path:
    log = folder / "log"
    (folder / "uvx").write_text(UVX.format(log=log, code=code))
    (folder / "uvx").chmod(0o755)
    return log


def test_nothing_runs_without_yes(programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines and what comes after them are shown; nothing is made."""
    log = write_uvx(programs)
    assert cli.main(["comfyui", "install", str(tmp_path / "comfy")]) == 0
    said = capsys.readouterr().out
    assert f"install --version {COMFYUI_VERSION} --skip-manager --nvidia --cuda-version 12.8" in said
    assert "nothing was run" in said
    assert f"export INFINITETALK_COMFYUI_DIR={tmp_path / 'comfy'}" in said
    assert not log.exists()
    assert not (tmp_path / "comfy").exists()


def test_yes_runs_the_lines_shown(programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """comfy-cli gets the arguments shown, no environment of ours to install into, and no leave to track."""
    log = write_uvx(programs)
    folder = tmp_path / "my comfy"
    assert cli.main(["comfyui", "install", str(folder), "--yes", "--cpu"]) == 0
    shown = next(line for line in capsys.readouterr().out.splitlines() if "uvx" in line)
    arguments, environment = log.read_text().splitlines()
    assert shlex.split(shown)[-len(arguments.split()) + 1 :][-3:] == ["0.33.0", "--skip-manager", "--cpu"]
    assert arguments.endswith(
        f"comfy --skip-prompt --workspace {folder} install --version 0.33.0 --skip-manager --cpu"
    )
    assert environment == "VIRTUAL_ENV= CONDA_PREFIX= DO_NOT_TRACK=1"


def test_a_failing_line_ends_it(programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the step; later ones are not run."""
    log = write_uvx(programs, code=7)
    arguments = ["comfyui", "install", str(tmp_path / "comfy"), "--yes", "--family", "wrapper"]
    assert cli.main(arguments) == 3
    said = capsys.readouterr()
    assert "ended with exit code 7" in said.err
    assert "git clone" not in said.out
    assert len(log.read_text().splitlines()) == 2


def test_an_existing_comfyui_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with a ComfyUI, or with anything, is refused before anything runs."""
    (tmp_path / "main.py").touch()
    assert cli.main(["comfyui", "install", str(tmp_path), "--yes"]) == 2
    assert "has a ComfyUI already" in capsys.readouterr().err
    (tmp_path / "main.py").rename(tmp_path / "other")
    for place in (tmp_path, tmp_path / "other"):
        with pytest.raises(InvalidRequest, match="no empty folder"):
            steps(Wanted(place), uvx=None, cache=tmp_path)


def test_an_empty_folder_is_made_anew(programs: Path, tmp_path: Path) -> None:
    """comfy-cli clones into no folder that is there already."""
    log, folder = write_uvx(programs), tmp_path / "comfy"
    folder.mkdir()
    assert cli.main(["comfyui", "install", str(folder)]) == 0
    assert folder.exists()
    assert cli.main(["comfyui", "install", str(folder), "--yes"]) == 0
    assert not folder.exists()
    assert log.exists()


def test_without_uvx_comfy_cli_gets_a_venv_once(tmp_path: Path) -> None:
    """Two lines make a pinned comfy-cli; where it is there they are left out."""
    cache, wanted = tmp_path / "cache", Wanted(tmp_path / "comfy", url="https://mirror/ComfyUI")
    first = steps(wanted, uvx=None, cache=cache)
    assert [step.command[1:3] for step in first[:2]] == [("-m", "venv"), ("-m", "pip")]
    assert first[1].command[-1] == "comfy-cli==1.23.0"
    program = Path(next(word for word in first[-1].command if word.endswith("/bin/comfy")))
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    again = steps(wanted, uvx=None, cache=cache)
    assert again == first[2:]
    assert again[0].command[-2:] == ("--url", "https://mirror/ComfyUI")


def test_the_wrapper_family_adds_its_nodes(tmp_path: Path) -> None:
    """Its pack is cloned into the checkout and its packages go into the checkout's environment."""
    folder = tmp_path / "comfy"
    made = steps(Wanted(folder, packs=manifest().packs), uvx="uvx", cache=tmp_path)
    assert [step.command[0] for step in made] == [
        "env",
        "git",
        "git",
        str(folder / ".venv" / "bin" / "python"),
    ]
    assert made[1].command[-1] == str(folder / "custom_nodes" / "ComfyUI-WanVideoWrapper")
    assert made[2].command[-1] == manifest().packs[0].commit


def test_an_existing_comfyui_gets_the_nodes_it_lacks(tmp_path: Path) -> None:
    """Only the pack's lines, with the environment that is there; once it is there, nothing is left to do."""
    (tmp_path / "main.py").touch()
    (tmp_path / "venv").mkdir()
    wanted = Wanted(tmp_path, packs=manifest().packs)
    made = steps(wanted, uvx="uvx", cache=tmp_path)
    assert [step.command[0] for step in made] == ["git", "git", str(tmp_path / "venv" / "bin" / "python")]
    (tmp_path / "custom_nodes" / wanted.packs[0].name).mkdir(parents=True)
    with pytest.raises(InvalidRequest, match="already"):
        steps(wanted, uvx="uvx", cache=tmp_path)
