"""Words of any script: what scores count, and what the built-in text encoder knows."""

import re
import unicodedata
from collections.abc import Sequence

import regex

# Scripts that put no spaces between words: a character, with the marks on it, counts as a word.
NO_SPACES = r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
# A word begins with a letter or a digit; vowel signs and accents belong to it. Emoji are words, too. The same pattern for
# Python's regex and for Rust's tokenizers (Oniguruma), whose \w are not alike.
WORD = (
    rf"(?=[\p{{L}}\p{{N}}]){NO_SPACES}\p{{M}}*"
    rf"|(?!{NO_SPACES})[\p{{L}}\p{{N}}](?:(?!{NO_SPACES})[\p{{L}}\p{{N}}\p{{M}}])*"
    r"|\p{Extended_Pictographic}|\p{Regional_Indicator}+"
)
SENTENCE_END = r"(?<=[.!?])\s+|(?<=[。！？｡।॥؟։።])\s*"


def fold(text: str) -> str:
    """A text for comparison: case, width and the way accents are written do not count.

    >>> fold("Cafe\\u0301 Ｂ") == fold("café B")
    True
    """
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def split_words(text: str) -> list[str]:
    """The words of a text, folded; characters where a script has no spaces.

    >>> split_words("The man's café, हिन्दी, 跳下")
    ['the', 'man', 's', 'café', 'हिन्दी', '跳', '下']
    """
    return regex.findall(WORD, fold(text))


def names(keyword: str, text: str) -> bool:
    """Whether a keyword stands in a text, word for word, whatever the case and punctuation; in scripts without spaces,
    character for character.

    >>> names("jumps up", "The red circle jumps up."), names("jumps up", "It jumps upward."), names("跳下", "他跳下墙。")
    (True, False, True)
    """
    words = [" " + " ".join(split_words(s)) + " " for s in (keyword, text)]
    return words[0].strip() != "" and words[0] in words[1]


def still_part(caption: str, keywords: Sequence[str]) -> str:
    """A caption without the sentences that name a keyword: what it says of the twin, too. May be empty.

    >>> still_part("A man stands by a wall. He jumps off it. It rains.", ["jumps off"])
    'A man stands by a wall. It rains.'
    """
    sentences = re.split(SENTENCE_END, caption.strip())
    return " ".join(s for s in sentences if not any(names(keyword, s) for keyword in keywords))
