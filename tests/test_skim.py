"""Long videos: windows and context of different sizes against plain transformers, the budget, the skim, the cache."""

import itertools
import json
import math
import os
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torchcodec.encoders import VideoEncoder

import data.examples
import data.skim
import data.video
import train_rl
import train_sft
import vp
from data import videolm
from data.clips import load_clips
from data.curation import curate
from data.decode import open_video
from data.examples import Preparation, make_example, prepare, process_look
from data.files import ClipError
from data.look import Look, share_out, twin_sources
from data.measure import evaluate as evaluation
from data.measure import long
from data.run.settings import FrameSettings
from data.skim import Skim, choose_windows, frames_to_skip, lay_windows, motion_curve, skim
from data.video import Clip, Frames, read_clip, read_frames
from data.world import SAME_BYTES

LENGTH = 5  # tokens of a rollout


def write_long(path: Path, seconds: float = 40.0, event: float | None = 27.0, fps: float = 8.0) -> Path:
    """A still, noisy scene with a white block that is there for half a second."""
    rng = np.random.default_rng(0)
    scene = rng.integers(60, 120, (1, 3, 48, 48))
    video = np.repeat(scene, round(seconds * fps), 0) + rng.integers(0, 3, (round(seconds * fps), 3, 48, 48))
    if event is not None:
        video[round(event * fps) : round((event + 0.5) * fps), :, 12:28, 20:36] = 250
    VideoEncoder(torch.from_numpy(video.astype(np.uint8)), frame_rate=fps).to_file(path, crf=12, extra_options=SAME_BYTES)
    return path


@pytest.fixture(scope="session")
def long_video(tmp_path_factory) -> Path:
    """40 s, an event at 27.0 to 27.5 s."""
    return write_long(tmp_path_factory.mktemp("long") / "long.mp4")


def mixed_look(rng: np.random.Generator, whole_window: bool = False) -> tuple[Look, list]:
    """Context, a window, context, a window, context, of unequal steps; and a key span: part of a window, or all of it."""
    runs, windows, last = [], [], []
    for begin, end, slots, size, number in (
        (0.0, 10.0, 2, 24, 0), (10.0, 12.0, 3, 72, 1), (12.0, 31.0, 1, 24, 0), (31.0, 33.0, 3, 72, 2),
        (33.0, 40.0, 2, 24, 0),
    ):  # fmt: skip
        step = (end - begin) / (2 * slots)
        times = [begin + (i + 0.5) * step for i in range(2 * slots)]
        pixels = torch.from_numpy(rng.integers(0, 256, (2 * slots, 3, size, size)).astype(np.uint8))
        runs.append(Frames(pixels, times, 8.0, 40.0, step))
        windows += [number] * slots
        last += [*times[2::2], end]
    return Look(runs, torch.tensor(windows), last, sized=True), [[[10.0, 12.0] if whole_window else [10.9, 11.3]]]


@pytest.fixture
def mixed(preparation, world) -> list[vp.Example]:
    """Two clips of slots of two sizes, one of them with a window that is all key, and one clip of the world."""
    examples = []
    for seed, whole in enumerate((False, True)):
        look, spans = mixed_look(np.random.default_rng(seed), whole)
        clip = Clip(Path("a.mp4"), "a circle. Something swells up", "a:1", keywords=["swells up"], key_spans=spans)
        examples.append(make_example(clip, look, preparation))
    return [*examples, prepare(load_clips(world / "train.jsonl")[0][0], preparation)]


def positions_by_token(e: vp.Example, config, ids: torch.Tensor) -> torch.Tensor:
    """M-RoPE positions (3, T), token by token, by the published rule; each slot at its own second."""
    merge, per_second = config.vision_config.spatial_merge_size, getattr(config.vision_config, "tokens_per_second", 0)
    sizes = [(int(h) // merge, int(w) // merge) for t, h, w in e.runs for _ in range(int(t))]
    seconds = [s * e.seconds_per_slot for s in range(len(sizes))] if e.slot_seconds is None else e.slot_seconds.tolist()
    types = [*e.token_types.tolist(), *[0] * len(ids)][: len(ids)]
    places, largest, slot, i = [], -1, 0, 0
    while i < len(ids):
        if types[i] == 0:
            largest += 1
            places.append((largest, largest, largest))
            i += 1
            continue
        start, zero, run = largest + 1, seconds[slot], []
        while i < len(ids) and types[i] == 2:
            h, w = sizes[slot]
            t = int(np.float32(np.float32(seconds[slot]) - np.float32(zero)) * np.float32(per_second))
            run += [(start + t, start + y, start + x) for y in range(h) for x in range(w)]
            slot, i = slot + 1, i + h * w
        places += run
        largest = max(map(max, run))
    return torch.tensor(places).T


def plain_call(hf, e: vp.Example, ids: torch.Tensor | None = None, pixels: torch.Tensor | None = None, **more):
    """A plain Hugging Face model on one clip, its positions worked out above."""
    ids = e.input_ids if ids is None else ids
    types = torch.zeros_like(ids)
    types[: len(e.token_types)] = e.token_types[: len(ids)]
    return hf(
        input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], mm_token_type_ids=types[None],
        position_ids=positions_by_token(e, hf.config, ids)[:, None],
        pixel_values_videos=e.pixels if pixels is None else pixels, video_grid_thw=e.runs, **more,
    )  # fmt: skip


def degraded(e: vp.Example) -> torch.Tensor:
    """The patches of the twin's frames, as if they had been shown."""
    slots = e.by_slot(e.pixels)
    return torch.cat([slots[s] for s in e.source.tolist()])


# --- Slots of different sizes, against plain transformers -----------------------------------------------------------------


def test_mixed_example(mixed, preparation):
    """Sizes, seconds and sources of what is shown; timestamps stand before each slot where the family writes them."""
    e = mixed[0]
    assert e.runs.tolist() == [[2, 3, 3], [3, 9, 9], [1, 3, 3], [3, 9, 9], [2, 3, 3]] and e.num_slots == 11
    assert int((e.token_types == 2).sum()) == 5 * 1 + 6 * 9
    assert e.keywords[0].slots.nonzero().flatten().tolist() == [3]  # 10.67 to 11.33 s
    assert e.source.tolist() == [0, 1, 2, 2, 4, *range(5, 11)]
    assert mixed[1].source.tolist() == [0, 1, 6, 7, 8, 5, 6, 7, 8, 9, 10]  # a whole window is shown as the decoy
    seconds = torch.tensor([1.25, 6.25, 10.1667, 10.8333]) - 1.25
    torch.testing.assert_close(e.slot_seconds[:4], seconds, atol=1e-3, rtol=0)
    text = preparation.processor.tokenizer.decode(e.input_ids)
    assert "<|vision_end|><|vision_start|>" not in text
    if "second_per_grid_ts" not in preparation.processor.model_input_names:
        assert "<2.5 seconds>" in text and "<11.0 seconds>" in text and "<21.5 seconds>" in text


def test_mixed_logits_equal_plain_transformers(lm, plain, mixed):
    """Caption loss of a padded batch of mixed and uniform clips, its states at layer l, and its positions."""
    batch = lm.collate(mixed)
    with torch.no_grad():
        got = lm(batch, contrastive=False).lm_loss
        want = torch.zeros(())
        for b, e in enumerate(mixed):
            n = len(e.input_ids)
            assert torch.equal(batch.position_ids[:, b, :n], positions_by_token(e, lm.config, e.input_ids))
            logits = plain_call(plain, e).logits[0]
            at = torch.arange(e.prompt_length, n)
            want += torch.nn.functional.cross_entropy(logits[at - 1], e.input_ids[at], reduction="sum")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_mixed_twin_is_a_gather(lm, plain, mixed):
    """Gathered features equal those of the encoded degraded frames (1e-5), deepstack too, windows and context mixed."""
    batch = lm.collate(mixed)
    with torch.no_grad():
        full = lm.encode_video(batch)
        sizes = [len(x) for x in full.pooler_output]
        assert sizes == [int((e.token_types == 2).sum()) for e in mixed]
        picked = lm.gather_video(full, lm.collate(mixed, for_generation=True).twin_index)
        for e, twin in zip(mixed, torch.cat(picked.pooler_output).split(sizes)):
            really = torch.cat(list(plain.model.get_video_features(degraded(e), e.runs).pooler_output))
            torch.testing.assert_close(twin, really, rtol=1e-5, atol=1e-5)
        if lm.config.model_type == "qwen3_vl":
            deep = [plain.model.get_video_features(degraded(e), e.runs).deepstack_features for e in mixed]
            for layer, mine in enumerate(picked.deepstack_features):
                want = torch.cat([run for of_clip in deep for run in of_clip[layer]])
                torch.testing.assert_close(torch.cat(list(mine)), want, rtol=1e-5, atol=1e-5)


def test_mixed_contrastive_loss(lm, mixed):
    """Key rows are those of key slots, whatever their size; the twin's states are those of the degraded video (1e-4)."""
    batch = lm.collate(mixed)
    rows = []
    for b, e in enumerate(mixed):
        places = e.by_slot((e.token_types == 2).nonzero().squeeze(1))
        key = torch.stack([k.slots for k in e.keywords]).any(0).tolist() if e.source is not None else []
        rows += [b * batch.input_ids.shape[1] + places[s] for s, is_key in enumerate(key) if is_key]
    assert torch.equal(batch.key_rows, torch.cat(rows))
    twins = batch.forked.position_ids.flatten(1)[:, batch.twin_rows]
    assert torch.equal(twins, batch.position_ids.flatten(1)[:, batch.key_rows])
    assert (batch.forked.branch.flatten()[batch.twin_rows] == 2).all()  # 0: what is shared, 1: the full video
    out = lm(batch)
    out.contrastive_loss.backward()
    shown = [replace(e, pixels=degraded(e)) for e in mixed]
    with torch.no_grad():
        mine, really = lm(lm.collate(mixed), True, True), lm.encode_examples(shown)
        torch.testing.assert_close(mine.contrastive_loss, out.contrastive_loss.detach())
        gathered = lm.gather_video(lm.encode_examples(mixed), lm.collate(mixed, for_generation=True).twin_index)
        torch.testing.assert_close(torch.cat(gathered.pooler_output), torch.cat(really.pooler_output), rtol=1e-5, atol=1e-5)
    assert out.contrastive_loss > 0 and out.metrics["positives"] > 0


def test_mixed_rollouts_and_update(lm, plain, mixed):
    """Shared prefix, rollouts and their log-probabilities equal plain transformers, clip by clip, full and twin."""
    lm.eval()
    numbers = torch.from_numpy(np.random.default_rng(0).random((3, 4, LENGTH), np.float32))
    got, video = lm.roll_out(mixed, 2, 2, LENGTH, numbers)
    ys = [[y[:n] for y, n in zip(rows[:2], lengths)] for rows, lengths in zip(got.tokens, got.lengths.tolist())]
    packed = lm.pack_rollouts(mixed, ys)
    logp, _ = lm.log_probs(packed, video)
    again, _ = lm.log_probs(lm.pack_rollouts(mixed[1:], ys[1:]), lm.take_clips(video, [1, 2]))
    torch.testing.assert_close(again, logp[len(logp) - len(again) :], rtol=1e-4, atol=1e-5)
    sampled = torch.cat([p[:n] for ps, ns in zip(got.logp, got.lengths.tolist()) for p, n in zip(ps[:2], ns)])
    torch.testing.assert_close(logp, sampled, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for b, e in enumerate(mixed):
            for r in range(4):
                y = got.tokens[b, r, : got.lengths[b, r]]
                ids = torch.cat([e.input_ids[: e.prompt_length], y])
                pixels = e.pixels if r < 2 else degraded(e)
                states = plain_call(plain, e, ids, pixels).logits[0, e.prompt_length - 1 : -1]
                states[:, lm.banned] = -torch.inf
                want = states.log_softmax(-1).gather(1, y[:, None]).squeeze(1)
                torch.testing.assert_close(got.logp[b, r, : len(y)], want, rtol=1e-4, atol=1e-5)


def test_runs_of_one_size_are_what_the_processor_makes(preparation, world):
    """A video cut into runs gives the tokens, patches and positions of plain transformers' processor for the whole."""
    clip = load_clips(world / "train.jsonl")[0][0]
    whole = preparation.look(clip)
    (frames,) = whole.runs
    cuts = [slice(0, 4), slice(4, 14), slice(14, 16)]
    parts = [replace(frames, pixels=frames.pixels[at], timestamps=frames.timestamps[at]) for at in cuts]
    clip.key_spans = [[clip.truth["span"]]]
    cut = Look(parts, torch.zeros(8, dtype=torch.long), [*whole.timestamps[2::2], whole.runs[0].duration], sized=True)
    text = data.examples.chat(preparation.processor, clip.prompt, 3)
    inputs, shown = process_look(preparation.processor, text, cut, preparation)
    plain_text = data.examples.chat(preparation.processor, clip.prompt)
    want = data.examples.process(preparation.processor, [plain_text], [frames])
    assert torch.equal(inputs["input_ids"], want["input_ids"])
    assert torch.equal(inputs["mm_token_type_ids"], want["mm_token_type_ids"])
    assert torch.equal(shown["pixels"], want["pixel_values_videos"])
    assert shown["grid"].tolist() == [[2, 6, 6], [5, 6, 6], [1, 6, 6]]
    a, b = (make_example(clip, look, preparation) for look in (whole, cut))
    assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.source, b.source)
    torch.testing.assert_close(b.slot_seconds, torch.arange(8) * 0.25)


def test_a_short_clip_is_sampled_uniformly(preparation, world):
    """--frames skim shows the same example as uniform sampling where a clip is short enough for a close look."""
    clip = load_clips(world / "train.jsonl")[0][0]
    a, b = prepare(clip, preparation), prepare(clip, replace(preparation, skim=Skim(fps=8.0)))
    assert a.grid.ndim == b.grid.ndim == 1 and b.slot_seconds is None
    for name in ("input_ids", "pixels", "grid", "source"):
        assert torch.equal(getattr(a, name), getattr(b, name))


# --- The twin ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_twin_sources_keep_the_size(seed):
    """A slot is replaced by one of its size that shows no key slot: the nearest of its window, or another window's."""
    rng = np.random.default_rng(seed)
    windows = torch.tensor([w for w, n in ((0, 3), (1, 4), (0, 2), (2, 3), (3, 2), (0, 3)) for _ in range(n)])
    key = torch.from_numpy(rng.random(len(windows)) < (0.3, 0.6)[seed % 2])
    source = twin_sources(key, windows)
    if key[windows > 0].all() or key[windows == 0].all():
        assert source is None
        return
    for window in (0, 1, 2, 3):
        own = (windows == window).nonzero().flatten().tolist()
        kept = [t for t in own if not key[t]]
        lost = [t for t in own if key[t]]
        for t in lost:
            s = int(source[t])
            assert not key[s] and (windows[s] > 0) == (window > 0)
            if kept:
                assert windows[s] == window and abs(s - t) == min(abs(k - t) for k in kept)
    assert source is not None and all(int(source[t]) == t for t in range(len(key)) if not key[t])


def test_a_slot_ends_with_its_window():
    """What happens between a window and the next context slot marks neither."""
    times, last = [0.0, 0.25, 0.5, 0.75, 20.0, 25.0], [0.5, 1.0, 30.0]
    assert vp.span_slots([[5.0, 6.0]], times, 2, last).tolist() == [False, False, False]
    assert vp.span_slots([[0.9, 21.0]], times, 2, last).tolist() == [False, True, True]


# --- The budget ----------------------------------------------------------------------------------------------------------


def test_budget_is_never_exceeded():
    """Over durations of 0.2 s to 10 h, any K, any budget: at most the budget, nothing wasted, and too small says so."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        duration, num = math.exp(rng.uniform(math.log(0.2), math.log(36000))), int(rng.integers(1, 65))
        seconds = min(float(rng.uniform(0.1, 5.0)), duration)
        free = max(0, int(duration / seconds) - 1)
        starts = [float(i * seconds) for i in rng.permutation(max(1, free))[:num]]
        small, dense = int(rng.integers(1, 60)), int(rng.integers(1, 33))
        full, budget = small * int(rng.integers(1, 9)), int(rng.integers(1, 5000))
        if budget < full:
            with pytest.raises(ValueError, match=r"--visual-tokens \d+: one window"):
                share_out(budget, starts, seconds, duration, dense, full, small)
            continue
        got = share_out(budget, starts, seconds, duration, dense, full, small)
        assert 1 <= got.windows <= len(starts) and 1 <= got.window_slots <= dense
        assert len(got.gap_slots) == got.windows + 1 and min(got.gap_slots) >= 0
        assert got.tokens == got.windows * got.window_slots * full + sum(got.gap_slots) * small <= budget
        if got.windows > 1:
            assert got.window_slots >= dense / 2
        if duration > (got.windows + 1) * seconds:  # there is a gap: not even one more slot would fit
            assert budget - got.tokens < small


@pytest.mark.parametrize("frames", ["uniform", "skim"])
def test_tokens_of_real_clips(preparation, long_video, world, frames):
    """What is made of a long and of a short file has at most the tokens asked for; too few are named with the flag."""
    short = load_clips(world / "train.jsonl")[0][0].video
    for video, budget in itertools.product((short, long_video), (9, 20, 31, 64)):
        how = FrameSettings(frames=frames, visual_tokens=budget).how_to_look()
        made = prepare(Clip(video, "a", "x"), replace(preparation, max_frames=64, visual_tokens=budget, skim=how))
        least = budget / 2 if video == long_video else 0
        assert least < int((made.token_types == 2).sum()) <= budget
    with pytest.raises(ClipError, match=r"x: .*--visual-tokens 3"):
        prepare(Clip(long_video, "a", "x"), replace(preparation, visual_tokens=3, skim=how))


@pytest.mark.parametrize("name", ["visual_tokens", "windows", "window_seconds", "window_fps", "skim_fps"])
def test_settings_that_cannot_be(name):
    """Each is named with its flag."""
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}: got 0"):
        FrameSettings(**{name: 0}).check_frames()


# --- The skim ------------------------------------------------------------------------------------------------------------


def test_skim_finds_the_event(preparation, long_video, tmp_path):
    """The first window holds the event; where nothing happens, frames are uniform and the look says so."""
    how = Skim(windows=2, seconds=2.0)
    look = replace(preparation, skim=how).look(Clip(long_video, "a", "x"))
    start, end = look.spans[0]
    assert start <= 27.0 and end >= 27.5 and end - start == pytest.approx(2.0)
    inside = [t for t in look.timestamps if start <= t < end]
    assert len(inside) >= 8 and look.timestamps == sorted(look.timestamps)
    assert look.windows.unique().tolist()[0] == 0 and "windows of 2 s" in look.note
    still = replace(preparation, skim=how).look(Clip(write_long(tmp_path / "still.mp4", event=None), "a", "x"))
    assert still.note == "uniform sampling: nothing stands out" and len(still.runs) == 1 and len(still.timestamps) == 16


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg program")
def test_skim_by_ffmpeg_is_the_same_curve(long_video, monkeypatch):
    """FFmpeg's program gives as many pictures as torchcodec, of the same moments, from the middle of a file, too."""
    clip = Clip(long_video, "a", "x", start=5.0, end=35.0)
    slow, times = read_clip(clip, lambda video: skim(clip, video))
    monkeypatch.setattr(data.skim, "LONG", 10.0)
    with monkeypatch.context() as patch:
        patch.setattr(data.skim, "read_moments", read_one)
        fast, again = read_clip(clip, lambda video: skim(clip, video))
    assert fast.shape == slow.shape and times == again
    peaks = [int(motion_curve(pixels, times).argmax()) for pixels in (slow, fast)]
    assert abs(peaks[0] - peaks[1]) <= 1 and abs(times[peaks[1]] - 22.25) <= 0.5
    # Each core takes a part, and the parts join without a seam.
    for cores in (1, 2, 3):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        parts, _ = read_clip(clip, lambda video: skim(clip, video))
        assert torch.equal(parts, fast)


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="no ffprobe program")
@pytest.mark.parametrize("more, name, step, skipped", [
    (["-g", "100", "-bf", "3"], "a.mp4", 1.0, "bidir"),
    (["-g", "100", "-bf", "3"], "a.mkv", 1.0, "bidir"),
    (["-g", "4"], "a.mp4", 1.0, "nokey"),  # a key frame every half second
    (["-g", "100", "-bf", "0"], "a.mp4", 1.0, "bidir"),  # no B-frames at all: nothing is left out
    (["-g", "100", "-bf", "16", "-x264-params", "b-adapt=0"], "a.mp4", 0.5, "noref"),  # 17 frames lie between two others
    (["-c:v", "mpeg4", "-g", "100", "-bf", "2"], "a.mp4", 1.0, "noref"),
    (["-vf", "scale=128:128", "-c:v", "libx265", "-x265-params", "log-level=none:keyint=100"], "a.mp4", 1.0, "noref"),
])  # fmt: skip
def test_what_a_skim_leaves_out(more, name, step, skipped, long_video, tmp_path, monkeypatch):
    """Never so much that it would show one picture for longer than a step."""
    path = tmp_path / name
    done = subprocess.run(["ffmpeg", "-v", "error", "-i", long_video, "-t", "20", *more, path], capture_output=True)
    if done.returncode:
        pytest.skip("this FFmpeg has no such encoder")
    assert frames_to_skip(open_video(path), step) == skipped
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert frames_to_skip(open_video(path), step) in ("nokey", "noref")  # without ffprobe nothing is known of B-frames


def read_one(*arguments):
    """`read_moments`, of one moment at most."""
    assert len(arguments[2]) == 1
    return data.video.read_moments(*arguments)


def test_curve_in_chunks():
    """A curve that is taken in chunks is that of the whole, but for what a chunk knows of cuts."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(100, 110, (200, 3, 32, 32)).astype(np.uint8))
    pixels[90:93, :, 8:16, 8:16] = 250
    times = [i / 2 for i in range(200)]
    torch.testing.assert_close(motion_curve(pixels, times, chunk=40), motion_curve(pixels, times, chunk=1000))


@pytest.mark.parametrize("seed", range(10))
def test_windows_are_apart_and_inside(seed):
    """Any curve: at most K windows, as long as asked, apart, inside the clip, the highest first."""
    rng = np.random.default_rng(seed)
    curve, times = torch.from_numpy(rng.random(60) ** 8).float(), [0.25 + i / 2 for i in range(60)]
    windows = choose_windows(curve, times, 5, 3.0, 30.0)
    assert 1 <= len(windows) <= 5
    assert all(a >= 0 and b <= 30.0 + 1e-6 and b - a == pytest.approx(3.0) for a, b in windows)
    assert all(abs(a - b) >= 3.0 for (a, _), (b, _) in itertools.combinations(windows, 2))
    assert windows[0][0] <= times[int(curve.argmax())] + 0.5 and times[int(curve.argmax())] - 0.5 <= windows[0][1]


def test_training_windows_give_nothing_away():
    """Windows hold the key spans, at changing places, and at least one shows no event."""
    places = []
    for seed in range(50):
        windows = lay_windows([[20.0, 20.5], [20.0, 20.5], [50.0, 56.0]], 3, 2.0, 100.0, np.random.default_rng(seed))
        assert len(windows) == 3 and all(0 <= a <= 98 for a, _ in windows)
        assert any(a <= 20.0 and b >= 20.5 for a, b in windows)
        assert any(a >= 50.0 and b <= 56.0 for a, b in windows)
        assert sum((b <= 20.0 or a >= 20.5) and (b <= 50.0 or a >= 56.0) for a, b in windows) == 1
        assert all(abs(a - b) >= 2.0 for (a, _), (b, _) in itertools.combinations(windows, 2))
        places.append(next(20.0 - a for a, b in windows if a <= 20.0 < b))
    assert max(places) > 1.2 and min(places) < 0.3


def test_evaluation_does_not_look_at_the_truth(preparation, long_video):
    """Key spans move windows in training only."""
    clip = Clip(long_video, "a", "x", keywords=["a"], key_spans=[[[5.0, 5.5]]])
    looks = [replace(preparation, skim=Skim(windows=2, at_key_spans=at)).look(clip, (0, 0, 0)) for at in (False, True)]
    assert looks[0].spans[0][0] > 20
    assert looks[1].spans[0][0] <= 5.0 and looks[1].spans[0][1] >= 5.5
    assert make_example(clip, looks[1], preparation).source is not None


# --- Footage, cache, scripts ----------------------------------------------------------------------------------------------


def test_footage_is_one_video(preparation, world):
    """Clips one after another: each moment is shown by its clip, and a budget counts for the whole."""
    a, b, c = load_clips(world / "train.jsonl")[0][:3]
    whole = replace(b, footage=[a, c], before=1)
    look = replace(preparation, max_frames=12).look(whole)
    assert look.runs[0].duration == pytest.approx(6.0) and len(look.timestamps) == 12
    for i, clip in enumerate((a, b, c)):
        own = replace(preparation, max_frames=4).look(clip)
        assert torch.equal(look.runs[0].pixels[4 * i : 4 * i + 4], own.runs[0].pixels)
        assert look.timestamps[4 * i : 4 * i + 4] == pytest.approx([2.0 * i + t for t in own.timestamps])


@pytest.mark.parametrize("how", ["uniform", "jitter", "skim"])
def test_cache_gives_the_same_examples(preparation, long_video, world, tmp_path, monkeypatch, how):
    """Made, written and read: equal examples, without decoding; a damaged file is made again."""
    clip = load_clips(world / "train.jsonl")[0][1]
    if how == "skim":
        clip = Clip(long_video, "It swells up", "x", keywords=["swells up"])
    more = {"uniform": {}, "jitter": {"jitter": True}, "skim": {"skim": Skim(windows=2), "max_pixels": 24 * 48}}[how]
    plain = replace(preparation, **more)
    kept = replace(plain, cache=tmp_path)
    wanted, first = prepare(clip, plain, (0, 0, 3)), prepare(clip, kept, (0, 0, 3))
    with monkeypatch.context() as patch:
        patch.setattr(data.examples, "look", lambda *_: pytest.fail("decoded again"))
        second, other_epoch = prepare(clip, kept, (0, 0, 3)), prepare(clip, kept, (0, 1, 3))
    for made in (first, second, other_epoch):
        for name in ("input_ids", "pixels", "grid", "source", "slot_seconds"):
            got, want = getattr(made, name), getattr(first if how == "jitter" else wanted, name)
            assert (got is None and want is None) or torch.equal(got, want), name
        assert torch.equal(made.keywords[0].slots, first.keywords[0].slots)
    assert wanted.source is not None
    files = list(tmp_path.glob("*/*.safetensors"))
    assert len(files) == 1
    files[0].write_bytes(files[0].read_bytes()[:100])
    assert torch.equal(prepare(clip, kept, (0, 0, 3)).pixels, first.pixels)
    prepare(clip, replace(kept, max_frames=8), (0, 0, 3))
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2  # another setting is another file


def test_curation_finds_moments_in_long_files(long_video):
    """A file that is too long is left out, or skimmed: its key span is found closely, in seconds of the file."""
    clip = Clip(long_video, "a circle. It swells up", "x", keywords=["swells up"])
    s = curate.Settings(Path("a"), Path("b"), max_seconds=30.0, fps=8.0, max_frames=32, min_change=1.0)
    assert curate.inspect(clip, s)["rejected"] == "too long"
    record = curate.inspect(clip, replace(s, skim=True))
    assert "rejected" not in record and record["duration"] == pytest.approx(40.0) and record["kept"] == [0]
    ((start, end),) = record["key_spans"][0]
    assert 26.5 <= start <= 27.0 and 27.5 <= end <= 28.0


def test_scripts_train_on_windows(long_video, qwen2_5, tmp_path, monkeypatch):
    """A step of each stage on a long clip, with a cache: windows at the key span, a twin, and an evaluation."""
    line = {"video": "long.mp4", "caption": "a circle. It swells up", "keywords": ["swells up"], "key_spans": [[27, 27.5]]}
    (tmp_path / "clips.jsonl").write_text(f"{json.dumps(line)}\n" * 2)
    shutil.copy(long_video, tmp_path / "long.mp4")
    seen = []
    real = videolm.VideoLM.encode_examples
    monkeypatch.setattr(videolm.VideoLM, "encode_examples", lambda lm, e: seen.append(e) or real(lm, e))
    common = dict(
        data=tmp_path / "clips.jsonl", eval_data=tmp_path / "clips.jsonl", frames="skim", visual_tokens=120, windows=2,
        cache=tmp_path / "cache", workers=0, steps=1, batch_size=2, micro_batch_size=2, model=str(qwen2_5),
    )  # fmt: skip
    results = train_sft.main(train_sft.Settings(**common, out=tmp_path / "sft", sheets=1))
    assert results["clips"] == results["with twin"] == 2 and list((tmp_path / "sft").glob("sheet-*.png"))
    more = dict(num_rollouts=2, num_twin_rollouts=2, max_new_tokens=4, eval_before=False, beta=0.0)
    train_rl.main(train_rl.Settings(**common, **more, out=tmp_path / "rl"))
    assert all(e.grid.ndim == 2 and e.source is not None for examples in seen for e in examples)
    with pytest.raises(ValueError, match="--windows: got 1"):
        train_sft.resolve(train_sft.Settings(**common | {"windows": 1}))


def test_describe_shows_the_moments(long_video, qwen2_5, tmp_path):
    """`describe --frames skim` names the moments and draws them; by the model itself it needs to know what to look for."""
    console = Console(file=(tmp_path / "out").open("w+"), width=200)
    settings = evaluation.DescribeSettings(
        long_video, str(qwen2_5), max_new_tokens=2, frames="skim", visual_tokens=40, windows=1,
        picture=tmp_path / "look.png",
    )  # fmt: skip
    evaluation.run_describe(settings, console)
    evaluation.run_describe(replace(settings, finder="self", look_for="swells up", skim_fps=0.5), console)
    console.file.seek(0)
    shown = console.file.read()
    assert "moment 1: 26." in shown and (tmp_path / "look.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="--look-for"):
        evaluation.run_describe(replace(settings, finder="self"), console)


def test_long_footage_has_one_event(world):
    """What comes before and behind the event is played again and again; the event stands where it is said to stand."""
    frames = torch.arange(16)[:, None, None, None].expand(-1, 3, 2, 2)
    for seed in range(10):
        made, moved = long.lengthen(frames, (5, 8), 4, np.random.default_rng(seed))
        shown = made[:, 0, 0, 0].tolist()
        assert len(shown) == 64 and shown[5 + moved : 8 + moved] == [5, 6, 7]
        assert not {5, 6, 7} & {*shown[: 5 + moved], *shown[8 + moved :]}
        assert shown[4 + moved] == 4 and shown[8 + moved] == 8
        assert max(abs(a - b) for a, b in itertools.pairwise(shown)) == 1
    clips = load_clips(world / "test.jsonl")[0][:4]
    hidden, event = long.hide(clips[0], clips[1:], 3, False, random.Random(0))
    assert len(hidden.footage) == 2 and event[0] == pytest.approx(2.0 * hidden.before + clips[0].truth["span"][0])


def test_footage_leaves_quiet_clips_out(world, tmp_path):
    """A clip in which nothing happens has no event to be found; the others are made as long as asked for."""
    event = json.loads((world / "test.jsonl").read_text().splitlines()[0])
    still = event["truth"]["static"]
    quiet = event | {"caption": still, "keywords": [], "truth": {"static": still, "kind": "quiet", "usual": "fades"}}
    data = world / "two.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in (quiet, event)))
    settings = long.LongSettings(what="footage", data=data, out=tmp_path, lengths=(1, 3))
    assert [row["clips"] for row in long.make_footage(settings, Console())] == [1, 1]
    made = load_clips(tmp_path / "long-3.jsonl")[0]
    assert [clip.caption for clip in made] == [event["caption"]]
    assert len(read_frames(made[0], 10**6).timestamps) == 48
    begin, end = made[0].truth["span"]
    assert end - begin == pytest.approx(event["truth"]["span"][1] - event["truth"]["span"][0])


def test_named_counts_events_where_the_truth_is_known(monkeypatch, preparation):
    """`eval.py long --what named` shows the share of events named; without a truth, how much of the keywords is said."""
    scores = [{"event named": 0.25, "keyword recall": 0.75}, {"keyword recall": 0.75}]
    monkeypatch.setattr(long, "load_model", lambda _: (None, preparation.processor))
    monkeypatch.setattr(
        long, "load_clips", lambda _: ([Clip(Path("a.mp4"), "A man jumps.", "x:1", key_spans=[[[0, 1]]])], [])
    )
    monkeypatch.setattr(Preparation, "look", lambda *_: None)
    monkeypatch.setattr(long, "looked_at", lambda *_: {"window": 1.0, "seen": 1.0, "frames": 2.0})
    monkeypatch.setattr(long, "evaluate", lambda *_: {"full": scores.pop(0)})
    rows = long.measure_named(long.LongSettings(what="named", lengths=(4,)), Console())
    assert [(row["frames chosen"], row["event named"]) for row in rows] == [("uniform", 0.25), ("skim", 0.75)]


def test_what_a_measured_job_raises_is_raised_here():
    """A file that cannot be decoded ends `eval.py long` with its reason; it does not wait for ever."""
    with pytest.raises(ZeroDivisionError):
        long.timed(divmod, 1, 0)
    assert long.measure(divmod, 7, 2)[0] == (3, 1)
