"""The tiny base model: what every run on the embedded world starts from, trained once and shipped as data/base.safetensors.

It is a tiny Qwen2.5-VL that describes still scenes, one to three shapes on a floor. It has never seen anything happen, nor
read a verb. So fine-tuning on the world teaches what fine-tuning of a real model teaches: to notice what happens.

    python -m data.base --out base.safetensors      # the same again, in minutes on a CPU core

Most steps show one slot of a scene, which is cheap and enough to learn shapes and colours; the last ones show whole clips,
so that text behind a video of that length has been seen. On another processor the numbers are rounded in another way, so
the file is not the same byte for byte.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import median

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, get_cosine_schedule_with_warmup

from data.checks import check_above_zero, check_within
from data.examples import Preparation, make_example
from data.tiny import BASE, build_tiny
from data.video import PROMPT, Clip, Frames
from data.videolm import VideoLM
from data.world import COLOURS, FLOORS, FPS, NUM_FRAMES, SHAPES, Thing, in_cells, listed, render
from vp import Example

WORLD = 1_000_000  # seed of the clips: of no world that is ever fine-tuned on
LEARNED = 0.1  # a caption loss below this; at 0.28 colours are told, and shapes guessed


@dataclass
class BaseSettings:
    """Settings of `python -m data.base`."""

    out: Path = BASE
    """File to write."""
    clips: int = 7000
    """Scenes that are shown in part."""
    whole_clips: int = 1000
    """Scenes that are shown whole, at the end."""
    steps: int = 1600
    """Steps on parts."""
    whole_steps: int = 200
    """Steps on whole clips."""
    batch_size: int = 32
    """Clips a step."""
    learning_rate: float = 1e-3
    """Peak learning rate (AdamW, linear warm-up, cosine to zero)."""
    seed: int = 0
    """Seed of weights, clips and order."""


def still_scene(index: int, times: Sequence[int]) -> tuple[np.ndarray, str]:
    """Frames (F, PIXELS, PIXELS, 3) uint8 of one to three things at rest or adrift, and its caption."""
    rng = np.random.default_rng([WORLD, index])
    num_things = int(rng.integers(1, 4))
    colours = rng.choice(sorted(COLOURS), num_things, replace=False)
    time = np.asarray(times, int)
    places = in_cells(rng.random(num_things) < 0.5, time, rng)
    things = [Thing(str(rng.choice(SHAPES)), str(c), place) for c, place in zip(colours, places)]
    things.sort(key=lambda thing: thing.colour)
    frames = render(things, int(rng.integers(len(FLOORS))), len(time), rng)
    return frames, listed([f"{thing.colour} {thing.shape}" for thing in things])


def still_example(index: int, times: Sequence[int], preparation: Preparation) -> Example:
    """The frames `times` of a still scene as an example; no file is written."""
    frames, caption = still_scene(index, times)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    shown = Frames(pixels, [t / FPS for t in times], NUM_FRAMES / FPS, FPS, 1 / FPS)
    return make_example(Clip(Path("still"), caption, f"still scene {index}", PROMPT), shown, preparation)


def main(s: BaseSettings) -> None:
    """Train and write the base."""
    check_above_zero(s, "steps", "whole_steps", "batch_size", "learning_rate")
    check_within(s, s.batch_size, inf, "clips", "whole_clips")
    console = Console()
    torch.set_num_threads(1)  # two threads would round in another way
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(Path(folder), seed=s.seed)
        lm = VideoLM(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32))
        preparation = Preparation(AutoProcessor.from_pretrained(folder), NUM_FRAMES)
    rng = np.random.default_rng(s.seed)
    starts = rng.integers(0, NUM_FRAMES - 1, s.clips)
    parts = [still_example(i, (start, start + 1), preparation) for i, start in enumerate(track(starts, "drawing parts"))]
    whole = [
        still_example(s.clips + i, range(NUM_FRAMES), preparation) for i in track(range(s.whole_clips), "drawing clips")
    ]
    optimizer = torch.optim.AdamW(lm.hf.parameters(), lr=s.learning_rate, weight_decay=0.01, fused=True)
    num_steps = s.steps + s.whole_steps
    schedule = get_cosine_schedule_with_warmup(optimizer, num_steps // 20, num_steps)
    losses = []
    for step in range(num_steps):
        examples = parts if step < s.steps else whole
        batch = lm.collate([examples[i] for i in rng.choice(len(examples), s.batch_size, replace=False)])
        loss = lm(batch, contrastive=False).lm_loss / len(batch.label_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.hf.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0 or step == num_steps - 1:
            console.print(f"step {step + 1} of {num_steps}: caption loss {losses[-1]:.4f}")
    tokenizer = preparation.processor.tokenizer
    tokens = json.dumps(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    # Tied weights once, in half the size. The tokens tell which row of the embedding is whose.
    weights = {name: w.detach().half().contiguous() for name, w in lm.hf.named_parameters()}
    save_file(weights, s.out, metadata={"format": "pt", "tokens": tokens})
    console.print(
        f"{s.out}: {s.out.stat().st_size / 2**20:.1f} MiB, sha256 {hashlib.sha256(s.out.read_bytes()).hexdigest()}"
    )
    # Shapes are learned all at once, or not yet. One step's loss may be an outlier.
    if (last := median(losses[-20:])) > LEARNED:
        console.print(f"its caption loss is {last:.2f}: it still guesses. Give --steps more, such as {3 * s.steps}")


if __name__ == "__main__":
    try:
        main(tyro.cli(BaseSettings))
    except ValueError as error:
        sys.exit(f"error: {error}")
