"""Command line of the draft engine: flags, start, end.

ComfyUI's flags that a launcher passes are accepted; those that mean nothing without a model are ignored.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.draft import faults
from pipeline.draft.faults import DIE_AT_START, Fault, parse_fault
from pipeline.draft.folders import Folders
from pipeline.draft.nodes import DraftNodes
from pipeline.draft.schemas import load_node_packs
from pipeline.draft.server import DraftServer, ServerOptions

NICENESS = 10
"""What is computed here a GPU would compute: it steps back for what runs on the CPU for real."""

log = logging.getLogger("pipeline.draft")

IGNORED_SWITCHES = (
    "--cpu",
    "--disable-auto-launch",
    "--disable-api-nodes",
    "--disable-metadata",
    "--disable-smart-memory",
    "--dont-print-server",
    "--cache-classic",
    "--cache-none",
    "--lowvram",
    "--normalvram",
    "--highvram",
    "--novram",
    "--gpu-only",
    "--deterministic",
    "--log-stdout",
)
IGNORED_OPTIONS = (
    "--database-url",
    "--preview-method",
    "--cache-lru",
    "--cache-ram",
    "--reserve-vram",
    "--user-directory",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until killed; 1 when the engine can't start."""
    options = _parser().parse_args(argv)
    _step_back()
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    log.info("DRAFT ENGINE: a preview that draws a talking head, not the InfiniteTalk model")
    time.sleep(options.draft_start_seconds)
    if any(fault.kind == DIE_AT_START for fault in options.draft_fault):
        log.error("the draft engine dies at its start, as --draft-fault %s told it to", DIE_AT_START)
        return 1
    folders = Folders.prepare(options.base_directory, options.models_directory)
    only = options.whitelist_custom_nodes if options.disable_all_custom_nodes else None
    load_node_packs(folders.base / "custom_nodes", only)
    max_bytes = round(options.max_upload_size * 1024 * 1024)
    server_options = ServerOptions(options.listen, options.port, tuple(options.draft_fault), max_bytes)
    try:
        nodes = DraftNodes(folders, options.draft_window_seconds, options.draft_drift)
        asyncio.run(_serve(folders, nodes, server_options))
    except OSError as exc:
        if exc.errno != errno.EADDRINUSE:
            raise
        log.error("Port %d is already in use", options.port)
        return 1
    return 0


async def _serve(folders: Folders, nodes: DraftNodes, options: ServerOptions) -> None:
    await DraftServer(folders, nodes, options).run()


def _window_seconds(text: str) -> float:
    """Of this engine's GPU, where each has its own."""
    seconds = [float(part) for part in text.split(",")]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    return seconds[int(visible) % len(seconds) if visible.isdecimal() else 0]


def _fault(text: str) -> Fault:
    try:
        return parse_fault(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def _step_back() -> None:
    os.nice(NICENESS)
    if os.getsid(0) == os.getpid():  # where Linux weighs sessions, niceness counts within one only: sched(7)
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(NICENESS))


def _parser() -> argparse.ArgumentParser:
    kinds = "; ".join(f"{kind}: {meaning}" for kind, meaning in faults.KINDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.draft",
        description="A preview engine with ComfyUI's protocol: draws a talking head, is not the model.",
        epilog="Accepted and ignored, as ComfyUI's: " + " ".join([*IGNORED_SWITCHES, *IGNORED_OPTIONS]),
        allow_abbrev=False,
    )
    parser.add_argument("--listen", default="127.0.0.1", metavar="HOST")
    parser.add_argument("--port", type=int, default=8188)
    parser.add_argument("--base-directory", type=Path, required=True, help="holds input, output and temp")
    parser.add_argument(
        "--models-directory", type=Path, help="its files are offered by the loader nodes; none is read"
    )
    parser.add_argument("--max-upload-size", type=float, default=100, metavar="MIB")
    draft = parser.add_argument_group("standing in for a GPU, and misbehaving")
    draft.add_argument(
        "--draft-window-seconds",
        type=_window_seconds,
        default=0.0,
        metavar="S[,S...]",
        help="a window of 81 frames takes S seconds in the sampler, a shorter one its share; 0: at once; "
        "several: of each GPU, by its number in CUDA_VISIBLE_DEVICES",
    )
    draft.add_argument(
        "--draft-start-seconds", type=float, default=0.0, metavar="S", help="wait before the port is opened"
    )
    draft.add_argument(
        "--draft-drift",
        type=float,
        default=0.0,
        metavar="LEVELS",
        help="each frame of a chain gets warmer by so many levels of 255",
    )
    draft.add_argument(
        "--draft-fault",
        type=_fault,
        action="append",
        default=[],
        metavar="KIND@N",
        help=f"misbehave at the N-th accepted prompt; repeatable. {kinds}. {DIE_AT_START}: exit code 1",
    )
    for flag in IGNORED_SWITCHES:
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    for flag in IGNORED_OPTIONS:
        parser.add_argument(flag, help=argparse.SUPPRESS)
    parser.add_argument("--disable-all-custom-nodes", action="store_true", help="but those listed")
    parser.add_argument("--whitelist-custom-nodes", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--verbose", nargs="?", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
