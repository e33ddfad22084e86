"""Metrics: what real actors record is on Ray's page, and the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest
import ray
from ray.util.metrics import Histogram

from actors import metrics
from actors.cluster import cluster, metrics_pages
from pipeline.settings import Settings
from tests.conftest import ROOT
from tests.free_ports import free_port
from tests.metrics_page import Samples, key, until


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """A local Ray whose metrics page is where it was asked for."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        with cluster(Settings(engine="draft"), 1, port):
            url = metrics_pages()[0]
            assert url.endswith(f":{port}/metrics")
            yield url


@ray.remote(num_cpus=0)
class Recorder:
    """Tells what a renderer, a pool and a runner tell."""

    def render(self, seconds: float) -> None:
        """A renderer that is there for two such times and renders in one."""
        clock = metrics.LaneClock(3, "here")
        with clock.busy():
            time.sleep(seconds)
        metrics.window_done(3, "here", "24gb", 42.0)
        time.sleep(seconds)
        clock.stop()

    def trouble(self) -> None:
        metrics.segment_retried(3, "here")
        metrics.engine_restarted(3, "here", "lost")

    def jobs(self, waiting: int) -> None:
        states = {"queued": waiting, "in_progress": 1, "completed": 5, "failed": 0, "cancelled": 0}
        metrics.jobs_now(states, 1 << 40)  # type: ignore[arg-type]
        metrics.gpus_now(2, 1)

    def ends(self) -> None:
        metrics.job_started(12.0)
        metrics.job_over("completed", 100.0)
        metrics.seams_made({"good": 3, "bad": 1})

    def http(self) -> None:
        metrics.http_answered("/v1/jobs/{job}", "GET", "200", 0.02, 0, 700)
        metrics.http_answered("/v1/jobs", "POST", "429", 0.02, 1 << 20, 0)


def test_what_actors_record_is_on_the_page(page: str) -> None:
    """Every metric arrives under its name, with its labels and its value."""
    recorder = Recorder.remote()
    ray.get([recorder.render.remote(1.0), recorder.trouble.remote(), recorder.ends.remote()])
    ray.get(recorder.http.remote())

    def whole(found: Samples) -> bool:
        ray.get(recorder.jobs.remote(7))  # a gauge is told again and again
        names = {re.sub("_(bucket|count|sum)$", "", name) for name, _ in found}
        return names >= {metric.info["name"].removeprefix(metrics.PREFIX) for metric in metrics.ALL}

    found = until(page, whole)
    lane = {"gpu": "3", "node": "here"}
    busy, alive = found[key("gpu_busy_seconds_total", **lane)], found[key("gpu_alive_seconds_total", **lane)]
    assert 1.0 <= busy < alive - 0.9
    window = {**lane, "profile": "24gb"}
    assert [found[key("window_seconds_bucket", **window, le=le)] for le in ("30.0", "45.0")] == [0, 1]
    assert found[key("segment_retries_total", **lane)] == 1
    assert found[key("engine_restarts_total", **lane, reason="lost")] == 1
    assert found[key("jobs", state="queued")] == 7
    assert found[key("jobs", state="failed")] == 0
    assert found[key("stored_bytes")] == 1 << 40
    assert found[key("gpus", state="starting")] == 1
    assert [found[key("job_wait_seconds_bucket", le=le)] for le in ("5.0", "15.0")] == [0, 1]
    assert found[key("job_seconds_count", outcome="completed")] == 1
    assert found[key("seams_total", verdict="good")] == 3
    asked = {"route": "/v1/jobs/{job}", "method": "GET", "status": "200"}
    assert found[key("http_answer_seconds_count", **asked)] == 1
    assert found[key("http_received_bytes_total", route="/v1/jobs")] == 1 << 20
    assert found[key("http_sent_bytes_total", route="/v1/jobs/{job}")] == 700


def test_the_dashboard_and_the_document_know_the_metrics() -> None:
    """Each query names existing metrics and their labels, and each metric is asked for, and documented."""
    known: dict[str, tuple[str, ...]] = {}
    for metric in metrics.ALL:
        name, labels = "ray_" + metric.info["name"], metric.info["tag_keys"]
        if isinstance(metric, Histogram):
            known |= {f"{name}_{part}": labels for part in ("count", "sum")}
            known[f"{name}_bucket"] = (*labels, "le")
        else:
            known[name] = labels
    board = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked: set[str] = set()
    for query in queries:
        names = set(re.findall(r"\bray_\w+", query))
        assert names, query
        assert names <= set(known), query
        asked |= names
        labels = set(re.findall(r"(\w+)=", query))
        labels |= {word for group in re.findall(r"by \((.*?)\)", query) for word in group.split(", ")}
        assert all(labels <= set(known[name]) for name in names), query
    document = (ROOT / "docs" / "metrics.md").read_text()
    for metric in metrics.ALL:
        name = "ray_" + metric.info["name"]
        assert any(found.startswith(name) for found in asked), name
        assert f"`{metric.info['name'].removeprefix(metrics.PREFIX)}`" in document, name
