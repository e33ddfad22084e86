"""``pipeline.stream``: what players get is the final video, frame by frame, and its sound in step."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import av
import pytest

from pipeline import ffmpeg
from pipeline.errors import MediaError
from pipeline.kept_seams import keep_seam
from pipeline.segment_files import SegmentFiles
from pipeline.sound import encode_track
from pipeline.stitch import joints, stitch, video_parts
from pipeline.stream import PLAYLIST, Stream
from tests.test_stitch import FLASHES, THREE, clicks, heard, onset, plan_of, planes, rendered, save

Parts = list[tuple[Path, int]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Parts, Path, Path]:
    """The parts of a video of three segments, its sound as AAC, and the joined video."""
    folder = tmp_path_factory.mktemp("made")
    segments = rendered(folder / "segments", THREE, slip=2)
    return (*_made(folder, segments), folder / "talk.mp4")


def _made(folder: Path, segments: list[SegmentFiles]) -> tuple[Parts, Path]:
    plan = plan_of(THREE)
    sound = save(folder / "s.wav", clicks(6, 44_100), 44_100)
    encode_track(sound, 150, folder / "sound.mp4")
    seams = {
        joint.number: keep_seam(joint, folder / "seams") for joint in joints(plan, segments, "morph", ())
    }
    track = (folder / "sound.mp4", 0)
    stitch(plan, segments, track, folder / "talk.mp4", folder, seams=folder / "seams")
    return video_parts(segments, seams), folder / "sound.mp4"


def listed(folder: Path) -> tuple[int, bool]:
    """Frames that a playlist names, and whether it says that this is all."""
    lines = (folder / PLAYLIST).read_text().splitlines()
    seconds = [float(line[8:].rstrip(",")) for line in lines if line.startswith("#EXTINF:")]
    return round(sum(seconds) * 25), lines[-1] == "#EXT-X-ENDLIST"


def test_the_stream_is_the_final_video(made: tuple[Parts, Path, Path], tmp_path: Path) -> None:
    """Every picture is the final one's, at its time; clicks are heard where they are in the final video."""
    parts, sound, talk = made
    with Stream(tmp_path / "stream", sound, 150) as stream:
        stream.end(parts)
    assert listed(tmp_path / "stream") == (150, True)
    playlist = tmp_path / "stream" / PLAYLIST
    assert planes(playlist) == planes(talk)
    with av.open(str(playlist)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([t / 25 for t in range(150)], abs=1e-6)
    whole, rate, codec = heard(playlist)
    final, _, _ = heard(talk)
    assert codec == "aac"
    assert abs(len(whole) - len(final)) <= 1024
    for flash in FLASHES:
        assert abs(onset(whole, rate, flash / 25) - onset(final, rate, flash / 25)) < 0.001


def test_the_front_grows_part_by_part(made: tuple[Parts, Path, Path], tmp_path: Path) -> None:
    """After each part exactly the finished frames are named, by names that stay; each state plays."""
    parts, sound, talk = made
    folder, seen, names = tmp_path / "stream", 0, ""
    with Stream(folder, sound, 150) as stream:
        for count, (_, frames) in enumerate(parts, 1):
            stream.show(parts[:count])
            seen += frames
            assert listed(folder) == (seen, False)
            text = (folder / PLAYLIST).read_text()
            assert text.startswith(names)
            names = text
            # Players of a playlist that is not over would wait.
            (folder / "now.m3u8").write_text(text + "#EXT-X-ENDLIST\n")
            assert planes(folder / "now.m3u8") == planes(talk)[:seen]
        stream.end(parts)
    assert (folder / PLAYLIST).read_text() == names + "#EXT-X-ENDLIST\n"


def test_another_start_keeps_what_is_right(made: tuple[Parts, Path, Path], tmp_path: Path) -> None:
    """Pieces are not written twice, a shorter front takes nothing away, another take replaces its own."""
    parts, sound, _ = made
    folder = tmp_path / "stream"
    with Stream(folder, sound, 150) as stream:
        stream.show(parts[:3])
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with Stream(folder, sound, 150) as stream:
        stream.show(parts[:1])
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
        stream.end(parts)
        whole = {path.name for path in folder.iterdir()}
        assert set(before) < whole
    plan = plan_of(THREE)
    other = rendered(tmp_path / "other", THREE, slip=3)
    segments = [SegmentFiles.in_folder(parts[0][0].parent), *other[1:]]
    seams = {j.number: keep_seam(j, tmp_path / "seams") for j in joints(plan, segments, "morph", ())}
    with Stream(folder, sound, 150) as stream:
        stream.end(video_parts(segments, seams))
    again = {path.name for path in folder.iterdir()}
    pieces = {name for name in whole if name.endswith(".m4s")}
    assert pieces & again == {name for name in pieces if int(name[:7]) < 34}
    assert listed(folder) == (150, True)


def test_what_is_missing_is_told(made: tuple[Parts, Path, Path], tmp_path: Path) -> None:
    """A part that has fewer frames than promised, and an end without all parts, are errors."""
    parts, sound, _ = made
    with Stream(tmp_path / "stream", sound, 150) as stream:
        with pytest.raises(MediaError, match="does not have its"):
            stream.show([(parts[0][0], parts[0][1] + 1)])
        with pytest.raises(MediaError, match="instead of 150"):
            stream.end(parts[:2])


def test_sound_that_a_video_carries_as_it_is(made: tuple[Parts, Path, Path], tmp_path: Path) -> None:
    """For players, mp3 becomes AAC; its clicks stay where they are."""
    parts, _, _ = made
    mp3 = save(tmp_path / "s.mp3", clicks(6, 48_000), 48_000, "libmp3lame")
    encode_track(mp3, 150, tmp_path / "sound.mp4")
    with Stream(tmp_path / "stream", tmp_path / "sound.mp4", 150) as stream:
        stream.end(parts)
    whole, rate, codec = heard(tmp_path / "stream" / PLAYLIST)
    assert (codec, rate) == ("aac", 48_000)
    for flash in FLASHES:
        assert abs(onset(whole, rate, flash / 25) - flash / 25) < 0.001


def test_ffmpeg_reads_it_without_a_word(made: tuple[Parts, Path, Path], tmp_path: Path) -> None:
    """Nothing steps in time; the sound of all pieces is the encoder's, packet by packet."""
    parts, sound, _ = made
    with Stream(tmp_path / "stream", sound, 150) as stream:
        stream.end(parts)
    playlist = tmp_path / "stream" / PLAYLIST
    command = [ffmpeg.binary(), "-v", "warning", "-i", str(playlist), "-f", "null", "-"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == ""

    def packets(path: Path) -> list[str]:
        with av.open(str(path)) as container:
            found = [bytes(packet) for packet in container.demux(audio=0) if packet.size]
        return [hashlib.sha256(content).hexdigest() for content in found]

    assert packets(playlist) == packets(sound)
