"""Reading a job for a request, as cheaply as may be: a thousand clients that poll ask for little else.

SQLite is read at once, on the event loop: a look takes a fifth of a millisecond, a turn on a thread takes
longer, and Serve asks the proxy for more of the request, in a call of its own, as soon as the application
waits for anything.  A server's answer is waited for on a thread; those who ask meanwhile share the next
question.
"""

from __future__ import annotations

import asyncio

from pipeline.errors import JobNotFound
from pipeline.job_index import JobIndex
from pipeline.job_records import Standing


class JobReads:
    """Reads of one process; to be used on one event loop.  Closes its connections itself."""

    def __init__(self, url: str) -> None:
        self._index = JobIndex(url)  # its own: all connections of the other one may be at work
        self._wanted: dict[str, asyncio.Future[Standing]] = {}
        self._looking: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Give the connections back."""
        self._index.close()

    async def standing(self, job: str) -> Standing:
        """A job as it is now, and its place in the queue.  Raises ``JobNotFound``, SQLAlchemy's errors."""
        if self._index.in_a_file:
            return self._index.standing(job)
        found = self._wanted.get(job)
        if found is None:
            found = self._wanted[job] = asyncio.get_running_loop().create_future()
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        return await asyncio.shield(found)  # others may wait for it too

    async def _look(self) -> None:
        while self._wanted:
            wanted, self._wanted = self._wanted, {}
            try:
                found = await asyncio.to_thread(self._index.standings, list(wanted))
            except Exception as error:  # noqa: BLE001  whatever it is, those who wait are told
                for future in wanted.values():
                    future.set_exception(error)
                    future.exception()  # whoever asked may be gone
                continue
            for job, future in wanted.items():
                if job in found:
                    future.set_result(found[job])
                else:
                    future.set_exception(JobNotFound(job))
                    future.exception()
