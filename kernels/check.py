"""Does each kernel do on this machine what its reference does? Small inputs of odd sizes, forward and backward.

    for row in compare_all(device):             # errors against float64, beside those of eager PyTorch
    replace_unfit(device)                       # what a run begins with: {name: why} of kernels that it does without

A kernel is right if it is as near to float64 as eager PyTorch in the same dtype is, or within TOLERANCE of that.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import vp
from kernels import contrastive, dispatch, logprob
from kernels.dispatch import INTERPRETED, REPLACED, takes_kernel

TOLERANCE = 1e-3


# --- Inputs ----------------------------------------------------------------------------------------------------------


def contrastive_inputs(
    clips: int, keywords: int, tokens: int, D: int, dtype: torch.dtype, device: torch.device | str
) -> tuple:
    """`tokens` key-slot tokens of each clip in full and twin, `keywords` keywords a clip: arguments of the loss."""
    g = torch.Generator(device).manual_seed(0)
    slots, N, K = 8, clips * tokens, clips * keywords
    asks = dict(
        clip=torch.arange(clips).repeat_interleave(tokens),
        slot=(torch.arange(tokens) * slots // tokens).repeat(clips),
        keyword_clip=torch.arange(clips).repeat_interleave(keywords),
        keyword_id=torch.arange(K) % max(1, K - 3),  # a few share their words
        keyword_slots=torch.arange(slots)[None] % keywords == (torch.arange(K) % keywords)[:, None],
    )
    shown = contrastive.ids_shown(**asks).to(device)
    states = [torch.randn(n, D, generator=g, device=device).to(dtype).requires_grad_() for n in (N, N, K)]
    tau = torch.tensor(0.1, device=device, requires_grad=True)
    return *states, tau, vp.KeyTokens(**{k: v.to(device) for k, v in asks.items()}, shown=shown)


def head_inputs(M: int, H: int, V: int, dtype: torch.dtype, device: torch.device | str) -> tuple:
    """States, head, targets, banned ids, temperature."""
    g = torch.Generator(device).manual_seed(0)
    states = torch.randn(M, H, generator=g, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=g, device=device) * H**-0.5).to(dtype)
    targets = torch.randint(5, V, (M,), generator=g, device=device)
    return states, weight, targets, torch.arange(5, device=device), 1.0


def text_inputs(
    prompts: int, group: int, length: int, T: int, D: int, dtype: torch.dtype, ragged: bool, device: torch.device | str
) -> list:
    """Prompts with `group` full and `group` twin rollouts, T reference tokens and two keywords of four."""
    g = torch.Generator().manual_seed(0)

    def embed(n: int) -> Tensor:
        return torch.randn(n, D, generator=g).to(device, dtype)

    batch = []
    for _ in range(prompts):
        lengths = torch.randint(0 if ragged else length, length + 1, (2 * group,), generator=g).tolist()
        weights = [torch.ones(n, device=device) for n in lengths]
        ys = [embed(n) for n in lengths]
        ones = torch.ones(2 * group, T, device=device)
        batch.append(vp.Texts(ys, weights, embed(T), ones, [embed(4), embed(4)], group, group))
    return batch


# --- Comparing -------------------------------------------------------------------------------------------------------


@dataclass
class Errors:
    """A kernel's error against float64, and that of eager PyTorch, both relative to the largest entry."""

    kernel: str
    dtype: str
    error: float
    eager_error: float

    @property
    def right(self) -> bool:
        """Whether the kernel is no worse."""
        return self.error <= self.eager_error + TOLERANCE


def largest_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest difference, against the largest entry of what is wanted; infinite where a number is NaN."""
    errors = [(a.double() - b.double()).abs().max().item() / (1 + b.abs().max().item()) for a, b in zip(got, want)]
    return max(float("inf") if e != e else e for e in errors)


def compare_contrastive(dtype: torch.dtype, device: torch.device | str) -> Errors:
    """Loss and all gradients."""
    size = (3, 2, 7, 20) if INTERPRETED else (9, 2, 37, 300)
    *inputs, tokens = contrastive_inputs(*size, dtype, device)
    wide = [x.detach().double().requires_grad_() for x in inputs]

    def loss(inputs: list, **more) -> list:
        value = vp.contrastive_loss(*inputs, tokens, **more)[0]
        return [value.detach(), *torch.autograd.grad(value, inputs)]

    return compare("contrastive", dtype, loss(inputs, use_kernel=True), loss(inputs, use_kernel=False), loss(wide))


def compare_log_probs(dtype: torch.dtype, device: torch.device | str) -> Errors:
    """Log-probabilities, entropies, gradients of states and head."""
    size = (9, 20, 70) if INTERPRETED else (137, 300, 2111)
    states, weight, targets, banned, _ = head_inputs(*size, dtype, device)
    weight.requires_grad_()

    def logp(inputs: tuple, **more) -> list:
        value, entropy = logprob.log_probs_from_states(*inputs, targets, banned, 0.8, **more)
        return [value.detach(), entropy, *torch.autograd.grad(value.sum(), inputs)]

    wide = [x.detach().double().requires_grad_() for x in (states, weight)]
    both = (states, weight)
    return compare("log-probs", dtype, logp(both, use_kernel=True), logp(both, use_kernel=False), logp(wide))


def compare_reward(dtype: torch.dtype, device: torch.device | str) -> Errors:
    """Scores, rewards and advantages."""
    size = (2, 2, 9, 5, 20) if INTERPRETED else (5, 3, 150, 77, 130)
    batch = text_inputs(*size, dtype, True, device)
    exact = [
        vp.Texts(
            [y.double() for y in p.rollouts], p.weights, p.reference.double(), p.reference_weights.double(),
            [k.double() for k in p.keywords], p.num_full, p.num_twin,
        )
        for p in batch
    ]  # fmt: skip

    def rewards(batch: list, use_kernel: bool) -> list[Tensor]:
        found = vp.paired_rewards(batch, use_kernel=use_kernel)
        return [torch.cat(x) for x in zip(*(vars(of_prompt).values() for of_prompt in found))]

    return compare("reward", dtype, rewards(batch, True), rewards(batch, False), rewards(exact, False))


def compare(name: str, dtype: torch.dtype, kernel: list, eager: list, exact: list) -> Errors:
    """Both errors."""
    return Errors(name, str(dtype)[6:], largest_error(kernel, exact), largest_error(eager, exact))


COMPARISONS = {"contrastive": compare_contrastive, "log-probs": compare_log_probs, "reward": compare_reward}


def compare_all(device: torch.device | str) -> Iterator[Errors]:
    """Each kernel in each dtype that it may be given. The interpreter has no right bfloat16."""
    for dtype in (torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])):
        for function in COMPARISONS.values():
            yield function(dtype, device)


def replace_unfit(device: torch.device | str, comparisons: dict[str, Callable] | None = None) -> dict[str, str]:
    """Hold each kernel that training takes on this device to its reference; those that do not compile, or differ, are
    not taken from then on. Returns {name: why}; on a CPU nothing is tried.

    The loss and the reward are given float32 there, the head what products are computed in.
    """
    REPLACED.clear()
    if dispatch.INTERPRETED:  # nothing is compiled
        return {}
    probe = torch.empty(0, device=device)
    for name, function in (comparisons or COMPARISONS).items():
        if not takes_kernel(None, probe, name=name):
            continue
        dtype = torch.bfloat16 if name == "log-probs" and not INTERPRETED else torch.float32
        try:
            found = function(dtype, device)
        except Exception as error:  # no C compiler, a card that is too small, a driver that is too old: all end here
            lines = str(error).strip().splitlines() or [""]
            REPLACED[name] = f"{type(error).__name__}: {lines[0][:200]}"
            continue
        if not found.right:
            REPLACED[name] = f"it differs from its reference by {found.error:.1e}, eager PyTorch by {found.eager_error:.1e}"
    return dict(REPLACED)
