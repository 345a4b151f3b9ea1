"""Contact sheets: the full video above its twin, key slots framed, keyword and caption underneath."""

import textwrap
from pathlib import Path

import torch
from einops import rearrange

import vp
from data.clips import Clip, Frames

FULL_COLOUR, TWIN_COLOUR = "#1a9850", "#d73027"


def contact_sheet(clip: Clip, frames: Frames, example: vp.Example, path: Path, columns: int = 16) -> Path:
    """Draw the sampled frames of a clip and of its twin as a PNG; long clips are thinned to `columns` slots at most.

    Key slots are framed in green in the full row; in the twin's row, framed in red, stands what replaces them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    num_slots = int(example.grid[0])
    slots = rearrange(frames.pixels, "(s f) c h w -> s f h w c", s=num_slots)
    key = torch.stack(example.keyword_slots).any(0) if example.keyword_slots else torch.zeros(num_slots, dtype=torch.bool)
    source = torch.arange(num_slots) if example.source is None else example.source
    shown = torch.arange(num_slots)
    if num_slots > columns // 2:  # both frames of a slot fit only in a short clip: show the first of each
        slots = slots[:, :1]
        shown = torch.linspace(0, num_slots - 1, min(columns, num_slots)).round().long()
    per_slot = slots.shape[1]
    width = len(shown) * per_slot
    height, wide = slots.shape[2:4]
    figure, axes = plt.subplots(2, width, figsize=(width * 1.0, 2.2 * height / wide + 0.9), squeeze=False)
    step = len(frames.timestamps) // num_slots
    for row, (label, order, colour) in enumerate((("full", shown, FULL_COLOUR), ("twin", source[shown], TWIN_COLOUR))):
        for i, (place, slot) in enumerate(zip(shown.tolist(), order.tolist())):
            for f in range(per_slot):
                axis = axes[row][i * per_slot + f]
                axis.imshow(slots[slot, f].numpy(), interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                for spine in axis.spines.values():
                    spine.set(color=colour if key[place] else "#cccccc", linewidth=3 if key[place] else 0.5)
                if row == 0:
                    axis.set_title(f"{frames.timestamps[place * step + f]:.2f}s", fontsize=7)
        axes[row][0].set_ylabel(label, fontsize=9)
    note = "" if example.source is not None else "  (no twin: no key slot, or nothing else)"
    words = f"keywords: {', '.join(clip.keywords) or 'none'}{note}\n" + textwrap.fill(clip.caption, 20 + 9 * width)
    figure.text(0.01, 0.01, words, fontsize=8, va="bottom")
    room = 0.18 * (words.count("\n") + 1) / figure.get_figheight()  # for the words, 0.18 inch a line
    figure.tight_layout(rect=(0, room, 1, 1), h_pad=0.4, w_pad=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
