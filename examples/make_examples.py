"""Makes the example media: the portrait drawn, the text of speech.txt spoken.

The media are committed, so nobody needs to run this (``python examples/make_examples.py``): it shows that
they are ours and how they came about.  Nothing imports it.
"""

from __future__ import annotations

import shutil
import subprocess
import wave
from pathlib import Path

import numpy as np
from drawing import draw_portrait

HERE = Path(__file__).resolve().parent


def speak(text: Path, target: Path) -> None:
    """Speaks the text with espeak-ng into a mono WAV of 22,050 samples per second, quiet ends cut off."""
    voice = ["-v", "en-us+f3", "-s", "155", "-p", "45", "-g", "1"]
    subprocess.run(["espeak-ng", *voice, "-f", str(text), "-w", str(target)], check=True)
    with wave.open(str(target)) as file:
        rate, samples = file.getframerate(), np.frombuffer(file.readframes(file.getnframes()), "<i2")
    loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > 200)
    margin = rate // 3
    with wave.open(str(target), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(samples[max(loud[0] - margin, 0) : loud[-1] + margin].tobytes())


def main() -> None:
    """Writes both media beside this file; keeps the speech as it is where espeak-ng is not installed."""
    draw_portrait().save(HERE / "portrait.png", optimize=True)
    if shutil.which("espeak-ng"):
        speak(HERE / "speech.txt", HERE / "speech.wav")
    else:
        print("espeak-ng is not installed: speech.wav stays as it is")


if __name__ == "__main__":
    main()
