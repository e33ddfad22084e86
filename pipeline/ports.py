"""Ports for engines: the first free one of a range, ours for as long as its lock file is held.

Two renderers on one machine never get the same port (lock files), nor one that a stranger listens on
(a bind).  Nothing here knows what listens in the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import ConfigurationError


def is_free(port: int) -> bool:
    """Whether nobody listens on ``port`` of 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as servers do: TIME_WAIT is no hindrance
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@contextmanager
def reserved_port(first: int, last: int, skip: frozenset[int] = frozenset()) -> Iterator[tuple[int, int]]:
    """Yield ``(port, descriptor)``: a port of ``first..last`` nobody listens on, locked until the end.

    Hand the descriptor down to the engine: the lock then lives as long as any process that has it, also
    when the one that took it is killed.  Raises ``ConfigurationError`` when no port is left.
    """
    folder = Path(tempfile.gettempdir()) / f"infinitetalk-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for port in range(first, last + 1):
        if port in skip:
            continue
        lock = os.open(folder / str(port), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not is_free(port)
        except BlockingIOError:
            taken = True
        if taken:
            os.close(lock)
            continue
        try:
            yield port, lock
        finally:
            with contextlib.suppress(OSError):
                os.close(lock)
        return
    raise ConfigurationError(
        f"no free port from {first} to {last} for an engine; end what listens there, "
        "or set INFINITETALK_PORTS to another range"
    )
