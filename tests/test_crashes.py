"""What ends a run too early, on one machine: signals, kills, a damaged job; what is finished is kept."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.render_command import (
    Command,
    ProcessesWith,
    SpeechOf,
    Talk,
    WaitGone,
    base_directory,
    command_line,
    decoded,
    engines_of,
    wait_for_window,
)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_signal_cancels_and_the_same_command_goes_on(
    number: signal.Signals,
    render: Callable[..., Command],
    speech_of: SpeechOf,
    tmp_path: Path,
    processes_with: ProcessesWith,
    wait_gone: WaitGone,
    warm: dict[str, str],
) -> None:
    """Exit code 130, no process, no half video; finished segments are not rendered again."""
    output = tmp_path / "talk.mp4"
    arguments = ("--audio", speech_of(400), "-o", output, "--gpus", 3)
    first = render(*arguments, draft_args="--draft-window-seconds 1.5")
    first.wait_for("segment . processed successfully")
    pids = processes_with(str(tmp_path / "scratch"))
    first.process.send_signal(number)
    first.wait_for("cancelling")
    first.process.send_signal(signal.SIGINT)  # impatience changes nothing
    assert first.finish(150) == 130
    assert first.result["error"] == "JobCancelled"
    assert "what is finished is kept" in first.log
    assert "Traceback" not in first.log
    assert wait_gone(pids, 60) == []
    assert not output.exists()
    kept = sorted(path.name for path in (tmp_path / ".infinitetalk").glob("*/segments/????"))
    assert kept
    second = render(*arguments, **warm)
    assert second.finish() == 0, second.log
    assert len(decoded(output)) == 400
    redone = {int(index) for index in re.findall(r"segment (\d+) processed", second.log)}
    assert redone.isdisjoint(int(name) for name in kept)


@pytest.mark.long
def test_a_killed_driver_leaves_nothing_running(
    render: Callable[..., Command],
    speech_of: SpeechOf,
    tmp_path: Path,
    processes_with: ProcessesWith,
    wait_gone: WaitGone,
    talk: Talk,
    warm: dict[str, str],
) -> None:
    """kill -9 of the driver in a second window: engines and guards are gone within seconds.

    The same command then renders no finished window again, and gives the frames of an undisturbed run.
    """
    arguments = ("--audio", speech_of(300), "-o", tmp_path / "talk.mp4", "--gpus", 2)
    command = render(*arguments, draft_args="--draft-window-seconds 3")
    command.wait_for("created 2 segments")
    wait_for_window(tmp_path, 0)
    pids = processes_with(str(tmp_path / "scratch"))
    ours = [pid for pid in pids if re.search("pipeline|ray::Renderer", command_line(pid))]
    assert len(ours) == 6  # two renderers, two guards, two engines
    command.process.kill()
    assert wait_gone(ours, 60) == []
    # Two agents of Ray's own look for their dead head for up to a minute before they end.
    left = processes_with(str(tmp_path / "scratch"))  # now: a number of a dead one may be a stranger's
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert wait_gone(left, 60) == []
    assert not list(command.scratch.glob("infinitetalk-engine-*"))
    assert not (tmp_path / "talk.mp4").exists()
    kept = len(list(tmp_path.glob(".infinitetalk/*/segments/*.windows/00????/")))
    again = render(*arguments, **warm)
    assert again.finish() == 0, again.log
    assert re.search(r"segment \d goes on after window \d of 3", again.log)
    assert 0 < again.result["nodes"]["KSampler"]["ran"] <= 6 - kept
    assert np.array_equal(decoded(tmp_path / "talk.mp4"), decoded(talk[1]))


def test_an_engine_killed_in_the_middle_costs_one_more_try(
    render: Callable[..., Command], speech_of: SpeechOf, tmp_path: Path, talk: Talk
) -> None:
    """Engines that crash in their second windows are replaced; finished windows are not rendered again.

    The frames are those of an undisturbed run, bit by bit.
    """
    output = tmp_path / "talk.mp4"
    command = render(
        "--audio", speech_of(300), "-o", output, "--gpus", 2, draft_args="--draft-window-seconds 3"
    )
    wait_for_window(tmp_path, 0)
    engines = engines_of(command)
    assert len(engines) == 2
    os.kill(engines[0], signal.SIGKILL)
    assert command.finish() == 0, command.log
    assert "gets another try" in command.log
    assert "died with exit code -9" in command.log
    (kept,) = re.findall(r"segment \d goes on after window (\d) of 3", command.log)
    assert command.result["nodes"]["KSampler"]["ran"] <= 6 - int(kept) < 6  # the lost task's do not count
    assert np.array_equal(decoded(output), decoded(talk[1]))


@pytest.mark.long
def test_exact_is_one_chain_through_a_crash(
    render: Callable[..., Command], speech_of: SpeechOf, tmp_path: Path, warm: dict[str, str]
) -> None:
    """--continuity exact has no seam, and one renderer that goes on where another died changes no frame."""
    whole, output = tmp_path / "whole.mp4", tmp_path / "talk.mp4"
    arguments = ("--audio", speech_of(250), "--continuity", "exact")
    alone = render(*arguments, "-o", whole, "--gpus", 1, **warm)
    assert alone.finish() == 0, alone.log
    assert (alone.result["seams"], alone.result["segments_processed"]) == ([], 1)
    assert alone.result["nodes"]["KSampler"]["ran"] == 4
    assert len(decoded(whole)) == 250
    command = render(*arguments, "-o", output, "--gpus", 2, draft_args="--draft-window-seconds 2")
    assert "1 of 2 GPUs" in command.wait_for("continuity exact: 1 chain")
    wait_for_window(tmp_path, 0)
    (busy,) = [pid for pid in engines_of(command) if any((base_directory(pid) / "input").glob("*.wav"))]
    os.kill(busy, signal.SIGKILL)
    assert command.finish() == 0, command.log
    assert re.search(r"segment 0 goes on after window [1-3] of 4", command.log)
    assert command.result["gpu_count"] == 1
    assert np.array_equal(decoded(output), decoded(whole))


@pytest.mark.long
def test_a_damaged_job_is_mended(
    render: Callable[..., Command], speech_of: SpeechOf, tmp_path: Path, warm: dict[str, str]
) -> None:
    """A kept segment that was cut short is rendered again; a damaged plan is made again."""
    output, job = tmp_path / "talk.mp4", tmp_path / "job"
    arguments = ("--audio", speech_of(150), "-o", output, "--gpus", 2, "--job-dir", job)
    assert render(*arguments).finish() == 0
    whole = output.read_bytes()
    assert len(list((job / "segments").iterdir())) == 2
    body = job / "segments" / "0000" / "body.mp4"
    body.write_bytes(body.read_bytes()[:100])
    again = render(*arguments, **warm)
    assert again.finish() == 0, again.log
    assert "segment 0 processed" in again.log
    assert "segment 1 processed" not in again.log
    (job / "plan.json").write_text("{")
    assert render(*arguments).finish() == 0  # engines whose speeds nobody knows get the same plan
    assert len(decoded(output)) == 150
    assert len(output.read_bytes()) == len(whole)
