"""Stage 2 as a person runs it, small: what it writes, that it is reproducible, and that nothing odd breaks it."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import train_rl
from data.run.settings import parse_settings
from data.tiny import build_tiny
from tests.commands import HERE, run

FAST = ["--steps", "3", "--batch-size", "4", "--micro-batch-size", "2", "--log-every", "1", "--num-rollouts", "4",
        "--num-twin-rollouts", "3", "--max-new-tokens", "6", "--workers", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def data(world, qwen2_5) -> list:
    """Arguments: tiny model with random weights, and the small world."""
    return ["--model", qwen2_5, "--data", world / "train.jsonl"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, world, data) -> Path:
    """A run of three steps."""
    out = tmp_path_factory.mktemp("run") / "rl"
    more = ["--eval-data", world / "test.jsonl", "--out", out, "--show-every", 2]
    run(HERE / "train_rl.py", *FAST, *data, *more, cwd=tmp_path_factory.mktemp("elsewhere"))
    return out


def steps(folder: Path) -> list[dict]:
    """The metric lines of a run's steps, without those of evaluations."""
    return [x for x in map(json.loads, (folder / "metrics.jsonl").open()) if "reward/quality" in x]


def test_it_writes_what_it_promises(trained):
    """Every metric of the issue at every step, evaluations before and after, curves, page, results, plain checkpoint."""
    lines = steps(trained)
    assert [x["step"] for x in lines] == [1, 2, 3]
    names = ["reward/quality", "reward/keyword_recall", "reward/twin_quality", "reward/twin_keyword_recall", "reward/gap",
             "reward/beaten_twins", "rollout/no_spread", "policy/clipped", "policy/entropy", "rollout/length",
             "perf/tokens_per_second", "perf/vision_seconds", "perf/prefill_seconds", "perf/decode_seconds",
             "perf/reward_seconds", "perf/update_seconds"]  # fmt: skip
    for line in lines:
        assert set(names) <= set(line) and all(math.isfinite(line[n]) for n in names)
        # The gap is over the clips that have a twin, and one of these may have none.
        gap = line["reward/keyword_recall"] - line["reward/twin_keyword_recall"]
        assert line["reward/gap"] == pytest.approx(gap, abs=0.02)
    evaluated = [json.loads(x)["step"] for x in (trained / "metrics.jsonl").open() if "eval/full" in x]
    assert evaluated == [0, 3]
    for name in ("curves.png", "settings.json", "results.json", "rollouts.html"):
        assert (trained / name).stat().st_size > 0
    AutoModelForImageTextToText.from_pretrained(trained / "checkpoint")
    AutoProcessor.from_pretrained(trained / "checkpoint")


def test_the_page_shows_both_sides(trained):
    """Every rollout of a shown prompt stands in the page, steps newest first, and it asks for nothing from outside."""
    page = (trained / "rollouts.html").read_text()
    assert [int(x) for x in re.findall(r"<h2>step (\d+)", page)] == [3, 2]
    assert page.count("<table>") == page.count("</table>") >= 2
    assert "http" not in page and "<script" not in page


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a run."""
    return load_file(folder / "checkpoint/model.safetensors")


def test_same_seed_same_weights_and_micro_batches(tmp_path, data):
    """One seed, the same bits; another seed, others; micro-batches and the order of their sums change next to nothing."""

    def train(name: str, *more):
        run(HERE / "train_rl.py", *FAST, *data, "--out", tmp_path / name, *more, cwd=tmp_path)
        return weights(tmp_path / name)

    a, b, c = train("a"), train("b"), train("c", "--seed", 1)
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)
    d = train("d", "--micro-batch-size", 4)
    for k in a:
        torch.testing.assert_close(a[k], d[k], rtol=1e-3, atol=2e-4)
    # AdamW hides a wrong scale from the weights, but the loss of the whole batch shows it
    for x, y in zip(steps(tmp_path / "a"), steps(tmp_path / "d")):
        assert x["policy/loss"] == pytest.approx(y["policy/loss"], rel=1e-2, abs=1e-5) and x["policy/loss"] != 0


@pytest.mark.parametrize(
    "more",
    [
        ["--freeze-vision", "--reward", "similarity", "--num-twin-rollouts", 0, "--no-twin-branch"],
        ["--epochs", 2, "--beta", 0.1, "--divide-by-spread", "--loss-level", "sequence", "--reward", "pooled"],
        ["--freeze-vision", "--lora-rank", 4, "--learning-rate", 1e-2, "--reward", "recall"],
        ["--hard-prompts", 3, "--max-new-tokens", 3],
    ],
)
def test_every_setting_trains(tmp_path, data, more):
    """Each setting trains: finite metrics, changed weights; the vision encoder moves unless it is frozen."""
    run(HERE / "train_rl.py", *FAST, *data, "--out", tmp_path / "o", *more, cwd=tmp_path)
    lines = steps(tmp_path / "o")
    assert len(lines) == 3 and all(math.isfinite(v) for line in lines for v in line.values())
    assert all(("policy/kl" in line) == ("--beta" in more) for line in lines)
    before, after = load_file(Path(data[1]) / "model.safetensors"), weights(tmp_path / "o")
    moved = {k for k in after if k in before and not torch.equal(before[k], after[k])}
    assert moved and any("visual" in k for k in moved) == ("--freeze-vision" not in more)


def test_linear_attention_falls_back_and_says_so(tmp_path, data):
    """A family that cannot share its prefix trains all the same, with a printed line."""
    model = build_tiny(tmp_path / "qwen3_5", "qwen3_5")
    done = run(HERE / "train_rl.py", *FAST, *data, "--model", model, "--steps", 1, "--out", tmp_path / "o", cwd=tmp_path)
    assert "prefix is repeated for every rollout" in done.stdout and len(steps(tmp_path / "o")) == 1


def test_equal_rewards_change_nothing(tmp_path, data, world):
    """Captions of words that the encoder does not know: rewards 0, every group skipped and counted."""
    lines = [json.loads(x) | {"caption": "!!!", "keywords": ["???"]} for x in (world / "train.jsonl").open()]
    odd = world / "odd.jsonl"
    odd.write_text("".join(json.dumps(x) + "\n" for x in lines))
    run(HERE / "train_rl.py", *FAST, "--model", data[1], "--data", odd, "--out", tmp_path / "o", cwd=tmp_path)
    for line in steps(tmp_path / "o"):
        assert line["rollout/no_spread"] == 1 and line["reward/total"] == 0 and "policy/loss" not in line
    before, after = load_file(Path(data[1]) / "model.safetensors"), weights(tmp_path / "o")
    assert all(torch.equal(before[k], after[k]) for k in after if k in before)


def test_clips_without_a_twin_train_on_quality(tmp_path, data, world):
    """No keyword, no twin, no comparison: the run goes on with caption similarity alone."""
    lines = [json.loads(x) | {"keywords": []} for x in (world / "train.jsonl").open()]
    bare = world / "bare.jsonl"
    bare.write_text("".join(json.dumps(x) + "\n" for x in lines))
    run(HERE / "train_rl.py", *FAST, "--model", data[1], "--data", bare, "--out", tmp_path / "o", cwd=tmp_path)
    for line in steps(tmp_path / "o"):
        assert line["reward/beaten_twins"] == 0 and line["reward/total"] == pytest.approx(line["reward/quality"], abs=1e-5)
        assert "reward/twin_quality" not in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "run `python train_sft.py` first"),
        (["--num-rollouts", "1"], "--num-rollouts: got 1"),
        (["--num-twin-rollouts", "0"], "--reward relative compares"),
        (["--temperature", "0"], "--temperature: got 0"),
        (["--model", "none/here", "--data", "none.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_bad_settings_are_named(tmp_path, monkeypatch, arguments, message):
    """The field, its value, what to do."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        train_rl.main(parse_settings(train_rl.Settings, "", arguments))


def test_missing_files_are_named_and_the_run_goes_on(tmp_path, world, qwen2_5):
    """Lost clips are skipped and listed; too many end the run, with what was learned saved."""
    lines = (world / "train.jsonl").read_text().splitlines()[:24]
    bad = world / "bad.jsonl"
    bad.write_text("\n".join(x.replace(".mp4", "-gone.mp4") if i % 4 == 3 else x for i, x in enumerate(lines)))
    command = [HERE / "train_rl.py", *FAST, "--model", qwen2_5, "--data", bad, "--out", tmp_path / "o"]
    done = run(*command, "--max-bad-share", 0.5, "--steps", 6, cwd=tmp_path)
    assert "-gone.mp4" in done.stdout and steps(tmp_path / "o")[-1]["data/skipped"] > 0
    done = run(*command, "--max-bad-share", 0.2, "--steps", 50, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "-gone.mp4" in done.stderr and (tmp_path / "o/checkpoint").exists()
