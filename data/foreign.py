"""What a file is that is handed over as an annotation file and is none: the first bytes or the first record
tell, and the answer is one message with the command of data/curation/importers.py that makes clips of it."""

import csv
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from data.files import VIDEO_ENDINGS, ClipError, find_records, known_record, read_lines, whole_objects

NAME_IT = "name it in a line of an annotation file"
# First bytes of files that are no text, and what to do.
BINARY = (
    (b"\x1f\x8b", "gzip", "unpack it with gunzip"),
    (b"PK\x03\x04", "a zip archive (.zip, .xlsx, .npz)", "unpack it, or save it as CSV"),
    (b"\xfd7zXZ", "xz", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "zstandard", "unpack it with unzstd"),
    (b"BZh", "bzip2", "unpack it with bunzip2"),
    (b"SQLite format 3", "an SQLite data base", "save its table as CSV"),
    (b"\x89HDF", "HDF5", "save its table as CSV"),
    (b"ARROW1", "Arrow", "save it as parquet (datasets: to_parquet)"),
    (b"\xff\xff\xff\xff", "Arrow", "save it as parquet (datasets: to_parquet)"),
    (b"\xff\xfe", "text in UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "save it as UTF-8"),
    (b"\x80\x04", "a Python pickle", "save it as JSON"),
    (b"\x80\x05", "a Python pickle", "save it as JSON"),
    (b"\x1a\x45\xdf\xa3", "a video", NAME_IT),
)
VIDEO_COLUMNS = (
    "video", "videos", "video_path", "video_file", "video_name", "file_name", "filename", "filepath", "file_path", "file",
    "path", "clip", "clip_path", "media", "video_id", "videoid", "id", "name", "url",
)  # fmt: skip
CAPTION_COLUMNS = (
    "caption",
    "captions",
    "text",
    "description",
    "sentence",
    "sentences",
    "summary",
    "answer",
    "label",
    "title",
)


def guess_columns(names: list[str]) -> tuple[str, str] | None:
    """The names of the columns of the video and of the caption among these, if they are usual ones.

    >>> guess_columns(["ID", "Video_Path", "text"]), guess_columns(["a", "b"])
    (('Video_Path', 'text'), None)
    """
    lower = {name.lower(): name for name in reversed(names)}
    video, caption = (next((lower[n] for n in of if n in lower), None) for of in (VIDEO_COLUMNS, CAPTION_COLUMNS))
    return (video, caption) if video and caption else None


@dataclass
class Foreign:
    """What a file is. importer: what data/curation/importers.py calls it; columns: its fields, if they are to
    be named; fix: what to do if there is no importer."""

    kind: str
    importer: str = ""
    columns: list[str] | None = None
    fix: str = "write one JSON object a line, with video and caption"


def import_command(path: Path, root: Path, follow_links: bool, importer: str, columns: list[str] | None = None) -> str:
    """What to do to make clips of a file: the command, and how to continue."""
    out = path.with_name("clips.jsonl")
    out = path.with_name(f"{path.stem}.clips.jsonl") if out.exists() else out
    words = ["python", "-m", "data.curation.importers", importer, str(path), "--videos", str(root), "--out", str(out)]
    if columns is not None:
        video, caption = guess_columns(columns) or ("NAME", "NAME")
        words += ["--video-column", video] if video != "video" else []
        words += ["--caption-column", caption] if caption != "caption" else []
    links = ["--follow-links"] * follow_links
    again = ["--data", str(out), *(["--root", str(root)] if root.resolve() != out.parent.resolve() else []), *links]
    found = f"\n  (its fields: {', '.join(columns)})" if columns and not guess_columns(columns) else ""
    return f"turn it into clips with\n  {shlex.join(words + links)}{found}\nand continue with {shlex.join(again)}"


def foreign_file(path: Path) -> Foreign | None:
    """What an annotation file is, and what to do, where it is not JSONL of clips; decided by its beginning."""
    with path.open("rb") as file:
        head = file.read(1 << 20)
    for begin, kind, fix in BINARY:
        if head.startswith(begin):
            return Foreign(kind, fix=fix)
    if head[4:8] == b"ftyp" or (path.suffix.lower() in VIDEO_ENDINGS and head.lstrip()[:1] not in (b"{", b"[")):
        return Foreign("a video", fix=NAME_IT)
    if head[257:262] == b"ustar":
        return Foreign("a tar archive", fix="unpack it")
    if head.startswith(b"PAR1"):
        return foreign_parquet(path)
    if b"\0" in head[:1024]:
        return Foreign("no text", fix="give a JSONL file, one clip a line")
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if text.startswith("["):
        return foreign_list(text)
    if text.startswith("{"):
        return foreign_objects(path)
    return foreign_text(text)


def foreign_parquet(path: Path) -> Foreign:
    """`foreign_file` of a parquet file: by its columns."""
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
    except (OSError, pyarrow.ArrowException) as error:
        return Foreign("a damaged parquet file", fix=f"fetch it once more ({str(error)[:80]})")
    known = known_record(dict.fromkeys(names))
    if known:
        return Foreign(f"a parquet file of {known[0]}", known[1])
    return Foreign("a parquet file", "parquet", names)


def foreign_list(text: str) -> Foreign | None:
    """`foreign_file` of what begins with [: a JSON list, unless it is one bad line of JSONL."""
    lines = [line for line in text.split("\n", 20) if line.strip()]
    if lines[1:2] and lines[0].rstrip().endswith("]") and lines[1].lstrip().startswith("{"):
        return None
    try:
        body = text[1:].lstrip()
        first, end = json.JSONDecoder().raw_decode(body)
        if body[end:].lstrip()[:1] not in ("", ",", "]"):
            return None
    except (ValueError, RecursionError):
        first = {name: "" for name in ("conversations", "messages", "video", "caption") if f'"{name}"' in text}
    if not isinstance(first, dict):
        return Foreign(f"a JSON list of {type(first).__name__}, not JSONL")
    if known := known_record(first):
        return Foreign(f"a JSON list of {known[0]}", known[1])
    return Foreign("a JSON list, not JSONL", "json", list(first))


def foreign_objects(path: Path) -> Foreign | None:
    """`foreign_file` of what begins with {: JSONL of other records, one object for all, or objects that go over lines."""
    lines = read_lines(path)
    first, more = next(lines)[1], next(lines, None) is not None
    try:
        record, form = json.loads(first), "JSONL of"
    except (ValueError, RecursionError):
        objects = whole_objects(path, first)
        if objects is None or not isinstance(objects[0], dict):
            return None  # a bad first line
        record, form, more = objects[0], "JSON, not JSONL, of", False
    if known := known_record(record):
        return Foreign(f"{form} {known[0]}", known[1])
    if more or not isinstance(record, dict):
        return None
    if "video" in record or "caption" in record:
        return Foreign("JSON over several lines, not JSONL", "json", list(record)) if form != "JSONL of" else None
    if records := find_records(record):
        known = known_record(records[0])
        if known:
            return Foreign(f"one JSON object with a list of {known[0]}", known[1])
        return Foreign("one JSON object with a list of records", "json", list(records[0]))
    value = next(iter(record.values()), None)
    if isinstance(value, dict) and "timestamps" in value and "sentences" in value:
        return Foreign("ActivityNet Captions", "activitynet")
    if isinstance(value, dict) and "gt" in value:
        return Foreign("VRU-Accident's captions", "vru-accident")
    if guess_columns(list(record)):
        return Foreign("a record with other field names", "json", list(record))
    if len(record) > 1 and all(isinstance(v, (dict, list, str)) for v in record.values()):
        return Foreign("one JSON object, not JSONL")
    return None


def foreign_text(text: str) -> Foreign | None:
    """`foreign_file` of text that is no JSON: a table, unless lines of JSON follow its first."""
    lines = [line for line in text.split("\n", 20) if line.strip()][:20]
    if not lines or any(line.lstrip().startswith("{") for line in lines[1:]):
        return None
    if re.match(r"\S+ +[\d.]+ +[\d.]+ *##", lines[0]):
        return Foreign("Charades-STA", "charades-sta")
    try:
        header = max((next(csv.reader([lines[0]], delimiter=d), []) for d in ",;\t|"), key=len)
    except csv.Error:
        return None
    if len(header) < 2 or len(lines) < 2:
        return None
    if {"id", "descriptions", "actions"} <= set(header):
        return Foreign("Charades", "charades")
    return Foreign("a table (CSV), not JSONL", "csv", header)


def check_annotations(path: Path, root: Path, follow_links: bool = False) -> None:
    """Raise ClipError if an annotation file is missing or of another form than clips.jsonl: what it is, what to do."""
    if path.is_dir():
        fix = import_command(path, path, follow_links, "folder")
        raise ClipError(f"{path}: this is a folder; give a JSONL file. If .txt captions are beside its videos, {fix}")
    if not path.is_file():
        raise ClipError(f"{path}: no such file; give a JSONL file, one clip a line")
    if foreign := foreign_file(path):
        fix = foreign.fix
        if foreign.importer:
            fix = import_command(path, root, follow_links, foreign.importer, foreign.columns)
        raise ClipError(f"{path}: this is {foreign.kind}; {fix}")


def other_fields(path: Path, root: Path, follow_links: bool, ours: tuple[str, ...]) -> str:
    """What to do if the records of JSONL have the fields of a clip under other usual names, or more fields; else ""."""
    try:
        record = json.loads(next(read_lines(path), ("", ""))[1])
    except (ValueError, RecursionError):
        return ""
    if not isinstance(record, dict) or not set(record) - set(ours) or not guess_columns(list(record)):
        return ""
    command = import_command(path, root, follow_links, "json", list(record))
    return f"\nIf its fields have other names, or more of them, {command}"
