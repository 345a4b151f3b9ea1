"""Importers: captioned video sets that people have -> captions.jsonl, the annotation file of data/clips.py.

    python -m data.curation.importers llava conversations.json --videos videos --out clips.jsonl
    python -m data.curation.importers activitynet train.json --videos videos --out captions.jsonl
    python -m data.curation.importers csv table.csv --videos videos --out captions.jsonl --video-column v --caption-column c
    python -m data.curation.importers folder videos --videos videos --out captions.jsonl

llava, swift and messages are the chat files of other trainers (JSON or JSONL); json and parquet, records with
a field for the video and one for the caption.

One clip a line: `video` (relative to --videos, which is the `root` when the file is read), `caption`, and
`start`, `end`, `prompt` if the source has them. Sources keep their order. What cannot be imported is counted
by reason and listed in `<out stem>.rejected.jsonl`: place in the source, field, what was found, what to do.
Nothing is dropped in silence.

Video files are found by name, whatever their ending and folder. If the source names a folder too
("DoTA/VRU_1"), the file must be in a folder of that name. Links that leave --videos are followed with
--follow-links alone.
"""

import hashlib
import itertools
import json
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.chats import Unusable, chat_clip, video_path, without_mark
from data.clips import FIELDS, parse_line
from data.files import (
    COMMON_ENDINGS,
    VIDEO_ENDINGS,
    ClipError,
    PathError,
    Refuse,
    bare_name,
    inside_root,
    is_broken,
    is_seconds,
    list_files,
    path_below,
    read_json,
    read_lines,
    read_objects,
    read_table,
    seconds,
)

Format = Literal[
    "llava",
    "swift",
    "messages",
    "json",
    "parquet",
    "csv",
    "folder",
    "activitynet",
    "charades",
    "charades-sta",
    "dream-1k",
    "motionbench",
    "vru-accident",
    "something-something",
]


@dataclass
class Settings:
    """Settings of an import."""

    format: tyro.conf.Positional[Format]
    """Form of the source."""
    source: tyro.conf.Positional[Path]
    """Annotation file; vru-accident: one, or the MetaData folder; folder: the one with the .txt files."""
    videos: Annotated[Path, tyro.conf.arg(aliases=["--root"])]
    """Folder of the video files, which may be in folders below it."""
    out: Path = Path("captions.jsonl")
    """Annotation file to write."""
    video_column: str = "video"
    """csv, json, parquet: column of the video's name or path."""
    caption_column: str = "caption"
    """csv, json, parquet: column of the caption."""
    start_column: str | None = None
    """csv, json, parquet: column of the start in seconds (default: start, if there is one)."""
    end_column: str | None = None
    """csv, json, parquet: column of the end in seconds (default: end, if there is one)."""
    follow_links: bool = False
    """Follow links that leave --videos, as all files of a hub cache are."""


@dataclass
class Record:
    """A caption as the source has it, unchecked. names: our field -> the source's, for messages. other_name:
    tried if no file is called `video`. duration: of the whole video, in seconds; bounds `end`. more: further
    fields of clips.jsonl. notes: what is left out of it, to be counted."""

    where: str
    video: object
    caption: object
    names: dict[str, str] = field(default_factory=dict)
    start: object = None
    end: object = None
    prompt: str | None = None
    duration: object = None
    other_name: str = ""
    more: dict[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


# --- Video files --------------------------------------------------------------------------------------------------------


def opens(path: Path) -> bool:
    """Whether FFmpeg opens a file as a video; asked for files of an unknown ending, such as the blobs of a hub cache."""
    from torchcodec.decoders import VideoDecoder

    try:
        return VideoDecoder(path).metadata.width is not None
    except (RuntimeError, ValueError, OSError):
        return False


class VideoIndex:
    """The video files below a folder, listed once. notes counts what was passed over."""

    def __init__(self, root: Path, follow_links: bool = False):
        listing = list_files(root, VIDEO_ENDINGS, follow_links)
        self.root, self.follow_links, self.above = root, follow_links, root.resolve().parts
        self.files, self.links, self.notes = listing.files, listing.links, listing.notes
        if not self.files and self.links:
            found = (
                f"--videos {root}: it holds no video, but its {len(self.links)} links leave it, as those of a hub cache do"
            )
            raise ClipError(f"{found}; give --follow-links too")
        if not self.files and not any(path.is_file() and not path.suffix for path in root.rglob("*")):
            raise ClipError(
                f"--videos {root}: no folder with video files ({' '.join(VIDEO_ENDINGS[:8])} ...); name another"
            )
        self.known = set(self.files)
        self.by_name: dict[str, dict[PurePosixPath, None]] = {}
        for path in self.files:
            for name in (bare_name(path.name), unicodedata.normalize("NFC", path.name)):
                self.by_name.setdefault(name, {})[path] = None

    def shared_folders(self, a: PurePosixPath, b: PurePosixPath) -> int:
        """How many folders, counted upwards from the file, have the same name; those above the root count for b."""
        pairs = zip(reversed(a.parent.parts), reversed(self.above + b.parent.parts))
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

    def named(self, name: str) -> list[PurePosixPath]:
        """The files of a name, with or without its ending. Ids may have dots: "scene.264" is scene.264.mp4, too."""
        whole = unicodedata.normalize("NFC", name)
        return list(self.by_name.get(whole, {}) | self.by_name.get(bare_name(name), {}))

    def find(self, name: str, other_name: str = "", folder: bool = False) -> PurePosixPath | tuple[str, str]:
        """The one file that is meant, or the reason why there is none, and the fix. folder: a folder of frames is meant."""
        try:
            wanted = PurePosixPath(Path(path_below(name.strip(), self.root)))
            exact = inside_root(name.strip(), self.root, self.follow_links)
        except PathError as error:
            return "path leaves the folder" if error.leaves else "video missing", str(error)
        if ".." in name.replace("\\", "/").split("/"):
            return "path leaves the folder", "write it relative to --videos, without .."
        if wanted in self.known or (exact.is_dir() and folder):
            return wanted
        fits = self.named(wanted.name) or self.named(other_name)
        if not fits:
            names = {bare_name(wanted.name), bare_name(other_name)}
            if link := next((link for link in self.links if bare_name(link.name) in names), None):
                return "video missing", f"{link} is a link that leaves the folder; allow it with --follow-links"
            if exact.is_file() and opens(exact):
                return wanted
            return (
                "video missing",
                f"put the file below --videos ({' '.join(VIDEO_ENDINGS[:8])} ...) or take the record out",
            )
        best = max(self.shared_folders(wanted, path) for path in fits)
        if best == 0 and len(wanted.parts) > 1:
            return "video missing", f"no folder '{wanted.parent.name}' has it, but there is {fits[0]}; correct the path"
        fits = [path for path in fits if self.shared_folders(wanted, path) == best]
        fits = [path for path in fits if path.name == wanted.name] or fits
        fits = [path for path in fits if bare_name(path.name) == wanted.name] or fits
        fits = [path for path in fits if path.suffix.lower() in COMMON_ENDINGS] or fits
        if len({os.path.realpath(self.root / path) for path in fits}) > 1:
            return "several videos", f"name one of {', '.join(map(str, fits[:4]))} with its folder and ending"
        return fits[0]


# --- The formats --------------------------------------------------------------------------------------------------------


def activitynet(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """ActivityNet Captions, train.json, val_1.json, val_2.json: {"v_ID": {"duration": 82.7, "timestamps":
    [[0.8, 19.9], ...], "sentences": [" Text. ", ...]}}. A clip for each sentence. Files may be called v_ID or
    ID.

    Checked in ranjaykrishna/densevid_eval, evaluate.py (timestamps and sentences, paired by index); keys,
    "duration" and the blanks before sentences on entries that tychen-SJTU/MECD-Benchmark,
    captions/train.json, took over. The file itself was not at hand.
    """
    names = {"video": "key", "caption": "sentences", "start": "timestamps", "end": "timestamps"}
    for key, entry in read_json(s.source, dict, 'ActivityNet Captions: {"v_ID": {"duration", "timestamps", "sentences"}}'):
        where = f"{s.source.name}: {key}"
        spans, sentences = (entry.get(n) if isinstance(entry, dict) else None for n in ("timestamps", "sentences"))
        if not isinstance(spans, list) or not isinstance(sentences, list) or len(spans) != len(sentences) or not spans:
            refuse(where, "timestamps", entry, "give timestamps and sentences, lists of one length")
            continue
        other = key.removeprefix("v_") if key.startswith("v_") else f"v_{key}"
        for i, (span, sentence) in enumerate(zip(spans, sentences), 1):
            if isinstance(span, list) and len(span) == 2:
                place = f"{where}, sentence {i}"
                yield Record(place, key, sentence, names, *span, duration=entry.get("duration"), other_name=other)
            else:
                refuse(f"{where}, sentence {i}", "timestamps", span, "give [start, end] in seconds", "bad times")


def charades(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """Charades, Charades_v1_train.csv: id, ..., descriptions, actions ("c092 11.90 21.20;..."), length.
    `descriptions` are captions of the whole video, parted by ";": a clip for each. The action classes are no
    captions and are not read.

    Checked on rows of the file itself, of which DhanashreeA/KRProject, Charades/Charades_v1_train.csv, is a copy.
    """
    for where, row in read_table(s.source, ["id", "descriptions"], refuse):
        texts = [text for text in row.get("descriptions", "").split(";") if text.strip()] or [""]
        for i, text in enumerate(texts, 1):
            yield Record(f"{where}, description {i}", row["id"], text, {"video": "id", "caption": "descriptions"})


def charades_sta(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """Charades-STA, charades_sta_train.txt: lines "AO8RW 0.0 6.9##a person is putting a book on a shelf.".

    Checked in several public loaders that quote this line and split it so; the file, which the authors'
    jiyanggao/TALL links to and does not hold, was not at hand.
    """
    for where, line in read_lines(s.source):
        head, _, sentence = line.partition("##")
        if len(head.split()) == 3:
            video, start, end = head.split()
            yield Record(where, video, sentence, {"caption": "sentence"}, seconds(start), seconds(end))
        else:
            refuse(where, "", line, 'write "ID start end##sentence."')


def dream_1k(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """DREAM-1K, in the three forms it was published in: DREAM-1k.jsonl with "messages" (the caption is the
    assistant's "reference"), the earlier one with "text": {"prompt", "response"}, and metadata.json with
    "description" and "video_file". Files are called 1.mp4, ...: of a path, only the name counts.

    Checked on lines of the file itself in bytedance/tarsier, data/annotations/DREAM-1k.jsonl, at two commits
    (first two forms); the third on the fields that the card of the hub's dataset omni-research/DREAM-1K
    lists.
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
        except (KeyError, TypeError, AttributeError, StopIteration):
            refuse(where, "", entry, "give vid, and a caption as in DREAM-1k.jsonl")
            continue
        yield Record(where, video, caption, {"video": "vid", "caption": name}, prompt=prompt)


def motionbench(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """MotionBench's caption training set, MotionBenchCaption-train/train.jsonl, videos in its folder videos/:
    {"video_path": "ID.mp4", "motion_caption": "Text."}.

    Checked: the files in the listing of the hub's dataset zai-org/MotionBench; the two fields only in one
    public loader of the set (class MotionBenchCaption, olmo/data/academic_video_datasets.py), as its own card
    does not name them.
    """
    names = {"video": "video_path", "caption": "motion_caption"}
    for where, entry in read_objects(s.source, "MotionBench captions: one object a line with motion_caption", refuse):
        yield Record(where, entry.get("video_path"), entry.get("motion_caption"), names)


def vru_accident(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """VRU-Accident, MetaData/S/S_Dense_Caption.json for each of four sources S: {"./VRU_videos/S/VRU_1":
    {"gt": "Text."}}. Names repeat between sources, so the folder S counts. SOURCE may be one file or the
    MetaData folder.

    Checked in Kimyounggun99/VRU-Accident: README.md (files), load_json_captions in utils/ ("gt"); the key,
    with or without .mp4, in public loaders of the files. The files themselves, on the hub, were not at hand.
    """
    sources = sorted(s.source.rglob("*_Dense_Caption.json")) if s.source.is_dir() else [s.source]
    if not sources:
        raise ClipError(f"{s.source}: no *_Dense_Caption.json below it; expected the MetaData folder of VRU-Accident")
    for path in sources:
        for key, entry in read_json(path, dict, 'VRU-Accident captions: {"./VRU_videos/S/VRU_1": {"gt": "Text."}}'):
            caption = entry.get("gt") if isinstance(entry, dict) else None
            yield Record(f"{path.name}: {key}", key, caption, {"video": "key", "caption": "gt"})


def something_something(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """Something-Something v2, train.json, validation.json: [{"id": "41775", "label": "moving drawer of night
    stand", "template": "Moving [part] of [something]", "placeholders": ["drawer", "night stand"]}, ...]. The
    label is the caption; test.json has none.

    Checked in facebookresearch/SlowFast, slowfast/datasets/ssv2.py (a list; id, template); that the label is
    the text and the template the class, with this example, in the card of the hub's dataset
    HuggingFaceM4/something_something_v2. The file, under a licence of its own, was not at hand.
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


def records(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """Records with a field for the video and one for the caption, named by flags: JSONL, a JSON list,
    parquet. A list of captions makes a clip for each. What else clips.jsonl knows is kept (prompt, keywords,
    ...), the rest is counted."""
    start, end = s.start_column or "start", s.end_column or "end"
    names = {"video": s.video_column, "caption": s.caption_column, "start": start, "end": end}
    ours = {name for name in FIELDS if name not in ("video", "caption", "start", "end", "prompt")}
    for where, entry in read_objects(s.source, "records with a video and a caption", refuse):
        if missing := [name for name in (s.video_column, s.caption_column) if name not in entry]:
            fix = f"name the fields by --video-column and --caption-column; it has {', '.join(entry)}"
            refuse(where, missing[0], entry, fix)
            continue
        try:
            video = video_path(entry[s.video_column], s.video_column)
        except Unusable as error:
            refuse(where, error.name, error.found, error.fix, error.reason)
            continue
        captions = entry[s.caption_column]
        captions = captions if isinstance(captions, list) and captions else [captions]
        more = {name: entry[name] for name in ours if entry.get(name) is not None}
        left = [n for n in entry if n not in (*FIELDS, *names.values()) and entry[n] is not None]
        notes = tuple(f"fields left out: {name}" for name in left)
        for i, caption in enumerate(captions, 1):
            place = f"{where}, caption {i}" if len(captions) > 1 else where
            times, prompt = (entry.get(start), entry.get(end)), entry.get("prompt")
            yield Record(place, video, caption, names, *times, prompt=prompt, more=more, notes=notes)


def folder(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """Every video below --videos, its caption in a .txt of the same path and stem below SOURCE (mostly the same folder)."""
    texts = dict.fromkeys(list_files(s.source, (".txt",), s.follow_links).files, False)  # -> whether it has a video
    for video in list_files(s.videos, VIDEO_ENDINGS, s.follow_links).files:
        text = video.with_suffix(".txt")
        if text in texts:
            texts[text] = True
            yield Record(str(text), str(video), (s.source / text).read_text("utf-8-sig", errors="surrogateescape"))
        else:
            refuse(str(video), "caption", "no .txt of this name", f"write {text}, in UTF-8", "caption empty")
    for text in (text for text, used in texts.items() if not used):
        refuse(str(text), "video", "no video of this name", "add the video, or take the .txt away", "video missing")


def chats(s: Settings, refuse: Refuse) -> Iterator[Record]:
    """The chat files of other trainers, JSONL, a JSON list or parquet. A record makes one clip.

    LLaVA: [{"id", "video": "a.mp4", "conversations": [{"from": "human", "value": "<image>\\nDescribe."},
    {"from": "gpt", "value": "..."}]}]. ms-swift: {"messages": [{"role", "content": "<video>..."}], "videos":
    ["a.mp4"]}, or query, response, history; or conversation with human and assistant; or instruction, input,
    output. OpenAI and TRL: {"messages": [{"role", "content": [{"type": "video", "video": "a.mp4"}, {"type":
    "text", "text": "..."}]}]}, or prompt and completion (or chosen); the video also as path, url or {"type":
    "video_url", "video_url": {"url"}}, its part as video_start and video_end.

    Checked in zjysteven/lmms-finetune, docs/dataset.md, and public copies of LLaVA-Video-178K (where <image>
    stands for the video); modelscope/ms-swift, docs/source_en/Customization/Custom-dataset.md;
    huggingface/trl, docs/source/dataset_formats.md and examples/scripts/sft_video_llm.py.
    """
    for where, entry in read_objects(s.source, f"chats in the form of {s.format}", refuse):
        try:
            clip = chat_clip(entry)
        except Unusable as error:
            refuse(where, error.name, error.found, error.fix, error.reason)
            continue
        for name, text in clip.further:
            refuse(where, name, text, "make a record of its own of it, if it can be understood alone", "further turn")
        times = clip.start, clip.end
        yield Record(where, clip.video, clip.caption, clip.names, *times, prompt=clip.prompt, notes=clip.notes)


IMPORTERS = {
    "llava": chats,
    "swift": chats,
    "messages": chats,
    "json": records,
    "parquet": records,
    "csv": csv_table,
    "folder": folder,
    "activitynet": activitynet,
    "charades": charades,
    "charades-sta": charades_sta,
    "dream-1k": dream_1k,
    "motionbench": motionbench,
    "vru-accident": vru_accident,
    "something-something": something_something,
}


# --- The import ---------------------------------------------------------------------------------------------------------


def make_clip(record: Record, index: VideoIndex, refuse: Refuse) -> dict | None:
    """The line of a record, or None if it was refused. An end behind the video's duration is cut to it, and counted."""

    def reject(reason: str, name: str, found: object, fix: str) -> None:
        refuse(record.where, record.names.get(name, name), found, fix, reason)

    video = str(record.video) if isinstance(record.video, int) else record.video  # ids may be numbers
    for name, text in (("video", video), ("caption", record.caption), ("prompt", record.prompt)):
        if text is not None and (not isinstance(text, str) or is_broken(text)):
            return reject("malformed record", name, text, "give a text, in UTF-8")
    if not (record.caption or "").strip():
        return reject("caption empty", "caption", record.caption, "write a caption, or take the record out")
    if not (video or "").strip():
        return reject("malformed record", "video", video, "name the video")
    prompt = without_mark(record.prompt or "")
    if prompt is None:
        fix = "give one mark like <video>, at the head of the prompt, for the one video"
        return reject("mark inside the prompt", "prompt", record.prompt, fix)
    start, end, duration = record.start, record.end, record.duration
    for name, value in (("start", start), ("end", end), ("duration", duration)):
        if value is not None and not is_seconds(value):
            return reject("bad times", name, value, "give seconds, 0 or more")
    if end is not None and end <= (start or 0):
        return reject("bad times", "end", [start, end], "the end must be more than the start")
    if duration is not None and (start or 0) >= duration:
        return reject("bad times", "start", [start, end], f"the video lasts {duration:g} s")
    found = index.find(video, record.other_name, "frames_per_second" in record.more)
    if isinstance(found, tuple):
        return reject(found[0], "video", video, found[1])
    if duration is not None and end is not None and end > duration:
        index.notes["ends cut to the video's duration"] += 1
        end = duration
    clip = {"video": str(found), "caption": record.caption.strip(), "start": start, "end": end, "prompt": prompt or None}
    clip = {name: value for name, value in (clip | record.more).items() if value is not None}
    try:
        line = json.dumps(clip, ensure_ascii=False)
        line.encode()
        parse_line(line, record.where, index.root, index.follow_links)  # what is written can be read
    except (ClipError, TypeError, ValueError) as error:
        return reject("not a clip", "", clip, str(error).removeprefix(f"{record.where}: "))
    index.notes.update(record.notes)
    return clip


def run_import(s: Settings, console: Console) -> int:
    """Write the clips to s.out and what was refused beside it, both when all is read. Returns the number of clips."""
    rejected = s.out.with_name(f"{s.out.stem}.rejected.jsonl")
    if not s.source.exists() or (s.source.is_dir() and s.format not in ("folder", "vru-accident")):
        raise ClipError(f"{s.source}: no such file; expected the annotation file of {s.format}")
    if any(path.exists() and path.samefile(s.source) for path in (s.out, rejected)):
        raise ClipError(f"--out {s.out}: would overwrite the source {s.source}; give another file")
    index, reasons, seen, videos = VideoIndex(s.videos, s.follow_links), Counter(), {}, set()
    s.out.parent.mkdir(parents=True, exist_ok=True)
    parts = [path.with_name(path.name + ".part") for path in (s.out, rejected)]

    def refuse(where: str, field: str, found: object, fix: str, reason: str = "malformed record") -> None:
        reasons[reason] += 1
        shown = found if isinstance(found, str) else repr(found)
        shown = shown[:200] + "..." * (len(shown) > 200)
        line = {"where": where, "reason": reason, "field": field, "found": shown, "fix": fix}
        line = {key: text.encode("utf-8", "backslashreplace").decode() for key, text in line.items()}
        bad.write(json.dumps(line, ensure_ascii=False) + "\n")

    try:
        with parts[0].open("w", encoding="utf-8") as good, parts[1].open("w", encoding="utf-8") as bad:
            for record in IMPORTERS[s.format](s, refuse):
                clip = make_clip(record, index, refuse)
                line = json.dumps(clip, ensure_ascii=False)
                key = hashlib.blake2b(line.encode(), digest_size=16).digest()  # not the line: captions may be long
                if clip and key in seen:
                    refuse(record.where, "", line, f"nothing; it is the same as {seen[key]}", "duplicate")
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
    read_with = ", read with --follow-links" * s.follow_links
    shown = escape(f"{s.out}, its videos relative to {s.videos}{read_with}; rejected: {rejected}")
    console.print(shown, soft_wrap=True, highlight=False)
    return len(seen)


if __name__ == "__main__":
    try:
        run_import(tyro.cli(Settings, description=__doc__), Console(emoji=False))
    except (ClipError, OSError) as error:
        sys.exit(f"error: {error}")
