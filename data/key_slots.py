"""Key slots of a brief event, found without a model."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def find_key_slots(frames: Tensor, frames_per_slot: int = 2, contrast: float = 1.5) -> Tensor:
    """The slots that look unlike the frames around them: a finder of brief events that needs no model.

    frames: (F, C, H, W) uint8, F a multiple of frames_per_slot. Each frame is compared with the per-pixel median of its
    seven-frame neighbourhood: slow motion stays in the median, a brief event does not. A frame's distance is that of its
    most changed block, a sixth of the picture wide, since an event is local. A frame counts as key when its distance is
    more than half-way from the clip's median distance to the largest. Returns (S,) bool, all false where nothing
    stands out: the largest distance is below `contrast` times the median one.
    """
    pixels = frames
    if max(pixels.shape[-2:]) > 64:
        pixels = F.interpolate(pixels.float(), scale_factor=64 / max(pixels.shape[-2:]), mode="area")
    num_frames = len(pixels)
    reach = min(3, (num_frames - 1) // 2)
    # Windows are shifted, not cut, at the ends of the clip, so that every median is taken over as many frames.
    first = (torch.arange(num_frames) - reach).clamp(0, num_frames - 2 * reach - 1)
    window = list(pixels[first[:, None] + torch.arange(2 * reach + 1)].unbind(1))  # 7 x (F, C, H, W)
    for round_ in range(len(window)):  # odd-even sort across the window: ten times faster than Tensor.median here
        for i in range(round_ % 2, len(window) - 1, 2):
            a, b = window[i], window[i + 1]
            window[i], window[i + 1] = torch.minimum(a, b), torch.maximum(a, b)
    block = max(2, min(pixels.shape[-2:]) // 6)
    change = (pixels.float() - window[reach]).abs().mean(1, keepdim=True)  # (F, 1, H, W)
    distance = F.avg_pool2d(change, block, max(1, block // 2)).amax((1, 2, 3))  # (F,)
    low, high = distance.median(), distance.max()
    if high <= contrast * low + 1e-3:
        return torch.zeros(num_frames // frames_per_slot, dtype=torch.bool)
    return rearrange(distance > (low + high) / 2, "(s f) -> s f", f=frames_per_slot).any(1)
