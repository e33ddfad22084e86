"""Progress on a terminal: a bar for the job and one line for each segment in work; plain lines elsewhere.

Drawing only: what the numbers mean is in ``pipeline.progress``.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.logs import JsonFormatter, extra_fields
from pipeline.progress import JobProgress, SegmentState
from pipeline.render import OnProgress
from pipeline.settings import Settings

STAGES = {
    "preparing": "preparing the picture and the speech",
    "starting": "starting the engines",
    "rendering": "rendering",
    "joining": "joining the segments",
    "finished": "finished",
}


class FieldFormatter(logging.Formatter):
    """``message  job=... segment=...``: what was given as ``extra`` follows the words."""

    def format(self, record: logging.LogRecord) -> str:
        fields = extra_fields(record)
        words = super().format(record)
        return f"{words}  " + " ".join(f"{key}={value}" for key, value in fields.items()) if fields else words


@contextmanager
def logging_on(console: Console, level: int, *, plain: bool) -> Iterator[None]:
    """Logs on standard error: coloured on a terminal unless ``plain``, else lines with the time."""
    root = logging.getLogger()
    handler: logging.Handler
    if Settings.from_env().log == "json":
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter(node=socket.gethostname()))
    elif console.is_terminal and not plain:
        handler = RichHandler(console=console, show_path=False, markup=False, highlighter=None)
        handler.setFormatter(FieldFormatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(FieldFormatter("%(asctime)s %(levelname)s %(message)s"))
    root.addHandler(handler)
    root.setLevel(level)
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.removeHandler(handler)


@contextmanager
def progress_display(quiet: bool) -> Iterator[OnProgress]:
    """Set up logging on standard error and yield the function that shows progress there."""
    console = Console(stderr=True)
    with logging_on(console, logging.WARNING if quiet else logging.INFO, plain=quiet):
        if quiet:
            yield lambda _: None
        elif console.is_terminal:
            with Live(console=console, refresh_per_second=4, transient=True) as live:
                screen = _Screen()
                yield lambda progress: live.update(screen.draw(progress))
        else:
            yield _Lines().show


def clock(seconds: float | None) -> str:
    """Seconds for people.

    >>> clock(75), clock(3725), clock(None)
    ('1:15', '1:02:05', 'not known yet')
    """
    if seconds is None:
        return "not known yet"
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def bar(fraction: float) -> Table:
    """A bar on a line of its own: rich's has no end of line, and what follows would be cut off."""
    line = Table.grid()
    line.add_row(ProgressBar(1.0, fraction, width=60))
    return line


class _Screen:
    """The live picture."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def draw(self, progress: JobProgress) -> Group:
        elapsed = clock(time.monotonic() - self._began)
        if progress.stage != "rendering":
            return Group(Text(f"{STAGES[progress.stage]}  {elapsed}"))
        eta = clock(progress.eta_seconds)
        head = Text(
            f"{progress.fraction:4.0%}  windows {progress.windows_done}/{progress.windows_total}  "
            f"elapsed {elapsed}  left {eta}"
        )
        table: Any = Table.grid(padding=(0, 1))
        for state in progress.states:
            if state.stage == "rendering":
                table.add_row(_title(state), ProgressBar(state.cost, state.done, width=30), _window(state))
        waiting = sum(state.stage == "waiting" for state in progress.states)
        if waiting:
            table.add_row(f"{waiting} more waiting")
        return Group(bar(progress.fraction), head, table)


def _title(state: SegmentState) -> str:
    segment = state.segment
    return f"GPU {state.lane}  segment {segment.index}  frames {segment.start}-{segment.stop}"


def _window(state: SegmentState) -> str:
    total = len(state.segment.windows)
    current = min(state.windows_done + 1, total)
    took = f", {state.window_seconds[-1]:.1f} s each" if state.window_seconds else ""
    return f"window {current}/{total}{took}"


class _Lines:
    """One line for each stage, and one for each window that is done."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._windows = 0
        self._log = logging.getLogger("progress")

    def show(self, progress: JobProgress) -> None:
        if progress.stage != self._stage:
            self._stage = progress.stage
            self._log.info(STAGES[progress.stage])
        if progress.stage == "rendering" and progress.windows_done > self._windows:
            self._windows = progress.windows_done
            running = ", ".join(
                f"GPU {state.lane} segment {state.segment.index}"
                f" window {state.windows_done}/{len(state.segment.windows)}"
                for state in progress.states
                if state.stage == "rendering"
            )
            self._log.info(
                "%.0f%%, windows %d/%d, left %s%s",
                100 * progress.fraction,
                progress.windows_done,
                progress.windows_total,
                clock(progress.eta_seconds),
                f" ({running})" if running else "",
            )
