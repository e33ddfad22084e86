"""Errors as HTTP answers: one table, one JSON shape.

    {"error": {"code": "invalid_request", "message": "...", "field": "image", "job_id": null}}

APIs that clients already speak put the same words into their own shape.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import (
    ConfigurationError,
    InvalidRequest,
    JobConflict,
    JobNotFound,
    PipelineError,
    QueueFull,
    StorageError,
)

RETRY_AFTER_SECONDS = 10


class Refused(Exception):
    """An answer other than success that is the service's own: no token, too large, not acceptable."""

    def __init__(self, status: int, code: str, message: str, field: str | None = None) -> None:
        super().__init__(status, code, message, field)
        self.status, self.code, self.message, self.field = status, code, message, field


STATUS: dict[type[PipelineError], tuple[int, str]] = {
    InvalidRequest: (400, "invalid_request"),
    JobNotFound: (404, "not_found"),
    JobConflict: (409, "conflict"),
    QueueFull: (429, "queue_full"),
    ConfigurationError: (503, "not_configured"),
    StorageError: (507, "no_space"),
    PipelineError: (500, "internal_error"),
}
"""The one table of errors and HTTP."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What a client is told."""

    status: int
    code: str
    message: str
    field: str | None = None
    job_id: str | None = None

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON of our own API."""
        return {
            "error": {
                "code": self.code,
                "message": self.message,
                "field": self.field,
                "job_id": self.job_id,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """More headers of the answer."""
        if self.status == 429:
            return {"Retry-After": str(RETRY_AFTER_SECONDS)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def failure_of(error: Exception) -> Failure:
    """Any error as an answer; of those that nobody foresaw, nothing but that leaves the server."""
    if isinstance(error, Refused):
        return Failure(error.status, error.code, error.message, error.field)
    for kind in type(error).__mro__:
        if kind in STATUS:
            status, code = STATUS[kind]
            field, job = getattr(error, "field", None), getattr(error, "job", None)
            message = str(error) if status != 500 else "an error inside the service; its log tells more"
            return Failure(status, code, message, field, job)
    return Failure(500, "internal_error", "an error inside the service; its log tells more")
