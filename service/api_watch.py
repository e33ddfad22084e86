"""Watching a job: the HLS stream of its finished front, a picture of its seams.

The jobs themselves are in ``api_v1``; what players read is made by ``pipeline.stream``.
"""

from __future__ import annotations

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import FileResponse

from pipeline.errors import JobConflict, JobNotFound
from pipeline.seam import SeamReport
from pipeline.seam_picture import draw_seams
from pipeline.stream import NAME
from service.api_v1 import ERRORS, LinkedJob, Store
from service.tokens import Tokens, link_end

router = APIRouter(prefix="/v1/jobs/{job}", tags=["watching"])

HLS = "application/vnd.apple.mpegurl"
_DRAWING = ThreadPoolExecutor(1, thread_name_prefix="drawing")
"""One picture at a time: drawing decodes video, and the machine has engines to feed.

A thread of its own: who waits for a picture holds none of those that answer everything else.
"""


@router.get(
    "/stream.m3u8",
    response_class=Response,
    responses={
        **ERRORS,
        200: {"content": {HLS: {"schema": {"type": "string"}, "example": "#EXTM3U\n#EXT-X-VERSION:7\n..."}}},
    },
)
def read_stream(job: LinkedJob, request: Request, store: Store) -> Response:
    """What is finished of the video from its start, as an HLS playlist (EVENT) of pieces of fragmented mp4.

    It grows while the job is in progress, and has an end mark when the job is over.  409 until there is
    something to see.  The pieces' addresses are signed for as long as the playlist's own.
    """
    try:
        text = store.playlist(job.id).read_text()
    except FileNotFoundError:
        raise JobConflict(job.id, f"it is {job.state} and has nothing to watch yet") from None
    tokens: Tokens = request.app.state.tokens
    until = link_end(request)

    def signed(name: str) -> str:
        return "stream/" + tokens.signed(f"/v1/jobs/{job.id}/stream/{name}", until).rpartition("/")[2]

    lines = NAME.sub(lambda found: signed(found[0]), text)
    if job.is_final and "#EXT-X-ENDLIST" not in lines:
        lines += "#EXT-X-ENDLIST\n"  # it failed or was cancelled: nothing comes after this
    return Response(lines, media_type=HLS, headers={"Cache-Control": "no-store"})


@router.get(
    "/stream/{piece}",
    response_class=FileResponse,
    responses={**ERRORS, 200: {"content": {"video/mp4": {}}}, 206: {"description": "a part"}, 416: {}},
)
def read_piece(
    job: LinkedJob, store: Store, piece: Annotated[str, Path(pattern=f"^({NAME.pattern})$")]
) -> FileResponse:
    """A piece of the stream, or the header of its pieces; the playlist names them."""
    path = store.playlist(job.id).with_name(piece)
    if not path.is_file():
        raise JobNotFound(job.id)
    # A name says what is in the file.
    return FileResponse(
        path, media_type="video/mp4", headers={"Cache-Control": "private, max-age=31536000, immutable"}
    )


@router.get(
    "/seams.png",
    response_class=Response,
    responses={**ERRORS, 200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}},
)
async def read_seams(job: LinkedJob, store: Store) -> Response:
    """The frames around each seam of a finished video, and how much each frame moves.  409 without seams."""
    video = await asyncio.to_thread(store.result, job)
    try:
        seams = [SeamReport(**entry) for entry in (job.result or {}).get("seams", [])]
    except TypeError:
        raise JobConflict(job.id, "its video was joined by another version of this program") from None
    if not seams:
        raise JobConflict(job.id, "its video is one segment and has no seam")

    def draw() -> bytes:
        content = io.BytesIO()
        draw_seams(video, seams, (job.result or {}).get("fps", 25)).save(content, "PNG")
        return content.getvalue()

    content = await asyncio.get_running_loop().run_in_executor(_DRAWING, draw)
    return Response(content, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})
