"""A run's folder: settings.json, metrics.jsonl, curves.png; its settings, its terminal, and the processes that share it."""

import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.tensor import DTensor

from data.clips import ClipError
from data.models import choose_attention, num_parameters
from data.sheets import warn

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


def fill(settings, preset: Mapping):
    """A copy of a script's settings in which what is None comes from the preset."""
    return replace(settings, **{name: value for name, value in preset.items() if getattr(settings, name) is None})


def above_zero(settings, *names: str) -> None:
    """Raise ValueError for the first of the named settings that is given and not above 0."""
    for name in names:
        if getattr(settings, name) is not None and getattr(settings, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')}: got {getattr(settings, name)}; give a number above 0")


def changed_settings(settings, before: Mapping, free: Sequence[str]) -> list[str]:
    """What differs between a run's settings and those it is resumed with, but for those that are free to change."""
    now = {k: str(v) for k, v in asdict(settings).items() if k not in free}
    return [f"--{k.replace('_', '-')} was {before.get(k)}, is {v}" for k, v in now.items() if str(before.get(k)) != v]


# --- Processes that share a run ------------------------------------------------------------------------------------------


def start_processes(tracker: str | None = None, folder: Path | None = None) -> Accelerator:
    """This process among those that `torchrun` or `accelerate launch` started, or alone. Raises ValueError for a tracker
    that is not installed."""
    cuda, project = torch.cuda.is_available(), folder if tracker else None
    accelerator = Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no", log_with=tracker, project_dir=project)
    if tracker and not accelerator.log_with:
        raise ValueError(f"--tracker {tracker}: it is not installed; pip install {tracker}")
    return accelerator


def agree(values: Sequence[float], group: dist.ProcessGroup | None) -> list[float]:
    """Sums over all processes, worked out on CPUs, so that nobody waits for a device. group: of gloo; None when alone."""
    if group is None:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return total.tolist()


def average_gradients(parameters: Sequence[nn.Parameter], num_processes: int) -> None:
    """Make the gradients those of all processes together; those of FSDP2 are it already, from the backward pass.

    By hand and once a step, not by DistributedDataParallel's hooks: processes may have no keyword, or no useful group of
    rollouts, in a step, and then touch other parameters, or fewer, than their peers.
    """
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if num_processes == 1 or not parameters:
        return
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    for work in [dist.all_reduce(p.grad, async_op=True) for p in parameters]:
        work.wait()
    torch._foreach_div_([p.grad for p in parameters], num_processes)


def show_start(
    console: Console,
    settings,
    clips: Sequence,
    problems: Sequence[str],
    lm: nn.Module,
    notes: Sequence[str],
    num_processes: int,
) -> None:
    """Print what a run begins with: settings, environment, clips, parameters, and every line that is skipped, by name.

    Raises ClipError where more of the annotation file is bad than --max-bad-share allows.
    """
    console.print(asdict(settings) | describe_environment())
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    console.print(
        f"{len(clips)} clips, {len(problems)} lines skipped; {trained / 1e6:.2f} M of {num_parameters(lm) / 1e6:.2f} M "
        f"parameters trained; attention: {choose_attention()}; {num_processes} process(es)"
    )
    for note in notes:
        console.print(note, highlight=False)
    for problem in problems:
        warn(console, "skipped", problem)
    if len(problems) > settings.max_bad_share * (len(clips) + len(problems)):
        allowed = f"--max-bad-share {settings.max_bad_share:g} allows"
        raise ClipError(f"{settings.data}: {len(problems)} bad lines are more than {allowed}")


def too_many_bad(count: int, what: str, folder: Path) -> ValueError:
    """The error that ends a run whose loss or gradient stays NaN or Inf."""
    return ValueError(
        f"loss or gradient was NaN or Inf in {count} {what} in a row; none of them changed the weights, which are saved in "
        f"{folder / 'checkpoint'}. Try a lower --learning-rate"
    )


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

    Only the main process writes. step: where the run goes on; what an earlier attempt wrote of later steps is dropped, and
    an evaluation at that step, which is made again. NaN and Inf become null.
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
        new = self.path.with_name(".metrics.jsonl")
        new.write_text("".join(x for x, r in lines if r["step"] < step + (not any("eval/" in name for name in r))))
        os.replace(new, self.path)

    def write(self, metrics: Mapping[str, float]) -> None:
        """Append one line."""
        if self.accelerator is not None:
            self.accelerator.log({k: v for k, v in metrics.items() if k != "step"}, step=int(metrics["step"]))
        if not self.writes:
            return
        numbers = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self.path.open("a") as lines:
            lines.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in numbers.items()}) + "\n")

    def plot(self, panels: Sequence[Sequence[str]], file: str = "curves.png") -> Path:
        """Draw the named metrics against the step, one panel for each group of names."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        records = [json.loads(line) for line in self.path.open()]
        figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False)
        for axis, names in zip(axes[0], panels):
            for name in names:
                points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
                if points:
                    axis.plot(*zip(*points), label=name, marker="." if len(points) < 30 else None)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(self.folder / file, dpi=130)
        plt.close(figure)
        return self.folder / file
