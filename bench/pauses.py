"""How many seams have a pause of the speech to fall into, with the planner knowing the pauses and without.

``python -m bench.pauses [SOUND ...]``; default: the bundled speech.  A speech is repeated to the length
wanted.  Counted are overlaps with a pause of at least 5 frames (a seam's change of texture) behind the frames
of warm-up; windows and makespan are printed because they must be the same.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from pipeline.pauses import CHANGE, Pauses, Ranges
from pipeline.plan import WARM_UP, Plan, calculate_segments
from pipeline.speech import find_pauses, prepare_speech

SPEECH = Path(__file__).resolve().parent.parent / "examples" / "speech.wav"
JOBS = ((1000, 4), (1000, 8), (2000, 8), (10_000, 8), (90_000, 8))


def hidden(plan: Plan, pauses: Ranges) -> int:
    """Seams of the plan that a pause can hide."""
    quiet = Pauses(pauses, plan.total_frames)
    return sum(
        quiet.within(right.start + WARM_UP, left.stop) >= CHANGE for left, right in pairwise(plan.segments)
    )


def main(sounds: list[Path]) -> None:
    """Print a table for each sound."""
    print("sound           last window  frames  GPUs  seams  in a pause: even, planned  windows    makespan")
    for sound in sounds:
        with tempfile.TemporaryDirectory() as folder:
            speech = prepare_speech(sound, Path(folder) / "speech.wav")
            once = find_pauses([speech.path], speech.frames)
        for partial in (True, False):
            for frames, gpus in JOBS:
                starts = range(0, frames, speech.frames)
                pauses = [(s + a, s + b) for s in starts for a, b in once if s + b <= frames]
                even, moved = (
                    calculate_segments(frames, gpus, partial_windows=partial, pauses=known)
                    for known in ((), pauses)
                )
                windows = [sum(len(s.windows) for s in plan.segments) for plan in (even, moved)]
                print(
                    f"{sound.name:15} {'shorter' if partial else 'whole':11} {frames:7} {gpus:5}"
                    f" {len(even.overlaps):6} {hidden(even, pauses):17}, {hidden(moved, pauses):7}"
                    f"  {windows[0]:4}, {windows[1]:4} {even.makespan():6.1f}, {moved.makespan():5.1f}"
                )


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]] or [SPEECH])
