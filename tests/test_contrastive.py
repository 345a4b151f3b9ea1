"""Equation (1) against a loop written by hand, in float64, with gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

import vp


def make_case(seed: int, clips: int = 4, slots: int = 5, d: int = 7):
    """Ragged key tokens of several clips, two keywords in some, some words shared between clips."""
    g = torch.Generator().manual_seed(seed)
    clip, slot, keyword_clip, keyword_slots = [], [], [], []
    for b in range(clips):
        key = torch.zeros(slots, dtype=torch.bool)
        for _ in range(1 + b % 2):
            mine = torch.rand(slots, generator=g) < 0.4
            mine[torch.randint(slots, (1,), generator=g)] = True
            keyword_clip.append(b)
            keyword_slots.append(mine)
            key |= mine
        per_slot = 1 + int(torch.randint(3, (1,), generator=g))
        for s in key.nonzero().flatten().tolist():
            clip += [b] * per_slot
            slot += [s] * per_slot
    tokens = vp.KeyTokens(
        clip=torch.tensor(clip),
        slot=torch.tensor(slot),
        keyword_clip=torch.tensor(keyword_clip),
        keyword_id=torch.randint(3, (len(keyword_clip),), generator=g),
        keyword_slots=torch.stack(keyword_slots),
    )
    full, twin = (torch.randn(len(clip), d, generator=g, dtype=torch.float64) for _ in range(2))
    keywords = torch.randn(len(keyword_clip), d, generator=g, dtype=torch.float64)
    return full, twin, keywords, tokens


def loop_loss(full, twin, keywords, tau, tokens: vp.KeyTokens) -> torch.Tensor:
    """Equation (1), one keyword and one token at a time."""
    total = 0.0
    K, N = len(keywords), len(full)

    def shows(j, i):
        return tokens.clip[i] == tokens.keyword_clip[j] and tokens.keyword_slots[j, tokens.slot[i]]

    def s(j, x):
        return torch.dot(keywords[j] / keywords[j].norm(), x / x.norm()) / tau

    for j in range(K):
        positives = [s(j, full[i]) for i in range(N) if shows(j, i)]
        if not positives:
            continue
        negatives = []
        for i in range(N):
            if shows(j, i) and twin is not None:
                negatives.append(s(j, twin[i]))
            same = any(shows(k, i) and tokens.keyword_id[k] == tokens.keyword_id[j] for k in range(K))
            if tokens.clip[i] != tokens.keyword_clip[j] and not same:
                negatives.append(s(j, full[i]))
        up = sum(torch.exp(x) for x in positives)
        total = total + torch.log(up + sum(torch.exp(x) for x in negatives)) - torch.log(up)
    return total


@pytest.mark.parametrize("with_twin", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_against_the_loop(seed, with_twin):
    """Value and every gradient, the temperature's included."""
    full, twin, keywords, tokens = make_case(seed)
    tau = torch.tensor(0.2, dtype=torch.float64)
    inputs = [full, twin, keywords, tau] if with_twin else [full, keywords, tau]
    for x in inputs:
        x.requires_grad_()
    mine, _ = vp.contrastive_loss(full, twin if with_twin else None, keywords, tau, tokens)
    loop = loop_loss(full, twin if with_twin else None, keywords, tau, tokens)
    torch.testing.assert_close(mine, loop)
    for got, want in zip(torch.autograd.grad(mine, inputs), torch.autograd.grad(loop, inputs)):
        torch.testing.assert_close(got, want)


def test_keyword_without_positive_gives_no_loss_and_no_nan():
    """Its row is finite in value and gradient, and adds nothing."""
    full, twin, keywords, tokens = make_case(0)
    value, _ = vp.contrastive_loss(full, twin, keywords, torch.tensor(0.1), tokens)
    lonely = vp.KeyTokens(
        clip=tokens.clip,
        slot=tokens.slot,
        keyword_clip=torch.cat([tokens.keyword_clip, torch.tensor([99])]),
        keyword_id=torch.cat([tokens.keyword_id, torch.tensor([99])]),
        keyword_slots=torch.cat([tokens.keyword_slots, torch.zeros(1, 5, dtype=torch.bool)]),
    )
    more = torch.cat([keywords, torch.ones(1, 7, dtype=torch.float64)]).requires_grad_()
    got, _ = vp.contrastive_loss(full, twin, more, torch.tensor(0.1), lonely)
    torch.testing.assert_close(got, value)
    (grad,) = torch.autograd.grad(got, more)
    assert grad.isfinite().all() and grad[-1].abs().max() == 0


def test_empty_batch():
    """No keyword at all: zero, not an error."""
    empty = torch.empty(0, dtype=torch.long)
    tokens = vp.KeyTokens(empty, empty, empty, empty, torch.empty(0, 3, dtype=torch.bool))
    loss, _ = vp.contrastive_loss(torch.empty(0, 4), torch.empty(0, 4), torch.empty(0, 4), torch.tensor(1.0), tokens)
    assert loss == 0


def test_same_words_are_no_negatives():
    """Two clips with the same event do not push each other away; with other words they do."""
    full = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), dim=-1)
    keywords = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    one = torch.tensor([0, 1])
    slots = torch.ones(2, 1, dtype=torch.bool)
    same = vp.KeyTokens(one, torch.zeros(2, dtype=torch.long), one, torch.tensor([5, 5]), slots)
    other = vp.KeyTokens(one, torch.zeros(2, dtype=torch.long), one, torch.tensor([5, 6]), slots)
    assert vp.contrastive_loss(full, None, keywords, torch.tensor(1.0), same)[0] == 0
    want = 2 * math.log1p(math.exp(-1.0))
    torch.testing.assert_close(vp.contrastive_loss(full, None, keywords, torch.tensor(1.0), other)[0], torch.tensor(want))


def test_counts():
    """The metrics count what the loop counts."""
    full, twin, keywords, tokens = make_case(3)
    _, metrics = vp.contrastive_loss(full, twin, keywords, torch.tensor(0.1), tokens)
    assert metrics["positives"] == tokens.positives().sum()
    assert metrics["negatives"] == tokens.negatives().sum() + tokens.positives().sum()


def test_heads_clamp_the_temperature():
    """tau stays within [0.01, 1], however far its parameter has run."""
    heads = vp.ContrastiveHeads(8)
    assert torch.equal(heads.visual.weight, heads.text.weight) and heads.visual.weight is not heads.text.weight
    for value, want in ((-50.0, 0.01), (50.0, 1.0), (math.log(0.3), 0.3)):
        heads.log_temperature.data.fill_(value)
        assert heads.temperature.item() == pytest.approx(want)
