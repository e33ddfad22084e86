"""A PostgreSQL server of the tests' own, where its programs are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.free_ports import free_port

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


@contextmanager
def postgres_server() -> Iterator[str]:
    """Start one; the URL of its database for ``JobIndex``."""
    # Not in pytest's folder, which nobody else may enter: PostgreSQL refuses root.
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        yield from _running_in(Path(folder))


def _running_in(folder: Path) -> Iterator[str]:
    port = free_port()
    as_user = []
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
    tools = PROGRAMS[-1].parent
    data = folder / "data"
    subprocess.run(
        [*as_user, tools / "initdb", "-D", data, "-U", "jobs", "-A", "trust", "--no-sync"],
        check=True,
        capture_output=True,
        cwd=folder,
    )
    server = subprocess.Popen(
        [*as_user, tools / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", str(folder)],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(200):
        ready = subprocess.run(
            [tools / "pg_isready", "-h", "127.0.0.1", "-p", str(port)], capture_output=True
        )
        if ready.returncode == 0:
            break
        time.sleep(0.05)
    try:
        yield f"postgresql+psycopg://jobs@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait()
