"""The captioned video sets that can be imported, and how each of them is read: a record for every caption."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import tyro

from data.chats import Unusable, chat_clip, video_path
from data.clips import FIELDS
from data.files import (
    VIDEO_ENDINGS,
    ClipError,
    Refuse,
    list_files,
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
