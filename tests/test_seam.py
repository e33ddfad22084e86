"""``pipeline.seam``: from one rendering to the other without a jump, a ghost or a colour step."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from pipeline.seam import CROSSFADE, WARM_UP, join_overlap

SIZE, COUNT = 128, 36
Stack = npt.NDArray[np.uint8]


def texture(seed: int, blur: float = 1.5) -> npt.NDArray[np.float32]:
    noise = np.random.default_rng(seed).uniform(0, 255, (SIZE, SIZE, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), blur)
    return np.asarray(128 + (smooth - smooth.mean()) * 60 / smooth.std(), np.float32).clip(20, 235)


BACKGROUND, FACE = texture(1), texture(2, 2.0)


def clip(shift: float = 0.0, count: int = COUNT) -> Stack:
    """A disc (the face) that sways over a still background, ``shift`` pixels aside."""
    frames = []
    for t in range(count):
        centre = (SIZE / 2 + shift + 4 * np.sin(t / 5), SIZE / 2 + 2 * np.cos(t / 7))
        move = np.array([[1, 0, centre[0] - SIZE / 2], [0, 1, centre[1] - SIZE / 2]], np.float32)
        face = cv2.warpAffine(FACE, move, (SIZE, SIZE), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        y, x = np.mgrid[:SIZE, :SIZE]
        mask = np.clip(32 - np.hypot(x - centre[0], y - centre[1]), 0, 1)[..., None]
        frames.append(np.clip(BACKGROUND * (1 - mask) + face * mask, 0, 255).astype(np.uint8))
    return np.array(frames)


def test_identical_renderings_pass_through() -> None:
    """Where both renderings agree nothing is touched, and the report says that nothing was joined."""
    frames, report = join_overlap(clip(), clip(), start=100)
    assert np.array_equal(frames, clip())
    assert (report.method, report.frame, report.frames, report.colour_gap) == ("cut", 100 + WARM_UP, 0, 0.0)
    assert report.verdict == "good"


def test_nearly_identical_renderings_pass_through() -> None:
    """One level of noise between the renderings stays one level."""
    noise = np.random.default_rng(3).integers(-1, 2, clip().shape)
    other = (clip().astype(int) + noise).clip(0, 255).astype(np.uint8)
    frames, _ = join_overlap(clip(), other)
    assert np.abs(np.array(frames).astype(int) - clip()).mean() < 0.7
    assert np.abs(np.array(frames).astype(int) - clip()).max() <= 3


def test_another_pose_is_morphed() -> None:
    """A face 5 pixels aside moves over: no jump beyond natural motion, sharp, in the usable overlap."""
    earlier, later = clip(), clip(5)
    frames, report = join_overlap(earlier, later, start=50)
    assert report.method == "morph"
    assert len(frames) == COUNT
    assert report.frame >= 50 + WARM_UP
    assert report.frame + report.frames <= 50 + COUNT
    cut = np.abs(later[20].astype(int) - earlier[19]).mean()
    steps = [np.abs(b.astype(int) - a).mean() for a, b in pairwise(frames)]
    assert max(steps) < cut / 2
    assert report.jump < 2
    assert report.sharpness > 0.8
    assert report.agreement > 0.9


def test_warm_up_frames_show_the_earlier_rendering() -> None:
    """The later segment's first frames still leave the reference picture and are not used."""
    later = clip(5)
    later[:WARM_UP] = 0
    frames, _ = join_overlap(clip(), later)
    assert np.abs(np.array(frames[:WARM_UP]).astype(int) - clip()[:WARM_UP]).mean() < 1.5


def test_colours_change_evenly_over_the_overlap() -> None:
    """Other colours leave no step anywhere: the means climb evenly from one rendering to the other."""
    earlier = clip()
    later = np.clip(earlier * np.array([1.06, 1.0, 0.95]) + [4, 6, 3], 0, 255).astype(np.uint8)
    frames, report = join_overlap(earlier, later)
    offset = np.array([frame.mean((0, 1)) for frame in frames]) - earlier.mean((1, 2))
    whole = (later.astype(float) - earlier).mean((0, 1, 2))
    assert report.colour_gap == pytest.approx(np.abs(whole).max(), abs=0.6)
    expected = np.linspace(0, 1, COUNT + 2)[1:-1, None] * whole
    assert np.abs(offset - expected).max() < 0.5
    assert np.abs(np.diff(offset, axis=0)).max() < 0.5


def test_different_scenes_are_crossfaded() -> None:
    """Where there is nothing to align, a short crossfade is the honest answer."""
    other = np.broadcast_to(texture(9, 4.0).astype(np.uint8), clip().shape)
    frames, report = join_overlap(clip(), np.ascontiguousarray(other))
    assert (report.method, report.frames, len(frames)) == ("crossfade", CROSSFADE, COUNT)
    assert np.array_equal(frames[0], clip()[0])


def test_a_wider_gap_takes_a_longer_morph() -> None:
    """Length hides distance: the morph grows with the displacement."""
    near, far = (join_overlap(clip(0, 80), clip(shift, 80))[1] for shift in (1.5, 7))
    assert near.frames < far.frames


@pytest.mark.parametrize("moment", [19, 30])
def test_a_fast_moment_stays_outside(moment: int) -> None:
    """Where both renderings make a quick move, the transition is over before it or begins after it."""
    earlier, later = (clip(shift) for shift in (0, 3))
    for frames in (earlier, later):
        frames[moment:] = np.roll(frames[moment:], 8, axis=2)
    _, report = join_overlap(earlier, later)
    assert report.method == "morph"
    assert not report.frame <= moment <= report.frame + report.frames


@pytest.mark.parametrize("count", [1, 2, 5, 12, 13, 14])
def test_short_overlaps_work(count: int) -> None:
    """Overlaps shorter than the planner's minimum are joined as well as they can be."""
    frames, report = join_overlap(clip(0, count), clip(2, count))
    assert len(frames) == count
    assert report.frame + report.frames <= count


def blinking(at: int) -> Stack:
    """The clip with a dark mouth everywhere but around one frame."""
    frames = clip().copy()
    for t in range(COUNT):
        if abs(t - at) > 3:
            frames[t, 70:80, 54:74] = 20
    return frames


def test_textures_change_where_the_renderings_are_alike() -> None:
    """Of two renderings whose mouths agree at one moment only, the transition is made then."""
    for moment in (18, 29):
        frames, _ = join_overlap(blinking(moment), clip(2))
        darkest = [frame[70:80, 54:74].mean() for frame in frames]
        assert max(darkest[: moment - 6]) < 60
        assert min(darkest[moment + 1 :]) > 90


def test_pauses_of_the_speech_are_preferred() -> None:
    """Where frames differ alike, the cut falls into the silence."""
    still, other = (np.repeat(clip(shift, 1), COUNT, axis=0) for shift in (0, 3))
    for pause in (16, 30):
        levels = [-20.0] * COUNT
        levels[pause - 1 : pause + 2] = [-70.0] * 3
        _, report = join_overlap(still, other, method="cut", levels=levels)
        assert abs(report.frame - pause) <= 1
        assert report.audio_db == -70


def test_a_cut_is_made_at_the_best_pair() -> None:
    """``cut`` changes over at once, where the renderings differ least, and the report calls a jump a jump."""
    other = clip(6)
    other[25] = clip(1)[25]
    frames, report = join_overlap(clip(), other, method="cut")
    assert (report.method, report.frame, report.frames) == ("cut", 25, 0)
    assert np.abs(frames[24].astype(int) - clip()[24]).mean() < 1
    assert report.sharpness == report.ghosting == 1


def test_renderings_that_agree_are_cut_whatever_is_asked() -> None:
    """Nothing is warped where both show the same picture but for a little noise."""
    noise = np.random.default_rng(4).integers(-1, 2, clip().shape)
    _, report = join_overlap(clip(), (clip().astype(int) + noise).clip(0, 255).astype(np.uint8))
    assert (report.method, report.frames, report.verdict) == ("cut", 0, "good")


def test_the_documents_crossfade_takes_forty_frames_and_is_called_what_it_is() -> None:
    """``crossfade`` mixes both renderings for 40 frames: two faces, which the report sees."""
    frames, report = join_overlap(clip(0, 60), clip(5, 60), method="crossfade")
    assert (report.method, report.frame, report.frames) == ("crossfade", 20, 40)
    middle = (clip(0, 60)[40].astype(int) + clip(5, 60)[40]) / 2
    assert np.abs(frames[40] - middle).mean() < 1
    assert report.ghosting < 0.95
    assert report.verdict != "good"
    assert join_overlap(clip(0, 60), clip(5, 60))[1].verdict == "good"


def test_speed_is_a_fault_of_the_seam_only_where_the_renderings_are_slower() -> None:
    """A cut from pose to pose is fast; the same cut in a moment when the head moves as fast anyway is not.

    A morph leaves out such moments, if the overlap has others.
    """
    slow = join_overlap(clip(0, 60), clip(8, 60), method="cut")[1]
    assert slow.speed > 1.5
    assert slow.verdict != "good"
    jerk = 30
    clips = [np.concatenate([clip(shift, jerk), clip(shift + 9, 60)[jerk:]]) for shift in (0, 6)]
    _, report = join_overlap(*clips)
    assert report.speed <= 1.1
    assert not report.frame <= jerk < report.frame + report.frames + 1


def test_still_pictures_have_finite_reports() -> None:
    """Nothing moves, so nothing may be divided by the motion."""
    still = np.repeat(clip(0, 1), COUNT, axis=0)
    other = np.repeat(clip(3, 1), COUNT, axis=0)
    _, report = join_overlap(still, other)
    assert np.isfinite([report.jump, report.natural, report.sharpness]).all()


def test_unequal_overlaps_are_refused() -> None:
    """Two renderings of different lengths are a bug of the caller."""
    with pytest.raises(ValueError, match="overlap"):
        join_overlap(clip(0, 5), clip(0, 6))
