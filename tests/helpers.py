"""What several test files share: a clip as plain transformers takes it, by itself."""

import torch
from torch import Tensor

import vp


def published_positions(types: Tensor, grids: list, seconds_per_slot: list[float], config) -> Tensor:
    """M-RoPE positions (3, T) of one sequence, token by token, as the published Qwen2.5-VL and Qwen3-VL code has them.

    types (T,): 0 text, 2 video; grids: (slots, height, width) in patches of each video. No look at `positions.rope_index`.
    """
    merge, per_second = config.vision_config.spatial_merge_size, getattr(config.vision_config, "tokens_per_second", 0)
    places, largest, video, seen = [], -1, -1, 0
    left = 0  # visual tokens of the current video that are still to come
    for i, kind in enumerate(types.tolist()):
        if kind == 0:
            largest += 1
            places.append((largest, largest, largest))
            continue
        if left == 0:
            video, seen = video + 1, 0
            slots, height, width = (int(n) // m for n, m in zip(grids[video], (1, merge, merge)))
            left = slots * height * width
        if i == 0 or types[i - 1] == 0:  # a run of visual tokens begins: a whole video, or, behind a timestamp, a slot
            start, first = largest + 1, seen
        slot, row, column = (seen - first) // (height * width), seen // width % height, seen % width
        places.append((start + int(slot * seconds_per_slot[video] * per_second), start + row, start + column))
        seen, left, largest = seen + 1, left - 1, max(largest, *places[-1])
    return torch.tensor(places).T


def plain_inputs(example: vp.Example, config, ids: Tensor | None = None) -> dict:
    """What a plain Hugging Face model is called with for one clip; ids: prompt and more (default: the whole example)."""
    ids = example.input_ids if ids is None else ids
    types = torch.zeros_like(ids)
    types[: len(example.token_types)] = example.token_types[: len(ids)]
    positions = published_positions(types, [example.grid], [example.seconds_per_slot], config)
    return {
        "input_ids": ids[None],
        "attention_mask": torch.ones_like(ids)[None],
        "mm_token_type_ids": types[None],
        "position_ids": positions[:, None],
        "pixel_values_videos": example.pixels,
        "video_grid_thw": example.grid[None],
    }


def plain_forward(hf: torch.nn.Module, example: vp.Example, **more):
    """The Hugging Face model's own output on one clip."""
    return hf(**plain_inputs(example, hf.config), **more)


def degraded(example: vp.Example) -> Tensor:
    """The patches of the twin's frames, as if they had been shown: whole slots of pixels replaced."""
    per_slot = len(example.pixels) // int(example.grid[0])
    return example.pixels.view(-1, per_slot, example.pixels.shape[1])[example.source].flatten(0, 1)
