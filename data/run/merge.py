"""Saving a model: merged with its adapters, file by file, or the adapter alone."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate.hooks import attach_align_device_hook
from rich.console import Console
from torch import Tensor, nn

from data.device import best_device, compute_dtype
from data.old_names import add_old_names
from data.run.models import load_pretrained

LARGEST_FILE = "2GB"  # of a checkpoint's weights; as much memory is taken while one is written


class MergedWeights(Mapping):
    """The weights of a model with its LoRA adapters folded in, under the plain model's names; the model is untouched.

    Each is made, on the CPU, when it is asked for: all at once would be a second model, a 4-bit one's four times its size.
    4-bit weights are dequantised first, so that the merged model answers as the trained one did. state: the model's own,
    if it is sharded over processes.
    """

    def __init__(self, hf: nn.Module, state: dict[str, Tensor] | None = None):
        base = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
        state = hf.state_dict() if state is None else state
        self.modules, self.dtype = dict(base.named_modules()), base.lm_head.weight.dtype
        self.state = {name.removeprefix("base_model.model.").replace(".base_layer.", "."): w for name, w in state.items()}

    def __getitem__(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        weight, layer = self.state[name], self.modules.get(owner)
        plain = getattr(getattr(layer, "base_layer", layer), "weight", None)
        if leaf == "weight" and hasattr(plain, "quant_state"):
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(plain.data, plain.quant_state).to(self.dtype)
        if leaf == "weight" and f"{owner}.lora_A.default.weight" in self.state:
            a, b = (self.state[f"{owner}.lora_{x}.default.weight"].float() for x in "AB")
            weight = (weight.float() + layer.scaling["default"] * (b @ a)).to(self.dtype)
        return weight.cpu()

    def __iter__(self) -> Iterator[str]:  # weight.absmax and the like say how 4 bits were packed
        return (name for name in self.state if ".lora_" not in name and ".weight." not in name)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def save_model(
    folder: Path, hf: nn.Module, processor, merged: bool, adapter: bool = True, state: dict[str, Tensor] | None = None
) -> None:
    """Write a model as a Hugging Face directory. Where it has a LoRA adapter: merged, the adapter folded in, and adapter,
    the adapter in a folder of that name, as peft loads it.

    state: the model's weights by name, if they are sharded over processes.
    """
    adapted = hasattr(hf, "get_base_model")
    if merged or not adapted:
        base = hf.get_base_model() if adapted else hf
        config = type(base.config).from_dict(base.config.to_dict() | {"quantization_config": None})
        del config.quantization_config
        with torch.device("meta"):
            plain = type(base)(config).to(base.lm_head.weight.dtype)  # no adapters, 4 bits or shards: it gives the names
        plain.generation_config = base.generation_config
        # A model on "disk" is written file by file, and its weights asked for when their file is due.
        plain.hf_device_map = {"": "disk"}
        attach_align_device_hook(plain, offload=True, weights_map=MergedWeights(hf, state))
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # "offloaded modules: mind the memory"
            plain.save_pretrained(folder, max_shard_size=LARGEST_FILE)
        add_old_names(folder / "config.json")
    if adapted and adapter:
        hf.save_pretrained(folder / "adapter", state_dict=state)
    processor.save_pretrained(folder)
    add_old_names(folder / "tokenizer_config.json")


@dataclass
class MergeSettings:
    """Fold the LoRA adapter of a checkpoint into its model: a plain Hugging Face directory."""

    model: tyro.conf.Positional[str]
    """A run's folder or a checkpoint."""
    out: Path = Path("runs/merged")
    """Folder to write."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: fold it into the 4-bit weights it was trained on, dequantised, in place of those they were made from."""


def run_merge(settings: MergeSettings, console: Console) -> Path:
    """The command `python eval.py merge`."""
    hf, processor = load_pretrained(settings.model, compute_dtype(best_device()), settings.quantize)
    if (settings.out / "config.json").exists():
        raise ValueError(f"--out {settings.out}: there is a model already; give another folder")
    save_model(settings.out, hf, processor, merged=True, adapter=False)
    console.print(str(settings.out), highlight=False, markup=False)
    return settings.out
