"""What GPUs a process can see: names and memory, asked of torch.

torch is asked in a process of its own, which ends again: a renderer that imported it would hold 300 MB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

from pipeline.errors import ConfigurationError

_QUERY = """
import json, torch
found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps([{"name": p.name, "memory": p.total_memory} for p in found]))
"""
_QUERY_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or the CPU in its place."""

    name: str
    memory_gb: float
    """In GiB."""


def visible_gpus() -> tuple[Device, ...]:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` leaves visible; empty on a machine without."""
    try:
        reply = subprocess.run(
            [sys.executable, "-c", _QUERY], capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True
        )
        return tuple(Device(gpu["name"], gpu["memory"] / 2**30) for gpu in json.loads(reply.stdout))
    except subprocess.CalledProcessError as error:
        raise ConfigurationError(
            f"torch can't tell the GPUs: {error.stderr.strip().splitlines()[-1:]}"
        ) from None
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise ConfigurationError(f"torch can't tell the GPUs: {error}") from None


def this_cpu() -> Device:
    """The CPU, with the machine's memory."""
    return Device("CPU, no GPU", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
