"""Benchmarks: every format made here with its odd cases, scored by the rules and by a second, independent loop."""

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import nltk
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from rich.console import Console

import eval as evaluation
from data.benchmarks import scoring
from data.benchmarks.formats import split_options
from data.benchmarks.predictions import read_predictions
from data.benchmarks.questions import ABOUT, NAMES, Benchmark, load_benchmark, prompt
from data.benchmarks.results import answer_file, compare, score
from data.benchmarks.scoring import intervals, permutation_test, read_letter, read_yes_no
from data.files import ClipError
from data.texts import EmbeddedText
from data.tiny import build_text_encoder
from tests.commands import run

HERE = Path(__file__).parent.parent
WORDS = ["jumps", "walks", "turns", "falls", "waits", "slowly", "twice", "left", "right", "up"]

# --- Our rules, by hand -------------------------------------------------------------------------------------------------

PAGE = [
    ("B", "B"), ("(B)", "B"), ("B.", "B"), ("B)", "B"), ("b", "B"), ("(b) foo", "B"), ("The answer is (B).", "B"),
    ("Answer: B", "B"), ("**B**", "B"), ("I think it is B because A is wrong", "B"),
    ("Both A and B; final answer: D", "D"), ("None", ""), ("", ""), ("A person runs, so B", "B"),
]  # fmt: skip
MORE = [
    ("A", "A"), ("  a \n", "A"), ("A. jumps", "A"), ("A because it runs", "A"), ("A person runs", ""), ("A Toyota", ""),
    ("The answer is A person", ""), ("the answer is a person running", ""), ("answer: b", "B"), ("Answer: (c).", "C"),
    ("The correct answer is option B.", "B"), ("The best option is C", "C"), ("Answer: A. No, the answer is D.", "D"),
    ("A is wrong; B", "B"), ("It is not A, but C", "C"), ("it isn't A, it is C", "C"), ("A and B", ""), ("A, B", ""),
    ("The answer is B or C", ""), ("Either A or B, I choose B", "B"), ("B and C are wrong, so A", "A"),
    ("E", ""), ("e.", ""), ("The answer is E", ""), ("I'd say C", "C"), ("e.g. a man", ""), ("It is B-like", ""),
    ("[B]", "B"), ("\\boxed{B}", "B"), ("The man runs (C)", "C"), ("<think>A fits</think>B", "B"), ("Don't know", ""),
    ("A. jumps\nB. walks\nC. turns\nD. falls", ""), ("A. jumps\nB. walks\nC. turns\nD. falls\nAnswer: C", "C"),
    ("walks", "B"), ("Turns.", "C"), ("he walks", ""), ("\u00c5", ""), ("B" * 5000, ""), ("(" * 5000, ""),
]  # fmt: skip
# Thoughts cut off or begun in the prompt; full-width letters; "option b"; other languages; articles and pronouns.
WILD = [
    ("<think>A looks right, but", ""), ("<thinking>A looks right. The answer is B", ""), ("<reasoning>B", ""),
    ("◁think▷A◁/think▷B", "B"), ("◁think▷A fits, so B", ""), ("A fits, so maybe C.</think>\n\nB", "B"),
    ("A fits</think>", ""), ("<think>A</think>", ""), ("B<think>hm", "B"), ("<THINK>\nA\n</THINK>\nB", "B"),
    ("[THINK]A fits[/THINK]B", "B"), ("[THINK]A fits", ""), ("<think>A</think>B<think>C</think>", "B"),
    ("<think>no<think>A</think>B", "B"), ("<think>A</think><answer>B</answer>", "B"),
    ("<think> A </think> <answer>(B)</answer>", "B"), ("Ｂ", "B"), ("（Ｂ）", "B"), ("Ｂ．", "B"), ("ｂ", "B"),
    ("Ⓑ", "B"), ("The answer is option (b).", "B"), ("option b", "B"), ("Option b.", "B"), ("I pick option b", "B"),
    ("option (b)", "B"), ("Choice c is right", "C"), ("choice b", "B"), ("option a man", ""),
    ("option a or option b", ""), ("Option a is wrong, option b fits", "B"), ("选B", "B"), ("选 B", "B"),
    ("答案是B", "B"), ("答案：B", "B"), ("答案:B。", "B"), ("答案是：Ｂ", "B"), ("正确答案是（B）。", "B"),
    ("正解はB", "B"), ("正解はBです。", "B"), ("答えはBです", "B"), ("答案应该是B", "B"), ("A不对，选B", "B"),
    ("不是A，是B", "B"), ("A和B都对", ""), ("A、B", ""), ("我选择C", "C"), ("选项B正确", "B"),
    ("选项A错误，选项B正确", "B"), ("B选项", "B"), ("B。因为他跳", "B"), ("B、走", "B"), ("정답은 B입니다", "B"),
    ("정답: B", "B"), ("คำตอบคือB", "B"), ("Ответ: B", "B"), ("Ответ — B", "B"),
    ("La respuesta correcta es B.", "B"), ("La réponse est (B)", "B"), ("Die Antwort ist B.", "B"),
    ("Jawaban: B", "B"), ("उत्तर: B", "B"), ("الجواب B", "B"), ("\\boxed{B}", "B"),
    ("A seems ok, but \\boxed{\\text{B}}", "B"), ("$\\boxed{(B)}$", "B"), ("**B.**", "B"), ("B:", "B"),
    ("**Answer:** B", "B"), ("**Answer: (b)**", "B"), ("Answer: option C", "C"), ("Answer: **Option C**", "C"),
    ("The correct answer choice is C", "C"), ("答案是E", ""), ("The answer is option (e).", ""), ("Ｅ", ""),
    ("\\boxed{E}", ""), ("option e", ""), ("A 3-year-old jumps", ""), ("I think it jumps", ""), ("I", ""),
    ("A élan jumps", ""), ("a", "A"), ("A 因为他跳", "A"), ("The answer is the letter B", "B"), ("我认为是B", "B"),
    ("B是对的", "B"), ("The answer is B或C", ""), ("他穿T恤", ""), ("A个人跳", ""), ("以上都不对", ""),
    ("A.跳\nB.走\nC.转\nD.倒", ""), ("A、跳\nB、走\nC、转\nD、倒\n答案：C", "C"), ("答案不是A，是B", "B"),
    ("The answer A is wrong; B", "B"), ("No sé la respuesta correcta", ""), ("la respuesta correcta es la B", "B"),
    ("Not A", ""), ("A车撞了B车", ""), ("B 是因为他走", "B"), ("A、B和C", ""), ("NOT A but B", "B"), ("B번", "B"),
]  # fmt: skip


@pytest.mark.parametrize("response, letter", PAGE + MORE + WILD)
def test_our_letter(response, letter):
    """Every row of the extraction table, and more."""
    assert read_letter(response, ["jumps", "walks", "turns", "falls"]) == letter


@pytest.mark.parametrize(
    "response, options, labels, letter",
    [
        ("C", ["x", "y"], (), ""),  # a letter without an option
        ("C", [], (), "C"),  # options not known
        ("Z", [], (), ""),
        ("same", ["other", "Same", "same."], (), "B"),  # the first of equal options
        ("None", ["x", "None"], (), "B"),  # where it is an option, it is an answer
        ("Option 2", ["x", "y"], ["Option 1", "Option 2"], "B"),
        ("Option 2: y", ["x", "y"], ["Option 1", "Option 2"], "B"),
        ("option 1 is wrong, option 2 fits", ["x", "y"], ["Option 1", "Option 2"], ""),
        ("Option 12", ["x", "y"], ["Option 1", "Option 2"], ""),
        ("Caption B: y", ["x", "y"], ["Caption A", "Caption B"], "B"),
        ("B", ["x", "y"], ["Option 1", "Option 2"], "B"),
        ("选Option 2", ["x", "y"], ["Option 1", "Option 2"], "B"),
        ("穿T恤。", ["走", "穿T恤"], (), "B"),
        ("I think it is C", list("opqrstuvwx"), (), "C"),  # ten options: I may be one
        ("I because it fits", list("opqrstuvwx"), (), "I"),
        ("I am not sure", list("opqrstuvwx"), (), ""),
    ],
)
def test_our_letter_with_options_and_labels(response, options, labels, letter):
    """Letters out of range, equal options, TempCompass's labels."""
    assert read_letter(response, options, labels) == letter


@pytest.mark.parametrize(
    "response, word",
    [("Yes", "yes"), ("yes.", "yes"), ("No, it is not", "no"), ("**No**", "no"), ("The answer is yes", "yes"), ("", ""),
     ("Not sure", ""), ("Nothing moves", ""), ("yes and no", ""), ("Yes. No doubt.", "yes"), ("I say no", "no"),
     ("Yesterday", ""), ("answer" + " " * 20_000 + "q", ""), ("Answer: (yes)", "yes"), ("<think>no</think>Yes", "yes"),
     ("<think>Yes, but", ""), ("no, so</think>Yes", "yes"), ("Ｙｅｓ", "yes")],
)  # fmt: skip
def test_our_yes_or_no(response, word):
    """Whole words; what begins the response, or is announced, or is the only one."""
    assert read_yes_no(response) == word


@pytest.mark.parametrize(
    "rule, response, letters",
    [
        ("vru_accident", "B", "B"), ("vru_accident", "I think A\nit is (C).", "C"), ("vru_accident", "B\n", ""),
        ("vru_accident", "A person runs, so B", "A"), ("vru_accident", "b", ""), ("vru_accident", "Answer: Because", "B"),
        ("vru_accident", "E", ""), ("motionbench", "The answer is (B).", "B"), ("motionbench", "I think B", "I"),
        ("motionbench", " B) no", "B"), ("motionbench", "B) x (C)", "B"), ("motionbench", "b", "b"),
        ("motionbench", "", ""), ("motionbench", "(", ""),
        ("video_mme", "The answer is B", "B"), ("video_mme", "Best answer: C", "B"),
        ("video_mme", "The best option is D", "D"),
        ("video_mme", "Both", "B"), ("video_mme", "b", ""), ("video_mme", "A man, so C", "A"), ("video_mme", "none", ""),
    ],
)  # fmt: skip
def test_official_rules_keep_their_faults(rule, response, letters):
    """Cases worked out by hand from the authors' code."""
    assert getattr(scoring, f"official_{rule}")(response) == letters


def test_official_mvbench_by_hand():
    """The response goes on from "(": an empty one is part of every label, a word before the letter spoils it."""
    cases = [("A) ate", "A"), ("(B) x", "B"), ("b", "B"), ("C.", "C"), ("", "ABC"), ("D) x", ""), ("The answer is (A)", "")]
    assert [scoring.official_mvbench(response, 3) for response, _ in cases] == [letters for _, letters in cases]
    assert scoring.official_mvbench("x\nB", 3) == ""  # the first line only


def test_official_tempcompass_by_hand():
    """The authors' later code: blanks around a response do not count, and a caption's letter or number is enough."""
    rule = scoring.official_tempcompass
    cases = [("B", "B"), ("B. x", "B"), ("B) x", "B"), ("B x", ""), ("(B)", ""), ("b", ""), ("C</s>", "C"), ("", ""),
             (" B. x\n", "B"), ("</s> D ", "D"), ("E. x", "")]  # fmt: skip
    assert [rule(response, "multi-choice") for response, _ in cases] == [letters for _, letters in cases]
    cases = [("Yes it", "yes"), ("Nothing", "no"), ("not sure", "no"), ("I say yes", ""), (" yes", "yes"), ("\nNo", "no")]
    assert [rule(response, "yes_no") for response, _ in cases] == [word for _, word in cases]
    options, labels = ["It falls.", "It jumps."], ["Option 1", "Option 2"]
    cases = [("Option 2", "B"), ("Option 2.", "B"), ("Option 2: It jumps.", "B"), ("It falls.", "A"), ("B) It jumps.", "B"),
             ("It jumps", ""), ("2", "B"), (" 1.\n", "A"), ("3", ""), ("option 2", ""), ("Option 1: It jumps.", ""),
             ("A", ""), ("2: It jumps.", ""), ("", "")]  # fmt: skip
    assert [rule(response, "caption_matching", options, labels) for response, _ in cases] == [x for _, x in cases]
    for word in ("Sentence", "Caption"):
        cases = [("A", "A"), ("B.", "B"), (" B</s>", "B"), ("b", ""), ("1", ""), (f"{word} A", "A"), (f"{word} B.", "B")]
        labels = [f"{word} A", f"{word} B"]
        assert [rule(response, "caption_matching", options, labels) for response, _ in cases] == [x for _, x in cases]
    # only what stands before a second colon is a sentence for them; the last form that fits counts, here the label
    signs = ["A sign says: stop", "Sentence A"]
    assert rule("A sign says", "caption_matching", signs, labels := ["Sentence A", "Sentence B"]) == "A"
    assert rule("A sign says: stop", "caption_matching", signs, labels) == ""
    assert rule("Sentence A: A sign says: stop", "caption_matching", signs, labels) == "A"


@pytest.mark.parametrize(
    "text, options",
    [
        ("A. x, B. y., C. a, b, D. z", "x|y.|a, b|z"),
        ("A. The car hit it, B.The vehicle, C. z, D. w", "The car hit it|The vehicle|z|w"),
        ("A.The car,B.The van,C.The bus,D.The U.S. truck", "The car|The van|The bus|The U.S. truck"),
        ("A. x, B)The van, C. z, D) w", "x|The van|z|w"),
        ("A) x, B) y, C) z, D) w", "x|y|z|w"),
        ("(A) x, (B) y, (C) z, (D) w", "x|y|z|w"),
        ("a. x, b. y, c. z, d. w", "x|y|z|w"),
        ("A. x, b. y, C. z, d.w", "x|y|z|w"),
        ("A. x\nB. y\n\nC.z\nD. w\n", "x|y|z|w"),
        ("A. x; B. y; C. z; D. w", "x|y|z|w"),
        ("A. x B. y C. z D. w", "x|y|z|w"),
        ("A. ran.B. fell.C. sat.D. stood.", "ran.|fell.|sat.|stood."),
        ("A: x , B: y,C: z,  D: w", "x|y|z|w"),
        ("A x, B y, C z, D w", "x|y|z|w"),
        ("A. Mr B. Smith hits C. Jones, B. y, C. z, D. w", "Mr B. Smith hits C. Jones|y|z|w"),
        ("A. Mr B. Smith, B.The y, C. z, D. plan D. w", "Mr B. Smith|The y|z|plan D. w"),
        ("A. one, two, and three, B. y, C. z, D. w", "one, two, and three|y|z|w"),
        ("A. x, B. y", None), ("x, y, z, w", None), ("", None), ("I see A. x, B. y, C. z, D. w", None),
        ("A. x, C. y, B. z, D. w", None), (", B. " * 20_000, None), (" " * 20_000, None),
    ],
)  # fmt: skip
def test_options_of_vru_accident(text, options):
    """Blanks, marks, case and separators vary in the real files; a letter inside a text divides nothing."""
    assert split_options(text) == (options and tuple(options.split("|")))


# --- Files in the official formats --------------------------------------------------------------------------------------


def write(path: Path, content: object) -> Path:
    """A file of text, or of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def options_of(rng: random.Random, count: int) -> list[str]:
    """Different texts, but now and then two that are equal."""
    options = [" ".join(rng.sample(WORDS, 3)) for _ in range(count)]
    if rng.random() < 0.3:
        i, j = rng.sample(range(count), 2)
        options[j] = options[i]
    return options


def fact(id, video, category, options, right, hidden=False, groups=None, **more) -> dict:
    """What a fixture knows of a question: `right` is an index of the options, or a word."""
    return (
        dict(id=id, video=video, category=category, options=options, right=right, hidden=hidden, groups=groups or {}) | more
    )


def make_vru_accident(root: Path, rng: random.Random) -> list[dict]:
    """Keys with and without .mp4, categories that repeat, one that is unknown, GT of all kinds."""
    facts = []
    for source in ("CAP_DATA", "DADA_2000", "DoTA", "MANUAL_DATA"):
        content = {}
        for v in range(rng.randint(2, 4)):
            key = f"./VRU_videos/{source}/VRU_{v}" + ".mp4" * (rng.random() < 0.7)
            content[key] = {}
            for category in rng.sample(["weather and light", "road type", "accident type", "speed"], rng.randint(1, 4)):
                options, right, hidden = options_of(rng, 4), rng.randrange(4), rng.random() < 0.1
                text = ", ".join(f"{letter}. {o}" for letter, o in zip("ABCD", options))
                truth = rng.choice(["NA", None]) if hidden else rng.choice(["{}", " {} "]).format("ABCD"[right])
                content[key][category] = {"question": "What?", "options": text, "GT": truth}
                facts.append(fact(f"{source}/VRU_{v}/{category}", f"{source}/VRU_{v}", category, options, right, hidden))
        write(root / "MetaData" / source / f"{source}_VQA_annotation.json", content)
    return facts


def make_motionbench(root: Path, rng: random.Random) -> list[dict]:
    """Two to six options inside the question, half of the answers NA, several questions a video."""
    facts, lines = [], []
    for v in range(12):
        category, pairs = rng.choice(["Action Order", "Camera Motion", "Repetition Count"]), []
        for _ in range(rng.randint(1, 3)):
            options, hidden = options_of(rng, rng.randint(2, 6)), rng.random() < 0.5
            right, uid = rng.randrange(len(options)), f"{v}_{len(facts)}"
            text = "What moves?" + "".join(f"\n{letter}. {o}" for letter, o in zip("ABCDEF", options))
            pairs.append({"uid": uid, "question": text, "answer": "NA" if hidden else "ABCDEF"[right]})
            facts.append(fact(uid, f"{v}", category, options, right, hidden, {"video type": "web"}))
        entry = {"question_type": category, "key": f"k{v}", "video_type": "web", "video_path": f"{v}.mp4", "qa": pairs}
        lines.append(json.dumps(entry | {"video_info": {"duration": 8.4, "fps": 60.0}}))
    write(root / "MotionBench" / "video_info.meta.jsonl", "\n".join(lines) + "\n")
    return facts


def make_mvbench(
    root: Path, rng: random.Random, tasks=("action_sequence", "action_count", "fine_grained_pose")
) -> list[dict]:
    """Answers are texts; equal candidates; numbers among them; start and end where the task has them."""
    facts = []
    for task in tasks:
        content, category = [], {"fine_grained_pose": "Fine-grained Pose"}.get(task, task.replace("_", " ").title())
        for i in range(8):
            options = options_of(rng, rng.randint(2, 5))
            right, video = rng.randrange(len(options)), f"{rng.randrange(4)}.mp4"
            entry = {"video": video, "question": "What?", "candidates": options, "answer": options[right]}
            content.append(entry | ({"start": 1, "end": 2.5} if task == "action_sequence" else {}))
            facts.append(fact(f"{task}/{i}", f"{task} {video}", category, options, options.index(options[right])))
        write(root / "json" / f"{task}.json", content)
    return facts


def make_tvbench(root: Path, rng: random.Random) -> list[dict]:
    """The same form."""
    return make_mvbench(root, rng, ("object_count", "action_sequence", "egocentric_sequence"))


def make_video_mme(root: Path, rng: random.Random) -> list[dict]:
    """Three questions a video, domains and task types."""
    facts, rows = [], []
    for v in range(8):
        duration, domain = rng.choice(["short", "medium", "long"]), rng.choice(["Knowledge", "Life Record"])
        for i in range(3):
            options, right, kind = options_of(rng, 4), rng.randrange(4), rng.choice(["OCR Problems", "Counting Problem"])
            row = {"video_id": f"{v:03d}", "videoID": f"y{v}", "question_id": f"{v:03d}-{i}", "duration": duration}
            row |= {"domain": domain, "sub_category": "Law", "task_type": kind, "question": "What?", "url": "u"}
            lettered = [f"{letter}. {o}." for letter, o in zip("ABCD", options)]
            rows.append(row | {"options": lettered, "answer": "ABCD"[right]})
            groups = {"domain": domain, "task type": kind, "sub-category": "Law"}
            facts.append(fact(row["question_id"], f"y{v}", duration, [f"{o}." for o in options], right, False, groups))
    (root / "videomme").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "videomme" / "test-00000-of-00001.parquet")
    return facts


def make_tempcompass(root: Path, rng: random.Random) -> list[dict]:
    """All three kinds, several aspects a video."""
    facts = []
    for kind in ("multi-choice", "yes_no", "caption_matching"):
        content: dict = {}
        for v, aspect, i in itertools.product(range(4), ("action", "speed"), range(2)):
            labels, options, right = [], [], rng.choice(["yes", "no"])
            text, answer = "Does it?", right
            if kind != "yes_no":
                options = options_of(rng, 2 if kind == "caption_matching" else rng.randint(2, 4))
                labels = list("ABCD")
                if kind == "caption_matching":
                    labels = rng.choice(
                        [["Option 1", "Option 2"], ["Caption A", "Caption B"], ["Sentence A", "Sentence B"]]
                    )
                mark, right = (": " if kind == "caption_matching" else ". "), rng.randrange(len(options))
                lines = [f"{label}{mark}{o}" for label, o in zip(labels, options)]
                text, answer = "\n".join(["What?", *lines]), lines[right]
            content.setdefault(f"{v}", {}).setdefault(aspect, []).append({"question": text, "answer": answer})
            more = {"kind": kind, "labels": labels[: len(options)]}
            facts.append(fact(f"{kind}/{v}/{aspect}/{i}", f"{v}", kind, options, right, False, {"aspect": aspect}, **more))
        write(root / "questions" / f"{kind}.json", content)
    return facts


MAKE = {"vru-accident": make_vru_accident, "motionbench": make_motionbench, "mvbench": make_mvbench,
        "tvbench": make_tvbench, "video-mme": make_video_mme, "tempcompass": make_tempcompass}  # fmt: skip

# --- The second loop ----------------------------------------------------------------------------------------------------


def some_response(rng: random.Random, f: dict) -> tuple[str, str]:
    """A response, and what our rule must read in it, known from how it was made."""
    if not f["options"]:
        word = rng.choice(["yes", "no"])
        return rng.choice([(word, word), (f"{word.title()}, it does.", word), (f"The answer is {word}.", word),
                           ("Not sure", ""), ("", ""), ("yes and no", ""), ("Nothing", "")])  # fmt: skip
    letters = "ABCDEF"[: len(f["options"])]
    a, b = rng.sample(letters, 2)
    i = rng.randrange(len(f["options"]))
    same = "ABCDEF"[[" ".join(o.split()) for o in f["options"]].index(f["options"][i])]
    out = [(a, a), (f"({a})", a), (f"{a}.", a), (f"{a})", a), (a.lower(), a), (f"({a.lower()}) so", a), (f"**{a}**", a),
           (f"The answer is ({a}).", a), (f"Answer: {a}", a), (f"I think it is {a} because {b} is wrong", a),
           (f"Both {b} and {a}; final answer: {a}", a), (f"A person runs, so {a}", a), (f"It moves.\n{a}", a),
           (f"{a}) {f['options'][0]}", a), (f"{a} or {b}", ""), ("None", ""), ("", ""), ("  ", ""), ("G", ""),
           ("nothing that can be seen here would let one say what is right", ""), (f["options"][i], same)]  # fmt: skip
    if f.get("kind") == "caption_matching":
        j, mark = rng.randrange(2), rng.choice(["", ".", f": {f['options'][0]}"])
        out += [(f["labels"][j] + mark, "AB"[j])] * 8 + [(" B.\n", "B")] * 2
    return rng.choice(out)


def authors_right(name: str, f: dict, text: str) -> tuple[bool, bool]:
    """Whether the authors' way takes a response as right, and whether it finds a letter at all: written anew."""
    answer = "ABCDEF"[f["right"]] if f["options"] else f["right"]
    if name == "vru-accident":
        last = text[text.rfind("\n") + 1 :]
        alone = [
            c for i, c in enumerate(last) if c in "ABCD" and not (last[i - 1 : i] + last[i + 1 : i + 2]).strip(" ().,;:*")
        ]
        return alone[:1] == [answer], bool(alone)
    if name == "motionbench":
        text = text.strip().partition(")")[0].strip()
        first = (text.split("(")[1] if "(" in text else text).strip()[:1]
        return first == answer, bool(first)
    if name in ("mvbench", "tvbench"):
        last = max(i for i, o in enumerate(f["options"]) if o == f["options"][f["right"]])
        label, word = f"({'abcdef'[last]})", ("(" + text.strip()).lower().split("\n")[0].split(" ")[0]
        return word.replace(".", "") in label or label in word, True
    if name == "video-mme":
        for start in ("The best answer is", "The correct answer is", "The answer is", "The answer"):
            text = text.replace(start, "")
        found = [c for c in text if c in "ABCD"]
        return found[:1] == [answer], bool(found)
    text = text.replace("</s>", "").strip()
    if f["kind"] == "yes_no":
        found = [w for w in ("yes", "no") if text.lower()[: len(w)] == w]
        return found[:1] == [answer], bool(found)
    if f["kind"] == "multi-choice":
        lines = [f"{letter}{mark}" for letter in "ABCD" for mark in (".", ")")]
        found = [text[0]] if text in ("A", "B", "C", "D") or text[:2] in lines else []
        return found == [answer], bool(found)
    options, labels, right = f["options"], f["labels"], f["right"]
    tail = text.split(") ")[1] if ") " in text else None
    bare = [label.split()[1] for label in labels]
    took = [i for i in (0, 1) if text in (f"{labels[i]}: {options[i]}", options[i], labels[i], labels[i] + ".")
            or text in (bare[i], bare[i] + ".") or tail == options[i]]  # fmt: skip
    return right in took, bool(took)


def ours_right(f: dict, read: str) -> bool:
    """What was read must be the right option, or one with its text."""
    if not f["options"]:
        return read == f["right"]
    return bool(read) and f["options"]["ABCDEF".index(read)] == f["options"][f["right"]]


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("protocol", ["official", "ours"])
def test_scores_equal_a_second_loop(tmp_path, name, seed, protocol):
    """Overall, categories, groups, counts, the other rule: each counted again from what the fixture knows."""
    rng = random.Random(seed)
    facts = MAKE[name](tmp_path, rng)
    benchmark = load_benchmark(name, tmp_path, protocol)
    assert [q.id for q in benchmark.questions] == [f["id"] for f in facts] and len(facts) > 15
    said = {f["id"]: some_response(rng, f) for f in facts if rng.random() < 0.85}
    results = score(benchmark, {id: text for id, (text, _) in said.items()})

    right, total, videos, other, answered, found = Counter(), Counter(), {}, 0, 0, 0
    for f in facts:
        if f["hidden"]:
            continue
        text, read = said.get(f["id"], (None, ""))
        theirs, any_letter = (False, False) if text is None else authors_right(name, f, text)
        mine = ours_right(f, read)
        is_right = theirs if protocol == "official" else mine
        other += mine if protocol == "official" else theirs
        answered, found = answered + (text is not None), found + any_letter
        for table, group in [("overall", "overall"), ("category", f["category"]), *f["groups"].items()]:
            right[table, group] += is_right
            total[table, group] += 1
        videos.setdefault(f["video"], []).append(is_right)
    cells = {
        (table, group): cell["accuracy"] for table, groups in results["tables"].items() for group, cell in groups.items()
    }
    assert cells.keys() == total.keys()
    for key, cell in cells.items():
        assert cell["questions"] == total[key] and cell["value"] == pytest.approx(right[key] / total[key]), key
    scored = total["overall", "overall"]
    assert results["other rule"]["accuracy"] == pytest.approx(other / scored)
    counts = results["counts"]
    assert (counts["questions"], counts["scored"]) == (len(facts), scored)
    assert counts["hidden answers"] == sum(f["hidden"] for f in facts)
    assert counts["missing predictions"] == scored - answered
    known = ABOUT[name].categories
    assert counts["questions of an unknown category"] == sum(f["category"] not in known and not f["hidden"] for f in facts)
    equal = [f for f in facts if not f["hidden"] and len(set(f["options"])) < len(f["options"])]
    assert counts["questions with equal options"] == len(equal)
    if protocol == "ours":
        matched = sum(bool(read) for f in facts if not f["hidden"] for _, read in [said.get(f["id"], (None, ""))])
        assert results["match rate"] == pytest.approx(matched / scored)
        assert "as published" not in results
    elif name in ("video-mme", "vru-accident", "tempcompass", "motionbench"):
        of = found if name == "video-mme" else answered
        published = results["as published"]
        assert published["questions"] == of == sum(cell["questions"] for cell in published["categories"].values())
        assert published["accuracy"] == pytest.approx(right["overall", "overall"] / of)
        for category, cell in published["categories"].items():
            assert cell["accuracy"] is None or cell["accuracy"] * cell["questions"] == pytest.approx(
                right["category", category]
            )
    rows = {row["id"]: row for row in results["rows"]}
    assert len({row["video"] for row in rows.values()}) == len(videos)
    assert not results["complete"] and results["published questions"] == ABOUT[name].questions
    json.dumps(results)


def test_equal_options_count_as_each_protocol_says(tmp_path):
    """Ours takes every equal option; MVBench's code the last; VRU-Accident the letter in its file."""
    entry = {"video": "a.mp4", "question": "?", "candidates": ["x", "y", "x"], "answer": "x"}
    write(tmp_path / "json" / "action_count.json", [entry])
    found = {}
    for protocol, letter in itertools.product(("official", "ours"), "ABC"):
        benchmark = load_benchmark("mvbench", tmp_path, protocol)
        assert benchmark.questions[0].answer == "A"
        results = score(benchmark, {"action_count/0": letter})
        found[protocol, letter] = results["tables"]["overall"]["overall"]["accuracy"]["value"]
        assert results["counts"]["questions with equal options"] == 1
        assert results["counts"]["right by an equal option"] == (letter == "C")
    assert [found["official", letter] for letter in "ABC"] == [0, 0, 1]
    assert [found["ours", letter] for letter in "ABC"] == [1, 0, 1]


def test_mvbench_counts_what_is_taken_for_every_letter(tmp_path):
    """By the authors' rule an empty response is right; it is, and is counted; a missing one is wrong."""
    write(tmp_path / "json" / "action_count.json",
          [{"video": f"{i}.mp4", "question": "?", "candidates": ["x", "y"], "answer": "y"} for i in range(3)])  # fmt: skip
    results = score(load_benchmark("mvbench", tmp_path), {"action_count/0": "", "action_count/1": "B) y"})
    assert [row["scores"]["accuracy"] for row in results["rows"]] == [1, 1, 0]
    counts = results["counts"]
    assert (counts["responses taken for several answers"], counts["empty responses"], counts["missing predictions"]) == (
        1,
        1,
        1,
    )
    assert results["match rate"] == pytest.approx(1 / 3) and results["other rule"]["accuracy"] == pytest.approx(1 / 3)


# --- What cannot be used ------------------------------------------------------------------------------------------------


def problems_of(name: str, root: Path) -> tuple[list[str], list[str]]:
    """The ids that were read, and the problems."""
    benchmark = load_benchmark(name, root)
    return [q.id for q in benchmark.questions], benchmark.problems


def expect(problems: list[str], *parts: tuple[str, ...]) -> None:
    """Each problem holds its parts, in this order, and there is no other."""
    assert len(problems) == len(parts), "\n".join(problems)
    for problem, wanted in zip(problems, parts):
        assert all(part in problem for part in wanted), (problem, wanted)


def test_vru_accident_odd_records(tmp_path):
    """Wrong types, bad GT, unreadable options, doubled keys, paths that leave, missing files: each named, the rest read."""
    good = '{"question": "What?", "options": "A. x, B. y., C. a, b, D. z", "GT": "B"}'
    text = f"""{{"./VRU_videos/DoTA/VRU_1.mp4": {{"road type": {good}, "road type": {good}, "accident type": 5,
      "location": {{"question": "What?", "options": ["x"], "GT": "B"}},
      "accident reason": {{"question": "What?", "options": "A. x, B. y", "GT": "B"}},
      "weather and light": {{"question": "What?", "options": "A. x, B. y, C. z, D. w", "GT": "E"}},
      "prevention method": {{"question": "What?", "options": "A. x, B. y, C. z, D. w", "GT": 2}}}},
      "./VRU_videos/DoTA/VRU_2.mp4": [], "./VRU_videos/../../etc/VRU_3.mp4": {{"road type": {good}}},
      "./VRU_videos/DoTA/VRU_1": {{"road type": {good}, "location": {good}}},
      "DoTA/VRU_9": {{"road type": {good}}}, "a\\u0000b": {{"road type": {good}}}}}"""
    write(tmp_path / "MetaData" / "DoTA" / "DoTA_VQA_annotation.json", text)
    for source in ("CAP_DATA", "DADA_2000"):
        write(tmp_path / "MetaData" / source / f"{source}_VQA_annotation.json", {})
    benchmark = load_benchmark("vru-accident", tmp_path)
    ids = ["DoTA/VRU_1/road type", "DoTA/VRU_1/location", "DoTA/VRU_9/road type"]
    assert [q.id for q in benchmark.questions] == ids
    assert benchmark.questions[0].options == ("x", "y.", "a, b", "z") and benchmark.questions[0].answer == "B"
    assert benchmark.questions[0].video == tmp_path / "VRU_videos" / "DoTA" / "VRU_1.mp4"
    expect(
        benchmark.problems,
        ("DoTA/VRU_1/road type", "second question"),
        ("DoTA_VQA_annotation.json: ./VRU_videos/DoTA/VRU_1.mp4: accident type", "found 5"),
        ("location", "give the texts"),
        ("accident reason", "'options'", "A. x, B. y"),
        ("weather and light", "'GT'", "found E", "A, B, C, D"),
        ("prevention method", "'GT'", "found 2"),
        ("VRU_2.mp4", "found []"),
        ("VRU_3", "leaves the root"),
        ("DoTA/VRU_1/road type", "second question"),
        ("a\0b", "not a path"),
        ("MANUAL_DATA_VQA_annotation.json", "no such file"),
    )


def test_motionbench_odd_records(tmp_path):
    """Broken lines, wrong types, answers of no option, numbers as uid; options that cannot be told apart; both folders."""
    ask = "?\nA. x\nB. y\n  and more\n C) z"
    lines = [
        {"question_type": "Action Order", "video_path": "a.mp4", "qa": [
            {"uid": 7, "question": ask, "answer": " c "}, {"uid": "h", "question": ask, "answer": "NA"},
            {"uid": "e", "question": ask, "answer": "E"}, {"question": ask, "answer": "A"}, "A",
            {"uid": 7, "question": ask, "answer": "A"}, {"uid": "n", "question": "no options", "answer": "B"},
            {"uid": "g", "question": "?\nA. x\nC. y", "answer": "C"}]},
        {"video_path": "b.mp4", "qa": "A"}, {"video_path": "../../b.mp4", "qa": [{"uid": "o", "question": ask}]}, [1],
        {"video_path": "pub.mp4", "qa": [{"uid": "p", "question": ask, "answer": None}]},
    ]  # fmt: skip
    base = tmp_path / "MotionBench"
    write(base / "video_info.meta.jsonl", "\n".join([*map(json.dumps, lines), "{broken"]))
    write(base / "public-dataset" / "pub.mp4", "")
    with (base / "video_info.meta.jsonl").open("a") as more:
        more.write("\n" + json.dumps({"video_path": "x" * 5000, "qa": []}))
    benchmark = load_benchmark("motionbench", tmp_path)
    questions = {q.id: q for q in benchmark.questions}
    assert list(questions) == ["7", "h", "n", "g", "p"]
    assert questions["7"].options == ("x", "y and more", "z") and questions["7"].answer == "C"
    assert questions["h"].answer is None and questions["n"].options == questions["g"].options == ()
    assert questions["7"].video == base / "self-collected" / "a.mp4"
    assert questions["p"].video == base / "public-dataset" / "pub.mp4"
    assert load_benchmark("motionbench", base).questions == benchmark.questions
    expect(
        benchmark.problems,
        (":1, question 3", "'answer'", "found E", "A, B, C"),
        (":1, question 4", "uid"),
        (":1, question 5", "found A"),
        ("7: ", "second question"),
        (":2", "'qa'"),
        (":3", "'video_path'", "leaves the root"),
        (":4", "expected MotionBench"),
        (":6", "{broken"),
        (":7", "not a path"),
    )


def test_mvbench_odd_records(tmp_path):
    """Answers that are no candidate, lists of the wrong things, bounds that are none, tasks of no known name."""
    good = {"video": "a.mp4", "question": "?", "candidates": [2, "3"], "answer": 2}
    bad = [{"video": "a.mp4"}, good | {"answer": "4"}, good | {"candidates": []}, good | {"video": "../../../x"}, 5,
           good | {"candidates": [["2"], "3"]}, good | {"answer": None}, good | {"video": "/etc/x.mp4"}]  # fmt: skip
    write(tmp_path / "json" / "action_count.json", [good, *bad])
    bounds = [{"start": 1, "end": 2}, {"start": 2, "end": 1}, {}, {"start": "1", "end": 2}]
    write(tmp_path / "json" / "episodic_reasoning.json", [good | bound for bound in bounds])
    write(tmp_path / "json" / "new_task.json", [good])
    write(tmp_path / "json" / "state_change.json", '[{"video": ')
    (tmp_path / "video").mkdir()
    benchmark = load_benchmark("mvbench", tmp_path)
    questions = {q.id: q for q in benchmark.questions}
    assert list(questions) == ["action_count/0", "action_count/7", "episodic_reasoning/0"]
    assert questions["action_count/0"].options == ("2", "3") and questions["action_count/7"].answer is None
    assert questions["action_count/0"].start is None
    episodic = questions["episodic_reasoning/0"]
    assert (episodic.start, episodic.end, episodic.frames_per_second) == (1, 2, 3.0)
    assert episodic.video == tmp_path / "video" / "tvqa" / "frames_fps3_hq" / "a.mp4"
    named = [p for p in benchmark.problems if "no such file" not in p]
    expect(
        named,
        ("new_task.json", "no known name"),
        ("action_count.json: element 2", "give the texts"),
        ("element 3", "'answer'", "found 4"),
        ("element 4", "'candidates'"),
        ("element 5", "leaves the root"),
        ("element 6", "found 5"),
        ("element 7", "candidates"),
        ("element 9", "leaves the root"),
        ("state_change.json: found not readable as JSON", "fix the file"),
        ("episodic_reasoning.json: element 2", "'start'", "[2, 1]"),
        ("element 3", "[None, None]"),
        ("element 4", "'1'"),
    )
    assert len(benchmark.problems) - len(named) == 17  # the other tasks' files


def test_video_mme_odd_records(tmp_path):
    """Rows with nothing in them, missing columns, no parquet at all, subtitles that cannot be read."""
    make_video_mme(tmp_path, random.Random(0))
    path = tmp_path / "videomme" / "test-00000-of-00001.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()[:6]
    rows[1]["question"], rows[2]["options"], rows[3]["answer"] = None, [], "E"
    rows[4]["videoID"], rows[5]["question_id"] = "../../x", rows[0]["question_id"]
    rows.append(rows[0] | {"question_id": "one option", "options": ["A. x"], "answer": "A"})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (tmp_path / "subtitle").mkdir()
    (tmp_path / "subtitle" / f"{rows[0]['videoID']}.srt").write_bytes(b"\xff\xfe1")
    ids, problems = problems_of("video-mme", tmp_path)
    assert ids == ["000-0", "one option"]
    expect(
        problems, ("row 2",), ("row 3", "'options'"), ("row 4", "'answer'", "E"), ("row 5", "leaves"), ("000-0", "second")
    )
    assert "subtitles" in load_benchmark("video-mme", tmp_path, subtitles=True).problems[0]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"videoID": "a", "answer": "A"}]), path)
    with pytest.raises(ClipError, match=r"columns question_id, duration, .*options are missing; found videoID, answer"):
        load_benchmark("video-mme", tmp_path)
    write(path, "no parquet")
    with pytest.raises(ClipError, match=r"test-00000-of-00001\.parquet: not readable as parquet"):
        load_benchmark("video-mme", tmp_path)


def test_tempcompass_odd_records(tmp_path):
    """Answers that are no option, letters out of order, wrong types; captioning is named as not offered."""
    ask = "?\nA. x\nB. y"
    entries = [{"question": ask, "answer": "B. y"}, {"question": ask, "answer": "C. z"}, {"question": "?\nA. x\nC. y",
               "answer": "C. y"}, {"question": ask}, 3, {"answer": "A. x"}]  # fmt: skip
    write(tmp_path / "questions" / "multi-choice.json", {"1": {"action": entries}, "2": [], "3": {"action": 1}})
    write(tmp_path / "questions" / "yes_no.json", {"1": {"speed": [{"question": "?", "answer": "Yes"},
          {"question": "?", "answer": "maybe"}]}, "../1": {"speed": [{"question": "?", "answer": "no"}]}})  # fmt: skip
    benchmark = load_benchmark("tempcompass", tmp_path)
    answers = {q.id: q.answer for q in benchmark.questions}
    assert answers == {"multi-choice/1/action/0": "B", "multi-choice/1/action/3": None, "yes_no/1/speed/0": "yes"}
    expect(
        benchmark.problems,
        ("multi-choice/1/action/1", "C. z"),
        ("multi-choice/1/action/2", "'answer'"),
        ("multi-choice/1/action/4", "found 3"),
        ("multi-choice/1/action/5", "question"),
        ("multi-choice.json: 2",),
        ("multi-choice.json: 3",),
        ("yes_no/1/speed/1", "maybe"),
        ("yes_no.json: ../1", "leaves the root"),
        ("caption_matching.json", "no such file"),
    )
    assert any("captioning" in what for what in score(benchmark, {})["not offered"])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_read_is_one_error(tmp_path, name):
    """An empty root, none at all, and files of the wrong kind: an error that names the file, and no crash."""
    with pytest.raises(ClipError, match=str(tmp_path)):
        load_benchmark(name, tmp_path)
    with pytest.raises(ClipError, match="gone"):
        load_benchmark(name, tmp_path / "gone")
    if name in MAKE:
        MAKE[name](tmp_path, random.Random(0))
        for path in [p for p in tmp_path.rglob("*") if p.is_file()]:
            for text in ("", "{", "[1, 2]", "null", '{"a": 1}', "[" * 100_000, '{"a": ' * 5000, "\0"):
                whole = path.read_bytes()
                write(path, text)
                try:
                    load_benchmark(name, tmp_path)
                except ClipError as error:
                    assert path.name in str(error) or "no question" in str(error)
                path.write_bytes(whole)


def test_settings_that_cannot_be():
    """Unknown names, and subtitles where there are none."""
    for wrong, match in [(("x", "."), "x: unknown"), (("mvbench", ".", "mine"), "mine: unknown"),
                         (("mvbench", ".", "ours", True), "mvbench has none")]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            load_benchmark(*wrong)


# --- Predictions --------------------------------------------------------------------------------------------------------


def lines_file(path: Path, *records: object) -> Path:
    """A JSONL file; texts stand as they are."""
    return write(path, "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))


def test_predictions_odd_lines(tmp_path):
    """Doubled, unknown, broken, of wrong type: named, the rest read; null is a response that says nothing."""
    make_mvbench(tmp_path, random.Random(0))
    benchmark = load_benchmark("mvbench", tmp_path)
    benchmark_video = next(q.video for q in benchmark.questions if q.id == "action_count/0")
    path = lines_file(
        tmp_path / "p.jsonl",
        {"id": "action_count/0", "video": f"perception/{benchmark_video.name}", "category": "c", "response": "A"},
        {"id": "action_count/0", "response": "A"},
        {"id": "action_count/0", "response": "B"},
        {"id": "gone/0", "response": "A"},
        "",
        '{"id": "action_count/1", "resp',
        {"id": "action_count/2"},
        {"id": "action_count/3", "response": 3},
        {"id": 4, "response": "A"},
        ["action_count/5", "A"],
        {"id": "action_count/6", "response": None, "video": "another.mp4"},
        "7",
        '{"id": "action_count/7", "response": "\\ud800"}',
    )
    predictions, problems = read_predictions(path, benchmark)
    assert predictions == {"action_count/0": "A", "action_count/6": "", "action_count/7": "\ud800"}
    expect(
        problems,
        ("p.jsonl:2", "a second time", "the same response"),
        ("p.jsonl:3", "a second time", "another response", "first counts"),
        ("p.jsonl:4", "'gone/0' is no question of mvbench"),
        ("p.jsonl:6", "resp"),
        ("p.jsonl:7", "response"),
        ("p.jsonl:8", "3]"),
        ("p.jsonl:9", "'4' is no question"),
        ("p.jsonl:10",),
        ("p.jsonl:12",),
        ("p.jsonl: 1 lines name another video", "action_count/6"),
    )
    plain = write(
        tmp_path / "p.json", '{"action_count/0": "B", "action_count/1": null, "action_count/0": "C", "x": {"a": 1}}'
    )
    predictions, problems = read_predictions(plain, benchmark)
    assert predictions == {"action_count/0": "B", "action_count/1": ""}
    expect(problems, ("p.json: action_count/0", "second time"), ("p.json: x", "give the texts"))
    for path, text, match in [("gone.jsonl", None, "no such file"), ("bad.json", "{", "not readable as JSON"),
                              ("list.json", "[]", "no prediction for a question"), ("empty", None, "no such file"),
                              ("number.json", "7", "found a JSON int"), ("blank.jsonl", "\n", "it is empty"),
                              ("others.jsonl", '{"id": "x/0", "response": "A"}', "'x/0' is no question"),
                              ("theirs.json", '{"v.mp4": {"road type": {"pred": "A"}}}', "give the texts")]:  # fmt: skip
        (tmp_path / "empty").mkdir(exist_ok=True)
        if text is not None:
            write(tmp_path / path, text)
        with pytest.raises(ClipError, match=match):
            read_predictions(tmp_path / path, benchmark)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_vru_accident_authors_own_files(tmp_path, seed):
    """A folder of the authors' files gives their per-category accuracy: pred against GT, null and long answers wrong."""
    rng = random.Random(seed)
    facts = [f for f in make_vru_accident(tmp_path, rng) if not f["hidden"]]
    benchmark = load_benchmark("vru-accident", tmp_path)
    files: dict = {}
    right, total = Counter(), Counter()
    for f in facts:
        source, video, category = f["id"].split("/")
        truth = "ABCD"[f["right"]]
        pred = rng.choice([truth, truth, "A", "B", None, " c\n", "A person is hit", f"{truth}. x"])
        files.setdefault(source, {}).setdefault(f"./VRU_videos/{source}/{video}.mp4", {})[category] = {
            "pred": pred,
            "GT": truth,
        }
        total[category] += 1  # the authors' loop: strip, upper, equal
        right[category] += pred is not None and pred.strip().upper() == truth
    for source, content in files.items():
        write(tmp_path / "theirs" / f"{source}_VQA_response.json", content)
    write(tmp_path / "theirs" / "VRU_Accident_VQA_response.json",
          {"./VRU_videos/VRU_Accident/VRU_1.mp4": {"road type": {"pred": "A", "GT": "B"}}})  # fmt: skip
    predictions, problems = read_predictions(tmp_path / "theirs", benchmark)
    results = score(benchmark, predictions)
    found = {category: cell["accuracy"] for category, cell in results["tables"]["category"].items()}
    assert {c: cell["questions"] for c, cell in found.items()} == total
    assert {c: cell["value"] for c, cell in found.items()} == pytest.approx({c: right[c] / total[c] for c in total})
    assert results["as published"]["accuracy"] == pytest.approx(right.total() / total.total())
    assert any("VRU_Accident/VRU_1/road type" in p for p in problems) and any("more than a letter" in p for p in problems)
    assert results["counts"]["missing predictions"] == 0
    # the strict rule reads the long answers, too
    ours = load_benchmark("vru-accident", tmp_path, "ours")
    predictions, _ = read_predictions(tmp_path / "theirs", ours)
    assert any(text.endswith(". x") for text in predictions.values())
    # one file of four: the others' questions are missing, and wrong
    one = next(iter(files))
    predictions, _ = read_predictions(tmp_path / "theirs" / f"{one}_VQA_response.json", benchmark)
    few = score(benchmark, predictions)
    theirs = sum(len(c) for c in files[one].values())
    assert few["counts"]["missing predictions"] == len(facts) - theirs and few["counts"]["scored"] == len(facts)
    assert few["as published"]["questions"] == theirs


def test_vru_accident_file_that_disagrees(tmp_path):
    """A GT that is not the annotation's is named; the annotation counts. Wrong types and doubled categories are named."""
    make_vru_accident(tmp_path, random.Random(1))
    benchmark = load_benchmark("vru-accident", tmp_path)
    q = next(q for q in benchmark.questions if q.answer == "B")
    video, category = q.id.rsplit("/", 1)
    good = '{"pred": "B", "GT": "C"}'
    text = f'{{"./VRU_videos/{video}": {{"{category}": {good}, "{category}": {good}, "x": 3, "road type": {{"pred": 1}}}}}}'
    predictions, problems = read_predictions(write(tmp_path / "p.json", text), benchmark)
    assert predictions == {q.id: "B"}
    differs = ("its right answer is C", "annotation's B")
    expect(problems, differs, ("second time",), differs, ("x", "found 3"), ("'pred': 1",))
    with pytest.raises(ClipError, match="no prediction for a question of vru-accident"):  # the annotation in its place
        read_predictions(tmp_path / "MetaData" / "DoTA" / "DoTA_VQA_annotation.json", benchmark)


def test_tempcompass_authors_own_files(tmp_path):
    """A model's folder gives the authors' counts: predictions belong to the question whose text they repeat."""
    ask = {
        "1": {
            "action": [("Does what?\nA. x\nB. y", "A. x"), ("Does it?\nA. x\nB. y", "B. y")],
            "speed": [("How fast?\nA. fast\nB. slow", "B. slow")],
        },
        "2_reverse": {"action": [("Is?\nA. x\nB. y", "A. x")]},
    }
    captions = {
        "1": {
            "action": [
                ("Which caption?\nCaption A: It falls.\nCaption B: It jumps.", "Caption B: It jumps."),
                ("Which option?\nOption 1: It falls.\nOption 2: It jumps.", "Option 2: It jumps."),
            ]
        }
    }
    answers = {"1": {"order": [("Is it?", "yes"), ("Is it?", "no")]}}
    theirs = {"multi-choice": ask, "caption_matching": captions, "yes_no": answers}  # fmt: skip
    said = {"multi-choice": [" A. x.", "The man does y.", " slow", "B"], "caption_matching": [" B.", "1"],
            "yes_no": [" Yes, it is.", None]}  # fmt: skip
    for kind, videos in theirs.items():
        questions, predictions, texts = {}, {}, iter(said[kind])
        for video, aspects in videos.items():
            questions[video] = {a: [{"question": q, "answer": x} for q, x in pairs] for a, pairs in aspects.items()}
            predictions[video] = {a: [{"question": q, "answer": x, "prediction": next(texts)} for q, x in pairs]
                                  for a, pairs in aspects.items()}  # fmt: skip
        write(tmp_path / "questions" / f"{kind}.json", questions)
        write(tmp_path / "theirs" / f"{kind}.json", predictions)
    write(tmp_path / "theirs" / "captioning.json", {"1": {"action": []}})
    benchmark = load_benchmark("tempcompass", tmp_path)
    predictions, problems = read_predictions(tmp_path / "theirs", benchmark)
    assert predictions == {
        "multi-choice/1/action/0": " A. x.", "multi-choice/1/action/1": "The man does y.",
        "multi-choice/1/speed/0": " slow", "multi-choice/2_reverse/action/0": "B",
        "yes_no/1/order/0": " Yes, it is.", "yes_no/1/order/1": "",
        "caption_matching/1/action/0": " B.", "caption_matching/1/action/1": "1",
    }  # fmt: skip
    expect(problems, ("captioning needs a judge",))
    results = score(benchmark, predictions)  # right: the first, " B.", " Yes, it is."
    found = {
        c: (cell["accuracy"]["value"], cell["accuracy"]["questions"]) for c, cell in results["tables"]["category"].items()
    }
    assert found == {"multi-choice": (1 / 4, 4), "yes_no": (1 / 2, 2), "caption_matching": (1 / 2, 2)}
    assert results["match rate"] == 5 / 8
    # one file, called otherwise, in another order, with what the authors' script adds, and with what is wrong
    entries = [{"question": q, "gt-answer": a, "video-llm-prediction": a} for q, a in ask["1"]["action"][::-1]]
    entries += [{"question": "Gone?", "answer": "yes", "prediction": "yes"}, entries[0], {"question": "Does it?"}, 5]
    entries += [{"question": ask["1"]["action"][0][0], "answer": "B. y", "response": "B"}]
    path = write(tmp_path / "gemini.json", {"1.mp4": {"action": entries, "speed": "x"}, "9": {"action": entries[:1]}})
    predictions, problems = read_predictions(path, benchmark)
    assert predictions == {"multi-choice/1/action/0": "A. x", "multi-choice/1/action/1": "B. y"}
    expect(problems, ("'Gone?'", "left out"), ("multi-choice/1/action/1", "second time"), ("question", "prediction"),
           ("found 5",), ("its answer is B. y", "annotation's A. x"), ("action/0", "another response"),
           ("speed, 1", "found x"), ("9: action", "no such question"))  # fmt: skip
    for name in ("multi-choice.json", "captioning.json"):  # questions in the place of predictions; nothing to score
        with pytest.raises(ClipError, match="no prediction for a question of tempcompass"):
            read_predictions(
                tmp_path / {"multi-choice.json": "questions", "captioning.json": "theirs"}[name] / name, benchmark
            )


def test_video_mme_authors_own_file(tmp_path):
    """Their list of videos, by question_id; what the file calls missing is left out, and is in no figure of theirs."""
    facts = make_video_mme(tmp_path, random.Random(0))[:6]
    letters = ["ABCD"[f["right"]] for f in facts]
    said = [f"The best answer is {letters[0]}.", letters[1], " none", None, letters[4], letters[5]]
    videos = [{"video_id": f"{v:03d}", "duration": "short", "domain": "Knowledge", "sub_category": "Law", "questions": [
        {"question_id": f["id"], "task_type": "x", "question": "What?", "options": [], "answer": letter, "response": r}
        for f, letter, r in zip(facts[3 * v :][:3], letters[3 * v :], said[3 * v :])]} for v in range(2)]  # fmt: skip
    wrong = [{"video_id": "002", "missing": True, "questions": []}, {"questions": 1}, 7, {"questions": [{"response": "A"}]},
             {"video_id": "x", "questions": [{"question_id": "gone", "response": "A"}]}]  # fmt: skip
    path = write(tmp_path / "theirs.json", [*videos, *wrong])
    benchmark = load_benchmark("video-mme", tmp_path)
    predictions, problems = read_predictions(path, benchmark)
    assert predictions == {f["id"]: r or "" for f, r in zip(facts, said)}
    expect(problems, ("element 3", "was missing"), ("element 4",), ("element 5", "found 7"), ("element 6", "question_id"),
           ("element 7", "'gone' is no question"))  # fmt: skip
    results = score(benchmark, predictions)
    assert (results["as published"]["accuracy"], results["as published"]["questions"]) == (1, 4)  # "none", null: no letter
    assert results["tables"]["overall"]["overall"]["accuracy"]["value"] == 4 / 24
    # any benchmark: a JSON list of {"id", "response"}
    plain = write(tmp_path / "list.json", [{"id": f["id"], "response": r} for f, r in zip(facts, said)])
    assert read_predictions(plain, benchmark) == (predictions, [])
    write(tmp_path / "nothing.json", wrong)
    with pytest.raises(ClipError, match=r"no prediction for a question of video-mme in it:\n  nothing.json: element 1"):
        read_predictions(tmp_path / "nothing.json", benchmark)


def test_motionbench_as_the_authors_count(tmp_path):
    """Their script's acc and answered_acc by hand, with answers to hidden questions and without; their forms of files."""
    ask = [("p1", "A"), ("p2", "B"), ("p3", "A"), ("h1", "NA"), ("h2", "NA")]
    lines = [{"question_type": "Action Order", "video_path": f"{uid}.mp4", "qa": [
        {"uid": uid, "question": "?\nA. x\nB. y", "answer": answer}]} for uid, answer in ask]  # fmt: skip
    lines_file(tmp_path / "video_info.meta.jsonl", *lines)
    benchmark = load_benchmark("motionbench", tmp_path)

    def theirs(said: dict) -> tuple:
        script = score(benchmark, said)["authors' script"]
        return tuple((script[n]["accuracy"], script[n]["questions"]) for n in ("acc", "answered_acc"))

    # compute_accuracy: an answered hidden question leaves total_qa_num, but stays in total_answered_num
    assert theirs({"p1": "A", "p2": "A"}) == ((1 / 5, 5), (1 / 2, 2))
    assert theirs({"p1": "A", "p2": "B", "p3": "B", "h1": "A"}) == ((2 / 4, 4), (2 / 4, 4))
    assert theirs({"p1": "A", "p2": "B", "p3": "A", "h1": "A", "h2": "B"}) == ((1, 3), (3 / 5, 5))
    assert "authors' script" not in score(load_benchmark("motionbench", tmp_path, "ours"), {"p1": "A"})
    for name, content in (("a.json", {"p1": "A", "h1": "B"}), ("a.jsonl", '{"p1": "A"}\n{"h1": "B"}')):
        path = write(tmp_path / name, content)
        assert read_predictions(path, benchmark) == ({"p1": "A", "h1": "B"}, [])
    console = Console(file=(tmp_path / "log").open("w+"), width=300)
    evaluation.run_score(evaluation.ScoreSettings("motionbench", tmp_path, path), console)
    console.file.seek(0)
    shown = " ".join(console.file.read().split())
    assert "accuracy as published figures count: 100.00, of 1 answered questions" in shown
    assert "prints acc 25.00, of 4: hidden questions that are not answered count as wrong" in shown
    assert "answered_acc 50.00, of 2: hidden questions that are answered count as wrong" in shown
    write(tmp_path / "hidden.json", {"h1": "A"})
    with pytest.raises(ClipError, match="hidden answer; nothing can be scored"):
        evaluation.run_score(evaluation.ScoreSettings("motionbench", tmp_path, tmp_path / "hidden.json"), console)
    assert json.loads((tmp_path / "hidden.official.submission.json").read_text()) == {"h1": "A"}  # for the leaderboard


@pytest.mark.parametrize("protocol", ["official", "ours"])
def test_one_candidate_is_asked_and_counted(tmp_path, protocol):
    """MVBench has five such questions: its letter is right, silence is by the authors' rule, "B" is wrong."""
    entry = {"video": "a.mp4", "question": "?", "candidates": ["x"], "answer": "x"}
    write(tmp_path / "json" / "counterfactual_inference.json", [entry] * 4)
    benchmark = load_benchmark("mvbench", tmp_path, protocol)
    assert len(benchmark.questions) == 4 and "(A) x\n" in prompt(benchmark, benchmark.questions[0])[0]
    results = score(benchmark, {f"counterfactual_inference/{i}": r for i, r in enumerate(("A) x", "B", ""))})
    right = {"official": [1, 0, 1, 0], "ours": [1, 0, 0, 0]}[protocol]
    assert [row["scores"]["accuracy"] for row in results["rows"]] == right


def test_predictions_of_another_benchmark(tmp_path):
    """A run's folder says what it was made for, and is read as a folder; MVBench and TVBench share ids."""
    make_mvbench(tmp_path / "mv", random.Random(0), ("action_count",))
    write(tmp_path / "tv" / "json" / "action_count.json", (tmp_path / "mv" / "json" / "action_count.json").read_text())
    write(tmp_path / "run" / "settings.json", {"settings": {"benchmark": "mvbench"}})
    lines_file(tmp_path / "run" / "predictions.jsonl", {"id": "action_count/0", "response": "A"})
    assert read_predictions(tmp_path / "run", load_benchmark("mvbench", tmp_path / "mv"))[0] == {"action_count/0": "A"}
    tvbench = load_benchmark("tvbench", tmp_path / "tv")
    for path in (tmp_path / "run", tmp_path / "run" / "predictions.jsonl"):
        with pytest.raises(
            ClipError, match=r"predictions of mvbench, as its settings\.json says; give --benchmark mvbench"
        ):
            read_predictions(path, tvbench)


# --- Descriptions -------------------------------------------------------------------------------------------------------


def make_captions(root: Path) -> None:
    """Keys without .mp4, an empty caption, one of the wrong type, one that leaves."""
    write(root / "MetaData" / "DoTA" / "DoTA_Dense_Caption.json", {
        "./VRU_videos/DoTA/VRU_1": {"gt": "A car hits a man at night."}, "./VRU_videos/DoTA/VRU_2": {"gt": "It rains."},
        "./VRU_videos/DoTA/VRU_3": {"gt": " "}, "./VRU_videos/DoTA/VRU_4": "x", "./VRU_videos/../../y": {"gt": "x"},
        "./VRU_videos/DoTA/VRU_2.mp4": {"gt": "Again."}})  # fmt: skip
    for source in ("CAP_DATA", "DADA_2000", "MANUAL_DATA"):
        write(root / "MetaData" / source / f"{source}_Dense_Caption.json", {})


def test_vru_accident_captions(tmp_path, monkeypatch):
    """ROUGE by hand, from the authors' files with .mp4 keys; a missing description is 0; who computed it is said."""
    make_captions(tmp_path)
    benchmark = load_benchmark("vru-accident-captions", tmp_path)
    assert [q.id for q in benchmark.questions] == ["DoTA/VRU_1", "DoTA/VRU_2"]
    expect(benchmark.problems, ("VRU_3", "'gt'"), ("VRU_4",), ("leaves the root",), ("second",))
    path = write(tmp_path / "r_response.json", {"./VRU_videos/DoTA/VRU_1.mp4": {"pred": "Cars hit a dog."}})
    predictions, problems = read_predictions(path, benchmark)
    assert predictions == {"DoTA/VRU_1": "Cars hit a dog."} and not problems
    monkeypatch.setattr(scoring, "meteor_scorer", lambda: (None, "LookupError: x"))
    results = score(benchmark, predictions)
    # stemmed: [car, hit, a, dog] against [a, car, hit, a, man, at, night]: 3 words, 2 pairs, 3 in order
    f1 = [2 * p * r / (p + r) for p, r in ((3 / 4, 3 / 7), (2 / 3, 2 / 6), (3 / 4, 3 / 7))]
    found = results["tables"]["overall"]["overall"]
    assert [found[n]["value"] for n in ("ROUGE-1", "ROUGE-2", "ROUGE-L")] == pytest.approx([x / 2 for x in f1])
    assert set(results["packages"]) == {"rouge-score"} and results["counts"]["missing predictions"] == 1
    assert [what.split(":")[0] for what in results["not offered"]] == ["SPICE", "COMET", "METEOR"]
    assert results["not offered"][-1].endswith("found LookupError: x")

    def breaks(reference: str, text: str) -> float:
        return {"It rains.": 0.5}[reference]

    monkeypatch.setattr(scoring, "meteor_scorer", lambda: (breaks, ""))  # at one of the texts
    results = score(benchmark, predictions)
    assert "METEOR" not in results["tables"]["overall"]["overall"] and "KeyError" in results["not offered"][-1]
    monkeypatch.setattr(scoring, "meteor_scorer", lambda: (lambda reference, text: 0.5 * bool(text), ""))
    results = score(benchmark, predictions)
    assert results["tables"]["overall"]["overall"]["METEOR"]["value"] == 0.25
    assert "nltk" in results["packages"] and len(results["not offered"]) == 2


def test_meteor_is_nltks(monkeypatch):
    """NLTK's METEOR without marks, by hand; WordNet, a download, is played by one that knows no synonym."""
    monkeypatch.setattr(nltk, "word_tokenize", lambda text: re.findall(r"\w+|\S", text))
    monkeypatch.setitem(vars(nltk.corpus.wordnet), "ensure_loaded", lambda: None)
    monkeypatch.setitem(vars(nltk.corpus.wordnet), "synsets", lambda *_: [])
    meteor, _ = scoring.meteor_scorer()
    assert meteor("A man jumps off.", "A man jumps off.") == pytest.approx(1 - 0.5 / 4**3)  # one chunk of four words
    p, r = 2 / 3, 2 / 4  # "man" and, by its stem, "jumps": one chunk of two
    assert meteor("A man jumps off.", "The man jumping!") == pytest.approx(10 * p * r / (r + 9 * p) * (1 - 0.5 / 2**3))
    assert meteor("A man jumps off.", "") == 0

    def missing(*_):
        raise LookupError("wordnet")

    monkeypatch.setitem(vars(nltk.corpus.wordnet), "synsets", missing)
    assert scoring.meteor_scorer() == (None, "LookupError: wordnet")


@pytest.mark.parametrize("missing", ["nothing", "data.verb", "index.adv", "lexnames", "verb.exc", "all", "torn"])
def test_meteor_with_an_incomplete_wordnet(tmp_path, monkeypatch, missing):
    """A WordNet some of whose files are missing or torn is a reason to leave METEOR out, not an end of the run."""
    names = [f"{form}.{kind}" for form in ("index", "data") for kind in ("noun", "verb", "adj", "adv")]
    files = dict.fromkeys([*names, *(f"{kind}.exc" for kind in ("noun", "verb", "adj", "adv")), "lexnames"], "")
    files |= {"index.verb": "run v 1 0 1 0 00000000  \n", "verb.exc": "ran run\n", "lexnames": "00\tverb.motion\t2\n"}
    files |= {"data.verb": "00000000 00 v 01 run 0 000 01 + 02 00 | move fast\n"}
    files |= {"data.adj": "  1 WordNet 3.0 Copyright 2006\n", "index.sense": ""}
    for name, text in files.items():
        if missing not in ("all", name):
            write(tmp_path / "corpora" / "wordnet" / name, "torn" if (missing, name) == ("torn", "data.verb") else text)
    reader, lazy = nltk.corpus.reader.WordNetCorpusReader, nltk.corpus.util.LazyCorpusLoader
    wordnet = lazy("wordnet", reader, lazy("omw-1.4", nltk.corpus.reader.CorpusReader, ".*"))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk.corpus, "wordnet", wordnet)
    monkeypatch.setattr(nltk, "word_tokenize", lambda text: re.findall(r"\w+|\S", text))
    meteor, reason = scoring.meteor_scorer()
    assert (meteor is None) == (missing != "nothing") == bool(reason) and "\n" not in reason


class OneHot:
    """A text encoder for which words have nothing in common unless they are equal; "runs" is halfway to "walks"."""

    def __call__(self, texts):
        known = {w: i for i, w in enumerate(sorted({w for t in texts for w in words_of(t)} | {"runs", "walks"}))}
        out = []
        for text in texts:
            rows = torch.eye(len(known))[[known[w] for w in words_of(text)]]
            for i, w in enumerate(words_of(text)):
                if w == "runs":
                    rows[i, known["walks"]] = 1.0
            out.append(EmbeddedText([known[w] for w in words_of(text)], rows * 3))
        return out


def words_of(text: str) -> list[str]:
    """Words, whatever the marks."""
    return text.lower().replace(".", "").replace("!", "").split()


def test_dream_1k_event_recall(tmp_path):
    """By hand: each event by the sentence that covers it best; both forms of the file; no events: the caption."""

    def entry(idx, events, caption="A man runs.", **more):
        messages = [{"role": "user", "content": [{"type": "video", "text": None}, {"type": "text", "text": "Describe."}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "", "reference": caption}]}]  # fmt: skip
        extra = {"events": events, "n_events": len(events)} if isinstance(events, list) else {"events": events}
        return {"messages": messages, "dataset": "DREAM/youtube", "idx": idx, "vid": idx, "extra_info": extra} | more

    old = {
        "text": {"prompt": "<video>\nDescribe it.", "response": "A dog barks."},
        "dataset": "DREAM/stock",
        "idx": 2,
        "vid": 9,
    }
    path = lines_file(tmp_path / "DREAM-1k.jsonl", entry(1, ["Man walks", "Dog barks loudly now"]),
                      old | {"extra_info": {"events": []}}, entry(3, "x"), entry(4, [1]), entry(5, ["x"], vid="../../5"),
                      {"messages": []}, "{", entry(1, ["x"]), entry(6, ["Rain falls"]))  # fmt: skip
    benchmark = load_benchmark("dream-1k", tmp_path)
    assert path.exists() and [q.id for q in benchmark.questions] == ["1", "2", "6"]
    assert benchmark.questions[1].video == tmp_path / "video" / "9.mp4"
    assert [prompt(benchmark, q)[0] for q in benchmark.questions] == ["Describe.", "Describe it.", "Describe."]
    expect(
        benchmark.problems, (":3", "'events'"), (":4", "'events'"), (":5", "leaves"), (":6", "messages"), (":7",), ("1: ",)
    )
    with pytest.raises(ValueError, match="--text-encoder"):
        score(benchmark, {})
    results = score(benchmark, {"1": "A man runs. A dog barks!", "2": "A dog. barks"}, OneHot())
    # 1: man 1, walks cos(45 deg); dog barks of four words. 2: its caption, two of three words in a sentence
    by_hand = [((1 + 0.5**0.5) / 2 + 2 / 4) / 2, 2 / 3, 0]
    assert [row["scores"]["event recall (embedding)"] for row in results["rows"]] == pytest.approx(by_hand, abs=1e-6)
    assert "sentence-transformers" in results["packages"] and "judge" in results["not offered"][0]
    assert results["tables"]["category"]["DREAM/stock"]["event recall (embedding)"]["value"] == pytest.approx(2 / 3)
    encoder = build_text_encoder(tmp_path / "encoder", ["man walks dog barks loudly now runs a rain falls"])
    said = lines_file(
        tmp_path / "p.jsonl", {"id": "1", "response": "Dog barks loudly now. Man walks."}, {"id": "6", "response": ""}
    )
    settings = evaluation.ScoreSettings("dream-1k", tmp_path, said, text_encoder=str(encoder))
    rows = evaluation.run_score(settings, Console(quiet=True))["rows"]
    assert [row["scores"]["event recall (embedding)"] for row in rows] == pytest.approx([1, 0, 0], abs=1e-6)


def test_clips_score_as_eval_does(tmp_path, world):
    """The world's clips: the scores that `eval.py` gives; ids by video and part; bad lines named; missing is empty."""
    benchmark = load_benchmark("clips", world / "test.jsonl")
    questions = benchmark.questions[:3]
    assert questions[0].id == "test/000/000000.mp4" and questions[0].key_spans == [
        questions[0].record["clip"].truth["span"]
    ]
    said = {questions[0].id: questions[0].answer, questions[1].id: "A red circle. Nothing happens."}
    rows = {row["id"]: row for row in score(benchmark, said)["rows"]}
    actions = {q.record["clip"].truth["action"] for q in benchmark.questions}
    for q in questions:
        assert rows[q.id]["scores"] == scoring.score_description(q.record["clip"], said.get(q.id, ""), actions)
    assert (
        rows[questions[0].id]["scores"]["event named"] == 1 and rows[questions[2].id]["scores"]["caption similarity"] == 0
    )
    own = [{"video": "a.mp4", "caption": "He jumps.", "keywords": ["jumps"], "prompt": "Say!",
            "key_spans": [[[1, 2], [3, 4]]]}, {"video": "a.mp4", "caption": "He waits.", "start": 1.5, "end": 3},
           {"video": "a.mp4", "caption": "Again."}, {"video": "../a.mp4", "caption": "x"}]  # fmt: skip
    lines_file(tmp_path / "clips.jsonl", *own)
    benchmark = load_benchmark("clips", tmp_path)
    assert [q.id for q in benchmark.questions] == ["a.mp4", "a.mp4@1.5-3", "a.mp4#2"]
    assert benchmark.questions[0].key_spans == [[1, 2], [3, 4]] and prompt(benchmark, benchmark.questions[0]) == (
        "Say!",
        "",
    )
    expect(benchmark.problems, ("clips.jsonl:4", "leaves the root"))
    results = score(benchmark, {"a.mp4": "he JUMPS"})
    assert results["tables"]["overall"]["overall"]["keyword recall"] == {
        "value": 1,
        "low": None,
        "high": None,
        "questions": 1,
    }
    assert results["tables"]["overall"]["overall"]["caption similarity"]["questions"] == 3


# --- Prompts ------------------------------------------------------------------------------------------------------------


def test_prompts_and_frames(tmp_path):
    """What each benchmark's authors ask, word for word, and the common prompt of ours."""
    rng = random.Random(0)

    def first(name: str, protocol: str, **more):
        if not (tmp_path / name).exists():
            (make_captions if name == "vru-accident-captions" else lambda root: MAKE[name](root, rng))(tmp_path / name)
        benchmark = load_benchmark(name, tmp_path / name, protocol, **more)
        return benchmark, benchmark.questions[0], prompt(benchmark, benchmark.questions[0])

    benchmark, q, (text, begin) = first("vru-accident", "official")
    assert (text, begin) == ("What? " + ", ".join(f"{c}. {o}" for c, o in zip("ABCD", q.options)), "")
    assert (benchmark.num_frames, benchmark.max_new_tokens, benchmark.place) == (8, 10, 0.0)
    benchmark, q, (text, _) = first("vru-accident-captions", "official")
    assert text.startswith("\n        Provide a detailed description of this crash video. \n\n        Use clear")
    assert text.endswith("and final impact. \n\n        ") and benchmark.max_new_tokens == 200
    assert first("vru-accident-captions", "ours")[2][0].startswith(
        "Provide a detailed description of this crash video. Use"
    )
    benchmark, q, (text, begin) = first("mvbench", "official")
    options = "\n".join(f"({c}) {o}" for c, o in zip("ABCDE", q.options))
    assert text.startswith("Carefully watch the video") and begin == "Best option:("
    assert text.endswith(f"\nQuestion: What?\nOptions:\n{options}\nOnly give the best option.")
    assert (benchmark.num_frames, benchmark.max_new_tokens, benchmark.place) == (16, 100, 0.5)
    assert first("tvbench", "official")[2][1] == "Best option:("
    for name in ("mvbench", "motionbench", "video-mme", "vru-accident"):
        benchmark, q, asked = first(name, "ours")
        options = "\n".join(f"({c}) {o}" for c, o in zip("ABCDEF", q.options))
        stem = {"motionbench": "What moves?"}.get(name, "What?")
        assert asked == (f"{stem}\n{options}\nAnswer with the letter of the correct option only.", "")
        assert (benchmark.num_frames, benchmark.max_new_tokens, benchmark.place) == (16, 16, 0.5)
    _, q, (text, _) = first("motionbench", "official")
    assert text == q.text + "\nAnswer with only the option letter (A, B, C, D, E, or F)."
    _, q, (text, _) = first("video-mme", "official")
    assert text.splitlines()[0].endswith(
        "based on the video. Respond with only the letter (A, B, C, or D) of the correct option."
    )
    assert text.splitlines()[1:] == ["What?", *(f"{c}. {o}" for c, o in zip("ABCD", q.options)), "The best answer is:"]
    benchmark, _, _ = first("tempcompass", "official")
    ends = {q.category: prompt(benchmark, q)[0] for q in benchmark.questions}
    assert ends["yes_no"] == "Does it?\nPlease answer yes or no:"
    assert ends["multi-choice"].endswith("\nPlease directly give the best option:")
    assert ends["caption_matching"].endswith("\nPlease directly give the best option:")
    benchmark, _, _ = first("tempcompass", "ours")
    ends = {q.category: prompt(benchmark, q)[0] for q in benchmark.questions}
    assert ends["yes_no"] == "Does it?\nAnswer yes or no." and ends["caption_matching"].startswith("What?\n(A) ")


def test_subtitles_are_those_of_the_sampled_frames(tmp_path):
    """The authors want the subtitles at the sampled moments, each once; without a duration all; marks are taken away."""
    make_video_mme(tmp_path, random.Random(0))
    srt = "\ufeff1\n00:00:01,000 --> 00:00:02,500\n<font color=white>One</font>\nand more\n\nbroken\n\n"
    srt += "2\r\n00:00:30.000 --> 00:00:30.100 x\r\nbetween frames\r\n\r\n"
    srt += "3\n01:00:00,000 --> 01:00:01,000\nLate\n"
    write(tmp_path / "subtitle" / "y0.srt", srt)
    benchmark = load_benchmark("video-mme", tmp_path, subtitles=True)
    asked = [prompt(benchmark, benchmark.questions[i], duration) for i, duration in ((0, None), (0, 64.0), (3, 64.0))]
    head = "This video's subtitles are listed below:\n"
    assert asked[0][0].startswith(head + "One and more\nbetween frames\nLate\nSelect the best answer")
    assert asked[1][0].startswith(head + "One and more\nSelect the best answer")  # frames at 0.5, 1.5, ...: 30.0 has none
    assert asked[2][0].startswith("Select the best answer")  # a video without subtitles
    plain = load_benchmark("video-mme", tmp_path)
    assert prompt(plain, plain.questions[0])[0].startswith("Select the best answer")


# --- Intervals and tests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_intervals_equal_a_plain_bootstrap(seed):
    """Against a loop that draws whole videos; videos have unequally many questions, some scores are not everywhere."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 6, (30, 2))
    counts[:, 0] += 1
    rates = rng.random((30, 1))
    sums = rng.binomial(counts, rates)
    got = intervals(sums, counts, resamples=4000, seed=seed)
    for c in range(2):
        means = []
        for _ in range(4000):
            drawn = rng.integers(0, 30, 30)
            means.append(sum(sums[v, c] for v in drawn) / sum(counts[v, c] for v in drawn))
        assert got[:, c] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.02)
    assert np.array_equal(got, intervals(sums, counts, resamples=4000, seed=seed))
    assert not np.array_equal(got, intervals(sums, counts, resamples=4000, seed=seed + 1))


def test_intervals_take_videos_not_questions():
    """Ten questions that are right or wrong together say as much as one; of one video there is no interval."""
    right = np.array([0, 1] * 20)[:, None]
    assert np.allclose(intervals(right, np.ones((40, 1))), intervals(right * 10, np.full((40, 1), 10)))
    wide = np.ptp(intervals(right[:10] * 10, np.full((10, 1), 10)))
    assert wide > 2 * np.ptp(intervals(np.array([0, 1] * 50)[:, None], np.ones((100, 1))))
    got = intervals(np.array([[1, 2], [0, 3]]), np.array([[2, 3], [0, 3]]))
    assert np.isnan(got[:, 0]).all() and not np.isnan(got[:, 1]).any()


@pytest.mark.parametrize("seed", range(4))
def test_permutation_test_equals_all_exchanges(seed):
    """Every exchange of signs, counted; from 16 videos on the draws come near it; ties at zero do not matter."""
    rng = np.random.default_rng(seed)
    for size, tolerance in ((1, 0), (5, 0), (9, 0), (16, 0.02)):
        d = rng.integers(-3, 5, size) / 3
        sums = [abs(sum(s * x for s, x in zip(signs, d))) for signs in itertools.product((-1, 1), repeat=size)]
        exact = sum(s >= abs(d.sum()) - 1e-9 for s in sums) / len(sums)
        assert permutation_test([*d, 0.0, 0.0]) == pytest.approx(exact, abs=tolerance + 1e-12)
    assert permutation_test([1, 1, 1]) == 2 / 8 and permutation_test([]) == 1 and permutation_test([0.0] * 30) == 1
    assert permutation_test([1.0] * 40) < 0.001 and permutation_test([1.0, -1.0] * 20) > 0.9


def results_of(root: Path, benchmark: Benchmark, letters: str) -> dict:
    """The result of answering the questions by these letters in turn."""
    return score(benchmark, {q.id: letter for q, letter in zip(benchmark.questions, letters)})


def test_compare_counts_and_tests_pairs(tmp_path):
    """Won, lost, tied by hand; p by hand over videos, not questions; the other way about, the signs change."""
    videos = ["a", "a", "b", "b", "c", "d"]
    write(tmp_path / "json" / "action_count.json",
          [{"video": f"{v}.mp4", "question": "?", "candidates": ["x", "y"], "answer": "x"} for v in videos])  # fmt: skip
    benchmark = load_benchmark("mvbench", tmp_path)
    a, b = results_of(tmp_path, benchmark, "BBABBB"), results_of(tmp_path, benchmark, "AAABAB")
    got = compare(a, b)["scores"]["accuracy"]
    assert (got["won"], got["lost"], got["tied"]) == (3, 0, 3)
    assert (got["a"], got["b"], got["difference"]) == pytest.approx((1 / 6, 4 / 6, 3 / 6))
    assert got["p"] == 2 / 4  # two videos differ, by 2 and by 1: 3, 1, -1, -3
    assert got["low"] < 0.5 < got["high"]
    back = compare(b, a)["scores"]["accuracy"]
    assert back["difference"] == -got["difference"] and back["p"] == got["p"] and (back["won"], back["lost"]) == (0, 3)


def test_compare_refuses_what_differs(tmp_path):
    """Another benchmark, protocol, subtitles, question, answer or score: said which."""
    make_mvbench(tmp_path, random.Random(0))
    benchmark = load_benchmark("mvbench", tmp_path)
    a = json.loads(json.dumps(results_of(tmp_path, benchmark, "ABAB" * 9)))
    changed = [
        ({"benchmark": "tvbench"}, "benchmark differs: mvbench and tvbench"),
        ({"protocol": "ours"}, "protocol differs"),
        ({"subtitles": True}, "subtitles differs"),
        ({"rows": a["rows"][1:]}, "1 questions are in one file only, the first is action_sequence/0"),
        (
            {"rows": [a["rows"][0] | {"answer": "Z"}, *a["rows"][1:]]},
            "1 answers differ, the first is that of action_sequence/0",
        ),
        ({"rows": [a["rows"][0] | {"scores": {}}, *a["rows"][1:]]}, "score accuracy is in one file only"),
    ]
    for change, match in changed:
        with pytest.raises(ValueError, match=match):
            compare(a, a | change)


# --- The command --------------------------------------------------------------------------------------------------------


def test_motionbench_answer_file(tmp_path):
    """The answer file has hidden and public questions, by the protocol's rule; what is no letter is left out."""
    facts = make_motionbench(tmp_path, random.Random(3))
    hidden, public = next(f for f in facts if f["hidden"]), next(f for f in facts if not f["hidden"])
    rest = [f for f in facts if f not in (hidden, public)]
    said = {hidden["id"]: "The answer is (B).", public["id"]: "(A)", rest[0]["id"]: "", rest[1]["id"]: "?"}
    want = {hidden["id"]: "B", public["id"]: "A"}
    assert answer_file(load_benchmark("motionbench", tmp_path), said) == want
    assert answer_file(load_benchmark("motionbench", tmp_path, "ours"), said) == want


def test_score_from_the_command_line(tmp_path):
    """Table, JSON, Markdown, answer file; problems by name; a comparison; errors that say what to do."""
    facts = make_motionbench(tmp_path, random.Random(3))
    with (tmp_path / "MotionBench" / "video_info.meta.jsonl").open("a") as broken:
        broken.write('{"video_path": "cut')
    public = [f for f in facts if not f["hidden"]]
    said = [{"id": f["id"], "response": "ABCDEF"[f["right"]]} for f in facts[1:]]
    for name, records in (("a", said), ("b", [r | {"response": "[x] A"} for r in said])):
        lines_file(tmp_path / "out" / f"{name}.jsonl", *records, {"id": "[bold]gone", "response": "A"})
    arguments = ["--benchmark", "motionbench", "--root", tmp_path, "--predictions", tmp_path / "out" / "a.jsonl"]
    done = run("eval.py", "score", *arguments)
    results = json.loads((tmp_path / "out" / "a.official.json").read_text())
    value = results["tables"]["overall"]["overall"]["accuracy"]["value"]
    assert value == (len(public) - (not facts[0]["hidden"])) / len(public)
    shown = ["missing predictions", "[bold]gone", '"cut', "Qwen3-VL-8B", "(second-hand)", "accuracy by our strict rule",
             "hidden answers", "not the whole benchmark, which has 8052", "the authors' own script prints acc",
             f"{100 * value:.2f} ("]  # fmt: skip
    for part in shown:
        assert part in done.stdout, (part, done.stdout)
    assert "missing videos" not in done.stdout  # no video is needed
    assert results["problems"] and results["commit"] and "text encoder" in results
    page = (tmp_path / "out" / "a.official.md").read_text()
    assert f"| overall | {len(public)} | {100 * value:.2f} (" in page and "- problems: 2" in page
    answers = json.loads((tmp_path / "out" / "a.official.submission.json").read_text())
    assert answers == {r["id"]: r["response"] for r in said}

    console = Console(file=(tmp_path / "log").open("w+"), width=200)
    evaluation.run_score(evaluation.ScoreSettings("motionbench", tmp_path, tmp_path / "out" / "b.jsonl"), console)
    pair = (tmp_path / "out" / "b.official.json", tmp_path / "out" / "a.official.json")
    compared = evaluation.run_score(evaluation.ScoreSettings(compare=pair), console)
    assert compared["scores"]["accuracy"]["b"] == pytest.approx(value)
    console.file.seek(0)
    assert "permutation test over videos" in (log := console.file.read()) and f"{100 * value:.2f}" in log

    evaluation.run_score(evaluation.ScoreSettings("motionbench", tmp_path, tmp_path / "out" / "a.jsonl", "ours"), console)
    for settings, match in [
        (evaluation.ScoreSettings("motionbench"), "--root, --predictions missing"),
        (evaluation.ScoreSettings("motionbench", tmp_path, tmp_path, videos=tmp_path), "--videos: only for clips"),
        (evaluation.ScoreSettings("motionbench", tmp_path, tmp_path / "x.jsonl"), "no such file"),
        (evaluation.ScoreSettings(compare=(tmp_path / "x.json", tmp_path / "x.json")), "x.json: not a result"),
        (evaluation.ScoreSettings(compare=(tmp_path / "out" / "a.jsonl",) * 2), "a.jsonl: not a result"),
        (evaluation.ScoreSettings(compare=(tmp_path / "out" / "a.official.submission.json",) * 2), "not a result"),
        (
            evaluation.ScoreSettings(compare=tuple(tmp_path / "out" / f"a.{p}.json" for p in ("ours", "official"))),
            "protocol",
        ),
    ]:
        with pytest.raises(ValueError, match=match):
            evaluation.run_score(settings, console)
    with pytest.raises(ClipError, match="no question of mvbench"):
        evaluation.run_score(evaluation.ScoreSettings("mvbench", tmp_path, tmp_path / "out" / "a.jsonl"), console)


def test_a_folder_of_predictions_gets_its_results_beside_it(tmp_path):
    """Not in it, where they would be read as predictions; a folder's name may have a dot."""
    make_vru_accident(tmp_path, random.Random(0))
    silent = {category: {"pred": None, "GT": "A"} for category in ("speed", "road type", "accident type")}
    write(tmp_path / "out" / "Qwen2.5-VL" / "DoTA_VQA_response.json", {"./VRU_videos/DoTA/VRU_0.mp4": silent})
    settings = evaluation.ScoreSettings("vru-accident", tmp_path, tmp_path / "out" / "Qwen2.5-VL")
    results = evaluation.run_score(settings, Console(quiet=True))
    assert results["tables"]["overall"]["overall"]["accuracy"]["value"] == 0
    assert results["as published"]["accuracy"] == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"Qwen2.5-VL", "Qwen2.5-VL.official.json", "Qwen2.5-VL.official.md"}


def test_predictions_with_a_name_of_250_bytes(tmp_path):
    """Their results have a shorter one: a file system takes 255."""
    facts = make_motionbench(tmp_path, random.Random(3))
    path = lines_file(tmp_path / ("ü" * 122 + ".jsonl"), *({"id": f["id"], "response": "A"} for f in facts))
    evaluation.run_score(evaluation.ScoreSettings("motionbench", tmp_path, path), Console(quiet=True))
    made = sorted(p.name.partition(".")[2] for p in tmp_path.glob("ü*.official*"))
    assert made == ["official.json", "official.md", "official.submission.json"]
