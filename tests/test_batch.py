"""Batches, whole: ``ray job submit``, stop, kill and rerun on a real Ray with two draft renderers."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from pipeline.batch_folder import BatchFolder, Results
from pipeline.errors import InvalidRequest
from pipeline.frames import check_video
from tests.conftest import ROOT
from tests.free_ports import free_port
from tests.s3_server import KEY, SECRET, running_s3

SpeechOf = Callable[[int], Path]
ProcessesWith = Callable[[str], list[int]]
SPEECH = str(ROOT / "examples" / "speech.wav")
SMALL = {"width": 64, "height": 64}
LONG = 900
"""Frames of a job that takes some seconds after its first window."""
WAIT_SECONDS = 300.0
"""For things that take some seconds on an idle machine."""


def until(holds: Callable[[], Any], what: str) -> Any:
    """Wait for something to hold."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not within {WAIT_SECONDS:g} s: {what}"
        time.sleep(0.05)
    return found


@dataclass(frozen=True)
class Cluster:
    """A Ray head with two GPUs that are none, and its dashboard."""

    address: str
    dashboard: str
    scratch: Path

    def engines(self) -> list[int]:
        """Ports of the engines that run on it."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                words = (entry / "cmdline").read_text().split("\0")
                if "pipeline.draft" in words and str(self.scratch) in " ".join(words):
                    found.append(int(words[words.index("--port") + 1]))
        return found

    def busy(self) -> list[int]:
        """Ports of the engines that have something in work."""
        found = []
        for port in self.engines():
            with suppress(requests.ConnectionError):
                queue = requests.get(f"http://127.0.0.1:{port}/queue", timeout=10).json()
                found += [port] * bool(queue["queue_running"] or queue["queue_pending"])
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Started as an operator does, on ports of its own; afterwards no engine is left."""
    if importlib.util.find_spec("aiohttp_cors") is None:
        pytest.skip("this Ray has no dashboard, which runs submitted jobs (pip install 'ray[default]')")
    scratch = tmp_path_factory.mktemp("scratch")
    temporary = Path("/tmp") / f"rb{os.getpid()}"  # short: sockets are in it
    port, dashboard = free_port(), free_port()
    options = {
        "port": port,
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
        "num-cpus": 2,
        "num-gpus": 2,
        "object-store-memory": 150 << 20,
        "temp-dir": temporary,
    }
    env = {
        **os.environ,
        "INFINITETALK_ENGINE": "draft",
        "INFINITETALK_SCRATCH_DIR": str(scratch),
        "INFINITETALK_DRAFT_ARGS": "--draft-window-seconds 0.5",
    }
    with (scratch / "ray.log").open("wb") as log:
        head = subprocess.Popen(
            [Path(sys.executable).parent / "ray", "start", "--head", "--block"]
            + [f"--{name}={value}" for name, value in options.items()],
            env=env,
            stdout=log,
            stderr=log,
        )
    started = Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", scratch)

    def ready() -> bool:
        assert head.poll() is None, (scratch / "ray.log").read_text()[-2000:]
        with suppress(requests.RequestException):
            return requests.get(f"{started.dashboard}/api/jobs/", timeout=5).ok
        return False

    try:
        until(ready, "the dashboard answers")
        yield started
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(temporary, ignore_errors=True)
    until(lambda: not started.engines(), "no engine is left")


def manifest(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "jobs.jsonl"
    path.write_text("".join(json.dumps({**SMALL, **line}) + "\n" for line in lines))
    return path


def results(out: Path) -> list[dict[str, Any]]:
    """Every line of the results: each must be whole."""
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ended(out: Path) -> list[tuple[str, str]]:
    return [(record["id"], record["status"]) for record in results(out)]


def window_kept(out: Path, job: str) -> bool:
    """Whether a job in work has a finished window on the disk."""
    return any((out / ".infinitetalk").glob(f"{job}-*/job/segments/*.windows/??????"))


def batch(*arguments: object, **env: str) -> subprocess.Popen[str]:
    """``infinitetalk batch`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "infinitetalk", "batch", *map(str, arguments), "--json"],
        cwd=ROOT,
        env={**os.environ, "INFINITETALK_ENGINE": "draft", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended_batch(*arguments: object, **env: str) -> tuple[int, dict[str, Any], str]:
    """Run it to its end: exit code, what it printed, its log."""
    process = batch(*arguments, **env)
    printed, log = process.communicate(timeout=WAIT_SECONDS)
    return process.returncode, json.loads(printed), log


def joined(cluster: Cluster) -> dict[str, str]:
    """The settings of a command that renders on the cluster."""
    return {
        "INFINITETALK_RAY_ADDRESS": cluster.address,
        "INFINITETALK_SCRATCH_DIR": str(cluster.scratch),
        "INFINITETALK_DRAFT_ARGS": "--draft-window-seconds 0.5",
    }


def test_a_submitted_job_is_stopped_and_goes_on(
    cluster: Cluster, tmp_path: Path, portrait: Path, speech_of: SpeechOf, processes_with: ProcessesWith
) -> None:
    """``ray job stop``: no engine works on, results are whole; submitted again, the rest is done."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    lines: list[dict[str, Any]] = [
        {"id": "long", "image": str(portrait), "audio": str(speech_of(LONG))},
        {"id": "first", "image": str(portrait), "audio": str(speech_of(25)), "priority": 5},
        {"id": "last", "image": str(portrait), "audio": str(speech_of(30)), "output": "more/last.mp4"},
    ]
    path, out = manifest(tmp_path, *lines), tmp_path / "out"
    client = JobSubmissionClient(cluster.dashboard)
    command = f"{sys.executable} -m actors.batch {path} --out {out} --json"
    folder = {"working_dir": str(ROOT), "excludes": ["/tests/", "/docs/", ".mypy_cache", ".ruff_cache"]}

    def submitted() -> str | None:
        with suppress(RuntimeError):  # the agent that starts jobs is the last of Ray's parts that comes up
            return str(client.submit_job(entrypoint=command, runtime_env=folder))
        return None

    def over(job: str) -> bool:
        return bool(client.get_job_status(job).is_terminal())

    first = until(submitted, "a job is taken")
    until(lambda: window_kept(out, "long") or over(first), "a window of the long job is kept")
    assert not over(first), client.get_job_logs(first)
    client.stop_job(first)
    until(lambda: over(first), "the job has stopped")
    assert client.get_job_status(first) == JobStatus.STOPPED
    until(lambda: not cluster.busy() and not processes_with(str(out)), "GPUs and processes are free")
    assert ("first", "done") in ended(out)  # its priority is higher
    assert "long" not in dict(ended(out))
    assert not (out / "long.mp4").exists()
    stopped = ended(out)

    second = until(submitted, "a job is taken")
    until(lambda: over(second), "the batch ends")
    log = client.get_job_logs(second)
    assert client.get_job_info(second).driver_exit_code == 0, log
    assert f"{len(stopped)} done before, {3 - len(stopped)} to do" in log
    assert "goes on with the segments and windows that are kept  job=long" in log
    assert ended(out)[: len(stopped)] == stopped
    assert sorted(ended(out)) == [("first", "done"), ("last", "done"), ("long", "done")]
    for record in results(out):
        frames = {"first": 25, "long": LONG, "last": 30}[record["id"]]
        check_video(Path(record["output"]), frames)
        assert (record["frames"], record["width"], record["engine"]) == (frames, 64, "draft")
    assert [entry.name for entry in (out / ".infinitetalk").iterdir()] == ["lock"]


@pytest.mark.long
def test_a_killed_driver_loses_nothing(
    cluster: Cluster, tmp_path: Path, portrait: Path, speech_of: SpeechOf
) -> None:
    """kill -9, and half a line in the results: what is done stays, what was changed is done again."""
    lines: list[dict[str, Any]] = [
        {"id": "kept", "image": str(portrait), "audio": str(speech_of(25))},
        {"id": "changed", "image": str(portrait), "audio": str(speech_of(30))},
        {"id": "long", "image": str(portrait), "audio": str(speech_of(LONG))},
    ]
    path, out = manifest(tmp_path, *lines), tmp_path / "out"
    first = batch(path, "--out", out, **joined(cluster))

    def in_the_middle() -> bool:
        return len(ended(out)) == 2 and window_kept(out, "long")

    until(lambda: in_the_middle() or first.poll() is not None, "a window of the long job is kept")
    first.send_signal(signal.SIGKILL)
    log = first.communicate()[1]
    assert first.returncode == -signal.SIGKILL, log
    before = (out / "kept.mp4").stat().st_mtime_ns
    with (out / "results.jsonl").open("a") as file:
        file.write('{"id": "long", "status": "do')
    manifest(tmp_path, lines[0], {**lines[1], "max_frames": 20}, lines[2])
    code, told, log = ended_batch(path, "--out", out, **joined(cluster))
    assert (code, told["done_before"], told["done"], told["failed"]) == (0, 1, 2, 0), log
    assert "not whole and is cut off" in log
    assert "changed since it was made, and done again  job=changed line=2" in log
    assert [status for _, status in ended(out)] == ["done"] * 4
    assert sorted(name for name, _ in ended(out)) == ["changed", "changed", "kept", "long"]
    assert (out / "kept.mp4").stat().st_mtime_ns == before
    check_video(out / "changed.mp4", 20)
    check_video(out / "long.mp4", LONG)


def test_ctrl_c_cancels(
    cluster: Cluster, tmp_path: Path, portrait: Path, speech_of: SpeechOf, processes_with: ProcessesWith
) -> None:
    """Exit code 130, nothing blamed on a job, no engine at work; impatience changes nothing."""
    path = manifest(tmp_path, {"id": "long", "image": str(portrait), "audio": str(speech_of(LONG))})
    out = tmp_path / "out"
    process = batch(path, "--out", out, **joined(cluster))
    until(lambda: window_kept(out, "long") or process.poll() is not None, "a window is kept")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    printed, log = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, json.loads(printed)["error"]) == (130, "JobCancelled"), log
    assert "Traceback" not in log
    assert results(out) == []
    until(lambda: not cluster.busy() and not processes_with(str(out)), "GPUs and processes are free")


def test_files_come_from_and_go_to_other_places(
    cluster: Cluster, tmp_path: Path, portrait: Path, speech_of: SpeechOf
) -> None:
    """A picture by http, a speech from a bucket, results into it; a bad job; another machine goes on."""
    for folder in ("s3/b", "site"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(portrait, tmp_path / "site" / "a.png")
    shutil.copy(speech_of(25), tmp_path / "s3" / "b" / "a.wav")
    shutil.copy(speech_of(25), tmp_path / "hour.wav")
    site = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path / "site")
    )
    threading.Thread(target=site.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{site.server_port}"
    good = {"id": "good", "image": f"{address}/a.png?signature=x", "audio": "s3://b/a.wav"}
    path = manifest(
        tmp_path,
        {"id": "late", "image": str(portrait), "audio": "hour.wav", "audio_start": 60.0},
        {"id": "lost", "image": f"{address}/missing.png", "audio": "hour.wav"},
        good,
    )
    with running_s3(tmp_path / "s3") as endpoint:
        env = {
            **joined(cluster),
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": endpoint,
        }
        arguments = (path, "--out", "s3://b/talks", "--work-dir")
        code, told, log = ended_batch(*arguments, tmp_path / "one", **env)
        assert (code, told["done"], told["failed"]) == (1, 1, 2), log
        stored = tmp_path / "s3" / "b" / "talks"
        check_video(stored / "good.mp4", 25)
        assert results(tmp_path / "one") == results(stored)
        told_of = {record["id"]: record for record in results(stored)}
        late, lost, done = (told_of[name] for name in ("late", "lost", "good"))
        assert (late["error"]["code"], late["error"]["field"]) == ("invalid_input", "audio_start")
        assert "answered 404" in lost["error"]["message"]
        assert (done["output"], done["status"]) == ("s3://b/talks/good.mp4", "done")
        assert not (tmp_path / "one" / "good.mp4").exists()

        site.shutdown()
        manifest(tmp_path, good)
        code, told, log = ended_batch(*arguments, tmp_path / "other-machine", **env)
        assert (code, told["done_before"], told["done"]) == (0, 1, 0), log
    site.server_close()


def test_a_wrong_manifest_or_machine_starts_nothing(tmp_path: Path, portrait: Path) -> None:
    """Exit codes 2 and 3, for people and programs; a folder that Ray deletes takes no results."""
    path = manifest(
        tmp_path, {"image": str(portrait), "audio": "no.wav"}, {"image": "no.png", "audio": "no.wav"}
    )
    code, told, log = ended_batch(path, "--out", tmp_path / "out")
    assert (code, told["error"], len(told["problems"])) == (2, "InvalidManifest", 3)
    assert "line 2, image: " in log
    assert "3 things are wrong, and nothing was started" in log
    assert not (tmp_path / "out").exists()
    code, told, _ = ended_batch(path, "--out", tmp_path / "out", INFINITETALK_ENGINE="dratf")
    assert (code, told["error"]) == (3, "ConfigurationError")
    path = manifest(tmp_path, {"image": str(portrait), "audio": str(ROOT / "examples" / "speech.wav")})
    code, told, _ = ended_batch(path, "--out", "out", RAY_JOB_CONFIG_JSON_ENV_VAR="{}", RAY_ADDRESS="x:1")
    assert (code, "absolute path" in told["message"]) == (2, True)


def test_a_line_is_stored_whole_or_not_at_all(tmp_path: Path) -> None:
    """Where only a part of a line fits on the disk it is taken back, and told."""
    folder = BatchFolder(tmp_path)
    Results(folder).append({"id": "a", "status": "done"})
    size = folder.results.stat().st_size
    code = (
        "import sys; from pathlib import Path; from pipeline.batch_folder import BatchFolder, Results\n"
        "Results(BatchFolder(Path(sys.argv[1]))).append({'id': 'b', 'status': 'done'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, size + 9)),
    )
    assert f"can't write {folder.results}: only 9 of" in done.stderr
    assert results(tmp_path) == [{"id": "a", "status": "done"}]
    assert list(Results(folder).last) == ["a"]


def test_a_folder_takes_one_batch_at_a_time(tmp_path: Path) -> None:
    """A second one is refused while the first is at work."""
    with (
        BatchFolder(tmp_path).locked(),
        pytest.raises(InvalidRequest, match="another batch"),
        BatchFolder(tmp_path).locked(),
    ):
        pass


def test_a_folder_knows_what_is_its_own(tmp_path: Path) -> None:
    """Itself and all below it, and its address: a full disk there ends the batch, elsewhere one job."""
    folder = BatchFolder(tmp_path / "out", "s3://b/talks")
    ours = [str(folder.path), str(folder.path / "more"), "s3://b/talks/a.mp4"]
    others = [str(tmp_path), f"{folder.path}-2/a.mp4", "s3://b/talks-2/a.mp4"]
    assert [folder.holds(place) for place in (*ours, *others)] == [True] * 3 + [False] * 3


def test_jobs_on_their_way_to_a_bucket_are_this_users_alone(tmp_path: Path) -> None:
    """The folder in the scratch folder, whose path others can guess: refused where they may enter it."""
    folder = tmp_path / f"infinitetalk-batches-{os.getuid()}"
    folder.mkdir()
    path = manifest(tmp_path, {"image": str(ROOT / "examples" / "portrait.png"), "audio": SPEECH})
    code, told, _ = ended_batch(path, "--out", "s3://b/talks", INFINITETALK_SCRATCH_DIR=str(tmp_path))
    assert (code, told["error"], str(folder) in told["message"]) == (3, "ConfigurationError", True)
    assert list(folder.iterdir()) == []
