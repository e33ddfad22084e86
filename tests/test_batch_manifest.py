"""Manifests of batches: everything wrong is told at once, with its line; and what makes two jobs the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.batch_manifest import BatchJob, in_order, read_manifest
from pipeline.errors import InvalidRequest, PipelineError
from pipeline.request import RenderRequest
from tests.conftest import ROOT


@pytest.fixture
def folder(tmp_path: Path, portrait: Path, speech_of: Callable[[int], Path]) -> Path:
    """A folder with a picture, a speech, a file that is neither, and an empty one."""
    shutil.copy(portrait, tmp_path / "a.png")
    shutil.copy(speech_of(50), tmp_path / "a.wav")
    (tmp_path / "words.txt").write_text("no picture and no sound")
    (tmp_path / "empty.wav").touch()
    return tmp_path


def written(folder: Path, *lines: dict[str, Any] | str, name: str = "jobs.jsonl") -> Path:
    path = folder / name
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


GOOD = {"image": "a.png", "audio": "a.wav"}


def jobs_of(path: Path) -> list[BatchJob]:
    jobs, problems = read_manifest(path)
    assert problems == []
    return jobs


def test_everything_that_is_wrong_is_told_at_once(folder: Path) -> None:
    """Types, unknown fields, names used twice, files that are missing or no media: each with its line."""
    path = written(
        folder,
        {**GOOD, "id": "one"},
        "{'image': 'a.png'}",
        "",
        {**GOOD, "seed": "many", "steps": 0},
        {**GOOD, "id": "five", "promt": "hello"},
        {**GOOD, "id": "one", "seed": 1},
        {**GOOD, "id": "seven", "output": "ONE.mp4"},
        {"image": "missing.png", "audio": "a.wav"},
        {"image": "words.txt", "audio": "words.txt"},
        {"image": "a.png", "audio": "empty.wav"},
        {**GOOD, "audio": "ftp://host/a.wav"},
        {**GOOD, "id": "../x", "output": "../x.mp4"},
        {"image": "a.png"},
        '{"image": "a.png", "image": "b.png", "audio": "a.wav"}',
        {**GOOD, "id": "long", "priority": 1000},
        "[1, 2]",
        {**GOOD, "id": "below", "output": "one.mp4/below.mp4"},
    )
    _, problems = read_manifest(path)
    told = {(problem.line, problem.field): problem.reason for problem in problems}
    for place, words in {
        (2, "line"): "no JSON",
        (4, "seed"): "valid integer",
        (4, "steps"): "greater than or equal to 1",
        (5, "promt"): "did you mean prompt?",
        (6, "id"): "line 1's already",
        (7, "output"): "line 1's already",
        (8, "image"): "is not there",
        (9, "image"): "is no PNG",
        (9, "audio"): "is no sound file",
        (10, "audio"): "is empty",
        (11, "audio"): "ftp:// can't be read",
        (12, "id"): "the first a letter or a digit",
        (12, "output"): "inside the output folder",
        (13, "audio"): "Field required",
        (14, "line"): "'image' is given twice",
        (15, "priority"): "less than or equal to 100",
        (16, "line"): "no JSON object",
        (17, "output"): "is the video of line 1",
    }.items():
        assert words in told.pop(place), place
    assert told == {}


def test_a_request_may_be_refused_by_the_settings(folder: Path) -> None:
    """What a machine can't do is a line's problem before anything starts, too."""

    def check(request: RenderRequest) -> None:
        if request.seed == 2:
            raise PipelineError("two is not possible here")

    _, problems = read_manifest(written(folder, {**GOOD, "seed": 1}, {**GOOD, "seed": 2}), check)
    assert [(problem.line, problem.reason) for problem in problems] == [(2, "two is not possible here")]


def test_a_csv_says_the_same_as_json_lines(folder: Path) -> None:
    """Types come from the fields, empty cells are not given, boxes stand in one cell."""
    lines = written(
        folder,
        {**GOOD, "id": "007", "seed": 5, "prompt": "say, it", "use_multi_gpu": False, "priority": 3},
        {**GOOD, "audio_2": "a.wav", "box_1": [0, 0, 9, 9], "box_2": [9, 0, 20, 9], "id": "two"},
    )
    table = written(
        folder,
        "id,image,audio,audio_2,seed,prompt,use_multi_gpu,priority,box_1,box_2",
        '007,a.png,a.wav,,5,"say, it",false,3,,',
        'two,a.png,a.wav,a.wav,,,,,"0,0,9,9","[9, 0, 20, 9]"',
        name="jobs.csv",
    )
    assert [(job.id, job.priority, job.fields, job.sources) for job in jobs_of(lines)] == [
        (job.id, job.priority, job.fields, job.sources) for job in jobs_of(table)
    ]
    wrong = written(folder, "id,immage,audio", "1,a.png,a.wav", "2,a.png,a.wav,more", name="wrong.csv")
    _, problems = read_manifest(wrong)
    assert {(problem.line, problem.field) for problem in problems} == {
        (1, "immage"),
        (2, "image"),
        (3, "line"),
    }


def test_ids_follow_the_line_not_its_place(folder: Path) -> None:
    """Without an id a line gets one that says which speech it is and stays when lines move."""
    first = jobs_of(written(folder, GOOD, {**GOOD, "seed": 1}))
    second = jobs_of(written(folder, {**GOOD, "seed": 1}, {**GOOD, "preset": "fast"}))
    assert [job.id for job in first] == [job.id for job in reversed(second)]
    assert all(job.id.startswith("a-") and job.output == f"{job.id}.mp4" for job in first)
    _, problems = read_manifest(written(folder, GOOD, GOOD))
    assert [(problem.line, problem.field) for problem in problems] == [(2, "id")]


def test_a_job_is_the_same_while_its_content_is(folder: Path, speech_of: Callable[[int], Path]) -> None:
    """Fields, content of files, output and engine count; where the files lie and the priority do not."""
    job = jobs_of(written(folder, {**GOOD, "id": "x"}))[0]
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    for name in ("a.png", "a.wav"):
        shutil.copy(folder / name, elsewhere / name)
    moved = jobs_of(written(elsewhere, {**GOOD, "id": "x", "priority": 9}))[0]
    assert moved.digest("draft") == job.digest("draft")
    assert job.digest("comfyui") != job.digest("draft")
    for change in ({"seed": 1}, {"output": "y.mp4"}, {"audio": "https://host/a.wav"}):
        assert jobs_of(written(folder, {**GOOD, "id": "x", **change}))[0].digest("draft") != job.digest(
            "draft"
        )
    before = job.digest("draft")
    shutil.copy(speech_of(25), folder / "a.wav")
    assert job.digest("draft") != before


def test_urgent_jobs_come_first_and_long_ones_before_short_ones(
    folder: Path, speech_of: Callable[[int], Path]
) -> None:
    """By the speech's length and what the line takes of it; what is behind an address may be long."""
    shutil.copy(speech_of(100), folder / "long.wav")
    path = written(
        folder,
        {**GOOD, "id": "two-seconds"},
        {**GOOD, "id": "four-seconds", "audio": "long.wav"},
        {**GOOD, "id": "one-second", "audio": "long.wav", "max_frames": 25},
        {**GOOD, "id": "three-seconds", "audio": "long.wav", "audio_start": 1.0},
        {**GOOD, "id": "far", "audio": "http://127.0.0.1:9/a.wav"},
        {**GOOD, "id": "in-turns", "audio_2": "long.wav", "audio_order": "in_turns"},
        {**GOOD, "id": "urgent", "max_frames": 1, "priority": 1},
    )
    lengths = {job.id: job.expected_frames() for job in jobs_of(path)}
    assert (lengths["two-seconds"], lengths["three-seconds"], lengths["in-turns"]) == (50, 75, 150)
    order = [job.id for job in in_order(jobs_of(path))]
    assert order == [
        *("urgent", "far", "in-turns", "four-seconds", "three-seconds", "two-seconds", "one-second"),
    ]


def test_the_example_can_be_rendered() -> None:
    """examples/batch.jsonl names files that are there."""
    assert len(jobs_of(ROOT / "examples" / "batch.jsonl")) == 3


def test_a_manifest_without_jobs_is_none(folder: Path) -> None:
    """Empty, missing and binary files are told as such."""
    (folder / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for path in (written(folder, ""), folder / "missing.jsonl", folder / "binary.jsonl"):
        with pytest.raises(InvalidRequest, match="manifest"):
            read_manifest(path)
