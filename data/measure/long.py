"""Long videos, measured: is the event looked at, how long does a skim take, what does a step cost.

    python eval.py long --what recall --data clips.jsonl --windows 8           # events in longer and longer footage
    python eval.py long --what skim --video HOUR.mp4                           # seconds and memory, and of decoding all
    python eval.py long --what step                                            # a training step at equal tokens
    python eval.py long --what footage --data runs/world/test.jsonl --out runs/long-test    # one event in 1 to 64 clips
    python eval.py long --what named --model runs/sft-long --out runs/long-test --visual-tokens 144   # is it named?

See docs/long-videos.md.
"""

import json
import multiprocessing
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data.checks import check_above_zero, check_limit
from data.clips import load_clips
from data.decode import Video, decode_packets
from data.examples import Preparation, make_example
from data.files import ClipError
from data.look import Look
from data.measure.evaluate import evaluate
from data.run.models import load_model
from data.run.settings import FrameSettings, as_trained
from data.skim import choose_windows, motion_curve, skim
from data.tiny import build_tiny
from data.video import Clip, Frames, part_of, read_clip, read_frames

TEMPORARY = Path("runs/tiny")


@dataclass
class LongSettings(FrameSettings):
    """Measure what skimming does for rare events in long videos."""

    what: Literal["recall", "skim", "step", "footage", "named"] = "recall"
    """recall: clips hidden in footage of the others: is the event looked at? skim: seconds and memory for a file. step: a
    training step on windows and context against one on uniform frames. footage: make long videos of an annotation file
    with truth. named: describe these, uniformly and skimmed, and look for the event in the words."""
    data: Path = Path("runs/world/test.jsonl")
    """recall, footage: annotation file with key spans, or with truth."""
    video: Path | None = None
    """skim: the file."""
    model: str | None = None
    """named: the model; recall: whose processor says what a picture costs (default: the tiny one, made on the spot)."""
    out: Path = Path("runs/long")
    """Folder of what is made and measured."""
    lengths: tuple[int, ...] = (1, 4, 16)
    """Lengths of the footage, in clips."""
    max_frames: int = 32
    """Frames of uniform sampling; what they cost is the budget of both (default of --visual-tokens)."""
    max_pixels: int | None = None
    """recall, named: height times width of a picture that the model sees, at most (default: as in the run that trained the
    model, or the processor's own limit)."""
    quiet: bool = False
    """recall: footage of the parts of other clips in which nothing is marked, instead of whole clips with their events."""
    limit: int = -1
    """recall, footage, named: the first so many clips (-1: all)."""
    seconds: float = 120.0
    """skim: how much of the file is decoded whole, for comparison; the time is multiplied."""
    seed: int = 0
    """Of footage and places."""


# --- Is the event looked at? ----------------------------------------------------------------------------------------------


def event_of(clip: Clip) -> list[float]:
    """[start, end] of a clip's event: its truth, or its first key span."""
    if clip.truth:
        return clip.truth["span"]
    if not clip.key_spans:
        raise ClipError(f"{clip.where}: no key spans; give them, or curate the clips")
    return clip.key_spans[0][0]


def with_event(s: LongSettings, console: Console) -> list[Clip]:
    """The clips of the annotation file in which something happens; quiet ones have nothing to be found."""
    clips, _ = load_clips(s.data)
    found = [clip for clip in clips if not clip.truth or "span" in clip.truth]
    if len(found) < len(clips):
        console.print(f"{len(clips) - len(found)} clips without an event are left out")
    return found


def hide(clip: Clip, others: Sequence[Clip], length: int, quiet: bool, rng: random.Random) -> tuple[Clip, list[float]]:
    """A clip among others, the whole `length` times as long (about, with whole clips), and its event's [start, end] there.

    quiet: only what comes before or behind the event of the others is shown, again and again if there is too little.
    """

    def seconds(c: Clip) -> float:
        return read_clip(c, lambda video: part_of(c, video)[1])

    own, footage, total = seconds(clip), [], 0.0
    order = rng.sample(list(others), len(others))
    while length > 1 and (total < (length - 1) * own if quiet else len(footage) < length - 1):
        for other in order:
            plain = replace(other, key_spans=None, keywords=[], truth=None)
            parts = [plain]
            if quiet:
                begin, end = event_of(other)
                parts = [replace(plain, end=begin), replace(plain, start=end, end=seconds(plain))]
                parts = [p for p in parts if p.end - p.start > 0.4]
            for part in parts:
                if total < (length - 1) * own if quiet else len(footage) < length - 1:
                    footage.append(part)
                    total += seconds(part)
    before = rng.randint(0, len(footage))
    offset = sum(seconds(c) for c in footage[:before])
    begin, end = event_of(clip)
    return replace(clip, key_spans=None, footage=footage, before=before), [offset + begin, offset + end]


def looked_at(look: Look, event: Sequence[float]) -> dict[str, float]:
    """Whether an event was looked at.

    window: a window holds half of it or more, or lies in it by half or more (uniform sampling has none). seen: two frames
    of it or more at full resolution. frames: how many.
    """
    full = max((f.pixels.shape[-2:].numel() for f in look.runs), default=0)
    inside = [t for f in look.runs if f.pixels.shape[-2:].numel() == full for t in f.timestamps if event[0] <= t < event[1]]
    half = 0.5 * min([event[1] - event[0], *(b - a for a, b in look.spans)])
    held = any(min(b, event[1]) - max(a, event[0]) >= half for a, b in look.spans)
    return {"window": float(held), "seen": float(len(inside) >= 2), "frames": float(len(inside))}


def measure_recall(s: LongSettings, console: Console) -> list[dict]:
    """Uniform sampling against the skim, at equal tokens, by length of the footage."""
    clips = with_event(s, console)
    s = as_trained(s, s.model) if s.model else s
    _, processor = load_model(s.model or str(build_tiny(TEMPORARY)))
    uniform = Preparation(processor, s.max_frames, max_pixels=s.max_pixels, visual_tokens=s.visual_tokens)
    ways = {"uniform": uniform, "skim": replace(uniform, skim=replace(s, frames="skim").how_to_look())}
    rows = []
    for length in s.lengths:
        for name, way in ways.items():
            found, duration, tokens, began = [], [], [], time.perf_counter()
            for i, clip in enumerate(clips if s.limit < 0 else clips[: s.limit]):
                others = [c for c in clips if c.video != clip.video]
                hidden, event = hide(clip, others, length, s.quiet, random.Random(f"{s.seed} {i} {length}"))
                look = way.look(hidden)
                found.append(looked_at(look, event) | {"windows": float(len(look.spans))})
                duration.append(look.runs[0].duration)
                tokens.append(look_tokens(look, way))
            mean = {k: sum(f[k] for f in found) / len(found) for k in found[0]}
            seconds = (time.perf_counter() - began) / len(found)
            row = {"length": length, "seconds": statistics.mean(duration), "frames chosen": name, **mean}
            rows.append(row | {"tokens": statistics.mean(tokens), "seconds to read": seconds})
            console.print(rows[-1], highlight=False)
    return rows


def look_tokens(look: Look, preparation: Preparation) -> int:
    """Visual tokens of a look."""
    count = 0
    for frames in look.runs:
        height, width = frames.pixels.shape[-2:]
        token = preparation.processor.video_processor.patch_size * preparation.processor.video_processor.merge_size
        tokens = (height // token) * (width // token) if look.sized else preparation.sizes(height, width).full_tokens
        count += len(frames.timestamps) // preparation.frames_per_slot * tokens
    return count


# --- Seconds and memory for a file ----------------------------------------------------------------------------------------


def measure(job: Callable, *arguments) -> tuple[object, float, float, int]:
    """Run a job: its result, seconds, CPU seconds, and the most bytes that this process and its children have held."""
    import torchcodec.decoders  # noqa: F401  a second or two that are not the file's

    who, began = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN), time.perf_counter()
    before = sum(x.ru_utime + x.ru_stime for x in map(resource.getrusage, who))
    found = job(*arguments)
    seconds, used = time.perf_counter() - began, [resource.getrusage(x) for x in who]
    cpu = sum(x.ru_utime + x.ru_stime for x in used) - before
    return found, seconds, cpu, sum(x.ru_maxrss for x in used) * 1024


def timed(job: Callable, *arguments) -> tuple[object, float, float, int]:
    """The same in a process of its own. What the job raises is raised here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, job, *arguments).result()


def skim_file(path: Path, fps: float, windows: int, seconds: float) -> tuple[int, list[list[float]]]:
    """Skim a file: how many pictures, and the windows."""
    clip = Clip(path, "", str(path))

    def run(video: Video) -> tuple[int, list[list[float]]]:
        pixels, times = skim(clip, video, fps)
        duration = part_of(clip, video)[1]
        return len(pixels), choose_windows(motion_curve(pixels, times), times, windows, seconds, duration)

    return read_clip(clip, run)


def decode_all(path: Path, seconds: float, pixels: bool) -> int:
    """Decode every frame of a file's first seconds, two threads, one after another; pixels: make arrays of them, too."""
    from torchcodec.decoders import ColorConverter, Demuxer

    demuxer, converter, count = Demuxer(path), ColorConverter(), 0
    stream = next(s for s in demuxer.streams if s._media_type == "video")
    for frame, _ in decode_packets(demuxer, stream.make_decoder(num_ffmpeg_threads=2)):
        if frame.pts_seconds > seconds:
            break
        count += 1
        if pixels:
            converter.convert(frame)
    return count


def measure_skim(s: LongSettings, console: Console) -> list[dict]:
    """The skim of a file, and decoding all of it."""
    if s.video is None:
        raise ValueError("--what skim: give --video FILE")
    clip = Clip(s.video, "", str(s.video))
    duration = read_clip(clip, lambda video: part_of(clip, video)[1])
    how = replace(s, frames="skim").how_to_look()
    (count, windows), seconds, cpu, peak = timed(skim_file, s.video, how.fps, how.windows, how.seconds)
    what = f"skim of {duration:.0f} s: {count} pictures, {len(windows)} windows"
    rows = [{"what": what, "seconds": seconds, "CPU seconds": cpu, "peak GiB": peak / 2**30, "CPU, times": 1.0}]
    part = min(s.seconds, duration)
    for name, pixels in (("all frames decoded", False), ("all frames decoded, and made arrays", True)):
        count, *taken, peak = timed(decode_all, s.video, part, pixels)
        seconds, whole = (x * duration / part for x in taken)
        what = f"{name}: {count} of {part:.0f} s, times {duration / part:.1f}"
        rows.append({"what": what, "seconds": seconds, "CPU seconds": whole, "peak GiB": peak / 2**30})
        rows[-1]["CPU, times"] = whole / cpu
    return rows


# --- A training step at equal tokens --------------------------------------------------------------------------------------


def random_look(runs: Sequence[tuple[float, float, int, int, int]], seed: int) -> Look:
    """A look of random pictures. runs: (begin, end, slots, side, number of the window) of each."""
    rng, frames, windows, last = np.random.default_rng(seed), [], [], []
    for begin, end, slots, side, number in runs:
        step = (end - begin) / (2 * slots)
        times = [begin + (i + 0.5) * step for i in range(2 * slots)]
        pixels = torch.from_numpy(rng.integers(0, 256, (2 * slots, 3, side, side)).astype(np.uint8))
        frames.append(Frames(pixels, times, 8.0, runs[-1][1], step))
        windows += [number] * slots
        last += [*times[2::2], end]
    return Look(frames, torch.tensor(windows), last, sized=True)


def measure_step(s: LongSettings, console: Console, pairs: int = 15) -> list[dict]:
    """Median seconds of a stage-1 step, windows and context against uniform slots of the same number of tokens, in turn."""
    torch.set_num_threads(1)
    lm, processor = load_model(s.model or str(build_tiny(TEMPORARY)))
    lm.train()
    # 16 slots of 64 tokens against 12 of 64 in three windows and 16 of 16 around them
    uniform = [(0.0, 64.0, 16, 192, 0)]
    mixed = [(0.0, 10.0, 4, 96, 0), (10.0, 12.0, 4, 192, 1), (12.0, 30.0, 4, 96, 0), (30.0, 32.0, 4, 192, 2),
             (32.0, 50.0, 4, 96, 0), (50.0, 52.0, 4, 192, 3), (52.0, 64.0, 4, 96, 0)]  # fmt: skip
    preparation, batches = Preparation(processor), {}
    for name, runs in (("uniform", uniform), ("windows and context", mixed)):
        clip = Clip(Path("random"), "a circle. Something swells up", "random", keywords=["swells up"])
        clip.key_spans = [[[10.0, 11.0]]]
        examples = [make_example(clip, random_look(runs, seed), preparation) for seed in range(2)]
        batches[name] = lm.collate(examples)
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(pairs):
        for name, batch in batches.items():
            began = time.perf_counter()
            out = lm(batch)
            (out.lm_loss / len(batch.label_ids) + out.contrastive_loss).backward()
            lm.zero_grad()
            seconds[name].append(time.perf_counter() - began)
    base = statistics.median(seconds["uniform"])
    ratios = [b / a for a, b in zip(*seconds.values())]
    tokens = {name: int((batch.token_types == 2).sum()) for name, batch in batches.items()}
    rows = []
    for name, x in seconds.items():
        row = {"frames": name, "tokens": tokens[name], "seconds": statistics.median(x)}
        row |= {"times uniform": statistics.median(x) / base}
        rows.append(row | {"median of pairs": 1.0 if name == "uniform" else statistics.median(ratios)})
    return rows


# --- The embedded world, long ---------------------------------------------------------------------------------------------


def lengthen(frames: Tensor, event: tuple[int, int], length: int, rng: np.random.Generator) -> tuple[Tensor, int]:
    """One event in `length` times as many frames: what comes before and behind it is played forward and backward again.

    frames (F, C, H, W); event: its first frame, and the first behind it. Returns the frames (length * F, C, H, W), and the
    number of frames that were put before the event's own first frame.
    """
    first, stop = event
    total = length * len(frames)
    at = first if length == 1 else int(rng.integers(2, total - (stop - first) - 2))
    rest = total - at - (stop - first)

    def swing(part: Tensor, count: int) -> Tensor:
        there = torch.cat([part, part.flip(0)[1:-1]]) if len(part) > 2 else part
        return there[torch.arange(count) % len(there)]

    before = swing(frames[:first].flip(0), at).flip(0)  # it ends with the frame that comes before the event
    return torch.cat([before, frames[first:stop], swing(frames[stop:], rest)]), at - first


def make_footage(s: LongSettings, console: Console) -> list[dict]:
    """Long videos of the clips of a world, one event each, and an annotation file for each length."""
    from torchcodec.encoders import VideoEncoder

    clips, rows = with_event(s, console), []
    clips = clips if s.limit < 0 else clips[: s.limit]
    for length in s.lengths:
        folder = s.out / f"{length}"
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for i, clip in enumerate(clips):
            frames = read_frames(clip, 10**6)
            begin, end = (round(t * frames.fps) for t in event_of(clip))
            rng = np.random.default_rng([s.seed, length, i])
            pixels, moved = lengthen(frames.pixels, (begin, end), length, rng)
            path = folder / f"{i:06d}.mp4"
            VideoEncoder(pixels.contiguous(), frame_rate=frames.fps).to_file(path, crf=12, preset="veryfast")
            span = [(begin + moved) / frames.fps, (end + moved) / frames.fps]
            truth = clip.truth | {"span": span}
            line = {"video": f"{length}/{path.name}", "caption": clip.caption, "keywords": clip.keywords, "truth": truth}
            lines.append(json.dumps(line | {"key_spans": [span] * len(clip.keywords)}) + "\n")
        (s.out / f"long-{length}.jsonl").write_text("".join(lines))
        rows.append({"length": length, "clips": len(lines), "file": str(s.out / f"long-{length}.jsonl")})
    everything = [(s.out / f"long-{length}.jsonl").read_text() for length in s.lengths]
    (s.out / "clips.jsonl").write_text("".join(everything))
    return rows


def measure_named(s: LongSettings, console: Console) -> list[dict]:
    """Event named by length, uniform against skim, at the same budget, beside the chance that uniform frames see it."""
    s = as_trained(s, s.model or "runs/sft")
    lm, processor = load_model(s.model or "runs/sft")
    uniform = Preparation(processor, s.max_frames, max_pixels=s.max_pixels, visual_tokens=s.visual_tokens)
    ways = {"uniform": uniform, "skim": replace(uniform, skim=replace(s, frames="skim").how_to_look())}
    rows = []
    for length in s.lengths:
        clips, _ = load_clips(s.out / f"long-{length}.jsonl")
        clips = clips if s.limit < 0 else clips[: s.limit]
        for name, way in ways.items():
            looks = [looked_at(way.look(clip), event_of(clip)) for clip in clips]
            results = evaluate(lm, way, clips)
            named = results["full"].get("event named", results["full"]["keyword recall"])  # without truth
            frames = {k: sum(look[k] for look in looks) / len(looks) for k in ("window", "seen")}
            seen_at_all = sum(look["frames"] > 0 for look in looks) / len(looks)
            rows.append({"length": length, "frames chosen": name, "clips": len(clips), "event named": named,
                         "one frame of it": seen_at_all, **frames})  # fmt: skip
    return rows


def run_long(settings: LongSettings, console: Console) -> list[dict]:
    """The command `python eval.py long`."""
    s = settings
    s.check_frames()
    check_above_zero(s, "max_frames", "max_pixels", "seconds")
    if not s.lengths or min(s.lengths) < 1:
        raise ValueError(f"--lengths: got {' '.join(map(str, s.lengths)) or 'none'}; give numbers of clips, each 1 or more")
    check_limit(s, "limit")
    measure = {"recall": measure_recall, "skim": measure_skim, "step": measure_step, "footage": make_footage,
               "named": measure_named}[s.what]  # fmt: skip
    rows = measure(s, console)
    table = Table(*rows[0], title=s.what)
    for row in rows:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()))
    console.print(table)
    s.out.mkdir(parents=True, exist_ok=True)
    (s.out / f"{s.what}.json").write_text(json.dumps({"settings": vars(s), "rows": rows}, indent=1, default=str) + "\n")
    return rows
