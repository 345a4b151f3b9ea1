"""Checkpoints that no kill, full disk or damage can spoil, and that plain transformers and peft load."""

import json
import os
import random
import resource
import subprocess
import sys
import weakref
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, get_cosine_schedule_with_warmup

from data import videolm
from data.run import checkpoints, merge, models


def save(folder: Path, step: int, lm: videolm.VideoLM, processor, merged: bool = True) -> None:
    """A checkpoint as the train scripts write it."""
    with checkpoints.whole_or_nothing(folder, step) as partial:
        merge.save_model(partial, lm.hf, processor, merged)
        checkpoints.save_file(lm.heads.state_dict(), partial / "heads.safetensors")
        checkpoints.save_state(partial, {"a/step": torch.tensor(float(step))}, {"step": step})


def test_checkpoint_loads_in_plain_transformers(lm, checkpoint, tmp_path):
    """Weights, config, tokenizer and processor; safetensors only; the two newest are kept."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    for step in (5, 10, 15):
        save(tmp_path, step, lm, processor)
    where = Path(models.find_checkpoint(tmp_path))
    assert where.name == "checkpoint-000015"
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-000010", "checkpoint-000015"]
    again = AutoModelForImageTextToText.from_pretrained(where)
    for (name, a), (_, b) in zip(lm.hf.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert AutoProcessor.from_pretrained(where).tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert {p.suffix for p in where.rglob("*") if p.is_file()} <= {".safetensors", ".json", ".jinja", ".txt"}
    script = "import sys; from transformers import AutoModelForImageTextToText as M; M.from_pretrained(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, where], check=True, cwd=tmp_path, capture_output=True)


@pytest.mark.parametrize("place", ["save_pretrained", "save_file", "fsync", "replace"])
def test_a_kill_while_saving_leaves_the_last_good_one(lm, qwen2_5, tmp_path, monkeypatch, place):
    """Dying in the middle of a save, wherever, leaves `checkpoint` pointing at the whole older one."""
    processor = AutoProcessor.from_pretrained(qwen2_5)
    save(tmp_path, 1, lm, processor)
    before = sorted(p.name for p in Path(models.find_checkpoint(tmp_path)).iterdir())

    class Killed(BaseException):
        """Stands in for the kill."""

    def die(*_, **__):
        raise Killed

    owner = {"save_pretrained": processor, "save_file": checkpoints, "fsync": os, "replace": os}[place]
    monkeypatch.setattr(owner, place, die)
    with pytest.raises(Killed):
        save(tmp_path, 2, lm, processor)
    monkeypatch.undo()
    where = Path(models.find_checkpoint(tmp_path))
    assert where.name == "checkpoint-000001" and sorted(p.name for p in where.iterdir()) == before
    assert checkpoints.newest_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-000001"
    save(tmp_path, 2, lm, processor)
    assert checkpoints.newest_checkpoint(tmp_path) == (tmp_path / "checkpoint-000002", [])
    assert not list(tmp_path.glob(".partial*"))


@dataclass
class Some:
    """Settings of a run."""

    out: Path
    data: Path
    steps: int = 10
    resume: bool = True


@pytest.mark.parametrize(
    "change, message",
    [
        ("steps", "--steps was 10, is 20"),
        ("data", "a.jsonl has changed"),
        ("processes", r"it ran in 2 process\(es\), not 1"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, change, message):
    """Settings, annotation file and number of processes must be those of the run; what differs is named."""
    data = tmp_path / "a.jsonl"
    data.write_text("{}")
    settings = Some(tmp_path / "o", data)
    assert checkpoints.resume(settings, (), 2).notes == [f"no checkpoint in {tmp_path / 'o'}: started anew"]
    state = {"step": 7, "settings": vars(settings), "annotations": zlib.crc32(b"{}"), "num_processes": 2}
    with checkpoints.whole_or_nothing(settings.out, 7) as partial:
        checkpoints.save_state(partial, {"a/step": torch.tensor(1.0)}, state)
    found = checkpoints.resume(settings, (), 2)
    assert found.step == 7 and found.path == tmp_path / "o/checkpoint-000007"
    assert checkpoints.resume(replace(settings, resume=False), (), 2) == checkpoints.Resumed()
    assert checkpoints.resume(replace(settings, steps=20), ("steps",), 2).step == 7
    if change == "steps":
        settings = replace(settings, steps=20)
    elif change == "data":
        data.write_text("{ }")
    with pytest.raises(ValueError, match=message):
        checkpoints.resume(settings, (), 1 if change == "processes" else 2)


def test_saving_a_step_again_keeps_one_whole(tmp_path):
    """The second save of a step takes the first one's place, and leaves nothing else behind."""
    for text in ("old", "first", "second"):
        with checkpoints.whole_or_nothing(tmp_path, 1 if text == "old" else 2) as partial:
            (partial / "a.txt").write_text(text)
    assert (tmp_path / "checkpoint/a.txt").read_text() == "second"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "checkpoint-000001", "checkpoint-000002"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "no list", "odd list"])
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, damage):
    """A cut, changed or missing file: the one before is taken, and the message names the file."""
    for step in (1, 2):
        with checkpoints.whole_or_nothing(tmp_path, step) as partial:
            (partial / "model.safetensors").write_bytes(random.Random(step).randbytes(4000))
            checkpoints.save_state(partial, {"a/step": torch.tensor(float(step))}, {"step": step})
    file = tmp_path / "checkpoint-000002/model.safetensors"
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "flipped":
        file.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif damage == "missing":
        file.unlink()
    elif damage == "no list":
        file.with_name("files.json").unlink()
    else:
        file.with_name("files.json").write_text("[1")
    found, broken = checkpoints.newest_checkpoint(tmp_path)
    assert found == tmp_path / "checkpoint-000001" and len(broken) == 1 and "checkpoint-000002" in broken[0]
    assert ("model.safetensors" in broken[0]) == ("list" not in damage)
    assert checkpoints.load_state(found)[1]["step"] == 1


DISK = """
import resource, sys, torch
from data.run import checkpoints
from pathlib import Path
out, size = Path(sys.argv[1]), int(sys.argv[2])
if len(sys.argv) > 3:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
with checkpoints.whole_or_nothing(out, int(sys.argv[4]) if len(sys.argv) > 4 else 2) as partial:
    checkpoints.save_file({"a": torch.ones(size // 4)}, partial / "model.safetensors")
"""


@pytest.mark.parametrize("how", ["tmpfs", "file size limit"])
def test_a_full_disk_is_told_and_spoils_nothing(tmp_path, how):
    """A save that does not fit: one clear message, the earlier checkpoint whole, the half-written one gone."""
    if how == "tmpfs":
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a tmpfs is not allowed here")
    try:
        with checkpoints.whole_or_nothing(tmp_path, 1) as partial:
            checkpoints.save_file({"a": torch.ones(1 << 18)}, partial / "model.safetensors")  # 1 MiB
        limit = [str(2 << 20)] if how != "tmpfs" else []
        command = [sys.executable, "-c", DISK, tmp_path, str(4 << 20), *limit]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        message = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and "checkpoint-000002 could not be saved" in message and "MiB are free" in message
        assert "checkpoint-000001, is whole" in message and "--resume" in message
        assert checkpoints.newest_checkpoint(tmp_path) == (tmp_path / "checkpoint-000001", [])
        assert not list(tmp_path.glob(".partial*")) and (tmp_path / "checkpoint").resolve().name == "checkpoint-000001"
    finally:
        if how == "tmpfs":
            subprocess.run(["umount", tmp_path], check=True)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_folder_without_checkpoint_says_so(tmp_path):
    """A run that never saved is named with the command to run; a hub name passes through; no state, no resume."""
    with pytest.raises(ValueError, match="no checkpoint in this folder; train one with"):
        models.find_checkpoint(tmp_path)
    assert models.find_checkpoint("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert checkpoints.newest_checkpoint(tmp_path) == (None, [])
    with pytest.raises(ValueError, match="has no state/ to resume from"):
        checkpoints.load_state(tmp_path)


def test_random_states_come_back():
    """Python's, numpy's and torch's numbers go on where they were, through JSON."""

    def numbers() -> tuple:
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    numbers()
    state = json.loads(json.dumps(checkpoints.random_states()))
    expected = numbers()
    numbers()
    checkpoints.set_random_states(state)
    assert numbers() == expected


def test_optimizer_and_schedule_come_back(tmp_path):
    """After ten steps: saved, loaded into new ones, and ten more give the bits of twenty undisturbed steps."""

    def start() -> tuple:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 1))
        model[0].bias.requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-2, fused=True)
        return model, optimizer, get_cosine_schedule_with_warmup(optimizer, 3, 20)

    def steps(model, optimizer, schedule, numbers) -> None:
        for i in numbers:
            model(torch.full((2, 5), float(i))).square().sum().backward()
            optimizer.step(), schedule.step(), optimizer.zero_grad()

    whole = start()
    steps(*whole, range(20))
    first = start()
    steps(*first, range(10))
    tensors = checkpoints.optimizer_tensors(*first[:2])
    (tmp_path / "c").mkdir()
    checkpoints.save_state(tmp_path / "c", tensors, {"schedule": first[2].state_dict()})
    tensors, state = checkpoints.load_state(tmp_path / "c")
    again = start()
    again[0].load_state_dict(first[0].state_dict())
    checkpoints.set_optimizer(*again, tensors, state["schedule"])
    steps(*again, range(10, 20))
    for a, b in zip(whole[0].parameters(), again[0].parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_adapters_load_with_peft_alone_and_merged_without(checkpoint, ragged, tmp_path, quantize):
    """An adapter saved, loaded by peft, and merged: the same logits, also over 4-bit weights; the model is untouched."""
    device = torch.device("cpu")
    processor = AutoProcessor.from_pretrained(checkpoint)
    hf = models.load_trainable(str(checkpoint), quantize, 4, False, False, device)
    torch.manual_seed(1)
    for name, p in hf.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    lm = videolm.VideoLM(hf).eval()
    batch = lm.collate(ragged)

    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            model = videolm.VideoLM(model).eval()
            return model.base(**model.inputs(batch, model.encode_video(batch)), position_ids=batch.position_ids).logits

    expected = logits(hf)
    save(tmp_path / "part", 1, lm, processor, merged=False)
    save(tmp_path / "whole", 1, lm, processor)
    assert not (tmp_path / "part/checkpoint/config.json").exists()
    base = models.load_pretrained(checkpoint, torch.float32, quantize)[0]
    plain = logits(base)
    assert (plain - expected).abs().max() > 1e-2  # the adapter does something
    with_peft = PeftModel.from_pretrained(base, tmp_path / "part/checkpoint/adapter")
    torch.testing.assert_close(logits(with_peft), expected, rtol=1e-4, atol=1e-4)
    ours = models.load_pretrained(tmp_path / "part", torch.float32, quantize)[0]
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole/checkpoint")
    assert getattr(merged.config, "quantization_config", None) is None
    # 4-bit layers compute in bf16, the merged ones in float32
    tolerance = 1e-4 if quantize == "none" else 0.06
    torch.testing.assert_close(logits(merged), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(logits(hf), expected, rtol=0, atol=0)
    state = load_file(tmp_path / "whole/checkpoint/model.safetensors")
    assert not any("lora" in n or "absmax" in n or "quant" in n for n in state)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_merge_holds_one_file_of_weights_at_a_time(checkpoint, tmp_path, monkeypatch, quantize):
    """Merging a 7B in 4 bits must not need a second, whole 7B: of folded weights no more live than one file's."""
    hf = models.load_trainable(str(checkpoint), quantize, 4, False, False, torch.device("cpu"))
    for name, p in hf.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    own = {t.data_ptr() for t in hf.state_dict().values()}
    made, most, make = [], 0, merge.MergedWeights.__getitem__

    def make_and_count(merged: merge.MergedWeights, name: str) -> torch.Tensor:
        nonlocal most
        weight = make(merged, name)
        if weight.data_ptr() not in own:
            made.append(weakref.ref(weight))
        most = max(most, sum(t.nbytes for t in (ref() for ref in made) if t is not None))
        return weight

    processor = AutoProcessor.from_pretrained(checkpoint)
    merge.save_model(tmp_path / "one", hf, processor, merged=True, adapter=False)
    monkeypatch.setattr(merge.MergedWeights, "__getitem__", make_and_count)
    monkeypatch.setattr(merge, "LARGEST_FILE", 200_000)
    merge.save_model(tmp_path / "many", hf, processor, merged=True, adapter=False)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and 0 < most <= 200_000 < sum(w.nbytes for w in merge.MergedWeights(hf).values()) / 4
    one, many = load_file(tmp_path / "one/model.safetensors"), {}
    for file in files:
        many |= load_file(file)
    assert one.keys() == many.keys() == load_file(checkpoint / "model.safetensors").keys()  # as the hub's files name them
    assert all(torch.equal(one[name], many[name]) for name in one)
    a, b = (AutoModelForImageTextToText.from_pretrained(tmp_path / which).state_dict() for which in ("one", "many"))
    assert all(torch.equal(a[name], b[name]) for name in a)
