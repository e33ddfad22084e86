"""``infinitetalk comfyui install``: shows the command lines that install a ComfyUI, and with --yes runs them.

The lines themselves are in ``pipeline.comfyui_install``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from pipeline.comfyui_install import COMFYUI_VERSION, CUDA_VERSIONS, Step, Wanted, steps
from pipeline.errors import ConfigurationError, JobCancelled
from pipeline.models import manifest


def add_command(commands: Any) -> None:
    """Declare the command to argparse."""
    command = commands.add_parser("comfyui", help="install ComfyUI", description="Install ComfyUI.")
    actions = command.add_subparsers(required=True, metavar="ACTION")
    about = "Install ComfyUI with comfy-cli. Shows what would be run; --yes runs it."
    install = actions.add_parser("install", help="install ComfyUI with comfy-cli", description=about)
    install.set_defaults(run=run)
    install.add_argument("folder", type=Path, metavar="DIR", help="a new folder for it")
    install.add_argument("--yes", action="store_true", help="run the commands instead of only showing them")
    install.add_argument("--version", default=COMFYUI_VERSION, help="of ComfyUI (default: %(default)s)")
    build = install.add_mutually_exclusive_group()
    build.add_argument(
        "--cuda",
        choices=CUDA_VERSIONS,
        default=CUDA_VERSIONS[0],
        help="build of torch (default: %(default)s)",
    )
    build.add_argument("--cpu", action="store_true", help="torch without CUDA")
    install.add_argument("--family", choices=manifest().families, default="native", help="of workflows")
    install.add_argument("--url", help="a mirror of ComfyUI's git repository")


def run(options: argparse.Namespace) -> int:
    """Show the lines, and run them if asked to.

    Raises ``InvalidRequest`` (the folder), ``ConfigurationError`` (no git, a line failed).
    """
    folder = options.folder.expanduser().absolute()
    wanted = Wanted(
        folder=folder,
        version=options.version,
        cuda=None if options.cpu else options.cuda,
        url=options.url,
        packs=tuple(pack for pack in manifest().packs if options.family in pack.families),
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infinitetalk"
    todo = steps(wanted, uvx=shutil.which("uvx"), cache=cache)
    for step in todo:
        print(f"# {step.why}\n{shlex.join(step.command)}", flush=True)
        if options.yes:
            _run(step)
    chosen = "" if options.family == "native" else f" --family {options.family}"
    done = "done" if options.yes else "nothing was run; --yes runs these lines"
    print(
        f"\n{done}.  Then:\nexport INFINITETALK_COMFYUI_DIR={shlex.quote(str(folder))}\n"
        f"infinitetalk models download{chosen}\ninfinitetalk doctor{chosen}"
    )
    return 0


def _run(step: Step) -> None:
    if shutil.which("git") is None:
        raise ConfigurationError("git is needed to install ComfyUI: apt-get install git")
    try:
        code = subprocess.run(step.command, check=False).returncode
    except OSError as error:
        raise ConfigurationError(f"{step.command[0]} can't be started: {error.strerror}") from None
    except KeyboardInterrupt:
        raise JobCancelled("of this installation") from None
    if code:
        raise ConfigurationError(f"{step.why}: that command ended with exit code {code}; its output says why")
