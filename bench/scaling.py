"""``python -m bench.scaling [--json]``: how much faster more renderers are, end to end.

Every row is a whole job on running renderers, as a service has them: from the call to the finished mp4,
everything in between included.  ``start`` is what Ray and the engines took before, once.  The draft engine
takes a fixed time for each window in a GPU's place (a shorter last window takes its share).

Beside our plan stands the source document's own: as many segments as GPUs, overlap half a window, whole
windows.  It measures planning, scheduling, transport and joining, not any model.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import wave
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from actors.driver import open_pool, render
from pipeline.plan import Plan, calculate_segments, naive_segments
from pipeline.request import RenderRequest
from pipeline.settings import Settings
from pipeline.timeline import FPS, SPEECH_RATE

LAPS = ("prepare", "render", "join")

GOALS = {2: 1.8, 4: 3.5, 8: 6.5}
"""The source document's numbers."""


def main() -> None:
    options = _options()
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        rows = [_row(Path(folder), options, gpus, naive=False) for gpus in options.renderers]
        if not options.no_naive:
            rows += [_row(Path(folder), options, gpus, naive=True) for gpus in options.renderers if gpus > 1]
    alone = rows[0]["seconds"]
    for row in rows:
        row["speedup"] = round(alone / row["seconds"], 2)
    ours = {str(row["renderers"]): row["speedup"] for row in rows if row["plan"] == "ours"}
    naive = {str(row["renderers"]): row["speedup"] for row in rows if row["plan"] == "document"}
    if options.json:
        settings = {"frames": options.frames, "window_seconds": options.window_seconds, "size": options.size}
        print(
            json.dumps({**settings, "engine": "draft", "speedup": ours, "speedup_naive": naive, "rows": rows})
        )
    else:
        print(_table(rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument(
        "--window-seconds", type=float, default=12.0, help="a window's time on the stand-in GPU"
    )
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels")
    parser.add_argument(
        "--renderers", type=int, nargs="+", default=[1, 2, 4, 8], help="the first is the reference"
    )
    parser.add_argument("--no-naive", action="store_true", help="leave the document's own plan out")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _row(folder: Path, options: argparse.Namespace, gpus: int, *, naive: bool) -> dict[str, Any]:
    """Render once; what it took."""
    image, audio = inputs(folder, options.frames)
    request = RenderRequest.checked(image=image, audio=audio, width=options.size, height=options.size)
    settings = Settings(engine="draft", draft_args=f"--draft-window-seconds {options.window_seconds}")
    output = folder / f"{gpus}{'-document' if naive else ''}.mp4"
    planner = naive_segments if naive else calculate_segments
    began = time.monotonic()
    with open_pool(settings, gpus) as pool:
        pool.start()
        ready = time.monotonic()
        result = render(request, settings, output, pool=pool, on_progress=lambda _: None, make_plan=planner)
        seconds = time.monotonic() - ready
    assert result.frames == options.frames
    plan: Plan = planner(options.frames, gpus)
    ideal = calculate_segments(options.frames, 1).makespan() / plan.makespan()
    return {
        "plan": "document" if naive else "ours",
        "renderers": gpus,
        "segments": result.segments_processed,
        "windows": sum(len(segment.windows) for segment in plan.segments),
        "seconds": round(seconds, 2),
        "start_seconds": round(ready - began, 2),
        "ideal": round(ideal, 2),
        **{f"{lap}_seconds": round(result.timings[f"{lap}_seconds"], 2) for lap in LAPS},
    }


def inputs(folder: Path, frames: int) -> tuple[Path, Path]:
    """A picture, and speech-like noise of exactly so many frames."""
    image, audio = folder / "portrait.png", folder / "speech.wav"
    if not image.exists():
        bundled = Path(__file__).resolve().parent.parent / "examples" / "portrait.png"
        with Image.open(bundled) as portrait:
            portrait.save(image)
        times = np.arange(frames * SPEECH_RATE // FPS) / SPEECH_RATE
        syllables = np.maximum(0, np.sin(2 * np.pi * 3 * times)) * np.sin(2 * np.pi * 180 * times)
        with wave.open(str(audio), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SPEECH_RATE)
            file.writeframes((syllables * 12_000).astype(np.int16).tobytes())
    return image, audio


def _table(rows: list[dict[str, Any]]) -> str:
    head = "plan      renderers  segments  windows  seconds  speed-up  ideal  goal"
    lines = [head + "  prepare   render     join    start"]
    for row in rows:
        goal = GOALS.get(row["renderers"], "")
        cells = (
            f"{row['plan']:<9} {row['renderers']:>9}  {row['segments']:>8}  {row['windows']:>7}",
            f"{row['seconds']:>7.1f}  {row['speedup']:>8.2f}  {row['ideal']:>5.2f}  {goal:>4}",
            *(f"{row[f'{lap}_seconds']:>7.1f}" for lap in (*LAPS, "start")),
        )
        lines.append("  ".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
