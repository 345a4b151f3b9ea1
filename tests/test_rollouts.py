"""Rollouts and packed updates against plain transformers: both families, random weights, float32, ragged clips."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vp
from data import attention, videolm
from data.attention import attend_by_branch
from data.batches import Rollouts
from data.clips import load_clips
from data.examples import Preparation, prepare
from data.packing import Tree, pack
from data.tiny import build_tiny
from tests.helpers import degraded, plain_forward, plain_inputs
from tests.test_videolm import count_calls, states_by_hand

LENGTH = 9


def uniforms(examples, num: int, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """Numbers that decide the tokens."""
    return torch.rand(len(examples), num, length, generator=torch.Generator().manual_seed(seed))


def sharpen(lm: videolm.VideoLM, eos_bias: float = 0.0) -> None:
    """Make random weights likelier to say something definite, and to end."""
    with torch.no_grad():
        for layer in lm.base.model.language_model.layers:
            for weight in layer.parameters():
                if weight.ndim == 2:
                    weight.mul_(3.0)


def by_hand(plain, e, pixels, numbers, num_tokens, banned, ends):
    """One rollout by whole forward passes, no cache, no batch."""
    e = replace(e, token_types=e.token_types[: e.prompt_length])
    ids, logps = e.input_ids[: e.prompt_length], []
    for t in range(num_tokens):
        inputs = plain_inputs(e, plain.config, ids) | {"pixel_values_videos": pixels}
        with torch.no_grad():
            logits = plain(**inputs).logits[0, -1].double()
        logits[banned] = -torch.inf
        p = logits.softmax(0)
        token = int(p.argmax()) if numbers is None else int((p.cumsum(0) <= numbers[t].double() * p.sum()).sum())
        logps.append(float(p[token].log()))
        ids = torch.cat([ids, torch.tensor([token])])
        if token in ends:
            break
    return ids[e.prompt_length :], torch.tensor(logps)


@pytest.mark.parametrize("greedy", [True, False])
def test_rollouts_equal_whole_passes(lm, plain, ragged, greedy):
    """Issue bar: tokens and log-probs of shared-prefix rollouts are those of a clip run alone, full and degraded."""
    lm.eval()
    for model in (lm, videolm.VideoLM(plain)):
        sharpen(model)
    numbers = None if greedy else uniforms(ragged, 5)
    got, _ = lm.roll_out(ragged, 3, 2, LENGTH, numbers)
    ends, banned = lm.end_ids.tolist(), lm.banned
    plain.model.visual.config._attn_implementation = "sdpa"
    for b, e in enumerate(ragged):
        twin = e.pixels if e.source is None else degraded(e)
        for r in (0, 2, 3, 4):
            row = None if greedy else numbers[b, r]
            tokens, logp = by_hand(plain, e, e.pixels if r < 3 else twin, row, LENGTH, banned, ends)
            n = int(got.lengths[b, r])
            assert got.tokens[b, r, :n].tolist() == tokens.tolist()
            torch.testing.assert_close(got.logp[b, r, :n], logp.float(), rtol=1e-3, atol=1e-4)
            assert bool(got.finished[b, r]) == (tokens[-1] in lm.end_ids)


def same(a: Rollouts, b: Rollouts) -> None:
    """Rollouts that agree."""
    n = min(a.tokens.shape[2], b.tokens.shape[2])
    assert torch.equal(a.tokens[:, :, :n], b.tokens[:, :, :n])
    assert torch.equal(a.lengths, b.lengths) and torch.equal(a.finished, b.finished)
    torch.testing.assert_close(a.logp[:, :, :n], b.logp[:, :, :n], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("greedy", [True, False])
def test_rollouts_equal_generate(lm, ragged, greedy):
    """Issue bar: token for token what model.generate gives on prompts repeated for every rollout."""
    lm.eval()
    sharpen(lm)
    for seed in range(3):
        numbers = None if greedy else uniforms(ragged, 5, seed=seed)
        shared, _ = lm.roll_out(ragged, 3, 2, LENGTH, numbers)
        lm.shares_prefix = False
        repeated, _ = lm.roll_out(ragged, 3, 2, LENGTH, numbers)
        lm.shares_prefix = True
        same(shared, repeated)
        assert greedy or shared.tokens.unique().numel() > 20


def test_rollouts_do_not_depend_on_their_batch(lm, ragged):
    """A clip alone, in another order, or with other rollouts beside it says the same."""
    numbers = uniforms(ragged, 4)
    got, _ = lm.roll_out(ragged, 2, 2, LENGTH, numbers)
    back, _ = lm.roll_out(ragged[::-1], 2, 2, LENGTH, numbers.flip(0))
    same(got, Rollouts(*(getattr(back, n).flip(0) for n in ("tokens", "logp", "lengths", "finished"))))
    for b, e in enumerate(ragged):
        alone, _ = lm.roll_out([e], 2, 2, LENGTH, numbers[b : b + 1])
        same(Rollouts(*(getattr(got, n)[b : b + 1] for n in ("tokens", "logp", "lengths", "finished"))), alone)
    for num_full, num_twin in ((2, 0), (2, 1), (1, 2)):
        kept = [*range(num_full), *range(2, 2 + num_twin)]
        fewer, _ = lm.roll_out(ragged, num_full, num_twin, LENGTH, numbers[:, kept])
        same(Rollouts(*(getattr(got, n)[:, kept] for n in ("tokens", "logp", "lengths", "finished"))), fewer)


def test_vision_and_prefix_run_once(lm, ragged):
    """One vision pass, and prefill tokens = prompt + what the twin has from its first replaced slot on."""
    vision, widths = count_calls(lm.base.model.visual), []
    lm.base.model.language_model.layers[0].register_forward_pre_hook(lambda _, x: widths.append(x[0].shape[1]))
    e = ragged[0]
    first = int((e.source != torch.arange(len(e.source))).nonzero()[0])
    visual = (e.token_types == 2).nonzero().squeeze(1)
    fork = int(visual[first * (len(visual) // int(e.grid[0]))])
    assert 0 < fork < e.prompt_length
    lm.roll_out([e], 4, 3, 5, uniforms([e], 7, 5))
    assert len(vision) == 1
    assert widths[0] == e.prompt_length + e.prompt_length - fork
    assert set(widths[1:]) <= {7}


def test_rows_stop_and_banned_tokens_never_come(lm, ragged):
    """Behind its end a rollout is padding with log-prob 0; banned ids are never sampled, whatever the logits."""
    lm.eval()
    head = lm.base.lm_head.weight
    untied = torch.nn.Linear(head.shape[1], head.shape[0])
    untied.weight.data = head.data.clone()
    untied.bias.data.zero_()
    untied.bias.data[lm.banned] = 30.0
    untied.bias.data[lm.end_ids] = 3.5
    lm.base.lm_head = untied
    got, _ = lm.roll_out(ragged, 6, 6, 24, uniforms(ragged, 12, 24))
    ends = torch.isin(got.tokens, lm.end_ids)
    pad_id = lm.base.generation_config.pad_token_id
    assert got.finished.any() and got.lengths.unique().numel() > 3
    for b, r in torch.cartesian_prod(torch.arange(4), torch.arange(12)).tolist():
        n = int(got.lengths[b, r])
        assert not ends[b, r, : n - 1].any() and bool(ends[b, r, n - 1]) == bool(got.finished[b, r])
        assert (got.tokens[b, r, n:] == pad_id).all() and (got.logp[b, r, n:] == 0).all()
        assert not torch.isin(got.tokens[b, r, :n], lm.banned).any()
    special = {lm.config.video_token_id, lm.config.image_token_id, lm.config.vision_start_token_id, pad_id}
    assert special <= set(lm.banned.tolist()) and not special & set(lm.end_ids.tolist())


def trimmed(rollouts: Rollouts, num_full: int) -> list[list[torch.Tensor]]:
    """The full video's rollouts without padding."""
    return [[y[:n] for y, n in zip(ys[:num_full], ns)] for ys, ns in zip(rollouts.tokens, rollouts.lengths.tolist())]


def separate(lm: videolm.VideoLM, plain_model, e: vp.Example, y: torch.Tensor) -> torch.Tensor:
    """Log-probs of one response by a plain pass over [prompt][response]."""
    e = replace(e, token_types=e.token_types[: e.prompt_length])
    inputs = plain_inputs(e, lm.config, torch.cat([e.input_ids[: e.prompt_length], y]))
    logits = plain_model(**inputs).logits[0, e.prompt_length - 1 : -1]
    logits = logits.index_fill(1, lm.banned, -torch.inf)
    return logits.log_softmax(1).gather(1, y[:, None]).squeeze(1)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("num_full", [None, 1])
def test_packed_update_equals_separate_sequences(lm, plain, ragged, share, num_full):
    """Issue bar: log-probs and gradients of one packed pass equal those of G separate plain ones (fp32, 1e-5).

    With num_full, the other rollouts are the twin's: their plain passes are given the degraded pixels.
    """
    lm.shares_prefix = share
    torch.manual_seed(3)
    ys = [[torch.randint(0, 256, (n,)) for n in ns] for ns in ((5, 1, 7), (3, 3, 2), (8, 4, 1), (2, 6, 6))]
    packed = lm.pack_rollouts(ragged, ys, num_full)
    got, entropy = lm.log_probs(packed, lm.encode_video(lm.collate(ragged)))
    twins = [e if e.source is None else replace(e, pixels=degraded(e)) for e in ragged]
    kinds = [ragged if num_full is None or g < num_full else twins for g in range(3)]
    want = torch.cat([separate(lm, plain, kinds[g][b], y) for b, group in enumerate(ys) for g, y in enumerate(group)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert packed.rollout.tolist() == [i for i, y in enumerate(y for g in ys for y in g) for _ in y]
    assert len(entropy) == len(got) and not entropy.requires_grad and (entropy > 0).all()
    weight = torch.randn(len(got))
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    mine, theirs = dict(lm.hf.named_parameters()), dict(plain.named_parameters())
    for name, parameter in theirs.items():
        torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-3, atol=2e-5, msg=name)


def test_flex_attention_sees_the_same(lm, ragged, monkeypatch):
    """The mask for flex_attention gives the states of the one for sdpa: prefixes and rollouts (forward, uncompiled)."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "compiled_flex", lambda: flex_attention)
    ys = [[torch.arange(n) for n in ns] for ns in ((5, 1, 7), (3, 3, 2), (8, 4, 1), (2, 6, 6))]
    with torch.no_grad():
        video = lm.encode_examples(ragged)
        for packed in (lm.pack_prefixes(ragged), lm.pack_rollouts(ragged, ys)):
            want = lm.run_packed(packed, video)
            with monkeypatch.context() as patched:
                patched.setattr(videolm.VideoLM, "flex", True)
                got = lm.run_packed(packed, video)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_block_mask_against_torch(seed):
    """Random ragged trees: the same blocks, whole and in part, as torch's create_block_mask finds pair by pair."""
    from torch.nn.attention.flex_attention import create_block_mask

    g = torch.Generator().manual_seed(seed)
    trees = []
    for _ in range(3):
        tree, parents = Tree(), [-1]
        for _ in range(int(torch.randint(1, 7, (1,), generator=g))):
            n = int(torch.randint(1, 60, (1,), generator=g))
            parent = parents[int(torch.randint(len(parents), (1,), generator=g))]
            ids = torch.zeros(n, dtype=torch.long)
            parents.append(tree.grow(parent, ids, ids, ids.expand(3, -1), ids[:0]))
        trees.append(tree)
    packed = pack(trees, 0)
    B, T = packed.branch.shape
    mine = packed.block_mask(16)
    want = create_block_mask(mine.mask_mod, B, None, T, T, device="cpu", BLOCK_SIZE=16)
    for name in ("kv", "full_kv"):
        nums = getattr(want, f"{name}_num_blocks")
        assert torch.equal(getattr(mine, f"{name}_num_blocks"), nums)
        ours, theirs = getattr(mine, f"{name}_indices"), getattr(want, f"{name}_indices")
        for at in nums.nonzero().tolist():
            k = int(nums[tuple(at)])
            assert sorted(ours[tuple(at)][:k].tolist()) == sorted(theirs[tuple(at)][:k].tolist())
    # The same pairs under one mask, and branch by branch: outputs and gradients.
    b, q, k = (x.flatten() for x in torch.meshgrid(*map(torch.arange, (B, T, T)), indexing="ij"))
    sees = mine.mask_mod(b, 0, q, k).view(B, 1, T, T)
    assert torch.equal(packed.pair_mask() == 0, sees)
    module = SimpleNamespace(num_key_value_groups=2, training=True)
    query = torch.randn(B, 4, T, 8, generator=g, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(B, 2, T, 8, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    repeated = (x.repeat_interleave(2, 1) for x in (key, value))
    expected = F.scaled_dot_product_attention(query, *repeated, sees, scale=0.3).transpose(1, 2)
    found = attend_by_branch(module, query, key, value, packed.branches(), 0.3)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, generator=g, dtype=torch.float64)
    for a, w in zip(*(torch.autograd.grad((x * weight).sum(), (query, key, value)) for x in (found, expected))):
        torch.testing.assert_close(a, w)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: flex_attention has no backward on a CPU")
def test_flex_attention_gradients(lm, ragged, monkeypatch):
    """On a GPU: gradients of the packed update by flex_attention equal those by sdpa with a mask."""
    lm.to("cuda")
    ys = [[torch.arange(n) for n in ns] for ns in ((5, 1, 7), (3, 3, 2), (8, 4, 1), (2, 6, 6))]
    packed, gradients = lm.pack_rollouts(ragged, ys).to("cuda"), []
    for flex in (False, True):
        monkeypatch.setattr(videolm.VideoLM, "flex", flex)
        lm.zero_grad()
        lm.log_probs(packed, lm.encode_examples(ragged))[0].sum().backward()
        gradients.append({n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-2, atol=1e-4, msg=name)


def test_checkpointed_layers_see_the_same_mask(checkpoint, ragged):
    """Layers that run again in the backward pass have the mask of the forward pass, whatever attends without a mask."""

    def without_mask(module, query, key, value, attention_mask, **more):
        assert attention_mask is None or attention_mask.ndim == 2
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **more)

    ALL_ATTENTION_FUNCTIONS.register("without_mask", without_mask)
    ALL_MASK_ATTENTION_FUNCTIONS.register("without_mask", lambda *_, attention_mask=None, **more: attention_mask)
    gradients = []
    for name, again in (("sdpa", False), ("without_mask", False), ("without_mask", True)):
        hf = AutoModelForImageTextToText.from_pretrained(checkpoint)
        hf.model.language_model.config._attn_implementation = name
        if again:
            hf.activation_checkpointing_enable()
        lm = videolm.VideoLM(hf).train()
        ys = [[torch.arange(n) for n in ns] for ns in ((5, 1), (3, 2), (8, 4), (2, 6))]
        lm.log_probs(lm.pack_rollouts(ragged, ys), lm.encode_examples(ragged))[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in hf.model.language_model.parameters() if p.grad is not None]))
    assert gradients[0].abs().max() > 0
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-5)


def test_sampled_log_probs_are_those_of_the_update(lm, ragged):
    """What a token cost when it was sampled is what the packed update says, also at another temperature."""
    for temperature in (1.0, 0.7):
        rollouts, video = lm.roll_out(ragged, 4, 1, LENGTH, uniforms(ragged, 5), temperature)
        packed = lm.pack_rollouts(ragged, trimmed(rollouts, 4))
        with torch.no_grad():
            logp, _ = lm.log_probs(packed, video, temperature)
        sampled = torch.cat([p[:n] for b in range(4) for p, n in zip(rollouts.logp[b, :4], rollouts.lengths[b])])
        torch.testing.assert_close(logp, sampled, rtol=1e-4, atol=1e-4)


def test_packing_runs_the_prefix_once(lm, ragged):
    """A packed clip is as long as its prompt and its rollouts together."""
    ys = [[torch.arange(5), torch.arange(3)]] * len(ragged)
    packed = lm.pack_rollouts(ragged, ys)
    assert packed.input_ids.shape == (4, max(e.prompt_length for e in ragged) + 8)
    lm.shares_prefix = False
    assert lm.pack_rollouts(ragged, ys).input_ids.shape[0] == 8


def test_micro_batches_of_the_update_change_nothing(lm, ragged):
    """The loss summed over one-clip passes has the gradient of the whole batch's."""
    rollouts, video = lm.roll_out(ragged, 3, 0, LENGTH, uniforms(ragged, 3))
    ys = trimmed(rollouts, 3)
    lengths = rollouts.lengths.flatten()
    weight, advantage = vp.token_weights(lengths), torch.linspace(-1, 1, 12)

    def backward(clips: list[int]) -> None:
        packed = lm.pack_rollouts([ragged[b] for b in clips], [ys[b] for b in clips])
        logp, _ = lm.log_probs(packed, lm.take_clips(video, clips))
        at = torch.tensor([3 * b + g for b in clips for g in range(3)])[packed.rollout]
        loss, _ = vp.grpo_loss(logp, logp.detach(), logp.detach() - 0.3, advantage[at], weight[at], beta=0.1)
        loss.backward()

    backward([0, 1, 2, 3])
    want = {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    for b in range(4):
        backward([b])
    for name, parameter in lm.named_parameters():
        if name in want:
            torch.testing.assert_close(parameter.grad, want[name], rtol=1e-3, atol=1e-6)
    assert len(want) > 20


@pytest.fixture(scope="module")
def qwen3_5(tmp_path_factory, world) -> tuple:
    """A family with linear attention, twice, and two of its examples."""
    folder = build_tiny(tmp_path_factory.mktemp("tiny") / "qwen3_5", "qwen3_5", seed=1)
    models = [AutoModelForImageTextToText.from_pretrained(folder) for _ in range(2)]
    preparation = Preparation(AutoProcessor.from_pretrained(folder), max_frames=8)
    clips, _ = load_clips(world / "train.jsonl")
    return videolm.VideoLM(models[0]), models[1].eval(), [prepare(c, preparation) for c in clips[:2]]


def test_linear_attention_rolls_out_by_repeated_prefixes(qwen3_5):
    """Qwen3.5 cannot share a prefix by a mask: each rollout repeats it, and equals whole passes of a clip alone."""
    lm, plain, examples = qwen3_5
    lm.eval()
    assert not lm.shares_prefix
    numbers = uniforms(examples, 3, 4)
    got, _ = lm.roll_out(examples, 2, 1, 4, numbers)
    for b, e in enumerate(examples):
        for r, pixels in ((0, e.pixels), (1, e.pixels), (2, degraded(e))):
            tokens, logp = by_hand(plain, e, pixels, numbers[b, r], 4, lm.banned, lm.end_ids.tolist())
            assert got.tokens[b, r, : len(tokens)].tolist() == tokens.tolist()
            torch.testing.assert_close(got.logp[b, r, : len(tokens)], logp.float(), rtol=1e-3, atol=1e-4)


def test_linear_attention_updates_on_separate_sequences(qwen3_5):
    """Log-probs of ragged rollouts equal those of plain passes, one by one."""
    lm, plain, examples = qwen3_5
    ys = [[torch.arange(5), torch.arange(2)], [torch.arange(3), torch.arange(4)]]
    with torch.no_grad():
        got, _ = lm.log_probs(lm.pack_rollouts(examples, ys), lm.encode_examples(examples))
        want = torch.cat([separate(lm, plain, e, y) for e, group in zip(examples, ys) for y in group])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_linear_attention_trains_with_twins_apart(qwen3_5, monkeypatch):
    """Caption loss and the states that the contrastive loss sees are those of whole passes, full and degraded."""
    lm, plain, examples = qwen3_5
    assert all(e.source is not None for e in examples) and len({len(e.input_ids) for e in examples}) == 2
    seen = []
    monkeypatch.setattr(lm, "contrastive_layer", 1)  # behind it the kinds of layers come in another order
    monkeypatch.setattr(lm.heads, "forward", lambda h, h_twin, *_: seen.extend((h, h_twin)) or (h.sum() * 0, {}))
    want = torch.zeros(())
    with torch.no_grad():
        out = lm(lm.collate(examples))
        for got, expected in zip(seen, states_by_hand(lm, examples), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        for e in examples:
            logits = plain_forward(plain, e).logits[0]
            at = torch.arange(e.prompt_length, len(e.input_ids))
            want += F.cross_entropy(logits[at - 1], e.input_ids[at], reduction="sum")
    torch.testing.assert_close(out.lm_loss, want, rtol=1e-4, atol=1e-4)
