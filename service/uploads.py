"""What a client sends, as fields and files: multipart straight to disk, or JSON with URLs and base64.

File fields (``image``, ``audio``, ...) may be form files; in JSON and in forms also ``<field>_url``,
``<field>_base64`` (a ``data:`` URI too) and ``<field>_path``, or ``<field>`` itself as a URL or ``data:``
URI.
Clients' file names are never used.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fastapi import Request
from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from pipeline.errors import InvalidRequest
from pipeline.job import storage_errors
from pipeline.job_inputs import allowed_path
from pipeline.job_store import JobStore, Source
from pipeline.portrait import FORMATS
from pipeline.request import RenderRequest
from service.errors import Refused
from service.intake import FILE_FIELDS

FORM_VALUE_BYTES = 64 << 10
"""A form field that is no file is not longer."""
GATHERED_BYTES = 1 << 20
"""Of an upload, before a thread takes them: each time it does costs both of them a turn."""
DATA_URI = re.compile(r"data:[\w.+-]*/?[\w.+-]*(;[\w.+=-]+)*;base64,", re.ASCII)
PICTURES = ("image", "mask_1", "mask_2")


@dataclass
class Inputs:
    """What came in.  The files lie in ``incoming`` until a job takes them."""

    values: dict[str, Any] = field(default_factory=dict)
    """Everything that is no file, by name, as it was given."""
    sources: dict[str, Source] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    def add_file(self, name: str, path: Path) -> None:
        """An arrived file for a field; a second one for the same field is a mistake."""
        self.files[name] = path
        if name in self.sources:
            raise InvalidRequest(name, "given twice")
        if name in FILE_FIELDS:
            check_kind(name, path)
        self.sources[name] = Source("file", name)

    def discard(self) -> None:
        """Delete what arrived."""
        for path in self.files.values():
            path.unlink(missing_ok=True)

    def take(self, *names: str) -> dict[str, Any]:
        """Remove and return the values that are there."""
        return {name: self.values.pop(name) for name in names if name in self.values}


@contextlib.contextmanager
def discarding(inputs: Inputs) -> Iterator[Inputs]:
    """Whatever goes wrong in the block, no arrived file stays behind."""
    try:
        yield inputs
    except BaseException:
        inputs.discard()
        raise


async def read_inputs(request: Request, store: JobStore, more_files: tuple[str, ...] = ()) -> Inputs:
    """Read a body: ``multipart/form-data`` or JSON.  Form files may also be called as in ``more_files``.

    Raises ``InvalidRequest`` naming the field, ``Refused`` (413, 415), ``StorageError``.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    limit = store.settings.max_upload_bytes
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(limit)
    if kind == b"multipart/form-data":
        boundary = options.get(b"boundary")
        if not boundary:
            raise InvalidRequest("body", "multipart without a boundary")
        with discarding(Inputs()) as inputs:
            await _read_form(request, store, boundary, inputs, (*FILE_FIELDS, *more_files))
        return inputs
    if kind == b"application/json" or not kind:
        with discarding(
            Inputs(await read_json(request, min(limit, store.settings.max_json_bytes)))
        ) as inputs:
            await asyncio.to_thread(take_sources, inputs, store)
        return inputs
    raise Refused(415, "unsupported_media_type", "send multipart/form-data or application/json")


async def read_json(request: Request, limit: int) -> dict[str, Any]:
    """A JSON object of at most ``limit`` bytes; an empty body is an empty one."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    if not body.strip():
        return {}
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidRequest("body", "this is no JSON") from None
    if not isinstance(value, dict):
        raise InvalidRequest("body", "a JSON object is needed")
    return value


def take_sources(inputs: Inputs, store: JobStore) -> None:
    """Turn ``image_url``, ``image_base64``, ... of the values into sources and files."""
    for name in FILE_FIELDS:
        given = inputs.take(name, f"{name}_url", f"{name}_base64", f"{name}_path")
        given = {key: value for key, value in given.items() if value not in (None, "")}
        if not given:
            continue
        key, value = given.popitem()
        if given or name in inputs.sources:
            raise InvalidRequest(name, "give it once: as a file, a URL, base64 or a path")
        if not isinstance(value, str):
            raise InvalidRequest(key, "a string is needed")
        if key == name and DATA_URI.match(value):
            key = f"{name}_base64"
        elif key == name:
            key = f"{name}_url"
        if key.endswith("_base64"):
            inputs.add_file(name, decode(key, value, store))
        elif key.endswith("_path"):
            path = allowed_path(store.settings, key, value)
            check_kind(name, path)
            inputs.sources[name] = Source("path", str(path))
        else:
            if not re.match(r"https?://[^\s/]", value):
                raise InvalidRequest(key, "a URL that begins with http:// or https:// is needed")
            inputs.sources[name] = Source("url", value)


def decode(key: str, text: str, store: JobStore) -> Path:
    """Base64, with or without ``data:...;base64,`` before it, as a file in ``incoming``."""
    prefix = DATA_URI.match(text)
    try:
        content = base64.b64decode(re.sub(r"\s", "", text[prefix.end() if prefix else 0 :]), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(key, "this is no base64") from None
    path = _new_file(store)
    with storage_errors(path), path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return path


def check_kind(name: str, path: Path) -> None:
    """A quick look at the first bytes, so that an obvious mistake is told at once."""
    with storage_errors(path), path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise InvalidRequest(name, "the file is empty")
    if name in PICTURES:
        try:
            with Image.open(path, formats=FORMATS):
                pass
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            raise InvalidRequest(name, f"no picture that can be read; {', '.join(FORMATS)} can") from None
    elif head.lstrip()[:1] in (b"<", b"{", b"#", b"[") or (head.isascii() and b"\0" not in head):
        raise InvalidRequest(name, "this is text, no recording")


def render_fields(inputs: Inputs) -> dict[str, Any]:
    """The values left as fields of a ``RenderRequest``.  Raises ``InvalidRequest`` for an unknown one."""
    fields: dict[str, Any] = {}
    for name, value in inputs.values.items():
        if name not in RenderRequest.model_fields or name in FILE_FIELDS:
            known = sorted(set(RenderRequest.model_fields) | set(FILE_FIELDS))
            raise InvalidRequest(name, f"no such field; there are {', '.join(known)}")
        if value is None or value == "":
            continue
        if name in ("box_1", "box_2") and isinstance(value, str):
            value = value.replace("[", "").replace("]", "").split(",")
        fields[name] = value
    return fields


async def _read_form(
    request: Request, store: JobStore, boundary: bytes, inputs: Inputs, names: tuple[str, ...]
) -> None:
    form = _Form(store, inputs, names)
    limit = store.settings.max_upload_bytes
    parser = MultipartParser(boundary, form.callbacks())
    received = 0
    gathered = bytearray()

    def end() -> None:
        parser.write(bytes(gathered))
        parser.finalize()
        if not form.complete:
            raise InvalidRequest("body", "the multipart body ends too early")
        take_sources(inputs, store)

    try:
        async for chunk in request.stream():
            received += len(chunk)
            if received > limit:
                raise _too_large(limit)
            gathered += chunk
            if len(gathered) >= GATHERED_BYTES:
                await asyncio.to_thread(parser.write, bytes(gathered))  # may wait for the disk
                gathered.clear()
        await asyncio.to_thread(end)
    except FormParserError as error:
        raise InvalidRequest("body", f"broken multipart: {error}") from None
    except ClientDisconnect:
        raise Refused(400, "disconnected", "the upload broke off") from None
    finally:
        if not form.complete:
            await asyncio.to_thread(form.close)


class _Form:
    """Callbacks of the parser: file parts go to disk as they arrive, others into memory."""

    def __init__(self, store: JobStore, inputs: Inputs, names: tuple[str, ...]) -> None:
        self._store, self._inputs, self._names = store, inputs, names
        self._header = self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._text: bytearray | None = None
        self._file: IO[bytes] | None = None
        self._path: Path | None = None
        self.complete = False

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._on_header,
            "on_header_value": self._on_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._all,
        }

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._path is not None:  # broken off in the middle
            self._path.unlink(missing_ok=True)

    def _begin(self) -> None:
        self._headers, self._text = {}, None

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        try:
            self._name = options.get(b"name", b"").decode()
        except UnicodeDecodeError:
            raise InvalidRequest("body", "a form field's name is not UTF-8") from None
        if b"filename" not in options:
            self._text = bytearray()
            return
        if self._name not in self._names:
            raise InvalidRequest(
                self._name or "body", f"no file goes here; files are {', '.join(self._names)}"
            )
        self._path = _new_file(self._store)
        with storage_errors(self._path):
            self._file = self._path.open("xb")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None and self._path is not None:
            with storage_errors(self._path):
                self._file.write(data[start:end])
            return
        assert self._text is not None
        # Base64 as a form value is as long as a file; it has its own limit, that of JSON.
        big = self._name.endswith("_base64") or self._name in FILE_FIELDS
        if len(self._text) + end - start > (self._store.settings.max_json_bytes if big else FORM_VALUE_BYTES):
            raise InvalidRequest(self._name, "too long")
        self._text += data[start:end]

    def _end(self) -> None:
        if self._file is not None and self._path is not None:
            with storage_errors(self._path):
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            path, self._file, self._path = self._path, None, None
            if self._name in self._inputs.files:
                path.unlink()
                raise InvalidRequest(self._name, "given twice")
            self._inputs.add_file(self._name, path)
            return
        assert self._text is not None
        if self._name in self._inputs.values:
            raise InvalidRequest(self._name, "given twice")
        try:
            self._inputs.values[self._name] = self._text.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(self._name, "not UTF-8") from None

    def _all(self) -> None:
        self.complete = True


def _new_file(store: JobStore) -> Path:
    return store.incoming / uuid.uuid4().hex


def _too_large(limit: int) -> Refused:
    return Refused(413, "too_large", f"the request is larger than the {limit >> 20} MiB that are taken")
