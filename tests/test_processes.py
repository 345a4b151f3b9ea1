"""Two processes on a CPU (gloo) against one: the same losses, with whole and with sharded weights, in both scripts."""

import json
import shutil
import socket
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.clips import load_clips
from data.examples import Preparation
from data.loader import ClipLoader
from tests.commands import HERE, Command

SMALL = {
    "train_sft": ["--batch-size", 4, "--micro-batch-size", 2, "--sheets", 0],
    "train_rl": ["--batch-size", 4, "--micro-batch-size", 1, "--beta", 0.1, "--num-rollouts", 4, "--num-twin-rollouts", 2,
                 "--max-new-tokens", 5, "--hard-prompts", 0],
}  # fmt: skip


# The scripts take clips 3 2 0 5, 4 7 13 10, 11 6 9 12, 8 1 7 4. Stage 1: two steps without a keyword, one with, and one in
# which the second of two processes has none. Stage 2: two steps in which every description is as bad as any other.
KEYWORDS_AT = (6, 9, 8, 1)
BEYOND_WORDS = (3, 2, 0, 5, 4, 7, 13, 10)


def launch(script: str, num: int, arguments: list, cwd: Path) -> None:
    """Run a script in so many processes, with the environment that `torchrun` gives them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(num):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num, "OMP_NUM_THREADS": 1}
        env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        env = {name: str(value) for name, value in env.items()} if num > 1 else {}
        started.append(Command(HERE / f"{script}.py", *arguments, cwd=cwd, env=env))
    for done in [command.wait() for command in started]:
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SMALL)
def test_two_processes_equal_one(tmp_path, world, qwen2_5, script):
    """Losses and gradient norms within 1e-5 at every step, evaluation the same, with and without sharding; a sharded run
    is resumed; one line of metrics a step."""
    data = world / f"processes-{script}.jsonl"
    lines = [json.loads(x) for x in (world / "train.jsonl").read_text().splitlines()[:14]]  # a bit more than an epoch
    if script == "train_sft":
        lines = [x | ({} if i in KEYWORDS_AT else {"keywords": []}) for i, x in enumerate(lines)]
    else:
        beyond = {"caption": "Zzyzx. Qwyjibo!", "keywords": ["Qwyjibo"]}
        lines = [x | (beyond if i in BEYOND_WORDS else {}) for i, x in enumerate(lines)]
    data.write_text("\n".join(map(json.dumps, lines)))
    small = ["--model", qwen2_5, "--data", data, "--eval-data", world / "test.jsonl", "--workers", 0, "--log-every", 1]
    small += ["--steps", 4, "--save-every", 2, *SMALL[script]]
    runs = {"one": (1, []), "two": (2, []), "sharded": (2, ["--shard"])}
    for name, (num, more) in runs.items():
        launch(script, num, [*small, *more, "--out", name], tmp_path)
    shutil.rmtree(tmp_path / "sharded/checkpoint-000004")
    launch(script, 2, [*small, "--shard", "--out", "sharded", "--resume"], tmp_path)
    lines = {name: [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").open()] for name in runs}
    idle = ["policy/loss" not in x and not x.get("loss/contrastive") for x in lines["one"][1:5]]
    assert idle == [True, True, False, False]  # steps in which nothing, or no keyword, is to be learned
    watched = ("loss/lm", "loss/contrastive", "policy/loss", "grad_norm", "policy/grad_norm", "reward/total",
               "rollout/length", "eval/full caption similarity")  # fmt: skip
    for name in ("two", "sharded"):
        assert [x["step"] for x in lines[name]] == [x["step"] for x in lines["one"]]
        for x, y in zip(lines["one"], lines[name]):
            assert set(watched) & set(x) == set(watched) & set(y)
            for key in set(watched) & set(x):
                assert y[key] == pytest.approx(x[key], rel=1e-5, abs=1e-5), (name, x["step"], key)
        a, b = (load_file(tmp_path / n / "checkpoint/model.safetensors") for n in ("one", name))
        for k in a:
            torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=2e-4)
        results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", name)]
        assert results[0]["clips"] == results[1]["clips"] == 24
        assert [r["clip"] for r in results[0]["rows"]] == [r["clip"] for r in results[1]["rows"]]


@pytest.mark.parametrize("block", [1, 2])
def test_processes_share_the_clips_without_repeats(world, qwen2_5, block):
    """Of the one order each takes its blocks: together every clip once an epoch, as a single process sees them."""
    clips, _ = load_clips(world / "train.jsonl")
    clips = clips[:10]

    class Name:
        """In place of an example: nothing is decoded."""

    def order(rank: int, size: int) -> list[int]:
        loader = ClipLoader(clips, Preparation(None), seed=3, workers=0, rank=rank, world_size=size, block=block)
        loader.submit = lambda epoch, index: lambda: Name
        return [index for index, _ in islice(loader.examples(), 60 // size)]

    whole, parts = order(0, 1), [order(rank, 3) for rank in range(3)]
    together = [i for start in range(0, 20, block) for part in parts for i in part[start : start + block]]
    assert (
        together == whole and sorted(whole[:10]) == list(range(10)) == sorted(whole[10:20]) and whole[:10] != whole[10:20]
    )


def test_a_loader_goes_on_where_another_stopped(world, qwen2_5):
    """Position and lost clips through JSON: the rest of the stream is the undisturbed one's, whatever was read ahead."""
    clips, _ = load_clips(world / "train.jsonl")
    clips = clips[:7]

    def loader() -> ClipLoader:
        made = ClipLoader(clips, Preparation(None), seed=1, workers=0, max_bad_share=0.5)

        def submit(epoch: int, index: int):
            def result() -> tuple[int, int]:
                if index == 2:
                    from data.clips import ClipError

                    raise ClipError("lost")
                return epoch, index

            return result

        made.submit = submit
        return made

    whole = list(islice(loader().examples(), 40))
    for count in (1, 5, 6, 13):
        first = loader()
        begun = list(islice(first.examples(), count))
        again = loader()
        again.restore(json.loads(json.dumps(first.state())))
        assert begun + list(islice(again.examples(), 40 - count)) == whole and again.skipped.keys() <= {2}
