"""How a model is held: its attention, and its 4-bit weights."""

import importlib
import warnings

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from data.device import best_device, compute_dtype

# What transformers imports for each version of flash-attn.
FLASH_MODULES = {4: "flash_attn.cute", 3: "flash_attn_interface", 2: "flash_attn"}


def opens(version: int) -> bool:
    """Whether an installed flash-attn can be imported: a wheel built for another torch is found, but does not open."""
    try:
        importlib.import_module(FLASH_MODULES[version])
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        warnings.warn(
            f"flash-attn {version} is installed but does not open, and is not taken: {lines[0][:200]}", stacklevel=3
        )
        return False
    return True


def choose_attention() -> str:
    """The fastest attention that is installed and that this GPU can run, as transformers names it.

    flash-attn 4 is made for Hopper and Blackwell, 3 for Hopper, 2 for Ampere and all since; else sdpa.

    Branches behind a shared prefix need a mask that flash-attn does not know: VideoLM runs them with flex_attention on a
    GPU where it works and sdpa elsewhere, whatever is chosen here.
    """
    if compute_dtype(best_device()) == torch.bfloat16 and torch.cuda.is_available():
        generation, _ = torch.cuda.get_device_capability()
        if generation in (9, 10, 11) and is_flash_attn_4_available() and opens(4):
            return "flash_attention_4"
        if generation == 9 and is_flash_attn_3_available() and opens(3):
            return "flash_attention_3"
        if is_flash_attn_2_available() and opens(2):
            return "flash_attention_2"
    return "sdpa"


def nf4_config() -> BitsAndBytesConfig:
    """4-bit NormalFloat with double quantisation; the vision encoder and the output head stay as they are."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )  # fmt: skip
