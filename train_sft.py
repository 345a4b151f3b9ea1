"""Stage 1: supervised fine-tuning with the twin-video contrastive loss.

    L = L_LM(caption | full video) + lambda * L_con(keywords; full video's key slots against the twin's)

For each clip: find the key slots of its keywords, encode the video once, gather the twin's visual tokens from it, run
the caption loss on the full video, catch its states after l layers, run the twin through the same l layers, and pull the
keywords toward the full video's key-slot states and away from the twin's.

    python train_sft.py                                                           # embedded world, tiny model, CPU
    python train_sft.py --contrastive-weight 0                                    # the caption-only baseline
    python train_sft.py --no-twin-negatives                                       # ablation: in-batch negatives only
    python train_sft.py --preset gpu-24gb --model Qwen/Qwen2.5-VL-3B-Instruct --data clips.jsonl
    accelerate launch train_sft.py --preset gpu-80gb --model Qwen/Qwen2.5-VL-7B-Instruct --data clips.jsonl

Deviations from the paper, whose equations and settings are not public, stand numbered in the README.
"""

import json
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.live import Live
from transformers import get_cosine_schedule_with_warmup

import vp
from data.clips import ClipError, ClipLoader, Preparation, load_clips, make_example, read_frames
from data.runs import RunLog, above_zero, describe_environment, fill, load_trainable, progress_table, save_checkpoint
from data.sheets import contact_sheet
from data.tiny import build_tiny
from data.world import embedded_world
from eval import evaluate, show_results

PRESETS = {
    "tiny": dict(steps=1000, batch_size=16, micro_batch_size=16, learning_rate=7e-4, max_frames=16, eval_every=250),
    "gpu-24gb": dict(
        steps=2000, batch_size=16, micro_batch_size=1, learning_rate=1e-4, max_frames=32, fps=2.0, lora_rank=16,
        freeze_vision=True, gradient_checkpointing=True, workers=4,
    ),
    "gpu-80gb": dict(
        steps=2000, batch_size=32, micro_batch_size=4, learning_rate=1e-4, max_frames=64, fps=2.0, lora_rank=64,
        freeze_vision=True, gradient_checkpointing=True, workers=8,
    ),
}  # fmt: skip
DEFAULTS = dict(fps=None, lora_rank=0, freeze_vision=False, gradient_checkpointing=False, eval_every=-1)


@dataclass
class Settings:
    """Settings of stage 1. What is None is filled from the preset."""

    preset: Literal["tiny", "gpu-24gb", "gpu-80gb"] = "tiny"
    """Hardware preset. The GPU presets are sized on paper, not yet measured."""
    model: str | None = None
    """Hugging Face directory or hub name (default: the tiny Qwen2.5-VL of data/tiny.py, made on the spot)."""
    data: Path | None = None
    """Annotation file, JSONL (default: the embedded world of data/world.py, made on the spot)."""
    root: Path | None = None
    """Folder of the videos (default: the annotation file's)."""
    eval_data: Path | None = None
    """Annotation file to evaluate on (default: the world's test split, or none)."""
    out: Path = Path("runs/sft")
    """Folder of the run."""
    steps: int | None = None
    """Optimizer steps."""
    batch_size: int | None = None
    """Clips a step, over all micro-batches and processes."""
    micro_batch_size: int | None = None
    """Clips a forward pass."""
    learning_rate: float | None = None
    """Peak learning rate (AdamW, linear warm-up, cosine to zero)."""
    warmup: float = 0.05
    """Share of the steps that warms up."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    contrastive_weight: float = 0.5
    """lambda; 0 is the caption-only baseline and computes nothing of the rest."""
    twin_negatives: bool = True
    """Use the twin's tokens as hard negatives."""
    contrastive_layer: int | None = None
    """l, layers after which states are compared (default: half of them)."""
    temperature: float = 0.1
    """tau at the start; it is learned, within [0.01, 1]."""
    lora_rank: int | None = None
    """Rank of LoRA adapters on the language model's linear layers (0: train all weights)."""
    freeze_vision: bool | None = None
    """Leave the vision encoder as it is."""
    gradient_checkpointing: bool | None = None
    """Recompute layers in the backward pass to save memory."""
    max_frames: int | None = None
    """Frames sampled from a clip, at most."""
    fps: float | None = None
    """Frames sampled a second (default: max_frames, whatever the length)."""
    jitter: bool = False
    """Jitter the sampled moments, differently in every epoch."""
    workers: int | None = None
    """Processes that decode ahead (0: none, and no time limit; default: 1, none for the embedded world on a CPU)."""
    time_limit: float = 60.0
    """Seconds after which a decoder counts as hung, and its clip is skipped."""
    max_bad_share: float = 0.05
    """Share of clips that may be lost before the run stops."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    eval_every: int | None = None
    """Steps between evaluations (-1: only at the end)."""
    eval_clips: int = 64
    """Clips of an evaluation before the last (-1: all)."""
    save_every: int = -1
    """Steps between checkpoints (-1: only at the end)."""
    sheets: int = 4
    """Contact sheets to draw."""
    world_clips: int = 6000
    """Training clips of the embedded world."""
    seed: int = 0
    """Seed of weights, order and jitter."""


def resolve(settings: Settings) -> Settings:
    """Fill what is None from the preset, check what is given, and make the embedded world and model where needed."""
    s = fill(settings, DEFAULTS | PRESETS[settings.preset])
    above_zero(s, "steps", "batch_size", "micro_batch_size", "learning_rate", "max_frames", "log_every", "time_limit")
    if s.batch_size % s.micro_batch_size:
        raise ValueError(f"--batch-size {s.batch_size} is not a multiple of --micro-batch-size {s.micro_batch_size}")
    if s.contrastive_weight < 0:
        raise ValueError(f"--contrastive-weight: got {s.contrastive_weight}; give 0 or more")
    if s.max_frames < 4:
        raise ValueError(f"--max-frames: got {s.max_frames}; a twin needs two slots, which is 4 frames")
    if s.model is None:
        s.model = str(build_tiny(Path("runs/tiny"), "qwen2_5_vl", s.seed))
    if s.data is None:
        s.data, test = embedded_world(s.world_clips)
        s.eval_data = s.eval_data or test
        if s.workers is None and not torch.cuda.is_available():
            s.workers = 0  # its clips decode in no time, and a worker would take a core from the model
    s.workers = 1 if s.workers is None else s.workers
    return s


def main(settings: Settings) -> dict | None:
    """Train; returns the last evaluation."""
    # --- set-up: settings, clips, model, optimizer
    s = resolve(settings)
    set_seed(s.seed)
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    rank, world_size, main_process = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    if s.batch_size % (s.micro_batch_size * world_size):
        raise ValueError(
            f"--batch-size {s.batch_size} is not a multiple of micro-batch {s.micro_batch_size} x {world_size} processes"
        )
    console = Console(quiet=not main_process)
    clips, problems = load_clips(s.data, s.root)
    eval_clips, eval_problems = load_clips(s.eval_data, s.root) if s.eval_data else ([], [])
    hf, processor = load_trainable(s.model, s.lora_rank, s.freeze_vision, s.gradient_checkpointing)
    lm = vp.VideoLM(hf, s.contrastive_layer, s.temperature)
    contrastive = s.contrastive_weight > 0
    lm.heads.requires_grad_(contrastive)
    preparation = Preparation(processor, s.max_frames, s.fps, s.jitter)
    steady = Preparation(processor, s.max_frames, s.fps)
    loader = ClipLoader(clips[rank::world_size], preparation, s.seed, s.workers, s.time_limit, s.max_bad_share)
    loader.start()
    if main_process:
        log = RunLog(s.out, s)
    console.print({f.name: getattr(s, f.name) for f in fields(s)} | describe_environment())
    trained = [p for p in lm.parameters() if p.requires_grad]
    console.print(f"{len(clips)} clips, {len(problems)} lines skipped; {sum(p.numel() for p in trained) / 1e6:.2f} M of "
                  f"{sum(p.numel() for p in lm.parameters()) / 1e6:.2f} M parameters trained")  # fmt: skip
    for problem in problems + eval_problems:
        console.print(f"[yellow]skipped[/] {problem}", highlight=False)
    if len(problems) > s.max_bad_share * (len(clips) + len(problems)):
        raise ClipError(f"{s.data}: {len(problems)} bad lines are more than --max-bad-share {s.max_bad_share:g} allows")
    for clip in clips[: s.sheets] if main_process else []:
        try:
            frames = read_frames(clip, s.max_frames, s.fps, frames_per_slot=steady.frames_per_slot)
            contact_sheet(clip, frames, make_example(clip, frames, steady), s.out / f"sheet-{Path(clip.video).stem}.png")
        except ClipError as error:
            console.print(f"[yellow]no sheet[/] {error}", highlight=False)
    optimizer = torch.optim.AdamW(trained, s.learning_rate, betas=(0.9, 0.99), weight_decay=s.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(s.warmup * s.steps), s.steps)
    model, optimizer = accelerator.prepare(lm, optimizer)

    def save(step: int) -> None:
        save_checkpoint(s.out, step, lm.hf, processor, lm.heads if contrastive else None, {"settings": vars(s)})

    stop_asked = []
    signal.signal(signal.SIGTERM, lambda *_: stop_asked.append(True))

    # --- the loop: data -> forward, backward -> step -> log -> save -> eval
    examples = loader.examples()
    num_micro = s.batch_size // (s.micro_batch_size * world_size)
    results, pending, metrics, tokens_seen = None, [], {}, 0
    began = mark = time.perf_counter()
    with loader, Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        for step in range(1, s.steps + 1):
            # All micro-batches are collated first, so that losses are divided by the counts of the whole step.
            try:
                batches = [lm.collate([next(examples)[1] for _ in range(s.micro_batch_size)]) for _ in range(num_micro)]
            except ClipError:  # too many clips are lost: end the run, but keep what it has learned
                if main_process and step > 1:
                    save(step - 1)
                raise
            counts = torch.tensor([sum(len(b.label_ids) for b in batches), sum(len(b.keyword_ids) for b in batches)])
            if world_size > 1:  # DDP averages gradients: each process divides by the mean count
                counts = accelerator.reduce(counts.to(accelerator.device), "mean")
            num_tokens, num_keywords = counts[0], counts[1].clamp(min=1)
            losses = torch.zeros(4, device=accelerator.device)
            for i, batch in enumerate(batches):
                with nullcontext() if i == num_micro - 1 else accelerator.no_sync(model):
                    out = model(batch.to(accelerator.device), contrastive, s.twin_negatives)
                    lm_loss, con_loss = out.lm_loss / num_tokens, out.contrastive_loss / num_keywords
                    accelerator.backward(lm_loss + s.contrastive_weight * con_loss)
                positives, negatives = out.metrics.get("positives", 0), out.metrics.get("negatives", 0)
                parts = [lm_loss.detach(), con_loss.detach(), positives / num_keywords, negatives / num_keywords]
                losses += torch.stack([torch.as_tensor(p, device=losses.device) for p in parts])
            grad_norm = accelerator.clip_grad_norm_(trained, s.grad_clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

            # --- log: the device is read only here
            pending.append(torch.cat([losses, torch.as_tensor(grad_norm, device=losses.device).view(1)]))
            tokens_seen += sum(b.input_ids.numel() for b in batches) * world_size
            if step % s.log_every == 0 or step == s.steps:
                means = torch.stack(pending).float().mean(0).tolist()
                now = time.perf_counter()
                seconds = (now - mark) / len(pending)
                metrics = {"step": step, "loss/lm": means[0]}
                if contrastive:
                    names = ("loss/contrastive", "contrastive/positives", "contrastive/negatives")
                    metrics |= dict(zip(names, means[1:4]))
                    metrics["contrastive/temperature"] = lm.heads.temperature.item()
                metrics |= {"grad_norm": means[4], "lr": schedule.get_last_lr()[0], "perf/step_seconds": seconds}
                metrics |= {"perf/tokens_per_second": tokens_seen / (now - mark), "data/skipped": len(loader.skipped)}
                pending, tokens_seen, mark = [], 0, now
                if main_process:
                    log.write(metrics)
                left = (s.steps - step) * (now - began) / step
                if live:
                    live.update(progress_table(f"stage 1  step {step}/{s.steps}", metrics, left), refresh=True)
                elif step % (10 * s.log_every) == 0 or step == s.steps:
                    shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
                    console.print(f"{shown}  {left / 60:.1f} min left", highlight=False, soft_wrap=True)

            # --- save, eval: in this order, so that no evaluation can lose what is trained
            stopping = bool(stop_asked)  # by SIGTERM: save at once, and end well
            last = step == s.steps or stopping
            due = step == s.steps or (s.eval_every > 0 and step % s.eval_every == 0)
            if main_process and (last or (s.save_every > 0 and step % s.save_every == 0)):
                save(step)
            if main_process and eval_clips and due and not stopping:
                scored = eval_clips if last or s.eval_clips < 0 else eval_clips[: s.eval_clips]
                results = evaluate(lm, steady, scored, workers=s.workers, time_limit=s.time_limit)
                log.write({"step": step} | {f"eval/{p} {n}": v for p in ("full", "twin") for n, v in results[p].items()})
                (s.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
                show_results(results, f"step {step}", console)
                mark = time.perf_counter()
            if last:
                break

    # --- afterwards
    for reason in loader.skipped.values():
        console.print(f"[yellow]skipped[/] {reason}", highlight=False)
    if main_process:
        panels = [["loss/lm", "loss/contrastive"], ["contrastive/temperature"], ["grad_norm"]]
        if results and results["full"]:
            name = "action right" if "action right" in results["full"] else "caption similarity"
            panels.append([f"eval/full {name}", f"eval/twin {name}"])
        console.print(f"{log.plot(panels)}\n{s.out / 'checkpoint'}  ({step} steps in {time.perf_counter() - began:.0f} s)")
    accelerator.end_training()
    return results


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except (ClipError, ValueError) as error:
        sys.exit(f"error: {error}")
