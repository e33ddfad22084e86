"""Faults of the head, of the network and of the service, each on a cluster of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault_alone import ALONE, missing_for

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.mark.parametrize("fault", ALONE)
def test_a_head_or_a_network_that_breaks_loses_nothing(tmp_path: Path, fault: str) -> None:
    """The head comes back with or without its state, a node is cut off: the job goes on with what is kept."""
    if reason := missing_for(fault):
        pytest.skip(reason)
    print(*ALONE[fault](tmp_path))
