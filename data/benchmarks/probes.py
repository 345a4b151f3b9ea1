"""Probes of a model on one's own clips: the event in longer and longer footage, and full video against twin in one prompt.

    parts, problems = hide(group_questions(benchmark), lengths=(1, 2, 4, 8))    # then `data.benchmarks.ask.answer`
    curve = needle_curve(parts, lines.records)                                   # keyword recall at each length
    parts, problems = pair(group_questions(benchmark))                           # which has the event, and when?
    rows = score_differences(parts, lines.records)

A model that was never trained for the second answers at chance, if it keeps to the form at all: it is a probe, not a claim.
"""

import itertools
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data.benchmarks.parts import Part, covered
from data.benchmarks.predictions import Lines
from data.benchmarks.report import markdown_table, percent
from data.benchmarks.results import tabulate
from data.benchmarks.scoring import names
from data.files import ClipError


def own_clips(parts: Sequence[Part], probe: str) -> list[Part]:
    """The parts whose question is a clip of one's own with keywords, which a probe needs."""
    kept = [p for p in parts if "clip" in p.questions[0].record and p.questions[0].record["clip"].keywords]
    if not kept:
        raise ClipError(
            f"--{probe}: needs clips with keywords; give --benchmark clips and an annotation file that has them"
        )
    return kept


def hide(
    parts: Sequence[Part], lengths: Sequence[int], seed: int = 0, limit: int | None = None
) -> tuple[list[Part], list[str]]:
    """Each clip, or the first `limit`, hidden in footage of other clips, the whole as many clips long as `lengths` say.

    The footage of a length holds that of the shorter ones, and no clip with one of the keywords. Returns the
    parts, their questions called "ID in LENGTH", and a line for each clip that has too few others.
    """
    parts, hidden, problems = own_clips(parts, "needle"), [], []
    keywords = [{k.casefold() for k in p.questions[0].record["clip"].keywords} for p in parts]
    for part, own in zip(parts[:limit], keywords):
        q = part.questions[0]
        rng = random.Random(f"{seed} {q.id}")
        order = rng.sample(range(len(parts)), len(parts))
        others = (parts[i] for i in order if parts[i].video != part.video and not keywords[i] & own)
        footage = list(itertools.islice(others, max(lengths) - 1))
        for length in lengths:
            if length - 1 > len(footage):
                problems.append(f"{q.id}: only {len(footage)} other clips without its keywords; not hidden in {length}")
                continue
            one = replace(q, id=f"{q.id} in {length}", category=f"{length} clips", answer=None)
            before = rng.randrange(length)
            hidden.append(replace(part, questions=[one], footage=footage[: length - 1], before=before, where=one.id))
    return hidden, problems


def pair(parts: Sequence[Part], seed: int = 0) -> tuple[list[Part], list[str]]:
    """Each clip beside its twin, in an order that is drawn, with the question which shows the event and when.

    Clips without key spans are left out and named.
    """
    pairs, problems = [], []
    for part in own_clips(parts, "diff"):
        q = part.questions[0]
        if not part.spans:
            problems.append(f"{q.id}: no key spans, so no twin; curate the clips, or give --key-spans")
            continue
        event = " and ".join(f'"{k}"' for k in q.record["clip"].keywords)
        text = (
            f"Here are two videos. They are the same, but only one of them shows this: {event}. Which video shows it, and "
            "from which second to which? Answer in this form and no other: video 1, 0.5 to 1.5"
        )
        twin = random.Random(f"{seed} {q.id}").choice((1, 2))
        pairs.append(replace(part, questions=[replace(q, text=text, answer=None)], pair=twin))
    return pairs, problems


def needle_curve(parts: Sequence[Part], lines: Mapping[str, dict]) -> list[dict]:
    """Keyword recall by length of the footage, with the event's mean share of it; a skipped clip recalls nothing."""
    rows, shares = [], defaultdict(list)
    for part in parts:
        (q,) = part.questions
        record = lines.get(q.id, {"response": ""})
        keywords = q.record["clip"].keywords
        recall = sum(names(k, record["response"]) for k in keywords) / len(keywords)
        rows.append({"video": str(q.video), "category": q.category, "groups": {}, "scores": {"keyword recall": recall}})
        shares[q.category] += [record["event share"]] if "event share" in record else []
    cells = tabulate(rows)["category"] if rows else {}
    return [  # a length whose clips were all skipped has no share, and no point
        {"footage": category, "event share": sum(s) / len(s), **cells[category]["keyword recall"]}
        for category, s in shares.items()
        if s
    ]


def ticks_apart(shares: Iterable[float], most: int = 6) -> list[float]:
    """Those of some shares, from the largest on, whose labels do not overlap on a logarithmic axis with room for `most`.

    >>> ticks_apart([0.5, 0.25, 0.24, 0.125])
    [0.5, 0.25, 0.125]
    """
    shares, ticks = sorted(shares, reverse=True), []
    for share in shares:
        if not ticks or ticks[-1] / share >= (shares[0] / shares[-1]) ** (1 / most):
            ticks.append(share)
    return ticks


def draw_curve(curves: Mapping[str, list[dict]], path: Path) -> None:
    """Keyword recall against the event's share of the footage, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5.2, 3.6))
    for name, curve in curves.items():
        shares, values = ([point[k] for point in curve] for k in ("event share", "value"))
        axis.plot(shares, values, marker="o", label=name)
        if all(point["low"] is not None for point in curve):
            axis.fill_between(shares, [p["low"] for p in curve], [p["high"] for p in curve], alpha=0.2)
    axis.set_xscale("log")
    # One label a point; a logarithmic axis would write its own between them, over one another.
    ticks = ticks_apart({point["event share"] for curve in curves.values() for point in curve})
    axis.set_xticks(ticks, [f"{share:.3g}" for share in ticks])
    axis.set_xticks([], minor=True)
    axis.invert_xaxis()  # longer and longer footage to the right
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("the event's share of the footage")
    axis.set_ylabel("keyword recall")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse_difference(text: str) -> tuple[int, float, float] | None:
    """Which video has the event and its [start, end] in seconds, or None if the text does not say just that.

    >>> parse_difference("Video 2, 0.5 to 1.5."), parse_difference("video 1: 2-3 s"), parse_difference("video 1 or 2")
    ((2, 0.5, 1.5), (1, 2.0, 3.0), None)
    """
    number, unit = r"(\d+(?:\.\d+)?)", r"\s*(?:s|sec|seconds)?\s*"
    form = rf"\W*video\s*([12])\s*[,:;]?\s*(?:from\s*)?{number}{unit}(?:to|-|–)\s*{number}{unit}\W*"
    found = re.fullmatch(form, text, re.IGNORECASE)
    if not found or float(found[2]) >= float(found[3]):
        return None
    return int(found[1]), float(found[2]), float(found[3])


def interval_iou(start: float, end: float, spans: Sequence[Sequence[float]]) -> float:
    """Intersection over union, in seconds, of [start, end] and all spans together.

    >>> interval_iou(1.0, 3.0, [[2.0, 4.0], [3.5, 5.0]])
    0.25
    """
    return covered(spans, start, end) / covered([*spans, [start, end]])


def score_differences(parts: Sequence[Part], lines: Mapping[str, dict]) -> list[dict]:
    """Scores of each pair of full video and twin; an answer that cannot be read, or is missing, is wrong.

    video right: it names the full video (chance: 0.5). IoU: of its seconds and the key spans. both: the right
    video, and an IoU of 0.5 or more.
    """
    rows = []
    for part in parts:
        (q,) = part.questions
        said = lines.get(q.id, {"response": ""})["response"]
        found = parse_difference(said)
        right = found is not None and found[0] != part.pair
        iou = interval_iou(*found[1:], part.spans) if found else 0.0
        scores = {
            "video right": float(right),
            "IoU": iou,
            "both": float(right and iou >= 0.5),
            "readable": float(bool(found)),
        }
        rows.append({"id": q.id, "video": str(q.video), "category": "clips", "groups": {}, "twin": part.pair,
                     "response": said, "scores": scores})  # fmt: skip
    return rows


# --- Reports ------------------------------------------------------------------------------------------------------------


def report_needle(parts: Sequence[Part], lines: Lines, twin_lines: Lines | None, out: Path, console: Console) -> dict:
    """Print the curve as a table, write it to out/results.md, and draw out/needle.png; with twins, theirs too."""
    curves = {"full": needle_curve(parts, lines.records)}
    if twin_lines:
        curves["twin"] = needle_curve([p for p in parts if p.questions[0].id in twin_lines.records], twin_lines.records)
        if not curves["twin"]:
            del curves["twin"]
            line = "no curve of twins: no twin could be made; problems.txt says why"
            console.print(line, style="yellow", highlight=False, soft_wrap=True)
    by_length = {name: {point["footage"]: point for point in curve} for name, curve in curves.items()}
    rows = []
    for point in curves["full"]:
        cells = [percent(points[point["footage"]]) if point["footage"] in points else "-" for points in by_length.values()]
        rows.append([point["footage"], f"{point['event share']:.4f}", str(point["questions"]), *cells])
    head = ["footage", "event's share", "questions", *(f"keyword recall, {name}" for name in curves)]
    show_table("needle", head, rows, out, console)
    if lost := [c for c in dict.fromkeys(p.questions[0].category for p in parts) if c not in by_length["full"]]:
        line = f"no point for {', '.join(lost)}: the event's share is not known; problems.txt says why"
        console.print(line, style="yellow", highlight=False, soft_wrap=True)
    draw_curve(curves, out / "needle.png")
    console.print(f"{out / 'needle.png'}", highlight=False, markup=False, soft_wrap=True)
    return {"curves": curves}


def report_differences(parts: Sequence[Part], lines: Lines, twin_lines: Lines | None, out: Path, console: Console) -> dict:
    """Print the scores of full video against twin, and write them to out/results.md."""
    rows = score_differences(parts, lines.records)
    scores = tabulate(rows)["overall"]["overall"]
    table = [[name, percent(cell)] for name, cell in scores.items()]
    show_table(f"full video against twin: {len(rows)} clips", ["score", "percent"], table, out, console)
    console.print("chance of video right: 50 among readable answers; IoU: 0 if the answer cannot be read", highlight=False)
    return {"scores": scores, "rows": rows}


def show_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], out: Path, console: Console) -> None:
    """Print a table, and write it to out/results.md."""
    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    (out / "results.md").write_text(f"{title}\n\n{markdown_table(head, rows)}", "utf-8")
