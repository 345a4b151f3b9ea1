"""One clip, inspected: where its keywords happen, and whether a twin of it would teach anything.

Grammar and motion need no model. A video-language model, or an image-text model, can be asked, too.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

import vp
from data import motion
from data.clips import named
from data.curation import finders
from data.curation.fingerprints import fingerprint
from data.curation.keywords import keyword_prompt, parse_keywords
from data.decode import Video
from data.examples import Preparation, make_example
from data.files import ClipError
from data.skim import choose_windows, motion_curve, skim
from data.video import Clip, Folder, Footage, Frames, part_of, read_clip, read_frames

MOMENTS = 4  # of a long file, looked at closely
SIDE = 64  # what motion and pictures are judged on: the longer side, in pixels


@dataclass
class Settings:
    """Settings of `python -m data.curation.curate`."""

    captions: tyro.conf.Positional[Path]
    """Annotation file (JSONL): video and caption a line; what else `data/clips.py` knows is kept."""
    out: tyro.conf.Positional[Path]
    """Folder to write."""
    root: Path | None = None
    """Folder of the videos (default: the annotation file's)."""
    follow_links: bool = False
    """Read videos that are links to files outside the root, as all files of a hub cache are."""
    keywords: Literal["grammar", "model"] = "grammar"
    """Where keywords come from: the caption's grammar (spaCy), or the video-language model (--model)."""
    finders: tuple[Literal["motion", "clip", "self"], ...] = ("motion",)
    """What finds the key spans; several are combined."""
    model: str | None = None
    """Video-language model of --finders self and --keywords model."""
    clip_model: str | None = None
    """Image-text model of --finders clip: a transformers CLIP or SigLIP directory or hub name."""
    text_encoder: str | None = None
    """sentence-transformers model that ranks keywords (default: order of appearance)."""
    max_keywords: int = 3
    """Keywords a caption, at most."""
    fps: float = 12.0
    """Frames looked at a second."""
    max_frames: int = 96
    """Frames looked at in a clip, at most."""
    min_seconds: float = 1.0
    """Shortest clip."""
    max_seconds: float = 180.0
    """Longest clip."""
    skim: bool = False
    """Find the event of longer files by a skim, instead of leaving them out; train on them with --frames skim."""
    min_confidence: float = 0.3
    """Least confidence of a key span."""
    max_key_share: float = 0.85
    """Largest share of a clip that may be key."""
    min_change: float = 6.0
    """How much the twin must differ from the full video where it differs most (0 to 255)."""
    duplicate_bits: int = 3
    """Bits of 64 in which the perceptual hashes of the same pictures may differ."""
    exclude: tuple[Path, ...] = ()
    """Annotation files of test sets, or folders of videos: their clips are left out."""
    target: int | None = None
    """How many clips to draw, evenly over actions and durations (default: all that are good)."""
    workers: int = max(1, os.cpu_count() or 1)
    """Processes that decode (0: none, and no time limit; models always run in this one)."""
    time_limit: float = 60.0
    """Seconds after which a decoder counts as hung; its clip is rejected."""
    part_lines: int = 64
    """Lines a part: what a kill costs at most."""
    samples: int = 50
    """Clips shown in the report."""
    seed: int = 0
    """Seed of the draw and of the sample."""


def twin_change(pixels: Tensor, key: Tensor, frames_per_slot: int) -> float:
    """How much the twin differs from the full video: the largest change of a block of a key frame, 0 to 255."""
    source = vp.twin_sources(key)
    if source is None:
        return 0.0
    slots = pixels.unflatten(0, (-1, frames_per_slot))
    change = motion.block_change(slots[key].flatten(0, 1), slots[source][key].flatten(0, 1)).amax(1)
    return float(change.max())


def inspect(clip: Clip, s: Settings, models: "Models | None" = None) -> dict:
    """Everything that is found out about one clip with keywords: a JSON record, `rejected` naming what is wrong with it."""
    try:
        with named(clip):
            return look_at(clip, s, models)
    except ClipError as error:
        return {"rejected": "unreadable", "detail": str(error)}


def look_at(clip: Clip, s: Settings, models: "Models | None") -> dict:
    """The same, for a clip that nothing goes wrong with. With --skim, a file that is too long to be looked at closely is
    skimmed, and its highest moments are looked at one by one, until one shows an event."""

    def moments(video: Video | Folder | Footage) -> tuple[float, list[list[float]]]:
        duration = part_of(clip, video)[1]
        if duration <= s.max_seconds or clip.key_spans:
            return duration, []
        pixels, times = skim(clip, video)
        return duration, choose_windows(motion_curve(pixels, times), times, MOMENTS, s.max_frames / s.fps, duration)

    duration, windows = read_clip(clip, moments) if s.skim else (0.0, [])
    record = None
    for begin, end in windows:
        near = replace(clip, start=clip.start + begin, end=clip.start + end)
        record = look_closely(near, s, models)
        record |= {"duration": round(duration, 3), "moment": [round(begin, 3), round(end, 3)]}
        spans = record.get("key_spans", [])  # from the beginning of the moment
        record["key_spans"] = [[[round(begin + t, 3) for t in x] for x in of_keyword] for of_keyword in spans]
        if "rejected" not in record:
            return record
    return record or look_closely(clip, s, models)


def look_closely(clip: Clip, s: Settings, models: "Models | None") -> dict:
    """The same, for a clip that is short enough."""
    frames_per_slot = 2
    side = SIDE if models is None else None  # models want to see more
    frames = read_frames(clip, s.max_frames, s.fps, frames_per_slot=frames_per_slot, side=side)
    pixels = motion.shrink(frames.pixels, SIDE)
    record = {"duration": round(frames.duration, 3)} | fingerprint(clip, pixels)
    if frames.duration < s.min_seconds:
        return record | {"rejected": "too short", "detail": f"{frames.duration:.2f} s"}
    if frames.duration > s.max_seconds:
        return record | {"rejected": "too long", "detail": f"{frames.duration:.2f} s"}
    if float(motion.block_change(pixels, pixels[:1]).max()) < 4:
        return record | {"rejected": "frozen", "detail": "no frame differs from the first"}
    evidence = []  # for each finder, of each keyword
    if "motion" in s.finders:
        evidence.append([motion.motion_evidence(pixels, frames.timestamps)] * len(clip.keywords))
    if "clip" in s.finders:
        evidence.append(finders.image_text_evidence(models.image_text, frames.pixels, clip.keywords))
    if "self" in s.finders:
        evidence.append(models.own_evidence(clip, frames))
    spans, curves, confidence, notes = [], [], [], []
    key = torch.zeros(len(frames.pixels) // frames_per_slot, dtype=torch.bool)
    given = clip.key_spans
    level = finders.peak_level(s.finders)
    for j, of_keyword in enumerate(zip(*evidence)):
        found = finders.combine(of_keyword) if len(of_keyword) > 1 else of_keyword[0]
        curve = found.curve.repeat_interleave(max(1, len(frames.pixels) // len(found.curve)))  # slots to frames
        found_spans = finders.spans_of(curve, frames.timestamps, frames.duration, frames_per_slot, level)
        spans.append(given[j] if given else found_spans)
        curves.append([round(float(x), 3) for x in curve / curve.max().clamp(min=1e-6)])
        confidence.append(1.0 if given else round(found.confidence, 4))
        notes += [note for note in found.notes if note not in notes]
        key |= vp.span_slots(spans[-1], frames.timestamps, frames_per_slot)
    kept = [j for j, (span, sure) in enumerate(zip(spans, confidence)) if span and sure >= s.min_confidence]
    share = float(key.float().mean())
    record |= {"key_spans": [[[round(t, 3) for t in x] for x in span] for span in spans], "confidence": confidence,
               "curves": curves, "key_share": round(share, 4), "notes": notes}  # fmt: skip
    if not kept:
        why = "; ".join(notes) or "no peak"
        return record | {"rejected": "no event found", "detail": f"confidence {max(confidence):.2f}: {why}"}
    if share > s.max_key_share:
        return record | {"rejected": "event fills the clip", "detail": f"{share:.0%} of the slots are key"}
    change = twin_change(pixels, key, frames_per_slot)
    if change < s.min_change:
        return record | {"rejected": "twin looks like the full video", "detail": f"largest change {change:.1f} of 255"}
    return record | {"kept": kept, "change": round(change, 2)}


class Models:
    """What needs a model: loaded once, used in the main process."""

    def __init__(self, s: Settings):
        self.image_text = finders.load_image_text(s.clip_model) if "clip" in s.finders else None
        self.lm = self.preparation = None
        if "self" in s.finders or s.keywords == "model":
            from safetensors.torch import load_file

            from data.run.models import find_checkpoint, load_model

            self.lm, processor = load_model(s.model)
            context = self.lm.config.text_config.max_position_embeddings
            self.preparation = Preparation(processor, s.max_frames, s.fps, context=context)
            heads = Path(find_checkpoint(s.model)) / "heads.safetensors"
            self.trained_heads = heads.exists()
            if self.trained_heads:
                self.lm.heads.load_state_dict(load_file(heads))

    def own_evidence(self, clip: Clip, frames: Frames) -> list[motion.Evidence]:
        """The video-language model's evidence of each keyword: by stage 1's heads if there are any."""
        everywhere = Clip(**vars(clip) | {"key_spans": [[[0.0, 1e-3]]] * len(clip.keywords)})  # not read here
        example = make_example(everywhere, frames, self.preparation)
        return (finders.head_evidence if self.trained_heads else finders.fall_evidence)(self.lm, example)

    def keywords(self, clip: Clip, limit: int, s: Settings) -> tuple[list, str]:
        """Keywords by asking the model, and why there are none."""
        asked = Clip(**vars(clip) | {"prompt": keyword_prompt(clip.caption), "keywords": [], "key_spans": None})
        with named(clip):
            frames = read_frames(asked, s.max_frames, s.fps, frames_per_slot=self.preparation.frames_per_slot)
            said = self.lm.describe([make_example(asked, frames, self.preparation)], twin=False, max_new_tokens=64)
        text = self.preparation.processor.batch_decode(said.tokens[0], skip_special_tokens=True)[0]
        return parse_keywords(text, clip.caption, limit)
