"""``infinitetalk models list|download|verify``: the weights, what it prints of them, and the exit codes.

What the weights are is in ``pipeline.models``, how they are fetched in ``pipeline.model_download``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn
from rich.text import Text

from pipeline.errors import ConfigurationError, JobCancelled
from pipeline.models import Found, Manifest, OnBytes, State, Weight, in_gb, manifest, models_folder, verify
from pipeline.settings import Settings

EXIT_INCOMPLETE = 3
COLOURS = {True: "green", False: "red"}


def add_command(commands: Any) -> None:
    """Declare the command to argparse."""
    about = "Show, fetch and check the weights that the modes need."
    command = commands.add_parser("models", help="show, fetch and check the weights", description=about)
    actions = command.add_subparsers(required=True, metavar="ACTION")
    _action(actions, "list", _list, "which weights there are, and which are here")
    download = _action(actions, "download", _download, "fetch the weights that are not here yet")
    download.add_argument(
        "--any-version", action="store_true", help="take a file although the hub's is not the one listed"
    )
    check = _action(actions, "verify", _verify, "compare the weights with their sizes and checksums")
    check.add_argument("--quick", action="store_true", help="sizes only; checksums read every byte")


def _action(
    actions: Any, name: str, run: Callable[[argparse.Namespace], int], about: str
) -> argparse.ArgumentParser:
    known = manifest()
    action: argparse.ArgumentParser = actions.add_parser(name, help=about, description=about)
    action.set_defaults(run=run)
    action.add_argument(
        "--mode", action="append", choices=known.modes, default=[], help="only for this mode; may be repeated"
    )
    action.add_argument("--family", choices=known.families, default="native", help="of workflows")
    action.add_argument("--folder", type=Path, help="ComfyUI's models folder (default: from the settings)")
    action.add_argument("--json", action="store_true", help="print one JSON object")
    return action


def _folder(options: argparse.Namespace) -> Path:
    given: Path | None = options.folder
    return given.expanduser().resolve() if given else models_folder(Settings.from_env())


def _list(options: argparse.Namespace) -> int:
    weights = manifest().select(options.family, options.mode)
    try:
        folder = _folder(options)
    except ConfigurationError:
        folder = None
    found = verify(weights, folder, checksums=False) if folder else None
    if options.json:
        print(json.dumps({"folder": str(folder) if folder else None, "weights": _as_objects(weights, found)}))
    else:
        show_list(Console(), options.family, weights, found, folder)
    return 0


def _verify(options: argparse.Namespace) -> int:
    known, folder = manifest(), _folder(options)
    weights = known.select(options.family, options.mode)
    with _bars(options.json) as bars:
        found = verify(weights, folder, checksums=not options.quick, on_bytes=bars("checking "))
    ready = modes_ready(known, options.family, options.mode, found)
    if options.json:
        listed = _as_objects(weights, found)
        print(
            json.dumps(
                {"success": all(ready.values()), "folder": str(folder), "modes": ready, "weights": listed}
            )
        )
    else:
        show_verdict(Console(), options.family, found, ready, folder, checksums=not options.quick)
    return 0 if all(ready.values()) else EXIT_INCOMPLETE


def _download(options: argparse.Namespace) -> int:
    from pipeline import model_download as hub  # half a second to import, for this action only

    folder = _folder(options)
    weights = manifest().select(options.family, options.mode)
    found = verify(weights, folder, checksums=False)
    wanted = [file.weight for file in found if not file.fine]
    say = Console(stderr=True, quiet=options.json).print
    for file in found:
        if file.fine:
            say(f"{file.weight.place} is here", highlight=False)
        elif file.state is State.WRONG_SIZE and not options.any_version:
            say(f"{file.path} will be replaced: {file.hint}", highlight=False, soft_wrap=True)
    try:
        remotes = [hub.look_up(weight, any_version=options.any_version) for weight in wanted]
        remotes = [remote for remote in remotes if not _same_size(remote.weight, remote.size, found)]
        hub.check_space(remotes, folder)
        if remotes:
            left = in_gb(hub.bytes_left(remotes, folder))
            say(f"{len(remotes)} files, {left}, from {hub.endpoint()} to {folder}", highlight=False)
        with _bars(options.json) as bars:
            paths = [hub.fetch(remote, folder, bars(""), bars("checking ")) for remote in remotes]
    except KeyboardInterrupt:
        say("the same command goes on from here", highlight=False)
        raise JobCancelled("of this download") from None
    if options.json:
        print(
            json.dumps({"success": True, "folder": str(folder), "downloaded": [str(path) for path in paths]})
        )
    else:
        print(f"{len(found)} of {len(found)} weights are in {folder}")
    return 0


def _same_size(weight: Weight, size: int, found: Sequence[Found]) -> bool:
    """Whether a file of another version (--any-version) is here already."""
    return any(file.weight == weight and file.path.is_file() and file.bytes_there == size for file in found)


def modes_ready(
    known: Manifest, family: str, modes: Sequence[str], found: Sequence[Found]
) -> dict[str, bool]:
    """For each mode whether all its weights are fine."""
    return {
        mode: all(file.fine for file in found if mode in file.weight.needed_by.get(family, ()))
        for mode in modes or known.modes
    }


def show_list(
    console: Console,
    family: str,
    weights: Sequence[Weight],
    found: Sequence[Found] | None,
    folder: Path | None,
) -> None:
    """What ``models list`` says: two lines for each weight."""
    console.print(f"Weights of the {family} family" + (f" in {folder}" if folder else ""), soft_wrap=True)
    for place, weight in enumerate(weights):
        line = Text(f"{in_gb(weight.size):>8}  {weight.place}")
        if found:
            state = found[place].state.value
            line.append(f"  {state}", COLOURS[found[place].fine])
        console.print(line, soft_wrap=True)
        modes = weight.needed_by[family]
        which = "all modes" if len(modes) == len(manifest().modes) else ", ".join(modes)
        about = f"{weight.about}; {which}; {weight.repository}; {weight.license}"
        console.print(Text(f"{'':10}{about}", "dim"), soft_wrap=True)
    known = sum(weight.size or 0 for weight in weights)
    unknown = sum(weight.size is None for weight in weights)
    more = f" and {unknown} of unknown size" if unknown else ""
    console.print(f"{len(weights)} files, {in_gb(known)}{more}", highlight=False)
    if folder is None:
        console.print("set INFINITETALK_COMFYUI_DIR to see which of them are here", highlight=False)


def show_verdict(
    console: Console,
    family: str,
    found: Sequence[Found],
    ready: dict[str, bool],
    folder: Path,
    *,
    checksums: bool,
) -> None:
    """What ``models verify`` says: a line for each weight and for each mode."""
    console.print(f"{folder}", highlight=False, soft_wrap=True)
    for file in found:
        state = file.state.value
        if file.fine and checksums:
            state = (
                "checksum right" if file.weight.sha256 else "size right" if file.weight.size else "present"
            )
        line = Text(f"{state:>14}  ", COLOURS[file.fine]).append(file.weight.place, "default")
        console.print(line.append(f"  ({file.hint})" if file.hint else "", "yellow"), soft_wrap=True)
    for mode, fine in ready.items():
        lacking = [file for file in found if not file.fine and mode in file.weight.needed_by[family]]
        left = in_gb(sum(file.bytes_left for file in lacking))
        names = "" if len(lacking) == len(found) or len(lacking) > 3 else ": "
        names += ", ".join(file.weight.file for file in lacking) if names else ""
        count = f"{len(lacking)} file{'s' * (len(lacking) > 1)}"
        said = "ready" if fine else f"lacks {count}, {left} to fetch{names}"
        console.print(Text(f"mode {mode:<13} ").append(said, COLOURS[fine]), soft_wrap=True)
    if not all(ready.values()):
        modes = "".join(f" --mode {mode}" for mode, fine in ready.items() if not fine)
        chosen = "" if family == "native" else f" --family {family}"
        if not any(ready.values()) and len(ready) > 1:
            modes = ""
        command = f"infinitetalk models download{chosen}{modes}"
        console.print(f"to fetch them: {command}", highlight=False, soft_wrap=True)


def _as_objects(weights: Sequence[Weight], found: Sequence[Found] | None) -> list[dict[str, Any]]:
    objects = []
    for place, weight in enumerate(weights):
        item: dict[str, Any] = {
            "file": weight.file,
            "folder": weight.folder,
            "repository": weight.repository,
            "path": weight.path,
            "size": weight.size,
            "sha256": weight.sha256,
            "license": weight.license,
            "needed_by": {family: list(modes) for family, modes in weight.needed_by.items()},
        }
        if found is not None:
            item |= {
                "state": found[place].state.value,
                "at": str(found[place].path),
                "hint": found[place].hint,
            }
        objects.append(item)
    return objects


@contextmanager
def _bars(quiet: bool) -> Iterator[Callable[[str], OnBytes]]:
    """One bar for each file in work, on standard error; yields what makes the function that moves them."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        SpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        tasks: dict[str, Any] = {}

        def bars(doing: str) -> OnBytes:
            def on_bytes(weight: Weight, done: int, total: int) -> None:
                name = f"{doing}{weight.place}"
                if name not in tasks:
                    tasks[name] = progress.add_task(f"{doing}{weight.file}", total=total, completed=done)
                    progress.reset(tasks[name], completed=done)  # speed counts from here
                progress.update(tasks[name], completed=done, visible=not (doing and done == total))

            return on_bytes

        yield bars
