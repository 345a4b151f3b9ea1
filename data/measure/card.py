"""Fill every table that needs a card, in one go: python eval.py card

On any machine: what fits, by estimate (fits.md). With a GPU, without videos, downloads or FFmpeg: the kernels beside their
rivals (`python -m kernels.bench`), then steps of both stages of a 7B model with random weights, as the GPU presets have
them, on random pixels: seconds, tokens a second, the share of the card's own speed, and the measured memory beside the
estimated (card.md, card.json).
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

import vp
from data import videolm
from data.checks import check_within
from data.device import autocast, best_device, wait_and_time
from data.run import memory, models
from data.run.log import describe_environment
from data.run.processes import finish_gradients
from data.run.sizes import SIZES

HERE = Path(__file__).parents[2]
GIB = 2**30
# Settings that the estimate and the loading of a model read, of the two GPU presets, and the clips of each: how many of a
# micro-batch in stages 1 and 2, prompts of a step, slots, visual tokens a slot.
SMALL = dict(quantize="nf4", lora_rank=16, freeze_vision=True, gradient_checkpointing=True, shard=False, max_frames=32)
LARGE = SMALL | dict(quantize="none", lora_rank=64, max_frames=64)
PRESETS = {"gpu-24gb": (SMALL, (1, 1, 8), (16, 256)), "gpu-80gb": (LARGE, (2, 2, 16), (32, 529))}
TEXT, NEW, G, G_TWIN = 160, 128, 8, 4


@dataclass
class CardSettings:
    """Speed and memory on this machine's GPU, of the kernels and of both stages, for the tables of the documentation."""

    model: str = "random:qwen2.5-vl-7b"
    """A model with random weights: random:NAME."""
    presets: tuple[Literal["gpu-24gb", "gpu-80gb"], ...] = ("gpu-24gb", "gpu-80gb")
    """GPU presets whose steps are run."""
    steps: int = 4
    """Steps of each stage; the first warms up."""
    kernels: bool = True
    """Run `python -m kernels.bench`, too."""
    out: Path = Path("runs/card")
    """Folder of card.md, card.json and bench.json."""


def what_fits(names: Sequence[str] = tuple(SIZES)) -> str:
    """A table of estimates: GiB that each preset takes in all, weights and evaluation included, by model; see `PRESETS`."""
    head = " | ".join(f"{preset}, stage 1 | {preset}, stage 2" for preset in PRESETS)
    lines = [f"| model | {head} |", "|---" * (1 + 2 * len(PRESETS)) + "|"]
    for name in names:
        hf, cells = memory.skeleton(f"random:{name}"), []
        for s, (micro, update_prompts, prompts), (slots, per_slot) in PRESETS.values():
            visual, layers = slots * per_slot, hf.config.text_config.num_hidden_layers
            one = memory.Load(micro, visual, TEXT, twin_layers=layers // 2, eval_clips=32)
            two = memory.Load(
                update_prompts, visual, TEXT, rollouts=G, twin_rollouts=G_TWIN, twin_branch=True, new_tokens=NEW,
                prompts=prompts, eval_clips=32,
            )  # fmt: skip
            needs = [memory.SLACK * sum(memory.estimate(hf, load, s, gpu=True).values()) / GIB for load in (one, two)]
            cells += [f"{need:.1f}" for need in needs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def random_example(
    lm: videolm.VideoLM, slots: int, per_slot: int, text: int = TEXT, first: int | None = None
) -> vp.Example:
    """A clip of random pixels: so many slots, visual tokens a slot and tokens of text. first: slot in which the event
    begins (default: the middle one)."""
    c, v = lm.config, lm.config.vision_config
    width, caption = v.in_channels * v.temporal_patch_size * v.patch_size**2, text - 40
    prompt = [torch.full((20,), 7), torch.full((slots * per_slot,), c.video_token_id), torch.full((20,), 8)]
    ids = torch.cat([*prompt, torch.arange(10, 10 + caption)])
    key = torch.zeros(slots, dtype=torch.bool)
    first = slots // 2 if first is None else first
    key[first : first + 2] = True
    side = round((per_slot * v.spatial_merge_size**2) ** 0.5)
    return vp.Example(
        name="random", input_ids=ids, token_types=2 * (ids == c.video_token_id).long(), prompt_length=len(ids) - caption,
        pixels=torch.randn(slots * side * side, width, dtype=torch.bfloat16), grid=torch.tensor([slots, side, side]),
        seconds_per_slot=0.5, source=vp.twin_sources(key), keywords=[vp.Keyword("it", ids[-5:-2], key)],
    )  # fmt: skip


def stage_1(lm: videolm.VideoLM, examples: list[vp.Example]) -> int:
    """Forward and backward of a micro-batch. Returns the tokens that went through the whole model."""
    batch = lm.collate(examples)
    with autocast(lm.device):
        out = lm(batch.to(lm.device))
    (out.lm_loss / len(batch.label_ids) + out.contrastive_loss / len(batch.keyword_ids)).backward()
    return batch.input_ids.numel()


def rollouts(lm: videolm.VideoLM, examples: list[vp.Example]) -> int:
    """The rollouts of a step. Returns the tokens that were sampled."""
    numbers = torch.rand(len(examples), G + G_TWIN, NEW)
    lm.eval()
    with autocast(lm.device):
        found, _ = lm.roll_out(examples, G, G_TWIN, NEW, numbers)
    lm.train()
    return int(found.lengths.sum())


def update(lm: videolm.VideoLM, examples: list[vp.Example]) -> int:
    """Log-probabilities of a micro-batch's rollouts, forward and backward. Returns the tokens of the packed sequences."""
    with torch.no_grad(), autocast(lm.device):
        video = lm.encode_examples(examples)
    packed = lm.pack_rollouts(examples, [[torch.arange(NEW)] * (G + G_TWIN) for _ in examples], G).to(lm.device)
    with autocast(lm.device):
        logp, _ = lm.log_probs(packed, video)
    advantage = torch.linspace(-1, 1, len(logp), device=lm.device)
    vp.grpo_loss(logp, logp.detach(), logp.detach(), advantage, torch.ones_like(logp) / len(logp))[0].backward()
    return packed.input_ids.numel()


def measure(work: Callable[[], int], lm: videolm.VideoLM, steps: int) -> dict[str, float]:
    """Median seconds and tokens a second of some work, and its peak memory above what was held before."""
    seconds, held, tokens = [], torch.cuda.memory_allocated(), 0
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        began = wait_and_time(lm.device)
        tokens = work()
        finish_gradients(lm, 1.0, None)
        lm.zero_grad(set_to_none=False)
        seconds.append(wait_and_time(lm.device) - began)
    median = statistics.median(seconds[1:] or seconds)
    peak = torch.cuda.max_memory_allocated() - held
    return {"seconds": median, "tokens": tokens, "tokens_per_second": tokens / median, "measured": peak / GIB}


def product_speed() -> float:
    """FLOPs a second of a large product in bfloat16: the card's own speed."""
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(8):
        began = wait_and_time(x.device)
        x @ y
        seconds.append(wait_and_time(x.device) - began)
    return 2 * 8192**3 / statistics.median(seconds[2:])


def run_preset(preset: str, settings: CardSettings, speed: float) -> list[dict]:
    """A row for each kind of work of a preset."""
    s, (micro, update_prompts, prompts), (slots, per_slot) = PRESETS[preset]
    device = best_device()
    hf = models.load_trainable(
        settings.model, s["quantize"], s["lora_rank"], s["freeze_vision"], s["gradient_checkpointing"], device
    )
    lm = videolm.VideoLM(hf).to(device).train()
    hf.generation_config.eos_token_id = lm.config.text_config.vocab_size  # none: every description has full length
    example, visual = random_example(lm, slots, per_slot), slots * per_slot
    layers = lm.config.text_config.num_hidden_layers
    weights = models.num_parameters(lm.base.model.language_model)
    packed = memory.Load(
        update_prompts, visual, TEXT, rollouts=G, twin_rollouts=G_TWIN, twin_branch=True, new_tokens=NEW, prompts=prompts
    )  # fmt: skip
    alone = memory.Load(micro, visual, TEXT, twin_layers=layers // 2, event_tokens=2 * per_slot)
    work = {
        "stage 1": (stage_1, micro, alone, 6),
        "rollouts": (rollouts, prompts, packed, 2),
        "update": (update, update_prompts, packed, 6),
    }
    rows = []
    for name, (function, clips, load, flops) in work.items():
        examples = [example] * clips
        row = {"preset": preset, "what": name, "clips": clips, "visual_tokens": visual}
        try:
            row |= measure(lambda function=function, examples=examples: function(lm, examples), lm, settings.steps)
        except torch.OutOfMemoryError:
            row |= {"error": "out of memory"}
            torch.cuda.empty_cache()
            rows.append(row)
            continue
        row["estimated"] = sum(memory.phases(lm.base, load, s, True)[name].values()) / GIB
        # Useful work only: 2 FLOPs a weight and token forward, 4 backward; nothing for what checkpointing repeats.
        row["share_of_peak"] = flops * weights * row["tokens_per_second"] / speed
        rows.append(row)
    return rows


def markdown(rows: list[dict], about: dict, speed: float) -> str:
    """The table."""
    lines = [
        "| preset | what | clips x visual tokens | seconds | tokens a second | share of peak | measured | estimated |",
        "|---" * 8 + "|",
    ]
    for r in rows:
        head = f"| {r['preset']} | {r['what']} | {r['clips']} x {r['visual_tokens']} | "
        if "error" in r:
            lines.append(head + f"{r['error']} | | | | |")
            continue
        lines.append(
            head + f"{r['seconds']:.2f} | {r['tokens_per_second']:.0f} | {r['share_of_peak']:.0%} | "
            f"{r['measured']:.2f} GiB | {r['estimated']:.2f} GiB |"
        )
    date = time.strftime("%Y-%m-%d")
    return "\n".join([
        *lines, "", "Peak memory above weights and optimizer. The event is in the middle; the estimate takes it to "
        f"come first, where the twin shares nothing. Peak: {speed / 1e12:.0f} TFLOP/s, a product in bfloat16 in "
        f"this run. {about['device']}, torch {about['torch']}, commit {about['commit']}, {date}.", "",
    ])  # fmt: skip


def run_card(settings: CardSettings, console: Console) -> list[dict]:
    """The command `python eval.py card`."""
    check_within(settings, 2, math.inf, "steps")
    settings.out.mkdir(parents=True, exist_ok=True)
    fits = what_fits()
    (settings.out / "fits.md").write_text(fits)
    console.print(fits, highlight=False, soft_wrap=True)
    if best_device().type == "cpu":
        console.print("no GPU here: these are estimates, and nothing was measured; python eval.py doctor tells more")
        return []
    if settings.kernels:
        command = [sys.executable, "-m", "kernels.bench", "--out", str(settings.out.resolve())]
        if subprocess.run(command, cwd=HERE).returncode:
            console.print("[red]kernels.bench ended as said above; the presets follow all the same")
    speed, rows = product_speed(), []
    for preset in settings.presets:
        console.print(f"{preset}: {settings.model}", highlight=False)
        rows += run_preset(preset, settings, speed)
        torch.cuda.empty_cache()
    about = describe_environment()
    table = markdown(rows, about, speed)
    (settings.out / "card.md").write_text(table)
    (settings.out / "card.json").write_text(json.dumps({"rows": rows, "flops_per_second": speed} | about, indent=1) + "\n")
    console.print(table, highlight=False, soft_wrap=True)
    return rows
