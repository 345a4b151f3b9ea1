"""Curation: from captions and videos to keywords, key spans and checks; the clips.jsonl that the train scripts read.

    captions.jsonl -> keywords -> frames -> key spans -> checks -> balance -> clips.jsonl, rejected.jsonl, report.html

    python -m data.curation.curate captions.jsonl curated        # grammar and motion: no model, no download
    python -m data.curation.curate captions.jsonl curated --finders self --model runs/sft
    python -m data.curation.curate captions.jsonl curated --finders motion clip --clip-model openai/clip-vit-base-patch32
    python train_sft.py --data curated/clips.jsonl --root VIDEOS

captions.jsonl has the lines that `data/clips.py` reads; `importers.py` makes them from sets that people have. What has
keywords keeps them. Work is done in parts of a few dozen lines, each written whole or not at all: after a kill the same
command continues with the first missing part, and ends with the same files, byte for byte. Every line of the input is in
clips.jsonl or in rejected.jsonl, with its reason.
"""

import hashlib
import itertools
import json
import os
import random
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import TimeoutError
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from pebble import ProcessExpired, ProcessPool
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import vp
from data import motion
from data.clips import named, parse_line, reason_of
from data.curation import finders
from data.curation.fingerprints import Seen, file_hash, fingerprint, plain_hash
from data.curation.keywords import (
    extract,
    keyword_prompt,
    looks_english,
    parse_keywords,
    rank,
    words_of_longest_sentence,
)
from data.curation.page import group_of, records_of, report
from data.decode import Video
from data.examples import Preparation, make_example
from data.files import VIDEO_ENDINGS, ClipError, changes, list_files, write_whole
from data.foreign import check_annotations
from data.loader import worker_context
from data.run.sheets import printable
from data.skim import choose_windows, motion_curve, skim
from data.video import Clip, Folder, Footage, Frames, part_of, read_clip, read_frames
from data.words import fold

LONGEST_CAPTION = 20_000  # characters; spaCy takes a megabyte of memory for every thousand
LONGEST_SENTENCE = 300  # words; three thousand in one sentence take minutes
REASONS = {
    "malformed": "the line cannot be read",
    "language": "the caption is not in English",
    "text too long": f"more than {LONGEST_CAPTION:,} characters, or {LONGEST_SENTENCE} words in a sentence of the caption",
    "no event in caption": "no verb of the caption names an event",
    "unreadable": "the video cannot be decoded",
    "too short": "shorter than --min-seconds",
    "too long": "longer than --max-seconds",
    "frozen": "nothing moves",
    "no event found": "nothing in the video is sudden enough (--min-confidence)",
    "event fills the clip": "more than --max-key-share of it is key: a twin has nothing to show instead",
    "twin looks like the full video": "what stands out hardly differs from its neighbours",
    "duplicate caption": "the same words as an earlier clip",
    "duplicate clip": "the same pictures as an earlier clip",
    "in a test set": "the file or its pictures are in --exclude",
    "not drawn": "its action or duration is full (--target)",
}

MOMENTS = 4  # of a long file, looked at closely
SIDE = 64  # what motion and pictures are judged on: the longer side, in pixels


@dataclass
class Settings:
    """Settings of `python -m data.curation.curate`."""

    captions: tyro.conf.Positional[Path]
    """Annotation file (JSONL): video and caption a line; what else `data/clips.py` knows is kept."""
    out: tyro.conf.Positional[Path]
    """Folder to write."""
    root: Path | None = None
    """Folder of the videos (default: the annotation file's)."""
    follow_links: bool = False
    """Read videos that are links to files outside the root, as all files of a hub cache are."""
    keywords: Literal["grammar", "model"] = "grammar"
    """Where keywords come from: the caption's grammar (spaCy), or the video-language model (--model)."""
    finders: tuple[Literal["motion", "clip", "self"], ...] = ("motion",)
    """What finds the key spans; several are combined."""
    model: str | None = None
    """Video-language model of --finders self and --keywords model."""
    clip_model: str | None = None
    """Image-text model of --finders clip: a transformers CLIP or SigLIP directory or hub name."""
    text_encoder: str | None = None
    """sentence-transformers model that ranks keywords (default: order of appearance)."""
    max_keywords: int = 3
    """Keywords a caption, at most."""
    fps: float = 12.0
    """Frames looked at a second."""
    max_frames: int = 96
    """Frames looked at in a clip, at most."""
    min_seconds: float = 1.0
    """Shortest clip."""
    max_seconds: float = 180.0
    """Longest clip."""
    skim: bool = False
    """Find the event of longer files by a skim, instead of leaving them out; train on them with --frames skim."""
    min_confidence: float = 0.3
    """Least confidence of a key span."""
    max_key_share: float = 0.85
    """Largest share of a clip that may be key."""
    min_change: float = 6.0
    """How much the twin must differ from the full video where it differs most (0 to 255)."""
    duplicate_bits: int = 3
    """Bits of 64 in which the perceptual hashes of the same pictures may differ."""
    exclude: tuple[Path, ...] = ()
    """Annotation files of test sets, or folders of videos: their clips are left out."""
    target: int | None = None
    """How many clips to draw, evenly over actions and durations (default: all that are good)."""
    workers: int = max(1, os.cpu_count() or 1)
    """Processes that decode (0: none, and no time limit; models always run in this one)."""
    time_limit: float = 60.0
    """Seconds after which a decoder counts as hung; its clip is rejected."""
    part_lines: int = 64
    """Lines a part: what a kill costs at most."""
    samples: int = 50
    """Clips shown in the report."""
    seed: int = 0
    """Seed of the draw and of the sample."""


# --- One clip -----------------------------------------------------------------------------------------------------


def twin_change(pixels: Tensor, key: Tensor, frames_per_slot: int) -> float:
    """How much the twin differs from the full video: the largest change of a block of a key frame, 0 to 255."""
    source = vp.twin_sources(key)
    if source is None:
        return 0.0
    slots = pixels.unflatten(0, (-1, frames_per_slot))
    change = motion.block_change(slots[key].flatten(0, 1), slots[source][key].flatten(0, 1)).amax(1)
    return float(change.max())


def inspect(clip: Clip, s: Settings, models: "Models | None" = None) -> dict:
    """Everything that is found out about one clip with keywords: a JSON record, `rejected` naming what is wrong with it."""
    try:
        with named(clip):
            return look_at(clip, s, models)
    except ClipError as error:
        return {"rejected": "unreadable", "detail": str(error)}


def look_at(clip: Clip, s: Settings, models: "Models | None") -> dict:
    """The same, for a clip that nothing goes wrong with. With --skim, a file that is too long to be looked at closely is
    skimmed, and its highest moments are looked at one by one, until one shows an event."""

    def moments(video: Video | Folder | Footage) -> tuple[float, list[list[float]]]:
        duration = part_of(clip, video)[1]
        if duration <= s.max_seconds or clip.key_spans:
            return duration, []
        pixels, times = skim(clip, video)
        return duration, choose_windows(motion_curve(pixels, times), times, MOMENTS, s.max_frames / s.fps, duration)

    duration, windows = read_clip(clip, moments) if s.skim else (0.0, [])
    record = None
    for begin, end in windows:
        near = replace(clip, start=clip.start + begin, end=clip.start + end)
        record = look_closely(near, s, models)
        record |= {"duration": round(duration, 3), "moment": [round(begin, 3), round(end, 3)]}
        spans = record.get("key_spans", [])  # from the beginning of the moment
        record["key_spans"] = [[[round(begin + t, 3) for t in x] for x in of_keyword] for of_keyword in spans]
        if "rejected" not in record:
            return record
    return record or look_closely(clip, s, models)


def look_closely(clip: Clip, s: Settings, models: "Models | None") -> dict:
    """The same, for a clip that is short enough."""
    frames_per_slot = 2
    side = SIDE if models is None else None  # models want to see more
    frames = read_frames(clip, s.max_frames, s.fps, frames_per_slot=frames_per_slot, side=side)
    pixels = motion.shrink(frames.pixels, SIDE)
    record = {"duration": round(frames.duration, 3)} | fingerprint(clip, pixels)
    if frames.duration < s.min_seconds:
        return record | {"rejected": "too short", "detail": f"{frames.duration:.2f} s"}
    if frames.duration > s.max_seconds:
        return record | {"rejected": "too long", "detail": f"{frames.duration:.2f} s"}
    if float(motion.block_change(pixels, pixels[:1]).max()) < 4:
        return record | {"rejected": "frozen", "detail": "no frame differs from the first"}
    evidence = []  # for each finder, of each keyword
    if "motion" in s.finders:
        evidence.append([motion.motion_evidence(pixels, frames.timestamps)] * len(clip.keywords))
    if "clip" in s.finders:
        evidence.append(finders.image_text_evidence(models.image_text, frames.pixels, clip.keywords))
    if "self" in s.finders:
        evidence.append(models.own_evidence(clip, frames))
    spans, curves, confidence, notes = [], [], [], []
    key = torch.zeros(len(frames.pixels) // frames_per_slot, dtype=torch.bool)
    given = clip.key_spans
    level = finders.peak_level(s.finders)
    for j, of_keyword in enumerate(zip(*evidence)):
        found = finders.combine(of_keyword) if len(of_keyword) > 1 else of_keyword[0]
        curve = found.curve.repeat_interleave(max(1, len(frames.pixels) // len(found.curve)))  # slots to frames
        found_spans = finders.spans_of(curve, frames.timestamps, frames.duration, frames_per_slot, level)
        spans.append(given[j] if given else found_spans)
        curves.append([round(float(x), 3) for x in curve / curve.max().clamp(min=1e-6)])
        confidence.append(1.0 if given else round(found.confidence, 4))
        notes += [note for note in found.notes if note not in notes]
        key |= vp.span_slots(spans[-1], frames.timestamps, frames_per_slot)
    kept = [j for j, (span, sure) in enumerate(zip(spans, confidence)) if span and sure >= s.min_confidence]
    share = float(key.float().mean())
    record |= {"key_spans": [[[round(t, 3) for t in x] for x in span] for span in spans], "confidence": confidence,
               "curves": curves, "key_share": round(share, 4), "notes": notes}  # fmt: skip
    if not kept:
        why = "; ".join(notes) or "no peak"
        return record | {"rejected": "no event found", "detail": f"confidence {max(confidence):.2f}: {why}"}
    if share > s.max_key_share:
        return record | {"rejected": "event fills the clip", "detail": f"{share:.0%} of the slots are key"}
    change = twin_change(pixels, key, frames_per_slot)
    if change < s.min_change:
        return record | {"rejected": "twin looks like the full video", "detail": f"largest change {change:.1f} of 255"}
    return record | {"kept": kept, "change": round(change, 2)}


class Models:
    """What needs a model: loaded once, used in the main process."""

    def __init__(self, s: Settings):
        self.image_text = finders.load_image_text(s.clip_model) if "clip" in s.finders else None
        self.lm = self.preparation = None
        if "self" in s.finders or s.keywords == "model":
            from safetensors.torch import load_file

            from data.run.models import find_checkpoint, load_model

            self.lm, processor = load_model(s.model)
            context = self.lm.config.text_config.max_position_embeddings
            self.preparation = Preparation(processor, s.max_frames, s.fps, context=context)
            heads = Path(find_checkpoint(s.model)) / "heads.safetensors"
            self.trained_heads = heads.exists()
            if self.trained_heads:
                self.lm.heads.load_state_dict(load_file(heads))

    def own_evidence(self, clip: Clip, frames: Frames) -> list[motion.Evidence]:
        """The video-language model's evidence of each keyword: by stage 1's heads if there are any."""
        everywhere = Clip(**vars(clip) | {"key_spans": [[[0.0, 1e-3]]] * len(clip.keywords)})  # not read here
        example = make_example(everywhere, frames, self.preparation)
        return (finders.head_evidence if self.trained_heads else finders.fall_evidence)(self.lm, example)

    def keywords(self, clip: Clip, limit: int, s: Settings) -> tuple[list, str]:
        """Keywords by asking the model, and why there are none."""
        asked = Clip(**vars(clip) | {"prompt": keyword_prompt(clip.caption), "keywords": [], "key_spans": None})
        with named(clip):
            frames = read_frames(asked, s.max_frames, s.fps, frames_per_slot=self.preparation.frames_per_slot)
            said = self.lm.describe([make_example(asked, frames, self.preparation)], twin=False, max_new_tokens=64)
        text = self.preparation.processor.batch_decode(said.tokens[0], skip_special_tokens=True)[0]
        return parse_keywords(text, clip.caption, limit)


# --- All clips: parts, each whole or not there --------------------------------------------------------------------


_settings: Settings | None = None  # of a worker process


def _start_worker(s: Settings) -> None:
    global _settings
    torch.set_num_threads(1)
    _settings = s


def _work(clip: Clip) -> dict:
    return inspect(clip, _settings)


def in_order(pool: ProcessPool | None, clips: Sequence[Clip], s: Settings, models: Models | None) -> Iterator[dict]:
    """The record of each clip, in order; a worker that hangs or dies costs its clip only."""
    ahead: deque = deque()
    waiting = iter(clips)
    while True:
        while len(ahead) < 4 * max(1, s.workers) and (clip := next(waiting, None)) is not None:
            future = None if pool is None else pool.schedule(_work, args=(clip,), timeout=s.time_limit)
            ahead.append((clip, future))
        if not ahead:
            return
        clip, future = ahead.popleft()
        try:
            record = inspect(clip, s, models) if future is None else future.result()
        except TimeoutError:
            record = {
                "rejected": "unreadable",
                "detail": f"{clip.where}: {clip.video}: hung for {s.time_limit:g} s, stopped",
            }
        except ProcessExpired as error:
            detail = f"{clip.where}: {clip.video}: the decoder crashed (exit code {error.exitcode})"
            record = {"rejected": "unreadable", "detail": detail}
        except Exception as error:  # what a worker did not tell in words
            record = {"rejected": "unreadable", "detail": f"{clip.where}: {clip.video}: {reason_of(error)}"}
        yield record


def read_part(lines: Sequence[tuple[int, str]], s: Settings, root: Path, pool, models: Models | None, encoder) -> str:
    """The records of some lines of the input, as JSONL."""
    records: list[dict] = []
    clips: list[Clip | None] = []
    for number, text in lines:
        try:
            clips.append(parse_line(text, f"{s.captions}:{number}", root, s.follow_links))
            records.append({"line": number, "source": json.loads(text)})
        except ClipError as error:
            clips.append(None)
            records.append({"line": number, "source": text[:2000], "rejected": "malformed", "detail": str(error)})
    bare = [i for i, clip in enumerate(clips) if clip is not None and not clip.keywords]
    for i in bare:
        if len(clips[i].caption) > LONGEST_CAPTION:
            records[i] |= {"rejected": "text too long", "detail": f"{len(clips[i].caption)} characters"}
        elif (length := words_of_longest_sentence(clips[i].caption)) > LONGEST_SENTENCE:
            records[i] |= {"rejected": "text too long", "detail": f"a sentence of {length} words"}
        elif not looks_english(clips[i].caption):
            records[i] |= {"rejected": "language", "detail": clips[i].caption[:200]}
    bare = [i for i in bare if "rejected" not in records[i]]
    if s.keywords == "grammar":
        found = rank(extract([clips[i].caption for i in bare]), encoder, s.max_keywords) if bare else []
        why = [""] * len(bare)
    else:
        found, why = [], []
        for i in bare:
            try:
                keywords, reason = models.keywords(clips[i], s.max_keywords, s)
            except ClipError as error:
                keywords, reason = [], str(error)
            found.append(keywords)
            why.append(reason)
    for i, keywords, reason in zip(bare, found, why):
        if not keywords:
            detail = reason or clips[i].caption[:200]
            records[i] |= {"rejected": "no event in caption", "detail": detail}
        clips[i].keywords = [k.text for k in keywords]
        records[i]["lemmas"] = [k.lemma for k in keywords]
    going = [i for i, record in enumerate(records) if "rejected" not in record]
    for i in going:
        records[i]["keywords"] = clips[i].keywords
        records[i].setdefault("lemmas", [k.split()[0].lower() for k in clips[i].keywords])
    for i, record in zip(going, in_order(pool, [clips[i] for i in going], s, models)):
        records[i] |= record
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of every line that is not empty; bytes that are not UTF-8 are kept as replacement characters."""
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace").strip()
            if text:
                yield number, text


def make_parts(s: Settings, console: Console) -> list[Path]:
    """Write every part that is not there yet; returns all of them in order."""
    folder, root = s.out / "parts", s.root or s.captions.parent
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(1 for _ in lines_of(s.captions))
    models = Models(s) if set(s.finders) & {"clip", "self"} or s.keywords == "model" else None
    encoder = None
    if s.text_encoder:
        from sentence_transformers import SentenceTransformer

        encoder = SentenceTransformer(s.text_encoder, trust_remote_code=False)
    pool = None
    if s.workers and not set(s.finders) & {"clip", "self"}:
        os.environ["PYTHONWARNINGS"] = "ignore::RuntimeWarning:runpy"  # workers look at the main module once more
        pool = ProcessPool(
            s.workers, initializer=_start_worker, initargs=(s,), context=worker_context("data.curation.curate")
        )
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    parts = []
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("curating", total=total)
            lines = lines_of(s.captions)
            while batch := list(itertools.islice(lines, s.part_lines)):
                path = folder / f"{batch[0][0]:09d}.jsonl"
                if not path.exists():
                    write_whole(path, read_part(batch, s, root, pool, models, encoder))
                parts.append(path)
                progress.advance(task, len(batch))
    finally:
        if pool is not None:
            pool.stop()
            pool.join()
    return parts


def check_same_run(s: Settings) -> None:
    """Parts of other settings or of another input are never mixed: refuse, and say what differs."""
    about = {k: v for k, v in asdict(s).items() if k not in ("out", "workers", "time_limit", "samples", "target", "seed",
             "exclude", "duplicate_bits")}  # fmt: skip
    about = json.loads(json.dumps(about | {"input": file_hash(s.captions)}, default=str))
    path = s.out / "settings.json"
    if path.exists():
        if changed := changes(json.loads(path.read_text()), about):
            raise ValueError(
                f"{s.out}: holds another curation ({'; '.join(changed)}). Choose another folder, or delete this one."
            )
    else:
        s.out.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(about, indent=1) + "\n")


# --- Checks among clips, and the draw -----------------------------------------------------------------------------


def excluded_clips(s: Settings) -> tuple[set[str], Seen]:
    """File hashes and perceptual hashes of what --exclude names."""
    files, seen = set(), Seen(s.duplicate_bits)
    for path in s.exclude:
        if path.is_dir():
            below = list_files(path, VIDEO_ENDINGS, follow_links=True).files  # whatever is a copy is to be left out
            videos = [Clip(path / v, "", str(path / v)) for v in below]
        else:
            check_annotations(path, path.parent, s.follow_links)
            videos = [parse_line(text, f"{path}:{n}", path.parent, s.follow_links) for n, text in lines_of(path)]
        for clip in videos:
            try:
                with named(clip):
                    about = fingerprint(clip, read_frames(clip, s.max_frames, s.fps, side=SIDE).pixels.float())
            except ClipError as error:
                raise ClipError(f"--exclude: {error}") from None
            files.add(about["sha256"])
            if not plain_hash(about["hashes"]):
                seen.add(about, clip.where)
    return files, seen


def quota(counts: Counter, target: int) -> int:
    """The largest number a group that keeps the whole at or under the target.

    >>> quota(Counter(a=10, b=2, c=1), 7)
    4
    """
    level = 0
    while sum(min(n, level + 1) for n in counts.values()) <= target and level < max(counts.values(), default=0):
        level += 1
    return level


def judge(parts: Sequence[Path], s: Settings, console: Console) -> dict[int, tuple[str, str]]:
    """Line numbers of clips that are good by themselves but not beside others, with reason and detail."""
    files, excluded = excluded_clips(s)
    captions: dict[str, int] = {}
    seen, lost, groups = Seen(s.duplicate_bits), {}, defaultdict(list)
    for record in records_of(parts):
        if "rejected" in record:
            continue
        line, where = record["line"], f"{s.captions}:{record['line']}"
        words = " ".join(fold(record["source"]["caption"]).split())
        digest = hashlib.sha256(words.encode()).hexdigest()[:16]
        same = excluded.find(record)
        plain = plain_hash(record["hashes"])
        if record["sha256"] in files or (same and not plain):
            lost[line] = ("in a test set", f"the same as {same or 'a file of --exclude'}")
        elif digest in captions:
            lost[line] = ("duplicate caption", f"the same as {s.captions}:{captions[digest]}")
        elif not plain and (same := seen.find(record)):
            lost[line] = ("duplicate clip", f"the same as {same}")
        else:
            captions[digest] = line
            seen.add(record, where)
            groups[group_of(record)].append(line)
    if s.target is not None:
        counts = Counter({group: len(lines) for group, lines in groups.items()})
        level = quota(counts, s.target)
        for group, lines in sorted(groups.items()):
            drawn = set(random.Random(f"{s.seed} {group}").sample(lines, min(level, len(lines))))
            for line in lines:
                if line not in drawn:
                    lost[line] = ("not drawn", f"{group[0]}, {group[1]}: {len(lines)} clips, {level} drawn")
        total = sum(min(n, level) for n in counts.values())
        console.print(f"{total} of {s.target} clips drawn, at most {level} of an action in a duration")
        if total < s.target:
            scarce = ", ".join(f"{a} {d}: {n}" for (a, d), n in sorted(counts.items(), key=lambda x: (x[1], x[0]))[:8])
            console.print(f"[yellow]{s.target - total} are missing; scarcest: {escape(printable(scarce))}")
    return lost


def finish(parts: Sequence[Path], s: Settings, console: Console) -> Counter:
    """Write clips.jsonl, rejected.jsonl and report.html; returns how many clips there are for each reason, and "kept"."""
    lost, counts = judge(parts, s, console), Counter()
    partial = {name: s.out / f".{name}.{os.getpid()}" for name in ("clips.jsonl", "rejected.jsonl")}
    with partial["clips.jsonl"].open("w") as clips, partial["rejected.jsonl"].open("w") as rejected:
        for record in records_of(parts):
            if record["line"] in lost:
                record["rejected"], record["detail"] = lost[record["line"]]
            if reason := record.get("rejected"):
                counts[reason] += 1
                about = {"line": record["line"], "reason": reason, "detail": record["detail"], "source": record["source"]}
                rejected.write(json.dumps(about, ensure_ascii=False) + "\n")
                continue
            counts["kept"] += 1
            line = {k: v for k, v in record["source"].items() if k not in ("keywords", "key_spans")}
            line |= {name: [record[name][j] for j in record["kept"]] for name in ("keywords", "key_spans")}
            clips.write(json.dumps(line, ensure_ascii=False) + "\n")
    for name, path in partial.items():
        os.replace(path, s.out / name)
    write_whole(s.out / "report.html", report(parts, lost, counts, asdict(s)))
    return counts


def main(s: Settings, console: Console | None = None) -> Counter:
    """Curate; returns the counts."""
    console = console or Console(emoji=False)
    check_annotations(s.captions, s.root or s.captions.parent, s.follow_links)
    if not s.finders:
        raise ValueError("--finders: name at least one of motion, clip, self")
    for needs, name in ((s.keywords == "model" or "self" in s.finders, "model"), ("clip" in s.finders, "clip_model")):
        if needs and getattr(s, name) is None:
            raise ValueError(f"--{name.replace('_', '-')}: this choice of --finders or --keywords needs it")
    check_same_run(s)
    counts = finish(make_parts(s, console), s, console)
    table = Table(title=f"{counts['kept']} of {counts.total()} clips kept")
    for column in ("rejected", "clips", "what it means"):
        table.add_column(column)
    for reason, count in sorted(counts.items(), key=lambda x: (-x[1], x[0])):
        if reason != "kept":
            table.add_row(reason, str(count), REASONS[reason])
    console.print(table)
    root = f"{s.root or s.captions.parent}" + " --follow-links" * s.follow_links
    command = f"python train_sft.py --data {s.out / 'clips.jsonl'} --root {root}"
    console.print(f"{s.out / 'report.html'}\n{command}", highlight=False, markup=False, soft_wrap=True)
    return counts


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except (ClipError, ValueError) as error:
        sys.exit(f"error: {error}")
