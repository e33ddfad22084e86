"""Reading jobs for many requests at once: those that come while the index is being read share the next look.

A thousand clients that poll cost a query each otherwise, and a turn on a thread, which costs more.
"""

from __future__ import annotations

import asyncio

from pipeline.errors import JobNotFound
from pipeline.job_index import JobIndex
from pipeline.job_records import Standing


class JobReads:
    """Reads of one process; to be used on one event loop."""

    def __init__(self, index: JobIndex) -> None:
        self._index = index
        self._wanted: dict[str, asyncio.Future[Standing]] = {}
        self._looking: asyncio.Task[None] | None = None

    async def standing(self, job: str) -> Standing:
        """A job as it is now, and its place in the queue.  Raises ``JobNotFound``, SQLAlchemy's errors."""
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
