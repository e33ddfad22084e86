"""A batch on a terminal: a bar for all jobs and a line for each one in work; elsewhere a line now and then.

Drawing only; the numbers are ``batch_runner``'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from actors.batch_runner import BatchState
from actors.terminal import STAGES, bar, clock

SHOWN = 12
"""Jobs in work that get a line."""

log = logging.getLogger("batch")


@contextmanager
def batch_display(
    console: Console, state: Callable[[], BatchState], *, quiet: bool
) -> Iterator[Callable[[BatchState], None]]:
    """Show how far the batch is; yields what takes the news."""
    if quiet:
        yield lambda _: None
    elif console.is_terminal:
        with Live(
            console=console, refresh_per_second=4, transient=True, get_renderable=lambda: _screen(state())
        ):
            yield lambda _: None
    else:
        yield _line


def _line(state: BatchState) -> None:
    stages = [seen.stage if seen is not None else "preparing" for _, seen in state.running]
    log.info(
        "%.0f%%, left %s",
        100 * state.fraction,
        clock(state.left_seconds),
        extra={
            "jobs": state.jobs,
            "before": state.before,
            "done": state.done,
            "failed": state.failed,
            "rendering": stages.count("rendering"),
            "preparing": stages.count("preparing") + stages.count("starting"),
            "joining": stages.count("joining") + stages.count("finished"),
            "elapsed": clock(state.elapsed),
        },
    )


def _screen(state: BatchState) -> Group:
    head = Text(
        f"{state.fraction:4.0%}  jobs {state.before + state.done}/{state.jobs}  failed {state.failed}  "
        f"elapsed {clock(state.elapsed)}  left {clock(state.left_seconds)}"
    )
    table: Any = Table.grid(padding=(0, 1))
    for job, seen in state.running[:SHOWN]:
        if seen is None:
            table.add_row(job.id, "", "fetching its files" if job.comes_over_network else STAGES["preparing"])
        elif seen.stage == "rendering":
            windows = f"windows {seen.windows_done}/{seen.windows_total}"
            table.add_row(job.id, ProgressBar(1.0, seen.fraction, width=30), windows)
        else:
            table.add_row(job.id, "", STAGES[seen.stage])
    if len(state.running) > SHOWN:
        table.add_row(f"{len(state.running) - SHOWN} more in work")
    return Group(bar(state.fraction), head, table)
