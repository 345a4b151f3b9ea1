"""What the method costs: a training step with and without twins; rollouts, updates and questions with shared prefixes."""

import json
import math
import multiprocessing
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from rich.console import Console

import vp
from data import videolm
from data.checks import check_above_zero
from data.clips import load_clips
from data.device import best_device, wait_and_time
from data.examples import Preparation, chat
from data.loader import ClipLoader
from data.run.log import describe_environment
from data.run.memory import PeakMemory, held_bytes
from data.run.models import load_model, load_plain
from data.tiny import build_tiny
from data.video import PROMPT


@dataclass
class CostSettings:
    """Time and memory with shared prefixes against the plain way, on random pixels; results must be equal."""

    what: Literal["stage-1", "stage-2", "questions"] = "stage-2"
    """A step of stage 1 with its twin, rollouts and updates of stage 2, or questions about one video."""
    model: str | None = None
    """Qwen2.5-VL checkpoint (default: the tiny one, made on the spot)."""
    visual_tokens: int = 1024
    """Visual tokens of the clip, a multiple of 16, 32 or more."""
    new_tokens: int = 64
    """Tokens of a description, or of an answer."""
    rollouts: int = 8
    """G, descriptions of the full video, and of the twin; or the number of questions."""
    repeats: int = 5
    """Runs of each, in turn; medians are shown."""
    out: Path = Path("runs/cost")
    """Folder of cost.json and cost.md."""


def step_seconds(model: str, data: Path, pairs: int = 30, batch_size: int = 16) -> tuple[float, float]:
    """Median seconds of a training step with and without the contrastive loss, the two in turn on the same batches."""
    lm, processor = load_model(model)
    lm.train()
    optimizer = torch.optim.AdamW(lm.parameters(), 1e-5)
    clips, _ = load_clips(data)
    loader = ClipLoader(clips, Preparation(processor), workers=0)
    stream, seconds = loader.examples(), ([], [])
    for _ in range(pairs):
        batch = lm.collate([next(stream)[1] for _ in range(batch_size)]).to(lm.device)
        for contrastive in (True, False):
            began = wait_and_time(lm.device)
            out = lm(batch, contrastive)
            (out.lm_loss / len(batch.label_ids) + out.contrastive_loss / len(batch.keyword_ids)).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[not contrastive].append(wait_and_time(lm.device) - began)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def load_both(model: str) -> tuple[videolm.VideoLM, torch.nn.Module, object]:
    """The same weights twice, as a VideoLM and as transformers' own model; and their processor.

    The second has the published positions (data/positions.py), so that both compute the same, and nothing else of ours.
    """
    torch.manual_seed(0)  # random:NAME draws its weights
    lm, processor = load_model(model)
    torch.manual_seed(0)
    return lm, load_plain(model)[0], processor


def long_example(lm: videolm.VideoLM, processor, visual_tokens: int) -> vp.Example:
    """A clip of random pixels with a prompt, a third of its slots key."""
    generator = torch.Generator().manual_seed(0)
    vision, num_slots = lm.config.vision_config, visual_tokens // 16
    side = 4 * vision.spatial_merge_size  # patches: four by four tokens a slot
    text = chat(processor, PROMPT)
    ids = processor.tokenizer(text.replace("<|video_pad|>", "<|video_pad|>" * visual_tokens)).input_ids
    ids = torch.tensor(ids)
    key = torch.zeros(num_slots, dtype=torch.bool)
    key[num_slots // 3 : 2 * num_slots // 3] = True
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return vp.Example(
        name="random", input_ids=ids, token_types=2 * (ids == lm.config.video_token_id).long(), prompt_length=len(ids),
        pixels=torch.randn(num_slots * side**2, width, generator=generator), grid=torch.tensor([num_slots, side, side]),
        seconds_per_slot=0.5, source=vp.twin_sources(key), keywords=[],
    )  # fmt: skip


def step_jobs(settings: CostSettings) -> dict:
    """A step of stage 1 on one clip: a plain loop, which encodes the twin's frames, runs both videos through the
    whole model and makes all logits, against ours; the same loss, the same gradient."""
    lm, hf, processor = load_both(settings.model)
    example = long_example(lm, processor, settings.visual_tokens)
    caption = torch.randint(0, 256, (settings.new_tokens,), generator=torch.Generator().manual_seed(1))
    slots = example.source != torch.arange(len(example.source))
    example = replace(
        example, input_ids=torch.cat([example.input_ids, caption]), keywords=[vp.Keyword("it", caption[:3], slots)],
        token_types=torch.cat([example.token_types, torch.zeros_like(caption)]),
    )  # fmt: skip
    batch, layer = lm.collate([example]), lm.contrastive_layer
    per_slot = len(example.pixels) // len(slots)
    degraded = example.pixels.view(-1, per_slot, example.pixels.shape[1])[example.source].flatten(0, 1)
    device = lm.device
    batch, degraded = batch.to(device), degraded.to(device)

    def gradient(loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
        loss.backward()
        result = model.model.language_model.layers[0].self_attn.q_proj.weight.grad.clone()
        model.zero_grad()
        lm.heads.zero_grad()
        return torch.cat([loss.detach().view(1), result.flatten()])

    def ours() -> torch.Tensor:
        out = lm(batch)
        return gradient(out.lm_loss + out.contrastive_loss, lm.hf)

    def plain() -> torch.Tensor:
        inputs = lm.inputs(batch, None) | {"output_hidden_states": True, "use_cache": False}
        del inputs["mm_encoder_outputs"]
        full, twin = (hf(**inputs, pixel_values_videos=pixels) for pixels in (batch.pixels.to(device), degraded))
        lm_loss = F.cross_entropy(full.logits.flatten(0, 1)[batch.label_rows].float(), batch.label_ids, reduction="sum")
        h, h_twin = (x.hidden_states[layer].flatten(0, 1)[batch.key_rows] for x in (full, twin))
        t = hf.get_input_embeddings()(batch.keyword_ids).detach().mean(1)
        return gradient(lm_loss + lm.heads(h, h_twin, t, batch.key_tokens)[0], hf)

    return {"step, plain transformers": plain, "step, the twin's event behind a shared prefix": ours}


def cost_jobs(settings: CostSettings) -> dict:
    """The four measured functions and their names: each runs once when called and returns what its rival must equal."""
    lm, plain, processor = load_both(settings.model)
    hf, example, G = lm.hf, long_example(lm, processor, settings.visual_tokens), settings.rollouts
    device = lm.device
    for model in (hf, plain):  # nothing ends a text: every description is as long as it may be
        model.generation_config.eos_token_id = lm.config.text_config.vocab_size
    generator = torch.Generator().manual_seed(1)
    ys = [[torch.randint(0, 256, (settings.new_tokens,), generator=generator) for _ in range(G)]]
    with torch.no_grad():
        video = lm.encode_examples([example])
    hf.model.visual.requires_grad_(False)
    per_slot = len(example.pixels) // int(example.grid[0])
    degraded = example.pixels.view(-1, per_slot, example.pixels.shape[1])[example.source].flatten(0, 1)

    def update(share: bool) -> torch.Tensor:
        lm.shares_prefix = share
        logp, _ = lm.log_probs(lm.pack_rollouts([example], ys).to(device), video)
        advantage = torch.linspace(-1, 1, G, device=device).repeat_interleave(settings.new_tokens)
        vp.grpo_loss(logp, logp.detach(), None, advantage, torch.ones_like(logp))[0].backward()
        gradient = hf.model.language_model.layers[0].self_attn.q_proj.weight.grad.clone()
        hf.zero_grad()
        return torch.cat([logp.detach(), gradient.flatten()])

    def shared_rollouts() -> torch.Tensor:
        lm.shares_prefix = True
        return lm.roll_out([example], G, G, settings.new_tokens)[0].tokens[0]

    def generate_twice() -> torch.Tensor:
        parts = []
        for pixels in (example.pixels, degraded):
            inputs = {"input_ids": example.input_ids[None], "mm_token_type_ids": example.token_types[None]}
            inputs |= {"pixel_values_videos": pixels, "video_grid_thw": example.grid[None]}
            inputs |= {
                "second_per_grid_ts": torch.tensor([0.5]),
                "attention_mask": torch.ones_like(example.input_ids)[None],
            }
            inputs = {k: v.to(device) for k, v in inputs.items()}
            # num_return_sequences needs sampling; top_k=1 makes it greedy, so that the tokens can be compared
            out = plain.generate(
                **inputs, max_new_tokens=settings.new_tokens, do_sample=True, top_k=1, num_return_sequences=G,
                suppress_tokens=lm.banned.tolist(),
            )  # fmt: skip
            parts.append(out[:, example.prompt_length :])
        return torch.cat(parts)

    jobs = {"update, separate sequences": lambda: update(False), "update, shared prefix": lambda: update(True)}
    return jobs | {"rollouts, two generate()": generate_twice, "rollouts, shared prefix": shared_rollouts}


def question_jobs(settings: CostSettings) -> dict:
    """The same for questions about one video: a generate() each against one prefill for all."""
    lm, plain, processor = load_both(settings.model)
    example, device = long_example(lm, processor, settings.visual_tokens), lm.device
    for model in (lm.hf, plain):  # nothing ends a text: every answer is as long as it may be
        model.generation_config.eos_token_id = lm.config.text_config.vocab_size
    shared = int((example.input_ids == lm.config.vision_end_token_id).nonzero()[-1]) + 1
    tails = []
    for i in range(settings.rollouts):  # questions of unequal length
        text = chat(processor, f"Question {i}: " + "what happens then, " * (i % 3 + 1) + "and why?")
        ids = torch.tensor(processor.tokenizer(text).input_ids)
        tails.append(ids[int((ids == lm.config.vision_end_token_id).nonzero()[-1]) + 1 :])
    prefix = {"input_ids": example.input_ids[:shared], "token_types": example.token_types[:shared]}
    prefix = replace(example, **prefix, prompt_length=shared, source=None)

    def one_each() -> torch.Tensor:
        said = []
        for tail in tails:
            ids = torch.cat([prefix.input_ids, tail])
            inputs = {"input_ids": ids[None], "mm_token_type_ids": 2 * (ids == lm.config.video_token_id).long()[None]}
            inputs |= {"pixel_values_videos": example.pixels, "video_grid_thw": example.grid[None]}
            inputs |= {"second_per_grid_ts": torch.tensor([0.5]), "attention_mask": torch.ones_like(ids)[None]}
            inputs = {k: v.to(device) for k, v in inputs.items()}
            banned = lm.banned.tolist()
            out = plain.generate(**inputs, max_new_tokens=settings.new_tokens, do_sample=False, suppress_tokens=banned)
            said.append(out[0, len(ids) :])
        return torch.stack(said)

    name = f"{settings.rollouts} questions"
    return {
        f"{name}, one prefill each": one_each,
        f"{name}, one prefill": lambda: lm.answer([prefix], [tails], settings.new_tokens).tokens[0],
    }


JOBS = {"stage-1": step_jobs, "stage-2": cost_jobs, "questions": question_jobs}


def peak_of_job(settings: CostSettings, name: str) -> float:
    """Peak memory of one run above what was held before, NaN if not known; in a process of its own on the CPU."""
    job = JOBS[settings.what](settings)[name]
    device = best_device()
    if device.type != "cpu":  # the first run compiles
        job()
    held = held_bytes(device)
    with PeakMemory(device) as peak:
        job()
    return peak.stop() - held


def run_cost(settings: CostSettings, console: Console) -> dict:
    """The command `python eval.py cost`."""
    check_above_zero(settings, "new_tokens", "rollouts", "repeats")
    if settings.visual_tokens < 32 or settings.visual_tokens % 16:
        raise ValueError(f"--visual-tokens: got {settings.visual_tokens}; give a multiple of 16, 32 or more")
    settings.model = settings.model or str(build_tiny(settings.out / "tiny"))
    jobs, seconds, results = JOBS[settings.what](settings), {}, {}
    for repeat in range(settings.repeats + 1):
        for name, job in jobs.items():
            began = time.perf_counter()
            results[name] = job().float().cpu()
            if repeat:  # the first warms up
                seconds.setdefault(name, []).append(time.perf_counter() - began)
    names, rows, record = list(jobs), [], {"settings": vars(settings) | {"out": str(settings.out)}}
    for plain, shared in zip(names[::2], names[1::2]):
        torch.testing.assert_close(results[plain], results[shared], rtol=1e-3, atol=1e-3)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            peaks = pool.starmap(peak_of_job, [(settings, plain), (settings, shared)], chunksize=1)
        medians = [statistics.median(seconds[n]) for n in (plain, shared)]
        faster = sorted(a / b for a, b in zip(seconds[plain], seconds[shared]))  # in turn: other load slows both
        known = not any(map(math.isnan, peaks))
        record[shared] = {"plain seconds": medians[0], "shared seconds": medians[1], "times faster": faster}
        record[shared] |= {"plain bytes": peaks[0], "shared bytes": peaks[1]} if known else {}
        ratio = f"{statistics.median(faster):.1f} ({faster[0]:.1f} to {faster[-1]:.1f})"
        for name, t, peak, times in zip((plain, shared), medians, peaks, ("1", ratio)):
            bytes_cells = f"{peak / 2**20:.0f} MiB | {peak / peaks[0]:.2f}" if known else "not known | not known"
            rows.append(f"| {name} | {1e3 * t:.0f} ms | {times} | {bytes_cells} |")
    about = describe_environment()
    report = "\n".join([
        f"| {settings.what} | time (median) | times faster (least to most) | peak memory | of the plain way |",
        "|---" * 5 + "|", *rows,
        f"\n{settings.visual_tokens} visual tokens, {settings.new_tokens} new tokens, "
        + f"G = G' = {settings.rollouts}, " * (settings.what == "stage-2")
        + f"one clip; equal results; one run. Commit {about['commit']}, torch {about['torch']}, {about['device']}.",
    ]) + "\n"  # fmt: skip
    name = "cost" if settings.what == "stage-2" else f"cost-{settings.what}"
    (settings.out / f"{name}.md").write_text(report)
    (settings.out / f"{name}.json").write_text(json.dumps(record | about, indent=1, default=str) + "\n")
    console.print(report, highlight=False, soft_wrap=True)
    return record
