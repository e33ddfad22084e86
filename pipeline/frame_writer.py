"""Frames in, one encoded file out, as long as the writer is open.

How ffmpeg is started and what its failures mean is ``ffmpeg``'s; which frames go where ``segment_files``'s.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from pipeline.errors import MediaError, StorageError
from pipeline.ffmpeg import Encoding, failure, start_encoder
from pipeline.frames import Frame


class Writer(ABC):
    """A context manager that closes when its block ends well, and aborts when it does not."""

    @abstractmethod
    def close(self) -> None:
        """Finish what was written.  Raises ``MediaError``, ``StorageError``; nothing is left then."""

    @abstractmethod
    def abort(self) -> None:
        """Leave nothing of what was written."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class FrameWriter(Writer):
    """Encodes RGB frames into one file.  Leaving it by an exception kills ffmpeg and removes the file."""

    def __init__(self, target: Path, width: int, height: int, encoding: Encoding) -> None:
        self.frames = 0
        self._target, self._shape = target, (height, width, 3)
        self._process = start_encoder(target, width, height, encoding)
        self._said: deque[str] = deque(maxlen=20)
        # An undrained stderr fills its pipe and stops ffmpeg in the middle.
        self._drain = threading.Thread(target=self._listen, name="ffmpeg-stderr", daemon=True)
        self._drain.start()

    def write(self, frame: Frame) -> None:
        """Append one frame, uint8 [H, W, 3].  Raises ``MediaError``, ``StorageError``."""
        if frame.shape != self._shape or frame.dtype != np.uint8:
            raise ValueError(f"frame is {frame.dtype} {frame.shape}, file takes uint8 {self._shape}")
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(np.ascontiguousarray(frame).data)
        except BrokenPipeError:
            self.close()
            raise MediaError(f"ffmpeg ended before {self._target.name} was complete") from None
        self.frames += 1

    def close(self) -> None:
        """Finish the file.  Raises ``MediaError``, ``StorageError``; the file is then removed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        code = self._process.wait()
        self._drain.join()
        if code:
            self._target.unlink(missing_ok=True)
            raise failure(f"encode {self._target.name}", self._target, code, "\n".join(self._said))

    def abort(self) -> None:
        """Kill ffmpeg and remove the file."""
        self._process.kill()
        with contextlib.suppress(MediaError, StorageError):
            self.close()
        self._target.unlink(missing_ok=True)

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            for line in stderr:
                self._said.append(line.decode(errors="replace").rstrip())
