"""One engine process: which program it is, how it is started, when it is ready, how it ends.

Two programs can be an engine: ComfyUI from a checkout that the user names, and the draft engine, a
preview for machines without GPU.  Both speak ComfyUI's protocol, which is ``comfy_client``'s business.
The only place that starts an engine; orphans are ``process_guard``'s business.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Literal

from pipeline import process_guard
from pipeline.comfy_answers import OutputFile
from pipeline.comfy_client import ComfyClient
from pipeline.errors import ConfigurationError, EngineError
from pipeline.job import storage_errors
from pipeline.ports import reserved_port
from pipeline.settings import Settings

EngineKind = Literal["comfyui", "draft"]

NODE_PACK = Path(__file__).resolve().parent.parent / "workflows" / "comfyui_nodes" / "infinitetalk_ray"
"""Our own nodes, which an engine finds through a link in its base directory."""
LOG_LINES = 30
"""Lines of an engine's log that go into an error."""
KEPT_LOGS = 200
"""Logs that stay in the scratch folder; more than engines run on one node."""
POLL_SECONDS = 0.1
STOP_SECONDS = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineProgram:
    """The program that shall be the engine; made by ``choose_engine``, the same for all renderers."""

    kind: EngineKind
    command: tuple[str, ...]
    """Without port and folders, which are each process's own."""
    folder: Path
    """The working directory of the process."""
    models: Path | None
    """The folder of the weights; None: the program needs none."""
    node_pack: bool = False
    """Whether it shall load ``NODE_PACK``."""
    packs: tuple[Path, ...] = ()
    """Folders of other packs of nodes that it shall load."""

    @property
    def title(self) -> str:
        """What logs and results call it."""
        return "ComfyUI" if self.kind == "comfyui" else "draft engine (a preview, not the model)"


def engine_kind(settings: Settings) -> EngineKind:
    """The kind of engine that the settings ask for: ``auto`` is ComfyUI where a checkout is configured."""
    if settings.engine != "auto":
        return settings.engine
    return "draft" if settings.comfyui_dir is None else "comfyui"


def runs_on_cpu(settings: Settings) -> bool:
    """Whether engines need no GPU: the draft engine, and ComfyUI with ``--cpu``."""
    return engine_kind(settings) == "draft" or "--cpu" in settings.comfyui_flags


def choose_engine(settings: Settings, packs: tuple[str, ...] = ()) -> EngineProgram:
    """The program on this machine that the settings ask for.

    ``packs``: folders of the checkout's ``custom_nodes`` that ComfyUI shall load too; the draft engine has
    their nodes of its own.

    A configured but unusable ComfyUI is a ``ConfigurationError``, never a silent draft.
    """
    if engine_kind(settings) == "draft":
        flags = _node_flags(settings.draft_flags, settings.node_pack)
        command = (sys.executable, "-m", "pipeline.draft", *flags)
        folder = Path(__file__).resolve().parent.parent
        return EngineProgram("draft", command, folder, None, settings.node_pack)
    if settings.comfyui_dir is None:
        raise ConfigurationError(
            "INFINITETALK_ENGINE=comfyui needs INFINITETALK_COMFYUI_DIR, the folder of a ComfyUI checkout"
        )
    checkout = settings.comfyui_dir.expanduser().resolve()
    if not (checkout / "main.py").is_file():
        raise ConfigurationError(
            f"INFINITETALK_COMFYUI_DIR={settings.comfyui_dir} is no ComfyUI checkout: no main.py in it"
        )
    models = (settings.comfyui_models or checkout / "models").expanduser().resolve()
    if not models.is_dir():
        raise ConfigurationError(
            f"the folder of the weights does not exist: {models}; set INFINITETALK_COMFYUI_MODELS"
        )
    command = (
        str(_comfyui_python(settings, checkout)),
        "main.py",
        "--disable-auto-launch",
        "--disable-metadata",
        "--disable-api-nodes",
        *_node_flags(settings.comfyui_flags, settings.node_pack, packs),
    )
    places = tuple(_pack_folder(checkout, name) for name in packs)
    return EngineProgram("comfyui", command, checkout, models, settings.node_pack, places)


def _pack_folder(checkout: Path, name: str) -> Path:
    folder = checkout / "custom_nodes" / name
    if not (folder / "__init__.py").is_file():
        raise ConfigurationError(
            f"{name} is not in {checkout / 'custom_nodes'}; "
            "infinitetalk comfyui install DIR --family wrapper shows how to get it"
        )
    return folder


def _node_flags(flags: list[str], node_pack: bool, packs: tuple[str, ...] = ()) -> list[str]:
    """An operator's flags after ours: no custom node but our own pack and what the operator lists."""
    listed = "--whitelist-custom-nodes"
    ours = ["--disable-all-custom-nodes"]
    names = [*([NODE_PACK.name] if node_pack else []), *packs]
    if not names:
        return [*ours, *flags]
    if listed in flags:  # the last such flag counts alone
        place = len(flags) - flags[::-1].index(listed)
        return [*ours, *flags[:place], *names, *flags[place:]]
    return [*ours, listed, *names, *flags]


def _comfyui_python(settings: Settings, checkout: Path) -> Path:
    if settings.comfyui_python is not None:
        python = settings.comfyui_python.expanduser().absolute()  # not resolved: a venv's python is a link
        if not python.is_file() or not os.access(python, os.X_OK):
            raise ConfigurationError(f"INFINITETALK_COMFYUI_PYTHON={settings.comfyui_python} is no program")
        return python
    for name in ("venv", ".venv"):
        python = checkout / name / "bin" / "python"
        if os.access(python, os.X_OK):
            return python
    raise ConfigurationError(
        f"no venv/bin/python in {checkout}; "
        "set INFINITETALK_COMFYUI_PYTHON to the Python that has ComfyUI's packages"
    )


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """An engine that answers; valid inside ``running_engine`` only."""

    url: str
    port: int
    guard_pid: int
    pid: int
    base_dir: Path
    log_path: Path
    process: GuardedProcess

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return not self.process.exited.is_set()

    def log_tail(self) -> str:
        """The last lines of its log."""
        return tail(self.log_path)


def tail(path: Path, lines: int = LOG_LINES) -> str:
    """The last ``lines`` of a text file; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 16_384))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


class GuardedProcess:
    """A command below ``process_guard``; ``exited`` is set as soon as it has ended."""

    def __init__(
        self,
        command: list[str],
        folder: Path,
        base_dir: Path,
        output: IO[bytes],
        keep: Sequence[int] = (),
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """``base_dir`` is removed at the end; ``keep``: descriptors that it inherits.

        ``prepare`` is called before the command starts: whatever it puts into ``base_dir`` goes, even if this
        process is killed meanwhile.
        """
        self._ready, self._started = threading.Event(), threading.Event()
        self.exited = threading.Event()
        self.pid = self.guard_pid = 0
        self.exit_code = "unknown"
        guard = [sys.executable, "-S", "-E", process_guard.__file__, str(base_dir), *command]
        self._launcher = subprocess.Popen(
            guard,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            cwd=folder,
            env=_engine_environment(command),
            pass_fds=keep,
        )
        threading.Thread(target=self._listen, name="engine-guard", daemon=True).start()
        self._launcher.wait()  # the launcher forks and leaves; the guard holds the pipes
        try:
            self._wait_for(self._ready, output)
            prepare()
            assert self._launcher.stdin is not None
            with contextlib.suppress(OSError):  # it was killed: it does not start
                self._launcher.stdin.write(b"\n")
                self._launcher.stdin.flush()
            self._wait_for(self._started, output)
        except BaseException:
            self.stop()
            raise

    def _wait_for(self, event: threading.Event, output: IO[bytes]) -> None:
        if not event.wait(STOP_SECONDS):
            raise EngineError("the guard process did not start", tail(Path(output.name)))

    def _listen(self) -> None:
        assert self._launcher.stdout is not None
        with self._launcher.stdout as channel:
            for line in channel:
                match line.decode().split():
                    case ["ready"]:
                        self._ready.set()
                    case ["started", guard, child]:
                        self.guard_pid, self.pid = int(guard), int(child)
                        self._started.set()
                    case ["exited", code]:
                        self.exit_code = code
        self.exited.set()  # also when the guard itself was killed

    def stop(self) -> None:
        """End the whole process tree and wait until it is gone."""
        assert self._launcher.stdin is not None
        with contextlib.suppress(OSError):
            self._launcher.stdin.close()
        self.exited.wait(STOP_SECONDS)


def _engine_environment(command: list[str]) -> dict[str, str]:
    """The environment without what a Ray worker's would do to a child.

    ``CUDA_VISIBLE_DEVICES`` stays: it is how Ray gives the renderer its GPU.
    """
    dropped = {"PYTHONBREAKPOINT", "OMP_NUM_THREADS", "SPT_NOENV"}
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k not in dropped}
    if "--cpu" in command:
        env["OMP_NUM_THREADS"] = (
            "1"  # measured: with more, small renders on a busy machine take ten times longer
        )
    return env


@contextmanager
def running_engine(program: EngineProgram, settings: Settings) -> Iterator[RunningEngine]:
    """Start an engine on a free port of 127.0.0.1, wait until it answers, and end it at the end.

    Raises ``EngineError`` (with the log's tail) when it dies or is not ready in ``ready_seconds``,
    ``ConfigurationError`` when no port is free, ``StorageError`` when there is no place for its folders.
    """
    refused: set[int] = set()
    with ExitStack() as opened:
        while True:
            attempt = opened.enter_context(ExitStack())
            port, lock = attempt.enter_context(reserved_port(*settings.port_range, frozenset(refused)))
            try:
                engine = _started(program, settings, port, lock, attempt)
                break
            except EngineError as error:
                attempt.close()
                # A stranger took the port between our look and the engine's bind.
                if "already in use" not in error.log:
                    raise
                refused.add(port)
        log.info("%s is ready on port %d (pid %d, log %s)", program.title, port, engine.pid, engine.log_path)
        yield engine


def _started(
    program: EngineProgram, settings: Settings, port: int, lock: int, cleanup: ExitStack
) -> RunningEngine:
    """An engine that answers on ``port``; what has to be undone goes to ``cleanup``."""
    log_path = _new_log(settings.scratch, port)
    base_dir = settings.scratch / f"infinitetalk-engine-{uuid.uuid4().hex[:12]}"
    cleanup.callback(shutil.rmtree, base_dir, ignore_errors=True)  # the guard does, unless it is killed
    command = [
        *program.command,
        *("--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base_dir)),
        *("--database-url", f"sqlite:///{base_dir}/user/comfyui.db"),
    ]
    with log_path.open("wb") as output:
        prepare = partial(_make_folders, base_dir, program)
        process = GuardedProcess(command, program.folder, base_dir, output, (lock,), prepare)
    cleanup.callback(process.stop)
    engine = RunningEngine(
        f"http://127.0.0.1:{port}", port, process.guard_pid, process.pid, base_dir, log_path, process
    )
    _wait_until_ready(engine, program, settings.ready_seconds)
    return engine


def _new_log(scratch: Path, port: int) -> Path:
    """The path of an engine's log, which is kept; the oldest ones go."""
    logs = scratch / f"infinitetalk-logs-{os.getuid()}"
    with storage_errors(scratch):
        logs.mkdir(parents=True, exist_ok=True)
        for old in sorted(logs.glob("engine-*.log"), key=_modified)[:-KEPT_LOGS]:
            old.unlink(missing_ok=True)
        log_path = logs / f"engine-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{port}.log"
        log_path.touch()
    return log_path


def _make_folders(base_dir: Path, program: EngineProgram) -> None:
    """A fresh base directory, which the guard removes."""
    with storage_errors(base_dir.parent):
        base_dir.mkdir(mode=0o700)
        for name in ("input", "output", "temp", "user", "custom_nodes"):
            (base_dir / name).mkdir()
        if program.models is not None:
            # A link, not --models-directory: ComfyUI 0.11 has no such flag.
            (base_dir / "models").symlink_to(program.models)
        for pack in program.packs:
            (base_dir / "custom_nodes" / pack.name).symlink_to(pack)
        if program.node_pack:
            (base_dir / "custom_nodes" / NODE_PACK.name).symlink_to(NODE_PACK)


def _modified(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _wait_until_ready(engine: RunningEngine, program: EngineProgram, patience: float) -> None:
    deadline = time.monotonic() + patience
    while not engine.process.exited.wait(POLL_SECONDS):
        if _answers(engine):
            return
        if time.monotonic() > deadline:
            raise EngineError(
                f"{program.title} did not answer on port {engine.port} within {patience:g} s",
                engine.log_tail(),
            )
    raise EngineError(
        f"{program.title} ended with exit code {engine.process.exit_code} before it was ready",
        engine.log_tail(),
    )


def _answers(engine: RunningEngine) -> bool:
    """Whether *our* engine answers: a stranger on the port does not know our base directory."""
    try:
        stats = ComfyClient(engine.url, timeout=5).system_stats()
        return str(engine.base_dir) in stats["system"]["argv"]
    except (EngineError, KeyError, TypeError):
        return False


def discard_outputs(engine: RunningEngine, files: Sequence[OutputFile]) -> None:
    """Delete outputs that were fetched; ComfyUI has no request for it and would fill the disk."""
    for file in files:
        path = (engine.base_dir / file["type"] / file["subfolder"] / file["filename"]).resolve()
        if path.is_relative_to(engine.base_dir):
            path.unlink(missing_ok=True)


def clear_files(engine: RunningEngine) -> None:
    """Delete what was uploaded and made for a segment that is over, however it ended."""
    for name in ("input", "output"):
        shutil.rmtree(engine.base_dir / name, ignore_errors=True)
        with contextlib.suppress(OSError):
            (engine.base_dir / name).mkdir(exist_ok=True)
