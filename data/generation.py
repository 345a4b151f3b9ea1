"""What a VideoLM says: rollouts, descriptions and answers, from one vision pass and one prefill."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, LogitsProcessor

from data.attention import RoomyLayer
from data.batches import TOKENS_AT_ONCE, TOKENS_HELD, Batch, Rollouts, Video, forked_length, in_chunks
from data.device import Clock, to_device
from data.packing import Packed, pack, prefix_trees
from kernels.logprob import sampling_log_probs
from vp import Example, choose


class Generation:
    """The part of `VideoLM` that generates. What it leans on, `encode_examples` and `run_packed`, is there."""

    def describe(self, examples: Sequence[Example], twin: bool = True, max_new_tokens: int = 64) -> Rollouts:
        """Greedy descriptions of full videos and, if asked, of their twins: rollouts 0 and 1 of each clip."""
        return self.roll_out(examples, 1, int(twin), max_new_tokens, keep_video=False)[0]

    @torch.no_grad()
    def roll_out(
        self, examples: Sequence[Example], num_full: int, num_twin: int, max_new_tokens: int,
        uniform: Tensor | None = None, temperature: float = 1.0, keep_video: bool = True,
    ) -> tuple[Rollouts, Video | None]:  # fmt: skip
        """Encode the videos once, and `sample`, as many clips at a time as TOKENS_HELD allows.

        Returns the rollouts, and, with keep_video, the encoded videos for the update.
        """
        uniform = None if uniform is None else to_device(uniform, self.device)
        rollouts, videos = [], []
        for some in in_chunks([forked_length(e) for e in examples], TOKENS_HELD):
            numbers = None if uniform is None else uniform[some]
            clock = Clock(self.device)
            video = self.encode_examples(examples[some])
            clock.mark("vision")
            if self.shares_prefix:
                kind = torch.tensor([0] * num_full + [1] * num_twin)
                groups = self.group_prefixes(examples[some], video)
                part = self.sample(groups, kind, max_new_tokens, numbers, temperature)
            else:
                batch = self.collate(examples[some], for_generation=True).to(self.device)
                part = self.sample_plain(batch, video, num_full, num_twin, max_new_tokens, numbers, temperature)
            rollouts.append(replace(part, clock=Clock.join([clock, part.clock])))
            if keep_video:
                videos.append(video)
        return Rollouts.join(rollouts, self.pad_id), Video.join(videos) if keep_video else None

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
        most, rollouts = max(map(len, questions)), []
        for some in in_chunks([forked_length(e) for e in examples], TOKENS_HELD):
            video = self.encode_examples(examples[some])
            groups = self.group_prefixes(examples[some], video, questions[some], most)
            rollouts.append(self.sample(groups, torch.arange((1 + twin) * most), max_new_tokens))
        return Rollouts.join(rollouts, self.pad_id)

    def group_prefixes(
        self, examples: Sequence[Example], video: Video, questions: Sequence[Sequence[Tensor]] | None = None, most: int = 0
    ) -> list[tuple[Packed, Video]]:
        """Prompts, each behind its video, in groups that can be prefilled at once; see `pack_prefixes`."""
        lengths = [forked_length(e) for e in examples]
        if questions:
            lengths = [n + sum(2 * len(q) for q in asked) for n, asked in zip(lengths, questions)]
        groups = []
        for some in in_chunks(lengths, TOKENS_AT_ONCE):
            packed = self.pack_prefixes(examples[some], questions and questions[some], most)
            groups.append((packed.to(self.device), self.take_clips(video, range(some.start, some.stop))))
        return groups

    def pack_prefixes(
        self, examples: Sequence[Example], questions: Sequence[Sequence[Tensor]] | None = None, most: int = 0
    ) -> Packed:
        """Prompts that fork into full video and twin, and again into questions; see `prefix_trees`."""
        return pack(prefix_trees(examples, self.prompt_positions(examples), questions, most), self.pad_id, self.block)

    @torch.no_grad()
    def sample(
        self, groups: Sequence[tuple[Packed, Video]], kind: Tensor, max_new_tokens: int,
        uniform: Tensor | None = None, temperature: float = 1.0,
    ) -> Rollouts:  # fmt: skip
        """Continue from the wanted rows of forked prefixes, R rollouts a clip, from one prefill of each group of clips.

        kind: (R,) which of its clip's wanted rows each rollout grows from: of full video and twin, or of its questions.
        uniform: (B, R, max_new_tokens) numbers in [0, 1) that decide the tokens; None: greedy. A step feeds one token of
        every rollout as one sequence a clip, behind the prefix and all earlier tokens in the cache; the mask lets each
        see its own. The cache has room for all of them, and query heads that share keys attend as rows of one head, so
        that a step neither copies the cache nor repeats it.
        """
        device, banned, end_ids, num = self.device, self.banned, self.end_ids, len(kind)
        B, T = sum(len(p.input_ids) for p, _ in groups), max(p.input_ids.shape[1] for p, _ in groups)
        clock, text = Clock(device), self.config.text_config
        cache = DynamicCache(config=text)
        cache.layers = [RoomyLayer(B, T, num * max_new_tokens) for _ in cache.layers]
        starts = [self.prefill(*group, to_device(kind, device), cache) for group in groups]
        h, position = torch.cat([x for x, _, _ in starts]), torch.cat([x for _, x, _ in starts], 1)
        # (B, R, T); twin rollouts of a clip without a twin grow from the full video
        sees_prefix = torch.cat([F.pad(x, (0, T - x.shape[2])) for _, _, x in starts])
        sees_own = torch.eye(num, dtype=torch.bool, device=device).repeat(B, 1, max_new_tokens)  # (B, R, R * steps)
        groups_of_heads = text.num_attention_heads // text.num_key_value_heads
        sees = torch.cat([sees_prefix, sees_own], 2).repeat(1, groups_of_heads, 1)[:, None]
        # As numbers to be added to the scores: a mask of bools would be made into these in every layer.
        mask = torch.zeros(sees.shape, dtype=cache.layers[0].dtype, device=device).masked_fill(~sees, -torch.inf)
        clock.mark("prefill")
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
        clock.mark("decode")
        return Rollouts(tokens[:, :, : t + 1], logps[:, :, : t + 1], lengths, done, clock)

    def prefill(
        self, prefixes: Packed, video: Video, kind: Tensor, cache: Cache
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Run forked prefixes and fill the cache. Returns of each rollout the state (B, R, D) that it grows from, the
        position (3, B, R) of its first token, and which tokens of the prefix it sees (B, R, T)."""
        B = len(prefixes.input_ids)
        h = self.run_packed(prefixes, video, cache).unflatten(0, (B, -1)).index_select(1, kind)
        rows = prefixes.rows.view(B, -1).index_select(1, kind)
        position = prefixes.position_ids.flatten(1)[:, rows] + 1
        return h, position, prefixes.sees(prefixes.branch.flatten()[rows])

    @torch.no_grad()
    def sample_plain(
        self, batch: Batch, video: Video, num_full: int, num_twin: int, max_new_tokens: int,
        uniform: Tensor | None = None, temperature: float = 1.0,
    ) -> Rollouts:  # fmt: skip
        """What `sample` does, by transformers' own generate() on prompts repeated for every rollout.

        The path of models whose prefix cannot be shared, and the reference that `sample` is tested against. batch:
        collated for_generation.
        """
        clock = Clock(batch.input_ids.device)
        pad_id, parts = self.pad_id, []
        sizes = [len(x) for x in video.pooler_output]
        for num, index, at in ((num_full, torch.arange(sum(sizes)), 0), (num_twin, batch.twin_index.cpu(), num_full)):
            if not num:
                continue
            index = torch.cat([part.repeat(num) for part in index.split(sizes)]).to(batch.twin_index.device)
            inputs = self.inputs(batch, self.gather_video(video, index))
            inputs |= {k: v.repeat_interleave(num, 0) for k, v in inputs.items() if isinstance(v, Tensor)}
            runs = torch.arange(len(batch.grid)).split(batch.num_runs)
            rows, device = torch.cat([of_clip.repeat(num) for of_clip in runs]), batch.input_ids.device
            inputs["video_grid_thw"] = batch.grid[rows].to(device)  # all runs of a clip, and again
            if "second_per_grid_ts" in inputs:
                inputs["second_per_grid_ts"] = batch.seconds_per_slot[rows.to(device)]
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
        clock.mark("decode")
        return Rollouts(tokens, logp, lengths, finished, clock)

    @property
    def end_ids(self) -> Tensor:
        """The same on the model's device."""
        return self.copied_ids(self.end_numbers)


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
