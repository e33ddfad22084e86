"""``python -m bench.batch [--json]``: how busy a batch keeps the GPUs.

Many jobs of unlike lengths on a few draft renderers, which take a fixed time for each window in a GPU's
place.  *Busy* is the time of all windows over the time of all GPUs, from the first moment that the renderers
answer to the last line of the results: preparing, planning, Ray, transport, joining and the end of the batch,
when some GPUs have nothing left, all count against it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import tempfile
from pathlib import Path

from actors.batch_runner import BatchRunner, BatchState
from bench.scaling import inputs
from pipeline.batch_folder import BatchFolder, Results
from pipeline.batch_manifest import read_manifest
from pipeline.settings import Settings

GOAL = 0.97
"""Busy."""


def main() -> None:
    """Render and print."""
    options = _options()
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        state = _rendered(Path(folder), options)
    assert (state.done, state.failed) == (options.jobs, 0)
    told = {
        "jobs": options.jobs,
        "gpus": state.gpus,
        "window_seconds": options.window_seconds,
        "cores": os.cpu_count(),
        "seconds": round(state.elapsed, 1),
        "gpu_seconds": round(state.gpu_seconds, 1),
        "busy": round(state.gpu_busy or 0.0, 4),
        "goal": GOAL,
    }
    print(json.dumps(told) if options.json else "\n".join(f"{name:>15}  {told[name]}" for name in told))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=24)
    parser.add_argument("--renderers", type=int, default=4)
    parser.add_argument(
        "--frames", type=int, nargs=2, default=[100, 1000], help="of the shortest and longest"
    )
    parser.add_argument(
        "--window-seconds", type=float, default=12.0, help="a window's time on the stand-in GPU"
    )
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _rendered(folder: Path, options: argparse.Namespace) -> BatchState:
    """Make the batch and render it."""
    dice = random.Random(1)
    image, audio = inputs(folder, options.frames[1])
    lines = [
        {
            "id": f"job-{number}",
            "image": image.name,
            "audio": audio.name,
            "max_frames": dice.randint(*options.frames),
            "width": options.size,
            "height": options.size,
        }
        for number in range(options.jobs)
    ]
    manifest = folder / "jobs.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    jobs, problems = read_manifest(manifest)
    assert not problems
    settings = Settings(engine="draft", draft_args=f"--draft-window-seconds {options.window_seconds}")
    out = BatchFolder(folder / "out")
    with out.locked():
        runner = BatchRunner(jobs, out, Results(out), settings)
        runner.run(options.renderers, lambda _: None)
    return runner.state()


if __name__ == "__main__":
    main()
