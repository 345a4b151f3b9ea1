"""The contrastive loss of full against twin, equation (1), fused. `vp.contrastive_loss` has it to read.

N key-slot tokens, each with a state of width D in the full video and in its twin, meet K keywords. The
similarity matrix is no hog, since K is far below D; the float32 normalised copies of the states are. So the
states are read as they are and the norms are taken on the way. Their backward is free: with s_ij = <x_i, k_j>
r_i q_j / tau (r, q: inverse norms) and g_ij = dL/ds_ij, which is softmax minus softmax,

    dx_i = r_i (sum_j g_ij k_j q_j / tau - c_i x_i r_i),  c_i = sum_j g_ij s_ij,     dtau = - sum_i c_i / tau

and likewise for keywords. Nothing is added up atomically: two runs give the same bits.

Traffic of the plain version, forward, for n = 2N states in bf16: reads them (2nD bytes), writes and reads the
float32 copy (8nD), squares it for the norm (reads 4nD), writes the normalised copy (4nD, and 4nD to read it),
multiplies (4nD): about 26 nD bytes where 2nD would do, plus 30 nK for similarities and masks. The backward
keeps both copies and makes two more. The kernels read the states once forward and twice backward, write their
gradient once, and spend 12 nK on similarities and g.

In training the heads stand before this (`vp.ContrastiveHeads`): they make the wide copy themselves, in float32, and what
comes here is D = 256 wide. With 16,384 key tokens in full and twin a float32 copy is 34 MB there, of which the plain
version makes three: the kernels save some 100 MB and a dozen launches, not the gigabytes that they save on wide states.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import INTERPRETED, ceil_div, num_programs, tl, triton


def ids_shown(clip: Tensor, slot: Tensor, keyword_clip: Tensor, keyword_id: Tensor, keyword_slots: Tensor) -> Tensor:
    """The field `shown` of `vp.KeyTokens`, (N, M): so small that a kernel can tell a negative without an (N, K) mask."""
    # (clip, slot) pairs that occur, and the pair of each token.
    places, place = torch.unique(torch.stack([clip, slot], 1), dim=0, return_inverse=True)  # tokens of a slot are alike
    # A pair shows the ids of those keywords of its clip that have the slot as a key slot.
    shows = (places[:, :1] == keyword_clip) & keyword_slots.T[places[:, 1]]  # (places, K)
    # Ids to the front, -1 behind them; cut to the most that any pair shows, at least one column.
    ids = torch.where(shows, keyword_id, -1).sort(1, descending=True).values
    most = int(shows.sum(1).max()) if shows.numel() else 0
    return F.pad(ids, (0, 1), value=-1)[:, : max(1, most)][place]


# --- The kernels -----------------------------------------------------------------------------------------------------
# Rows 0..N-1 are the full video's states, rows N..2N-1 the twin's. A block of rows is in one of the two.

EPS = 1e-12  # as in F.normalize
# Counts change from batch to batch: a kernel for each that happens to be divisible by 16 would be compiled, for seconds.
COUNTS = ["N", "K", "S", "M", "num_blocks", "rows_each", "splits"]


def launch(kernel: str, dtype: torch.dtype, num_keywords: int) -> dict[str, int]:
    """Tile and warps of a kernel: rows, keywords and width. A batch has 1 to 12 keywords, a benchmark hundreds.

    With few keywords, in float32, as in training, none of these spills a register on an RTX 3090 (kernels/RESULTS.md).
    """
    if INTERPRETED:  # small, so that small tests have several tiles
        tile = {"similarity": (16, 16, 32), "coefficients": (16, 16, 0), "states": (16, 32, 16), "keywords": (32, 16, 16)}
        return dict(zip(("BLOCK_N", "BLOCK_K", "BLOCK_D"), tile[kernel]))
    few, wide = num_keywords <= 16, dtype == torch.float32
    rows, keywords, width, warps = {
        "similarity": (64, 16, 32, 4) if few else (64, 64, 32, 8),
        "coefficients": (64, 32, 0, 4),
        "states": (64, 32, 64, 8) if wide else (128, 64, 128, 8),
        "keywords": (32, 16, 64, 4) if few or wide else (64, 128, 128, 8),
    }[kernel]
    return dict(BLOCK_N=rows, BLOCK_K=keywords, BLOCK_D=width, num_warps=warps, num_stages=3)


@triton.jit
def normalise_keywords(k_ptr, unit_ptr, norm_ptr, D, EPS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keyword j: q_j and k_j q_j. One program a keyword."""
    j = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    k = tl.load(k_ptr + j * D + d, mask=d < D, other=0.0).to(tl.float32)
    # A whole row is in registers: D is a few thousand at most.
    q = 1 / tl.maximum(tl.sqrt(tl.sum(k * k)), EPS)
    tl.store(unit_ptr + j * D + d, (k * q).to(unit_ptr.dtype.element_ty), mask=d < D)
    tl.store(norm_ptr + j, q)


@triton.jit
def mark(rows, cols, is_twin, clip_ptr, slot_ptr, shown_ptr, kclip_ptr, kid_ptr, kslots_ptr, N, K, S, M):
    """Which of a tile's tokens are positives of which keywords, and which are in the softmax at all."""
    # Rows and keywords beyond the end get ids that match nothing: -1, and -2.
    clip = tl.load(clip_ptr + rows, mask=rows < N, other=-1).to(tl.int32)
    slot = tl.load(slot_ptr + rows, mask=rows < N, other=0).to(tl.int32)
    kclip = tl.load(kclip_ptr + cols, mask=cols < K, other=-2).to(tl.int32)
    # Integers of 32 bits, so that comparing takes half the registers.
    kid = tl.load(kid_ptr + cols, mask=cols < K, other=-2).to(tl.int32)
    # Positives P_j: the token is of the keyword's clip, in one of its key slots.
    own = clip[:, None] == kclip[None, :]
    # A table lookup (K, S), read for tokens of the keyword's own clip only.
    in_key_slots = tl.load(kslots_ptr + cols[None, :] * S + slot[:, None], mask=own, other=0) != 0
    same = own
    # Negatives of other clips: tokens that show no keyword of the same words.
    for m in range(M):
        shown = tl.load(shown_ptr + rows * M + m, mask=rows < N, other=-1).to(tl.int32)
        same = same | (shown[:, None] == kid[None, :])
    negative = (same == 0) & (rows < N)[:, None] & (cols < K)[None, :]
    shows = own & in_key_slots
    # In the twin the places of P_j are negatives, and other clips do not count.
    return shows & (is_twin == 0), shows | (negative & (is_twin == 0))


@triton.jit(do_not_specialize=COUNTS)
def similarity_tile(
    full_ptr, twin_ptr, k_ptr, q_ptr, tau_ptr, clip_ptr, slot_ptr, shown_ptr, kclip_ptr, kid_ptr, kslots_ptr,
    s_ptr, r_ptr, part_ptr, N, K, D, S, M, num_blocks, EPS: tl.constexpr, STORE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """s of a tile, and over its rows for each keyword: (largest, sum of exponentials, count) of softmax and positives."""
    pid_k, pid_n = tl.program_id(0) % tl.cdiv(K, BLOCK_K), tl.program_id(0) // tl.cdiv(K, BLOCK_K)
    # The first half of the row blocks is the full video, the second its twin.
    half = tl.cdiv(N, BLOCK_N)
    # No branch: full and twin differ in the address that is read.
    is_twin = (pid_n >= half).to(tl.int32)
    x_ptr = tl.where(is_twin == 1, twin_ptr, full_ptr)
    rows = (pid_n - is_twin * half) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * D + d[None, :]
    k_ptrs = k_ptr + cols.to(tl.int64)[None, :] * D + d[:, None]
    # One pass over D gives both the products and the norms: no normalised copy is written.
    product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        # Beyond the end zeros are read: they change neither product nor norm.
        x = tl.load(x_ptrs, mask=(rows < N)[:, None] & (start + d < D)[None, :], other=0.0)
        k = tl.load(k_ptrs, mask=(start + d < D)[:, None] & (cols < K)[None, :], other=0.0)
        # tf32x3 keeps the accuracy of float32 inputs on tensor cores; 16-bit inputs ignore it.
        product = tl.dot(x, k, product, input_precision="tf32x3")
        x = x.to(tl.float32)
        squares += x * x
        x_ptrs += BLOCK_D
        k_ptrs += BLOCK_D
    # r_i = 1 / |x_i|, no larger than 1 / EPS, as in F.normalize.
    r = 1 / tl.maximum(tl.sqrt(tl.sum(squares, 1)), EPS)
    q = tl.load(q_ptr + cols, mask=cols < K, other=0.0)
    # s_ij = <x_i, k_j> r_i q_j / tau, as in equation (1).
    s = product * r[:, None] * (q[None, :] / tl.load(tau_ptr).to(tl.float32))
    at = (is_twin * N + rows).to(tl.int64)
    # Only the backward pass needs s: without gradient the (2N, K) matrix is never written.
    if STORE:
        tl.store(s_ptr + at[:, None] * K + cols[None, :], s, mask=(rows < N)[:, None] & (cols < K)[None, :])
        tl.store(r_ptr + at, r, mask=(rows < N) & (pid_k == 0))
    positive, allowed = mark(rows, cols, is_twin, clip_ptr, slot_ptr, shown_ptr, kclip_ptr, kid_ptr, kslots_ptr, N, K, S, M)
    # Six numbers a keyword and block of rows; combine_parts puts them together.
    part_ptrs = part_ptr + pid_n * K + cols
    for which in tl.static_range(2):
        # which 0: the softmax over P_j and N_j; 1: that over P_j. A column without any token keeps
        # -inf, from which 0 is subtracted, not -inf.
        among = allowed if which == 0 else positive
        top = tl.max(tl.where(among, s, -float("inf")), 0)
        total = tl.sum(tl.where(among, tl.exp(s - tl.where(top == -float("inf"), 0.0, top)[None, :]), 0.0), 0)
        tl.store(part_ptrs + (3 * which) * num_blocks * K, top, mask=cols < K)
        tl.store(part_ptrs + (3 * which + 1) * num_blocks * K, total, mask=cols < K)
        tl.store(part_ptrs + (3 * which + 2) * num_blocks * K, tl.sum(among.to(tl.float32), 0), mask=cols < K)


@triton.jit(do_not_specialize=COUNTS)
def combine_parts(part_ptr, lse_ptr, sums_ptr, K, num_blocks, BLOCK_B: tl.constexpr):
    """Both logsumexps of keyword j from the parts of all blocks, its loss and its counts. One program a keyword."""
    j = tl.program_id(0)
    b = tl.arange(0, BLOCK_B)
    for which in tl.static_range(2):
        base = part_ptr + 3 * which * num_blocks * K + j
        top = tl.full((BLOCK_B,), -float("inf"), tl.float32)
        total, count = tl.zeros((BLOCK_B,), tl.float32), tl.zeros((BLOCK_B,), tl.float32)
        for start in range(0, num_blocks, BLOCK_B):
            at = base + (start + b) * K
            # Lanes beyond the last block read -inf, which adds nothing.
            ok = start + b < num_blocks
            # Online softmax again, over blocks of rows; each lane combines every BLOCK_B-th block.
            new_top = tl.load(at, mask=ok, other=-float("inf"))
            both = tl.maximum(top, new_top)
            safe = tl.where(both == -float("inf"), 0.0, both)
            more = tl.load(at + num_blocks * K, mask=ok, other=0.0)
            total = total * tl.exp(top - safe) + more * tl.exp(new_top - safe)
            count += tl.load(at + 2 * num_blocks * K, mask=ok, other=0.0)
            top = both
        # Then the lanes are combined.
        peak = tl.max(top)
        shift = tl.where(peak == -float("inf"), 0.0, peak)
        lse = shift + tl.log(tl.sum(total * tl.exp(top - shift)))  # -inf if there is none
        tl.store(lse_ptr + which * K + j, lse)
        tl.store(sums_ptr + (1 + which) * K + j, tl.sum(count))
        # Equation (1): logsumexp over all minus logsumexp over positives; 0 without a positive.
        if which == 0:
            lse_all = lse
        else:
            tl.store(sums_ptr + j, tl.where(lse == -float("inf"), 0.0, lse_all - lse))


@triton.jit(do_not_specialize=COUNTS)
def coefficients(
    s_ptr, lse_ptr, clip_ptr, slot_ptr, shown_ptr, kclip_ptr, kid_ptr, kslots_ptr, g_ptr, c_ptr, e_ptr, N, K, S, M,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """g = dL/ds of a block of rows; c_i, the sum over keywords of g s; and the part of e_j, the sum over these rows."""
    pid = tl.program_id(0)
    half = tl.cdiv(N, BLOCK_N)
    is_twin = (pid >= half).to(tl.int32)
    rows = (pid - is_twin * half) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = (is_twin * N + rows).to(tl.int64)
    # Rows stay, keywords pass by: c_i is a sum over keywords, finished in registers.
    c = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        ok = (rows < N)[:, None] & (cols < K)[None, :]
        s = tl.load(s_ptr + at[:, None] * K + cols[None, :], mask=ok, other=0.0)
        positive, allowed = mark(
            rows, cols, is_twin, clip_ptr, slot_ptr, shown_ptr, kclip_ptr, kid_ptr, kslots_ptr, N, K, S, M
        )
        # The softmaxes are made again from s and the logsumexps: no matrix of them was kept.
        lse_all = tl.load(lse_ptr + cols, mask=cols < K, other=0.0)
        lse_pos = tl.load(lse_ptr + K + cols, mask=cols < K, other=-float("inf"))
        valid = (lse_pos > -float("inf"))[None, :]  # a keyword without positive: no gradient
        # dL/ds: softmax over all minus softmax over positives.
        g = tl.where(valid & allowed, tl.exp(s - lse_all[None, :]), 0.0)
        g -= tl.where(valid & positive, tl.exp(s - lse_pos[None, :]), 0.0)
        # g in the dtype of the states, since it goes into tensor-core products.
        tl.store(g_ptr + at[:, None] * K + cols[None, :], g.to(g_ptr.dtype.element_ty), mask=ok)
        # e_j is a sum over rows, which are spread over programs: their parts are added outside.
        c += tl.sum(g * s, 1)
        tl.store(e_ptr + pid * K + cols, tl.sum(g * s, 0), mask=cols < K)
    tl.store(c_ptr + at, c, mask=rows < N)


@triton.jit(do_not_specialize=COUNTS)
def states_gradient(
    full_ptr, twin_ptr, dfull_ptr, dtwin_ptr, g_ptr, unit_ptr, r_ptr, c_ptr, tau_ptr, up_ptr, N, K, D,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx of a tile: the product of g with the unit keywords, then the norm's backward while it is still in registers."""
    pid_d, pid_n = tl.program_id(0) % tl.cdiv(D, BLOCK_D), tl.program_id(0) // tl.cdiv(D, BLOCK_D)
    half = tl.cdiv(N, BLOCK_N)
    is_twin = (pid_n >= half).to(tl.int32)
    # This program has a tile of rows and of D, and walks over the keywords.
    x_ptr, dx_ptr = tl.where(is_twin == 1, twin_ptr, full_ptr), tl.where(is_twin == 1, dtwin_ptr, dfull_ptr)
    rows = (pid_n - is_twin * half) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = (is_twin * N + rows).to(tl.int64)
    d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    cols = tl.arange(0, BLOCK_K)
    product = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, K, BLOCK_K):
        j = start + cols
        g = tl.load(g_ptr + at[:, None] * K + j[None, :], mask=(rows < N)[:, None] & (j < K)[None, :], other=0.0)
        k = tl.load(
            unit_ptr + j.to(tl.int64)[:, None] * D + d[None, :], mask=(j < K)[:, None] & (d < D)[None, :], other=0.0
        )
        product = tl.dot(g, k, product, input_precision="tf32x3")
    r = tl.load(r_ptr + at, mask=rows < N, other=0.0)
    c = tl.load(c_ptr + at, mask=rows < N, other=0.0)
    ok = (rows < N)[:, None] & (d < D)[None, :]
    offset = rows.to(tl.int64)[:, None] * D + d[None, :]
    x = tl.load(x_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    # The state itself is read again: only its inverse norm was kept.
    up, tau = tl.load(up_ptr).to(tl.float32), tl.load(tau_ptr).to(tl.float32)
    # The backward of x / |x|: the part of the gradient along x is taken out. up: dL/dloss.
    dx = (product / tau - (c * r)[:, None] * x) * (r * up)[:, None]
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=COUNTS)
def keywords_product(
    full_ptr, twin_ptr, g_ptr, r_ptr, out_ptr, N, K, D, rows_each, HAS_TWIN: tl.constexpr, LARGEST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Part of sum_i g_ij x_i r_i over rows_each rows of both halves; the parts of all splits are added in order later."""
    # Few keywords, many rows: the sum over rows is cut into splits to fill the device.
    split = tl.program_id(2)
    j = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    product = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    # The rows of the full video, then the same of the twin.
    for which in tl.static_range(2 if HAS_TWIN else 1):
        x_ptr = full_ptr if which == 0 else twin_ptr
        for start in range(split * rows_each, min(N, (split + 1) * rows_each), BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            at = (which * N + rows).to(tl.int64)
            g = tl.load(g_ptr + at[None, :] * K + j[:, None], mask=(j < K)[:, None] & (rows < N)[None, :], other=0.0)
            r = tl.load(r_ptr + at, mask=rows < N, other=0.0)
            r = tl.minimum(r, LARGEST)  # a float16 state of zeros must not make infinity of its (unused) inverse norm
            x_at = rows.to(tl.int64)[:, None] * D + d[None, :]
            x = tl.load(x_ptr + x_at, mask=(rows < N)[:, None] & (d < D)[None, :], other=0.0)
            product = tl.dot((g * r[None, :]).to(x.dtype), x, product, input_precision="tf32x3")
    # Each split writes its own sum; adding them atomically would not give the same bits twice.
    out = out_ptr + (split * K + j).to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out, product, mask=(j < K)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def keywords_gradient(part_ptr, unit_ptr, q_ptr, e_ptr, tau_ptr, up_ptr, dk_ptr, K, D, splits, BLOCK_D: tl.constexpr):
    """dk_j = q_j (sum over splits / tau - e_j k_j q_j). One program a keyword."""
    j = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    # In order, so that two runs give the same bits.
    for split in range(splits):
        total += tl.load(part_ptr + (split * K + j) * D + d, mask=d < D, other=0.0)
    unit = tl.load(unit_ptr + j * D + d, mask=d < D, other=0.0).to(tl.float32)
    # The backward of k / |k|, as for the states.
    scale = tl.load(q_ptr + j) * tl.load(up_ptr).to(tl.float32)
    dk = scale * (total / tl.load(tau_ptr).to(tl.float32) - tl.load(e_ptr + j) * unit)
    tl.store(dk_ptr + j * D + d, dk.to(dk_ptr.dtype.element_ty), mask=d < D)


# --- Autograd --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("videoperceiver::contrastive", mutates_args=())
def contrastive_op(
    full: Tensor, twin: Tensor | None, keywords: Tensor, temperature: Tensor, clip: Tensor, slot: Tensor, shown: Tensor,
    keyword_clip: Tensor, keyword_id: Tensor, keyword_slots: Tensor, with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Sums (3,): loss, tokens in all softmaxes, positives. And what the backward needs: g, c, e, r, unit keywords, q.

    The loss is a sum, so that its gradient g is known up to a factor as soon as the logsumexps are: it is
    made at once, and the float32 similarities are gone when this returns.
    """
    (N, D), K, halves = full.shape, len(keywords), 1 if twin is None else 2
    where = dict(dtype=torch.float32, device=full.device)
    tiles = launch("similarity", full.dtype, K)
    # Blocks of rows of the full video, then those of its twin.
    num_blocks = ceil_div(N, tiles["BLOCK_N"]) * halves
    # What the backward needs, made here: see the docstring.
    saved = allocate(full, halves, keywords, with_gradient)
    g, c, e, r, unit, q = saved
    sums, lse = torch.zeros(3, K, **where), torch.empty(2, K, **where)
    if N == 0 or K == 0:
        return sums.sum(1), g, c, e.zero_(), r, unit, q
    # Without gradient s is never written; any tensor will do for its place.
    s = torch.empty(halves * N, K, **where) if with_gradient else sums
    # Largest, sum and count of each keyword and block, for both softmaxes.
    parts = torch.empty(6, num_blocks, K, **where)
    # One program a keyword, with its whole row in registers.
    wide = triton.next_power_of_2(D)
    normalise_keywords[(K,)](keywords, unit, q, D, EPS, wide)
    asks = (clip, slot, shown, keyword_clip, keyword_id, keyword_slots.view(torch.uint8))
    S, M = keyword_slots.shape[1], shown.shape[1]
    grid = (num_blocks * ceil_div(K, tiles["BLOCK_K"]),)
    similarity_tile[grid](
        full, full if twin is None else twin, keywords, q, temperature, *asks, s, r, parts, N, K, D, S, M, num_blocks,
        EPS, with_gradient, **tiles,
    )  # fmt: skip
    # The logsumexps of all keywords, and with them the loss.
    combine_parts[(K,)](parts, lse, sums, K, num_blocks, 4 if INTERPRETED else 128)
    if with_gradient:
        e_parts = torch.empty(num_blocks, K, **where)
        tiles = launch("coefficients", full.dtype, K)
        del tiles["BLOCK_D"]
        coefficients[(num_blocks,)](s, lse, *asks, g, c, e_parts, N, K, S, M, **tiles)
        # e_j = sum over rows of g s: a keyword's part of the norm's backward, and of dtau.
        torch.sum(e_parts, 0, out=e)
    return sums.sum(1), *saved


def allocate(full: Tensor, halves: int, keywords: Tensor, with_gradient: bool) -> tuple[Tensor, ...]:
    """Room for g (2N, K), c (2N,), e (K,), r (2N,), unit keywords (K, D) and q (K,)."""
    (N, _), K = full.shape, len(keywords)
    # Without gradient, all but the keywords' own parts are empty.
    n = halves * N if with_gradient else 0
    shapes = ((n, K), (n,), (K if with_gradient else 0,), (n,), keywords.shape, (K,))
    types = (full.dtype, torch.float32, torch.float32, torch.float32, full.dtype, torch.float32)
    return tuple(full.new_empty(shape, dtype=t) for shape, t in zip(shapes, types))


@contrastive_op.register_fake
def _(full, twin, keywords, temperature, clip, slot, shown, keyword_clip, keyword_id, keyword_slots, with_gradient):
    saved = allocate(full, 1 if twin is None else 2, keywords, with_gradient)
    return full.new_empty(3, dtype=torch.float32), *saved


@torch.library.custom_op("videoperceiver::contrastive_backward", mutates_args=())
def contrastive_backward_op(
    up: Tensor, full: Tensor, twin: Tensor | None, temperature: Tensor, g: Tensor, c: Tensor, e: Tensor, r: Tensor,
    unit: Tensor, q: Tensor, for_states: bool, for_keywords: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients for full, twin, keywords and temperature; empty where not asked for."""
    (N, D), K = full.shape, len(unit)
    d_full, d_twin, d_keywords, d_tau = allocate_gradients(full, twin, unit, temperature, for_states, for_keywords)
    if N == 0 or K == 0:
        return d_full.zero_(), d_twin.zero_(), d_keywords.zero_(), d_tau.zero_()
    halves = 1 if twin is None else 2
    # A kernel needs an address even for a twin that is not there; it is never read.
    other = full if twin is None else twin
    if for_states:  # the sum runs over keywords
        tiles = launch("states", full.dtype, K)
        grid = (halves * ceil_div(N, tiles["BLOCK_N"]) * ceil_div(D, tiles["BLOCK_D"]),)
        d_other = d_full if twin is None else d_twin
        states_gradient[grid](
            full, other, d_full, d_other, g, unit, r, c, temperature, up, N, K, D, **tiles
        )  # fmt: skip
    if for_keywords:  # the sum runs over rows, cut into enough splits to fill the device, each of whole blocks
        tiles = launch("keywords", full.dtype, K)
        step, num_tiles = tiles["BLOCK_N"], (ceil_div(K, tiles["BLOCK_K"]), ceil_div(D, tiles["BLOCK_D"]))
        blocks = ceil_div(N, step)
        blocks_each = ceil_div(blocks, ceil_div(num_programs(full.device), num_tiles[0] * num_tiles[1]))
        splits = ceil_div(blocks, blocks_each)
        parts = full.new_empty(splits, K, D, dtype=torch.float32)
        # An inverse norm of 1e12 is no float16 number.
        largest = 6e4 if full.dtype == torch.float16 else 1 / EPS
        keywords_product[(*num_tiles, splits)](
            full, other, g, r, parts, N, K, D, blocks_each * step, halves == 2, largest, **tiles
        )  # fmt: skip
        keywords_gradient[(K,)](parts, unit, q, e, temperature, up, d_keywords, K, D, splits, triton.next_power_of_2(D))
    # dL/dtau = - sum of g s / tau, for s is inversely proportional to tau.
    d_tau.copy_(-up * e.sum() / temperature)
    return d_full, d_twin, d_keywords, d_tau


def allocate_gradients(
    full: Tensor, twin: Tensor | None, unit: Tensor, temperature: Tensor, for_states: bool, for_keywords: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients."""
    n, (K, D) = len(full) if for_states else 0, unit.shape
    return (
        full.new_empty(n, D),
        full.new_empty(0 if twin is None else n, D),
        unit.new_empty(K if for_keywords else 0, D),
        temperature.new_empty(temperature.shape),
    )


@contrastive_backward_op.register_fake
def _(up, full, twin, temperature, g, c, e, r, unit, q, for_states, for_keywords):
    return allocate_gradients(full, twin, unit, temperature, for_states, for_keywords)


def _setup(ctx, inputs, output):
    full, twin, _, temperature, *_ = inputs
    ctx.save_for_backward(full, twin, temperature, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, up, *_):
    if up is None:
        return (None,) * 11
    full, twin, temperature, *saved = ctx.saved_tensors
    needs = ctx.needs_input_grad
    d_full, d_twin, d_keywords, d_tau = contrastive_backward_op(
        up[0].contiguous(), full, twin, temperature, *saved, needs[0] or needs[1], needs[2]
    )
    # None for what wants no gradient, and for the seven arguments that are indices.
    wanted = (d_full, None if twin is None else d_twin, d_keywords, d_tau)
    return (*(x if need else None for x, need in zip(wanted, needs)), *[None] * 7)


contrastive_op.register_autograd(_backward, setup_context=_setup)


# --- The public function ---------------------------------------------------------------------------------------------


def fused_contrastive(
    full: Tensor, twin: Tensor | None, keywords: Tensor, temperature: Tensor, tokens
) -> tuple[Tensor, dict[str, Tensor]]:
    """`vp.contrastive_loss` on a GPU: the same sum and counts. tokens: `vp.KeyTokens`."""
    # The collator makes `shown` beforehand, on the CPU; a caller without one pays for it here.
    shown = tokens.shown
    if shown is None:
        shown = ids_shown(tokens.clip, tokens.slot, tokens.keyword_clip, tokens.keyword_id, tokens.keyword_slots)
    inputs = [full, twin, keywords.to(full.dtype), torch.as_tensor(temperature, device=full.device)]
    # An operator is not told by autograd whether its gradient will be asked for.
    with_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    inputs = [x if x is None else x.contiguous() for x in inputs]
    asks = (tokens.clip, tokens.slot, shown, tokens.keyword_clip, tokens.keyword_id, tokens.keyword_slots)
    sums, *_ = contrastive_op(*inputs, *(x.contiguous() for x in asks), with_gradient)
    counts = sums.detach().long()
    return sums[0], {"positives": counts[2], "negatives": counts[1] - counts[2]}
