"""Settings that both train scripts share, and how the command line is read."""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf
from pathlib import Path
from typing import Literal, TypeVar

import tyro
from rich.console import Console

from data.checks import check_above_zero, check_limit, check_within, flag
from data.device import best_device
from data.files import changes
from data.skim import Skim

PRESETS = ("tiny", "gpu-24gb", "gpu-80gb")
Settings = TypeVar("Settings", bound="TrainSettings")
Frames = TypeVar("Frames", bound="FrameSettings")


def by_preset(tiny: object, gpu_24gb: object, gpu_80gb: object):
    """A field whose default depends on --preset."""
    return field(default=tiny, metadata=dict(zip(PRESETS, (tiny, gpu_24gb, gpu_80gb))))


@dataclass(kw_only=True)
class FrameSettings:
    """Which frames of a clip are shown: settings of both train scripts and of eval.py."""

    frames: Literal["uniform", "skim"] = "uniform"
    """skim: look at a long video once, small, and then closely where something happens; see docs/long-videos.md."""
    visual_tokens: int | None = None
    """Visual tokens of a clip, at most, shared out among windows and what lies between (default: those of the frames)."""
    windows: int = 4
    """--frames skim: moments looked at closely, at most."""
    window_seconds: float = 2.0
    """--frames skim: seconds of each."""
    window_fps: float = 8.0
    """--frames skim: frames a second looked at in a window, at most."""
    skim_fps: float | None = None
    """--frames skim: frames a second of the first look; an event that is shorter than one of them may be missed (default:
    as in the run that trained the model, or 2)."""

    def check_frames(self) -> None:
        """Raise ValueError for what no frames can be chosen by."""
        check_above_zero(self, "visual_tokens", "windows", "window_seconds", "window_fps", "skim_fps")

    def how_to_look(self, at_key_spans: bool = False) -> Skim | None:
        """How long videos are looked at; at_key_spans: in training."""
        if self.frames == "uniform":
            return None
        return Skim(
            self.windows, self.window_seconds, self.skim_fps or Skim.fps, self.window_fps, at_key_spans=at_key_spans
        )


def as_trained(settings: Frames, model: str, console: Console | None = None) -> Frames:
    """A copy in which what eval.py was not told of the frames is as in the run that trained the model, if a run's folder or
    checkpoint is given: number and rate (the run's rate if neither is given), size of a picture, rate of the skim.

    What else is chosen in another way than in training is said on the console.
    """
    told, names = vars(settings), ["max_frames", "max_pixels", "skim_fps"]
    if told.get("max_frames") is None:
        names.append("fps")
    folder = Path(model)
    path = (folder.parent if folder.name.startswith("checkpoint") else folder) / "settings.json"
    run = {"max_frames": 16} | (json.loads(path.read_text())["settings"] if path.exists() else {})
    compared = ["frames", "visual_tokens"]
    if told["frames"] == run.get("frames") == "skim":
        compared += ["windows", "window_seconds", "window_fps"]
    other = changes({flag(n): run[n] for n in compared if n in run}, {flag(n): told[n] for n in compared if n in run})
    if other and console is not None:
        console.print(f"[yellow]not the frames of training: {', '.join(other)}", highlight=False, soft_wrap=True)
    return replace(settings, **{name: run.get(name) for name in names if name in told and told[name] is None})


@dataclass
class TrainSettings(FrameSettings):
    """What both stages are told. Fields with three defaults: of the presets tiny, gpu-24gb and gpu-80gb."""

    preset: Literal[PRESETS] = "tiny"
    """Hardware preset. The GPU presets are sized on paper, not yet measured."""
    data: Path | None = None
    """Annotation file, JSONL (default: the embedded world of data/world.py, made on the spot)."""
    root: Path | None = None
    """Folder of the videos (default: the annotation file's)."""
    follow_links: bool = False
    """Allow symbolic links that leave the folder of the videos, as hub caches have them."""
    eval_data: Path | None = None
    """Annotation file to evaluate on (default: the world's test split, or none)."""
    warmup: float = 0.05
    """Share of the steps that warms up."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    quantize: Literal["none", "nf4"] = by_preset("none", "nf4", "none")
    """nf4: the frozen weights in 4 bits (bitsandbytes), for LoRA on small cards."""
    lora_rank: int = by_preset(0, 16, 64)
    """Rank of LoRA adapters on the linear layers (0: train all weights)."""
    freeze_vision: bool = by_preset(False, True, True)
    """Leave the vision encoder as it is."""
    gradient_checkpointing: bool = by_preset(False, True, True)
    """Recompute layers in the backward pass to save memory."""
    shard: bool = False
    """Shard weights, gradients and optimizer over the processes (FSDP2), to train all weights of a large model."""
    memory_gb: float | None = None
    """Memory that a run may fill, in GiB (default: what the device has free). A run that would not fit does not start."""
    max_frames: int = by_preset(16, 32, 64)
    """Frames sampled from a clip, at most."""
    fps: float | None = by_preset(None, 2.0, 2.0)
    """Frames sampled a second (default: max_frames, whatever the length)."""
    max_pixels: int | None = by_preset(None, 256 * 28 * 28, None)
    """Height times width of a picture that the model sees, at most; larger ones are scaled down (default: the processor's
    own limit)."""
    skim_fps: float = by_preset(8.0, 2.0, 2.0)
    """--frames skim: frames a second of the first look; an event that is shorter than one of them may be missed."""
    cache: Path | None = None
    """Folder that keeps what was decoded and found for each clip: the next epoch reads it. With --jitter or --frames skim,
    a clip keeps its first draw."""
    max_text_tokens: int | None = None
    """Tokens of a clip's prompt and caption, at most; a clip with more is skipped (default: what the model's context leaves
    beside the video)."""
    workers: int = by_preset(1, 4, 8)
    """Processes that decode ahead (0: none, and no time limit)."""
    time_limit: float = 60.0
    """Seconds after which a decoder counts as hung, and its clip is skipped."""
    max_bad_share: float = 0.05
    """Share of clips that may be lost before the run stops."""
    max_bad_steps: int = 10
    """Updates in a row with NaN or Inf in loss or gradient (each is skipped and counted) after which the run stops."""
    eval_before: bool = True
    """Evaluate the model as it is before the first step, too."""
    eval_clips: int = 64
    """Clips of an evaluation before the last (-1: all)."""
    resume: bool = False
    """Continue from the newest whole checkpoint in --out, exactly as if nothing had happened; without one, start."""
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Send metrics there, too."""
    world_clips: int = 6000
    """Clips of the embedded world to train on; stage 2 has others than stage 1."""
    seed: int = 0
    """Seed of weights, order, jitter and sampling."""

    def check(self) -> None:
        """Raise ValueError for what no run can be made of."""
        if self.preset != "tiny" and best_device().type == "cpu":
            raise ValueError(
                f"--preset {self.preset}: torch finds no GPU here (python eval.py doctor tells more), and on a CPU a step "
                "would take minutes to hours; give --preset tiny with the settings that you want"
            )
        self.check_frames()
        check_within(self, 0, 1, "warmup", "max_bad_share")
        check_within(self, 0, inf, "workers", "lora_rank")
        check_within(self, 0, 2**32 - 1, "seed")
        check_limit(self, "eval_clips")
        if self.frames == "skim" and self.windows < 2:
            raise ValueError("--windows: got 1; training needs 2 or more, of which one shows no event")
        check_above_zero(self, "max_frames", "fps", "max_pixels", "max_text_tokens", "world_clips")
        check_above_zero(self, "grad_clip", "memory_gb", "time_limit", "max_bad_steps")
        if self.shard and self.quantize == "nf4":
            raise ValueError(
                "--shard with --quantize nf4: FSDP2 damages 4-bit weights (bitsandbytes issue 1945); give one of them"
            )


def of_preset(kind: type[Settings], preset: str) -> Settings:
    """The settings of a script with the defaults of a preset."""
    chosen = {f.name: f.metadata[preset] for f in fields(kind) if preset in f.metadata}
    return kind(**chosen | {"preset": preset})


def parse_settings(kind: type[Settings], description: str, arguments: Sequence[str] | None = None) -> Settings:
    """Read a script's command line. --preset is read first: it gives the other fields their defaults."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="tiny")
    preset = first.parse_known_args(arguments)[0].preset
    default = of_preset(kind, preset if preset in PRESETS else "tiny")  # tyro refuses another, and lists these
    return tyro.cli(kind, default=default, description=description, args=arguments)


def changed_settings(settings: TrainSettings, before: Mapping, free: Sequence[str]) -> list[str]:
    """What differs between a run's settings and those it is resumed with, except those that are free to change."""
    now = {k: str(v) for k, v in asdict(settings).items() if k not in free}
    return changes({flag(k): str(before.get(k)) for k in now}, {flag(k): v for k, v in now.items()})
