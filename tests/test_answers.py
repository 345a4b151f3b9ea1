"""Running a benchmark: shared prefills against plain generate(), kills, broken videos, twins, other models, probes."""

import functools
import itertools
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torchcodec.decoders import VideoDecoder
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from data import videolm
from data.benchmarks import ask as answers
from data.benchmarks import parts as asked_parts
from data.benchmarks import probes
from data.benchmarks.formats import Question
from data.benchmarks.parts import common_prefix, group_questions, make_asked, read_part, share_prompt
from data.benchmarks.questions import Benchmark, load_benchmark, prompt
from data.clips import load_clips
from data.examples import Preparation
from data.files import ClipError
from data.look import Look
from data.measure import cost
from data.tiny import build_tiny, train_tokenizer
from data.video import Clip, read_frames
from eval import RunSettings, ScoreSettings, run_benchmark, run_score
from tests import commands
from tests.helpers import degraded, plain_inputs, published_positions
from tests.test_benchmarks import make_mvbench, make_tempcompass, make_video_mme, make_vru_accident, write
from tests.test_clips import Marked
from tests.test_rollouts import sharpen
from tests.test_videolm import count_calls

HERE = Path(__file__).parent.parent
BEFORE = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
BANNED = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>")


def liven(checkpoint: Path, folder: Path) -> Path:
    """A copy of a tiny checkpoint whose answers differ from question to question and from video to video."""
    hf = AutoModelForImageTextToText.from_pretrained(checkpoint)
    sharpen(videolm.VideoLM(hf))
    hf.config.tie_word_embeddings = hf.config.text_config.tie_word_embeddings = False  # else it repeats what it last read
    torch.manual_seed(2)
    hf.lm_head.weight = torch.nn.Parameter(torch.randn_like(hf.lm_head.weight))
    hf.save_pretrained(folder)
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sharp(checkpoint, tmp_path_factory) -> Path:
    """Such a checkpoint of each family."""
    return liven(checkpoint, tmp_path_factory.mktemp("sharp") / checkpoint.name)


@pytest.fixture(scope="session")
def sharp2_5(qwen2_5, tmp_path_factory) -> Path:
    """A Qwen2.5-VL only."""
    return liven(qwen2_5, tmp_path_factory.mktemp("sharp") / "qwen2_5")


def dress(name: str, make, root: Path, world: Path, seed: int = 0) -> Path:
    """A benchmark in its authors' files, its videos clips of the world."""
    make(root, random.Random(seed))
    clips = sorted((world / "train").rglob("*.mp4"))
    for i, video in enumerate(dict.fromkeys(q.video for q in load_benchmark(name, root).questions)):
        video.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(clips[i % len(clips)], video) if name == "motionbench" else shutil.copy(clips[i % len(clips)], video)
    return root


def run(tmp_path: Path, **settings) -> tuple[dict, str]:
    """`eval.py run` in this process, without workers unless asked; its results and what it printed."""
    console = Console(file=(tmp_path / "shown.txt").open("w+"), width=160)
    results = run_benchmark(RunSettings(**{"workers": 0} | settings), console)
    console.file.seek(0)
    return results, console.file.read()


def said(path: Path) -> dict[str, str]:
    """Responses of a predictions file by id, each id once."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({r["id"] for r in records}) == len(records)
    return {r["id"]: r["response"] for r in records}


def by_hand(hf, processor, q: Question, places: list[int], benchmark: Benchmark, num_tokens: int, shown=None) -> str:
    """One answer: the processor on one whole prompt, transformers' own generate(). places: numbers of the frames, of which
    a second has 8; shown: those that are shown there."""
    first = round(8 * (q.start or 0))
    frames = VideoDecoder(q.video).get_frames_at(shown or places).data
    metadata = [{"total_num_frames": 16 - first, "fps": 8.0, "frames_indices": [p - first for p in places]}]
    text, begin = prompt(benchmark, q)
    inputs = processor(
        text=[BEFORE + text + AFTER + begin], videos=[frames], video_metadata=metadata, do_sample_frames=False,
        return_tensors="pt",
    )  # fmt: skip
    seconds = inputs.get("second_per_grid_ts", [0.0])
    positions = published_positions(inputs["mm_token_type_ids"][0], inputs["video_grid_thw"].tolist(), seconds, hf.config)
    inputs["position_ids"] = positions[:, None]
    banned = processor.tokenizer.convert_tokens_to_ids(list(BANNED))
    out = hf.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, suppress_tokens=banned)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# --- One prefill ----------------------------------------------------------------------------------------------------------

QUESTIONS = [
    ("What happens?", ""),
    ("What happens?", ""),  # twice
    ("What", ""),
    ("\n  What happens then, and to whom?\nA. a red circle\nB. ünïcödé 語", "Best option:("),
    ("", " "),
]


def test_prompt_and_tail_are_the_whole_prompt(world, preparation):
    """Token for token what the processor makes of each whole prompt, whatever the question begins with."""
    clips, _ = load_clips(world / "train.jsonl")
    frames = read_frames(clips[0], 7)
    processor = preparation.processor
    for some in (QUESTIONS, QUESTIONS[:1], QUESTIONS[1:3], QUESTIONS[::-1]):
        texts = [BEFORE + text + AFTER + begin for text, begin in some]
        example, tails = share_prompt(texts, Look([frames]), Preparation(processor))
        metadata = [
            {"total_num_frames": 16, "fps": 8.0, "duration": 2.0, "frames_indices": [8 * t for t in frames.timestamps]}
        ]
        for text, tail in zip(texts, tails, strict=True):
            shown = dict(videos=[frames.pixels], video_metadata=metadata, do_sample_frames=False)
            whole = processor(text=[text], **shown, return_tensors="pt")
            assert torch.cat([example.input_ids, tail]).tolist() == whole["input_ids"][0].tolist() and len(tail)
            n = example.prompt_length
            assert example.token_types.tolist() == whole["mm_token_type_ids"][0, :n].tolist()
            assert not whole["mm_token_type_ids"][0, n:].any()
            torch.testing.assert_close(example.pixels, whole["pixel_values_videos"])
        # as long as it can be: the tails have no token in common, or one of them is down to one
        assert len({int(t[0]) for t in tails}) > 1 or min(map(len, tails)) == 1


def test_prompts_that_merge_across_the_video_are_made_one_by_one(world, qwen2_5):
    """Where tokens of a text depend on what stands before the video's end, each prompt is made by the processor."""
    processor = AutoProcessor.from_pretrained(qwen2_5)
    clips, _ = load_clips(world / "train.jsonl")
    frames = read_frames(clips[0], 4)
    texts = [BEFORE + q + AFTER for q in ("a", "b c")]

    class Odd:
        """A tokenizer that takes a text by itself for another than inside the processor."""

        convert_tokens_to_ids = processor.tokenizer.convert_tokens_to_ids

        def __call__(self, text):
            return processor.tokenizer(text.replace("user", "assistant").replace("<|im_end|>", "a<|im_end|>"))

    class Wrapped:
        tokenizer, video_processor = Odd(), processor.video_processor

        def __call__(self, **inputs):
            return processor(**inputs)

    example, tails = share_prompt(texts, Look([frames]), Preparation(Wrapped()))
    want, want_tails = share_prompt(texts, Look([frames]), Preparation(processor))
    assert torch.equal(example.input_ids, want.input_ids)
    assert [t.tolist() for t in tails] == [t.tolist() for t in want_tails]


def ask(lm: videolm.VideoLM, ragged, seed: int) -> list[list[torch.Tensor]]:
    """Questions of random tokens: 3, 1, 5 and 2 for the four clips, of 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randint(0, 256, (int(torch.randint(1, 10, (), generator=generator)),), generator=generator)
            for _ in range(n)
        ]
        for n in (3, 1, 5, 2)
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_answers_equal_generate(sharp, ragged, seed):
    """Issue bar: all answers of a ragged batch are those of plain generate() on each question alone, full and twin."""
    hf, plain = (AutoModelForImageTextToText.from_pretrained(sharp).eval() for _ in range(2))
    lm = videolm.VideoLM(hf).eval()
    questions, both = ask(lm, ragged, seed), set()
    got = lm.answer(ragged, questions, 6, twin=True)
    alone = lm.answer(ragged, questions, 6)
    assert got.tokens.shape[:2] == (4, 10) and alone.tokens.shape[:2] == (4, 5)
    for b, e in enumerate(ragged):
        for j, question in enumerate(questions[b]):
            for side, pixels in enumerate((e.pixels, e.pixels if e.source is None else degraded(e))):
                ids = torch.cat([e.input_ids[: e.prompt_length], question])
                prompt = replace(e, token_types=e.token_types[: e.prompt_length])
                inputs = plain_inputs(prompt, lm.config, ids) | {"pixel_values_videos": pixels}
                out = plain.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=lm.banned.tolist())
                want = out[0, len(ids) :].tolist()
                n = int(got.lengths[b, 5 * side + j])
                assert got.tokens[b, 5 * side + j, :n].tolist() == want
                both.add(tuple(want))
                if side == 0:
                    assert alone.tokens[b, j, : int(alone.lengths[b, j])].tolist() == want
    assert len(both) > 5


def test_video_and_prompt_run_once(lm, ragged):
    """One vision pass; the prefill is the prompt, the twin's part of it, and each question once a side."""
    vision, widths = count_calls(lm.base.model.visual), []
    lm.base.model.language_model.layers[0].register_forward_pre_hook(lambda _, x: widths.append(x[0].shape[1]))
    e, questions = ragged[0], [torch.arange(n) for n in (4, 2, 7)]
    visual = (e.token_types == 2).nonzero().squeeze(1)
    first = int((e.source != torch.arange(len(e.source))).nonzero()[0])
    fork = int(visual[first * (len(visual) // int(e.grid[0]))])
    lm.answer([e], [questions], 3)
    assert len(vision) == 1 and widths[0] == e.prompt_length + 13 and set(widths[1:]) <= {3}
    lm.answer([e], [questions], 1, twin=True)
    assert len(vision) == 2 and widths[-1] == e.prompt_length + (e.prompt_length - fork) + 26


def test_common_prefix_leaves_a_token_to_each():
    """By hand, also where prompts are equal, or one begins another."""
    cases = [
        ([[1, 2, 3]], 2),
        ([[1, 2], [1, 2]], 1),
        ([[1, 2, 3], [1, 2]], 1),
        ([[5, 1], [4, 1]], 0),
        ([[1, 2, 3], [1, 3, 3]], 1),
    ]
    for rows, want in cases:
        assert common_prefix([torch.tensor(r) for r in rows]) == want


# --- Whole runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vru-accident", "mvbench", "video-mme", "tempcompass"])
def test_predictions_equal_plain_generate(name, world, sharp, tmp_path):
    """World clips dressed as each benchmark: every response is that of one whole prompt by plain transformers."""
    if name in ("video-mme", "tempcompass") and sharp.name == "qwen3_vl":
        pytest.skip("one family is enough for these")
    make = {"vru-accident": make_vru_accident, "video-mme": make_video_mme, "tempcompass": make_tempcompass}.get(
        name, lambda root, rng: make_mvbench(root, rng, ("action_sequence", "action_count"))
    )
    root = dress(name, make, tmp_path / "root", world)
    limit = 3
    results, shown = run(tmp_path, benchmark=name, root=root, model=str(sharp), out=tmp_path / "out", limit=limit,
                         max_new_tokens=5, batch_size=2)  # fmt: skip
    got = said(tmp_path / "out/predictions.jsonl")
    benchmark = load_benchmark(name, root)
    asked = [q for q in benchmark.questions if q.id in got]
    assert len({(q.video, q.start) for q in asked}) == limit and results["counts"]["questions"] == len(asked)
    assert [q.id for q in asked] == list(got) or name in ("mvbench", "tempcompass")  # else in the order of the videos
    assert results["counts"]["missing predictions"] == 0 and f"{len(asked)}/{len(asked)}" in shown
    hf, processor = AutoModelForImageTextToText.from_pretrained(sharp).eval(), AutoProcessor.from_pretrained(sharp)
    for q in asked:
        places = list(range(0, 16, 2)) if name == "vru-accident" else list(range(8 if q.start else 0, 16))
        assert got[q.id] == by_hand(hf, processor, q, places, benchmark, 5)
    assert len(set(got.values())) > 2


def test_questions_of_a_part_are_asked_together(tmp_path, world):
    """Same video and part: one part, in order; other seconds or other key spans: another; never more than MOST."""
    q = Question("0", Path("v.mp4"), "c", "What?", (), "A", key_spans=[[1, 2]])
    questions = [q, replace(q, id="1"), replace(q, id="2", start=0.0), replace(q, id="3", start=1.0),
                 replace(q, id="4", video=Path("w.mp4")), replace(q, id="5"),
                 replace(q, id="6", key_spans=None)]  # fmt: skip
    benchmark = Benchmark("mvbench", "official", questions, [], 4, 4, 0.5)
    ids = [[x.id for x in part.questions] for part in group_questions(benchmark)]
    assert ids == [["0", "1", "2", "5"], ["3"], ["4"], ["6"]]
    many = replace(benchmark, questions=[replace(q, id=str(i)) for i in range(asked_parts.MOST + 3)])
    assert [len(part.questions) for part in group_questions(many)] == [asked_parts.MOST, 3]


def test_long_questions_are_left_out(qwen2_5):
    """Each is named; the others of its part are asked. Without a limit nothing is left out."""
    processor = AutoProcessor.from_pretrained(qwen2_5)
    q = Question("0", Path("v.mp4"), "c", "What?", (), "A", record={"kind": "yes_no"})
    questions = [q, replace(q, id="1", text="What? " * 3000), replace(q, id="2", video=Path("w.mp4"), text="Why? " * 3000)]
    benchmark = Benchmark("tempcompass", "official", questions, [], 4, 4, 0.5)
    parts, problems = asked_parts.leave_out_long(group_questions(benchmark), benchmark, processor, 4000)
    assert [[x.id for x in part.questions] for part in parts] == [["0"]]
    assert len(problems) == 2 and all(re.match(rf"tempcompass: {i + 1}: its prompt has \d+ tokens, more than 4000; ", p)
                                      for i, p in enumerate(problems))  # fmt: skip
    assert asked_parts.leave_out_long(group_questions(benchmark), benchmark, processor, None)[1] == []


@pytest.fixture(scope="session")
def undisturbed(world, sharp2_5, tmp_path_factory) -> tuple[dict, Path]:
    """Settings of a run with twins on world clips dressed as MVBench, and its folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    root = dress("mvbench", lambda *a: make_mvbench(*a, ("action_sequence", "action_count")), folder / "root", world)
    spans = [{"video": str(v.relative_to(root)), "key_spans": [[[1.25, 1.5]], [1.3, 1.75]]} for v in root.rglob("*.mp4")]
    key_spans = write(folder / "spans.jsonl", "".join(json.dumps(s) + "\n" for s in spans[:-2]))
    settings = {"benchmark": "mvbench", "root": root, "model": str(sharp2_5), "key_spans": key_spans, "twin": True}
    settings |= {"max_new_tokens": 4, "batch_size": 3}
    run(folder, out=folder / "out", **settings)
    return settings, folder / "out"


FILES = ("predictions.jsonl", "twin-predictions.jsonl")


def test_any_kill_is_made_good(undisturbed, tmp_path):
    """What a kill leaves, a beginning of each file down to the byte, is taken up again: same files, same figures."""
    settings, whole = undisturbed
    want = {f: (whole / f).read_bytes() for f in FILES}
    lines = {f: want[f].splitlines(keepends=True) for f in FILES}
    assert len(lines[FILES[0]]) == 16 > len(lines[FILES[1]]) > 4
    for seed in range(6):
        rng, out = random.Random(seed), tmp_path / str(seed)
        shutil.copytree(whole, out)
        left = rng.randrange(17)
        twins = {json.loads(x)["id"] for x in lines[FILES[1]]}
        before = sum(json.loads(x)["id"] in twins for x in lines[FILES[0]][:left])
        for f, n in ((FILES[0], left), (FILES[1], min(before + seed % 2, len(lines[FILES[1]])))):
            torn = (lines[f] + [b""])[n]
            cut = len(torn) - 1 if seed < 2 else rng.randrange(len(torn) or 1)  # all but the line's end, or anywhere
            (out / f).write_bytes(b"".join(lines[f][:n]) + torn[: max(0, cut)])
        _, shown = run(tmp_path, out=out, **settings)
        assert {f: (out / f).read_bytes() for f in FILES} == want
        assert (
            json.loads((out / "results.json").read_text())["tables"]
            == json.loads((whole / "results.json").read_text())["tables"]
        )
        assert "perception gap" in shown and "16/16" in shown
    # lost with the power, twins only: asked again
    (out / FILES[1]).write_bytes(b"".join(lines[FILES[1]][:-2]))
    run(tmp_path, out=out, **settings)
    assert {f: (out / f).read_bytes() for f in FILES} == want
    # a line that was spoiled inside is asked again, and one that stands twice is there once
    (out / FILES[0]).write_bytes(b"".join([*lines[FILES[0]][:3], b"\0\0\0\n", *lines[FILES[0]][4:], lines[FILES[0]][0]]))
    _, shown = run(tmp_path, out=out, **settings)
    assert said(out / FILES[0]) == said(whole / FILES[0]) and "predictions.jsonl:4: torn" in shown and ":17: torn" in shown


def test_a_finished_run_asks_nothing(undisturbed, tmp_path, monkeypatch):
    """Taken up again, it runs no model, and prints the same."""
    settings, whole = undisturbed
    shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(videolm.VideoLM, "answer", lambda *_: pytest.fail("asked again"))
    results, _ = run(tmp_path, out=tmp_path / "out", **settings)
    assert results["tables"] == json.loads((whole / "results.json").read_text())["tables"]


def kill_at_line(number: int) -> None:
    """Let this process be killed, as by kill -9, in the middle of a line that it writes."""
    add, written = answers.Lines.add, itertools.count()

    def add_or_die(self, record):
        if next(written) == number:
            self.file.write(json.dumps(record)[:25])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, record)

    answers.Lines.add = add_or_die


def test_kill_9(undisturbed, tmp_path):
    """The command itself, with a worker, killed in the middle of a line and given again: the same files."""
    settings, whole = undisturbed
    command = [HERE / "eval.py", "run", "--out", tmp_path / "out"]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    kill = functools.partial(kill_at_line, 15)
    killed = commands.run(*command, cwd=tmp_path, before=kill, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = (tmp_path / "out" / FILES[0]).read_bytes() + (tmp_path / "out" / FILES[1]).read_bytes()
    assert left.count(b"\n") == 15
    run(tmp_path, out=tmp_path / "out", **settings)
    for f in FILES:
        assert (tmp_path / "out" / f).read_bytes() == (whole / f).read_bytes()


def test_other_settings_do_not_continue(undisturbed, tmp_path, qwen2_5):
    """Frames, weights, key spans, tokens and more: each is named, with both values; a folder without settings, too."""
    settings, whole = undisturbed
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    other = write(tmp_path / "spans.jsonl", settings["key_spans"].read_text().replace("1.25", "1.0"))
    for change, name in (({"num_frames": 8}, "frames was 16, is 8"), ({"model": str(qwen2_5)}, "weights was "),
                         ({"key_spans": other}, "questions was "), ({"max_new_tokens": 5}, "longest answer was 4, is 5"),
                         ({"twin": False}, "twin was True, is False"),
                         ({"protocol": "ours"}, "protocol was ")):  # fmt: skip
        with pytest.raises(ValueError, match=f"other settings.*{name}.*give another --out"):
            run(tmp_path, out=out, **settings | change)
    (out / "settings.json").unlink()
    with pytest.raises(ValueError, match="predictions but no settings"):
        run(tmp_path, out=out, **settings)
    assert [(out / f).read_bytes() for f in FILES] == [(whole / f).read_bytes() for f in FILES]


def test_two_runs_do_not_write_to_one_folder(undisturbed, tmp_path):
    """The second is refused while the first holds the folder."""
    settings, whole = undisturbed
    shutil.copytree(whole, tmp_path / "out")
    import fcntl

    with (tmp_path / "out/settings.json").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run writes to it"):
            run(tmp_path, out=tmp_path / "out", **settings)


def test_broken_videos_are_named_and_counted(world, sharp2_5, tmp_path):
    """Missing, empty, no video, a part behind the end; the rest is answered, with a special token in the question, too."""
    root = dress("mvbench", lambda *a: make_mvbench(*a, ("action_sequence", "action_count")), tmp_path / "root", world, 1)
    questions = json.loads((root / "json/action_count.json").read_text())
    videos = sorted({q["video"] for q in questions})
    folder = load_benchmark("mvbench", root).questions[-1].video.parent
    (folder / videos[0]).unlink()
    (folder / videos[1]).write_bytes(b"")
    (folder / videos[2]).write_text("no video" * 999)
    questions[-1] |= {"video": videos[-1], "question": "What is in <|video_pad|>?"}
    write(root / "json/action_count.json", questions)
    bounded = json.loads((root / "json/action_sequence.json").read_text())
    bounded[0] |= {"start": 7, "end": 8}
    write(root / "json/action_sequence.json", bounded)
    settings = {"benchmark": "mvbench", "root": root, "model": str(sharp2_5), "out": tmp_path / "out", "max_new_tokens": 2}
    results, shown = run(tmp_path, **settings)
    lost = [f"action_count/{i}" for i, q in enumerate(questions) if q["video"] in videos[:3]]
    lost = {*lost, "action_sequence/0"}
    problems = (tmp_path / "out/problems.txt").read_text()
    broken = (f"{videos[0]}: no such file", f"{videos[1]}: the file is empty", f"{videos[2]}: cannot be decoded")
    for words in (*broken, "lasts 2.00 s"):
        assert problems.count(words) == 1 and words in shown
    named = sum(int(n) for n in re.findall(r"questions without an answer: (\d+)", problems))
    got = said(tmp_path / "out/predictions.jsonl")
    assert set(got) == {q.id for q in load_benchmark("mvbench", root).questions} - lost and named == len(lost)
    assert results["counts"]["missing predictions"] == len(lost) and f"problems.txt: {len(problems.splitlines())}" in shown
    # mended, and the same command given again: only what was lost is asked
    shutil.copy(next((world / "train").rglob("*.mp4")), folder / videos[0])
    run(tmp_path, **settings)
    assert set(said(tmp_path / "out/predictions.jsonl")) - set(got) == {
        f"action_count/{i}" for i, q in enumerate(questions) if q["video"] == videos[0]
    }


def test_hanging_and_crashing_decoders(world, sharp2_5, tmp_path):
    """A worker that hangs is stopped after the limit, one that dies is replaced; both videos are named."""
    lines = [json.loads(x) for x in (world / "train.jsonl").read_text().splitlines()[:4]]
    lines[1]["prompt"], lines[2]["prompt"] = "hang", "die"
    path = write(world.parent / f"{tmp_path.name}.jsonl", "".join(
        json.dumps(x | {"video": f"{world.name}/{x['video']}"}) + "\n" for x in lines))  # fmt: skip
    benchmark = load_benchmark("clips", path)
    hf = AutoModelForImageTextToText.from_pretrained(sharp2_5).eval()
    console = Console(file=(tmp_path / "shown").open("w"), width=160)
    lines, _, count = answers.answer(
        hf, Marked(AutoProcessor.from_pretrained(sharp2_5)), replace(benchmark, max_new_tokens=2),
        group_questions(benchmark), path.parent, tmp_path / "out", {}, console, time_limit=8.0,
    )  # fmt: skip
    ids = [q.id for q in benchmark.questions]
    assert list(lines.records) == [ids[0], ids[3]] and count == 2
    problems = (tmp_path / "out/problems.txt").read_text().splitlines()
    assert ids[1] in problems[0] and "hung for 8 s" in problems[0] and ids[2] in problems[1] and "crashed" in problems[1]


# --- Frames ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 5, 8, 11, 16, 40])
def test_frames_at_the_beginning_of_their_shares(world, count):
    """place 0 is the authors' arange(0, N, N / n), frame by frame, also where N / n is no whole number."""
    clips, _ = load_clips(world / "train.jsonl")
    got = read_frames(clips[0], count, frames_per_slot=1, place=0.0, min_frames=1)
    want = [int(i * 16 / min(count, 16)) for i in range(min(count, 16))]
    assert torch.equal(got.pixels, VideoDecoder(clips[0].video).get_frames_at(want).data)
    assert got.timestamps == pytest.approx([i / 8 for i in want])


def test_a_folder_of_frames(tmp_path):
    """Pictures 00001.jpg and on at a rate, from 1: frame k shows from (k - 1) / rate; other files do not count."""
    from torchvision.io import write_jpeg

    folder = tmp_path / "frames"
    folder.mkdir()
    for k in range(1, 13):  # 4 seconds at 3 a second
        write_jpeg(torch.full((3, 24, 32), 20 * k, dtype=torch.uint8), str(folder / f"{k:05d}.jpg"), 95)
    write(folder / "notes.txt", "x")
    write(folder / "._00001.jpg", "x")

    def shown(clip: Clip, count: int, place: float) -> list[int]:
        frames = read_frames(clip, count, frames_per_slot=1, place=place, min_frames=1)
        assert frames.fps == 3.0 and frames.pixels.shape[1:] == (3, 24, 32)
        numbers = [round(float(x) / 20) for x in frames.pixels.float().mean((1, 2, 3))]
        assert frames.timestamps == pytest.approx([max(0, (n - 1) / 3 - clip.start) for n in numbers])
        return numbers

    whole = Clip(folder, "", "w", frames_per_second=3.0)
    assert shown(whole, 4, 0.0) == [1, 4, 7, 10] and shown(whole, 4, 0.5) == [2, 5, 8, 11]
    assert shown(whole, 99, 0.5) == list(range(1, 13))
    part = Clip(folder, "", "w", start=1.0, end=3.0, frames_per_second=3.0)
    assert shown(part, 6, 0.0) == [4, 5, 6, 7, 8, 9] and shown(part, 2, 0.5) == [5, 8]
    for clip, words in ((Clip(folder, "", "w"), "not a regular file"), (replace(part, start=5.0, end=6.0), "'start'"),
                        (replace(whole, video=tmp_path / "none"), "no such file")):  # fmt: skip
        with pytest.raises(ClipError, match=words):
            read_frames(clip, 4)
    write(folder / "00003.jpg", "no picture")
    with pytest.raises(ClipError, match="cannot be decoded"):
        read_frames(whole, 12)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClipError, match="no picture"):
        read_frames(replace(whole, video=tmp_path / "empty"), 4)


def test_prompts_know_the_duration(world, sharp2_5):
    """Subtitles are those at the sampled moments, here 0.5 and 1.5 s of 2."""
    clips, _ = load_clips(world / "train.jsonl")
    record = {"options": ["A. x", "B. y"], "subtitles": [(0.0, 0.4, "one"), (0.4, 0.6, "two"), (1.4, 1.6, "three")]}
    q = Question("0", clips[0].video, "short", "What?", ("x", "y"), "A", record=record)
    benchmark = Benchmark("video-mme", "official", [q], [], 2, 4, 0.5, True)
    preparation = Preparation(AutoProcessor.from_pretrained(sharp2_5), 2)
    asked = make_asked(group_questions(benchmark)[0], preparation, None, benchmark, False, False)
    assert "\ntwo\nthree\n" in asked.texts[0] and "one" not in asked.texts[0]


# --- Twins ----------------------------------------------------------------------------------------------------------------


def test_twins_show_the_neighbours(undisturbed, world, sharp2_5):
    """A twin's response is plain generate() on frames whose key slots are replaced by hand; no spans, no line."""
    settings, out = undisturbed
    full, twin = (said(out / f) for f in FILES)
    hf, processor = AutoModelForImageTextToText.from_pretrained(sharp2_5).eval(), AutoProcessor.from_pretrained(sharp2_5)
    benchmark = load_benchmark("mvbench", settings["root"])
    spans = {json.loads(x)["video"] for x in settings["key_spans"].read_text().splitlines()}
    with_twin = [q for q in benchmark.questions if str(q.video.relative_to(settings["root"])) in spans]
    assert {q.id for q in with_twin} == set(twin) < set(full)
    for q in with_twin:
        places = list(range(8 if q.start else 0, 16))
        # key: 1.25 to 1.75 s, frames 10 to 13, two slots: frames 8, 9 stand for the first, 14, 15 for the second
        shown = [{10: 8, 11: 9, 12: 14, 13: 15}.get(p, p) for p in places]
        assert twin[q.id] == by_hand(hf, processor, q, places, benchmark, 4, shown)
    text = (out / "problems.txt").read_text()
    assert f"{len(full) - len(twin)} questions have no key spans" in text


def test_perception_gap_by_hand():
    """Full minus twin by category, on the questions that have a twin only."""

    def question(id, category, answer):
        return Question(id, Path(f"{id}.mp4"), category, "What?", ("x", "y"), answer)

    questions = [question("a", "one", "A"), question("b", "one", "B"), question("c", "two", "A"), question("d", "two", "A")]
    benchmark = Benchmark("mvbench", "ours", questions, [], 4, 4, 0.5)
    full = {"a": "A", "b": "B", "c": "B", "d": "A"}
    gaps = answers.perception_gap(benchmark, full, {"a": "A", "b": "A", "c": "A"})
    got = {c: (g["scores"]["accuracy"]["b"], g["scores"]["accuracy"]["a"], g["questions"]) for c, g in gaps.items()}
    assert got == {"overall": (2 / 3, 2 / 3, 3), "one": (1.0, 0.5, 2), "two": (0.0, 1.0, 1)}
    assert gaps["one"]["scores"]["accuracy"]["difference"] == 0.5


def test_key_spans_are_moved_to_the_part(tmp_path):
    """Seconds of a curated part become seconds of the question's; what is outside falls away; bad lines are named."""
    lines = [
        {"video": "a.mp4", "caption": "x", "start": 10.0, "keywords": ["k"], "key_spans": [[1.0, 2.0]]},
        {"video": "a.mp4", "key_spans": [[[3.0, 4.0], [30.0, 31.0]]]},
        {"video": "../b.mp4", "key_spans": [[1.0, 2.0]]},
        {"video": "c.mp4", "caption": "no spans"},
        {"video": "c.mp4", "key_spans": [[2.0, 1.0]]},
    ]
    path = write(tmp_path / "spans.jsonl", "\n".join([*map(json.dumps, lines), "{", "[]"]))
    spans, problems = asked_parts.read_key_spans(path, tmp_path)
    assert dict(spans) == {(tmp_path / "a.mp4").resolve(): [[11.0, 12.0], [3.0, 4.0], [30.0, 31.0]]}
    for number, words in (
        (3, "leaves the root"),
        (4, "'key_spans' is missing"),
        (5, "less than the end"),
        (6, "not JSON"),
        (7, "list"),
    ):
        assert any(f":{number}" in p and words in p for p in problems)
    assert len(problems) == 5
    q = Question("0", tmp_path / "a.mp4", "c", "?", (), None, start=11.5, end=20.0, key_spans=[[0, 1]])
    parts = group_questions(
        Benchmark("mvbench", "ours", [q, replace(q, id="1", video=Path("z.mp4"))], [], 4, 4, 0.5), spans
    )
    assert [p.spans for p in parts] == [[[0.0, 0.5]], [[0, 1]]]
    with pytest.raises(ClipError, match="no such file"):
        asked_parts.read_key_spans(tmp_path / "none.jsonl", tmp_path)


# --- Other models ---------------------------------------------------------------------------------------------------------


def build_llava(out: Path) -> Path:
    """A tiny LLaVA-OneVision: another vision encoder, another processor, no slots."""
    tokenizer = train_tokenizer()
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    ids = {f"{n}_token_index": tokenizer.convert_tokens_to_ids(f"<{n}>") for n in ("image", "video")}
    torch.manual_seed(1)
    vision = SiglipVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=12
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    pins = [[48, 48]]
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_grid_pinpoints=pins, vision_feature_layer=-1, **ids
    )
    hf = LlavaOnevisionForConditionalGeneration(config)
    with torch.no_grad():
        for weight in hf.parameters():
            if weight.ndim == 2:
                weight.mul_(4.0)
    size = {"height": 48, "width": 48}
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'video' %}"
        "<video>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pins), tokenizer,
        LlavaOnevisionVideoProcessor(size=size), num_image_tokens=16,
        vision_feature_select_strategy="full", chat_template=template,
    )  # fmt: skip
    hf.generation_config.eos_token_id = tokenizer.eos_token_id
    hf.generation_config.pad_token_id = tokenizer.pad_token_id
    hf.save_pretrained(out)
    processor.save_pretrained(out)
    return out


def test_any_other_model_runs(world, tmp_path):
    """LLaVA-OneVision: a batch of ragged prompts, full and twin, equals one prompt at a time; and it says so."""
    folder = build_llava(tmp_path / "llava")
    root = dress("mvbench", lambda *a: make_mvbench(*a, ("action_count",)), tmp_path / "root", world)
    spans = [{"video": str(v.relative_to(root)), "key_spans": [[0.25, 1.6]]} for v in root.rglob("*.mp4")]
    key_spans = write(tmp_path / "spans.jsonl", "".join(json.dumps(s) + "\n" for s in spans))
    _, shown = run(tmp_path, benchmark="mvbench", root=root, model=str(folder), out=tmp_path / "out", twin=True,
                   key_spans=key_spans, max_new_tokens=12)  # fmt: skip
    assert "prefixes are not shared" in shown and "8/8" in shown
    benchmark = load_benchmark("mvbench", root)
    hf, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    full, twin = (said(tmp_path / "out" / f) for f in FILES)
    # the frames that show 0.25 to 1.6 s are 2 to 12; nearest outside are 1 (a tie goes to the earlier) and 13
    for got, places in ((full, list(range(16))), (twin, [0] + 7 * [1] + 6 * [13] + [14, 15])):
        for q in benchmark.questions:
            text, begin = prompt(benchmark, q)
            frames = VideoDecoder(q.video).get_frames_at(places).data
            inputs = processor(text=["<|im_start|>user\n<video>" + text + AFTER + begin], videos=[frames],
                               do_sample_frames=False, return_tensors="pt")  # fmt: skip
            out = hf.generate(**inputs, max_new_tokens=12, do_sample=False)
            want = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert got[q.id] == want
    assert len(set(full.values())) > 2 and full != twin


def test_linear_attention_runs_without_sharing(world, tmp_path):
    """Qwen3.5 has a vision encoder like ours, but no prefix that can be shared by a mask."""
    folder = build_tiny(tmp_path / "qwen3_5", "qwen3_5", seed=1)
    _, shown = run(tmp_path, benchmark="clips", root=world / "test.jsonl", model=str(folder), out=tmp_path / "out", limit=2,
                   max_new_tokens=2, num_frames=4)  # fmt: skip
    assert "qwen3_5: prefixes are not shared" in shown and len(said(tmp_path / "out/predictions.jsonl")) == 2


def test_what_another_model_refuses_is_skipped(world, tmp_path, sharp2_5, monkeypatch):
    """A video that a model's own code refuses is named, and the run goes on."""
    real = answers.generate

    def generate(hf, processor, videos, texts, max_new_tokens):
        if torch.equal(videos[0].pixels, refused):
            raise ValueError("odd pictures")
        return real(hf, processor, videos, texts, max_new_tokens)

    clips, _ = load_clips(world / "test.jsonl")
    refused = read_frames(clips[1], 4).pixels
    monkeypatch.setattr(answers, "shares_prefix", lambda hf: False)
    monkeypatch.setattr(answers, "generate", generate)
    results, shown = run(tmp_path, benchmark="clips", root=world / "test.jsonl", model=str(sharp2_5), num_frames=4, limit=3,
                         out=tmp_path / "out", max_new_tokens=2)  # fmt: skip
    assert list(said(tmp_path / "out/predictions.jsonl")) == [f"test/000/00000{i}.mp4" for i in (0, 2)]
    assert "odd pictures" in shown and "000001.mp4" in (tmp_path / "out/problems.txt").read_text()
    assert results["counts"]["missing predictions"] == 1


def test_predictions_of_one_kind_have_a_folder_of_their_own(world, tmp_path, sharp2_5):
    """In the run's folder, so that the same benchmark with twins or the other protocol does not meet the first one's."""
    (tmp_path / "checkpoint").symlink_to(sharp2_5)
    for more in ({}, {"twin": True}, {"protocol": "ours"}, {"needle": True, "twin": True, "lengths": (1,)}):
        run(tmp_path, benchmark="clips", root=world / "test.jsonl", model=str(tmp_path), limit=1, max_new_tokens=2,
            num_frames=4, **more)  # fmt: skip
    made = {path.parent.name for path in tmp_path.glob("*/predictions.jsonl")}
    assert made == {"clips", "clips-twin", "clips-ours", "clips-twin-needle"}


def test_smaller_pictures_are_other_predictions(world, tmp_path, sharp2_5, monkeypatch):
    """--max-pixels reaches the model, and is among the settings that a folder holds to."""
    grids, real = [], asked_parts.share_prompt

    def share_prompt(texts, look, preparation):
        grids.append(tuple(look.runs[0].pixels.shape[-2:]))
        return real(texts, look, preparation)

    monkeypatch.setattr(asked_parts, "share_prompt", share_prompt)
    asked = dict(benchmark="clips", root=world / "test.jsonl", model=str(sharp2_5), limit=1, max_new_tokens=2, num_frames=4)
    run(tmp_path, **asked, out=tmp_path / "out")
    run(tmp_path, **asked, out=tmp_path / "small", max_pixels=1000)
    assert grids == [(48, 48), (24, 24)]
    # The model of a run is shown what the run was trained on, unless told otherwise.
    (tmp_path / "checkpoint").symlink_to(sharp2_5)
    (tmp_path / "settings.json").write_text(json.dumps({"settings": {"max_pixels": 1000}}))
    run(tmp_path, **asked | {"model": str(tmp_path)}, out=tmp_path / "of run")
    assert grids[2:] == [(24, 24)]
    with pytest.raises(ValueError, match="pixels of a picture was None, is 1000"):
        run(tmp_path, **asked, out=tmp_path / "out", max_pixels=1000)


# --- Probes ---------------------------------------------------------------------------------------------------------------


def test_needle_in_footage(world, tmp_path):
    """Clips one after another, the needle at its place, no clip with its keyword, its key slots replaced in the twin."""
    benchmark = load_benchmark("clips", world / "test.jsonl")
    parts = group_questions(benchmark)
    hidden, problems = probes.hide(parts, (1, 2, 4), seed=3)
    assert [p.questions[0].id for p in hidden[:3]] == [f"{parts[0].questions[0].id} in {n}" for n in (1, 2, 4)]
    assert len(hidden) == 3 * len(parts) and not problems
    assert {p.before for p in hidden if len(p.footage) == 3} == {0, 1, 2, 3}
    action = {c.video: c.truth["action"] for c in load_clips(world / "test.jsonl")[0]}
    for one, two, four in zip(hidden[::3], hidden[1::3], hidden[2::3]):
        assert [len(p.footage) for p in (one, two, four)] == [0, 1, 3] and four.footage[0] is two.footage[0]
        assert all(action[c.video] != action[one.video] for c in four.footage)
        assert len({c.video for c in (one, *four.footage)}) == 4
    part = next(p for p in hidden if len(p.footage) == 3 and p.before == 2)
    frames, source, share = read_part(part, replace(benchmark, num_frames=8), 2)
    videos = [*part.footage[:2], part, *part.footage[2:]]
    want = torch.cat([VideoDecoder(c.video).get_frames_at(range(1, 16, 2)).data for c in videos])
    assert torch.equal(frames.pixels, want) and frames.duration == pytest.approx(8.0)
    assert frames.timestamps == pytest.approx([2 * i + (2 * k + 1) / 8 for i in range(4) for k in range(8)])
    ((a, b),) = part.spans
    assert share == pytest.approx((b - a) / 8)
    key = {k for k in range(16) if 4 + a < 0.125 + 0.5 * (k + 1) and 4 + b > 0.125 + 0.5 * k}
    assert {k for k in range(16) if source[k] != k} == key
    again, _ = probes.hide(parts, (1, 2, 4), seed=3)
    other, _ = probes.hide(parts, (1, 2, 4), seed=4)
    assert again == hidden and other != hidden
    _, problems = probes.hide(parts[:2], (1, 8))
    assert len(problems) == 2 and "other clips without its keywords" in problems[0]


def test_needle_curve_from_the_command(world, sharp, tmp_path):
    """The curve counts keywords in the responses, a skipped clip as nothing; table, PNG and JSON are there."""
    settings = {
        "benchmark": "clips",
        "root": world / "test.jsonl",
        "model": str(sharp),
        "out": tmp_path / "out",
        "needle": True,
    }
    settings |= {"lengths": (1, 3), "limit": 4, "max_new_tokens": 2, "num_frames": 8, "twin": True}
    _, shown = run(tmp_path, **settings)
    ids = list(said(tmp_path / "out/predictions.jsonl"))
    assert len(ids) == 8 and all(id.endswith((" in 1", " in 3")) for id in ids)
    clips = {str(c.video.relative_to(world.resolve())): c for c in load_clips(world / "test.jsonl")[0]}
    for f, name in zip(
        FILES, ("full", "twin")
    ):  # what was said, made up: the first clip's event found at both lengths, the second's once
        lines = [json.loads(x) for x in (tmp_path / "out" / f).read_text().splitlines()]
        for i, line in enumerate(lines):
            keyword = clips[line["id"].rsplit(" in ", 1)[0]].keywords[0]
            line["response"] = f"It {keyword.upper()}." if i < (3 if name == "full" else 1) else "Nothing."
        write(tmp_path / "out" / f, "".join(json.dumps(x) + "\n" for x in lines))
    results, shown = run(tmp_path, **settings)
    points = {name: {p["footage"]: p for p in curve} for name, curve in results["curves"].items()}
    assert [points["full"][f"{n} clips"]["value"] for n in (1, 3)] == [0.5, 0.25]
    assert [points["twin"][f"{n} clips"]["value"] for n in (1, 3)] == [0.25, 0.0]
    spans = [clips[id.rsplit(" in ", 1)[0]].truth["span"] for id in ids[::2]]
    mean = sum(b - a for a, b in spans) / 4
    assert points["full"]["1 clips"]["event share"] == pytest.approx(mean / 2, abs=1e-5)
    assert points["full"]["3 clips"]["event share"] == pytest.approx(mean / 6, abs=1e-5)
    assert (tmp_path / "out/needle.png").read_bytes()[:4] == b"\x89PNG" and "event's share" in shown
    assert json.loads((tmp_path / "out/results.json").read_text())["curves"] == results["curves"]


@pytest.mark.parametrize(
    "text, found",
    [
        ("video 1, 0.5 to 1.5", (1, 0.5, 1.5)),
        (" Video 2: from 3 s to 4.25 seconds.\n", (2, 3.0, 4.25)),
        ("VIDEO 1, 2-3", (1, 2.0, 3.0)),
        ("video 3, 1 to 2", None),
        ("video 1, 2 to 1", None),
        ("video 1, 1 to 1", None),
        ("video 1", None),
        ("1, 2", None),
        ("Both: video 1, 1 to 2 and video 2, 1 to 2", None),
        ("video 1, 1 to 2 I think", None),
        ("video 12, 1 to 2", None),
        ("", None),
    ],
)
def test_differences_are_read_strictly(text, found):
    """What is not in the form, and nothing else, is no answer."""
    assert probes.parse_difference(text) == found


def test_interval_iou_by_hand():
    """Spans count together, once where they overlap."""
    assert probes.interval_iou(0, 2, [[1, 3]]) == pytest.approx(1 / 3)
    assert probes.interval_iou(0, 4, [[0, 1], [0.5, 1], [3, 4]]) == pytest.approx(0.5)
    assert probes.interval_iou(0, 1, [[2, 3]]) == 0 and probes.interval_iou(1, 2, [[1, 2]]) == 1


def test_full_and_twin_in_one_prompt(world, sharp2_5, tmp_path):
    """Two videos a prompt in the order that was drawn; scores of made-up answers by hand; clips without spans are named."""
    benchmark = load_benchmark("clips", world / "test.jsonl")
    parts = group_questions(benchmark)
    parts[3].spans = []
    pairs, problems = probes.pair(parts, seed=1)
    assert len(problems) == 1 and parts[3].questions[0].id in problems[0] and len(pairs) == len(parts) - 1
    twins = [p.pair for p in pairs]
    assert 5 < twins.count(1) < 19 and twins == [p.pair for p in probes.pair(parts, 1)[0]]
    preparation = Preparation(AutoProcessor.from_pretrained(sharp2_5), 8)
    for part in (pairs[twins.index(1)], pairs[twins.index(2)]):
        asked = make_asked(part, preparation, None, replace(benchmark, num_frames=8), True, False)
        frames = VideoDecoder(part.video).get_frames_at(range(1, 16, 2)).data
        full, twin = asked.videos[2 - part.pair], asked.videos[part.pair - 1]
        assert torch.equal(full.pixels, frames) and not torch.equal(twin.pixels, frames)
        keyword = part.questions[0].record["clip"].keywords[0]
        assert asked.texts[0].count("<|video_pad|>") == 2 and f'"{keyword}"' in asked.texts[0]
    a, b = pairs[0].spans[0]
    right, wrong = 3 - pairs[0].pair, pairs[0].pair
    texts = [
        f"video {right}, {a} to {b}",
        f"video {wrong}, {a} to {b}",
        f"video {right}, {b} to {b + 1}",
        "video one",
        None,
    ]
    for text, scores in zip(texts, ([1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0])):
        lines = {} if text is None else {pairs[0].questions[0].id: {"response": text}}
        assert list(probes.score_differences(pairs[:1], lines)[0]["scores"].values()) == pytest.approx(scores)
    results, shown = run(tmp_path, benchmark="clips", root=world / "test.jsonl", model=str(sharp2_5), out=tmp_path / "out",
                         diff=True, limit=3, max_new_tokens=3, num_frames=8)  # fmt: skip
    assert len(results["rows"]) == 3 and results["scores"]["video right"]["value"] == 0 and "IoU" in shown


def test_labels_of_the_curve_do_not_overlap(tmp_path, monkeypatch):
    """A label a point, none of matplotlib's own between them; where points are dense, fewer."""
    from matplotlib import pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    for lengths in ((1, 2, 4, 8), range(1, 20), [2**i for i in range(12)]):
        points = [{"event share": 0.3 / n, "value": 0.5, "low": 0.4, "high": 0.6} for n in lengths]
        probes.draw_curve({"full": points, "twin": points[:1]}, tmp_path / "needle.png")
        figure = figures.pop()
        figure.canvas.draw()
        axis = figure.axes[0].xaxis
        labels = [label for minor in (False, True) for label in axis.get_ticklabels(minor) if label.get_text()]
        boxes = sorted((label.get_window_extent().x0, label.get_window_extent().x1) for label in labels)
        assert 3 < len(boxes) < 8
        assert all(end + 3 < begin for (_, end), (begin, _) in itertools.pairwise(boxes)), [x.get_text() for x in labels]


def test_settings_that_cannot_be(world, tmp_path, sharp2_5):
    """Each is one line that names the setting, several of them at once; no folder is left."""
    settings = {"benchmark": "clips", "root": world / "test.jsonl", "model": str(sharp2_5), "out": tmp_path / "out"}
    root = dress("vru-accident", make_vru_accident, tmp_path / "root", world)
    (tmp_path / "elsewhere").mkdir()
    alone = {"root": Path(shutil.copy(world / "test.jsonl", tmp_path / "elsewhere"))}
    for change, words in (
        ({"needle": True, "diff": True}, "one at a time"),
        ({"diff": True, "twin": True}, "leave --twin out"),
        ({"benchmark": "vru-accident", "root": root, "needle": True}, "--needle: needs clips with keywords"),
        ({"benchmark": "vru-accident", "root": root, "twin": True}, "no question has key spans"),
        ({"model": str(tmp_path / "nowhere")}, "--model"),
        ({"batch_size": 0, "num_frames": -1, "max_new_tokens": 0, "max_pixels": 0, "time_limit": 0.0, "workers": -1},
         "--batch-size 0: .*--num-frames -1: .*--max-new-tokens 0: .*--max-pixels 0: .*--time-limit 0.0: .*--workers -1: "),
        ({"limit": 0}, "--limit 0: give a number above 0, or -1 for all"), ({"limit": -2}, "--limit -2"),
        *(({"needle": True, "lengths": x}, "--lengths .*each 1 or more") for x in ((0,), (1, -2), (), (2, 2))),
        ({"needle": True, "lengths": (100,)}, "(?s)no question of clips can be asked.*not hidden in 100"),
        (alone, "none of the 24 videos exists, the first is .*elsewhere.*000000.mp4; give --videos"),
        ({"max_text_tokens": 3}, "(?s)no question of clips can be asked.*its prompt has [0-9]+ tokens, more than 3"),
        (alone | {"limit": 3}, "none of the 3 videos exists"),
        ({"videos": tmp_path / "nowhere"}, "--videos .*nowhere: no such folder"),
        ({"benchmark": "vru-accident", "root": root, "videos": tmp_path}, "--videos: only for clips"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            run(tmp_path, **settings | change)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_that_the_same_command_goes_on(world, tmp_path, sharp2_5, monkeypatch, capsys):
    """No traceback, the exit code of an interrupt."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(answers, "answer", interrupted)
    arguments = ["run", "--benchmark", "clips", "--root", world / "test.jsonl", "--model", sharp2_5, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(HERE / "eval.py"), run_name="__main__")
    assert stopped.value.code == 130 and "the same command continues" in capsys.readouterr().err


def test_clips_whose_videos_lie_elsewhere(world, tmp_path, sharp2_5):
    """What data.curate wrote is evaluated where it lies; ids are the paths in the file, for `score`, too."""
    lines = [json.loads(x) for x in (world / "test.jsonl").read_text().splitlines()[:3]]
    lines[2]["video"] = "gone.mp4"
    path = write(tmp_path / "curated" / "clips.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
    settings = {"benchmark": "clips", "model": str(sharp2_5), "out": tmp_path / "out", "max_new_tokens": 2, "num_frames": 8}
    results, shown = run(tmp_path, root=path, videos=world, twin=True, **settings)
    got = said(tmp_path / "out" / "predictions.jsonl")
    assert list(got) == [x["video"] for x in lines[:2]] and "missing videos: 1" in shown
    page = (tmp_path / "out" / "results.md").read_text()
    assert "perception gap: full minus twin" in page and "| overall | keyword recall | 2 |" in page
    assert "- problems: 1, in problems.txt" in page
    scored, console = (
        ScoreSettings("clips", path, tmp_path / "out", videos=world),
        Console(file=(tmp_path / "log").open("w+")),
    )
    assert [row["response"] for row in run_score(scored, console)["rows"]] == [*got.values(), None]
    console.file.seek(0)
    assert "missing predictions: 1" in (log := console.file.read()) and "missing videos" not in log
    # --limit is of videos: the first two are asked, and count
    results, _ = run(tmp_path, root=path.parent, videos=world, limit=1, **settings | {"out": tmp_path / "one"})
    assert list(said(tmp_path / "one" / "predictions.jsonl")) == [lines[0]["video"]] and results["counts"]["scored"] == 1


NEEDLE = {"twin": True, "needle": True}


@pytest.mark.parametrize("more", [{"twin": True}, NEEDLE | {"lengths": (1, 2)}, NEEDLE | {"lengths": (1,)}, {"diff": True}])
def test_no_twin_can_be_made(world, tmp_path, sharp2_5, more):
    """Key spans that hold everything leave no twin: a line says so beside the other results; a pair needs one."""
    lines = [json.loads(x) for x in (world / "test.jsonl").read_text().splitlines()[:4]]
    lines = [x | {"key_spans": [[[0, 2]]], "truth": None} for x in lines]
    path = write(tmp_path / "clips.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
    settings = {"benchmark": "clips", "root": path, "videos": world, "model": str(sharp2_5), "out": tmp_path / "out"}
    settings |= {"max_new_tokens": 2, "num_frames": 8, "limit": 2} | more
    if "diff" in more:
        with pytest.raises(ClipError, match=r"no question could be answered: .*problems\.txt says why"):
            run(tmp_path, **settings)
        assert (tmp_path / "out" / "problems.txt").read_text().count("no twin") == 2
        return
    results, shown = run(tmp_path, **settings)
    page = (tmp_path / "out" / "results.md").read_text()
    if "needle" in more and more["lengths"] == (1, 2):  # alone without a twin, in footage with one
        numbers = {name: [p["footage"] for p in curve] for name, curve in results["curves"].items()}
        assert numbers == {"full": ["1 clips", "2 clips"], "twin": ["2 clips"]} and page.count(" | - |") == 1
        assert [point["questions"] for point in results["curves"]["full"]] == [2, 2]  # --limit: two clips, at both lengths
    elif "needle" in more:
        assert list(results["curves"]) == ["full"] and "no twin could be made" in shown
    else:
        assert results["perception gap"] == {} and "| overall | 2 |" in page
        assert "no twin could be made" in shown and "no twin could be made" in page


def test_cost_of_questions_compares_equal_answers(qwen2_5):
    """What `eval.py cost --what questions` times: generate() each and one prefill, with the same tokens."""
    settings = cost.CostSettings("questions", str(qwen2_5), visual_tokens=64, new_tokens=4, rollouts=5)
    one_each, shared = (job() for job in cost.question_jobs(settings).values())
    assert one_each.shape == (5, 4) and torch.equal(one_each, shared)
