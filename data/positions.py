"""M-RoPE positions by the rule of the published Qwen-VL weights, in place of transformers' own."""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

# The families whose positions are worked out here. Their published weights were trained with text that follows a video
# at the largest position so far + 1; transformers 5.3 and later starts it at start + max(height, width), which lies
# inside the video's own temporal range wherever a video is longer than it is wide.
PUBLISHED_POSITIONS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


def rope_index(
    config, input_ids: Tensor, mm_token_type_ids: Tensor, image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None, second_per_grid_ts: Sequence[float] | Tensor | None = None,
    attention_mask: Tensor | None = None, slot_seconds: Tensor | None = None, **_,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """M-RoPE positions (3, B, T) by the rule of the published Qwen-VL weights, and each row's largest position + 1 - its
    number of tokens, (B, 1). Called like transformers' own `get_rope_index`, whose place it takes.

    Text counts on by 1 in all three rows. A visual token at slot t, row y, column x of a video that starts at position p
    has (p + interval * t, p + y, p + x), cut to whole numbers; interval is seconds of a slot * tokens_per_second
    (Qwen2.5-VL) or 1 (Qwen2-VL). What follows starts at the largest position so far + 1. Qwen3-VL and Qwen3.5 write a
    timestamp before each slot, so that each slot is a run of its own. Grids and seconds: one a video, in the order of the
    batch.

    A video may have several grids, one for each run of slots of one size. slot_seconds: the second at which each slot of
    the batch's videos stands, where slots do not come evenly: the temporal position is then p + tokens_per_second * (its
    second - the first slot's).
    """
    merge = config.vision_config.spatial_merge_size
    per_second = getattr(config.vision_config, "tokens_per_second", 1)

    def slots(
        grids: Tensor | None, seconds: Sequence[float] | Tensor | None, stands: Tensor | None = None
    ) -> Iterator[tuple[tuple[int, int], float]]:
        """Size and second of each slot."""
        grids = [] if grids is None else grids.tolist()
        seconds = [1.0] * len(grids) if seconds is None else [float(x) for x in seconds]
        sizes = [(h // merge, w // merge) for t, h, w in grids for _ in range(t)]
        if stands is None and grids:
            stands = torch.cat([torch.arange(t) * x for (t, _, _), x in zip(grids, seconds)])
        return zip(sizes, [] if stands is None else stands.tolist())

    ahead = {1: slots(image_grid_thw, None), 2: slots(video_grid_thw, second_per_grid_ts, slot_seconds)}
    position_ids = torch.zeros((3, *input_ids.shape), dtype=torch.long)
    keep = torch.ones(input_ids.shape) if attention_mask is None else attention_mask.cpu()
    deltas = []
    for b, (types, kept) in enumerate(zip(mm_token_type_ids.cpu(), keep.bool())):
        runs, start = [], 0
        for kind, run in itertools.groupby(types[kept].tolist()):
            num = len(list(run))
            if kind == 0:
                run = torch.arange(num).expand(3, -1)
            else:
                shown, left = [], num
                while left > 0:
                    (h, w), second = next(ahead[kind])
                    shown.append(((h, w), second))
                    left -= h * w
                parts = []
                for (h, w), same in itertools.groupby(shown, key=lambda slot: slot[0]):
                    t = (torch.tensor([second for _, second in same]) - shown[0][1]) * per_second
                    parts.append(torch.cartesian_prod(t.long(), torch.arange(h), torch.arange(w)).T)
                run = torch.cat(parts, 1)
            runs.append(start + run)
            start = int(runs[-1].max()) + 1
        position_ids[:, b, kept] = torch.cat(runs, 1)
        deltas.append(start - int(kept.sum()))
    return position_ids.to(input_ids.device), torch.tensor(deltas, device=input_ids.device)[:, None]


def use_published_positions(hf: nn.Module) -> nn.Module:
    """Make a Hugging Face model work its positions out by `rope_index`, in forward() and in generate(); returns it."""
    if hf.config.model_type in PUBLISHED_POSITIONS:
        hf.model.get_rope_index = partial(rope_index, hf.config)
    return hf
