"""Other systems and versions: without /proc, as on macOS; threads; transformers, oldest and newest."""

import builtins
import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import data
import train_rl
import train_sft
from data import videolm, workers
from data.clips import load_clips
from data.curation import curate
from data.examples import Preparation, prepare
from data.measure import cost
from data.run import log as runs
from data.run import memory, merge, models, processes, run, sizes
from data.tiny import build_tiny
from tests.conftest import FAMILIES

HERE = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def no_proc(monkeypatch) -> list[str]:
    """A system without /proc: opening a file in it fails. Returns the files of ours that tried."""
    ours, plain = (
        [],
        {(module, name): getattr(module, name) for module, name in ((builtins, "open"), (io, "open"), (os, "open"))},
    )

    def guard(function):
        def guarded(file, *arguments, **more):
            if str(file).startswith("/proc"):
                callers = [f.filename for f in traceback.extract_stack()[:-1] if "pathlib" not in f.filename]
                ours.extend(
                    name for name in callers[-1:] if Path(name).is_relative_to(HERE) and "site-packages" not in name
                )
                raise FileNotFoundError(2, "No such file or directory", str(file))
            return function(file, *arguments, **more)

        return guarded

    for (module, name), function in plain.items():
        monkeypatch.setattr(module, name, guard(function))
    return ours


@pytest.fixture
def threads(monkeypatch) -> list[int]:
    """Numbers of threads that were asked for, with OMP_NUM_THREADS not set."""
    asked = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked[-1] if asked else 2)
    return asked


@pytest.mark.parametrize("script", [train_sft, train_rl])
def test_training_without_proc(no_proc, threads, script, world, qwen2_5, tmp_path, capsys):
    """Both scripts stopped at once without /proc, since they read a peak of memory there. Now no figure is shown; the tiny
    model has one thread, which the log tells."""
    more = {"sheets": 0} if script is train_sft else {"num_rollouts": 2, "num_twin_rollouts": 2, "max_new_tokens": 2}
    more |= dict(steps=1, batch_size=2, micro_batch_size=2, workers=0, log_every=1)
    script.main(script.Settings(model=str(qwen2_5), data=world / "train.jsonl", out=tmp_path / "o", **more))
    shown = " ".join(capsys.readouterr().out.split())
    assert "memory, measured: not known on this system" in shown and "that is not known on this system" in shown
    assert "CPU, 1 thread'" in shown and threads == [1]
    assert json.loads((tmp_path / "o/settings.json").read_text())["device"] == "CPU, 1 thread"
    assert no_proc == []


def test_cost_without_proc(no_proc, threads, qwen2_5, tmp_path, monkeypatch):
    """`eval.py cost`: times as ever, no figure of memory, in the table nor in the JSON file."""

    @contextlib.contextmanager
    def here(*_, **__):  # another process would have a /proc
        yield SimpleNamespace(starmap=lambda function, rows, chunksize: [function(*row) for row in rows])

    monkeypatch.setattr(cost.multiprocessing, "get_context", lambda _: SimpleNamespace(Pool=here))
    settings = cost.CostSettings("stage-1", str(qwen2_5), visual_tokens=64, new_tokens=4, repeats=1, out=tmp_path)
    cost.run_cost(settings, Console(quiet=True))
    table = (tmp_path / "cost-stage-1.md").read_text()
    assert table.count("| not known | not known |") == 2 and "nan" not in table.lower()
    record = json.loads((tmp_path / "cost-stage-1.json").read_text(), parse_constant=pytest.fail)
    assert "plain seconds" in str(record) and "bytes" not in str(record)
    assert no_proc == [] and set(threads) == {1}


def test_curation_without_proc(no_proc, world, tmp_path):
    """Captions to clips.jsonl."""
    lines = (world / "train.jsonl").read_text().splitlines()[:3]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    settings = curate.Settings(tmp_path / "captions.jsonl", tmp_path / "out", root=world, workers=0, samples=0)
    assert curate.main(settings, Console(quiet=True)).total() == 3
    assert no_proc == []


def test_a_peak_is_that_of_its_own_time():
    """What is held at one moment is seen; one that begins later does not see it; what is held before is in both."""
    held = memory.held_bytes(CPU)
    with memory.PeakMemory(CPU) as first:
        big = torch.ones(2**24)  # 64 MiB
        for _ in range(10_000):
            if first.peak > held + 60 * 2**20:
                break
            big.add_(1)
        del big
    assert first.stop() > held + 60 * 2**20 and first.thread is None
    with memory.PeakMemory(CPU) as second:
        torch.ones(10)
    assert second.stop() < first.stop() - 50 * 2**20
    assert memory.measured(3 * 2**30, 2**30) == "memory, measured: 2.00 GiB at the peak of the first step"


def test_memory_that_is_not_known_refuses_nothing(no_proc):
    """But for what --memory-gb says; and no advice claims that something fits."""
    assert math.isnan(memory.available(CPU)) and math.isnan(memory.held_bytes(CPU))
    hf = memory.skeleton("random:qwen2.5-vl-7b")
    load = memory.Load(clips=1, visual_tokens=2048, text_tokens=160)
    settings = dict(
        quantize="none", lora_rank=0, freeze_vision=False, gradient_checkpointing=False, shard=False, max_frames=32
    )
    assert "not known" in memory.check_memory(hf, load, settings, CPU, None).title
    with pytest.raises(ValueError, match=r"there are 24\.0"):
        memory.check_memory(hf, load, settings, CPU, 24.0)
    advice = memory.advice(hf, load, settings, False, memory.available(CPU))
    assert "GiB" in advice and "fits" not in advice


def test_a_small_model_on_a_cpu_has_one_thread(threads, qwen2_5, monkeypatch):
    """Not a large one, not one on a GPU, and not if OMP_NUM_THREADS is set; whoever loads it to evaluate has it, too."""
    with torch.device("meta"):
        large = AutoModelForImageTextToText.from_config(sizes.random_config("qwen3-vl-2b"))
    models.choose_threads(large, CPU)
    small = memory.skeleton(str(qwen2_5))
    models.choose_threads(small, "cuda")
    assert threads == [] and runs.describe_environment()["device"].endswith("2 threads")
    models.load_model(str(qwen2_5))
    assert threads == [1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    models.choose_threads(small, CPU)
    assert threads == [1]


def test_workers_are_not_forked_on_macos(monkeypatch):
    """Forking a process that has loaded torch can crash it there."""
    assert workers.worker_context("data.loader").get_start_method() == "forkserver" or sys.platform == "darwin"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert workers.worker_context("data.loader").get_start_method() == "spawn"


def test_the_cpu_is_used_where_there_is_mps(monkeypatch):
    """On a Mac torch has a GPU of Apple's, which nothing here was tried on: everything stays on the CPU."""
    seen = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(processes, "Accelerator", lambda **more: seen.update(more) or Accelerator(**more))
    assert processes.start_processes().device == CPU and seen["cpu"] is True


@pytest.mark.parametrize(
    "version", ["4.57.6", "5.0.0", "5.17.1", "6.0.0", "6.1.0.dev0", "5.18.0", "5.23.0", "5.24.0", "5.30.1rc1"]
)
def test_other_versions_of_transformers_are_refused(version):
    """By name, with the command that helps: older ones drop the video in silence."""
    fits = version.startswith(("5.18", "5.23", "5.24", "5.30"))
    with (
        contextlib.nullcontext()
        if fits
        else pytest.raises(ImportError, match=rf"transformers {version} .*5\.18\.0 to 5\.24\.0")
    ):
        data.check_transformers(version)


STEP = """
import importlib, json, pkgutil, sys
import torch, transformers
import vp, kernels.contrastive, kernels.logprob, kernels.reward, data.videolm
assert "torchcodec" not in sys.modules  # what a GPU machine without FFmpeg needs; sentence-transformers imports it
ours = [f"data.{module.name}" for module in pkgutil.iter_modules([f"{sys.argv[1]}/data"])]
for name in ["eval", "train_sft", "train_rl", *ours]:
    importlib.import_module(name)
from data.run import models
numbers = []
for checkpoint, examples in zip(sys.argv[2::2], sys.argv[3::2]):
    hf = models.load_trainable(checkpoint, "none", 0, False, True, torch.device("cpu"))
    torch.manual_seed(0)
    lm = data.videolm.VideoLM(hf).train()
    out = lm(lm.collate(torch.load(examples, weights_only=False)))
    (out.lm_loss + out.contrastive_loss).backward()
    gradient = sum(float(p.grad.abs().sum()) for p in hf.parameters())
    numbers += [out.lm_loss.item(), out.contrastive_loss.item(), gradient]
print(json.dumps([transformers.__version__, numbers]))
"""


@pytest.fixture(scope="module")
def steps(world, tmp_path_factory) -> list[Path]:
    """A tiny checkpoint and four examples of each family, and what one step gives with the transformers of this process."""
    folder, arguments = tmp_path_factory.mktemp("steps"), []
    for family in FAMILIES:
        checkpoint = build_tiny(folder / family, family, seed=1)
        processor = AutoProcessor.from_pretrained(checkpoint)
        clips, _ = load_clips(world / "train.jsonl")
        torch.save([prepare(clip, Preparation(processor, 8)) for clip in clips[:2]], folder / f"{family}.pt")
        arguments += [checkpoint, folder / f"{family}.pt"]
    return arguments


@pytest.mark.parametrize("version", [".".join(map(str, v)) for v in (data.OLDEST, data.NEWEST)])
def test_oldest_and_newest_transformers(version, steps, tmp_path, capfd, monkeypatch):
    """Every module can be imported, and a training step has the same losses and gradients. `make setup` puts both there."""
    folder = Path(sys.prefix) / f"transformers-{version}"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; run `make setup`")
    command = [sys.executable, "-c", STEP, HERE, *steps]
    env = os.environ | {"PYTHONPATH": f"{folder}:{HERE}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, numbers = json.loads(done.stdout)
    monkeypatch.setattr(sys, "argv", ["-c", HERE, *map(str, steps)])
    exec(STEP.replace('assert "torchcodec"', 'True or "torchcodec"'), {})
    here, expected = json.loads(capfd.readouterr().out)
    assert (name, here) == (version, transformers.__version__) and numbers == pytest.approx(expected, rel=1e-4)


def test_versions_are_the_same_everywhere():
    """The README names what is promised, and make setup installs it for the test above."""
    oldest, newest = (".".join(map(str, v)) for v in (data.OLDEST, data.NEWEST))
    assert f"transformers {oldest} to {newest}" in " ".join((HERE / "README.md").read_text().split())
    assert re.search(rf"for version in {oldest} {newest};", (HERE / "Makefile").read_text())


@pytest.mark.parametrize("case", ["missing", "unexpected", "mismatched", "head", "cut off"])
def test_weights_that_do_not_fit_are_refused(qwen2_5, tmp_path, case):
    """By name, where transformers fills in random numbers and goes on: a checkpoint of other versions lost its head so."""
    folder = tmp_path / "other"
    folder.mkdir()
    for path in qwen2_5.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    file, key = folder / "model.safetensors", "visual.patch_embed.proj.weight"
    weights = load_file(file)
    if case == "missing":
        del weights[key]
    if case == "unexpected":
        key = "visual.other.weight"
        weights[key] = torch.ones(2)
    if case == "mismatched":
        weights[key] = torch.ones(2)
    if case == "head":  # the embeddings are no longer the head, and no other head is there
        config = json.loads((folder / "config.json").read_text())
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
        (folder / "config.json").write_text(json.dumps(config))
        case, key = "missing", "lm_head.weight"
    save_file(weights, file, {"format": "pt"})
    if case == "cut off":
        file.write_bytes(file.read_bytes()[:-9])
        case, key = "", ""
    with pytest.raises(ValueError, match=re.escape(f"--model {folder}: ") + f".*{case}.*{re.escape(key)}"):
        models.load_model(str(folder))


def test_an_adapter_that_does_not_fit_is_refused(qwen2_5, tmp_path):
    """peft warns of a missing part, and goes on without it; of others it says nothing."""
    hf = models.load_trainable(str(qwen2_5), "none", 2, True, False, CPU)
    merge.save_model(tmp_path, hf, models.load_processor(qwen2_5), merged=False)
    models.load_pretrained(tmp_path, torch.float32)
    file = tmp_path / "adapter" / models.ADAPTER_FILE
    weights = load_file(file)
    key = next(iter(weights))
    save_file({f"{k}.more" if k == key else k: w for k, w in weights.items()}, file)
    with pytest.raises(ValueError, match=rf"adapter: .*missing: {re.escape(key)}; unexpected: {re.escape(key)}\.more"):
        models.load_pretrained(tmp_path, torch.float32)


def test_checkpoints_say_what_older_transformers_look_for(checkpoint, tmp_path):
    """4.57 reads three things by other names; without them it stops, or has a random head. They change nothing for 5."""
    hf, processor = models.load_pretrained(str(checkpoint), torch.float32)
    merge.save_model(tmp_path, hf, processor, merged=True)
    for folder in (tmp_path, checkpoint):  # what a run saves, and what data/tiny.py does
        text = json.loads((folder / "config.json").read_text())["text_config"]
        assert text["tie_word_embeddings"] is True and text["rope_theta"] == 10000.0
        assert text["rope_scaling"]["mrope_section"] == [4, 6, 6] and text["rope_scaling"]["rope_type"] == "default"
        tokens = json.loads((folder / "tokenizer_config.json").read_text())
        assert "<|video_pad|>" in tokens["additional_special_tokens"] and "extra_special_tokens" not in tokens
    again, processor_again = models.load_pretrained(str(tmp_path), torch.float32)
    ids = torch.arange(20)[None] + 30
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, hf.eval()(ids).logits)
    text = "<|im_start|>user\n<|video_pad|> a circle<|im_end|>"
    assert processor_again.tokenizer(text).input_ids == processor.tokenizer(text).input_ids
    assert processor_again.tokenizer.all_special_ids == processor.tokenizer.all_special_ids


@pytest.mark.parametrize("script", [train_sft, train_rl])
def test_speed_after_resume_is_that_of_this_process(script, world, qwen2_5, tmp_path, monkeypatch):
    """The first line after --resume divided this process's seconds by the steps of both; stage 2 took the mean of both."""
    seconds = [100.0]  # of a tick of the clock

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            Clock.now += seconds[0]
            return Clock.now

    steps_done = []
    if script is train_sft:  # a tick each step
        forward = videolm.VideoLM.forward
        monkeypatch.setattr(videolm.VideoLM, "forward", lambda *a: steps_done.append(1) or forward(*a))
        clock = SimpleNamespace(perf_counter=lambda: len(steps_done) * seconds[0])
        more = {"sheets": 0}
    else:
        clock = Clock()
        more = {"num_rollouts": 2, "num_twin_rollouts": 2, "max_new_tokens": 2, "show_every": -1}
    for module in (run, runs):
        monkeypatch.setattr(module, "time", clock)
    more |= dict(steps=8, batch_size=2, micro_batch_size=2, workers=0, log_every=4, save_every=6, out=tmp_path / "o")
    settings = dict(model=str(qwen2_5), data=world / "train.jsonl") | more
    script.main(script.Settings(**settings))
    for path in (tmp_path / "o/checkpoint-000008").rglob("files.json"):
        path.unlink()  # broken: the run goes on from step 6, two steps into a line
    seconds[0] = 1.0
    steps_done.clear()
    script.main(script.Settings(**settings, resume=True))
    last = [json.loads(x) for x in (tmp_path / "o/metrics.jsonl").open()][-1]
    name = "perf/step_seconds" if script is train_sft else "perf/reward_seconds"
    assert last["step"] == 8 and last[name] == 1.0
