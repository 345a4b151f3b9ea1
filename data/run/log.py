"""A run's folder: settings.json, metrics.jsonl, curves.png; its settings, its terminal, and the processes that share it."""

import json
import math
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from rich.table import Table

from data.files import write_whole

transformers.utils.logging.disable_progress_bar()  # progress is shown by rich, and once


def describe_environment() -> dict[str, str]:
    """Commit, versions and device: what a log must begin with."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": gpu or f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}",
    }


# --- Processes that share a run ------------------------------------------------------------------------------------------


def progress_table(title: str, metrics: Mapping[str, float], seconds_left: float) -> Table:
    """What the terminal shows live."""
    table = Table(title=f"{title}  {seconds_left / 60:.1f} min left", min_width=48)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}")
    return table


class RunLog:
    """Writes settings.json at the start, and a line of metrics.jsonl at each call, which trackers get, too.

    Only the main process writes. step: after which the run continues; what an earlier attempt wrote of later steps is
    dropped, and an evaluation at that step, which is made again. NaN and Inf become null.
    """

    def __init__(self, folder: Path, settings: object, accelerator: Accelerator | None = None, step: int = 0):
        self.folder, self.path, self.accelerator = folder, folder / "metrics.jsonl", accelerator
        self.writes = accelerator is None or accelerator.is_main_process
        plain = asdict(settings) if is_dataclass(settings) else settings
        if accelerator is not None and accelerator.log_with:
            simple = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in plain.items()}
            accelerator.init_trackers("videoperceiver", simple)
        if not self.writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(
            json.dumps({"settings": plain} | describe_environment(), indent=2, default=str) + "\n"
        )
        lines = self.path.read_text().splitlines(keepends=True) if step and self.path.exists() else []
        lines = [(x, json.loads(x)) for x in lines if x.endswith("}\n")]  # a kill can tear the last one
        kept = [x for x, r in lines if r["step"] < step + (not any("eval/" in name for name in r))]
        write_whole(self.path, "".join(kept))

    def write(self, metrics: Mapping[str, float]) -> None:
        """Append one line."""
        if self.accelerator is not None:
            self.accelerator.log({k: v for k, v in metrics.items() if k != "step"}, step=int(metrics["step"]))
        if not self.writes:
            return
        numbers = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self.path.open("a") as lines:
            lines.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in numbers.items()}) + "\n")

    def plot(self, panels: Mapping[str, Sequence[str]], file: str = "curves.png") -> Path:
        """Draw metrics against the step: title -> names of a panel, three panels in a row.

        What was never logged or is always 0 is left out, and so is a panel of nothing else (the KL of a run without one).
        """
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        records = [json.loads(line) for line in self.path.open()]
        curves: dict[str, dict[str, list]] = {}
        for title, names in panels.items():
            found = {name: [(r["step"], r[name]) for r in records if r.get(name) is not None] for name in names}
            found = {name: points for name, points in found.items() if any(value for _, value in points)}
            curves |= {title: found} if found else {}
        columns, rows = max(1, min(3, len(curves))), max(1, -(-len(curves) // 3))
        figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.1 * rows), squeeze=False)
        for axis in axes.flat[len(curves) :]:
            axis.axis("off")
        for axis, (title, found) in zip(axes.flat, curves.items()):
            axis.set_title(title, fontsize=11)
            for name, points in found.items():
                axis.plot(*zip(*points), label=name, marker="." if len(points) < 30 else None)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(self.folder / file, dpi=130)
        plt.close(figure)
        return self.folder / file


class Stopwatch:
    """Seconds of the parts of a step, one after another."""

    def __init__(self, part: str):
        self.seconds: dict[str, float] = {}
        self.part, self.began = part, time.perf_counter()

    def start(self, part: str) -> None:
        """End the part under way, and begin another."""
        self.stop()
        self.part, self.began = part, time.perf_counter()

    def stop(self) -> None:
        """End the part under way."""
        self.seconds[self.part] = time.perf_counter() - self.began
