"""Broken annotation lines and broken videos through training and evaluation: nothing crashes, hangs, or is lost unnamed.

    python -m tests.fuzz                       # 2,000 lines and 300 videos, minutes
    python -m tests.fuzz --lines 60 --videos 20 --seed 7

Lines are mutations of good ones (fields, types, numbers, Unicode, special tokens, raw bytes) or any JSON;
videos have bytes flipped, zeroed or cut, or one container's head on another's body. Each set goes through
`train_sft.py`, with an evaluation of the same clips in the middle and at the end, in a process of its own.
Every line must then be trained on, or be named with its file and line, and training and evaluation must agree
on which.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from data.clips import load_clips
from data.world import WorldSettings, make_world

HERE = Path(__file__).parent.parent
SPECIAL = [
    "<|video_pad|>", "<|im_end|>", "<|vision_start|>", "<|endoftext|>", "<image>", "<video>", "[SEP]", "</s>", "[bold]",
    "[/]", "$\\frac{", "%s", "{}", "\\u0000", "\u202e", "\ufeff", "\U0001f3c3\u200d\u2642\ufe0f", "e\u0301", "\u0e01\u0e33",
    "\u4ed6\u8df3\u4e0b\u6765", "\u0645\u0631\u062d\u0628\u0627", "\u0915\u094d\u0937\u093f", "\x1b[31m", "\r\n", "\t",
]  # fmt: skip
NUMBERS = [0, -1, 1e-9, 0.1, 1.9, 2.0, 1e6, 1e308, -0.0, True, None, "1", [], {}, float("nan"), float("inf"), 10**400]
CONTAINERS = {"mp4": [], "mkv": [], "ts": [], "avi": ["-c:v", "mpeg4"], "webm": ["-c:v", "libvpx", "-deadline", "realtime"],
              "mpg": ["-c:v", "mpeg2video", "-r", "25"], "gif": [], "flv": ["-c:v", "flv"]}  # fmt: skip


@dataclass
class Settings:
    """What to break, and how much of it."""

    lines: int = 2000
    """Annotation lines."""
    videos: int = 300
    """Videos."""
    seed: int = 0
    """Seed of everything that is drawn."""
    minutes: float = 30.0
    """After which a run counts as hung."""
    keep: Path | None = None
    """Folder to work in, and to keep (default: a temporary one)."""


@dataclass
class Outcome:
    """What became of one set: lines in all, refused when read, lost later, trained on; faults in words."""

    lines: int
    refused: int
    lost: int
    used: int
    faults: list[str]


def any_text(rng: random.Random) -> str:
    """A text of any characters, lone surrogates and special tokens among them."""

    def part() -> str:
        if rng.random() < 0.3:
            return rng.choice(SPECIAL)
        return chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x11000)]))

    parts = [part() for _ in range(rng.choice([0, 1, 3, 10, 40]))]
    text = "".join(parts) + ("\ud83d" if rng.random() < 0.1 else "")
    return text * rng.choice([1, 1, 1, 1, 200])


def any_json(rng: random.Random, depth: int = 0) -> object:
    """Any JSON value."""
    kind = rng.randrange(5 if depth < 3 else 3)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind in (1, 2):
        return any_text(rng)
    size = rng.randrange(4)
    if kind == 3:
        return [any_json(rng, depth + 1) for _ in range(size)]
    return {any_text(rng): any_json(rng, depth + 1) for _ in range(size)}


def mutate_line(line: str, rng: random.Random) -> bytes:
    """One annotation line, broken in one of many ways, or left as it is."""
    record = json.loads(line)
    way = rng.randrange(12)
    if way == 0:
        return line.encode()
    if way == 1:
        return json.dumps(any_json(rng)).encode("utf-8", "surrogatepass")
    if way == 2:
        broken = bytearray(line.encode())
        for _ in range(rng.randrange(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        return bytes(broken).replace(b"\n", b" ")
    if way == 3:
        return line.encode()[: rng.randrange(len(line))]
    if way == 4:  # a doubled key
        name = rng.choice(list(record))
        return f'{line[:-1]}, "{name}": {json.dumps(rng.choice([record[name], any_json(rng)]))}}}'.encode()
    if way == 5:
        return line.replace("{", "[" * rng.choice([1, 5000]), 1).encode()
    names = [
        "video",
        "caption",
        "prompt",
        "start",
        "end",
        "keywords",
        "key_spans",
        "truth",
        "frames_per_second",
        any_text(rng),
    ]
    for _ in range(rng.randrange(1, 3)):
        name = rng.choice(names)
        if way == 6:
            record.pop(name, None)
        elif way == 7:
            record[name] = rng.choice(NUMBERS)
        elif way == 8 and record.get("keywords"):
            record["keywords"] = [any_text(rng) for _ in record["keywords"]]
        elif way == 9:
            record["key_spans"] = [[rng.choice(NUMBERS), rng.choice(NUMBERS)] for _ in range(rng.randrange(3))]
        elif way == 10:
            record[rng.choice(["caption", "prompt"])] = f"{any_text(rng)}{record['caption']}{any_text(rng)}"
        else:
            record[name] = any_json(rng)
    text = json.dumps(record, ensure_ascii=rng.random() < 0.5)
    return text.encode("utf-8", "surrogatepass").replace(b"\n", b" ")


def mutate_video(files: list[bytes], rng: random.Random) -> bytes:
    """A video file broken in one of many ways, or left as it is."""
    data, way = bytearray(rng.choice(files)), rng.randrange(8)
    if way == 1:
        for _ in range(rng.choice([1, 10, 200])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == 2:
        data = data[: rng.randrange(len(data))]
    elif way == 3:
        data = data[rng.randrange(len(data)) :]
    elif way == 4:
        at, size = rng.randrange(len(data)), rng.choice([16, 400, 4000])
        data[at : at + size] = bytes(min(size, len(data) - at))
    elif way == 5:  # the head of one container on the body of another
        other = rng.choice(files)
        data[: rng.choice([64, 512, len(data) // 2])] = other[: rng.choice([64, 512, len(other) // 2])]
    elif way == 6:
        data += rng.choice(files)
    elif way == 7:
        data = bytearray(rng.choice([b"", b"\0" * 5000, rng.randbytes(5000), b"#!/bin/sh\nexit\n", bytes(data[::-1])]))
    return bytes(data)


def run_script(words: list[str], folder: Path, log: Path, minutes: float) -> int | None:
    """Run a script in a process of its own, with its output in a file: the exit code, or None if it hung."""
    wide = os.environ | {"COLUMNS": "10000"}  # no message is broken over lines
    with log.open("w") as out:
        try:
            command = [sys.executable, *words]
            done = subprocess.run(command, stdout=out, stderr=out, cwd=folder, env=wide, timeout=60 * minutes)
        except subprocess.TimeoutExpired:
            return None
    return done.returncode


def run_set(folder: Path, annotations: Path, minutes: float, run_script: Callable = run_script) -> Outcome:
    """Train on a set of clips and evaluate on it, in a process of its own; see what became of each line."""
    good, problems = load_clips(annotations)
    accepted, refused = {clip.where for clip in good}, {p.split(": ")[0] for p in problems}
    lines = [f"{annotations}:{i}" for i, x in enumerate(annotations.read_bytes().split(b"\n"), 1) if x.strip()]
    faults = [f"{place} was neither taken nor named when the file was read" for place in lines
              if (place in accepted) == (place in refused)]  # fmt: skip
    options = {
        "--data": annotations, "--eval-data": annotations, "--out": folder / "run", "--max-bad-share": 1, "--workers": 1,
        "--time-limit": 120, "--sheets": 3, "--steps": max(2, -(-len(good) // 16)),
        "--eval-every": max(2, -(-len(good) // 32)), "--eval-clips": 4, "--max-text-tokens": 1024,
    }  # fmt: skip
    words, log = [str(HERE / "train_sft.py"), *(str(x) for option in options.items() for x in option)], folder / "log.txt"
    code = run_script(words, folder, log, minutes)
    if code is None:
        return Outcome(len(lines), len(refused), 0, 0, [*faults, f"it hung: {log}"])
    said = log.read_text(errors="replace")
    if code or "Traceback" in said:
        return Outcome(len(lines), len(refused), 0, 0, [*faults, f"it crashed (exit code {code}): {log}\n{said[-2000:]}"])
    named = set(re.findall(rf"{re.escape(str(annotations))}:\d+", said))
    faults += [f"{place} was refused, and not named in the log" for place in sorted(refused - named)]
    results = json.loads((folder / "run" / "results.json").read_text())
    used = {row["clip"] for row in results["rows"]}
    lost = {re.match(rf"{re.escape(str(annotations))}:\d+", reason)[0] for reason in results["skipped"]} - refused
    # Texts that are too long are named before the first step; an evaluation reads no caption, and may use its
    # clip.
    too_long = set(re.findall(rf"({re.escape(str(annotations))}:\d+): .*--max-text-tokens", said))
    faults += [
        f"{place} was neither used nor named in the evaluation" for place in sorted(accepted - used - lost - too_long)
    ]
    faults += [f"{place} was lost in the evaluation, and not named in the log" for place in sorted(lost - named)]
    lost_in_training = named - refused - too_long
    faults += [f"{place} was used in the evaluation and lost in training" for place in sorted(used & lost_in_training)]
    return Outcome(len(lines), len(refused), len(lost), len(used), faults)


def fuzz(settings: Settings, folder: Path, run_script: Callable = run_script) -> dict[str, Outcome]:
    """Make both sets below a folder, and run them."""
    rng = random.Random(settings.seed)
    world = make_world(WorldSettings(folder / "world", train=16, test=2, held_out=0, prompts=0, workers=1))
    lines = (world / "train.jsonl").read_text().splitlines()
    broken = folder / "lines"
    shutil.copytree(world, broken)
    mutated = [lines[0].encode(), *(mutate_line(rng.choice(lines), rng) for _ in range(settings.lines - 1))]
    (broken / "clips.jsonl").write_bytes(b"\n".join(mutated) + b"\n")
    source = world / json.loads(lines[0])["video"]
    files, videos = [], folder / "videos"
    videos.mkdir()
    for ending, flags in CONTAINERS.items():
        made = folder / f"good.{ending}"
        subprocess.run(["ffmpeg", "-loglevel", "error", "-y", "-i", source, *flags, made], check=True)
        files.append(made.read_bytes())
    records = []
    for i in range(settings.videos):
        name = f"{i:03d}.{rng.choice(list(CONTAINERS))}"
        (videos / name).write_bytes(files[0] if i == 0 else mutate_video(files, rng))
        records.append(json.loads(lines[0]) | {"video": name})
    (videos / "clips.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        part: run_set(folder / part, folder / part / "clips.jsonl", settings.minutes, run_script)
        for part in ("lines", "videos")
    }


def main(settings: Settings) -> int:
    """Run, print a table and every fault; returns their number."""
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        outcomes = fuzz(settings, settings.keep or Path(temporary))
        table = Table(title=f"seed {settings.seed}")
        for column in ("set", "lines", "refused when read", "lost later, by name", "used", "faults"):
            table.add_column(column, justify="left" if column == "set" else "right")
        for part, o in outcomes.items():
            table.add_row(part, *map(str, (o.lines, o.refused, o.lost, o.used, len(o.faults))))
        console.print(table)
        for outcome in outcomes.values():
            for fault in outcome.faults:
                console.print(fault, highlight=False, markup=False)
    return sum(len(o.faults) for o in outcomes.values())


if __name__ == "__main__":
    sys.exit(min(1, main(tyro.cli(Settings))))
