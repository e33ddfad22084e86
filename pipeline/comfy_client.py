"""One engine seen from outside: upload, run a graph, fetch what it made, interrupt, free.

Speaks ComfyUI's HTTP protocol and translates every error of ``requests`` into ours.  The socket
(``comfy_socket``) only tells progress; whether a prompt has ended and how is read from ``/history``,
because sockets go silent or close while prompts go on.  What messages mean is in ``comfy_events``, what
answers mean in ``comfy_answers``; starting and ending the process is ``engine``'s business.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import requests

from pipeline.comfy_answers import OutputFile, Outputs, files_of, one_line, why_failed, why_refused
from pipeline.comfy_events import PromptProgress
from pipeline.comfy_socket import ProgressSocket
from pipeline.errors import EngineError, GraphError, JobCancelled, PipelineError
from pipeline.workflow import Graph

TICK_SECONDS = 0.2
"""How often a running prompt looks whether it is cancelled."""
POLL_SECONDS = 2.0
"""How often ``/history`` is asked while the socket is open; more often when it is not."""
POLL_SECONDS_ALONE = 0.5
FREE_SECONDS = 0.5
GIVE_UP_SECONDS = 1.0
ANSWER_SECONDS = 1.0
"""A poll waits no longer than this for an answer, so that cancelling is never held up."""

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class EngineQueue:
    """Prompt ids in the order of the engine."""

    running: tuple[str, ...]
    pending: tuple[str, ...]

    def __contains__(self, prompt_id: str) -> bool:
        return prompt_id in self.running or prompt_id in self.pending

    @property
    def busy(self) -> bool:
        """Whether there is any prompt."""
        return bool(self.running or self.pending)


class ComfyClient:
    """Client of one engine at ``url`` (http://127.0.0.1:PORT); an answer may take ``timeout`` seconds.

    A prompt that runs for ``stalled_after`` seconds without any progress makes an engine count as hung.
    Methods raise ``EngineError`` when the engine does not answer, or answers nonsense.  Safe to share
    between a thread that runs prompts and one that fetches files.
    """

    def __init__(self, url: str, *, timeout: float = 30.0, stalled_after: float = 1800.0) -> None:
        self.url = url.rstrip("/")
        self.stalled_after = stalled_after
        self._timeout = timeout
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy of the environment is not for 127.0.0.1
        # A fresh connection each time: one that the server drops while idle would look like a dead engine.
        self._session.headers["Connection"] = "close"

    def system_stats(self) -> Object:
        """Versions, memory and devices of the engine; answered as soon as it is ready."""
        return self._object("GET", "/system_stats")

    def version(self) -> str:
        """Version that the engine gives itself, "" if none."""
        system = self.system_stats().get("system")
        return str(system.get("comfyui_version") or "") if isinstance(system, dict) else ""

    def free_memory(self) -> int | None:
        """Bytes of the engine's GPU that are free; None where it has none."""
        devices = self.system_stats().get("devices")
        first = devices[0] if isinstance(devices, list) and devices else None
        if not isinstance(first, dict) or first.get("type") == "cpu":
            return None
        free = first.get("vram_free")
        return free if isinstance(free, int) else None

    def object_info(self, node: str | None = None) -> Object:
        """Schemas of all node classes, or of one; empty for a class that the engine does not know."""
        return self._object("GET", "/object_info" if node is None else f"/object_info/{node}")

    def upload(self, name: str, data: bytes, subfolder: str = "") -> str:
        """Store a file in the engine's input folder; the name to use in LoadImage, LoadAudio or LoadVideo.

        The engine may choose another name when there is another file of that name, so use what is returned.

        Raises:
            GraphError: the engine refuses the file (over its upload limit, or a subfolder outside).
        """
        answer = self._request(
            "POST",
            "/upload/image",  # takes any file
            files={"image": (name, data)},
            data={"type": "input", "subfolder": subfolder},
        )
        if 400 <= answer.status_code < 500:
            raise GraphError(f"upload of {name}", _refusal(answer))
        stored = self._read_object(answer)
        if not isinstance(stored.get("name"), str):
            raise EngineError(f"{self.url}/upload/image gave no name")
        return "/".join(part for part in (stored.get("subfolder"), stored["name"]) if part)

    def view(self, file: OutputFile) -> bytes:
        """Content of a file that the engine has made."""
        answer = self._request("GET", "/view", params=dict(file))
        if answer.status_code != 200:
            raise EngineError(f"the engine has no file {file['filename']}: {_refusal(answer)}")
        return answer.content

    def queue(self) -> EngineQueue:
        """What the engine runs and what waits."""
        return self._queue(self._timeout)

    def interrupt(self, prompt_id: str) -> None:
        """Take one prompt out of the queue, or stop it if it runs; others are left alone."""
        # In this order nothing slips through: what is no longer pending afterwards is running, or over.
        for path, body in (("/queue", {"delete": [prompt_id]}), ("/interrupt", {"prompt_id": prompt_id})):
            self._accepted(self._request("POST", path, json=body, timeout=ANSWER_SECONDS))

    def free(self) -> None:
        """Ask the engine to let go of models and of cached outputs; it does so after the running prompt.

        ``free_memory`` unloads the models as well.  ``unload_models`` beside it would be a second flag: an
        idle ComfyUI wakes up for the first one, and sees the second only after the next prompt.  A prompt
        that comes before it has woken up would still find the old ones: it gets ``FREE_SECONDS`` for it.
        """
        self._accepted(self._request("POST", "/free", json={"free_memory": True}))
        time.sleep(FREE_SECONDS)  # nothing tells when it is done

    def run(
        self,
        graph: Graph,
        *,
        on_progress: Callable[[PromptProgress], None] | None = None,
        cancelled: threading.Event,
        silent_after: float,
        job: str = "",
    ) -> Outputs:
        """Run ``graph`` as a prompt of its own and wait for its end; the files it made.

        A window may take many minutes without a word, so silence is no failure as long as the engine
        answers and says that the prompt is queued or running.

        Args:
            graph: API format; paths of inputs as ``upload`` returned them.
            on_progress: called in this thread, whenever the engine has said something new.
            cancelled: set by another thread; the prompt is then interrupted within about a second.
            silent_after: seconds that the engine may go without answering, or without knowing the prompt.
            job: name for ``JobCancelled``.

        Raises:
            GraphError: refused or failed; another try would end the same way.  "out of memory" is one.
            EngineError: the engine is gone, silent, hung, or has lost the prompt.
            JobCancelled: ``cancelled`` was set.
        """
        # A fresh id per attempt: duplicates share a history entry.  ComfyUI takes canonical UUIDs only.
        prompt_id, client_id = str(uuid.uuid4()), uuid.uuid4().hex
        follower = _Follower(self, graph, prompt_id, on_progress, silent_after)
        socket = ProgressSocket(self.url, client_id)
        try:
            if not cancelled.is_set():
                socket.open()  # before posting, or the first messages are lost
                self._post(graph, prompt_id, client_id)
            while not cancelled.is_set():
                message = socket.next(TICK_SECONDS) if socket.is_open else None
                if message is None and not socket.is_open:
                    cancelled.wait(TICK_SECONDS)
                    socket.open()
                if (outputs := follower.step(message, alone=not socket.is_open)) is not None:
                    follower.hear_out(socket)
                    self._forget(prompt_id)
                    return outputs
        except EngineError:
            if cancelled.is_set():
                raise JobCancelled(job or prompt_id) from None
            raise
        except PipelineError:
            self._forget(prompt_id)  # the engine is done with the prompt
            raise
        except BaseException:
            self._give_up(prompt_id)
            raise
        finally:
            socket.close()
        self._give_up(prompt_id)
        raise JobCancelled(job or prompt_id)

    def _post(self, graph: Graph, prompt_id: str, client_id: str) -> None:
        body = {"prompt": graph, "prompt_id": prompt_id, "client_id": client_id}
        answer = self._request("POST", "/prompt", json=body)
        if answer.status_code == 400:
            raise why_refused(graph, self._read_object(answer, 400))
        queued = self._read_object(answer)
        if queued.get("node_errors"):
            # 200, but an output was dropped: the engine would render half of the graph and call it success.
            self._give_up(prompt_id)
            raise why_refused(graph, queued)
        if queued.get("prompt_id") != prompt_id:
            raise EngineError(f"{self.url} queued the prompt under another id: {one_line(queued)}")

    def _give_up(self, prompt_id: str) -> None:
        """``interrupt`` until the prompt is gone, for a second at most.

        Once is not enough: ComfyUI forgets an interrupt that comes before the prompt's first node.
        """
        late = time.monotonic() + GIVE_UP_SECONDS
        try:
            self.interrupt(prompt_id)
            while prompt_id in self._queue(ANSWER_SECONDS) and time.monotonic() < late:
                time.sleep(TICK_SECONDS / 2)
                self.interrupt(prompt_id)
            self._forget(prompt_id)
        except EngineError:
            return

    def _forget(self, prompt_id: str) -> None:
        """Take a prompt that has ended out of the history: engines keep 10,000 graphs, 50 KB each."""
        with suppress(EngineError):
            self._request("POST", "/history", json={"delete": [prompt_id]}, timeout=ANSWER_SECONDS)

    def _history(self, prompt_id: str) -> Object | None:
        """The history entry of a prompt; None while it waits, runs or is unknown."""
        entry = self._object("GET", f"/history/{prompt_id}", timeout=ANSWER_SECONDS).get(prompt_id)
        if entry is not None and not isinstance(entry, dict):
            raise EngineError(f"{self.url} gave a history entry that is none: {one_line(entry)}")
        return entry

    def _queue(self, timeout: float) -> EngineQueue:
        answer = self._object("GET", "/queue", timeout=timeout)
        running, pending = (
            tuple(str(item[1]) for item in answer.get(key) or () if isinstance(item, list) and len(item) > 1)
            for key in ("queue_running", "queue_pending")
        )
        return EngineQueue(running, pending)

    def _object(self, method: str, path: str, **options: Any) -> Object:
        return self._read_object(self._request(method, path, **options))

    def _request(self, method: str, path: str, **options: Any) -> requests.Response:
        """An answer of the engine, whatever its status."""
        with _translated(self.url):
            return self._session.request(method, self.url + path, **{"timeout": self._timeout, **options})

    def _accepted(self, answer: requests.Response) -> requests.Response:
        if answer.status_code != 200:
            raise EngineError(f"{answer.url}: {_refusal(answer)}")
        return answer

    def _read_object(self, answer: requests.Response, status: int = 200) -> Object:
        """The JSON object in an answer."""
        if answer.status_code != status:
            raise EngineError(f"{answer.url}: {_refusal(answer)}")
        with _translated(self.url):
            content = answer.json()
        if not isinstance(content, dict):
            raise EngineError(f"{answer.url} gave no JSON object: {one_line(content)}")
        return content


class _Follower:
    """Follows one prompt: messages for progress, history for the truth, the queue for a sign of life."""

    def __init__(
        self,
        client: ComfyClient,
        graph: Graph,
        prompt_id: str,
        on_progress: Callable[[PromptProgress], None] | None,
        silent_after: float,
    ) -> None:
        self._client, self._graph, self._on_progress = client, graph, on_progress
        self._silent_after = silent_after
        self._seen = PromptProgress(prompt_id)
        self._alive_at = self._polled_at = self._news_at = time.monotonic()

    def step(self, message: object | None, *, alone: bool) -> Outputs | None:
        """Take a message, or none; outputs once the prompt has ended.  ``alone``: there is no socket."""
        now = time.monotonic()
        if self._take(message):
            self._alive_at = self._news_at = now
        if not self._due(now, alone):
            return None
        self._polled_at = now
        try:
            return self._poll()
        except EngineError as error:
            # Loading a large model can hold up the engine's server for a while.
            if not isinstance(error.__cause__, requests.Timeout):
                raise
            if time.monotonic() - self._alive_at > self._silent_after:
                raise EngineError(f"the engine has not answered for {self._silent_after:.0f} s") from error
            return None

    def hear_out(self, socket: ProgressSocket) -> None:
        """Take what was said before a poll found the end: which nodes ran last is told by the socket only."""
        while socket.is_open and not self._seen.ended:
            message = socket.next(TICK_SECONDS)
            if message is None:
                return
            self._take(message)

    def _take(self, message: object | None) -> bool:
        """Tell of what is new; whether there was anything."""
        before, self._seen = self._seen, self._seen.after(message)
        if self._seen == before:
            return False
        if self._on_progress is not None:
            self._on_progress(self._seen)
        return True

    def _due(self, now: float, alone: bool) -> bool:
        if self._seen.ended:
            return True  # the history entry is there, or will be in a moment
        return now - self._polled_at >= (POLL_SECONDS_ALONE if alone else POLL_SECONDS)

    def _poll(self) -> Outputs | None:
        prompt_id = self._seen.prompt_id
        entry = self._client._history(prompt_id)
        if entry is not None:
            return self._outcome(entry)
        if prompt_id in (queue := self._client._queue(ANSWER_SECONDS)):
            self._alive_at = now = time.monotonic()
            stalled = self._client.stalled_after
            if prompt_id not in queue.running:
                self._news_at = now
            elif now - self._news_at > stalled:
                raise EngineError(f"the engine hangs: no progress for {stalled:.0f} s, though it answers")
        elif time.monotonic() - self._alive_at > self._silent_after:
            raise EngineError(f"the engine does not know the prompt any more, for {self._silent_after:.0f} s")
        return None

    def _outcome(self, entry: Object) -> Outputs:
        """Outputs of a prompt that has ended well; raises how else it ended."""
        status = entry.get("status")
        status = status if isinstance(status, dict) else {}
        said = PromptProgress(self._seen.prompt_id)
        for message in status.get("messages") or ():
            if isinstance(message, list) and len(message) == 2:
                said = said.after({"type": message[0], "data": message[1]})
        # Interrupted prompts have status "error" too; only their messages tell.
        if said.state == "interrupted":
            raise EngineError("the prompt was interrupted by somebody else")
        if said.failure is not None:
            raise why_failed(self._graph, said.failure)
        if status.get("status_str") != "success":
            raise EngineError(f"the engine calls the prompt {status.get('status_str')!r} without a reason")
        return files_of(entry.get("outputs"))


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """``requests``' errors become ``EngineError``, with the original as cause."""
    try:
        yield
    except requests.Timeout as error:
        raise EngineError(f"the engine at {url} does not answer") from error
    except requests.JSONDecodeError as error:
        raise EngineError(f"the engine at {url} answered something that is not JSON") from error
    except requests.ConnectionError as error:
        raise EngineError(f"the engine at {url} is gone") from error
    except requests.RequestException as error:
        raise EngineError(f"talking to the engine at {url} failed: {one_line(error)}") from error


def _refusal(answer: requests.Response) -> str:
    """Status and the beginning of the text of an answer that is no success."""
    return one_line(f"status {answer.status_code} {answer.text}")
