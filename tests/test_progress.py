"""Progress counts by cost, and the time left is an estimate from what was measured."""

from pipeline.plan import Segment
from pipeline.progress import JobProgress, SegmentState

FOUR = Segment(0, 0, 297, (81, 81, 81, 81), 0)
TWO = Segment(1, 270, 423, (81, 81), 1)


def test_nothing_is_promised_before_a_window_was_timed() -> None:
    """Without a measured window there is no time left to tell."""
    states = (SegmentState(FOUR, "rendering", 0, 0, 0.9), SegmentState(TWO, "waiting"))
    assert JobProgress("j", "rendering", 1, states).eta_seconds is None


def test_time_left_is_that_of_the_fullest_lane() -> None:
    """Two lanes at 10 s a window: three and a half windows are left on the one, nothing more is waiting."""
    states = (
        SegmentState(FOUR, "rendering", 0, 0, 0.5, ()),
        SegmentState(TWO, "rendering", 1, 1, 0.0, (10.0,)),
    )
    assert JobProgress("j", "rendering", 2, states).eta_seconds == 35.0


def test_waiting_segments_go_to_the_emptiest_lane() -> None:
    """A waiting segment of four windows follows the lane that has one window left."""
    states = (
        SegmentState(TWO, "rendering", 0, 1, 0.0, (10.0,)),
        SegmentState(FOUR, "waiting"),
    )
    assert JobProgress("j", "rendering", 1, states).eta_seconds == 50.0


def test_windows_of_an_earlier_start_are_done_but_were_not_timed() -> None:
    """A waiting segment with two of its four windows kept takes two; times are those of the last ones."""
    short = Segment(1, 270, 372, (81, 45), 1)
    states = (
        SegmentState(short, "finished", None, 2, 0.0, (12.0,)),  # 12 latents: 1 s each
        SegmentState(FOUR, "waiting", None, 2),
    )
    assert JobProgress("j", "rendering", 1, states).eta_seconds == 2 * 21.0


def test_progress_is_a_share_of_the_cost() -> None:
    """Done windows and the fraction of the current one count by their latent frames."""
    half = SegmentState(FOUR, "rendering", 0, 2, 0.0)
    assert JobProgress("j", "rendering", 1, (half,)).fraction == 0.5
    done = SegmentState(FOUR, "finished", windows_done=4)
    progress = JobProgress("j", "rendering", 1, (done, SegmentState(TWO, "waiting")))
    assert progress.fraction == 4 / 6
    assert (progress.windows_done, progress.windows_total) == (4, 6)
