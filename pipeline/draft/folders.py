"""Where the draft engine reads and writes: input, output, temp and models, with ComfyUI's rules for names.

No media and no protocol here.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

KINDS = ("input", "output", "temp")


class OutsideFolder(ValueError):
    """A name leads out of the folder that it is relative to."""


@dataclass(frozen=True, slots=True)
class Folders:
    """The folders of one draft engine below ``base``; ``models`` may lie elsewhere and may be missing."""

    base: Path
    models: Path

    @classmethod
    def prepare(cls, base: Path, models: Path | None) -> Folders:
        """Create the folders and empty ``temp``, as a starting ComfyUI does."""
        base = base.resolve()
        folders = cls(base, (models or base / "models").resolve())
        shutil.rmtree(base / "temp", ignore_errors=True)
        for kind in KINDS:
            (base / kind).mkdir(parents=True, exist_ok=True)
        return folders

    def of(self, kind: str) -> Path | None:
        """Folder of a kind (input, output, temp), or None for another word."""
        return self.base / kind if kind in KINDS else None

    def find(self, name: str) -> Path:
        """Path of an input file as LoadImage names it: relative to input, or with " [output]" at its end.

        Raises:
            OutsideFolder: the name leads out of its folder.
        """
        bare, kind = split_annotation(name)
        folder = self.base / (kind or "input")
        return inside(folder, folder / bare)

    def next_names(self, prefix: str, folder: Path, width: int, height: int) -> tuple[Path, str, int, str]:
        """Folder, stem, first free counter and subfolder for files to be saved as ``stem_00001_.png``.

        The counter goes on after the highest one in use, whatever the suffix.

        Raises:
            OutsideFolder: the prefix leads out of ``folder``.
        """
        prefix = os.path.normpath(expand_variables(prefix, width, height))
        subfolder, stem = os.path.split(prefix)
        target = inside(folder, folder / subfolder)
        target.mkdir(parents=True, exist_ok=True)
        used = [counter_of(entry.name, stem) for entry in os.scandir(target)]
        return target, stem, max(used, default=0) + 1, subfolder

    def model_files(self, kind: str) -> list[str]:
        """Names of the files in one of the models' folders, relative to it, sorted."""
        root = self.models / kind
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def inside(folder: Path, path: Path) -> Path:
    """``path`` resolved, if it lies in ``folder``.

    Raises:
        OutsideFolder: it doesn't.
    """
    try:
        resolved = path.resolve()
    except ValueError as exc:  # an embedded null byte
        raise OutsideFolder(f"Invalid file path: {str(path)!r}") from exc
    if not resolved.is_relative_to(folder.resolve()):
        raise OutsideFolder(f"Invalid file path: {str(path)!r}")
    return resolved


def split_annotation(name: str) -> tuple[str, str | None]:
    """Name and kind of "face.png [temp]"; the kind is None without such an ending.

    >>> split_annotation("o/face.png [output]")
    ('o/face.png', 'output')
    >>> split_annotation("face.png")
    ('face.png', None)
    """
    for kind in KINDS:
        ending = f" [{kind}]"
        if name.endswith(ending):
            return name[: -len(ending)], kind
    return name, None


def counter_of(name: str, stem: str) -> int:
    """Counter in a saved file's name, 0 if the file is not one of this stem.

    >>> counter_of("seg_00012_.png", "seg"), counter_of("seg2_00012_.png", "seg")
    (12, 0)
    """
    head, rest = name[: len(stem) + 1], name[len(stem) + 1 :]
    digits = rest.split(".")[0].split("_")[0]
    return int(digits) if head == stem + "_" and digits.isdigit() else 0


def expand_variables(prefix: str, width: int, height: int) -> str:
    """Replace %width%, %height% and the parts of the local time in a file name prefix."""
    if "%" not in prefix:
        return prefix
    now = time.localtime()
    values = {
        "width": str(width),
        "height": str(height),
        "year": str(now.tm_year),
        "month": f"{now.tm_mon:02}",
        "day": f"{now.tm_mday:02}",
        "hour": f"{now.tm_hour:02}",
        "minute": f"{now.tm_min:02}",
        "second": f"{now.tm_sec:02}",
    }
    for word, value in values.items():
        prefix = prefix.replace(f"%{word}%", value)
    return prefix
