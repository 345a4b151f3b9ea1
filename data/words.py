"""Words of any script: what scores count, and what the built-in text encoder knows."""

import unicodedata

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
