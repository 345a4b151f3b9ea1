"""Long videos: skim the whole, then look closely where something happens.

With 32 frames spread over half an hour, an event of one second is seen with a chance of two percent, and no training mends
a frame that was never sampled. So the whole video is decoded once, small, at about two frames a second, and a curve says
where something comes and goes. The highest moments of the curve get *windows*: a few seconds each, dense, at full
resolution. What lies between them is shown as sparse *context* at a lower resolution. `share_out` divides one budget of
visual tokens among them.

    seconds    0 ........ 412 .......................... 1207 ............ 1800
    curve      ____________/\\____________________________/\\_______________
    shown      .    .    .||||.     .     .     .     .  |||| .    .    .        | window   . context

Where nothing stands out, frames are sampled uniformly, and the look says so.

In training, windows are laid at the key spans, jittered, and some where nothing happens (decoys): that there is a window
must not give away that there is an event.
"""

import math
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.files import ClipError
from data.motion import motion_evidence
from data.video import Clip, Folder, Footage, Frames, Video, part_of, read_clip, read_moments, sample, sample_times, scan

SIDE = 64  # of a skimmed picture, in pixels
LONG = 120.0  # seconds: from here on, a process of FFmpeg's and a scan of the packets cost less than they save


@dataclass
class Skim:
    """How a long video is looked at. windows: K, at most; seconds: w, of each; fps: frames a second of the skim;
    window_fps: of a window, at most. context: share of the tokens that is kept for what lies between. at_key_spans: lay
    windows at the clip's key spans, and decoys elsewhere (training)."""

    windows: int = 4
    seconds: float = 2.0
    fps: float = 2.0
    window_fps: float = 8.0
    context: float = 0.25
    at_key_spans: bool = False


@dataclass(kw_only=True)
class FrameSettings:
    """Which frames of a clip are shown: settings of both train scripts and of eval.py."""

    frames: Literal["uniform", "skim"] = "uniform"
    """skim: look at a long video once, small, and then closely where something happens; see docs/long-videos.md."""
    visual_tokens: int | None = None
    """Visual tokens of a clip, at most, shared out among windows and what lies between (default: those of the frames)."""
    windows: int = 4
    """--frames skim: moments looked at closely, at most."""
    window_seconds: float = 2.0
    """--frames skim: seconds of each."""
    window_fps: float = 8.0
    """--frames skim: frames a second looked at in a window, at most."""
    skim_fps: float = 2.0
    """--frames skim: frames a second of the first look; an event that is shorter than one of them may be missed."""

    def check_frames(self) -> None:
        """Raise ValueError for what no frames can be chosen by."""
        for name in ("visual_tokens", "windows", "window_seconds", "window_fps", "skim_fps"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')}: got {value}; give a number above 0")

    def how_to_look(self, at_key_spans: bool = False) -> Skim | None:
        """How long videos are looked at; at_key_spans: in training."""
        if self.frames == "uniform":
            return None
        return Skim(self.windows, self.window_seconds, self.skim_fps, self.window_fps, at_key_spans=at_key_spans)


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


# --- The skim -----------------------------------------------------------------------------------------------------------


def skim(clip: Clip, video: Video | Folder | Footage, fps: float = 2.0, side: int = SIDE) -> tuple[Tensor, list[float]]:
    """A clip's part, decoded once and small: pictures (N, C, h, w) uint8, and their seconds from the part's beginning."""
    unseen, duration = part_of(clip, video)
    count = max(2, round((duration - unseen) * min(fps, video.fps)))
    times = [unseen + t for t in sample_times(duration - unseen, count)]
    if isinstance(video, Video) and duration > LONG and shutil.which("ffmpeg"):
        pixels = skim_with_ffmpeg(clip, video, unseen, duration, count, side)
        if pixels is not None:
            return pixels, times
    frames = read_moments(clip, video, times, duration, 1, 1.0, side)
    return frames.pixels, times


def skim_with_ffmpeg(clip: Clip, video: Video, unseen: float, duration: float, count: int, side: int) -> Tensor | None:
    """`count` pictures at even steps, by FFmpeg's own program; None if it does not give them.

    It leaves out what a skim does not need: frames on which no other is built (B-frames: two in three of usual H.264), or,
    where key frames come often enough, all but those; and the filter that smooths block edges. It makes pictures small
    while it decodes, so that no large one is kept.
    """
    picture = read_moments(clip, video, [unseen], duration, 1, 1.0, side).pixels
    height, width = picture.shape[-2:]
    step = (duration - unseen) / count
    keys = scan(video).keys
    often = len(keys) > 1 and float(keys.diff().max()) <= step
    begin, rate = clip.start + unseen, 1 / step
    command = [
        "ffmpeg", "-v", "error", "-nostdin", "-threads", "0", "-skip_frame", "nokey" if often else "noref",
        "-skip_loop_filter", "all", *(["-ss", f"{begin:.3f}"] if begin > 0 else []), "-i", str(video.path),
        "-map", f"0:{video.decoder.stream_index}", "-t", f"{duration - unseen:.3f}", "-an", "-sn",
        "-vf", f"fps={rate:.9f}:start_time=0,scale={width}:{height}:flags=area", "-pix_fmt", "rgb24", "-f", "rawvideo", "-",
    ]  # fmt: skip
    pictures, num = np.empty((count, height, width, 3), np.uint8), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            while num < count and process.stdout.readinto(memoryview(pictures[num]).cast("B")) == pictures[num].nbytes:
                num += 1
        finally:
            process.kill()
    if num < 0.9 * count:  # it knows the file less well than torchcodec does
        return None
    pictures[num:] = pictures[num - 1]
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def motion_curve(pixels: Tensor, times: Sequence[float], reach: float = 2.0, chunk: int = 512) -> Tensor:
    """Evidence (N,) that something comes and goes at each skimmed picture, see `motion_evidence`.

    Taken in chunks that overlap by the reach, so that hours need no more memory than minutes.
    """
    step = (times[-1] - times[0]) / max(1, len(times) - 1) or 1.0
    lag = max(1, round(reach / step))
    curve = torch.zeros(len(pixels))
    for begin in range(0, len(pixels), chunk):
        low, high = max(0, begin - lag), min(len(pixels), begin + chunk + lag)
        found = motion_evidence(pixels[low:high], times[low:high], reach).curve
        curve[begin : begin + chunk] = found[begin - low :][:chunk]
    return curve


def choose_windows(
    curve: Tensor, times: Sequence[float], num: int, seconds: float, duration: float, contrast: float = 1.5
) -> list[list[float]]:
    """The `num` highest moments of a curve, at least `seconds` apart, as windows [start, end], the highest first.

    curve, times (N,). Empty where nothing stands out: the highest evidence is below `contrast` times the median. A window
    lies around the middle of what is high near its peak, inside [0, duration].

    >>> choose_windows(torch.tensor([0., 0, 9, 0, 0, 0, 5, 0]), range(8), 2, 2.0, 8.0)
    [[1.0, 3.0], [5.0, 7.0]]
    >>> choose_windows(torch.ones(8), range(8), 2, 2.0, 8.0)
    []
    """
    at, windows = torch.tensor([float(t) for t in times]), []
    left = curve.clone()
    if not len(curve) or duration <= seconds or float(curve.max()) <= contrast * float(curve.median()) + 1e-3:
        return []
    while len(windows) < num and float(left.max()) > 0:
        peak = int(left.argmax())
        near = ((at - at[peak]).abs() <= seconds / 2) & (left > 0)
        middle = float((at * left * near).sum() / (left * near).sum())
        start = min(max(0.0, middle - seconds / 2), duration - seconds)
        left[(at - at[peak]).abs() < seconds] = 0.0
        if all(abs(start - other) >= seconds for other, _ in windows):
            windows.append([start, start + seconds])
    return windows


def lay_windows(
    spans: Sequence[Sequence[float]], num: int, seconds: float, duration: float, rng: np.random.Generator
) -> list[list[float]]:
    """Windows of training: at key spans, each at a random place inside or around, and decoys where nothing happens.

    At most num - 1 spans get a window, so that one decoy is left at least, if there is room for one. Key windows come
    first.
    """
    windows: list[list[float]] = []

    def is_free(start: float) -> bool:
        return all(abs(start - other) >= seconds for other, _ in windows)

    spans = [list(span) for span in dict.fromkeys(tuple(span) for span in spans)]
    for i in rng.permutation(len(spans))[: max(1, num - 1)]:
        low, high = sorted((spans[i][1] - seconds, spans[i][0]))
        start = float(np.clip(rng.uniform(low, high), 0, duration - seconds))
        if is_free(start):
            windows.append([start, start + seconds])
    for start in rng.uniform(0, duration - seconds, 50 * num).tolist():
        nothing = all(start >= end or start + seconds <= begin for begin, end in spans)
        if len(windows) < num and nothing and is_free(start):
            windows.append([start, start + seconds])
    return windows


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


def shake(
    windows: Sequence[Sequence[float]], seconds: float, duration: float, rng: np.random.Generator
) -> list[list[float]]:
    """Windows moved by up to a quarter of their length; those that would meet an earlier one stay away from it."""
    moved: list[list[float]] = []
    for start, _ in windows:
        start = float(np.clip(start + rng.uniform(-0.25, 0.25) * seconds, 0, duration - seconds))
        if all(abs(start - other) >= seconds for other, _ in moved):
            moved.append([start, start + seconds])
    return moved


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
