"""Upload and download of the draft engine: POST /upload/image and GET /view.  Any file, not only pictures."""

from __future__ import annotations

import asyncio
import mimetypes
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from aiohttp import web

from pipeline.draft.folders import Folders, OutsideFolder, inside, split_annotation

CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class FileRoutes:
    """The two routes that move files, with ComfyUI's answers to bad names."""

    folders: Folders

    async def upload(self, request: web.Request) -> web.Response:
        """Store the multipart field "image"; answers {name, subfolder, type}, with the name it got."""
        form = await request.post()
        field, kind = form.get("image"), str(form.get("type", "input"))
        subfolder, overwrite = str(form.get("subfolder", "")), form.get("overwrite") in ("true", "1")
        folder = self.folders.of(kind)
        if folder is None:
            return web.Response(status=500, text="500 Internal Server Error\n\nServer got itself in trouble")
        if not isinstance(field, web.FileField) or not field.filename:
            return web.Response(status=400)
        try:
            target = inside(folder, folder / os.path.normpath(subfolder) / field.filename)
        except OutsideFolder:
            return web.Response(status=400)
        path = await asyncio.to_thread(_store, field.file, target, overwrite)
        return web.json_response({"name": path.name, "subfolder": subfolder, "type": kind})

    async def view(self, request: web.Request) -> web.StreamResponse:
        """Send a file of input, output or temp, or a range of it."""
        name, kind = split_annotation(request.query.get("filename", ""))
        if "filename" not in request.query:
            return web.Response(status=404)
        folder = self.folders.of(kind or request.query.get("type", "output"))
        if not name or name.startswith("/") or ".." in name or folder is None:
            return web.Response(status=400)
        try:
            folder = inside(folder, folder / request.query.get("subfolder", ""))
        except OutsideFolder:
            return web.Response(status=403)
        name = Path(name).name
        path = folder / name
        if not path.is_file():
            return web.Response(status=404)
        quoted = name.replace("\\", "\\\\").replace('"', '\\"')
        headers = {
            "X-Content-Type-Options": "nosniff",
            "Content-Disposition": f'filename="{quoted}"',
            "Content-Type": mimetypes.guess_type(name)[0] or "application/octet-stream",
        }
        return web.FileResponse(path, headers=headers)


def _store(source: IO[bytes], target: Path, overwrite: bool) -> Path:
    """Write the upload; a taken name with other content gets " (1)", with the same content is kept."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path, number = target, 0
    while not overwrite and path.exists():
        if _same_content(source, path):
            return path
        number += 1
        path = target.with_name(f"{target.stem} ({number}){target.suffix}")
    source.seek(0)
    with path.open("wb") as sink:
        shutil.copyfileobj(source, sink, CHUNK)
    return path


def _same_content(source: IO[bytes], path: Path) -> bool:
    source.seek(0, os.SEEK_END)
    if source.tell() != path.stat().st_size:
        return False
    source.seek(0)
    with path.open("rb") as stored:
        while chunk := source.read(CHUNK):
            if chunk != stored.read(CHUNK):
                return False
    return True
