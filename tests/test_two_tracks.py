"""Two speakers' sound on one clock: what the model hears, what the viewer hears, silence that is silent."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.errors import InvalidRequest
from pipeline.job import JobDirectory
from pipeline.plan import calculate_segments
from pipeline.preparation import Preparation, prepare
from pipeline.request import RenderRequest
from pipeline.sound import MIX_RATE, mix_tracks
from pipeline.speech import GATE_DBFS, cut_speech, prepare_speech
from pipeline.workflow import load


def save(path: Path, levels: np.ndarray, rate: int = 16_000) -> Path:
    """A mono WAV of levels from -1 to 1."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((np.clip(levels, -1, 1) * 32_767).astype("<i2").tobytes())
    return path


def tone(seconds: float, rate: int = 16_000, level: float = 0.3, pitch: float = 300) -> np.ndarray:
    return level * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)


def samples(content: bytes | Path) -> np.ndarray:
    with wave.open(io.BytesIO(content) if isinstance(content, bytes) else str(content)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def heard(path: Path) -> np.ndarray:
    """The decoded sound, [channels, samples], as long as the container says."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        assert stream.duration is not None
        assert stream.time_base is not None
        length = round(stream.duration * stream.time_base * stream.rate)
        parts = [frame.to_ndarray() for frame in container.decode(stream)]
    return np.concatenate(parts, axis=1)[:, :length]


def prepared(folder: Path, portrait: Path, **fields: object) -> Preparation:
    request = RenderRequest.checked(image=portrait, width=96, height=96, **fields)
    job = JobDirectory(folder / "job")
    with job.locked():
        return prepare(request, job)


def test_the_second_track_begins_after_exactly_so_much_silence(tmp_path: Path) -> None:
    """The silence in front is digital and counted in samples; the loudness is that of the speech alone."""
    source = save(tmp_path / "s.wav", tone(2))
    plain = prepare_speech(source, tmp_path / "plain.wav")
    late = prepare_speech(source, tmp_path / "late.wav", lead=100_001)
    content = samples(tmp_path / "late.wav")
    assert not content[:100_001].any()
    assert np.array_equal(content[100_001:], samples(tmp_path / "plain.wav"))
    assert (late.samples, late.frames) == (plain.samples + 100_001, plain.frames)
    assert late.gain_db == plain.gain_db


def test_a_cut_without_speech_is_digital_silence(tmp_path: Path) -> None:
    """Room noise where nobody speaks becomes zeros; in a cut with speech it stays as it is."""
    noise = np.random.default_rng(0).normal(0, 10 ** ((GATE_DBFS - 5) / 20), 16_000 * 4)
    noise[: len(tone(1))] += tone(1)
    track = save(tmp_path / "t.wav", noise)
    assert not samples(cut_speech(track, 50, 20, 10)).any()
    spoken = samples(cut_speech(track, 20, 20, 10))
    assert np.array_equal(spoken, samples(track)[20 * 640 : 50 * 640])


@pytest.mark.parametrize(("order", "frames"), [("together", 75), ("in_turns", 125)])
def test_the_length_is_the_longer_or_the_sum(tmp_path: Path, portrait: Path, order: str, frames: int) -> None:
    """2 s and 3 s: together 3 s, in turns 5 s; picture and sound agree to the sample."""
    first = save(tmp_path / "1.wav", tone(2, 44_100), 44_100)
    second = save(tmp_path / "2.wav", tone(3, pitch=500))
    ready = prepared(tmp_path, portrait, audio=first, audio_2=second, audio_order=order)
    assert ready.total_frames == frames
    path, index = ready.make_sound(tmp_path / "mix.mp4")
    assert index == 0
    assert heard(path).shape == (2, frames * MIX_RATE // 25)


def test_a_mix_is_where_and_as_loud_as_its_parts(tmp_path: Path) -> None:
    """Clicks stay at their sample, a lone voice keeps its level, two that clip are held."""
    click = np.zeros(32_000)
    click[8_000] = 0.9
    first, second = save(tmp_path / "1.wav", click), save(tmp_path / "2.wav", click)
    path, _ = mix_tracks([first, second], True, 100, tmp_path / "turns.mp4")
    peaks = [round(int(np.abs(part[0]).argmax()) / 3) for part in np.split(heard(path), 2, axis=1)]
    assert all(abs(peak - 8_000) <= 1 for peak in peaks)
    quiet, loud = save(tmp_path / "q.wav", np.zeros(32_000)), save(tmp_path / "l.wav", tone(2, level=0.9))
    alone = heard(mix_tracks([loud, quiet], False, 50, tmp_path / "alone.mp4")[0])
    assert abs(np.abs(alone[:, 20_000:60_000]).max() - 0.9) < 0.03
    both = heard(mix_tracks([loud, loud], False, 50, tmp_path / "both.mp4")[0])
    assert 0.85 < np.abs(both[:, 20_000:60_000]).max() < 1.0


def test_max_frames_cuts_a_mix(tmp_path: Path, portrait: Path) -> None:
    """To the sample, as everywhere."""
    sound = save(tmp_path / "1.wav", tone(2))
    ready = prepared(tmp_path, portrait, audio=sound, audio_2=sound, audio_order="in_turns", max_frames=60)
    assert heard(ready.make_sound(tmp_path / "m.mp4")[0]).shape[1] == 60 * MIX_RATE // 25


def test_every_window_gets_both_tracks_of_its_own_time(tmp_path: Path, portrait: Path) -> None:
    """Cuts of both tracks start ``context`` frames before the window and go on past its end."""
    first = save(tmp_path / "1.wav", tone(8))
    second = save(tmp_path / "2.wav", tone(6, pitch=500))
    request = RenderRequest.checked(image=portrait, audio=first, audio_2=second, audio_order="in_turns")
    ready = prepared(tmp_path, portrait, audio=first, audio_2=second, audio_order="in_turns")
    plan = calculate_segments(ready.total_frames, 3)
    tracks = [samples(track.path) for track in ready.speech]
    assert len(tracks[1]) == 14 * 16_000
    recipe = ready.recipe(request, "job", load("talk_multi"), plan)
    for segment in plan.segments:
        task = ready.task(recipe, plan, segment, 1)
        start = segment.start
        for number, length in enumerate(segment.windows):
            context = task.context[number]
            assert context == min(64, start)
            for track, cuts in zip(tracks, (task.speech, task.speech_2), strict=True):
                cut = samples(cuts[number])
                assert len(cut) >= 640 * (context + length + 1)
                expected = track[640 * (start - context) :][: len(cut)]
                silent = not cut.any()
                assert silent or np.array_equal(cut[: len(expected)], expected)
                if np.abs(expected).max(initial=0) > 1000:
                    assert not silent
            start += length - plan.motion
    assert len(task.masks) == 2


def test_what_is_wrong_with_the_second_speech_is_said_of_it(tmp_path: Path, portrait: Path) -> None:
    """The field in the error is audio_2."""
    sound = save(tmp_path / "1.wav", tone(1))
    for content in (b"", b"no sound"):
        (tmp_path / "2.wav").write_bytes(content)
        with pytest.raises(InvalidRequest) as caught:
            prepared(tmp_path, portrait, audio=sound, audio_2=tmp_path / "2.wav")
        assert caught.value.field == "audio_2"


def test_a_resumed_job_needs_none_of_the_callers_files(tmp_path: Path, portrait: Path) -> None:
    """Both sounds and both masks are kept in the job."""
    files = {name: save(tmp_path / f"{name}.wav", tone(1)) for name in ("audio", "audio_2")}
    files |= {name: tmp_path / f"{name}.png" for name in ("mask_1", "mask_2")}
    for name in ("mask_1", "mask_2"):
        files[name].write_bytes(portrait.read_bytes())
    before = prepared(tmp_path, portrait, **files)
    for path in files.values():
        path.unlink()
    again = prepared(tmp_path, portrait, **files)
    assert again.masks == before.masks
    assert again.total_frames == before.total_frames
