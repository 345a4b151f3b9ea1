"""Checkpoints that a kill cannot spoil, that plain transformers loads; metrics, curves, sheets; our name `kernels`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vp
from data import runs
from data.clips import Preparation, load_clips, prepare, read_frames
from data.sheets import contact_sheet

HERE = Path(__file__).parent.parent


def test_checkpoint_loads_in_plain_transformers(lm, checkpoint, tmp_path):
    """Weights, config, tokenizer and processor; safetensors only; the heads in a file of their own; old ones dropped."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    for step in (5, 10):
        runs.save_checkpoint(tmp_path, step, lm.hf, processor, lm.heads, {"settings": {"a": 1}})
    where = Path(runs.find_checkpoint(tmp_path))
    assert where.name == "checkpoint-000010" and [p.name for p in tmp_path.glob("checkpoint-*")] == [where.name]
    again = AutoModelForImageTextToText.from_pretrained(where)
    for (name, a), (_, b) in zip(lm.hf.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert AutoProcessor.from_pretrained(where).tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert json.loads((where / "videoperceiver.json").read_text()) == {"settings": {"a": 1}, "step": 10}
    assert {p.suffix for p in where.rglob("*") if p.is_file()} <= {".safetensors", ".json", ".jinja", ".txt"}
    script = "import sys; from transformers import AutoModelForImageTextToText as M; M.from_pretrained(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, where], check=True, cwd=tmp_path, capture_output=True)


@pytest.mark.parametrize("place", ["save_pretrained", "save_file", "replace"])
def test_a_kill_while_saving_leaves_the_last_good_one(lm, qwen2_5, tmp_path, monkeypatch, place):
    """Dying in the middle of a save, wherever, leaves `checkpoint` pointing at the whole older one."""
    processor = AutoProcessor.from_pretrained(qwen2_5)
    runs.save_checkpoint(tmp_path, 1, lm.hf, processor, lm.heads, {})
    before = sorted(p.name for p in Path(runs.find_checkpoint(tmp_path)).iterdir())

    class Killed(BaseException):
        """Stands in for the kill."""

    def die(*_, **__):
        raise Killed

    owner = {"save_pretrained": processor, "save_file": runs, "replace": os}[place]
    monkeypatch.setattr(owner, place, die)
    with pytest.raises(Killed):
        runs.save_checkpoint(tmp_path, 2, lm.hf, processor, lm.heads, {})
    monkeypatch.undo()
    where = Path(runs.find_checkpoint(tmp_path))
    assert where.name == "checkpoint-000001" and sorted(p.name for p in where.iterdir()) == before
    assert runs.save_checkpoint(tmp_path, 2, lm.hf, processor, lm.heads, {}) == tmp_path / "checkpoint-000002"
    assert not list(tmp_path.glob(".partial*"))


def test_a_folder_without_checkpoint_says_so(tmp_path):
    """A run that never saved is named with the command to run; a hub name passes through."""
    with pytest.raises(ValueError, match="no checkpoint in this folder; train one with"):
        runs.find_checkpoint(tmp_path)
    assert runs.find_checkpoint("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"


def test_metrics_and_curves(tmp_path):
    """Settings with versions, one JSON line a step, a PNG with what was logged."""
    log = runs.RunLog(tmp_path / "run", {"lr": 1})
    for step in range(1, 4):
        log.write({"step": step, "loss/lm": 1.0 / step})
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").open()]
    assert [x["step"] for x in lines] == [1, 2, 3] and lines[2]["loss/lm"] == pytest.approx(1 / 3, abs=1e-6)
    assert {"settings", "commit", "torch", "device"} <= json.loads((tmp_path / "run/settings.json").read_text()).keys()
    picture = Image.open(log.plot([["loss/lm"], ["absent"]]))
    assert picture.width > 800 and len(picture.convert("L").getcolors(256)) > 3


@pytest.mark.parametrize("frames", [6, 16, 40])
def test_contact_sheets(world, qwen2_5, tmp_path, frames):
    """Green frames in the full row and red ones in the twin's row: as many as there are key frames shown."""
    clip = load_clips(world / "train.jsonl")[0][0]
    preparation = Preparation(AutoProcessor.from_pretrained(qwen2_5), frames)
    example = prepare(clip, preparation)
    path = contact_sheet(clip, read_frames(clip, frames), example, tmp_path / "sheet.png")
    colours = {c for _, c in Image.open(path).convert("RGB").getcolors(1 << 24)}
    assert {(0x1A, 0x98, 0x50), (0xD7, 0x30, 0x27)} <= colours
    example.source, example.keyword_slots = None, []
    contact_sheet(clip, read_frames(clip, frames), example, tmp_path / "plain.png")
    colours = {c for _, c in Image.open(tmp_path / "plain.png").convert("RGB").getcolors(1 << 24)}
    assert (0xD7, 0x30, 0x27) not in colours


@pytest.mark.parametrize("installed", [False, True])
def test_both_packages_named_kernels(tmp_path, installed):
    """With the Hub's package of that name behind ours, its names are found through ours; without it, ImportError."""
    theirs = tmp_path / "kernels"
    if installed:
        theirs.mkdir()
        (theirs / "__init__.py").write_text("from kernels.far import FAR\nfrom .near import get_kernel\n")
        (theirs / "near.py").write_text("def get_kernel():\n    return 'theirs'\n")
        (theirs / "far.py").write_text("FAR = 1\n")
    script = (
        "import kernels, vp, bitsandbytes, transformers.integrations.hub_kernels\n"
        "try:\n    from kernels import get_kernel, FAR\n    print(get_kernel(), FAR)\n"
        "except ImportError:\n    print('absent')\n"
        "print(kernels.__file__)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(tmp_path)])}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["theirs 1" if installed else "absent", str(HERE / "kernels/__init__.py")]


def test_records_survive_a_device_copy(lm, ragged):
    """Batch.to copies every tensor, the nested ones too."""
    batch = lm.collate(ragged)
    moved = batch.to("meta")
    for record, other in ((batch, moved), (batch.key_tokens, moved.key_tokens)):
        for name, value in vars(record).items():
            if isinstance(value, torch.Tensor):
                assert getattr(other, name).is_meta and getattr(other, name).shape == value.shape
            elif not isinstance(value, vp.KeyTokens):
                assert getattr(other, name) == value
