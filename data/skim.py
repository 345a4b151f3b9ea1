"""Long videos: skim the whole, then look closely where something happens.

With 32 frames spread over half an hour, an event of one second is seen with a chance of two percent, and training
cannot help with a frame that was never sampled. So the whole video is decoded once, small, at about two frames a
second, and a curve says where something comes and goes. The highest moments of the curve get *windows*: a few seconds
each, dense, at full resolution. What lies between them is shown as sparse *context* at a lower resolution. `share_out`
divides one budget of visual tokens among them.

    seconds    0 ........ 412 .......................... 1207 ............ 1800
    curve      ____________/\\____________________________/\\_______________
    shown      .    .    .||||.     .     .     .     .  |||| .    .    .        | window   . context

Where nothing stands out, frames are sampled uniformly, and the look says so.

In training, windows are laid at the key spans, jittered, and some where nothing happens (decoys): that there is a window
must not give away that there is an event.
"""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.decode import Video, scan
from data.motion import motion_evidence
from data.video import Clip, Folder, Footage, part_of, read_moments, sample_times

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
