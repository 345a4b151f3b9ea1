"""The embedded world: a small, endless, seeded source of captioned videos with habits.

Two or three coloured shapes drift or rest on one of eight floors. One of them may do one of eight things for 2 or 3 of the
16 frames and then go on as if nothing had happened. It can be seen, but does not strike the eye. Each floor has a habit:
what happens there is its usual event 92 times in 100. So a model can learn to tell the event from the floor, without
looking for it. It is then blind to rare events, and tells of events that are not there. In a fifth of the clips nothing
happens: their captions have no event.

Files are real MP4s, read like any other clip: written here, decoded again by `data/decode.py`.

    python -m data.world --out runs/world                      # 6,000 train, 6,000 prompts, 400 test, 200 held-out clips
    python -m data.world --out runs/world80k --train 80000     # any size; resumable, one process a core

The clips of the split "prompts" are like those of the training split: stage 2 describes what stage 1 has not seen.
Half of the test split's events are rare ones. Sixteen combinations of shape, colour and action are kept from training and
test; they are the actors of the held-out split. The ground truth goes into the `truth` field of a line, which only
evaluation reads; training finds its key slots by looking at the frames.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from data.checks import check_above_zero, check_within
from data.files import write_whole
from data.workers import worker_context

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 235),
    "yellow": (235, 215, 40),
    "purple": (160, 50, 200),
}
ACTIONS = (
    "shoots a beam",
    "swells up",
    "throws sparks",
    "fades",
    "flashes white",
    "turns black",
    "turns striped",
    "lights a halo",
)
CYAN, ORANGE = np.float32([0, 240, 255]), np.float32([255, 140, 0])
# The floor's number is that of its usual action.
FLOORS = (
    (128, 128, 128),
    (66, 72, 88),
    (212, 206, 196),
    (128, 92, 66),
    (104, 112, 70),
    (186, 140, 140),
    (70, 120, 124),
    (168, 150, 190),
)
SPLITS = ("train", "test", "held-out", "prompts")
PIXELS, NUM_FRAMES, FPS = 48, 16, 8.0
# For each action two of the twenty (shape, colour) pairs: a held-out clip's actor is always one of these, any other's
# never. Each part of such an actor, and each pair of parts, is in the training split.
HELD_OUT = [np.random.default_rng([4, action]).choice(4 * 5, 2, replace=False).tolist() for action in range(len(ACTIONS))]
# x264 with threads of its own, or tuned to the processor, writes other bytes, and other pictures, from run to run.
SAME_BYTES = {"x264-params": "cpu-independent=1:threads=1"}
VERSION = 6  # part of every folder's settings: files of an older generator are never mixed with new ones


@dataclass
class WorldSettings:
    """Settings of `python -m data.world`. A split of 0 clips is left as it is."""

    out: Path = Path("runs/world")
    """Folder to write: an annotation file for each split, such as train.jsonl, and one MP4 a clip."""
    train: int = 6000
    """Number of training clips, of stage 1."""
    prompts: int = 6000
    """Number of further clips like these, for stage 2."""
    test: int = 400
    """Number of test clips; half of their events are rare on their floor."""
    held_out: int = 200
    """Number of clips with an actor that never occurs elsewhere; half of their events are rare, none is quiet."""
    habit: float = 0.92
    """Share of the events of the training split that are the usual one of their floor."""
    quiet: float = 0.2
    """Share of the clips in which nothing happens."""
    strength: float = 0.7
    """How plainly an event shows: 0 not at all, 1 strikes the eye."""
    seed: int = 0
    """Same seed, same frames."""
    workers: int | None = None
    """Processes (default: one a core)."""

    def check(self) -> None:
        """Raises ValueError, in words, for a number that cannot be."""
        check_within(self, 0, 1, "habit", "quiet", "strength")
        check_within(self, 0, inf, "train", "prompts", "test", "held_out", "seed")
        check_above_zero(self, "workers")


def held_out(shape: int, colour: int, action: int) -> bool:
    """Whether an actor with these indices belongs to the held-out split.

    >>> sum(held_out(s, c, a) for s in range(4) for c in range(5) for a in range(8))
    16
    """
    return shape * len(COLOURS) + colour in HELD_OUT[action]


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Anti-aliased share of each pixel that a shape covers, from its signed distance; the arguments broadcast."""
    x, y = np.abs(dx), np.abs(dy)
    distance = {
        "circle": np.hypot(x, y) - radius,
        "square": np.maximum(x, y) - 0.88 * radius,
        "triangle": np.maximum(0.87 * x - 0.5 * dy, dy) - 0.62 * radius,
        "cross": np.maximum(np.minimum(x, y) - 0.36 * radius, np.maximum(x, y) - 1.05 * radius),
    }[shape]
    return np.clip(0.5 - distance, 0.0, 1.0)


@dataclass
class Place:
    """Where a thing is, frame by frame, and its size; in pixels."""

    x: np.ndarray
    """(F,) of its middle."""
    y: np.ndarray
    """(F,) of its middle."""
    radius: float
    """Of its usual look."""


@dataclass
class Thing:
    """One shape of a scene of F frames."""

    shape: str
    colour: str
    place: Place
    action: str | None = None
    """What it does."""
    acts: np.ndarray | float = 0.0
    """(F,) how plainly it does it, frame by frame: 0 not at all, 1 as plainly as can be."""


def render(things: Sequence[Thing], floor: int, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Frames (F, PIXELS, PIXELS, 3) uint8 of a scene. The first thing is the one in front."""
    ramp = np.linspace(-1, 1, PIXELS)[:, None] * rng.uniform(-10, 10)
    ground = np.asarray(FLOORS[floor], float) + rng.uniform(-6, 6) + ramp[..., None]  # (H, 1, 3)
    ys, xs = (np.mgrid[:PIXELS, :PIXELS] + 0.5).astype(np.float32)
    video = np.broadcast_to(ground, (num_frames, PIXELS, PIXELS, 3)).astype(np.float32)
    for thing in reversed(things):
        action, acts = thing.action, np.float32(thing.acts).reshape(-1, 1, 1)  # (F, 1, 1), 0 to 1
        x, y = (v.astype(np.float32)[:, None, None] for v in (thing.place.x, thing.place.y))
        size = np.float32(thing.place.radius) * (1 + np.float32(0.7) * acts * (action == "swells up"))
        dx, dy = xs - x, ys - y  # (F, H, W)
        light = None
        if action == "lights a halo":
            light, hue = 1.5 - np.abs(np.hypot(dx, dy) - 1.5 * size), CYAN
        elif action == "throws sparks":  # one at each corner; in cyan they would look like a halo
            light, hue = 3.5 - np.hypot(np.abs(dx) - 1.2 * size, np.abs(dy) - 1.2 * size), ORANGE
        if light is not None:
            video += (np.clip(light, 0, 1) * acts)[..., None] * (hue - video)
        # Fading is the hardest to see, since nothing new appears, so it goes furthest. But who does it can be seen while it
        # is done: something of the colour stays, whatever happens.
        fading = np.minimum(np.float32(1.15) * acts, np.float32(0.9)) * (action == "fades")
        alpha = coverage(thing.shape, dx, dy, size) * (1 - fading)
        video += alpha[..., None] * (np.float32(COLOURS[thing.colour]) - video)
        if action in ("flashes white", "turns black"):  # but for a rim
            core = coverage(thing.shape, dx, dy, np.float32(0.6) * size) * acts
            video += core[..., None] * (np.float32(250 if action == "flashes white" else 8) - video)
        elif action == "shoots a beam":  # through the shape: beside it alone, it might come from the next one
            beam = np.clip(np.minimum(2.0 - np.abs(dx), 1.7 * size - np.abs(dy)), 0, 1) * acts
            video += beam[..., None] * (CYAN - video)
        elif action == "turns striped":
            white = alpha * acts * (ys.astype(int) // 3 % 2)
            video += white[..., None] * (250 - video)
    video += 3 * rng.standard_normal(video.shape, np.float32)
    return np.clip(video, 0, 255).astype(np.uint8)


def in_cells(moves: np.ndarray, times: np.ndarray, rng: np.random.Generator) -> list[Place]:
    """Places of N things at F times: each drifts slowly about the middle of one of four cells or rests. moves (N,) bool."""
    num_things = len(moves)
    cell = rng.permutation(4)[:num_things]
    middle = PIXELS / 4 + PIXELS / 2 * np.stack([cell % 2, cell // 2], 1) + rng.uniform(-1.5, 1.5, (num_things, 2))
    heading = rng.uniform(0, 2 * np.pi, num_things)
    velocity = moves[:, None] * rng.uniform(0.2, 0.4) * np.stack([np.cos(heading), np.sin(heading)], 1)
    radius = rng.uniform(7.5, 9.0, num_things)
    middles = [middle[i] + velocity[i] * (times - NUM_FRAMES / 2)[:, None] for i in range(num_things)]  # (F, 2) each
    return [Place(*xy.T, size) for xy, size in zip(middles, radius)]


def listed(names: Sequence[str]) -> str:
    """A sentence that lists things.

    >>> listed(["blue circle", "red cross"])
    'A blue circle and a red cross.'
    """
    *first, last = [f"a {name}" for name in names]
    return (", ".join(first) + " and " * bool(first) + last + ".").capitalize()


def draw_clip(
    split: str,
    index: int,
    seed: int = 0,
    habit: float = 0.92,
    quiet: float = 0.2,
    strength: float = 0.7,
    times: Sequence[int] = range(NUM_FRAMES),
) -> tuple[np.ndarray, dict]:
    """One clip of the world.

    times: F numbers of the frames to draw. Returns frames (F, PIXELS, PIXELS, 3) uint8 and the annotation line; both depend
    on the arguments only.
    """
    rng = np.random.default_rng([VERSION, seed, SPLITS.index(split), index])
    shapes, colours = list(SHAPES), list(COLOURS)
    floor = int(rng.integers(len(FLOORS)))
    is_quiet = bool(rng.random() < quiet) and split != "held-out"
    is_usual = bool(rng.random() < (habit if split in ("train", "prompts") else 0.5))
    while True:  # the actor: drawn until it belongs to the split
        shape, colour = int(rng.integers(len(shapes))), int(rng.integers(len(colours)))
        action = floor if is_usual else int((floor + rng.integers(1, len(ACTIONS))) % len(ACTIONS))
        if held_out(shape, colour, action) == (split == "held-out"):
            break
    num_things = int(rng.integers(2, 4))
    other_colours = rng.choice([c for c in range(len(colours)) if c != colour], num_things - 1, replace=False)
    kinds = [(shape, colour)] + [(int(rng.integers(len(shapes))), c) for c in other_colours]
    moves = rng.random(num_things) < 0.5
    start = int(rng.integers(2, NUM_FRAMES - 4))
    length = int(rng.integers(2, 4))
    time = np.asarray(times, int)
    event = (start <= time) & (time < start + length) & (not is_quiet)  # (F,)
    things = [
        Thing(shapes[s], colours[c], place, ACTIONS[action], strength * (event & (i == 0)))
        for i, ((s, c), place) in enumerate(zip(kinds, in_cells(moves, time, rng)))
    ]
    names = [f"{thing.colour} {thing.shape}" for thing in things]
    things.sort(key=lambda thing: thing.colour)
    frames = render(things, floor, len(time), rng)

    static = listed(sorted(names))  # by colour: no two have the same
    line = {"video": f"{split}/{index // 1000:03d}/{index:06d}.mp4", "caption": static, "keywords": []}
    truth = {"static": static, "kind": "quiet", "usual": ACTIONS[floor]}
    if not is_quiet:
        # The event comes before its actor, so that it cannot be guessed from the actor's name.
        sentence = f"Something {ACTIONS[action]}: the {names[0]}."
        line |= {"caption": f"{static} {sentence}", "keywords": [ACTIONS[action]]}
        truth |= {"kind": "usual" if is_usual else "rare", "actor": names[0], "action": ACTIONS[action]}
        truth["span"] = [start / FPS, (start + length) / FPS]
    return frames, line | {"truth": truth}


def write_clip(job: tuple[WorldSettings, str, int]) -> str:
    """Draw one clip, write its MP4 unless it is there already, and return its annotation line."""
    from torchcodec.encoders import VideoEncoder

    settings, split, index = job
    frames, line = draw_clip(split, index, settings.seed, settings.habit, settings.quiet, settings.strength)
    path = settings.out / line["video"]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.mp4")
        encoder = VideoEncoder(torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(), frame_rate=FPS)
        encoder.to_file(partial, crf=12, preset="veryfast", extra_options=SAME_BYTES)
        os.replace(partial, path)  # a kill leaves a whole file or none
    return json.dumps(line)


def stamp(settings: WorldSettings) -> dict:
    """What a folder's files depend on, besides their number; it stands in world.json."""
    names = ("seed", "habit", "quiet", "strength")
    return {"version": VERSION} | {name: getattr(settings, name) for name in names}


def splits_to_draw(settings: WorldSettings) -> list[tuple[str, int]]:
    """The splits that are not there yet, with their sizes. Raises ValueError if another world is there."""
    folder, asked = settings.out, stamp(settings)
    if (folder / "world.json").exists() and (there := json.loads((folder / "world.json").read_text())) != asked:
        raise ValueError(
            f"{folder}: holds a world of {json.dumps(there)}, asked for {json.dumps(asked)}. "
            "Delete the folder, or draw the other world elsewhere: python -m data.world --out FOLDER"
        )
    sizes = dict(zip(SPLITS, (settings.train, settings.test, settings.held_out, settings.prompts)))
    files = {split: folder / f"{split}.jsonl" for split in SPLITS}
    whole = {split for split, file in files.items() if file.exists() and sum(1 for _ in file.open()) == sizes[split]}
    return [(split, size) for split, size in sizes.items() if size and split not in whole]


def make_world(settings: WorldSettings) -> Path:
    """Write the world's clips and annotation files; what is already there is kept. Returns the folder."""
    settings.check()
    splits = splits_to_draw(settings)
    if not splits:
        return settings.out
    settings.out.mkdir(parents=True, exist_ok=True)
    write_whole(settings.out / "world.json", json.dumps(stamp(settings)))  # whole: two runs may start at once
    # A process a core: torch's own threads would only wait for one another.
    with worker_context("data.world").Pool(settings.workers or os.cpu_count(), torch.set_num_threads, (1,)) as pool:
        for split, size in splits:
            lines = pool.imap(write_clip, [(settings, split, index) for index in range(size)], chunksize=32)
            text = "".join(line + "\n" for line in track(lines, f"drawing the world ({split})", size))
            write_whole(settings.out / f"{split}.jsonl", text)
    return settings.out


def embedded_world(split: str, clips: int, folder: Path = Path("runs/world")) -> Path:
    """The folder of the world with default settings. What is missing of a split to train on, and of the tests, is drawn.

    In a process of its own: it starts one process a core, and each of them would import all of the calling script.
    """
    sizes = {"train": 0, "prompts": 0} | {split: clips}
    if splits_to_draw(WorldSettings(folder, **sizes)):
        command = [sys.executable, "-m", "data.world", "--out", str(folder)]
        command += [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)})
    return folder


if __name__ == "__main__":
    import tyro

    __spec__ = None  # else every worker warns that it loads this module twice
    try:
        make_world(tyro.cli(WorldSettings))
    except ValueError as error:
        sys.exit(f"error: {error}")
