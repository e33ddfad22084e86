"""Ray's errors become ours here, once."""

from __future__ import annotations

import logging

from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from pipeline.errors import EngineError, PipelineError

log = logging.getLogger(__name__)


def our_error(error: BaseException, who: str) -> PipelineError:
    """Ray's error as one of ours: what the actor raised, or ``EngineError`` for a lost actor.

    ``who`` begins the sentence, as in "the renderer of GPU 3".
    """
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, PipelineError):
            return cause
        log.error("%s failed in a way that nobody foresaw", who, exc_info=error)
        return PipelineError(f"{who}: {type(cause).__name__}: {cause}")
    if isinstance(error, RayActorError | ObjectLostError | GetTimeoutError):
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return EngineError(f"{who} is gone: {first_line}")
    return PipelineError(f"{who}: {type(error).__name__}: {error}")
