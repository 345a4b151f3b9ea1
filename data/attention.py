"""Attention that transformers does not have: slots of a video in few calls, and branches of a shared prefix."""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def attend_in_chunks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float,
    dropout: float = 0.0, cu_seq_lens_q: Tensor | None = None, **_,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention inside each chunk of a packed sequence (a slot, or a window of one), chunks of a length in one call.

    query, key, value: (1, heads, P, head_dim), cut at cu_seq_lens_q (chunks + 1,). Returns (1, P, heads, head_dim). Without
    flash-attn, transformers calls sdpa once for every chunk: a clip of 16 slots makes hundreds of small calls.
    """
    lengths = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    starts, out = cu_seq_lens_q[:-1].tolist(), torch.empty_like(query.transpose(1, 2))
    for length in sorted(set(lengths)):
        rows = torch.tensor([s for s, n in zip(starts, lengths) if n == length], device=query.device)
        rows = (rows[:, None] + torch.arange(length, device=query.device)).flatten()
        q, k, v = (rearrange(x[0][:, rows], "h (n l) d -> n h l d", l=length) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, scale=scaling, dropout_p=dropout)
        out = out.index_copy(1, rows, rearrange(attended, "n h l d -> 1 (n l) h d"))
    return out, None


# transformers hands cu_seqlens to implementations with "flash" in their name, and to no others.
ALL_ATTENTION_FUNCTIONS.register("chunked_not_flash", attend_in_chunks)


def attend_by_mask(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | BlockMask | None,
    otherwise: str, **more,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """flex_attention under a BlockMask, sdpa under a mask of token pairs (B, 1, T, S), and `otherwise` without either.

    The mask decides, and nothing else. A setting that is changed for the forward pass is gone when checkpointed layers run
    again in the backward pass.
    """
    if isinstance(attention_mask, BlockMask):
        # Under autocast, rotated queries and keys may be float32 where values are not.
        query, key, otherwise = query.to(value.dtype), key.to(value.dtype), "flex_attention"
    elif attention_mask is not None and attention_mask.ndim == 4:
        otherwise = "sdpa"  # flash-attn knows no mask that tells branches apart
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
