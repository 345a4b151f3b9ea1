"""A run's folder: settings.json, metrics.jsonl, curves.png, contact sheets, and checkpoints that a kill cannot spoil.

runs/sft/checkpoint -> checkpoint-001000      the newest whole one: an ordinary Hugging Face directory
"""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path

import torch
import transformers
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

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
        "device": gpu or f"CPU, {torch.get_num_threads()} threads",
    }


def fill(settings, preset: Mapping):
    """A copy of a script's settings in which what is None comes from the preset."""
    return replace(settings, **{name: value for name, value in preset.items() if getattr(settings, name) is None})


def above_zero(settings, *names: str) -> None:
    """Raise ValueError for the first of the named settings that is not above 0."""
    for name in names:
        if getattr(settings, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')}: got {getattr(settings, name)}; give a number above 0")


def progress_table(title: str, metrics: Mapping[str, float], seconds_left: float) -> Table:
    """What the terminal shows live."""
    table = Table(title=f"{title}  {seconds_left / 60:.1f} min left", min_width=48)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}")
    return table


class RunLog:
    """Writes settings.json at the start and a line of metrics.jsonl at each call."""

    def __init__(self, folder: Path, settings: object):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        record = {"settings": asdict(settings) if is_dataclass(settings) else settings} | describe_environment()
        (folder / "settings.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
        self.path = folder / "metrics.jsonl"
        self.path.write_text("")

    def write(self, metrics: Mapping[str, float]) -> None:
        """Append one line."""
        with self.path.open("a") as lines:
            lines.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()}) + "\n")

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


def merged_state_dict(hf: nn.Module) -> dict[str, Tensor]:
    """The weights of a model with its LoRA adapters folded in, under the plain model's names; the model is untouched."""
    if not hasattr(hf, "get_base_model"):
        return hf.state_dict()
    from peft.tuners.lora import LoraLayer

    base, merged = hf.get_base_model(), {}
    deltas = {n: m.get_delta_weight("default") for n, m in base.named_modules() if isinstance(m, LoraLayer)}
    for name, weight in base.state_dict().items():
        if ".lora_" in name:
            continue
        owner, _, leaf = name.rpartition(".base_layer.")
        if owner:
            name = f"{owner}.{leaf}"
            if leaf == "weight":
                weight = (weight.float() + deltas[owner].float()).to(weight.dtype)
        merged[name] = weight
    return merged


def save_checkpoint(folder: Path, step: int, hf: nn.Module, processor, heads: nn.Module | None, extra: dict) -> Path:
    """Write `folder`/checkpoint-STEP whole or not at all, point `folder`/checkpoint at it, and drop older ones.

    It holds merged weights, config, tokenizer and processor, loadable by plain transformers; heads.safetensors; the peft
    adapter in adapter/ where there is one; and videoperceiver.json with `extra`.
    """
    final = folder / f"checkpoint-{step:06d}"
    partial = folder / f".partial-{step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    base = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
    base.save_pretrained(partial, state_dict=merged_state_dict(hf))
    if base is not hf:
        hf.save_pretrained(partial / "adapter")
    processor.save_pretrained(partial)
    if heads is not None:
        save_file({k: v.contiguous() for k, v in heads.state_dict().items()}, partial / "heads.safetensors")
    (partial / "videoperceiver.json").write_text(json.dumps(extra | {"step": step}, indent=2, default=str) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    link = folder / f".checkpoint-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, folder / "checkpoint")  # from one whole checkpoint to the next in a single step
    for old in folder.glob("checkpoint-*"):
        if old != final:
            shutil.rmtree(old)
    return final


def load_pretrained(model: str | Path, dtype: torch.dtype) -> tuple[nn.Module, object]:
    """The Hugging Face model that `--model` means, safetensors only, and its processor."""
    source = find_checkpoint(model)
    try:
        hf = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, use_safetensors=True)
        return hf, AutoProcessor.from_pretrained(source)
    except OSError as error:
        raise ValueError(f"--model {model}: {str(error).strip().splitlines()[0]}") from None


def load_trainable(
    model: str, lora_rank: int, freeze_vision: bool, gradient_checkpointing: bool
) -> tuple[nn.Module, object]:
    """The model to train, with adapters, frozen parts and checkpointing as asked, and its processor."""
    dtype = torch.bfloat16 if torch.cuda.is_available() and lora_rank else torch.float32
    hf, processor = load_pretrained(model, dtype)
    if gradient_checkpointing:
        hf.gradient_checkpointing_enable()
        hf.enable_input_require_grads()
    if freeze_vision:
        hf.model.visual.requires_grad_(False)
    if lora_rank:
        from peft import LoraConfig, get_peft_model

        linears = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        hf = get_peft_model(hf, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=linears))
    return hf, processor


def find_checkpoint(model: str | Path) -> str:
    """The Hugging Face directory that `--model` means: a run's folder, a checkpoint, or a name on the hub as it is."""
    path = Path(model)
    if (path / "checkpoint").exists():
        return str((path / "checkpoint").resolve())
    if path.is_dir() and not (path / "config.json").exists():
        raise ValueError(f"--model {path}: no checkpoint in this folder; train one with `python train_sft.py --out {path}`")
    return str(path)
