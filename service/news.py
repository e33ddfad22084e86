"""Waiting for something to happen to jobs: one look at the index a moment serves all who wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from sqlalchemy.exc import SQLAlchemyError

from pipeline.job_index import JobIndex
from pipeline.job_records import Event, Job

LOOK_SECONDS = 0.2
KEEP_ALIVE_SECONDS = 15.0

log = logging.getLogger(__name__)


class News:
    """Tells waiting requests of this process when there are new events."""

    def __init__(self, index: JobIndex) -> None:
        self._index = index
        self._last = 0
        self._changed = asyncio.Condition()

    async def watch(self) -> None:
        """Look for news, for ever; run as a task."""
        while True:
            try:
                last = await asyncio.to_thread(self._index.last_event)
            except SQLAlchemyError:
                log.exception("the index can't be read")
            else:
                if last != self._last:
                    async with self._changed:
                        self._last = last
                        self._changed.notify_all()
            await asyncio.sleep(LOOK_SECONDS)

    async def wait(self, seen: int, seconds: float) -> int:
        """Return when there is an event after ``seen``, or the time is over; the newest event's id."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: self._last > seen)
        return self._last

    async def until_over(self, job: str, seconds: float) -> Job:
        """The job when it is over, or as it is after so many seconds.  Raises ``JobNotFound``."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            seen = self._last
            found = await asyncio.to_thread(self._index.get, job)
            left = deadline - loop.time()
            if found.is_final or left <= 0:
                return found
            await self.wait(seen, left)

    async def events(self, job: str, after: int) -> AsyncIterator[Event | None]:
        """A job's events after one, as they come, until it is over; None now and then, to keep a line up.

        Ends also when the job is deleted.
        """
        while True:
            seen = self._last
            found = await asyncio.to_thread(self._index.events, job, after)
            for event in found:
                after = event.id
                yield event
            if found:
                continue
            state = await asyncio.to_thread(self._index.states, [job])
            if state.get(job, "cancelled") in ("completed", "failed", "cancelled"):
                # What was told between the two looks.
                for event in await asyncio.to_thread(self._index.events, job, after):
                    yield event
                return
            if await self.wait(seen, KEEP_ALIVE_SECONDS) == seen:
                yield None
