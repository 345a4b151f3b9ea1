"""VideoLM: the one adapter over a Hugging Face video-language model."""

import copy
import itertools
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LogitsProcessor

from data.attention import choose_by_mask
from data.packing import Packed, Tree, move, pack
from data.positions import rope_index, use_published_positions
from kernels.contrastive import ids_shown
from kernels.logprob import cross_entropy_from_states, log_probs_from_states, sampling_log_probs, selected_log_probs
from vp import ContrastiveHeads, Example, KeyTokens, choose


@dataclass
class Rollouts:
    """Sampled descriptions of B clips, R each, those of the full video first, then those of the twin.

    tokens (B, R, L), padded behind the end-of-text token; logp (B, R, L), of each when it was sampled; lengths (B, R),
    tokens of each with its end; finished (B, R) bool, whether it ended by itself. seconds: where the time went.
    """

    tokens: Tensor
    logp: Tensor
    lengths: Tensor
    finished: Tensor
    seconds: dict[str, float] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Rollouts":
        """The same rollouts on another device."""
        return move(self, device)


@dataclass
class SFTOutput:
    """Losses of one micro-batch, summed over its caption tokens and its keywords; nothing has been read from the device."""

    lm_loss: Tensor
    contrastive_loss: Tensor
    metrics: dict[str, Tensor]


@dataclass
class Batch:
    """Padded clips with every index worked out beforehand, so that the training loop never waits for the device.

    input_ids, attention_mask, token_types (B, T); position_ids (3, B, T) or None; pixels, grid (all runs, 3) and
    seconds_per_slot of each run, as in `Example`; num_runs: of each clip. label_rows (L,): rows of the flattened (B*T)
    sequence that predict label_ids.
    twin_index (V,): the visual token that the twin shows in the place of each. prefix_length: tokens up to the last
    visual one. key_rows (N,): key-slot tokens as rows of the flattened (B*prefix_length) prefix. keyword_ids (K, W)
    padded with keyword_mask (K, W). key_tokens: who asks for whom.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_types: Tensor
    position_ids: Tensor | None
    pixels: Tensor
    grid: Tensor
    seconds_per_slot: Tensor
    num_runs: list[int]
    label_rows: Tensor
    label_ids: Tensor
    twin_index: Tensor
    prefix_length: int
    key_rows: Tensor
    keyword_ids: Tensor
    keyword_mask: Tensor
    key_tokens: KeyTokens

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device, copied without waiting."""
        return move(self, device)


def twin_tokens(example: Example, visual: Tensor) -> Tensor:
    """Which of an example's visual tokens (V,), given by their numbers, its twin shows in the place of each."""
    if example.source is None:
        return visual
    slots = example.by_slot(visual)
    return torch.cat([slots[s] for s in example.source.tolist()])


def by_clip(video, num_runs: Sequence[int]):
    """Encoded videos with one entry a clip: the encoder gives one for each run of slots of one size."""
    if all(n == 1 for n in num_runs):
        return video

    def join(parts: Sequence[Tensor]) -> list[Tensor]:
        rest = iter(parts)
        return [torch.cat(list(itertools.islice(rest, n))) for n in num_runs]

    joined = copy.copy(video)
    joined.pooler_output = join(video.pooler_output)
    if getattr(video, "deepstack_features", None) is not None:
        joined.deepstack_features = [join(layer) for layer in video.deepstack_features]
    return joined


def index_keywords(
    examples: Sequence[Example], visual_places: Sequence[Sequence[Tensor]], prefix_length: int
) -> tuple[Tensor, Tensor, KeyTokens]:
    """Key-slot tokens and keywords of a batch, those of clips without a twin left out.

    visual_places: for each clip and slot the places of its tokens in the sequence. Returns key_rows (N,), keyword_ids
    (K, W) padded with -1, and who asks for whom; see `Batch`.
    """
    shown = [[k for k in e.keywords if e.source is not None and k.slots.any()] for e in examples]  # by clip
    keywords = [keyword for of_clip in shown for keyword in of_clip]
    key_rows, clip, slot = [], [], []
    for b, (places, of_clip) in enumerate(zip(visual_places, shown)):
        is_key = torch.stack([keyword.slots for keyword in of_clip]).any(0).tolist() if of_clip else []
        for s, key in enumerate(is_key):
            if key:
                key_rows.append(b * prefix_length + places[s])
                clip.append(torch.full_like(places[s], b))
                slot.append(torch.full_like(places[s], s))
    keyword_slots = torch.zeros(len(keywords), max(len(p) for p in visual_places), dtype=torch.bool)
    for j, keyword in enumerate(keywords):
        keyword_slots[j, : len(keyword.slots)] = keyword.slots
    number = {text: i for i, text in enumerate(dict.fromkeys(keyword.text for keyword in keywords))}
    ids = [keyword.ids for keyword in keywords]
    none = torch.empty(0, dtype=torch.long)
    asks = dict(
        clip=torch.cat([none, *clip]),
        slot=torch.cat([none, *slot]),
        keyword_clip=torch.tensor([b for b, of_clip in enumerate(shown) for _ in of_clip], dtype=torch.long),
        keyword_id=torch.tensor([number[keyword.text] for keyword in keywords], dtype=torch.long),
        keyword_slots=keyword_slots,
    )
    return (
        torch.cat([none, *key_rows]),
        nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1) if ids else torch.full((0, 1), -1),
        KeyTokens(**asks, shown=ids_shown(**asks)),
    )


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


class VideoLM(nn.Module):
    """A Hugging Face video-language model, seen as the method needs it: vision once, full and twin from it.

    hf: Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration, or one wrapped by peft. contrastive_layer: l,
    after how many of the language model's layers the states are taken (default: half of them). Everything that leans on
    the inside of transformers is in this class, and a test holds its logits to those of the plain model.
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
        """Whether branches attend by flex_attention, on a GPU, or by sdpa with a mask of token pairs."""
        return self.base.lm_head.weight.is_cuda

    # The modules below belong to self.hf; properties keep them from being registered, and saved, twice.
    @property
    def base(self) -> nn.Module:
        """The conditional-generation model, without any adapter wrapper."""
        return self.hf.get_base_model() if hasattr(self.hf, "get_base_model") else self.hf

    @property
    def caught(self) -> list[int]:
        """What `output_hidden_states` must be to catch the states after l layers; see `states_after_l`."""
        return [self.contrastive_layer - 1, self.contrastive_layer]

    def states_after_l(self, hidden_states: Sequence[Tensor | None]) -> Tensor:
        """The states after l layers among those caught: transformers counts the embeddings, too, but not before 5.23."""
        embeddings_count = len(hidden_states) > len(self.base.model.language_model.layers)
        return hidden_states[self.contrastive_layer - (not embeddings_count)]

    def first_layers(self) -> nn.Module:
        """The multimodal model cut off after l layers, before the final norm: a shallow copy that shares all weights."""
        model = copy.copy(self.base.model)
        language = copy.copy(model.language_model)
        cut = {"layers": language.layers[: self.contrastive_layer], "norm": nn.Identity()}
        language._modules = language._modules | cut
        model._modules = model._modules | {"language_model": language}
        return model

    def collate(self, examples: Sequence[Example], for_generation: bool = False) -> Batch:
        """Pad examples into a batch: to the right with captions for training, to the left without them for generation."""
        length = [e.prompt_length if for_generation else len(e.input_ids) for e in examples]
        width, pad_id = max(length), self.pad_id
        input_ids = torch.full((len(examples), width), pad_id)
        attention_mask, token_types = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
        label_rows, label_ids, twin_index, visual_places, offset = [], [], [], [], 0
        for b, (e, n) in enumerate(zip(examples, length)):
            at = slice(width - n, width) if for_generation else slice(0, n)
            input_ids[b, at], token_types[b, at], attention_mask[b, at] = e.input_ids[:n], e.token_types[:n], 1
            predicts = torch.arange(e.prompt_length - 1, n - 1)  # the token before each caption token predicts it
            label_rows.append(b * width + predicts)
            label_ids.append(e.input_ids[predicts + 1])
            visual = torch.nonzero(e.token_types[:n] == 2).squeeze(1)
            visual_places.append(e.by_slot(visual))
            twin_index.append(offset + twin_tokens(e, torch.arange(len(visual))))
            offset += len(visual)
        prefix_length = max(int(places[-1][-1]) + 1 for places in visual_places)
        key_rows, keyword_ids, key_tokens = index_keywords(examples, visual_places, prefix_length)
        position_ids = None
        if not for_generation:  # generate() works them out for itself
            position_ids = self.positions(examples, input_ids, token_types, attention_mask)
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
            twin_index=torch.cat(twin_index),
            prefix_length=prefix_length,
            key_rows=key_rows,
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

    def encode_video(self, batch: Batch):
        """Run the vision encoder once over the batch's full videos. Returns the encoder's own output record."""
        return by_clip(self.base.model.get_video_features(batch.pixels, batch.grid), batch.num_runs)

    def encode_examples(self, examples: Sequence[Example]):
        """The same for examples that are not in a batch."""
        device = self.base.lm_head.weight.device
        pixels, grid = torch.cat([e.pixels for e in examples]), torch.cat([e.runs for e in examples])
        video = self.base.model.get_video_features(pixels.to(device), grid.to(device))
        return by_clip(video, [len(e.runs) for e in examples])

    def take_clips(self, video, clips: Sequence[int]):
        """The encoded videos of some clips of a batch."""
        taken = copy.copy(video)
        taken.pooler_output = [video.pooler_output[b] for b in clips]
        if getattr(video, "deepstack_features", None) is not None:
            taken.deepstack_features = [[layer[b] for b in clips] for layer in video.deepstack_features]
        return taken

    def gather_video(self, video, index: Tensor):
        """Visual features picked from encoded videos, token by token; Qwen3-VL's deepstack features in the same way.

        A twin's are a gather of the full video's: exact, since a slot is encoded by itself.
        """

        def gather(per_clip: Sequence[Tensor]) -> list[Tensor]:
            return [torch.cat(list(per_clip)).index_select(0, index)]

        picked = copy.copy(video)
        picked.pooler_output = gather(video.pooler_output)
        if getattr(video, "deepstack_features", None) is not None:
            picked.deepstack_features = [gather(layer) for layer in video.deepstack_features]
        return picked

    def inputs(self, batch: Batch, video) -> dict:
        """Keyword arguments of the Hugging Face model for a batch and its encoded video."""
        arguments = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "mm_token_type_ids": batch.token_types,
            "video_grid_thw": batch.grid,
            "mm_encoder_outputs": {"video": video},
        }
        if self.config.model_type == "qwen2_5_vl":
            arguments["second_per_grid_ts"] = batch.seconds_per_slot
        return arguments

    def forward(self, batch: Batch, contrastive: bool = True, twin_negatives: bool = True) -> SFTOutput:
        """Caption loss on the full video and, if asked, the contrastive loss of full against twin (method, section 2).

        The full pass is the ordinary one, its layer-l states caught on the way; the twin runs the visual prefix through
        the first l layers only. Without `contrastive` nothing of that is computed.
        """
        video = self.encode_video(batch)
        keep = self.caught if contrastive else False
        full = self.base.model(
            **self.inputs(batch, video), position_ids=batch.position_ids, output_hidden_states=keep, use_cache=False
        )
        states = full.last_hidden_state.flatten(0, 1).index_select(0, batch.label_rows)  # (L, D): no full logits
        if self.plain_head:
            lm_loss = cross_entropy_from_states(states, self.base.lm_head.weight, batch.label_ids)
        else:
            lm_loss = F.cross_entropy(self.base.lm_head(states).float(), batch.label_ids, reduction="sum")
        if not contrastive or not len(batch.keyword_ids):
            return SFTOutput(lm_loss, lm_loss.new_zeros(()), {})

        prefix = slice(0, batch.prefix_length)
        h = self.states_after_l(full.hidden_states)[:, prefix].flatten(0, 1).index_select(0, batch.key_rows)  # (N, D)
        h_twin = None
        if twin_negatives:
            cut = self.inputs(batch, self.gather_video(video, batch.twin_index))
            cut |= {name: cut[name][:, prefix] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
            position_ids = batch.position_ids[..., prefix]
            twin = self.first_layers()(**cut, position_ids=position_ids, use_cache=False).last_hidden_state
            h_twin = twin.flatten(0, 1).index_select(0, batch.key_rows)
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

    # --- rollouts and their log-probabilities (method, section 3)

    @property
    def pad_id(self) -> int:
        """The id that padding holds."""
        return self.base.generation_config.pad_token_id or 0

    @property
    def banned(self) -> Tensor:
        """Ids that no rollout may hold: those of the vision encoder, and padding if it does not end a text."""
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = {getattr(self.config, name) for name in names} | {self.base.generation_config.pad_token_id}
        ids = sorted(i for i in ids - set(self.end_ids.tolist()) if i is not None)
        return torch.tensor(ids, device=self.end_ids.device)

    @property
    def end_ids(self) -> Tensor:
        """Ids that end a text."""
        ids = self.base.generation_config.eos_token_id
        return torch.tensor([ids] if isinstance(ids, int) else ids, device=self.base.lm_head.weight.device)

    def grow_prompt(self, e: Example, offset: int, twin: bool = True) -> tuple[Tree, int, int]:
        """A prompt that forks at the first replaced slot: its tree, the branch of the full video and that of the twin.

        offset: how many of the encoded visual tokens belong to the clips before it. The two are one branch if the clip has
        no twin, or none is asked for.
        """
        n, visual = e.prompt_length, torch.nonzero(e.token_types == 2).squeeze(1)
        ids, types, positions = e.input_ids[:n], e.token_types[:n], self.prompt_positions(e)
        shown, tree = offset + torch.arange(len(visual)), Tree()
        if e.source is None or not twin:
            full = tree.grow(-1, ids, types, positions, shown)
            return tree, full, full
        replaced = twin_tokens(e, shown)
        first = int((replaced != shown).nonzero()[0])  # the first visual token that is replaced
        fork = int(visual[first])
        shared = tree.grow(-1, ids[:fork], types[:fork], positions[:, :fork], shown[:first])
        full, twin = (
            tree.grow(shared, ids[fork:], types[fork:], positions[:, fork:], video[first:]) for video in (shown, replaced)
        )
        return tree, full, twin

    def pack_prefixes(self, examples: Sequence[Example], questions: Sequence[Sequence[Tensor]] | None = None) -> Packed:
        """Prompts that fork at the first replaced slot into the full video and the twin.

        questions: for each clip the tokens, at least one, of each text that may follow its prompt; each becomes a branch
        of the full video, and one of the twin. rows (2B,): the last token of the full video's and of the twin's prompt,
        clip by clip; with questions (2QB,): that of each question about the full video, then about the twin, Q the most
        that any clip has (the last question fills up what a clip lacks). If a clip has no twin, the full video's
        rows take the place of the twin's.
        """
        trees, offset = [], 0
        most = max(map(len, questions)) if questions else 0
        for b, e in enumerate(examples):
            tree, full, twin = self.grow_prompt(e, offset)
            offset += int((e.token_types == 2).sum())
            tips = [tree.tip[full], tree.tip[twin]]
            if questions:
                about_full = [tree.tip[tree.grow_text(full, q)] for q in questions[b]]
                about_twin = about_full
                if e.source is not None:
                    about_twin = [tree.tip[tree.grow_text(twin, q)] for q in questions[b]]
                lacking = most - len(questions[b])  # the last question fills up
                tips = [*about_full, *about_full[-1:] * lacking, *about_twin, *about_twin[-1:] * lacking]
            tree.want(*tips)
            trees.append(tree)
        return pack(trees, self.pad_id)

    def pack_rollouts(
        self, examples: Sequence[Example], rollouts: Sequence[Sequence[Tensor]], num_full: int | None = None
    ) -> Packed:
        """[prompt][y_1]...[y_G] of each clip, in which each rollout sees the prompt and itself.

        rollouts: for each clip its rollouts, tokens (L_g,) each. The first num_full of them (None: all) are of the full
        video, the others of its twin: they see the twin's prompt. Where the model cannot share a prefix, each rollout gets
        a sequence of its own.
        """
        trees, targets, rollout, offset = [], [], [], 0
        for e, ys in zip(examples, rollouts):
            of_twin = [num_full is not None and g >= num_full for g in range(len(ys))]
            for group in [range(len(ys))] if self.shares_prefix else [[g] for g in range(len(ys))]:
                if self.shares_prefix:
                    tree, full, twin = self.grow_prompt(e, offset, any(of_twin))
                else:
                    tree, full = self.grow_alone(e, offset, of_twin[group[0]])
                    twin = full
                for g in group:
                    prompt, y = twin if of_twin[g] else full, ys[g]
                    places = tree.places(tree.grow_text(prompt, y))
                    tree.want(tree.tip[prompt], *places[:-1])  # the token before each token predicts it
                    rollout.append(torch.full((len(y),), len(targets)))
                    targets.append(y)
                trees.append(tree)
            offset += int((e.token_types == 2).sum())
        return replace(pack(trees, self.pad_id), targets=torch.cat(targets), rollout=torch.cat(rollout))

    def grow_alone(self, e: Example, offset: int, twin: bool) -> tuple[Tree, int]:
        """A prompt in one branch, of the full video or of the twin; see `grow_prompt`."""
        n, num_visual = e.prompt_length, int((e.token_types == 2).sum())
        shown = offset + torch.arange(num_visual)
        if twin:
            shown = twin_tokens(e, shown)
        tree = Tree()
        return tree, tree.grow(-1, e.input_ids[:n], e.token_types[:n], self.prompt_positions(e), shown)

    def prompt_positions(self, e: Example) -> Tensor:
        """M-RoPE positions of an example's prompt: (3, prompt_length)."""
        n = e.prompt_length
        return self.positions([e], e.input_ids[None, :n], e.token_types[None, :n])[:, 0]

    def run_packed(self, packed: Packed, video, cache: Cache | None = None) -> Tensor:
        """States (M, D) of the wanted rows, from one pass in which nothing shared is run twice; fills `cache`."""
        if not self.shares_prefix:
            mask = (packed.branch < packed.ancestors.shape[-1] - 1).long()  # (B, T): all but padding
        else:
            mask = packed.block_mask() if self.flex else packed.mask()
        out = self.base.model(
            input_ids=packed.input_ids,
            mm_token_type_ids=packed.token_types,
            attention_mask=mask,
            position_ids=packed.position_ids,
            mm_encoder_outputs={"video": self.gather_video(video, packed.visual_index)},
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return out.last_hidden_state.flatten(0, 1).index_select(0, packed.rows)

    def log_probs(self, packed: Packed, video, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability (M,) of every token of packed rollouts, and the entropy (M,) where it was chosen."""
        states, head = self.run_packed(packed, video), self.base.lm_head
        if self.plain_head:
            return log_probs_from_states(states, head.weight, packed.targets, self.banned, temperature)
        return selected_log_probs(head(states), packed.targets, self.banned, temperature)

    @torch.no_grad()
    def sample(
        self, prefixes: Packed, video, kind: Tensor, max_new_tokens: int,
        uniform: Tensor | None = None, temperature: float = 1.0,
    ) -> Rollouts:  # fmt: skip
        """Go on from the wanted rows of forked prefixes, R rollouts a clip, all from one prefill.

        kind: (R,) which of its clip's wanted rows each rollout grows from: of full video and twin, or of its questions.
        uniform: (B, R, max_new_tokens) numbers in [0, 1) that decide the tokens; None: greedy. A step feeds one token of
        every rollout as one sequence a clip, behind the prefix and all earlier tokens in the cache; the mask lets each
        see its own. So the cache is neither copied nor repeated.
        """
        num, (B, T) = len(kind), prefixes.input_ids.shape
        device, banned, end_ids = prefixes.input_ids.device, self.banned, self.end_ids
        began = wait_and_time(device)
        kind = kind.to(device)
        cache = DynamicCache(config=self.config.text_config)
        h = self.run_packed(prefixes, video, cache).unflatten(0, (B, -1))[:, kind]  # (B, R, D)
        rows = prefixes.rows.view(B, -1)[:, kind]
        position = prefixes.position_ids.flatten(1)[:, rows] + 1  # (3, B, R)
        # (B, R, T); twin rollouts of a clip without a twin grow from the full video
        sees_prefix = prefixes.sees(prefixes.branch.flatten()[rows])
        sees_own = torch.eye(num, dtype=torch.bool, device=device).repeat(B, 1, max_new_tokens)  # (B, R, R * steps)
        mask = torch.cat([sees_prefix, sees_own], 2)[:, None]
        prefilled = wait_and_time(device)
        tokens = torch.full((B, num, max_new_tokens), self.pad_id, device=device)
        logps = torch.zeros(B, num, max_new_tokens, device=device)
        lengths = torch.zeros(B, num, dtype=torch.long, device=device)
        done = torch.zeros(B, num, dtype=torch.bool, device=device)
        for t in range(max_new_tokens):
            logp = sampling_log_probs(self.base.lm_head(h), banned, temperature)  # (B, R, vocabulary)
            token = choose(logp, None if uniform is None else uniform[:, :, t])
            tokens[:, :, t] = torch.where(done, tokens[:, :, t], token)
            logps[:, :, t] = torch.where(done, 0.0, logp.gather(-1, token[..., None]).squeeze(-1))
            lengths += ~done
            done = done | torch.isin(token, end_ids)
            # Asking whether all are done waits for the device: on a GPU only now and then.
            if t + 1 == max_new_tokens or ((device.type == "cpu" or t % 8 == 7) and done.all()):
                break
            h = self.base.model.language_model(
                inputs_embeds=self.base.get_input_embeddings()(tokens[:, :, t]),
                position_ids=position + t,
                attention_mask=mask[..., : T + num * (t + 1)],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        seconds = {"prefill": prefilled - began, "decode": wait_and_time(device) - prefilled}
        return Rollouts(tokens[:, :, : t + 1], logps[:, :, : t + 1], lengths, done, seconds)

    @torch.no_grad()
    def sample_plain(
        self, batch: Batch, video, num_full: int, num_twin: int, max_new_tokens: int,
        uniform: Tensor | None = None, temperature: float = 1.0,
    ) -> Rollouts:  # fmt: skip
        """What `sample` does, by transformers' own generate() on prompts repeated for every rollout.

        The path of models whose prefix cannot be shared, and the reference that `sample` is tested against. batch:
        collated for_generation.
        """
        began = wait_and_time(batch.input_ids.device)
        pad_id, parts = self.pad_id, []
        sizes = [len(x) for x in video.pooler_output]
        for num, index, at in ((num_full, torch.arange(sum(sizes)), 0), (num_twin, batch.twin_index.cpu(), num_full)):
            if not num:
                continue
            index = torch.cat([part.repeat(num) for part in index.split(sizes)]).to(batch.twin_index.device)
            inputs = self.inputs(batch, self.gather_video(video, index))
            inputs |= {k: v.repeat_interleave(num, 0) for k, v in inputs.items() if isinstance(v, Tensor)}
            runs = torch.arange(len(batch.grid)).split(batch.num_runs)
            rows = torch.cat([of_clip.repeat(num) for of_clip in runs]).to(batch.grid.device)
            inputs["video_grid_thw"] = batch.grid[rows]  # all runs of a clip, and again
            if "second_per_grid_ts" in inputs:
                inputs["second_per_grid_ts"] = batch.seconds_per_slot[rows]
            numbers = None if uniform is None else uniform[:, at : at + num].flatten(0, 1)
            chooser = Chooser(numbers, self.banned, temperature)
            new = self.hf.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, logits_processor=[chooser])
            new = new[:, batch.input_ids.shape[1] :].unflatten(0, (-1, num))
            parts.append((new, torch.stack(chooser.logp, 1).unflatten(0, (-1, num))))
        width = max(new.shape[2] for new, _ in parts)
        tokens = torch.cat([F.pad(new, (0, width - new.shape[2]), value=pad_id) for new, _ in parts], 1)
        logp = torch.cat([F.pad(x, (0, width - x.shape[2])) for _, x in parts], 1)
        ends = torch.isin(tokens, self.end_ids)
        ended_before = ends.cumsum(2) - ends.long() > 0
        lengths, finished = (~ended_before).sum(2), ends.any(2)
        tokens, logp = tokens.masked_fill(ended_before, pad_id), logp.masked_fill(ended_before, 0.0)
        return Rollouts(tokens, logp, lengths, finished, {"decode": wait_and_time(tokens.device) - began})

    def describe(self, examples: Sequence[Example], twin: bool = True, max_new_tokens: int = 64) -> Rollouts:
        """Greedy descriptions of full videos and, if asked, of their twins: rollouts 0 and 1 of each clip."""
        return self.roll_out(examples, 1, int(twin), max_new_tokens)[0]

    @torch.no_grad()
    def roll_out(
        self, examples: Sequence[Example], num_full: int, num_twin: int, max_new_tokens: int,
        uniform: Tensor | None = None, temperature: float = 1.0,
    ) -> tuple[Rollouts, object]:  # fmt: skip
        """Encode the videos once, and `sample`. Returns the rollouts, and the encoded videos for the update."""
        device = self.base.lm_head.weight.device
        began = wait_and_time(device)
        video = self.encode_examples(examples)
        seconds = {"vision": wait_and_time(device) - began}
        uniform = None if uniform is None else uniform.to(device)
        if self.shares_prefix:
            prefixes, kind = self.pack_prefixes(examples).to(device), torch.tensor([0] * num_full + [1] * num_twin)
            rollouts = self.sample(prefixes, video, kind, max_new_tokens, uniform, temperature)
        else:
            batch = self.collate(examples, for_generation=True).to(device)
            rollouts = self.sample_plain(batch, video, num_full, num_twin, max_new_tokens, uniform, temperature)
        return replace(rollouts, seconds=seconds | rollouts.seconds), video

    @torch.no_grad()
    def answer(
        self, examples: Sequence[Example], questions: Sequence[Sequence[Tensor]], max_new_tokens: int, twin: bool = False
    ) -> Rollouts:
        """Greedy answers to all questions about each clip, from one vision pass and one prefill.

        questions: for each clip, the tokens that follow its prompt, one or more a question. Rollouts: Q of the full video,
        then, if asked, Q of the twin; see `pack_prefixes`.
        """
        if not twin:
            examples = [replace(e, source=None) for e in examples]
        prefixes = self.pack_prefixes(examples, questions).to(self.base.lm_head.weight.device)
        kind = torch.arange((1 + twin) * max(map(len, questions)))
        return self.sample(prefixes, self.encode_examples(examples), kind, max_new_tokens)


def wait_and_time(device: torch.device) -> float:
    """Seconds on the clock when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Chooser(LogitsProcessor):
    """Makes generate() take our token, by `choose`, and remembers its log-probability."""

    def __init__(self, uniform: Tensor | None, banned: Tensor, temperature: float):
        self.uniform, self.banned, self.temperature = uniform, banned, temperature
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocabulary) -> 0 for the chosen token and -inf for all others."""
        logp = sampling_log_probs(scores, self.banned, self.temperature)
        token = choose(logp, None if self.uniform is None else self.uniform[:, len(self.logp)])[:, None]
        self.logp.append(logp.gather(1, token).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
