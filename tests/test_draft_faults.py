"""How the draft engine stands in for a GPU, misbehaves when told to, starts and ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
import websocket

from tests.draft_process import (
    ROOT,
    Engine,
    draft_engine,
    ended,
    progressing,
    until,
    window,
)


def events(engine: Engine) -> list[str]:
    return [message["type"] for message in engine.run(window())]


def test_oom_is_reported_as_comfyui_does(tmp_path: Path) -> None:
    """The second prompt fails with torch.OutOfMemoryError in the sampler, the first and third don't."""
    with draft_engine(tmp_path, "--draft-fault", "oom@2") as engine:
        assert "execution_success" in events(engine)
        error = next(m["data"] for m in engine.run(window()) if m["type"] == "execution_error")
        assert (error["exception_type"], error["node_type"]) == ("torch.OutOfMemoryError", "KSampler")
        assert "ran out of memory" in error["exception_message"]
        assert "execution_success" in events(engine)


def test_a_silent_engine_finishes_but_says_nothing(tmp_path: Path) -> None:
    """The socket stays open without a word; history is right; a new socket works."""
    with draft_engine(tmp_path, "--draft-fault", "silent@1") as engine:
        listener = engine.listen("me")
        prompt_id = engine.submit(window(), client_id="me")
        listener.settimeout(1)
        with pytest.raises(websocket.WebSocketTimeoutException):
            until(listener, lambda m: ended(m, prompt_id))
        assert engine.history(prompt_id)["status"]["completed"]
        assert "execution_success" in events(engine)
        listener.close()


def test_a_crash_ends_the_process_in_the_middle_of_a_prompt(tmp_path: Path) -> None:
    """The socket breaks and the process is gone by SIGKILL."""
    with draft_engine(tmp_path, "--draft-fault", "crash@1") as engine:
        with pytest.raises((websocket.WebSocketException, ConnectionError)):
            engine.run(window())
        assert engine.process.wait(10) == -signal.SIGKILL


def test_garbage_is_answered_where_json_was_due(tmp_path: Path) -> None:
    """From the second prompt on no answer is JSON."""
    with draft_engine(tmp_path, "--draft-fault", "garbage@2") as engine:
        engine.run(window())
        for reply in (engine.post("/prompt", json={"prompt": window()}), engine.get("/queue")):
            with pytest.raises(requests.exceptions.JSONDecodeError):
                reply.json()


def test_a_hanging_prompt_never_ends_but_the_server_answers(tmp_path: Path) -> None:
    """Interrupt is answered and changes nothing; SIGTERM ends the process at once all the same."""
    with draft_engine(tmp_path, "--draft-fault", "hang@1") as engine:
        listener = engine.listen("me")
        prompt_id = engine.submit(window(n101_steps=2), client_id="me")
        until(listener, progressing)
        assert engine.post("/interrupt", json={"prompt_id": prompt_id}).status_code == 200
        listener.settimeout(0.3)
        with pytest.raises(websocket.WebSocketTimeoutException):
            until(listener, lambda m: ended(m, prompt_id))
        assert [item[1] for item in engine.get("/queue").json()["queue_running"]] == [prompt_id]
        engine.process.terminate()
        assert engine.process.wait(5) == -signal.SIGTERM
        listener.close()


def test_a_window_takes_the_time_that_was_asked_for(tmp_path: Path) -> None:
    """17 frames are 5 of 21 latent frames: 5/21 of the seconds of a whole window, in even steps."""
    with draft_engine(tmp_path, "--draft-window-seconds", "4.2") as engine:
        engine.run(window(n100_length=5))  # imports and loaders
        listener = engine.listen("me")
        engine.submit(window(n101_steps=4), client_id="me")
        until(listener, lambda m: m["type"] == "executing" and m["data"]["node"] == "101")
        begin = time.monotonic()
        until(listener, lambda m: m["type"] == "progress" and m["data"]["value"] == 2)
        half = time.monotonic() - begin
        until(listener, lambda m: m["type"] == "progress" and m["data"]["value"] == 4)
        assert 0.4 < half < time.monotonic() - begin
        assert 0.9 < time.monotonic() - begin < 4.2  # far less than a whole window, on a busy machine too
        listener.close()


def exit_of(*flags: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pipeline.draft", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


def test_what_keeps_an_engine_from_starting(tmp_path: Path) -> None:
    """A taken port and the fault die-at-start: exit code 1 and a line in the log; an unknown flag: 2."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, log = exit_of("--base-directory", str(tmp_path), "--port", str(taken.getsockname()[1]))
        assert (code, "is already in use" in log) == (1, True)
    code, log = exit_of("--base-directory", str(tmp_path), "--draft-fault", "die-at-start")
    assert (code, "DRAFT ENGINE: a preview" in log, "die-at-start" in log) == (1, True, True)
    assert exit_of("--base-directory", str(tmp_path), "--no-such-flag")[0] == 2
