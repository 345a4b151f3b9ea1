"""Reading files of other people: JSON, JSON lines and CSV, record by record, what is wrong told by its place."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from data.clips import ClipError

Refuse = Callable[[str, str, str, object, str], None]


class Pairs(dict):
    """A JSON object that still knows all its pairs: a dict alone would drop the first of two equal keys."""

    def __init__(self, pairs: list[tuple[str, object]]):
        super().__init__(pairs)
        self.pairs = pairs


def read_json(path: Path, kind: type, expected: str) -> list:
    """The list of a JSON file, or the (key, value) pairs of its object. Raises ClipError where it is something else."""
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
    """(place, object) of each line of a JSONL file, read one at a time, or of each element of a JSON list."""
    begin = next(read_lines(path), ("", ""))[1][:1]
    if begin not in ("{", "["):
        raise ClipError(f"{path}: neither JSONL nor a JSON list; expected {expected}")
    if begin == "[":
        items = ((f"{path.name}: element {i}", x) for i, x in enumerate(read_json(path, list, expected), 1))
    else:
        items = read_lines(path)
    for where, item in items:
        try:
            item = json.loads(item) if begin == "{" else item
        except (ValueError, RecursionError) as error:
            refuse(where, "malformed record", "", item, f"write one JSON object a line ({error})")
            continue
        if isinstance(item, dict):
            yield where, item
        else:
            refuse(where, "malformed record", "", item, f"expected {expected}")


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
                refuse(where, "malformed record", "", str(error), 'put texts in quotes, and write " in them as ""')
                continue
            if len(row) > len(header):
                mend = "put texts that hold the delimiter in quotes"
                refuse(where, "malformed record", "", f"{len(row)} fields, {len(header)} columns", mend)
            elif row:
                yield where, dict(zip(header, row))


def seconds(text: str | None) -> object:
    """The number in a text; None for an empty one; the text itself where it is no number, to be shown."""
    try:
        return float(text) if text and text.strip() else None
    except ValueError:
        return text
