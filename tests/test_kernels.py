"""The Triton kernels: under the interpreter against their references, the references against loops, and compiled for a GPU.

Triton decides at its import whether it interprets: tests/conftest.py has it do so, unless there is a GPU, on which these
tests then run. Compiling needs a process of its own. The interpreter has no right bfloat16: float32 and float16 only.
"""

import copy
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import vp
from kernels import dispatch
from kernels.contrastive import contrastive_op, ids_shown
from kernels.logprob import cross_entropy_from_states, log_probs_from_states, log_probs_op
from kernels.reward import REWARDS, pack_texts, paired_reward_op
from tests.train_with_kernels import compare_runs
from vp import KeyTokens, Texts, contrastive_loss

contrastive_reference = partial(contrastive_loss, use_kernel=False)


def paired_rewards(*arguments, **more) -> list[tuple]:
    """q, c, w, r and A of each prompt."""
    return [tuple(vars(rewards).values()) for rewards in vp.paired_rewards(*arguments, **more)]


ON_GPU = torch.cuda.is_available() and not dispatch.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
kernel_test = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs Triton")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3}


def close(got: torch.Tensor, want: torch.Tensor, eager: torch.Tensor | None = None, tol: float = 2e-5) -> None:
    """|got - want| is at most tol times want's largest entry, beyond what eager PyTorch in the same dtype is off by."""
    want = want.double()
    slack = tol * (1 + want.abs().max().item()) + (0 if eager is None else (eager.double() - want).abs().max().item())
    assert got.shape == want.shape and got.isfinite().all()
    assert (got.double() - want).abs().max().item() <= slack


# --- Contrastive


def make_case(seed: int, clips: int, d: int, words: int = 3, lonely: bool = False):
    """Ragged key tokens of clips with one or two keywords, words shared between clips; float64."""
    g = torch.Generator().manual_seed(seed)
    clip, slot, keyword_clip, keyword_slots = [], [], [], []
    for b in range(clips):
        key = torch.zeros(5, dtype=torch.bool)
        for _ in range(1 + b % 2):
            mine = torch.rand(5, generator=g) < 0.4
            mine[torch.randint(5, (1,), generator=g)] = True
            keyword_clip.append(b)
            keyword_slots.append(mine)
            key |= mine
        for s in key.nonzero().flatten().tolist():
            num = 1 + int(torch.randint(4, (1,), generator=g))
            clip += [b] * num
            slot += [s] * num
    if lonely:
        keyword_clip += [clips, 0]  # of a clip that is not there; and of one, but of none of its slots
        keyword_slots += [torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)]
    tokens = KeyTokens(
        clip=torch.tensor(clip),
        slot=torch.tensor(slot),
        keyword_clip=torch.tensor(keyword_clip),
        keyword_id=torch.randint(words, (len(keyword_clip),), generator=g),
        keyword_slots=torch.stack(keyword_slots),
    )
    full, twin = (torch.randn(len(clip), d, generator=g, dtype=torch.float64) for _ in range(2))
    return full, twin, torch.randn(len(keyword_clip), d, generator=g, dtype=torch.float64), tokens


def to_device(tokens: KeyTokens) -> KeyTokens:
    """The record on the device under test, with the field `shown`."""
    fields = {k: v for k, v in vars(tokens).items() if k != "shown"}
    return KeyTokens(**{k: v.to(DEVICE) for k, v in fields.items()}, shown=ids_shown(**fields).to(DEVICE))


def run(function, inputs, dtype, tokens, twin=True, **more):
    """Value, metrics and gradients of a contrastive loss, computed in dtype."""
    inputs = [x.to(DEVICE, dtype if x.ndim else torch.float32).requires_grad_() for x in inputs]
    full, other, keywords, tau = inputs if twin else (inputs[0], None, *inputs[1:])
    loss, metrics = function(full, other, keywords, tau, tokens, **more)
    return loss.detach(), metrics, torch.autograd.grad(loss, inputs)


CASES = [(0, 1, 1, False, False), (1, 4, 7, False, True), (2, 9, 37, True, False), (3, 9, 70, False, True),
         (4, 14, 33, True, True)]  # fmt: skip


@kernel_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("seed, clips, d, lonely, with_twin", CASES)
def test_contrastive_against_the_reference(seed, clips, d, lonely, with_twin, dtype):
    """Value, counts and every gradient, on ragged sizes of one tile and of several, with keywords that have no positive."""
    full, twin, keywords, tokens = make_case(seed, clips, d, lonely=lonely)
    tokens, tau = to_device(tokens), torch.tensor(0.07 if seed % 2 else 0.3)
    inputs = [x.to(dtype) for x in ([full, twin, keywords] if with_twin else [full, keywords])] + [tau]
    got, counts, grads = run(contrastive_loss, inputs, dtype, tokens, with_twin, use_kernel=True)
    eager, eager_counts, eager_grads = run(contrastive_reference, inputs, dtype, tokens, with_twin)
    want, _, want_grads = run(contrastive_reference, inputs, torch.float64, tokens, with_twin)
    assert counts == eager_counts
    close(got, want, eager)
    for a, b, c in zip(grads, want_grads, eager_grads):
        close(a, b, c, TOLERANCE[dtype])
    if lonely:
        assert grads[-2][-2:].abs().max() == 0


@kernel_test
def test_contrastive_without_gradient_empty_and_zero():
    """No gradient asked: the same value. No token or no keyword: 0. States of zeros: no NaN in what is finite eagerly."""
    full, twin, keywords, tokens = make_case(5, 6, 20)
    tokens, tau = to_device(tokens), torch.tensor(0.2, device=DEVICE)
    full, twin, keywords = (x.float().to(DEVICE) for x in (full, twin, keywords))
    want, _ = contrastive_reference(full, twin, keywords, tau, tokens)
    torch.testing.assert_close(contrastive_loss(full, twin, keywords, tau, tokens, use_kernel=True)[0], want)
    no = torch.empty(0, dtype=torch.long, device=DEVICE)
    nobody = KeyTokens(no, no, no, no, torch.empty(0, 3, dtype=torch.bool, device=DEVICE))
    empty = torch.empty(0, 20, device=DEVICE, requires_grad=True)
    loss, metrics = contrastive_loss(empty, empty, empty, tau, nobody, use_kernel=True)
    assert loss == 0 and metrics["positives"] == 0 and torch.autograd.grad(loss, empty)[0].shape == (0, 20)
    full[3] = 0
    keywords.requires_grad_()
    for dtype in (torch.float32, torch.float16):
        inputs = [x.detach().to(dtype) for x in (full, twin)] + [keywords.to(dtype)]
        loss, _ = contrastive_loss(*inputs, tau, tokens, use_kernel=True)
        want, _ = contrastive_reference(*inputs, tau, tokens)
        close(torch.autograd.grad(loss, keywords)[0], torch.autograd.grad(want, keywords)[0], tol=TOLERANCE[dtype])


@kernel_test
def test_contrastive_takes_what_a_trainer_gives():
    """A scaled loss, frozen keywords, strided states, tokens without the field `shown`: as the reference."""
    full, twin, keywords, tokens = make_case(6, 5, 24)
    del_shown = KeyTokens(**{k: v if v is None else v.to(DEVICE) for k, v in vars(tokens).items()})
    tau, grads = torch.tensor(0.2, device=DEVICE, requires_grad=True), []
    for function, more in ((contrastive_loss, {"use_kernel": True}), (contrastive_reference, {})):
        full_t = full.T.float().contiguous().to(DEVICE).requires_grad_()
        loss, _ = function(full_t.T, twin.float().to(DEVICE), keywords.float().to(DEVICE), tau, del_shown, **more)
        grads.append(torch.autograd.grad(3 * loss, (full_t, tau)))
    for got, want in zip(*grads):
        close(got, want)


@kernel_test
def test_contrastive_twice_gives_the_same_bits():
    """Value and gradients of two runs."""
    full, twin, keywords, tokens = make_case(7, 8, 24)
    inputs = [full, twin, keywords, torch.tensor(0.1)]
    one, two = (run(contrastive_loss, inputs, torch.float32, to_device(tokens), use_kernel=True) for _ in range(2))
    assert torch.equal(one[0], two[0]) and all(torch.equal(a, b) for a, b in zip(one[2], two[2]))


@kernel_test
@pytest.mark.parametrize("with_twin", [True, False])
def test_contrastive_is_a_good_operator(with_twin):
    """opcheck; and one graph under torch.compile, its value and gradients the same."""
    full, twin, keywords, tokens = make_case(8, 3, 5)
    tokens, tau = to_device(tokens), torch.tensor(0.2, device=DEVICE, requires_grad=True)
    full, twin, keywords = (x.float().to(DEVICE).requires_grad_() for x in (full, twin, keywords))
    twin = twin if with_twin else None
    asks = (tokens.clip, tokens.slot, tokens.shown, tokens.keyword_clip, tokens.keyword_id, tokens.keyword_slots)
    torch.library.opcheck(contrastive_op, (full, twin, keywords, tau, *asks, True))
    compiled = torch.compile(contrastive_loss, backend="aot_eager", fullgraph=True)
    one, _ = compiled(full, twin, keywords, tau, tokens, use_kernel=True)
    two, _ = contrastive_loss(full, twin, keywords, tau, tokens, use_kernel=True)
    assert torch.equal(one, two)
    assert torch.equal(torch.autograd.grad(one, full)[0], torch.autograd.grad(two, full)[0])


def test_contrastive_reference_gradcheck():
    """The reference's gradients in float64. (Its value against a loop by hand: tests/test_contrastive.py.)"""
    full, twin, keywords, tokens = make_case(9, 3, 4, lonely=True)
    inputs = [x.requires_grad_() for x in (full, twin, keywords, torch.tensor(0.5, dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda *x: contrastive_loss(*x, tokens)[0], inputs)


@pytest.mark.parametrize("seed", range(4))
def test_shown_gives_the_same_negatives(seed):
    """A negative is a token of another clip that does not show the keyword's id: as `vp.KeyTokens.negatives` has it."""
    *_, tokens = make_case(seed, 8, 1)
    shown = to_device(tokens).shown.cpu()
    other = tokens.clip[None, :] != tokens.keyword_clip[:, None]
    shows = (shown[None] == tokens.keyword_id[:, None, None]).any(2)
    assert torch.equal(other & ~shows, tokens.negatives())


# --- Log-probabilities


def head_case(seed: int, M: int, H: int, V: int, num_banned: int):
    """States, head, targets that are not banned, banned ids, an upstream gradient; float64."""
    g = torch.Generator().manual_seed(seed)
    states, weight = (torch.randn(n, H, generator=g, dtype=torch.float64) for n in (M, V))
    order = torch.randperm(V, generator=g)
    targets = order[num_banned:][torch.randint(V - num_banned, (M,), generator=g)]
    return states, weight, targets, order[:num_banned], torch.randn(M, generator=g, dtype=torch.float64)


def run_head(case, dtype, use_kernel: bool, temperature: float = 0.7):
    """Log-probs, entropies and both gradients, computed in dtype."""
    states, weight, targets, banned, up = (x.to(DEVICE) for x in case)
    inputs = [x.to(dtype).requires_grad_() for x in (states, weight)]
    logp, entropy = log_probs_from_states(*inputs, targets, banned, temperature, use_kernel=use_kernel)
    assert not entropy.requires_grad
    return logp.detach(), entropy, *torch.autograd.grad((logp * up).sum(), inputs)


@kernel_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [(1, 3, 2, 1), (5, 16, 48, 0), (37, 50, 119, 7), (18, 33, 160, 100)])
def test_log_probs_against_the_reference(sizes, dtype):
    """Values, entropies and gradients, on ragged sizes of one tile and one stretch of the vocabulary, and of several."""
    case = head_case(sum(sizes), *sizes)
    case = [x.to(dtype).double() if x.is_floating_point() else x for x in case]
    got, eager, want = run_head(case, dtype, True), run_head(case, dtype, False), run_head(case, torch.float64, False)
    for a, b, c in zip(got, want, eager):
        close(a, b, c, TOLERANCE[dtype])


@kernel_test
def test_log_probs_with_a_stretch_all_banned_and_without_rows():
    """Whole tiles of banned ids, a banned target (-inf, as in the reference), and no row at all."""
    states, weight, targets, _, _ = (x.to(DEVICE) for x in head_case(1, 6, 20, 100, 0))
    banned = torch.arange(90, device=DEVICE)
    targets = targets % 10 + 90
    targets[2] = 3
    got = log_probs_from_states(states.float(), weight.float(), targets, banned, use_kernel=True)
    want = log_probs_from_states(states, weight, targets, banned)
    assert got[0][2] == want[0][2] == -torch.inf
    torch.testing.assert_close(got[0].double(), want[0])
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-5)
    grads = []
    for dtype, use_kernel in ((torch.float32, True), (torch.float64, False)):
        inputs = [x.to(dtype).requires_grad_() for x in (states, weight)]
        logp, _ = log_probs_from_states(*inputs, targets, banned, use_kernel=use_kernel)
        grads.append(torch.autograd.grad(logp.sum(), inputs))
    for one, two in zip(*grads):
        close(one, two)
    none, head = states[:0].float().requires_grad_(), weight.float().requires_grad_()
    logp, entropy = log_probs_from_states(none, head, targets[:0], banned, use_kernel=True)
    assert len(logp) == len(entropy) == 0
    assert [x.abs().sum() for x in torch.autograd.grad(logp.sum(), (none, head))] == [0, 0]


@kernel_test
def test_cross_entropy_with_a_frozen_head_and_small_gradients():
    """Stage 1's loss; its gradient in float16 survives a division by many tokens; a frozen head gets none."""
    states, weight, targets, *_ = (x.to(DEVICE) for x in head_case(2, 20, 24, 70, 0))
    for dtype in (torch.float32, torch.float16):
        h, w = states.to(dtype), weight.to(dtype)
        grads = []
        for use_kernel, kind in ((True, dtype), (False, torch.float64)):
            x = h.to(kind).requires_grad_()
            loss = cross_entropy_from_states(x, w.to(kind), targets, use_kernel) / 512
            grads.append((loss, torch.autograd.grad(loss, x)[0]))
        close(grads[0][0], grads[1][0])
        close(512 * grads[0][1].double(), 512 * grads[1][1], tol=TOLERANCE[dtype])


@kernel_test
def test_log_probs_twice_give_the_same_bits():
    """Values and gradients of two runs."""
    case = head_case(3, 40, 40, 130, 5)
    assert all(torch.equal(a, b) for a, b in zip(run_head(case, torch.float32, True), run_head(case, torch.float32, True)))


@kernel_test
def test_log_probs_is_a_good_operator():
    """opcheck; and one graph under torch.compile, its values and gradients the same."""
    states, weight, targets, banned, _ = (x.to(DEVICE) for x in head_case(4, 9, 10, 60, 3))
    states, weight = states.float().requires_grad_(), weight.float().requires_grad_()
    sampled = torch.ones(60, dtype=torch.uint8, device=DEVICE)
    torch.library.opcheck(log_probs_op, (states, weight, targets, sampled, 0.7))
    compiled = torch.compile(log_probs_from_states, backend="aot_eager", fullgraph=True)
    one, two = (f(states, weight, targets, banned, 0.7, use_kernel=True)[0] for f in (compiled, log_probs_from_states))
    assert torch.equal(one, two)
    assert torch.equal(torch.autograd.grad(one.sum(), weight)[0], torch.autograd.grad(two.sum(), weight)[0])


def test_log_probs_reference_against_a_loop_and_gradcheck():
    """The softmax over what is not banned, written out in Python floats; gradients in float64."""
    states, weight, targets, banned, _ = head_case(5, 4, 3, 7, 2)
    logp, entropy = log_probs_from_states(states, weight, targets, banned, 0.7)
    for m in range(4):
        logits = [sum(a * b for a, b in zip(states[m].tolist(), weight[v].tolist())) / 0.7 for v in range(7)]
        p = [0.0 if v in banned else math.exp(z) for v, z in enumerate(logits)]
        p = [x / sum(p) for x in p]
        assert logp[m].item() == pytest.approx(math.log(p[targets[m]]))
        assert entropy[m].item() == pytest.approx(-sum(x * math.log(x) for x in p if x))
    inputs = states.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: log_probs_from_states(h, w, targets, banned, 0.7)[0], inputs)
    ce = torch.nn.functional.cross_entropy(states.float() @ weight.float().T, targets, reduction="sum")
    torch.testing.assert_close(cross_entropy_from_states(states.float(), weight.float(), targets), ce)


# --- Reward


def text_case(seed: int, prompts: int, d: int, dtype=torch.float32, longest: int = 40) -> list[Texts]:
    """Prompts with ragged rollouts, references of 1 to 40 words, 0 to 3 keywords, twins in some, and a vector of zeros."""
    g = torch.Generator().manual_seed(seed)
    batch = []

    def size(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=g))

    for b in range(prompts):
        G, G_twin, T = size(2, 6), size(0, 5), 1 if b == 0 else size(1, longest + 1)
        lengths = [0 if b == 1 and i == 1 else size(1, longest) for i in range(G + G_twin)]
        batch.append(
            Texts(
                rollouts=[torch.randn(n, d, generator=g).to(DEVICE, dtype) for n in lengths],
                weights=[torch.randint(0, 2, (n,), generator=g).float() for n in lengths],
                reference=torch.randn(T, d, generator=g).to(DEVICE, dtype),
                reference_weights=torch.randint(0, 2, (G + G_twin, T), generator=g).float().to(DEVICE),
                keywords=[torch.randn(size(1, 5), d, generator=g).to(DEVICE, dtype) for _ in range(size(0, 4))],
                num_full=G,
                num_twin=G_twin,
            )
        )
    batch[-1].reference[0] = 0
    return batch


def widen(batch: list[Texts]) -> list[Texts]:
    """The same in float64, on the CPU."""

    def wide(x):
        return [wide(y) for y in x] if isinstance(x, list) else x.double().cpu() if isinstance(x, torch.Tensor) else x

    return [Texts(**{k: wide(v) for k, v in vars(p).items()}) for p in batch]


@kernel_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("seed, prompts, d", [(0, 1, 3), (1, 3, 20), (2, 5, 33), (3, 4, 64)])
def test_rewards_against_the_reference(seed, prompts, d, dtype):
    """q, c, w, r and A of a ragged batch: empty rollouts, one-word references, no keywords and no twin among it."""
    batch = text_case(seed, prompts, d, dtype)
    got = paired_rewards(batch, "relative", 0.8, 0.01, use_kernel=True)
    eager = paired_rewards(batch, "relative", 0.8, 0.01, use_kernel=False)
    want = paired_rewards(widen(batch), "relative", 0.8, 0.01)
    for one, two, three in zip(got, eager, want):
        for x, y, z in zip(one, two, three):
            close(x.cpu(), z, y.cpu(), TOLERANCE[dtype])


@kernel_test
@pytest.mark.parametrize("kind", REWARDS)
def test_rewards_of_every_kind_and_twice_the_same_bits(kind):
    """All four kinds, divided and not; two runs."""
    batch = text_case(4, 2, 16, longest=18)
    for divide in (False, True):
        one, two = (paired_rewards(batch, kind, 0.5, 0.02, divide, use_kernel=True) for _ in range(2))
        assert all(torch.equal(x, y) for a, b in zip(one, two) for x, y in zip(a, b))
        for a, b in zip(one, paired_rewards(widen(batch), kind, 0.5, 0.02, divide)):
            for x, y in zip(a, b):
                close(x.cpu(), y, tol=1e-4)


@kernel_test
def test_rewards_of_nothing():
    """All rollouts empty; an empty reference; no keyword: 0 everywhere, as in the reference."""
    word = torch.eye(4, device=DEVICE)
    for rollouts, reference, keywords in (
        ([word[:0]] * 3, word, [word[:1]]),
        ([word[:1], word[:0], word], word[:0], [word[:1]]),
        ([word[:1], word[:0], word], word[:1], []),
    ):
        weights = [torch.ones(len(y)) for y in rollouts]
        case = [Texts(rollouts, weights, reference, torch.ones(3, len(reference), device=DEVICE), keywords, 2, 1)]
        for x, y in zip(paired_rewards(case, use_kernel=True)[0], paired_rewards(case, use_kernel=False)[0]):
            torch.testing.assert_close(x, y)


@kernel_test
def test_rewards_is_a_good_operator():
    """opcheck."""
    packed = vars(pack_texts(text_case(5, 2, 8)))
    tensors = [x for x in packed.values() if isinstance(x, torch.Tensor)]
    torch.library.opcheck(paired_reward_op, (*tensors, list(packed["longest"]), 2, 1.0, 0.1, False))


# --- All of them


@pytest.mark.parametrize("names", [("float32", "float64"), ("float32",)])
def test_dispatch(names, monkeypatch):
    """The CPU takes the reference; asking for a kernel that cannot run fails loudly."""
    tensors = [torch.ones(1, dtype=getattr(torch, name)) for name in names]
    assert not dispatch.takes_kernel(None, *tensors, None) and not dispatch.takes_kernel(False, *tensors)
    monkeypatch.setattr(dispatch, "FORCED", False)
    assert not dispatch.takes_kernel(None, *tensors)
    monkeypatch.setattr(dispatch, "FORCED", True)  # stands in for None only
    assert not dispatch.takes_kernel(False, *tensors)
    if not dispatch.INTERPRETED or "float64" in names:
        with pytest.raises(ValueError, match="use_kernel"):
            dispatch.takes_kernel(True, *tensors)
        with pytest.raises(ValueError, match="use_kernel"):
            dispatch.takes_kernel(None, *tensors)
    else:
        assert dispatch.takes_kernel(None, *tensors)


@pytest.mark.skipif(ON_GPU or not dispatch.HAS_TRITON, reason="for machines without a GPU")
def test_benchmark_without_a_gpu():
    """It says so, checks correctness under the interpreter, and ends well."""
    command = [sys.executable, "-m", "kernels.bench"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "No GPU" in done.stdout and done.stdout.count("eager") == 6 and done.stdout.count("public function") == 3


@kernel_test
def test_fits_a_small_card(tmp_path):
    """The kernels of training become machine code of an RTX 3090, though none is here: no register spills, and their tiles
    have room. `python -m kernels.fit` does the same for all kernels and all cards, in minutes."""
    names = ["coefficients K=12", "keywords_product K=12", "match_words", "reward_group R=16", "similarity_tile K=12",
             "states_gradient K=12", "logits_gradient", "multiply, to the states"]  # fmt: skip
    command = [sys.executable, "-m", "kernels.fit", "--cards", "86", "--dtypes", "fp32", "--only", *names]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("| fp32 |") == len(names), done.stdout + done.stderr[-2000:]


@kernel_test
@pytest.mark.parametrize("checkpoint", ["qwen2_5_vl"], indirect=True)
def test_training_steps_through_the_kernels(lm, ragged, monkeypatch):
    """Two steps of stage 1, then log-probs and rewards of stage 2, as the references have them: within 1e-4.

    `python -m tests.train_with_kernels --steps 50` does the same for both scripts, as long as one likes.
    """
    ragged = [ragged[1], ragged[3]]  # the short ones: the interpreter is slow
    batch, before = lm.collate(ragged).to(DEVICE), copy.deepcopy(lm.state_dict())
    lm.to(DEVICE)
    packed = lm.pack_rollouts(ragged, [[e.input_ids[-4:], e.input_ids[-3:]] for e in ragged]).to(DEVICE)
    texts, results = text_case(6, 2, 16, longest=18), []
    for use_kernel in (True, False):
        monkeypatch.setattr(dispatch, "FORCED", use_kernel)
        lm.load_state_dict(before)
        optimizer, losses = torch.optim.AdamW(lm.parameters(), 7e-4, betas=(0.9, 0.99)), []
        for _ in range(2):
            out = lm(batch)
            (out.lm_loss / len(batch.label_ids) + out.contrastive_loss / len(batch.keyword_ids)).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses += [out.lm_loss / len(batch.label_ids), out.contrastive_loss / len(batch.keyword_ids)]
        logp, entropy = lm.log_probs(packed, lm.encode_examples(ragged))
        rewards = torch.cat([x for prompt in paired_rewards(texts) for x in prompt])
        results.append((torch.stack(losses).detach(), logp.detach(), entropy, rewards))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_comparing_runs():
    """Losses, rewards and policy of each step, nothing else; what is no number never passes; a missing step is loud."""
    one = {"step": 2, "loss/lm": 1.0, "reward/total": 0.5, "policy/kl": 0.25, "perf/x": 1.0, "lr": 1.0}
    two = one | {"reward/total": 0.25, "policy/kl": 0.375, "perf/x": 9.0, "lr": 2.0}
    (row,) = compare_runs([one], [two])
    assert row["step"] == 2 and row["difference"] == 0.25 and row["policy/kl"] == (0.25, 0.375) and "lr" not in row
    for broken in ({"policy/kl": math.nan}, {"loss/lm": math.nan}):
        assert compare_runs([one], [one | broken])[0]["difference"] == math.inf
    with pytest.raises(ValueError):
        compare_runs([one, one], [one])
