"""The engine process: which one, ready or not, and gone with its owner."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import requests

from pipeline.comfy_client import ComfyClient
from pipeline.engine import GuardedProcess, choose_engine, running_engine
from pipeline.errors import ConfigurationError, EngineError, StorageError
from pipeline.settings import Settings
from tests.free_ports import free_ports

PORTS = free_ports(10)


def draft(folder: Path, flags: str = "", **more: object) -> Settings:
    return Settings.model_validate(
        {"engine": "draft", "draft_args": flags, "ports": PORTS, "scratch_dir": folder, **more}
    )


def test_auto_takes_comfyui_only_where_it_is_configured(tmp_path: Path) -> None:
    """Without a checkout it is the draft engine; with one it is ComfyUI."""
    assert choose_engine(Settings()).kind == "draft"
    (tmp_path / "main.py").touch()
    (tmp_path / "models").mkdir()
    program = choose_engine(Settings(comfyui_dir=tmp_path, comfyui_python=Path(sys.executable)))
    assert (program.kind, program.models) == ("comfyui", tmp_path / "models")
    assert "--cuda-device" not in " ".join(program.command)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"engine": "comfyui"}, "INFINITETALK_COMFYUI_DIR"),
        ({"comfyui_dir": "/nowhere"}, "no main.py"),
        ({"comfyui_dir": "CHECKOUT"}, "INFINITETALK_COMFYUI_PYTHON"),
        ({"comfyui_dir": "CHECKOUT", "comfyui_python": "/nowhere/python"}, "is no program"),
        ({"comfyui_dir": "CHECKOUT", "comfyui_models": "/nowhere"}, "weights"),
    ],
)
def test_a_broken_comfyui_is_never_a_silent_draft(tmp_path: Path, fields: dict[str, str], words: str) -> None:
    """What is configured and can't work is an error that names the setting."""
    (tmp_path / "main.py").touch()
    (tmp_path / "models").mkdir()
    filled = {name: str(tmp_path) if value == "CHECKOUT" else value for name, value in fields.items()}
    with pytest.raises(ConfigurationError, match=words):
        choose_engine(Settings.model_validate(filled))


def test_an_engine_answers_on_loopback_and_leaves_nothing(
    tmp_path: Path, wait_gone: Callable[[Iterable[int], float], list[int]]
) -> None:
    """Inside the block it answers on 127.0.0.1 only; after it processes, folder and port are free again."""
    settings = draft(tmp_path)
    with running_engine(choose_engine(settings), settings) as engine:
        stats = ComfyClient(engine.url).system_stats()
        assert str(engine.base_dir) in stats["system"]["argv"]
        assert listening_hosts(engine.port) == {"0100007F"}
        assert "preview" in engine.log_tail()
    assert wait_gone([engine.pid, engine.guard_pid], 60) == []
    assert not engine.base_dir.exists()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", engine.port))


def test_a_proxy_of_the_environment_is_not_for_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one is set for the internet, an engine on this machine is found ready all the same."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    settings = draft(tmp_path, ready_seconds=30)
    with running_engine(choose_engine(settings), settings) as engine:
        assert ComfyClient(engine.url).version()


def listening_hosts(port: int) -> set[str]:
    """Addresses (hex, as in /proc/net/tcp) that anybody listens on at this port."""
    lines = (
        Path("/proc/net/tcp").read_text().splitlines()[1:]
        + Path("/proc/net/tcp6").read_text().splitlines()[1:]
    )
    entries = [line.split() for line in lines]
    return {e[1].split(":")[0] for e in entries if e[3] == "0A" and int(e[1].split(":")[1], 16) == port}


def test_two_engines_and_a_stranger_never_collide(tmp_path: Path) -> None:
    """Each takes a port of its own, and the one that a stranger has is left to it."""
    settings = draft(tmp_path)
    program = choose_engine(settings)
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(("127.0.0.1", settings.port_range[0]))
        stranger.listen()
        with running_engine(program, settings) as one, running_engine(program, settings) as two:
            assert len({settings.port_range[0], one.port, two.port}) == 3
            assert one.base_dir != two.base_dir


def test_an_engine_that_dies_at_start_is_told_with_its_log(tmp_path: Path) -> None:
    """Exit code and the log's last lines are in the error."""
    settings = draft(tmp_path, "--draft-fault die-at-start")
    with (
        pytest.raises(EngineError, match="ended with exit code 1 before it was ready") as caught,
        running_engine(choose_engine(settings), settings),
    ):
        pass
    assert caught.value.log
    assert caught.value.log.splitlines()[-1] in str(caught.value)


def test_an_engine_that_is_late_is_ended(tmp_path: Path, processes_with: Callable[[str], list[int]]) -> None:
    """Past the deadline there is an error, and no process."""
    settings = draft(tmp_path, "--draft-start-seconds 60", ready_seconds=1.5)
    with (
        pytest.raises(EngineError, match=r"did not answer on port \d+ within 1.5 s"),
        running_engine(choose_engine(settings), settings),
    ):
        pass
    assert processes_with(str(tmp_path)) == []
    assert not list(tmp_path.glob("infinitetalk-engine-*"))


OWNER = """
import sys
from pathlib import Path
from pipeline.engine import GuardedProcess, choose_engine, running_engine
from pipeline.settings import Settings
settings = Settings(engine="draft", ports=sys.argv[1], scratch_dir=Path(sys.argv[2]))
with running_engine(choose_engine(settings), settings) as engine:
    print(engine.pid, engine.guard_pid, engine.base_dir, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_engine_dies_with_its_owner(
    tmp_path: Path, number: signal.Signals, wait_gone: Callable[[Iterable[int], float], list[int]]
) -> None:
    """However the owner goes, engine, guard and base directory go too."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, PORTS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    pid, guard, base_dir = owner.stdout.readline().split()
    owner.send_signal(number)
    owner.wait()
    assert wait_gone([int(pid), int(guard)], 60) == []
    assert not Path(base_dir).exists()


PREPARING = """
import sys
from pathlib import Path
from pipeline.engine import GuardedProcess
place = Path(sys.argv[1])
def prepare():
    place.mkdir()
    print("made", flush=True)
    sys.stdin.read()
GuardedProcess(["/bin/true"], place.parent, place, open(sys.argv[2], "wb"), (), prepare)
"""


def test_an_owner_that_is_killed_before_its_engine_starts_leaves_no_folder(
    tmp_path: Path, processes_with: Callable[[str], list[int]]
) -> None:
    """The guard is there before the folder is, and removes what was made."""
    place = tmp_path / "base"
    owner = subprocess.Popen(
        [sys.executable, "-c", PREPARING, str(place), str(tmp_path / "log")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "made\n"
    guards = [os.pidfd_open(pid) for pid in processes_with(str(place)) if pid != owner.pid]
    assert len(guards) == 1
    owner.kill()
    owner.wait()
    assert select.select(guards, [], [], 10)[0]
    os.close(guards[0])
    assert not place.exists()
    assert (tmp_path / "log").read_text() == ""


def test_what_goes_wrong_before_the_start_ends_the_guard(
    tmp_path: Path,
    wait_gone: Callable[[Iterable[int], float], list[int]],
    processes_with: Callable[..., list[int]],
) -> None:
    """The error is the caller's to hear; neither process nor folder stays."""
    place, guards = tmp_path / "base", []

    def prepare() -> None:
        place.mkdir()
        guards.extend(processes_with(str(place)))
        raise StorageError(str(place), "full")

    with (tmp_path / "log").open("wb") as log, pytest.raises(StorageError, match="full"):
        GuardedProcess(["/bin/true"], tmp_path, place, log, (), prepare)
    assert len(guards) == 1
    assert wait_gone(guards, 60) == []
    assert not place.exists()


def test_an_engine_does_not_outlive_its_guard(
    tmp_path: Path, wait_gone: Callable[[Iterable[int], float], list[int]]
) -> None:
    """Killing the guard takes the engine with it, and the owner hears of it."""
    settings = draft(tmp_path)
    with running_engine(choose_engine(settings), settings) as engine:
        os.kill(engine.guard_pid, signal.SIGKILL)
        assert wait_gone([engine.pid], 60) == []
        assert engine.process.exited.wait(5)
        assert not engine.alive
        with pytest.raises(requests.ConnectionError):
            requests.get(engine.url, timeout=2)
    assert not engine.base_dir.exists()
