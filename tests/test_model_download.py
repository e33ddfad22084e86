"""Weights arrive whole, go on where they stopped, and say what is wrong; the hub is one on this machine."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import ConfigurationError, DownloadError, StorageError
from pipeline.model_download import RemoteFile, bytes_left, check_space, fetch, look_up, part_of
from pipeline.models import State, Weight, verify
from tests.hub_server import TOKEN, Hub, running_hub

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
REPOSITORY = "someone/weights"
CONTENT = random.Random(7).randbytes(24 * MIB)
FILE = "net.safetensors"
KEEP_GOING = """
import sys
from pathlib import Path
from pipeline.model_download import fetch, look_up
from pipeline.models import Weight
weight = Weight("net.safetensors", "", "vae", "someone/weights", "deep/net.safetensors", "", {"native": ()})
fetch(look_up(weight, hub=sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with running_hub() as hub:
        hub.files[f"{REPOSITORY}/deep/{FILE}"] = CONTENT
        yield hub


def weight(**facts: object) -> Weight:
    return Weight(FILE, "a net", "vae", REPOSITORY, f"deep/{FILE}", "free", {"native": ("m",)}, **facts)  # type: ignore[arg-type]


def test_a_file_arrives_at_its_place(hub: Hub, tmp_path: Path) -> None:
    """The file lies in its folder under its own name, without the repository's folders and without a rest."""
    seen: list[tuple[int, int]] = []
    path = fetch(look_up(weight(), hub=hub.url), tmp_path, lambda _, done, total: seen.append((done, total)))
    assert path == tmp_path / "vae" / FILE
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == [FILE]
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_killed_download_goes_on(hub: Hub, tmp_path: Path) -> None:
    """After kill -9 the bytes that came are kept, and the next try asks for the rest only."""
    hub.hold_after = 21 * MIB
    command = [sys.executable, "-c", KEEP_GOING, hub.url, str(tmp_path)]
    child = subprocess.Popen(command, cwd=ROOT)
    assert hub.holding.wait(60)
    part = part_of(look_up(weight(), hub=hub.url), tmp_path)
    while not part.exists() or part.stat().st_size < 20 * MIB:  # the client takes 10 MiB at a time
        assert child.poll() is None
        os.sched_yield()
    child.send_signal(signal.SIGKILL)
    child.wait()
    (found,) = verify([weight(size=len(CONTENT))], tmp_path, checksums=False)
    assert (found.state, found.bytes_left) == (State.UNFINISHED, 4 * MIB)
    remote = look_up(weight(), hub=hub.url)
    assert bytes_left([remote], tmp_path) == 4 * MIB
    assert fetch(remote, tmp_path).read_bytes() == CONTENT
    assert hub.ranges() == [None, f"bytes={20 * MIB}-"]


def test_a_broken_connection_is_taken_up_again(hub: Hub, tmp_path: Path) -> None:
    """A connection that breaks in the middle costs a retry, not the file."""
    hub.break_after = 15 * MIB
    assert fetch(look_up(weight(), hub=hub.url), tmp_path).read_bytes() == CONTENT
    assert hub.ranges() == [None, f"bytes={10 * MIB}-"]


def test_a_server_without_ranges_starts_again(hub: Hub, tmp_path: Path) -> None:
    """A mirror that ignores Range sends everything, and the file is right all the same."""
    hub.ignores_range = True
    remote = look_up(weight(), hub=hub.url)
    part = part_of(remote, tmp_path)
    part.parent.mkdir()
    part.write_bytes(CONTENT[: 5 * MIB])
    assert fetch(remote, tmp_path).read_bytes() == CONTENT


def test_a_token_is_sent_to_the_hub_alone(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gated repository opens with HF_TOKEN, which the host of the large files never sees."""
    hub.gated.add(REPOSITORY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch(look_up(weight(), hub=hub.url), tmp_path)
    assert hub.leaked == []


@pytest.mark.parametrize(("token", "words"), [(None, "set HF_TOKEN"), ("hf_wrong", "is not accepted")])
def test_a_refusal_says_what_helps(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str | None, words: str
) -> None:
    """401 names the file, and whether a token is missing or wrong."""
    hub.gated.add(REPOSITORY)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigurationError, match=rf"refuses {FILE} \(401\).*{words}"):
        look_up(weight(), hub=hub.url)


def test_a_missing_file_is_named(hub: Hub) -> None:
    """404 names the repository and the path."""
    hub.files.clear()
    with pytest.raises(ConfigurationError, match=rf"{REPOSITORY} has no deep/{FILE} \(404"):
        look_up(weight(), hub=hub.url)


def test_a_hub_that_is_not_there_is_an_error_at_once() -> None:
    """A dead address fails in a moment and names the variables that change it."""
    with pytest.raises(ConfigurationError, match=r"can't be reached.*HF_ENDPOINT"):
        look_up(weight(), hub="http://127.0.0.1:9")


def test_too_little_space_is_said_before_the_first_byte(hub: Hub, tmp_path: Path) -> None:
    """Space is counted for all files together, less what is there already."""
    huge = RemoteFile(weight(), hub.url, "a" * 64, 10**15)
    with pytest.raises(StorageError, match=r"1000000\.0 GB are to come.*make room"):
        check_space([huge], tmp_path / "new")
    check_space([look_up(weight(), hub=hub.url)], tmp_path / "new")
    assert hub.ranges() == []


@pytest.mark.parametrize("facts", [{"size": 5}, {"sha256": "b" * 64}])
def test_another_version_is_refused_before_the_transfer(hub: Hub, facts: dict[str, object]) -> None:
    """A file whose size or checksum is not the manifest's is taken only if asked for."""
    with pytest.raises(ConfigurationError, match=r"another net.safetensors.*--any-version"):
        look_up(weight(**facts), hub=hub.url)
    assert look_up(weight(**facts), hub=hub.url, any_version=True).size == len(CONTENT)


def test_damaged_bytes_are_not_kept(hub: Hub, tmp_path: Path) -> None:
    """A file whose checksum is not the hub's is deleted and the error says so."""
    hub.claimed[f"{REPOSITORY}/deep/{FILE}"] = "c" * 64
    with pytest.raises(DownloadError, match="arrived damaged"):
        fetch(look_up(weight(), hub=hub.url), tmp_path)
    assert list((tmp_path / "vae").iterdir()) == []


def test_two_downloads_of_one_file_do_not_mix(hub: Hub, tmp_path: Path) -> None:
    """While one process writes a file, another is told to wait."""
    hub.hold_after = 12 * MIB
    command = [sys.executable, "-c", KEEP_GOING, hub.url, str(tmp_path)]
    child = subprocess.Popen(command, cwd=ROOT)
    assert hub.holding.wait(60)
    with pytest.raises(ConfigurationError, match="another download writes"):
        fetch(look_up(weight(), hub=hub.url), tmp_path)
    child.kill()
    child.wait()


def test_a_folder_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    """A file where a folder should be is a StorageError with its path."""
    (tmp_path / "vae").write_text("in the way")
    with pytest.raises(StorageError, match="vae"):
        fetch(look_up(weight(), hub=hub.url), tmp_path)


def test_small_files_have_no_checksum_for_an_etag(hub: Hub, tmp_path: Path) -> None:
    """An ETag that is no SHA-256 is not compared with the content; the manifest's checksum is."""
    hub.claimed[f"{REPOSITORY}/deep/{FILE}"] = "W/abc-123"
    right = weight(sha256=hashlib.sha256(CONTENT).hexdigest())
    assert fetch(look_up(right, hub=hub.url), tmp_path).exists()
    with pytest.raises(DownloadError, match="damaged"):
        fetch(look_up(weight(sha256="d" * 64), hub=hub.url), tmp_path / "again")
