"""What is there on this machine, and does it work? The first command for a bug report.

    python eval.py doctor

Versions, card, FFmpeg; then each kernel against its reference, a step of the tiny model on the card against the same on the
CPU, and a small video written and read. A line for each, and what to do where something is wrong.
"""

import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
import transformers
from rich.console import Console
from rich.table import Table

from data import videolm
from data.attention import flex_works
from data.device import autocast, best_device, compute_dtype
from data.measure.cost import long_example
from data.run.models import load_trainable
from data.run.precision import choose_attention
from data.tiny import build_tiny
from kernels.check import COMPARISONS, Errors
from kernels.dispatch import HAS_TRITON, INTERPRETED, takes_kernel

GIB = 2**30
STANDS_IN = "its reference stands in, which is slower; please report this"


@dataclass
class DoctorSettings:
    """What is there on this machine, and does it work? Paste what it prints into a bug report."""


@dataclass
class Finding:
    """A line of the table. advice: what to do, empty where all is well."""

    what: str
    found: str
    advice: str = ""


def installed(package: str) -> str:
    """A package's version, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def find_card(device: torch.device) -> list[Finding]:
    """The GPU, what it computes in, and how attention runs on it."""
    if device.type == "cpu":
        memory = psutil.virtual_memory()
        cores = f"{os.cpu_count()} cores, {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
        advice = "the tiny preset runs; for a real model torch must find a GPU: check nvidia-smi, and that torch has CUDA"
        return [Finding("GPU", f"none; {cores}", advice if not torch.version.cuda else advice.split(":")[0])]
    card, free = torch.cuda.get_device_properties(device), torch.cuda.mem_get_info(device)[0]
    found = f"{card.name}, capability {card.major}.{card.minor}, {free / GIB:.1f} of {card.total_memory / GIB:.1f} GiB free"
    half_taken = free < 0.8 * card.total_memory
    bf16 = compute_dtype(device) == torch.bfloat16
    return [
        Finding("GPU", found, "another process holds memory: nvidia-smi names it" if half_taken else ""),
        Finding("bfloat16", "yes" if bf16 else "no", "" if bf16 else "runs compute in float32, without kernels: slowly"),
        Finding("attention", choose_attention()),
    ]


def find_tools() -> list[Finding]:
    """What the packages need from the system."""
    compiler = next((c for c in (os.environ.get("CC"), "gcc", "clang", "cc") if c and shutil.which(c)), None)
    findings = [Finding("Triton", installed("triton"), "" if HAS_TRITON else "kernels need it: pip install triton")]
    wants = "Triton builds its launcher with one, once: apt-get install gcc"
    findings.append(Finding("C compiler", compiler or "none", "" if compiler else wants))
    return findings


def try_kernel(name: str, compare: Callable[..., Errors], device: torch.device) -> Finding:
    """A kernel against its reference, with the time of compiling and running it."""
    if not (INTERPRETED or takes_kernel(None, torch.empty(0, device=device))):
        return Finding(f"kernel: {name}", "not tried: it needs an NVIDIA GPU from Ampere on")
    began = time.perf_counter()
    try:
        found = compare(torch.float32 if INTERPRETED or name != "log-probs" else torch.bfloat16, device)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:150]
        return Finding(
            f"kernel: {name}", f"{type(error).__name__}: {reason}", "its reference stands in; please report this"
        )
    line = f"error {found.error:.1e}, eager PyTorch {found.eager_error:.1e}, {time.perf_counter() - began:.1f} s"
    return Finding(f"kernel: {name}", line, "" if found.right else STANDS_IN)


def try_flex(device: torch.device) -> Finding:
    """flex_attention, by which branches attend, against a call of sdpa for each."""
    if not takes_kernel(None, torch.empty(0, device=device)):
        return Finding("flex_attention", "not tried: it is taken on an NVIDIA GPU from Ampere on")
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        works = flex_works(device)
    line = f"works, {time.perf_counter() - began:.1f} s" if works else "; ".join(str(warning.message) for warning in said)
    return Finding("flex_attention", line, "" if works else "please report this")


def step_of_tiny(hf: torch.nn.Module, folder: Path, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of two packed rollouts of the tiny model, and the gradients of what is trained, on the CPU."""
    from transformers import AutoProcessor

    lm = videolm.VideoLM(hf).to(device).train()
    example = long_example(lm, AutoProcessor.from_pretrained(folder), 128)
    ys = [[torch.arange(10, 20), torch.arange(30, 37)]]
    logp, _ = lm.log_probs(lm.pack_rollouts([example], ys).to(device), lm.encode_examples([example]))
    logp.sum().backward()
    layer = lm.base.model.language_model.layers[0]
    gradients = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
    return logp.detach().float().cpu(), (gradients / gradients.abs().max()).float().cpu()


def try_model(folder: Path, device: torch.device) -> Finding:
    """Forward and backward of the tiny model on the card against the CPU, in float32."""
    from transformers import AutoModelForImageTextToText

    def step(device: torch.device) -> torch.Tensor:
        return torch.cat(step_of_tiny(AutoModelForImageTextToText.from_pretrained(folder), folder, device))

    began = time.perf_counter()
    cpu = step(torch.device("cpu"))
    if device.type == "cpu":
        return Finding("tiny model", f"forward and backward, {time.perf_counter() - began:.1f} s")
    began = time.perf_counter()
    try:
        difference = (step(device) - cpu).abs().max().item()
    except Exception as error:
        return Finding("tiny model", f"{type(error).__name__}: {str(error)[:200]}", "please report this")
    line = f"differs from the CPU by {difference:.1e}, {time.perf_counter() - began:.1f} s"
    return Finding("tiny model", line, "" if difference < 0.05 else "please report this")


def try_preset(folder: Path, device: torch.device) -> Finding:
    """The same as the GPU presets do it: 4 bits, adapters, checkpointing, bfloat16 where the card has it."""
    what, began = "tiny model, 4 bits, LoRA", time.perf_counter()
    try:
        hf = load_trainable(str(folder), "nf4", 4, True, True, device)
        with autocast(device):
            logp, gradients = step_of_tiny(hf, folder, device)
    except Exception as error:
        advice = "bitsandbytes may be too old for this card; --quantize none does without. Please report this"
        return Finding(what, f"{type(error).__name__}: {str(error)[:200]}", advice)
    right = bool(logp.isfinite().all() and gradients.isfinite().all() and len(gradients))
    line = f"forward and backward, {time.perf_counter() - began:.1f} s"
    return Finding(what, line if right else "its numbers are not finite", "" if right else "please report this")


def try_video(folder: Path) -> Finding:
    """A small video, written and read."""
    try:
        from torchcodec.decoders import VideoDecoder
        from torchcodec.encoders import VideoEncoder

        frames = torch.randint(0, 255, (8, 3, 48, 48), dtype=torch.uint8)
        VideoEncoder(frames, frame_rate=8.0).to_file(folder / "video.mp4")
        read = VideoDecoder(folder / "video.mp4")[:]
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        return Finding("video", first, "torchcodec needs FFmpeg's libraries, 4 to 9: apt-get install ffmpeg")
    right = read.shape == frames.shape
    return Finding("video", f"{len(read)} frames written and read", "" if right else "please report this")


def examine(device: torch.device) -> list[Finding]:
    """All lines of the table."""
    names = ("torch", "transformers", "peft", "bitsandbytes", "torchcodec", "flash-attn")
    versions = f"Python {platform.python_version()}, " + ", ".join(f"{name} {installed(name)}" for name in names)
    findings = [Finding("system", platform.platform()), Finding("versions", versions)]
    findings += [*find_card(device), *find_tools()]
    findings += [try_kernel(name, compare, device) for name, compare in COMPARISONS.items()]
    findings.append(try_flex(device))
    with tempfile.TemporaryDirectory() as folder:
        tiny = build_tiny(Path(folder) / "tiny")
        return [*findings, try_model(tiny, device), try_preset(tiny, device), try_video(Path(folder))]


def run_doctor(settings: DoctorSettings, console: Console) -> list[Finding]:
    """The command `python eval.py doctor`."""
    transformers.utils.logging.set_verbosity_error()
    findings = examine(best_device())
    table = Table(title="videoperceiver on this machine", show_lines=True)
    for column in ("what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(finding.what, finding.found, finding.advice or "-")
    console.print(table)
    wrong = [finding for finding in findings if finding.advice]
    console.print("all is well" if not wrong else f"to look at: {', '.join(finding.what for finding in wrong)}")
    return findings
