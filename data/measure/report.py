"""The README's tables: train every variant on the embedded world with several seeds, and gather the scores."""

import json
import re
import resource
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Literal

from rich.console import Console

from data.checks import check_above_zero
from data.clips import load_clips
from data.measure.cost import step_seconds
from data.measure.report_page import draw_habits, line_of, write_page

HERE = Path(__file__).parents[2]


@dataclass
class ReportSettings:
    """Train every variant of both stages on the embedded world with several seeds, and write the README's tables."""

    stage: Literal["both", 1, 2, "lora"] = "both"
    """1: captions alone, without the twin, with it. 2: from where stage 1 with the twin ends. lora: from where captions
    alone end, stage 1 with the twin on all weights, on adapters, and on adapters over 4 bits."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each gives every variant its own order of clips."""
    out: Path = Path("runs/report")
    """Folder of the runs and of report-STAGE.md; runs that are there already are not repeated."""
    steps: int | None = None
    """Steps of a run (default: the preset's)."""
    ablation: bool = False
    """Train more variants of stage 2, too."""
    data: Path | None = None
    """Training clips of another world, made by data/world.py; its test and held-out clips must lie beside them."""


LORA = ["--lora-rank", "16", "--learning-rate", "2e-3"]
CAPTIONS = "captions alone"
DEFAULT = {1: "+ contrastive, twin (default)", 2: "+ stage 2 (default)"}
VARIANTS = {
    1: {
        CAPTIONS: ["--contrastive-weight", "0"],
        "+ contrastive, other clips only": ["--no-twin-negatives"],
        DEFAULT[1]: [],
    },
    2: {DEFAULT[2]: [], "relative, full video's branch only": ["--no-twin-branch"]},
    "lora": {
        "then with the twin, all weights": [],
        "then with the twin, LoRA": LORA,
        "then with the twin, LoRA over 4 bits": [*LORA, "--quantize", "nf4"],
    },
}
ABLATIONS = {
    "similarity": ["--reward", "similarity", "--no-twin-branch"],
    "recall, without any twin": ["--reward", "recall", "--num-twin-rollouts", "0", "--no-twin-branch"],
    "recall, and the twin's branch": ["--reward", "recall"],
    "pooled": ["--reward", "pooled", "--no-twin-branch"],
    "default, divided by spread": ["--divide-by-spread"],
}
# Columns of the tables: heading, split, part of the results, score.
COLUMNS = [
    ("rare event named", "test", "full", "rare event named"),
    ("usual event named", "test", "full", "usual event named"),
    ("event claimed, twin", "test", "twin", "event claimed"),
    ("event claimed, quiet clip", "test", "full", "event claimed"),
    ("actor right", "test", "full", "actor right"),
    ("whole caption right", "test", "full", "whole caption right"),
    ("static part", "test", "full", "static part"),
    ("event named, held-out actors", "held-out", "full", "event named"),
]


def run_once(command: Sequence[str], result: Path, console: Console) -> None:
    """Run a script of this project unless its result is there already; its CPU seconds go beside the result.

    Raises ValueError if the script fails.
    """
    if not result.exists():
        console.print(" ".join(command), highlight=False, soft_wrap=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        if subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]]).returncode:
            raise ValueError(f"{' '.join(command)}: ended as said above; the same report goes on from what is finished")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        result.with_name("cpu_seconds.json").write_text(f"{seconds:.0f}\n")


def scores(run: Path, splits: dict[str, Path], console: Console) -> dict[str, dict]:
    """A run's evaluation on each split; what is not there yet is made. The run itself has evaluated the test split."""
    found = {}
    for split, data in splits.items():
        out = run if split == "test" else run / split
        command = ["eval.py", "--model", str(run), "--data", str(data), "--out", str(out), "--workers", "0"]
        run_once(command, out / "results.json", console)
        found[split] = json.loads((out / "results.json").read_text())
    return found


def spread(values: Sequence[float]) -> str:
    """Mean (least to most)."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table_row(title: str, results: Sequence[dict[str, dict]], seconds: Sequence[float]) -> str:
    """A line of a table: every column over the seeds."""
    cells = []
    for _, split, part, name in COLUMNS:
        values = [r[split][part][name] for r in results if name in r.get(split, {}).get(part, {})]
        cells.append(spread(values) if values else "-")
    cells.append(f"{sum(seconds) / len(seconds):.0f}" if seconds else "-")
    return f"| {title} | " + " | ".join(cells) + " |"


@dataclass
class EventScores:
    """What clips say of one event, 0 or 1 each."""

    named: list[float] = field(default_factory=list)
    """Where it happens and is rare: is it named?"""
    claimed: list[float] = field(default_factory=list)
    """Of the twins on the floor where it is usual: is an event claimed?"""

    def __str__(self) -> str:
        return "; ".join(f"{fmean(values):.2f}" if values else "-" for values in (self.named, self.claimed))


def event_table(runs: dict[str, dict[int, Path]]) -> list[str]:
    """Event by event, over all seeds: the share of the rare ones that is named, and of the twins on the floor where it is
    usual the share of which an event is claimed. What a clip shows is the `truth` of its annotation line."""
    scores_of = {}  # title -> event -> EventScores
    for title, of_seed in runs.items():
        of_event = scores_of[title] = defaultdict(EventScores)
        for run in of_seed.values():
            for row in json.loads((run / "results.json").read_text())["rows"]:
                truth = line_of(row)["truth"]
                if truth["kind"] == "rare":
                    of_event[truth["action"]].named.append(row["scores"]["rare event named"])
                if "twin scores" in row:
                    of_event[truth["usual"]].claimed.append(row["twin scores"]["event claimed"])
    events = sorted(set().union(*scores_of.values()))
    lines = ["| rare event named; claimed of twins where it is usual | " + " | ".join(events) + " |"]
    lines.append("|---" * (len(events) + 1) + "|")
    for title, of_event in scores_of.items():
        lines.append(f"| {title} | " + " | ".join(str(of_event[event]) for event in events) + " |")
    return lines


def where_made(runs: dict[str, dict[int, Path]]) -> str:
    """With which commits, torch and devices the runs were made: those of before are not repeated, and may have others."""
    found = [json.loads((run / "settings.json").read_text()) for of_seed in runs.values() for run in of_seed.values()]
    commits, torches, devices = (", ".join(sorted({x[name] for x in found})) for name in ("commit", "torch", "device"))
    return f"Commit {commits}, torch {torches}, {devices}"


def run_report(settings: ReportSettings, console: Console) -> str:
    """The command `python eval.py report`."""
    s, lines, runs = settings, [], {}
    check_above_zero(s, "steps")
    if not s.seeds:
        raise ValueError("--seeds: got none; give one or more")
    world = (s.data or Path("runs/world/train.jsonl")).parent
    splits = {split: world / f"{split}.jsonl" for split in ("test", "held-out")}
    if s.data is not None:
        missing = [file for file in (s.data, *splits.values()) if not file.exists()]
        if missing:
            raise ValueError(f"--data {s.data}: {missing[0]}: no such file; python -m data.world --out FOLDER makes all")
        for file in splits.values():  # the tables need them
            if not any((clip.truth or {}).get("kind") == "rare" for clip in load_clips(file)[0]):
                raise ValueError(
                    f'{file}: no clip has "kind": "rare" in its "truth"; python -m data.world writes such clips'
                )
    steps = [] if s.steps is None else ["--steps", str(s.steps)]

    def train(title: str, script: str, arguments: Sequence[str], start: dict[int, Path] | None = None) -> None:
        """One row: a run for each seed, from `start` of that seed, with its evaluations."""
        results, seconds = [], []
        for seed in s.seeds:
            out = s.out / re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") / f"seed-{seed}"
            begin = [] if start is None else ["--model", str(start[seed])]
            more = ["--seed", str(seed), "--out", str(out), "--resume", "--eval-every", "-1"]
            more += ["--no-eval-before"] * bool(runs)  # of the first run it is enough
            if s.data is not None:  # stage 2 has clips of its own, where the world has them
                prompts = world / "prompts.jsonl"
                data = prompts if script == "train_rl.py" and prompts.exists() else s.data
                more += ["--data", str(data), "--eval-data", str(world / "test.jsonl")]
            run_once([script, *begin, *more, *arguments, *steps], out / "results.json", console)
            results.append(scores(out, splits, console))
            seconds.append(float((out / "cpu_seconds.json").read_text()))
            runs.setdefault(title, {})[seed] = out
        lines.append(table_row(title, results, seconds))

    def head(title: str) -> None:
        names = [name for name, *_ in COLUMNS] + ["CPU seconds"]
        lines.extend([f"| {title} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"])

    head("world, test split")
    begins_at = CAPTIONS if s.stage == "lora" else DEFAULT[1]
    for title, arguments in VARIANTS[1].items():
        if s.stage in ("both", 1) or title == begins_at:
            train(title, "train_sft.py", arguments)
    first = next(iter(runs.values()))[s.seeds[0]]  # it has evaluated the base that all runs begin with
    before = json.loads((first / "results.json").read_text())["before"]
    lines.insert(2, table_row("the base, before any fine-tuning", [{"test": before}], []))
    start = runs[begins_at]
    if s.stage in ("both", 2):
        for title, arguments in (VARIANTS[2] | (ABLATIONS if s.ablation else {})).items():
            train(title, "train_rl.py", arguments, start)
    if s.stage == "lora":
        for title, arguments in VARIANTS["lora"].items():
            train(title, "train_sft.py", arguments, start)
    lines += ["", *event_table(runs)]
    lines.append(f"\nMean (least to most) over seeds {', '.join(map(str, s.seeds))}. {where_made(runs)}.")
    if s.stage == 1:
        with_twin, without = step_seconds("runs/tiny", world / "train.jsonl")
        lines.append(f"\nStep with the twin loss {1e3 * with_twin:.0f} ms, caption-only {1e3 * without:.0f} ms, ratio "
                     f"{with_twin / without:.2f} (medians of 30 pairs, batch 16, in turn in one process).")  # fmt: skip
    if s.stage == "both":
        draw_habits(runs, s.out / "habits.png")
        shown = {title: runs[title][s.seeds[0]] for title in (CAPTIONS, DEFAULT[1], DEFAULT[2])}
        console.print(f"{write_page(shown, s.out / 'descriptions.html')}", highlight=False)
    report = "\n".join(lines) + "\n"
    (s.out / f"report-{s.stage}.md").write_text(report)
    console.print(report, highlight=False, soft_wrap=True)
    return report
