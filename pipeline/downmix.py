"""Any number of channels to one, so that a voice survives wherever a recording has it.

The channels are averaged.  Where that would wipe the sound out, because the channels hold it in opposite
phase (a cable wired the wrong way round, "wide" effects), the strongest channel alone is taken.  Decided
for each half second of samples, with soft changes.  No files, no resampling, no loudness.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BLOCK = 8_000
"""Samples for which one decision holds: half a second at 16 kHz, some syllables."""

FADE = 320
"""Samples over which one way of mixing turns into another: 20 ms at 16 kHz."""

CANCELLED = 0.5
"""Share of the power that the average of unrelated channels has, below which they wipe each other out:
two equally strong channels get there at a correlation of -0.5.  A voice in one channel only has all of it."""

_CLEARLY_STRONGER = 2.0  # in power: which channel is taken shall not flutter

Samples = npt.NDArray[np.float32]


class Downmix:
    """Mixes a stream; ``feed`` it pieces [channels, samples] and ``flush`` it at the end.

    What comes out is as long as what went in, exact zeros where every channel has them.
    """

    def __init__(self, channels: int) -> None:
        self._channels = channels
        self._average = np.full(channels, 1 / channels, np.float32)
        self._weights = self._average
        self._waiting = np.zeros((channels, 0), np.float32)

    def feed(self, piece: Samples) -> Samples:
        """The mix of all whole blocks so far."""
        if self._channels == 1:
            alone: Samples = piece[0]
            return alone
        self._waiting = np.concatenate([self._waiting, piece], axis=1)
        whole = self._waiting.shape[1] // BLOCK * BLOCK
        ready, self._waiting = self._waiting[:, :whole], self._waiting[:, whole:]
        return self._mixed(ready)

    def flush(self) -> Samples:
        """The mix of what is left."""
        ready, self._waiting = self._waiting, self._waiting[:, :0]
        return self._mixed(ready)

    def _mixed(self, ready: Samples) -> Samples:
        out = np.empty(ready.shape[1], np.float32)
        for start in range(0, ready.shape[1], BLOCK):
            block = ready[:, start : start + BLOCK]
            before, self._weights = self._weights, self._chosen(block)
            out[start : start + BLOCK] = self._weights @ block
            if before is not self._weights:
                fading = block[:, :FADE]
                share = np.linspace(0, 1, fading.shape[1], dtype=np.float32)
                out[start : start + fading.shape[1]] += (1 - share) * ((before - self._weights) @ fading)
        return out

    def _chosen(self, block: Samples) -> Samples:
        """A weight for each channel."""
        powers = np.square(block, dtype=np.float32).sum(axis=1)
        unrelated = float(powers.sum()) / self._channels**2
        average = float(np.square(self._average @ block, dtype=np.float32).sum())
        if average >= CANCELLED * unrelated:  # silence too
            return self._average
        strongest = int(np.argmax(powers))
        if self._weights is not self._average:
            current = int(np.argmax(self._weights))
            if powers[strongest] < _CLEARLY_STRONGER * powers[current]:
                return self._weights
        alone = np.zeros(self._channels, np.float32)
        alone[strongest] = 1
        return alone
