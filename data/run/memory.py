"""Will it fit? Memory of a training run, worked out from the architecture before anything is loaded.

It counts what grows: weights, gradients and optimizer, activations kept for the backward pass, the largest single
layer, the rollouts' cache. What it leaves out (allocator's fragments, the CUDA context) is covered by SLACK.
"""

import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import psutil
import torch
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from data.batches import TOKENS_AT_ONCE, TOKENS_HELD
from data.clips import named, split_long
from data.examples import Preparation, make_example
from data.files import ClipError
from data.run.models import LANGUAGE_LINEARS, VISION_LINEARS, find_checkpoint
from data.run.sizes import random_config
from data.video import PROMPT, Clip, read_frames
from kernels.logprob import STRETCH

SLACK = 1.1
GIB = 2**30
EVAL_TOKENS = 64  # the longest description of an evaluation in the middle of training


@dataclass
class Load:
    """What one pass of a run has to hold at the same time.

    clips: of a micro-batch; visual_tokens, text_tokens: of the longest clip. rollouts: descriptions that are packed behind
    each prompt (stage 2; 0 in stage 1), twin_rollouts as many more while sampling, new_tokens long each, prompts at a
    time. twin_branch: the update packs the twin's descriptions, too, and the twin's prompt. twin_layers: layers that the
    twin's event runs through in stage 1, event_tokens: how many it has (None: it may be the whole video). eval_clips:
    described at a time in evaluations (0: none). reference: a frozen second model is held.
    """

    clips: int
    visual_tokens: int
    text_tokens: int
    twin_layers: int = 0
    event_tokens: int | None = None
    rollouts: int = 0
    twin_rollouts: int = 0
    twin_branch: bool = False
    new_tokens: int = 0
    prompts: int = 0
    eval_clips: int = 0
    reference: bool = False


def longest(clips: Sequence[Clip], preparation: Preparation) -> tuple[int, int]:
    """Visual tokens and text tokens that a clip may bring, at most: by the pictures of the first clips, and by the longest
    caption."""
    per_slot, text = 0, 0
    for clip in [*clips[:3], *([max(clips, key=lambda c: len(c.prompt) + len(c.caption))] if clips else [])]:
        try:
            with named(clip):
                frames = read_frames(clip, 4, frames_per_slot=preparation.frames_per_slot)
                example = make_example(replace(clip, key_spans=None, keywords=[]), frames, preparation)
        except ClipError:
            continue
        visual = int((example.token_types == 2).sum())
        per_slot, text = max(per_slot, visual // example.num_slots), max(text, len(example.input_ids) - visual)
    visual = per_slot * -(-preparation.max_frames // preparation.frames_per_slot)
    if preparation.visual_tokens is not None:
        visual = preparation.visual_tokens if preparation.skim else min(visual, preparation.visual_tokens)
    return visual, text


def leave_out_long(
    clips: Sequence[Clip], preparation: Preparation, limit: int | None, new_tokens: int = 0, captions: bool = True
) -> tuple[list[Clip], list[str]]:
    """The clips whose text is not too long, and a message for each of the others; see `data.clips.split_long`.

    limit: --max-text-tokens; None: what the model's context leaves beside the video and new_tokens, a quarter of it at
    least, since not every clip brings as many frames as one may.
    """
    if limit is None:
        short = [replace(clip, caption="", prompt=PROMPT) for clip in clips[:3]]
        visual, text = longest(short, preparation)
        limit = max(preparation.context - visual - text - new_tokens, preparation.context // 4)
    return split_long(clips, preparation.processor.tokenizer, limit, captions)


def skeleton(model: str) -> nn.Module:
    """The architecture that `--model` means, without memory: its tensors are on the meta device."""
    if model.startswith("random:"):
        config = random_config(model.removeprefix("random:"))
    else:
        config = AutoConfig.from_pretrained(find_checkpoint(model))
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


# Bytes that one layer takes at its peak, for each token, in units of a number that layers compute: of the width of its
# MLP, and of the width of its states. Counted, operator by operator, on true architectures; see tests/memory_count.py.
LAYER_BACKWARD, LAYER_FORWARD = (8.3, 12.0), (4.0, 8.0)


def phases(hf: nn.Module, load: Load, settings: Mapping, gpu: bool) -> dict[str, dict[str, float]]:
    """Bytes of each part of each kind of work, beside weights and optimizer: a training step (stage 1, or the update of
    stage 2), the rollouts of a step, and an evaluation. Arguments as of `estimate`."""
    s, text, vision = settings, hf.config.text_config, hf.config.vision_config
    wide = 2 if gpu and s["lora_rank"] else 4  # bytes of a number of the residual stream
    half = 2 if gpu else 4  # bytes of what layers compute
    D, I, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    head = getattr(text, "head_dim", None) or D // text.num_attention_heads
    q, kv = text.num_attention_heads * head, 2 * text.num_key_value_heads * head
    W, merge = vision.hidden_size, vision.spatial_merge_size**2
    groups = text.num_attention_heads // text.num_key_value_heads
    deepstack = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    features = half * D * (1 + deepstack)  # of a visual token, encoded
    dequantised = half * I * D if s["quantize"] == "nf4" else 0  # a weight of 4 bits is made whole for each use

    # A layer keeps its input, or all that its backward pass needs; one at a time is at its peak.
    layer = (2 * wide + 2 * half) * D + half * (2 * q + kv + 3 * I) + 4 * 7 * s["lora_rank"]
    peak = half * (LAYER_BACKWARD[0] * I + LAYER_BACKWARD[1] * D)
    forward = half * (LAYER_FORWARD[0] * I + LAYER_FORWARD[1] * D)
    kept = wide * D * layers if s["gradient_checkpointing"] else layer * layers
    prompt = load.visual_tokens + load.text_tokens
    event = load.clips * (load.visual_tokens if load.event_tokens is None else load.event_tokens) * (load.twin_layers > 0)
    packed = (load.rollouts + load.twin_rollouts * load.twin_branch) * load.new_tokens
    sequence = prompt * (1 + load.twin_branch) + packed  # the event may come first: then the twin shares nothing
    tokens = load.clips * sequence
    twin = event * (kept * load.twin_layers / layers + peak)

    # The vision encoder: all clips of a micro-batch if it is trained, else some at a time and nothing kept.
    block = half * (8 * W + 3 * vision.intermediate_size)  # of a patch
    chunk = merge * min(load.clips * load.visual_tokens, max(load.visual_tokens, TOKENS_AT_ONCE))
    encoder = chunk * block
    if not s["freeze_vision"]:
        all_blocks = half * W * vision.depth + block if s["gradient_checkpointing"] else block * vision.depth
        encoder = load.clips * merge * load.visual_tokens * all_blocks
    labels = load.clips * (packed or load.text_tokens)
    logits = 2 * labels * STRETCH + 4 * labels * D if gpu else 2 * 4 * min(labels, 4096) * text.vocab_size
    # Bytes a token: flex_attention's mask is of blocks of 128 x 128 tokens; elsewhere a branch has one of what it sees.
    masks = sequence * 16 / 128**2 if gpu else 4 * (prompt + load.new_tokens + event / load.clips)
    step = {
        "activations, language model": tokens * (kept + peak) + twin + dequantised,
        "encoded videos": (load.clips * load.visual_tokens * (1 + (load.twin_layers > 0)) + event) * features,
        "logits": float(logits),
        "attention masks": (tokens + event) * masks * (load.rollouts + load.twin_layers > 0),
    }
    if not s["freeze_vision"]:
        step["activations, vision encoder"] = encoder

    def sampling(prompts: int, branches: int, new_tokens: int, keep_videos: bool) -> dict[str, float]:
        """Descriptions of some prompts, as `VideoLM.roll_out` makes them."""
        forked = 2 * prompt  # a prompt and all of its twin: the event may come first
        held = min(prompts, max(1, TOKENS_HELD // forked))
        prefill = min(held * forked, max(forked, TOKENS_AT_ONCE))
        width = forked + branches * new_tokens
        videos = prompts if keep_videos else held
        return {
            "prefill": prefill * forward + dequantised,
            "attention masks": prefill * (forked * 16 / 128**2 if gpu else prompt * 4),
            "cache": float(held * layers * half * kv * width),
            "masks of the cache": held * groups * branches * width * (2 + half),
            "encoded videos": float(videos * load.visual_tokens * features),
            "logits": 5.0 * 4 * held * branches * text.vocab_size,
        }

    found = {"update" if load.rollouts else "stage 1": step}
    found["vision encoder"] = {"activations, vision encoder": float(encoder)}
    if load.rollouts:
        found["rollouts"] = sampling(load.prompts, load.rollouts + load.twin_rollouts, load.new_tokens, True)
    if load.eval_clips:
        found["evaluation"] = sampling(load.eval_clips, 2, EVAL_TOKENS, False)
    return found


def estimate(hf: nn.Module, load: Load, settings: Mapping, gpu: bool, num_processes: int = 1) -> dict[str, float]:
    """Bytes of each part: what is always there, and the kind of work that takes most beside it.

    hf: a skeleton; settings: quantize, lora_rank, freeze_vision, gradient_checkpointing, shard, max_frames.
    """
    s, text = settings, hf.config.text_config
    wide = 2 if gpu and s["lora_rank"] else 4  # bytes of a weight that is not quantised
    half = 2 if gpu else 4
    count, adapters, trained = 0.0, 0, 0
    targets = re.compile(LANGUAGE_LINEARS if s["freeze_vision"] else f"{LANGUAGE_LINEARS}|{VISION_LINEARS}")
    for name, module in hf.named_modules():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        small = s["quantize"] == "nf4" and isinstance(module, nn.Linear) and "language_model" in name
        count += own * (0.5 + 1 / 64 + 4 / 64 / 256 if small else wide)
        if s["lora_rank"] and isinstance(module, nn.Linear) and targets.fullmatch(name):
            adapters += s["lora_rank"] * (module.in_features + module.out_features)
        elif not s["lora_rank"] and not (s["freeze_vision"] and ".visual." in f".{name}."):
            trained += own
    if hf.get_output_embeddings().weight is hf.get_input_embeddings().weight:
        tied = text.vocab_size * text.hidden_size
        count, trained = count - tied * wide, trained - tied * (not s["lora_rank"])
    parts = num_processes if s["shard"] else 1
    widest = max(text.vocab_size, text.intermediate_size) * text.hidden_size
    largest = widest * half * (parts > 1)  # gathered from the other processes
    work = phases(hf, load, settings, gpu)
    most = max(work, key=lambda name: sum(work[name].values()))
    return {
        "weights": count / parts + largest,
        "adapters, gradients, optimizer": (16 * adapters + 12 * trained) / parts,
        "reference": count / parts if load.reference else 0.0,
    } | work[most]


def available(device: torch.device) -> float:
    """Bytes that this process may still take on a device, what it holds included; NaN if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        return psutil.virtual_memory().available + resident_bytes()
    except (psutil.Error, OSError):
        return math.nan


def resident_bytes() -> float:
    """Memory of this process now; NaN if the system does not say."""
    try:
        return psutil.Process().memory_info().rss
    except (psutil.Error, OSError):
        return math.nan


def held_bytes(device: torch.device) -> float:
    """What this process holds on a device now: tensors on a GPU, all memory on a CPU. NaN if the system does not say."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


class PeakMemory:
    """The most that this process holds on a device until `stop`, which may be called again and ends with the `with` block.

    Only Linux tells a peak that starts anew, so on a CPU a thread looks every 2 ms; what is held for less is not seen.
    On a GPU torch counts every byte. NaN if the system does not say.
    """

    def __init__(self, device: torch.device):
        self.device, self.peak, self.done = device, held_bytes(device), threading.Event()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.thread = None
        if device.type != "cuda" and not math.isnan(self.peak):
            self.thread = threading.Thread(target=self.watch, daemon=True)
            self.thread.start()

    def watch(self) -> None:
        """Look until it is over."""
        while not self.done.wait(0.002):
            self.peak = max(self.peak, resident_bytes())

    def stop(self) -> float:
        """The peak in bytes."""
        if self.thread is not None:
            self.done.set()
            self.thread.join()
            self.thread = None
        elif self.device.type == "cuda" and not self.done.is_set():
            self.peak = torch.cuda.max_memory_allocated(self.device)
        self.done.set()
        return self.peak

    def __enter__(self) -> "PeakMemory":
        return self

    def __exit__(self, *_) -> None:
        self.stop()


def measured(peak: float, held: float) -> str:
    """The line that tells how much a run took in truth. held: what there was before it."""
    if math.isnan(peak - held):
        return "memory, measured: not known on this system"
    return f"memory, measured: {(peak - held) / GIB:.2f} GiB at the peak of the first step"


def lighter(hf: nn.Module, settings: Mapping, load: Load) -> dict[str, tuple[dict, Load]]:
    """Changes that save memory, by the flags that make them."""
    s, found, vision = dict(settings), {}, hf.config.vision_config
    if load.clips > 1:
        found["--micro-batch-size 1"] = s, replace(load, clips=1)
    if not s["gradient_checkpointing"]:
        found["--gradient-checkpointing"] = s | {"gradient_checkpointing": True}, load
    if not s["lora_rank"]:
        found["--lora-rank 16"] = s | {"lora_rank": 16}, load
    if s["quantize"] == "none":
        rank = s["lora_rank"] or 16
        small = s | {"quantize": "nf4", "lora_rank": rank, "shard": False}
        found[f"--quantize nf4 --lora-rank {rank}"] = small, load
    if not s["freeze_vision"]:
        found["--freeze-vision"] = s | {"freeze_vision": True}, load
    half_the_video = replace(load, visual_tokens=load.visual_tokens // 2)
    if s.get("visual_tokens"):
        fewer = s["visual_tokens"] // 2
        found[f"--visual-tokens {fewer}"] = s | {"visual_tokens": fewer}, half_the_video
    elif s["max_frames"] >= 8:
        found[f"--max-frames {s['max_frames'] // 2}"] = s | {"max_frames": s["max_frames"] // 2}, half_the_video
    per_slot = load.visual_tokens * vision.temporal_patch_size // s["max_frames"]
    if per_slot >= 128:
        pixels = per_slot // 2 * (vision.patch_size * vision.spatial_merge_size) ** 2
        found[f"--max-pixels {pixels}"] = s | {"max_pixels": pixels}, half_the_video
    if load.text_tokens >= 512:
        found[f"--max-text-tokens {load.text_tokens // 2}"] = s, replace(load, text_tokens=load.text_tokens // 2)
    if load.rollouts > 4:
        found["--num-rollouts 4"] = s, replace(load, rollouts=4)
    return found


def advice(hf: nn.Module, load: Load, settings: Mapping, gpu: bool, limit: float, num_processes: int = 1) -> str:
    """The three settings that save most, with what each would leave of the estimate, and, where none of them is enough,
    several that are."""

    def needed(at: tuple[Mapping, Load]) -> float:
        return SLACK * sum(estimate(hf, at[1], at[0], gpu, num_processes).values())

    def line(flags: str, at: tuple[Mapping, Load]) -> str:
        return f"  {flags}: {needed(at) / GIB:.1f} GiB{' (fits)' * (needed(at) <= limit)}"

    options = lighter(hf, settings, load)
    best = sorted(options, key=lambda flags: needed(options[flags]))[:3]
    lines, together, at = [line(flags, options[flags]) for flags in best], {}, (settings, load)
    while needed(at) > limit and (options := lighter(hf, *at)):
        flags = min(options, key=lambda flags: needed(options[flags]))
        at = options[flags]
        together[flags.split()[0]] = flags  # half of the frames, and half again, is one setting
    if len(together) > 1:
        lines.append(line(" ".join(together.values()), at))
    if not lines or needed(at) > limit:
        lines.append("  a smaller model")
    return "\n".join(["It would take less with", *lines])


def check_memory(
    hf: nn.Module, load: Load, settings: Mapping, device: torch.device, limit_gb: float | None, num_processes: int = 1
) -> Table:
    """A table of the estimate. Raises ValueError if it is more than there is, with the three settings that save most.

    If the system does not say what there is, that is NaN, which nothing is more than, and the run starts.
    """
    gpu = device.type == "cuda"
    parts = estimate(hf, load, settings, gpu, num_processes)
    total, limit = SLACK * sum(parts.values()), limit_gb * GIB if limit_gb else available(device)
    if total > limit:
        largest = ", ".join(f"{n} {v / GIB:.1f}" for n, v in sorted(parts.items(), key=lambda x: -x[1])[:3])
        raise ValueError(
            f"this run needs about {total / GIB:.1f} GiB ({largest}), and there are {limit / GIB:.1f}. "
            + advice(hf, load, settings, gpu, limit, num_processes)
            + "\nTo try it all the same, raise --memory-gb"
        )
    there_is = "an amount that is not known on this system" if math.isnan(limit) else f"{limit / GIB:.1f}"
    table = Table(title=f"memory, estimated: {total / GIB:.2f} GiB of {there_is}")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for name, value in parts.items():
        if value:
            table.add_row(name, f"{value / GIB:.3f}")
    table.add_row("the rest", f"{(total - sum(parts.values())) / GIB:.3f}")
    return table


@dataclass
class Budget:
    """What a run will need, worked out before its model is loaded. architecture: a skeleton; settings: see `estimate`;
    limit_gb: --memory-gb."""

    architecture: nn.Module
    load: Load
    settings: Mapping
    device: torch.device
    limit_gb: float | None = None
    num_processes: int = 1
    held: float = 0.0  # bytes that this process held before there was a model

    def check(self) -> Table:
        """A table of the estimate. Raises ValueError if it does not fit; see `check_memory`."""
        self.held = held_bytes(self.device)
        return check_memory(self.architecture, self.load, self.settings, self.device, self.limit_gb, self.num_processes)

    @contextmanager
    def explained(self, rescue: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Inside, running out of memory ends in ValueError that says what would help. rescue: saves what was trained, and
        returns whether there was anything."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            error.__traceback__ = None  # it holds the activations
            raise ValueError(self.explain(rescue())) from None

    def explain(self, saved: bool) -> str:
        """What to say if memory runs out all the same. saved: whether what was trained could be saved."""
        where = (
            "What was trained is saved: continue from it with --model." if saved else "Nothing of this attempt is saved."
        )
        gpu, limit = self.device.type == "cuda", available(self.device)
        helps = advice(self.architecture, self.load, self.settings, gpu, limit, self.num_processes)
        return f"out of memory. {where} {helps}"
