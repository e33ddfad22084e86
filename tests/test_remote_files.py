"""Files that are somewhere else: a web server that falters, a bucket."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InvalidRequest, JobCancelled, StorageError
from pipeline.remote_files import download, read_whole, upload
from pipeline.safe_fetch import FetchLimits
from tests.s3_server import KEY, SECRET, running_s3

CONTENT = os.urandom(700_000)
LIMITS = FetchLimits(1 << 20, 30)


class Faltering(BaseHTTPRequestHandler):
    """Busy at first, then it breaks off in the middle, then it answers."""

    def do_GET(self) -> None:
        asked: list[str] = self.server.asked  # type: ignore[attr-defined]
        asked.append(self.path)
        if self.path == "/missing" or (self.path == "/busy-once" and len(asked) == 1):
            self.send_error(404 if self.path == "/missing" else 503)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        whole = not (self.path == "/busy-once" and len(asked) == 2)
        self.wfile.write(CONTENT if whole else CONTENT[:1000])

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def site() -> Iterator[ThreadingHTTPServer]:
    """The server, on loopback: a private address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Faltering)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@contextmanager
def bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A bucket ``b``, known through the usual variables."""
    (folder / "b").mkdir()
    with running_s3(folder) as endpoint:
        for name, value in (
            ("ACCESS_KEY_ID", KEY),
            ("SECRET_ACCESS_KEY", SECRET),
            ("ENDPOINT_URL", endpoint),
        ):
            monkeypatch.setenv(f"AWS_{name}", value)
        yield folder / "b"


def test_a_server_that_falters_is_asked_again(site: ThreadingHTTPServer, tmp_path: Path) -> None:
    """503, then half an answer, then the file: whole or not there at all."""
    url = f"http://127.0.0.1:{site.server_port}"
    download(f"{url}/busy-once", tmp_path / "file", "audio", LIMITS, threading.Event())
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(site.asked) == 3  # type: ignore[attr-defined]
    with pytest.raises(InvalidRequest, match="answered 404"):
        download(f"{url}/missing", tmp_path / "other", "audio", LIMITS, threading.Event())
    with pytest.raises(InvalidRequest, match="larger than"):
        download(f"{url}/large", tmp_path / "other", "audio", FetchLimits(1000, 30), threading.Event())
    stop = threading.Event()
    stop.set()
    with pytest.raises(JobCancelled):
        download(f"{url}/large", tmp_path / "other", "audio", LIMITS, stop)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_go_to_a_bucket_and_come_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the AWS variables; what is missing, too large or refused is told, and no half file is left."""
    (tmp_path / "file").write_bytes(CONTENT)
    (tmp_path / "s3").mkdir()
    with bucket(tmp_path / "s3", monkeypatch) as folder:
        upload(tmp_path / "file", "s3://b/deep/a%20b.wav", "audio/wav")
        assert (folder / "deep" / "a b.wav").read_bytes() == CONTENT
        download("s3://b/deep/a%20b.wav", tmp_path / "back", "audio", LIMITS, threading.Event())
        assert (tmp_path / "back").read_bytes() == CONTENT
        assert read_whole("s3://b/deep/a%20b.wav") == CONTENT
        assert read_whole("s3://b/nothing") is None
        with pytest.raises(InvalidRequest, match="there is no s3://b/nothing"):
            download("s3://b/nothing", tmp_path / "no", "audio", LIMITS, threading.Event())
        with pytest.raises(InvalidRequest, match="larger than"):
            download("s3://b/deep/a%20b.wav", tmp_path / "no", "audio", FetchLimits(9, 9), threading.Event())
        with pytest.raises(InvalidRequest, match=r"not fetched within|can't be fetched"):
            download(
                "s3://b/deep/a%20b.wav",
                tmp_path / "no",
                "audio",
                FetchLimits(1 << 20, 1e-3),
                threading.Event(),
            )
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(StorageError, match="s3://b/x"):
            upload(tmp_path / "file", "s3://b/x", "audio/wav")
        assert not (tmp_path / "no").exists()
