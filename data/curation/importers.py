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
from pathlib import Path, PurePosixPath

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.chats import without_mark
from data.clips import parse_line
from data.curation.sources import IMPORTERS, Record, Settings
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
)

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
