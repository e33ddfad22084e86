"""The client against engines (the draft, a real ComfyUI), and a stub for what no good engine does."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import websocket
from PIL import Image

from pipeline.comfy_client import ComfyClient
from pipeline.comfy_events import PromptProgress
from pipeline.errors import EngineError, GraphError, JobCancelled, PipelineError
from pipeline.workflow import Graph, Workflow, load
from tests.comfyui_process import BOTH_ENGINES
from tests.free_ports import free_port

EXAMPLES = Path(__file__).parents[1] / "examples"
SILENT_AFTER = 30.0


@pytest.fixture(scope="module")
def workflow() -> Workflow:
    """The production graph."""
    return load("image_single")


@contextmanager
def draft(directory: Path, *flags: str) -> Iterator[ComfyClient]:
    """A draft engine of its own."""
    port = free_port()
    address = ["--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(directory)]
    log = directory / "engine.log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "pipeline.draft", *address, *flags]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    client = ComfyClient(f"http://127.0.0.1:{port}", timeout=5)
    try:
        _wait_until_ready(client, process, log)
        yield client
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(client: ComfyClient, process: subprocess.Popen[bytes], log: Path) -> None:
    late = time.monotonic() + 150
    while True:
        try:
            client.system_stats()
        except EngineError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < late, log.read_text()
            time.sleep(0.05)
        else:
            return


@pytest.fixture(scope="module", params=BOTH_ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyClient]:
    """A well-behaved draft engine, or a real ComfyUI; a window of 13 frames takes half a second or so."""
    if request.param == "comfyui":
        yield ComfyClient(request.getfixturevalue("comfyui").url)
        return
    with draft(tmp_path_factory.mktemp("engine"), "--draft-window-seconds", "2.6") as client:
        yield client


def graph_for(client: ComfyClient, workflow: Workflow, name: str, **values: object) -> Graph:
    """A tiny window whose inputs lie in the engine."""
    portrait = client.upload("portrait.png", (EXAMPLES / "portrait.png").read_bytes(), "test")
    speech = client.upload("speech.wav", (EXAMPLES / "speech.wav").read_bytes(), "test")
    filled: dict[str, object] = {
        "portrait": portrait,
        "speech": speech,
        "motion": None,
        "prompt": "a person talks",
        "seed": 1,
        "width": 64,
        "height": 64,
        "length": 13,
        "frames": f"test/{name}",
    }
    return workflow.fill(filled | values)


def run(client: ComfyClient, graph: Graph, cancelled: threading.Event | None = None, **more: Any) -> Any:
    """``client.run`` with the arguments that most tests share."""
    return client.run(
        graph, cancelled=cancelled or threading.Event(), **{"silent_after": SILENT_AFTER, **more}
    )


# --- a real engine ---------------------------------------------------------------------------------------


def test_a_window_comes_back_as_pictures(engine: ComfyClient, workflow: Workflow) -> None:
    """Files stand under the output node, in order, and are what they should be."""
    seen: list[PromptProgress] = []
    outputs = run(engine, graph_for(engine, workflow, "window"), on_progress=seen.append)
    files = outputs[workflow.slot_node("frames")]
    assert len(files) == 13
    assert [file["filename"] for file in files] == sorted(file["filename"] for file in files)
    assert Image.open(io.BytesIO(engine.view(files[-1]))).size == (64, 64)
    assert seen[-1].state == "success"
    assert workflow.slot_node("seed") in {one.node for one in seen}
    assert [one.fraction for one in seen] == sorted(one.fraction for one in seen)
    assert any(0 < one.fraction < 1 for one in seen)


def test_the_engines_history_does_not_grow(engine: ComfyClient, workflow: Workflow) -> None:
    """A prompt that has ended, however, is taken out of it: an hour of windows would be 60 MB of graphs."""

    def kept() -> set[str]:
        return set(requests.get(f"{engine.url}/history", timeout=120).json())

    before = kept()
    assert run(engine, graph_for(engine, workflow, "history", seed=9))
    with pytest.raises(GraphError):
        run(engine, graph_for(engine, workflow, "history", length=18))
    cancelled = threading.Event()
    with pytest.raises(JobCancelled):
        run(
            engine,
            graph_for(engine, workflow, "history", seed=11),
            cancelled,
            on_progress=lambda _: cancelled.set(),
        )
    assert kept() == before


def test_proxies_of_the_environment_are_for_others(
    engine: ComfyClient, workflow: Workflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a company's proxy, 127.0.0.1 is still reached directly, by HTTP and by WebSocket."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", "example.org")
    seen: list[PromptProgress] = []
    assert run(engine, graph_for(engine, workflow, "proxy", seed=3), on_progress=seen.append)
    assert seen[-1].state == "success"


def test_the_same_graph_again_is_cached(engine: ComfyClient, workflow: Workflow) -> None:
    """The engine returns the old files at once; no harm, because every attempt has its own prefix."""
    graph = graph_for(engine, workflow, "cached")
    first = run(engine, graph)
    seen: list[PromptProgress] = []
    assert run(engine, graph, on_progress=seen.append) == first
    assert workflow.slot_node("seed") in seen[-1].cached


def test_a_socket_that_goes_deaf_does_not_matter(engine: ComfyClient, workflow: Workflow) -> None:
    """Another socket with our client id comes and goes: ours stays open without a word, history is enough."""
    seen: list[PromptProgress] = []

    def steal(progress: PromptProgress) -> None:
        seen.append(progress)
        if len(seen) == 1:
            [item] = requests.get(f"{engine.url}/queue", timeout=120).json()["queue_running"]
            address = f"{engine.url.replace('http', 'ws')}/ws?clientId={item[3]['client_id']}"
            websocket.create_connection(address, timeout=120).close()

    outputs = run(engine, graph_for(engine, workflow, "deaf", seed=12), on_progress=steal)
    assert len(outputs[workflow.slot_node("frames")]) == 13
    assert not seen[-1].ended


def test_two_prompts_at_once_don_t_mix(engine: ComfyClient, workflow: Workflow) -> None:
    """Each run has its own client id and prompt id: every message it hears is its own."""
    graphs = [graph_for(engine, workflow, f"both{seed}", seed=seed) for seed in (21, 22)]
    heard: list[set[str]] = [set(), set()]
    with ThreadPoolExecutor(2) as threads:
        futures = [
            threads.submit(run, engine, graph, on_progress=lambda one, ids=ids: ids.add(one.prompt_id))
            for graph, ids in zip(graphs, heard, strict=True)
        ]
        names = [future.result()[workflow.slot_node("frames")][0]["filename"] for future in futures]
    assert [name[:5] for name in names] == ["both2", "both2"]
    assert names[0] != names[1]
    assert [len(ids) for ids in heard] == [1, 1]
    assert heard[0] != heard[1]


def test_refused_graphs_name_the_node(engine: ComfyClient, workflow: Workflow) -> None:
    """Status 400: the node with class and title, the engine's message and details, on one line."""
    graph = graph_for(engine, workflow, "refused", portrait="nope.png")
    with pytest.raises(GraphError) as error:
        run(engine, graph)
    assert error.value.node == f"node {workflow.slot_node('portrait')} (LoadImage, slot: portrait=image)"
    assert "nope.png" in error.value.reason
    assert "\n" not in str(error.value)
    graph = graph_for(engine, workflow, "refused")
    graph["1"]["class_type"] = "NoSuchNode"
    # The second is how ComfyUI 0.11 says it.
    with pytest.raises(GraphError, match=r"node 1 .*not found|NoSuchNode does not exist.*#1"):
        run(engine, graph)


def test_a_failing_node_is_a_graph_error(engine: ComfyClient, workflow: Workflow) -> None:
    """Validation does not check that a length is 4k+1; the run fails, and says where."""
    with pytest.raises(GraphError, match=r"node \d+ \(\w+, ") as error:
        run(engine, graph_for(engine, workflow, "length", length=18))
    assert "\n" not in str(error.value)


def test_a_half_valid_graph_is_refused(engine: ComfyClient, workflow: Workflow) -> None:
    """200 with node_errors means that an output is dropped: an error here, and nothing goes on running."""
    graph = graph_for(engine, workflow, "half", seed=5)
    graph["90"] = {"class_type": "LoadImage", "inputs": {"image": "nope.png"}}
    graph["91"] = {"class_type": "PreviewImage", "inputs": {"images": ["90", 0]}}
    with pytest.raises(GraphError, match=r"node 90 \(LoadImage\): .*nope\.png"):
        run(engine, graph)
    assert not engine.queue().running + engine.queue().pending


@pytest.mark.parametrize("behind_another", [False, True])
def test_cancelling_is_quick_and_leaves_nothing(
    engine: ComfyClient, workflow: Workflow, behind_another: bool
) -> None:
    """Running or still pending: JobCancelled soon, and the engine is free."""
    cancelled = threading.Event()
    graph = graph_for(engine, workflow, "cancelled", seed=6)
    other = graph_for(engine, workflow, "other", seed=7 + behind_another)
    with ThreadPoolExecutor(1) as threads:
        ahead = threads.submit(run, engine, other) if behind_another else None
        while behind_another and not engine.queue().running:
            time.sleep(0.01)
        threading.Timer(0.2, cancelled.set).start()
        began = time.monotonic()
        with pytest.raises(JobCancelled, match="job seven"):
            run(engine, graph, cancelled, job="seven")
        assert time.monotonic() - began < 8  # 0.2 s when nothing else runs
        if ahead is not None:
            assert len(ahead.result()[workflow.slot_node("frames")]) == 13
    assert not engine.queue().running + engine.queue().pending


def test_cancelled_before_the_start_posts_nothing(engine: ComfyClient, workflow: Workflow) -> None:
    """An event that is already set never reaches the engine."""
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(JobCancelled):
        run(engine, graph_for(engine, workflow, "never"), cancelled)


def test_an_error_of_the_caller_stops_the_prompt(engine: ComfyClient, workflow: Workflow) -> None:
    """When the callback raises, nobody waits for the prompt any more, so it must not go on."""

    def refuse(_: PromptProgress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(engine, graph_for(engine, workflow, "callback", seed=9), on_progress=refuse)
    assert not engine.queue().running + engine.queue().pending


def test_uploads_and_views(engine: ComfyClient) -> None:
    """Same content, same name; other content of that name gets another; a missing file is an error."""
    first = engine.upload("a.bin", b"one", "sub")
    assert first == "sub/a.bin"
    assert engine.upload("a.bin", b"one", "sub") == first
    assert engine.upload("a.bin", b"two", "sub") != first
    assert engine.view({"filename": "a.bin", "subfolder": "sub", "type": "input"}) == b"one"
    with pytest.raises(EngineError, match=r"no file nope\.png: status 404"):
        engine.view({"filename": "nope.png", "subfolder": "", "type": "output"})
    with pytest.raises(GraphError, match=r"upload of a\.bin"):
        engine.upload("a.bin", b"one", "../..")


def test_what_the_engine_says_of_itself(engine: ComfyClient) -> None:
    """A schema of a known class, nothing for an unknown one, a version, and free is taken."""
    assert "KSampler" in engine.object_info("KSampler")
    assert engine.object_info("NoSuchNode") == {}
    assert engine.version()
    engine.free()


# --- an engine in trouble --------------------------------------------------------------------------------


def test_out_of_memory_is_a_graph_error(tmp_path: Path, workflow: Workflow) -> None:
    """It says so, with the node; the next prompt works."""
    with draft(tmp_path, "--draft-fault", "oom@1") as client:
        graph = graph_for(client, workflow, "oom")
        with pytest.raises(GraphError, match=r"node 17 \(KSampler, .*\): out of memory: "):
            run(client, graph)
        assert run(client, graph)


def test_a_silent_socket_does_not_matter(tmp_path: Path, workflow: Workflow) -> None:
    """The prompt finishes while the socket says nothing: the history is found by polling."""
    flags = ("--draft-fault", "silent@1", "--draft-window-seconds", "4")
    with draft(tmp_path, *flags) as client:
        seen: list[PromptProgress] = []
        outputs = run(client, graph_for(client, workflow, "silent"), on_progress=seen.append)
        assert len(outputs[workflow.slot_node("frames")]) == 13
        assert not seen[-1].ended


def test_a_dying_engine_is_noticed_at_once(tmp_path: Path, workflow: Workflow) -> None:
    """EngineError a moment after the process is gone, not after a timeout."""
    with draft(tmp_path, "--draft-fault", "crash@1", "--draft-window-seconds", "2") as client:
        graph = graph_for(client, workflow, "crash")
        began = time.monotonic()
        with pytest.raises(EngineError, match="is gone"):
            run(client, graph)
        assert time.monotonic() - began < 15


def test_garbage_is_an_engine_error(tmp_path: Path, workflow: Workflow) -> None:
    """An answer that is not JSON."""
    with draft(tmp_path, "--draft-fault", "garbage@1") as client, pytest.raises(EngineError, match="JSON"):
        run(client, graph_for(client, workflow, "garbage"))


def test_a_hanging_sampler_can_be_cancelled(tmp_path: Path, workflow: Workflow) -> None:
    """Silence alone is no failure, slow GPUs are silent too; but cancelling doesn't wait for the engine."""
    with draft(tmp_path, "--draft-fault", "hang@1", "--draft-window-seconds", "1") as client:
        cancelled = threading.Event()
        graph = graph_for(client, workflow, "hang")
        threading.Timer(2.0, cancelled.set).start()
        began = time.monotonic()
        with pytest.raises(JobCancelled):
            run(client, graph, cancelled, silent_after=0.5)
        assert 2.0 <= time.monotonic() - began < 20


# --- a stub: what engines should not do ------------------------------------------------------------------

Answer = tuple[int, object]


class Stub:
    """An HTTP server without a WebSocket; ``answers`` maps "METHOD /path" to an answer or a function."""

    def __init__(self) -> None:
        self.prompt_id = ""
        self.calls: list[str] = []
        self.answers: dict[str, Answer | Callable[[], Answer]] = {
            "GET /history": (200, {}),
            "GET /queue": (200, {"queue_running": [], "queue_pending": []}),
            "POST /queue": (200, ""),
            "POST /interrupt": (200, ""),
        }

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        """What the server says; /prompt takes everything unless told otherwise."""
        route = f"{method} /{path.strip('/').split('/')[0].split('?')[0]}"
        self.calls.append(route)
        if route == "POST /prompt":
            self.prompt_id = json.loads(body)["prompt_id"]
            return self._made(route, (200, {"prompt_id": self.prompt_id, "number": 1, "node_errors": {}}))
        return self._made(route, (404, "not here"))

    def _made(self, route: str, default: Answer) -> Answer:
        found = self.answers.get(route, default)
        return found() if callable(found) else found

    def entry(self, status: str, *messages: list[Any], outputs: object = None) -> Answer:
        """A history entry of our prompt."""
        about = {"status_str": status, "completed": status == "success", "messages": list(messages)}
        return 200, {self.prompt_id: {"outputs": outputs or {}, "status": about}}

    def running(self) -> Answer:
        """A queue that says that our prompt runs."""
        return 200, {"queue_running": [[0, self.prompt_id, {}, {}, []]], "queue_pending": []}


@pytest.fixture
def stub() -> Iterator[tuple[Stub, ComfyClient]]:
    """A stub and a client of it."""
    said = Stub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, content = said.answer(self.command, self.path, body)
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            with suppress(OSError):  # the client may have given up
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        do_GET = do_POST = _answer

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield said, ComfyClient(f"http://127.0.0.1:{server.server_port}", timeout=2)
        server.shutdown()


GRAPH: Graph = {"1": {"class_type": "SaveImage", "inputs": {}, "_meta": {"title": "the output"}}}
FILE = {"filename": "a.png", "subfolder": "s", "type": "output"}


def test_nobody_there() -> None:
    """Connection refused is an EngineError that names the address."""
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EngineError, match=f"the engine at {url} is gone"):
        ComfyClient(url).system_stats()
    with pytest.raises(EngineError, match="is gone"):
        run(ComfyClient(url), GRAPH)


def test_history_is_enough(stub: tuple[Stub, ComfyClient]) -> None:
    """Without any socket a run works by polling, and the history may come late."""
    said, client = stub
    late = time.monotonic() + 1
    said.answers["GET /history"] = lambda: (
        (200, {}) if time.monotonic() < late else said.entry("success", outputs={"1": {"images": [FILE]}})
    )
    assert run(client, GRAPH) == {"1": [FILE]}


def test_silence_is_no_failure_while_the_prompt_runs(stub: tuple[Stub, ComfyClient]) -> None:
    """As long as the engine answers and lists the prompt, ``silent_after`` does not count."""
    said, client = stub
    late = time.monotonic() + 2
    said.answers["GET /queue"] = said.running
    said.answers["GET /history"] = lambda: (200, {}) if time.monotonic() < late else said.entry("success")
    assert run(client, GRAPH, silent_after=0.2) == {}


def test_a_lost_prompt_is_an_engine_error(stub: tuple[Stub, ComfyClient]) -> None:
    """Not in the queue and not in the history (an engine that was restarted behind our back)."""
    _, client = stub
    with pytest.raises(EngineError, match="does not know the prompt"):
        run(client, GRAPH, silent_after=0.6)


@pytest.mark.parametrize("stalled", [1.5, 60.0])
def test_an_engine_may_stall_but_not_for_ever(stub: tuple[Stub, ComfyClient], stalled: float) -> None:
    """Loading a model can hold up the server: a poll without an answer counts only after silent_after."""
    said, client = stub
    over = threading.Event()
    late = time.monotonic() + stalled

    def slow() -> Answer:
        over.wait(max(0.0, late - time.monotonic()))
        return said.entry("success", outputs={"1": {"images": [FILE]}})

    said.answers["GET /history"] = slow
    try:
        if stalled < 2:
            assert run(client, GRAPH, silent_after=5.0) == {"1": [FILE]}
        else:
            with pytest.raises(EngineError, match="has not answered for 2 s"):
                run(client, GRAPH, silent_after=2.0)
    finally:
        over.set()


def test_interrupted_by_a_stranger_is_not_our_cancelling(stub: tuple[Stub, ComfyClient]) -> None:
    """In the history it looks like an error; without our asking for it, the engine is to blame."""
    said, client = stub
    said.answers["GET /history"] = lambda: said.entry(
        "error", ["execution_interrupted", {"prompt_id": said.prompt_id, "node_id": "1"}]
    )
    with pytest.raises(EngineError, match="interrupted by somebody else"):
        run(client, GRAPH)


def test_long_complaints_are_cut(stub: tuple[Stub, ComfyClient]) -> None:
    """One line of at most 300 characters, and how many complaints there are besides."""
    said, client = stub
    errors = [{"type": "t", "message": "Value not in list", "details": "x\n" * 1000}] * 3
    said.answers["POST /prompt"] = (400, {"error": {}, "node_errors": {"1": {"errors": errors}}})
    with pytest.raises(GraphError) as error:
        run(client, GRAPH)
    assert error.value.node == "node 1 (SaveImage, the output)"
    assert error.value.reason.endswith("... (and 2 more)")
    assert len(error.value.reason) < 330


NONSENSE: list[tuple[str, Answer, type[PipelineError]]] = [
    ("POST /prompt", (200, "<html>"), EngineError),
    ("POST /prompt", (200, []), EngineError),
    ("POST /prompt", (200, {}), EngineError),
    ("POST /prompt", (200, {"prompt_id": "another", "node_errors": {}}), EngineError),
    ("POST /prompt", (500, "500 Internal Server Error\n\nServer got itself in trouble"), EngineError),
    ("POST /prompt", (400, "<html>"), EngineError),
    ("POST /prompt", (400, {}), GraphError),
    ("POST /prompt", (400, {"error": "x", "node_errors": {"1": 5, "2": {"errors": [None]}}}), GraphError),
    ("GET /history", (200, "half a "), EngineError),
    ("GET /history", (200, [1]), EngineError),
    ("GET /history", (500, "no"), EngineError),
    ("GET /queue", (200, "?"), EngineError),
]


@pytest.mark.parametrize(("route", "answer", "kind"), NONSENSE)
def test_nonsense_becomes_our_error(
    stub: tuple[Stub, ComfyClient], route: str, answer: Answer, kind: type[PipelineError]
) -> None:
    """Whatever an engine says, only our errors come out, on one line."""
    said, client = stub
    said.answers[route] = answer
    with pytest.raises(kind) as error:
        run(client, GRAPH, silent_after=1.0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "entry", [5, {}, {"status": None}, {"status": {"messages": [1, ["a"], ["b", None]]}}]
)
def test_a_strange_history_entry_is_an_engine_error(stub: tuple[Stub, ComfyClient], entry: object) -> None:
    """An entry without a success is none."""
    said, client = stub
    said.answers["GET /history"] = lambda: (200, {said.prompt_id: entry})
    with pytest.raises(EngineError):
        run(client, GRAPH)


def test_an_upload_that_is_too_big_is_not_tried_again(stub: tuple[Stub, ComfyClient]) -> None:
    """413 is the engine's limit: another try would end the same way."""
    said, client = stub
    said.answers["POST /upload"] = (413, "Maximum request body size 104857600 exceeded.")
    with pytest.raises(GraphError, match=r"upload of a\.bin: status 413 Maximum"):
        client.upload("a.bin", b"x")
    said.answers["POST /upload"] = (500, "")
    with pytest.raises(EngineError, match="status 500"):
        client.upload("a.bin", b"x")
    said.answers["POST /upload"] = (200, {"subfolder": ""})
    with pytest.raises(EngineError, match="no name"):
        client.upload("a.bin", b"x")
