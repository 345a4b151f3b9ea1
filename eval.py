"""Measure a model: describe each clip and its twin, and look for the event in the words.

    python eval.py --model runs/sft --data runs/world/test.jsonl      # table, results.json, a Markdown row
    python eval.py describe VIDEO.mp4 --model runs/sft                # one file, one description
    python eval.py report                                             # the README's tables: trains what they need
    python eval.py report --stage 2
    python eval.py report --stage lora
    python eval.py cost                                               # what sharing prefixes saves in stage 2
    python eval.py merge runs/sft --out merged                        # fold a checkpoint's adapter into its model
    python eval.py cost --what questions                              # and in answering questions
    python eval.py run --benchmark mvbench --root MVBench --model runs/sft                           # answers, scores
    python eval.py run --benchmark mvbench --root MVBench --model runs/sft --twin --key-spans curated/clips.jsonl
    python eval.py run --benchmark clips --root clips.jsonl --model runs/sft --needle                # or --diff
    python eval.py score --benchmark mvbench --root MVBench --predictions runs/sft/mvbench.jsonl     # a public benchmark
    python eval.py score --compare a.official.json b.official.json    # two models on the same questions

A model that does not look at the event scores the same on the full video and on its twin: the difference is the
perception gap. Keyword recall is the share of a clip's keywords that stand, word for word, in the greedy description;
caption similarity is ROUGE-L F1 (package rouge-score) against the caption. Clips with a `truth` field (the embedded
world) add: action right (that action is named, and no other of the data set's), actor right (in the sentence that ends
the description), and similarity of the static part (all but that sentence).
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import vp
from data import answers, benchmarks, predictions, probes, videolm
from data.clips import PROMPT, Clip, ClipError, Preparation, load_clips, make_example, named, read_frames, reason_of
from data.cost import CostSettings, run_cost
from data.loader import ClipLoader
from data.memory import leave_out_long
from data.models import gathered, load_model, load_plain, load_pretrained, save_model
from data.report import ReportSettings, run_report
from data.runs import describe_environment
from data.score_report import read_results, show_comparison, show_scores
from data.scoring import score_description
from data.sheets import printable, warn


@dataclass
class EvalSettings:
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
    batch_size: int = 32
    """Clips described at a time."""
    max_new_tokens: int = 64
    """Longest description."""
    temperature: float = 0.0
    """Sample the descriptions at this temperature (0: greedy)."""
    max_frames: int = 16
    """Frames sampled from a clip, at most."""
    fps: float | None = None
    """Frames sampled a second (default: max_frames, whatever the length)."""
    max_pixels: int | None = None
    """Height times width of a picture that the model sees, at most; larger ones are scaled down (default: the processor's
    own limit)."""
    max_text_tokens: int | None = None
    """Tokens of a clip's prompt, at most; a clip with more is skipped (default: what the model's context leaves beside the
    video)."""
    workers: int = 1
    """Processes that decode ahead (0: none)."""
    time_limit: float = 60.0
    """Seconds after which a decoder counts as hung."""


@dataclass
class DescribeSettings:
    """Describe one video file."""

    video: tyro.conf.Positional[Path]
    """The video file."""
    model: str = "runs/sft"
    """A run's folder, a Hugging Face directory, or a name on the hub."""
    prompt: str = PROMPT
    """What to ask."""
    max_new_tokens: int = 128
    """Longest description."""
    max_frames: int = 16
    """Frames sampled, at most."""
    fps: float | None = None
    """Frames sampled a second (default: max_frames, whatever the length)."""
    max_pixels: int | None = None
    """Height times width of a picture that the model sees, at most; larger ones are scaled down (default: the processor's
    own limit)."""


@dataclass
class MergeSettings:
    """Fold the LoRA adapter of a checkpoint into its model: a plain Hugging Face directory."""

    model: tyro.conf.Positional[str]
    """A run's folder or a checkpoint."""
    out: Path = Path("runs/merged")
    """Folder to write."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: fold it into the 4-bit weights it was trained on, dequantised, in place of those they were made from."""


@dataclass
class ScoreSettings:
    """Score predictions on a public benchmark, or compare two results. Needs no model and no videos."""

    benchmark: Literal[benchmarks.NAMES] | None = None
    """Which benchmark; clips: one's own annotation file."""
    root: Path | None = None
    """Folder of the benchmark as it was downloaded; clips: the JSONL file, or a folder with clips.jsonl."""
    predictions: Path | None = None
    """Lines {"id", "response"} (.jsonl), {id: response} (.json), a run's folder, or the files, or a folder of them, that
    the authors of VRU-Accident, TempCompass, Video-MME and MotionBench publish or ask for."""
    protocol: Literal["official", "ours"] = "official"
    """Answer rule of the benchmark's authors, or one strict rule for all."""
    subtitles: bool = False
    """Video-MME: the predictions were made with subtitles."""
    follow_links: bool = False
    """Read videos that are links to files outside the root, as all files of a hub cache are."""
    videos: Path | None = None
    """clips: folder that the paths of the videos are relative to (default: the JSONL file's)."""
    text_encoder: str | None = None
    """dream-1k: a sentence-transformers model, directory or name on the hub."""
    compare: tuple[Path, Path] | None = None
    """Two results of this command, to be compared by a paired test."""


@dataclass
class RunSettings:
    """Ask a model a benchmark's questions, and score the answers. After a kill the same command goes on."""

    benchmark: Literal[benchmarks.NAMES]
    """Which benchmark; clips: one's own annotation file."""
    root: Path
    """Folder of the benchmark as it was downloaded; clips: the JSONL file, or a folder with clips.jsonl."""
    videos: Path | None = None
    """clips: folder that the paths of the videos are relative to, data.curate's --root (default: the JSONL file's)."""
    model: str = "runs/sft"
    """A run's folder, a Hugging Face directory, or a name on the hub: any video-language model."""
    out: Path | None = None
    """Folder of the predictions and results (default: BENCHMARK, or BENCHMARK-twin and the like, in the run's folder or in
    runs/answers)."""
    protocol: Literal["official", "ours"] = "official"
    """Prompt, frames and answer rule of the benchmark's authors, or the same for all."""
    subtitles: bool = False
    """Video-MME: show the subtitles."""
    follow_links: bool = False
    """Read videos that are links to files outside the root, as all files of a hub cache are."""
    twin: bool = False
    """Ask the same about the twins, too: the perception gap by category."""
    key_spans: Path | None = None
    """Lines with video (below the root) and key_spans, as data.curate writes them (default: those of the benchmark)."""
    needle: bool = False
    """clips: hide each clip in longer and longer footage of other clips; keyword recall as a curve."""
    lengths: tuple[int, ...] = (1, 2, 4, 8)
    """--needle: lengths of the footage, in clips."""
    diff: bool = False
    """clips: show full video and twin in one prompt: which has the event, and when?"""
    seed: int = 0
    """--needle, --diff: of the footage and of the order."""
    num_frames: int | None = None
    """Frames of a video (default: the protocol's)."""
    max_pixels: int | None = None
    """Height times width of a picture that the model sees, at most (default: the processor's own limit)."""
    max_new_tokens: int | None = None
    """Longest answer (default: the protocol's)."""
    limit: int = -1
    """Ask about the first so many videos, or parts of videos, only (-1: all). --needle: so many clips, at all lengths."""
    batch_size: int = 4
    """Videos at a time; all questions about a video are asked at once."""
    workers: int = 1
    """Processes that decode ahead (0: none, and no time limit)."""
    time_limit: float = 60.0
    """Seconds after which a decoder counts as hung."""


EVAL_TOKENS = 64  # the longest description of an evaluation in the middle of training


def describe_batch(
    lm: videolm.VideoLM, processor, group: Sequence[tuple[int, vp.Example]], max_new_tokens: int, temperature: float
) -> list[tuple[str, str]]:
    """Descriptions of the full video and of the twin of each (clip index, example)."""
    numbers = None  # greedy
    if temperature > 0:
        draws = [np.random.default_rng([0, index]).random((2, max_new_tokens), np.float32) for index, _ in group]
        numbers = torch.from_numpy(np.stack(draws))
    examples = [example for _, example in group]
    described, _ = lm.roll_out(examples, 1, 1, max_new_tokens, numbers, temperature or 1.0)
    full, twin = (processor.batch_decode(t, skip_special_tokens=True) for t in described.tokens.unbind(1))
    return list(zip(full, twin))


def describe_group(
    lm: videolm.VideoLM, loader: ClipLoader, processor, group: Sequence[tuple[int, vp.Example]], max_new_tokens: int,
    temperature: float,
) -> list[tuple[int, vp.Example, str, str]]:  # fmt: skip
    """(clip index, example, description of the full video, of the twin). Where a batch fails, each clip is tried alone,
    and skipped where it fails alone, too: one whose video is too large, say."""
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
    lm: videolm.VideoLM,
    preparation: Preparation,
    clips: Sequence[Clip],
    batch_size: int = 32,
    max_new_tokens: int = EVAL_TOKENS,
    workers: int = 0,
    time_limit: float = 60.0,
    temperature: float = 0.0,
    accelerator: Accelerator | None = None,
) -> dict:
    """Describe every clip and its twin from one vision pass each, greedily or at a temperature, and average the scores.

    Twins are made from the truth's span where a clip has one, so that they are not as good as the finder. Clips that
    cannot be read or described are listed under "skipped" and are in no average; clips without a twin have scores on full
    only.
    The processes of an accelerator share the clips, and all of them get the results.
    """
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    spans = {i: [[c.truth["span"]]] * len(c.keywords) for i, c in enumerate(clips) if c.truth}
    clips = [Clip(**vars(c) | {"key_spans": spans.get(i, c.key_spans)}) for i, c in enumerate(clips)]
    actions = {c.truth["action"] for c in clips if c.truth}
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
                        "twin scores": score_description(clips[index], y_twin, actions),
                    }
                rows.append(row)
    lm.train(training)
    skipped = list(loader.skipped.values())
    if world_size > 1:
        rows, skipped = gather_object(rows), gather_object(skipped)
        rows.sort(key=lambda row: row["index"])
    results = {
        "clips": len(rows),
        "with twin": sum("twin scores" in r for r in rows),
        "full": {},
        "twin": {},
        "gap": {},
    }
    for name in dict.fromkeys(n for r in rows for n in r["scores"]):
        scored = [r for r in rows if name in r["scores"]]
        paired = [r for r in scored if "twin scores" in r]
        results["full"][name] = sum(r["scores"][name] for r in scored) / len(scored)
        if paired:
            results["twin"][name] = sum(r["twin scores"][name] for r in paired) / len(paired)
            results["gap"][name] = sum(r["scores"][name] - r["twin scores"][name] for r in paired) / len(paired)
    return results | {"skipped": skipped, "rows": rows}


def show_results(results: dict, title: str, console: Console) -> None:
    """Print results as a table, and what was skipped by name."""
    table = Table(title=f"{escape(title)}: {results['clips']} clips, {results['with twin']} with a twin")
    for column in ("score", "full", "twin", "perception gap"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for name, value in results["full"].items():
        cells = [f"{results[part][name]:.3f}" if name in results[part] else "-" for part in ("twin", "gap")]
        table.add_row(name, f"{value:.3f}", *cells)
    console.print(table)
    for reason in results["skipped"]:
        warn(console, "skipped", reason)


def show_change(before: dict, after: dict, console: Console) -> None:
    """Print two evaluations of the same clips beside each other."""
    table = Table(title="before and after")
    for column in ("score", "full before", "full after", "change", "twin before", "twin after"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for name, value in before["full"].items():
        twins = [f"{r['twin'][name]:.3f}" if name in r["twin"] else "-" for r in (before, after)]
        change = after["full"][name] - value
        table.add_row(name, f"{value:.3f}", f"{after['full'][name]:.3f}", f"{change:+.3f}", *twins)
    console.print(table)


def markdown_row(results: dict, title: str) -> str:
    """One line of a Markdown table: full / twin for every score."""
    cells = [f"{v:.3f} / {results['twin'].get(n, float('nan')):.3f}" for n, v in results["full"].items()]
    head = ["model", "clips", *(f"{n} (full / twin)" for n in results["full"])]
    lines = [head, ["---"] * len(head), [title, str(results["clips"]), *cells]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def run_evaluation(settings: EvalSettings, console: Console) -> dict:
    """The command `python eval.py`."""
    lm, processor = load_model(settings.model)
    clips, problems = load_clips(settings.data, settings.root, settings.follow_links)
    if settings.limit >= 0:
        clips = clips[: settings.limit]
    s, context = settings, lm.config.text_config.max_position_embeddings
    preparation = Preparation(processor, s.max_frames, s.fps, max_pixels=s.max_pixels, context=context - s.max_new_tokens)
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


def run_merge(settings: MergeSettings, console: Console) -> Path:
    """The command `python eval.py merge`."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    hf, processor = load_pretrained(settings.model, dtype, settings.quantize)
    if (settings.out / "config.json").exists():
        raise ValueError(f"--out {settings.out}: there is a model already; give another folder")
    save_model(settings.out, hf, processor, merged=True, adapter=False)
    console.print(str(settings.out), highlight=False, markup=False)
    return settings.out


def run_describe(settings: DescribeSettings, console: Console) -> str:
    """The command `python eval.py describe`."""
    lm, processor = load_model(settings.model)
    s, clip = settings, Clip(settings.video, "", "describe", settings.prompt)
    context = lm.config.text_config.max_position_embeddings - s.max_new_tokens
    preparation = Preparation(processor, s.max_frames, s.fps, max_pixels=s.max_pixels, context=context)
    with named(clip):
        frames = read_frames(clip, s.max_frames, s.fps, frames_per_slot=preparation.frames_per_slot)
        example = make_example(clip, frames, preparation)
        described = lm.describe([example], twin=False, max_new_tokens=s.max_new_tokens)
    text = processor.batch_decode(described.tokens[0], skip_special_tokens=True)[0].strip()
    console.print(f"frames at {' '.join(f'{t:.2f}' for t in frames.timestamps)} s", highlight=False)
    console.print(printable(text), highlight=False, markup=False)
    return text


def run_score(settings: ScoreSettings, console: Console) -> dict:
    """The command `python eval.py score`: prints, and writes JSON and Markdown beside the predictions."""
    s = settings
    if s.compare is not None:
        compared = benchmarks.compare(*map(read_results, s.compare))
        show_comparison(compared, s.compare, console)
        return compared
    missing = [f"--{name}" for name in ("benchmark", "root", "predictions") if getattr(s, name) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} missing; give --benchmark, --root and --predictions, or --compare and two results"
        )
    benchmark = benchmarks.load_benchmark(s.benchmark, s.root, s.protocol, s.subtitles, s.follow_links, s.videos)
    responses, problems = predictions.read_predictions(s.predictions, benchmark)
    path = s.predictions.resolve() if s.predictions.is_dir() else s.predictions
    out = path.with_name(f"{path.name if path.is_dir() else path.stem}.{s.protocol}.json")
    if s.benchmark == "motionbench":
        submission = out.with_suffix(".submission.json")
        submission.write_text(json.dumps(benchmarks.submission(benchmark, responses), indent=1) + "\n")
        console.print(f"{submission}: for the leaderboard", highlight=False, markup=False, soft_wrap=True)
    if not any(q.id in responses for q in benchmark.questions if q.answer is not None):
        raise ClipError(f"{s.predictions}: every question that it answers has a hidden answer; nothing can be scored")
    encoder = None
    if s.text_encoder is not None:
        from data.texts import TextEncoder  # late: only one benchmark needs it

        encoder = TextEncoder(s.text_encoder)
    results = benchmarks.score(benchmark, responses, encoder)
    results |= {"problems": benchmark.problems + problems, "text encoder": s.text_encoder} | describe_environment()
    title = f"{s.benchmark}, {s.protocol}: {s.predictions.name}"
    report = show_scores(results, title, console)
    out.write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(report, "utf-8")
    console.print(f"{out}, {out.with_suffix('.md')}", highlight=False, markup=False, soft_wrap=True)
    return results


def check_run(s: RunSettings) -> None:
    """Raise ValueError that names every setting of `eval.py run` that cannot be."""
    numbers = ("batch_size", "num_frames", "max_new_tokens", "max_pixels", "time_limit")
    wrong = [name for name in numbers if getattr(s, name) is not None and not getattr(s, name) > 0]
    problems = [f"--{name.replace('_', '-')} {getattr(s, name)}: give a number above 0" for name in wrong]
    if s.limit != -1 and s.limit < 1:
        problems.append(f"--limit {s.limit}: give a number above 0, or -1 for all")
    if s.workers < 0:
        problems.append(f"--workers {s.workers}: give 0 or more")
    if not s.lengths or min(s.lengths) < 1 or len(set(s.lengths)) < len(s.lengths):
        problems.append(f"--lengths {' '.join(map(str, s.lengths))}: give different whole numbers of clips, each 1 or more")
    if s.needle and s.diff:
        problems.append("--needle --diff: two probes; give one at a time")
    if s.diff and s.twin:
        problems.append("--diff --twin: the twin is part of the question; leave --twin out")
    if problems:
        raise ValueError("; ".join(problems))


def first_parts(parts: Sequence[answers.Part], limit: int) -> list[answers.Part]:
    """All that is asked about the first `limit` videos, or parts of videos (-1: about all)."""
    keys = [(part.video, part.start, part.end) for part in parts]
    kept = set(list(dict.fromkeys(keys))[: None if limit < 0 else limit])
    return [part for part, key in zip(parts, keys) if key in kept]


def run_benchmark(settings: RunSettings, console: Console) -> dict:
    """The command `python eval.py run`: predictions as they come, then results.json and what it shows."""
    s = settings
    check_run(s)
    folder = s.videos or (s.root if s.root.is_dir() else s.root.parent)
    benchmark = benchmarks.load_benchmark(s.benchmark, s.root, s.protocol, s.subtitles, s.follow_links, s.videos)
    benchmark.num_frames = s.num_frames or benchmark.num_frames
    benchmark.max_pixels = s.max_pixels
    benchmark.max_new_tokens = s.max_new_tokens or benchmark.max_new_tokens
    spans, wrong_spans = answers.read_key_spans(s.key_spans, folder, s.follow_links) if s.key_spans else (None, [])
    parts, probe = answers.group_questions(benchmark, spans), "needle" * s.needle + "diff" * s.diff
    if probe:
        probes.own_clips(parts, probe)  # refuses what has none, before the model is loaded
    if s.twin and not any(part.spans for part in parts):
        raise ValueError("--twin: no question has key spans; give --key-spans FILE, as data.curate writes it")
    run = Path(s.model) if (Path(s.model) / "checkpoint").exists() else Path("runs/answers")
    apart = {"ours": s.protocol == "ours", "subtitles": s.subtitles, "twin": s.twin, probe: bool(probe)}
    out = s.out or run / "-".join([s.benchmark, *(name for name, asked in apart.items() if asked)])
    asked_about = list(dict.fromkeys(part.video for part in first_parts(parts, s.limit)))
    if not any(video.exists() for video in asked_about) and not (out / "predictions.jsonl").exists():
        hint = "; give --videos, the folder that their paths are relative to" if s.benchmark == "clips" else ""
        raise ClipError(f"none of the {len(asked_about)} videos exists, the first is {asked_about[0]}{hint}")
    hf, processor = load_plain(s.model)
    more = {"twin": s.twin, "probe": probe} | ({"lengths": s.lengths, "seed": s.seed} if probe else {})
    made_with = predictions.describe_run(benchmark, parts, hf, more)
    if s.needle:
        parts, left_out = probes.hide(parts, s.lengths, s.seed, None if s.limit < 0 else s.limit)
    else:
        parts, left_out = probes.pair(parts, s.seed) if s.diff else (parts, [])
        parts = first_parts(parts, s.limit)
    if not parts:
        listed = "\n  ".join(left_out[:10])
        raise ClipError(f"no question of {s.benchmark} can be asked:\n  {listed}")
    lines, twin_lines, num_problems = answers.answer(
        hf, processor, benchmark, parts, folder, out, made_with, console, s.twin, s.batch_size, s.workers, s.time_limit,
        [*benchmark.problems, *wrong_spans, *left_out],
    )  # fmt: skip
    asked = [q for part in parts for q in part.questions]
    if not any(q.id in lines.records for q in asked):
        raise ClipError(f"no question could be answered: {out / 'problems.txt'} says why; the same command tries again")
    about = {"made with": made_with, "problems": (out / "problems.txt").read_text().splitlines()} | describe_environment()
    if probe:
        report = probes.report_needle if s.needle else probes.report_differences
        results = report(parts, lines, twin_lines, out, console)
    elif s.benchmark == "dream-1k":
        console.print("score them with `eval.py score --text-encoder`, by an encoder of your choice", highlight=False)
        results = {}
    elif all(q.answer is None for q in asked):
        console.print("the answers of all questions asked are hidden: nothing is scored", style="yellow", highlight=False)
        results = {}
    else:
        if s.limit >= 0:
            benchmark.questions = asked
        results = benchmarks.score(benchmark, lines.responses())
        results["counts"]["missing videos"] = sum(not video.exists() for video in asked_about)
        shown = show_scores(results | {"problems": []}, f"{s.benchmark}, {s.protocol}: {s.model}", console)
        if twin_lines:
            gaps = answers.perception_gap(benchmark, lines.responses(), twin_lines.responses())
            shown += answers.show_gap(gaps, console)
            results["perception gap"] = gaps
        (out / "results.md").write_text(shown, "utf-8")
    (out / "results.json").write_text(json.dumps(results | about, indent=1) + "\n")
    console.print(
        f"{out}: predictions.jsonl, results.json; problems.txt: {num_problems}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return results


if __name__ == "__main__":
    console = Console()
    try:
        if sys.argv[1:2] == ["describe"]:
            run_describe(tyro.cli(DescribeSettings, args=sys.argv[2:], prog="eval.py describe"), console)
        elif sys.argv[1:2] == ["report"]:
            run_report(tyro.cli(ReportSettings, args=sys.argv[2:], prog="eval.py report"), console)
        elif sys.argv[1:2] == ["merge"]:
            run_merge(tyro.cli(MergeSettings, args=sys.argv[2:], prog="eval.py merge"), console)
        elif sys.argv[1:2] == ["score"]:
            run_score(tyro.cli(ScoreSettings, args=sys.argv[2:], prog="eval.py score"), console)
        elif sys.argv[1:2] == ["run"]:
            run_benchmark(tyro.cli(RunSettings, args=sys.argv[2:], prog="eval.py run"), console)
        elif sys.argv[1:2] == ["cost"]:
            run_cost(tyro.cli(CostSettings, args=sys.argv[2:], prog="eval.py cost"), console)
        else:
            run_evaluation(tyro.cli(EvalSettings, description=__doc__), console)
    except (ClipError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        goes_on = "; what is answered is kept, and the same command goes on" if sys.argv[1:2] == ["run"] else ""
        print(f"stopped{goes_on}", file=sys.stderr)
        sys.exit(130)  # the code of a command that Ctrl-C ended
