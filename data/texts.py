"""Texts as token embeddings, for the reward: any sentence-transformers model, its special tokens left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

import vp
from data.user_text import space_out


@dataclass
class EmbeddedText:
    """tokens: ids (L,); embeddings (L, D)."""

    tokens: list[int]
    embeddings: Tensor


class TextEncoder:
    """Token embeddings of texts by a SentenceTransformer directory or hub name, each text embedded once a call."""

    def __init__(self, model: str | Path, device: str | torch.device = "cpu"):
        try:
            self.model = SentenceTransformer(str(model), device=str(device), trust_remote_code=False).eval()
        except OSError as error:
            raise ValueError(f"--text-encoder {model}: {str(error).strip().splitlines()[0]}") from None
        self.special = set(self.model.tokenizer.all_special_ids) - {self.model.tokenizer.unk_token_id}

    def __call__(self, texts: Sequence[str]) -> list[EmbeddedText]:
        """Embed texts; one of no word gives no token."""
        different = [*dict.fromkeys(texts), "a"]  # a word, so that no batch is without any token
        plain = [space_out(self.model.tokenizer, text) for text in different]  # "[SEP]" in a caption is no special token
        outputs = self.model.encode(plain, output_value=None, batch_size=256, show_progress_bar=False)
        embedded = {}
        for text, out in zip(different, outputs):
            ids = out["input_ids"].tolist()
            keep = [i for i, t in enumerate(ids) if t not in self.special and out["attention_mask"][i]]
            embedded[text] = EmbeddedText([ids[i] for i in keep], out["token_embeddings"][keep].clone())
        return [embedded[text] for text in texts]


def embed_texts(
    encoder: TextEncoder, texts: Sequence[Sequence[str]], references: Sequence[str], keywords: Sequence[Sequence[str]],
    num_full: Sequence[int], num_twin: Sequence[int],
) -> list[vp.Texts]:  # fmt: skip
    """What each prompt's rollouts are scored by, see `vp.Texts`; one encoder call for all of them."""
    flat = [t for group in texts for t in group] + list(references) + [k for group in keywords for k in group]
    embedded = iter(encoder(flat))
    rollouts = [[next(embedded) for _ in group] for group in texts]
    captions = [next(embedded) for _ in references]
    words = [[next(embedded) for _ in group] for group in keywords]
    return [
        vp.Texts(
            rollouts=[y.embeddings for y in ys],
            weights=[vp.repetition_weights(y.tokens, reference.tokens) for y in ys],
            reference=reference.embeddings,
            reference_weights=torch.stack([vp.repetition_weights(reference.tokens, y.tokens) for y in ys]),
            keywords=[k.embeddings for k in ks if k.tokens],
            num_full=full,
            num_twin=twin,
        )
        for ys, reference, ks, full, twin in zip(rollouts, captions, words, num_full, num_twin)
    ]
