"""Both stages on a device of their own: nothing mixed with the CPU, nothing read before it has arrived, no hidden wait.

See tests/pretend_gpu.py. The tests run in a process of their own, since a device cannot be unregistered. 4-bit weights are
left out: bitsandbytes makes them a class of tensor of its own, which a pretend tensor cannot be at the same time.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch

import train_rl
import train_sft
from data import attention, videolm
from data.curation.finders import fall_evidence, head_evidence
from data.measure import evaluate
from data.packing import BLOCK
from data.run import models, processes
from data.run.run import Run
from data.tiny import build_text_encoder
from data.world import WorldSettings, make_world
from tests import pretend_gpu

CHILD = os.environ.get("PRETEND_GPU") == "1"
child = pytest.mark.skipif(not CHILD, reason="runs in a process of its own")


@pytest.mark.skipif(CHILD, reason="this is that process")
def test_in_a_process_of_its_own():
    """All tests below, where the pretend device is registered."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"PRETEND_GPU": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """The device, and what a run asks the system for: where it runs, and block masks that a CPU can attend under."""
    gpu = pretend_gpu.device()
    torch.set_num_threads(1)
    start = processes.start_processes

    def start_on_device(*arguments):
        accelerator = start(*arguments)
        accelerator.state.device = gpu
        return accelerator

    processes.start_processes = start_on_device
    models.best_device = lambda: gpu
    whole = models.whole_state  # safetensors reads memory, of which a pretend tensor has none
    models.whole_state = lambda lm: {name: weight.cpu() for name, weight in whole(lm).items()}
    return gpu


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A smaller world than that of the other tests."""
    return make_world(WorldSettings(tmp_path_factory.mktemp("world"), train=8, test=2, held_out=0, prompts=0, workers=1))


# --- The device itself --------------------------------------------------------------------------------------------------


@child
def test_the_device_refuses_and_counts(gpu):
    """What a GPU would refuse, wait for, or race with."""
    a, b = torch.ones(3), torch.ones(3, device=gpu)
    with pytest.raises(RuntimeError, match="same device"):
        a + b
    with pytest.raises(RuntimeError, match="same device"):
        b.index_select(0, torch.tensor([1]))
    with pytest.raises(TypeError):
        b.numpy()
    with pretend_gpu.watch() as seen:
        assert (b * 2).device == gpu and not seen.waits
        b.sum().item()
        b.cpu()
        b[b > 0]
        b[torch.tensor([0])]
        b.tolist()
        torch.tensor([1.0], device=gpu)
        if b.any():
            b.nonzero()
        assert not seen.races
        b.to("cpu", non_blocking=True)
    assert seen.races.total() == 1 and all("test_pretend_gpu.py" in line for line in seen.waits | seen.races)
    kinds = Counter(line.split(":")[0] for line in seen.waits)
    assert kinds == {"item()": 2, "copy to the host": 1, "boolean index": 1, "index copied to the device": 1, "tolist": 1,
                     "blocking copy to the device": 1, "size depends on the content": 1}, seen.table()  # fmt: skip


@child
def test_the_device_counts_bytes(gpu):
    """Storages are counted once, and until they are gone; with sizes alone no memory is taken."""
    with pretend_gpu.watch() as seen:
        x = torch.zeros(1000, device=gpu)
        y = x.view(10, 100)[:, :50]
        del x
        z = y + 1
        del y, z
        torch.zeros(500, device=gpu)
    assert seen.peak == 4000 + 2000
    with pretend_gpu.sizes_only(), pretend_gpu.watch() as seen:
        x = torch.zeros(2**40, device=gpu, dtype=torch.bfloat16)
        assert (x + x).shape == x.shape and torch.arange(5, device=gpu).tolist() == [0, 1, 2, 3, 4]
    assert seen.peak >= 2**42


# --- A step of each stage -----------------------------------------------------------------------------------------------


def dense_blocks(query, key, value, mask, scaling):
    """Attention under a block mask, its `mask_mod` asked about every pair of blocks that it lists."""
    assert query.shape[2] % BLOCK == 0 and query.dtype == key.dtype == value.dtype
    places = torch.arange(query.shape[2], device=query.device)
    clips = torch.arange(len(query), device=query.device)[:, None, None]
    allowed = mask.mask_mod(clips, 0, places[:, None], places[None])
    listed = mask.to_dense()[:, 0].bool().repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    allowed = (allowed & listed)[:, None]
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, allowed, scale=scaling)


def watch_steps(monkeypatch) -> list[pretend_gpu.Seen]:
    """What happens in each step of a run, from the end of the one before to its own end; the first comes first."""
    steps, end_of_step = [], Run.end_of_step

    def end(self, *arguments):
        end_of_step(self, *arguments)
        steps.append(pretend_gpu.seeing())
        pretend_gpu.see(pretend_gpu.Seen())

    monkeypatch.setattr(Run, "end_of_step", end)
    return steps


def few(step: pretend_gpu.Seen, allowed: dict[str, int]) -> None:
    """A step races with nothing, and waits at the lines of a table, at most as often."""
    assert not step.races, step.races
    left = {line: n for line, n in step.waits.items() if not any(part in line for part in allowed)}
    assert not left, "waits that no table has:\n" + step.table()
    for part, most in allowed.items():
        assert sum(n for line, n in step.waits.items() if part in line) <= most, step.table()


@pytest.fixture
def settings(checkpoint, world, tmp_path, monkeypatch) -> dict:
    """What the short runs have in common, as in the GPU presets. Evaluations say little."""
    monkeypatch.setattr(evaluate, "evaluate", partial(evaluate.evaluate, max_new_tokens=4))
    return dict(
        model=str(checkpoint), data=world / "train.jsonl", eval_data=world / "test.jsonl", out=tmp_path, steps=3,
        lora_rank=4, freeze_vision=True, gradient_checkpointing=True, eval_clips=2, workers=0, log_every=10,
    )  # fmt: skip


# Where a step of stage 1 waits between two lines of the log, and how often: nowhere.
STAGE_1: dict[str, int] = {}


@child
def test_train_sft(gpu, settings, monkeypatch):
    """Stage 1: LoRA and checkpointing; saved, and on from there, to an evaluation."""
    s = train_sft.Settings(**settings, batch_size=2, micro_batch_size=2, save_every=2, sheets=0)
    steps = watch_steps(monkeypatch)
    with pretend_gpu.watch():
        train_sft.main(s)
    few(steps[1], STAGE_1)
    shutil.rmtree(s.out / "checkpoint-000003")
    with pretend_gpu.watch() as seen:
        results = train_sft.main(replace(s, resume=True))
    assert results["clips"] == 2 and not results["skipped"] and not seen.races and not steps[3].races


# Where a step of stage 2 waits, how often, and why.
STAGE_2 = {
    # The rollouts are read: tokens, log-probabilities, lengths, ends, one behind the other; then the rewards of full
    # videos, and those of twins.
    "data/device.py": 6,
    "sentence_transformers/": 2,  # a batch of texts: the library copies ids and mask,
    "transformers/masking_utils.py": 1,  # and asks whether any is masked
    "tolist: data/texts.py": 1,  # ids of all texts, to leave out the special ones
    "vp.py": 12,  # three a comparison, of two prompts and their twins: the reward's reference; its kernel has none
}


@child
@pytest.mark.parametrize("checkpoint", ["qwen2_5_vl"], indirect=True)
def test_train_rl(gpu, settings, monkeypatch):
    """Stage 2, attention in blocks, and an evaluation."""
    monkeypatch.setattr(videolm.VideoLM, "flex", True)
    monkeypatch.setattr(attention, "attend_in_blocks", dense_blocks)
    encoder = build_text_encoder(settings["out"] / "encoder")
    s = train_rl.Settings(
        **settings | {"steps": 2}, batch_size=2, micro_batch_size=1, num_rollouts=3, num_twin_rollouts=2, max_new_tokens=6,
        hard_prompts=2, eval_before=False, text_encoder=str(encoder), epochs=1, beta=0.1,
    )  # fmt: skip
    roll_out = train_rl.roll_out

    def noted_wrongly(*arguments):
        """A sampler whose log-probabilities are off by 1."""
        sampled, rollouts, video = roll_out(*arguments)
        return [replace(y, logp=[x + 1 for x in y.logp]) for y in sampled], rollouts, video

    monkeypatch.setattr(train_rl, "roll_out", noted_wrongly)
    steps = watch_steps(monkeypatch)
    with pretend_gpu.watch():
        results = train_rl.main(s)
    assert results["clips"] == 2 and not results["skipped"]
    few(steps[1], STAGE_2)
    # The update's own log-probabilities are the old ones: a first update has nothing to clip, whatever the sampler noted.
    lines = [json.loads(line) for line in (s.out / "metrics.jsonl").open()]
    (last,) = [line for line in lines if "policy/clipped" in line]
    assert last["policy/clipped"] == 0 and last["policy/sampling_gap"] == pytest.approx(1, abs=0.1)


@child
@pytest.mark.parametrize("checkpoint", ["qwen2_5_vl"], indirect=True)
def test_answers_and_finders(gpu, checkpoint, ragged):
    """Answers about full videos and twins; what finds key slots by the model's own evidence."""
    lm, _ = models.load_model(str(checkpoint))
    assert {p.device for p in lm.parameters()} == {gpu} and lm.base.lm_head.weight.dtype == torch.bfloat16
    questions = [[torch.tensor([5, 6]), torch.tensor([7])], [torch.tensor([8])]]
    with pretend_gpu.watch() as seen:
        answers = lm.answer(ragged[:2], questions, 3, twin=True).to("cpu")
        head_evidence(lm, ragged[0])
        fall_evidence(lm, ragged[3])
    assert answers.tokens.shape[:2] == (2, 4) and not seen.races
