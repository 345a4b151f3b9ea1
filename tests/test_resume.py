"""Runs that are killed, stopped, or fed NaN: what they end with is what an undisturbed run ends with.

KILLS=10 pytest tests/test_resume.py kills each script ten times; CI does it twice.
"""

import functools
import json
import math
import os
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_sft
from data import videolm
from data.run import models
from tests.commands import HERE, Command, run

SMALL = {
    "train_sft": ["--steps", "36", "--batch-size", "2", "--micro-batch-size", "1", "--sheets", "0"],
    "train_rl": ["--steps", "36", "--batch-size", "2", "--micro-batch-size", "1", "--num-rollouts", "3",
                 "--num-twin-rollouts", "2", "--max-new-tokens", "4"],
}  # fmt: skip


def same(a: Path, b: Path) -> None:
    """Two runs have the same weights, optimizer and metrics, bit for bit."""
    for name in ("model.safetensors", "heads.safetensors", "state/optimizer.safetensors"):
        assert (a / "checkpoint" / name).exists() == (b / "checkpoint" / name).exists()
        if (a / "checkpoint" / name).exists():
            x, y = load_file(a / "checkpoint" / name), load_file(b / "checkpoint" / name)
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name
    lines = [[json.loads(x) for x in (run / "metrics.jsonl").open()] for run in (a, b)]
    for x, y in zip(*lines, strict=True):
        assert {k: v for k, v in x.items() if "perf" not in k} == {k: v for k, v in y.items() if "perf" not in k}


def kill_later(log: Path, step: int, seconds: float) -> None:
    """Kill this process, as by kill -9, a number of seconds after its log has reached a step."""

    def watch() -> None:
        while not log.exists() or f'"step": {step},' not in log.read_text():
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.parametrize("script", SMALL)
def test_kill_minus_nine_and_resume(tmp_path, world, qwen2_5, script):
    """Killed at random moments and restarted each time: the undisturbed run's bits."""
    lines = (world / "train.jsonl").read_text().splitlines()
    lines[3] = lines[3].replace(".mp4", "-gone.mp4")  # what is lost must stay lost, and take nobody's place
    data = world / f"resume-{script}.jsonl"
    data.write_text("\n".join(lines))
    test = world / f"resume-{script}-test.jsonl"
    test.write_text("\n".join((world / "test.jsonl").read_text().splitlines()[:4]))
    small = ["--model", qwen2_5, "--data", data, "--eval-data", test, "--workers", 0, *SMALL[script]]
    small += ["--log-every", 3, "--save-every", 4, "--eval-every", 8]  # lines are begun before a save, and ended after
    done = run(HERE / f"{script}.py", *small, "--out", tmp_path / "undisturbed", cwd=tmp_path)
    seconds = float(re.search(r"\(36 steps in (\d+) s\)", done.stdout)[1]) / 36
    rng = random.Random(script)
    kills = int(os.environ.get("KILLS", "2"))
    for step in sorted(rng.sample(range(3, 34, 3), kills)):
        log, wait = tmp_path / "killed/metrics.jsonl", rng.uniform(0, max(0.05, 2 * seconds))
        kill = functools.partial(kill_later, log, step, wait)
        died = run(
            HERE / f"{script}.py", *small, "--out", tmp_path / "killed", "--resume", cwd=tmp_path, before=kill, check=False
        )
        assert died.returncode == -signal.SIGKILL, died.stderr
    done = run(HERE / f"{script}.py", *small, "--out", tmp_path / "killed", "--resume", cwd=tmp_path)
    print(f"{script}: {kills} kills; {[x for x in done.stdout.splitlines() if 'resumed' in x or 'anew' in x]}")
    same(tmp_path / "undisturbed", tmp_path / "killed")


def test_resume_says_what_it_does(tmp_path, world, qwen2_5):
    """Without a checkpoint it starts; a damaged one is named; other settings or another file are refused by name; SIGTERM
    with adapters saves the adapter alone, and the end merges it."""
    data = world / "says.jsonl"
    shutil.copy(world / "train.jsonl", data)
    small = ["--model", qwen2_5, "--data", data, "--workers", 0, "--sheets", 0, "--batch-size", 2, "--micro-batch-size", 2]
    small += ["--log-every", 1, "--save-every", 2, "--lora-rank", 2, "--out", "o", "--resume"]
    small = [HERE / "train_sft.py", *small]

    def start(*more) -> tuple[int, str]:
        done = run(*small, *more, cwd=tmp_path, check=False)
        return done.returncode, done.stdout + done.stderr

    command = Command(*small, "--steps", 3000, cwd=tmp_path)
    command.wait_for("step ")
    os.kill(command.pid, signal.SIGTERM)
    done = command.wait()
    assert done.returncode == 0 and "no checkpoint in o: started anew" in done.stdout
    newest = (tmp_path / "o/checkpoint").resolve()
    assert (newest / "adapter/adapter_model.safetensors").exists() and not (newest / "model.safetensors").exists()
    code, output = start("--steps", 9)
    assert code == 1 and "other settings" in output and "--steps was 3000, is 9" in output and "Traceback" not in output
    data.write_text(data.read_text() + "\n")
    code, output = start("--steps", 3000)
    assert code == 1 and f"{data} has changed" in output
    shutil.rmtree(tmp_path / "o")
    assert start("--steps", 4)[0] == 0
    damaged = tmp_path / "o/checkpoint-000004/adapter/adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    code, output = start("--steps", 4)
    assert (
        code == 0 and "checkpoint passed over" in output and "resumed from o/checkpoint-000002" in " ".join(output.split())
    )
    assert (tmp_path / "o/checkpoint/model.safetensors").exists()


@pytest.fixture
def in_process(tmp_path, world, qwen2_5, monkeypatch):
    """Stage 1 in this process, with losses replaced at chosen forward passes; returns (run, metrics lines)."""

    def start(poison: dict[int, float], name: str = "o", **more) -> tuple[Path, list[dict]]:
        forward, calls = videolm.VideoLM.forward, []

        def poisoned(self, *arguments):
            out = forward(self, *arguments)
            calls.append(1)
            if len(calls) in poison:
                # Inf: in the loss alone; NaN: in the gradient, too
                bad = poison[len(calls)]
                out.lm_loss = out.lm_loss + bad if math.isinf(bad) else out.lm_loss * bad
            return out

        monkeypatch.setattr(videolm.VideoLM, "forward", poisoned)
        settings = dict(steps=8, batch_size=2, micro_batch_size=2, sheets=0, workers=0, log_every=1) | more
        settings |= dict(model=str(qwen2_5), data=world / "train.jsonl", out=tmp_path / name)
        try:
            train_sft.main(train_sft.Settings(**settings))
        finally:
            monkeypatch.undo()
        return tmp_path / name, [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").open()]

    return start


def test_bad_steps_are_skipped_and_counted(in_process):
    """NaN and Inf leave the weights as they were, to the bit; the next good step goes on."""
    out, lines = in_process({3: math.nan, 5: math.inf, 8: math.nan}, save_every=1)
    assert [x["bad_steps"] for x in lines] == [0, 0, 1, 1, 2, 2, 2, 3]
    assert all(math.isfinite(lines[i]["loss/lm"]) for i in (0, 1, 3, 5, 6))
    # 7 and 8 are kept: the last step was bad and changed nothing, neither weights nor moments
    for name in ("model.safetensors", "state/optimizer.safetensors"):
        a, b = (load_file(out / f"checkpoint-00000{i}" / name) for i in (7, 8))
        assert all(torch.equal(a[k], b[k]) for k in a) and all(torch.isfinite(v).all() for v in b.values())
    steps = {k: v for k, v in b.items() if k.endswith("/step")}
    assert steps and all(v == 5 for v in steps.values())


def test_too_many_bad_steps_end_the_run_with_what_was_good(in_process, qwen2_5, tmp_path):
    """A number in a row stops it, in plain words, with the last good weights saved; fewer in a row do not."""
    with pytest.raises(ValueError, match="3 updates in a row; none of them changed the weights"):
        in_process(dict.fromkeys(range(1, 9), math.nan), max_bad_steps=3)
    saved = load_file(Path(models.find_checkpoint(tmp_path / "o")) / "model.safetensors")
    before = load_file(qwen2_5 / "model.safetensors")
    assert all(torch.equal(saved[k], before[k]) for k in before)
    _, lines = in_process(dict.fromkeys((1, 2, 4, 5, 7, 8), math.nan), name="p", max_bad_steps=3)
    assert lines[-1]["bad_steps"] == 6


def test_out_of_memory_is_explained_and_saves(in_process, world, qwen2_5, tmp_path, monkeypatch):
    """Running out in the middle: what was trained is saved, and three settings that need less are named."""
    forward, calls = videolm.VideoLM.forward, []

    def bursts(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *arguments)

    monkeypatch.setattr(videolm.VideoLM, "forward", bursts)
    settings = dict(steps=8, batch_size=2, micro_batch_size=2, sheets=0, workers=0, model=str(qwen2_5))
    with pytest.raises(ValueError, match="out of memory") as caught:
        train_sft.main(train_sft.Settings(data=world / "train.jsonl", out=tmp_path / "o", **settings))
    message = str(caught.value)
    assert message.count("\n  --") == 3 and "\n  --lora-rank 16: " in message and "continue from it" in message
    assert (tmp_path / "o/checkpoint").resolve().name == "checkpoint-000003"
    assert (tmp_path / "o/checkpoint/model.safetensors").exists()


def test_tensorboard_gets_the_metrics(in_process, tmp_path):
    """--tracker tensorboard: every logged number at its step; a tracker that is not installed is one clear error."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, lines = in_process({}, tracker="tensorboard", steps=3)
    folders = {p.parent for p in out.rglob("events.*")}
    events = next(e for e in (EventAccumulator(str(f)).Reload() for f in folders) if "loss/lm" in e.Tags()["scalars"])
    for name in ("loss/lm", "loss/contrastive", "grad_norm"):
        assert [e.step for e in events.Scalars(name)] == [1, 2, 3]
        assert [e.value for e in events.Scalars(name)] == pytest.approx([x[name] for x in lines], abs=1e-5)
    with pytest.raises(ValueError, match=r"--tracker trackio: .*pip install trackio"):
        in_process({}, tracker="trackio", name="p")
