"""A part of a video with all questions about it, and what of it is shown to a model.

parts = group_questions(benchmark)                  # the questions of a benchmark, part by part
asked = make_asked(part, ...)                       # read, and made tokens: one prompt, and what differs behind it
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vp
from data.benchmarks.formats import Question
from data.benchmarks.questions import Benchmark, prompt
from data.clips import named, parse_record, read_record
from data.examples import Preparation, chat, process_look
from data.files import ClipError, read_lines
from data.foreign import check_annotations
from data.look import Look, twin_sources
from data.user_text import encode, encode_rendered
from data.video import Clip, Frames, part_of, read_clip, read_frames

NOT_SKIMMED = "windows and context can be shown to Qwen2.5-VL and Qwen3-VL only, and not as a pair; leave --frames out"
MOST = 32  # questions on one prefill: each adds a row to every step of decoding


@dataclass
class Part(Clip):
    """A part of a video and what is asked about it; caption, prompt and keywords of a Clip are not used.

    spans: key spans in seconds from the part's start. Of probes: footage, see `Clip`; pair: full video and twin are shown
    as two videos, the twin as number `pair`, 1 or 2.
    """

    questions: list[Question] = field(default_factory=list)
    spans: list[list[float]] = field(default_factory=list)
    pair: int | None = None


@dataclass
class Asked:
    """A part, made ready by a worker: for a model that shares prefixes an example and the tokens that follow its prompt,
    question by question; for others what is shown and the texts. share: the event's share of what is shown, or None."""

    has_twin: bool
    share: float | None
    example: vp.Example | None = None
    tails: list[Tensor] = field(default_factory=list)
    videos: list[Frames] = field(default_factory=list)
    twin_videos: list[Frames] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


# --- What is asked ------------------------------------------------------------------------------------------------------


def group_questions(benchmark: Benchmark, spans: Mapping[Path, list] | None = None) -> list[Part]:
    """The parts of videos that a benchmark asks about, in its order, each with at most MOST questions.

    spans: key spans by video, see `read_key_spans`, before those of the benchmark. Questions whose key spans differ are in
    different parts, since they have different twins.
    """
    groups: dict[tuple, list[Question]] = defaultdict(list)
    for q in benchmark.questions:
        start, key_spans = q.start or 0.0, q.key_spans or []
        if spans is not None and (found := spans.get(q.video.resolve())):
            key_spans = [[max(0.0, a - start), b - start] for a, b in found if b > start and (q.end is None or a < q.end)]
        groups[q.video, start, q.end, q.frames_per_second, json.dumps(key_spans)].append(q)
    parts = []
    for (video, start, end, rate, key_spans), questions in groups.items():
        for i in range(0, len(questions), MOST):
            some = questions[i : i + MOST]
            where = f"{benchmark.name}: {some[0].id}" + f" and {len(some) - 1} more questions" * (len(some) > 1)
            parts.append(
                Part(video, "", where, start=start, end=end, frames_per_second=rate, questions=some,
                     spans=json.loads(key_spans))
            )  # fmt: skip
    return parts


def read_key_spans(path: Path, root: Path, follow_links: bool = False) -> tuple[dict[Path, list], list[str]]:
    """Key spans by video, in seconds from the beginning of the file, and a message for each line that cannot be used.

    path: JSONL as data/curation/curate.py writes it, of which video, key_spans and start are used; videos are paths below
    root.
    """
    if not path.is_file():
        raise ClipError(f"--key-spans {path}: no such file; give lines with video and key_spans")
    check_annotations(path, root, follow_links)
    spans, problems = defaultdict(list), []
    for where, line in read_lines(path):
        try:
            record = read_record(line, where)
            if isinstance(record.get("key_spans"), list):
                record.setdefault("keywords", ["event"] * len(record["key_spans"]))
                record.setdefault("caption", "not given")
            clip = parse_record(record, where, root, follow_links)
            if not clip.key_spans:
                raise ClipError(f"{where}: field 'key_spans' is missing; give the seconds of the event, like [[1.2, 1.9]]")
            spans[clip.video.resolve()] += [[clip.start + a, clip.start + b] for a, b in itertools.chain(*clip.key_spans)]
        except ClipError as error:
            problems.append(str(error))
    return spans, problems


def room(hf: nn.Module, max_new_tokens: int) -> int | None:
    """Tokens that a prompt may have, so that the longest answer still fits into the model's context; None: not known."""
    context = getattr(hf.config.get_text_config(), "max_position_embeddings", None)
    return None if context is None else context - max_new_tokens


def leave_out_long(
    parts: Sequence[Part], benchmark: Benchmark, processor, limit: int | None
) -> tuple[list[Part], list[str]]:
    """The parts without the questions whose prompt has more than `limit` tokens beside the video, and a message for each
    of those. A part of which no question is left is left out."""
    if limit is None:
        return list(parts), []
    kept, problems = [], []
    for part in parts:
        questions = []
        for q in part.questions:
            length = len(encode(processor.tokenizer, "".join(prompt(benchmark, q, 0.0))))
            if length <= limit:
                questions.append(q)
            else:
                problems.append(
                    f"{benchmark.name}: {q.id}: its prompt has {length} tokens, more than {limit}; shorten it, or raise "
                    "--max-text-tokens if the model reads more"
                )
        kept += [replace(part, questions=questions)] if questions else []
    return kept, problems


# --- What is shown ------------------------------------------------------------------------------------------------------


def covered(spans: Sequence[Sequence[float]], start: float = 0.0, end: float = float("inf")) -> float:
    """Seconds of [start, end] that spans cover together.

    >>> covered([[1, 3], [2, 4], [9, 10]], 0, 9.5)
    3.5
    """
    seconds, at = 0.0, start
    for a, b in sorted(spans):
        a, b = max(a, at), min(b, end)
        seconds += max(0.0, b - a)
        at = max(at, b)
    return seconds


def join(clips: Sequence[Frames], size: Sequence[int]) -> Frames:
    """Clips one after another, as one video; pictures of another size are brought to `size` (height, width)."""
    pixels, timestamps, duration = [], [], 0.0
    for frames in clips:
        shown = frames.pixels
        if tuple(shown.shape[-2:]) != tuple(size):
            shown = F.interpolate(shown.float(), size=tuple(size), mode="bilinear", antialias=True).round().byte()
        pixels.append(shown)
        timestamps += [duration + t for t in frames.timestamps]
        duration += frames.duration
    num_frames = sum(frames.duration / frames.seconds_per_slot(1) for frames in clips)  # repeated ones not counted
    return Frames(torch.cat(pixels), timestamps, clips[0].fps, duration, duration / num_frames)


def look_at_part(part: Part, preparation: Preparation) -> tuple[Look, Tensor | None, float | None]:
    """The same as `read_part`, under a budget of visual tokens; footage is looked at as one video."""
    look, offset, seconds = preparation.look(part), 0.0, covered(part.spans)
    if part.footage:
        lengths = [read_clip(clip, partial(part_of, clip))[1] for clip in (replace(part, footage=[]), *part.footage)]
        offset = sum(lengths[1 : 1 + part.before])
        seconds = seconds or lengths[0]
    spans = [[a + offset, b + offset] for a, b in part.spans]
    slots = vp.span_slots(spans, look.timestamps, preparation.frames_per_slot, look.last)
    duration = look.runs[0].duration  # every run of frames has that of the whole
    return look, twin_sources(slots, look.windows), seconds / duration if seconds else None


def read_part(part: Part, benchmark: Benchmark, frames_per_slot: int) -> tuple[Frames, Tensor | None, float | None]:
    """What a part shows, the slots that its twin shows (None: no twin), and the share of it that is key."""
    read = partial(
        read_frames, max_frames=benchmark.num_frames, frames_per_slot=frames_per_slot, place=benchmark.place, min_frames=1
    )
    frames, offset, seconds = read(replace(part, footage=[])), 0.0, covered(part.spans)
    if part.footage:
        clips = [read(clip) for clip in part.footage]
        offset = sum(clip.duration for clip in clips[: part.before])
        clips = [*clips[: part.before], frames, *clips[part.before :]]
        seconds = seconds or frames.duration  # without key spans, the clip is the event
        frames = join(clips, frames.pixels.shape[-2:])
    spans = [[a + offset, b + offset] for a, b in part.spans]
    slots = vp.span_slots(spans, frames.timestamps, frames_per_slot)
    return frames, vp.twin_sources(slots), seconds / frames.duration if seconds else None


def make_twin(frames: Frames, source: Tensor, frames_per_slot: int) -> Frames:
    """The twin's frames, for models whose vision encoder looks beyond a slot."""
    at = (source[:, None] * frames_per_slot + torch.arange(frames_per_slot)).flatten()
    return replace(frames, pixels=frames.pixels[at])


def common_prefix(prompts: Sequence[Tensor]) -> int:
    """How many tokens all prompts begin with, at least one of each left over.

    >>> common_prefix([torch.tensor(x) for x in ([1, 2, 3, 4], [1, 2, 5], [1, 2, 3])]), common_prefix([torch.arange(3)])
    (2, 2)
    """
    shortest = min(map(len, prompts))
    rows = torch.stack([p[:shortest] for p in prompts])
    return min(int((rows == rows[0]).all(0).long().cumprod(0).sum()), shortest - 1)


def make_asked(
    part: Part, preparation: Preparation, seed: object, benchmark: Benchmark, share_prefix: bool, twin: bool
) -> Asked:
    """Read a part and make its prompts: what a worker does. Raises ClipError if the part cannot be used."""
    processor, step = preparation.processor, preparation.frames_per_slot
    if preparation.skim is None and preparation.visual_tokens is None:
        frames, source, share = read_part(part, benchmark, step)
        look = Look([preparation.fit(frames)])
    else:
        look, source, share = look_at_part(part, preparation)
        if len(look.runs) > 1 and (not share_prefix or part.pair is not None):
            raise ClipError(f"{part.where}: {part.video}: {NOT_SKIMMED}")
    frames = look.runs[0]
    num_videos = len(look.runs) if part.pair is None else 2
    asked = [prompt(benchmark, q, frames.duration) if part.pair is None else (q.text, "") for q in part.questions]
    texts = [chat(processor, text, num_videos) + begin for text, begin in asked]
    if share_prefix and part.pair is None:
        with named(part, "the model's processor refuses it"):  # a picture of 3 x 900, say
            example, tails = share_prompt(texts, look, preparation)
        preparation.check_length(part, len(example.input_ids) + max(map(len, tails)))
        example = replace(example, name=part.where, source=source if twin else None)
        return Asked(source is not None, share, example, tails)
    twins = [] if source is None else [make_twin(frames, source, step)]
    if part.pair is None:
        return Asked(bool(twins), share, videos=[frames], twin_videos=twins if twin else [], texts=texts)
    if not twins:
        raise ClipError(f"{part.where}: {part.video}: no twin: its key spans {part.spans} hold no frame, or all")
    return Asked(True, share, videos=[*twins, frames] if part.pair == 1 else [frames, *twins], texts=texts)


def share_prompt(texts: Sequence[str], look: Look, preparation: Preparation) -> tuple[vp.Example, list[Tensor]]:
    """An example of what all prompts begin with, and the tokens that follow in each: the processor sees the video once.

    The tokens of prompt and tail together are those of the whole prompt: a special token ends the video, and nothing is
    merged across it. That is checked on the first prompt; if it did not hold, the processor would make each of them.
    """
    processor = preparation.processor
    inputs, shown = process_look(processor, texts[0], look, preparation)
    end = processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    first, types = inputs["input_ids"][0], inputs["mm_token_type_ids"][0]

    def split(ids: Tensor) -> tuple[Tensor, Tensor]:
        at = int((ids == end).nonzero()[-1]) + 1
        return ids[:at], ids[at:]

    prompts = [torch.cat([split(first)[0], split(torch.tensor(encode_rendered(processor.tokenizer, t)))[1]]) for t in texts]
    if not torch.equal(prompts[0], first):
        prompts = [process_look(processor, t, look, preparation)[0]["input_ids"][0] for t in texts]
    n = common_prefix(prompts)
    example = vp.Example(
        name="", input_ids=first[:n], token_types=types[:n], prompt_length=n, **shown, source=None, keywords=[],
    )  # fmt: skip
    return example, [p[n:] for p in prompts]
