"""Models to train: which weights move, 4 bits, true architectures with random weights, and will it fit."""

import itertools
import math
from dataclasses import asdict

import pytest
import torch
import tyro
from bitsandbytes.nn import Params4bit
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

import train_rl
import train_sft
from data import videolm
from data.clips import load_clips
from data.examples import Preparation, prepare
from data.run import memory, models, sizes

CPU = torch.device("cpu")


@pytest.mark.parametrize("freeze_vision", [True, False])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_what_is_quantised_and_what_moves(checkpoint, ragged, quantize, freeze_vision):
    """4 bits in the language model only, not in the vision encoder or the head; a step moves the adapters alone, after an
    evaluation, too (bitsandbytes repacks weights in eval mode on some CPUs and has no gradient from then on)."""
    hf = models.load_trainable(str(checkpoint), quantize, 4, freeze_vision, True, CPU)
    small = {n for n, p in hf.named_parameters() if isinstance(p, Params4bit)}
    assert bool(small) == (quantize == "nf4") and all("language_model" in n for n in small)
    assert len(small) in (0, 7 * 4)
    trained = {n for n, p in hf.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    assert any("visual" in n for n in trained) != freeze_vision
    lm = videolm.VideoLM(hf)
    lm.eval()
    lm.describe(ragged, max_new_tokens=2)
    lm.train()
    before = {n: p.detach().clone() for n, p in hf.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], 1e-2, fused=True)
    for _ in range(2):  # in the first step A has no gradient, since B is zero
        out = lm(lm.collate(ragged))
        (out.lm_loss + out.contrastive_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in hf.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained


def test_4_bits_alone_are_refused(checkpoint):
    """They cannot be trained themselves, nor sharded: by name, with what to give instead."""
    with pytest.raises(ValueError, match=r"--quantize nf4.*give --lora-rank"):
        models.load_trainable(str(checkpoint), "nf4", 0, True, False, CPU)
    settings = train_sft.Settings(model=str(checkpoint), quantize="nf4", lora_rank=4, shard=True)
    with pytest.raises(ValueError, match=r"--shard with --quantize nf4.*1945"):
        train_sft.resolve(settings)


@pytest.mark.parametrize(
    "name, billions, hidden", [("qwen2.5-vl-7b", 8.29, 3584), ("qwen3-vl-8b", 8.77, 4096), ("qwen2.5-vl-3b", 3.75, 2048),
                               ("qwen3-vl-4b", 4.44, 2560), ("qwen3-vl-2b", 2.13, 2048)],
)  # fmt: skip
def test_true_sizes(name, billions, hidden):
    """The published numbers of parameters, counted on the meta device."""
    hf = memory.skeleton(f"random:{name}")
    count = sum(p.numel() for p in hf.parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.02) and hf.config.text_config.hidden_size == hidden
    assert all(p.is_meta for p in hf.parameters())


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_random_models_train(monkeypatch, world, family, quantize):
    """A size of our own, in 4 bits or not: the processor fits the model, losses are those of chance, gradients flow."""
    text, vision, tied = sizes.SIZES["qwen2.5-vl-7b" if family == "qwen2.5" else "qwen3-vl-8b"]
    text = text | dict(hidden_size=256, intermediate_size=128, num_hidden_layers=4, vocab_size=1024, num_attention_heads=2)
    text |= dict(num_key_value_heads=1)
    vision = vision | dict(depth=2, hidden_size=64, num_heads=2, intermediate_size=64, out_hidden_size=256)
    vision |= dict(fullatt_block_indexes=[1]) if family == "qwen2.5" else dict(deepstack_visual_indexes=[0])
    monkeypatch.setitem(sizes.SIZES, f"{family}-own", (text, vision, tied))
    processor = models.load_processor(f"random:{family}-own")
    hf = models.load_trainable(f"random:{family}-own", quantize, 4, True, True, CPU)
    assert any(isinstance(p, Params4bit) for p in hf.parameters()) == (quantize == "nf4")
    plain = AutoModelForImageTextToText.from_config(sizes.random_config(f"{family}-own"))
    for (name, buffer), (_, other) in zip(hf.get_base_model().named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name  # of the rotary embeddings
    for name, p in plain.named_parameters():
        ours = hf.get_base_model().state_dict().get(name)
        if ours is not None and ours.shape == p.shape:
            assert ours.float().std() == pytest.approx(p.std().item(), rel=0.2, abs=1e-3), name
    from data.examples import Preparation, prepare

    examples = [prepare(clip, Preparation(processor, 8)) for clip in load_clips(world / "train.jsonl")[0][:2]]
    lm = videolm.VideoLM(hf)
    batch = lm.collate(examples)
    out = lm(batch)
    (out.lm_loss + out.contrastive_loss).backward()
    assert out.lm_loss.item() / len(batch.label_ids) == pytest.approx(6.93, abs=0.5)  # ln 1024
    assert all(p.grad.isfinite().all() for p in lm.parameters() if p.requires_grad)
    assert any(p.grad.abs().max() > 0 for p in hf.parameters() if p.requires_grad)
    half = models.load_pretrained(f"random:{family}-own", torch.bfloat16, quantize)[0]
    assert {p.dtype for p in half.parameters()} - {torch.uint8} == {torch.bfloat16}
    for (name, buffer), (_, other) in zip(half.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name  # in float32, as from_pretrained leaves them
    with pytest.raises(ValueError, match=r"unknown; choose one of qwen2\.5-vl-3b"):
        models.load_pretrained("random:gpt", torch.float32)


LOAD = memory.Load(clips=1, visual_tokens=32 * 64, text_tokens=160)
QLORA = dict(quantize="nf4", lora_rank=16, freeze_vision=True, gradient_checkpointing=True, shard=False, max_frames=32)


def test_the_estimate_counts_weights_right(checkpoint):
    """Weights, gradients and optimizer of the estimate are those of the model that is then loaded, to the byte or so."""
    hf = memory.skeleton(str(checkpoint))
    for quantize, rank, freeze in (("none", 0, False), ("none", 0, True), ("none", 8, False), ("nf4", 8, True)):
        settings = QLORA | dict(quantize=quantize, lora_rank=rank, freeze_vision=freeze)
        parts = memory.estimate(hf, LOAD, settings, gpu=False)
        loaded = models.load_trainable(str(checkpoint), quantize, rank, freeze, False, CPU)
        trained = sum(p.numel() for p in loaded.parameters() if p.requires_grad)
        weights = sum(p.numel() * p.element_size() for n, p in loaded.named_parameters() if "lora_" not in n)
        assert parts["weights"] == pytest.approx(weights, rel=0.03)
        assert parts["adapters, gradients, optimizer"] == (16 if rank else 12) * trained


def test_the_estimate_of_a_7b_on_24_gb():
    """What was worked out by hand for Qwen2.5-VL-7B: 4-bit linears 3.4 GB, embeddings and head 2.2, vision 1.35; LoRA with
    Adam 0.65; layer checkpoints at 16k tokens 3.3."""
    hf = memory.skeleton("random:qwen2.5-vl-7b")
    parts = memory.estimate(hf, LOAD, QLORA, gpu=True)
    assert parts["weights"] / 1e9 == pytest.approx(3.4 + 2.2 + 1.35, abs=0.15)
    assert parts["adapters, gradients, optimizer"] / 1e9 == pytest.approx(0.65, abs=0.03)
    layer = memory.estimate(hf, memory.Load(1, 16000, 384), QLORA, gpu=True)["activations, language model"]
    assert layer / 1e9 > 3.3
    total = memory.SLACK * sum(parts.values())
    assert 7e9 < total < 20e9
    longer = memory.estimate(hf, memory.Load(1, 4 * 2048, 160), QLORA, gpu=True)
    assert longer["activations, language model"] > 3 * parts["activations, language model"]
    assert memory.estimate(hf, LOAD, QLORA | {"gradient_checkpointing": False}, True)["activations, language model"] > total
    half = memory.estimate(hf, LOAD, QLORA | dict(quantize="none", lora_rank=0, shard=True), True, num_processes=8)
    whole = memory.estimate(hf, LOAD, QLORA | dict(quantize="none", lora_rank=0), True)
    assert half["adapters, gradients, optimizer"] * 8 == whole["adapters, gradients, optimizer"]


def test_a_run_that_cannot_fit_says_how_it_would():
    """Before anything is loaded: the need, the largest parts, and three settings with what each would leave."""
    hf = memory.skeleton("random:qwen2.5-vl-7b")
    settings = QLORA | dict(quantize="none", lora_rank=0, freeze_vision=False, gradient_checkpointing=False)
    with pytest.raises(ValueError, match="this run needs about") as caught:
        memory.check_memory(hf, LOAD, settings, CPU, 24.0)
    message = str(caught.value)
    assert message.count("\n  --") == 4 and message.count("(fits)") == 1
    assert "--quantize nf4 --lora-rank 16: " in message and "there are 24.0" in message
    small = memory.check_memory(hf, LOAD, QLORA, CPU, 24.0)
    console = Console(record=True, quiet=True)
    console.print(small)
    assert "24.0" in small.title


@pytest.mark.parametrize("limit", [16.0, 12.0, 10.5])
def test_several_settings_together(limit):
    """Where no single setting is enough, the last line names several that are: their estimate, worked out anew, fits."""
    hf, load = memory.skeleton("random:qwen2.5-vl-7b"), memory.Load(2, 16 * 391, 160, 14)
    settings = dict(quantize="none", lora_rank=64, freeze_vision=True, gradient_checkpointing=False, shard=False)
    advice = memory.advice(hf, load, settings | {"max_frames": 32}, True, limit * memory.GIB).splitlines()
    assert len(advice) == 5 and not any("(fits)" in line for line in advice[:4]) and advice[4].endswith("(fits)")
    words = advice[4].split(":")[0].split()
    flags = [*words, "--"]
    given = {a: b for a, b in itertools.pairwise(flags) if a.startswith("--")}  # "--flag value" and "--flag"
    slots, tokens = int(given.get("--max-frames", 32)) // 2, int(given.get("--max-pixels", 391 * 28**2)) // 28**2
    load = memory.Load(int(given.get("--micro-batch-size", 2)), slots * tokens, 160, 14)
    settings |= dict(quantize=given.get("--quantize", "none"), lora_rank=int(given.get("--lora-rank", 64)))
    settings |= dict(gradient_checkpointing="--gradient-checkpointing" in given, max_frames=2 * slots)
    needed = memory.SLACK * sum(memory.estimate(hf, load, settings, True).values()) / memory.GIB
    assert needed <= limit and float(advice[4].split()[-3]) == pytest.approx(needed, abs=0.1)
    for script, rollouts in ((train_sft, 0), (train_rl, 8)):  # every flag named is one of the script's
        at = memory.Load(2, 16 * 391, 160, 14 * (not rollouts), rollouts=rollouts, new_tokens=64)
        for flags in memory.lighter(hf, settings | {"quantize": "none", "lora_rank": 0, "freeze_vision": False}, at):
            tyro.cli(script.Settings, args=flags.split())
    least = memory.Load(1, 2 * 64, 160, 14)
    assert memory.advice(hf, least, QLORA | {"max_frames": 4}, True, 1e9).endswith("less with\n  a smaller model")
    assert memory.advice(hf, load, QLORA, True, 1e9).endswith("\n  a smaller model") and "a smaller" not in "".join(advice)


def test_a_script_refuses_before_it_loads(tmp_path, world, qwen2_5, capsys):
    """With too little memory the train script ends at once, in one error."""
    settings = train_sft.Settings(model=str(qwen2_5), data=world / "train.jsonl", out=tmp_path / "o", memory_gb=0.001)
    with pytest.raises(ValueError, match="--memory-gb"):
        train_sft.main(settings)
    assert not (tmp_path / "o/checkpoint").exists()
    assert asdict(settings)["memory_gb"] == 0.001


def test_masks_count_with_the_square_of_the_length():
    """None in stage 1, where padding is on the right; the packed mask of stage 2, and that of prompts with their twins."""
    hf = memory.skeleton("random:qwen2.5-vl-7b")

    def masks(what: str, gpu: bool = False, **load) -> float:
        return memory.phases(hf, memory.Load(visual_tokens=4000, **load), QLORA, gpu)[what]["attention masks"]

    assert masks("stage 1", clips=2, text_tokens=1000) == 0
    packed = dict(clips=1, text_tokens=1000, rollouts=8, new_tokens=500, prompts=4)
    # float32: every token of a branch, against the prompt and the branch itself.
    assert masks("update", **packed) == 4 * 9000 * (5000 + 500)
    assert masks("update", True, **packed) < 1e6  # blocks, on a GPU
    assert masks("rollouts", **packed) == 4 * 10000 * 5000  # a prompt and its twin, one prompt at a time


@pytest.mark.parametrize("steps, warmup, decay, rising, falling", [
    (20, 0.2, 0.5, 4, 8), (20, 0.25, 1.0, 5, 15), (10, 0.3, 0.0, 3, 0), (8, 1.0, 0.5, 8, 0), (7, 0.0, 1.0, 0, 7),
    (9, 0.05, 0.4, 0, 3),
])  # fmt: skip
@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_schedule_by_hand(steps, warmup, decay, rising, falling, shape):
    """The rate of every step, from the two shares; a run may also ask for that behind its last step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = models.make_schedule(optimizer, steps, warmup, decay, shape)
    for step in range(steps + 1):
        left = min(1.0, (steps - step) / falling) if falling else float(step < steps)
        height = left if shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
        assert schedule.get_last_lr()[0] == pytest.approx(0.3 * (step / rising if step < rising else height)), step
        optimizer.step()
        schedule.step()


def test_limit_of_texts_follows_from_the_context(world, qwen2_5):
    """By default: the context less video and template; a caption that fits in stays, one token more does not."""
    clips, _ = load_clips(world / "train.jsonl")
    preparation = Preparation(AutoProcessor.from_pretrained(qwen2_5), context=4096)
    rest = memory.longest(clips[:1], preparation)[0] + 64  # the template is shorter than that
    tokenizer = preparation.processor.tokenizer
    per_word = len(tokenizer(" jumps").input_ids)
    fits, long = ((4096 - rest + more) // per_word for more in (-64, 200))
    clips[0].caption, clips[1].caption = " jumps" * fits, " jumps" * long
    kept, problems = memory.leave_out_long(clips, preparation, None)
    assert len(kept) == len(clips) - 1 and len(problems) == 1 and clips[1].where in problems[0]
    assert len(prepare(kept[0], preparation).input_ids) <= 4096
