"""The embedded world: a small, endless, seeded source of captioned videos with one brief event each.

Two or three coloured shapes drift or rest. One of them does one of eight things for 2 or 3 of the 16 frames and then
goes on as if nothing had happened: a caption names who did what, and nothing else in the video tells. Files are real
MP4s that take the road of any other clip: written here, decoded again by `data/clips.py`.

    python -m data.world --out runs/world                      # 6,000 train and 400 test clips
    python -m data.world --out runs/world80k --train 80000     # any size; resumable, one process a core

Sixteen combinations of shape, colour and action are kept from training, and the test split has no other actors. The
ground truth goes into the `truth` field of a line, which only evaluation reads;
training finds its key slots by looking at the frames.
"""

import json
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 235),
    "yellow": (235, 215, 40),
    "purple": (160, 50, 200),
}
ACTIONS = (
    "jumps up",
    "drops down",
    "swells up",
    "shrinks away",
    "falls flat",
    "splits in two",
    "flashes white",
    "turns black",
)
FLOORS = {"grey": (128, 128, 128), "dark": (72, 76, 88), "pale": (196, 192, 184), "brown": (134, 104, 84)}
OPENERS = ("The", "Suddenly the")
PIXELS, NUM_FRAMES, FPS = 48, 16, 8.0
# Sixteen of the 160 combinations of shape, colour and action: a test clip's actor is always one of these, a training
# clip's never. Each of their parts, and each pair of parts, is in the training split.
HELD_OUT = frozenset(np.random.default_rng(2).choice(4 * 5 * 8, 16, replace=False).tolist())
VERSION = 1  # part of every folder's settings: files of an older generator are never mixed with new ones


@dataclass
class WorldSettings:
    """Settings of `python -m data.world`."""

    out: Path = Path("runs/world")
    """Folder to write: train.jsonl, test.jsonl and one MP4 a clip."""
    train: int = 6000
    """Number of training clips."""
    test: int = 400
    """Number of test clips; their (shape, colour, action) combinations never occur in training."""
    seed: int = 0
    """Same seed, same frames."""
    workers: int | None = None
    """Processes (default: one a core)."""


def held_out(shape: int, colour: int, action: int) -> bool:
    """Whether an actor with these indices belongs to the test split.

    >>> sum(held_out(s, c, a) for s in range(4) for c in range(5) for a in range(8))
    16
    """
    return (shape * len(COLOURS) + colour) * len(ACTIONS) + action in HELD_OUT


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, wide: np.ndarray, tall: np.ndarray) -> np.ndarray:
    """Anti-aliased share of each pixel that a shape of two radii covers; dx, dy, the radii and the result broadcast."""
    x, y = dx / wide, dy / tall  # the shape's own frame, in which it is about one large
    ax, ay = np.abs(x), np.abs(y)
    distance = {
        "circle": np.hypot(x, y) - 1,
        "square": np.maximum(ax, ay) - 0.88,
        "triangle": np.maximum(0.87 * ax - 0.5 * y, y) - 0.62,
        "cross": np.maximum(np.minimum(ax, ay) - 0.36, np.maximum(ax, ay) - 1.05),
    }[shape]
    return np.clip(0.5 - distance * np.minimum(wide, tall), 0.0, 1.0)


def draw_clip(split: str, index: int, seed: int = 0) -> tuple[np.ndarray, dict]:
    """One clip of the world.

    Returns its frames (NUM_FRAMES, PIXELS, PIXELS, 3) uint8 and its annotation line; both depend on the arguments only.
    """
    rng = np.random.default_rng([VERSION, seed, ("train", "test").index(split), index])
    shapes, colours = list(SHAPES), list(COLOURS)
    while True:  # the actor: drawn until it belongs to the split
        shape, colour, action = rng.integers(len(shapes)), rng.integers(len(colours)), rng.integers(len(ACTIONS))
        if held_out(shape, colour, action) == (split == "test"):
            break
    num_objects = int(rng.integers(2, 4))
    other_colours = rng.choice([c for c in range(len(colours)) if c != colour], num_objects - 1, replace=False)
    objects = [(shape, colour)] + [(int(rng.integers(len(shapes))), c) for c in other_colours]
    moves = rng.random(num_objects) < 0.5
    order = sorted(range(num_objects), key=lambda i: colours[objects[i][1]])  # a caption lists objects by colour
    start = int(rng.integers(2, NUM_FRAMES - 4))
    length = int(rng.integers(2, 4))

    # Starting places in a ring around the middle keep shapes apart; a drift is slow and straight.
    angle = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(num_objects) / num_objects + rng.uniform(-0.3, 0.3)
    centre = PIXELS / 2 + rng.uniform(11, 14) * np.stack([np.cos(angle), np.sin(angle)], 1)
    heading = rng.uniform(0, 2 * np.pi, num_objects)
    velocity = moves[:, None] * rng.uniform(0.2, 0.4) * np.stack([np.cos(heading), np.sin(heading)], 1)
    radius = rng.uniform(6.0, 8.0, num_objects)

    floor_name = rng.choice(list(FLOORS))
    ramp = np.linspace(-1, 1, PIXELS)[:, None] * rng.uniform(-14, 14)
    floor = np.asarray(FLOORS[floor_name], float) + rng.uniform(-8, 8) + ramp[..., None]  # (H, 1, 3)
    ys, xs = (np.mgrid[:PIXELS, :PIXELS] + 0.5).astype(np.float32)
    time = np.arange(NUM_FRAMES)
    event = (start <= time) & (time < start + length)  # (F,)
    video = np.broadcast_to(floor, (NUM_FRAMES, PIXELS, PIXELS, 3)).astype(np.float32)
    for i in order[::-1]:
        x, y = (centre[i] + velocity[i] * (time - NUM_FRAMES / 2)[:, None]).T  # (F,) each
        wide = tall = np.full(NUM_FRAMES, radius[i])
        paint = np.tile(np.asarray(COLOURS[colours[objects[i][1]]], np.float32), (NUM_FRAMES, 1))
        apart = np.zeros(NUM_FRAMES)  # half the distance between the two halves of a split shape
        if i == 0:
            name = ACTIONS[action]
            y = y + event * {"jumps up": -9, "drops down": 9}.get(name, 0)
            grown = {"swells up": (1.6, 1.6), "shrinks away": (0.5, 0.5), "falls flat": (1.7, 0.5)}
            grown = grown.get(name, (0.6, 0.6) if name == "splits in two" else (1, 1))
            wide, tall = (np.where(event, size * g, size) for size, g in zip((wide, tall), grown))
            apart = event * (6 if name == "splits in two" else 0)
            paint[event] = {"flashes white": 250, "turns black": 8}.get(name, paint[0])
        x, y, wide, tall, apart = (v.astype(np.float32)[:, None, None] for v in (x, y, wide, tall, apart))
        alpha = [coverage(shapes[objects[i][0]], xs - x - side, ys - y, wide, tall) for side in (apart, -apart)]
        alpha = np.maximum(*alpha)[..., None]  # (F, H, W, 1)
        video += alpha * (paint[:, None, None] - video)
    video += 3 * rng.standard_normal(video.shape, np.float32)
    frames = np.clip(video, 0, 255).astype(np.uint8)

    names = [f"{colours[c]} {shapes[s]}" for s, c in objects]
    parts = [f"a {names[i]}" for i in order]
    static = (", ".join(parts[:-1]) + " and " + parts[-1] + f" on a {floor_name} floor.").capitalize()
    caption = f"{static} {rng.choice(OPENERS)} {names[0]} {ACTIONS[action]}."
    truth = {"actor": names[0], "action": ACTIONS[action], "span": [start / FPS, (start + length) / FPS]}
    line = {"video": f"{split}/{index // 1000:03d}/{index:06d}.mp4", "caption": caption}
    return frames, line | {"keywords": [f"{names[0]} {ACTIONS[action]}"], "truth": truth | {"static": static}}


def write_clip(job: tuple[Path, str, int, int]) -> str:
    """Draw one clip, write its MP4 unless it is there already, and return its annotation line."""
    from torchcodec.encoders import VideoEncoder

    folder, split, index, seed = job
    frames, line = draw_clip(split, index, seed)
    path = folder / line["video"]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.mp4")
        encoder = VideoEncoder(torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(), frame_rate=FPS)
        same = {"x264-params": "cpu-independent=1:threads=1"}  # else x264's bytes vary from process to process
        encoder.to_file(partial, crf=12, preset="veryfast", extra_options=same)
        os.replace(partial, path)  # a kill leaves a whole file or none
    return json.dumps(line)


def make_world(settings: WorldSettings) -> Path:
    """Write the world's clips and annotation files; what is already there is kept. Returns the folder."""
    folder = settings.out
    folder.mkdir(parents=True, exist_ok=True)
    stamp = {"version": VERSION, "seed": settings.seed}
    stamp_file = folder / "world.json"
    if stamp_file.exists() and json.loads(stamp_file.read_text()) != stamp:
        raise ValueError(
            f"{folder}: holds a world of {stamp_file.read_text().strip()}, asked for {json.dumps(stamp)}. "
            "Choose another --out, or delete the folder."
        )
    stamp_file.write_text(json.dumps(stamp))
    for split, count in (("train", settings.train), ("test", settings.test)):
        annotations = folder / f"{split}.jsonl"
        if annotations.exists() and sum(1 for _ in annotations.open()) == count:
            continue
        jobs = [(folder, split, index, settings.seed) for index in range(count)]
        with multiprocessing.get_context("spawn").Pool(settings.workers or os.cpu_count()) as pool:
            lines = pool.imap(write_clip, jobs, chunksize=32)
            text = "".join(line + "\n" for line in track(lines, f"drawing the world ({split})", len(jobs)))
        partial = annotations.with_suffix(".partial")
        partial.write_text(text)
        os.replace(partial, annotations)
    return folder


if __name__ == "__main__":
    import tyro

    make_world(tyro.cli(WorldSettings))
