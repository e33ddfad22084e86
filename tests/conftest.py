"""What tests share: small inputs, waiting for processes to end, and the environment of a run."""

from __future__ import annotations

import os
import tempfile

# Before Ray is imported anywhere: no telemetry, loopback only, no token files, engines at normal priority.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_worker_niceness="0",
)
for name in [name for name in os.environ if name.startswith("INFINITETALK_")]:
    del os.environ[name]
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="infinitetalk-cache-")  # speeds that tests measure

import select
import wave
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.settings import Settings
from tests.comfyui_process import CHECKOUT, comfyui_engine, comfyui_env
from tests.draft_process import ROOT, Engine
from tests.render_command import SIZE, Command, ProcessesWith, SpeechOf, Talk

SHARED = ROOT.parent / "shared"
collect_ignore = ["comfyui_nodes"]  # for ComfyUI, not for pytest

LEFT_OUT = pytest.StashKey[dict[str, int]]()
OPTED_IN = {"comfyui": bool(CHECKOUT), "long": bool(os.environ.get("TEST_LONG"))}
"""Markers of tests that run only where somebody asks for them."""
REASONS = {
    "comfyui": "no real ComfyUI given: make test-comfyui COMFYUI_DIR=...",
    "long": "kills, crashes and clusters, many minutes together: make test-long",
}
LONGEST = (
    *("test_pool_jobs", "test_serve", "test_page", "test_batch", "test_modes", "test_crashes"),
    *("test_pool", "test_end_to_end", "test_refusals", "test_cluster", "test_runpod_worker"),
)
"""Files that parallel runs begin with: one that takes minutes must not be the last."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what nobody has asked for: what needs a real ComfyUI, what takes very long."""
    config.stash[LEFT_OUT] = {}
    for marker in [name for name, wanted in OPTED_IN.items() if not wanted]:
        left_out = [item for item in items if item.get_closest_marker(marker)]
        items[:] = [item for item in items if not item.get_closest_marker(marker)]
        config.stash[LEFT_OUT][marker] = len(left_out)
        config.hook.pytest_deselected(items=left_out)
    if hasattr(config, "workerinput"):  # one of several processes (pytest-xdist)
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells the process that prints what it left out."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker collects, and leaves out, the same tests: they count once."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say so, in a line for each reason: a line for each such test would hide the other ones."""
    for marker, left_out in config.stash.get(LEFT_OUT, {}).items():
        if left_out:
            terminalreporter.write_line(f"SKIPPED {left_out} tests: {REASONS[marker]}", yellow=True)


@pytest.fixture(scope="session")
def portrait() -> Path:
    """The bundled portrait."""
    return ROOT / "examples" / "portrait.png"


@pytest.fixture(scope="session")
def speech_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Makes a WAV of exactly so many frames: syllables at 3 Hz and a pause in every other second."""
    folder = tmp_path_factory.mktemp("speech")

    def make(frames: int) -> Path:
        path = folder / f"{frames}.wav"
        if not path.exists():
            times = np.arange(frames * 640) / 16_000
            syllables = np.maximum(0, np.sin(2 * np.pi * 3 * times)) * (times % 2 < 1.4)
            samples = (syllables * np.sin(2 * np.pi * 180 * times) * 12_000).astype(np.int16)
            with wave.open(str(path), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(16_000)
                file.writeframes(samples.tobytes())
        return path

    return make


@pytest.fixture
def render(tmp_path: Path, portrait: Path, processes_with: ProcessesWith) -> Iterator[Callable[..., Command]]:
    """Starts the command with the bundled portrait at a small size; afterwards no process is left."""
    started: list[Command] = []

    def start(*arguments: object, draft_args: str = "", image: Path = portrait, **env: str) -> Command:
        sizes = ["--width", SIZE, "--height", SIZE, "--json"]
        command = Command(tmp_path, ["--image", image, *sizes, *arguments], draft_args, **env)
        started.append(command)
        return command

    yield start
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()
    assert processes_with(str(tmp_path / "scratch")) == []


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of commands that share one Ray of four lanes: its engines stay between them."""
    from tests.fault_cluster import Cluster

    cluster = Cluster(tmp_path_factory.mktemp("warm"), gpus=(), head_gpus=4)
    cluster.start()
    try:
        yield {
            "INFINITETALK_RAY_ADDRESS": cluster.address,
            "INFINITETALK_SCRATCH_DIR": str(cluster.scratch),
        }
    finally:
        left = cluster.stop()
    assert not left, "these processes did not end: " + "; ".join(left)


@pytest.fixture(scope="session")
def talk(
    tmp_path_factory: pytest.TempPathFactory, portrait: Path, speech_of: SpeechOf, warm: dict[str, str]
) -> Talk:
    """A finished run of 300 frames on two renderers."""
    folder = tmp_path_factory.mktemp("talk")
    output, speech = folder / "talk.mp4", speech_of(300)
    sizes = ["--width", SIZE, "--height", SIZE, "--json", "--gpus", 2]
    command = Command(folder, ["--image", portrait, "--audio", speech, "-o", output, *sizes], **warm)
    assert command.finish() == 0, command.log
    return command, output, speech


@pytest.fixture(scope="session")
def wait_gone() -> Callable[[Iterable[int], float], list[int]]:
    """Waits until processes have ended; returns those that have not within the seconds given."""

    def wait(pids: Iterable[int], seconds: float) -> list[int]:
        poller = select.poll()
        watched: dict[int, int] = {}
        for pid in pids:
            try:
                watched[os.pidfd_open(pid)] = pid
            except ProcessLookupError:
                continue
        for descriptor in watched:
            poller.register(descriptor, select.POLLIN)
        left = dict(watched)
        while left:
            ready = poller.poll(seconds * 1000)
            if not ready:
                break
            for descriptor, _ in ready:
                poller.unregister(descriptor)
                del left[descriptor]
        for descriptor in watched:
            os.close(descriptor)
        return list(left.values())

    return wait


@pytest.fixture(scope="session")
def processes_with() -> Callable[[str], list[int]]:
    """Pids of the processes that have a word in their command line or environment."""

    def find(word: str) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) == os.getpid():
                continue
            try:
                said = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
            except OSError:
                continue
            if word.encode() in said and not dead:
                found.append(int(entry.name))
        return found

    return find


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of an empty database on a PostgreSQL server of our own."""
    from tests.postgres_process import PROGRAMS, postgres_server

    if not PROGRAMS:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    with postgres_server() as url:
        yield url


@pytest.fixture(scope="session")
def comfyui_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of the real ComfyUI that was given, with tiny weights."""
    return Settings.from_env(comfyui_env(tmp_path_factory.mktemp("comfyui")))


@pytest.fixture(scope="session")
def comfyui(comfyui_settings: Settings) -> Iterator[Engine]:
    """A real ComfyUI for all tests that leave it as it was."""
    with comfyui_engine(comfyui_settings) as engine:
        yield engine
