"""The weights: which files each mode of a workflow family needs, and which of them lie in a models' folder.

The list itself is ``workflows/models.yaml``.  Files are only read here; fetching them is ``model_download``'s
business, and what a running ComfyUI says of them ``mode_check``'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigurationError, InvalidRequest, StorageError
from pipeline.settings import Settings

OLD_FOLDERS = {"diffusion_models": ("unet",), "text_encoders": ("clip",)}
"""Folders of older ComfyUIs, where a newer one still looks."""

PART_SUFFIX = ".part"
"""An unfinished download is ``FILE.<beginning of its ETag>.part``; ComfyUI lists no file of that suffix."""

READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Weight:
    """One file of the manifest."""

    file: str
    about: str
    folder: str
    """Below the models' folder."""
    repository: str
    path: str
    """In the repository."""
    license: str
    needed_by: Mapping[str, tuple[str, ...]]
    """Workflow family -> modes."""
    size: int | None = None
    """In bytes; None where it is not known for sure."""
    sha256: str | None = None

    @property
    def place(self) -> str:
        """Folder and file, as people write it."""
        return f"{self.folder}/{self.file}"


@dataclass(frozen=True, slots=True)
class Pack:
    """A repository of custom nodes that a workflow family needs."""

    name: str
    url: str
    classes: tuple[str, ...]
    """How the names of its node classes begin."""
    families: tuple[str, ...]
    commit: str
    """What is installed; the one that the graphs were written from."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """``workflows/models.yaml``, checked."""

    modes: tuple[str, ...]
    graphs: Mapping[str, Mapping[str, tuple[str, ...]]]
    """Family -> mode -> names of workflow files, the preferred one first."""
    weights: tuple[Weight, ...]
    packs: tuple[Pack, ...]

    @property
    def families(self) -> tuple[str, ...]:
        """The workflow families, in the order of the file."""
        return tuple(self.graphs)

    def select(self, family: str = "native", modes: Iterable[str] = ()) -> tuple[Weight, ...]:
        """The weights of a family for some modes, or for all of them.

        Raises ``InvalidRequest`` for a family or a mode that there is not.
        """
        if family not in self.families:
            raise InvalidRequest("family", f"{family!r} is none; there are {', '.join(self.families)}")
        wanted = tuple(modes) or self.modes
        if unknown := [mode for mode in wanted if mode not in self.modes]:
            raise InvalidRequest("mode", f"{unknown[0]!r} is none; there are {', '.join(self.modes)}")
        return tuple(weight for weight in self.weights if set(weight.needed_by.get(family, ())) & set(wanted))

    def pack_of(self, node: str) -> Pack | None:
        """The pack that brings the node class ``node``."""
        return next((pack for pack in self.packs if node.startswith(pack.classes)), None)


def packs_of(graph: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the packs of custom nodes that a graph in API format needs."""
    packs = (manifest().pack_of(str(node["class_type"])) for node in graph.values())
    return tuple(sorted({pack.name for pack in packs if pack is not None}))


@cache
def manifest() -> Manifest:
    """The manifest that comes with the program."""
    return parse((resources.files("workflows") / "models.yaml").read_text(encoding="utf-8"))


def parse(text: str) -> Manifest:
    """Read a manifest; raises ``ConfigurationError`` where it is none."""
    try:
        data: dict[str, Any] = yaml.safe_load(text)
        modes = tuple(data["modes"])
        graphs = {
            family: {mode: tuple(names) for mode, names in by_mode.items()}
            for family, by_mode in data["graphs"].items()
        }
        weights = tuple(_weight(entry, modes) for entry in data["weights"])
        packs = tuple(
            Pack(
                entry["name"],
                entry["url"],
                tuple(entry["classes"]),
                tuple(entry["families"]),
                entry["commit"],
            )
            for entry in data["packs"]
        )
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"models.yaml can't be read: {error}") from None
    return Manifest(modes, graphs, weights, packs)


def _weight(entry: dict[str, Any], all_modes: tuple[str, ...]) -> Weight:
    needed_by = {
        family: all_modes if modes == "all" else tuple(modes)
        for family, modes in entry.pop("needed_by").items()
    }
    if unknown := {mode for modes in needed_by.values() for mode in modes} - set(all_modes):
        raise ValueError(f"{entry['file']} is needed by {', '.join(unknown)}, which is no mode")
    return Weight(**entry, needed_by=needed_by)


def models_folder(settings: Settings) -> Path:
    """The folder of the weights that the settings name; raises ``ConfigurationError`` if they name none."""
    if settings.comfyui_models is not None:
        return settings.comfyui_models.expanduser().resolve()
    if settings.comfyui_dir is not None:
        return settings.comfyui_dir.expanduser().resolve() / "models"
    raise ConfigurationError(
        "where are the weights? Set INFINITETALK_COMFYUI_DIR (the folder of ComfyUI) or "
        "INFINITETALK_COMFYUI_MODELS, or give --folder"
    )


class State(Enum):
    """What there is of a weight."""

    PRESENT = "present"
    MISSING = "missing"
    UNFINISHED = "unfinished"
    """A download was begun."""
    WRONG_SIZE = "wrong size"
    WRONG_CHECKSUM = "wrong checksum"


@dataclass(frozen=True, slots=True)
class Found:
    """A weight as it lies in a folder."""

    weight: Weight
    state: State
    path: Path
    """Where it is, or should be."""
    bytes_there: int = 0
    hint: str = ""

    @property
    def fine(self) -> bool:
        """Whether a graph can load it."""
        return self.state is State.PRESENT

    @property
    def bytes_left(self) -> int:
        """Bytes that a download still has to bring; 0 where the size is not known."""
        if self.fine or self.weight.size is None:
            return 0
        return self.weight.size - (self.bytes_there if self.state is State.UNFINISHED else 0)


OnBytes = Callable[[Weight, int, int], None]
"""Called with a weight, the bytes done and all bytes."""


def verify(
    weights: Iterable[Weight], folder: Path, *, checksums: bool, on_bytes: OnBytes | None = None
) -> tuple[Found, ...]:
    """Look for each weight below ``folder`` and compare sizes; with ``checksums`` also the content.

    Raises ``StorageError`` for a file that can't be read.
    """
    return tuple(_look(weight, folder, checksums, on_bytes) for weight in weights)


def _look(weight: Weight, folder: Path, checksums: bool, on_bytes: OnBytes | None) -> Found:
    target = folder / weight.folder / weight.file
    places = [target, *(folder / old / weight.file for old in OLD_FOLDERS.get(weight.folder, ()))]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return _missing(weight, folder, target)
    size = path.stat().st_size
    if weight.size not in (None, size):
        return Found(weight, State.WRONG_SIZE, path, size, f"{size} bytes, should be {weight.size}")
    if checksums and weight.sha256 is not None:
        digest = sha256_of(path, lambda done: on_bytes(weight, done, size) if on_bytes else None)
        if digest != weight.sha256:
            return Found(weight, State.WRONG_CHECKSUM, path, size, f"sha256 {digest}")
    return Found(weight, State.PRESENT, path, size)


def _missing(weight: Weight, folder: Path, target: Path) -> Found:
    parts = [part.stat().st_size for part in target.parent.glob(f"{weight.file}.*{PART_SUFFIX}")]
    if parts:
        return Found(weight, State.UNFINISHED, target, max(parts), f"{max(parts)} bytes of it are there")
    elsewhere = next((path for path in folder.rglob(weight.file) if path.is_file()), None)
    hint = f"there is one at {elsewhere}, where the graphs don't look" if elsewhere else ""
    return Found(weight, State.MISSING, target, 0, hint)


def sha256_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Checksum of a file in hexadecimal; ``on_bytes`` is told how many bytes are read.

    Raises ``StorageError`` where it can't be read.
    """
    digest = hashlib.sha256()
    done = 0
    try:
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
                done += len(block)
                if on_bytes is not None:
                    on_bytes(done)
    except OSError as error:
        raise StorageError(str(path), f"can't be read back: {error.strerror}") from None
    return digest.hexdigest()


def in_gb(size: int | None) -> str:
    """Bytes for people, in units of 1000 as the hub shows them.

    >>> in_gb(16643349018), in_gb(190115368), in_gb(None)
    ('16.6 GB', '190 MB', '?')
    """
    if size is None:
        return "?"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
