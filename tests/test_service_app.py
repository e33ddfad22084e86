"""The HTTP application on a real socket: uploads, tokens, limits, errors, and its own OpenAPI document."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from pipeline import ffmpeg
from pipeline.frame_writer import FrameWriter
from pipeline.job_records import NewJob
from pipeline.job_store import JobStore
from pipeline.job_timeline import JobTimeline, Span
from pipeline.seam import SeamReport
from pipeline.service_settings import ServiceSettings
from tests.conftest import ROOT
from tests.free_ports import free_port

PORTRAIT = ROOT / "examples" / "portrait.png"
SPEECH = ROOT / "examples" / "speech.wav"


@dataclass(frozen=True)
class App:
    """A running application."""

    url: str
    data: Path
    pid: int

    def submit(self, **more: Any) -> requests.Response:
        """A good job, but for what ``more`` says (``requests`` keywords)."""
        if not {"files", "json", "data"} & set(more):
            more["files"] = {"image": PORTRAIT.read_bytes(), "audio": SPEECH.read_bytes()}
        return requests.post(f"{self.url}/v1/jobs", timeout=120, **more)

    @property
    def left(self) -> list[str]:
        """Files that nobody claimed."""
        return [path.name for path in (self.data / "incoming").iterdir()]


@contextmanager
def running_app(data: Path, *arguments: str) -> Iterator[App]:
    port = free_port()
    command = [sys.executable, "-m", "tests.app_server", str(data), str(port), *arguments]
    process = subprocess.Popen(command, cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        assert process.poll() is None
        with suppress(requests.ConnectionError):
            if requests.get(f"{url}/health", timeout=120).ok:
                break
        time.sleep(0.05)
    try:
        yield App(url, data, process.pid)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """One application without tokens, with one folder that may be read."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "media").mkdir()
    (folder / "media" / "speech.wav").write_bytes(SPEECH.read_bytes())
    (folder / "secret.wav").write_bytes(SPEECH.read_bytes())
    (folder / "media" / "way-out.wav").symlink_to(folder / "secret.wav")
    with running_app(folder / "data", "--roots", str(folder / "media")) as running:
        yield running


def error_of(answer: requests.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"code", "message", "field", "job_id"}
    return error


def data_uri(path: Path) -> str:
    return "data:application/octet-stream;base64," + base64.b64encode(path.read_bytes()).decode()


@pytest.mark.parametrize(
    "image",
    [{"image": data_uri(PORTRAIT)}, {"image_base64": data_uri(PORTRAIT).partition(",")[2]}, {"image": None}],
)
def test_every_way_in_gives_the_same_file(app: App, image: dict[str, str]) -> None:
    """Form files, data: URIs and bare base64 arrive byte for byte; a path is read where it is."""
    audio = {"audio_path": str(app.data.parent / "media" / "speech.wav")}
    if image == {"image": None}:
        answer = app.submit(files={"image": PORTRAIT.read_bytes()}, data=audio)
    else:
        answer = app.submit(json={**image, **audio})
    assert answer.status_code == 202, answer.text
    job = answer.json()["id"]
    assert answer.headers["location"] == f"/v1/jobs/{job}"
    assert (app.data / "jobs" / job / "received" / "image").read_bytes() == PORTRAIT.read_bytes()
    assert app.left == []


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"image": "http://x/a.png", "audio": "http://x/a.wav", "width": "wide"}, 400, "width"),
        ({"image": "http://x/a.png"}, 400, "audio"),
        ({"audio": "http://x/a.wav"}, 400, "image"),
        ({"image": "http://x/a.png", "audio": "http://x/a.wav", "colour": "red"}, 400, "colour"),
        ({"image": "file:///etc/passwd", "audio": "http://x/a.wav"}, 400, "image_url"),
        ({"image_base64": "%%%", "audio": "http://x/a.wav"}, 400, "image_base64"),
        ({"image_base64": "QUJD", "audio": "http://x/a.wav"}, 400, "image"),
        ({"image": 5, "audio": "http://x/a.wav"}, 400, "image"),
        ({"image": "http://x/a", "image_base64": "QUJD", "audio": "http://x/a.wav"}, 400, "image"),
        ({"image": "http://x/a", "audio_path": "/etc/passwd"}, 400, "audio_path"),
        ({"image": "http://x/a", "audio": "http://x/a", "priority": 101}, 400, "priority"),
        ({"image": "http://x/a", "audio": "http://x/a", "webhook": "ftp://x"}, 400, "webhook"),
        ([1, 2], 400, "body"),
    ],
)
def test_a_wrong_request_names_its_field(app: App, body: Any, status: int, field: str) -> None:
    """4xx in one shape, and nothing of the request stays on disk."""
    before = set((app.data / "jobs").iterdir())
    answer = app.submit(json=body)
    assert (answer.status_code, error_of(answer)["field"]) == (status, field)
    assert app.left == []
    assert set((app.data / "jobs").iterdir()) == before


def test_paths_stay_below_their_roots(app: App) -> None:
    """No way out: neither by dots, nor by a link; what is outside is told like what is not there."""
    media = app.data.parent / "media"
    words = set()
    for path in (media / "way-out.wav", media / ".." / "secret.wav", media / "missing.wav", media):
        answer = app.submit(json={"image": "http://x/a.png", "audio_path": str(path)})
        assert answer.status_code == 400
        words.add(error_of(answer)["message"])
    assert len(words) == 1


def test_files_that_are_no_media_are_refused_at_once(app: App) -> None:
    """Text as sound, sound as a picture, nothing at all, and files for fields that take none."""
    for files, field in (
        ({"image": PORTRAIT.read_bytes(), "audio": b"#EXTM3U\nhttp://127.0.0.1/x.ts\n"}, "audio"),
        ({"image": SPEECH.read_bytes(), "audio": SPEECH.read_bytes()}, "image"),
        ({"image": PORTRAIT.read_bytes(), "audio": b""}, "audio"),
        ({"image": PORTRAIT.read_bytes(), "portrait": PORTRAIT.read_bytes()}, "portrait"),
    ):
        answer = app.submit(files={name: ("../../evil", content) for name, content in files.items()})
        assert (answer.status_code, error_of(answer)["field"]) == (400, field)
        assert app.left == []


def test_a_broken_upload_leaves_nothing(app: App) -> None:
    """A body that ends in the middle of a file is no job, and its file goes."""
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    answer = app.submit(
        data=head + PORTRAIT.read_bytes(), headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert (answer.status_code, error_of(answer)["field"]) == (400, "body")
    assert app.left == []


def test_an_idempotency_key_makes_one_job(app: App) -> None:
    """The second request gets the first one's job; with other inputs it is a conflict."""
    key = {"Idempotency-Key": "once"}
    first, again = app.submit(headers=key), app.submit(headers=key)
    assert (first.status_code, again.status_code) == (202, 200)
    assert first.json()["id"] == again.json()["id"]
    other = app.submit(headers=key, json={"image": "http://x/a.png", "audio": "http://x/a.wav"})
    assert (other.status_code, error_of(other)["code"]) == (409, "conflict")
    assert app.left == []


class Zeros:
    """A form with a huge sound, made while it is sent."""

    def __init__(self, size: int) -> None:
        picture = b'--b\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\nRIFF'
        self.parts: list[tuple[bytes, int]] = [(picture, 1), (bytes(1 << 20), size >> 20)]

    def __iter__(self) -> Iterator[bytes]:
        for content, times in self.parts:
            for _ in range(times):
                yield content
        yield b'\r\n--b\r\nContent-Disposition: form-data; name="image_url"\r\n\r\nhttp://x/a.png\r\n--b--\r\n'


def memory_of(pid: int) -> int:
    """The most that a process ever held, bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) << 10


def test_a_gigabyte_needs_no_memory(app: App) -> None:
    """A 1 GB upload goes to disk as it arrives."""
    app.submit()
    before = memory_of(app.pid)
    answer = app.submit(data=Zeros(1 << 30), headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 202, answer.text
    job = answer.json()["id"]
    assert (app.data / "jobs" / job / "received" / "audio").stat().st_size == (1 << 30) + 4
    assert memory_of(app.pid) - before < 100 << 20
    assert requests.delete(f"{app.url}/v1/jobs/{job}", timeout=120).status_code == 204


def test_limits_of_size_and_of_the_queue(tmp_path: Path) -> None:
    """Too large is 413, by the header and by counting; a full queue is 429 with Retry-After."""
    with running_app(tmp_path, "--max-upload", "3000000", "--max-queued", "1") as app:
        form = {"Content-Type": "multipart/form-data; boundary=b"}
        counted = app.submit(data=Zeros(8 << 20), headers=form)
        assert (counted.status_code, error_of(counted)["code"]) == (413, "too_large")
        declared = app.submit(files={"image": bytes(4_000_000)})
        assert declared.status_code == 413
        assert app.submit().status_code == 202
        full = app.submit()
        assert (full.status_code, error_of(full)["code"]) == (429, "queue_full")
        assert int(full.headers["retry-after"]) > 0
        ready = requests.get(f"{app.url}/ready", timeout=120)
        assert (ready.status_code, ready.json()["reasons"]) == (503, ["the queue is full"])
        assert app.left == []


def test_tokens_have_names_and_jobs_owners(tmp_path: Path) -> None:
    """No token, a wrong one, another's: 401, 401, 404; with the word Bearer, or without, as RunPod's."""
    with running_app(tmp_path, "--tokens", "anna:secret-of-anna,bert:secret-of-bert") as app:

        def ask(path: str, token: str | None) -> requests.Response:
            headers = {} if token is None else {"authorization": token}
            return requests.get(app.url + path, headers=headers, timeout=120)

        job = app.submit(headers={"Authorization": "Bearer secret-of-anna"}).json()["id"]
        for path in ("/v1/jobs", f"/v1/jobs/{job}", "/v1/videos", "/v2/x/health", f"/v2/x/status/{job}"):
            assert ask(path, None).status_code == 401
            assert ask(path, "Bearer secret-of-nobody").status_code == 401
            assert ask(path, "secret-of-anna").status_code in (200, 404)
        assert ask(f"/v1/jobs/{job}", "bearer secret-of-anna").status_code == 200
        assert ask(f"/v1/jobs/{job}", "secret-of-bert").status_code == 404
        assert ask("/health", None).status_code == 200
        assert ask(f"/v1/jobs/{job}/video?sig=0&until={'9' * 5000}", None).status_code == 401


def test_nobody_hears_a_traceback(app: App) -> None:
    """Unknown paths and methods have the same shape of error."""
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("PUT", "/v1/jobs", 405),
        ("GET", "/v1/jobs?limit=x", 422),
    ):
        answer = requests.request(method, app.url + path, timeout=120)
        assert answer.status_code == status
        error_of(answer)
    runpod = requests.post(f"{app.url}/v2/x/run", json={"input": {"input_type": "song"}}, timeout=120)
    assert (runpod.status_code, runpod.json()["field"]) == (400, "input_type")
    openai = requests.post(f"{app.url}/v1/videos", json={"prompt": "x"}, timeout=120).json()["error"]
    assert set(openai) == {"message", "type", "param", "code"}


def test_the_openapi_document_holds(app: App, tmp_path: Path) -> None:
    """schemathesis finds neither a 5xx nor an answer that the document does not describe."""
    command = [
        str(Path(sys.executable).parent / "schemathesis"),
        "run",
        f"{app.url}/openapi.json",
        "--checks",
        "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        "--exclude-path-regex",
        "events|runsync",  # they answer when a job is over
        "--max-examples",
        "15",
        "--phases",
        "examples,coverage,fuzzing",
        "--seed",
        "1",
        "--generation-database",
        "none",
        "--no-color",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout[-6000:]


def test_the_timeline_of_a_job(app: App) -> None:
    """409 until something was recorded; then JSON that begins with the queue, and a picture."""
    job = app.submit().json()
    url = f"{app.url}/v1/jobs/{job['id']}"
    for name in ("timeline", "timeline.svg"):
        assert error_of(early := requests.get(f"{url}/{name}", timeout=120))["code"] == "conflict"
        assert early.status_code == 409
        assert requests.get(f"{app.url}/v1/jobs/none/{name}", timeout=120).status_code == 404
    begin = job["created"] + 5
    spans = tuple(Span(kind, begin, begin + 10, gpu=0, node="n", segment=0) for kind in ("segment", "window"))
    work = app.data / "jobs" / job["id"] / "work"
    work.mkdir(parents=True, exist_ok=True)
    (work / "timeline.json").write_text(json.dumps(JobTimeline(job["id"], spans).to_json()))
    timeline = JobTimeline.from_json(requests.get(f"{url}/timeline", timeout=120).json())
    assert [span.kind for span in timeline.spans] == ["queued", "segment", "window"]
    assert timeline.spans[0].seconds == pytest.approx(5, abs=0.01)
    picture = requests.get(f"{url}/timeline.svg", timeout=120)
    assert picture.headers["Content-Type"].startswith("image/svg+xml")
    assert "queued" in "".join(ET.fromstring(picture.text).itertext())


def test_pictures_hold_up_nothing_else(app: App) -> None:
    """Many ask for a job's seams at once: a job is taken before they all are drawn."""
    store = JobStore(ServiceSettings(data_dir=app.data))
    job = store.index.add(NewJob("v1", "local", {}, {}, "f", priority=100), 1000)[0].id
    store.job(job).mkdir()
    with FrameWriter(store.video(job), 640, 480, ffmpeg.FINAL) as writer:
        for shade in range(100):
            writer.write(np.full((480, 640, 3), shade, np.uint8))
    seams = [
        asdict(SeamReport(frame, 12, "morph", *[1.0] * 7, 0.0, 0.1, None, "good")) for frame in (20, 50, 70)
    ]
    assert store.index.claim("r") is not None
    store.index.finish(job, "r", "completed", result={"fps": 25, "seams": seams})
    with ThreadPoolExecutor(16) as threads:
        address = f"{app.url}/v1/jobs/{job}/seams.png"
        drawn = [threads.submit(requests.get, address, timeout=120) for _ in range(16)]
        wait(drawn, return_when=FIRST_COMPLETED)
        assert app.submit().status_code == 202
        assert sum(picture.done() for picture in drawn) < 10
        assert {picture.result().status_code for picture in drawn} == {200}
    store.delete(job)
    store.index.close()


def test_runpods_health_counts_the_gpus_that_work(app: App) -> None:
    """By the pool, whatever jobs there are."""
    workers = requests.get(f"{app.url}/v2/x/health", timeout=120).json()["workers"]
    assert (workers["ready"], workers["running"], workers["idle"]) == (2, 1, 1)


def test_the_pool_is_shown_to_who_has_a_token(tmp_path: Path) -> None:
    """GPUs with node, device and state, and how many jobs there are; whose they are is nobody's business."""
    with running_app(tmp_path, "--tokens", "anna:secret-of-anna") as app:
        assert requests.get(f"{app.url}/v1/pool", timeout=120).status_code == 401
        answer = requests.get(
            f"{app.url}/v1/pool", headers={"Authorization": "Bearer secret-of-anna"}, timeout=120
        )
        gpu = {"gpu": 0, "node": "here", "device": "a GPU", "state": "busy"}
        assert answer.json() == {"gpus": [gpu], "jobs": 1}
