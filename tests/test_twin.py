"""Twin construction, key spans and the model-free finder, against loops written by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

import vp
from data.clips import load_clips
from data.examples import Preparation, make_example, prepare, show_twin
from data.key_slots import find_key_slots
from data.video import read_frames
from data.world import draw_clip


@pytest.mark.parametrize("seed", range(20))
def test_twin_sources_against_a_search(seed):
    """Every place shows the nearest non-key slot, the earlier of two equally near."""
    rng = np.random.default_rng(seed)
    key = rng.random(rng.integers(2, 40)) < rng.uniform(0.1, 0.9)
    key[0], key[-1] = key[0] and not key.all(), key[-1]
    got = vp.twin_sources(torch.tensor(key))
    if key.all() or not key.any():
        assert got is None
        return
    for t, source in enumerate(got.tolist()):
        best = min((abs(t - other), other) for other in range(len(key)) if not key[other])
        assert source == best[1]


def test_a_run_is_split_in_the_middle():
    """A key run [a, b] becomes a-1 up to the middle and b+1 after it (design: ties go to the earlier)."""
    key = torch.zeros(8, dtype=torch.bool)
    key[2:6] = True
    assert vp.twin_sources(key).tolist() == [0, 1, 1, 1, 6, 6, 6, 7]


@pytest.mark.parametrize("key", [[0, 0, 0], [1, 1, 1]])
def test_no_twin(key):
    """Nothing to replace, or nothing to replace it with: no twin, not a copy."""
    assert vp.twin_sources(torch.tensor(key, dtype=torch.bool)) is None


@pytest.mark.parametrize("seed", range(10))
def test_span_slots_against_a_loop(seed):
    """A slot is key when its time, from its first frame to the next slot's, overlaps the span."""
    rng = np.random.default_rng(seed)
    num_slots, step = int(rng.integers(2, 20)), float(rng.uniform(0.05, 1))
    times = [i * step for i in range(2 * num_slots)]
    start = float(rng.uniform(0, times[-1]))
    end = start + float(rng.uniform(0.01, 1))
    got = vp.span_slots([[start, end]], times)
    for s in range(num_slots):
        begins, stops = 2 * s * step, 2 * (s + 1) * step
        assert bool(got[s]) == (max(begins, start) < min(stops, end))


def test_span_between_frames_marks_its_slot():
    """A span that no sampled frame falls into still belongs to a slot."""
    assert vp.span_slots([[0.6, 0.61]], [0.0, 0.25, 0.5, 0.75]).tolist() == [False, True]


def test_finder_on_decoded_world(world):
    """Issue bar: mean slot IoU with the truth of at least 0.9, on decoded MP4s."""
    ious = []
    for clip in load_clips(world / "train.jsonl")[0]:
        frames = read_frames(clip, 16)
        found, truth = find_key_slots(frames.pixels), vp.span_slots([clip.truth["span"]], frames.timestamps)
        ious.append(((found & truth).sum() / (found | truth).sum()).item())
    for index in range(200):  # more of them, without the encoder
        pixels, line = draw_clip("test", index, seed=3, quiet=0.0)
        found = find_key_slots(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        truth = vp.span_slots([line["truth"]["span"]], [t / 8 for t in range(16)])
        ious.append(((found & truth).sum() / (found | truth).sum()).item())
    assert np.mean(ious) >= 0.9


@pytest.mark.parametrize("frames", [4, 5, 6, 16])
def test_finder_finds_nothing_in_a_still(frames):
    """A frozen video, and one of pure noise, have no event."""
    rng = np.random.default_rng(frames)
    still = torch.full((frames // 2 * 2, 3, 20, 30), 77, dtype=torch.uint8)
    noise = torch.from_numpy(rng.integers(0, 9, still.shape).astype(np.uint8)) + still
    assert not find_key_slots(still).any()
    assert not find_key_slots(noise).any()


@pytest.mark.parametrize("size", [(48, 48), (120, 200)])
def test_finder_sees_one_flash(size):
    """One bright frame marks exactly its slot, also where frames are scaled down first."""
    pixels = torch.full((16, 3, *size), 50, dtype=torch.uint8)
    pixels[9, :, : size[0] // 2] = 250
    assert find_key_slots(pixels).nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("index", range(4))
def test_a_twin_as_a_quiet_clip(index, world, qwen2_5):
    """Its patches are those of the degraded video, its caption is the still part, and it has no twin of its own."""
    clip = load_clips(world / "train.jsonl")[0][index]
    clip = replace(clip, key_spans=[[clip.truth["span"]]])
    processor = AutoProcessor.from_pretrained(qwen2_5)
    preparation = Preparation(processor, 16)
    shown = show_twin(prepare(clip, preparation), clip, processor.tokenizer)
    frames = read_frames(clip, 16)
    source = vp.twin_sources(vp.span_slots([clip.truth["span"]], frames.timestamps))
    degraded = frames.pixels.unflatten(0, (-1, 2))[source].flatten(0, 1)
    still = replace(clip, caption=clip.truth["static"], keywords=[], key_spans=None)
    want = make_example(still, replace(frames, pixels=degraded), preparation)
    torch.testing.assert_close(shown.pixels, want.pixels)
    assert torch.equal(shown.input_ids, want.input_ids) and torch.equal(shown.token_types, want.token_types)
    assert shown.source is None and shown.keywords == []
