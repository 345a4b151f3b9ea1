"""Stage 2: GRPO with a relative reward. The model describes the full video and its twin; the full one must do better.

For each clip: encode the video once, prefill the prompt once (it forks into full video and twin at the first
replaced slot), and sample descriptions of both. Those of the full video are rewarded for what they say of the
event beyond what the twin's say, those of the twin for keeping silent about it. One update pass has them all,
packed into one sequence behind the prompt that they share.

    python train_rl.py                                                # from runs/sft, embedded world, CPU
    python train_rl.py --reward similarity                            # caption similarity alone: watch the event go
    python train_rl.py --preset gpu-24gb --model runs/sft --data clips.jsonl
    torchrun --nproc_per_node 8 train_rl.py --preset gpu-80gb --model runs/sft --data clips.jsonl
    python train_rl.py --resume                                       # continue after a kill (on a CPU bit for bit)

The paper's equations and settings are not public. Our deviations are numbered in docs/method.md.
"""

import sys
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Literal

import data  # isort: skip  # noqa: F401  first of all: Ctrl-C ends with one word from here on

import numpy as np
import torch
from torch import Tensor

import vp
from data.batches import Rollouts
from data.checks import check_above_zero, check_within
from data.device import to_device, to_host
from data.loader import ClipLoader
from data.measure.evaluate import EVAL_CLIPS, RunEvaluation
from data.packing import Packed
from data.run import checkpoints, memory, models
from data.run.hard_prompts import choose_prompts
from data.run.log import Stopwatch
from data.run.processes import finish_gradients, first_process_first, skip_if_not_finite
from data.run.rollout_metrics import Totals, reward_metrics, rollout_metrics
from data.run.run import Run
from data.run.settings import TrainSettings, by_preset, parse_settings
from data.run.sheets import RolloutGroup, RolloutPage
from data.texts import Comparison, TextEncoder, embed_texts
from data.tiny import build_text_encoder
from data.video import Clip
from data.videolm import VideoLM
from data.words import still_part
from data.world import embedded_world

# What may change when a run is resumed: nothing that a result depends on.
FREE = (
    "out", "memory_gb", "resume", "workers", "time_limit", "log_every", "show_every", "save_every", "eval_every",
    "eval_clips", "eval_before", "tracker",
)  # fmt: skip
# Small, and what captions are compared with most often: 22 M weights, 384 numbers a token.
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass
class Settings(TrainSettings):
    """Settings of stage 2."""

    model: str = "runs/sft"
    """Where stage 1 ended: a run's folder, a Hugging Face directory, or a name on the hub."""
    out: Path = Path("runs/rl")
    """Folder of the run."""
    reward: Literal["similarity", "recall", "relative", "pooled"] = "relative"
    """similarity: caption similarity q. recall: q + alpha * keyword recall. relative: q + alpha * share of
    beaten twins. pooled: as recall, against the mean over full and twin rollouts together."""
    alpha: float = 1.0
    """Weight of the event in the reward."""
    margin: float = 0.1
    """By how much keyword recall must be better, and quality may be worse, to beat a twin's rollout."""
    twin_branch: bool = True
    """Train on the twin's descriptions, too: rewarded for the still part of the caption, and against claiming the event."""
    divide_by_spread: bool = False
    """Divide advantages by the standard deviation of their group."""
    text_encoder: str | None = by_preset(None, MINILM, MINILM)
    """sentence-transformers model whose token embeddings score descriptions (default: one that knows equal
    words only, made on the spot; for the world also kinds of words)."""
    hard_prompts: int = by_preset(300, 0, 0)
    """Describe so many clips whose captions the model finds least likely, and as many others (0: all clips)."""
    num_rollouts: int = 8
    """G, descriptions of the full video a prompt."""
    num_twin_rollouts: int = 4
    """G', descriptions of its twin."""
    temperature: float = 1.0
    """Sampling temperature."""
    max_new_tokens: int = by_preset(40, 128, 128)
    """Longest description."""
    steps: int = by_preset(200, 500, 500)
    """Batches of rollouts."""
    batch_size: int = by_preset(8, 8, 16)
    """Prompts a step, over all micro-batches and processes."""
    micro_batch_size: int = by_preset(8, 1, 2)
    """Prompts an update pass; each brings its G descriptions."""
    epochs: int = 2
    """Updates on the same rollouts."""
    learning_rate: float = by_preset(1e-4, 2e-5, 2e-5)
    """Peak learning rate (AdamW, linear warm-up, linear to zero)."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    clip_low: float = 0.2
    """eps_low: how far below 1 a token's probability ratio may push."""
    clip_high: float = 0.28
    """eps_high: how far above 1."""
    beta: float = 0.0
    """Weight of the KL to the frozen stage-1 policy; 0 keeps no reference and computes nothing for it."""
    loss_level: Literal["token", "sequence"] = "token"
    """Whether every token of a batch counts alike, or every description."""
    log_every: int = 5
    """Steps between two lines of metrics."""
    show_every: int = 50
    """Steps between two looks at descriptions side by side (-1: only at the end)."""
    eval_every: int = -1
    """Steps between evaluations (-1: only before and after)."""
    save_every: int = by_preset(-1, 50, 50)
    """Steps between checkpoints (-1: only at the end)."""


def resolve(settings: Settings) -> Settings:
    """Check the settings, and make the embedded world and its text encoder if none are given."""
    # A copy: what was asked for stays as it was.
    s = replace(settings)
    s.check()
    check_above_zero(s, "steps", "batch_size", "micro_batch_size", "learning_rate", "log_every")
    check_above_zero(s, "max_new_tokens", "temperature", "epochs")
    check_within(s, 0, inf, "weight_decay", "alpha", "margin", "beta", "clip_high", "hard_prompts")
    check_within(s, 0, 1, "clip_low")
    # An advantage is the distance from the mean of the group: one description alone has none.
    if s.num_rollouts < 2:
        raise ValueError(f"--num-rollouts: got {s.num_rollouts}; a group needs 2 descriptions to compare")
    # The relative reward has nothing to be relative to without descriptions of the twin.
    if s.num_twin_rollouts < 0 or (s.num_twin_rollouts == 0 and s.reward in ("relative", "pooled")):
        raise ValueError(f"--num-twin-rollouts: got {s.num_twin_rollouts}; --reward {s.reward} compares with the twin's")
    if s.twin_branch and s.num_twin_rollouts < 2:
        raise ValueError(f"--num-twin-rollouts: got {s.num_twin_rollouts}; --twin-branch needs 2 or more to compare")
    if s.model == "runs/sft" and not Path(s.model, "checkpoint").exists():
        raise ValueError("there is no stage-1 checkpoint in runs/sft; run `python train_sft.py` first, or give --model")
    # Nothing given: everything is made on the spot, so that `python train_rl.py` runs anywhere.
    if s.text_encoder is None and s.data is None:
        s.text_encoder = str(build_text_encoder(Path("runs/text-encoder")))
    if s.data is None:
        # Clips that stage 1 has not seen: of those that it was trained on, it describes nearly all without a mistake.
        world = embedded_world("prompts", s.world_clips)
        s.data, s.eval_data = world / "prompts.jsonl", s.eval_data or world / "test.jsonl"
    return s


def load_policy(s: Settings, run: Run, budget: memory.Budget) -> tuple[VideoLM, VideoLM | None]:
    """The model to train, and the frozen stage-1 policy that the KL holds it to (None: --beta 0)."""
    # Products of a tiny model are too small to be shared out among threads.
    models.choose_threads(budget.architecture, run.device)
    # Before any weight is loaded: a run that would not fit says so, and which settings need less.
    run.console.print(budget.check())
    # Weights as the settings ask: all of them or adapters, whole or in 4 bits; of the checkpoint, if the run goes on.
    hf = models.load_trainable(
        s.model, s.quantize, s.lora_rank, s.freeze_vision, s.gradient_checkpointing, run.device, run.resumed.path
    )  # fmt: skip
    lm = VideoLM(hf).to(run.device)
    # The contrastive heads have done their work in stage 1.
    lm.heads.requires_grad_(False)
    # The KL holds the policy to what stage 1 learned; without it, the reward alone decides what is said.
    if s.beta == 0:
        reference = None
    elif s.lora_rank:
        reference = lm  # the same weights with the adapter switched off
    else:
        reference = VideoLM(models.load_pretrained(s.model, torch.float32, device=run.device)[0]).to(run.device).eval()
        # Only read: no gradient, no dropout.
        reference.requires_grad_(False)
    # Each process keeps a part of every weight; the policy and its reference may be one model.
    if s.shard:
        for model in {id(m): m for m in (lm, reference) if m is not None}.values():
            models.shard(model, run.device)
    # A linear layer's state cannot fork: what comes before it is in it already.
    if not lm.shares_prefix:
        run.console.print("[yellow]this model has layers of linear attention: its prefix is repeated for every rollout")
    return lm, reference


def load_encoder(s: Settings, run: Run, clips: Sequence[Clip]) -> TextEncoder:
    """The text encoder of the reward; without one, an encoder that knows the words of these clips, and equal ones only."""
    if s.text_encoder is not None:
        return TextEncoder(s.text_encoder, run.device)
    run.console.print(
        "[yellow]no --text-encoder: only equal words count as alike. For captions in free words give one, such as " + MINILM
    )
    # The words of the captions are all that it has to know.
    texts = [text for clip in clips for text in (clip.caption, *clip.keywords)]
    name = f"text-encoder-{zlib.crc32(' '.join(texts).encode()):08x}"
    with first_process_first(run.rank, run.peers):
        return TextEncoder(build_text_encoder(s.out / name, texts), run.device)


# --- The four moves of a step --------------------------------------------------------------------------------------------


@dataclass
class Prompt:
    """A clip to be described. place: its number in the order of all clips, which seeds its sampling."""

    clip: Clip
    example: vp.Example
    place: int


@dataclass
class Sampled:
    """A prompt and its rollouts, on the CPU, those of the full video first.

    tokens, logp: (L,) of each, its end-of-text token included; lengths (R,).
    """

    prompt: Prompt
    tokens: list[Tensor]
    logp: list[Tensor]
    lengths: Tensor

    def first(self, count: int) -> "Sampled":
        """Some of the rollouts."""
        return replace(self, **{name: getattr(self, name)[:count] for name in ("tokens", "logp", "lengths")})


@dataclass
class Scored:
    """One prompt's descriptions with their rewards: of the full video, and of the twin if it is trained on.

    sampled: the rollouts that are trained on, of one or of both; texts: all. num_twin: G', or 0 if the clip has no twin.
    """

    sampled: Sampled
    texts: list[str]
    rewards: vp.Rewards
    num_twin: int
    twin: vp.Rewards | None = None

    @property
    def advantages(self) -> Tensor:
        """Of the rollouts that are trained on, on the CPU."""
        # The full video and its twin are two groups: each has a mean of its own, equation (4).
        return torch.cat([group.advantage.cpu() for group in (self.rewards, self.twin) if group is not None])

    @property
    def useful(self) -> Tensor:
        """Which of them teach something: if all rewards of a group are alike, every advantage is 0."""
        groups = [group.advantage.cpu() for group in (self.rewards, self.twin) if group is not None]
        # A group without spread has no gradient but that of the KL; it is left out, and counted.
        return torch.cat([(a.abs().max() > 1e-6).expand(len(a)) for a in groups])


@dataclass
class UpdatePass:
    """Some prompts with their rollouts in one packed sequence each, and what equation (5) needs of each of its M tokens.

    examples: the prompts; places: their numbers in the batch. old_logp: when it was sampled, and from `start_from` on under
    the policy before the update; ref_logp: under the frozen policy, or None.
    """

    examples: list[vp.Example]
    places: list[int]
    packed: Packed
    old_logp: Tensor
    ref_logp: Tensor | None
    advantage: Tensor
    weight: Tensor
    sampling_gap: Tensor | None = None

    def start_from(self, logp: Tensor) -> None:
        """Take the log-probabilities of the first epoch as the old ones, and note how far those of the sampling were off.

        Nothing has changed since the sampling, so every ratio is 1. Sampling goes token by token, on a GPU in bfloat16 all
        the way: the numbers that it noted would already count as a change.
        """
        self.sampling_gap = (logp - self.old_logp).abs().mean()
        self.old_logp = logp


def take_prompts(loader: ClipLoader, clips: Sequence[Clip], count: int) -> list[Prompt]:
    """The next clips to be described."""
    return [Prompt(clips[taken.index], taken.example, taken.place) for taken in loader.take(count)]


def roll_out(lm: VideoLM, prompts: Sequence[Prompt], s: Settings, run: Run) -> tuple[list[Sampled], Rollouts, object]:
    """1. Sample G descriptions of each full video and G' of its twin, from one vision pass and one prefill.

    Random numbers of each prompt's own decide its tokens, so that a description does not depend on its batch.
    Returns the rollouts by prompt and as one batch, and the encoded videos.
    """
    # One number in [0, 1) for each token that may be sampled: (G + G', longest).
    shape = (s.num_rollouts + s.num_twin_rollouts, s.max_new_tokens)
    draws = [np.random.default_rng([s.seed, prompt.place]).random(shape, np.float32) for prompt in prompts]
    # Sampling without dropout: its log-probabilities must be those that the update starts from.
    lm.eval()
    with run.autocast(), models.gathered(lm):
        rollouts, video = lm.roll_out(
            [prompt.example for prompt in prompts], s.num_rollouts, s.num_twin_rollouts, s.max_new_tokens,
            torch.from_numpy(np.stack(draws)), s.temperature,
        )  # fmt: skip
    lm.train()
    # One copy, for which the host waits: from here on, numbers are read.
    rollouts = rollouts.to("cpu")
    # Cut to their lengths: what follows the end of a text is padding.
    sampled = [
        Sampled(prompt, [y[:n] for y, n in zip(ys, ns)], [p[:n] for p, n in zip(ps, ns)], ns)
        for prompt, ys, ps, ns in zip(prompts, rollouts.tokens, rollouts.logp, rollouts.lengths)
    ]
    return sampled, rollouts, video


def score(sampled: Sequence[Sampled], encoder: TextEncoder, processor, s: Settings) -> list[Scored]:
    """2. Compare each description with the caption, and with what is said of the twin: equations (2) to (4).

    Descriptions of the twin that are trained on are compared with the still part of the caption: equation (6).
    """
    prompts = [y.prompt for y in sampled]
    texts = [[t.strip() for t in processor.batch_decode(y.tokens, skip_special_tokens=True)] for y in sampled]
    # A clip without key slots has no twin: it is trained on caption similarity alone.
    num_twin = [0 if prompt.example.source is None else s.num_twin_rollouts for prompt in prompts]
    # All texts of the batch are embedded in one call.
    of_full = [
        Comparison(said, prompt.clip.caption, prompt.clip.keywords, s.num_rollouts, num)
        for said, prompt, num in zip(texts, prompts, num_twin)
    ]
    # The twin shows no event: its descriptions should have the still part of the caption, no more.
    trained = [b for b, num in enumerate(num_twin) if num and s.twin_branch]
    of_twin = []
    for b in trained:
        still = still_part(prompts[b].clip.caption, prompts[b].clip.keywords)
        of_twin.append(Comparison(texts[b][s.num_rollouts :], still, prompts[b].clip.keywords, num_twin[b]))
    embedded = embed_texts(encoder, of_full + of_twin)
    # q, keyword recall, the comparison with the twin's, and of each description its advantage over its group; on the host,
    # where every prompt's are looked at.
    rewards = to_host(vp.paired_rewards(embedded[: len(prompts)], s.reward, s.alpha, s.margin, s.divide_by_spread))
    twins = dict(zip(trained, to_host(vp.twin_rewards(embedded[len(prompts) :], s.alpha, s.divide_by_spread))))
    # Both branches are trained on, or the full video's alone.
    kept = [y if b in twins else y.first(s.num_rollouts) for b, y in enumerate(sampled)]
    return [Scored(kept[b], texts[b], rewards[b], num_twin[b], twins.get(b)) for b in range(len(prompts))]


def pack_update(
    lm: VideoLM, reference: VideoLM | None, scored: Sequence[Scored], video, s: Settings, run: Run
) -> list[UpdatePass]:
    """3. Pack [prompt][y_1]...[y_G] of the prompts that teach something, a micro-batch at a time.

    If the twin is trained on, its prompt and its descriptions are branches of the same sequence.
    """
    lengths = torch.cat([x.sampled.lengths for x in scored])
    # Counts of the whole batch, a process on average.
    num_tokens, num_useful = run.mean_counts(int(lengths.sum()), sum(bool(x.useful.any()) for x in scored))
    # Zeros, too, would age the optimizer's averages: where nothing is to be learned, there is no pass.
    if not num_useful:
        return []
    # The loss is divided by all sampled tokens that could be trained on, those of skipped groups included.
    weights = vp.token_weights(lengths, s.loss_level, num_tokens) * torch.cat([x.useful for x in scored])
    weights = weights.split([len(x.useful) for x in scored])
    # A prompt of which nothing is learned costs nothing. Sharded processes gather weights together, though: all must make
    # the same passes, useful or not.
    kept = [b for b, x in enumerate(scored) if x.useful.any() or s.shard]
    passes = []
    for i in range(0, len(kept), s.micro_batch_size):
        # A micro-batch: some prompts, each one sequence with all its rollouts as branches.
        places = kept[i : i + s.micro_batch_size]
        some = [scored[b] for b in places]
        examples = [x.sampled.prompt.example for x in some]
        # The first G see the full video's prompt, the others the twin's.
        packed = lm.pack_rollouts(examples, [x.sampled.tokens for x in some], s.num_rollouts)
        # packed.rollout: for each of the M tokens, the rollout that it belongs to.
        update = UpdatePass(
            examples=examples,
            places=places,
            packed=packed.to(run.device),
            old_logp=to_device(torch.cat([logp for x in some for logp in x.sampled.logp]), run.device),
            ref_logp=None,
            advantage=to_device(torch.cat([x.advantages for x in some])[packed.rollout], run.device),
            weight=to_device(torch.cat([weights[b] for b in places])[packed.rollout], run.device),
        )
        # Before the first update, and once: the reference does not change.
        if reference is not None:
            with torch.no_grad(), run.autocast(), lm.hf.disable_adapter() if s.lora_rank else nullcontext():
                update.ref_logp, _ = reference.log_probs(update.packed, see(reference, update, video, s), s.temperature)
        passes.append(update)
    return passes


def see(lm: VideoLM, update: UpdatePass, video, s: Settings):
    """The encoded videos of a pass: the rollouts', or, to train the vision encoder, encoded again with gradients."""
    return lm.take_clips(video, update.places) if s.freeze_vision else lm.encode_examples(update.examples)


# Title -> metrics of the panels of curves.png.
PANELS = {
    "caption similarity": ["reward/quality", "reward/twin_quality"],
    "keyword recall": ["reward/keyword_recall", "reward/twin_keyword_recall"],
    "share of twins beaten": ["reward/beaten_twins", "rollout/no_spread"],
    "KL to stage 1, per token": ["policy/kl"],
    "entropy, per token": ["policy/entropy"],
}


def main(settings: Settings) -> dict | None:
    """Train; returns the last evaluation."""
    # --- set-up: processes and settings, clips, policy and reference, text encoder, optimizer, where to continue from
    # The run carries terminal, processes, logging and saving; it never touches model or optimizer.
    run = Run(settings, resolve, FREE)
    s = run.settings
    # Each process samples and updates on its share of the prompts.
    num_prompts = run.split_batch()
    # Lines that cannot be used are named here, with file and line, before the model is touched.
    clips, eval_clips, preparation = run.load_clips(s.max_new_tokens)
    # What a step will need is known before anything is loaded.
    budget = run.budget(memory.Load(
        s.micro_batch_size, *memory.longest(clips, preparation), rollouts=s.num_rollouts,
        twin_rollouts=s.num_twin_rollouts, twin_branch=s.twin_branch, prompts=num_prompts, new_tokens=s.max_new_tokens,
        reference=s.beta > 0 and not s.lora_rank, eval_clips=min(len(eval_clips), EVAL_CLIPS),
    ))  # fmt: skip
    with budget.explained():
        lm, reference = load_policy(s, run, budget)
        encoder = load_encoder(s, run, clips)
        # In training windows lie at the key spans, and where nothing happens: that there is one gives nothing away.
        shown = replace(preparation, skim=s.how_to_look(at_key_spans=True))
        # What stage 1 describes well already teaches little.
        clips = choose_prompts(run, lm, shown, clips, s.hard_prompts)
    loader = ClipLoader(
        clips, shown, s.seed, s.workers, s.time_limit, s.max_bad_share, **run.share(num_prompts)
    )  # fmt: skip
    # No weight decay, small steps: a reward says little, and must not undo what stage 1 has learned.
    optimizer = models.make_optimizer(lm, s.learning_rate, s.weight_decay)
    # The schedule counts updates, of which a step makes several.
    schedule = models.make_schedule(optimizer, s.steps * s.epochs, s.warmup, shape="linear")
    # After a kill: optimizer, schedule, order of the clips and random numbers as they were.
    run.restore(lm, optimizer, schedule, loader)
    # A checkpoint is whole or not there, and opens in plain transformers.
    saver = checkpoints.Saver(run, lm, preparation.processor, optimizer, schedule)
    # The model describes full videos and twins; what is said is scored against the caption.
    evaluation = RunEvaluation(run, lm, preparation, eval_clips)
    run.show_start(clips, lm)
    # Descriptions side by side, coloured by reward: the first place to look at when something is odd.
    page = RolloutPage(s.out / "rollouts.html", run.console)
    # What stage 1 can do: what follows is measured against it.
    evaluation.before()

    # --- the loop: rollouts -> rewards -> update -> log -> save -> eval
    # Whatever ends it (Ctrl-C, a kill, no memory left): what was trained is saved first.
    with loader, run.guard(saver, budget):
        for _ in run.steps():
            watch = Stopwatch("data")
            # 1. Sample: the policy describes full videos and twins.
            # A process that has lost too many clips ends the run for all of them.
            prompts = run.together(lambda: take_prompts(loader, clips, num_prompts))
            watch.start("rollouts")
            sampled, rollouts, video = roll_out(lm, prompts, s, run)
            # 2. Score: what is said of the event, beyond what is said without it?
            watch.start("reward")
            scored = score(sampled, encoder, preparation.processor, s)
            # 3. Pack: each prompt and its rollouts become one sequence.
            watch.start("update")
            passes = pack_update(lm, reference, scored, video, s, run)
            # 4. Update, several times on the same rollouts: the clipped loss keeps close to what sampled them.
            for epoch in range(s.epochs):
                # Means over tokens, weighted as in the loss; those of the last epoch are logged.
                totals = Totals(run.device)
                for update in passes:
                    with run.autocast():
                        logp, entropy = lm.log_probs(update.packed, see(lm, update, video, s), s.temperature)
                    # Before any change every ratio is 1, and the gradient is that of the plain policy gradient.
                    if epoch == 0:
                        update.start_from(logp.detach())
                    loss, metrics = vp.grpo_loss(  # equation (5)
                        logp, update.old_logp, update.ref_logp, update.advantage, update.weight,
                        s.clip_low, s.clip_high, s.beta,
                    )  # fmt: skip
                    # Gradients add up: the weights divide by the tokens of the whole batch.
                    loss.backward()
                    totals.add(metrics | {"loss": loss, "entropy": (update.weight * entropy).sum()}, update.weight)
                # Without a useful group there is no gradient anywhere, and the optimizer changes nothing.
                grad_norm = finish_gradients(lm, s.grad_clip, run.peers)
                loss = run.mean({"loss": totals.sums["loss"]})["loss"]
                # NaN and Inf: the fused optimizer leaves the update out by itself; nobody waits for it.
                run.count_bad(skip_if_not_finite(optimizer, loss + grad_norm))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            watch.stop()

            # Bookkeeping: nothing below changes the model.
            run.end_of_step(loader, int(rollouts.lengths.sum()))
            # One record a prompt, so that a group without a twin does not count where it has nothing to say.
            for group in scored:
                run.metrics.add(reward_metrics(group.rewards, group.twin, group.num_twin))
                page.add(RolloutGroup.of(group.sampled.prompt.clip, group.texts, group.rewards))
            if passes:
                run.metrics.add(totals.metrics() | {"policy/loss": loss})
                run.metrics.add({"policy/sampling_gap": torch.stack([update.sampling_gap for update in passes]).mean()})
            run.metrics.add({"policy/grad_norm": grad_norm})
            run.metrics.add(rollout_metrics(rollouts, s.num_rollouts, watch.seconds, run.num_processes))
            if run.due(s.log_every) or run.step == s.steps:
                run.write_metrics(loader, run.metrics.numbers(), {
                    "lr": schedule.get_last_lr()[0], "policy/bad_steps": run.bad_steps.item(),
                })  # fmt: skip
            if run.is_main and (run.due(s.show_every) or run.is_last):
                page.show(run.step)
            # Saved before it is evaluated: no evaluation can lose what was trained.
            if run.due(s.save_every) or run.is_last:
                saver.save(run.step, merged=run.step == s.steps)
            evaluation.between()

    # --- afterwards
    results = evaluation.after()
    run.show_skipped(loader)
    run.end(PANELS, "rollouts.html", "checkpoint")
    return results


if __name__ == "__main__":
    try:
        main(parse_settings(Settings, __doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
