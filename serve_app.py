"""The service on Ray Serve: ``serve run serve_app:app``.

Starts the HTTP application of ``service`` in each replica, and the runner that renders its jobs.
Settings are read from the environment of the process that serves (README).
"""

from __future__ import annotations

import logging

from fastapi import FastAPI
from ray import serve

from actors.job_runner import ensure_runner
from pipeline.job_store import JobStore
from pipeline.service_settings import ServiceSettings
from pipeline.settings import Settings
from service.app import create_app


def build() -> FastAPI:
    """The application of one replica."""
    logging.getLogger("service").setLevel(logging.INFO)
    service, settings = ServiceSettings.from_env(), Settings.from_env()
    return create_app(lambda: JobStore(service), lambda: ensure_runner(service, settings))


# max_ongoing_requests: listeners of events count too.  num_cpus=0: a replica only waits for others.
@serve.deployment(name="api", max_ongoing_requests=2000, ray_actor_options={"num_cpus": 0})
@serve.ingress(build)
class Api:
    """The HTTP application as a Serve deployment."""


app = Api.bind()  # type: ignore[attr-defined]
