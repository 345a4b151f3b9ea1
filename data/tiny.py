"""Tiny checkpoints: a Qwen2.5-VL and a Qwen3-VL of one to two million parameters, built offline from a seed.

They are ordinary Hugging Face directories (safetensors, config, tokenizer, chat template, processor), so that
`AutoModelForImageTextToText` and `AutoProcessor` load them and the scripts have one code path for tiny and real models.

    python -m data.tiny --family qwen3_vl --out runs/tiny-qwen3
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from data.old_names import add_old_names
from data.words import WORD
from data.world import ACTIONS, COLOURS, PIXELS, SHAPES

Family = Literal["qwen2_5_vl", "qwen3_vl", "qwen3_5"]
BASE = Path(__file__).parent / "base.safetensors"  # made by data/base.py
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class TinySettings:
    """Settings of `python -m data.tiny`."""

    out: Path = Path("runs/tiny")
    """Folder to write."""
    family: Family = "qwen2_5_vl"
    """Architecture."""
    seed: int = 0
    """Seed of the random weights."""


def train_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE on the world's language: a word of the world is one token, and any other text falls to bytes."""
    words = [*ACTIONS, *COLOURS, *SHAPES, "a and the something user assistant system"]
    corpus = [f" {w}" for phrase in words for w in phrase.split()] * 4
    corpus += ["Describe the video.", "A Something the . , :", "0 1 2 3 4 5 6 7 8 9 seconds"] * 4
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=640, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(corpus, trainer)
    parts = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in parts["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=parts["vocab"], merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.model_max_length = 4096
    return tokenizer


def token_ids(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    """What a configuration must know of its tokenizer: the ids that stand for images and videos, and around them."""
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}


def load_base(model: torch.nn.Module, tokenizer: Qwen2Tokenizer, base: Path) -> None:
    """Put the weights of data/base.py's file into a model. Tokens that the base does not know keep their random weights."""
    weights = {name: weight.float() for name, weight in load_file(base).items()}
    with safe_open(base, "pt") as file:
        known = {token: row for row, token in enumerate(json.loads(file.metadata()["tokens"]))}
    embedding = "model.language_model.embed_tokens.weight"
    rows = model.get_input_embeddings().weight.detach().clone()
    for row, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if token in known:
            rows[row] = weights[embedding][known[token]]
    wrong = model.load_state_dict(weights | {embedding: rows}, strict=False)
    if wrong.unexpected_keys or set(wrong.missing_keys) - {"lm_head.weight"}:  # the head is the embedding
        raise ValueError(f"{base}: made for another tiny model ({wrong}); make it again with python -m data.base")


def build_tiny(out: Path, family: Family = "qwen2_5_vl", seed: int = 0, base: Path | None = None) -> Path:
    """Write a tiny checkpoint to `out` and return the folder: random weights, or those of data/base.py (Qwen2.5-VL)."""
    tokenizer = train_tokenizer()
    vision = dict(depth=2, hidden_size=96, num_heads=4, intermediate_size=192, out_hidden_size=128)
    # Three by three patches are one token: a clip of the world has four tokens a slot, each about a cell. Weights of the
    # usual 0.02 would let next to nothing through layers this narrow, and shapes would not be learned.
    vision |= dict(patch_size=8, spatial_merge_size=3, initializer_range=0.06)
    patches = dict(patch_size=8, merge_size=3)
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config_ids = token_ids(tokenizer) | {"tie_word_embeddings": True}
    torch.manual_seed(seed)
    pixels = dict(size={"shortest_edge": 24**2, "longest_edge": PIXELS**2}, **patches)
    image_processor = Qwen2VLImageProcessor(**pixels)
    if family == "qwen2_5_vl":
        vision |= dict(window_size=PIXELS, fullatt_block_indexes=[0, 1], tokens_per_second=4)
        config = Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision, **config_ids)
        model = Qwen2_5_VLForConditionalGeneration(config)
        video_processor = Qwen2VLVideoProcessor(cap_pixels_per_frame=False, **pixels)
        processor_class = Qwen2_5_VLProcessor
    elif family == "qwen3_vl":
        vision |= dict(num_position_embeddings=36, deepstack_visual_indexes=[0])
        text |= {"head_dim": 32, "rope_parameters": rope | {"mrope_interleaved": True}}
        config = Qwen3VLConfig(text_config=text, vision_config=vision, **config_ids)
        model = Qwen3VLForConditionalGeneration(config)
    elif family == "qwen3_5":
        vision |= dict(num_position_embeddings=36)
        text |= {"head_dim": 32, "layer_types": ["linear_attention", "full_attention"] * 2}
        text |= dict(linear_key_head_dim=32, linear_value_head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4)
        text |= {"rope_parameters": rope | {"mrope_interleaved": True, "partial_rotary_factor": 1.0}}
        model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision, **config_ids))
    else:
        raise ValueError(f"family: got {family!r}, expected one of {', '.join(get_args(Family))}")
    if family != "qwen2_5_vl":
        # Qwen3-VL's sizes count the pixels of the whole video: here those of 16 frames.
        size = {"shortest_edge": 16 * 24**2, "longest_edge": 16 * PIXELS**2}
        video_processor = Qwen3VLVideoProcessor(size=size, cap_pixels_per_frame=False, **patches)
        processor_class = Qwen3VLProcessor
    processor = processor_class(image_processor, tokenizer, video_processor, chat_template=CHAT_TEMPLATE)
    if base is not None:
        load_base(model, tokenizer, base)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    processor.save_pretrained(out)
    for name in ("config.json", "tokenizer_config.json"):
        add_old_names(out / name)
    return out


def build_text_encoder(out: Path, texts: Sequence[str] | None = None, seed: int = 0) -> Path:
    """Write a text encoder of static word embeddings to `out`: a SentenceTransformer directory, built offline.

    Words are those of `data/words.py`, of any script. A word is like itself (1), and, in the world, a little like the
    words of its kind (0.3: colours, shapes, verbs, what follows a verb, the rest); an unknown word is like nothing, not
    even itself. With `texts` it knows their words instead, each a kind of its own: nothing but equal words is alike. It is
    a BERT without layers, so that it loads and embeds like a trained encoder. What is already there is kept.
    """
    if (out / "modules.json").exists():
        return out
    # Late: they bring peft, bitsandbytes and torch's compiler with them, seconds that stage 1 has no use for.
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    # Lowercase is not Python's casefold: final sigma and sharp s are folded beside it.
    fold = [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("ς", "σ"), normalizers.Replace("ß", "ss")]
    normalizer, splitter = normalizers.Sequence(fold), pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    normalize, split = normalizer.normalize_str, splitter.pre_tokenize_str
    if texts is None:
        first, follow = {a.split()[0] for a in ACTIONS}, {w for a in ACTIONS for w in a.split()[1:]} - {"a"}
        kinds = [list(COLOURS), list(SHAPES), sorted(first), sorted(follow), ["a", "and", "the", "something"]]
    else:
        kinds = [[word] for word in sorted({word for text in texts for word, _ in split(normalize(text))})]
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {w: i for i, w in enumerate((w for kind in kinds for w in kind), 2)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizer, splitter
    width = 64 if texts is None else 384
    sizes = dict(hidden_size=width, num_hidden_layers=0, num_attention_heads=1, intermediate_size=width, type_vocab_size=1)
    bert = BertModel(BertConfig(vocab_size=len(vocabulary), **sizes))
    axes = torch.randn(len(vocabulary) + len(kinds), width, generator=torch.Generator().manual_seed(seed))
    axes -= axes.mean(1, keepdim=True)  # BERT's layer norm takes the mean out
    if len(axes) < width:
        axes = torch.linalg.qr(axes.T).Q.T  # at right angles, as long as there is room
    axes /= axes.norm(dim=1, keepdim=True)
    with torch.no_grad():
        for parameter in bert.embeddings.parameters():
            parameter.zero_()
        bert.embeddings.LayerNorm.weight.fill_(1.0)
        for k, kind in enumerate(kinds):
            for word in kind:
                own, of_kind = axes[vocabulary[word]], axes[len(vocabulary) + k]
                bert.embeddings.word_embeddings.weight[vocabulary[word]] = 0.7**0.5 * own + 0.3**0.5 * of_kind
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    plain = partial / "bert"
    bert.save_pretrained(plain)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", model_max_length=512)
    tokenizer.save_pretrained(plain)
    SentenceTransformer(modules=[Transformer(str(plain)), Pooling(width, "mean")]).save(str(partial / "whole"))
    with contextlib.suppress(OSError):  # another process was first
        os.replace(partial / "whole", out)
    shutil.rmtree(partial)
    return out


if __name__ == "__main__":
    import tyro

    settings = tyro.cli(TinySettings)
    print(build_tiny(settings.out, settings.family, settings.seed))
