"""Predictions: a run's folder that a kill cannot spoil, and files of predictions, ours and the authors'.

A folder says what its predictions were made with, holds their lines, and what went wrong. `settings.json`
says what they depend on; a run with other settings does not continue them.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from torch import nn

from data.benchmarks.formats import TEMPCOMPASS, video_name
from data.benchmarks.parts import Part
from data.benchmarks.questions import Benchmark, prompt
from data.files import ClipError, Pairs, changes, read_json, read_lines, write_whole
from data.run.log import describe_environment
from data.run.sheets import printable


def fingerprint(hf: nn.Module) -> str:
    """A short name of a model's weights, from some numbers of each: another training run has another."""
    digest = hashlib.sha256()
    for name, weight in hf.state_dict().items():
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // 16)][:16].float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_run(benchmark: Benchmark, parts: Sequence[Part], hf: nn.Module, more: dict) -> dict:
    """What predictions depend on: they are not continued where any of it differs."""
    asked = [[q.id, prompt(benchmark, q), p.start, p.end, p.frames_per_second, p.spans] for p in parts for q in p.questions]
    return {
        "benchmark": benchmark.name,
        "protocol": benchmark.protocol,
        "subtitles": benchmark.subtitles,
        "frames": benchmark.num_frames,
        "place of frames": benchmark.place,
        "longest answer": benchmark.max_new_tokens,
        "questions": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
        "model": hf.config.model_type,
        "weights": fingerprint(hf),
        "numbers": str(hf.dtype),
        **({"pixels of a picture": benchmark.max_pixels} if benchmark.max_pixels else {}),
        **more,
    }


def open_run(out: Path, settings: dict) -> None:
    """Write settings.json to a folder, or check that it has the same. Raises ValueError if predictions are another's."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    settings = json.loads(json.dumps(settings))
    try:
        found = json.loads(path.read_text())["settings"] if path.exists() else None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: cannot be read; give another --out, or delete the folder") from None
    if found is None and (out / "predictions.jsonl").exists():
        raise ValueError(f"{out}: holds predictions but no settings.json; give another --out, or delete the folder")
    if found is not None and (changed := changes(found, settings)):
        listed = "; ".join(changed)
        raise ValueError(
            f"{out}: holds predictions made with other settings ({listed}). Continue with those, or give another --out"
        )
    if found is None:
        write_whole(path, json.dumps({"settings": settings} | describe_environment(), indent=2) + "\n")


class Lines:
    """A predictions file: its lines by id, and more of them appended, each whole before the next.

    A line that a kill has cut off is taken out, and named in `problems`.
    """

    def __init__(self, path: Path):
        self.records: dict[str, dict] = {}
        self.problems: list[str] = []
        data = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            try:
                record = json.loads(line)
                if not line.endswith(b"\n") or not isinstance(record["response"], str) or record["id"] in self.records:
                    raise ValueError
                self.records[record["id"]] = record
            except (ValueError, KeyError, TypeError, RecursionError):
                self.problems.append(f"{path}:{number}: torn or doubled; taken out, its question is asked again")
        if self.problems:
            write_whole(path, "".join(json.dumps(record) + "\n" for record in self.records.values()))
        self.file = path.open("a")

    def add(self, record: dict) -> None:
        """Append a line, unless its id is there already."""
        if record["id"] not in self.records:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
            self.records[record["id"]] = record

    def responses(self) -> dict[str, str]:
        """What was said, by id."""
        return {id: record["response"] for id, record in self.records.items()}


class Notes:
    """Problems: printed, counted, and written to a file as they come."""

    def __init__(self, path: Path, console: Console):
        self.console, self.file, self.count = console, path.open("w"), 0

    def add(self, problems: Sequence[str]) -> None:
        """Note some problems."""
        for problem in problems:
            self.count += 1
            self.file.write(printable(problem) + "\n")
            self.console.print(printable(problem), style="yellow", highlight=False, markup=False, soft_wrap=True)
        self.file.flush()


# --- Predictions files, ours and the authors' -----------------------------------------------------------------------------

TEMPCOMPASS_FIELDS = ("prediction", "response", "video-llm-prediction")  # of predictions, and of their evaluated copies


class Predictions:
    """Responses by question id as they are read, what cannot be used, in words, and what the authors' files answer."""

    def __init__(self, benchmark: Benchmark):
        self.benchmark = benchmark
        self.questions = {q.id: q for q in benchmark.questions}
        self.responses: dict[str, str] = {}
        self.problems: list[str] = []
        self.whole = 0  # VRU-Accident's answers of more than a letter
        self.other_videos: list[str] = []  # ids of lines that name another video than their question
        self.places: dict[str, list[str]] = defaultdict(list)  # TempCompass: the questions of kind/video/aspect
        for id in self.questions:
            self.places[id.rsplit("/", 1)[0]].append(id)

    def take(self, where: str, id: object, response: object, truth: object = None) -> None:
        """Keep a response, unless it is none, its id is unknown, or it is the second of this id.

        truth: the right answer as a file of the authors has it; the annotation's counts.
        """
        if isinstance(id, int) and not isinstance(id, bool):
            id = str(id)
        if not isinstance(id, str) or not isinstance(response, (str, type(None))):
            self.problems.append(f"{where}: found {str([id, response])[:80]}; give the texts id and response")
        elif id not in self.questions:
            self.problems.append(f"{where}: id '{id[:80]}' is no question of {self.benchmark.name}; left out")
        elif id in self.responses:
            same = "the same" if self.responses[id] == (response or "") else "another"
            self.problems.append(f"{where}: id '{id}' a second time, {same} response; the first counts")
        else:
            self.responses[id] = response or ""
        answer = self.questions[id].answer if id in self.questions else None
        if isinstance(truth, str) and answer is not None and truth.strip().upper() != answer.upper():
            self.problems.append(f"{where}: its right answer is {truth}, but the annotation's {answer}, which counts")

    def take_line(self, where: str, line: str) -> None:
        """A line {"id", "response"}, or, as MotionBench's authors have them, {uid: response}."""
        try:
            entry = json.loads(line)
            if self.benchmark.name == "motionbench" and isinstance(entry, dict) and "response" not in entry:
                for uid, response in entry.items():
                    self.take(where, uid, response)
                return
            self.take(where, entry["id"], entry["response"])
            video, question = entry.get("video"), self.questions.get(entry["id"])
            if isinstance(video, str) and question and Path(video).stem != question.video.stem:
                self.other_videos.append(entry["id"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self.problems.append(f'{where}: found {line[:80]!r}; write {{"id": ..., "response": ...}} ({error!r:.80})')

    def take_vru_accident(self, where: str, key: str, entry: object) -> None:
        """{"pred", "GT"}, as VRU-Accident's authors write it; their script compares the whole of pred with GT."""
        if not isinstance(entry, dict) or not isinstance(entry.get("pred"), (str, type(None))) or "pred" not in entry:
            self.problems.append(f'{where}: found {str(entry)[:80]}; give "pred", a text or null')
            return
        pred = entry["pred"] or ""
        if self.benchmark.protocol == "official" and self.benchmark.name == "vru-accident":
            self.whole += len(pred.strip()) > 1
            pred = pred.strip().upper() if pred.strip().upper() in tuple("ABCD") else ""
        self.take(where, key, pred, entry.get("GT"))

    def take_tempcompass(self, where: str, video: str, aspects: Pairs, kind: str) -> None:
        """{aspect: [{"question", "answer", "prediction"}]} of a video, as TempCompass' authors write it.

        A prediction belongs to the question whose text it repeats: the one at its place in the list, else another.
        """
        video, kinds = re.sub(r"\.(mp4|jpg)$", "", video), (kind,) if kind in TEMPCOMPASS else TEMPCOMPASS
        for aspect, entries in aspects.pairs:
            ids = [id for k in kinds for id in self.places.get(f"{k}/{video}/{aspect}", ())]
            for i, entry in enumerate(entries if isinstance(entries, list) else [entries]):
                place = f"{where}: {aspect}, {i + 1}"
                field = next((k for k in TEMPCOMPASS_FIELDS if isinstance(entry, dict) and k in entry), None)
                if field is None or not isinstance(entry.get("question"), str):
                    self.problems.append(f'{place}: found {str(entry)[:80]}; give "question" and "prediction"')
                    continue
                same = [id for id in ids if self.questions[id].text == entry["question"]]
                same.sort(key=lambda id: (not id.endswith(f"/{i}"), id in self.responses))
                if not same:
                    self.problems.append(f"{place}: no such question: {entry['question'][:80]!r}; left out")
                    continue
                truth, answer = entry.get("answer", entry.get("gt-answer")), self.questions[same[0]].record["answer"]
                if truth is not None and answer is not None and truth != answer:
                    self.problems.append(
                        f"{place}: its answer is {str(truth)[:60]}, but the annotation's {answer}, which counts"
                    )
                self.take(place, same[0], entry[field])

    def take_element(self, where: str, entry: object) -> None:
        """A video with its "questions": [{"question_id", "response", "answer"}], as Video-MME's authors want
        it; or one such question; or {"id", "response"}, of any benchmark."""
        questions = entry.get("questions", [entry]) if isinstance(entry, dict) else None
        if not isinstance(questions, list):
            self.problems.append(f'{where}: found {str(entry)[:80]}; give "questions", or "id" and "response"')
            return
        if entry.get("missing") is True:
            self.problems.append(f"{where}: the file says that this video was missing; left out")
            return
        for question in questions:
            id = next((question[k] for k in ("question_id", "id") if isinstance(question, dict) and k in question), None)
            if id is None or "response" not in question:
                self.problems.append(f'{where}: found {str(question)[:80]}; give "question_id" and "response"')
            else:
                self.take(where, id, question["response"], question.get("answer"))

    def take_file(self, file: Path) -> None:
        """All of a file, whichever of the forms it has."""
        name = self.benchmark.name
        if file.suffix == ".jsonl":
            for where, line in read_lines(file):
                self.take_line(where, line)
            return
        if name == "tempcompass" and file.stem == "captioning":
            self.problems.append(f"{file.name}: captioning needs a judge; left out")
            return
        expected = "predictions: {id: response}, JSON lines in a file called .jsonl, or the authors' own form"
        if next(read_lines(file), ("", ""))[1].startswith("["):
            for i, entry in enumerate(read_json(file, list, expected), 1):
                self.take_element(f"{file.name}: element {i}", entry)
            return
        for key, entry in read_json(file, dict, expected):
            where = f"{file.name}: {key}"
            if not isinstance(entry, dict):
                self.take(where, key, entry)
            elif name == "vru-accident-captions":
                self.take_vru_accident(where, video_name(key), entry)
            elif name == "vru-accident":
                for category, answer in entry.pairs:  # doubled ones, too
                    self.take_vru_accident(f"{where}: {category}", f"{video_name(key)}/{category}", answer)
            elif name == "tempcompass":
                self.take_tempcompass(where, key, entry, file.stem)
            else:
                self.take(where, key, entry)


def read_predictions(path: Path, benchmark: Benchmark) -> tuple[dict[str, str], list[str]]:
    """Responses by question id, and a line for each that cannot be used.

    path: .jsonl with {"id", "response"} a line; .json with {id: response}; a run's folder; or the authors'
    own files, one of them or their folder: VRU-Accident's S_VQA_response.json, {video: {category: {"pred",
    "GT"}}} or {video: {"pred"}}; TempCompass's KIND.json, {video: {aspect: [{"question", "answer",
    "prediction"}]}}; Video-MME's list of videos with "questions"; MotionBench's {uid: answer}. A response of
    null is one that says nothing. Of several responses to a question the first counts. Under the official
    protocol VRU-Accident's `pred` of more than a letter is no answer, as for the authors' script. Raises
    ClipError if there is no readable file, or nothing of it can be used.
    """
    path, read = Path(path), Predictions(benchmark)
    files = [path]
    if path.is_dir():
        files = [*sorted(path.glob("*_response.json")), *(path / f"{kind}.json" for kind in (*TEMPCOMPASS, "captioning"))]
        files = [file for file in files if file.is_file()] or [path / "predictions.jsonl"]
    for file in files:
        if not file.is_file():
            raise ClipError(
                f"{file}: no such file; give a predictions file, a run's folder, or the authors' *_response.json or "
                f"{', '.join(f'{kind}.json' for kind in TEMPCOMPASS)}"
            )
        made_for = made_with(file.parent).get("benchmark")
        if made_for not in (None, benchmark.name):
            raise ClipError(f"{file}: predictions of {made_for}, as its settings.json says; give --benchmark {made_for}")
        read.take_file(file)
    if read.whole:
        read.problems.append(
            f"{path.name}: {read.whole} answers are more than a letter: no answers, as for the authors' script"
        )
    if not read.responses:
        shown = "\n  ".join(read.problems[:10]) or "it is empty"
        raise ClipError(f"{path}: no prediction for a question of {benchmark.name} in it:\n  {shown}")
    if read.other_videos:
        read.problems.append(
            f"{path.name}: {len(read.other_videos)} lines name another video than their question, the first is "
            f"{read.other_videos[0]}; are they of another benchmark or version? They count"
        )
    return read.responses, read.problems


def made_with(folder: Path) -> dict:
    """The settings that a run's folder holds its predictions to; {} of a folder that is none."""
    try:
        settings = json.loads((folder / "settings.json").read_text())["settings"]
        return settings if isinstance(settings, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
