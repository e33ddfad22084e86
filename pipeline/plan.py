"""Which GPU renders which frames: the arithmetic of a split job, and nothing else (no files, no clock).

The model works in windows of ``W`` frames.  The first ``F`` frames of a later window (the motion frames)
repeat the end of the one before, so a chain of windows of ``l1, l2, ...`` frames gives ``l1 + sum(li - F)``
frames; ``w`` whole windows give ``F + w S`` where ``S = W - F``.  A window of ``l`` frames costs
``latents(l) = (l - 1) // 4 + 1`` units: Wan's VAE packs four frames into a latent, and denoising is at least
linear in latents.

A segment is one chain.  ``n`` segments with overlaps of at least ``O`` cover ``N`` frames if and only if
``sum(length - O) >= N - O`` and none that has two neighbours is shorter than ``2 O`` (three segments never
share a frame).  What a GPU gains at most in a given time is a closed form (``_Rules.gains``), so the least
makespan is found by bisection, exactly.  Then come, in this order: the fewest segments, the widest overlap,
no window that nobody needs, and what slack remains goes to the overlaps: evenly, or so that seams fall into
``pauses`` of the speech.

As ``O >= F``, one chain is never dearer than two on the same GPU; still no chain has more than
``max_windows`` windows, because InfiniteTalk's colours shift after about a minute.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from pipeline.errors import InvalidRequest
from pipeline.pauses import Ranges, place_overlaps
from pipeline.timeline import FPS

WINDOW = 81
"""Frames of a window that InfiniteTalk was trained at."""

MOTION = 9
"""Frames that a window takes over from the one before it."""

WARM_UP = 12
"""Frames at a segment's start that still leave the reference picture; the earlier segment shows them."""

MIN_OVERLAP = WARM_UP + 14
"""Frames: those of warm-up, which are dropped, and 14 to morph in."""

MAX_WINDOWS = 20
"""Windows of one chain, 58 seconds: InfiniteTalk holds its colours for about a minute."""

SHORT = 100
"""Frames below which a job goes to one GPU."""


def latents(frames: int) -> int:
    """Latents of a window of ``frames``, the unit of cost: 21 for 81 frames."""
    return (frames - 1) // 4 + 1


@dataclass(frozen=True, slots=True)
class Segment:
    """The job's frames ``[start, stop)``, one chain of ``windows`` (frames of each), for lane ``gpu``."""

    index: int
    start: int
    stop: int
    windows: tuple[int, ...]
    gpu: int
    motion: int = MOTION

    @property
    def frames(self) -> int:
        """Frames of the job in this segment."""
        return self.stop - self.start

    @property
    def rendered(self) -> int:
        """Frames that the windows give; those beyond ``frames`` are dropped at the end."""
        return _length(self.windows, self.motion)


@dataclass(frozen=True, slots=True)
class Plan:
    """The segments in order.  ``partial_windows``: the last window of a chain may be shorter."""

    total_frames: int
    segments: tuple[Segment, ...]
    window: int
    motion: int
    partial_windows: bool = True

    @property
    def overlaps(self) -> tuple[int, ...]:
        """Frames that each segment shares with the next one."""
        return tuple(left.stop - right.start for left, right in pairwise(self.segments))

    @property
    def single(self) -> float:
        """Cost of one unbroken chain, in whole windows; ``single / makespan()`` is the speed-up."""
        stride = self.window - self.motion
        before = max(0, -(-(self.total_frames - self.window) // stride))
        last = latents(_padded(self.total_frames - before * stride)) / latents(self.window)
        return before + (last if self.partial_windows else 1)

    def makespan(self, speeds: Sequence[float] | None = None) -> float:
        """Time until the last planned lane is done, where a GPU of speed 1 takes 1 for a whole window."""
        load: Counter[int] = Counter()
        for segment in self.segments:
            load[segment.gpu] += sum(map(latents, segment.windows))
        times = (n / _exact(1 if speeds is None else speeds[gpu]) for gpu, n in load.items())
        return float(max(times) / latents(self.window))

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The plan that ``to_json`` wrote.  Raises ``InvalidRequest`` if a key is missing or unknown."""
        try:
            segments = (Segment(**{**s, "windows": tuple(s["windows"])}) for s in data["segments"])
            return cls(**{**data, "segments": tuple(segments)})
        except (KeyError, TypeError) as error:
            raise InvalidRequest("plan", f"is damaged ({error})") from error


def calculate_segments(
    total_frames: int,
    gpu_count: int,
    *,
    window: int = WINDOW,
    motion: int = MOTION,
    speeds: Sequence[float] | None = None,
    overlap_frames: int | None = None,
    min_overlap: int = MIN_OVERLAP,
    max_windows: int = MAX_WINDOWS,
    partial_windows: bool = True,
    use_multi_gpu: bool = True,
    pauses: Ranges = (),
) -> Plan:
    """The fastest plan for ``total_frames`` on ``gpu_count`` GPUs, with the fewest segments that are as fast.

    ``speeds`` are relative, higher is faster, equal by default.  Overlaps have at least ``min_overlap``
    frames and are as wide as they can be for the same makespan; ``overlap_frames`` is a minimum that no
    window is rendered to widen.  A job of less than 100 frames goes to the fastest GPU, without
    ``use_multi_gpu`` every job to GPU 0; more than ``max_windows`` windows are several segments there, too.
    ``pauses`` of the speech move the overlaps, and change neither windows nor makespan.
    Raises ``InvalidRequest``.
    """
    _check(total_frames, gpu_count, window, motion)
    soft = overlap_frames is None
    overlap = min_overlap if overlap_frames is None else overlap_frames
    if not motion <= overlap < window:
        field = "min_overlap" if soft else "overlap_frames"
        raise InvalidRequest(field, f"must be {motion} to {window - 1} frames, is {overlap}")
    speeds = [1] * gpu_count if speeds is None else speeds
    if len(speeds) != gpu_count or not all(math.isfinite(speed) and speed > 0 for speed in speeds):
        raise InvalidRequest("speeds", f"must be {gpu_count} finite numbers above 0, are {list(speeds)}")
    rules = _Rules(window, motion, overlap, max_windows, latents(window) if partial_windows else 1)
    # Chains that share a GPU have at least cap / 2 windows: with this, each is long enough for two seams.
    interior = -(-(2 * overlap - motion) // rules.stride)
    if max_windows < (least := 2 * interior if interior > 1 else 1):
        raise InvalidRequest("max_windows", f"must be at least {least} for this overlap, is {max_windows}")

    lanes = range(gpu_count if use_multi_gpu else 1)
    if total_frames < SHORT or total_frames <= window:
        fastest = max(lanes, key=speeds.__getitem__)
        lanes = range(fastest, fastest + 1)
    if total_frames <= window:
        only = _padded(total_frames) if partial_windows else window
        segments: tuple[Segment, ...] = (Segment(0, 0, total_frames, (only,), lanes[0], motion),)
    else:
        ratios = {lane: _exact(speeds[lane]) for lane in lanes}
        common = math.lcm(*{ratio.denominator for ratio in ratios.values()})
        integers = {lane: int(ratio * common) for lane, ratio in ratios.items()}
        units = _fewest_units(rules, integers, total_frames - overlap)
        chains = _fewest_chains(rules, integers, units, total_frames - overlap)
        if soft and len(chains) > 1:
            overlap = _widest(chains, total_frames, rules)
        segments = _place(chains, overlap, total_frames, rules, pauses)
    return Plan(total_frames, segments, window, motion, partial_windows)


def naive_segments(total_frames: int, gpu_count: int, *, window: int = WINDOW, motion: int = MOTION) -> Plan:
    """The plan to compare with: ``N // k`` frames for each GPU, ``window // 2`` in front, whole windows.

    It is the rule of the document that this project began with: no cap, and jobs of less than 100 frames stay
    on one GPU.  A GPU for which no new frame is left gets nothing.  Raises ``InvalidRequest``.
    """
    _check(total_frames, gpu_count, window, motion)
    count = gpu_count if total_frames >= SHORT else 1
    cuts = [*(i * (total_frames // count) for i in range(count)), total_frames]
    segments: list[Segment] = []
    for gpu, (cut, stop) in enumerate(pairwise(cuts)):
        if cut < stop:
            start = max(0, cut - window // 2)
            windows = (window,) * (1 + max(0, -(-(stop - start - window) // (window - motion))))
            segments.append(Segment(len(segments), start, stop, windows, gpu, motion))
    return Plan(total_frames, tuple(segments), window, motion, partial_windows=False)


def chain_segments(
    total_frames: int,
    gpu_count: int,
    *,
    max_frames: int | None = None,
    overlap_frames: int | None = None,
    window: int = WINDOW,
    motion: int = MOTION,
    pauses: Ranges = (),
) -> Plan:
    """The fewest chains of at most ``max_frames`` (default: one chain of everything), whatever their time.

    Chains are about equally long, share at least ``overlap_frames`` (default: ``MIN_OVERLAP``), and take
    turns on the GPUs.  Raises ``InvalidRequest``.
    """
    _check(total_frames, gpu_count, window, motion)
    overlap = MIN_OVERLAP if overlap_frames is None else overlap_frames
    if not motion <= overlap < window:
        raise InvalidRequest("overlap_frames", f"must be {motion} to {window - 1} frames, is {overlap}")
    longest = _padded(total_frames)
    count = 1
    if max_frames is not None and max_frames < total_frames:
        longest = _padded(max_frames - 3)  # the last one, too, is rendered in whole latents
        if longest < (least := max(window, 2 * overlap)):
            seconds = f"{_padded(least) / FPS:g} s"
            raise InvalidRequest("max_chain_seconds", f"must be at least {seconds} for overlaps of {overlap}")
        count = -(-(total_frames - overlap) // (longest - overlap))
    rules = _Rules(window, motion, overlap, cap=0, full=latents(window))
    chains = [(i % gpu_count, _chain(longest, rules)) for i in range(count)]
    return Plan(total_frames, _place(chains, overlap, total_frames, rules, pauses), window, motion)


def _chain(frames: int, rules: _Rules) -> list[int]:
    """Windows that give so many frames, or the fewest more: whole ones, and a shorter one if need be."""
    if frames <= rules.window:
        return [_padded(frames)]
    whole, rest = divmod(frames - rules.motion, rules.stride)
    return [rules.window] * whole + ([_padded(rest + rules.motion)] if rest else [])


_Chain = tuple[int, list[int]]
"""A lane and the windows of a segment that has no place yet."""


@dataclass(frozen=True, slots=True)
class _Rules:
    """``cap``: most windows of a chain.  ``full``: units of a whole window, 1 if all are whole."""

    window: int
    motion: int
    overlap: int
    cap: int
    full: int

    @property
    def stride(self) -> int:
        return self.window - self.motion

    @property
    def capped(self) -> int:
        """Gain of a chain of ``cap`` windows: its frames less one overlap."""
        return self.motion + self.cap * self.stride - self.overlap

    def partial(self, units: int) -> int:
        """New frames of a last window of ``units`` latents; 0 when it is too short for any."""
        return max(0, 4 * units - 3 - self.motion)

    def gains(self, units: int) -> tuple[int, int]:
        """What one GPU gains at most: the number of capped chains, and the gain of one more chain or 0.

        A chain costs ``overlap - motion`` frames, so the fewest are best.  Only when all are full to the cap,
        and units for a shorter window are left, one more may pay; they then share the whole windows.
        """
        whole, rest = divmod(units, self.full)
        chains, left = divmod(whole, self.cap)
        more = left > 0 or (chains > 0 and self.cap > 1)
        gain = self.motion + left * self.stride + self.partial(rest) - self.overlap
        return chains, max(0, gain) if more else 0

    def short(self, chains: int, gain: int) -> bool:
        """Whether the GPU's one chain is too short for two seams; a plan has two places for such chains."""
        return not chains and 0 < gain < self.overlap

    def chains(self, units: int, count: int) -> list[list[int]]:
        """The ``count`` longest chains that ``units`` are enough for, even in windows."""
        whole, rest = divmod(units, self.full)
        used = min(whole, self.cap * count)
        chains = [[self.window] * (used // count + (i < used % count)) for i in range(count)]
        if used == whole < self.cap * count and self.partial(rest):
            chains[-1].append(4 * rest - 3)
        return chains


def _fewest_units(rules: _Rules, speeds: dict[int, int], need: int) -> dict[int, int]:
    """Units of each lane in the least time in which all lanes together gain ``need`` frames."""
    kinds = Counter(speeds.values())

    def enough(time: Fraction) -> bool:
        gained, short = 0, []
        for speed, lanes in kinds.items():
            chains, gain = rules.gains(time.numerator * speed // time.denominator)
            if rules.short(chains, gain):
                short += [gain] * min(2, lanes)
            else:
                gained += lanes * (chains * rules.capped + gain)
        return gained + sum(sorted(short)[-2:]) >= need

    fastest, limit = max(kinds), rules.full
    while not enough(Fraction(limit, fastest)):
        limit *= 2
    units = bisect_left(range(limit), True, key=lambda units: enough(Fraction(units, fastest)))
    # While the fastest lane makes its last unit, every other one completes at most one.
    times = sorted({Fraction(units * speed // fastest, speed) for speed in kinds})
    times = [time for time in times if time > Fraction(units - 1, fastest)]
    least = times[bisect_left(times, True, key=enough)]
    return {lane: least.numerator * speed // least.denominator for lane, speed in speeds.items()}


def _fewest_chains(rules: _Rules, speeds: dict[int, int], units: dict[int, int], need: int) -> list[_Chain]:
    """The fewest chains that gain ``need`` frames within the units of their lanes; lanes take turns."""
    offers: list[tuple[int, Fraction, int, bool]] = []
    for lane, speed in speeds.items():
        chains, gain = rules.gains(units[lane])
        offers += [(-rules.capped, Fraction(turn, speed), lane, False) for turn in range(1, chains + 1)]
        if gain:
            offers.append((-gain, Fraction(chains + 1, speed), lane, rules.short(chains, gain)))
    counts: Counter[int] = Counter()
    ends = 2
    for loss, _, lane, short in sorted(offers):
        if need > 0 and ends >= short:
            counts[lane] += 1
            ends -= short
            need += loss
    turns = [(i, lane, c) for lane, n in counts.items() for i, c in enumerate(rules.chains(units[lane], n))]
    return [(lane, windows) for _, lane, windows in sorted(turns)]


def _widest(chains: list[_Chain], total_frames: int, rules: _Rules) -> int:
    """The widest overlap that all seams can have at once."""
    lengths = sorted(_length(windows, rules.motion) for _, windows in chains)
    share = (sum(lengths) - total_frames) // (len(chains) - 1)
    return min(rules.window - 1, share, *(length // 2 for length in lengths[2:3]))


def _place(
    chains: list[_Chain], overlap: int, total_frames: int, rules: _Rules, pauses: Ranges
) -> tuple[Segment, ...]:
    """Orders the chains, gives back what they don't need, and spreads the rest over the seams."""
    short = [chain for chain in chains if _length(chain[1], rules.motion) < 2 * overlap]
    chains = short[:1] + [chain for chain in chains if chain not in short] + short[1:]
    seams = len(chains) - 1
    needed = total_frames + seams * overlap
    _give_back([windows for _, windows in chains], overlap, needed, rules)
    lengths = [_length(windows, rules.motion) for _, windows in chains]
    slack = sum(lengths) - needed
    overlaps = [overlap] * seams

    def has_room(i: int) -> bool:
        left = i == 0 or overlaps[i - 1] + overlaps[i] < lengths[i]
        right = i == seams - 1 or overlaps[i] + overlaps[i + 1] < lengths[i + 1]
        return left and right and overlaps[i] < rules.window - 1

    while slack and (free := [i for i in range(seams) if has_room(i)]):
        count = min(slack, len(free))
        for i in (free[j * len(free) // count] for j in range(count)):
            if has_room(i):
                overlaps[i] += 1
                slack -= 1

    overlaps = place_overlaps(
        lengths, overlaps, total_frames, rules.overlap, rules.window - 1, WARM_UP, pauses
    )
    segments: list[Segment] = []
    start = 0
    for (lane, windows), length, shared in zip(chains, lengths, [*overlaps, 0], strict=True):
        stop = min(total_frames, start + length)
        segments.append(Segment(len(segments), start, stop, tuple(windows), lane, rules.motion))
        start = stop - shared
    return tuple(segments)


def _give_back(chains: list[list[int]], overlap: int, needed: int, rules: _Rules) -> None:
    """Takes windows, then latents, from the chains as long as together they have ``needed`` frames."""
    lengths = [_length(windows, rules.motion) for windows in chains]
    slack = sum(lengths) - needed
    least = [max(rules.window, 2 * overlap)] * len(chains)
    least[0] = least[-1] = rules.window
    # The shorter a window, the greater its share of motion frames, which are rendered twice: those first.
    order = sorted(range(len(chains)), key=lambda i: (chains[i][-1], -lengths[i]))
    while order:
        again = []
        for i in order:
            frames = chains[i][-1] - rules.motion
            if len(chains[i]) > 1 and frames <= min(slack, lengths[i] - least[i]):
                chains[i].pop()
                lengths[i] -= frames
                slack -= frames
                again.append(i)
        order = again
    for i, windows in enumerate(chains):
        if rules.full > 1 and len(windows) > 1:
            last = _padded(windows[-1] - min(slack, lengths[i] - least[i]))
            slack -= windows[-1] - last
            windows[-1] = last


def _exact(speed: float) -> Fraction:
    """0.7 as 7/10, not as the binary fraction next to it: times that are equal have to compare as equal."""
    return Fraction(str(speed))


def _length(windows: Sequence[int], motion: int) -> int:
    """Frames that a chain gives."""
    return sum(windows) - motion * (len(windows) - 1)


def _padded(frames: int) -> int:
    """The least window, ``4 k + 1``, that holds ``frames``."""
    return 4 * -(-(frames - 1) // 4) + 1


def _check(total_frames: int, gpu_count: int, window: int, motion: int) -> None:
    for field, value in (("total_frames", total_frames), ("gpu_count", gpu_count)):
        if value < 1:
            raise InvalidRequest(field, f"must be at least 1, is {value}")
    if window < 5 or window % 4 != 1:
        raise InvalidRequest("window", f"must be 4 k + 1 frames from 5 up, is {window}")
    if not 1 <= motion < window:
        raise InvalidRequest("motion", f"must be 1 to {window - 1} frames, is {motion}")
