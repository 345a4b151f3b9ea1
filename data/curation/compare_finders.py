"""How good is each finder, where key spans are known?

python -m data.curation.compare_finders known.jsonl --root videos
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

import vp
from data.checks import check_above_zero
from data.clips import load_clips, named
from data.curation.finders import combine, image_text_evidence, peak_level, spans_of
from data.curation.inspection import Models
from data.curation.inspection import Settings as CurateSettings
from data.files import ClipError
from data.key_slots import find_key_slots
from data.motion import Evidence, motion_evidence, shrink
from data.video import read_frames


@dataclass
class BenchSettings:
    """Compare finders with the key spans of an annotation file: overlap, and whether the peak is inside."""

    data: tyro.conf.Positional[Path]
    """Annotation file (JSONL) with keywords and key_spans."""
    root: Path | None = None
    """Folder of the videos (default: the annotation file's)."""
    follow_links: bool = False
    """Read videos that are links to files outside the root, as all files of a hub cache are."""
    model: str | None = None
    """Checkpoint of stage 1, for the finder self."""
    clip_model: str | None = None
    """Image-text model, for the finder clip."""
    fps: float = 12.0
    """Frames looked at a second."""
    max_frames: int = 96
    """Frames looked at in a clip, at most."""


def main(s: BenchSettings) -> None:
    """Print a table, one row a finder; the middle of the clip, and all of it, are what a finder must beat."""
    check_above_zero(s, "fps", "max_frames")
    wanted = ("motion", *(["self"] if s.model else []), *(["clip"] if s.clip_model else []))
    about = dict(finders=wanted, model=s.model, clip_model=s.clip_model, fps=s.fps, max_frames=s.max_frames)
    models = Models(CurateSettings(s.data, Path(), **about))
    clips, problems = load_clips(s.data, s.root, s.follow_links)
    scores: dict[str, list[tuple[float, bool]]] = {}
    for clip in clips:
        try:
            with named(clip):
                frames = read_frames(clip, s.max_frames, s.fps)
                own = models.own_evidence(clip, frames) if s.model else []
        except ClipError as error:
            problems.append(str(error))
            continue
        times, duration, count = frames.timestamps, frames.duration, len(frames.pixels)
        found = {"motion": [motion_evidence(frames.pixels, times)] * len(clip.keywords)}
        brief = find_key_slots(shrink(frames.pixels).byte()).float()
        found["brief (median of 7 frames)"] = [Evidence(brief, 1.0)] * len(clip.keywords)
        middle = 1 - (torch.arange(count) / max(1, count - 1) - 0.5).abs()
        found["middle 70 %"] = [Evidence((middle > 0.65).float() + 0.01 * middle, 1.0)] * len(clip.keywords)
        if s.model:
            found["self"] = own
            found["motion self"] = [combine(pair) for pair in zip(found["motion"], found["self"])]
        if s.clip_model:
            found["clip"] = image_text_evidence(models.image_text, frames.pixels, clip.keywords)
        for name, of_keywords in found.items():
            for evidence, spans in zip(of_keywords, clip.key_spans or []):
                curve = evidence.curve.repeat_interleave(max(1, count // len(evidence.curve)))
                peak = times[int(curve.argmax())]
                got = vp.span_slots(spans_of(curve, times, duration, level=peak_level(name.split())), times)
                true = vp.span_slots(spans, times)
                overlap = float((got & true).sum() / (got | true).sum().clamp(min=1))
                scores.setdefault(name, []).append((overlap, spans[0][0] <= peak <= spans[0][1]))
    table = Table(title=f"{len(clips)} clips, {len(problems)} lines or files left out")
    for column in ("finder", "mean IoU of slots", "peak inside", "keywords"):
        table.add_column(column, justify="left" if column == "finder" else "right")
    for name, rows in scores.items():
        overlap, inside = (sum(x) / len(rows) for x in zip(*rows))
        table.add_row(name, f"{overlap:.3f}", f"{inside:.3f}", str(len(rows)))
    Console(emoji=False).print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(BenchSettings))
    except (ClipError, ValueError) as error:
        sys.exit(f"error: {error}")
