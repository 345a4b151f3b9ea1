"""Annotation lines and video files, good, odd and broken: every one gives the promised message or skip."""

import copy
import json
import os
import signal
import subprocess
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torchcodec.encoders import VideoEncoder
from transformers import AutoProcessor

import data.clips as clips_module
from data.clips import load_clips, split_long
from data.examples import Preparation, chat, make_example, prepare, process
from data.files import ClipError
from data.loader import ClipLoader
from data.run.sizes import random_processor
from data.tiny import build_tiny
from data.user_text import SEAM, encode, encode_plain
from data.video import Clip, Frames, read_frames, sample_times
from data.world import SAME_BYTES

GOOD = {"video": "a.mp4", "caption": "A man jumps off a wall.", "keywords": ["jumps off"], "key_spans": [[0.5, 0.9]]}


def line(**changes) -> str:
    """A good line with some fields changed; None removes a field."""
    return json.dumps({k: v for k, v in (GOOD | changes).items() if v is not None})


BROKEN_LINES = [
    ("", "not JSON", "{"),
    ("", "not JSON", "video, caption"),
    ("", "not JSON", '{"video": "a.mp4", "caption": "x",}'),
    ("", "found a JSON list", '["a.mp4", "x"]'),
    ("", "found a JSON str", '"a.mp4"'),
    ("", "found a JSON NoneType", "null"),
    ("video", "is missing", line(video=None)),
    ("caption", "is missing", line(caption=None)),
    ("video", "not empty", line(video="")),
    ("video", "not empty", line(video=3)),
    ("video", "not empty", line(video=["a.mp4"])),
    ("caption", "not empty", line(caption="  ")),
    ("caption", "not empty", line(caption=["A man"])),
    ("prompt", "not empty", line(prompt=7)),
    ("video", "leaves the root", line(video="../a.mp4")),
    ("video", "leaves the root", line(video="b/../../a.mp4")),
    ("video", "leaves the root", line(video="/etc/hostname")),
    ("video", "leaves the root", line(video="out/a.mp4")),  # out is a link that leaves the root
    ("video", "not a path", line(video="a\0.mp4")),
    ("key_span", "did you mean 'key_spans'", line(key_span=[0, 1])),
    ("captions", "did you mean 'caption'", line(captions="x")),
    ("license", "known fields are", line(license="CC0")),
    (
        "",
        "fields 'license', 'url', 'captoin' are unknown; did you mean 'caption'",
        line(license="CC0", url="x", captoin="y"),
    ),
    ("start", "more than once", '{"video": "a.mp4", "caption": "x", "start": 1, "start": 2}'),
    ("span", "more than once", '{"video": "a.mp4", "caption": "x", "truth": {"span": [0, 1], "span": [0, 2]}}'),
    ("start", "0 or more", '{"video": "a.mp4", "caption": "x", "start": ' + "9" * 400 + "}"),
    ("start", "0 or more", '{"video": "a.mp4", "caption": "x", "start": ' + "9" * 5000 + "}"),
    ("start", "0 or more", '{"video": "a.mp4", "caption": "x", "start": 1e999}'),
    ("end", "more than start", '{"video": "a.mp4", "caption": "x", "end": -Infinity}'),
    ("key_spans", "in seconds", '{"video": "a.mp4", "caption": "x", "keywords": ["k"], "key_spans": [[0, 1e999]]}'),
    ("", "nested too deep", '{"video": "a.mp4", "caption": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    ("", "nested too deep", "[" * 100_000),
    ("caption", "lone surrogate", r'{"video": "a.mp4", "caption": "A man \ud83d jumps."}'),
    ("video", "lone surrogate", r'{"video": "\udc00.mp4", "caption": "x"}'),
    ("keywords", "lone surrogate", r'{"video": "a.mp4", "caption": "x", "keywords": ["k", "\uD83D"]}'),
    ("truth", "lone surrogate", r'{"video": "a.mp4", "caption": "x", "truth": {"actor": {"a": ["\uDFFF"]}}}'),
    ("video", "control character", line(video="a\x1b[31m.mp4")),
    ("video", "control character", line(video="a\n.mp4")),
    ("keywords", "list of phrases", line(keywords={}, key_spans=None)),
    ("keywords", "list of phrases", line(keywords=0, key_spans=None)),
    ("prompt", "leave it out", line(prompt="<video>\nDescribe the video.")),
    ("prompt", "leave it out", line(prompt="Describe the video.\n<image> ")),
    ("prompt", "leave it out", line(prompt="<|video|>Describe.")),
    ("prompt", "leave it out", line(prompt=" <|vision_start|><|video_pad|><|vision_end|>Describe.")),
    ("prompt", "leave it out", line(prompt="Look:\n<image-1>\nDescribe.")),
    ("prompt", "leave it out", line(prompt="Describe. <Video><VideoHere></Video>")),
    ("start", "0 or more", line(start=-1)),
    ("start", "0 or more", line(start="1")),
    ("start", "0 or more", line(start=True)),
    ("start", "0 or more", '{"video": "a.mp4", "caption": "x", "start": NaN}'),
    ("end", "more than start", line(start=2, end=2)),
    ("end", "more than start", line(end="9")),
    ("keywords", "list of phrases", line(keywords="jumps off")),
    ("keywords", "list of phrases", line(keywords=[1])),
    ("keywords", "list of phrases", line(keywords=[""], key_spans=None)),
    ("key_spans", "1 of them", line(key_spans=[])),
    ("key_spans", "1 of them", line(key_spans=[[0, 1], [1, 2]])),
    ("key_spans", "1 of them", line(key_spans="0-1")),
    ("key_spans", "in seconds", line(key_spans=[[0]])),
    ("key_spans", "in seconds", line(key_spans=[["0", "1"]])),
    ("key_spans", "in seconds", line(key_spans=[5])),
    ("key_spans", "in seconds", line(key_spans=[[]])),
    ("key_spans", "less than the end", line(key_spans=[[2, 1]])),
    ("key_spans", "less than the end", line(key_spans=[[-1, 1]])),
    ("key_spans", "outside the clip", line(start=1, end=2, key_spans=[[1.5, 1.8]])),
    ("truth", "give an object", line(truth="jumps")),
    ("truth", "give an object", line(truth={"action": "jumps"})),
    ("truth", "give an object", line(truth={"actor": "a", "action": "b", "static": "c", "span": [2, 1]})),
]


@pytest.mark.parametrize("name, message, broken", BROKEN_LINES)
def test_a_broken_line_is_named_and_skipped(tmp_path, name, message, broken):
    """File, line number, field, what is wrong; the lines around it stay."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "out").symlink_to("/usr")
    file = tmp_path / "root" / "clips.jsonl"
    file.write_text("\n".join([line(), broken, "", line()]) + "\n")
    clips, problems = load_clips(file)
    assert len(clips) == 2 and len(problems) == 1
    assert problems[0].startswith(f"{file}:2: ") and message in problems[0]
    assert not name or f"field '{name}'" in problems[0]


def test_a_whole_character_and_a_tag_in_a_sentence_are_text(tmp_path):
    """An emoji written as a pair of surrogates, and a prompt that speaks about <video>, are as good as any."""
    file = tmp_path / "clips.jsonl"
    good = [r'{"video": "a.mp4", "caption": "\ud83d\ude00 \\\\ud83d"}', line(prompt="Is the HTML tag <video> shown?")]
    file.write_text("\n".join(good))
    clips, problems = load_clips(file)
    assert not problems and clips[0].caption == "\N{GRINNING FACE} \\\\ud83d" and "<video>" in clips[1].prompt


def test_bytes_that_are_no_text_are_named_and_skipped(tmp_path):
    """Not UTF-8 is one bad line; a byte-order mark is fine."""
    file = tmp_path / "clips.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + line().encode() + b"\n" + b"\xff\xfe\n" + line().encode())
    clips, problems = load_clips(file)
    assert len(clips) == 2 and len(problems) == 1 and ":2: not UTF-8" in problems[0]


def test_no_usable_line_is_an_error(tmp_path):
    """A missing file, and a file with nothing to train on, say so."""
    with pytest.raises(ClipError, match="no such file"):
        load_clips(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(ClipError, match="no usable clip among 1"):
        load_clips(tmp_path / "bad.jsonl")


def test_several_spans_of_one_keyword(tmp_path):
    """A keyword may happen twice."""
    (tmp_path / "c.jsonl").write_text(line(key_spans=[[[0.1, 0.2], [0.5, 0.6]]]))
    assert load_clips(tmp_path / "c.jsonl")[0][0].key_spans == [[[0.1, 0.2], [0.5, 0.6]]]


# --- files -----------------------------------------------------------------------------------------------------------


def write_video(path: Path, frames: int = 16, size: tuple[int, int] = (48, 64), fps: float = 8.0, seed: int = 0) -> None:
    """A video whose frame t has brightness 10 t, and some noise."""
    rng = np.random.default_rng(seed)
    video = (10 * np.arange(frames)[:, None, None, None] + rng.integers(0, 5, (frames, 3, *size))) % 250
    VideoEncoder(torch.from_numpy(video.astype(np.uint8)), frame_rate=fps).to_file(path, extra_options=SAME_BYTES)


def make_broken_files(folder: Path) -> list[Path]:
    """At least 40 files that cannot be used, made from one good file."""
    good = folder / "good.mp4"
    write_video(good)
    data = good.read_bytes()
    rng = np.random.default_rng(0)
    made = {"missing.mp4": None, "empty.mp4": b"", "text.mp4": b"not a video\n" * 50, "zeros.mp4": bytes(4000)}
    made |= {"json.mp4": b"{}", "html.mp4": b"<html><body>404</body></html>", "gzip.mp4": b"\x1f\x8b\x08" + data[:500]}
    for percent in (1, 5, 10, 20, 40, 60, 80, 95):  # the index stands at the end: every cut loses it
        made[f"cut{percent}.mp4"] = data[: len(data) * percent // 100]
    for i in range(8):  # heads lost
        made[f"tail{i}.mp4"] = data[(i + 1) * len(data) // 10 :]
    for i in range(8):
        made[f"noise{i}.mp4"] = rng.integers(0, 256, 200 * 4**i % 5000 + 10).astype(np.uint8).tobytes()
    moov = data.index(b"moov")
    for i in range(4):  # the index itself damaged
        hurt = bytearray(data)
        hurt[moov - 4 + i : moov + 3 + i] = b"\xff" * 7
        made[f"moov{i}.mp4"] = bytes(hurt)
    for name, content in made.items():
        if content is not None:
            (folder / name).write_bytes(content)
    names = list(made)
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")  # opening it would wait for ever
    (folder / "dangling.mp4").symlink_to("nowhere.mp4")
    write_video(folder / "one.mp4", 1)
    write_video(folder / "two.mp4", 2)
    write_video(folder / "three.mp4", 3)
    quiet = ["ffmpeg", "-loglevel", "error", "-y"]
    tone = ["-f", "lavfi", "-i", "sine=duration=1"]
    for name in ("sound.wav", "sound.mp3", "sound.mp4", "sound.mkv"):
        subprocess.run([*quiet, *tone, folder / name], check=True)
    subprocess.run([*quiet, "-i", good, "-frames:v", "1", folder / "picture.png"], check=True)
    subprocess.run([*quiet, "-i", good, "-frames:v", "1", folder / "picture.jpg"], check=True)
    names += ["folder.mp4", "pipe.mp4", "dangling.mp4", "one.mp4", "two.mp4", "three.mp4"]
    names += ["sound.wav", "sound.mp3", "sound.mp4", "sound.mkv", "picture.png", "picture.jpg"]
    return [folder / n for n in names]


def test_broken_files_are_skipped_by_name(tmp_path):
    """Issue bar: at least 40 broken or odd files; each raises ClipError that names it, none crashes, none hangs."""
    files = make_broken_files(tmp_path)
    assert len(files) >= 40
    for file in files:
        with pytest.raises(ClipError) as caught:
            read_frames(Clip(file, "x", f"clips.jsonl:{file.name}"), 16)
        assert str(caught.value).startswith(f"clips.jsonl:{file.name}: ") and str(file) in str(caught.value)


def test_odd_but_good_files(tmp_path):
    """Containers, odd sizes, variable frame rate and a late start all give frames with rising timestamps."""
    write_video(tmp_path / "a.mp4")
    quiet = ["ffmpeg", "-loglevel", "error", "-y", "-i", tmp_path / "a.mp4"]
    subprocess.run([*quiet, tmp_path / "a.mkv"], check=True)
    subprocess.run([*quiet, tmp_path / "a.webm"], check=True)
    subprocess.run([*quiet, "-vf", "select='lt(n,5)+gt(n,9)'", "-fps_mode", "vfr", tmp_path / "vfr.mp4"], check=True)
    subprocess.run([*quiet, "-output_ts_offset", "5", tmp_path / "late.ts"], check=True)
    write_video(tmp_path / "thin.mp4", size=(16, 400))
    for name in ("a.mp4", "a.mkv", "a.webm", "vfr.mp4", "late.ts", "thin.mp4"):
        frames = read_frames(Clip(tmp_path / name, "x", name), 8)
        assert len(frames.pixels) == len(frames.timestamps) == 8
        assert all(a < b for a, b in zip(frames.timestamps, frames.timestamps[1:])) or name == "vfr.mp4"
        assert 0 <= frames.timestamps[0] < 0.3 and frames.timestamps[-1] < 2.1
        assert (frames.pixels.float().mean((1, 2, 3)).diff() > -1).all()


@pytest.mark.parametrize("count, fps, want", [(16, None, 16), (8, None, 8), (7, None, 8), (16, 4.0, 8), (64, None, 16)])
def test_sampling(tmp_path, count, fps, want):
    """Uniform with a maximum, or by fps; odd counts are filled up; each frame is the one shown at its time."""
    write_video(tmp_path / "a.mp4")
    frames = read_frames(Clip(tmp_path / "a.mp4", "x", "a"), count, fps)
    assert len(frames.pixels) == want
    shown = (frames.pixels.float().mean((1, 2, 3)) / 10).round() - 0  # brightness tells the frame's number
    for brightness, t in zip(shown.tolist(), frames.timestamps):
        assert abs(brightness - t * 8) <= 1


def test_parts_of_a_video(tmp_path):
    """start and end: timestamps count from the part's beginning, key spans too."""
    write_video(tmp_path / "a.mp4")
    frames = read_frames(Clip(tmp_path / "a.mp4", "x", "a", start=1.0, end=1.5), 16)
    assert frames.timestamps == pytest.approx([0, 0.125, 0.25, 0.375], abs=1e-3)
    assert (frames.pixels[0].float().mean() / 10).round() == 8
    with pytest.raises(ClipError, match="field 'start': 9 s"):
        read_frames(Clip(tmp_path / "a.mp4", "x", "a", start=9.0), 16)
    with pytest.raises(ClipError, match=r"field 'key_spans'.*lasts 2\.00 s"):
        read_frames(Clip(tmp_path / "a.mp4", "x", "a", keywords=["k"], key_spans=[[[3.0, 4.0]]]), 16)


SHAPES = [(96, 160, (38, 64)), (160, 96, (64, 38)), (16, 400, (8, 64)), (48, 64, (48, 64))]


@pytest.mark.parametrize("height, width, want", SHAPES)
def test_small_pictures(tmp_path, height, width, want):
    """With side: the same moments and pictures, the longer side as asked, every pixel counted; small ones as they are."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 255, (11, 3, height // 8, width // 8), generator=g, dtype=torch.uint8)
    pictures = torch.nn.functional.interpolate(noise, size=(height, width))
    pictures[:, :, ::2] //= 4  # dark lines: a picture made small by leaving lines out would come out too dark or too bright
    VideoEncoder(pictures.contiguous(), frame_rate=8).to_file(
        tmp_path / "a.mp4", crf=1, pixel_format="yuv444p", extra_options=SAME_BYTES
    )
    clip = Clip(tmp_path / "a.mp4", "x", "a")
    large, small = read_frames(clip, 9), read_frames(clip, 9, side=64)
    assert small.timestamps == large.timestamps and len(small.pixels) == 10 and small.pixels.dtype == torch.uint8
    assert tuple(small.pixels.shape[1:]) == (3, *want) and small.pixels.is_contiguous()
    wanted = torch.nn.functional.interpolate(large.pixels.float(), size=want, mode="bilinear", antialias=True)
    assert (small.pixels - wanted).abs().mean() < 1
    means = [x.pixels.float().mean((2, 3)) for x in (small, large)]
    assert (means[0] - means[1]).abs().max() < 8


def test_jitter_is_seeded(world, qwen2_5):
    """Jitter moves frames, stays in each frame's share, and repeats with its seed."""
    rngs = [np.random.default_rng(s) for s in (1, 1, 2)]
    a, b, c = (sample_times(2.0, 8, r) for r in rngs)
    assert a == b != c
    assert all(i * 0.25 <= t < (i + 1) * 0.25 for i, t in enumerate(a))


# --- the loader ---------------------------------------------------------------------------------------------------------


class Marked:
    """Passes everything on to the processor; a prompt of "hang" or "die" does just that. Workers import it from here."""

    def __init__(self, inner):
        self.inner, self.video_processor = inner, inner.video_processor

    @property
    def tokenizer(self):
        """The real tokenizer."""
        return self.inner.tokenizer

    def apply_chat_template(self, conversation, **more):
        """Hang, die, or go on."""
        prompt = conversation[0]["content"][1]["text"]
        if prompt == "hang":
            threading.Event().wait()
        if prompt == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        return self.inner.apply_chat_template(conversation, **more)

    def __call__(self, **inputs):
        return self.inner(**inputs)


def test_loader_survives_what_decoders_do(world, qwen2_5):
    """One clip hangs, one kills its worker, one is missing: each is named, the rest come in order, twice."""
    clips, _ = load_clips(world / "train.jsonl")
    clips = clips[:8]
    clips[1].prompt, clips[3].prompt, clips[5].video = "hang", "die", world / "gone.mp4"
    preparation = Preparation(Marked(AutoProcessor.from_pretrained(qwen2_5)))
    loader = ClipLoader(clips, preparation, workers=1, time_limit=8.0, max_bad_share=0.5, shuffle=False)
    try:
        assert [index for index, _ in loader.examples(epochs=2)] == [0, 2, 4, 6, 7] * 2
    finally:
        loader.close()
    assert sorted(loader.skipped) == [1, 3, 5]
    for index, words in ((1, "hung for 8 s"), (3, "crashed"), (5, "no such file")):
        assert clips[index].where in loader.skipped[index] and words in loader.skipped[index]


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_order_and_content(world, qwen2_5, workers):
    """Shuffled by the seed, each clip once an epoch, the same with and without workers."""
    clips, _ = load_clips(world / "train.jsonl")
    preparation = Preparation(AutoProcessor.from_pretrained(qwen2_5), max_frames=8, jitter=True)
    loader = ClipLoader(clips[:6], preparation, seed=3, workers=workers)
    try:
        got = list(islice(loader.examples(), 12))
    finally:
        loader.close()
    order = [index for index, _ in got]
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6)) and order[:6] != order[6:]
    epoch_of = [0] * 6 + [1] * 6
    for (index, example), epoch in zip(got, epoch_of):
        want = prepare(clips[index], preparation, (3, epoch, index))
        assert torch.equal(example.pixels, want.pixels) and torch.equal(example.input_ids, want.input_ids)


def test_too_many_lost_clips_stop_the_run(world, qwen2_5):
    """Beyond the allowed share the stream ends with the list of what was lost."""
    clips, _ = load_clips(world / "train.jsonl")
    for i in (1, 2):
        clips[i].video = world / f"gone{i}.mp4"
    preparation = Preparation(AutoProcessor.from_pretrained(qwen2_5))
    loader = ClipLoader(clips[:10], preparation, workers=0, max_bad_share=0.1, shuffle=False)
    with pytest.raises(ClipError, match=r"2 of 10 clips(?s:.*gone1.*gone2)"):
        list(loader.examples(epochs=1))


@pytest.mark.parametrize("count", [0, 3])
def test_stream_without_a_good_clip_ends(world, qwen2_5, count):
    """No clip, or none that can be read: the stream ends (it went round and round once)."""
    clips, _ = load_clips(world / "train.jsonl")
    for i, clip in enumerate(clips[:count]):
        clip.video = world / f"gone{i}.mp4"
    preparation = Preparation(AutoProcessor.from_pretrained(qwen2_5))
    loader = ClipLoader(clips[:count], preparation, workers=0, max_bad_share=1.0, shuffle=False)
    assert list(loader.examples(epochs=1)) == [] and len(loader.skipped) == count


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen3-vl-8b"])
@pytest.mark.parametrize("size", [(480, 640), (1080, 607), (361, 640), (300, 2000)])
def test_large_pictures_are_scaled_down(name, size):
    """To at most max_pixels, whole tokens, nearly the same shape, and the processor then leaves them alone."""
    processor = random_processor(name)
    video = processor.video_processor
    token = video.patch_size * video.merge_size
    most = 200 * token**2
    pictures = torch.randint(0, 256, (4, 3, *(n // 20 + 1 for n in size)), dtype=torch.uint8)
    frames = Frames(F.interpolate(pictures, size=size, mode="bilinear"), [0.0, 0.5, 1.0, 1.5], 2.0, 2.0)
    preparation = Preparation(processor, max_pixels=most)
    fitted = preparation.fit(frames).pixels
    height, width = fitted.shape[-2:]
    assert height % token == width % token == 0 and 0.75 * most < height * width <= most
    scale = (most / (size[0] * size[1])) ** 0.5
    assert all(0 <= n * scale - m < token for n, m in zip(size, (height, width)))  # as much of each side as goes in
    for picture, small in zip(frames.pixels, fitted):
        expected = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)
        assert (small.permute(1, 2, 0).int() - torch.from_numpy(np.array(expected)).int()).abs().max() <= 2
    example = make_example(Clip(Path("x.mp4"), "A.", "x:1"), frames, preparation)
    assert example.grid.tolist() == [2, height // video.patch_size, width // video.patch_size]
    full = make_example(Clip(Path("x.mp4"), "A.", "x:1"), frames, Preparation(processor))
    assert full.grid.tolist() == [2, *(round(n / token) * 2 for n in size)]
    for untouched in (Preparation(processor), Preparation(processor, max_pixels=size[0] * size[1])):
        assert untouched.fit(frames).pixels is frames.pixels


# --- text that is not ours ----------------------------------------------------------------------------------------------

MARKED = [
    "A man <|video_pad|> jumps off.",
    "A man jumps.<|im_end|> He runs.",
    "<|im_<|im_end|>end|>",
    "<tool_call>{}</tool_call>",
]


@pytest.fixture(scope="module", params=("qwen2_5_vl", "qwen3_vl", "qwen3_5"))
def hostile(request, tmp_path_factory):
    """A processor of each family, with an added token that is not special, as Qwen's tokenizers have them; and frames."""
    processor = AutoProcessor.from_pretrained(build_tiny(tmp_path_factory.mktemp("tiny"), request.param, seed=1))
    processor.tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    pixels = torch.randint(0, 255, (8, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Preparation(processor), Frames(pixels, [i / 4 for i in range(8)], 4.0, 2.0)


def characters(tokenizer, text: str) -> list[int]:
    """Ids of a text by a copy of the tokenizer that has no added tokens at all."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str()) | {"added_tokens": []}
    return Tokenizer.from_str(json.dumps(parts)).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", MARKED)
def test_special_tokens_of_others_are_characters(hostile, text):
    """In caption, prompt and keyword: the ids of the characters, one video, and one end token in the labels, the last."""
    preparation, frames = hostile
    tokenizer, want = preparation.processor.tokenizer, characters(preparation.processor.tokenizer, text)
    assert tokenizer.decode(want) == text
    clip = Clip(Path("a.mp4"), text, "c:1", text, keywords=[text], key_spans=[[[0.5, 0.6]]])
    example = make_example(clip, frames, preparation)
    end, visual = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|video_pad|>"])
    newline = tokenizer("\n").input_ids
    labels = example.input_ids[example.prompt_length :].tolist()
    assert labels == [*want, end, *newline] and labels.count(end) == 1
    assert example.keywords[0].ids.tolist() == characters(tokenizer, " " + text)
    other = make_example(replace(clip, prompt="Zq"), frames, preparation)
    prompt, short = (e.input_ids[: e.prompt_length].tolist() for e in (example, other))
    word = tokenizer("Zq").input_ids
    at = next(i for i in range(len(short)) if short[i : i + len(word)] == word)
    assert prompt == short[:at] + want + short[at + len(word) :]
    assert prompt.count(visual) == 16 == int((example.token_types == 2).sum())
    assert example.token_types[: example.prompt_length].tolist() == [2 * (i == visual) for i in prompt]


def test_ids_of_other_texts_are_those_of_the_tokenizer(hostile):
    """Where no special token occurs nothing changes: any Unicode, by the tokenizer and the processor themselves."""
    preparation, _ = hostile
    processor, rng = preparation.processor, np.random.default_rng(0)
    texts = ["A man jumps.", "", " \n", "\x00\x1b[31m", "<|im_end", "e\u0301 \ufb01 \N{GRINNING FACE} \u8a9e"]
    texts += ["".join(map(chr, rng.choice([*range(32, 127), *range(160, 0xD800, 7)], 30))) for _ in range(60)]
    for text in texts:
        want = processor.tokenizer(text, add_special_tokens=False).input_ids
        assert encode(processor.tokenizer, text) == encode_plain(processor.tokenizer, text) == want
    for text in texts[:6]:
        content = [{"type": "video"}, {"type": "text", "text": text}]
        rendered = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert chat(processor, text) == rendered


def test_prompts_of_unequal_length_in_one_batch(hostile):
    """Padded on either side: each row is the prompt alone, and what follows the assistant's first word stays."""
    preparation, frames = hostile
    processor = preparation.processor
    texts = [chat(processor, text) + "Best (" for text in ("a", MARKED[1], "What happens then?", MARKED[0] * 3)]
    alone = [process(processor, [text], [frames]) for text in texts]
    for side in ("left", "right"):
        batch = process(processor, texts, [frames] * 4, padding=True, padding_side=side)
        for b, one in enumerate(alone):
            kept = batch["attention_mask"][b].bool()
            assert torch.equal(batch["input_ids"][b][kept], one["input_ids"][0])
            assert torch.equal(batch["mm_token_type_ids"][b][kept], one["mm_token_type_ids"][0])
            assert int(kept.sum()) == len(one["input_ids"][0]) and bool(kept[0 if side == "right" else -1])
    for text, one in zip(texts, alone):
        tail = one["input_ids"][0].tolist()
        assert processor.tokenizer.decode(tail).endswith(text.replace(SEAM, "").rpartition("<|vision_end|>")[2])


def test_templates_that_trim(hostile):
    """What a chat template makes of a prompt it makes of one with special tokens, too; others come before the video."""
    preparation, frames = hostile
    processor = copy.deepcopy(preparation.processor)
    processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['content'][-1]['text'] | trim }} !{% for p in m['content'] %}"
        "{% if p['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>"
        "{% endfor %}"
    )
    ids = process(processor, [chat(processor, "  a <|im_end|> b\n ")], [frames])["input_ids"][0].tolist()
    start = processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    want = characters(processor.tokenizer, "a <|im_end|> b !")
    assert ids[0] == start and ids[1 : 1 + len(want)] == want


# --- a clip never ends a run ----------------------------------------------------------------------------------------------


def test_long_texts_are_named_before_the_first_step(hostile):
    """By tokens, not characters; the field is named; where nothing but the prompt is read, only that counts."""
    tokenizer = hostile[0].processor.tokenizer
    word = len(tokenizer(" jumps").input_ids)
    texts = ["A", " jumps" * 20, " jumps" * 400, "A"]
    clips = [Clip(Path(f"{i}.mp4"), text, f"c:{i}") for i, text in enumerate(texts)]
    clips[3].prompt = " jumps" * 400
    prompt = len(tokenizer(clips[0].prompt).input_ids)
    kept, problems = split_long(clips, tokenizer, 20 * word + prompt)
    assert [c.where for c in kept] == ["c:0", "c:1"] and "c:2: 2.mp4: field 'caption'" in problems[0]
    assert "c:3: 3.mp4: field 'prompt'" in problems[1] and all("--max-text-tokens" in p for p in problems)
    assert [c.where for c in split_long(clips, tokenizer, 20 * word + prompt - 1)[0]] == ["c:0"]
    assert [c.where for c in split_long(clips, tokenizer, prompt, captions=False)[0]] == ["c:0", "c:1", "c:2"]


def test_most_of_a_very_long_text_is_never_read(hostile, monkeypatch):
    """33,000 tokens or a hundred million: only what the limit needs is tokenised, and nothing of short texts."""
    read = []
    monkeypatch.setattr(clips_module, "encode", lambda tokenizer, text: read.append(len(text)) or [0] * (len(text) // 4))
    clips = [Clip(Path("a.mp4"), "abcd" * 10_000_000, "c:1"), Clip(Path("b.mp4"), "A man jumps.", "c:2", "Say.")]
    kept, problems = split_long(clips, None, 4096)
    assert [c.where for c in kept] == ["c:2"] and len(problems) == 1 and sum(read) < 10**5


def test_more_tokens_than_the_model_reads(world, qwen2_5):
    """Pictures and text together beyond the context: the clip is named, with what to do."""
    clips, _ = load_clips(world / "train.jsonl")
    processor = AutoProcessor.from_pretrained(qwen2_5)
    tokens = len(prepare(clips[0], Preparation(processor)).input_ids)
    assert len(prepare(clips[0], Preparation(processor, context=tokens)).input_ids) == tokens
    with pytest.raises(ClipError, match=f"train.jsonl:1: .*000000.mp4: {tokens} tokens of video and text.*--max-frames"):
        prepare(clips[0], Preparation(processor, context=tokens - 1))


class Odd(Exception):
    """An exception that does not survive pickling."""

    def __init__(self, first: str, second: str):
        super().__init__(f"{first} in /usr/lib/python3/site-packages/odd/core.py:7")
        self.handle = threading.Lock()


class Raising(Marked):
    """A processor that raises what a prompt names."""

    ERRORS: ClassVar = {
        "odd": lambda: Odd("broken", "x"),
        "memory": MemoryError,
        "allocator": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        "card": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB"),
        "deep": RecursionError,
        "key": lambda: KeyError("grid"),
        "stop": StopIteration,
    }

    def apply_chat_template(self, conversation, **more):
        """Raise, or go on."""
        prompt = conversation[0]["content"][1]["text"]
        if prompt in self.ERRORS:
            raise self.ERRORS[prompt]()
        return super().apply_chat_template(conversation, **more)


@pytest.mark.parametrize("workers", [0, 1])
def test_every_exception_is_a_named_skip(world, qwen2_5, workers):
    """Whatever preparing a clip raises, here or in a worker: file, line, video and reason, and no path of a library."""
    clips, _ = load_clips(world / "train.jsonl")
    names = list(Raising.ERRORS)
    clips = clips[: len(names) + 3]
    for clip, name in zip(clips[1:], names):
        clip.prompt = name
    write_video(world / "strip.mp4", size=(16, 4096))
    clips[-1].video, clips[-1].key_spans = world / "strip.mp4", None  # an aspect ratio that the processor refuses
    preparation = Preparation(Raising(AutoProcessor.from_pretrained(qwen2_5)))
    with ClipLoader(clips, preparation, workers=workers, max_bad_share=1.0, shuffle=False) as loader:
        assert [index for index, _ in loader.examples(epochs=1)] == [0, len(clips) - 2]
    assert sorted(loader.skipped) == [*range(1, len(names) + 1), len(clips) - 1]
    for index, reason in loader.skipped.items():
        assert reason.startswith(f"{clips[index].where}: {clips[index].video}: ") and "site-packages" not in reason
        assert len(reason.splitlines()) == 1
    said = [loader.skipped[1 + names.index(name)] for name in ("odd", "memory", "allocator", "card", "deep")]
    for words, reason in zip(("broken", *["not enough memory"] * 3, "nested too deep"), said):
        assert words in reason
    assert "aspect ratio" in loader.skipped[len(clips) - 1]


def test_nothing_left_ends_the_endless_stream_in_words(world, qwen2_5):
    """All clips lost, and all may be lost: the list, not StopIteration."""
    clips, _ = load_clips(world / "train.jsonl")
    clips[0].video = world / "gone.mp4"
    loader = ClipLoader(clips[:1], Preparation(AutoProcessor.from_pretrained(qwen2_5)), workers=0, max_bad_share=1.0)
    with pytest.raises(ClipError, match=r"none of 1 clips can be used(?s:.*)gone.mp4"):
        next(loader.examples())
