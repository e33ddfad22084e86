"""Strangers' files, looked at in a process with limits."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import InvalidRequest
from pipeline.media_check import MediaLimits, check_media
from tests.conftest import ROOT

LIMITS = MediaLimits(max_pixels=2_000_000, max_seconds=60)


def bomb(path: Path, width: int, height: int) -> Path:
    """A small PNG whose header says that it is huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(3 * width + 1) * min(height, 2000), 9)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    return path


def test_good_files_pass() -> None:
    """The bundled examples."""
    check_media("image", ROOT / "examples" / "portrait.png", LIMITS)
    check_media("audio", ROOT / "examples" / "speech.wav", LIMITS)


def test_a_picture_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    """By its header, before anything is unpacked."""
    with pytest.raises(InvalidRequest, match=r"^image: .*pixels"):
        check_media("image", bomb(tmp_path / "bomb.png", 30_000, 30_000), LIMITS)


def test_a_broken_picture_is_refused(tmp_path: Path) -> None:
    """The whole picture is decoded, so a half one is found."""
    path = tmp_path / "half.png"
    path.write_bytes((ROOT / "examples" / "portrait.png").read_bytes()[:20_000])
    with pytest.raises(InvalidRequest, match=r"^image: no picture"):
        check_media("image", path, LIMITS)


def test_a_recording_is_as_long_as_its_packets(tmp_path: Path, speech_of: object) -> None:
    """A header that promises less than there is does not help."""
    short = MediaLimits(max_pixels=2_000_000, max_seconds=3)
    content = bytearray((ROOT / "examples" / "speech.wav").read_bytes())
    with pytest.raises(InvalidRequest, match=r"^audio: longer than the 3 s"):
        check_media("audio", ROOT / "examples" / "speech.wav", short)
    content[40:44] = struct.pack("<I", 0xFFFFFFFF)  # "length unknown"
    lying = tmp_path / "lying.wav"
    lying.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"^audio: longer than the 3 s"):
        check_media("audio", lying, short)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:9/secret.ts\n",
        "ffconcat version 1.0\nfile /etc/passwd\n",
        "<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    ],
)
@pytest.mark.parametrize("field", ["audio", "video", "image"])
def test_playlists_lead_nowhere(tmp_path: Path, field: str, text: str) -> None:
    """Files that name other files are no media here."""
    path = tmp_path / "list.mp3"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=rf"^{field}: no "):
        check_media(field, path, LIMITS)


def test_the_look_has_a_limit_of_memory(tmp_path: Path) -> None:
    """A picture within the pixels, but not within the memory: the service itself stays small."""
    path = tmp_path / "large.png"
    Image.new("RGB", (6000, 6000)).save(path)
    limits = MediaLimits(max_pixels=50_000_000, max_seconds=60, check_bytes=300 << 20)
    with pytest.raises(InvalidRequest, match=r"^image: "):
        check_media("image", path, limits)


def test_the_look_has_a_limit_of_time() -> None:
    """Whatever a decoder hangs in, the job learns of it."""
    limits = MediaLimits(max_pixels=2_000_000, max_seconds=60, check_seconds=0.05)
    with pytest.raises(InvalidRequest, match=r"within 0\.05 s"):
        check_media("audio", ROOT / "examples" / "speech.wav", limits)
