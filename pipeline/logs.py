"""Logs as JSON lines, so that what many nodes say of one job can be put together again: docs/timeline.md.

Each record has the fields that were given as ``extra``, those of the work that is in hand (``log_about``),
and those of the process (``write_json_logs``).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
OUR_LOGGERS = ("pipeline", "actors", "service")

_about: ContextVar[dict[str, Any] | None] = ContextVar("about", default=None)


@contextmanager
def log_about(**fields: Any) -> Iterator[None]:
    """What this thread logs meanwhile is about these: ``job``, ``segment``, ..."""
    token = _about.set({**(_about.get() or {}), **fields})
    try:
        yield
    finally:
        _about.reset(token)


def extra_fields(record: logging.LogRecord) -> dict[str, Any]:
    """What was given as ``extra``."""
    return {key: value for key, value in vars(record).items() if key not in STANDARD_FIELDS}


class JsonFormatter(logging.Formatter):
    """One JSON object on one line: ``time`` (UTC), ``level``, ``logger``, ``message``, then the fields."""

    def __init__(self, **process: Any) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._process,
            **(_about.get() or {}),
            **extra_fields(record),
        }
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


class _JsonHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Ours, so that it is not set up twice."""


def write_json_logs(wanted: str, **process: Any) -> None:
    """Where ``json`` is wanted: from now on the logs of this process are JSON lines on standard error.

    ``process``: fields that all its records have.  Ray keeps an actor's standard error among its node's logs,
    whoever started the actor; Ray's own ``LoggingConfig`` would come from each driver anew.
    """
    root = logging.getLogger()
    if wanted != "json" or any(isinstance(handler, _JsonHandler) for handler in root.handlers):
        return
    handler = _JsonHandler()
    handler.setFormatter(JsonFormatter(**process))
    root.addHandler(handler)
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
