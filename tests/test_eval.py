"""Scores of descriptions, on small cases worked out by hand, and a whole evaluation."""

import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForImageTextToText, AutoProcessor

import eval as evaluation
from data import videolm
from data.batches import Rollouts
from data.benchmarks.scoring import event_recall, names, score_description, similarity
from data.clips import load_clips
from data.examples import Preparation
from data.measure import card, cost, long, report
from data.measure import evaluate as measure
from data.measure.evaluate import DescribeSettings, EvalSettings, evaluate, markdown_row, run_describe, run_evaluation
from data.measure.report import event_table
from data.run.models import load_model
from data.run.settings import as_trained
from data.texts import EmbeddedText
from data.video import Clip
from data.world import ACTIONS

ALL = set(ACTIONS)
STATIC = "A red circle and a blue square on a grey floor."
TRUTH = {"actor": "red circle", "action": "fades", "span": [0.5, 0.75], "static": STATIC}
CLIP = Clip(Path("a.mp4"), f"{STATIC} The red circle fades.", "c:1", keywords=["red circle fades"], truth=TRUTH)


@pytest.mark.parametrize(
    "text, action, actor, recall",
    [
        (f"{STATIC} The red circle fades.", 1, 1, 1),
        (f"{STATIC} Suddenly the red circle FADES!", 1, 1, 1),
        (f"{STATIC} The blue square fades.", 1, 0, 0),
        (f"{STATIC} The red circle turns black.", 0, 1, 0),
        (f"{STATIC} The red circle fades. The red circle turns black.", 0, 1, 1),  # naming more than happened
        ("The red circle " + " and ".join(ACTIONS) + ".", 0, 1, 0),  # naming everything does not count as right
        ("", 0, 0, 0),
        ("The red circle fadesward.", 0, 0, 0),
    ],
)
def test_scores_by_hand(text, action, actor, recall):
    """An event is named if it is, and no other; its sentence must name the actor; words must match whole."""
    got = score_description(CLIP, text, ALL)
    assert (got["event named"], got["actor right"], got["keyword recall"]) == (action, actor, recall)
    assert got["whole caption right"] == (text == CLIP.caption) and "event claimed" not in got


@pytest.mark.parametrize(
    "told, run, shown",
    [
        ({}, {}, (16, None, None, None)),
        ({}, dict(max_frames=32, fps=2.0, max_pixels=784, skim_fps=8.0), (32, 2.0, 784, 8.0)),
        ({"max_frames": 8}, dict(max_frames=32, fps=2.0, max_pixels=None, skim_fps=8.0), (8, None, None, 8.0)),
        ({"fps": 1.0, "max_pixels": 56}, dict(max_frames=32, fps=2.0, max_pixels=784), (32, 1.0, 56, None)),
        ({"skim_fps": 1.0}, dict(max_frames=32, fps=None, max_pixels=784, skim_fps=8.0), (32, None, 784, 1.0)),
    ],
)
def test_frames_are_those_of_the_run_unless_told(told, run, shown, tmp_path):
    """Of the run whose folder or checkpoint is given; a model of the hub has none. What is told is left alone."""
    (tmp_path / "run").mkdir()
    if run:
        (tmp_path / "run/settings.json").write_text(json.dumps({"settings": run}))
    for model in (str(tmp_path / "run"), str(tmp_path / "run/checkpoint"), str(tmp_path / "run/checkpoint-000100")):
        settings = EvalSettings(model=model, **told)
        got = as_trained(settings, model)
        assert (got.max_frames, got.fps, got.max_pixels, got.skim_fps) == shown
    assert settings == EvalSettings(model=model, **told)  # a copy
    of_hub = as_trained(EvalSettings(model="Qwen/Qwen2.5-VL-3B-Instruct"), "Qwen/Qwen2.5-VL-3B-Instruct")
    assert (of_hub.max_frames, of_hub.fps, of_hub.max_pixels, of_hub.skim_fps) == (16, None, None, None)
    assert replace(of_hub, frames="skim").how_to_look().fps == 2.0


class Chosen(Exception):
    """How frames would be prepared; raised in place of the rest of the command."""


@pytest.mark.parametrize("command", ["evaluate", "describe", "recall", "named"])
def test_commands_show_the_frames_of_the_run(command, world, qwen2_5, tmp_path, monkeypatch):
    """Every command that shows frames to a run's model."""

    def prepare(processor, max_frames, fps=None, **more):
        raise Chosen(max_frames, fps, more["max_pixels"], more.get("skim"))

    for module in (measure, long):
        monkeypatch.setattr(module, "Preparation", prepare)
    (tmp_path / "checkpoint").symlink_to(qwen2_5)
    of_run = dict(max_frames=12, fps=None, max_pixels=784, skim_fps=5.0)
    (tmp_path / "settings.json").write_text(json.dumps({"settings": of_run}))
    console, data, model = Console(quiet=True), world / "test.jsonl", str(tmp_path)
    with pytest.raises(Chosen) as chosen:
        if command == "evaluate":
            run_evaluation(EvalSettings(model=model, data=data, frames="skim"), console)
        elif command == "describe":
            run_describe(DescribeSettings(load_clips(data)[0][0].video, model=model, frames="skim"), console)
        else:
            long.run_long(long.LongSettings(what=command, model=model, data=data), console)
    max_frames, fps, max_pixels, skim = chosen.value.args
    assert max_pixels == 784
    if command in ("evaluate", "describe"):
        assert (max_frames, fps, skim.fps) == (12, None, 5.0)


@pytest.mark.parametrize(
    "told, run, said",
    [
        ({}, {"frames": "uniform", "visual_tokens": None, "windows": 4}, ""),
        ({}, {}, ""),  # a model of the hub
        ({}, {"frames": "skim", "visual_tokens": 96}, "--frames was skim, is uniform, --visual-tokens was 96, is None"),
        ({"frames": "skim"}, {"frames": "skim", "visual_tokens": None, "windows": 2}, "--windows was 2, is 4"),
        ({"frames": "skim"}, {"frames": "uniform", "visual_tokens": None, "windows": 2}, "--frames was uniform, is skim"),
        ({"frames": "skim"}, {"frames": "skim", "visual_tokens": None, "windows": 4, "window_fps": 8.0}, ""),
    ],
)  # fmt: skip
def test_other_frames_than_in_training_are_told(told, run, said, tmp_path):
    """A model that was trained on skims is not shown uniform frames without a word."""
    if run:
        (tmp_path / "settings.json").write_text(json.dumps({"settings": run}))
    console = Console(record=True, width=200)
    as_trained(EvalSettings(**told), str(tmp_path), console)
    shown = console.export_text().strip()
    assert shown == (f"not the frames of training: {said}" if said else "")


@pytest.mark.parametrize("kind", ["usual", "rare", None])
def test_usual_and_rare_events_have_scores_of_their_own(kind):
    """By the `kind` of a clip's truth; without it, there is the event alone."""
    clip = replace(CLIP, truth=TRUTH | ({"kind": kind} if kind else {}))
    got = score_description(clip, CLIP.caption, ALL)
    assert {name for name in got if name.endswith("event named")} - {"event named"} == (
        {f"{kind} event named"} if kind else set()
    )
    assert all(value == 1 for value in got.values())


@pytest.mark.parametrize(
    "text, claimed, whole",
    [
        (STATIC, 0, 1), (STATIC.upper(), 0, 1), (f"{STATIC} The red circle fades.", 1, 0),
        (f"{STATIC} The blue square turns black.", 1, 0), ("", 0, 0), (f"{STATIC} It rests.", 0, 0),
    ],
)  # fmt: skip
def test_claims_of_what_is_not_shown(text, claimed, whole):
    """In a twin, and in a clip where nothing happens, any event that is named is claimed; silence is the right caption."""
    quiet = replace(CLIP, caption=STATIC, keywords=[], truth={"static": STATIC, "kind": "quiet", "usual": "fades"})
    for got in (score_description(quiet, text, ALL), score_description(CLIP, text, ALL, of_twin=True)):
        assert (got["event claimed"], got["whole caption right"]) == (claimed, whole)
    assert "event named" not in score_description(quiet, text, ALL)


@pytest.mark.parametrize(
    "settings, message",
    [
        (EvalSettings(batch_size=0), "--batch-size: got 0"),
        (EvalSettings(max_new_tokens=-1), "--max-new-tokens: got -1"),
        (EvalSettings(max_frames=0), "--max-frames: got 0"),
        (EvalSettings(fps=float("nan")), "--fps: got nan"),
        (EvalSettings(limit=0), "--limit: got 0; give a number above 0, or -1"),
        (EvalSettings(workers=-1), "--workers: got -1"),
        (EvalSettings(temperature=-0.5), "--temperature: got -0.5"),
        (DescribeSettings(Path("a.mp4"), max_new_tokens=0), "--max-new-tokens: got 0"),
        (DescribeSettings(Path("a.mp4"), max_pixels=0), "--max-pixels: got 0"),
        (DescribeSettings(Path("a.mp4"), "nowhere/none"), "a.mp4: no such file"),  # before the model is looked for
    ],
)
def test_numbers_are_checked_first(settings, message):
    """Before anything is loaded: neither the model nor the file is there."""
    command = run_evaluation if isinstance(settings, EvalSettings) else run_describe
    with pytest.raises(ValueError, match=message):
        command(settings, Console())


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        (report.run_report, report.ReportSettings(seeds=()), "--seeds: got none"),
        (report.run_report, report.ReportSettings(steps=0), "--steps: got 0"),
        (report.run_report, report.ReportSettings(data=Path("none.jsonl")), "--data none.jsonl: none.jsonl: no such file"),
        (cost.run_cost, cost.CostSettings(visual_tokens=40), "--visual-tokens: got 40; give a multiple of 16"),
        (cost.run_cost, cost.CostSettings(repeats=0), "--repeats: got 0"),
        (cost.run_cost, cost.CostSettings(rollouts=0), "--rollouts: got 0"),
        (card.run_card, card.CardSettings(steps=1), "--steps: got 1; give 2 or more"),
        (long.run_long, long.LongSettings(lengths=()), "--lengths: got none"),
        (long.run_long, long.LongSettings(lengths=(2, 0)), "--lengths: got 2 0"),
        (long.run_long, long.LongSettings(seconds=0.0), "--seconds: got 0.0"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, monkeypatch, command, arguments, message):
    """The same of the commands that measure; nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        command(arguments, Console())
    assert not list(tmp_path.iterdir())


def test_a_report_names_the_commits_of_all_its_runs(tmp_path):
    """Also of those that were there before."""
    runs = {"a": {0: tmp_path / "a0", 1: tmp_path / "a1"}, "b": {0: tmp_path / "b0"}}
    for folder, commit in zip([*runs["a"].values(), *runs["b"].values()], ("2b", "1a", "2b")):
        folder.mkdir()
        (folder / "settings.json").write_text(json.dumps({"commit": commit, "torch": "2.14", "device": "CPU"}))
    assert report.where_made(runs) == "Commit 1a, 2b, torch 2.14, CPU"


def test_a_report_on_clips_without_rare_events_is_refused(tmp_path):
    """One's own clips have no truth: that is said before anything is trained, not behind the last run."""
    for split in ("train", "test", "held-out"):
        (tmp_path / f"{split}.jsonl").write_text('{"video": "a.mp4", "caption": "A man jumps.", "keywords": ["jumps"]}\n')
    settings = report.ReportSettings(data=tmp_path / "train.jsonl", out=tmp_path / "out")
    with pytest.raises(ValueError, match=r'test.jsonl: no clip has "kind": "rare" in its "truth"'):
        report.run_report(settings, Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_a_run_of_the_report_that_fails_ends_it_in_a_line(tmp_path):
    """Which command it was; what is finished is kept."""
    with pytest.raises(ValueError, match=r"^train_sft.py --steps 0: ended as said above"):
        report.run_once(["train_sft.py", "--steps", "0"], tmp_path / "results.json", Console(quiet=True))


def test_static_part_leaves_the_event_out():
    """Its similarity is that of the sentences that name no event."""
    assert score_description(CLIP, f"{STATIC} The blue square turns black.", ALL)["static part"] == 1
    assert score_description(CLIP, f"The red circle fades. {STATIC}", ALL)["static part"] == 1
    assert score_description(CLIP, "The red circle fades.", ALL)["static part"] == 0
    # 5 of 11 reference words, in order, and nothing else: precision 1, recall 5/11
    half = score_description(CLIP, "A red circle and a. It fades.", ALL)["static part"]
    assert half == pytest.approx(2 * (5 / 11) / (1 + 5 / 11))


def test_clips_without_truth_have_no_truth_scores():
    """Real clips get keyword recall and caption similarity only."""
    clip = Clip(Path("a.mp4"), "A man jumps off.", "c:1", keywords=["jumps off", "falls"])
    assert score_description(clip, "He jumps off.", set()).keys() == {"caption similarity", "keyword recall"}
    assert score_description(clip, "He jumps off.", set())["keyword recall"] == 0.5
    assert score_description(clip, "He jumps off.", set(), of_twin=True)["keyword claimed"] == 0.5


SCRIPTS = [
    ("一个男人从墙上跳下来。", "跳下来"), ("男がコーヒーをこぼした。", "コーヒーをこぼした"),
    ("ผู้ชายกระโดดลงจากกำแพง", "กระโดดลง"),
    ("ຜູ້ຊາຍໂດດລົງ", "ໂດດລົງ"), ("បុរសលោតចុះ", "លោតចុះ"), ("အမျိုးသားခုန်ချသည်။", "ခုန်ချ"),
    ("Мужчина прыгает со стены.", "прыгает со стены"), ("رجل يقفز من على الجدار.", "يقفز"),
    ("एक आदमी दीवार से कूदता है।", "कूदता है"), ("한 남자가 벽에서 뛰어내린다.", "뛰어내린다"),
    ("Ένας άντρας πηδάει.", "πηδάει"),
    ("Người đàn ông nhảy.", "nhảy"), ("A man 跳下来 from the wall.", "跳下来"), ("🏃💥🇩🇪", "💥"),
    ("Él saltó el año 3.", "saltó"),
]  # fmt: skip


@pytest.mark.parametrize("caption, keyword", SCRIPTS)
def test_the_caption_itself_scores_one_in_any_script(caption, keyword):
    """Case and the way accents are written (composed, decomposed) do not count."""
    clip = Clip(Path("a.mp4"), caption, "c:1", keywords=[keyword])
    for form in ("NFC", "NFD", "NFKC"):
        for text in (caption, caption.upper()):
            got = score_description(clip, unicodedata.normalize(form, text), set())
            assert got == {"caption similarity": 1, "keyword recall": 1}
    assert score_description(clip, "xyzzy", set()) == {"caption similarity": 0, "keyword recall": 0}
    assert score_description(clip, "", set()) == {"caption similarity": 0, "keyword recall": 0}


@pytest.mark.parametrize(
    "keyword, text, stands",
    [
        ("跳下", "他从墙上跳下来。", True), ("跳下", "他跳起来，下墙。", False), ("कूद", "आदमी कूदता है", False),
        ("आदम", "आदमी", False), ("прыг", "Мужчина прыгает", False), ("caf", "a café", False),
        ("cafe", "a cafe\u0301", False),
        ("cafe\u0301", "a CAFÉ.", True), ("jumps", "jumps_off", True), ("straße", "STRASSE", True),
        ("σοφός", "ΣΟΦΌΣ", True),
        ("ＪＵＭＰＳ", "he jumps", True), ("!", "he jumps!", False), ("", "", False), ("뛰어", "뛰어내린다", False),
    ],
)  # fmt: skip
def test_words_end_where_they_end(keyword, text, stands):
    """A part of a word is no word, its vowel signs and accents belong to it; a script without spaces goes by characters."""
    assert names(keyword, text) == stands


def test_half_of_a_chinese_caption():
    """Four of eight characters, in order: precision 1, recall 1/2."""
    assert similarity("男人从墙上跳下", "男人跳下") == pytest.approx(2 * (4 / 7) / (1 + 4 / 7))


def test_english_similarity_is_that_of_rouge_score(world):
    """Bit for bit, on the world's captions and on ASCII texts with all kinds of marks."""
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    texts = [clip.caption for clip in load_clips(world / "test.jsonl")[0]][:12]
    texts += ["He's jumping_off (twice)!", "Jumped; 3.5 metres.", "RUNNING and falling", "", "..."]
    for a in texts:
        for b in texts:
            assert similarity(a, b) == rouge.score(a, b)["rougeL"].fmeasure


def test_sentences_end_in_any_script():
    """Each event is looked for in the sentence that covers it best."""
    encoded = []

    def encoder(texts):
        encoded.extend(texts)
        return [EmbeddedText([1], torch.ones(1, 2)) for _ in texts]

    assert event_recall(encoder, [["一"]], ["他跑。他跳！真的吗？कूदता है। He runs. 3.5 m"]) == [pytest.approx(1)]
    assert encoded == ["一", "他跑。", "他跳！", "真的吗？", "कूदता है।", "He runs.", "3.5 m"]


def test_evaluation_counts_what_it_says(world, qwen2_5, monkeypatch):
    """Averages over clips, twins made from the truth's span, skipped clips named and in no average."""
    clips, _ = load_clips(world / "test.jsonl")
    clips = [clip for clip in clips if clip.keywords][:5]
    clips[1].video = world / "gone.mp4"
    clips[2].truth = clips[2].truth | {"span": [0.0, 9.0]}  # everything is key: no twin
    lm = videolm.VideoLM(AutoModelForImageTextToText.from_pretrained(qwen2_5))
    processor = AutoProcessor.from_pretrained(qwen2_5)
    said = iter([[c.caption for c in (clips[0], clips[2])], [clips[0].truth["static"]] * 2] * 2)

    def roll_out(examples, *_, **__):
        texts = [text for pair in zip(*(x[: len(examples)] for x in (next(said), next(said)))) for text in pair]
        tokens = processor.tokenizer(texts, padding=True, return_tensors="pt").input_ids.unflatten(0, (-1, 2))
        return Rollouts(tokens, None, None, None), None

    monkeypatch.setattr(lm, "roll_out", roll_out)
    results = evaluate(lm, Preparation(processor), clips, batch_size=2)
    assert (results["clips"], results["with twin"], len(results["skipped"])) == (4, 3, 1)
    assert "gone.mp4" in results["skipped"][0]
    rows = results["rows"]
    assert rows[0]["scores"]["event named"] == 1 and rows[0]["twin scores"]["event named"] == 0
    mean = sum(r["scores"]["keyword recall"] for r in rows) / 4
    assert results["full"]["keyword recall"] == pytest.approx(mean)
    paired = [r for r in rows if "twin scores" in r]
    gap = sum(r["scores"]["keyword recall"] - r["twin scores"]["keyword recall"] for r in paired) / 3
    assert results["gap"]["keyword recall"] == pytest.approx(gap)
    assert "| m | 4 |" in markdown_row(results, "m")


def test_a_clip_that_cannot_be_described_ends_no_evaluation(world, qwen2_5, monkeypatch):
    """Memory runs out for one clip in a batch: the others have the scores of an evaluation without it."""
    clips, _ = load_clips(world / "test.jsonl")
    clips, lm = clips[:4], videolm.VideoLM(AutoModelForImageTextToText.from_pretrained(qwen2_5))
    preparation, real = Preparation(AutoProcessor.from_pretrained(qwen2_5), 4), lm.roll_out
    want = evaluate(lm, preparation, [clips[0], clips[2], clips[3]], batch_size=1, max_new_tokens=4)

    def roll_out(examples, *more, **named):
        if any(e.name == clips[1].where for e in examples):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(examples, *more, **named)

    monkeypatch.setattr(lm, "roll_out", roll_out)
    clips[2].caption += " <|video_pad|><|im_end|>" * 3000  # a caption that no model reads
    got = evaluate(lm, preparation, clips, batch_size=2, max_new_tokens=4)
    assert [r["description"] for r in got["rows"]] == [r["description"] for r in want["rows"]] and got["clips"] == 3
    assert len(got["skipped"]) == 1 and clips[1].where in got["skipped"][0] and "not enough memory" in got["skipped"][0]
    monkeypatch.setattr(lm, "roll_out", lambda *_, **__: 1 / 0)
    none = evaluate(lm, preparation, clips, batch_size=2)
    assert none["clips"] == 0 and len(none["skipped"]) == 4 and none["full"] == {}


def test_prompt_and_answer_of_describe_are_text(world, qwen2_5, tmp_path, monkeypatch):
    """A prompt with special tokens asks about one video, and an answer that looks like markup is printed as it is."""
    from rich.console import Console

    clips, _ = load_clips(world / "test.jsonl")
    console, asked = Console(file=(tmp_path / "out").open("w+"), width=200), []
    real = videolm.VideoLM.describe

    def describe(self, examples, **more):
        asked.extend(examples)
        rollouts = real(self, examples, **more)
        rollouts.tokens = torch.tensor([[AutoProcessor.from_pretrained(qwen2_5).tokenizer("[/red] [bold]").input_ids]])
        return rollouts

    monkeypatch.setattr(videolm.VideoLM, "describe", describe)
    settings = evaluation.DescribeSettings(clips[0].video, str(qwen2_5), "<|video_pad|> What?<|im_end|>", 3)
    evaluation.run_describe(settings, console)
    console.file.seek(0)
    assert "[/red] [bold]" in console.file.read() and int((asked[0].token_types == 2).sum()) == 32
    assert "<|video_pad|> What?<|im_end|>" in AutoProcessor.from_pretrained(qwen2_5).decode(asked[0].input_ids)


def test_describe_one_file(world, qwen2_5, tmp_path):
    """`describe` prints the sampled timestamps and a text, the same as greedy evaluation gives."""
    from rich.console import Console

    clips, _ = load_clips(world / "test.jsonl")
    console = Console(file=(tmp_path / "out").open("w+"), width=200)
    text = evaluation.run_describe(evaluation.DescribeSettings(clips[0].video, str(qwen2_5), max_new_tokens=5), console)
    console.file.seek(0)
    shown = console.file.read()
    assert "frames at 0.00 0.12 0.25" in shown and text in shown
    lm, processor = load_model(str(qwen2_5))
    torch.testing.assert_close(lm.heads.log_temperature.exp().item(), 0.1, rtol=1e-4, atol=1e-4)
    rows = evaluate(lm, Preparation(processor), clips[:1], max_new_tokens=5)["rows"]
    assert rows[0]["description"] == text


def test_cost_of_a_step_compares_equal_work(qwen2_5):
    """What `eval.py cost --what stage-1` times: a plain loop over both videos and ours give one loss and one gradient."""
    lm, hf, _ = cost.load_both(str(qwen2_5))
    visual, language = hf.model.visual, hf.model.language_model.config._attn_implementation
    assert type(visual.patch_embed).__module__.startswith("transformers.")  # nothing of the rival is ours
    assert type(visual.patch_embed).forward.__module__.startswith("transformers.")
    assert "chunked" not in visual.config._attn_implementation and "by_mask" not in language
    assert all(torch.equal(a, b) for a, b in zip(lm.hf.state_dict().values(), hf.state_dict().values()))
    plain, ours = (job() for job in cost.step_jobs(cost.CostSettings("stage-1", str(qwen2_5), 64, 5)).values())
    assert plain[0] > 0 and plain[1:].abs().max() > 0
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-4)


def test_report_event_by_event(tmp_path):
    """Rare events by what happens, claims by the floor's usual event, over all seeds; an event that never was rare has no
    share."""
    truths = [
        {"kind": "rare", "usual": "fades", "action": "swells up"},
        {"kind": "usual", "usual": "swells up", "action": "swells up"},
        {"kind": "rare", "usual": "fades", "action": "swells up"},
        {"kind": "quiet", "usual": "fades"},
    ]
    lines = [json.dumps({"truth": truth}) for truth in truths]
    (tmp_path / "test.jsonl").write_text("\n".join(["", *lines]))  # an empty line counts as a line, and is no clip
    said = {0: [(1.0, 1.0), (None, 0.0), (0.0, 1.0)], 1: [(1.0, 0.0), (None, 0.0), (0.0, 1.0)]}  # rare named, claimed
    for seed, texts in said.items():
        rows = [
            {"scores": {"rare event named": named}, "twin scores": {"event claimed": claimed}} for named, claimed in texts
        ] + [{"scores": {"event claimed": 1.0}}]  # a quiet clip has no twin
        rows = [{"index": i, "clip": f"{tmp_path}/test.jsonl:{i + 2}"} | row for i, row in enumerate(rows)]
        (tmp_path / str(seed)).mkdir()
        (tmp_path / f"{seed}/results.json").write_text(json.dumps({"rows": rows[::-1]}))
    head, _, row = event_table({"some": {seed: tmp_path / str(seed) for seed in said}})
    assert head.endswith("| fades | swells up |") and row == "| some | -; 0.75 | 0.50; 0.00 |"
