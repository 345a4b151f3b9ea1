"""What a file is that is handed over as an annotation file and is none: the first bytes or the first record tell, and the
answer is one message with the command of data/importers.py that makes clips of it."""

import csv
import json
import re
import shlex
from pathlib import Path

from data.files import VIDEO_ENDINGS, ClipError, find_records, known_record, read_lines, whole_objects

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
    (b"\x1a\x45\xdf\xa3", "a video", "name it in the line of an annotation file"),
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


def import_command(path: Path, root: Path, importer: str, names: list[str] | None = None) -> str:
    """The command that makes clips of a file. names: its columns or fields, where they are to be named."""
    out = path.with_name("clips.jsonl" if path.name != "clips.jsonl" else "clips-imported.jsonl")
    words = ["python", "-m", "data.importers", importer, str(path), "--videos", str(root), "--out", str(out)]
    if names is not None:
        video, caption = guess_columns(names) or ("NAME", "NAME")
        words += [*(("--video-column", video) if video != "video" else ())]
        words += [*(("--caption-column", caption) if caption != "caption" else ())]
    then = f"--data {shlex.quote(str(out))}" + f" --root {shlex.quote(str(root))}" * (
        root.resolve() != out.parent.resolve()
    )
    found = f"\n  (its fields: {', '.join(names)})" if names and not guess_columns(names) else ""
    return f"turn it into clips with\n  {shlex.join(words)}{found}\nand go on with {then}"


def foreign_file(path: Path, root: Path) -> str | None:
    """What an annotation file is, and what to do, where it is not JSONL of clips; decided by its beginning."""
    with path.open("rb") as file:
        head = file.read(1 << 20)
    for begin, kind, fix in BINARY:
        if head.startswith(begin):
            return f"this is {kind}; {fix}"
    if head[4:8] == b"ftyp" or (path.suffix.lower() in VIDEO_ENDINGS and head.lstrip()[:1] not in (b"{", b"[")):
        return "this is a video; name it in the line of an annotation file"
    if head[257:262] == b"ustar":
        return "this is a tar archive; unpack it"
    if head.startswith(b"PAR1"):
        return foreign_parquet(path, root)
    if b"\0" in head[:1024]:
        return "this is no text; give a JSONL file, one clip a line"
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if text.startswith("["):
        return foreign_list(path, root, text)
    if text.startswith("{"):
        return foreign_objects(path, root)
    return foreign_text(path, root, text)


def foreign_parquet(path: Path, root: Path) -> str:
    """`foreign_file` of a parquet file: by its columns."""
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
    except (OSError, pyarrow.ArrowException) as error:
        return f"this is a damaged parquet file ({str(error)[:80]}); fetch it once more"
    known = known_record(dict.fromkeys(names))
    if known:
        return f"this is a parquet file of {known[0]}; {import_command(path, root, known[1])}"
    return f"this is a parquet file; {import_command(path, root, 'parquet', names)}"


def foreign_list(path: Path, root: Path, text: str) -> str | None:
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
        return f"this is a JSON list of {type(first).__name__}, not JSONL; write an object a line, with video and caption"
    if known := known_record(first):
        return f"this is a JSON list of {known[0]}; {import_command(path, root, known[1])}"
    return f"this is a JSON list, not JSONL; {import_command(path, root, 'json', list(first))}"


def foreign_objects(path: Path, root: Path) -> str | None:
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
        return f"this is {form} {known[0]}; {import_command(path, root, known[1])}"
    if more or not isinstance(record, dict):
        return None
    if "video" in record or "caption" in record:
        again = f"its objects go over several lines; {import_command(path, root, 'json', list(record))}"
        return again if form != "JSONL of" else None
    if records := find_records(record):
        known = known_record(records[0])
        command = import_command(path, root, *known[1:]) if known else import_command(path, root, "json", list(records[0]))
        return f"this is one JSON object with a list of {known[0] if known else 'records'}; {command}"
    value = next(iter(record.values()), None)
    if isinstance(value, dict) and "timestamps" in value and "sentences" in value:
        return f"this is ActivityNet Captions; {import_command(path, root, 'activitynet')}"
    if isinstance(value, dict) and "gt" in value:
        return f"this is VRU-Accident's captions; {import_command(path, root, 'vru-accident')}"
    if guess_columns(list(record)):
        return f"this is a record with other field names; {import_command(path, root, 'json', list(record))}"
    if len(record) > 1 and all(isinstance(v, (dict, list, str)) for v in record.values()):
        return "this is one JSON object, not JSONL; write one JSON object a line, with video and caption"
    return None


def foreign_text(path: Path, root: Path, text: str) -> str | None:
    """`foreign_file` of text that is no JSON: a table, unless lines of JSON follow its first."""
    lines = [line for line in text.split("\n", 20) if line.strip()][:20]
    if not lines or any(line.lstrip().startswith("{") for line in lines[1:]):
        return None
    if re.match(r"\S+ +[\d.]+ +[\d.]+ *##", lines[0]):
        return f"this is Charades-STA; {import_command(path, root, 'charades-sta')}"
    try:
        header = max((next(csv.reader([lines[0]], delimiter=d), []) for d in ",;\t|"), key=len)
    except csv.Error:
        return None
    if len(header) < 2 or len(lines) < 2:
        return None
    if {"id", "descriptions", "actions"} <= set(header):
        return f"this is Charades; {import_command(path, root, 'charades')}"
    return f"this is a table (CSV), not JSONL; {import_command(path, root, 'csv', header)}"


def check_annotations(path: Path, root: Path) -> None:
    """Raise ClipError if an annotation file is missing or of another form than clips.jsonl: what it is, what to do."""
    if path.is_dir():
        folder = shlex.join(["python", "-m", "data.importers", "folder", str(path), "--videos", str(root)])
        raise ClipError(
            f"{path}: this is a folder; give the JSONL file. Videos with .txt captions beside them:\n  {folder}"
        )
    if not path.is_file():
        raise ClipError(f"{path}: no such file; give a JSONL file, one clip a line")
    if foreign := foreign_file(path, root):
        raise ClipError(f"{path}: {foreign}")


def other_fields(path: Path, root: Path, ours: tuple[str, ...]) -> str:
    """What to do if the records of JSONL have the fields of a clip under other usual names, or more fields; else ""."""
    try:
        record = json.loads(next(read_lines(path), ("", ""))[1])
    except (ValueError, RecursionError):
        return ""
    if not isinstance(record, dict) or not set(record) - set(ours) or not guess_columns(list(record)):
        return ""
    return f"\nIf its fields have other names, or more of them, {import_command(path, root, 'json', list(record))}"
