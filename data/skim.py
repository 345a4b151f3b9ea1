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

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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


def frames_to_skip(video: Video, step: float) -> str:
    """The most that FFmpeg may leave out of a file and still show a new picture every `step` seconds; a value of its
    -skip_frame.

    nokey: all but key frames. bidir: B-frames; of H.264 only, where frames that are built on them come out a little wrong,
    which the curve hardly notices (docs/long-videos.md). noref: frames on which no other is built.
    """

    def often(seconds: Sequence[float]) -> bool:
        return len(seconds) > 1 and float(np.diff(seconds).max()) <= step

    if often(scan(video).keys.tolist()):
        return "nokey"
    if video.decoder.metadata.codec == "h264" and shutil.which("ffprobe"):  # which not every FFmpeg brings
        command = [
            "ffprobe", "-v", "error", "-skip_frame", "bidir", "-read_intervals", "%+10",
            "-select_streams", str(video.decoder.stream_index),
            "-show_entries", "frame=best_effort_timestamp_time", "-of", "csv=p=0", str(video.path),
        ]  # fmt: skip
        shown = subprocess.run(command, capture_output=True, text=True).stdout.replace(",", " ").split()
        if often([float(second) for second in shown if second != "N/A"]):
            return "bidir"
    return "noref"


def skim_with_ffmpeg(clip: Clip, video: Video, unseen: float, duration: float, count: int, side: int) -> Tensor | None:
    """`count` pictures at even steps, by FFmpeg's own program; None if it does not give them.

    It leaves out frames that a skim does not need, and the filter that smooths block edges. It makes pictures small while
    it decodes, so that no large one is kept.

    Each core decodes a part of the file. The threads of one decoder would wait for one another: frames are built on frames.
    """
    picture = read_moments(clip, video, [unseen], duration, 1, 1.0, side).pixels
    height, width = picture.shape[-2:]
    step = (duration - unseen) / count
    skipped = frames_to_skip(video, step)
    # A file with an index can be entered anywhere.
    parts = min(os.cpu_count() or 1, int(duration / LONG)) if video.display.kind in ("mp4", "matroska") else 1
    pictures = np.empty((count, height, width, 3), np.uint8)

    def read(first: int, end: int) -> bool:
        """Read pictures first to end - 1; whether nearly all of them came."""
        begin = clip.start + unseen + first * step
        command = [
            "ffmpeg", "-v", "error", "-nostdin", "-filter_threads", "1", "-threads", "1" if parts > 1 else "0",
            "-skip_frame", skipped, "-skip_loop_filter", "all",
            *(["-ss", f"{begin:.3f}"] if begin > 0 else []), "-i", str(video.path),
            "-map", f"0:{video.decoder.stream_index}", "-t", f"{(end - first) * step:.3f}", "-an", "-sn",
            "-vf", f"fps={1 / step:.9f}:start_time=0,scale={width}:{height}:flags=area",
            "-pix_fmt", "rgb24", "-f", "rawvideo", "-",
        ]  # fmt: skip
        num = first
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            try:
                while num < end and process.stdout.readinto(memoryview(pictures[num]).cast("B")) == pictures[num].nbytes:
                    num += 1
            finally:
                process.kill()
        pictures[num:end] = pictures[num - 1]
        return num - first >= 0.9 * (end - first)

    bounds = [count * i // parts for i in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        if not all(pool.map(read, bounds, bounds[1:])):  # it knows the file less well than torchcodec does
            return None
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
