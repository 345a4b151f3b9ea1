"""Where something happens that comes and goes: evidence from the pictures alone, without a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Evidence:
    """curve (F,): evidence of each frame, or of each slot, 0 or more. confidence: in [0, 1], that there is an event and
    this is its place. notes: what speaks against it, in words."""

    curve: Tensor
    confidence: float
    notes: list[str] = field(default_factory=list)


def shrink(frames: Tensor, side: int = 64) -> Tensor:
    """Frames (F, C, H, W) uint8 as float, the longer side at most `side` pixels."""
    if max(frames.shape[-2:]) <= side:
        return frames.float()
    scale = side / max(frames.shape[-2:])
    size = [max(8, round(n * scale)) for n in frames.shape[-2:]]
    return F.interpolate(frames.float(), size=size, mode="area")


def block_change(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of pictures (..., C, H, W) in overlapping blocks a sixth of the picture wide: (..., n)."""
    block = max(2, min(a.shape[-2:]) // 6)
    change = (a - b).abs().mean(-3, keepdim=True).flatten(0, -4)
    return F.avg_pool2d(change, block, max(1, block // 2)).flatten(1).unflatten(0, a.shape[:-3])


def find_cuts(steps: Tensor, threshold: float = 25.0) -> list[int]:
    """Frames that begin another shot: most of the picture changes at once, far more than it does between other frames.

    steps: (F-1, blocks), `block_change` from each of F frames to the next.
    """
    if len(steps) < 2:
        return []
    change = steps.median(1).values  # (F-1,): of the block in the middle
    usual = change.median()
    cut = (change > threshold) & (change > 6 * usual + 5)
    return (cut.nonzero().squeeze(1) + 1).tolist()


def motion_evidence(frames: Tensor, timestamps: Sequence[float], reach: float = 2.0) -> Evidence:
    """Two-sided difference: how unlike a frame is both the frames `reach` seconds before and after it, within its shot.

    frames: (F, C, H, W) uint8; timestamps: (F,) seconds. Distance is that of the most changed block, so that small events
    count; the smaller of the two sides is taken, so that only what comes and goes counts.
    """
    pixels, count = shrink(frames), len(frames)
    step = (timestamps[-1] - timestamps[0]) / max(1, count - 1) or 1.0
    lag = max(1, round(reach / step))
    steps = block_change(pixels[1:], pixels[:-1]) if count > 1 else torch.zeros(1, 1)
    cuts = find_cuts(steps)
    first, last = torch.zeros(count, dtype=torch.long), torch.full((count,), count - 1)
    for cut in cuts:
        first[cut:] = cut
        last[:cut] = last[:cut].clamp(max=cut - 1)
    place = torch.arange(count)
    before, after = torch.maximum(place - lag, first), torch.minimum(place + lag, last)
    sides = torch.stack([block_change(pixels, pixels[before]), block_change(pixels, pixels[after])])  # (2, F, blocks)
    largest = sides.amax(2)
    curve, side = largest.min(0)
    if step < 0.1:  # frames that lie closer together are smoothed over a tenth of a second
        kernel = torch.exp(-0.5 * (torch.arange(-12, 13) * step / 0.1) ** 2)
        curve = F.conv1d(F.pad(curve[None, None], (12, 12), mode="replicate"), (kernel / kernel.sum())[None, None])[0, 0]
    peak = int(curve.argmax())
    # 1: the whole picture changes, not a place in it
    everywhere = float(sides[side[peak], peak].median() / largest[side[peak], peak].clamp(min=1e-3))
    stands_out = 1 - float(curve.quantile(0.1) / curve[peak].clamp(min=1e-3))
    confidence = min(1.0, float(curve[peak]) / 20) * stands_out * (1 - everywhere)
    moving = (steps > 4).float().mean()  # share of the picture that moves from frame to frame
    notes = []
    if moving > 0.6:
        notes.append(f"the camera moves: {moving:.0%} of the picture changes from frame to frame")
        confidence *= 0.2
    if cuts:
        notes.append(f"{len(cuts)} cut(s)")
        confidence *= 0.3
    return Evidence(curve, confidence, notes)
