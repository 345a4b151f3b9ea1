"""Decode the pictures of a video file that show some moments, and check that they are those that were asked for.

Seconds are those of a player: the container's start is zero, also if the first picture comes later or the file's own
clock starts elsewhere. Pictures are as a player shows them: turned, mirrored and with square pixels.

torchcodec decodes. It does not always answer rightly: in MPEG-TS, MPEG-PS and AVI with B-frames, and behind damage, it
returns one picture for many moments. So each picture's time is compared with its moment. If they differ, the pictures
are decoded one after the other, as a player does. What a player cannot show either is named as damaged.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.container import Display, is_broken, read_display

# A picture may miss its moment by this much: Matroska and FLV round to milliseconds.
TOLERANCE = 0.0015
# Pixels that are nearly square are left alone; a shape beyond the second value is no shape but a fault of the file.
NEARLY_SQUARE, MOST_STRETCHED = 0.01, 8


class Damage(Exception):
    """What is wrong with a file, in words about the file."""


@dataclass
class Cut(Exception):
    """The seconds between which pictures can be decoded, if they are not those of the packets."""

    begin: float
    stop: float


@dataclass
class Shown:
    """Pictures (F, C, H, W) uint8, the second at which each begins to show (F,), and how long it says it lasts (F,)."""

    pixels: Tensor
    begins: Tensor
    lengths: Tensor | None = None


# --- A video file --------------------------------------------------------------------------------------------------------


@dataclass
class Video:
    """An open video file. `zero` is the container's start on the file's own clock; begin and stop count from there."""

    path: Path
    decoder: object
    zero: float
    begin: float
    stop: float
    fps: float
    display: Display
    stretch: tuple[float, float]  # what makes pixels square: factors of height and width
    uneven: bool  # it has not as many pictures as its rate promises: some are lost, or last for long


def open_video(path: Path) -> Video:
    """Open a file, and find out how a player shows it."""
    from torchcodec._core import get_container_metadata  # of an open decoder: the public one opens the file again
    from torchcodec.decoders import VideoDecoder  # late: what runs on synthetic input alone needs no FFmpeg

    try:
        decoder = VideoDecoder(path, dimension_order="NHWC")
        container = get_container_metadata(decoder._decoder)
        streams = container.streams
        moving = [s for s in streams if s.media_type == "video" and (s.num_frames or 0) > 1]
        if decoder.metadata.num_frames < 2 and moving:  # a cover picture
            best = max(moving, key=lambda s: s.num_frames)
            decoder = VideoDecoder(path, dimension_order="NHWC", stream_index=best.stream_index)
    except (RuntimeError, ValueError, IndexError) as error:
        raise Damage(explain(str(error))) from None
    about = decoder.metadata
    begin, stop, fps = about.begin_stream_seconds, about.end_stream_seconds, about.average_fps
    if not fps or not about.num_frames or abs(begin) > 1e9 or not stop > begin:
        raise Damage("the file does not tell its duration; re-encode it")
    rate = about.average_fps_from_header or fps
    if abs(about.num_frames - (stop - begin) * rate - 1) < 0.1:  # the last picture's length is not told
        stop += 1 / rate
        fps = about.num_frames / (stop - begin)
    # A sound that starts below zero only primes its decoder: nobody hears it.
    sounds = [max(0.0, s.begin_stream_seconds_from_header or 0.0) for s in streams if s.media_type == "audio"]
    zero = min([begin, *sounds, *(s.begin_stream_seconds for s in moving)])
    videos = [s.stream_index for s in streams if s.media_type == "video"]
    display = read_display(path, videos.index(about.stream_index))
    uneven = display.kind not in ("mp4", "avi", "ps") and abs(about.num_frames - (stop - begin) * rate) > 0.5
    promised = container.duration_seconds_from_header or 0.0
    if display.kind in ("matroska", "flv") and promised > stop - zero + 0.5 and is_broken(path, display.kind):
        raise Damage(f"damaged: its pictures can be read up to {stop - zero:.2f} s only")
    turn = about.rotation or 0.0
    if abs(turn - 90 * round(turn / 90)) > 1 or (display.turned and about.rotation is None):
        raise Damage(f"its pictures are to be shown turned by {turn:g} degrees, which cannot be done; re-encode it")
    aspect = display.pixel_aspect or float(about.pixel_aspect_ratio or 1) or 1.0
    if not 1 / MOST_STRETCHED <= aspect <= MOST_STRETCHED:
        raise Damage(f"its pixels are said to be {aspect:g} times as wide as high, which cannot be; re-encode it")
    if abs(aspect - 1) < NEARLY_SQUARE:
        aspect = 1.0
    stretch = max(1.0, 1 / aspect), max(1.0, aspect)
    if round(turn / 90) % 2:
        stretch = stretch[::-1]
    return Video(path, decoder, zero, begin - zero, stop - zero, fps, display, stretch, uneven)


def explain(message: str) -> str:
    """What a message of torchcodec means for the file. The message itself names files and lines of a library."""
    for part, meaning in (
        ("libtorchcodec", "FFmpeg's libraries are not found; install FFmpeg 4 to 9"),
        ("Codec not found", "FFmpeg has no decoder for its codec; re-encode it"),
        ("best video stream is unknown", "no video in it"),
        ("does not support seeking", "its container has no times; put it into another: ffmpeg -i FILE FILE.mp4"),
        ("Failed to find stream info", "cannot be decoded: no video in it, or damaged"),
    ):
        if part in message:
            return meaning
    return "cannot be decoded: no video, or damaged"


def resize(pixels: Tensor, stretch: tuple[float, float], side: int | None) -> Tensor:
    """Pictures (F, C, H, W) with square pixels and, with side, at most that long on their longer side."""
    height, width = (max(1, round(n * s)) for n, s in zip(pixels.shape[-2:], stretch))
    scale = 1.0 if side is None else min(1.0, side / max(height, width))
    size = (height, width) if scale == 1 else (max(8, round(height * scale)), max(8, round(width * scale)))
    return pixels if size == pixels.shape[-2:] else F.interpolate(pixels, size=size, mode="bilinear", antialias=True)


def finish(video: Video, pixels: Tensor, side: int | None) -> Tensor:
    """Decoded pictures (F, H, W, C), which torchcodec has turned, as a player shows them: (F, C, H, W)."""
    pixels = pixels.permute(0, 3, 1, 2)
    if video.display.mirrored:  # torchcodec reads an angle only: a mirrored picture comes out turned, and never mirrored
        pixels = pixels.flip(-1 if round((video.decoder.metadata.rotation or 0.0) / 90) % 2 else -2)
    return resize(pixels, video.stretch, side)


def decode(video: Video, times: Sequence[float], side: int | None) -> Shown:
    """The pictures that a player shows at some moments, made small while they are decoded if side is given."""
    moments = torch.tensor(times, dtype=torch.float64) + video.zero
    shown = None
    if video.display.kind != "avi":  # whose packets carry no time of showing: B-frames come out late, with fitting times
        with contextlib.suppress(RuntimeError, ValueError, IndexError):
            shown = decode_at(video, moments, side)
    if shown is None or video.uneven or not is_as_asked(shown, moments):
        index = scan(video)
        if (loss := find_loss(video, index, moments)) is not None:
            raise Damage(f"damaged: what {loss - video.zero:.2f} s shows is lost")
        if shown is None or (shown.begins - index.begins[index.at(moments)]).abs().max() > TOLERANCE:
            shown = decode_in_order(video, index, moments, side)
    return Shown(shown.pixels, shown.begins - video.zero, shown.lengths)


def decode_at(video: Video, moments: Tensor, side: int | None) -> Shown:
    """What torchcodec takes for the pictures at some moments.

    With side, decoded a few at a time: only small pictures are kept, and large ones do not leave the processor's cache.
    """
    pixels, begins, lengths = [], [], []
    for part in moments.split(len(moments) if side is None else 4):
        frames = video.decoder.get_frames_played_at(part)
        pixels.append(finish(video, frames.data, side))
        begins.append(frames.pts_seconds)
        lengths.append(frames.duration_seconds)
    return Shown(pixels[0] if side is None else torch.cat(pixels).contiguous(), torch.cat(begins), torch.cat(lengths))


def is_as_asked(shown: Shown, moments: Tensor) -> bool:
    """Whether each picture begins at or before its moment and lasts beyond it."""
    late, over = shown.begins > moments + TOLERANCE, shown.begins + shown.lengths < moments - TOLERANCE
    return not (late | over).any()


# --- What the packets say, and decoding in order -------------------------------------------------------------------------


@dataclass
class Index:
    """What the packets of a file say of its pictures: when each begins (N,), in order, and how long it says it lasts (N,);
    when key frames begin (K,); the usual time from one picture to the next."""

    begins: Tensor
    lengths: Tensor
    keys: Tensor
    step: float

    def at(self, moments: Tensor) -> Tensor:
        """The number of the picture that is shown at each moment: until the next one begins."""
        return (torch.searchsorted(self.begins, moments, right=True) - 1).clamp(min=0)

    def key(self, moments: Tensor) -> Tensor:
        """When the last key frame before each moment begins; the first picture if there is none."""
        places = torch.searchsorted(self.keys, moments + TOLERANCE, right=True)
        return torch.cat([self.begins[:1], self.keys])[places]


def scan(video: Video) -> Index:
    """Read all packets of a file, without decoding them."""
    from torchcodec.decoders import Demuxer

    try:
        found = Demuxer(video.path, streams=video.decoder.stream_index).streams[0].scan()
    except (RuntimeError, ValueError) as error:
        raise Damage(explain(str(error))) from None
    begins, keys = found.pts_seconds, found.pts_seconds[found.key_frame_indices]
    step = float(begins.diff().median()) if len(begins) > 1 else 0.0
    step = step or 1 / video.fps
    # Two at nearly one moment are one picture: VP8 has packets that are not shown, MPEG-PS such without an own time.
    apart = torch.cat([torch.ones(1, dtype=torch.bool), begins.diff() > step / 4])
    return Index(begins[apart], found.duration_seconds[apart], keys, step)


def find_loss(video: Video, index: Index, moments: Tensor) -> float | None:
    """A moment for which packets are lost: its own, or some between the last key frame and it.

    Packets of MP4 and AVI stand in a table: none is lost unseen. Those of MPEG-PS have no dependable times; decoding
    tells. Lost ones of Matroska and FLV leave something that cannot be read. In MPEG-TS, which comes at a constant rate,
    a few gaps count as a loss; elsewhere, long ones do. Many gaps are a variable frame rate.
    """
    kind, gaps = video.display.kind, index.begins.diff()
    least = index.step / 2 if kind in ("matroska", "flv", "ts") else max(0.5, 2 * index.step)
    wide = gaps > index.lengths[:-1].clamp(min=index.step) + least
    if kind in ("mp4", "avi", "ps") or not wide.any():
        return None
    lost = is_broken(video.path, kind) if kind in ("matroska", "flv") else float(wide.double().mean()) < 0.1
    if not lost:
        return None
    ends = index.begins[:-1][wide] + index.step / 2  # of what is known before each gap
    if float(index.begins[-1] - ends[0]) < 0.5:  # of the last pictures some were cut off: they do not come in order
        if float(moments[-1]) > float(ends[0]) + index.step / 2:
            raise Cut(video.begin, float(ends[0]) + index.step / 2 - video.zero)
        return None
    for moment, key in zip(moments.tolist(), index.key(moments).tolist()):
        if ((ends > key) & (ends + index.step / 2 < moment)).any():
            return moment
    return None


@dataclass
class Picture:
    """A decoded frame, when it begins, and whether one on which it may build is lost: one since the last key frame."""

    frame: object
    begin: float
    hurt: bool


def play(video: Video, index: Index, seek: float | None = None) -> Iterator[Picture]:
    """All pictures in the order in which they are shown, from the file's start or from about a second of its clock on.

    A picture without a time follows the one before it. In AVI times are those of decoding: all are late by the same, and
    an empty packet shows the last picture again.
    """
    from torchcodec.decoders import Demuxer

    demuxer = Demuxer(video.path, streams=video.decoder.stream_index)
    decoder = demuxer.streams[0].make_decoder()
    if seek is not None:
        demuxer.seek(seek)
        decoder.reset()
    is_avi, keys = video.display.kind == "avi", set(index.keys.tolist())
    last, late, hurt, number = None, 0.0, False, 0
    for frame, failed in decode_packets(demuxer, decoder):
        begin = frame.pts_seconds - late
        known = abs(begin) < 1e9
        if last is None and not known:
            if seek is not None:
                continue
            begin = float(index.begins[0])
        elif last is None and is_avi:
            late = begin - float(index.begins[0])
            begin -= late
        elif last is not None and not (known and begin > last):
            begin = last + index.step
        before, number = number, int(index.at(torch.tensor(begin + TOLERANCE, dtype=torch.float64)))
        lost = failed or (not is_avi and last is not None and number > before + 2)
        hurt = (hurt or lost) and begin not in keys
        last = begin
        yield Picture(frame, begin, hurt)


def decode_packets(demuxer, decoder) -> Iterator[tuple[object, bool]]:
    """All frames that can be decoded, and whether a packet before each failed; it is left out, as by a player."""
    packets, failed = iter(demuxer), False
    while True:
        try:
            packet = next(packets, None)
        except RuntimeError:  # the rest cannot be read
            packet = None
        try:
            frames = decoder.drain() if packet is None else decoder.decode(packet)
        except RuntimeError:
            frames, failed = [], True
        failed = failed and packet is not None  # what is drained came before the last packet
        for frame in frames:
            yield frame, failed
            failed = False
        if packet is None:
            return


def play_from(video: Video, index: Index, key: float) -> Iterator[Picture]:
    """Pictures from a key frame on. Seeking may end behind it: then from further back, at last from the file's start."""
    if key > index.begins[0] + TOLERANCE and video.display.kind != "avi":
        for back in (0.0, 1.0, 10.0):
            try:
                pictures = play(video, index, key - back)
                first = next((p for p in pictures if p.begin > key - TOLERANCE), None)
            except RuntimeError:  # a container without seeking
                break
            if first is not None and first.begin < key + TOLERANCE:
                return itertools.chain([first], pictures)
    return play(video, index)


def decode_in_order(video: Video, index: Index, moments: Tensor, side: int | None) -> Shown:
    """Decode forward from key frames, as a player does: each picture is on the screen until the next one begins."""
    from torchcodec.decoders import ColorConverter

    converter, pixels, begins = ColorConverter(), [], []
    pictures, now, coming, drawn = iter(()), None, None, None
    expected = index.begins[index.at(moments)]
    for moment, begin, key in zip(moments.tolist(), expected.tolist(), index.key(expected).tolist()):
        if now is None or key > now.begin + 2:  # what lies between need not be decoded
            pictures = play_from(video, index, key)
            now, coming = next(pictures, None), next(pictures, None)
        while coming is not None and coming.begin <= moment:
            now, coming = coming, next(pictures, None)
        if now is None:
            raise Damage("damaged: no picture of it can be decoded")
        check_cut(video, index, moment, begin, now, coming)
        if drawn is not now:
            drawn = now
            large = converter.convert(now.frame).data.permute(1, 2, 0)[None]
            picture = finish(video, large, side)
            if pixels and picture.shape != pixels[0].shape:  # some streams change their size on the way
                picture = F.interpolate(picture, size=pixels[0].shape[-2:], mode="bilinear", antialias=True)
        pixels.append(picture)
        begins.append(now.begin)
    return Shown(torch.cat(pixels).contiguous(), torch.tensor(begins, dtype=torch.float64))


def check_cut(video: Video, index: Index, moment: float, begin: float, now: Picture, coming: Picture | None) -> None:
    """Raise Damage if the picture that should begin at `begin` is lost or hurt; Cut if it is one of few at the ends."""
    start, stop = video.begin, video.stop
    missing = index.at(torch.tensor([now.begin + TOLERANCE, begin + TOLERANCE], dtype=torch.float64)).diff().item()
    lost = missing > 1 and video.display.kind != "avi"  # one may be the second field of the picture before
    if video.display.kind == "ps" and coming is not None:  # its pictures come at a constant rate
        lost = coming.begin - now.begin > 2.5 * index.step and moment > now.begin + 1.5 * index.step
    if now.hurt or (lost and coming is not None):
        raise Damage(f"damaged: what {moment - video.zero:.2f} s shows cannot be decoded")
    if now.begin > moment + TOLERANCE:
        start = now.begin - video.zero
    elif missing and coming is None:
        stop = now.begin + index.step - video.zero
    else:
        return
    if video.stop - video.begin - (stop - start) > max(0.5, 0.2 * (video.stop - video.begin)):
        raise Damage(f"damaged: its pictures can be decoded from {start:.2f} to {stop:.2f} s only")
    raise Cut(start, stop)
