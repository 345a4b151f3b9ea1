"""Importers: captioned video sets that people have -> captions.jsonl, the annotation file of data/clips.py.

    python -m data.importers activitynet train.json --videos videos --out captions.jsonl
    python -m data.importers csv table.csv --videos videos --out captions.jsonl --video-column file --caption-column text
    python -m data.importers folder videos --videos videos --out captions.jsonl

One clip a line: `video` (relative to --videos, which is the `root` when the file is read), `caption`, and `start`, `end`,
`prompt` where the source has them. Sources keep their order. What cannot be imported is counted by reason and listed in
`<out stem>.rejected.jsonl`: place in the source, field, what was found, what to do. Nothing is dropped in silence.

Video files are found by name, whatever their extension and folder. Where the source names a folder too ("DoTA/VRU_1"),
the file must lie in a folder of that name. Links that leave --videos are not followed.
"""

import hashlib
import itertools
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.clips import ClipError, is_number
from data.files import Refuse, read_json, read_lines, read_objects, read_table, seconds

EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
Format = Literal[
    "activitynet",
    "charades",
    "charades-sta",
    "dream-1k",
    "motionbench",
    "vru-accident",
    "something-something",
    "csv",
    "folder",
]


@dataclass
class Settings:
    """Settings of an import."""

    format: tyro.conf.Positional[Format]
    """Form of the source."""
    source: tyro.conf.Positional[Path]
    """Annotation file; vru-accident: one, or the MetaData folder; folder: the one with the .txt files."""
    videos: Path
    """Folder below which the video files lie."""
    out: Path = Path("captions.jsonl")
    """Annotation file to write."""
    video_column: str = "video"
    """csv: column of the video's name or path."""
    caption_column: str = "caption"
    """csv: column of the caption."""
    start_column: str | None = None
    """csv: column of the start in seconds (default: start, where there is one)."""
    end_column: str | None = None
    """csv: column of the end in seconds (default: end, where there is one)."""


"""refuse(where, reason, field, found, mend) notes what cannot be imported."""


@dataclass
class Record:
    """A caption as the source has it, unchecked. names: our field -> the source's, for messages. other_name: tried where no
    file is called `video`. duration: of the whole video, in seconds; bounds `end`."""

    where: str
    video: object
    caption: object
    names: dict[str, str] = field(default_factory=dict)
    start: object = None
    end: object = None
    prompt: str | None = None
    duration: object = None
    other_name: str = ""


# --- Video files --------------------------------------------------------------------------------------------------------


def files_below(root: Path, suffixes: tuple[str, ...], notes: Counter) -> list[PurePosixPath]:
    """Files below root with these suffixes, sorted, relative to root; what is passed over is counted in notes."""
    found, real = [], root.resolve()
    for above, subfolders, names in os.walk(root):
        notes["links to folders, not followed"] += sum(Path(above, name).is_symlink() for name in subfolders)
        for path in (Path(above, name) for name in names if name.lower().endswith(suffixes)):
            if path.is_symlink() and not path.resolve().is_relative_to(real):
                notes["links that leave the folder, not followed"] += 1
            elif is_broken(str(path)):
                notes["file names that are not UTF-8"] += 1
            elif path.is_file():
                found.append(PurePosixPath(path.relative_to(root)))
    return sorted(found)


def is_broken(text: str) -> bool:
    """Whether a text cannot be written as UTF-8."""
    return re.search("[\ud800-\udfff]", text) is not None


def bare_name(name: str) -> str:
    """A file name without a video's extension, in one Unicode form (macOS writes another than most annotation files).

    >>> bare_name("a.b.MP4"), bare_name("a.b")
    ('a.b', 'a.b')
    """
    stem, extension = os.path.splitext(name)
    return unicodedata.normalize("NFC", stem if extension.lower() in EXTENSIONS else name)


class VideoIndex:
    """The video files below a folder, listed once. notes counts what was passed over."""

    def __init__(self, root: Path):
        self.notes, self.above = Counter(), root.resolve().parts
        self.files = files_below(root, EXTENSIONS, self.notes)
        if not self.files:
            raise ClipError(f"--videos {root}: no folder with video files ({' '.join(EXTENSIONS)}); name another")
        self.by_name: dict[str, list[PurePosixPath]] = {}
        for path in self.files:
            self.by_name.setdefault(bare_name(path.name), []).append(path)

    def shared_folders(self, a: PurePosixPath, b: PurePosixPath) -> int:
        """How many folders, counted upwards from the file, have the same name; those above the root count for b."""
        pairs = zip(reversed(a.parent.parts), reversed(self.above + b.parent.parts))
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

    def find(self, name: str, other_name: str = "") -> PurePosixPath | tuple[str, str]:
        """The one file that is meant, or the reason why there is none, and the mend."""
        wanted = PurePosixPath(name.strip().replace("\\", "/"))
        if wanted.is_absolute() or ".." in wanted.parts or re.match("[A-Za-z]:/", str(wanted)):
            return "path leaves the folder", "write it relative to --videos, without .."
        fits = self.by_name.get(bare_name(wanted.name)) or self.by_name.get(bare_name(other_name), [])
        if wanted in fits:
            return wanted
        if not fits:
            return "video missing", f"put the file below --videos ({' '.join(EXTENSIONS)}) or take the record out"
        best = max(self.shared_folders(wanted, path) for path in fits)
        if best == 0 and len(wanted.parts) > 1:
            return "video missing", f"no folder '{wanted.parent.name}' has it, but there is {fits[0]}; correct the path"
        fits = [path for path in fits if self.shared_folders(wanted, path) == best]
        fits = [path for path in fits if path.name == wanted.name] or fits
        if len(fits) > 1:
            return "several videos", f"name one of {', '.join(map(str, fits[:4]))} with its folder and extension"
        return fits[0]


# --- The formats --------------------------------------------------------------------------------------------------------


def activitynet(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """ActivityNet Captions, train.json, val_1.json, val_2.json: {"v_ID": {"duration": 82.7, "timestamps": [[0.8, 19.9],
    ...], "sentences": [" Text. ", ...]}}. A clip for each sentence. Files may be called v_ID or ID.

    Checked in ranjaykrishna/densevid_eval, evaluate.py (timestamps and sentences, paired by index); keys, "duration" and
    the blanks before sentences on entries that tychen-SJTU/MECD-Benchmark, captions/train.json, took over. The file itself
    was not at hand.
    """
    names = {"video": "key", "caption": "sentences", "start": "timestamps", "end": "timestamps"}
    for key, entry in read_json(s.source, dict, 'ActivityNet Captions: {"v_ID": {"duration", "timestamps", "sentences"}}'):
        where = f"{s.source.name}: {key}"
        spans, sentences = (entry.get(n) if isinstance(entry, dict) else None for n in ("timestamps", "sentences"))
        if not isinstance(spans, list) or not isinstance(sentences, list) or len(spans) != len(sentences) or not spans:
            refuse(where, "malformed record", "timestamps", entry, "give timestamps and sentences, lists of one length")
            continue
        other = key.removeprefix("v_") if key.startswith("v_") else f"v_{key}"
        for i, (span, sentence) in enumerate(zip(spans, sentences), 1):
            if isinstance(span, list) and len(span) == 2:
                place = f"{where}, sentence {i}"
                yield Record(place, key, sentence, names, *span, duration=entry.get("duration"), other_name=other)
            else:
                refuse(f"{where}, sentence {i}", "bad times", "timestamps", span, "give [start, end] in seconds")


def charades(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """Charades, Charades_v1_train.csv: id, ..., descriptions, actions ("c092 11.90 21.20;..."), length. `descriptions` are
    captions of the whole video, parted by ";": a clip for each. The action classes are no captions and are not read.

    Checked on rows of the file itself, of which DhanashreeA/KRProject, Charades/Charades_v1_train.csv, is a copy.
    """
    for where, row in read_table(s.source, ["id", "descriptions"], refuse):
        texts = [text for text in row.get("descriptions", "").split(";") if text.strip()] or [""]
        for i, text in enumerate(texts, 1):
            yield Record(f"{where}, description {i}", row["id"], text, {"video": "id", "caption": "descriptions"})


def charades_sta(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """Charades-STA, charades_sta_train.txt: lines "AO8RW 0.0 6.9##a person is putting a book on a shelf.".

    Checked in several public loaders that quote this line and split it so; the file, which the authors' jiyanggao/TALL
    links to and does not hold, was not at hand.
    """
    for where, line in read_lines(s.source):
        head, _, sentence = line.partition("##")
        if len(head.split()) == 3:
            video, start, end = head.split()
            yield Record(where, video, sentence, {"caption": "sentence"}, seconds(start), seconds(end))
        else:
            refuse(where, "malformed record", "", line, 'write "ID start end##sentence."')


def dream_1k(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """DREAM-1K, in the three forms it was published in: DREAM-1k.jsonl with "messages" (the caption is the assistant's
    "reference"), the earlier one with "text": {"prompt", "response"}, and metadata.json with "description" and
    "video_file". Files are called 1.mp4, ...: of a path, only the name counts.

    Checked on lines of the file itself in bytedance/tarsier, data/annotations/DREAM-1k.jsonl, at two commits (first two
    forms); the third on the fields that the card of the hub's dataset omni-research/DREAM-1K lists.
    """
    for where, entry in read_objects(s.source, "DREAM-1K: an object a line with messages, text or description", refuse):
        try:
            if "messages" in entry:
                turns = {m["role"]: next(p for p in m["content"] if p["type"] == "text") for m in entry["messages"]}
                name, caption, prompt = "messages", turns["assistant"]["reference"], turns["user"]["text"]
            elif "text" in entry:
                name, caption, prompt = "text", entry["text"]["response"], entry["text"]["prompt"]
            else:
                name, caption, prompt = "description", entry["description"], ""
            video = entry["vid"] if "vid" in entry else PurePosixPath(entry["video_file"]).name
            prompt = prompt.replace("<video>", "").strip() or None
        except (KeyError, TypeError, AttributeError, StopIteration):
            refuse(where, "malformed record", "", entry, "give vid, and a caption as in DREAM-1k.jsonl")
            continue
        yield Record(where, video, caption, {"video": "vid", "caption": name}, prompt=prompt)


def motionbench(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """MotionBench's caption training set, MotionBenchCaption-train/train.jsonl, videos in its folder videos/:
    {"video_path": "ID.mp4", "motion_caption": "Text."}.

    Checked: the files in the listing of the hub's dataset zai-org/MotionBench; the two fields only in one public loader of
    the set (class MotionBenchCaption, olmo/data/academic_video_datasets.py), as its own card does not name them.
    """
    names = {"video": "video_path", "caption": "motion_caption"}
    for where, entry in read_objects(s.source, "MotionBench captions: one object a line with motion_caption", refuse):
        yield Record(where, entry.get("video_path"), entry.get("motion_caption"), names)


def vru_accident(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """VRU-Accident, MetaData/S/S_Dense_Caption.json for each of four sources S: {"./VRU_videos/S/VRU_1": {"gt": "Text."}}.
    Names repeat between sources, so the folder S counts. SOURCE may be one file or the MetaData folder.

    Checked in Kimyounggun99/VRU-Accident: README.md (files), load_json_captions in utils/ ("gt"); the key, with or without
    .mp4, in public loaders of the files. The files themselves, on the hub, were not at hand.
    """
    sources = sorted(s.source.rglob("*_Dense_Caption.json")) if s.source.is_dir() else [s.source]
    if not sources:
        raise ClipError(f"{s.source}: no *_Dense_Caption.json below it; expected the MetaData folder of VRU-Accident")
    for path in sources:
        for key, entry in read_json(path, dict, 'VRU-Accident captions: {"./VRU_videos/S/VRU_1": {"gt": "Text."}}'):
            caption = entry.get("gt") if isinstance(entry, dict) else None
            yield Record(f"{path.name}: {key}", key, caption, {"video": "key", "caption": "gt"})


def something_something(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """Something-Something v2, train.json, validation.json: [{"id": "41775", "label": "moving drawer of night stand",
    "template": "Moving [part] of [something]", "placeholders": ["drawer", "night stand"]}, ...]. The label is the caption;
    test.json has none.

    Checked in facebookresearch/SlowFast, slowfast/datasets/ssv2.py (a list; id, template); that the label is the text and
    the template the class, with this example, in the card of the hub's dataset HuggingFaceM4/something_something_v2. The
    file, under a licence of its own, was not at hand.
    """
    for where, entry in read_objects(s.source, 'Something-Something v2: [{"id", "label", "template", ...}]', refuse):
        yield Record(where, entry.get("id"), entry.get("label"), {"video": "id", "caption": "label"})


def csv_table(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """A CSV file with a header, in UTF-8, parted by comma, semicolon, tab or |; the columns are named by flags."""
    start, end = s.start_column or "start", s.end_column or "end"
    names = {"video": s.video_column, "caption": s.caption_column, "start": start, "end": end}
    asked = [c for c in (s.video_column, s.caption_column, s.start_column, s.end_column) if c is not None]
    for where, row in read_table(s.source, asked, refuse):
        times = seconds(row.get(start)), seconds(row.get(end))
        yield Record(where, row.get(s.video_column), row.get(s.caption_column), names, *times)


def folder(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """Every video below --videos, its caption in a .txt of the same path and stem below SOURCE (mostly the same folder)."""
    texts = dict.fromkeys(files_below(s.source, (".txt",), Counter()), False)  # -> whether it has a video
    for video in files_below(s.videos, EXTENSIONS, Counter()):
        text = video.with_suffix(".txt")
        if text in texts:
            texts[text] = True
            yield Record(str(text), str(video), (s.source / text).read_text("utf-8-sig", errors="surrogateescape"))
        else:
            refuse(str(video), "caption empty", "caption", "no .txt of this name", f"write {text}, in UTF-8")
    for text in (text for text, used in texts.items() if not used):
        refuse(str(text), "video missing", "video", "no video of this name", "add the video, or take the .txt away")


IMPORTERS = {
    "activitynet": activitynet,
    "charades": charades,
    "charades-sta": charades_sta,
    "dream-1k": dream_1k,
    "motionbench": motionbench,
    "vru-accident": vru_accident,
    "something-something": something_something,
    "csv": csv_table,
    "folder": folder,
}


# --- The import ---------------------------------------------------------------------------------------------------------


def is_seconds(value: object) -> bool:
    """A finite number, 0 or more, that is no integer of hundreds of digits."""
    try:
        return is_number(value) and value >= 0
    except OverflowError:
        return False


def make_clip(record: Record, index: VideoIndex, refuse: Refuse) -> dict | None:
    """The line of a record, or None where it was refused. An end behind the video's duration is cut to it, and counted."""

    def reject(reason: str, name: str, found: object, mend: str) -> None:
        refuse(record.where, reason, record.names.get(name, name), found, mend)

    video = str(record.video) if isinstance(record.video, int) else record.video  # ids may be numbers
    for name, text in (("video", video), ("caption", record.caption), ("prompt", record.prompt)):
        if text is not None and (not isinstance(text, str) or is_broken(text)):
            return reject("malformed record", name, text, "give a text, in UTF-8")
    if not (record.caption or "").strip():
        return reject("caption empty", "caption", record.caption, "write a caption, or take the record out")
    if not (video or "").strip():
        return reject("malformed record", "video", video, "name the video")
    start, end, duration = record.start, record.end, record.duration
    for name, value in (("start", start), ("end", end), ("duration", duration)):
        if value is not None and not is_seconds(value):
            return reject("bad times", name, value, "give seconds, 0 or more")
    if end is not None and end <= (start or 0):
        return reject("bad times", "end", [start, end], "the end must be more than the start")
    if duration is not None and (start or 0) >= duration:
        return reject("bad times", "start", [start, end], f"the video lasts {duration:g} s")
    found = index.find(video, record.other_name)
    if isinstance(found, tuple):
        return reject(found[0], "video", video, found[1])
    if duration is not None and end is not None and end > duration:
        index.notes["ends cut to the video's duration"] += 1
        end = duration
    clip = {"video": str(found), "caption": record.caption.strip(), "start": start, "end": end, "prompt": record.prompt}
    return {name: value for name, value in clip.items() if value is not None}


def run_import(s: Settings, console: Console) -> int:
    """Write the clips to s.out and what was refused beside it, both when all is read. Returns the number of clips."""
    rejected = s.out.with_name(f"{s.out.stem}.rejected.jsonl")
    if not s.source.exists() or (s.source.is_dir() and s.format not in ("folder", "vru-accident")):
        raise ClipError(f"{s.source}: no such file; expected the annotation file of {s.format}")
    if any(path.exists() and path.samefile(s.source) for path in (s.out, rejected)):
        raise ClipError(f"--out {s.out}: would overwrite the source {s.source}; give another file")
    index, reasons, seen, videos = VideoIndex(s.videos), Counter(), {}, set()
    s.out.parent.mkdir(parents=True, exist_ok=True)
    parts = [path.with_name(path.name + ".part") for path in (s.out, rejected)]

    def refuse(where: str, reason: str, name: str, found: object, mend: str) -> None:
        reasons[reason] += 1
        shown = found if isinstance(found, str) else repr(found)
        shown = shown[:200] + "..." * (len(shown) > 200)
        line = {"where": where, "reason": reason, "field": name, "found": shown, "mend": mend}
        line = {key: text.encode("utf-8", "backslashreplace").decode() for key, text in line.items()}
        bad.write(json.dumps(line, ensure_ascii=False) + "\n")

    try:
        with parts[0].open("w", encoding="utf-8") as good, parts[1].open("w", encoding="utf-8") as bad:
            for record in IMPORTERS[s.format](s, refuse):
                clip = make_clip(record, index, refuse)
                line = json.dumps(clip, ensure_ascii=False)
                key = hashlib.blake2b(line.encode(), digest_size=16).digest()  # not the line: captions may be long
                if clip and key in seen:
                    refuse(record.where, "duplicate", "", line, f"nothing; it is the same as {seen[key]}")
                elif clip:
                    seen[key] = record.where
                    videos.add(clip["video"])
                    good.write(line + "\n")
        os.replace(parts[1], rejected)
        if seen:
            os.replace(parts[0], s.out)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    table = Table("records", "count", title=f"{s.format}: {escape(s.source.name)}", min_width=48)
    table.add_row("imported", str(len(seen)))
    for reason, count in sorted(reasons.items()):
        table.add_row(f"rejected: {reason}", str(count))
    table.add_row("videos with a clip", f"{len(videos)} of {len(index.files)}")
    for note, count in sorted((+index.notes).items()):
        table.add_row(note, str(count))
    console.print(table)
    if not seen:
        raise ClipError(f"{s.source}: no clip could be imported as {s.format}; see {rejected}")
    shown = escape(f"{s.out}, its videos relative to {s.videos}; rejected: {rejected}")
    console.print(shown, soft_wrap=True, highlight=False)
    return len(seen)


if __name__ == "__main__":
    try:
        run_import(tyro.cli(Settings, description=__doc__), Console())
    except (ClipError, OSError) as error:
        sys.exit(f"error: {error}")
