"""What only a GPU does, tested without one: which attention, which kernels, how many variants, what is refused."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch._dynamo.utils import counters

import train_sft
from data import attention, device, generation, videolm
from data.attention import RoomyLayer, attend_by_mask
from data.measure import card, doctor
from data.packing import BLOCK, Packed
from data.run import precision, settings
from kernels import check, dispatch
from tests.test_rollouts import same, sharpen, uniforms
from tests.test_videolm import count_calls


def pretend_card(monkeypatch, capability: tuple[int, int], shared: int = 232448) -> None:
    """Make torch say that there is a card of this kind."""
    properties = types.SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure the GPU")
def test_what_fits_is_told_without_a_card(tmp_path):
    """Estimates by model and preset; the issue's bar: 4-bit models of 3B and 7B below 22 GiB in both stages."""
    assert card.run_card(card.CardSettings(out=tmp_path, kernels=False), Console(quiet=True)) == []
    table = (tmp_path / "fits.md").read_text().splitlines()
    rows = {line.split("|")[1].strip(): [float(x) for x in line.split("|")[2:-1]] for line in table[2:]}
    assert len(rows) == 5 and all(len(row) == 4 and min(row) > 0 for row in rows.values())
    assert max(rows["qwen2.5-vl-3b"][:2]) < max(rows["qwen2.5-vl-7b"][:2]) < 22


# --- What a card can do ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capability, version",
    [((7, 5), None), ((8, 0), 2), ((8, 6), 2), ((8, 9), 2), ((9, 0), 4), ((10, 0), 4), ((12, 0), 2)],
)
def test_attention_by_what_the_card_can_run(capability, version, monkeypatch):
    """All of flash-attn is installed: what the card cannot run is not taken."""
    pretend_card(monkeypatch, capability)
    for number in (2, 3, 4):
        monkeypatch.setattr(precision, f"is_flash_attn_{number}_available", lambda: True)
        monkeypatch.setitem(sys.modules, precision.FLASH_MODULES[number], types.ModuleType("flash"))
    assert precision.choose_attention() == (f"flash_attention_{version}" if version else "sdpa")
    monkeypatch.setattr(precision, "is_flash_attn_4_available", lambda: False)
    if capability == (9, 0):
        assert precision.choose_attention() == "flash_attention_3"
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # a wheel that does not open: its import fails
    if version == 2:
        with pytest.warns(UserWarning, match="flash-attn 2 is installed but does not open"):
            assert precision.choose_attention() == "sdpa"


@pytest.mark.parametrize("capability, dtype", [((7, 0), torch.float32), ((8, 0), torch.bfloat16), ((8, 9), torch.bfloat16)])
def test_what_is_computed_in(capability, dtype, monkeypatch):
    """bfloat16 from Ampere on; older cards, which only emulate it, and the CPU compute in float32."""
    pretend_card(monkeypatch, capability)
    assert device.compute_dtype("cuda") == dtype and device.compute_dtype("cpu") == torch.float32


def test_stages_of_flex_attention(monkeypatch):
    """Two on cards with about 100 KB of shared memory, torch's own choice on others."""
    pretend_card(monkeypatch, (8, 6), 101376)
    assert attention.flex_options(torch.device("cuda"))["fwd_num_stages"] == 2
    pretend_card(monkeypatch, (9, 0))
    assert "fwd_num_stages" not in attention.flex_options(torch.device("cuda"))


def test_gpu_presets_need_a_gpu(monkeypatch):
    """On a CPU they are refused, with the reason."""
    with pytest.raises(ValueError, match="--preset gpu-24gb: torch finds no GPU"):
        train_sft.resolve(settings.of_preset(train_sft.Settings, "gpu-24gb"))
    monkeypatch.setattr(settings, "best_device", lambda: torch.device("cuda"))
    settings.of_preset(train_sft.Settings, "gpu-24gb").check()


# --- Kernels that do not do -----------------------------------------------------------------------------------------------


def broken(*_):
    """Something that does not do."""
    raise RuntimeError("no C compiler\nand so on")


def test_kernels_that_do_not_do_are_replaced(monkeypatch):
    """One that does not compile and one that differs: their references are taken, and the third is not touched."""
    monkeypatch.setattr(dispatch, "fits", lambda _: True)
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "FORCED", None)

    comparisons = {
        "contrastive": broken,
        "log-probs": lambda *_: check.Errors("log-probs", "bfloat16", 0.5, 0.01),
        "reward": lambda *_: check.Errors("reward", "float32", 0.02, 0.02),
    }
    try:
        found = check.replace_unfit("cpu", comparisons)
        assert found["contrastive"] == "RuntimeError: no C compiler" and "differs" in found["log-probs"]
        assert set(found) == {"contrastive", "log-probs"}
        takes = {name: dispatch.takes_kernel(None, torch.ones(1), name=name) for name in comparisons}
        assert takes == {"contrastive": False, "log-probs": False, "reward": True}
    finally:
        dispatch.REPLACED.clear()


def dense(query, key, value, mask, scaling: float):
    """What attend_in_blocks computes, by one mask of all pairs."""
    B, T = len(query), query.shape[2]
    b, q, k = torch.meshgrid(*map(torch.arange, (B, T, T)), indexing="ij")
    pairs = mask.mask_mod(b, 0, q, k)[:, None]
    return F.scaled_dot_product_attention(query, key, value, pairs, scale=scaling, enable_gqa=True)


def test_flex_attention_that_does_not_do_is_replaced(monkeypatch):
    """Right, it is taken; without a backward pass, or with another mask, it is not, and a warning says why. Branches then
    attend by sdpa."""
    device = torch.device("cpu")
    monkeypatch.setattr(attention, "attend_in_blocks", dense)
    error, by_branch = attention.compare_flex(device)
    assert 1e-4 < error < 0.05 and 1e-4 < by_branch < 0.05
    assert attention.compare_flex(device, torch.float32)[0] < 1e-5
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention.flex_works.__wrapped__(device)

    def causal(query, key, value, mask, scaling):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)

    for other, message in ((broken, "RuntimeError: no C compiler$"), (causal, "its error is ")):
        monkeypatch.setattr(attention, "attend_in_blocks", other)
        with pytest.warns(UserWarning, match=message):
            assert not attention.flex_works.__wrapped__(device)
    for works in (True, False):
        monkeypatch.setattr(videolm, "flex_works", lambda _, works=works: works)
        monkeypatch.setattr(videolm, "compute_dtype", lambda _: torch.bfloat16)
        on_card = types.SimpleNamespace(device=torch.device("cuda"))
        assert videolm.VideoLM.flex.fget(on_card) == works
        assert not videolm.VideoLM.flex.fget(types.SimpleNamespace(device=device))


def test_a_kernel_that_gives_nan_is_wrong():
    """No comparison with NaN lets it pass."""
    row = check.compare("reward", torch.float32, [torch.tensor([torch.nan])], [torch.ones(1)], [torch.ones(1)])
    assert not row.right and check.compare("x", torch.float32, *[[torch.ones(1)]] * 3).right


def test_doctor(monkeypatch, tmp_path):
    """On a CPU everything works but what needs a GPU, which says so."""
    monkeypatch.setattr(doctor, "INTERPRETED", False)
    findings = {finding.what: finding for finding in doctor.examine(torch.device("cpu"))}
    assert {what for what, finding in findings.items() if finding.advice} == {"GPU"}
    assert "8 frames" in findings["video"].found and "not tried" in findings["kernel: reward"].found
    assert "transformers" in findings["versions"].found
    assert "forward and backward" in findings["tiny model, 4 bits, LoRA"].found
    monkeypatch.setattr(doctor, "load_trainable", broken)
    wrong = doctor.try_preset(tmp_path, torch.device("cpu"))
    assert "no C compiler" in wrong.found and "--quantize none" in wrong.advice
    wrong = doctor.try_kernel("reward", None, torch.device("cpu"))
    assert "not tried" in wrong.found
    console = Console(record=True, width=200)
    console.print(findings["tiny model"].found)
    assert "forward and backward" in console.export_text()


# --- Attention ------------------------------------------------------------------------------------------------------------


def test_query_heads_as_rows():
    """Heads that share keys, folded into rows of one head, attend as each by itself, under masks of their own rows."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 3, 8), torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, 8)
    sees = torch.rand(2, 1, 3, 11) < 0.6
    sees[..., 0] = True
    mask = torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)
    got, _ = attend_by_mask(torch.nn.Module(), query, key, value, mask.repeat(1, 1, 3, 1), "sdpa", scaling=0.3)
    scores = query @ key.repeat_interleave(3, 1).mT * 0.3 + mask
    want = (scores.softmax(-1) @ value.repeat_interleave(3, 1)).transpose(1, 2)
    torch.testing.assert_close(got, want)


def test_a_cache_with_room():
    """Prompts of two groups, then tokens of all: what torch.cat would give, and no buffer is made anew."""
    torch.manual_seed(0)
    layer = RoomyLayer(3, 5, room=4)
    prompts = [torch.randn(2, 2, 5, 8), torch.randn(1, 2, 3, 8)]
    for x in prompts:
        assert layer.get_mask_sizes(x.shape[2]) == (x.shape[2], 0)  # a group of prompts sees no other
        keys, values = layer.update(x, -x)
        assert torch.equal(keys, x) and torch.equal(values, -x)
    padded = torch.cat([prompts[0], torch.nn.functional.pad(prompts[1], (0, 0, 0, 2))])
    assert layer.get_seq_length() == 5 and layer.get_mask_sizes(2) == (7, 0)
    place = layer.buffers[0].data_ptr()
    for _ in range(2):
        new = torch.randn(3, 2, 2, 8)
        keys, values = layer.update(new, -new)
        padded = torch.cat([padded, new], 2)
        assert torch.equal(keys, padded) and torch.equal(values, -padded)
    assert layer.buffers[0].data_ptr() == place == keys.data_ptr()


@pytest.mark.parametrize("at_once, held", [(1, 10**9), (10**9, 1), (200, 400)])
def test_chunks_change_nothing(lm, ragged, at_once, held, monkeypatch):
    """Clips encoded, prefilled and sampled some at a time: the same rollouts, the same answers, the same videos."""
    lm.eval()
    sharpen(lm)
    numbers, ends = uniforms(ragged, 3), [[torch.tensor([5, 6]), torch.tensor([7])], [torch.tensor([8])]] * 2
    want, video = lm.roll_out(ragged, 2, 1, 9, numbers)
    answers = lm.answer(ragged, ends, 5, twin=True)
    calls = count_calls(lm.base.model.language_model)
    for module in (videolm, generation):
        monkeypatch.setattr(module, "TOKENS_AT_ONCE", at_once)
    monkeypatch.setattr(generation, "TOKENS_HELD", held)
    got, again = lm.roll_out(ragged, 2, 1, 9, numbers)
    assert len(calls) > 9
    same(got, want)
    same(lm.answer(ragged, ends, 5, twin=True), answers)
    for a, b in zip(video.layers(), again.layers(), strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_frozen_vision_has_no_graph(lm, ragged):
    """Frozen, the encoder runs once a step and keeps nothing, though checkpointing hooks its patch embedding; trained, it
    gets gradients."""
    lm.hf.activation_checkpointing_enable()
    lm.hf.enable_input_require_grads()
    batch = lm.collate(ragged[:2])
    for trained in (False, True):
        lm.zero_grad()
        lm.base.model.visual.requires_grad_(trained)
        calls = count_calls(lm.base.model.visual.blocks[0].mlp)
        out = lm(batch)
        (out.lm_loss + out.contrastive_loss).backward()
        assert len(calls) == 1 + trained  # checkpointed, it runs again in the backward pass
        assert lm.encode_video(batch).pooler_output[0].requires_grad == trained
        gradients = [p.grad for p in lm.base.model.visual.parameters()]
        assert all(g is not None for g in gradients) if trained else not any(g is not None for g in gradients)
        assert lm.base.lm_head.weight.grad.abs().sum() > 0


# --- flex_attention's variants --------------------------------------------------------------------------------------------


def packed_case(B: int, blocks: int, branches: int) -> Packed:
    """Random branches of one parent."""
    branch = torch.randint(0, branches, (B, blocks * BLOCK))
    ancestors = torch.eye(branches, dtype=torch.bool).repeat(B, 1, 1)
    ancestors[:, :, 0] = True
    nothing = torch.empty(0)
    return Packed(nothing, nothing, branch, nothing, ancestors, nothing, nothing)


def test_variants_of_flex_attention(monkeypatch):
    """A run of stage 2 with evaluations compiles a handful; one too many raises, and makes no full scores in silence."""
    import torch.nn.attention.flex_attention as flex

    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: whole(f, backend="eager", **more))
    attention.compiled_flex.cache_clear()
    torch._dynamo.reset()
    counters.clear()

    def attend(B: int, blocks: int, branches: int, train: bool) -> None:
        mask = packed_case(B, blocks, branches).block_mask()
        q, k, v = (torch.randn(B, h, blocks * BLOCK, 16, requires_grad=train) for h in (6, 2, 2))
        with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16, enabled=train):
            out = attention.attend_in_blocks(q, k, v, mask, 0.25)
        assert out.shape == q.shape

    try:
        for B, blocks, branches, train in (
            (4, 3, 4, False), (3, 2, 3, False), (1, 4, 5, False), (1, 2, 9, True), (1, 3, 9, True), (2, 3, 9, True),
            (2, 2, 7, True), (2, 2, 7, False), (4, 1, 4, False), (1, 1, 9, True),
        ):  # fmt: skip
            attend(B, blocks, branches, train)
        assert counters["stats"]["unique_graphs"] <= 8, dict(counters["stats"])
        torch._dynamo.reset()
        with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(Exception, match="fullgraph"):
            for B, train in ((1, False), (2, True), (3, False)):
                attend(B, 2, 3, train)
    finally:
        attention.compiled_flex.cache_clear()
        torch._dynamo.reset()
