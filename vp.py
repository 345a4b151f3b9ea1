"""VideoPerceiver, the method: the twin, the contrastive loss, the reward, the policy loss. Every equation is here to read.

Words. A *clip* is a video with its caption. *Frames* are what was sampled from it. A *slot* is one temporal
patch: two consecutive frames, the smallest unit of time that the vision encoder sees. A *keyword* is an
event-action phrase of the caption ("jumps off"); its *key slots* are those that show it. The *twin* is the
key-information-missing video: the same slots, the key slots shown as their nearest non-key neighbour. *Full*
is the complete video beside its twin. A *rollout* is one sampled description; its *quality* is its score
against the caption.

Shapes, here and in the tests:

    B clips      T tokens of a padded sequence     D width of the language model      V visual tokens of the whole batch
    S slots      F frames                          K keywords of the batch            N key-slot tokens of the batch
    L tokens of a text                             d width of the contrastive space   M sampled tokens of a micro-batch
    G rollouts of the full video of a prompt       G' rollouts of its twin            R = G + G'

Pure functions: no globals, no argument changed, no file read. On a GPU the contrastive loss and the rewards
take a fused kernel of kernels/, which is tested against these functions.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.contrastive import fused_contrastive
from kernels.dispatch import takes_kernel
from kernels.reward import REWARDS, fused_rewards

# --- The twin (method, section 1) ---------------------------------------------------------------------------------------


def twin_sources(key_slots: Tensor) -> Tensor | None:
    """Which slot the twin shows in each place: src(t) = t outside the key slots, else the nearest slot outside them.

    key_slots: (S,) bool. Returns (S,) long, ties going to the earlier neighbour, or None if there is no twin: no key
    slot, or nothing but key slots.

    >>> twin_sources(torch.tensor([0, 0, 1, 1, 1, 0], dtype=torch.bool)).tolist()
    [0, 1, 1, 1, 5, 5]
    """
    # Without a key slot the twin would be the full video; with nothing else there is nothing to show instead.
    if not key_slots.any() or key_slots.all():
        return None
    kept = torch.nonzero(~key_slots).squeeze(1)  # ascending, so argmin prefers the earlier of two equally near
    # A kept slot is nearest to itself, so that it shows itself.
    distance = (torch.arange(len(key_slots))[:, None] - kept[None, :]).abs()
    return kept[distance.argmin(1)]


def span_slots(
    spans: Sequence[Sequence[float]], timestamps: Sequence[float], frames_per_slot: int = 2,
    last: Sequence[float] | None = None,
) -> Tensor:  # fmt: skip
    """The slots that a keyword's key spans overlap: (S,) bool.

    spans: [start, end] in seconds; timestamps: (F,) seconds at which each sampled frame begins to show, F a
    multiple of frames_per_slot. A slot lasts from its first frame to the next slot's first frame, but not
    beyond `last` (S,). A span too short to hold any frame still marks the slot it falls into.

    >>> span_slots([[0.5, 0.9]], [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]).tolist()
    [False, True, False]
    """
    # A slot begins with its first frame; float64, for sums of frame times.
    begins = torch.tensor(timestamps[::frames_per_slot], dtype=torch.float64)
    if len(timestamps) > 1:
        # The last slot has no next one: it lasts as long as its frames would at the mean distance.
        step = (timestamps[-1] - timestamps[0]) / (len(timestamps) - 1)
    else:
        step = 1.0
    ends = torch.cat([begins[1:], begins[-1:] + max(step, 1e-6) * frames_per_slot])
    if last is not None:
        # A window ends where it was cut out: its last slot does not last until the next window.
        stop = torch.tensor(last, dtype=torch.float64)
        ends = torch.cat([ends[:-1].minimum(stop[:-1]), stop[-1:]])
    slots = torch.zeros(len(begins), dtype=torch.bool)
    # Two intervals overlap if each begins before the other ends; a span of no length still counts.
    for start, end in spans:
        slots |= (begins < max(end, start + 1e-6)) & (ends > start)
    return slots


# --- Records ------------------------------------------------------------------------------------------------------------


@dataclass
class Keyword:
    """An event-action phrase of a caption: its text, its tokens ids (W,), and its key slots (S,) bool."""

    text: str
    ids: Tensor
    slots: Tensor


@dataclass
class Example:
    """One clip, ready for a model: everything that can be known before the model runs, on the CPU.

    input_ids, token_types (T,): prompt, then the caption's tokens; token_types 2 marks visual tokens.
    prompt_length: how many belong to the prompt. pixels (patches, C*2*p*p): as the processor made them. grid
    (3,): slots, and height and width of each in patches; or (R, 3), one row for each run of slots of one
    size, in time order. seconds_per_slot: for M-RoPE; slot_seconds (S,): the same of slots that do not come
    evenly, counted from the first. source (S,) long: `twin_sources`, or None. keywords: those of the caption.
    """

    name: str
    input_ids: Tensor
    token_types: Tensor
    prompt_length: int
    pixels: Tensor
    grid: Tensor
    seconds_per_slot: float
    source: Tensor | None
    keywords: list[Keyword]
    slot_seconds: Tensor | None = None

    @property
    def runs(self) -> Tensor:
        """The grid as rows (R, 3), one if all slots are of one size."""
        return self.grid.view(-1, 3)

    @property
    def num_slots(self) -> int:
        """S."""
        return int(self.runs[:, 0].sum())

    def by_slot(self, visual: Tensor) -> list[Tensor]:
        """Something of each visual token, or of each patch, in their order (V, ...), cut into slots."""
        slots, height, width = self.runs.unbind(1)
        # As many tokens, or patches, as the area of the slot, up to a factor that all slots share.
        areas = (height * width).repeat_interleave(slots)
        return list(visual.split((areas * len(visual) // areas.sum()).tolist()))


@dataclass
class KeyTokens:
    """Where the key-slot tokens of a batch are, and which keyword they belong to.

    clip (N,), slot (N,): of each key-slot token. keyword_clip (K,): the clip of each keyword. keyword_id
    (K,): a number that is the same for the same words. keyword_slots (K, S) bool: the key slots of each
    keyword. shown (N, M): ids of the keywords that each token shows, see `ids_shown`; only the kernel reads
    it.
    """

    clip: Tensor
    slot: Tensor
    keyword_clip: Tensor
    keyword_id: Tensor
    keyword_slots: Tensor
    shown: Tensor | None = None

    def positives(self) -> Tensor:
        """(K, N) bool: P_j, the tokens of the keyword's own clip in its key slots."""
        # One keyword a row, one token a column: same clip, and a slot that shows the keyword.
        return (self.keyword_clip[:, None] == self.clip[None, :]) & self.keyword_slots[:, self.slot]

    def negatives(self) -> Tensor:
        """(K, N) bool: key-slot tokens of other clips, except those that show an event of the same words."""
        # "falls" in two clips is the same event: to push the one from the other would teach nonsense.
        same_words = (self.keyword_id[:, None] == self.keyword_id[None, :]).float()
        # (K, K) @ (K, N): how many keywords of the same words each token shows.
        shows_same = same_words @ self.positives().float() > 0
        return (self.keyword_clip[:, None] != self.clip[None, :]) & ~shows_same


# --- The contrastive loss (method, section 2) ---------------------------------------------------------------------------


def contrastive_loss(
    full: Tensor, twin: Tensor | None, keywords: Tensor, temperature: Tensor, tokens: KeyTokens,
    use_kernel: bool | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """InfoNCE with several positives (MIL-NCE), summed over the keywords that have a positive: equation (1).

    full, twin: (N, d) states of the key-slot tokens in the full video and in its twin (None: no twin
    negatives); keywords: (K, d) text vectors; temperature: scalar tau. All are L2-normalised here. For
    keyword j with positives P_j and negatives N_j (the twin's tokens at P_j, and other clips' key-slot tokens
    of another keyword):

        L_j = logsumexp_{i in P_j + N_j} s_ji - logsumexp_{i in P_j} s_ji,        s_ji = <k_j, z_i> / tau            (1)

    Returns the sum and counts, without waiting for the device. Divide by the number of keywords of the whole
    batch: then cutting a batch into micro-batches changes nothing but the in-batch negatives. A keyword
    without a positive adds neither loss nor gradient. use_kernel: None takes the kernel on a GPU; see
    `takes_kernel`.
    """
    # On a GPU the lines below are one fused kernel: kernels/contrastive.py.
    if takes_kernel(use_kernel, full, twin, keywords, name="contrastive"):
        return fused_contrastive(full, twin, keywords, temperature, tokens)
    positive, allowed = tokens.positives(), tokens.positives() | tokens.negatives()  # P_j, P_j + N_j: (K, N)
    states = full
    if twin is not None:  # hard negatives: the same places of the twin, which shows everything but the event
        states = torch.cat([full, twin])  # (2N, d)
        allowed = torch.cat([allowed, positive], 1)
        positive = F.pad(positive, (0, len(twin)))
    # Norms and exponentials in float32 at least, whatever the model computes in.
    wide = torch.promote_types(states.dtype, torch.float32)
    # Cosine similarity over tau: only directions count, so no state can win by its length.
    z = F.normalize(states.to(wide), dim=-1)
    k = F.normalize(keywords.to(wide), dim=-1)
    s = k @ z.T / temperature  # (K, 2N)
    # A finite floor instead of -inf: a keyword without a positive keeps a finite value and gradient.
    low = torch.finfo(s.dtype).min / 2
    # Equation (1). Several positives: their sum in the numerator (MIL-NCE), since not all have to match.
    loss = s.masked_fill(~allowed, low).logsumexp(1) - s.masked_fill(~positive, low).logsumexp(1)  # (K,)
    # Counts of entries, for the log: are there negatives at all?
    metrics = {"positives": positive.sum(), "negatives": (allowed & ~positive).sum()}
    return torch.where(positive.any(1), loss, 0.0).sum(), metrics


class ContrastiveHeads(nn.Module):
    """Linear heads into the contrastive space and the learnable temperature; dropped after training."""

    def __init__(self, width: int, d: int = 256, temperature: float = 0.1):
        super().__init__()
        # No bias: it would be the same in full and twin.
        self.visual = nn.Linear(width, d, bias=False)
        self.text = nn.Linear(width, d, bias=False)
        # Both start equal, and keep angles as far as d allows. So states are pulled from the first step
        # toward the keywords' own embeddings, where the layers above, and the output head, can read them.
        nn.init.orthogonal_(self.visual.weight)
        self.text.load_state_dict(self.visual.state_dict())
        # The logarithm is learned, so that tau stays above 0.
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    @property
    def temperature(self) -> Tensor:
        """tau, clamped to [0.01, 1]."""
        return self.log_temperature.exp().clamp(0.01, 1.0)

    def forward(
        self, full: Tensor, twin: Tensor | None, keywords: Tensor, tokens: KeyTokens
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """full, twin (N, D), keywords (K, D) -> the summed loss of equation (1) and its metrics."""
        # float32 also under autocast: tau divides small differences of cosines.
        with torch.autocast(full.device.type, enabled=False):
            z_twin = None if twin is None else self.visual(twin.float())
            z, k = self.visual(full.float()), self.text(keywords.float())
            return contrastive_loss(z, z_twin, k, self.temperature, tokens)


# --- The reward (method, section 3) -------------------------------------------------------------------------------------


def repetition_weights(tokens: Sequence[int], reference: Sequence[int]) -> Tensor:
    """1 for each token of a text, 0 for repetitions beyond what the other text has (but once is always free): (L,).

    The clipped counts of BLEU, used both ways: saying a word again and again is not precise, and saying it
    once does not recall all its occurrences in the reference.

    >>> repetition_weights([5, 7, 5, 7, 5], reference=[5, 9, 5]).tolist()
    [1.0, 1.0, 1.0, 0.0, 0.0]
    """
    # A word counts as often as the other text has it; what is said beyond that is repetition.
    seen, weights = Counter(), []
    allowed = Counter(reference)
    for token in tokens:
        seen[token] += 1
        weights.append(float(seen[token] <= max(1, allowed[token])))
    return torch.tensor(weights)


def score_rollouts(
    rollouts: Sequence[Tensor], weights: Sequence[Tensor], reference: Tensor, reference_weights: Tensor,
    keywords: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Quality q and keyword recall c of each rollout of a prompt, both (R,), in [0, 1].

    rollouts: R token embeddings (L_i, D); reference (T, D); keywords: the tokens (W_k, D) of each. weights
    (L_i,) and reference_weights (R, T): `repetition_weights` of each rollout against the reference, and the
    reverse. Similarities are cosines, those below 0 count as 0. q is the F1 of precision, the mean over a
    rollout's tokens of their largest similarity to a reference token, and recall, the same in reverse
    (BERTScore), repetitions counting as 0. c is the mean over keywords of the mean, over their tokens, of the
    largest similarity to a rollout token. An empty rollout has q = c = 0; if the reference is empty q = 0,
    and without keywords c = 0.

    >>> word = torch.eye(4)                                  # four words that have nothing in common
    >>> full, half = word[[0, 1, 2]], word[[0, 1, 3]]        # the reference, and one with its last word wrong
    >>> q, c = score_rollouts([full, half], [torch.ones(3)] * 2, full, torch.ones(2, 3), keywords=[word[[2]]])
    >>> [round(x, 2) for x in q.tolist()], c.tolist()
    ([1.0, 0.67], [1.0, 0.0])
    """
    # All rollouts of the prompt in one padded tensor; zeros are like nothing.
    lengths = torch.tensor([len(y) for y in rollouts], device=reference.device)
    y = nn.utils.rnn.pad_sequence(list(rollouts), batch_first=True)  # (R, L, D), pads are 0
    wide = torch.promote_types(y.dtype, torch.float32)
    y = F.normalize(y.to(wide), dim=-1)
    # Repetitions count as 0, and so does padding.
    w = nn.utils.rnn.pad_sequence(list(weights), batch_first=True).to(y)
    if y.shape[1] == 0:
        return y.new_zeros(len(y)), y.new_zeros(len(y))

    def similarity(words: Tensor) -> Tensor:
        return (y @ F.normalize(words.to(wide), dim=-1).T).clamp(min=0)  # (R, L, words)

    quality = y.new_zeros(len(y))
    # Without a reference there is nothing to be like; keywords still count.
    if len(reference):
        # (R, L, T): every token of every rollout against every token of the reference.
        s = similarity(reference)
        precision = (s.amax(2) * w).sum(1) / lengths.clamp(min=1)
        recall = (s.amax(1) * reference_weights.to(s)).mean(1)
        quality = 2 * precision * recall / (precision + recall).clamp(min=1e-9)
    coverage = [similarity(k).amax(1).mean(1) for k in keywords if len(k)]
    return quality, torch.stack(coverage).mean(0) if coverage else torch.zeros_like(quality)


def relative_wins(q: Tensor, c: Tensor, q_twin: Tensor, c_twin: Tensor, margin: float = 0.1) -> Tensor:
    """w_i, the share of the twin's rollouts that each rollout beats: equation (2), (G,).

    q, c: (G,), of the full video's rollouts; q_twin, c_twin: (G',), of the twin's. One beats another when it
    covers the keywords better by more than the margin, without being a worse description by more than the
    margin: naming every event, or nothing but the event, covers the keywords and is still a bad description.
    G' = 0 gives 0.

    >>> relative_wins(torch.tensor([0.9, 0.9, 0.5]), torch.tensor([1.0, 0.2, 1.0]),
    ...               torch.tensor([0.8, 0.8]), torch.tensor([0.2, 1.0])).tolist()
    [0.5, 0.0, 0.0]
    """
    # Every rollout of the full video against every one of the twin: (G, G').
    better = c[:, None] > c_twin[None, :] + margin
    # Without this, a rollout that only lists events would win.
    no_worse = q[:, None] > q_twin[None, :] - margin
    return (better & no_worse).float().sum(1) / max(len(c_twin), 1)


def rewards_and_advantages(
    kind: str, q: Tensor, c: Tensor, q_twin: Tensor, c_twin: Tensor, alpha: float = 1.0, margin: float = 0.1,
    divide: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Reward r and advantage A of each rollout of the full video: equations (3) and (4), both (G,).

    similarity: r = q. recall: r = q + alpha c. relative: r = q + alpha w. pooled: r = q + alpha c, its mean
    taken over full and twin rollouts together. divide: also divide by the standard deviation of the rewards
    in that mean.

    >>> q, c = torch.tensor([0.9, 0.8]), torch.tensor([0.1, 1.0])
    >>> r, a = rewards_and_advantages("relative", q, c, torch.tensor([0.9]), torch.tensor([0.1]))
    >>> [round(x, 2) for x in r.tolist() + a.tolist()]
    [0.9, 1.8, -0.45, 0.45]
    """
    if kind not in REWARDS:
        raise ValueError(f"reward: got {kind!r}; choose one of {', '.join(REWARDS)}")
    r = q
    if kind == "relative":
        r = q + alpha * relative_wins(q, c, q_twin, c_twin, margin)
    elif kind in ("recall", "pooled"):
        r = q + alpha * c
    # pooled asks: better than what is said of either video, on average?
    group = torch.cat([r, q_twin + alpha * c_twin]) if kind == "pooled" else r
    # Equation (4): whatever is the same for the whole group is taken out.
    advantage = r - group.mean()
    advantage = torch.where(advantage.abs() < 1e-6, 0.0, advantage)  # rounding, which the division would blow up
    if divide:
        advantage = advantage / (group.std(correction=0) + 1e-4)
    return r, advantage


@dataclass
class Texts:
    """What one prompt's rollouts are scored by: the arguments of `score_rollouts`, the full video's rollouts first.

    num_full: G; num_twin: G', how many of those behind them count as the twin's (0: nothing to be compared with).
    """

    rollouts: Sequence[Tensor]
    weights: Sequence[Tensor]
    reference: Tensor
    reference_weights: Tensor
    keywords: Sequence[Tensor]
    num_full: int
    num_twin: int = 0


@dataclass
class Rewards:
    """Scores of one prompt's rollouts. quality q, keyword_recall c (R,), the full video's first; of the full
    video's (G,): beaten_twins w, reward r, advantage A."""

    quality: Tensor
    keyword_recall: Tensor
    beaten_twins: Tensor
    reward: Tensor
    advantage: Tensor


@torch.no_grad()
def paired_rewards(
    batch: Sequence[Texts], kind: str = "relative", alpha: float = 1.0, margin: float = 0.1, divide: bool = False,
    use_kernel: bool | None = None,
) -> list[Rewards]:  # fmt: skip
    """The rewards of each prompt: equations (2) to (4), see `score_rollouts` and `rewards_and_advantages`.

    use_kernel: None takes the kernel on a GPU; see `takes_kernel`.
    """
    if kind not in REWARDS:
        raise ValueError(f"reward: got {kind!r}; choose one of {', '.join(REWARDS)}")
    # On a GPU two fused kernels do all prompts at once: kernels/reward.py.
    if batch and takes_kernel(use_kernel, *(prompt.reference for prompt in batch), name="reward"):
        return [Rewards(*scores) for scores in fused_rewards(batch, kind, alpha, margin, divide)]
    rewards = []
    for prompt in batch:
        q, c = score_rollouts(
            prompt.rollouts, prompt.weights, prompt.reference, prompt.reference_weights, prompt.keywords
        )  # fmt: skip
        # The full video's rollouts come first, then the twin's.
        full, twin = slice(0, prompt.num_full), slice(prompt.num_full, prompt.num_full + prompt.num_twin)
        w = relative_wins(q[full], c[full], q[twin], c[twin], margin)
        r, advantage = rewards_and_advantages(kind, q[full], c[full], q[twin], c[twin], alpha, margin, divide)
        rewards.append(Rewards(q, c, w, r, advantage))
    return rewards


def twin_rewards(
    batch: Sequence[Texts], alpha: float = 1.0, divide: bool = False, use_kernel: bool | None = None
) -> list[Rewards]:
    """The rewards of the twin's rollouts, which are trained on as well: equation (6).

    batch: the twin's rollouts alone, as `num_full`; the reference is the still part of the caption, without
    its event. To name the event is a claim here, about what is not shown, and costs what it earns on the full
    video:

        r'_j = q(y'_j; still part) - alpha c(y'_j),    A'_j = r'_j - mean(r')                                        (6)

    Without a still part, q is 0, and the claim counts alone.
    """
    return paired_rewards(batch, "recall", -alpha, divide=divide, use_kernel=use_kernel)


# --- The policy loss (method, section 3) --------------------------------------------------------------------------------


def token_weights(lengths: Tensor, level: str = "token", num_tokens: float | None = None) -> Tensor:
    """How much each token of a rollout counts in the loss of a whole batch: (R,), for rollouts of `lengths` (R,) tokens.

    token: every token of the batch alike (long rollouts count more); sequence: every rollout alike.
    num_tokens: if the batch is spread over processes whose gradients are averaged, the tokens of a process on
    average.

    >>> token_weights(torch.tensor([1, 3])).tolist(), token_weights(torch.tensor([1, 4]), "sequence").tolist()
    ([0.25, 0.25], [0.5, 0.125])
    """
    # Dividing by the tokens of the whole batch makes micro-batches change nothing.
    if level == "token":
        return torch.full(lengths.shape, 1.0 / max(1.0, float(lengths.sum()) if num_tokens is None else num_tokens))
    if level == "sequence":
        return 1.0 / (lengths.clamp(min=1) * lengths.numel())
    raise ValueError(f"loss level: got {level!r}; choose token or sequence")


def grpo_loss(
    logp: Tensor, old_logp: Tensor, ref_logp: Tensor | None, advantage: Tensor, weight: Tensor,
    clip_low: float = 0.2, clip_high: float = 0.28, beta: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The clipped policy loss with a KL penalty, summed over tokens: equation (5).

    All (M,), one entry a sampled token: logp under the policy; old_logp when it was sampled; ref_logp under
    the frozen reference (None: no penalty); the advantage of its rollout; its weight, see `token_weights`.
    The sum over the micro-batches of a batch is the loss of the batch. The penalty is Schulman's
    k3, e^x - x - 1 with x = ref_logp - logp.
    """
    # How much likelier the token is now than when it was sampled.
    rho = (logp - old_logp).exp()
    # The minimum is the pessimistic one: beyond the clip there is nothing to gain, but still to lose.
    unclipped, clipped = rho * advantage, rho.clamp(1 - clip_low, 1 + clip_high) * advantage
    loss = -torch.minimum(unclipped, clipped)
    # Weighted as the loss is, so that sums over micro-batches are means over the batch.
    metrics = {"clipped": (weight * (clipped < unclipped)).sum().detach()}
    # k3 is never negative, and 0 where policy and reference agree.
    if ref_logp is not None:
        x = ref_logp - logp
        kl = x.exp() - x - 1
        loss = loss + beta * kl
        metrics["kl"] = (weight * kl).sum().detach()
    return (weight * loss).sum(), metrics


def choose(logp: Tensor, uniform: Tensor | None) -> Tensor:
    """One token a row by the inverse of the cumulated distribution, or, without `uniform`, the likeliest.

    logp (..., vocabulary), uniform (...) in [0, 1). One number decides a token, so a rollout depends on its
    own numbers alone, not on its batch.

    >>> choose(torch.tensor([[0.5, 0.0, 0.5]] * 2).log(), torch.tensor([0.49, 0.51])).tolist()
    [0, 2]
    """
    if uniform is None:
        return logp.argmax(-1)
    # The first token at which the cumulated probability exceeds the number.
    cumulated = logp.exp().cumsum(-1)
    # Times the last value: rounding may leave the sum a little off 1.
    place = torch.searchsorted(cumulated, (uniform * cumulated[..., -1])[..., None], right=True).squeeze(-1)
    return place.clamp(max=logp.shape[-1] - 1)
