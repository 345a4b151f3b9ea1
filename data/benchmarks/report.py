"""What `eval.py score` shows: a benchmark's table with counts and published figures, and two models side by side."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.run.sheets import printable


def percent(cell: dict) -> str:
    """A value with its interval, in percent."""
    ends = "" if cell["low"] is None else f" ({100 * cell['low']:.1f} to {100 * cell['high']:.1f})"
    return f"{100 * cell['value']:.2f}{ends}"


def plain_percent(cell: dict) -> str:
    """An accuracy in percent, without an interval; - for that of no question."""
    return "-" if cell["accuracy"] is None else f"{100 * cell['accuracy']:.2f}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in lines) + "\n"


def score_table(results: dict) -> tuple[list[list[str]], list[str]]:
    """Head and rows of a benchmark's table, and the notes below it."""
    scores = list(results["tables"]["overall"]["overall"])
    rows = [["", "questions", *scores]]
    for table, groups in results["tables"].items():
        for group, cells in groups.items():
            name = printable(group if table in ("overall", "category") else f"{table}: {group}")
            questions = str(max(cell["questions"] for cell in cells.values()))
            rows.append([name, questions, *(percent(cells[s]) if s in cells else "-" for s in scores)])
    notes = [f"{name}: {number}" for name, number in results["counts"].items() if number or name == "missing predictions"]
    if not results["complete"]:
        notes.append(f"not the whole benchmark, which has {results['published questions']} questions")
    if "match rate" in results:
        other = results["other rule"]
        notes.append(f"responses with one readable answer: {100 * results['match rate']:.2f} % of the scored questions")
        rule = "our strict rule" if other["protocol"] == "ours" else "the authors' rule"
        notes.append(f"accuracy by {rule}: {100 * other['accuracy']:.2f}")
    if published := results.get("as published"):
        value, number = plain_percent(published), published["questions"]
        notes.append(f"accuracy as published figures count: {value}, of {number} {published['of']}")
        ours = results["tables"]["category"]
        other = {
            c: cell for c, cell in published["categories"].items() if cell["questions"] != ours[c]["accuracy"]["questions"]
        }
        if other:
            cells = (f"{printable(c)} {plain_percent(cell)} of {cell['questions']}" for c, cell in other.items())
            notes.append("the same by category: " + ", ".join(cells))
    if theirs := results.get("authors' script"):
        acc, answered = theirs["acc"], theirs["answered_acc"]
        notes.append(
            f"the authors' own script prints acc {plain_percent(acc)}, of {acc['questions']}: hidden questions that are "
            f"not answered count as wrong; and answered_acc {plain_percent(answered)}, of {answered['questions']}: hidden "
            "questions that are answered count as wrong"
        )
    notes += [f"computed by {name} {version}" for name, version in results["packages"].items()]
    notes += [f"not offered: {what}" for what in results["not offered"]]
    notes += [f"published: {p['model']}: {p['figure']}" + " (second-hand)" * p["second_hand"] for p in results["published"]]
    return rows, notes


def show_scores(results: dict, title: str, console: Console) -> str:
    """Print a benchmark's table with its notes and problems; returns it as Markdown."""
    (head, *rows), notes = score_table(results)
    table = Table(title=escape(title), caption="percent, with 95 percent intervals (bootstrap over videos)")
    for i, column in enumerate(head):
        table.add_column(escape(column), justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if "problems" in results:  # of `eval.py score`; `eval.py run` has shown them as they came
        problems = results["problems"]
        for problem in problems[:20]:
            console.print(f"[yellow]problem[/] {escape(printable(problem))}", highlight=False, soft_wrap=True)
        if len(problems) > 20:
            console.print(f"[yellow]{len(problems) - 20} more problems[/] are in the results", highlight=False)
        notes.append(f"problems: {len(problems)}")
    listed = "".join(f"- {note}\n" for note in notes)
    return (
        f"{title}: percent, with 95 percent intervals by a bootstrap over videos\n\n{markdown_table(head, rows)}\n{listed}"
    )


def read_results(path: Path) -> dict:
    """A result of `eval.py score`. Raises ValueError if a file is none."""
    try:
        results = json.loads(path.read_text("utf-8"))
        if not isinstance(results["benchmark"], str) or not isinstance(results["rows"], list) or not results["rows"]:
            raise TypeError("no benchmark, or no rows")
        for row in results["rows"]:
            if not all(isinstance(row[k], t) for k, t in (("id", str), ("video", str), ("answer", str), ("scores", dict))):
                raise TypeError("rows without id, video, answer and scores")
            if not all(isinstance(value, (int, float)) for value in row["scores"].values()):
                raise TypeError("scores that are no numbers")
        return results
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"--compare {path}: not a result of `eval.py score` ({error!r:.100})") from None


def show_comparison(compared: dict, paths: Sequence[Path], console: Console) -> None:
    """Print what `benchmarks.compare` found."""
    title = (
        f"{compared['benchmark']}, {compared['protocol']}: {compared['questions']} questions, {compared['videos']} videos"
    )
    table = Table("", "A", "B", "B - A", "p", "B won", "lost", "tied", title=title)
    for name, s in compared["scores"].items():
        difference = percent({"value": s["difference"], "low": s["low"], "high": s["high"]})
        numbers = [str(s[k]) for k in ("won", "lost", "tied")]
        table.add_row(escape(name), f"{100 * s['a']:.2f}", f"{100 * s['b']:.2f}", difference, f"{s['p']:.4f}", *numbers)
    console.print(table)
    for letter, path in zip("AB", paths):
        console.print(f"{letter}: {path}", highlight=False, markup=False)
    console.print(f"p: {compared['test']}, since the questions of a video are not independent", highlight=False)
