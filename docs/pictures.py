"""Draw the pictures of the docs: the pipeline, from a clip of the embedded world; a prompt's fork and its attention mask.

python -m docs.pictures          # docs/pipeline.png and docs/fork.png
"""

import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from einops import rearrange
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle
from transformers import AutoModelForImageTextToText, AutoProcessor

from data.clips import Preparation, load_clips, prepare, read_frames
from data.tiny import build_tiny
from data.videolm import VideoLM
from data.world import WorldSettings, make_world

HERE = Path(__file__).parent
GREEN, RED, GREY = "#1a9850", "#d73027", "#666666"


def box(axis, x: float, y: float, width: float, height: float, text: str, colour: str = GREY) -> None:
    """A labelled box."""
    axis.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=1.5))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9, color="black")


def arrow(axis, start: tuple[float, float], end: tuple[float, float], colour: str = GREY) -> None:
    """An arrow from one point to another."""
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.3))


def draw_pipeline(clip, frames, example, path: Path) -> None:
    """Caption, keyword, key slots, twin, one vision pass, two language passes, both losses."""
    num_slots = int(example.grid[0])
    shown = rearrange(frames.pixels, "(s f) c h w -> s f h w c", s=num_slots)[:, 0].numpy()
    key = torch.stack([keyword.slots for keyword in example.keywords]).any(0).tolist()
    source = example.source.tolist()
    figure, axis = plt.subplots(figsize=(11, 5.6))
    axis.set(xlim=(0, 110), ylim=(0, 56))
    axis.axis("off")
    axis.text(1, 53.5, f"caption: {clip.caption}", fontsize=9)
    axis.text(1, 50.5, f"keyword: {clip.keywords[0]}", fontsize=10, weight="bold", color=GREEN)
    for row, (label, order, colour, y) in enumerate(
        (("full video", range(num_slots), GREEN, 40), ("twin", source, RED, 29))
    ):
        axis.text(1, y + 3.5, label, fontsize=10, va="center")
        for place, slot in enumerate(order):
            x = 13 + 5.6 * place
            axis.imshow(shown[slot], extent=(x, x + 5, y, y + 7), aspect="auto", interpolation="nearest", zorder=2)
            width, edge = (3, colour) if key[place] else (0.6, "#bbbbbb")
            axis.add_patch(Rectangle((x, y), 5, 7, fill=False, edgecolor=edge, linewidth=width, zorder=3))
        if row == 0:
            axis.text(13 + 5.6 * key.index(True) + 2.5, 48, "key slots", fontsize=8, color=GREEN, ha="center")
    axis.text(13 + 5.6 * key.index(True) + 2.5, 26.6, "shown as their neighbours", fontsize=8, color=RED, ha="center")
    box(axis, 62, 37, 15, 9, "vision encoder\nonce")
    box(axis, 62, 27, 15, 7, "twin: gather\nits tokens", RED)
    arrow(axis, (58.5, 43.5), (62, 43.5))
    arrow(axis, (69.5, 37), (69.5, 34), RED)
    box(axis, 82, 36, 26, 10, "language model, all layers\nstates caught after l layers", GREEN)
    box(axis, 82, 27, 26, 7, "the same first l layers", RED)
    arrow(axis, (77, 42), (82, 42), GREEN)
    arrow(axis, (77, 30.5), (82, 30.5), RED)
    box(axis, 82, 9, 26, 9, "caption loss\nL_LM(caption | full video)", GREEN)
    box(axis, 36, 9, 42, 9, "contrastive loss: the keyword toward key-slot\nstates of the full video, away from the twin's")
    arrow(axis, (106, 36), (106, 18), GREEN)
    arrow(axis, (82, 37.5), (60, 18), GREEN)
    arrow(axis, (86, 27), (72, 18), RED)
    axis.text(1, 13.5, f'"{clip.keywords[0]}"', fontsize=10, weight="bold", color=GREEN, va="center")
    arrow(axis, (15, 13.5), (36, 13.5), GREEN)
    axis.text(15, 15, "its mean input embedding", fontsize=8)
    axis.text(59, 3.5, "L  =  L_LM  +  λ L_con", fontsize=12, ha="center")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def draw_fork(lm: VideoLM, example, path: Path) -> None:
    """A forked prompt with two rollouts of each side: which token sees which."""
    rollouts = [torch.arange(4), torch.arange(3)]
    packed = lm.pack_prefixes([example], [rollouts])
    mask, branch = packed.mask()[0, 0], packed.branch[0]
    names = [
        "prompt up to the first\nreplaced slot",
        "rest, full video",
        "rest, twin",
        "y1",
        "y2",
        "y1 (twin)",
        "y2 (twin)",
    ]
    figure, axis = plt.subplots(figsize=(8.5, 7))
    axis.imshow(mask.float(), cmap="Greens", vmin=0, vmax=1.4, interpolation="nearest")
    for number, name in enumerate(names):
        places = (branch == number).nonzero().flatten()
        first, last = int(places[0]), int(places[-1])
        axis.axhline(last + 0.5, color=GREY, linewidth=0.6)
        axis.axvline(last + 0.5, color=GREY, linewidth=0.6)
        axis.text(len(branch) + 1, (first + last) / 2, name, va="center", fontsize=8)
    axis.set(
        xlabel="token that is seen",
        ylabel="token that sees",
        title="One sequence: a prompt, its twin, and what follows each",
    )
    axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Make a small world and a tiny model, and draw both pictures."""
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(WorldSettings(Path(folder, "world"), train=8, test=1, held_out=0, workers=1))
        checkpoint = build_tiny(Path(folder, "tiny"))
        preparation = Preparation(AutoProcessor.from_pretrained(checkpoint))
        clip = load_clips(world / "train.jsonl")[0][0]
        example = prepare(clip, preparation)
        draw_pipeline(clip, read_frames(clip, 16), example, HERE / "pipeline.png")
        draw_fork(VideoLM(AutoModelForImageTextToText.from_pretrained(checkpoint)), example, HERE / "fork.png")


if __name__ == "__main__":
    main()
