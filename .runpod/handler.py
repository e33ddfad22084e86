"""The worker on RunPod: takes jobs from RunPod's queue and renders each on all GPUs of its machine.

A job takes the service's way without its HTTP: ``service.api_runpod`` understands the input, the store keeps
it, the runner renders it.  Here is only what lies between RunPod's SDK and the store.

    python .runpod/handler.py                   on RunPod
    python .runpod/handler.py --rp_serve_api    the SDK's local server, to try it anywhere
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import ray
import runpod

from actors.cluster import cluster
from actors.job_runner import ensure_runner, stop_runner
from pipeline.errors import ConfigurationError, JobNotFound, PipelineError
from pipeline.job_records import Job
from pipeline.job_store import JobStore
from pipeline.runpod_words import output
from pipeline.service_settings import ServiceSettings
from pipeline.settings import Settings
from service.api_runpod import read_envelope, submission
from service.intake import submit
from service.news import News

LOOK_SECONDS = 0.5
EXIT_SETUP = 3


class Worker:
    """The jobs of one worker.  RunPod hands out one at a time."""

    def __init__(self, service: ServiceSettings, settings: Settings) -> None:
        self._service, self._settings = service, settings
        self._store = JobStore(service)

    def warm_up(self) -> None:
        """Return when a GPU's engine answers; until then RunPod hands out no job to this worker.

        Raises ``ConfigurationError`` with what the engines say when none does.
        """
        runner = ensure_runner(self._service, self._settings)
        deadline = time.monotonic() + self._settings.ready_seconds
        while True:
            state = ray.get(runner.state.remote())
            if state["gpus"]:
                return
            if state["trouble"] or time.monotonic() > deadline:
                raise ConfigurationError(state["trouble"] or "no engine answers")
            time.sleep(LOOK_SECONDS)

    async def render(self, given: dict[str, Any]) -> dict[str, Any]:
        """A handler: progress is what ``/status`` shows meanwhile, the answer is the hub handler's object."""
        last: dict[str, Any] = {}
        async with aclosing(self.stream(given)) as pieces:
            async for last in pieces:
                if "progress" in last:
                    runpod.serverless.progress_update(given, last)
        return last

    async def stream(self, given: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """A handler that yields progress, and last the answer or ``{"error": ...}``.

        RunPod cancels by ending it, at its time limits too: the job is cancelled then, and GPUs are free
        within seconds.
        """
        try:
            # Webhooks and time limits of the envelope are RunPod's own business; it hands on the bucket.
            asked = read_envelope({name: given[name] for name in ("input", "s3Config") if given.get(name)})
            ensure_runner(self._service, self._settings)
            # Not in a thread: a cancel in between would leave a job that nobody follows.
            job, _ = submit(self._store, submission(asked, "runpod", self._store))
        except PipelineError as error:
            yield {"error": str(error)}
            return
        news = News(self._store.index)
        watching = asyncio.create_task(news.watch())
        try:
            async for event in news.events(job.id, 0):
                if event is not None and event.kind in ("progress", "segment"):
                    yield event.data
            yield await asyncio.to_thread(self._answer, job.id)
        finally:
            watching.cancel()
            with suppress(JobNotFound):  # it was over, and answered
                self._store.index.cancel(job.id)
                self._store.delete(job.id)

    def _answer(self, name: str) -> dict[str, Any]:
        """What a job that is over gives.  It is deleted: nobody can ask this worker again."""
        job: Job = self._store.index.get(name)
        if job.state == "completed":
            answer = output(job, self._store)
        else:
            answer = {"error": job.error["message"] if job.error else "the job was cancelled"}
        self._store.delete(name)
        return answer


def main() -> int:
    """Start Ray, the engines, and the SDK's loop; the exit code."""
    try:
        service, settings = ServiceSettings.from_env(), Settings.from_env()
        with cluster(settings, None):
            try:
                worker = Worker(service, settings)
                worker.warm_up()
                handler = worker.stream if service.runpod_stream else worker.render
                runpod.serverless.start({"handler": handler, "return_aggregate_stream": True})
            finally:
                stop_runner()
    except PipelineError as error:
        print(f"infinitetalk: {error}", file=sys.stderr)
        return EXIT_SETUP
    return 0


if __name__ == "__main__":
    sys.exit(main())
