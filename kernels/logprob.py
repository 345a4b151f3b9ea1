"""Log-probs and entropies of chosen tokens straight from hidden states: reference, kernels, autograd, public functions.

M states of width H meet an output head of V rows. With V = 152k the logits are the largest tensor of a
training step, and all that is wanted of a row are three sums: its largest logit, its sum of exponentials, and
their mean logit for the entropy. So the forward pass walks over the vocabulary and keeps those, in float32,
one set for each stretch of it. The backward makes the logits again, a stretch at a time, turns them into
dL/dlogits, and adds each stretch's product to the gradient in float32: rounding every stretch's share to
bfloat16 before the sum would bias training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import INTERPRETED, ceil_div, num_programs, takes_kernel, tl, triton

# --- The reference ---------------------------------------------------------------------------------------------------
# Its traffic in bf16: reads states and head (2MH + 2VH bytes), writes the logits (2MV), their float32 copy
# (2MV read, 4MV), a masked one (8MV), a divided one (8MV), the log-softmax (8MV), and the entropy's
# exponentials and products (about 20MV): at M = 4096, V = 152064 some 30 GB, where states and head are 1.1
# GB. It holds 4 to 5 tensors of 2.5 GB at its peak. The kernels read states and head once a pass (the head
# again for every group of rows that does not share it in the cache), and hold one stretch of dL/dlogits, 64
# MB, in the backward.


def sampling_log_probs(logits: Tensor, banned: Tensor, temperature: float) -> Tensor:
    """The log-distribution that is sampled from: float32, banned ids at -inf, no other cut."""
    # float32 even for bfloat16 logits: a sum of 152,000 exponentials needs it.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide.index_fill(-1, banned, -torch.inf) / temperature).log_softmax(-1)


def selected_log_probs(logits: Tensor, targets: Tensor, banned: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each target (M,) and entropy (M,) of the distribution that rollouts are sampled from.

    logits (M, vocabulary); banned: ids that are never sampled. The entropy carries no gradient.
    """
    # Sampling used the same temperature and banned ids. Otherwise the ratio of equation (5)
    # would not be 1 at the first update.
    logp = sampling_log_probs(logits, banned, temperature)
    # The entropy is only logged. The clamp turns 0 * -inf, of a banned id, into 0.
    with torch.no_grad():
        entropy = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)
    return logp.gather(-1, targets[..., None]).squeeze(-1), entropy


# --- The kernels -----------------------------------------------------------------------------------------------------

STRETCH = 48 if INTERPRETED else 8192  # columns of dL/dlogits that are held at once
COUNTS = ["M", "first"]  # they change from batch to batch: no kernel of their own for each that is divisible by 16


def launch(kernel: str, dtype: torch.dtype) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Tile (rows, columns, what a product sums over in one step), and warps, of a kernel. None spills a register on any
    card (kernels/RESULTS.md)."""
    if INTERPRETED:
        return (16, 16, 32), {}  # small, so that small tests have several tiles
    if dtype == torch.float32:
        return (64, 64, 32), dict(num_warps=8, num_stages=3)
    if kernel == "multiply":
        return (128, 128, 64), dict(num_warps=8, num_stages=3)
    return (64, 128, 64), dict(num_warps=4, num_stages=3)


@triton.jit
def logits_tile(
    h_ptr, w_ptr, ok_ptr, rows, cols, M, V, H, inverse_temperature,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Logits of a tile over the temperature, banned ids and those beyond the vocabulary at -inf."""
    # Offsets in 64 bits: V * H may be beyond 2**31.
    k = tl.arange(0, BLOCK_H)
    h_ptrs = h_ptr + rows.to(tl.int64)[:, None] * H + k[None, :]
    w_ptrs = w_ptr + cols.to(tl.int64)[None, :] * H + k[:, None]
    z = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, H, BLOCK_H):
        # Rows, columns and steps beyond the end are read as 0: they add nothing.
        h = tl.load(h_ptrs, mask=(rows < M)[:, None] & (start + k < H)[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(start + k < H)[:, None] & (cols < V)[None, :], other=0.0)
        # tf32x3 keeps the accuracy of float32 inputs on tensor cores; 16-bit inputs ignore it.
        z = tl.dot(h, w, z, input_precision="tf32x3")
        h_ptrs += BLOCK_H
        w_ptrs += BLOCK_H
    # The logit -inf makes the probability of a banned id exactly 0.
    ok = tl.load(ok_ptr + cols, mask=cols < V, other=0) != 0
    return tl.where(ok[None, :], z * inverse_temperature, -float("inf"))


@triton.jit(do_not_specialize=COUNTS)
def sum_stretches(
    h_ptr, w_ptr, ok_ptr, target_ptr, lse_ptr, mean_ptr, chosen_ptr, M, V, H, inverse_temperature, cols_each,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """For a block of rows and a stretch of the vocabulary: logsumexp, mean logit under the softmax, target's logit."""
    # Neighbouring programs take other rows of the same stretch: its part of the head is read
    # from memory once, then from the cache.
    pid_m, stretch = tl.program_id(0) % tl.cdiv(M, BLOCK_M), tl.program_id(0) // tl.cdiv(M, BLOCK_M)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(target_ptr + rows, mask=rows < M, other=-1).to(tl.int32)
    # Online softmax: whenever a larger logit turns up, the sums so far are scaled down to it.
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total, weighted = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    chosen = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(stretch * cols_each, min(V, (stretch + 1) * cols_each), BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z = logits_tile(h_ptr, w_ptr, ok_ptr, rows, cols, M, V, H, inverse_temperature, BLOCK_M, BLOCK_V, BLOCK_H)
        new_top = tl.maximum(top, tl.max(z, 1))
        # If all logits so far are -inf, nothing is subtracted: -inf - (-inf) would be NaN.
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp(z - shift[:, None])
        scale = tl.exp(top - shift)
        total = total * scale + tl.sum(p, 1)
        # The numerator of the mean logit, without the 0 * -inf of banned ids.
        weighted = weighted * scale + tl.sum(p * tl.where(p > 0, z, 0.0), 1)
        # The target is in one tile of one stretch; everywhere else this adds 0.
        chosen += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), 1)
        top = new_top
    # One entry for each row and stretch. They are combined outside, in a fixed order: no
    # atomics, so two runs give the same bits.
    out = stretch * M + rows
    shift = tl.where(top == -float("inf"), 0.0, top)
    tl.store(lse_ptr + out, shift + tl.log(total), mask=rows < M)  # -inf if all of the stretch is banned
    tl.store(mean_ptr + out, weighted / tl.maximum(total, 1e-30), mask=rows < M)
    tl.store(chosen_ptr + out, chosen, mask=rows < M)


@triton.jit(do_not_specialize=COUNTS)
def logits_gradient(
    h_ptr, w_ptr, ok_ptr, target_ptr, lse_ptr, up_ptr, dz_ptr, M, V, H, inverse_temperature, first, width,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dL/dlogits of columns first .. first + width: the upstream gradient times (1 at the target - softmax)."""
    pid_m, pid_v = tl.program_id(0) % tl.cdiv(M, BLOCK_M), tl.program_id(0) // tl.cdiv(M, BLOCK_M)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # at: columns of the stretch that is held; cols: the same in the whole vocabulary.
    at = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    cols = first + at
    z = logits_tile(h_ptr, w_ptr, ok_ptr, rows, cols, M, V, H, inverse_temperature, BLOCK_M, BLOCK_V, BLOCK_H)
    target = tl.load(target_ptr + rows, mask=rows < M, other=-1).to(tl.int32)
    lse = tl.load(lse_ptr + rows, mask=rows < M, other=0.0)
    # d log p(target) / dz_v = (1 if v is the target, else 0) - p_v, over the temperature.
    up = tl.load(up_ptr + rows, mask=rows < M, other=0.0) * inverse_temperature
    # A banned target has log-probability -inf, whatever the states are: no gradient.
    hit = (cols[None, :] == target[:, None]) & (z > -float("inf"))
    dz = up[:, None] * (tl.where(hit, 1.0, 0.0) - tl.exp(z - lse[:, None]))
    out = dz_ptr + rows.to(tl.int64)[:, None] * width + at[None, :]
    tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (at < width)[None, :])


@triton.jit(do_not_specialize=["M", "K"])
def multiply(
    a_ptr, b_ptr, out_ptr, M, N, K, stride_am, stride_ak, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (M, N) = A (M, K) @ B (K, N), summed in float32; ADD: added to what is in out, which is float32 then."""
    pid_m, pid_n = tl.program_id(0) % tl.cdiv(M, BLOCK_M), tl.program_id(0) // tl.cdiv(M, BLOCK_M)
    m, n = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # A is read by strides, so that the same kernel multiplies by a transpose.
    out = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    ok = (m < M)[:, None] & (n < N)[None, :]
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    a_ptrs = a_ptr + m.to(tl.int64)[:, None] * stride_am + k.to(tl.int64)[None, :] * stride_ak
    b_ptrs = b_ptr + k.to(tl.int64)[:, None] * N + n[None, :]
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs, mask=(m < M)[:, None] & (start + k < K)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(start + k < K)[:, None] & (n < N)[None, :], other=0.0)
        product = tl.dot(a, b, product, input_precision="tf32x3")
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * N
    # Each element belongs to one program, so the sum over stretches needs no atomics.
    if ADD:
        product += tl.load(out, mask=ok, other=0.0)
    tl.store(out, product.to(out_ptr.dtype.element_ty), mask=ok)


# --- Autograd --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("videoperceiver::log_probs", mutates_args=())
def log_probs_op(
    states: Tensor, weight: Tensor, targets: Tensor, sampled: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and logsumexp, each (M,). sampled (V,) uint8: 0 for banned ids."""
    (M, H), V = states.shape, len(weight)
    if M == 0:
        return tuple(states.new_empty(0, dtype=torch.float32) for _ in range(3))
    tile, options = launch("head", states.dtype)
    row_blocks, col_blocks = ceil_div(M, tile[0]), ceil_div(V, tile[1])
    # Few rows, many columns: the vocabulary is cut into enough stretches to fill the device
    # about four times, each of whole tiles.
    blocks_each = ceil_div(col_blocks, ceil_div(4 * num_programs(states.device), row_blocks))
    stretches = ceil_div(col_blocks, blocks_each)
    lse, mean, chosen = states.new_empty(3, stretches, M, dtype=torch.float32)
    sum_stretches[(row_blocks * stretches,)](
        states, weight, sampled, targets, lse, mean, chosen, M, V, H, 1 / temperature,
        blocks_each * tile[1], *tile, **options,
    )  # fmt: skip
    # logsumexp over stretches of their logsumexps; the entropy is lse minus the mean logit, whose
    # stretches are weighted by their share of the probability.
    total = lse.logsumexp(0)
    entropy = total - ((lse - total).exp() * mean).sum(0)
    return chosen.sum(0) - total, entropy, total


@log_probs_op.register_fake
def _(states, weight, targets, sampled, temperature):
    return tuple(states.new_empty(len(states), dtype=torch.float32) for _ in range(3))


@torch.library.custom_op("videoperceiver::log_probs_backward", mutates_args=())
def log_probs_backward_op(
    up: Tensor, states: Tensor, weight: Tensor, targets: Tensor, sampled: Tensor, lse: Tensor, temperature: float,
    for_states: bool, for_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients for states and head, empty where not asked for, a stretch of the vocabulary at a time."""
    (M, H), V = states.shape, len(weight)
    d_states = states.new_zeros(M if for_states else 0, H, dtype=torch.float32)
    d_weight = weight.new_empty(V if for_weight else 0, H)
    if M == 0:
        return d_states.to(states.dtype), d_weight.zero_()
    (tile, options), (product, more) = launch("head", states.dtype), launch("multiply", states.dtype)
    # Brought near 1, and back at the end: float16 would lose gradients that are divided by a batch's number of tokens.
    peak = up.abs().max().clamp(min=1e-30)
    up = up / peak
    # One stretch of dL/dlogits in the dtype of the states: all that is ever held of the logits.
    dz, scale = states.new_empty(M, min(V, STRETCH)), 1 / temperature
    for first in range(0, V, STRETCH):
        width = min(STRETCH, V - first)
        part = weight[first : first + width]
        logits_gradient[(ceil_div(M, tile[0]) * ceil_div(width, tile[1]),)](
            states, weight, sampled, targets, lse, up, dz, M, V, H, scale, first, width, *tile, **options
        )  # fmt: skip
        # dL/dstates = dz @ head, summed over stretches in float32.
        if for_states:
            grid = (ceil_div(M, product[0]) * ceil_div(H, product[1]),)
            multiply[grid](dz, part, d_states, M, H, width, width, 1, True, *product, **more)
        # dL/dhead = dz' @ states, for the rows of this stretch alone.
        if for_weight:
            grid = (ceil_div(width, product[0]) * ceil_div(H, product[1]),)
            out = d_weight[first : first + width]
            multiply[grid](dz, states, out, width, H, M, 1, width, False, *product, **more)
    return (d_states * peak).to(states.dtype), d_weight.mul_(peak)


@log_probs_backward_op.register_fake
def _(up, states, weight, targets, sampled, lse, temperature, for_states, for_weight):
    (M, H), V = states.shape, len(weight)
    return states.new_empty(M if for_states else 0, H), weight.new_empty(V if for_weight else 0, H)


def _setup(ctx, inputs, output):
    *tensors, ctx.temperature = inputs
    ctx.save_for_backward(*tensors, output[2])
    # Entropy and logsumexp get no gradient; without this, autograd would make zeros for them.
    ctx.set_materialize_grads(False)


def _backward(ctx, up, *_):
    needs = ctx.needs_input_grad
    if up is None:
        return (None,) * 5
    d_states, d_weight = log_probs_backward_op(up.contiguous(), *ctx.saved_tensors, ctx.temperature, needs[0], needs[1])
    # None for targets, banned ids and temperature.
    return d_states if needs[0] else None, d_weight if needs[1] else None, None, None, None


log_probs_op.register_autograd(_backward, setup_context=_setup)


# --- The public functions --------------------------------------------------------------------------------------------


def log_probs_from_states(
    states: Tensor, weight: Tensor, targets: Tensor, banned: Tensor, temperature: float = 1.0,
    use_kernel: bool | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probability (M,) of each target and entropy (M,) under the head, float32: `selected_log_probs` of the logits.

    states (M, H), weight (V, H), targets (M,); banned: ids of probability 0. Gradients go to the states and,
    if it wants one, to the head; none through the entropy. use_kernel: None takes the kernel on a GPU; see
    `takes_kernel`.

    >>> states, head = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [2.0, 1.0], [9.0, 9.0]])
    >>> logp, entropy = log_probs_from_states(states, head, torch.tensor([0]), banned=torch.tensor([2]))
    >>> round(logp.exp().item(), 2), round(entropy.item(), 2)
    (0.5, 0.69)
    """
    if not takes_kernel(use_kernel, states, weight, name="log-probs"):
        return selected_log_probs(F.linear(states, weight), targets, banned, temperature)
    if torch.is_autocast_enabled(states.device.type):  # as F.linear would: an operator of our own is not told of it
        dtype = torch.get_autocast_dtype(states.device.type)
        states, weight = states.to(dtype), weight.to(dtype)
    # A mask over the vocabulary: the kernel asks of every column whether it may be sampled.
    sampled = torch.ones(len(weight), dtype=torch.uint8, device=weight.device).index_fill(0, banned, 0)
    states, weight = states.contiguous(), weight.to(states.dtype).contiguous()
    # Rows next to each other in memory: the kernels compute addresses from M, H and V alone.
    logp, entropy, _ = log_probs_op(states, weight, targets.contiguous(), sampled, float(temperature))
    return logp, entropy.detach()


def cross_entropy_from_states(states: Tensor, weight: Tensor, targets: Tensor, use_kernel: bool | None = None) -> Tensor:
    """Cross-entropy of the targets, summed: minus the sum of their log-probabilities, nothing banned."""
    if not takes_kernel(use_kernel, states, weight, name="log-probs"):
        return F.cross_entropy(F.linear(states, weight).float(), targets, reduction="sum")
    return -log_probs_from_states(states, weight, targets, targets[:0], 1.0, use_kernel)[0].sum()
