"""Which clips stage 2 describes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import train_rl
from data.clips import load_clips
from data.run import hard_prompts
from tests.commands import HERE, run
from tests.test_processes import launch
from tests.test_train_rl import FAST


@pytest.fixture(scope="module")
def data(world, qwen2_5):
    """Twelve clips; a keyword of the sixth is not in the world, the ninth cannot be read."""
    path = world / "hard-prompts.jsonl"
    lines = [json.loads(line) for line in (world / "train.jsonl").open()][:12]
    lines[5] |= {"caption": "Zzyzx. Qwyjibo! Zzyzx zzyzx zzyzx zzyzx zzyzx zzyzx.", "keywords": ["Qwyjibo"]}
    broken = world / "broken.mp4"
    broken.write_bytes(b"no video")
    lines[8] |= {"video": "broken.mp4"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--model", qwen2_5, "--data", path, "--max-bad-share", 0.5]


def test_hard_ones_and_others_are_described(tmp_path, data):
    """The clip whose caption has unknown words is among the hard ones; what cannot be read is named and never chosen; a run
    that is resumed describes the clips that it began with, and says so if it cannot know them."""
    more = [HERE / "train_rl.py", *FAST, *data, "--hard-prompts", 2, "--save-every", 1]
    done = run(*more, "--out", tmp_path / "whole", cwd=tmp_path)
    assert "described, of 12 clips: 2 whose captions" in done.stdout and "and 2 others" in done.stdout
    assert "hard-prompts.jsonl:9:" in done.stdout
    kept = json.loads((tmp_path / "whole/prompts.json").read_text())
    chosen, likely = kept["clips"], kept["caption log-probabilities"]
    assert len(set(chosen)) == 4 and chosen == sorted(chosen) and 8 not in chosen
    assert min(zip(likely, chosen))[1] == 5
    # After a kill: the choice is read, not made again by a model that has learned since.
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part, symlinks=True)
    shutil.rmtree(part / "checkpoint-000003")
    run(*more, "--out", part, "--resume", cwd=tmp_path)
    a, b = (load_file(out / "checkpoint/model.safetensors") for out in (tmp_path / "whole", part))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert json.loads((part / "prompts.json").read_text()) == kept
    shutil.rmtree(part / "checkpoint-000003")
    (part / "prompts.json").unlink()
    failed = run(*more, "--out", part, "--resume", cwd=tmp_path, check=False)
    assert failed.returncode == 1 and "prompts.json" in failed.stderr


@pytest.mark.parametrize("more", [[], ["--shard"]])
def test_processes_choose_together(tmp_path, data, more):
    """Two processes, each of which has asked the model about half of the clips, describe what one alone would."""
    small = [*FAST, *data, "--steps", 1, "--hard-prompts", 2, "--eval-every", -1]
    launch("train_rl", 1, [*small, "--out", "one"], tmp_path)
    launch("train_rl", 2, [*small, *more, "--micro-batch-size", 1, "--out", "two"], tmp_path)
    one, two = (json.loads((tmp_path / name / "prompts.json").read_text()) for name in ("one", "two"))
    assert one["clips"] == two["clips"]
    assert two["caption log-probabilities"] == pytest.approx(one["caption log-probabilities"], rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_hardest_are_all_there(seed):
    """The lowest numbers, and of the others every one now and then; the same seed, the same clips."""
    likely = {index: -float(x) for index, x in enumerate(torch.rand(20, generator=torch.manual_seed(seed)))}
    lowest = set(sorted(likely, key=likely.get)[:4])
    drawn = [hard_prompts.hardest_and_others(likely, 4, s) for s in range(60)]
    assert all(lowest < set(found) and len(found) == len(set(found)) == 8 for found in drawn)
    assert set().union(*drawn) == set(likely)
    assert hard_prompts.hardest_and_others(dict(reversed(likely.items())), 4, 7) == drawn[7]


def test_all_clips_where_there_are_no_more(world):
    """No model is asked."""
    clips, _ = load_clips(world / "train.jsonl")
    for number in (0, 24, 100):
        assert hard_prompts.choose_prompts(None, None, None, clips, number) == clips


def test_a_number_below_zero_is_named():
    """In words, with the flag."""
    with pytest.raises(ValueError, match="--hard-prompts: got -1"):
        train_rl.resolve(train_rl.Settings(model="x", data="y", hard_prompts=-1))
