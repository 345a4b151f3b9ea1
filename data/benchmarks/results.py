"""What a benchmark's predictions are worth: by its authors' rules and by ours, in tables, and beside another model's.

The rules themselves are in scoring.py. Every question whose answer is public counts, answered or not: no missing
prediction, no unreadable answer leaves the denominator. A question whose answer is hidden counts nowhere. Where options are
equal, ours takes each of them as right; MVBench's and TVBench's code takes the last, the other authors the letter in their
file.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from data.benchmarks import scoring
from data.benchmarks.formats import Question
from data.benchmarks.questions import ABOUT, DESCRIBED, Benchmark
from data.benchmarks.scoring import LETTERS
from data.files import ClipError

# What published figures divide by, if it is not simply all questions.
DENOMINATORS = {
    "vru-accident": "questions in the prediction files",
    "tempcompass": "questions in the prediction files; there, GPT judges what no rule can read",
    "motionbench": "answered questions whose answer is public (the leaderboard's dev average)",
    "video-mme": "questions whose response holds a letter",
}


@dataclass(frozen=True)
class Published:
    """A published figure to compare with. second_hand: not from the one who measured it."""

    model: str
    figure: str
    second_hand: bool = False


PUBLISHED = {
    "vru-accident": (Published("Qwen2.5-VL-3B", "accuracy 48.82 (weather and light 63.8, location 72.1, road type 39.4, "
                               "accident type 47.3, accident reason 25.6, prevention method 44.7)"),
                     Published("Qwen2-VL-7B", "accuracy 52.05 (weather and light 70.3, location 59.6, road type 34.1, "
                               "accident type 60.1, accident reason 41.4, prevention method 46.8)")),
    "vru-accident-captions": (
        Published("Qwen2.5-VL-3B", "ROUGE-1 41.6, ROUGE-2 11.1, ROUGE-L 21.8, METEOR 26.1, SPICE 14.9, COMET 68.2"),
        Published("Qwen2-VL-7B", "ROUGE-1 45.6, ROUGE-2 13.4, ROUGE-L 24.8, METEOR 28.5, SPICE 17.0, COMET 72.1")),
    "motionbench": (Published("Qwen2-VL-7B", "accuracy 52 (dev)"), Published("Qwen2.5-VL-7B", "accuracy 53.0 (dev)", True),
                    Published("Qwen3-VL-8B", "accuracy 56.9 to 62.5 (dev)", True)),
    "mvbench": (Published("Qwen2.5-VL-7B", "accuracy 69.6"), Published("Qwen3-VL-8B", "accuracy 68.7", True)),
    "video-mme": (Published("Qwen2.5-VL-7B", "accuracy 65.1, with subtitles 71.6"),
                  Published("Qwen3-VL-8B", "accuracy 71.4, with subtitles 75.2", True)),
    "tempcompass": (Published("Qwen2.5-VL-7B", "accuracy 71.7"), Published("Qwen3-VL-8B", "accuracy 74.3", True)),
}  # fmt: skip

NOT_OFFERED = {
    "vru-accident-captions": ("SPICE: needs Java and a download", "COMET: needs a model that is a download"),
    "tempcompass": ("captioning: needs a judge; its questions are not asked",),
    "dream-1k": ("DREAM-1K's recall, precision and F1: need a judge. Event recall (embedding) is another measure",),
}
METEOR = "METEOR: needs NLTK's WordNet and sentence splitter, whole (python -m nltk.downloader wordnet punkt_tab); found"


def read_answer(name: str, question: Question, response: str, protocol: str) -> str:
    """The letters, or "yes" or "no", that a rule takes a response for; "" for none."""
    q = question
    kind, labels = q.record.get("kind"), q.record.get("labels", ())
    if protocol == "ours":
        if kind == "yes_no":
            return scoring.read_yes_no(response)
        return scoring.read_letter(response, q.options, labels if kind == "caption_matching" else ())
    if name == "vru-accident":
        return scoring.official_vru_accident(response)
    if name == "motionbench":
        return scoring.official_motionbench(response)
    if name == "video-mme":
        return scoring.official_video_mme(response)
    if name == "tempcompass":
        if response.replace("</s>", "").strip() == q.record.get("answer"):
            return q.answer
        return scoring.official_tempcompass(response, kind, q.options, labels)
    return scoring.official_mvbench(response, len(q.options))


def right_answers(name: str, question: Question, protocol: str) -> tuple[str, ...]:
    """The letters that count as right: see the top of this file for equal options."""
    if not question.options:
        return (question.answer,)
    right = question.options[LETTERS.index(question.answer)]
    if protocol == "ours":
        right = scoring.folded(right)
        return tuple(letter for letter, o in zip(LETTERS, question.options) if scoring.folded(o) == right)
    if name in ("mvbench", "tvbench"):
        return ([letter for letter, o in zip(LETTERS, question.options) if o == right][-1],)
    return (question.answer,)


def is_right(name: str, question: Question, read: str, protocol: str) -> bool:
    """Whether what was read holds a right answer."""
    right = right_answers(name, question, protocol)
    return read in right if read in ("yes", "no") else any(letter in read for letter in right)


def choice_rows(benchmark: Benchmark, rows: list[dict], questions: list[Question], counts: Counter) -> None:
    """Score multiple choice, and yes or no, by both rules."""
    name, protocol = benchmark.name, benchmark.protocol
    other = "ours" if protocol == "official" else "official"
    for row, q in zip(rows, questions):
        response = row["response"]
        read = "" if response is None else read_answer(name, q, response, protocol)
        row |= {"read": read, "scores": {"accuracy": float(is_right(name, q, read, protocol))}}
        beside = "" if response is None else read_answer(name, q, response, other)
        row["other rule"] = float(is_right(name, q, beside, other))
        several = len(read) > 1 and read not in ("yes", "no")
        row["matched"] = read in ("yes", "no") or read in tuple(LETTERS[: len(q.options) or None])
        counts["responses without an answer"] += response is not None and not row["matched"] and not several
        counts["responses taken for several answers"] += several
        equal = len(set(map(scoring.folded, q.options))) < len(q.options)
        counts["questions with equal options"] += equal
        counts["right by an equal option"] += bool(row["scores"]["accuracy"]) and q.answer not in read and equal


def description_rows(
    benchmark: Benchmark, rows: list[dict], questions: list[Question], encoder
) -> tuple[dict[str, str], list[str]]:
    """Score descriptions, a missing one as an empty one; returns the packages that did it, and what was left out."""
    texts = [row["response"] or "" for row in rows]
    if benchmark.name == "dream-1k":
        if encoder is None:
            raise ValueError(
                "--text-encoder: dream-1k is scored by event recall (embedding); give a sentence-transformers model"
            )
        recalls = scoring.event_recall(encoder, [q.record["events"] for q in questions], texts)
        for row, recall in zip(rows, recalls):
            row["scores"] = {"event recall (embedding)": recall}
        return {"sentence-transformers": version("sentence-transformers")}, []
    packages = {"rouge-score": version("rouge-score")}
    if benchmark.name == "clips":
        actions = {q.record["clip"].truth["action"] for q in questions if "action" in (q.record["clip"].truth or {})}
        for row, q, text in zip(rows, questions, texts):
            row["scores"] = scoring.score_description(q.record["clip"], text, actions)
        return packages, []
    for row, q, text in zip(rows, questions, texts):
        row["scores"] = scoring.rouge_scores(q.answer, text)
    meteor, reason = scoring.meteor_scorer()
    values = []
    try:
        values = [meteor(q.answer, text) for q, text in zip(questions, texts)] if meteor else []
    except Exception as error:  # a broken WordNet shows itself at the first word that it lacks
        reason = f"{type(error).__name__}: {str(error)[:120]}"
    for row, value in zip(rows, values):
        row["scores"]["METEOR"] = value
    return (packages | {"nltk": version("nltk")}, []) if values else (packages, [f"{METEOR} {reason}"])


def share_right(rows: list[dict]) -> dict:
    """Accuracy of some rows (None of none), and their number."""
    right = sum(row["scores"]["accuracy"] for row in rows)
    return {"accuracy": right / len(rows) if rows else None, "questions": len(rows)}


def motionbench_script(benchmark: Benchmark, rows: list[dict], predictions: Mapping[str, str]) -> dict[str, dict]:
    """What MotionBench's own script calls acc and answered_acc, THUDM/MotionBench, motionbench/metrics/compute_accuracy.py.

    acc divides by the public questions and those hidden ones that have no answer, answered_acc by all that have one.
    """
    right = sum(row["scores"]["accuracy"] for row in rows)
    hidden = [q.id in predictions for q in benchmark.questions if q.answer is None]
    answered = sum(row["response"] is not None for row in rows) + sum(hidden)
    numbers = {"acc": len(rows) + hidden.count(False), "answered_acc": answered}
    return {name: {"accuracy": right / n if n else None, "questions": n} for name, n in numbers.items()}


def tabulate(rows: list[dict]) -> dict:
    """Table -> group -> score -> value, low, high (95 percent, bootstrap over videos) and number of questions."""
    videos = {video: i for i, video in enumerate(dict.fromkeys(row["video"] for row in rows))}
    columns: dict[tuple, np.ndarray] = {}
    for row in rows:
        for table, group in {"overall": "overall", "category": row["category"], **row["groups"]}.items():
            for name, value in row["scores"].items():
                column = columns.setdefault((table, group, name), np.zeros((2, len(videos))))
                column[:, videos[row["video"]]] += value, 1
    sums, counts = np.stack(list(columns.values()), -1)  # (V, C)
    low_high = scoring.intervals(sums, counts)
    out: dict = {}
    for (table, group, name), total, number, low, high in zip(columns, sums.sum(0), counts.sum(0), *low_high):
        ends = {"low": None, "high": None} if np.isnan(low) else {"low": float(low), "high": float(high)}
        cell = {"value": float(total / number), **ends, "questions": int(number)}
        out.setdefault(table, {}).setdefault(group, {})[name] = cell
    return out


def score(benchmark: Benchmark, predictions: Mapping[str, str], encoder=None) -> dict:
    """Scores overall, by category and by further groups, with intervals, counts and published figures.

    predictions: id -> response; ids that are no question are ignored (`read_predictions` names them). encoder: a
    `data.texts.TextEncoder`, which dream-1k needs. A question without a prediction is wrong, a description without one is
    empty; both are counted. `rows` has every question that counts, for `compare`.
    """
    about, name = ABOUT[benchmark.name], benchmark.name
    questions = [q for q in benchmark.questions if q.answer is not None]
    if not questions:
        raise ClipError(
            f"{name}: the answers of all {len(benchmark.questions)} questions are hidden; nothing can be scored"
        )
    rows = [{"id": q.id, "video": str(q.video), "category": q.category, "groups": q.record.get("groups", {}),
             "response": predictions.get(q.id), "answer": q.answer} for q in questions]  # fmt: skip
    counts = Counter({"questions": len(benchmark.questions), "hidden answers": len(benchmark.questions) - len(questions)})
    missing = sum(row["response"] is None for row in rows)
    counts["scored"], counts["missing predictions"] = len(rows), missing
    counts["empty responses"] = sum(row["response"] is not None and not row["response"].strip() for row in rows)
    known = about.categories
    counts["questions of an unknown category"] = sum(known is not None and row["category"] not in known for row in rows)
    results = {"benchmark": name, "protocol": benchmark.protocol, "subtitles": benchmark.subtitles, "counts": counts}
    results["complete"] = about.questions is None or about.questions == len(benchmark.questions)
    results["published questions"] = about.questions
    packages, not_offered = {}, list(NOT_OFFERED.get(name, ()))
    if name in DESCRIBED:
        packages, left_out = description_rows(benchmark, rows, questions, encoder)
        not_offered += left_out
    else:
        choice_rows(benchmark, rows, questions, counts)
        results["match rate"] = sum(row["matched"] for row in rows) / len(rows)
        other = {"protocol": "ours" if benchmark.protocol == "official" else "official"}
        results["other rule"] = other | {"accuracy": sum(row["other rule"] for row in rows) / len(rows)}
        if benchmark.protocol == "official" and name in DENOMINATORS:
            counted = [row for row in rows if (row["read"] if name == "video-mme" else row["response"] is not None)]
            by_category = {c: share_right([row for row in counted if row["category"] == c])
                           for c in dict.fromkeys(row["category"] for row in rows)}  # fmt: skip
            results["as published"] = share_right(counted) | {"of": DENOMINATORS[name], "categories": by_category}
        if benchmark.protocol == "official" and name == "motionbench":
            results["authors' script"] = motionbench_script(benchmark, rows, predictions)
    results |= {"packages": packages, "not offered": not_offered, "tables": tabulate(rows)}
    results["published"] = [vars(p) for p in PUBLISHED.get(name, ())]
    return results | {"rows": rows}


def compare(a: dict, b: dict) -> dict:
    """Two models' results on the same questions: difference b - a of each score, its interval, p, and who won where.

    The test exchanges the two models at random on whole videos, see `scoring.permutation_test`. Raises ValueError, naming
    what differs, unless benchmark, protocol, subtitles and questions are the same.
    """
    for key in ("benchmark", "protocol", "subtitles"):
        if a.get(key) != b.get(key):
            raise ValueError(f"--compare: {key} differs: {a.get(key)} and {b.get(key)}; compare results of the same kind")
    rows_a, rows_b = ({row["id"]: row for row in results["rows"]} for results in (a, b))
    if only := sorted(rows_a.keys() ^ rows_b.keys()):
        raise ValueError(f"--compare: {len(only)} questions are in one file only, the first is {only[0]}; score both anew")
    if other := [id for id, row in rows_a.items() if row["answer"] != rows_b[id]["answer"]]:
        raise ValueError(f"--compare: {len(other)} answers differ, the first is that of {other[0]}; score both anew")
    videos = {video: i for i, video in enumerate(dict.fromkeys(row["video"] for row in rows_a.values()))}
    out = {"benchmark": a["benchmark"], "protocol": a["protocol"], "questions": len(rows_a), "videos": len(videos)}
    out |= {"test": "two-sided permutation test over videos", "scores": {}}
    for name in dict.fromkeys(n for row in rows_a.values() for n in row["scores"]):
        pairs = [
            (videos[row["video"]], row["scores"].get(name), rows_b[id]["scores"].get(name)) for id, row in rows_a.items()
        ]
        if any((x is None) != (y is None) for _, x, y in pairs):
            raise ValueError(f"--compare: score {name} is in one file only; score both anew")
        sums = np.zeros((3, len(videos)))
        for video, x, y in (pair for pair in pairs if pair[1] is not None):
            sums[:, video] += x, y, 1
        difference = sums[1] - sums[0]
        low, high = scoring.intervals(difference[:, None], sums[2][:, None])[:, 0]
        values = [(x, y) for _, x, y in pairs if x is not None]
        out["scores"][name] = {
            "a": float(sums[0].sum() / len(values)),
            "b": float(sums[1].sum() / len(values)),
            "difference": float(difference.sum() / len(values)),
            "low": None if np.isnan(low) else float(low),
            "high": None if np.isnan(high) else float(high),
            "p": scoring.permutation_test(difference),
            "won": sum(y > x for x, y in values),
            "lost": sum(y < x for x, y in values),
            "tied": sum(y == x for x, y in values),
        }
    return out


def answer_file(benchmark: Benchmark, predictions: Mapping[str, str]) -> dict[str, str]:
    """MotionBench's answer file {uid: letter}, for the questions whose answer is hidden, and the others: its leaderboard
    takes both from one file. Questions without a prediction or without a readable answer are left out."""
    read = {q.id: read_answer(benchmark.name, q, predictions[q.id], benchmark.protocol)
            for q in benchmark.questions if q.id in predictions}  # fmt: skip
    return {id: letter for id, letter in read.items() if letter in tuple(LETTERS)}
