"""Runs the commands of docs/deploy.md, "Two boxes", as they stand there, on two boxes made of this machine.

Each box has a network, a hostname, processes and a home of its own; a cable lies between them.  ``ssh`` and
``scp`` are replaced by a look into the other box's home.  Root only.  Nothing of it stays, and other Rays of
this machine are neither seen nor touched.

    sudo env PATH="$PATH" python deploy/try_two_boxes.py FOLDER      the video and the logs go to FOLDER

Exit codes: 0 both boxes rendered; 1 something failed, the log says what; 3 this machine can't make boxes.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs" / "deploy.md"
PROGRAMS = ("ray", "infinitetalk", "ip", "unshare", "nsenter", "bash")
COMMAND_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Box:
    """One of the two."""

    name: str
    address: str
    home: Path
    first: int
    """Its first process, outside of it: all others of the box end with it."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block of commands of the guide, and where it is to be run."""

    where: str
    commands: str


class Failed(Exception):
    """What went wrong, for people."""


def blocks(guide: str) -> list[Block]:
    """The marked blocks of the section "Two boxes", in their order."""
    section = guide.partition("\n## Two boxes\n")[2].partition("\n## ")[0]
    found = re.findall(r"<!-- (both|box one|box two) -->\n```sh\n(.*?)```", section, re.DOTALL)
    return [Block(where, commands) for where, commands in found]


@contextmanager
def box(name: str, address: str, cable: str, work: Path) -> Iterator[Box]:
    """A box at the end of a cable; whatever runs in it ends with the block."""
    network = f"{work.name}-{name}"
    home = work / name
    home.mkdir()
    _ip("netns", "add", network)
    try:
        _ip("link", "set", cable, "netns", network)
        _ip("-n", network, "address", "add", f"{address}/24", "dev", cable)
        for device in ("lo", cable):
            _ip("-n", network, "link", "set", device, "up")
        isolated = ("unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc")
        command = ("ip", "netns", "exec", network, *isolated)
        starting = f"hostname box-{name}; echo up; exec cat"  # until its input ends, with this program too
        with subprocess.Popen(
            [*command, "sh", "-c", starting], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as outer:
            assert outer.stdout is not None
            try:
                if outer.stdout.readline() != "up\n":
                    raise Failed(f"box {name} did not start")
                first = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0])
                yield Box(name, address, home, first)
            finally:
                outer.kill()  # --kill-child: the box's first process ends with it
    finally:
        _ip("netns", "delete", network)


def run(block: Block, here: Box, other: Box, folder: Path, log: Path) -> str:
    """Run a block in a box as its user would; what it said.  Raises ``Failed``."""
    remote = (
        f'ssh() {{ shift; (cd {other.home} && "$@"); }}\n'
        f'scp() {{ cp "$1" "{other.home}/${{2#{other.address}:}}"; }}\n'
    )
    # RAY_TMPDIR: /tmp is one for both boxes.
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ}
    env = {**kept, "HOME": str(here.home), "RAY_TMPDIR": str(here.home), "COLUMNS": "200"}
    inside = ("nsenter", "--target", str(here.first), "--net", "--uts", "--pid", "--mount")
    shell = [*inside, f"--wd={folder}", "bash", "-euo", "pipefail", "-c", remote + block.commands]
    with log.open("a") as out:
        out.write(f"----- box {here.name}\n{block.commands}-----\n")
        out.flush()
        begin = out.tell()
        try:
            code = subprocess.run(
                shell, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=COMMAND_SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    said = log.read_text()[begin:]
    if code:
        raise Failed(f"box {here.name}: exit code {code}; {log} ends:\n{said[-2000:]}")
    return said


def follow(guide: str, folder: Path) -> str:
    """Run all of the guide's blocks; what the last one said.  Raises ``Failed``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("deploy", "examples"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    both = "".join(block.commands for block in blocks(guide) if block.where == "both")
    said = ""
    with ExitStack() as stack:
        work = Path(tempfile.mkdtemp(prefix="box", dir="/tmp"))  # short: Ray's sockets lie below it
        stack.callback(shutil.rmtree, work)
        ends = [f"{work.name[-8:]}{end}" for end in "ab"]
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        one = stack.enter_context(box("one", "10.77.0.1", ends[0], work))
        two = stack.enter_context(box("two", "10.77.0.2", ends[1], work))
        for block in blocks(guide):
            if block.where != "both":
                here, other = (one, two) if block.where == "box one" else (two, one)
                said = run(Block(block.where, both + block.commands), here, other, folder, folder / "log")
    return said


def main() -> int:
    """The exit code."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        print(f"needed: root, and on PATH: {', '.join(missing or PROGRAMS)}", file=sys.stderr)
        return 3
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of all that cleans up
    try:
        said = follow(GUIDE.read_text(), Path(sys.argv[1]).resolve())
    except (Failed, OSError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    done = re.findall(r"(segment \d+) processed successfully.*\bgpu=(\d+).*\bnode=(\S+)", said)
    for segment, gpu, node in done:
        print(f"{segment} was rendered on {node}, GPU {gpu}")
    print(said.strip().splitlines()[-1])
    return 0 if {node for *_, node in done} == {"box-one", "box-two"} else 1


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
