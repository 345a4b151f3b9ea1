"""A folder of predictions that a kill cannot spoil: what they were made with, their lines, and what went wrong.

`settings.json` says what the predictions depend on; a run with other settings does not continue them.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from torch import nn

from data.benchmarks import Benchmark, prompt
from data.runs import describe_environment
from data.sheets import printable

if TYPE_CHECKING:
    from data.answers import Part


def fingerprint(hf: nn.Module) -> str:
    """A short name of a model's weights, from some numbers of each: another training run has another."""
    digest = hashlib.sha256()
    for name, weight in hf.state_dict().items():
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // 16)][:16].float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_run(benchmark: Benchmark, parts: Sequence["Part"], hf: nn.Module, more: dict) -> dict:
    """What predictions depend on: they are not continued where any of it differs."""
    asked = [[q.id, prompt(benchmark, q), p.start, p.end, p.frames_per_second, p.spans] for p in parts for q in p.questions]
    return {
        "benchmark": benchmark.name,
        "protocol": benchmark.protocol,
        "subtitles": benchmark.subtitles,
        "frames": benchmark.num_frames,
        "place of frames": benchmark.place,
        "longest answer": benchmark.max_new_tokens,
        "questions": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
        "model": hf.config.model_type,
        "weights": fingerprint(hf),
        "numbers": str(hf.dtype),
        **({"pixels of a picture": benchmark.max_pixels} if benchmark.max_pixels else {}),
        **more,
    }


def open_run(out: Path, settings: dict) -> None:
    """Write settings.json to a folder, or check that it has the same. Raises ValueError where predictions are another's."""
    out.mkdir(parents=True, exist_ok=True)
    path, partial_path = out / "settings.json", out / ".settings.json"
    settings = json.loads(json.dumps(settings))
    try:
        found = json.loads(path.read_text())["settings"] if path.exists() else None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: cannot be read; give another --out, or delete the folder") from None
    if found is None and (out / "predictions.jsonl").exists():
        raise ValueError(f"{out}: holds predictions but no settings.json; give another --out, or delete the folder")
    if found is not None and found != settings:
        names = [n for n in settings | found if settings.get(n) != found.get(n)]
        listed = "; ".join(f"{n}: {found.get(n)} there, {settings.get(n)} now" for n in names)
        raise ValueError(
            f"{out}: holds predictions made with other settings ({listed}). Continue with those, or give another --out"
        )
    if found is None:
        partial_path.write_text(json.dumps({"settings": settings} | describe_environment(), indent=2) + "\n")
        os.replace(partial_path, path)


class Lines:
    """A predictions file: its lines by id, and more of them appended, each whole before the next.

    What a kill has torn is taken out, and stands in `problems`.
    """

    def __init__(self, path: Path):
        self.records: dict[str, dict] = {}
        self.problems: list[str] = []
        data = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            try:
                record = json.loads(line)
                if not line.endswith(b"\n") or not isinstance(record["response"], str) or record["id"] in self.records:
                    raise ValueError
                self.records[record["id"]] = record
            except (ValueError, KeyError, TypeError, RecursionError):
                self.problems.append(f"{path}:{number}: torn or doubled; taken out, its question is asked again")
        if self.problems:
            partial_path = path.with_name(f".{path.name}")
            partial_path.write_text("".join(json.dumps(record) + "\n" for record in self.records.values()))
            os.replace(partial_path, path)
        self.file = path.open("a")

    def add(self, record: dict) -> None:
        """Append a line, unless its id is there already."""
        if record["id"] not in self.records:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
            self.records[record["id"]] = record

    def responses(self) -> dict[str, str]:
        """What was said, by id."""
        return {id: record["response"] for id, record in self.records.items()}


class Notes:
    """Problems: printed, counted, and written to a file as they come."""

    def __init__(self, path: Path, console: Console):
        self.console, self.file, self.count = console, path.open("w"), 0

    def add(self, problems: Sequence[str]) -> None:
        """Note some problems."""
        for problem in problems:
            self.count += 1
            self.file.write(printable(problem) + "\n")
            self.console.print(printable(problem), style="yellow", highlight=False, markup=False, soft_wrap=True)
        self.file.flush()
