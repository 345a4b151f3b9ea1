"""Every script as a person runs it, small; and every command of the README is one that the scripts accept."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import eval as evaluation
import train_rl
import train_sft
from data.files import ClipError
from data.run.settings import parse_settings
from tests.commands import HERE, Command, run
from tests.test_clips import write_video

FAST = ["--steps", "3", "--batch-size", "4", "--micro-batch-size", "2", "--log-every", "1", "--sheets", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, world, qwen2_5) -> Path:
    """A run of three steps."""
    out = tmp_path_factory.mktemp("run") / "sft"
    data = ["--model", qwen2_5, "--data", world / "train.jsonl", "--eval-data", world / "test.jsonl"]
    data += ["--max-frames", 8]  # half of the default: eval.py must take it from the run
    run(HERE / "train_sft.py", *FAST, *data, "--out", out, cwd=tmp_path_factory.mktemp("elsewhere"))
    return out


def test_training_writes_what_it_promises(trained):
    """Metrics of every step, curves, a sheet, results, and a checkpoint with heads."""
    lines = [json.loads(x) for x in (trained / "metrics.jsonl").open()]
    steps = [x for x in lines if "loss/lm" in x]
    assert [x["step"] for x in steps] == [1, 2, 3]
    for key in ("loss/contrastive", "contrastive/positives", "contrastive/negatives", "contrastive/temperature"):
        assert all(x[key] > 0 for x in steps)
    assert any("eval/full event named" in x for x in lines)
    for name in ("curves.png", "settings.json", "results.json", "checkpoint/heads.safetensors"):
        assert (trained / name).stat().st_size > 0
    assert list(trained.glob("sheet-*.png"))
    heads = load_file(trained / "checkpoint/heads.safetensors")
    assert set(heads) == {"visual.weight", "text.weight", "log_temperature"}


def test_eval_and_describe(trained, world):
    """The two commands of eval.py on the run's folder."""
    shown = run(HERE / "eval.py", "--model", trained, "--data", world / "test.jsonl", "--limit", 6, cwd=trained).stdout
    assert "perception gap" in shown and "6 clips, 6 with a twin" in " ".join(shown.split())
    results = json.loads((trained / "results.json").read_text())
    assert results["clips"] == 6 and len(results["rows"]) == 6
    assert (trained / "row.md").read_text().startswith("| model | clips |")
    shown = run(HERE / "eval.py", "describe", world / "test/000/000000.mp4", "--model", trained, cwd=trained).stdout
    assert "frames at 0.12 0.38" in shown  # eight frames, as in the run


def test_same_seed_same_weights(tmp_path, world, qwen2_5):
    """Two runs with one seed end bit for bit equal; another seed does not; micro-batches only regroup negatives."""

    def weights(name: str, *more):
        data = ["--model", qwen2_5, "--data", world / "train.jsonl", "--workers", 0]
        run(HERE / "train_sft.py", *FAST, *data, "--out", tmp_path / name, *more, cwd=tmp_path)
        return load_file(tmp_path / name / "checkpoint/model.safetensors")

    a, b = weights("a"), weights("b")
    assert all(torch.equal(a[k], b[k]) for k in a)
    c = weights("c", "--seed", 1)
    assert any(not torch.equal(a[k], c[k]) for k in a)
    # the caption loss is a mean over the whole batch, so accumulation changes nothing
    d = weights("d", "--contrastive-weight", 0)
    e = weights("e", "--contrastive-weight", 0, "--micro-batch-size", 4)
    for k in d:
        torch.testing.assert_close(d[k], e[k], rtol=1e-3, atol=2e-4)
    assert not (tmp_path / "d/checkpoint/heads.safetensors").exists()
    lines = [json.loads(x) for x in (tmp_path / "d/metrics.jsonl").open()]
    assert not any("loss/contrastive" in x for x in lines)


def test_bad_clips_are_named_and_too_many_stop_the_run(tmp_path, world, qwen2_5):
    """A bad line and a missing file are printed and trained around; beyond the share the run ends with the list."""
    lines = (world / "train.jsonl").read_text().splitlines()[:12]
    lines = [x.replace('"train/', f'"{world.name}/train/') for x in lines]
    lines[2] = lines[2].replace("000002.mp4", "gone.mp4")
    lines[4] = "{"
    data = world.parent / f"{tmp_path.name}.jsonl"
    data.write_text("\n".join(lines))
    command = [
        HERE / "train_sft.py",
        *FAST,
        "--model",
        qwen2_5,
        "--data",
        data,
        "--out",
        tmp_path / "o",
        "--workers",
        0,
    ]
    done = run(*command, "--max-bad-share", 0.2, "--steps", 6, cwd=tmp_path)
    assert f"{data}:5: not JSON" in done.stdout and f"{data}:3:" in done.stdout and "gone.mp4" in done.stdout
    assert (tmp_path / "o/checkpoint/model.safetensors").exists()
    done = run(*command, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "max-bad-share" in done.stderr and "Traceback" not in done.stderr
    # a run that loses too many clips on the way ends with the list, and keeps what it has learned
    lines = (world / "train.jsonl").read_text().replace('"train/', f'"{world.name}/train/').splitlines()[:24]
    data.write_text("\n".join(lines[:12] + [x.replace(".mp4", "-gone.mp4") for x in lines[12:]]))
    command[-3] = tmp_path / "late"
    done = run(*command, "--max-bad-share", 0.3, "--steps", 20, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "-gone.mp4" in done.stderr and "more than the allowed share" in done.stderr
    assert (tmp_path / "late/checkpoint/model.safetensors").exists()


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        (train_sft, ["--steps", "0"], "--steps: got 0"),
        (train_sft, ["--batch-size", "5", "--micro-batch-size", "2"], "not a multiple"),
        (train_sft, ["--contrastive-weight", "-1"], "--contrastive-weight: got -1"),
        (train_sft, ["--contrastive-weight", "nan"], "--contrastive-weight: got nan; give 0 or more"),
        (train_sft, ["--temperature", "0"], "--temperature: got 0.0; give 0.01 to 1"),
        (train_sft, ["--decay", "1.5"], "--decay: got 1.5; give 0 to 1"),
        (train_sft, ["--weight-decay", "-0.1"], "--weight-decay: got -0.1"),
        (train_sft, ["--max-bad-share", "2"], "--max-bad-share: got 2.0"),
        (train_sft, ["--grad-clip", "0"], "--grad-clip: got 0.0; give a number above 0"),
        (train_sft, ["--seed", "-1"], "--seed: got -1; give 0 to 4294967295"),
        (train_sft, ["--workers", "-1"], "--workers: got -1"),
        (train_sft, ["--world-clips", "0"], "--world-clips: got 0"),
        (train_sft, ["--eval-clips", "0"], "--eval-clips: got 0; give a number above 0, or -1 for all"),
        (train_sft, ["--warmup", "1.5"], "--warmup: got 1.5"),
        (train_sft, ["--max-frames", "2"], "a twin needs two slots"),
        (train_rl, ["--temperature", "0"], "--temperature: got 0.0; give a number above 0"),
        (train_rl, ["--clip-low", "1.5"], "--clip-low: got 1.5; give 0 to 1"),
        (train_rl, ["--beta", "inf"], "--beta: got inf; give 0 or more"),
        (train_rl, ["--seed", "4294967296"], "--seed: got 4294967296"),
        (train_rl, ["--num-rollouts", "1"], "a group needs 2"),
    ],
)
def test_bad_settings_are_named(script, arguments, message):
    """The field, its value, what to do."""
    given = ["--data", "none.jsonl", "--model", "none", *arguments]  # nothing is made on the spot
    with pytest.raises(ValueError, match=re.escape(message)):
        script.resolve(parse_settings(script.Settings, "", given))


@pytest.mark.parametrize("script, split, more", [(train_sft, "train", {}), (train_rl, "prompts", {"text_encoder": "none"})])
def test_each_stage_draws_clips_of_its_own(tmp_path, monkeypatch, script, split, more):
    """Without --data: stage 2 describes what stage 1 has not seen; both are tested on the same."""
    asked = []
    monkeypatch.setattr(script, "embedded_world", lambda *about: asked.append(about) or tmp_path)
    s = script.resolve(script.Settings(model="none", world_clips=7, **more))
    assert asked == [(split, 7)]
    assert (s.data, s.eval_data) == (tmp_path / f"{split}.jsonl", tmp_path / "test.jsonl")


def test_data_that_are_not_there_are_named(tmp_path):
    """Before the model is looked for."""
    with pytest.raises(ClipError, match=r"none.jsonl: no such file"):
        train_sft.main(train_sft.Settings(model="nowhere/none", data=Path("none.jsonl"), out=tmp_path / "o"))


@pytest.mark.parametrize("script", [train_sft, train_rl])
def test_a_model_that_is_not_there_is_named(tmp_path, world, script):
    """The setting and its value stand before what the library says."""
    with pytest.raises(ValueError, match=r"^--model nowhere/none: "):
        script.main(script.Settings(model="nowhere/none", data=world / "train.jsonl", out=tmp_path / "o"))


@pytest.mark.parametrize("script", ["train_sft", "train_rl"])
def test_errors_are_one_line(tmp_path, script):
    """No traceback, and exit code 1: all of them pass through the same line of the script."""
    done = run(HERE / f"{script}.py", "--steps", 0, check=False, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == "error: --steps: got 0; give a number above 0\n"


@pytest.mark.parametrize("script", ["train_sft", "train_rl", "eval"])
def test_ctrl_c_during_the_imports(script, tmp_path):
    """One word, no traceback: `data`, which sees to it, is the first import that takes its time."""
    imported = []
    for node in ast.parse((HERE / f"{script}.py").read_text()).body:
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported.append(node.module)
    slow = [name for name in imported if name.split(".")[0] not in sys.stdlib_module_names]
    assert slow[0] == "data"
    env = os.environ | {"PYTHONPATH": str(HERE)}
    command = [sys.executable, "-c", "import data; raise KeyboardInterrupt"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stderr == "stopped\n"


@pytest.mark.parametrize("script", ["train_sft", "train_rl"])
def test_sigterm_saves_and_ends_well(tmp_path, world, qwen2_5, script):
    """A polite kill ends the run after the step with a checkpoint and exit code 0."""
    data = ["--model", qwen2_5, "--data", world / "train.jsonl", "--out", "o", "--workers", 0, "--steps", 100_000]
    if script == "train_rl":
        data += ["--num-rollouts", 2, "--num-twin-rollouts", 2, "--max-new-tokens", 4]
    small = ["--batch-size", 2, "--micro-batch-size", 2, "--log-every", 1]
    command = Command(HERE / f"{script}.py", *data, *small, cwd=tmp_path)
    command.wait_for("step ")
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait().returncode == 0
    assert (tmp_path / "o/checkpoint/model.safetensors").exists()


def test_readme_names_every_make_target():
    """make demo and make test are in the README, and in the Makefile."""
    readme, makefile = (HERE / "README.md").read_text(), (HERE / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in readme and f"\n{target}:" in makefile


@pytest.fixture
def odd_clips(world, tmp_path) -> Path:
    """Twelve good lines and what people have beside them, each of which must cost itself at most."""
    good = [json.loads(x) for x in (world / "train.jsonl").read_text().splitlines()[:12]]
    for name in ("v" * 248 + ".mp4", "a [bold] 🙂.mp4"):
        shutil.copy(world / good[0]["video"], tmp_path / name)
    write_video(tmp_path / "strip.mp4", size=(16, 4096))
    lines = [x | {"video": str(world / x["video"])} for x in good]
    part = {name: good[0][name] for name in ("caption", "keywords")}
    half = part | {"video": f"{tmp_path}/a [bold] 🙂.mp4", "caption": "A man pays $5 in $\\frac{."}
    long, marked = "The red circle fades. " * 1000, "A man <|video_pad|> jumps off.<|im_end|> [/] He runs."
    lines[:0] = [half | {"end": 1}, half | {"start": 1}, part | {"video": str(tmp_path / ("v" * 248 + ".mp4"))}]
    lines += [part | {"video": str(tmp_path / "strip.mp4")}]
    lines += [lines[3] | {"caption": caption, "truth": None} for caption in (long, marked)]
    texts = [json.dumps(x) for x in lines]
    texts += [r'{"video": "a.mp4", "caption": "\ud83d"}', '{"video": "a.mp4", "caption": "x", "start": ' + "9" * 400 + "}"]
    (tmp_path / "odd.jsonl").write_text("\n".join(texts) + "\n")
    return tmp_path / "odd.jsonl"


def test_odd_clips_end_no_run(odd_clips, qwen2_5, tmp_path, capsys, monkeypatch):
    """Stage 1 with an evaluation in the middle, stage 2, and eval.py: each odd clip is named, nothing else is lost."""
    monkeypatch.setenv("COLUMNS", "400")
    data = dict(data=odd_clips, root=Path("/"), workers=0, max_bad_share=0.5)
    more = dict(eval_data=odd_clips, batch_size=6, micro_batch_size=3, log_every=1) | data
    settings = train_sft.Settings(model=str(qwen2_5), out=tmp_path / "sft", steps=4, eval_every=2, sheets=3, **more)
    results = train_sft.main(settings)
    shown = capsys.readouterr().out
    # the strip is refused by the processor; the long caption is not read where the model only describes
    assert results["clips"] == 17 and [x for x in results["skipped"] if "strip.mp4" in x] == results["skipped"]
    assert f"{odd_clips}:17: " in shown and "field 'caption': prompt and caption have more than" in shown
    assert "lone surrogate" in shown and f"{odd_clips}:20: field 'start'" in shown and "aspect ratio" in shown
    sheets = ["sheet-000-a-bold.png", "sheet-001-a-bold.png", f"sheet-002-{'v' * 40}.png"]
    assert sorted(p.name for p in (tmp_path / "sft").glob("sheet*")) == sheets
    few = dict(steps=2, max_new_tokens=4, num_rollouts=2, num_twin_rollouts=2, eval_before=False)
    settings = train_rl.Settings(model=str(tmp_path / "sft"), out=tmp_path / "rl", **few, **more)
    assert train_rl.main(settings)["clips"] == 17 and (tmp_path / "rl/rollouts.html").exists()
    limits = dict(max_text_tokens=20, limit=2, max_new_tokens=2, workers=0)
    with pytest.raises(ClipError, match=r"no clip could be described(?s:.*)the prompt has more than 3 tokens"):
        evaluation.run_evaluation(
            evaluation.EvalSettings(
                str(qwen2_5), odd_clips, Path("/"), tmp_path / "none", **limits | {"max_text_tokens": 3}
            ),
            Console(),
        )
    settings = evaluation.EvalSettings(str(qwen2_5), odd_clips, Path("/"), tmp_path / "eval", **limits)
    assert evaluation.run_evaluation(settings, Console())["clips"] == 2
