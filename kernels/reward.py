"""The reward of paired rollouts, equations (2) to (4), fused: two Triton kernels. `vp.paired_rewards` has it to read.

A prompt has G descriptions of the full video and G' of its twin, a reference caption and keywords, all of
different length, as token embeddings of width D. Precision asks for each token of a rollout how near the
nearest word of the reference is, recall and keyword coverage ask the reverse: the maximum of one similarity
matrix along its rows and along its columns. A library's kernel takes one direction a launch, and so reads
everything twice; here one tile of the matrix serves both, and no matrix is stored. There is no gradient.

Traffic of the plain version, for R rollouts of L tokens and C reference and keyword tokens in bf16: pads
(2RLD read, 2RLD written), makes float32 (4RLD), normalises (12RLD), multiplies (4RLD for the reference and
for each keyword), and writes and reads the similarities twice (16RLC). The kernels read 2RLD once, and the C
words of a prompt once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import INTERPRETED, ceil_div, tl, triton

REWARDS = ("similarity", "recall", "relative", "pooled")


# --- A batch of prompts, packed --------------------------------------------------------------------------------------


@dataclass
class PackedTexts:
    """A batch of `vp.Texts` without padding, for the kernels.

    tokens (sum L, D), token_weights (sum L,), first_token (R + 1,): of all rollouts. words (sum C, D): each
    prompt's reference, then its keywords; first_word (P + 1,); num_reference (P,). word_weights (sum C,):
    what a keyword's token counts in the coverage. reference_weights (sum over rollouts of T,), first_weight
    (R,). prompt (R,): whose a rollout is; first_rollout (P + 1,); groups (P, 2): G and G'. longest (3,): the
    most tokens of a rollout, words and rollouts.
    """

    tokens: Tensor
    token_weights: Tensor
    first_token: Tensor
    words: Tensor
    first_word: Tensor
    num_reference: Tensor
    word_weights: Tensor
    reference_weights: Tensor
    first_weight: Tensor
    prompt: Tensor
    first_rollout: Tensor
    groups: Tensor
    longest: tuple[int, int, int]


def pack_texts(batch: Sequence) -> PackedTexts:
    """Lay a batch of `vp.Texts` out end to end; lengths are known on the host, so that nothing waits for the device."""
    device = batch[0].reference.device

    def send(x: Tensor) -> Tensor:
        return (x.pin_memory() if device.type == "cuda" and not x.is_cuda else x).to(device, non_blocking=True)

    def starts(lengths: Sequence[int]) -> Tensor:
        return send(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32))

    def integers(values: Sequence) -> Tensor:
        return send(torch.tensor(values, dtype=torch.int32))

    # All rollouts end to end, prompt by prompt; keywords of no token are left out.
    rollouts = [y for p in batch for y in p.rollouts]
    keywords = [[k for k in p.keywords if len(k)] for p in batch]
    # c is a mean over keywords of means over their tokens: each token counts 1 / (K W_k).
    counts = [[1 / (len(ks) * len(k)) for k in ks for _ in k] for ks in keywords]
    num_words = [len(p.reference) + len(c) for p, c in zip(batch, counts)]
    per_rollout = [len(p.reference) for p in batch for _ in p.rollouts]
    return PackedTexts(
        tokens=torch.cat(rollouts),
        token_weights=send(torch.cat([w for p in batch for w in p.weights]).float()),
        first_token=starts([len(y) for y in rollouts]),
        words=torch.cat([x for p, ks in zip(batch, keywords) for x in (p.reference, *ks)]),
        first_word=starts(num_words),
        num_reference=integers([len(p.reference) for p in batch]),
        word_weights=send(torch.tensor([x for p, c in zip(batch, counts) for x in [0.0] * len(p.reference) + c])),
        reference_weights=send(torch.cat([p.reference_weights.flatten() for p in batch]).float()),
        first_weight=starts(per_rollout),
        prompt=integers([b for b, p in enumerate(batch) for _ in p.rollouts]),
        first_rollout=starts([len(p.rollouts) for p in batch]),
        groups=integers([[p.num_full, p.num_twin] for p in batch]),
        longest=(max(map(len, rollouts)), max(num_words), max(len(p.rollouts) for p in batch)),
    )


# --- The kernels -----------------------------------------------------------------------------------------------------


# They change from batch to batch: no kernel of their own for each that is divisible by 16.
COUNTS = ["num_tokens", "num_rollouts", "num_blocks", "longest"]
# No tile spills a register on any card (kernels/RESULTS.md). Of reward_group:
GROUP = dict(BLOCK_L=16, num_warps=8)


def launch(dtype: torch.dtype) -> dict[str, int]:
    """Tile of match_words: rollout tokens, words, and the part of the width that a product sums over in one step."""
    if INTERPRETED:
        return dict(BLOCK_L=16, BLOCK_C=16, BLOCK_D=32)  # small, so that small tests have several tiles
    return dict(BLOCK_L=64, BLOCK_C=32, BLOCK_D=32, num_warps=4, num_stages=3)


@triton.jit(do_not_specialize=COUNTS)
def match_words(
    y_ptr, first_token_ptr, x_ptr, first_word_ptr, num_reference_ptr, word_weight_ptr, reference_weight_ptr,
    first_weight_ptr, prompt_ptr, row_ptr, part_ptr, num_tokens, num_rollouts, D,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One rollout against a block of its prompt's words: both maxima of each tile.

    row: for each token the largest similarity to a reference word of this block; part: this block's share of
    recall and of keyword coverage, which are sums over words.
    """
    # One program: one rollout, one block of its prompt's words.
    i, block = tl.program_id(0), tl.program_id(1)
    p = tl.load(prompt_ptr + i)
    begin, end = tl.load(first_token_ptr + i), tl.load(first_token_ptr + i + 1)
    # Everything is packed end to end: a pair of offsets says where a text begins and ends.
    first, last = tl.load(first_word_ptr + p), tl.load(first_word_ptr + p + 1)
    num_reference = tl.load(num_reference_ptr + p)
    # Words: first the reference, then the keywords.
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_reference, is_word = c < num_reference, first + c < last
    d = tl.arange(0, BLOCK_D)
    # Words as columns: x is read transposed, so that the tile is y @ x.
    x_at = (first + c).to(tl.int64)[None, :] * D + d[:, None]
    best = tl.zeros((BLOCK_C,), tl.float32)  # similarities below 0 count as 0
    # The tokens of the rollout, a block at a time; the words stay.
    for start in range(begin, end, BLOCK_L):
        rows = start + tl.arange(0, BLOCK_L)
        y_at = rows.to(tl.int64)[:, None] * D + d[None, :]
        s = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
        # Norms on the way, as in the contrastive kernel: embeddings are read once, as they are.
        y_square, x_square = tl.zeros((BLOCK_L, BLOCK_D), tl.float32), tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
        for k in range(0, D, BLOCK_D):
            y = tl.load(y_ptr + y_at + k, mask=(rows < end)[:, None] & (k + d < D)[None, :], other=0.0)
            x = tl.load(x_ptr + x_at + k, mask=(k + d < D)[:, None] & is_word[None, :], other=0.0)
            # tf32x3 keeps the accuracy of float32 inputs on tensor cores; 16-bit inputs ignore it.
            s = tl.dot(y, x, s, input_precision="tf32x3")
            y, x = y.to(tl.float32), x.to(tl.float32)
            y_square += y * y
            x_square += x * x
        y_norm = tl.maximum(tl.sqrt(tl.sum(y_square, 1)), 1e-12)
        x_norm = tl.maximum(tl.sqrt(tl.sum(x_square, 0)), 1e-12)
        # Cosines, those below 0 as 0. One tile serves both directions:
        s = tl.maximum(s / y_norm[:, None] / x_norm[None, :], 0.0)
        # along its columns, how well each word is matched (recall, coverage);
        best = tl.maximum(best, tl.max(s, 0))
        # along its rows, how well each token is matched by the reference (precision).
        nearest = tl.max(tl.where(in_reference[None, :], s, 0.0), 1)
        tl.store(row_ptr + block * num_tokens + rows, nearest, mask=rows < end)
    # A word is of the reference or of a keyword: the other weight is read as 0.
    weight_at = tl.load(first_weight_ptr + i) + c
    # 0 for a repetition beyond what the rollout says: see `vp.repetition_weights`.
    recalled = best * tl.load(reference_weight_ptr + weight_at, mask=in_reference, other=0.0)
    covered = best * tl.load(word_weight_ptr + first + c, mask=is_word, other=0.0)
    # Shares of recall and coverage of this block of words; the next kernel adds them up.
    tl.store(part_ptr + 2 * (block * num_rollouts + i), tl.sum(recalled))
    tl.store(part_ptr + 2 * (block * num_rollouts + i) + 1, tl.sum(covered))


@triton.jit(do_not_specialize=COUNTS)
def reward_group(
    row_ptr, part_ptr, token_weight_ptr, first_token_ptr, num_reference_ptr, first_rollout_ptr, group_ptr, out_ptr,
    num_tokens, num_rollouts, num_blocks, longest, alpha, margin, KIND: tl.constexpr, DIVIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """q, c, w, r and A of one prompt's rollouts, all in registers. KIND counts along REWARDS."""
    p = tl.program_id(0)
    first, last = tl.load(first_rollout_ptr + p), tl.load(first_rollout_ptr + p + 1)
    G, G_twin = tl.load(group_ptr + 2 * p), tl.load(group_ptr + 2 * p + 1)
    T = tl.load(num_reference_ptr + p)
    at = tl.arange(0, BLOCK_R)
    # Rollouts of this prompt: rows 0 .. G - 1 of the full video, the rest of its twin.
    i = first + at
    ok = i < last
    begin = tl.load(first_token_ptr + i, mask=ok, other=0)
    length = tl.load(first_token_ptr + i + 1, mask=ok, other=0) - begin
    # A group is small (16 rollouts or so): all of it fits into one program.
    precision, recall = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    c = tl.zeros((BLOCK_R,), tl.float32)
    # Precision: a weighted sum over tokens of how well the reference matches them.
    for start in range(0, longest, BLOCK_L):
        j = start + tl.arange(0, BLOCK_L)
        token = begin[:, None] + j[None, :]
        there = j[None, :] < length[:, None]
        # The largest similarity over all blocks of words.
        nearest = tl.zeros((BLOCK_R, BLOCK_L), tl.float32)
        for block in range(num_blocks):
            nearest = tl.maximum(nearest, tl.load(row_ptr + block * num_tokens + token, mask=there, other=0.0))
        precision += tl.sum(nearest * tl.load(token_weight_ptr + token, mask=there, other=0.0), 1)
    for block in range(num_blocks):
        # Recall and coverage: sums over the blocks of words.
        part = part_ptr + 2 * (block * num_rollouts + i)
        recall += tl.load(part, mask=ok, other=0.0)
        c += tl.load(part + 1, mask=ok, other=0.0)
    # F1 of precision and recall; the floors make 0 of 0 / 0.
    precision /= tl.maximum(length, 1)
    recall /= tl.maximum(T, 1)
    q = 2 * precision * recall / tl.maximum(precision + recall, 1e-9)
    tl.store(out_ptr + i, q, mask=ok)
    tl.store(out_ptr + num_rollouts + i, c, mask=ok)

    # Equation (2). The twin's q and c are read off by masked sums over the same registers: groups are small.
    wins = tl.zeros((BLOCK_R,), tl.float32)
    for j in range(G, G + G_twin):
        # Rollout i beats j if it covers the keywords better, and is not much worse otherwise.
        q_twin, c_twin = tl.sum(tl.where(at == j, q, 0.0)), tl.sum(tl.where(at == j, c, 0.0))
        wins += tl.where((c > c_twin + margin) & (q > q_twin - margin), 1.0, 0.0)
    w = wins / tl.maximum(G_twin, 1)
    # Equation (3). KIND: 0 similarity, 1 recall, 2 relative, 3 pooled.
    r = q
    if KIND == 2:
        r = q + alpha * w
    elif KIND != 0:
        r = q + alpha * c
    # Equation (4).
    # pooled: the mean runs over full and twin rollouts; otherwise over the full ones.
    inside = at < (G + G_twin if KIND == 3 else G)
    num = tl.sum(inside.to(tl.float32))
    mean = tl.sum(tl.where(inside, r, 0.0)) / num
    advantage = tl.where(tl.abs(r - mean) < 1e-6, 0.0, r - mean)  # rounding, which the division would blow up
    if DIVIDE:
        advantage /= tl.sqrt(tl.sum(tl.where(inside, (r - mean) * (r - mean), 0.0)) / num) + 1e-4
    # The twin's rollouts are only compared with: no w, r and A of theirs.
    full = at < G
    tl.store(out_ptr + 2 * num_rollouts + i, tl.where(full, w, 0.0), mask=ok)
    tl.store(out_ptr + 3 * num_rollouts + i, tl.where(full, r, 0.0), mask=ok)
    tl.store(out_ptr + 4 * num_rollouts + i, tl.where(full, advantage, 0.0), mask=ok)


@torch.library.custom_op("videoperceiver::paired_reward", mutates_args=())
def paired_reward_op(
    tokens: Tensor, token_weights: Tensor, first_token: Tensor, words: Tensor, first_word: Tensor, num_reference: Tensor,
    word_weights: Tensor, reference_weights: Tensor, first_weight: Tensor, prompt: Tensor, first_rollout: Tensor,
    groups: Tensor, longest: list[int], kind: int, alpha: float, margin: float, divide: bool,
) -> Tensor:  # fmt: skip
    """q, c, w, r, A of every rollout, (5, R); the last three are 0 for those of a twin."""
    (num_tokens, D), R, P = tokens.shape, len(prompt), len(groups)
    tiles = launch(tokens.dtype)
    longest_rollout, most_words, most_rollouts = longest
    # The grid is for the prompt with the most words; blocks beyond a prompt's own read zeros.
    num_blocks = ceil_div(most_words, tiles["BLOCK_C"])
    # Small tensors between the two kernels; no similarity matrix is ever stored.
    out, parts = (tokens.new_empty(n, R, dtype=torch.float32) for n in (5, 2 * num_blocks))
    rows = tokens.new_empty(num_blocks, max(1, num_tokens), dtype=torch.float32)
    match_words[(R, num_blocks)](
        tokens, first_token, words, first_word, num_reference, word_weights, reference_weights, first_weight, prompt,
        rows, parts, max(1, num_tokens), R, D, **tiles,
    )  # fmt: skip
    reward_group[(P,)](
        rows, parts, token_weights, first_token, num_reference, first_rollout, groups, out, max(1, num_tokens), R,
        num_blocks, longest_rollout, alpha, margin, kind, divide, triton.next_power_of_2(most_rollouts), **GROUP,
    )  # fmt: skip
    return out


@paired_reward_op.register_fake
def _(tokens, token_weights, first_token, words, first_word, num_reference, word_weights, reference_weights, first_weight,
      prompt, first_rollout, groups, longest, kind, alpha, margin, divide):  # fmt: skip
    return tokens.new_empty(5, len(prompt), dtype=torch.float32)


# --- The public function ---------------------------------------------------------------------------------------------


def fused_rewards(
    batch: Sequence, kind: str, alpha: float, margin: float, divide: bool
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """`vp.paired_rewards` on a GPU. batch: of `vp.Texts`. Returns q and c (R,), w, r and A (G,) of each prompt."""
    packed = pack_texts(batch)
    # An operator takes tensors and numbers: the record is taken apart.
    fields = [x for x in vars(packed).values() if isinstance(x, Tensor)]
    out = paired_reward_op(*fields, list(packed.longest), REWARDS.index(kind), alpha, margin, divide)
    # Back to prompts: q and c of all rollouts, w, r and A of the full video's.
    out = out.split([len(prompt.rollouts) for prompt in batch], 1)
    return [(*x[:2].unbind(), *x[2:, : prompt.num_full].unbind()) for prompt, x in zip(batch, out)]
