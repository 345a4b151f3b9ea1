"""Files of other people: JSON, JSON lines, CSV and parquet, record by record, with the place of what is
wrong; paths that cannot leave a folder; finding video files by their names."""

import csv
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import unquote


class Refuse(Protocol):
    """Notes what cannot be used: where it is, which field, what was found there, what to do, and the kind of fault."""

    def __call__(self, where: str, field: str, found: object, fix: str, reason: str = "malformed record") -> None: ...


# Containers that FFmpeg reads and that say how long they last; animated pictures too. Compared in lower case.
VIDEO_ENDINGS = (
    ".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".ts", ".mts", ".m2ts", ".m2t", ".trp", ".tp", ".tod", ".mpg", ".mpeg",
    ".mpe", ".m2p", ".m1v", ".m2v", ".mpv", ".mp2v", ".vob", ".vro", ".evo", ".mod", ".3gp", ".3g2", ".3gpp", ".f4v",
    ".flv", ".wmv", ".asf", ".wtv", ".dvr-ms", ".ogv", ".ogm", ".ogg", ".ogx", ".qt", ".mj2", ".mqv", ".m4s", ".ismv",
    ".mk3d", ".mxf", ".gxf", ".nut", ".y4m", ".ivf", ".obu", ".dv", ".dif", ".divx", ".xvid", ".rm", ".rmvb", ".amv",
    ".nsv", ".swf", ".bik", ".roq", ".mve", ".h264", ".264", ".hevc", ".265", ".mjpeg", ".mjpg", ".gif",
)  # fmt: skip
COMMON_ENDINGS = VIDEO_ENDINGS[:5]  # before the others, some of which sounds and previews have, too


class ClipError(ValueError):
    """A clip or a file that cannot be used, and why, in words for the person who made it."""


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, also when the power fails."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def changes(before: Mapping, now: Mapping) -> list[str]:
    """What differs between the settings that something was made with and those of now, in words.

    >>> changes({"frames": 16, "fps": 2}, {"frames": 8, "fps": 2})
    ['frames was 16, is 8']
    """
    names = (name for name in now | before if now.get(name) != before.get(name))
    return [f"{name} was {before.get(name)}, is {now.get(name)}" for name in names]


# --- Paths --------------------------------------------------------------------------------------------------------------


class PathError(ClipError):
    """A path that an annotation names and that is not taken. leaves: it leads out of the root, and not by a link."""

    def __init__(self, message: str, leaves: bool = False):
        super().__init__(message)
        self.leaves = leaves


def is_below(path: str, folder: str) -> bool:
    """Whether a path is a folder or inside it, both normal and absolute."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def path_below(path: str, root: Path) -> str:
    """The path of a file, relative to root, by its text alone: links are not looked at, `..` cannot leave the root.

    Also taken are an absolute path inside the root, a file:// address, and Windows' backslashes. Raises PathError.
    """
    top = os.path.abspath(root)
    if re.match(r"file://", path, re.IGNORECASE):
        path = path[len("file://") :].removeprefix("localhost")
        path = path if os.path.lexists(os.path.join(top, path)) else unquote(path)
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path):
        raise PathError(f"it is a web address; download the file, and give its path below the root {root}")
    elif re.match(r"data:[\w/+.;=-]*,", path):
        raise PathError(f"it is the file itself, not its path; write it to a file below the root {root}, and name that")
    if re.search(r"\\|^~[^/]*/|^[A-Za-z]:/", path) and not os.path.lexists(os.path.join(top, path)):
        path = path.replace("\\", "/")
        if re.match("[A-Za-z]:/", path):
            raise PathError(f"it is a path of a Windows disk; give the path below the root {root}", leaves=True)
        if path.startswith("~"):
            raise PathError(
                f"it begins with ~, which is not replaced here; give the path below the root {root}", leaves=True
            )
    whole = os.path.normpath(os.path.join(top, path))
    for folder in (top, os.path.realpath(root)):
        if is_below(whole, folder):
            return os.path.relpath(whole, folder)
    raise PathError(f"it leaves the root {root}; move it there or name another root", leaves=True)


def inside_root(path: str, root: Path, follow_links: bool = False) -> Path:
    """The file that an annotation names, as an absolute path inside root, whether it exists or not.

    A link that leaves the root (as every file of a hub cache is) is allowed by follow_links. Raises PathError.
    """
    real = os.path.realpath(root)
    found = os.path.join(real, path_below(path, root))
    try:
        os.lstat(found)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name too long, a byte 0, half a surrogate, links in a circle
        raise PathError(f"not a path ({getattr(error, 'strerror', None) or error})") from None
    target = os.path.realpath(found)
    if is_below(target, real):
        return Path(target)
    if not follow_links:
        raise PathError(
            f"it is a link that leaves the root {root}, to {target}; allow it with --follow-links, or put the file there"
        )
    return Path(found)


# --- Video files --------------------------------------------------------------------------------------------------------


@dataclass
class Listing:
    """Files below a folder, sorted, relative to it; links that leave it and were not followed; what was passed over."""

    files: list[PurePosixPath] = field(default_factory=list)
    links: list[PurePosixPath] = field(default_factory=list)
    notes: Counter = field(default_factory=Counter)


def list_files(root: Path, endings: tuple[str, ...], follow_links: bool = False) -> Listing:
    """The files below root whose names end so. Links to folders are followed with follow_links alone."""
    real, listing = os.path.realpath(root), Listing()
    folders = [(str(root), {real})]  # each with the real folders above it: a link to one of these would never end
    while folders:
        folder, above = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError:
            listing.notes["folders that cannot be read"] += 1
            continue
        for entry in entries:
            below, target = PurePosixPath(Path(entry.path).relative_to(root)), os.path.realpath(entry.path)
            leaves = entry.is_symlink() and not is_below(target, real)
            video = entry.name.lower().endswith(endings)
            if leaves and not follow_links and (video or entry.is_dir()):
                listing.notes["links that leave the folder, not followed (see --follow-links)"] += 1
                listing.links.append(below)
            elif entry.is_dir():
                if entry.is_symlink() and (not follow_links or target in above):
                    listing.notes["links to folders, not followed"] += 1
                else:
                    folders.append((entry.path, above | {target}))
            elif video and is_broken(entry.path):
                listing.notes["file names that are not UTF-8"] += 1
            elif video and entry.is_file():
                listing.files.append(below)
            elif video:
                listing.notes["links to nothing, pipes and the like"] += 1
    listing.files.sort()
    return listing


def is_broken(text: str) -> bool:
    """Whether a text cannot be written as UTF-8."""
    return re.search("[\ud800-\udfff]", text) is not None


def bare_name(name: str) -> str:
    """A file name without a video's ending, in one Unicode form (macOS writes another than most annotation files).

    >>> bare_name("a.b.MP4"), bare_name("a.b")
    ('a.b', 'a.b')
    """
    stem, ending = os.path.splitext(name)
    return unicodedata.normalize("NFC", stem if ending.lower() in VIDEO_ENDINGS else name)


@lru_cache(maxsize=64)
def names_by_stem(folder: Path, changed: int) -> dict[str, list[str]]:
    """The video files of a folder by their bare names. changed: its time of change, so that what is kept is not old."""
    names: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        if name.lower().endswith(VIDEO_ENDINGS):
            names.setdefault(bare_name(name), []).append(name)
    return names


def with_any_ending(path: Path) -> Path:
    """The path of a video; if there is no such file, that of the only one beside it with another video's ending."""
    if path.suffix.lower() not in VIDEO_ENDINGS or path.exists() or not path.parent.is_dir():
        return path
    names = names_by_stem(path.parent, path.parent.stat().st_mtime_ns).get(bare_name(path.name), [])
    return path.with_name(names[0]) if len(names) == 1 else path


# --- Records ------------------------------------------------------------------------------------------------------------


class Pairs(dict):
    """A JSON object that still knows all its pairs: a dict alone would drop the first of two equal keys."""

    def __init__(self, pairs: list[tuple[str, object]]):
        super().__init__(pairs)
        self.pairs = pairs


def read_json(path: Path, kind: type, expected: str) -> list:
    """The list of a JSON file, or the (key, value) pairs of its object. Raises ClipError if it is something else."""
    try:
        loaded = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=Pairs if kind is dict else None)
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of 5,000 digits
        raise ClipError(f"{path}: not readable as JSON ({error}); expected {expected}") from None
    if not isinstance(loaded, kind):
        raise ClipError(f"{path}: found a JSON {type(loaded).__name__}; expected {expected}")
    return loaded.pairs if kind is dict else loaded


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of the lines that are not empty, one at a time. Bytes that are not UTF-8 stay, for is_broken."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
        yield from ((f"{path.name}:{i}", line.strip()) for i, line in enumerate(lines, 1) if line.strip())


def read_objects(path: Path, expected: str, refuse: Refuse) -> Iterator[tuple[str, dict]]:
    """(place, object) of each line of a JSONL file or row of a parquet file, read one at a time, of each
    element of a JSON list (which may be the one list in an object), or of each of several objects that go
    over lines."""
    if is_parquet(path):
        yield from read_parquet(path)
        return
    first = next(read_lines(path), ("", ""))[1]
    if first[:1] not in ("{", "["):
        raise ClipError(f"{path}: neither JSONL nor a JSON list; expected {expected}")
    if first[:1] == "[":
        items = ((f"{path.name}: element {i}", x) for i, x in enumerate(read_json(path, list, expected), 1))
    elif (objects := whole_objects(path, first)) is not None:
        items = ((f"{path.name}: element {i}", x) for i, x in enumerate(objects, 1))
    else:
        items = read_lines(path)
    for where, item in items:
        try:
            item = json.loads(item) if isinstance(item, str) else item
        except (ValueError, RecursionError) as error:
            refuse(where, "", item, f"write one JSON object a line ({error})")
            continue
        if isinstance(item, dict):
            yield where, item
        else:
            refuse(where, "", item, f"expected {expected}")


def whole_objects(path: Path, first: str) -> list | None:
    """The objects of a file of JSON objects that go over lines, or the elements of the one list in a single
    object; None for JSONL. Of broken JSON the text that cannot be read stands for the object. first: the
    first line with text."""
    try:
        if find_records(json.loads(first)) is None or len(list(zip(read_lines(path), range(2)))) > 1:
            return None  # each line by itself
    except (ValueError, RecursionError):
        pass
    objects, at, blank = [], 0, re.compile(r"\s*")
    try:
        text = path.read_text("utf-8-sig")
        while (begin := blank.match(text, at).end()) < len(text):
            found, at = json.JSONDecoder().raw_decode(text, begin)
            if "\n" not in text[begin:at] and not objects and len(text) > at + 1:
                return None  # a line by itself, with something behind it
            objects.append(found)
    except (ValueError, RecursionError):
        if not objects:
            return None
        objects.append(text[at : at + 200].strip())
    return (find_records(objects[0]) if len(objects) == 1 else None) or objects


def find_records(record: object) -> list | None:
    """The records of {"data": [{...}, ...]}, however the key is called; None for what is a record itself."""
    if not isinstance(record, dict) or known_record(record):
        return None
    lists = [value for value in record.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return lists[0] if len(lists) == 1 else None


def known_record(record: Mapping) -> tuple[str, str] | None:
    """What a JSON object is a record of: (in words, the importer that reads it), or None for no form that is known."""
    if "conversations" in record or "conversation" in record:
        return "LLaVA conversations", "llava"
    if "messages" in record and "vid" in record:
        return "DREAM-1K", "dream-1k"
    if "messages" in record:
        swift = any(name in record for name in ("videos", "images", "audios"))
        return ("ms-swift messages", "swift") if swift else ("chat messages (OpenAI, TRL)", "messages")
    for prompt, answer in (("query", "response"), ("instruction", "output")):
        if prompt in record and answer in record:
            return f"ms-swift {prompt} and {answer}", "swift"
    if "chosen" in record or ("prompt" in record and "completion" in record):
        return "TRL prompt and completion", "messages"
    if "motion_caption" in record:
        return "MotionBench captions", "motionbench"
    if "template" in record and "label" in record:
        return "Something-Something v2", "something-something"
    if "video_file" in record and "description" in record:
        return "DREAM-1K", "dream-1k"
    return None


def is_parquet(path: Path) -> bool:
    """Whether a file begins as parquet does."""
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, row) of a parquet file, a few rows at a time. Raises ClipError if it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}: row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise ClipError(f"{path}: not readable as parquet behind row {number} ({str(error)[:100]})") from None


def read_table(path: Path, columns: list[str], refuse: Refuse) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, row) of a CSV file, one at a time. The delimiter is the one that finds the columns in the header."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        first = lines.readline()
        headers = {d: next(csv.reader([first], delimiter=d), []) for d in ",;\t|"}
        delimiter = next((d for d, header in headers.items() if set(columns) <= set(header)), None)
        if delimiter is None:
            raise ClipError(f"{path}: found the header {first[:100]!a}; expected columns {', '.join(columns)}")
        header, rows = headers[delimiter], csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            where = f"{path.name}:{rows.line_num + 2}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                refuse(where, "", str(error), 'put texts in quotes, and write " in them as ""')
                continue
            if len(row) > len(header):
                fix = "put texts that hold the delimiter in quotes"
                refuse(where, "", f"{len(row)} fields, {len(header)} columns", fix)
            elif row:
                yield where, dict(zip(header, row))


def seconds(text: str | None) -> object:
    """The number in a text; None for an empty one; the text itself if it is no number, to be shown."""
    try:
        return float(text) if text and text.strip() else None
    except ValueError:
        return text


def is_number(value: object) -> bool:
    """A finite JSON number (true and false are none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def is_seconds(value: object) -> bool:
    """A finite number, 0 or more, that is no integer of hundreds of digits."""
    try:
        return is_number(value) and value >= 0
    except OverflowError:
        return False
