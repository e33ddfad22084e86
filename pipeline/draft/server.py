"""The HTTP routes of the draft engine, each also below /api, and the worker thread that executes prompts.

Files are served by ``pipeline.draft.files``; what a prompt does is decided in ``pipeline.draft.execution``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from pipeline.draft import files
from pipeline.draft.execution import Executor, NodeSet
from pipeline.draft.faults import Fault, faults_of
from pipeline.draft.folders import Folders
from pipeline.draft.queue import Flags, Item, Outcome, PromptQueue
from pipeline.draft.schemas import SCHEMAS, object_info
from pipeline.draft.sockets import FEATURES, Sockets
from pipeline.draft.validation import Verdict, problem, valid_prompt_id, validate

log = logging.getLogger(__name__)

COMFYUI_VERSION = "0.33.0"
"""The ComfyUI whose protocol is spoken."""
DEVICE_NAME = "draft engine (CPU preview, not the model)"
GPU_BYTES, MODEL_BYTES = 24 << 30, 16 << 30
"""What the draft engine says of a GPU's memory; it holds nothing there."""
GARBAGE = "<html><body>this is not JSON</body></html>"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the command line decides about the server; ``max_upload_bytes`` bounds every request's body."""

    host: str
    port: int
    faults: tuple[Fault, ...] = ()
    max_upload_bytes: int = 100 * 1024 * 1024


class DraftServer:
    """The state behind the routes; made and used on one event loop, executing on one thread of its own."""

    def __init__(self, folders: Folders, nodes: NodeSet, options: ServerOptions) -> None:
        self._folders, self._options = folders, options
        self._sockets = Sockets(asyncio.get_running_loop())
        self._queue = PromptQueue(lambda remaining: self._sockets.send("status", _status(remaining), None))
        self._executor = Executor(nodes, self._sockets.send, self._queue.interrupted, self._sockets.mute)
        self._number = 0
        self._accepted = 0
        self._garbage = False
        self._leaked = 0

    async def run(self) -> None:
        """Serve until the process ends.

        Raises:
            OSError: the port is taken.
        """
        app = web.Application(
            client_max_size=self._options.max_upload_bytes, middlewares=[_same_origin, self._spoil]
        )
        for method, path, handler in self._routes():
            app.router.add_route(method, path, handler)
            app.router.add_route(method, "/api" + path, handler)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, self._options.host, self._options.port, reuse_address=True).start()
        log.info(
            "the draft engine listens on port %d",
            self._options.port,
        )
        threading.Thread(target=self._work, name="prompts", daemon=True).start()
        await self._sockets.publish()

    def _routes(self) -> list[tuple[str, str, Handler]]:
        served = files.FileRoutes(self._folders)
        return [
            ("GET", "/ws", self._websocket),
            ("GET", "/prompt", self._get_prompt),
            ("POST", "/prompt", self._post_prompt),
            ("GET", "/queue", self._get_queue),
            ("POST", "/queue", self._post_queue),
            ("POST", "/interrupt", self._interrupt),
            ("POST", "/free", self._free),
            ("GET", "/history", self._get_history),
            ("GET", "/history/{prompt_id}", self._get_history),
            ("POST", "/history", self._post_history),
            ("GET", "/jobs/{job_id}", self._get_job),
            ("POST", "/jobs/{job_id}/cancel", self._cancel_job),
            ("GET", "/object_info", self._object_info),
            ("GET", "/object_info/{name}", self._object_info),
            ("GET", "/system_stats", self._system_stats),
            ("GET", "/features", self._features),
            ("POST", "/upload/image", served.upload),
            ("GET", "/view", served.view),
        ]

    def _work(self) -> None:
        self._executor.nodes.prepare()
        while True:
            item = self._queue.get()
            if item is not None:
                faults = faults_of(self._options.faults, item.count)
                started = time.monotonic()
                outcome = self._execute(item, faults)
                self._leaked += GPU_BYTES // 2 * ("leak" in faults)
                self._queue.done(item, outcome)
                if self._executor.client_id is not None:
                    data = {"node": None, "prompt_id": item.prompt_id}
                    self._sockets.send("executing", data, self._executor.client_id)
                log.info("Prompt executed in %.2f seconds", time.monotonic() - started)
            if self._queue.take_flags().free_memory:
                self._executor.free()

    def _execute(self, item: Item, faults: frozenset[str]) -> Outcome:
        try:
            return self._executor.execute(item, faults)
        except Exception:
            log.exception("the draft engine failed on a prompt that it had accepted")
            return Outcome(success=False)

    @web.middleware
    async def _spoil(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        if self._garbage and response.content_type == "application/json":
            return web.Response(text=GARBAGE, content_type="text/html")
        return response

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        running = (self._executor.client_id, self._executor.current_node)
        return await self._sockets.serve(request, _status(self._queue.remaining), running)

    async def _get_prompt(self, _request: web.Request) -> web.Response:
        return web.json_response(_status(self._queue.remaining)["status"])

    async def _post_prompt(self, request: web.Request) -> web.Response:
        body = await request.json()
        number = self._take_number(body)
        if "prompt" not in body:
            return _refused(problem("no_prompt", "No prompt provided", "No prompt provided"))
        prompt_id = body.get("prompt_id")
        if prompt_id is not None and not valid_prompt_id(prompt_id):
            hint = "prompt_id must be a UUID string in canonical lowercase hyphenated form; "
            hint += "omit it to let the server generate one"
            return _refused(problem("invalid_prompt_id", "prompt_id must be a valid UUID", hint))
        graph = body["prompt"]
        verdict: Verdict = await asyncio.to_thread(validate, graph, self._folders)
        if verdict.error is not None:
            log.warning("invalid prompt: %s", verdict.error)
            return _refused(verdict.error, verdict.node_errors)
        extra = dict(body.get("extra_data", {}))
        if "client_id" in body:
            extra["client_id"] = body["client_id"]
        extra["create_time"] = int(time.time() * 1000)
        self._accepted += 1
        item = Item(number, prompt_id or str(uuid.uuid4()), graph, extra, verdict.outputs, self._accepted)
        self._garbage = "garbage" in faults_of(self._options.faults, item.count)
        log.info("got prompt %s", item.prompt_id)
        self._queue.put(item)
        answer = {"prompt_id": item.prompt_id, "number": number, "node_errors": verdict.node_errors}
        return web.json_response(answer)

    def _take_number(self, body: dict[str, Any]) -> float:
        if "number" in body:
            return float(body["number"])
        number = -self._number if body.get("front") else self._number
        self._number += 1
        return number

    async def _get_queue(self, _request: web.Request) -> web.Response:
        running, pending = self._queue.snapshot()
        answer = {
            "queue_running": [item.as_json() for item in running],
            "queue_pending": [item.as_json() for item in pending],
        }
        return web.json_response(answer)

    async def _post_queue(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("clear"):
            self._queue.clear()
        for prompt_id in body.get("delete", []):
            self._queue.delete(prompt_id)
        return web.Response()

    async def _interrupt(self, request: web.Request) -> web.Response:
        try:
            body = await request.json()
        except json.JSONDecodeError:
            body = {}
        self._queue.interrupt(body.get("prompt_id") or None)
        return web.Response()

    async def _free(self, request: web.Request) -> web.Response:
        body = await request.json()
        self._queue.flag(Flags(bool(body.get("unload_models")), bool(body.get("free_memory"))))
        return web.Response()

    async def _get_history(self, request: web.Request) -> web.Response:
        return web.json_response(self._queue.history(request.match_info.get("prompt_id")))

    async def _post_history(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("clear"):
            self._queue.forget()
        for prompt_id in body.get("delete", []):
            self._queue.forget(prompt_id)
        return web.Response()

    async def _get_job(self, request: web.Request) -> web.Response:
        job_id = request.match_info["job_id"]
        running, pending = self._queue.snapshot()
        states = {item.prompt_id: "pending" for item in pending} | {
            item.prompt_id: "in_progress" for item in running
        }
        for prompt_id, entry in self._queue.history(job_id).items():
            stopped = (
                entry["status"]["messages"][-1:]
                and entry["status"]["messages"][-1][0] == "execution_interrupted"
            )
            word = "completed" if entry["status"]["completed"] else "cancelled" if stopped else "failed"
            states[prompt_id] = word
        if job_id not in states:
            return web.json_response({"error": "Job not found"}, status=404)
        return web.json_response({"id": job_id, "status": states[job_id]})

    async def _cancel_job(self, request: web.Request) -> web.Response:
        job_id = request.match_info["job_id"]
        return web.json_response({"cancelled": self._queue.interrupt(job_id) or self._queue.delete(job_id)})

    async def _object_info(self, request: web.Request) -> web.Response:
        names = [request.match_info["name"]] if "name" in request.match_info else list(SCHEMAS)
        found = {name: object_info(name, self._folders) for name in names}
        return web.json_response({name: schema for name, schema in found.items() if schema is not None})

    async def _features(self, _request: web.Request) -> web.Response:
        return web.json_response(FEATURES)

    async def _system_stats(self, _request: web.Request) -> web.Response:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
        system = {
            "os": sys.platform,
            "ram_total": total,
            "ram_free": free,
            "comfyui_version": COMFYUI_VERSION,
            "required_frontend_version": None,
            "installed_templates_version": None,
            "required_templates_version": None,
            "comfy_package_versions": [],
            "python_version": sys.version,
            "pytorch_version": "none (draft engine)",
            "embedded_python": False,
            "deploy_environment": "draft",
            "argv": sys.argv,
        }
        left = max(0, GPU_BYTES - self._leaked - MODEL_BYTES * self._executor.loaded)
        memory = {
            "vram_total": GPU_BYTES,
            "vram_free": left,
            "torch_vram_total": GPU_BYTES,
            "torch_vram_free": left,
        }
        device = {"name": DEVICE_NAME, "type": "draft", "index": 0, **memory}
        return web.json_response({"system": system, "devices": [device]})


def _status(remaining: int) -> dict[str, Any]:
    return {"status": {"exec_info": {"queue_remaining": remaining}}}


def _refused(error: dict[str, Any], node_errors: dict[str, Any] | None = None) -> web.Response:
    return web.json_response({"error": error, "node_errors": node_errors or {}}, status=400)


@web.middleware
async def _same_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
    """403 for pages of other origins: a website must not be able to queue prompts on the user's machine."""
    origin = request.headers.get("Origin")
    if request.headers.get("Sec-Fetch-Site") == "cross-site" or (
        origin and not _matches(request.host, origin)
    ):
        return web.Response(status=403)
    return await handler(request)


def _matches(host: str, origin: str) -> bool:
    ours, theirs = urlsplit(f"//{host.lower()}"), urlsplit(origin.lower())
    if ours.port is None or theirs.port is None:
        return ours.hostname == theirs.hostname
    return ours.netloc == theirs.netloc
