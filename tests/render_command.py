"""``infinitetalk render`` in a process of its own, and what tests ask of it and of its video."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.draft_process import ROOT

SIZE = 96
SpeechOf = Callable[[int], Path]
ProcessesWith = Callable[[str], list[int]]
WaitGone = Callable[[Iterable[int], float], list[int]]
Talk = tuple["Command", Path, Path]
"""A finished run: the command, its output and its speech."""


class Command:
    """``infinitetalk render`` in a process of its own; its standard error is read as it comes."""

    def __init__(self, folder: Path, arguments: list[object], draft_args: str = "", **env: str) -> None:
        self.scratch = folder / "scratch"
        self.scratch.mkdir(exist_ok=True)
        self.lines: list[str] = []
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "infinitetalk", "render", *map(str, arguments)],
            cwd=ROOT,
            env={
                **os.environ,
                "INFINITETALK_SCRATCH_DIR": str(self.scratch),
                "INFINITETALK_ENGINE": "draft",
                "INFINITETALK_DRAFT_ARGS": draft_args,
                **env,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip())
                self._news.notify_all()
        with self._news:
            self.lines.append("(end)")
            self._news.notify_all()

    def wait_for(self, pattern: str, seconds: float = 300) -> str:
        """The first line of the log that has ``pattern`` in it."""

        def found() -> str | None:
            return next((line for line in self.lines if re.search(pattern, line)), None)

        with self._news:
            self._news.wait_for(lambda: found() or self.lines[-1:] == ["(end)"], seconds)
            line = found()
        assert line is not None, f"no {pattern!r} in the log:\n" + "\n".join(self.lines)
        return line

    def finish(self, seconds: float = 240) -> int:
        """Wait for the end; the exit code."""
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    @cached_property
    def result(self) -> dict[str, Any]:
        """What ``--json`` printed."""
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.read())
        return answer


def decoded(path: Path) -> list[np.ndarray[Any, Any]]:
    """All frames of a video, grey, counted by decoding."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]


def samples(path: Path) -> int:
    """Samples of the sound at 16 kHz, by decoding."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=16_000)
    with av.open(str(path)) as container:
        parts = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
        return sum(part.samples for part in [*parts, *resampler.resample(None)])


def wait_for_window(folder: Path, window: int, seconds: float = 300) -> None:
    """Wait until this window of every segment that is planned is stored in the job's directory."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        plans = list(folder.glob(".infinitetalk/*/plan.json"))
        count = len(json.loads(plans[0].read_text())["segments"]) if plans else 1
        if len(list(folder.glob(f".infinitetalk/*/segments/*.windows/{window:06d}/"))) == count:
            return
        time.sleep(0.05)
    raise AssertionError(f"window {window} was not stored within {seconds} s")


def base_directory(engine: int) -> Path:
    """The folder of an engine."""
    words = command_line(engine).split()
    return Path(words[words.index("--base-directory") + 1])


def engines_of(command: Command) -> list[int]:
    """Pids of the engines of a run."""
    return [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal() and is_engine(entry, str(command.scratch))
    ]


def command_line(pid: int) -> str:
    """The words of a process, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def is_engine(process: Path, scratch: str) -> bool:
    """Whether a process is an engine of this run, not its guard."""
    try:
        words = (process / "cmdline").read_bytes().decode().split("\0")
    except OSError:
        return False
    return words[1:3] == ["-m", "pipeline.draft"] and any(word.startswith(scratch) for word in words)
