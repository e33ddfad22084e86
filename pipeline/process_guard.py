"""A guard between a renderer and its engine: when the renderer is gone, however it went, so is the engine.

Run as ``python -S -E process_guard.py FOLDER COMMAND...`` with a pipe on standard input that the owner
keeps open.  Standard output tells ``ready``, after which the owner may make FOLDER, the engine's base
directory, and says so with a line; then ``started GUARD CHILD`` and ``exited CODE``.  End of file on standard
input means that the owner died (or let go): the engine's whole process tree is ended, then FOLDER is removed.

The guard leaves the owner's session and process group (double fork, ``setsid``), so that whatever sweeps
the owner's children does not end the guard first; it is a subreaper, so that grandchildren come to it.
Standard library only, one thread, no imports from the project.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
TERM_SECONDS, KILL_SECONDS = 3.0, 5.0


def say(*words: object) -> None:
    """Tell the owner, if it still listens."""
    with contextlib.suppress(OSError):
        print(*words, flush=True)


def descendants(root: int) -> list[int]:
    """Process ids below ``root``, read from /proc."""
    found: list[int] = []
    todo = [root]
    while todo:
        pid = todo.pop()
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - stdlib only, and fast
                with open(f"/proc/{pid}/task/{thread}/children") as listing:  # noqa: PTH123
                    children = [int(word) for word in listing.read().split()]
                found += children
                todo += children
    return found


def reap() -> list[int]:
    """Collect dead children; the descendants that still live."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return []
    return descendants(os.getpid())


def end_all() -> None:
    """SIGTERM to every descendant, and SIGKILL to those that stay."""
    for number, patience in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        deadline = time.monotonic() + patience
        for pid in reap():
            with contextlib.suppress(OSError):
                os.kill(pid, number)
        while reap() and time.monotonic() < deadline:
            time.sleep(0.02)  # nothing to await: these are not all our own children


def main() -> None:
    folder, command = sys.argv[1], sys.argv[2:]
    if os.fork():
        os._exit(0)
    os.setsid()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # Ray workers hand SIGINT down blocked
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: asked.append(received))
    guard = os.getpid()
    say("ready")
    if not os.read(0, 1):
        shutil.rmtree(folder, ignore_errors=True)
        return

    def die_with_guard() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # safe: the guard has one thread
        if os.getppid() != guard:
            os._exit(1)

    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        start_new_session=True,
        close_fds=False,  # the port's lock lives as long as the engine
        preexec_fn=die_with_guard,
    )
    say("started", guard, child.pid)
    while not asked and child.poll() is None:
        if select.select([0], [], [], 0.1)[0] and not os.read(0, 4096):
            break
    code = child.poll()
    end_all()
    shutil.rmtree(folder, ignore_errors=True)
    say("exited", code if code is not None else "ended")


if __name__ == "__main__":
    main()
