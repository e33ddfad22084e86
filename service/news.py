"""Waiting for something to happen to jobs: one look at the index a moment serves all who wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from sqlalchemy.exc import SQLAlchemyError

from pipeline.job_index import JobIndex
from pipeline.job_records import FINAL, Event, Job

LOOK_SECONDS = 0.2
OVERLAP = 200
"""So many known events are looked at again: where several write to PostgreSQL at once, one with a lower id
may appear after one with a higher."""
KEEP_ALIVE_SECONDS = 15.0
REMEMBERED = 10_000
"""Jobs whose newest event is farther back than so many are not news to anyone who waits."""
PAGE = 500

log = logging.getLogger(__name__)


class News:
    """Tells waiting requests of this process when there are new events."""

    def __init__(self, index: JobIndex) -> None:
        self._index = index
        self._last = 0
        self._newest: dict[str, int] = {}
        """The newest event of each job that had one lately."""
        self._changed = asyncio.Condition()

    async def watch(self) -> None:
        """Look for news, for ever; run as a task."""
        while True:
            try:
                newest = await asyncio.to_thread(self._look)
            except SQLAlchemyError:
                log.exception("the index can't be read")
            else:
                if newest != self._newest:
                    async with self._changed:
                        self._newest = newest
                        self._changed.notify_all()
            await asyncio.sleep(LOOK_SECONDS)

    def _look(self) -> dict[str, int]:
        last = self._index.last_event()
        if last == self._last:
            return self._newest
        known, self._last = self._last or last, last
        newest = self._newest | self._index.newest_events(known - OVERLAP)
        return {job: event for job, event in newest.items() if event > last - REMEMBERED}

    async def wait(self, job: str, seen: int, seconds: float) -> bool:
        """Return when a job has an event after ``seen``, or the time is over: False."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: self.newest(job) > seen)
                return True
        return False

    def newest(self, job: str) -> int:
        """The newest event of a job; 0 where it had none lately."""
        return self._newest.get(job, 0)

    async def until_over(self, job: str, seconds: float) -> Job:
        """The job when it is over, or as it is after so many seconds.  Raises ``JobNotFound``."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            seen = self.newest(job)
            found = await asyncio.to_thread(self._index.get, job)
            left = deadline - loop.time()
            if found.is_final or left <= 0:
                return found
            await self.wait(job, seen, left)

    async def events(self, job: str, after: int) -> AsyncIterator[Event | None]:
        """A job's events after one, as they come, until it is over; None now and then, to keep a line up.

        Ends also when the job is deleted.
        """
        while True:
            found, over = await asyncio.to_thread(self._since, job, after)
            for event in found:
                after = event.id
                yield event
            if over:
                return
            if not found and not await self.wait(job, after, KEEP_ALIVE_SECONDS):
                yield None

    def _since(self, job: str, after: int) -> tuple[list[Event], bool]:
        """The next events after one, and whether they are the last."""
        state = self._index.states([job]).get(job)
        found = self._index.events(job, after, PAGE)  # read later: what ended the job is among them
        return found, (state is None or state in FINAL) and len(found) < PAGE
