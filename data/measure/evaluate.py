"""Describe each clip and its twin, and look for the event in the words."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.distributed import ProcessGroup, get_world_size

import vp
from data.benchmarks.scoring import score_description
from data.checks import check_above_zero, check_limit, check_within
from data.clips import load_clips, named, reason_of
from data.curation.finders import skim_finder
from data.device import autocast
from data.examples import Preparation, make_example
from data.files import ClipError
from data.loader import ClipLoader
from data.look import look
from data.run.memory import EVAL_TOKENS, leave_out_long
from data.run.models import gathered, load_model
from data.run.processes import gather
from data.run.run import Run
from data.run.settings import FrameSettings, as_trained
from data.run.sheets import draw_look, printable, warn
from data.skim import SIDE
from data.video import PROMPT, Clip, read_clip
from data.videolm import VideoLM

EVAL_CLIPS = 32  # described at a time, as far as `VideoLM.roll_out` has room for them


def describe_batch(
    lm: VideoLM, processor, group: Sequence[tuple[int, vp.Example]], max_new_tokens: int, temperature: float
) -> list[tuple[str, str]]:
    """Descriptions of the full video and of the twin of each (clip index, example)."""
    numbers = None  # greedy
    if temperature > 0:
        draws = [np.random.default_rng([0, index]).random((2, max_new_tokens), np.float32) for index, _ in group]
        numbers = torch.from_numpy(np.stack(draws))
    examples = [example for _, example in group]
    with autocast(lm.device):
        described, _ = lm.roll_out(examples, 1, 1, max_new_tokens, numbers, temperature or 1.0, keep_video=False)
    tokens = described.to("cpu").tokens
    full, twin = (processor.batch_decode(t, skip_special_tokens=True) for t in tokens.unbind(1))
    return list(zip(full, twin))


def describe_group(
    lm: VideoLM, loader: ClipLoader, processor, group: Sequence[tuple[int, vp.Example]], max_new_tokens: int,
    temperature: float,
) -> list[tuple[int, vp.Example, str, str]]:  # fmt: skip
    """(clip index, example, description of the full video, of the twin). Where a batch fails, each clip is tried alone,
    and skipped if it fails alone, too: one whose video is too large, say."""
    try:
        said = describe_batch(lm, processor, group, max_new_tokens, temperature)
        return [(*pair, *texts) for pair, texts in zip(group, said)]
    except Exception as error:
        reason = reason_of(error)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(group) == 1:
        clip = loader.clips[group[0][0]]
        loader.skip(group[0][0], f"{clip.where}: {clip.video}: it cannot be described: {reason}")
        return []
    alone = (describe_group(lm, loader, processor, [pair], max_new_tokens, temperature) for pair in group)
    return [row for rows in alone for row in rows]


@torch.no_grad()  # not inference_mode: FSDP2 keeps buffers that it gathers here, and trains with them
def evaluate(
    lm: VideoLM,
    preparation: Preparation,
    clips: Sequence[Clip],
    batch_size: int = EVAL_CLIPS,
    max_new_tokens: int = EVAL_TOKENS,
    workers: int = 0,
    time_limit: float = 60.0,
    temperature: float = 0.0,
    rank: int = 0,
    peers: ProcessGroup | None = None,
) -> dict:
    """Describe every clip and its twin from one vision pass each, greedily or at a temperature, and average the scores.

    Twins are made from the truth's span if a clip has one, so that they are not as good as the finder. Clips that
    cannot be read or described are listed under "skipped" and are in no average; clips without a twin have scores on full
    only.
    Processes that are peers share the clips, and all of them get the results.
    """
    world_size = 1 if peers is None else get_world_size(peers)
    spans = {i: [[c.truth["span"]]] * len(c.keywords) for i, c in enumerate(clips) if "span" in (c.truth or {})}
    clips = [Clip(**vars(c) | {"key_spans": spans.get(i, c.key_spans)}) for i, c in enumerate(clips)]
    actions = {c.truth["action"] for c in clips if "action" in (c.truth or {})}
    shown = [replace(c, caption="") for c in clips]  # no model reads it here, however long it is
    loader = ClipLoader(shown, preparation, workers=workers, time_limit=time_limit, max_bad_share=math.inf, shuffle=False,
                        rank=rank, world_size=world_size)  # fmt: skip
    rows = []
    training = lm.training
    lm.eval()
    with loader, gathered(lm):
        stream = loader.examples(epochs=1)
        while group := list(islice(stream, batch_size)):
            described = describe_group(lm, loader, preparation.processor, group, max_new_tokens, temperature)
            for index, example, y, y_twin in described:
                row = {
                    "index": index,
                    "clip": clips[index].where,
                    "video": str(clips[index].video),
                    "description": y.strip(),
                }
                row["scores"] = score_description(clips[index], y, actions)
                if example.source is not None:
                    row |= {
                        "twin description": y_twin.strip(),
                        "twin scores": score_description(clips[index], y_twin, actions, of_twin=True),
                    }
                rows.append(row)
    lm.train(training)
    skipped = list(loader.skipped.values())
    if world_size > 1:
        rows, skipped = gather(rows, peers), gather(skipped, peers)
        rows.sort(key=lambda row: row["index"])
    results = {
        "clips": len(rows),
        "with twin": sum("twin scores" in r for r in rows),
        "full": {},
        "twin": {},
        "gap": {},
    }
    for name in dict.fromkeys(n for r in rows for n in r["scores"] | r.get("twin scores", {})):
        full = {r["index"]: r["scores"][name] for r in rows if name in r["scores"]}
        twin = {r["index"]: r["twin scores"][name] for r in rows if name in r.get("twin scores", {})}
        gap = [full[index] - twin[index] for index in full.keys() & twin.keys()]
        for part, values in (("full", full.values()), ("twin", twin.values()), ("gap", gap)):
            if values:
                results[part][name] = math.fsum(values) / len(values)
    return results | {"skipped": skipped, "rows": rows}


def show_results(results: dict, title: str, console: Console) -> None:
    """Print results as a table, and what was skipped by name."""
    table = Table(title=f"{escape(title)}: {results['clips']} clips, {results['with twin']} with a twin")
    for column in ("score", "full", "twin", "perception gap"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for name in results["full"] | results["twin"]:
        table.add_row(name, *(f"{results[p][name]:.3f}" if name in results[p] else "-" for p in ("full", "twin", "gap")))
    console.print(table)
    for reason in results["skipped"]:
        warn(console, "skipped", reason)


def show_progress(stages: Mapping[str, dict], console: Console) -> None:
    """Print evaluations of the same clips beside each other: every score of the full video, and of the twin."""
    table = Table(title="what was learned")
    for column in ("score", "of", *stages):
        table.add_column(escape(column), justify="left" if column in ("score", "of") else "right")
    for part, of in (("full", "video"), ("twin", "twin")):
        for name in dict.fromkeys(name for results in stages.values() for name in results[part]):
            cells = [f"{r[part][name]:.3f}" if name in r[part] else "-" for r in stages.values()]
            table.add_row(name, of, *cells)
    console.print(table)


def markdown_row(results: dict, title: str) -> str:
    """One line of a Markdown table: full / twin for every score."""
    cells = [f"{v:.3f} / {results['twin'].get(n, float('nan')):.3f}" for n, v in results["full"].items()]
    head = ["model", "clips", *(f"{n} (full / twin)" for n in results["full"])]
    lines = [head, ["---"] * len(head), [title, str(results["clips"]), *cells]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


@dataclass
class RunEvaluation:
    """The evaluations of a run: before its first step, between its steps, and after the last.

    Each is logged, shown, and written to results.json. Without clips there is none.
    """

    run: Run
    lm: VideoLM
    preparation: Preparation
    clips: Sequence[Clip]

    def before(self) -> None:
        """Of the model as it is. If the run was killed in the middle of an evaluation, that one is made again."""
        if self.run.resumed.path:
            self.between()
        elif self.clips and self.run.settings.eval_before:
            self.run.saved_extra["before"] = self.make() | {"rows": []}

    def between(self) -> None:
        """After every --eval-every steps, on the first --eval-clips clips."""
        if self.clips and self.run.due(self.run.settings.eval_every) and not self.run.is_last:
            self.make(self.run.settings.eval_clips)

    def after(self) -> dict | None:
        """On all clips, beside what was before; None if the run has ended early."""
        if not self.clips or self.run.step < self.run.settings.steps:
            return None
        results = self.make()
        if "before" in self.run.saved_extra:
            show_progress({"before": self.run.saved_extra["before"], "after": results}, self.run.console)
        return results

    def make(self, limit: int = -1) -> dict:
        """Evaluate the first `limit` clips (-1: all)."""
        run, s = self.run, self.run.settings
        clips = self.clips if limit < 0 else self.clips[:limit]
        results = evaluate(
            self.lm, self.preparation, clips, workers=s.workers, time_limit=s.time_limit, rank=run.rank, peers=run.peers
        )  # fmt: skip
        named = {f"eval/{part} {name}": value for part in ("full", "twin") for name, value in results[part].items()}
        run.log.write({"step": run.step} | named)
        if run.is_main and run.step:
            (s.out / "results.json").write_text(json.dumps(results | run.saved_extra, indent=1) + "\n")
        show_results(results, f"step {run.step}", run.console)
        run.mark = time.perf_counter()  # no part of a step
        return results


def evaluation_panel(results: dict | None) -> dict[str, list[str]]:
    """The panel of curves.png with a run's evaluations: full video and twin.

    >>> evaluation_panel({"full": {"event named": 0.5}})
    {'evaluation: event named': ['eval/full event named', 'eval/twin event named']}
    """
    name = "event named" if results and "event named" in results["full"] else "caption similarity"
    return {f"evaluation: {name}": [f"eval/full {name}", f"eval/twin {name}"]}


@dataclass
class EvalSettings(FrameSettings):
    """Describe clips and their twins, and score the descriptions."""

    model: str = "runs/sft"
    """A run's folder, a Hugging Face directory, or a name on the hub."""
    data: Path = Path("runs/world/test.jsonl")
    """Annotation file (JSONL)."""
    root: Path | None = None
    """Folder of the videos (default: the annotation file's)."""
    follow_links: bool = False
    """Read videos that are links to files outside the root, as all files of a hub cache are."""
    out: Path | None = None
    """Where results.json and row.md go (default: the run's folder, or runs/eval)."""
    limit: int = -1
    """Score only the first so many clips (-1: all)."""
    batch_size: int = EVAL_CLIPS
    """Clips described at a time."""
    max_new_tokens: int = 64
    """Longest description."""
    temperature: float = 0.0
    """Sample the descriptions at this temperature (0: greedy)."""
    max_frames: int | None = None
    """Frames sampled from a clip, at most (default: as in the run that trained the model, or 16)."""
    fps: float | None = None
    """Frames sampled a second (default: as in the run that trained the model, or max_frames, whatever the length)."""
    max_pixels: int | None = None
    """Height times width of a picture that the model sees, at most; larger ones are scaled down (default: as in the run
    that trained the model, or the processor's own limit)."""
    max_text_tokens: int | None = None
    """Tokens of a clip's prompt, at most; a clip with more is skipped (default: what the model's context leaves beside the
    video)."""
    cache: Path | None = None
    """Folder that keeps what was decoded and found for each clip."""
    workers: int = 1
    """Processes that decode ahead (0: none)."""
    time_limit: float = 60.0
    """Seconds after which a decoder counts as hung."""


@dataclass
class ProgressSettings:
    """Show what runs have learned: their last evaluations, and that before the first of them, beside each other."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs/sft"), Path("runs/rl"))
    """Folders of runs, in the order in which they built on each other."""


@dataclass
class DescribeSettings(FrameSettings):
    """Describe one video file."""

    video: tyro.conf.Positional[Path]
    """The video file."""
    model: str = "runs/sft"
    """A run's folder, a Hugging Face directory, or a name on the hub."""
    prompt: str = PROMPT
    """What to ask."""
    look_for: str | None = None
    """--frames skim: a keyword or a question, for --finder self and clip."""
    finder: Literal["motion", "self", "clip"] = "motion"
    """--frames skim: what says where something happens: pictures alone, this model, or an image-text model."""
    clip_model: str | None = None
    """Image-text model of --finder clip: a transformers CLIP or SigLIP directory or hub name."""
    picture: Path | None = None
    """--frames skim: where to draw the curve, the windows and some frames (default: runs/describe/NAME.png)."""
    max_new_tokens: int = 128
    """Longest description."""
    max_frames: int | None = None
    """Frames sampled, at most (default: as in the run that trained the model, or 16)."""
    fps: float | None = None
    """Frames sampled a second (default: as in the run that trained the model, or max_frames, whatever the length)."""
    max_pixels: int | None = None
    """Height times width of a picture that the model sees, at most; larger ones are scaled down (default: as in the run
    that trained the model, or the processor's own limit)."""


def run_evaluation(settings: EvalSettings, console: Console) -> dict:
    """The command `python eval.py`."""
    numbers = ("batch_size", "max_new_tokens", "max_frames", "fps", "max_pixels", "max_text_tokens", "time_limit")
    check_above_zero(settings, *numbers)
    check_limit(settings, "limit")
    check_within(settings, 0, math.inf, "workers", "temperature")
    settings.check_frames()
    clips, problems = load_clips(settings.data, settings.root, settings.follow_links)
    lm, processor = load_model(settings.model)
    if settings.limit >= 0:
        clips = clips[: settings.limit]
    s, context = as_trained(settings, settings.model, console), lm.config.text_config.max_position_embeddings
    preparation = Preparation(
        processor, s.max_frames, s.fps, max_pixels=s.max_pixels, context=context - s.max_new_tokens,
        visual_tokens=s.visual_tokens, skim=s.how_to_look(), cache=s.cache,
    )  # fmt: skip
    clips, too_long = leave_out_long(clips, preparation, s.max_text_tokens, captions=False)
    problems += too_long
    results = evaluate(lm, preparation, clips, s.batch_size, s.max_new_tokens, s.workers, s.time_limit, s.temperature)
    results["skipped"] = problems + results["skipped"]
    if not results["clips"]:
        listed = "\n  ".join(results["skipped"][:10])
        raise ClipError(f"{s.data}: no clip could be described:\n  {listed}")
    show_results(results, settings.model, console)
    model = Path(settings.model)
    out = settings.out or (model if (model / "checkpoint").exists() else Path("runs/eval"))
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "row.md").write_text(markdown_row(results, settings.model))
    console.print(f"{out / 'results.json'}, {out / 'row.md'}", highlight=False, markup=False)
    return results


def run_describe(settings: DescribeSettings, console: Console) -> str:
    """The command `python eval.py describe`."""
    check_above_zero(settings, "max_new_tokens", "max_frames", "fps", "max_pixels")
    settings.check_frames()
    s, clip = as_trained(settings, settings.model, console), Clip(settings.video, "", "describe", settings.prompt)
    if s.finder != "motion" and (s.frames != "skim" or s.look_for is None):
        raise ValueError(f"--finder {s.finder}: give --frames skim, and --look-for, what to look for")
    if s.finder == "clip" and s.clip_model is None:
        raise ValueError("--finder clip: give --clip-model")
    # Opened once before the model is loaded, which takes longer than to find that there is no such file.
    with named(clip):
        read_clip(clip, lambda video: None)
    lm, processor = load_model(s.model)
    context = lm.config.text_config.max_position_embeddings - s.max_new_tokens
    preparation = Preparation(
        processor, s.max_frames, s.fps, max_pixels=s.max_pixels, context=context,
        visual_tokens=s.visual_tokens, skim=s.how_to_look(),
    )  # fmt: skip
    with named(clip):
        found = look(
            clip, preparation.skim, preparation.sizes, preparation.frames_per_slot, preparation.max_frames,
            preparation.fps, s.visual_tokens,
            find=skim_finder(s.finder, s.look_for, lm, preparation, s.model, s.clip_model),
            side=SIDE if s.finder == "motion" else 224,
        )  # fmt: skip
        example = make_example(clip, found, preparation)
        described = lm.describe([example], twin=False, max_new_tokens=s.max_new_tokens)
    text = processor.batch_decode(described.tokens[0], skip_special_tokens=True)[0].strip()
    console.print(f"frames at {' '.join(f'{t:.2f}' for t in found.timestamps)} s", highlight=False)
    if s.frames == "skim":
        console.print(found.note, highlight=False)
        for i, (start, end) in enumerate(found.spans, 1):
            console.print(f"moment {i}: {start:.2f} to {end:.2f} s", highlight=False)
        drawn = draw_look(found, s.picture or Path("runs/describe") / f"{s.video.stem}.png")
        console.print(f"{drawn}", highlight=False, markup=False, soft_wrap=True)
    console.print(printable(text), highlight=False, markup=False)
    return text


def run_progress(settings: ProgressSettings, console: Console) -> None:
    """The command `python eval.py progress`."""
    stages = {}
    for run in settings.runs:
        if not (run / "results.json").exists():
            raise ValueError(f"{run}: there is no results.json; give the folder of a run that has come to its end")
        results = json.loads((run / "results.json").read_text())
        if not stages and "before" in results:
            stages["before"] = results["before"]
        stages[str(run)] = results
    show_progress(stages, console)
    for pattern in ("curves.png", "sheet-*.png", "rollouts.html"):  # where to look
        for path in (path for run in settings.runs for path in sorted(run.glob(pattern))):
            console.print(str(path), highlight=False, markup=False)
