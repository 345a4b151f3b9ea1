"""Public benchmarks: read their files as published, ask as their authors asked, score by their rules and by ours.

    benchmark = load_benchmark("vru-accident", root)           # questions, and what could not be read, by name
    text, begin = prompt(benchmark, benchmark.questions[0])    # the user's turn, and how the assistant's begins
    predictions, problems = read_predictions(path, benchmark)
    results = score(benchmark, predictions)

Running and scoring are separate: a predictions file is scored without a model and without videos. Formats, prompts, frame
counts and rules were read in the authors' repositories; what these leave open is said where it is decided.

`protocol` "official": prompt, frames and answer rule of the authors. "ours": 16 frames at the middles of equal parts, one
prompt and one strict rule for all. Every question whose answer is public counts, answered or not: no missing prediction, no
unreadable answer leaves the denominator. A question whose answer is hidden counts nowhere.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.clips import ClipError
from data.importers import is_seconds, read_json

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """One question of a benchmark, or one video to describe."""

    id: str
    """Unique in its benchmark, the same on every run: the key of a prediction."""
    video: Path
    """A file, or a folder of frames."""
    category: str
    text: str
    """The question as the file has it."""
    options: tuple[str, ...]
    """Texts of the options without their letters; () where the answer is free text, or yes or no."""
    answer: str | None
    """The right letter (the first of equal options), or the reference text; None: hidden, in no denominator."""
    start: float | None = None
    end: float | None = None
    """Seconds of the part of the video that is asked about."""
    frames_per_second: float | None = None
    """Of a folder of frames."""
    key_spans: list | None = None
    """[[start, end], ...] in seconds from `start`, where they are known: for the twin."""
    record: dict = field(default_factory=dict)
    """What else a prompt or a rule needs; `groups`: further tables that the question counts in, name -> group."""


@dataclass
class Benchmark:
    """A benchmark's questions, and how it is run."""

    name: str
    protocol: str
    questions: list[Question]
    problems: list[str]
    """Records that cannot be used, each named: file, record, field, what was found, what to do."""
    num_frames: int
    max_new_tokens: int
    place: float
    """Frame i of n is the one at (i + place) * duration / n."""
    subtitles: bool = False


@dataclass(frozen=True)
class About:
    """What is fixed about a benchmark: how its authors run it, how many questions it has, and of which categories."""

    num_frames: int
    max_new_tokens: int
    place: float
    questions: int | None = None
    categories: tuple[str, ...] | None = None


Refuse = Callable[[str, str, object, str], None]
"""refuse(where, field, found, mend) notes a record that cannot be used."""

CRASH = (
    "Provide a detailed description of this crash video.",
    "Use clear and complete sentences with appropriate traffic and crash-related terminology.",
    "Include descriptions of weather conditions, road type, and vehicle or pedestrian appearance (such as clothing and "
    "posture).",
    "Mention vehicle speed, trajectory, and movements, as well as any changes in the pedestrian's behavior.",
    "Focus on the dynamics of the collision, including vehicle approach, pedestrian movement, and final impact.",
)
WATCH = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of objects, "
    "and the action and pose of persons. Based on your observations, select the best option that accurately addresses the "
    "question."
)

# task file -> (category, folder of its videos, whether start and end bound the part, frames a second of a folder of frames)
MVBENCH = {
    "action_sequence": ("Action Sequence", "star/Charades_v1_480", True, None),
    "action_prediction": ("Action Prediction", "star/Charades_v1_480", True, None),
    "action_antonym": ("Action Antonym", "ssv2_video", False, None),
    "fine_grained_action": ("Fine-grained Action", "Moments_in_Time_Raw/videos", False, None),
    "unexpected_action": ("Unexpected Action", "FunQA_test/test", False, None),
    "object_existence": ("Object Existence", "clevrer/video_validation", False, None),
    "object_interaction": ("Object Interaction", "star/Charades_v1_480", True, None),
    "object_shuffle": ("Object Shuffle", "perception/videos", False, None),
    "moving_direction": ("Moving Direction", "clevrer/video_validation", False, None),
    "action_localization": ("Action Localization", "sta/sta_video", True, None),
    "scene_transition": ("Scene Transition", "scene_qa/video", False, None),
    "action_count": ("Action Count", "perception/videos", False, None),
    "moving_count": ("Moving Count", "clevrer/video_validation", False, None),
    "moving_attribute": ("Moving Attribute", "clevrer/video_validation", False, None),
    "state_change": ("State Change", "perception/videos", False, None),
    "fine_grained_pose": ("Fine-grained Pose", "nturgbd", False, None),
    "character_order": ("Character Order", "perception/videos", False, None),
    "egocentric_navigation": ("Egocentric Navigation", "vlnqa", False, None),
    "episodic_reasoning": ("Episodic Reasoning", "tvqa/frames_fps3_hq", True, 3.0),
    "counterfactual_inference": ("Counterfactual Inference", "clevrer/video_validation", False, None),
}
TVBENCH = {
    task: (task.replace("_", " ").title(), task, task in ("action_sequence", "action_localization"), None)
    for task in ("action_count", "object_count", "action_sequence", "object_shuffle", "scene_transition",
                 "action_localization", "action_antonym", "unexpected_action", "egocentric_sequence", "moving_direction")
}  # fmt: skip

ABOUT = {
    "vru-accident": About(8, 10, 0.0, 6000, ("weather and light", "location", "road type", "accident type",
                                             "accident reason", "prevention method")),
    "vru-accident-captions": About(8, 200, 0.0, 1000),
    "mvbench": About(16, 100, 0.5, 4000, tuple(category for category, *_ in MVBENCH.values())),
    "tvbench": About(16, 100, 0.5, 2525, tuple(category for category, *_ in TVBENCH.values())),
}  # fmt: skip
NAMES = tuple(ABOUT)
OURS = (16, 16, 0.5)  # frames, tokens of an answer (a description keeps its authors' number), place


# --- Reading the files --------------------------------------------------------------------------------------------------


def below(root: Path, path: str, where: str, refuse: Refuse, name: str = "video") -> Path | None:
    """The path below root that a record names, or None where it leaves root (and was refused)."""
    try:
        found = (root / path).resolve()
        if found.is_relative_to(root.resolve()):
            return root / path
        mend = f"it leaves the root {root}; move it there or name another root"
    except (OSError, ValueError) as error:
        mend = f"not a path ({error})"
    refuse(where, name, path, mend)
    return None


def video_name(key: str) -> str:
    """A VRU-Accident video without its folder of all videos and without .mp4: the keys of captions lack it.

    >>> video_name("./VRU_videos/DoTA/VRU_1.mp4"), video_name("./VRU_videos/DoTA/VRU_1")
    ('DoTA/VRU_1', 'DoTA/VRU_1')
    """
    return re.sub(r"^(\./)*(VRU_videos/)?|\.mp4$", "", key.strip())


def metadata_files(root: Path, ending: str, refuse: Refuse) -> Iterator[Path]:
    """VRU-Accident's MetaData/S/S_<ending> for each of its four sources S; one that is not there is refused."""
    for source in ("CAP_DATA", "DADA_2000", "DoTA", "MANUAL_DATA"):
        path = root / "MetaData" / source / f"{source}_{ending}"
        if path.is_file():
            yield path
        else:
            refuse(str(path), "", "no such file", f"put {path.name} there, or its questions are not asked")


def vru_accident(root: Path, refuse: Refuse, subtitles: bool) -> Iterator[Question]:
    """VRU-Accident, MetaData/S/S_VQA_annotation.json: {video: {category: {"question", "options": "A. x, B. y, C. z, D. w",
    "GT": "D"}}}; videos below VRU_videos. Read in Kimyounggun99/VRU-Accident and, whole files, in its anonymous copy."""
    for path in metadata_files(root, "VQA_annotation.json", refuse):
        for key, categories in read_json(path, dict, "VRU-Accident: {video: {category: {question, options, GT}}}"):
            where = f"{path.name}: {key}"
            if not isinstance(categories, dict):
                refuse(where, "", categories, "give an object of categories")
                continue
            video = below(root, f"VRU_videos/{video_name(key)}.mp4", where, refuse)
            for category, entry in categories.items() if video else ():
                place = f"{where}: {category}"
                if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("question", "options")):
                    refuse(place, "", entry, 'give the texts "question" and "options"')
                    continue
                parsed = re.fullmatch(r"A\. (.*?),? B\. (.*?),? C\. (.*?),? D\. (.*)", entry["options"].strip(), re.DOTALL)
                answer = letter_of(entry.get("GT"), 4, place, "GT", refuse)
                if not parsed:
                    refuse(place, "options", entry["options"], 'write "A. x, B. y, C. z, D. w"')
                elif answer != "":
                    record = {"options": entry["options"]}
                    yield Question(f"{video_name(key)}/{category}", video, category, entry["question"], parsed.groups(),
                                   answer, record=record)  # fmt: skip


def mvbench(root: Path, refuse: Refuse, subtitles: bool, tasks: dict = MVBENCH) -> Iterator[Question]:
    """MVBench, json/TASK.json: [{"video", "question", "candidates": [...], "answer": text, "start", "end"}], videos in the
    task's folder below video/ (or below the root). Read in OpenGVLab/Ask-Anything, video_chat2/mvbench.ipynb."""
    videos = root / "video" if (root / "video").is_dir() else root
    for path in sorted((root / "json").glob("*.json")):
        if path.stem not in tasks:
            refuse(str(path), "", "a task of no known name", "take it away, or give it one of " + ", ".join(tasks))
    for task, (category, folder, bounded, frames_per_second) in tasks.items():
        path = root / "json" / f"{task}.json"
        if not path.is_file():
            refuse(str(path), "", "no such file", "put it there, or its questions are not asked")
            continue
        for i, entry in enumerate(read_json(path, list, "MVBench: [{video, question, candidates, answer}]")):
            where = f"{path.name}: element {i + 1}"
            texts = isinstance(entry, dict) and all(isinstance(entry.get(k), str) for k in ("video", "question"))
            options = entry.get("candidates") if texts else None
            if not isinstance(options, list) or not all(isinstance(o, (str, int)) for o in options):
                refuse(where, "", entry, 'give the texts "video" and "question", and "candidates", a list of texts')
                continue
            options = tuple(map(str, options))
            if not 1 < len(options) <= len(LETTERS):
                refuse(where, "candidates", options, f"give 2 to {len(LETTERS)} options")
                continue
            answer = entry.get("answer")
            if answer is not None and str(answer) not in options:
                refuse(where, "answer", answer, "give the text of one of the candidates")
                continue
            start, end = (entry.get("start"), entry.get("end")) if bounded else (None, None)
            if bounded and not (is_seconds(start) and is_seconds(end) and start < end):
                refuse(where, "start", [start, end], "give start and end in seconds, the end after the start")
                continue
            if video := below(videos, f"{folder}/{entry['video']}", where, refuse):
                letter = None if answer is None else LETTERS[options.index(str(answer))]
                yield Question(f"{task}/{i}", video, category, entry["question"], options, letter, start, end,
                               frames_per_second)  # fmt: skip


def tvbench(root: Path, refuse: Refuse, subtitles: bool) -> Iterator[Question]:
    """TVBench, the form of MVBench with videos below video/TASK. Read in daniel-cores/tvbench, infer.ipynb."""
    yield from mvbench(root, refuse, subtitles, TVBENCH)


def letter_of(answer: object, count: int, where: str, name: str, refuse: Refuse) -> str | None:
    """The right letter among `count` options (0: any); None: hidden; "": neither, and refused."""
    if answer is None or (isinstance(answer, str) and answer.strip().upper() in ("", "NA")):
        return None
    letters = LETTERS[: count or None]
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
        return answer.strip().upper()
    refuse(where, name, answer, f"give one of the letters {', '.join(letters)}, or NA where it is hidden")
    return ""


LOADERS = {"vru-accident": vru_accident, "mvbench": mvbench, "tvbench": tvbench}


def load_benchmark(name: str, root: Path, protocol: str = "official", subtitles: bool = False) -> Benchmark:
    """Read a benchmark's files below root.

    What cannot be used is in `problems`; of questions with the same id only the first is kept, and the others are problems.
    Raises ClipError where the files hold no question at all, ValueError for an unknown name or protocol.
    """
    if name not in NAMES:
        raise ValueError(f"benchmark {name}: unknown; give one of {', '.join(NAMES)}")
    if protocol not in ("official", "ours"):
        raise ValueError(f"protocol {protocol}: unknown; give official or ours")
    root, problems, questions = Path(root), [], {}

    def refuse(where: str, name: str, found: object, mend: str) -> None:
        shown = found if isinstance(found, str) else repr(found)
        shown = shown[:80] + "..." * (len(shown) > 80)
        problems.append(f"{where}: " + f"field '{name}': " * bool(name) + f"found {shown}; {mend}")

    for question in LOADERS[name](root, refuse, subtitles):
        if question.id in questions:
            refuse(question.id, "", "a second question of this id", "take one of them out; the first is kept")
        else:
            questions[question.id] = question
    if not questions:
        shown = "\n  ".join(problems[:10]) or "its files are empty"
        raise ClipError(f"{root}: no question of {name} in it:\n  {shown}")
    about = ABOUT[name]
    how = (about.num_frames, about.max_new_tokens, about.place)
    if protocol == "ours":
        choices = any(q.options for q in questions.values())
        how = (OURS[0], OURS[1] if choices else about.max_new_tokens, OURS[2])
    return Benchmark(name, protocol, list(questions.values()), problems, *how, subtitles)


# --- Asking -------------------------------------------------------------------------------------------------------------


def lettered(options: Sequence[str]) -> str:
    """Options as lines "(A) text"."""
    return "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options))


def prompt(benchmark: Benchmark, question: Question) -> tuple[str, str]:
    """The user's text, and how the assistant's turn begins ("" or "Best option:(").

    vru-accident: question and options; for Qwen its authors put them before the video. mvbench, tvbench: what is the
    authors' system text stands, as in their notebooks, before the question, too.
    """
    q = question
    if benchmark.protocol == "ours":
        return f"{q.text}\n{lettered(q.options)}\nAnswer with the letter of the correct option only.", ""
    if benchmark.name == "vru-accident":
        return f"{q.text} {q.record['options']}", ""
    return f"{WATCH}\nQuestion: {q.text}\nOptions:\n{lettered(q.options)}\nOnly give the best option.", "Best option:("
