"""The draft engine's drawing: the mouth follows the audio, chains go on, mistakes show in the pixels."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.colours import mapped
from pipeline.draft import media
from pipeline.draft.drawing import Puppet, Voice, Window, draw_window, loudness, read_stamp
from pipeline.draft.face import Face, default_face, find_face
from pipeline.draft.stamp import Stamp, write_stamp
from pipeline.seam_metrics import fidelity

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data" / "infinitetalk"
Frames = NDArray[np.uint8]
Floats = NDArray[np.float32]


@cache
def portrait(width: int = 256, height: int = 256) -> Frames:
    """The bundled portrait at a size: [H, W, 3]."""
    fitted: Frames = media.fit(media.load_pictures(ROOT / "examples" / "portrait.png"), width, height)[0]
    return fitted


@cache
def speech(frames: int = 200) -> Floats:
    """Syllables of changing loudness with pauses, 16 kHz."""
    times = np.arange(frames * 640) / 16_000
    envelope = np.clip(np.sin(2 * np.pi * 2.3 * times), 0, 1) * (0.4 + 0.6 * np.sin(times) ** 2)
    return np.asarray(0.3 * envelope * np.sin(2 * np.pi * 170 * times), dtype=np.float32)


def rms(samples: Floats) -> Floats:
    return np.asarray(np.sqrt(np.mean(samples.reshape(-1, 640) ** 2, axis=1)), dtype=np.float32)


def drawn(
    openings: Floats,
    seed: int = 1,
    length: int = 81,
    motion: Frames | None = None,
    picture: Frames | None = None,
) -> Frames:
    """One window with the bundled portrait, [length, H, W, 3]."""
    picture = portrait() if picture is None else picture
    face = find_face(portrait())
    return np.stack(
        list(draw_window(Window(Puppet(picture, [face]), (Voice(face, openings),), length, seed, motion)))
    )


def stamps(frames: Frames) -> list[Stamp]:
    found = [read_stamp(frame) for frame in frames]
    return [stamp for stamp in found if stamp is not None]


def darkness(frames: Frames, face: Face) -> Floats:
    """How dark the open mouth's place is, per frame, followed with the head's motion."""
    values = []
    for frame, stamp in zip(frames, stamps(frames), strict=True):
        x, y = face.mouth_x + stamp.dx, face.mouth_y + stamp.dy
        patch = frame[round(y) : round(y + 0.13 * face.height), round(x - 8) : round(x + 8)]
        values.append(255 - patch.mean())
    return np.array(values, dtype=np.float32)


def steps(frames: Frames) -> Floats:
    """Mean difference of each frame to the one before, in grey levels."""
    return np.array(
        [np.abs(b.astype(int) - a.astype(int)).mean() for a, b in pairwise(frames)], dtype=np.float32
    )


def through_jpeg(frame: Frames) -> Frames:
    decoded = cv2.imdecode(cv2.imencode(".jpg", frame)[1], cv2.IMREAD_COLOR)
    assert decoded is not None
    return decoded.astype(np.uint8)


def test_loudness_is_the_rms_of_exactly_the_frames_samples() -> None:
    """Samples [640 f, 640 (f + 1)) and no other move frame f; silence is 0, loud speech 1."""
    samples = np.zeros(640 * 5, np.float32)
    samples[640 * 2 : 640 * 3] = 0.1
    level = loudness(samples)
    assert level.tolist() == pytest.approx([0, 0, level[2], 0, 0])
    assert 0.5 < level[2] < 0.8
    assert loudness(np.full(640, 0.5, np.float32)).tolist() == [1.0]
    assert loudness(np.zeros(0, np.float32)).shape == (0,)
    assert loudness(np.ones(641, np.float32)).shape == (2,)


def test_resampled_speech_keeps_its_place() -> None:
    """44.1 kHz stereo becomes 16 kHz mono of the same length, a burst stays in its frame."""
    wave = np.zeros((2, 44_100), np.float32)
    wave[:, 22_050:23_814] = 0.3
    level = loudness(media.speech_of(wave, 44_100))
    assert len(level) == 25
    assert np.flatnonzero(level > 0.3).tolist() in ([12, 13], [13], [12, 13, 14])


def test_a_chain_starts_at_the_portrait_with_a_closed_mouth() -> None:
    """Frame 0 is the portrait but for the stamp in its first pixels."""
    first = drawn(loudness(speech()), length=5)[0]
    off = np.abs(first.astype(int) - portrait().astype(int)).max(axis=2)
    assert off.max() <= 4
    assert not off.ravel()[118:].any()
    assert stamps(first[None]) == [Stamp()]


def test_the_mouth_follows_the_audio() -> None:
    """Opening and darkness of the mouth correlate with the frames' RMS; silence closes it."""
    level = loudness(speech())
    frames = drawn(level)
    loud = rms(speech())[12:81]
    opened = np.array([stamp.opening for stamp in stamps(frames)])[12:]
    assert np.corrcoef(opened, loud)[0, 1] > 0.9
    assert np.corrcoef(darkness(frames, find_face(portrait()))[12:], loud)[0, 1] > 0.7
    assert not opened[level[12:81] == 0].any()
    assert not any(stamp.opening for stamp in stamps(drawn(level[:20]))[20:])


def test_a_wrong_audio_offset_shows() -> None:
    """Audio that is three frames off fits the speech clearly worse than the right one."""
    loud = rms(speech())[12:81]
    fits = [
        np.corrcoef([stamp.opening for stamp in stamps(drawn(loudness(speech())[shift:]))][12:], loud)[0, 1]
        for shift in (0, 3)
    ]
    assert fits[0] > fits[1] + 0.3


def test_the_same_input_draws_the_same_and_another_seed_moves_otherwise() -> None:
    """Deterministic; seeds change the motion, not the mouth."""
    level = loudness(speech())
    once, again, other = drawn(level, 1), drawn(level, 1), drawn(level, 2)
    assert np.array_equal(once, again)
    assert [s.opening for s in stamps(once)] == [s.opening for s in stamps(other)]
    assert max(abs(a.dx - b.dx) for a, b in zip(stamps(once), stamps(other), strict=True)) > 1


def test_the_head_sways_a_little_before_a_still_background() -> None:
    """Some pixels and degrees, little from frame to frame; the picture's corners don't move."""
    frames = drawn(np.zeros(0, np.float32))
    poses = stamps(frames)
    assert 1 < max(abs(pose.dx) for pose in poses) < 10
    assert 0.5 < max(abs(pose.angle) for pose in poses) < 3.5
    assert max(abs(b.dx - a.dx) for a, b in pairwise(poses)) < 1.5
    corner = np.s_[:, 2:20, :20]
    assert np.array_equal(frames[corner], np.broadcast_to(frames[0], frames.shape)[corner])


def test_two_windows_of_a_chain_draw_what_one_long_window_draws() -> None:
    """Nine motion frames hand on everything: bit for bit the same frames, numbered through."""
    level = loudness(speech())
    whole = drawn(level, length=153)
    first = drawn(level, length=81)
    second = drawn(level[72:], length=81, motion=first[-9:])
    assert np.array_equal(second[:9], first[-9:])
    assert np.array_equal(np.concatenate([first, second[9:]]), whole)
    assert [stamp.frame for stamp in stamps(whole)] == list(range(153))


def test_a_chain_goes_on_smoothly_with_another_seed() -> None:
    """The step across the hand-over is no larger than the others."""
    silence = np.zeros(0, np.float32)
    first = drawn(silence, seed=1)
    second = drawn(silence, seed=2, motion=first[-9:])
    chain = steps(np.concatenate([first, second[9:]]))
    assert chain[80] < 1.5 * np.percentile(chain, 95)


def test_a_lossy_hand_over_shows_as_a_jump() -> None:
    """Motion frames that went through JPEG have lost the pose: the head falls back to the portrait's."""
    silence = np.zeros(0, np.float32)
    first = drawn(silence)
    lossy = np.stack([through_jpeg(frame) for frame in first[-9:]])
    assert not stamps(lossy)
    second = drawn(silence, motion=lossy)
    chain = steps(second)
    assert chain[8] > 2 * chain[9:].max()
    assert abs(stamps(second)[0].dx) < 0.2 < abs(stamps(first)[-1].dx)


def test_wrong_motion_frames_show_as_a_jump() -> None:
    """Motion frames from elsewhere in the chain make the window start there: frame numbers repeat."""
    silence = np.zeros(0, np.float32)
    first = drawn(silence)
    second = drawn(silence, motion=first[30:39])
    assert stamps(second)[9].frame == 39


def test_a_changed_start_image_is_blended_in() -> None:
    """A brighter picture for the second window does not jump: it comes in over a dozen frames."""
    silence = np.zeros(0, np.float32)
    bright = np.clip(portrait().astype(int) + 40, 0, 255).astype(np.uint8)
    first = drawn(silence)
    second = drawn(silence, motion=first[-9:], picture=bright)
    chain = steps(np.concatenate([first, second[9:]]))
    assert chain.max() < 8
    assert second[30].mean() > first[-1].mean() + 25


def test_the_head_moves_to_where_a_changed_start_image_has_it() -> None:
    """As a source video's next picture: one face in every frame, no two of them in one another."""
    silence = np.zeros(0, np.float32)
    first = drawn(silence)
    second = drawn(silence, motion=first[-9:], picture=np.roll(portrait(), 10, axis=1))
    chain = steps(np.concatenate([first, second[9:]]))
    assert chain[80:].max() < 8
    for frame in second[9:21]:
        assert fidelity(frame, (first[-1], second[21]))[0] > 0.97


def test_the_stamp_is_read_only_where_it_was_written() -> None:
    """Every field comes back, also in other colours; noise, plain pictures and changed bits have none.

    A stamp shifts what it has to by 4 levels, and more only near black and white.
    """
    stamp = Stamp(123_456, -12.5, 3.25, -1.5, 0.25, -0.5, 0.125, 1.0)
    rng = np.random.default_rng(3)
    for shape in ((64, 64, 3), (16, 16, 3), (9, 700, 3)):
        frame = rng.integers(0, 256, shape, dtype=np.uint8)
        before = frame.copy()
        assert read_stamp(frame) is None
        write_stamp(frame, stamp)
        assert read_stamp(frame) == stamp
        off = np.abs(frame.astype(int) - before)
        assert off[(before > 20) & (before < 235)].max() <= 4
        assert off.max() <= 20
        shifted = mapped(frame, np.float32([1.0, 1.0, 1.0]), np.float32([2.3, -0.4, -3.6]))
        assert read_stamp(shifted) == stamp
        frame[0, 5, 1] ^= 4
        assert read_stamp(frame) is None
    assert read_stamp(portrait()) is None
    assert read_stamp(np.zeros((4, 4, 3), np.uint8)) is None


def test_the_face_of_the_bundled_portrait_is_found() -> None:
    """The mouth lies where it was drawn, at any size; a picture without a face gets the default geometry."""
    for width, height in ((384, 384), (256, 256), (640, 352)):
        face, wanted = find_face(portrait(width, height)), default_face(width, height)
        assert face.mouth_x == pytest.approx(wanted.mouth_x, abs=0.03 * height)
        if width == height:
            assert face.mouth_y == pytest.approx(wanted.mouth_y, abs=0.04 * height)
    blank = np.full((96, 128, 3), 90, np.uint8)
    assert find_face(blank) == default_face(128, 96)


@pytest.mark.parametrize(
    ("name", "mouth"), [("single/ref_image.png", (0.485, 0.40)), ("multi/ref_img.png", (0.297, 0.40))]
)
def test_faces_of_the_shared_pictures_are_found(name: str, mouth: tuple[float, float]) -> None:
    """The singing woman's and the driver's passenger's mouth, as shares of the picture."""
    if not (SHARED / name).is_file():
        pytest.skip("the shared examples are not here")
    picture = media.fit(media.load_pictures(SHARED / name), 640, 352)[0]
    face = find_face(picture)
    assert (face.mouth_x / 640, face.mouth_y / 352) == pytest.approx(mouth, abs=0.03)


@pytest.mark.parametrize(("width", "height"), [(16, 16), (64, 32), (48, 96)])
def test_the_smallest_sizes_are_drawn(width: int, height: int) -> None:
    """Nothing is too small for a test."""
    picture = media.fit(portrait()[None], width, height)[0]
    face = find_face(picture)
    voice = Voice(face, loudness(speech(20)))
    frames = list(draw_window(Window(Puppet(picture, [face]), (voice,), 17, 1)))
    assert {frame.shape for frame in frames} == {(height, width, 3)}


def test_of_two_speakers_the_one_who_speaks_opens_the_mouth() -> None:
    """Two faces in one picture: each mouth follows its own voice."""
    picture = np.concatenate([portrait(), portrait()], axis=1)
    left = find_face(portrait())
    right = Face(left.x + 256, left.y, left.height, left.mouth_x + 256, left.mouth_y, left.lips)
    level = loudness(speech())
    voices = (Voice(left, level), Voice(right, np.zeros(0, np.float32)))
    frames = np.stack(list(draw_window(Window(Puppet(picture, [left, right]), voices, 41, 1))))
    assert np.ptp(darkness(frames, left)[12:]) > 3 * np.ptp(darkness(frames, right)[12:])


def test_pictures_are_fitted_as_comfyui_does() -> None:
    """Cover and cut evenly: the middle stays the middle; the right size is not touched."""
    wide = np.zeros((1, 100, 300, 3), np.uint8)
    wide[:, :, 150:] = 200
    fitted = media.fit(wide, 64, 64)
    assert fitted.shape == (1, 64, 64, 3)
    assert (fitted[0, 0, 30, 0], fitted[0, 0, 33, 0]) == (0, 200)
    assert media.fit(fitted, 64, 64) is fitted
