"""Public benchmarks: the questions as their authors ask them, or as we do.

    benchmark = load_benchmark("vru-accident", root)           # questions, and a line for each that could not be read
    text, begin = prompt(benchmark, benchmark.questions[0])    # the user's turn, and how the assistant's begins
    predictions, problems = read_predictions(path, benchmark)  # data/benchmarks/predictions.py
    results = score(benchmark, predictions)                    # data/benchmarks/results.py
    compare(results, other_results)

Running and scoring are separate: a predictions file is scored without a model and without videos. Formats are read in
formats.py; prompts and frame counts are those of the authors' repositories, and what these leave open is said where it is
decided.

`protocol` "official": prompt, frames and answer rule of the authors. "ours": 16 frames at the middles of equal parts, one
prompt and one strict rule for all.
"""

from dataclasses import dataclass
from pathlib import Path

from data.benchmarks.formats import CRASH, FORMATS, MOTIONBENCH, MVBENCH, TEMPCOMPASS, TVBENCH, Question
from data.benchmarks.scoring import LETTERS
from data.files import ClipError, PathError, inside_root

NAMES = tuple(FORMATS)
DESCRIBED = ("vru-accident-captions", "dream-1k", "clips")


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
    max_pixels: int | None = None
    """Of a picture, at most (default: the processor's own limit)."""


@dataclass(frozen=True)
class About:
    """What is fixed about a benchmark: how its authors run it, how many questions it has, and of which categories."""

    num_frames: int
    max_new_tokens: int
    place: float
    questions: int | None = None
    categories: tuple[str, ...] | None = None


# Not from the authors, who leave it open: the frames of motionbench, video-mme (they say: what a model can take) and
# tempcompass (one a second for Qwen2-VL), the new tokens of motionbench and video-mme (lmms-eval's). The authors of
# tempcompass and dream-1k take first and last frame, too: middles are the nearest to that which there is.
ABOUT = {
    "vru-accident": About(8, 10, 0.0, 6000, ("weather and light", "location", "road type", "accident type",
                                             "accident reason", "prevention method")),
    "vru-accident-captions": About(8, 200, 0.0, 1000, ("CAP_DATA", "DADA_2000", "DoTA", "MANUAL_DATA")),
    "motionbench": About(16, 64, 0.5, 8052, MOTIONBENCH),
    "mvbench": About(16, 100, 0.5, 4000, tuple(category for category, *_ in MVBENCH.values())),
    "tvbench": About(16, 100, 0.5, 2525, tuple(category for category, *_ in TVBENCH.values())),
    "video-mme": About(64, 16, 0.5, 2700, ("short", "medium", "long")),
    "tempcompass": About(16, 128, 0.5, 5536, TEMPCOMPASS),
    "dream-1k": About(8, 512, 0.5, 1000),
    "clips": About(16, 64, 0.5),
}  # fmt: skip
OURS = (16, 16, 0.5)  # frames, tokens of an answer (a description keeps its authors' number), place

WATCH = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of objects, "
    "and the action and pose of persons. Based on your observations, select the best option that accurately addresses the "
    "question."
)
SELECT = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter (A, "
    "B, C, or D) of the correct option."
)


def load_benchmark(
    name: str,
    root: Path,
    protocol: str = "official",
    subtitles: bool = False,
    follow_links: bool = False,
    videos: Path | None = None,
) -> Benchmark:
    """Read a benchmark's files below root (clips: the JSONL file, or a folder with clips.jsonl).

    videos: the folder that the paths of one's own clips are relative to (default: that of their file).
    What cannot be used is in `problems`; of questions with the same id only the first is kept, and the others are problems.
    follow_links: videos may be links that leave the root. Raises ClipError if the files hold no question at all,
    ValueError for an unknown name or protocol.
    """
    if name not in NAMES:
        raise ValueError(f"--benchmark {name}: unknown; give one of {', '.join(NAMES)}")
    if protocol not in ("official", "ours"):
        raise ValueError(f"--protocol {protocol}: unknown; give official or ours")
    if subtitles and name != "video-mme":
        raise ValueError(f"--subtitles: {name} has none; only video-mme has")
    if videos is not None and name != "clips":
        raise ValueError(f"--videos: only for clips; the videos of {name} are below its --root")
    if videos is not None and not Path(videos).is_dir():
        raise ClipError(f"--videos {videos}: no such folder; give the one that the clips' paths are relative to")
    root, problems, questions = Path(root), [], {}
    if not root.exists():
        raise ClipError(f"--root {root}: no such folder; download {name} to there")

    def refuse(where: str, field: str, found: object, fix: str, reason: str = "") -> None:
        shown = found if isinstance(found, str) else repr(found)
        shown = shown[:80] + "..." * (len(shown) > 80)
        problems.append(f"{where}: " + f"field '{field}': " * bool(field) + f"found {shown}; " * bool(shown) + fix)

    own = (
        {"follow_links": follow_links, "videos": videos} if name == "clips" else {}
    )  # its reader judges the links itself, by line
    for question in FORMATS[name](root, refuse, subtitles, **own):
        try:
            if not own:
                inside_root(str(question.video.absolute()), root, follow_links)
        except PathError as error:
            refuse(question.id, "video", str(question.video), str(error))
            continue
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
        how = (OURS[0], about.max_new_tokens if name in DESCRIBED else OURS[1], OURS[2])
    return Benchmark(name, protocol, list(questions.values()), problems, *how, subtitles)


# --- Asking -------------------------------------------------------------------------------------------------------------


def lettered(options: tuple[str, ...]) -> str:
    """Options as lines "(A) text"."""
    return "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options))


def prompt(benchmark: Benchmark, question: Question, duration: float | None = None) -> tuple[str, str]:
    """The user's text, and how the assistant's turn begins ("" or "Best option:(").

    vru-accident: for Qwen, its authors put the text before the video. mvbench, tvbench: their authors give WATCH as system
    text and before the question; here it comes before the question. motionbench: its authors publish no prompt; this is
    lmms-eval's. video-mme: subtitles are those at the sampled moments where `duration`, the video's seconds, is given, as
    its authors ask, else all of them.
    """
    q, record = question, question.record
    stem, begin = record.get("stem", q.text), ""
    if benchmark.protocol == "ours":
        text = f"{stem}\n{lettered(q.options)}" if q.options else q.text
        if record.get("kind") == "yes_no":
            text += "\nAnswer yes or no."
        elif benchmark.name not in DESCRIBED:
            text += "\nAnswer with the letter of the correct option only."
    elif benchmark.name == "vru-accident":
        text = f"{q.text} {record['options']}"
    elif benchmark.name == "vru-accident-captions":  # as in their code, white space included
        text = "\n" + "".join(f"        {sentence} \n\n" for sentence in CRASH) + "        "
    elif benchmark.name == "motionbench":
        text = f"{q.text}\nAnswer with only the option letter (A, B, C, D, E, or F)."
    elif benchmark.name in ("mvbench", "tvbench"):
        text = f"{WATCH}\nQuestion: {q.text}\nOptions:\n{lettered(q.options)}\nOnly give the best option."
        begin = "Best option:("
    elif benchmark.name == "video-mme":
        text = "\n".join([SELECT, q.text, *record["options"], "The best answer is:"])
    elif benchmark.name == "tempcompass":
        text = f"{q.text}\nPlease " + (
            "answer yes or no:" if record["kind"] == "yes_no" else "directly give the best option:"
        )
    else:
        text = q.text
    if spoken := record.get("subtitles"):
        if duration is not None:
            moments = [(i + benchmark.place) * duration / benchmark.num_frames for i in range(benchmark.num_frames)]
            spoken = [line for line in spoken if any(line[0] <= moment < line[1] for moment in moments)]
        text = "\n".join(["This video's subtitles are listed below:", *(line[2] for line in spoken), text])
    return text, begin
