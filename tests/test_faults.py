"""Real kills on a real cluster of three nodes: no finished work is lost, and nothing is left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault_alone import ALONE, missing_for
from tests.fault_cases import CASES, cluster_of
from tests.fault_cluster import Cluster

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("faults")) as started:
        yield started


@pytest.mark.parametrize("fault", CASES)
def test_a_fault_costs_a_window_and_no_job(cluster: Cluster, fault: str) -> None:
    """The job ends with its whole video; no finished window is rendered twice but the lost segments' last."""
    if fault == "disk" and os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    print(CASES[fault](cluster))


@pytest.mark.faults
@pytest.mark.parametrize("fault", ALONE)
def test_a_head_or_a_network_that_breaks_loses_nothing(tmp_path: Path, fault: str) -> None:
    """The head comes back with or without its state, a node is cut off: the job goes on with what is kept."""
    if reason := missing_for(fault):
        pytest.skip(reason)
    print(*ALONE[fault](tmp_path))
