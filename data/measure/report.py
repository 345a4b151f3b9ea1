"""The README's tables: train every variant of a stage on the embedded world with several seeds, and gather the scores."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from data.measure.cost import step_seconds

HERE = Path(__file__).parents[2]


@dataclass
class ReportSettings:
    """Train every variant of a stage on the embedded world with several seeds, and write the README's tables."""

    stage: Literal[1, 2, "lora"] = 1
    """1; or 2, from a stage 1 of 700 steps, which leaves room; or lora: stage 1 continues from there with adapters, in full
    precision and in 4 bits."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each gives every variant its own weights and order of clips."""
    out: Path = Path("runs/report")
    """Folder of the runs and of report-STAGE.md; runs that are there already are not repeated."""
    steps: int | None = None
    """Steps of a run (default: the preset's)."""
    ablation: bool = False
    """Train the ablations, too."""


LORA = ["--lora-rank", "16", "--steps", "300", "--learning-rate", "2e-3", "--eval-every", "-1"]
VARIANTS = {
    1: {"caption loss alone": ["--contrastive-weight", "0"], "+ contrastive, twin (default)": []},
    2: {"relative (default)": [], "similarity": ["--reward", "similarity"]},
    "lora": {"LoRA, full precision": [*LORA], "LoRA, 4-bit": [*LORA, "--quantize", "nf4"]},
}
ABLATIONS = {
    1: {"+ contrastive, no twin": ["--no-twin-negatives"]},
    "lora": {},
    2: {
        "recall: no twin, no comparison": ["--reward", "recall", "--num-twin-rollouts", "0"],
        "pooled": ["--reward", "pooled"],
        "relative, alpha 0.3": ["--alpha", "0.3"],
        "relative, divided by spread": ["--divide-by-spread"],
    },
}


def train_if_missing(script: str, out: Path, arguments: Sequence[str], console: Console) -> None:
    """Run a training script into a folder, or continue it, unless it has already ended."""
    if not (out / "results.json").exists():
        command = [sys.executable, str(HERE / script), "--out", str(out), "--resume", *arguments]
        console.print(" ".join(command[1:]), highlight=False, soft_wrap=True)
        subprocess.run(command, check=True)


def sampled_scores(run: Path, console: Console) -> dict:
    """A run's evaluation on the world's test split by sampling at temperature 1; made if it is not there yet."""
    out = run / "sampled"
    if not (out / "results.json").exists():
        command = [sys.executable, str(HERE / "eval.py"), "--model", str(run), "--out", str(out), "--temperature", "1"]
        console.print(" ".join(command[1:]), highlight=False, soft_wrap=True)
        subprocess.run([*command, "--workers", "0"], check=True)
    return json.loads((out / "results.json").read_text())


def spread(values: Sequence[float]) -> str:
    """Mean (least to most)."""
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def run_report(settings: ReportSettings, console: Console) -> str:
    """The command `python eval.py report`."""
    stage, seeds = settings.stage, settings.seeds
    columns = [("action right", "full"), ("static similarity", "full"), ("caption similarity", "full")]
    columns += [("actor right", "full")] * (stage == 1) + [("action right", "twin")]
    head = [f"{name}, {part}" for name, part in columns]
    if stage == 2:
        head.insert(1, "action right, full, sampled")
    lines = [f"| stage {stage}, world, test split | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    steps = [] if settings.steps is None else ["--steps", str(settings.steps)]
    start = {seed: settings.out / "stage-1-short" / f"seed-{seed}" for seed in seeds} if stage != 1 else {}
    for seed, folder in start.items():
        train_if_missing("train_sft.py", folder, ["--steps", "700", "--seed", str(seed), "--eval-every", "-1"], console)
    variants = {"stage 1 alone": None} if stage != 1 else {}
    for variant, arguments in (variants | VARIANTS[stage] | (ABLATIONS[stage] if settings.ablation else {})).items():
        runs = []
        for seed in seeds:
            out = settings.out / re.sub(r"[^a-z0-9]+", "-", f"{variant} ".lower()).strip("-") / f"seed-{seed}"
            if arguments is None:
                out = start[seed]
            elif stage == 1:
                train_if_missing("train_sft.py", out, ["--seed", str(seed), *arguments, *steps], console)
            else:
                script, more = ("train_sft.py", []) if stage == "lora" else ("train_rl.py", ["--no-eval-before"])
                more += ["--model", str(start[seed]), "--seed", str(seed), *arguments, *steps]
                train_if_missing(script, out, more, console)
            runs.append(out)
        greedy = [json.loads((run / "results.json").read_text()) for run in runs]
        cells = [spread([r[part][name] for r in greedy]) for name, part in columns]
        if stage == 2:
            sampled = [sampled_scores(run, console) for run in runs]
            cells.insert(1, spread([r["full"]["action right"] for r in sampled]))
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    about = json.loads((runs[-1] / "settings.json").read_text())
    lines.append(f"\nMean (least to most) over seeds {', '.join(map(str, seeds))}; {greedy[0]['clips']} clips; chance of "
                 f"the action is 1/8. Commit {about['commit']}, torch {about['torch']}, {about['device']}.")  # fmt: skip
    if stage == 1:
        with_twin, without = step_seconds("runs/tiny", Path("runs/world/train.jsonl"))
        lines.append(f"\nStep with the twin loss {1e3 * with_twin:.0f} ms, caption-only {1e3 * without:.0f} ms, ratio "
                     f"{with_twin / without:.2f} (medians of 30 pairs, batch 16, in turn in one process).")  # fmt: skip
    report = "\n".join(lines) + "\n"
    (settings.out / f"report-{stage}.md").write_text(report)
    console.print(report, highlight=False, soft_wrap=True)
    return report
