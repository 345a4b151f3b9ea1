"""M-RoPE positions: the published rule, worked out by hand, and every path that uses them."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText

import vp
from data import videolm
from data.examples import make_example
from data.positions import rope_index, use_published_positions
from data.video import Frames
from tests.helpers import plain_inputs, published_positions

QWEN2_5 = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2))
QWEN2 = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
QWEN3 = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))


def positions(config, types: list[int], grids: list, seconds: list[float] | None) -> torch.Tensor:
    """(3, T) of one sequence, by `rope_index`."""
    types = torch.tensor([types])
    seconds = None if seconds is None else torch.tensor(seconds)
    return rope_index(config, types, types, None, torch.tensor(grids), seconds)[0][:, 0]


# seconds of a slot, slots, height and width in tokens: the temporal positions of the slots, the first of the text behind;
# three tokens of text stand before the video.
TABLE = [
    (1.0, 16, 8, 8, [3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33], 34),
    (1.0, 4, 8, 8, [3, 5, 7, 9], 11),  # short: higher than it is long
    (1.0, 4, 2, 9, [3, 5, 7, 9], 12),  # short and wide
    (1.0, 2, 1, 1, [3, 5], 6),
    (1.0, 1, 3, 5, [3], 8),
    (0.25, 8, 2, 2, [3, 3, 4, 4, 5, 5, 6, 6], 7),  # below a step of 1: neighbours share a position
    (0.4, 6, 2, 2, [3, 3, 4, 5, 6, 7], 8),
    (0.5, 4, 1, 2, [3, 4, 5, 6], 7),
    (0.75, 5, 2, 3, [3, 4, 6, 7, 9], 10),
    (2.0, 5, 2, 2, [3, 7, 11, 15, 19], 20),
    (3.3, 4, 2, 2, [3, 9, 16, 22], 23),
    (4.0, 3, 30, 4, [3, 11, 19], 33),
]


@pytest.mark.parametrize("seconds, slots, height, width, temporal, behind", TABLE)
def test_text_behind_a_video_follows_its_largest_position(seconds, slots, height, width, temporal, behind):
    """The table holds; rows and columns count from the video's start; text counts on by one in all three rows."""
    types = [0] * 3 + [2] * (slots * height * width) + [0] * 4
    got = positions(QWEN2_5, types, [[slots, 2 * height, 2 * width]], [seconds])
    video = got[:, 3:-4].view(3, slots, height, width)
    assert video[0, :, 0, 0].tolist() == temporal and (video[0] == video[0, :, :1, :1]).all()
    assert (video[1] == 3 + torch.arange(height)[:, None]).all() and (video[2] == 3 + torch.arange(width)).all()
    assert got[:, :3].tolist() == [[0, 1, 2]] * 3
    assert got[:, -4:].tolist() == [list(range(behind, behind + 4))] * 3
    assert torch.equal(got, published_positions(torch.tensor(types), [[slots, 2 * height, 2 * width]], [seconds], QWEN2_5))


def test_two_videos_in_a_prompt():
    """The second video starts behind the text that follows the first, each with its own interval."""
    types = [0] + [2] * 6 + [0] * 2 + [2] * 4 + [0]
    got = positions(QWEN2_5, types, [[6, 2, 2], [2, 2, 4]], [1.0, 2.0])
    assert got[0].tolist() == [0, 1, 3, 5, 7, 9, 11, 12, 13, 14, 14, 18, 18, 19]
    assert got[1].tolist() == [0, 1, 1, 1, 1, 1, 1, 12, 13, 14, 14, 14, 14, 19]
    assert got[2].tolist() == [0, 1, 1, 1, 1, 1, 1, 12, 13, 14, 15, 14, 15, 19]


def test_other_families():
    """Qwen2-VL counts slots by 1; Qwen3-VL and Qwen3.5 start each slot behind its timestamp."""
    assert positions(QWEN2, [0, *[2] * 5, 0], [[5, 2, 2]], None)[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    got = positions(QWEN3, [0, 2, 2, 0, 0, 2, 2, 0], [[2, 2, 4]], None)
    assert got.tolist() == [[0, 1, 1, 3, 4, 5, 5, 7], [0, 1, 1, 3, 4, 5, 5, 7], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_a_batch_with_padding_on_either_side():
    """Each row is as it is alone; the second value is what generate() adds to a token's place."""
    config, grids = QWEN2_5, torch.tensor([[4, 2, 2], [2, 2, 2]])
    rows, seconds = [[0, *[2] * 4, 0, 0], [0, 0, 2, 2, 0]], torch.tensor([1.0, 3.0])
    alone = [positions(config, row, [grid.tolist()], [x]) for row, grid, x in zip(rows, grids, seconds.tolist())]
    for left in (False, True):
        pad = [0, 0]
        types = torch.tensor([rows[0], pad + rows[1] if left else rows[1] + pad])
        mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1] if left else [1, 1, 1, 1, 1, 0, 0]])
        got, deltas = rope_index(config, types, types, None, grids, seconds, mask)
        assert torch.equal(got[:, 0], alone[0]) and torch.equal(got[:, 1, mask[1].bool()], alone[1])
        assert deltas.tolist() == [[int(alone[0].max()) + 1 - 7], [int(alone[1].max()) + 1 - 5]]


def test_images_beside_a_video():
    """An image takes max(height, width) positions, whatever videos stand beside it."""
    types = torch.tensor([[0, 1, 1, 0, 2, 2, 2, 0]])
    got, _ = rope_index(QWEN2_5, types, types, torch.tensor([[1, 2, 4]]), torch.tensor([[3, 2, 2]]), [1.0])
    assert got[0, 0].tolist() == [0, 1, 1, 3, 4, 6, 8, 9]
    assert got[2, 0].tolist() == [0, 1, 2, 3, 4, 4, 4, 9]


def long_example(e: vp.Example, slots: int) -> vp.Example:
    """The same clip with its first slot shown `slots` times; for Qwen2.5-VL, whose video is one run of tokens."""
    per_slot = len(e.pixels) // int(e.grid[0])
    before = int((e.token_types == 2).nonzero()[0])
    visual = int((e.token_types == 2).sum()) // int(e.grid[0]) * slots
    video_id = e.input_ids[before]
    behind = int((e.token_types == 2).nonzero()[-1]) + 1
    return replace(
        e,
        input_ids=torch.cat([e.input_ids[:before], video_id.repeat(visual), e.input_ids[behind:]]),
        token_types=torch.cat([e.token_types[:before], torch.full((visual,), 2), e.token_types[behind:]]),
        prompt_length=e.prompt_length + visual - (behind - before),
        pixels=e.pixels[:per_slot].repeat(slots, 1),
        grid=torch.tensor([slots, *e.grid[1:].tolist()]),
        source=torch.arange(slots).index_fill(0, torch.tensor([slots // 2]), slots // 2 - 1),
        keywords=[replace(keyword, slots=torch.arange(slots) == slots // 2) for keyword in e.keywords],
    )


def test_every_path_has_the_published_positions(lm, ragged):
    """Training, forked prefixes, questions and packed rollouts: the positions are those of each sequence by itself."""
    examples = list(ragged)
    if lm.config.model_type == "qwen2_5_vl":
        examples.append(replace(long_example(ragged[0], 64), seconds_per_slot=0.75))
    batch = lm.collate(examples)
    ys = [[torch.arange(n) for n in (3, 1, 5)] for _ in examples]
    rollouts, prefixes = lm.pack_rollouts(examples, ys), lm.pack_prefixes(examples)
    asked = lm.pack_prefixes(examples, ys)
    for b, e in enumerate(examples):
        want = published_positions(e.token_types, [e.grid], [e.seconds_per_slot], lm.config)
        assert torch.equal(batch.position_ids[:, b, : len(e.input_ids)], want)
        n = e.prompt_length
        assert want[0, n - 1] == want[:, :n].max()  # what `pack_rollouts` relies on: a prompt ends in its largest position
        for packed, first in ((rollouts, 1), (asked, 1 if e.source is None else 3)):
            for r, y in enumerate(ys[b]):
                types = torch.cat([e.token_types[:n], torch.zeros(len(y), dtype=torch.long)])
                alone = published_positions(types, [e.grid], [e.seconds_per_slot], lm.config)
                assert torch.equal(packed.position_ids[:, b, packed.branch[b] == first + r], alone[:, n:])
        for side in (1, 2):  # full and twin: the fork's tokens keep their positions
            places = torch.cat([(prefixes.branch[b] == k).nonzero().squeeze(1) for k in (0, side)])
            if e.source is not None:
                assert torch.equal(prefixes.position_ids[:, b, places], want[:, :n])
    if lm.config.model_type == "qwen2_5_vl":
        first = rollouts.position_ids[0, -1, rollouts.branch[-1] == 1][0]
        visual = examples[-1].token_types == 2
        start = int(visual.nonzero()[0])
        behind = examples[-1].prompt_length - start - int(visual.sum())
        assert first == start + 63 * 3 + 1 + behind  # 0.75 s * 4 a second: 3 positions a slot


def test_generate_has_them_too(lm, plain, ragged):
    """A model under `use_published_positions` generates what plain transformers generates from explicit positions."""
    e = ragged[0]
    want = plain_inputs(e, lm.config, e.input_ids[: e.prompt_length])
    ours = {name: value for name, value in want.items() if name != "position_ids"}
    if lm.config.model_type == "qwen2_5_vl":
        ours["second_per_grid_ts"] = torch.tensor([e.seconds_per_slot])
    model = use_published_positions(copy.deepcopy(plain))
    with torch.no_grad():
        torch.testing.assert_close(model(**ours).logits, plain(**want).logits, rtol=0, atol=0)
        texts = [m.generate(**given, max_new_tokens=6, do_sample=False) for m, given in ((model, ours), (plain, want))]
    assert texts[0].tolist() == texts[1].tolist()


@pytest.mark.parametrize("num_frames, seconds", [(7, 1.0), (8, 0.875), (5, 1.4), (4, 1.75)])
def test_a_repeated_frame_takes_no_time(preparation, world, num_frames, seconds):
    """3.5 s: a frame that only fills up the last slot is not counted into seconds_per_slot."""
    repeated = num_frames % 2
    times = [3.5 / num_frames * (i + 0.5) for i in range(num_frames)]
    pixels = torch.zeros(num_frames + repeated, 3, 48, 48, dtype=torch.uint8)
    frames = Frames(pixels, times + times[-1:] * repeated, 25.0, 3.5, 3.5 / num_frames)
    assert frames.seconds_per_slot(2) == pytest.approx(seconds)
    from data.clips import Clip

    example = make_example(Clip(world, "a dot jumps", "x:1"), frames, preparation)
    if "second_per_grid_ts" in preparation.processor.model_input_names:
        assert example.seconds_per_slot == pytest.approx(seconds)
        if num_frames == 7:
            got = positions(QWEN2_5, [2] * 4, [[4, 2, 2]], [example.seconds_per_slot])
            assert got[0].tolist() == [0, 2, 4, 6]


def test_slots_too_short_warn_once(qwen2_5, ragged, recwarn):
    """Below a temporal step of 1 one warning names the setting that avoids it; above it there is none."""
    lm = videolm.VideoLM(AutoModelForImageTextToText.from_pretrained(qwen2_5))
    lm.config.vision_config.tokens_per_second = 2
    e = replace(ragged[0], seconds_per_slot=0.5)
    short = replace(e, seconds_per_slot=0.25)
    lm.collate([e])
    assert not [w for w in recwarn if "temporal position" in str(w.message)]
    lm.collate([e, short])
    lm.pack_prefixes([short])
    found = [str(w.message) for w in recwarn if "temporal position" in str(w.message)]
    assert len(found) == 1 and "--fps 4" in found[0]
