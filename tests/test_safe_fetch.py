"""URLs that clients name: what is fetched, and what is never connected to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InvalidRequest, JobCancelled
from pipeline.safe_fetch import FetchLimits, check_address, fetch

CONTENT = bytes(range(256)) * 1000


class Site(BaseHTTPRequestHandler):
    """Files, redirects, and bodies that lie or never end."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        self.send_response(404 if self.path == "/missing" else 200)
        if self.path == "/short":
            self.send_header("Content-Length", str(len(CONTENT) + 1))
        self.end_headers()
        try:
            self.wfile.write(CONTENT)
            while self.path == "/endless":
                self.wfile.write(CONTENT)
        except OSError:
            pass  # the client has seen enough

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def site() -> Iterator[ThreadingHTTPServer]:
    """A real server on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def get(url: str, target: Path, *allowed: str, size: int = 1 << 20, seconds: float = 10) -> bytes:
    fetch(url, target, "image", FetchLimits(size, seconds, allowed), threading.Event())
    return target.read_bytes()


def address(site: ThreadingHTTPServer, path: str = "/file", host: str = "127.0.0.1") -> str:
    return f"http://{host}:{site.server_port}{path}"


def test_an_allowed_host_is_fetched(site: ThreadingHTTPServer, tmp_path: Path) -> None:
    """By network, by name and through a redirect, every byte arrives."""
    assert get(address(site), tmp_path / "a", "127.0.0.0/8") == CONTENT
    assert get(address(site, host="localhost"), tmp_path / "b", "localhost") == CONTENT
    assert get(address(site, "/to/" + address(site)), tmp_path / "c", "127.0.0.1") == CONTENT


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0x7f000001", "2130706433", "0.0.0.0", "127.1"],
)
def test_this_machine_is_out_of_reach(site: ThreadingHTTPServer, tmp_path: Path, host: str) -> None:
    """However it is written, an address that is not public is not connected to."""
    with pytest.raises(InvalidRequest, match=r"^image: .*not a public address"):
        get(address(site, host=host), tmp_path / "a")
    assert site.asked == []  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "ip",
    ["10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "::1", "fe80::1",
     "fd00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "0.0.0.0",
     "64:ff9b:1::a00:1", "fec0::1", "::a00:1"],
)  # fmt: skip
def test_private_ranges_are_refused(ip: str) -> None:
    """Private, link-local, metadata, carrier, multicast, and IPv4 hidden in IPv6."""
    with pytest.raises(ValueError, match="not a public address"):
        check_address(ip, "example.org", ())
    check_address(ip, "example.org", ("example.org",))


def test_a_redirect_is_checked_again(site: ThreadingHTTPServer, tmp_path: Path) -> None:
    """What is allowed may not lead to what is not."""
    with pytest.raises(InvalidRequest, match=r"127\.0\.0\.2 .*not a public address"):
        get(address(site, "/to/" + address(site, host="127.0.0.2")), tmp_path / "a", "127.0.0.1")


def test_a_name_that_changes_its_address_gets_nowhere(
    site: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: public at the first question, loopback at the second; nothing is ever asked there."""
    real = socket.getaddrinfo
    answers = iter(["192.0.2.1", "127.0.0.1", "127.0.0.1"])

    def resolver(host: str, *rest: Any, **more: Any) -> Any:
        return real(next(answers) if host == "rebind.test" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    for _ in range(2):
        with pytest.raises(InvalidRequest):
            get(address(site, host="rebind.test"), tmp_path / "a")
    assert site.asked == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "url", ["ftp://example.org/a", "file:///etc/passwd", "gopher://x/", "http://", "nonsense"]
)
def test_only_http_is_fetched(url: str, tmp_path: Path) -> None:
    """Other schemes are an error of the request."""
    with pytest.raises(InvalidRequest):
        get(url, tmp_path / "a")


@pytest.mark.parametrize(
    ("path", "words"),
    [("/endless", "larger than"), ("/missing", "answered 404"), ("/short", "broke off|IncompleteRead|bytes")],
)
def test_what_is_too_large_missing_or_cut_leaves_no_file(
    site: ThreadingHTTPServer, tmp_path: Path, path: str, words: str
) -> None:
    """The error says what happened, and nothing lies under the final name."""
    with pytest.raises(InvalidRequest, match=words):
        get(address(site, path), tmp_path / "a", "127.0.0.1")
    assert list(tmp_path.iterdir()) == []


def test_time_and_cancelling_end_a_transfer(site: ThreadingHTTPServer, tmp_path: Path) -> None:
    """An endless body ends with the time it may take, or when the job is cancelled."""
    with pytest.raises(InvalidRequest, match="not fetched within"):
        get(address(site, "/endless"), tmp_path / "a", "127.0.0.1", size=1 << 40, seconds=0.2)
    stop = threading.Event()
    stop.set()
    with pytest.raises(JobCancelled):
        fetch(address(site), tmp_path / "a", "image", FetchLimits(1 << 20, 9, ("127.0.0.1",)), stop)
    assert list(tmp_path.iterdir()) == []
