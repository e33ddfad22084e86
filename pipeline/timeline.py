"""Frames, seconds and samples: the one clock of the pipeline.

Integers are the truth: a video has 25 frames a second, the model's audio 16,000 samples, so frame
``f`` owns the samples ``[640 f, 640 (f + 1))``.  No files, no planning.
"""

from __future__ import annotations

FPS = 25
"""Frames per second that InfiniteTalk was trained at and its native node has built in."""

SPEECH_RATE = 16_000
"""Samples per second that wav2vec2 hears."""

SAMPLES_PER_FRAME = SPEECH_RATE // FPS


def frames_of(samples: int, rate: int, fps: int = FPS) -> int:
    """Frames of a video as long as ``samples`` at ``rate`` per second: ``round(seconds * fps)``, half up.

    Integer arithmetic: ``int(samples / rate * 25)`` is one short for many lengths.

    >>> frames_of(16_000 * 10, 16_000)
    250
    >>> frames_of(44_100 * 3 + 882, 44_100)
    76
    """
    return (2 * samples * fps + rate) // (2 * rate)
