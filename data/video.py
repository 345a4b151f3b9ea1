"""Videos of clips: where frames are sampled, and how they are read from a file, a folder of pictures, or among other clips.

Seconds are those of a player, from the beginning of a clip's part. data/decode.py decodes files.
"""

import bisect
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.decode import Cut, Damage, Shown, Video, decode, open_video, resize
from data.files import ClipError

T = TypeVar("T")
PROMPT = "Describe the video."


@dataclass
class Clip:
    """One checked line of an annotation file. `where` is "file:line", for messages."""

    video: Path
    caption: str
    where: str
    prompt: str = PROMPT
    start: float = 0.0
    end: float | None = None
    keywords: list[str] = field(default_factory=list)
    key_spans: list[list[list[float]]] | None = None
    truth: dict | None = None
    frames_per_second: float | None = None  # if `video` is a folder of frames, 00001.jpg and on
    footage: list["Clip"] = field(default_factory=list)  # other clips shown around it
    before: int = 0  # how many of them before it


@dataclass
class Frames:
    """Sampled frames: pixels (F, C, H, W) uint8, F a multiple of the slot's frames; timestamps (F,) s from the part's
    beginning; the video's average frames a second; the part's duration in s; seconds from one sampled frame to the next
    (default: the duration shared out among them)."""

    pixels: Tensor
    timestamps: list[float]
    fps: float
    duration: float
    seconds_per_frame: float | None = None

    def seconds_per_slot(self, frames_per_slot: int) -> float:
        """Seconds from slot to slot, for positions. A frame that is repeated to fill up the last slot takes no time."""
        return frames_per_slot * (self.seconds_per_frame or self.duration / len(self.timestamps))


def sample_times(duration: float, count: int, rng: np.random.Generator | None = None, place: float = 0.5) -> list[float]:
    """One moment in each of `count` equal parts of [0, duration): at `place` in each, or, with rng, anywhere.

    >>> sample_times(2.0, 4), sample_times(2.0, 4, place=0.0)
    ([0.25, 0.75, 1.25, 1.75], [0.0, 0.5, 1.0, 1.5])
    """
    places = np.full(count, place) if rng is None else rng.uniform(0.02, 0.98, count)
    return ((np.arange(count) + places) * (duration / count)).tolist()


def read_frames(
    clip: Clip,
    max_frames: int,
    fps: float | None = None,
    rng: np.random.Generator | None = None,
    frames_per_slot: int = 2,
    side: int | None = None,
    place: float = 0.5,
    min_frames: int | None = None,
) -> Frames:
    """Decode the sampled frames of a clip, a video file or a folder of frames, and no others.

    At most max_frames, uniform over the part, at `place` in their shares (0.5: the middles); with fps, that many a
    second. If the first picture comes after the part's beginning, moments are those from it on: a player shows nothing
    before. With rng, each moment is jittered inside its share. With side, pictures are made that small, on their longer
    side, while they are decoded. An odd count is filled up to whole slots by showing the last frame again.
    Raises ClipError with the reason if there are not min_frames (default: two slots) frames, if a key span lies behind
    the end, or if the frames cannot be had.
    """
    return read_clip(
        clip, lambda video: sample(clip, video, max_frames, fps, rng, frames_per_slot, side, place, min_frames)
    )  # fmt: skip


def read_clip(clip: Clip, read: Callable[["Video | Folder | Footage"], T]) -> T:
    """What `read` makes of a clip's video, which is opened for it. Raises ClipError with the reason if it cannot."""
    path = clip.video
    if not path.exists():
        raise ClipError(f"{clip.where}: {path}: no such file")
    if not path.is_file() and not (path.is_dir() and clip.frames_per_second):
        advice = "; for a folder of numbered pictures give 'frames_per_second'" * path.is_dir()
        raise ClipError(f"{clip.where}: {path}: not a regular file{advice}")
    if path.is_file() and path.stat().st_size == 0:
        raise ClipError(f"{clip.where}: {path}: the file is empty")
    try:
        video = open_footage(clip) if clip.footage else open_clip(clip)
        for _ in range(3):
            try:
                return read(video)
            except Cut as cut:  # pictures at the file's ends cannot be decoded: sample between them
                video.begin, video.stop = cut.begin, cut.stop
        raise Damage("damaged at its ends")
    except (Damage, OSError) as error:
        raise ClipError(f"{clip.where}: {path}: {error}") from None


def sample(
    clip: Clip,
    video: "Video | Folder | Footage",
    max_frames: int,
    fps: float | None,
    rng: np.random.Generator | None,
    frames_per_slot: int,
    side: int | None,
    place: float,
    min_frames: int | None,
) -> Frames:
    """Choose moments of an open video, and read its frames at them; see read_frames."""
    unseen, duration = part_of(clip, video)
    available, least = max(1, round((duration - unseen) * video.fps)), min_frames or 2 * frames_per_slot
    if available < least:
        raise ClipError(f"{clip.where}: {clip.video}: too short: {available} frame(s); need {least}")
    count = min(max_frames, available)
    if fps is not None:
        count = min(count, max(2 * frames_per_slot, round((duration - unseen) * fps)))
    times = [unseen + t for t in sample_times(duration - unseen, count, rng, place)]
    if place == 0 and rng is None:  # where a frame begins: a little later, or rounding would show the frame before
        times = [t + 0.02 / video.fps for t in times]
    return read_moments(clip, video, times, duration, frames_per_slot, (duration - unseen) / count, side)


def open_clip(clip: Clip) -> "Video | Folder | Footage":
    """A clip's video, opened. Raises Damage."""
    return open_folder(clip.video, clip.frames_per_second) if clip.video.is_dir() else open_video(clip.video)


def part_of(clip: Clip, video: "Video | Folder | Footage") -> tuple[float, float]:
    """Of a clip's part of an open video: the seconds before its first picture, and its duration.

    Raises ClipError if there is no such part, or if a key span lies behind its end.
    """
    if isinstance(video, Footage):
        return 0.0, video.stop
    path = clip.video
    duration = min(video.stop, clip.end if clip.end is not None else math.inf) - clip.start
    if duration <= 0:
        raise ClipError(f"{clip.where}: field 'start': {clip.start:g} s, but {path} lasts {video.stop:.2f} s")
    for span in itertools.chain.from_iterable(clip.key_spans or []):
        if span[0] >= duration:
            raise ClipError(f"{clip.where}: field 'key_spans': found {span}, but the clip lasts {duration:.2f} s")
    unseen = max(0.0, video.begin - clip.start)  # before the first picture
    if unseen >= duration:
        raise Damage(f"the first picture comes at {video.begin:.2f} s, behind the part's end")
    return unseen, duration


def read_moments(
    clip: Clip, video: "Video | Folder | Footage", times: Sequence[float], duration: float, frames_per_slot: int,
    seconds_per_frame: float, side: int | None = None,
) -> Frames:  # fmt: skip
    """The frames of an open video that are shown at some seconds from the beginning of a clip's part, in whole slots."""
    if isinstance(video, Footage):
        return video.read(times, frames_per_slot, seconds_per_frame, side)
    times = [clip.start + t for t in times]
    shown = read_pictures(video, times, side) if isinstance(video, Folder) else decode(video, times, side)
    pixels, timestamps = shown.pixels, (shown.begins - clip.start).clamp(min=0).tolist()
    if pad := -len(pixels) % frames_per_slot:
        pixels = torch.cat([pixels, pixels[-1:].expand(pad, -1, -1, -1)])
        timestamps += timestamps[-1:] * pad
    return Frames(pixels, timestamps, video.fps, duration, seconds_per_frame)


# --- Clips one after another ---------------------------------------------------------------------------------------------


@dataclass
class Footage:
    """Clips one after another as one video, with pictures of the size of clip number `own`. begins: of each, in seconds."""

    clips: list[Clip]
    videos: list["Video | Folder | Footage"]
    begins: list[float]
    stop: float
    own: int
    begin: float = 0.0
    sizes: dict[int | None, tuple[int, int]] = field(default_factory=dict)  # by `side`

    @property
    def fps(self) -> float:
        """Pictures a second, of the own clip."""
        return self.videos[self.own].fps

    def read(self, times: Sequence[float], frames_per_slot: int, seconds_per_frame: float, side: int | None) -> Frames:
        """See `read_moments`."""
        if side not in self.sizes:
            own, video = self.clips[self.own], self.videos[self.own]
            unseen, duration = part_of(own, video)
            self.sizes[side] = tuple(read_moments(own, video, [unseen], duration, 1, 1.0, side).pixels.shape[-2:])
        number = [max(0, bisect.bisect_right(self.begins, t) - 1) for t in times]
        pixels, timestamps = [], []
        for n, some in itertools.groupby(zip(number, times), key=lambda pair: pair[0]):
            clip, video, begin = self.clips[n], self.videos[n], self.begins[n]
            unseen, duration = part_of(clip, video)
            moments = [min(max(t - begin, unseen), duration) for _, t in some]
            shown = read_moments(clip, video, moments, duration, 1, seconds_per_frame, side)
            if tuple(shown.pixels.shape[-2:]) != self.sizes[side]:
                small = F.interpolate(shown.pixels.float(), size=self.sizes[side], mode="bilinear", antialias=True)
                shown.pixels = small.round().byte()
            pixels.append(shown.pixels)
            timestamps += [begin + t for t in shown.timestamps]
        if pad := -len(timestamps) % frames_per_slot:
            pixels.append(pixels[-1][-1:].expand(pad, -1, -1, -1))
            timestamps += timestamps[-1:] * pad
        return Frames(torch.cat(pixels), timestamps, self.fps, self.stop, seconds_per_frame)


def open_footage(clip: Clip) -> Footage:
    """A clip among the others of its footage. Raises Damage."""
    clips = [*clip.footage[: clip.before], replace(clip, footage=[], before=0), *clip.footage[clip.before :]]
    videos = [open_clip(c) for c in clips]
    lengths = [part_of(c, v)[1] for c, v in zip(clips, videos)]
    begins = [0.0, *itertools.accumulate(lengths)]
    return Footage(clips, videos, begins[:-1], begins[-1], clip.before)


# --- A folder of numbered pictures ---------------------------------------------------------------------------------------


@dataclass
class Folder:
    """A folder of numbered pictures as a video."""

    pictures: list[Path]
    fps: float
    begin: float = 0.0

    @property
    def stop(self) -> float:
        """When the last picture ends."""
        return len(self.pictures) / self.fps


def list_frames(folder: Path) -> list[Path]:
    """The frames of a folder, in the order of their numbers: 00001.jpg, 00002.jpg and on."""
    numbered = [p for p in folder.iterdir() if p.stem.isdecimal() and p.suffix.lower() in (".jpg", ".jpeg", ".png")]
    return sorted(numbered, key=lambda p: int(p.stem))


def open_folder(path: Path, fps: float) -> Folder:
    """A folder as a video."""
    pictures = list_frames(path)
    if not pictures:
        raise Damage("no picture called by a number, like 00001.jpg, is in it")
    return Folder(pictures, fps)


def check_picture_size(path: Path) -> None:
    """Raise Damage for a picture of more than 179 million pixels, by its header: decoding it would fill the memory."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path):
            pass
    except Image.DecompressionBombError:
        raise Damage(f"{path.name} has too many pixels, more than 179 million; scale it down") from None
    except (OSError, ValueError, SyntaxError):
        return  # no picture: the decoder says so


def read_pictures(folder: Folder, times: Sequence[float], side: int | None) -> Shown:
    """The pictures of a folder at some moments."""
    from torchvision.io import ImageReadMode, decode_image

    at = [min(int(t * folder.fps), len(folder.pictures) - 1) for t in times]
    pixels = []
    for k in at:
        check_picture_size(folder.pictures[k])
        try:
            picture = decode_image(str(folder.pictures[k]), ImageReadMode.RGB, apply_exif_orientation=True)
        except RuntimeError:
            raise Damage(f"{folder.pictures[k].name} cannot be decoded: no picture, or damaged") from None
        if pixels and picture.shape != pixels[0].shape:
            raise Damage(f"{folder.pictures[k].name} has another size than {folder.pictures[at[0]].name}")
        pixels.append(picture)
    return Shown(resize(torch.stack(pixels), (1.0, 1.0), side), torch.tensor(at, dtype=torch.float64) / folder.fps)
