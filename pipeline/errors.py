"""The errors of the whole project, one small tree, and nothing else.

    PipelineError
      InvalidRequest       the caller can fix it: a file, a size, an option
        JobInUse           another process has the job's directory
      ConfigurationError   the operator can fix it: an engine, a port range, ffmpeg
      StorageError         no space left, or a place that can't be written
      WorkflowError        a workflow file and the code disagree
      GraphError           the engine refused or failed a graph; another try would end the same way
        OutOfMemory        the GPU's memory was short; less on the GPU, or smaller pictures, would help
      EngineError          the engine process died, never came up, or went silent
      RendererLost         a renderer is gone in the middle of a segment; the segment deserves another try
      RenderFailed         a segment can't be made; ends the job
      MediaError           ffmpeg, a decoder or the vocal separator failed on our own files
      DownloadError        a weight did not arrive whole; the same command goes on with it
      JobCancelled         somebody asked for it
      JobNotFound          there is no such job (any more)
      JobConflict          the job's state, or another request, is in the way
      QueueFull            too many jobs wait; later there is room again

Every field goes to ``super().__init__`` by position, so that the errors survive pickling (Ray).
Foreign errors become these where they enter: ``comfy_client``, ``engine``, ``ffmpeg``, ``actors.pool``.
"""

from __future__ import annotations

import re


class PipelineError(Exception):
    """Base of all errors that a user may see; ``str()`` is one sentence for people, without a traceback."""


def code_of(error: PipelineError) -> str:
    """The error's name for programs.

    >>> code_of(RenderFailed(0, "no renderer is left")), code_of(InvalidRequest("audio", "is empty"))
    ('render_failed', 'invalid_input')
    """
    if isinstance(error, InvalidRequest):
        return "invalid_input"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()


class InvalidRequest(PipelineError):
    """The request can't be met as it is; the message says what to change."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field, self.reason = field, reason

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


class JobInUse(InvalidRequest):
    """Another process holds the job's directory; later it may be free."""

    def __init__(self, path: str) -> None:
        PipelineError.__init__(self, path)
        self.field, self.reason = "job", f"{path} is being rendered by another process"


class ConfigurationError(PipelineError):
    """The machine or a setting is not fit to render; the message names the setting."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class StorageError(PipelineError):
    """A file can't be written: no space left, read-only, no permission."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"can't write {self.path}: {self.reason}"


class WorkflowError(PipelineError):
    """A workflow file lacks a slot, has an unknown one, or is no API-format graph."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        return f"workflow {self.file}: {self.reason}"


class GraphError(PipelineError):
    """The engine refused or failed a graph: the node's name and the engine's own words."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(node, reason)
        self.node, self.reason = node, reason

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}" if self.node else self.reason


class OutOfMemory(GraphError):
    """A node ran out of memory."""


class EngineError(PipelineError):
    """The engine process died, did not come up in time, or stopped answering.

    ``log`` is the tail of the engine's log, shown below the sentence.
    """

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason, log)
        self.reason, self.log = reason, log

    def __str__(self) -> str:
        if not self.log:
            return self.reason
        tail = "\n".join(f"    | {line}" for line in self.log.splitlines())
        return f"{self.reason}; the end of its log:\n{tail}"


class RendererLost(PipelineError):
    """A renderer was lost while it had a segment; never leaves ``render_all``."""

    def __init__(self, segment: int, reason: str) -> None:
        super().__init__(segment, reason)
        self.segment, self.reason = segment, reason

    def __str__(self) -> str:
        return f"segment {self.segment}: {self.reason}"


class RenderFailed(PipelineError):
    """A segment can't be rendered; the job ends."""

    def __init__(self, segment: int, reason: str) -> None:
        super().__init__(segment, reason)
        self.segment, self.reason = segment, reason

    def __str__(self) -> str:
        return f"segment {self.segment} can't be rendered: {self.reason}"


class MediaError(PipelineError):
    """ffmpeg, a decoder or the vocal separator failed on a file of ours; carries what it said."""

    def __init__(self, what: str, log: str = "") -> None:
        super().__init__(what, log)
        self.what, self.log = what, log

    def __str__(self) -> str:
        return f"{self.what}: {self.log.strip()}" if self.log.strip() else self.what


class DownloadError(PipelineError):
    """The transfer of a weight broke, or brought something else; the same command goes on with the rest."""


class JobCancelled(PipelineError):
    """The job was cancelled on request; finished segments and windows are kept."""

    def __init__(self, job: str) -> None:
        super().__init__(job)
        self.job = job

    def __str__(self) -> str:
        return f"job {self.job} was cancelled"


class JobNotFound(PipelineError):
    """There is no job of that name, or it was deleted."""

    def __init__(self, job: str) -> None:
        super().__init__(job)
        self.job = job

    def __str__(self) -> str:
        return f"job {self.job} is not known (any more)"


class JobConflict(PipelineError):
    """The job is in no state for this, or its key stands for something else."""

    def __init__(self, job: str, reason: str) -> None:
        super().__init__(job, reason)
        self.job, self.reason = job, reason

    def __str__(self) -> str:
        return f"job {self.job}: {self.reason}"


class QueueFull(PipelineError):
    """No more jobs are taken until some are done."""

    def __init__(self, queued: int) -> None:
        super().__init__(queued)
        self.queued = queued

    def __str__(self) -> str:
        return f"{self.queued} jobs are waiting already; try again later"
