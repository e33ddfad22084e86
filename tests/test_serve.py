"""The service on a real Ray Serve: jobs by every API, and what they survive."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import runpod
from ray._raylet import GcsClient, GcsClientOptions, GlobalStateAccessor

from pipeline.frames import check_video
from serve_app import SETTINGS_FILE
from tests.conftest import ROOT
from tests.metrics_page import Samples, key, until
from tests.service_process import HEADERS, Service, kill_all, running_service
from tests.test_stitch import planes


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for the tests that leave it alive."""
    folder = tmp_path_factory.mktemp("service")
    with running_service(
        folder / "data",
        uuid.uuid4().hex,
        folder / "log",
        INFINITETALK_DRAFT_ARGS="--draft-window-seconds 0.3",
        INFINITETALK_SERVE_VOLUME=str(folder),
        INFINITETALK_VOCAL_SEPARATOR=f"{folder}/separator {{input}} {{folder}}",
    ) as running:
        yield running


def frames_of(content: bytes, tmp_path: Path, wanted: int) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(content)
    check_video(path, wanted)


def test_curl_from_the_readme_gives_a_playable_file(service: Service, tmp_path: Path) -> None:
    """The README's commands, word for word but for the address and the size: upload, wait, fetch."""
    block = re.search(r"```sh\n(curl .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    script = block[1].replace("http://127.0.0.1:8000", service.url).replace("size=480p", "width=64")
    script = script.replace("portrait.png", str(ROOT / "examples" / "portrait.png"))
    script = script.replace("speech.wav", str(ROOT / "examples" / "speech.wav"))
    script = script.replace("$TOKEN", "secret-of-anna")
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, check=True, timeout=120)
    check_video(tmp_path / "talk.mp4", 538)


def test_a_video_is_served_in_parts(
    service: Service, speech_of: Callable[[int], Path], tmp_path: Path
) -> None:
    """Range, ETag, HEAD, base64 and a signed link give the same bytes; strangers get none."""
    job = service.submit(20, speech_of)
    done = service.until_over(job)
    assert done["state"] == "completed", done
    whole = service.get(f"/v1/jobs/{job}/video")
    frames_of(whole.content, tmp_path, 20)
    part = service.get(f"/v1/jobs/{job}/video", headers={**HEADERS, "Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole.content[10:20])
    known = {**HEADERS, "Range": "bytes=0-4", "If-Range": whole.headers["etag"]}
    assert service.get(f"/v1/jobs/{job}/video", headers=known).content == whole.content[:5]
    head = requests.head(f"{service.url}/v1/jobs/{job}/video", headers=HEADERS, timeout=120)
    assert int(head.headers["content-length"]) == len(whole.content)
    encoded = service.get(f"/v1/jobs/{job}/video?encoding=base64").json()["video_base64"]
    assert base64.b64decode(encoded) == whole.content
    link = done["video"]
    assert requests.get(service.url + link, timeout=120).content == whole.content
    assert requests.get(service.url + link[:-1] + "x", timeout=120).status_code == 403
    assert requests.get(f"{service.url}/v1/jobs/{job}/video", timeout=120).status_code == 401
    bert = {"Authorization": "Bearer secret-of-bert"}
    assert service.get(f"/v1/jobs/{job}", headers=bert).status_code == 404
    assert service.get("/v1/jobs", headers=bert).json()["jobs"] == []


def test_events_are_told_and_resumed(service: Service, speech_of: Callable[[int], Path]) -> None:
    """A listener hears every state, and one that comes back hears what it missed, once."""
    job = service.submit(150, speech_of)

    def listen(last: int = 0, until: str = "") -> list[tuple[int, str, dict[str, Any]]]:
        seen = []
        with service.get(
            f"/v1/jobs/{job}/events", headers={**HEADERS, "Last-Event-ID": str(last)}, stream=True
        ) as answer:
            fields: dict[str, str] = {}
            for line in answer.iter_lines(decode_unicode=True):
                name, _, value = line.partition(": ")
                fields[name] = value
                if not line and "data" in fields:
                    seen.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
                    if fields["event"] == until:
                        return seen
                    fields = {}
        return seen

    first = listen(until="segment")
    rest = listen(first[-1][0])
    whole = listen()
    assert [event[0] for event in first + rest] == [event[0] for event in whole]
    states = [data["state"] for _, kind, data in whole if kind == "status"]
    assert states == ["queued", "in_progress", "completed"]
    progress = [data["progress"] for _, kind, data in whole if kind == "progress"]
    assert progress == sorted(progress)
    assert {"segment", "log", "progress", "status"} == {kind for _, kind, _ in whole}


def test_the_runpod_sdk_runs_unmodified(
    service: Service, speech_of: Callable[[int], Path], tmp_path: Path
) -> None:
    """run, status, output, run_sync, stream, cancel, health, purge_queue of runpod 1.12."""
    runpod.api_key = "secret-of-anna"
    runpod.endpoint_url_base = service.url + "/v2"
    endpoint = runpod.Endpoint("infinitetalk")
    given = {
        "input_type": "image",
        "person_count": "single",
        "image_base64": "data:image/png;base64,"
        + base64.b64encode((ROOT / "examples" / "portrait.png").read_bytes()).decode(),
        "wav_base64": base64.b64encode(speech_of(30).read_bytes()).decode(),
        "image_url": None,
        "width": 64,
        "height": 64,
        "max_frame": None,
        "use_multi_gpu": True,
        "gpuCount": 2,
    }
    job = endpoint.run(given)
    pieces = list(job.stream())
    assert pieces
    assert job.status() == "COMPLETED"
    output = job.output()
    frames_of(base64.b64decode(output["video"]), tmp_path, 30)
    assert output["success"] is True
    assert (output["segments_processed"], output["gpu_count"]) == (1, 1)
    synced = endpoint.run_sync({**given, "network_volume": True}, timeout=120)
    check_video(Path(synced["video_path"]), 30)
    longer = {**given, "wav_base64": base64.b64encode(speech_of(900).read_bytes()).decode()}
    long = endpoint.run(longer)
    service.until(long.job_id, lambda found: found["state"] == "in_progress")
    assert endpoint.health()["jobs"]["completed"] >= 2
    others = [endpoint.run(longer) for _ in range(8)]  # the runner takes six jobs at a time
    removed = endpoint.purge_queue()["removed"]
    assert removed >= 3
    assert [job.status() for job in others].count("CANCELLED") == removed
    assert {job.cancel()["status"] for job in (long, *others)} == {"CANCELLED"}
    assert list(long.stream()) is not None
    with pytest.raises(RuntimeError, match="401"):
        runpod.api_key = "wrong-token"
        runpod.Endpoint("infinitetalk").run(given)


def test_the_asyncio_client_of_runpod(service: Service, speech_of: Callable[[int], Path]) -> None:
    """AsyncioEndpoint: run, status, output, cancel."""
    import aiohttp

    runpod.api_key = "secret-of-anna"
    runpod.endpoint_url_base = service.url + "/v2"
    given = {
        "image_base64": base64.b64encode((ROOT / "examples" / "portrait.png").read_bytes()).decode(),
        "wav_base64": base64.b64encode(speech_of(20).read_bytes()).decode(),
        "width": 64,
        "height": 64,
    }

    async def use() -> None:
        async with aiohttp.ClientSession() as session:
            endpoint = runpod.AsyncioEndpoint("infinitetalk", session)
            job = await endpoint.run(given)
            output = await job.output(timeout=120)
            assert base64.b64decode(output["video"])[4:8] == b"ftyp"
            other = await endpoint.run(given)
            await other.cancel()
            assert await other.status() == "CANCELLED"

    asyncio.run(use())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_openai_sdk_runs_unmodified(
    service: Service, speech_of: Callable[[int], Path], tmp_path: Path
) -> None:
    """create, create_and_poll, retrieve, list, download_content, delete of openai's videos."""
    client = openai.OpenAI(base_url=service.url + "/v1", api_key="secret-of-anna", max_retries=0)
    speech = "data:audio/wav;base64," + base64.b64encode(speech_of(25).read_bytes()).decode()
    portrait = ROOT / "examples" / "portrait.png"
    video = client.videos.create_and_poll(
        prompt="hello",
        input_reference=portrait,
        size="64x64",
        extra_body={"audio": speech},  # type: ignore[arg-type]
    )
    assert (video.status, video.progress, video.size, video.seconds) == ("completed", 100, "64x64", "1")
    frames_of(client.videos.download_content(video.id).read(), tmp_path, 25)
    assert client.videos.retrieve(video.id).status == "completed"
    assert video.id in [found.id for found in client.videos.list(limit=1)]
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)
    with pytest.raises(openai.BadRequestError, match="input_reference"):
        client.videos.create(prompt="hello")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=service.url + "/v1", api_key="nobody", max_retries=0).videos.list()


def test_the_service_is_counted(service: Service, speech_of: Callable[[int], Path]) -> None:
    """Jobs, GPUs and requests of the running service are on the metrics page."""
    job = service.submit(20, speech_of)
    assert service.until_over(job)["state"] == "completed"
    service.get("/v1/jobs/nobody")
    service.get("/no/such/path")
    counted = "http_answer_seconds_count"

    def whole(found: Samples) -> bool:
        routes = {dict(labels).get("route") for name, labels in found if name == counted}
        ended = found.get(key("job_seconds_count", outcome="completed"), 0)
        told = found.get(key("jobs", state="completed"), 0) and found.get(key("stored_bytes"), 0)
        none_waits = found.get(key("jobs", state="queued")) == 0
        return {"/v1/jobs", "other"} <= routes and ended >= 1 and told and none_waits

    found = until(service.metrics, whole)
    statuses = {
        (labels["route"], labels["method"], labels["status"])
        for labels in (dict(labels) for name, labels in found if name == counted)
    }
    assert ("/v1/jobs", "POST", "202") in statuses
    assert {("/v1/jobs/{job}", "GET", "200"), ("/v1/jobs/{job}", "GET", "404")} <= statuses
    assert ("other", "GET", "404") in statuses
    sent = (ROOT / "examples" / "portrait.png").stat().st_size
    assert found[key("http_received_bytes_total", route="/v1/jobs")] > sent
    assert found[key("gpus", state="ready")] == 2


def engines_of(service: Service, processes_with: Callable[[str], list[int]]) -> list[str]:
    """Where the service's engines answer, by their own command lines."""
    found = []
    for pid in processes_with(f"TEST_MARK={service.mark}"):
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if "pipeline.draft" in words[:3]:
            found.append(f"http://127.0.0.1:{words[words.index('--port') + 1]}")
    return found


def in_work(engine: str) -> int:
    """Prompts that an engine says are running or waiting."""
    queue = requests.get(f"{engine}/queue", timeout=120).json()
    return len(queue["queue_running"]) + len(queue["queue_pending"])


def test_cancelling_frees_the_engines(
    service: Service, speech_of: Callable[[int], Path], processes_with: Callable[[str], list[int]]
) -> None:
    """A job is cancelled while it renders: two seconds later no engine has anything to do, as each says.

    The job that waits behind it is rendered then, and the cancelled one can be taken up again.
    """
    engines = engines_of(service, processes_with)
    assert len(engines) == 2
    long = service.submit(1500, speech_of)
    service.until(long, lambda job: job["stage"] == "rendering" and job["progress"] > 0)
    deadline = time.monotonic() + 150
    while not all(in_work(engine) for engine in engines):
        assert time.monotonic() < deadline
    cancelled = time.monotonic()
    assert service.post(f"/v1/jobs/{long}/cancel").json()["state"] == "cancelled"
    while any(in_work(engine) for engine in engines):
        assert time.monotonic() < cancelled + 2
        time.sleep(0.02)
    after = service.submit(20, speech_of)
    assert service.until_over(after)["state"] == "completed"
    assert service.post(f"/v1/jobs/{long}/retry").json()["state"] == "queued"
    # Cancelled and taken up at once: the thread that still ends must not take this claim for its own.
    service.until(long, lambda job: job["stage"] == "rendering" and job["detail"]["windows_done"] > 0)
    service.post(f"/v1/jobs/{long}/cancel")
    assert service.post(f"/v1/jobs/{long}/retry").json()["state"] == "queued"
    assert service.until_over(long)["state"] == "completed"


def test_cancel_works_in_every_other_state(
    service: Service, speech_of: Callable[[int], Path], processes_with: Callable[[str], list[int]]
) -> None:
    """Waiting, preparing, joining: the job is over at once, and is never rendered; a finished one stays."""

    def cancel(job: str) -> str:
        state: str = service.post(f"/v1/jobs/{job}/cancel").json()["state"]
        return state

    preparing = service.submit(40_000, speech_of)
    waiting = service.submit(900, speech_of)
    service.until(preparing, lambda job: job["stage"] == "preparing")
    assert cancel(waiting) == "cancelled"
    assert cancel(preparing) == "cancelled"
    # At another rate the whole video is encoded once more: there is time to cancel.
    joining = service.submit(200, speech_of, width=320, height=320, fps=120)
    service.until(joining, lambda job: job["stage"] == "joining")
    assert cancel(joining) == "cancelled"
    finished = service.submit(20, speech_of)
    assert service.until_over(finished)["state"] == "completed"
    assert cancel(finished) == "completed"
    assert service.get(f"/v1/jobs/{finished}/video").status_code == 200
    for job in (preparing, waiting, joining):
        told = service.job(job)
        assert (told["state"], told["result"]) == ("cancelled", None)
        assert service.get(f"/v1/jobs/{job}/video").status_code == 409
    assert not any(in_work(engine) for engine in engines_of(service, processes_with))


def test_the_finished_front_is_watched_while_the_rest_renders(
    service: Service, speech_of: Callable[[int], Path], tmp_path: Path
) -> None:
    """The playlist grows window by window, works by its link alone, and at the end is the final video."""
    job = service.submit(500, speech_of)
    early = service.until(job, lambda found: found["stream"])
    assert early["state"] == "in_progress"
    link = service.url + early["stream"]
    seen = requests.get(link, timeout=120)
    assert seen.headers["content-type"].startswith("application/vnd.apple.mpegurl")
    lines = seen.text.splitlines()
    assert "#EXT-X-ENDLIST" not in lines
    assert 0 < sum(float(line[8:-1]) for line in lines if line.startswith("#EXTINF:")) < 20
    pieces = [line for line in lines if not line.startswith("#")]
    first = requests.get(f"{service.url}/v1/jobs/{job}/{pieces[0]}", timeout=120)
    assert (first.status_code, first.content[4:8]) == (200, b"moof")
    assert requests.get(f"{service.url}/v1/jobs/{job}/{pieces[0][:-1]}x", timeout=120).status_code == 403
    bare = f"/v1/jobs/{job}/{pieces[0].partition('?')[0]}"
    assert requests.get(service.url + bare, timeout=120).status_code == 401
    assert service.get(bare).content == first.content
    bert = {"Authorization": "Bearer secret-of-bert"}
    assert service.get(f"/v1/jobs/{job}/stream.m3u8", headers=bert).status_code == 404
    assert service.get(f"/v1/jobs/{job}/stream/0000000-{16 * '0'}.m4s").status_code == 404
    assert service.get(f"/v1/jobs/{job}/stream/..%2fplan.json").status_code in (404, 422)

    done = service.until_over(job, 90)
    whole = requests.get(link, timeout=120).text
    assert whole.startswith(seen.text)
    assert whole.endswith("#EXT-X-ENDLIST\n")
    video = tmp_path / "talk.mp4"
    video.write_bytes(service.get(f"/v1/jobs/{job}/video").content)
    assert planes(link) == planes(video)
    assert len(planes(link)) == 500
    picture = requests.get(service.url + done["seams"], timeout=120)
    assert (picture.status_code, picture.content[:8]) == (200, b"\x89PNG\r\n\x1a\n")
    assert service.get(f"/v1/jobs/{job}/seams.png", headers=bert).status_code == 404
    folder = service.data / "jobs" / job
    assert list(folder.glob("work/stream/*.m4s"))
    assert requests.delete(f"{service.url}/v1/jobs/{job}", headers=HEADERS, timeout=120).status_code == 204
    assert not folder.exists()


def test_a_segment_is_done_again(service: Service, speech_of: Callable[[int], Path], tmp_path: Path) -> None:
    """redo of a segment makes another video and stream; redo of no seam leaves both as they are."""
    job = service.submit(200, speech_of, overlap_frames=20)
    assert service.until_over(job)["result"]["segments_processed"] == 2
    before = service.get(f"/v1/jobs/{job}/video").content

    def redo(**part: int) -> dict[str, Any]:
        answer = service.post(f"/v1/jobs/{job}/redo", json=part)
        assert answer.status_code == 202, answer.text
        return service.until_over(job)

    done = redo(segment=1, seed=77)
    assert (done["state"], done["result"]["redo"]["kept"]) == ("completed", "new"), done
    after = service.get(f"/v1/jobs/{job}/video").content
    assert after != before
    video = tmp_path / "again.mp4"
    video.write_bytes(after)
    assert planes(service.url + done["stream"]) == planes(video)
    failed = redo(seam=5)
    assert failed["state"] == "completed"
    assert not failed["result"]["redo"]["success"]
    assert service.get(f"/v1/jobs/{job}/video").content == after
    assert service.post(f"/v1/jobs/{job}/redo", json={}).status_code == 422


def test_a_failed_job_says_what_to_change(service: Service, speech_of: Callable[[int], Path]) -> None:
    """What only the render finds out is in the job: code, message and field."""
    silent = {"image": "http://127.0.0.1:9/x.png", "width": 64}
    with speech_of(20).open("rb") as sound:
        answer = service.post("/v1/jobs", files={"audio": sound}, data=silent)
    failed = service.until_over(answer.json()["id"])
    assert failed["state"] == "failed"
    assert failed["error"]["field"] == "image"
    assert "not a public address" in failed["error"]["message"]


def test_vocals_are_separated_where_the_operator_has_a_separator(
    service: Service, speech_of: Callable[[int], Path], processes_with: Callable[[str], list[int]]
) -> None:
    """A separator that is missing fails the job that wants it, and no engine; one that is there is used."""

    def engines() -> set[int]:
        pids = processes_with(f"TEST_MARK={service.mark}")
        return {pid for pid in pids if b"pipeline.draft" in Path(f"/proc/{pid}/cmdline").read_bytes()}

    before = engines()
    failed = service.until_over(service.submit(20, speech_of, vocals="separate"))
    assert (failed["state"], failed["error"]["code"]) == ("failed", "configuration_error")
    assert "INFINITETALK_VOCAL_SEPARATOR" in failed["error"]["message"]
    program = service.data.parent / "separator"
    program.write_text('#!/bin/sh\ncp "$1" "$2/voice.wav" && touch "$0.ran"\n')
    program.chmod(0o755)
    done = service.until_over(service.submit(20, speech_of, vocals="separate"))
    assert done["state"] == "completed", done
    assert program.with_name("separator.ran").exists()
    assert engines() == before


def test_a_job_survives_its_runner_and_its_replica(
    service: Service,
    speech_of: Callable[[int], Path],
    processes_with: Callable[[str], list[int]],
    tmp_path: Path,
) -> None:
    """kill -9 of the runner actor, then of the replica: the API answers on, the job completes exactly.

    Who watches it goes on too: what was shown stays, and the end is the final video.
    """
    job = service.submit(500, speech_of)
    link = service.url + service.until(job, lambda found: found["stream"])["stream"]
    shown = requests.get(link, timeout=120).text

    def kill(title: str) -> int:
        pids = []
        for pid in processes_with(f"TEST_MARK={service.mark}"):
            with suppress(FileNotFoundError):  # it has just ended by itself
                if title in Path(f"/proc/{pid}/cmdline").read_text():
                    pids.append(pid)
        assert pids, title
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return pids[0]

    kill("ray::JobRunner")
    kill("ray::ServeReplica")
    done = service.until_over(job, 120)
    assert done["state"] == "completed", done
    assert done["result"]["frames"] == 500
    assert done["attempt"] == 2
    assert requests.get(link, timeout=120).text.startswith(shown)
    video = tmp_path / "talk.mp4"
    video.write_bytes(service.get(f"/v1/jobs/{job}/video").content)
    assert planes(link) == planes(video)


@pytest.mark.long
def test_everything_survives_a_power_cut(
    tmp_path: Path, speech_of: Callable[[int], Path], processes_with: Callable[[str], list[int]]
) -> None:
    """kill -9 of all: on the same data, the running job goes on with what it has, the waiting one runs."""
    first_life, second_life = uuid.uuid4().hex, uuid.uuid4().hex
    data, log = tmp_path / "data", tmp_path / "log"

    def kept() -> int:
        return len(list(data.glob("jobs/*/work/segments/*.windows/0*/segment.json")))

    slow = "--draft-window-seconds 0.5"
    with running_service(data, first_life, log, INFINITETALK_DRAFT_ARGS=slow) as service:
        running = service.submit(700, speech_of)
        waiting = service.submit(20, speech_of)
        service.until(running, lambda _: kept() >= 3, 90)
        assert kill_all(first_life)
        service.process.wait()
    before = kept()
    with running_service(data, second_life, log) as service:
        done = service.until_over(running, 120)
        assert done["result"]["frames"] == 700
        assert service.until_over(waiting)["result"]["frames"] == 20
        assert done["attempt"] == 2
        assert done["result"]["nodes"]["KSampler"]["ran"] == done["detail"]["windows_total"] - before
    assert processes_with(f"TEST_MARK={second_life}") == []


def test_ray_shows_no_secret(service: Service, processes_with: Callable[[str], list[int]]) -> None:
    """What Ray knows of actors, and what Serve stores in it, names the file of the settings, and no token."""
    (address,) = {
        word.partition("=")[2]
        for pid in processes_with(f"TEST_MARK={service.mark}")
        for word in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if word.startswith("--gcs-address=")
    }
    state = GlobalStateAccessor(GcsClientOptions.create(address, None, True, False))
    assert state.connect()
    store = GcsClient(address=address)
    actors = [bytes(actor) for actor in state.get_actor_table(None, None)]
    stored = [
        store.internal_kv_get(key, namespace) or b""
        for namespace in (None, b"serve")
        for key in store.internal_kv_keys(b"", namespace)
    ]
    for shown in (actors, stored):
        assert any(SETTINGS_FILE.encode() in entry for entry in shown)
        assert not [entry for entry in shown if b"secret-of-" in entry]
    (place,) = service.data.glob("settings-*")
    assert place.stat().st_mode & 0o777 == 0o600
    assert "secret-of-anna" in place.read_text()


def test_without_tokens_only_loopback_is_served(tmp_path: Path) -> None:
    """A service without tokens refuses to listen to the world, before anything starts."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("INFINITETALK_")}
    env["INFINITETALK_SERVE_DATA_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "infinitetalk", "serve", "--host", "0.0.0.0"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 3
    assert "INFINITETALK_SERVE_TOKENS" in done.stderr
