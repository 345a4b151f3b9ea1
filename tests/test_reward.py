"""The reward, equations (2) to (4): against loops by hand, and against every trick that a policy could try."""

import math
import unicodedata

import pytest
import torch

import vp
from data.texts import Comparison, TextEncoder, embed_texts
from data.tiny import build_text_encoder
from data.world import ACTIONS

CAPTION = "A blue cross, a purple square. Something turns black: the yellow square."
KEYWORDS = ["turns black"]
TWIN = [CAPTION.replace("turns black", a) for a in ("fades", "turns striped", "swells up", "shoots a beam")]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> TextEncoder:
    """The world's text encoder."""
    return TextEncoder(build_text_encoder(tmp_path_factory.mktemp("text") / "encoder"))


def grade(encoder, texts: list[str], kind: str = "relative") -> tuple[torch.Tensor, ...]:
    """q, c, w and r of descriptions whose twins' rollouts name four wrong actions."""
    n = len(texts)
    scored = vp.paired_rewards(embed_texts(encoder, [Comparison(texts + TWIN, CAPTION, KEYWORDS, n, len(TWIN))]))[0]
    q, c = scored.quality, scored.keyword_recall
    w = vp.relative_wins(q[:n], c[:n], q[n:], c[n:])
    r, _ = vp.rewards_and_advantages(kind, q[:n], c[:n], q[n:], c[n:])
    return q[:n], c[:n], w, r


def test_encoder_likes_equal_words_best(encoder):
    """1 for the same word, 0.3 for words of a kind, 0 for others; case and punctuation do not count."""
    red, RED, blue, circle, unknown = (e.embeddings for e in encoder(["red", "RED!", "blue", "circle", "xyzzy"]))
    for other, want in ((RED, 1.0), (blue, 0.3), (circle, 0.0), (unknown, 0.0)):
        assert torch.cosine_similarity(red, other).item() == pytest.approx(want, abs=0.02)
    assert torch.cosine_similarity(unknown, unknown).item() == pytest.approx(
        0, abs=0.02
    )  # words nobody knows match nothing
    assert [len(e.tokens) for e in encoder(["", " .,: ", "a red circle"])] == [0, 0, 3]


def test_encoder_of_a_data_set_knows_its_words(tmp_path):
    """Built from captions, few or many: equal words are alike and no others."""
    for count in (20, 900):
        texts = [f"Word{i} and number{i}" for i in range(count)]
        encoder = TextEncoder(build_text_encoder(tmp_path / str(count), texts))
        a, b, c, d = (e.embeddings for e in encoder(["word7", "WORD7", "number7", "nowhere"]))
        for other, want in ((b, 1.0), (c, 0.0), (d, 0.0)):
            assert torch.cosine_similarity(a, other).item() == pytest.approx(want, abs=0.2 if count == 900 else 0.02)


def test_encoder_of_a_data_set_reads_any_script(tmp_path):
    """A caption said word for word has quality and recall 1, in capitals and with accents written apart as well."""
    captions = ["一个男人从墙上跳下来。", "男がコーヒーをこぼした。", "ผู้ชายกระโดดลงจากกำแพง", "Мужчина прыгает.",
                "رجل يقفز.", "एक आदमी कूदता है।", "한 남자가 뛰어내린다.", "Ένας σοφός άντρας.", "Die Straße.", "Él saltó.",
                "🏃💥", "A man 跳下 [PAD] [UNK] <|im_end|>"]  # fmt: skip
    encoder = TextEncoder(build_text_encoder(tmp_path / "encoder", captions))
    said = [[c, c.upper(), unicodedata.normalize("NFD", c), "xyzzy"] for c in captions]
    embedded = embed_texts(encoder, [Comparison(texts, c, [c], 4) for texts, c in zip(said, captions)])
    for rewards in vp.paired_rewards(embedded, "recall"):
        for score in (rewards.quality, rewards.keyword_recall):
            assert score.tolist() == pytest.approx([1, 1, 1, 0], abs=0.02)
    whole, part = encoder(["कूदता", "कूदत"])
    assert len(whole.tokens) == len(part.tokens) == 1 and whole.tokens != part.tokens  # vowel signs belong to the word


def test_encoder_is_an_ordinary_sentence_transformer(encoder, tmp_path):
    """safetensors, loadable by the library alone, sentence embeddings too."""
    from sentence_transformers import SentenceTransformer

    folder = build_text_encoder(tmp_path / "encoder")
    assert (folder / "model.safetensors").exists() and not list(folder.glob("*.bin"))
    assert SentenceTransformer(str(folder), device="cpu").encode(["a red circle"]).shape == (1, 64)


@pytest.mark.parametrize("seed", range(4))
def test_scores_against_a_loop(seed):
    """q and c of ragged random rollouts equal those of the definition, token by token, in Python floats."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (5,), generator=g).tolist()
    rollouts = [torch.randn(n, 6, generator=g) for n in sizes]
    weights = [torch.randint(0, 2, (n,), generator=g).float() for n in sizes]
    reference, keywords = torch.randn(7, 6, generator=g), [torch.randn(n, 6, generator=g) for n in (1, 3)]

    def cosine(a, b):
        a, b = a.tolist(), b.tolist()
        dot = sum(x * y for x, y in zip(a, b))
        return max(0.0, dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b)))

    reference_weights = torch.randint(0, 2, (5, 7), generator=g).float()
    q, c = vp.score_rollouts(rollouts, weights, reference, reference_weights, keywords)
    for i, (y, w, v) in enumerate(zip(rollouts, weights, reference_weights)):
        precision = sum(float(k) * max(cosine(a, b) for b in reference) for a, k in zip(y, w)) / len(y)
        recall = sum(float(k) * max(cosine(a, b) for a in y) for k, b in zip(v, reference)) / len(reference)
        assert q[i].item() == pytest.approx(2 * precision * recall / (precision + recall + 1e-12), abs=1e-5)
        coverage = [sum(max(cosine(a, b) for a in y) for b in k) / len(k) for k in keywords]
        assert c[i].item() == pytest.approx(sum(coverage) / 2, abs=1e-5)


def test_empty_cases():
    """Empty rollouts, one-word references, no keywords, nothing at all: defined, and no NaN."""
    word = torch.eye(3)
    q, c = vp.score_rollouts([word[:0], word[:1]], [torch.ones(0), torch.ones(1)], word[:1], torch.ones(2, 1), [])
    assert q.tolist() == [0.0, 1.0] and c.tolist() == [0.0, 0.0]
    q, c = vp.score_rollouts([word[:0]] * 2, [torch.ones(0)] * 2, word, torch.ones(2, 3), [word[:1]])
    assert q.tolist() == c.tolist() == [0.0, 0.0]
    none = torch.zeros(0)
    assert vp.relative_wins(torch.ones(2), torch.ones(2), none, none).tolist() == [0.0, 0.0]


def test_the_right_description_is_best(encoder):
    """The caption itself earns everything; a slip in the static part costs a little; a wrong event costs the comparison."""
    slip, wrong = CAPTION.replace("purple", "red"), TWIN[0]
    q, c, w, r = grade(encoder, [CAPTION, slip, wrong])
    assert q[0] == pytest.approx(1, abs=1e-5) and c[0] == pytest.approx(1, abs=1e-5) and w.tolist() == [1.0, 1.0, 0.0]
    assert r[0] > r[1] > r[2] + 0.8


TRICKS = {
    "nothing": "",
    "punctuation": " .:, .",
    "the keyword alone": "Something turns black",
    "the keyword again and again": "turns black " * 10,
    "the caption with the keyword again and again": CAPTION + " turns black" * 8,
    "the caption twice": CAPTION + " " + CAPTION,
    "every action": CAPTION.replace("turns black", " ".join(ACTIONS)),
    "every action in sentences": CAPTION + "".join(f" Something {a}." for a in ACTIONS),
    "cut off before the event": CAPTION[:42],
    "words that nobody knows": CAPTION + " xyzzy plugh" * 6,
    "bytes": CAPTION.replace("blue cross", "\x00\xff " * 5),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_do_not_pay(encoder, trick):
    """Each earns clearly less than the right description, and the stuffed ones less than an honest wrong guess."""
    q, _, w, r = grade(encoder, [TRICKS[trick], CAPTION, TWIN[0]])
    assert r[0] < r[1] - 0.1
    if trick not in ("bytes",):  # there the event is right, and the rest half right
        assert w[0] == 0 and r[0] < r[2], (trick, q, w, r)


def test_naming_two_actions_earns_less_than_the_right_one(encoder):
    """A hedge is better than a wrong guess, as a person would say, and worse than the truth."""
    _, _, _, r = grade(encoder, [CAPTION, CAPTION.replace("black", "black and fades"), TWIN[1]])
    assert r[0] > r[1] > r[2]


def test_longer_cut_offs_earn_more(encoder):
    """A description that was cut off gets what it says: never less for going on rightly."""
    words = CAPTION.split()
    q, _, _, r = grade(encoder, [" ".join(words[:n]) for n in range(1, len(words) + 1)])
    assert (q.diff() > 0).all() and (r.diff() > 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_wins_against_a_loop(seed):
    """Equation (2), pair by pair."""
    g = torch.Generator().manual_seed(seed)
    q, c, q_twin, c_twin = torch.rand(5, generator=g), *(torch.rand(n, generator=g) for n in (5, 3, 3))
    want = [sum(c[i] > c_twin[j] + 0.2 and q[i] > q_twin[j] - 0.2 for j in range(3)) / 3 for i in range(5)]
    assert vp.relative_wins(q, c, q_twin, c_twin, 0.2).tolist() == pytest.approx([float(x) for x in want])


def test_a_constant_for_the_group_changes_nothing_but_the_comparison_does():
    """Design page 1: what is added to every rollout of a group is taken out by (4); the share of beaten twins is not."""
    q, c = torch.tensor([0.8, 0.9, 0.75]), torch.tensor([1.0, 0.2, 0.55])
    q_twin, c_twin = torch.tensor([0.8, 0.8]), torch.tensor([0.2, 0.5])
    _, plain = vp.rewards_and_advantages("similarity", q, c, q_twin, c_twin)
    _, shifted = vp.rewards_and_advantages("similarity", q + 0.3, c, q_twin, c_twin)
    torch.testing.assert_close(plain, shifted)
    r, relative = vp.rewards_and_advantages("relative", q, c, q_twin, c_twin)
    assert r.tolist() == pytest.approx([1.8, 0.9, 0.75 + 0.5]) and (relative - plain).abs().max() > 0.2
    for kind in ("similarity", "recall", "relative"):
        _, a = vp.rewards_and_advantages(kind, q, c, q_twin, c_twin, divide=True)
        assert a.mean().abs() < 1e-6 and a.std(correction=0) == pytest.approx(1, abs=1e-2)


def test_pooled_and_recall():
    """pooled takes its mean over full and twin; recall adds keyword recall; alpha scales the event's part."""
    q, c, q_twin, c_twin = (torch.tensor(x) for x in ([0.5, 0.7], [0.0, 1.0], [0.4, 0.4], [0.0, 0.2]))
    r, a = vp.rewards_and_advantages("pooled", q, c, q_twin, c_twin, alpha=0.5)
    assert r.tolist() == pytest.approx([0.5, 1.2])
    assert a.tolist() == pytest.approx([0.5 - 0.65, 1.2 - 0.65])  # mean of 0.5, 1.2, 0.4, 0.5
    r, a = vp.rewards_and_advantages("recall", q, c, q_twin, c_twin, alpha=2.0)
    assert r.tolist() == pytest.approx([0.5, 2.7]) and a.tolist() == pytest.approx([-1.1, 1.1])
    with pytest.raises(ValueError, match="choose one of similarity"):
        vp.rewards_and_advantages("best", q, c, q_twin, c_twin)


def test_equal_rewards_give_no_advantage():
    """No spread: zero advantages, also when divided by it, and no NaN."""
    same = torch.full((4,), 0.3)
    for divide in (False, True):
        _, a = vp.rewards_and_advantages("relative", same, same, same, same, divide=divide)
        assert a.abs().max() < 1e-6


@pytest.mark.parametrize("mark", ["[PAD]", "[UNK]"])
def test_special_tokens_in_a_caption_are_words(tmp_path, mark):
    """A caption that holds one is its words: the tokens around it are the same, and nothing of it is left out."""
    own = TextEncoder(build_text_encoder(tmp_path / "own", ["a man jumps pad unk"]))
    word = mark[1:-1].lower()
    marked, plain = own([f"A man {mark} jumps.", f"A man {word} jumps."])
    assert marked.tokens == plain.tokens and len(marked.tokens) == 4
    torch.testing.assert_close(marked.embeddings, plain.embeddings)
