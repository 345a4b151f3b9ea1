"""Clips: read an annotation file, check it, decode the sampled frames, and make examples for a model.

An annotation file is JSONL, one clip a line:

    {"video": "a/b.mp4", "caption": "A man stands by a wall. He jumps off it.", "keywords": ["jumps off"],
     "key_spans": [[1.2, 1.9]]}

`video` (a path below the root: the file's own folder unless told otherwise) and `caption` must be there. Optional:
`prompt`; `start` and `end`, seconds of the part to use; `keywords`, event-action phrases; `key_spans`, for each keyword
its [start, end] in seconds from the beginning of the part, or a list of them; `truth`, which only evaluation reads.
Keywords without key spans get theirs from `data.finders.find_key_slots`.

What is wrong with a line or a file never stops a run and never passes in silence: it is skipped, named and counted.
"""

import difflib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import vp
from data.finders import find_key_slots

PROMPT = "Describe the video."
FIELDS = ("video", "caption", "prompt", "start", "end", "keywords", "key_spans", "truth")


class ClipError(ValueError):
    """A clip that cannot be used, and why, in words for the person who made the annotation file."""


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
    frames_per_second: float | None = None  # where `video` is a folder of frames, 00001.jpg and on


@dataclass
class Frames:
    """Sampled frames: pixels (F, C, H, W) uint8, F a multiple of the slot's frames; timestamps (F,) s from the part's
    beginning; the video's average frames a second; the part's duration in s."""

    pixels: Tensor
    timestamps: list[float]
    fps: float
    duration: float


# --- The annotation file ------------------------------------------------------------------------------------------------


def is_number(value: object) -> bool:
    """A finite JSON number (true and false are none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def parse_line(line: str, where: str, root: Path) -> Clip:
    """Check one line. Raises ClipError naming the place, the field, what was found, and the mend."""

    def wrong(name: str, found: object, mend: str) -> ClipError:
        shown = repr(found)
        return ClipError(f"{where}: field '{name}': found {shown[:80] + '...' * (len(shown) > 80)}; {mend}")

    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ClipError(f"{where}: not JSON ({error}); write one JSON object a line") from None
    if not isinstance(record, dict):
        raise ClipError(f"{where}: found a JSON {type(record).__name__}; write one JSON object a line")
    for name in record:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"known fields are {', '.join(FIELDS)}"
            raise ClipError(f"{where}: field '{name}' is unknown; {hint}")
    for name in ("video", "caption"):
        if name not in record:
            raise ClipError(f"{where}: field '{name}' is missing; every clip needs a video and a caption")
    for name in ("video", "caption", "prompt"):
        if name in record and (not isinstance(record[name], str) or not record[name].strip()):
            raise wrong(name, record[name], "give a text that is not empty")
    try:
        video = (root / record["video"]).resolve()
    except (OSError, ValueError) as error:
        raise wrong("video", record["video"], f"not a path ({error})") from None
    if not video.is_relative_to(root.resolve()):
        raise wrong("video", record["video"], f"it leaves the root {root}; move it there or name another root")
    if record.get("start") is None:
        record["start"] = 0.0
    if not is_number(record["start"]) or record["start"] < 0:
        raise wrong("start", record["start"], "give seconds, 0 or more")
    end = record.get("end")
    if end is not None and (not is_number(end) or end <= record["start"]):
        raise wrong("end", end, f"give seconds, more than start ({record['start']})")
    keywords = record.get("keywords") or []
    if not isinstance(keywords, list) or not all(isinstance(k, str) and k.strip() for k in keywords):
        raise wrong("keywords", keywords, 'give a list of phrases, like ["jumps off"]')
    spans = record.get("key_spans")
    if spans is not None:
        mend = "give for each keyword its [start, end] in seconds from the beginning of the part"
        if not isinstance(spans, list) or len(spans) != len(keywords):
            raise wrong("key_spans", spans, f"{mend}: {len(keywords)} of them")
        spans = [[s] if isinstance(s, list) and s and not isinstance(s[0], list) else s for s in spans]
        for span in itertools.chain.from_iterable(s if isinstance(s, list) and s else [s] for s in spans):
            if not isinstance(span, list) or len(span) != 2 or not all(map(is_number, span)):
                raise wrong("key_spans", span, mend)
            if not 0 <= span[0] < span[1]:
                raise wrong("key_spans", span, "the start must be 0 or more, and less than the end")
            if end is not None and span[0] >= end - record["start"]:
                raise wrong("key_spans", span, f"it lies outside the clip, which lasts {end - record['start']:g} s")
    truth = record.get("truth")
    if truth is not None:
        mend = "give an object with the texts actor, action and static, and span: [start, end] in seconds"
        if not isinstance(truth, dict) or not all(isinstance(truth.get(k), str) for k in ("actor", "action", "static")):
            raise wrong("truth", truth, mend)
        span = truth.get("span")
        if not isinstance(span, list) or len(span) != 2 or not all(map(is_number, span)) or not 0 <= span[0] < span[1]:
            raise wrong("truth", truth, mend)
    prompt = record.get("prompt", PROMPT)
    return Clip(video, record["caption"].strip(), where, prompt, record["start"], end, keywords, spans, truth)


def load_clips(annotations: Path, root: Path | None = None) -> tuple[list[Clip], list[str]]:
    """Read an annotation file: its good clips, and a message for every line that had to be skipped.

    root: the folder that the `video` paths are relative to and cannot leave (default: the file's own folder). Empty
    lines are allowed. Raises ClipError where the file itself cannot be read, or holds no good clip at all.
    """
    annotations = Path(annotations)
    root = Path(root) if root is not None else annotations.parent
    if not annotations.is_file():
        raise ClipError(f"{annotations}: no such file; give a JSONL file, one clip a line")
    clips, problems = [], []
    with annotations.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{annotations}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    clips.append(parse_line(text, where, root))
            except UnicodeDecodeError as error:
                problems.append(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8")
            except ClipError as error:
                problems.append(str(error))
    if not clips:
        shown = "\n  ".join(problems[:10]) or "it has no line"
        raise ClipError(f"{annotations}: no usable clip among {len(problems)} lines:\n  {shown}")
    return clips, problems


# --- Frames --------------------------------------------------------------------------------------------------------------


def sample_times(duration: float, count: int, rng: np.random.Generator | None = None, place: float = 0.5) -> list[float]:
    """One moment in each of `count` equal parts of [0, duration): at `place` in each, or, with rng, anywhere.

    >>> sample_times(2.0, 4), sample_times(2.0, 4, place=0.0)
    ([0.25, 0.75, 1.25, 1.75], [0.0, 0.5, 1.0, 1.5])
    """
    places = np.full(count, place) if rng is None else rng.uniform(0.02, 0.98, count)
    return ((np.arange(count) + places) * (duration / count)).tolist()


def list_frames(folder: Path) -> list[Path]:
    """The frames of a folder, in the order of their numbers: 00001.jpg, 00002.jpg and on."""
    numbered = [p for p in folder.iterdir() if p.stem.isdecimal() and p.suffix.lower() in (".jpg", ".jpeg", ".png")]
    return sorted(numbered, key=lambda p: int(p.stem))


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
    second. With rng, each moment is jittered inside its share. With side, pictures of a file are made that small, on
    their longer side, while they are decoded. An odd count is filled up to whole slots by showing the last frame again.
    Raises ClipError with the reason where there are not min_frames (default: two slots) frames, or where a key span lies
    behind the end.
    """
    from torchcodec.decoders import VideoDecoder  # late: what runs on synthetic input alone needs no FFmpeg
    from torchvision.io import ImageReadMode, decode_image

    path = clip.video
    if not path.exists():
        raise ClipError(f"{clip.where}: {path}: no such file")
    folder = path.is_dir() and clip.frames_per_second
    if not path.is_file() and not folder:
        raise ClipError(f"{clip.where}: {path}: not a regular file")
    if path.is_file() and path.stat().st_size == 0:
        raise ClipError(f"{clip.where}: {path}: the file is empty")
    try:
        if folder:
            pictures = list_frames(path)
            if not pictures:
                raise ClipError(f"{clip.where}: {path}: no picture called by a number, like 00001.jpg, is in it")
            begin, stop, native_fps = 0.0, len(pictures) / clip.frames_per_second, clip.frames_per_second
        else:
            # (F, H, W, C) is what the decoder makes, and what torch makes smaller fastest.
            decoder = VideoDecoder(path, dimension_order="NCHW" if side is None else "NHWC")
            about = decoder.metadata
            begin, stop, native_fps = about.begin_stream_seconds, about.end_stream_seconds, about.average_fps
        if not native_fps or begin is None or stop is None:
            raise ClipError(f"{clip.where}: {path}: the file does not tell its duration; re-encode it")
        duration = min(stop - begin, clip.end if clip.end is not None else math.inf) - clip.start
        if duration <= 0:
            raise ClipError(f"{clip.where}: field 'start': {clip.start:g} s, but {path} lasts {stop - begin:.2f} s")
        for span in itertools.chain.from_iterable(clip.key_spans or []):
            if span[0] >= duration:
                raise ClipError(f"{clip.where}: field 'key_spans': found {span}, but the clip lasts {duration:.2f} s")
        available, least = max(1, round(duration * native_fps)), min_frames or 2 * frames_per_slot
        if available < least:
            raise ClipError(f"{clip.where}: {path}: too short: {available} frame(s); need {least}")
        count = min(max_frames, available)
        if fps is not None:
            count = min(count, max(2 * frames_per_slot, round(duration * fps)))
        times = [begin + clip.start + t for t in sample_times(duration, count, rng, place)]
        if place == 0 and rng is None:  # where a frame begins: a little later, or rounding would show the frame before
            times = [t + 0.02 / native_fps for t in times]
        if folder:
            at = [min(int(t * native_fps), len(pictures) - 1) for t in times]
            pixels = torch.stack([decode_image(str(pictures[k]), ImageReadMode.RGB) for k in at])
            begins = torch.tensor(at, dtype=torch.float64) / native_fps
        elif side is None:
            decoded = decoder.get_frames_played_at(times)
            pixels, begins = decoded.data, decoded.pts_seconds
        else:
            pixels, begins = decode_small(decoder, times, side)
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        if isinstance(error, ClipError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ClipError(f"{clip.where}: {path}: cannot be decoded ({reason[:160]})") from None
    timestamps = (begins - begin - clip.start).clamp(min=0).tolist()
    if pad := -len(pixels) % frames_per_slot:
        pixels = torch.cat([pixels, pixels[-1:].expand(pad, -1, -1, -1)])
        timestamps += timestamps[-1:] * pad
    return Frames(pixels, timestamps, native_fps, duration)


def decode_small(decoder, times: Sequence[float], side: int) -> tuple[Tensor, Tensor]:
    """Frames (F, C, h, w) uint8, at most `side` on their longer side, and the seconds (F,) at which they begin to show.

    Decoded a few at a time: only small pictures are kept, and large ones do not leave the processor's cache.
    """
    pixels, seconds = [], []
    for i in range(0, len(times), 4):
        frames = decoder.get_frames_played_at(times[i : i + 4])
        large = frames.data.permute(0, 3, 1, 2)
        scale = min(1.0, side / max(large.shape[-2:]))
        size = [max(8, round(n * scale)) for n in large.shape[-2:]]
        pixels.append(F.interpolate(large, size=size, mode="bilinear", antialias=True) if scale < 1 else large)
        seconds.append(frames.pts_seconds)
    return torch.cat(pixels).contiguous(), torch.cat(seconds)


# --- Examples ------------------------------------------------------------------------------------------------------------


@dataclass
class Preparation:
    """How clips become examples: the processor of the model, and the sampling."""

    processor: object
    max_frames: int = 16
    fps: float | None = None
    jitter: bool = False
    max_pixels: int | None = None

    @property
    def frames_per_slot(self) -> int:
        """The vision encoder's temporal patch size; a frame, where a model has none."""
        return getattr(self.processor.video_processor, "temporal_patch_size", 1)

    def fit(self, frames: Frames) -> Frames:
        """Frames with pictures of at most max_pixels, whole tokens wide and high, so that the processor leaves their size
        alone; smaller ones as they are."""
        height, width = frames.pixels.shape[-2:]
        if self.max_pixels is None or height * width <= self.max_pixels:
            return frames
        video, scale = self.processor.video_processor, math.sqrt(self.max_pixels / (height * width))
        token = getattr(video, "patch_size", 1) * getattr(video, "merge_size", 1)
        size = [max(token, int(n * scale) // token * token) for n in (height, width)]
        return replace(frames, pixels=F.interpolate(frames.pixels, size=size, mode="bicubic", antialias=True))


def key_slots(clip: Clip, frames: Frames, frames_per_slot: int = 2) -> list[Tensor]:
    """The key slots (S,) bool of each keyword: from its key spans, or from the finder where there are none."""
    if clip.key_spans is not None:
        return [vp.span_slots(spans, frames.timestamps, frames_per_slot) for spans in clip.key_spans]
    if not clip.keywords:
        return []
    return [find_key_slots(frames.pixels, frames_per_slot)] * len(clip.keywords)


def chat(processor, prompt: str, num_videos: int = 1) -> str:
    """The text of a conversation up to where the assistant begins, with a place for each video."""
    content = [{"type": "video"}] * num_videos + [{"type": "text", "text": prompt}]
    conversation = [{"role": "user", "content": content}]
    return processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)


def process(processor, texts: list[str], videos: Sequence[Frames], **more):
    """What the processor makes of texts and the videos that they show; frames are already sampled."""
    metadata = [
        {
            "total_num_frames": max(1, round(frames.duration * frames.fps)),
            "fps": frames.fps,
            "duration": frames.duration,
            "frames_indices": [t * frames.fps for t in frames.timestamps],
        }
        for frames in videos
    ]
    pixels = [frames.pixels for frames in videos]
    shown = dict(videos=pixels, video_metadata=metadata, do_sample_frames=False)
    return processor(text=texts, **shown, return_tensors="pt", **more)


def make_example(clip: Clip, frames: Frames, preparation: Preparation) -> vp.Example:
    """Tokens, patches, key slots and the twin's sources of one clip. The twin has no pixels: it is a gather."""
    processor, tokenizer = preparation.processor, preparation.processor.tokenizer
    inputs = process(processor, [chat(processor, clip.prompt)], [preparation.fit(frames)])
    prompt_ids, token_types = inputs["input_ids"][0], inputs["mm_token_type_ids"][0]
    answer = torch.tensor(tokenizer(clip.caption + "<|im_end|>\n", add_special_tokens=False).input_ids)
    slots = key_slots(clip, frames, preparation.frames_per_slot)
    return vp.Example(
        name=clip.where,
        input_ids=torch.cat([prompt_ids, answer]),
        token_types=torch.cat([token_types, torch.zeros_like(answer)]),
        prompt_length=len(prompt_ids),
        pixels=inputs["pixel_values_videos"],
        grid=inputs["video_grid_thw"][0],
        seconds_per_slot=float(inputs["second_per_grid_ts"][0]) if "second_per_grid_ts" in inputs else 1.0,
        source=vp.twin_sources(torch.stack(slots).any(0)) if slots else None,
        keywords=clip.keywords,
        # with the leading space that the phrase has inside a caption: the tokens that the model will have to write
        keyword_ids=[torch.tensor(tokenizer(" " + k, add_special_tokens=False).input_ids) for k in clip.keywords],
        keyword_slots=slots,
    )


def prepare(clip: Clip, preparation: Preparation, seed: Sequence[int] = ()) -> vp.Example:
    """Read and make one example; `seed` names the draw, so that jitter is the same on every run."""
    rng = np.random.default_rng(seed) if preparation.jitter else None
    step = preparation.frames_per_slot
    return make_example(clip, read_frames(clip, preparation.max_frames, preparation.fps, rng, step), preparation)
