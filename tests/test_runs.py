"""Metrics, curves, sheets; what a resumed run may change; our name `kernels`."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import vp
from data.clips import load_clips
from data.examples import Preparation, prepare
from data.packing import Packed
from data.run import log as runs
from data.run.run import Run
from data.run.settings import changed_settings
from data.run.sheets import contact_sheet
from data.video import read_frames

HERE = Path(__file__).parent.parent


def test_metrics_and_curves(tmp_path):
    """Settings with versions, one JSON line a step, a PNG with what was logged: no panel of what was not, or was 0."""
    log = runs.RunLog(tmp_path / "run", {"lr": 1})
    for step in range(1, 4):
        log.write({"step": step, "loss/lm": 1.0 / step, "skipped": 0.0})
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").open()]
    assert [x["step"] for x in lines] == [1, 2, 3] and lines[2]["loss/lm"] == pytest.approx(1 / 3, abs=1e-6)
    assert {"settings", "commit", "torch", "device"} <= json.loads((tmp_path / "run/settings.json").read_text()).keys()
    picture = Image.open(log.plot({"loss": ["loss/lm"], "nothing": ["absent", "skipped"]}))
    both = Image.open(log.plot({"loss": ["loss/lm"], "steps": ["step"]}, "both.png"))
    assert both.width == 2 * picture.width > 800 and len(picture.convert("L").getcolors(256)) > 3
    assert Image.open(log.plot({"nothing": ["absent"]}, "empty.png")).width == picture.width


def test_a_resumed_log_drops_what_comes_again(tmp_path):
    """Lines behind the checkpoint go, an evaluation at it, which is made again, and a line that a kill tore; a fresh run
    starts an empty file; what is no number is null."""
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "a": 1}', '{"step": 2, "a": 2}', '{"step": 2, "eval/full x": 1}', '{"step": 3, "a": 3}']
    path.write_text("\n".join([*lines, '{"step": 3, "a"']))
    log = runs.RunLog(tmp_path, {"lr": 1}, step=2)
    log.write({"step": 3, "a": 4})
    log.write({"step": 4, "a": math.nan})
    assert [json.loads(x).get("a", "no") for x in path.open()] == [1, 2, 4, None]
    runs.RunLog(tmp_path, {"lr": 1})
    assert path.read_text() == ""


def test_changed_settings_are_named():
    """A resumed run may not change what shapes it, by the flag's name; what only watches it is free."""

    @dataclass
    class Some:
        learning_rate: float = 1e-3
        out: Path = Path("a")
        log_every: int = 1

    before = {"learning_rate": 1e-3, "out": "a", "log_every": 1}
    assert changed_settings(Some(log_every=5), before, ["log_every"]) == []
    assert changed_settings(Some(2e-3), before, []) == ["--learning-rate was 0.001, is 0.002"]


@pytest.mark.parametrize("frames", [6, 16, 40])
def test_contact_sheets(world, qwen2_5, tmp_path, frames):
    """Green frames in the full row and red ones in the twin's row: as many as there are key frames shown."""
    clip = load_clips(world / "train.jsonl")[0][0]
    preparation = Preparation(AutoProcessor.from_pretrained(qwen2_5), frames)
    example = prepare(clip, preparation)
    path = contact_sheet(clip, read_frames(clip, frames), example, tmp_path / "sheet.png")
    colours = {c for _, c in Image.open(path).convert("RGB").getcolors(1 << 24)}
    assert {(0x1A, 0x98, 0x50), (0xD7, 0x30, 0x27)} <= colours
    example.source, example.keywords = None, []
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
    """Batch.to copies every tensor, the nested ones too, but pixels and grid, which are read on the host."""
    batch = lm.collate(ragged)
    moved = batch.to("meta")
    for record, other in ((batch, moved), (batch.key_tokens, moved.key_tokens), (batch.forked, moved.forked)):
        for name, value in vars(record).items():
            if name in ("pixels", "grid"):
                assert getattr(other, name) is value
            elif isinstance(value, torch.Tensor):
                assert getattr(other, name).is_meta and getattr(other, name).shape == value.shape
            elif not isinstance(value, (vp.KeyTokens, Packed)):
                assert getattr(other, name) == value


@pytest.mark.parametrize("batch_size, clips, processes, times", [(16, 2, 4, 2), (8, 8, 1, 1), (6, 1, 3, 2)])
def test_a_batch_is_split_among_processes(batch_size, clips, processes, times):
    """Every process takes as many passes as any other, together the whole batch; else the run does not start."""
    run = SimpleNamespace(settings=SimpleNamespace(batch_size=batch_size), num_processes=processes)
    assert Run.split_batch(run, clips) == times and times * clips * processes == batch_size
    run.num_processes += 2 * batch_size
    with pytest.raises(ValueError, match=f"--batch-size {batch_size} is not a multiple of {clips} clips x"):
        Run.split_batch(run, clips)
