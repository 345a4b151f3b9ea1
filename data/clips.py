"""Clips: read an annotation file, and check every line of it.

An annotation file is JSONL, one clip a line:

    {"video": "a/b.mp4", "caption": "A man stands by a wall. He jumps off it.", "keywords": ["jumps off"],
     "key_spans": [[1.2, 1.9]]}

`video` (a path below the root: the file's own folder unless told otherwise) and `caption` must be there. Optional:
`prompt`; `start` and `end`, seconds of the part to use; `keywords`, event-action phrases; `key_spans`, for each keyword
its [start, end] in seconds from the beginning of the part, or a list of them; `truth`, which only evaluation reads (the
text `static` and, of an event, `actor`, `action`, its `span` in seconds, and its `kind`, usual or rare);
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
from pathlib import Path

import torch

from data.files import ClipError, PathError, inside_root, is_number
from data.foreign import check_annotations, other_fields
from data.user_text import encode
from data.video import PROMPT, Clip

FIELDS = ("video", "caption", "prompt", "start", "end", "keywords", "key_spans", "truth", "frames_per_second")

# The words that other formats put where the video goes, like <video>, <|image|>, <|vision_start|>, <image-1>, <VideoHere>.
PLACEHOLDER = (
    r"<\|?/?(?:video|image|img|vid|vision|frame)s?(?:[ _-]?(?:\d+|pad|start|end|token|placeholder|here|context))*\s?/?\|?>"
)
# As such they are at the head or the end of a prompt, or have a line of their own.
PLACED = re.compile(rf"\A\s*{PLACEHOLDER}|{PLACEHOLDER}\s*\Z|^\s*{PLACEHOLDER}\s*$", re.IGNORECASE | re.MULTILINE)
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
