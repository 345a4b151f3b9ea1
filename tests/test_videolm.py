"""VideoLM against plain transformers, on both families, with random weights, float32, ragged batches."""

import copy
import itertools

import pytest
import torch
from transformers import AutoModelForImageTextToText

from data import videolm
from data.attention import attend_in_chunks
from data.batches import Batch
from data.examples import Preparation, make_example, prepare
from data.run.merge import MergedWeights
from data.video import read_frames
from tests.helpers import degraded, plain_forward, plain_inputs


def test_caption_loss_equals_plain_transformers(lm, plain, ragged):
    """Mean cross-entropy over caption tokens of a padded batch equals that of clips run one by one (fp32, 1e-5)."""
    batch = lm.collate(ragged)
    with torch.no_grad():
        out = lm(batch, contrastive=False)
        want = torch.zeros(())
        for e in ragged:
            logits = plain_forward(plain, e).logits[0]
            at = torch.arange(e.prompt_length, len(e.input_ids))
            want += torch.nn.functional.cross_entropy(logits[at - 1], e.input_ids[at], reduction="sum")
    assert len(batch.label_ids) == sum(len(e.input_ids) - e.prompt_length for e in ragged)
    torch.testing.assert_close(out.lm_loss, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [6, 2, 6, 1, 2], [5], [1, 1]])
def test_chunked_attention_against_a_loop(lengths):
    """Chunks of equal and unequal length attend within themselves only; gradients too."""
    torch.manual_seed(len(lengths))
    qkv = [torch.randn(1, 3, sum(lengths), 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    cuts = torch.tensor([0, *lengths]).cumsum(0)
    got, _ = attend_in_chunks(None, *qkv, None, 0.3, cu_seq_lens_q=cuts)
    parts = []
    for a, b in itertools.pairwise(cuts):
        q, k, v = (x[:, :, a:b] for x in qkv)
        parts.append(((q @ k.transpose(2, 3) * 0.3).softmax(-1) @ v).transpose(1, 2))
    want = torch.cat(parts, 1)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    for x, y in zip(torch.autograd.grad((got * weight).sum(), qkv), torch.autograd.grad((want * weight).sum(), qkv)):
        torch.testing.assert_close(x, y)


def test_vision_features_equal_plain_transformers(lm, plain, ragged):
    """Chunked attention in the vision encoder changes nothing, and is in use."""
    batch = lm.collate(ragged)
    assert lm.base.model.visual.config._attn_implementation == "chunked_not_flash"
    assert plain.model.visual.config._attn_implementation == "sdpa"
    with torch.no_grad():
        mine = torch.cat(list(lm.encode_video(batch).pooler_output))
        want = torch.cat(list(plain.model.get_video_features(batch.pixels, batch.grid).pooler_output))
    torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)


def test_twin_tokens_are_a_gather(lm, plain, ragged):
    """Issue bar: gathered features equal those of the encoded degraded frames (1e-5), deepstack too."""
    batch = lm.collate(ragged)
    with torch.no_grad():
        full = lm.encode_video(batch)
        sizes = [len(x) for x in full.pooler_output]
        picked = lm.gather_video(full, lm.collate(ragged, for_generation=True).twin_index)
        twin = torch.cat(picked.pooler_output).split(sizes)
        for b, e in enumerate(ragged):
            if e.source is None:
                torch.testing.assert_close(twin[b], full.pooler_output[b], rtol=0, atol=0)
                continue
            really = plain.model.get_video_features(degraded(e), e.grid[None])
            torch.testing.assert_close(twin[b], really.pooler_output[0], rtol=1e-5, atol=1e-5)
            assert (twin[b] - full.pooler_output[b]).abs().max() > 1e-3  # it is not simply the full one
            if lm.config.model_type == "qwen3_vl":
                for mine, theirs in zip(picked.deepstack_features, really.deepstack_features, strict=True):
                    torch.testing.assert_close(torch.cat(mine).split(sizes)[b], theirs[0], rtol=1e-5, atol=1e-5)
    assert sum(e.source is not None for e in ragged) >= 3


def states_by_hand(lm: videolm.VideoLM, ragged) -> tuple[torch.Tensor, torch.Tensor]:
    """Layer-l states of the key-slot tokens in full and twin, each clip run whole and by itself."""
    found = {"full": [], "twin": []}
    for e in ragged:
        if e.source is None:
            continue
        for kind, pixels in (("full", e.pixels), ("twin", degraded(e))):
            clip = copy.copy(e)
            clip.pixels = pixels
            hidden = plain_forward(lm.hf, clip, output_hidden_states=True).hidden_states[lm.contrastive_layer][0]
            places = (e.token_types == 2).nonzero().squeeze(1).view(int(e.grid[0]), -1)
            found[kind].append(hidden[places[torch.stack([k.slots for k in e.keywords]).any(0)].flatten()])
    return torch.cat(found["full"]), torch.cat(found["twin"])


@pytest.mark.parametrize("short", [0, 10**6])
def test_states_of_full_and_twin(lm, ragged, monkeypatch, short):
    """The states that reach the loss are those of whole, separate runs of full and degraded clips; branch by branch, and
    under one mask."""
    monkeypatch.setattr(videolm, "SHORT", short)
    seen = {}
    monkeypatch.setattr(
        lm.heads, "forward", lambda h, h_twin, t, tokens: seen.update(h=h, h_twin=h_twin, t=t) or (h.sum() * 0, {})
    )
    with torch.no_grad():
        lm(lm.collate(ragged))
        full, twin = states_by_hand(lm, ragged)
        keywords = [k.ids for e in ragged if e.source is not None for k in e.keywords]
        t = torch.stack([lm.base.get_input_embeddings()(k).mean(0) for k in keywords])
    torch.testing.assert_close(seen["h"], full, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["h_twin"], twin, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["t"], t)
    assert (full - twin).abs().max() > 1e-3


def gradients(lm: videolm.VideoLM, batch: Batch) -> list[torch.Tensor]:
    """Loss and every gradient of one step."""
    lm.zero_grad()
    out = lm(batch)
    loss = out.lm_loss / len(batch.label_ids) + out.contrastive_loss / len(batch.keyword_ids)
    loss.backward()
    return [loss.detach()] + [p.grad.clone() for p in lm.parameters() if p.grad is not None]


@pytest.mark.parametrize("enable", [False, True])
def test_gradient_checkpointing_changes_nothing(lm, ragged, enable):
    """Same loss and gradients with and without; and the states that the loss saw carry gradient below layer l."""
    batch = lm.collate(ragged)
    want = gradients(lm, batch)
    if enable:
        lm.hf.gradient_checkpointing_enable()
        assert all(layer.gradient_checkpointing for layer in lm.base.model.language_model.layers)
    got = gradients(lm, batch)
    assert len(got) == len(want) and len(got) == 1 + len(list(lm.parameters()))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_contrastive_gradient_against_separate_runs(lm, ragged):
    """The gradient of the contrastive loss alone equals that through whole, separate runs of full and twin."""
    batch = lm.collate(ragged)
    weights = [p for n, p in lm.named_parameters() if any(x in n for x in ("layers.0.", "visual.blocks", "embed_tokens"))]
    got = torch.autograd.grad(lm(batch).contrastive_loss, weights, allow_unused=True)
    full, twin = states_by_hand(lm, ragged)
    keywords = [k.ids for e in ragged if e.source is not None for k in e.keywords]
    t = torch.stack([lm.base.get_input_embeddings()(k).mean(0) for k in keywords]).detach()
    loss, _ = lm.heads(full, twin, t, batch.key_tokens)
    want = torch.autograd.grad(loss, weights, allow_unused=True)
    assert sum(g is not None for g in got) > 20
    for a, b in zip(got, want):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def count_calls(module: torch.nn.Module) -> list:
    """A list that grows at each forward of the module: by (B, T), if states come in."""
    calls = []
    module.register_forward_pre_hook(lambda _, inputs: calls.append(inputs and tuple(inputs[0].shape[:2])))
    return calls


def test_vision_once_and_of_the_twin_its_event(lm, ragged):
    """One vision pass serves both videos. Layers below l run the full videos and the twins' tokens from the first key slot
    to the last, those above the full ones; without twins nothing else is run."""
    layers = lm.base.model.language_model.layers
    vision, low, high = (count_calls(m) for m in (lm.base.model.visual, layers[0], layers[lm.contrastive_layer]))
    heads, batch = count_calls(lm.heads), lm.collate(ragged)
    full, lengths = tuple(batch.input_ids.shape), []
    for e in ragged:
        event = 0
        if e.source is not None:
            key = torch.stack([k.slots for k in e.keywords]).any(0).nonzero().flatten().tolist()
            places = (e.token_types == 2).nonzero().flatten().view(int(e.grid[0]), -1)
            event = int(places[key[-1], -1] + 1 - places[key[0], 0])
            assert event < e.prompt_length / 2 or len(key) > 1
        lengths.append(len(e.input_ids) + event)
    both = (len(ragged), max(lengths))
    assert max(lengths) > full[1] and batch.forked.branch.ne(batch.forked.ancestors.shape[-1] - 1).sum() == sum(lengths)
    with torch.no_grad():
        lm(batch)
        assert (len(vision), low, high, len(heads)) == (1, [both], [full], 1)
        lm(batch, twin_negatives=False)
        assert (len(vision), low, high, len(heads)) == (2, [both, full], [full] * 2, 2)
        lm(batch, contrastive=False)
        assert (len(vision), low, high, len(heads)) == (3, [both, full, full], [full] * 3, 2)


def test_twins_where_no_prefix_can_be_shared(lm, ragged):
    """With twins in sequences of their own the losses, and the gradient of each, are the same."""
    found = []
    for shares in (True, False):
        lm.shares_prefix = shares
        batch = lm.collate(ragged)
        num_twins = sum(e.source is not None for e in ragged)
        assert len(batch.forked.input_ids) == len(ragged) + num_twins * (not shares)
        found.append(gradients(lm, batch))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_last_mlp_runs_what_is_read(lm, ragged, checkpointed):
    """The last layer's MLP runs rows that a label or a rollout reads, no others; losses, log-probabilities and gradients
    are those of all rows, checkpointed layers included."""
    if checkpointed:
        (getattr(lm.hf, "activation_checkpointing_enable", None) or lm.hf.gradient_checkpointing_enable)()
        lm.hf.enable_input_require_grads()
    layers, sizes, found = lm.base.model.language_model.layers, [], []
    layers[-1].mlp.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[:-1]))
    batch, ys = lm.collate(ragged), [[torch.tensor([5, 6, 7]), torch.tensor([8])]] * len(ragged)
    for cuts in (True, False):
        lm.cuts_rows = cuts
        lm.zero_grad()
        out = lm(batch)
        logp, _ = lm.log_probs(packed := lm.pack_rollouts(ragged, ys), lm.encode_video(batch))
        (out.lm_loss + out.contrastive_loss + logp.sum()).backward()
        gradients = [p.grad.clone() for p in lm.parameters() if p.grad is not None]
        found.append([out.lm_loss.detach(), out.contrastive_loss.detach(), logp.detach(), *gradients])
    passes = 1 + checkpointed  # a checkpointed layer runs again in the backward pass
    read, whole = [(len(batch.label_rows),), (len(packed.rows),)], [batch.input_ids.shape, packed.input_ids.shape]
    assert sorted(sizes) == sorted([*read * passes, *whole * passes])
    assert len(batch.label_rows) < batch.input_ids.numel() / 2
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 10**9])
def test_how_likely_a_caption_is(lm, plain, ragged, at_once, monkeypatch):
    """The log-probabilities of its tokens, summed, under plain transformers, without tokens that no text may hold; the same
    however many clips are run at once."""
    monkeypatch.setattr(videolm, "TOKENS_AT_ONCE", at_once)
    got = lm.eval().caption_log_probs(ragged)
    for found, e in zip(got, ragged, strict=True):
        with torch.no_grad():
            logits = plain_forward(plain, e).logits[0]
        logits[:, lm.banned] = -torch.inf
        at = torch.arange(e.prompt_length, len(e.input_ids))
        want = logits.log_softmax(-1)[at - 1, e.input_ids[at]].sum()
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert len({round(x, 4) for x in got.tolist()}) == len(ragged) and not got.requires_grad


def test_micro_batches_change_nothing(lm, ragged):
    """Summed losses over one-clip batches, divided by the whole batch's counts, give the whole batch's gradient."""
    whole = lm.collate(ragged)
    lm(whole, contrastive=False).lm_loss.div(len(whole.label_ids)).backward()
    want = {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    for e in ragged:
        lm(lm.collate([e]), contrastive=False).lm_loss.div(len(whole.label_ids)).backward()
    for name, parameter in lm.named_parameters():
        if name in want:
            torch.testing.assert_close(parameter.grad, want[name], rtol=1e-3, atol=1e-6)


def test_only_content_tells_the_twin(world, preparation):
    """Issue bar: run the twin's frames through the processor: text, grid, timestamps, lengths equal; pixels differ."""
    from data.clips import load_clips

    for clip in load_clips(world / "test.jsonl")[0][:6]:
        frames = read_frames(clip, 16)
        full = make_example(clip, frames, preparation)
        per_slot = torch.stack([2 * full.source, 2 * full.source + 1], 1).flatten()
        shown = copy.copy(frames)
        shown.pixels = frames.pixels[per_slot]
        clip.key_spans = [[[0.0, 1.0]]]  # the finder must not run on the twin: text and grid do not depend on it
        twin = make_example(clip, shown, preparation)
        assert torch.equal(full.input_ids, twin.input_ids) and torch.equal(full.token_types, twin.token_types)
        assert torch.equal(full.grid, twin.grid) and full.seconds_per_slot == twin.seconds_per_slot
        assert full.pixels.shape == twin.pixels.shape and not torch.equal(full.pixels, twin.pixels)
        torch.testing.assert_close(degraded(full), twin.pixels)


def test_describe_equals_generate(lm, plain, ragged):
    """Greedy descriptions of a ragged batch equal plain generate() on full and on really degraded clips."""
    lm.eval()
    both = lm.describe(ragged, max_new_tokens=8)
    for b, e in enumerate(ragged):
        for r, pixels in enumerate((e.pixels, e.pixels if e.source is None else degraded(e))):
            inputs = plain_inputs(e, lm.config, e.input_ids[: e.prompt_length]) | {"pixel_values_videos": pixels}
            banned = lm.banned.tolist()
            want = plain.generate(**inputs, max_new_tokens=8, do_sample=False, suppress_tokens=banned)
            want = want[0, e.prompt_length :]
            assert both.tokens[b, r, : len(want)].tolist() == want.tolist()


def test_contrastive_layer_is_checked(checkpoint):
    """Below Qwen3-VL's deepstack layers, or beyond the last, the layer is refused with the range that is allowed."""
    hf = AutoModelForImageTextToText.from_pretrained(checkpoint)
    lowest = 2 if hf.config.model_type == "qwen3_vl" else 1
    videolm.VideoLM(hf, lowest)
    for layer in (lowest - 1, 4, 9):
        with pytest.raises(ValueError, match=f"taken after {lowest} to 3"):
            videolm.VideoLM(hf, layer)


def test_lora_through_the_adapter(lm, ragged):
    """With peft: only adapters and heads train, and the merged weights give the adapted model's logits."""
    from peft import LoraConfig, get_peft_model

    plain = copy.deepcopy(lm.hf)
    linears = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    adapted = videolm.VideoLM(get_peft_model(lm.hf, LoraConfig(r=4, target_modules=linears)))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    assert all("lora_" in n or n.startswith("heads.") for n, p in adapted.named_parameters() if p.requires_grad)
    batch = adapted.collate(ragged)
    out = adapted(batch)
    (out.lm_loss + out.contrastive_loss).backward()
    plain.load_state_dict(MergedWeights(adapted.hf), strict=True)
    with torch.no_grad():
        merged = videolm.VideoLM(plain).train()(batch, contrastive=False).lm_loss
    torch.testing.assert_close(merged, out.lm_loss.detach(), rtol=1e-4, atol=1e-4)


def test_no_keyword_trains_on_the_caption_alone(lm, preparation, world):
    """A batch without any twin has a caption loss and a contrastive loss of zero."""
    from data.clips import load_clips

    clips, _ = load_clips(world / "train.jsonl")
    for clip in clips[:2]:
        clip.keywords = []
    out = lm(lm.collate([prepare(c, Preparation(preparation.processor)) for c in clips[:2]]))
    assert out.contrastive_loss == 0 and out.lm_loss > 0
