"""What the facts of a machine mean: one line each, pass, warn or fail, with what helps.

Pure: facts are taken as arguments.  They are collected in ``machine`` and put together in ``examination``.
Floors are the source document's: CUDA 12.8, torch 2.4.1, 24 GB on each GPU, 32 GB of memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.machine import Ffmpeg, Nvidia
from pipeline.mode_check import Missing

Level = Literal["pass", "warn", "fail"]

CUDA_FLOOR = (12, 8)
DRIVER_FOR_CUDA = "570"
"""The first Linux driver that can do CUDA 12.8."""
TORCH_FLOOR = (2, 4, 1)
COMFYUI_FLOOR = (0, 11)
GPU_FLOOR_GB, MEMORY_FLOOR_GB = 24, 32
TOLERANCE = 0.92
"""A "24 GB" card reports 22.5 to 24 GiB, a "32 GB" machine 30 to 32."""
DISK_FLOOR_GB, SHARED_MEMORY_FLOOR_GB = 10, 1
ENCODERS = ("libx264", "ffv1", "aac")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    level: Level
    said: str
    remedy: str = ""


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version.

    >>> numbers("2.14.1+cu128"), numbers("v0.33"), numbers("nightly")
    ((2, 14, 1), (0, 33), ())
    """
    match = re.match(r"v?(\d+(?:\.\d+)*)", version)
    return tuple(int(part) for part in match[1].split(".")) if match else ()


def gpu_checks(found: Nvidia | str | None, *, needed: bool, visible: str | None = None) -> list[Check]:
    """Driver, CUDA and the memory of each GPU.

    ``needed``: a ComfyUI shall use them; else their lack is a warning.  ``visible``: CUDA_VISIBLE_DEVICES.
    """
    lack: Level = "fail" if needed else "warn"
    if found is None:
        remedy = "install the NVIDIA driver; in a container, start it with --gpus all"
        if not needed:
            remedy = f"drafts and --cpu need none; else {remedy}"
        return [Check("GPU driver", lack, "there is no nvidia-smi on PATH", remedy)]
    if isinstance(found, str):
        remedy = "after an update of the driver restart the machine; else see `nvidia-smi` and `dmesg`"
        return [Check("GPU driver", lack, f"nvidia-smi fails: {found}", remedy)]
    checks = [_cuda_check(found)]
    if not found.gpus:
        checks.append(Check("GPU", lack, "the driver sees no GPU", "see `lspci` and `dmesg`"))
    for gpu in found.gpus:
        gb = gpu.memory_mib / 1024
        level: Level = "pass"
        remedy = ""
        if gb < GPU_FLOOR_GB * TOLERANCE:
            level = "warn" if gb > GPU_FLOOR_GB / 2 else lack
            remedy = (
                f"below {GPU_FLOOR_GB} GB the weights wait in the machine's memory: slow, small sizes only"
            )
        checks.append(Check(f"GPU {gpu.index}", level, f"{gpu.name}, {gb:.1f} GB", remedy))
    if visible is not None and needed:
        checks.append(
            Check(
                "GPUs used", "warn", f"CUDA_VISIBLE_DEVICES={visible!r} hides the others", "unset it for all"
            )
        )
    return checks


def _cuda_check(found: Nvidia) -> Check:
    said = f"driver {found.driver}, CUDA {found.cuda or 'not said'}"
    floor = ".".join(map(str, CUDA_FLOOR))
    if not found.cuda:
        return Check("GPU driver", "warn", said, f"look whether it can do CUDA {floor}")
    if numbers(found.cuda) < CUDA_FLOOR:
        remedy = f"CUDA {floor} is needed: install driver {DRIVER_FOR_CUDA} or newer"
        return Check("GPU driver", "fail", said, remedy)
    return Check("GPU driver", "pass", said)


def torch_check(version: str | None, whose: str, *, on_gpu: bool) -> Check:
    """The torch of ``whose`` Python; ``on_gpu``: it shall use one."""
    floor = ".".join(map(str, TORCH_FLOOR))
    name = f"torch of {whose}"
    if not version:
        return Check(name, "fail", "not installed", f"install torch {floor} or newer")
    if numbers(version) < TORCH_FLOOR:
        return Check(name, "fail", version, f"install torch {floor} or newer")
    if on_gpu and version.endswith("+cpu"):
        return Check(name, "fail", version, "that build has no CUDA; install one that has: +cu128 or newer")
    return Check(name, "pass", version)


def memory_check(gb: float) -> Check:
    """Memory that engines may use, in GiB."""
    if gb >= MEMORY_FLOOR_GB * TOLERANCE:
        return Check("memory", "pass", f"{gb:.0f} GB")
    remedy = f"ComfyUI with these weights wants {MEMORY_FLOOR_GB} GB; with less it swaps or is killed"
    level: Level = "warn" if gb > MEMORY_FLOOR_GB / 2 else "fail"
    return Check("memory", level, f"{gb:.0f} GB", remedy)


def disk_check(place: str, free: float | None, setting: str) -> Check:
    """Free space in GiB at ``place``, which ``setting`` names."""
    if free is None:
        return Check("disk", "fail", f"{place} does not exist", f"set {setting}")
    level: Level = "pass" if free >= DISK_FLOOR_GB else "warn" if free >= 1 else "fail"
    remedy = "" if level == "pass" else f"make room: {DISK_FLOOR_GB} GB, or set {setting}"
    return Check("disk", level, f"{free:.0f} GB free at {place}", remedy)


def shared_memory_check(gb: float | None) -> Check:
    """Size of /dev/shm in GiB, where Ray hands media from process to process."""
    remedy = "Ray uses the disk instead, slowly; in a container, start it with --shm-size=2g"
    if gb is None:
        return Check("shared memory", "warn", "there is no /dev/shm", remedy)
    enough = gb >= SHARED_MEMORY_FLOOR_GB * TOLERANCE
    return Check("shared memory", "pass" if enough else "warn", f"{gb:.1f} GB", "" if enough else remedy)


def ffmpeg_check(found: Ffmpeg | str) -> Check:
    """The ffmpeg in use and the encoders that results need."""
    remedy = "install the imageio-ffmpeg wheel of this platform, or set IMAGEIO_FFMPEG_EXE"
    if isinstance(found, str):
        return Check("ffmpeg", "fail", found, remedy)
    lacking = [name for name in ENCODERS if name not in found.encoders]
    if lacking:
        return Check("ffmpeg", "fail", f"{found.path} has no encoder {', '.join(lacking)}", remedy)
    return Check("ffmpeg", "pass", f"{found.version} with {', '.join(ENCODERS)}")


def separator_check(program: str, place: str | None) -> Check:
    """The vocal separator that is configured, and where its program is."""
    if place is None:
        remedy = "install it, or correct INFINITETALK_VOCAL_SEPARATOR (docs/setup.md)"
        return Check("vocal separator", "fail", f"there is no program {program}", remedy)
    return Check("vocal separator", "pass", place)


def ports_check(free: int, first: int, last: int, engines: int) -> Check:
    """Ports for so many engines."""
    said = f"{free} of {first}-{last} are free"
    if free < engines:
        remedy = f"{engines} engines need one each: end what listens there, or set INFINITETALK_PORTS"
        return Check("ports", "fail", said, remedy)
    return Check("ports", "pass", said)


def ray_check(version: str | None, tested: str | None) -> Check:
    """Ray's version; every node of a cluster needs the same."""
    if version is None:
        return Check("Ray", "fail", "not installed", "pip install -c constraints.txt .")
    if tested is not None and version != tested:
        remedy = f"tested with {tested}; all nodes need the same: pip install -c constraints.txt ."
        return Check("Ray", "warn", version, remedy)
    return Check("Ray", "pass", version)


def comfyui_check(version: str, where: str) -> Check:
    """The version of a ComfyUI that answers."""
    floor = ".".join(map(str, COMFYUI_FLOOR))
    if not numbers(version):
        return Check("ComfyUI", "warn", f"{where} does not say its version", f"{floor} or newer is needed")
    if numbers(version) < COMFYUI_FLOOR:
        remedy = f"InfiniteTalk's nodes came with {floor}: infinitetalk comfyui install"
        return Check("ComfyUI", "fail", f"{version} at {where}", remedy)
    return Check("ComfyUI", "pass", f"{version} at {where}")


Lacks = Sequence[tuple[str, tuple[Missing, ...]]]
"""The graphs that render a mode, the preferred one first, and what the engine misses for each."""


def mode_checks(lacks: Mapping[str, Lacks], family: str, *, all_needed: bool) -> list[Check]:
    """One line for each mode.

    A mode that can't be rendered fails where all are needed, or where none can; else it is a warning, for
    a machine that serves some modes is a healthy one.
    """
    ready = any(not missing for graphs in lacks.values() for _, missing in graphs)
    level: Level = "fail" if all_needed or not ready else "warn"
    return [_mode_check(mode, family, graphs, level) for mode, graphs in lacks.items()]


def _mode_check(mode: str, family: str, graphs: Lacks, level: Level) -> Check:
    name = f"mode {mode}" if family == "native" else f"mode {mode} ({family})"
    preferred, lacking = graphs[0]
    ready = [graph for graph, missing in graphs if not missing]
    if preferred in ready:
        return Check(name, "pass", f"ready ({preferred})")
    if ready:
        said = f"ready ({ready[0]}), but not {preferred}: {_listed(lacking)} missing"
        return Check(name, "warn", said, _remedies(lacking, mode, family))
    # Of several graphs the one to complete is the one that lacks no node, if there is such.
    _, missing = min(graphs, key=lambda graph: sum(not thing.is_weight for thing in graph[1]))
    return Check(name, level, f"missing {_listed(missing)}", _remedies(missing, mode, family))


def _listed(missing: Sequence[Missing]) -> str:
    return ", ".join(dict.fromkeys(str(thing) for thing in missing))


def _remedies(missing: Sequence[Missing], mode: str, family: str) -> str:
    more = f" --mode {mode}" + ("" if family == "native" else f" --family {family}")
    remedies = (thing.remedy + (more if thing.is_weight else "") for thing in missing)
    return "; ".join(dict.fromkeys(remedies))
