"""Every command of the README and of docs/ is run, once, on tiny models and a handful of clips.

Names of models and files are those of the pages: a tiny checkpoint lies where a hub's name would be looked for. Only sizes
are shrunk, by flags that are put behind the command, so that a flag that is renamed or a file that has moved fails here.
"""

import contextlib
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import data.world
from data.measure import cost
from data.run import settings
from data.tiny import build_text_encoder
from tests.commands import HERE, Command, run
from tests.test_answers import dress
from tests.test_benchmarks import (
    lines_file,
    make_motionbench,
    make_mvbench,
    make_tempcompass,
    make_video_mme,
    make_vru_accident,
    write,
)
from tests.test_processes import launch

# Part of a command -> why it is not run here.
NOT_RUN = {
    "--model random:qwen2.5-vl-7b": "the model has 7 billion weights: it needs a GPU, or hours",
    "eval.py card": "it measures a GPU",
    "eval.py report": "it trains for hours, by commands that are run here themselves",
}
TRAIN = "--steps 2 --batch-size 2 --micro-batch-size 1 --workers 0 --eval-every -1 --max-bad-share 0.5"
# What makes a command small, by its first words.
SMALLER = {
    "train_sft.py": f"{TRAIN} --sheets 1",
    "train_rl.py": f"{TRAIN} --num-rollouts 2 --num-twin-rollouts 2 --max-new-tokens 3 --no-eval-before",
    "eval.py evaluate": "--max-new-tokens 4 --workers 0",
    "eval.py describe": "--max-new-tokens 4",
    "eval.py run": "--max-new-tokens 2 --workers 0 --limit 2",
    "eval.py cost": "--visual-tokens 32 --new-tokens 2 --rollouts 2 --repeats 1",
    "eval.py long": "--lengths 1 2",
    "-m data.curation.curate": "--workers 0 --samples 1",
    "-m data.world": "--train 3 --prompts 2 --test 2 --held-out 2 --workers 1",
    "-m docs.other_world": "--train 3 --test 2 --held-out 2",
}
# What the commands of a page need, those of earlier pages have made.
ORDER = ("README", "long-videos", "long-runs", "data", "benchmarks", "results", "gpu")


def commands() -> list[str]:
    """Every `python` and `torchrun` line of the shell blocks of the pages, page by page."""
    pages = {page.stem: page for page in (HERE / "README.md", *HERE.glob("docs/*.md"))}
    found = []
    for name in sorted(pages, key=lambda name: ORDER.index(name) if name in ORDER else -1):
        blocks = re.findall(r"```sh\n(.*?)```", pages[name].read_text(), re.S)
        lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
        found += [line for line in lines if line.startswith(("python ", "torchrun "))]
    return found


def make_home(home: Path, world: Path, checkpoint: Path) -> None:
    """The files that the pages' commands speak of."""
    lines = {split: [json.loads(x) for x in (world / f"{split}.jsonl").open()] for split in ("train", "test")}
    for split, count in (("train", 8), ("test", 3)):
        for line in lines[split][:count]:
            video = home / "runs/world" / line["video"]
            video.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(world / line["video"], video)
        lines_file(home / "runs/world" / f"{split}.jsonl", *lines[split][:count])
    for split, like in (("held-out", "test"), ("prompts", "train")):
        shutil.copy(home / f"runs/world/{like}.jsonl", home / f"runs/world/{split}.jsonl")
    clips = []
    for i, line in enumerate(lines["train"][:6]):
        for folder in ("videos", "footage"):
            (home / folder).mkdir(exist_ok=True)
            shutil.copy(world / line["video"], home / folder / f"{i}.mp4")
        clips.append({"video": f"{i}.mp4", "caption": line["caption"], "keywords": line["keywords"]})
        clips[-1]["key_spans"] = [line["truth"]["span"]]
    shutil.copy(home / "videos/0.mp4", home / "VIDEO.mp4")
    lines_file(home / "clips.jsonl", *(clip | {"video": f"videos/{clip['video']}"} for clip in clips))
    lines_file(home / "known.jsonl", *clips)
    captions = [f"Something red waits. It jumps off the wall number {i}." for i in range(len(clips))]
    rows = "".join(f"{clip['video']},{caption}\n" for clip, caption in zip(clips, captions))
    write(home / "captions.csv", f"video,caption\n{rows}")
    turns = [[{"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": caption}]
             for caption in captions]  # fmt: skip
    write(home / "conversations.json", [{"video": c["video"], "conversations": t} for c, t in zip(clips, turns)])
    for name in ("Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL-7B-Instruct"):
        shutil.copytree(checkpoint, home / "Qwen" / name)
    build_text_encoder(home / "sentence-transformers/all-MiniLM-L6-v2", captions)
    makers = {"mvbench": make_mvbench, "video-mme": make_video_mme, "motionbench": make_motionbench}
    folders = {"mvbench": "MVBench", "video-mme": "Video-MME", "motionbench": "MotionBench"}
    for name, make in makers.items():
        for link in dress(name, make, home / folders[name], world).rglob("*.mp4"):
            if link.is_symlink():
                shutil.copy(link.resolve(), link.with_suffix(".copy"))
                link.with_suffix(".copy").replace(link)
    videos = sorted(p.relative_to(home / "MotionBench") for p in (home / "MotionBench").rglob("*.mp4"))
    lines_file(home / "spans.jsonl", *({"video": str(v), "key_spans": [[[1.25, 1.5]]]} for v in videos))
    facts = make_vru_accident(home / "VRU-Accident", random.Random(0))
    lines_file(home / "runs/sft/vru.jsonl", *({"id": fact["id"], "response": "A"} for fact in facts))
    said = {category: {"pred": "A", "GT": "A"} for category in ("speed", "road type", "accident type")}
    write(home / "Model_Response/VQA/Qwen2_VL_7B/DoTA_VQA_response.json", {"./VRU_videos/DoTA/VRU_0.mp4": said})
    make_tempcompass(home / "TempCompass", random.Random(0))
    questions = json.loads((home / "TempCompass/questions/yes_no.json").read_text())
    answers = {video: {aspect: [entry | {"prediction": "yes"} for entry in entries] for aspect, entries in aspects.items()}
               for video, aspects in questions.items()}  # fmt: skip
    write(home / "TempCompass/predictions/gemini/yes_no.json", answers)


def small_world() -> None:
    """In a command's process: the embedded world is the one of the home folder, peaks of memory are not measured, and the
    presets for GPUs are not refused."""

    @contextlib.contextmanager
    def here(*_, **__):
        yield SimpleNamespace(starmap=lambda function, rows, chunksize: [function(*row) for row in rows])

    settings.best_device = lambda: SimpleNamespace(type="a GPU")
    data.world.embedded_world = lambda *_: Path("runs/world")
    cost.multiprocessing = SimpleNamespace(get_context=lambda _: SimpleNamespace(Pool=here))


def torchrun(words: list[str], home: Path) -> None:
    """A command in two processes, as `torchrun` starts them, from a Python of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # any free port
    environment = {"PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([*launcher, *words], env=environment, cwd=home, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_command_of_the_pages_runs(tmp_path, world, qwen2_5):
    """In one folder, one after the other, as a reader would."""
    make_home(tmp_path, world, qwen2_5)
    launched = []
    for line in commands():
        if any(part in line for part in NOT_RUN):
            continue
        words = shlex.split(re.sub(r"^torchrun --nproc_per_node \d+", "torchrun", line))
        program, words = words[0], words[1:]
        name = next((name for name in SMALLER if " ".join(words).startswith(name)), "")
        words += shlex.split(SMALLER.get(name, ""))
        if "--key-spans" in words:  # the videos of this benchmark are not those that were curated
            words += ["--key-spans", "spans.jsonl"]
        if words[0].endswith(".py"):
            words[0] = str(HERE / words[0])
        if program == "torchrun":  # itself once; the second command has the same launcher
            preset = words.index("--preset")  # refused without a GPU: in its place what it sets
            words[preset : preset + 2] = ["--lora-rank", "64", "--freeze-vision", "--gradient-checkpointing"]
            torchrun(words, tmp_path) if not launched else launch("train_sft", 2, words[1:], tmp_path)
            launched.append(line)
            continue
        if "--resume" in words:  # the folder now holds the run of another command, which it would refuse to continue
            run(*(word for word in words if word != "--resume"), cwd=tmp_path, before=small_world)
        done = Command(*words, cwd=tmp_path, before=small_world).wait()
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        if "eval.py score" in line and "vru.jsonl" in line:  # the two results that the next page compares
            for part in "ab":
                shutil.copy(tmp_path / "runs/sft/vru.official.json", tmp_path / f"{part}.official.json")


def test_what_is_not_run_is_there():
    """Each exception names a command that a page still has, and a reason."""
    for part, reason in NOT_RUN.items():
        assert any(part in line for line in commands()) and reason


@pytest.mark.parametrize("name", SMALLER)
def test_what_is_made_smaller_is_there(name):
    """No entry is left over from a command that the pages no longer have."""
    assert any(line.split(" ", 1)[1].startswith(name) or name in line for line in commands())
