"""Attention that transformers does not have: slots of a video in few calls, and branches of a shared prefix."""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from data.device import to_device
from data.packing import BLOCK, ClipBranches, Tree, pack


def vision_layout(visual: nn.Module, grid: Tensor, device: torch.device) -> dict[str, Tensor | int]:
    """What a vision encoder works out of its videos' sizes, grid (B, 3) on the host, before its first layer.

    It would do so on the device, and wait for it a dozen times. Where attention goes in chunks, their borders
    (cu_seqlens) stay on the host: they are read there. The names are those that the encoder takes in their place.
    """
    merge, config = visual.spatial_merge_size, visual.config
    borders = {"cu_seqlens": get_vision_cu_seqlens(grid)}
    layout = {"position_ids": get_vision_position_ids(grid, merge)}
    if getattr(visual, "fullatt_block_indexes", None) is not None:  # Qwen2.5-VL: windows in most layers
        sizes = dict(window_size=visual.window_size, patch_size=visual.patch_size)
        layout["window_index"], borders["cu_window_seqlens"] = get_vision_window_index(grid, merge, **sizes)
    if hasattr(visual, "num_grid_per_side"):  # Qwen3-VL: learned positions, between those of a square grid
        layout["interp_indices"], layout["interp_weights"] = get_vision_interpolation_indices_and_weights(
            grid, visual.num_grid_per_side, visual.interpolation_mode, visual.interpolation_align_corners, merge
        )
    longest = {name.replace("cu_", "max_").removesuffix("s"): int(x.diff().max()) for name, x in borders.items()}
    layout = {name: to_device(x, device) for name, x in layout.items()}
    if config._attn_implementation != CHUNKED:
        borders = {name: to_device(x, device) for name, x in borders.items()}
    return layout | borders | longest


@lru_cache(maxsize=64)
def rows_by_length(borders: tuple[int, ...], device: torch.device) -> list[tuple[int, Tensor]]:
    """The rows of all chunks of a length, for each length; copied to the device once for all layers."""
    lengths = [end - start for start, end in pairwise(borders)]
    rows = {n: [] for n in sorted(set(lengths))}
    for start, n in zip(borders, lengths):
        rows[n] += range(start, start + n)
    return [(n, to_device(torch.tensor(places), device)) for n, places in rows.items() if n]


def attend_in_chunks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float,
    dropout: float = 0.0, cu_seq_lens_q: Tensor | None = None, **_,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention inside each chunk of a packed sequence (a slot, or a window of one), chunks of a length in one call.

    query, key, value: (1, heads, P, head_dim), cut at cu_seq_lens_q (chunks + 1,). Returns (1, P, heads, head_dim). Without
    flash-attn, transformers calls sdpa once for every chunk: a clip of 16 slots makes hundreds of small calls.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
        """Of rows (heads, rows, head_dim) that are chunks of one length: (rows, heads, head_dim)."""
        q, k, v = (rearrange(x, "h (n l) d -> n h l d", l=length) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, scale=scaling, dropout_p=dropout)
        return rearrange(attended, "n h l d -> (n l) h d")

    groups = rows_by_length(tuple(cu_seq_lens_q.tolist()), query.device)
    if len(groups) == 1:
        return attend(query[0], key[0], value[0], groups[0][0])[None], None
    out = torch.empty_like(query[0].transpose(0, 1))
    for length, rows in groups:
        out = out.index_copy(0, rows, attend(*(x[0].index_select(1, rows) for x in (query, key, value)), length))
    return out[None], None


# transformers hands cu_seqlens to implementations with "flash" in their name, and to no others.
CHUNKED = "chunked_not_flash"
ALL_ATTENTION_FUNCTIONS.register(CHUNKED, attend_in_chunks)


@lru_cache(maxsize=1)
def compiled_flex() -> Callable:
    """flex_attention as one kernel, for any number of tokens.

    Compiled whole: where torch would give up after too many variants and make all scores without a word (8 is its limit),
    this raises. Lengths are multiples of 128 (`packing.pack`), so that what is left is few: with and without gradients,
    of one clip and of several.
    """
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def flex_options(device: torch.device) -> dict[str, int | bool]:
    """How its kernels are launched. Cards with about 100 KB of shared memory (RTX 30, 40 and 50, A10, L4, L40) have no room
    for three stages of its tiles at head size 128; torch would take one there, which is slow."""
    options = {"FORCE_USE_FLEX_ATTENTION": True}  # no other kernel for short sequences: one variant less
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        options |= {"fwd_num_stages": 2} if room < 160 * 1024 else {}
    return options


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None) -> Tensor:
    """flex_attention: (B, heads, T, head_dim), keys and values of fewer heads as they are."""
    with torch.autocast(query.device.type, enabled=False):  # whether it is on would be compiled in
        return compiled_flex()(
            query, key, value, block_mask=mask, scale=scaling, enable_gqa=True, kernel_options=flex_options(query.device)
        )


def attend_by_branch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, branches: Sequence[ClipBranches],
    scaling: float | None,
) -> Tensor:  # fmt: skip
    """What `attend_in_blocks` does, where there is no flex_attention, by a call of sdpa for each branch of each clip.

    query (B, heads, T, head_dim), keys and values of fewer heads as they are; branches: `Packed.branches`. Returns
    (B, T, heads, head_dim). Under one mask of all pairs of tokens, scores would be computed that no token sees: more than
    half of them.
    """
    sdpa, attended = ALL_ATTENTION_FUNCTIONS["sdpa"], []
    for q, k, v, clip in zip(query, key, value, branches):
        q, k, v = (x.split(clip.lengths, dim=1) for x in (q, k, v))
        parts = []
        for length, sees, mask in clip.calls:
            keys, values = (torch.cat([x[i] for i in sees], 1)[None] for x in (k, v))
            queries = (torch.cat([q[i] for i in sees], 1) if mask is None else q[sees[-1]])[None]
            mask = None if mask is None else mask[None, None].to(queries.dtype)
            out = sdpa(module, queries, keys, values, mask, scaling=scaling, is_causal=mask is None)[0]
            parts.append(out[:, -length:])
        attended.append(torch.cat(parts, 1))
    return torch.cat(attended)


def attend_by_mask(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | BlockMask | None,
    otherwise: str, branches: Sequence[ClipBranches] | None = None, wanted_rows: Tensor | None = None, **more,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """flex_attention under a BlockMask, sdpa by branches or under a mask of token pairs (B, 1, T, S), else `otherwise`.

    What is handed over decides, and nothing else. A setting that is changed for the forward pass is gone when checkpointed
    layers run again in the backward pass. A mask with the rows of all query heads that share keys, (B, 1, groups * T, S),
    asks for one head of so many queries: keys and values are not repeated; see `VideoLM.sample`. wanted_rows: for the last
    layer's MLP; other layers hand all that they are given to their attention, and it stays here.
    """
    if attention_mask is None and branches is None:
        return ALL_ATTENTION_FUNCTIONS[otherwise](module, query, key, value, attention_mask, **more)
    # Under autocast, rotated queries and keys may be float32 where values are not.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if branches is not None:
        return attend_by_branch(module, query, key, value, branches, more.get("scaling")), None
    if isinstance(attention_mask, BlockMask):
        return attend_in_blocks(query, key, value, attention_mask, more.get("scaling")).transpose(1, 2), None
    if attention_mask.ndim == 4:
        otherwise = "sdpa"  # flash-attn knows no mask that tells branches apart
        attention_mask = attention_mask.to(query.dtype) if attention_mask.is_floating_point() else attention_mask
        groups, T = query.shape[1] // key.shape[1], query.shape[2]
        if groups > 1 and attention_mask.shape[2] == groups * T:
            query = query.unflatten(1, (-1, groups)).flatten(2, 3)  # (B, key heads, groups * T, head_dim)
            attended = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=more.get("scaling"))
            return attended.unflatten(2, (groups, T)).flatten(1, 2).transpose(1, 2), None
    return ALL_ATTENTION_FUNCTIONS[otherwise](module, query, key, value, attention_mask, **more)


def choose_by_mask(config) -> None:
    """Make a language model choose its attention by the mask it is given; see `attend_by_mask`."""
    before = config._attn_implementation
    if before.startswith("by_mask"):
        return
    if before not in ALL_ATTENTION_FUNCTIONS:
        before = "sdpa"
    # transformers does more than attend for names that hold "flash": the name says it by the version alone.
    name = f"by_mask_else_{before.replace('flash_attention', 'fa')}"
    ALL_ATTENTION_FUNCTIONS.register(name, partial(attend_by_mask, otherwise=before))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    config._attn_implementation = name


def compare_flex(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> tuple[float, float]:
    """The largest errors, forward and backward, of `attend_in_blocks` and of `attend_by_branch` on branches of two ragged
    clips, against the second in float64; relative to the largest entry."""
    trees = [Tree(), Tree()]
    for tree, lengths in zip(trees, ((150, 90, 100), (33, 120, 7))):  # a root and two branches that grow from it
        for parent, n in zip((-1, 0, 0), lengths):
            ids = torch.zeros(n, dtype=torch.long)
            tree.grow(parent, ids, ids, ids.expand(3, -1), ids[:0])
    packed = pack(trees, 0, BLOCK).to(device)
    B, T = packed.branch.shape
    g = torch.Generator().manual_seed(0)
    numbers = [torch.randn(B, heads, T, 128, generator=g, dtype=torch.float64).to(device) for heads in (4, 2, 2, 4)]
    module = SimpleNamespace(num_key_value_groups=2, training=True)

    def found(blocks: bool, dtype: torch.dtype) -> list[Tensor]:
        """What is attended, and gradients of queries, keys and values."""
        *qkv, weight = (x.to(dtype).requires_grad_() for x in numbers)
        if blocks:
            attended = attend_in_blocks(*qkv, packed.block_mask(), 0.1)
        else:
            attended = attend_by_branch(module, *qkv, packed.branches(), 0.1).transpose(1, 2)
        return [attended.detach(), *torch.autograd.grad((attended * weight.detach()).sum(), qkv)]

    exact = found(False, torch.float64)

    def error(got: list[Tensor]) -> float:
        errors = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, exact)]
        return max(math.inf if math.isnan(e) else e for e in errors)

    return error(found(True, dtype)), error(found(False, dtype))


@lru_cache
def flex_works(device: torch.device) -> bool:
    """Whether flex_attention compiles on this card and is as right there as sdpa. If not, a warning says why."""
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):  # wherever it is asked first
            error, by_branch = compare_flex(device)
        why = "" if error <= 2 * by_branch + 1e-3 else f"its error is {error:.1e}, that of sdpa {by_branch:.1e}"
    except Exception as failed:  # no C compiler, a card that is too small, a driver that is too old: all end here
        why = f"{type(failed).__name__}: {(str(failed).strip().splitlines() or [''])[0][:200]}"
    if why:
        warnings.warn(f"flex_attention is not taken, sdpa stands in, which is slower: {why}", stacklevel=2)
    return not why


class RoomyLayer(DynamicLayer):
    """Keys and values in buffers with room for all that will come: a token is written into its place, nothing is copied.

    First come the prompts of all clips, some at a time, padded to the right to one width; then tokens of all at once.
    """

    def __init__(self, clips: int, width: int, room: int):
        """room: tokens behind the prompts."""
        super().__init__()
        self.clips, self.width, self.room = clips, width, room
        self.filled = self.length = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of prompts, which see no others, their own length; how many keys there are, and where they begin."""
        return (query_length, 0) if self.filled < self.clips else super().get_mask_sizes(query_length)

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, heads, n, head_dim). Returns those of prompts as they are; then all so far, as views."""
        (B, heads, n, head_dim), new = key_states.shape, (key_states, value_states)
        if not self.is_initialized:
            # Zeros, since what stands behind a short prompt is multiplied, by a weight of 0.
            shape = (self.clips, heads, self.width + self.room, head_dim)
            self.buffers = [x.new_zeros(shape) for x in new]
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        if self.filled < self.clips:
            for buffer, x in zip(self.buffers, new):
                buffer[self.filled : self.filled + B, :, :n] = x
            self.filled, self.length = self.filled + B, self.width
            self.keys, self.values = (buffer[:, :, : self.width] for buffer in self.buffers)
            return new
        for buffer, x in zip(self.buffers, new):
            buffer[:, :, self.length : self.length + n] = x
        self.length += n
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values


def add_deepstack(hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
    """Visual features (V, D) added to the states (B, T, D) in their places (B, T) bool, in the first layers of Qwen3-VL.

    transformers' own indexes by a mask of bools, which waits for the device twice in each of these layers.
    """
    places = visual_pos_masks[..., None]
    return hidden_states + torch.zeros_like(hidden_states).masked_scatter(places, visual_embeds.to(hidden_states.dtype))
