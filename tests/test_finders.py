"""Finders of key spans: on pictures made for the purpose, on the world, and against passes made by hand."""

import json
import math
import re
from collections.abc import Sequence

import pytest
import torch

import vp
from data import motion
from data.curation import finders
from data.world import FPS, NUM_FRAMES, draw_clip
from tests.commands import run
from tests.helpers import plain_forward

TIMES = [i / 12 for i in range(36)]  # three seconds at twelve frames a second


def span_iou(found: Sequence[Sequence[float]], true: Sequence[float]) -> float:
    """Overlap of found spans, which do not overlap each other, with one true span: intersection over union.

    >>> span_iou([[0, 1], [2, 4]], [3, 5])
    0.25
    """
    inside = sum(max(0.0, min(end, true[1]) - max(begin, true[0])) for begin, end in found)
    total = sum(end - begin for begin, end in found) + true[1] - true[0] - inside
    return inside / total if total > 0 else 0.0


def texture(seed: int, height: int = 48, width: int = 64) -> torch.Tensor:
    """A still picture with detail, (3, H, W) float."""
    small = torch.rand(3, height // 4, width // 4, generator=torch.Generator().manual_seed(seed)) * 200 + 20
    return torch.nn.functional.interpolate(small[None], size=(height, width), mode="bilinear")[0]


def still(count: int = 36, seed: int = 0) -> torch.Tensor:
    """A still scene with noise, (F, 3, H, W) uint8."""
    noise = torch.randn(count, 3, 48, 64, generator=torch.Generator().manual_seed(seed + 1)) * 2
    return (texture(seed) + noise).clamp(0, 255).byte()


def test_what_comes_and_goes_is_found():
    """A small thing that is there for half a second: the span, on slot edges, with confidence and no note."""
    frames = still()
    frames[14:20, :, 10:22, 30:42] = 250
    found = motion.motion_evidence(frames, TIMES)
    spans = finders.spans_of(found.curve, TIMES, 3.0)
    assert span_iou(spans, [14 / 12, 20 / 12]) > 0.9
    assert found.confidence > 0.6 and not found.notes


@pytest.mark.parametrize("kind", ["nothing", "for good", "slow"])
def test_what_stays_or_creeps_is_no_event(kind):
    """Noise alone, a change that stays, and a light that slowly rises: low confidence."""
    frames = still().float()
    if kind == "for good":
        frames[18:, :, 10:22, 30:42] = 250
    if kind == "slow":
        frames += torch.linspace(0, 40, 36)[:, None, None, None]
    assert motion.motion_evidence(frames.clamp(0, 255).byte(), TIMES).confidence < 0.3


def cuts_of(pixels):
    """The cuts of shrunk frames."""
    return motion.find_cuts(motion.block_change(pixels[1:], pixels[:-1]))


def test_a_cut_is_no_event_and_evidence_does_not_cross_it():
    """Two scenes: the cut is named, nothing peaks at it; an event beside it is still the peak."""
    frames = torch.cat([still(18, seed=0), still(18, seed=5)])
    assert cuts_of(motion.shrink(frames)) == [18]
    found = motion.motion_evidence(frames, TIMES)
    assert found.confidence < 0.3 and "1 cut(s)" in found.notes
    frames[24:28, :, 10:22, 30:42] = 250
    found = motion.motion_evidence(frames, TIMES)
    assert 24 <= int(found.curve.argmax()) < 28 and 0.1 < found.confidence <= 0.3
    assert span_iou(finders.spans_of(found.curve, TIMES, 3.0), [2.0, 28 / 12]) > 0.8


@pytest.mark.parametrize("first, last", [(18, 22), (14, 18)])
def test_evidence_stays_within_its_shot(first, last):
    """What is there from a shot's first frame and goes, or comes and is there to its last, does not come and go."""
    frames = torch.cat([still(18, seed=0), still(18, seed=5)])
    frames[first:last, :, 10:22, 30:42] = 250
    assert cuts_of(motion.shrink(frames)) == [18]
    assert motion.motion_evidence(frames, TIMES).curve.max() < 8


def test_a_restless_picture_has_no_cuts_and_no_event():
    """A camera that is torn about changes all of it all the time; of squares that flicker all the time none stands out."""
    wide = texture(0, height=96, width=256)
    g = torch.Generator().manual_seed(0)
    places = zip(torch.randint(48, (36,), generator=g).tolist(), torch.randint(192, (36,), generator=g).tolist())
    torn = torch.stack([wide[:, y : y + 48, x : x + 64] for y, x in places])
    change = motion.block_change(torn[1:], torn[:-1]).median(1).values
    assert (change > 25).float().mean() > 0.5 and cuts_of(torn) == []
    frames = still()
    for i in range(36):
        y, x = torch.randint(36, (1,), generator=g), torch.randint(52, (1,), generator=g)
        frames[i, :, y : y + 12, x : x + 12] = 250
    assert motion.motion_evidence(frames, [i / 8 for i in range(36)]).confidence < 0.75  # alone, one is sure: 0.9 and more


@pytest.mark.parametrize("change, low, high", [(9, 0.15, 0.55), (50, 0.7, 1.0)])
def test_confidence_follows_the_size_of_the_change(change, low, high):
    """A change by 9 of 255 is half as sure as one by 20 or more, which is sure."""
    frames = still().float()
    frames[14:20, :, 6:26, 26:46] += change
    assert low < motion.motion_evidence(frames.clamp(0, 255).byte(), TIMES).confidence <= high


def test_close_frames_are_smoothed():
    """At twelve frames a second one frame's flicker is spread over its neighbours; at eight it stays where it is."""
    frames = still()
    frames[18, :, 10:22, 30:42] = 250
    close, far = (motion.motion_evidence(frames, [i / fps for i in range(36)]).curve for fps in (12, 8))
    assert far[17] < 0.1 * far[18] and close[17] > 0.5 * close[18]
    assert 0.2 * far[18] < close[18] < 0.5 * far[18] and int(close.argmax()) == 18
    assert close.sum() == pytest.approx(far.sum().item(), rel=0.05)


def test_a_flash_is_not_a_cut():
    """Two bright frames of the whole picture are two changes at once; a slow pan has none."""
    pan = torch.stack([texture(0, width=160)[:, :, i : i + 64] for i in range(36)]).byte()
    assert cuts_of(motion.shrink(pan)) == []


def test_a_moving_camera_lowers_the_confidence():
    """A pan over a picture with detail: everything changes all the time, and the note says so."""
    pan = torch.stack([texture(0, width=64 + 3 * 36)[:, :, 3 * i : 3 * i + 64] for i in range(36)]).byte()
    found = motion.motion_evidence(pan, TIMES)
    assert found.confidence < 0.3 and any("camera moves" in note for note in found.notes)
    sky = pan.clone()
    sky[:, :, :12] = 200  # a quarter without detail, which does not seem to move
    assert any("camera moves" in note for note in motion.motion_evidence(sky, TIMES).notes)
    pan[14:20, :, 10:22, 30:42] = 255  # even where something happens
    assert motion.motion_evidence(pan, TIMES).confidence <= 0.2


def test_on_the_world():
    """Slot IoU with the truth of at least 0.85 on drawn clips (measured: 0.87; 0.82 on the world's, which are fainter)."""
    times, scores = [i / FPS for i in range(NUM_FRAMES)], []
    for index in range(80):
        frames, line = draw_clip("train", index, habit=0.8, quiet=0.0, strength=0.8)
        found = motion.motion_evidence(torch.from_numpy(frames).permute(0, 3, 1, 2), times)
        got = vp.span_slots(finders.spans_of(found.curve, times, NUM_FRAMES / FPS), times)
        true = vp.span_slots([line["truth"]["span"]], times)
        scores.append(float((got & true).sum() / (got | true).sum()))
    assert sum(scores) / len(scores) >= 0.85


def test_spans_lie_on_slot_edges():
    """One frame over the level makes its slot key; a gap of one slot is closed, two are not; flat gives nothing."""
    times = [i * 0.5 for i in range(12)]
    curve = torch.tensor([0, 5.0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 5])
    assert finders.spans_of(curve, times, 6.0) == [[0.0, 3.0], [5.0, 6.0]]
    assert finders.spans_of(torch.ones(12), times, 6.0) == []
    raised = 5 + curve  # what counts is the way from the low to the peak
    raised[4] = 5 + 0.55 * 5
    assert finders.spans_of(raised, times, 6.0) == [[0.0, 1.0], [5.0, 6.0]]
    assert finders.spans_of(raised, times, 6.0, level=0.5) == [[0.0, 3.0], [5.0, 6.0]]
    assert finders.spans_of(curve[:6], times[:6], 3.0, frames_per_slot=3) == [[0.0, 3.0]]


def test_fall_evidence_against_passes_by_hand(lm, ragged):
    """The fall of a keyword's log-probability for each window equals that of really degraded clips run alone."""
    lm.eval()
    e = ragged[0]
    (found,) = finders.fall_evidence(lm, e, longest=2, batch_size=5)
    S, per_slot = int(e.grid[0]), len(e.pixels) // int(e.grid[0])
    answer, ids = e.input_ids[e.prompt_length :].tolist(), e.keywords[0].ids.tolist()
    at = next(i for i in range(len(answer)) if answer[i : i + len(ids)] == ids)
    places = e.prompt_length + at + torch.arange(len(ids))

    def log_prob(source):
        clip = vp.Example(**vars(e) | {"pixels": e.pixels.view(S, per_slot, -1)[source].flatten(0, 1)})
        with torch.no_grad():
            logits = plain_forward(lm.hf, clip).logits[0].index_fill(1, lm.banned, -torch.inf)
        return logits[places - 1].log_softmax(1).gather(1, e.input_ids[places, None]).sum().item()

    full, want, largest = log_prob(torch.arange(S)), [0.0] * S, 0.0
    for n in (1, 2):
        for a in range(S - n + 1):
            key = torch.zeros(S, dtype=torch.bool)
            key[a : a + n] = True
            fall = max(0.0, full - log_prob(vp.twin_sources(key)))
            want[a : a + n] = [max(x, fall / n**0.5) for x in want[a : a + n]]
            largest = max(largest, fall)
    assert found.curve.tolist() == pytest.approx(want, abs=1e-4)
    assert found.confidence == pytest.approx(1 - math.exp(-largest), abs=1e-4) and 0 < found.confidence < 1


def test_head_evidence_by_hand(lm, ragged):
    """The largest cosine of a slot's states with the keyword, above the median slot."""
    e = ragged[0]
    (found,) = finders.head_evidence(lm, e)
    with torch.no_grad():
        hidden = plain_forward(lm.hf, e, output_hidden_states=True).hidden_states[lm.contrastive_layer][0]
        text = lm.heads.text(lm.base.get_input_embeddings()(e.keywords[0].ids).mean(0))
        cosines = torch.cosine_similarity(lm.heads.visual(hidden[e.token_types == 2]), text, dim=-1)
    near = cosines.view(int(e.grid[0]), -1).amax(1)
    torch.testing.assert_close(found.curve, (near - near.median()).clamp(min=0), atol=1e-5, rtol=1e-4)
    assert found.confidence == pytest.approx(min(1.0, float((near - near.median()).max())), abs=1e-4)


def test_image_text_evidence_with_a_clip_model(tmp_path):
    """A CLIP directory that transformers loads: the curve is the keyword's cosine above the median frame."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "jumps": 1, "off": 2, "[END]": 3, "[UNK]": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[END]", unk_token="[UNK]")
    tokenizer.model_max_length = 8
    text = dict(
        vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=3
    )
    text |= dict(max_position_embeddings=8)
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    image = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image, tokenizer).save_pretrained(tmp_path)
    score = finders.load_image_text(str(tmp_path))
    frames = still(6)
    frames[3] = 0
    cosines = score(frames, ["jumps off", "off"])
    assert cosines.shape == (6, 2) and (cosines.abs() <= 1 + 1e-5).all()
    found = finders.image_text_evidence(score, frames, ["jumps off", "off"])
    for j in range(2):
        want = (cosines[:, j] - cosines[:, j].median()).clamp(min=0)
        torch.testing.assert_close(found[j].curve, want, atol=1e-5, rtol=1e-4)
        assert found[j].confidence == pytest.approx(min(1.0, 10 * want.max().item()), abs=1e-4)
    with pytest.raises(ValueError, match="--clip-model"):
        finders.load_image_text(str(tmp_path / "nowhere"))


def test_combining_needs_both():
    """Where one finder sees nothing, the geometric mean sees little; slots are stretched to frames."""
    a = motion.Evidence(torch.tensor([0.0, 0, 4, 4, 0, 0, 4, 4]), 0.9, ["a"])
    b = motion.Evidence(torch.tensor([0.0, 2, 0, 0]), 0.4)
    both = finders.combine([a, b])
    assert both.curve.tolist() == pytest.approx([0.001, 0.001, 1.001, 1.001, 0.001, 0.001, 0.0316, 0.0316], abs=1e-3)
    assert both.confidence == pytest.approx(0.6) and both.notes == ["a"]


def test_comparing_finders(world, tmp_path, qwen2_5):
    """The command prints one row a finder: on the world the motion finder is near the truth, the clip's middle is not."""
    lines = [json.loads(x) for x in (world / "train.jsonl").open()][:12]
    known = world / "known-spans.jsonl"
    known.write_text("".join(json.dumps(x | {"key_spans": [[x["truth"]["span"]]]}) + "\n" for x in lines))
    shown = run("-m", "data.curation.compare_finders", known, "--model", qwen2_5, cwd=tmp_path).stdout
    found = re.findall(r"\u2502 ([a-z][^\u2502]*?) +\u2502 +([\d.]+) \u2502 +([\d.]+) \u2502", shown)
    overlap, inside = ({row[0]: float(row[column]) for row in found} for column in (1, 2))
    assert overlap["motion"] > 0.7 > 0.6 > overlap["middle 70 %"] and inside["motion"] > 0.8 > 0.6 > inside["middle 70 %"]
    assert {"self", "motion self", "brief (median of 7 frames)"} <= set(overlap)
