"""Draw the pictures of the docs: the pipeline, from a clip of the embedded world; a prompt's fork and its attention mask;
which part of the code imports which.

python -m docs.pictures          # docs/pipeline.png, docs/fork.png and docs/imports.png
"""

import ast
import tempfile
import textwrap
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from einops import rearrange
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle
from transformers import AutoModelForImageTextToText, AutoProcessor

from data.clips import load_clips
from data.examples import Preparation, prepare
from data.tiny import build_tiny
from data.video import read_frames
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
        (("full video", range(num_slots), GREEN, 41), ("twin", source, RED, 30))
    ):
        axis.text(1, y + 2.5, label, fontsize=10, va="center")
        for place, slot in enumerate(order):
            x = 13 + 5.6 * place
            axis.imshow(shown[slot], extent=(x, x + 5, y, y + 5), aspect="auto", interpolation="nearest", zorder=2)
            width, edge = (3, colour) if key[place] else (0.6, "#bbbbbb")
            axis.add_patch(Rectangle((x, y), 5, 5, fill=False, edgecolor=edge, linewidth=width, zorder=3))
        if row == 0:
            axis.text(13 + 5.6 * key.index(True) + 2.5, 47, "key slots", fontsize=8, color=GREEN, ha="center")
    axis.text(13 + 5.6 * key.index(True) + 2.5, 27.6, "shown as their neighbours", fontsize=8, color=RED, ha="center")
    box(axis, 62, 37, 15, 9, "vision encoder\nonce")
    box(axis, 62, 27, 15, 7, "twin: gather\nits tokens", RED)
    arrow(axis, (58.5, 43.5), (62, 43.5))
    arrow(axis, (69.5, 37), (69.5, 34), RED)
    box(axis, 82, 36, 26, 10, "language model, all layers\nstates after l: compared", GREEN)
    box(axis, 82, 27, 26, 7, "the event alone, l layers", RED)
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
    places = torch.arange(packed.branch.shape[1])
    mask, branch = packed.block_mask().mask_mod(0, 0, places[:, None], places), packed.branch[0]
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


# Parts of the code from top to bottom: files, and where the part is drawn.
PARTS = {
    "scripts": ("*.py", 22, 50),
    "data.measure": ("data/measure/*.py", 22, 40),
    "data.benchmarks": ("data/benchmarks/*.py", 0, 30),
    "data.curation": ("data/curation/*.py", 44, 30),
    "data.run": ("data/run/*.py", 22, 20),
    "data": ("data/*.py", 22, 10),
    "vp": ("vp.py", 22, 0),
    "kernels": ("kernels/*.py", 22, -10),
}


def count_imports(root: Path) -> tuple[dict[str, list[str]], Counter]:
    """The files of each part, and how many files of a part import something of another one."""
    files = {part: sorted(root.glob(pattern)) for part, (pattern, *_) in PARTS.items()}
    files["scripts"].remove(root / "vp.py")
    left_out = ("__init__", "bench", "check", "fit")  # commands beside the kernels, which look up at the method
    files = {part: [p for p in paths if p.stem not in left_out] for part, paths in files.items()}
    counts = Counter()
    for part, paths in files.items():
        for path in paths:
            nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
            names = {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
            # `from data.run import models` is of data.run as well.
            names |= {f"{n.module}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}
            names |= {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
            others = {max((p for p in PARTS if f"{name}.".startswith(f"{p}.")), key=len, default=part) for name in names}
            counts.update((part, other) for other in others - {part})
    return {part: [p.stem for p in paths] for part, paths in files.items()}, counts


def draw_imports(path: Path) -> None:
    """One box a part, with its files, and arrows to what it imports: all point down.

    An arrow that others make up for, such as that from the scripts to vp.py, is left out.
    """
    files, counts = count_imports(HERE.parent)
    figure, axis = plt.subplots(figsize=(8, 8.5))
    axis.set(xlim=(-1, 67), ylim=(-11, 57))
    axis.axis("off")

    def reaches(part: str, other: str) -> bool:
        return any(a == part and (b == other or reaches(b, other)) for a, b in counts)

    for part, other in counts:
        if not any(a == part and b != other and reaches(b, other) for a, b in counts):
            (_, x, y), (_, other_x, other_y) = PARTS[part], PARTS[other]
            arrow(axis, (x + 11, y), (other_x + 11, other_y + 6))
    for part, (_, x, y) in PARTS.items():
        names = ", ".join(name for name in files[part] if name != part) or "the method"
        wide = 10 * (len(names) > 150)  # more room on either side
        shown = textwrap.fill(names, 42 + 4 * wide)
        box = Rectangle((x - wide, y), 22 + 2 * wide, 6, facecolor="white", edgecolor=GREY, linewidth=1.4, zorder=3)
        axis.add_patch(box)
        axis.text(x + 11, y + 4.9, part, ha="center", va="center", fontsize=10, weight="bold", zorder=4)
        axis.text(x + 11, y + 2.1, shown, ha="center", va="center", fontsize=6, zorder=4)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Make a small world and a tiny model, and draw the pictures."""
    draw_imports(HERE / "imports.png")
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
