"""VideoLM: the one adapter over a Hugging Face video-language model."""

import copy
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache

from data.attention import add_deepstack, choose_by_mask, flex_works, vision_layout
from data.batches import (
    TOKENS_AT_ONCE,
    Batch,
    SFTOutput,
    Video,
    by_clip,
    in_chunks,
    index_keywords,
)
from data.device import compute_dtype, to_device
from data.generation import Generation
from data.packing import BLOCK, Packed, caption_trees, number_visual_tokens, pack, rollout_trees, twin_tokens
from data.positions import rope_index, use_published_positions
from kernels.logprob import cross_entropy_from_states, log_probs_from_states, selected_log_probs
from vp import ContrastiveHeads, Example


def embed_patches_by_product(patch_embed: nn.Module) -> None:
    """Embed patches by one matrix product with the weight of the convolution: its kernel is as large as a patch.

    The same numbers, and on a CPU two to three times faster. The class is changed, not the weights: they keep their names.
    """

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)  # (width, C * frames * height * width), in the order of a patch's numbers
        return F.linear(patches.to(weight.dtype), weight, self.proj.bias)

    if type(getattr(patch_embed, "proj", None)) is nn.Conv3d:
        kind = type(patch_embed)
        patch_embed.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def run_wanted_rows(layer: nn.Module) -> None:
    """Let a decoder layer run its MLP on some rows only: on those of `wanted_rows` (M,), counted through the flattened
    (B*T) sequence, if it is given them. It then returns their states (M, D).

    For the last layer, of which most rows are never read. The class is changed, not the weights, and the rows come as an
    argument: so they are still there when a checkpointed layer runs again in the backward pass.
    """
    kind = type(layer)

    def forward(self, hidden_states: Tensor, wanted_rows: Tensor | None = None, **more) -> Tensor:
        if wanted_rows is None:
            return kind.forward(self, hidden_states, **more)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **more)
        states = (hidden_states + attended).flatten(0, 1).index_select(0, wanted_rows)
        return states + self.mlp(self.post_attention_layernorm(states))

    layer.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def some_layers(language: nn.Module, layers: slice) -> nn.Module:
    """A language model with some of its layers, which shares their weights; the norm belongs to the last layer."""
    part, kept = copy.copy(language), language.layers[layers]
    part._modules = language._modules | {"layers": kept}
    if kept[-1] is not language.layers[-1]:
        part._modules["norm"] = nn.Identity()
    if getattr(language.config, "layer_types", None):  # what kind of attention each has is looked up by its number
        part.config = copy.copy(language.config)
        part.config.layer_types = language.config.layer_types[layers]
    return part


# Tokens of a sequence up to which, on a CPU, one mask of all pairs takes the place of a call of attention for each branch:
# eight short clips are 5 percent faster so. One clip takes as long either way from 128 to 512 tokens, and longer under the
# mask from 1,024 on.
SHORT = 256


class VideoLM(Generation, nn.Module):
    """A Hugging Face video-language model, seen as the method needs it: vision once, full and twin from it.

    hf: Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration, or one wrapped by peft. contrastive_layer: l,
    after how many of the language model's layers the states are taken (default: half of them). Everything that leans on
    the inside of transformers is here and in data/generation.py, and a test holds the logits to those of the plain model.
    """

    def __init__(self, hf: nn.Module, contrastive_layer: int | None = None, temperature: float = 0.1):
        super().__init__()
        self.hf = hf
        base = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
        self.config = base.config
        use_published_positions(base)
        self.warned = False  # of slots too short for positions of their own
        vision_config = base.model.visual.config
        if "flash" not in (vision_config._attn_implementation or ""):
            vision_config._attn_implementation = "chunked_not_flash"
        choose_by_mask(base.model.language_model.config)
        embed_patches_by_product(base.model.visual.patch_embed)
        # Only in families whose layers we know line by line; others run all rows, and the wanted ones are picked later.
        self.cuts_rows = self.config.model_type in ("qwen2_5_vl", "qwen3_vl")
        if self.cuts_rows:
            run_wanted_rows(base.model.language_model.layers[-1])
        if hasattr(base.model.language_model, "_deepstack_process"):
            base.model.language_model._deepstack_process = add_deepstack
        self.copies: dict[tuple, Tensor] = {}  # see `copied_ids`
        num_layers = self.config.text_config.num_hidden_layers
        # Qwen3-VL adds visual features to the states after its first layers: the states are taken behind that.
        deepstack = len(getattr(self.config.vision_config, "deepstack_visual_indexes", ()))
        self.contrastive_layer = num_layers // 2 if contrastive_layer is None else contrastive_layer
        if not deepstack < self.contrastive_layer < num_layers:
            raise ValueError(
                f"contrastive_layer: got {self.contrastive_layer}; this model has {num_layers} layers and states can be "
                f"taken after {deepstack + 1} to {num_layers - 1} of them"
            )
        self.heads = ContrastiveHeads(self.config.text_config.hidden_size, temperature=temperature)

        # Linear attention carries a state along the sequence: branches cannot share a prefix by a mask there.
        layer_types = getattr(self.config.text_config, "layer_types", None) or ["full_attention"]
        self.shares_prefix = set(layer_types) == {"full_attention"}

    @property
    def flex(self) -> bool:
        """Whether branches attend by flex_attention, on a GPU where it works, or by a call of sdpa each."""
        on_gpu = self.device.type == "cuda" and compute_dtype(self.device) == torch.bfloat16
        return on_gpu and flex_works(self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.base.lm_head.weight.device

    # The modules below belong to self.hf; properties keep them from being registered, and saved, twice.
    @property
    def base(self) -> nn.Module:
        """The conditional-generation model, without any adapter wrapper."""
        return self.hf.get_base_model() if hasattr(self.hf, "get_base_model") else self.hf

    def collate(self, examples: Sequence[Example], for_generation: bool = False) -> Batch:
        """Pad examples into a batch: to the right with captions for training, to the left without them for generation."""
        length = [e.prompt_length if for_generation else len(e.input_ids) for e in examples]
        width, pad_id = max(length), self.pad_id
        input_ids = torch.full((len(examples), width), pad_id)
        attention_mask, token_types = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
        label_rows, label_ids, visual_places = [], [], []
        for b, (e, n) in enumerate(zip(examples, length)):
            at = slice(width - n, width) if for_generation else slice(0, n)
            input_ids[b, at], token_types[b, at], attention_mask[b, at] = e.input_ids[:n], e.token_types[:n], 1
            predicts = torch.arange(e.prompt_length - 1, n - 1)  # the token before each caption token predicts it
            label_rows.append(b * width + predicts)
            label_ids.append(e.input_ids[predicts + 1])
            visual = torch.nonzero(e.token_types[:n] == 2).squeeze(1)
            visual_places.append(e.by_slot(visual))
        key_places, keyword_ids, key_tokens = index_keywords(examples, visual_places)
        key_rows = twin_rows = key_tokens.clip * width + key_places
        position_ids = forked = twin_index = None
        if for_generation:  # generate() works out positions for itself
            own = number_visual_tokens(examples)
            twin_index = torch.cat([twin_tokens(e, shown) for e, shown in zip(examples, own)])
        else:
            position_ids = self.positions(examples, input_ids, token_types, attention_mask)
            trees, twins = caption_trees(examples, position_ids, self.shares_prefix)
            forked = pack(trees, pad_id, self.block)
            sequence, shift = torch.tensor(twins)[key_tokens.clip].unbind(1)
            twin_rows = sequence * forked.input_ids.shape[1] + key_places + shift
        return Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_types=token_types,
            position_ids=position_ids,
            pixels=torch.cat([e.pixels for e in examples]),
            grid=torch.cat([e.runs for e in examples]),
            seconds_per_slot=torch.tensor([e.seconds_per_slot for e in examples for _ in e.runs]),
            num_runs=[len(e.runs) for e in examples],
            label_rows=torch.cat(label_rows),
            label_ids=torch.cat(label_ids),
            twin_index=twin_index,
            forked=forked,
            key_rows=key_rows,
            twin_rows=twin_rows,
            keyword_ids=keyword_ids.clamp(min=0),
            keyword_mask=(keyword_ids >= 0).float(),
            key_tokens=key_tokens,
        )

    def positions(
        self, examples: Sequence[Example], input_ids: Tensor, token_types: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """M-RoPE positions (3, B, T) of examples, or of their prompts, as rows of a batch; see `rope_index`.

        Warns once if slots are too short for positions of their own.
        """
        vision = self.config.vision_config
        shortest = min(e.seconds_per_slot for e in examples)
        per_second = getattr(vision, "tokens_per_second", None)
        if per_second and not self.warned and shortest * per_second < 1 - 1e-3:
            self.warned, most = True, per_second * vision.temporal_patch_size
            warnings.warn(
                f"a slot lasts {shortest:.3g} s: below {1 / per_second:g} s neighbouring slots share a temporal position. "
                f"Sample at most {most:g} frames a second: --fps {most:g}, or fewer frames (--max-frames, --num-frames)",
                stacklevel=2,
            )
        stands = [torch.arange(e.num_slots) * e.seconds_per_slot if e.slot_seconds is None else e.slot_seconds
                  for e in examples]  # fmt: skip
        return rope_index(
            self.config, input_ids, token_types, video_grid_thw=torch.cat([e.runs for e in examples]),
            attention_mask=attention_mask, slot_seconds=torch.cat(stands).float(),
        )[0]  # fmt: skip

    def encode_video(self, batch: Batch) -> Video:
        """Run the vision encoder once over the batch's full videos."""
        return self.encode(batch.pixels, batch.grid, batch.num_runs)

    def encode_examples(self, examples: Sequence[Example]) -> Video:
        """The same for examples that are not in a batch."""
        pixels, grid = torch.cat([e.pixels for e in examples]), torch.cat([e.runs for e in examples])
        return self.encode(pixels, grid, [len(e.runs) for e in examples])

    def encode(self, pixels: Tensor, grid: Tensor, num_runs: Sequence[int]) -> Video:
        """Run the vision encoder over patches; they and grid (all runs, 3) are on the host. num_runs: of each clip.

        Where nothing of the encoder is trained there is no graph, and some clips go at a time. Left to itself there would
        be one: gradient checkpointing makes the patch embedding ask for a gradient (`enable_input_require_grads`), and the
        whole encoder would be kept for the backward pass, and run in it.
        """
        visual = self.base.model.visual
        sizes = grid.prod(1).tolist()
        if torch.is_grad_enabled() and any(p.requires_grad for p in visual.parameters()):
            return by_clip(self.encode_at_once(pixels, grid), num_runs)
        with torch.no_grad():
            parts = [
                self.encode_at_once(pixels[sum(sizes[: some.start]) : sum(sizes[: some.stop])], grid[some])
                for some in in_chunks(sizes, TOKENS_AT_ONCE * visual.spatial_merge_size**2)
            ]
            return by_clip(Video.join(parts), num_runs)

    def encode_at_once(self, pixels: Tensor, grid: Tensor) -> Video:
        """One pass of the vision encoder."""
        visual, device = self.base.model.visual, self.device
        pixels = to_device(pixels.to(visual.dtype), device)  # in bfloat16 half as much is copied
        encoded = visual(pixels, grid_thw=grid, return_dict=True, **vision_layout(visual, grid, device))
        sizes = (grid.prod(1) // visual.spatial_merge_size**2).tolist()
        deepstack = getattr(encoded, "deepstack_features", None)
        return Video(
            list(encoded.pooler_output.split(sizes)),
            None if deepstack is None else [list(layer.split(sizes)) for layer in deepstack],
        )

    def take_clips(self, video: Video, clips: Sequence[int]) -> Video:
        """The encoded videos of some clips of a batch."""
        return video.change(lambda layer: [layer[b] for b in clips])

    def gather_video(self, video: Video, index: Tensor) -> Video:
        """Visual features picked from encoded videos, token by token; Qwen3-VL's deepstack features in the same way.

        A twin's are a gather of the full video's: exact, since a slot is encoded by itself.
        """
        return video.change(lambda layer: [torch.cat(layer).index_select(0, index)])

    def embed(self, input_ids: Tensor, token_types: Tensor, video: Video) -> dict:
        """What the language model begins with: text (B, T), and encoded videos where token_types are 2.

        The multimodal model would do the same, and count the visual tokens on the device, for which the host would wait.
        """
        visual, embedded = token_types == 2, self.base.get_input_embeddings()(input_ids)
        embedded = embedded.masked_scatter(visual[..., None], torch.cat(video.pooler_output).to(embedded.dtype))
        if video.deepstack_features is None:
            return {"inputs_embeds": embedded}
        deepstack = [torch.cat(layer) for layer in video.deepstack_features]
        return {"inputs_embeds": embedded, "visual_pos_masks": visual, "deepstack_visual_embeds": deepstack}

    def run_language(
        self, embedded: dict, position_ids: Tensor, layers: slice = slice(None), wanted_rows: Tensor | None = None,
        attention_mask: Tensor | BlockMask | None = None, cache: Cache | None = None, **more,
    ) -> Tensor:  # fmt: skip
        """States (B, T, D) after some layers of the language model; the last is followed by its norm.

        embedded: from `embed`, or the states after the layers before, {"inputs_embeds": (B, T, D)}. No attention_mask:
        causal. wanted_rows: (M,) of the flattened (B*T) sequence; their states (M, D) are returned in place of all.
        """
        language = self.base.model.language_model
        if layers != slice(None):
            language = some_layers(language, layers)
        if self.cuts_rows and wanted_rows is not None:
            more["wanted_rows"], wanted_rows = wanted_rows, None
        states = language(
            **embedded, position_ids=position_ids, attention_mask=attention_mask, past_key_values=cache,
            use_cache=cache is not None, **more,
        ).last_hidden_state  # fmt: skip
        return states if wanted_rows is None else states.flatten(0, 1).index_select(0, wanted_rows)

    def inputs(self, batch: Batch, video: Video | None) -> dict:
        """Keyword arguments of the Hugging Face model for a batch and its encoded video."""
        arguments = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "mm_token_type_ids": batch.token_types,
            "video_grid_thw": batch.grid.to(batch.input_ids.device),
            "mm_encoder_outputs": {"video": video},
        }
        if self.config.model_type == "qwen2_5_vl":
            arguments["second_per_grid_ts"] = batch.seconds_per_slot
        return arguments

    def forward(self, batch: Batch, contrastive: bool = True, twin_negatives: bool = True) -> SFTOutput:
        """Caption loss on the full video and, if asked, the contrastive loss of full against twin (method, section 2).

        Of the twin only its event is run, behind what it shares with the full video, and only through the first l layers.
        Without `contrastive` nothing of that is computed.
        """
        (B, T), video = batch.input_ids.shape, self.encode_video(batch)
        first, others = slice(self.contrastive_layer), slice(self.contrastive_layer, None)
        if contrastive and twin_negatives:
            all_states = self.run_branches(batch.forked, video, by_pairs=T <= SHORT, layers=first)
        else:
            # Padding is on the right, where no token looks: no mask, so that attention takes its causal kernel.
            embedded = self.embed(batch.input_ids, batch.token_types, video)
            all_states = self.run_language(embedded, batch.position_ids, first)
        full = all_states[:B, :T].contiguous()  # twins stand behind it
        states = self.run_language({"inputs_embeds": full}, batch.position_ids, others, batch.label_rows)  # (L, D)
        if self.plain_head:
            lm_loss = cross_entropy_from_states(states, self.base.lm_head.weight, batch.label_ids)
        else:
            lm_loss = F.cross_entropy(self.base.lm_head(states).float(), batch.label_ids, reduction="sum")
        if not contrastive or len(batch.keyword_ids) == 0:
            return SFTOutput(lm_loss, lm_loss.new_zeros(()), {})

        h, h_twin = full.flatten(0, 1).index_select(0, batch.key_rows), None  # (N, D)
        if twin_negatives:
            h_twin = all_states.flatten(0, 1).index_select(0, batch.twin_rows)
        # t_j: mean input embedding of the keyword's tokens, detached: it has never looked at the video.
        embedded = self.base.get_input_embeddings()(batch.keyword_ids).detach()  # (K, W, D)
        mask = batch.keyword_mask[..., None]
        t = (embedded * mask).sum(1) / mask.sum(1)
        return SFTOutput(lm_loss, *self.heads(h, h_twin, t, batch.key_tokens))

    @property
    def plain_head(self) -> bool:
        """Whether the output head is its weight and nothing else: no bias, adapter, quantisation or sharding."""
        head = self.base.lm_head
        return type(head) is nn.Linear and head.bias is None and type(head.weight) is nn.Parameter

    # --- packed sequences: what rollouts share is run once (method, section 3)

    @property
    def pad_id(self) -> int:
        """The id that padding holds."""
        return self.base.generation_config.pad_token_id or 0

    @property
    def banned(self) -> Tensor:
        """Ids that no rollout may hold: those of the vision encoder, and padding if it does not end a text."""
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = {getattr(self.config, name) for name in names} | {self.base.generation_config.pad_token_id}
        return self.copied_ids(sorted(i for i in ids - set(self.end_numbers) if i is not None))

    @property
    def end_numbers(self) -> list[int]:
        """Ids that end a text."""
        ids = self.base.generation_config.eos_token_id
        return [ids] if isinstance(ids, int) else list(ids)

    def copied_ids(self, ids: Sequence[int]) -> Tensor:
        """Ids on the model's device, copied there once: a copy waits for the device."""
        key = (self.device, *ids)
        if key not in self.copies:
            self.copies[key] = torch.tensor(ids, device=self.device)
        return self.copies[key]

    def pack_rollouts(
        self, examples: Sequence[Example], rollouts: Sequence[Sequence[Tensor]], num_full: int | None = None
    ) -> Packed:
        """Prompts with their rollouts, of the full video and of the twin; see `rollout_trees`."""
        positions = self.prompt_positions(examples)
        return rollout_trees(examples, positions, rollouts, num_full, self.shares_prefix).pack(self.pad_id, self.block)

    @property
    def block(self) -> int:
        """What lengths of packed sequences are rounded up to: for flex_attention, so that it is compiled for no others."""
        return BLOCK if self.flex else 1

    def prompt_positions(self, examples: Sequence[Example]) -> list[Tensor]:
        """M-RoPE positions of each example's prompt: (3, prompt_length)."""
        prompts = [(e.input_ids[: e.prompt_length], e.token_types[: e.prompt_length]) for e in examples]
        return [self.positions([e], ids[None], types[None])[:, 0] for e, (ids, types) in zip(examples, prompts)]

    def run_packed(self, packed: Packed, video: Video, cache: Cache | None = None) -> Tensor:
        """States (M, D) of the wanted rows, from one pass in which nothing shared is run twice; fills `cache`."""
        return self.run_branches(packed, video, wanted_rows=packed.rows, cache=cache)

    def run_branches(self, packed: Packed, video: Video, by_pairs: bool = False, **more) -> Tensor:
        """`run_language` on packed sequences, in which each token sees its own branch and what it grows from.

        by_pairs: where there is no flex_attention, one mask of all pairs of tokens in place of a call for each branch.
        Faster if branches are few and short.
        """
        if not self.shares_prefix:
            attention = {"attention_mask": (packed.branch < packed.ancestors.shape[-1] - 1).long()}  # all but padding
        elif self.flex:
            attention = {"attention_mask": packed.block_mask()}
        else:
            attention = {"attention_mask": packed.pair_mask()} if by_pairs else {"branches": packed.branches()}
        embedded = self.embed(packed.input_ids, packed.token_types, self.gather_video(video, packed.visual_index))
        return self.run_language(embedded, packed.position_ids, **attention, **more)

    def log_probs(self, packed: Packed, video: Video, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability (M,) of every token of packed rollouts, and the entropy (M,) where it was chosen."""
        states, head = self.run_packed(packed, video), self.base.lm_head
        if self.plain_head:
            return log_probs_from_states(states, head.weight, packed.targets, self.banned, temperature)
        return selected_log_probs(head(states), packed.targets, self.banned, temperature)

    @torch.no_grad()
    def caption_log_probs(self, examples: Sequence[Example]) -> Tensor:
        """How likely each example's caption is (B,): the sum of the log-probabilities of its tokens."""
        found = []
        for some in in_chunks([len(e.input_ids) for e in examples], TOKENS_AT_ONCE):
            captions = [e.input_ids[e.prompt_length :] for e in examples[some]]
            packed = self.pack_rollouts(examples[some], [[caption] for caption in captions]).to(self.device)
            logp, _ = self.log_probs(packed, self.encode_examples(examples[some]))
            found += [of_clip.sum() for of_clip in logp.split([len(caption) for caption in captions])]
        return torch.stack(found)
