"""What the index of jobs holds: its tables, and their rows as values.

What is done with them is ``job_index``'s business.  No Ray, no HTTP, no files of jobs.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa

JobState = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
FINAL: frozenset[JobState] = frozenset({"completed", "failed", "cancelled"})
EventKind = Literal["status", "progress", "segment", "log"]

TABLES = sa.MetaData()
JOBS = sa.Table(
    "jobs",
    TABLES,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("api", sa.String(16), nullable=False),
    sa.Column("owner", sa.String(100), nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("created", sa.Float, nullable=False, index=True),
    sa.Column("started", sa.Float),
    sa.Column("finished", sa.Float),
    sa.Column("expires", sa.Float),
    sa.Column("execution_seconds", sa.Float),
    sa.Column("fields", sa.JSON, nullable=False),
    sa.Column("sources", sa.JSON, nullable=False),
    sa.Column("extra", sa.JSON, nullable=False),
    sa.Column("task", sa.JSON, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("stage", sa.String(16), nullable=False),
    sa.Column("progress", sa.Float, nullable=False),
    sa.Column("eta_seconds", sa.Float),
    sa.Column("detail", sa.JSON, nullable=False),
    sa.Column("error", sa.JSON),
    sa.Column("result", sa.JSON),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("idempotency_key", sa.String(255)),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("runner", sa.String(64)),
    sa.Column("lease_until", sa.Float),
    sa.Column("streamed", sa.Integer, nullable=False, default=0),
    sa.UniqueConstraint("owner", "idempotency_key"),
)
# Rows are long (plans, results): who only counts or sorts shall not read them.
sa.Index("jobs_in_order", JOBS.c.state, JOBS.c.priority.desc(), JOBS.c.created, JOBS.c.id)
sa.Index("jobs_over", JOBS.c.state, JOBS.c.finished, JOBS.c.bytes, JOBS.c.id)
EVENTS = sa.Table(
    "events",
    TABLES,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("job", sa.String(64), nullable=False, index=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
    sqlite_autoincrement=True,  # an id is never given twice: clients resume by it
)
WEBHOOKS = sa.Table(
    "webhooks",
    TABLES,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("job", sa.String(64), nullable=False, index=True),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("due", sa.Float, nullable=False, index=True),
)


@dataclass(frozen=True, slots=True)
class Job:
    """One job as the index knows it.  Times are seconds since 1970."""

    id: str
    state: JobState
    api: str
    """The door it came in by: ``v1``, ``runpod``, ``openai``."""
    owner: str
    """Name of the token that it came with."""
    priority: int
    """Higher goes first; the same goes by age."""
    created: float
    started: float | None
    finished: float | None
    expires: float | None
    """Still queued then, it fails."""
    execution_seconds: float | None
    """How long it may be in progress."""
    fields: dict[str, Any]
    """Of ``RenderRequest``, without the files."""
    sources: dict[str, dict[str, str]]
    """Where each file of the request comes from: ``pipeline.job_store.Source`` by field."""
    extra: dict[str, Any]
    """What only the job's API, its webhook or its upload need to know."""
    task: dict[str, Any]
    """What is to be done: ``{"kind": "render"}``, or a redo; with ``again`` where the job was over before."""
    attempt: int
    """How often a runner has taken it for this, without those that have put it back themselves."""
    stage: str
    progress: float
    """0 to 100, by windows."""
    eta_seconds: float | None
    detail: dict[str, Any]
    """Segments and GPUs, for people."""
    error: dict[str, Any] | None
    """``code, message, field`` of a failed job."""
    result: dict[str, Any] | None
    bytes: int
    """On disk, once it is finished."""
    idempotency_key: str | None

    @property
    def is_final(self) -> bool:
        return self.state in FINAL


@dataclass(frozen=True, slots=True)
class Standing:
    """A job, and where it stands."""

    job: Job
    ahead: int | None
    """Queued jobs that go before it; None where it is not queued itself."""


@dataclass(frozen=True, slots=True)
class NewJob:
    """What makes a job."""

    api: str
    owner: str
    fields: dict[str, Any]
    sources: dict[str, dict[str, str]]
    fingerprint: str
    """Digest of the request: the same idempotency key with another one is a mistake."""
    priority: int = 0
    idempotency_key: str | None = None
    queue_seconds: float | None = None
    execution_seconds: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job; ids rise."""

    id: int
    job: str
    at: float
    kind: EventKind
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Webhook:
    """A client's wish to be told of a job's end."""

    id: str
    job: str
    created: float
    attempts: int
    due: float
