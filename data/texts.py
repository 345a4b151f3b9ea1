"""Texts as token embeddings, for the reward: any sentence-transformers model, its special tokens left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import vp
from data.device import to_device
from data.user_text import space_out


@dataclass
class EmbeddedText:
    """tokens: ids (L,); embeddings (L, D)."""

    tokens: list[int]
    embeddings: Tensor


class TextEncoder:
    """Token embeddings of texts by a SentenceTransformer directory or hub name, each text embedded once a call."""

    def __init__(self, model: str | Path, device: str | torch.device = "cpu"):
        from sentence_transformers import SentenceTransformer  # late: seconds of imports

        try:
            self.model = SentenceTransformer(str(model), device=str(device), trust_remote_code=False).eval()
        except OSError as error:
            raise ValueError(f"--text-encoder {model}: {str(error).strip().splitlines()[0]}") from None
        self.model.tokenizer.split_special_tokens = True  # "[PAD]" in a text is text
        self.special = set(self.model.tokenizer.all_special_ids) - {self.model.tokenizer.unk_token_id}

    def __call__(self, texts: Sequence[str]) -> list[EmbeddedText]:
        """Embed texts; one of no word gives no token."""
        different = [*dict.fromkeys(texts), "a"]  # a word, so that no batch is without any token
        plain = [space_out(self.model.tokenizer, text) for text in different]  # "[SEP]" in a caption is no special token
        outputs = self.model.encode(plain, output_value=None, batch_size=256, show_progress_bar=False)
        # What is read from the device, and copied to it, goes in one piece for all texts: each piece is a wait.
        read = nn.utils.rnn.pad_sequence([torch.stack([out["input_ids"], out["attention_mask"]], 1) for out in outputs])
        kept = [[(i, t) for i, (t, real) in enumerate(x) if real and t not in self.special] for x in zip(*read.tolist())]
        places = to_device(torch.tensor([i for of_text in kept for i, _ in of_text], dtype=torch.long), read.device)
        embedded = {}
        for text, of_text, out, at in zip(different, kept, outputs, places.split([len(x) for x in kept])):
            embeddings = out["token_embeddings"].index_select(0, at)
            embedded[text] = EmbeddedText([t for _, t in of_text], embeddings)
        return [embedded[text] for text in texts]


@dataclass
class Comparison:
    """Descriptions of one prompt and what they are scored by; num_full, num_twin: see `vp.Texts`."""

    texts: Sequence[str]
    reference: str
    keywords: Sequence[str]
    num_full: int
    num_twin: int = 0


def embed_texts(encoder: TextEncoder, comparisons: Sequence[Comparison]) -> list[vp.Texts]:
    """What the rollouts of each comparison are scored by; one encoder call for all of them."""
    flat = [text for c in comparisons for text in (*c.texts, c.reference, *c.keywords)]
    embedded = dict(zip(flat, encoder(flat)))
    found = []
    for comparison in comparisons:
        ys, reference = [embedded[text] for text in comparison.texts], embedded[comparison.reference]
        keywords = [embedded[text] for text in comparison.keywords]
        found.append(
            vp.Texts(
                rollouts=[y.embeddings for y in ys],
                weights=[vp.repetition_weights(y.tokens, reference.tokens) for y in ys],
                reference=reference.embeddings,
                reference_weights=torch.stack([vp.repetition_weights(reference.tokens, y.tokens) for y in ys]),
                keywords=[k.embeddings for k in keywords if k.tokens],
                num_full=comparison.num_full,
                num_twin=comparison.num_twin,
            )
        )
    return found
