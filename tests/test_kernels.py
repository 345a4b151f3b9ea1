"""The Triton kernels: under the interpreter against their references, the references against loops, and compiled for a GPU.

Triton decides at its import whether it interprets, so those tests run in a process of their own, started by the first one
here; on a machine with a GPU they run on it directly. The interpreter has no right bfloat16: float32 and float16 only.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import dispatch
from kernels.contrastive import KeyTokens, contrastive_loss, contrastive_op, contrastive_reference, ids_shown

ON_GPU = torch.cuda.is_available() and not dispatch.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
kernel_test = pytest.mark.skipif(
    not (ON_GPU or dispatch.INTERPRETED), reason="runs in test_under_the_interpreter's own process"
)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3}


@pytest.mark.skipif(dispatch.INTERPRETED, reason="this is that process")
def test_under_the_interpreter():
    """All tests marked kernel_test."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-m", "not compiled"]
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


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


CASES = [(0, 1, 1, False), (1, 4, 7, False), (2, 9, 37, True), (3, 14, 70, False), (4, 26, 33, True)]


@kernel_test
@pytest.mark.parametrize("with_twin", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("seed, clips, d, lonely", CASES)
def test_contrastive_against_the_reference(seed, clips, d, lonely, dtype, with_twin):
    """Value, counts and every gradient, on ragged sizes of one tile and of several; keywords without positive among them."""
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
    tau, grads = torch.tensor(0.2, device=DEVICE), []
    for function, more in ((contrastive_loss, {"use_kernel": True}), (contrastive_reference, {})):
        full_t = full.T.float().contiguous().to(DEVICE).requires_grad_()
        loss, _ = function(full_t.T, twin.float().to(DEVICE), keywords.float().to(DEVICE), tau, del_shown, **more)
        grads.append(torch.autograd.grad(3 * loss, full_t)[0])
    close(*grads)


@kernel_test
def test_contrastive_twice_gives_the_same_bits():
    """Value and gradients of two runs."""
    full, twin, keywords, tokens = make_case(7, 12, 40)
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
    """A negative is a token of another clip that does not show the keyword's id: as `KeyTokens.negatives` has it."""
    *_, tokens = make_case(seed, 8, 1)
    shown = to_device(tokens).shown.cpu()
    other = tokens.clip[None, :] != tokens.keyword_clip[:, None]
    shows = (shown[None] == tokens.keyword_id[:, None, None]).any(2)
    assert torch.equal(other & ~shows, tokens.negatives())
