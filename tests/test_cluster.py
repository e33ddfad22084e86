"""A cluster of several real Ray nodes on this machine: the command joins it, and survives a node's death."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _internal_kv_get

from tests import fault_cluster
from tests.fault_cases import speech
from tests.fault_cluster import submit, until
from tests.render_command import SIZE, Command, decoded

SpeechOf = Callable[[int], Path]


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head without GPUs and two nodes with one each."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "num_gpus": 0,
            "include_dashboard": False,
            "object_store_memory": 100 << 20,
        },
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=100 << 20)
    yield cluster
    cluster.shutdown()


def test_a_job_survives_the_death_of_a_node(
    nodes: Cluster, portrait: Path, speech_of: SpeechOf, tmp_path: Path
) -> None:
    """kill -9 of a node in the middle: its segment is rendered on the other, and the video is whole.

    The media crosses the nodes through Ray: only the driver writes the job's folder.
    """
    output = tmp_path / "talk.mp4"
    arguments = [
        "--image",
        portrait,
        "--audio",
        speech_of(400),
        "-o",
        output,
        "--width",
        SIZE,
        "--height",
        SIZE,
    ]
    command = Command(
        tmp_path, [*arguments, "--json"], "--draft-window-seconds 2", INFINITETALK_RAY_ADDRESS=nodes.address
    )
    command.wait_for(r"windows [12]/")
    node = sorted(nodes.worker_nodes, key=lambda node: node.unique_id)[0]
    raylet = node.all_processes["raylet"][0].process
    raylet.kill()
    raylet.wait()
    assert command.finish() == 0, command.log
    assert "gets another try" in command.log
    assert len(decoded(output)) == 400


def test_an_address_without_ray_is_told(portrait: Path, speech_of: SpeechOf, tmp_path: Path) -> None:
    """Nobody listens there: exit code 3 and the setting's name, no traceback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = ["--image", portrait, "--audio", speech_of(30), "-o", tmp_path / "talk.mp4"]
    command = Command(tmp_path, arguments, INFINITETALK_RAY_ADDRESS=address)
    assert command.finish(150) == 3
    assert f"can't join Ray at {address}" in command.log
    assert "Traceback" not in command.log


def test_a_ray_of_our_own_listens_on_loopback() -> None:
    """The node's address is 127.0.0.1 without any help from the environment; a first try may fail."""
    code = (
        "from actors.cluster import cluster; from pipeline.settings import Settings; import ray\n"
        "start = ray.init\n"
        "def fails_once(**options):\n"
        "    ray.init = start\n"
        "    raise RuntimeError('The current node timed out during startup')\n"
        "ray.init = fails_once\n"
        "with cluster(Settings(engine='draft'), 1): print('at', ray.util.get_node_ip_address())"
    )
    env = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
    reply = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "at 127.0.0.1" in reply.stdout, reply.stderr
    assert "started once more: The current node timed out" in reply.stderr


@pytest.mark.long
def test_a_cluster_scaled_to_zero_is_asked_for_gpus(tmp_path: Path, portrait: Path) -> None:
    """No node has a GPU yet: a job and a batch wait for the nodes that Ray is asked for, and run on them."""
    jobs, grows = tmp_path / "jobs.jsonl", {"INFINITETALK_MAX_GPUS": "2"}
    cluster = fault_cluster.Cluster(tmp_path, gpus=())
    sound = speech(tmp_path, 60)
    jobs.write_text(
        json.dumps({"image": str(portrait), "audio": str(sound), "width": 64, "height": 64}) + "\n"
    )

    def asked() -> int:
        found = _internal_kv_get("autoscaler_resource_request")
        return len(json.loads(found)) if found else 0

    try:
        cluster.start()
        with cluster.connected():
            job = submit(cluster, sound, "one", draft_args="", env=grows)
            until(lambda: asked() == 1, 60)
            batch = subprocess.Popen(
                [sys.executable, "-m", "infinitetalk", "batch", jobs, "--out", tmp_path / "out"],
                env=cluster.environment(
                    INFINITETALK_ENGINE="draft",
                    INFINITETALK_RAY_ADDRESS=cluster.address,
                    INFINITETALK_SCRATCH_DIR=str(cluster.scratch),
                    **grows,
                ),
            )
            until(lambda: asked() == 2, 60)
            cluster.add_node(1)
            assert job.finish() == 0, job.said()
            assert batch.wait(150) == 0
    finally:
        left = cluster.stop()
    assert not left
