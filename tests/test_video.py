"""Decoding: the frames are those that a player shows, of every kind of file, or the clip is named as damaged.

The base video lasts 4 s at 25 frames a second; frame k has the gray level 20 + 2k, and a red block in the upper left.
"""

import json
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchcodec.encoders import VideoEncoder

import vp
from data import decode
from data.clips import load_clips, parse_line
from data.curation.fingerprints import fingerprint
from data.files import ClipError
from data.video import Clip, Frames, read_frames
from data.world import SAME_BYTES

MOMENTS = [0.125 + 0.25 * i for i in range(16)]  # the middles of 16 shares of 4 s


def ffmpeg(*words: object) -> None:
    """Run the command line of FFmpeg."""
    subprocess.run(["ffmpeg", "-loglevel", "error", "-y", *map(str, words)], check=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The base video as MP4, with B-frames and a key frame every 50 frames."""
    folder = tmp_path_factory.mktemp("videos")
    pictures = (20 + 2 * torch.arange(100, dtype=torch.uint8))[:, None, None, None].repeat(1, 3, 120, 160)
    pictures[:, 0, :60, :80], pictures[:, 1:, :60, :80] = 220, 20
    VideoEncoder(pictures, frame_rate=25).to_file(
        folder / "raw.mp4", crf=1, pixel_format="yuv444p", extra_options=SAME_BYTES
    )
    x264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", 50, "-bf", 3, "-crf", 12]
    ffmpeg("-i", folder / "raw.mp4", *x264, folder / "base.mp4")
    ffmpeg("-f", "lavfi", "-i", "sine=duration=6", "-c:a", "aac", folder / "tone.m4a")
    return folder / "base.mp4"


def read(path: Path, count: int = 16, **more) -> Frames:
    """Frames of a file."""
    side, fields = more.pop("side", None), more
    return read_frames(Clip(path, "x", path.name, **fields), count, side=side)


def grays(frames: Frames) -> list[float]:
    """The gray level of each frame, from the lower right, where no block is."""
    height, width = frames.pixels.shape[-2:]
    return frames.pixels[..., height * 5 // 8 :, width * 5 // 8 :].float().mean((1, 2, 3)).tolist()


def assert_true(frames: Frames, moments: list[float] = MOMENTS, late: float = 0.0, tolerance: float = 3) -> None:
    """Each frame is the one of its moment; pictures begin `late` seconds after zero."""
    levels = grays(frames)
    want = [20 + 2 * int((t - late) * 25 + 1e-6) for t in moments]
    assert levels == pytest.approx(want, abs=tolerance), list(zip(moments, levels, want))
    assert frames.timestamps == pytest.approx([t - 0.02 for t in moments], abs=0.0205)


KINDS = {
    "h264.ts": ["-c", "copy"],
    "mpeg2.ts": ["-c:v", "mpeg2video", "-bf", 2, "-q:v", 2],
    "mpeg2.mpg": ["-c:v", "mpeg2video", "-bf", 2, "-q:v", 2],
    "h264.avi": ["-c:v", "libx264", "-crf", 12, "-bf", 2],
    "mpeg4.avi": ["-c:v", "mpeg4", "-bf", 2, "-q:v", 2],
    "h264.flv": ["-c", "copy"],
    "h264.mkv": ["-c", "copy"],
    "fragments.mp4": ["-c", "copy", "-movflags", "frag_keyframe+empty_moov"],
    "onekey.mov": ["-c:v", "libx264", "-crf", 12, "-g", 1000],
    "vp8.webm": ["-c:v", "libvpx", "-b:v", "2M", "-deadline", "realtime"],
    "late.ts": ["-c", "copy", "-output_ts_offset", 50],
    "a.gif": [],
    "a.wmv": ["-q:v", 2],
    "a.ogv": ["-q:v", 9],
}


@pytest.mark.parametrize("name", KINDS)
def test_true_frames_of_every_container(base, tmp_path, name):
    """The same 16 moments of the same video: different frames, each the right one (MPEG-TS gave one for eight moments)."""
    ffmpeg("-i", base, *KINDS[name], tmp_path / name)
    for side in (None, 64):
        frames = read(tmp_path / name, side=side)
        assert_true(frames, tolerance=3 + name.endswith("gif"))  # its palette
        assert frames.duration == pytest.approx(4, abs=0.01) and frames.fps == pytest.approx(25, abs=0.3)
    part = read(tmp_path / name, 4, start=3.0, end=3.4)  # behind the last key frame but one
    assert_true(part, [0.05, 0.15, 0.25, 0.35], late=-3.0, tolerance=3 + name.endswith("gif"))


def test_stream_without_duration(base, tmp_path):
    """What was written to a pipe tells no duration; the packets do."""
    with (tmp_path / "pipe.mkv").open("wb") as out:
        words = ["ffmpeg", "-loglevel", "error", "-i", base, "-c", "copy", "-f", "matroska", "pipe:"]
        subprocess.run(words, stdout=out, check=True)
    assert_true(read(tmp_path / "pipe.mkv"))


def test_plain_files_need_no_second_look(base, monkeypatch):
    """An ordinary file is opened once: neither scanned again nor decoded in order."""
    monkeypatch.setattr(decode, "scan", None)
    monkeypatch.setattr(decode, "decode_in_order", None)
    assert_true(read(base))
    assert_true(read(base, side=64))


# --- Damage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mkv", "a.flv", "a.ts", "a.mp4"])
def test_damage_in_the_middle(base, tmp_path, name):
    """Skipped by name, or true frames; never one frame for many moments."""
    ffmpeg("-i", base, "-c:v", "mpeg4" if name == "a.mp4" else "libx264", "-g", 20, "-b:v", "1M", tmp_path / name)
    good = (tmp_path / name).read_bytes()
    named = 0
    for share in (0.3, 0.45, 0.6):
        place = int(len(good) * share)
        (tmp_path / name).write_bytes(good[:place] + bytes(2000) + good[place + 2000 :])
        try:
            assert_true(read(tmp_path / name))
        except ClipError as error:
            named += 1
            assert str(error).startswith(f"{name}: {tmp_path / name}: damaged: ")
    assert named


def test_lost_pictures_and_long_ones(base, tmp_path):
    """A picture that is shown for long stays; the same gap is damage if something unreadable lies in it."""
    words = ["-i", base, "-vf", "select='lt(n,30)+gt(n,70)'", "-fps_mode", "vfr"]
    for name in ("gap.mp4", "gap.mkv", "gap.flv", "gap.avi"):
        ffmpeg(*words, tmp_path / name)
        want = [20 + 2 * (k if k < 30 or k > 70 else 29) for k in (int(t * 25) for t in MOMENTS)]
        assert grays(read(tmp_path / name)) == pytest.approx(want, abs=3)
    ffmpeg("-i", base, "-c", "copy", "-cluster_time_limit", 500, tmp_path / "a.mkv")
    data = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(data[: len(data) // 2] + b"\x13" * 400 + data[len(data) // 2 + 400 :])
    with pytest.raises(ClipError, match=r"a\.mkv: damaged: what 1\.\d\d s shows is lost"):
        read(tmp_path / "a.mkv")


@pytest.mark.parametrize("name", ["cut.mp4", "cut.ts", "cut.mkv"])
def test_files_that_were_cut_off(base, tmp_path, name):
    """The header promises 4 s, the pictures end before: what is there is used, with its true duration."""
    ffmpeg("-i", base, "-c", "copy", "-movflags", "faststart", tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * 7 // 10])
    frames = read(tmp_path / name)
    assert 1 < frames.duration < 3.9
    assert_true(frames, [(i + 0.5) * frames.duration / 16 for i in range(16)])


def test_messages_are_about_the_file(base, tmp_path):
    """No path of a library, no line of C++."""
    data = base.read_bytes()
    cover = tmp_path / "cover.png"
    Image.new("RGB", (64, 64)).save(cover)
    made = {"text.mp4": b"not a video\n" * 50, "cut.mp4": data[:3000], "zeros.mp4": data[:40] + bytes(len(data) - 40)}
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ClipError) as caught:
            read(tmp_path / name)
        message = str(caught.value).replace(str(tmp_path / name), "FILE")
        assert message == f"{name}: FILE: cannot be decoded: no video, or damaged"
    ffmpeg("-i", base, "-c", "copy", tmp_path / "raw.h264")
    with pytest.raises(ClipError, match=r"its container has no times; put it into another"):
        read(tmp_path / "raw.h264")
    ffmpeg("-i", base.with_name("tone.m4a"), "-c", "copy", tmp_path / "sound.mp4")
    with pytest.raises(ClipError, match=r"sound\.mp4: no video in it"):
        read(tmp_path / "sound.mp4")


# --- What a player shows -------------------------------------------------------------------------------------------------


def red_corner(frames: Frames) -> tuple[bool, bool]:
    """Whether the red block is in the lower half, and in the right half."""
    red = (frames.pixels[7, 0].float() - frames.pixels[7, 1].float()) > 60
    places = red.nonzero().float().mean(0)
    return bool(places[0] > red.shape[0] / 2), bool(places[1] > red.shape[1] / 2)


TURNS = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]
TURNS += [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]  # mirrored


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("aspect", [1, 2])
def test_display_matrix(base, tmp_path, turn, aspect):
    """All turns, and all of them mirrored, with square pixels and others, of the track or of the movie."""
    a, b, c, d = turn
    ffmpeg("-i", base, "-c", "copy", "-aspect", f"{160 * aspect}:120", tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    for box, place in ((b"tkhd", 44), (b"mvhd", 40)):
        at = data.index(box) + place
        matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        (tmp_path / "b.mp4").write_bytes(data[:at] + matrix + data[at + 36 :])
        frames, small = read(tmp_path / "b.mp4"), read(tmp_path / "b.mp4", side=64)
        # x' = a x + c y, y' = b x + d y, and the block is at (-1, -1) from the middle
        assert red_corner(frames) == red_corner(small) == (-b - d > 0, -a - c > 0)
        shape = (120, 160 * aspect) if a else (160 * aspect, 120)
        assert tuple(frames.pixels.shape[-2:]) == shape
        assert tuple(small.pixels.shape[-2:]) == tuple(round(n * 64 / max(shape)) for n in shape)


def test_slanted_pictures_are_refused(base, tmp_path):
    """A turn by 45 degrees cannot be shown; nor pixels of 100:1."""
    data = base.read_bytes()
    at = data.index(b"tkhd") + 44
    half = 46341
    matrix = struct.pack(">9i", half, half, 0, -half, half, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(data[:at] + matrix + data[at + 36 :])
    with pytest.raises(ClipError, match="turned by -45 degrees"):
        read(tmp_path / "a.mp4")
    ffmpeg("-i", base, "-c", "copy", "-aspect", "16000:120", tmp_path / "b.mp4")
    with pytest.raises(ClipError, match=r"99\.75 times as wide as high"):
        read(tmp_path / "b.mp4")


SHAPES = {
    "stream.mp4": ["-vf", "setsar=2"],
    "stream.mpg": ["-c:v", "mpeg2video", "-vf", "setdar=16/9"],
    "container.mp4": ["-c", "copy", "-aspect", "320:120"],
    "container.mkv": ["-c", "copy", "-aspect", "320:120"],
    "vp9.webm": ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-vf", "setsar=2"],
    "narrow.mkv": ["-c", "copy", "-aspect", "80:120"],
}


@pytest.mark.parametrize("name", SHAPES)
def test_pixels_are_square(base, tmp_path, name):
    """The pixel aspect of the stream, or of the container alone, is applied."""
    ffmpeg("-i", base, *SHAPES[name], tmp_path / name)
    want = {"stream.mpg": (120, 213), "narrow.mkv": (240, 160)}.get(name, (120, 320))
    frames = read(tmp_path / name)
    assert frames.pixels.shape[-2:] == pytest.approx(want, abs=1)
    assert read(tmp_path / name, side=64).pixels.shape[-2:] == pytest.approx([n * 64 / max(want) for n in want], abs=1)
    assert_true(frames)


@pytest.mark.parametrize("name", ["a.mp4", "a.ts", "a.mkv"])
def test_sound_that_starts_first(base, tmp_path, name):
    """Zero is where the container starts, not the first picture: parts and spans are those that a player shows."""
    tone = base.with_name("tone.m4a")
    ffmpeg("-itsoffset", 2, "-i", base, "-i", tone, "-map", 0, "-map", 1, "-c", "copy", tmp_path / name)
    whole = read(tmp_path / name)
    late = whole.timestamps[0] - 0.12  # some muxers move all by the priming of the sound, 0.02 s
    assert late == pytest.approx(2, abs=0.03) and whole.duration == pytest.approx(6, abs=0.03)
    assert grays(whole) == pytest.approx([20 + 2 * int(t * 25) for t in MOMENTS], abs=3)
    slots = vp.span_slots([[3.0, 3.5]], whole.timestamps, 2)
    assert slots.tolist() == [2 + i / 2 < 3.5 and 2.5 + i / 2 + 0.12 > 3.0 for i in range(8)]  # from 2.12 + i / 2 on
    part = read(tmp_path / name, 4, start=4.5)
    assert part.duration == pytest.approx(1.5, abs=0.03)
    assert grays(part) == pytest.approx([20 + 2 * int((2.5 + 1.5 * (i + 0.5) / 4) * 25) for i in range(4)], abs=4)
    with pytest.raises(ClipError, match=r"the first picture comes at 2\.0\d s, behind the part's end"):
        read(tmp_path / name, end=1.5)
    with pytest.raises(ClipError, match=r"'start': 6\.5 s, but .* lasts 6\.0\d s"):
        read(tmp_path / name, start=6.5)


def test_what_an_edit_list_leaves_out(base, tmp_path):
    """A cut without encoding keeps pictures before its beginning, which no player shows."""
    ffmpeg("-ss", 1.32, "-i", base, "-c", "copy", tmp_path / "a.mp4")
    frames = read(tmp_path / "a.mp4")
    assert frames.duration == pytest.approx(2.68, abs=0.05)
    assert_true(frames, [(i + 0.5) * frames.duration / 16 for i in range(16)], late=-1.32)


def test_cover_picture_before_the_video(base, tmp_path):
    """A picture of the first video stream is no video."""
    Image.new("RGB", (640, 480), "green").save(tmp_path / "cover.png")
    words = ["-i", base, "-i", tmp_path / "cover.png", "-map", 1, "-map", 0, "-c", "copy"]
    for name, more in (("a.mkv", ["-disposition:v:0", "attached_pic"]), ("b.mkv", ["-disposition:v:0", "default"])):
        ffmpeg(*words, *more, tmp_path / name)
        assert_true(read(tmp_path / name))


# --- Folders of pictures -------------------------------------------------------------------------------------------------


def test_folder_of_pictures(tmp_path):
    """A folder with frames_per_second is a video; whatever is wrong with it is named."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for k in range(12):
        Image.new("RGB", (64, 48), (20 * k, 20 * k, 20 * k)).save(folder / f"{k + 1:05d}.png")
    line = {"video": "frames", "caption": "x", "start": 1, "frames_per_second": 4}
    (tmp_path / "clips.jsonl").write_text(json.dumps(line) + "\n")
    (clip,), _ = load_clips(tmp_path / "clips.jsonl")
    frames = read_frames(clip, 8, side=32)
    assert frames.timestamps == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75] and frames.fps == 4
    assert frames.pixels.shape == (8, 3, 24, 32) and frames.pixels[:, 0, 0, 0].tolist() == [20 * k for k in range(4, 12)]
    marks = fingerprint(clip, frames.pixels.float())["sha256"]
    Image.new("RGB", (64, 48), "red").save(folder / "00007.png")
    assert fingerprint(clip, frames.pixels.float())["sha256"] != marks
    with pytest.raises(ClipError, match="not a regular file; for a folder of numbered pictures give 'frames_per_second'"):
        read_frames(Clip(folder, "x", "a"), 8)
    (folder / "00008.png").write_bytes(b"no picture")
    with pytest.raises(ClipError, match=r"frames: 00008\.png cannot be decoded: no picture, or damaged"):
        read_frames(clip, 8)
    head = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)  # the decoder would ask for 2.7 GB
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    head += struct.pack(">I", 8) + b"IDAT"
    (folder / "00008.png").write_bytes(head)
    with pytest.raises(ClipError, match=r"frames: 00008\.png has too many pixels, more than 179 million; scale it down"):
        read_frames(clip, 8)
    Image.new("RGB", (32, 48)).save(folder / "00008.png")
    with pytest.raises(ClipError, match=r"00008\.png has another size than 00005\.png"):
        read_frames(clip, 8)


@pytest.mark.parametrize("rate", [0, -1, "4", True, [4]])
def test_frames_per_second_is_checked(tmp_path, rate):
    """A number above 0, and of a folder only."""
    (tmp_path / "frames").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(ClipError, match=r"field 'frames_per_second': found .*; give a number above 0"):
        parse_line(json.dumps({"video": "frames", "caption": "x", "frames_per_second": rate}), "a:1", tmp_path)
    with pytest.raises(ClipError, match="found 4; a video file tells it"):
        parse_line('{"video": "a.mp4", "caption": "x", "frames_per_second": 4}', "a:1", tmp_path)
