"""The memory estimate against a count of all bytes, operator by operator, without a GPU: python -m tests.memory_count

True architectures run on the pretend GPU (tests/pretend_gpu.py), where a floating-point tensor has a size and no content:
a training step, its rollouts or an evaluation, forward and backward, as the GPU presets do them. What is counted is the
most that was alive above weights, gradients and optimizer; beside it stands what data/run/memory.py says of it. What no
operator tells, the fragments of torch's allocator and the CUDA context, is what `memory.SLACK` is for.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vp
from data import attention, generation, videolm
from data.device import autocast
from data.measure import card
from data.measure.card import G_TWIN, LARGE, NEW, SMALL, TEXT, G
from data.run import memory, models
from kernels import logprob
from tests import pretend_gpu

GIB = 2**30


# --- A model of sizes ---------------------------------------------------------------------------------------------------


class FusedAttention(torch.autograd.Function):
    """What flash attention and flex_attention keep: queries, keys, values, the result, and a number a row."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A result of the queries' shape."""
        out, sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx, _) -> tuple[Tensor, ...]:
        """Gradients."""
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class FourBitProduct(torch.autograd.Function):
    """A product with a 4-bit weight: it is made whole again for each use, forward and backward."""

    @staticmethod
    def forward(ctx, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """x @ W.T"""
        ctx.shape = shape
        return F.linear(x, pretend_gpu.of_sizes(shape, x.dtype))

    @staticmethod
    def backward(ctx, up: Tensor) -> tuple[Tensor, None]:
        """up @ W"""
        return up @ pretend_gpu.of_sizes(ctx.shape, up.dtype), None


class FourBitLinear(nn.Linear):
    """A linear layer in 4 bits, as bitsandbytes computes it."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, in bfloat16 as under autocast."""
        out = FourBitProduct.apply(x.to(torch.bfloat16), (self.out_features, self.in_features))
        return out if self.bias is None else out + self.bias


def sized_model(model: str, s: dict, layers: int | None) -> videolm.VideoLM:
    """An architecture on the pretend device, trained as settings ask: adapters, frozen encoder, checkpointing.

    layers: of the language model, in place of all.
    """
    hf = memory.skeleton(model)
    if layers:
        hf.model.language_model.layers = hf.model.language_model.layers[:layers]
        hf.config.text_config.num_hidden_layers = layers
    if s["gradient_checkpointing"]:
        hf.activation_checkpointing_enable()
        hf.enable_input_require_grads()
    if s["freeze_vision"]:
        hf.model.visual.requires_grad_(False)
    if s["quantize"] == "nf4":
        for module in hf.model.language_model.modules():
            if type(module) is nn.Linear:
                module.__class__ = FourBitLinear
    if s["lora_rank"]:
        from peft import LoraConfig, get_peft_model

        with torch.device("meta"):
            rank = s["lora_rank"]
            hf = get_peft_model(hf, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=models.LANGUAGE_LINEARS))
    with torch.device("meta"):
        lm = videolm.VideoLM(hf)
    frozen = torch.bfloat16 if s["lora_rank"] else torch.float32
    for module in lm.modules():
        for key, weight in module._parameters.items():
            if weight is not None:
                dtype = torch.float32 if weight.requires_grad else frozen
                shape = (1,) if isinstance(module, FourBitLinear) and key == "weight" else weight.shape
                sized = nn.Parameter(pretend_gpu.of_sizes(shape, dtype), requires_grad=weight.requires_grad)
                module._parameters[key] = sized
                if weight.requires_grad:
                    sized.grad = pretend_gpu.of_sizes(shape, dtype)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = pretend_gpu.of_sizes(buffer.shape, buffer.dtype)
    (hf.get_base_model() if s["lora_rank"] else hf).tie_weights()
    return lm


def as_on_a_gpu() -> None:
    """Take what a GPU would: fused attention, attention in blocks, the kernels."""
    F.scaled_dot_product_attention = lambda q, k, v, *_, **__: FusedAttention.apply(q, k, v)
    attention.attend_in_blocks = lambda q, k, v, *_: FusedAttention.apply(q, k, v)
    videolm.VideoLM.flex = True
    logprob.takes_kernel = vp.takes_kernel = lambda *_, **__: True


# --- Counting -----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A setting to be counted. what: stage 1, update, rollouts or evaluation; clips: of a micro-batch, prompts, or clips
    described; settings: those of a preset."""

    what: str
    model: str
    clips: int
    slots: int
    per_slot: int
    settings: dict


CASES = [
    Case("stage 1", "random:qwen2.5-vl-3b", 1, 16, 256, SMALL),
    Case("stage 1", "random:qwen2.5-vl-7b", 1, 16, 256, SMALL),
    Case("stage 1", "random:qwen3-vl-4b", 1, 16, 256, SMALL),
    Case("stage 1", "random:qwen2.5-vl-7b", 2, 32, 529, LARGE),
    Case("update", "random:qwen2.5-vl-7b", 1, 16, 256, SMALL),
    Case("rollouts", "random:qwen2.5-vl-3b", 8, 16, 256, SMALL),
    Case("rollouts", "random:qwen2.5-vl-7b", 16, 32, 529, LARGE),
    Case("evaluation", "random:qwen2.5-vl-7b", 32, 16, 256, SMALL),
]


def count(case: Case, layers: int | None = None) -> tuple[float, float, pretend_gpu.Seen]:
    """Bytes counted and bytes estimated of a case, above weights, gradients and optimizer; and what was seen."""
    gpu = pretend_gpu.device()
    with pretend_gpu.sizes_only():
        lm = sized_model(case.model, case.settings, layers)
        # The event comes first, which takes most memory: the twin's prompt shares nothing with the full video's.
        examples = [card.random_example(lm, case.slots, case.per_slot, first=0) for _ in range(case.clips)]
        with pretend_gpu.watch() as seen, autocast(gpu):
            RUN[case.what](lm.train(), examples)
        depth = lm.config.text_config.num_hidden_layers
    visual = case.slots * case.per_slot
    clips = case.clips if case.what in ("stage 1", "update") else 1
    twin = {"twin_layers": depth // 2, "event_tokens": 2 * case.per_slot} if case.what == "stage 1" else {}
    load = memory.Load(clips, visual, TEXT, **twin)
    if case.what != "stage 1":
        load = memory.Load(
            clips, visual, TEXT, rollouts=G, twin_rollouts=G_TWIN, twin_branch=True, new_tokens=NEW, prompts=case.clips
        )  # fmt: skip
    if case.what == "evaluation":
        load = memory.Load(clips, visual, TEXT, eval_clips=case.clips)
    phases = memory.phases(lm.base, load, case.settings, gpu=True)
    return seen.peak, sum(phases[case.what].values()), seen


def rollouts(lm: videolm.VideoLM, examples: list[vp.Example]) -> None:
    """The rollouts of all prompts, a few tokens of them: what grows has its room from the start."""
    with cut_short(NEW):
        card.rollouts(lm, examples)


def evaluation(lm: videolm.VideoLM, examples: list[vp.Example]) -> None:
    """Greedy descriptions of full videos and twins."""
    with cut_short(memory.EVAL_TOKENS):
        lm.eval().describe(examples, True, memory.EVAL_TOKENS)


class cut_short:
    """Inside, rollouts end after two tokens, with room for all."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def __enter__(self) -> None:
        import builtins

        self.range = builtins.range
        generation.range = lambda *a: self.range(2) if a == (self.tokens,) else self.range(*a)

    def __exit__(self, *_) -> None:
        del generation.range


RUN: dict[str, Callable] = {"stage 1": card.stage_1, "update": card.update, "rollouts": rollouts, "evaluation": evaluation}


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="layers of the language model, in place of all of them")
    parser.add_argument("--only", type=int, nargs="+", default=range(len(CASES)), help="numbers of cases")
    parser.add_argument("--lines", action="store_true", help="name what was alive at the peak")
    arguments = parser.parse_args()
    as_on_a_gpu()
    print("| what | model | clips | counted | estimated | of it |\n|---|---|---|---|---|---|")
    for i in arguments.only:
        case = CASES[i]
        counted, estimated, seen = count(case, arguments.layers)
        clips = f"{case.clips} x {case.slots * case.per_slot} visual tokens"
        print(f"| {case.what} | {case.model.removeprefix('random:')} {case.settings['quantize']} | {clips} | "
              f"{counted / GIB:.2f} GiB | {estimated / GIB:.2f} GiB | {estimated / counted:.2f} |", flush=True)  # fmt: skip
        if arguments.lines:
            for line, size in seen.at_peak.most_common(12):
                print(f"    {size / GIB:7.3f}  {line}")


if __name__ == "__main__":
    main()
