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
from dataclasses import asdict
from math import inf
from pathlib import Path

import torch
import tyro
from pebble import ProcessExpired, ProcessPool
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from data.checks import check_above_zero, check_within
from data.clips import named, parse_line, reason_of
from data.curation.fingerprints import Seen, file_hash, fingerprint, plain_hash
from data.curation.inspection import SIDE, Models, Settings, inspect
from data.curation.keywords import extract, looks_english, rank, words_of_longest_sentence
from data.curation.page import group_of, records_of, report
from data.files import VIDEO_ENDINGS, ClipError, changes, list_files, write_whole
from data.foreign import check_annotations
from data.run.sheets import printable
from data.video import Clip, read_frames
from data.words import fold
from data.workers import worker_context

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
    check_above_zero(s, "max_keywords", "fps", "max_frames", "target", "time_limit", "part_lines")
    check_within(s, 0, inf, "workers", "min_seconds", "min_confidence", "min_change", "duplicate_bits", "samples", "seed")
    check_within(s, 0, 1, "max_key_share")
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
    __spec__ = None  # else every worker warns that it loads this module twice
    try:
        main(tyro.cli(Settings, description=__doc__))
    except (ClipError, ValueError) as error:
        sys.exit(f"error: {error}")
