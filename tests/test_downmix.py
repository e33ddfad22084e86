"""``pipeline.downmix``: one channel out of many, without losing the voice."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.downmix import BLOCK, FADE, Downmix

RNG = np.random.default_rng(4)
Samples = npt.NDArray[np.float32]


def voice(samples: int = 4 * BLOCK) -> Samples:
    return RNG.normal(0, 0.1, samples).astype(np.float32)


def mixed(channels: list[Samples], piece: int = 1024) -> Samples:
    sound = np.array(channels, np.float32)
    mix = Downmix(len(channels))
    pieces = [mix.feed(sound[:, start : start + piece]) for start in range(0, sound.shape[1], piece)]
    return np.concatenate([*pieces, mix.flush()])


def level(sound: Samples) -> float:
    return float(np.sqrt(np.square(sound).mean()))


def test_voices_in_the_middle_or_on_a_side_are_averaged() -> None:
    """Alike, unrelated, or in one channel only: the plain mean of the channels."""
    one, other, nothing = voice(), voice(), np.zeros(4 * BLOCK, np.float32)
    for channels in (
        [one, one],
        [one, other],
        [one, nothing],
        [nothing, one],
        [nothing, one, *[nothing] * 4],
    ):
        assert np.allclose(mixed(channels), np.mean(channels, axis=0), atol=1e-6)


@pytest.mark.parametrize("strength", [1.0, 0.7, 0.4])
def test_a_voice_in_opposite_phase_is_kept(strength: float) -> None:
    """Channels that wipe each other out give the stronger one, whole and undisturbed."""
    one = voice()
    out = mixed([one * np.float32(-strength), one])
    assert np.allclose(np.abs(out[FADE:]), np.abs(one[FADE:]), atol=1e-6)  # equally strong: either one


def test_opposite_phase_amid_noise_of_the_room() -> None:
    """Noise that both channels have alike does not hide that the voice would be lost."""
    one, room = voice(), 0.3 * voice()
    assert level(mixed([one + room, room - one])) > 0.9 * level(one)
    assert level(np.mean([one + room, room - one], axis=0)) < 0.4 * level(one)


def test_it_may_begin_in_the_middle() -> None:
    """Music first, then a voice in opposite phase: both are heard, at the level of one channel, no click."""
    times = np.arange(4 * BLOCK) / 16_000
    tone = (0.2 * np.sin(2 * np.pi * 200 * times)).astype(np.float32)
    right = tone.copy()
    right[2 * BLOCK :] *= -1
    out = mixed([tone, right])
    assert level(out[: 2 * BLOCK]) == pytest.approx(level(tone), rel=0.01)
    assert level(out[2 * BLOCK + FADE :]) == pytest.approx(level(tone), rel=0.01)
    assert np.abs(np.diff(out)).max() < 1.2 * np.abs(np.diff(tone)).max()


@pytest.mark.parametrize("piece", [1, 777, BLOCK, 100_000])
def test_how_it_is_fed_makes_no_difference(piece: int) -> None:
    """Pieces of any size give the same samples, as many as went in."""
    one = voice(BLOCK + 1001)
    channels = [one, np.where(np.arange(len(one)) < 3000, one, -one).astype(np.float32)]
    assert np.array_equal(mixed(channels, piece), mixed(channels))
    assert len(mixed(channels, piece)) == len(one)


def test_silence_stays_silent() -> None:
    """Zeros in every channel are zeros in the mix, between voices of any phase."""
    one = voice()
    one[BLOCK : 2 * BLOCK] = 0
    assert not mixed([one, -one])[BLOCK : 2 * BLOCK].any()


def test_one_channel_is_left_alone() -> None:
    """Mono comes out as it went in."""
    one = voice()
    assert np.array_equal(mixed([one]), one)
