"""Examples: a clip's frames, its tokens, its key slots and its twin, ready for a model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import vp
from data.cache import cached
from data.clips import named
from data.files import ClipError
from data.key_slots import find_key_slots
from data.look import Look, Sizes, look, twin_sources
from data.skim import Skim
from data.user_text import SEAM, disarm, encode, put_back, take_out
from data.video import Clip, Frames
from data.words import still_part

SEAM_OF_RUNS = ["<|vision_end|>", "<|vision_start|>"]  # between two videos in a prompt


@dataclass
class Preparation:
    """How clips become examples: the processor of the model, and the sampling. context: tokens that the model reads at
    most, text and video together. twin_captions: share of the clips that `show_twin` makes quiet ones of. visual_tokens: of
    a clip, at most; skim: how a long video is looked at (None: frames are sampled uniformly), see data/look.py. cache: a
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
        """The frames that are shown of a clip, see `data.look.look`. seed: (run, epoch, clip), of all that is drawn.

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
        source=twin_sources(torch.stack(slots).any(0), look.windows) if slots else None,
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
