"""``infinitetalk seams``: the report and the picture of a kept job."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from actors.cli import main
from pipeline.job import JobDirectory
from pipeline.seam import SeamReport
from pipeline.seam_picture import TILES
from tests.test_stitch import THREE, clicks, join, plan_of, rendered, save


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job of three segments, as far as this command reads it."""
    folder = tmp_path_factory.mktemp("kept")
    sound = save(folder / "s.wav", clicks(6, 16_000), 16_000)
    video = folder / "talk.mp4"
    seams = join(plan_of(THREE), rendered(folder / "segments", THREE), sound, video, folder)
    job = JobDirectory(folder)
    job.write_json(
        job.result, {"seams": [asdict(seam) for seam in seams], "video_path": str(video), "fps": 25}
    )
    return folder


def test_the_picture_has_a_row_for_each_seam(job: Path, tmp_path: Path) -> None:
    """Frames and a curve for both seams, as a PNG of some size."""
    assert main(["seams", str(job), "-o", str(tmp_path / "seams.png")]) == 0
    with Image.open(tmp_path / "seams.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > TILES * 100
        colours = picture.convert("RGB").getcolors(1 << 24)
        assert colours is not None
        assert len(colours) > 50
        heights = picture.height
    one = JobDirectory(tmp_path / "one")
    one.path.mkdir()
    result = json.loads((job / "result.json").read_text())
    one.write_json(one.result, {**result, "seams": result["seams"][:1]})
    assert main(["seams", str(one.path), "-o", str(tmp_path / "one.png")]) == 0
    with Image.open(tmp_path / "one.png") as picture:
        assert 2 * picture.height == heights


def test_the_report_is_printed(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a table, and as JSON that reads back as the reports."""
    assert main(["seams", str(job)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 3
    assert main(["seams", str(job), "--json"]) == 0
    seams = [SeamReport(**entry) for entry in json.loads(capsys.readouterr().out)]
    assert [(seam.frame, seam.method) for seam in seams] == [(46, "cut"), (86, "cut")]


def test_what_is_wrong_is_said(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No job, another format, no video any more, a job of one segment: the request's fault, exit code 2."""
    empty, gone, single = tmp_path / "empty", tmp_path / "gone", tmp_path / "single"
    for folder in (empty, gone, single):
        folder.mkdir()
    result = json.loads((job / "result.json").read_text())
    (gone / "result.json").write_text(json.dumps({**result, "video_path": str(tmp_path / "no.mp4")}))
    (single / "result.json").write_text(json.dumps({**result, "seams": []}))
    png = str(tmp_path / "x.png")
    for arguments, word in (
        ([str(empty), "-o", png], "no finished job"),
        ([str(job), "-o", str(tmp_path / "x.gif")], "png"),
        ([str(gone), "-o", png], "not there"),
        ([str(single), "-o", png], "one segment"),
    ):
        assert main(["seams", *arguments]) == 2
        assert word in capsys.readouterr().err
    assert not Path(png).exists()
