"""Ray itself: starting it on this machine or joining a cluster, and how many lanes it offers.

What runs on it is in ``pool`` and ``renderer``.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address_or_die

from pipeline.devices import visible_gpus
from pipeline.engine import runs_on_cpu
from pipeline.errors import ConfigurationError, InvalidRequest
from pipeline.settings import Settings

DEFAULT_DRAFT_LANES = 2
OBJECT_STORE_BYTES = 512 << 20
"""Segments pass through one at a time; a local Ray would reserve a third of the memory otherwise."""

CONNECT_SECONDS = 10.0

log = logging.getLogger(__name__)


def check_gpus(gpus: int | None) -> None:
    """Raises ``InvalidRequest`` for a number of GPUs that is none."""
    if gpus is not None and gpus < 1:
        raise InvalidRequest("gpus", f"{gpus} is not a number of GPUs; give 1 or more")


def _init(address: str, options: dict[str, Any], *, hide_gpus: bool) -> None:
    """``ray.init``, with its errors as ours and the signal handlers as they were.

    ``hide_gpus``: lanes on the CPU are not to be counted against CUDA_VISIBLE_DEVICES.
    """
    _check_reachable(_found_here() if address == "auto" else address)
    hidden = os.environ.pop("CUDA_VISIBLE_DEVICES", None) if hide_gpus else None
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _try_init(address, options)
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        what = "Ray did not start" if address == "local" else f"can't join Ray at {address}"
        remedy = (
            "the machine may be too busy or too full (memory, /dev/shm, disk); try again"
            if address == "local"
            else "is INFINITETALK_RAY_ADDRESS right, and is Ray of the same version running there?"
        )
        raise ConfigurationError(f"{what}: {words}; {remedy}") from error
    finally:
        if hidden is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = hidden
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # ray.init puts its own in its place


def _try_init(address: str, options: dict[str, Any]) -> None:
    """``ray.init``; for a Ray of our own twice: a raylet ends where its agents take more than 15 s to start
    (ray-project/ray issue 65983), as they do on a busy machine, and the second time they are in its cache."""
    for last in (False, True) if address == "local" else (True,):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
            return
        except Exception as error:
            ray.shutdown()
            if last:
                raise
            log.warning("Ray did not start, and is started once more: %s", error)


@contextmanager
def connection(address: str) -> Iterator[None]:
    """A connection to a running cluster, to ask it something.  Raises ``ConfigurationError``."""
    _init(address, {}, hide_gpus=False)
    try:
        yield
    finally:
        ray.shutdown()


def _found_here() -> str:
    """Where this machine's Ray listens.  Ray itself looks for one at another of the machine's addresses, for
    minutes, where it listens on loopback only.  Raises ``ConfigurationError``."""
    try:
        return canonicalize_bootstrap_address_or_die("auto")
    except ConnectionError as error:
        raise ConfigurationError(
            f"can't join Ray: {' '.join(str(error).split())}; INFINITETALK_RAY_ADDRESS=HOST:PORT says which"
        ) from None


def _check_reachable(address: str) -> None:
    """Ray itself looks for a head that is not there for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        return  # "local"
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigurationError(
            f"can't join Ray at {address}: {error.strerror or error}; is INFINITETALK_RAY_ADDRESS right?"
        ) from None


def _no_more_than(gpus: int | None) -> int | None:
    """So many of this machine's GPUs; None: all that Ray finds."""
    return None if gpus is None else min(gpus, len(visible_gpus()))


def metrics_pages() -> list[str]:
    """Where each node of the cluster shows its metrics."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]


@contextmanager
def cluster(settings: Settings, gpus: int | None, metrics_port: int | None = None) -> Iterator[int]:
    """Start or join Ray; yields the number of lanes, one for each GPU.

    ``metrics_port`` is for a Ray started here (default: any free one).  ``gpus`` limits the lanes.  On a
    machine without GPUs, the draft engine gets ``gpus`` lanes on the CPU; so does ComfyUI where it runs with
    ``--cpu``.  Raises ``ConfigurationError`` when there is no lane, and the cluster grows none.
    """
    check_gpus(gpus)
    # Read when Ray's processes start: no telemetry, engines at normal priority.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    on_cpu = runs_on_cpu(settings)
    if settings.ray_address == "local":
        # After a kill -9 of the driver, two agents of Ray's wait so long for the dead GCS (default: 60).
        os.environ.setdefault("RAY_gcs_server_request_timeout_seconds", "20")
        options: dict[str, Any] = {
            "num_gpus": (gpus or DEFAULT_DRAFT_LANES) if on_cpu else _no_more_than(gpus),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_metrics_export_port": metrics_port,
        }
    else:
        options = {}
    _init(settings.ray_address, options, hide_gpus=on_cpu and settings.ray_address == "local")
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        found = int(resources.get("GPU", 0))
        lanes = found if gpus is None else min(gpus, found)
        if lanes == 0 and settings.max_gpus and settings.ray_address != "local":
            log.info("no GPU is there yet; the cluster is asked for up to %d", settings.max_gpus)
            lanes = settings.max_gpus if gpus is None else min(gpus, settings.max_gpus)
        elif lanes == 0:
            remedy = (
                "start its nodes with `ray start --num-gpus N`: without GPUs these are lanes on the CPU"
                if on_cpu
                else "INFINITETALK_ENGINE=draft renders a preview without one, "
                "INFINITETALK_COMFYUI_ARGS=--cpu lets ComfyUI run on the CPU (very slow)"
            )
            raise ConfigurationError(f"Ray ({settings.ray_address}) found no GPU; {remedy}")
        elif gpus is not None and gpus > found:
            log.warning("%d GPUs were asked for, %d are there", gpus, found)
        yield lanes
    finally:
        ray.shutdown()
