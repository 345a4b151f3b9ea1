"""Another world of the same kind, to see whether what is measured on the embedded one holds elsewhere (docs/results.md).

Rings, diamonds, bars and stars on eight other floors do eight other things. Captions, habits, quiet clips, places and noise
are those of data/world.py; a frame changes about as much when something happens (mean distance over its pixels and colours
1,000 to 2,000; there 1,200 to 2,100). The shipped base has seen neither the shapes nor the floors.

    python -m docs.other_world --habit 0.95 --out runs/other-95
    python eval.py report --stage 1 --seeds 0 --data runs/other-95/train.jsonl --out runs/report-other-95
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.progress import track

from data import world
from data.world import COLOURS, PIXELS, Thing, WorldSettings, write_clip

SHAPES = ("ring", "diamond", "bar", "star")
ACTIONS = (
    "jumps aside",
    "splits in two",
    "becomes hollow",
    "drops a stone",
    "opens an eye",
    "grows a tail",
    "glows pink",
    "shrinks",
)
# The floor's number is that of its usual action.
FLOORS = (
    (40, 40, 44),
    (236, 236, 230),
    (150, 110, 150),
    (96, 140, 96),
    (200, 170, 120),
    (90, 60, 40),
    (120, 150, 190),
    (170, 100, 90),
)
# For each action two of the twenty (shape, colour) pairs, as in data/world.py.
HELD_OUT = [np.random.default_rng([9, action]).choice(4 * 5, 2, replace=False).tolist() for action in range(len(ACTIONS))]


@dataclass
class Settings:
    """Settings of `python -m docs.other_world`."""

    out: Path = Path("runs/other-world")
    """Folder to write."""
    habit: float = 0.92
    """Share of the events of the training split that are the usual one of their floor."""
    train: int = 6000
    """Number of training clips."""
    test: int = 400
    """Number of test clips."""
    held_out: int = 200
    """Number of clips with an actor that never occurs elsewhere."""


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Anti-aliased share of each pixel that a shape covers, from its signed distance; the arguments broadcast."""
    x, y = np.abs(dx), np.abs(dy)
    distance = {
        "ring": np.abs(np.hypot(x, y) - 0.72 * radius) - 0.28 * radius,
        "diamond": (x + y - 1.15 * radius) * 0.707,
        "bar": np.maximum(x - 1.05 * radius, y - 0.45 * radius),
        "star": np.hypot(x, y) - radius * (0.72 + 0.33 * np.cos(5 * np.arctan2(dy, dx))),
    }[shape]
    return np.clip(0.5 - distance, 0, 1)


def mixed(video: np.ndarray, share: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """A video (F, H, W, 3) with a colour over a share of each pixel (F, H, W), 0 to 1; a share beyond that is cut."""
    return video + np.clip(share, 0, 1)[..., None] * (np.float32(colour) - video)


def render(things: Sequence[Thing], floor: int, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Frames (F, PIXELS, PIXELS, 3) uint8 of a scene. The first thing is the one in front."""
    ramp = np.linspace(-1, 1, PIXELS) * rng.uniform(-10, 10)
    ground = np.asarray(FLOORS[floor], float) + rng.uniform(-6, 6) + ramp[:, None]  # (W, 3)
    ys, xs = (np.mgrid[:PIXELS, :PIXELS] + 0.5).astype(np.float32)
    video = np.broadcast_to(ground, (num_frames, PIXELS, PIXELS, 3)).astype(np.float32)
    for thing in reversed(things):
        acts = np.float32(thing.acts * np.ones(num_frames)).reshape(-1, 1, 1)  # (F, 1, 1), 0 to 1
        share = {action: acts * (action == thing.action) for action in ACTIONS}  # how plainly it does each thing
        x, y = (v.astype(np.float32)[:, None, None] for v in (thing.place.x, thing.place.y))
        radius = np.float32(thing.place.radius)
        size = radius * (1 - 0.75 * share["shrinks"])
        # Toward the middle, so that it stays in the picture.
        x = x + 7 * share["jumps aside"] * np.sign(PIXELS / 2 - x)
        dx, dy = xs - x, ys - y
        away = np.hypot(dx, dy)  # (F, H, W), pixels from its middle
        # What stands behind the shape.
        video = mixed(video, share["glows pink"] * np.clip(2.2 - away / (0.9 * radius), 0, 1), (255, 60, 200))
        tail = np.minimum(4.5 - np.abs(dy - dx), 2.5 - np.maximum(dx, -dx - 1.5 * radius))
        video = mixed(video, share["grows a tail"] * np.clip(tail, 0, 1), (255, 255, 255))
        # The shape, and what is missing of it.
        hole = away < 0.85 * radius if thing.shape == "ring" else coverage(thing.shape, dx, dy, 0.8 * size)
        gap = share["splits in two"] * np.clip(4.5 - np.abs(dx), 0, 1) + share["becomes hollow"] * hole
        video = mixed(video, coverage(thing.shape, dx, dy, size) * (1 - gap), COLOURS[thing.colour])
        # What stands in front of it.
        stone = 5 - np.hypot(dx, dy - 0.9 * radius * np.sign(PIXELS / 2 - y))
        video = mixed(video, share["drops a stone"] * np.clip(stone, 0, 1), (30, 255, 60))
        video = mixed(video, share["opens an eye"] * np.clip(6 - away, 0, 1), (250, 250, 250))
        video = mixed(video, share["opens an eye"] * np.clip(3 - away, 0, 1), (10, 10, 10))
    video = video + 3 * rng.standard_normal(video.shape, np.float32)
    return np.clip(video, 0, 255).astype(np.uint8)


def replace_the_world() -> None:
    """Put this world's parts in place of those of data/world.py, for the rest of this process."""
    world.SHAPES, world.ACTIONS, world.FLOORS, world.HELD_OUT = SHAPES, ACTIONS, FLOORS, HELD_OUT
    world.coverage, world.render = coverage, render


def main(s: Settings) -> None:
    """Write the clips and the annotation files."""
    settings = WorldSettings(s.out, s.train, test=s.test, held_out=s.held_out, habit=s.habit)
    settings.check()
    if s.out.exists():  # its clips would be kept, whatever world they are of
        raise ValueError(f"{s.out}: is there already; delete it, or name another folder with --out")
    s.out.mkdir(parents=True)
    replace_the_world()
    torch.set_num_threads(1)
    for split, count in (("train", s.train), ("test", s.test), ("held-out", s.held_out)):
        lines = [write_clip((settings, split, i)) for i in track(range(count), f"drawing another world ({split})")]
        (s.out / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except ValueError as error:
        sys.exit(f"error: {error}")
