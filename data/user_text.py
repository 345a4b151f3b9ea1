"""Text that is not ours is text: captions, prompts, questions and keywords never become special tokens.

A tokenizer takes "<|im_end|>" or "<|video_pad|>" for a special token wherever it finds one, and a processor
puts a video in its place. So that a caption may hold such a *mark* as what it is, characters:

    encode(tokenizer, text)                   # ids of a text of somebody else
    chat(processor, disarm(processor, text))  # in a prompt: marks get a seam, which nothing takes for a token
    encode_rendered(tokenizer, rendered)      # ids of the rendered prompt; process() in data/clips.py does the same

Ids of a text without a mark are those that the tokenizer gives by itself.
"""

import re
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

SEAM = "\ufdd0\ufdd1"  # code points that Unicode keeps out of all texts
STAND_IN = "Qz{}zQ"


@cache
def find_marks(tokenizer, *more: str) -> re.Pattern:
    """What finds the marks of a tokenizer in a text: its added tokens, but for those that are words or white space."""
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special or re.search(r"[<\[{|]", t.content)}
    marks = sorted((m for m in added.union(more) if m and m.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, marks)) or "(?!)")  # (?!) is found nowhere


def marks_of(processor) -> re.Pattern:
    """Those of a processor: its tokenizer's, and the words in whose place it puts pictures and sound."""
    words = (getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio"))
    return find_marks(processor.tokenizer, *(word for word in words if isinstance(word, str)))


def encode_plain(tokenizer, text: str) -> list[int]:
    """Ids of a text by the tokenizer's rules alone, as if it had no added tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # not one of the package tokenizers
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [text] if backend.pre_tokenizer is None else [w for w, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in backend.model.tokenize(word)]


def encode(tokenizer, text: str) -> list[int]:
    """Ids of a text of somebody else: whatever it holds is characters."""
    if find_marks(tokenizer).search(text):
        return encode_plain(tokenizer, text)
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # no warning: we count for ourselves


def disarm(processor, text: str) -> str:
    """A text to be put into a prompt: each of its marks is cut by a seam, so that nobody takes it for a token."""
    return marks_of(processor).sub(lambda mark: mark[0][0] + SEAM + mark[0][1:], text.replace(SEAM, ""))


def space_out(tokenizer, text: str) -> str:
    """The text with a space in each of its marks, for models whose input we cannot give as ids."""
    return find_marks(tokenizer).sub(lambda mark: f"{mark[0][0]} {mark[0][1:]}", text)


def pieces_of(marks: re.Pattern, rendered: str) -> list[str]:
    """A rendered prompt cut at the marks that the chat template wrote: what is between them, and they themselves."""
    return re.split(f"({marks.pattern})", rendered)


def encode_rendered(tokenizer, rendered: str) -> list[int]:
    """Ids of a rendered prompt, what is not ours in it as characters."""
    if SEAM not in rendered:
        return tokenizer(rendered).input_ids
    ids = []
    for piece in pieces_of(find_marks(tokenizer), rendered):
        if SEAM in piece:
            ids += encode_plain(tokenizer, piece.replace(SEAM, ""))
        else:
            ids += tokenizer(piece, add_special_tokens=False).input_ids
    return ids


def take_out(processor, rendered: str) -> tuple[str, list[str]]:
    """A rendered prompt with a stand-in, a plain word, for each of its pieces that has a seam; and those pieces."""
    pieces, taken = pieces_of(marks_of(processor), rendered), []
    for i, piece in enumerate(pieces):
        if SEAM in piece:
            pieces[i] = STAND_IN.format(len(taken))
            taken.append(piece.replace(SEAM, ""))
    return "".join(pieces), taken


def put_back(processor, inputs, taken: Sequence[Sequence[str]], padding_side: str = "right") -> None:
    """Put the ids of the pieces that were taken out of each prompt in place of their stand-ins, in what the processor made.

    inputs: input_ids (B, T), and more tensors of that shape, which are given a value for each new token.
    Raises ValueError if a stand-in is not found again.
    """
    tokenizer, shape, mask = processor.tokenizer, inputs["input_ids"].shape, inputs["attention_mask"].bool()
    names = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.shape == shape]
    rows = {name: [values[kept] for values, kept in zip(inputs[name], mask)] for name in names}
    for b, pieces in enumerate(taken):
        for i, piece in enumerate(pieces):
            stand_in, ids = tokenizer(STAND_IN.format(i), add_special_tokens=False).input_ids, rows["input_ids"][b].tolist()
            n = len(stand_in)
            at = next((k for k in range(len(ids) - n + 1) if ids[k : k + n] == stand_in), None)
            if at is None:
                raise ValueError(f"this model's tokenizer cannot take a special token of its own as text: {piece[:80]!r}")
            own = torch.tensor(encode_plain(tokenizer, piece), dtype=torch.long)
            for name in names:
                row = rows[name][b]
                middle = own if name == "input_ids" else row[at].expand(len(own))
                rows[name][b] = torch.cat([row[:at], middle, row[at + n :]])
    for name in names:
        pad = (tokenizer.pad_token_id or 0) if name == "input_ids" else 0
        inputs[name] = nn.utils.rnn.pad_sequence(rows[name], True, pad, padding_side)
