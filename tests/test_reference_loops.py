"""Both scripts as they run, for three steps, against two reference loops that are written here.

The reference loops use plain transformers: no shared prefix, no early exit, no gathered twin, no kernel. A twin is encoded
from its own frames, every rollout is a sequence of its own, and the reward counts words. They share no code with the
scripts. The weights at the end are compared, and what metrics.jsonl says of every step: AdamW hides the scale of a loss
from the weights, but not from the logged loss and gradient norm. `python -m tests.mutations` shows what this catches.
"""

import copy
import functools
import itertools
import json
import math
import re
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchcodec.decoders import VideoDecoder
from torchcodec.encoders import VideoEncoder
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    get_linear_schedule_with_warmup,
)

import train_rl
import train_sft
from data.tiny import build_tiny
from data.world import SAME_BYTES, draw_clip
from tests.mutations import FAULTS, HERE

NUM_SLOTS, FPS = 5, 8.0  # a clip of this test: 10 frames, two in a slot
BANNED = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>")


@dataclass(eq=False)
class Story:
    """A clip of the test: its video, its caption, and for each keyword the slots that show it."""

    video: Path
    caption: str
    keywords: list[str]
    slots: list[list[int]]

    @property
    def still(self) -> str:
        """What the caption says of the twin, too: its sentences without a keyword."""
        sentences = re.findall(r"[^.]+\.", self.caption)
        return "".join(s for s in sentences if not any(keyword in s for keyword in self.keywords)).strip()

    @property
    def key_slots(self) -> list[int]:
        """The slots of any keyword."""
        return sorted({t for slots in self.slots for t in slots})

    def source(self, t: int) -> int:
        """The slot that the twin shows in place of slot t: the nearest that is no key slot, the earlier of two."""
        return min((u for u in range(NUM_SLOTS) if u not in self.key_slots), key=lambda u: (abs(u - t), u))


# --- Fixtures: six clips, and a checkpoint that has learned a little of their captions ------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where clips and checkpoints lie."""
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def stories(folder) -> list[Story]:
    """Six clips: events that come twice, one with two keywords of different slots, two without any keyword.

    Some captions tell nothing but the event. The last holds no word: all descriptions of it are alike bad.
    """
    slots = [[[1, 2], [2, 3]], [[4]], [], [[2, 3]], [[0, 1]], []]
    made = []
    with (folder / "clips.jsonl").open("w") as lines:
        for i, of_clip in enumerate(slots):
            frames, line = draw_clip("train", i, quiet=0.0)
            video = torch.from_numpy(frames[3 : 3 + 2 * NUM_SLOTS]).permute(0, 3, 1, 2).contiguous()
            VideoEncoder(video, frame_rate=FPS).to_file(folder / f"{i}.mp4", crf=12, extra_options=SAME_BYTES)
            action, actor = line["keywords"][0], f"the {line['truth']['actor']}"
            caption = f"{'A and a. ' * (i in (1, 4))}Something {action}: {actor}." if i < 5 else "?!"
            story = Story(folder / f"{i}.mp4", caption, [action, actor][: len(of_clip)], of_clip)
            spans = [[t[0] * 2 / FPS + 0.05, (t[-1] + 1) * 2 / FPS - 0.05] for t in story.slots]
            record = {"video": story.video.name, "caption": story.caption, "keywords": story.keywords, "key_spans": spans}
            lines.write(json.dumps(record) + "\n")
            made.append(story)
    return made


@pytest.fixture(scope="module")
def qwen2_5_learned(folder, stories) -> Path:
    """A tiny checkpoint after a few plain steps on the captions, so that its rollouts earn different rewards."""
    path = build_tiny(folder / "qwen2_5_vl", "qwen2_5_vl", seed=1)
    model, processor = load(path)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for story in itertools.islice(itertools.cycle(stories), 30):
        caption = caption_ids(processor, story.caption)
        logits = model(**follow(model, make_prompt(processor, story), [caption])).logits[0, -len(caption) - 1 : -1]
        F.cross_entropy(logits, caption).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> Iterator[None]:
    """One thread, no picture drawn, and no signal handler left behind."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    monkeypatch.setattr("matplotlib.figure.Figure.tight_layout", lambda *_, **__: None)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def load(path: Path) -> tuple[nn.Module, object]:
    """A plain model, and its processor."""
    return AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)


# --- Inputs of the plain model ---------------------------------------------------------------------------------------


@functools.cache
def make_prompt(processor, story: Story, twin: bool = False) -> dict[str, Tensor]:
    """The processor's tensors of the prompt and the video, or of its twin: all pixels are really degraded."""
    frames = VideoDecoder(story.video)[:]
    if twin:
        frames = frames[[2 * story.source(i // 2) + i % 2 for i in range(len(frames))]]
    content = [{"type": "video"}, {"type": "text", "text": "Describe the video."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    num = 2 * NUM_SLOTS
    about = {"total_num_frames": num, "fps": FPS, "duration": num / FPS, "frames_indices": list(range(num))}
    more = dict(video_metadata=[about], do_sample_frames=False, return_tensors="pt")
    return dict(processor(text=[text], videos=[frames], **more))


def caption_ids(processor, caption: str) -> Tensor:
    """The tokens to learn: caption, end of text, newline."""
    return torch.tensor(processor.tokenizer(caption + "<|im_end|>\n", add_special_tokens=False).input_ids)


def positions(model: nn.Module, prompt: dict[str, Tensor], num_more: int) -> Tensor:
    """M-RoPE positions (3, 1, T) of a prompt and num_more tokens of text behind it: time, height and width."""
    here, parts, vision = 0, [], model.config.vision_config
    _, height, width = (prompt["video_grid_thw"][0] // vision.spatial_merge_size).tolist()
    each_slot = 1.0  # Qwen3-VL writes a timestamp before every slot, so that a slot is a run of its own
    if "second_per_grid_ts" in prompt:
        each_slot = float(prompt["second_per_grid_ts"][0]) * vision.tokens_per_second
    types = [*prompt["mm_token_type_ids"][0].tolist(), *[0] * num_more]
    for kind, run in itertools.groupby(types):
        length = len(list(run))
        part = torch.arange(length).expand(3, -1)
        if kind:
            t = (torch.arange(length // (height * width)) * each_slot).long()
            grid = torch.meshgrid(t, torch.arange(height), torch.arange(width), indexing="ij")
            part = torch.stack([axis.flatten() for axis in grid])
        parts.append(here + part)
        here += int(part.max()) + 1  # text behind a video starts at the largest position so far + 1
    return torch.cat(parts, 1)[:, None]


def follow(model: nn.Module, prompt: dict[str, Tensor], texts: list[Tensor]) -> dict[str, Tensor]:
    """Arguments of the plain model: one sequence for each text, the prompt before it, padded to the right."""
    num, start = len(texts), prompt["input_ids"].shape[1]
    padded = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([start + len(text) for text in texts])
    arguments = {name: x.repeat(num, *[1] * (x.ndim - 1)) for name, x in prompt.items() if name != "second_per_grid_ts"}
    return arguments | {
        "input_ids": torch.cat([arguments["input_ids"], padded], 1),
        "mm_token_type_ids": F.pad(arguments["mm_token_type_ids"], (0, padded.shape[1])),
        "attention_mask": (torch.arange(start + padded.shape[1]) < lengths[:, None]).long(),
        "position_ids": positions(model, prompt, padded.shape[1]).expand(3, num, -1),
    }


def clip_order(num_clips: int, seed: int) -> Iterator[int]:
    """Every clip once an epoch, in an order that the seed and the epoch decide."""
    for epoch in itertools.count():
        indices = np.arange(num_clips)
        np.random.default_rng([seed, epoch]).shuffle(indices)
        yield from indices.tolist()


# --- Stage 1 ---------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the contrastive loss needs of one clip: normalised states (slots, tokens of a slot, d), full and twin."""

    story: Story
    full: Tensor
    twin: Tensor


def contrastive(group: list[Seen], keyword_vectors: dict[str, Tensor], tau: Tensor, twin_negatives: bool) -> Tensor:
    """Equation (1), summed over the keywords of the clips that meet in a micro-batch."""
    total = torch.zeros(())
    for own in group:
        for keyword, slots in zip(own.story.keywords, own.story.slots):
            positives, negatives = own.full[slots].flatten(0, 1), []
            if twin_negatives:
                negatives.append(own.twin[slots].flatten(0, 1))
            for other in group:
                if other is not own:
                    same = [t for k, slots in zip(other.story.keywords, other.story.slots) if k == keyword for t in slots]
                    negatives.append(other.full[[t for t in other.story.key_slots if t not in same]].flatten(0, 1))
            s = torch.cat([positives, *negatives]) @ keyword_vectors[keyword] / tau
            total = total + s.logsumexp(0) - s[: len(positives)].logsumexp(0)
    return total


def reference_sft(model: nn.Module, processor, heads: dict[str, Tensor], stories: list[Story], s) -> list[dict]:
    """Stage 1 with plain transformers. Trains the model and the heads in place; returns what should be logged."""
    compares = s.contrastive_weight > 0
    for head in heads.values():
        head.requires_grad_(compares)
    model.model.visual.requires_grad_(not s.freeze_vision)
    trained = [p for p in (*model.parameters(), *heads.values()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, s.learning_rate, betas=(0.9, 0.99), weight_decay=s.weight_decay)
    rising = int(s.warmup * s.steps)
    falling = int(s.decay * (s.steps - rising))

    def share(k: int) -> float:
        """Of the peak learning rate, in step k + 1: a line up, level, a half cosine down."""
        left = min(1.0, (s.steps - k) / max(1, falling))
        return k / rising if k < rising else 0.5 - 0.5 * math.cos(math.pi * left)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    order, layer, lines = clip_order(len(stories), s.seed), s.contrastive_layer or 2, []
    for step in range(1, s.steps + 1):
        lm_loss, con_loss, num_tokens, num_keywords = 0.0, torch.zeros(()), 0, 0
        for _ in range(s.batch_size // s.micro_batch_size):
            group, vectors = [], {}
            for story in [stories[next(order)] for _ in range(s.micro_batch_size)]:
                quiet = s.twin_captions == 1 and story.keywords and story.still  # the twin, as a clip without an event
                keywords = [] if quiet else story.keywords
                caption, states = caption_ids(processor, story.still if quiet else story.caption), []
                for twin in (False, True) if compares else (False,):
                    prompt = make_prompt(processor, story, twin or bool(quiet))
                    out = model(**follow(model, prompt, [caption]), output_hidden_states=True)
                    if not twin:
                        logits = out.logits[0, -len(caption) - 1 : -1]
                        lm_loss = lm_loss + F.cross_entropy(logits, caption, reduction="sum")
                    if compares:
                        visual = (prompt["mm_token_type_ids"][0] == 2).nonzero().squeeze(1)
                        h = out.hidden_states[layer][0, visual].unflatten(0, (NUM_SLOTS, -1))
                        states.append(F.normalize(h @ heads["visual.weight"].T, dim=-1))
                for keyword in keywords if compares else ():
                    ids = processor.tokenizer(" " + keyword, add_special_tokens=False).input_ids
                    t = model.get_input_embeddings().weight[ids].detach().mean(0)
                    vectors[keyword] = F.normalize(heads["text.weight"] @ t, dim=0)
                group += [Seen(story, *states)] if compares and keywords else []
                num_tokens, num_keywords = num_tokens + len(caption), num_keywords + len(keywords)
            if compares:
                tau = heads["log_temperature"].exp().clamp(0.01, 1)
                con_loss = con_loss + contrastive(group, vectors, tau, s.twin_negatives)
        lm_loss, con_loss = lm_loss / num_tokens, con_loss / max(1, num_keywords)
        (lm_loss + s.contrastive_weight * con_loss).backward()  # L = L_LM + lambda L_con
        norm = nn.utils.clip_grad_norm_(trained, s.grad_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        logged = {"step": step, "loss/lm": lm_loss, "grad_norm": norm, "lr": schedule.get_last_lr()[0]}
        if compares:
            logged |= {"loss/contrastive": con_loss, "contrastive/temperature": heads["log_temperature"].exp()}
        lines.append({name: float(torch.as_tensor(value).detach()) for name, value in logged.items()})
    return lines


# --- Stage 2 ---------------------------------------------------------------------------------------------------------


def banned_ids(processor) -> list[int]:
    """Tokens that no rollout may hold."""
    return processor.tokenizer.convert_tokens_to_ids(list(BANNED))


def distribution(logits: Tensor, processor, temperature: float) -> Tensor:
    """The log-probabilities that are sampled from."""
    logits = logits.clone()
    logits[..., banned_ids(processor)] = -torch.inf
    return (logits / temperature).log_softmax(-1)


@torch.no_grad()
def sample(model: nn.Module, processor, prompt: dict[str, Tensor], numbers: np.ndarray, temperature: float):
    """A text for each row of numbers, and the log-probabilities of its tokens.

    One number decides a token, by the inverse of the cumulated distribution.
    """
    num, tokens, logps = len(numbers), [], []
    end, start = processor.tokenizer.eos_token_id, prompt["input_ids"].shape[1]
    at = positions(model, prompt, numbers.shape[1]).expand(3, num, -1)
    arguments = {name: x for name, x in prompt.items() if name != "second_per_grid_ts"}
    out = model(**arguments, position_ids=at[:, :1, :start], use_cache=True)
    out.past_key_values.batch_repeat_interleave(num)
    for t in range(numbers.shape[1]):
        logp = distribution(out.logits[:, -1], processor, temperature).expand(num, -1)
        p = logp.double().exp()
        numbers_now = torch.from_numpy(numbers[:, t]).double()[:, None] * p.sum(-1, keepdim=True)
        tokens.append((p.cumsum(-1) <= numbers_now).sum(-1, keepdim=True))
        logps.append(logp.gather(-1, tokens[-1]))
        place = at[..., start + t : start + t + 1]
        out = model(input_ids=tokens[-1], position_ids=place, past_key_values=out.past_key_values, use_cache=True)
    tokens, logps = torch.cat(tokens, 1), torch.cat(logps, 1)
    lengths = [([*row.tolist(), end].index(end) + 1) for row in tokens]  # the end is a part of the text
    return [y[:n] for y, n in zip(tokens, lengths)], [y[:n] for y, n in zip(logps, lengths)]


def log_probs(model: nn.Module, processor, prompt: dict[str, Tensor], texts: list[Tensor], temperature: float):
    """For each text the log-probabilities of its tokens, and the entropies where they were chosen."""
    logits = model(**follow(model, prompt, texts)).logits[:, prompt["input_ids"].shape[1] - 1 :]
    chosen, entropies = [], []
    for row, text in zip(logits, texts):
        logp = distribution(row[: len(text)], processor, temperature)
        chosen.append(logp[torch.arange(len(text)), text])
        entropies.append(-(logp.exp() * logp.clamp(min=-1e9)).sum(-1))
    return chosen, entropies


def words(text: str) -> list[str]:
    """Lower-case words."""
    return re.findall(r"\w+", text.lower())


def quality(text: str, caption: str) -> float:
    """F1 of the words in common: where only equal words are alike, the caption similarity q is nothing else."""
    common = (Counter(words(text)) & Counter(words(caption))).total()
    return 2 * common / max(1, len(words(text)) + len(words(caption)))


def recall(text: str, keywords: list[str]) -> float:
    """Keyword recall c: the share of a keyword's words that the text says, mean over keywords."""
    shares = [np.mean([word in words(text) for word in words(keyword)]) for keyword in keywords]
    return float(np.mean(shares)) if shares else 0.0


def rewards(q: Tensor, c: Tensor, q_twin: Tensor, c_twin: Tensor, s) -> tuple[Tensor, Tensor, Tensor]:
    """w, r and A of the full video's rollouts: equations (2) to (4)."""
    w = torch.zeros(len(q))
    for i, j in itertools.product(range(len(q)), range(len(q_twin))):
        w[i] += float(c[i] > c_twin[j] + s.margin and q[i] > q_twin[j] - s.margin) / len(q_twin)
    r = {"similarity": q, "recall": q + s.alpha * c, "pooled": q + s.alpha * c, "relative": q + s.alpha * w}[s.reward]
    group = torch.cat([r, q_twin + s.alpha * c_twin]) if s.reward == "pooled" else r
    advantage = r - group.mean()
    return w, r, advantage / (group.std(correction=0) + 1e-4) if s.divide_by_spread else advantage


@dataclass
class Group:
    """The rollouts of one prompt: tokens, advantages, log-probabilities when they were sampled and under the reference."""

    prompt: dict[str, Tensor]
    texts: list[Tensor]
    advantages: Tensor
    old: list[Tensor]
    frozen: list[Tensor]


def reference_rl(model: nn.Module, processor, stories: list[Story], s) -> list[dict]:
    """Stage 2 with plain transformers. Trains the model in place; returns what should be logged."""
    frozen, G = copy.deepcopy(model), s.num_rollouts
    model.model.visual.requires_grad_(not s.freeze_vision)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, s.learning_rate, betas=(0.9, 0.99), weight_decay=s.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, int(s.warmup * s.steps * s.epochs), s.steps * s.epochs)
    order, place, lines = clip_order(len(stories), s.seed), 0, []
    for step in range(1, s.steps + 1):
        groups, logged = [], {"reward/quality": [], "reward/keyword_recall": [], "reward/beaten_twins": [],
                              "reward/total": [], "reward/twin_quality": [], "reward/twin_keyword_recall": []}  # fmt: skip
        no_spread, full_lengths = [], []
        logged["reward/twin_total"] = []
        for story in [stories[next(order)] for _ in range(s.batch_size)]:
            place += 1
            numbers = np.random.default_rng([s.seed, place]).random((G + s.num_twin_rollouts, s.max_new_tokens), np.float32)
            prompt = make_prompt(processor, story)
            texts, old = sample(model, processor, prompt, numbers[:G], s.temperature)
            twin_texts, twin_old = [], []
            if story.keywords and s.num_twin_rollouts:
                twin = make_prompt(processor, story, twin=True)
                twin_texts, twin_old = sample(model, processor, twin, numbers[G:], s.temperature)
            said = [processor.tokenizer.decode(y, skip_special_tokens=True) for y in texts + twin_texts]
            q = torch.tensor([quality(text, story.caption) for text in said])
            c = torch.tensor([recall(text, story.keywords) for text in said])
            w, r, advantages = rewards(q[:G], c[:G], q[G:], c[G:], s)
            for name, values in zip(logged, (q[:G], c[:G], w, r, q[G:], c[G:])):
                logged[name] += [values.mean()] if len(values) else []
            full_lengths += [len(y) for y in texts]
            with torch.no_grad():
                reference, _ = log_probs(frozen, processor, prompt, texts, s.temperature)
            groups.append(Group(prompt, texts, advantages, old, reference))
            no_spread.append(float(advantages.abs().max() < 1e-6))
            if twin_texts and s.twin_branch:  # equation (6)
                still = [quality(text, story.still) for text in said[G:]]
                r = torch.tensor(still) - s.alpha * c[G:]
                A = (r - r.mean()) / ((r.std(correction=0) + 1e-4) if s.divide_by_spread else 1)
                with torch.no_grad():
                    reference, _ = log_probs(frozen, processor, twin, twin_texts, s.temperature)
                groups.append(Group(twin, twin_texts, A, twin_old, reference))
                logged["reward/twin_total"].append(r.mean())
        lengths = [len(y) for group in groups for y in group.texts]
        for _ in range(s.epochs):
            loss, sums = torch.zeros(()), Counter()
            for group in groups:
                if group.advantages.abs().max() < 1e-6:
                    continue  # all alike: it teaches nothing
                logps, entropies = log_probs(model, processor, group.prompt, group.texts, s.temperature)
                for A, logp, old, reference, entropy in zip(group.advantages, logps, group.old, group.frozen, entropies):
                    weight = 1 / sum(lengths) if s.loss_level == "token" else 1 / (len(logp) * len(lengths))
                    rho = (logp - old).exp()
                    clipped = rho.clamp(1 - s.clip_low, 1 + s.clip_high) * A
                    kl = (reference - logp).exp() - (reference - logp) - 1
                    loss = loss + weight * (s.beta * kl - torch.minimum(rho * A, clipped)).sum()  # equation (5)
                    some = {
                        **({"kl": kl} if s.beta > 0 else {}),
                        "clipped": clipped < rho * A,
                        "entropy": entropy,
                        "weight": logp * 0 + 1,
                    }
                    for name, values in some.items():
                        sums[name] += float(weight * values.detach().sum())
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trained, s.grad_clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        line = {name: np.mean(values) for name, values in logged.items() if values}
        line["rollout/no_spread"] = np.mean(no_spread)
        line |= {f"policy/{name}": total / sums["weight"] for name, total in sums.items() if name != "weight"}
        line |= {"step": step, "policy/loss": loss, "policy/grad_norm": norm, "rollout/length": np.mean(full_lengths)}
        line["lr"] = schedule.get_last_lr()[0]
        lines.append({name: float(torch.as_tensor(value).detach()) for name, value in line.items()})
    return lines


# --- The tests -------------------------------------------------------------------------------------------------------

SMALL = dict(steps=3, log_every=1, workers=0, max_frames=16)
SFT_CASES = {
    "contrastive": dict(
        contrastive_weight=0.7, temperature=0.2, batch_size=4, micro_batch_size=2, learning_rate=1e-3, warmup=0.34,
        weight_decay=0.1, grad_clip=0.5,
    ),
    "caption-only": dict(
        contrastive_weight=0.0, batch_size=3, micro_batch_size=1, learning_rate=5e-4, warmup=0.0, decay=0.67,
        weight_decay=1.0, grad_clip=100.0,
    ),
    "no-twin": dict(
        twin_negatives=False, contrastive_layer=3, batch_size=4, micro_batch_size=4, learning_rate=5e-4, warmup=0.0, seed=1,
        freeze_vision=True,
    ),
    "twin-captions": dict(
        twin_captions=1.0, batch_size=3, micro_batch_size=3, learning_rate=5e-4, warmup=0.0, steps=2,
    ),
    "qwen3": dict(batch_size=2, micro_batch_size=2, learning_rate=1e-4, warmup=0.0, steps=2),
}  # fmt: skip
RL_CASES = {
    "relative": dict(
        alpha=0.7, margin=0.3, temperature=0.9, beta=0.5, clip_low=0.05, clip_high=0.1, learning_rate=1e-3, warmup=0.2,
        weight_decay=0.1, grad_clip=0.1, micro_batch_size=2, freeze_vision=True,
    ),
    "pooled": dict(
        reward="pooled", divide_by_spread=True, loss_level="sequence", epochs=3, seed=1, warmup=0.0, steps=2, beta=0.1,
        micro_batch_size=3, num_rollouts=3,
    ),
    "recall": dict(
        reward="recall", alpha=2.0, epochs=1, num_twin_rollouts=0, twin_branch=False, warmup=0.0, temperature=1.2,
        micro_batch_size=3, freeze_vision=True,
    ),
    "similarity": dict(
        reward="similarity", num_rollouts=2, twin_branch=False, warmup=0.0, micro_batch_size=1, max_new_tokens=3, steps=2,
        beta=0.1, seed=1,  # with this seed each step has a group with spread
    ),
}  # fmt: skip


def run(script, settings) -> list[dict]:
    """What the script itself logs of every step."""
    script.main(settings)
    lines = [json.loads(line) for line in (settings.out / "metrics.jsonl").open()]
    return [line for line in lines if "grad_norm" in line or "policy/grad_norm" in line]


def check_logs(logged: list[dict], expected: list[dict]) -> None:
    """Every number that the reference knows is logged, at every step."""
    assert [line["step"] for line in logged] == [line["step"] for line in expected]
    for line, want in zip(logged, expected):
        close = {name: pytest.approx(value, rel=1e-4, abs=2e-6) for name, value in want.items()}
        wrong = [f"{name} is {line.get(name)}, not {want[name]:.6g}" for name in want if line.get(name) != close[name]]
        assert not wrong, f"step {line['step']}: {'; '.join(wrong)}"


def check_weights(before: dict[str, Tensor], got: dict[str, Tensor], want: dict[str, Tensor], rounding: float) -> None:
    """Weights are equal to 1e-5, and what training changed about them is, as a whole, the same up to `rounding`.

    Float32 rounds the two loops differently, and AdamW makes a whole step even of a gradient that is mostly rounding: one
    weight in 5,000 may be further off than 1e-5 (measured: at most 336 of 2 million, nearly all of the contrastive heads).
    """
    assert got.keys() == want.keys()
    far = sum(((got[name] - want[name]).abs() > 1e-5).sum().item() for name in want)
    assert far <= 2e-4 * sum(x.numel() for x in want.values()), f"{far} weights differ"
    error, change = (
        torch.stack([(want[name] - other[name]).norm() for name in want]).norm().item() for other in (got, before)
    )
    assert error < rounding * change, f"of the change {error / change:.1e} is wrong"


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's weights by name; tied ones once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("case", SFT_CASES)
def test_stage_1(case, folder, stories, qwen2_5_learned):
    """Losses, gradient norms, learning rates and weights of three steps are those of the reference loop."""
    path = build_tiny(folder / "qwen3_vl", "qwen3_vl", seed=1) if case == "qwen3" else qwen2_5_learned
    more = dict(model=str(path), data=folder / "clips.jsonl", sheets=0) | SMALL | SFT_CASES[case]
    s = train_sft.Settings(out=folder / f"sft-{case}", **more)
    logged = run(train_sft, s)
    model, processor = load(path)
    heads = {}
    if s.contrastive_weight > 0:  # the heads that this seed begins with are those of a run that learns nothing
        still = more | dict(learning_rate=1e-30, weight_decay=0.0, steps=1)
        run(train_sft, train_sft.Settings(out=folder / f"sft-{case}-still", **still))
        heads = load_file(folder / f"sft-{case}-still/checkpoint/heads.safetensors")
        torch.testing.assert_close(heads["text.weight"], heads["visual.weight"], rtol=0, atol=0)
        assert heads["log_temperature"].exp().item() == pytest.approx(s.temperature)
    before = weights(model) | {name: head.clone() for name, head in heads.items()}

    expected = reference_sft(model, processor, heads, stories, s)
    check_logs(logged, expected)
    assert s.grad_clip > 1 or all(line["grad_norm"] > s.grad_clip for line in expected)  # clipping has something to do
    result = weights(load(s.out / "checkpoint")[0])
    if heads:
        result |= load_file(s.out / "checkpoint/heads.safetensors")
    trained = weights(model) | {name: head.detach() for name, head in heads.items()}
    check_weights(before, result, trained, rounding=1e-3)  # measured: at most 3e-4


@pytest.mark.parametrize("case", RL_CASES)
def test_stage_2(case, folder, stories, qwen2_5_learned):
    """Rewards, losses, gradient norms, learning rates and weights of three steps are those of the reference loop."""
    more = dict(batch_size=3, num_rollouts=4, num_twin_rollouts=3, max_new_tokens=7, learning_rate=5e-4)
    more |= dict(model=str(qwen2_5_learned), data=folder / "clips.jsonl") | SMALL | RL_CASES[case]
    s = train_rl.Settings(out=folder / f"rl-{case}", **more)
    logged = run(train_rl, s)
    model, processor = load(qwen2_5_learned)
    before = weights(model)
    expected = reference_rl(model, processor, stories, s)
    check_logs(logged, expected)
    assert all(line["policy/sampling_gap"] < 1e-4 for line in logged)  # sampling and update agree on every token
    if case == "relative":  # what is tested here has something to do
        assert all(line["policy/grad_norm"] > s.grad_clip for line in expected)
        assert max(line["policy/clipped"] for line in expected) > 0.05
        assert max(line["policy/kl"] for line in expected) > 0.005
    if case == "similarity":  # groups without spread are left out, their KL to the reference, too
        assert any(line["rollout/no_spread"] > 0 for line in expected)
    check_weights(before, weights(load(s.out / "checkpoint")[0]), weights(model), rounding=2e-4)  # measured: 2e-5


def test_faults_can_be_planted():
    """`tests.mutations` finds the text of each fault exactly once, and has a test for it."""
    cases = {f"stage_1[{case}]" for case in SFT_CASES} | {f"stage_2[{case}]" for case in RL_CASES}
    for fault in FAULTS:
        assert (HERE / fault.file).read_text().count(fault.old) == 1, f"{fault.file}: {fault.name}"
        if "::" in fault.case:
            file, name = fault.case.split("::")
            assert f"def {name}(" in (HERE / file).read_text()
        else:
            assert fault.case in cases
