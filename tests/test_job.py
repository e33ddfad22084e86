"""The job directory: a file that exists is whole, and one process has the job at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import InvalidRequest, StorageError
from pipeline.job import JobDirectory, finished, job_id, storage_errors
from pipeline.plan import calculate_segments
from pipeline.request import RenderRequest


def request_of(folder: Path, **more: object) -> RenderRequest:
    (folder / "a.png").write_bytes(b"picture")
    (folder / "b.wav").write_bytes(b"sound")
    return RenderRequest.checked(image=folder / "a.png", audio=folder / "b.wav", **more)


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    """An exception leaves neither the file nor a part of it."""
    target = tmp_path / "video.mp4"
    with pytest.raises(RuntimeError), finished(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with finished(target) as partial:
        assert partial.suffix == ".mp4"
        partial.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    """What the file system refuses is translated, with the path."""
    with pytest.raises(StorageError, match="No space left on device"), storage_errors(tmp_path):
        Path("/dev/full").write_text("x")


def test_a_job_is_held_by_one_process(tmp_path: Path) -> None:
    """A second process on the same directory is refused; a dead one holds nothing."""
    job = JobDirectory(tmp_path / "job")
    code = (
        "import sys; from pathlib import Path; from pipeline.job import JobDirectory\n"
        "with JobDirectory(Path(sys.argv[1])).locked(): print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(job.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(InvalidRequest, match="another process"), job.locked():
        pass
    child.kill()
    child.communicate()
    with job.locked():
        assert job.path.is_dir()


def test_the_same_request_is_the_same_job(tmp_path: Path) -> None:
    """The id follows the content of the files and what shapes the pictures, not names or GPUs."""
    request = request_of(tmp_path)
    name = job_id(request, "draft", "graph")
    assert name == job_id(request_of(tmp_path), "draft", "graph")
    (tmp_path / "copy.png").write_bytes(b"picture")
    moved = RenderRequest.checked(image=tmp_path / "copy.png", audio=tmp_path / "b.wav")
    assert name == job_id(moved, "draft", "graph")
    others = {
        job_id(request_of(tmp_path, seed=1), "draft", "graph"),
        job_id(request_of(tmp_path, width=64), "draft", "graph"),
        job_id(request, "comfyui", "graph"),
        job_id(request, "draft", "other graph"),
    }
    for mask in (b"left", b"right"):
        (tmp_path / "m.png").write_bytes(mask)
        masks = {"mask_1": tmp_path / "m.png", "mask_2": tmp_path / "m.png"}
        two = request_of(tmp_path, audio_2=tmp_path / "b.wav", **masks)
        others.add(job_id(two, "draft", "graph"))
    (tmp_path / "b.wav").write_bytes(b"other sound")
    others.add(job_id(request, "draft", "graph"))
    assert len(others | {name}) == 8


def test_how_segments_are_joined_is_not_what_is_rendered(tmp_path: Path) -> None:
    """Another ``seam`` is the same job: its finished segments are joined again, not rendered."""
    names = {job_id(request_of(tmp_path, seam=seam), "draft", "graph") for seam in ("morph", "cut")}
    assert len(names) == 1


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    """A path that is not there is an InvalidRequest of its field."""
    request = RenderRequest.checked(image=tmp_path / "nope.png", audio=tmp_path / "b.wav")
    with pytest.raises(InvalidRequest, match=r"image: .*nope.png: no such file"):
        job_id(request, "draft", "graph")


def test_a_stored_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    """A resumed job goes by the plan of its first start."""
    job = JobDirectory(tmp_path / "job")
    with job.locked():
        assert job.stored_plan() is None
        plan = calculate_segments(1000, 4)
        job.write_json(job.plan, plan.to_json())
        assert job.stored_plan() == plan


def test_inputs_are_copied_once(tmp_path: Path) -> None:
    """The job's copy keeps the suffix and survives the original."""
    original = tmp_path / "Talk.WAV"
    original.write_bytes(b"sound")
    job = JobDirectory(tmp_path / "job")
    with job.locked():
        copy = job.take_input("sound", original)
        original.unlink()
        assert job.take_input("sound", original) == copy
        assert (copy.name, copy.read_bytes()) == ("sound.wav", b"sound")
