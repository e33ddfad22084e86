"""``infinitetalk redo``: what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.cli import main
from actors.driver import choose_workflow, job_id
from pipeline.job import JobDirectory
from pipeline.request import RenderRequest
from pipeline.settings import Settings


def test_what_is_wrong_is_said(
    portrait: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No kept job, one of another engine, one that is not finished: the request's fault, exit code 2."""
    monkeypatch.setenv("INFINITETALK_ENGINE", "draft")
    assert main(["redo", str(tmp_path / "none"), "--seam", "0", "--quiet"]) == 2
    assert "holds no job" in capsys.readouterr().err
    speech = tmp_path / "sound.wav"
    speech.write_bytes(b"speech")
    request = RenderRequest.checked(image=portrait, audio=speech)
    job = JobDirectory(tmp_path / "kept")
    job.write_json(job.path / "request.json", request.model_dump(mode="json"))
    job.take_input("picture", portrait)
    assert main(["redo", str(job.path), "--seam", "0", "--quiet"]) == 2
    assert "lost its copy of audio" in capsys.readouterr().err
    job.take_input("sound", speech)
    (job.path / "id").write_text("of another engine\n")
    assert main(["redo", str(job.path), "--seam", "0", "--quiet"]) == 2
    assert "another engine" in capsys.readouterr().err
    workflow = choose_workflow(request, Settings(engine="draft"))
    (job.path / "id").write_text(job_id(request, "draft", workflow.text) + "\n")
    assert main(["redo", str(job.path), "--seam", "0", "--quiet"]) == 2
    assert "no finished job" in capsys.readouterr().err
