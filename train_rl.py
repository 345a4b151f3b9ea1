"""Stage 2: GRPO with a relative reward. The model describes the full video and its twin; the full one must do better.

For each clip: encode the video once, prefill the prompt once (it forks into full video and twin at the first replaced
slot), sample G descriptions of each, score them against the caption, reward those of the full video for what they say of
the event beyond what the twin's say, and update on [prompt][y_1]...[y_G] packed into one sequence.

    python train_rl.py                                                # from runs/sft, embedded world, CPU
    python train_rl.py --reward similarity                            # caption similarity alone: watch the event go
    python train_rl.py --preset gpu-24gb --model runs/sft --data clips.jsonl
    torchrun --nproc_per_node 8 train_rl.py --preset gpu-80gb --model runs/sft --data clips.jsonl
    python train_rl.py --resume                                       # go on after a kill, bit for bit

Deviations from the paper, whose equations and settings are not public, stand numbered in the README.
"""

import json
import signal
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from accelerate.utils import gather_object, set_seed
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from torch import distributed as dist
from transformers import get_linear_schedule_with_warmup

import vp
from data import checkpoints, memory, models, runs, videolm
from data.clips import ClipError, Preparation, load_clips
from data.loader import ClipLoader
from data.sheets import RolloutGroup, rollout_page, rollout_table, warn
from data.texts import TextEncoder, embed_texts
from data.tiny import build_text_encoder
from data.world import embedded_world
from eval import EVAL_TOKENS, evaluate, show_change, show_results

PRESETS = {
    "tiny": dict(steps=450, batch_size=8, micro_batch_size=8, learning_rate=3e-4, max_frames=16, max_new_tokens=40),
    "gpu-24gb": dict(
        steps=500, batch_size=8, micro_batch_size=1, learning_rate=2e-5, max_frames=32, fps=2.0, max_pixels=256 * 28 * 28,
        quantize="nf4", lora_rank=16, gradient_checkpointing=True, workers=4, save_every=50, max_new_tokens=128,
        text_encoder="sentence-transformers/all-MiniLM-L6-v2",
    ),
    "gpu-80gb": dict(
        steps=500, batch_size=16, micro_batch_size=2, learning_rate=2e-5, max_frames=64, fps=2.0, lora_rank=64,
        gradient_checkpointing=True, workers=8, save_every=50, max_new_tokens=128,
        text_encoder="sentence-transformers/all-MiniLM-L6-v2",
    ),
}  # fmt: skip
DEFAULTS = dict(fps=None, max_pixels=None, quantize="none", lora_rank=0, gradient_checkpointing=False, save_every=-1)
FREE = ("out", "memory_gb", "resume", "workers", "time_limit", "log_every", "show_every", "save_every", "eval_every",
        "eval_clips", "eval_before", "tracker")  # fmt: skip


@dataclass
class Settings:
    """Settings of stage 2. What is None is filled from the preset."""

    preset: Literal["tiny", "gpu-24gb", "gpu-80gb"] = "tiny"
    """Hardware preset. The GPU presets are sized on paper, not yet measured."""
    model: str = "runs/sft"
    """Where stage 1 ended: a run's folder, a Hugging Face directory, or a name on the hub."""
    data: Path | None = None
    """Annotation file, JSONL (default: the embedded world)."""
    root: Path | None = None
    """Folder of the videos (default: the annotation file's)."""
    follow_links: bool = False
    """Read videos that are links to files outside the root, as all files of a hub cache are."""
    eval_data: Path | None = None
    """Annotation file to evaluate on before and after (default: the world's test split, or none)."""
    out: Path = Path("runs/rl")
    """Folder of the run."""
    reward: Literal["similarity", "recall", "relative", "pooled"] = "relative"
    """similarity: caption similarity q. recall: q + alpha * keyword recall. relative: q + alpha * share of beaten twins.
    pooled: as recall, against the mean over full and twin rollouts together."""
    alpha: float = 1.0
    """Weight of the event in the reward."""
    margin: float = 0.1
    """By how much keyword recall must be better, and quality may be worse, to beat a twin's rollout."""
    divide_by_spread: bool = False
    """Divide advantages by the standard deviation of their group."""
    text_encoder: str | None = None
    """sentence-transformers model whose token embeddings score descriptions (default: one that knows equal words only,
    made on the spot; for the world also kinds of words)."""
    num_rollouts: int = 8
    """G, descriptions of the full video a prompt."""
    num_twin_rollouts: int = 4
    """G', descriptions of its twin."""
    temperature: float = 1.0
    """Sampling temperature."""
    max_new_tokens: int | None = None
    """Longest description."""
    steps: int | None = None
    """Batches of rollouts."""
    batch_size: int | None = None
    """Prompts a step, over all micro-batches and processes."""
    micro_batch_size: int | None = None
    """Prompts an update pass; each brings its G descriptions."""
    epochs: int = 2
    """Updates on the same rollouts."""
    learning_rate: float | None = None
    """Peak learning rate (AdamW, linear warm-up, linear to zero)."""
    warmup: float = 0.05
    """Share of the steps that warms up."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    clip_low: float = 0.2
    """eps_low: how far below 1 a token's probability ratio may push."""
    clip_high: float = 0.28
    """eps_high: how far above 1."""
    beta: float = 0.1
    """Weight of the KL to the frozen stage-1 policy; 0 keeps no reference and computes nothing for it."""
    loss_level: Literal["token", "sequence"] = "token"
    """Whether every token of a batch counts alike, or every description."""
    quantize: Literal["none", "nf4"] | None = None
    """nf4: the frozen weights in 4 bits (bitsandbytes), for LoRA on small cards."""
    lora_rank: int | None = None
    """Rank of LoRA adapters on the linear layers (0: train all weights)."""
    shard: bool = False
    """Shard weights, gradients and optimizer over the processes (FSDP2), to train all weights of a large model."""
    memory_gb: float | None = None
    """Memory that a run may fill, in GiB (default: what the device has free); one that would not fit does not start."""
    train_vision: bool = False
    """Train the vision encoder, too; its pass is then repeated in the update, with gradients."""
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
    workers: int | None = None
    """Processes that decode ahead (0: none, and no time limit; default: 1, none for the embedded world on a CPU)."""
    time_limit: float = 60.0
    """Seconds after which a decoder counts as hung, and its clip is skipped."""
    max_bad_share: float = 0.05
    """Share of clips that may be lost before the run stops."""
    log_every: int = 5
    """Steps between two lines of metrics."""
    show_every: int = 50
    """Steps between two looks at descriptions side by side (-1: only at the end)."""
    eval_every: int = -1
    """Steps between evaluations (-1: only before and after)."""
    eval_clips: int = 64
    """Clips of an evaluation between (-1: all)."""
    eval_before: bool = True
    """Evaluate the stage-1 checkpoint first."""
    save_every: int | None = None
    """Steps between checkpoints (-1: only at the end)."""
    resume: bool = False
    """Go on from the newest whole checkpoint in --out, exactly as if nothing had happened; without one, start."""
    max_bad_steps: int = 10
    """Updates in a row with NaN or Inf in loss or gradient (each is skipped and counted) after which the run stops."""
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Send metrics there, too."""
    world_clips: int = 6000
    """Training clips of the embedded world."""
    seed: int = 0
    """Seed of order and sampling."""


def resolve(settings: Settings) -> Settings:
    """Fill what is None from the preset, check what is given, and make the embedded world and encoder where needed."""
    s = runs.fill(settings, DEFAULTS | PRESETS[settings.preset])
    runs.above_zero(s, "steps", "batch_size", "micro_batch_size", "learning_rate", "log_every", "time_limit", "temperature")
    runs.above_zero(s, "max_new_tokens", "epochs", "max_bad_steps", "max_pixels", "max_text_tokens")
    if s.num_rollouts < 2:
        raise ValueError(f"--num-rollouts: got {s.num_rollouts}; a group needs 2 descriptions to compare")
    if s.num_twin_rollouts < 0 or (s.num_twin_rollouts == 0 and s.reward in ("relative", "pooled")):
        raise ValueError(f"--num-twin-rollouts: got {s.num_twin_rollouts}; --reward {s.reward} compares with the twin's")
    if s.shard and s.quantize == "nf4":
        raise ValueError(
            "--shard with --quantize nf4: FSDP2 damages 4-bit weights (bitsandbytes issue 1945); give one of them"
        )
    if s.model == "runs/sft" and not Path(s.model, "checkpoint").exists():
        raise ValueError("there is no stage-1 checkpoint in runs/sft; run `python train_sft.py` first, or give --model")
    if s.text_encoder is None and s.data is None:
        s.text_encoder = str(build_text_encoder(Path("runs/text-encoder")))
    if s.data is None:
        s.data, test = embedded_world(s.world_clips)
        s.eval_data = s.eval_data or test
        if s.workers is None and not torch.cuda.is_available():
            s.workers = 0
    s.workers = 1 if s.workers is None else s.workers
    return s


def main(settings: Settings) -> dict | None:
    """Train; returns the last evaluation."""
    # --- set-up: processes, settings, clips, policy, reference, text encoder, optimizer
    accelerator = runs.start_processes(settings.tracker, settings.out)
    device, main_process = accelerator.device, accelerator.is_main_process
    rank, world_size = accelerator.process_index, accelerator.num_processes
    peers = dist.new_group(backend="gloo") if world_size > 1 else None  # for words between processes, see `runs.agree`
    with accelerator.main_process_first():
        s = resolve(settings)
    set_seed(s.seed)
    if s.batch_size % world_size:
        raise ValueError(f"--batch-size {s.batch_size} is not a multiple of {world_size} processes")
    console = Console(quiet=not main_process)
    resumed = checkpoints.resume(s, FREE, world_size)
    clips, problems = load_clips(s.data, s.root, s.follow_links)
    eval_clips, eval_problems = load_clips(s.eval_data, s.root, s.follow_links) if s.eval_data else ([], [])
    num_prompts, G, G_twin = s.batch_size // world_size, s.num_rollouts, s.num_twin_rollouts
    processor = models.load_processor(s.model)
    architecture = memory.skeleton(s.model)
    context = architecture.config.text_config.max_position_embeddings
    preparation = Preparation(processor, s.max_frames, s.fps, max_pixels=s.max_pixels, context=context)
    clips, too_long = memory.leave_out_long(clips, preparation, s.max_text_tokens, s.max_new_tokens)
    longest = max(s.max_new_tokens, EVAL_TOKENS)
    eval_clips, eval_too_long = memory.leave_out_long(eval_clips, preparation, s.max_text_tokens, longest, captions=False)
    problems, eval_problems = problems + too_long, eval_problems + eval_too_long
    load = memory.Load(
        s.micro_batch_size, *memory.longest(clips, preparation), rollouts=G, twin_rollouts=G_twin, prompts=num_prompts,
        new_tokens=s.max_new_tokens, reference=s.beta > 0 and not s.lora_rank,
    )  # fmt: skip
    adapters = dict(quantize=s.quantize, lora_rank=s.lora_rank, freeze_vision=not s.train_vision)
    models.choose_threads(architecture, device)
    console.print(memory.check_memory(architecture, load, vars(s) | adapters, device, s.memory_gb, world_size))
    held = memory.held_bytes(device)  # before there is a model
    hf = models.load_trainable(s.model, *adapters.values(), s.gradient_checkpointing, device, resumed.path)
    lm = videolm.VideoLM(hf).to(device)
    lm.heads.requires_grad_(False)
    if s.beta == 0:
        reference = None
    elif s.lora_rank:
        reference = lm  # the same weights with the adapter switched off
    else:
        reference = videolm.VideoLM(models.load_pretrained(s.model, torch.float32, device=device)[0]).to(device).eval()
        reference.requires_grad_(False)
    if s.shard:
        for model in (lm, reference) if reference not in (None, lm) else (lm,):
            models.shard(model, device)
    if s.text_encoder is None:
        console.print("[yellow]no --text-encoder: only equal words count as alike. For captions in free words give one, "
                      "such as sentence-transformers/all-MiniLM-L6-v2")  # fmt: skip
        words = [text for clip in clips for text in (clip.caption, *clip.keywords)]
        name = f"text-encoder-{zlib.crc32(' '.join(words).encode()):08x}"
        with accelerator.main_process_first():
            own_encoder = build_text_encoder(s.out / name, words)
        encoder = TextEncoder(own_encoder, device)
    else:
        encoder = TextEncoder(s.text_encoder, device)
    share = dict(rank=rank, world_size=world_size, block=num_prompts)
    loader = ClipLoader(clips, preparation, s.seed, s.workers, s.time_limit, s.max_bad_share, **share)
    trained = [p for p in lm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, s.learning_rate, betas=(0.9, 0.99), weight_decay=s.weight_decay, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, int(s.warmup * s.steps * s.epochs), s.steps * s.epochs)
    saved = checkpoints.restore(resumed, lm, optimizer, schedule, loader, rank) if resumed.path else {}
    loader.start()
    log = runs.RunLog(s.out, s, accelerator, resumed.step)
    notes = resumed.notes + [f"[yellow]skipped[/] {escape(problem)}" for problem in eval_problems]
    runs.show_start(console, s, clips, problems, lm, notes, world_size)
    if not lm.shares_prefix:
        console.print("[yellow]this model has layers of linear attention: its prefix is repeated for every rollout")

    def save(step: int, merged: bool) -> None:
        kept = [{n: float(v) for n, v in record.items() if not n.startswith("perf/")} for record in pending]
        mine = {"loader": at, "pending": kept}  # how fast this process was says nothing of the one that goes on
        more = {"before": before, "bad_steps": bad_steps.item(), "bad_in_a_row": bad_in_a_row.item()}
        checkpoints.save(s, step, lm, processor, optimizer, schedule, accelerator, mine, more, merged)

    def evaluation(step: int, count: int) -> dict:
        scored = eval_clips if count < 0 else eval_clips[:count]
        results = evaluate(lm, preparation, scored, workers=s.workers, time_limit=s.time_limit, accelerator=accelerator)
        log.write({"step": step} | {f"eval/{p} {n}": v for p in ("full", "twin") for n, v in results[p].items()})
        if main_process and step:
            (s.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        show_results(results, f"step {step}", console)
        return results

    def evaluates(step: int) -> bool:
        return bool(eval_clips) and step < s.steps and s.eval_every > 0 and step % s.eval_every == 0

    def rescue() -> bool:  # memory has run out in the middle of a step
        optimizer.zero_grad()
        pending.clear()  # it holds a part of the step
        if step - 1 > resumed.step:
            save(step - 1, True)
        return step - 1 > resumed.step

    before = resumed.state.get("before")
    if eval_clips and s.eval_before and not resumed.path:
        before = evaluation(0, -1) | {"rows": []}
    if resumed.step and evaluates(resumed.step):  # it may have been killed in the middle of that
        evaluation(resumed.step, s.eval_clips)
    stop_asked = []
    signal.signal(signal.SIGTERM, lambda *_: stop_asked.append(True))

    # --- the loop: rollouts -> rewards -> update -> log -> save -> eval
    examples, at, step, results = loader.examples(), loader.state(), resumed.step, None
    pending, shown, pages = list(saved.get("pending", [])), [], []
    bad_steps = torch.tensor(resumed.state.get("bad_steps", 0.0), device=device)
    bad_in_a_row = torch.tensor(resumed.state.get("bad_in_a_row", 0.0), device=device)
    began = time.perf_counter()
    peak = memory.PeakMemory(device)  # loading is over: what counts from here on is the peak of a step
    explained = memory.out_of_memory_explained(architecture, load, vars(s) | adapters, device, rescue, world_size)
    live_table = Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext()
    with loader, explained, peak, live_table as live:
        for step in range(resumed.step + 1, s.steps + 1):
            clock = {"data": time.perf_counter()}
            drawn, places, lost = [], [], None
            try:
                for _ in range(num_prompts):
                    drawn.append(next(examples))
                    places.append(loader.position)
            except ClipError as error:
                lost = error
            any_lost, any_stop = runs.agree([lost is not None, len(stop_asked)], peers)
            if any_lost:  # too many clips are lost: end the run, but keep what it has learned
                if step - 1 > resumed.step:
                    save(step - 1, True)
                raise lost or ClipError("another process has lost too many clips")
            prompts, group = [clips[index] for index, _ in drawn], [example for _, example in drawn]

            # Rollouts: numbers of each prompt's own decide its tokens, so that it does not depend on its batch mates.
            clock["rollouts"] = time.perf_counter()
            shape = (G + G_twin, s.max_new_tokens)
            draws = [np.random.default_rng([s.seed, place]).random(shape, np.float32) for place in places]
            lm.eval()
            with accelerator.autocast(), models.gathered(lm):
                rollouts, video = lm.roll_out(
                    group, G, G_twin, s.max_new_tokens, torch.from_numpy(np.stack(draws)), s.temperature
                )
            lm.train()
            rollouts = rollouts.to("cpu")
            lengths = rollouts.lengths.tolist()
            tokens = [[y[:n] for y, n in zip(ys, ns)] for ys, ns in zip(rollouts.tokens, lengths)]
            texts = [[x.strip() for x in processor.batch_decode(ys, skip_special_tokens=True)] for ys in tokens]

            # Rewards and advantages, prompt by prompt: equations (2) to (4).
            clock["reward"] = time.perf_counter()
            num_twin = [0 if e.source is None else G_twin for e in group]  # without a twin: none to compare
            about = [p.caption for p in prompts], [p.keywords for p in prompts], [G] * num_prompts, num_twin
            embedded = embed_texts(encoder, texts, *about)
            rewards = vp.paired_rewards(embedded, s.reward, s.alpha, s.margin, s.divide_by_spread)
            advantages, useful = [], []
            for b, scores in enumerate(rewards):
                q, c, w, r, a = vars(scores).values()
                q_twin, c_twin = q[G : G + num_twin[b]], c[G : G + num_twin[b]]
                advantages.append(a.cpu())
                useful.append(bool(a.abs().max() > 1e-6))  # without spread a group teaches nothing: it is skipped
                pending.append(
                    {
                        "reward/quality": q[:G].mean(),
                        "reward/keyword_recall": c[:G].mean(),
                        "reward/beaten_twins": w.mean(),
                        "reward/total": r.mean(),
                        "rollout/no_spread": float(r.max() - r.min() < 1e-6),
                    }
                )
                if len(q_twin):
                    twin = {"twin_quality": q_twin.mean(), "twin_keyword_recall": c_twin.mean()}
                    twin["gap"] = c[:G].mean() - c_twin.mean()
                    pending[-1] |= {f"reward/{name}": value for name, value in twin.items()}
                if len(shown) < 4:
                    shown.append(RolloutGroup(prompts[b], texts[b][:G], r.tolist(), texts[b][G:], q[G:].tolist()))

            # Update: [prompt][y_1]...[y_G] in one sequence a clip; divided by the whole batch's tokens: equation (5).
            clock["update"] = time.perf_counter()
            kept = [b for b in range(num_prompts) if useful[b] or s.shard]  # sharded: all must make the same passes
            sampled = rollouts.lengths[:, :G].flatten()
            num_tokens, num_useful = runs.agree([int(sampled.sum()), sum(useful)], peers)
            weight = vp.token_weights(sampled, s.loss_level, num_tokens / world_size).view(num_prompts, G)
            weight = weight * torch.tensor(useful)[:, None]
            parts = []
            for i in range(0, len(kept), s.micro_batch_size):
                part = kept[i : i + s.micro_batch_size]
                packed = lm.pack_rollouts([group[b] for b in part], [tokens[b][:G] for b in part])
                per_token = [  # log-probability when it was sampled, advantage and weight of each token
                    torch.cat([p[:n] for b in part for p, n in zip(rollouts.logp[b, :G], lengths[b])]),
                    torch.stack([advantages[b] for b in part]).flatten()[packed.rollout],
                    weight[part].flatten()[packed.rollout],
                ]
                packed, per_token = packed.to(device), [x.to(device) for x in per_token]
                ref_logp = None
                if reference is not None:
                    with torch.no_grad(), accelerator.autocast(), lm.hf.disable_adapter() if s.lora_rank else nullcontext():
                        seen = lm.take_clips(video, part)
                        if s.train_vision:
                            seen = reference.encode_examples([group[b] for b in part])
                        ref_logp, _ = reference.log_probs(packed, seen, s.temperature)
                parts.append((part, packed, per_token, ref_logp))
            for _ in range(s.epochs):
                totals = {}
                for part, packed, (old_logp, advantage, token_weight), ref_logp in parts:
                    with accelerator.autocast():
                        seen = lm.take_clips(video, part)
                        if s.train_vision:
                            seen = lm.encode_examples([group[b] for b in part])
                        logp, entropy = lm.log_probs(packed, seen, s.temperature)
                    clip = (s.clip_low, s.clip_high)
                    loss, sums = vp.grpo_loss(logp, old_logp, ref_logp, advantage, token_weight, *clip, s.beta)
                    loss.backward()
                    sums |= {"entropy": (token_weight * entropy).sum(), "weight": token_weight.sum(), "loss": loss.detach()}
                    for name, value in sums.items():
                        totals[name] = totals.get(name, 0.0) + value
                if num_useful:
                    runs.average_gradients(trained, world_size)
                grad_norm = models.clip_gradients(trained, s.grad_clip)
                # An update with NaN or Inf is left out by the fused optimizer itself: nobody waits for the device to know.
                loss = accelerator.reduce(torch.as_tensor(totals.get("loss", 0.0), device=device), "mean")
                optimizer.found_inf = 1.0 - torch.isfinite(loss + grad_norm).float()
                bad_steps += optimizer.found_inf
                bad_in_a_row = (bad_in_a_row + 1) * optimizer.found_inf
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            at = loader.state()
            if step == resumed.step + 1:
                console.print(memory.measured(peak.stop(), held))
            clock["end"] = time.perf_counter()

            # --- log: means over prompts, and over the tokens that were updated on
            about = {
                f"policy/{name}": totals[name] / totals["weight"].clamp(min=1e-9)
                for name in ("kl", "clipped", "entropy")
                if totals
            }
            about |= {"policy/loss": loss} if num_useful else {}
            about |= {"policy/grad_norm": grad_norm, "rollout/length": rollouts.lengths[:, :G].float().mean()}
            about |= {"rollout/cut_off": (~rollouts.finished[:, :G]).float().mean()}
            about |= {f"perf/{name}_seconds": t - clock[name] for name, t in zip(clock, list(clock.values())[1:])}
            about |= {f"perf/{name}_seconds": t for name, t in rollouts.seconds.items()}
            about["perf/tokens_per_second"] = rollouts.lengths.sum() * world_size / (clock["end"] - clock["rollouts"])
            pending.append(about)
            last = step == s.steps or any_stop > 0  # by SIGTERM: save at once, and end well
            if step % s.log_every == 0 or last:
                records = gather_object(pending) if world_size > 1 else pending
                metrics = {"step": step, "lr": schedule.get_last_lr()[0], "policy/bad_steps": bad_steps.item()}
                metrics["data/skipped"] = sum(runs.agree([len(loader.skipped)], peers))
                for name in dict.fromkeys(name for record in records for name in record):
                    values = [float(record[name]) for record in records if name in record]
                    metrics[name] = sum(values) / len(values)
                left = (s.steps - step) * (time.perf_counter() - began) / (step - resumed.step)
                log.write(metrics)
                if live:
                    live.update(runs.progress_table(f"stage 2  step {step}/{s.steps}", metrics, left), refresh=True)
                elif step % (5 * s.log_every) == 0 or last:
                    line = "  ".join(f"{k} {v:.3g}" for k, v in metrics.items() if k.split("/")[0] != "perf")
                    console.print(f"{line}  {left / 60:.1f} min left", highlight=False, soft_wrap=True)
                pending = []
                if bad_in_a_row >= s.max_bad_steps:
                    save(step, True)
                    raise runs.too_many_bad(int(bad_in_a_row), "updates", s.out)
            if main_process and (last or (s.show_every > 0 and step % s.show_every == 0)):
                console.print(rollout_table(shown[:1], step))
                pages.append((step, shown))
                rollout_page(s.out / "rollouts.html", pages)
                shown = []

            # --- save, eval: in this order, so that no evaluation can lose what is trained
            if last or (s.save_every > 0 and step % s.save_every == 0):
                save(step, step == s.steps)
            if evaluates(step) and not last:
                evaluation(step, s.eval_clips)
            if last:
                break

    # --- afterwards: the last evaluation, on all clips
    seconds = time.perf_counter() - began
    if eval_clips and step == s.steps:
        results = evaluation(step, -1)
    for reason in loader.skipped.values():
        warn(console, "skipped", reason)
    if main_process:
        panels = [["reward/quality", "reward/twin_quality"], ["reward/keyword_recall", "reward/twin_keyword_recall"]]
        panels += [["reward/beaten_twins", "rollout/no_spread"], ["policy/kl"], ["policy/entropy"]]
        if results and before:
            show_change(before, results, console)
        console.print(f"{log.plot(panels)}\n{s.out / 'rollouts.html'}\n{s.out / 'checkpoint'}  "
                      f"({step} steps in {seconds:.0f} s)", markup=False)  # fmt: skip
    accelerator.end_training()
    return results


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
