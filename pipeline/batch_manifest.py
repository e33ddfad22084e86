"""The manifest of a batch: a file with a job on each line, checked as a whole before anything starts.

JSON lines, or CSV with a header where the name ends in ``.csv``.  A line has the fields of ``RenderRequest``,
and ``id``, ``output``, ``priority``.  What becomes of the jobs is ``actors.batch_runner``'s business.
"""

from __future__ import annotations

import csv
import difflib
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import InvalidRequest, PipelineError
from pipeline.portrait import read_picture
from pipeline.remote_files import SCHEMES, is_remote, s3_place
from pipeline.request import RenderRequest, wrong_fields
from pipeline.sound import SoundReader, seconds_said
from pipeline.source_video import SourceVideo
from pipeline.timeline import FPS

FILES = ("image", "video", "audio", "audio_2", "mask_1", "mask_2")
"""Fields that name a file: a path, relative to the manifest or absolute, or an address."""
BOXES = ("box_1", "box_2")

LOOKING_AT_ONCE = 4
"""Files that are opened at a time: waiting for a network file system, not computing."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class _Own(BaseModel):
    """The fields of a line that are not the request's."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    id: str | None = None
    output: str | None = None
    priority: int = Field(default=0, ge=-100, le=100)


@dataclass(frozen=True, slots=True)
class BatchJob:
    """One line that can be rendered."""

    line: int
    """In the manifest, counted from 1."""
    id: str
    output: str
    """Name of the video in the output folder, with ``/`` between folders."""
    priority: int
    fields: dict[str, Any]
    """Of the request, those that name no file."""
    sources: dict[str, str]
    """By field: an absolute path, or an address."""

    @property
    def comes_over_network(self) -> bool:
        """Whether any of its files does."""
        return any(is_remote(source) for source in self.sources.values())

    def expected_frames(self) -> float:
        """About how long its video gets: by headers, which may be wrong; infinite where nobody knows.

        Files behind addresses are not looked at.  Raises ``InvalidRequest``.
        """
        speeches = [self.sources[field] for field in ("audio", "audio_2") if field in self.sources]
        limit = float(self.fields.get("max_frames") or math.inf)
        if any(map(is_remote, speeches)):
            return limit
        said = [seconds_said(Path(source)) for source in speeches]
        lengths = [math.inf if seconds is None else seconds for seconds in said]
        whole = sum(lengths) if self.fields.get("audio_order") == "in_turns" else max(lengths)
        start, end = (float(self.fields.get(field) or 0) for field in ("audio_start", "audio_end"))
        part = min(whole, end or math.inf) - start
        return min(limit, part * FPS)

    def request(self, files: dict[str, Path]) -> RenderRequest:
        """The request, with every source as a file of this machine.  Raises ``InvalidRequest``."""
        return RenderRequest.checked(**self.fields, **files)

    def digest(self, engine: str) -> str:
        """What tells whether a job is still the same: its fields, the content of its local files, its engine.

        Of addresses only the address counts.  Raises ``InvalidRequest`` for a file that can't be read.
        """
        told = {
            field: source if is_remote(source) else _content(field, Path(source))
            for field, source in self.sources.items()
        }
        whole = json.dumps([self.fields, told, self.output, engine], sort_keys=True, default=str)
        return hashlib.sha256(whole.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a line can't be rendered."""

    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}, {self.field}: {self.reason}"


def read_manifest(
    path: Path, check: Callable[[RenderRequest], None] = lambda _: None
) -> tuple[list[BatchJob], list[Problem]]:
    """All jobs of a manifest, and everything that is wrong with it; the jobs count only where nothing is.

    ``check`` may refuse a request by a ``PipelineError``.  Local files are opened, not read to their end.
    Raises ``InvalidRequest("manifest", ...)`` for a file that can't be read at all.
    """
    jobs: list[BatchJob] = []
    problems: list[Problem] = []
    ids: dict[str, int] = {}
    outputs: dict[str, int] = {}
    try:
        for line, fields in _lines(path):
            job = fields if isinstance(fields, Problem) else _job(line, fields, path.parent, check)
            if isinstance(job, Problem):
                problems.append(job)
            elif isinstance(job, list):
                problems += job
            else:
                problems += _twice(job, ids, outputs)
                jobs.append(job)
    except OSError as error:
        raise InvalidRequest("manifest", f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidRequest("manifest", f"{path} is no text that can be read: {error}") from None
    for job in jobs:
        for parent in PurePosixPath(job.output.casefold()).parents:
            if str(parent) in outputs:
                reason = f"{parent} is the video of line {outputs[str(parent)]}, and can't be a folder too"
                problems.append(Problem(job.line, "output", reason))
    problems += _unreadable(jobs)
    if not jobs and not problems:
        raise InvalidRequest("manifest", f"{path} has no jobs")
    return jobs, sorted(problems, key=lambda problem: problem.line)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    """Line numbers and fields; empty lines are left out."""
    if path.suffix.lower() == ".csv":
        yield from _csv_lines(path)
        return
    with path.open(encoding="utf-8-sig") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                fields = json.loads(text, object_pairs_hook=_each_once)
            except ValueError as error:
                yield number, Problem(number, "line", f"no JSON: {error}")
                continue
            if not isinstance(fields, dict):
                reason = 'no JSON object: write {"image": ..., "audio": ...} on one line'
                yield number, Problem(number, "line", reason)
                continue
            yield number, fields


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return fields


def _csv_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    """Rows as fields: empty cells are not given, boxes are ``x0,y0,x1,y1`` in one cell."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, skipinitialspace=True)
        header = [name.strip() for name in rows.fieldnames or []]
        for name in header:
            if name not in _known():
                yield 1, Problem(1, name or "header", _unknown(name))
            elif header.count(name) > 1:
                yield 1, Problem(1, name, "there are two columns of this name")
        rows.fieldnames = header
        for row in rows:
            number = rows.line_num
            if None in row:
                yield number, Problem(number, "line", f"it has more cells than the header's {len(header)}")
                continue
            fields: dict[str, Any] = {
                name: cell.strip() for name, cell in row.items() if cell and cell.strip() and name in _known()
            }
            for name in BOXES:
                if name in fields:
                    fields[name] = [part.strip() for part in fields[name].strip("[]").split(",")]
            yield number, fields


@functools.cache
def _known() -> tuple[str, ...]:
    return (*_Own.model_fields, *RenderRequest.model_fields)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, _known(), 1)
    return f"there is no such field; {f'did you mean {near[0]}?' if near else 'see docs/batch.md'}"


def _job(
    line: int, fields: dict[str, Any], folder: Path, check: Callable[[RenderRequest], None]
) -> BatchJob | list[Problem]:
    """A checked line, or all that is wrong with it."""
    problems = [Problem(line, name, _unknown(name)) for name in fields if name not in _known()]
    asked = {name: fields[name] for name in RenderRequest.model_fields if fields.get(name) is not None}
    own, request = _Own(), None
    try:
        own = _Own.model_validate({name: fields[name] for name in _Own.model_fields if name in fields})
    except ValidationError as error:
        problems += [Problem(line, wrong.field, wrong.reason) for wrong in wrong_fields(error)]
    try:
        request = RenderRequest.model_validate(asked)
    except ValidationError as error:
        problems += [Problem(line, wrong.field, wrong.reason) for wrong in wrong_fields(error)]
    sources: dict[str, str] = {}
    for field in FILES:
        if isinstance(asked.get(field), str):
            try:
                sources[field] = _source(asked[field], folder)
            except ValueError as error:
                problems.append(Problem(line, field, str(error)))
    if request is None or problems:
        return problems
    try:
        check(request)
    except InvalidRequest as error:
        return [Problem(line, error.field, error.reason)]
    except PipelineError as error:
        return [Problem(line, "request", str(error))]
    given = request.model_dump(mode="json", exclude_defaults=True, exclude=set(FILES))
    name = own.id or _derived_id(given, {field: asked[field] for field in sources}, own.output)
    output = own.output or f"{name}.mp4"
    problems += [Problem(line, *wrong) for wrong in (*_wrong_id(name), *_wrong_output(output))]
    return problems or BatchJob(line, name, output, own.priority, given, sources)


def _source(text: str, folder: Path) -> str:
    """An address as it is, a path as an absolute one.  Raises ``ValueError`` with what to change."""
    if is_remote(text):
        if text.lower().startswith("s3:") and not s3_place(text)[1]:
            raise ValueError(f"{text} names no object: write s3://bucket/key")
        return text
    scheme, colon, _ = text.partition("://")
    if colon:
        raise ValueError(
            f"{scheme}:// can't be read; paths, {', '.join(f'{name}://' for name in SCHEMES)} can"
        )
    path = (folder / text).absolute()
    try:
        found = path.is_file()
        size = path.stat().st_size if found else 0
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not found:
        raise ValueError(
            f"{path} is {'no file' if path.exists() else 'not there'}; paths start at the manifest"
        )
    if not size:
        raise ValueError(f"{path} is empty")
    return str(path)


def _derived_id(given: dict[str, Any], sources: dict[str, str], output: str | None) -> str:
    """The same for the same line wherever it stands, and told apart by people by the speech's name."""
    whole = json.dumps([given, sources, output], sort_keys=True)
    stem = re.sub(r"[^A-Za-z0-9]+", "-", PurePosixPath(sources["audio"].partition("?")[0]).stem).strip("-")
    return f"{stem[:40] or 'job'}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _wrong_id(name: str) -> Iterator[tuple[str, str]]:
    if not _ID.fullmatch(name):
        yield "id", f"{name!r}: use up to 100 of A-Z a-z 0-9 . _ -, the first a letter or a digit"


def _wrong_output(output: str) -> Iterator[tuple[str, str]]:
    path = PurePosixPath(output)
    if path.suffix.lower() != ".mp4":
        yield "output", f"{output}: the result is an mp4; name it so"
    elif path.is_absolute() or any(part in ("..", "") or part.startswith(".") for part in path.parts):
        yield "output", f"{output}: a name inside the output folder, without .. and hidden folders"
    elif any(len(part.encode()) > 200 for part in path.parts) or "\0" in output or str(path) != output:
        yield "output", f"{output[:80]}: no name for a file"


def in_order(jobs: Sequence[BatchJob]) -> list[BatchJob]:
    """The order in which jobs start: by priority, then longest first, else as in the manifest.

    Where the last jobs to start are short, all GPUs end at about the same time (Graham's longest processing
    time first, 1969).
    """

    def frames(job: BatchJob) -> float:
        try:
            return job.expected_frames()
        except InvalidRequest:  # a file that is gone meanwhile: told when its turn comes
            return 0.0

    with ThreadPoolExecutor(LOOKING_AT_ONCE, thread_name_prefix="look") as threads:
        lengths = list(threads.map(frames, jobs))
    order = sorted(range(len(jobs)), key=lambda n: (-jobs[n].priority, -lengths[n], n))
    return [jobs[number] for number in order]


def _twice(job: BatchJob, ids: dict[str, int], outputs: dict[str, int]) -> Iterator[Problem]:
    first = ids.setdefault(job.id, job.line)
    if first != job.line:
        yield Problem(job.line, "id", f"{job.id} is line {first}'s already; give each line an id of its own")
        return
    first = outputs.setdefault(job.output.casefold(), job.line)
    if first != job.line:
        yield Problem(job.line, "output", f"{job.output} is line {first}'s already; name another file")


def _unreadable(jobs: list[BatchJob]) -> list[Problem]:
    """Local files that no decoder takes; each file is opened once, however many lines name it."""
    wanted = {
        (field, source) for job in jobs for field, source in job.sources.items() if not is_remote(source)
    }
    with ThreadPoolExecutor(LOOKING_AT_ONCE, thread_name_prefix="look") as threads:
        reasons = dict(zip(wanted, threads.map(lambda item: _look(*item), wanted), strict=True))
    return [
        Problem(job.line, field, reason)
        for job in jobs
        for field, source in job.sources.items()
        if (reason := reasons.get((field, source))) is not None
    ]


def _look(field: str, source: str) -> str | None:
    """Why a file can't be taken for its field, or None."""
    path = Path(source)
    try:
        if field == "video":
            SourceVideo.opened(path)
        elif field.startswith("audio"):
            with SoundReader(path) as reader:
                next(iter(reader), None)
        else:
            read_picture(path, field)
    except InvalidRequest as error:
        return error.reason
    return None


def _content(field: str, path: Path) -> str:
    try:
        found = path.stat()
        return _hash(path, found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise InvalidRequest(field, f"{path}: {error.strerror}") from None


@functools.lru_cache(maxsize=10_000)
def _hash(path: Path, _size: int, _time: int) -> str:
    """SHA-256 of a file; a portrait that a thousand lines name is read once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
