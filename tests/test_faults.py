"""Real kills on a real cluster of three nodes: no finished work is lost, and nothing is left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.fault_cases import CASES, cluster_of
from tests.fault_cluster import Cluster

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


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
