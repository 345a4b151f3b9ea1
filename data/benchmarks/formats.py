"""The files of public benchmarks, as published: from each record a Question, or a reason why it cannot be used.

Each format names the repository in which it was read. A reader is a generator over the questions; what it cannot use it
names, and the reading continues. Paths in the files cannot leave the root.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.benchmarks.scoring import LETTERS
from data.clips import load_clips
from data.files import (
    ClipError,
    PathError,
    Refuse,
    inside_root,
    is_seconds,
    path_below,
    read_json,
    read_objects,
    with_any_ending,
)


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
    """Texts of the options without their letters; () if the answer is free text, or yes or no."""
    answer: str | None
    """The right letter (the first of equal options), or the reference text; None: hidden, in no denominator."""
    start: float | None = None
    end: float | None = None
    """Seconds of the part of the video that is asked about."""
    frames_per_second: float | None = None
    """Of a folder of frames."""
    key_spans: list | None = None
    """[[start, end], ...] in seconds from `start`, if they are known: for the twin."""
    record: dict = field(default_factory=dict)
    """What else a prompt or a rule needs; `groups`: further tables that the question counts in, name -> group."""


CRASH = (
    "Provide a detailed description of this crash video.",
    "Use clear and complete sentences with appropriate traffic and crash-related terminology.",
    "Include descriptions of weather conditions, road type, and vehicle or pedestrian appearance (such as clothing and "
    "posture).",
    "Mention vehicle speed, trajectory, and movements, as well as any changes in the pedestrian's behavior.",
    "Focus on the dynamics of the collision, including vehicle approach, pedestrian movement, and final impact.",
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

TEMPCOMPASS = ("multi-choice", "yes_no", "caption_matching")
VIDEO_MME = ("videoID", "question_id", "duration", "domain", "sub_category", "task_type", "question", "options", "answer")
MOTIONBENCH = ("Motion Recognition", "Motion-related Objects", "Location-related Motion", "Action Order",
               "Repetition Count", "Camera Motion")  # fmt: skip


# --- The formats ---------------------------------------------------------------------------------------------------------


def below(root: Path, path: str, where: str, refuse: Refuse, name: str = "video") -> Path | None:
    """The path below root that a record names, or None if it leaves root (and was refused). Another video's ending than the
    record's is fine. Links are for load_benchmark to judge."""
    try:
        inside_root(path, root, follow_links=True)
        return with_any_ending(root / path_below(path, root))
    except PathError as error:
        refuse(where, name, path, str(error))
        return None


def video_name(key: str) -> str:
    """A VRU-Accident video without its folder of all videos and without .mp4: the keys of captions lack it.

    >>> video_name("./VRU_videos/DoTA/VRU_1.mp4"), video_name("./VRU_videos/DoTA/VRU_1")
    ('DoTA/VRU_1', 'DoTA/VRU_1')
    """
    return re.sub(r"^(\./)*(VRU_videos/)?|\.mp4$", "", key.strip())


def records(path: Path, kind: type, expected: str, refuse: Refuse) -> list:
    """`read_json`, but of several files one that is missing or broken is refused, and the others are read."""
    try:
        if path.is_file():
            return read_json(path, kind, expected)
        refuse(str(path), "", "no such file", "put it there, or its questions are not asked")
    except ClipError as error:
        refuse(path.name, "", str(error).removeprefix(f"{path}: "), "fix the file, or its questions are not asked")
    return []


def metadata(root: Path, ending: str, expected: str, refuse: Refuse) -> Iterator[tuple[str, str, object]]:
    """(source, key, entry) of VRU-Accident's MetaData/S/S_ending, for each of its four sources S."""
    for source in ("CAP_DATA", "DADA_2000", "DoTA", "MANUAL_DATA"):
        path = root / "MetaData" / source / f"{source}_{ending}"
        yield from ((source, *pair) for pair in records(path, dict, expected, refuse))


# How an option begins, from the strictest form to the loosest; {} is its letter. The first form in which all four stand
# decides, so that " B. " inside a text does no harm.
OPTION_FORMS = (
    r", {}\. ",
    r"[,;|\n]\s*[(\[]?{}[.):\]]+",  # "B.The vehicle", "B)The", an option a line
    r"(?i)[,;|\n]\s*[(\[]?{}[.):\]]+",
    r",? {}\. ",
    r"(?<![A-Za-z0-9])[(\[]?{}[.):\]]+",  # nothing, or only a full stop, before the letter
    r"(?i)(?<![A-Za-z0-9])[(\[]?{}[.):\]]+",
    r"[,;|\n]\s*{}[.):\]]* ",  # nothing behind it
)


def split_options(text: str) -> tuple[str, ...] | None:
    """The texts of the options A to D in one string, or None if they cannot be told apart.

    >>> split_options("A. a car, or B. Smith, B.The vehicle, C)x , D. y.")
    ('a car, or B. Smith', 'The vehicle', 'x', 'y.')
    """
    text = f", {text.strip()}"  # the first option begins as the others do
    for form in OPTION_FORMS:
        marks, position = [], 0
        for letter in "ABCD":
            mark = re.compile(form.format(letter)).search(text, position)
            if mark is None or (letter == "A" and text[: mark.start()].strip(" ,")):
                break
            marks.append(mark)
            position = mark.end()
        ends = [mark.start() for mark in marks[1:]] + [len(text)]
        if len(marks) == 4:
            return tuple(text[mark.end() : end].strip(" ,;|\n") for mark, end in zip(marks, ends))
    return None


def vru_accident(root: Path, refuse: Refuse, subtitles: bool) -> Iterator[Question]:
    """VRU-Accident, MetaData/S/S_VQA_annotation.json: {video: {category: {"question", "options": "A. x, B. y, C. z, D. w",
    "GT": "D"}}}; videos below VRU_videos. Read in Kimyounggun99/VRU-Accident and, whole files, in its anonymous copy."""
    expected = "VRU-Accident: {video: {category: {question, options, GT}}}"
    for source, key, categories in metadata(root, "VQA_annotation.json", expected, refuse):
        where = f"{source}_VQA_annotation.json: {key}"
        if not isinstance(categories, dict):
            refuse(where, "", categories, "give an object of categories")
            continue
        video = below(root, f"VRU_videos/{video_name(key)}.mp4", where, refuse)
        for category, entry in categories.pairs if video else ():
            place = f"{where}: {category}"
            if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("question", "options")):
                refuse(place, "", entry, 'give the texts "question" and "options"')
                continue
            options = split_options(entry["options"].strip())
            answer = letter_of(entry.get("GT"), 4, place, "GT", refuse)
            if options is None:
                refuse(place, "options", entry["options"], 'write "A. x, B. y, C. z, D. w"')
            elif answer != "":
                yield Question(f"{video_name(key)}/{category}", video, category, entry["question"], options, answer,
                               record={"options": entry["options"]})  # fmt: skip


def vru_accident_captions(root: Path, refuse: Refuse, subtitles: bool) -> Iterator[Question]:
    """VRU-Accident, MetaData/S/S_Dense_Caption.json: {video without .mp4: {"gt": "Text."}}. Read as above."""
    expected = 'VRU-Accident captions: {video: {"gt": "Text."}}'
    for source, key, entry in metadata(root, "Dense_Caption.json", expected, refuse):
        where, caption = f"{source}_Dense_Caption.json: {key}", entry.get("gt") if isinstance(entry, dict) else None
        if not isinstance(caption, str) or not caption.strip():
            refuse(where, "gt", caption, "give a caption")
        elif video := below(root, f"VRU_videos/{video_name(key)}.mp4", where, refuse):
            yield Question(video_name(key), video, source, " ".join(CRASH), (), caption)


def parted(text: str, label: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """A question with its options inside, one on each line: its stem, the labels and the texts of the options.

    label: a pattern of what an option begins with, in a group. Other lines continue the option above.

    >>> parted("What?\\nA. x\\nB. y\\nand z", r"([A-Z])[.):] *")
    ('What?', ('A', 'B'), ('x', 'y and z'))
    """
    stem, *parts = re.split(rf"(?:^|\n)[ \t]*{label}", text.strip())
    return stem.strip(), tuple(parts[::2]), tuple(" ".join(part.split()) for part in parts[1::2])


def motionbench(root: Path, refuse: Refuse, subtitles: bool) -> Iterator[Question]:
    """MotionBench, video_info.meta.jsonl: {"question_type", "key", "video_type", "video_path", "qa": [{"uid", "question":
    "...?\\nA. x\\nB. y", "answer": "B" or "NA"}]}; videos in self-collected/ and public-dataset/, all of it below the root
    or below MotionBench/. Read in THUDM/MotionBench. Where options cannot be told apart, a question stays without them."""
    base = root / "MotionBench" if (root / "MotionBench").is_dir() else root
    path = base / "video_info.meta.jsonl"
    if not path.is_file():
        raise ClipError(f"{path}: no such file; download it to there")
    for where, entry in read_objects(path, "MotionBench: an object a line with video_path and qa", refuse):
        pairs = entry.get("qa")
        if not isinstance(entry.get("video_path"), str) or not isinstance(pairs, list):
            refuse(where, "qa", entry, 'give "video_path", and "qa", a list of questions')
            continue
        video = below(base / "self-collected", entry["video_path"], where, refuse, "video_path")
        if video and not video.exists() and (public := base / "public-dataset" / entry["video_path"]).exists():
            video = public
        for i, qa in enumerate(pairs if video else (), 1):
            place = f"{where}, question {i}"
            uid, text = (qa.get(k) if isinstance(qa, dict) else None for k in ("uid", "question"))
            if not isinstance(uid, (str, int)) or not isinstance(text, str):
                refuse(place, "", qa, 'give "uid" and "question"')
                continue
            stem, labels, options = parted(text, r"([A-Z])[.):] *")
            record = {"groups": {"video type": str(entry.get("video_type"))}}
            if len(labels) < 2 or "".join(labels) != LETTERS[: len(labels)]:
                stem, options = text, ()
            answer = letter_of(qa.get("answer"), len(options), place, "answer", refuse)
            if answer != "":
                yield Question(str(uid), video, str(entry.get("question_type")), text, options, answer,
                               record=record | {"stem": stem})  # fmt: skip


def mvbench(root: Path, refuse: Refuse, subtitles: bool, tasks: dict = MVBENCH) -> Iterator[Question]:
    """MVBench, json/TASK.json: [{"video", "question", "candidates": [...], "answer": text, "start", "end"}], videos in the
    task's folder below video/ (or below the root). Read in OpenGVLab/Ask-Anything, video_chat2/mvbench.ipynb."""
    videos = root / "video" if (root / "video").is_dir() else root
    for path in sorted((root / "json").glob("*.json")):
        if path.stem not in tasks:
            refuse(str(path), "", "a task of no known name", "take it away, or give it one of " + ", ".join(tasks))
    for task, (category, folder, bounded, frames_per_second) in tasks.items():
        path = root / "json" / f"{task}.json"
        for i, entry in enumerate(records(path, list, "MVBench: [{video, question, candidates, answer}]", refuse)):
            where = f"{path.name}: element {i + 1}"
            texts = isinstance(entry, dict) and all(isinstance(entry.get(k), str) for k in ("video", "question"))
            options = entry.get("candidates") if texts else None
            if not isinstance(options, list) or not all(isinstance(o, (str, int)) for o in options):
                refuse(where, "", entry, 'give the texts "video" and "question", and "candidates", a list of texts')
                continue
            options = tuple(map(str, options))
            if not 1 <= len(options) <= len(LETTERS):  # the authors ask questions with one candidate, too
                refuse(where, "candidates", options, f"give 1 to {len(LETTERS)} options")
                continue
            answer = entry.get("answer")
            if answer is not None and str(answer) not in options:
                refuse(where, "answer", answer, "give the text of one of the candidates")
                continue
            start, end = (entry.get("start"), entry.get("end")) if bounded else (None, None)
            if bounded and not (is_seconds(start) and is_seconds(end) and start < end):
                refuse(where, "start", [start, end], "give start and end in seconds, the end after the start")
                continue
            if video := below(videos / folder, entry["video"], where, refuse):
                letter = None if answer is None else LETTERS[options.index(str(answer))]
                yield Question(f"{task}/{i}", video, category, entry["question"], options, letter, start, end,
                               frames_per_second)  # fmt: skip


def tvbench(root: Path, refuse: Refuse, subtitles: bool) -> Iterator[Question]:
    """TVBench, the form of MVBench with videos below video/TASK. Read in daniel-cores/tvbench, infer.ipynb."""
    yield from mvbench(root, refuse, subtitles, TVBENCH)


def read_subtitles(path: Path) -> list[tuple[float, float, str]]:
    """(start, end, text) of a .srt file, in seconds; marks like <font> are taken away."""
    times, out = r"(\d+):(\d+):(\d+)[,.](\d+)", []
    for block in re.split(r"\n\s*\n", path.read_text("utf-8-sig").replace("\r\n", "\n")):
        if found := re.search(rf"{times} *--> *{times}.*\n?", block):
            h, m, s, ms, *end = map(int, found.groups())
            text = " ".join(re.sub(r"<[^>]*>", "", block[found.end() :]).split())
            out.append((h * 3600 + m * 60 + s + ms / 1000, end[0] * 3600 + end[1] * 60 + end[2] + end[3] / 1000, text))
    return out


def video_mme(root: Path, refuse: Refuse, subtitles: bool) -> Iterator[Question]:
    """Video-MME, videomme/test-00000-of-00001.parquet with options ["A. x", ...]; videos data/ID.mp4, subtitles
    subtitle/ID.srt. Read in MME-Benchmarks/Video-MME, README.md, and lmms-eval's task, which is its authors' choice."""
    import pyarrow
    import pyarrow.parquet

    path = root / "videomme" / "test-00000-of-00001.parquet"
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ClipError(f"{path}: not readable as parquet ({str(error)[:100]}); download it to there") from None
    if missing := [name for name in VIDEO_MME if name not in table.column_names]:
        raise ClipError(f"{path}: columns {', '.join(missing)} are missing; found {', '.join(table.column_names)}")
    for i, row in enumerate(table.select(VIDEO_MME).to_pylist(), 1):
        where, texts = f"{path.name}: row {i}", [row[k] for k in VIDEO_MME if k not in ("options", "answer")]
        options = row["options"]
        if not all(isinstance(text, str) and text for text in texts):
            refuse(where, "", row, "give texts in every column but options")
        elif not isinstance(options, list) or not options or not all(isinstance(o, str) for o in options):
            refuse(where, "options", options, "give a list of texts")
        elif video := below(root / "data", f"{row['videoID']}.mp4", where, refuse, "videoID"):
            answer = letter_of(row["answer"], len(options), where, "answer", refuse)
            groups = {"domain": row["domain"], "task type": row["task_type"], "sub-category": row["sub_category"]}
            record = {"options": options, "groups": groups, "subtitles": []}
            spoken = root / "subtitle" / f"{row['videoID']}.srt"
            if subtitles and spoken.is_file():
                try:
                    record["subtitles"] = read_subtitles(spoken)
                except (OSError, ValueError) as error:
                    refuse(where, "", f"{spoken.name}: {error}", "fix the file; asked without subtitles")
            if answer != "":
                yield Question(row["question_id"], video, row["duration"], row["question"],
                               tuple(re.sub(r"^[A-Z][.)]\s*", "", o) for o in options), answer, record=record)  # fmt: skip


def tempcompass(root: Path, refuse: Refuse, subtitles: bool) -> Iterator[Question]:
    """TempCompass, questions/KIND.json for the three kinds that rules can score: {video: {aspect: [{"question",
    "answer"}]}}; videos videos/ID.mp4. Read, files and code, in llyx97/TempCompass."""
    for kind in TEMPCOMPASS:
        path = root / "questions" / f"{kind}.json"
        for key, aspects in records(path, dict, "TempCompass: {video: {aspect: [{question, answer}]}}", refuse):
            where = f"{path.name}: {key}"
            if not isinstance(aspects, dict) or not all(isinstance(entries, list) for entries in aspects.values()):
                refuse(where, "", aspects, "give an object of lists")
                continue
            video = below(root / "videos", f"{key}.mp4", where, refuse)
            for aspect, entries in aspects.pairs if video else ():
                for i, entry in enumerate(entries):
                    id = f"{kind}/{key}/{aspect}/{i}"
                    text, answer = (entry.get(k) if isinstance(entry, dict) else None for k in ("question", "answer"))
                    if not isinstance(text, str) or not isinstance(answer, (str, type(None))):
                        refuse(id, "", entry, 'give the texts "question" and "answer"')
                        continue
                    label = r"([A-Z])[.):] *" if kind == "multi-choice" else r"((?:Caption|Option|Sentence) [A-Z0-9]): "
                    stem, labels, options = parted(text, label) if kind != "yes_no" else (text, (), ())
                    if kind == "yes_no" or answer is None:
                        right = answer and answer.strip().lower()
                        if right not in ("yes", "no", None):
                            refuse(id, "answer", answer, "give yes or no")
                            continue
                    else:
                        given = parted(answer, label)[1]
                        lettered = kind != "multi-choice" or "".join(labels) == LETTERS[: len(labels)]
                        if given[:1] not in [(one,) for one in labels] or not lettered:
                            refuse(id, "answer", answer, "give one of the question's options, which begin with A, B, ...")
                            continue
                        right = LETTERS[labels.index(given[0])]
                    record = {"kind": kind, "stem": stem, "labels": labels, "answer": answer, "groups": {"aspect": aspect}}
                    yield Question(id, video, kind, text, options, right, record=record)


def dream_1k(root: Path, refuse: Refuse, subtitles: bool) -> Iterator[Question]:
    """DREAM-1K, DREAM-1k.jsonl with "messages" (the caption is the assistant's "reference") or, older, "text": {"prompt",
    "response"}, and "extra_info": {"events": [...]}; videos video/ID.mp4. Read in bytedance/tarsier, data/annotations."""
    path = root / "DREAM-1k.jsonl"
    if not path.is_file():
        raise ClipError(f"{path}: no such file; download it to there")
    for where, entry in read_objects(path, "DREAM-1K: an object a line with messages or text", refuse):
        try:
            if "messages" in entry:
                turns = {m["role"]: next(p for p in m["content"] if p["type"] == "text") for m in entry["messages"]}
                text, caption = turns["user"]["text"], turns["assistant"]["reference"]
            else:
                text, caption = entry["text"]["prompt"].replace("<video>", "").strip(), entry["text"]["response"]
            events = entry["extra_info"]["events"]
            fine = all(isinstance(x, str) and x.strip() for x in (text, caption, *events))
            id, video, category = str(entry["idx"]), str(entry["vid"]), str(entry["dataset"])
        except (KeyError, TypeError, AttributeError, StopIteration) as error:
            refuse(where, "", entry, f"give messages, extra_info with events, dataset, idx and vid ({error!r})")
            continue
        if not fine or not isinstance(events, list):
            refuse(where, "events", events, "give a list of texts, and a caption")
        elif file := below(root / "video", f"{video}.mp4", where, refuse, "vid"):
            # no events: the authors ask for the caption as a whole
            yield Question(id, file, category, text, (), caption, record={"events": events or [caption]})


def own_clips(
    root: Path, refuse: Refuse, subtitles: bool, follow_links: bool = False, videos: Path | None = None
) -> Iterator[Question]:
    """One's own clips, see data/clips.py: the root is a JSONL file, or a folder with clips.jsonl; the paths of the videos
    are below `videos` (default: the file's folder). A clip is called by its video and part."""
    path = root / "clips.jsonl" if root.is_dir() else root
    clips, problems = load_clips(path, videos, follow_links)
    videos = (videos or path.parent).resolve()
    for problem in problems:
        refuse(problem, "", "", "the line is skipped")
    seen = Counter()
    for clip in clips:
        id = os.path.relpath(clip.video, videos)
        id += f"@{clip.start:g}-{'' if clip.end is None else f'{clip.end:g}'}" * (clip.start > 0 or clip.end is not None)
        seen[id] += 1
        id += f"#{seen[id]}" * (seen[id] > 1)
        spans = list(itertools.chain.from_iterable(clip.key_spans or [])) or None
        if "span" in (clip.truth or {}):
            spans = [clip.truth["span"]]
        yield Question(id, clip.video, "clips", clip.prompt, (), clip.caption, clip.start, clip.end, key_spans=spans,
                       frames_per_second=clip.frames_per_second, record={"clip": clip})  # fmt: skip


def letter_of(answer: object, count: int, where: str, name: str, refuse: Refuse) -> str | None:
    """The right letter among `count` options (0: any); None: hidden; "": neither, and refused."""
    if answer is None or (isinstance(answer, str) and answer.strip().upper() in ("", "NA")):
        return None
    letters = LETTERS[: count or None]
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
        return answer.strip().upper()
    refuse(where, name, answer, f"give one of the letters {', '.join(letters)}, or NA if it is hidden")
    return ""


FORMATS = {
    "vru-accident": vru_accident,
    "vru-accident-captions": vru_accident_captions,
    "motionbench": motionbench,
    "mvbench": mvbench,
    "tvbench": tvbench,
    "video-mme": video_mme,
    "tempcompass": tempcompass,
    "dream-1k": dream_1k,
    "clips": own_clips,
}
