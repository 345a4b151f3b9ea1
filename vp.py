"""VideoPerceiver, the method: twins, the contrastive loss, and the one thin adapter over a video-language model.

Words. A *clip* is a video with its caption. *Frames* are what was sampled from it. A *slot* is one temporal patch: two
consecutive frames, the smallest unit of time that the vision encoder sees. A *keyword* is an event-action phrase of the
caption ("jumps off"); its *key slots* are those that show it. The *twin* is the key-information-missing video: the same
slots, the key slots shown as their nearest non-key neighbour. *Full* is the complete video when it stands beside its twin.

Shapes, here and in the tests:

    B clips      T tokens of a padded sequence     D width of the language model      V visual tokens of the whole batch
    S slots      F frames                          K keywords of the batch            N key-slot tokens of the batch
    L tokens whose prediction is trained           d width of the contrastive space

Everything but `VideoLM` is a pure function: no globals, no argument changed, no file read.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# --- The twin (method, section 1) ---------------------------------------------------------------------------------


def twin_sources(key_slots: Tensor) -> Tensor | None:
    """Which slot the twin shows in each place: src(t) = t outside the key slots, else the nearest slot outside them.

    key_slots: (S,) bool. Returns (S,) long, ties going to the earlier neighbour, or None where there is no twin: no key
    slot, or nothing but key slots.

    >>> twin_sources(torch.tensor([0, 0, 1, 1, 1, 0], dtype=torch.bool)).tolist()
    [0, 1, 1, 1, 5, 5]
    """
    if not key_slots.any() or key_slots.all():
        return None
    kept = torch.nonzero(~key_slots).squeeze(1)  # ascending, so argmin prefers the earlier of two equally near
    distance = (torch.arange(len(key_slots))[:, None] - kept[None, :]).abs()
    return kept[distance.argmin(1)]


def span_slots(spans: Sequence[Sequence[float]], timestamps: Sequence[float], frames_per_slot: int = 2) -> Tensor:
    """The slots that a keyword's key spans overlap: (S,) bool.

    spans: [start, end] in seconds; timestamps: (F,) seconds at which each sampled frame begins to show, F a multiple of
    frames_per_slot. A slot lasts from its first frame to the next slot's first frame. A span too short to hold any
    frame still marks the slot it falls into.

    >>> span_slots([[0.5, 0.9]], [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]).tolist()
    [False, True, False]
    """
    begins = torch.tensor(timestamps[::frames_per_slot], dtype=torch.float64)
    if len(timestamps) > 1:
        step = (timestamps[-1] - timestamps[0]) / (len(timestamps) - 1)
    else:
        step = 1.0
    ends = torch.cat([begins[1:], begins[-1:] + max(step, 1e-6) * frames_per_slot])
    slots = torch.zeros(len(begins), dtype=torch.bool)
    for start, end in spans:
        slots |= (begins < max(end, start + 1e-6)) & (ends > start)
    return slots


def find_key_slots(frames: Tensor, frames_per_slot: int = 2, contrast: float = 1.5) -> Tensor:
    """The slots that look unlike the frames around them: a finder of brief events that needs no model.

    frames: (F, C, H, W) uint8, F a multiple of frames_per_slot. Each frame is compared with the per-pixel median of its
    seven-frame neighbourhood: slow motion stays in the median, a brief event does not. A frame's distance is that of its
    most changed block, a sixth of the picture wide, since an event is local. A frame counts as key when its distance is
    more than half-way from the clip's median distance to the largest. Returns (S,) bool, all false where nothing
    stands out: the largest distance is below `contrast` times the median one.
    """
    pixels = frames
    if max(pixels.shape[-2:]) > 64:
        pixels = F.interpolate(pixels.float(), scale_factor=64 / max(pixels.shape[-2:]), mode="area")
    num_frames = len(pixels)
    reach = min(3, (num_frames - 1) // 2)
    # Windows are shifted, not cut, at the ends of the clip, so that every median is taken over as many frames.
    first = (torch.arange(num_frames) - reach).clamp(0, num_frames - 2 * reach - 1)
    window = list(pixels[first[:, None] + torch.arange(2 * reach + 1)].unbind(1))  # 7 x (F, C, H, W)
    for round_ in range(len(window)):  # odd-even sort across the window: ten times faster than Tensor.median here
        for i in range(round_ % 2, len(window) - 1, 2):
            a, b = window[i], window[i + 1]
            window[i], window[i + 1] = torch.minimum(a, b), torch.maximum(a, b)
    block = max(2, min(pixels.shape[-2:]) // 6)
    change = (pixels.float() - window[reach]).abs().mean(1, keepdim=True)  # (F, 1, H, W)
    distance = F.avg_pool2d(change, block, max(1, block // 2)).amax((1, 2, 3))  # (F,)
    low, high = distance.median(), distance.max()
    if high <= contrast * low + 1e-3:
        return torch.zeros(num_frames // frames_per_slot, dtype=torch.bool)
    return rearrange(distance > (low + high) / 2, "(s f) -> s f", f=frames_per_slot).any(1)


# --- The contrastive loss (method, section 2) -----------------------------------------------------------------------


@dataclass
class KeyTokens:
    """Where the key-slot tokens of a batch stand, and which keyword asks for which of them.

    clip (N,), slot (N,): of each key-slot token. keyword_clip (K,), keyword_id (K,): the clip of each keyword, and a
    number that is the same for the same words. keyword_slots (K, S) bool: its key slots.
    """

    clip: Tensor
    slot: Tensor
    keyword_clip: Tensor
    keyword_id: Tensor
    keyword_slots: Tensor

    def positives(self) -> Tensor:
        """(K, N) bool: P_j, the tokens of the keyword's own clip in its key slots."""
        return (self.keyword_clip[:, None] == self.clip[None, :]) & self.keyword_slots[:, self.slot]

    def negatives(self) -> Tensor:
        """(K, N) bool: key-slot tokens of other clips, those left out that show an event of the same words."""
        same_words = (self.keyword_id[:, None] == self.keyword_id[None, :]).float()
        shows_same = same_words @ self.positives().float() > 0
        return (self.keyword_clip[:, None] != self.clip[None, :]) & ~shows_same


def contrastive_loss(
    full: Tensor, twin: Tensor | None, keywords: Tensor, temperature: Tensor, tokens: KeyTokens
) -> tuple[Tensor, dict[str, Tensor]]:
    """InfoNCE with several positives (MIL-NCE), summed over the keywords that have a positive: equation (1).

    full, twin: (N, d) states of the key-slot tokens in the full video and in its twin (None: no twin negatives);
    keywords: (K, d) text vectors; temperature: scalar tau. All are L2-normalised here. For keyword j with positives
    P_j and negatives N_j (the twin's tokens at P_j, and other clips' key-slot tokens of another keyword):

        L_j = logsumexp_{i in P_j + N_j} s_ji - logsumexp_{i in P_j} s_ji,        s_ji = <k_j, z_i> / tau

    Returns the sum and counts, without a host-device sync; divide by the number of keywords of the whole batch, so that
    cutting a batch into micro-batches changes nothing but the in-batch negatives. A keyword without a positive
    contributes neither loss nor gradient.
    """
    positive, negative = tokens.positives(), tokens.negatives()
    if twin is None:
        states = full
        allowed = positive | negative
    else:
        states = torch.cat([full, twin])
        allowed = torch.cat([positive | negative, positive], 1)  # (K, 2N)
        positive = F.pad(positive, (0, len(twin)))
    wide = torch.promote_types(states.dtype, torch.float32)
    z = F.normalize(states.to(wide), dim=-1)
    k = F.normalize(keywords.to(wide), dim=-1)
    s = k @ z.T / temperature  # (K, 2N)
    # A finite floor instead of -inf: a row without any positive stays finite in value and gradient.
    low = torch.finfo(s.dtype).min / 2
    loss = s.masked_fill(~allowed, low).logsumexp(1) - s.masked_fill(~positive, low).logsumexp(1)  # (K,)
    valid = positive.any(1)
    metrics = {"positives": positive.sum(), "negatives": (allowed & ~positive).sum()}
    return torch.where(valid, loss, 0.0).sum(), metrics


class ContrastiveHeads(nn.Module):
    """Linear heads into the contrastive space and the learnable temperature; dropped after training."""

    def __init__(self, width: int, d: int = 256, temperature: float = 0.1):
        super().__init__()
        self.visual = nn.Linear(width, d, bias=False)
        self.text = nn.Linear(width, d, bias=False)
        # Both start equal: states are pulled from the first step toward the keywords' own embeddings, where the layers
        # above, and the output head, can read them.
        self.text.load_state_dict(self.visual.state_dict())
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    @property
    def temperature(self) -> Tensor:
        """tau, clamped to [0.01, 1]."""
        return self.log_temperature.exp().clamp(0.01, 1.0)

    def forward(
        self, full: Tensor, twin: Tensor | None, keywords: Tensor, tokens: KeyTokens
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """full, twin (N, D), keywords (K, D) -> the summed loss of equation (1) and its metrics."""
        with torch.autocast(full.device.type, enabled=False):
            z_twin = None if twin is None else self.visual(twin.float())
            z, k = self.visual(full.float()), self.text(keywords.float())
            return contrastive_loss(z, z_twin, k, self.temperature, tokens)


# --- Records ----------------------------------------------------------------------------------------------------------


@dataclass
class Example:
    """One clip, ready for a model: everything that can be known before the model runs, on the CPU.

    input_ids, token_types (T,): prompt, then the caption's tokens; token_types 2 marks visual tokens. prompt_length: how
    many belong to the prompt. pixels (patches, C*2*p*p), grid (3,): as the processor made them. seconds_per_slot: for
    M-RoPE. source (S,) long: `twin_sources`, or None. keyword_ids: tokens of each keyword; keyword_slots (S,) bool each.
    """

    name: str
    input_ids: Tensor
    token_types: Tensor
    prompt_length: int
    pixels: Tensor
    grid: Tensor
    seconds_per_slot: float
    source: Tensor | None
    keywords: list[str]
    keyword_ids: list[Tensor]
    keyword_slots: list[Tensor]


@dataclass
class Batch:
    """Padded clips with every index worked out beforehand, so that the training loop never waits for the device.

    input_ids, attention_mask, token_types (B, T); position_ids (3, B, T) or None; pixels, grid (B, 3),
    seconds_per_slot (B,) as in `Example`. label_rows (L,): rows of the flattened (B*T) sequence that predict label_ids.
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
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
        tokens = {f.name: getattr(self.key_tokens, f.name).to(device, non_blocking=True) for f in fields(KeyTokens)}
        return Batch(**moved | {"key_tokens": KeyTokens(**tokens)})


def index_keywords(
    examples: Sequence[Example], visual_places: Sequence[Tensor], prefix_length: int
) -> tuple[Tensor, Tensor, KeyTokens]:
    """Key-slot tokens and keywords of a batch, those of clips without a twin left out.

    visual_places: for each clip (S, tokens of a slot) places in its sequence. Returns key_rows (N,), keyword_ids (K, W)
    padded with -1, and who asks for whom; see `Batch`.
    """
    keywords = [
        (b, text, ids, slots)
        for b, e in enumerate(examples)
        for text, ids, slots in zip(e.keywords, e.keyword_ids, e.keyword_slots)
        if e.source is not None and slots.any()
    ]
    key_rows, clip, slot = [], [], []
    for b, places in enumerate(visual_places):
        of_clip = [slots for c, _, _, slots in keywords if c == b]
        key = torch.stack(of_clip).any(0).nonzero().squeeze(1) if of_clip else torch.empty(0, dtype=torch.long)
        key_rows.append((b * prefix_length + places[key]).flatten())
        clip.append(torch.full_like(key_rows[-1], b))
        slot.append(key.repeat_interleave(places.shape[1]))
    keyword_slots = torch.zeros(len(keywords), max(len(p) for p in visual_places), dtype=torch.bool)
    for j, (_, _, _, slots) in enumerate(keywords):
        keyword_slots[j, : len(slots)] = slots
    number = {text: i for i, text in enumerate(dict.fromkeys(text for _, text, _, _ in keywords))}
    ids = [ids for _, _, ids, _ in keywords]
    return (
        torch.cat(key_rows),
        nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1) if ids else torch.full((0, 1), -1),
        KeyTokens(
            clip=torch.cat(clip),
            slot=torch.cat(slot),
            keyword_clip=torch.tensor([b for b, _, _, _ in keywords], dtype=torch.long),
            keyword_id=torch.tensor([number[text] for _, text, _, _ in keywords], dtype=torch.long),
            keyword_slots=keyword_slots,
        ),
    )


@dataclass
class SFTOutput:
    """Losses of one micro-batch, summed over its caption tokens and its keywords; nothing has been read from the device."""

    lm_loss: Tensor
    contrastive_loss: Tensor
    metrics: dict[str, Tensor]


# --- Attention of the vision encoder -----------------------------------------------------------------------------------


def attend_in_chunks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float,
    dropout: float = 0.0, cu_seq_lens_q: Tensor | None = None, **_,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention inside each chunk of a packed sequence (a slot, or a window of one), chunks of a length in one call.

    query, key, value: (1, heads, P, head_dim), cut at cu_seq_lens_q (chunks + 1,). Returns (1, P, heads, head_dim). Without
    flash-attn, transformers calls sdpa once for every chunk: a clip of 16 slots makes hundreds of small calls.
    """
    lengths = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    starts, out = cu_seq_lens_q[:-1].tolist(), torch.empty_like(query.transpose(1, 2))
    for length in sorted(set(lengths)):
        rows = torch.tensor([s for s, n in zip(starts, lengths) if n == length], device=query.device)
        rows = (rows[:, None] + torch.arange(length, device=query.device)).flatten()
        q, k, v = (rearrange(x[0][:, rows], "h (n l) d -> n h l d", l=length) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, scale=scaling, dropout_p=dropout)
        out = out.index_copy(1, rows, rearrange(attended, "n h l d -> 1 (n l) h d"))
    return out, None


# transformers hands cu_seqlens to implementations with "flash" in their name, and to no others.
ALL_ATTENTION_FUNCTIONS.register("chunked_not_flash", attend_in_chunks)


# --- The model ----------------------------------------------------------------------------------------------------------


class VideoLM(nn.Module):
    """A Hugging Face video-language model, seen as the method needs it: vision once, full and twin from it.

    hf: Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration, or one wrapped by peft. contrastive_layer: l,
    after how many of the language model's layers the states are taken (default: half of them). Everything that leans on
    the inside of transformers stands in this class, and a test holds its logits to those of the plain model.
    """

    def __init__(self, hf: nn.Module, contrastive_layer: int | None = None, temperature: float = 0.1):
        super().__init__()
        self.hf = hf
        base = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
        self.config = base.config
        vision_config = base.model.visual.config
        if "flash" not in (vision_config._attn_implementation or ""):
            vision_config._attn_implementation = "chunked_not_flash"
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

    # The modules below belong to self.hf; properties keep them from being registered, and saved, twice.
    @property
    def base(self) -> nn.Module:
        """The conditional-generation model, without any adapter wrapper."""
        return self.hf.get_base_model() if hasattr(self.hf, "get_base_model") else self.hf

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
        width, pad_id = max(length), self.base.generation_config.pad_token_id or 0
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
            num_slots = int(e.grid[0])
            per_slot = len(visual) // num_slots
            source = torch.arange(num_slots) if e.source is None else e.source
            twin_index.append(offset + (source[:, None] * per_slot + torch.arange(per_slot)).flatten())
            offset += len(visual)
            visual_places.append(visual.view(num_slots, per_slot))
        prefix_length = max(int(places.max()) + 1 for places in visual_places)
        key_rows, keyword_ids, key_tokens = index_keywords(examples, visual_places, prefix_length)
        grid = torch.stack([e.grid for e in examples])
        seconds = torch.tensor([e.seconds_per_slot for e in examples])
        position_ids = None
        if not for_generation:  # generate() works them out for itself
            position_ids, _ = self.base.model.get_rope_index(
                input_ids, token_types, video_grid_thw=grid, second_per_grid_ts=seconds, attention_mask=attention_mask
            )
        return Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_types=token_types,
            position_ids=position_ids,
            pixels=torch.cat([e.pixels for e in examples]),
            grid=grid,
            seconds_per_slot=seconds,
            label_rows=torch.cat(label_rows),
            label_ids=torch.cat(label_ids),
            twin_index=torch.cat(twin_index),
            prefix_length=prefix_length,
            key_rows=key_rows,
            keyword_ids=keyword_ids.clamp(min=0),
            keyword_mask=(keyword_ids >= 0).float(),
            key_tokens=key_tokens,
        )

    def encode_video(self, batch: Batch):
        """Run the vision encoder once over the batch's full videos. Returns the encoder's own output record."""
        return self.base.model.get_video_features(batch.pixels, batch.grid)

    def twin_video(self, video, batch: Batch):
        """The twins' visual features as a gather of the full videos': exact, since a slot is encoded by itself.

        Qwen3-VL's deepstack features, one list of clips a layer, are gathered in the same way.
        """

        def gather(per_clip: Sequence[Tensor]) -> Sequence[Tensor]:
            sizes = [len(x) for x in per_clip]
            return torch.cat(list(per_clip)).index_select(0, batch.twin_index).split(sizes)

        twin = copy.copy(video)
        twin.pooler_output = gather(video.pooler_output)
        if getattr(video, "deepstack_features", None) is not None:
            twin.deepstack_features = [gather(layer) for layer in video.deepstack_features]
        return twin

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
        keep = [self.contrastive_layer] if contrastive else False
        full = self.base.model(
            **self.inputs(batch, video), position_ids=batch.position_ids, output_hidden_states=keep, use_cache=False
        )
        states = full.last_hidden_state.flatten(0, 1).index_select(0, batch.label_rows)  # (L, D): no full logits
        lm_loss = F.cross_entropy(self.base.lm_head(states).float(), batch.label_ids, reduction="sum")
        if not contrastive or not len(batch.keyword_ids):
            return SFTOutput(lm_loss, lm_loss.new_zeros(()), {})

        prefix = slice(0, batch.prefix_length)
        h = full.hidden_states[self.contrastive_layer][:, prefix].flatten(0, 1).index_select(0, batch.key_rows)  # (N, D)
        h_twin = None
        if twin_negatives:
            cut = self.inputs(batch, self.twin_video(video, batch))
            cut |= {name: cut[name][:, prefix] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
            position_ids = batch.position_ids[..., prefix]
            twin = self.first_layers()(**cut, position_ids=position_ids, use_cache=False).last_hidden_state
            h_twin = twin.flatten(0, 1).index_select(0, batch.key_rows)
        # t_j: mean input embedding of the keyword's tokens, detached: it has never looked at the video.
        embedded = self.base.get_input_embeddings()(batch.keyword_ids).detach()  # (K, W, D)
        mask = batch.keyword_mask[..., None]
        t = (embedded * mask).sum(1) / mask.sum(1)
        return SFTOutput(lm_loss, *self.heads(h, h_twin, t, batch.key_tokens))

    @torch.no_grad()
    def describe(self, batch: Batch, twin: bool = True, max_new_tokens: int = 64) -> list[Tensor]:
        """Greedy descriptions of the full videos and, if asked, of their twins, from one vision pass.

        batch: collated for_generation. Returns one (B, new tokens) tensor for full, and one for the twins.
        """
        video = self.encode_video(batch)
        special = [self.config.image_token_id, self.config.video_token_id]
        special += [self.config.vision_start_token_id, self.config.vision_end_token_id]
        videos = [video, self.twin_video(video, batch)] if twin else [video]
        return [
            self.hf.generate(
                **self.inputs(batch, v), max_new_tokens=max_new_tokens, do_sample=False, suppress_tokens=special
            )[:, batch.input_ids.shape[1] :]
            for v in videos
        ]
