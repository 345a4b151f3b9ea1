"""Clips: read an annotation file, check it, decode the sampled frames, and make examples for a model.

An annotation file is JSONL, one clip a line:

    {"video": "a/b.mp4", "caption": "A man stands by a wall. He jumps off it.", "keywords": ["jumps off"],
     "key_spans": [[1.2, 1.9]]}

`video` (a path below the root: the file's own folder unless told otherwise) and `caption` must be there. Optional:
`prompt`; `start` and `end`, seconds of the part to use; `keywords`, event-action phrases; `key_spans`, for each keyword
its [start, end] in seconds from the beginning of the part, or a list of them; `truth`, which only evaluation reads;
`frames_per_second`, if `video` is a folder of numbered pictures (00001.jpg and on).
Keywords without key spans get theirs from `data.key_slots.find_key_slots`.

What is wrong with a line or a file never stops a run and never passes in silence: it is skipped, named and counted.
"""

import difflib
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import vp
from data.cache import cached
from data.files import ClipError, PathError, inside_root, is_number
from data.foreign import check_annotations, other_fields
from data.key_slots import find_key_slots
from data.skim import Look, Sizes, Skim, look
from data.user_text import SEAM, disarm, encode, put_back, take_out
from data.video import PROMPT, Clip, Frames
from data.video import read_frames as read_frames  # who reads clips finds it here
from data.words import still_part

FIELDS = ("video", "caption", "prompt", "start", "end", "keywords", "key_spans", "truth", "frames_per_second")

# The words that other formats put where the video goes, like <video>, <|image|>, <|vision_start|>, <image-1>, <VideoHere>.
PLACEHOLDER = (
    r"<\|?/?(?:video|image|img|vid|vision|frame)s?(?:[ _-]?(?:\d+|pad|start|end|token|placeholder|here|context))*\s?/?\|?>"
)
# As such they are at the head or the end of a prompt, or have a line of their own.
PLACED = re.compile(rf"\A\s*{PLACEHOLDER}|{PLACEHOLDER}\s*\Z|^\s*{PLACEHOLDER}\s*$", re.IGNORECASE | re.MULTILINE)
SEAM_OF_RUNS = ["<|vision_end|>", "<|vision_start|>"]  # between two videos in a prompt
HALF_CHARACTERS = re.compile(r"[\ud800-\udfff]")  # surrogates, which are text in pairs only


def reason_of(error: BaseException) -> str:
    """What an exception says, in one short line without the paths of a library."""
    words = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in words:
        return "there is not enough memory for it; try a lower --max-pixels or --max-frames"
    if isinstance(error, RecursionError):
        return "something in it is nested too deep"
    words = re.sub(r"(?:/[\w.+-]+)*/(?:site-packages|dist-packages|torchcodec|__w)/\S*", "", words)
    return f"{words[:200] or type(error).__name__}"


@contextmanager
def named(clip: "Clip", what: str = "it cannot be used") -> Iterator[None]:
    """Whatever goes wrong with a clip in here is a ClipError with its place, its file, `what`, and the reason."""
    try:
        yield
    except ClipError:
        raise
    except Exception as error:
        raise ClipError(f"{clip.where}: {clip.video}: {what}: {reason_of(error)}") from None


# --- The annotation file ------------------------------------------------------------------------------------------------


def read_record(line: str, where: str) -> dict:
    """The JSON object of a line. Raises ClipError for anything else, for doubled keys, and for text that is no text."""
    doubled = []

    def check_pairs(pairs: list[tuple[str, object]]) -> dict:
        record = dict(pairs)
        if len(record) < len(pairs):
            names = [name for name, _ in pairs]
            doubled.extend(name for name in record if names.count(name) > 1)
        return record

    def read_integer(digits: str) -> float:
        return int(digits) if len(digits) < 300 else math.inf  # Python refuses to read very long ones

    try:
        record = json.loads(line, object_pairs_hook=check_pairs, parse_int=read_integer)
    except RecursionError:
        raise ClipError(
            f"{where}: not JSON that can be read (nested too deep); write one flat JSON object a line"
        ) from None
    except ValueError as error:
        raise ClipError(f"{where}: not JSON ({error}); write one JSON object a line") from None
    if not isinstance(record, dict):
        raise ClipError(f"{where}: found a JSON {type(record).__name__}; write one JSON object a line")
    if doubled:
        names = ", ".join(repr(name) for name in dict.fromkeys(doubled))
        raise ClipError(f"{where}: field {names} is given more than once; keep one of each")
    if "\\u" in line or HALF_CHARACTERS.search(line):
        for name, value in record.items():
            if HALF_CHARACTERS.search(name + json.dumps(value, ensure_ascii=False)):
                fix = "write the whole character (an emoji is a pair of surrogates), or leave it out"
                raise ClipError(f"{where}: field {name!r}: found half a character (a lone surrogate); {fix}")
    return record


def parse_line(line: str, where: str, root: Path, follow_links: bool = False) -> Clip:
    """Check one line. Raises ClipError naming the place, the field, what was found, and the fix.

    follow_links: links may leave the root, see `data.files.inside_root`.
    """
    try:
        return parse_record(read_record(line, where), where, root, follow_links)
    except RecursionError:
        raise ClipError(f"{where}: nested too deep; write one flat JSON object a line") from None


def is_truth(truth: object) -> bool:
    """Whether a `truth` field is complete: static, and all or none of actor, action and span (a clip without an event)."""
    if not isinstance(truth, dict) or not isinstance(truth.get("static"), str):
        return False
    if not truth.keys() & {"actor", "action", "span"}:
        return True
    span = truth.get("span")
    if not isinstance(span, list) or len(span) != 2 or not all(map(is_number, span)) or not 0 <= span[0] < span[1]:
        return False
    return isinstance(truth.get("actor"), str) and isinstance(truth.get("action"), str)


def parse_record(record: dict, where: str, root: Path, follow_links: bool = False) -> Clip:
    """The clip of a line's JSON object, see `parse_line`."""

    def wrong(name: str, found: object, fix: str) -> ClipError:
        shown = repr(found)
        return ClipError(f"{where}: field '{name}': found {shown[:80] + '...' * (len(shown) > 80)}; {fix}")

    if unknown := [name for name in record if name not in FIELDS]:
        near = {name: difflib.get_close_matches(name, FIELDS, 1) for name in unknown[:10]}
        hints = [f"did you mean '{near[name][0]}' for {name!r:.80}?" for name in near if near[name]]
        listed = ", ".join(f"{name!r:.80}" for name in unknown[:10]) + f" and {len(unknown) - 10} more" * (
            len(unknown) > 10
        )
        hints.append(f"known fields are {', '.join(FIELDS)}")
        names = f"field {listed} is unknown" if len(unknown) == 1 else f"fields {listed} are unknown"
        raise ClipError(f"{where}: {names}; {' '.join(hints)}")
    if missing := [f"'{name}'" for name in ("video", "caption") if name not in record]:
        what = f"field {missing[0]} is" if len(missing) == 1 else f"fields {' and '.join(missing)} are"
        raise ClipError(f"{where}: {what} missing; every clip needs a video and a caption")
    for name in ("video", "caption", "prompt"):
        if name in record and (not isinstance(record[name], str) or not record[name].strip()):
            raise wrong(name, record[name], "give a text that is not empty")
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in record["video"]):
        raise wrong("video", record["video"], "not a path (it holds a control character); rename the file")
    if found := PLACED.search(record.get("prompt", PROMPT)):
        raise wrong("prompt", found[0].strip(), "leave it out; the video is put before the prompt by itself")
    try:
        video = inside_root(record["video"], root, follow_links)
    except PathError as error:
        raise wrong("video", record["video"], str(error)) from None
    if record.get("start") is None:
        record["start"] = 0.0
    if not is_number(record["start"]) or record["start"] < 0:
        raise wrong("start", record["start"], "give seconds, 0 or more")
    end = record.get("end")
    if end is not None and (not is_number(end) or end <= record["start"]):
        raise wrong("end", end, f"give seconds, more than start ({record['start']})")
    keywords = [] if record.get("keywords") is None else record["keywords"]
    if not isinstance(keywords, list) or not all(isinstance(k, str) and k.strip() for k in keywords):
        raise wrong("keywords", keywords, 'give a list of phrases, like ["jumps off"]')
    spans = record.get("key_spans")
    if spans is not None:
        fix = "give for each keyword its [start, end] in seconds from the beginning of the part"
        if not isinstance(spans, list) or len(spans) != len(keywords):
            raise wrong("key_spans", spans, f"{fix}: {len(keywords)} of them")
        spans = [[s] if isinstance(s, list) and s and not isinstance(s[0], list) else s for s in spans]
        for span in itertools.chain.from_iterable(s if isinstance(s, list) and s else [s] for s in spans):
            if not isinstance(span, list) or len(span) != 2 or not all(map(is_number, span)):
                raise wrong("key_spans", span, fix)
            if not 0 <= span[0] < span[1]:
                raise wrong("key_spans", span, "the start must be 0 or more, and less than the end")
            if end is not None and span[0] >= end - record["start"]:
                raise wrong("key_spans", span, f"it lies outside the clip, which lasts {end - record['start']:g} s")
    rate = record.get("frames_per_second")
    if rate is not None and (not is_number(rate) or rate <= 0):
        raise wrong("frames_per_second", rate, "give a number above 0")
    if rate is not None and video.is_file():
        raise wrong("frames_per_second", rate, "a video file tells it; only a folder of numbered pictures needs it")
    truth = record.get("truth")
    if truth is not None and not is_truth(truth):
        fix = "give an object with the text static and, for an event, the texts actor and action and its span in seconds"
        raise wrong("truth", truth, fix)
    prompt = record.get("prompt", PROMPT)
    return Clip(video, record["caption"].strip(), where, prompt, record["start"], end, keywords, spans, truth, rate)


def count_tokens(tokenizer, text: str, limit: int) -> int:
    """Tokens of a text, or, if it has more than `limit`, a number above it: no more of it is read than that takes."""
    count = 0
    for i in range(0, len(text), 2**16):
        count += len(encode(tokenizer, text[i : i + 2**16]))
        if count > limit:
            break
    return count


def split_long(clips: Sequence[Clip], tokenizer, limit: int, captions: bool = True) -> tuple[list[Clip], list[str]]:
    """The clips whose prompt and caption have at most `limit` tokens together, and a message for each of the others.

    captions: count them; a model that only describes reads none. A text is tokenised only where its length leaves a
    doubt: a character is at most four bytes, and a token at least one.
    """

    def field_too_long(clip: Clip) -> str | None:
        texts = {"prompt": clip.prompt, "caption": clip.caption if captions else ""}
        left = limit
        if 4 * sum(map(len, texts.values())) > limit:
            for name, text in texts.items():
                left -= count_tokens(tokenizer, text, left)
                if left < 0:
                    return name
        return None

    kept, problems = [], []
    what = "prompt and caption have" if captions else "the prompt has"
    for clip in clips:
        if (name := field_too_long(clip)) is None:
            kept.append(clip)
        else:
            problems.append(
                f"{clip.where}: {clip.video}: field '{name}': {what} more than {limit} tokens; shorten it, or raise "
                "--max-text-tokens as far as the model's context allows"
            )
    return kept, problems


def load_clips(annotations: Path, root: Path | None = None, follow_links: bool = False) -> tuple[list[Clip], list[str]]:
    """Read an annotation file: its good clips, and a message for every line that had to be skipped.

    root: the folder that the `video` paths are relative to and cannot leave (default: the file's own folder), but by links
    with follow_links. Empty lines are allowed. Raises ClipError if the file itself cannot be read, is of another form (with
    the command that converts it), or holds no good clip at all.
    """
    annotations = Path(annotations)
    root = Path(root) if root is not None else annotations.parent
    check_annotations(annotations, root, follow_links)
    clips, problems = [], []
    with annotations.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{annotations}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    clips.append(parse_line(text, where, root, follow_links))
            except UnicodeDecodeError as error:
                problems.append(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8")
            except ClipError as error:
                problems.append(str(error))
    if not clips:
        shown = "\n  ".join(problems[:10]) or "it has no line"
        shown += other_fields(annotations, root, follow_links, FIELDS)
        raise ClipError(f"{annotations}: no usable clip among {len(problems)} lines:\n  {shown}")
    return clips, problems


# --- Examples ------------------------------------------------------------------------------------------------------------


@dataclass
class Preparation:
    """How clips become examples: the processor of the model, and the sampling. context: tokens that the model reads at
    most, text and video together. twin_captions: share of the clips that `show_twin` makes quiet ones of. visual_tokens: of
    a clip, at most; skim: how a long video is looked at (None: frames are sampled uniformly), see data/skim.py. cache: a
    folder for what was decoded, see data/cache.py."""

    processor: object
    max_frames: int = 16
    fps: float | None = None
    jitter: bool = False
    max_pixels: int | None = None
    context: int | None = None
    twin_captions: float = 0.0
    visual_tokens: int | None = None
    skim: Skim | None = None
    cache: Path | None = None
    known_sizes: dict[tuple[int, int], Sizes] = field(default_factory=dict, repr=False, compare=False)

    def check_length(self, clip: Clip, tokens: int) -> None:
        """Raise ClipError if a clip has more tokens than the model reads."""
        if self.context is not None and tokens > self.context:
            raise ClipError(
                f"{clip.where}: {clip.video}: {tokens} tokens of video and text, and the model reads {self.context}; "
                "lower --max-pixels or --max-frames, or shorten the text"
            )

    @property
    def frames_per_slot(self) -> int:
        """The vision encoder's temporal patch size; a frame, if a model has none."""
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

    def sizes(self, height: int, width: int) -> Sizes:
        """How the model sees pictures of a size, by what its processor makes of some; context at half that size."""
        if (height, width) not in self.known_sizes:
            video, step = self.processor.video_processor, self.frames_per_slot
            blank = Frames(torch.zeros(2 * step, 3, height, width, dtype=torch.uint8), [0.0] * 2 * step, 1.0, 1.0)
            made = video(videos=[self.fit(blank).pixels], do_sample_frames=False, return_tensors="pt")
            full = [int(n) * video.patch_size for n in made["video_grid_thw"][0, 1:]]
            token = video.patch_size * video.merge_size
            small = [max(token, n // 2 // token * token) for n in full]
            tokens = [math.prod(size) // token**2 for size in (full, small)]
            self.known_sizes[height, width] = Sizes(tuple(full), tuple(small), *tokens)
        return self.known_sizes[height, width]

    def look(self, clip: Clip, seed: Sequence[int] = ()) -> Look:
        """The frames that are shown of a clip, see `data.skim.look`. seed: (run, epoch, clip), of all that is drawn.

        With a cache, a clip keeps its first draw: the epoch does not count.
        """
        drawn = self.jitter or (self.skim is not None and self.skim.at_key_spans)
        if self.cache is None:
            rng = np.random.default_rng(seed) if drawn else None
            return look(clip, self.skim, self.sizes, self.frames_per_slot, self.max_frames, self.fps,
                        self.visual_tokens, rng, self.jitter)  # fmt: skip

        def make() -> Look:
            made = replace(self, cache=None).look(clip, seed[::2])
            if clip.key_spans is None and clip.keywords:  # found in the pictures as they are, before they are made small
                made.slots = found_slots(made, self.frames_per_slot)
            made.runs = made.runs if made.sized else [self.fit(made.runs[0])]
            return made

        video = self.processor.video_processor
        sees = [getattr(video, name, None) for name in ("size", "patch_size", "merge_size", "temporal_patch_size")]
        settings = [self.max_frames, self.fps, self.jitter, self.max_pixels, self.visual_tokens, self.skim]
        settings += [str(sees), clip.key_spans is None and bool(clip.keywords), [*seed[::2]] if drawn else None]
        settings += [clip.key_spans if self.skim is not None and self.skim.at_key_spans else None]
        return cached(self.cache, clip, settings, make)


def found_slots(look: Look, frames_per_slot: int = 2) -> Tensor:
    """The slots (S,) that look unlike those around them: of all, or, where a long video was skimmed, of the highest
    window."""
    if look.slots is not None:
        return look.slots
    if len(look.runs) == 1:
        return find_key_slots(look.runs[0].pixels, frames_per_slot)
    slots = torch.zeros(len(look.windows), dtype=torch.bool)
    slots[look.windows == sorted(look.spans).index(look.spans[0]) + 1] = find_key_slots(
        look.highest().pixels, frames_per_slot
    )
    return slots


def key_slots(clip: Clip, look: Look, frames_per_slot: int = 2) -> list[Tensor]:
    """The key slots (S,) bool of each keyword: from its key spans, or from the finder if there are none."""
    if clip.key_spans is not None:
        return [vp.span_slots(spans, look.timestamps, frames_per_slot, look.last) for spans in clip.key_spans]
    if not clip.keywords:
        return []
    return [found_slots(look, frames_per_slot)] * len(clip.keywords)


def chat(processor, prompt: str, num_videos: int = 1) -> str:
    """The text of a conversation up to where the assistant begins, with a place for each video.

    Special tokens that the prompt holds are disarmed, see data/user_text.py: `process` makes characters of them.
    """
    content = [{"type": "video"}] * num_videos + [{"type": "text", "text": disarm(processor, prompt)}]
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
    marked = any(SEAM in text for text in texts)  # a prompt holds special tokens that are text
    parts = [take_out(processor, text) if marked else (text, []) for text in texts]
    inputs = processor(text=[text for text, _ in parts], **shown, return_tensors="pt", **more)
    if marked:
        put_back(processor, inputs, [taken for _, taken in parts], more.get("padding_side", "right"))
    if "second_per_grid_ts" in inputs:  # the processor takes a repeated frame for one more, and a video for whole frames
        per_slot = processor.video_processor.temporal_patch_size
        inputs["second_per_grid_ts"] = torch.tensor([frames.seconds_per_slot(per_slot) for frames in videos])
    return inputs


def answer_ids(tokenizer, caption: str) -> list[int]:
    """Tokens of a caption as the assistant's answer, with its end."""
    return encode(tokenizer, caption) + tokenizer("<|im_end|>\n", add_special_tokens=False).input_ids


def process_look(processor, text: str, look: Look, preparation: Preparation) -> tuple[dict, dict]:
    """What the processor makes of a text with a place for each run of a look, and what an `Example` holds of its video.

    The processor takes each run for a video. That one ends where the next begins is taken out again, so that they are one.
    A model that writes a timestamp before each slot then reads what it would read of slots of one size.
    """
    if look.sized:
        inputs = process(processor, [text], look.runs, do_resize=False)
    else:
        inputs = process(processor, [text], [preparation.fit(frames) for frames in look.runs])
    if len(look.runs) > 1:
        ids, (end, start) = inputs["input_ids"][0], processor.tokenizer.convert_tokens_to_ids(SEAM_OF_RUNS)
        seam = (ids == end) & (ids.roll(-1) == start)
        kept = ~(seam | seam.roll(1))
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            inputs[name] = inputs[name][:, kept]
    seconds, grid = inputs.get("second_per_grid_ts"), inputs["video_grid_thw"]
    shown = {
        "pixels": inputs["pixel_values_videos"],
        "grid": grid[0] if len(grid) == 1 else grid,
        "seconds_per_slot": float(seconds.min()) if seconds is not None else 1.0,
    }
    if len(grid) > 1:
        begins = torch.tensor(look.timestamps[:: preparation.frames_per_slot], dtype=torch.float64)
        shown["slot_seconds"] = (begins - begins[0]).float()
    return inputs, shown


def make_example(clip: Clip, frames: Frames | Look, preparation: Preparation) -> vp.Example:
    """Tokens, patches, key slots and the twin's sources of one clip. The twin has no pixels: it is a gather."""
    processor, tokenizer = preparation.processor, preparation.processor.tokenizer
    look = frames if isinstance(frames, Look) else Look([frames])
    inputs, shown = process_look(processor, chat(processor, clip.prompt, len(look.runs)), look, preparation)
    prompt_ids, token_types = inputs["input_ids"][0], inputs["mm_token_type_ids"][0]
    answer = torch.tensor(answer_ids(tokenizer, clip.caption))
    preparation.check_length(clip, len(prompt_ids) + len(answer))
    slots = key_slots(clip, look, preparation.frames_per_slot)
    return vp.Example(
        name=clip.where,
        input_ids=torch.cat([prompt_ids, answer]),
        token_types=torch.cat([token_types, torch.zeros_like(answer)]),
        prompt_length=len(prompt_ids),
        **shown,
        source=vp.twin_sources(torch.stack(slots).any(0), look.windows) if slots else None,
        # with the leading space that the phrase has inside a caption: the tokens that the model will have to write
        keywords=[vp.Keyword(k, torch.tensor(encode(tokenizer, " " + k)), s) for k, s in zip(clip.keywords, slots)],
    )


def show_twin(example: vp.Example, clip: Clip, tokenizer) -> vp.Example:
    """A clip's twin as a clip of its own, in which nothing happens: its caption is the still part.

    Slots are encoded each by itself, so the twin's patches are a gather, too. An example without a twin, or whose caption
    cannot be cut, is left as it is.
    """
    still = still_part(clip.caption, clip.keywords)
    if example.source is None or not still or still == clip.caption:
        return example
    prompt = slice(0, example.prompt_length)
    answer = torch.tensor(answer_ids(tokenizer, still))
    runs = example.grid.view(-1, 3).tolist()  # slots of one size: (number, height, width in patches)
    patches = example.pixels.split([height * width for number, height, width in runs for _ in range(number)])
    return replace(
        example,
        input_ids=torch.cat([example.input_ids[prompt], answer]),
        token_types=torch.cat([example.token_types[prompt], torch.zeros_like(answer)]),
        pixels=torch.cat([patches[slot] for slot in example.source.tolist()]),
        source=None,
        keywords=[],
    )


def prepare(clip: Clip, preparation: Preparation, seed: Sequence[int] = ()) -> vp.Example:
    """Read and make one example; `seed` names the draw, so that jitter is the same on every run."""
    with named(clip):
        example = make_example(clip, preparation.look(clip, seed), preparation)
        if preparation.twin_captions and np.random.default_rng([*seed, 1]).random() < preparation.twin_captions:
            example = show_twin(example, clip, preparation.processor.tokenizer)
        return example
