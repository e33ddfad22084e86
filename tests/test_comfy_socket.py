"""The progress socket against a server of a few lines: whatever happens, it never raises."""

from __future__ import annotations

import base64
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from pipeline.comfy_socket import ProgressSocket

MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


@contextmanager
def serving(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server whose every connection is given to ``talk``; its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    talk(connection)

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


def greet(connection: socket.socket) -> None:
    """The server's half of the handshake."""
    request = connection.recv(65536)
    key = next(
        line.split(b": ")[1] for line in request.split(b"\r\n") if line.lower().startswith(b"sec-websocket-k")
    )
    accept = base64.b64encode(hashlib.sha1(key + MAGIC).digest())
    connection.sendall(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )


def frame(content: bytes, opcode: int = 1) -> bytes:
    """A short frame from the server."""
    return bytes([0x80 | opcode, len(content)]) + content


def test_text_is_decoded_and_the_rest_is_no_message() -> None:
    """Previews are binary, and what is not JSON can't be understood: None, and the socket stays open."""
    over = threading.Event()

    def talk(connection: socket.socket) -> None:
        greet(connection)
        connection.sendall(frame(b'{"type": "status"}') + frame(b"\0\0\0\1", 2) + frame(b"{") + frame(b"7"))
        over.wait(10)

    with serving(talk) as url:
        ours = ProgressSocket(url, "us")
        ours.open()
        assert [ours.next(1.0) for _ in range(4)] == [{"type": "status"}, None, None, 7]
        assert ours.next(0.01) is None
        assert ours.is_open
        ours.close()
        assert not ours.is_open
        over.set()


def test_a_message_in_pieces_survives_a_timeout() -> None:
    """A frame that arrives in two halves is read in the second call, not lost."""
    half_read, over = threading.Event(), threading.Event()

    def talk(connection: socket.socket) -> None:
        greet(connection)
        whole = frame(b'{"type": "progress"}')
        connection.sendall(whole[:9])
        half_read.wait(10)
        connection.sendall(whole[9:])
        over.wait(10)

    with serving(talk) as url:
        ours = ProgressSocket(url, "us")
        ours.open()
        assert ours.next(0.1) is None
        half_read.set()
        assert ours.next(5.0) == {"type": "progress"}
        over.set()


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 404 Not Found\r\n\r\n", b"hello\r\n\r\n", b"\xff\xfe\r\n\r\n"]
)
def test_no_websocket_there(answer: bytes) -> None:
    """A server that closes, refuses or talks nonsense leaves the socket closed."""

    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(answer)

    with serving(talk) as url:
        ours = ProgressSocket(url, "us")
        ours.open()
        assert not ours.is_open
        assert ours.next(0.1) is None


def test_the_end_is_noticed_and_retries_are_rare() -> None:
    """After the server has gone the socket is closed; opening it again at once does not even try."""
    seen: list[float] = []

    def talk(connection: socket.socket) -> None:
        seen.append(time.monotonic())
        greet(connection)

    with serving(talk) as url:
        ours = ProgressSocket(url, "us")
        ours.open()
        assert ours.is_open
        assert ours.next(5.0) is None
        assert not ours.is_open
        ours.open()
        assert not ours.is_open
        assert len(seen) == 1


def test_nobody_listens() -> None:
    """Connection refused is no exception: the truth is asked for over HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    ours = ProgressSocket(f"http://127.0.0.1:{port}", "us")
    ours.open()
    assert not ours.is_open
