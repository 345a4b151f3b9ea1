"""The policy loss, equation (5): by hand, against a finite difference, on a bandit, and on a model with a fixed batch."""

import itertools

import pytest
import torch

import vp
from kernels.logprob import sampling_log_probs, selected_log_probs
from tests.test_rollouts import trimmed, uniforms


@pytest.mark.parametrize(
    "rho, advantage, moves",
    [(1.0, 1.0, True), (1.27, 1.0, True), (1.29, 1.0, False), (0.5, 1.0, True), (1.0, -1.0, True), (0.81, -1.0, True),
     (0.79, -1.0, False), (1.5, -1.0, True), (1.5, 0.0, False)],
)  # fmt: skip
def test_clipping(rho, advantage, moves):
    """Gradient flows only where a step could still be too small: up to 1.28 for good tokens, down to 0.8 for bad ones."""
    logp = torch.tensor([rho], dtype=torch.float64).log().requires_grad_()
    loss, metrics = vp.grpo_loss(logp, torch.zeros(1), None, torch.tensor([advantage]), torch.ones(1))
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient.item() == pytest.approx(-rho * advantage if moves else 0.0)
    clipped = min(max(rho, 0.8), 1.28)
    assert loss.item() == pytest.approx(-min(rho * advantage, clipped * advantage))
    assert metrics["clipped"].item() == (not moves and advantage != 0)


def test_kl_is_k3_and_is_free_when_off():
    """e^x - x - 1 with x = ref - logp: never negative, 0 when equal; without a reference exactly the plain loss."""
    torch.manual_seed(0)
    logp, ref = torch.randn(50, dtype=torch.float64, requires_grad=True), torch.randn(50, dtype=torch.float64)
    a, w, old = torch.randn(50), torch.rand(50), logp.detach()
    plain, _ = vp.grpo_loss(logp, old, None, a, w)
    loss, metrics = vp.grpo_loss(logp, old, ref, a, w, beta=0.3)
    x = ref - logp
    assert (loss - plain).item() == pytest.approx((0.3 * w * (x.exp() - 1 - x)).sum().item())
    assert metrics["kl"] > 0
    same, metrics = vp.grpo_loss(logp, old, old, a, w, beta=0.3)
    assert metrics["kl"].abs() < 1e-12 and same.item() == pytest.approx(plain.item())


def test_token_weights():
    """token: all alike over the batch. sequence: rollouts alike. Both sum to 1 over the batch's tokens."""
    lengths = torch.tensor([[3, 1], [4, 2]])
    for level in ("token", "sequence"):
        w = vp.token_weights(lengths, level)
        assert (w * lengths).sum().item() == pytest.approx(1)
    assert vp.token_weights(lengths, "sequence")[0, 1] == 3 * vp.token_weights(lengths, "sequence")[0, 0]
    with pytest.raises(ValueError, match="token or sequence"):
        vp.token_weights(lengths, "word")


def tree_log_probs(theta: torch.Tensor) -> torch.Tensor:
    """Log-probs of both tokens of every two-token text over three words: (9, 2); theta (4, 3): first, then by first."""
    first, second = theta[0].log_softmax(0), theta[1:].log_softmax(1)
    return torch.stack([torch.stack([first[a], second[a, b]]) for a in range(3) for b in range(3)])


@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_that_of_the_expected_reward(seed):
    """Weighted by its probability, each text's policy gradient adds up to a finite difference of the expected reward."""
    g = torch.Generator().manual_seed(seed)
    theta = torch.randn(4, 3, dtype=torch.float64, generator=g).requires_grad_()
    reward = torch.rand(9, dtype=torch.float64, generator=g)

    def expected(t):
        return (tree_log_probs(t).sum(1).exp() * reward).sum()

    logp = tree_log_probs(theta)
    p = logp.detach().sum(1).exp()
    advantage = (reward - (p * reward).sum()).repeat_interleave(2)
    flat = logp.flatten()
    loss, _ = vp.grpo_loss(flat, flat.detach(), None, advantage, p.repeat_interleave(2))
    (gradient,) = torch.autograd.grad(loss, theta)
    for i in range(4):
        for j in range(3):
            step = torch.zeros(4, 3, dtype=torch.float64)
            step[i, j] = 1e-5
            difference = (expected(theta.detach() + step) - expected(theta.detach() - step)) / 2e-5
            assert -gradient[i, j].item() == pytest.approx(difference.item(), abs=1e-8)


@pytest.mark.parametrize("kind, divide", [("similarity", False), ("similarity", True), ("relative", False)])
@pytest.mark.parametrize("seed", range(2))
def test_bandit_finds_the_known_answer(kind, divide, seed):
    """Sampled groups of one-token answers, GRPO with clipping and two epochs: the best arm ends likeliest by far.

    Arm 3 says the event (keyword recall 1) and is the best description but one; arm 5 is the best description without it.
    """
    q = torch.tensor([0.2, 0.4, 0.5, 0.8, 0.3, 0.85])
    c = torch.tensor([0.0, 0.0, 0.3, 1.0, 0.0, 0.0])
    best = 3 if kind == "relative" else 5
    g = torch.Generator().manual_seed(seed)
    logits = torch.zeros(6, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.05)
    for _ in range(150):
        old = logits.detach().log_softmax(0)
        arms = vp.choose(old.expand(32, 6), torch.rand(32, generator=g))
        twin = vp.choose(torch.tensor([0.2, 0.2, 0.2, 0.0, 0.2, 0.2]).log().expand(8, 6), torch.rand(8, generator=g))
        _, a = vp.rewards_and_advantages(kind, q[arms], c[arms], q[twin], c[twin], divide=divide)
        for _ in range(2):
            loss, _ = vp.grpo_loss(logits.log_softmax(0)[arms], old[arms], None, a, vp.token_weights(torch.ones(32)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert logits.softmax(0).argmax() == best and logits.softmax(0)[best] > 0.8


def test_steps_ascend_on_a_fixed_batch(lm, ragged):
    """On one batch of rollouts, good ones grow likelier and bad ones less likely, at every step of plain gradient."""
    rollouts, video = lm.roll_out(ragged, 6, 0, 6, uniforms(ragged, 6, 6))
    packed = lm.pack_rollouts(ragged, trimmed(rollouts, 6))
    advantage = torch.randn(24, generator=torch.Generator().manual_seed(1))[packed.rollout]
    weight = vp.token_weights(rollouts.lengths).flatten()[packed.rollout]
    old = torch.cat([p[:n] for b in range(4) for p, n in zip(rollouts.logp[b], rollouts.lengths[b])])
    lm.base.model.visual.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in lm.hf.parameters() if p.requires_grad], 0.05)
    losses = []
    for _ in range(4):
        loss, _ = vp.grpo_loss(lm.log_probs(packed, video)[0], old, None, advantage, weight)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(-(weight * advantage).sum().item(), abs=1e-4)  # rho is 1 at first
    assert all(b < a for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_choose_follows_the_distribution(temperature):
    """Evenly spread numbers choose each token as often as its probability; banned ones never; u near 1 is safe."""
    torch.manual_seed(0)
    banned = torch.tensor([2, 7])
    logp = sampling_log_probs(torch.randn(10), banned, temperature)
    numbers = (torch.arange(20000) + 0.5) / 20000
    counts = torch.bincount(vp.choose(logp.expand(20000, 10), numbers), minlength=10) / 20000
    torch.testing.assert_close(counts, logp.exp(), atol=1e-4, rtol=0)
    assert counts[banned].sum() == 0
    edge = torch.tensor([0.0, 1 - 2**-24])
    assert not torch.isin(vp.choose(logp.expand(2, 10), edge), banned).any()


def test_selected_log_probs_and_entropy():
    """Log-softmax over what may be sampled, at the sampling temperature; the entropy of the same distribution."""
    torch.manual_seed(0)
    logits, targets, banned = torch.randn(6, 11), torch.tensor([0, 1, 2, 3, 4, 10]), torch.tensor([5, 6])
    got, entropy = selected_log_probs(logits, targets, banned, 0.7)
    kept = torch.tensor([0, 1, 2, 3, 4, 7, 8, 9, 10])
    want = torch.distributions.Categorical(logits=logits[:, kept] / 0.7)
    place = torch.tensor([kept.tolist().index(t) for t in targets.tolist()])
    torch.testing.assert_close(got, want.log_prob(place))
    torch.testing.assert_close(entropy, want.entropy())
