"""Looking at the pools of a cluster from outside, without starting one."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayError

from actors.pool import NAMESPACE
from actors.pool_client import pool_name
from actors.ray_errors import our_error

ANSWER_SECONDS = 10.0


def pool_status() -> dict[str, Any] | None:
    """``GpuPool.status`` of this code's pool, or else of one that another version has left; None: no pool.

    Needs a connection to Ray.  Raises ``PipelineError`` where the pool does not answer.
    """
    pool = _pool()
    if pool is None:
        return None
    try:
        status: dict[str, Any] = ray.get(pool.status.remote(), timeout=ANSWER_SECONDS)
    except (RayError, TimeoutError) as error:
        raise our_error(error, "the pool") from error
    return status


def readmit(lane: int) -> bool:
    """Use a fenced GPU again; False where there is no such.  Raises ``PipelineError``."""
    pool = _pool()
    if pool is None:
        return False
    try:
        done: bool = ray.get(pool.readmit.remote(lane), timeout=ANSWER_SECONDS)
    except (RayError, TimeoutError) as error:
        raise our_error(error, "the pool") from error
    return done


def _pool() -> Any:
    actors = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
    pools = [name for name in names if name.startswith("pool-") and ":" not in name]
    ours = pool_name()
    for name in sorted(pools, key=lambda name: name != ours):
        try:
            return ray.get_actor(name, NAMESPACE)
        except ValueError:
            continue  # it has ended just now
    return None
