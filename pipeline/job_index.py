"""The index of a service's jobs: one row for each job, one for each thing that happened to it.

The only truth about a job's state; what is rendered of it lies in its directory (``pipeline.job``).  SQLite
in a file, or PostgreSQL where several heads share one index.  Every change is one transaction, so any
process may die at any line.  No Ray, no HTTP, no files of jobs.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from pipeline.errors import JobConflict, JobNotFound, QueueFull
from pipeline.job_records import (
    EVENTS,
    FINAL,
    JOBS,
    TABLES,
    WEBHOOKS,
    Event,
    EventKind,
    Job,
    JobState,
    NewJob,
    Standing,
    Webhook,
)

_LOCK = 0x1F17A1C
"""Any number, the same for all."""
LEASE_SECONDS = 10.0
"""A runner that has not renewed its hold on a job for so long is dead; its jobs are queued again."""


class JobIndex:
    """All jobs of a service, behind one URL; safe for many processes at once."""

    def __init__(self, url: str) -> None:
        # A server may have been started anew.
        self._engine = sa.create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
        if self.in_a_file:
            _make_sqlite_dependable(self._engine)
        with self._engine.begin() as db:
            if not self.in_a_file:  # several heads start at once
                db.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            TABLES.create_all(db)
            for index in JOBS.indexes:  # of a version to come: tables that are there get them too
                index.create(db, checkfirst=True)

    @property
    def in_a_file(self) -> bool:
        """Whether it is on this machine's disk, and not at a server."""
        return self._engine.dialect.name == "sqlite"

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def _read(self) -> sa.Connection:
        return self._engine.connect().execution_options(reads=True)

    @contextmanager
    def _write_lazily(self) -> Iterator[sa.Connection]:
        """A transaction that a power cut may undo: of what is news for people, and no state of a job."""
        with self._engine.connect().execution_options(lazily=True) as db, db.begin():
            if not self.in_a_file:
                db.exec_driver_sql("SET LOCAL synchronous_commit TO off")
            yield db

    # --- clients ---------------------------------------------------------------------------------

    def add(self, new: NewJob, max_queued: int) -> tuple[Job, bool]:
        """Store a job; on return it is on disk.  False: its idempotency key is known, that job is given.

        Raises ``QueueFull``, ``JobConflict`` (the key stands for another request).
        """
        now = time.time()
        row = {
            "id": new.id,
            "state": "queued",
            "api": new.api,
            "owner": new.owner,
            "priority": new.priority,
            "created": now,
            "expires": None if new.queue_seconds is None else now + new.queue_seconds,
            "execution_seconds": new.execution_seconds,
            "fields": new.fields,
            "sources": new.sources,
            "extra": new.extra,
            "task": {"kind": "render"},
            "attempt": 0,
            "stage": "queued",
            "progress": 0.0,
            "detail": {},
            "bytes": 0,
            "idempotency_key": new.idempotency_key,
            "fingerprint": new.fingerprint,
        }
        try:
            with self._engine.begin() as db:
                if new.idempotency_key is not None and (known := self._same_key(db, new)):
                    return known, False
                queued = db.execute(_count(JOBS.c.state == "queued")).scalar_one()
                if queued >= max_queued:
                    raise QueueFull(queued)
                db.execute(JOBS.insert().values(row))
                _tell(db, new.id, "status", {"state": "queued"})
        except IntegrityError:  # two at once, on PostgreSQL
            with self._engine.begin() as db:
                known = self._same_key(db, new)
            if known is None:
                raise
            return known, False
        return self.get(new.id), True

    @staticmethod
    def _same_key(db: sa.Connection, new: NewJob) -> Job | None:
        same = (JOBS.c.owner == new.owner) & (JOBS.c.idempotency_key == new.idempotency_key)
        row = db.execute(sa.select(JOBS).where(same)).mappings().first()
        if row is None:
            return None
        if row["fingerprint"] != new.fingerprint:
            raise JobConflict(row["id"], "its idempotency key was used for another request")
        return _job(row)

    def get(self, job: str) -> Job:
        """Raises ``JobNotFound``."""
        with self._read() as db:
            row = db.execute(sa.select(JOBS).where(JOBS.c.id == job)).mappings().first()
        if row is None:
            raise JobNotFound(job)
        return _job(row)

    def jobs(
        self,
        *,
        api: str | None = None,
        owner: str | None = None,
        states: Iterable[JobState] | None = None,
        after: str | None = None,
        limit: int = 50,
        oldest_first: bool = False,
    ) -> list[Job]:
        """Jobs by age, newest first; ``after`` is the id of the last one of the page before."""
        query = sa.select(JOBS)
        for column, value in ((JOBS.c.api, api), (JOBS.c.owner, owner)):
            if value is not None:
                query = query.where(column == value)
        if states is not None:
            query = query.where(JOBS.c.state.in_(list(states)))
        key = sa.tuple_(JOBS.c.created, JOBS.c.id)
        if after is not None:
            last = self.get(after)
            mark = sa.tuple_(sa.literal(last.created), sa.literal(last.id))
            query = query.where(key > mark if oldest_first else key < mark)
        order = (JOBS.c.created, JOBS.c.id)
        query = query.order_by(*(order if oldest_first else [column.desc() for column in order])).limit(limit)
        with self._read() as db:
            return [_job(row) for row in db.execute(query).mappings()]

    def counts(self, api: str | None = None) -> dict[JobState, int]:
        """How many jobs are in each state."""
        query = sa.select(JOBS.c.state, sa.func.count().label("jobs")).group_by(JOBS.c.state)
        if api is not None:
            query = query.where(JOBS.c.api == api)
        with self._read() as db:
            found: dict[str, int] = {row.state: row.jobs for row in db.execute(query)}
        return {state: found.get(state, 0) for state in get_args(JobState)}

    def standings(self, jobs: Sequence[str]) -> dict[str, Standing]:
        """Those of the jobs that exist, as they are at one moment."""
        with self._read() as db:
            rows = db.execute(_STANDINGS.where(JOBS.c.id.in_(jobs))).mappings()
            return {row["id"]: Standing(_job(row), row["ahead"]) for row in rows}

    def standing(self, job: str) -> Standing:
        """One of them.  Raises ``JobNotFound``."""
        with self._read() as db:
            row = db.execute(_STANDING, {"job": job}).mappings().first()
        if row is None:
            raise JobNotFound(job)
        return Standing(_job(row), row["ahead"])

    def cancel(self, job: str) -> Job:
        """End a job that is not over; one that is stays as it is.  Its runner notices within a tick."""
        with self._engine.begin() as db:
            alive = JOBS.c.state.in_(["queued", "in_progress"])
            self._end(db, (JOBS.c.id == job) & alive, job, "cancelled")
        return self.get(job)

    def again(self, job: str, task: Mapping[str, Any], states: Sequence[JobState]) -> Job:
        """Queue a job that is over once more, to do ``task``, which is marked with ``again`` for its runner.

        Raises ``JobNotFound``, ``JobConflict`` when it is in none of ``states``.
        """
        with self._engine.begin() as db:
            done = db.execute(
                JOBS.update()
                .where((JOBS.c.id == job) & JOBS.c.state.in_(list(states)))
                .values(
                    state="queued",
                    stage="queued",
                    task={**task, "again": True},
                    attempt=0,
                    started=None,
                    finished=None,
                    expires=None,
                    error=None,
                    bytes=0,
                    progress=0.0,
                    eta_seconds=None,
                )
            )
            if done.rowcount:
                _tell(db, job, "status", {"state": "queued", "task": dict(task)})
        found = self.get(job)
        if not done.rowcount:
            raise JobConflict(job, f"it is {found.state}; this needs {' or '.join(states)}")
        return found

    def cancel_queued(self, api: str, owner: str) -> list[str]:
        """Cancel all queued jobs of an API and an owner; their ids."""
        mine = (JOBS.c.state == "queued") & (JOBS.c.api == api) & (JOBS.c.owner == owner)
        with self._engine.begin() as db:
            ids = list(db.execute(sa.select(JOBS.c.id).where(mine)).scalars())
            return [job for job in ids if self._end(db, (JOBS.c.id == job) & mine, job, "cancelled")]

    def delete(self, job: str) -> None:
        """Forget a job and its events.  Raises ``JobNotFound``, ``JobConflict`` while it is in progress."""
        with self._engine.begin() as db:
            gone = db.execute(JOBS.delete().where((JOBS.c.id == job) & (JOBS.c.state != "in_progress")))
            if gone.rowcount:
                db.execute(EVENTS.delete().where(EVENTS.c.job == job))
                db.execute(WEBHOOKS.delete().where(WEBHOOKS.c.job == job))
        if not gone.rowcount:
            self.get(job)
            raise JobConflict(job, "it is in progress; cancel it first")

    def events(self, job: str, after: int = 0, limit: int = 500) -> list[Event]:
        """What happened to a job after the event ``after``, in order."""
        query = (
            sa.select(EVENTS)
            .where((EVENTS.c.job == job) & (EVENTS.c.id > after))
            .order_by(EVENTS.c.id)
            .limit(limit)
        )
        with self._read() as db:
            return [Event(**row) for row in db.execute(query).mappings()]

    def states(self, jobs: Sequence[str]) -> dict[str, JobState]:
        """The states of those of the jobs that exist."""
        query = sa.select(JOBS.c.id, JOBS.c.state).where(JOBS.c.id.in_(list(jobs)))
        with self._read() as db:
            return {row.id: row.state for row in db.execute(query)}

    def take_stream(self, job: str, limit: int = 100) -> list[Event]:
        """A job's progress that was not taken yet; each event is given once, whoever asks."""
        with self._engine.begin() as db:
            mark = db.execute(sa.select(JOBS.c.streamed).where(JOBS.c.id == job)).scalar()
            if mark is None:
                raise JobNotFound(job)
            rows = db.execute(
                sa.select(EVENTS)
                .where((EVENTS.c.job == job) & (EVENTS.c.id > mark))
                .order_by(EVENTS.c.id)
                .limit(limit)
            ).mappings()
            found = [Event(**row) for row in rows]
            if found:
                db.execute(JOBS.update().where(JOBS.c.id == job).values(streamed=found[-1].id))
        return found

    def last_event(self) -> int:
        """The id of the newest event of all; cheap, to see whether there is any news."""
        with self._read() as db:
            return db.execute(sa.select(sa.func.max(EVENTS.c.id))).scalar() or 0

    def newest_events(self, after: int) -> dict[str, int]:
        """The id of each job's newest event, of the jobs that have one after ``after``."""
        query = sa.select(EVENTS.c.job, sa.func.max(EVENTS.c.id).label("newest")).where(EVENTS.c.id > after)
        with self._read() as db:
            return {row.job: row.newest for row in db.execute(query.group_by(EVENTS.c.job))}

    # --- runners ---------------------------------------------------------------------------------

    def claim(self, runner: str) -> Job | None:
        """Take the next queued job, for as long as ``keep`` is called in time; None when there is none."""
        now = time.time()
        following = (
            sa.select(JOBS.c.id)
            .where((JOBS.c.state == "queued") & (JOBS.c.expires.is_(None) | (JOBS.c.expires > now)))
            .order_by(JOBS.c.priority.desc(), JOBS.c.created, JOBS.c.id)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        with self._engine.begin() as db:
            job = db.execute(following).scalar()
            if job is None:
                return None
            db.execute(
                JOBS.update()
                .where(JOBS.c.id == job)
                .values(
                    state="in_progress",
                    stage="preparing",
                    runner=runner,
                    lease_until=now + LEASE_SECONDS,
                    started=sa.func.coalesce(JOBS.c.started, now),
                    attempt=JOBS.c.attempt + 1,
                )
            )
            _tell(db, job, "status", {"state": "in_progress"})
        return self.get(job)

    def keep(self, job: str, runner: str, **values: Any) -> bool:
        """Renew the hold on a job, and store ``stage, progress, eta_seconds, detail`` where given.

        False: the job was cancelled or belongs to another runner by now; stop at once.
        """
        with self._write_lazily() as db:
            done = db.execute(
                JOBS.update()
                .where(_held(job, runner))
                .values(lease_until=time.time() + LEASE_SECONDS, **values)
            )
        return bool(done.rowcount)

    def set_extra(self, job: str, extra: Mapping[str, Any]) -> None:
        """Replace what only the API, the webhook and the upload need to know."""
        with self._engine.begin() as db:
            db.execute(JOBS.update().where(JOBS.c.id == job).values(extra=dict(extra)))

    def set_bytes(self, job: str, size: int) -> None:
        """What a job takes on the disk."""
        with self._engine.begin() as db:
            db.execute(JOBS.update().where(JOBS.c.id == job).values(bytes=size))

    def tell(self, job: str, kind: EventKind, data: Mapping[str, Any]) -> None:
        """Add an event; none to a job that was deleted meanwhile."""
        row = {"job": job, "at": time.time(), "kind": kind, "data": dict(data)}
        values = [sa.literal(value, EVENTS.c[name].type) for name, value in row.items()]
        with self._write_lazily() as db:
            db.execute(EVENTS.insert().from_select(list(row), sa.select(*values).where(JOBS.c.id == job)))

    def finish(
        self,
        job: str,
        runner: str,
        state: Literal["completed", "failed"],
        *,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
        size: int = 0,
    ) -> bool:
        """End a job that ``runner`` holds; False where it does not hold it any more.

        A redo that failed leaves the result of before.
        """
        values: dict[str, Any] = {"bytes": size, "error": None if error is None else dict(error)}
        if result is not None:
            values |= {"result": dict(result), "progress": 100.0, "eta_seconds": 0.0}
        with self._engine.begin() as db:
            return self._end(db, _held(job, runner), job, state, **values)

    def correct(self, job: str, result: Mapping[str, Any]) -> None:
        """Replace the result of a cancelled job by what is on the disk."""
        with self._engine.begin() as db:
            cancelled = (JOBS.c.id == job) & (JOBS.c.state == "cancelled")
            db.execute(JOBS.update().where(cancelled).values(result=dict(result)))

    def requeue(self, job: str, runner: str, *, counts: bool = False) -> None:
        """Put a job back that its runner holds but can't go on with (it is being stopped, GPUs are gone).

        The attempt is taken back, unless it ``counts``.
        """
        with self._engine.begin() as db:
            self._back(db, _held(job, runner), job, **({} if counts else {"attempt": JOBS.c.attempt - 1}))

    def recover(self) -> list[str]:
        """Queue the jobs again whose runner is dead; their ids."""
        lost = (JOBS.c.state == "in_progress") & (JOBS.c.lease_until < time.time())
        back = []
        for job in self._ids(lost):
            with self._engine.begin() as db:
                if self._back(db, (JOBS.c.id == job) & lost, job):
                    back.append(job)
        return back

    def expire(self) -> list[str]:
        """Fail the queued jobs whose time is over; their ids."""
        late = (JOBS.c.state == "queued") & (JOBS.c.expires < time.time())
        error = {"code": "expired", "message": "the job waited longer than its time to live", "field": None}
        ended = []
        for job in self._ids(late):
            with self._engine.begin() as db:
                if self._end(db, (JOBS.c.id == job) & late, job, "failed", error=error):
                    ended.append(job)
        return ended

    def _ids(self, which: sa.ColumnElement[bool]) -> list[str]:
        """Looked for without the lock for writing: mostly there is none."""
        with self._read() as db:
            return list(db.execute(sa.select(JOBS.c.id).where(which)).scalars())

    def due_webhook(self, hold_seconds: float) -> Webhook | None:
        """Take the webhook whose time has come; nobody else gets it for so many seconds."""
        now = time.time()
        query = sa.select(WEBHOOKS).where(WEBHOOKS.c.due <= now).order_by(WEBHOOKS.c.due).limit(1)
        with self._engine.begin() as db:
            row = db.execute(query.with_for_update(skip_locked=True)).mappings().first()
            if row is None:
                return None
            db.execute(
                WEBHOOKS.update()
                .where(WEBHOOKS.c.id == row["id"])
                .values(due=now + hold_seconds, attempts=WEBHOOKS.c.attempts + 1)
            )
        return Webhook(**row)

    def webhook_later(self, webhook: str, seconds: float) -> None:
        """Another try then."""
        with self._engine.begin() as db:
            db.execute(WEBHOOKS.update().where(WEBHOOKS.c.id == webhook).values(due=time.time() + seconds))

    def webhook_done(self, webhook: str) -> None:
        """Delivered, or given up."""
        with self._engine.begin() as db:
            db.execute(WEBHOOKS.delete().where(WEBHOOKS.c.id == webhook))

    def finished_sizes(self) -> list[tuple[str, float, int]]:
        """Id, end and bytes (0: not weighed) of the jobs that are over, the oldest end first."""
        query = (
            sa.select(JOBS.c.id, JOBS.c.finished, JOBS.c.bytes)
            .where(JOBS.c.state.in_(sorted(FINAL)))
            .order_by(JOBS.c.finished)
        )
        with self._read() as db:
            return [(row.id, row.finished, row.bytes) for row in db.execute(query)]

    def finished_bytes(self) -> int:
        """What the jobs that are over take on the disk."""
        query = sa.select(sa.func.sum(JOBS.c.bytes)).where(JOBS.c.state.in_(sorted(FINAL)))
        with self._read() as db:
            return int(db.execute(query).scalar() or 0)

    def _back(self, db: sa.Connection, which: sa.ColumnElement[bool], job: str, **values: Any) -> bool:
        values |= {"state": "queued", "stage": "queued", "runner": None, "lease_until": None}
        done = db.execute(JOBS.update().where(which).values(values))
        if done.rowcount:
            _tell(db, job, "status", {"state": "queued", "reason": "its runner ended"})
        return bool(done.rowcount)

    def _end(
        self, db: sa.Connection, which: sa.ColumnElement[bool], job: str, state: JobState, **values: Any
    ) -> bool:
        done = db.execute(
            JOBS.update()
            .where(which)
            .values(state=state, stage=state, finished=time.time(), runner=None, lease_until=None, **values)
        )
        if done.rowcount:
            said = {"state": state} | ({"error": values["error"]} if values.get("error") else {})
            _tell(db, job, "status", said)
            extra = db.execute(sa.select(JOBS.c.extra).where(JOBS.c.id == job)).scalar_one()
            if extra.get("webhook"):
                now = time.time()
                row = {"id": f"msg_{uuid.uuid4().hex}", "job": job, "created": now, "attempts": 0, "due": now}
                db.execute(WEBHOOKS.insert().values(row))
        return bool(done.rowcount)


def _held(job: str, runner: str) -> sa.ColumnElement[bool]:
    return (JOBS.c.id == job) & (JOBS.c.state == "in_progress") & (JOBS.c.runner == runner)


def _standings() -> sa.Select[Any]:
    other = JOBS.alias("other")
    older = sa.tuple_(other.c.created, other.c.id) < sa.tuple_(JOBS.c.created, JOBS.c.id)
    before = (other.c.priority > JOBS.c.priority) | ((other.c.priority == JOBS.c.priority) & older)
    ahead = sa.select(sa.func.count()).where((other.c.state == "queued") & before).scalar_subquery()
    return sa.select(JOBS, sa.case((JOBS.c.state == "queued", ahead)).label("ahead"))


_STANDINGS = _standings()
_STANDING = _STANDINGS.where(JOBS.c.id == sa.bindparam("job"))
"""Asked for more often than all else: made once, and without a list of a length that changes."""


def _count(which: sa.ColumnElement[bool]) -> sa.Select[int]:
    return sa.select(sa.func.count()).select_from(JOBS).where(which)


def _tell(db: sa.Connection, job: str, kind: EventKind, data: Mapping[str, Any]) -> None:
    db.execute(EVENTS.insert().values(job=job, at=time.time(), kind=kind, data=dict(data)))


def _job(row: Mapping[Any, Any]) -> Job:
    return Job(**{column.name: row[column.name] for column in fields(Job)})


def _make_sqlite_dependable(engine: sa.Engine) -> None:
    """Write-ahead log, flushed at every commit of a state; a transaction takes the write lock when it begins.

    Python's sqlite3 would begin late, and two writers would fail with "database is locked".
    https://docs.sqlalchemy.org/en/20/dialects/sqlite.html#pysqlite-serializable
    """

    @sa.event.listens_for(engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA busy_timeout=20000")
        connection.execute("PRAGMA journal_mode=WAL")

    @sa.event.listens_for(engine, "begin")
    def begun(connection: sa.Connection) -> None:
        options = connection.get_execution_options()
        if options.get("reads"):  # one query each: it needs no transaction around it
            return
        # What is written lazily reaches the disk with the next commit that does not.
        flush = "NORMAL" if options.get("lazily") else "FULL"
        connection.exec_driver_sql(f"PRAGMA synchronous={flush}")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
