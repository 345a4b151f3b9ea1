"""Shared, built once a session: tiny checkpoints of both families and a small world, all offline."""

import os
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is imported; a GPU takes the kernels themselves

from transformers import AutoModelForImageTextToText, AutoProcessor

import vp
from data import videolm
from data.clips import load_clips
from data.examples import Preparation, prepare
from data.tiny import build_tiny
from data.workers import worker_context
from data.world import WorldSettings, write_clip

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="session", autouse=True)
def worker_server() -> None:
    """The server that worker processes are forked from, with what most of them need, whichever test comes first."""
    worker_context("data.loader")
    forkserver.ensure_running()


@pytest.fixture(scope="session", params=FAMILIES)
def checkpoint(request, tmp_path_factory) -> Path:
    """The folder of a tiny checkpoint, one test run for each family."""
    return build_tiny(tmp_path_factory.mktemp("tiny") / request.param, request.param, seed=1)


@pytest.fixture(scope="session")
def qwen2_5(tmp_path_factory) -> Path:
    """A tiny Qwen2.5-VL, for what does not depend on the family."""
    return build_tiny(tmp_path_factory.mktemp("tiny") / "qwen2_5_vl", "qwen2_5_vl", seed=1)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """48 training and 24 test clips, drawn in this process: those of `make_world` would import everything first."""
    folder = tmp_path_factory.mktemp("world")
    for split, count in (("train", 48), ("test", 24)):
        lines = [write_clip((WorldSettings(folder, habit=0.8, quiet=0.0), split, index)) for index in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


@pytest.fixture
def lm(checkpoint) -> videolm.VideoLM:
    """A VideoLM with random weights, float32, in training mode."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    return videolm.VideoLM(model).train()


@pytest.fixture
def plain(checkpoint) -> torch.nn.Module:
    """The same weights in a model that VideoLM has never touched: transformers' own attention, everywhere."""
    return AutoModelForImageTextToText.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="session")
def preparation(checkpoint) -> Preparation:
    """How the family's examples are made."""
    return Preparation(AutoProcessor.from_pretrained(checkpoint))


@pytest.fixture(scope="session")
def ragged(world, preparation) -> list[vp.Example]:
    """Four examples of unequal length: 16, 8, 12 and 6 frames, one without keywords."""
    clips, _ = load_clips(world / "train.jsonl")
    clips[2].keywords = []
    counts = (16, 8, 12, 6)
    return [prepare(c, Preparation(preparation.processor, n)) for c, n in zip(clips, counts)]
