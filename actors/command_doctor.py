"""``infinitetalk doctor``: what it prints, and its exit code.  The checks are in ``pipeline.doctor``."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.doctor import Check
from pipeline.errors import JobCancelled
from pipeline.examination import examine
from pipeline.models import manifest
from pipeline.settings import Settings

EXIT_UNFIT = 3
COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def add_command(commands: Any) -> None:
    """Declare the command to argparse."""
    known = manifest()
    about = "Check this machine, its GPUs and its ComfyUI; say what to do where something is wrong."
    command = commands.add_parser("doctor", help="check this machine and its ComfyUI", description=about)
    command.set_defaults(run=run)
    command.add_argument("--url", help="ask this running ComfyUI (default: start the configured one)")
    command.add_argument(
        "--mode", action="append", choices=known.modes, default=[], help="must be possible; may be repeated"
    )
    command.add_argument("--family", choices=known.families, default="native", help="of workflows")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Examine; 0 where nothing fails, else 3.  Raises ``ConfigurationError``, ``JobCancelled``."""
    settings = Settings.from_env()
    waiting = Console(stderr=True, quiet=options.json)
    try:
        with waiting.status("examining") as status:
            checks = list(
                examine(
                    settings,
                    url=options.url,
                    family=options.family,
                    modes=options.mode,
                    on_wait=lambda what: status.update(what),
                )
            )
    except KeyboardInterrupt:
        raise JobCancelled("of this examination") from None
    failed = any(check.level == "fail" for check in checks)
    if options.json:
        print(json.dumps({"success": not failed, "checks": [asdict(check) for check in checks]}))
    else:
        show(Console(), checks)
    return EXIT_UNFIT if failed else 0


def show(console: Console, checks: Iterable[Check]) -> None:
    """One line for each check, and below it what helps."""
    checks = list(checks)
    width = max(len(check.name) for check in checks)
    for check in checks:  # lines are left to the terminal to break, so that commands can be copied
        line = Text(check.level, COLOURS[check.level]).append(
            f"  {check.name:<{width}}  {check.said}", "default"
        )
        console.print(line, soft_wrap=True)
        if check.remedy:
            console.print(Text(f"{'':{width + 8}}-> {check.remedy}", "cyan"), soft_wrap=True)
    counts = Counter(check.level for check in checks)
    said = f"{counts['pass']} pass, {counts['warn']} warn, {counts['fail']} fail"
    console.print(
        said,
        highlight=False,
        style=COLOURS["fail" if counts["fail"] else "warn" if counts["warn"] else "pass"],
    )
