"""Ray itself: starting it on this machine or joining a cluster, and how many lanes it offers.

What runs on it is in ``pool`` and ``renderer``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from pipeline.engine import engine_kind
from pipeline.errors import ConfigurationError, InvalidRequest
from pipeline.settings import Settings

DEFAULT_DRAFT_LANES = 2
OBJECT_STORE_BYTES = 512 << 20
"""Segments pass through one at a time; a local Ray would reserve a third of the memory otherwise."""

log = logging.getLogger(__name__)


def check_gpus(gpus: int | None) -> None:
    """Raises ``InvalidRequest`` for a number of GPUs that is none."""
    if gpus is not None and gpus < 1:
        raise InvalidRequest("gpus", f"{gpus} is not a number of GPUs; give 1 or more")


@contextmanager
def cluster(settings: Settings, gpus: int | None) -> Iterator[int]:
    """Start or join Ray; yields the number of lanes, one for each GPU.

    ``gpus`` limits them.  On a machine without GPUs, the draft engine gets ``gpus`` lanes on the CPU;
    so does ComfyUI where it runs with ``--cpu``.  Raises ``ConfigurationError`` when there is no lane.
    """
    check_gpus(gpus)
    # Read when Ray's processes start: no telemetry, engines at normal priority, everything on loopback.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    on_cpu = engine_kind(settings) == "draft" or "--cpu" in settings.comfyui_flags
    if settings.ray_address == "local":
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # After a kill -9 of the driver, two agents of Ray's wait so long for the dead GCS (default: 60).
        os.environ.setdefault("RAY_gcs_server_request_timeout_seconds", "20")
        ray.init(
            address="local",
            num_gpus=(gpus or DEFAULT_DRAFT_LANES) if on_cpu else None,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
        )
    else:
        try:
            ray.init(address=settings.ray_address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise ConfigurationError(f"INFINITETALK_RAY_ADDRESS={settings.ray_address}: {error}") from None
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        found = int(resources.get("GPU", 0))
        lanes = found if gpus is None else min(gpus, found)
        if lanes == 0:
            remedy = (
                "start its nodes with `ray start --num-gpus N`: without GPUs these are lanes on the CPU"
                if on_cpu
                else "INFINITETALK_ENGINE=draft renders a preview without one, "
                "INFINITETALK_COMFYUI_ARGS=--cpu lets ComfyUI run on the CPU (very slow)"
            )
            raise ConfigurationError(f"Ray ({settings.ray_address}) found no GPU; {remedy}")
        if gpus is not None and gpus > found:
            log.warning("%d GPUs were asked for, %d are there", gpus, found)
        yield lanes
    finally:
        ray.shutdown()
