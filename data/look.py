"""What is shown of a clip: windows where something happens, context between them, and one budget for both.

`look` chooses and reads the frames of a clip. Without a skim they are sampled uniformly, as one run of frames. With one,
data/skim.py says where to look, `share_out` divides the visual tokens, and there are several runs: windows at full
resolution, context at half of it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import vp
from data.decode import Video, scan
from data.files import ClipError
from data.skim import LONG, SIDE, Skim, choose_windows, lay_windows, motion_curve, shake, skim
from data.video import Clip, Folder, Footage, Frames, part_of, read_clip, read_moments, sample, sample_times


@dataclass
class Look:
    """What is shown of a clip: runs of frames of one size each, in time order.

    windows (S,): of each slot, the number of its window, counted in time order from 1, or 0 for context. last: the second
    at which each slot ends (None: where the next begins). spans: [start, end] of the windows in seconds, the highest
    first. times, curve (N,): the skim's seconds and their evidence. slots: key slots (S,) that a finder has found before.
    sized: the pictures have the sizes in which the model sees them. note: how the frames were chosen, in words.
    """

    runs: list[Frames]
    windows: Tensor | None = None
    last: list[float] | None = None
    spans: list[list[float]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    curve: Tensor | None = None
    slots: Tensor | None = None
    sized: bool = False
    note: str = "uniform sampling"

    @property
    def timestamps(self) -> list[float]:
        """Seconds of all frames, in order."""
        return [t for frames in self.runs for t in frames.timestamps]

    def as_frames(self) -> Frames:
        """All frames as pictures of one size, that of the windows, to be drawn."""
        size = max((tuple(frames.pixels.shape[-2:]) for frames in self.runs), key=math.prod)
        pixels = torch.cat([resize(frames.pixels, size) for frames in self.runs])
        return replace(self.runs[0], pixels=pixels, timestamps=self.timestamps)

    def highest(self) -> Frames:
        """The frames of the highest window."""
        number = sorted(self.spans).index(self.spans[0]) + 1
        return self.runs[self.run_numbers().index(number)]

    def run_numbers(self) -> list[int]:
        """The window that each run belongs to, 0 for context."""
        if self.windows is None:
            return [0] * len(self.runs)
        numbers, at = [], 0
        step = len(self.timestamps) // len(self.windows)
        for frames in self.runs:
            numbers.append(int(self.windows[at]))
            at += len(frames.timestamps) // step
        return numbers


def twin_sources(key_slots: Tensor, windows: Tensor | None = None) -> Tensor | None:
    """Which slot the twin shows in each place, see `vp.twin_sources`, also of a video that was skimmed.

    windows (S,): see `Look`. Slots of windows and of the context differ in size, so a key slot is shown as the nearest one
    of its own window, or of the context. A window of nothing but key slots is shown as the nearest other window, slot for
    slot.

    >>> windows = torch.tensor([0, 1, 1, 0, 2, 2])
    >>> twin_sources(torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.bool), windows).tolist()
    [3, 4, 5, 3, 4, 5]
    """
    if windows is None or not key_slots.any():
        return vp.twin_sources(key_slots)
    place = torch.arange(len(key_slots))
    source = place.clone()
    for window in windows[key_slots].unique().tolist():
        own = windows == window
        lost, kept = place[own & key_slots], place[own & ~key_slots]
        if len(kept):  # as in vp.twin_sources, among the slots of one size
            source[lost] = kept[(lost[:, None] - kept[None, :]).abs().argmin(1)]
            continue
        others = place[(windows > 0) & ~own & ~key_slots] if window else lost[:0]
        if not len(others):
            return None
        nearest = windows[others[(others - lost.float().mean()).abs().argmin()]]
        shown = others[windows[others] == nearest]
        source[lost] = shown[torch.arange(len(lost)) * len(shown) // len(lost)]
    return source


# --- The budget ---------------------------------------------------------------------------------------------------------


@dataclass
class Shares:
    """How a budget of visual tokens is shared out: slots of each window, of which there are `windows`, and of each of the
    gaps before, between and behind them, in time order. tokens: what they take together."""

    windows: int
    window_slots: int
    gap_slots: list[int]
    tokens: int


def share_out(
    budget: int, starts: Sequence[float], seconds: float, duration: float, dense: int, full: int, small: int,
    context: float = 0.25, most: int | None = None,
) -> Shares:  # fmt: skip
    """Share a budget of visual tokens out among windows and the context between them.

    starts: of the windows, the most important first; seconds: of each; dense: slots of a window, at most; full, small:
    tokens of a slot in a window and of the context; context: share of the budget that is kept for the context; most: slots
    of the context, at most.

    Windows come first, densely: one that would get less than half of `dense` is given up for the others. What they leave
    goes to the gaps, by their length. Never more than the budget. Raises ValueError where it does not pay for one slot of
    one window.

    >>> share_out(100, [10.0, 50.0], 2.0, 60.0, dense=8, full=4, small=1)
    Shares(windows=2, window_slots=8, gap_slots=[7, 24, 5], tokens=100)
    """
    if budget < full:
        raise ValueError(
            f"--visual-tokens {budget}: one window of this video takes {full} tokens or more; raise it, or lower "
            "--max-pixels"
        )
    num, kept = len(starts), budget - int(context * budget)
    while num > 1 and kept // (num * full) < (dense + 1) // 2:
        num -= 1
    slots = min(dense, max(1, kept // (num * full)))
    left = (budget - num * slots * full) // small
    left = left if most is None else min(left, most)
    edges = [0.0, *(x for start in sorted(starts[:num]) for x in (start, start + seconds)), duration]
    gaps = [max(0.0, b - a) for a, b in zip(edges[::2], edges[1::2])]
    gap_slots = divide(left, gaps)
    return Shares(num, slots, gap_slots, num * slots * full + sum(gap_slots) * small)


def divide(count: int, lengths: Sequence[float]) -> list[int]:
    """`count` things among places of some lengths, in proportion, by the largest remainder; none where all are 0.

    >>> divide(5, [1.0, 1.0, 0.0, 2.0])
    [1, 1, 0, 3]
    """
    total = sum(lengths)
    if total <= 0:
        return [0] * len(lengths)
    exact = [count * length / total for length in lengths]
    whole = [math.floor(x) for x in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in by_rest[: count - sum(whole)]:
        whole[i] += 1
    return whole


# --- What is shown ------------------------------------------------------------------------------------------------------


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures (F, C, H, W) uint8 of a size (height, width), made as the models' processors make them."""
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True)


@dataclass
class Sizes:
    """Pictures as a model sees them: (height, width) of windows and of the context, and the tokens of a slot of each."""

    full: tuple[int, int]
    small: tuple[int, int]
    full_tokens: int
    small_tokens: int


def look(
    clip: Clip, how: Skim | None, sizes_of: Callable[[int, int], Sizes], frames_per_slot: int, max_frames: int,
    fps: float | None = None, budget: int | None = None, rng: np.random.Generator | None = None,
    jitter: bool = False, find: Callable[[Tensor, Sequence[float]], Tensor] = motion_curve, side: int = SIDE,
) -> Look:  # fmt: skip
    """Choose what is shown of a clip, and read it.

    how: None for uniform sampling. sizes_of(height, width): how the model sees such pictures. budget: visual tokens, at
    most (default: those of max_frames frames). rng: of jitter, if asked, and of windows that are laid at key spans.
    find(pictures, seconds) -> (N,): the curve, from pictures of `side` pixels. Raises ClipError, also where the budget
    does not pay for one window.
    """

    def choose(video: Video | Folder | Footage) -> Look:
        unseen, duration = part_of(clip, video)
        seen = duration - unseen
        draw, sizes = rng if jitter else None, None
        if how is not None or budget is not None:
            first = read_moments(clip, video, [unseen], duration, 1, 1.0)
            sizes = sizes_of(*first.pixels.shape[-2:])
            tokens = -(-max_frames // frames_per_slot) * sizes.full_tokens if budget is None else budget
            whole = tokens // sizes.full_tokens * frames_per_slot  # frames that a look at the whole clip can have
            if not whole:
                raise ValueError(
                    f"--visual-tokens {budget}: one slot of this video takes {sizes.full_tokens} tokens; raise it, or "
                    "lower --max-pixels"
                )

        def uniform(count: int, rate: float | None = None, note: str = "uniform sampling") -> Look:
            least = None if budget is None else min(count, 2 * frames_per_slot)
            frames = sample(clip, video, count, rate, draw, frames_per_slot, None, 0.5, least)
            if sizes is not None:
                frames.pixels = resize(frames.pixels, sizes.full)
            return Look([frames], sized=sizes is not None, note=note)

        if how is None:
            return uniform(max_frames if budget is None else min(max_frames, whole), fps)
        if seen <= how.seconds or whole >= seen * min(how.window_fps, video.fps):
            note = "uniform sampling: it is short enough to be looked at closely as a whole"
            return uniform(whole, how.window_fps, note)
        times, curve = [], None
        if how.at_key_spans and clip.key_spans:
            spans = [[a, min(b, duration)] for of_keyword in clip.key_spans for a, b in of_keyword]
            windows = lay_windows(spans, how.windows, how.seconds, duration, rng)
        else:
            pixels, times = skim(clip, video, how.fps, side)
            curve = find(pixels, times)
            windows = choose_windows(curve, times, how.windows, how.seconds, duration)
            if windows and jitter:
                windows = shake(windows, how.seconds, duration, rng)
        if not windows:
            found = uniform(whole, note="uniform sampling: nothing stands out")
            found.times, found.curve = times, curve
            return found
        dense = max(1, int(how.seconds * min(how.window_fps, video.fps)) // frames_per_slot)
        sparse = int(seen * min(how.fps, video.fps)) // frames_per_slot  # no denser than the skim
        shares = share_out(
            tokens, [start for start, _ in windows], how.seconds, duration, dense, sizes.full_tokens, sizes.small_tokens,
            how.context, sparse,
        )  # fmt: skip
        found = read_shares(clip, video, windows[: shares.windows], shares, sizes, frames_per_slot, unseen, duration, draw)
        found.times, found.curve = times, curve
        found.note = f"{shares.windows} windows of {how.seconds:g} s, {shares.tokens} of {tokens} visual tokens"
        return found

    try:
        return read_clip(clip, choose)
    except ValueError as error:
        if isinstance(error, ClipError):
            raise
        raise ClipError(f"{clip.where}: {clip.video}: {error}") from None


def read_shares(
    clip: Clip, video: Video | Folder | Footage, windows: Sequence[Sequence[float]], shares: Shares, sizes: Sizes,
    frames_per_slot: int, unseen: float, duration: float, rng: np.random.Generator | None,
) -> Look:  # fmt: skip
    """Read windows and context, run by run in time order."""
    keys = None
    if isinstance(video, Video) and duration > LONG:
        keys = scan(video).keys - video.zero - clip.start
    runs, numbers, last = [], [], []

    def read(begin: float, end: float, slots: int, size: tuple[int, int], number: int) -> None:
        count = slots * frames_per_slot
        if not count or end <= begin:
            return
        step = (end - begin) / count
        moments = [begin + t for t in sample_times(end - begin, count, rng)]
        if keys is not None and not number:
            moments = snap(moments, keys, step / 2)
        pixels, timestamps = [], []
        for i in range(0, count, frames_per_slot):  # one slot at a time: large pictures are made small at once
            some = read_moments(clip, video, moments[i : i + frames_per_slot], duration, frames_per_slot, step)
            pixels.append(resize(some.pixels, size))
            timestamps += some.timestamps
        runs.append(Frames(torch.cat(pixels), timestamps, video.fps, duration, step))
        numbers.extend([number] * slots)
        begins = timestamps[::frames_per_slot]
        last.extend([*begins[1:], max(end, begins[-1] + 1e-3)])

    at = unseen
    for number, ((start, end), before) in enumerate(zip(sorted(windows), shares.gap_slots), 1):
        read(at, start, before, sizes.small, 0)
        read(max(start, unseen), end, shares.window_slots, sizes.full, number)
        at = end
    read(at, duration, shares.gap_slots[-1], sizes.small, 0)
    return Look(runs, torch.tensor(numbers), last, [list(window) for window in windows], sized=True)


def snap(moments: Sequence[float], keys: Tensor, most: float) -> list[float]:
    """Moments moved to the nearest key frame, if it is nearer than `most`: such a frame is decoded without any other.

    >>> snap([1.0, 5.0], torch.tensor([0.0, 4.5, 9.0]), 0.75)
    [1.0, 4.501]
    """
    found = []
    for moment in moments:
        key = float(keys[(keys - moment).abs().argmin()]) if len(keys) else math.inf
        found.append(key + 0.001 if abs(key - moment) < most else moment)
    return found
