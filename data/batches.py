"""What goes into a video-language model and what comes out: padded batches, encoded videos, rollouts."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.device import Clock
from data.packing import Packed, move
from kernels.contrastive import ids_shown
from vp import Example, KeyTokens


@dataclass
class Rollouts:
    """Sampled descriptions of B clips, R each, those of the full video first, then those of the twin.

    tokens (B, R, L), padded behind the end-of-text token; logp (B, R, L), of each when it was sampled; lengths (B, R),
    tokens of each with its end; finished (B, R) bool, whether it ended by itself. clock: where the time went.
    """

    tokens: Tensor
    logp: Tensor
    lengths: Tensor
    finished: Tensor
    clock: Clock | None = None

    def to(self, device: torch.device | str) -> "Rollouts":
        """The same rollouts on another device."""
        return move(self, device)

    @staticmethod
    def join(parts: Sequence["Rollouts"], pad_id: int) -> "Rollouts":
        """The rollouts of all clips of several."""
        width = max(part.tokens.shape[2] for part in parts)

        def widen(x: Tensor, value: int) -> Tensor:
            return F.pad(x, (0, width - x.shape[2]), value=value)

        return Rollouts(
            tokens=torch.cat([widen(part.tokens, pad_id) for part in parts]),
            logp=torch.cat([widen(part.logp, 0) for part in parts]),
            lengths=torch.cat([part.lengths for part in parts]),
            finished=torch.cat([part.finished for part in parts]),
            clock=Clock.join([part.clock for part in parts]),
        )


@dataclass
class Video:
    """Encoded videos. pooler_output: of each clip its visual tokens (V_b, D); deepstack_features: those of Qwen3-VL's first
    layers likewise, for each layer, or None. The names are transformers'."""

    pooler_output: list[Tensor]
    deepstack_features: list[list[Tensor]] | None = None

    def layers(self) -> list[list[Tensor]]:
        """The visual tokens, then those for each of the first layers."""
        return [self.pooler_output, *(self.deepstack_features or [])]

    def change(self, function: Callable[[list[Tensor]], list[Tensor]]) -> "Video":
        """The same change to all of `layers`."""
        first, *more = [function(list(layer)) for layer in self.layers()]
        return Video(first, None if self.deepstack_features is None else more)

    @staticmethod
    def join(videos: Sequence["Video"]) -> "Video":
        """All clips of several."""
        first, *more = [[x for layer in parts for x in layer] for parts in zip(*(video.layers() for video in videos))]
        return Video(first, None if videos[0].deepstack_features is None else more)


def in_chunks(sizes: Sequence[int], most: int) -> list[slice]:
    """Neighbours together, as long as their sizes add up to no more than `most`; at least one.

    >>> in_chunks([3, 3, 5, 9, 1], most=7)
    [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None), slice(4, 5, None)]
    """
    chunks, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > most:
            chunks.append(slice(start, i))
            start, total = i, 0
        total += size
    return [*chunks, slice(start, len(sizes))]


# Without gradients, tokens that go through a model at once: no card is faster with more, and memory grows with them.
TOKENS_AT_ONCE = 8192
# Tokens of prompts, full video and twin, whose keys and values are held at once while their texts are sampled.
TOKENS_HELD = 65536


@dataclass
class SFTOutput:
    """Losses of one micro-batch, summed over its caption tokens and its keywords; nothing has been read from the device."""

    lm_loss: Tensor
    contrastive_loss: Tensor
    metrics: dict[str, Tensor]


@dataclass
class Batch:
    """Padded clips with every index worked out beforehand, so that the training loop never waits for the device.

    input_ids, attention_mask, token_types (B, T); position_ids (3, B, T) or None; pixels, grid (all runs, 3) and
    seconds_per_slot of each run, as in `Example`; num_runs: of each clip. label_rows (L,): rows of the flattened (B*T)
    sequence that predict label_ids.
    twin_index (V,), for generation alone: the visual token that the twin shows in the place of each. forked, for training
    alone: the same sequences with the twins' events behind them, see `caption_trees`. key_rows (N,): key-slot tokens as
    rows of the flattened (B*T) sequence; twin_rows (N,): the twins' as rows of flattened `forked`. keyword_ids (K, W)
    padded with keyword_mask (K, W). key_tokens: who asks for whom.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_types: Tensor
    position_ids: Tensor | None
    pixels: Tensor
    grid: Tensor
    seconds_per_slot: Tensor
    num_runs: list[int]
    label_rows: Tensor
    label_ids: Tensor
    twin_index: Tensor | None
    forked: Packed | None
    key_rows: Tensor
    twin_rows: Tensor
    keyword_ids: Tensor
    keyword_mask: Tensor
    key_tokens: KeyTokens

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device, copied without waiting. Pixels and grid stay on the host: the grid is read
        there, and of the pixels, which are many, the vision encoder takes some at a time."""
        moved = move(replace(self, pixels=self.pixels[:0]), device)
        return replace(moved, pixels=self.pixels, grid=self.grid)


def by_clip(video: Video, num_runs: Sequence[int]) -> Video:
    """Encoded videos with one entry a clip: the encoder gives one for each run of slots of one size."""
    if all(n == 1 for n in num_runs):
        return video

    def join(parts: list[Tensor]) -> list[Tensor]:
        rest = iter(parts)
        return [torch.cat(list(itertools.islice(rest, n))) for n in num_runs]

    return video.change(join)


def index_keywords(
    examples: Sequence[Example], visual_places: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Tensor, KeyTokens]:
    """Key-slot tokens and keywords of a batch, those of clips without a twin left out.

    visual_places: for each clip and slot the places of its tokens in the sequence. Returns the places (N,) of
    key-slot tokens in their clip's sequence, keyword_ids (K, W) padded with -1, and who asks for whom; see `Batch`.
    """
    shown = [[k for k in e.keywords if e.source is not None and k.slots.any()] for e in examples]  # by clip
    keywords = [keyword for of_clip in shown for keyword in of_clip]
    key_places, clip, slot = [], [], []
    for b, (places, of_clip) in enumerate(zip(visual_places, shown)):
        is_key = torch.stack([keyword.slots for keyword in of_clip]).any(0).tolist() if of_clip else []
        for s, key in enumerate(is_key):
            if key:
                key_places.append(places[s])
                clip.append(torch.full_like(places[s], b))
                slot.append(torch.full_like(places[s], s))
    keyword_slots = torch.zeros(len(keywords), max(len(p) for p in visual_places), dtype=torch.bool)
    for j, keyword in enumerate(keywords):
        keyword_slots[j, : len(keyword.slots)] = keyword.slots
    number = {text: i for i, text in enumerate(dict.fromkeys(keyword.text for keyword in keywords))}
    ids = [keyword.ids for keyword in keywords]
    none = torch.empty(0, dtype=torch.long)
    asks = dict(
        clip=torch.cat([none, *clip]),
        slot=torch.cat([none, *slot]),
        keyword_clip=torch.tensor([b for b, of_clip in enumerate(shown) for _ in of_clip], dtype=torch.long),
        keyword_id=torch.tensor([number[keyword.text] for keyword in keywords], dtype=torch.long),
        keyword_slots=keyword_slots,
    )
    return (
        torch.cat([none, *key_places]),
        nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1) if ids else torch.full((0, 1), -1),
        KeyTokens(**asks, shown=ids_shown(**asks)),
    )


def forked_length(example: Example) -> int:
    """Tokens of a prompt with its twin, at most."""
    return example.prompt_length * (1 if example.source is None else 2)
