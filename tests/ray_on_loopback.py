"""``ray`` for clusters of several nodes whose all nodes are 127.0.0.1: nothing of them listens to the world.

``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0`` makes Ray use the loopback address; with it, ``ray start`` refuses to
join a cluster.  That one check is told otherwise, in this process only; Ray's own test clusters do the same
by not having it.
"""

from __future__ import annotations

import sys

from ray._private import ray_constants, services
from ray.scripts.scripts import main

services.resolve_ip_for_localhost = lambda host: host
services.get_node_ip_address = lambda _address=None: "127.0.0.1"
ray_constants.ENABLE_RAY_CLUSTER = True

if __name__ == "__main__":
    sys.exit(main())
