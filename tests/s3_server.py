"""An S3-compatible server on this machine: rclone's, on a folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import requests

from tests.free_ports import free_port

KEY, SECRET = "key", "secret"


@contextmanager
def running_s3(folder: Path) -> Iterator[str]:
    """The folders in ``folder`` are its buckets; yields the address of the server."""
    program = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    assert program is not None
    port = free_port()
    where = ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", "--config", "/dev/null"]
    server = subprocess.Popen([program, "serve", "s3", str(folder), *where], stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    for _ in range(100):
        with suppress(requests.ConnectionError):
            requests.get(endpoint, timeout=2)
            break
        time.sleep(0.05)
    yield endpoint
    server.terminate()
    server.wait()
