"""Checkpoints that transformers 4.57 reads, too: what it looks for has other names there."""

import json
from pathlib import Path


def add_old_names(path: Path) -> None:
    """Say in a config.json or tokenizer_config.json what transformers 4.57 looks for, too, by the names that it had.

    Without them it finds no rotary positions, and ties no head: that of a tied model would be random, without an error.
    """
    config = json.loads(path.read_text("utf-8"))
    text = config.get("text_config", {})
    if "rope_parameters" in text:
        rope = dict(text["rope_parameters"])
        text |= {"tie_word_embeddings": config.get("tie_word_embeddings", False), "rope_theta": rope.pop("rope_theta")}
        text["rope_scaling"] = rope
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
