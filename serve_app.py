"""The service on Ray Serve: ``serve run serve_app:app``.

Starts the HTTP application of ``service`` in each replica, and the runner that renders its jobs.
Settings are read from the environment of the process that serves (README).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import LoggingConfig

from actors import metrics
from actors.cluster import cluster, metrics_pages
from actors.job_runner import ensure_runner, stop_runner
from actors.pool_client import PoolClient
from actors.pool_look import pool_status
from pipeline.engine import engine_kind
from pipeline.errors import ConfigurationError
from pipeline.job import finished
from pipeline.logs import write_json_logs
from pipeline.service_settings import ServiceSettings
from pipeline.settings import PREFIX, Settings
from service.app import create_app
from service.tokens import Tokens, is_loopback

STATE_SECONDS = 2.0
LOGGING = LoggingConfig(enable_access_log=False)
"""Clients that poll would fill the disk with lines; requests are counted (``actors.metrics``)."""

FEWER_TURNS = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
"""How Serve hands a request on, from its performance guide: one loop in each process, gRPC from the proxy to
the replica.  A third less CPU time for each request (docs/load.md)."""

SETTINGS_FILE = "SERVED_SETTINGS_FILE"
"""In a replica's environment: the file that has the settings of the process that serves.

Its name alone passes through Ray, which shows environments to all who may look at the cluster.
"""

log = logging.getLogger(__name__)


class RayBackend:
    """The runner actor, as the application sees it."""

    def __init__(self, service: ServiceSettings, settings: Settings) -> None:
        self._service, self._settings = service, settings

    def ensure(self) -> None:
        """Start the runner where there is none."""
        self._runner = ensure_runner(self._service, self._settings)

    def state(self) -> dict[str, Any]:
        """What the runner says."""
        try:
            state: dict[str, Any] = ray.get(self._runner.state.remote(), timeout=STATE_SECONDS)
        except RayError as error:
            log.warning("the runner does not answer: %s", error)
            return {"gpus": 0, "starting": 0, "trouble": "the runner does not answer"}
        return state

    def pool(self) -> dict[str, Any] | None:
        """The status of the cluster's pool; None where there is none.  Raises ``PipelineError``."""
        return pool_status()


def build() -> FastAPI:
    """The application of one replica."""
    logging.getLogger("service").setLevel(logging.INFO)
    env = _environment()
    service, settings = ServiceSettings.from_env(env), Settings.from_env(env)
    write_json_logs(settings.log, node=socket.gethostname())
    return create_app(service, RayBackend(service, settings), metrics.http_answered)


def _environment() -> Mapping[str, str]:
    """What the settings of this replica are read from."""
    place = os.environ.get(SETTINGS_FILE)
    return os.environ if place is None else json.loads(Path(place).read_text())


# max_ongoing_requests: listeners of events count too.  num_cpus=0: a replica only waits for others.
# On the head: the data directory is on its disk, and with num_cpus=0 Ray would take any node.
@serve.deployment(
    name="api",
    max_ongoing_requests=2000,
    ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
    logging_config=LOGGING,
)
@serve.ingress(build)
class Api:
    """The HTTP application as a Serve deployment."""


app = Api.bind()  # type: ignore[attr-defined]


@contextmanager
def _with_our_settings(place: Path) -> Iterator[Any]:
    """The application with this process's settings: on a cluster, replicas have their node's environment.

    They are in the file ``place``, which nobody else can read, and which is gone afterwards.
    Raises ``StorageError``.
    """
    ours = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    with finished(place) as partial:
        partial.touch(0o600)
        partial.write_text(json.dumps(ours))
    environment = {"runtime_env": {"env_vars": {SETTINGS_FILE: str(place)}}}
    options = {**(Api.ray_actor_options or {}), **environment}  # type: ignore[attr-defined]
    try:
        yield Api.options(ray_actor_options=options).bind()  # type: ignore[attr-defined]
    finally:
        place.unlink(missing_ok=True)


def serve_until_stopped(host: str, port: int, gpus: int | None) -> int:
    """Start or join Ray, serve on ``host:port``, and on SIGINT or SIGTERM put everything down in order.

    The jobs in work go back into the queue, with what is rendered of them.
    Raises ``ConfigurationError``: nobody but this machine may be answered without tokens.
    """
    service, settings = ServiceSettings.from_env(), Settings.from_env()
    if not Tokens.read(service).secrets and not is_loopback(host):
        raise ConfigurationError(
            f"without tokens (INFINITETALK_SERVE_TOKENS) only --host 127.0.0.1 is served, not {host}"
        )
    for name, value in FEWER_TURNS.items():
        os.environ.setdefault(name, value)  # read when Ray's processes start
    stop = threading.Event()
    place = service.data / f"settings-{socket.gethostname()}-{port}.json"
    with _with_our_settings(place) as application, cluster(settings, gpus, service.metrics_port):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        http = {"host": host, "port": port}
        serve.start(proxy_location="HeadOnly", http_options=http, logging_config=LOGGING)
        serve.run(application, name="infinitetalk")
        print(f"serving on http://{host}:{port}, jobs in {service.data}", flush=True)  # noqa: T201
        if engine_kind(settings) == "draft":
            print("DRAFT ENGINE: previews that move the portrait, not the InfiniteTalk model", flush=True)  # noqa: T201
        print(f"metrics on {', '.join(metrics_pages())}", flush=True)  # noqa: T201
        stop.wait()
        stop_runner()
        if settings.ray_address == "local":
            PoolClient(settings).end()
        serve.shutdown()  # type: ignore[no-untyped-call]
    return 0
