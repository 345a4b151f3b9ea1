"""Run a model on a benchmark: a part of a video is read once and prefilled once, however many questions it has.

    parts = group_questions(benchmark)                                  # data/benchmarks/parts.py: with all its questions
    answer(model, processor, benchmark, parts, out, settings)           # out/predictions.jsonl, line by line
    perception_gap(benchmark, predictions, twin_predictions)

All questions about a part grow as branches out of one prefill (`VideoLM.answer`): what their prompts begin with, video
and all, is run once, and so is the vision encoder, for full video and twin together. Models that VideoLM does not know run
through AutoModelForImageTextToText, a prompt each.

Predictions are appended as they come. Videos are taken in fixed batches, so that a run that was killed and continued
gives every answer from the same batch as a run that was not. `settings.json` says what the predictions were made with; a
run with other settings does not continue them.
"""

import fcntl
import itertools
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from data import videolm
from data.benchmarks.parts import Asked, Part, make_asked, room
from data.benchmarks.predictions import Lines, Notes, open_run
from data.benchmarks.questions import Benchmark
from data.benchmarks.report import markdown_table, percent
from data.benchmarks.results import compare, score
from data.clips import reason_of
from data.examples import Preparation, process
from data.files import inside_root
from data.loader import ClipLoader
from data.run.sheets import printable
from data.skim import Skim
from data.video import Frames

SHARING = ("qwen2_5_vl", "qwen3_vl")  # the families that VideoLM is tested with and whose prefixes can be shared


def shares_prefix(hf: nn.Module) -> bool:
    """Whether all questions of a video can grow out of one prefill of this model."""
    return hf.config.model_type in SHARING and hasattr(hf.model, "visual")


@torch.inference_mode()
def generate(hf: nn.Module, processor, videos: Sequence[Frames], texts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy answers of any Hugging Face video-language model to texts that show the same videos, a prompt each."""
    # to the left: what is generated follows the prompt
    inputs = process(processor, list(texts), list(videos) * len(texts), padding=True, padding_side="left")
    length = inputs["input_ids"].shape[1]
    if (most := room(hf, max_new_tokens)) is not None and length > most:
        raise ValueError(f"video and question have {length} tokens, and the model reads {most} beside its answer")
    inputs = inputs.to(hf.device, hf.dtype)
    out = hf.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)


def answer_plain(
    hf: nn.Module, processor, asked: Asked, max_new_tokens: int, at_once: int = 8
) -> tuple[list[str], list[str]]:
    """The answers to a part's questions on the full video and on the twin ([] without one), a prompt each."""
    both = []
    for videos in (asked.videos, asked.twin_videos):
        texts = asked.texts if videos else []
        chunks = (texts[i : i + at_once] for i in range(0, len(texts), at_once))
        both.append([t for some in chunks for t in generate(hf, processor, videos, some, max_new_tokens)])
    return both[0], both[1]


def answer_batch(
    lm: videolm.VideoLM, processor, batch: Sequence[Asked], max_new_tokens: int, twin: bool
) -> list[tuple[list[str], list[str]]]:
    """The same for several parts, all questions about each on one prefill. The full video replaces a missing twin."""
    tails = [asked.tails for asked in batch]
    rollouts = lm.answer([asked.example for asked in batch], tails, max_new_tokens, twin).to("cpu")
    most, answers = max(map(len, tails)), []
    for asked, tokens, lengths in zip(batch, rollouts.tokens, rollouts.lengths):
        said = [row[:n] for row, n in zip(tokens, lengths)]
        texts, n = processor.tokenizer.batch_decode(said, skip_special_tokens=True), len(asked.tails)
        answers.append((texts[:n], texts[most : most + n]))
    return answers


def answer(
    hf: nn.Module, processor, benchmark: Benchmark, parts: Sequence[Part], root: Path, out: Path, settings: dict,
    console: Console, twin: bool = False, batch_size: int = 4, workers: int = 1, time_limit: float = 60.0,
    problems: Sequence[str] = (), skim: Skim | None = None, visual_tokens: int | None = None,
) -> tuple[Lines, Lines | None, int]:  # fmt: skip
    """Ask all that has no answer in out/predictions.jsonl yet, and append the answers as they come.

    settings: see `open_run`. With twin, answers about twins go to out/twin-predictions.jsonl. Videos that cannot be used
    are skipped; out/problems.txt names them, with `problems`. Returns both files, and the number of problems.
    """
    open_run(out, settings)
    context = room(hf, benchmark.max_new_tokens)
    lm = videolm.VideoLM(hf).eval() if shares_prefix(hf) else None
    if lm is None:
        console.print(
            f"{hf.config.model_type}: prefixes are not shared: each question is a prompt of its own", highlight=False
        )
    with ExitStack() as stack:
        lock = stack.enter_context((out / "settings.json").open())
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it however this process ends
        except OSError:
            raise ValueError(f"{out}: another run writes to it; wait for it, or give another --out") from None
        notes = Notes(out / "problems.txt", console)
        lines = Lines(out / "predictions.jsonl")
        twin_lines = Lines(out / "twin-predictions.jsonl") if twin else None
        files = [f for f in (lines, twin_lines) if f]
        for file in (notes, *files):
            stack.callback(file.file.close)
        notes.add([*problems, *(problem for file in files for problem in file.problems)])

        def is_done(part: Part) -> bool:
            records = [lines.records.get(q.id) for q in part.questions]
            return all(r and (not twin or not r["twin"] or r["id"] in twin_lines.records) for r in records)

        # Batches are cut from all parts, not from those that are left: an answer comes from the same batch on any run.
        batches = [parts[i : i + batch_size] for i in range(0, len(parts), batch_size)]
        left = [(b, part) for b, batch in enumerate(batches) if not all(map(is_done, batch)) for part in batch]
        slim = replace(benchmark, questions=[], problems=[])  # what a worker needs of it
        loader = ClipLoader(
            [part for _, part in left],
            Preparation(
                processor, benchmark.num_frames, max_pixels=benchmark.max_pixels, context=context,
                visual_tokens=visual_tokens, skim=skim,
            ),
            workers=workers, time_limit=time_limit, max_bad_share=1.0, shuffle=False,
            make=partial(make_asked, benchmark=slim, share_prefix=lm is not None, twin=twin),
        )  # fmt: skip
        stack.enter_context(loader)
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        progress = stack.enter_context(Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console))
        total = sum(len(part.questions) for part in parts)
        to_do = sum(len(part.questions) for _, part in left)
        task = progress.add_task(benchmark.name, total=total, completed=total - to_do)
        for _, group in itertools.groupby(loader.examples(epochs=1), key=lambda pair: left[pair[0]][0]):
            indices, batch = zip(*group)
            answers = []
            if batch[0].example is not None:
                with suppress(Exception):  # of one of them: asked one by one, below, it shows which
                    answers = answer_batch(lm, processor, batch, benchmark.max_new_tokens, twin)
            if not answers:
                for i, asked in zip(indices, batch):
                    try:
                        if asked.example is not None:
                            answers += answer_batch(lm, processor, [asked], benchmark.max_new_tokens, twin)
                        else:
                            answers.append(answer_plain(hf, processor, asked, benchmark.max_new_tokens))
                    except Exception as error:
                        answers.append(([], []))
                        reason = f"the model or its processor refuses it: {reason_of(error)}"
                        loader.skip(i, f"{left[i][1].where}: {left[i][1].video}: {reason}")
            for i, asked, (texts, twin_texts) in zip(indices, batch, answers):
                part = left[i][1] if texts else replace(left[i][1], questions=[])
                for q, text, twin_text in itertools.zip_longest(part.questions, texts, twin_texts):
                    record = {
                        "id": q.id,
                        "video": os.path.relpath(inside_root(str(q.video.absolute()), root, True), root.resolve()),
                        "category": q.category,
                    }
                    share = {} if asked.share is None else {"event share": round(asked.share, 6)}
                    if twin and asked.has_twin:
                        twin_lines.add(record | {"response": twin_text} | share)
                    lines.add(record | {"response": text} | share | ({"twin": asked.has_twin} if twin else {}))
                if twin and part.spans and not asked.has_twin:
                    notes.add([f"{part.where}: {part.video}: no twin: its key spans {part.spans} hold no slot, or all"])
            done = sum(len(part.questions) for j, (_, part) in enumerate(left) if j <= indices[-1])
            progress.update(task, completed=total - to_do + done)
        for i, reason in loader.skipped.items():
            notes.add([f"{reason} (skipped; questions without an answer: {len(left[i][1].questions)})"])
        if twin and (without := sum(len(p.questions) for p in parts if not p.spans)):
            notes.add([f"{without} questions have no key spans, and so no twin; give --key-spans"])
        progress.update(task, completed=total)
    return lines, twin_lines, notes.count


# --- What is made of the answers ----------------------------------------------------------------------------------------


def perception_gap(benchmark: Benchmark, full: Mapping[str, str], twin: Mapping[str, str]) -> dict[str, dict]:
    """Full against twin, overall and by category, on the questions that have a twin: see `results.compare`.

    Of each score, `b` is that on the full videos, `a` that on the twins, and `difference` the perception gap. {} if no
    question with a public answer has a twin.
    """
    benchmark = replace(benchmark, questions=[q for q in benchmark.questions if q.id in twin and q.answer is not None])
    if not benchmark.questions:
        return {}
    results, gaps = [score(benchmark, said) for said in (twin, full)], {}
    categories = list(dict.fromkeys(row["category"] for row in results[0]["rows"]))
    for category in ("overall", *(categories if len(categories) > 1 else ())):
        of = [r | {"rows": [x for x in r["rows"] if category in ("overall", x["category"])]} for r in results]
        gaps[category] = compare(*of)
    return gaps


def show_gap(gaps: Mapping[str, dict], console: Console) -> str:
    """Print `perception_gap` as a table, in percent; returns it as Markdown."""
    if not gaps:
        line = "no perception gap: no twin could be made of a question with a public answer; problems.txt says why"
        console.print(line, style="yellow", highlight=False, soft_wrap=True)
        return f"\n{line}\n"
    head, rows = ["", "score", "questions", "full", "twin", "perception gap", "p"], []
    for category, compared in gaps.items():
        for name, s in compared["scores"].items():
            gap = percent({"value": s["difference"], "low": s["low"], "high": s["high"]})
            number = str(s["won"] + s["lost"] + s["tied"])
            values = [f"{100 * s['b']:.2f}", f"{100 * s['a']:.2f}", gap, f"{s['p']:.4f}"]
            rows.append([printable(category), name, number, *values])
    table = Table(*head, title="perception gap")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    return f"\nperception gap: full minus twin, percent\n\n{markdown_table(head, rows)}"
