"""Facts of this machine, each asked in one thin function; what they mean is ``doctor``'s business."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import ffmpeg
from pipeline.errors import ConfigurationError
from pipeline.ports import is_free

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a mount, not a temporary file
_QUESTION = ("--query-gpu=index,name,memory.total,driver_version", "--format=csv,noheader,nounits")
_SECONDS = 30
_CUDA = re.compile(r"CUDA (?:UMD |Driver )?Version:\s*(\d+(?:\.\d+)+)")
_ENCODER = re.compile(r"^ [VAS][A-Z.]{5} (\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One line of nvidia-smi."""

    index: int
    name: str
    memory_mib: int


@dataclass(frozen=True, slots=True)
class Nvidia:
    """What nvidia-smi says."""

    driver: str
    cuda: str
    """The newest CUDA that the driver can do; empty where it doesn't say."""
    gpus: tuple[Gpu, ...]


def nvidia() -> Nvidia | str | None:
    """What nvidia-smi says; its complaint where it fails; None where there is no nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        listed = _said([program, *_QUESTION])
        return parse_nvidia(listed, _said([program]))
    except subprocess.CalledProcessError as error:
        words = (error.stdout + error.stderr).strip().splitlines()
        return words[0] if words else f"exit code {error.returncode}"
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        return str(error)


def parse_nvidia(listed: str, screen: str) -> Nvidia:
    """From the CSV of a query, and the screen without arguments, which alone names the CUDA version.

    >>> parse_nvidia("0, NVIDIA GeForce RTX 4090, 24564, 570.86.10", "CUDA Version: 12.8   |").cuda
    '12.8'
    """
    gpus, driver = [], ""
    for row in csv.reader(io.StringIO(listed), skipinitialspace=True):
        if row:
            index, name, memory, driver = row
            gpus.append(Gpu(int(index), name, int(float(memory))))
    version = _CUDA.search(screen)
    return Nvidia(driver, version[1] if version else "", tuple(gpus))


def _said(command: Sequence[str]) -> str:
    reply = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    return reply.stdout


def memory_gb() -> float:
    """Memory in GiB that this process may use: the machine's, or its container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            total = min(total, int(text))
    return total / 2**30


def free_gb(path: Path) -> float | None:
    """Free space in GiB where ``path`` is or will be; None where nothing of it exists."""
    for place in (path, *path.parents):
        if place.exists():
            return shutil.disk_usage(place).free / 2**30
    return None


def size_gb(path: Path) -> float | None:
    """Size in GiB of the file system at ``path``; None where it does not exist."""
    return shutil.disk_usage(path).total / 2**30 if path.exists() else None


@dataclass(frozen=True, slots=True)
class Ffmpeg:
    """The ffmpeg that would be used."""

    path: str
    version: str
    encoders: frozenset[str]


def ffmpeg_facts() -> Ffmpeg | str:
    """Version and encoders of ffmpeg, or why it can't be asked."""
    try:
        path = ffmpeg.binary()
        first = _said([path, "-version"]).split(maxsplit=3)
        return Ffmpeg(path, first[2], parse_encoders(_said([path, "-hide_banner", "-encoders"])))
    except (ConfigurationError, subprocess.SubprocessError, OSError, IndexError) as error:
        return str(error)


def parse_encoders(text: str) -> frozenset[str]:
    """Names in the output of ``ffmpeg -encoders``.

    >>> sorted(parse_encoders(" V....D libx264    H.264\\n A....D aac   AAC"))
    ['aac', 'libx264']
    """
    return frozenset(_ENCODER.findall(text))


def free_ports(first: int, last: int) -> int:
    """How many ports of the range nobody listens on."""
    return sum(is_free(port) for port in range(first, last + 1))


def version_of(package: str) -> str | None:
    """The installed version of a Python package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pinned_version(package: str) -> str | None:
    """The version of ``package`` that this program was tested with."""
    try:
        wanted = importlib.metadata.requires("infinitetalk-ray") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (re.fullmatch(rf"{re.escape(package)}(?:\[.*\])?==(\S+)", line) for line in wanted)
    return next((match[1] for match in found if match), None)
