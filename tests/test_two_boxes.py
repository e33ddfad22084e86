"""The guide's "Two boxes", word for word, on two boxes made of this machine.  Needs root."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.frames import check_video
from tests.conftest import ROOT

SCRIPT = ROOT / "deploy" / "try_two_boxes.py"


def why_not() -> str:
    """What this machine lacks for it."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    missing = [name for name in ("ip", "unshare", "nsenter", "bash") if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} on PATH"
    probe = subprocess.run(["unshare", "--net", "--uts", "--pid", "--fork", "true"], capture_output=True)
    return "" if probe.returncode == 0 else "this machine does not let root make namespaces"


@pytest.mark.long
def test_a_job_is_rendered_on_both_boxes(tmp_path: Path, processes_with: Callable[[str], list[int]]) -> None:
    """Each box renders a segment, the video is whole, and no process, network or file of them is left."""
    if reason := why_not():
        pytest.skip(reason)
    before = subprocess.run(["ip", "netns", "list"], capture_output=True, check=True).stdout
    bin_folder = Path(sys.executable).parent  # infinitetalk and ray lie beside it
    env = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    reply = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], env=env, capture_output=True, text=True, timeout=550
    )
    assert reply.returncode == 0, reply.stderr
    boxes = re.findall(r"segment \d was rendered on (box-\w+), GPU \d", reply.stdout)
    assert sorted(boxes) == ["box-one", "box-two"]
    assert "video created successfully using 2 GPUs" in reply.stdout
    check_video(tmp_path / "out" / "two_boxes.mp4", 250)
    work = re.search(r"new authentication token .* saved to (/tmp/box\w+)/", (tmp_path / "log").read_text())
    assert work is not None and not Path(work[1]).exists()
    assert processes_with(work[1]) == []
    assert subprocess.run(["ip", "netns", "list"], capture_output=True, check=True).stdout == before
