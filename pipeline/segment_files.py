"""What is kept of a segment, or of one window of it: three silent files, a manifest, and how they travel.

    head.mkv       the overlap with the segment before, lossless; absent for the first segment
    body.mp4       the frames between, in the final encoding; absent if there are none
    tail.mkv       the overlap with the segment after, lossless; absent for the last segment
    segment.json   frames, bytes and SHA-256 of each

A directory that exists is complete.  Windows become a segment here, by stream copy; joining segments is
``stitch``'s work.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import ffmpeg
from pipeline.errors import MediaError, StorageError
from pipeline.ffmpeg import FINAL, LOSSLESS
from pipeline.frame_writer import FrameWriter, Writer
from pipeline.frames import Frame as Frame
from pipeline.frames import stream_header

PARTS = {"head": LOSSLESS, "body": FINAL, "tail": LOSSLESS}
"""The parts of a segment in the order of their frames."""

MANIFEST = "segment.json"


@dataclass(frozen=True, slots=True)
class SegmentFiles:
    """A finished segment on disk: how many frames each part has, and where it is."""

    folder: Path
    frames: Mapping[str, int]
    """Frames of ``head``, ``body`` and ``tail``; 0 where there is no file."""
    width: int
    height: int

    @classmethod
    def in_folder(cls, folder: Path) -> SegmentFiles:
        """Open a finished segment; checks sizes but not contents (``verify``).  Raises ``MediaError``."""
        manifest = _manifest(folder.name, _read(folder / MANIFEST))
        for name, entry in manifest["files"].items():
            size = (folder / name).stat().st_size if (folder / name).exists() else None
            if size != entry["bytes"]:
                raise MediaError(f"{folder.name}/{name} has {size} bytes instead of {entry['bytes']}")
        return cls(folder, dict(manifest["frames"]), manifest["width"], manifest["height"])

    def path(self, part: str) -> Path:
        """The file of ``head``, ``body`` or ``tail``; it exists if ``frames[part]``."""
        return self.folder / f"{part}{PARTS[part].suffix}"

    def verify(self) -> None:
        """Compare every file with its SHA-256.  Raises ``MediaError``."""
        for name, entry in _manifest(self.folder.name, _read(self.folder / MANIFEST))["files"].items():
            with (self.folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != entry["sha256"]:
                raise MediaError(f"{self.folder.name}/{name} is not what the renderer wrote")

    def digest(self, part: str) -> str:
        """SHA-256 of a part's file, by the manifest.  Raises ``MediaError``."""
        manifest = _manifest(self.folder.name, _read(self.folder / MANIFEST))
        return str(manifest["files"][self.path(part).name]["sha256"])

    def to_arrays(self) -> dict[str, npt.NDArray[np.uint8]]:
        """All files by name as uint8 arrays, the form that crosses Ray's object store without a copy."""
        names = [MANIFEST, *(self.path(part).name for part, frames in self.frames.items() if frames)]
        return {name: np.frombuffer(_read(self.folder / name), np.uint8) for name in names}

    @classmethod
    def store(cls, folder: Path, arrays: Mapping[str, npt.NDArray[np.uint8]]) -> SegmentFiles:
        """Write what ``to_arrays`` gave elsewhere into ``folder``, all or nothing, replacing what is there.

        Raises ``MediaError`` where size or SHA-256 are not the manifest's, ``StorageError``.
        """
        files = _manifest(folder.name, bytes(arrays.get(MANIFEST, b"")))["files"]
        if set(arrays) != {MANIFEST, *files}:
            raise MediaError(f"{folder.name} should have the files {sorted(files)} and has {sorted(arrays)}")
        for name, entry in files.items():
            content = np.ascontiguousarray(arrays[name]).data
            if (content.nbytes, hashlib.sha256(content).hexdigest()) != (entry["bytes"], entry["sha256"]):
                raise MediaError(f"{folder.name}/{name} was damaged on its way")
        partial = _partial(folder)
        try:
            for name, array in arrays.items():
                (partial / name).write_bytes(np.ascontiguousarray(array).data)
            _publish(partial, folder)
        except OSError as error:
            raise StorageError(str(folder), error.strerror or str(error)) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return cls.in_folder(folder)


class SegmentWriter(Writer):
    """Takes the frames of a segment in order and routes them into its files, as a context manager.

    ``folder`` appears when the block ends well and every frame came, and replaces an older one;
    otherwise nothing is left.
    """

    def __init__(self, folder: Path, head: int, body: int, tail: int, width: int, height: int) -> None:
        self._folder, self._size = folder, (width, height)
        self._frames = {"head": head, "body": body, "tail": tail}
        self._written = 0
        self._writer: FrameWriter | None = None
        self._partial = _partial(folder)

    @property
    def missing(self) -> int:
        """Frames that are still to come."""
        return sum(self._frames.values()) - self._written

    def write(self, frame: Frame) -> None:
        """Append the next frame, uint8 [H, W, 3].

        Raises ``MediaError``, also for a frame more than the segment has, and ``StorageError``.
        """
        part, first, last = self._place(self._written)
        if first:
            target = self._partial / f"{part}{PARTS[part].suffix}"
            self._writer = FrameWriter(target, *self._size, PARTS[part])
        assert self._writer is not None
        self._writer.write(frame)
        self._written += 1
        if last:
            self._writer.close()
            self._writer = None

    def close(self) -> None:
        """Publish the segment.  Raises ``MediaError`` where frames are missing, ``StorageError``."""
        wanted = sum(self._frames.values())
        if self._written != wanted or not wanted:
            self.abort()
            raise MediaError(f"{self._folder.name} got {self._written} frames instead of {wanted}")
        try:
            _seal(self._partial, self._frames, self._size)
            _publish(self._partial, self._folder)
        except OSError as error:
            raise StorageError(str(self._folder), error.strerror or str(error)) from error
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def abort(self) -> None:
        """Stop the encoder and remove what was written so far."""
        if self._writer is not None:
            self._writer.abort()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _place(self, index: int) -> tuple[str, bool, bool]:
        """The part of frame ``index``, and whether it is the part's first and its last frame."""
        for part, frames in self._frames.items():
            if index < frames:
                return part, index == 0, index == frames - 1
            index -= frames
        raise MediaError(f"{self._folder.name} got more than its {sum(self._frames.values())} frames")


def join_windows(windows: Sequence[SegmentFiles], folder: Path, work: Path) -> SegmentFiles:
    """Make one segment of the files of its ``windows``, in order, without encoding anything again.

    ``folder`` appears when it is complete; ``work`` gets small temporary files.
    Raises ``MediaError``, ``StorageError``.
    """
    partial = _partial(folder)
    try:
        for part, encoding in PARTS.items():
            files = [(window.path(part), window.frames[part]) for window in windows if window.frames[part]]
            target = partial / f"{part}{encoding.suffix}"
            if len(files) == 1:
                shutil.copyfile(files[0][0], target)
            elif files and encoding is FINAL and len({stream_header(path) for path, _ in files}) > 1:
                ffmpeg.encode_again(files, target, work)  # windows of nodes with different encoders
            elif files:
                ffmpeg.join_pictures(files, target, work, encoding)
        _seal(
            partial,
            {part: sum(window.frames[part] for window in windows) for part in PARTS},
            (windows[0].width, windows[0].height),
        )
        _publish(partial, folder)
    except OSError as error:
        raise StorageError(str(folder), error.strerror or str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return SegmentFiles.in_folder(folder)


def _seal(partial: Path, frames: Mapping[str, int], size: tuple[int, int]) -> None:
    """Write the manifest of the files that are there."""
    files = {}
    for path in sorted(partial.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    manifest = {"width": size[0], "height": size[1], "frames": dict(frames), "files": files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _partial(folder: Path) -> Path:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise StorageError(str(folder), error.strerror or str(error)) from error


def _publish(partial: Path, folder: Path) -> None:
    """Give a complete directory its name; an older one of that name goes."""
    if folder.exists():
        shutil.rmtree(folder)
    partial.chmod(0o755)
    partial.replace(folder)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MediaError(f"{path.parent.name}/{path.name} can't be read", str(error)) from error


def _manifest(name: str, content: bytes) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(content)
    except ValueError as error:
        raise MediaError(f"{name} has no readable {MANIFEST}", str(error)) from error
    return manifest
