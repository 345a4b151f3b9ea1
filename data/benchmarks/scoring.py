"""Scores: the letter in a response, by each benchmark's rule and by ours; scores of descriptions; intervals and tests.

A rule for multiple choice returns the letters that it takes a response for: one, none (""), or, if it is careless,
several. A response is right when the right letter is among them. The official rules, faults included, give published
figures again; each says where it was read. `read_letter` is ours.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from data.video import Clip
from data.words import SENTENCE_END, fold, names, split_words

LETTERS = string.ascii_uppercase


# --- Our rules ----------------------------------------------------------------------------------------------------------

# Tags around a thought: <think>, <thinking>, <reasoning>, [THINK], ◁think▷ and the like.
THOUGHT = r"(?:think|thinking|thoughts?|reason|reasoning|reflection|analysis|scratchpad)"
OPENING, CLOSING = (rf"(?i:[<◁]{slash}{THOUGHT}\s*[>▷]|\[{slash}think\])" for slash in ("", "/"))
# After "A", these words tell the letter from the article, and after "I" from the pronoun.
NO_NOUN = "is|was|because|since|as|and|or|but|with|in|if|for|based|given|seems|fits|matches|than|over|to|not|rather"
ARTICLE = rf"(?!(?<=A) +(?!(?:{NO_NOUN})\b)(?:[A-Za-zÀ-ɏ]\w|\d))"
PRONOUN = r"(?!(?<=I) +(?!(?:is|because|since|fits|matches)\b)[A-Za-z])"
LETTER = rf"(?<![\w'’.-])[A-Z](?![\w'’-]){ARTICLE}{PRONOUN}"
WRONG = r"(?! +(?:(?:is|are|was) +(?:wrong|incorrect|false|not)\b|不|错|錯|は(?:違|間違|誤)))"
NOT = r"(?<!\b[Nn][Oo][Tt] )(?<!n't )(?<!不是 )(?<!不选 )(?<!不選 )"
OR = r"(?:,|/|&|、|and|or|和|与|及|或|と|や|와|과|또는|или|и|oder|und|ou|et|o|y|e)"
OPTION = r"(?i:the |option|choice|letter|选项|選項)"
ENGLISH_ANSWER = (
    r"(?i:\banswer(?: choice| option)?|\b(?:best|correct|right) (?:option|choice))"
    r"(?i: (?:is|should be|would be|must be))?"
)
WESTERN_ANSWER = r"(?i:\b(?:respuesta|réponse|antwort|risposta|resposta|antwoord|jawaban|cevap)\b)[^A-Z\n.;]{0,20}?"
OTHER_ANSWER = (
    r"(?:答案|选择|選擇|选(?!项)|選(?!項|択肢)|正解|正答|答え|정답|답은|คำตอบ|उत्तर|الجواب|الإجابة|(?i:\bответ\b))"
    r"[^A-Za-z\d\n.;。不非]{0,12}?"
)
ANSWER = rf"(?:{ENGLISH_ANSWER}|{WESTERN_ANSWER}|{OTHER_ANSWER})[\s:=]*(?:{OPTION}[\s:]*)*"
# Scripts that put no space beside a letter: 选B; and what may follow one that is an answer: B是对的, not A车 (car A).
NO_SPACES = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
AFTER_LETTER = (
    "(?:是|因|对|對|正|选|選|项|項|吧|和|与|或|及|都|两|兩|均|不|错|錯|更|最|符"
    "|で|が|だ|を|と|や|は|입|이|가|은|는|번|를|을|와|과|또)"
)


def plain(response: str) -> str:
    """A response without its thoughts and Markdown's marks, full-width letters made ordinary ones.

    A thought that has only its end began in the prompt; one that has no end was cut off, and no answer follows it.
    """
    behind = re.split(OPENING, re.split(CLOSING, response)[-1])[0]
    if not behind.strip():  # what comes before or between thoughts
        around = re.sub(rf"{OPENING}(?:(?!{OPENING}).)*?{CLOSING}", " ", response, flags=re.S)
        behind = re.split(OPENING, re.split(CLOSING, around)[-1])[0]
    return re.sub(r"[*_`#]+", "", unicodedata.normalize("NFKC", behind)).strip()


def folded(text: str) -> str:
    """A text for comparison: case, blanks and a full stop at the end do not count."""
    return " ".join(fold(text).split()).rstrip(".。")


def read_letter(response: str, options: Sequence[str] = (), labels: Sequence[str] = ()) -> str:
    """The letter that a response gives, or "" if it gives none: ours, the same strict rule for all benchmarks.

    options: their texts (none known: A to F may be given); labels: what the question calls them, where not by letters, like
    "Option 1". The first of these that holds: the response is a letter; it is the text or label of an option (of equal
    options, the first); it holds one of the labels; it announces its answer ("The answer is (B)", the last time it does);
    it begins with a letter and a mark; it has a capital letter by itself. "A" before a noun is no letter, and what
    is said in "A and B", "not A", "A is wrong" does not count.

    >>> [read_letter(r, "wxyz") for r in ("(b) foo", "A person runs, so B", "Both A and B; final answer: D", "A or B")]
    ['B', 'B', 'D', '']
    """
    letters = LETTERS[: len(options) or 6]
    text = plain(response)
    if alone := re.fullmatch(r"\W*([A-Za-z])\W*", text):
        return alone[1].upper() if alone[1].upper() in letters else ""
    for letter, known in (*zip(letters, labels), *zip(letters, options)):
        if folded(known) == folded(text):
            return letter
    named = [
        letter
        for letter, label in zip(letters, labels)
        if re.search(rf"(?i)(?<![a-z\d]){re.escape(label)}(?![a-z\d])", text)
    ]
    if len(named) == 1:
        return named[0]
    text = re.sub(rf"(?<={NO_SPACES})(?=[A-Za-z(])|(?<=[A-Za-z)])(?={AFTER_LETTER})", " ", text)
    text = re.sub(rf"{LETTER}[)\]]?(?:\s*{OR}\s*[(\[]?[A-Z](?![\w'’-])[)\]]?)+", " ", text)
    announced = re.findall(rf"{ANSWER}[(\[\"']*({LETTER}{WRONG}|(?<![^\W\d_])[a-z](?=[)\]]|\W*$))", text)
    announced += re.findall(r"(?:\\boxed\{\s*(?:\\\w+\{)?|<answer>)\s*\(?([A-Za-z])\b", text)
    behind = rf"(?=[)\].,:;\"']|\s*$| (?:{NO_NOUN})\b){WRONG}"
    called = set(re.findall(rf"(?i:\b(?:option|choice)) *[(\[\"':]*([a-z]){behind}", text))  # "option b"
    listed = set(re.findall(r"(?:^|\s)\(?([A-Z])[).:、]", text))
    if announced:
        found = announced[-1:]
    elif len(letters) > 2 and listed >= set(letters):  # it only repeats the options
        found = []
    else:
        found = re.findall(r"^\W*([A-Z](?=\s*[)\].:、])|[a-z](?=\s*[)\].:、](?:\s|$)))", text)
        found += re.findall(rf"{NOT}{LETTER}{WRONG}", text) or (list(called) if len(called) == 1 else [])
    return next((letter.upper() for letter in found if letter.upper() in letters), "")


def read_yes_no(response: str) -> str:
    """ "yes", "no" or "": what a response begins with, else what it announces, else the only one of the two words in it.

    >>> [read_yes_no(r) for r in ("Yes, it is.", "**No**", "The answer is yes", "Not sure", "yes and no")]
    ['yes', 'no', 'yes', '', '']
    """
    text = plain(response).lower()
    words = (
        re.findall(r"^\W*(yes|no)(?=\s*[,.;:!\n]|\W*$)", text) or re.findall(rf"{ANSWER}[^\w\s:=]?(yes|no)\b", text)[-1:]
    )
    words = set(words or re.findall(r"\b(yes|no)\b", text))
    return words.pop() if len(words) == 1 else ""


# --- Official rules -----------------------------------------------------------------------------------------------------


def official_vru_accident(response: str) -> str:
    """First of A to D by itself in the last line, else after "Answer:".

    Kimyounggun99/VRU-Accident, utils/utils.py: what it does for Qwen models.
    """
    line = response.split("\n")[-1]
    found = re.search(r"\b[A-D]\b", line)
    return found[0] if found else "".join(re.findall(r"Answer:\s*\(?([A-D])\)?", line)[:1])


def official_motionbench(response: str) -> str:
    """First character of the first word, after a bracket if there is one; not always a letter.

    THUDM/MotionBench, motionbench/utils/answer_util.py.
    """
    text = response.strip().split(")")[0].strip()
    if "(" in text:
        text = text.split("(")[1].strip()
    return text.split(" ")[0][:1]


def official_mvbench(response: str, count: int) -> str:
    """Of `count` letters those for which the first word of "(" + response is part of "(a)", or "(a)" part of it.

    OpenGVLab/Ask-Anything, video_chat2/mvbench.ipynb, and daniel-cores/tvbench, vqa_dataset.py. The response continues
    "Best option:(". An empty one is part of every letter, and so always right.
    """
    word = ("(" + response.strip().split("\n")[0]).lower().split(" ")[0]
    labels = [f"({letter.lower()})" for letter in LETTERS[:count]]
    return "".join(LETTERS[i] for i, label in enumerate(labels) if word.replace(".", "") in label or label in word)


def official_video_mme(response: str) -> str:
    """First of the characters A to D, be it in a word, when some beginnings are taken away.

    thanku-all/parse_answer, eval_your_results.py, read in two copies. Two of its beginnings are joined by a missing comma.
    """
    text = response.strip()
    for beginning in ("The best answer is", "The correct answer is", "The answer is", "The answer",
                      "The best option isThe correct option is", "Best answer:Best option:"):  # fmt: skip
        text = text.replace(beginning, "")
    return "".join(re.findall("[ABCD]", text)[:1])


def official_tempcompass(response: str, kind: str, options: Sequence[str] = (), labels: Sequence[str] = ()) -> str:
    """The letter, or "yes" or "no", by the hand-made rules; "" if its authors would ask GPT.

    llyx97/TempCompass as of commit c2ec41e: eval_multi-choice.py, eval_yes_no.py, eval_caption_matching.py, with
    --disable_llm. A response that is the whole right answer is right, too: see `questions.read_answer`.
    """
    text = response.replace("</s>", "").strip()
    if kind == "yes_no":
        return next((word for word in ("yes", "no") if text.lower().startswith(word)), "")
    if kind == "multi-choice":
        return text[0] if text in tuple("ABCD") or re.match(r"[A-D][.)]", text) else ""
    # Of each option: as it is, its sentence up to a second colon, its label, and the label's letter or number.
    forms = [(f"{label}: {o}", o.split(": ")[0], label, label.split()[-1]) for label, o in zip(labels, options)]
    said = {text, text.split(") ")[1] if ") " in text else text}
    undotted = {text, text.replace(".", "")}
    accepted = ({text}, said, undotted, undotted)
    found = [form[i] for i in range(4) for form in forms if form[i] in accepted[i]]
    return "".join(letter for letter, form in zip(LETTERS, forms) if found and found[-1] in form)


# --- Descriptions -------------------------------------------------------------------------------------------------------


def similarity(reference: str, text: str) -> float:
    """ROUGE-L F1 of a description against a reference."""
    return rouge_scorer(any_script=True).score(reference, text)["rougeL"].fmeasure


def score_description(clip: Clip, text: str, actions: set[str], of_twin: bool = False) -> dict[str, float]:
    """Every score of one description, each in [0, 1]; those whose truth the clip does not have are left out.

    actions: all events of the data set. An event is named when it is, and no other is. Where none is shown, in a twin or
    in a clip without an event, it is claimed when any is named.
    """
    scores = {"caption similarity": similarity(clip.caption, text)}
    if clip.keywords:
        scores["keyword recall"] = sum(names(k, text) for k in clip.keywords) / len(clip.keywords)
        if of_twin:
            scores["keyword claimed"] = scores["keyword recall"]
    if clip.truth:
        truth, said = clip.truth, {action for action in actions if names(action, text)}
        sentences = re.split(SENTENCE_END, text.strip())
        of_event = [any(names(action, sentence) for action in said) for sentence in sentences]
        shows_event = "action" in truth and not of_twin
        if "action" in truth:
            scores["event named"] = float(said == {truth["action"]})
            if truth.get("kind") in ("usual", "rare"):
                scores[f"{truth['kind']} event named"] = scores["event named"]
            acts = [names(truth["actor"], sentence) for sentence, event in zip(sentences, of_event) if event]
            scores["actor right"] = float(any(acts))
        if not shows_event:
            scores["event claimed"] = float(bool(said))
        right = clip.caption if shows_event or "action" not in truth else truth["static"]
        scores["whole caption right"] = float(folded(text) == folded(right))
        static = [sentence for sentence, event in zip(sentences, of_event) if not event]
        scores["static part"] = similarity(truth["static"], " ".join(static))
    return scores


def rouge_scores(reference: str, text: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L F1 with stemming, as VRU-Accident's authors take them (utils/evaluation.py)."""
    scores = rouge_scorer(any_script=False).score(reference, text)
    return {f"ROUGE-{name[5:]}": score.fmeasure for name, score in scores.items()}


@cache
def rouge_scorer(any_script: bool):
    """rouge-score's RougeScorer with stemming: for texts in any script, or as VRU-Accident's authors take it.

    Its own tokenizer knows no letters but a to z; for ASCII texts ours gives the same tokens.
    """
    # Late: NLTK and what it needs are a second of imports, which a run can spend when it evaluates.
    from nltk.stem.porter import PorterStemmer
    from rouge_score.rouge_scorer import RougeScorer

    class WordsOfAnyScript:
        stemmer = PorterStemmer()

        def tokenize(self, text: str) -> list[str]:
            """Stems of words; shorter than four letters, words."""
            return [self.stemmer.stem(word) if len(word) > 3 else word for word in split_words(text)]

    if any_script:
        return RougeScorer(["rougeL"], tokenizer=WordsOfAnyScript())
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def meteor_scorer() -> tuple[Callable[[str, str], float] | None, str]:
    """METEOR of a description against a reference, tokens as VRU-Accident's authors make them (utils/evaluation.py).

    None, and the reason, if NLTK's data are missing or incomplete: its WordNet and its sentence splitter are downloads.
    """
    import nltk
    from nltk.translate.meteor_score import meteor_score

    def tokens(text: str) -> list[str]:
        return [word for word in nltk.word_tokenize(text) if word not in string.punctuation]

    def meteor(reference: str, text: str) -> float:
        return float(meteor_score([tokens(reference)], tokens(text), wordnet=nltk.corpus.wordnet))

    try:
        nltk.corpus.wordnet.ensure_loaded()
        meteor("Dogs quickly ate good food.", "The hounds ran well. It was fine.")  # looks words of each kind up
    except Exception as error:  # what is raised depends on which of the files is missing or broken
        return None, " ".join(f"{type(error).__name__}: {error}".replace("*", "").split())[:160]
    return meteor, ""


def event_recall(encoder, events: Sequence[Sequence[str]], texts: Sequence[str]) -> list[float]:
    """How well each text's sentences cover its events, in [0, 1]: no judge, and not comparable with what a judge says.

    encoder: a `data.texts.TextEncoder`. An event counts as far as the sentence that covers it best: the mean over the
    event's tokens of their largest cosine to a token of the sentence (below 0: 0). The mean over events is taken.
    """
    sentences = [[s for s in re.split(SENTENCE_END, text.strip()) if s] for text in texts]
    flat = [s for group in (*events, *sentences) for s in group]
    embedded = dict(zip(flat, encoder(flat)))

    def covered(event: str, sentence: str) -> float:
        e, s = (F.normalize(embedded[text].embeddings.float(), dim=-1) for text in (event, sentence))
        return float((e @ s.T).clamp(min=0).amax(1).mean()) if len(e) and len(s) else 0.0

    means = (
        np.mean([max((covered(e, s) for s in group), default=0.0) for e in es]) for es, group in zip(events, sentences)
    )
    with torch.inference_mode():
        return [min(1.0, float(m)) for m in means]


# --- Intervals and tests ------------------------------------------------------------------------------------------------


def intervals(sums: np.ndarray, counts: np.ndarray, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """95 percent intervals of means, by a bootstrap over videos: (2, C), low and high.

    sums, counts (V, C): for each video and score the sum of its questions' scores, and their number. Whole videos are
    drawn, since the questions of a video are not independent. NaN where fewer than two videos have the score.
    """
    rng, V = np.random.default_rng(seed), len(sums)
    both, means = np.concatenate([sums, counts], 1).astype(float), []
    for begin in range(0, resamples, 256):
        draws = rng.multinomial(V, np.full(V, 1 / V), min(256, resamples - begin)).astype(float)  # (R, V)
        drawn_sums, drawn_counts = np.split(draws @ both, 2, 1)
        means.append(np.divide(drawn_sums, drawn_counts, np.full_like(drawn_sums, np.nan), where=drawn_counts > 0))
    out = np.full((2, sums.shape[1]), np.nan)
    enough = (counts > 0).sum(0) > 1
    out[:, enough] = np.nanquantile(np.concatenate(means)[:, enough], [0.025, 0.975], axis=0)
    return out


def permutation_test(differences: Sequence[float], draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of summed differences, one a video, under random exchange of the two models on whole videos.

    Exact for up to 15 videos that differ, else from seeded draws. McNemar's test would take the questions of a video as
    independent, and knows only right and wrong; this knows neither limit.
    """
    from scipy import stats  # late: half a second of imports

    d = np.asarray([x for x in differences if abs(x) > 1e-12], float)
    if len(d) < 2:  # both ways of exchanging one video differ as much
        return 1.0
    num = 2**15 if len(d) <= 15 else draws
    # An exchange turns the sign of a video's difference: what scipy does with a single sample.
    tested = stats.permutation_test(
        (d,), np.sum, permutation_type="samples", vectorized=True, n_resamples=num, batch=500,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(tested.pvalue)
