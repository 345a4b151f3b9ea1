"""The commands `eval.py score` and `eval.py run`."""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from data.benchmarks import ask, predictions, probes, questions
from data.benchmarks.parts import Part, group_questions, leave_out_long, read_key_spans, room
from data.benchmarks.report import read_results, show_comparison, show_scores
from data.benchmarks.results import answer_file, compare, score
from data.files import ClipError
from data.run.log import describe_environment
from data.run.models import load_plain
from data.run.settings import FrameSettings, as_trained


@dataclass
class ScoreSettings:
    """Score predictions on a public benchmark, or compare two results. Needs no model and no videos."""

    benchmark: Literal[questions.NAMES] | None = None
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
class RunSettings(FrameSettings):
    """Ask a model a benchmark's questions, and score the answers. After a kill the same command continues."""

    benchmark: Literal[questions.NAMES]
    """Which benchmark; clips: one's own annotation file."""
    root: Path
    """Folder of the benchmark as it was downloaded; clips: the JSONL file, or a folder with clips.jsonl."""
    videos: Path | None = None
    """clips: folder that the paths of the videos are relative to, --root of curation (default: the JSONL
    file's)."""
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
    """Lines with video (below the root) and key_spans, as curation writes them (default: those of the benchmark)."""
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
    """Height times width of a picture that the model sees, at most (default: as in the run that trained the model, or the
    processor's own limit)."""
    max_new_tokens: int | None = None
    """Longest answer (default: the protocol's)."""
    max_text_tokens: int | None = None
    """Tokens of a prompt without the video, at most; questions with more are left out (default: what the model reads)."""
    limit: int = -1
    """Ask about the first so many videos, or parts of videos, only (-1: all). --needle: so many clips, at all lengths."""
    batch_size: int = 4
    """Videos at a time; all questions about a video are asked at once."""
    workers: int = 1
    """Processes that decode ahead (0: none, and no time limit)."""
    time_limit: float = 60.0
    """Seconds after which a decoder counts as hung."""


def short_name(name: str, most: int = 200) -> str:
    """The name of a file, cut to so many bytes if it has more: systems take 255, and endings follow.

    >>> short_name("a.b"), short_name("ü" * 120, 200) == "ü" * 95 + "-e18ee079"
    ('a.b', True)
    """
    whole = name.encode("utf-8", "surrogateescape")
    if len(whole) <= most:
        return name
    return whole[: most - 10].decode("utf-8", "ignore") + f"-{zlib.crc32(whole):08x}"  # a number of its own for each


def run_score(settings: ScoreSettings, console: Console) -> dict:
    """The command `python eval.py score`: prints, and writes JSON and Markdown beside the predictions."""
    s = settings
    if s.compare is not None:
        compared = compare(*map(read_results, s.compare))
        show_comparison(compared, s.compare, console)
        return compared
    missing = [f"--{name}" for name in ("benchmark", "root", "predictions") if getattr(s, name) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} missing; give --benchmark, --root and --predictions, or --compare and two results"
        )
    benchmark = questions.load_benchmark(s.benchmark, s.root, s.protocol, s.subtitles, s.follow_links, s.videos)
    responses, problems = predictions.read_predictions(s.predictions, benchmark)
    path = s.predictions.resolve() if s.predictions.is_dir() else s.predictions
    out = path.with_name(f"{short_name(path.name if path.is_dir() else path.stem)}.{s.protocol}.json")
    if s.benchmark == "motionbench":
        submission = out.with_suffix(".submission.json")
        submission.write_text(json.dumps(answer_file(benchmark, responses), indent=1) + "\n")
        console.print(f"{submission}: for the leaderboard", highlight=False, markup=False, soft_wrap=True)
    if not any(q.id in responses for q in benchmark.questions if q.answer is not None):
        raise ClipError(f"{s.predictions}: every question that it answers has a hidden answer; nothing can be scored")
    encoder = None
    if s.text_encoder is not None:
        from data.texts import TextEncoder  # late: only one benchmark needs it

        encoder = TextEncoder(s.text_encoder)
    results = score(benchmark, responses, encoder)
    results |= {"problems": benchmark.problems + problems, "text encoder": s.text_encoder} | describe_environment()
    title = f"{s.benchmark}, {s.protocol}: {s.predictions.name}"
    report = show_scores(results, title, console)
    out.write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(report, "utf-8")
    console.print(f"{out}, {out.with_suffix('.md')}", highlight=False, markup=False, soft_wrap=True)
    return results


def check_run(s: RunSettings) -> None:
    """Raise ValueError that names every setting of `eval.py run` that cannot be."""
    numbers = ("batch_size", "num_frames", "max_new_tokens", "max_text_tokens", "max_pixels", "time_limit")
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


def first_parts(parts: Sequence[Part], limit: int) -> list[Part]:
    """All that is asked about the first `limit` videos, or parts of videos (-1: about all)."""
    keys = [(part.video, part.start, part.end) for part in parts]
    kept = set(list(dict.fromkeys(keys))[: None if limit < 0 else limit])
    return [part for part, key in zip(parts, keys) if key in kept]


def run_benchmark(settings: RunSettings, console: Console) -> dict:
    """The command `python eval.py run`: predictions as they come, then results.json and what it shows."""
    check_run(settings)
    settings.check_frames()
    s = as_trained(settings, settings.model, console)
    folder = s.videos or (s.root if s.root.is_dir() else s.root.parent)
    benchmark = questions.load_benchmark(s.benchmark, s.root, s.protocol, s.subtitles, s.follow_links, s.videos)
    benchmark.num_frames = s.num_frames or benchmark.num_frames
    benchmark.max_pixels = s.max_pixels
    benchmark.max_new_tokens = s.max_new_tokens or benchmark.max_new_tokens
    spans, wrong_spans = read_key_spans(s.key_spans, folder, s.follow_links) if s.key_spans else (None, [])
    parts = group_questions(benchmark, spans)
    probe = "needle" if s.needle else "diff" if s.diff else ""
    if probe:
        probes.own_clips(parts, probe)  # refuses what has none, before the model is loaded
    if s.twin and not any(part.spans for part in parts):
        raise ValueError("--twin: no question has key spans; give --key-spans FILE, as data.curation.curate writes it")
    run = Path(s.model) if (Path(s.model) / "checkpoint").exists() else Path("runs/answers")
    apart = {
        "skim": s.frames == "skim",
        "ours": s.protocol == "ours",
        "subtitles": s.subtitles,
        "twin": s.twin,
        probe: bool(probe),
    }
    out = s.out or run / "-".join([s.benchmark, *(name for name, asked in apart.items() if asked)])
    asked_about = list(dict.fromkeys(part.video for part in first_parts(parts, s.limit)))
    if not any(video.exists() for video in asked_about) and not (out / "predictions.jsonl").exists():
        hint = "; give --videos, the folder that their paths are relative to" if s.benchmark == "clips" else ""
        raise ClipError(f"none of the {len(asked_about)} videos exists, the first is {asked_about[0]}{hint}")
    hf, processor = load_plain(s.model)
    more = {"twin": s.twin, "probe": probe} | ({"lengths": s.lengths, "seed": s.seed} if probe else {})
    more |= {} if s.max_text_tokens is None else {"longest prompt": s.max_text_tokens}
    if s.frames == "skim" or s.visual_tokens:
        more |= {"frames chosen": s.frames, "skim": str(s.how_to_look()), "visual tokens": s.visual_tokens}
    made_with = predictions.describe_run(benchmark, parts, hf, more)
    limit = s.max_text_tokens or room(hf, benchmark.max_new_tokens)
    parts, too_long = leave_out_long(parts, benchmark, processor, limit)
    if s.needle:
        parts, left_out = probes.hide(parts, s.lengths, s.seed, None if s.limit < 0 else s.limit)
    else:
        parts, left_out = probes.pair(parts, s.seed) if s.diff else (parts, [])
        parts = first_parts(parts, s.limit)
    left_out = [*too_long, *left_out]
    if not parts:
        listed = "\n  ".join(left_out[:10])
        raise ClipError(f"no question of {s.benchmark} can be asked:\n  {listed}")
    lines, twin_lines, num_problems = ask.answer(
        hf, processor, benchmark, parts, folder, out, made_with, console, s.twin, s.batch_size, s.workers, s.time_limit,
        [*benchmark.problems, *wrong_spans, *left_out], s.how_to_look(), s.visual_tokens,
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
        results = score(benchmark, lines.responses())
        results["counts"]["missing videos"] = sum(not video.exists() for video in asked_about)
        shown = show_scores(results, f"{s.benchmark}, {s.protocol}: {s.model}", console)
        shown += f"- problems: {num_problems}, in problems.txt\n"
        if twin_lines:
            gaps = ask.perception_gap(benchmark, lines.responses(), twin_lines.responses())
            shown += ask.show_gap(gaps, console)
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
