"""Packing: sequences in which branches share what comes before them, so that nothing is run twice.

A *branch* is a run of tokens that sees itself and its ancestors, and no other branch; its positions begin where its parent
ends. A prompt forks into the full video and its twin at the first replaced slot, and may fork again into questions or into
rollouts:

    [shared prefix]--[rest of the prompt, full video]--[rollout 1 of the full video]
                  \\                                \\--[rollout 2]
                   \\-[rest of the prompt, twin]------[rollout 1 of the twin]
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from data.device import to_device
from vp import Example

BLOCK = 128  # tokens of a side of flex_attention's blocks


def move(record, device: torch.device | str):
    """A copy of a record with all its tensors on another device."""
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    for name, value in values.items():
        if isinstance(value, Tensor):
            values[name] = to_device(value, device)
        elif is_dataclass(value):
            values[name] = move(value, device)
    return replace(record, **values)


class AttentionCall(NamedTuple):
    """One call of attention: `length` tokens, and the branches that they see: numbers in order, their own last.

    mask: (length, tokens of all those), to be added to scores. None: tokens of all those attend, each to itself and what
    came before, and the last `length` results are kept.
    """

    length: int
    sees: list[int]
    mask: Tensor | None


class ClipBranches(NamedTuple):
    """The branches of one clip: how many tokens each has, and the calls of attention that together cover all, in order."""

    lengths: list[int]
    calls: list[AttentionCall]


@dataclass
class Packed:
    """A batch of trees, padded to the right.

    input_ids, token_types, branch (B, T); position_ids (3, B, T); ancestors (B, n, n) bool: whether branch i sees branch j,
    itself included. visual_index (V,): which of the encoded visual tokens stands at each visual place. rows (M,): rows of
    the flattened (B*T) sequence whose states are wanted. Of rollouts: targets (M,), the token that each row predicts, and
    rollout (M,), whose it is, counted through the batch.
    """

    input_ids: Tensor
    token_types: Tensor
    branch: Tensor
    position_ids: Tensor
    ancestors: Tensor
    visual_index: Tensor
    rows: Tensor
    targets: Tensor | None = None
    rollout: Tensor | None = None

    def to(self, device: torch.device | str) -> "Packed":
        """The same sequences on another device."""
        return move(self, device)

    def sees(self, branch: Tensor) -> Tensor:
        """Which tokens of its clip's sequence a branch sees: (B, R) numbers of branches -> (B, R, T) bool."""
        clip = torch.arange(len(branch), device=branch.device)[:, None, None]
        return self.ancestors[clip, branch[:, :, None], self.branch[:, None, :]]

    def branches(self) -> list[ClipBranches]:
        """The branches of each clip; for `attend_by_branch`.

        A root and the branch that follows it at once attend as one. A branch that is longer than what it grows from lets
        its ancestors attend again: that is less than to look at every pair and mask what comes later.
        """
        found, counts = [], F.one_hot(self.branch, self.ancestors.shape[-1]).sum(1)  # (B, n)
        for lengths, ancestors in zip(counts.tolist(), self.ancestors.tolist()):
            calls: list[AttentionCall] = []
            for length, row in zip(lengths, ancestors):
                if not length:  # another clip of the batch has more branches
                    continue
                sees, mask = [j for j, seen in enumerate(row) if seen], None
                total = sum(lengths[j] for j in sees)
                if calls and calls[-1].sees == sees[:-1] and calls[-1].length == total - length:
                    calls[-1] = AttentionCall(total, sees, None)
                    continue
                if length <= total / 2:
                    mask = torch.full((length, total), -torch.inf, device=self.branch.device).triu(total - length + 1)
                calls.append(AttentionCall(length, sees, mask))
            found.append(ClipBranches(lengths, calls))
        return found

    def pair_mask(self) -> Tensor:
        """One mask of all pairs of a sequence's tokens in place of `branches`: (B, 1, T, T), to be added to scores."""
        sees = self.sees(self.branch).tril()  # (B, T, T): what came before, of itself and its ancestors
        return torch.zeros(sees.shape, device=sees.device).masked_fill(~sees, -torch.inf)[:, None]

    def block_mask(self, size: int = BLOCK) -> BlockMask:
        """What flex_attention is told: the blocks that nobody sees are left out.

        Blocks are counted by branches: in a block below the diagonal, count(q) @ ancestors @ count(k) pairs see each other.
        torch's create_block_mask makes the (B, T, T) mask first, and takes ten bytes for each of its entries.
        """
        branch, ancestors, (T, n) = self.branch, self.ancestors, (self.branch.shape[1], self.ancestors.shape[-1])
        filled = F.pad(branch, (0, -T % size), value=n)  # to whole blocks; n is no branch
        counts = F.one_hot(filled, n + 1)[..., :n].unflatten(1, (-1, size)).sum(2).float()  # (B, blocks, n)
        pairs = counts @ ancestors.float() @ counts.mT  # (B, blocks, blocks)
        below = torch.ones_like(pairs[0], dtype=torch.bool).tril(-1)
        whole = below & (pairs == size * size)  # all of a block is seen: no mask is asked there
        some = (below & (pairs > 0) & ~whole) | torch.eye(len(below), dtype=torch.bool, device=branch.device)

        def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
            """How many blocks each row of blocks has, and which, those first."""
            which = blocks.int().argsort(dim=2, descending=True, stable=True)
            return blocks.sum(2)[:, None].int(), which[:, None].int()

        return BlockMask.from_kv_blocks(
            *ordered(some), *ordered(whole), BLOCK_SIZE=size, seq_lengths=(T, T),
            mask_mod=lambda b, h, q, k: ancestors[b, branch[b, q], branch[b, k]] & (q >= k),
        )  # fmt: skip


@dataclass
class Tree:
    """One clip's sequence while it grows.

    ids, types (t,), positions (3, t) of each branch; visual: the encoded visual tokens that stand in it, in their order.
    parent, tip: number of each branch's parent (-1: none), and the place of its last token. wanted: places whose states are
    wanted.
    """

    ids: list[Tensor] = field(default_factory=list)
    types: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    visual: list[Tensor] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    tip: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    length: int = 0

    def grow(self, parent: int, ids: Tensor, types: Tensor, positions: Tensor, visual: Tensor) -> int:
        """Add a branch behind `parent` (-1: a root) and return its number."""
        self.ids.append(ids)
        self.types.append(types)
        self.positions.append(positions)
        self.visual.append(visual)
        self.parent.append(parent)
        self.length += len(ids)
        self.tip.append(self.length - 1)
        return len(self.tip) - 1

    def grow_text(self, parent: int, ids: Tensor) -> int:
        """Add a branch of text. The branch before it ends in text, so that the last position is the largest so far."""
        positions = self.positions[parent][:, -1:] + 1 + torch.arange(len(ids))
        return self.grow(parent, ids, torch.zeros_like(self.types[parent][:1]).expand(len(ids)), positions, ids[:0])

    def want(self, *places: int) -> None:
        """Ask for the states at some places."""
        self.wanted += places

    def places(self, branch: int) -> range:
        """The places of a branch's tokens."""
        return range(self.tip[branch] + 1 - len(self.ids[branch]), self.tip[branch] + 1)

    def ancestors(self, size: int) -> Tensor:
        """(size, size) bool: which branch sees which; those that do not exist, such as padding, see themselves alone."""
        sees = torch.eye(size, dtype=torch.bool)
        for branch, parent in enumerate(self.parent):
            if parent >= 0:
                sees[branch] |= sees[parent]
        return sees


def pack(trees: Sequence[Tree], pad_id: int, multiple: int = 1) -> Packed:
    """Pad trees into one batch, its width a multiple of so many tokens. Padding is a branch of its own."""

    padding, width = max(len(tree.tip) for tree in trees), max(tree.length for tree in trees)
    width += -width % multiple

    def pad(rows: list[Tensor], value: int) -> Tensor:
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)  # (B, longest) or (B, longest, 3)
        return F.pad(padded, (0, 0) * (padded.ndim - 2) + (0, width - padded.shape[1]), value=value)

    branch = [torch.arange(len(t.ids)).repeat_interleave(torch.tensor([len(ids) for ids in t.ids])) for t in trees]
    return Packed(
        input_ids=pad([torch.cat(tree.ids) for tree in trees], pad_id),
        token_types=pad([torch.cat(tree.types) for tree in trees], 0),
        branch=pad(branch, padding),
        position_ids=pad([torch.cat(tree.positions, 1).T for tree in trees], 0).permute(2, 0, 1),
        ancestors=torch.stack([tree.ancestors(padding + 1) for tree in trees]),
        visual_index=torch.cat([part for tree in trees for part in tree.visual]),
        rows=torch.cat([b * width + torch.tensor(tree.wanted, dtype=torch.long) for b, tree in enumerate(trees)]),
    )


# --- The trees of prompts, questions and rollouts ------------------------------------------------------------------------


def twin_tokens(example: Example, visual: Tensor) -> Tensor:
    """Which of an example's visual tokens (V,), given by their numbers, its twin shows in the place of each."""
    if example.source is None:
        return visual
    slots = example.by_slot(visual)
    return torch.cat([slots[s] for s in example.source.tolist()])


def number_visual_tokens(examples: Sequence[Example]) -> list[Tensor]:
    """The numbers of each example's visual tokens among those of all, in the order in which they are encoded."""
    counts = [int((e.token_types == 2).sum()) for e in examples]
    return list(torch.arange(sum(counts)).split(counts))


class Replaced(NamedTuple):
    """From the first to the last token that the twin replaces: their places in the sequence, and which visual tokens."""

    places: slice
    tokens: slice


def replaced_part(e: Example) -> Replaced:
    """What the twin of an example replaces."""
    own = torch.arange(int((e.token_types == 2).sum()))
    changed = (twin_tokens(e, own) != own).nonzero().squeeze(1)[[0, -1]]
    first, last = torch.nonzero(e.token_types == 2).squeeze(1)[changed].tolist()
    return Replaced(slice(first, last + 1), slice(int(changed[0]), int(changed[1]) + 1))


def cut(e: Example, positions: Tensor, places: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, types and positions (3, t) of a part of an example's sequence."""
    return e.input_ids[places], e.token_types[places], positions[:, places]


def grow_prompt(e: Example, positions: Tensor, shown: Tensor) -> tuple[Tree, int]:
    """A prompt in one branch. positions (3, prompt_length); shown (V,): the encoded visual tokens in it."""
    tree = Tree()
    return tree, tree.grow(-1, *cut(e, positions, slice(e.prompt_length)), shown)


def grow_fork(e: Example, positions: Tensor, shown: Tensor) -> tuple[Tree, int, int]:
    """A prompt that forks at the first replaced slot: its tree, the branch of the full video and that of the twin; see
    `grow_prompt`. Without a twin the two are one branch."""
    if e.source is None:
        tree, full = grow_prompt(e, positions, shown)
        return tree, full, full
    tree, (places, tokens) = Tree(), replaced_part(e)
    shared = tree.grow(-1, *cut(e, positions, slice(places.start)), shown[: tokens.start])
    rest = cut(e, positions, slice(places.start, e.prompt_length))
    full, twin = (tree.grow(shared, *rest, video[tokens.start :]) for video in (shown, twin_tokens(e, shown)))
    return tree, full, twin


class TwinPlace(NamedTuple):
    """Where a clip's twin is: in which sequence, and how far from the places where the same tokens of the full one are."""

    sequence: int
    shift: int


def caption_trees(
    examples: Sequence[Example], positions: Tensor, share_prefix: bool = True
) -> tuple[list[Tree], list[TwinPlace]]:
    """Clips with their captions, and behind what comes before the event the twin's event, which sees that and itself: its
    tokens from the first replaced slot to the last. What comes later in the twin, nobody asks for.

    positions (3, B, T) of the full sequences. Without share_prefix the twins stand in sequences of their own, behind all
    others. Returns, beside the trees, where each clip's twin is (without a twin: no matter where).
    """
    trees, twins, found = [], [], []
    for b, (e, shown) in enumerate(zip(examples, number_visual_tokens(examples))):
        at, n, tree = positions[:, b], len(e.input_ids), Tree()
        trees.append(tree)
        found.append(TwinPlace(b, 0))
        if e.source is None:
            tree.grow(-1, *cut(e, at, slice(n)), shown)
            continue
        (places, tokens), video = replaced_part(e), twin_tokens(e, shown)
        if share_prefix:
            shared = tree.grow(-1, *cut(e, at, slice(places.start)), shown[: tokens.start])
            tree.grow(shared, *cut(e, at, slice(places.start, n)), shown[tokens.start :])
            tree.grow(shared, *cut(e, at, places), video[tokens])
            found[b] = TwinPlace(b, n - places.start)
        else:
            tree.grow(-1, *cut(e, at, slice(n)), shown)
            twins.append(Tree())
            twins[-1].grow(-1, *cut(e, at, slice(places.stop)), video[: tokens.stop])
            found[b] = TwinPlace(len(examples) + len(twins) - 1, 0)
    return trees + twins, found


def prefix_trees(
    examples: Sequence[Example], positions: Sequence[Tensor], questions: Sequence[Sequence[Tensor]] | None = None,
    most: int = 0,
) -> list[Tree]:  # fmt: skip
    """Prompts that fork into the full video and the twin; positions (3, prompt_length) of each.

    questions: for each clip the tokens, at least one, of each text that may follow its prompt; each becomes a branch of the
    full video, and one of the twin. Wanted are the last token of the full video's and of the twin's prompt; with
    questions, that of each question about the full video, then about the twin, Q the most that any clip has, or `most`
    (the last question fills up what a clip lacks). If a clip has no twin, the full video takes its place.
    """
    trees, most = [], max(most, *map(len, questions)) if questions else 0
    for b, (e, at, shown) in enumerate(zip(examples, positions, number_visual_tokens(examples))):
        tree, full, twin = grow_fork(e, at, shown)
        tips = [tree.tip[full], tree.tip[twin]]
        if questions:
            about_full = [tree.tip[tree.grow_text(full, q)] for q in questions[b]]
            about_twin = about_full
            if e.source is not None:
                about_twin = [tree.tip[tree.grow_text(twin, q)] for q in questions[b]]
            lacking = most - len(questions[b])
            tips = [*about_full, *about_full[-1:] * lacking, *about_twin, *about_twin[-1:] * lacking]
        tree.want(*tips)
        trees.append(tree)
    return trees


@dataclass
class RolloutTrees:
    """Trees of prompts with their rollouts; targets: the tokens (L_g,) of each rollout, in order."""

    trees: list[Tree] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)

    def grow(self, tree: Tree, prompt: int, y: Tensor) -> None:
        """A rollout behind a prompt. Wanted are the states that predict its tokens: each by the token before it."""
        places = tree.places(tree.grow_text(prompt, y))
        tree.want(tree.tip[prompt], *places[:-1])
        self.targets.append(y)

    def pack(self, pad_id: int, multiple: int = 1) -> "Packed":
        """All of them as one batch, with the token that each wanted row predicts, and the rollout that it belongs to."""
        lengths = torch.tensor([len(y) for y in self.targets])
        rollout = torch.arange(len(lengths)).repeat_interleave(lengths)
        return replace(pack(self.trees, pad_id, multiple), targets=torch.cat(self.targets), rollout=rollout)


def rollout_trees(
    examples: Sequence[Example], positions: Sequence[Tensor], rollouts: Sequence[Sequence[Tensor]],
    num_full: int | None = None, share_prefix: bool = True,
) -> RolloutTrees:  # fmt: skip
    """[prompt][y_1]...[y_G] of each clip, in which each rollout sees the prompt and itself.

    rollouts: for each clip its rollouts, tokens (L_g,) each. The first num_full of them (None: all) are of the full video,
    the others of its twin: they see the twin's prompt. Without share_prefix, each rollout has a sequence of its own.
    """
    found = RolloutTrees()
    for e, at, shown, ys in zip(examples, positions, number_visual_tokens(examples), rollouts):
        of_full = ys if num_full is None else ys[:num_full]
        of_twin = ys[len(of_full) :]
        if share_prefix:
            tree, full, twin = grow_fork(e, at, shown) if of_twin else (*grow_prompt(e, at, shown), -1)
            for y in of_full:
                found.grow(tree, full, y)
            for y in of_twin:
                found.grow(tree, twin, y)
            found.trees.append(tree)
            continue
        for some, video in ((of_full, shown), (of_twin, twin_tokens(e, shown))):
            for y in some:
                tree, prompt = grow_prompt(e, at, video)
                found.grow(tree, prompt, y)
                found.trees.append(tree)
    return found
