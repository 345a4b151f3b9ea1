"""What a player reads from the container of a video file, and the decoder does not tell: the shape of a
pixel, whether the picture is mirrored, and whether blocks are lost.

Shapes are read from MP4 (and MOV, 3GP) and Matroska (and WebM): other containers have none, or FFmpeg hands it on.
"""

import io
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# Matroska elements: those whose content is read, and those that may come between them.
SEGMENT, TRACKS, CLUSTER = 0x18538067, 0x1654AE6B, 0x1F43B675
HEADERS = (0x1A45DFA3, 0x114D9B74, 0x1549A966, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367)
BLOCKS = (0xE7, 0x5854, 0xA7, 0xAB, 0xA3, 0xA0, 0xAF, 0xEC, 0xBF)
NAMES = {
    0x83: "type",
    0xB0: "width",
    0xBA: "height",
    0x54B0: "display_width",
    0x54BA: "display_height",
    0x54B2: "display_unit",
    0x7673: "yaw",
    0x7674: "pitch",
    0x7675: "roll",
}
PARENTS = (0xE0, 0x7670)  # Video, Projection


@dataclass
class Display:
    """How the pictures of a video track are to be shown. `turned`: a display matrix (or pose) is there."""

    kind: str = ""  # "mp4", "matroska", "avi", "flv", "ps" and "ts" (MPEG program and transport stream) or ""
    pixel_aspect: float | None = None  # width of a pixel by its height; None: the container does not say
    turned: bool = False
    mirrored: bool = False


def read_display(path: Path, track: int) -> Display:
    """Read what the container says of its video track number `track`; nothing if it is damaged or of another kind."""
    with path.open("rb") as file:
        head = file.read(200)
        size = file.seek(0, io.SEEK_END)
        if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
            return Display("avi")
        if head[:4] == b"\0\0\1\xba":
            return Display("ps")
        if head[:1] == head[188:189] == b"G" or head[4:5] == head[196:197] == b"G":
            return Display("ts")
        if head[:3] == b"FLV":
            return Display("flv")
        try:
            if head[:4] == b"\x1a\x45\xdf\xa3":
                return read_matroska(file, size, track)
            if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
                return read_mp4(file, size, track)
        except (struct.error, IndexError, ZeroDivisionError):
            pass
    return Display()


# --- MP4 -----------------------------------------------------------------------------------------------------------------


def boxes(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name of each box between two places of an MP4 file, and where its content begins and ends."""
    while begin + 8 <= end:
        file.seek(begin)
        header = file.read(16)
        size, start = int.from_bytes(header[:4], "big"), begin + 8
        if size == 1:
            size, start = int.from_bytes(header[8:], "big"), begin + 16
        stop = begin + size if size else end
        if stop < start:
            return
        yield header[4:8], start, min(stop, end)
        begin = stop


def find_boxes(file: BinaryIO, begin: int, end: int, *names: bytes) -> Iterator[tuple[int, int]]:
    """Contents of all boxes with a path of names."""
    for name, start, stop in boxes(file, begin, end):
        if name == names[0]:
            yield from find_boxes(file, start, stop, *names[1:]) if names[1:] else [(start, stop)]


def read_box(file: BinaryIO, begin: int, end: int, *names: bytes) -> bytes:
    """Content of the first box with a path of names; empty if there is none."""
    for start, stop in find_boxes(file, begin, end, *names):
        file.seek(start)
        return file.read(min(stop - start, 1000))
    return b""


def read_matrix(box: bytes, place: int) -> tuple[float, float, float, float]:
    """The part of a display matrix that turns and scales: x' = a x + c y, y' = b x + d y."""
    place += 12 * (box[0] == 1)  # two times of 64 bits come before it
    a, b, _, c, d = struct.unpack(">5i", box[place : place + 20])
    return a / 65536, b / 65536, c / 65536, d / 65536


def read_mp4(file: BinaryIO, size: int, track: int) -> Display:
    """By the rules of FFmpeg: the pixel aspect is that of the display matrix, the pasp box or the track's size."""
    movie = next(find_boxes(file, 0, size, b"moov"))
    e, f, g, h = read_matrix(read_box(file, *movie, b"mvhd"), 36)
    videos = [t for t in find_boxes(file, *movie, b"trak") if read_box(file, *t, b"mdia", b"hdlr")[8:12] == b"vide"]
    tkhd = read_box(file, *videos[track], b"tkhd")
    a, b, c, d = read_matrix(tkhd, 40)
    a, b, c, d = a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h
    place = 76 + 12 * (tkhd[0] == 1)
    wide, high = struct.unpack(">2I", tkhd[place : place + 8])

    table, end = next(find_boxes(file, *videos[track], b"mdia", b"minf", b"stbl", b"stsd"))
    _, entry, end = next(boxes(file, table + 8, end))
    file.seek(entry)
    width, height = struct.unpack(">24x2H", file.read(28))
    pasp = read_box(file, entry + 78, end, b"pasp")
    scales = math.hypot(a, c), math.hypot(b, d)
    aspect = None
    if min(scales) > 0 and abs(scales[0] / scales[1] - 1) > 0.01:
        aspect = scales[0] / scales[1]
    elif len(pasp) >= 8 and all(struct.unpack(">2I", pasp[:8])):
        aspect = int.from_bytes(pasp[:4], "big") / int.from_bytes(pasp[4:8], "big")
    elif wide and high and width and height and (wide >> 16, high >> 16) != (width, height):
        aspect = (wide / width) / (high / height)
    return Display("mp4", aspect, (a, b, c, d) != (1, 0, 0, 1), a * d - b * c < 0)


# --- Matroska ------------------------------------------------------------------------------------------------------------


def elements(file: BinaryIO, begin: int, end: int, parents: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Number of each element between two places, and where its content begins and ends; parents are entered."""
    while begin < end:
        file.seek(begin)
        header = file.read(12)
        length = 9 - header[0].bit_length()
        number, sized = int.from_bytes(header[:length], "big"), header[length]
        width = 9 - sized.bit_length()
        if length > 4 or width > 8:
            yield 0, begin, end  # no number starts like this
            return
        begin += length + width
        size = int.from_bytes(header[length : length + width], "big") & ((1 << 7 * width) - 1)
        unknown = size == (1 << 7 * width) - 1
        yield number, begin, end if unknown else begin + size
        begin += 0 if number in parents else end if unknown else size


def read_matroska(file: BinaryIO, size: int, track: int) -> Display:
    """From the display size and the pose of the track."""
    tracks = next(e for e in elements(file, 0, size, (SEGMENT,)) if e[0] == TRACKS)
    entries = [e for e in elements(file, *tracks[1:], ()) if e[0] == 0xAE]
    videos = []
    for _, begin, end in entries:
        found = {}
        for number, start, stop in elements(file, begin, end, PARENTS):
            if number in NAMES:
                file.seek(start)
                value = file.read(stop - start)
                angle = NAMES[number] in ("yaw", "pitch", "roll")
                found[NAMES[number]] = (
                    struct.unpack(">d" if len(value) == 8 else ">f", value)[0] if angle else int.from_bytes(value, "big")
                )
        if found.get("type") == 1:
            videos.append(found)
    about, aspect = videos[track], None
    if "display_width" in about and "display_height" in about and about.get("display_unit", 0) < 4:
        aspect = (about["display_width"] / about["width"]) / (about["display_height"] / about["height"])
    yaw, pitch, roll = (about.get(k, 0.0) for k in ("yaw", "pitch", "roll"))
    return Display("matroska", aspect or None, any((yaw, pitch, roll)), abs(yaw) == 180)


def is_broken(path: Path, kind: str) -> bool:
    """Whether a Matroska or FLV file holds something that is no part of it. The decoder drops what follows.

    A part that is longer than the file may be the last one of a file that was cut off, unless it starts far from the end.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        parts = flv_tags(file, size) if kind == "flv" else elements(file, 0, size, (SEGMENT, CLUSTER))
        known = (1,) if kind == "flv" else {SEGMENT, TRACKS, CLUSTER, *HEADERS, *BLOCKS}
        try:
            return any(
                number not in known or (number not in (SEGMENT, CLUSTER) and end > size and size - begin > size / 10)
                for number, begin, end in parts
            )
        except IndexError:  # cut off within a number
            return False


def flv_tags(file: BinaryIO, size: int) -> Iterator[tuple[int, int, int]]:
    """1, or 0 for what is no tag, and where the tag begins and ends: each is followed by its length."""
    begin = 13
    while begin < size:
        file.seek(begin)
        length = 11 + int.from_bytes(file.read(4)[1:], "big")
        file.seek(begin + length)
        again = file.read(4)
        yield int(len(again) < 4 or int.from_bytes(again, "big") == length), begin, begin + length + 4
        begin += length + 4
