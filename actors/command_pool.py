"""``infinitetalk pool``: the GPUs of a cluster, who has them, and what is wrong with them."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from actors.cluster import connection
from actors.pool_look import pool_status, readmit
from pipeline.errors import ConfigurationError, InvalidRequest
from pipeline.settings import Settings

NO_POOL = "there is no pool of GPUs on this cluster: the first job, or the service, starts it"


def add_command(commands: Any) -> None:
    """Declare the command to argparse."""
    about = "Show the GPUs of the cluster at INFINITETALK_RAY_ADDRESS and the jobs that use them."
    command = commands.add_parser("pool", help="the GPUs of a cluster, and who has them", description=about)
    command.set_defaults(run=run)
    command.add_argument(
        "--readmit", type=int, metavar="GPU", help="use this GPU again that was fenced off after its failures"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Show the pool; raises ``ConfigurationError`` where there is none, ``InvalidRequest``."""
    settings = Settings.from_env()
    if settings.ray_address == "local":
        raise ConfigurationError(
            "which cluster? INFINITETALK_RAY_ADDRESS=HOST:PORT says it (auto: what `ray start` began here)"
        )
    with connection(settings.ray_address):
        if options.readmit is not None and not readmit(options.readmit):
            raise InvalidRequest("readmit", f"no GPU {options.readmit} is fenced off")
        status = pool_status()
    if status is None:
        raise ConfigurationError(NO_POOL)
    if options.json:
        print(json.dumps({"success": True, **status}))
    else:
        show(Console(), status)
    return 0


def show(console: Console, status: dict[str, Any]) -> None:
    """The status for people."""
    table = Table("GPU", "node", "device", "state", "job", "speed", "restarts", "trouble", box=None)
    for lane in status["lanes"]:
        columns = ("gpu", "node", "device", "state", "job", "speed", "restarts", "trouble")
        table.add_row(*("" if lane[name] is None else str(lane[name]) for name in columns))
    console.print(table)
    for job in status["jobs"]:
        gpus = ", ".join(map(str, job["gpus"])) or "none"
        more = f", could use {job['wants']} more" if job["wants"] else ""
        console.print(f"job {job['job']}: GPUs {gpus}{more}", highlight=False)
    if status["waiting"]:
        console.print(f"{status['waiting']} jobs wait for their turn", highlight=False)
    if status["retired"]:
        console.print("this pool retires: a newer version of the code has one of its own", highlight=False)
