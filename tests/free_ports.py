"""Ports that nobody has just now: other tests, and other runs of them, take theirs at the same time."""

from __future__ import annotations

import random

from pipeline.ports import is_free

LOWEST, HIGHEST = 20_000, 32_000
"""Below those that the system gives to whoever asks for any: Ray takes dozens of these at a time."""


def free_port() -> int:
    """Any one port."""
    return int(free_ports(1).partition("-")[0])


def free_ports(count: int) -> str:
    """So many in a row, as ``INFINITETALK_PORTS`` takes them."""
    while True:
        first = random.randrange(LOWEST, HIGHEST - count)
        if all(is_free(port) for port in range(first, first + count)):
            return f"{first}-{first + count - 1}"
