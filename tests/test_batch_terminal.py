"""What a batch shows on a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from actors.batch_runner import BatchState
from actors.batch_terminal import batch_display
from pipeline.batch_manifest import BatchJob
from pipeline.plan import calculate_segments
from pipeline.progress import JobProgress, SegmentState


def test_a_terminal_of_80_columns_shows_all_of_it() -> None:
    """The bar, the counts, the time left, and a line for each job in work."""
    segments = calculate_segments(400, 2).segments
    states = (SegmentState(segments[0], "finished"), SegmentState(segments[1], "rendering", 1))
    jobs = [BatchJob(n, f"job-{n}", f"{n}.mp4", 0, {}, {"audio": "s3://b/a.wav"}) for n in range(3)]
    running = (
        (jobs[0], JobProgress("job-0", "rendering", 2, states)),
        (jobs[1], JobProgress("job-1", "joining")),
        (jobs[2], None),
    )
    state = BatchState(
        jobs=12, before=2, done=4, failed=1, running=running, elapsed=65, gpus=2, gpu_seconds=9, gpu_busy=0.5
    )
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    with batch_display(console, lambda: state, quiet=False):
        pass
    shown = screen.getvalue()
    for words in (
        "55%  jobs 6/12  failed 1  elapsed 1:05  left 0:53",
        "windows 3/6",
        "job-1",
        "joining the segments",
        "fetching its files",
    ):
        assert words in shown, shown
