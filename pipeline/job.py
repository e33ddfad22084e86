"""The job directory: the name of every file of a job, and the only truth about how far it is.

    request.json            what was asked for
    inputs/picture*, sound*, mask_* the caller's files
    inputs/portrait.png     the picture, fitted
    inputs/speech*.wav      what the model hears of each speaker: 16 kHz mono, normalised
    plan.json               how the job was cut; a resumed job goes by it
    segments/0003/          a finished segment; a folder that exists is complete
    segments/0003-1/        another take of it (``redo``)
    segments/takes.json     which take of a segment counts, where it is not the first
    segments/0003.windows/  while it is not finished, its windows
        000012/             a finished window; a folder that exists is complete
        000012.motion       the frames that the next window continues, behind their SHA-256
    seams/                  the seams that are made (``kept_seams``)
    stream/                 what can be watched before the end (``stream``)
    result.json             the end
    timeline.json           what every GPU did, and when

Files appear under their names only when they are whole.  Nobody else joins paths.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InvalidRequest, JobInUse, StorageError
from pipeline.plan import Plan
from pipeline.request import RenderRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JobDirectory:
    """Where one job lives."""

    path: Path
    name: str = "job"
    """The job's id, in logs, results and the engines' file names."""

    @property
    def portrait(self) -> Path:
        return self.path / "inputs" / "portrait.png"

    @property
    def speech(self) -> Path:
        return self.path / "inputs" / "speech.wav"

    @property
    def speech_2(self) -> Path:
        return self.path / "inputs" / "speech_2.wav"

    @property
    def voice(self) -> Path:
        """The voice that was separated from the sound."""
        return self.path / "inputs" / "voice.wav"

    @property
    def voice_2(self) -> Path:
        return self.path / "inputs" / "voice_2.wav"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def seams(self) -> Path:
        """The folder of the seams that are made."""
        return self.path / "seams"

    @property
    def stream(self) -> Path:
        """The folder of the finished front of the video, for players."""
        return self.path / "stream"

    @property
    def timeline(self) -> Path:
        return self.path / "timeline.json"

    @property
    def work(self) -> Path:
        """For files that are of no use after the step that makes them."""
        return self.path / "work"

    def segment(self, index: int) -> Path:
        """The folder of a finished segment: of the take that counts."""
        return self.take(index, self.takes().get(index, 0))

    def take(self, index: int, number: int) -> Path:
        """The folder of one take of a segment; 0 is the first."""
        return self.path / "segments" / (f"{index:04d}-{number}" if number else f"{index:04d}")

    def takes(self) -> dict[int, int]:
        """The take that counts, of segments that were rendered anew.  Raises ``InvalidRequest``."""
        try:
            known = json.loads((self.path / "segments" / "takes.json").read_text())
            return {int(index): int(number) for index, number in known.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError) as error:
            raise InvalidRequest("job", f"{self.path}/segments/takes.json is damaged ({error})") from error

    def choose_take(self, index: int, number: int) -> None:
        """From now on this take counts; atomic."""
        chosen = {str(key): value for key, value in sorted({**self.takes(), index: number}.items())}
        self.write_json(self.path / "segments" / "takes.json", chosen)

    def kept_request(self) -> RenderRequest:
        """What was asked for, with the job's own copies of the files.  Raises ``InvalidRequest``."""
        try:
            fields = json.loads((self.path / "request.json").read_text())
        except (OSError, ValueError) as error:
            raise InvalidRequest("job", f"{self.path} holds no job that was kept") from error
        request = RenderRequest.checked(**fields)
        kinds = {"image": "picture", "video": "picture", "audio": "sound", "audio_2": "sound_2"}
        copies = {
            name: self.source(kinds.get(name, name), original) for name, original in request.files.items()
        }
        for name, copy in copies.items():
            if not copy.is_file():
                raise InvalidRequest("job", f"{self.path} has lost its copy of {name}, {copy.name}")
        return request.model_copy(update=copies)

    def windows(self, index: int) -> Path:
        """The folder of an unfinished segment's windows."""
        return self.path / "segments" / f"{index:04d}.windows"

    def window(self, index: int, window: int) -> Path:
        """The folder of a finished window."""
        return self.windows(index) / f"{window:06d}"

    def window_motion(self, index: int, window: int) -> Path:
        """The last frames of a finished window."""
        return self.windows(index) / f"{window:06d}.motion"

    def source(self, kind: str, original: Path) -> Path:
        """The job's own copy of a caller's file; the suffix stays for the decoders."""
        return self.path / "inputs" / f"{kind}{original.suffix.lower()[:10]}"

    def stored_plan(self) -> Plan | None:
        """The plan of an earlier start of this job; None where there is none, or it is damaged."""
        try:
            return Plan.from_json(json.loads(self.plan.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, InvalidRequest) as error:
            log.warning("the stored plan is damaged and made again: %s", error, extra={"job": self.name})
            return None

    def write_json(self, path: Path, value: Any) -> None:
        """Write atomically."""
        with finished(path) as partial:
            partial.write_text(json.dumps(value, indent=1) + "\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the job: a second process on the same directory gets a ``JobInUse``."""
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise JobInUse(str(self.path)) from None
        try:
            with storage_errors(self.path):
                for folder in (self.path / "inputs", self.path / "segments"):
                    folder.mkdir(parents=True, exist_ok=True)
            yield
        finally:
            shutil.rmtree(self.work, ignore_errors=True)
            os.close(lock)

    def take_input(self, kind: str, original: Path) -> Path:
        """Copy a caller's file into the job (once), so that a resumed job needs nothing else."""
        copy = self.source(kind, original)
        if not copy.exists():
            with finished(copy) as partial:
                shutil.copyfile(original, partial)
        return copy

    @property
    def has_segments(self) -> bool:
        """Whether any segment or window is kept that another start need not render again."""
        return any(self.path.glob("segments/[0-9]*"))

    def forget_segments(self) -> None:
        """Delete all finished segments and windows, and what was made of them."""
        for folder in (self.path / "segments", self.seams, self.stream):
            shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        """Delete the job, and its parent when nothing else is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # another job lives there too
            self.path.parent.rmdir()


def job_id(request: RenderRequest, engine: str, graph: str) -> str:
    """The name of the job that makes this request with this engine: the same request, the same job.

    A digest of the files' content and of all that shapes the pictures; started again, the job goes on.
    Raises ``InvalidRequest`` for a file that can't be read.
    """
    digest = hashlib.sha256()
    shape = request.model_dump(mode="json", exclude={*request.files, "seam", "fps"})
    digest.update(json.dumps([shape, list(request.files), engine, graph], sort_keys=True).encode())
    for field, path in request.files.items():
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except FileNotFoundError:
            raise InvalidRequest(field, f"{path}: no such file") from None
        except OSError as error:
            raise InvalidRequest(field, f"{path}: {error.strerror}") from None
    return digest.hexdigest()[:16]


@contextmanager
def finished(path: Path) -> Iterator[Path]:
    """Write to the yielded path; it becomes ``path`` only if nothing was raised."""
    partial = path.with_name(f".partial-{path.name}")  # the suffix stays: ffmpeg picks the container by it
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            with partial.open("rb") as written:
                os.fsync(written.fileno())  # or a power cut leaves the name without the content
            partial.replace(path)
    finally:
        with contextlib.suppress(OSError):  # its folder may be none: what was raised says so
            partial.unlink()


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what a file system says no with into ``StorageError``."""
    try:
        yield
    except OSError as error:
        raise StorageError(str(path), error.strerror or str(error)) from error
