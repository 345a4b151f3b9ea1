"""Which verbs of a sentence name something that did not happen: denied, almost done, wanted, asked for, only supposed.

A verb is denied by its own words ("does not jump", "nobody jumps", "if he jumps"), or by the word that
governs it ("refuses to jump", "without jumping", "on the verge of jumping"). Verbs joined by "and" or "or"
share what stands before both. An attempt can be seen, so "tries to jump" is no denial. Tokens are those of
spaCy's English models.
"""

from collections.abc import Iterable


def words(text: str) -> frozenset[str]:
    """A set of words."""
    return frozenset(text.split())


DENIALS = words("""
    not never neither nor hardly scarcely rarely seldom almost nearly practically virtually
    maybe perhaps possibly probably presumably supposedly allegedly potentially
""")
MODALS = words("can could will would shall should may might must ought")
NOBODY = words("nobody none nothing neither nowhere noone")
HYPOTHETICAL = words("if unless whether lest")
PERCEPTION = words("see watch notice hear observe spot find feel realize realise know show view depict capture film catch")
# "Fails to jump" says that he does not; "does not fail to jump" that he does.
FAIL = words("fail refuse hesitate forget neglect decline omit avoid escape resist")
PREVENT = words(
    "prevent stop keep save rescue protect block ban deter refrain discourage prohibit hold hinder restrain shield"
)
UNREAL = words("""
    want wish hope plan intend mean need expect prepare pretend threaten promise offer decide choose agree vow swear
    propose suggest recommend consider contemplate imagine dream think believe say claim doubt deny fear wonder ask tell
    order instruct command urge invite encourage beg advise warn remind request require forbid demand challenge wait
    long yearn aim seek desire prefer like love hate fake mime mimic imitate simulate feign suppose tempt
""")
UNREAL_ADJECTIVES = words("""
    about unable ready set poised likely unlikely afraid scared eager reluctant unwilling willing hesitant determined
    supposed due bound prepared keen anxious impossible incapable capable tempted desperate close near short
""")
UNREAL_NOUNS = words("""
    attempt effort plan threat refusal failure inability chance opportunity desire urge need intention order request
    warning risk danger verge brink edge fear hope thought idea possibility case invitation permission wish turn
""")
OCCASIONS = words("time point moment way circumstance condition account means mean")
HALT = words("stop halt brake pause")  # "stops before hitting the wall"
FINITE = words("VBZ VBP VBD NNS")  # NNS: what the small model takes "jumps" for


def is_denial(token) -> bool:
    """Whether a token denies what follows it; "not only" and "not just" do not."""
    following = token.nbor(1).lower_ if token.i + 1 < len(token.doc) else ""
    return token.norm_ in DENIALS and following not in ("only", "just", "merely", "simply")


def is_nobody(noun) -> bool:
    """Whether a noun stands for nobody or nothing: "no one", "neither car", "none of them", "not a single car"."""
    behind = noun.nbor(1).lower_ if noun.i + 1 < len(noun.doc) else ""
    if behind in ("but", "except"):  # nothing but a leaf falls
        return False
    before = [c for c in noun.children if c.i < noun.i]
    if noun.lower_ in NOBODY or any(c.lower_ in ("neither", "not", "hardly", "scarcely") for c in before):
        return True
    determiners = [c for c in before if c.dep_ in ("det", "neg")]
    only_no = len(determiners) == 1 and determiners[0].lower_ == "no"  # "a no parking sign" has another
    return (only_no and determiners[0].nbor(1).pos_ != "NUM") or (
        noun.lower_ == "one" and noun.i > 0 and noun.nbor(-1).lower_ == "no"
    )


def is_denying_phrase(preposition) -> bool:
    """Whether a phrase denies the verb that it belongs to: "at no point", "in no way", "into nobody"; not "in no time"."""
    word, verb = preposition.lower_, preposition.head
    for noun in preposition.children:
        if noun.dep_ != "pobj" or not is_nobody(noun):
            continue
        if noun.lemma_ in OCCASIONS and (word, noun.lower_) != ("in", "time"):
            return True
        if (
            preposition.i > verb.i
            and word in ("into", "onto", "at", "on", "against", "by")
            and (noun.lower_ in NOBODY or noun.lower_ == "one")
        ):
            return True
    return False


def has_nobody(verb, roles: Iterable[str]) -> bool:
    """Whether nobody stands in one of these roles of a verb."""
    return any(c.dep_ in roles and is_nobody(c) for c in verb.children)


def is_hypothetical(verb) -> bool:
    """Whether a clause begins with "if" or its like, or depends on one that does: "if he jumps, he falls"."""

    def opening(v) -> set[str]:
        return {c.lower_ for c in v.children if c.dep_ in ("mark", "advmod") and c.i < v.i}

    if opening(verb) & HYPOTHETICAL or {"as", "though"} <= opening(verb):
        return True
    subject = next((c for c in verb.children if c.dep_ in ("nsubj", "nsubjpass")), None)
    if verb.dep_ == "advcl" and subject and any(c.lower_ == "had" and c.i < subject.i for c in verb.children):
        return True  # had he jumped, ...
    conditions = [opening(c) for c in verb.children if c.dep_ == "advcl"]
    return any(words & HYPOTHETICAL and "as" not in words for words in conditions)  # not: he runs as if he fell


def is_negated(verb) -> bool:
    """Whether a verb's own words deny it: an adverb before it, a modal verb, nobody as its subject or object."""
    for c in verb.children:
        if c.dep_ == "aux" and c.norm_ in MODALS | {"ca", "wo", "'ll", "’ll"}:
            return True
        before = [c, *c.children] if c.dep_ in ("aux", "auxpass") else [c]  # rarely does it stop
        if any((t.i < verb.i or verb.lemma_ in ("be", "do")) and is_denial(t) and t.dep_ != "cc" for t in before):
            return True
        if c.lower_ in ("longer", "more") and c.i > 0 and c.nbor(-1).lower_ == "no" and c.dep_ == "advmod":
            return True
        if c.dep_ in ("prep", "agent") and is_denying_phrase(c):
            return True
        if c.lower_ in ("close", "near") and verb.lemma_ == "come" and any(x.dep_ == "prep" for x in c.children):
            return True
    if verb.i and is_denial(verb.nbor(-1)) and verb.nbor(-1).dep_ != "cc":
        return True
    return has_nobody(verb, ("nsubj", "nsubjpass", "dobj", "expl"))


def is_infinitive(verb) -> bool:
    """Whether "to" belongs to a verb."""
    return any(c.dep_ == "aux" and c.lower_ in ("to", "na") for c in verb.children)


def is_governed_away(verb, steps: int) -> bool:
    """Whether the word that governs a verb says that it did not happen, or only might."""
    head, dep = verb.head, verb.dep_
    if head == verb:
        return False
    if head.pos_ in ("ADP", "SCONJ") and dep in ("pcomp", "pobj", "advcl"):
        return is_preposition_unreal(head, steps)
    if dep in ("acl", "relcl"):
        there_is_not = head.dep_ in ("attr", "nsubj") and head.head.lemma_ == "be" and is_negated(head.head)
        unreal = head.lower_ in UNREAL_NOUNS and dep == "acl" and is_infinitive(verb)
        return is_nobody(head) or unreal or there_is_not or head.lower_ == "case"  # in case it falls
    if dep == "advcl" and any(c.dep_ == "mark" and c.lower_ == "before" for c in verb.children):
        return head.lemma_ in HALT
    if dep == "advcl" and any(c.lower_ == "than" for c in verb.children):
        return any(c.lower_ == "rather" for c in (*verb.children, *head.children))
    if dep not in ("xcomp", "ccomp") and not (dep == "advcl" and is_infinitive(verb)):
        return False
    if dep == "ccomp" and verb.i < head.i:
        return False  # two sentences with a comma between: one dog barks, the other does not
    if head.pos_ in ("ADJ", "ADP", "ADV", "SCONJ"):
        too = any(c.lower_ == "too" for c in head.children)
        return head.lower_ in UNREAL_ADJECTIVES or too or (head.dep_ == "acomp" and did_not_happen(head.head, steps - 1))
    lemma = head.lemma_.lower()
    if lemma in PERCEPTION:
        return False
    if lemma in FAIL:
        return not is_negated(head)
    if lemma in UNREAL:
        return True
    if is_infinitive(verb) and verb.i > head.i:
        is_future = lemma in ("go", "gon") and head.tag_ == "VBG" and any(c.dep_ == "aux" for c in head.children)
        has_to = lemma in ("have", "be", "get") and dep == "xcomp" and not has_object(head)
        used_to = lemma == "use" and not has_object(head) and not any(c.dep_ == "auxpass" for c in head.children)
        if is_future or has_to or used_to:
            return True
    if any(c.dep_ in ("acomp", "advmod") and c.lower_ in ("ready", "close", "set") for c in head.children):
        return True
    if lemma in ("stop", "quit", "cease") and is_negated(head):
        return False  # he goes on
    return did_not_happen(head, steps - 1)


def has_object(verb) -> bool:
    """Whether a verb has an object."""
    return any(c.dep_ == "dobj" for c in verb.children)


def is_preposition_unreal(preposition, steps: int) -> bool:
    """Whether what follows a preposition did not happen: "without", "instead of", "prevents from", "verge of"."""
    word, head = preposition.lower_, preposition.head
    before = preposition.nbor(-1).lower_ if preposition.i else ""
    if word in ("without", "against") or before == "instead" or (word == "than" and before in ("rather", "other")):
        return True
    if word == "from":
        return head.lemma_ in PREVENT and not is_negated(head)
    if word == "before":
        return head.lemma_ in HALT
    if head.lower_ in UNREAL_NOUNS | UNREAL_ADJECTIVES or head.lemma_ in UNREAL:
        return True
    if head.lemma_ in FAIL:
        return not is_negated(head)
    return head.pos_ == "VERB" and word in ("in", "at", "of") and did_not_happen(head, steps - 1)


def shares_denial(verb, steps: int) -> bool:
    """Whether a verb that is joined to another one ("does not jump or run") did not happen because that one did not."""
    if steps == 0:
        return False
    head = verb.head
    joints = [c.lower_ for c in (*head.children, *verb.children) if c.dep_ == "cc" and head.i < c.i]
    joint = joints[0] if joints else ""
    if is_hypothetical(head) or ("nor" in joints and verb.i > head.i and joint != "but"):
        return True
    subject = any(c.dep_ in ("nsubj", "nsubjpass") for c in verb.children)
    auxiliary = any(c.dep_ in ("aux", "auxpass") and c.lower_ != "to" for c in verb.children)
    if joint in ("but", "yet") or subject or auxiliary:
        return False
    if verb.tag_ not in FINITE:
        return verb.tag_ == head.tag_ and did_not_happen(head, steps - 1)
    if head.tag_ not in FINITE:
        return False
    almost = any(c.lower_ in ("almost", "nearly") for c in head.children) and verb.doc[verb.i - 1].lower_ == "and"
    if joint == "or" or (almost and verb.lemma_ == "fall"):  # almost slips and falls
        return did_not_happen(head, steps - 1)
    return has_nobody(head, ("nsubj", "nsubjpass")) or (head.dep_ == "conj" and shares_denial(head, steps - 1))


def did_not_happen(verb, steps: int = 8) -> bool:
    """Whether a sentence denies what one of its verbs names, or leaves open whether it happened.

    steps: how many words up the sentence are looked at; more are met only in text that is no sentence.
    """
    if is_negated(verb) or is_hypothetical(verb):
        return True
    if steps == 0:
        return False
    if verb.dep_ == "conj" and verb.head != verb:
        return shares_denial(verb, steps)
    return is_governed_away(verb, steps)


def is_question(sentence) -> bool:
    """Whether a sentence asks, and so says nothing."""
    return any(token.text == "?" for token in sentence)
