"""The command lines that install a ComfyUI, without running them.

ComfyUI is installed by comfy-cli, in an environment of its own: neither ComfyUI nor comfy-cli become part of
this program.  Who runs the lines is ``actors.command_comfyui``.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InvalidRequest
from pipeline.models import Pack

COMFYUI_VERSION = "0.33.0"
"""Has the nodes of every mode of the native family; 0.11 was the first.  What our tests ran on."""
COMFY_CLI_VERSION = "1.23.0"
CUDA_VERSIONS = ("12.8", "12.9", "13.0")
"""Builds of torch that comfy-cli knows and that are new enough."""

# comfy-cli would install ComfyUI's packages into an active environment, which may be ours; without one it
# makes .venv in the checkout, where the engine looks for it.
CLEAN = ("env", "-u", "VIRTUAL_ENV", "-u", "CONDA_PREFIX", "DO_NOT_TRACK=1")


@dataclass(frozen=True, slots=True)
class Step:
    """One command line."""

    why: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What shall be installed where."""

    folder: Path
    version: str = COMFYUI_VERSION
    cuda: str | None = CUDA_VERSIONS[0]
    """None: torch for the CPU."""
    url: str | None = None
    """A mirror of ComfyUI's repository."""
    packs: tuple[Pack, ...] = ()


def steps(wanted: Wanted, *, uvx: str | None, cache: Path) -> tuple[Step, ...]:
    """The lines to run one after the other.

    ``uvx``: its path where there is one; it brings comfy-cli for the moment.  Else comfy-cli gets a venv
    below ``cache``.  A ComfyUI that is there already only gets the packs that it lacks.
    Raises ``InvalidRequest`` where something is in the way.
    """
    if (wanted.folder / "main.py").exists():
        missing = [pack for pack in wanted.packs if not _place(wanted, pack).exists()]
        if not missing:
            raise InvalidRequest(
                "DIR", f"{wanted.folder} has a ComfyUI already; give another folder, or use that one"
            )
        return tuple(step for pack in missing for step in _pack_steps(wanted, pack))
    found: list[Step] = []
    if wanted.folder.exists():
        if not wanted.folder.is_dir() or any(wanted.folder.iterdir()):
            raise InvalidRequest("DIR", f"{wanted.folder} is no empty folder")
        found.append(Step("comfy-cli makes the folder itself", ("rmdir", str(wanted.folder))))
    package = f"comfy-cli=={COMFY_CLI_VERSION}"
    if uvx is not None:
        comfy: tuple[str, ...] = (uvx, "--python", sys.executable, "--from", package, "comfy")
    else:
        venv = cache / f"comfy-cli-{COMFY_CLI_VERSION}"
        comfy = (str(venv / "bin" / "comfy"),)
        if not os.access(comfy[0], os.X_OK):
            python = str(venv / "bin" / "python")
            found.append(Step("an environment for comfy-cli", (sys.executable, "-m", "venv", str(venv))))
            install = (python, "-m", "pip", "install", "--quiet", package)
            found.append(Step("comfy-cli", install))
    torch = ("--cpu",) if wanted.cuda is None else ("--nvidia", "--cuda-version", wanted.cuda)
    source = ("--url", wanted.url) if wanted.url else ()
    where = ("--skip-prompt", "--workspace", str(wanted.folder))
    install = ("install", "--version", wanted.version, "--skip-manager", *torch, *source)
    found.append(
        Step(f"ComfyUI {wanted.version}, its packages and torch", (*CLEAN, *comfy, *where, *install))
    )
    return (*found, *(step for pack in wanted.packs for step in _pack_steps(wanted, pack)))


def _place(wanted: Wanted, pack: Pack) -> Path:
    return wanted.folder / "custom_nodes" / pack.name


def _pack_steps(wanted: Wanted, pack: Pack) -> tuple[Step, ...]:
    """A pack of nodes into a checkout, as the graphs were written for, and what it needs into its venv."""
    place = str(_place(wanted, pack))
    venv = next((name for name in ("venv", ".venv") if (wanted.folder / name).exists()), ".venv")
    python = str(wanted.folder / venv / "bin" / "python")
    needs = (python, "-m", "pip", "install", "-r", f"{place}/requirements.txt", "torchaudio")
    return (
        Step(f"nodes: {pack.name}", ("git", "clone", pack.url, place)),
        Step(
            f"{pack.name} as the graphs were written for",
            ("git", "-C", place, "checkout", "--detach", pack.commit),
        ),
        Step(f"packages of {pack.name}", needs),
    )
