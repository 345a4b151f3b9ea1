"""Stage 1: supervised fine-tuning with the twin-video contrastive loss.

    L = L_LM(caption | full video) + lambda * L_con(keywords; full video's key slots against the twin's)

For each clip: find the key slots of its keywords, encode the video once, and gather the twin's visual tokens from
it. Run the full video, and behind what the two share the twin's event, through the first l layers; pull the
keywords toward the full video's key-slot states there, and away from the twin's. Run the full video through the
other layers for the caption loss.

    python train_sft.py                                                           # embedded world, tiny model, CPU
    python train_sft.py --contrastive-weight 0                                    # the caption-only baseline
    python train_sft.py --no-twin-negatives                                       # ablation: in-batch negatives only
    python train_sft.py --preset gpu-24gb --model Qwen/Qwen2.5-VL-3B-Instruct --data clips.jsonl
    python train_sft.py --preset gpu-24gb --model random:qwen2.5-vl-7b --data clips.jsonl          # speed and memory only
    torchrun --nproc_per_node 8 train_sft.py --preset gpu-80gb --model Qwen/Qwen2.5-VL-7B-Instruct --data clips.jsonl
    python train_sft.py --frames skim --visual-tokens 2048 --data long.jsonl      # rare events in long videos
    python train_sft.py --resume                                                  # continue after a kill

The paper's equations and settings are not public. Our deviations are numbered in docs/method.md.
"""

import sys
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import data  # isort: skip  # noqa: F401  first of all: Ctrl-C ends with one word from here on

from data.batches import Batch
from data.checks import check_above_zero, check_within
from data.loader import ClipLoader
from data.measure.evaluate import EVAL_CLIPS, RunEvaluation, evaluation_panel
from data.run import checkpoints, memory, models
from data.run.processes import finish_gradients, skip_if_not_finite
from data.run.run import Run, counted
from data.run.settings import TrainSettings, by_preset, parse_settings
from data.run.sheets import draw_sheets
from data.tiny import BASE, build_tiny
from data.videolm import VideoLM
from data.world import embedded_world

# What may change when a run is resumed: nothing that a result depends on.
FREE = (
    "out", "memory_gb", "resume", "workers", "time_limit", "log_every", "save_every", "eval_every", "eval_clips",
    "eval_before", "sheets", "tracker",
)  # fmt: skip


# Metrics of a step; the first is all that captions alone have.
METRICS = ("loss/lm", "loss/contrastive", "contrastive/positives", "contrastive/negatives")

# Title -> metrics of the panels of curves.png.
PANELS = {
    "losses": ["loss/lm", "loss/contrastive"],
    "temperature τ": ["contrastive/temperature"],
    "gradient norm": ["grad_norm"],
}


@dataclass
class Settings(TrainSettings):
    """Settings of stage 1."""

    model: str | None = None
    """Hugging Face directory or hub name (default: the tiny Qwen2.5-VL of data/tiny.py, made on the spot)."""
    out: Path = Path("runs/sft")
    """Folder of the run."""
    steps: int = 1600
    """Optimizer steps."""
    batch_size: int = by_preset(8, 16, 32)
    """Clips a step, over all micro-batches and processes."""
    micro_batch_size: int = by_preset(8, 1, 2)
    """Clips a forward pass."""
    learning_rate: float = by_preset(1e-3, 1e-4, 1e-4)
    """Peak learning rate (AdamW, linear warm-up, constant, then a cosine to zero)."""
    decay: float = by_preset(0.25, 1.0, 1.0)
    """Share of the steps behind the warm-up, at the end, over which the learning rate falls to zero."""
    weight_decay: float = by_preset(0.3, 0.01, 0.01)
    """AdamW's weight decay."""
    contrastive_weight: float = 0.5
    """lambda; 0 is the caption-only baseline and computes nothing of the rest."""
    twin_negatives: bool = True
    """Use the twin's tokens as hard negatives."""
    twin_captions: float = 0.0
    """Share of the clips that are shown as their twin, with a caption that leaves its event sentences out."""
    contrastive_layer: int | None = None
    """l, layers after which states are compared (default: half of them)."""
    temperature: float = 0.1
    """tau at the start; it is learned, within [0.01, 1]."""
    jitter: bool = False
    """Jitter the sampled moments, differently in every epoch."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    eval_every: int = by_preset(500, -1, -1)
    """Steps between evaluations (-1: only at the end)."""
    save_every: int = by_preset(-1, 100, 100)
    """Steps between checkpoints (-1: only at the end)."""
    sheets: int = 4
    """Contact sheets to draw."""


def resolve(settings: Settings) -> Settings:
    """Check the settings, and make the embedded world and the tiny model if none are given."""
    # A copy: what was asked for stays as it was.
    s = replace(settings)
    s.check()
    check_above_zero(s, "steps", "batch_size", "micro_batch_size", "learning_rate", "log_every")
    check_within(s, 0, inf, "weight_decay", "contrastive_weight", "sheets")
    check_within(s, 0, 1, "decay", "twin_captions")
    check_within(s, 0.01, 1, "temperature")
    # Every pass has as many clips as any other, so that memory is known and no clip weighs more.
    if s.batch_size % s.micro_batch_size:
        raise ValueError(f"--batch-size {s.batch_size} is not a multiple of --micro-batch-size {s.micro_batch_size}")
    # A slot can be replaced only if there is another.
    if s.max_frames < 4:
        raise ValueError(f"--max-frames: got {s.max_frames}; a twin needs two slots, which is 4 frames")
    # Nothing given: everything is made on the spot, so that `python train_sft.py` runs anywhere.
    if s.model is None:
        s.model = str(build_tiny(Path("runs/tiny"), seed=s.seed, base=BASE))
    if s.data is None:
        world = embedded_world("train", s.world_clips)
        s.data, s.eval_data = world / "train.jsonl", s.eval_data or world / "test.jsonl"
    return s


def load_video_lm(s: Settings, run: Run, budget: memory.Budget) -> VideoLM:
    """The model to train, on its device, as the last checkpoint left it."""
    # Products of a tiny model are too small to be shared out among threads.
    models.choose_threads(budget.architecture, run.device)
    # Before any weight is loaded: a run that would not fit says so, and which settings need less.
    run.console.print(budget.check())
    # Weights as the settings ask: all of them or adapters, whole or in 4 bits; of the checkpoint, if the run goes on.
    hf = models.load_trainable(
        s.model, s.quantize, s.lora_rank, s.freeze_vision, s.gradient_checkpointing, run.device, run.resumed.path
    )  # fmt: skip
    # What the method adds to a Hugging Face model: heads for the contrastive loss, and the layer where states are caught.
    lm = VideoLM(hf, s.contrastive_layer, s.temperature)
    # Heads and temperature are trained beside the model, and dropped at the end.
    lm.heads.requires_grad_(s.contrastive_weight > 0)
    if run.resumed.path and s.contrastive_weight > 0:
        lm.heads.load_state_dict(checkpoints.load_file(run.resumed.path / "heads.safetensors"))
    lm.to(run.device)
    if s.shard:
        models.shard(lm, run.device)
    return lm


def take_batch(loader: ClipLoader, lm: VideoLM, count: int) -> Batch:
    """The next clips, padded into a batch, with every index worked out beforehand."""
    return lm.collate([taken.example for taken in loader.take(count)])


def main(settings: Settings) -> dict | None:
    """Train; returns the last evaluation."""
    # --- set-up: processes and settings, clips, model, optimizer, where to continue from
    # The run carries terminal, processes, logging and saving; it never touches model or optimizer.
    run = Run(settings, resolve, FREE)
    s, contrastive = run.settings, run.settings.contrastive_weight > 0
    # Gradient accumulation: so many forward passes make one step.
    num_micro = run.split_batch(s.micro_batch_size)
    # Lines that cannot be used are named here, with file and line, before the model is touched.
    clips, eval_clips, preparation = run.load_clips(new_tokens=0)
    # What a step will need is known before anything is loaded. The twin's event leaves after l layers.
    budget = run.budget(memory.Load(
        s.micro_batch_size, *memory.longest(clips, preparation), eval_clips=min(len(eval_clips), EVAL_CLIPS),
        twin_layers=(s.contrastive_layer or run.architecture.config.text_config.num_hidden_layers // 2) * contrastive,
    ))  # fmt: skip
    with budget.explained():
        lm = load_video_lm(s, run, budget)
    # Evaluation samples the same moments every time; training may jitter, and lays its windows at the key spans.
    loader = ClipLoader(
        clips,
        replace(preparation, jitter=s.jitter, twin_captions=s.twin_captions, skim=s.how_to_look(at_key_spans=True)),
        s.seed, s.workers, s.time_limit, s.max_bad_share, **run.share(s.micro_batch_size),
    )  # fmt: skip
    # Warm-up, stable, decay. The words follow what the contrastive loss has found while the steps are large: a short decay
    # learns more in as many steps (docs/results.md).
    optimizer = models.make_optimizer(lm, s.learning_rate, s.weight_decay)
    schedule = models.make_schedule(optimizer, s.steps, s.warmup, s.decay)
    # After a kill: optimizer, schedule, order of the clips and random numbers as they were.
    run.restore(lm, optimizer, schedule, loader)
    # A checkpoint is whole or not there, and opens in plain transformers.
    saver = checkpoints.Saver(run, lm, preparation.processor, optimizer, schedule)
    # The model describes full videos and twins; what is said is scored against the caption.
    evaluation = RunEvaluation(run, lm, preparation, eval_clips)
    run.show_start(clips, lm)
    # Look at these first: do the marked frames show the event?
    if run.is_main:
        draw_sheets(clips[: s.sheets], preparation, s.out, run.console)
    # What the model can do before it has learned anything here.
    evaluation.before()

    # --- the loop: data -> forward, backward -> step -> log -> save -> eval
    # Whatever ends it (Ctrl-C, a kill, no memory left): what was trained is saved first.
    with loader, run.guard(saver, budget):
        for _ in run.steps():
            # The whole step is collated first: losses are sums, divided by counts over all micro-batches.
            batches = run.together(lambda: [take_batch(loader, lm, s.micro_batch_size) for _ in range(num_micro)])
            num_tokens, num_keywords = run.mean_counts(
                sum(len(batch.label_ids) for batch in batches), sum(len(batch.keyword_ids) for batch in batches)
            )
            # Without any keyword the contrastive loss is 0, and must not become 0 / 0.
            num_keywords = max(1.0, num_keywords)
            sums = dict.fromkeys(METRICS if contrastive else METRICS[:1], 0.0)
            # Forward and backward, one micro-batch at a time.
            for batch in batches:
                with run.autocast():
                    # One vision pass; caption loss on the full video; equation (1) on states of both.
                    out = lm(batch.to(run.device), contrastive, s.twin_negatives)
                lm_loss, contrastive_loss = out.lm_loss / num_tokens, out.contrastive_loss / num_keywords
                (lm_loss + s.contrastive_weight * contrastive_loss).backward()  # L = L_LM + lambda L_con
                # Sums stay on the device: the loop reads it only when it logs.
                parts = {"loss/lm": lm_loss.detach(), "loss/contrastive": contrastive_loss.detach()}
                parts |= {f"contrastive/{name}": count / num_keywords for name, count in out.metrics.items()}
                sums = {name: total + parts.get(name, 0.0) for name, total in sums.items()}
            # Means over processes, then one clipped gradient step.
            losses = run.mean(sums)
            grad_norm = finish_gradients(lm, s.grad_clip, run.peers)
            # NaN and Inf: the fused optimizer leaves the step out by itself; nobody waits for the device.
            skipped = skip_if_not_finite(optimizer, sum(losses.values()) + grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

            # Bookkeeping: nothing below changes the model.
            run.count_bad(skipped)
            run.metrics.add(losses | {"grad_norm": grad_norm, "skipped": skipped})
            run.end_of_step(loader, sum(batch.input_ids.numel() for batch in batches))
            if run.due(s.log_every) or run.step == s.steps:
                state = {"lr": schedule.get_last_lr()[0], "bad_steps": run.bad_steps.item()}
                if contrastive:
                    state["contrastive/temperature"] = lm.heads.temperature.item()
                run.write_metrics(loader, counted(run.metrics.numbers()), state | run.speed())
            # Saved before it is evaluated: no evaluation can lose what was trained.
            if run.due(s.save_every) or run.is_last:
                saver.save(run.step, merged=run.step == s.steps)
            evaluation.between()

    # --- afterwards: the last evaluation, on all clips
    results = evaluation.after()
    run.show_skipped(loader)
    run.end(PANELS | evaluation_panel(results), "checkpoint")
    return results


if __name__ == "__main__":
    try:
        main(parse_settings(Settings, __doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
