"""Stage 1: supervised fine-tuning with the twin-video contrastive loss.

    L = L_LM(caption | full video) + lambda * L_con(keywords; full video's key slots against the twin's)

For each clip: find the key slots of its keywords, encode the video once, gather the twin's visual tokens from it, run
the caption loss on the full video, catch its states after l layers, run the twin through the same l layers, and pull the
keywords toward the full video's key-slot states and away from the twin's.

    python train_sft.py                                                           # embedded world, tiny model, CPU
    python train_sft.py --contrastive-weight 0                                    # the caption-only baseline
    python train_sft.py --no-twin-negatives                                       # ablation: in-batch negatives only
    python train_sft.py --preset gpu-24gb --model Qwen/Qwen2.5-VL-3B-Instruct --data clips.jsonl
    python train_sft.py --preset gpu-24gb --model random:qwen2.5-vl-7b --data clips.jsonl          # speed and memory only
    torchrun --nproc_per_node 8 train_sft.py --preset gpu-80gb --model Qwen/Qwen2.5-VL-7B-Instruct --data clips.jsonl
    python train_sft.py --resume                                                  # go on after a kill, bit for bit

Deviations from the paper, whose equations and settings are not public, stand numbered in the README.
"""

import json
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate.utils import set_seed
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from torch import distributed as dist
from transformers import get_cosine_schedule_with_warmup

from data import checkpoints, memory, models, runs, videolm
from data.clips import ClipError, Preparation, load_clips
from data.loader import ClipLoader
from data.sheets import draw_sheets, warn
from data.tiny import build_tiny
from data.world import embedded_world
from eval import EVAL_TOKENS, evaluate, show_results

PRESETS = {
    "tiny": dict(steps=1000, batch_size=16, micro_batch_size=16, learning_rate=7e-4, max_frames=16, eval_every=250),
    "gpu-24gb": dict(
        steps=2000, batch_size=16, micro_batch_size=1, learning_rate=1e-4, max_frames=32, fps=2.0, max_pixels=256 * 28 * 28,
        quantize="nf4", lora_rank=16, freeze_vision=True, gradient_checkpointing=True, workers=4, save_every=100,
    ),
    "gpu-80gb": dict(
        steps=2000, batch_size=32, micro_batch_size=4, learning_rate=1e-4, max_frames=64, fps=2.0, lora_rank=64,
        freeze_vision=True, gradient_checkpointing=True, workers=8, save_every=100,
    ),
}  # fmt: skip
DEFAULTS = dict(
    fps=None, max_pixels=None, quantize="none", lora_rank=0, freeze_vision=False, gradient_checkpointing=False,
    eval_every=-1, save_every=-1,
)  # fmt: skip
FREE = ("out", "memory_gb", "resume", "workers", "time_limit", "log_every", "save_every", "eval_every", "eval_clips",
        "sheets", "tracker")  # fmt: skip


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
    follow_links: bool = False
    """Read videos that are links to files outside the root, as all files of a hub cache are."""
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
    quantize: Literal["none", "nf4"] | None = None
    """nf4: the frozen weights in 4 bits (bitsandbytes), for LoRA on small cards."""
    lora_rank: int | None = None
    """Rank of LoRA adapters on the linear layers (0: train all weights)."""
    freeze_vision: bool | None = None
    """Leave the vision encoder as it is."""
    shard: bool = False
    """Shard weights, gradients and optimizer over the processes (FSDP2), to train all weights of a large model."""
    memory_gb: float | None = None
    """Memory that a run may fill, in GiB (default: what the device has free); one that would not fit does not start."""
    gradient_checkpointing: bool | None = None
    """Recompute layers in the backward pass to save memory."""
    max_frames: int | None = None
    """Frames sampled from a clip, at most."""
    fps: float | None = None
    """Frames sampled a second (default: max_frames, whatever the length)."""
    max_pixels: int | None = None
    """Height times width of a picture that the model sees, at most; larger ones are scaled down (default: the processor's
    own limit)."""
    max_text_tokens: int | None = None
    """Tokens of a clip's prompt and caption, at most; a clip with more is skipped (default: what the model's context leaves
    beside the video)."""
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
    save_every: int | None = None
    """Steps between checkpoints (-1: only at the end)."""
    resume: bool = False
    """Go on from the newest whole checkpoint in --out, exactly as if nothing had happened; without one, start."""
    max_bad_steps: int = 10
    """Steps in a row with NaN or Inf in loss or gradient (each is skipped and counted) after which the run stops."""
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Send metrics there, too."""
    sheets: int = 4
    """Contact sheets to draw."""
    world_clips: int = 6000
    """Training clips of the embedded world."""
    seed: int = 0
    """Seed of weights, order and jitter."""


def resolve(settings: Settings) -> Settings:
    """Fill what is None from the preset, check what is given, and make the embedded world and model where needed."""
    s = runs.fill(settings, DEFAULTS | PRESETS[settings.preset])
    runs.above_zero(s, "steps", "batch_size", "micro_batch_size", "learning_rate", "max_frames", "log_every", "time_limit")
    runs.above_zero(s, "max_bad_steps", "max_pixels", "max_text_tokens")
    if s.shard and s.quantize == "nf4":
        raise ValueError(
            "--shard with --quantize nf4: FSDP2 damages 4-bit weights (bitsandbytes issue 1945); give one of them"
        )
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
    # --- set-up: processes, settings, clips, model, optimizer
    accelerator = runs.start_processes(settings.tracker, settings.out)
    device, main_process = accelerator.device, accelerator.is_main_process
    rank, world_size = accelerator.process_index, accelerator.num_processes
    peers = dist.new_group(backend="gloo") if world_size > 1 else None  # for words between processes, see `runs.agree`
    with accelerator.main_process_first():
        s = resolve(settings)
    set_seed(s.seed)
    if s.batch_size % (s.micro_batch_size * world_size):
        raise ValueError(
            f"--batch-size {s.batch_size} is not a multiple of micro-batch {s.micro_batch_size} x {world_size} processes"
        )
    console = Console(quiet=not main_process)
    resumed = checkpoints.resume(s, FREE, world_size)
    clips, problems = load_clips(s.data, s.root, s.follow_links)
    eval_clips, eval_problems = load_clips(s.eval_data, s.root, s.follow_links) if s.eval_data else ([], [])
    processor, contrastive = models.load_processor(s.model), s.contrastive_weight > 0
    architecture = memory.skeleton(s.model)
    context = architecture.config.text_config.max_position_embeddings
    preparation = Preparation(processor, s.max_frames, s.fps, s.jitter, s.max_pixels, context)
    steady = replace(preparation, jitter=False)
    clips, too_long = memory.leave_out_long(clips, steady, s.max_text_tokens)
    eval_clips, eval_too_long = memory.leave_out_long(eval_clips, steady, s.max_text_tokens, EVAL_TOKENS, captions=False)
    problems, eval_problems = problems + too_long, eval_problems + eval_too_long
    twin_layers = (s.contrastive_layer or architecture.config.text_config.num_hidden_layers // 2) * contrastive
    load = memory.Load(s.micro_batch_size, *memory.longest(clips, steady), twin_layers)
    models.choose_threads(architecture, device)
    console.print(memory.check_memory(architecture, load, vars(s), device, s.memory_gb, world_size))
    held = memory.held_bytes(device)  # before there is a model
    adapters = s.quantize, s.lora_rank, s.freeze_vision
    hf = models.load_trainable(s.model, *adapters, s.gradient_checkpointing, device, resumed.path)
    lm = videolm.VideoLM(hf, s.contrastive_layer, s.temperature)
    lm.heads.requires_grad_(contrastive)
    if resumed.path and contrastive:
        lm.heads.load_state_dict(checkpoints.load_file(resumed.path / "heads.safetensors"))
    lm.to(device)
    if s.shard:
        models.shard(lm, device)
    share = dict(rank=rank, world_size=world_size, block=s.micro_batch_size)
    loader = ClipLoader(clips, preparation, s.seed, s.workers, s.time_limit, s.max_bad_share, **share)
    trained = [p for p in lm.parameters() if p.requires_grad]
    groups = [{"params": [p for p in part.parameters() if p.requires_grad]} for part in (lm.hf, lm.heads)]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, s.learning_rate, betas=(0.9, 0.99), weight_decay=s.weight_decay, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(s.warmup * s.steps), s.steps)
    saved = checkpoints.restore(resumed, lm, optimizer, schedule, loader, rank) if resumed.path else {}
    loader.start()
    log = runs.RunLog(s.out, s, accelerator, resumed.step)
    notes = resumed.notes + [f"[yellow]skipped[/] {escape(problem)}" for problem in eval_problems]
    runs.show_start(console, s, clips, problems, lm, notes, world_size)
    if main_process:
        draw_sheets(clips[: s.sheets], steady, s.out, console)

    def save(step: int, merged: bool) -> None:
        mine = {"loader": at, "pending": [line.tolist() for line in pending]}
        more = {"bad_steps": bad_steps.item(), "bad_in_a_row": bad_in_a_row.item()}
        checkpoints.save(s, step, lm, processor, optimizer, schedule, accelerator, mine, more, merged)

    def evaluation(step: int, count: int) -> dict:
        scored = eval_clips if count < 0 else eval_clips[:count]
        results = evaluate(lm, steady, scored, workers=s.workers, time_limit=s.time_limit, accelerator=accelerator)
        log.write({"step": step} | {f"eval/{p} {n}": v for p in ("full", "twin") for n, v in results[p].items()})
        if main_process:
            (s.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        show_results(results, f"step {step}", console)
        return results

    def evaluates(step: int) -> bool:
        return bool(eval_clips) and step < s.steps and s.eval_every > 0 and step % s.eval_every == 0

    def rescue() -> bool:  # memory has run out in the middle of a step
        optimizer.zero_grad()
        if step - 1 > resumed.step:
            save(step - 1, True)
        return step - 1 > resumed.step

    stop_asked = []
    signal.signal(signal.SIGTERM, lambda *_: stop_asked.append(True))

    # --- the loop: data -> forward, backward -> step -> log -> save -> eval
    examples, at, step = loader.examples(), loader.state(), resumed.step
    num_micro = s.batch_size // (s.micro_batch_size * world_size)
    pending = [torch.tensor(line, device=device) for line in saved.get("pending", [])]
    results, metrics, tokens_seen, steps_seen = None, {}, 0, 0  # seen: by this process, since the last line
    bad_steps = torch.tensor(resumed.state.get("bad_steps", 0.0), device=device)
    bad_in_a_row = torch.tensor(resumed.state.get("bad_in_a_row", 0.0), device=device)
    if resumed.step and evaluates(resumed.step):  # it may have been killed in the middle of that
        evaluation(resumed.step, s.eval_clips)
    began = mark = time.perf_counter()
    peak = memory.PeakMemory(device)  # loading is over: what counts from here on is the peak of a step
    explained = memory.out_of_memory_explained(architecture, load, vars(s), device, rescue, world_size)
    live_table = Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext()
    with loader, explained, peak, live_table as live:
        for step in range(resumed.step + 1, s.steps + 1):
            # All micro-batches are collated first, so that losses are divided by the counts of the whole step.
            batches, lost = [], None
            try:
                batches = [lm.collate([next(examples)[1] for _ in range(s.micro_batch_size)]) for _ in range(num_micro)]
            except ClipError as error:
                lost = error
            counts = [sum(len(b.label_ids) for b in batches), sum(len(b.keyword_ids) for b in batches)]
            *counts, any_lost, any_stop = runs.agree([*counts, lost is not None, len(stop_asked)], peers)
            if any_lost:  # too many clips are lost: end the run, but keep what it has learned
                if step - 1 > resumed.step:
                    save(step - 1, True)
                raise lost or ClipError("another process has lost too many clips")
            # Gradients are averaged over processes: each divides by the mean count.
            num_tokens, num_keywords = counts[0] / world_size, max(1.0, counts[1] / world_size)
            losses = torch.zeros(4, device=device)
            for batch in batches:
                with accelerator.autocast():
                    out = lm(batch.to(device), contrastive, s.twin_negatives)
                lm_loss, con_loss = out.lm_loss / num_tokens, out.contrastive_loss / num_keywords
                (lm_loss + s.contrastive_weight * con_loss).backward()
                positives, negatives = out.metrics.get("positives", 0), out.metrics.get("negatives", 0)
                parts = [lm_loss.detach(), con_loss.detach(), positives / num_keywords, negatives / num_keywords]
                losses += torch.stack([torch.as_tensor(p, device=device) for p in parts])
            losses = accelerator.reduce(losses, "mean")
            runs.average_gradients(trained, world_size)
            grad_norm = models.clip_gradients(trained, s.grad_clip)
            # A step with NaN or Inf is left out by the fused optimizer itself: nobody waits for the device to know.
            optimizer.found_inf = 1.0 - torch.isfinite(losses.sum() + grad_norm).float()
            bad_steps += optimizer.found_inf
            bad_in_a_row = (bad_in_a_row + 1) * optimizer.found_inf
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            at = loader.state()
            if step == resumed.step + 1:
                console.print(memory.measured(peak.stop(), held))

            # --- log: the device is read only here
            pending.append(torch.cat([losses, grad_norm.view(1), optimizer.found_inf.view(1)]))
            tokens_seen += sum(b.input_ids.numel() for b in batches) * world_size
            steps_seen += 1
            if step % s.log_every == 0 or step == s.steps:
                values = torch.stack(pending).float()
                means = values[values[:, -1] == 0].mean(0).tolist()  # of the steps that counted
                now = time.perf_counter()
                seconds = (now - mark) / steps_seen  # not `pending`, which holds steps from before a --resume
                metrics = {"step": step, "loss/lm": means[0]}
                if contrastive:
                    names = ("loss/contrastive", "contrastive/positives", "contrastive/negatives")
                    metrics |= dict(zip(names, means[1:4]))
                    metrics["contrastive/temperature"] = lm.heads.temperature.item()
                metrics |= {"grad_norm": means[4], "lr": schedule.get_last_lr()[0], "bad_steps": bad_steps.item()}
                metrics |= {"perf/step_seconds": seconds, "perf/tokens_per_second": tokens_seen / (now - mark)}
                metrics["data/skipped"] = sum(runs.agree([len(loader.skipped)], peers))
                pending, tokens_seen, steps_seen, mark = [], 0, 0, now
                log.write(metrics)
                left = (s.steps - step) * (now - began) / (step - resumed.step)
                if live:
                    live.update(runs.progress_table(f"stage 1  step {step}/{s.steps}", metrics, left), refresh=True)
                elif step % (10 * s.log_every) == 0 or step == s.steps:
                    shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
                    console.print(f"{shown}  {left / 60:.1f} min left", highlight=False, soft_wrap=True)
                if bad_in_a_row >= s.max_bad_steps:
                    save(step, True)
                    raise runs.too_many_bad(int(bad_in_a_row), "steps", s.out)

            # --- save, eval: in this order, so that no evaluation can lose what is trained
            last = step == s.steps or any_stop > 0  # by SIGTERM: save at once, and end well
            if last or (s.save_every > 0 and step % s.save_every == 0):
                save(step, step == s.steps)
            if evaluates(step) and not last:
                evaluation(step, s.eval_clips)
                mark = time.perf_counter()
            if last:
                break

    # --- afterwards: the last evaluation, on all clips
    seconds = time.perf_counter() - began
    if eval_clips and step == s.steps:
        results = evaluation(step, -1)
    for reason in loader.skipped.values():
        warn(console, "skipped", reason)
    if main_process:
        panels = [["loss/lm", "loss/contrastive"], ["contrastive/temperature"], ["grad_norm"]]
        if results and results["full"]:
            name = "action right" if "action right" in results["full"] else "caption similarity"
            panels.append([f"eval/full {name}", f"eval/twin {name}"])
        console.print(f"{log.plot(panels)}\n{s.out / 'checkpoint'}  ({step} steps in {seconds:.0f} s)", markup=False)
    accelerator.end_training()
    return results


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
